"""Losses of single answers with labels and of lists of K answers: identities and claims.

An identity ties each of them to a loss of pairs, whose claims test_losses.py has: with K = 2 for
lists, with one good and one bad answer for labels. r is β times the log-ratio of an answer. A
population is a few answers to one prompt, with every ranking in its probability, so an expected
loss is a sum. Everything is float64 unless a test says otherwise.
"""
import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from printed import Page, values_of

import train
from losses import (
    LOSSES,
    apo_zero,
    apo_zero_unpaired,
    bco,
    bco_pair,
    exo,
    exo_pair,
    find,
    hyperparameters,
    infonca,
    kind_of,
    kto,
    nca,
    nca_pair,
    needs_kl,
    needs_of,
    needs_reference,
    one_row,
    plackett_luce,
    sigmoid,
    softmax_dpo,
    start_state,
    update_bco_labels,
    update_delta,
)
from registry import Needs
from test_losses import call, random_answers, random_lists, tensor
from variants import Variants, check_variants

LABELS = ["kto", "apo_zero_unpaired", "bco"]
LISTS = ["plackett_luce", "softmax_dpo", "infonca", "nca", "exo"]
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def full_lists(size=6, answers=4, seed=0):
    """random_lists without padding, and log-ratios of at most 12, on both sides of 0."""
    lists = random_lists(size, seed, answers=answers)
    lists["mask"] = torch.ones_like(lists["mask"])
    lists["policy_logps"], lists["ref_logps"] = lists["policy_logps"] / 5, lists["ref_logps"] / 5
    return lists


def moderate_answers():
    answers = random_answers(12)
    return answers | {key: answers[key] / 5 for key in ("policy_logps", "ref_logps")}


