"""Train a policy on preferences.

    python train.py                                                    # the embedded world: CPU, no download, a minute
    python train.py --loss ipo --beta 0.2 --model ./sft-model --dataset pairs.jsonl --output_dir runs/ipo
    torchrun --nproc_per_node 8 train.py --loss sigmoid --model org/name --dataset org/pairs
    python train.py --output_dir runs/ipo --resume                     # go on where it stopped

The same loop runs on one core and on many GPUs. `main` is that loop, at the end of the file; what it calls stands above it.
Bad input is a ValueError with a sentence for the user, in every module; `run` prints it and exits with status 2.
"""
import argparse
import contextlib
import difflib
import fcntl
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

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import tqdm
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from transformers import get_scheduler

import data
import packing
import world
from data import at_least
from dpo import (SequenceLogps, check_variants, concatenated_forward, concatenated_inputs, logp_gradients, preference_logps, preference_loss,
                 preference_step)
from losses import LOSSES, find, hyperparameters, needs_reference, needs_rejected, tensor_arguments, update_delta
from lora import (
    adapter_tensors, add_adapter, find_targets, load_adapter, lora_layers, LoraSettings,
    NF4Linear, read_adapter, save_adapter, use_adapter,
)
from model import compile_blocks, load_model, load_tokenizer, new_model, save_model
from parallel import (
    barrier, broadcast, clip_gradients, gather, init_distributed, leave_distributed, place,
    Ranks, shard, sum_over_ranks, sync_gradients, whole, wrap,
)

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so says its checkpoint when one process saves alone

SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}  # our names: transformers'
FREE_ON_RESUME = {"resume", "log_every", "eval_every", "save_every", "keep_checkpoints", "output_dir", "parallel",
                  "attention", "compile", "profile"}  # change no weight, but by rounding


# --- Flags ------------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


class Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        told = any(action.default is nothing for nothing in (None, False, ..., argparse.SUPPRESS)) or "default" in action.help
        return action.help if told else f"{action.help} (default {action.default})"


def above_zero(text):
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
    return value


def true_or_false(text):
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text}")
    return text == "true"


def add_policy_flags(add, loss):
    """What is trained, and what it is compared with."""
    add("--adapter", help="start from this LoRA adapter, a folder of ours or of peft's, on top of --model")
    add("--lora_rank", type=at_least(1, int), help="train a new LoRA adapter of this rank, and nothing else")
    add("--lora_alpha", type=above_zero, help="its scale times its rank (default: twice the rank)")
    add("--lora_target", help="names of linear layers, as q_proj,v_proj, or a regular expression (default: all but the head)")
    add("--lora_dropout", type=at_least(0, float), default=0.0, help="of what enters the adapter")
    add("--rslora", action="store_true", help="scale by alpha over the root of the rank")
    add("--dora", action="store_true", help="train the norms of the weights apart from their directions")
    add("--quantize", choices=("nf4",), help="the frozen weights in 4 bits (QLoRA)")
    add("--gradient_checkpointing", action="store_true", help="recompute activations in backward: less memory, more time")
    if needs_reference(loss):
        add("--ref", choices=("model", "adapter_off", "adapter", "cache", "none"), help="the reference: a second model; the policy "
            "with its adapter off (default with --lora_rank); a frozen copy of the adapter it starts from (default with --adapter); "
            "log-probs computed once and kept on disk; none")
        add("--ref_model", help="the second model of --ref model (default: what the policy starts from)")
        add("--ref_batch_size", type=at_least(1, int), help="pairs per forward of --ref cache (default: micro_batch_size)")
        add("--sync_ref_every", type=at_least(1, int), help="TR-DPO: move the reference towards the policy after this many steps")
        add("--sync_ref_alpha", type=above_zero, help="by this share of the way (default 0.6)")


def build_parser(loss):
    """Every flag of a run with this loss: those of the trainer, and the loss's own keyword arguments."""
    parser = Parser(description=__doc__, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument_group("what to train on what").add_argument
    add("--loss", default="sigmoid", help=f"NAME, or a sum NAME:WEIGHT,NAME:WEIGHT, of {', '.join(LOSSES)}")
    add("--model", default="world", help="policy: a folder, a hub id, or world")
    add("--dataset", default="world", help="a file or folder (.jsonl .json .csv .parquet), a hub id, or world; several parts as "
        "NAME:SPLIT:SHARE,NAME:SPLIT:SHARE, where splits and shares may be left out")
    add("--eval_dataset", help="held-out rows; without it a share of the prompts is held out")
    add("--eval_share", type=at_least(0, float), help="share of the prompts to hold out (default 0.05; 0: none)")
    add("--output_dir", help="default: a new folder below runs/")
    add("--resume", action="store_true", help="go on from the newest checkpoint of --output_dir, with its flags")

    add_policy_flags(parser.add_argument_group("the policy and its reference").add_argument, loss)

    add = parser.add_argument_group("the optimizer").add_argument
    add("--batch_size", type=at_least(1, int), default=64, help="pairs per optimizer step, all ranks together")
    add("--micro_batch_size", type=at_least(1, int), help="pairs per forward on one rank: less saves memory (default 4)")
    add("--tokens_per_micro_batch", type=at_least(1, int), help="in place of a number of pairs: as many as have so many tokens, prompts once")
    add("--epochs", type=at_least(1, int), help="times through the data (default 1)")
    add("--max_steps", type=at_least(1, int), help="optimizer steps, in place of --epochs")
    add("--lr", type=above_zero, help="peak learning rate of AdamW (default 5e-7, for sft 1e-5; with an adapter ten times that)")
    add("--lr_schedule", choices=SCHEDULES, default="linear", help="what follows the warm-up")
    add("--warmup_steps", type=at_least(0, int), help="default: a tenth of the steps")
    add("--max_grad_norm", type=above_zero, default=1.0, help="gradients are clipped to this norm")

    add = parser.add_argument_group("the rows").add_argument
    data.add_flags(add)
    add("--shuffle", type=true_or_false, default=True, metavar="true|false", help="false: the order of the file")
    add("--seed", type=at_least(0, int), default=0, help="of the order of the rows")

    add = parser.add_argument_group("the run").add_argument
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="fsdp: weights, gradients and optimizer in shards, one on each rank")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float64"), default="auto",
        help="of the computation; bfloat16: autocast over float32 weights; auto: bfloat16 on a GPU, float32 on a CPU")
    add("--attention", choices=("auto", "packed", "padded"), default="auto", help="packed: each prompt once and no padding, by `sdpa` below; "
        "auto: where that is right and faster")
    add("--compile", action="store_true", help="torch.compile the MLPs and norms: the first steps wait for the compiler")
    add("--profile", action="store_true", help="log the seconds that go into data, reference, forward, backward, optimizer and logging")
    add("--log_every", type=at_least(1, int), default=10, help="steps between rows of metrics.jsonl")
    add("--eval_every", type=at_least(0, int), default=200, help="steps between evaluations (0: at the end only)")
    add("--save_every", type=at_least(0, int), default=200, help="steps between checkpoints (0: only when interrupted)")
    add("--keep_checkpoints", type=at_least(1, int), default=2, help="older ones are removed")

    add = parser.add_argument_group("variants of a loss, each where it is valid").add_argument
    add("--reference_free", action="store_true", help="zeros in place of the reference's log-probs")
    add("--f_divergence", choices=("reverse_kl", "forward_kl", "js", "alpha"), help="f-DPO: losses.f_divergence_score as the link")
    add("--f_alpha", type=float, help="the alpha of --f_divergence alpha, in (0, 1] (default 0.5)")
    add("--wpo", action="store_true", help="WPO: weigh a pair by how probable its answers are under the policy")
    add("--ld_alpha", type=float, default=1.0, help="LD-DPO: weight of the tokens beyond the shorter answer's length, in [0, 1]")

    add = parser.add_argument_group(f"the loss {loss.__name__}").add_argument
    for name, default in hyperparameters(loss).items():
        add(f"--{name}", type=float, default=default, help="see the page of the loss in losses.py")
    return parser


