"""The claims of the papers, in the order of losses.py.

Letters as in losses.py: w, l the policy's log-probs of chosen and rejected, w0, l0 the reference's,
a = w − w0, b = l − l0, h = a − b. Everything is float64 unless a test says otherwise.
"""
import ast
import enum
import inspect
import itertools
import math
import pathlib
import re

import pytest
import torch
import torch.nn.functional as F
from printed import Page, values_of

import registry
from losses import (
    LOSSES,
    alpha_dpo,
    alphapo,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    beta_dpo,
    bpo,
    bpo_hinge,
    cal_dpo,
    capped_exp,
    chipo,
    compares_answers,
    discopop,
    dpo_shift,
    dpop,
    dr_dpo,
    exo_pair,
    f_divergence_score,
    find,
    hinge,
    hyperparameters,
    hypo,
    ipo,
    kind_of,
    kto_pair,
    nca_pair,
    needs_reference,
    needs_rejected,
    npo,
    odpo,
    orpo,
    rdpo,
    repo,
    robust,
    rpo_bwd_kl,
    rpo_fwd_kl,
    rpo_sq,
    score_margin,
    sft,
    sides_of,
    sigmoid,
    simper,
    simpo,
    slic,
    sppo_hard,
    start_state,
    tensor_arguments,
    update_delta,
    update_gap,
)

NAMES = [name for name, function in LOSSES.items() if name == function.__name__]
OF_PAIRS = [name for name in NAMES if kind_of(LOSSES[name]) == "pairs"]
PAIRWISE = [name for name in NAMES if compares_answers(LOSSES[name])]
WITH_REFERENCE = [name for name in OF_PAIRS if needs_reference(LOSSES[name])]
MARGIN = [name for name in NAMES if "margin" in LOSSES[name].tags]
# The loss of a pair depends on the others.
BATCH_COUPLED = {"aot", "aot_unpaired", "kto_pair", "beta_dpo", "dr_dpo"}
TOKEN_MEAN = {"cpo", "orpo", "sft"}  # it does, unless they are given mean_chosen_length


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def random_pairs(size=6, seed=0, dtype=torch.float64):
    """{argument: (B,)}: log-probs between −60 and −1, lengths, and scores."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"):
        pairs[f"{name}_logps"] = -1 - 59 * torch.rand(size, generator=generator, dtype=dtype)
    for name in ("chosen_lengths", "rejected_lengths"):
        pairs[name] = torch.randint(1, 40, (size,), generator=generator)
    worse = torch.randn(size, generator=generator, dtype=dtype)
    better = worse + 0.1 + torch.rand(size, generator=generator, dtype=dtype)
    return pairs | {"rejected_scores": worse, "chosen_scores": better}


def random_answers(size=6, seed=0, dtype=torch.float64):
    """{argument: (N,)} of a loss of answers with labels."""
    pairs = random_pairs(size, seed, dtype)
    return {
        "policy_logps": pairs["policy_chosen_logps"],
        "ref_logps": pairs["ref_chosen_logps"],
        "labels": torch.arange(size) % 3 > 0,
    }


def random_lists(size=6, seed=0, dtype=torch.float64, answers=4):
    """{argument: (B, K)} of a loss of lists, where every third list has an answer less than K."""
    pairs = random_pairs(size * answers, seed, dtype)
    last_of_third = (torch.arange(size)[:, None] % 3 == 1) & (torch.arange(answers) == answers - 1)
    return {
        "policy_logps": pairs["policy_chosen_logps"].view(size, answers),
        "ref_logps": pairs["ref_chosen_logps"].view(size, answers),
        "mask": ~last_of_third,
        "scores": pairs["rejected_scores"].view(size, answers),
    }


RANDOM = {"pairs": random_pairs, "labels": random_answers, "lists": random_lists}


def random_rows(name, size=6, seed=0, dtype=torch.float64):
    """The tensors of random pairs, answers or lists, whichever the loss of that name takes."""
    return RANDOM[kind_of(LOSSES[name])](size, seed, dtype)


def call(name, tensors, **hyper):
    """The loss of that name, given those of the tensors that it takes."""
    return call_function(LOSSES[name], tensors, **hyper)


def call_function(function, tensors, **hyper):
    given = {key: tensors[key] for key in tensor_arguments(function) if key in tensors}
    return function(**given, **hyper)


def call_sum(spec, tensors, **hyper):
    return call_function(find(spec), tensors, **hyper)


def pair(a, b, **others):
    """Pairs with log-ratios a and b, the reference at −20 and −30, lengths 1, scores 1 and 0."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    zero = torch.zeros_like(a + b)
    pairs = {
        "policy_chosen_logps": a - 20 + zero,
        "policy_rejected_logps": b - 30 + zero,
        "ref_chosen_logps": zero - 20,
        "ref_rejected_logps": zero - 30,
        "chosen_lengths": zero + 1,
        "rejected_lengths": zero + 1,
        "chosen_scores": zero + 1,
        "rejected_scores": zero,
    }
    return pairs | others


def of(function, a, b=0.0, **hyper):
    """The loss at log-ratios a and b."""
    return call(function.__name__, pair(a, b), **hyper)


def gradients(function, tensors, **hyper):
    """(∂ΣL/∂w, ∂ΣL/∂l)"""
    leaves = {}
    for name in tensor_arguments(function):
        if name in tensors:
            leaves[name] = tensors[name].clone().requires_grad_(name.startswith("policy"))
    total = function(**leaves, **hyper).sum()
    answers = [leaves["policy_chosen_logps"], leaves["policy_rejected_logps"]]
    return torch.autograd.grad(total, answers)


def slope(function, h, **hyper):
    """∂L/∂h"""
    h = torch.as_tensor(h, dtype=torch.float64).clone().requires_grad_()
    return torch.autograd.grad(of(function, h, **hyper).sum(), h)[0]


def ratios(t):
    a = t["policy_chosen_logps"] - t["ref_chosen_logps"]
    b = t["policy_rejected_logps"] - t["ref_rejected_logps"]
    return a, b


def margin(t):
    a, b = ratios(t)
    return a - b


def policy_margin(t):
    return t["policy_chosen_logps"] - t["policy_rejected_logps"]


def averages(t):
    chosen = t["policy_chosen_logps"] / t["chosen_lengths"]
    rejected = t["policy_rejected_logps"] / t["rejected_lengths"]
    return chosen, rejected


def averaged(t):
    """The same pairs with averages per token in place of sums."""
    result = dict(t)
    for who, side in itertools.product(("policy", "ref"), ("chosen", "rejected")):
        result[f"{who}_{side}_logps"] = t[f"{who}_{side}_logps"] / t[f"{side}_lengths"]
    return result


def without_reference(t):
    zero = torch.zeros_like(t["policy_chosen_logps"])
    return t | {"ref_chosen_logps": zero, "ref_rejected_logps": zero}


# --------------------------------------------------------------------------------------------------
# The derivation of DPO (2305.18290 eqs. 3 to 6), on 50 answers that can be enumerated
# --------------------------------------------------------------------------------------------------

BETA = 0.3


