"""The command line of train.py: defines every flag and rejects flags that contradict each other.

`parse_args` reads the command line in three parts:
1. A first parser reads --loss, --dataset and --resume, because they decide which flags exist and
   which defaults the flags have. Each loss adds its own hyper-parameters as flags
   (`build_parser`), the world has its own defaults, and a resumed run starts from its saved flags.
2. The full parser reads all flags. One `add_*_flags` function per group of flags defines the flags
   and their defaults.
3. `settle_adapter`, `settle_reference`, `check_args`, `check_loss` and `fill_defaults` handle
   combinations of flags: they derive the values of flags from other flags and reject
   contradictions.

No flag is accepted and then ignored: a flag that the run would not read is an error.
"""
import argparse
import contextlib
import difflib
import functools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable

import data
import world
from best import is_higher_better
from checkpoint import LENGTH, flags_path, is_adapter, may_change, saved_flags
from errors import Parser, UserError, any_name
from files import read_json
from hub import check_hub_name
from lora import read_adapter
from losses import (
    LOSSES,
    find,
    hyperparameters,
    kind_of,
    needs_reference,
    one_row,
    sides_of,
)
from optimizers import MOMENTS, SCHEDULES
from ranges import real_number, whole_number
from saved import find_saved
from sources import evaluation_sets
from trackers import check_trackers
from variants import Variants, check_variants

# Flags of a loss with a reference.
REFERENCE_FLAGS = ("ref", "ref_model", "ref_batch_size", "sync_ref_every", "sync_ref_alpha")

# --attn_implementation
ATTENTION_KERNELS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")

# Flags of TRL, transformers and LLaMA-Factory: the flag here, or what to do.
OTHER_TRAINERS = {
    # model and data
    "model_name_or_path": "--model",
    "ref_model_name_or_path": "--ref_model",
    "adapter_name_or_path": "--adapter",
    "dataset_name": "--dataset",
    "dataset_path": "--dataset",
    "train_file": "--dataset",
    "validation_file": "--eval_dataset",
    "dataset_config": "--dataset with a folder of this part's files",
    "dataset_train_split": "--dataset NAME:SPLIT",
    "dataset_test_split": "--eval_dataset NAME:SPLIT",
    "val_size": "--eval_share",
    "chat_template_path": "--chat_template",
    "model_revision": "--revision",
    "template": "--chat_template FILE, or leave it out for the tokenizer's own",
    "max_seq_length": "--max_length",
    "max_seq_len": "--max_length",
    "cutoff_len": "--max_length",
    "max_target_length": "--max_completion_length",
    "is_encoder_decoder": "leave it out: it is read from the model's config.json",
    "remove_unused_columns": "leave it out: columns that are not read are listed or refused",
    "data_seed": "--seed",
    # loss
    "loss_type": "--loss",
    "loss_weights": "--loss NAME:WEIGHT,NAME:WEIGHT",
    "pref_loss": "--loss",
    "stage": "--loss sft, or for dpo --loss sigmoid",
    "pref_beta": "--beta",
    "pref_ftx": "--loss sigmoid:1,sft:FTX",
    "rpo_alpha": "--loss sigmoid:1,sft:ALPHA",
    "gamma_beta_ratio": "--gamma, which is gamma_beta_ratio x beta",
    "simpo_gamma": "--gamma with --loss simpo",
    "use_weighting": "--wpo",
    "moe_aux_loss_coef": "--router_aux_loss_coef",
    "output_router_logits": "--router_aux_loss_coef C, such as 0.001",
    "f_divergence_type": "--f_divergence reverse_kl, forward_kl, js or alpha",
    "f_alpha_divergence_coef": "--f_alpha",
    "disable_dropout": "leave it out: the model's dropout is always off",
    # reference
    "precompute_ref_log_probs": "--ref cache",
    "precompute_ref_batch_size": "--ref_batch_size",
    "sync_ref_model": "--sync_ref_every STEPS",
    "ref_model_sync_steps": "--sync_ref_every",
    "ref_model_mixup_alpha": "--sync_ref_alpha",
    "ref_adapter_name": "--ref adapter",
    # adapter
    "use_peft": "--lora_rank R",
    "finetuning_type": "--lora_rank R for LoRA, none for full training",
    "lora_r": "--lora_rank",
    "lora_target_modules": "--lora_target NAME,NAME",
    "lora_modules_to_save": "leave it out: an adapter has linear layers only",
    "use_rslora": "--rslora",
    "use_dora": "--dora",
    "load_in_4bit": "--quantize nf4",
    "load_in_8bit": "--quantize nf4, which has 4 bits",
    "quantization_bit": "--quantize nf4",
    # optimizer
    "learning_rate": "--lr",
    "per_device_train_batch_size": "--micro_batch_size",
    "gradient_accumulation_steps": "leave it out",
    "per_device_eval_batch_size": "--micro_batch_size, in evaluations too",
    "num_train_epochs": "--epochs",
    "num_epochs": "--epochs",
    "warmup_ratio": "--warmup_steps, which is warmup_ratio x steps (default: a tenth of the steps)",
    "lr_scheduler_type": "--lr_schedule linear, cosine or constant",
    "optim": "--optimizer adamw or rmsprop",
    "adam_epsilon": "--adam_eps",
    "min_lr_rate": "--min_lr, which is min_lr_rate x lr",
    # run
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype bfloat16; there is no float16",
    "torch_dtype": "--dtype auto, float32, bfloat16 or float64",
    "flash_attn": "--attention auto, packed or padded",
    "padding_free": "--attention packed",
    "torch_compile": "--compile",
    "full_determinism": "--deterministic",
    "fsdp": "--parallel fsdp",
    "deepspeed": "--parallel fsdp",
    "logging_steps": "--log_every",
    "eval_steps": "--eval_every",
    "save_steps": "--save_every",
    "eval_strategy": "--eval_every STEPS",
    "evaluation_strategy": "--eval_every STEPS",
    "save_strategy": "--save_every STEPS",
    "save_total_limit": "--keep_checkpoints",
    "load_best_model_at_end": "--keep_best eval/loss",
    "metric_for_best_model": "--keep_best, such as eval/loss",
    "greater_is_better": "leave it out: the metric of --keep_best decides",
    "early_stopping_patience": "--early_stop",
    "resume_from_checkpoint": "--resume, with the --output_dir of the run",
    "overwrite_output_dir": "leave it out, and give a new --output_dir",
    "run_name": "leave it out: a tracker shows the name of --output_dir",
    "logging_dir": "leave it out: TensorBoard's files are in tensorboard/ of --output_dir",
    "push_to_hub_model_id": "--push_to_hub",
    "hub_model_id": "--push_to_hub",
    "generate_during_eval": "--sample_every STEPS",
    "do_train": "leave it out",
    "do_eval": "leave it out: held-out rows are always evaluated",
}


