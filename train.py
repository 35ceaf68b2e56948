"""Train a policy on preferences.

    python train.py                                   # the embedded world: CPU, no download
    python train.py --loss ipo --model ./sft-model --dataset pairs.jsonl --output_dir runs/ipo
    torchrun --nproc_per_node 8 train.py --loss sigmoid --model org/name --dataset org/pairs
    python train.py --output_dir runs/ipo --resume    # continue from the newest checkpoint

The same loop runs on one core and on many GPUs. It is `main`, at the end of the file; one
optimizer step is `train_step`. Bad input is a ValueError with one line for the user, in every file;
`run` prints it and exits with status 2.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import difflib
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import sys
import time
import traceback
import warnings
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import numpy as np
import torch
import tqdm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule
from transformers import AttentionInterface, get_scheduler

import data
import packing
import world
from checkpoint import (
    claim, gather_tensors, is_complete, load_checkpoint, newest_checkpoint,
    optimizer_tensors, plan_checkpoints, read_flags, save_checkpoint, spared, tensor_bytes, write,
)
from data import at_least
from dpo import (
    check_variants, concatenated_forward, concatenated_inputs, logp_gradients, preference_logps,
    preference_loss, preference_step, SequenceLogps,
)
from losses import (
    find, hyperparameters, LOSSES, needs_reference, needs_rejected, tensor_arguments, update_delta,
)
from lora import (
    adapter_tensors, add_adapter, find_targets, load_adapter, lora_layers, LoraSettings,
    NF4Linear, read_adapter, save_adapter, use_adapter,
)
from model import compile_blocks, load_model, load_tokenizer, new_model, save_model
from parallel import (
    bare, barrier, broadcast, clip_gradients, first_reason, gather, init_distributed,
    leave_distributed, place, Ranks, reset_shards, shard, sum_over_ranks, sync_gradients, whole,
    wrap,
)

# torch.distributed's checkpoint says so when one process saves alone.
warnings.filterwarnings("ignore", "torch.distributed is disabled")

# our name: transformers' name
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
# These flags change no weight, except by rounding.
FREE_ON_RESUME = {
    "resume", "log_every", "eval_every", "save_every", "keep_checkpoints", "output_dir", "parallel",
    "attention", "compile", "deterministic",
}


# --- Flags ----------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


class Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default to a flag's help, where there is one and the help does not tell it."""

    def _get_help_string(self, action):
        untold = (None, False, ..., argparse.SUPPRESS)
        if any(action.default is value for value in untold) or "default" in action.help:
            return action.help
        return f"{action.help} (default {action.default})"


def above_zero(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
    return value


def true_or_false(text):
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text}")
    return text == "true"


def add_source_flags(add):
    """What to train on what."""
    add("--loss", default="sigmoid",
        help=f"NAME, or a sum NAME:WEIGHT,NAME:WEIGHT, of {', '.join(LOSSES)}")
    add("--model", default="world", help="policy: a folder, a hub id, or world")
    add("--dataset", default="world",
        help="a file or folder (.jsonl .json .csv .parquet), a hub id, or world; several parts as "
             "NAME:SPLIT:SHARE,NAME:SPLIT:SHARE, where splits and shares may be left out")
    add("--eval_dataset",
        help="held-out rows; without it a share of the prompts is held out")
    add("--eval_share", type=at_least(0, float),
        help="share of the prompts to hold out (default 0.05; 0: none)")
    add("--output_dir", help="default: a new folder below runs/")
    add("--resume", action="store_true",
        help="go on from the newest checkpoint of --output_dir, with its flags")


def add_policy_flags(add, loss):
    """What is trained, and what it is compared with."""
    add("--adapter",
        help="start from this LoRA adapter, a folder of ours or of peft's, on top of --model")
    add("--lora_rank", type=at_least(1, int),
        help="train a new LoRA adapter of this rank, and nothing else")
    add("--lora_alpha", type=above_zero, help="its scale times its rank (default: twice the rank)")
    add("--lora_target",
        help="names of linear layers, as q_proj,v_proj, or a regular expression "
             "(default: all but the head)")
    add("--lora_dropout", type=at_least(0, float), default=0.0, help="of what enters the adapter")
    add("--rslora", action="store_true", help="scale by alpha over the root of the rank")
    add("--dora", action="store_true",
        help="train the norms of the weights apart from their directions")
    add("--quantize", choices=("nf4",), help="the frozen weights in 4 bits (QLoRA)")
    add("--gradient_checkpointing", action="store_true",
        help="recompute activations in backward: less memory, more time")
    if not needs_reference(loss):
        return
    add("--ref", choices=("model", "adapter_off", "adapter", "cache", "none"),
        help="the reference: a second model; the policy with its adapter off (default with "
             "--lora_rank); a frozen copy of the adapter it starts from (default with --adapter); "
             "log-probs computed once and kept on disk; none")
    add("--ref_model",
        help="the second model of --ref model (default: what the policy starts from)")
    add("--ref_batch_size", type=at_least(1, int),
        help="pairs per forward of --ref cache (default: micro_batch_size)")
    add("--sync_ref_every", type=at_least(1, int),
        help="TR-DPO: move the reference towards the policy after this many steps")
    add("--sync_ref_alpha", type=above_zero, help="by this share of the way (default 0.6)")


def add_optimizer_flags(add):
    add("--batch_size", type=at_least(1, int), default=64,
        help="pairs per optimizer step, all ranks together")
    add("--micro_batch_size", type=at_least(1, int),
        help="pairs per forward on one rank: less saves memory (default 4)")
    add("--tokens_per_micro_batch", type=at_least(1, int),
        help="in place of a number of pairs: as many as have so many tokens, prompts once")
    add("--epochs", type=at_least(1, int), help="times through the data (default 1)")
    add("--max_steps", type=at_least(1, int), help="optimizer steps, in place of --epochs")
    add("--lr", type=above_zero,
        help="peak learning rate of AdamW (default 5e-7, for sft 1e-5; for adapters 10 times it)")
    add("--lr_schedule", choices=SCHEDULES, default="linear", help="what follows the warm-up")
    add("--warmup_steps", type=at_least(0, int), help="default: a tenth of the steps")
    add("--max_grad_norm", type=above_zero, default=1.0,
        help="gradients are clipped to this norm")


def add_run_flags(add):
    add("--parallel", choices=("ddp", "fsdp"), default="ddp",
        help="fsdp: weights, gradients and optimizer in shards, one on each rank")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float64"), default="auto",
        help="of the computation; bfloat16: autocast over float32 weights; "
             "auto: bfloat16 on a GPU, float32 on a CPU")
    add("--attention", choices=("auto", "packed", "padded"), default="auto",
        help="packed: each prompt once and no padding, by `sdpa` below; "
             "auto: where that is right and faster")
    add("--compile", action="store_true",
        help="torch.compile the MLPs and norms; the first steps wait for the compiler")
    add("--deterministic", action="store_true",
        help="on a GPU use deterministic kernels only: slower, but a run that is repeated or "
             "resumed ends bit for bit the same; an operation that has none is an error. "
             "On a CPU this holds without it")
    add("--log_every", type=at_least(1, int), default=10,
        help="steps between rows of metrics.jsonl")
    add("--eval_every", type=at_least(0, int), default=200,
        help="steps between evaluations (0: at the end only)")
    add("--save_every", type=at_least(0, int), default=200,
        help="steps between checkpoints (0: only when interrupted)")
    add("--keep_checkpoints", type=at_least(1, int),
        help="older ones are removed (default 2; 1 if a checkpoint is above 10 GB)")


