"""Train a policy on preferences.

    python train.py                                   # the embedded world: CPU, no download
    python train.py --loss ipo --model ./sft-model --dataset pairs.jsonl --output_dir runs/ipo
    torchrun --nproc_per_node 8 train.py --loss sigmoid --model org/name --dataset org/pairs
    python train.py --output_dir runs/ipo --resume    # continue from the newest checkpoint

The same loop runs on one core and on many GPUs: `train_policy`, near the end of this file. One
optimizer step, from the micro-batches to the update, is `train_step`. The flags are in flags.py,
the micro-batches in batches.py, every kind of reference in reference.py, and the output of a run in
log.py.

In every file, bad input raises a UserError with one line for the user; `run` prints this line and
exits with status 2. `explain` lists the other errors that are no bugs, such as a full disk. Every
remaining exception is a bug and shows its traceback.
"""
from errors import UserError, arguments, is_out_of_memory, reading, report  # first, see errors.py
import contextlib
import functools
import json
import math
import os
import pathlib
import re
import signal
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch.distributed.fsdp import FSDPModule

import data
import packing
import world
from answers import group_means
from best import (
    BEST,
    Best,
    adopt_best,
    copy_best,
    judge,
    list_best,
    remove_best,
    restore_best,
    tagged_metrics,
)
from batches import (
    Piece,
    RowFormat,
    Task,
    autocast_options,
    collate,
    load_batches,
    logp_gradients,
    make_task,
    of_all_pairs,
    pair_logps,
    raise_not_finite,
    resolve_dtype,
    split_step,
    with_router_loss,
)
from card import document_run, has_card, reopen_run
from checkpoint import (
    FREE_ON_RESUME,
    LENGTH,
    METRICS_FILE,
    checkpoints,
    claim,
    delete_old_checkpoints,
    explained_write_errors,
    how_to_continue,
    gather_tensors,
    is_adapter,
    is_complete,
    is_longer,
    load_checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    plan_checkpoints,
    reason_against_new_run,
    save_checkpoint,
    saved_flags,
    tensor_bytes,
)
from dpo import preference_logps, train_sft
from encoder_decoder import logps_module
from experts import (
    Routing,
    RouterLoss,
    asked_coefficient,
    balance_loss,
    experts_per_token,
    find_no_router_loss,
)
from families import family_of
from files import (
    delete_if_abandoned,
    free_name,
    json_digest,
    missing_folders,
    write_text,
    written_aside,
)
from flags import parse_args, read_variants, split_model
from hub import push
from loading import check_vocabulary, load_adapter_tokenizer, load_processor, load_tokenizer
from log import Log, introduce, metric_lines
from logps import FastLogps
from lora import (
    LoraSettings,
    adapter_tensors,
    add_adapter,
    describe_base,
    load_adapter,
    lora_layers,
    save_adapter,
    target_modules,
    use_adapter,
)
from losses import kind_of, needs_kl, needs_of, start_state
from model import compile_blocks, save_model
from optimizers import MOMENTS, make_optimizer, make_schedule, start_moments
from parallel import (
    Ranks,
    barrier,
    broadcast,
    build_on_ranks,
    first_reason,
    init_distributed,
    leave_distributed,
    reset_shards,
    sum_over_ranks,
    sync_gradients,
    unwrap,
    whole,
    wrap,
)
from plots import CURVES_FILE
from reach import freeze, is_below, unreached_by_text
from reference import (
    cache_reference,
    check_positions,
    check_reference,
    check_start,
    fingerprint,
    load_reference,
    load_weights,
    mismatched_rows,
    move_reference,
    moving_tensors,
    settings_digest,
)
from rehearsal import (
    NoUpdate,
    describe_plan,
    describe_size,
    report_plan,
    time_steps,
)
from saved import MOVED_REFERENCE, find_saved, trained_state
from sources import evaluation_sets
from streams import output_is_closed, script_signals_and_streams
from verify import can_drop_mask, can_pack, find_fault

# torch.distributed.checkpoint warns when a single process saves.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


# --- The embedded world ---------------------------------------------------------------------------

def make_world(ranks: Ranks) -> pathlib.Path:
    """Return the folder of the embedded world. Rank 0 makes it if it does not exist."""
    if ranks.rank == 0:
        world.make(train_sft, ranks.device)
    barrier(ranks)
    return world.folder()


# --- Rows -----------------------------------------------------------------------------------------

def load_rows(args, loss, tokenizer, home, family, ranks, open_processor=None):
    """-> training rows, and held-out rows (maybe none) of each evaluation set, as token ids.

    Rank 0 tokenizes, then the others read its cache. open_processor: see `processor_opener`.
    """
    limits, shape, options = data.read_flags(args, family)
    shape = shape._replace(images=open_processor is not None)
    specs = name_sources(args, loss, home)
    if ranks.rank > 0:
        barrier(ranks)
    loaded = {}
    for split, spec in specs.items():
        loaded[split] = data.load_tokens(
            str(spec), tokenizer, needs_of(loss), limits, shape, args.strict, options,
            open_processor)
    if ranks.rank == 0:
        barrier(ranks)
    accounts = [account for _, account in loaded.values()]
    data.check_template(args, accounts)
    data.check_ignored(shape.ignored, accounts)
    for split, (part, _) in loaded.items():
        check_weights(args, loss, f"{flag_of(split)} {specs[split]}", part)
    held_out = {split: part for split, (part, _) in loaded.items()}
    if args.eval_only:  # there are no training rows
        if ranks.rank == 0:
            describe_splits(loaded)
        return next(iter(held_out.values())), held_out
    rows = held_out.pop("train")
    if not held_out:
        rows, held_out["eval"] = data.hold_out(rows, args.eval_share)
    if not len(rows):
        raise UserError(f"--eval_share {args.eval_share}: holds out all {len(held_out['eval'])} "
                        "rows, because they have so few prompts; lower it")
    if kind_of(loss) == "labels":
        data.check_labels(f"--dataset {specs['train']}, without the held-out rows", rows)
    if ranks.rank == 0:
        describe_splits(loaded)
        print(data.describe_statistics(data.statistics(rows, data.all_prompts(held_out))))
        image_id = open_processor().image_token_id if with_images(rows) else None
        print(data.show(rows, tokenizer, most=300, image_id=image_id))
    return rows, held_out


def with_images(*parts):
    """-> whether rows have images."""
    return any("image_paths" in rows.column_names for rows in parts)


def describe_splits(loaded):
    """Print which rows of {split: (rows, account)} are kept, and why others are not."""
    for split, (_, account) in loaded.items():
        name = split.partition("/")[2]
        print(f"{flag_of(split)} {name + ': ' if name else ''}{data.describe(account)}")


def name_sources(args, loss, home):
    """-> {split: rows as a flag names them}: "train", and each evaluation set that a flag or the
    world has."""
    sources = {"train": args.dataset}
    if args.dataset == "world":
        trained, held_out = world.row_files(kind_of(loss))
        sources = {"train": home / trained, "eval": home / held_out}
    if args.eval_dataset:
        sources.pop("eval", None)
        sources |= evaluation_sets(args.eval_dataset)
    if args.eval_only:
        del sources["train"]
    return sources