def random_policy(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(0)


def optimal_policy(reward, reference):
    """log π* of eq. 4: log_softmax divides by Z."""
    return (reference + reward / BETA).log_softmax(0)


def objective(policy, reward, reference):
    """Eq. 3."""
    kl = (policy.exp() * (policy - reference)).sum()
    return (policy.exp() * reward).sum() - BETA * kl


def random_reward():
    return torch.randn(50, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def test_the_policy_of_eq_4_maximizes_the_objective_of_eq_3():
    reward, reference = random_reward(), random_policy(0)
    best = objective(optimal_policy(reward, reference), reward, reference)
    log_z = (reference + reward / BETA).logsumexp(0)
    assert best.item() == pytest.approx((BETA * log_z).item())
    for seed in range(1, 20):
        assert objective(random_policy(seed), reward, reference) < best


def test_the_reward_of_eq_5_is_the_log_ratio_of_the_optimum_up_to_one_constant():
    reward, reference = random_reward(), random_policy(0)
    log_z = (reference + reward / BETA).logsumexp(0)
    implicit = BETA * (optimal_policy(reward, reference) - reference)
    assert torch.allclose(implicit + BETA * log_z, reward)


def test_bradley_terry_on_the_true_reward_is_eq_6_on_the_optimal_policy():
    """β log Z(x) cancels, so the DPO loss of π* is the negative log-likelihood of a label."""
    reward, reference = random_reward(), random_policy(0)
    best = optimal_policy(reward, reference)
    loss = sigmoid(best, best.flip(0), reference, reference.flip(0), beta=BETA)
    assert torch.allclose(loss, -F.logsigmoid(reward - reward.flip(0)))


# --------------------------------------------------------------------------------------------------
# Every loss at π = π_ref, and its gradient as its docstring states it
# --------------------------------------------------------------------------------------------------

LOG_2 = math.log(2)
AT_REFERENCE = {  # lengths 1, scores that differ by 1, averages of −20 and −30
    "sigmoid": LOG_2,
    "robust": LOG_2,
    "hinge": 1.0,
    "exo_pair": -LOG_2 - 0.5 * math.log(1e-3 * (1 - 1e-3)),
    "discopop": (LOG_2 + 1) / 2,
    "ipo": 25.0,
    "sigmoid_norm": LOG_2,
    "rdpo": LOG_2,
    "odpo": LOG_2,
    "nca_pair": 2 * LOG_2,
    "bco_pair": 2 * LOG_2,
    "sppo_hard": 1 / (2 * 0.001 ** 2),
    "kto_pair": 0.5,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "dpop": LOG_2,
    "cal_dpo": LOG_2 + 50,
    "chipo": LOG_2,
    "aot": LOG_2,
    "aot_unpaired": LOG_2,
    "score_margin": math.log1p(math.e),
    "rpo_sq": 1.0,
    "rpo_bwd_kl": LOG_2 - math.log1p(math.exp(-1)) - 1 / (1 + math.e),
    "rpo_fwd_kl": math.log1p(math.exp(-1)) + 0.5 - LOG_2,
    "dpo_shift": LOG_2,
    "bpo": LOG_2,
    "bpo_hinge": 1.0,
    "hypo": LOG_2,
    "beta_dpo": LOG_2,
    "alpha_dpo": math.log1p(math.exp(1.5 - 2.5 * 10)),
    "dr_dpo": LOG_2,
    "npo": 20 * LOG_2,
}


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_value_where_policy_equals_reference(name):
    expected = pytest.approx([AT_REFERENCE[name]] * 2, rel=1e-12)
    assert call(name, pair(0.0, tensor(0.0, 0.0))).tolist() == expected


def sig(x):
    return 1 / (1 + torch.exp(-x))


def bump(x):
    return sig(x) * sig(-x)


def aot_in_words(t, a, b):
    u = policy_margin(t)
    return sorted_gradient(u, t["ref_chosen_logps"] - t["ref_rejected_logps"], order_of_rejected=u)


def aot_unpaired_in_words(t, a, b):
    return sorted_gradient(a, b, order_of_rejected=b)


def sorted_gradient(u, v, order_of_rejected):
    """The k-th smallest u against the k-th smallest v, then back to the pairs they came from."""
    weight = 0.1 * (sig(-0.1 * (u.sort().values - v.sort().values)) - 0.1)
    dw, dl = torch.zeros_like(u), torch.zeros_like(v)
    dw[u.argsort()] = -weight
    dl[order_of_rejected.argsort()] = weight
    return dw, dl


def dr_dpo_in_words(t, a, b):
    """Of the sum of the losses: each of the 12 pairs has the loss of the batch."""
    h = a - b
    weights = (F.logsigmoid(0.1 * h) / 0.5).softmax(0)
    dw = -12 * weights * 0.1 * sig(-0.1 * h)
    return dw, -dw


def bpo_hinge_in_words(t, a, b):
    below = torch.minimum(a, -0.3 * b) < 1 / 0.1
    chosen_lags, rejected_lags = below & (a < -0.3 * b), below & (a > -0.3 * b)
    return -0.1 * chosen_lags.double(), 0.1 * 0.3 * rejected_lags.double()


IN_WORDS = {  # pages whose Gradient is a sentence: ∂L/∂w, ∂L/∂l with the arguments of HYPER
    "aot": aot_in_words,
    "aot_unpaired": aot_unpaired_in_words,
    "dr_dpo": dr_dpo_in_words,
    "bpo_hinge": bpo_hinge_in_words,
}
HYPER = {
    "sigmoid": dict(beta=0.3, label_smoothing=0.1),
    "robust": dict(beta=0.3, label_smoothing=0.2),
    "exo_pair": dict(label_smoothing=0.01),
    "discopop": dict(discopop_tau=2.0),
    "rdpo": dict(rdpo_alpha=0.02),
    "odpo": dict(odpo_alpha=2.0),
    "bco_pair": dict(delta=0.4),
    "sppo_hard": dict(beta=0.1),
    "dpop": dict(beta=0.1, dpop_lambda=3.0),
    "cal_dpo": dict(cal_dpo_weight=0.7),
    "chipo": dict(chipo_r_max=0.2),
    "aot": dict(beta=0.1, label_smoothing=0.1),
    "aot_unpaired": dict(beta=0.1, label_smoothing=0.1),
    "cpo": dict(cpo_alpha=0.5, label_smoothing=0.1),
    "score_margin": dict(margin_kappa=0.7),
    "rpo_sq": dict(beta=0.1, rpo_eta=0.7),
    "rpo_bwd_kl": dict(beta=0.1, rpo_eta=0.7),
    "rpo_fwd_kl": dict(beta=0.1, rpo_eta=0.7),
    "dpo_shift": dict(beta=0.1, shift_lambda=0.6),
    "beta_dpo": dict(beta_dpo_a=0.02, gap_mean=3.0),
    "alpha_dpo": dict(gap_mean=0.5, gap_std=2.0),
    "dr_dpo": dict(dr_beta=0.5),
}
# More terms of a formula; the gradient of the page is printed without them.
MORE_TERMS = {"simpo": dict(cpo_alpha=0.5, label_smoothing=0.1)}


def page_of(name, pairs, hyper):
    function = LOSSES[name]
    return Page(function, values_of(function, pairs, hyperparameters(function) | hyper))


def moderate_pairs():
    """Pairs on both sides of every condition, with log-ratios of at most 14, because the pages
    print log σ(z) and eᵃ as they are. Their mean is above 0, as KTO's reference points are."""
    pairs = random_pairs(12)
    for key in pairs:
        if "logps" in key:
            pairs[key] = pairs[key] / 5 - 2 * key.startswith("ref")
    assert all(ratio.mean() > 0 and ratio.min() < 0 for ratio in ratios(pairs))
    return pairs | {"policy_target_logps": pairs["policy_chosen_logps"].flip(0)}


@pytest.mark.parametrize("name", OF_PAIRS)
def test_every_form_of_the_formula_that_the_page_prints_is_the_loss(name):
    pairs, hyper = moderate_pairs(), HYPER.get(name, {}) | MORE_TERMS.get(name, {})
    forms = page_of(name, pairs, hyper).losses()
    assert forms
    for form in forms:
        assert torch.allclose(call(name, pairs, **hyper), form, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", OF_PAIRS)
def test_every_form_of_the_gradient_that_the_page_prints_is_the_derivative_of_the_loss(name):
    """If the page says it in words, IN_WORDS writes it out. The page of a margin loss may print
    ∂L/∂w alone: ∂L/∂l differs in the sign."""
    pairs, hyper = moderate_pairs(), HYPER.get(name, {})
    page = page_of(name, pairs, hyper)
    for side, argument in (("w", "policy_chosen_logps"), ("l", "policy_rejected_logps")):
        if argument not in tensor_arguments(LOSSES[name]):
            continue
        leaf = pairs[argument].clone().requires_grad_()
        total = call(name, pairs | {argument: leaf}, **hyper).sum()
        derivative, = torch.autograd.grad(total, leaf)
        forms = page.gradient(side)
        if name in IN_WORDS:
            dw, dl = IN_WORDS[name](pairs, *ratios(pairs))
            forms = [dw if side == "w" else dl]
        assert forms or side == "l" and name in MARGIN
        for form in forms:
            assert torch.allclose(derivative, form, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("right, wrong", [
    ("(σ(−βh) − ε)", "(σ(βh) − ε)"),
    ("(σ(−βh) − ε)", "(σ(−βh) + ε)"),
    ("−(1−ε) log σ(βh)", "−(1−2ε) log σ(βh)"),
    ("+ ε βh", "− ε βh"),
])
def test_a_wrong_formula_on_a_page_is_found(right, wrong):
    def changed():
        pass

    pairs, hyper = moderate_pairs(), dict(beta=0.3, label_smoothing=0.1)
    assert inspect.getdoc(sigmoid).count(right) >= 1
    changed.__doc__ = inspect.getdoc(sigmoid).replace(right, wrong, 1)
    page = Page(changed, values_of(sigmoid, pairs, hyper))
    dw, dl = gradients(sigmoid, pairs, **hyper)
    expected = [call("sigmoid", pairs, **hyper)] * 2 + [dw, dl]
    read = page.losses() + page.gradient("w") + page.gradient("l")
    agree = [torch.allclose(value, form) for value, form in zip(expected, read, strict=True)]
    assert not all(agree)


# --------------------------------------------------------------------------------------------------
# sigmoid: DPO (2305.18290 eq. 7), cDPO
# --------------------------------------------------------------------------------------------------

def test_dpo_of_one_pair_worked_by_hand():
    """β = 0.5, w − w0 = 2, l − l0 = −1: h = 3, L = log(1 + e^−1.5) = 0.201413..."""
    loss = sigmoid(tensor(-8.0), tensor(-13.0), tensor(-10.0), tensor(-12.0), beta=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)), abs=1e-15)
    assert loss.item() == pytest.approx(0.2014132779827524, abs=1e-15)


def test_dpo_gradient_is_beta_times_sigmoid_of_the_wrong_reward_order():
    """2305.18290 Sec. 4: each pair is weighted by σ(r̂(y_l) − r̂(y_w)), with β in front."""
    pairs, beta = random_pairs(), 0.3
    dw, dl = gradients(sigmoid, pairs, beta=beta)
    weight = torch.sigmoid(-beta * margin(pairs))
    assert torch.allclose(dw, -beta * weight) and torch.allclose(dl, beta * weight)


def test_dpo_of_a_pair_and_of_its_flip_differ_by_beta_h():
    h = tensor(-7.0, 0.0, 3.0)
    assert torch.allclose(of(sigmoid, h, beta=0.4) - of(sigmoid, -h, beta=0.4), -0.4 * h)


def test_dpo_is_linear_in_a_badly_wrong_margin_and_vanishes_exponentially_in_a_right_one():
    assert of(sigmoid, [-200.0], beta=1.0).item() == pytest.approx(200.0)
    assert of(sigmoid, [200.0], beta=1.0).item() == pytest.approx(math.exp(-200.0), rel=1e-12)


def test_cdpo_is_the_expected_dpo_loss_when_a_share_epsilon_of_labels_is_flipped():
    h, eps = tensor(-7.0, 0.5, 3.0), 0.2
    expected = (1 - eps) * of(sigmoid, h) + eps * of(sigmoid, -h)
    assert torch.allclose(of(sigmoid, h, label_smoothing=eps), expected)


def test_cdpo_is_dpo_plus_epsilon_beta_h():
    h = tensor(-7.0, 0.5, 3.0)
    difference = of(sigmoid, h, beta=0.4, label_smoothing=0.3) - of(sigmoid, h, beta=0.4)
    assert torch.allclose(difference, 0.3 * 0.4 * h)


def test_cdpo_stops_at_confidence_one_minus_epsilon():
    """Its minimum is where σ(βh) = 1 − ε, and beyond it the pair is pulled back."""
    eps, beta = 0.1, 0.5
    best = math.log((1 - eps) / eps) / beta
    h = [best - 1, best, best + 1]
    below, there, beyond = slope(sigmoid, h, beta=beta, label_smoothing=eps)
    assert below < 0 < beyond and abs(there) < 1e-12


# --------------------------------------------------------------------------------------------------
# robust (2403.00409)
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3, 0.49])
def test_robust_is_dpo_in_expectation_over_flipped_labels_at_every_margin(eps):
    h = torch.linspace(-80, 80, 41, dtype=torch.float64)
    correct = of(robust, h, label_smoothing=eps)
    flipped = of(robust, -h, label_smoothing=eps)
    assert torch.allclose((1 - eps) * correct + eps * flipped, of(sigmoid, h), rtol=1e-10)


def test_robust_corrects_in_the_opposite_direction_to_cdpo():
    h, eps, beta = tensor(-7.0, 0.5, 3.0), 0.2, 0.4
    dpo = of(sigmoid, h, beta=beta)
    correction = of(robust, h, beta=beta, label_smoothing=eps) - dpo
    assert torch.allclose(correction, -eps / (1 - 2 * eps) * beta * h)
    cdpo_correction = of(sigmoid, h, beta=beta, label_smoothing=eps) - dpo
    assert (torch.sign(cdpo_correction) == torch.sign(h)).all()


def test_robust_keeps_a_gradient_at_any_margin_and_has_no_lower_bound():
    assert of(robust, [400.0]).item() < -4
    far = slope(robust, [4e3], beta=0.1, label_smoothing=0.1)
    assert far.item() == pytest.approx(-0.1 * 0.1 / 0.8)


# --------------------------------------------------------------------------------------------------
# hinge: RSO (2309.06657 eq. 10)
# --------------------------------------------------------------------------------------------------

def test_hinge_is_0_past_the_margin_with_no_gradient_there():
    h = tensor(0.0, 9.0, 11.0, 50.0)
    assert torch.allclose(of(hinge, h, beta=0.1), tensor(1.0, 0.1, 0.0, 0.0))
    assert torch.equal(slope(hinge, h, beta=0.1), tensor(-0.1, -0.1, 0.0, 0.0))


def test_hinge_and_its_mirror_add_up_to_the_distance_from_the_margin():
    h = torch.linspace(-40, 40, 17, dtype=torch.float64)
    assert torch.allclose(of(hinge, h) + F.relu(0.1 * h - 1), (1 - 0.1 * h).abs())


# --------------------------------------------------------------------------------------------------
# exo_pair (2402.00856)
# --------------------------------------------------------------------------------------------------

def test_exo_is_the_kl_from_the_policy_preference_to_the_smoothed_labels():
    h, beta, eps = torch.linspace(-60, 60, 25, dtype=torch.float64), 0.1, 0.03
    policy = torch.stack([beta * h, torch.zeros_like(h)], -1).softmax(-1)
    labels = tensor(1 - eps, eps)
    kl = (policy * (policy.log() - labels.log())).sum(-1)
    assert torch.allclose(of(exo_pair, h, beta=beta, label_smoothing=eps), kl)


def test_exo_is_0_at_the_confidence_of_the_labels_and_bounded_at_both_ends():
    eps, beta = 0.01, 0.2
    best = math.log((1 - eps) / eps) / beta
    there, right, wrong = of(exo_pair, [best, 1e4, -1e4], beta=beta, label_smoothing=eps).tolist()
    assert there == pytest.approx(0, abs=1e-14)
    assert right == pytest.approx(-math.log(1 - eps)) and wrong == pytest.approx(-math.log(eps))


def test_exo_gives_very_wrong_pairs_no_gradient_and_dpo_gives_them_the_largest():
    assert slope(exo_pair, [-500.0]).abs().item() < 1e-18
    assert slope(sigmoid, [-500.0]).item() == pytest.approx(-0.1)


# --------------------------------------------------------------------------------------------------
# discopop (2406.08414 eq. 5)
# --------------------------------------------------------------------------------------------------

def test_discopop_blends_the_logistic_and_the_exponential_loss():
    h, beta = tensor(-30.0, -1.0, 0.3, 8.0), 0.5
    m = torch.sigmoid(beta * h / 0.7)
    expected = (1 - m) * of(sigmoid, h, beta=beta) + m * torch.exp(-beta * h)
    assert torch.allclose(of(discopop, h, beta=beta, discopop_tau=0.7), expected)


