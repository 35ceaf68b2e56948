"""Losses of offline preference optimisation: each one a pure function, each beside its paper.

    python losses.py                                # a table of them
    python losses.py --plot losses.png              # loss and gradient against the margin, in one figure
    from losses import sigmoid                      # use one
    LOSSES["sigmoid"] is sigmoid                    # or look it up by its name
    find("sigmoid:0.8,bco_pair:0.2,sft:1")          # or a weighted sum, as --loss takes it

To copy a function into another project, leave out its `@loss` line: it then needs torch and nothing else. That is why the
lines which compute h and check β stand in each of them again.

Symbols, the same on every page (B pairs; x a prompt, y_w its chosen answer, y_l its rejected one):

    w, l     log π(y_w|x), log π(y_l|x)   policy_chosen_logps, policy_rejected_logps: SUMS over the scored tokens of the answer
    w°, l°   the same under π_ref         ref_chosen_logps, ref_rejected_logps: no gradient
    n_w, n_l scored tokens                chosen_lengths, rejected_lengths: answer and EOS; prompt and padding are not scored
    a, b     w − w°, l − l°               the log-ratios; r_w = βa and r_l = βb are the implicit rewards
    h        a − b                        the margin: how much more than π_ref the policy prefers y_w
    w̄, l̄     w/n_w, l/n_l                 per-token averages; ā, b̄ and h̄ are the log-ratios and the margin of averages
    n̄        mean of n_w                  over the pairs of an optimizer step: −w/n̄ averages to the mean NLL of a chosen token
    β        beta                         larger β keeps π closer to π_ref
    ε        label_smoothing              the share of labels believed to be flipped
    σ, sp    sigmoid, softplus            sp(x) = log(1 + eˣ) = −log σ(−x), stable at any x; log(sigmoid(x)) is not

Conventions: tensors come first, hyper-parameters are keyword-only. All tensors are (B,), the result is the (B,) loss per pair:
nothing is reduced, logged, remembered or changed in place. A loss that averages over tokens divides by the lengths in its own
body. A value out of range raises ValueError naming the parameter. The signature is the metadata: a `ref_*` argument means that a
reference model is needed, a tensor with a default is what only the caller can know, a keyword-only argument is a flag of
train.py. What no signature can say stands in the `@loss` line, as marks:

    margin   the log-probs enter through one margin alone, so that a constant per prompt cancels. Therefore a link that is known up
             to such a constant may be put in front (f_divergence_score), and so may a reference of zeros (--reference_free)
    average  that margin, or the two rewards, are per-token averages
    batch    the loss of a pair depends on the other pairs of the batch
"""
import difflib
import functools
import inspect
import re
import sys

import torch
import torch.nn.functional as F

# --- The registry. Adding a loss is writing its function: everything else reads the signature and the marks. ----------

LOSSES = {}


def loss(*marks):
    """Register a function under its own name, and refuse at its door what would otherwise broadcast without a word."""

    def register(function):
        @functools.wraps(function)
        def checked(*tensors, **named):
            given = {**dict(zip(tensor_arguments(function), tensors)), **named}
            shapes = {name: tuple(value.shape) for name, value in given.items()
                      if name.endswith(("_logps", "_lengths", "_scores")) and value is not None}
            if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
                raise ValueError(f"{function.__name__} takes one number per pair, all of one shape (B,), got {shapes}")
            return function(*tensors, **named)

        checked.marks, checked.parts = set(marks), {function.__name__: 1.0}
        LOSSES[function.__name__] = checked
        return checked

    return register


def tensor_arguments(function):
    """Names of the tensors a loss asks for, in order."""
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]


def hyperparameters(function):
    """{name: default} of a loss: these, and no others, are its flags. The default is `...` where the parts of a sum disagree."""
    return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}


def needs_reference(function):
    return any(name.startswith("ref_") for name in tensor_arguments(function))


def needs_rejected(function):
    return any("rejected" in name for name in tensor_arguments(function))


def find(spec):
    """The loss that `NAME` or `NAME:WEIGHT,NAME:WEIGHT` says; a weight left out is 1."""
    weights = {}
    for part in spec.split(","):
        name, _, weight = part.strip().partition(":")
        if name not in LOSSES:
            near = difflib.get_close_matches(name, LOSSES, n=1, cutoff=0)
            raise ValueError(f"loss {name}: there is no such loss; the nearest name is {near[0]}; all: {', '.join(LOSSES)}")
        if not re.fullmatch(r"\d*\.?\d+(e[+-]?\d+)?", weight or "1") or not 0 < float(weight or "1") < float("inf"):
            raise ValueError(f"loss {spec}: the weight of {name} must be a number > 0, got {weight!r}")
        if name in weights:
            raise ValueError(f"loss {spec}: names {name} twice")
        weights[name] = float(weight or "1")
    return combine(weights) if len(weights) > 1 or set(weights.values()) != {1.0} else LOSSES[name]


def combine(weights):
    """Σ weight · loss over {name: weight}, as a loss. Parameters of one name are one parameter; where the defaults of the
    parts differ it has none (`...`), and the caller must choose.

    `sigmoid,sft` is RPO (arXiv:2404.19733v3, eq. 1, which averages each answer by itself where `sft` averages over all tokens);
    `sigmoid:0.8,bco_pair:0.2,sft:1` is MPO (arXiv:2411.10442, Sec. 4.1, eq. 3, whose likelihood averages each answer by itself too; the
    weights are those TRL's documentation quotes); `sigmoid,sft` with a reference of zeros is CPO.
    """
    functions = {name: LOSSES[name] for name in weights}

    def total(**named):
        named = hyperparameters(total) | named
        if undecided := [name for name, value in named.items() if value is ...]:
            raise ValueError(f"{undecided[0]} must be given: it has different defaults in the parts of {total.__name__}")
        wanted = {name: inspect.signature(f).parameters for name, f in functions.items()}
        return sum(weights[name] * f(**{k: v for k, v in named.items() if k in wanted[name]}) for name, f in functions.items())

    pairwise = [f.marks - {"batch"} for f in functions.values() if needs_rejected(f)]
    total.__signature__ = merged_signature(functions.values())
    total.__name__, total.parts = ",".join(f"{name}:{weight:g}" for name, weight in weights.items()), weights
    total.marks = set.intersection(*pairwise) if pairwise else set()
    total.marks |= {mark for f in functions.values() for mark in f.marks & {"batch"}}
    return total