def add_variant_flags(add):
    """Variants of a loss, each where it is valid."""
    add("--reference_free", action="store_true",
        help="zeros in place of the reference's log-probs")
    add("--f_divergence", choices=("reverse_kl", "forward_kl", "js", "alpha"),
        help="f-DPO: losses.f_divergence_score as the link")
    add("--f_alpha", type=float, help="the alpha of --f_divergence alpha, in (0, 1] (default 0.5)")
    add("--wpo", action="store_true",
        help="WPO: weigh a pair by how probable its answers are under the policy")
    add("--ld_alpha", type=float, default=1.0,
        help="LD-DPO: weight of the tokens beyond the shorter answer's length, in [0, 1]")


def build_parser(loss: Callable) -> Parser:
    """Every flag of a run with this loss: the trainer's, and the loss's keyword arguments."""
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add_source_flags(parser.add_argument_group("what to train on what").add_argument)
    policy = parser.add_argument_group("the policy and its reference")
    add_policy_flags(policy.add_argument, loss)
    add_optimizer_flags(parser.add_argument_group("the optimizer").add_argument)
    rows = parser.add_argument_group("the rows")
    data.add_flags(rows.add_argument)
    rows.add_argument("--shuffle", type=true_or_false, default=True, metavar="true|false",
                      help="false: the order of the file")
    rows.add_argument("--seed", type=at_least(0, int), default=0, help="of the order of the rows")
    add_run_flags(parser.add_argument_group("the run").add_argument)
    variants = parser.add_argument_group("variants of a loss, each where it is valid")
    add_variant_flags(variants.add_argument)
    own = parser.add_argument_group(f"the loss {loss.__name__}")
    for name, default in hyperparameters(loss).items():
        own.add_argument(f"--{name}", type=float, default=default,
                         help="see the page of the loss in losses.py")
    return parser


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, Callable, dict]:
    """-> args, loss function, its hyper-parameters. The loss is read first: it adds flags."""
    # First the flags that decide which others there are, and which defaults they have.
    first = Parser(add_help=False, allow_abbrev=False)
    for flag in ("--loss", "--dataset", "--output_dir", "--tokens_per_micro_batch"):
        first.add_argument(flag)
    first.add_argument("--resume", action="store_true")
    early = first.parse_known_args(argv)[0]
    saved = read_flags(early.output_dir) if early.resume else {}
    loss_name = early.loss or saved.get("loss", "sigmoid")
    try:
        loss = find(loss_name)
    except ValueError as error:
        raise ValueError(f"--{error}") from None

    # Then all flags. The world has defaults of its own; a resumed run has the flags it began with.
    parser = build_parser(loss)
    known = vars(parser.parse_args([]))
    brings = {}
    if (early.dataset or saved.get("dataset", "world")) == "world":
        brings = world.flags(loss_name)
    defaults = {name: value for name, value in brings.items() if name in known and name != "epochs"}
    if early.tokens_per_micro_batch:
        defaults.pop("micro_batch_size", None)
    parser.set_defaults(**defaults | saved)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse_flag(unknown[0].split("=")[0], loss_name, known)

    # Last, what follows from several flags together.
    settle_adapter(args, loss)
    settle_reference(args, loss)
    check_args(args, saved)
    hyper = {name: getattr(args, name) for name in hyperparameters(loss)}
    check_loss(args, loss, hyper)
    fill_defaults(args, loss, brings)
    return args, loss, hyper


def fill_defaults(args, loss, brings):
    """Defaults that depend on other flags."""
    if not args.tokens_per_micro_batch:
        args.micro_batch_size = args.micro_batch_size or 4
    if not args.lr:
        args.lr = 5e-7 if needs_rejected(loss) else 1e-5
        if args.adapter or args.lora_rank:
            args.lr = 5e-6 if needs_rejected(loss) else 1e-4
    if not args.max_steps:
        args.epochs = args.epochs or brings.get("epochs", 1)
    if args.eval_share is None and not args.eval_dataset and args.dataset != "world":
        args.eval_share = 0.05


# Flags of a new adapter, and their values where they are not given.
LORA = {
    "lora_alpha": None, "lora_target": None, "lora_dropout": 0.0, "rslora": False, "dora": False,
}


def settle_adapter(args, loss):
    """Fill in what follows from the flags of an adapter, and refuse what contradicts them."""
    if args.adapter and args.model == "world":
        args.model = read_adapter(args.adapter)[2] or args.model
    for name, default in LORA.items():
        if getattr(args, name) == default:
            continue
        if args.adapter:
            raise ValueError(f"--{name}: is of a new adapter, so give --lora_rank and no --adapter")
        if not args.lora_rank:
            raise ValueError(f"--{name}: is of a new adapter, so give --lora_rank")
    if args.adapter and args.lora_rank:
        raise ValueError(f"--lora_rank {args.lora_rank}: --adapter {args.adapter} has a rank of "
                         "its own; give one of them")
    if args.lora_dropout and "batch" in loss.marks:
        raise ValueError(f"--lora_dropout {args.lora_dropout}: {loss.__name__} computes its "
                         "log-probs twice, and they must be the same")
    if args.lora_dropout >= 1:
        raise ValueError(f"--lora_dropout {args.lora_dropout}: leaves nothing; it must be below 1")
    if args.quantize and args.parallel == "fsdp":
        raise ValueError(f"--quantize {args.quantize}: weights of 4 bits are not sharded; "
                         "use --parallel ddp")
    if args.quantize and not (args.adapter or args.lora_rank):
        raise ValueError(f"--quantize {args.quantize}: 4-bit weights can't be trained; "
                         "train an adapter, by --lora_rank or --adapter")
    if args.lora_rank and args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank


def default_reference(args):
    if args.reference_free:
        return "none"
    if args.ref_model:
        return "model"
    if args.adapter:
        return "adapter"
    return "adapter_off" if args.lora_rank else "model"


def settle_reference(args, loss):
    """Fill in what follows from the flags of the reference, and refuse what contradicts them."""
    if not needs_reference(loss):
        args.ref, args.sync_ref_every = "none", None
        return
    args.ref = args.ref or default_reference(args)
    if args.ref == "none" and not args.reference_free:
        raise ValueError("--ref none: this loss has a reference; "
                         "--reference_free puts zeros in its place")
    if args.ref != "none" and args.reference_free:
        raise ValueError(f"--ref {args.ref}: is not read with --reference_free")
    if args.ref == "adapter" and not args.adapter:
        raise ValueError("--ref adapter: there is no --adapter to start from")
    if args.ref == "adapter_off" and not (args.adapter or args.lora_rank):
        raise ValueError("--ref adapter_off: there is no adapter to turn off")
    if args.ref_model and args.ref not in ("model", "cache"):
        other = "reference_free" if args.reference_free else f"ref {args.ref}"
        raise ValueError(f"--ref_model {args.ref_model}: is not read with --{other}")
    if args.ref_batch_size and args.ref != "cache":
        raise ValueError(f"--ref_batch_size {args.ref_batch_size}: is of --ref cache")
    settle_moving_reference(args)


def settle_moving_reference(args):
    every, alpha = args.sync_ref_every, args.sync_ref_alpha
    if every and args.ref not in ("model", "adapter"):
        raise ValueError(f"--sync_ref_every {every}: a reference of --ref {args.ref} can't move")
    if every and args.ref == "model" and (args.adapter or args.lora_rank):
        raise ValueError(f"--sync_ref_every {every}: --ref model has no adapter to move towards the "
                         "policy's; start from one by --adapter, with --ref adapter")
    if alpha and not every:
        raise ValueError(f"--sync_ref_alpha {alpha}: is read with --sync_ref_every")
    if alpha and alpha > 1:
        raise ValueError(f"--sync_ref_alpha {alpha}: must be in (0, 1]")
    if every and not alpha:
        args.sync_ref_alpha = 0.6


