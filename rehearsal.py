"""--dry_run: what a run would be, and how long it would take.

    python train.py --dry_run --model org/base --dataset pairs.jsonl --output_dir runs/dpo

train.py reads the rows, loads the models and makes all checks as for a run, and then this file
times forward and backward of two steps, without an update, and of an evaluation of some rows. The
first step is slower, because kernels are chosen and memory is allocated there, so the second one
counts. Time is in proportion to tokens:

    time of a run = time of the timed step / its tokens x mean tokens of a row x rows of all steps

Nothing is written into --output_dir. Token ids stay in the cache of `datasets`, as after a run.
"""
import math
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

import data
from checkpoint import count_checkpoints, readable
from log import memory_parts
from losses import kind_of
from optimizers import MOMENTS
from parallel import Ranks

EVALUATED = 64  # rows of each evaluation set that are timed


class NoUpdate:
    """Stands for the optimizer and for the schedule: frees the gradients, and updates nothing."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def step(self) -> None:
        pass

    def zero_grad(self, set_to_none: bool) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None

    def get_last_lr(self) -> list[float]:
        return [0.0]


class Measured(NamedTuple):
    """Times in seconds, and memory in bytes."""
    steps: list[float]  # of the first steps
    tokens: list[int]  # of these steps
    evaluation: float  # estimated, of one evaluation of all held-out rows
    peak: int  # of the memory of a GPU, during these steps; 0 on a CPU


def time_steps(train_steps: Callable, evaluate_some: Callable, held_out: dict,
               ranks: Ranks) -> Measured:
    """Time the first steps and an evaluation.

    train_steps()           yields the tokens of each step, when the step has ended
    evaluate_some(rows)     evaluates {split: rows}
    """
    on_gpu = ranks.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(ranks.device)
    seconds, tokens = [], []
    start = time.perf_counter()
    for count in train_steps():
        end = time.perf_counter()
        seconds.append(end - start)
        tokens.append(count)
        start = time.perf_counter()
    peak = torch.cuda.max_memory_allocated(ranks.device) if on_gpu else 0

    some, all_tokens, some_tokens = {}, 0, 0
    for split, rows in held_out.items():
        if len(rows):
            some[split] = rows.select(range(min(EVALUATED, len(rows))))
            all_tokens += int(data.column(rows, "tokens").sum())
            some_tokens += int(data.column(some[split], "tokens").sum())
    if not some:
        return Measured(seconds, tokens, 0.0, peak)
    start = time.perf_counter()
    evaluate_some(some)
    elapsed = time.perf_counter() - start
    return Measured(seconds, tokens, elapsed * all_tokens / some_tokens, peak)


def count_evaluations(every: int, steps: int) -> int:
    """Return how many evaluations a run has: every `every` steps, and after the last one."""
    return math.ceil(steps / every) if every else 1


def describe_plan(args: Namespace, run: Any, warmup: int, measured: Measured) -> list[str]:
    """Format rows, steps, tokens and time of a run."""
    rows, steps, batch = len(run.rows), run.steps, min(args.batch_size, len(run.rows))
    units = {"pairs": "pairs", "labels": "answers", "lists": "lists"}[kind_of(run.task.loss)]
    held_out = []
    for split, part in run.held_out.items():
        name = split.partition("/")[2]
        held_out.append(f"{len(part)} held out{f' as {name}' if name else ''}")
    each_epoch = math.ceil(rows / args.batch_size)
    mean, longest = float(run.tokens.mean()), int(run.tokens.max())
    pace = measured.steps[-1] / measured.tokens[-1]  # seconds per token
    training = pace * mean * batch * steps
    evaluations = count_evaluations(args.eval_every, steps)
    timed = ", ".join(f"{seconds:.3g} s" for seconds in measured.steps)
    lines = [
        f"rows         {rows} to train on, {', '.join(held_out)}",
        f"steps        {steps} of {args.batch_size} {units}; epochs: {steps / each_epoch:.3g}, of "
        f"{each_epoch} steps; warm-up: {warmup} steps",
        f"tokens       {mean * batch:,.0f} in a step on average; the longest row has {longest:,}",
        f"first steps  {timed}, forward and backward without an update; {1 / pace:,.0f} tokens/s",
        f"time         {duration(training)} for {steps} steps",
    ]
    total = training
    if measured.evaluation:
        lines[-1] += (f", {duration(measured.evaluation)} for an evaluation; evaluations: "
                      f"{evaluations}")
        total += measured.evaluation * evaluations
    lines[-1] += f"; about {duration(total)} together, without checkpoints"
    if args.early_stop:
        lines[-1] += f", or less by --early_stop {args.early_stop}"
    return lines


def describe_size(args: Namespace, run: Any, checkpoint: int, model: int,
                  measured: Measured) -> list[str]:
    """Format memory and disk of a run. `checkpoint` and `model` are their bytes on the disk."""
    parts = memory_parts(run.model, run.reference, MOMENTS[args.optimizer])
    text = f"memory       {readable(sum(parts.values()))} on each rank without activations"
    if measured.peak:
        peak = measured.peak + parts["optimizer"]
        text += (f"; {readable(measured.peak)} at most were in use on the GPU in these steps, and "
                 f"{readable(peak)} are with the optimizer's state")
    disk = f"disk         {readable(model)} for the model"
    # A new checkpoint is written before an old one is deleted.
    most = min(run.keep + 1, count_checkpoints(args, 0, run.steps))
    if most:
        disk += f", {readable(most * checkpoint)} for at most {most} checkpoints at a time"
    else:
        disk += f", {readable(checkpoint)} for a checkpoint if the run is interrupted"
    return [text, disk]


def duration(seconds: float) -> str:
    """Format a time: 0.25 s, 12 s, 3 min, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def report_plan(lines: Sequence[str]) -> None:
    """Print what a run would be."""
    print("a dry run: nothing was trained, and nothing written into --output_dir")
    for line in lines:
        print(f"  {line}")
