"""The claims of the papers about whole populations of pairs, computed and not trained.

A population is a finite set of answers to a prompt. Pairs are drawn from the reference, and
wins[i, j] is the probability that answer i is chosen over answer j, so the expected loss is a sum
over all pairs. At the optimum that a paper claims the gradient of that sum is 0, and at the
reference it is not. The answers are the 512 of world.py with its true reward and its chain as the
reference, or a few random ones. test_losses.py has the claims about single pairs.
"""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import world
from losses import (
    alphapo,
    aot,
    aot_unpaired,
    apo_down,
    apo_zero,
    bco_pair,
    bpo,
    cal_dpo,
    chipo,
    cpo,
    discopop,
    dpo_shift,
    dpop,
    dr_dpo,
    exo_pair,
    f_divergence_score,
    hinge,
    hypo,
    ipo,
    kto_pair,
    nca_pair,
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
    sigmoid,
    sigmoid_norm,
    simper,
    simpo,
    sppo_hard,
)
from test_losses import (
    DIVERGENCES,
    averages,
    call,
    call_function,
    gradients,
    margin,
    of,
    pair,
    random_pairs,
    ratios,
    tensor,
    without_reference,
)

logit = torch.special.logit


def of_world(thing):
    """-> the true reward (A,) of the answers to a prompt, and log π_ref (A,)"""
    return world.true_reward()[thing], world.chain_logps()[thing]