def flag_of(split):
    """-> the flag that the rows of a split come from."""
    return "--dataset" if split == "train" else "--eval_dataset"


def check_weights(args, loss, where, rows):
    """Raise if the rows have weights and the loss has no loss of a single row to multiply, or if
    all weights are 0."""
    if "weight" not in rows.column_names:
        return
    advice = "--ignore_columns weight trains without it"
    if "batch" in loss.tags:
        raise UserError(f"--loss {args.loss}: {where} has a column 'weight', and this loss "
                        "compares the pairs of a step with each other, so no pair has a weight; "
                        f"{advice}")
    if not data.column(rows, "weight").any():
        raise UserError(f"{where}: every row has the weight 0, so there is nothing to train on; "
                        f"{advice}")


# --- The models -----------------------------------------------------------------------------------

def load_policy(args, source, newest, dtype: str, device, unreached=None):
    """The policy: a model with all weights trained, or with an adapter on frozen weights.

    With --adapter, a second, frozen copy of the adapter is loaded as the reference where --ref asks
    for it. `newest` is the checkpoint to resume from, or None. `unreached` names the parts of the
    model that text does not reach, which are frozen; None: a short forward finds them. With
    --train_vision nothing is frozen.
    """
    adapted = args.adapter or args.lora_rank
    model = load_weights(args, source if adapted else newest or source, dtype, device)
    if unreached is None:
        unreached = []
        if device.type != "meta" and not args.train_vision:
            with torch.autocast(**autocast_options(dtype, device)):
                unreached = unreached_by_text(model)
    if adapted and (newest or args.adapter):
        load_adapter(model, newest or args.adapter)
    elif adapted:
        settings = LoraSettings(
            args.lora_rank, args.lora_alpha, args.lora_dropout, args.rslora, args.dora)
        targets = target_modules(model, args.lora_target)
        reached = [name for name in targets if not is_below(name, unreached)]
        if not reached:
            raise UserError(f"--lora_target {args.lora_target}: text does not reach these layers, "
                            f"which are in {', '.join(unreached)}; name others")
        add_adapter(model, "policy", reached, settings, args.seed)
    if args.adapter and args.ref in ("adapter", "cache") and not args.ref_model:
        load_adapter(model, args.adapter, "reference", trainable=False)
    freeze(model, unreached)
    if args.gradient_checkpointing:
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return logps_module(model)


def choose_attention(args, models, rows, dtype, ranks, processor=None):
    """Resolve --attention -> "packed" or "padded", whether padded rows need their mask, and a line
    that says which and why.

    Every rank tries the models on packed rows; if one fails on one rank, all ranks use padded rows.
    """
    line = "attention: padded rows"
    if args.attention != "padded":
        reason = "rows with images are not packed"
        if not processor:
            reason = reason_to_pad(args, models, rows, dtype, ranks)
        if reason is None:
            return "packed", True, "attention: packed rows"
        if args.attention == "packed":
            raise UserError(f"--attention packed: {reason}")
        line += f"; {reason}"
    if processor:  # some models compute the positions of images from the mask
        return "padded", True, line
    reasons = [try_rows(can_drop_mask, module, dtype, ranks) for module in models]
    masked = any(reasons)
    if not masked:
        for module in models:
            packing.enable(module.model)
    return "padded", masked, line


def reason_to_pad(args, models, rows, dtype, ranks):
    """None if rows can be packed and, with --attention auto, gain from it."""
    if models[0].is_encoder_decoder:
        return can_pack(models[0])
    tokens = data.column(rows, "tokens")
    hidden = models[0].model.get_input_embeddings().embedding_dim
    if args.attention == "auto" and not packing.is_faster(tokens, hidden):
        return "packed, rows as short as these would be slower"
    for module in models:
        reason = try_rows(can_pack, module, dtype, ranks)
        if reason is not None:
            return reason
    return None


def try_rows(verdict, module, dtype, ranks):
    """can_pack, can_drop_mask or find_fault on all ranks -> None, or the first rank's reason."""
    guard = contextlib.nullcontext()
    if isinstance(module, FSDPModule):
        guard = failing_together(module, ranks)
    # The adapter is off, because its dropout would add noise to the comparison.
    options = autocast_options(dtype, ranks.device)
    with torch.autocast(**options), use_adapter(module.model, None), guard:
        reason = verdict(module)
    # An exception may have left FSDP in the middle of a forward.
    reset_shards(module)
    return first_reason(reason, ranks)


@contextlib.contextmanager
def failing_together(module, ranks):
    """Inside, a forward that raises on one rank raises on all of them, at the end of the same part.

    FSDP gathers weights in every block. If one rank left its forward alone, the others would wait
    for it in the next gather until they time out. Each block is such a part, and each module
    outside the blocks.
    """
    def guarded(forward):
        def forward_on_all(*inputs, **options):
            reason = None
            try:
                output = forward(*inputs, **options)
            except Exception as error:  # of any kernel; raised again on every rank
                reason = f"{type(error).__name__} on rank {ranks.rank}: {error}"
            reason = first_reason(reason, ranks)
            if reason is not None:
                raise RuntimeError(reason)
            return output
        return forward_on_all

    parts = {id(part): part for part in parts_between_gathers(module)}
    before = {key: vars(part).get("forward") for key, part in parts.items()}
    for part in parts.values():
        part.forward = guarded(part.forward)
    try:
        yield
    finally:
        for key, part in parts.items():
            del part.forward
            if before[key] is not None:
                part.forward = before[key]


def parts_between_gathers(module) -> list:
    """Return the blocks of a module with sharded blocks, and the modules outside its blocks."""
    parts = []
    for child in module.children():
        has_block = any(isinstance(inner, FSDPModule) for inner in child.modules())
        if isinstance(child, FSDPModule) or not has_block:
            parts.append(child)
        else:
            parts += parts_between_gathers(child)
    return parts


def saved_tensors(model):
    """{name: tensor} to save: those of the adapter, if there is one, else of the whole model."""
    if lora_layers(model):
        return adapter_tensors(model, "policy")
    return model.state_dict(keep_vars=True)


def save(model, tokenizer, folder, base, ranks, **extra):
    """Save the model, or the adapter on `base`. All ranks send their shards, rank 0 writes."""
    tensors = gather_tensors(saved_tensors(model), ranks)
    if ranks.rank > 0:
        return
    if lora_layers(model):
        save_adapter(model, tokenizer, folder, base, tensors=tensors, **extra)
    else:
        save_model(model, tokenizer, folder, tensors=tensors, **extra)