def list_of(rewards, beta=1.0, scores=None):
    """One list whose implicit rewards are these, (1, K) each."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)[None]
    rows = {"policy_logps": rewards / beta - 30, "ref_logps": torch.full_like(rewards, -30.0)}
    rows["mask"] = torch.ones(rewards.shape, dtype=torch.bool)
    if scores is not None:
        rows["scores"] = torch.as_tensor(scores, dtype=torch.float64)[None]
    return rows


def as_pairs(lists):
    """The first two answers of each list as a pair."""
    pairs = {}
    for who in ("policy", "ref"):
        pairs[f"{who}_chosen_logps"] = lists[f"{who}_logps"][:, 0]
        pairs[f"{who}_rejected_logps"] = lists[f"{who}_logps"][:, 1]
    return pairs


def labeled(r, label, beta=1.0):
    """Answers with implicit rewards r, all of one label."""
    r = torch.as_tensor(r, dtype=torch.float64)
    return {"policy_logps": r / beta - 20, "ref_logps": torch.zeros_like(r) - 20,
            "labels": torch.full(r.shape, label)}


def gradient(name, rows, **hyper):
    """∂ΣL/∂ policy_logps"""
    leaf = rows["policy_logps"].clone().requires_grad_()
    total = call(name, rows | {"policy_logps": leaf}, **hyper).sum()
    return torch.autograd.grad(total, leaf)[0]


# --- What a loss asks of a row --------------------------------------------------------------------

def test_the_arguments_of_a_loss_tell_its_kind():
    kinds = {}
    for name, function in LOSSES.items():
        if name == function.__name__:
            kinds.setdefault(kind_of(function), []).append(name)
    assert kinds["labels"] == LABELS and kinds["lists"] == LISTS
    assert all(needs_reference(LOSSES[name]) for name in LABELS + LISTS)


@pytest.mark.parametrize("spec, needs", [
    ("sigmoid", Needs()),
    ("sft", Needs(answers=("chosen",))),
    ("npo", Needs(answers=("rejected",))),
    ("npo,sft", Needs()),
    ("odpo", Needs(scores=True, ordered_scores=True)),
    ("rpo_sq", Needs(scores=True)),
    ("kto", Needs("labels", ())),
    ("kto,bco", Needs("labels", ())),
    ("plackett_luce", Needs("lists", (), ranked=True)),
    ("softmax_dpo", Needs("lists", (), one_best=True)),
    ("plackett_luce,softmax_dpo", Needs("lists", (), ranked=True)),
    ("infonca", Needs("lists", (), scores=True)),
    ("infonca,softmax_dpo", Needs("lists", (), scores=True, one_best=True)),
    ("exo:0.5,plackett_luce", Needs("lists", (), scores=True, ranked=True)),
])
def test_the_needs_of_a_loss_are_those_of_its_signature_and_its_tags(spec, needs):
    assert needs_of(find(spec)) == needs


@pytest.mark.parametrize("spec, message", [
    ("sigmoid,kto", "sigmoid takes pairs, kto takes labels"),
    ("plackett_luce,sft", "plackett_luce takes lists, sft takes pairs"),
    ("bco,nca:0.5", "bco takes labels, nca takes lists"),
])
def test_a_sum_has_losses_of_one_kind(spec, message):
    with pytest.raises(ValueError, match=f"rows of one kind, but {message}"):
        find(spec)


def test_a_sum_of_losses_of_one_kind_adds_their_weighted_losses():
    lists, answers = full_lists(), random_answers()
    mixed = find("infonca:0.5,plackett_luce:2")(**lists, beta=0.3)
    expected = 0.5 * infonca(**lists, beta=0.3) + 2 * call("plackett_luce", lists, beta=0.3)
    assert torch.allclose(mixed, expected, **EXACT)
    mixed = find("kto,bco:3")(**answers, kl=2.0, delta=0.4)
    expected = kto(**answers, kl=2.0) + 3 * bco(**answers, delta=0.4)
    assert torch.allclose(mixed, expected, **EXACT)


def test_kl_is_computed_in_every_step_and_delta_is_carried_from_step_to_step():
    assert needs_kl(kto) and needs_kl(find("kto,bco")) and not needs_kl(bco)
    assert start_state(kto) == {} and kto.update is None
    assert start_state(bco) == start_state(find("kto,bco")) == {"delta": 0.0}
    assert find("kto,bco").update is update_bco_labels


@pytest.mark.parametrize("name", LABELS + LISTS)
@pytest.mark.parametrize("variant", [
    {"reference_free": True}, {"f_divergence": "js"}, {"wpo": True}, {"ld_alpha": 0.5},
])
def test_a_variant_of_losses_of_pairs_is_refused_for_the_other_kinds(name, variant):
    flag, = variant
    with pytest.raises(ValueError, match=f"{flag}: .*{name}"):
        check_variants(LOSSES[name], hyperparameters(LOSSES[name]), Variants(**variant))


@pytest.mark.parametrize("name, argument", [("kto", "labels"), ("exo", "mask")])
def test_labels_and_masks_of_another_type_than_bool_are_refused(name, argument):
    rows = (random_answers if name == "kto" else random_lists)()
    with pytest.raises(ValueError, match=f"{argument} must be a tensor of bool, got torch.float32"):
        call(name, rows | {argument: rows[argument].float()})


@pytest.mark.parametrize("spec", [*LOSSES, "sigmoid,sft", "infonca,nca"])
def test_one_row_has_all_arguments_of_a_loss(spec):
    loss = find(spec)
    given = {"beta": 0.1} if "beta" in hyperparameters(loss) else {}
    assert loss(**one_row(loss), **given).shape == (1,)


@pytest.mark.parametrize("loss, rate", [("kto", 5e-7), ("plackett_luce", 5e-7), ("sft", 1e-5)])
def test_the_learning_rate_of_a_loss_of_labels_or_lists_is_that_of_preferences(loss, rate):
    flags = ["--loss", loss, "--model", "m", "--dataset", "d"]
    assert train.parse_args(flags)[0].lr == rate
    adapter = train.parse_args([*flags, "--lora_rank", "8"])[0]
    assert adapter.lr == pytest.approx(10 * rate)


# --- The pages ------------------------------------------------------------------------------------

HYPER = {
    "kto": dict(beta=0.3, desirable_weight=1.3, undesirable_weight=0.7, kl=2.0),
    "apo_zero_unpaired": dict(beta=0.3, desirable_weight=1.3, undesirable_weight=0.7),
    "bco": dict(beta=0.3, delta=0.4),
    "plackett_luce": dict(beta=0.3),
    "softmax_dpo": dict(beta=0.3),
    "infonca": dict(beta=0.3, nca_alpha=0.7),
    "nca": dict(beta=0.3, nca_alpha=0.7),
    "exo": dict(beta=0.3, exo_beta_r=0.7),
}


def page_of(name, rows):
    function = LOSSES[name]
    return Page(function, values_of(function, rows, hyperparameters(function) | HYPER[name]))


def plackett_luce_in_words(rows):
    """β (Σ over the choices i <= k of the probability of y_k) − β"""
    r = 0.3 * (rows["policy_logps"] - rows["ref_logps"])
    chosen = torch.zeros_like(r)
    for first in range(r.shape[1]):
        chosen[:, first:] += r[:, first:].softmax(-1)
    return 0.3 * (chosen - 1)


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("label", ["D", "U"])
def test_every_form_that_the_page_of_a_loss_of_labels_prints_is_the_loss_and_its_gradient(
    name, label,
):
    rows, page = moderate_answers(), page_of(name, moderate_answers())
    rows["labels"][:] = label == "D"
    forms, slopes = page.losses(label), page.gradient("ℓ", label)
    assert forms and slopes
    for form in forms:
        assert torch.allclose(call(name, rows, **HYPER[name]), form, **EXACT)
    for form in slopes:
        assert torch.allclose(gradient(name, rows, **HYPER[name]), form, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LISTS)
def test_every_form_that_the_page_of_a_loss_of_lists_prints_is_the_loss_and_its_gradient(name):
    rows = full_lists()
    page = page_of(name, rows)
    forms, slopes = page.losses(), page.gradient("ℓ_k")
    assert forms
    for form in forms:
        assert torch.allclose(call(name, rows, **HYPER[name]), form[:, 0, 0], **EXACT)
    first = 0
    if name == "plackett_luce":
        slopes = [plackett_luce_in_words(rows)[..., None]]
    if name == "softmax_dpo":  # the page prints that of y_1 on its own
        first = 1
        best, = page.gradient("ℓ_1")
        found = gradient(name, rows, **HYPER[name])[:, :1]
        assert torch.allclose(found, best[..., 0], rtol=1e-12, atol=1e-14)
    assert slopes
    for form in slopes:
        found = gradient(name, rows, **HYPER[name])
        assert torch.allclose(found[:, first:], form[:, first:, 0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name, right, wrong", [
    ("kto", "σ(βz − r)", "σ(βz + r)"),
    ("plackett_luce", "e^(r_j) − r_k", "e^(r_j) − r_j"),
    ("nca", "1/K Σ_k", "1/2 Σ_k"),
    ("exo", "q_k log[q_k/p_k]", "p_k log[p_k/q_k]"),
])
def test_a_wrong_formula_on_a_page_of_labels_or_lists_is_found(name, right, wrong):
    def changed():
        pass

    changed.__doc__ = inspect.getdoc(LOSSES[name]).replace(right, wrong, 1)
    assert changed.__doc__ != inspect.getdoc(LOSSES[name])
    is_list = name in LISTS
    rows = full_lists() if is_list else moderate_answers() | {"labels": torch.ones(12).bool()}
    hyper = hyperparameters(LOSSES[name]) | HYPER[name]
    forms = Page(changed, values_of(LOSSES[name], rows, hyper)).losses(None if is_list else "D")
    loss = call(name, rows, **HYPER[name])
    assert not all(torch.allclose(loss, form.reshape(loss.shape[0], -1)[:, 0]) for form in forms)


# --- Labels: values and identities ----------------------------------------------------------------

@pytest.mark.parametrize("name, good, bad", [
    ("kto", 1.3 / 2, 0.7 / 2),
    ("apo_zero_unpaired", 1.3 / 2, 0.7 / 2),
    ("bco", math.log(2), math.log(2)),
])
def test_value_of_a_loss_of_labels_where_policy_equals_reference(name, good, bad):
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7} if name != "bco" else {}
    for label, expected in ((True, good), (False, bad)):
        assert call(name, labeled([0.0], label), **weights).item() == pytest.approx(expected)


def test_kto_at_a_reference_point_of_0_or_below_is_apo_zero_unpaired():
    answers, weights = random_answers(), {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    expected = apo_zero_unpaired(**answers, **weights)
    for kl in (0.0, -5.0, torch.tensor(0.0), torch.tensor(-5.0)):
        assert torch.equal(kto(**answers, kl=kl, **weights), expected)


def test_kto_compares_a_log_ratio_with_kl_so_that_a_shift_of_both_changes_nothing():
    answers = random_answers()
    shifted = answers | {"policy_logps": answers["policy_logps"] + 3.0}
    assert torch.allclose(kto(**answers, kl=2.0), kto(**shifted, kl=5.0), **EXACT)
    for kl in (2.0, torch.tensor(2.0, dtype=torch.float64)):
        assert torch.equal(kto(**answers, kl=kl), kto(**answers, kl=2.0))


def test_a_good_and_a_bad_answer_of_one_log_ratio_have_kto_losses_that_add_up_to_1():
    r = torch.linspace(-8, 8, 9, dtype=torch.float64)
    good, bad = [kto(**labeled(r, label), beta=1.0, kl=1.5) for label in (True, False)]
    assert torch.allclose(good + bad, torch.ones_like(r), **EXACT)
    assert (good.diff() < 0).all() and (bad.diff() > 0).all()


@pytest.mark.parametrize("name, of_pairs, state", [
    ("bco", bco_pair, {"delta": 0.4}), ("apo_zero_unpaired", apo_zero, {}), ("kto", apo_zero, {}),
])
def test_a_good_and_a_bad_answer_are_together_the_loss_of_a_pair(name, of_pairs, state):
    lists = full_lists(answers=2)
    pairs = as_pairs(lists)
    both = {"policy_logps": lists["policy_logps"].T.flatten(),
            "ref_logps": lists["ref_logps"].T.flatten(), "labels": torch.arange(12) < 6}
    losses = call(name, both, **state, beta=0.3)
    expected = of_pairs(**pairs, **state, beta=0.3)
    assert torch.allclose(losses[:6] + losses[6:], expected, **EXACT)


@pytest.mark.parametrize("name", LABELS)
def test_a_batch_of_one_label_is_the_part_of_a_mixed_batch_with_that_label(name):
    answers = random_answers()
    whole = call(name, answers)
    for label in (True, False):
        chosen = answers["labels"] == label
        part = {key: value[chosen] for key, value in answers.items()}
        assert torch.allclose(call(name, part), whole[chosen], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name, argument", [("kto", "kl"), ("bco", "delta")])
def test_no_gradient_goes_through_the_reference_point_of_kto_or_the_shift_of_bco(name, argument):
    value = tensor(2.0, grad=True)[0]
    policy = random_answers()["policy_logps"].requires_grad_()
    loss = call(name, random_answers() | {"policy_logps": policy}, **{argument: value}).sum()
    slopes = torch.autograd.grad(loss, [policy, value], allow_unused=True)
    assert slopes[0].abs().min() > 0 and slopes[1] is None


def test_the_weights_of_kto_and_of_bco_multiply_the_loss_of_an_answer():
    answers = random_answers()
    factor = torch.where(answers["labels"], 1.3, 0.7)
    weighted = kto(**answers, kl=2.0, desirable_weight=1.3, undesirable_weight=0.7)
    assert torch.allclose(weighted, factor * kto(**answers, kl=2.0), rtol=1e-6)
    weights = torch.rand(6, dtype=torch.float64)
    assert torch.equal(bco(**answers, weights=weights), weights * bco(**answers))


# --- Labels: claims -------------------------------------------------------------------------------

@pytest.mark.parametrize("label", [True, False])
def test_the_gradient_of_kto_is_largest_at_its_reference_point_and_vanishes_at_both_ends(label):
    """Proposition 4.1 (v1): it does not learn from bad answers of high reward or good ones of low.
    BCO keeps the full gradient for an answer on the wrong side."""
    def slopes(name, *log_ratios, **state):
        return gradient(name, labeled(tensor(*log_ratios), label), beta=0.1, **state)

    sign = -1 if label else 1
    near, there, beyond, low, high = slopes("kto", 15.0, 20.0, 25.0, -5e3, 5e3, kl=20.0)
    assert there.item() == pytest.approx(sign * 0.1 / 4)
    assert max(abs(near), abs(beyond)) < abs(there) and max(abs(low), abs(high)) < 1e-200
    wrong, right = slopes("bco", sign * 5e3, -sign * 5e3, delta=0.3)
    assert wrong.item() == pytest.approx(sign * 0.1) and abs(right) < 1e-200


@pytest.mark.parametrize("share, weights", [(0.75, (1.0, 1.0)), (0.4, (2.0, 1.0))])
def test_contradictory_labels_drive_kto_to_the_weighted_majority_and_bco_settles_at_their_logit(
    share, weights,
):
    """An answer is called good with this probability. z = 0, as at the start."""
    def slope(name, r, **hyper):
        rows = [labeled(tensor(r), label) for label in (True, False)]
        good, bad = [gradient(name, row, beta=1.0, **hyper).item() for row in rows]
        return share * good + (1 - share) * bad

    hyper = {"desirable_weight": weights[0], "undesirable_weight": weights[1]}
    assert all(slope("kto", r, **hyper) < 0 for r in (-20.0, 0.0, 20.0))
    settled = 0.4 + math.log(share / (1 - share))
    below, there, above = [slope("bco", settled + x, delta=0.4) for x in (-0.1, 0.0, 0.1)]
    assert below < 0 < above and abs(there) < 1e-15


def test_as_many_good_as_bad_labels_of_an_answer_leave_kto_where_it_is():
    """Theorem 4.3 (v1)."""
    for r in (-3.0, 0.0, 3.0):
        good, bad = [gradient("kto", labeled(tensor(r), label)) for label in (True, False)]
        assert torch.allclose(good, -bad, **EXACT)


def test_the_shift_of_bco_is_the_middle_of_both_means_however_uneven_the_labels_are():
    state, means = start_state(bco), {"rewards/chosen": 3.0, "rewards/rejected": -1.0}
    deltas = []
    for _ in range(200):
        state = update_bco_labels(state, means, beta=0.1)
        deltas.append(state["delta"])
    assert deltas[0] == pytest.approx(update_delta(0.0, 3.0, -1.0))  # as in `bco_pair`
    assert deltas[1] == pytest.approx(update_delta(deltas[0], 3.0, -1.0))
    assert deltas[-1] == pytest.approx(1.0)


def test_a_step_without_answers_of_a_label_keeps_the_average_of_that_label():
    """With one answer in a step, each step has one label; δ settles in the middle all the same."""
    state = start_state(bco)
    for step in range(400):
        name, value = ("rewards/chosen", 3.0) if step % 4 else ("rewards/rejected", -1.0)
        state = update_bco_labels(state, {name: value}, beta=0.1)
    assert state["delta"] == pytest.approx(1.0, abs=1e-3)
    before = dict(state)
    after = update_bco_labels(state, {}, beta=0.1)
    assert after == pytest.approx(before) and state == before


# --- Lists: identities ----------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["plackett_luce", "softmax_dpo", "infonca"])
def test_two_answers_are_dpo_of_the_pair(name):
    """Margins are at most 20: beyond, F.softplus(x) of the loss of pairs is x, 2e-9 less."""
    lists = full_lists(size=40, answers=2)
    lists["scores"] = tensor(1.0, 0.0).expand(40, 2)
    one_hot = {"nca_alpha": 1e-3} if name == "infonca" else {}
    pairs = as_pairs(lists)
    for beta in (0.01, 0.3, 0.8):
        found = call(name, lists, beta=beta, **one_hot)
        assert torch.allclose(found, sigmoid(**pairs, beta=beta), **EXACT)
        slopes = gradient(name, lists, beta=beta, **one_hot)
        leaf = pairs["policy_chosen_logps"].clone().requires_grad_()
        dpo = sigmoid(**pairs | {"policy_chosen_logps": leaf}, beta=beta).sum()
        expected, = torch.autograd.grad(dpo, leaf)
        assert torch.allclose(slopes, torch.stack([expected, -expected], 1), **EXACT)


def test_two_answers_with_one_of_score_1_are_nca_of_the_pair():
    lists = full_lists(size=40, answers=2) | {"scores": tensor(1.0, 0.0).expand(40, 2)}
    expected = nca_pair(**as_pairs(lists), beta=0.3)
    assert torch.allclose(nca(**lists, beta=0.3, nca_alpha=1e-3), expected, **EXACT)


def test_two_answers_are_exo_of_the_pair_whose_smoothing_follows_from_the_scores():
    lists = full_lists(size=40, answers=2)
    for gap in (0.1, 1.0, 3.0):
        lists["scores"] = tensor(2.0 + gap, 2.0).expand(40, 2)
        epsilon = 1 / (1 + math.exp(gap / 0.7))
        expected = exo_pair(**as_pairs(lists), beta=0.3, label_smoothing=epsilon)
        assert torch.allclose(exo(**lists, beta=0.3, exo_beta_r=0.7), expected, **EXACT)


@pytest.mark.parametrize("beta", [0.02, 0.3])
def test_the_probabilities_of_all_rankings_add_up_to_1(beta):
    """exp(−L) is the probability of the ranking, in the model of Plackett and Luce."""
    lists = full_lists(size=1)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    rankings = {key: value[0][orders] for key, value in lists.items() if key != "scores"}
    total = torch.exp(-plackett_luce(**rankings, beta=beta)).sum()
    assert len(orders) == 24 and total.item() == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize("answers", [2, 3, 6])
def test_plackett_luce_is_softmax_dpo_plus_plackett_luce_of_the_rest(answers):
    lists = full_lists(answers=answers)
    lists.pop("scores")
    rest = {key: value[:, 1:] for key, value in lists.items()}
    expected = softmax_dpo(**lists, beta=0.3) + plackett_luce(**rest, beta=0.3)
    assert torch.allclose(plackett_luce(**lists, beta=0.3), expected, **EXACT)


@pytest.mark.parametrize("answers", [2, 3, 6])
def test_infonca_with_one_answer_of_probability_1_is_softmax_dpo(answers):
    lists = full_lists(answers=answers)
    lists["scores"] = (torch.arange(answers) == 0).double().expand(6, answers)
    expected = call("softmax_dpo", lists, beta=0.3)
    assert torch.allclose(infonca(**lists, beta=0.3, nca_alpha=1e-3), expected, **EXACT)


def test_softmax_dpo_is_also_called_sdpo():
    assert LOSSES["sdpo"] is softmax_dpo


@pytest.mark.parametrize("answers", [1, 2, 3, 6])
def test_values_of_losses_of_lists_where_policy_equals_reference(answers):
    lists = full_lists(answers=answers)
    lists["policy_logps"] = lists["ref_logps"]
    log_k = math.log(answers)
    p = lists["scores"].softmax(-1)
    expected = {
        "plackett_luce": [math.lgamma(answers + 1)] * 6,
        "softmax_dpo": [log_k] * 6,
        "infonca": [log_k] * 6,
        "nca": [2 * math.log(2)] * 6,
        "exo": (-log_k - (lists["scores"] / 0.5).log_softmax(-1).mean(-1)).tolist(),
    }
    assert p.shape == (6, answers)
    for name in LISTS:
        assert call(name, lists).tolist() == pytest.approx(expected[name], abs=1e-12)


def test_exo_is_the_reverse_kl_and_infonca_the_forward_kl_plus_the_entropy_of_the_scores():
    lists = full_lists()
    log_q = (0.3 * (lists["policy_logps"] - lists["ref_logps"])).log_softmax(-1)
    log_p = (lists["scores"] / 0.7).log_softmax(-1)
    reverse = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    forward = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert torch.allclose(exo(**lists, beta=0.3, exo_beta_r=0.7), reverse, **EXACT)
    assert torch.allclose(infonca(**lists, beta=0.3, nca_alpha=0.7), forward + entropy, **EXACT)


@pytest.mark.parametrize("name", LISTS)
def test_a_constant_for_all_answers_of_a_prompt_changes_no_loss_but_nca(name):
    lists = random_lists()
    shift = torch.arange(6)[:, None] * 2.0
    shifted = lists | {"policy_logps": lists["policy_logps"] + shift}
    same = torch.allclose(call(name, lists), call(name, shifted), **EXACT)
    assert same == (name != "nca")
    sums = gradient(name, lists).sum(-1)
    assert (sums.abs().max() < 1e-12) == (name != "nca")


@pytest.mark.parametrize("name", LISTS)
def test_the_order_of_the_answers_matters_only_where_a_loss_reads_an_order(name):
    """plackett_luce reads all of it, softmax_dpo the first place, the others read scores."""
    lists = full_lists()
    swapped = {key: value[:, [0, 2, 1, 3]] for key, value in lists.items()}
    assert torch.allclose(call(name, lists), call(name, swapped)) == (name != "plackett_luce")
    moved = {key: value[:, [1, 0, 2, 3]] for key, value in lists.items()}
    reads_first = name in ("plackett_luce", "softmax_dpo")
    assert torch.allclose(call(name, lists), call(name, moved)) != reads_first


# --- Lists of different lengths -------------------------------------------------------------------

GARBAGE = [0.0, 1e30, -math.inf, math.inf, math.nan]


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_list_has_the_loss_of_its_own_answers_whatever_the_padding_contains(
    name, garbage, dtype,
):
    lists = random_lists(8, answers=5, dtype=dtype)
    counts = torch.tensor([5, 2, 3, 4, 2, 5, 1, 3])
    lists["mask"] = torch.arange(5) < counts[:, None]
    for key in ("policy_logps", "ref_logps", "scores"):
        lists[key] = torch.where(lists["mask"], lists[key], garbage)
    losses, slopes = call(name, lists), gradient(name, lists)
    assert losses.dtype == dtype and (slopes[~lists["mask"]] == 0).all()
    for row, count in enumerate(counts):
        alone = {key: value[row:row + 1, :count] for key, value in lists.items()}
        tolerance = {"rtol": 10 * torch.finfo(dtype).eps, "atol": 10 * torch.finfo(dtype).eps}
        assert torch.allclose(losses[row:row + 1], call(name, alone), **tolerance)
        assert torch.allclose(slopes[row:row + 1, :count], gradient(name, alone), **tolerance)


@pytest.mark.parametrize("name", LISTS)
def test_an_answer_may_be_missing_anywhere_but_in_the_first_place(name):
    lists = full_lists(answers=5)
    lists["mask"][:] = tensor(1, 0, 1, 1, 0).bool()
    without = {key: value[:, [0, 2, 3]] for key, value in lists.items()}
    assert torch.allclose(call(name, lists), call(name, without), **EXACT)
    slopes = gradient(name, lists)
    assert torch.allclose(slopes[:, [0, 2, 3]], gradient(name, without), **EXACT)
    assert (slopes[:, [1, 4]] == 0).all()


@pytest.mark.parametrize("name", ["plackett_luce", "softmax_dpo", "infonca", "exo"])
def test_a_list_of_one_answer_teaches_nothing(name):
    lists = random_lists(3, answers=4)
    lists["mask"] = torch.arange(4).expand(3, 4) < 1
    assert call(name, lists).tolist() == [0.0] * 3 and (gradient(name, lists) == 0).all()


# --- Numbers far from 0 ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", LABELS + LISTS)
@pytest.mark.parametrize("far", list(itertools.product([-1e4, 0.0, 1e4], repeat=3)))
def test_loss_and_gradient_of_log_ratios_of_1e4_are_finite_and_right_in_float32(name, far):
    """β = 0.5, so that rewards are up to 5000. In float64 they are exact, and finite too."""
    logps, zeros = tensor(*far) - 40, torch.full((3,), -40.0, dtype=torch.float64)
    rows = {"policy_logps": logps, "ref_logps": zeros, "labels": torch.tensor([True, False, True])}
    if name in LISTS:
        rows = {"policy_logps": logps[None], "ref_logps": zeros[None], "scores": tensor(2, 1, 0),
                "mask": torch.ones(1, 3, dtype=torch.bool)}
        rows["scores"] = rows["scores"][None].double()
    found = {}
    for dtype in (torch.float32, torch.float64):
        cast = {}
        for key, value in rows.items():
            cast[key] = value.to(dtype) if value.is_floating_point() else value
        found[dtype] = torch.cat([call(name, cast, beta=0.5).flatten(),
                                  gradient(name, cast, beta=0.5).flatten()])
        assert found[dtype].isfinite().all() and found[dtype].dtype == dtype
    assert torch.allclose(*[value.double() for value in found.values()], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("behind", [95.0, -110.0])
def test_softmax_dpo_is_right_where_exp_sum_and_log_one_after_another_are_not(behind):
    """In float32, with one rejected answer: the loss is sp(behind) as it is for DPO."""
    lists = list_of([0.0, behind, behind - 1])
    lists = {key: value.float() if key != "mask" else value for key, value in lists.items()}
    expected = max(behind, 0) + math.log1p(math.exp(-1)) * (behind > 0)
    assert softmax_dpo(**lists).item() == pytest.approx(expected, rel=1e-5)
    assert gradient("softmax_dpo", lists).isfinite().all()


# --- Lists: claims about a population -------------------------------------------------------------

BETA = 0.7
REWARD = tensor(1.2, -0.4, 0.3, 2.0)
REFERENCE = tensor(0.1, 0.4, 0.2, 0.3).log()
OPTIMAL = (REFERENCE + REWARD / BETA).log_softmax(0)  # eq. 4 of the DPO paper


def ranking_probability(order, reward):
    """By the rule of Plackett and Luce: choose the best, then the best of the rest, and so on."""
    probability = 1.0
    for place in range(len(order)):
        probability = probability * reward[order[place:]].softmax(0)[0]
    return probability


def expected_gradient(name, policy, orders, weights, **hyper):
    """(4,): the gradient of the expected loss over these lists, by the policy's log-probs."""
    logps = policy.clone().requires_grad_()
    rows = {"policy_logps": logps[orders], "ref_logps": REFERENCE[orders],
            "mask": torch.ones_like(orders, dtype=torch.bool), "scores": REWARD[orders]}
    expected = (weights * call(name, rows, beta=BETA, **hyper)).sum()
    return torch.autograd.grad(expected, logps)[0]