def random_population(answers=7, seed=0):
    """-> log π_ref (A,), and wins (A, A) that no reward explains: preferences may be cyclic."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(answers, answers, generator=generator, dtype=torch.float64)
    reference = torch.randn(answers, generator=generator, dtype=torch.float64).log_softmax(0)
    return reference, torch.sigmoid(scores - scores.T)


LENGTHS = tensor(3.0, 1.0, 7.0, 2.0, 2.0, 12.0, 5.0)  # of the answers of random_population


def bradley_terry(reward):
    """(A, A): σ(r_i − r_j)"""
    return torch.sigmoid(reward[:, None] - reward)


def win_rates(wins, reference):
    """(A,): the probability that an answer is chosen over an answer that is drawn from π_ref."""
    return wins @ reference.exp()


def expected_gradient(
        function, policy, reference, wins, lengths=None, score=None, quality=None, **hyper):
    """(A,): the gradient of the expected loss over all pairs, by the policy's log-probs (A,).

    score replaces the log-ratios, as in f-DPO. quality (A,) are the scores that the data has.
    """
    logps = policy.clone().requires_grad_()
    start = reference
    if score is not None:
        scores, start = score(logps - reference), torch.zeros_like(reference)
    chosen, rejected = torch.arange(len(policy)).repeat(2, 1)
    chosen, rejected = torch.cartesian_prod(chosen, rejected).T  # (A * A,) each
    policy_logps = logps if score is None else scores
    ones = torch.ones_like(reference)
    qualities = ones if quality is None else quality
    pairs = {
        "policy_chosen_logps": policy_logps[chosen],
        "policy_rejected_logps": policy_logps[rejected],
        "ref_chosen_logps": start[chosen],
        "ref_rejected_logps": start[rejected],
        "chosen_lengths": (ones if lengths is None else lengths)[chosen],
        "rejected_lengths": (ones if lengths is None else lengths)[rejected],
        "chosen_scores": qualities[chosen],
        "rejected_scores": qualities[rejected],
    }
    weights = (reference[chosen] + reference[rejected]).exp() * wins[chosen, rejected]
    expected = (weights * call_function(function, pairs, **hyper)).sum()
    return torch.autograd.grad(expected, logps)[0]


def assert_optimal(function, policy, reference, wins, **others):
    """The expected gradient is 0 at this policy, and on the line from the reference to it the
    expected loss falls before and rises beyond."""
    direction = policy - reference

    def gradient(share):
        where = reference + share * direction
        return expected_gradient(function, where, reference, wins, **others)

    start = gradient(0.0)
    assert gradient(1.0).norm() < 1e-12 * start.norm()
    slopes = [(gradient(share) @ direction).item() for share in (0.0, 0.5, 0.9, 1.1)]
    assert max(slopes[:3]) < 0 < slopes[3] and min(map(abs, slopes)) > 1e-5


def expected_slope(function, h, p, **hyper):
    """∂/∂h of the expected loss of a pair whose label is correct with probability p. The margin h
    is half of it on each side: a = h/2, b = −h/2."""
    h = torch.as_tensor(h, dtype=torch.float64).clone().requires_grad_()
    correct = of(function, h / 2, -h / 2, **hyper)
    flipped = of(function, -h / 2, h / 2, **hyper)
    return torch.autograd.grad((p * correct + (1 - p) * flipped).sum(), h)[0]


def assert_minimal(function, h, p, **hyper):
    """The expected loss of a pair falls below h and rises above."""
    below, there, above = expected_slope(function, [h - 0.1, h, h + 0.1], p, **hyper)
    assert below < 0 < above and abs(there) < 1e-12 * (above - below)


# --- DPO (2305.18290) -----------------------------------------------------------------------------

@pytest.mark.parametrize("thing", [0, 5])
def test_dpo_on_bradley_terry_labels_is_stationary_at_the_optimal_policy_of_eq_4(thing):
    reward, reference = of_world(thing)
    best = (reference + reward / 0.7).log_softmax(0)
    assert_optimal(sigmoid, best, reference, bradley_terry(reward), beta=0.7)


def test_each_class_of_equal_rewards_has_one_member_beta_log_pi_over_pi_ref():
    """Theorem 1: rewards that differ by a constant per prompt have the same optimal policy, and
    β log π*/π_ref is the one of them whose policy π_ref exp(r/β) is normalized as it is."""
    (reward, reference), beta = of_world(2), 0.7
    members = []
    for constant in (0.0, -3.0, 8.0):
        best = (reference + (reward + constant) / beta).log_softmax(0)
        members.append(beta * (best - reference))
    assert torch.allclose(members[0], members[1]) and torch.allclose(members[0], members[2])
    difference = members[0] - reward
    assert torch.allclose(difference, difference[0].expand_as(difference))
    for constant in (0.0, -0.1, 0.1):
        log_z = (reference + (members[0] + constant) / beta).logsumexp(0)
        assert log_z.item() == pytest.approx(constant / beta, abs=1e-12)


@pytest.mark.parametrize("p", [0.6, 0.95])
def test_dpo_settles_where_its_implicit_preference_is_the_probability_of_the_label(p):
    assert_minimal(sigmoid, math.log(p / (1 - p)) / 0.3, p, beta=0.3)


# --- IPO (2310.12036) -----------------------------------------------------------------------------

@pytest.mark.parametrize("p", [0.5, 0.8, 1.0])
def test_ipo_settles_at_2p_minus_1_over_2_tau(p):
    assert_minimal(ipo, (2 * p - 1) / (2 * 0.2), p, beta=0.2)


def test_deterministic_labels_send_the_margin_of_dpo_to_infinity_and_ipo_stays():
    """The more deterministic the labels, the weaker the KL term of DPO, whatever β is."""
    h = tensor(0.0, 10.0, 100.0, 1000.0)
    for beta in (0.1, 0.3):
        assert (expected_slope(sigmoid, h, 1.0, beta=beta) < 0).all()
        assert (expected_slope(ipo, h, 1.0, beta=beta)[2:] > 0).all()


def test_the_optimum_of_ipo_is_an_exponential_of_the_win_rate_even_if_preferences_are_cyclic():
    """Ψ the identity: π* is proportional to π_ref exp(P(y beats π_ref) / τ)."""
    reference, wins = random_population()
    best = (reference + win_rates(wins, reference) / 0.2).log_softmax(0)
    assert_optimal(ipo, best, reference, wins, beta=0.2)


def test_on_averages_the_optimum_of_ipo_and_of_dpo_has_a_log_ratio_for_each_token():
    """log π*/π_ref = |y| r/β, and |y| P(y beats π_ref)/τ: a long answer moves further."""
    reference, wins = random_population()
    best = reference + LENGTHS * win_rates(wins, reference) / 0.2
    assert_optimal(ipo, best, reference, wins, lengths=LENGTHS, beta=0.2)
    reward, beta = wins[0], 0.2
    best = reference + LENGTHS * reward / beta
    wins = bradley_terry(reward)
    assert_optimal(sigmoid_norm, best, reference, wins, lengths=LENGTHS, beta=beta)


@pytest.mark.parametrize("p", [0.51, 0.7, 1.0])
def test_the_hinge_settles_at_its_margin_for_every_majority_so_it_learns_no_probability(p):
    below, above = expected_slope(hinge, tensor(1 / 0.2 - 0.1, 1 / 0.2 + 0.1), p, beta=0.2)
    assert below.item() == pytest.approx(-0.2 * (2 * p - 1))
    assert above.item() == pytest.approx(0.2 * (1 - p)) and (above > 0 or p == 1)


# --- Noisy labels: cDPO, EXO (2402.00856), robust DPO (2403.00409) --------------------------------

def test_cdpo_is_the_forward_kl_from_the_labels_plus_their_entropy_and_exo_the_reverse_kl():
    h, beta, eps = torch.linspace(-40, 40, 17, dtype=torch.float64), 0.2, 0.1
    hyper = {"beta": beta, "label_smoothing": eps}
    log_policy = torch.stack([beta * h, torch.zeros_like(h)]).log_softmax(0)  # (2, H)
    labels = tensor(1 - eps, eps)[:, None]  # (2, 1)
    entropy = -(labels * labels.log()).sum(0)
    forward_kl = (labels * (labels.log() - log_policy)).sum(0)
    reverse_kl = (log_policy.exp() * (log_policy - labels.log())).sum(0)
    assert torch.allclose(of(sigmoid, h, **hyper), forward_kl + entropy)
    assert torch.allclose(of(exo_pair, h, **hyper), reverse_kl)


@pytest.mark.parametrize("p", [0.5, 0.7, 1.0])
def test_exo_settles_at_2p_minus_1_times_the_logit_of_its_labels(p):
    """DPO settles at log(P/(1−P)), so EXO is less sure for a P between ½ and 1 − ε."""
    eps, beta = 0.01, 0.3
    best = (2 * p - 1) * math.log((1 - eps) / eps) / beta
    assert_minimal(exo_pair, best, p, beta=beta, label_smoothing=eps)


def test_robust_dpo_on_flipped_labels_has_the_optimal_policy_of_clean_labels_and_dpo_has_not():
    (reward, reference), beta, eps = of_world(3), 0.7, 0.2
    best = (reference + reward / beta).log_softmax(0)
    clean = bradley_terry(reward)
    noisy = (1 - eps) * clean + eps * clean.T
    assert_optimal(robust, best, reference, noisy, beta=beta, label_smoothing=eps)
    assert expected_gradient(sigmoid, best, reference, noisy, beta=beta).norm() > 1e-3


def test_robust_dpo_without_flips_settles_only_where_labels_are_less_sure_than_1_minus_epsilon():
    hyper = {"beta": 0.3, "label_smoothing": 0.2}
    for p in (0.6, 0.79):
        assert_minimal(robust, math.log((p - 0.2) / (0.8 - p)) / 0.3, p, **hyper)
    h = tensor(-10.0, 0.0, 10.0, 100.0)
    for p in (0.8, 0.9, 1.0):
        assert (expected_slope(robust, h, p, **hyper) < 0).all()


def test_43_percent_of_the_pairs_of_the_world_have_labels_surer_than_robust_dpo_expects():
    """P of the better answer, for pairs that are drawn from the reference, and the default ε."""
    sure = 0
    for thing in range(len(world.THINGS)):
        reward, reference = of_world(thing)
        wins = bradley_terry(reward)
        weights = (reference[:, None] + reference).exp()
        sure += weights[torch.maximum(wins, wins.T) >= 0.9].sum() / len(world.THINGS)
    assert sure.item() == pytest.approx(0.43, abs=0.005)


# --- DiscoPOP (2406.08414) ------------------------------------------------------------------------

def test_discopop_pushes_against_the_chosen_answer_at_the_start_and_a_pair_ends_wrong():
    """L′(0) = −3/4 + (1 − log 2) / (4τ). A pair that starts at h = 0 falls to z = −0.1186."""
    beta = 0.5
    start = expected_slope(discopop, [0.0], 1.0, beta=beta).item() / beta
    assert start == pytest.approx(-0.75 + (1 - math.log(2)) / (4 * 0.05)) and start > 0.78
    z = torch.linspace(-0.1185, 0, 1000, dtype=torch.float64)
    assert (expected_slope(discopop, z / beta, 1.0, beta=beta) > 0).all()
    below = tensor(-0.1187, -1.0, -9.0) / beta
    assert (expected_slope(discopop, below, 1.0, beta=beta) < 0).all()


# --- NCA (2402.05369), BCO (2404.04656), SPPO (2405.00675) ----------------------------------------

def test_nca_at_beta_1_has_the_optimal_policy_2p_times_the_reference_which_is_normalized():
    """The reward of an answer settles at log 2P, where P is its rate of wins. P is ½ on average,
    so 2P π_ref adds up to 1."""
    reference, wins = random_population()
    reward = (2 * win_rates(wins, reference)).log()
    assert (reference + reward).logsumexp(0).item() == pytest.approx(0, abs=1e-12)
    assert_optimal(nca_pair, reference + reward, reference, wins, beta=1.0)
    assert_optimal(nca_pair, reference + reward / 0.2, reference, wins, beta=0.2)


def test_bco_is_the_tightest_bound_of_dpo_where_delta_is_the_mean_of_the_two_rewards():
    """There it is 2 sp(−βh/2), which is what is left of the pair."""
    pairs, beta = random_pairs(), 0.1
    a = pairs["policy_chosen_logps"] - pairs["ref_chosen_logps"]
    b = pairs["policy_rejected_logps"] - pairs["ref_rejected_logps"]
    middle = beta * (a + b) / 2

    def bound(shift):
        return call("bco_pair", pairs | {"delta": middle + shift}, beta=beta)

    assert torch.allclose(bound(0.0), 2 * of(sigmoid, (a - b) / 2, beta=beta))
    for shift in (0.01, 1.0, 7.0):
        assert (bound(shift) > bound(0.0)).all() and (bound(-shift) > bound(0.0)).all()


def test_bco_settles_at_delta_plus_the_logit_of_the_win_rate():
    reference, wins = random_population()
    best = reference + (0.4 + logit(win_rates(wins, reference))) / 0.2
    assert_optimal(bco_pair, best, reference, wins, beta=0.2, delta=0.4)


def test_sppo_on_hard_labels_settles_at_the_targets_of_soft_win_rates():
    """Eq. 4.7: log π/π_ref = η (P(y beats π_ref) − ½)."""
    reference, wins = random_population()
    best = reference + (win_rates(wins, reference) - 0.5) / 0.2
    assert_optimal(sppo_hard, best, reference, wins, beta=0.2)


# --- KTO (2402.01306), APO (2408.06266) -----------------------------------------------------------

@pytest.mark.parametrize("sign", [1, -1])
def test_the_gradient_of_kto_is_largest_at_the_reference_point_and_vanishes_at_both_ends(sign):
    """Proposition 4.1 (v1): it does not learn from bad answers of high reward or good ones of low.
    Other pairs keep both reference points at 0: their log-ratios are very negative."""
    def slopes(a, b):
        pairs = pair(tensor(a, -1e6), tensor(b, -1e6))
        return torch.stack(gradients(kto_pair, pairs, beta=0.1))[:, 0]

    there = slopes(0.0, 0.0)
    assert torch.allclose(there, tensor(-0.1 / 8, 0.1 / 8))
    near, far = slopes(sign * 5.0, sign * 5.0), slopes(sign * 5000.0, sign * 5000.0)
    assert (near.abs() < there.abs()).all() and (far.abs() < 1e-200).all()


def contradictory_slope(function, t, others, prefer_first=3, **hyper):
    """dΣL/dt of 4 labels of one pair of answers with log-ratios t and −t: 3 prefer the first. The
    other pairs have log-ratios of −1e6 on both sides."""
    t = tensor(t, grad=True)
    first, second = t.expand(4), -t.expand(4)
    prefers_first = torch.arange(4) < prefer_first
    rest = torch.full((others,), -1e6, dtype=torch.float64)
    a = torch.cat([torch.where(prefers_first, first, second), rest])
    b = torch.cat([torch.where(prefers_first, second, first), rest])
    return torch.autograd.grad(of(function, a, b, **hyper).sum(), t)[0].item()


def test_with_its_reference_point_at_0_kto_follows_the_majority_of_labels_where_dpo_stops():
    """3 labels of 4. DPO stops at their logit, β · 2t = log 3."""
    logit_of_labels = math.log(3) / (2 * 0.1)
    assert contradictory_slope(sigmoid, logit_of_labels, 0, beta=0.1) == pytest.approx(0, abs=1e-15)
    assert contradictory_slope(sigmoid, 100.0, 0, beta=0.1) > 0.01
    for t in (0.0, logit_of_labels, 100.0, 1000.0):
        assert contradictory_slope(kto_pair, t, 4, beta=0.1) < 0


def test_as_many_labels_for_one_answer_as_for_the_other_leave_kto_at_the_reference():
    """Theorem 4.3 (v1)."""
    for others in (0, 4):
        slope = contradictory_slope(kto_pair, 0.0, others, prefer_first=2, beta=0.1)
        assert slope == pytest.approx(0, abs=1e-15)


def test_apo_zero_too_follows_the_majority_of_contradictory_labels():
    for t in (0.0, 5.0, 100.0, 1000.0):
        assert contradictory_slope(apo_zero, t, 0, beta=0.1) < 0


def test_the_reference_point_of_kto_pair_rises_with_contradictory_labels_so_that_they_settle():
    """z_w = t/2 follows the policy where a batch has no other pairs: 3 σ′(βt) = σ′(βt/2)."""
    assert contradictory_slope(kto_pair, 10.0, 0, beta=0.1) < 0
    assert contradictory_slope(kto_pair, 40.0, 0, beta=0.1) > 0


def test_apo_down_lowers_both_answers_while_the_margin_rises():
    """Gradient descent on one pair from π = π_ref."""
    ratios = tensor(0.0, 0.0)
    path = [ratios]
    for _ in range(300):
        slopes = gradients(apo_down, pair(ratios[:1], ratios[1:]), beta=1.0)
        ratios = ratios - 0.5 * torch.cat(slopes)
        path.append(ratios)
    a, b = torch.stack(path).T
    assert (a.diff()[1:] < 0).all() and (b.diff() < 0).all() and ((a - b).diff() > 0).all()


# --- DPOP (2402.13228), Cal-DPO (2412.14516), χPO (2407.13399) ------------------------------------

def test_dpo_lowers_the_right_token_after_an_edit_and_dpop_raises_it():
    """Two answers differ in one token, and the token after it is the same. The policy is surer of
    that token after the chosen answer, so DPO moves its logit down and all others up."""
    right = 2
    after_chosen, after_rejected = tensor(0.0, 0.1, 2.0, -0.3), tensor(0.0, 0.1, 1.0, -0.3)

    def steps_of_logits(function):
        """The direction of descent in the logits (V,) at this token, shared by both contexts."""
        shared = torch.zeros(4, dtype=torch.float64, requires_grad=True)
        chosen = (after_chosen + shared).log_softmax(0)[right]
        rejected = (after_rejected + shared).log_softmax(0)[right]
        # The chosen answer has fallen a little already.
        start = {"ref_chosen_logps": chosen.detach()[None] + 0.01,
                 "ref_rejected_logps": rejected.detach()[None]}
        pairs = start | {"policy_chosen_logps": chosen[None],
                         "policy_rejected_logps": rejected[None]}
        loss = call_function(function, pairs, beta=0.3)
        return -torch.autograd.grad(loss.sum(), shared)[0]

    others = [0, 1, 3]
    dpo, positive = steps_of_logits(sigmoid), steps_of_logits(dpop)
    assert dpo[right] < 0 and (dpo[others] > 0).all()
    assert positive[right] > 0 and (positive[others] < 0).all()


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_cal_dpo_has_one_fixed_point_at_which_chosen_is_above_and_rejected_below_the_reference(
        weight):
    """a* = 1/(2β) + σ(−2a*) / (2c) and b* = −a*."""
    beta = 0.5
    a = 1 / (2 * beta)
    for _ in range(200):
        a = 1 / (2 * beta) + 1 / (2 * weight * (1 + math.exp(2 * a)))
    assert a > 1 / (2 * beta) > 0
    hyper = {"beta": beta, "cal_dpo_weight": weight}
    for slope_there in gradients(cal_dpo, pair(a, tensor(-a)), **hyper):
        assert slope_there.abs().item() < 1e-12
    dw, dl = gradients(cal_dpo, pair(a + 0.1, tensor(-a - 0.1)), **hyper)
    assert dw > 0 > dl
    dw, dl = gradients(cal_dpo, pair(a - 0.1, tensor(-a + 0.1)), **hyper)
    assert dw < 0 < dl


def normalized(log_ratio_of, reference, low, high):
    """Find the constant λ, by bisection, at which π_ref exp(log_ratio_of(λ)) adds up to 1. The
    log-ratios fall with λ. -> log π"""
    for _ in range(60):
        middle = (low + high) / 2
        if (reference + log_ratio_of(middle)).logsumexp(0) > 0:
            low = middle
        else:
            high = middle
    return reference + log_ratio_of(high)


def lambert(s):
    """log W(eˢ): the root of x + eˣ = s, by Newton's method. The function is convex, so from a
    start above the root each step stays above it."""
    x = s.clamp(max=1) + torch.log1p(s.clamp(min=1) - 1)
    for _ in range(20):
        x = x - (x + x.exp() - s) / (1 + x.exp())
    return x


def chipo_optimum(reward, reference, beta):
    """log π with φ(π/π_ref) = (r − λ)/β, φ(u) = u + log u: u is W(exp((r − λ)/β))."""
    def log_ratio(constant):
        return lambert((reward - constant) / beta)

    return normalized(log_ratio, reference, reward.min() - beta, reward.max())


def test_chipo_on_bradley_terry_labels_is_stationary_at_the_optimum_with_lamberts_w():
    (reward, reference), beta = of_world(1), 0.8
    best = chipo_optimum(reward, reference, beta)
    assert best.logsumexp(0).item() == pytest.approx(0, abs=1e-12)
    assert_optimal(chipo, best, reference, bradley_terry(reward), beta=beta)


def test_the_optimum_of_chipo_stays_within_bounds_of_the_reference_that_dpo_exceeds():
    """exp(−R/β) <= π*/π_ref <= 1 + R/β, R the range of the reward. DPO's grows as exp(R/β)."""
    (reward, reference), beta = of_world(1), 0.3
    spread = ((reward.max() - reward.min()) / beta).item()
    ratios = (chipo_optimum(reward, reference, beta) - reference).exp()
    assert math.exp(-spread) <= ratios.min() and ratios.max() <= 1 + spread
    dpo = (reference + reward / beta).log_softmax(0) - reference
    assert dpo.exp().max() > 2 * (1 + spread)