def checkpoint_bytes(args, model, reference):
    """Bytes of a checkpoint: saved weights, the optimizer's moments, and a reference that moves."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moving = moving_tensors(args, model, reference)
    moments = MOMENTS[args.optimizer] * tensor_bytes(trained)
    weights = tensor_bytes(saved_tensors(model.model).values())
    return weights + moments + tensor_bytes(moving.values())


# --- One optimizer step ---------------------------------------------------------------------------

class Step(NamedTuple):
    """The inputs of one optimizer step, except its batches."""
    number: int
    count: int  # pairs, all ranks together
    pieces: list[Piece]  # this rank's micro-batches
    state: dict  # numbers of the whole step that a loss may take: mean_chosen_length, start_state


class WholeStep(NamedTuple):
    """Numbers of all rows of a step, from its first pass."""
    logp_grads: dict | None  # dL/dlogp of a loss that compares pairs: see batches.logp_gradients
    metrics: dict | None  # of this loss
    expert_counts: torch.Tensor | None  # (E,) of a router loss: see experts.py


def pair_losses(task, policy, reference, batch, state, **more):
    """-> losses (B,) with a graph, {metric: (B,)} without."""
    with torch.autocast(**task.autocast):
        options = task.options | more
        tensors = preference_logps(policy, reference, batch, task.loss, **options)
        return task.preference_loss(tensors | state, task.loss, task.hyper, task.score)


def train_step(task: Task, policy: torch.nn.Module, reference: Callable | None,
               optimizer: torch.optim.Optimizer, batches: Iterator, step: Step,
               max_grad_norm: float, stopping: bool, ranks: Ranks) -> dict[str, float]:
    """One optimizer step on the mean loss over the pairs -> {metric: mean over these pairs}.

    A row of another kind than a pair is treated alike: see answers.py.

    batches    yields this rank's micro-batches, all of them `task.passes` times
    stopping   whether this rank caught a signal. The metric "stop" is above 0 if any rank did

    The CPU waits for the GPU only once, where it reads the metrics.
    """
    # Some losses need numbers of the whole step: pass 1 computes these without a graph, and pass 2
    # back-propagates by micro-batches.
    whole_step = None
    if task.passes == 2:
        whole_step = first_pass(task, policy, reference, batches, step, ranks)

    # Forward and backward, one micro-batch at a time.
    totals = {"stop": torch.full((), float(stopping), dtype=torch.float64, device=ranks.device)}
    seen = []  # ids and metrics of each micro-batch, for the error about a loss that is not finite
    # zip asks for a piece first, so it ends before it takes a batch of the next step.
    for piece, batch in zip(step.pieces, batches):
        if ranks.size > 1:
            sync_gradients(policy, on=piece is step.pieces[-1])
        if task.passes == 2:
            losses, metrics = second_pass(task, policy, reference, batch, step, piece, whole_step)
        else:
            losses, metrics = pair_losses(task, policy, reference, batch, step.state)
        # The mean over the pairs of all ranks. DDP and FSDP average gradients, so times ranks.size.
        (piece.weight * losses.sum() * ranks.size / step.count).backward()
        for name, numbers in metrics.items():
            totals[name] = totals.get(name, 0) + piece.weight * numbers.double().sum()
        seen.append((batch["id"], metrics))

    # Clip, read the metrics, and update.
    norm = clip_gradients(policy, max_grad_norm, ranks)
    values = mean_over_ranks(totals, norm, step.count, ranks)
    if not math.isfinite(values["loss"]) or not math.isfinite(values["grad_norm"]):
        raise_not_finite(step.number, values, seen, ranks, policy)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return values


def mismatched_kl(task, model, reference, batches, pieces, count, ranks):
    """-> the mean log-ratio in nats of the answers of other rows, over all rows of a step. Its
    batches come from answers.Mismatched."""
    def log_ratios(batch):
        tensors = pair_logps(task, model, reference, batch)
        return {"kl": tensors["policy_logps"] - tensors["ref_logps"]}

    return of_all_pairs(log_ratios, batches, pieces, count, ranks)["kl"].mean()


def first_pass(task, policy, reference, batches, step, ranks):
    """Run the forwards of a step without a graph -> WholeStep.

    A loss that compares pairs needs all of them at once, but only their log-probs. A router loss
    needs to know how often each expert is chosen.
    """
    model = unwrap(policy)
    options = {} if task.compares_pairs else {"reference_free": True}

    def numbers(batch):
        if task.router_loss is None:
            return pair_logps(task, model, reference, batch)
        routing = Routing()
        tensors = pair_logps(task, model, reference, batch, routing=routing, **options)
        counts = routing.counts(task.router_loss.top_k, len(batch["id"]))
        return tensors | {"expert_counts": counts}

    tensors = of_all_pairs(numbers, batches, step.pieces, step.count, ranks)
    logp_grads, metrics, counts = None, None, None
    if task.router_loss:
        counts = tensors.pop("expert_counts").sum(0)  # (E,)
    if task.compares_pairs:
        logp_grads, metrics = logp_gradients(task, tensors | step.state)
    return WholeStep(logp_grads, metrics, counts)


def second_pass(task, policy, reference, batch, step, piece, whole_step):
    """-> losses (B,) of a micro-batch with a graph, {metric: (B,)} without. The gradient of the
    losses is that of this micro-batch's part of the whole step's loss."""
    routing = Routing() if task.router_loss else None
    options = {"routing": routing} if task.router_loss else {}
    if task.compares_pairs:
        # dL/dlogp already contains the reference, so this forward does not need one. The sum has
        # the gradient of the loss, but not its value.
        out = pair_logps(task, policy, None, batch, reference_free=True, **options)
        losses = 0
        for name, gradients in whole_step.logp_grads.items():
            losses = losses + gradients[piece.pairs] * out[name]  # (B,)
        metrics = {name: every[piece.pairs] for name, every in whole_step.metrics.items()}
    else:
        losses, metrics = pair_losses(task, policy, reference, batch, step.state, **options)
    if task.router_loss:
        coefficient, top_k = task.router_loss
        # Each pair gets the same part of the router loss, so that the mean over the step has all.
        part = balance_loss(routing, top_k, whole_step.expert_counts) * step.count / len(losses)
        losses = losses + coefficient * part
        metrics = metrics | {"aux_loss": part.detach().expand(len(losses))}
    return losses, metrics


def clip_gradients(policy, max_norm, ranks):
    """Scale the gradients to at most max_norm, over all ranks -> their norm before, shape ().

    The norm stays on the device, so that the CPU does not wait for the GPU here.
    """
    trained = [parameter for parameter in policy.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
    if ranks.size > 1:
        norm = whole(norm)
    torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm


def mean_over_ranks(totals, norm, count, ranks):
    """{metric: sum on this rank} -> {metric: mean over `count` pairs on all ranks}, + grad_norm.

    One all-reduce, one division, and one copy from the GPU.
    """
    sums = torch.stack(list(totals.values()))
    if ranks.size > 1:
        sums = sum_over_ranks(sums, ranks)
    *means, norm = torch.cat([sums / count, norm.double()[None]]).cpu().tolist()
    return dict(zip(totals, means)) | {"grad_norm": norm}


def with_spread(task: Task) -> Task:
    """The task, with the squares of the margins as one more metric if a loss carries their spread
    from step to step."""
    if "gap_std" not in start_state(task.loss):
        return task

    def losses_and_squares(*inputs):
        losses, metrics = task.preference_loss(*inputs)
        squares = metrics["rewards/margins"].double() ** 2
        return losses, metrics | {"rewards/margins_squared": squares}

    return task._replace(preference_loss=losses_and_squares)


# --- Between steps --------------------------------------------------------------------------------

def evaluate(args, task, model, reference, rows, state, tokenizer, ranks):
    """Mean metrics over the held-out rows. The loss gets the log-probs of all rows at once."""
    def logps(batch):
        return pair_logps(task, model, reference, batch)

    pieces = split_step(args, len(rows), data.column(rows, "tokens"), ranks)
    others = mismatched_rows(args, task, rows)
    selections = passes(rows, np.arange(len(rows)), pieces, others)
    batches = load_batches(selections, tokenizer, task.row_format, task.device)
    with contextlib.closing(batches):
        if needs_kl(task.loss):
            kl = mismatched_kl(task, model, reference, batches, pieces, len(rows), ranks)
            state = state | {"kl": kl}
        tensors = of_all_pairs(logps, batches, pieces, len(rows), ranks)
    tensors["mean_chosen_length"] = float(data.column(rows, "first_length").mean())
    _, metrics = task.preference_loss(tensors | state, task.loss, task.hyper, task.score)
    metrics.pop("rewards/margins_squared", None)
    means = torch.stack([values.mean() for values in metrics.values()]).cpu().tolist()
    return group_means(dict(zip(metrics, means)))


def passes(rows, window, pieces, mismatched=None, repeats=1):
    """Yield (rows, indices) of the micro-batches of a step: of the mismatched answers, if there are
    such, then of the rows, `repeats` times."""
    for each in [mismatched] * (mismatched is not None) + [rows] * repeats:
        for piece in pieces:
            yield each, window[piece.pairs]


def row_window(args, number, count):
    """Row indices of the pairs of optimizer step `number`, on all ranks."""
    return data.window(number - 1, count, args.batch_size, args.seed, args.shuffle)


def training_batches(args, task, rows, start, steps, tokenizer, ranks):
    """This rank's micro-batches of all steps after `start`, in the order that train_step takes."""
    tokens, others = data.column(rows, "tokens"), mismatched_rows(args, task, rows)

    def selections():
        for number in range(start + 1, steps + 1):
            window = row_window(args, number, len(rows))
            pieces = split_step(args, len(window), tokens[window], ranks)
            yield from passes(rows, window, pieces, others, task.passes)

    return load_batches(selections(), tokenizer, task.row_format, task.device)


