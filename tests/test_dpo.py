"""Log-probs: which tokens count, and that nothing else does."""
import math

import pytest
import torch
from conftest import tiny_model
from transformers import AutoModelForCausalLM, Gemma2Config

import data
import dpo
import packing
from dpo import (
    IGNORE,
    SequenceLogps,
    check_variants,
    concatenated_forward,
    concatenated_inputs,
    get_batch_logps,
    preference_step,
)
from losses import (
    LOSSES,
    f_divergence_score,
    find,
    hinge,
    hyperparameters,
    ipo,
    needs_reference,
    odpo,
    sft,
    sigmoid,
    simpo,
)


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


# --- variants of a loss

@pytest.fixture(scope="module")
def other(tokenizer):
    """Another model, so that no margin is 0."""
    model = tiny_model("llama", tokenizer).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    return SequenceLogps(model)


BATCH = data.collate(rows_of(*ROWS), 1)


def token_tables(model):
    """[(chosen, rejected)] of (n, V) log-probs at each scored position, and the scored tokens: by hand, from full logits."""
    for prompt, *answers in ROWS:
        tables = []
        for answer in answers:
            logits = model.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1]
            tables.append((logits.log_softmax(-1), torch.tensor(answer)))
        yield tables


def grads(losses, model):
    return torch.autograd.grad(losses.sum(), [p for p in model.parameters()], allow_unused=True)


def test_a_reference_free_loss_has_zeros_for_its_reference_and_calls_none(model):
    losses, metrics = preference_step(model, None, BATCH, sigmoid, {"beta": 0.3}, reference_free=True)
    policy = concatenated_forward(model, BATCH)
    chosen, rejected = policy["chosen_logps"], policy["rejected_logps"]
    assert torch.allclose(losses, torch.nn.functional.softplus(-0.3 * (chosen - rejected)))
    assert torch.allclose(metrics["rewards/chosen"], 0.3 * chosen)  # which other trainers go on measuring from the reference


@pytest.mark.parametrize("name", [name for name in LOSSES if not needs_reference(LOSSES[name])])
def test_a_loss_without_reference_calls_none(model, name):
    losses, metrics = preference_step(model, None, BATCH, LOSSES[name])
    assert losses.shape == (3,) and ("rewards/margins" in metrics) == (name != "sft")


def test_rewards_are_per_token_where_the_loss_averages(model):
    policy = concatenated_forward(model, BATCH)
    averages = [policy[f"{side}_logps"] / policy[f"{side}_lengths"] for side in ("chosen", "rejected")]
    metrics = preference_step(model, None, BATCH, simpo, {"beta": 2.0})[1]
    assert torch.allclose(metrics["rewards/chosen"], 2 * averages[0])
    assert metrics["rewards/accuracies"].tolist() == (averages[0] > averages[1]).tolist()


def test_an_f_divergence_stands_in_front_of_the_loss_and_in_the_rewards(model, other):
    losses, metrics = preference_step(model, other, BATCH, hinge, {"beta": 0.3}, f_divergence="js")
    policy, reference = concatenated_forward(model, BATCH), concatenated_forward(other, BATCH)
    scores = [f_divergence_score(policy[f"{side}_logps"] - reference[f"{side}_logps"], "js") for side in ("chosen", "rejected")]
    assert torch.allclose(losses, torch.relu(1 - 0.3 * (scores[0] - scores[1])))
    assert torch.allclose(metrics["rewards/chosen"], 0.3 * scores[0])
    assert torch.allclose(metrics["logps/chosen"], policy["chosen_logps"])


def test_reverse_kl_is_the_loss_itself_and_alpha_takes_its_flag(model, other):
    plain = preference_step(model, other, BATCH, sigmoid)[0]
    assert torch.allclose(preference_step(model, other, BATCH, sigmoid, f_divergence="reverse_kl")[0], plain)
    one, forward = (preference_step(model, other, BATCH, sigmoid, **f)[0] for f in
                    (dict(f_divergence="alpha", f_alpha=1.0), dict(f_divergence="forward_kl")))
    assert torch.allclose(one, forward) and not torch.allclose(one, plain)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "simpo"])
def test_wpo_weighs_a_pair_by_eq_2_and_sends_no_gradient_through_the_weight(model, other, name):
    """2406.11827 eq. 2: w(y) = exp(mean over tokens of log π(y_t) − log Σ_v π(v)²), and the pair's weight is w(y_w) w(y_l)."""
    losses, _ = preference_step(model, other, BATCH, LOSSES[name], wpo=True)
    plain, _ = preference_step(model, other, BATCH, LOSSES[name])
    weights = []
    for tables in token_tables(model):
        means = [(table.gather(-1, ids[:, None])[:, 0] - table.exp().square().sum(-1).log()).mean() for table, ids in tables]
        weights.append(sum(means).exp().item())
    weights = torch.tensor(weights, dtype=torch.float64)
    assert torch.allclose(losses, weights * plain)
    for found, expected in zip(grads(losses, model), grads(weights * plain, model)):
        assert found is expected is None or torch.allclose(found, expected, atol=1e-12)