# --- f-DPO (2309.16240), R-DPO (2403.19159), ODPO (2402.10571) ------------------------------------

INVERSE_SCORES = {  # log (f′)⁻¹(s)
    "reverse_kl": lambda s, alpha: s,
    "forward_kl": lambda s, alpha: -torch.log1p(-s),
    "js": lambda s, alpha: s - torch.log(2 - s.exp()),
    "alpha": lambda s, alpha: -torch.log1p(-alpha * s) / alpha,
}
LARGEST_SCORE = {"reverse_kl": math.inf, "forward_kl": 1.0, "js": math.log(2)}


@pytest.mark.parametrize("f_divergence, alpha", DIVERGENCES)
def test_f_dpo_is_stationary_at_the_reference_times_the_inverse_of_f_prime_at_the_reward(
        f_divergence, alpha):
    """π = π_ref (f′)⁻¹((r − λ)/β), with λ such that π adds up to 1."""
    (reward, reference), beta = of_world(4), 1.5

    def log_ratio(constant):
        return INVERSE_SCORES[f_divergence]((reward - constant) / beta, alpha)

    # Below `low` a score would be above the largest one.
    largest = LARGEST_SCORE.get(f_divergence, 1 / alpha)
    low = max(reward.max().item() - beta * largest, reward.min().item() - 100)
    best = normalized(log_ratio, reference, low + 1e-9, reward.max().item() + 1)
    assert best.logsumexp(0).item() == pytest.approx(0, abs=1e-12)

    def score(log_ratios):
        return f_divergence_score(log_ratios, f_divergence, alpha)

    assert_optimal(sigmoid, best, reference, bradley_terry(reward), score=score, beta=beta)


