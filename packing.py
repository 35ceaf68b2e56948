"""Packed rows: the rows of a micro-batch in one row, without padding, each prompt computed once.

    prompt a | chosen a | rejected a | prompt b | ...        one row for a micro-batch, (1, T)

A rejected answer's positions restart after its prompt, and it does not attend to the chosen answer.
A row may have any number of answers. The last token of an answer predicts nothing and is not fed.
The hidden state at the end of a prompt predicts the first token of all its answers, so it is used
several times. For prompt (5 6 7) with the answers (8 9 0) and (4 0):

    input_ids      5 6 7 8 9 4
    position_ids   0 1 2 3 4 3
    labels         8 9 0 / 4 0        predicted at indices  2 3 4 / 2 5

Models are not patched. They call the attention function registered here. Without the keyword
argument `packed`, this function calls transformers' own `sdpa`. `packed` is the layout of the row.
verify.py checks numerically that a model supports packed rows, and logps.py computes their
log-probs.

Letters: B rows, A answers in all (2B for pairs), T tokens fed, K keys, L tokens of the longest
answer, N scored tokens.
"""
import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

import data
from dpo import IGNORE

SHORT = 4096  # see is_faster
NAME = "sdpa_or_packed"
NO_MASK = (1, 1, 1, 1)  # shape of an attention mask that masks nothing, see no_mask
HALF = (torch.bfloat16, torch.float16)


# --- Attention ----------------------------------------------------------------------------------

class Unsupported(ValueError):
    """Attention needs something that packed rows cannot have."""


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
    """((prompt, answer, answer, ...), ...), numbers of tokens fed -> the segments of the row.

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


def no_mask() -> torch.Tensor:
    """An attention mask that makes rows causal, with the windows of each layer, in an `enable`d
    model.

    transformers passes a 4-D mask on unchanged. Without a mask, transformers would search the
    position ids for packed rows, which makes the CPU wait for the GPU.
    """
    return torch.ones(NO_MASK, dtype=torch.bool)


# --- Which tokens are scored --------------------------------------------------------------------

class Targets(NamedTuple):
    """The scored tokens of all rows, as indices.

    They are computed on the CPU and then copied to the device, so that the CPU never waits for the
    GPU to count scored tokens.
    """
    predictors: torch.Tensor  # (N,) positions, of all rows in sequence, that predict a scored token
    ids: torch.Tensor  # (N,) the scored tokens
    places: torch.Tensor  # (N,) index of each in the flattened (A, width) table
    lengths: torch.Tensor  # (A,)
    width: int  # columns of the table, which has one row per answer
    weights: torch.Tensor | None  # (N,) of the tokens, for LD-DPO

    def sum_rows(self, token_values):
        """(N,) -> (A,). Each row is summed on its own, so other rows cannot change its sum."""
        table = token_values.new_zeros(len(self.lengths) * self.width)
        return table.index_copy(0, self.places, token_values).view(-1, self.width).sum(-1)


def find_targets(labels: torch.Tensor, predictors: torch.Tensor | None = None,
                 token_weights: torch.Tensor | None = None) -> Targets:
    """labels (A, T), where each position predicts the next token; or labels (A, L) with their
    predictors (A, L). token_weights have the shape of labels."""
    if predictors is None:
        predictors = torch.arange(labels.numel(), device=labels.device).view(labels.shape)[:, :-1]
        labels = labels[:, 1:]
        token_weights = None if token_weights is None else token_weights[:, 1:]
    scored = labels != IGNORE  # (A, T-1) or (A, L)
    places = scored.flatten().nonzero()[:, 0]
    weights = None if token_weights is None else token_weights[scored]
    return Targets(predictors[scored], labels[scored], places, scored.sum(-1), scored.shape[1],
                   weights)


# --- Batches ------------------------------------------------------------------------------------

def pack_rows(rows: dict, weigh: Callable | None = None) -> dict:
    """{column: list of lists} -> the arguments of logps.FastLogps.

    input_ids, position_ids   (1, T)
    packed                    see `segments`
    attention_mask            of a shape that transformers passes on instead of making a (T, T) mask
    targets                   the scored tokens, in the order of dpo.concatenated_inputs: of the
                              first answers of all rows, then of the second answers, and so on

    weigh       labels (A, L) -> weights of the tokens, (A, L)
    """
    most = max(map(len, rows["answer_ids"]))
    ids, positions, packed, start = [], [], [], 0
    labels, predictors = [[] for _ in range(most)], [[] for _ in range(most)]
    for i, prompt in enumerate(rows["prompt_ids"]):
        ids += prompt
        positions += range(len(prompt))
        end = start + len(prompt)  # where the next answer begins
        counts = [len(prompt)]
        for k, answer in enumerate(rows["answer_ids"][i]):
            fed = len(answer) - 1
            ids += answer[:-1]
            positions += range(len(prompt), len(prompt) + fed)
            labels[k].append(data.labels_of_answer(rows, i, k))
            predictors[k].append([start + len(prompt) - 1, *range(end, end + fed)])
            counts.append(fed)
            end += fed
        packed.append(tuple(counts))
        start = end
    labels = padded(sum(labels, []), IGNORE)  # (A, L), one answer per row
    predictors = padded(sum(predictors, []), 0)  # (A, L), indices in the packed row
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": no_mask(),
        "packed": tuple(packed),
        "targets": find_targets(labels, predictors, weigh(labels) if weigh else None),
    }


def padded(lists: list, value: int) -> torch.Tensor:
    """Lists of different lengths -> (len(lists), longest), padded on the right with `value`."""
    longest = max(map(len, lists))
    table = torch.full((len(lists), longest), value)
    for row, numbers in zip(table, lists):
        row[:len(numbers)] = torch.tensor(numbers)
    return table


def is_faster(tokens: np.ndarray, hidden: int) -> bool:
    """Whether packed rows are faster than padded ones, by a rule of thumb.

    tokens (rows,) of the prompt and both answers; hidden size of the model. Packing saves tokens,
    which cost about hidden² operations each in every layer, and adds a call of attention for each
    answer. On one CPU core both took equally long at some 64 tokens per row (hidden 64), and at
    half as many with twice the hidden size.
    """
    return bool(tokens.mean() * hidden >= SHORT)