def refuse_flag(flag, loss_name, known):
    """Say of an unknown flag which losses read it, or which flag has the nearest name."""
    name = flag.removeprefix("--")
    if "ref" in name.split("_"):
        raise ValueError(f"{flag}: --loss {loss_name} has no reference")
    readers = [other for other, loss in LOSSES.items() if name in hyperparameters(loss)]
    if readers:
        raise ValueError(f"{flag} is not read by --loss {loss_name}; "
                         f"it is read by {', '.join(readers)}")
    near = difflib.get_close_matches(name, known, n=1, cutoff=0)
    raise ValueError(f"{flag}: there is no such flag; the nearest is --{near[0]}")


def check_args(args, saved):
    """What no flag's own type can see. `saved`: the flags of the run that is resumed, or {}."""
    for name in ["loss", *sorted(saved)] if saved else []:
        value = getattr(args, name, None)
        if name not in FREE_ON_RESUME and value != saved[name]:
            raise ValueError(f"--{name} {value}: the run in {args.output_dir} has {saved[name]}, "
                             "and may not change when it is resumed")
    if args.epochs and args.max_steps:
        raise ValueError(f"--epochs {args.epochs} and --max_steps {args.max_steps} both say how "
                         "long to train: give one")
    if args.tokens_per_micro_batch and args.micro_batch_size:
        raise ValueError(f"--micro_batch_size {args.micro_batch_size} and --tokens_per_micro_batch "
                         f"{args.tokens_per_micro_batch}: give one")
    data.read_flags(args)
    if args.model == "world" and args.dataset != "world":
        raise ValueError(f"--dataset {args.dataset}: --model world knows no words but its own "
                         "data's; give another --model")
    if args.eval_share is None:
        return
    if args.eval_share >= 1:
        raise ValueError(f"--eval_share {args.eval_share}: leaves nothing to train on")
    if args.eval_dataset or args.dataset == "world":
        held_out = args.eval_dataset or "the world's own"
        raise ValueError(f"--eval_share {args.eval_share}: the held-out rows are {held_out}")


def variants(args):
    """Arguments of dpo.preference_step -> those of its log-probs, those of its link."""
    options = {name: getattr(args, name) for name in ("reference_free", "wpo", "ld_alpha")}
    link = {name: getattr(args, name) for name in ("f_divergence", "f_alpha")}
    return options, link


def check_loss(args, loss, hyper):
    """Check the hyper-parameters' ranges and the variants, by calling the loss on one pair."""
    options, link = variants(args)
    tensors = {}
    for name in tensor_arguments(loss):
        tensors[name] = torch.full((1,), 2.0 if "chosen" in name else 1.0)
    try:
        check_variants(loss, hyper, **options, **link)
        loss(**tensors, **hyper)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


# --- The embedded world ---------------------------------------------------------------------------

def make_world(ranks: Ranks) -> pathlib.Path:
    """The folder of the embedded world, made by rank 0, with this same loop, if it is not there."""
    home = world.folder()
    if ranks.rank == 0 and not home.exists():
        print(f"world: its reference policy is trained first, this once, and kept in {home}")
        aside, threads = home.with_name(f"{home.name}.{os.getpid()}"), torch.get_num_threads()
        # One thread sums in one order: the same world, however many threads or ranks come after.
        torch.set_num_threads(1)
        try:
            build_world(aside, ranks.device)
            os.replace(aside, home)
        finally:
            torch.set_num_threads(threads)
            shutil.rmtree(aside, ignore_errors=True)
    barrier(ranks)
    return home


def build_world(home, device):
    tokenizer, alone = world.make_tokenizer(), Ranks(0, 1, device)
    save_model(new_model(tokenizer, **world.MODEL), tokenizer, home / "start")
    world.write_texts(home)
    flags = world.SFT_FLAGS | {
        "model": home / "start", "dataset": home / "sft.jsonl", "output_dir": home / "reference",
    }
    if main([f"--{name}={value}" for name, value in flags.items()], alone):
        raise KeyboardInterrupt
    reference = SequenceLogps(load_model(str(home / "reference"), device=device))
    world.write_pairs(home, answer_logps(reference, home, tokenizer, device))


@torch.no_grad()
def answer_logps(model, home, tokenizer, device):
    """(X, A) log-probs of all answers of the world."""
    every = data.load_tokens(str(home / "every.jsonl"), tokenizer, ("chosen",), data.Limits())[0]
    logps = []
    for i in range(0, len(every), 1024):
        batch = collate(every[i:i + 1024], tokenizer, device)
        logps.append(model(**concatenated_inputs(batch, ("chosen",)))[0])
    return torch.cat(logps).view(len(world.THINGS), -1).cpu()


def world_metrics(model, home, tokenizer, loss, hyper, device):
    """The policy against the truth: see world.metrics."""
    # A beta that is not the weight of the KL divergence would make another optimum.
    beta = hyper["beta"] if loss.marks == {"margin"} else world.BETA
    truth = torch.from_numpy(np.load(home / "reference.npy"))
    return world.metrics(answer_logps(model, home, tokenizer, device), truth, beta)


def sum_up(values):
    """The last lines of a run in the world."""
    v = {name.removeprefix("world/"): value for name, value in values.items()}
    return (f"\nexpected true reward {v['reward']:.3f}, KL to the reference {v['kl']:.3f} nats, "
            f"J = {v['objective']:.3f} of at most {v['optimum']:.3f}\n"
            f"probability on well-formed answers         {v['mass']:.3f}\n"
            f"share of the achievable                    {v['share']:.3f}\n"
            f"correlation of implicit and true reward    {v['correlation']:.3f}")


# --- Rows and batches -----------------------------------------------------------------------------

def load_rows(args, loss, tokenizer, home, ranks):
    """-> training rows and held-out rows (maybe none) as token ids.

    Rank 0 tokenizes, then the others read its cache.
    """
    sides = ("chosen", "rejected") if needs_rejected(loss) else ("chosen",)
    scored = "chosen_scores" in tensor_arguments(loss)
    limits, columns = data.read_flags(args)
    specs = {"--dataset": args.dataset, "--eval_dataset": args.eval_dataset}
    if args.dataset == "world":
        held_out = args.eval_dataset or home / "eval.jsonl"
        specs = {"--dataset": home / "pairs.jsonl", "--eval_dataset": held_out}
    if ranks.rank > 0:
        barrier(ranks)
    loaded = {}
    for flag, spec in specs.items():
        if spec:
            loaded[flag] = data.load_tokens(str(spec), tokenizer, sides, limits, args.strict,
                                            scored, columns)
    if ranks.rank == 0:
        barrier(ranks)
    data.check_template(args.chat_template, [account for _, account in loaded.values()])
    rows = loaded["--dataset"][0]
    if "--eval_dataset" in loaded:
        held_out = loaded["--eval_dataset"][0]
    else:
        rows, held_out = data.hold_out(rows, args.eval_share)
    if not len(rows):
        raise ValueError(f"--eval_share {args.eval_share}: holds out all {len(held_out)} rows, "
                         "so few are their prompts; lower it")
    if ranks.rank == 0:
        for flag, (_, account) in loaded.items():
            print(f"{flag} {data.describe(account)}")
        print(data.describe_statistics(data.statistics(rows, held_out)))
        print(data.show(rows, tokenizer, most=300))
    return rows, held_out


