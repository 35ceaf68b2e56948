"""dpo.py: which tokens count, the metrics of a step, and a loop that trains as train.py does."""
import math
import re

import forked
import pytest
import torch
from conftest import ROOT, tiny_model
from steps import preference_step
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
import dpo
from dpo import IGNORE, SequenceLogps, concatenated_forward, concatenated_inputs, get_batch_logps
from losses import (
    LOSSES,
    ipo,
    kind_of,
    needs_reference,
    odpo,
    sft,
    sides_of,
    sigmoid,
    simpo,
)
from model import load_model, save_model


def rows_of(*rows):
    """[(prompt, chosen, rejected) token lists] -> columns as they come from a data set."""
    return {
        "id": [f"row {i}" for i in range(len(rows))],
        "prompt_ids": [row[0] for row in rows],
        "answer_ids": [list(row[1:]) for row in rows],
    }


ROWS = [
    ([5, 6, 7], [8, 9, 0], [10, 0]),
    ([11], [12, 13, 14, 15, 0], [16, 17, 0]),
    ([20, 21, 22, 23, 24], [25, 0], [26, 27, 28, 29, 0]),
]
BATCH = data.pad_rows(rows_of(*ROWS), 1)
WITHOUT_REFERENCE = [
    name for name in LOSSES
    if kind_of(LOSSES[name]) == "pairs" and not needs_reference(LOSSES[name])
]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tokenizer):
    """Rotary and learned absolute positions."""
    return SequenceLogps(tiny_model(request.param, tokenizer).double().eval())


@pytest.fixture(scope="module")
def other(tokenizer):
    """Another model, so that no margin is 0."""
    model = tiny_model("llama", tokenizer).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise)
    return SequenceLogps(model)


# --- get_batch_logps ------------------------------------------------------------------------------

def test_log_probs_of_a_2_by_3_example_worked_by_hand():
    """Two rows of three tokens over a vocabulary of two; the first token is the prompt.

    Row 0: logits (0, 0), then (log 3, 0). Its answer is 1, 0: log ½ + log ¾.
    Row 1: its last token is padding: log ½ alone.
    """
    logits = torch.tensor([
        [[0, 0], [math.log(3), 0], [9, 9]],
        [[5, 5], [1, 2], [3, 4]],
    ], dtype=torch.float64)
    labels = torch.tensor([[IGNORE, 1, 0], [IGNORE, 0, IGNORE]])
    logps, lengths = get_batch_logps(logits, labels)
    by_hand = [math.log(1 / 2) + math.log(3 / 4), math.log(1 / 2)]
    assert logps.tolist() == pytest.approx(by_hand)
    assert lengths.tolist() == [2, 1]


def test_log_probs_are_sums_not_averages():
    logits, labels = torch.zeros(1, 5, 4), torch.tensor([[IGNORE, 0, 1, 2, 3]])
    assert get_batch_logps(logits, labels)[0].item() == pytest.approx(-4 * math.log(4))


def test_low_precision_logits_are_summed_in_fp32():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 300, 50), torch.randint(50, (2, 300))
    rounded = logits.bfloat16()
    logps, _ = get_batch_logps(rounded, labels)
    assert logps.dtype == torch.float32
    assert torch.allclose(logps.double(), get_batch_logps(rounded.double(), labels)[0], rtol=1e-5)


def test_logits_and_labels_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 4, 7\) and \(2, 3\)"):
        get_batch_logps(torch.zeros(2, 4, 7), torch.zeros(2, 3, dtype=torch.long))


def test_prompt_and_padding_are_never_scored_and_the_first_answer_token_and_eos_are():
    """Only the logits that predict a token of the answer, EOS included, have a gradient."""
    labels = BATCH["labels"][:, 0]  # (B, T), of the chosen answers
    logits = torch.randn(*labels.shape, 40, requires_grad=True)
    get_batch_logps(logits, labels)[0].sum().backward()
    has_gradient = logits.grad.abs().sum(-1) > 0  # (B, T)
    for i, (prompt, chosen, _) in enumerate(ROWS):
        first = len(prompt) - 1  # the last prompt token predicts the first answer token
        scored = list(range(first, first + len(chosen)))
        assert has_gradient[i].nonzero().flatten().tolist() == scored