def merged_signature(functions):
    """The parameters of all, each once: tensors, then tensors with defaults, then hyper-parameters."""
    every = [p for f in functions for p in inspect.signature(f).parameters.values()]
    merged = {}
    for p in sorted(every, key=lambda p: (p.kind, p.kind is not p.KEYWORD_ONLY and p.default is not p.empty)):
        merged[p.name] = p.replace(default=...) if p.name in merged and merged[p.name].default != p.default else p
    return inspect.Signature(list(merged.values()))


# ------------------------------------------------------------------------------------------------------------------------
# Margin losses: functions of h alone. Chosen and rejected get gradients of the same size and opposite sign, and adding a
# constant to both log-probs of a prompt changes nothing: they say which answer to prefer, not how probable either should be,
# so both may fall while h rises. They differ in the shape of the curve: what it does to pairs that are wrong, right, or very right.
# ------------------------------------------------------------------------------------------------------------------------

@loss("margin")
def sigmoid(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
            *, beta=0.1, label_smoothing=0.0):
    """DPO: logistic regression on the margin of implicit rewards. With label smoothing it is cDPO.

    Paper      Direct Preference Optimization, arXiv:2305.18290v3, eq. 7
               cDPO: A note on DPO with noisy preferences, Mitchell 2023, ericmitchell.ai/cdpo.pdf
    Formula    L = −(1−ε) log σ(βh) − ε log σ(−βh)        = −log σ(βh) + ε βh
    Gradient   ∂L/∂w = −β (σ(−βh) − ε) = −∂L/∂l. The weight σ(−βh) is how wrong the pair's implicit order still is. It never
               reaches 0, so without smoothing h grows for ever on pairs that can be told apart; with it the sign turns
               once σ(βh) > 1 − ε, and h settles at log((1−ε)/ε) / β.
    Args       four (B,) log-probs; beta > 0 (paper 0.1; 0.5 for summaries); 0 <= label_smoothing < 0.5
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


@loss("margin")
def robust(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1, label_smoothing=0.1):
    """Robust DPO: an unbiased estimate, from noisy labels, of what DPO would be on clean ones.

    Paper      Provably Robust DPO: Aligning Language Models with Noisy Feedback, arXiv:2403.00409
    Formula    L = [ −(1−ε) log σ(βh) + ε log σ(−βh) ] / (1−2ε)        = −log σ(βh) − ε/(1−2ε) βh
    Gradient   ∂L/∂w = −β [ (1−ε) σ(−βh) + ε σ(βh) ] / (1−2ε) = −∂L/∂l. It falls to −βε/(1−2ε) and no further: right pairs are
               pushed on for ever, the loss is unbounded below, and a negative value is no error.
    Args       four (B,) log-probs; beta > 0; 0 <= label_smoothing < 0.5 (paper 0.1)
    Elsewhere  Often confused with cDPO (`sigmoid` with label smoothing), whose βh term has the other sign: cDPO is timid where
               labels may be flipped, this one undoes the flips on average. TRL 0.13 returns ±inf at ε = 0.5 and turns its
               sign beyond; we refuse both.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    eps, z = label_smoothing, beta * h
    return ((1 - eps) * F.softplus(-z) - eps * F.softplus(z)) / (1 - 2 * eps)


@loss("margin")
def hinge(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1):
    """Hinge on the margin of implicit rewards: DPO with a support vector machine's loss in place of logistic regression.

    Paper      Statistical Rejection Sampling Improves Preference Optimization (RSO), arXiv:2309.06657, Sec. 3.1, eq. 10
               There it is "hinge-norm", and β is γ. The hinge comes from SLiC-HF, which has no reference: see `slic`.
    Formula    L = max(0, 1 − βh)
    Gradient   ∂L/∂w = −β = −∂L/∂l while βh < 1, exactly 0 beyond: a pair with margin enough is left alone.
    Args       four (B,) log-probs; beta > 0 (paper 0.05): 1/β is the margin asked for, in nats
    Elsewhere  The same in TRL (`hinge`) and torchtune (`RSOLoss`, which calls β gamma).
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return F.relu(1 - beta * h)


@loss("margin")
def exo_pair(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
             *, beta=0.1, label_smoothing=1e-3):
    """EXO: the reverse KL from the policy's own preference to the labels', where DPO's is the forward one.

    Paper      Towards Efficient Exact Optimization of Language Model Alignment (EXO), arXiv:2402.00856
    Formula    L = KL( (σ(z), σ(−z)) ‖ (1−ε, ε) ) = σ(z) log[σ(z)/(1−ε)] + σ(−z) log[σ(−z)/ε],        z = βh
    Gradient   ∂L/∂w = β σ(z) σ(−z) (z − log((1−ε)/ε)) = −∂L/∂l: 0 at the labels' own confidence, turned against y_w beyond, and
               vanishing for pairs that are very wrong too, which a mode-seeking divergence gives up; DPO pushes those hardest.
    Args       four (B,) log-probs; beta > 0; 0 < label_smoothing < 0.5 (1e-3; at 0 the loss would be +inf)
    Elsewhere  The authors' code uses unnormalised targets (0, −10) in log space, so ε = e⁻¹⁰ without the log(1−ε) term, and never
               reads its own smoothing flag. TRL 0.9.6 to 0.28 turns ε = 0 into 1e-3 and writes that back; we refuse 0.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if not 0 < label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in (0, 0.5), got {label_smoothing}")
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    log_p, log_q = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
    log_one_minus_eps, log_eps = torch.log(torch.tensor([1 - label_smoothing, label_smoothing], dtype=h.dtype))
    return log_p.exp() * (log_p - log_one_minus_eps) + log_q.exp() * (log_q - log_eps)


