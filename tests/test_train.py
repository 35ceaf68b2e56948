"""A run computes the same numbers however its batches are split; a stopped run loses nothing."""
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time

import forked
import pytest
import torch
from conftest import (
    ALONE,
    ROOT,
    SHARED,
    TINY_RUN,
    differences,
    make_rows,
    read_metrics,
    resume,
    run_by_torchrun,
    run_training,
    start_training,
    tiny_model,
    to_arguments,
    unfinished,
    wait_for_checkpoint,
    weights,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from steps import preference_step
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import batches
import checkpoint
import data
import files
import model as models
import reference as references
import train
from batches import RowFormat, autocast_options, make_task
from dpo import concatenated_forward
from logps import FastLogps
from losses import find, hyperparameters
from variants import Variants


def test_two_runs_are_equal_only_if_every_bit_of_weights_and_metrics_is(fit, tmp_path):
    """The comparison that the tests below rely on."""
    one, metrics = fit(max_steps=2, out="one")
    two, other_metrics = fit(max_steps=2, out="two")
    assert not differences(one, two) and not differences(metrics, other_metrics)
    loss = other_metrics[0]["loss"]
    other_metrics[0]["loss"] = math.nextafter(loss, 1.0)
    assert differences(metrics, other_metrics) and not differences(metrics, other_metrics, 1e-9)
    assert differences(metrics, metrics[1:])
    tensors = load_file(two / "model.safetensors")
    weight = tensors["lm_head.weight"]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(1.0))
    save_file(tensors, two / "model.safetensors", {"format": "pt"})
    assert differences(one, two) and not differences(one, two, 1e-6)


# --- one optimizer step depends on nothing but its pairs

@pytest.fixture
def gradient_descent(monkeypatch):
    """Replace AdamW by plain gradient descent: the change of a weight is -lr times its gradient."""
    def make_optimizer(model, args, device):
        return torch.optim.SGD(model.parameters(), lr=args.lr)

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    return {"dtype": "float64", "eval_share": 0, "max_grad_norm": 1e9, "lr_schedule": "constant",
            "warmup_steps": 0}


@pytest.mark.parametrize("loss", [
    "sigmoid", "ipo", "hinge", "sft", "orpo", "sigmoid:0.8,bco_pair:0.2,sft:1",
])
def test_accumulation_gives_the_gradient_of_the_whole_batch_also_in_a_short_last_window(
        fit, gradient_descent, loss):
    """22 rows are windows of 8, 8 and 6 pairs."""
    beta = 0.1 if "beta" in hyperparameters(find(loss)) else None
    runs = {}
    for size in (8, 4, 2, 3):
        runs[size], metrics = fit(**gradient_descent, loss=loss, beta=beta, micro_batch_size=size,
                                  lr=1e-3, out=f"micro{size}")
        assert len(metrics) == 3
    whole, whole_metrics = weights(runs[8]), read_metrics(runs[8])
    for size in (4, 2, 3):
        for name, value in weights(runs[size]).items():
            assert torch.allclose(value, whole[name], rtol=1e-12, atol=1e-12), name
        assert not differences(whole_metrics, read_metrics(runs[size]), 1e-9)


def test_the_gradient_is_that_of_the_mean_loss_over_the_pairs(fit, gradient_descent, folder, pairs):
    """Compare one step with autograd on full logits, computed without the trainer's code."""
    out, metrics = fit(**gradient_descent, max_steps=1, batch_size=22, shuffle="false", lr=0.1,
                       beta=0.5)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def logp(prompt, answer):
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        table = model(torch.tensor([prompt_ids + answer_ids])).logits[0].log_softmax(-1)
        first = len(prompt_ids) - 1  # the position that predicts the answer's first token
        return sum(table[first + i, token] for i, token in enumerate(answer_ids))

    loss = 0
    for row in map(json.loads, open(pairs)):
        h = logp(row["prompt"], row["chosen"]) - logp(row["prompt"], row["rejected"])
        # At the start the reference is the policy.
        loss = loss - torch.nn.functional.logsigmoid(0.5 * (h - h.detach())) / 22
    loss.backward()
    assert metrics[0]["loss"] == pytest.approx(loss.item(), abs=1e-9)
    saved = weights(out)
    for name, parameter in model.named_parameters():
        expected = start[name] - 0.1 * parameter.grad
        assert torch.allclose(saved[name], expected, atol=1e-7), name


@pytest.mark.slow
def test_two_processes_end_like_one_at_the_same_global_batch(fit, folder, pairs, tmp_path):
    """Nothing divides evenly: the last window is short, and micro-batches have 2 of 7 pairs."""
    flags = {"batch_size": 7, "micro_batch_size": 2, "dtype": "float64", "epochs": 3}
    one, _ = fit(**flags, out="one")
    given = {"model": folder, "dataset": pairs, "output_dir": tmp_path / "two"}
    result = run_by_torchrun(TINY_RUN | flags | given, ranks=2)
    assert result.returncode == 0, result.stderr
    assert not differences(one, tmp_path / "two", 1e-6)