# --- The parser -----------------------------------------------------------------------------------

class Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default to a flag's help, unless there is none or the help mentions it, and then the
    default in the embedded world, where it is another."""

    def __init__(self, prog, world_defaults=None, **options):
        super().__init__(prog, **options)
        self.world_defaults = world_defaults or {}

    def _get_help_string(self, action):
        text = action.help
        not_shown = (None, False, ..., argparse.SUPPRESS)
        if "default" not in text and not any(action.default is value for value in not_shown):
            text += f" (default {action.default})"
        in_world = self.world_defaults.get(action.dest, action.default)
        if in_world == action.default:
            return text
        if text.endswith(")"):
            return f"{text[:-1]}; in the world {in_world})"
        return f"{text} (in the world {in_world})"


def true_or_false(text):
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text}")
    return text == "true"


def add_source_flags(add):
    """Add the flags for the loss, the model, the data and the output folder."""
    add("--loss", default="sigmoid",
        help=f"NAME, or a sum NAME:WEIGHT,NAME:WEIGHT, of {', '.join(LOSSES)}")
    add("--model", default="world",
        help="policy: a folder, a hub id, or world (default: the base of --adapter, else world)")
    add("--revision",
        help="branch, tag or commit of a --model of the Hub (default: its main branch)")
    add("--dataset", type=any_name, default="world",
        help="a file or folder (.jsonl .json .csv .parquet), a hub id, or world; several parts as "
             "NAME:SPLIT:SHARE,NAME:SPLIT:SHARE, where splits and shares may be left out "
             "(default: world, where the model is the world's too)")
    add("--eval_dataset", type=any_name,
        help="held-out rows, as --dataset; several sets as NAME=ROWS,NAME=ROWS, each with rows "
             "eval/NAME of metrics.jsonl (default: a share of the prompts, see --eval_share)")
    add("--eval_share", type=real_number("[0, 1)"),
        help="share of the prompts to hold out (default 0.05; 0: none)")
    add("--output_dir", help="a new or empty folder (default: a new one below runs/)")
    add("--eval_only", action="store_true",
        help="train nothing: evaluate --model, a run or another model, on --eval_dataset, with the "
             "loss, reference and rows of the run, and print all metrics; --output_dir keeps them "
             "in metrics.jsonl")
    add("--dry_run", action="store_true",
        help="do all that comes before the first update, and forward and backward of two steps, "
             "and print steps, memory and estimated time; nothing is written into --output_dir")
    add_config_flag(add)
    add("--resume", action="store_true",
        help="continue from the newest checkpoint in --output_dir, with the flags of that run; "
             "with a higher --max_steps, --epochs or --early_stop it becomes a longer run, even if "
             "it has ended: --lr_schedule is then that of the new length, with the warm-up of the "
             "old one")


def add_policy_flags(add, loss):
    """Add the flags for the weights to train and for the reference."""
    add("--adapter",
        help="start from this LoRA adapter on top of --model: a folder saved by train.py or PEFT")
    add("--lora_rank", type=whole_number(">= 1"),
        help="train a new LoRA adapter of this rank, and nothing else")
    add("--lora_alpha", type=real_number("> 0"),
        help="the scale of the adapter is alpha / rank (default: twice the rank)")
    add("--lora_target",
        help="names of linear layers, as q_proj,v_proj, or a regular expression "
             "(default: all but the head)")
    add("--lora_dropout", type=real_number("[0, 1)"), default=0.0,
        help="dropout on the input of the adapter")
    add("--rslora", action="store_true", help="the scale is alpha / sqrt(rank)")
    add("--dora", action="store_true",
        help="train the norms of the weights separately from their directions")
    add("--quantize", choices=("nf4",), help="store the frozen weights in 4 bits (QLoRA)")
    add("--train_vision", action="store_true",
        help="train the vision tower and the layers between it and the language model too, which "
             "are frozen without this flag; with --lora_rank, adapt them")
    add("--gradient_checkpointing", action="store_true",
        help="recompute activations in backward: less memory, more time")
    add("--router_aux_loss_coef", type=real_number(">= 0"),
        help="mixtures of experts: weight of the loss that balances the experts, 0.001 to 0.02 in "
             "most configs; it costs a second forward (default: none, or that of the model's "
             "config where its output_router_logits is true)")
    if not needs_reference(loss):
        return
    add("--ref", choices=("model", "adapter_off", "adapter", "cache", "none"),
        help="the reference. model: a second model (default without an adapter, or with "
             "--ref_model); adapter_off: the policy without its adapter (default with "
             "--lora_rank); adapter: a frozen copy of --adapter (default with --adapter); cache: "
             "log-probs computed once and stored on disk; none: with --reference_free")
    add("--ref_model",
        help="the second model of --ref model (default: the model that the policy starts from)")
    add("--ref_batch_size", type=whole_number(">= 1"),
        help="pairs per forward of --ref cache (default: micro_batch_size)")
    add("--sync_ref_every", type=whole_number(">= 1"),
        help="TR-DPO: move the reference towards the policy after this many steps")
    add("--sync_ref_alpha", type=real_number("(0, 1]"),
        help="TR-DPO: weight of the policy in the moved reference, in (0, 1] (default 0.6)")


def add_optimizer_flags(add):
    """Add the flags for batches, number of steps, optimizer and learning rate."""
    add("--batch_size", type=whole_number(">= 1"), default=64,
        help="pairs per optimizer step, all ranks together")
    add("--micro_batch_size", type=whole_number(">= 1"),
        help="pairs per forward on one rank: fewer need less memory (default 4)")
    add("--tokens_per_micro_batch", type=whole_number(">= 1"),
        help="in place of --micro_batch_size: most tokens per forward on one rank; the two answers "
             "of a pair share its prompt, which counts once")
    add("--epochs", type=whole_number(">= 1"), help="passes over the data (default 1)")
    add("--max_steps", type=whole_number(">= 1"), help="optimizer steps, in place of --epochs")
    add("--lr", type=real_number("> 0"),
        help="peak learning rate (default 5e-7, with an adapter 5e-6; for sft 1e-5, with an "
             "adapter 1e-4). These are for billions of parameters and hundreds of steps: a model "
             "of 0.1 billion needs 5e-4 with an adapter to learn in tens of steps, see "
             "docs/real_model.md")
    add("--lr_schedule", choices=SCHEDULES, default="linear", help="schedule after the warm-up")
    add("--min_lr", type=real_number(">= 0"), default=0.0,
        help="learning rate at the end of a linear or cosine schedule; a tenth of --lr is usual "
             "for long runs")
    add("--warmup_steps", type=whole_number(">= 0"),
        help="steps of linear warm-up: step k of W has lr x k / (W + 1); the DPO paper has 150 "
             "(default: a tenth of the steps)")
    add("--optimizer", choices=MOMENTS, default="adamw",
        help="rmsprop: what the DPO paper trains with, at --lr 1e-6; it keeps one tensor of the "
             "size of the weights, and adamw two")
    add("--weight_decay", type=real_number(">= 0"), default=0.0,
        help="AdamW: each step subtracts lr x weight_decay x weight, but not from biases and "
             "norms; preference optimization mostly has 0, pretraining 0.01 to 0.1")
    add("--adam_beta1", type=real_number("[0, 1)"), default=0.9,
        help="AdamW: decay of the mean gradient; 0.9 is nearly always good")
    add("--adam_beta2", type=real_number("[0, 1)"), default=0.999,
        help="AdamW: decay of the mean squared gradient; 0.95 to 0.99 adapts faster, for large "
             "batches")
    add("--adam_eps", type=real_number("> 0"), default=1e-8,
        help="AdamW: added to the root of the mean squared gradient")
    add("--max_grad_norm", type=real_number("> 0"), default=1.0,
        help="gradients are clipped to this norm")


def add_run_flags(add):
    """Add the flags for parallelism, precision, kernels, logs and checkpoints."""
    add("--parallel", choices=("ddp", "fsdp"), default="ddp",
        help="fsdp: shard weights, gradients and optimizer states over the ranks")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float64"), default="auto",
        help="dtype of the computation; bfloat16: autocast over float32 weights; "
             "auto: bfloat16 on a GPU, float32 on a CPU")
    add("--attention", choices=("auto", "packed", "padded"), default="auto",
        help="packed: compute each prompt once and without padding, by sdpa; "
             "auto: packed if the model supports it and it is faster")
    add("--attn_implementation", choices=ATTENTION_KERNELS,
        help="transformers' attention, for policy and reference; packed rows need sdpa; "
             "flash_attention_2 needs a GPU and the package flash-attn; eager is slow and shows "
             "attention weights (default: that of the model's config, mostly sdpa)")
    add("--compile", action="store_true",
        help="torch.compile the MLPs and norms; the first steps include compilation")
    add("--deterministic", action="store_true",
        help="on a GPU use deterministic kernels only: slower, but a run that is repeated or "
             "resumed ends bit for bit the same; an operation without such a kernel is an error. "
             "Runs on a CPU are deterministic without this flag")
    add("--log_every", type=whole_number(">= 1"), default=10,
        help="steps between rows of metrics.jsonl")
    add("--eval_every", type=whole_number(">= 0"), default=200,
        help="steps between evaluations (0: at the end only)")
    add("--keep_best", metavar="METRIC",
        help="end with the weights of the best evaluation by eval/loss, eval/rewards/accuracies, "
             "eval/rewards/margins, eval/NAME/loss of a named set, world/share, ...; until then "
             "they are in best/ of --output_dir")
    add("--early_stop", type=whole_number(">= 1"), metavar="N",
        help="stop after N evaluations without a better --keep_best; 3 to 5 are usual")
    add("--save_every", type=whole_number(">= 0"), default=200,
        help="steps between checkpoints (0: only when interrupted)")
    add("--save_last", action="store_true",
        help="write a checkpoint after the last step too, from which --resume --max_steps MORE "
             "makes the finished run longer; it needs the disk space of --save_every's")
    add("--keep_checkpoints", type=whole_number(">= 1"),
        help="number of newest checkpoints to keep (default 2; 1 if one is above 10 GB)")
    add("--report_to", metavar="NAME,NAME",
        help="send the rows of metrics.jsonl to wandb, tensorboard or both; none: to neither, for "
             "a run that is resumed (default: to neither)")
    add("--push_to_hub", metavar="NAME",
        help="upload the finished model and its card to this name on the Hub")


def add_sample_flags(add):
    """Add the flags for answers during training."""
    add("--sample_every", type=whole_number(">= 0"), metavar="N",
        help="policy and reference answer the same held-out prompts, greedily, after every N steps "
             "and at the end (0: at the end only); into samples.jsonl, and in the world with true "
             "rewards (default: never)")
    add("--sample_prompts", type=whole_number(">= 0"), metavar="K",
        help="answer the first K different prompts (default 3; 0: none)")
    add("--sample_tokens", type=whole_number(">= 1"),
        help="tokens of an answer, at most (default 64)")


def add_variant_flags(add):
    """Add the flags for variants of a loss. `check_loss` rejects a variant that the loss lacks."""
    add("--reference_free", action="store_true",
        help="use zeros in place of the reference's log-probs")
    add("--f_divergence", choices=("reverse_kl", "forward_kl", "js", "alpha"),
        help="f-DPO: losses.f_divergence_score replaces the log-ratios")
    add("--f_alpha", type=real_number("(0, 1]"),
        help="the alpha of --f_divergence alpha, in (0, 1] (default 0.5)")
    add("--wpo", action="store_true",
        help="WPO: weigh a pair by how probable its answers are under the policy")
    add("--wpo_clamp", action="store_true",
        help="limit each weight of --wpo to 1, as the authors' code does; the paper has no limit")
    add("--ld_alpha", type=real_number("[0, 1]"), default=1.0,
        help="LD-DPO: weight of the tokens beyond the shorter answer's length, in [0, 1]")


def build_parser(loss: Callable, description: str | None = None) -> Parser:
    """Make the parser of a run with this loss: the trainer's flags, and the loss's keyword
    arguments as flags."""
    help_format = functools.partial(Help, world_defaults=world.flags(loss.__name__))
    parser = Parser(description=description, formatter_class=help_format, allow_abbrev=False)
    add_source_flags(parser.add_argument_group("loss, model and data").add_argument)
    policy = parser.add_argument_group("the policy and its reference")
    add_policy_flags(policy.add_argument, loss)
    add_optimizer_flags(parser.add_argument_group("the optimizer").add_argument)
    rows = parser.add_argument_group("the rows")
    data.add_flags(rows.add_argument)
    rows.add_argument("--shuffle", type=true_or_false, default=True, metavar="true|false",
                      help="false: keep the order of the file")
    rows.add_argument("--seed", type=whole_number(">= 0"), default=0,
                      help="seed of the order of the rows, and of a new adapter and its dropout")
    of_run = parser.add_argument_group("the run").add_argument
    add_run_flags(of_run)
    add_sample_flags(of_run)
    variants = parser.add_argument_group("variants of a loss, each where it is valid")
    add_variant_flags(variants.add_argument)
    own = parser.add_argument_group(f"the loss {loss.__name__}")
    for name, default in hyperparameters(loss).items():
        ranges = [LOSSES[part].ranges[name] for part in loss.parts if name in LOSSES[part].ranges]
        own.add_argument(f"--{name}", type=real_number(ranges[0]), default=default,
                         help="see the docstring of the loss in losses.py")
    return parser


def parse_args(
    argv: list[str], description: str | None = None
) -> tuple[argparse.Namespace, Callable, dict]:
    """Parse the command line. Returns args, the loss function and its hyper-parameters.

    `description` is the text that --help prints above the flags.
    """
    argv = insert_config(argv)
    if "--eval_only" in argv:
        argv = insert_saved_run(argv)
    # First parse the flags that decide which other flags exist, and which defaults they have.
    first = Parser(add_help=False, allow_abbrev=False)
    for flag in ("--loss", "--model", "--output_dir", "--tokens_per_micro_batch", "--epochs",
                 "--max_steps"):
        first.add_argument(flag)
    first.add_argument("--dataset", type=any_name)
    first.add_argument("--resume", action="store_true")
    early = first.parse_known_args(argv)[0]
    saved = saved_flags(early.output_dir) if early.resume else {}
    loss_name = early.loss or str(saved.get("loss", "sigmoid"))
    with naming_flags(["loss"]):
        loss = find(loss_name)

    # Then parse all flags. The world has its own defaults; a resumed run has its saved flags.
    parser = build_parser(loss, description)
    all_flags = vars(parser.parse_args([]))
    if saved and loss_name == saved.get("loss", loss_name):
        check_saved(saved, parser, all_flags, flags_path(early.output_dir))
    world_defaults = {}
    if (early.dataset or saved.get("dataset", "world")) == "world":
        world_defaults = world.flags(loss_name)
    defaults = {name: value for name, value in world_defaults.items()
                if name in all_flags and name != "epochs"}
    if early.tokens_per_micro_batch:
        defaults.pop("micro_batch_size", None)
    # These defaults are given as values, so that --help prints the parser's: those of real runs.
    if early.epochs or early.max_steps:  # a resumed run may be made longer by either flag
        defaults |= saved | {"epochs": None, "max_steps": None}
    else:
        defaults |= saved
    start = argparse.Namespace(**defaults)
    args, unknown = parser.parse_known_args(argv, start)
    if unknown:
        refuse_flags(unknown, argv, loss_name, all_flags)

    # Last, check combinations of flags and derive values from them.
    if args.adapter and not saved and early.model is None:
        args.model = base_of_adapter(args.adapter)
        if not os.path.isdir(args.model):
            args.revision = args.revision or revision_of_base(args.adapter)
    settle_adapter(args, loss)
    settle_reference(args, loss)
    check_args(args, saved)
    if not saved and not args.eval_only:
        check_sources(args, early)
    hyper = {name: getattr(args, name) for name in hyperparameters(loss)}
    check_loss(args, loss, hyper)
    fill_defaults(args, loss, world_defaults)
    # check_args did this for the flags that were given; a default that was just filled in must be
    # the saved value too.
    check_unchanged(args, saved)
    return args, loss, hyper


# --- --config -------------------------------------------------------------------------------------

# Pairs of flags of which a run reads one. The command line replaces either by the other.
ALTERNATIVES = (("epochs", "max_steps"), ("micro_batch_size", "tokens_per_micro_batch"),
                ("eval_share", "eval_dataset"))
# Flags in the file of a run that a new run does not take over: it has a folder of its own, and does
# not replace what the other run published.
OF_ONE_RUN = ("output_dir", "resume", "push_to_hub")


def add_config_flag(add):
    add("--config", type=any_name, metavar="FILE.json", default=argparse.SUPPRESS,
        help='flags as a JSON object, {"lr": 1e-6, "dora": true}, or the config.json or run.json '
             "of a run, without its --output_dir and --push_to_hub; flags on the command line "
             "win, except that a switch which the file turns on stays on")


def insert_config(argv):
    """Replace --config FILE by the flags in the file, in front of those of the command line."""
    parser = Parser(add_help=False, allow_abbrev=False)
    add_config_flag(parser.add_argument)
    found, rest = parser.parse_known_args(argv)
    if "config" not in found:
        return argv
    if "--resume" in rest:
        raise UserError(f"--config {found.config}: a resumed run has the flags that it saved; "
                        "leave it out")
    given = {word.partition("=")[0].removeprefix("--") for word in rest}
    try:
        return flags_of_config(found.config, given, value_of("loss", rest)) + rest
    except UserError as error:
        raise UserError(f"--config {found.config}: {error}") from error


def flags_of_config(path, given, loss_name):
    """Read the flags of a file -> words of a command line.

    given       names of the flags on the command line
    loss_name   the loss on the command line, or ""
    """
    values = read_json(path)
    if isinstance(values.get("flags"), dict):
        values = {name: value for name, value in values["flags"].items() if name not in OF_ONE_RUN}
        drop_reference(values, loss_name)
    return words_of_flags(values, given, loss_name)


def words_of_flags(values, given, loss_name):
    """{flag: value} of a file or a run -> words of a command line. `given` and `loss_name` are
    those of flags_of_config."""
    for pair in ALTERNATIVES:
        for name, other in (pair, reversed(pair)):
            if name in given:
                values.pop(other, None)
    saved_loss = str(values.get("loss", "sigmoid"))
    with naming_flags(["loss"]):
        loss = find(saved_loss)
    parser = build_parser(loss)
    all_flags = vars(parser.parse_args([]))
    words = to_words(values, all_flags)
    unknown = parser.parse_known_args(words)[1]
    if unknown:
        refuse_flags(unknown, words, saved_loss, all_flags)
    if loss_name and loss_name != saved_loss:  # the other loss has defaults of its own
        defaults = hyperparameters(loss)
        if values.get("dataset", "world") == "world":
            defaults |= world.flags(saved_loss)
        for name in hyperparameters(loss):
            if values.get(name) == defaults[name]:
                del values[name]
    return to_words(values, all_flags)


def drop_reference(values, loss_name):
    """Remove --ref, which every run saves, if the loss of the run or that of the command line has
    no reference."""
    saved_loss = str(values.get("loss", "sigmoid"))
    with naming_flags(["loss"]):
        losses = [find(saved_loss), find(loss_name or saved_loss)]
    if not all(needs_reference(loss) for loss in losses):
        values.pop("ref", None)


def to_words(values, all_flags):
    """{flag: value of JSON} -> words of a command line. A null is a flag that was not given."""
    words = []
    for name, value in values.items():
        if isinstance(value, (list, dict)):
            raise UserError(f"{name}: must be text, a number, true, false or null, as on the "
                            f"command line; got {json.dumps(value):.60}")
        if name == "config":
            raise UserError("config: a file of flags cannot name another one")
        is_switch = all_flags.get(name) is False
        if is_switch and not isinstance(value, bool):
            raise UserError(f"{name}: is a switch, so it must be true or false")
        if is_switch and value:
            words.append(f"--{name}")
        elif not is_switch and value is not None:
            text = str(value).lower() if isinstance(value, bool) else value
            words.append(f"--{name}={text}")
    return words


def fill_defaults(args, loss, world_defaults):
    """Fill in the defaults that depend on other flags."""
    if not args.tokens_per_micro_batch:
        args.micro_batch_size = args.micro_batch_size or 4
    if not args.lr:
        is_sft = sides_of(loss) == ("chosen",)
        args.lr = 1e-5 if is_sft else 5e-7
        if args.adapter or args.lora_rank:
            args.lr = 1e-4 if is_sft else 5e-6
    if args.min_lr > args.lr:
        raise UserError(f"--min_lr {args.min_lr:g}: is above --lr {args.lr:g}; lower it")
    if not args.max_steps:
        args.epochs = args.epochs or world_defaults.get("epochs", 1)
    if args.eval_share is None and not args.eval_dataset and args.dataset != "world":
        args.eval_share = 0.05
    if args.sample_every is not None:
        args.sample_prompts = 3 if args.sample_prompts is None else args.sample_prompts
        args.sample_tokens = args.sample_tokens or 64


# --- --eval_only ----------------------------------------------------------------------------------

def evaluation_flags(loss):
    """-> the names of the flags that are read with --eval_only."""
    names = {"eval_only", "model", "revision", "loss", "eval_dataset", "output_dir", "ref",
             "ref_model", "micro_batch_size", "tokens_per_micro_batch", "dtype", "parallel",
             "attention", "attn_implementation", "compile", "deterministic"}
    data.add_flags(lambda name, **options: names.add(name.removeprefix("--")))
    return names.union(Variants._fields, hyperparameters(loss))


def split_model(argv):
    """-> the value of --model, or None, and the other words of the command line."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    found, rest = parser.parse_known_args(argv)
    return found.model, rest


