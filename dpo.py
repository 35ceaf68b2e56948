"""A batch of pairs -> log-probs -> the loss of each pair and its metrics.

Letters: B pairs, 2B rows (the B chosen answers first, then the B rejected), T tokens, N scored
tokens, V vocabulary, H hidden size.

A batch comes from data.collate: for each side, `chosen` and `rejected`, right-padded (B, T) tensors
`{side}_input_ids`, `{side}_attention_mask` and `{side}_labels`, where labels are the input ids of
scored tokens and IGNORE elsewhere. A packed batch comes from packing.collate: all rows in one row.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

import packing
from losses import (
    LOSSES,
    f_divergence_score,
    hyperparameters,
    needs_reference,
    needs_rejected,
    tensor_arguments,
)
from packing import IGNORE

# Weights of a likelihood term: a loss has this term if the weight is not 0.
LIKELIHOOD_WEIGHTS = ("cpo_alpha", "nll_weight", "slic_lambda")


def selected_logps(logits, targets):
    """log π(target) at each position: (N, V), (N,) -> (N,), in fp32 or better for any logits."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, reduction="none")


def get_batch_logps(logits, labels, label_pad_token_id=IGNORE):
    """Sum of the log-probs of each row's scored tokens, and the number of these tokens.

    Never an average: a loss that averages over tokens divides by the number itself.

    Args      logits (B, T, V); labels (B, T), label_pad_token_id where a token is not scored
    Returns   logps (B,) in fp32 or better, lengths (B,) integers
    Example   The logits at position t predict the label at t + 1, so the first label and the last
              logits are not used:

                  input_ids   prompt  answer  EOS    pad
                  labels       -100   answer  EOS   -100
                  scored               answer, by the prompt's logits, and EOS, by the answer's
                  lengths = 2
    """
    if logits.shape[:-1] != labels.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"logits are (B, T, V) and labels (B, T), got {shapes}")
    labels, logits = labels[:, 1:], logits[:, :-1]  # (B, T-1), (B, T-1, V)
    scored = labels != label_pad_token_id
    token_logps = selected_logps(logits[scored], labels[scored])  # (N,)
    table = torch.zeros(labels.shape, dtype=token_logps.dtype, device=token_logps.device)
    return table.masked_scatter(scored, token_logps).sum(-1), scored.sum(-1)


class Targets(NamedTuple):
    """Which tokens are scored, as indices on the device.

    The indices are computed on the CPU, so that the CPU never waits for the GPU to count scored
    tokens. They are copied before the forward: FSDP would copy its inputs itself, and wait.
    """
    predictors: torch.Tensor  # (N,) positions, of all rows in sequence, that predict a scored token
    ids: torch.Tensor  # (N,) the scored tokens
    places: torch.Tensor  # (N,) index of each in the flattened (2B, width) table
    lengths: torch.Tensor  # (2B,)
    width: int  # columns of the table, which has one row per answer
    weights: torch.Tensor | None  # (N,) of the tokens, for LD-DPO

    def sum_rows(self, token_values):
        """(N,) -> (2B,). Each row is summed on its own, so other rows cannot change its sum."""
        table = token_values.new_zeros(len(self.lengths) * self.width)
        return table.index_copy(0, self.places, token_values).view(-1, self.width).sum(-1)


def find_targets(labels, predictors=None, token_weights=None, device=None) -> Targets:
    """The Targets of a batch, copied to `device` without waiting for the GPU.

    labels (2B, T), where each position predicts the next token; or, for packed rows, labels (2B, L)
    and the predictors (2B, L) of packing.collate. token_weights have the shape of labels.
    """
    if predictors is None:
        predictors = torch.arange(labels.numel(), device=labels.device).view(labels.shape)[:, :-1]
        labels = labels[:, 1:]
        token_weights = None if token_weights is None else token_weights[:, 1:]
    device = labels.device if device is None else device
    scored = labels != IGNORE  # (2B, T-1) or (2B, L)

    def moved(tensor):
        return packing.to_device(tensor, device)

    places = scored.flatten().nonzero()[:, 0]
    weights = None if token_weights is None else moved(token_weights[scored])
    return Targets(moved(predictors[scored]), moved(labels[scored]), moved(places),
                   moved(scored.sum(-1)), scored.shape[1], weights)