@contextlib.contextmanager
def caught_signals(ranks):
    """Yield a list to which the first Ctrl-C or SIGTERM is added. A second one ends the process."""
    caught, before = [], {}

    def note(number, frame):
        # os.write, because a signal may arrive inside a print, which another print must not enter.
        if not caught and ranks.rank == 0:
            again = "press Ctrl-C" if number == signal.SIGINT else "send SIGTERM"
            os.write(2, f"\nstopping after this step; {again} again to quit at once\n".encode())
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_free_folder(base):
    """Make the first of base, base-2, base-3, ... that no other run has made -> the folder, and a
    list of the folders that this made. Those of killed runs that wrote nothing are deleted."""
    for path in base.parent.glob(f"{base.name}*"):
        delete_if_abandoned(path)
    while True:
        folder = free_name(base)
        made = missing_folders(folder)
        try:
            folder.mkdir(parents=True)
            return folder, made
        except FileExistsError:  # another run made it just now
            continue


def default_folder(args):
    """-> the folder of a run without --output_dir, which a number may follow."""
    return pathlib.Path("runs") / re.sub("[:,]", "+", args.loss)


def choose_folder(args, ranks):
    """--output_dir, or the first free folder below runs/ -> the folder, and a list of the folders
    that are, or will be, made for it."""
    if args.output_dir is not None:
        folder = pathlib.Path(args.output_dir)
        return folder, missing_folders(folder)
    chosen = None
    if ranks.rank == 0:
        chosen = make_free_folder(default_folder(args))
    return broadcast(chosen, ranks)


def use_deterministic_kernels(on):
    """Set torch's switch. On a CPU the kernels used here are deterministic without it."""
    if on:
        # cuBLAS reads this when it is first used: see torch.use_deterministic_algorithms.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, changes no result
    torch.use_deterministic_algorithms(on)


# --- The loop -------------------------------------------------------------------------------------

class Run(NamedTuple):
    """All parts of a run, made from the flags and, after --resume, from a checkpoint."""
    folder: pathlib.Path
    home: pathlib.Path | None  # of the embedded world
    source: str  # of the model
    tokenizer: Any
    preprocessor: Any  # the processor of images with its tokenizer, or the tokenizer: to save
    model: torch.nn.Module  # the policy without DDP's wrapper: to evaluate and to save
    policy: torch.nn.Module  # the same in DDP's wrapper, if there is one: to train
    reference: Callable | None
    rows: Any
    tokens: np.ndarray  # (rows,)
    first_lengths: np.ndarray  # (rows,) of the first answers, which are the chosen ones of pairs
    held_out: dict  # {split of metrics.jsonl: rows}
    task: Task
    optimizer: torch.optim.Optimizer
    scheduler: Any
    newest: pathlib.Path | None  # the checkpoint that is resumed
    start: int  # its step, else 0
    steps: int  # number of the last step
    best: Best
    state: dict  # numbers that the loss carries from step to step: see registry.start_state
    fixed: dict  # hashes of what must be the same when the run is resumed
    flags: dict  # with the values that were resolved: output_dir, attention, warmup_steps
    keep: int  # how many checkpoints are kept
    sampler: Any  # samples.Sampler, with --sample_every


def load_trained_tokenizer(args, source, trained=None):
    """-> the tokenizer of the rows, and a list of lines about its chat template.

    A second stage by --adapter gets the template that the adapter was trained behind. The run
    whose weights are in the folder `trained` has its own.
    """
    lines = []
    if trained and not is_adapter(trained):
        source = trained
    elif trained:
        args = Namespace(**vars(args) | {"adapter": trained})
    tokenizer = load_tokenizer(source, args.revision)
    if args.adapter:
        base_template = tokenizer.chat_template
        tokenizer = load_adapter_tokenizer(args.adapter, source, args.revision)
        if tokenizer.chat_template != base_template and not args.chat_template:
            lines.append(f"chat template: that of {args.adapter}; {source} has another one")
    if args.chat_template:
        template = data.read_template(args.chat_template)
        if args.adapter and template != tokenizer.chat_template:
            lines.append(f"--chat_template {args.chat_template}: {args.adapter} was trained with "
                         "another chat template")
        tokenizer.chat_template = template
    return tokenizer, lines


def tokenizer_digest(tokenizer) -> str:
    """Hash the tokenizer, which a run saves with its model."""
    words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return json_digest({"words": words, "special": special, "chat": tokenizer.chat_template})


def processor_opener(args, source, tokenizer, model):
    """-> a function that loads the processor of the images, when it is first called; None for a
    model that sees no images."""
    if family_of(model.config) != "vision":
        if args.train_vision:
            raise UserError(f"--train_vision: {args.model} sees no images; leave the flag out")
        return None
    keeps_template = bool(args.chat_template or args.adapter)
    return functools.cache(
        functools.partial(load_processor, source, tokenizer, args.revision, keeps_template))


