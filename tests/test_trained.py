"""--eval_only: a trained run, or any other model, is evaluated on named sets of rows."""
import json
import pathlib
import shutil

import pytest
from conftest import (
    ALONE,
    TINY_RUN,
    differences,
    make_rows,
    read_metrics,
    run_training,
    tiny_model,
    to_arguments,
    write_jsonl,
)

import model as models
import train
from errors import UserError


@pytest.fixture
def sets(tmp_path):
    """--eval_dataset of two files of rows."""
    files = {name: write_jsonl(tmp_path / f"{name}.jsonl", make_rows(count, seed=count))
             for name, count in (("near", 5), ("far", 9))}
    return f"near={files['near']},far={files['far']}"


def evaluate(model, sets=None, *more, out=None, ranks=ALONE, **flags):
    """Run --eval_only in this process -> rows of metrics.jsonl if there is an output folder."""
    flags |= {"model": model, "eval_dataset": sets, "output_dir": out}
    train.main(["--eval_only", *more, *to_arguments(flags)], ranks)
    return read_metrics(out) if out else None


def last_evaluation(metrics):
    """The rows of the last evaluation of a run."""
    rows = [row for row in metrics if row["split"] != "train"]
    return [row for row in rows if row["step"] == rows[-1]["step"]]


def content_of(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


RUNS = [
    {}, {"lora_rank": 2}, {"loss": "bco_pair", "dtype": "float64"}, {"loss": "simpo"},
    {"ref": "cache", "loss": "ipo", "beta": 0.3}, {"loss": "kto", "unpair": True},
    {"reference_free": True}, {"loss": "sft", "lora_rank": 2},
]


@pytest.mark.parametrize("given", RUNS, ids=str)
def test_the_metrics_of_a_run_are_those_of_its_last_evaluation(
        fit, sets, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, metrics = fit(max_steps=2, eval_share=None, eval_dataset=sets, lr=0.1, **given)
    before = content_of(out)
    found = evaluate(out, sets, out=tmp_path / "evaluated")
    assert [row["split"] for row in found] == ["eval/near", "eval/far"]
    assert not differences(found, last_evaluation(metrics))
    assert content_of(out) == before


def test_of_two_stages_the_reference_is_the_adapter_that_the_second_one_started_from(
        fit, sets, tmp_path):
    first, _ = fit(loss="sft", lora_rank=2, max_steps=1, out="first")
    out, metrics = fit(adapter=first, eval_share=None, eval_dataset=sets, max_steps=2)
    found = evaluate(out, sets, out=tmp_path / "evaluated")
    assert not differences(found, last_evaluation(metrics))
    against_base = evaluate(out, sets, out=tmp_path / "base", ref="adapter_off")
    assert against_base[0]["logps/chosen"] == found[0]["logps/chosen"]
    assert against_base[0]["rewards/margins"] != found[0]["rewards/margins"]


def test_with_keep_best_the_step_and_the_metrics_are_those_of_the_best_evaluation(
        fit, sets, tmp_path):
    out, metrics = fit(max_steps=8, eval_every=1, lr=0.3, lr_schedule="constant", seed=1,
                       warmup_steps=4, eval_share=None, eval_dataset=sets,
                       keep_best="eval/near/rewards/accuracies", loss="bco_pair")
    best = json.loads((out / "config.json").read_text())["best"]["step"]
    assert best < 8
    expected = [row for row in metrics if row["step"] == best and row["split"] != "train"]
    assert not differences(evaluate(out, sets, out=tmp_path / "evaluated"), expected)


def test_without_eval_dataset_the_rows_are_those_of_the_run_and_all_metrics_are_printed(
        fit, sets, capsys):
    out, metrics = fit(max_steps=2, eval_share=None, eval_dataset=sets)
    capsys.readouterr()
    evaluate(out)
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(next(line for line in lines if line.split() == ["near", "far"])):]
    near, far = last_evaluation(metrics)
    assert len(table) == len(near) - 2 + 1
    for line in table[1:]:
        name, *values = line.split()
        assert list(map(float, values)) == pytest.approx([near[name], far[name]], rel=1e-5)


def test_a_checkpoint_and_a_run_that_has_not_ended_are_evaluated(fit, sets, tmp_path, capsys):
    out, metrics = fit(max_steps=4, save_every=2, eval_every=2, eval_share=None, eval_dataset=sets,
                       loss="bco_pair")
    found = evaluate(out / "checkpoint-2", sets, out=tmp_path / "evaluated")
    assert not differences(found, [row for row in metrics
                                   if row["step"] == 2 and row["split"] != "train"])


def test_another_loss_and_another_reference_may_be_given(fit, folder, tokenizer, sets, tmp_path):
    out, _ = fit(loss="sft", max_steps=2, lr=0.1)
    row = evaluate(out, sets, out=tmp_path / "a", loss="ipo")[0]
    assert {"rewards/margins", "loss"} <= row.keys()
    model = tiny_model("llama", tokenizer)
    model.lm_head.weight.data.mul_(2)
    models.save_model(model, tokenizer, tmp_path / "other")
    other = evaluate(out, sets, out=tmp_path / "b", loss="ipo", ref_model=tmp_path / "other")[0]
    assert other["logps/chosen"] == row["logps/chosen"]
    assert other["rewards/margins"] != row["rewards/margins"]
    alike = evaluate(out, sets, out=tmp_path / "c", loss="ipo", ref_model=folder)[0]
    assert not differences([alike], [row])


def test_any_other_model_needs_a_reference_or_a_loss_without_one(fit, folder, sets, tmp_path):
    with pytest.raises(UserError, match="is not a run, .*; give --ref_model, or --reference_free"):
        evaluate(folder, sets, max_length=64)
    row = evaluate(folder, sets, out=tmp_path / "a", loss="sft", max_length=64)[0]
    same = evaluate(folder, sets, out=tmp_path / "b", ref_model=folder, max_length=64)[0]
    assert row["step"] == same["step"] == 0
    assert same["loss"] == pytest.approx(0.6931, abs=1e-4) and same["rewards/margins"] == 0
    free = evaluate(folder, sets, "--reference_free", out=tmp_path / "c", max_length=64)[0]
    assert free["logps/chosen"] == same["logps/chosen"]


def test_an_adapter_without_the_flags_of_a_run_is_compared_with_its_base(fit, sets, tmp_path):
    out, metrics = fit(lora_rank=2, max_steps=2, lr=0.1, eval_share=None, eval_dataset=sets)
    (out / "run.json").unlink()
    found = evaluate(out, sets, out=tmp_path / "evaluated", max_length=64, micro_batch_size=3)
    expected = [row | {"step": 0} for row in last_evaluation(metrics)]
    assert not differences(found, expected, 1e-6)


@pytest.mark.parametrize("flags, message", [
    ({"lr": 0.1}, "--lr: is not read with --eval_only"),
    ({"batch_size": 2}, "--batch_size: is not read with --eval_only"),
    ({"dataset": "x.jsonl"}, "--dataset: is not read with --eval_only"),
    ({"resume": True}, "--resume: is not read with --eval_only"),
    ({"config": "x.json"}, "--config: is not read with|--config x.json: "),
    ({"gamma": 1.0}, "--gamma is not read by --loss sigmoid"),
    ({"nosuch": 1}, "--nosuch: there is no such flag"),
    ({"parallel": "fsdp"}, "--parallel fsdp: one process alone"),
    ({"model": None}, "--eval_only: give --model, the run or the model to evaluate"),
    ({"eval_dataset": None}, "--eval_only: give --eval_dataset, the rows to evaluate on"),
    ({"eval_dataset": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
    ({"output_dir": "OUT"}, "--output_dir .* holds a finished run: choose another folder"),
    ({"ref": "cache"}, "--ref cache: is for training"),
])
def test_what_an_evaluation_does_not_read_is_refused_in_one_line(short_run, sets, flags, message):
    given = {"model": short_run, "eval_dataset": sets} | flags
    given = {name: short_run if value == "OUT" else value for name, value in given.items()}
    before = content_of(short_run)
    with pytest.raises(UserError, match=message):
        train.main(["--eval_only", *to_arguments(given)], ALONE)
    assert content_of(short_run) == before


@pytest.fixture(scope="module")
def short_run(folder, pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("short") / "out"
    flags = TINY_RUN | {"model": folder, "dataset": pairs, "output_dir": out, "max_steps": 1}
    train.main(to_arguments(flags), ALONE)
    return out


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(short_run, sets, tmp_path):
    alone = evaluate(short_run, sets, out=tmp_path / "alone")
    flags = {"eval_only": True, "model": short_run, "eval_dataset": sets, "parallel": "fsdp",
             "output_dir": tmp_path / "two"}
    ended = run_training(flags, ranks=2)
    assert ended.returncode == 0, ended.stderr
    assert not differences(alone, read_metrics(tmp_path / "two"), 1e-5)
    assert sorted(path.name for path in pathlib.Path(tmp_path / "two").glob("[!.]*")) == [
        "metrics.jsonl"]


def test_what_a_run_says_about_itself_is_not_said_about_a_run_that_starts_from_it(fit):
    first, _ = fit(max_steps=4, eval_every=1, keep_best="eval/loss", loss="bco_pair", out="first")
    assert {"flags", "best", "loss_state"} <= json.loads((first / "config.json").read_text()).keys()
    second, _ = fit(model=first, max_steps=4, save_every=2)
    config = json.loads((second / "config.json").read_text())
    assert "best" not in config and "loss_state" not in config
    assert "flags" not in json.loads((second / "checkpoint-2" / "config.json").read_text())
    shutil.rmtree(first)
