"""The log-probs of dpo.py, faster: no padding, each prompt computed once, no full logits.

    prompt a | chosen a | rejected a | prompt b | ...        one row for a micro-batch, (1, T)

A rejected answer's positions restart after its prompt, and it does not attend to the chosen answer.
The last token of an answer predicts nothing and is not fed. The hidden state at the end of a prompt
predicts the first token of both answers, so it is used twice. For prompt (5 6 7) with the answers
(8 9 0) and (4 0):

    input_ids      5 6 7 8 9 4
    position_ids   0 1 2 3 4 3
    labels         8 9 0 / 4 0        predicted at indices  2 3 4 / 2 5

Models are not patched. They call the attention function registered here. Without the keyword
argument `packed`, this function calls transformers' own `sdpa`. `packed` is the layout of the row.
`can_pack` verifies numerically that a model supports packed rows, and `can_drop_mask` that padded
rows need no mask.

Letters: B pairs, S sides (2, or 1 without rejected answers), T tokens fed, K keys, L tokens of the
longest answer, N scored tokens, H hidden size, V vocabulary.
"""
import contextlib
import functools
import itertools
import math
import pathlib
import traceback
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

IGNORE = -100  # label of a token that is not scored, as in torch and transformers
KEPT_LOGITS = 2**27  # logits kept for backward, 512 MiB in fp32; the others are recomputed
CHUNK = {"cpu": 2**24, "cuda": 2**27}  # logits of one chunk: each chunk reads the whole head again
CACHE = 2**18  # logits that stay in a CPU's cache through several element-wise operations
BREAK_EVEN = 150_000  # see is_faster
NAME = "sdpa_or_packed"
NO_MASK = (1, 1, 1, 1)  # shape of an attention mask that masks nothing, see no_mask
INPUTS = ("input_ids", "position_ids", "attention_mask", "packed", "labels", "predictors")
HALF = (torch.bfloat16, torch.float16)


# --- Attention ----------------------------------------------------------------------------------

class Segment(NamedTuple):
    """Queries that attend to all keys of their prefix and, causally, to themselves."""
    prefix_start: int
    prefix: int
    start: int
    count: int


class Layout(NamedTuple):
    """Where the queries and keys of every segment are. K counts the keys of all segments, where the
    tokens of a prompt count once for each segment that attends to them."""
    keys: torch.Tensor  # (K,) index in the row of each key
    own: torch.Tensor  # (T,) indices into K of the keys that are not a prefix's
    query_counts: list  # per segment
    key_counts: list
    query_ends: torch.Tensor  # (segments + 1,) int32, cumulative counts from 0
    key_ends: torch.Tensor


def segments(packed: tuple) -> list[Segment]:
    """((prompt, chosen, rejected), ...), numbers of tokens fed per pair -> the segments of the row.

    A prompt and its first answer are one segment. Every other answer is a segment of its own, with
    the prompt as its prefix.
    """
    row_segments, start = [], 0
    for prompt, first, *others in packed:
        row_segments.append(Segment(start, 0, start, prompt + first))
        place = start + prompt + first
        for count in others:
            if count:
                row_segments.append(Segment(start, prompt, place, count))
            place += count
        start = place
    return row_segments