def collate_on_cpu(rows, tokenizer, packed):
    """{column: list} -> a batch of dpo.py."""
    if packed:
        return data.known(rows) | packing.collate(rows)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = tokenizer.eos_token_id  # masked either way
    return data.collate(rows, pad)


def to_device(batch, device):
    """Copy a batch to the device without waiting, except the labels: see dpo.SequenceLogps."""
    moved = {}
    for name, value in batch.items():
        stays = not torch.is_tensor(value) or name.endswith(("labels", "predictors"))
        moved[name] = value if stays else packing.to_device(value, device)
    return moved


def collate(rows: dict, tokenizer: Any, device: torch.device, packed: bool = False) -> dict:
    return to_device(collate_on_cpu(rows, tokenizer, packed), device)


def one_ahead(jobs: Iterable, make: Callable, threaded: bool) -> Iterator:
    """make(job) for each job, in order; with `threaded` one ahead of the caller, in a thread.

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


def load_batches(rows, index_lists, tokenizer, packed, device):
    """The batch of each list of row indices, in order.

    For a GPU the next batch is read, collated and pinned in a thread while this one is computed. On
    a CPU the thread would share the cores with the computation, and nothing is gained.
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
            yield to_device(batch, device)


class Piece(NamedTuple):
    """A micro-batch of this rank, as a slice of the window of an optimizer step."""
    places: slice
    weight: float  # 0 for a pair that only keeps the ranks in step


def cut(args, count, tokens, ranks, size=None):
    """This rank's micro-batches of `count` pairs -> [Piece]. `tokens`: of each of these pairs.

    A slice of a tensor on a GPU costs no copy; indices from the CPU would cost a blocking one.
    """
    size, by_tokens = size or args.micro_batch_size, None
    if not size:
        size, by_tokens = args.tokens_per_micro_batch, tokens
    pieces = data.micro_batches(np.arange(count), size, ranks.rank, ranks.size, by_tokens)
    return [Piece(slice(places[0], places[-1] + 1), weight) for places, weight in pieces]


# --- The models -----------------------------------------------------------------------------------

def autocast(dtype, device):
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def load_weights(args, name, dtype: str, device, frozen: bool = False):
    """The model of policy and reference: float32 weights where they are trained or averaged into,
    bfloat16 ones in a bfloat16 run where they are frozen, 4-bit ones with --quantize.

    A frozen model under ddp is float32 all the same: autocast computes its norms in the dtype of
    their weights, and the policy's are float32. Under fsdp the policy's are gathered in bfloat16.
    """
    fixed = args.adapter or args.lora_rank or (frozen and args.parallel == "fsdp")
    weights = getattr(torch, "float32" if dtype == "bfloat16" and not fixed else dtype)
    upcast = args.parallel != "fsdp" or dtype == "float64"  # else where the shards arrive
    return load_model(str(name), weights, device, bool(args.quantize), upcast)


def load_policy(args, source, newest, dtype: str, device):
    """The model to train: all of it, or an adapter on a frozen base, of which a frozen copy may be
    the reference. `newest` is the checkpoint to resume from, or None."""
    adapted = args.adapter or args.lora_rank
    model = load_weights(args, source if adapted else newest or source, dtype, device)
    if adapted and (newest or args.adapter):
        load_adapter(model, newest or args.adapter)
    elif adapted:
        settings = LoraSettings(
            args.lora_rank, args.lora_alpha, args.lora_dropout, args.rslora, args.dora)
        add_adapter(model, "policy", find_targets(model, args.lora_target), settings, args.seed)
    if args.adapter and args.ref in ("adapter", "cache") and not args.ref_model:
        load_adapter(model, args.adapter, "reference", trainable=False)
    if args.gradient_checkpointing:
        options = {"use_reentrant": False}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    return SequenceLogps(model)


def load_reference(args, policy, source, dtype: str, ranks):
    """-> what preference_step calls as its reference, or None without one."""
    if args.ref == "none":
        return None
    if args.ref == "model" or args.ref_model or args.ref == "cache" and not lora_layers(policy):
        frozen = not args.sync_ref_every  # a reference that moves adds up small steps in float32

        def make(device):
            model = load_weights(args, args.ref_model or source, dtype, device, frozen)
            return SequenceLogps(model).requires_grad_(False)

        return place(make, ranks, args.parallel, dtype)
    name = "reference" if args.adapter and args.ref != "adapter_off" else None

    def reference(**inputs):
        with use_adapter(policy.model, name):
            return policy(**inputs)

    return reference


def check_model(args, model, tokenizer):
    """Refuse what would otherwise be an index out of range inside the model, at some later row."""
    words = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > words:
        raise ValueError(f"--model {args.model}: {len(tokenizer)} tokens in its tokenizer, "
                         f"{words} in its embedding: not a pair")
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    if args.max_length > positions:
        raise ValueError(f"--max_length {args.max_length}: the model has {positions} positions; "
                         f"pass {positions} or less")


def moving_tensors(args, policy, reference):
    """{name: tensor} of a reference that moves.

    Ask again each time instead of keeping it: FSDP may replace its shards at the first forward.
    """
    if not args.sync_ref_every:
        return {}
    if args.ref == "adapter":
        return adapter_tensors(policy.model, "reference")
    return reference.state_dict()


@torch.no_grad()
def move_reference(args, policy, reference):
    """TR-DPO (arXiv:2404.09656): θ_ref <- α θ + (1 − α) θ_ref, buffers too."""
    source = policy.state_dict()
    if args.ref == "adapter":
        source = adapter_tensors(policy.model, "policy")
    for name, tensor in moving_tensors(args, policy, reference).items():
        target = source[name]
        if tensor.is_floating_point():
            target = torch.lerp(tensor, target.to(tensor.dtype), args.sync_ref_alpha)
        tensor.copy_(target)


def fingerprint(policy, reference, ranks):
    """A hash of the weights that no step changes: the reference's, and those below an adapter.

    A collective: all ranks must call it.
    """
    fixed = {}
    if isinstance(reference, torch.nn.Module):
        fixed |= reference.state_dict(prefix="reference.")
    if lora_layers(policy):
        for name, tensor in policy.state_dict().items():
            if not name.endswith(".policy"):
                fixed[name] = tensor
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(fixed.items()):
        tensor = whole(tensor)
        if tensor.is_floating_point():  # a frozen model may be float32 or bfloat16: see load_weights
            tensor = tensor.bfloat16()
        if ranks.rank == 0:
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return broadcast(digest.hexdigest(), ranks)


def choose_attention(args, models, rows, dtype, ranks):
    """Settle --attention auto -> "packed" or "padded", and a line that says which and why.

    Every rank tries the model on packed rows; if it fails on one rank, all ranks use padded rows.
    Padded rows lose their mask if the model does not need it.
    """
    reason = None
    if args.attention != "padded":
        reason = reason_to_pad(args, models, rows, dtype, ranks)
        if reason is None:
            return "packed", "attention: packed rows"
        if args.attention == "packed":
            raise ValueError(f"--attention packed: {reason}")
    for module in models:
        module.needs_mask = try_rows(packing.can_drop_mask, module, dtype, ranks) is not None
    line = "attention: padded rows"
    return "padded", line if reason is None else f"{line}; {reason}"