def test_wpo_gives_a_policy_that_is_sure_of_both_answers_weight_1_and_the_paper_has_no_clamp():
    assert packing.log_sum_of_squares(torch.tensor([[50.0, 0, 0]])).item() == pytest.approx(0)
    peaked = torch.tensor([[0.9, 0.1]]).log()
    weight = (peaked[:, 0] - packing.log_sum_of_squares(peaked)).exp().item()
    assert weight == pytest.approx(0.9 / 0.82) and 0.9 / 0.82 > 1


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_ld_dpo_weighs_the_tokens_beyond_the_common_length_for_policy_and_reference_alike(model, other, alpha):
    found = preference_step(model, other, BATCH, sigmoid, {"beta": 0.3}, ld_alpha=alpha)[0]
    for loss, *both in zip(found, token_tables(model), token_tables(other)):
        ratios = []
        for (table, ids), (ref, _) in zip(*both):
            ratio = (table - ref).gather(-1, ids[:, None])[:, 0]
            common = min(len(tokens) for _, tokens in both[0])
            ratios.append(ratio[:common].sum() + alpha * ratio[common:].sum())
        assert loss.item() == pytest.approx(torch.nn.functional.softplus(-0.3 * (ratios[0] - ratios[1])).item())
    at_start = preference_step(model, model, BATCH, sigmoid, ld_alpha=alpha)[0]
    assert torch.allclose(at_start, torch.full_like(at_start, math.log(2)))


def test_ld_dpo_of_equal_lengths_or_with_alpha_1_is_dpo(model, other):
    equal = data.collate(rows_of(([5, 6], [7, 8, 0], [9, 10, 0])), 1)
    assert torch.equal(preference_step(model, other, equal, sigmoid, ld_alpha=0.0)[0], preference_step(model, other, equal, sigmoid)[0])
    assert torch.equal(preference_step(model, other, BATCH, sigmoid, ld_alpha=1.0)[0], preference_step(model, other, BATCH, sigmoid)[0])


def test_scores_reach_the_loss_that_asks_for_them(model, other):
    rows = rows_of(*ROWS) | {"chosen_score": [1.0, 5.0, 0.5], "rejected_score": [0.0, 2.0, 0.25]}
    found = preference_step(model, other, data.collate(rows, 1), odpo, {"beta": 0.3})[1]
    plain = preference_step(model, other, BATCH, sigmoid, {"beta": 0.3})[1]
    offset = torch.tensor([1.0, 3.0, 0.25], dtype=torch.float64).log()
    assert torch.allclose(found["loss"], torch.nn.functional.softplus(offset - plain["rewards/margins"]))


@pytest.mark.parametrize("spec, variant, reason", [
    ("nca_pair", dict(reference_free=True), "reference_free: nca_pair reads more than a margin"),
    ("sigmoid,bco_pair", dict(reference_free=True), "reads more than a margin"),
    ("aot", dict(f_divergence="js"), "f_divergence: aot reads more than a margin"),
    ("chipo", dict(f_divergence="js"), "f_divergence: chipo reads more than a margin"),
    ("ipo", dict(f_divergence="js"), "f_divergence: ipo averages over tokens"),
    ("sigmoid,sft", dict(f_divergence="js"), "f_divergence: a part of sigmoid:1,sft:1 has no reference"),
    ("slic", dict(wpo=True), "has a likelihood term"),
    ("simpo", dict(reference_free=True), "reference_free: simpo has no reference as it is"),
    ("sft", dict(f_divergence="js"), "f_divergence: sft has no reference as it is"),
    ("sigmoid", dict(f_divergence="js", reference_free=True), "no divergence from a reference"),
    ("sigmoid", dict(f_alpha=0.5), "f_alpha: is read by the f_divergence alpha alone"),
    ("sigmoid", dict(f_divergence="alpha", f_alpha=0.0), r"f_alpha must be in \(0, 1\], got 0.0"),
    ("aot", dict(wpo=True), "wpo: a weight belongs to a pair"), ("kto_pair", dict(wpo=True), "wpo: a weight belongs to a pair"),
    ("sft", dict(wpo=True), "wpo: a weight belongs to a pair"),
    ("sigmoid,sft", dict(wpo=True), "has a likelihood term"), ("orpo", dict(wpo=True), "has a likelihood term"),
    ("ipo", dict(ld_alpha=0.5), "ld_alpha: it weighs the tokens of a pair, but ipo counts them"),
    ("sigmoid,sft", dict(ld_alpha=0.5), "counts them"), ("sft", dict(ld_alpha=0.5), "has no pairs"),
    ("sigmoid", dict(ld_alpha=1.5), r"ld_alpha must be in \[0, 1\], got 1.5"),
])
def test_a_variant_is_refused_with_its_reason_where_it_is_not_valid(spec, variant, reason):
    with pytest.raises(ValueError, match=reason):
        check_variants(find(spec), hyperparameters(find(spec)), **variant)


@pytest.mark.parametrize("spec, variant", [
    ("hinge", dict(reference_free=True)), ("ipo", dict(reference_free=True)), ("sigmoid,sft", dict(reference_free=True)),
    ("exo_pair", dict(f_divergence="forward_kl")), ("rdpo,odpo", dict(f_divergence="alpha", f_alpha=0.3)), ("simpo", dict(wpo=True)),
    ("ipo", dict(wpo=True)), ("nca_pair", dict(ld_alpha=0.0)), ("sigmoid", dict(wpo=True, ld_alpha=0.5, f_divergence="js"))])
def test_a_variant_is_allowed_where_it_is_valid(spec, variant):
    check_variants(find(spec), hyperparameters(find(spec)), **variant)