class SequenceLogps(torch.nn.Module):
    """Wraps a causal LM so that forward() returns summed log-probs, as `get_batch_logps` does.

    The head runs at the N positions that predict a scored token: (N, V) logits instead of
    (2B, T, V). Many logits are computed in chunks. The head runs inside the forward of this root
    module, because DDP and FSDP put their hooks on the root's forward.

    Args of forward
      targets     the Targets of the batch, or instead of them
      labels, predictors, token_weights   the arguments of `find_targets`. Without targets and
                  labels, forward returns logits, for packing.can_pack
      alignment   also return each row's mean of log π(y_t) − log Σ_v π(v)², (2B,), without a graph:
                  how probable a token is relative to a token that the policy samples there (WPO,
                  arXiv:2406.11827v2, eq. 2)
      inputs      input_ids and attention_mask, or packed rows
    Returns logps (2B,), lengths (2B,) and, if asked for, alignments (2B,)
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.bare_head = has_bare_head(model)
        self.needs_mask = True  # for padded rows; train.py sets False after packing.can_drop_mask

    def forward(self, labels=None, predictors=None, token_weights=None, targets=None,
                alignment=False, **inputs):
        if "packed" in inputs:
            packing.enable(self.model)
        elif not self.needs_mask:
            inputs["attention_mask"] = packing.no_mask(self.model)
        if labels is not None:
            targets = find_targets(labels, predictors, token_weights, inputs["input_ids"].device)
        if targets is None:
            return self.model(**inputs, use_cache=False).logits

        token_logps, squares = self.token_logps(targets, alignment, inputs)  # (N,), (N,)
        weighted = token_logps if targets.weights is None else token_logps * targets.weights
        logps = targets.sum_rows(weighted)
        if not alignment:
            return logps, targets.lengths
        aligned = targets.sum_rows(token_logps.detach() - squares) / targets.lengths
        return logps, targets.lengths, aligned

    def token_logps(self, targets, squares, inputs):
        """-> log π of each scored token (N,) and, with squares, log Σ_v π(v)² there (N,)."""
        head = self.model.get_output_embeddings()
        if self.bare_head:
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
            hidden = hidden.flatten(0, 1).index_select(0, targets.predictors)  # (N, H)
            keep = torch.is_grad_enabled()
            return packing.ChunkedLogps.apply(
                hidden, head.weight, head.bias, targets.ids, keep, squares
            )
        # This model scales or caps its logits after the head, so its own forward computes them.
        logits = self.model(**inputs, use_cache=False).logits  # (2B, T, V)
        logits = logits.flatten(0, 1).index_select(0, targets.predictors)  # (N, V)
        token_logps = selected_logps(logits, targets.ids)
        return token_logps, packing.log_sum_of_squares(logits.detach()) if squares else None


@torch.no_grad()
def has_bare_head(model) -> bool:
    """Whether the model's logits are head(hidden), checked on four tokens.

    The answer is no for models that scale or cap their logits, such as Gemma 2.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model or model.device.type == "meta":
        return False
    ids = torch.arange(4, device=model.device)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.allclose(head(hidden), model(input_ids=ids, use_cache=False).logits)


def concatenated_inputs(batch, sides=("chosen", "rejected")):
    """Chosen rows, then rejected rows, as one batch: input_ids, attention_mask and labels, each
    (2B, T). Packed rows are concatenated already."""
    if "packed" in batch:
        return {name: batch[name] for name in packing.INPUTS}
    names = ("input_ids", "attention_mask", "labels")
    return {name: torch.cat([batch[f"{side}_{name}"] for side in sides]) for name in names}


def concatenated_forward(model, batch, sides=("chosen", "rejected"), ld_alpha=1.0, alignment=False):
    """Both sides in one forward of `model`, a SequenceLogps.

    One call has half the overhead of two, and DDP can synchronize only one use of each weight.

    Returns {chosen,rejected}_{logps,lengths} and, if asked for, {chosen,rejected}_alignment: (B,)
    """
    inputs = concatenated_inputs(batch, sides)
    labels = inputs.pop("labels")
    weights = length_weights(labels, ld_alpha) if ld_alpha != 1 else None
    device = inputs["input_ids"].device
    targets = find_targets(labels, inputs.pop("predictors", None), weights, device)
    outputs = model(targets=targets, alignment=alignment, **inputs)
    tensors = {}
    for name, values in zip(("logps", "lengths", "alignment"), outputs):
        for side, part in zip(sides, values.chunk(len(sides))):
            tensors[f"{side}_{name}"] = part
    return tensors