def insert_saved_run(argv):
    """Put the flags of the run that --model names in front of those of the command line, and the
    model that it started from in the place of its folder."""
    name, rest = split_model(argv)
    if name is None:
        raise UserError("--eval_only: give --model, the run or the model to evaluate")
    saved, loss_name = find_saved(name), value_of("loss", rest)
    given = {word.partition("=")[0].removeprefix("--") for word in rest if word.startswith("--")}
    with naming_flags(["loss"]):
        loss = find(loss_name or saved.flags.get("loss", "sigmoid"))
    for flag in sorted(given - evaluation_flags(loss) - {"help"}):
        if flag in vars(build_parser(loss).parse_args([])):
            raise UserError(f"--{flag}: is not read with --eval_only; leave it out")
    if saved.weights is None and needs_reference(loss):
        if not given.intersection(("ref_model", "reference_free")):
            raise UserError(f"--eval_only: --model {name} is not a run, so nothing says what it is "
                            "compared with; give --ref_model, or --reference_free")
    if value_of("ref", rest) == "cache":
        raise UserError("--ref cache: is for training; leave it out, and the reference of the run "
                        "is computed")
    values = flags_to_evaluate(saved, given, loss)
    if not given.union(values).intersection(("eval_dataset", "dataset")):
        raise UserError("--eval_only: give --eval_dataset, the rows to evaluate on")
    values.setdefault("dataset", "none")  # is not read
    return words_of_flags(values, given, loss_name) + rest