def parse_args(argv):
    """-> args, loss function, its hyper-parameters. The loss is read first, then the flags that it makes."""
    first = Parser(add_help=False, allow_abbrev=False)
    for flag in ("--loss", "--dataset", "--output_dir", "--tokens_per_micro_batch"):
        first.add_argument(flag)
    first.add_argument("--resume", action="store_true")
    early = first.parse_known_args(argv)[0]
    saved = read_flags(early.output_dir) if early.resume else {}
    early.loss = early.loss or saved.get("loss", "sigmoid")
    try:
        loss = find(early.loss)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    parser = build_parser(loss)
    brings = world.flags(early.loss) if (early.dataset or saved.get("dataset", "world")) == "world" else {}
    if early.tokens_per_micro_batch:
        brings = {name: value for name, value in brings.items() if name != "micro_batch_size"}
    known = vars(parser.parse_args([]))
    parser.set_defaults(**{name: value for name, value in brings.items() if name in known and name != "epochs"} | saved)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        refuse_flag(unknown[0].split("=")[0], early.loss, known)
    settle_reference(args, loss)
    check_args(args, saved)
    hyper = {name: getattr(args, name) for name in hyperparameters(loss)}
    check_loss(args, loss, hyper)
    if not args.tokens_per_micro_batch:
        args.micro_batch_size = args.micro_batch_size or 4
    full, adapter = (5e-7, 5e-6) if needs_rejected(loss) else (1e-5, 1e-4)
    args.lr = args.lr or (adapter if args.adapter or args.lora_rank else full)
    if not args.max_steps:
        args.epochs = args.epochs or brings.get("epochs", 1)
    if not (args.eval_dataset or args.dataset == "world"):
        args.eval_share = 0.05 if args.eval_share is None else args.eval_share
    return args, loss, hyper


LORA = {"lora_alpha": None, "lora_target": None, "lora_dropout": 0.0, "rslora": False, "dora": False}  # and what they are left out


def refuse(*cases):
    """Each case: whether it is wrong, the flag with its value, the reason."""
    for wrong, flag, reason in cases:
        if wrong:
            raise ValueError(f"--{flag}: {reason}")


def settle_reference(args, loss):
    """Fill in what follows from other flags, and refuse what contradicts them."""
    if args.adapter and args.model == "world":
        args.model = read_adapter(args.adapter)[2] or args.model
    if unread := [name for name, unset in LORA.items() if getattr(args, name) != unset and (args.adapter or not args.lora_rank)]:
        raise ValueError(f"--{unread[0]}: is of a new adapter, so give --lora_rank" + (" and no --adapter" if args.adapter else ""))
    adapted, dropout, quantized = args.adapter or args.lora_rank, f"lora_dropout {args.lora_dropout}", f"quantize {args.quantize}"
    refuse(
        (args.adapter and args.lora_rank, f"lora_rank {args.lora_rank}", f"--adapter {args.adapter} has a rank of its own; give one of them"),
        (args.lora_dropout and "batch" in loss.marks, dropout, f"{loss.__name__} computes its log-probs twice, and they must be the same"),
        (args.lora_dropout >= 1, dropout, "leaves nothing; it must be below 1"),
        (args.quantize and args.parallel == "fsdp", quantized, "weights of 4 bits are not sharded; use --parallel ddp"),
        (args.quantize and not adapted, quantized, "4-bit weights can't be trained; train an adapter, by --lora_rank or --adapter"))
    if args.lora_rank and args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank
    if not needs_reference(loss):
        args.ref, args.sync_ref_every = "none", None
        return
    natural = "model" if args.ref_model else "adapter" if args.adapter else "adapter_off" if args.lora_rank else "model"
    args.ref = args.ref or ("none" if args.reference_free else natural)
    none, moves = args.ref == "none", args.ref in ("model", "adapter")
    alpha, batch = args.sync_ref_alpha, args.ref_batch_size
    refuse(
        (none and not args.reference_free, "ref none", "this loss has a reference; --reference_free puts zeros in its place"),
        (not none and args.reference_free, f"ref {args.ref}", "is not read with --reference_free"),
        (args.ref == "adapter" and not args.adapter, "ref adapter", "there is no --adapter to start from"),
        (args.ref == "adapter_off" and not adapted, "ref adapter_off", "there is no adapter to turn off"),
        (args.ref_model and args.ref not in ("model", "cache"), f"ref_model {args.ref_model}",
         f"is not read with --{'reference_free' if args.reference_free else f'ref {args.ref}'}"),
        (batch and args.ref != "cache", f"ref_batch_size {batch}", "is of --ref cache"),
        (args.sync_ref_every and not moves, f"sync_ref_every {args.sync_ref_every}", f"a reference of --ref {args.ref} can't move"),
        (alpha and not args.sync_ref_every, f"sync_ref_alpha {alpha}", "is read with --sync_ref_every"),
        ((alpha or 0) > 1, f"sync_ref_alpha {alpha}", "must be in (0, 1]"))
    if args.sync_ref_every and not args.sync_ref_alpha:
        args.sync_ref_alpha = 0.6