@loss("margin")
def discopop(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.05, discopop_tau=0.05):
    """DiscoPOP, the log-ratio modulated loss: logistic where the pair is wrong, exponential where it is right.

    Paper      Discovering Preference Optimization Algorithms with and for Large Language Models, arXiv:2406.08414, Sec. 6.1, eq. 5
               A language model proposed it. Eq. 4 as printed has a slip of sign; eq. 5 is the loss.
    Formula    L = (1 − m) sp(−z) + m e^(−z),        m = σ(z/τ), z = βh
    Gradient   ∂L/∂w = β L′(z) = −∂L/∂l,  L′(z) = −(1−m) σ(−z) − m e^(−z) + m(1−m)/τ [e^(−z) − sp(−z)]. Not convex: with τ = 0.05
               there is a local minimum at z = −0.119 and a maximum at z = 0.072, so pairs a little wrong are held there.
    Args       four (B,) log-probs; beta > 0 (paper 0.05); discopop_tau > 0 (paper 0.05), the width of the blend
    Elsewhere  TRL and the authors multiply e^(−z) by m, which in fp32 is inf · 0 = NaN once z < −88; here the product is one
               exponential. With τ > 1 it is truly e^(|z|(1−1/τ)), and goes on as a straight line where squares would overflow.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if not 0 < discopop_tau < float("inf"):
        raise ValueError(f"discopop_tau must be > 0 and finite, got {discopop_tau}")
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    z, tau = beta * h, discopop_tau
    x = -z + F.logsigmoid(z / tau)  # log of m e^(−z)
    cap = x.clamp(max=torch.tensor(torch.finfo(x.dtype).max).log().item() / 2)
    return torch.sigmoid(-z / tau) * F.softplus(-z) + cap.exp() * (1 + x - cap)


@loss("margin", "average")
def ipo(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths,
        *, beta=0.1):
    """IPO: regress the margin onto a fixed target instead of pushing it to infinity. PER-TOKEN AVERAGES, not sums.

    Paper      A General Theoretical Paradigm to Understand Learning from Human Preferences, arXiv:2310.12036v2, eq. 17
               Its τ is our β.
    Formula    L = (h̄ − 1/(2τ))²,        h̄ = (w − w°)/n_w − (l − l°)/n_l
    Gradient   ∂L/∂w = 2 (h̄ − 1/(2τ)) / n_w: grows with the error, and turns against y_w beyond the target; DPO's never turns.
    Args       four (B,) log-probs, two (B,) lengths >= 1; beta > 0. β sets the target alone, it does not scale h̄.
    Elsewhere  The paper prints the summed log-ratio and says nothing of averages; its authors later told TRL that the
               average is meant (huggingface/trl pull request 1265), and TRL >= 0.7.11, LLaMA-Factory and we average. The
               DPO authors' repository, OpenRLHF and TRL <= 0.7.10 sum: for that form pass lengths of one. HALOs counts the
               tokens whose log-ratio is not 0, which is 0/0 before the first step.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    tau = beta
    h = (policy_chosen_logps - ref_chosen_logps) / chosen_lengths
    h = h - (policy_rejected_logps - ref_rejected_logps) / rejected_lengths
    return (h - 1 / (2 * tau)) ** 2