def flags_to_evaluate(saved, given, loss):
    """-> {flag: value} of a run, as far as --eval_only reads them. `given` are the names of the
    flags on the command line."""
    kept = evaluation_flags(loss).union(("adapter", "lora_rank", "quantize"))
    # The chat template is saved with the tokenizer; --parallel and --compile belong to the machine.
    kept -= {"eval_only", "output_dir", "chat_template", "parallel", "compile"}
    values = {}
    for name, value in saved.flags.items():
        if name in kept and value is not None:
            values[name] = value
    values["model"] = saved.source
    if saved.flags.get("model") == "world":
        values |= {"model": "world", "dataset": "world"}
    if saved.weights is not None and is_adapter(saved.weights):
        settle_saved_adapter(values, saved)
    # The reference of the run; the default is that of --ref cache, without a cache.
    drop_reference(values, loss.__name__)
    if values.get("ref") == "cache" or "ref_model" in given:
        values.pop("ref", None)
    if "ref" in given or not needs_reference(loss):
        values.pop("ref_model", None)
    if kind_of(loss) != "labels":
        values.pop("unpair", None)
    return values


def settle_saved_adapter(values, saved):
    """Let the flags say that there is an adapter. Its rank is read from its file."""
    if not values.get("adapter"):
        values["lora_rank"] = values.get("lora_rank", 1)
    if not saved.flags and not os.path.isdir(saved.source):  # made by PEFT
        values["revision"] = revision_of_base(saved.weights)


