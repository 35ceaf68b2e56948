"""Whatever ends a run, nothing that was saved is lost, and the next run says what is wrong or goes on exactly."""
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import sys

import pytest
import torch
from conftest import (
    ALONE,
    launch,
    read_metrics,
    tiny_model,
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

STEPS = dict(max_steps=6, save_every=2)


def resume(out):
    return train.main(["--output_dir", str(out), "--resume"], ALONE)


def check_equal(left, right):
    a, b = weights(left), weights(right)
    assert all(torch.equal(value, b[name]) for name, value in a.items())

    def strip(path):
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in read_metrics(path)]

    assert strip(left) == strip(right)


@pytest.fixture
def full_disk():
    """No file may grow beyond this many bytes: to a process that is what a full disk is, an error in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [5_000, 100_000, 200_000])  # fails in the tokenizer's file, in the model's, in the optimizer's
def test_a_full_disk_loses_nothing_that_was_saved_and_the_run_goes_on_once_there_is_room(fit, full_disk, size):
    whole, _ = fit(**STEPS, out="whole")
    out, _ = fit(**STEPS)
    for path in ("checkpoint-4", "metrics.jsonl"):
        (out / path).rename(out.parent / path)  # only the first checkpoint is there
    (out.parent / "metrics.jsonl").rename(out / "metrics.jsonl")
    unfinished(out)
    full_disk(size)
    with pytest.raises(ValueError, match=r"could not be written \(.*File too large.*; what was there before is whole. Make room, then: python"):
        resume(out)
    full_disk(resource.RLIM_INFINITY)
    assert {path.name for path in out.iterdir()} == {".lock", "config.json", "metrics.jsonl", "checkpoint-2"}
    resume(out)
    check_equal(whole, out)


def spoil(path, how):
    if how == "gone":
        return path.unlink()
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2] if how == "truncated" else content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "optimizer"])
def test_a_damaged_checkpoint_is_seen_and_the_one_before_it_comes_to_the_same_end(fit, capsys, file, how):
    whole, _ = fit(**STEPS, out="whole")
    out = unfinished(fit(**STEPS)[0])
    path = out / "checkpoint-4" / file
    path = next(path.iterdir()) if path.is_dir() else path
    if file == "state.json" and how == "flipped":  # valid JSON, but of another file
        path.write_text(path.read_text().replace('"files": {', '"files": {"more": "0", '))
    else:
        spoil(path, how)
    resume(out)
    assert "checkpoint-4 is damaged (" in capsys.readouterr().out
    assert {path.name for path in out.glob("*checkpoint-*")} == {"checkpoint-2", "damaged-checkpoint-4", "checkpoint-4"}
    check_equal(whole, out)

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
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_a_folder_of_the_user_whose_name_only_begins_like_a_checkpoint_is_left_alone(fit):
    whole, _ = fit(**STEPS, out="whole")
    out = unfinished(fit(**STEPS)[0])
    for name in ("checkpoint-best", "checkpoint-4-copy", "checkpoint-"):
        (out / name).mkdir()
    assert [path.name for path in checkpoint.checkpoints(out)] == ["checkpoint-2", "checkpoint-4"]
    resume(out)
    assert (out / "checkpoint-best").exists()
    check_equal(whole, out)


OPTIMIZERS = {
    "SGD": lambda trained, lr: torch.optim.SGD(trained, lr),
    "SGD with momentum": lambda trained, lr: torch.optim.SGD(trained, lr, momentum=0.9),
    "Adafactor": lambda trained, lr: torch.optim.Adafactor(trained, lr),
    "two groups": lambda trained, lr: torch.optim.NAdam([{"params": trained[1::2], "lr": lr / 2}, {"params": trained[::2]}], lr),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_with_another_optimizer_than_adamw_resumes_bit_for_bit(fit, monkeypatch, name):
    def make_optimizer(model, lr, device):
        return OPTIMIZERS[name]([parameter for parameter in model.parameters() if parameter.requires_grad], lr)

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    whole, _ = fit(**STEPS, out="whole", lr=0.1)
    out = unfinished(fit(**STEPS, lr=0.1)[0])
    resume(out)
    check_equal(whole, out)
    start = weights(json.loads((out / "config.json").read_text())["flags"]["model"])
    assert any(not torch.equal(value, start[name]) for name, value in weights(out).items())


def test_an_optimizer_whose_state_is_not_in_tensors_is_refused_instead_of_resumed_wrongly(fit, monkeypatch):
    class Counts(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["count"] = self.state[parameter].get("count", 0) + 1

    monkeypatch.setattr(train, "make_optimizer", lambda model, lr, device: Counts(model.parameters(), lr))
    with pytest.raises(NotImplementedError, match=r"Counts keeps model\..*\.count as a int; a checkpoint stores only tensors"):
        fit(**STEPS)


def test_the_hashes_of_a_checkpoint_are_those_of_its_files_and_the_optimizer_is_not_read_to_have_them(fit, monkeypatch):
    read, digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, *given: read.append(pathlib.Path(file.name)) or digest(file, *given))
    out, _ = fit(**STEPS, keep_checkpoints=9)
    assert read and not [path for path in read if path.parent.name == "optimizer"]
    for path in out.glob("checkpoint-*"):
        files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != "state.json"}
        assert json.loads((path / "state.json").read_text())["files"] == {
            name: hashlib.blake2b(content).hexdigest() for name, content in files.items()}
        assert any(name.startswith("optimizer/") for name in files)


# --- what checkpoints need of the disk

def sizes(path):
    """Bytes of the tensors, without the headers of the files."""
    return sum(tensor.nbytes for file in path.rglob("*.safetensors") for tensor in load_file(file).values())


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 4}, {"sync_ref_every": 1}, {"adapter": True, "sync_ref_every": 1}])
def test_the_size_that_is_said_before_the_first_step_is_that_of_the_files(fit, capsys, tmp_path, flags):
    if "adapter" in flags:
        flags = flags | {"adapter": fit(loss="sft", lora_rank=4, max_steps=1, out="sft")[0]}
    capsys.readouterr()
    out, _ = fit(**STEPS, **flags)
    said = re.search(r"a checkpoint has ([\d.]+) kB; written every 2 steps and when interrupted, the newest 2 kept", capsys.readouterr().out)
    assert float(said[1]) * 1000 == pytest.approx(sizes(out / "checkpoint-4"), rel=0.01)  # AdamW counts the steps of each parameter, in 4 bytes


def test_a_large_checkpoint_is_kept_once_and_a_small_one_twice(fit, monkeypatch, capsys):
    small, _ = fit(**STEPS, out="small")
    monkeypatch.setattr(checkpoint, "LARGE", 1000)
    large, _ = fit(**STEPS, out="large")
    chosen, _ = fit(**STEPS, keep_checkpoints=2, out="chosen")
    assert [len(list(path.glob("checkpoint-*"))) for path in (small, large, chosen)] == [2, 1, 2]
    assert "the newest 1 kept" in capsys.readouterr().out


def test_a_disk_without_room_for_the_checkpoints_is_told_before_the_first_step(fit, monkeypatch, capsys, tmp_path):
    """Of three that are on it at once, while the third is written; one is enough where none is due before the end."""
    out, _ = fit(**STEPS, out="measured")
    size = sizes(out / "checkpoint-4")
    usage = shutil.disk_usage(tmp_path)
    for free, flags, refused in ((2 * size, {}, False), (size, {}, True), (2 * size, {"save_every": 1}, True),
                                 (2 * size, {"save_every": 1, "keep_checkpoints": 1}, False), (0, {"save_every": 0}, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        name = f"out-{free}-{len(flags)}-{refused}"
        if refused:
            with pytest.raises(ValueError, match=r"free, but checkpoints need .*; make room, or lower --keep_checkpoints, or write none by --save_every 0"):
                fit(**STEPS | flags, out=name)
            assert not (tmp_path / name).exists()
        else:
            fit(**STEPS | flags, out=name)
    assert "There is no room for it: 0.0 kB free" in capsys.readouterr().out


def test_where_every_checkpoint_is_damaged_the_run_is_refused(fit):
    out = unfinished(fit(**STEPS)[0])
    for path in out.glob("checkpoint-*/model.safetensors"):
        spoil(path, "truncated")
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged; begin again in another --output_dir"):
        resume(out)


def test_loading_a_checkpoint_unpickles_nothing(fit, monkeypatch):
    """A pickle may run any code. The files are safetensors and JSON, and torch.load is not called."""
    out = unfinished(fit(**STEPS)[0])
    suffixes = {path.suffix for path in out.glob("checkpoint-*/**/*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".jinja"}
    import pickle
    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, lambda *given, **named: pytest.fail("unpickled"))
    resume(out)


def test_another_reference_is_refused_by_name(fit, tokenizer, tmp_path):
    other = tiny_model("llama", tokenizer)
    models.save_model(other, tokenizer, tmp_path / "other")
    out = unfinished(fit(**STEPS, ref_model=tmp_path / "other")[0])
    other.lm_head.weight.data.mul_(2)
    models.save_model(other, tokenizer, tmp_path / "other")
    with pytest.raises(ValueError, match="--resume: the reference, or the model below the adapter, has other weights than when this run began"):
        resume(out)


def test_a_float32_run_sees_a_reference_that_changed_by_less_than_bfloat16_shows(fit, tmp_path, tokenizer):
    model = tiny_model("llama", tokenizer)
    models.save_model(model, tokenizer, tmp_path / "reference")
    flags = dict(ref_model=tmp_path / "reference", max_steps=4, save_every=2)
    unfinished(fit(**flags)[0])
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[0, 0] *= 1 + 1e-5
    models.save_model(model, tokenizer, tmp_path / "reference")
    with pytest.raises(ValueError, match="has other weights than when this run began"):
        fit("--resume", **flags)



def test_a_gradient_that_is_not_finite_stops_with_step_weight_and_rows_and_spoils_nothing(fit, monkeypatch, tmp_path):
    load = train.load_policy

    def spoiled(*given):
        module, calls = load(*given), []
        module.model.lm_head.weight.register_hook(lambda gradient: gradient * (float("inf") if calls.append(1) or len(calls) > 9 else 1))
        return module

    monkeypatch.setattr(train, "load_policy", spoiled)
    with pytest.raises(FloatingPointError, match=r"step 4: the loss is 0\.\d+, the gradient norm (inf|nan); (.|\n)*backward pass that overflows, in "
                       r"model.lm_head.weight and 0 more, on the rows .*pairs.jsonl, row \d+"):
        fit(**STEPS)
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert all(value.isfinite().all() for value in weights(tmp_path / "out" / "checkpoint-2").values())


def test_out_of_memory_names_the_flags_that_help(fit, monkeypatch, capsys, folder, pairs, tmp_path):
    monkeypatch.setattr(train, "collate", lambda *given: torch.empty(2 ** 50))
    monkeypatch.setattr(sys, "argv", ["train.py", f"--model={folder}", f"--dataset={pairs}", "--max_length=64", f"--output_dir={tmp_path / 'out'}"])
    monkeypatch.setattr(train, "init_distributed", lambda: ALONE)
    with pytest.raises(SystemExit) as stop:
        train.run()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: out of memory (") and said.count("\n") == 1
    for flag in ("micro_batch_size", "gradient_checkpointing", "ref cache", "max_length", "parallel fsdp", "lora_rank", "quantize"):
        assert f"--{flag}" in said and flag.split()[0] in vars(train.parse_args([])[0])


def test_two_runs_on_one_folder_are_refused_and_a_killed_one_leaves_no_lock(folder, pairs, tmp_path):
    process = launch(folder, pairs, tmp_path / "out", epochs=4000)
    wait_for_checkpoint(process, tmp_path / "out")
    for flags in (["--resume"], [f"--model={folder}", f"--dataset={pairs}"]):
        with pytest.raises(ValueError, match="another run is writing there"):
            train.main([f"--output_dir={tmp_path / 'out'}", *flags], ALONE)
    process.kill()
    process.wait()
    with train.claim(tmp_path / "out", True, ALONE):
        pass

def test_a_file_system_without_locks_is_refused_with_one_line_and_not_with_a_lock_that_outlives_a_kill(monkeypatch, tmp_path):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(errors.UserError, match="--output_dir .*out: cannot be locked .*; choose a folder on another file system"):
        with train.claim(tmp_path / "out", False, ALONE):
            pass


def test_what_a_killed_run_has_half_written_is_deleted_by_the_next_one(fit):
    whole, _ = fit(**STEPS, out="whole")
    out = unfinished(fit(**STEPS)[0])
    assert {path.name for path in out.iterdir()} == {".lock", "config.json", "metrics.jsonl", "checkpoint-2", "checkpoint-4"}
    half = out / f"{files.PARTIAL}0" / "checkpoint-6"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    resume(out)
    assert not half.parent.exists()
    check_equal(whole, out)


def test_a_write_that_fails_leaves_the_file_as_it_was_and_nothing_else(tmp_path):
    path = tmp_path / "rows.txt"
    files.write_text(path, "old")
    for target in (path, tmp_path / "folder"):
        with pytest.raises(KeyboardInterrupt), files.written_aside(target) as temporary:
            (temporary if target == path else temporary.with_name("more")).write_text("half")
            raise KeyboardInterrupt
    assert path.read_text() == "old" and [path] == list(tmp_path.iterdir())


def test_files_are_moved_into_a_folder_with_others_and_the_file_named_last_is_moved_last(tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("kept")
    moved, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda source, target: moved.append(pathlib.Path(target).name) or replace(source, target))
    with files.moved_into(tmp_path, last="b") as aside:
        for name in "cba":
            (aside / name).write_text(name)
        assert not (tmp_path / "a").exists()
    assert moved[-1] == "b" and sorted(moved) == ["a", "b", "c"]
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "c", "kept"}


def workers(process):
    """The processes that torchrun started."""
    stats = (path.read_text().rsplit(")", 1) for path in pathlib.Path("/proc").glob("[0-9]*/stat"))
    return [int(head.split()[0]) for head, tail in stats if int(tail.split()[1]) == process.pid]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_where_one_process_is_killed_the_others_say_so_and_end_within_a_minute(folder, pairs, tmp_path, parallel):
    process = launch(folder, pairs, tmp_path / "out", torchrun=2, parallel=parallel, epochs=4000)
    wait_for_checkpoint(process, tmp_path / "out")
    os.kill(workers(process)[-1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert "another process of this run has ended, or does not answer" in stderr and process.returncode != 0
    assert train.newest_checkpoint(tmp_path / "out", ALONE)[0]


def test_a_sharded_run_that_was_stopped_goes_on_with_another_number_of_processes(fit, folder, pairs, tmp_path):
    """Two processes and FSDP first, then one: a learning rate and a float64 under which any difference in state would show."""
    flags = dict(epochs=40, save_every=5, dtype="float64", loss="bco_pair", sync_ref_every=7)
    process = launch(folder, pairs, tmp_path / "out", torchrun=2, parallel="fsdp", **flags)
    wait_for_checkpoint(process, tmp_path / "out")
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert "to go on: python train.py" in stdout, stderr[-2000:]
    train.main([f"--output_dir={tmp_path / 'out'}", "--resume", "--parallel=ddp"], ALONE)
    whole, metrics = fit(**flags, out="whole")
    again = weights(tmp_path / "out")
    assert all(torch.allclose(value, again[name], atol=1e-6) for name, value in weights(whole).items())
    for a, b in zip(metrics, read_metrics(tmp_path / "out"), strict=True):
        assert a["step"] == b["step"] and a["loss"] == pytest.approx(b["loss"], abs=1e-6)
