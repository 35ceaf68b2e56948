"""Log-probs without full logits: the head runs only where a token is scored, in chunks.

`FastLogps` is a dpo.SequenceLogps that also takes packed rows, and padded rows with many logits. It
computes logits at the N positions that predict a scored token, (N, V) instead of (2B, T, V), and
not all of them at once: `ChunkedLogps`. (A model that scales or caps its logits computes all.)

Letters: 2B rows, T tokens, N scored tokens, H hidden size, V vocabulary.
"""
import math

import torch
import torch.nn.functional as F

import packing
from dpo import SequenceLogps
from families import family_of
from packing import HALF, Targets, autocast_dtype

KEPT_LOGITS = 2**27  # logits kept for backward, 512 MiB in fp32; the others are recomputed
CHUNK = {"cpu": 2**24, "cuda": 2**27}  # logits of one chunk: each chunk reads the whole head again
CACHE = 2**18  # logits that stay in a CPU's cache through several element-wise operations


class FastLogps(SequenceLogps):
    """A SequenceLogps with a second path, for inputs with Targets in place of labels.

    targets     which tokens are scored. Without targets and labels, forward returns logits
    alignment   also return each row's mean of log π(y_t) − log Σ_v π(v)², (2B,), without a graph:
                how probable a token is relative to a token that the policy samples there (WPO,
                arXiv:2406.11827v2, eq. 2)
    inputs      input_ids and attention_mask, or packed rows
    routing     an experts.Routing, which records what the routers of a mixture of experts do

    Returns logps (2B,), lengths (2B,) and, if asked for, alignments (2B,).
    """

    is_encoder_decoder = False

    def __init__(self, model):
        super().__init__(model)
        self.bare_head = has_bare_head(model)

    def logits(self, **inputs):
        return self.model(**inputs, use_cache=False).logits

    def trial_inputs(self, ids):
        """The inputs of a forward on a row of these ids, (1, T)."""
        return {"input_ids": ids}

    def read_embeddings(self):
        """The embeddings of the tokens before those that the logits predict."""
        return self.model.get_input_embeddings()

    def fast_forward(self, targets: Targets | None = None, alignment=False, routing=None, **inputs):
        if routing is not None:
            with routing.recorded(self.model, inputs):
                return self.fast_forward(targets, alignment, **inputs)
        if "packed" in inputs:
            packing.enable(self.model)
        if targets is None:
            return self.logits(**inputs)
        token_logps, squares = self.score(targets, alignment, inputs)  # (N,), (N,)
        weighted = token_logps
        if targets.weights is not None:
            weighted = token_logps * targets.weights.to(token_logps.dtype)
        logps = targets.sum_rows(weighted)
        if not alignment:
            return logps, targets.lengths
        aligned = targets.sum_rows(token_logps.detach() - squares) / targets.lengths
        return logps, targets.lengths, aligned

    def score(self, targets, with_squares, inputs):
        """-> log π of each scored token (N,) and, with_squares, log Σ_v π(v)² there (N,)."""
        head = self.model.get_output_embeddings()
        if self.bare_head:
            hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
            hidden = hidden.flatten(0, 1).index_select(0, targets.predictors)  # (N, H)
            keep = torch.is_grad_enabled()
            return ChunkedLogps.apply(hidden, head.weight, head.bias, targets.ids, keep,
                                      with_squares)
        # This model scales or caps its logits after the head, so its own forward computes them.
        logits = self.logits(**inputs)  # (2B, T, V)
        logits = logits.flatten(0, 1).index_select(0, targets.predictors)  # (N, V)
        token_logps = selected_logps(logits, targets.ids)
        return token_logps, log_sum_of_squares(logits.detach()) if with_squares else None


@torch.no_grad()
def has_bare_head(model) -> bool:
    """Whether the model's logits are head(hidden), checked on four tokens.

    The answer is no for models that scale or cap their logits, such as Gemma 2.
    """
    if family_of(model.config) == "encoder_decoder":
        return False
    head = model.get_output_embeddings()
    if head is None or model.base_model is model or model.device.type == "meta":
        return False
    ids = torch.arange(4, device=model.device)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.allclose(head(hidden), logits)


