"""Everything that a resumed run reads is as the run left it, or the run says what was changed.

Each test breaks a copy of a run that was killed after its checkpoint of step 4 of 6, and resumes
it. Either the end equals that of the uninterrupted run bit for bit, or one line names the file.
"""
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from conftest import (
    ALONE,
    ROOT,
    TINY_RUN,
    differences,
    make_rows,
    resume,
    tiny_model,
    to_arguments,
    unfinished,
    write_jsonl,
)
from safetensors.torch import load_file, save_file

import checkpoint
import model as models
import train
import world
from errors import UserError

STEPS = {"max_steps": 6, "save_every": 2}


def run_in(home, folder, rows, **flags):
    """Train in home/whole -> the folder of the complete run, and of one killed after step 4."""
    flags = TINY_RUN | STEPS | {"model": folder, "dataset": rows} | flags
    train.main(to_arguments(flags | {"output_dir": home / "whole"}), ALONE)
    shutil.copytree(home / "whole", home / "killed")
    return home / "whole", unfinished(home / "killed")


@pytest.fixture(scope="module")
def runs(folder, pairs, tmp_path_factory):
    """A run whose δ, schedule and metrics all matter."""
    return run_in(tmp_path_factory.mktemp("runs"), folder, pairs, loss="bco_pair", eval_every=3)


@pytest.fixture
def whole(runs):
    return runs[0]


@pytest.fixture
def killed(runs, tmp_path):
    return pathlib.Path(shutil.copytree(runs[1], tmp_path / "killed"))


def edit_json(path, change):
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(json.dumps(content if changed is None else changed))


# --- state.json -----------------------------------------------------------------------------------

STATE_EDITS = {
    "step": lambda state: state.update(step=2),
    "another delta": lambda state: state["loss_state"].update(delta=9.0),
    "an earlier place in the schedule": lambda state: state["scheduler"].update(last_epoch=1),
    "another learning rate": lambda state: state["flags"].update(lr=0.5),
    "another seed": lambda state: state["flags"].update(seed=1),
    "no hashes of files": lambda state: state.update(files={}),
    "no hash of one file": lambda state: state["files"].pop("model.safetensors"),
    "a delta that is not a number": lambda state: state["loss_state"].update(delta=float("nan")),
    "null": lambda state: {name: None for name in state},
    "a list": lambda state: [1],
    "empty": lambda state: {},
}
for key in ("step", "files", "rows", "weights", "scheduler", "loss_state", "flags", "digest"):
    STATE_EDITS[f"without {key}"] = lambda state, key=key: state.pop(key) and None


@pytest.mark.parametrize("edit", STATE_EDITS)
def test_an_edited_state_is_a_damaged_checkpoint_and_the_one_before_leads_to_the_same_end(
        whole, killed, capsys, edit):
    edit_json(killed / "checkpoint-4" / "state.json", STATE_EDITS[edit])
    resume(killed)
    assert "checkpoint-4 is damaged (state.json)" in capsys.readouterr().out
    assert not differences(whole, killed)


def test_another_layout_of_state_json_and_another_order_of_its_keys_are_no_damage(
        whole, killed, capsys):
    edit_json(killed / "checkpoint-4" / "state.json",
              lambda state: dict(reversed(state.items())))
    resume(killed)
    assert "resumed after step 4" in capsys.readouterr().out
    assert not differences(whole, killed)


def test_a_checkpoint_under_another_number_is_not_believed(whole, killed):
    (killed / "checkpoint-4").rename(killed / "checkpoint-5")
    resume(killed)
    assert not differences(whole, killed)


def test_where_every_checkpoint_is_damaged_each_try_is_refused_and_no_file_is_moved(killed):
    for path in killed.glob("checkpoint-*/state.json"):
        path.write_text("{")
    for _ in range(2):
        with pytest.raises(UserError, match="every checkpoint in .* is damaged"):
            resume(killed)
    assert len(list(killed.glob("checkpoint-*"))) == 2


# --- config.json and run.json ---------------------------------------------------------------------

CONFIG_EDITS = {
    "lr": 0.5, "seed": 1, "beta": 0.2, "max_steps": 5, "batch_size": 4, "shuffle": False,
    "warmup_steps": None, "max_length": "64", "model": None, "dtype": "float64", "loss": "sigmoid",
}


@pytest.mark.parametrize("with_digest", [True, False])
@pytest.mark.parametrize("name", CONFIG_EDITS)
def test_an_edited_flag_in_config_json_is_refused_and_named(killed, name, with_digest):
    def edit(config):
        config["flags"][name] = CONFIG_EDITS[name]
        if not with_digest:
            del config["digest"]

    edit_json(killed / "config.json", edit)
    with pytest.raises(UserError, match="config.json: its flags are not" if with_digest else
                       f"config.json: {name} is .*checkpoint-4/state.json has"):
        resume(killed)