def test_discopop_is_dpo_on_wrong_pairs_and_exponential_on_right_pairs():
    wrong, right = of(discopop, [-50.0, 50.0], beta=1.0)
    assert wrong.item() == pytest.approx(50.0) and right.item() == pytest.approx(math.exp(-50.0))


def test_discopop_with_a_wide_blend_is_the_mean_of_dpo_and_the_exponential_loss():
    h = tensor(-1.0, 0.0, 2.0)
    mean = (of(sigmoid, h, beta=1.0) + torch.exp(-h)) / 2
    assert torch.allclose(of(discopop, h, beta=1.0, discopop_tau=1e9), mean)


def test_discopop_has_a_local_minimum_just_below_zero_and_a_maximum_just_above():
    z = torch.linspace(-0.5, 0.5, 100_001, dtype=torch.float64)
    value = of(discopop, z, beta=1.0)
    left, middle, right = value[:-2], value[1:-1], value[2:]
    low = (middle < left) & (middle < right)
    high = (middle > left) & (middle > right)
    assert z[1:-1][low].tolist() == pytest.approx([-0.11857], abs=1e-5)
    assert z[1:-1][high].tolist() == pytest.approx([0.07201], abs=1e-5)
    assert middle[low].item() == pytest.approx(0.78592, abs=1e-5)
    assert middle[high].item() == pytest.approx(0.87829, abs=1e-5)


@pytest.mark.parametrize("tau", [0.05, 1.0, 5.0])
def test_discopop_is_finite_in_fp32_where_the_product_as_printed_is_nan(tau):
    h = torch.tensor([-200.0, -2e4], requires_grad=True)
    zero = torch.zeros(2)
    assert (torch.exp(-0.5 * h) * torch.sigmoid(0.5 * h / 0.05)).isnan().any()
    loss = discopop(h, zero, zero, zero, beta=0.5, discopop_tau=tau)
    gradient, = torch.autograd.grad(loss.sum(), h)
    assert loss.isfinite().all() and gradient.isfinite().all() and (gradient != 0).all()


# --------------------------------------------------------------------------------------------------
# ipo (2310.12036 eq. 17)
# --------------------------------------------------------------------------------------------------

def test_ipo_is_minimal_at_half_inverse_tau_and_pushes_back_beyond_it_and_dpo_never_does():
    tau = 0.25
    h = tensor(1 / (2 * tau) - 1, 1 / (2 * tau), 1 / (2 * tau) + 1)
    assert torch.allclose(of(ipo, h, beta=tau), tensor(1.0, 0.0, 1.0))
    assert torch.allclose(slope(ipo, h, beta=tau), tensor(-2.0, 0.0, 2.0))
    assert (slope(sigmoid, h, beta=tau) < 0).all()


def test_ipo_averages_over_tokens_so_repeating_every_token_changes_nothing():
    pairs = random_pairs()
    doubled = {name: 2 * value for name, value in pairs.items()}
    assert torch.allclose(call("ipo", pairs), call("ipo", doubled))


def test_ipo_with_lengths_of_one_is_the_summed_form_of_the_paper():
    pairs, tau = random_pairs(), 0.1
    ones = dict(chosen_lengths=torch.ones(6), rejected_lengths=torch.ones(6))
    assert torch.allclose(call("ipo", pairs | ones, beta=tau), (margin(pairs) - 1 / (2 * tau)) ** 2)


# --------------------------------------------------------------------------------------------------
# sigmoid_norm (Tülu 3, 2411.15124 Sec. 5.1.2 eq. 6), rdpo (2403.19159), odpo (2402.10571)
# --------------------------------------------------------------------------------------------------

def test_length_normalized_dpo_is_dpo_on_averaged_log_probs():
    pairs = random_pairs()
    expected = call("sigmoid", averaged(pairs), beta=3.0)
    assert torch.allclose(call("sigmoid_norm", pairs, beta=3.0), expected)


def test_length_normalized_dpo_of_equal_lengths_n_is_dpo_with_beta_over_n():
    twenty = torch.full((6,), 20)
    pairs = random_pairs() | {"chosen_lengths": twenty, "rejected_lengths": twenty}
    expected = call("sigmoid", pairs, beta=5.0 / 20)
    assert torch.allclose(call("sigmoid_norm", pairs, beta=5.0), expected)


def test_rdpo_of_equal_lengths_or_without_alpha_is_dpo():
    pairs = random_pairs()
    assert torch.allclose(call("rdpo", pairs, rdpo_alpha=0.0), call("sigmoid", pairs))
    equal = pairs | {"rejected_lengths": pairs["chosen_lengths"]}
    assert torch.allclose(call("rdpo", equal), call("sigmoid", pairs))


def test_rdpo_has_a_smaller_gradient_where_the_chosen_answer_is_the_longer_one():
    longer = pair(1.0, tensor(0.0), chosen_lengths=tensor(30.0))
    shorter = pair(1.0, tensor(0.0), rejected_lengths=tensor(30.0))
    dpo = gradients(sigmoid, longer)[0].abs()
    assert gradients(rdpo, longer)[0].abs() < dpo < gradients(rdpo, shorter)[0].abs()


def test_odpo_is_dpo_at_a_margin_smaller_by_the_offset():
    pairs, beta, alpha = random_pairs(), 0.2, 0.7
    offset = alpha * torch.log(pairs["chosen_scores"] - pairs["rejected_scores"])
    moved = pairs | {"policy_chosen_logps": pairs["policy_chosen_logps"] - offset / beta}
    expected = call("sigmoid", moved, beta=beta)
    assert torch.allclose(call("odpo", pairs, beta=beta, odpo_alpha=alpha), expected)
    assert torch.allclose(call("odpo", pairs, odpo_alpha=0.0), call("sigmoid", pairs))


@pytest.mark.parametrize("better", [0.0, -1.0, math.nan])
def test_odpo_refuses_scores_that_contradict_the_preference(better):
    with pytest.raises(ValueError, match="chosen_scores must be above rejected_scores"):
        odpo(*[tensor(0.0)] * 4, tensor(better), tensor(0.0))


# --------------------------------------------------------------------------------------------------
# score_margin (2307.09288, MODPO 2310.03708), rpo_sq, rpo_bwd_kl, rpo_fwd_kl (2502.00203)
# --------------------------------------------------------------------------------------------------

def scored(h, gap, **others):
    """Pairs with margin h whose scores differ by `gap`."""
    gap = torch.as_tensor(gap, dtype=torch.float64)
    return pair(h, 0.0, chosen_scores=gap, rejected_scores=torch.zeros_like(gap), **others)


def test_score_margin_without_kappa_is_dpo_and_with_the_log_of_the_gap_it_is_odpo():
    pairs = random_pairs()
    assert torch.equal(call("score_margin", pairs, margin_kappa=0.0), call("sigmoid", pairs))
    log_gap = torch.log(pairs["chosen_scores"] - pairs["rejected_scores"])
    logs = pairs | {"chosen_scores": log_gap, "rejected_scores": torch.zeros_like(log_gap)}
    expected = call("odpo", pairs, odpo_alpha=0.7)
    assert torch.allclose(call("score_margin", logs, margin_kappa=0.7), expected)


def test_modpo_is_score_margin_with_beta_over_its_own_weight():
    """2310.03708: r = (β log π/π_ref − w_1 r_1) / w_0 takes the place of DPO's reward."""
    pairs, beta, own, other = random_pairs(), 0.1, 0.3, 0.7
    a, b = ratios(pairs)
    chosen = (beta * a - other * pairs["chosen_scores"]) / own
    rejected = (beta * b - other * pairs["rejected_scores"]) / own
    found = call("score_margin", pairs, beta=beta / own, margin_kappa=other / own)
    assert torch.allclose(found, -F.logsigmoid(chosen - rejected))


def test_a_pair_whose_rejected_answer_has_the_better_score_is_pushed_less_than_by_dpo():
    pairs = scored(tensor(1.0, 1.0, 1.0), [-2.0, 0.0, 2.0])
    worse, equal, better = gradients(score_margin, pairs)[0].abs()
    dpo = gradients(sigmoid, pair(1.0, tensor(0.0)))[0].abs()
    assert worse < equal < better and torch.allclose(equal, dpo)


def test_score_margin_pushes_at_any_margin_and_rpo_stops_at_its_target():
    gap, beta = 3.0, 0.5
    there = scored(tensor(gap / beta), [gap])
    beyond = scored(tensor(gap / beta + 1), [gap])
    assert gradients(score_margin, beyond, beta=beta)[0] < 0
    for function in (rpo_sq, rpo_bwd_kl, rpo_fwd_kl):
        assert call_function(function, there, beta=beta).abs().item() < 1e-15
        assert gradients(function, there, beta=beta)[0].abs().item() < 1e-15
        assert gradients(function, beyond, beta=beta)[0] > 0


@pytest.mark.parametrize("name", ["rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"])
def test_rpo_asks_for_no_margin_where_the_scores_are_equal_and_takes_scores_of_any_order(name):
    equal = scored(tensor(-1.0, 0.0, 1.0), [5.0, 5.0, 5.0])
    equal["rejected_scores"] = equal["chosen_scores"]
    dw, _ = gradients(LOSSES[name], equal)
    assert dw[0] < 0 < dw[2] and dw[1].abs() < 1e-15
    flipped = scored(tensor(-10.0), [-2.0])
    assert call(name, flipped, beta=0.2).abs().item() < 1e-15


def test_rpo_sq_of_a_gap_of_a_half_is_beta_squared_times_the_summed_ipo():
    h, beta = tensor(-3.0, 2.0, 40.0), 0.2
    expected = beta ** 2 * of(ipo, h, beta=beta)
    assert torch.allclose(call("rpo_sq", scored(h, [0.5] * 3), beta=beta), expected)


def bernoulli_kl(p_logit, q_logit):
    first = torch.distributions.Bernoulli(logits=p_logit)
    return torch.distributions.kl_divergence(first, torch.distributions.Bernoulli(logits=q_logit))


def test_backward_rpo_has_the_target_first_and_forward_rpo_the_policy():
    pairs, beta, eta = random_pairs(), 0.1, 0.7
    z = beta * margin(pairs)
    g = eta * (pairs["chosen_scores"] - pairs["rejected_scores"])
    backward = call("rpo_bwd_kl", pairs, beta=beta, rpo_eta=eta)
    forward = call("rpo_fwd_kl", pairs, beta=beta, rpo_eta=eta)
    assert torch.allclose(backward, bernoulli_kl(g, z))
    assert torch.allclose(forward, bernoulli_kl(z, g))
    assert not torch.allclose(backward, forward)


def test_backward_rpo_is_cdpo_with_soft_labels_less_their_entropy():
    h, gap, beta = tensor(-9.0, 0.0, 30.0), 1.3, 0.2
    eps = sig(tensor(-gap)).item()
    entropy = -(1 - eps) * math.log(1 - eps) - eps * math.log(eps)
    expected = of(sigmoid, h, beta=beta, label_smoothing=eps) - entropy
    assert torch.allclose(call("rpo_bwd_kl", scored(h, [gap] * 3), beta=beta), expected)


def test_backward_rpo_becomes_dpo_as_eta_grows():
    pairs = random_pairs()
    expected = call("sigmoid", pairs, beta=0.2)
    assert torch.allclose(call("rpo_bwd_kl", pairs, rpo_eta=1e4), expected)


def test_forward_rpo_is_exo_with_the_smoothing_of_the_scores():
    h, gap, beta = tensor(-9.0, 0.0, 30.0), 1.3, 0.2
    expected = of(exo_pair, h, beta=beta, label_smoothing=sig(tensor(-gap)).item())
    assert torch.allclose(call("rpo_fwd_kl", scored(h, [gap] * 3), beta=beta), expected)


def test_forward_rpo_ignores_a_very_wrong_pair_and_backward_rpo_pushes_it_with_beta():
    wrong = scored(tensor(-500.0), [2.0])
    assert gradients(rpo_fwd_kl, wrong)[0].abs() < 1e-18
    expected = -0.2 * sig(tensor(2.0))
    assert torch.allclose(gradients(rpo_bwd_kl, wrong)[0], expected)


