"""--sample_every: the answers of policy and reference while a run trains, and a run that is bit for
bit the same with and without them."""
import json
import shutil
import sys

import forked
import pytest
import torch
from conftest import (
    ALONE,
    ROOT,
    differences,
    make_rows,
    read_metrics,
    read_samples,
    resume,
    to_arguments,
    unfinished,
    write_jsonl,
)

import files
import flags
import generation
import runs
import samples
import train
from errors import UserError

STEPS = {"max_steps": 6, "save_every": 2, "eval_every": 3, "eval_share": 0.3}
SAMPLED = {"sample_every": 2, "sample_tokens": 5}


def texts(rows, side):
    return [row[side]["text"] for row in rows]


@pytest.fixture(scope="module")
def fit_here(folder, pairs, tmp_path_factory):
    """`fit`, for runs that several tests share."""
    def run(**given):
        out = tmp_path_factory.mktemp("run") / "out"
        given = {"model": folder, "dataset": pairs, "batch_size": 8, "micro_batch_size": 3,
                 "max_length": 64, "lr": 0.05, "log_every": 1, "output_dir": out, **STEPS} | given
        train.main(to_arguments(given), ALONE)
        return out
    return run


@pytest.fixture(scope="module")
def plain(fit_here):
    return fit_here()


@pytest.fixture(scope="module")
def sampled(fit_here):
    return fit_here(**SAMPLED)


# --- What is sampled ------------------------------------------------------------------------------

def test_after_every_n_steps_and_at_the_end_the_same_prompts_are_answered(fit):
    out, _ = fit(max_steps=5, eval_share=0.3, **SAMPLED)
    rows = read_samples(out)
    assert [row["step"] for row in rows] == [2, 2, 2, 4, 4, 4, 5, 5, 5]
    ids = [row["id"] for row in rows]
    assert ids[:3] == ids[3:6] == ids[6:] and len(set(ids)) == 3
    fit(max_steps=5, sample_every=0, sample_prompts=1, sample_tokens=2, out="end")
    assert [row["step"] for row in read_samples(out.with_name("end"))] == [5]


def test_the_answers_at_the_end_are_those_of_the_saved_model_and_of_its_reference(sampled):
    opened = runs.open_run(str(sampled))
    settings = generation.Sampling(5)
    rows = read_samples(sampled)[-3:]
    assert texts(rows, "policy") != texts(rows, "reference")
    for row in rows:
        prompt = opened.tokenizer(row["prompt"])["input_ids"]
        for side in ("policy", "reference"):
            with runs.speaker(opened, side) as model:
                answer, = generation.generate(model, opened.tokenizer, [prompt], settings)
            assert (answer.text, answer.ended) == (row[side]["text"], row[side]["ended"])
            measured, = runs.answer_rewards(opened, opened.args.beta, prompt, [answer.ids])
            for name, value in measured.items():
                assert row[side][name] == pytest.approx(value, abs=1e-4)


def test_the_reward_is_beta_times_the_log_ratio_and_the_reference_answers_once(
        fit, monkeypatch):
    calls = []

    def generate(*arguments, **options):
        calls.append(len(arguments[2]))
        return generation.generate(*arguments, **options)

    monkeypatch.setattr(samples, "generate", generate)
    out, _ = fit(max_steps=4, beta=0.3, eval_share=0.3, **SAMPLED)
    assert calls == [3, 3, 3]  # the reference, and the policy twice
    rows = read_samples(out)
    assert texts(rows[:3], "reference") == texts(rows[3:], "reference")
    for row in rows:
        for answer in (row["policy"], row["reference"]):
            ratio = answer["logp"] - answer["ref_logp"]
            assert answer["reward"] == pytest.approx(0.3 * ratio)
    assert any(abs(row["policy"]["reward"]) > 1e-3 for row in rows)


