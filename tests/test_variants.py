"""Variants of a loss: reference-free, f-DPO, WPO and LD-DPO."""
import argparse
import math

import pytest
import torch
from conftest import differences, make_rows, tiny_model, write_jsonl
from steps import build, make_batch, make_columns, preference_step
from test_dpo import BATCH, ROWS, rows_of

import reference as references
from dpo import concatenated_forward
from logps import FastLogps, log_sum_of_squares
from losses import LOSSES, f_divergence_score, find, hinge, hyperparameters, sigmoid
from variants import Variants, check_variants

softplus = torch.nn.functional.softplus


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request, tokenizer):
    return FastLogps(tiny_model(request.param, tokenizer).double().eval())


@pytest.fixture(scope="module")
def other(tokenizer):
    """Another model, so that no margin is 0."""
    return FastLogps(tiny_model("llama", tokenizer, tie_word_embeddings=True).double().eval())


def token_tables(model):
    """For each row [(chosen), (rejected)]: (n, V) log-probs at the scored positions, from full
    logits of a row alone, and the scored tokens."""
    tables = []
    for prompt, *answers in ROWS:
        row = []
        for answer in answers:
            ids = torch.tensor([prompt + answer])
            logits = model.model(input_ids=ids).logits[0, len(prompt) - 1:-1]
            row.append((logits.log_softmax(-1), torch.tensor(answer)))
        tables.append(row)
    return tables


def gradients(losses, model):
    return torch.autograd.grad(losses.sum(), list(model.parameters()), allow_unused=True)


def test_a_reference_free_loss_has_zeros_for_its_reference_and_calls_none(model):
    losses, metrics = preference_step(
        model, None, BATCH, sigmoid, {"beta": 0.3}, reference_free=True)
    policy = concatenated_forward(model, BATCH)
    chosen, rejected = policy["logps"].T
    assert torch.allclose(losses, softplus(-0.3 * (chosen - rejected)))
    # Other trainers measure this reward from the reference.
    assert torch.allclose(metrics["rewards/chosen"], 0.3 * chosen)


# --- f-DPO ----------------------------------------------------------------------------------------

def test_an_f_divergence_score_replaces_the_log_ratio_in_the_loss_and_in_the_rewards(model, other):
    losses, metrics = preference_step(
        model, other, BATCH, hinge, {"beta": 0.3}, f_divergence="js")
    policy, reference = concatenated_forward(model, BATCH), concatenated_forward(other, BATCH)
    scores = []
    for logratio in (policy["logps"] - reference["logps"]).T:
        scores.append(f_divergence_score(logratio, "js"))
    assert torch.allclose(losses, torch.relu(1 - 0.3 * (scores[0] - scores[1])))
    assert torch.allclose(metrics["rewards/chosen"], 0.3 * scores[0])
    assert torch.allclose(metrics["logps/chosen"], policy["logps"][:, 0])


def test_reverse_kl_is_the_loss_itself_and_alpha_1_is_forward_kl(model, other):
    def losses(**variants):
        return preference_step(model, other, BATCH, sigmoid, **variants)[0]

    assert torch.allclose(losses(f_divergence="reverse_kl"), losses())
    alpha_1 = losses(f_divergence="alpha", f_alpha=1.0)
    assert torch.allclose(alpha_1, losses(f_divergence="forward_kl"))
    assert not torch.allclose(alpha_1, losses())


def test_the_default_alpha_is_one_half(model, other):
    default, _ = preference_step(model, other, BATCH, sigmoid, f_divergence="alpha")
    half, _ = preference_step(model, other, BATCH, sigmoid, f_divergence="alpha", f_alpha=0.5)
    assert torch.equal(default, half)


# --- WPO ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["sigmoid", "hinge", "simpo", "sigmoid:0.5,hinge:2"])
def test_wpo_weighs_a_pair_by_eq_2_and_sends_no_gradient_through_the_weight(model, other, name):
    """2406.11827 eq. 2: w(y) = exp(mean over tokens of log π(y_t) − log Σ_v π(v)²), and the weight
    of a pair is w(y_w) w(y_l)."""
    loss, batch = find(name), make_batch(rows_of(*ROWS), wpo=True)
    losses, _ = preference_step(model, other, batch, loss, {"beta": 0.3}, wpo=True)
    plain, _ = preference_step(model, other, BATCH, loss, {"beta": 0.3})
    weights = []
    for row in token_tables(model):
        exponent = 0
        for table, ids in row:
            chosen_token = table.gather(-1, ids[:, None])[:, 0]
            sampled_token = table.exp().square().sum(-1).log()
            exponent += (chosen_token - sampled_token).mean()
        weights.append(exponent.exp().item())
    weighted = torch.tensor(weights, dtype=torch.float64) * plain
    assert torch.allclose(losses, weighted)
    for found, expected in zip(gradients(losses, model), gradients(weighted, model)):
        assert found is expected is None or torch.allclose(found, expected, atol=1e-12)


