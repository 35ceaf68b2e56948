"""A run is made longer, also when it has ended: --resume with a higher --max_steps, --epochs or
--early_stop."""
import json
import pathlib
import shutil

import pytest
from conftest import (
    ALONE,
    TINY_RUN,
    differences,
    read_metrics,
    resume,
    run_training,
    to_arguments,
    unfinished,
    weight_differences,
    weights,
)

import checkpoint
import flags
import train
from errors import UserError

# A warm-up of its own, because its default is a tenth of the steps.
CONSTANT = {"lr_schedule": "constant", "warmup_steps": 2, "save_every": 4, "eval_every": 2}


@pytest.fixture(scope="module", params=[
    pytest.param(None, id="model"), pytest.param(2, id="adapter", marks=pytest.mark.slow)])
def runs(request, folder, pairs, tmp_path_factory):
    """A folder with a finished run of 6 steps, which has a checkpoint of step 6, and one of 10."""
    home = tmp_path_factory.mktemp("runs")
    given = TINY_RUN | CONSTANT | {"model": folder, "dataset": pairs, "lora_rank": request.param}
    for name, steps, last in (("short", 6, True), ("whole", 10, None)):
        lengths = {"output_dir": home / name, "max_steps": steps, "save_last": last}
        train.main(to_arguments(given | lengths), ALONE)
    return home


@pytest.fixture
def out(runs, tmp_path):
    """A copy of the run of 6 steps."""
    return pathlib.Path(shutil.copytree(runs / "short", tmp_path / "short"))


def of_training(metrics, last):
    return [row for row in metrics if row["split"] == "train" and row["step"] <= last]


def factors(metrics):
    """{step: learning rate, as a share of --lr}"""
    return {row["step"]: row["lr"] / 1e-2 for row in of_training(metrics, 99)}


# --- The same end as a run of that length ---------------------------------------------------------

def finished(out):
    return 6


def without_its_last_checkpoint(out):
    shutil.rmtree(out / "checkpoint-6")
    return 4


def killed(out):
    unfinished(out)
    return 6


@pytest.mark.parametrize("state", [finished, without_its_last_checkpoint, killed])
def test_with_a_constant_schedule_the_longer_run_is_that_of_this_length_from_its_beginning(
        runs, out, state, capsys):
    step = state(out)
    resume(out, "--max_steps=10")
    assert f"resumed after step {step}" in capsys.readouterr().out
    assert not differences(runs / "whole", out)
    assert checkpoint.is_complete(out) and not resume(out)


@pytest.mark.parametrize("given", [
    {"loss": "bco_pair", "optimizer": "rmsprop", "sync_ref_every": 3},
    {"keep_best": "eval/loss", "lora_rank": 2, "lr": 2.0},
], ids=str)
def test_so_it_is_with_whatever_a_run_carries_from_step_to_step(fit, given):
    given = CONSTANT | given
    whole, _ = fit(**given, max_steps=10, out="whole")
    out, _ = fit(**given, max_steps=6, save_last=True)
    resume(out, "--max_steps=10")
    assert not differences(whole, out)


def test_a_run_is_made_longer_twice(runs, out):
    for steps in (8, 10):
        resume(out, f"--max_steps={steps}")
    assert not differences(runs / "whole", out)


def test_epochs_may_take_the_place_of_steps(runs, out):
    resume(out, "--epochs=4")
    rows = read_metrics(out)
    assert rows[-1]["step"] == 12
    assert not differences(of_training(rows, 10), of_training(read_metrics(runs / "whole"), 10))
    saved = checkpoint.saved_flags(out)
    assert saved["epochs"] == 4 and saved["max_steps"] is None


def test_steps_may_take_the_place_of_epochs(fit):
    out, _ = fit(**CONSTANT, epochs=1, save_last=True)
    resume(out, "--max_steps=5")
    whole, metrics = fit(**CONSTANT, max_steps=5, out="whole")
    assert not differences(of_training(read_metrics(out), 5), of_training(metrics, 5))
    assert not weight_differences(weights(whole), weights(out), 0, 0)


@pytest.mark.parametrize("schedule", ["linear", pytest.param("cosine", marks=pytest.mark.slow)])
def test_another_schedule_is_that_of_the_new_length_with_the_old_warm_up_from_the_next_step_on(
        fit, schedule):
    given = {"lr_schedule": schedule}
    out, short = fit(**given, max_steps=10, save_last=True)  # by default 1 step of warm-up
    _, whole = fit(**given, max_steps=20, warmup_steps=1, out="whole")
    resume(out, "--max_steps=20")
    found = factors(read_metrics(out))
    assert {step: found[step] for step in range(1, 11)} == factors(short)
    assert {step: found[step] for step in range(11, 21)} == {
        step: factors(whole)[step] for step in range(11, 21)}
    assert found[11] > found[10]  # the learning rate jumps up


# --- Killed in between ----------------------------------------------------------------------------

def interrupt(*arguments):
    raise KeyboardInterrupt