def length_weights(labels, ld_alpha):
    """LD-DPO (arXiv:2409.06411): the longer answer's tokens beyond the length of the shorter one
    count ld_alpha each.

    labels (2B, T), chosen rows first -> (2B, T) weights: 1 up to the common length, ld_alpha after
    it. Policy and reference are weighted alike, so that equal models have margin 0. TRL 0.18 to
    0.28 and LLaMA-Factory weight the policy's tokens only, and begin at another token.
    """
    rank = (labels != IGNORE).cumsum(-1)  # of each scored token in its answer, from 1
    lengths = rank[:, -1].view(2, -1)  # (2, B)
    shorter = lengths.amin(0)  # (B,)
    common = shorter.repeat(2)[:, None]  # (2B, 1)
    return torch.where(rank <= common, 1.0, ld_alpha)


def has_likelihood(loss, hyper) -> bool:
    """Whether the loss has a likelihood term whose weight is not 0."""
    names = [name for name in hyperparameters(loss) if name in LIKELIHOOD_WEIGHTS]
    if names:
        return any(hyper[name] for name in names)
    return "mean_chosen_length" in tensor_arguments(loss)


def check_variants(loss, hyper, *, reference_free=False, f_divergence=None, f_alpha=None,
                   wpo=False, ld_alpha=1.0):
    """Raise a ValueError with the reason if the loss cannot be combined with these variants. The
    arguments are those of `preference_step`."""
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
    if wpo and ("batch" in loss.tags or not needs_rejected(loss)):
        raise ValueError(f"wpo: a weight belongs to a pair; the losses of {name} do not")
    if wpo and any(has_likelihood(part, hyper) for part in parts):
        raise ValueError(f"wpo: {name} has a likelihood term, which is not a preference and must "
                         "not be weighted as one")
    if not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must be in [0, 1], got {ld_alpha}")
    if ld_alpha != 1 and not needs_rejected(loss):
        raise ValueError(f"ld_alpha: it weighs the tokens of a pair, but {name} has no pairs")
    if ld_alpha != 1 and any("lengths" in each for each in tensor_arguments(loss)):
        raise ValueError(f"ld_alpha: it weighs the tokens of a pair, but {name} counts them")


def check_margin(flag, name, reading):
    """Both variants add a constant per prompt to the log-ratios, which only a margin cancels."""
    if not reading:
        raise ValueError(f"{flag}: {name} has no reference as it is")
    if not all("margin" in part.tags for part in reading):
        margins = ", ".join(each for each in LOSSES if "margin" in LOSSES[each].tags)
        raise ValueError(f"{flag}: {name} reads more than a margin, so the constant per prompt "
                         f"that {flag} adds to the log-ratios would not cancel; valid losses are "
                         f"{margins}")


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


def sides_of(loss) -> tuple:
    return ("chosen", "rejected") if needs_rejected(loss) else ("chosen",)


def preference_logps(policy, reference, batch, loss, *, reference_free=False, wpo=False,
                     ld_alpha=1.0) -> dict:
    """Every tensor that a loss may take from a batch of pairs, {name: (B,)}: log-probs and lengths
    of both sides, scores if the batch has them, and with wpo the alignments.

    Only the policy's log-probs have a graph. The arguments are those of `preference_step`.
    """
    sides = sides_of(loss)
    tensors = {name: value for name, value in batch.items()
               if name.endswith("_scores") or name.startswith("ref_")}
    asks_reference = needs_reference(loss) and not reference_free
    if asks_reference and "ref_chosen_logps" not in batch:
        with torch.no_grad():  # first, so that its activations are freed before the policy's exist
            ref_outputs = concatenated_forward(reference, batch, sides, ld_alpha)
        for side in sides:
            tensors[f"ref_{side}_logps"] = ref_outputs[f"{side}_logps"]
    outputs = concatenated_forward(policy, batch, sides, ld_alpha, alignment=wpo)
    for side in sides:
        logps = outputs.pop(f"{side}_logps")
        reference_logps = tensors.get(f"ref_{side}_logps")
        if reference_free or reference_logps is None:
            reference_logps = torch.zeros_like(logps)
        tensors[f"policy_{side}_logps"] = logps
        tensors[f"ref_{side}_logps"] = reference_logps.to(logps.dtype)
    return tensors | outputs