@functools.lru_cache(maxsize=2)  # all layers of a micro-batch share one Layout
def layout_of(packed: tuple, device: torch.device) -> Layout:
    keys, own = [], []
    query_counts, key_counts = [], []
    offset = 0
    for prefix_start, prefix, start, count in segments(packed):
        keys += [np.arange(prefix_start, prefix_start + prefix), np.arange(start, start + count)]
        own.append(np.arange(offset + prefix, offset + prefix + count))
        query_counts.append(count)
        key_counts.append(prefix + count)
        offset += prefix + count

    def on_device(values, dtype=torch.int64):
        return to_device(torch.tensor(values, dtype=dtype), device)

    return Layout(
        keys=on_device(np.concatenate(keys)),
        own=on_device(np.concatenate(own)),
        query_counts=query_counts,
        key_counts=key_counts,
        query_ends=on_device([0, *itertools.accumulate(query_counts)], torch.int32),
        key_ends=on_device([0, *itertools.accumulate(key_counts)], torch.int32),
    )


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy without waiting for the GPU, which only works from pinned memory."""
    if tensor.is_cpu and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which a matrix product of this tensor is computed."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return tensor.dtype


def attention(module, query, key, value, attention_mask, packed=None, **options):
    """transformers' sdpa, causal under `no_mask`; or with `packed`, the attention of packed rows.

    query (1, heads, T, size), key and value (1, key heads, T, size) -> (1, T, heads, size), None
    """
    if packed is None:
        sdpa = AttentionInterface()["sdpa"]
        if attention_mask is not None and attention_mask.shape == NO_MASK:
            length, window = query.shape[2], options.get("sliding_window")
            attention_mask = visible(length, length, window, query.device)
        return sdpa(module, query, key, value, attention_mask, **options)
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise Unsupported(f"its attention has {name}")
    # Rotary embeddings leave query and key in fp32 under autocast, and value in bf16.
    dtype = autocast_dtype(query)
    query, key, value = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    # index_select, not key[keys]: the backward of key[keys] sorts the indices before it adds rows.
    layout = layout_of(packed, query.device)
    key = key.index_select(0, layout.keys)  # (K, key heads, size)
    value = value.index_select(0, layout.keys)
    attend = in_one_call if kernel_takes(query) else one_by_one
    out = attend(query, key, value, layout, options.get("scaling"), options.get("sliding_window"))
    return out[None], None


def kernel_takes(query: torch.Tensor) -> bool:
    """Whether torch's FlashAttention takes this dtype and head size. On a GPU that FlashAttention
    does not support, the call raises an error, which `can_pack` reports."""
    size = query.shape[-1]
    return query.is_cuda and query.dtype in HALF and size % 8 == 0 and size <= 256


def in_one_call(query, key, value, layout, scale, window):
    """All segments in one call of FlashAttention: query (T, heads, size), key and value
    (K, key heads, size) -> (T, heads, size).

    `torch.nn.attention.varlen.varlen_attn` makes this call too, but takes grouped query heads and
    windows only from torch 2.12. The operator has had both, and a backward, since before 2.9. The
    causal diagonal ends at the last query and the last key of each segment. The kernel runs on a
    GPU only: `can_pack` compares it with padded rows there, under the run's own autocast.
    """
    window_size_left = -1 if window is None else window - 1  # -1: no limit
    out, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, layout.query_ends, layout.key_ends,
        max(layout.query_counts), max(layout.key_counts),
        dropout_p=0.0, is_causal=window is None, return_debug_mask=False, scale=scale,
        window_size_left=window_size_left, window_size_right=0,
    )
    return out


def one_by_one(query, key, value, layout, scale, window, masked=None):
    """One call of SDPA per segment: for CPUs, fp32, and head sizes that FlashAttention lacks.

    masked      True, the default on a CPU: each segment gets a mask over its keys, which is fast
                there. On a GPU every layer would keep this mask for backward, and the fast kernels
                take no mask. So False: the prefix's tokens are queries too, which makes the segment
                plain causal attention (`is_causal`), and their outputs are dropped.
    """
    masked = query.device.type != "cuda" if masked is None else masked
    query_counts = layout.query_counts
    if not masked:
        query, query_counts = query.index_select(0, layout.keys), layout.key_counts
    # GQA by repeated key heads: `enable_gqa` falls to a slow kernel on some devices.
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))  # (K, heads, size)
    # `split` and `cat`, because the backward of each slice would fill a gradient of the whole row.
    queries = query.split(query_counts)
    keys = key.split(layout.key_counts)
    values = value.split(layout.key_counts)
    parts = []
    for q, k, v in zip(queries, keys, values):
        mask = visible(len(q), len(k), window, q.device)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, tokens, size)
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
        parts.append(out[0].transpose(0, 1))
    out = torch.cat(parts)  # (T, heads, size), or (K, heads, size) if not masked
    return out if masked else out.index_select(0, layout.own)


def visible(queries: int, keys: int, window: int | None, device) -> torch.Tensor | None:
    """(queries, keys) bool mask, or None if `is_causal` means the same.

    The last query has the position of the last key. Each query sees its own position and the ones
    before it, at most `window` positions in all.
    """
    window = keys if window is None else window
    if queries == keys and window >= keys:
        return None
    places = torch.arange(keys, device=device)  # (keys,)
    own = places[keys - queries:, None]  # (queries, 1)
    return (places <= own) & (places > own - window)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])  # for padded rows


def enable(model):
    """Set the model's attention function to `attention`, which reads `packed`.

    The setting stays after the forward, because gradient checkpointing runs attention again in
    backward. It is not saved with the model.
    """
    model.config._attn_implementation = NAME


def no_mask(model) -> torch.Tensor:
    """An attention mask that makes rows causal, with the windows of each layer.

    transformers passes a 4-D mask on unchanged. Without a mask, transformers would search the
    position ids for packed rows, which makes the CPU wait for the GPU.
    """
    enable(model)
    return torch.ones(NO_MASK, dtype=torch.bool, device=model.device)


# --- Batches ------------------------------------------------------------------------------------

def collate(rows: dict) -> dict:
    """{column: list of lists} -> the arguments of dpo.SequenceLogps.

    input_ids, position_ids   (1, T)
    packed                    see `segments`
    attention_mask            of a shape that transformers passes on instead of making a (T, T) mask
    labels                    (S B, L), one answer per row, chosen answers first, padded with IGNORE
    predictors                (S B, L), index of the fed token that predicts each label
    """
    sides = [f"{side}_ids" for side in ("chosen", "rejected") if f"{side}_ids" in rows]
    ids, positions, packed, start = [], [], [], 0
    labels, predictors = [[] for _ in sides], [[] for _ in sides]
    for i, prompt in enumerate(rows["prompt_ids"]):
        ids += prompt
        positions += range(len(prompt))
        end = start + len(prompt)  # where the next answer begins
        counts = [len(prompt)]
        for side, name in enumerate(sides):
            answer = rows[name][i]
            fed = len(answer) - 1
            ids += answer[:-1]
            positions += range(len(prompt), len(prompt) + fed)
            labels[side].append(answer)
            predictors[side].append([start + len(prompt) - 1, *range(end, end + fed)])
            counts.append(fed)
            end += fed
        packed.append(tuple(counts))
        start = end
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": torch.ones(NO_MASK, dtype=torch.bool),
        "packed": tuple(packed),
        "labels": padded(sum(labels, []), IGNORE),
        "predictors": padded(sum(predictors, []), 0),
    }


def padded(lists: list, value: int) -> torch.Tensor:
    """Lists of different lengths -> (len(lists), longest), padded on the right with `value`."""
    longest = max(map(len, lists))
    table = torch.full((len(lists), longest), value)
    for row, numbers in zip(table, lists):
        row[:len(numbers)] = torch.tensor(numbers)
    return table


def is_faster(prompt, chosen, tokens, size, hidden) -> bool:
    """Whether packed rows are faster than padded ones in batches of `size` rows.

    prompt, chosen, tokens (rows,): numbers of tokens of each prompt, chosen answer and whole row.

    Packing saves about hidden² operations for each token and layer, and costs one SDPA call for
    each answer and layer. Measured on one CPU core, both are equally fast when the tokens saved per
    row, times hidden², are 90,000 (hidden 64) or 180,000 (hidden 128).
    """
    prompt, chosen, tokens = (x[:10_000] for x in (prompt, chosen, tokens))
    rejected = tokens - prompt - chosen
    longest = prompt + np.maximum(chosen, rejected)
    widths = np.maximum.reduceat(longest, range(0, len(longest), size))  # of batches
    widths = np.repeat(widths, size)[:len(longest)]  # of rows
    sides = 1 + rejected.any()
    saved = sides * widths.mean() - tokens.mean() + sides
    return bool(saved * hidden**2 > BREAK_EVEN)


# --- Does the model support packed rows? --------------------------------------------------------

# Two trial pairs, in numbers of tokens.
PROMPTS = (9, 5)
ANSWERS = ((7, 4), (1, 8))  # of the chosen answers, of the rejected answers
WIDTH = 20  # of an unpacked trial row with filler tokens at its end
WINDOW = 6  # of every sliding window during the trial
MARGIN = 8  # a difference up to MARGIN times the measured rounding counts as rounding


class Unsupported(ValueError):
    """Attention needs something that packed rows cannot have."""


def can_pack(module) -> str | None:
    """None if the model of a dpo.SequenceLogps gives packed rows the log-probs of single rows, else
    the reason.

    Two short pairs are tried, with every sliding window shrunk below their length. Each answer's
    log-prob, and the gradient of this log-prob with respect to the token embeddings, must equal
    those of an unpacked row up to rounding. `unpacked_trials` measures the model's rounding. At all
    tokens that an answer must not see, the gradient must be exactly zero. (Comparing values alone
    would miss a leak below rounding. Comparing bits would refuse mixtures of experts, where the
    rounding of a token depends on the other tokens of its expert.) The model, which may be sharded,
    is left unchanged.
    """
    return verify(module, compare_packed)


def can_drop_mask(module) -> str | None:
    """None if right-padded rows have the same log-probs under `no_mask`, else the reason.

    This holds for causal models, because padding comes after every scored token. Attention then
    needs no (2B, 1, T, T) mask and no synchronization with the GPU to inspect the mask.
    """
    return verify(module, compare_unmasked)


def verify(module, compare: Callable) -> str | None:
    """Run a comparison without autocast and, if the run uses autocast, with it -> the first
    difference, or None.

    A comparison continues after a difference, because with sharded weights every rank must run the
    same forwards.
    """
    model = module.model
    before, device = model.config._attn_implementation, model.device.type
    if before not in ("sdpa", NAME):
        return f"its attention is {before} and not sdpa"
    autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    reasons = []
    try:
        with narrow_windows(model, WINDOW), torch.enable_grad():
            for enabled in {False, autocast}:
                with torch.autocast(device, dtype, enabled=enabled):
                    reasons += compare(module)
    except Exception as error:
        # Kernels and models raise errors of many types. An error raised by this project is a bug.
        refused = isinstance(error, (RuntimeError, Unsupported))
        if not refused and raised_here(error):
            raise
        first_line = next(iter(str(error).splitlines()), "")
        return f"it fails on packed rows ({type(error).__name__}: {first_line})"
    finally:
        model.config._attn_implementation = before
    return reasons[0] if reasons else None


def raised_here(error: Exception) -> bool:
    """Whether the innermost frame of the traceback is in a file of this project."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    folder = pathlib.Path(__file__).parent
    return pathlib.Path(innermost.filename).parent == folder