# --------------------------------------------------------------------------------------------------
# nca_pair (2402.05369 Table 1), bco_pair (2404.04656 eqs. 7, 8), sppo_hard (2405.00675 eq. 4.12)
# --------------------------------------------------------------------------------------------------

def test_nca_draws_the_chosen_answer_to_a_reward_of_log_2():
    beta = 0.1
    a = tensor(math.log(2) / beta, grad=True)
    assert torch.autograd.grad(of(nca_pair, a, beta=beta).sum(), a)[0].abs().item() < 1e-12
    assert slope(nca_pair, [math.log(2) / beta - 1]) < 0 < slope(nca_pair, [math.log(2) / beta + 1])


@pytest.mark.parametrize("name", ["nca_pair", "bco_pair", "apo_zero", "sppo_hard"])
def test_a_separable_loss_treats_each_side_by_its_own_reward_alone(name):
    """L(a, b) + L(a', b') = L(a, b') + L(a', b), so a constant added to both rewards changes it."""
    a, b, a2, b2 = tensor(3.0), tensor(-2.0), tensor(-7.0), tensor(11.0)
    function = LOSSES[name]
    straight = of(function, a, b) + of(function, a2, b2)
    crossed = of(function, a, b2) + of(function, a2, b)
    assert torch.allclose(straight, crossed)
    assert not torch.allclose(of(function, a, b), of(function, a + 5, b + 5))


@pytest.mark.parametrize("delta", [-3.0, 0.0, 0.7, 20.0])
def test_bco_bounds_dpo_from_above_whatever_delta_is(delta):
    """Theorem 1: σ(x) σ(y) < σ(x + y)."""
    pairs = random_pairs(50)
    assert (call("bco_pair", pairs | {"delta": delta}) > call("sigmoid", pairs)).all()


def test_bco_sends_no_gradient_through_delta():
    delta = tensor(0.3, grad=True)
    pairs = random_pairs(1)
    w = pairs["policy_chosen_logps"].requires_grad_()
    call("bco_pair", pairs | {"delta": delta}).sum().backward()
    assert delta.grad is None and w.grad is not None


def test_bco_delta_is_an_exponential_moving_average_of_the_mean_of_both_sides():
    delta = 0.0
    for _ in range(400):
        delta = update_delta(delta, 3.0, -1.0)
    assert delta == pytest.approx(1.0)
    assert update_delta(1.0, 0.0, 0.0, decay=0.9) == pytest.approx(0.9)
    assert update_delta(0.0, 2.0, 4.0, decay=0.5) == pytest.approx(1.5)


def test_nca_is_bco_without_delta_in_which_each_answer_is_half_of_the_noise():
    a, b, beta = tensor(3.0), tensor(-2.0), 0.1
    moved = 0.5 * F.softplus(beta * a) - 0.5 * F.softplus(beta * b)
    assert torch.allclose(of(nca_pair, a, b, beta=beta) - of(bco_pair, a, b, beta=beta), moved)


def test_sppo_is_0_at_log_ratios_of_plus_and_minus_half_eta():
    beta = 0.05
    assert of(sppo_hard, [10.0], -10.0, beta=beta).item() == 0
    assert of(sppo_hard, [0.0], beta=beta).item() == pytest.approx(1 / (2 * beta ** 2))


def test_sppo_is_ipo_of_twice_the_target_and_a_penalty_on_drift():
    """(a − η/2)² + (b + η/2)² = ½ (h − η)² + ½ (a + b)²"""
    (a, b), beta = ratios(random_pairs()), 0.1
    expected = 0.5 * (a - b - 1 / beta) ** 2 + 0.5 * (a + b) ** 2
    assert torch.allclose(of(sppo_hard, a, b, beta=beta), expected)


# --------------------------------------------------------------------------------------------------
# kto_pair (2402.01306 eq. 8 of v4), apo_zero and apo_down (2408.06266)
# --------------------------------------------------------------------------------------------------

def test_kto_compares_each_side_with_the_mean_of_the_other_one_clipped_at_zero():
    a, b, beta = tensor(2.0, 6.0), tensor(-5.0, 1.0), 0.3
    chosen = 1 - torch.sigmoid(beta * (a - 0.0))
    rejected = 1 - torch.sigmoid(beta * (4.0 - b))
    assert torch.allclose(of(kto_pair, a, b, beta=beta), 0.5 * chosen + 0.5 * rejected)


def test_kto_does_not_back_propagate_through_its_reference_point():
    """One pair: a loss that does has twice the gradient. Here ∂L/∂w comes from a − z_l alone."""
    a, b, beta = 2.0, 1.5, 0.3
    dw, dl = gradients(kto_pair, pair(a, tensor(b)), beta=beta)
    u = tensor(beta * (a - b))
    assert torch.allclose(dw, -beta / 2 * bump(u)) and torch.allclose(dl, beta / 2 * bump(u))


def test_every_kto_value_is_a_probability():
    loss = call("kto_pair", random_pairs(100))
    assert (0 < loss).all() and (loss < 1).all()


def test_apo_zero_of_a_pair_and_of_its_flip_add_up_to_2():
    a, b = ratios(random_pairs())
    assert torch.allclose(of(apo_zero, a, b) + of(apo_zero, b, a), torch.full_like(a, 2))


def test_apo_zero_raises_chosen_and_lowers_rejected_always_and_apo_down_lowers_both_in_the_end():
    pairs = random_pairs(50)
    dw, dl = gradients(apo_zero, pairs)
    assert (dw < 0).all() and (dl > 0).all()
    dw, dl = gradients(apo_down, pair(0.0, tensor(-50.0)))
    assert dw > 0 and dl > 0


def test_apo_down_leaves_the_chosen_answer_alone_where_its_reward_is_the_margin():
    assert gradients(apo_down, pair(7.0, tensor(0.0)))[0].abs().item() < 1e-15
    a = tensor(3.0)
    assert torch.allclose(of(apo_down, a, a, beta=0.2), torch.sigmoid(0.2 * a) + 0.5)


# --------------------------------------------------------------------------------------------------
# dpop (2402.13228), cal_dpo (2412.14516), chipo (2407.13399 Algorithm 1)
# --------------------------------------------------------------------------------------------------

def test_dpop_is_dpo_unless_the_chosen_answer_fell_below_the_reference():
    a, b = tensor(0.0, 4.0), tensor(1.0, 9.0)
    assert torch.allclose(of(dpop, a, b, beta=0.3), of(sigmoid, a, b, beta=0.3))
    fallen = tensor(-4.0)
    dpo = of(sigmoid, fallen, beta=0.3)
    assert torch.allclose(of(dpop, fallen, dpop_lambda=0.0, beta=0.3), dpo)
    assert of(dpop, fallen, beta=0.3) > dpo


def test_dpop_raises_a_fallen_chosen_answer_1_plus_lambda_times_as_hard_as_it_lowers_rejected():
    dw, dl = gradients(dpop, pair(-0.5, tensor(-9.0)), dpop_lambda=7.0)
    assert torch.allclose(dw, -8 * dl)


def test_cal_dpo_is_dpo_at_beta_1_and_sppo_at_beta():
    a, b = ratios(random_pairs())
    expected = of(sigmoid, a, b, beta=1.0) + 0.5 * of(sppo_hard, a, b, beta=0.2)
    assert torch.allclose(of(cal_dpo, a, b, beta=0.2, cal_dpo_weight=0.5), expected)


def test_chipo_is_an_f_dpo_of_phi_and_near_the_reference_dpo_with_twice_beta():
    a, b = tensor(0.3, -2.0), tensor(-0.4, 1.0)
    expected = of(sigmoid, a.exp() + a, b.exp() + b, beta=0.2)
    assert torch.allclose(of(chipo, a, b, beta=0.2), expected)
    dpo_slope = slope(sigmoid, [0.0], beta=0.2)
    assert torch.allclose(slope(chipo, [0.0], beta=0.2), 2 * dpo_slope)


def test_chipo_gives_a_clipped_pair_no_gradient():
    clipped, free = gradients(chipo, pair(tensor(4.0, 0.1), 0.0), beta=0.5, chipo_r_max=1.0)[0]
    assert clipped == 0 and free < 0
    at_clip = of(chipo, [4.0], beta=0.5, chipo_r_max=1.0)
    assert at_clip.item() == pytest.approx(math.log(1 + math.exp(-2)))


# --------------------------------------------------------------------------------------------------
# dpo_shift (2502.07599), bpo (2506.03557)
# --------------------------------------------------------------------------------------------------

def test_dpo_shift_is_dpo_at_lambda_1_and_leaves_the_rejected_answer_out_at_lambda_0():
    pairs = random_pairs()
    dpo = call("sigmoid", pairs, beta=0.3)
    assert torch.equal(call("dpo_shift", pairs, beta=0.3, shift_lambda=1.0), dpo)
    a, _ = ratios(pairs)
    found = call("dpo_shift", pairs, beta=0.3, shift_lambda=0.0)
    assert torch.allclose(found, -F.logsigmoid(0.3 * a))


def test_dpo_shift_with_a_reference_of_zeros_is_cpl():
    """2310.13639: −log [e^(αw) / (e^(αw) + e^(λαl))]"""
    pairs, alpha, lam = random_pairs(), 0.2, 0.75
    scores = torch.stack([pairs["policy_chosen_logps"], lam * pairs["policy_rejected_logps"]])
    expected = -(alpha * scores).log_softmax(0)[0]
    found = call("dpo_shift", without_reference(pairs), beta=alpha, shift_lambda=lam)
    assert torch.allclose(found, expected)


def test_dpo_shift_raises_a_token_that_both_answers_share_and_dpo_does_not_move_it():
    shared = tensor(-1.0, grad=True)
    w, l = shared + tensor(-2.0), shared + tensor(-3.0)  # noqa: E741
    loss = dpo_shift(w, l, tensor(-3.0), tensor(-4.0), beta=0.1, shift_lambda=0.7)
    assert torch.autograd.grad(loss.sum(), shared)[0].item() == pytest.approx(-0.3 * 0.1 / 2)
    w, l = shared + tensor(-2.0), shared + tensor(-3.0)  # noqa: E741
    dpo = sigmoid(w, l, tensor(-3.0), tensor(-4.0), beta=0.1)
    assert torch.autograd.grad(dpo.sum(), shared)[0].item() == 0


def test_bpo_moves_only_the_answer_that_lags_behind():
    dw, dl = gradients(bpo, pair(tensor(1.0, 1.0), tensor(-20.0, -1.0)), beta=0.1, bpo_alpha=0.5)
    assert dw[0] < 0 and dl[0] == 0
    assert dw[1] == 0 and dl[1] > 0


def test_bpo_gives_each_side_half_of_its_gradient_at_a_tie_as_at_the_reference():
    dw, dl = gradients(bpo, pair(0.0, tensor(0.0)), beta=0.1, bpo_alpha=0.3)
    assert dw.item() == pytest.approx(-0.1 / 4) and dl.item() == pytest.approx(0.3 * 0.1 / 4)
    tie = gradients(bpo, pair(3.0, tensor(-10.0)), beta=0.1, bpo_alpha=0.3)
    assert tie[0] < 0 < tie[1]


def test_the_hinge_of_bpo_is_hinge_on_the_answer_that_lags_behind_and_ends_at_its_target():
    pairs = random_pairs()
    a, b = ratios(pairs)
    lagging = torch.minimum(a, -0.3 * b)
    expected = of(hinge, lagging, beta=0.02)
    assert torch.allclose(call("bpo_hinge", pairs, beta=0.02, bpo_alpha=0.3), expected)
    done, short, tie = pair(tensor(10.1, 9.9, 0.0), tensor(-34.0, -34.0, 0.0)), [-0.1, 0.0], 0.015
    dw, dl = gradients(bpo_hinge, done, beta=0.1, bpo_alpha=0.3)
    assert dw.tolist() == pytest.approx([0.0, short[0], -0.05])
    assert dl.tolist() == pytest.approx([0.0, short[1], tie])