@pytest.mark.parametrize("answers", [2, 3, 4])
def test_plackett_luce_on_rankings_by_the_true_reward_has_the_optimal_policy(answers):
    """All 24 rankings of four answers, and all rankings of all pairs and triples of them."""
    orders = torch.tensor(list(itertools.permutations(range(4), answers)))
    weights = torch.stack([ranking_probability(order, REWARD) for order in orders])
    assert weights.sum().item() == pytest.approx(math.comb(4, answers))
    start = expected_gradient("plackett_luce", REFERENCE, orders, weights)
    there = expected_gradient("plackett_luce", OPTIMAL, orders, weights)
    assert there.norm() < 1e-14 < 0.1 < start.norm()


def test_softmax_dpo_on_the_best_of_four_by_the_true_reward_has_the_optimal_policy():
    orders = torch.tensor([[k, *sorted({0, 1, 2, 3} - {k})] for k in range(4)])
    weights = REWARD.softmax(0)
    there = expected_gradient("softmax_dpo", OPTIMAL, orders, weights)
    start = expected_gradient("softmax_dpo", REFERENCE, orders, weights)
    assert there.norm() < 1e-14 < 0.1 < start.norm()


@pytest.mark.parametrize("name, hyper", [
    ("infonca", {"nca_alpha": 1.0}), ("exo", {"exo_beta_r": 1.0}),
])
def test_infonca_and_exo_on_the_true_reward_have_the_optimal_policy(name, hyper):
    """For scores that are the reward, at temperature 1: the rewards r may differ by a constant."""
    orders, weights = torch.arange(4)[None], tensor(1.0)
    there = expected_gradient(name, OPTIMAL, orders, weights, **hyper)
    start = expected_gradient(name, REFERENCE, orders, weights, **hyper)
    assert there.norm() < 1e-14 < 0.05 < start.norm()
    far = expected_gradient(name, OPTIMAL + 2.0, orders, weights, **hyper)
    assert far.norm() < 1e-14


