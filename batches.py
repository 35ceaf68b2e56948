"""Rows -> this rank's micro-batches on its device -> the log-probs of every answer.

Training, evaluation and the cache of the reference share these parts:

    split_step      divides the pairs of one step among ranks and micro-batches: [Piece]
    collate         makes a batch of rows, padded or packed, on the device
    load_batches    collates many lists of rows, one batch ahead of the GPU
    pair_logps      computes the log-probs of one batch, with the options of the `Task`
    logp_gradients  dL/dlogp of all pairs, for a loss that compares pairs
    of_all_pairs    gathers a value of every pair on every rank

A row is a pair here. All of it works the same for rows of other kinds: see answers.py. For example,
8 pairs on 2 ranks with --micro_batch_size 2: rank 0 gets the pieces of pairs 0-1 and
2-3, rank 1 those of pairs 4-5 and 6-7.
"""
import collections
import concurrent.futures
import contextlib
import functools
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

import data
import packing
import vision
from answers import answer_tensors, answers_loss
from dpo import concatenated_inputs, preference_logps, preference_loss
from encoder_decoder import collate_rows
from experts import RouterLoss
from losses import kind_of
from parallel import Ranks, gather, shard, sum_over_ranks
from variants import Variants, weighted_preference_loss, with_wpo

FULL_LOGITS = 2**24  # a padded batch up to this many logits, 64 MiB in fp32, computes all of them

# --- Rows to micro-batches ------------------------------------------------------------------------

class Piece(NamedTuple):
    """A micro-batch of this rank, as a slice of the pairs of an optimizer step."""
    pairs: slice
    weight: float  # 1; or 0 for a filler pair, so that all ranks run the same number of forwards


def split_step(args: Namespace, count: int, tokens: np.ndarray, ranks: Ranks,
               size: int | None = None) -> list[Piece]:
    """This rank's micro-batches of the `count` pairs of a step -> [Piece].

    tokens      (count,) numbers of tokens, read with --tokens_per_micro_batch
    size        pairs per micro-batch, in place of --micro_batch_size

    A Piece is a slice, because slicing a tensor on a GPU copies nothing. Indices from the CPU would
    need a copy for which the CPU waits.
    """
    size = size or args.micro_batch_size
    pairs = np.arange(count)
    if size:
        pieces = data.micro_batches(pairs, size, ranks.rank, ranks.size)
    else:
        most = args.tokens_per_micro_batch
        pieces = data.micro_batches(pairs, most, ranks.rank, ranks.size, tokens)
    return [Piece(slice(places[0], places[-1] + 1), weight) for places, weight in pieces]


class RowFormat(NamedTuple):
    """How the rows of a micro-batch are given to the model."""
    packed: bool = False  # all rows in one, see packing.py
    masked: bool = True  # padded rows with an attention mask, see verify.can_drop_mask
    weigh: Callable | None = None  # labels -> weights of the tokens, see variants.Variants
    full_logits: bool = True  # padded rows with few logits may have them computed in full
    most_answers: int = 0  # K, the same in all batches; 0: of the row that has most
    family: str = "decoder"  # of the model, see families.py
    processor: Any = None  # of the images of the rows, see vision.py


def collate_on_cpu(rows: dict, tokenizer: Any, row_format: RowFormat) -> dict:
    """{column: list} -> a batch of dpo.py, whose "inputs" are concatenated already.

    A padded batch with few logits gets labels, so that dpo.get_batch_logps computes its log-probs
    from full logits. Every other batch gets Targets: see logps.FastLogps.
    """
    batch = data.known_of_answers(rows, row_format.most_answers)
    if row_format.packed:
        return batch | {"inputs": packing.pack_rows(rows, row_format.weigh)}
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id  # not scored, and after all tokens that are
    predictors = None
    if row_format.family == "encoder_decoder":
        inputs = collate_rows(rows, tokenizer, pad)
        predictors = torch.arange(inputs["labels"].numel()).view_as(inputs["labels"])
    else:
        inputs = concatenated_inputs(data.pad_rows(rows, pad))
    if row_format.processor and "image_paths" in rows:
        vision.add_images(inputs, rows, row_format.processor, batch["places"])
    if not row_format.masked:
        inputs["attention_mask"] = packing.no_mask()
    logits = inputs["labels"].numel() * len(tokenizer)
    if row_format.weigh or not row_format.full_logits or logits > FULL_LOGITS:
        labels = inputs.pop("labels")
        weights = row_format.weigh(labels) if row_format.weigh else None
        inputs["targets"] = packing.find_targets(labels, predictors, weights)
    return batch | {"inputs": inputs}


