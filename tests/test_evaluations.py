"""Evaluations: several held-out sets, the best weights, and a run that stops early."""
import importlib.util
import json
import pathlib
import shutil
import sys
import types

import pytest
from conftest import (
    TINY_RUN,
    differences,
    make_rows,
    read_metrics,
    resume,
    run_training,
    unfinished,
    weight_differences,
    weights,
    write_jsonl,
)

import flags
import train
from errors import UserError

STEPS = {"max_steps": 6, "save_every": 2, "eval_every": 1}


@pytest.fixture
def sets(tmp_path):
    """Two files of held-out rows."""
    return {name: write_jsonl(tmp_path / f"{name}.jsonl", make_rows(count, seed=seed))
            for name, count, seed in (("near", 5, 1), ("far", 9, 2))}


def of_split(metrics, split):
    return [row | {"split": ""} for row in metrics if row["split"] == split]


# --- Several evaluation sets ----------------------------------------------------------------------

@pytest.mark.parametrize("options", [{}, {"ref": "cache"}, {"loss": "sft"}, {"loss": "bco_pair"}],
                         ids=str)
def test_each_named_set_has_the_rows_that_it_would_have_alone(
        fit, sets, tmp_path, monkeypatch, options):
    monkeypatch.chdir(tmp_path)
    given = {"max_steps": 3, "eval_every": 1, "eval_share": None} | options
    spec = f"near={sets['near']},far={sets['far']}"
    _, both = fit(**given, eval_dataset=spec, out="both")
    for name, file in sets.items():
        _, alone = fit(**given, eval_dataset=file, out=name)
        found, expected = of_split(both, f"eval/{name}"), of_split(alone, "eval")
        assert len(found) == 3 and not differences(found, expected)
    assert {row["split"] for row in both} == {"train", "eval/near", "eval/far"}


def test_the_rows_of_a_name_may_be_a_mixture(sets):
    assert flags.evaluation_sets("a=x.jsonl:0.5,y.jsonl:0.5,b=z:test") == {
        "eval/a": "x.jsonl:0.5,y.jsonl:0.5", "eval/b": "z:test"}
    for spec in ("x.jsonl", "x.jsonl:0.5,y.jsonl:0.5", "org/data:test", "x/a=b.jsonl"):
        assert flags.evaluation_sets(spec) == {"eval": spec}


def test_a_file_that_exists_with_an_equals_sign_in_its_name_is_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "k=v.jsonl", make_rows(3))
    assert flags.evaluation_sets("k=v.jsonl") == {"eval": "k=v.jsonl"}


@pytest.mark.parametrize("spec, message", [
    ("a=x,a=y", "a names two sets"), ("a=,b=y", "a names no rows"), ("a=x,b=", "b names no rows"),
])
def test_a_wrong_list_of_sets_is_one_line(spec, message):
    with pytest.raises(UserError, match=f"^--eval_dataset {spec}: {message}"):
        flags.parse_args(["--model=m", "--dataset=d", f"--eval_dataset={spec}"])


def test_a_set_that_is_not_there_is_one_line_with_its_file(fit, sets):
    with pytest.raises(UserError, match="nowhere.jsonl"):
        fit(eval_share=None, eval_dataset=f"near={sets['near']},far=nowhere.jsonl")


