"""A run writes into an empty folder, and replaces or deletes only what it wrote itself."""
import json
import os
import pathlib
import resource
import shutil
import stat
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
    to_arguments,
    unfinished,
    write_jsonl,
)

import checkpoint
import errors
import files
import model as models
import train
import world

STEPS = {"max_steps": 6, "save_every": 2}


@pytest.fixture(scope="module")
def whole(folder, pairs, tmp_path_factory):
    """The folder of an uninterrupted run of 6 steps with checkpoints after steps 2 and 4."""
    out = tmp_path_factory.mktemp("whole") / "out"
    flags = TINY_RUN | {"model": folder, "dataset": pairs, "output_dir": out} | STEPS
    assert not train.main(to_arguments(flags), ALONE)
    return out


@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of that run, as if it had been killed after step 4."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    unfinished(out)
    files.write_list(out, {path.name for path in out.iterdir()} - {".lock", files.LIST})
    return out


@pytest.fixture
def nothing_slow(monkeypatch):
    """Fail where a run makes the world or loads a model."""
    def fail(*arguments):
        raise AssertionError("the folder was not refused before this")

    monkeypatch.setattr(train, "make_world", fail)
    monkeypatch.setattr(train, "prepare", fail)


def start(out, *arguments, **flags):
    """Start a new run on a model and rows that nobody reads before the folder is claimed."""
    flags = {"model": "none", "dataset": "none", "output_dir": out} | flags
    return train.main([*arguments, *to_arguments(flags)], ALONE)