def settle_images(args, open_processor, model, reference, parts):
    """-> the processor of the images of the rows, or None if no row has any. `parts` are the
    training rows and those of all evaluation sets."""
    if not with_images(*parts):
        if args.train_vision:
            raise UserError(f"--train_vision: no row of --dataset {args.dataset} has an image; "
                            "leave the flag out")
        return None
    processor = open_processor()
    check_vocabulary(f"--model {args.model}", model.model, processor.tokenizer)
    if isinstance(reference, FastLogps):
        kind, other = model.model.config.model_type, reference.model.config.model_type
        if other != kind:
            raise UserError(f"--ref_model {args.ref_model}: is a {other} model, and the rows have "
                            f"images for a {kind} model; pass a reference of this kind")
    if args.parallel != "fsdp":
        return processor
    without = sum(data.count_without_images(rows) for rows in parts)
    if without:
        raise UserError(f"--parallel fsdp: {without} rows have no image, and all ranks must run "
                        "the vision tower in the same forwards; use ddp")
    return processor


def load_models(args, home, newest, ranks):
    """-> source, tokenizer, policy, reference, dtype. Policy and reference are loaded by the same
    function, in the same dtype."""
    dtype = resolve_dtype(args.dtype, ranks.device)
    source = str(home / "reference") if args.model == "world" else args.model
    trained = newest if args.eval_only else None
    tokenizer, lines = load_trained_tokenizer(args, source, trained)

    def make_policy(device, unreached=None):
        return load_policy(args, source, newest, dtype, device, unreached)

    model = build_on_ranks(make_policy, ranks, args.parallel, dtype)
    check_vocabulary(f"--model {args.model}", model.model, tokenizer)
    check_positions(args, "the model", model.model)
    reference = load_reference(args, model, source, dtype, ranks)
    if reference is not None and args.ref_model:
        lines.append(check_reference(args, reference.model, tokenizer))
    if args.adapter and not trained:
        lines.append(describe_base(args.adapter, source))
    for line in lines:
        if line and ranks.rank == 0:
            print(line)
    return source, tokenizer, model, reference, dtype


def trial_of_image(parts, processor, ranks):
    """-> find_image_fault on the shortest row with an image, in the first part that has one."""
    for rows in parts:
        keys = rows["image_keys"] if with_images(rows) else []
        seeing = [i for i, row_keys in enumerate(keys) if row_keys]
        if seeing:
            break
    if not seeing:  # the images of all rows are empty lists
        return find_fault
    row = rows[[min(seeing, key=rows["prompt_length"].__getitem__)]]
    row["answer_ids"] = [row["answer_ids"][0][:1]]
    batch = collate(row, processor.tokenizer, ranks.device, RowFormat(processor=processor))
    inputs = {name: value for name, value in batch["inputs"].items()
              if name not in ("labels", "targets")}
    return functools.partial(find_image_fault, inputs=inputs, start=len(row["prompt_ids"][0]),
                             where=row["id"][0])


def find_image_fault(module, inputs, start, where):
    """-> find_fault on a row with an image, or why the model cannot read it: the files of the
    processor may be those of another model. Some models read the tokens behind an image in both
    directions."""
    try:
        with reading(f"{where}: the model cannot read its image as the processor of --model "
                     "gives it"), torch.no_grad():
            module(**inputs)
    except UserError as error:
        return str(error)
    return find_fault(module, inputs, start)


def settle_attention(args, model, reference, parts, dtype, ranks, processor=None):
    """choose_attention, and then --compile -> "packed" or "padded", whether rows need a mask.
    `parts` are the rows to choose it for, and those of all evaluation sets."""
    modules = [module for module in (model, reference) if isinstance(module, FastLogps)]
    names = [f"--model {args.model}"]
    if reference is not None and args.ref_model:  # any other reference is the same model
        names.append(f"--ref_model {args.ref_model}")
    trials = [find_fault]
    if processor:
        trials.append(trial_of_image(parts, processor, ranks))
    for name, module in zip(names, modules):
        for trial in trials:
            reason = try_rows(trial, module, dtype, ranks)
            if reason is not None:
                raise UserError(f"{name}: {reason}")
    attention, masked, line = choose_attention(args, modules, parts[0], dtype, ranks, processor)
    if ranks.rank == 0:
        print(line)
    if args.compile:  # policy and reference, so that they round alike
        for module in modules:
            compile_blocks(module.model)
    return attention, masked


def settle_router_loss(args, task, model, ranks) -> Task:
    """The task, with the router loss of --router_aux_loss_coef or of the model's config, if any."""
    coefficient = args.router_aux_loss_coef
    if coefficient is None:
        coefficient = asked_coefficient(model.model)
    if not coefficient or args.eval_only:
        return task
    reason = try_rows(find_no_router_loss, model, task.dtype, ranks)
    if reason is not None and args.router_aux_loss_coef:
        raise UserError(f"--router_aux_loss_coef {coefficient:g}: {reason}")
    line = (f"router loss: {coefficient:g} x aux_loss, which balances the experts, is added to the "
            "loss of a step; it costs a second forward")
    if reason is not None:
        line = f"router loss: the model's config.json asks for it, but it is not added: {reason}"
    if ranks.rank == 0:
        print(line)
    if reason is not None:
        return task
    return with_router_loss(task, RouterLoss(coefficient, experts_per_token(model.model)))


def print_changed_flags(args, saved):
    """Say which flags a resumed run changes."""
    for name in sorted(FREE_ON_RESUME.union(LENGTH) - {"resume", "output_dir"}):
        value = getattr(args, name)
        if value != saved[name] and value is not None:
            before = "not given" if saved[name] is None else saved[name]
            print(f"--{name} {value}: it was {before} when the checkpoint was written")


def step_count(epochs, max_steps, rows, batch_size):
    """-> the steps of a run with these flags."""
    return max_steps or epochs * math.ceil(rows / batch_size)


def check_length(args, steps, rows, best):
    """Raise if the flags of a resumed run make it shorter, or longer beyond an --early_stop at
    which it has ended."""
    saved = saved_flags(args.output_dir)
    before = step_count(saved["epochs"], saved["max_steps"], rows, args.batch_size)
    name = "max_steps" if args.max_steps else "epochs"
    flag = f"--{name} {getattr(args, name)}"
    if steps < before:
        raise UserError(f"{flag}: the run in {args.output_dir} has {before} steps, and this gives "
                        f"{steps}; a resumed run may only become longer")
    if steps > before and has_lost_patience(args, best):
        raise UserError(f"{flag}: the run in {args.output_dir} was ended by --early_stop "
                        f"{args.early_stop}; give a higher --early_stop too")


def has_lost_patience(args, best):
    """-> whether --early_stop ends the run."""
    return bool(args.early_stop) and best.waited >= args.early_stop


