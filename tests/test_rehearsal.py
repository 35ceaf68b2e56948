"""--dry_run: what a run would be, without an update and without a file."""
import os
import re

import pytest
import torch
from conftest import (
    ALONE,
    TINY_RUN,
    make_rows,
    read_metrics,
    run_training,
    to_arguments,
    write_jsonl,
)

import rehearsal
import train
from errors import UserError


@pytest.fixture
def rehearse(folder, pairs, tmp_path, monkeypatch, capsys):
    """Run --dry_run in this process, in an empty working directory -> what it printed."""
    def run(*more, **flags):
        (tmp_path / "here").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "here")
        given = TINY_RUN | {"model": folder, "dataset": pairs, "dry_run": True} | flags
        capsys.readouterr()
        train.main([*more, *to_arguments(given)], ALONE)
        return capsys.readouterr().out
    return run


def after(name, printed):
    """The line of the report that begins with a name."""
    line, = re.findall(rf"^  {name} +(.*)", printed, re.MULTILINE)
    return line


RUNS = [
    {}, {"lora_rank": 2}, {"ref": "cache"}, {"loss": "bco_pair"}, {"loss": "kto", "unpair": True},
    {"loss": "aot"}, {"sync_ref_every": 1}, {"keep_best": "eval/loss", "eval_every": 1},
    {"optimizer": "rmsprop", "loss": "sft"},
]


@pytest.mark.parametrize("given", RUNS, ids=str)
def test_nothing_is_updated_and_nothing_is_written(rehearse, given, tmp_path, monkeypatch):
    losses = []
    step = train.train_step

    def checked_step(task, policy, *others):
        before = [parameter.clone() for parameter in policy.parameters()]
        values = step(task, policy, *others)
        assert all(map(torch.equal, before, policy.parameters()))
        assert all(parameter.grad is None for parameter in policy.parameters())
        losses.append(values["loss"])
        return values

    monkeypatch.setattr(train, "train_step", checked_step)
    printed = rehearse(output_dir=tmp_path / "out", epochs=2, **given)
    assert len(losses) == 2 and "a dry run: nothing was trained" in printed
    assert os.listdir(tmp_path / "here") == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [{"epochs": 3}, {"max_steps": 7, "warmup_steps": 2}], ids=str)
def test_rows_steps_and_warm_up_are_those_of_the_run(rehearse, fit, given, capsys):
    printed = rehearse(eval_every=2, **given)
    capsys.readouterr()
    out, metrics = fit(eval_every=2, **given)
    told = capsys.readouterr().out
    steps = metrics[-1]["step"]
    rows, = re.findall(r"pairs from (\d+) rows, (\d+) rows held out", told)
    assert after("rows", printed) == f"{rows[0]} to train on, {rows[1]} held out"
    each = -(-int(rows[0]) // 8)
    warmup = given.get("warmup_steps", steps // 10)
    assert after("steps", printed) == (
        f"{steps} of 8 pairs; epochs: {steps / each:.3g}, of {each} steps; warm-up: {warmup} steps")
    evaluations = len([row for row in metrics if row["split"] == "eval"])
    assert f"an evaluation; evaluations: {evaluations}; about" in after("time", printed)
    assert after("disk", printed).endswith("for a checkpoint if the run is interrupted")
    # The lines before are those of a run.
    for line in told.splitlines():
        if "parameters, " in line or line.startswith(("a checkpoint has", "attention:")):
            assert line in printed.splitlines()


def test_the_named_sets_and_the_checkpoints_are_counted(rehearse, fit, tmp_path):
    sets = {name: write_jsonl(tmp_path / f"{name}.jsonl", make_rows(count, seed=count))
            for name, count in (("near", 5), ("far", 9))}
    printed = rehearse(eval_share=None, save_every=1, keep_checkpoints=3, lora_rank=2, max_steps=9,
                       eval_dataset=f"near={sets['near']},far={sets['far']}")
    assert after("rows", printed) == "22 to train on, 5 held out as near, 9 held out as far"
    size, = re.findall(r"a checkpoint has ([\d.]+) kB", printed)
    disk = re.fullmatch(r"([\d.]+) kB for the model, ([\d.]+) kB for at most 4 checkpoints at a "
                        "time", after("disk", printed))
    assert float(disk[2]) == pytest.approx(4 * float(size), rel=1e-2)
    assert float(size) == pytest.approx(3 * float(disk[1]), rel=1e-2)  # with two moments


def test_the_time_of_a_run_is_in_proportion_to_its_steps():
    times = {}
    for steps in (10, 1000):
        lines = report_of(steps, seconds=[9.0, 2.0], tokens=[400, 400], mean=50.0, batch=8)
        times[steps] = next(line for line in lines if line.startswith("time"))
    assert "20 s for 10 steps" in times[10] and "33 min for 1000 steps" in times[1000]
    # 3 and 1000 / 4 evaluations of 6 s.
    assert "6 s for an evaluation; evaluations: 3; about 38 s together" in times[10]
    assert "about 58 min together" in times[1000]


def report_of(steps, seconds, tokens, mean, batch):
    """The lines of describe_plan about rows of `mean` tokens each."""
    args = train.parse_args(["--model=m", "--dataset=d", f"--max_steps={steps}", "--eval_every=4",
                             f"--batch_size={batch}"])[0]
    task = train.Namespace(loss=train.parse_args([])[1])
    run = train.Namespace(rows=range(40), steps=steps, task=task, held_out={"eval": range(4)},
                          tokens=torch.full((40,), mean))
    measured = rehearsal.Measured(seconds, tokens, 6.0, 0)
    return rehearsal.describe_plan(args, run, 0, measured)


@pytest.mark.parametrize("seconds, text", [
    (0.254, "0.25 s"), (12.4, "12 s"), (200, "3 min"), (7500, "2 h 05 min"), (3599, "1 h 00 min"),
])
def test_a_time_is_readable(seconds, text):
    assert rehearsal.duration(seconds) == text


@pytest.mark.parametrize("given, message", [
    ({"resume": True, "output_dir": "RUN", "model": None, "dataset": None},
     "--dry_run: is for a run that has not begun"),
    ({"output_dir": "RUN"}, "holds a finished run: choose another folder"),
    ({"keep_best": "eval/far/loss"}, "evaluations of this run do not have it"),
    ({"max_length": 999}, "--max_length 999: the model has 128 positions"),
])
def test_what_a_run_would_refuse_is_refused(rehearse, fit, given, message):
    out, _ = fit(max_steps=1)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    given = {name: out if value == "RUN" else value for name, value in given.items()}
    with pytest.raises(UserError, match=message):
        rehearse(**given)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_two_processes_rehearse_with_fsdp(folder, pairs, tmp_path):
    flags = TINY_RUN | {"model": folder, "dataset": pairs, "dry_run": True, "parallel": "fsdp",
                        "output_dir": tmp_path / "out"}
    ended = run_training(flags, ranks=2, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert after("memory", ended.stdout).endswith("on each rank without activations")
    assert not (tmp_path / "out").exists()


def test_a_run_with_these_flags_but_the_dry_one_works(rehearse, fit):
    rehearse(max_steps=1)
    assert read_metrics(fit(max_steps=1)[0])