def test_a_run_with_two_sets_resumes_exactly_and_refuses_one_that_changed(fit, sets):
    given = STEPS | {"eval_share": None,
                     "eval_dataset": f"near={sets['near']},far={sets['far']}"}
    whole, _ = fit(**given, out="whole")
    out = unfinished(fit(**given)[0])
    resume(out)
    assert not differences(whole, out)
    unfinished(out)
    rows = make_rows(9, seed=3)
    with open(sets["far"], "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    with pytest.raises(UserError, match="the rows of --eval_dataset or their tokens changed"):
        resume(out)


def test_the_card_has_a_column_for_each_set(fit, sets):
    out, _ = fit(max_steps=1, eval_share=None,
                 eval_dataset=f"near={sets['near']},far={sets['far']}")
    card = (out / "README.md").read_text()
    assert "| metric | last training step | held out: near | held out: far |" in card


# --- The best weights -----------------------------------------------------------------------------

# A learning rate at which the loss of the held-out rows rises at the end.
RISING = {"max_steps": 8, "save_every": 2, "eval_every": 1, "lr": 0.3, "lr_schedule": "constant",
          "warmup_steps": 4, "seed": 1}


def best_row(metrics, metric, better):
    """The row of the best evaluation, the first of several equal ones."""
    rows = [row for row in metrics if row["split"] == "eval"]
    return better(rows, key=lambda row: row[metric])


@pytest.mark.parametrize("more", [{}, {"lora_rank": 2, "lr": 2.0}], ids=str)
@pytest.mark.parametrize("metric, better", [("loss", min), ("rewards/margins", max)])
def test_a_run_ends_with_the_weights_of_its_best_evaluation(fit, more, metric, better):
    given = RISING | more
    out, metrics = fit(**given, keep_best=f"eval/{metric}")
    row = best_row(metrics, metric, better)
    record = {"metric": f"eval/{metric}", "step": row["step"], "value": row[metric]}
    assert best_record(out) == record
    # A run that is stopped at this step has the same weights.
    plain, _ = fit(**given | {"save_every": 1, "keep_checkpoints": 9}, out="plain")
    expected = plain
    if row["step"] < given["max_steps"]:
        expected = plain / f"checkpoint-{row['step']}"
    assert not weight_differences(weights(out), weights(expected), 0, 0)
    assert not (out / "best").exists()


def test_the_best_step_of_the_test_above_is_neither_the_first_nor_the_last(fit):
    _, metrics = fit(**RISING)
    assert 1 < best_row(metrics, "loss", min)["step"] < 8


@pytest.mark.parametrize("more", [{}, {"lora_rank": 2, "lr": 2.0}, {"early_stop": 2},
                                  {"loss": "bco_pair"}], ids=str)
@pytest.mark.parametrize("left", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3))])
def test_a_killed_run_ends_like_a_whole_one_from_each_of_its_checkpoints(
        fit, monkeypatch, more, left):
    given = RISING | {"keep_best": "eval/loss", "keep_checkpoints": 9} | more
    whole, _ = fit(**given, out="whole")
    # A kill after the last evaluation, when best/ may be newer than the checkpoint.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_final", interrupt)
        fit(**given)
    out = whole.with_name("out")
    assert (out / "best").is_dir()
    for path in sorted(out.glob("checkpoint-*"))[left:]:
        shutil.rmtree(path)
    resume(out)
    assert not differences(whole, out)
    assert best_record(whole) == best_record(out)


def interrupt(*arguments):
    raise KeyboardInterrupt


@pytest.fixture
def tensorboard(monkeypatch):
    """Stands for TensorBoard -> {folder: {step: {name: value}}}, as it would show them."""
    shown = {}

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.history = shown.setdefault(pathlib.Path(folder).parent.name, {})
            for step in [step for step in self.history if step >= purge_step]:
                del self.history[step]

        def add_scalar(self, name, value, step):
            values = self.history.setdefault(step, {})
            assert name not in values, "twice"
            values[name] = value

        def add_text(self, *arguments):
            pass

        flush = close = add_text

    package = types.ModuleType("tensorboard")
    package.__spec__ = importlib.util.spec_from_loader("tensorboard", None)
    writers = types.ModuleType("torch.utils.tensorboard")
    writers.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "tensorboard", package)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", writers)
    return shown


def without_speed(history):
    return {step: {name: value for name, value in values.items() if "tokens_per" not in name}
            for step, values in history.items()}