def test_wpo_gives_a_policy_that_is_sure_of_both_answers_weight_1_and_the_paper_has_no_clamp():
    assert log_sum_of_squares(torch.tensor([[50.0, 0, 0]])).item() == pytest.approx(0)
    peaked = torch.tensor([[0.9, 0.1]]).log()
    weight = (peaked[:, 0] - log_sum_of_squares(peaked)).exp().item()
    assert weight == pytest.approx(0.9 / 0.82)
    assert weight > 1


def two_models():
    """-> a policy and a reference of other weights, in float64"""
    policy, reference = FastLogps(build("Llama").double()), FastLogps(build("Llama").double())
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter *= 1.5
    return policy, reference


def test_wpo_of_a_one_hot_policy_on_its_own_answers_is_the_loss_itself():
    """Eq. 2: of the tokens that it would sample, each has log π(y_t) = log Σ_v π(v)² = 0."""
    policy, reference = two_models()
    with torch.no_grad():
        policy.model.lm_head.weight *= 1e6
    answer = greedy_answer(policy, [5, 6])
    columns = rows_of(([5, 6], answer, answer[:2]))

    def step(**variants):
        return preference_step(policy, reference, make_batch(columns, **variants), sigmoid,
                               **variants)

    plain, _ = step()
    losses, metrics = step(wpo=True)
    assert metrics["wpo/weight"].item() == 1
    assert torch.allclose(losses, plain, rtol=1e-12) and (plain - math.log(2)).abs() > 0.01


def greedy_answer(model, prompt, length=4):
    """The most probable token at each position. None is less probable than a sampled token."""
    ids = list(prompt)
    for _ in range(length):
        logits = model.model(input_ids=torch.tensor([ids])).logits[0, -1]  # (V,)
        ids.append(logits.argmax().item())
    return ids[len(prompt):]


@pytest.mark.parametrize("name, others", [
    ("sigmoid", {}),
    ("sigmoid", {"ld_alpha": 0.3}),
    ("hinge", {"f_divergence": "js"}),
    ("simpo", {}),
    ("sigmoid:0.5,hinge:2", {}),
])
def test_the_metric_wpo_weight_is_the_factor_of_each_loss_and_the_clamp_limits_it_to_1(
        model, other, name, others):
    """The authors' code: torch.clamp(torch.exp(chosen + rejected), max=1). The answers of the first
    pair are greedy, so that its weight is above 1."""
    loss, prompt = find(name), ROWS[0][0]
    greedy = greedy_answer(model, prompt)
    rows = [(prompt, greedy, greedy[:2]), *ROWS[1:]]

    def step(**variants):
        batch = make_batch(rows_of(*rows), **variants)
        return preference_step(model, other, batch, loss, {"beta": 0.3}, **variants)

    plain, plain_metrics = step(**others)
    losses, metrics = step(wpo=True, **others)
    clamped, clamped_metrics = step(wpo=True, wpo_clamp=True, **others)
    weights = metrics.pop("wpo/weight")
    assert torch.allclose(losses, plain * weights, rtol=1e-12)
    assert weights[0] > 1 and weights[1:].max() < 1
    assert torch.equal(clamped_metrics.pop("wpo/weight"), weights.clamp(max=1))
    assert torch.allclose(clamped, plain * weights.clamp(max=1), rtol=1e-12)
    assert metrics.keys() == plain_metrics.keys() == clamped_metrics.keys()
    assert not weights.requires_grad


