"""No fault loses a saved file: the next run resumes exactly, or reports the error in one line."""
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import pickle
import re
import resource
import shutil
import signal
import sys
import threading

import pytest
import torch
from conftest import (
    ALONE,
    TINY_RUN,
    differences,
    resume,
    start_training,
    tiny_model,
    to_arguments,
    unfinished,
    wait_for_checkpoint,
    weights,
)
from safetensors.torch import load_file

import checkpoint
import errors
import files
import model as models
import train

STEPS = {"max_steps": 6, "save_every": 2}


@pytest.fixture
def full_disk():
    """Limit the size of every file. A write beyond the limit fails in the middle, as on a full
    disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The write fails in the tokenizer's file, in the model's, in the optimizer's.
# It is also the limit of the file with what pytest captures.
@pytest.mark.parametrize("size", [12_000, 100_000, 200_000])
def test_a_full_disk_loses_no_saved_file_and_the_run_resumes_once_there_is_room(
        fit, full_disk, size):
    whole, _ = fit(**STEPS, out="whole")
    out, _ = fit(**STEPS)
    shutil.rmtree(out / "checkpoint-4")
    unfinished(out)
    full_disk(size)
    message = (r"could not be written \(.*File too large.*; what was there before is whole. "
               "Make room, then: python")
    with pytest.raises(ValueError, match=message):
        resume(out)
    full_disk(resource.RLIM_INFINITY)
    names = {path.name for path in out.iterdir()}
    assert names == {".lock", files.LIST, "config.json", "metrics.jsonl", "checkpoint-2"}
    resume(out)
    assert not differences(whole, out)


def spoil(path, damage):
    """Delete the file, cut it in half, or flip one bit near its end."""
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:len(content) // 2])
    else:
        flipped = bytes([content[-9] ^ 1])
        path.write_bytes(content[:-9] + flipped + content[-8:])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone"])
@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "optimizer"])
def test_a_damaged_checkpoint_is_detected_and_the_one_before_it_leads_to_the_same_end(
        fit, capsys, file, damage):
    whole, _ = fit(**STEPS, out="whole")
    out = unfinished(fit(**STEPS)[0])
    path = out / "checkpoint-4" / file
    if path.is_dir():
        path = next(path.iterdir())
    if file == "state.json" and damage == "flipped":  # valid JSON, but with a file that is missing
        path.write_text(path.read_text().replace('"files": {', '"files": {"more": "0", '))
    else:
        spoil(path, damage)
    resume(out)
    assert "checkpoint-4 is damaged (" in capsys.readouterr().out
    names = {path.name for path in out.glob("*checkpoint-*")}
    assert names == {"checkpoint-2", "damaged-checkpoint-4", "checkpoint-4"}
    assert not differences(whole, out)

def test_a_second_damage_of_the_same_checkpoint_takes_a_free_name_and_keeps_the_first(fit, capsys):
    out = unfinished(fit(**STEPS)[0])
    earlier = out / "damaged-checkpoint-4"
    earlier.mkdir()
    (earlier / "note").write_text("kept")
    spoil(out / "checkpoint-4" / "model.safetensors", "truncated")
    resume(out)
    assert "checkpoint-4 is damaged (model.safetensors) and is now " in capsys.readouterr().out
    assert (earlier / "note").read_text() == "kept"
    assert (out / "damaged-checkpoint-4-2" / "state.json").exists()
    found = sorted(path.name for path in out.glob("checkpoint-*"))
    assert found == ["checkpoint-2", "checkpoint-4"]


def test_a_folder_of_the_user_whose_name_only_begins_like_a_checkpoint_is_left_alone(fit):
    whole, _ = fit(**STEPS, out="whole")
    out = unfinished(fit(**STEPS)[0])
    for name in ("checkpoint-best", "checkpoint-4-copy", "checkpoint-"):
        (out / name).mkdir()
    assert [path.name for path in checkpoint.checkpoints(out)] == ["checkpoint-2", "checkpoint-4"]
    resume(out)
    assert (out / "checkpoint-best").exists()
    assert not differences(whole, out)


def in_two_groups(trained, lr):
    groups = [{"params": trained[1::2], "lr": lr / 2}, {"params": trained[::2]}]
    return torch.optim.NAdam(groups, lr)


OPTIMIZERS = {
    "SGD": lambda trained, lr: torch.optim.SGD(trained, lr),
    "SGD with momentum": lambda trained, lr: torch.optim.SGD(trained, lr, momentum=0.9),
    "Adafactor": lambda trained, lr: torch.optim.Adafactor(trained, lr),
    "two groups": in_two_groups,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_with_another_optimizer_than_adamw_resumes_bit_for_bit(fit, monkeypatch, name):
    def make_optimizer(model, args, device):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return OPTIMIZERS[name](trained, args.lr)

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    whole, _ = fit(**STEPS, out="whole", lr=0.1)
    out = unfinished(fit(**STEPS, lr=0.1)[0])
    resume(out)
    assert not differences(whole, out)
    start = weights(json.loads((out / "config.json").read_text())["flags"]["model"])
    assert any(not torch.equal(value, start[name]) for name, value in weights(out).items())


class Counts(torch.optim.SGD):
    """Counts the steps of each parameter in a plain number."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state["count"] = state.get("count", 0) + 1