def test_rdpo_is_stationary_where_the_reward_has_a_price_for_each_token():
    """π* is proportional to π_ref exp((r − α|y|) / β)."""
    (reward, reference), beta, alpha = of_world(0), 0.7, 0.2
    lengths = (torch.arange(512) % 11 + 1).double()
    best = (reference + (reward - alpha * lengths) / beta).log_softmax(0)
    hyper = {"beta": beta, "rdpo_alpha": alpha}
    assert_optimal(rdpo, best, reference, bradley_terry(reward), lengths=lengths, **hyper)


def test_the_weight_of_odpo_is_that_of_dpo_at_the_start_once_the_margin_reaches_the_offset():
    """β/2 at h = Δ/β, more below and less above."""
    beta, scores = 0.2, {"chosen_scores": tensor(5.0), "rejected_scores": tensor(1.0)}
    crossing = 0.7 * math.log(4) / beta
    weights = []
    for h in (crossing - 1, crossing, crossing + 1):
        dw, _ = gradients(odpo, pair(h, tensor(0.0), **scores), beta=beta, odpo_alpha=0.7)
        weights.append(-dw.item())
    assert weights[0] > weights[1] > weights[2]
    assert weights[1] == pytest.approx(beta / 2, rel=1e-12)


# --- Scores: margins (MODPO 2310.03708) and RPO (2406.11704, 2502.00203) --------------------------