def test_no_fall_of_the_rejected_answer_pays_for_a_fall_of_the_chosen_one_in_bpo():
    fallen = tensor(-2.0, -2.0, -2.0)
    losses = of(bpo, fallen, tensor(0.0, -50.0, -1e4))
    assert torch.equal(losses, losses[:1].expand(3)) and (losses > LOG_2).all()
    assert of(sigmoid, fallen, tensor(0.0, -50.0, -1e4))[1:].max() < LOG_2


# --------------------------------------------------------------------------------------------------
# aot, aot_unpaired (2406.05882)
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_of_one_pair_is_dpo_and_aot_of_more_pairs_is_at_most_dpo(name):
    """The sorted coupling is optimal for a convex cost."""
    one, many = random_pairs(1), random_pairs(40)
    hyper = dict(beta=0.1, label_smoothing=0.1)
    assert torch.allclose(call(name, one, **hyper), call("sigmoid", one, **hyper))
    assert call(name, many, beta=0.1).mean() < call("sigmoid", many, beta=0.1).mean()


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_does_not_depend_on_the_order_of_the_pairs(name):
    pairs, order = random_pairs(9), torch.randperm(9, generator=torch.Generator().manual_seed(1))
    assert torch.equal(call(name, pairs), call(name, {k: v[order] for k, v in pairs.items()}))


def test_aot_equals_dpo_when_the_margins_are_in_the_same_order_already():
    pairs = {k: v for k, v in random_pairs(5).items() if "logps" in k}
    pairs["policy_chosen_logps"] = pairs["policy_rejected_logps"] + tensor(1.0, 2.0, 3.0, 4.0, 5.0)
    pairs["ref_chosen_logps"] = pairs["ref_rejected_logps"] + tensor(-9.0, 0.0, 1.0, 7.0, 8.0)
    assert torch.allclose(call("aot", pairs, beta=0.1), call("sigmoid", pairs, beta=0.1))


def test_only_unpaired_aot_ignores_which_rejected_answer_came_with_which_chosen_one():
    pairs = random_pairs(7)
    shuffled = {k: v.roll(1) if "rejected" in k else v for k, v in pairs.items()}
    assert torch.allclose(call("aot_unpaired", pairs), call("aot_unpaired", shuffled))
    for name in ("aot", "sigmoid"):
        assert not torch.allclose(call(name, pairs).mean(), call(name, shuffled).mean())


def test_aot_pair_is_the_older_name_of_the_unpaired_one():
    assert LOSSES["aot_pair"] is aot_unpaired and find("aot_pair") is aot_unpaired


# --------------------------------------------------------------------------------------------------
# hypo (2602.11902), beta_dpo (2407.08639), alpha_dpo (2410.10148), dr_dpo (2407.07880)
# --------------------------------------------------------------------------------------------------

def test_hypo_is_dpo_where_the_reference_is_right_and_reference_free_dpo_where_it_is_wrong():
    pairs = random_pairs(40)
    right = pairs["ref_chosen_logps"] >= pairs["ref_rejected_logps"]
    assert 0 < right.sum() < 40
    dpo, free = call("sigmoid", pairs), call("sigmoid", without_reference(pairs))
    assert torch.allclose(call("hypo", pairs), torch.where(right, dpo, free))


def test_hypo_is_never_below_dpo_and_pushes_the_pairs_that_the_reference_has_wrong_harder():
    pairs = random_pairs(40)
    wrong = pairs["ref_chosen_logps"] < pairs["ref_rejected_logps"]
    excess = call("hypo", pairs) - call("sigmoid", pairs)
    assert (excess[wrong] > 0).all() and torch.allclose(excess[~wrong], tensor(0.0))
    hypo_dw, dpo_dw = gradients(hypo, pairs)[0].abs(), gradients(sigmoid, pairs)[0].abs()
    assert (hypo_dw[wrong] > dpo_dw[wrong]).all()
    assert torch.allclose(hypo_dw[~wrong], dpo_dw[~wrong])


def test_hypo_begins_above_log_2_in_the_pairs_that_the_reference_has_wrong():
    w, l = tensor(-10.0, -20.0), tensor(-20.0, -10.0)  # noqa: E741
    right, wrong = hypo(w, l, w, l, beta=0.1)
    assert right.item() == pytest.approx(LOG_2)
    assert wrong.item() == pytest.approx(math.log1p(math.e))


def test_beta_dpo_without_a_is_dpo_and_otherwise_dpo_at_the_beta_of_the_batch():
    pairs = random_pairs()
    assert torch.equal(call("beta_dpo", pairs, beta_dpo_a=0.0), call("sigmoid", pairs))
    gap_mean = margin(pairs).mean().item() - 5
    batch_beta = 0.1 * (1 + 0.6 * 5)
    assert batch_beta == pytest.approx(4 * 0.1)
    found = call("beta_dpo", pairs | {"gap_mean": gap_mean})
    assert torch.allclose(found, call("sigmoid", pairs, beta=batch_beta))
    moved = gradients(beta_dpo, pairs, gap_mean=gap_mean)[0]
    assert torch.allclose(moved, gradients(sigmoid, pairs, beta=batch_beta)[0])


def test_the_beta_of_a_batch_does_not_fall_below_a_thousandth():
    pairs = random_pairs()
    found = call("beta_dpo", pairs | {"gap_mean": margin(pairs).mean().item() + 50})
    assert torch.allclose(found, call("sigmoid", pairs, beta=1e-3))


def test_the_beta_of_a_batch_is_that_of_the_pairs_that_are_kept():
    pairs = random_pairs()
    keep = torch.tensor([True, False, True, True, False, False])
    kept = {key: value[keep] for key, value in pairs.items()}
    found = call("beta_dpo", pairs | {"keep": keep}, beta_dpo_a=0.02)
    assert torch.allclose(found[keep], call("beta_dpo", kept, beta_dpo_a=0.02))
    assert not torch.allclose(found, call("beta_dpo", pairs, beta_dpo_a=0.02))


def test_alpha_dpo_without_alpha_is_simpo_and_otherwise_simpo_at_the_margin_of_each_pair():
    pairs, beta = random_pairs(), 2.5
    expected = call("simpo", pairs, beta=beta, gamma=1.5)
    assert torch.allclose(call("alpha_dpo", pairs, alpha_dpo_alpha=0.0), expected)
    a, b = ratios(pairs)
    gap = a / pairs["chosen_lengths"] - b / pairs["rejected_lengths"]
    state = {"gap_mean": 0.4, "gap_std": 3.0}
    targets = 0.6 + 0.2 * (gap - 0.4) / 3
    found, slopes = call("alpha_dpo", pairs, **state), gradients(alpha_dpo, pairs, **state)[0]
    for i, target in enumerate(targets):
        one = {key: value[i:i + 1] for key, value in pairs.items()}
        gamma = beta * target.item()
        assert torch.allclose(found[i], call("simpo", one, beta=beta, gamma=gamma))
        assert torch.allclose(slopes[i], gradients(simpo, one, beta=beta, gamma=gamma)[0])


def step_means(gaps, beta=1.0):
    """The metrics of a step whose pairs have these gaps."""
    margins = beta * tensor(*gaps)
    square = (margins ** 2).mean().item()
    return {"rewards/margins": margins.mean().item(), "rewards/margins_squared": square}


def test_the_averages_of_the_gaps_are_those_of_the_first_step_and_not_a_tenth_of_them():
    start = start_state(alpha_dpo)
    assert start == {"gap_mean": 0.0, "gap_std": 1.0}
    first = update_gap(start, step_means([2.0, 8.0], beta=0.1), beta=0.1)
    assert first["gap_mean"] == pytest.approx(5) and first["gap_std"] == pytest.approx(3)


def test_the_averages_of_the_gaps_weigh_ten_steps_equally_and_become_exponential():
    state, means = start_state(beta_dpo), []
    for step in range(10):
        means.append(float(step ** 2))
        state = update_gap(state, step_means([means[-1]]), beta=1.0)
        assert state["gap_mean"] == pytest.approx(sum(means) / len(means))
    for _ in range(2):
        expected = 0.9 * state["gap_mean"] + 0.1 * 7
        state = update_gap(state, step_means([7.0]), beta=1.0)
        assert state["gap_mean"] == pytest.approx(expected)
    assert state.keys() == {"gap_mean", "gap_steps"}


def test_the_spread_of_alpha_dpo_does_not_start_from_rounding():
    start = start_state(alpha_dpo)
    assert update_gap(start, step_means([0.0, 0.0]), beta=1.0) == start
    assert update_gap(start, step_means([1e-6, -1e-6]), beta=1.0) == start
    below_0 = {"rewards/margins": 0.1, "rewards/margins_squared": 0.1 ** 2 - 1e-17}
    assert below_0["rewards/margins_squared"] < 0.1 ** 2
    assert update_gap(start, below_0, beta=1.0) == start
    later = update_gap(start, step_means([0.1, -0.1]), beta=1.0)
    assert later["gap_std"] == pytest.approx(0.1) and later["gap_steps"] == 1


def test_dr_dpo_is_between_the_minimum_and_the_mean_of_dpo_and_reaches_both():
    pairs = random_pairs(9)
    dpo = call("sigmoid", pairs)
    soft = call("dr_dpo", pairs)
    assert torch.equal(soft, soft[:1].expand(9)) and dpo.min() < soft[0] < dpo.mean()
    assert torch.allclose(soft[0], -torch.log(torch.exp(-dpo).mean()))
    assert torch.allclose(call("dr_dpo", pairs, dr_beta=1e7)[0], dpo.mean(), rtol=1e-6)
    assert torch.allclose(call("dr_dpo", pairs, dr_beta=1e-7)[0], dpo.min(), atol=1e-6)
    same = {key: value[:1].expand(4) for key, value in pairs.items()}
    assert torch.allclose(call("dr_dpo", same), call("sigmoid", same))


def test_dr_dpo_weighs_a_pair_by_the_probability_that_its_label_is_right():
    pairs = random_pairs(9)
    share = sig(0.1 * margin(pairs))
    weights = share / share.sum()
    expected = weights * gradients(sigmoid, pairs)[0]
    assert torch.allclose(gradients(dr_dpo, pairs)[0] / 9, expected)
    flipped = pair(tensor(-200.0, 20.0), 0.0)
    dw, _ = gradients(dr_dpo, flipped)
    assert dw[0].abs() < 1e-8 and dw[1].abs() > 1e-3


def test_dr_dpo_is_finite_in_fp32_where_exp_and_log_one_after_another_are_not():
    h = torch.tensor([-1100.0, -1200.0], requires_grad=True)
    zero = torch.zeros(2)
    naive = -torch.log(torch.exp(-F.softplus(-0.1 * h)).mean())
    assert naive == math.inf and torch.autograd.grad(naive, h)[0].isnan().any()
    loss = dr_dpo(h, zero, zero, zero, beta=0.1)
    slopes, = torch.autograd.grad(loss.mean(), h)
    assert loss[0].item() == pytest.approx(110 + LOG_2, rel=1e-4) and slopes.isfinite().all()


# --------------------------------------------------------------------------------------------------
# cpo (2401.08417 eq. 5), simpo (2405.14734 eq. 6), alphapo (2501.03884),
# orpo (2403.07691 eqs. 6, 7), slic (2305.10425)
# --------------------------------------------------------------------------------------------------

def test_cpo_without_its_likelihood_is_dpo_with_a_reference_of_zeros():
    pairs = random_pairs()
    expected = call("sigmoid", without_reference(pairs), label_smoothing=0.1)
    assert torch.allclose(call("cpo", pairs, cpo_alpha=0.0, label_smoothing=0.1), expected)


@pytest.mark.parametrize("name, weight", [
    ("cpo", "cpo_alpha"),
    ("simpo", "cpo_alpha"),
    ("orpo", "nll_weight"),
])
def test_the_likelihood_term_is_linear_in_its_weight_and_is_sft(name, weight):
    pairs = random_pairs()
    off, one, three = (call(name, pairs, **{weight: value}) for value in (0.0, 1.0, 3.0))
    assert torch.allclose(one - off, call("sft", pairs))
    assert torch.allclose(three - off, 3 * call("sft", pairs))
    without, _ = gradients(LOSSES[name], pairs, **{weight: 0.0})
    with_likelihood, _ = gradients(LOSSES[name], pairs, **{weight: 2.0})
    mean_length = pairs["chosen_lengths"].double().mean()
    assert torch.allclose(with_likelihood, without - 2 / mean_length)