def map_tensors(function: Callable, value: Any) -> Any:
    """The value with function(tensor) in place of each tensor in its dictionaries and Targets."""
    if torch.is_tensor(value):
        return function(value)
    if isinstance(value, dict):
        return {name: map_tensors(function, each) for name, each in value.items()}
    if isinstance(value, packing.Targets):
        return packing.Targets(*(map_tensors(function, each) for each in value))
    return value


def batch_to_device(batch: dict, device: torch.device) -> dict:
    """Copy a batch to the device without waiting for the GPU."""
    return map_tensors(lambda tensor: packing.to_device(tensor, device), batch)


def collate(rows: dict, tokenizer: Any, device: torch.device,
            row_format: RowFormat = RowFormat()) -> dict:
    return batch_to_device(collate_on_cpu(rows, tokenizer, row_format), device)


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


def load_batches(selections: Iterable, tokenizer: Any, row_format: RowFormat,
                 device: torch.device) -> Iterator[dict]:
    """The batch of each pair (rows, indices of some of them), in order.

    For a GPU a thread reads, collates and pins the next batch during the current computation. On a
    CPU the thread would share the cores with the computation, so there is no thread.
    """
    on_gpu = device.type == "cuda"

    def make(selection):
        rows, indices = selection
        batch = collate_on_cpu(rows[indices], tokenizer, row_format)
        return map_tensors(torch.Tensor.pin_memory, batch) if on_gpu else batch

    with contextlib.closing(one_ahead(selections, make, threaded=on_gpu)) as batches:
        for batch in batches:
            yield batch_to_device(batch, device)


# --- Micro-batches to log-probs -------------------------------------------------------------------

class Task(NamedTuple):
    """The loss and its options: the same in training, evaluation and the step-0 check."""
    loss: Callable
    hyper: dict
    options: dict  # of dpo.preference_logps
    preference_loss: Callable  # that of dpo.py or answers.py; with WPO, one that adds a metric
    score: Callable | None  # of preference_loss
    dtype: str
    autocast: dict  # arguments of torch.autocast
    device: torch.device
    row_format: RowFormat
    compares_pairs: bool  # the loss needs all pairs of a step at once
    passes: int  # forwards of a micro-batch: 2 where backward needs numbers of the whole step
    router_loss: RouterLoss | None = None  # of a mixture of experts


def make_task(loss: Callable, hyper: dict, variants: Variants, dtype: str, device: torch.device,
              packed: bool = False, masked: bool = True, most_answers: int = 0,
              family: str = "decoder", processor: Any = None) -> Task:
    """The Task of a loss with its variants. family, processor: see RowFormat."""
    options = {"reference_free": variants.reference_free}
    loss_and_metrics = preference_loss
    if kind_of(loss) != "pairs":
        options["name_tensors"] = answer_tensors
        loss_and_metrics = answers_loss
    if variants.wpo:
        clamp = variants.wpo_clamp
        loss = with_wpo(loss, clamp)
        loss_and_metrics = functools.partial(weighted_preference_loss, clamp=clamp)
        options["alignment"] = True
    # No full logits for WPO, which needs log Σ π² too, and none in bf16 on a GPU: there the head
    # rounds logits to bf16, and FastLogps computes them in fp32.
    rounded = dtype == "bfloat16" and device.type == "cuda"
    full_logits = not variants.wpo and not rounded
    row_format = RowFormat(packed, masked, variants.weigh, full_logits, most_answers, family,
                           processor)
    return Task(
        loss=loss,
        hyper=hyper,
        options=options,
        preference_loss=loss_and_metrics,
        score=variants.score,
        dtype=dtype,
        autocast=autocast_options(dtype, device),
        device=device,
        row_format=row_format,
        compares_pairs="batch" in loss.tags,
        passes=2 if "batch" in loss.tags else 1,
    )