def test_a_process_without_a_pair_in_the_last_window_or_among_the_held_out_adds_nothing(
        fit, folder, tmp_path):
    """5 rows are windows of 4 and 1, and 1 row is held out, for 2 processes."""
    rows = write_jsonl(tmp_path / "5.jsonl", make_rows(5))
    held_out = write_jsonl(tmp_path / "1.jsonl", make_rows(1))
    flags = {"dataset": rows, "eval_dataset": held_out, "eval_share": None, "batch_size": 4,
             "micro_batch_size": 2, "dtype": "float64"}
    _, metrics = fit(**flags, out="one")
    given = {"model": folder, "output_dir": tmp_path / "two"}
    result = run_training(TINY_RUN | flags | given, ranks=2)
    assert (tmp_path / "two" / "metrics.jsonl").exists(), result.stderr
    assert not differences(metrics, read_metrics(tmp_path / "two"), 1e-6)


def test_odpo_reads_the_scores_of_the_file(fit, tmp_path):
    rows = []
    for i, row in enumerate(make_rows(8)):
        rows.append(row | {"chosen_score": i + 2.0, "rejected_score": 1.0})
    dataset = write_jsonl(tmp_path / "scored.jsonl", rows)
    _, metrics = fit(loss="odpo", dataset=dataset, max_steps=1, eval_share=0, odpo_alpha=0.5)
    offsets = [0.5 * math.log(i + 1) for i in range(8)]  # alpha times the log of the score gap
    expected = sum(math.log1p(math.exp(offset)) for offset in offsets) / 8
    assert metrics[0]["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.fixture
def unordered(tmp_path):
    """A file of 8 pairs, in half of which the rejected answer has the higher score."""
    rows = []
    for i, row in enumerate(make_rows(8)):
        rows.append(row | {"chosen_score": float(i), "rejected_score": 3.5})
    return write_jsonl(tmp_path / "unordered.jsonl", rows)


def test_a_loss_of_scores_of_any_order_trains_on_every_row_and_odpo_on_the_ordered_ones(
        fit, unordered, capsys):
    flags = {"dataset": unordered, "max_steps": 1, "eval_share": 0}
    _, metrics = fit(**flags, loss="rpo_sq", rpo_eta=0.5)
    expected = sum((0.5 * (i - 3.5)) ** 2 for i in range(8)) / 8
    assert metrics[0]["loss"] == pytest.approx(expected, abs=1e-4)
    fit(**flags, loss="odpo", out="ordered")
    assert "4 dropped (chosen_score not above rejected_score" in capsys.readouterr().out


def test_hypo_passes_the_step_0_check_although_it_does_not_begin_at_log_2(fit, capsys):
    fit(loss="hypo", beta=1.0, max_steps=1)
    value = float(re.search(r"the loss is ([0-9.]+), as", capsys.readouterr().out).group(1))
    assert value > 0.7


@pytest.fixture
def forgotten(tmp_path):
    """A file of prompts with an answer to forget, and no other answer."""
    rows = [{"prompt": row["prompt"], "rejected": row["rejected"]} for row in make_rows(24)]
    return write_jsonl(tmp_path / "forgotten.jsonl", rows)


@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_npo_forgets_rejected_answers_in_rows_without_chosen_ones(fit, forgotten, attention):
    out, metrics = fit(loss="npo", dataset=forgotten, attention=attention, max_steps=6)
    train_rows = [row for row in metrics if row["split"] == "train"]
    assert train_rows[0]["loss"] == pytest.approx(20 * math.log(2), abs=1e-4)
    assert train_rows[-1]["logps/rejected"] < train_rows[0]["logps/rejected"] - 1
    assert not any("chosen" in name or "margins" in name for name in train_rows[0])
    assert (out / "model.safetensors").exists()


def test_npo_reads_the_rejected_answers_of_pairs_and_of_dialogues_with_the_prompt_inside(
        fit, tmp_path):
    """Each row is the same pair in another shape, so the runs are the same."""
    pairs, dialogues = [], []
    for row in make_rows(12):
        prompt = f"\n\nHuman: {row['prompt']}\n\nAssistant:"
        pairs.append(row | {"prompt": prompt})
        dialogues.append({side: prompt + row[side] for side in ("chosen", "rejected")})
    alone = [{"prompt": row["prompt"], "rejected": row["rejected"]} for row in pairs]
    runs = []
    for name, rows in (("pairs", pairs), ("dialogues", dialogues), ("alone", alone)):
        dataset = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        runs.append(fit(loss="npo", dataset=dataset, max_steps=2, eval_share=0, out=name)[1])
    for row in runs[0]:
        del row["tokens_per_second"]
    for other in runs[1:]:
        for row in other:
            del row["tokens_per_second"]
        assert other == runs[0]


def test_npo_with_a_cached_reference_or_an_adapter_begins_at_the_same_loss(fit, forgotten):
    flags = {"loss": "npo", "dataset": forgotten, "max_steps": 2}
    _, second_model = fit(**flags, out="second")
    _, cached = fit(**flags, ref="cache", out="cached")
    assert cached[0]["loss"] == pytest.approx(second_model[0]["loss"], abs=1e-4)
    assert cached[1]["loss"] == pytest.approx(second_model[1]["loss"], abs=1e-3)
    _, adapted = fit(**flags, lora_rank=2, out="adapted")
    assert adapted[0]["loss"] == pytest.approx(20 * math.log(2), abs=1e-4)


def test_npo_and_sft_forget_rejected_answers_and_learn_chosen_ones(fit):
    _, metrics = fit(loss="npo,sft:3", max_steps=12)
    first, *_, last = (row for row in metrics if row["split"] == "train")
    assert last["logps/chosen"] > first["logps/chosen"]
    assert last["logps/rejected"] < first["logps/rejected"]


@pytest.fixture
def loaded_models(monkeypatch):
    """A list to which each model that transformers reads from a folder is added."""
    loaded = []
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*arguments, **options):
        model = load(*arguments, **options)
        loaded.append(model)
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return loaded