def count_steps(args, rows, ranks):
    """-> the steps of the run, and those of its warm-up. A warm-up longer than the run is said."""
    steps = step_count(args.epochs, args.max_steps, rows, args.batch_size)
    warmup = steps // 10 if args.warmup_steps is None else args.warmup_steps
    if warmup >= steps and ranks.rank == 0:
        highest = args.lr * steps / (warmup + 1)
        print(f"--warmup_steps {warmup}: the run has only {steps} steps, so the learning rate "
              f"reaches {highest:.3g} of --lr {args.lr:g}")
    return steps, warmup


def hash_rows(args, rows, held_out):
    """-> hashes of the training rows and the held-out rows.

    With --eval_dataset the held-out rows are from another file, which the error about them names.
    """
    rows_digest, held_out_digest = data.digest(rows), digest_of_sets(held_out)
    if not args.eval_dataset:
        rows_digest += f"+{held_out_digest}"
    return {"rows": rows_digest, "held_out": held_out_digest}


def make_sampler(args, task, model, reference, splits, tokenizer, home, ranks):
    """-> a samples.Sampler, or None without --sample_every."""
    if not args.sample_prompts:
        return None
    if task.row_format.processor:
        raise UserError("--sample_every: prompts with images are not answered during a run; leave "
                        "the flag out")
    from samples import Sampler  # other runs do not read the file
    return Sampler(args, task, model, reference, splits, tokenizer, home is not None, ranks)


def prepare(args, loss, hyper, home, folder, ranks, trained=None) -> Run:
    """Everything before the first step, in the order in which the parts need each other.

    `trained` is the folder of the weights of --eval_only, or None.
    """
    newest, saved = newest_checkpoint(folder, ranks) if args.resume else (trained, {})
    if saved and ranks.rank == 0:
        print_changed_flags(args, saved["flags"])
    source, tokenizer, model, reference, dtype = load_models(args, home, newest, ranks)

    family = family_of(model.model.config)
    open_processor = processor_opener(args, source, tokenizer, model.model)
    rows, held_out = load_rows(
        args, loss, tokenizer, home, family, ranks, open_processor)
    parts = [rows, *held_out.values()]
    processor = settle_images(args, open_processor, model, reference, parts)
    fixed = hash_rows(args, rows, held_out) | {
        "tokenizer": tokenizer_digest(tokenizer),
        "weights": fingerprint(model, reference, dtype, ranks),
        "settings": settings_digest(model, reference, processor),
        "world": world.enumeration_digest(home) if home else None,
    }
    steps, warmup = count_steps(args, len(rows), ranks)

    # Optimizer and schedule, from the start or from the checkpoint. Before any forward, since
    # under FSDP a forward may leave gathered weights in place of the shards that are to be trained.
    optimizer = make_optimizer(model, args, ranks.device)
    if args.train_vision:
        start_moments(optimizer)
    scheduler = make_schedule(optimizer, args, warmup, steps)
    start, state, best = 0, start_state(loss), Best()
    if saved:
        tensors = optimizer_tensors(model, optimizer, moving_tensors(args, model, reference))
        start, state = load_checkpoint(newest, saved, fixed, tensors, optimizer, scheduler, ranks)
        best = Best(**saved["best"])
    if args.resume:
        check_length(args, steps, len(rows), best)
    size = checkpoint_bytes(args, model, reference)
    keep, plan = plan_checkpoints(args, folder, size, start, steps, ranks)

    # How rows are laid out, and the reference's log-probs if they are computed once.
    attention, masked = settle_attention(args, model, reference, parts, dtype, ranks, processor)
    task = make_task(loss, hyper, read_variants(args), dtype, ranks.device, attention == "packed",
                     masked, most_answers(*parts), family, processor)
    task = settle_router_loss(args, with_spread(task), model, ranks)
    sampler = make_sampler(args, task, model, reference, (rows, held_out), tokenizer, home, ranks)
    if args.ref == "cache" and not args.dry_run:
        splits = {"train": rows} | held_out
        held_out = cache_reference(args, reference, splits, fixed, tokenizer, task, ranks)
        rows = held_out.pop("train")
        reference = None  # frees its memory

    flags = vars(args) | {
        "output_dir": str(folder), "attention": attention, "warmup_steps": warmup,
    }
    introduce(args, task, model, reference, (rows, held_out), steps, folder, plan, ranks)
    tokens, first_lengths = data.column(rows, "tokens"), data.column(rows, "first_length")
    policy = wrap(model, ranks, args.train_vision)
    return Run(folder, home, source, tokenizer, processor or tokenizer, model, policy, reference,
               rows, tokens, first_lengths, held_out, task, optimizer, scheduler, newest, start,
               steps, best, state, fixed, flags, keep, sampler)


def check_first_rows(args, run, ranks) -> str:
    """The step-0 check, where it applies -> a line that says how the run starts, or ""."""
    if run.start:
        return f"resumed after step {run.start}"
    if args.ref == "none":
        return ""
    if args.ref_model:
        return f"no step-0 check: --ref_model {args.ref_model} is another model on purpose"
    # Only the two shortest rows of the first step: an error shows in any row, long rows are slow.
    first = data.window(0, len(run.rows), args.batch_size, args.seed, args.shuffle)
    first = first[np.argsort(run.tokens[first], kind="stable")[:2]]
    batch = collate(run.rows[first], run.tokenizer, ranks.device, run.task.row_format)
    value = check_start(run.task, run.model, run.reference, batch, args.ref == "cache")
    return f"step-0 check: the loss is {value:.4f}, as it must be where policy = reference"


def begin_best(args, run, ranks):
    """Check --keep_best, and give a resumed run the best weights of its checkpoint."""
    if not args.keep_best:
        return
    check_metric(args, run, ranks)
    if args.resume and ranks.rank == 0:
        restore_best(run.folder, run.newest)


def steps_left(args, run):
    """-> the numbers of the steps to train: none if a kill came between the last checkpoint of
    --save_last and the model."""
    if has_lost_patience(args, run.best):
        return range(0)
    return range(run.start + 1, run.steps + 1)


def check_metric(args, run, ranks):
    """Raise a UserError if evaluations have no such metric as --keep_best, before the first step:
    on two rows of each evaluation set, and the whole world."""
    held_out = {split: rows.select(range(min(2, len(rows))))
                for split, rows in run.held_out.items()}
    splits = all_evaluations(args, run._replace(held_out=held_out), run.state, ranks)
    names = sorted(tagged_metrics(splits))
    if args.keep_best not in names:
        raise UserError(f"--keep_best {args.keep_best}: evaluations of this run do not have it; "
                        f"they have {', '.join(names) or 'no metric, as no row is held out'}")


def evaluate_and_log(args, run, log, number, state, ranks) -> dict:
    """`all_evaluations`, written to metrics.jsonl and printed."""
    splits = all_evaluations(args, run, state, ranks)
    for split, metrics in splits.items():
        log.row(number, split, metrics)
        log.say(f"step {number} {split}: {world.brief(metrics)}")
    return splits