# Where a kill comes: the function of train.py that does not run any more.
@pytest.mark.parametrize("place", ["Log", "advance", "write_checkpoint", "save_final"])
def test_a_longer_run_that_is_killed_is_no_finished_run_and_ends_in_the_same_way(
        runs, out, monkeypatch, place):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, place, interrupt)
        resume(out, "--max_steps=10")
    # A full model is a finished one until the first file of the longer run is written.
    is_begun = place != "Log" or (out / "run.json").exists()
    assert checkpoint.is_complete(out) != is_begun
    resume(out, *(["--max_steps=10"] if place == "Log" else []))
    assert not differences(runs / "whole", out)


def test_killed_before_its_new_length_is_written_a_run_ends_as_it_had_ended(
        runs, out, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "Log", interrupt)
        resume(out, "--max_steps=10")
    resume(out)
    assert not differences(runs / "short", out)
    assert checkpoint.is_complete(out) and "After 6 optimizer" in (out / "README.md").read_text()


def test_killed_between_the_last_checkpoint_and_its_model_a_run_ends_in_the_same_way(
        fit, monkeypatch):
    given = CONSTANT | {"max_steps": 6, "save_last": True, "keep_best": "eval/loss", "lr": 0.3}
    whole, _ = fit(**given, out="whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_final", interrupt)
        fit(**given)
    out = whole.with_name("out")
    resume(out)
    assert not differences(whole, out)


# --- --early_stop ---------------------------------------------------------------------------------

# The loss of the held-out rows rises at the end.
RISING = {"save_every": 2, "eval_every": 1, "lr": 0.3, "lr_schedule": "constant",
          "warmup_steps": 4, "seed": 1, "keep_best": "eval/loss"}


def test_a_run_that_early_stop_ended_goes_on_with_more_patience_as_if_it_had_had_it(fit):
    whole, expected = fit(**RISING, max_steps=8, early_stop=3, out="whole")
    out, stopped = fit(**RISING, max_steps=8, early_stop=1, save_last=True)
    assert stopped[-1]["step"] < expected[-1]["step"]
    resume(out, "--early_stop=3")
    assert not differences(whole, out)


def test_more_steps_alone_do_not_continue_a_run_that_early_stop_ended(fit):
    out, _ = fit(**RISING, max_steps=8, early_stop=1, save_last=True)
    before = {path: path.read_bytes() for path in out.glob("[!.]*.*") if path.is_file()}
    with pytest.raises(UserError, match="--max_steps 20: .* was ended by --early_stop 1; give a "
                                        "higher --early_stop too"):
        resume(out, "--max_steps=20")
    assert before == {path: path.read_bytes() for path in before}
    assert not resume(out)


# --- Refused --------------------------------------------------------------------------------------

def test_a_finished_run_without_a_checkpoint_is_refused_and_the_flag_is_named(fit):
    out, _ = fit(max_steps=2)
    with pytest.raises(UserError, match="has ended and has no checkpoint left .* --save_last"):
        resume(out, "--max_steps=4")
    assert checkpoint.is_complete(out)


@pytest.mark.parametrize("more, message", [
    ("--max_steps=5", "--max_steps 5: the run in .* has 6, which may only be made higher"),
    ("--epochs=1", "--epochs 1: the run in .* has 6 steps, and this gives 3; a resumed run may"),
    ("--early_stop=2", "--early_stop 2: the run in .* has None, and may not change"),
    ("--lr=0.1", "--lr 0.1: the run in .* and may not change when it is resumed"),
])
def test_a_shorter_run_or_another_one_is_refused_and_the_finished_one_stays(
        out, more, message):
    with pytest.raises(UserError, match=message):
        resume(out, more)
    assert checkpoint.is_complete(out) and (out / "README.md").exists()


def test_the_length_in_a_file_may_not_be_less_than_that_of_a_checkpoint(out):
    path = checkpoint.flags_path(out)
    content = json.loads(path.read_text())
    content["flags"]["max_steps"] = 5
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="max_steps is 5, but .*checkpoint-6/state.json has 6"):
        resume(out, "--max_steps=8")


def test_epochs_and_max_steps_together_are_refused(runs):
    with pytest.raises(UserError, match="--epochs 9 and --max_steps 40 both say how long"):
        flags.parse_args([f"--output_dir={runs / 'short'}", "--resume", "--epochs=9",
                          "--max_steps=40"])


# --- Files ----------------------------------------------------------------------------------------

def test_a_card_that_its_author_edited_is_kept_and_the_longer_run_writes_its_own(
        out, capsys):
    (out / "README.md").write_text((out / "README.md").read_text() + "license: mit\n")
    resume(out, "--max_steps=10")
    assert (out / "README.md-2").read_text().endswith("license: mit\n")
    assert "After 10 optimizer steps" in (out / "README.md").read_text()
    assert f"{out / 'README.md'} is not as the run wrote it, and is now" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_make_a_run_longer(runs, out):
    ended = run_training({"output_dir": out, "resume": True, "max_steps": 10}, ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert not differences(runs / "whole", out, 1e-4)


def test_a_card_as_the_run_wrote_it_is_replaced(runs):
    # Not in a copy, because the card names the folder. So this test is the last one.
    out = runs / "short"
    resume(out, "--max_steps=8")
    assert "After 8 optimizer steps" in (out / "README.md").read_text()
    assert not (out / "README.md-2").exists()