def test_a_reference_free_run_loads_no_reference(fit, loaded_models):
    fit("--reference_free", loss="sigmoid:0.5,sft", max_steps=1, out="free")
    assert len(loaded_models) == 1
    fit(loss="sigmoid:0.5,sft", max_steps=1, out="with a reference")
    assert len(loaded_models) == 3


def test_a_run_of_a_sum_of_losses_names_its_folder_after_the_sum(
        monkeypatch, tmp_path, folder, pairs):
    monkeypatch.chdir(tmp_path)
    flags = {"model": folder, "dataset": pairs, "loss": "sigmoid:0.5,sft", "reference_free": True,
             "max_length": 64, "max_steps": 1}
    train.main(to_arguments(flags), ALONE)
    assert (tmp_path / "runs" / "sigmoid+0.5+sft" / "model.safetensors").exists()


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_run_on_messages_in_renamed_columns_reports_them_first_and_keeps_the_template(
        fit, tmp_path, capsys):
    def message(role, content):
        return [{"role": role, "content": content}]

    rows = []
    for row in make_rows(12):
        prompt, chosen = message("user", row["prompt"]), message("assistant", row["chosen"])
        rows.append({"q": prompt, "a": chosen, "b": row["rejected"]})
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    out, _ = fit(dataset=path, eval_dataset=path, eval_share=None, max_steps=1,
                 columns="prompt=q,chosen=a,rejected=b", chat_template=template)
    stdout = capsys.readouterr().out
    for text in (
        "12 of 12 rows kept", "12 prompts are both trained and held out",
        "tokens an epoch, each prompt once", "\\nassistant:'", "chosen   [",
    ):
        assert text in stdout
    assert AutoTokenizer.from_pretrained(out).chat_template == template.read_text()