def with_router_loss(task: Task, router_loss: RouterLoss) -> Task:
    """The task with a loss that balances experts. FastLogps records the routers, so it computes all
    log-probs, and the mask of padded rows says which tokens are real."""
    row_format = task.row_format._replace(masked=True, full_logits=False)
    return task._replace(router_loss=router_loss, passes=2, row_format=row_format)


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """The dtype of --dtype; "auto" is bfloat16 on a GPU and float32 elsewhere."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if device.type == "cuda" else "float32"


def autocast_options(dtype: str, device: torch.device) -> dict:
    enabled = dtype == "bfloat16"
    return {"device_type": device.type, "dtype": torch.bfloat16, "enabled": enabled}


def pair_logps(task: Task, policy: torch.nn.Module, reference: Callable | None, batch: dict,
               **more: Any) -> dict[str, torch.Tensor]:
    """dpo.preference_logps with the options of the task -> {name: (B,)}."""
    options = task.options | more
    with torch.autocast(**task.autocast):
        return preference_logps(policy, reference, batch, task.loss, **options)


def logp_gradients(task: Task, tensors: dict) -> tuple[dict, dict]:
    """dL/dlogp for a loss that compares pairs -> {policy_{side}_logps: (B,)}, {metric: (B,)}.

    L is the sum of the losses of all pairs, and `tensors` are those of all pairs. The loss needs
    all pairs at once, but only their log-probs. The sum of a micro-batch's log-probs, each times
    its dL/dlogp, has the gradient that this micro-batch adds to dL/dθ.
    """
    leaves = {}
    for name, value in tensors.items():
        if name.startswith("policy_"):
            leaves[name] = value.detach().requires_grad_()
    with torch.enable_grad():
        losses, metrics = task.preference_loss(
            tensors | leaves, task.loss, task.hyper, task.score)
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
    return dict(zip(leaves, gradients)), metrics


@torch.no_grad()
def of_all_pairs(compute: Callable, batches: Iterable[dict], pieces: Iterable[Piece], count: int,
                 ranks: Ranks) -> dict[str, torch.Tensor]:
    """Run compute(batch) -> {name: (B,) or (B, K)} on every piece -> {name: (count,) or (count, K)}
    in fp64, booleans as booleans, on every rank.

    The ranks share the work. Each contributes zeros for the pairs that it does not own, so that
    one all-reduce gathers the values exactly.
    """
    tables, booleans = {}, set()
    for (places, weight), batch in zip(pieces, batches):
        for name, values in compute(batch).items():
            if name not in tables:
                shape = (count, *values.shape[1:])
                tables[name] = torch.zeros(shape, dtype=torch.float64, device=values.device)
            if values.dtype == torch.bool:
                booleans.add(name)
            tables[name][places] += weight * values.double()
    sums = sum_over_ranks(torch.cat([table.flatten() for table in tables.values()]), ranks)
    parts = sums.split([table.numel() for table in tables.values()])
    for name, part in zip(list(tables), parts):
        tables[name] = part.view(tables[name].shape)
        if name in booleans:
            tables[name] = tables[name] > 0
    return tables


def raise_not_finite(number: int, values: dict, seen: list, ranks: Ranks | None = None,
                     policy: torch.nn.Module | None = None):
    """Raise because the loss or the gradient is not finite, and name the rows or weights that cause
    it. The next update would spread the NaN or inf to every weight."""
    rows, ids, weights = [], [], []
    for batch_ids, metrics in seen:
        ids += batch_ids
        for i, row in enumerate(batch_ids):
            if not all(value[i].isfinite() for value in metrics.values()):
                numbers = ", ".join(f"{name} {value[i]:.6g}" for name, value in metrics.items())
                rows.append(f"{row}: {numbers}")
    if policy is not None:
        for name, parameter in policy.named_parameters():
            if parameter.grad is not None and not shard(parameter.grad).isfinite().all():
                weights.append(name)
    if ranks:
        rows = sum(gather(rows, ranks), [])
        weights = sum(gather(weights, ranks), [])
        ids = sum(gather(ids, ranks), [])
    where = "\n".join(rows[:8])
    if not rows:
        where = (f"every pair's loss is finite, so it is the backward pass that overflows, in "
                 f"{', '.join(weights[:4])} and {max(0, len(weights) - 4)} more, on the rows "
                 f"{'; '.join(ids[:8])}; try a lower --lr")
    raise FloatingPointError(f"step {number}: the loss is {values['loss']}, the gradient norm "
                             f"{values['grad_norm']}; nothing of this step was saved\n{where}")