def test_an_optimizer_with_state_outside_of_tensors_is_refused(fit, monkeypatch):
    """A checkpoint would not hold the number, and the resumed run would differ."""
    def make_optimizer(model, args, device):
        return Counts(model.parameters(), args.lr)

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    message = r"Counts keeps model\..*\.count as a int; a checkpoint stores only tensors"
    with pytest.raises(NotImplementedError, match=message):
        fit(**STEPS)


def test_a_checkpoint_holds_the_hash_of_each_of_its_files(fit):
    out, _ = fit(**STEPS, keep_checkpoints=9)
    for folder in out.glob("checkpoint-*"):
        hashes = {}
        for path in folder.rglob("*"):
            if path.is_file() and path.name != "state.json":
                content = path.read_bytes()
                hashes[str(path.relative_to(folder))] = hashlib.blake2b(content).hexdigest()
        assert json.loads((folder / "state.json").read_text())["files"] == hashes
        assert any(name.startswith("optimizer/") for name in hashes)


@pytest.fixture
def files_read():
    """A list to which every file that Python opens for reading is added."""
    paths, watching = [], threading.Event()

    def note(event, arguments):
        if watching.is_set() and event == "open" and isinstance(arguments[0], str):
            flags = arguments[2]
            if not flags & (os.O_WRONLY | os.O_CREAT):
                paths.append(pathlib.Path(arguments[0]))

    watching.set()
    sys.addaudithook(note)
    yield paths
    watching.clear()  # an audit hook cannot be removed


def test_the_optimizer_is_not_read_back_to_hash_it(fit, files_read):
    """The model is: the library that writes it cannot hash it on the way."""
    out, _ = fit(**STEPS, keep_checkpoints=9)
    read = [path for path in files_read if out in path.parents]
    assert any(path.name == "model.safetensors" for path in read)
    assert not any(path.parent.name == "optimizer" for path in read)


# --- the disk space of checkpoints

def tensor_sizes(folder):
    """Bytes of the tensors, without the headers of the files."""
    size = 0
    for path in folder.rglob("*.safetensors"):
        size += sum(tensor.nbytes for tensor in load_file(path).values())
    return size


@pytest.mark.parametrize("flags", [
    {}, {"lora_rank": 4}, {"sync_ref_every": 1}, {"adapter": True, "sync_ref_every": 1},
])
def test_the_size_that_is_printed_before_the_first_step_is_that_of_the_files(fit, capsys, flags):
    if "adapter" in flags:
        adapter, _ = fit(loss="sft", lora_rank=4, max_steps=1, out="sft")
        flags = flags | {"adapter": adapter}
    capsys.readouterr()
    out, _ = fit(**STEPS, **flags)
    line = re.search(
        r"a checkpoint has ([\d.]+) kB; written every 2 steps and when interrupted, "
        "the newest 2 kept", capsys.readouterr().out)
    # AdamW also stores a step count of 4 bytes for each parameter.
    assert float(line[1]) * 1000 == pytest.approx(tensor_sizes(out / "checkpoint-4"), rel=0.01)


def test_the_newest_large_checkpoint_is_kept_and_the_newest_two_small_ones(
        fit, monkeypatch, capsys):
    small, _ = fit(**STEPS, out="small")
    monkeypatch.setattr(checkpoint, "LARGE", 1000)
    large, _ = fit(**STEPS, out="large")
    chosen, _ = fit(**STEPS, keep_checkpoints=2, out="chosen")
    counts = [len(list(path.glob("checkpoint-*"))) for path in (small, large, chosen)]
    assert counts == [2, 1, 2]
    assert "the newest 1 kept" in capsys.readouterr().out


@pytest.fixture
def free_space(fit, monkeypatch, tmp_path):
    """Set the free space of the disk, in checkpoints."""
    out, _ = fit(**STEPS, out="measured")
    size = tensor_sizes(out / "checkpoint-4")
    usage = shutil.disk_usage(tmp_path)

    def set_free(checkpoints):
        free = usage._replace(free=checkpoints * size)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)

    return set_free


