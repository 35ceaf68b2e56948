"""Losses of offline preference optimisation: each one a pure function, each beside its paper.

    python losses.py                                # a table of them
    from losses import sigmoid                      # use one
    LOSSES["sigmoid"] is sigmoid                    # or look it up by the name that --loss takes

To copy a function into another project, leave out its `@loss` line: it then needs torch and nothing else. That is why the
line which computes h stands in each of them again.

Symbols, the same on every page (B pairs; x a prompt, y_w its chosen answer, y_l its rejected one):

    w, l     log π(y_w|x), log π(y_l|x)   policy_chosen_logps, policy_rejected_logps: SUMS over the scored tokens of the answer
    w°, l°   the same under π_ref         ref_chosen_logps, ref_rejected_logps: no gradient
    n_w, n_l scored tokens                chosen_lengths, rejected_lengths: answer and EOS; prompt and padding are not scored
    h        (w − w°) − (l − l°)          the margin: how much more than π_ref the policy prefers y_w
    β        beta                         β (w − w°) is the implicit reward of y_w; larger β keeps π closer to π_ref

Conventions: tensors come first, hyper-parameters are keyword-only. All tensors are (B,), the result is the (B,) loss per pair:
nothing is reduced, logged, remembered or changed in place. A loss that averages over tokens divides by the lengths in its own
body. A value out of range raises ValueError naming the parameter. The signature is the only metadata: a `ref_*` argument means
that a reference model is needed, a keyword-only argument is a flag of train.py.
"""
import functools
import inspect
import re

import torch.nn.functional as F

# ------------------------------------------------------------------------------------------------------------------------
# The registry. Adding a loss is writing its function: everything else reads the signature.
# ------------------------------------------------------------------------------------------------------------------------

LOSSES = {}


def loss(function):
    """Register `function` under its own name, and refuse at its door what would otherwise broadcast without a word."""

    @functools.wraps(function)
    def checked(*tensors, **named):
        given = {**dict(zip(tensor_arguments(function), tensors)), **named}
        shapes = {k: tuple(v.shape) for k, v in given.items() if k.endswith(("_logps", "_lengths", "_scores"))}
        if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
            raise ValueError(f"{function.__name__} takes one number per pair, all of one shape (B,), got {shapes}")
        return function(*tensors, **named)

    LOSSES[function.__name__] = checked
    return checked


def tensor_arguments(function):
    """Names of the tensors a loss asks for, in order."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]


def hyperparameters(function):
    """{name: default} of a loss: these, and no others, are its flags."""
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def needs_reference(function):
    return any(name.startswith("ref_") for name in tensor_arguments(function))


def needs_rejected(function):
    return any("rejected" in name for name in tensor_arguments(function))


# ------------------------------------------------------------------------------------------------------------------------
# Margin losses: functions of h alone. Chosen and rejected get gradients of the same size and opposite sign, and adding a
# constant to both log-probs of a prompt changes nothing: they say which answer to prefer, not how probable either should be,
# so both may fall while h rises.
# ------------------------------------------------------------------------------------------------------------------------

@loss
def sigmoid(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
            *, beta=0.1, label_smoothing=0.0):
    """DPO: logistic regression on the margin of implicit rewards. With label smoothing it is cDPO.

    Paper      Direct Preference Optimization, arXiv:2305.18290v3, eq. 7
               cDPO: A note on DPO with noisy preferences, Mitchell 2023, ericmitchell.ai/cdpo.pdf
    Formula    L = −(1−ε) log σ(βh) − ε log σ(−βh)        = −log σ(βh) + ε βh
    Gradient   ∂L/∂w = −β (σ(−βh) − ε) = −∂L/∂l. The weight σ(−βh) is how wrong the pair's implicit order still is. It never
               reaches 0, so without smoothing h grows for ever on pairs that can be told apart; with it the sign turns
               once σ(βh) > 1 − ε, and h settles at log((1−ε)/ε) / β.
    Args       four (B,) log-probs; beta > 0 (paper 0.1; 0.5 for summaries); 0 <= label_smoothing < 0.5, the share ε of labels
               believed to be flipped.
    Elsewhere  TRL >= 0.29 and Liger ignore label smoothing here, with no word; some tutorials feed per-token averages into
               eq. 7, which is `sigmoid_norm`'s formula with its own scale of β. We follow the paper: sums.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    eps, z = label_smoothing, beta * h
    return (1 - eps) * F.softplus(-z) + eps * F.softplus(z)  # softplus(−z) = −log σ(z), stable at any z


