"""Variants that go with many losses: options of a run, not losses of their own.

    reference_free   zeros for the reference's log-probs
    f_divergence     f-DPO: a score of the log-ratio replaces it (losses.f_divergence_score)
    wpo, wpo_clamp   WPO: weigh each pair by the probability of its answers under the policy
    ld_alpha         LD-DPO: multiply the log-probs of the longer answer's excess tokens by it

`check_variants` refuses a loss for which a variant is not valid.
"""
import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch

from dpo import IGNORE, preference_loss
from losses import (
    LOSSES,
    compares_answers,
    f_divergence_score,
    hyperparameters,
    needs_reference,
    tensor_arguments,
)

# Weights of a likelihood term: a loss has this term if the weight is not 0.
LIKELIHOOD_WEIGHTS = ("cpo_alpha", "nll_weight", "slic_lambda")


class Variants(NamedTuple):
    """Values of the flags of these names."""
    reference_free: bool = False
    f_divergence: str | None = None
    f_alpha: float | None = None  # read if f_divergence is "alpha"; its default there is 0.5
    wpo: bool = False
    wpo_clamp: bool = False  # read with wpo
    ld_alpha: float = 1.0

    @property
    def score(self) -> Callable | None:
        """The `score` of dpo.preference_loss."""
        if not self.f_divergence:
            return None
        alpha = self.f_alpha or 0.5
        return functools.partial(with_scores, f_divergence=self.f_divergence, alpha=alpha)

    @property
    def weigh(self) -> Callable | None:
        """labels (2B, T) -> weights of the tokens (2B, T)."""
        if self.ld_alpha == 1:
            return None
        return functools.partial(length_weights, ld_alpha=self.ld_alpha)


# --- f-DPO ----------------------------------------------------------------------------------------

def with_scores(tensors: dict, f_divergence: str, alpha: float) -> dict:
    """Tensors of dpo.preference_logps, where the score of the log-ratio replaces the policy's
    log-probs, and zeros the reference's."""
    tensors = dict(tensors)
    for name in [name for name in tensors if name.startswith("policy_")]:
        reference_name = name.replace("policy_", "ref_")
        logratio = tensors[name] - tensors[reference_name]
        tensors[name] = f_divergence_score(logratio, f_divergence, alpha)
        tensors[reference_name] = torch.zeros_like(logratio)
    return tensors


# --- WPO ------------------------------------------------------------------------------------------

def pair_weights(chosen_alignment, rejected_alignment, clamp):
    """The weights of WPO, (B,): the probability of both answers under the policy, relative to
    answers that the policy samples (arXiv:2406.11827v2, eqs. 1 and 2).

    The alignments, (B,) each, have no graph: see logps.FastLogps. The paper has no upper limit. The
    authors' code (scripts/run_wpo.py of github.com/wzhouad/WPO) clamps the weight of a pair at 1.
    """
    weights = (chosen_alignment + rejected_alignment).exp()  # (B,)
    return weights.clamp(max=1) if clamp else weights


def with_wpo(loss: Callable, clamp: bool = False) -> Callable:
    """The loss with each pair multiplied by its weight. The new loss takes two more tensors,
    chosen_alignment and rejected_alignment, (B,) each."""
    @functools.wraps(loss)
    def weighted(*tensors, chosen_alignment, rejected_alignment, **named):
        weights = pair_weights(chosen_alignment, rejected_alignment, clamp)  # (B,)
        return loss(*tensors, **named) * weights

    # dpo.preference_loss reads the names of the tensors from the signature, where they come before
    # the keyword-only hyper-parameters, and passes all arguments by name.
    parameters = list(inspect.signature(loss).parameters.values())
    for name in ("chosen_alignment", "rejected_alignment"):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameter = inspect.Parameter(name, kind, default=None)
        parameters.insert(len(tensor_arguments(loss)), parameter)
    weighted.__signature__ = inspect.Signature(parameters)
    return weighted


def weighted_preference_loss(tensors: dict, loss: Callable, hyper: dict,
                             score: Callable | None = None, clamp: bool = False) -> tuple:
    """dpo.preference_loss of a loss of `with_wpo`, with the weights as one more metric."""
    losses, metrics = preference_loss(tensors, loss, hyper, score)
    weights = pair_weights(tensors["chosen_alignment"], tensors["rejected_alignment"], clamp)
    return losses, metrics | {"wpo/weight": weights}