def scored_pairs(h, gap):
    """Pairs with margins h whose chosen answers have a score that is higher by `gap`."""
    h = torch.as_tensor(h, dtype=torch.float64)
    return pair(h, 0.0, chosen_scores=torch.full_like(h, gap))


RPO = [rpo_sq, rpo_bwd_kl, rpo_fwd_kl]


@pytest.mark.parametrize("function", RPO)
def test_rpo_with_true_scores_has_the_optimal_policy_whatever_the_labels_say(function):
    """π* is proportional to π_ref exp(η r / β). The labels are right, all wrong, or cyclic.
    A pair with its label flipped has its scores flipped too, and the same loss."""
    (reward, reference), beta, eta = of_world(3), 0.7, 0.4
    best = (reference + eta * reward / beta).log_softmax(0)
    hyper = {"beta": beta, "rpo_eta": eta, "quality": reward}
    for wins in (bradley_terry(reward), bradley_terry(-reward), random_population(512)[1]):
        assert_optimal(function, best, reference, wins, **hyper)
        assert expected_gradient(sigmoid, best, reference, wins, beta=beta).norm() > 1e-3


@pytest.mark.parametrize("function", RPO)
def test_rpo_settles_exactly_where_beta_h_is_eta_times_the_difference_of_the_scores(function):
    beta, eta, gap = 0.3, 0.4, -5.0
    there = eta * gap / beta
    hyper = {"beta": beta, "rpo_eta": eta}
    dw, dl = gradients(function, scored_pairs([there - 0.1, there, there + 0.1], gap), **hyper)
    assert dw[0] < -1e-4 and dw[1].abs() < 1e-15 and dw[2] > 1e-4
    assert torch.equal(dl, -dw)


def test_score_margin_is_optimal_for_the_reward_of_its_labels_plus_kappa_times_the_scores():
    """MODPO's theorem: π* is proportional to π_ref exp((r + κ s) / β). The labels know r alone."""
    (reward, reference), beta, kappa = of_world(2), 0.7, 0.5
    quality = reward.flip(0)
    best = (reference + (reward + kappa * quality) / beta).log_softmax(0)
    hyper = {"beta": beta, "margin_kappa": kappa, "quality": quality}
    assert_optimal(score_margin, best, reference, bradley_terry(reward), **hyper)


def test_the_minimum_of_score_margin_is_at_infinity_where_rpo_turns_back():
    h = [-10.0, 0.0, 10.0, 30.0, 100.0]
    dw, _ = gradients(score_margin, scored_pairs(h, 2.0), beta=0.2)
    assert (dw < 0).all() and (dw.diff() > 0).all()
    for function in RPO:
        dw, _ = gradients(function, scored_pairs(h, 2.0), beta=0.2)
        assert (dw[:2] < 0).all() and (dw[3:] > 0).all()


# --- DPO-Shift (2502.07599), BPO (2506.03557), HyPO (2602.11902) ----------------------------------

@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_dpo_shift_lowers_the_rejected_answer_lambda_times_as_hard_as_it_raises_the_chosen(lam):
    dw, dl = gradients(dpo_shift, random_pairs(), beta=0.1, shift_lambda=lam)
    assert (dw < 0).all() and torch.allclose(dl, -lam * dw, rtol=1e-14)