def test_simpo_at_equal_averages_is_the_softplus_of_gamma_and_gamma_is_absolute():
    pairs = pair(-10.0, tensor(0.0))
    assert torch.equal(*averages(pairs))
    expected = math.log(1 + math.exp(1.3))
    assert call("simpo", pairs, beta=7.0, gamma=1.3).item() == pytest.approx(expected)


def test_simpo_without_gamma_is_cpo_on_averages():
    pairs = random_pairs()
    expected = call("cpo", averaged(pairs), beta=2.0, cpo_alpha=0.0)
    assert torch.allclose(call("simpo", pairs, beta=2.0, gamma=0.0), expected)


def test_simpo_is_length_free():
    pairs = random_pairs()
    longer = {k: 3 * v if "chosen" in k else v for k, v in pairs.items()}
    assert torch.allclose(call("simpo", pairs), call("simpo", longer))


def test_cpo_simpo_smooths_labels_too():
    pairs = random_pairs()
    chosen, rejected = averages(pairs)
    z = 2 * (chosen - rejected) - 1
    expected = 0.8 * F.softplus(-z) + 0.2 * F.softplus(z)
    assert torch.allclose(call("simpo", pairs, label_smoothing=0.2), expected)


def test_alphapo_tends_to_simpo_as_alpha_goes_to_0_from_both_sides():
    pairs = random_pairs()
    expected = call("simpo", pairs, beta=2.5, gamma=0.1)
    for alpha in (1e-7, -1e-7):
        assert torch.allclose(call("alphapo", pairs, alphapo_alpha=alpha), expected, rtol=1e-4)


def test_alphapo_shapes_the_reward_by_a_power_of_the_average_token_probability():
    pairs, alpha = random_pairs(), 0.5
    chosen, rejected = ((1 - x.exp() ** -alpha) / alpha for x in averages(pairs))
    expected = -F.logsigmoid(2.0 * (chosen - rejected) - 0.3)
    loss = call("alphapo", pairs, beta=2.0, gamma=0.3, alphapo_alpha=alpha)
    assert torch.allclose(loss, expected)


def one_token_pair(w, l):  # noqa: E741
    """One pair of answers of one token each, in fp32."""
    return {
        "policy_chosen_logps": torch.tensor([w]),
        "policy_rejected_logps": torch.tensor([l]),
        "chosen_lengths": torch.ones(1),
        "rejected_lengths": torch.ones(1),
    }


def test_alphapo_still_raises_chosen_where_both_are_so_improbable_that_the_power_overflows():
    pairs = one_token_pair(-1e4 - 5, -1e4)
    better = one_token_pair(-1e4 - 1, -1e4)
    assert call("alphapo", pairs) > call("alphapo", better)
    dw, dl = gradients(alphapo, pairs)
    assert dw < 0 < dl


def test_orpo_is_the_log_of_one_plus_the_odds_ratio():
    pairs, lam = random_pairs(), 0.3
    p, q = (x.exp() for x in averages(pairs))
    odds_ratio = (p / (1 - p)) / (q / (1 - q))
    expected = lam * torch.log(1 + 1 / odds_ratio)
    assert torch.allclose(call("orpo", pairs, beta=lam, nll_weight=0.0), expected)


def test_orpo_of_improbable_answers_is_cpo_on_averages_with_beta_1():
    pairs = pair(tensor(-40.0, -45.0), -40.0)
    expected = F.softplus(-policy_margin(pairs))
    assert torch.allclose(call("orpo", pairs, beta=1.0, nll_weight=0.0), expected)


@pytest.mark.parametrize("w, l", [
    (0.0, -1.0),
    (-1.0, 0.0),
    (0.0, 0.0),
    (-1e-9, -1e-9),
    (-1e4, -1e-9),
    (-1e-9, -1e4),
])
def test_orpo_and_its_gradient_are_finite_up_to_probability_one_in_fp32(w, l):  # noqa: E741
    pairs = one_token_pair(w, l)
    assert call("orpo", pairs).isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(orpo, pairs))


def test_orpo_still_lowers_a_rejected_answer_of_probability_one():
    pairs = pair(10.0, tensor(30.0))
    assert pairs["policy_rejected_logps"] == 0 and gradients(orpo, pairs)[1] > 0


def test_log_odds_are_extended_linearly_from_one_ulp_below_probability_one():
    """Two answers of one token and probability 1: the weight is λ/2, the slope 1/(1 − e^(−ulp))."""
    pairs = pair(20.0, tensor(30.0))
    dw, dl = gradients(orpo, pairs, beta=0.1, nll_weight=0.0)
    expected = tensor(0.1 / 2 / -math.expm1(-torch.finfo(torch.float64).eps))
    assert torch.allclose(dl, expected, rtol=1e-12) and torch.allclose(dw, -expected, rtol=1e-12)


def test_slic_calibrates_up_to_delta_and_its_pull_on_the_target_is_constant():
    w, l = tensor(-3.0, -3.0), tensor(-3.5, -9.0)  # noqa: E741
    assert torch.allclose(slic(w, l, slic_delta=1.0, slic_lambda=0.0), tensor(0.5, 0.0))
    pairs = {"policy_chosen_logps": w, "policy_rejected_logps": l}
    assert torch.allclose(gradients(slic, pairs, slic_lambda=0.2)[0], tensor(-1.2, -0.2))


def test_slic_regularizes_toward_the_target_answer_and_without_one_toward_the_chosen():
    w, l, target = tensor(-3.0), tensor(-9.0), tensor(-5.0)  # noqa: E741
    assert slic(w, l, target, slic_lambda=0.2).item() == pytest.approx(1.0)
    assert slic(w, l, slic_lambda=0.2).item() == pytest.approx(0.6)
    target.requires_grad_()
    slope_of_target, = torch.autograd.grad(slic(w, l, target, slic_lambda=0.2).sum(), target)
    assert torch.equal(slope_of_target, tensor(-0.2))


def test_slic_without_its_regularizer_is_the_hinge_with_a_reference_of_zeros_up_to_scale():
    pairs, delta = random_pairs(), 4.0
    expected = delta * call("hinge", without_reference(pairs), beta=1 / delta)
    assert torch.allclose(call("slic", pairs, slic_delta=delta, slic_lambda=0.0), expected)


# --------------------------------------------------------------------------------------------------
# repo (2503.07426), simper (2502.00883)
# --------------------------------------------------------------------------------------------------

def test_repo_is_gamma_at_equal_averages_and_exactly_0_beyond_the_margin():
    pairs = pair(tensor(-10.0, -9.5, -9.3, 0.0), 0.0)
    assert torch.allclose(call("repo", pairs, repo_gamma=0.6), tensor(0.6, 0.1, 0.0, 0.0))
    dw, dl = gradients(repo, pairs, repo_gamma=0.6)
    assert torch.equal(dw, tensor(-1.0, -1.0, 0.0, 0.0)) and torch.equal(dl, -dw)


def test_repo_is_simpo_over_beta_in_the_limit_of_a_large_beta():
    pairs, beta = random_pairs(), 1e6
    simpo_loss = call("simpo", pairs, beta=beta, gamma=0.6 * beta)
    assert torch.allclose(simpo_loss / beta, call("repo", pairs, repo_gamma=0.6))


def test_simper_is_the_difference_of_two_geometric_means_of_token_probabilities():
    chosen, rejected = tensor(0.5, 0.2, 0.9), tensor(0.3, 0.4)
    lengths = tensor(3.0), tensor(2.0)
    found = simper(chosen.log().sum()[None], rejected.log().sum()[None], *lengths)
    expected = (0.3 * 0.4) ** (1 / 2) - (0.5 * 0.2 * 0.9) ** (1 / 3)
    assert found.item() == pytest.approx(expected)


def test_simper_of_a_pair_and_of_its_flip_cancel_and_lie_between_minus_1_and_1():
    pairs = random_pairs(50)
    flipped = {}
    for key, value in pairs.items():
        sides = ("rejected", "chosen") if "chosen" in key else ("chosen", "rejected")
        flipped[key.replace(sides[1], sides[0])] = value
    loss = call("simper", pairs)
    assert torch.allclose(loss, -call("simper", flipped))
    assert (loss.abs() < 1).all()


def test_simper_teaches_next_to_nothing_about_an_improbable_answer():
    dw, dl = gradients(simper, pair(-30.0, tensor(-20.0)))
    assert dw.abs() < 1e-20 and dl.abs() < 1e-20
    dw, dl = gradients(simper, pair(20.0, tensor(30.0)))
    assert dw == -1 and dl == 1


# --------------------------------------------------------------------------------------------------
# sft
# --------------------------------------------------------------------------------------------------

def test_sft_is_cross_entropy_over_all_scored_tokens_of_the_batch():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11, dtype=torch.float64), torch.randint(11, (3, 7))
    labels[0, :5], labels[1, :2] = -100, -100
    logps = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(-1)
    mine = sft(logps, (labels != -100).sum(-1)).mean()
    assert torch.allclose(mine, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


# --------------------------------------------------------------------------------------------------
# npo (2404.05868)
# --------------------------------------------------------------------------------------------------

def forget(b, beta=0.1):
    """(NPO, its slope) at log-ratios b of the answer to forget."""
    rejected = (b - 30.0).detach().requires_grad_()
    loss = npo(rejected, torch.full_like(b, -30.0), beta=beta)
    return loss.detach(), torch.autograd.grad(loss.sum(), rejected)[0]


def test_npo_is_2_over_beta_times_dpo_whose_chosen_answer_does_not_move():
    b, beta = tensor(-40.0, 0.0, 3.0), 0.3
    assert torch.allclose(forget(b, beta)[0], 2 / beta * of(sigmoid, 0.0, b, beta=beta))
    printed = 2 / beta * torch.log(1 + torch.exp(b) ** beta)
    assert torch.allclose(forget(b, beta)[0], printed)


def test_npo_begins_as_gradient_ascent_and_lets_go_of_an_answer_that_is_forgotten():
    value, slopes = forget(tensor(0.0, -20.0, -400.0), beta=0.1)
    assert value[0].item() == pytest.approx(13.862943611)
    assert slopes[0] == 1 and torch.allclose(slopes[1], 2 * sig(tensor(-2.0)))
    assert 0 < slopes[2] < 1e-16


def test_npo_becomes_gradient_ascent_as_beta_goes_to_0():
    b = tensor(-40.0, 0.0, 3.0)
    value, slopes = forget(b, beta=1e-9)
    assert torch.allclose(slopes, torch.ones_like(b))
    assert torch.allclose(value - 2 / 1e-9 * LOG_2, b, atol=1e-5)


def test_simnpo_without_gamma_is_npo_on_averages_with_a_reference_of_zeros():
    """2410.07163, as the authors' TOFU code has it: −(2/β) log σ(−β l/n)."""
    rejected, lengths, beta = tensor(-30.0, -8.0), tensor(10.0, 2.0), 2.5
    average = rejected / lengths
    expected = -2 / beta * F.logsigmoid(-beta * average)
    assert torch.allclose(npo(average, torch.zeros(2), beta=beta), expected)


def test_a_sum_of_npo_and_sft_forgets_the_rejected_answer_and_keeps_the_chosen_one():
    pairs = random_pairs()
    dw, dl = gradients(find("npo,sft:0.5"), pairs, beta=0.1)
    assert torch.allclose(dw, torch.full_like(dw, -0.5 / pairs["chosen_lengths"].double().mean()))
    _, b = ratios(pairs)
    assert torch.allclose(dl, 2 * sig(0.1 * b))


# --------------------------------------------------------------------------------------------------
# f_divergence_score (2309.16240)
# --------------------------------------------------------------------------------------------------

DIVERGENCES = [
    ("reverse_kl", 0.5),
    ("forward_kl", 0.5),
    ("js", 0.5),
    ("alpha", 0.3),
    ("alpha", 1.0),
]


@pytest.mark.parametrize("f_divergence, alpha", DIVERGENCES)
def test_scores_are_0_at_the_reference_where_their_slope_is_1_or_for_js_a_half(f_divergence, alpha):
    a = tensor(0.0, grad=True)
    score = f_divergence_score(a, f_divergence, alpha)
    assert score.item() == pytest.approx(0, abs=1e-15)
    expected = 0.5 if f_divergence == "js" else 1.0
    assert torch.autograd.grad(score, a)[0].item() == pytest.approx(expected)


def test_scores_are_f_prime_of_the_probability_ratio():
    a = tensor(-4.0, -0.2, 0.7, 3.0)
    u = a.exp()
    assert torch.equal(f_divergence_score(a, "reverse_kl"), a)
    assert torch.allclose(f_divergence_score(a, "forward_kl"), 1 - 1 / u)
    assert torch.allclose(f_divergence_score(a, "js"), torch.log(2 * u / (1 + u)))
    assert torch.allclose(f_divergence_score(a, "alpha", 0.3), (1 - u ** -0.3) / 0.3)


def test_alpha_runs_from_reverse_to_forward_kl():
    a = tensor(-4.0, -0.2, 0.7, 3.0)
    forward_kl = f_divergence_score(a, "forward_kl")
    assert torch.allclose(f_divergence_score(a, "alpha", 1e-9), a)
    assert torch.equal(f_divergence_score(a, "alpha", 1.0), forward_kl)


def test_js_scores_are_bounded_by_log_2():
    a = torch.linspace(-50, 50, 101, dtype=torch.float64)
    assert (f_divergence_score(a, "js") <= math.log(2)).all()


@pytest.mark.parametrize("f_divergence, alpha", DIVERGENCES)
@pytest.mark.parametrize("shift", [-1e4, -100.0, 100.0, 1e4])
def test_scores_in_fp32_are_finite_and_keep_order_and_gradient_where_both_answers_fell_far(
        f_divergence, alpha, shift):
    """There forward_kl is NaN in TRL >= 0.29; in TRL 0.13 the margin and its gradient are 0."""
    a, b = torch.tensor([shift], requires_grad=True), torch.tensor([shift - 5])
    score_a = f_divergence_score(a, f_divergence, alpha)
    score_b = f_divergence_score(b, f_divergence, alpha)
    loss = sigmoid(score_a, score_b, torch.zeros(1), torch.zeros(1))
    gradient, = torch.autograd.grad(loss.sum(), a, retain_graph=True)
    assert loss.isfinite().all() and gradient.isfinite().all()
    if shift < 0:
        score_margin = score_a - score_b
        score_slope, = torch.autograd.grad(score_margin.sum(), a)
        assert score_margin > 0 and score_slope > 0


class FDivergenceType(enum.Enum):  # as another trainer names them
    JS_DIVERGENCE = 1


@pytest.mark.parametrize("bad", ["kl", "", None, FDivergenceType.JS_DIVERGENCE])
def test_an_unknown_divergence_is_an_error_and_not_the_reverse_kl(bad):
    with pytest.raises(ValueError, match="f_divergence must be"):
        f_divergence_score(tensor(1.0), bad)


@pytest.mark.parametrize("alpha", [0.0, -0.5, 1.1, math.nan])
def test_an_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\]"):
        f_divergence_score(tensor(1.0), "alpha", alpha)