def refuse_flag(flag, loss_name, known):
    readers = [name for name, loss in LOSSES.items() if flag.removeprefix("--") in hyperparameters(loss)]
    if "ref" in flag.removeprefix("--").split("_"):
        raise ValueError(f"{flag}: --loss {loss_name} has no reference")
    if readers:
        raise ValueError(f"{flag} is not read by --loss {loss_name}; it is read by {', '.join(readers)}")
    near = difflib.get_close_matches(flag.removeprefix("--"), known, n=1, cutoff=0)
    raise ValueError(f"{flag}: there is no such flag; the nearest is --{near[0]}")


def check_args(args, saved):
    """What no flag's own type can see."""
    for name in ["loss", *sorted(saved)] if saved else []:
        if name not in FREE_ON_RESUME and getattr(args, name, None) != saved[name]:
            raise ValueError(f"--{name} {getattr(args, name, None)}: the run in {args.output_dir} has {saved[name]}, "
                             "and may not change when it is resumed")
    if args.epochs and args.max_steps:
        raise ValueError(f"--epochs {args.epochs} and --max_steps {args.max_steps} both say how long to train: give one")
    if args.tokens_per_micro_batch and args.micro_batch_size:
        raise ValueError(f"--micro_batch_size {args.micro_batch_size} and --tokens_per_micro_batch {args.tokens_per_micro_batch}: give one")
    data.read_flags(args)
    share, other = args.eval_share, args.eval_dataset or args.dataset == "world" and "the world's own"
    refuse((args.model == "world" and args.dataset != "world", f"dataset {args.dataset}", "--model world knows no words but its own data's; "
            "give another --model"),
           (share is not None and share >= 1, f"eval_share {share}", "leaves nothing to train on"),
           (share is not None and other, f"eval_share {share}", f"the held-out rows are {other}"))


def variants(args):
    """The arguments of dpo.preference_step that change any loss: those of its log-probs, and those of its link."""
    return ({name: getattr(args, name) for name in ("reference_free", "wpo", "ld_alpha")},
            {name: getattr(args, name) for name in ("f_divergence", "f_alpha")})


def check_loss(args, loss, hyper):
    """The loss and its variants know what they can be: ask them, the loss on one pair."""
    options, link = variants(args)
    try:
        check_variants(loss, hyper, **options, **link)
        loss(**{name: torch.full((1,), 1.0 + ("chosen" in name)) for name in tensor_arguments(loss)}, **hyper)
    except ValueError as error:
        raise ValueError(f"--{error}") from None


# --- Before the loop --------------------------------------------------------------------------------------------------

def make_world(ranks):
    """The folder of the embedded world, made first if it is not there: by rank 0 alone, with this same loop."""
    home = world.folder()
    if ranks.rank == 0 and not home.exists():
        print(f"world: its reference policy is trained first, this once, and kept in {home}")
        aside, threads = home.with_name(f"{home.name}.{os.getpid()}"), torch.get_num_threads()
        torch.set_num_threads(1)  # sums in one order: the same world, however many threads or ranks come after
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
    flags = world.SFT_FLAGS | {"model": home / "start", "dataset": home / "sft.jsonl", "output_dir": home / "reference"}
    if main([f"--{name}={value}" for name, value in flags.items()], alone):
        raise KeyboardInterrupt
    reference = SequenceLogps(load_model(str(home / "reference"), device=device))
    world.write_pairs(home, answer_logps(reference, home, tokenizer, device))


@torch.no_grad()
def answer_logps(model, home, tokenizer, device):
    """(X, A) log-probs of all answers of the world."""
    every = data.load_tokens(str(home / "every.jsonl"), tokenizer, ("chosen",), data.Limits())[0]
    batches = (collate(every[i:i + 1024], tokenizer, device) for i in range(0, len(every), 1024))
    logps = torch.cat([model(**concatenated_inputs(batch, ("chosen",)))[0] for batch in batches])
    return logps.view(len(world.THINGS), -1).cpu()


def sum_up(values):
    """The last lines of a run in the world."""
    v = {name.removeprefix("world/"): value for name, value in values.items()}
    return (f"\nexpected true reward {v['reward']:.3f}, KL to the reference {v['kl']:.3f} nats, "
            f"J = {v['objective']:.3f} of at most {v['optimum']:.3f}\n"
            f"probability on well-formed answers         {v['mass']:.3f}\n"
            f"share of the achievable                    {v['share']:.3f}\n"
            f"correlation of implicit and true reward    {v['correlation']:.3f}")