class Trial(NamedTuple):
    """An answer's log-prob, and its gradient with respect to the embeddings of the row's tokens."""
    logp: torch.Tensor  # ()
    gradient: torch.Tensor  # (tokens, H)


class Rounding(NamedTuple):
    """Relative differences of log-prob and gradient that count as rounding."""
    logp: float
    gradient: float


def compare_packed(module) -> list[str]:
    """Compare packed rows with unpacked rows -> the differences beyond rounding."""
    expected, rounding, reasons = unpacked_trials(module)
    prompts, answers, _ = trial_rows(module.model)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    batch = collate(dict(zip(names, (prompts, *answers))))
    logps, embedded = logps_and_embeddings(module, **batch)  # (S B,), (1, T, H)
    ends = np.cumsum(batch["packed"]).reshape(len(prompts), -1)  # of prompt, chosen, rejected
    for i, (side, pair) in enumerate(itertools.product((0, 1), range(len(prompts)))):
        # Indices of the answer and its prompt in the packed row.
        prompt_end = ends[pair, 0]
        answer_end = ends[pair, 1 + side]
        fed = len(answers[side][pair]) - 1
        prompt_start = prompt_end - len(prompts[pair])
        places = np.r_[prompt_start:prompt_end, answer_end - fed:answer_end]
        wanted = torch.zeros_like(embedded[0])
        wanted[places] = expected[i].gradient[:len(places)]
        gradient, = torch.autograd.grad(logps[i], embedded, retain_graph=True)
        found = Trial(logps[i].detach(), gradient[0])
        wanted = Trial(expected[i].logp, wanted)
        reasons += difference(found, wanted, rounding, "in a row of its own")
    return reasons


