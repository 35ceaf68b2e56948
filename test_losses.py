"""The claims of the papers, in the order of losses.py: read it beside them.

Letters as there: w, l the policy's log-probs of chosen and rejected, w0, l0 the reference's, h = (w − w0) − (l − l0).
Everything is float64 unless a test says otherwise.
"""
import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from losses import LOSSES, hinge, hyperparameters, ipo, needs_reference, needs_rejected, sft, sigmoid, tensor_arguments

BATCH_COUPLED = {"sft"}  # the value of a pair depends on the others of its batch
MARGIN_ONLY = ["sigmoid", "hinge"]  # functions of h alone


def tensor(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def random_pairs(size=6, seed=0, dtype=torch.float64):
    """{argument: (B,)}: log-probs between −60 and −1 and the lengths they could come from."""
    generator = torch.Generator().manual_seed(seed)
    logps = {name: -1 - 59 * torch.rand(size, generator=generator, dtype=dtype) for name in
             ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")}
    lengths = {name: torch.randint(1, 40, (size,), generator=generator) for name in ("chosen_lengths", "rejected_lengths")}
    return logps | lengths


def call(name, tensors, **hyper):
    return LOSSES[name](**{key: tensors[key] for key in tensor_arguments(LOSSES[name]) if key in tensors}, **hyper)


def at_margin(function, h, **hyper):
    """The loss where the reference is 0, the rejected answer has log-prob −5 and every length is 1."""
    h = torch.as_tensor(h, dtype=torch.float64)
    zero, one = torch.zeros_like(h), torch.ones_like(h)
    given = {"policy_chosen_logps": h - 5, "policy_rejected_logps": zero - 5, "ref_chosen_logps": zero, "ref_rejected_logps": zero,
             "chosen_lengths": one, "rejected_lengths": one}
    return function(**{name: given[name] for name in tensor_arguments(function)}, **hyper)


def gradients(function, tensors, **hyper):
    """(∂ΣL/∂w, ∂ΣL/∂l)"""
    names = [name for name in tensor_arguments(function) if name in tensors]
    tensors = {name: tensors[name].clone().requires_grad_(name.startswith("policy")) for name in names}
    total = function(**tensors, **hyper).sum()
    return torch.autograd.grad(total, [tensors["policy_chosen_logps"], tensors["policy_rejected_logps"]])


def margin(t):
    return (t["policy_chosen_logps"] - t["ref_chosen_logps"]) - (t["policy_rejected_logps"] - t["ref_rejected_logps"])


# ------------------------------------------------------------------------------------------------------------------------
# sigmoid: DPO (2305.18290 eq. 7), cDPO
# ------------------------------------------------------------------------------------------------------------------------

def test_dpo_is_log_2_when_policy_equals_reference():
    assert torch.allclose(at_margin(sigmoid, [0.0]), tensor(math.log(2)))


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
    assert torch.allclose(at_margin(sigmoid, h, beta=0.4) - at_margin(sigmoid, -h, beta=0.4), -0.4 * h)


def test_dpo_is_linear_in_a_badly_wrong_margin_and_vanishes_exponentially_in_a_right_one():
    assert at_margin(sigmoid, [-200.0], beta=1.0).item() == pytest.approx(200.0)
    assert at_margin(sigmoid, [200.0], beta=1.0).item() == pytest.approx(math.exp(-200.0), rel=1e-12)


def test_cdpo_is_the_expected_dpo_loss_when_a_share_epsilon_of_labels_is_flipped():
    h, eps = tensor(-7.0, 0.5, 3.0), 0.2
    expected = (1 - eps) * at_margin(sigmoid, h) + eps * at_margin(sigmoid, -h)
    assert torch.allclose(at_margin(sigmoid, h, label_smoothing=eps), expected)


def test_cdpo_stops_at_confidence_one_minus_epsilon():
    """Its minimum is where σ(βh) = 1 − ε, and beyond it the pair is pulled back."""
    eps, beta = 0.1, 0.5
    best = math.log((1 - eps) / eps) / beta
    h = tensor(best - 1, best, best + 1, grad=True)
    slope, = torch.autograd.grad(at_margin(sigmoid, h, beta=beta, label_smoothing=eps).sum(), h)
    assert slope[0] < 0 < slope[2] and abs(slope[1]) < 1e-12


# ------------------------------------------------------------------------------------------------------------------------
# hinge: RSO (2309.06657 eq. 10)
# ------------------------------------------------------------------------------------------------------------------------

def test_hinge_is_1_at_zero_margin_and_0_past_the_margin_with_no_gradient_there():
    h = tensor(0.0, 9.0, 11.0, 50.0, grad=True)
    loss = at_margin(hinge, h, beta=0.1)
    slope, = torch.autograd.grad(loss.sum(), h)
    assert torch.allclose(loss, tensor(1.0, 0.1, 0.0, 0.0)) and torch.equal(slope, tensor(-0.1, -0.1, 0.0, 0.0))


def test_hinge_and_its_mirror_add_up_to_the_distance_from_the_margin():
    h = torch.linspace(-40, 40, 17, dtype=torch.float64)
    assert torch.allclose(at_margin(hinge, h) + F.relu(0.1 * h - 1), (1 - 0.1 * h).abs())


# ------------------------------------------------------------------------------------------------------------------------
# ipo (2310.12036 eq. 17)
# ------------------------------------------------------------------------------------------------------------------------

def test_ipo_is_a_quarter_of_one_over_beta_squared_at_zero_margin():
    assert at_margin(ipo, [0.0], beta=0.1).item() == pytest.approx(1 / (4 * 0.1 ** 2))


def test_ipo_is_minimal_at_half_inverse_tau_and_pushes_back_beyond_it_as_dpo_never_does():
    tau = 0.25
    h = tensor(1 / (2 * tau) - 1, 1 / (2 * tau), 1 / (2 * tau) + 1, grad=True)
    loss = at_margin(ipo, h, beta=tau)
    slope, = torch.autograd.grad(loss.sum(), h)
    assert torch.allclose(loss, tensor(1.0, 0.0, 1.0)) and torch.allclose(slope, tensor(-2.0, 0.0, 2.0))
    dpo_slope, = torch.autograd.grad(at_margin(sigmoid, h, beta=tau).sum(), h)
    assert (dpo_slope < 0).all()


def test_ipo_averages_over_tokens_so_repeating_every_token_changes_nothing():
    pairs = random_pairs()
    doubled = {name: 2 * value for name, value in pairs.items()}
    assert torch.allclose(call("ipo", pairs), call("ipo", doubled))


def test_ipo_with_lengths_of_one_is_the_summed_form_of_the_paper():
    pairs, tau = random_pairs(), 0.1
    ones = dict(chosen_lengths=torch.ones(6), rejected_lengths=torch.ones(6))
    assert torch.allclose(call("ipo", pairs | ones, beta=tau), (margin(pairs) - 1 / (2 * tau)) ** 2)


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


def test_sft_of_a_batch_is_the_mean_of_its_parts_when_they_know_the_batch_mean_length():
    pairs = random_pairs()
    logps, lengths = pairs["policy_chosen_logps"], pairs["chosen_lengths"]
    parts = [sft(logps[i:i + 2], lengths[i:i + 2], lengths.double().mean()) for i in (0, 2, 4)]
    assert torch.allclose(torch.cat(parts).mean(), sft(logps, lengths).mean())


# ------------------------------------------------------------------------------------------------------------------------
# What holds for every loss
# ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", MARGIN_ONLY)
def test_a_margin_loss_only_sees_the_difference_of_rewards(name):
    pairs = random_pairs()
    shifted = {k: v + 3.7 if k.startswith("policy") else v for k, v in pairs.items()}
    assert torch.allclose(call(name, pairs), call(name, shifted))
    dw, dl = gradients(LOSSES[name], pairs)
    assert torch.allclose(dw, -dl)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_agree_with_finite_differences(name):
    tensors = [value if "lengths" in key else value.requires_grad_(key.startswith("policy")) for key, value in
               random_pairs().items() if key in tensor_arguments(LOSSES[name])]
    names = [key for key in random_pairs() if key in tensor_arguments(LOSSES[name])]
    assert torch.autograd.gradcheck(lambda *values: LOSSES[name](**dict(zip(names, values))), tensors)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_one_loss_per_pair_whatever_the_number_of_pairs(name, size):
    pairs = random_pairs(5)
    whole, part = call(name, pairs), call(name, {k: v[:size] for k, v in pairs.items()})
    assert part.shape == (size,)
    if name not in BATCH_COUPLED:
        assert torch.equal(part, whole[:size])


@pytest.mark.parametrize("name", LOSSES)
def test_token_level_tensors_and_unequal_shapes_are_refused(name):
    pairs = random_pairs(2)
    with pytest.raises(ValueError, match="one number per pair"):
        call(name, {k: v[:, None].expand(2, 3) for k, v in pairs.items()})
    with pytest.raises(ValueError, match="one number per pair"):
        call(name, pairs | {"policy_chosen_logps": pairs["policy_chosen_logps"][:1]})


@pytest.mark.parametrize("name", [name for name in LOSSES if "beta" in hyperparameters(LOSSES[name])])
@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_a_beta_out_of_range_is_refused_by_name(name, beta):
    with pytest.raises(ValueError, match="beta must be > 0"):
        call(name, random_pairs(), beta=beta)


@pytest.mark.parametrize("epsilon", [-0.1, 0.5, 1.0, math.nan])
def test_a_label_smoothing_out_of_range_is_refused_by_name(epsilon):
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        call("sigmoid", random_pairs(), label_smoothing=epsilon)


@pytest.mark.parametrize("name", [name for name in LOSSES if needs_rejected(LOSSES[name])])
@pytest.mark.parametrize("h", [1e4, -1e4])
def test_loss_and_gradient_are_finite_at_a_margin_of_1e4_in_fp32(name, h):
    pairs = random_pairs(1, dtype=torch.float32)
    pairs["policy_chosen_logps"] = pairs["policy_chosen_logps"] + h
    assert call(name, pairs).isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients(LOSSES[name], pairs))


@pytest.mark.parametrize("name", LOSSES)
def test_copied_alone_a_loss_runs_with_torch_and_nothing_else(name):
    source = inspect.getsource(inspect.unwrap(LOSSES[name])).removeprefix("@loss\n")
    space = {"torch": torch, "F": F}
    exec(source, space)
    pairs = {k: v for k, v in random_pairs().items() if k in tensor_arguments(LOSSES[name])}
    assert torch.equal(space[name](**pairs), call(name, pairs))


def test_the_signature_says_what_a_loss_needs():
    assert needs_reference(sigmoid) and needs_rejected(sigmoid)
    assert hyperparameters(sigmoid) == {"beta": 0.1, "label_smoothing": 0.0}
    assert not needs_reference(sft) and not needs_rejected(sft) and hyperparameters(sft) == {}
    assert all(LOSSES[name].__name__ == name for name in LOSSES)


@pytest.mark.parametrize("name", LOSSES)
def test_every_page_has_its_sections_in_order(name):
    page = inspect.getdoc(LOSSES[name])
    places = [page.index(f"\n{section}") for section in ("Paper ", "Formula ", "Gradient ", "Args ", "Elsewhere ")]
    assert places == sorted(places)