@loss
def hinge(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1):
    """Hinge on the margin of implicit rewards: DPO with a support vector machine's loss in place of logistic regression.

    Paper      Statistical Rejection Sampling Improves Preference Optimization (RSO), arXiv:2309.06657, Sec. 3.1, eq. 10
               There it is "hinge-norm", and β is γ. The hinge comes from SLiC-HF, arXiv:2305.10425, which has no reference.
    Formula    L = max(0, 1 − βh)
    Gradient   ∂L/∂w = −β = −∂L/∂l while βh < 1, exactly 0 beyond: a pair with margin enough is left alone.
    Args       four (B,) log-probs; beta > 0 (paper 0.05): 1/β is the margin asked for, in nats.
    Elsewhere  The same in TRL (`hinge`) and torchtune (`RSOLoss`, which calls β gamma).
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return F.relu(1 - beta * h)


@loss
def ipo(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths,
        *, beta=0.1):
    """IPO: regress the margin onto a fixed target instead of pushing it to infinity. PER-TOKEN AVERAGES, not sums.

    Paper      A General Theoretical Paradigm to Understand Learning from Human Preferences, arXiv:2310.12036v2, eq. 17
               Its τ is our β.
    Formula    L = (h̄ − 1/(2τ))²,   h̄ = (w − w°)/n_w − (l − l°)/n_l
    Gradient   ∂L/∂w = 2 (h̄ − 1/(2τ)) / n_w: grows with the error, and turns against y_w beyond the target; DPO's never turns.
    Args       four (B,) log-probs, two (B,) lengths >= 1; beta > 0. β sets the target alone, it does not scale h̄.
    Elsewhere  The paper prints the summed log-ratio and says nothing of averages; its authors later told TRL that the
               average is meant (huggingface/trl pull request 1265), and TRL >= 0.7.11, LLaMA-Factory and we average. The
               DPO authors' repository, OpenRLHF and TRL <= 0.7.10 sum: for that form pass lengths of one.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    tau = beta
    h = (policy_chosen_logps - ref_chosen_logps) / chosen_lengths
    h = h - (policy_rejected_logps - ref_rejected_logps) / rejected_lengths
    return (h - 1 / (2 * tau)) ** 2


# ------------------------------------------------------------------------------------------------------------------------
# Likelihood: no pair, no reference. The stage that makes a reference policy, and the anchor that other losses are mixed with.
# ------------------------------------------------------------------------------------------------------------------------

@loss
def sft(policy_chosen_logps, chosen_lengths, mean_chosen_length=None):
    """Supervised fine-tuning on the chosen answers: the negative log-likelihood of a token, averaged over the batch's tokens.

    Paper      Maximum likelihood, the stage before every other here: arXiv:2305.18290v3, Sec. 3
    Formula    L_i = −w_i / n̄,   n̄ = mean of n_w over the batch        so that mean_i L_i = −Σ w_i / Σ n_w
    Gradient   ∂L_i/∂w_i = −1/n̄: every token of the batch pulls with the same strength, those of long answers too.
    Args       policy_chosen_logps (B,), chosen_lengths (B,) >= 1. mean_chosen_length: n̄ of the whole optimizer step, which
               train.py passes when these B pairs are only a part of it; left out, these pairs are the batch.
    Elsewhere  TRL's "sft" loss averages over the tokens of one device's micro-batch, so accumulation changes its gradient; with
               n̄ passed in, ours is the same for every split. RPO (arXiv:2404.19733) averages each answer by itself.
    """
    if mean_chosen_length is None:
        mean_chosen_length = chosen_lengths.to(policy_chosen_logps.dtype).mean()
    return -policy_chosen_logps / mean_chosen_length


# ------------------------------------------------------------------------------------------------------------------------

def table():
    """The losses as the lines of a markdown table, read off signatures and pages."""
    rows = ["| loss | paper | reference | hyper-parameters |", "|---|---|---|---|"]
    for name, function in LOSSES.items():
        paper = re.search(r"Paper +(.+)", function.__doc__).group(1)
        hyper = ", ".join(f"`{key}` {value}" for key, value in hyperparameters(function).items())
        rows.append(f"| `{name}` | {paper} | {'yes' if needs_reference(function) else 'no'} | {hyper or 'none'} |")
    return rows


if __name__ == "__main__":
    print("\n".join(table()))