# --- Combinations of flags: derived values and contradictions -------------------------------------

# Flags that configure a new adapter, and their defaults.
LORA = {
    "lora_alpha": None, "lora_target": None, "lora_dropout": 0.0, "rslora": False, "dora": False,
}


def base_of_adapter(adapter):
    """The default of --model with --adapter."""
    base = read_adapter(adapter)[2]
    if not base:
        raise UserError(f"--adapter {adapter}: its adapter_config.json names no base model; "
                        "give --model")
    return base


def revision_of_base(adapter):
    """The default of --revision with --adapter and without --model."""
    return read_json(pathlib.Path(adapter) / "adapter_config.json").get("revision")


def settle_adapter(args, loss):
    """Derive values from the flags of an adapter, and reject contradictions."""
    for name, default in LORA.items():
        if getattr(args, name) == default:
            continue
        if args.adapter:
            raise UserError(f"--{name}: is read for a new adapter only; "
                            "give --lora_rank and no --adapter")
        if not args.lora_rank:
            raise UserError(f"--{name}: is read for a new adapter only; give --lora_rank")
    if args.adapter and args.lora_rank:
        raise UserError(f"--lora_rank {args.lora_rank}: --adapter {args.adapter} has its "
                        "own rank; give one of the two flags")
    if args.lora_dropout and "batch" in loss.tags:
        raise UserError(f"--lora_dropout {args.lora_dropout}: {loss.__name__} computes its "
                        "log-probs twice, and they must be the same")
    if args.quantize and args.parallel == "fsdp":
        raise UserError(f"--quantize {args.quantize}: 4-bit weights can't be sharded; "
                        "use --parallel ddp")
    if args.quantize and not (args.adapter or args.lora_rank):
        raise UserError(f"--quantize {args.quantize}: 4-bit weights can't be trained; "
                        "train an adapter, by --lora_rank or --adapter")
    if args.lora_rank and args.lora_alpha is None:
        args.lora_alpha = 2.0 * args.lora_rank


