"""Claims about the page of a real model, on a tiny one: real commands, in forked processes."""
import json
import pathlib
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import forked
import numpy as np
import pytest
from conftest import make_rows, make_tokenizer, read_lines, tiny_model, write_jsonl

import errors
import model as models
import real_model
import real_runs
from real_model import wilson
from real_runs import RealRun, Rows

TEMPLATE = ("{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
            "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
RUNS = (
    RealRun("tuned", "instructions", "sigmoid", {"lora_rank": 4, "lr": "1e-2"}),
    RealRun("labels", "instructions", "kto", {"lora_rank": 4}),
)
REWARDS = {"loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/accuracies"}
LOGPS = {"logps/chosen", "logps/rejected"}
# The metrics that this project and TRL both log.
LOGGED = {
    "sft": {"loss", "grad_norm"},
    "sigmoid": REWARDS | LOGPS,
    "ipo": {"loss", "grad_norm"} | LOGPS,
    "simpo": REWARDS,
    "orpo": REWARDS,
    "kto": REWARDS - {"rewards/accuracies"} | LOGPS | {"kl"},
}
# The other trainer: what our run logged, with a loss and a kl that are larger by known numbers.
OTHER = """
import json, pathlib, sys
job = json.load(open(sys.argv[1]))
rows = pathlib.Path(job["rows"]).parent / f"ours-{job['loss']}" / "metrics.jsonl"
for line in rows.read_text().splitlines():
    row = json.loads(line)
    row["loss"] += 2e-3
    if "kl" in row:
        row["kl"] = max(row["kl"], 0) + 5e-2
    print(json.dumps(row | {"trl": "9.9"}))
"""


def run_forked(words, log):
    """In place of a process that imports torch again."""
    finished = forked.run(words[1], *words[2:])
    log.write_text(finished.stdout + finished.stderr)
    return finished.returncode


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A page, and its call as a function."""
    home = tmp_path_factory.mktemp("real")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = tiny_model("llama", tokenizer)
    model.config.max_position_embeddings = 512  # its positions are rotations, of any number
    models.save_model(model, tokenizer, home / "tiny")
    (home / "data").mkdir()
    write_jsonl(home / "data" / "pairs.jsonl", make_rows(40))
    (home / "other.py").write_text(OTHER)
    flags = {"model": home / "tiny", "data": home / "data", "out": home / "out",
             "page": home / "page.md", "train_rows": 24, "held_out": 16, "compare_steps": 2,
             "compare": f"{sys.executable} {home / 'other.py'}"}
    arguments = [f"--{name}={value}" for name, value in flags.items()]

    def make(*more):
        real_model.main([*arguments, *more])
        return (home / "page.md").read_text()

    with pytest.MonkeyPatch.context() as patch:
        for module in (real_runs, real_model):
            patch.setattr(module, "EXPERIMENTS", RUNS)
            patch.setattr(module, "FILES", {"instructions": Rows("pairs.jsonl", "Tiny", True)})
        patch.setattr(real_runs, "COMPARED", ("kto",))
        patch.setattr(real_runs, "run_process", run_forked)
        make()
        yield SimpleNamespace(home=home, out=home / "out", make=make, patch=patch)


@pytest.mark.parametrize("right, count", [(0, 8), (3, 8), (8, 8), (70, 128)])
def test_wilsons_interval_ends_where_the_share_is_z_standard_deviations_away(right, count):
    z, share = 1.959964, right / count
    for end in wilson(right, count):
        assert abs(abs(share - end) - z * (end * (1 - end) / count) ** 0.5) < 1e-12


def test_wilsons_interval_with_all_right_is_n_over_n_plus_z_squared_to_one():
    low, high = wilson(8, 8)
    assert abs(low - 8 / (8 + 1.959964 ** 2)) < 1e-12 and abs(high - 1) < 1e-12
    assert abs(wilson(0, 8)[1] - (1 - low)) < 1e-12


@pytest.mark.parametrize("right, margin, word", [
    (70, 9.0, "yes"), (70, 0.05, "direction"), (54, 9.0, "not shown"), (46, -9.0, "not shown"),
    (30, -9.0, "wrong way"),
])
def test_a_run_has_learned_if_its_interval_is_above_one_half_and_its_margin_grew(
        right, margin, word):
    result = real_model.Learned(RUNS[0], {}, 100, right, 0, np.array([margin, 0.0]), 1.0)
    assert real_model.verdict(result) == word


@pytest.mark.parametrize("name", ["tuned", "labels"])
def test_the_row_of_a_run_has_the_share_and_the_changes_of_its_held_out_log_probs(made, name):
    before = read_lines(made.out / "instructions" / "before.jsonl")
    after = read_lines(made.out / f"{name}-scores.jsonl")
    ratios = np.array([line["policy_logps"] for line in after])
    ratios = ratios - np.array([line["policy_logps"] for line in before])
    right = (ratios[:, 0] > ratios[:, 1]).mean()
    low, high = wilson(round(16 * right), 16)

    page = (made.home / "page.md").read_text()
    row = re.search(rf"^\| `{name}` \| .*$", page, re.MULTILINE)[0].replace("−", "-")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:4] == [f"{right:.2f}", f"{low:.2f} to {high:.2f}"]
    assert cells[6:8] == [f"{value:+.2f}" for value in ratios.mean(0)]


def test_the_page_names_the_default_learning_rate_that_train_py_used(made):
    flags = json.loads((made.out / "labels" / "run.json").read_text())["flags"]
    page = (made.home / "page.md").read_text()
    assert flags["lr"] == 5e-6 and "`labels`, LoRA, lr 5e-6: " in page
    assert page.count(", LoRA, lr ") == 1  # the learning rates of the others are no defaults


def test_a_second_call_runs_nothing_and_writes_the_same_page(made, monkeypatch):
    page = (made.home / "page.md").read_bytes()
    monkeypatch.setattr(real_runs, "run_process", None)
    made.make()
    assert (made.home / "page.md").read_bytes() == page


def test_the_page_has_the_largest_difference_from_the_other_trainer(made):
    page = (made.home / "page.md").read_text()
    comparison = page.partition("## Next to TRL")[2]
    row = re.search(r"^\| `kto` \| .*$", comparison, re.MULTILINE)[0]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == "2e-03" and cells[-2] == "5e-02"
    assert set(cells[2:-2]) == {"0e+00"}


def test_the_other_trainer_gets_the_token_ids_of_the_first_rows_in_their_order(made):
    rows = read_lines(made.out / "compare" / "kto-rows.jsonl")
    pairs = read_lines(made.out / "instructions" / "train.jsonl")
    assert len(rows) == 4  # 2 steps of 2 answers
    for number, row in enumerate(rows):
        pair, side = pairs[number // 2], ("chosen", "rejected")[number % 2]
        assert row["answers"] == [pair[side][0]["content"]]
        assert row["desirable"] == (side == "chosen")
        assert pair["prompt"][0]["content"] in row["prompt"]
        assert row["mismatched_ids"] not in row["answer_ids"]


def test_training_and_held_out_rows_share_no_prompt(made):
    prompts = {}
    for part in ("train", "held_out"):
        rows = read_lines(made.out / "instructions" / f"{part}.jsonl")
        prompts[part] = {row["prompt"][0]["content"] for row in rows}
    assert len(prompts["train"]) == 24 and len(prompts["held_out"]) == 16
    assert not prompts["train"] & prompts["held_out"]


def test_the_page_shows_the_exact_command_of_each_run(made):
    page = (made.home / "page.md").read_text()
    words = json.loads((made.out / "labels-train.json").read_text())["words"]
    command = " ".join(["python", *words]).replace(str(made.out), "R")
    assert command.replace(str(made.home / "tiny"), "M") in page
    assert str(made.home) not in page


def test_a_run_by_another_command_is_refused_and_named(made, monkeypatch):
    changed = (RUNS[0]._replace(flags={"lora_rank": 4, "lr": "3e-2"}),)
    monkeypatch.setattr(real_runs, "EXPERIMENTS", changed)
    with pytest.raises(errors.UserError, match="tuned-train was made by another command"):
        made.make()


def test_a_run_that_has_not_ended_is_named_on_the_page(made, monkeypatch, tmp_path):
    more = (*RUNS, RealRun("later", "instructions", "ipo"))
    monkeypatch.setattr(real_model, "EXPERIMENTS", more)
    real_model.main([f"--model={made.home / 'tiny'}", f"--data={made.home / 'data'}",
                     f"--out={made.out}", f"--page={tmp_path / 'page.md'}", "--only_page"])
    assert "Not finished when this page was written: `later`." in (
        tmp_path / "page.md").read_text()


def test_a_command_that_fails_is_one_line_with_its_last_output(made, monkeypatch):
    def fail(words, log):
        log.write_text("starting\nerror: --lr: is wrong\n")
        return 2
    monkeypatch.setattr(real_runs, "run_process", fail)
    monkeypatch.setattr(real_runs, "EXPERIMENTS", (RealRun("new", "instructions", "ipo"),))
    with pytest.raises(errors.UserError, match=r"new-train: ended with status 2 \(error: --lr"):
        made.make()
    assert not pathlib.Path(made.out / "new-train.json").exists()


@pytest.mark.parametrize("rows, problem", [
    ([{"prompt": "a", "chosen": "b"}], "row 1 has no texts"),
    ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "0 pairs that can be used"),
])
def test_a_file_without_usable_pairs_is_one_line(rows, problem, tmp_path):
    write_jsonl(tmp_path / real_runs.FILES["instructions"].file, rows)
    args = SimpleNamespace(data=tmp_path, out=tmp_path, train_rows=1, held_out=1)
    with pytest.raises(errors.UserError, match=problem):
        real_runs.split_rows(args, "instructions")


@pytest.mark.slow
def test_six_losses_trained_by_trl_from_one_adapter_log_the_same_numbers(made, monkeypatch):
    """About two minutes. Needs trl and peft."""
    pytest.importorskip("trl", minversion="1.0")
    pytest.importorskip("peft")

    def run(words, log):
        if words[1] == "train.py":
            return run_forked(words, log)
        finished = subprocess.run(words, capture_output=True, text=True)
        log.write_text(finished.stdout + finished.stderr)
        return finished.returncode

    script = real_runs.ROOT / "tests" / "trl_steps.py"
    args = real_model.parse_real_args([
        f"--model={made.home / 'tiny'}", f"--data={made.home / 'data'}",
        f"--out={made.home / 'trl'}", f"--compare={sys.executable} {script}"])
    (args.out / "compare").mkdir(parents=True)
    shutil.copytree(made.out / "instructions", args.out / "instructions")
    monkeypatch.setattr(real_runs, "run_process", run)
    monkeypatch.setattr(real_runs, "COMPARED", tuple(LOGGED))
    real_runs.compare_trainers(args)
    compared = real_runs.read_comparison(args)
    for loss, metrics in LOGGED.items():
        assert set(compared[loss]) == metrics, loss
        assert all(difference < 1e-4 for difference in compared[loss].values()), compared[loss]