def test_the_model_returns_the_log_probs_of_its_own_logits(model):
    inputs = concatenated_inputs(BATCH)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    logits = model.model(input_ids=ids, attention_mask=mask).logits
    expected, lengths = get_batch_logps(logits, inputs["labels"])
    logps, found_lengths = model(**inputs)
    assert torch.equal(logps, expected)
    assert torch.equal(found_lengths, lengths)


# --- Batches --------------------------------------------------------------------------------------

def test_concatenated_forward_equals_two_forwards(model):
    both = concatenated_forward(model, BATCH)
    for side in (0, 1):
        names = ("input_ids", "attention_mask", "labels")
        alone, lengths = model(**{name: BATCH[name][:, side] for name in names})
        assert torch.allclose(both["logps"][:, side], alone, atol=1e-12)
        assert torch.equal(both["lengths"][:, side], lengths)


def test_the_log_probs_of_a_row_depend_on_no_other_row_and_on_no_padding(model):
    together = concatenated_forward(model, BATCH)
    longer = ([2] * 30, [3, 0], [4, 0])
    for i, row in enumerate(ROWS):
        for pad in (1, 0, 39):  # 0 is EOS: the EOS of an answer is scored, padding is not
            alone = concatenated_forward(model, data.pad_rows(rows_of(row, longer), pad))
            assert torch.allclose(alone["logps"][0], together["logps"][i], atol=1e-10)


def test_the_loss_of_a_pair_is_the_same_alone_and_in_a_batch(model, other):
    together, _ = preference_step(model, other, BATCH, ipo, {"beta": 0.1})
    for i, row in enumerate(ROWS):
        alone, _ = preference_step(model, other, data.pad_rows(rows_of(row), 1), ipo, {"beta": 0.1})
        assert torch.allclose(alone[0], together[i])


def test_the_reference_runs_first_and_without_a_graph(model):
    calls = []

    class Spy(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, **inputs):
            calls.append((self.name, torch.is_grad_enabled()))
            return model(**inputs)

    losses, _ = preference_step(Spy("policy"), Spy("reference"), BATCH, sigmoid)
    assert calls == [("reference", False), ("policy", True)]
    assert losses.requires_grad


def test_sft_runs_neither_reference_nor_rejected_answers(model):
    batch = data.pad_rows(rows_of(*[row[:2] for row in ROWS]), 1)
    losses, metrics = preference_step(model, None, batch, sft)
    logps, lengths = model(**concatenated_inputs(batch))
    assert torch.allclose(losses.mean(), -logps.sum() / lengths.sum())
    assert set(metrics) == {"loss", "logps/chosen"}


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_a_loss_without_reference_calls_none(model, name):
    losses, metrics = preference_step(model, None, BATCH, LOSSES[name])
    assert losses.shape == (3,)
    assert ("rewards/margins" in metrics) == (len(sides_of(LOSSES[name])) == 2)


def test_scores_reach_the_loss_that_takes_them(model, other):
    scores = {"scores": [[1.0, 0.0], [5.0, 2.0], [0.5, 0.25]]}
    batch = data.pad_rows(rows_of(*ROWS) | scores, 1)
    found = preference_step(model, other, batch, odpo, {"beta": 0.3})[1]
    plain = preference_step(model, other, BATCH, sigmoid, {"beta": 0.3})[1]
    offset = torch.tensor([1.0, 3.0, 0.25], dtype=torch.float64).log()
    expected = torch.nn.functional.softplus(offset - plain["rewards/margins"])
    assert torch.allclose(found["loss"], expected)


def test_dpo_and_data_ignore_the_same_label_as_torch():
    assert IGNORE == data.IGNORE == torch.nn.CrossEntropyLoss().ignore_index


# --- Metrics --------------------------------------------------------------------------------------

def test_rewards_are_beta_times_the_log_ratio_and_ties_are_not_accurate(model, other):
    policy, reference = concatenated_forward(model, BATCH), concatenated_forward(other, BATCH)
    chosen, rejected = 0.3 * (policy["logps"] - reference["logps"]).T
    metrics = preference_step(model, other, BATCH, sigmoid, {"beta": 0.3})[1]
    assert torch.allclose(metrics["rewards/chosen"], chosen)
    assert torch.allclose(metrics["rewards/rejected"], rejected)
    assert torch.allclose(metrics["rewards/margins"], chosen - rejected)
    accurate = [float(c > r) for c, r in zip(chosen, rejected)]
    assert metrics["rewards/accuracies"].tolist() == accurate
    ties = preference_step(model, model, BATCH, sigmoid)[1]["rewards/accuracies"]
    assert ties.sum() == 0