# --------------------------------------------------------------------------------------------------
# Sums of losses
# --------------------------------------------------------------------------------------------------

def test_mpo_is_the_weighted_sum_of_its_parts():
    """2411.10442 Sec. 4.1 eq. 3, with the running shift that its quality loss has."""
    pairs = random_pairs() | {"delta": 0.2}
    expected = 0.8 * call("sigmoid", pairs) + 0.2 * call("bco_pair", pairs) + call("sft", pairs)
    mpo = call_sum("sigmoid:0.8,bco_pair:0.2,sft:1", pairs)
    assert torch.allclose(mpo, expected) and mpo.shape == (6,)


def test_rpo_pulls_each_chosen_token_up_with_constant_strength():
    pairs = random_pairs()
    dw, dl = gradients(sigmoid, pairs)
    total_w, total_l = gradients(find("sigmoid,sft:0.5"), pairs)
    n = pairs["chosen_lengths"].double().mean()
    assert torch.allclose(total_w, dw - 0.5 / n) and torch.equal(total_l, dl)


def test_sigmoid_and_sft_with_a_reference_of_zeros_is_cpo():
    pairs = random_pairs()
    assert torch.allclose(call_sum("sigmoid,sft", without_reference(pairs)), call("cpo", pairs))


def test_one_loss_of_weight_one_is_itself_and_another_weight_scales_it():
    assert find("ipo") is ipo and find("ipo:1.0") is ipo
    assert torch.allclose(call_sum("ipo:0.25", random_pairs()), 0.25 * call("ipo", random_pairs()))


def test_parameters_of_one_name_are_one_parameter_and_without_a_default_where_the_parts_disagree():
    assert hyperparameters(find("sigmoid,hinge")) == {"beta": 0.1, "label_smoothing": 0.0}
    assert hyperparameters(find("sigmoid,sppo_hard"))["beta"] is ...
    pairs = random_pairs()
    expected = call("sigmoid", pairs, beta=0.5) + call("sppo_hard", pairs, beta=0.5)
    assert torch.allclose(call_sum("sigmoid,sppo_hard", pairs, beta=0.5), expected)
    reason = "beta must be given: it has different defaults in the parts of sigmoid:1,sppo_hard:1"
    with pytest.raises(ValueError, match=reason):
        call_sum("sigmoid,sppo_hard", pairs)


def test_a_sum_needs_what_its_parts_need():
    total = find("simpo,sigmoid:0.5,sft")
    assert needs_reference(total) and needs_rejected(total)
    assert not needs_reference(find("simpo,sft"))
    expected = set(tensor_arguments(simpo)) | set(tensor_arguments(sigmoid))
    assert set(tensor_arguments(total)) == expected


def test_a_sum_has_a_mark_if_all_pairwise_parts_have_it_and_batch_if_one_part_has_it():
    assert find("sigmoid,aot").tags == {"batch"}
    assert find("sigmoid,sft").tags == {"margin"}
    assert find("ipo,simpo").tags == {"average"}


def test_a_sum_has_the_state_of_one_part_and_refuses_two_or_a_reward_in_other_units():
    assert find("sigmoid:0.8,bco_pair:0.2,sft:1").update is bco_pair.update
    assert start_state(find("alpha_dpo,simpo,sft")) == {"gap_mean": 0.0, "gap_std": 1.0}
    assert find("sigmoid,hinge").update is None and start_state(find("sigmoid,hinge")) == {}
    with pytest.raises(ValueError, match="one loss with state at most, not bco_pair, beta_dpo"):
        find("bco_pair,beta_dpo")
    with pytest.raises(ValueError, match="alpha_dpo has state per token, so the other parts"):
        find("alpha_dpo,sigmoid")


@pytest.mark.parametrize("spec, message", [
    ("sigmoyd", "nearest name is sigmoid"),
    ("sigmoid,", "a name is missing"),
    ("sigmoid:0", "weight of sigmoid must be a number > 0"),
    ("sigmoid:-1", "must be a number > 0"),
    ("sigmoid:nan", "must be a number > 0"),
    ("sigmoid:a", "must be a number > 0"),
    ("sigmoid,sigmoid:2", "names sigmoid twice"),
    ("", "a name is missing"),
])
def test_a_wrong_sum_is_refused_by_name(spec, message):
    with pytest.raises(ValueError, match=message):
        find(spec)


# --------------------------------------------------------------------------------------------------
# Properties of every loss
# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MARGIN)
def test_a_margin_loss_only_sees_the_difference_of_rewards(name):
    pairs = random_pairs()
    n_w = n_l = 1
    if "average" in LOSSES[name].tags:
        n_w, n_l = pairs["chosen_lengths"], pairs["rejected_lengths"]
    shifted = pairs | {
        "policy_chosen_logps": pairs["policy_chosen_logps"] + 3.7 * n_w,
        "policy_rejected_logps": pairs["policy_rejected_logps"] + 3.7 * n_l,
    }
    assert torch.allclose(call(name, pairs), call(name, shifted))
    dw, dl = gradients(LOSSES[name], pairs)
    assert torch.allclose(dw * n_w, -dl * n_l)


OTHERS = [name for name in WITH_REFERENCE if name not in MARGIN and name != "hypo"]