def selected_logps(logits, targets):
    """log π(target) at each position: (N, V), (N,) -> (N,), in fp32 or better for any logits."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, reduction="none")


# --- Logits in chunks -----------------------------------------------------------------------------

class ChunkedLogps(torch.autograd.Function):
    """log π(target) at each position without (N, V) tensors for log-softmax and its gradients.

    hidden (N, H), weight (V, H), bias (V,) or None, targets (N,), keep, sums_of_squares
    -> token log-probs (N,) in fp32 or better, and log Σ_v π(v)², without a gradient, (N,) with
    sums_of_squares and else (0,)

    ∂ log π(target) / ∂ logits = onehot(target) − π. Backward needs the normalizer (N,) and the
    logits. With `keep`, forward keeps up to KEPT_LOGITS logits, and backward overwrites them with
    their gradient. Backward recomputes the others. The head's gradient is accumulated in fp32 or
    better.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, keep, sums_of_squares=False):
        ctx.dtype, ctx.kept = autocast_dtype(hidden), []
        inputs, weight_, bias_ = cast(ctx.dtype, hidden, weight, bias)
        dtype = torch.promote_types(ctx.dtype, torch.float32)
        logps, normalizer = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(2))
        squares = hidden.new_empty(len(hidden) if sums_of_squares else 0, dtype=dtype)
        buffer = None  # for logits that are not kept; each chunk overwrites the one before
        for rows in chunks(hidden, len(weight)):
            logits = logits_of(inputs[rows], weight_, bias_, buffer)  # (n, V)
            if keep and rows.stop * len(weight) <= KEPT_LOGITS:
                ctx.kept.append(logits)
            else:
                buffer = logits
            for part, places in cached_parts(logits, rows):
                part = part.to(dtype)
                normalizer[places] = part.logsumexp(-1)
                logps[places] = part.gather(-1, targets[places, None])[:, 0] - normalizer[places]
                if sums_of_squares:
                    squares[places] = log_sum_of_squares(part)
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer)
        ctx.mark_non_differentiable(squares)
        return logps, squares

    @staticmethod
    def backward(ctx, gradient, _):
        hidden, weight, bias, targets, normalizer = ctx.saved_tensors
        inputs, weight_, bias_ = cast(ctx.dtype, hidden, weight, bias)
        grad_hidden, grad_weight, grad_bias = torch.empty_like(hidden), None, None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=normalizer.dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            grad_bias = torch.zeros_like(bias, dtype=normalizer.dtype)
        buffer = None
        for rows in chunks(hidden, len(weight)):
            if ctx.kept:  # empty in a second backward, which recomputes all logits
                logits = ctx.kept.pop(0)
            else:
                logits = buffer = logits_of(inputs[rows], weight_, bias_, buffer)
            # Overwrite logits with their gradient: (onehot(target) − π) times that of the log-prob.
            for part, places in cached_parts(logits, rows):
                factor = gradient[places, None]
                pi = (part - normalizer[places, None]).exp_()
                part.copy_(pi.mul_(-factor).scatter_add_(1, targets[places, None], factor))
            logits = logits.to(ctx.dtype)
            grad_hidden[rows] = logits @ weight_
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=grad_bias.dtype)
            if grad_weight is not None:
                add_product(grad_weight, logits.T, inputs[rows])
        grad_weight, = cast(weight.dtype, grad_weight)
        grad_bias, = cast(weight.dtype, grad_bias)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def log_sum_of_squares(logits):
    """(n, V) -> log Σ_v π(v)², (n,): Σ is the expected probability of a token sampled from π."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    normalizer = logits.logsumexp(-1)  # log π(v) = logits − normalizer
    squares = 2 * logits
    return squares.logsumexp(-1) - 2 * normalizer


def cast(dtype, *tensors):
    return [None if x is None else x.to(dtype) for x in tensors]


def chunks(hidden, vocabulary: int) -> list[slice]:
    """Slices of positions with at most CHUNK logits each, as equal as they can be, the last the
    smallest."""
    count = len(hidden)
    most = CHUNK["cpu"] if hidden.is_cpu else CHUNK["cuda"]
    pieces = max(1, math.ceil(count * vocabulary / most))
    size = math.ceil(count / pieces)
    slices = []
    for start in range(0, count, size):
        stop = min(start + size, count)
        slices.append(slice(start, stop))
    return slices


def cached_parts(logits, rows: slice):
    """-> pairs of (some rows of these logits, their positions).

    On a CPU a part is small enough to stay in the cache through several element-wise operations,
    which halves their time. On a GPU all rows are one part.
    """
    size = len(logits)
    if logits.is_cpu:
        size = max(1, CACHE // logits.shape[1])
    for start in range(rows.start, rows.stop, size):
        stop = min(start + size, rows.stop)
        part = logits[start - rows.start:stop - rows.start]
        yield part, slice(start, stop)


def logits_of(hidden, weight, bias, buffer=None):
    """(n, H), (V, H), (V,) or None -> (n, V), written into `buffer` if it is given.

    On a GPU the product of half-precision matrices is returned in fp32, in which it is accumulated.
    """
    wide = hidden.is_cuda and hidden.dtype in HALF
    dtype = torch.float32 if wide else hidden.dtype
    if buffer is None:
        # Each row begins at a multiple of 16 elements. Without this padding, an odd vocabulary
        # (GPT-2's 50,257) makes the matrix product take up to twice as long.
        buffer = hidden.new_empty(len(hidden), -(-len(weight) // 16) * 16, dtype=dtype)
    logits = buffer[:len(hidden), :len(weight)]
    if wide:
        torch.mm(hidden, weight.T, out_dtype=torch.float32, out=logits)
    else:
        torch.mm(hidden, weight.T, out=logits)
    return logits if bias is None else logits.add_(bias)


def add_product(total, left, right):
    """total += left @ right, where the product of half-precision numbers on a GPU is fp32.

    (torch.addmm with out_dtype would do both in one kernel, but older torch refuses an fp32
    `total` there.)
    """
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and left.dtype in HALF:
        total += torch.mm(left, right, out_dtype=total.dtype)
    else:
        total += left @ right