def reason_to_pad(args, models, rows, dtype, ranks):
    """None if rows can be packed and, with --attention auto, gain from it."""
    lengths = [data.column(rows, name) for name in ("prompt_length", "chosen_length", "tokens")]
    size = args.micro_batch_size
    if not size:
        size = max(1, args.tokens_per_micro_batch // int(lengths[2].mean()))
    hidden = models[0].model.get_input_embeddings().embedding_dim
    if args.attention == "auto" and not packing.is_faster(*lengths, size, hidden):
        return "packed, rows as short as these would be slower"
    for module in models:
        reason = try_rows(packing.can_pack, module, dtype, ranks)
        if reason is not None:
            return reason
    return None


def try_rows(verdict, module, dtype, ranks):
    """packing.can_pack or can_drop_mask on all ranks -> None, or the first rank's reason."""
    guard = contextlib.nullcontext()
    if isinstance(module, FSDPModule):
        guard = failing_together(ranks)
    # Without the adapter: its dropout would be noise here.
    with autocast(dtype, ranks.device), use_adapter(module.model, None), guard:
        reason = verdict(module)
    # An exception may have left FSDP in the middle of a forward.
    reset_shards(module)
    return first_reason(reason, ranks)


@contextlib.contextmanager
def failing_together(ranks):
    """Inside, packed attention that raises on one rank raises on all of them, at the same call.

    FSDP gathers weights in every block. If one rank left its forward alone, the others would wait
    for it in the next gather until they time out.
    """
    def attention(*inputs, **options):
        reason = None
        try:
            output = packing.attention(*inputs, **options)
        except Exception as error:  # of any kernel; raised again on every rank
            reason = f"{type(error).__name__} on rank {ranks.rank}: {error}"
        reason = first_reason(reason, ranks)
        if reason is not None:
            raise RuntimeError(reason)
        return output

    AttentionInterface.register(packing.NAME, attention)
    try:
        yield
    finally:
        AttentionInterface.register(packing.NAME, packing.attention)


def memory_line(policy, reference):
    """What is in memory besides activations, on each rank."""
    def size(tensors):
        return sum(shard(tensor).numel() * tensor.element_size() for tensor in tensors)

    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    second = []
    if isinstance(reference, torch.nn.Module):
        second = [*reference.parameters(), *reference.buffers()]
    parts = {
        "weights": size([*policy.parameters(), *policy.buffers()]),
        "gradients": size(trained),
        "optimizer": 2 * size(trained),
        "reference": size(second),
    }
    count = sum(parameter.numel() for parameter in policy.parameters())
    for module in policy.modules():
        if isinstance(module, NF4Linear):
            count += module.shape.numel()
    sizes = ", ".join(f"{name} {part / 2**20:,.1f} MiB" for name, part in parts.items())
    return (f"{count:,} parameters, {sum(p.numel() for p in trained):,} of them trained; "
            f"on each rank {sizes}")


def make_optimizer(model, lr, device):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("the policy has no trainable parameter: every one is frozen")
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=fused)


def saved_tensors(model):
    """{name: tensor} of what is saved: the adapter, if there is one, else the whole model."""
    if lora_layers(model):
        return adapter_tensors(model, "policy")
    return model.state_dict(keep_vars=True)


def save(model, tokenizer, folder, base, ranks, **extra):
    """Save the model, or the adapter on `base`. All ranks bring their shards, rank 0 writes."""
    tensors = gather_tensors(saved_tensors(model), ranks)
    if ranks.rank > 0:
        return
    if lora_layers(model):
        save_adapter(model, tokenizer, folder, base, tensors=tensors, **extra)
    else:
        save_model(model, tokenizer, folder, tensors=tensors, **extra)


def checkpoint_bytes(args, model, reference):
    """Bytes of a checkpoint: what is saved, AdamW's two moments, and a reference that moves."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moving = moving_tensors(args, model, reference)
    return (tensor_bytes(saved_tensors(model.model).values()) + 2 * tensor_bytes(trained)
            + tensor_bytes(moving.values()))


# --- The reference's log-probs, computed once -----------------------------------------------------

# How far apart rounding may put one log-prob in two batches of different shapes: in nats per root
# of the answer's tokens, since the errors of single tokens add up like a random walk. Measured on
# SmolLM2-135M (30 layers) on a CPU, 32 answers of 9 to 190 tokens of HH-RLHF, padded and packed in
# batches of 1, 4, 8 and 16 pairs: at most 9e-6 in float32 and 0.098 under bfloat16 autocast (rms
# 0.028). The bounds are 11 and 4 times that. TF32, which a GPU takes for float32, has 3 bits more
# than bfloat16, so an eighth of its bound; TF32 and float64 are not measured.
ROUNDING = {"float64": 1e-9, "float32": 1e-4, "tf32": 0.05, "bfloat16": 0.4}


def rounding(dtype, lengths, device):
    """How far apart rounding may put log-probs, in nats, of answers with so many tokens."""
    if dtype == "float32" and device.type == "cuda":
        dtype = "tf32"
    return ROUNDING[dtype] * lengths ** 0.5


def cache_key(args, weights, splits, dtype):
    """A hash of all that the log-probs depend on: weights, token ids, dtype, weights of tokens."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(f"{weights} {dtype} {args.ld_alpha} {args.quantize}".encode())
    for rows in splits:
        columns = rows.select_columns(["id", "prompt_ids", "chosen_ids", "rejected_ids"])
        for batch in columns.iter(1000):
            digest.update(json.dumps(batch).encode())
    return digest.hexdigest()


@torch.no_grad()
def of_all_pairs(compute, batches, pieces, count, ranks):
    """{name: (count,)} in fp64, on every rank, of what compute(batch) -> {name: (B,)} returns.

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


def reference_logps(args, reference, rows, indices, tokenizer, task, ranks, title=None):
    """(len(indices), 2) log-probs of chosen and rejected; a bar if there is a title."""
    def compute(batch):
        with autocast(task.dtype, ranks.device):
            out = concatenated_forward(reference, batch, ld_alpha=args.ld_alpha)
        return {side: out[f"{side}_logps"] for side in ("chosen", "rejected")}

    tokens = data.column(rows, "tokens")[indices]
    pieces = cut(args, len(indices), tokens, ranks, args.ref_batch_size)
    index_lists = [indices[piece.places] for piece in pieces]
    hidden = title is None or ranks.rank > 0
    bar = tqdm.tqdm(pieces, title, disable=hidden, mininterval=bar_interval())
    batches = load_batches(rows, index_lists, tokenizer, task.packed, ranks.device)
    with contextlib.closing(batches):
        table = of_all_pairs(compute, batches, bar, len(indices), ranks)
    return torch.stack([table["chosen"], table["rejected"]], 1).cpu()


def cache_reference(args, reference, splits, weights, tokenizer, task, ranks):
    """Add the columns ref_chosen_logp and ref_rejected_logp to the splits.

    They are read from a file, which all ranks make together if it is not there.
    """
    key = cache_key(args, weights, splits, task.dtype) if ranks.rank == 0 else None
    path = pathlib.Path("runs") / "references" / f"{broadcast(key, ranks)}.safetensors"
    splits = dict(zip(("train", "eval"), splits))
    exists = broadcast(path.exists(), ranks)
    if not exists:
        tables = {}
        for name, rows in splits.items():
            tables[name] = torch.zeros(0, 2)
            if len(rows):
                indices, title = np.arange(len(rows)), f"reference, {name}"
                tables[name] = reference_logps(args, reference, rows, indices, tokenizer, task,
                                               ranks, title)
            ids = "\n".join(rows["id"]).encode()
            tables[f"{name}_ids"] = torch.tensor(list(ids), dtype=torch.uint8)
        if ranks.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            save_file(tables, temporary)
            os.replace(temporary, path)
    barrier(ranks)
    with_logps = []
    for name, rows in splits.items():
        if len(rows):
            table = read_cache(path, name, rows)
            check_cache(args, path, table, reference, rows, tokenizer, task, ranks)
            if ranks.rank == 0:
                source = "read from" if exists else "kept in"
                print(f"reference of {len(rows)} {name} rows {source} {path}")
            rows = rows.add_column("ref_chosen_logp", table[:, 0].tolist())
            rows = rows.add_column("ref_rejected_logp", table[:, 1].tolist())
        with_logps.append(rows)
    return with_logps


def read_cache(path, name, rows):
    """(rows, 2) log-probs of a split from the file."""
    try:
        tables = load_file(path)
        table, ids = tables[name], bytes(tables[f"{name}_ids"].tolist()).decode().split("\n")
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); "
                         "delete it, and it is made again") from error
    if ids != list(rows["id"]) or len(table) != len(rows) or not table.isfinite().all():
        raise ValueError(f"{path}: does not hold the log-probs of every {name} row; "
                         "delete it, and it is made again")
    return table


def check_cache(args, path, table, reference, rows, tokenizer, task, ranks):
    """Compute the log-probs of four rows again and compare them with the file's."""
    some = np.linspace(0, len(rows) - 1, min(4, len(rows))).astype(int)
    again = reference_logps(args, reference, rows, some, tokenizer, task, ranks)
    bound = rounding(task.dtype, answer_lengths(rows)[some], task.device)
    excess = (again - table[some]).abs() / bound
    if excess.max() <= 1:
        return
    worst = int(excess.amax(1).argmax())
    row = rows[int(some[worst])]["id"]
    raise ValueError(f"{path}: holds other log-probs than the reference gives now for row {row}: "
                     f"{table[some][worst].tolist()} and {again[worst].tolist()}; "
                     "delete it, and it is made again")