def default_reference(args):
    """Choose --ref from the flags that were given."""
    if args.reference_free:
        return "none"
    if args.ref_model:
        return "model"
    if args.adapter:
        return "adapter"
    return "adapter_off" if args.lora_rank else "model"


def settle_reference(args, loss):
    """Derive values from the flags of the reference, and reject contradictions."""
    if not needs_reference(loss):
        args.ref, args.sync_ref_every = "none", None
        return
    args.ref = args.ref or default_reference(args)
    if args.ref == "none" and not args.reference_free:
        raise UserError("--ref none: this loss reads a reference; "
                        "--reference_free uses zeros in its place")
    if args.ref != "none" and args.reference_free:
        raise UserError(f"--ref {args.ref}: is not read with --reference_free")
    if args.ref == "adapter" and not args.adapter:
        raise UserError("--ref adapter: there is no --adapter to start from")
    if args.ref == "adapter_off" and not (args.adapter or args.lora_rank):
        raise UserError("--ref adapter_off: there is no adapter to turn off")
    if args.ref_model and args.ref not in ("model", "cache"):
        other = "reference_free" if args.reference_free else f"ref {args.ref}"
        raise UserError(f"--ref_model {args.ref_model}: is not read with --{other}")
    if args.ref_batch_size and args.ref != "cache":
        raise UserError(f"--ref_batch_size {args.ref_batch_size}: is read with --ref cache only")
    settle_moving_reference(args)