# --- LD-DPO ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_ld_dpo_weighs_tokens_beyond_the_common_length_in_policy_and_reference(model, other, alpha):
    batch = make_batch(rows_of(*ROWS), ld_alpha=alpha)
    losses, _ = preference_step(model, other, batch, sigmoid, {"beta": 0.3}, ld_alpha=alpha)
    for loss, row, reference_row in zip(losses, token_tables(model), token_tables(other)):
        common = min(len(ids) for _, ids in row)
        logratios = []
        for (table, ids), (reference_table, _) in zip(row, reference_row):
            difference = (table - reference_table).gather(-1, ids[:, None])[:, 0]
            logratios.append(difference[:common].sum() + alpha * difference[common:].sum())
        margin = logratios[0] - logratios[1]
        assert loss.item() == pytest.approx(softplus(-0.3 * margin).item(), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_ld_dpo_of_equal_models_has_margin_0(model, alpha):
    batch = make_batch(rows_of(*ROWS), ld_alpha=alpha)
    losses, _ = preference_step(model, model, batch, sigmoid, ld_alpha=alpha)
    assert torch.allclose(losses, torch.full_like(losses, math.log(2)))


def test_ld_dpo_of_equal_lengths_or_with_alpha_1_is_dpo(model, other):
    equal = rows_of(([5, 6], [7, 8, 0], [9, 10, 0]))
    for columns, alpha in ((equal, 0.0), (rows_of(*ROWS), 1.0)):
        batch = make_batch(columns, ld_alpha=alpha)
        found, _ = preference_step(model, other, batch, sigmoid, ld_alpha=alpha)
        plain, _ = preference_step(model, other, make_batch(columns), sigmoid)
        assert torch.allclose(found, plain, rtol=1e-12)


# --- TR-DPO ---------------------------------------------------------------------------------------

def pair_weights(policy, reference, batch):
    """(B,): the size of DPO's gradient in the log-prob of each chosen answer, with β = 0.3"""
    tensors = {}
    for who, model in (("policy", policy), ("ref", reference)):
        logps = concatenated_forward(model, batch)["logps"].detach()
        tensors |= {f"{who}_chosen_logps": logps[:, 0], f"{who}_rejected_logps": logps[:, 1]}
    chosen = tensors["policy_chosen_logps"].requires_grad_()
    gradient, = torch.autograd.grad(sigmoid(**tensors, beta=0.3).sum(), chosen)
    return -gradient


def test_after_a_hard_update_of_the_reference_the_weight_of_every_pair_is_half_of_beta():
    """2404.09656: TR-DPO sets the reference to the policy, and DPO pushes as at its start."""
    policy, reference = two_models()
    batch = make_batch(make_columns())
    before = pair_weights(policy, reference, batch)
    assert ((before - 0.15).abs() > 1e-4).all()
    hard = argparse.Namespace(ref="model", sync_ref_every=1, sync_ref_alpha=1.0)
    references.move_reference(hard, policy, reference)
    after = pair_weights(policy, reference, batch)
    assert torch.allclose(after, torch.full_like(after, 0.15), rtol=1e-12)


# --- Which losses they are valid for --------------------------------------------------------------

@pytest.mark.parametrize("spec, variant, reason", [
    ("nca_pair", {"reference_free": True}, "reference_free: nca_pair reads more than a margin"),
    ("sigmoid,bco_pair", {"reference_free": True}, "reads more than a margin"),
    ("simpo", {"reference_free": True}, "reference_free: simpo has no reference as it is"),
    ("aot", {"f_divergence": "js"}, "f_divergence: aot reads more than a margin"),
    ("chipo", {"f_divergence": "js"}, "f_divergence: chipo reads more than a margin"),
    ("ipo", {"f_divergence": "js"}, "f_divergence: ipo averages over tokens"),
    ("sigmoid,sft", {"f_divergence": "js"},
     "f_divergence: a part of sigmoid:1,sft:1 has no reference"),
    ("sft", {"f_divergence": "js"}, "f_divergence: sft has no reference as it is"),
    ("sigmoid", {"f_divergence": "js", "reference_free": True}, "no divergence from a reference"),
    ("sigmoid", {"f_alpha": 0.5}, "f_alpha: is read by the f_divergence alpha alone"),
    ("sigmoid", {"f_divergence": "alpha", "f_alpha": 0.0},
     r"f_alpha must be in \(0, 1\], got 0.0"),
    ("slic", {"wpo": True}, "has a likelihood term"),
    ("sigmoid,sft", {"wpo": True}, "has a likelihood term"),
    ("orpo", {"wpo": True}, "has a likelihood term"),
    ("aot", {"wpo": True}, "wpo: it weighs pairs, but"),
    ("kto_pair", {"wpo": True}, "wpo: it weighs pairs, but"),
    ("sft", {"wpo": True}, "wpo: it weighs pairs, but"),
    ("sigmoid", {"wpo_clamp": True}, "wpo_clamp: is read with wpo only"),
    ("aot", {"wpo_clamp": True}, "wpo_clamp: is read with wpo only"),
    ("ipo", {"ld_alpha": 0.5}, "ld_alpha: it weighs the tokens of a pair, but ipo counts them"),
    ("sigmoid,sft", {"ld_alpha": 0.5}, "counts them"),
    ("sft", {"ld_alpha": 0.5}, "has no pairs"),
    ("sigmoid", {"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\], got 1.5"),
])
def test_a_variant_is_refused_with_its_reason_where_it_is_not_valid(spec, variant, reason):
    loss = find(spec)
    with pytest.raises(ValueError, match=reason):
        check_variants(loss, hyperparameters(loss), Variants(**variant))


@pytest.mark.parametrize("spec, variant", [
    ("hinge", {"reference_free": True}),
    ("ipo", {"reference_free": True}),
    ("sigmoid,sft", {"reference_free": True}),
    ("exo_pair", {"f_divergence": "forward_kl"}),
    ("rdpo,odpo", {"f_divergence": "alpha", "f_alpha": 0.3}),
    ("simpo", {"wpo": True}),
    ("ipo", {"wpo": True}),
    ("nca_pair", {"ld_alpha": 0.0}),
    ("sigmoid", {"wpo": True, "ld_alpha": 0.5, "f_divergence": "js"}),
])
def test_a_variant_is_allowed_where_it_is_valid(spec, variant):
    loss = find(spec)
    check_variants(loss, hyperparameters(loss), Variants(**variant))


def test_a_loss_with_wpo_keeps_its_name_its_tags_and_its_hyperparameters():
    from variants import with_wpo

    for loss in LOSSES.values():
        weighted = with_wpo(loss)
        assert weighted.__name__ == loss.__name__
        assert weighted.tags == loss.tags
        assert hyperparameters(weighted) == hyperparameters(loss)


# --- A run with WPO -------------------------------------------------------------------------------

@pytest.fixture
def one_word(tmp_path):
    """A file of answers that repeat one word, which a weak model soon finds more probable than the
    tokens that it samples."""
    rows = []
    for i, row in enumerate(make_rows(22)):
        sides = {"chosen": " the" * (2 + i % 5), "rejected": " the" * (7 + i % 4)}
        rows.append(row | sides)
    return write_jsonl(tmp_path / "one_word.jsonl", rows)


def test_a_run_logs_the_mean_weight_for_any_micro_batch_and_only_with_wpo(fit):
    runs = []
    for i, sizes in enumerate((
        {"micro_batch_size": 3}, {"micro_batch_size": 8}, {"attention": "packed"},
    )):
        _, metrics = fit(wpo=True, dtype="float64", out=f"out-{i}", **sizes)
        assert {row["split"] for row in metrics} == {"train", "eval"}
        assert all(0 < row["wpo/weight"] < math.inf for row in metrics)
        runs.append(metrics)
    for other in runs[1:]:
        assert not differences(runs[0][:1], other[:1], 1e-9)
        assert not differences(runs[0], other, 1e-5)

    _, plain = fit(out="plain")
    assert all("wpo/weight" not in row for row in plain)
    # At the first step policy and reference are equal, so each loss is log 2 times its weight.
    first = runs[0][0]
    assert first["loss"] == pytest.approx(math.log(2) * first["wpo/weight"], rel=1e-9)


def test_a_weak_model_has_weights_above_1_which_one_line_names_and_the_clamp_limits(
        fit, one_word, capsys):
    weak, _ = fit(loss="sft", dataset=one_word, max_steps=3, out="weak")
    capsys.readouterr()
    _, free = fit(model=weak, dataset=one_word, wpo=True, out="free")
    weight = free[0]["wpo/weight"]
    assert weight > 2 and free[0]["loss"] == pytest.approx(math.log(2) * weight, rel=1e-5)
    line, = mean_weight_lines(capsys)
    assert f"first step is {weight:.3g}, which multiplies the loss" in line
    assert "--wpo_clamp limits each weight to 1" in line

    _, clamped = fit(model=weak, dataset=one_word, wpo=True, wpo_clamp=True, out="clamped")
    weight = clamped[0]["wpo/weight"]
    assert 0.5 < weight <= 1 and clamped[0]["loss"] == pytest.approx(math.log(2) * weight, rel=1e-5)
    fit(model=weak, dataset=one_word, out="plain")
    assert mean_weight_lines(capsys) == []


def test_one_line_names_a_mean_weight_far_below_1(fit, capsys):
    sure, _ = fit(loss="sft", lr=0.03, epochs=6, out="sure")
    _, metrics = fit(model=sure, wpo=True, max_steps=2)
    line, = mean_weight_lines(capsys)
    weight = metrics[0]["wpo/weight"]
    assert weight < 0.5 and f"first step is {weight:.3g}, which scales the loss down" in line
    assert "--wpo_clamp" not in line


def mean_weight_lines(capsys):
    """The printed lines about the mean weight."""
    return [line for line in capsys.readouterr().out.splitlines() if "mean weight" in line]