def answer_lengths(rows):
    """(rows, 2) tokens of the chosen and of the rejected answers."""
    chosen = data.column(rows, "chosen_length")
    rejected = data.column(rows, "tokens") - data.column(rows, "prompt_length") - chosen
    return torch.from_numpy(np.stack([chosen, rejected], 1))


# --- One optimizer step ---------------------------------------------------------------------------

class Task(NamedTuple):
    """What is computed from a batch: the same in training, evaluation and the step-0 check."""
    loss: Callable
    hyper: dict
    options: dict  # of the log-probs: reference_free, wpo, ld_alpha
    link: dict  # between log-ratios and loss: f_divergence, f_alpha
    dtype: str
    device: torch.device
    packed: bool = False

    @property
    def compares_pairs(self):
        """Does the loss have to see all pairs of a step at once?"""
        return "batch" in self.loss.marks


class Step(NamedTuple):
    """What one optimizer step is computed from, besides its batches."""
    number: int
    count: int  # pairs, all ranks together
    pieces: list[Piece]  # this rank's micro-batches
    state: dict  # what a loss may read of the whole step: mean_chosen_length, delta


def pair_logps(task, policy, reference, batch, **more):
    """{name: (B,)} of everything that the loss can be told of each pair."""
    options = task.options | more
    with autocast(task.dtype, task.device):
        return preference_logps(policy, reference, batch, task.loss, **options)


def pair_losses(task, policy, reference, batch, state):
    """-> losses (B,) with a graph, {metric: (B,)} without."""
    with autocast(task.dtype, task.device):
        return preference_step(policy, reference, batch, task.loss, task.hyper, state,
                               **task.options, **task.link)


def train_step(task: Task, policy: torch.nn.Module, reference: Callable | None,
               optimizer: torch.optim.Optimizer, batches: Iterator, step: Step,
               max_grad_norm: float, stopping: bool, ranks: Ranks) -> dict[str, float]:
    """Update the policy by the mean loss over the pairs of one step -> {metric: mean over them}.

    batches    yields this rank's micro-batches; a loss that compares pairs takes all of them twice
    stopping   did this rank catch a signal? The metric "stop" is above 0 if any rank did

    A GPU is waited for once, where the metrics are read.
    """
    model, pieces = bare(policy), step.pieces
    # A loss that compares pairs needs all of them at once, but only their log-probs: compute these
    # without a graph, and from them dL/dlogp, by which each micro-batch is weighted below.
    if task.compares_pairs:
        def logps(batch):
            return pair_logps(task, model, reference, batch)

        tensors = of_all_pairs(logps, batches, pieces, step.count, ranks)
        slopes, all_metrics = logp_gradients(tensors | step.state, task.loss, task.hyper,
                                             **task.link)

    # Forward and backward, one micro-batch at a time.
    totals = {"stop": torch.full((), float(stopping), dtype=torch.float64, device=ranks.device)}
    seen = []  # of each micro-batch, for the message about a loss that is not finite
    for piece, batch in zip(pieces, batches):
        sync_gradients(policy, on=piece is pieces[-1])
        if task.compares_pairs:
            # The slopes include the reference.
            out = pair_logps(task, policy, None, batch, reference_free=True)
            losses = sum(slopes[name][piece.places] * out[name] for name in slopes)  # (B,)
            metrics = {name: values[piece.places] for name, values in all_metrics.items()}
        else:
            losses, metrics = pair_losses(task, policy, reference, batch, step.state)
        # The mean over the pairs of all ranks; DDP and FSDP divide by the number of ranks.
        (piece.weight * losses.sum() * ranks.size / step.count).backward()
        add(totals, metrics, piece.weight)
        seen.append((batch["id"], metrics))

    # Clip, read the metrics, and update.
    norm = clip_gradients(policy, max_grad_norm)
    values = mean_over_ranks(totals, norm, step.count, ranks)
    stop_if_not_finite(step.number, values, seen, ranks, policy)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return values


def add(totals, metrics, weight=1.0):
    """Add the pairs of a micro-batch to the sums of its step."""
    for name, values in metrics.items():
        totals[name] = totals.get(name, 0) + weight * values.double().sum()


def mean_over_ranks(totals, norm, count, ranks):
    """{metric: sum on this rank} -> {metric: mean over `count` pairs on all ranks}, + grad_norm.

    One all-reduce, one division, and one copy from the GPU.
    """
    sums = sum_over_ranks(torch.stack(list(totals.values())), ranks)
    *means, norm = torch.cat([sums / count, norm.double()[None]]).cpu().tolist()
    return dict(zip(totals, means)) | {"grad_norm": norm}


