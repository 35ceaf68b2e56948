"""sample.py: policy and reference of any run side by side, a chat, scores, an audit of labels."""
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    make_rows,
    make_tokenizer,
    read_lines,
    tiny_model,
    unfinished,
    write_jsonl,
)

import audit
import model as models
import runs
import sample
import world
from errors import UserError
from lora import lora_layers

CHAT = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def ask(*arguments):
    """Run sample.py in this process."""
    sample.main([str(argument) for argument in arguments])


@pytest.fixture
def prompts(tmp_path):
    texts = ["the cat sat", "one more dog that ran far", "rain", "in sun or rain", "home"]
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


@pytest.fixture
def chat_folder(tmp_path):
    """A model with a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    model = tiny_model("llama", tokenizer, eos_token_id=tokenizer.eos_token_id)
    models.save_model(model, tokenizer, tmp_path / "chat_model")
    return tmp_path / "chat_model"


# --- What --model may be --------------------------------------------------------------------------

def test_policy_and_reference_answer_side_by_side_with_log_probs_and_rewards(fit, prompts, capsys):
    out, _ = fit(lr=0.1, beta=0.3)
    ask("--model", out, "--prompt", "the cat sat", "--max_new_tokens", 8)
    printed = capsys.readouterr().out
    assert re.search(r"-- policy +\| -- reference\n", printed)
    assert len(re.findall("log-prob per token", printed)) == 2 and "reward" in printed


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 2}, {"loss": "simpo"}, {"ref": "cache"}])
def test_the_reward_of_an_answer_is_beta_times_its_log_ratio_to_where_the_run_started(
        flags, fit, folder, prompts, tmp_path):
    out, _ = fit(lr=0.1, beta=0.3, dtype="float64", **flags)
    ask("--model", out, "--prompts", prompts, "--max_new_tokens", 8, "--out", tmp_path / "a.jsonl")
    opened, start = runs.open_run(str(out)), runs.open_run(folder, dtype="float64")
    lines = read_lines(tmp_path / "a.jsonl")
    assert len(lines) == 5 and lines[0]["prompt"] == "the cat sat"
    for line in lines:
        prompt = opened.tokenizer(line["prompt"])["input_ids"]
        for answer in (line["policy"], line["reference"]):
            ids = opened.tokenizer(answer["text"])["input_ids"]
            if len(ids) < answer["tokens"] or opened.tokenizer.decode(ids) != answer["text"]:
                continue  # it ended, or is no text that becomes these tokens again
            started = runs.answer_rewards(start, 1.0, prompt, [ids])[0]["logp"]
            if len(ids) == answer["tokens"]:
                assert answer["ref_logp"] == pytest.approx(started, abs=1e-6)
            assert answer["reward"] == pytest.approx(
                0.3 * (answer["logp"] - answer["ref_logp"]), abs=1e-12)
    assert any(line["policy"]["text"] != line["reference"]["text"] for line in lines)


def test_the_reference_of_an_adapter_is_its_base_and_no_second_model(fit, prompts, tmp_path):
    out, _ = fit(lr=0.1, lora_rank=2)
    opened = runs.open_run(str(out))
    assert lora_layers(opened.policy) and not isinstance(opened.reference, torch.nn.Module)
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    for name, model in (("a", out), ("b", base)):
        ask("--model", model, "--prompts", prompts, "--max_new_tokens", 8,
            "--out", tmp_path / f"{name}.jsonl")
    of_adapter, of_base = (read_lines(tmp_path / f"{name}.jsonl") for name in "ab")
    assert [line["reference"]["text"] for line in of_adapter] == [
        line["policy"]["text"] for line in of_base]
    assert "reference" not in of_base[0] and "reward" not in of_base[0]["policy"]


def test_the_folder_of_an_adapter_without_a_run_works_too(fit, prompts, tmp_path):
    out, _ = fit(lr=0.1, lora_rank=2)
    (out / "run.json").unlink()
    ask("--model", out, "--prompts", prompts, "--max_new_tokens", 4, "--out", tmp_path / "a.jsonl")
    assert all("reference" in line for line in read_lines(tmp_path / "a.jsonl"))


def test_the_reference_of_a_second_adapter_is_the_first_one(fit, prompts, tmp_path):
    first, _ = fit(lr=0.1, lora_rank=2, loss="sft", out="first")
    second, _ = fit(lr=0.1, adapter=first, out="second")
    for name, model in (("a", first), ("b", second)):
        ask("--model", model, "--prompts", prompts, "--max_new_tokens", 8,
            "--out", tmp_path / f"{name}.jsonl")
    of_first, of_second = (read_lines(tmp_path / f"{name}.jsonl") for name in "ab")
    assert [line["reference"]["text"] for line in of_second] == [
        line["policy"]["text"] for line in of_first]


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 2}])
def test_of_a_run_that_has_not_ended_the_newest_checkpoint_answers(flags, fit, capsys):
    out, _ = fit(save_every=1, **flags)
    unfinished(out)
    capsys.readouterr()
    ask("--model", out, "--prompt", "the cat", "--max_new_tokens", 4)
    captured = capsys.readouterr()
    assert "the run has not ended; the policy is that of checkpoint-" in captured.err
    assert "-- reference" in captured.out
    newest = sorted(out.glob("checkpoint-*"))[-1]
    ask("--model", newest, "--prompt", "the cat", "--max_new_tokens", 4)
    assert capsys.readouterr().out == captured.out


def test_another_reference_may_be_named_and_none_loaded(fit, folder, capsys):
    out, _ = fit()
    ask("--model", folder, "--ref_model", out, "--prompt", "the cat", "--max_new_tokens", 4)
    assert "-- reference" in capsys.readouterr().out
    ask("--model", out, "--no_reference", "--prompt", "the cat", "--max_new_tokens", 4)
    printed = capsys.readouterr().out
    assert "-- reference" not in printed and "reward" not in printed and "malformed" not in printed


def test_a_prompt_is_a_message_where_there_is_a_chat_template_and_a_text_with_plain(
        chat_folder, capsys):
    ask("--model", chat_folder, "--prompt", "hi", "--max_new_tokens", 4)
    assert "<|user|>hi<eos><|assistant|>" in capsys.readouterr().out
    ask("--model", chat_folder, "--prompt", "hi", "--plain", "--max_new_tokens", 4)
    assert "[--prompt] hi\n" in capsys.readouterr().out


def test_prompts_may_be_json_lines_of_texts_and_messages(chat_folder, tmp_path):
    messages = [{"role": "system", "content": "be brief"},
                {"role": "user", "content": "naïve 你好"}]
    rows = [{"prompt": "one\ntwo"}, {"prompt": messages}, "three"]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    ask("--model", chat_folder, "--prompts", path, "--max_new_tokens", 4,
        "--out", tmp_path / "a.jsonl")
    assert [line["prompt"] for line in read_lines(tmp_path / "a.jsonl")] == [
        "<|user|>one\ntwo<eos><|assistant|>",
        "<|system|>be brief<eos><|user|>naïve 你好<eos><|assistant|>",
        "<|user|>three<eos><|assistant|>"]


def test_the_answers_of_a_dataset_are_scored_beside_those_that_are_generated(
        fit, pairs, tmp_path):
    out, _ = fit(lr=0.1)
    ask("--model", out, "--dataset", pairs, "--count", 3, "--max_new_tokens", 4,
        "--out", tmp_path / "a.jsonl")
    lines, rows = read_lines(tmp_path / "a.jsonl"), make_rows(22)
    assert len(lines) == 3
    for line, row in zip(lines, rows):
        assert [line["prompt"], line["chosen"]["text"]] == [row["prompt"], row["chosen"]]
        assert "reward" in line["rejected"]


def test_sampled_answers_are_repeatable_and_do_not_depend_on_the_size_of_a_batch(
        fit, prompts, tmp_path):
    out, _ = fit()
    texts = []
    for i, flags in enumerate((["--seed", 1], ["--seed", 1, "--batch_size", 2], ["--seed", 2])):
        ask("--model", out, "--prompts", prompts, "--max_new_tokens", 8, "--temperature", 1.2,
            "--top_p", 0.9, *flags, "--out", tmp_path / f"{i}.jsonl")
        texts.append([line["policy"]["text"] for line in read_lines(tmp_path / f"{i}.jsonl")])
    assert texts[0] == texts[1] != texts[2]


# --- Scores ---------------------------------------------------------------------------------------

SCORED = [
    {}, {"attention": "packed"}, {"lora_rank": 2}, {"loss": "ipo"}, {"loss": "simpo"},
    {"loss": "sigmoid_norm"}, {"reference_free": True}, {"f_divergence": "js"}, {"ld_alpha": 0.5},
    {"ref": "cache"}, {"dtype": "bfloat16"}, {"dtype": "float64", "attention": "packed"},
    {"loss": "kto", "unpair": True}, {"loss": "sigmoid:1,sft:0.5"}, {"max_length": 16},
]


@pytest.mark.parametrize("flags", SCORED, ids=lambda flags: " ".join(map(str, flags.items())))
def test_the_mean_margin_of_the_held_out_rows_is_that_of_the_evaluation_of_the_run(
        flags, fit, tmp_path):
    held_out = write_jsonl(tmp_path / "held_out.jsonl", make_rows(17, seed=5))
    out, rows = fit(eval_dataset=held_out, eval_share=None, lr=0.05, **flags)
    ask("--model", out, "--score", held_out, "--out", tmp_path / "s.jsonl")
    evaluation = [row for row in rows if row["split"] == "eval"][-1]
    lines = read_lines(tmp_path / "s.jsonl")
    assert len(lines) == 17
    margins = np.array([line["margin"] for line in lines])
    assert margins.mean() == pytest.approx(evaluation["rewards/margins"], rel=1e-6, abs=1e-9)
    if flags.get("loss") != "kto":  # its metrics have no accuracy
        assert (margins > 0).mean() == pytest.approx(evaluation["rewards/accuracies"])
    for k, side in enumerate(("chosen", "rejected")):
        for key, name in (("rewards", "rewards"), ("policy_logps", "logps")):
            if name == "logps" and "f_divergence" in flags:
                continue
            mean = np.mean([line[key][k] for line in lines])
            assert mean == pytest.approx(evaluation[f"{name}/{side}"], rel=1e-6, abs=1e-9)


def test_the_scores_of_a_list_are_those_of_its_answers_and_of_labels_have_no_margin(
        fit, tmp_path, capsys):
    lists = [{"prompt": "the cat", "responses": [" sat", " ran far", " saw one"],
              "scores": [3.0, 2.0, 1.0]}] * 9
    path = write_jsonl(tmp_path / "lists.jsonl", lists)
    out, rows = fit(loss="plackett_luce", dataset=path, eval_dataset=path, eval_share=None,
                    out="lists")
    ask("--model", out, "--score", path, "--out", tmp_path / "s.jsonl")
    line = read_lines(tmp_path / "s.jsonl")[0]
    assert len(line["rewards"]) == len(line["lengths"]) == 3
    assert line["margin"] == pytest.approx(rows[-1]["rewards/margins"], rel=1e-6)
    labels = [{"prompt": "the cat", "completion": " sat on a mat", "label": True},
              {"prompt": "the dog", "completion": " ran", "label": False}] * 9
    path = write_jsonl(tmp_path / "labels.jsonl", labels)
    out, rows = fit(loss="kto", dataset=path, eval_dataset=path, eval_share=None, out="labels")
    capsys.readouterr()
    ask("--model", out, "--score", path, "--out", tmp_path / "s.jsonl")
    lines = read_lines(tmp_path / "s.jsonl")
    assert [line["desirable"] for line in lines[:2]] == [True, False] and "margin" not in lines[0]
    assert lines[0]["rewards"] == [pytest.approx(rows[-1]["rewards/chosen"], rel=1e-6)]
    assert "9 desirable answers: mean reward" in capsys.readouterr().out


def make_scores(margins, lengths):
    """Scores of pairs with these margins and lengths."""
    margins, lengths = np.array(margins, dtype=float), np.array(lengths, dtype=float)
    table = np.stack([margins, np.zeros(len(margins))], axis=1)
    return audit.Scores(np.ones(table.shape, bool), lengths, table, table * 0, table, margins)


def test_accuracy_is_printed_by_length_and_by_decile_and_a_tie_is_not_accurate():
    lengths = [(2, 1)] * 10 + [(1, 2)] * 5 + [(2, 2)] * 5
    margins = [1.0] * 10 + [-1.0] * 4 + [0.5] + [0.0] * 5
    lines = "\n".join(audit.accuracy_lines(make_scores(margins, lengths)))
    assert "20 pairs: accuracy 0.5500, mean margin +0.3250" in lines
    assert re.search(r"longer +10 pairs, accuracy 1.0000", lines)
    assert re.search(r"shorter +5 pairs, accuracy 0.2000", lines)
    assert re.search(r"as long +5 pairs, accuracy 0.0000", lines)
    assert len(re.findall(r"\d to +[\d.]+ +2 pairs", lines)) == 10
    assert re.search(r"1.0000 to +1.0000 .*, expected 0.7311", lines)


# --- The world ------------------------------------------------------------------------------------

def test_the_true_reward_is_that_of_the_world_and_a_malformed_answer_has_none():
    thing, number = 3, 77
    expected = world.true_reward()[thing, number].item()
    assert world.true_reward_of(world.prompts()[thing], world.answers()[number]) == expected
    assert world.true_reward_of(world.prompts()[thing], " cold dark") is None
    assert world.true_reward_of("a cat is", world.answers()[number]) is None


# --- Errors ---------------------------------------------------------------------------------------

def error_of(*arguments):
    with pytest.raises(UserError) as error:
        ask(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


FLAGS = [
    (["--prompt", "a", "--score", "b"], "--prompt and --score: give one"),
    (["--prompt", "a", "--top_p", "0.5"], "--top_p: is not read with --temperature 0"),
    (["--prompt", "a", "--seed", "1"], "--seed: is not read with --temperature 0"),
    (["--prompt", "a", "--count", "1"], "--count: is not read with a prompt"),
    (["--prompt", "a", "--max_length", "9"], "--max_length: is read with --dataset or --score"),
    (["--score", "a", "--max_new_tokens", "9"], "--max_new_tokens: is not read with a score"),
    (["--dataset", "a", "--plain"], "--plain: is not read with a dataset"),
    (["--prompt", "a", "--ref_model", "b", "--no_reference"], "--ref_model b and --no_reference"),
    (["--prompt", "a", "--temperature", "-1"], "--temperature: must be a number >= 0"),
    (["--prompt", "a", "--top_p", "0", "--temperature", "1"], "--top_p: must be"),
    (["--prompt", ""], "its value is empty"),
    ([], "there is no prompt, and no terminal to chat in"),
]


@pytest.mark.parametrize("arguments, expected", FLAGS, ids=lambda value: str(value)[:30])
def test_flags_that_contradict_each_other_or_are_not_read_are_refused(
        arguments, expected, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", open(os.devnull))
    assert expected in error_of("--model", folder, *arguments)


def test_a_run_or_a_file_that_is_not_there_is_named(folder, tmp_path):
    assert "/nowhere/run: no such model folder" in error_of(
        "--model", "/nowhere/run", "--prompt", "a")
    missing, empty = tmp_path / "missing.txt", tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert f"--prompts {missing}: cannot be read" in error_of(
        "--model", folder, "--prompts", missing)
    assert "there is no prompt in it" in error_of("--model", folder, "--prompts", empty)
    for line, expected in (('{"promt": "a"}', "has no prompt"), ("{", "is not JSON"),
                           ('{"prompt": [{"role": "user"}]}', "has no prompt"),
                           ('{"prompt": [{"role": "user", "content": "a"}]}', "no chat template")):
        path = tmp_path / "bad.jsonl"
        path.write_text(f'"good"\n{line}\n')
        error = error_of("--model", folder, "--prompts", path)
        assert expected in error and f"{path}:2" in error
    assert "is a folder; name a file" in error_of(
        "--model", folder, "--prompt", "a", "--out", tmp_path)


def test_a_prompt_without_room_for_an_answer_is_refused_and_a_short_rest_is_used(
        folder, tmp_path, capsys):
    error = error_of("--model", folder, "--prompt", "cat " * 10_000)
    assert re.search(r"--prompt: has [\d,]+ tokens, and the model has 128 positions", error)
    ask("--model", folder, "--prompt", "cat" * 60 + " sat" * 40, "--max_new_tokens", 500)
    assert re.search(r"\d tokens", capsys.readouterr().out)


def test_a_base_or_a_starting_model_that_is_gone_is_named_with_the_flag_that_helps(
        fit, folder, tmp_path, capsys):
    moved = tmp_path / "base"
    shutil.copytree(folder, moved)
    adapted, _ = fit(model=moved, lora_rank=2, out="adapted")
    full, _ = fit(model=moved, out="full")
    moved.rename(tmp_path / "moved")
    error = error_of("--model", adapted, "--prompt", "a")
    assert str(moved) in error and "--base" in error
    error = error_of("--model", full, "--prompt", "a")
    assert str(moved) in error and "--ref_model" in error and "--no_reference" in error
    ask("--model", adapted, "--base", tmp_path / "moved", "--prompt", "a", "--max_new_tokens", 2)
    ask("--model", full, "--ref_model", tmp_path / "moved", "--prompt", "a", "--max_new_tokens", 2)
    assert capsys.readouterr().out.count("-- reference") == 2
    assert "is not an adapter" in error_of("--model", full, "--base", folder, "--prompt", "a")


def test_a_model_without_a_tokenizer_and_a_run_without_a_model_are_refused(
        fit, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "bare")
    for path in (tmp_path / "bare").glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer.json" in error_of("--model", tmp_path / "bare", "--prompt", "a")
    out, _ = fit()
    unfinished(out)
    for path in out.glob("checkpoint-*"):
        shutil.rmtree(path)
    assert "has not saved a model yet" in error_of("--model", out, "--prompt", "a")


def test_the_answers_are_written_whole_or_not_at_all(folder, prompts, tmp_path, monkeypatch):
    out = tmp_path / "a.jsonl"
    out.write_text("before")

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audit, "json", types.SimpleNamespace(dumps=fail))
    with pytest.raises(OSError):
        ask("--model", folder, "--prompts", prompts, "--max_new_tokens", 2, "--out", out)
    assert out.read_text() == "before" and not list(tmp_path.glob("*partial*"))


def test_an_answer_cannot_control_the_terminal_and_may_have_emoji(chat_folder, capsys):
    ask("--model", chat_folder, "--prompt", "a\x1b[2Jb 👩‍🚀 你好", "--max_new_tokens", 2)
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\\x1b[2Jb 👩‍🚀 你好" in printed


# --- Chat -----------------------------------------------------------------------------------------

class Terminal:
    """sample.py on a terminal of its own."""

    def __init__(self, *arguments, cwd=None):
        master, terminal = os.openpty()
        command = [sys.executable, str(ROOT / "sample.py"), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal,
                                        start_new_session=True, cwd=cwd,
                                        env=os.environ | {"TERM": "dumb"})
        os.close(terminal)
        self.master, self.text = master, ""

    def wait_for(self, end, seconds=60):
        """Read until the output since the last call ends like this -> this output."""
        output, limit = "", time.monotonic() + seconds
        while not output.endswith(end):
            assert time.monotonic() < limit, f"no {end!r} in {self.text + output[-2000:]!r}"
            if select.select([self.master], [], [], 0.2)[0]:
                output += os.read(self.master, 65536).decode(errors="replace").replace("\r\n", "\n")
        self.text += output
        return output

    def send(self, text):
        os.write(self.master, text.encode())

    def interrupt_until(self, shown, times=20):
        """Press Ctrl-C until this is shown. Python does not notice one that comes after it wrote
        the prompt of input() and before it waits for a key, so one may not be enough."""
        for _ in range(times):
            os.killpg(self.process.pid, signal.SIGINT)
            if select.select([self.master], [], [], 3)[0]:
                assert shown in self.wait_for("\npolicy> ")
                return
        raise AssertionError(f"no {shown!r} after {times} times Ctrl-C")

    def finish(self):
        code = self.process.wait(30)
        os.close(self.master)
        return code


def test_a_chat_answers_switches_to_the_reference_begins_anew_and_ends(fit, chat_folder):
    out, _ = fit(model=chat_folder, lr=0.1, lora_rank=2)
    terminal = Terminal("--model", out, "--max_new_tokens", 6)
    assert "/reset begins a new conversation" in terminal.wait_for("\npolicy> ")
    terminal.send("the cat\n")
    first = terminal.wait_for("\npolicy> ")
    assert re.search(r"tokens, log-prob per token -\d.*reward [+-]\d", first)
    terminal.send("the cat\n")
    second = terminal.wait_for("\npolicy> ")
    assert second != first  # the conversation is longer
    terminal.send("/reset\n")
    terminal.wait_for("\npolicy> ")
    terminal.send("the cat\n")
    again = terminal.wait_for("\npolicy> ")
    assert again.splitlines()[-3:] == first.splitlines()[-3:]
    terminal.send("/reset\n")
    terminal.wait_for("\npolicy> ")
    terminal.send("/reference\n")
    assert "(the reference answers)" in terminal.wait_for("\nreference> ")
    terminal.send("the cat\n")
    assert terminal.wait_for("\nreference> ").splitlines()[-3] != first.splitlines()[-3]
    terminal.send("/reference\n")
    terminal.wait_for("\npolicy> ")
    terminal.send("/what\n")
    assert "/quit or Ctrl-D leaves" in terminal.wait_for("\npolicy> ")
    terminal.send("/quit\n")
    assert terminal.finish() == 0


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(chat_folder):
    (chat_folder / "generation_config.json").unlink()
    config = json.loads((chat_folder / "config.json").read_text())
    config |= {"max_position_embeddings": 100_000, "eos_token_id": None}
    (chat_folder / "config.json").write_text(json.dumps(config))
    terminal = Terminal("--model", chat_folder, "--max_new_tokens", 50_000)
    terminal.wait_for("\npolicy> ")
    terminal.send("the cat 你好\n")
    time.sleep(2)
    os.killpg(terminal.process.pid, signal.SIGINT)
    stopped = terminal.wait_for("\npolicy> ")
    count = int(re.search(r"\((\d+) tokens", stopped)[1])
    assert 0 < count < 50_000
    terminal.interrupt_until("(/quit or Ctrl-D leaves)")
    terminal.send("\x04")
    assert terminal.finish() == 0
    assert "Traceback" not in terminal.text


def test_without_a_chat_template_each_line_is_continued_and_a_long_one_is_refused(folder):
    terminal = Terminal("--model", folder, "--max_new_tokens", 4)
    assert "each line is continued as text" in terminal.wait_for("\npolicy> ")
    terminal.send("cat " * 200 + "\n")
    assert "positions for prompt and answer" in terminal.wait_for("\npolicy> ")
    terminal.send("/reference\n")
    assert "there is no reference" in terminal.wait_for("\npolicy> ")
    terminal.send("the cat\n")
    assert "4 tokens" in terminal.wait_for("\npolicy> ")
    terminal.send("\x04")
    assert terminal.finish() == 0