def test_dpo_shift_is_lower_for_a_policy_that_gives_both_answers_more_probability():
    """The conservatism of CPL, with a reference and without: the margin of the loss gains (1 − λ) β
    for each nat. DPO cannot tell the two policies apart."""
    pairs, lam = random_pairs(), 0.7
    higher = dict(pairs)
    for name in ("policy_chosen_logps", "policy_rejected_logps"):
        higher[name] = pairs[name] + 4.0
    for both in ((pairs, higher), map(without_reference, (pairs, higher))):
        low, high = (call("dpo_shift", t, beta=0.1, shift_lambda=lam) for t in both)
        gain = torch.log(torch.expm1(low)) - torch.log(torch.expm1(high))
        assert (high < low).all() and torch.allclose(gain, tensor(0.1 * (1 - lam) * 4.0))
    assert torch.allclose(call("sigmoid", pairs), call("sigmoid", higher))


def test_contradictory_labels_leave_dpo_at_the_reference_and_dpo_shift_raises_both_answers():
    """Half of the labels prefer the other answer: −(1 − λ) β/2 for each answer."""
    dw, dl = gradients(dpo_shift, pair(0.0, tensor(0.0)), beta=0.1, shift_lambda=0.7)
    assert (dw + dl).item() == pytest.approx(-0.3 * 0.1 / 2)
    dw, dl = gradients(sigmoid, pair(0.0, tensor(0.0)), beta=0.1)
    assert (dw + dl).item() == 0


def test_bpo_is_below_its_start_only_if_the_chosen_answer_rose_and_the_rejected_one_fell():
    """DPO is also below its start where both fell, the rejected answer further."""
    values = tensor(-40.0, -1.0, 0.0, 1.0, 40.0)
    a, b = torch.cartesian_prod(values, values).T
    satisfied = of(bpo, a, b, beta=0.1, bpo_alpha=0.3) < math.log(2)
    assert torch.equal(satisfied, (a > 0) & (b < 0))
    dpo = of(sigmoid, a, b, beta=0.1) < math.log(2)
    assert (dpo & (a < 0)).any() and (dpo & (b > 0)).any()


def test_bpo_with_alpha_1_is_at_least_dpo_at_half_the_margin_and_equal_if_both_moved_as_far():
    """min(a, −b) <= (a − b) / 2."""
    a, b = ratios(random_pairs(40))
    hyper = {"beta": 0.1}
    assert (of(bpo, a, b, bpo_alpha=1.0, **hyper) > of(sigmoid, (a - b) / 2, **hyper)).all()
    balanced = of(bpo, a, -a, bpo_alpha=1.0, **hyper)
    assert torch.allclose(balanced, of(sigmoid, a, **hyper))


def test_descent_on_bpo_raises_the_chosen_answer_alpha_nats_for_each_that_the_rejected_one_falls():
    """From π = π_ref. a and −αb differ by less than one step of descent."""
    alpha, rate = 0.3, 1.0
    answers = tensor(0.0, 0.0)
    for _ in range(400):
        pairs = pair(answers[:1], answers[1:])
        slopes = gradients(bpo, pairs, beta=0.1, bpo_alpha=alpha)
        answers = answers - rate * torch.cat(slopes)
        a, b = answers.tolist()
        assert a > 0 > b and abs(a + alpha * b) < rate * 0.1
    assert a > 1


def test_hypo_weighs_a_pair_below_one_half_only_once_the_policy_itself_has_its_order_right():
    """DPO does so while the order is wrong, if the policy is less wrong than the reference."""
    pairs, beta = random_pairs(400), 0.1
    own = pairs["policy_chosen_logps"] - pairs["policy_rejected_logps"]
    hypo_weight = -gradients(hypo, pairs, beta=beta)[0] / beta
    dpo_weight = -gradients(sigmoid, pairs, beta=beta)[0] / beta
    satisfied_too_early = (own < 0) & (dpo_weight < 0.5)
    assert satisfied_too_early.sum() > 10
    assert (hypo_weight[own < 0] > 0.5).all()


@pytest.mark.parametrize("p", [0.3, 0.5, 0.9])
def test_hypo_settles_between_the_margin_of_dpo_and_that_of_dpo_without_a_reference(p):
    """The answer that the reference prefers is chosen with probability p. HyPO uses the reference
    for these labels, and none for the others."""
    beta, start = 0.3, 10.0  # w° − l°
    settled = {}
    for function in (hypo, sigmoid):
        low, high = tensor(-60.0), tensor(60.0)
        for _ in range(80):
            own = (low + high) / 2
            slope = own_slope(function, own, start, p, beta)
            low, high = (own, high) if slope < 0 else (low, own)
        settled[function] = own.item()
    assert settled[sigmoid] == pytest.approx(start + math.log(p / (1 - p)) / beta)
    assert math.log(p / (1 - p)) / beta < settled[hypo] < settled[sigmoid]


def own_slope(function, own, start, p, beta):
    """∂/∂own of the expected loss of two answers with policy margin `own`, reference `start`."""
    own = own.clone().requires_grad_()
    zero = torch.zeros_like(own)
    first = function(own, zero, zero + start, zero, beta=beta)
    second = function(zero, own, zero, zero + start, beta=beta)
    return torch.autograd.grad((p * first + (1 - p) * second).sum(), own)[0]


# --- β-DPO (2407.08639), α-DPO (2410.10148), Dr. DPO (2407.07880) ---------------------------------

def test_beta_dpo_is_dpo_in_a_batch_of_average_gap_and_has_a_larger_beta_the_larger_the_gap():
    """The β of a batch is (1 + α (mean h − M)) β."""
    pairs, beta = random_pairs(), 0.1
    h = margin(pairs)
    mean = h.mean().item()
    average = call("beta_dpo", pairs | {"gap_mean": mean}, beta=beta, beta_dpo_a=3.0)
    assert torch.allclose(average, of(sigmoid, h, beta=beta))
    for distance in (-0.2, 0.3):
        found = call("beta_dpo", pairs | {"gap_mean": mean - distance}, beta=beta, beta_dpo_a=3.0)
        assert torch.allclose(found, of(sigmoid, h, beta=beta * (1 + 3.0 * distance)))