def stop_if_not_finite(number, values, seen, ranks=None, policy=None):
    """Raise if the loss or the gradient is not finite, with the rows or weights that it comes from.

    After the next update it would be in every weight.
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


# --- Before the first step, and between steps -----------------------------------------------------

@torch.no_grad()
def check_start(task, policy, reference, batch, cached):
    """Check that policy and reference are equal before the first update -> the loss at zero margin.

    Else training would begin from a log-ratio that is an error of this program or of the setup.
    Computed in the same way, both give the same loss; a `cached` reference was computed in batches
    of other shapes, so there the log-probs are compared, with room for rounding.
    """
    tensors = pair_logps(task, policy, reference, batch)
    names = [name for name in tensors if name.startswith("policy_")]
    equal = {name.replace("policy_", "ref_"): tensors[name] for name in names}
    found, metrics = preference_loss(tensors, task.loss, task.hyper, **task.link)
    expected, _ = preference_loss(tensors | equal, task.loss, task.hyper, **task.link)
    stop_if_not_finite(0, {"loss": found.sum().item(), "grad_norm": 0.0}, [(batch["id"], metrics)])
    excess = (found - expected).abs() / (1e-5 + 1e-5 * expected.abs())  # (B,), above 1: unequal
    if cached:
        excess = torch.zeros_like(found)
        for name in names:
            lengths = tensors[name.removeprefix("policy_").replace("logps", "lengths")]
            distance = (tensors[name] - tensors[name.replace("policy_", "ref_")]).abs()
            excess = excess.maximum(distance / rounding(task.dtype, lengths, task.device))
    worst = int(excess.argmax())
    if excess[worst] > 1:
        raise ValueError(
            f"before the first step the loss of {batch['id'][worst]} is {found[worst]:.6f}, but "
            f"{expected[worst]:.6f} where policy and reference are equal. So they are not: look "
            "for another dtype on one side, dropout left on, an adapter on one side (one that "
            "came from SFT is part of the reference too: --ref adapter), or a reference that is "
            "not what the policy starts from (if that is meant, name it with --ref_model)")
    return expected.mean().item()


def evaluate(args, task, model, reference, rows, delta, tokenizer, ranks):
    """Mean metrics over the held-out rows, all of which a loss that compares pairs sees at once."""
    def logps(batch):
        return pair_logps(task, model, reference, batch)

    indices = np.arange(len(rows))
    pieces = cut(args, len(rows), data.column(rows, "tokens"), ranks)
    index_lists = [indices[piece.places] for piece in pieces]
    batches = load_batches(rows, index_lists, tokenizer, task.packed, task.device)
    with contextlib.closing(batches):
        tensors = of_all_pairs(logps, batches, pieces, len(rows), ranks)
    tensors["mean_chosen_length"] = float(data.column(rows, "chosen_length").mean())
    tensors["delta"] = delta
    _, metrics = preference_loss(tensors, task.loss, task.hyper, **task.link)
    means = torch.stack([values.mean() for values in metrics.values()]).cpu().tolist()
    return dict(zip(metrics, means))


def row_window(args, number, count):
    """Row indices of the pairs of optimizer step `number`, on all ranks."""
    return data.window(number - 1, count, args.batch_size, args.seed, args.shuffle)


def training_batches(args, task, rows, start, steps, tokenizer, ranks):
    """This rank's micro-batches of all steps after `start`, in the order that train_step takes."""
    tokens = data.column(rows, "tokens")

    def index_lists():
        for number in range(start + 1, steps + 1):
            window = row_window(args, number, len(rows))
            for _ in range(2 if task.compares_pairs else 1):
                for piece in cut(args, len(window), tokens[window], ranks):
                    yield window[piece.places]

    return load_batches(rows, index_lists(), tokenizer, task.packed, task.device)


def bar_interval():
    """Seconds between updates of a progress bar: fewer where it goes to a file."""
    return 0.2 if sys.stderr.isatty() else 5


class Log:
    """config.json, metrics.jsonl, the bar and the lines between: on rank 0, silent elsewhere."""

    def __init__(self, folder, flags, start, steps, ranks):
        self.on, self.path = ranks.rank == 0, folder / "metrics.jsonl"
        self.bar = tqdm.tqdm(total=steps, initial=start, desc=flags["loss"], disable=not self.on,
                             dynamic_ncols=True, mininterval=bar_interval())
        if not self.on:
            return
        write(folder / "config.json", json.dumps({"flags": flags}, indent=2) + "\n")
        # Keep the rows up to the checkpoint: later steps are taken again. The last row may be torn.
        kept = []
        for row in self.path.read_text().splitlines() if start else ():
            if row.endswith("}") and json.loads(row)["step"] <= start:
                kept.append(row + "\n")
        write(self.path, "".join(kept))

    def row(self, step, split, values):
        if self.on:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, "split": split, **values}) + "\n")

    def tick(self, values):
        text = brief(values, {"tokens_per_second": "tokens/s"})
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def say(self, text):
        if self.on:
            self.bar.write(text)


BRIEF = {
    "loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin",
    "world/reward": "reward", "world/kl": "KL", "world/objective": "J", "world/optimum": "J*",
    "world/share": "share", "world/correlation": "correlation", "world/mass": "mass",
}


def brief(values, more={}):
    names = {name: short for name, short in (BRIEF | more).items() if name in values}
    return " ".join(f"{short} {values[name]:.4g}" for name, short in names.items())


@contextlib.contextmanager
def caught_signals():
    """A list of the caught Ctrl-C or SIGTERM, for the loop to see; a second ends the process."""
    caught, before = [], {}

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def choose_folder(args, ranks):
    """--output_dir, or the first free folder below runs/. A folder with a run is only continued."""
    name = args.output_dir
    if name is None:
        base = "runs/" + re.sub("[:,]", "+", args.loss)
        names = itertools.chain([base], (f"{base}-{i}" for i in itertools.count(2)))
        name = broadcast(next(name for name in names if not os.path.exists(name)), ranks)
    folder = pathlib.Path(name)
    if folder.exists():  # while another run writes there, its content is not to be judged
        with claim(folder, args.resume, ranks):
            pass
    return folder


def use_deterministic_kernels(on):
    """Set torch's switch. On a CPU the kernels used here are deterministic without it."""
    if on:
        # cuBLAS reads this when it is first used: see torch.use_deterministic_algorithms.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, changes no result
    torch.use_deterministic_algorithms(on)


# --- The loop -------------------------------------------------------------------------------------