@loss("margin", "average")
def sigmoid_norm(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths,
                 rejected_lengths, *, beta=5.0):
    """Length-normalised DPO: `sigmoid` on per-token averages, so that a long answer is no larger step than a short one.

    Paper      Tülu 3: Pushing Frontiers in Open Language Model Post-Training, arXiv:2411.15124, Sec. 5.1.2, eq. 6
    Formula    L = −log σ(βh̄),        h̄ = (w − w°)/n_w − (l − l°)/n_l
    Gradient   ∂L/∂w = −β σ(−βh̄) / n_w, ∂L/∂l = β σ(−βh̄) / n_l: each token of the shorter answer is moved more.
    Args       four (B,) log-probs, two (B,) lengths >= 1; beta > 0 (paper 5, Table 20). For answers of n tokens β = 5 acts as
               β = 5/n does in `sigmoid`.
    Elsewhere  open-instruct calls it dpo_norm; TRL's documentation cites Sec. 4.3 for it. `rdpo` corrects for length by a term
               and --ld_alpha by token weights.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    h = (policy_chosen_logps - ref_chosen_logps) / chosen_lengths
    h = h - (policy_rejected_logps - ref_rejected_logps) / rejected_lengths
    return F.softplus(-beta * h)


@loss("margin")
def rdpo(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths,
         *, beta=0.1, rdpo_alpha=0.01):
    """R-DPO: a longer chosen answer counts as part of the reason why it was chosen.

    Paper      Disentangling Length from Quality in Direct Preference Optimization, arXiv:2403.19159
    Formula    L = −log σ(βh + α (n_w − n_l))
    Gradient   ∂L/∂w = −β σ(−(βh + α (n_w − n_l))) = −∂L/∂l: pairs whose chosen answer is the longer one teach less.
    Args       four (B,) log-probs, two (B,) lengths >= 1; beta > 0; rdpo_alpha >= 0, per token (authors' scripts 0.005 to 0.05)
    Elsewhere  The sign is that of the authors' code and of SimPO's Tables 3 and 7; one survey prints a minus against its own
               derivation. SamPO's code calls α lenN.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if not 0 <= rdpo_alpha < float("inf"):
        raise ValueError(f"rdpo_alpha must be >= 0 and finite, got {rdpo_alpha}")
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return F.softplus(-(beta * h + rdpo_alpha * (chosen_lengths - rejected_lengths)))


@loss("margin")
def odpo(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_scores, rejected_scores,
         *, beta=0.1, odpo_alpha=1.0):
    """ODPO: DPO with an offset, so that an answer much better than its rival must win by more.

    Paper      Direct Preference Optimization with an Offset, arXiv:2402.10571
    Formula    L = −log σ(βh − Δ),        Δ = α log(s_w − s_l)
    Gradient   ∂L/∂w = −β σ(Δ − βh) = −∂L/∂l: DPO's, at a margin Δ smaller.
    Args       four (B,) log-probs; chosen_scores, rejected_scores (B,), s_w > s_l (a score of each answer, of any scale);
               beta > 0; odpo_alpha >= 0, 0 being DPO (authors' code 1, sentiment task 0.5)
    Elsewhere  Other functions of the scores than the log are thinkable, and α can stand outside: turbo-alignment takes Δ itself.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if not 0 <= odpo_alpha < float("inf"):
        raise ValueError(f"odpo_alpha must be >= 0 and finite, got {odpo_alpha}")
    if not (chosen_scores > rejected_scores).all():
        raise ValueError("chosen_scores must be above rejected_scores in every pair: the offset is the log of the difference")
    h = (policy_chosen_logps - ref_chosen_logps) - (policy_rejected_logps - ref_rejected_logps)
    return F.softplus(odpo_alpha * torch.log(chosen_scores - rejected_scores) - beta * h)


# ------------------------------------------------------------------------------------------------------------------------
# Reward losses: functions of the two log-ratios a and b (or of their scaled form, the implicit rewards r_w = βa, r_l = βb), not of
# their difference alone. They say what each answer's own probability should do, relative to π_ref, so most of them hold the
# chosen answer up where a margin loss would let it fall.
# ------------------------------------------------------------------------------------------------------------------------

@loss()
def nca_pair(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1):
    """NCA: noise contrastive estimation, in which y_w is data (and half of the noise) and y_l is noise.

    Paper      Noise Contrastive Alignment of Language Models with Explicit Rewards, arXiv:2402.05369v3, Table 1 (two answers)
    Formula    L = −log σ(r_w) − ½ log σ(−r_w) − ½ log σ(−r_l)
    Gradient   ∂L/∂w = −β (1 − (3/2) σ(r_w)), ∂L/∂l = (β/2) σ(r_l): each side is moved by its own reward alone, and y_w is drawn
               to the finite r_w = log 2, so its likelihood is held up.
    Args       four (B,) log-probs; beta > 0 (0.1 or 0.01 in the paper's experiments)
    Elsewhere  The same in the authors' code and TRL. `bco_pair` with delta = 0 counts y_w as no noise at all and y_l as all of it.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    chosen, rejected = beta * (policy_chosen_logps - ref_chosen_logps), beta * (policy_rejected_logps - ref_rejected_logps)
    return F.softplus(-chosen) + 0.5 * F.softplus(chosen) + 0.5 * F.softplus(rejected)


@loss()
def bco_pair(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, delta=0.0, *, beta=0.1):
    """BCO: a binary classifier, whose logit is the implicit reward, tells good answers from bad.

    Paper      Binary Classifier Optimization for Large Language Model Alignment, arXiv:2404.04656 (ACL 2025), eq. 8; δ is eq. 7
    Formula    L = −log σ(r_w − δ) − log σ(−(r_l − δ))
    Gradient   ∂L/∂w = −β σ(−(r_w − δ)), ∂L/∂l = β σ(r_l − δ): by each side's own reward, relative to the shift δ. No gradient
               reaches δ. Whatever δ is, L > −log σ(βh): the loss bounds DPO's from above.
    Args       four (B,) log-probs; delta, a number: the running mean of the rewards, kept by `update_delta`; beta > 0 (paper 0.1)
    Elsewhere  TRL <= 0.28 averages all batches since the start with one weight each, updates before use, and in evaluation
               too. TRL >= 0.29 and Liger leave δ out, which is the paper's "BCE" baseline and not BCO.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    chosen, rejected = beta * (policy_chosen_logps - ref_chosen_logps), beta * (policy_rejected_logps - ref_rejected_logps)
    delta = delta.detach() if torch.is_tensor(delta) else delta  # a number is not copied to a GPU
    return F.softplus(-(chosen - delta)) + F.softplus(rejected - delta)


def update_delta(delta, chosen_reward, rejected_reward, decay=0.9):
    """The δ of the next step: an exponential moving average of ½ (mean r_w + mean r_l), as in BCO's eq. 7. The decay is our choice,
    we found none stated; 0.9 remembers about ten steps. train.py feeds it the means over all pairs of a step, after the step."""
    return decay * delta + (1 - decay) * (chosen_reward + rejected_reward) / 2


@loss()
def sppo_hard(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.001):
    """SPPO on fixed pairs: regress each log-ratio onto its share of a game's equilibrium, the winner up, the loser down.

    Paper      Self-Play Preference Optimization for Language Model Alignment, arXiv:2405.00675v5, Sec. 4.5, eq. 4.12
               with P(y_w wins) = 1 and P(y_l wins) = 0. Its η is our 1/β.
    Formula    L = (a − η/2)² + (b + η/2)²
    Gradient   ∂L/∂w = 2 (a − η/2), ∂L/∂l = 2 (b + η/2): both log-ratios have targets of their own, nothing can drift.
    Args       four (B,) log-probs; beta > 0 (paper η = 1000, that is 0.001, with the win rates of a judge in place of 1 and 0)
    Elsewhere  TRL is the same, with 0.1 as its default; the authors' code halves the sum and has soft win rates.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    a, b, eta = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps, 1 / beta
    return (a - eta / 2) ** 2 + (b + eta / 2) ** 2


@loss("batch")
def kto_pair(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1):
    """KTO on pairs: the value of gains and losses as people feel it, relative to a reference point that the batch gives.

    Paper      KTO: Model Alignment as Prospect Theoretic Optimization, arXiv:2402.01306v4, eq. 8 (eq. 7 in v1), λ = 1 on both sides
    Formula    L = ½ [1 − σ(β(a − z_l))] + ½ [1 − σ(β(z_w − b))],        z_w = max(0, mean a), z_l = max(0, mean b)
    Gradient   ∂L/∂w = −(β/2) σ(u) σ(−u) at u = β(a − z_l), and the mirror for l: largest at u = 0, vanishing for examples that are
               very good and very bad. z has no gradient: the paper says not to back-propagate through it.
    Args       four (B,) log-probs; beta > 0
    Elsewhere  The paper's z comes from mismatched prompts and answers; pairs have none, so the mean of the OTHER side stands in,
               as in TRL 0.7.5 to 0.9.4, the home of this loss. Those back-propagate through z (twice the gradient at one pair) and
               return 2B terms; ours is the half sum of a pair's two, so the mean is the same.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    a, b = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
    z_w, z_l = a.detach().mean().clamp(min=0), b.detach().mean().clamp(min=0)
    return 0.5 * torch.sigmoid(-beta * (a - z_l)) + 0.5 * torch.sigmoid(-beta * (z_w - b))  # 1 − σ(x) = σ(−x)


@loss()
def apo_zero(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1):
    """APO-zero: chosen up, rejected down, each anchored at π_ref. For chosen answers better than what the model says itself.

    Paper      Anchored Preference Optimization and Contrastive Revisions, arXiv:2408.06266
    Formula    L = 1 − σ(r_w) + σ(r_l)
    Gradient   ∂L/∂w = −β σ(r_w) σ(−r_w), ∂L/∂l = β σ(r_l) σ(−r_l): always up, always down, most strongly at the anchor r = 0.
    Args       four (B,) log-probs; beta > 0
    Elsewhere  The paper has no 1; TRL adds it, and so do we, so that the loss lies in (0, 2). The gradient is the same.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    chosen, rejected = beta * (policy_chosen_logps - ref_chosen_logps), beta * (policy_rejected_logps - ref_rejected_logps)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@loss()
def apo_down(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1):
    """APO-down: both down, the rejected further. For chosen answers worse than what the model says itself.

    Paper      Anchored Preference Optimization and Contrastive Revisions, arXiv:2408.06266
    Formula    L = σ(r_w) + 1 − σ(r_w − r_l)
    Gradient   with s(x) = σ(x) σ(−x): ∂L/∂w = β [s(r_w) − s(βh)], ∂L/∂l = β s(βh). Up to first order at π_ref nothing moves y_w;
               once the pair is told apart, y_w falls.
    Args       four (B,) log-probs; beta > 0
    Elsewhere  The paper has no 1; TRL adds it, and so do we. The gradient is the same.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    chosen, rejected = beta * (policy_chosen_logps - ref_chosen_logps), beta * (policy_rejected_logps - ref_rejected_logps)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


@loss()
def dpop(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.3, dpop_lambda=50.0):
    """DPO-Positive: DPO that pays a price where the chosen answer becomes less probable than under π_ref.

    Paper      Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive, arXiv:2402.13228, Sec. 4
    Formula    L = −log σ(β [h − λ max(0, w° − w)])
    Gradient   with u = β [h − λ max(0, −a)]: ∂L/∂l = β σ(−u), ∂L/∂w = −β σ(−u) (1 + λ) while w < w°, DPO's −β σ(−u) otherwise.
    Args       four (B,) log-probs; beta > 0 (paper 0.3); dpop_lambda >= 0, 0 being DPO (paper 50; 5 and 500 in an ablation)
    Elsewhere  SamPO's code agrees; turbo-alignment has λ = 0.1 by default.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if not 0 <= dpop_lambda < float("inf"):
        raise ValueError(f"dpop_lambda must be >= 0 and finite, got {dpop_lambda}")
    a, b = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
    return F.softplus(-beta * (a - b - dpop_lambda * F.relu(-a)))


@loss()
def cal_dpo(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1, cal_dpo_weight=1.0):
    """Cal-DPO: DPO with β = 1, calibrated by drawing the two log-ratios to ±1/(2β).

    Paper      Cal-DPO: Calibrated Direct Preference Optimization for Language Model Alignment, arXiv:2412.14516
    Formula    L = −log σ(h) + c [ (a − 1/(2β))² + (b + 1/(2β))² ]
    Gradient   ∂L/∂w = −σ(−h) + 2c (a − 1/(2β)), ∂L/∂l = σ(−h) + 2c (b + 1/(2β)): the squares soon rule, and hold y_w up.
    Args       four (B,) log-probs; beta > 0, which sets the targets and does NOT scale h; cal_dpo_weight = c >= 0 (paper 1)
    Elsewhere  The authors' code has c = 0.5 and averages the squares over the batch before it adds them to each pair, which
               leaves the mean as it is. The square terms are `sppo_hard`.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if not 0 <= cal_dpo_weight < float("inf"):
        raise ValueError(f"cal_dpo_weight must be >= 0 and finite, got {cal_dpo_weight}")
    a, b = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
    return F.softplus(b - a) + cal_dpo_weight * ((a - 1 / (2 * beta)) ** 2 + (b + 1 / (2 * beta)) ** 2)


@loss()
def chipo(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.05, chipo_r_max=None):
    """χPO: DPO regularised by χ² as well as KL, so that the policy may not bet on answers π_ref hardly ever gives.

    Paper      Correcting the Mythos of KL-Regularization: χ²-Preference Optimization, arXiv:2407.13399, Algorithm 1
    Formula    L = −log σ(clip(β [φ(u_w) − φ(u_l)], ±2R)),        φ(u) = u + log u, u_w = eᵃ, u_l = eᵇ
    Gradient   DPO's, at β[φ(u_w) − φ(u_l)], times φ's own slope: (1 + eᵃ) on w and (1 + eᵇ) on l, so near π_ref it is DPO with 2β,
               and an answer that π_ref finds improbable is not worth raising far. Exactly 0 where the clip holds.
    Args       four (B,) log-probs; beta > 0 (paper 0.05 and 0.005); chipo_r_max = R > 0, the largest true reward; None: no clip
    Elsewhere  Copies that clip each side by itself, or clamp β·u, are another loss. eᵃ goes on as a straight line where its square
               would overflow the dtype (a > 44 in fp32), so a gradient is kept.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if chipo_r_max is not None and not 0 < chipo_r_max < float("inf"):
        raise ValueError(f"chipo_r_max must be > 0 and finite, got {chipo_r_max}")
    a, b = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
    largest = torch.tensor(torch.finfo(a.dtype).max).log().item() / 2
    cap_a, cap_b = a.clamp(max=largest), b.clamp(max=largest)
    z = beta * (a + cap_a.exp() * (1 + a - cap_a) - b - cap_b.exp() * (1 + b - cap_b))
    return F.softplus(-z if chipo_r_max is None else -z.clamp(-2 * chipo_r_max, 2 * chipo_r_max))


# ------------------------------------------------------------------------------------------------------------------------
# Distribution losses: the margins of a whole batch, sorted, beside the reference's own, sorted. The policy must be better than
# π_ref at every quantile, not at every pair. losses[k] belongs to the k-th quantile, so no weight of a pair may multiply it.
# ------------------------------------------------------------------------------------------------------------------------

@loss("batch")
def aot(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.01, label_smoothing=0.0):
    """AOT, paired: the distribution of the policy's margins w − l shall dominate the reference's.

    Paper      Distributional Preference Alignment of LLMs via Optimal Transport, arXiv:2406.05882
    Formula    L_k = −(1−ε) log σ(β(u_k − v_k)) − ε log σ(−β(u_k − v_k)),        u = sort(w − l), v = sort(w° − l°)
    Gradient   DPO's, but at the margin u_k − v_k: each pair is compared with the reference's pair of the same rank.
    Args       four (B,) log-probs; beta > 0 (paper 0.01); 0 <= label_smoothing < 0.5. Returned in sorted order, not in that of
               the pairs. A batch of one pair is DPO: the quantiles are only as fine as the batch is large.
    Elsewhere  The same in TRL. `aot` is the paired form everywhere; the name `aot_pair` belongs to the unpaired one.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    u, v = (policy_chosen_logps - policy_rejected_logps).sort().values, (ref_chosen_logps - ref_rejected_logps).sort().values
    eps, z = label_smoothing, beta * (u - v)
    return (1 - eps) * F.softplus(-z) + eps * F.softplus(z)


@loss("batch")
def aot_unpaired(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps,
                 *, beta=0.01, label_smoothing=0.0):
    """AOT, unpaired: the distribution of the log-ratios of good answers shall dominate that of bad ones.

    Paper      Distributional Preference Alignment of LLMs via Optimal Transport, arXiv:2406.05882
    Formula    L_k = −(1−ε) log σ(β(u_k − v_k)) − ε log σ(−β(u_k − v_k)),        u = sort(a), v = sort(b)
    Gradient   DPO's, but at the margin u_k − v_k: good answer and bad answer of the same rank, whatever their prompts.
    Args       four (B,) log-probs; beta > 0 (paper 0.01); 0 <= label_smoothing < 0.5. Which rejected answer came with which
               chosen one plays no part. Returned in sorted order.
    Elsewhere  `aot_pair` in TRL 0.9 to 0.28, in spite of what it does; that name finds this function here too.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    u, v = (policy_chosen_logps - ref_chosen_logps).sort().values, (policy_rejected_logps - ref_rejected_logps).sort().values
    eps, z = label_smoothing, beta * (u - v)
    return (1 - eps) * F.softplus(-z) + eps * F.softplus(z)


LOSSES["aot_pair"] = aot_unpaired


# ------------------------------------------------------------------------------------------------------------------------
# Reference-free losses: no second model. What holds the policy in place instead is a likelihood term, or the scale of the
# reward. Where that term is an average over tokens, it is over the batch's tokens: −w/n̄, as on the page of `sft`.
# ------------------------------------------------------------------------------------------------------------------------

@loss()
def cpo(policy_chosen_logps, policy_rejected_logps, chosen_lengths, mean_chosen_length=None,
        *, beta=0.1, cpo_alpha=1.0, label_smoothing=0.0):
    """CPO: DPO with a uniform reference, kept from drifting by the likelihood of the chosen answer.

    Paper      Contrastive Preference Optimization, arXiv:2401.08417, eq. 5; the preference term alone is eq. 3
    Formula    L = −(1−ε) log σ(β(w − l)) − ε log σ(−β(w − l)) − α w/n̄
    Gradient   ∂L/∂w = −β (σ(−β(w − l)) − ε) − α/n̄, ∂L/∂l = β (σ(−β(w − l)) − ε): only y_w has the second, constant pull.
    Args       two (B,) log-probs; chosen_lengths (B,) >= 1; mean_chosen_length: see `sft`; beta > 0 (paper 0.1); cpo_alpha >= 0
               (the paper has no such weight: 1); 0 <= label_smoothing < 0.5
    Elsewhere  The paper's likelihood is summed over the answer; TRL and ALMA average it over the batch's tokens, and we
               follow them, since α = 1 is only balanced there. TRL's CPO with loss_type hinge or ipo: --loss hinge,sft
               --reference_free.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if not 0 <= cpo_alpha < float("inf"):
        raise ValueError(f"cpo_alpha must be >= 0 and finite, got {cpo_alpha}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if mean_chosen_length is None:
        mean_chosen_length = chosen_lengths.to(policy_chosen_logps.dtype).mean()
    eps, z = label_smoothing, beta * (policy_chosen_logps - policy_rejected_logps)
    return (1 - eps) * F.softplus(-z) + eps * F.softplus(z) - cpo_alpha * policy_chosen_logps / mean_chosen_length


@loss("average")
def simpo(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, mean_chosen_length=None,
          *, beta=2.0, gamma=1.0, cpo_alpha=0.0, label_smoothing=0.0):
    """SimPO: the reward is the average log-prob of a token, as in generation, and must win by a target margin γ.

    Paper      SimPO: Simple Preference Optimization with a Reference-Free Reward, arXiv:2405.14734, eq. 6 (reward eq. 4)
    Formula    L = −(1−ε) log σ(z) − ε log σ(−z) − α w/n̄,        z = β(w̄ − l̄) − γ
    Gradient   at ε = α = 0: ∂L/∂w = −β σ(−z) / n_w, ∂L/∂l = β σ(−z) / n_l: it pushes until w̄ − l̄ is well past γ/β, however long.
    Args       two (B,) log-probs, two (B,) lengths >= 1; mean_chosen_length: see `sft`; beta > 0 (paper 2 to 2.5, and 10); gamma
               finite, ABSOLUTE (paper 0.3 to 1.6, and 3); cpo_alpha >= 0 (above 0: CPO-SimPO); 0 <= label_smoothing < 0.5
    Elsewhere  The authors' code, open-instruct and HALOs ask for the ratio γ/β; TRL, LLaMA-Factory and Liger for γ, as here. TRL's CPO
               trainer adds the likelihood by default (α = 1, β = 0.1, γ = 0.5), and that is not SimPO.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if not abs(gamma) < float("inf"):
        raise ValueError(f"gamma must be finite, got {gamma}")
    if not 0 <= cpo_alpha < float("inf"):
        raise ValueError(f"cpo_alpha must be >= 0 and finite, got {cpo_alpha}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if mean_chosen_length is None:
        mean_chosen_length = chosen_lengths.to(policy_chosen_logps.dtype).mean()
    z = beta * (policy_chosen_logps / chosen_lengths - policy_rejected_logps / rejected_lengths) - gamma
    preference = (1 - label_smoothing) * F.softplus(-z) + label_smoothing * F.softplus(z)
    return preference - cpo_alpha * policy_chosen_logps / mean_chosen_length


@loss("average")
def alphapo(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths,
            *, beta=2.5, gamma=0.1, alphapo_alpha=0.25):
    """AlphaPO: SimPO with another shape of reward, (1 − p̄^(−α))/α of the average token probability p̄ in place of log p̄.

    Paper      AlphaPO: Reward Shape Matters for LLM Alignment, arXiv:2501.03884
    Formula    L = −log σ(β(s(w̄) − s(l̄)) − γ),        s(x) = (1 − e^(−αx))/α
    Gradient   SimPO's at this margin, times s′(x) = e^(−αx): with α > 0 improbable answers are moved more, with α < 0 less.
    Args       two (B,) log-probs, two (B,) lengths >= 1; beta > 0 (2.5); gamma finite (0.1); alphapo_alpha finite and not 0
               (0.25), towards 0 it is SimPO. The three values are those TRL's documentation quotes from the paper.
    Elsewhere  TRL computes exp(logp)^(−α), which underflows to NaN for long sums; here it is one expm1, which goes on as a
               straight line where its square would overflow.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if not abs(gamma) < float("inf"):
        raise ValueError(f"gamma must be finite, got {gamma}")
    if not 0 < abs(alphapo_alpha) < float("inf"):
        raise ValueError(f"alphapo_alpha must be finite and not 0 (simpo is its limit there), got {alphapo_alpha}")
    averages = torch.stack([policy_chosen_logps / chosen_lengths, policy_rejected_logps / rejected_lengths])  # (2, B)
    x = -alphapo_alpha * averages
    cap = x.clamp(max=torch.tensor(torch.finfo(x.dtype).max).log().item() / 2)
    score_chosen, score_rejected = -(torch.expm1(cap) + cap.exp() * (x - cap)) / alphapo_alpha
    return F.softplus(gamma - beta * (score_chosen - score_rejected))


@loss("average")
def orpo(policy_chosen_logps, policy_rejected_logps, chosen_lengths, rejected_lengths, mean_chosen_length=None,
         *, beta=0.1, nll_weight=1.0):
    """ORPO: supervised fine-tuning with a penalty on the odds of the rejected answer; no stage before it, no reference.

    Paper      ORPO: Monolithic Preference Optimization without Reference Model, arXiv:2403.07691v2, eqs. 6 and 7; odds are eq. 4
    Formula    L = −w/n̄ − λ log σ(lo(w̄) − lo(l̄)),        lo(x) = x − log(1 − eˣ): the log-odds of an average token probability eˣ
    Gradient   with u = lo(w̄) − lo(l̄): ∂L/∂w = −1/n̄ − λ σ(−u) / ((1 − e^w̄) n_w), ∂L/∂l = λ σ(−u) / ((1 − e^l̄) n_l): strongest on
               answers that are nearly certain.
    Args       two (B,) log-probs < 0, two (B,) lengths >= 1; mean_chosen_length: see `sft`; beta > 0, the paper's λ (0.1 for
               Mistral, 0.2 for Llama 2, 0.25 for Phi-2); nll_weight >= 0, 1 in the paper, 0 leaves the odds-ratio term alone
    Elsewhere  The authors and TRL count the prompt in the likelihood; we score answers only, everywhere. log(1 − eˣ) by way of
               log1p(−exp(x)) is −inf at x ≈ 0 in fp32 (TRL 0.13, Liger); here it is expm1, and goes on as a straight line within
               one ulp of probability 1.
    """
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta must be > 0 and finite, got {beta}")
    if not 0 <= nll_weight < float("inf"):
        raise ValueError(f"nll_weight must be >= 0 and finite, got {nll_weight}")
    if mean_chosen_length is None:
        mean_chosen_length = chosen_lengths.to(policy_chosen_logps.dtype).mean()
    x = torch.stack([policy_chosen_logps / chosen_lengths, policy_rejected_logps / rejected_lengths])  # (2, B)
    cap = x.clamp(max=-torch.finfo(x.dtype).eps)
    log_odds_chosen, log_odds_rejected = cap - torch.log(-torch.expm1(cap)) - (x - cap) / torch.expm1(cap)
    return beta * F.softplus(log_odds_rejected - log_odds_chosen) - nll_weight * policy_chosen_logps / mean_chosen_length


@loss()
def slic(policy_chosen_logps, policy_rejected_logps, policy_target_logps=None, *, slic_delta=1.0, slic_lambda=0.1):
    """SLiC-HF: a hinge calibrates the log-probs themselves, and the likelihood of a target answer regularises.

    Paper      SLiC-HF: Sequence Likelihood Calibration with Human Feedback, arXiv:2305.10425, as RSO (arXiv:2309.06657) quotes it
    Formula    L = max(0, δ − w + l) − λ log π(y_ref|x)
    Gradient   ∂L/∂w = −1, ∂L/∂l = 1 while w − l < δ, 0 beyond; and a constant −λ on y_ref.
    Args       two (B,) log-probs; policy_target_logps (B,), log π(y_ref|x) of the supervised target: left out, y_ref is the chosen
               answer, as with the paper's best-ranked candidate; slic_delta >= 0 in nats (1); slic_lambda >= 0
    Elsewhere  SimPO's Table 3 writes y_w for y_ref, and train.py has no other answer to give. HALOs broadcasts (B,) against
               (B, T); turbo-alignment's regulariser is a constant.
    """
    if not 0 <= slic_delta < float("inf"):
        raise ValueError(f"slic_delta must be >= 0 and finite, got {slic_delta}")
    if not 0 <= slic_lambda < float("inf"):
        raise ValueError(f"slic_lambda must be >= 0 and finite, got {slic_lambda}")
    target = policy_chosen_logps if policy_target_logps is None else policy_target_logps
    return F.relu(slic_delta - policy_chosen_logps + policy_rejected_logps) - slic_lambda * target


# --- Likelihood: no pair, no reference. The stage that makes a reference policy, and the anchor that other losses are mixed with. ---

@loss()
def sft(policy_chosen_logps, chosen_lengths, mean_chosen_length=None):
    """Supervised fine-tuning on the chosen answers: the negative log-likelihood of a token, averaged over the batch's tokens.

    Paper      Maximum likelihood, the stage before every other here: arXiv:2305.18290v3, Sec. 3
    Formula    L_i = −w_i / n̄,        n̄ = mean of n_w over the batch, so that mean_i L_i = −Σ w_i / Σ n_w
    Gradient   ∂L_i/∂w_i = −1/n̄: every token of the batch pulls with the same strength, those of long answers too.
    Args       policy_chosen_logps (B,), chosen_lengths (B,) >= 1. mean_chosen_length: n̄ of the whole optimizer step, which
               train.py passes when these B pairs are only a part of it; left out, these pairs are the batch.
    Elsewhere  TRL's "sft" loss averages over the tokens of one device's micro-batch, so accumulation changes its gradient; with
               n̄ passed in, ours is the same for every split. RPO (arXiv:2404.19733) averages each answer by itself.
    """
    if mean_chosen_length is None:
        mean_chosen_length = chosen_lengths.to(policy_chosen_logps.dtype).mean()
    return -policy_chosen_logps / mean_chosen_length


# --- A link for margin losses: other divergences than the KL between π and π_ref --------------------------------------

def f_divergence_score(logratio, f_divergence="reverse_kl", alpha=0.5):
    """f-DPO: the score s(a) that stands for the log-ratio a in a margin loss when π is held near π_ref by another f-divergence.

    Paper      Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints, arXiv:2309.16240
    Formula    s = f′(u) up to a constant, u = eᵃ = π/π_ref.        reverse_kl  a, which is DPO
               js  log(2u/(1+u))        alpha  (1 − u^(−α))/α        forward_kl  1 − 1/u, which is alpha at α = 1
    Gradient   s′(a): 1 · 1 − σ(a) · e^(−αa) · e^(−a). js lets go of answers that have risen; the others pull hardest where the
               probability fell. s(0) = 0 for all, so a loss has its usual value at π = π_ref; s′(0) is ½ for js, else 1.
    Args       logratio (B,), w − w° or l − l°; alpha in (0, 1], read by "alpha" alone. Feed the scores as log-probs, with zeros
               as the reference's. Valid in front of margin losses of sums: f′ is known up to a constant per prompt.
    Elsewhere  The paper's α is in (0, 1), and TRL <= 0.28 had 1 as its default; TRL >= 0.29 gives the same option the value
               1 − α. Its forward_kl is NaN in fp32 once both answers fell by 88 nats, its old cap made the gradient 0; ours
               goes on as a straight line where the square of the exponential would overflow.
    """
    if f_divergence not in ("reverse_kl", "forward_kl", "js", "alpha"):
        raise ValueError(f"f_divergence must be reverse_kl, forward_kl, js or alpha, got {f_divergence!r}")
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha must be in (0, 1], got {alpha}")
    if f_divergence == "reverse_kl":
        return logratio
    if f_divergence == "js":
        return F.logsigmoid(logratio) + torch.log(torch.tensor(2.0, dtype=logratio.dtype))
    alpha = 1.0 if f_divergence == "forward_kl" else alpha
    x = -alpha * logratio
    cap = x.clamp(max=torch.tensor(torch.finfo(x.dtype).max).log().item() / 2)
    return -(torch.expm1(cap) + cap.exp() * (x - cap)) / alpha


# --- python losses.py -------------------------------------------------------------------------------------------------

def table():
    """The losses as the lines of a markdown table, read off signatures and pages."""
    rows = ["| loss | paper | reference | hyper-parameters |", "|---|---|---|---|"]
    for name, function in LOSSES.items():
        if name != function.__name__:
            continue  # an older name
        paper = re.search(r"Paper +(.+)", function.__doc__).group(1)
        hyper = ", ".join(f"`{key}` {value}" for key, value in hyperparameters(function).items())
        rows.append(f"| `{name}` | {paper} | {'yes' if needs_reference(function) else 'no'} | {hyper or 'none'} |")
    return rows


def curve(function, h):
    """(loss, its derivative) of a margin loss over margins h, at its defaults. Where lengths and scores are read: 30 tokens against
    20 (one against one for averages) and a score better by e."""
    h = h.clone().requires_grad_()
    zeros, ones, (n_w, n_l) = torch.zeros_like(h), torch.ones_like(h), (1, 1) if "average" in function.marks else (30, 20)
    given = {"policy_chosen_logps": h, "chosen_lengths": n_w * ones, "rejected_lengths": n_l * ones,
             "chosen_scores": torch.e * ones, "rejected_scores": zeros}
    value = function(**{name: given.get(name, zeros) for name in tensor_arguments(function)})
    return value.detach(), torch.autograd.grad(value.sum(), h)[0]


def plot(path):
    """Every margin loss and its slope, each in a panel of its own scale, since the betas differ by a factor of 100."""
    from matplotlib.figure import Figure
    drawn = [function for function in LOSSES.values() if "margin" in function.marks]
    figure = Figure(figsize=(12, 2.8 * -(-len(drawn) // 3)), layout="constrained")
    for place, function in enumerate(drawn, 1):
        panel, beta = figure.add_subplot(-(-len(drawn) // 3), 3, place), hyperparameters(function)["beta"]
        z = torch.linspace(-6, 6, 601, dtype=torch.float64)  # βh
        value, slope = curve(function, z / beta)
        panel.plot(z, value, "tab:blue", z, slope / beta, "tab:red")
        panel.grid(color="0.9")
        panel.set_title(", ".join([function.__name__, *(f"{k} {v:g}" for k, v in hyperparameters(function).items())]), fontsize=9)
        panel.set_xlabel("βh̄" if "average" in function.marks else "βh")
    figure.axes[0].legend(["L", "∂L/∂(βh)"])
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--plot"] and len(sys.argv) == 3:
        plot(sys.argv[2])
    elif len(sys.argv) > 1:
        sys.exit("usage: python losses.py [--plot FILE.png]")
    else:
        print("\n".join(table()))