def test_beta_dpo_moves_the_loss_of_a_pair_but_not_its_gradient_by_the_other_pairs():
    """β of the batch is detached, and so is the mean behind it."""
    pairs = random_pairs(4)
    pairs["gap_mean"] = margin(pairs).mean().item()
    w = pairs["policy_chosen_logps"]

    def losses_of(policy_chosen):
        return call("beta_dpo", pairs | {"policy_chosen_logps": policy_chosen}, beta_dpo_a=0.1)

    jacobian = torch.autograd.functional.jacobian(losses_of, w)
    assert torch.equal(jacobian, torch.diag(jacobian.diag())) and (jacobian.diag() < 0).all()
    nudged = losses_of(w + tensor(0.0, 1.0, 0.0, 0.0)) - losses_of(w)
    assert (nudged[[0, 2, 3]].abs() > 1e-6).all()


def margins_of_alpha_dpo(pairs, **hyper):
    """The target margin m of each pair: log(e^L − 1) = β (m − (w̄ − l̄))."""
    w, l = averages(pairs)  # noqa: E741
    loss = call("alpha_dpo", pairs, beta=0.05, **hyper)
    return torch.log(torch.expm1(loss)) / 0.05 + (w - l)


def test_the_targets_of_alpha_dpo_have_mean_gamma_over_beta_and_a_spread_of_alpha():
    """With the mean and the spread of this batch as μ and s, on any scale of the gaps."""
    for scale in (1.0, 7.0):
        stretched = random_pairs(20)
        for name in stretched:
            if name.endswith("logps"):
                stretched[name] = scale * stretched[name]
        gaps = average_gaps(stretched)
        state = {"gap_mean": gaps.mean(), "gap_std": gaps.std(correction=0)}
        found = margins_of_alpha_dpo(stretched | state, gamma=0.03, alpha_dpo_alpha=0.2)
        assert found.mean().item() == pytest.approx(0.03 / 0.05)
        assert found.std(correction=0).item() == pytest.approx(0.2)
        assert torch.equal(found.argsort(), gaps.argsort())


def average_gaps(pairs):
    a, b = ratios(pairs)
    return a / pairs["chosen_lengths"] - b / pairs["rejected_lengths"]


