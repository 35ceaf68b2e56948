"""Rows -> this rank's micro-batches on its device -> the log-probs of every pair.

Training, evaluation and the cache of the reference share these parts:

    split_step      divides the pairs of one step among ranks and micro-batches: [Piece]
    collate         makes a batch of rows, padded or packed, on the device
    load_batches    collates many lists of rows, one batch ahead of the GPU
    pair_logps      computes the log-probs of one batch, with the options of the `Task`
    of_all_pairs    gathers a value of every pair on every rank

For example, 8 pairs on 2 ranks with --micro_batch_size 2: rank 0 gets the pieces of pairs 0-1 and
2-3, rank 1 those of pairs 4-5 and 6-7.
"""
import collections
import concurrent.futures
import contextlib
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset

import data
import packing
from dpo import preference_logps
from parallel import Ranks, gather, shard, sum_over_ranks

# --- Rows to micro-batches ------------------------------------------------------------------------

class Piece(NamedTuple):
    """A micro-batch of this rank, as a slice of the pairs of an optimizer step."""
    pairs: slice
    weight: float  # 1; or 0 for a filler pair, so that all ranks run as many forwards


def split_step(args: Namespace, count: int, tokens: np.ndarray, ranks: Ranks,
        size: int | None = None) -> list[Piece]:
    """This rank's micro-batches of the `count` pairs of a step -> [Piece].

    tokens      (count,) numbers of tokens, read with --tokens_per_micro_batch
    size        pairs per micro-batch, in place of --micro_batch_size

    A Piece is a slice, because slicing a tensor on a GPU copies nothing. Indices from the CPU would
    need a copy for which the CPU waits.
    """
    size, by_tokens = size or args.micro_batch_size, None
    if not size:
        size, by_tokens = args.tokens_per_micro_batch, tokens
    pieces = data.micro_batches(np.arange(count), size, ranks.rank, ranks.size, by_tokens)
    return [Piece(slice(places[0], places[-1] + 1), weight) for places, weight in pieces]


def collate_on_cpu(rows, tokenizer, packed):
    """{column: list} -> a batch of dpo.py."""
    if packed:
        return data.ids_and_scores(rows) | packing.collate(rows)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id  # masked either way
    return data.collate(rows, pad)


def batch_to_device(batch, device):
    """Copy a batch to the device without waiting for the GPU. Labels and predictors stay on the
    CPU, where dpo.find_targets reads them."""
    moved = {}
    for name, value in batch.items():
        stays = not torch.is_tensor(value) or name.endswith(("labels", "predictors"))
        moved[name] = value if stays else packing.to_device(value, device)
    return moved


def collate(rows: dict, tokenizer: Any, device: torch.device, packed: bool = False) -> dict:
    return batch_to_device(collate_on_cpu(rows, tokenizer, packed), device)


def one_ahead(jobs: Iterable, make: Callable, threaded: bool) -> Iterator:
    """make(job) for each job, in order. With `threaded`, a thread makes the next result while the
    caller uses the current one.

    An exception in the thread is raised here, with its traceback. The thread ends with the
    generator: close it (contextlib.closing) where it may not be read to its end.
    """
    if not threaded:
        yield from map(make, jobs)
        return
    with concurrent.futures.ThreadPoolExecutor(1, "rows") as pool:
        waiting = collections.deque()
        for job in jobs:
            waiting.append(pool.submit(make, job))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def load_batches(rows: Dataset, index_lists: Iterable, tokenizer: Any, packed: bool,
                 device: torch.device) -> Iterator[dict]:
    """The batch of each list of row indices, in order.

    For a GPU a thread reads, collates and pins the next batch during the current computation. On a
    CPU the thread would share the cores with the computation, so there is no thread.
    """
    on_gpu = device.type == "cuda"

    def make(indices):
        batch = collate_on_cpu(rows[indices], tokenizer, packed)
        if on_gpu:
            for name, value in batch.items():
                batch[name] = value.pin_memory() if torch.is_tensor(value) else value
        return batch

    with contextlib.closing(one_ahead(index_lists, make, threaded=on_gpu)) as batches:
        for batch in batches:
            yield batch_to_device(batch, device)


# --- Micro-batches to log-probs -------------------------------------------------------------------

class Task(NamedTuple):
    """The loss and its options: the same in training, evaluation and the step-0 check."""
    loss: Callable
    hyper: dict
    options: dict  # of dpo.preference_logps: reference_free, wpo, ld_alpha
    divergence: dict  # f-DPO: f_divergence, f_alpha
    dtype: str
    device: torch.device
    packed: bool = False

    @property
    def compares_pairs(self):
        """Whether the loss needs all pairs of a step at once."""
        return "batch" in self.loss.tags


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def pair_logps(task: Task, policy: torch.nn.Module, reference: Callable | None, batch: dict,
               **more: Any) -> dict[str, torch.Tensor]:
    """dpo.preference_logps with the options of the task -> {name: (B,)}."""
    options = task.options | more
    with autocast(task.dtype, task.device):
        return preference_logps(policy, reference, batch, task.loss, **options)


@torch.no_grad()
def of_all_pairs(compute: Callable, batches: Iterable[dict], pieces: Iterable[Piece], count: int,
                 ranks: Ranks) -> dict[str, torch.Tensor]:
    """Run compute(batch) -> {name: (B,)} on every piece -> {name: (count,)} in fp64, on every rank.

    The ranks share the work. Each contributes zeros for the pairs that it does not own, so that
    one all-reduce gathers the values exactly.
    """
    tables = {}
    for (places, weight), batch in zip(pieces, batches):
        for name, values in compute(batch).items():
            if name not in tables:
                tables[name] = torch.zeros(count, dtype=torch.float64, device=values.device)
            tables[name][places] += weight * values.double()
    sums = sum_over_ranks(torch.stack(list(tables.values())), ranks)
    return dict(zip(tables, sums))


def stop_if_not_finite(number: int, values: dict, seen: list, ranks: Ranks | None = None,
                       policy: torch.nn.Module | None = None):
    """Raise if the loss or the gradient is not finite, and name the rows or weights that cause it.

    The next update would spread the NaN or inf to every weight.
    """
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        return
    rows, ids, spoiled = [], [], []
    for batch_ids, metrics in seen:
        ids += batch_ids
        for i, row in enumerate(batch_ids):
            if not all(value[i].isfinite() for value in metrics.values()):
                numbers = ", ".join(f"{name} {value[i]:.6g}" for name, value in metrics.items())
                rows.append(f"{row}: {numbers}")
    for name, parameter in policy.named_parameters() if policy else ():
        if parameter.grad is not None and not shard(parameter.grad).isfinite().all():
            spoiled.append(name)
    if ranks:
        rows, spoiled, ids = (sum(gather(found, ranks), []) for found in (rows, spoiled, ids))
    where = "\n".join(rows[:8])
    if not rows:
        where = (f"every pair's loss is finite, so it is the backward pass that overflows, in "
                 f"{', '.join(spoiled[:4])} and {max(0, len(spoiled) - 4)} more, on the rows "
                 f"{'; '.join(ids[:8])}; try a lower --lr")
    raise FloatingPointError(f"step {number}: the loss is {values['loss']}, the gradient norm "
                             f"{values['grad_norm']}; nothing of this step was saved\n{where}")