def all_evaluations(args, run, state, ranks) -> dict:
    """Evaluate on held-out rows and, in the world, against the optimum -> {split: metrics}."""
    splits = {}
    for split, rows in run.held_out.items():
        if len(rows):
            splits[split] = evaluate(args, run.task, run.model, run.reference, rows, state,
                                     run.tokenizer, ranks)
    if run.home:
        # Beta is the weight of the KL in the objective only for margin losses of sums.
        is_margin = run.task.loss.tags == {"margin"}
        beta = run.task.hyper["beta"] if is_margin else world.BETA
        splits["world"] = world.evaluate_policy(run.model, run.home, run.tokenizer, beta,
                                                ranks.device)
    return splits


def keep_if_best(args, run, log, number, splits, best, ranks) -> tuple[Best, bool]:
    """Save the weights if this evaluation is the best one -> the best one, and whether --early_stop
    ends the run."""
    if not args.keep_best:
        return best, False
    # Rank 0 decides: on another machine the last bit of a metric may differ.
    best = broadcast(judge(best, args.keep_best, splits, number), ranks)
    if best.step == number:
        save_best(run, ranks)
    patient = not has_lost_patience(args, best)
    if not patient and number < run.steps:
        log.say(f"--early_stop {args.early_stop}: no better {args.keep_best} since step "
                f"{best.step}; stopped after step {number} of {run.steps}")
    return best, not patient


def record(run):
    """-> what the files of a model say about the run: its flags, and the numbers that its loss
    carries from step to step, if it has such."""
    return {"flags": run.flags} | ({"loss_state": run.state} if run.state else {})


def save_best(run, ranks):
    """Save the policy in best/ of the run's folder, in place of the one that is there."""
    with contextlib.ExitStack() as stack:
        temporary = None
        if ranks.rank == 0:
            temporary = stack.enter_context(written_aside(run.folder / BEST))
            temporary.mkdir()
        save(run.model.model, run.preprocessor, temporary, run.source, ranks, **record(run))
        if ranks.rank == 0:
            list_best(temporary)
            remove_best(run.folder)
    barrier(ranks)


def write_checkpoint(args, run, number, loss_state, best, ranks):
    """Save everything that the next step depends on."""
    def save_model_in(folder):
        save(run.model.model, run.preprocessor, folder, run.source, ranks)
        if best.step and ranks.rank == 0:
            copy_best(run.folder, folder)

    moving = moving_tensors(args, run.model, run.reference)
    tensors = optimizer_tensors(run.model, run.optimizer, moving)
    state = {"scheduler": run.scheduler.state_dict(), "flags": run.flags}
    state |= {"loss_state": loss_state, "best": best._asdict()}
    save_checkpoint(run.folder, number, save_model_in, tensors, run.fixed | state, run.keep, ranks)


def advance(args, run, number, batches, loss_state, stopping, ranks):
    """`train_step`, then the learning rate, the loss's state and a moving reference -> metrics, the
    loss's state for the next step, tokens of this step."""
    # The pairs of this step, and this rank's share of them in micro-batches.
    window = row_window(args, number, len(run.rows))
    tokens = run.tokens[window]
    mean_length = float(run.first_lengths[window].mean())
    state = {"mean_chosen_length": mean_length} | loss_state
    pieces = split_step(args, len(window), tokens, ranks)
    if needs_kl(run.task.loss):  # the reference point of KTO is a number of the whole step
        state["kl"] = mismatched_kl(run.task, run.model, run.reference, batches, pieces,
                                    len(window), ranks)
    step = Step(number, len(window), pieces, state)

    # Seed an adapter's dropout by seed, step and rank, so that a resumed run draws the same masks.
    torch.manual_seed(args.seed + 1_000_003 * (number * ranks.size + ranks.rank))
    values = {"lr": run.scheduler.get_last_lr()[0]}
    values |= train_step(run.task, run.policy, run.reference, run.optimizer, batches, step,
                         args.max_grad_norm, stopping, ranks)
    run.scheduler.step()
    values = group_means(values)
    update, means = run.task.loss.update, dict(values)
    values.pop("rewards/margins_squared", None)
    values |= loss_state
    if update:
        loss_state = update(loss_state, means, run.task.hyper["beta"])
    if args.sync_ref_every and number % args.sync_ref_every == 0:
        move_reference(args, run.model, run.reference)
    return values, loss_state, int(tokens.sum())


def digest_of_sets(held_out):
    """-> a hash of the rows of all evaluation sets, and of their names where they have some."""
    digests = {split: data.digest(rows) for split, rows in held_out.items()}
    if digests.keys() == {"eval"}:
        return digests["eval"]
    return json_digest(digests)


def most_answers(*splits):
    """-> K, the largest number of answers of a row."""
    return max(int(data.column(rows, "answers").max()) for rows in splits if len(rows))


def check_processes(args, ranks):
    """Raise if --parallel needs more processes."""
    if args.parallel == "fsdp" and ranks.size == 1:
        raise UserError("--parallel fsdp: one process alone has nothing to share; "
                        "start several with torchrun")


def train_policy(args: Namespace, loss: Callable, hyper: dict, folder: pathlib.Path,
                 home: pathlib.Path | None, ranks: Ranks) -> bool:
    """Train with the flags of `parse_args`. Returns whether a signal ended it early.

    `folder` is the run's, see `claim`. `home` is the folder of the embedded world, or None in a run
    that is not in the world.
    """
    say = print if ranks.rank == 0 else lambda text: None
    use_deterministic_kernels(args.deterministic)
    run = prepare(args, loss, hyper, home, folder, ranks)
    line = check_first_rows(args, run, ranks)
    if line:
        say(line)

    begin_best(args, run, ranks)
    if args.resume and ranks.rank == 0:
        reopen_run(folder)
    state, steps, best, splits = run.state, run.steps, run.best, {}
    batches = training_batches(args, run.task, run.rows, run.start, steps, run.tokenizer, ranks)
    with (explained_write_errors(folder, ranks), caught_signals(ranks) as stopped,
          contextlib.closing(batches)):
        log = Log(folder, run.flags, run.newest, run.start, steps, ranks)
        since, count = time.perf_counter(), 0
        for number in steps_left(args, run):
            values, state, tokens = advance(args, run, number, batches, state,
                                            bool(stopped), ranks)

            # The bar, and a row of metrics.jsonl.
            stopping, last = values.pop("stop") > 0, number == steps
            count += tokens
            values["tokens_per_second"] = count / (time.perf_counter() - since)
            log.tick(values)
            if number % args.log_every == 0 or last:
                log.row(number, "train", values)
                since, count = time.perf_counter(), 0

            # Evaluation and checkpoint. Their time does not count in tokens_per_second.
            pause = time.perf_counter()
            if last or args.eval_every and number % args.eval_every == 0:
                splits = evaluate_and_log(args, run, log, number, state, ranks)
                best, ended = keep_if_best(args, run._replace(state=state), log, number, splits,
                                           best, ranks)
                last = last or ended
            if run.sampler and run.sampler.is_due(number, last):
                run.sampler.sample(number, log)
            due = args.save_every and number % args.save_every == 0
            if args.save_last if last else stopping or due:
                write_checkpoint(args, run, number, state, best, ranks)
            if not last and stopping:
                log.close()
                say(f"stopped after step {number} of {steps}; to continue: "
                    f"{how_to_continue(folder, ranks)}")
                return True
            since += time.perf_counter() - pause
            if last:
                break

        log.close()
        say(save_final(run._replace(state=state), best, splits, ranks))
    return False