def content(folder):
    """{path: bytes of a file, target of a link, or None} of everything in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = None
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


# --- Which folder a new run takes -----------------------------------------------------------------

FOREIGN_FILES = {
    "config.json": '{"my": "settings"}', "run.json": "[]", "metrics.jsonl": "my log",
    "tokenizer.json": "t", "pairs.jsonl": "{}", ".saving": "p", ".hidden": "", ".lock": "mine",
    files.LIST: "not a run's", "checkpoint-2": "a file", ".partial-mine": "p",
    "not utf-8 \udcff": "",
}


@pytest.mark.parametrize("name", FOREIGN_FILES)
def test_a_folder_with_a_file_of_the_user_is_refused_at_once_and_stays_as_it_is(
        name, nothing_slow, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text(FOREIGN_FILES[name])
    before = content(out)
    message = "--output_dir .*mine holds files that no run wrote, such as .*: choose a folder that"
    for flags in ({}, {"model": "world", "dataset": "world"}):
        with pytest.raises(errors.UserError, match=message):
            start(out, **flags)
    assert content(out) == before


@pytest.mark.parametrize("name", [
    ".saving", ".checkpoint", "checkpoint-2", "data", ".partial-mine",
])
def test_a_folder_with_a_folder_or_a_broken_link_is_refused(name, nothing_slow, tmp_path):
    for kind in ("folder", "link"):
        out = tmp_path / kind
        out.mkdir()
        if kind == "folder":
            (out / name).mkdir()
        else:
            (out / name).symlink_to("nowhere")
        before = content(out)
        with pytest.raises(errors.UserError, match="holds files that no run wrote"):
            start(out)
        assert content(out) == before


def test_data_model_or_adapter_and_output_in_one_folder_are_refused(folder, pairs, tmp_path):
    rows, model = tmp_path / "rows", tmp_path / "model"
    rows.mkdir()
    shutil.copy(pairs, rows)
    shutil.copytree(folder, model)
    for flags in ({"output_dir": rows}, {"output_dir": model}):
        before = content(tmp_path)
        flags = TINY_RUN | {"dataset": rows, "model": model, "max_steps": 1} | flags
        with pytest.raises(errors.UserError, match="holds files that no run wrote"):
            train.main(to_arguments(flags), ALONE)
        assert content(tmp_path) == before


def test_what_systems_put_into_empty_folders_does_not_count(fit, tmp_path):
    out = tmp_path / "out"
    (out / "lost+found").mkdir(parents=True)
    (out / ".DS_Store").write_bytes(b"\0\1")
    fit(max_steps=1)
    assert (out / "model.safetensors").exists()
    assert (out / ".DS_Store").read_bytes() == b"\0\1" and (out / "lost+found").is_dir()


def test_a_started_run_without_a_checkpoint_is_resumed_from_step_0_and_not_overwritten(
        fit, whole, stopped, nothing_slow, monkeypatch):
    for path in stopped.glob("checkpoint-*"):
        shutil.rmtree(path)
    before = content(stopped)
    message = "holds a run already, which has no checkpoint yet: start it again from step 0 with"
    with pytest.raises(errors.UserError, match=message):
        start(stopped)
    assert content(stopped) == before
    monkeypatch.undo()
    assert not resume(stopped)
    assert not differences(whole, stopped)


def test_a_run_that_was_killed_while_it_loaded_left_an_empty_folder_for_the_next(fit, tmp_path):
    program = ("import os, sys, train\n"
               "train.prepare = lambda *arguments: os.kill(os.getpid(), 9)\n"
               "train.main(sys.argv[1:], train.Ranks(0, 1, None))")
    out = tmp_path / "out"
    flags = to_arguments({"model": "none", "dataset": "none", "output_dir": out})
    done = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, timeout=120)
    assert done.returncode == -9 and out.exists()
    fit(max_steps=1)
    assert (out / "model.safetensors").exists()


def test_a_run_that_fails_before_its_first_step_removes_only_what_it_made(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for out in (mine, tmp_path / "a" / "b" / "c"):
        with pytest.raises(errors.UserError, match="none"):
            start(out)
    assert content(tmp_path) == {"mine": None}


def test_a_second_run_in_the_folder_of_one_that_loads_is_refused_and_takes_nothing_away(tmp_path):
    out = tmp_path / "out"
    with checkpoint.claim(out, False, ALONE):
        before = content(out)
        assert before
        with pytest.raises(errors.UserError, match="another run is writing there"):
            start(out)
        assert content(out) == before


# --- Folders that cannot be written ---------------------------------------------------------------

def test_a_folder_that_cannot_be_written_is_found_before_anything_is_loaded(
        nothing_slow, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("/proc/nope")
    names = ["/proc/nope/x", tmp_path / "file", tmp_path / "file" / "out", tmp_path / "link" / "x",
             tmp_path / ("n" * 300), "/proc"]
    for name in names:
        with pytest.raises(errors.UserError, match="--output_dir "):
            start(name)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("resumed", [False, True])
def test_a_full_disk_is_found_before_anything_is_loaded(
        resumed, stopped, nothing_slow, tmp_path):
    before = content(stopped)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(errors.UserError, match="--output_dir .* cannot be written .*too large"):
            resume(stopped) if resumed else start(tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(stopped) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["new", "merge"])
def test_a_folder_of_new_and_merge_that_cannot_be_made_is_found_first(
        command, tmp_path, monkeypatch):
    def fail(*arguments):
        raise AssertionError("loaded before the folder was refused")

    monkeypatch.setattr(models, "load_tokenizer", fail)
    monkeypatch.setattr(models, "read_run_file", fail)
    monkeypatch.setattr(models, "read_adapter", fail)
    source = {"new": "--tokenizer=none", "merge": "--adapter=none"}[command]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    for out in ("/proc/nope/x", tmp_path / "empty", tmp_path / "link"):
        with pytest.raises(errors.UserError, match="--out .*: (exists already|cannot be made)"):
            models.main([command, source, f"--out={out}"])
    with pytest.raises(AssertionError):
        models.main([command, source, f"--out={tmp_path}/a/b"])
    assert set(content(tmp_path)) == {"empty", "link"}


# --- Rotation -------------------------------------------------------------------------------------

def test_rotation_deletes_no_checkpoint_that_the_run_did_not_write(whole, stopped, tmp_path):
    shutil.copytree(stopped / "checkpoint-2", stopped / "checkpoint-2-best")
    shutil.copytree(stopped / "checkpoint-2", stopped / "checkpoint-4.bak")
    shutil.copytree(stopped / "checkpoint-2", stopped / "checkpoint-1")
    shutil.copytree(stopped / "checkpoint-4", stopped / "checkpoint-3")
    shutil.copytree(stopped / "checkpoint-2", tmp_path / "far")
    (stopped / "checkpoint-0").symlink_to(tmp_path / "far")
    (stopped / "checkpoint-8").symlink_to("nowhere")
    (stopped / "checkpoint-9").write_text("a note")
    kept = ["checkpoint-2-best", "checkpoint-4.bak", "checkpoint-1", "checkpoint-3"]
    before = {name: content(stopped / name) for name in kept}
    assert not resume(stopped, "--keep_checkpoints=1", "--save_every=1")
    assert not differences(whole, stopped)
    assert {name: content(stopped / name) for name in kept} == before
    assert content(tmp_path / "far") == before["checkpoint-1"]
    assert (stopped / "checkpoint-0").is_symlink() and (stopped / "checkpoint-8").is_symlink()
    assert (stopped / "checkpoint-9").read_text() == "a note"
    own = [path.name for path in checkpoint.own_checkpoints(stopped)]
    assert own == ["checkpoint-5"] and not (stopped / "checkpoint-4").exists()


def test_checkpoints_that_are_links_are_resumed_from_and_stay(whole, stopped, tmp_path):
    for path in stopped.glob("checkpoint-*"):
        shutil.move(path, tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    before = content(tmp_path / "checkpoint-4")
    assert not resume(stopped, "--keep_checkpoints=1", "--save_every=1")
    assert content(tmp_path / "checkpoint-4") == before
    for number in (2, 4):
        assert (stopped / f"checkpoint-{number}").is_symlink()
    assert not differences(whole, stopped)


def test_a_checkpoint_from_elsewhere_stays_where_the_next_one_of_the_run_would_be(
        fit, whole, stopped, tmp_path):
    """The run writes its own under another name, and finds it there."""
    other, _ = fit(**STEPS, loss="ipo", out="other")
    shutil.move(other / "checkpoint-4", stopped / "checkpoint-5")
    before = content(stopped / "checkpoint-5")
    shutil.rmtree(stopped / "checkpoint-2")
    assert not resume(stopped, "--keep_checkpoints=1", "--save_every=1")
    assert content(stopped / "checkpoint-5") == before
    assert [path.name for path in checkpoint.own_checkpoints(stopped)] == ["checkpoint-5-2"]
    assert checkpoint.checkpoints(stopped)[-1].name == "checkpoint-5-2"
    assert not differences(whole, stopped)
    again = unfinished(stopped)
    assert not resume(again)
    assert not differences(whole, again)


def test_a_checkpoint_with_a_file_of_the_user_is_kept_and_a_line_says_so(stopped, capsys):
    (stopped / "checkpoint-2" / "notes.txt").write_text("my notes")
    (stopped / "checkpoint-4" / "optimizer" / ".DS_Store").write_text("")
    (stopped / "checkpoint-4" / "lost+found").mkdir()
    before = content(stopped / "checkpoint-2")
    assert not resume(stopped, "--keep_checkpoints=1", "--save_every=1")
    assert content(stopped / "checkpoint-2") == before
    assert "this run did not write: notes.txt" in capsys.readouterr().out
    assert not (stopped / "checkpoint-4").exists()


def test_a_state_json_that_names_files_elsewhere_deletes_none_of_them(stopped, tmp_path):
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    path = stopped / "checkpoint-2" / "state.json"
    state = json.loads(path.read_text())
    state["files"] |= {"../../outside.txt": "0", str(outside): "0"}
    del state["digest"]
    path.write_text(json.dumps(state | {"digest": files.json_digest(state)}))
    assert not resume(stopped, "--keep_checkpoints=1", "--save_every=1")
    assert outside.read_text() == "mine"


def test_a_run_of_an_earlier_version_resumes_and_loses_nothing(whole, stopped):
    """It has no list, so nothing shows which of its checkpoints it wrote."""
    (stopped / files.LIST).unlink()
    assert not resume(stopped, "--keep_checkpoints=1", "--save_every=1")
    assert not differences(whole, stopped)
    assert {path.name for path in stopped.glob("checkpoint-*")} == {
        "checkpoint-2", "checkpoint-4", "checkpoint-5"}
    assert not list(stopped.glob("metrics.jsonl-*")) + list(stopped.glob("config.json-*"))


def test_a_file_with_the_name_of_one_that_the_run_saves_is_renamed_and_a_line_says_so(
        whole, stopped, capsys):
    (stopped / "tokenizer.json").write_text("mine")
    (stopped / "notes.txt").write_text("mine too")
    assert not resume(stopped)
    assert "tokenizer.json was not written by this run, and is now" in capsys.readouterr().out
    assert (stopped / "tokenizer.json-2").read_text() == "mine"
    assert (stopped / "notes.txt").read_text() == "mine too"
    assert not differences(whole, stopped)


def test_a_final_save_that_was_killed_half_way_is_replaced(whole, stopped, monkeypatch):
    replace = os.replace

    def die(source, target):
        if pathlib.Path(target) == stopped / "config.json" and (
                stopped / "model.safetensors").exists():
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        resume(stopped)
    monkeypatch.undo()
    assert (stopped / "model.safetensors").exists() and not checkpoint.is_complete(stopped)
    assert not resume(stopped)
    assert not (stopped / "model.safetensors-2").exists()
    assert not differences(whole, stopped)


# --- What killed runs leave -----------------------------------------------------------------------

def leave_partial(parent, name=""):
    """A temporary folder as a killed process leaves it -> its path."""
    path = parent / f"{name}{files.PARTIAL}0123abcd"
    (path / "reference").mkdir(parents=True)
    (path / "reference" / "model.safetensors").write_bytes(b"half")
    (path / files.LOCK).touch()
    return path


def test_what_a_killed_run_left_of_a_world_is_deleted_and_what_a_living_one_writes_is_not(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = world.folder()
    home.parent.mkdir()
    (home.parent / "mine.partial-notes").mkdir()
    for exists in (False, True):
        dead = leave_partial(home.parent, home.name)
        with files.temporary_folder(home.parent, home.name) as living:
            (living / "file").write_text("half")
            monkeypatch.setattr(world, "write_folder", lambda aside, *more: aside.joinpath(
                "reference").mkdir())
            world.make(None, ALONE.device)
            assert not dead.exists() and (living / "file").exists(), exists
    assert set(content(home.parent)) == {home.name, f"{home.name}/reference", "mine.partial-notes"}


def test_what_a_killed_run_left_of_a_reference_is_deleted(fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "runs" / "references"
    cache.mkdir(parents=True)
    dead = leave_partial(cache)
    fit(max_steps=1, ref="cache")
    assert not dead.exists()
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]


def test_a_new_folder_below_runs_takes_the_place_of_one_whose_run_was_killed_before_it_wrote(
        tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sigmoid", "sigmoid-2", "sigmoid-3"):
        pathlib.Path("runs", name).mkdir(parents=True)
    files.write_list(pathlib.Path("runs/sigmoid"), [])
    pathlib.Path("runs/sigmoid/.lock").touch()
    pathlib.Path("runs/sigmoid-2/notes.txt").write_text("mine")
    chosen = []

    def stop(args, loss, hyper, home, folder, ranks):
        chosen.append(str(folder))
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "prepare", stop)
    with checkpoint.claim(pathlib.Path("runs/sigmoid-3"), False, ALONE):
        with pytest.raises(KeyboardInterrupt):
            train.main(to_arguments({"model": "none", "dataset": "none"}), ALONE)
        assert chosen == ["runs/sigmoid"]
        assert set(content(tmp_path / "runs")) == {
            "sigmoid-2", "sigmoid-2/notes.txt", "sigmoid-3", "sigmoid-3/.lock",
            f"sigmoid-3/{files.LIST}"}


def test_a_lock_that_is_a_link_is_not_followed(stopped, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (stopped / ".lock").unlink()
    (stopped / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(errors.UserError, match="--output_dir .*"):
        resume(stopped)
    assert (tmp_path / "mine").read_text() == "mine"


# --- Permissions and the disk ---------------------------------------------------------------------

@pytest.mark.parametrize("flags", [{}, {"lora_rank": 4, "ref": "cache"}])
@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_everything_that_a_run_writes_has_the_permissions_of_the_umask(
        fit, folder, flags, mask, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = os.umask(mask)
    try:
        fit(max_steps=3, save_every=2, **flags)
    finally:
        os.umask(before)
    paths = [*tmp_path.rglob("*")]
    assert any(path.suffix == ".safetensors" for path in paths)
    for path in paths:
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_every_file_is_on_the_disk_before_it_is_renamed_and_its_folder_after(
        fit, tmp_path, monkeypatch):
    flushed, renamed = set(), []
    fsync, replace = os.fsync, os.replace

    def note_flush(descriptor):
        status = os.fstat(descriptor)
        flushed.add((status.st_dev, status.st_ino))
        fsync(descriptor)

    def inode(path):
        return path.stat().st_dev, path.stat().st_ino

    def note_rename(source, target):
        source, target = pathlib.Path(source), pathlib.Path(target)
        for path in [source, *source.rglob("*")]:
            assert inode(path) in flushed, path
        replace(source, target)
        flushed.discard(inode(target.parent))
        renamed.append(target)

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(os, "replace", note_rename)
    out, _ = fit(**STEPS)
    names = {path.name for path in renamed}
    assert names >= {"checkpoint-2", "checkpoint-4", "model.safetensors", "config.json",
                     "metrics.jsonl", files.LIST}
    assert inode(out) in flushed


@pytest.mark.parametrize("place", [".", "sub"])
def test_a_run_whose_output_is_below_its_data_reads_no_rows_from_there(
        fit, whole, tmp_path, place):
    rows = tmp_path / "rows"
    (rows / place).mkdir(parents=True)
    write_jsonl(rows / place / "pairs.jsonl", make_rows(22))
    out, _ = fit(**STEPS, dataset=rows, out="rows/out")
    unfinished(out)
    assert not resume(out)
    assert not differences(whole, out)