def compare_unmasked(module) -> list[str]:
    """Compare padded rows without a mask with single rows -> the differences beyond rounding."""
    _, _, reasons = unpacked_trials(module)
    return reasons


def unpacked_trials(module):
    """-> a Trial of each answer, chosen ones first; the model's Rounding; differences beyond it.

    All rows are one batch without a mask. Filler tokens on the right make them WIDTH tokens long; a
    causal model does not see these. The first and the last row are then computed again alone,
    without filler. Their differences show whether the batch is correct, and how much this model
    rounds. A fixed tolerance does not work: one that is strict enough for 2 layers is below the
    rounding of 30 layers.
    """
    prompts, answers, filler = trial_rows(module.model)
    rows = []
    for side in answers:
        rows.extend(zip(prompts, side))  # (prompt, answer), the chosen ones first
    ids = [(prompt + answer[:-1] + filler)[:WIDTH] for prompt, answer in rows]
    predictors = []
    for i, (prompt, answer) in enumerate(rows):
        first = WIDTH * i + len(prompt) - 1
        predictors.append(list(range(first, first + len(answer))))
    labels = padded([answer for _, answer in rows], IGNORE)
    logps, embedded = logps_and_embeddings(
        module, labels, padded(predictors, 0),
        input_ids=torch.tensor(ids), attention_mask=no_mask(module.model),
    )
    gradients, = torch.autograd.grad(logps.sum(), embedded)  # (rows, WIDTH, H)
    trials = [Trial(*each) for each in zip(logps.detach(), gradients)]

    rounding, reasons = least_rounding(embedded), []
    half = autocast_dtype(embedded) in HALF
    most = Rounding(0.1, 0.5) if half else Rounding(0.01, 0.1)  # a larger one is an error
    for i in (0, len(rows) - 1):
        alone = single_trial(module, *rows[i])
        where = "with no other token after the row"
        reasons += difference(trials[i], alone, most, where)
        measured = distances(trials[i], alone)
        rounding = Rounding(*(max(old, MARGIN * new) for old, new in zip(rounding, measured)))
    return trials, rounding, reasons