# The disk holds all kept checkpoints and the one being written. A run of 6 steps with
# --save_every 2 writes two, because the last step saves the model only.
@pytest.mark.parametrize("checkpoints, flags", [
    (1, {}),
    (2, {"save_every": 1}),
])
def test_a_disk_without_room_for_the_checkpoints_is_refused_before_the_first_step(
        fit, free_space, tmp_path, checkpoints, flags):
    free_space(checkpoints)
    message = ("free, but checkpoints need .*; make room, or lower --keep_checkpoints, "
               "or write none by --save_every 0")
    with pytest.raises(ValueError, match=message):
        fit(**STEPS | flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("checkpoints, flags", [
    (2, {}),
    (2, {"save_every": 1, "keep_checkpoints": 1}),
    (0, {"save_every": 0}),
])
def test_a_disk_with_just_enough_room_for_the_checkpoints_is_accepted(
        fit, free_space, capsys, checkpoints, flags):
    free_space(checkpoints)
    fit(**STEPS | flags)
    no_room = "There is no room for it: 0.0 kB free" in capsys.readouterr().out
    assert no_room == (checkpoints == 0)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(fit):
    out = unfinished(fit(**STEPS)[0])
    for path in out.glob("checkpoint-*/model.safetensors"):
        spoil(path, "truncated")
    message = "every checkpoint in .* is damaged; begin again in another --output_dir"
    with pytest.raises(ValueError, match=message):
        resume(out)


def test_loading_a_checkpoint_unpickles_nothing(fit, monkeypatch):
    """A pickle may run any code. The files are safetensors and JSON, and torch.load is not
    called."""
    out = unfinished(fit(**STEPS)[0])
    suffixes = {path.suffix for path in out.glob("checkpoint-*/**/*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".jinja"}

    def refuse(*arguments, **options):
        pytest.fail("unpickled")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    resume(out)


def test_a_resumed_run_with_a_changed_reference_is_refused(fit, tokenizer, tmp_path):
    other = tiny_model("llama", tokenizer)
    models.save_model(other, tokenizer, tmp_path / "other")
    out = unfinished(fit(**STEPS, ref_model=tmp_path / "other")[0])
    other.lm_head.weight.data.mul_(2)
    models.save_model(other, tokenizer, tmp_path / "other")
    message = ("--resume: the weights of the reference, or of the model below the adapter, "
               "changed since the run began; restore the files, or start a new run in another")
    with pytest.raises(ValueError, match=message):
        resume(out)


def test_a_float32_run_detects_a_change_of_the_reference_that_bfloat16_would_round_away(
        fit, tmp_path, tokenizer):
    model = tiny_model("llama", tokenizer)
    models.save_model(model, tokenizer, tmp_path / "reference")
    flags = {"ref_model": tmp_path / "reference", "max_steps": 4, "save_every": 2}
    unfinished(fit(**flags)[0])
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[0, 0] *= 1 + 1e-5
    models.save_model(model, tokenizer, tmp_path / "reference")
    with pytest.raises(ValueError, match="the weights of the reference, .* changed since"):
        fit("--resume", **flags)


def test_a_gradient_that_is_not_finite_stops_the_run_with_step_weight_and_rows(
        fit, monkeypatch, tmp_path):
    """The checkpoint before that step is finite and kept."""
    load_policy = train.load_policy

    def load_with_overflow(*arguments):
        """From the tenth micro-batch on, the gradient of the head overflows."""
        policy, calls = load_policy(*arguments), []

        def overflow(gradient):
            calls.append(1)
            return gradient * float("inf") if len(calls) > 9 else gradient

        policy.model.lm_head.weight.register_hook(overflow)
        return policy

    monkeypatch.setattr(train, "load_policy", load_with_overflow)
    message = (r"step 4: the loss is 0\.\d+, the gradient norm (inf|nan); (.|\n)*backward pass "
               r"that overflows, in model.lm_head.weight and 0 more, on the rows .*pairs.jsonl, "
               r"row \d+")
    with pytest.raises(FloatingPointError, match=message):
        fit(**STEPS)
    kept = checkpoint.checkpoints(tmp_path / "out")
    assert [path.name for path in kept] == ["checkpoint-2"]
    assert all(value.isfinite().all() for value in weights(kept[0]).values())


def test_out_of_memory_is_one_line_that_names_the_flags_that_help(
        monkeypatch, capsys, folder, pairs, tmp_path):
    flags = {"model": folder, "dataset": pairs, "max_length": 64, "output_dir": tmp_path / "out"}
    monkeypatch.setattr(train, "collate", lambda *arguments: torch.empty(2 ** 50))
    monkeypatch.setattr(train, "init_distributed", lambda: ALONE)
    monkeypatch.setattr(sys, "argv", ["train.py", *to_arguments(flags)])
    with pytest.raises(SystemExit) as stop:
        train.run()
    stderr = capsys.readouterr().err
    assert stop.value.code == 2
    assert stderr.startswith("error: out of memory (") and stderr.count("\n") == 1
    known_flags = vars(train.parse_args([])[0])
    for option in (
        "micro_batch_size", "gradient_checkpointing", "ref cache", "max_length", "parallel fsdp",
        "lora_rank", "quantize",
    ):
        assert f"--{option}" in stderr and option.split()[0] in known_flags


def test_two_runs_in_one_folder_are_refused_and_a_killed_run_leaves_no_lock(
        folder, pairs, tmp_path):
    out = tmp_path / "out"
    given = {"model": folder, "dataset": pairs}
    flags = TINY_RUN | given | {"output_dir": out, "epochs": 4000, "save_every": 5}
    process = start_training(flags)
    wait_for_checkpoint(process, out)
    for arguments in (["--resume"], to_arguments(given)):
        with pytest.raises(ValueError, match="another run is writing there"):
            train.main([f"--output_dir={out}", *arguments], ALONE)
    process.kill()
    process.wait()
    with checkpoint.claim(out, True, ALONE):
        pass


def test_a_file_system_without_locks_is_refused(monkeypatch, tmp_path):
    """A lock file without a lock of the system would outlive a killed process."""
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    message = "--output_dir .*out: cannot be locked .*; choose a folder on another file system"
    with pytest.raises(errors.UserError, match=message):
        with checkpoint.claim(tmp_path / "out", False, ALONE):
            pass


def test_files_that_a_killed_run_was_writing_are_deleted_by_the_next_run(fit):
    whole, _ = fit(**STEPS, out="whole")
    out = unfinished(fit(**STEPS)[0])
    partial = out / f"{files.PARTIAL}0123abcd" / "checkpoint-6"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    resume(out)
    assert not list(out.glob(f"{files.PARTIAL}*"))
    assert not differences(whole, out)


def test_a_write_that_fails_leaves_the_old_file_and_no_partial_one(tmp_path):
    path = tmp_path / "rows.txt"
    files.write_text(path, "old")
    with pytest.raises(KeyboardInterrupt):
        with files.written_aside(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        with files.written_aside(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / "file").write_text("half")
            raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_are_moved_into_a_folder_beside_others_and_the_file_named_last_is_moved_last(
        tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("kept")
    moved, replace = [], os.replace

    def note(source, target):
        moved.append(pathlib.Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    with files.moved_into(tmp_path, last="b") as aside:
        for name in "cba":
            (aside / name).write_text(name)
        assert not (tmp_path / "a").exists()
    assert moved[-1] == "b" and sorted(moved) == ["a", "b", "c"]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "kept"}


def child_processes(process):
    """The ids of the processes that torchrun started."""
    children = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        # "id (name) state parent ..."; the name may hold spaces and parentheses.
        start, rest = path.read_text().rsplit(")", 1)
        if int(rest.split()[1]) == process.pid:
            children.append(int(start.split()[0]))
    return children


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_if_one_process_is_killed_the_others_report_it_and_end_within_a_minute(
        folder, pairs, tmp_path, parallel):
    out = tmp_path / "out"
    flags = {"model": folder, "dataset": pairs, "output_dir": out, "parallel": parallel,
             "epochs": 4000, "save_every": 5}
    process = start_training(TINY_RUN | flags, torchrun=2)
    wait_for_checkpoint(process, out)
    os.kill(child_processes(process)[-1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert "another process of this run has ended, or does not answer" in stderr
    assert process.returncode != 0
    newest, _ = checkpoint.newest_checkpoint(out, ALONE)
    assert newest


@pytest.mark.slow
def test_a_sharded_run_that_was_stopped_resumes_with_another_number_of_processes(
        fit, folder, pairs, tmp_path):
    """Two processes and FSDP first, then one. The learning rate and float64 make any difference
    in the state visible."""
    out = tmp_path / "out"
    flags = {"epochs": 40, "save_every": 5, "dtype": "float64", "loss": "bco_pair",
             "sync_ref_every": 7}
    given = {"model": folder, "dataset": pairs, "output_dir": out, "parallel": "fsdp"}
    process = start_training(TINY_RUN | flags | given, torchrun=2)
    wait_for_checkpoint(process, out)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    message = "to continue: start it again, by the same launcher, with --output_dir"
    assert message in stdout, stderr[-2000:]
    resume(out, "--parallel=ddp")
    whole, _ = fit(**flags, out="whole")
    assert not differences(whole, out, 1e-6)