def main(argv: list[str], ranks: Ranks) -> bool:
    """Train. Returns whether a signal ended it early."""
    args, loss, hyper = parse_args(argv)
    say = print if ranks.rank == 0 else lambda text: None
    home = make_world(ranks) if "world" in (args.model, args.dataset) else None
    folder = choose_folder(args, ranks)
    if args.resume and is_complete(folder):
        say(f"the run in {folder} is complete")
        return False
    if args.parallel == "fsdp" and ranks.size == 1:
        raise ValueError("--parallel fsdp: one process alone has nothing to share; "
                         "start several by torchrun")
    use_deterministic_kernels(args.deterministic)
    newest, saved = newest_checkpoint(folder, ranks) if args.resume else (None, {})

    # --- the models: policy and reference are loaded by the same function, in the same dtype
    dtype = args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if ranks.device.type == "cuda" else "float32"
    source = str(home / "reference") if args.model == "world" else args.model
    tokenizer = load_tokenizer(source)
    if args.chat_template:
        tokenizer.chat_template = data.read_template(args.chat_template)

    def make_policy(device):
        return load_policy(args, source, newest, dtype, device)

    model = place(make_policy, ranks, args.parallel, dtype)
    check_model(args, model.model, tokenizer)
    reference = load_reference(args, model, source, dtype, ranks)
    weights = fingerprint(model, reference, ranks)

    # --- the rows
    rows, held_out = load_rows(args, loss, tokenizer, home, ranks)
    fixed = {"rows": data.digest(rows), "weights": weights}
    lengths, tokens = data.column(rows, "chosen_length"), data.column(rows, "tokens")
    steps = args.max_steps or args.epochs * math.ceil(len(rows) / args.batch_size)
    warmup = steps // 10 if args.warmup_steps is None else args.warmup_steps

    # --- optimizer and schedule, from the start or from the checkpoint; before any forward, since
    # under FSDP a forward may leave gathered weights in place of the shards that are to be trained
    optimizer = make_optimizer(model, args.lr, ranks.device)
    scheduler = get_scheduler(SCHEDULES[args.lr_schedule], optimizer, warmup, steps)
    start, delta = 0, 0.0
    if newest:
        tensors = optimizer_tensors(model, optimizer, moving_tensors(args, model, reference))
        start, delta = load_checkpoint(newest, saved, fixed, tensors, optimizer, scheduler, ranks)
    size = checkpoint_bytes(args, model, reference)
    keep, plan = plan_checkpoints(folder, size, start, steps, args.save_every,
                                  args.keep_checkpoints, ranks)

    # --- how rows are laid out, and the reference's log-probs if they are computed once
    modules = [module for module in (model, reference) if isinstance(module, SequenceLogps)]
    attention, line = choose_attention(args, modules, rows, dtype, ranks)
    if args.compile:  # policy and reference, so that they round alike
        for module in modules:
            compile_blocks(module.model)
    del modules
    say(line)
    options, link = variants(args)
    task = Task(loss, hyper, options, link, dtype, ranks.device, attention == "packed")
    if args.ref == "cache":
        splits = rows, held_out
        rows, held_out = cache_reference(args, reference, splits, weights, tokenizer, task, ranks)
        reference = None  # frees its memory

    policy = wrap(model, ranks)
    flags = vars(args) | {
        "output_dir": str(folder), "attention": attention, "warmup_steps": warmup,
    }
    introduce(args, task, model, reference, (rows, held_out), steps, folder, plan, ranks)
    if start:
        say(f"resumed after step {start}")
    elif args.ref != "none" and args.ref_model:
        say(f"no step-0 check: --ref_model {args.ref_model} is another model on purpose")
    elif args.ref != "none":
        # The two shortest rows of the first step: an error shows in any row, and long ones take time.
        first = data.window(0, len(rows), args.batch_size, args.seed, args.shuffle)
        first = first[np.argsort(tokens[first], kind="stable")[:2]]
        batch = collate(rows[first], tokenizer, ranks.device, task.packed)
        value = check_start(task, model, reference, batch, args.ref == "cache")
        say(f"step-0 check: the loss is {value:.4f}, as it must be where policy = reference")

    batches = training_batches(args, task, rows, start, steps, tokenizer, ranks)
    with (claim(folder, args.resume, ranks), spared(folder), caught_signals() as stopped,
          contextlib.closing(batches)):
        log = Log(folder, flags, start, steps, ranks)
        since, count = time.perf_counter(), 0
        for number in range(start + 1, steps + 1):
            # The pairs of this step, and this rank's share of them in micro-batches.
            window = row_window(args, number, len(rows))
            pieces = cut(args, len(window), tokens[window], ranks)
            state = {"mean_chosen_length": float(lengths[window].mean()), "delta": delta}
            step = Step(number, len(window), pieces, state)

            # The dropout of an adapter, if it has any, follows from seed, step and rank.
            torch.manual_seed(args.seed + 1_000_003 * (number * ranks.size + ranks.rank))
            values = {"lr": scheduler.get_last_lr()[0]}
            values |= train_step(task, policy, reference, optimizer, batches, step,
                                 args.max_grad_norm, bool(stopped), ranks)
            scheduler.step()
            if "delta" in tensor_arguments(loss):
                values["delta"] = delta
                delta = update_delta(delta, values["rewards/chosen"], values["rewards/rejected"])
            if args.sync_ref_every and number % args.sync_ref_every == 0:
                move_reference(args, model, reference)

            # The bar, and a row of metrics.jsonl.
            stopping, last = values.pop("stop") > 0, number == steps
            count += int(tokens[window].sum())
            values["tokens_per_second"] = count / (time.perf_counter() - since)
            log.tick(values)
            if number % args.log_every == 0 or last:
                log.row(number, "train", values)
                since, count = time.perf_counter(), 0

            # Evaluation: on the held-out rows and, in the world, against the truth.
            pause, splits = time.perf_counter(), {}
            if last or args.eval_every and number % args.eval_every == 0:
                if len(held_out):
                    splits["eval"] = evaluate(args, task, model, reference, held_out, delta,
                                              tokenizer, ranks)
                if home:
                    splits["world"] = world_metrics(model, home, tokenizer, loss, hyper,
                                                    ranks.device)
                for split, metrics in splits.items():
                    log.row(number, split, metrics)
                    log.say(f"step {number} {split}: {brief(metrics)}")

            # A checkpoint.
            due = args.save_every and number % args.save_every == 0
            if not last and (stopping or due):
                def save_model_in(folder):
                    save(model.model, tokenizer, folder, source, ranks)

                moving = moving_tensors(args, model, reference)
                tensors = optimizer_tensors(model, optimizer, moving)
                state = fixed | {
                    "scheduler": scheduler.state_dict(), "delta": delta, "flags": flags,
                }
                save_checkpoint(folder, number, save_model_in, tensors, state, keep, ranks)
                if stopping:
                    log.bar.close()
                    say(f"stopped after step {number} of {steps}; to go on: "
                        f"python train.py --output_dir {folder} --resume")
                    return True
            since += time.perf_counter() - pause

        log.bar.close()
        save(model.model, tokenizer, folder, source, ranks, flags=flags)
        say(f"saved in {folder}" + (sum_up(splits["world"]) if home else ""))
    return False


def introduce(args, task, model, reference, splits, steps, folder, plan, ranks):
    """Print what the run will do, before its first step."""
    if ranks.rank > 0:
        return
    rows, held_out = splits
    where = f"{ranks.size} x {ranks.device.type}"
    if ranks.size > 1:
        where += f", {args.parallel}"
    print(f"{args.loss} {task.hyper}: {steps} steps of {args.batch_size} pairs from {len(rows)} "
          f"rows, {len(held_out)} rows held out; {task.dtype} on {where}; {folder}")
    adapted = lora_layers(model.model)
    if adapted:
        kinds = sorted({path.rsplit(".", 1)[-1] for path in adapted})
        print(f"adapter on {len(adapted)} layers: {', '.join(kinds)}")
    print(memory_line(model, reference))
    print(plan)
    if task.compares_pairs:
        print(f"{args.loss} compares all {args.batch_size} pairs of a step with each other, "
              "which costs a second forward")


def explain(error):
    """A sentence for what is not the program's fault; None for what is."""
    raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    ours = raised_in.parent == pathlib.Path(__file__).parent
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, (ValueError, FloatingPointError)) and ours:
        return str(error)
    if isinstance(error, (OSError, SafetensorError)):
        return str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in first:
        return (f"out of memory ({first}). What needs less, the cheapest first: a lower "
                "--micro_batch_size, --gradient_checkpointing, --ref cache, a lower --max_length, "
                "--parallel fsdp, --lora_rank, --quantize nf4")
    if not isinstance(error, RuntimeError):
        return None
    if "does not have a deterministic implementation" in first:
        return f"--deterministic: {first}"
    connection = "onnection (closed|reset)|gloo|NCCL|[Tt]imed out"
    if "RANK" in os.environ and re.search(connection, str(error)):
        return (f"another process of this run has ended, or does not answer ({first[:120]}); what "
                "it printed says why. What was saved is whole: start again with --output_dir and "
                "--resume")
    return None


def run():
    """main, with one line and exit status 2 for errors of users; a traceback only for bugs."""
    rank = int(os.environ.get("RANK", 0))
    try:
        ranks = init_distributed()
        stopped = main(sys.argv[1:], ranks)
        leave_distributed(ranks)
        sys.exit(130 if stopped else 0)
    except (ValueError, ArithmeticError, RuntimeError, MemoryError, OSError,
            SafetensorError) as error:
        sentence = explain(error)
        if sentence is None:
            raise
        prefix = f"error on rank {rank}" if rank else "error"
        print(f"{prefix}: {sentence}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted before the first step: nothing was saved", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