def save_final(run, best, splits, ranks) -> str:
    """Save the model of a run that has ended, or the best one -> a line about it."""
    if best.step:
        if ranks.rank == 0:
            adopt_best(run.folder, run.flags, best)
    else:
        save(run.model.model, run.preprocessor, run.folder, run.source, ranks, **record(run))
    if ranks.rank == 0:  # a kill may have come before this
        delete_old_checkpoints(run.folder, run.keep)
        document_run(run.folder)
    text = f"saved in {run.folder}"
    if best.step:
        text += (f": the weights of step {best.step}, with {run.flags['keep_best']} "
                 f"{best.value:.4g}")
    if (run.folder / CURVES_FILE).exists():
        text += f"; curves: {run.folder / CURVES_FILE}"
    if "world" in splits and not best.step:
        text += world.sum_up(splits["world"])
    return text


def rehearse(args, loss, hyper, ranks):
    """--dry_run: do all that comes before the first update, and print what the run would be."""
    folder = pathlib.Path(args.output_dir or free_name(default_folder(args)))
    reason = reason_against_new_run(folder) if folder.is_dir() else None
    if reason is not None:
        raise UserError(f"--output_dir {folder}{reason}")
    use_deterministic_kernels(args.deterministic)
    home = make_world(ranks) if "world" in (args.model, args.dataset) else None
    run = prepare(args, loss, hyper, home, folder, ranks)
    line = check_first_rows(args, run, ranks)
    begin_best(args, run, ranks)
    still = run._replace(optimizer=NoUpdate(run.model), scheduler=NoUpdate(run.model), home=None)

    def train_steps():
        last = min(2, run.steps)
        batches = training_batches(args, run.task, run.rows, 0, last, run.tokenizer, ranks)
        with contextlib.closing(batches):
            for number in range(1, last + 1):
                yield advance(args, still, number, batches, run.state, False, ranks)[2]

    def evaluate_some(held_out):
        all_evaluations(args, still._replace(held_out=held_out), run.state, ranks)

    measured = time_steps(train_steps, evaluate_some, run.held_out, ranks)
    sizes = [checkpoint_bytes(args, run.model, run.reference),
             tensor_bytes(saved_tensors(run.model.model).values())]
    if ranks.rank == 0:
        lines = describe_plan(args, run, run.flags["warmup_steps"], measured)
        report_plan([line] * bool(line) + lines + describe_size(args, run, *sizes, measured))


def evaluate_trained(args, loss, hyper, name, ranks):
    """--eval_only: print all metrics of the run or model of this name, and write them with
    --output_dir."""
    saved = find_saved(name)
    step, state = trained_state(saved)
    if args.output_dir:
        folder = pathlib.Path(args.output_dir)
        claimed = claim(folder, False, ranks, missing_folders(folder))
    else:
        folder, claimed = None, contextlib.nullcontext()
    use_deterministic_kernels(args.deterministic)
    with claimed:
        home = make_world(ranks) if "world" in (args.model, args.dataset) else None
        run = prepare(args, loss, hyper, home, folder, ranks, saved.weights)
        state = {name: state.get(name, value) for name, value in run.state.items()}
        splits = all_evaluations(args, run, state, ranks)
        if ranks.rank > 0:
            return
        if saved.note:
            print(saved.note)
        if saved.flags.get("sync_ref_every"):
            print(MOVED_REFERENCE)
        print(metric_lines(splits))
        if folder:
            rows = [{"step": step, "split": split, **splits[split]} for split in splits]
            write_text(folder / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows))


def main(argv: list[str], ranks: Ranks) -> bool:
    """Read the flags, claim the folder, make the world if they name it, and train. Returns what
    train_policy does."""
    args, loss, hyper = parse_args(argv, __doc__)
    check_processes(args, ranks)
    if args.eval_only:
        evaluate_trained(args, loss, hyper, split_model(argv)[0], ranks)
        return False
    if args.dry_run:
        rehearse(args, loss, hyper, ranks)
        return False
    folder, made = choose_folder(args, ranks)
    longer = args.resume and is_longer(vars(args), saved_flags(args.output_dir))
    complete = args.resume and is_complete(folder)
    if complete and longer and not checkpoints(folder):
        raise UserError(f"--output_dir {folder}: this run has ended and has no checkpoint left to "
                        "continue from; only a run with --save_last, or with a checkpoint of "
                        "--save_every, can be made longer")
    if complete and not longer:
        finish_complete_run(folder, ranks)
    else:
        # The folder comes first: a run that may not write there has not spent an hour on its
        # reference.
        with claim(folder, args.resume, ranks, made):
            home = make_world(ranks) if "world" in (args.model, args.dataset) else None
            stopped = train_policy(args, loss, hyper, folder, home, ranks)
        if stopped:
            return True
    if args.push_to_hub and ranks.rank == 0:
        push(folder, args.push_to_hub, how_to_continue(folder, ranks))
    return False


def finish_complete_run(folder, ranks):
    """Write the card of a run that was killed between its model and its card."""
    if ranks.rank == 0:
        print(f"the run in {folder} is complete")
    if broadcast(not has_card(folder), ranks):
        with claim(folder, True, ranks), explained_write_errors(folder, ranks):
            if ranks.rank == 0:
                document_run(folder)


def explain(error):
    """The message for an error of the user or of the machine; None for a bug, and for output that
    nobody reads any more, which ends the script without a message.

    FloatingPointError comes from `raise_not_finite`, which names the rows.
    """
    if isinstance(error, BrokenPipeError) and output_is_closed():
        return None
    if isinstance(error, (UserError, FloatingPointError, OSError, SafetensorError)):
        return str(error)
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if is_out_of_memory(error):
        return (f"out of memory ({first}). Options that need less, cheapest first: a lower "
                "--micro_batch_size, --gradient_checkpointing, --ref cache, a lower --max_length, "
                "--parallel fsdp, --lora_rank, --quantize nf4")
    if not isinstance(error, RuntimeError):
        return None
    if "does not have a deterministic implementation" in first:
        return f"--deterministic: {first}"
    connection = "onnection (closed|reset)|gloo|NCCL|[Tt]imed out"
    if "RANK" in os.environ and re.search(connection, str(error)):
        return (f"another process of this run has ended, or does not answer ({first[:120]}); its "
                "own output says why. Saved checkpoints are complete: start again with "
                "--output_dir and --resume")
    return None


def run():
    """main, with one line and exit status 2 for errors of users; a traceback only for bugs."""
    with script_signals_and_streams():
        try:
            ranks = init_distributed()
            stopped = main(arguments(), ranks)
            leave_distributed(ranks)
            sys.exit(130 if stopped else 0)
        except (UserError, FloatingPointError, RuntimeError, MemoryError, OSError,
                SafetensorError) as error:
            sentence = explain(error)
            if sentence is None:
                raise
            report(sentence)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted before the first step: nothing was saved", file=sys.stderr)
            sys.exit(130)


if __name__ == "__main__":
    run()