@pytest.mark.parametrize("last", [5, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_with_two_sets_the_best_weights_and_a_tracker_that_is_killed_ends_like_a_whole_one(
        fit, sets, tensorboard, monkeypatch, last):
    given = RISING | {"eval_share": None, "keep_best": "eval/far/loss", "report_to": "tensorboard",
                      "eval_dataset": f"near={sets['near']},far={sets['far']}"}
    whole, metrics = fit(**given, out="whole")
    evaluate = train.evaluate_and_log

    def evaluate_and_die(args, run, log, number, *others):
        splits = evaluate(args, run, log, number, *others)
        if number == last:
            raise KeyboardInterrupt
        return splits

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "evaluate_and_log", evaluate_and_die)
        fit(**given)
    out = whole.with_name("out")
    resume(out)
    assert not differences(whole, out) and best_record(whole) == best_record(out)
    logged = [(row["step"], row["split"]) for row in read_metrics(out)]
    assert len(logged) == len(set(logged)) == 3 * 8
    assert without_speed(tensorboard["out"]) == without_speed(tensorboard["whole"])
    for row in metrics:
        assert tensorboard["whole"][row["step"]][f"{row['split']}/loss"] == row["loss"]


def test_two_processes_keep_the_best_weights_of_rmsprop_under_fsdp_as_one_does(
        fit, folder, pairs, sets, tmp_path):
    given = RISING | {"lr": 0.1, "optimizer": "rmsprop", "dtype": "float64", "eval_share": None,
                      "eval_dataset": f"near={sets['near']},far={sets['far']}",
                      "keep_best": "eval/far/rewards/accuracies", "early_stop": 4}
    alone, _ = fit(**given, out="alone")
    two = {"model": folder, "dataset": pairs, "output_dir": tmp_path / "two", "parallel": "fsdp"}
    ended = run_training(TINY_RUN | given | two, ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert not differences(alone, tmp_path / "two", 1e-7)
    assert best_record(alone)["step"] == best_record(tmp_path / "two")["step"] < 8


def best_record(out):
    """The entry about the best evaluation in the file of a finished run."""
    file = out / "run.json"
    if not file.exists():
        file = out / "config.json"
    return json.loads(file.read_text())["best"]


def test_a_run_stops_after_n_evaluations_without_a_better_one(fit, capsys):
    given = RISING | {"max_steps": 30}
    out, stopped = fit(**given, keep_best="eval/loss", early_stop=2)
    losses = [row["loss"] for row in stopped if row["split"] == "eval"]
    last, best = len(losses), losses.index(min(losses)) + 1
    assert last == best + 2 < 30 and best_record(out)["step"] == best
    text = f"no better eval/loss since step {best}; stopped after step {last} of 30"
    assert text in capsys.readouterr().out
    # No two evaluations before passed without a better one.
    assert all(min(losses[:i + 2]) < min(losses[:i]) for i in range(1, best - 1))
    _, metrics = fit(**given, out="whole")
    assert not differences(stopped, [row for row in metrics if row["step"] <= last])


def test_with_named_sets_eval_is_the_first_and_a_name_is_its_own(fit, sets):
    given = RISING | {"eval_share": None,
                      "eval_dataset": f"near={sets['near']},far={sets['far']}"}
    for metric, split in (("eval/loss", "eval/near"), ("eval/far/loss", "eval/far")):
        out, metrics = fit(**given, keep_best=metric, out=split.replace("/", "-"))
        rows = [row for row in metrics if row["split"] == split]
        assert best_record(out)["value"] == min(row["loss"] for row in rows)


def test_a_file_of_the_user_in_best_is_kept(fit, monkeypatch, capsys):
    save = train.save_best

    def save_and_add(run, ranks):
        save(run, ranks)
        note = run.folder / "best" / "note.txt"
        if not (run.folder / "best-2").exists():
            note.write_text("mine")

    monkeypatch.setattr(train, "save_best", save_and_add)
    out, _ = fit(**RISING, keep_best="eval/loss")
    assert (out / "best-2" / "note.txt").read_text() == "mine"
    assert "such as note.txt, and is now" in capsys.readouterr().out


def test_the_card_of_a_run_with_keep_best_has_the_metrics_of_the_best_step(fit):
    out, metrics = fit(**RISING, keep_best="eval/loss")
    row = best_row(metrics, "loss", min)
    card = (out / "README.md").read_text()
    assert f"After {row['step']} optimizer steps" in card
    assert f"{row['loss']:.4g} |" in card


@pytest.mark.parametrize("arguments, message", [
    (["--early_stop=2"], "--early_stop 2: give --keep_best METRIC too"),
    (["--keep_best=eval/loss", "--eval_every=0"], "--keep_best eval/loss: --eval_every 0 "),
    (["--keep_best=eval/rewards/rejected"], "--keep_best eval/rewards/rejected: is not a metric"),
    (["--keep_best=loss2"], "--keep_best loss2: is not a metric that is better when"),
    (["--early_stopping_patience=3"], "--early_stopping_patience: --early_stop 3"),
])
def test_keep_best_without_a_direction_or_evaluations_is_refused(arguments, message):
    with pytest.raises(UserError) as error:
        flags.parse_args(["--model=m", "--dataset=d", *arguments])
    assert message in str(error.value)


@pytest.mark.parametrize("given", [
    {"keep_best": "world/share"}, {"keep_best": "eval/far/loss"}, {"keep_best": "train/loss"},
    {"keep_best": "eval/loss", "eval_share": 0},
    {"loss": "sft", "keep_best": "eval/rewards/margins"},
], ids=str)
def test_a_metric_that_evaluations_do_not_have_is_refused_before_the_first_step(
        fit, given, monkeypatch):
    monkeypatch.setattr(train, "train_step", None)
    with pytest.raises(UserError, match="evaluations of this run do not have it; they have"):
        fit(**given)