def test_an_edited_config_json_is_not_to_be_deleted_where_no_checkpoint_has_the_flags(killed):
    edit_json(killed / "config.json", lambda config: config["flags"].update(lr=0.5))
    with pytest.raises(UserError, match="or delete it: --resume reads the flags from a checkp"):
        resume(killed)
    for path in killed.glob("checkpoint-*"):
        shutil.rmtree(path)
    with pytest.raises(UserError, match="in its place, or start again in another --output_dir$"):
        resume(killed)


@pytest.mark.parametrize("name", ["lr", "seed", "model", "beta", "max_steps"])
def test_a_flag_that_config_json_lacks_is_refused_and_named(killed, name):
    edit_json(killed / "config.json", lambda config: {"flags": {
        other: value for other, value in config["flags"].items() if other != name}})
    with pytest.raises(UserError, match=f"config.json: {name} is \"no value\""):
        resume(killed)


@pytest.mark.parametrize("content", ["", "3", "[]", "null", "{", '{"flags": []}',
                                     '{"flags": null}', "\0\0", '{"flags": NaN}', "[" * 100_000])
def test_a_config_json_that_is_no_object_with_flags_is_refused_in_one_line(killed, content):
    (killed / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json: .*good copy in its place, or delete it"):
        resume(killed)


@pytest.mark.parametrize("change", ["gone", "utf-8-sig", "without flags"])
def test_without_a_config_json_or_with_a_byte_order_mark_the_run_ends_the_same(
        whole, killed, change):
    path = killed / "config.json"
    text = path.read_text()
    if change == "gone":
        path.unlink()
    elif change == "without flags":
        path.write_text("{}")
    else:
        path.write_bytes(text.encode(change))
    resume(killed)
    assert not differences(whole, killed)


def test_a_flag_that_a_resumed_run_may_change_is_told_where_it_changes(whole, killed, capsys):
    resume(killed, "--save_every=3")
    assert "--save_every 3: it was 2 when the checkpoint" in capsys.readouterr().out
    assert not differences(whole, killed)


def without_checkpoints(killed):
    """The run as it is before its first checkpoint, with a config.json without a digest."""
    for path in killed.glob("checkpoint-*"):
        shutil.rmtree(path)
    edit_json(killed / "config.json", lambda config: {"flags": config["flags"]})


@pytest.mark.parametrize("name, value, message", [
    ("lr", "fast", "config.json: argument --lr"), ("batch_size", 8.5, "argument --batch_size"),
    ("shuffle", 1, "--shuffle"), ("rslora", 1, "--rslora"), ("beta", [0.1], "--beta"),
    ("max_length", "64", "max_length is '64'"), ("dtype", {}, "--dtype"), ("lr", None, "--lr"),
    ("colour", 1, "has colour, which is no flag"), ("loss", ["ipo"], "--loss"),
    ("log_every", "x", "argument --log_every"), ("eval_share", float("nan"), "--?eval_share"),
    ("model", ["m"], "model is"),
])
def test_before_the_first_checkpoint_a_value_that_no_flag_can_have_is_refused(
        killed, name, value, message):
    without_checkpoints(killed)
    edit_json(killed / "config.json", lambda config: config["flags"].update({name: value}))
    with pytest.raises(UserError, match=message):
        resume(killed)


def test_before_the_first_checkpoint_a_missing_flag_is_refused_and_the_file_as_it_is_resumes(
        whole, killed):
    without_checkpoints(killed)
    content = (killed / "config.json").read_text()
    edit_json(killed / "config.json", lambda config: config["flags"].pop("lr") and None)
    with pytest.raises(UserError, match="config.json: has no lr"):
        resume(killed)
    (killed / "config.json").write_text(content)
    resume(killed)
    assert not differences(whole, killed)


def test_a_checkpoint_of_a_run_with_other_flags_is_refused_and_named(
        killed, folder, pairs, tmp_path):
    (tmp_path / "other").mkdir()
    _, other = run_in(tmp_path / "other", folder, pairs, loss="bco_pair", eval_every=3, lr=0.3)
    shutil.rmtree(killed / "checkpoint-2")
    shutil.copytree(other / "checkpoint-2", killed / "checkpoint-2")
    with pytest.raises(UserError, match="config.json: lr is 0.01, but .*checkpoint-2/state.json"):
        resume(killed)


def test_a_complete_run_whose_weights_are_gone_is_resumed_to_the_same_weights(
        whole, runs, tmp_path):
    copy = pathlib.Path(shutil.copytree(whole, tmp_path / "copy"))
    (copy / "model.safetensors").unlink()
    resume(copy)
    assert not differences(whole, copy)


@pytest.mark.parametrize("change", ["a folder", "a link to nothing", "a link to the same"])
def test_a_file_of_a_checkpoint_that_is_no_file_is_damage_and_a_link_to_the_same_is_not(
        whole, killed, tmp_path, capsys, change):
    path = killed / "checkpoint-4" / "model.safetensors"
    moved = path.rename(tmp_path / "elsewhere")
    if change == "a folder":
        path.mkdir()
    else:
        path.symlink_to(moved if change == "a link to the same" else tmp_path / "nothing")
    resume(killed)
    step = 4 if change == "a link to the same" else 2
    assert f"resumed after step {step}" in capsys.readouterr().out
    assert not differences(whole, killed)


# --- Files that are not ours, and links -----------------------------------------------------------

def test_files_that_no_checkpoint_lists_are_ignored(whole, killed, capsys):
    for place in (killed, killed / "checkpoint-4", killed / "checkpoint-4" / "optimizer"):
        (place / ".DS_Store").write_bytes(b"\0\1")
        (place / "note.txt").write_text("the good one")
        (place / "more").mkdir()
    shard = next((killed / "checkpoint-4" / "optimizer").glob("*.safetensors"))
    older = next((killed / "checkpoint-2" / "optimizer").glob("*.safetensors"))
    shutil.copy(older, shard.with_name("a-copy.safetensors"))
    shutil.copy(older, shard.with_name("z-copy.safetensors"))
    resume(killed)
    assert "resumed after step 4" in capsys.readouterr().out
    assert not differences(whole, killed)


def test_a_linked_checkpoint_is_read_and_a_damaged_one_loses_only_its_link(
        whole, killed, tmp_path, capsys):
    (tmp_path / "far").mkdir()
    for path in list(killed.glob("checkpoint-*")):
        target = path.rename(tmp_path / "far" / path.name)
        path.symlink_to(target)
    damaged = tmp_path / "far" / "checkpoint-4"
    (damaged / "model.safetensors").write_bytes(b"")
    resume(killed, "--save_every=0")
    assert "resumed after step 2" in capsys.readouterr().out
    assert (damaged / "state.json").exists()
    assert os.readlink(killed / "damaged-checkpoint-4") == str(damaged)
    assert not differences(whole, killed)


# --- Kills and failing disks ----------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_runs_that_are_broken_at_any_moment_of_their_life_end_like_a_whole_one():
    command = [sys.executable, "tests/kill.py", "--faults", "--runs=12", "--seed=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- metrics.jsonl --------------------------------------------------------------------------------

def cut_last_row(path):
    path.write_bytes(path.read_bytes()[:-200])


def edit_a_number(path):
    path.write_text(path.read_text().replace('"loss": ', '"loss": 1', 1))


METRICS_EDITS = {
    "junk in the middle": lambda path: path.write_text(path.read_text().replace("\n", "\n?}\n", 1)),
    "binary": lambda path: path.write_bytes(b"\0\xff\xfe}\n" + path.read_bytes()),
    "a number": edit_a_number,
    "a list": lambda path: path.write_text("[1]\n" + path.read_text()),
    "no step": lambda path: path.write_text('{"loss": 1}\n' + path.read_text()),
    "a row is gone": lambda path: path.write_text(path.read_text().partition("\n")[2]),
    "empty": lambda path: path.write_text(""),
    "gone": pathlib.Path.unlink,
    "CRLF": lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
}


@pytest.mark.parametrize("edit", METRICS_EDITS)
def test_changed_rows_of_metrics_are_those_of_the_checkpoint_again_and_a_line_says_so(
        whole, killed, capsys, edit):
    METRICS_EDITS[edit](killed / "metrics.jsonl")
    resume(killed)
    assert "metrics.jsonl: its rows up to step 4 were changed" in capsys.readouterr().out
    assert not differences(whole, killed)


@pytest.mark.parametrize("edit", [cut_last_row, lambda path: None])
def test_rows_after_the_checkpoint_are_written_again_without_a_line(whole, killed, capsys, edit):
    edit(killed / "metrics.jsonl")
    resume(killed)
    assert "were changed" not in capsys.readouterr().out
    assert not differences(whole, killed)


def test_a_run_whose_metrics_the_user_deletes_goes_on(fit, monkeypatch, tmp_path):
    save = train.write_checkpoint

    def write(args, run, number, *rest):
        (run.folder / "metrics.jsonl").unlink()
        save(args, run, number, *rest)

    monkeypatch.setattr(train, "write_checkpoint", write)
    out, metrics = fit(**STEPS)
    assert {row["step"] for row in metrics} == {5, 6}
    assert (out / "checkpoint-4" / "metrics.jsonl").read_text() == ""


# --- Rows, models and tokenizer -------------------------------------------------------------------

def copy_model(folder, path):
    return pathlib.Path(shutil.copytree(folder, path))


def test_held_out_rows_of_eval_dataset_that_were_edited_are_refused(folder, pairs, tmp_path):
    rows = [row | {"chosen": row["chosen"] + " y"} for row in make_rows(8, seed=1)]
    held_out = write_jsonl(tmp_path / "held.jsonl", rows)
    _, killed = run_in(tmp_path, folder, pairs, eval_dataset=held_out, eval_share=None)
    rows[5]["chosen"] = rows[5]["chosen"][:-1] + "z"
    write_jsonl(tmp_path / "held.jsonl", rows)
    with pytest.raises(UserError, match="the rows of --eval_dataset .* changed"):
        resume(killed)


MODEL_EDITS = {
    "positions": lambda config: config["rope_parameters"].update(rope_theta=500.0),
    "eps": lambda config: config.update(rms_norm_eps=1e-2),
    "activation": lambda config: config.update(hidden_act="gelu"),
    "heads": lambda config: config.update(num_attention_heads=4, num_key_value_heads=4, head_dim=8),
}


@pytest.mark.parametrize("edit", MODEL_EDITS)
@pytest.mark.parametrize("flags", [{}, {"lora_rank": 2}, {"ref": "cache"}], ids=str)
def test_another_config_under_the_same_weights_is_refused(
        folder, pairs, tmp_path, monkeypatch, flags, edit):
    monkeypatch.chdir(tmp_path)
    model = copy_model(folder, tmp_path / "model")
    whole, killed = run_in(tmp_path, model, pairs, **flags)
    edit_json(model / "config.json", MODEL_EDITS[edit])
    with pytest.raises(UserError, match="config.json or adapter_config.json of .* changed"):
        resume(killed)


def test_a_reference_model_with_another_config_is_refused(folder, pairs, tmp_path):
    model = copy_model(folder, tmp_path / "model")
    _, killed = run_in(tmp_path, folder, pairs, ref_model=model)
    edit_json(model / "config.json", MODEL_EDITS["eps"])
    with pytest.raises(UserError, match="config.json or adapter_config.json of .* changed"):
        resume(killed)


def test_another_config_computes_the_cached_reference_again(folder, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = copy_model(folder, tmp_path / "model")
    flags = TINY_RUN | {"model": model, "dataset": pairs, "ref": "cache", "max_steps": 1}
    train.main(to_arguments(flags | {"output_dir": "one"}), ALONE)
    edit_json(model / "config.json", MODEL_EDITS["eps"])
    train.main(to_arguments(flags | {"output_dir": "two"}), ALONE)
    assert len(list((tmp_path / "runs" / "references").iterdir())) == 2


@pytest.mark.parametrize("name, value", [("lora_alpha", 40), ("use_rslora", True)])
def test_other_settings_of_the_adapter_that_is_the_reference_are_refused(
        fit, folder, pairs, tmp_path, name, value):
    adapter, _ = fit(loss="sft", lora_rank=4, max_steps=2, out="sft")
    _, killed = run_in(tmp_path, folder, pairs, adapter=adapter)
    edit_json(adapter / "adapter_config.json", lambda config: config.update({name: value}))
    with pytest.raises(UserError, match="config.json or adapter_config.json of .* changed"):
        resume(killed)


def test_another_path_version_or_dtype_in_the_config_is_no_other_model(folder, pairs, tmp_path):
    model = copy_model(folder, tmp_path / "model")
    whole, killed = run_in(tmp_path, model, pairs)
    edit_json(model / "config.json",
              lambda config: config.update(transformers_version="5.0.0", _name_or_path="elsewhere"))
    resume(killed)
    assert not differences(whole, killed)


def change_template(model):
    (model / "chat_template.jinja").write_text("{{ messages[0].content }}")


def add_normalizer(model):
    """The ids of the rows stay as they are, because the rows have no capitals."""
    edit_json(model / "tokenizer.json",
              lambda content: content.update(normalizer={"type": "Lowercase"}))


def change_eos(model):
    edit_json(model / "tokenizer_config.json", lambda config: config.update(eos_token="<pad>"))


@pytest.mark.parametrize("change", [change_template, add_normalizer, change_eos])
def test_another_tokenizer_or_chat_template_is_refused(folder, pairs, tmp_path, change):
    model = copy_model(folder, tmp_path / "model")
    _, killed = run_in(tmp_path, model, pairs)
    change(model)
    with pytest.raises(UserError, match="the tokenizer of the model or its chat template changed"):
        resume(killed)


@pytest.mark.parametrize("name", ["every.jsonl", "reference.npy"])
def test_the_digest_of_the_world_depends_on_each_file_that_an_evaluation_reads(tmp_path, name):
    for other in ("every.jsonl", "reference.npy"):
        (tmp_path / other).write_text("a")
    before = world.enumeration_digest(tmp_path)
    (tmp_path / name).write_text("b")
    assert world.enumeration_digest(tmp_path) != before


@pytest.mark.parametrize("name", checkpoint.CHANGED)
def test_each_input_that_differs_has_a_sentence_of_its_own(killed, monkeypatch, name):
    load = train.load_checkpoint

    def load_other(folder, state, fixed, *rest):
        return load(folder, state, fixed | {name: "another"}, *rest)

    monkeypatch.setattr(train, "load_checkpoint", load_other)
    with pytest.raises(UserError) as error:
        resume(killed)
    assert str(error.value).startswith(f"--resume: {checkpoint.CHANGED[name]} changed since")
    assert str(error.value).endswith("or start a new run in another --output_dir")


# --- The reference's cache ------------------------------------------------------------------------

def shift_one_value(path):
    tables = load_file(path)
    tables["train"][1, 0] += 50
    save_file(tables, path)


def shift_and_keep_the_digest(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 0x40
    path.write_bytes(content)


def drop_rows(path):
    tables = load_file(path)
    save_file(tables | {"train": tables["train"][:-1].clone()}, path)


CACHE_EDITS = {
    "one value": shift_one_value,
    "one bit": shift_and_keep_the_digest,
    "fewer rows": drop_rows,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "junk": lambda path: path.write_bytes(os.urandom(1000)),
    "no table": lambda path: save_file({}, path),
}


@pytest.mark.parametrize("edit", CACHE_EDITS)
def test_a_damaged_cache_of_the_reference_is_computed_again_and_a_line_says_so(
        folder, pairs, tmp_path, monkeypatch, capsys, edit):
    monkeypatch.chdir(tmp_path)
    whole, killed = run_in(tmp_path, folder, pairs, ref="cache")
    path, = (tmp_path / "runs" / "references").iterdir()
    content = path.read_bytes()
    CACHE_EDITS[edit](path)
    resume(killed)
    assert f"{path.name}: is damaged, so the log-probs" in capsys.readouterr().out
    assert not differences(whole, killed)
    assert path.read_bytes() == content


def test_the_cache_of_other_rows_under_this_name_is_not_used(
        folder, pairs, tmp_path, monkeypatch, capsys):
    """The rows have the same names, in a file of the same path."""
    monkeypatch.chdir(tmp_path)
    flags = TINY_RUN | {"model": folder, "ref": "cache", "max_steps": 1}
    names = []
    for seed in (0, 1):
        rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(22, seed=seed))
        train.main(to_arguments(flags | {"dataset": rows, "output_dir": f"out{seed}"}), ALONE)
        new = set((tmp_path / "runs" / "references").iterdir()) - set(names)
        names += new
    shutil.copy(names[0], names[1])
    train.main(to_arguments(flags | {"dataset": rows, "output_dir": "out2"}), ALONE)
    assert "is damaged" in capsys.readouterr().out
    assert not differences(tmp_path / "out1", tmp_path / "out2")


def test_a_cache_that_cannot_be_written_is_one_line_that_names_it(
        folder, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "references").write_text("a file")
    flags = TINY_RUN | {"model": folder, "dataset": pairs, "ref": "cache"}
    with pytest.raises(UserError, match="runs/references/.*: the cache of --ref cache could not"):
        train.main(to_arguments(flags | {"output_dir": "out"}), ALONE)


def test_a_reference_without_finite_log_probs_is_refused_and_leaves_no_cache(
        pairs, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = tiny_model("llama", tokenizer)
    broken.model.norm.weight.data.fill_(float("nan"))
    models.save_model(broken, tokenizer, tmp_path / "model")
    flags = TINY_RUN | {"model": tmp_path / "model", "dataset": pairs, "ref": "cache"}
    with pytest.raises(UserError, match="--ref cache: the reference gives .* row 1 the log-probs"):
        train.main(to_arguments(flags | {"output_dir": "out"}), ALONE)
    assert not list((tmp_path / "runs" / "references").glob("*"))
