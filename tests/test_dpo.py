"""Log-probs: which tokens count, and that nothing else does."""
import math

import pytest
import torch
from conftest import tiny_model
from transformers import AutoModelForCausalLM, Gemma2Config

import data
import dpo
from dpo import IGNORE, SequenceLogps, concatenated_forward, concatenated_inputs, get_batch_logps, preference_step
from losses import ipo, sft, sigmoid


def rows_of(*rows):
    """[(prompt, chosen, rejected) token lists] -> columns as they come from a data set."""
    return {"id": [f"row {i}" for i in range(len(rows))], "prompt_ids": [r[0] for r in rows], "chosen_ids": [r[1] for r in rows],
            "rejected_ids": [r[2] for r in rows]}


ROWS = [([5, 6, 7], [8, 9, 0], [10, 0]), ([11], [12, 13, 14, 15, 0], [16, 17, 0]), ([20, 21, 22, 23, 24], [25, 0], [26, 27, 28, 29, 0])]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tokenizer):
    """Rotary and learned absolute positions."""
    return SequenceLogps(tiny_model(request.param, tokenizer).double().eval())


def test_log_probs_of_a_2_by_3_example_worked_by_hand():
    """Two rows of three tokens over two words, the first token being the prompt.

    Row 0: logits (0, 0) then (log 3, 0); answer 1, 0: log ½ + log ¾.   Row 1: its last token is padding: log ½ alone.
    """
    logits = torch.tensor([[[0, 0], [math.log(3), 0], [9, 9]], [[5, 5], [1, 2], [3, 4]]], dtype=torch.float64)
    labels = torch.tensor([[IGNORE, 1, 0], [IGNORE, 0, IGNORE]])
    logps, lengths = get_batch_logps(logits, labels)
    assert torch.allclose(logps, torch.tensor([math.log(1 / 2) + math.log(3 / 4), math.log(1 / 2)], dtype=torch.float64))
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


def test_logits_and_labels_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 4, 7\) and \(2, 3\)"):
        get_batch_logps(torch.zeros(2, 4, 7), torch.zeros(2, 3, dtype=torch.long))


def test_prompt_and_padding_are_never_scored_and_the_first_answer_token_and_eos_are():
    """By the gradient: the logits that are moved are those which predict the answer's tokens, EOS among them, and no others."""
    batch = data.collate(rows_of(*ROWS), pad_token_id=1)
    labels = batch["chosen_labels"]
    logits = torch.randn(*labels.shape, 40, requires_grad=True)
    get_batch_logps(logits, labels)[0].sum().backward()
    moved = logits.grad.abs().sum(-1) > 0  # (B, T)
    for i, (prompt, chosen, _) in enumerate(ROWS):
        first = len(prompt) - 1  # the last prompt token predicts the first answer token
        assert moved[i].nonzero().flatten().tolist() == list(range(first, first + len(chosen)))


def test_head_on_the_scored_positions_equals_full_logits(model):
    assert model.bare_head
    inputs = concatenated_inputs(data.collate(rows_of(*ROWS), 1))
    logits = model.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    expected, lengths = get_batch_logps(logits, inputs["labels"])
    found = model(**inputs)
    assert torch.allclose(found[0], expected, atol=1e-12) and torch.equal(found[1], lengths)


def test_a_model_that_caps_its_logits_is_asked_for_them(tokenizer):
    """Gemma 2 caps after the head: head(hidden) would be other logits, and nothing would fail."""
    torch.manual_seed(0)
    gemma = AutoModelForCausalLM.from_config(Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=1.0, initializer_range=1.0)).double()
    model, inputs = SequenceLogps(gemma), concatenated_inputs(data.collate(rows_of(*ROWS), 1))
    assert not model.bare_head
    logits = gemma(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    assert torch.equal(model(**inputs)[0], get_batch_logps(logits, inputs["labels"])[0])


def test_concatenated_forward_equals_two_forwards(model):
    batch = data.collate(rows_of(*ROWS), 1)
    both = concatenated_forward(model, batch)
    for side in ("chosen", "rejected"):
        alone, lengths = model(**{name: batch[f"{side}_{name}"] for name in ("input_ids", "attention_mask", "labels")})
        assert torch.allclose(both[f"{side}_logps"], alone, atol=1e-12)
        assert torch.equal(both[f"{side}_lengths"], lengths)


def test_the_loss_of_a_row_depends_neither_on_its_batch_mates_nor_on_padding(model):
    together, _ = preference_step(model, model, data.collate(rows_of(*ROWS), 1), ipo, {"beta": 0.1})
    policy = concatenated_forward(model, data.collate(rows_of(*ROWS), 1))
    for i, row in enumerate(ROWS):
        for pad in (1, 0, 39):  # 0 is EOS: a pad token equal to EOS does not unscore EOS
            alone = concatenated_forward(model, data.collate(rows_of(row, ([2] * 30, [3, 0], [4, 0])), pad))
            assert torch.allclose(alone["chosen_logps"][0], policy["chosen_logps"][i], atol=1e-10)
            assert torch.allclose(alone["rejected_logps"][0], policy["rejected_logps"][i], atol=1e-10)
        assert torch.allclose(preference_step(model, model, data.collate(rows_of(row), 1), ipo, {"beta": 0.1})[0], together[i])


def test_the_reference_runs_first_and_without_a_graph(model):
    calls = []

    class Spy(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, **inputs):
            calls.append((self.name, torch.is_grad_enabled()))
            return model(**inputs)

    losses, _ = preference_step(Spy("policy"), Spy("reference"), data.collate(rows_of(*ROWS), 1), sigmoid, {})
    assert calls == [("reference", False), ("policy", True)] and losses.requires_grad


def test_sft_runs_neither_reference_nor_rejected_answers(model):
    batch = data.collate({k: v for k, v in rows_of(*ROWS).items() if k != "rejected_ids"}, 1)
    losses, metrics = preference_step(model, None, batch, sft, {})
    logps, lengths = model(**concatenated_inputs(batch, ("chosen",)))
    assert torch.allclose(losses.mean(), -logps.sum() / lengths.sum()) and set(metrics) == {"loss", "logps/chosen"}


def test_rewards_are_beta_times_the_log_ratio_and_ties_are_not_accurate(model, tokenizer):
    torch.manual_seed(1)
    other = SequenceLogps(tiny_model("llama", tokenizer).double())
    batch = data.collate(rows_of(*ROWS), 1)
    policy, reference = concatenated_forward(model, batch), concatenated_forward(other, batch)
    metrics = preference_step(model, other, batch, sigmoid, {"beta": 0.3})[1]
    chosen, rejected = (0.3 * (policy[f"{side}_logps"] - reference[f"{side}_logps"]) for side in ("chosen", "rejected"))
    assert torch.allclose(metrics["rewards/chosen"], chosen) and torch.allclose(metrics["rewards/rejected"], rejected)
    assert torch.allclose(metrics["rewards/margins"], chosen - rejected)
    assert metrics["rewards/accuracies"].tolist() == [float(c > r) for c, r in zip(chosen, rejected)]
    assert preference_step(model, model, batch, sigmoid, {})[1]["rewards/accuracies"].sum() == 0


def test_both_modules_ignore_the_same_label():
    assert dpo.IGNORE == data.IGNORE == torch.nn.CrossEntropyLoss().ignore_index