def collate(rows, tokenizer, device, packed=False):
    """A batch on the device, but for labels and what goes with them: see SequenceLogps."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # masked either way
    return {name: packing.to_device(value, device) if torch.is_tensor(value) and not name.endswith(("labels", "predictors")) else value
            for name, value in (data.known(rows) | packing.collate(rows) if packed else data.collate(rows, pad)).items()}


def load_rows(args, loss, tokenizer, home, ranks):
    """-> training rows and held-out rows (maybe none) as token ids. Rank 0 reads and tokenises, the others find it done."""
    sides = ("chosen", "rejected") if needs_rejected(loss) else ("chosen",)
    scored = "chosen_scores" in tensor_arguments(loss)
    limits, columns = data.read_flags(args)
    specs = {"--dataset": args.dataset, "--eval_dataset": args.eval_dataset}
    if args.dataset == "world":
        specs = {"--dataset": home / "pairs.jsonl", "--eval_dataset": args.eval_dataset or home / "eval.jsonl"}
    if ranks.rank > 0:
        barrier(ranks)
    loaded = {flag: data.load_tokens(str(spec), tokenizer, sides, limits, args.strict, scored, columns)
              for flag, spec in specs.items() if spec}
    if ranks.rank == 0:
        barrier(ranks)
    data.check_template(args.chat_template, [account for _, account in loaded.values()])
    rows = loaded["--dataset"][0]
    rows, held_out = (rows, loaded["--eval_dataset"][0]) if "--eval_dataset" in loaded else data.hold_out(rows, args.eval_share)
    if not len(rows):
        raise ValueError(f"--eval_share {args.eval_share}: holds out all {len(held_out)} rows, so few are their prompts; lower it")
    if ranks.rank == 0:
        print("\n".join(f"{flag} {data.describe(account)}" for flag, (_, account) in loaded.items()))
        print(data.describe_statistics(data.statistics(rows, held_out)))
        print(data.show(rows, tokenizer, most=300))
    return rows, held_out


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


def moving_tensors(args, policy, reference):
    """{name: tensor} of a reference that moves. Asked for anew each time: at the first forward FSDP may put shards elsewhere."""
    if not args.sync_ref_every:
        return {}
    return adapter_tensors(policy.model, "reference") if args.ref == "adapter" else reference.state_dict()


def fingerprint(policy, reference, ranks):
    """A hash of the weights that training builds on or compares with, and that no step changes. Every rank brings its shards."""
    fixed = reference.state_dict(prefix="reference.") if isinstance(reference, torch.nn.Module) else {}
    fixed |= {name: tensor for name, tensor in policy.state_dict().items() if not name.endswith(".policy")} if lora_layers(policy) else {}
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(fixed.items()):
        tensor = whole(tensor)
        if tensor.is_floating_point():  # a frozen model may be float32 or bfloat16: see load_weights
            tensor = tensor.bfloat16()
        if ranks.rank == 0:
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return broadcast(digest.hexdigest(), ranks)


@torch.no_grad()
def move_reference(args, policy, reference):
    """TR-DPO (arXiv:2404.09656): θ_ref <- α θ + (1 − α) θ_ref, buffers too."""
    moving, source = moving_tensors(args, policy, reference), adapter_tensors(policy.model, "policy") if args.ref == "adapter" else policy.state_dict()
    for name, tensor in moving.items():
        tensor.copy_(torch.lerp(tensor, source[name].to(tensor.dtype), args.sync_ref_alpha) if tensor.is_floating_point() else source[name])


def choose_attention(args, models, rows, dtype, ranks):
    """Settle --attention auto -> a line that says which way the rows go, and why not the other."""
    lengths = [data.column(rows, name) for name in ("prompt_length", "chosen_length", "tokens")]
    size = args.micro_batch_size or max(1, args.tokens_per_micro_batch // int(lengths[2].mean()))
    worth = args.attention == "packed" or packing.is_faster(*lengths, size, models[0].model.get_input_embeddings().embedding_dim)
    reason = None if worth else "packed, rows as short as these would be slower"
    if args.attention != "padded" and worth:
        for model in models:  # an adapter's dropout would be noise here
            with autocast(dtype, ranks.device), use_adapter(model.model, None):
                reason = reason or broadcast(packing.can_pack(model), ranks)
    if reason and args.attention == "packed":
        raise ValueError(f"--attention packed: {reason}")
    args.attention, asked = "padded" if reason or args.attention == "padded" else "packed", args.attention
    return f"attention: {args.attention} rows" + (f"; {reason}" if reason and asked == "auto" else "")


def memory_line(policy, reference):
    """What is held besides activations, on each rank."""
    def size(tensors):
        return sum(shard(tensor).numel() * tensor.element_size() for tensor in tensors)

    held = [*policy.parameters(), *policy.buffers()]
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    second = [*reference.parameters(), *reference.buffers()] if isinstance(reference, torch.nn.Module) else []
    parts = {"weights": size(held), "gradients": size(trained), "optimizer": 2 * size(trained), "reference": size(second)}
    count = sum(p.numel() for p in policy.parameters()) + sum(m.shape.numel() for m in policy.modules() if isinstance(m, NF4Linear))
    return (f"{count:,} parameters, {sum(p.numel() for p in trained):,} of them trained; on each rank "
            + ", ".join(f"{name} {part / 2**20:,.1f} MiB" for name, part in parts.items()))


# --- the reference's log-probs, computed once

def cache_key(args, weights, splits, dtype):
    """A hash of all that the log-probs depend on: the weights' fingerprint, every token id, the dtype and the weights of tokens."""
    digest = hashlib.blake2b(f"{weights} {dtype} {args.ld_alpha} {args.quantize}".encode(), digest_size=12)
    for rows in splits:
        for batch in rows.select_columns(["id", "prompt_ids", "chosen_ids", "rejected_ids"]).iter(1000):
            digest.update(json.dumps(batch).encode())
    return digest.hexdigest()


def cut(args, indices, tokens, ranks, size=None):
    """[(places in `indices`, weight)]: this rank's micro-batches. `tokens` are those of all rows."""
    most = None if size else args.tokens_per_micro_batch
    return data.micro_batches(np.arange(len(indices)), size or most or args.micro_batch_size, ranks.rank, ranks.size, tokens[indices] if most else None)


@torch.no_grad()
def of_all_pairs(compute, rows, indices, pieces, ranks, desc=None):
    """{name: (len(indices),)}, on every rank, of what compute(columns) -> {name: (B,)} finds for each pair. The ranks share the work;
    each number is sent as a sum in which all other ranks have zeros, so it stays what it was, in fp64."""
    tables, bar = {}, {"desc": desc, "disable": desc is None or ranks.rank > 0, "mininterval": 0.2 if sys.stderr.isatty() else 5}
    for places, weight in tqdm.tqdm(pieces, **bar):
        for name, values in compute(rows[indices[places]]).items():
            table = tables.setdefault(name, torch.zeros(len(indices), dtype=torch.float64, device=values.device))
            table[places] += weight * values.double()
    return dict(zip(tables, sum_over_ranks(torch.stack(list(tables.values())), ranks)))


def reference_logps(args, reference, rows, indices, tokenizer, dtype, ranks, desc=None):
    """(len(indices), 2) log-probs of chosen and rejected under the reference."""
    def compute(columns):
        with autocast(dtype, ranks.device):
            batch = collate(columns, tokenizer, ranks.device, args.attention == "packed")
            out = concatenated_forward(reference, batch, ld_alpha=args.ld_alpha)
        return {side: out[f"{side}_logps"] for side in ("chosen", "rejected")}

    pieces = cut(args, indices, data.column(rows, "tokens"), ranks, args.ref_batch_size)
    found = of_all_pairs(compute, rows, indices, pieces, ranks, desc)
    return torch.stack([found["chosen"], found["rejected"]], 1).cpu()