def test_nca_settles_where_the_ratio_is_k_times_the_target_so_the_policy_is_normalized():
    """β = 1, and K answers that are equally probable under π_ref: π* is p itself."""
    scores = [1.2, -0.4, 0.3, 2.0]
    target = tensor(*scores).softmax(0)
    ratio = torch.log(4 * target)
    assert gradient("nca", list_of(ratio, scores=scores), beta=1.0).norm() < 1e-15
    assert torch.allclose(0.25 * ratio.exp(), target) and target.sum().item() == pytest.approx(1)
    assert gradient("nca", list_of(ratio + 0.1, scores=scores), beta=1.0).min() > 0


def test_infonca_lets_the_best_answer_fall_and_nca_draws_it_above_the_reference():
    """All four answers fell by 3 nats. InfoNCA sees nothing wrong with that, and NCA does."""
    scores = [1.0, 0.0, 0.0, 0.0]
    fallen = list_of(torch.log(4 * tensor(*scores).softmax(0)) - 3.0, scores=scores)
    assert gradient("infonca", fallen, beta=1.0).norm() < 1e-14
    assert gradient("nca", fallen, beta=1.0).max() < 0


def test_plackett_luce_teaches_the_order_of_the_rest_and_softmax_dpo_does_not():
    lists = list_of([0.0, 0.0, 0.0, 0.0])
    ranked, one_best = gradient("plackett_luce", lists)[0], gradient("softmax_dpo", lists)[0]
    assert (ranked.diff() > 0).all() and torch.equal(one_best[1:], one_best[1].expand(3))


def test_exo_gives_an_answer_that_the_policy_excludes_no_gradient_and_infonca_pulls_it_back():
    lists = list_of([-60.0, 0.0, 0.0], scores=[1.0, 0.0, 0.0])
    assert gradient("exo", lists, beta=1.0)[0, 0].abs() < 1e-20
    assert gradient("infonca", lists, beta=1.0)[0, 0] < -0.5


def test_a_loss_of_lists_refuses_tensors_of_pairs_and_says_the_shape_that_it_takes():
    with pytest.raises(ValueError, match=r"of one shape \(B, K\), got .*\(2,\)"):
        plackett_luce(torch.zeros(2), torch.zeros(2), torch.ones(2, dtype=torch.bool))
