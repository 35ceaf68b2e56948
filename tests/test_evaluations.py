"""Evaluations: several held-out sets, the best weights, and a run that stops early."""
import json

import pytest
from conftest import differences, make_rows, resume, unfinished, write_jsonl

import flags
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