def cache_reference(args, reference, splits, weights, tokenizer, dtype, ranks):
    """The splits with the columns ref_chosen_logp and ref_rejected_logp: from the file, or computed by all ranks and put there."""
    key = broadcast(cache_key(args, weights, splits, dtype) if ranks.rank == 0 else None, ranks)
    path = pathlib.Path("runs") / "references" / f"{key}.safetensors"
    splits = {name: rows for name, rows in zip(("train", "eval"), splits)}
    made = broadcast(path.exists(), ranks)
    if not made:
        tables = {}
        for name, rows in splits.items():
            tables[name] = reference_logps(args, reference, rows, np.arange(len(rows)), tokenizer, dtype, ranks, f"reference, {name}"
                                           ) if len(rows) else torch.zeros(0, 2)
            tables[f"{name}_ids"] = torch.tensor(list("\n".join(rows["id"]).encode()), dtype=torch.uint8)
        if ranks.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tables, path.with_suffix(f".{os.getpid()}"))
            os.replace(path.with_suffix(f".{os.getpid()}"), path)
    barrier(ranks)
    return [read_cache(args, path, name, rows, reference, tokenizer, dtype, ranks, made) if len(rows) else rows
            for name, rows in splits.items()]


def read_cache(args, path, name, rows, reference, tokenizer, dtype, ranks, made):
    """The rows with their cached log-probs, after computing four of them again and comparing."""
    try:
        tables = load_file(path)
        table, ids = tables[name], bytes(tables[f"{name}_ids"].tolist()).decode().split("\n")
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); delete it, and it is made again") from error
    if ids != list(rows["id"]) or len(table) != len(rows) or not table.isfinite().all():
        raise ValueError(f"{path}: does not hold the log-probs of every {name} row; delete it, and it is made again")
    some = np.linspace(0, len(rows) - 1, min(4, len(rows))).astype(int)
    again = reference_logps(args, reference, rows, some, tokenizer, dtype, ranks)
    if not torch.allclose(again, table[some], rtol=1e-2 if dtype == "bfloat16" else 1e-4, atol=1e-3):
        raise ValueError(f"{path}: holds other log-probs than the reference gives now for row {rows[int(some[0])]['id']}: "
                         f"{table[some][0].tolist()} and {again[0].tolist()}; delete it, and it is made again")
    if ranks.rank == 0:
        print(f"reference of {len(rows)} {name} rows {'read from' if made else 'kept in'} {path}")
    return rows.add_column("ref_chosen_logp", table[:, 0].tolist()).add_column("ref_rejected_logp", table[:, 1].tolist())


def choose_folder(args, ranks):
    """--output_dir, or the first free folder below runs/. A folder that holds a run is only ever continued."""
    if args.output_dir is None:
        name = re.sub("[:,]", "+", args.loss)
        names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
        args.output_dir = broadcast(next(f"runs/{name}" for name in names if not os.path.exists(f"runs/{name}")), ranks)
    folder = pathlib.Path(args.output_dir)
    if folder.exists():  # while another run is writing there, what it holds is not to be judged
        with claim(folder, args.resume, ranks):
            pass
    return folder