@pytest.mark.parametrize("name", OTHERS)
def test_the_other_losses_with_a_reference_see_more_than_a_margin(name):
    """Therefore they refuse a zero reference and f-divergence scores, which are known up to a
    constant per prompt. The sorting losses compare the pairs of a batch: a constant for one pair
    changes its rank in `aot_unpaired`, and nothing in `aot`. `hypo` reads the margin of the policy,
    but more of the reference than its margin to the policy."""
    pairs = random_pairs()
    shift = torch.arange(6) * 7.0
    shifted = {k: v + shift if k.startswith("policy") else v for k, v in pairs.items()}
    assert name == "aot" or not torch.allclose(call(name, pairs), call(name, shifted))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(name):
    pairs = random_rows(name)
    for key in pairs:
        if "logps" in key:
            pairs[key] = pairs[key] / 20  # small, because χPO takes eᵃ
    names = [key for key in pairs if key in tensor_arguments(LOSSES[name])]
    tensors = [pairs[key].requires_grad_(key.startswith("policy")) for key in names]
    if name == "kto_pair":  # finite differences do not know that z is detached: keep z at 0
        pairs["policy_chosen_logps"].data -= 200
        pairs["policy_rejected_logps"].data -= 200

    # Nor do they know that β_B and m are detached: keep both constant.
    constant = {"beta_dpo": {"beta_dpo_a": 0.0}, "alpha_dpo": {"alpha_dpo_alpha": 0.0}}

    def function(*values):
        given = dict(zip(names, values, strict=True))
        return LOSSES[name](**given, **constant.get(name, {})) + 0  # + 0: `dr_dpo` is expanded

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_there_is_one_loss_per_row_for_any_number_of_rows(name, size):
    pairs = random_rows(name, 5)
    mean_length = {"mean_chosen_length": 7.5}  # so that no loss averages over its batch
    whole = call(name, pairs | mean_length)
    part = call(name, {k: v[:size] for k, v in pairs.items()} | mean_length)
    assert part.shape == (size,)
    if name not in BATCH_COUPLED:
        rounding = 0 if kind_of(LOSSES[name]) == "pairs" else 1e-14
        assert torch.allclose(part, whole[:size], rtol=rounding, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_has_the_weighted_mean_loss_of_its_parts_unless_its_pairs_are_coupled(name):
    pairs = random_rows(name, 12)
    parts = [{k: v[i:j] for k, v in pairs.items()} for i, j in ((0, 3), (3, 4), (4, 12))]
    pooled = sum(call(name, part).sum() for part in parts) / 12
    mean_length = {}
    if "chosen_lengths" in pairs:
        mean_length = {"mean_chosen_length": pairs["chosen_lengths"].double().mean()}
    with_mean_length = sum(call(name, part | mean_length).sum() for part in parts) / 12
    whole = call(name, pairs).mean()
    assert torch.allclose(whole, pooled) == (name not in BATCH_COUPLED | TOKEN_MEAN)
    assert torch.allclose(whole, with_mean_length) == (name not in BATCH_COUPLED)
    assert ("batch" in LOSSES[name].tags) == (name in BATCH_COUPLED)


@pytest.mark.parametrize("name", NAMES)
def test_token_level_tensors_and_unequal_shapes_are_refused(name):
    pairs = random_rows(name, 2)
    per = "pair" if kind_of(LOSSES[name]) == "pairs" else "answer"
    with pytest.raises(ValueError, match=f"{name} takes one number per {per}"):
        call(name, {k: v[..., None].expand(*v.shape, 3) for k, v in pairs.items()})
    with pytest.raises(ValueError, match=f"{name} takes one number per {per}"):
        first = tensor_arguments(LOSSES[name])[0]
        call(name, pairs | {first: pairs[first][:1]})


OUT_OF_RANGE = {
    "beta": [0.0, -0.1, math.inf, math.nan],
    "label_smoothing": [-0.1, 0.5, 1.0, math.nan],
    "discopop_tau": [0.0, -1.0, math.inf, math.nan],
    "rdpo_alpha": [-0.1, math.inf, math.nan],
    "odpo_alpha": [-0.1, math.inf, math.nan],
    "dpop_lambda": [-1.0, math.inf, math.nan],
    "cal_dpo_weight": [-1.0, math.inf, math.nan],
    "chipo_r_max": [0.0, -1.0, math.inf, math.nan],
    "cpo_alpha": [-1.0, math.inf, math.nan],
    "gamma": [math.inf, math.nan],
    "alphapo_alpha": [0.0, math.inf, math.nan],
    "nll_weight": [-1.0, math.inf, math.nan],
    "slic_delta": [-1.0, math.inf, math.nan],
    "slic_lambda": [-1.0, math.inf, math.nan],
    "margin_kappa": [-1.0, math.inf, math.nan],
    "rpo_eta": [-1.0, math.inf, math.nan],
    "shift_lambda": [-0.1, 1.1, math.nan],
    "bpo_alpha": [0.0, -0.1, 1.1, math.nan],
    "beta_dpo_a": [-0.1, math.inf, math.nan],
    "alpha_dpo_alpha": [-0.1, math.inf, math.nan],
    "dr_beta": [0.0, -1.0, math.inf, math.nan],
    "repo_gamma": [-0.1, math.inf, math.nan],
    "desirable_weight": [-1.0, math.inf, math.nan],
    "undesirable_weight": [-1.0, math.inf, math.nan],
    "nca_alpha": [0.0, -1.0, math.inf, math.nan],
    "exo_beta_r": [0.0, -1.0, math.inf, math.nan],
}
AT_THE_EDGE = {  # in range
    "label_smoothing": [1e-9, 0.499],
    "rdpo_alpha": [0.0],
    "odpo_alpha": [0.0],
    "dpop_lambda": [0.0],
    "cal_dpo_weight": [0.0],
    "chipo_r_max": [None],
    "cpo_alpha": [0.0],
    "gamma": [0.0, -1.0],
    "alphapo_alpha": [-0.5],
    "nll_weight": [0.0],
    "slic_delta": [0.0],
    "slic_lambda": [0.0],
    "margin_kappa": [0.0],
    "rpo_eta": [0.0],
    "shift_lambda": [0.0, 1.0],
    "bpo_alpha": [1e-9, 1.0],
    "beta_dpo_a": [0.0],
    "alpha_dpo_alpha": [0.0],
    "dr_beta": [1e-9],
    "repo_gamma": [0.0],
    "desirable_weight": [0.0],
    "undesirable_weight": [0.0],
    "nca_alpha": [1e-9],
    "exo_beta_r": [1e-9],
}
HYPERPARAMETERS = []
for _name in NAMES:
    HYPERPARAMETERS += [(_name, parameter) for parameter in hyperparameters(LOSSES[_name])]


@pytest.mark.parametrize("name, parameter", HYPERPARAMETERS)
def test_a_hyper_parameter_out_of_range_is_refused_by_name_and_value(name, parameter):
    extra = [0.0] if (name, parameter) == ("exo_pair", "label_smoothing") else []
    for value in OUT_OF_RANGE[parameter] + extra:
        with pytest.raises(ValueError, match=rf"{parameter} must be .*{value}"):
            call(name, random_rows(name), **{parameter: value})


@pytest.mark.parametrize("name, parameter", HYPERPARAMETERS)
def test_a_hyper_parameter_at_the_edge_of_its_range_is_accepted(name, parameter):
    for value in AT_THE_EDGE.get(parameter, []):
        assert call(name, random_rows(name), **{parameter: value}).isfinite().all()


@pytest.mark.parametrize("name, parameter", HYPERPARAMETERS)
def test_the_docstring_gives_the_range_that_is_enforced(name, parameter):
    text = LOSSES[name].ranges[parameter]
    args = inspect.getdoc(LOSSES[name]).split("\nArgs ")[1].split("\nElsewhere ")[0]
    args = " ".join(args.split())
    assert f"{parameter} {text}" in args or f"{parameter} in {text}" in args


def test_a_sum_refuses_what_its_parts_refuse():
    with pytest.raises(ValueError, match="beta must be > 0 and finite, got 0.0"):
        call_sum("sigmoid,hinge", random_pairs(), beta=0.0)


def test_a_loss_without_a_range_for_a_hyper_parameter_cannot_be_registered():
    def unchecked(policy_chosen_logps, *, beta=0.1):
        return beta * policy_chosen_logps

    with pytest.raises(TypeError, match="no range for beta"):
        registry.loss("margin")(unchecked)
    assert "unchecked" not in LOSSES


@pytest.mark.parametrize("text, inside, outside", [
    ("> 0", [1e-9, 5], [0, -1]),
    (">= 0", [0, 5], [-1e-9]),
    ("!= 0", [-1, 1e-9], [0.0]),
    ("finite", [-1e30, 0, 1e30], []),
    ("[0, 0.5)", [0, 0.25], [-1e-9, 0.5]),
    ("(0, 0.5]", [1e-9, 0.5], [0, 0.51]),
])
def test_a_range_reads_as_in_mathematics(text, inside, outside):
    assert all(registry.in_range(value, text) for value in inside)
    assert not any(registry.in_range(value, text) for value in outside)
    assert not any(registry.in_range(value, text) for value in (math.inf, -math.inf, math.nan))


@pytest.mark.parametrize("name", NAMES)
def test_no_loss_reads_a_value_back_from_the_device(name):
    """A read makes the CPU wait for a GPU. Tensors on the meta device have no values to read."""
    pairs = {key: value.to("meta") for key, value in random_rows(name).items()}
    assert call(name, pairs).shape == (6,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("a, b", list(itertools.product([-1e4, 0.0, 1e4], repeat=2)))
def test_loss_and_gradient_are_finite_at_log_ratios_of_1e4(name, a, b, dtype):
    pairs = random_pairs(1, dtype=dtype)
    pairs["policy_chosen_logps"] += a
    pairs["policy_rejected_logps"] += b
    if name == "simper":  # it has the probabilities themselves, which are at most 1
        for side in ("chosen", "rejected"):
            pairs[f"policy_{side}_logps"].clamp_(max=0)
    loss = call(name, pairs)
    assert loss.isfinite().all() and loss.dtype == dtype
    for gradient in gradients(LOSSES[name], pairs):
        assert gradient.isfinite().all() and (gradient ** 2).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_capped_exponential_is_exact_below_its_cap_and_finite_and_rising_beyond(dtype):
    cap = math.log(torch.finfo(dtype).max) / 2
    below = torch.linspace(-cap, 0.99 * cap, 50, dtype=dtype)
    rounding = cap * torch.finfo(dtype).eps  # of 1 + x − cap, relative to 1
    assert torch.allclose(capped_exp(below), below.exp(), rtol=rounding)
    assert torch.equal(capped_exp(below, minus_one=True), below.expm1())
    beyond = torch.tensor([1.25 * cap, 2 * cap, 4 * cap], dtype=dtype, requires_grad=True)
    for minus_one in (False, True):
        value = capped_exp(beyond, minus_one)
        slope_beyond, = torch.autograd.grad(value.sum(), beyond)
        assert value.isfinite().all() and (value.diff() > 0).all()
        assert (slope_beyond > 0).all()
        assert ((0.99 * slope_beyond) ** 2).isfinite().all()  # 0.99: the cap is rounded


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_changes_none_of_its_arguments_and_keeps_no_state(name):
    pairs = random_rows(name)
    before = {k: v.clone() for k, v in pairs.items()}
    first = call(name, pairs)
    call(name, random_rows(name, seed=1))
    assert torch.equal(call(name, pairs), first)
    assert all(torch.equal(pairs[key], before[key]) for key in pairs)


def copied(name):
    """A loss as someone copies it: its source without `@loss`, and capped_exp where it calls it."""
    source = inspect.getsource(inspect.unwrap(LOSSES[name]))
    decorated = ast.parse(source).body[0]
    assert len(decorated.decorator_list) == 1
    lines = source.split("\n")[decorated.lineno - 1:]
    space = {"torch": torch, "F": F}
    if "capped_exp(" in "\n".join(lines):
        exec(inspect.getsource(capped_exp), space)
    exec("\n".join(lines), space)
    return space[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_a_loss_without_its_decorator_runs_with_torch_alone(name):
    pairs = {k: v for k, v in random_rows(name).items() if k in tensor_arguments(LOSSES[name])}
    assert torch.equal(copied(name)(**pairs), call(name, pairs))


def test_the_signature_says_what_a_loss_needs():
    assert needs_reference(sigmoid) and needs_rejected(sigmoid)
    assert hyperparameters(sigmoid) == {"beta": 0.1, "label_smoothing": 0.0}
    assert not needs_reference(sft) and not needs_rejected(sft) and hyperparameters(sft) == {}
    free = {"cpo", "simpo", "alphapo", "repo", "simper", "orpo", "slic", "sft"}
    assert set(OF_PAIRS) - set(WITH_REFERENCE) == free
    assert sides_of(sigmoid) == ("chosen", "rejected") and sides_of(sft) == ("chosen",)
    assert sides_of(npo) == ("rejected",) and needs_reference(npo)
    assert sides_of(find("npo,sft")) == ("chosen", "rejected")


@pytest.mark.parametrize("name", NAMES)
def test_every_docstring_has_its_sections_in_order(name):
    text = inspect.getdoc(LOSSES[name])
    sections = ("Paper ", "Formula ", "Gradient ", "Args ", "Elsewhere ")
    places = [text.index(f"\n{section}") for section in sections]
    assert places == sorted(places)
    assert all(parameter in text for parameter in hyperparameters(LOSSES[name]))


def test_the_table_has_each_loss_once_in_the_group_of_what_it_reads():
    groups, heading = {}, None
    for line in registry.table():
        if line.startswith("**"):
            heading = line.strip("*")
        elif line.startswith("| `"):
            groups.setdefault(heading, []).append(line.split("`")[1])
    assert sorted(sum(groups.values(), [])) == sorted(NAMES)
    assert set(groups["One answer"]) == {"sft", "npo"}
    scores = {"odpo", "score_margin", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"}
    assert set(groups["Pairs with scores, and a reference"]) == scores
    assert set(groups["Pairs"]) == set(PAIRWISE) - set(WITH_REFERENCE)
    assert set(groups["Labels"]) == {"kto", "apo_zero_unpaired", "bco"}
    lists = {"plackett_luce", "softmax_dpo", "infonca", "nca", "exo"}
    assert set(groups["Lists of K answers"]) == lists


def test_a_figure_of_every_margin_loss_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    registry.plot(tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [name for name in MARGIN if name not in BATCH_COUPLED])
def test_the_drawn_slope_is_the_derivative_of_the_drawn_loss(name):
    h = torch.linspace(-3, 3, 6001, dtype=torch.float64) + 1e-4
    value, drawn = registry.curve(LOSSES[name], h)
    between = (value[1:] - value[:-1]) / (h[1:] - h[:-1])
    assert torch.allclose(between, (drawn[1:] + drawn[:-1]) / 2, atol=1e-3)


# --- docs/losses.md -------------------------------------------------------------------------------

PAGE = (pathlib.Path(__file__).parent / "docs/losses.md").read_text()


def test_docs_losses_names_the_losses_of_each_kind():
    def named(pattern):
        return set(re.findall(r"`(\w+)`", re.search(pattern, PAGE, re.DOTALL)[1]))

    def tagged(*tags, without=()):
        names = set()
        for name in NAMES:
            if LOSSES[name].tags.issuperset(tags) and LOSSES[name].tags.isdisjoint(without):
                names.add(name)
        return names

    assert named("The margin losses of sums are (.*?);") == tagged("margin", without=["average"])
    assert named("those of averages are (.*?)\\.") == tagged("margin", "average")
    assert named("the other losses train on it\\. (.*?) compare the pairs") == tagged("batch")
    carried = {name for name in NAMES if LOSSES[name].update}
    assert named("\n\n([^\n]*?) carry moving averages") == carried