def test_rewards_are_per_token_where_the_loss_averages(model):
    policy = concatenated_forward(model, BATCH)
    chosen, rejected = (policy["logps"] / policy["lengths"]).T
    metrics = preference_step(model, None, BATCH, simpo, {"beta": 2.0})[1]
    assert torch.allclose(metrics["rewards/chosen"], 2 * chosen)
    assert metrics["rewards/accuracies"].tolist() == (chosen > rejected).tolist()


# --- The loop -------------------------------------------------------------------------------------

STEPS = 20


def recorded(updates):
    """Run the updates -> the gradients of each optimizer step, all parameters in one vector:
    matrices first, because train.py has the others in a group of their own."""
    gradients = []

    def record(optimizer, *given):
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        parameters.sort(key=lambda parameter: parameter.dim(), reverse=True)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))

    hook = register_optimizer_step_pre_hook(record)
    try:
        updates()
    finally:
        hook.remove()
    return gradients


@pytest.mark.parametrize("attention", ["padded", "packed"])
def test_its_first_20_losses_and_gradients_are_those_of_train_py(
    fit, tokenizer, pairs, tmp_path, attention,
):
    """In float64, with the same rows, clipping and schedule. GPT-2, because transformers computes
    the norms of a Llama in fp32."""
    folder = str(tmp_path / "gpt2")
    save_model(tiny_model("gpt2", tokenizer), tokenizer, folder)
    policy = SequenceLogps(load_model(folder, torch.float64))
    reference = SequenceLogps(load_model(folder, torch.float64)).requires_grad_(False)
    rows, _ = data.load_tokens(pairs, tokenizer)
    settings = {"lr": 1e-2, "lr_schedule": "linear", "batch_size": 8}
    losses, runs, hyper = [], [], {"beta": 0.1}

    def run_dpo():
        updates = dpo.train(policy, reference, rows, tokenizer, sigmoid, hyper, settings, STEPS)
        for metrics in updates:
            losses.append(metrics["loss"].mean().item())

    def run_train():
        runs.append(fit(dtype="float64", max_steps=STEPS, attention=attention, eval_share=0.0,
                        micro_batch_size=8, max_length=128, model=folder))

    gradients, others = recorded(run_dpo), recorded(run_train)
    train_losses = [row["loss"] for row in runs[0][1] if row["split"] == "train"]
    assert train_losses == pytest.approx(losses, rel=1e-10)
    assert len(gradients) == len(others) == STEPS
    for found, expected in zip(gradients, others):
        assert (found - expected).norm() < 1e-10 * expected.norm()
    assert losses[-1] < 0.9 * losses[0]


# --- python dpo.py --------------------------------------------------------------------------------

def test_dpo_py_trains_a_model_on_a_data_set_and_reports_mistakes_in_one_line(folder, pairs):
    def run(*arguments):
        return forked.run("dpo.py", *arguments)

    result = run("--model", folder, "--dataset", pairs, "--steps", "3", "--beta", "0.5")
    assert result.returncode == 0, result.stderr
    assert "22 of 22 rows kept" in result.stdout
    assert re.search(r"step 3 train: loss 0\.69\d+ accuracy", result.stdout)
    for arguments, message in (
        (("--model", folder), "give both --model and --dataset"),
        (("--beta", "0"), "--beta: must be a number > 0 and finite, got '0'"),
        (("--model", folder, "--dataset", "/nowhere.jsonl"), "/nowhere.jsonl: no such file"),
    ):
        result = run(*arguments)
        assert result.returncode == 2
        assert result.stderr.startswith("error: ") and message in result.stderr


def test_a_gradient_that_is_not_finite_stops_the_loop(tokenizer, folder, pairs):
    model = load_model(folder)
    model.lm_head.weight.data[5, 5] = float("nan")
    policy = SequenceLogps(model)
    rows, _ = data.load_tokens(pairs, tokenizer)
    settings = {"lr": 1e-2, "lr_schedule": "linear", "batch_size": 8}
    with pytest.raises(RuntimeError, match="non-finite"):
        next(dpo.train(policy, policy, rows, tokenizer, sigmoid, {}, settings, 3))


def test_dpo_py_has_at_most_285_lines():
    assert len((ROOT / "dpo.py").read_text().splitlines()) <= 285