@contextlib.contextmanager
def claim(folder, resume, ranks):
    """One run at a time in a folder, by a lock that the system lets go of when the process ends, however it ends; and a folder that holds
    a run is only ever continued."""
    with contextlib.ExitStack() as held:
        if ranks.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(open(folder / ".lock", "a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"--output_dir {folder}: another run is writing there") from None
            if not resume and (is_complete(folder) or checkpoints(folder)):
                raise ValueError(f"--output_dir {folder} holds a run already: continue it with --resume, or choose another")
        yield


def check_model(args, model, tokenizer):
    """What would otherwise be an index out of range inside the model, at some later row."""
    words = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > words:
        raise ValueError(f"--model {args.model}: {len(tokenizer)} tokens in its tokenizer, {words} in its embedding: not a pair")
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    if args.max_length > positions:
        raise ValueError(f"--max_length {args.max_length}: the model has {positions} positions; pass {positions} or less")


def make_optimizer(model, lr, device):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("the policy has no trainable parameter: every one is frozen")
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=device.type in ("cpu", "cuda"))


@torch.no_grad()
def check_start(forward, model, columns, tolerance):
    """Before the first update the policy is its reference, so the loss of real rows must be what it is at zero margin: that of
    the policy beside itself. Anything else would train on a log-ratio that is an error of ours or of the setup."""
    bare = {name: values for name, values in columns.items() if not name.startswith("ref_")}
    (found, metrics), (expected, _) = forward(model, columns), forward(model, bare, against=model)
    stop_if_not_finite(0, {"loss": found.sum().item(), "grad_norm": 0.0}, [(columns["id"], metrics)])
    worst = (found - expected).abs().argmax()
    if not torch.allclose(found, expected, rtol=tolerance, atol=tolerance):
        raise ValueError(
            f"before the first step the loss of {columns['id'][worst]} is {found[worst]:.6f}, but {expected[worst]:.6f} where "
            "policy and reference are equal. So they are not: look for another dtype on one side, dropout left on, an adapter "
            "on one side (one that came from SFT is part of the reference too: --ref adapter), or a reference that is not what the "
            "policy starts from (if that is meant, name it with --ref_model)")
    return expected.mean().item()


# --- In the loop: metrics ---------------------------------------------------------------------------------------------

def add(totals, metrics, weight=1.0):
    """Add the pairs of a micro-batch to the sums of its step."""
    for name, values in metrics.items():
        totals[name] = totals.get(name, 0) + weight * values.double().sum()


def mean_over_ranks(totals, count, ranks):
    """{metric: sum here} -> {metric: mean over `count` pairs everywhere}: one message, one division."""
    sums = sum_over_ranks(torch.stack([torch.as_tensor(total) for total in totals.values()]), ranks)
    return dict(zip(totals, (sums / count).tolist()))


def stop_if_not_finite(step, values, seen, ranks=None, policy=None):
    """A loss or gradient that is not a number would be in every weight after the next update: name rows or weights, and stop."""
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        return
    rows = [f"{row}: " + ", ".join(f"{name} {value[i]:.6g}" for name, value in metrics.items())
            for ids, metrics in seen for i, row in enumerate(ids) if not all(value[i].isfinite() for value in metrics.values())]
    spoiled = [name for name, parameter in policy.named_parameters() if parameter.grad is not None
               and not shard(parameter.grad).isfinite().all()] if policy else []
    ids = [row for ids, _ in seen for row in ids]
    rows, spoiled, ids = ([each for part in (gather(found, ranks) if ranks else [found]) for each in part] for found in (rows, spoiled, ids))
    raise FloatingPointError(
        f"step {step}: the loss is {values['loss']}, the gradient norm {values['grad_norm']}; nothing of this step was saved\n"
        + "\n".join(rows[:8] or [f"every pair's loss is finite, so it is the backward pass that overflows, in {', '.join(spoiled[:4])} and "
                                 f"{max(0, len(spoiled) - 4)} more, on the rows {'; '.join(ids[:8])}; try a lower --lr"]))


def evaluate(args, logps, loss, hyper, link, rows, delta, ranks):
    """Mean metrics over the held-out rows, all of which a loss that compares pairs sees at once."""
    state = {"mean_chosen_length": float(data.column(rows, "chosen_length").mean()), "delta": delta}
    indices = np.arange(len(rows))
    tensors = of_all_pairs(logps, rows, indices, cut(args, indices, data.column(rows, "tokens"), ranks), ranks)
    return {name: values.mean().item() for name, values in preference_loss(tensors | state, loss, hyper, **link)[1].items()}


# --- In the loop: files. Everything is written aside and renamed. -----------------------------------------------------

def write(path, text):
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    os.replace(aside, path)


def read_config(folder):
    try:
        return json.loads((pathlib.Path(folder) / "config.json").read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def read_flags(folder):
    """The flags of the run that --resume continues."""
    if folder is None:
        raise ValueError("--resume needs the --output_dir of the run to go on with")
    if "flags" not in read_config(folder):
        raise ValueError(f"--resume: there is no run in {folder}")
    return read_config(folder)["flags"]


def is_complete(folder):
    """The model's own entries join config.json when a run has ended, or the adapter's file joins the folder."""
    return "model_type" in read_config(folder) or (pathlib.Path(folder) / "adapter_config.json").exists()


def checkpoints(folder):
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def save(model, tokenizer, folder, base, ranks, **extra):
    """The whole model, or the adapter that is all that was trained of it. Every rank brings its shards, rank 0 writes."""
    adapted = bool(lora_layers(model))
    named = adapter_tensors(model, "policy") if adapted else model.state_dict(keep_vars=True)
    once = {id(tensor): name for name, tensor in reversed(named.items())}  # tied weights have two names
    tensors = {}
    for name in once.values():
        tensor = whole(named[name].detach())
        if ranks.rank == 0:
            tensors[name] = tensor.cpu()
    if ranks.rank == 0:
        extra["tensors"] = tensors
        save_adapter(model, tokenizer, folder, base, **extra) if adapted else save_model(model, tokenizer, folder, **extra)


def optimizer_tensors(model, optimizer, moving):
    """{name: tensor} of AdamW's state, made where there has been no step yet, and of a reference that moves."""
    tensors = {f"reference.{name}": tensor for name, tensor in moving.items()}
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in zip(names, optimizer.param_groups[0]["params"]):  # the optimizer's own: FSDP's may be whole ones after an evaluation
        state = optimizer.state[parameter]
        if not state:
            state |= {"step": torch.zeros((), device=parameter.device)}
            state |= {key: torch.zeros_like(parameter, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors


def file_digests(folder, ranks):
    """{file: hash} of a checkpoint; each rank reads its share."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "state.json")
    mine = {}
    for path in files[ranks.rank::ranks.size]:
        with open(path, "rb") as file:
            mine[str(path.relative_to(folder))] = hashlib.file_digest(file, "blake2b").hexdigest()
    return {name: value for part in gather(mine, ranks) for name, value in part.items()}


def save_checkpoint(folder, step, model, tokenizer, base, tensors, state, keep, ranks):
    """Everything the next step depends on: the model, `tensors` beside it, and `state`. The order of the rows and the dropout of an adapter
    follow from the seed, the step and the rank, so no state of a random number generator is needed."""
    aside = folder / ".checkpoint"
    if ranks.rank == 0:
        shutil.rmtree(aside, ignore_errors=True)
    save(model, tokenizer, aside, base, ranks)
    barrier(ranks)
    dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(aside / "optimizer"), save_distributed=True), no_dist=ranks.size == 1)
    digests = file_digests(aside, ranks)
    if ranks.rank == 0:
        (aside / "state.json").write_text(json.dumps({"step": step, "files": digests} | state, indent=2) + "\n")
        os.replace(aside, folder / f"checkpoint-{step}")
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    barrier(ranks)


def newest_checkpoint(folder, ranks):
    """-> the newest checkpoint whose files are as they were written, and its state; None, {} if there is none. A damaged one is set aside,
    with a line: a run that goes on from an older one comes to the same end."""
    found = broadcast(checkpoints(folder), ranks)
    for path in reversed(found):
        try:
            state = json.loads((path / "state.json").read_text())
        except (OSError, ValueError):
            state = {}
        known, found_now = state.get("files", {}), file_digests(path, ranks)
        if known == found_now and state:
            return path, state
        if ranks.rank == 0:
            odd = sorted({name for name, _ in known.items() ^ found_now.items()}) if known else ["state.json"]
            print(f"{path} is damaged ({', '.join(odd[:3])}) and is now {path.with_name(f'damaged-{path.name}')}")
            os.replace(path, path.with_name(f"damaged-{path.name}"))
        barrier(ranks)
    if found:
        raise ValueError(f"--resume: every checkpoint in {folder} is damaged; begin again in another --output_dir")
    return None, {}


@torch.no_grad()
def load_checkpoint(folder, state, fixed, tensors, optimizer, scheduler, ranks):
    """Fill `tensors` -> the step after which they were saved, and delta. Nothing is read but JSON and safetensors, so no code is run."""
    for name, what in (("rows", "the data set is not the one that this run began with: its rows, or their order, are others"),
                       ("weights", "the reference, or the model below the adapter, has other weights than when this run began")):
        if state[name] != fixed[name]:
            raise ValueError(f"--resume: {what}")
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder / "optimizer")), no_dist=ranks.size == 1)
    scheduler.load_state_dict(state["scheduler"])
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr()):
        group["lr"] = lr
    return state["step"], state["delta"]


class Clock:
    """Seconds by what they went into, if it is on; off, it waits for no GPU."""

    def __init__(self, on, device):
        self.on, self.device, self.spent, self.name, self.since = on, device, {}, None, 0.0

    def __call__(self, name):
        """From here on time goes into `name`, or with None into nothing."""
        if self.on:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            if self.name:
                self.spent[f"time/{self.name}"] = self.spent.get(f"time/{self.name}", 0.0) + now - self.since
            self.name, self.since = name, now


class Log:
    """config.json, metrics.jsonl, the bar and the lines between: on rank 0, and silent elsewhere."""

    def __init__(self, folder, flags, start, steps, ranks):
        self.on, self.path = ranks.rank == 0, folder / "metrics.jsonl"
        self.bar = tqdm.tqdm(total=steps, initial=start, desc=flags["loss"], disable=not self.on, dynamic_ncols=True,
                             mininterval=0.2 if sys.stderr.isatty() else 5)
        if self.on:
            write(folder / "config.json", json.dumps({"flags": flags}, indent=2) + "\n")
            rows = self.path.read_text().splitlines() if start else []  # a killed run may have torn the last one
            kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= start]  # others are taken again
            write(self.path, "".join(row + "\n" for row in kept))

    def row(self, step, split, values):
        if self.on:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, "split": split, **values}) + "\n")

    def tick(self, values):
        self.bar.set_postfix_str(brief(values, {"tokens_per_second": "tokens/s"}), refresh=False)
        self.bar.update()

    def say(self, text):
        if self.on:
            self.bar.write(text)


BRIEF = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", "world/reward": "reward",
         "world/kl": "KL", "world/objective": "J", "world/optimum": "J*", "world/share": "share",
         "world/correlation": "correlation", "world/mass": "mass"}


def brief(values, more={}):
    return " ".join(f"{short} {values[name]:.4g}" for name, short in (BRIEF | more).items() if name in values)


@contextlib.contextmanager
def spared(folder):
    """What fails to be written, on a full disk say, takes nothing with it: its remains are removed, and the rest is as it was."""
    try:
        yield
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        for remains in (".checkpoint", ".saving"):
            shutil.rmtree(folder / remains, ignore_errors=True)
        cause = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        raise ValueError(f"--output_dir {folder}: could not be written ({cause}); what was there before is whole. Make room, then: "
                         f"python train.py --output_dir {folder} --resume") from error


@contextlib.contextmanager
def caught_signals():
    """A list that the first Ctrl-C or SIGTERM is put on, for the loop to see after its step; the second ends the process."""
    caught, before = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in before:
        signal.signal(number, note)
    yield caught
    for number, handler in before.items():
        signal.signal(number, handler)


# --- The loop ---------------------------------------------------------------------------------------------------------

def main(argv, ranks):
    """Train. Returns whether a signal ended it early."""
    args, loss, hyper = parse_args(argv)
    say = print if ranks.rank == 0 else lambda text: None
    home = make_world(ranks) if "world" in (args.model, args.dataset) else None
    folder = choose_folder(args, ranks)
    if args.resume and is_complete(folder):
        say(f"the run in {folder} is complete")
        return False
    if args.parallel == "fsdp" and ranks.size == 1:
        raise ValueError("--parallel fsdp: one process alone has nothing to share; start several by torchrun")
    newest, saved = newest_checkpoint(folder, ranks) if args.resume else (None, {})

    # --- the models: policy and reference come through the same door, in the same dtype
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if ranks.device.type == "cuda" else "float32"
    source = str(home / "reference") if args.model == "world" else args.model
    tokenizer = load_tokenizer(source)
    if args.chat_template:
        tokenizer.chat_template = data.read_template(args.chat_template)
    model = place(lambda device: load_policy(args, source, newest, dtype, device), ranks, args.parallel, dtype)
    check_model(args, model.model, tokenizer)
    reference = load_reference(args, model, source, dtype, ranks)
    weights, (options, link) = fingerprint(model, reference, ranks), variants(args)
    clock = Clock(args.profile, ranks.device)

    def timed(**inputs):
        clock("reference")
        out = reference(**inputs)
        clock("forward")
        return out

    def forward(model, columns, state=None, against=None):
        """Losses (B,) and metrics of some rows."""
        with autocast(dtype, ranks.device):
            batch = collate(columns, tokenizer, ranks.device, args.attention == "packed")
            clock("forward")
            return preference_step(model, against or timed, batch, loss, hyper, state, **options, **link)

    def logps(columns, model=model, **more):
        """What the loss will be told of them: on the bare model, outside of DDP."""
        with autocast(dtype, ranks.device):
            batch = collate(columns, tokenizer, ranks.device, args.attention == "packed")
            clock("forward")
            return preference_logps(model, timed, batch, loss, **options | more)

    # --- the rows
    rows, held_out = load_rows(args, loss, tokenizer, home, ranks)
    say(choose_attention(args, [module for module in (model, reference) if isinstance(module, SequenceLogps)], rows, dtype, ranks))
    if args.compile:  # both, so that they differ by no rounding
        compile_blocks(model.model)
        if isinstance(reference, SequenceLogps):
            compile_blocks(reference.model)
    if args.ref == "cache":
        rows, held_out = cache_reference(args, reference, (rows, held_out), weights, tokenizer, dtype, ranks)
        reference = None  # and with it its memory
    fixed, lengths, tokens = {"rows": data.digest(rows), "weights": weights}, data.column(rows, "chosen_length"), data.column(rows, "tokens")
    steps = args.max_steps or args.epochs * math.ceil(len(rows) / args.batch_size)
    args.warmup_steps = steps // 10 if args.warmup_steps is None else args.warmup_steps

    # --- optimizer and schedule, from the start or from where the run stopped
    optimizer = make_optimizer(model, args.lr, ranks.device)
    scheduler = get_scheduler(SCHEDULES[args.lr_schedule], optimizer, args.warmup_steps, steps)
    start, delta = load_checkpoint(newest, saved, fixed, optimizer_tensors(model, optimizer, moving_tensors(args, model, reference)), optimizer,
                                   scheduler, ranks) if newest else (0, 0.0)
    policy = wrap(model, ranks)
    say(f"{args.loss} {hyper}: {steps} steps of {args.batch_size} pairs from {len(rows)} rows, {len(held_out)} rows held out; "
        f"{dtype} on {ranks.size} x {ranks.device.type}{', ' + args.parallel if ranks.size > 1 else ''}; {folder}")
    if adapted := lora_layers(model.model):
        kinds = sorted({path.rsplit(".", 1)[-1] for path in adapted})
        say(f"adapter on {len(adapted)} layers: {', '.join(kinds)}")
    say(memory_line(model, reference))
    if "batch" in loss.marks:
        say(f"{args.loss} compares all {args.batch_size} pairs of a step with each other, which costs a second forward")
    if start:
        say(f"resumed after step {start}")
    elif args.ref != "none" and args.ref_model:
        say(f"no step-0 check: --ref_model {args.ref_model} is another model on purpose")
    elif args.ref != "none":
        first = rows[data.window(0, len(rows), args.micro_batch_size or 4, args.seed, args.shuffle)]
        rounding = {"float64": 1e-5, "float32": 1e-3, "bfloat16": 2e-2}[dtype]  # cached from batches of other shapes
        value = check_start(forward, model, first, rounding if args.ref == "cache" else 1e-5)
        say(f"step-0 check: the loss is {value:.4f}, as it must be where policy = reference")

    def look():
        """{split: metrics} on the held-out rows and, in the world, against the truth."""
        looks = {"eval": evaluate(args, logps, loss, hyper, link, held_out, delta, ranks)} if len(held_out) else {}
        if home:
            beta = hyper["beta"] if loss.marks == {"margin"} else world.BETA  # else it is no weight of the KL
            truth = torch.from_numpy(np.load(home / "reference.npy"))
            looks["world"] = world.metrics(answer_logps(model, home, tokenizer, ranks.device), truth, beta)
        return looks

    with claim(folder, args.resume, ranks), spared(folder), caught_signals() as stopped:
        log, since, count = Log(folder, vars(args), start, steps, ranks), time.perf_counter(), 0
        for step in range(start + 1, steps + 1):
            # ------------------------------------------------------------------------------------ one training step ---
            clock("data")
            window = data.window(step - 1, len(rows), args.batch_size, args.seed, args.shuffle)  # the pairs of all ranks
            state = {"mean_chosen_length": float(lengths[window].mean()), "delta": delta}
            totals, seen = {"stop": float(bool(stopped))}, []
            torch.manual_seed(args.seed + 1_000_003 * (step * ranks.size + ranks.rank))  # of an adapter's dropout, if it has any
            pieces = cut(args, window, tokens, ranks)
            if "batch" in loss.marks:
                slopes, found = logp_gradients(of_all_pairs(logps, rows, window, pieces, ranks) | state, loss, hyper, **link)
            for i, (places, weight) in enumerate(pieces):
                clock("data")
                columns = rows[window[places]]
                sync_gradients(policy, on=i == len(pieces) - 1)
                if "batch" in loss.marks:
                    out = logps(columns, policy, reference_free=True)  # the slopes know the reference already
                    losses, metrics = sum(slopes[name][places] * out[name] for name in slopes), {name: found[name][places] for name in found}
                else:
                    losses, metrics = forward(policy, columns, state)
                clock("backward")
                (weight * losses.sum() * ranks.size / len(window)).backward()  # the window's mean; DDP divides by the ranks
                add(totals, metrics, weight)
                seen.append((columns["id"], metrics))
            clock("optimizer")
            values = {"grad_norm": clip_gradients(policy, args.max_grad_norm), "lr": scheduler.get_last_lr()[0]}
            values |= mean_over_ranks(totals, len(window), ranks)
            stop_if_not_finite(step, values, seen, ranks, policy)
            if "delta" in tensor_arguments(loss):
                values["delta"], delta = delta, update_delta(delta, values["rewards/chosen"], values["rewards/rejected"])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            if args.sync_ref_every and step % args.sync_ref_every == 0:
                move_reference(args, model, reference)
            # ---------------------------------------------------------------------------------------------------------
            clock("logging")
            stopping, last = values.pop("stop") > 0, step == steps
            count += int(tokens[window].sum())
            values["tokens_per_second"] = count / (time.perf_counter() - since)
            log.tick(values)

            if step % args.log_every == 0 or last:
                log.row(step, "train", values | clock.spent)
                clock.spent.clear()
                since, count = time.perf_counter(), 0

            clock(None)
            pause = time.perf_counter()
            if last or args.eval_every and step % args.eval_every == 0:
                looks = look()
                for split, found in looks.items():
                    log.row(step, split, found)
                    log.say(f"step {step} {split}: {brief(found)}")

            if not last and (stopping or args.save_every and step % args.save_every == 0):
                state = fixed | {"scheduler": scheduler.state_dict(), "delta": delta, "flags": vars(args)}
                tensors = optimizer_tensors(model, optimizer, moving_tensors(args, model, reference))
                save_checkpoint(folder, step, model.model, tokenizer, source, tensors, state, args.keep_checkpoints, ranks)
                if stopping:
                    log.bar.close()
                    say(f"stopped after step {step} of {steps}; to go on: python train.py --output_dir {folder} --resume")
                    return True
            since += time.perf_counter() - pause

        log.bar.close()
        save(model.model, tokenizer, folder, source, ranks, flags=vars(args))
        say(f"saved in {folder}" + (sum_up(looks["world"]) if home else ""))
    return False


def explain(error):
    """A sentence for what is not the program's fault; None for what is."""
    raised_in = pathlib.Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    first = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, (ValueError, FloatingPointError)) and raised_in.parent == pathlib.Path(__file__).parent:
        return str(error)
    if isinstance(error, (OSError, SafetensorError)):
        return str(error)
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in first:
        return (f"out of memory ({first}). What needs less, the cheapest first: a lower --micro_batch_size, --gradient_checkpointing, --ref "
                "cache, a lower --max_length, --parallel fsdp, --lora_rank, --quantize nf4")
    if "RANK" in os.environ and isinstance(error, RuntimeError) and re.search("onnection (closed|reset)|gloo|NCCL|[Tt]imed out", str(error)):
        return (f"another process of this run has ended, or does not answer ({first[:120]}); what it printed says why. What was saved is "
                "whole: start again with --output_dir and --resume")
    return None


def run():
    """main, with errors for people: one sentence and exit status 2; a traceback only where the fault is in the program."""
    rank = int(os.environ.get("RANK", 0))
    try:
        ranks = init_distributed()
        stopped = main(sys.argv[1:], ranks)
        leave_distributed(ranks)
        sys.exit(130 if stopped else 0)
    except (ValueError, ArithmeticError, RuntimeError, MemoryError, OSError, SafetensorError) as error:
        sentence = explain(error)
        if sentence is None:
            raise
        print(f"error{f' on rank {rank}' if rank else ''}: {sentence}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted before the first step: nothing was saved", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