# --- LD-DPO ---------------------------------------------------------------------------------------

def length_weights(labels, ld_alpha):
    """LD-DPO (arXiv:2409.06411): the longer answer's tokens beyond the length of the shorter one
    count ld_alpha each.

    labels (2B, T), chosen rows first -> (2B, T) weights: 1 up to the common length, ld_alpha after
    it. Policy and reference are weighted alike, so that equal models have margin 0. TRL 0.18 to
    0.28 and LLaMA-Factory weight the policy's tokens only; TRL also counts from the first token of
    the prompt.
    """
    rank = (labels != IGNORE).cumsum(-1)  # of each scored token in its answer, from 1
    lengths = rank[:, -1].view(2, -1)  # (2, B)
    shorter = lengths.amin(0)  # (B,)
    common = shorter.repeat(2)[:, None]  # (2B, 1)
    ones = torch.ones(labels.shape, dtype=torch.float64)
    return ones.masked_fill(rank > common, ld_alpha)


# --- Which losses they are valid for --------------------------------------------------------------

def has_likelihood(loss, hyper) -> bool:
    """Whether the loss has a likelihood term whose weight is not 0."""
    names = [name for name in hyperparameters(loss) if name in LIKELIHOOD_WEIGHTS]
    if names:
        return any(hyper[name] for name in names)
    return "mean_chosen_length" in tensor_arguments(loss)


def check_variants(loss: Callable, hyper: dict, variants: Variants):
    """Raise a ValueError with the reason if the loss cannot be combined with these variants."""
    reference_free, f_divergence, f_alpha, wpo, wpo_clamp, ld_alpha = variants
    name = loss.__name__
    parts = [LOSSES[part] for part in loss.parts]
    reading = [part for part in parts if needs_reference(part)]
    for flag, value in (("reference_free", reference_free), ("f_divergence", f_divergence)):
        if value:
            check_margin(flag, name, reading)
    if f_divergence:
        check_f_divergence(name, parts, reading, reference_free)
    if f_alpha is not None and not 0 < f_alpha <= 1:
        raise ValueError(f"f_alpha must be in (0, 1], got {f_alpha}")
    if f_alpha is not None and f_divergence != "alpha":
        raise ValueError(f"f_alpha: is read by the f_divergence alpha alone, got {f_divergence}")
    if wpo and ("batch" in loss.tags or not compares_answers(loss)):
        raise ValueError(f"wpo: it weighs pairs, but {name} has no separate loss for each pair")
    if wpo and any(has_likelihood(part, hyper) for part in parts):
        raise ValueError(f"wpo: {name} has a likelihood term, which is not a preference and must "
                         "not be weighted as one")
    if wpo_clamp and not wpo:
        raise ValueError("wpo_clamp: is read with wpo only; give both, or neither")
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must be in [0, 1], got {ld_alpha}")
    if ld_alpha != 1 and not compares_answers(loss):
        raise ValueError(f"ld_alpha: it weighs the tokens of a pair, but {name} has no pairs")
    if ld_alpha != 1 and any("lengths" in each for each in tensor_arguments(loss)):
        raise ValueError(f"ld_alpha: it weighs the tokens of a pair, but {name} counts them")


def check_margin(flag, name, reading):
    """An f-divergence score is known up to a constant per prompt, and zeros as the reference leave
    the log-probs themselves. Both make sense only in a margin."""
    if not reading:
        raise ValueError(f"{flag}: {name} has no reference as it is")
    if not all("margin" in part.tags for part in reading):
        margins = ", ".join(each for each in LOSSES if "margin" in LOSSES[each].tags)
        raise ValueError(f"{flag}: {name} reads more than a margin, and {flag} is defined for a "
                         f"margin alone; valid losses are {margins}")


def check_f_divergence(name, parts, reading, reference_free):
    """Check that an f-divergence score may replace the log-ratios of this loss."""
    if len(reading) < len(parts):
        raise ValueError(f"f_divergence: a part of {name} has no reference, and would be given "
                         "scores for log-probs")
    if any("average" in part.tags for part in reading):
        raise ValueError(f"f_divergence: {name} averages over tokens, but an f-divergence takes "
                         "the probabilities of whole answers")
    if reference_free:
        raise ValueError("f_divergence: no divergence from a reference with reference_free")