def single_trial(module, prompt: list, answer: list) -> Trial:
    """The Trial of a row computed alone, its gradient padded with zeros to WIDTH tokens."""
    ids = prompt + answer[:-1]
    predictors = torch.arange(len(prompt) - 1, len(ids))[None]
    logps, embedded = logps_and_embeddings(
        module, torch.tensor([answer]), predictors, input_ids=torch.tensor([ids])
    )
    gradient, = torch.autograd.grad(logps.sum(), embedded)
    return Trial(logps[0].detach(), F.pad(gradient[0], (0, 0, 0, WIDTH - len(ids))))


def trial_rows(model):
    """-> prompts, answers of both sides, and WIDTH filler tokens, all of random ids."""
    random = np.random.default_rng(0)
    vocabulary = model.get_input_embeddings().num_embeddings

    def draw(counts):
        return [random.integers(vocabulary, size=count).tolist() for count in counts]

    return draw(PROMPTS), [draw(counts) for counts in ANSWERS], draw([WIDTH])[0]


def least_rounding(embedded: torch.Tensor) -> Rounding:
    """The lower bound of Rounding: only two rows are measured, which may round little by chance."""
    dtype = autocast_dtype(embedded)
    eps = torch.finfo(dtype).eps
    if embedded.is_cuda and dtype == torch.float32:
        eps = 2**-10  # TF32
    least = max(1e-4, 16 * eps)
    return Rounding(least, least)


def distances(found: Trial, expected: Trial) -> Rounding:
    """Relative distances of log-prob and gradient."""
    logp = (found.logp - expected.logp).abs()
    gradient = (found.gradient - expected.gradient).norm()
    return Rounding(
        logp=(logp / expected.logp.abs()).item(),
        gradient=(gradient / expected.gradient.norm()).item(),
    )


def difference(found: Trial, expected: Trial, rounding: Rounding, where: str) -> list[str]:
    """[] if both are equal up to rounding, and their gradients zero at the same tokens."""
    if not torch.equal(found.gradient.any(-1), expected.gradient.any(-1)):
        return ["an answer's log-prob depends on other tokens than its own"]
    logp, gradient = distances(found, expected)
    if logp <= rounding.logp and gradient <= rounding.gradient:
        return []
    explained = f"{rounding.logp:.1e} and {rounding.gradient:.1e}"
    return [f"an answer's log-prob is not what it is {where}: it differs by {logp:.1e} and its "
            f"gradient by {gradient:.1e}, where rounding explains {explained}"]