def test_a_reference_that_moves_answers_anew(fit):
    """After each step the reference is the policy."""
    out, _ = fit(max_steps=4, lr=0.1, sync_ref_every=1, sync_ref_alpha=1.0, **SAMPLED)
    rows = read_samples(out)
    assert texts(rows, "policy") == texts(rows, "reference")
    assert all(row["policy"]["reward"] == pytest.approx(0, abs=1e-5) for row in rows)
    count = len(rows) // 2
    assert texts(rows[:count], "reference") != texts(rows[count:], "reference")


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_with_a_cached_reference_it_has_answered_before_its_model_is_freed(
        lora_rank, fit, tmp_path, monkeypatch):
    """A reference that is the policy without its adapter is not freed and gives rewards."""
    monkeypatch.chdir(tmp_path)
    given = {"max_steps": 2, "lr": 0.1, "lora_rank": lora_rank, "dtype": "float64"} | SAMPLED
    whole, cached = (read_samples(fit(**given, out=name, ref=ref)[0])
                     for name, ref in (("whole", None), ("cached", "cache")))
    for expected, row in zip(whole, cached, strict=True):
        for side in ("policy", "reference"):
            if lora_rank is None:
                del expected[side]["ref_logp"], expected[side]["reward"]
            for name, value in expected[side].items():
                assert row[side].pop(name) == pytest.approx(value, abs=1e-6)
            assert row[side] == {}


def test_a_loss_without_a_reference_has_answers_of_the_policy_alone(fit):
    out, _ = fit(loss="simpo", max_steps=2, **SAMPLED)
    for row in read_samples(out):
        assert row.keys() == {"step", "id", "prompt", "policy"}
        assert row["policy"].keys() == {"text", "ended", "tokens", "logp"}


