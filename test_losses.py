"""The claims of the papers, in the order of losses.py: read it beside them.

Letters as there: w, l the policy's log-probs of chosen and rejected, w0, l0 the reference's, a = w − w0, b = l − l0, h = a − b.
Everything is float64 unless a test says otherwise.
"""
import enum
import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import losses
from losses import (LOSSES, alphapo, aot_unpaired, apo_down, apo_zero, bco_pair, cal_dpo, chipo, discopop,
                    dpop, exo_pair, f_divergence_score, find, hinge, hyperparameters, ipo, kto_pair, nca_pair, needs_reference,
                    needs_rejected, odpo, orpo, rdpo, robust, sft, sigmoid, simpo, slic, sppo_hard, tensor_arguments,
                    update_delta)

NAMES = [name for name, function in LOSSES.items() if name == function.__name__]
PAIRWISE = [name for name in NAMES if needs_rejected(LOSSES[name])]
BATCH_COUPLED = {"aot", "aot_unpaired", "kto_pair"}  # the loss of a pair depends on the others, whatever is passed in
TOKEN_MEAN = {"cpo", "orpo", "sft"}  # it does unless they are told the batch's mean_chosen_length


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def random_pairs(size=6, seed=0, dtype=torch.float64):
    """{argument: (B,)}: log-probs between −60 and −1, the lengths they could come from, and scores."""
    generator = torch.Generator().manual_seed(seed)
    logps = {name: -1 - 59 * torch.rand(size, generator=generator, dtype=dtype) for name in
             ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")}
    lengths = {name: torch.randint(1, 40, (size,), generator=generator) for name in ("chosen_lengths", "rejected_lengths")}
    worse = torch.randn(size, generator=generator, dtype=dtype)
    return logps | lengths | {"rejected_scores": worse, "chosen_scores": worse + 0.1 + torch.rand(size, generator=generator, dtype=dtype)}


def call(name, tensors, **hyper):
    return LOSSES[name](**{key: tensors[key] for key in tensor_arguments(LOSSES[name]) if key in tensors}, **hyper)


def pair(a, b, **others):
    """Tensors of pairs with log-ratios a and b (the reference at −20 and −30), lengths 1, and scores that differ by 1."""
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    zero, one = torch.zeros_like(a + b), torch.ones_like(a + b)
    return {"policy_chosen_logps": a - 20 + zero, "policy_rejected_logps": b - 30 + zero, "ref_chosen_logps": zero - 20,
            "ref_rejected_logps": zero - 30, "chosen_lengths": one, "rejected_lengths": one, "chosen_scores": one,
            "rejected_scores": zero} | others


def of(function, a, b=0.0, **hyper):
    """The loss at log-ratios a and b."""
    return call(function.__name__, pair(a, b), **hyper)


def gradients(function, tensors, **hyper):
    """(∂ΣL/∂w, ∂ΣL/∂l)"""
    names = [name for name in tensor_arguments(function) if name in tensors]
    tensors = {name: tensors[name].clone().requires_grad_(name.startswith("policy")) for name in names}
    total = function(**tensors, **hyper).sum()
    return torch.autograd.grad(total, [tensors["policy_chosen_logps"], tensors["policy_rejected_logps"]])


def slope(function, h, **hyper):
    """∂L/∂h"""
    h = torch.as_tensor(h, dtype=torch.float64).clone().requires_grad_()
    return torch.autograd.grad(of(function, h, **hyper).sum(), h)[0]


def ratios(t):
    return t["policy_chosen_logps"] - t["ref_chosen_logps"], t["policy_rejected_logps"] - t["ref_rejected_logps"]


def margin(t):
    a, b = ratios(t)
    return a - b


def averages(t):
    return t["policy_chosen_logps"] / t["chosen_lengths"], t["policy_rejected_logps"] / t["rejected_lengths"]


# ------------------------------------------------------------------------------------------------------------------------
# Every loss at π = π_ref, and its gradient as its page states it
# ------------------------------------------------------------------------------------------------------------------------

AT_REFERENCE = {  # lengths 1, scores that differ by 1, averages of −20 and −30
    "sigmoid": math.log(2), "robust": math.log(2), "hinge": 1.0, "exo_pair": -math.log(2) - 0.5 * math.log(1e-3 * (1 - 1e-3)),
    "discopop": (math.log(2) + 1) / 2, "ipo": 25.0, "sigmoid_norm": math.log(2), "rdpo": math.log(2), "odpo": math.log(2),
    "nca_pair": 2 * math.log(2), "bco_pair": 2 * math.log(2), "sppo_hard": 1 / (2 * 0.001 ** 2), "kto_pair": 0.5, "apo_zero": 1.0,
    "apo_down": 1.0, "dpop": math.log(2), "cal_dpo": math.log(2) + 50, "chipo": math.log(2), "aot": math.log(2),
    "aot_unpaired": math.log(2)}


@pytest.mark.parametrize("name", [name for name in NAMES if needs_reference(LOSSES[name])])
def test_value_where_policy_equals_reference(name):
    assert call(name, pair(0.0, tensor(0.0, 0.0))).tolist() == pytest.approx([AT_REFERENCE[name]] * 2, rel=1e-12)


def sig(x):
    return 1 / (1 + torch.exp(-x))


def bump(x):
    return sig(x) * sig(-x)


def lo_slope(x):
    return 1 / (1 - torch.exp(x))


ANALYTIC = {  # ∂L/∂w, ∂L/∂l as the "Gradient" of each page says, at the hyper-parameters of HYPER
    "sigmoid": lambda t, a, b: (-0.3 * (sig(-0.3 * (a - b)) - 0.1), 0.3 * (sig(-0.3 * (a - b)) - 0.1)),
    "robust": lambda t, a, b: tuple(s * 0.3 * (0.8 * sig(-0.3 * (a - b)) + 0.2 * sig(0.3 * (a - b))) / 0.6 for s in (-1, 1)),
    "hinge": lambda t, a, b: tuple(s * 0.1 * (0.1 * (a - b) < 1).double() for s in (-1, 1)),
    "exo_pair": lambda t, a, b: tuple(s * 0.1 * bump(0.1 * (a - b)) * (0.1 * (a - b) - math.log(0.99 / 0.01)) for s in (1, -1)),
    "discopop": lambda t, a, b: tuple(s * 0.05 * discopop_slope(0.05 * (a - b), 2.0) for s in (1, -1)),
    "ipo": lambda t, a, b: (2 * (a / t["chosen_lengths"] - b / t["rejected_lengths"] - 5) / t["chosen_lengths"],
                            -2 * (a / t["chosen_lengths"] - b / t["rejected_lengths"] - 5) / t["rejected_lengths"]),
    "sigmoid_norm": lambda t, a, b: (-5 * sig(-5 * (a / t["chosen_lengths"] - b / t["rejected_lengths"])) / t["chosen_lengths"],
                                     5 * sig(-5 * (a / t["chosen_lengths"] - b / t["rejected_lengths"])) / t["rejected_lengths"]),
    "rdpo": lambda t, a, b: tuple(s * 0.1 * sig(-(0.1 * (a - b) + 0.02 * (t["chosen_lengths"] - t["rejected_lengths"]))) for s in (-1, 1)),
    "odpo": lambda t, a, b: tuple(s * 0.1 * sig(2 * torch.log(t["chosen_scores"] - t["rejected_scores"]) - 0.1 * (a - b)) for s in (-1, 1)),
    "nca_pair": lambda t, a, b: (-0.1 * (1 - 1.5 * sig(0.1 * a)), 0.05 * sig(0.1 * b)),
    "bco_pair": lambda t, a, b: (-0.1 * sig(-(0.1 * a - 0.4)), 0.1 * sig(0.1 * b - 0.4)),
    "sppo_hard": lambda t, a, b: (2 * (a - 5), 2 * (b + 5)),
    "kto_pair": lambda t, a, b: (-0.05 * bump(0.1 * (a - b.mean().clamp(min=0))), 0.05 * bump(0.1 * (a.mean().clamp(min=0) - b))),
    "apo_zero": lambda t, a, b: (-0.1 * bump(0.1 * a), 0.1 * bump(0.1 * b)),
    "apo_down": lambda t, a, b: (0.1 * (bump(0.1 * a) - bump(0.1 * (a - b))), 0.1 * bump(0.1 * (a - b))),
    "dpop": lambda t, a, b: (-0.1 * sig(-0.1 * (a - b - 3 * F.relu(-a))) * torch.where(a < 0, 4.0, 1.0),
                             0.1 * sig(-0.1 * (a - b - 3 * F.relu(-a)))),
    "cal_dpo": lambda t, a, b: (-sig(b - a) + 1.4 * (a - 5), sig(b - a) + 1.4 * (b + 5)),
    "chipo": lambda t, a, b: chipo_gradient(a, b),
    "aot": lambda t, a, b: sorted_gradient(t["policy_chosen_logps"] - t["policy_rejected_logps"],
                                           t["ref_chosen_logps"] - t["ref_rejected_logps"], paired=True),
    "aot_unpaired": lambda t, a, b: sorted_gradient(a, b, paired=False),
    "cpo": lambda t, a, b: (-0.1 * (sig(-0.1 * policy_margin(t)) - 0.1) - 0.5 / t["chosen_lengths"].double().mean(),
                            0.1 * (sig(-0.1 * policy_margin(t)) - 0.1)),
    "simpo": lambda t, a, b: (-2 * sig(1 - 2 * (averages(t)[0] - averages(t)[1])) / t["chosen_lengths"],
                              2 * sig(1 - 2 * (averages(t)[0] - averages(t)[1])) / t["rejected_lengths"]),
    "alphapo": lambda t, a, b: alphapo_gradient(*averages(t), t["chosen_lengths"], t["rejected_lengths"]),
    "orpo": lambda t, a, b: orpo_gradient(*averages(t), t["chosen_lengths"], t["rejected_lengths"]),
    "slic": lambda t, a, b: (-(policy_margin(t) < 1).double() - 0.1, (policy_margin(t) < 1).double()),
}
HYPER = {"sigmoid": dict(beta=0.3, label_smoothing=0.1), "robust": dict(beta=0.3, label_smoothing=0.2),
         "exo_pair": dict(label_smoothing=0.01), "discopop": dict(discopop_tau=2.0), "rdpo": dict(rdpo_alpha=0.02),
         "odpo": dict(odpo_alpha=2.0), "bco_pair": dict(delta=0.4), "sppo_hard": dict(beta=0.1), "dpop": dict(beta=0.1, dpop_lambda=3.0),
         "cal_dpo": dict(cal_dpo_weight=0.7), "aot": dict(beta=0.1), "aot_unpaired": dict(beta=0.1),
         "cpo": dict(cpo_alpha=0.5, label_smoothing=0.1)}


def policy_margin(t):
    return t["policy_chosen_logps"] - t["policy_rejected_logps"]


def discopop_slope(z, tau):
    m = sig(z / tau)
    return -(1 - m) * sig(-z) - m * torch.exp(-z) + m * (1 - m) / tau * (torch.exp(-z) - F.softplus(-z))


def chipo_gradient(a, b):
    weight = 0.05 * sig(-0.05 * ((a.exp() + a) - (b.exp() + b)))
    return -weight * (1 + a.exp()), weight * (1 + b.exp())


def sorted_gradient(u, v, paired):
    """The k-th smallest u beside the k-th smallest v, and back to the pairs they came from."""
    weight = 0.1 * sig(-0.1 * (u.sort().values - v.sort().values))
    dw, dl = torch.zeros_like(u), torch.zeros_like(v)
    dw[u.argsort()] = -weight
    dl[(u if paired else v).argsort()] = weight
    return dw, dl


def alphapo_gradient(x, y, n_w, n_l):
    score = lambda p: (1 - torch.exp(-0.25 * p)) / 0.25
    weight = 2.5 * sig(0.1 - 2.5 * (score(x) - score(y)))
    return -weight * torch.exp(-0.25 * x) / n_w, weight * torch.exp(-0.25 * y) / n_l


def orpo_gradient(x, y, n_w, n_l):
    u = torch.log(x.exp() / (1 - x.exp())) - torch.log(y.exp() / (1 - y.exp()))
    return -1 / n_w.double().mean() - 0.1 * sig(-u) * lo_slope(x) / n_w, 0.1 * sig(-u) * lo_slope(y) / n_l


@pytest.mark.parametrize("name", PAIRWISE)
def test_gradient_is_what_the_page_says(name):
    pairs = random_pairs(12)
    dw, dl = gradients(LOSSES[name], pairs, **HYPER.get(name, {}))
    expected_w, expected_l = ANALYTIC[name](pairs, *ratios(pairs))
    assert torch.allclose(dw, expected_w, rtol=1e-9, atol=1e-14) and torch.allclose(dl, expected_l, rtol=1e-9, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------------------
# sigmoid: DPO (2305.18290 eq. 7), cDPO
# ------------------------------------------------------------------------------------------------------------------------

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
    assert torch.allclose(of(sigmoid, h, label_smoothing=eps), (1 - eps) * of(sigmoid, h) + eps * of(sigmoid, -h))


def test_cdpo_is_dpo_plus_epsilon_beta_h():
    h = tensor(-7.0, 0.5, 3.0)
    assert torch.allclose(of(sigmoid, h, beta=0.4, label_smoothing=0.3) - of(sigmoid, h, beta=0.4), 0.3 * 0.4 * h)


def test_cdpo_stops_at_confidence_one_minus_epsilon():
    """Its minimum is where σ(βh) = 1 − ε, and beyond it the pair is pulled back."""
    eps, beta = 0.1, 0.5
    best = math.log((1 - eps) / eps) / beta
    below, there, beyond = slope(sigmoid, [best - 1, best, best + 1], beta=beta, label_smoothing=eps)
    assert below < 0 < beyond and abs(there) < 1e-12


# ------------------------------------------------------------------------------------------------------------------------
# robust (2403.00409)
# ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3, 0.49])
def test_robust_is_dpo_in_expectation_over_flipped_labels_at_every_margin(eps):
    h = torch.linspace(-80, 80, 41, dtype=torch.float64)
    expected = (1 - eps) * of(robust, h, label_smoothing=eps) + eps * of(robust, -h, label_smoothing=eps)
    assert torch.allclose(expected, of(sigmoid, h), rtol=1e-10)


def test_robust_corrects_in_the_opposite_direction_to_cdpo():
    h, eps, beta = tensor(-7.0, 0.5, 3.0), 0.2, 0.4
    dpo = of(sigmoid, h, beta=beta)
    assert torch.allclose(of(robust, h, beta=beta, label_smoothing=eps) - dpo, -eps / (1 - 2 * eps) * beta * h)
    assert (torch.sign(of(sigmoid, h, beta=beta, label_smoothing=eps) - dpo) == torch.sign(h)).all()


def test_robust_never_lets_go_and_has_no_lower_bound():
    assert of(robust, [400.0]).item() < -4 and slope(robust, [4e3], beta=0.1, label_smoothing=0.1).item() == pytest.approx(-0.1 * 0.1 / 0.8)


# ------------------------------------------------------------------------------------------------------------------------
# hinge: RSO (2309.06657 eq. 10)
# ------------------------------------------------------------------------------------------------------------------------

def test_hinge_is_0_past_the_margin_with_no_gradient_there():
    h = tensor(0.0, 9.0, 11.0, 50.0)
    assert torch.allclose(of(hinge, h, beta=0.1), tensor(1.0, 0.1, 0.0, 0.0))
    assert torch.equal(slope(hinge, h, beta=0.1), tensor(-0.1, -0.1, 0.0, 0.0))


def test_hinge_and_its_mirror_add_up_to_the_distance_from_the_margin():
    h = torch.linspace(-40, 40, 17, dtype=torch.float64)
    assert torch.allclose(of(hinge, h) + F.relu(0.1 * h - 1), (1 - 0.1 * h).abs())


# ------------------------------------------------------------------------------------------------------------------------
# exo_pair (2402.00856)
# ------------------------------------------------------------------------------------------------------------------------

def test_exo_is_the_kl_from_the_policy_preference_to_the_smoothed_labels():
    h, beta, eps = torch.linspace(-60, 60, 25, dtype=torch.float64), 0.1, 0.03
    policy = torch.stack([beta * h, torch.zeros_like(h)], -1).softmax(-1)
    kl = torch.distributions.kl_divergence(torch.distributions.Categorical(policy), torch.distributions.Categorical(tensor(1 - eps, eps)))
    assert torch.allclose(of(exo_pair, h, beta=beta, label_smoothing=eps), kl)


def test_exo_is_0_at_the_confidence_of_the_labels_and_bounded_at_both_ends():
    eps, beta = 0.01, 0.2
    best = math.log((1 - eps) / eps) / beta
    assert of(exo_pair, [best], beta=beta, label_smoothing=eps).item() == pytest.approx(0, abs=1e-14)
    right, wrong = of(exo_pair, [1e4, -1e4], beta=beta, label_smoothing=eps).tolist()
    assert right == pytest.approx(-math.log(1 - eps)) and wrong == pytest.approx(-math.log(eps))


def test_exo_gives_up_on_very_wrong_pairs_as_dpo_does_not():
    assert slope(exo_pair, [-500.0]).abs().item() < 1e-18 and slope(sigmoid, [-500.0]).item() == pytest.approx(-0.1)


# ------------------------------------------------------------------------------------------------------------------------
# discopop (2406.08414 eq. 5)
# ------------------------------------------------------------------------------------------------------------------------

def test_discopop_blends_the_logistic_and_the_exponential_loss():
    h, beta = tensor(-30.0, -1.0, 0.3, 8.0), 0.5
    m = torch.sigmoid(beta * h / 0.7)
    expected = (1 - m) * of(sigmoid, h, beta=beta) + m * torch.exp(-beta * h)
    assert torch.allclose(of(discopop, h, beta=beta, discopop_tau=0.7), expected)


def test_discopop_is_dpo_where_the_pair_is_wrong_exponential_where_it_is_right_and_their_mean_for_wide_blends():
    wrong, right = of(discopop, [-50.0, 50.0], beta=1.0)
    assert wrong.item() == pytest.approx(50.0) and right.item() == pytest.approx(math.exp(-50.0))
    h = tensor(-1.0, 0.0, 2.0)
    assert torch.allclose(of(discopop, h, beta=1.0, discopop_tau=1e9), (of(sigmoid, h, beta=1.0) + torch.exp(-h)) / 2)


def test_discopop_has_a_local_minimum_just_below_zero_and_a_maximum_just_above():
    z = torch.linspace(-0.5, 0.5, 100_001, dtype=torch.float64)
    value = of(discopop, z, beta=1.0)
    low = (value[1:-1] < value[:-2]) & (value[1:-1] < value[2:])
    high = (value[1:-1] > value[:-2]) & (value[1:-1] > value[2:])
    assert z[1:-1][low].tolist() == pytest.approx([-0.11857], abs=1e-5) and z[1:-1][high].tolist() == pytest.approx([0.07201], abs=1e-5)
    assert value[1:-1][low].item() == pytest.approx(0.78592, abs=1e-5) and value[1:-1][high].item() == pytest.approx(0.87829, abs=1e-5)


@pytest.mark.parametrize("tau", [0.05, 1.0, 5.0])
def test_discopop_is_finite_in_fp32_where_the_product_as_printed_is_nan(tau):
    h = torch.tensor([-200.0, -2e4], requires_grad=True)
    zero = torch.zeros(2)
    assert (torch.exp(-0.5 * h) * torch.sigmoid(0.5 * h / 0.05)).isnan().any()
    loss = discopop(h, zero, zero, zero, beta=0.5, discopop_tau=tau)
    gradient, = torch.autograd.grad(loss.sum(), h)
    assert loss.isfinite().all() and gradient.isfinite().all() and (gradient != 0).all()


# ------------------------------------------------------------------------------------------------------------------------
# ipo (2310.12036 eq. 17)
# ------------------------------------------------------------------------------------------------------------------------

def test_ipo_is_minimal_at_half_inverse_tau_and_pushes_back_beyond_it_as_dpo_never_does():
    tau = 0.25
    h = tensor(1 / (2 * tau) - 1, 1 / (2 * tau), 1 / (2 * tau) + 1)
    assert torch.allclose(of(ipo, h, beta=tau), tensor(1.0, 0.0, 1.0))
    assert torch.allclose(slope(ipo, h, beta=tau), tensor(-2.0, 0.0, 2.0)) and (slope(sigmoid, h, beta=tau) < 0).all()


def test_ipo_averages_over_tokens_so_repeating_every_token_changes_nothing():
    pairs = random_pairs()
    doubled = {name: 2 * value for name, value in pairs.items()}
    assert torch.allclose(call("ipo", pairs), call("ipo", doubled))


def test_ipo_with_lengths_of_one_is_the_summed_form_of_the_paper():
    pairs, tau = random_pairs(), 0.1
    ones = dict(chosen_lengths=torch.ones(6), rejected_lengths=torch.ones(6))
    assert torch.allclose(call("ipo", pairs | ones, beta=tau), (margin(pairs) - 1 / (2 * tau)) ** 2)


# ------------------------------------------------------------------------------------------------------------------------
# sigmoid_norm (Tülu 3, 2411.15124 Sec. 5.1.2 eq. 6), rdpo (2403.19159), odpo (2402.10571)
# ------------------------------------------------------------------------------------------------------------------------

def test_length_normalised_dpo_is_dpo_on_averaged_log_probs():
    pairs = random_pairs()
    averaged = {k: v / pairs[f"{'chosen' if 'chosen' in k else 'rejected'}_lengths"] for k, v in pairs.items() if "logps" in k}
    assert torch.allclose(call("sigmoid_norm", pairs, beta=3.0), call("sigmoid", averaged, beta=3.0))


def test_length_normalised_dpo_of_equal_lengths_n_is_dpo_with_beta_over_n():
    pairs = random_pairs() | dict(chosen_lengths=torch.full((6,), 20), rejected_lengths=torch.full((6,), 20))
    assert torch.allclose(call("sigmoid_norm", pairs, beta=5.0), call("sigmoid", pairs, beta=5.0 / 20))


def test_rdpo_of_equal_lengths_or_without_alpha_is_dpo():
    pairs = random_pairs()
    assert torch.allclose(call("rdpo", pairs, rdpo_alpha=0.0), call("sigmoid", pairs))
    assert torch.allclose(call("rdpo", pairs | {"rejected_lengths": pairs["chosen_lengths"]}), call("sigmoid", pairs))


def test_rdpo_teaches_less_where_the_chosen_answer_is_the_longer_one():
    longer, shorter = pair(1.0, tensor(0.0), chosen_lengths=tensor(30.0)), pair(1.0, tensor(0.0), rejected_lengths=tensor(30.0))
    assert gradients(rdpo, longer)[0].abs() < gradients(sigmoid, longer)[0].abs() < gradients(rdpo, shorter)[0].abs()


def test_odpo_is_dpo_at_a_margin_smaller_by_the_offset():
    pairs, beta, alpha = random_pairs(), 0.2, 0.7
    offset = alpha * torch.log(pairs["chosen_scores"] - pairs["rejected_scores"])
    moved = pairs | {"policy_chosen_logps": pairs["policy_chosen_logps"] - offset / beta}
    assert torch.allclose(call("odpo", pairs, beta=beta, odpo_alpha=alpha), call("sigmoid", moved, beta=beta))
    assert torch.allclose(call("odpo", pairs, odpo_alpha=0.0), call("sigmoid", pairs))


@pytest.mark.parametrize("better", [0.0, -1.0, math.nan])
def test_odpo_refuses_scores_that_contradict_the_preference(better):
    with pytest.raises(ValueError, match="chosen_scores must be above rejected_scores"):
        odpo(*[tensor(0.0)] * 4, tensor(better), tensor(0.0))


# ------------------------------------------------------------------------------------------------------------------------
# nca_pair (2402.05369 Table 1), bco_pair (2404.04656 eqs. 7, 8), sppo_hard (2405.00675 eq. 4.12)
# ------------------------------------------------------------------------------------------------------------------------

def test_nca_draws_the_chosen_answer_to_a_reward_of_log_2():
    beta = 0.1
    a = tensor(math.log(2) / beta, grad=True)
    assert torch.autograd.grad(of(nca_pair, a, beta=beta).sum(), a)[0].abs().item() < 1e-12
    assert slope(nca_pair, [math.log(2) / beta - 1]) < 0 < slope(nca_pair, [math.log(2) / beta + 1])


@pytest.mark.parametrize("name", ["nca_pair", "bco_pair", "apo_zero", "sppo_hard"])
def test_a_separable_loss_treats_each_side_by_its_own_reward_alone(name):
    """L(a, b) + L(a', b') = L(a, b') + L(a', b); and so it is not invariant to what a margin loss ignores."""
    a, b, a2, b2 = tensor(3.0), tensor(-2.0), tensor(-7.0), tensor(11.0)
    function = LOSSES[name]
    assert torch.allclose(of(function, a, b) + of(function, a2, b2), of(function, a, b2) + of(function, a2, b))
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
    assert update_delta(1.0, 0.0, 0.0, decay=0.9) == pytest.approx(0.9) and update_delta(0.0, 2.0, 4.0, decay=0.5) == pytest.approx(1.5)


def test_nca_is_bco_without_delta_in_which_each_answer_is_half_of_the_noise():
    a, b, beta = tensor(3.0), tensor(-2.0), 0.1
    moved = 0.5 * F.softplus(beta * a) - 0.5 * F.softplus(beta * b)
    assert torch.allclose(of(nca_pair, a, b, beta=beta) - of(bco_pair, a, b, beta=beta), moved)


def test_sppo_is_0_at_log_ratios_of_plus_and_minus_half_eta():
    beta = 0.05
    assert of(sppo_hard, [10.0], -10.0, beta=beta).item() == 0 and of(sppo_hard, [0.0], beta=beta).item() == pytest.approx(1 / (2 * beta ** 2))


def test_sppo_is_ipo_of_twice_the_target_and_a_penalty_on_drift():
    """(a − η/2)² + (b + η/2)² = ½ (h − η)² + ½ (a + b)²"""
    (a, b), beta = ratios(random_pairs()), 0.1
    assert torch.allclose(of(sppo_hard, a, b, beta=beta), 0.5 * (a - b - 1 / beta) ** 2 + 0.5 * (a + b) ** 2)


# ------------------------------------------------------------------------------------------------------------------------
# kto_pair (2402.01306 eq. 8 of v4), apo_zero and apo_down (2408.06266)
# ------------------------------------------------------------------------------------------------------------------------

def test_kto_compares_each_side_with_the_mean_of_the_other_one_clipped_at_zero():
    a, b, beta = tensor(2.0, 6.0), tensor(-5.0, 1.0), 0.3
    expected = 0.5 * (1 - torch.sigmoid(beta * (a - 0.0))) + 0.5 * (1 - torch.sigmoid(beta * (4.0 - b)))
    assert torch.allclose(of(kto_pair, a, b, beta=beta), expected)


def test_kto_does_not_back_propagate_through_its_reference_point():
    """With one pair, where a copy that does has twice the gradient: ∂L/∂w through 1 − σ(β(a − z_l)) alone."""
    a, b, beta = 2.0, 1.5, 0.3
    dw, dl = gradients(kto_pair, pair(a, tensor(b)), beta=beta)
    u, v = tensor(beta * (a - b)), tensor(beta * (a - b))
    assert torch.allclose(dw, -beta / 2 * bump(u)) and torch.allclose(dl, beta / 2 * bump(v))


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


# ------------------------------------------------------------------------------------------------------------------------
# dpop (2402.13228), cal_dpo (2412.14516), chipo (2407.13399 Algorithm 1)
# ------------------------------------------------------------------------------------------------------------------------

def test_dpop_is_dpo_unless_the_chosen_answer_fell_below_the_reference():
    assert torch.allclose(of(dpop, tensor(0.0, 4.0), tensor(1.0, 9.0), beta=0.3), of(sigmoid, tensor(0.0, 4.0), tensor(1.0, 9.0), beta=0.3))
    assert torch.allclose(of(dpop, tensor(-4.0), dpop_lambda=0.0, beta=0.3), of(sigmoid, tensor(-4.0), beta=0.3))
    assert of(dpop, tensor(-4.0), beta=0.3) > of(sigmoid, tensor(-4.0), beta=0.3)


def test_dpop_lifts_a_fallen_chosen_answer_1_plus_lambda_times_as_hard_as_it_lowers_the_rejected():
    dw, dl = gradients(dpop, pair(-0.5, tensor(-9.0)), dpop_lambda=7.0)
    assert torch.allclose(dw, -8 * dl)


def test_cal_dpo_is_dpo_at_beta_1_and_sppo_at_beta():
    a, b = ratios(random_pairs())
    expected = of(sigmoid, a, b, beta=1.0) + 0.5 * of(sppo_hard, a, b, beta=0.2)
    assert torch.allclose(of(cal_dpo, a, b, beta=0.2, cal_dpo_weight=0.5), expected)


def test_chipo_is_an_f_dpo_of_phi_and_near_the_reference_dpo_with_twice_beta():
    a, b = tensor(0.3, -2.0), tensor(-0.4, 1.0)
    assert torch.allclose(of(chipo, a, b, beta=0.2), of(sigmoid, a.exp() + a, b.exp() + b, beta=0.2))
    assert slope(chipo, [0.0], beta=0.2).item() == pytest.approx(2 * slope(sigmoid, [0.0], beta=0.2).item())


def test_chipo_gives_a_clipped_pair_no_gradient():
    clipped, free = gradients(chipo, pair(tensor(4.0, 0.1), 0.0), beta=0.5, chipo_r_max=1.0)[0]
    assert clipped == 0 and free < 0
    assert of(chipo, [4.0], beta=0.5, chipo_r_max=1.0).item() == pytest.approx(math.log(1 + math.exp(-2)))


# ------------------------------------------------------------------------------------------------------------------------
# aot, aot_unpaired (2406.05882)
# ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_of_one_pair_is_dpo_and_of_more_never_more_than_dpo(name):
    """The sorted coupling is optimal for a convex cost."""
    one, many = random_pairs(1), random_pairs(40)
    assert torch.allclose(call(name, one, beta=0.1, label_smoothing=0.1), call("sigmoid", one, beta=0.1, label_smoothing=0.1))
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
    paired_anew = {k: v.roll(1) if "rejected" in k else v for k, v in pairs.items()}
    assert torch.allclose(call("aot_unpaired", pairs), call("aot_unpaired", paired_anew))
    for name in ("aot", "sigmoid"):
        assert not torch.allclose(call(name, pairs).mean(), call(name, paired_anew).mean())


def test_aot_pair_is_the_older_name_of_the_unpaired_one():
    assert LOSSES["aot_pair"] is aot_unpaired and find("aot_pair") is aot_unpaired


# ------------------------------------------------------------------------------------------------------------------------
# cpo (2401.08417 eq. 5), simpo (2405.14734 eq. 6), alphapo (2501.03884), orpo (2403.07691 eqs. 6, 7), slic (2305.10425)
# ------------------------------------------------------------------------------------------------------------------------

def without_reference(pairs):
    return pairs | {name: torch.zeros_like(pairs["policy_chosen_logps"]) for name in ("ref_chosen_logps", "ref_rejected_logps")}


def test_cpo_without_its_likelihood_is_dpo_with_a_reference_of_zeros():
    pairs = random_pairs()
    assert torch.allclose(call("cpo", pairs, cpo_alpha=0.0, label_smoothing=0.1), call("sigmoid", without_reference(pairs), label_smoothing=0.1))


@pytest.mark.parametrize("name, weight", [("cpo", "cpo_alpha"), ("simpo", "cpo_alpha"), ("orpo", "nll_weight")])
def test_the_likelihood_term_is_linear_in_its_weight_and_is_sft(name, weight):
    pairs = random_pairs()
    off, one, three = (call(name, pairs, **{weight: value}) for value in (0.0, 1.0, 3.0))
    assert torch.allclose(one - off, call("sft", pairs)) and torch.allclose(three - off, 3 * call("sft", pairs))


def test_simpo_at_equal_averages_is_the_softplus_of_gamma_and_gamma_is_absolute():
    pairs = pair(-10.0, tensor(0.0))
    assert torch.equal(*averages(pairs))
    assert call("simpo", pairs, beta=7.0, gamma=1.3).item() == pytest.approx(math.log(1 + math.exp(1.3)))


def test_simpo_without_gamma_is_cpo_on_averages():
    pairs = random_pairs()
    averaged = pairs | dict(zip(("policy_chosen_logps", "policy_rejected_logps"), averages(pairs)))
    assert torch.allclose(call("simpo", pairs, beta=2.0, gamma=0.0), call("cpo", averaged, beta=2.0, cpo_alpha=0.0))


def test_simpo_is_length_free():
    pairs = random_pairs()
    longer = {k: 3 * v if "chosen" in k else v for k, v in pairs.items()}
    assert torch.allclose(call("simpo", pairs), call("simpo", longer))


def test_cpo_simpo_smooths_labels_too():
    pairs, z = random_pairs(), None
    chosen, rejected = averages(pairs)
    z = 2 * (chosen - rejected) - 1
    assert torch.allclose(call("simpo", pairs, label_smoothing=0.2), 0.8 * F.softplus(-z) + 0.2 * F.softplus(z))


def test_alphapo_tends_to_simpo_as_alpha_goes_to_0_from_both_sides():
    pairs = random_pairs()
    expected = call("simpo", pairs, beta=2.5, gamma=0.1)
    for alpha in (1e-7, -1e-7):
        assert torch.allclose(call("alphapo", pairs, alphapo_alpha=alpha), expected, rtol=1e-4)


def test_alphapo_shapes_the_reward_by_a_power_of_the_average_token_probability():
    pairs, alpha = random_pairs(), 0.5
    score = [(1 - x.exp() ** -alpha) / alpha for x in averages(pairs)]
    assert torch.allclose(call("alphapo", pairs, beta=2.0, gamma=0.3, alphapo_alpha=alpha), -F.logsigmoid(2.0 * (score[0] - score[1]) - 0.3))


def test_alphapo_still_raises_the_chosen_answer_where_both_are_so_improbable_that_the_power_overflows():
    pairs = {"policy_chosen_logps": torch.tensor([-1e4 - 5]), "policy_rejected_logps": torch.tensor([-1e4]),
             "chosen_lengths": torch.ones(1), "rejected_lengths": torch.ones(1)}
    dw, dl = gradients(alphapo, pairs)
    assert call("alphapo", pairs) > call("alphapo", pairs | {"policy_chosen_logps": torch.tensor([-1e4 - 1])}) and dw < 0 < dl


def test_orpo_is_the_log_of_one_plus_the_odds_ratio():
    pairs, lam = random_pairs(), 0.3
    p, q = (x.exp() for x in averages(pairs))
    odds_ratio = (p / (1 - p)) / (q / (1 - q))
    assert torch.allclose(call("orpo", pairs, beta=lam, nll_weight=0.0), lam * torch.log(1 + 1 / odds_ratio))


def test_orpo_of_improbable_answers_is_cpo_on_averages_with_beta_1():
    pairs = pair(tensor(-40.0, -45.0), -40.0)
    expected = F.softplus(-policy_margin(pairs))
    assert torch.allclose(call("orpo", pairs, beta=1.0, nll_weight=0.0), expected)


@pytest.mark.parametrize("w, l", [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e-9, -1e-9), (-1e4, -1e-9), (-1e-9, -1e4)])
def test_orpo_and_its_gradient_are_finite_up_to_probability_one_in_fp32(w, l):
    pairs = {"policy_chosen_logps": torch.tensor([w]), "policy_rejected_logps": torch.tensor([l]),
             "chosen_lengths": torch.ones(1), "rejected_lengths": torch.ones(1)}
    assert call("orpo", pairs).isfinite().all() and all(g.isfinite().all() for g in gradients(orpo, pairs))


def test_orpo_still_lowers_a_rejected_answer_of_probability_one():
    pairs = pair(10.0, tensor(30.0))
    assert pairs["policy_rejected_logps"] == 0 and gradients(orpo, pairs)[1] > 0


def test_slic_calibrates_up_to_delta_and_keeps_pulling_on_the_target():
    w, l = tensor(-3.0, -3.0), tensor(-3.5, -9.0)
    assert torch.allclose(slic(w, l, slic_delta=1.0, slic_lambda=0.0), tensor(0.5, 0.0))
    pairs = {"policy_chosen_logps": w, "policy_rejected_logps": l}
    assert torch.allclose(gradients(slic, pairs, slic_lambda=0.2)[0], tensor(-1.2, -0.2))


def test_slic_regularises_towards_the_target_answer_and_only_for_want_of_one_towards_the_chosen():
    w, l, target = tensor(-3.0), tensor(-9.0), tensor(-5.0)
    assert slic(w, l, target, slic_lambda=0.2).item() == pytest.approx(1.0) and slic(w, l, slic_lambda=0.2).item() == pytest.approx(0.6)


def test_slic_without_its_regulariser_is_the_hinge_with_a_reference_of_zeros_up_to_scale():
    pairs, delta = random_pairs(), 4.0
    assert torch.allclose(call("slic", pairs, slic_delta=delta, slic_lambda=0.0), delta * call("hinge", without_reference(pairs), beta=1 / delta))


# ------------------------------------------------------------------------------------------------------------------------
# sft
# ------------------------------------------------------------------------------------------------------------------------

def test_sft_is_cross_entropy_over_all_scored_tokens_of_the_batch():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 7, 11, dtype=torch.float64), torch.randint(11, (3, 7))
    labels[0, :5], labels[1, :2] = -100, -100
    logps = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(-1)
    mine = sft(logps, (labels != -100).sum(-1)).mean()
    assert torch.allclose(mine, F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


# ------------------------------------------------------------------------------------------------------------------------
# f_divergence_score (2309.16240)
# ------------------------------------------------------------------------------------------------------------------------

DIVERGENCES = [("reverse_kl", 0.5), ("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.3), ("alpha", 1.0)]


@pytest.mark.parametrize("f_divergence, alpha", DIVERGENCES)
def test_scores_are_0_at_the_reference_where_their_slope_is_1_or_for_js_a_half(f_divergence, alpha):
    a = tensor(0.0, grad=True)
    score = f_divergence_score(a, f_divergence, alpha)
    assert score.item() == pytest.approx(0, abs=1e-15)
    assert torch.autograd.grad(score, a)[0].item() == pytest.approx(0.5 if f_divergence == "js" else 1.0)


def test_scores_are_f_prime_of_the_probability_ratio():
    a = tensor(-4.0, -0.2, 0.7, 3.0)
    u = a.exp()
    assert torch.equal(f_divergence_score(a, "reverse_kl"), a)
    assert torch.allclose(f_divergence_score(a, "forward_kl"), 1 - 1 / u)
    assert torch.allclose(f_divergence_score(a, "js"), torch.log(2 * u / (1 + u)))
    assert torch.allclose(f_divergence_score(a, "alpha", 0.3), (1 - u ** -0.3) / 0.3)


def test_alpha_runs_from_reverse_to_forward_kl():
    a = tensor(-4.0, -0.2, 0.7, 3.0)
    assert torch.allclose(f_divergence_score(a, "alpha", 1e-9), a) and torch.equal(f_divergence_score(a, "alpha", 1.0), f_divergence_score(a, "forward_kl"))


def test_js_scores_are_bounded_by_log_2():
    assert (f_divergence_score(torch.linspace(-50, 50, 101, dtype=torch.float64), "js") <= math.log(2)).all()


@pytest.mark.parametrize("f_divergence, alpha", DIVERGENCES)
@pytest.mark.parametrize("shift", [-1e4, -100.0, 100.0, 1e4])
def test_scores_in_fp32_are_finite_and_keep_order_and_gradient_where_both_answers_fell_far(f_divergence, alpha, shift):
    """TRL >= 0.29 is NaN there for forward_kl; with TRL 0.13's cap the margin and its gradient are 0."""
    a, b = torch.tensor([shift], requires_grad=True), torch.tensor([shift - 5])
    loss = sigmoid(f_divergence_score(a, f_divergence, alpha), f_divergence_score(b, f_divergence, alpha), torch.zeros(1), torch.zeros(1))
    gradient, = torch.autograd.grad(loss.sum(), a)
    assert loss.isfinite().all() and gradient.isfinite().all()
    if shift < 0:
        margin = f_divergence_score(a, f_divergence, alpha) - f_divergence_score(b, f_divergence, alpha)
        score_slope, = torch.autograd.grad(margin.sum(), a)
        assert margin > 0 and score_slope > 0


@pytest.mark.parametrize("bad", ["kl", "", None, enum.Enum("FDivergenceType", ["JS_DIVERGENCE"]).JS_DIVERGENCE])
def test_an_unknown_divergence_is_an_error_and_not_the_reverse_kl(bad):
    with pytest.raises(ValueError, match="f_divergence must be"):
        f_divergence_score(tensor(1.0), bad)


@pytest.mark.parametrize("alpha", [0.0, -0.5, 1.1, math.nan])
def test_an_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha must be in \(0, 1\]"):
        f_divergence_score(tensor(1.0), "alpha", alpha)


# ------------------------------------------------------------------------------------------------------------------------
# Sums of losses
# ------------------------------------------------------------------------------------------------------------------------

def call_sum(spec, tensors, **hyper):
    function = find(spec)
    return function(**{key: tensors[key] for key in tensor_arguments(function) if key in tensors}, **hyper)


def test_mpo_is_the_weighted_sum_of_its_parts():
    """2411.10442 Sec. 4.1 eq. 3, with the running shift that its quality loss has."""
    pairs = random_pairs() | {"delta": 0.2}
    expected = 0.8 * call("sigmoid", pairs) + 0.2 * call("bco_pair", pairs) + call("sft", pairs)
    assert torch.allclose(call_sum("sigmoid:0.8,bco_pair:0.2,sft:1", pairs), expected)
    assert call_sum("sigmoid:0.8,bco_pair:0.2,sft:1", pairs).shape == (6,)


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
    with pytest.raises(ValueError, match="beta must be given: it has different defaults in the parts of sigmoid:1,sppo_hard:1"):
        call_sum("sigmoid,sppo_hard", pairs)


def test_a_sum_needs_what_its_parts_need():
    total = find("simpo,sigmoid:0.5,sft")
    assert needs_reference(total) and needs_rejected(total) and not needs_reference(find("simpo,sft"))
    assert set(tensor_arguments(total)) == set(tensor_arguments(simpo)) | set(tensor_arguments(sigmoid))
    assert find("sigmoid,aot").marks == {"batch"} and find("sigmoid,sft").marks == {"margin"} and find("ipo,simpo").marks == {"average"}


@pytest.mark.parametrize("spec, message", [
    ("sigmoyd", "nearest name is sigmoid"), ("sigmoid,", "no such loss"), ("sigmoid:0", "weight of sigmoid must be a number > 0"),
    ("sigmoid:-1", "must be a number > 0"), ("sigmoid:nan", "must be a number > 0"), ("sigmoid:a", "must be a number > 0"),
    ("sigmoid,sigmoid:2", "names sigmoid twice"), ("", "no such loss")])
def test_a_wrong_sum_is_refused_by_name(spec, message):
    with pytest.raises(ValueError, match=message):
        find(spec)


# ------------------------------------------------------------------------------------------------------------------------
# What holds for every loss
# ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [name for name in NAMES if "margin" in LOSSES[name].marks])
def test_a_margin_loss_only_sees_the_difference_of_rewards(name):
    pairs = random_pairs()
    size = {side: pairs[f"{side}_lengths"] if "average" in LOSSES[name].marks else 1 for side in ("chosen", "rejected")}
    shifted = pairs | {f"policy_{side}_logps": pairs[f"policy_{side}_logps"] + 3.7 * n for side, n in size.items()}
    assert torch.allclose(call(name, pairs), call(name, shifted))
    dw, dl = gradients(LOSSES[name], pairs)
    assert torch.allclose(dw * size["chosen"], -dl * size["rejected"])


@pytest.mark.parametrize("name", [name for name in PAIRWISE if "margin" not in LOSSES[name].marks and needs_reference(LOSSES[name])])
def test_the_others_see_more_than_a_margin(name):
    """Which is why a reference of zeros, or a link that is known up to a constant, is refused in front of them. The sorting losses
    see how the pairs of a batch lie to each other: a constant for one pair moves it past others, or in `aot` changes nothing."""
    pairs = random_pairs()
    shift = torch.arange(6) * 7.0
    shifted = {k: v + shift if k.startswith("policy") else v for k, v in pairs.items()}
    assert name == "aot" or not torch.allclose(call(name, pairs), call(name, shifted))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(name):
    pairs = {key: value / 20 if "logps" in key else value for key, value in random_pairs().items()}  # χPO has eᵃ in it
    names = [key for key in pairs if key in tensor_arguments(LOSSES[name])]
    tensors = [pairs[key].requires_grad_(key.startswith("policy")) for key in names]
    if name == "kto_pair":  # what is detached is no function of the inputs to finite differences: hold it
        pairs["policy_chosen_logps"].data -= 200
        pairs["policy_rejected_logps"].data -= 200
    assert torch.autograd.gradcheck(lambda *values: LOSSES[name](**dict(zip(names, values))), tensors)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_one_loss_per_pair_whatever_the_number_of_pairs(name, size):
    pairs = random_pairs(5)
    mean_length = {"mean_chosen_length": 7.5}  # so that no loss needs to look at its batch
    whole, part = call(name, pairs | mean_length), call(name, {k: v[:size] for k, v in pairs.items()} | mean_length)
    assert part.shape == (size,)
    if name not in BATCH_COUPLED:
        assert torch.equal(part, whole[:size])


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_a_batch_is_the_weighted_mean_of_its_parts_except_for_the_batch_coupled_ones(name):
    pairs = random_pairs(12)
    parts = [{k: v[i:j] for k, v in pairs.items()} for i, j in ((0, 3), (3, 4), (4, 12))]
    pooled = sum(call(name, part).sum() for part in parts) / 12
    told = sum(call(name, part | {"mean_chosen_length": pairs["chosen_lengths"].double().mean()}).sum() for part in parts) / 12
    whole = call(name, pairs).mean()
    assert torch.allclose(whole, pooled) == (name not in BATCH_COUPLED | TOKEN_MEAN)
    assert torch.allclose(whole, told) == (name not in BATCH_COUPLED)
    assert ("batch" in LOSSES[name].marks) == (name in BATCH_COUPLED)


@pytest.mark.parametrize("name", NAMES)
def test_token_level_tensors_and_unequal_shapes_are_refused(name):
    pairs = random_pairs(2)
    with pytest.raises(ValueError, match="one number per pair"):
        call(name, {k: v[:, None].expand(2, 3) for k, v in pairs.items()})
    with pytest.raises(ValueError, match="one number per pair"):
        call(name, pairs | {"policy_chosen_logps": pairs["policy_chosen_logps"][:1]})


OUT_OF_RANGE = {
    "beta": [0.0, -0.1, math.inf, math.nan], "label_smoothing": [-0.1, 0.5, 1.0, math.nan], "discopop_tau": [0.0, -1.0, math.inf, math.nan],
    "rdpo_alpha": [-0.1, math.inf, math.nan], "odpo_alpha": [-0.1, math.inf, math.nan], "dpop_lambda": [-1.0, math.inf, math.nan],
    "cal_dpo_weight": [-1.0, math.inf, math.nan], "chipo_r_max": [0.0, -1.0, math.inf, math.nan], "cpo_alpha": [-1.0, math.inf, math.nan],
    "gamma": [math.inf, math.nan], "alphapo_alpha": [0.0, math.inf, math.nan], "nll_weight": [-1.0, math.inf, math.nan],
    "slic_delta": [-1.0, math.inf, math.nan], "slic_lambda": [-1.0, math.inf, math.nan]}


@pytest.mark.parametrize("name, parameter", [(name, parameter) for name in NAMES for parameter in hyperparameters(LOSSES[name])])
def test_a_hyper_parameter_out_of_range_is_refused_by_name_and_value(name, parameter):
    extra = [0.0] if (name, parameter) == ("exo_pair", "label_smoothing") else []
    for value in OUT_OF_RANGE[parameter] + extra:
        with pytest.raises(ValueError, match=rf"{parameter} must be .*{value}"):
            call(name, random_pairs(), **{parameter: value})


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("a, b", list(itertools.product([-1e4, 0.0, 1e4], repeat=2)))
def test_loss_and_gradient_are_finite_at_log_ratios_of_1e4_in_fp32(name, a, b):
    pairs = random_pairs(1, dtype=torch.float32)
    pairs["policy_chosen_logps"] += a
    pairs["policy_rejected_logps"] += b
    loss = call(name, pairs)
    assert loss.isfinite().all() and loss.dtype == torch.float32
    assert all(gradient.isfinite().all() and (gradient ** 2).isfinite().all() for gradient in gradients(LOSSES[name], pairs))


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_changes_none_of_its_arguments_and_remembers_nothing(name):
    pairs = random_pairs()
    before = {k: v.clone() for k, v in pairs.items()}
    first = call(name, pairs)
    call(name, random_pairs(seed=1))
    assert torch.equal(call(name, pairs), first) and all(torch.equal(pairs[k], before[k]) for k in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_copied_alone_a_loss_runs_with_torch_and_nothing_else(name):
    decorator, source = inspect.getsource(inspect.unwrap(LOSSES[name])).split("\n", 1)
    assert decorator.startswith("@loss(")
    space = {"torch": torch, "F": F}
    exec(source, space)
    pairs = {k: v for k, v in random_pairs().items() if k in tensor_arguments(LOSSES[name])}
    assert torch.equal(space[name](**pairs), call(name, pairs))


def test_the_signature_says_what_a_loss_needs():
    assert needs_reference(sigmoid) and needs_rejected(sigmoid)
    assert hyperparameters(sigmoid) == {"beta": 0.1, "label_smoothing": 0.0}
    assert not needs_reference(sft) and not needs_rejected(sft) and hyperparameters(sft) == {}
    assert {name for name in NAMES if not needs_reference(LOSSES[name])} == {"cpo", "simpo", "alphapo", "orpo", "slic", "sft"}


@pytest.mark.parametrize("name", NAMES)
def test_every_page_has_its_sections_in_order(name):
    page = inspect.getdoc(LOSSES[name])
    places = [page.index(f"\n{section}") for section in ("Paper ", "Formula ", "Gradient ", "Args ", "Elsewhere ")]
    assert places == sorted(places)
    assert all(parameter in page for parameter in hyperparameters(LOSSES[name]))


def test_a_figure_of_every_margin_loss_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    losses.plot(tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", [name for name in NAMES if "margin" in LOSSES[name].marks])
def test_the_drawn_slope_is_the_derivative_of_the_drawn_loss(name):
    h = torch.linspace(-3, 3, 6001, dtype=torch.float64) + 1e-4
    value, drawn = losses.curve(LOSSES[name], h)
    between = (value[1:] - value[:-1]) / (h[1:] - h[:-1])
    assert torch.allclose(between, (drawn[1:] + drawn[:-1]) / 2, atol=1e-3)