def test_dr_dpo_is_the_smallest_mean_loss_over_all_weights_with_a_price_for_leaving_uniform_ones():
    """The dual of the paper: min over q of Σ q d + β′ KL(q ‖ uniform), q = softmax(−d/β′)."""
    pairs, price = random_pairs(8), 0.7
    pair_losses = call("sigmoid", pairs)

    def priced(q):
        return (q * pair_losses).sum() + price * (q * torch.log(8 * q)).sum()

    found = call("dr_dpo", pairs, dr_beta=price)[0]
    assert torch.allclose(found, priced((-pair_losses / price).softmax(0)))
    for q in torch.rand(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        assert priced(q / q.sum()) > found


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_with_flipped_labels_in_the_batch_dr_dpo_follows_the_majority_where_dpo_turns_back(share):
    """Pairs with right labels have the margin h, flipped ones −h. DPO stops at the logit."""
    flipped = torch.arange(10) < 10 * share
    for h in (0.0, 5.0, 100.0):
        distance = tensor(h, grad=True)
        margins = torch.where(flipped, -distance, distance)
        zero = torch.zeros(10, dtype=torch.float64)
        slope, = torch.autograd.grad(dr_dpo(margins, zero, zero, zero)[0], distance)
        assert slope < 0 and (h < 100 or slope > -1e-3)
    stop = math.log(1 / share - 1) / 0.1
    assert_minimal(sigmoid, stop, 1 - share, beta=0.1)


def test_the_pull_of_one_flipped_pair_vanishes_in_dr_dpo_and_is_largest_in_dpo():
    """The flipped pair has the margin h < 0, and the nine others 30."""
    pulls = {sigmoid: [], dr_dpo: []}
    for h in (-10.0, -100.0, -1000.0):
        pairs = pair(tensor(h, *[30.0] * 9), 0.0)
        for function in pulls:
            pulls[function].append(-gradients(function, pairs, beta=0.1)[0][0].item())
    assert pulls[sigmoid] == sorted(pulls[sigmoid]) and pulls[sigmoid][2] == pytest.approx(0.1)
    assert pulls[dr_dpo] == sorted(pulls[dr_dpo], reverse=True) and pulls[dr_dpo][2] < 1e-30


# --- RePO (2503.07426), SimPER (2502.00883), NPO (2404.05868) -------------------------------------

@pytest.mark.parametrize("p", [0.51, 0.7, 1.0])
def test_repo_settles_at_gamma_for_every_majority(p):
    """Its margin says nothing about the probability of a label."""
    for distance, sign in ((-0.01, -1), (0.01, 1)):
        slopes = tensor(0.0, 0.0)
        for side, weight in ((1.0, p), (-1.0, 1 - p)):
            own = tensor((0.6 + distance) * side)
            dw, _ = gradients(repo, pair(own - 10, tensor(0.0)), repo_gamma=0.6)
            slopes += side * weight * dw
        expected = 1 - p if sign > 0 else -(2 * p - 1)
        assert slopes[0].item() == pytest.approx(expected)


def test_the_gradient_of_simpo_over_beta_becomes_that_of_repo_as_beta_grows():
    """At the margin m the weight σ(β (γ − m)) becomes 1 below γ and 0 above."""
    pairs, gamma = random_pairs(40), 0.6
    expected = torch.stack(gradients(repo, pairs, repo_gamma=gamma))
    assert (expected[0] < 0).any() and (expected[0] == 0).any()
    errors = []
    for beta in (1e1, 1e2, 1e4):
        found = torch.stack(gradients(simpo, pairs, beta=beta, gamma=beta * gamma)) / beta
        errors.append((found - expected).abs().max().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-12


def test_flipped_labels_only_scale_the_gradient_of_simper_and_turn_that_of_dpo():
    """Because L(w, l) + L(l, w) = 0, a share ε of flips scales the expected loss by 1 − 2ε."""
    (reward, reference), eps = of_world(4), 0.3
    clean = bradley_terry(reward)
    noisy = (1 - eps) * clean + eps * clean.T
    policy = (reference + reward).log_softmax(0)
    lengths = (torch.arange(512) % 11 + 1).double()
    slopes = []
    for wins in (clean, noisy):
        slopes.append(expected_gradient(simper, policy, reference, wins, lengths=lengths))
    assert torch.allclose(slopes[1], (1 - 2 * eps) * slopes[0])
    assert slopes[0].norm() > 1e-4
    dpo = []
    for wins in (clean, noisy):
        dpo.append(expected_gradient(sigmoid, policy, reference, wins, beta=0.5))
    assert torch.cosine_similarity(slopes[0], slopes[1], dim=0) > 1 - 1e-12
    assert torch.cosine_similarity(dpo[0], dpo[1], dim=0) < 0.9


def test_the_gradient_of_simper_is_the_geometric_mean_probability_of_its_own_answer_alone():
    pairs = random_pairs()
    w, l = averages(pairs)  # noqa: E741
    dw, dl = gradients(simper, pairs)
    assert torch.allclose(dw, -torch.exp(w) / pairs["chosen_lengths"])
    assert torch.allclose(dl, torch.exp(l) / pairs["rejected_lengths"])
    assert (dw.abs() <= 1).all() and (dl.abs() <= 1).all()


def npo_slope(b, beta):
    """∂L/∂l at log-ratios b (B,)"""
    rejected = b.clone().requires_grad_()
    return torch.autograd.grad(npo(rejected, torch.zeros_like(b), beta=beta).sum(), rejected)[0]


@pytest.mark.parametrize("beta", [0.05, 1.0, 3.0])
def test_the_gradient_of_npo_is_that_of_gradient_ascent_times_2_pi_b_over_pi_b_plus_pi_ref_b(beta):
    """The exponent b is β. The weight is 1 at the reference, and between 0 and 2 everywhere."""
    policy, reference = tensor(0.9, 0.2, 0.01, 1e-6), tensor(0.2, 0.2, 0.02, 0.4)
    weight = 2 * policy ** beta / (policy ** beta + reference ** beta)
    assert torch.allclose(npo_slope((policy / reference).log(), beta), weight)
    assert weight[1] == 1 and (weight > 0).all() and (weight < 2).all()


def test_npo_is_bounded_below_and_forgets_logarithmically_where_gradient_ascent_is_linear():
    """The log-prob itself is the parameter. After time t of gradient flow it fell by at most
    log(1 + 2βt) / β, and by t under gradient ascent, whose loss has no bound."""
    beta, step, b = 1.0, 0.01, tensor(0.0)
    for count in range(1, 20001):
        b = b - step * npo_slope(b, beta)
        if count in (100, 1000, 20000):
            time = count * step
            assert -b.item() <= math.log1p(2 * beta * time) / beta
            assert -b.item() < time
    assert 4.0 < -b.item() < 6.0 and time == 200
    assert (npo(tensor(-1e4, -1.0), tensor(0.0, 0.0), beta=beta) >= 0).all()


# --- AOT (2406.05882), and losses without a reference: CPO (2401.08417) and others ---------------

@pytest.mark.parametrize("function", [aot, aot_unpaired])
def test_the_sorted_pairing_of_aot_has_the_smallest_loss_of_all_pairings(function):
    """The cost is convex in u − v. Of the 120 pairings of 5, the loss is the smallest, once."""
    pairs = {name: value for name, value in random_pairs(5).items() if "logps" in name}
    u = pairs["policy_chosen_logps"] - pairs["ref_chosen_logps"]
    v = pairs["policy_rejected_logps"] - pairs["ref_rejected_logps"]
    if function is aot:
        u = pairs["policy_chosen_logps"] - pairs["policy_rejected_logps"]
        v = pairs["ref_chosen_logps"] - pairs["ref_rejected_logps"]
    costs, hyper = [], {"beta": 0.1, "label_smoothing": 0.2}
    for order in itertools.permutations(range(5)):
        costs.append(of(sigmoid, u, v[list(order)], **hyper).sum().item())
    costs.sort()
    assert call_function(function, pairs, **hyper).sum().item() == pytest.approx(costs[0])
    assert costs[1] > costs[0] + 1e-6


def test_cpo_bounds_dpo_whose_reference_is_sure_of_the_chosen_answer_from_above():
    """Theorem 1: log π_ref(y_w) = 0, and a constant C = β E[log π_ref(y_l)] is added to DPO."""
    pairs, beta = random_pairs(50), 0.1
    ideal = pairs | {"ref_chosen_logps": torch.zeros(50, dtype=torch.float64)}
    constant = beta * ideal["ref_rejected_logps"]
    dpo = call("sigmoid", ideal, beta=beta) + constant
    bound = call("cpo", pairs, beta=beta, cpo_alpha=0.0)
    assert (dpo <= bound).all() and (bound < dpo - constant).all()


REFERENCE_FREE = [  # the hyper-parameters, and the log-probs at which the reward of the loss is r
    (cpo, {"beta": 0.5, "cpo_alpha": 0.0}, lambda r: r / 0.5),
    (simpo, {"beta": 0.5, "gamma": 0.0}, lambda r: LENGTHS * r / 0.5),
    (alphapo, {"beta": 2.5, "gamma": 0.0}, lambda r: -4 * LENGTHS * torch.log(1 - r / 10)),
    (orpo, {"beta": 0.2, "nll_weight": 0.0}, lambda r: LENGTHS * F.logsigmoid(r)),
]


@pytest.mark.parametrize("function, hyper, logps_of", REFERENCE_FREE)
def test_a_preference_without_a_reference_settles_where_its_own_reward_is_the_true_one(
        function, hyper, logps_of):
    """β log π in CPO, β log p̄ in SimPO, β (1 − p̄^(−α))/α in AlphaPO, the log-odds of p̄ in ORPO,
    p̄ the average probability of a token. The reference only draws the pairs."""
    reference, wins = random_population()
    reward = 3 * wins[0] - 5
    best = logps_of(reward)
    assert_optimal(function, best, reference, bradley_terry(reward), lengths=LENGTHS, **hyper)