def preference_loss(tensors, loss, hyper=None, *, f_divergence=None, f_alpha=None):
    """The loss of each pair and its metrics -> (B,), {metric: (B,)}.

    tensors     the result of `preference_logps`, and the `batch_state` of `preference_step`
    """
    tensors = dict(tensors)
    sides = sides_of(loss)
    metrics = {f"logps/{side}": tensors[f"policy_{side}_logps"] for side in sides}
    # With an f-divergence, its score replaces the policy's log-probs, and zeros the reference's.
    for side in sides if f_divergence else ():
        logratios = tensors[f"policy_{side}_logps"] - tensors[f"ref_{side}_logps"]
        score = f_divergence_score(logratios, f_divergence, f_alpha or 0.5)
        tensors[f"policy_{side}_logps"] = score
        tensors[f"ref_{side}_logps"] = torch.zeros_like(logratios)
    hyper = hyperparameters(loss) | (hyper or {})
    arguments = {name: tensors[name] for name in tensor_arguments(loss) if name in tensors}
    losses = loss(**arguments, **hyper)  # (B,)
    if "chosen_alignment" in tensors:  # WPO
        losses = losses * (tensors["chosen_alignment"] + tensors["rejected_alignment"]).exp()
    metrics = {"loss": losses} | metrics
    if needs_rejected(loss):
        metrics |= rewards(loss, tensors, hyper.get("beta", 1.0))
    return losses, {name: value.detach() for name, value in metrics.items()}


def preference_step(policy, reference, batch, loss, hyper=None, batch_state=None, *,
                    reference_free=False, f_divergence=None, f_alpha=None, wpo=False,
                    ld_alpha=1.0):
    """The loss of each pair, and its metrics.

    policy, reference   SequenceLogps, or a wrapper of one. The reference is called only if the loss
                        has `ref_*` arguments and the batch does not contain these log-probs
    batch               from data.collate or packing.collate, with `chosen_scores` and
                        `rejected_scores` (B,) if the loss takes them, and optionally cached
                        `ref_chosen_logps` and `ref_rejected_logps` (B,)
    loss                a function of losses.LOSSES. It gets the tensors that its signature names
    hyper               its keyword-only arguments, where they are not its defaults
    batch_state         numbers of the whole optimizer step, where this batch may be one micro-batch
                        of the step: `mean_chosen_length`, `delta`
    reference_free      zeros for the reference's log-probs, for metrics too
    f_divergence        the score that replaces log-ratios, see losses.f_divergence_score; f_alpha
                        (0.5) is read if f_divergence is "alpha"
    wpo                 multiply each pair's loss by a detached weight: the probability of its
                        answers under the policy, relative to answers that the policy samples (WPO,
                        arXiv:2406.11827v2, eqs. 1 and 2). The authors' code clamps the weight at 1,
                        the paper does not
    ld_alpha            see length_weights
    Returns             (B,) losses with a graph, {metric: (B,) tensor} without
    """
    options = {"reference_free": reference_free, "wpo": wpo, "ld_alpha": ld_alpha}
    tensors = preference_logps(policy, reference, batch, loss, **options)
    tensors |= batch_state or {}
    return preference_loss(tensors, loss, hyper, f_divergence=f_divergence, f_alpha=f_alpha)


def logp_gradients(tensors, loss, hyper=None, **divergence):
    """dL/dlogp for a loss that compares pairs -> {policy_{side}_logps: (B,)}, {metric: (B,)}.

    L is the sum of the losses of all pairs, and `tensors` are those of all pairs. The loss needs
    all pairs at once, but only their log-probs. The sum of a micro-batch's log-probs, each times
    its dL/dlogp, has the gradient that this micro-batch adds to dL/dθ. `divergence` has f_divergence
    and f_alpha, as in `preference_loss`.
    """
    leaves = {}
    for name, value in tensors.items():
        if name.startswith("policy_"):
            leaves[name] = value.detach().requires_grad_()
    with torch.enable_grad():
        losses, metrics = preference_loss(tensors | leaves, loss, hyper, **divergence)
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return dict(zip(leaves, gradients)), metrics


def rewards(loss, tensors, beta) -> dict:
    """{metric: (B,)}: beta times the log-ratio of policy to reference in nats, per token where the
    loss averages over tokens. A tie does not count as accurate."""
    chosen = beta * (tensors["policy_chosen_logps"] - tensors["ref_chosen_logps"])
    rejected = beta * (tensors["policy_rejected_logps"] - tensors["ref_rejected_logps"])
    if "average" in loss.tags:
        chosen = chosen / tensors["chosen_lengths"]
        rejected = rejected / tensors["rejected_lengths"]
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
    }
