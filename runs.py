"""Opens what a run left: its policy, its reference, its tokenizer and its flags.

saved.py finds the parts. Policy and reference are loaded by the functions of training, so that
their log-probs are those of the run's evaluations.
"""
import contextlib
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import data
from batches import autocast_options, resolve_dtype
from checkpoint import is_adapter
from errors import UserError
from families import family_of
from flags import build_parser, default_reference, naming_flags, revision_of_base
from generation import reference_model
from loading import (
    check_vocabulary,
    has_processor,
    load_adapter_tokenizer,
    load_tokenizer,
    position_count,
)
from logps import FastLogps
from losses import LOSSES, find, hyperparameters
from parallel import Ranks
from reference import check_reference, load_reference
from samples import measure_answers
from saved import MOVED_REFERENCE, Saved, find_saved
from train import load_policy, processor_opener

ALONE = Ranks(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


class Opened(NamedTuple):
    """The models of a run, as train.py has them."""
    policy: FastLogps
    reference: Callable | None
    tokenizer: Any
    args: Namespace  # the flags of the run
    loss: Callable
    hyper: dict
    dtype: str
    options: dict  # of the chat template
    open_processor: Callable | None  # of the images: see train.processor_opener
    notes: list[str]

    @property
    def family(self) -> str:
        return family_of(self.policy.model.config)

    def context(self, prompt: list[int]) -> list[int]:
        """Return the tokens before an answer of the decoder, of which the prompt may be apart."""
        return [] if self.family == "encoder_decoder" else prompt


# --- Loading them ---------------------------------------------------------------------------------

def open_run(name: str, base: str | None = None, ref_model: str | None = None,
             with_reference: bool = True, **changed) -> Opened:
    """Load policy and reference of --model.

    base            the model below an adapter, in place of the one that its file names
    ref_model       another reference
    changed         flags in place of those of the run, such as beta
    """
    saved = find_saved(name)
    if base and (saved.weights is None or not is_adapter(saved.weights)):
        raise UserError(f"--base {base}: {name} is not an adapter; leave the flag out")
    saved = saved._replace(source=base or saved.source)
    with naming_flags(["loss"]):
        loss = find(saved.flags.get("loss", "sigmoid"))
    args = flags_to_load(saved, loss, changed)
    settle_open_reference(args, saved, ref_model, with_reference)
    check_sources_exist(name, args, saved)

    dtype = resolve_dtype(args.dtype, ALONE.device)
    tokenizer = load_saved_tokenizer(saved, args)
    policy = load_policy(args, saved.source, saved.weights, dtype, ALONE.device)
    policy.requires_grad_(False)
    check_vocabulary(name, policy.model, tokenizer)
    args.max_length = int(min(args.max_length, position_count(policy.model)))
    reference = load_reference(args, policy, saved.source, dtype, ALONE)
    notes = [saved.note]
    if isinstance(reference, torch.nn.Module):
        args.max_length = int(min(args.max_length, position_count(reference.model)))
    if args.ref_model:
        notes.append(check_reference(args, reference.model, tokenizer))
    if args.sync_ref_every and reference is not None:
        notes.append(MOVED_REFERENCE)
    return Opened(
        policy=policy,
        reference=reference,
        tokenizer=tokenizer,
        args=args,
        loss=loss,
        hyper={name: getattr(args, name) for name in hyperparameters(loss)},
        dtype=dtype,
        options=data.read_template_kwargs(args.template_kwargs),
        open_processor=open_saved_processor(saved, args, tokenizer, policy),
        notes=[note for note in notes if note],
    )


def open_saved_processor(saved: Saved, args: Namespace, tokenizer: Any,
                         policy: torch.nn.Module) -> Callable | None:
    """Return a function that loads the processor of a run's images, or None if it sees none."""
    source = saved.source
    if saved.weights is not None and has_processor(saved.weights):
        source = saved.weights
    return processor_opener(args, source, tokenizer, policy.model)


def load_saved_tokenizer(saved: Saved, args: Namespace) -> Any:
    """Load the tokenizer of a run, with the chat template that it was trained with, or with that of
    a --chat_template given now."""
    if saved.weights is not None and is_adapter(saved.weights):
        revision = args.revision if saved.source == args.model else None
        tokenizer = load_adapter_tokenizer(saved.weights, saved.source, revision)
    else:
        tokenizer = load_tokenizer(saved.weights or saved.source)
    if args.chat_template:
        tokenizer.chat_template = data.read_template(args.chat_template)
    return tokenizer


def flags_to_load(saved: Saved, loss: Callable, changed: dict) -> Namespace:
    """Return the flags of the run, with the defaults of train.py for those that it did not have."""
    flags = vars(build_parser(LOSSES["sigmoid"]).parse_args([]))
    flags |= vars(build_parser(loss).parse_args([])) | {"model": saved.source}
    if saved.weights is not None and not saved.flags and not os.path.isdir(saved.source):
        flags["revision"] = revision_of_base(saved.weights)  # of an adapter made by PEFT
    flags |= saved.flags | changed
    flags |= {"parallel": "ddp", "compile": False, "gradient_checkpointing": False}
    # The tokenizer of the run has its --chat_template already.
    flags["chat_template"] = changed.get("chat_template")
    if not flags["tokens_per_micro_batch"]:
        flags["micro_batch_size"] = flags["micro_batch_size"] or 4
    args = Namespace(**flags)
    if saved.weights is not None and is_adapter(saved.weights):
        args.lora_rank = args.lora_rank or 1  # an adapter is read, with its own rank
    return args


def settle_open_reference(args: Namespace, saved: Saved, ref_model: str | None, wanted: bool):
    """Choose the reference. A run whose loss reads none is compared with what it started from."""
    if ref_model:
        args.ref, args.ref_model = "model", ref_model
    elif not wanted or saved.weights is None:
        args.ref, args.ref_model = "none", None
    elif args.ref in (None, "none"):
        args.ref = default_reference(Namespace(**vars(args) | {"reference_free": False}))


def check_sources_exist(name: str, args: Namespace, saved: Saved):
    """Raise a UserError if a model that the run was made from is gone."""
    adapted = saved.weights is not None and is_adapter(saved.weights)
    if adapted and not saved.source:
        raise UserError(f"{name}: its adapter_config.json names no base model; give it by --base")
    if adapted and is_gone(saved.source):
        raise UserError(f"{name}: was trained on {saved.source}, which is not there; give the "
                        "model by --base")
    second_model = args.ref in ("model", "cache") and not (adapted and args.ref == "cache")
    if second_model and not args.ref_model and is_gone(saved.source):
        raise UserError(f"{name}: was trained from {saved.source}, which is its reference and is "
                        "not there; give the model by --ref_model, or --no_reference")
    if args.ref == "adapter" and not os.path.isdir(args.adapter):
        raise UserError(f"{name}: its reference is the adapter {args.adapter}, which is not there; "
                        "give a model by --ref_model, or --no_reference")


def is_gone(source: str) -> bool:
    """Return whether a path of a folder does not exist. A name with at most one slash may be one of
    the Hub."""
    looks_local = os.path.isabs(source) or source.startswith(".") or source.count("/") > 1
    return looks_local and not os.path.isdir(source)


# --- Using them -----------------------------------------------------------------------------------

@contextlib.contextmanager
def speaker(opened: Opened, side: str) -> Iterator[torch.nn.Module]:
    """Yield the model of the policy or of the reference, in the precision of the run."""
    autocast = torch.autocast(**autocast_options(opened.dtype, ALONE.device))
    if side == "policy":
        with autocast:
            yield opened.policy.model
    else:
        with autocast, reference_model(opened.policy, opened.reference) as model:
            yield model


def answer_rewards(opened: Opened, beta: float, prompt: list[int],
                   answers: list[list[int]]) -> list[dict]:
    """Compute the log-probs and rewards of answers to one prompt: see samples.measure_answers."""
    autocast = autocast_options(opened.dtype, ALONE.device)
    return measure_answers(opened.policy, opened.reference, opened.tokenizer, autocast, beta,
                           prompt, answers)