def settle_moving_reference(args):
    """Check the flags of TR-DPO, and set the default of --sync_ref_alpha."""
    every, alpha = args.sync_ref_every, args.sync_ref_alpha
    if every and args.ref not in ("model", "adapter"):
        raise UserError(f"--sync_ref_every {every}: a reference of --ref {args.ref} can't move")
    if every and args.ref == "model" and (args.adapter or args.lora_rank):
        raise UserError(f"--sync_ref_every {every}: --ref model has no adapter to move towards "
                        "the policy's adapter; start from one by --adapter, with --ref adapter")
    if alpha and not every:
        raise UserError(f"--sync_ref_alpha {alpha}: is read with --sync_ref_every")
    if every and not alpha:
        args.sync_ref_alpha = 0.6


def refuse_flags(unknown, argv, loss_name, all_flags):
    """Raise for unknown flags. Translate the flags of other trainers, all in one line."""
    flags = [word.split("=")[0] for word in unknown if word.startswith("--")]
    translations = []
    for flag in flags:
        name = flag.removeprefix("--").replace("-", "_")
        if name in OTHER_TRAINERS:
            translations.append(f"{flag}: {translate_flag(name, argv)}")
    if translations:
        raise UserError(f"these flags are another trainer's; write instead: "
                        f"{'; '.join(translations)}")
    if not flags:
        start = argv.index(unknown[0])
        raise UserError(f"{' '.join(argv[max(0, start - 2):start + 1])}: no flag reads "
                        f"{unknown[0]!r}; lists are separated by commas without spaces, and a "
                        "switch has no value")
    refuse_flag(flags[0], loss_name, all_flags)


def translate_flag(name, argv):
    """Return the flag of this project for a flag of another trainer, with its value."""
    translation, value = OTHER_TRAINERS[name], value_of(name, argv)
    if value.lower() == "false":
        return "leave it out"
    # A bare flag takes the value as it is, without the .0 of a whole number.
    if re.fullmatch(r"--\w+", translation) and value.lower() != "true":
        translation = f"{translation} {re.sub(r'[.]0+$', '', value)}".strip()
    if name in BATCH_SIZE_PARTS:
        translation = f"{translation}, and {multiply_batch_size(argv)}"
    return translation


def value_of(name, argv):
    """Return the value of a flag as it was written, or ""."""
    for word, following in zip(argv, [*argv[1:], ""]):
        flag, _, value = word.partition("=")
        if flag.removeprefix("--").replace("-", "_") == name:
            return following if not value and not following.startswith("--") else value
    return ""


# --batch_size is the product of these flags and the number of processes.
BATCH_SIZE_PARTS = ("per_device_train_batch_size", "gradient_accumulation_steps")


def multiply_batch_size(argv):
    """Compute --batch_size from the flags of another trainer."""
    factors = [value_of(name, argv) or "1" for name in BATCH_SIZE_PARTS]
    factors.append(os.environ.get("WORLD_SIZE", "1"))
    product = " x ".join(factors)
    if all(factor.isdecimal() for factor in factors):
        product = f"{math.prod(map(int, factors))} = {product}"
    return f"--batch_size {product} (per device x accumulation x processes)"


def refuse_flag(flag, loss_name, all_flags):
    """Raise for an unknown flag. Name the losses that read it, or the nearest flag."""
    name = flag.removeprefix("--")
    if name in REFERENCE_FLAGS:
        raise UserError(f"{flag}: --loss {loss_name} has no reference")
    readers = [other for other, loss in LOSSES.items() if name in hyperparameters(loss)]
    if readers:
        raise UserError(f"{flag} is not read by --loss {loss_name}; "
                        f"it is read by {', '.join(readers)}")
    near = difflib.get_close_matches(name, all_flags, n=1, cutoff=0)
    raise UserError(f"{flag}: there is no such flag; the nearest is --{near[0]}")


def check_saved(saved, parser, all_flags, path):
    """Raise a UserError if the file of a run has a flag that its command line could not have.

    The values are written as a command line and parsed again.
    """
    # A loss without a reference has no flags for one, and yet these two values.
    unknown = sorted(saved.keys() - all_flags.keys() - {"ref", "sync_ref_every"})
    missing = sorted(all_flags.keys() - saved.keys())
    if unknown or missing:
        problem = f"has no {missing[0]}" if missing else f"has {unknown[0]}, which is no flag"
        raise UserError(f"{path}: {problem}; it was changed, or another version wrote it")
    words = []
    for name, default in all_flags.items():
        value = saved[name]
        if default is False and value is True:  # a switch
            words.append(f"--{name}")
        elif value is not default:
            text = str(value).lower() if isinstance(value, bool) else value
            words.append(f"--{name}={text}")
    try:
        parsed = vars(parser.parse_args(words))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    for name, value in parsed.items():
        if value != saved[name]:
            raise UserError(f"{path}: {name} is {saved[name]!r}, which --{name} cannot give")


def check_unchanged(args, saved):
    """Raise a UserError if a flag of a resumed run is not the saved one."""
    for name in ["loss", *sorted(saved)] if saved else []:
        value = getattr(args, name, None)
        if value == saved[name] or may_change(name, value, saved[name]):
            continue
        rule = "and may not change when it is resumed"
        if name in LENGTH and saved[name] is not None:
            rule = "which may only be made higher when it is resumed"
        raise UserError(f"--{name} {value}: the run in {args.output_dir} has {saved[name]}, {rule}")