def test_training_raises_the_margin_and_its_output_folder_can_generate(fit):
    out, metrics = fit(epochs=8)
    trained = [row for row in metrics if row["split"] == "train"]
    assert trained[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert trained[-1]["rewards/margins"] > 1
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("the cat", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5).shape[1] > prompt["input_ids"].shape[1]


def test_config_json_holds_every_resolved_flag_and_every_logged_step_its_metrics(fit):
    out, metrics = fit(max_steps=4)
    flags = json.loads((out / "config.json").read_text())["flags"]
    assert flags["beta"] == 0.1 and flags["warmup_steps"] == 0
    assert flags["loss"] == "sigmoid" and flags["epochs"] is None
    assert set(vars(train.parse_args([])[0])) == set(flags)
    assert flags["attention"] in ("packed", "padded") and flags["output_dir"] == str(out)
    names = {
        "step", "split", "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies",
        "rewards/margins", "logps/chosen", "logps/rejected", "grad_norm", "lr",
        "tokens_per_second",
    }
    assert all(names <= set(row) for row in metrics if row["split"] == "train")
    assert metrics[-1]["split"] == "eval"


def test_bfloat16_trains_and_leaves_float32_weights(fit):
    out, metrics = fit(epochs=8, dtype="bfloat16")
    assert metrics[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert metrics[-2]["rewards/margins"] > 1
    assert {value.dtype for value in weights(out).values()} == {torch.float32}


class CountSynchronizations(TorchDispatchMode):
    """Count the operations for which a CPU would wait for a GPU: .item(), bool(tensor)."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += function in (
            torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default,
        )
        return function(*arguments, **options or {})


@pytest.mark.parametrize("loss", ["sigmoid", "aot", "kto_pair"])
def test_train_step_is_an_update_by_the_mean_loss_and_reads_no_number_from_the_device(
        loss, folder, tokenizer):
    """Compare 7 pairs in micro-batches of 3, 3 and 1, by gradient descent in float64, with
    autograd on all pairs at once."""
    # The policy differs from the reference, so that the log-ratios are not 0.
    policy = FastLogps(models.load_model(folder, torch.float64))
    reference = FastLogps(models.load_model(folder, torch.float64))
    policy.model.lm_head.weight.data.mul_(1.1)
    task = make_task(find(loss), {}, Variants(), "float64", ALONE.device, packed=True)

    # Rows as columns of token ids, and the micro-batches.
    columns = {"id": list("abcdefg")}
    columns |= {"prompt_ids": [], "answer_ids": []}
    for row in make_rows(7):
        columns["prompt_ids"].append(tokenizer(row["prompt"])["input_ids"])
        columns["answer_ids"].append(tokenizer([row["chosen"], row["rejected"]])["input_ids"])
    pieces, micro_batches = [], []
    for first in (0, 3, 6):
        pieces.append(train.Piece(slice(first, min(first + 3, 7)), 1.0))
        rows = {name: values[first:first + 3] for name, values in columns.items()}
        micro_batches.append(train.collate(rows, tokenizer, ALONE.device, task.row_format))

    # The expected gradient.
    batch = train.collate(columns, tokenizer, ALONE.device)
    losses, metrics = preference_step(policy, reference, batch, find(loss))
    parameters = dict(policy.named_parameters())
    gradients = dict(zip(
        parameters, torch.autograd.grad(losses.mean(), list(parameters.values()))))
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    # One step. A loss that compares pairs reads the micro-batches twice, the others once.
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    stream, step = iter(micro_batches * 2), train.Step(1, 7, pieces, {})
    with CountSynchronizations() as synchronizations:
        values = train.train_step(
            task, policy, reference, optimizer, stream, step, 1e9, False, ALONE)
    assert synchronizations.count == 0
    assert len(list(stream)) == (3 if loss == "sigmoid" else 0)
    for name, parameter in parameters.items():
        expected = start[name] - 0.1 * gradients[name]
        # The tolerance is that of float32, the dtype in which a Llama computes its norms.
        assert torch.allclose(parameter, expected, rtol=0, atol=1e-7), name
    norm = sum(gradient.square().sum() for gradient in gradients.values()).sqrt().item()
    assert values["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert values["stop"] == 0
    for name, value in metrics.items():
        assert values[name] == pytest.approx(value.mean().item(), rel=1e-5, abs=1e-5)


# --- a thread makes the next micro-batch while this one is computed

def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("rows")]


def test_one_ahead_keeps_the_order_and_works_only_on_the_next_job():
    started, values = [], []

    def times_ten(job):
        started.append(job)
        return 10 * job

    for value in batches.one_ahead(iter(range(6)), times_ten, threaded=True):
        values.append(value)
        time.sleep(0.01)
        assert len(started) == min(6, len(values) + 1)
    assert values == [0, 10, 20, 30, 40, 50]
    assert values == list(batches.one_ahead(range(6), times_ten, threaded=False))
    assert list(batches.one_ahead([], str, threaded=True)) == [] and not threads()


def test_an_error_in_the_thread_is_raised_with_its_traceback_and_the_thread_ends():
    def fails_at_two(job):
        return 1 / (2 - job)

    values = []
    with pytest.raises(ZeroDivisionError) as error:
        for value in batches.one_ahead(range(5), fails_at_two, threaded=True):
            values.append(value)
    assert values == [0.5, 1.0]
    assert error.traceback[-1].name == "fails_at_two" and not threads()


@pytest.fixture
def always_threaded(monkeypatch):
    """Make the next micro-batch in a thread, as on a GPU. Returns a list of calls."""
    calls, one_ahead = [], batches.one_ahead

    def threaded(jobs, make, threaded):
        calls.append(jobs)
        return one_ahead(jobs, make, threaded=True)

    monkeypatch.setattr(batches, "one_ahead", threaded)
    return calls


@pytest.mark.parametrize("loss", ["sigmoid", "aot"])
def test_a_run_with_the_thread_equals_one_without_it_bit_for_bit(fit, request, loss):
    flags = {"loss": loss, "sync_ref_every": 2, "save_every": 2}
    plain, _ = fit(**flags, out="plain")
    calls = request.getfixturevalue("always_threaded")
    threaded, _ = fit(**flags, out="threaded")
    assert calls and not threads()
    assert not differences(plain, threaded)


def test_a_run_that_a_signal_stops_saves_a_checkpoint_and_leaves_no_thread(
        fit, monkeypatch, always_threaded, tmp_path):
    train_step, thread_counts = train.train_step, []

    def interrupted_step(*arguments):
        thread_counts.append(len(threads()))
        if len(thread_counts) == 1:  # a second signal would end the process
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*arguments)

    monkeypatch.setattr(train, "train_step", interrupted_step)
    with pytest.raises(AssertionError, match="assert not True"):  # `fit` expects a run to end
        fit(out="signal")
    assert thread_counts == [0, 1] and not threads()
    assert (tmp_path / "signal" / "checkpoint-2").exists()


def test_a_run_that_an_error_ends_leaves_no_thread(fit, monkeypatch, always_threaded):
    step, calls = train.train_step, []

    def failing_step(*arguments):
        if threads():
            raise ZeroDivisionError
        calls.append(1)
        return step(*arguments)

    monkeypatch.setattr(train, "train_step", failing_step)
    with pytest.raises(ZeroDivisionError):
        fit()
    assert calls and not threads()


# --- deterministic kernels

@pytest.fixture
def kernel_settings():
    """Collect the settings of deterministic kernels at each forward of a module."""
    settings = set()

    def note(module, inputs, output):
        enabled = torch.are_deterministic_algorithms_enabled()
        settings.add((enabled, os.environ.get("CUBLAS_WORKSPACE_CONFIG")))

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    yield settings
    handle.remove()


def test_deterministic_sets_torch_and_cublas_and_changes_no_number_on_a_cpu(
        fit, monkeypatch, kernel_settings):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    _, plain = fit(max_steps=3, out="plain")
    assert kernel_settings == {(False, None)}
    kernel_settings.clear()
    _, metrics = fit("--deterministic", max_steps=3)
    assert kernel_settings == {(True, ":4096:8")}
    assert not differences(plain, metrics)
    fit(max_steps=1, out="off")
    assert not torch.are_deterministic_algorithms_enabled()


# --- the check before the first step

@pytest.mark.parametrize("loss, value", [("sigmoid", 0.6931), ("hinge", 1.0), ("ipo", 25.0)])
def test_the_loss_before_the_first_step_is_its_value_at_a_margin_of_zero(fit, capsys, loss, value):
    fit(loss=loss, max_steps=1)
    assert f"step-0 check: the loss is {value:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("cause", ["dropout", "dtype", "weights"])
def test_the_step_0_check_stops_a_run_whose_reference_is_not_the_policy(
        fit, monkeypatch, tokenizer, tmp_path, cause):
    models.save_model(tiny_model("gpt2", tokenizer), tokenizer, tmp_path / "gpt2")
    load_model, loaded = references.load_model, []

    def load_spoiled(*arguments):
        model = load_model(*arguments)
        loaded.append(model)
        is_reference = len(loaded) == 2
        if cause == "dropout":
            model.transformer.drop.train().p = 0.3
        elif cause == "dtype" and is_reference:
            model.to(torch.bfloat16)
        elif cause == "weights" and is_reference:
            model.transformer.wte.weight.data[5:].mul_(1.1)
        return model

    monkeypatch.setattr(references, "load_model", load_spoiled)
    message = "policy and reference are equal. So they are not: look for another dtype"
    if cause == "dropout":
        message = r"transformer.drop \(Dropout\) gives another output each time"
    with pytest.raises(ValueError, match=message):
        fit(model=tmp_path / "gpt2", max_steps=1)


def test_the_step_0_check_is_skipped_with_a_line_if_the_reference_differs_on_purpose(
        fit, tokenizer, tmp_path, capsys):
    other = tiny_model("llama", tokenizer)
    other.lm_head.weight.data.mul_(2)
    models.save_model(other, tokenizer, tmp_path / "other")
    _, metrics = fit(max_steps=1, ref_model=tmp_path / "other")
    assert "no step-0 check: --ref_model" in capsys.readouterr().out
    assert metrics[0]["rewards/margins"] != 0


@pytest.mark.parametrize("dtype, shift, stops", [
    ("bfloat16", 0.8, False), ("bfloat16", 4.0, True),
    ("float32", 4e-3, True), ("float32", 1e-4, False),
])
def test_a_cached_reference_may_differ_by_rounding_in_nats_per_root_of_tokens_and_by_no_more(
        fit, tmp_path, monkeypatch, dtype, shift, stops):
    """A bound that grows with the log-prob would let 0.004 of 60 nats pass in float32, and would
    stop 0.8 of 60 nats in bfloat16."""
    monkeypatch.chdir(tmp_path)
    answers = {"chosen": " cat sat on a mat and saw one dog",
               "rejected": " dog ran far from home in rain or sun"}
    rows = [row | answers for row in make_rows(12)]
    flags = {"dataset": write_jsonl(tmp_path / "long.jsonl", rows), "eval_share": 0,
             "ref": "cache", "max_steps": 1, "dtype": dtype, "lr": 1e-9}
    fit(**flags)
    path, = (tmp_path / "runs" / "references").iterdir()
    tables = load_file(path)
    assert 30 < tables["train"].abs().min() and tables["train"].abs().max() < 100
    tables["train"] += shift
    save_file(tables, path, {"digest": references.tables_digest(path.stem, tables)})
    if stops:
        message = "has other log-probs than the reference gives now for row"
        with pytest.raises(ValueError, match=message):
            fit(**flags, out="again")
    else:
        fit(**flags, out="again")


@pytest.mark.slow
@pytest.mark.skipif(
    "REAL_MODEL" not in os.environ or not SHARED.exists(), reason="REAL_MODEL names no folder")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_real_model_rounding_stays_below_half_of_its_bound(dtype):
    """Log-probs of 8 real pairs in batches of 1, 4 and 8, padded and packed."""
    folder = os.environ["REAL_MODEL"]
    tokenizer = models.load_tokenizer(folder)
    module = FastLogps(models.load_model(folder))
    path = str(SHARED / "data" / "hh_harmless_512.jsonl")
    rows, _ = data.load_tokens(path, tokenizer)
    short = [i for i, tokens in enumerate(data.column(rows, "tokens")) if tokens < 300]
    rows = rows.select(short[:8])

    def all_logps(size, packed):
        """(8, 2), in batches of `size` pairs."""
        parts = []
        for first in range(0, 8, size):
            some, row_format = rows[first:first + size], RowFormat(packed)
            batch = train.collate(some, tokenizer, ALONE.device, row_format)
            with torch.no_grad(), torch.autocast(**autocast_options(dtype, ALONE.device)):
                parts.append(concatenated_forward(module, batch)["logps"])
        return torch.cat(parts).double()

    variants = []
    for size in (1, 4, 8):
        variants += [all_logps(size, packed=False), all_logps(size, packed=True)]
    stacked = torch.stack(variants)
    spread = stacked.amax(0) - stacked.amin(0)
    lengths = torch.tensor([list(map(len, answers)) for answers in rows["answer_ids"]])
    bound = references.rounding(dtype, lengths, ALONE.device)
    assert 0 < (spread / bound).max() < 0.5


def test_a_policy_without_a_trainable_parameter_is_refused(fit, monkeypatch):
    load_model = references.load_model
    monkeypatch.setattr(
        references, "load_model", lambda *arguments: load_model(*arguments).requires_grad_(False))
    with pytest.raises(ValueError, match="no trainable parameter"):
        fit(max_steps=1)


# --- stop and resume

LONG = {"epochs": 40, "save_every": 5, "eval_every": 30}  # 120 steps


@pytest.fixture
def uninterrupted(fit):
    out, _ = fit(**LONG, out="whole")
    return out


@pytest.fixture
def long_run(folder, pairs):
    """The flags of the same run, in another process."""
    return TINY_RUN | LONG | {"model": folder, "dataset": pairs}


def check_resumed(out, uninterrupted):
    """Resume a run that was stopped before its end, and compare it with the uninterrupted one."""
    assert not (out / "model.safetensors").exists()
    # Add a step after the checkpoint, and a row that the kill has cut in half.
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 119, "split": "train", "loss": 0}\n{"step": 12')
    assert resume(out) is False
    assert not differences(uninterrupted, out)


def test_bco_resumes_its_running_reward_shift(fit):
    """δ is eq. 7's moving average of ½ (mean r_w + mean r_l) of the steps before; a checkpoint
    holds δ."""
    _, whole = fit(loss="bco_pair", max_steps=6, out="whole")
    delta = 0.0
    for row in whole:
        if row["split"] == "train":
            assert row["delta"] == pytest.approx(delta, abs=1e-12)
            delta = 0.9 * delta + 0.05 * (row["rewards/chosen"] + row["rewards/rejected"])
    assert delta != 0
    out, _ = fit(loss="bco_pair", max_steps=6, save_every=3, out="half")
    unfinished(out)
    resume(out)
    assert not differences(whole, read_metrics(out))


def gaps_of(rows, beta):
    """The mean gap of each step: rewards/margins is beta times the gap."""
    return [row["rewards/margins"] / beta for row in rows if row["split"] == "train"]


@pytest.mark.parametrize("loss, beta", [("beta_dpo", 0.1), ("alpha_dpo", 2.5)])
def test_moving_averages_of_the_gaps_begin_at_the_first_batch_and_are_resumed(fit, loss, beta):
    flags = {"loss": loss, "max_steps": 8, "warmup_steps": 0, "eval_every": 4}
    _, whole = fit(**flags, out="whole")
    rows = [row for row in whole if row["split"] == "train"]
    gaps = gaps_of(rows, beta)
    assert rows[0]["gap_mean"] == 0 and "rewards/margins_squared" not in rows[0]
    first = 0 if loss == "beta_dpo" else 1  # the spread begins when the policy has moved
    for step in range(first + 1, 8):
        expected = sum(gaps[first:step]) / (step - first)
        assert rows[step]["gap_mean"] == pytest.approx(expected, rel=1e-6)
    assert ("gap_std" in rows[0]) == (loss == "alpha_dpo")
    out, _ = fit(**flags, save_every=4, out="half")
    unfinished(out)
    resume(out)
    assert not differences(whole, read_metrics(out))


def test_the_spread_of_the_gaps_is_that_of_the_whole_step_in_any_micro_batches(fit):
    flags = {"loss": "alpha_dpo", "max_steps": 5, "warmup_steps": 0, "dtype": "float64"}
    _, one = fit(**flags, micro_batch_size=8, out="one")
    _, many = fit(**flags, micro_batch_size=1, out="many")
    assert one[4]["gap_std"] > 1e-4 and one[4]["gap_std"] != 1
    assert not differences(one, many, 1e-9)


def test_a_killed_run_that_is_resumed_equals_an_uninterrupted_one_bit_for_bit(
        tmp_path, long_run, uninterrupted):
    out = tmp_path / "killed"
    process = start_training(long_run | {"output_dir": out})
    wait_for_checkpoint(process, out)
    process.kill()
    process.wait()
    check_resumed(out, uninterrupted)


@pytest.mark.parametrize("torchrun", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_saves_a_checkpoint_and_prints_how_to_resume(
        tmp_path, long_run, uninterrupted, torchrun):
    out = tmp_path / "stopped"
    process = start_training(long_run | {"output_dir": out}, torchrun)
    wait_for_checkpoint(process, out)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert f"--output_dir {out} --resume" in stdout
    assert "Traceback" not in stdout
    if not torchrun:  # two processes sum in another order, and torchrun prints its own traceback
        assert "Traceback" not in stderr
        assert process.returncode == 130
        check_resumed(out, uninterrupted)


def test_only_the_newest_checkpoints_are_kept_and_each_is_complete(uninterrupted):
    checkpoints = sorted(uninterrupted.glob("checkpoint-*"))
    assert [path.name for path in checkpoints] == ["checkpoint-110", "checkpoint-115"]
    for path in checkpoints:
        assert (path / "state.json").exists() and weights(path)
    for path in uninterrupted.rglob("*"):
        assert path.suffix != ".tmp"
        assert not path.name.startswith(".") or path.name in (".lock", files.LIST)


def test_a_half_written_checkpoint_does_not_count_as_one(fit, tmp_path):
    """A kill while saving leaves a folder `.checkpoint` and nothing else."""
    fit(max_steps=4, save_every=2)
    partial = tmp_path / "out" / f"{files.PARTIAL}0123abcd" / "checkpoint-4"
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "out")] == ["checkpoint-2"]


def test_a_complete_run_resumes_to_nothing_and_is_not_overwritten(fit, capsys):
    out, _ = fit(max_steps=2)
    before = weights(out)
    resume(out)
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a finished run: choose another folder"):
        fit(max_steps=2)
    for name, value in weights(out).items():
        assert torch.equal(value, before[name])


def test_a_resumed_run_may_not_change_a_flag_that_changes_its_results(fit):
    out, _ = fit(max_steps=4, save_every=2)
    unfinished(out)
    for flag in ("--beta=0.2", "--loss=ipo", "--lr=0.5", "--seed=9"):
        name = flag.split("=")[0]
        with pytest.raises(ValueError, match=f"{name} .* may not change"):
            resume(out, flag)


def test_a_resumed_run_may_not_change_its_rows(fit, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(30))
    out, _ = fit(dataset=path, max_steps=4, save_every=2, eval_share=0)
    unfinished(out)
    write_jsonl(tmp_path / "rows.jsonl", make_rows(20))
    message = "--resume: the rows of --dataset, their order or their tokens changed since the run"
    with pytest.raises(ValueError, match=message):
        resume(out)


def test_resume_needs_a_run(tmp_path):
    with pytest.raises(ValueError, match="--resume: give the --output_dir"):
        train.parse_args(["--resume"])
    with pytest.raises(ValueError, match="--output_dir .*nothing does not exist"):
        train.parse_args(["--resume", "--output_dir", str(tmp_path / "nothing")])
    with pytest.raises(ValueError, match="there is no run in"):
        train.parse_args(["--resume", "--output_dir", str(tmp_path)])


# --- bad input

@pytest.mark.parametrize("flags, message", [
    (["--loss", "sigmod"], "--loss sigmod: there is no such loss; the nearest name is sigmoid"),
    (["--loss", "hinge", "--label_smoothing", "0.1"],
     "--label_smoothing is not read by --loss hinge; it is read by sigmoid"),
    (["--loss", "sft", "--beta", "0.1"], "--beta is not read by --loss sft; it is read by"),
    (["--loss", "sft", "--ref_model", "x"], "--ref_model: --loss sft has no reference"),
    (["--loss", "sigmoid,sppo_hard", "--model", "m", "--dataset", "d"],
     "--beta must be given: it has different defaults in the parts"),
    (["--loss", "sigmoid:-1,sft"],
     "--loss sigmoid:-1,sft: the weight of sigmoid must be a number > 0, got '-1'"),
    (["--loss", "hinge,sft", "--gamma", "1"],
     "--gamma is not read by --loss hinge,sft; it is read by alpha_dpo, simpo, alphapo"),
    (["--loss", "simpo", "--reference_free"], "--reference_free: simpo has no reference as it is"),
    (["--loss", "nca_pair", "--f_divergence", "js"],
     "--f_divergence: nca_pair reads more than a margin"),
    (["--f_divergence", "js", "--f_alpha", "0.5"],
     "--f_alpha: is read by the f_divergence alpha alone, got js"),
    (["--loss", "sigmoid", "--reference_free", "--ref_model", "x"],
     "--ref_model x: is not read with --reference_free"),
    (["--lora_rank", "4", "--ref", "model", "--sync_ref_every", "1"],
     "--sync_ref_every 1: --ref model has no adapter to move"),
    (["--loss", "aot", "--wpo"],
     "--wpo: it weighs pairs, but aot has no separate loss for each pair"),
    (["--loss", "sigmoid", "--ld_alpha", "2"], "--ld_alpha: must be a number in [0, 1], got '2'"),
    (["--betta", "0.1"], "--betta: there is no such flag; the nearest is --beta"),
    (["--bet", "0.1"], "--bet: there is no such flag; the nearest is --beta"),
    (["--beta", "0"], "--beta: must be a number > 0 and finite, got '0'"),
    (["--beta", "-1"], "--beta: must be a number > 0 and finite, got '-1'"),
    (["--beta", "nan"], "--beta: must be a number > 0 and finite, got 'nan'"),
    (["--beta", "x"], "--beta: must be a number > 0 and finite, got 'x'"),
    (["--label_smoothing", "0.5"], "--label_smoothing: must be a number in [0, 0.5), got '0.5'"),
    (["--lr", "0"], "--lr: must be a number > 0 and finite, got '0'"),
    (["--lr", "nan"], "--lr: must be a number > 0 and finite, got 'nan'"),
    (["--batch_size", "0"], "--batch_size: must be a whole number >= 1 and below 2**63, got '0'"),
    (["--epochs", "1", "--max_steps", "2"],
     "--epochs 1 and --max_steps 2 both say how long to train"),
    (["--model", "world", "--dataset", "rows.jsonl"],
     "--model world has only the words of its own data"),
    (["--max_prompt_length", "16"],
     "--max_prompt_length 16: leaves no tokens for an answer in --max_length 16"),
    (["--eval_share", "0.5"], "--eval_share 0.5: the held-out rows are the world's own"),
    (["--model", "m", "--dataset", "d", "--eval_share", "1"],
     "--eval_share: must be a number in [0, 1), got '1'"),
    (["--model", "m", "--dataset", "d", "--eval_share", "0.1", "--eval_dataset", "e"],
     "--eval_share 0.1: the held-out rows are e"),
    (["--shuffle", "maybe"], "argument --shuffle: must be true or false, got maybe"),
    (["--loss"], "argument --loss: expected one argument"),
    (["--columns", "prompt:q"], "--columns prompt:q: write OURS=THEIRS"),
    (["--chat_template", "/nowhere"], "--chat_template /nowhere: no such file"),
    (["--micro_batch_size", "2", "--tokens_per_micro_batch", "99"],
     "--micro_batch_size 2 and --tokens_per_micro_batch 99: give one"),
    (["--overlong", "squeeze"], "argument --overlong: invalid choice: 'squeeze'"),
])
def test_a_wrong_flag_is_reported_with_what_is_right(flags, message):
    with pytest.raises(ValueError) as error:
        train.parse_args(flags)
    assert message in str(error.value)


@pytest.mark.parametrize("flags, message", [
    ({"max_length": 129}, "--max_length 129: the model has 128 positions; pass 128 or less"),
    ({"model": "/nowhere"}, "/nowhere: no such model folder"),
    ({"dataset": "/nowhere.jsonl"}, "/nowhere.jsonl: no such file"),
    ({"eval_dataset": "/nowhere.jsonl", "eval_share": None}, "/nowhere.jsonl: no such file"),
    ({"eval_share": 0.9999}, "holds out all 22 rows"),
])
def test_a_run_that_cannot_train_is_refused_before_any_file_is_written(
        fit, tmp_path, flags, message):
    with pytest.raises(ValueError) as error:
        fit(**flags)
    assert message in str(error.value) and not (tmp_path / "out").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(fit, tokenizer, tmp_path):
    small = tiny_model("llama", tokenizer)
    small.resize_token_embeddings(100)
    models.save_model(small, tokenizer, tmp_path / "small")
    with pytest.raises(ValueError, match=r"its embedding has 100 rows"):
        fit(model=tmp_path / "small")


@pytest.mark.parametrize("loss", ["sigmoid", "sft"])
def test_nan_weights_stop_the_run_with_step_rows_and_log_probs_and_save_nothing(
        fit, tokenizer, tmp_path, loss):
    broken = tiny_model("llama", tokenizer)
    broken.model.norm.weight.data[0] = float("nan")
    models.save_model(broken, tokenizer, tmp_path / "nan")
    message = (r"step [01]: the loss is nan(.|\n)*"
               r"pairs.jsonl, row \d+: loss nan, logps/chosen nan")
    with pytest.raises(FloatingPointError, match=message):
        fit(model=tmp_path / "nan", loss=loss, lr=1e-5)
    assert not list(tmp_path.glob("out/*.safetensors"))
    assert not list(tmp_path.glob("out/checkpoint-*"))


def test_a_learning_rate_that_explodes_stops_the_run_before_it_saves_weights_that_are_not_finite(
        fit, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d+: the loss is"):
        fit(lr=1e30, max_steps=20, save_every=1, warmup_steps=0)
    for path in checkpoint.checkpoints(tmp_path / "out"):
        assert all(value.isfinite().all() for value in weights(path).values())


@pytest.mark.parametrize("flags, message", [
    (["--loss=sigmod"], "error: --loss sigmod: there is no such loss"),
    (["--model=.", "--dataset=x.jsonl"], "error: "),
])
def test_a_mistake_in_a_flag_is_one_line_and_exit_status_2(tmp_path, flags, message):
    result = forked.run("train.py", *flags, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_bug_in_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(train, "main", lambda *arguments: json.loads("{"))
    with pytest.raises(json.JSONDecodeError):
        train.run()


# --- real text (minutes)

@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="the project's shared data is not here")
@pytest.mark.parametrize("rows, flags, accuracy", [
    # 427 rows are too few to reach an accuracy on new prompts.
    ("hh_harmless_512.jsonl", {"batch_size": 16, "micro_batch_size": 8}, 0.0),
    ("instructions_600.jsonl", {"batch_size": 32, "micro_batch_size": 16}, 0.7),
])
def test_sft_and_then_dpo_on_real_text_raises_the_margin_and_the_held_out_accuracy(
        tmp_path, rows, flags, accuracy):
    """The policy starts with random weights, and uses GPT-2's tokenizer."""
    new_model = ["new", "--tokenizer", SHARED / "tokenizers" / "gpt2", "--hidden_size", "128",
                 "--layers", "2", "--out", tmp_path / "new"]
    subprocess.run([sys.executable, ROOT / "model.py", *new_model], check=True)
    common = flags | {"dataset": SHARED / "data" / rows, "epochs": 3, "max_length": 256,
                      "eval_share": 0.15, "log_every": 1}
    for loss, source, lr in (("sft", "new", 2e-3), ("sigmoid", "sft", 3e-4)):
        stage = {"loss": loss, "model": tmp_path / source, "output_dir": tmp_path / loss, "lr": lr}
        assert not train.main(to_arguments(common | stage), ALONE)
    metrics = read_metrics(tmp_path / "sigmoid")
    margins = [row["rewards/margins"] for row in metrics if row["split"] == "train"]
    third = len(margins) // 3
    assert sum(margins[-third:]) / third > sum(margins[:third]) / third + 0.1
    assert metrics[-1]["split"] == "eval" and metrics[-1]["rewards/accuracies"] > accuracy
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "sigmoid")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sigmoid")
    prompt = tokenizer("Name a colour.\n", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=8).shape[1] > 5