def test_labels_and_lists_have_prompts_too(fit, tmp_path):
    ranked = [{"prompt": f"{i} the cat", "responses": [" sat", " ran far", " saw"]}
              for i in range(12)]
    labels = [{"prompt": f"{i // 2} the cat", "completion": " sat on a mat", "label": i % 2 == 0}
              for i in range(12)]
    for name, loss, rows in (("ranked", "plackett_luce", ranked), ("labels", "kto", labels)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        out, _ = fit(loss=loss, dataset=path, eval_dataset=path, eval_share=None, out=name,
                     max_steps=1, **SAMPLED)
        prompts = [row["prompt"] for row in read_samples(out)]
        assert prompts == ["0 the cat", "1 the cat", "2 the cat"]
        assert "reward" in read_samples(out)[0]["policy"]


def test_the_prompts_are_the_first_different_ones_of_the_held_out_rows(fit, tmp_path, pairs):
    rows = make_rows(8, seed=7)
    rows[1]["prompt"] = rows[0]["prompt"]
    first = write_jsonl(tmp_path / "first.jsonl", rows[:3])
    second = write_jsonl(tmp_path / "second.jsonl", rows[2:])
    given = {"eval_share": None, "max_steps": 1, "sample_every": 0, "sample_tokens": 1}
    out, _ = fit(eval_dataset=f"a={first},b={second}", sample_prompts=4, out="sets", **given)
    expected = [rows[i]["prompt"] for i in (0, 2, 3, 4)]
    assert [row["prompt"] for row in read_samples(out)] == expected
    out, _ = fit(eval_dataset=first, sample_prompts=100, out="all", **given)
    assert [row["prompt"] for row in read_samples(out)] == expected[:2]
    out, _ = fit(out="none", **given | {"eval_share": 0})
    expected = [row["prompt"] for row in map(json.loads, open(pairs))][:3]
    assert [row["prompt"] for row in read_samples(out)] == expected


def test_the_answers_of_a_run_that_stops_early_are_those_of_its_last_step(fit):
    out, rows = fit(lr=3.0, eval_every=1, keep_best="eval/loss", early_stop=1, max_steps=9,
                    eval_share=0.3, sample_every=0, sample_tokens=2)
    assert {row["step"] for row in read_samples(out)} == {rows[-1]["step"]}
    assert rows[-1]["step"] < 9


# --- Training is the same -------------------------------------------------------------------------

CASES = {
    "full": {},
    "packed, checkpointed, with dropout, in bfloat16": {
        "lora_rank": 4, "lora_dropout": 0.5, "gradient_checkpointing": True, "dtype": "bfloat16",
        "attention": "packed",
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_bit_for_bit_the_same_with_and_without_samples(case, fit_here, plain, sampled):
    with_samples, without = sampled, plain
    if CASES[case]:
        with_samples, without = fit_here(**CASES[case], **SAMPLED), fit_here(**CASES[case])
    assert len(read_samples(with_samples)) == 9 and not (without / "samples.jsonl").exists()
    assert differences(with_samples, without) == []


def test_sampling_leaves_the_global_random_state_as_it_was(fit, monkeypatch):
    states = []

    def sample(sampler, step, log):
        before = torch.get_rng_state()
        original(sampler, step, log)
        states.append(torch.equal(before, torch.get_rng_state()))

    original = samples.Sampler.sample
    monkeypatch.setattr(samples.Sampler, "sample", sample)
    fit(lora_rank=2, lora_dropout=0.5, max_steps=2, **SAMPLED)
    assert states == [True]


def test_without_the_flag_the_file_of_samples_is_not_even_imported(fit, monkeypatch):
    for name in ("samples", "generation"):
        monkeypatch.delitem(sys.modules, name)
    fit(max_steps=2)
    assert not {"samples", "generation"} & sys.modules.keys()


TWO_RANKS = """
import sys
sys.path[:0] = sys.argv[3:]
import parallel, train
ranks = parallel.init_distributed()
for name, flags in (("ddp", []), ("fsdp", ["--lora_rank=2", "--lora_dropout=0.5"])):
    flags = sys.argv[1].split() + flags + [f"--parallel={name}"]
    train.main([*flags, f"--output_dir={sys.argv[2]}/{name}"], ranks)
    sampled = ["--sample_every=2", "--sample_tokens=5"]
    train.main([*flags, *sampled, f"--output_dir={sys.argv[2]}/{name}-sampled"], ranks)
parallel.leave_distributed(ranks)
"""


def test_two_processes_train_bit_for_bit_the_same_and_answer_like_one(
        fit, folder, pairs, tmp_path):
    """DDP, where rank 0 answers alone, and FSDP, where both ranks do, with an adapter."""
    given = {"model": folder, "dataset": pairs, "batch_size": 8, "max_length": 64, "lr": 0.05,
             "log_every": 1, "eval_share": 0.3, "max_steps": 3, "dtype": "float64"}
    (tmp_path / "two.py").write_text(TWO_RANKS)
    done = forked.run(tmp_path / "two.py", " ".join(to_arguments(given)), tmp_path, ROOT,
                      ROOT / "tests", ranks=2)
    assert done.returncode == 0, done.stderr
    for name in ("ddp", "fsdp"):
        assert differences(tmp_path / name, tmp_path / f"{name}-sampled") == []
    alone, _ = fit(**given | SAMPLED | {"out": "alone"})
    rows = read_samples(tmp_path / "ddp-sampled")
    assert texts(rows, "policy") == texts(read_samples(alone), "policy")
    assert texts(rows, "reference") == texts(read_samples(alone), "reference")
    # The adapter of FSDP has other dropout on two ranks than on one; its reference has none.
    rows = read_samples(tmp_path / "fsdp-sampled")
    assert texts(rows, "reference") == texts(read_samples(alone), "reference")
    opened = runs.open_run(str(tmp_path / "fsdp-sampled"))
    for row in rows[-3:]:
        prompt = opened.tokenizer(row["prompt"])["input_ids"]
        answer, = generation.generate(opened.policy.model, opened.tokenizer, [prompt],
                                      generation.Sampling(5))
        assert answer.text == row["policy"]["text"]
        assert row["policy"]["logp"] == pytest.approx(sum(answer.logps), abs=1e-6)


# --- Files and resuming ---------------------------------------------------------------------------

def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def test_a_killed_and_resumed_run_has_the_samples_of_an_uninterrupted_one_once(
        sampled, tmp_path):
    expected = (sampled / "samples.jsonl").read_bytes()
    out = unfinished(copied(sampled, tmp_path))
    shutil.rmtree(out / "checkpoint-4")  # so that step 4 is sampled again
    with open(out / "samples.jsonl", "a") as file:
        file.write('{"step": 6, "id": "half a li')
    resume(out)
    assert (out / "samples.jsonl").read_bytes() == expected
    assert differences(out, sampled) == []
    assert "samples.jsonl" in files.read_list(out)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_its_samples_again(
        sampled, tmp_path):
    out = unfinished(copied(sampled, tmp_path))
    for path in out.glob("checkpoint-*"):
        shutil.rmtree(path)
    resume(out)
    assert (out / "samples.jsonl").read_bytes() == (sampled / "samples.jsonl").read_bytes()


def test_samples_that_were_changed_or_lost_are_those_of_the_checkpoint_and_a_line_says_so(
        sampled, tmp_path, capsys):
    out = unfinished(copied(sampled, tmp_path))
    (out / "samples.jsonl").write_text("mine\n")
    resume(out)
    assert (out / "samples.jsonl").read_bytes() == (sampled / "samples.jsonl").read_bytes()
    line = f"{out / 'samples.jsonl'}: its rows up to step 4 were changed or are missing"
    assert line in capsys.readouterr().out


def test_a_resumed_run_may_sample_more_often_or_no_more(sampled, plain, tmp_path):
    out = unfinished(copied(sampled, tmp_path))
    resume(out, "--sample_prompts=0")
    assert [row["step"] for row in read_samples(out)] == [2] * 3 + [4] * 3
    assert differences(out, plain) == []
    resume(unfinished(out), "--sample_every=1", "--sample_prompts=1")
    assert [row["step"] for row in read_samples(out)] == [2] * 3 + [4] * 3 + [5, 6]


def test_a_resumed_run_may_begin_to_sample_and_keeps_a_users_file_of_this_name(
        plain, tmp_path, capsys):
    out = unfinished(copied(plain, tmp_path))
    (out / "samples.jsonl").write_text("mine\n")
    resume(out, "--sample_every=0", "--sample_tokens=2")
    assert {row["step"] for row in read_samples(out)} == {6}
    assert (out / "samples.jsonl-2").read_text() == "mine\n"
    assert "were changed" not in capsys.readouterr().out


# --- Flags and the console ------------------------------------------------------------------------

@pytest.mark.parametrize("flag", ["sample_prompts", "sample_tokens"])
def test_flags_of_samples_are_refused_where_nothing_is_sampled(flag):
    with pytest.raises(UserError, match=f"--{flag} 2: is read with --sample_every"):
        flags.parse_args(["--model=m", "--dataset=d", f"--{flag}=2"])


def test_in_the_world_three_prompts_are_answered_at_the_end_by_default():
    args, _, _ = flags.parse_args([])
    assert (args.sample_every, args.sample_prompts, args.sample_tokens) == (0, 3, 64)
    args, _, _ = flags.parse_args(["--model=m", "--dataset=d"])
    assert args.sample_every is args.sample_prompts is args.sample_tokens is None


def test_the_console_shows_an_answer_on_one_short_line_that_cannot_control_the_terminal():
    answer = {"text": "a\x1b[2J\nb " + "long " * 50, "ended": True, "tokens": 4, "logp": -2.0}
    reference = answer | {"text": " short", "ended": False, "reward": 0.5, "true_reward": None}
    row = {"id": "rows.jsonl:1\x1b", "prompt": "head " * 50 + "its end\n", "policy": answer,
           "reference": reference}
    prompt, first, second = samples.console_lines([row])
    for line in (prompt, first, second):
        assert line.isprintable() and len(line) <= 100
    assert prompt.startswith("[rows.jsonl:1\\x1b] …") and prompt.endswith("its end")
    assert first.startswith("  policy    log-prob -0.50 per token: a\\x1b[2J\\nb long")
    assert first.endswith("…")
    assert second == "  reference reward +0.50, malformed: short…"


def test_the_console_has_the_answers_of_each_step_below_its_evaluation(fit, capsys):
    out, _ = fit(max_steps=2, eval_every=2, sample_every=2, sample_tokens=2, sample_prompts=1)
    lines = capsys.readouterr().out.splitlines()
    number = lines.index("step 2 samples:")
    assert lines[number - 1].startswith("step 2 eval:")
    assert lines[number + 1:number + 4] == samples.console_lines(read_samples(out))
    assert read_metrics(out)[-1]["split"] == "eval"