def check_args(args, saved):
    """Check combinations of flags that no flag's type can check.

    `saved` has the flags of the run that is resumed; in a new run it is empty.
    """
    check_unchanged(args, saved)
    if args.epochs and args.max_steps:
        raise UserError(f"--epochs {args.epochs} and --max_steps {args.max_steps} both say how "
                        "long to train: give one")
    if args.tokens_per_micro_batch and args.micro_batch_size:
        raise UserError(f"--micro_batch_size {args.micro_batch_size} and --tokens_per_micro_batch "
                        f"{args.tokens_per_micro_batch}: give one")
    if args.dry_run and args.resume:
        raise UserError("--dry_run: is for a run that has not begun; leave --resume out")
    data.read_flags(args)
    check_optimizer(args)
    check_model(args)
    check_best(args, saved)
    for name in ("sample_prompts", "sample_tokens"):
        if args.sample_every is None and getattr(args, name) is not None:
            raise UserError(f"--{name} {getattr(args, name)}: is read with --sample_every")
    if args.eval_dataset:
        evaluation_sets(args.eval_dataset)
    check_output_dir(args)
    check_trackers(args.report_to)
    check_hub_name(args.push_to_hub)
    if args.eval_share is None:
        return
    if args.eval_dataset or args.dataset == "world":
        held_out = args.eval_dataset or "the world's own"
        raise UserError(f"--eval_share {args.eval_share}: the held-out rows are {held_out}")


# Flags of --optimizer adamw, and their defaults.
ADAMW = {"weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8}


def check_optimizer(args):
    """Refuse flags that the optimizer or the schedule does not read."""
    for name, default in ADAMW.items():
        value = getattr(args, name)
        if args.optimizer != "adamw" and value != default:
            raise UserError(f"--{name} {value}: is read with --optimizer adamw only")
    if args.min_lr and args.lr_schedule == "constant":
        raise UserError(f"--min_lr {args.min_lr:g}: --lr_schedule constant stays at --lr; leave it "
                        "out, or choose linear or cosine")


def check_best(args, saved):
    """Refuse --keep_best and --early_stop where they cannot work."""
    if args.early_stop and not args.keep_best:
        raise UserError(f"--early_stop {args.early_stop}: give --keep_best METRIC too, which says "
                        "what better is")
    if not args.keep_best:
        return
    is_higher_better(args.keep_best)
    if not args.eval_every:
        raise UserError(f"--keep_best {args.keep_best}: --eval_every 0 evaluates at the end only; "
                        "give the steps between evaluations")
    if saved and args.eval_every != saved["eval_every"]:
        raise UserError(f"--eval_every {args.eval_every}: the run has {saved['eval_every']}, which "
                        f"may not change with --keep_best {args.keep_best}")


def check_model(args):
    """Refuse flags of the model that contradict others."""
    kernel = args.attn_implementation
    if args.attention == "packed" and kernel not in (None, "sdpa"):
        raise UserError(f"--attn_implementation {kernel}: --attention packed computes rows with "
                        "sdpa; give one of the two flags")
    if args.revision and (args.model == "world" or os.path.isdir(args.model)):
        raise UserError(f"--revision {args.revision}: --model {args.model} is not a model of the "
                        "Hub and has no revisions; leave it out")


def check_output_dir(args):
    """Refuse a folder that can't be made because a file is there, before a model is loaded."""
    if not args.output_dir:
        return
    folder = pathlib.Path(args.output_dir)
    for path in (folder, *folder.parents):
        if os.path.lexists(path) and not path.is_dir():  # a broken link exists only for lexists
            raise UserError(f"--output_dir {folder}: {path} is a file, not a folder; choose "
                            "another name")


def check_sources(args, early):
    """Refuse a new run where --model or --dataset was forgotten.

    A run without the two flags trains the world's model on the world's data. Neither of them goes
    with a real one, except where --dataset world is given: a real model may train on it.
    `early` has None for a flag that was not given.
    """
    own_models = ("world", str(world.folder() / "reference"))
    if args.dataset == "world" and early.dataset is None and args.model not in own_models:
        source = f"--model {args.model}" if early.model else f"--adapter {args.adapter}"
        raise UserError(f"{source}: give --dataset too, the pairs to train on; without it, a run "
                        "trains on a toy world (if you mean that, give --dataset world)")
    if args.model != "world":
        return
    only_words = "--model world has only the words of its own data"
    if args.dataset != "world":
        raise UserError(f"--dataset {args.dataset}: give --model too, the model to train; "
                        f"{only_words}")
    if args.eval_dataset:
        raise UserError(f"--eval_dataset {args.eval_dataset}: give --model and --dataset too; "
                        f"{only_words}")
    if getattr(args, "ref_model", None) and early.model is None:
        raise UserError(f"--ref_model {args.ref_model}: give --model and --dataset too; without "
                        "them, a run trains a toy model (if you mean that, give --model world)")


def read_variants(args: argparse.Namespace) -> Variants:
    return Variants(**{name: getattr(args, name) for name in Variants._fields})


def check_loss(args, loss, hyper):
    """Check the hyper-parameters' ranges and the variants, by calling the loss on one row."""
    kind = kind_of(loss)
    if args.pairs and len(sides_of(loss)) < 2 and not args.unpair:
        read = "one answer of a row" if kind == "pairs" else kind
        raise UserError(f"--pairs {args.pairs}: {loss.__name__} reads no pairs but {read}")
    if args.unpair and kind != "labels":
        raise UserError(f"--unpair: {loss.__name__} reads no labels but {kind}")
    with naming_flags([*hyper, *Variants._fields]):
        check_variants(loss, hyper, read_variants(args))
        loss(**one_row(loss), **hyper)


@contextlib.contextmanager
def naming_flags(names):
    """Turn a ValueError that begins with one of these names into a UserError about that flag.

    losses.py, registry.py and variants.py check parameters and do not know that they are flags. Any
    other ValueError is a bug.
    """
    try:
        yield
    except ValueError as error:
        if str(error).partition(" ")[0].rstrip(":") not in names:
            raise
        raise UserError(f"--{error}") from None