def logps_and_embeddings(module, labels, predictors, **inputs):
    """-> (rows,) log-probs in fp32 or better, and the embeddings of the fed tokens, with respect to
    which the log-probs can be differentiated. labels and predictors (rows, L) as in `collate`."""
    model, embedded = module.model, []

    def replace(embedding, args, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    def on_device(value):
        return value.to(model.device) if torch.is_tensor(value) else value

    hook = model.get_input_embeddings().register_forward_hook(replace)
    try:
        logits = module(**{name: on_device(value) for name, value in inputs.items()})
    finally:
        hook.remove()
    labels, predictors = on_device(labels), on_device(predictors)
    logits = logits.flatten(0, 1)[predictors]  # (rows, L, V)
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    token_logps = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (token_logps * (labels != IGNORE)).sum(-1), embedded[0]


@contextlib.contextmanager
def narrow_windows(model, width: int):
    """Inside, no attention window is wider than `width`: in the config, from which transformers
    makes masks, and in the layers."""
    names = ("sliding_window", "attention_chunk_size")
    changed = []
    try:
        for owner in (model.config.get_text_config(), *model.modules()):
            for name in names:
                value = vars(owner).get(name)
                if isinstance(value, int) and value > width:
                    changed.append((owner, name, value))
                    setattr(owner, name, width)
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)


# --- Log-probs without full logits --------------------------------------------------------------

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
        of_hidden, of_weight, of_bias = torch.empty_like(hidden), None, None
        if ctx.needs_input_grad[1]:
            of_weight = torch.zeros_like(weight, dtype=normalizer.dtype)
        if bias is not None and ctx.needs_input_grad[2]:
            of_bias = torch.zeros_like(bias, dtype=normalizer.dtype)
        buffer = None
        for rows in chunks(hidden, len(weight)):
            if ctx.kept:  # empty in a second backward, which recomputes all logits
                delta = ctx.kept.pop(0)
            else:
                delta = buffer = logits_of(inputs[rows], weight_, bias_, buffer)
            # In place: (onehot(target) − π) times the gradient of the log-prob.
            for part, places in cached_parts(delta, rows):
                factor = gradient[places, None]
                pi = (part - normalizer[places, None]).exp_()
                part.copy_(pi.mul_(-factor).scatter_add_(1, targets[places, None], factor))
            delta = delta.to(ctx.dtype)
            of_hidden[rows] = delta @ weight_
            if of_bias is not None:
                of_bias += delta.sum(0, dtype=of_bias.dtype)
            if of_weight is not None:
                add_product(of_weight, delta.T, inputs[rows])
        of_weight, = cast(weight.dtype, of_weight)
        of_bias, = cast(weight.dtype, of_bias)
        return of_hidden, of_weight, of_bias, None, None, None


def log_sum_of_squares(logits):
    """(n, V) -> log Σ_v π(v)², (n,): Σ is the expected probability of a token sampled from π."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (2 * logits).logsumexp(-1) - 2 * logits.logsumexp(-1)


def cast(dtype, *tensors):
    return [None if x is None else x.to(dtype) for x in tensors]


def chunks(hidden, vocabulary: int) -> list[slice]:
    """Slices of positions with at most CHUNK logits each, as equal as they can be, the last the
    smallest."""
    count = len(hidden)
    most = CHUNK["cpu"] if hidden.is_cpu else CHUNK["cuda"]
    pieces = max(1, math.ceil(count * vocabulary / most))
    size = math.ceil(count / pieces)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def cached_parts(logits, rows: slice):
    """-> pairs of (some rows of these logits, their positions).

    On a CPU a part is small enough to stay in the cache through several element-wise operations,
    which halves their time. On a GPU all rows are one part.
    """
    size = len(logits)
    if logits.is_cpu:
        size = max(1, CACHE // logits.shape[1])
    for start in range(rows.start, rows.stop, size):
        places = slice(start, min(start + size, rows.stop))
        yield logits[start - rows.start:places.stop - rows.start], places


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
