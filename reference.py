"""Loads the reference: a second model, the policy without its adapter, a frozen adapter, a cache.

`load_reference` returns the reference of --ref as a callable, so the training loop is the same for
every kind. The other functions:

    check_reference    compares the vocabulary and positions of --ref_model with the policy's
    fingerprint        hashes the weights that no step changes; a resumed run must have the same
    settings_digest    hashes the configs of these models in the same way
    move_reference     TR-DPO: moves the reference towards the policy
    check_start        the step-0 check: before the first update policy and reference are equal
    cache_reference    --ref cache: computes the log-probs of all rows once and keeps them in a
                       file; the file name is a hash of all that they depend on (`cache_key`)
"""
import contextlib
import hashlib
import json
import pathlib
import re
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import tqdm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

import data
from answers import Mismatched
from batches import (
    Task,
    load_batches,
    of_all_pairs,
    pair_logps,
    raise_not_finite,
    split_step,
)
from checkpoint import without_ties
from dpo import concatenated_forward
from encoder_decoder import logps_module
from errors import UserError
from files import json_digest, written_aside
from loading import has_vocabulary, last_token, load_tokenizer, position_count
from log import bar_interval
from logps import FastLogps
from lora import adapter_tensors, lora_layers, use_adapter
from losses import needs_kl, needs_of
from model import load_model
from parallel import Ranks, barrier, broadcast, build_on_ranks, whole
from vision import processor_settings

# --- The models -----------------------------------------------------------------------------------

def load_weights(args: Namespace, name: str | pathlib.Path, dtype: str, device: torch.device,
                 frozen: bool = False) -> PreTrainedModel:
    """Load the model of the policy or of the reference, in 4 bits with --quantize.

    In a bfloat16 run the dtype of the weights is

        float32     if they are trained, or a reference that moves (TR-DPO)
        bfloat16    if they are the base of an adapter, or a frozen reference under fsdp
        float32     if they are a frozen reference under ddp. Autocast computes norms in the dtype
                    of the norm's weights, which is float32 in the policy. (Under fsdp the policy's
                    weights are gathered in bfloat16.)
    """
    fixed = args.adapter or args.lora_rank or (frozen and args.parallel == "fsdp")
    weights = getattr(torch, "float32" if dtype == "bfloat16" and not fixed else dtype)
    upcast = args.parallel != "fsdp" or dtype == "float64"  # else parallel.scatter upcasts
    revision = args.revision if str(name) == args.model else None
    return load_model(str(name), weights, device, bool(args.quantize), upcast, revision,
                      args.attn_implementation)


def load_reference(args: Namespace, policy: FastLogps, source: str, dtype: str,
                   ranks: Ranks) -> Callable | None:
    """Return the reference of dpo.preference_logps, or None with --ref none."""
    if args.ref == "none":
        return None
    if args.ref == "model" or args.ref_model or args.ref == "cache" and not lora_layers(policy):
        frozen = not args.sync_ref_every  # a moving reference accumulates small changes in float32

        def make(device):
            model = load_weights(args, args.ref_model or source, dtype, device, frozen)
            return logps_module(model).requires_grad_(False)

        reference = build_on_ranks(make, ranks, args.parallel, dtype)
        if args.ref_model and reference.is_encoder_decoder != policy.is_encoder_decoder:
            raise UserError(f"--ref_model {args.ref_model}: only one of it and the policy is an "
                            "encoder-decoder; pass a reference of the policy's kind")
        return reference
    name = "reference" if args.adapter and args.ref != "adapter_off" else None

    def reference(**inputs):
        with use_adapter(policy.model, name):
            return policy(**inputs)

    return reference


def check_positions(args: Namespace, name: str, model: PreTrainedModel):
    """Raise a UserError if a row could be longer than the model."""
    positions = position_count(model)
    if positions < 0:
        raise UserError(f"{name}: max_position_embeddings in its config.json is {positions}, and "
                        "must be above 0")
    if args.max_length > positions:
        raise UserError(f"--max_length {args.max_length}: {name} has {positions} positions; "
                        f"pass {positions} or less")


def check_reference(args: Namespace, model: PreTrainedModel, tokenizer: Any) -> str:
    """Raise a UserError if the model of --ref_model reads the policy's token ids as other tokens,
    or cannot read them at all. Returns a line about what cannot be known, or "".

    Without this check, a reference with another vocabulary gives log-probs of another text.
    """
    name = f"--ref_model {args.ref_model}"
    words = model.get_input_embeddings().num_embeddings
    token, number = last_token(tokenizer)
    if number >= words:
        raise UserError(f"{name}: has {words} embeddings, but the tokenizer of the policy has the "
                        f"id {number} for {token!r}; pass a reference with the policy's vocabulary")
    check_positions(args, name, model)
    if not has_vocabulary(args.ref_model):
        return f"{name}: has no tokenizer; its vocabulary is taken to be that of the policy"
    own = load_tokenizer(args.ref_model)
    difference = first_difference(tokenizer.get_vocab(), own.get_vocab())
    if difference:
        raise UserError(f"{name}: has another vocabulary than the policy ({difference}), and would "
                        "read other texts; pass a reference with the policy's tokenizer")
    unknown = sorted(tokenizer.get_vocab().keys() - own.get_vocab().keys())
    if unknown:
        return (f"{name}: its tokenizer does not have {len(unknown)} tokens of the policy, such "
                f"as {unknown[0]}; it was not trained on them")
    return ""


# Tokens without a use of their own, which a fine-tuned model often renames.
UNUSED_TOKEN = re.compile("reserved|unused|extra_id|dummy|placeholder", re.IGNORECASE)


def first_difference(policy_ids: dict, reference_ids: dict) -> str:
    """Describe the first id that stands for two tokens in two {token: id}, or "".

    A token that only one of the two has is no difference, unless its id is taken in the other.
    """
    tokens = {number: token for token, number in reference_ids.items()}
    for token, number in sorted(policy_ids.items(), key=lambda item: item[1]):
        other = tokens.get(number, token)
        if token in reference_ids and reference_ids[token] != number:
            return (f"{token!r} has id {number} in the policy, {reference_ids[token]} in the "
                    "reference")
        if other != token and not UNUSED_TOKEN.search(other):
            return f"id {number} is {token!r} in the policy, {other!r} in the reference"
    return ""


def fingerprint(policy: FastLogps, reference: Callable | None, dtype: str,
                ranks: Ranks) -> str:
    """Hash the weights that no step changes: the reference's weights, and the base of an adapter.

    In a bfloat16 run the weights are first rounded to bfloat16, because `load_weights` keeps a
    frozen reference in float32 under ddp and in bfloat16 under fsdp, and a resumed run may change
    between the two.
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
        if dtype == "bfloat16" and tensor.is_floating_point():
            tensor = tensor.bfloat16()
        if ranks.rank == 0:
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return broadcast(digest.hexdigest(), ranks)


# Entries of a model's config that change none of its outputs.
NEUTRAL_ENTRIES = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}


def settings_digest(policy: FastLogps, reference: Callable | None, processor: Any = None) -> str:
    """Hash what the weights of `fingerprint` do not show: the config of their model, as the base of
    its positions and its activation, the rank and scale of a frozen adapter, and the settings of
    the processor of images."""
    settings = {}
    if processor:
        settings["images"] = processor_settings(processor)
    if isinstance(reference, torch.nn.Module):
        settings["reference"] = config_entries(reference.model.config)
    if lora_layers(policy):
        settings["base"] = config_entries(policy.model.config)
    for path, layer in lora_layers(policy).items():
        frozen = {name: layer.settings[name] for name in layer.settings if name != "policy"}
        settings[path] = frozen
    return json_digest(settings)


def config_entries(config):
    """The entries of a model's config as JSON, without the neutral ones, also in its parts."""
    def without_neutral(entries):
        return {name: entries[name] for name in entries if name not in NEUTRAL_ENTRIES}

    text = config.to_json_string(use_diff=False)
    return json.loads(text, object_hook=without_neutral)


# --- A reference that moves -----------------------------------------------------------------------

def moving_tensors(args: Namespace, policy: FastLogps, reference: Callable | None) -> dict:
    """Return {name: tensor} of a reference that moves, {} of a fixed one.

    Call this every time instead of keeping the result: FSDP may replace the shards at the first
    forward.
    """
    if not args.sync_ref_every:
        return {}
    if args.ref == "adapter":
        return adapter_tensors(policy.model, "reference")
    # A tied weight appears once: moving it under each of its names would move it several times.
    return without_ties(reference.state_dict(keep_vars=True))


@torch.no_grad()
def move_reference(args: Namespace, policy: FastLogps, reference: Callable | None):
    """Move the reference, buffers too: θ_ref <- α θ + (1 − α) θ_ref (TR-DPO, arXiv:2404.09656).

    α = 1 is the paper's hard update. With adapters θ are the factors A and B, not their product.
    """
    source = policy.state_dict()
    if args.ref == "adapter":
        source = adapter_tensors(policy.model, "policy")
    for name, tensor in moving_tensors(args, policy, reference).items():
        target = source[name]
        if tensor.is_floating_point():
            target = torch.lerp(tensor, target.to(tensor.dtype), args.sync_ref_alpha)
        tensor.copy_(target)


# --- The step-0 check -----------------------------------------------------------------------------

# Largest difference, due to rounding, between one answer's log-probs from two batches of different
# shapes. In nats, to be multiplied by the square root of the number of the answer's tokens, because
# the errors of single tokens add up like a random walk. Measured on
# SmolLM2-135M (30 layers) on a CPU, 32 answers of 9 to 190 tokens of HH-RLHF, padded and packed in
# batches of 1, 4, 8 and 16 pairs: at most 9e-6 in float32 and 0.098 under bfloat16 autocast (rms
# 0.028). The bounds are 11 and 4 times that. TF32, which a GPU uses for float32, has 3 bits more
# than bfloat16, so its bound is an eighth of bfloat16's; TF32 and float64 are not measured.
ROUNDING = {"float64": 1e-9, "float32": 1e-4, "tf32": 0.05, "bfloat16": 0.4}


def rounding(dtype, lengths, device):
    """Bound the difference of log-probs due to rounding, in nats, for answers of these lengths."""
    if dtype == "float32" and device.type == "cuda":
        dtype = "tf32"
    return ROUNDING[dtype] * lengths ** 0.5


@torch.no_grad()
def check_start(task: Task, policy: FastLogps, reference: Callable | None, batch: dict,
                cached: bool) -> float:
    """Check that policy and reference are equal before the first update. Returns the mean loss at
    equality.

    If they differ, this program or the setup has an error, and training would begin from a wrong
    log-ratio. Equal models that are computed in the same way give the same loss. A `cached`
    reference was computed in batches of other shapes, so its log-probs may differ by rounding.
    """
    tensors = pair_logps(task, policy, reference, batch)
    names = [name for name in tensors if name.startswith("policy_")]
    equal = {name.replace("policy_", "ref_"): tensors[name] for name in names}
    actual, metrics = task.preference_loss(tensors, task.loss, task.hyper, task.score)
    expected, _ = task.preference_loss(tensors | equal, task.loss, task.hyper, task.score)
    if not actual.isfinite().all():
        values = {"loss": actual.sum().item(), "grad_norm": 0.0}
        raise_not_finite(0, values, [(batch["id"], metrics)])
    excess = (actual - expected).abs() / (1e-5 + 1e-5 * expected.abs())  # (B,), above 1: unequal
    if cached:
        excess = torch.zeros_like(actual)
        for name in names:
            lengths = tensors[name.removeprefix("policy_").replace("logps", "lengths")]
            distance = (tensors[name] - tensors[name.replace("policy_", "ref_")]).abs()
            # A missing answer has length 0 and log-probs of 0.
            share = distance / rounding(task.dtype, lengths.clamp(min=1), task.device)
            if share.dim() > 1:
                share = share.amax(1)  # (B,)
            excess = excess.maximum(share)
    worst = int(excess.argmax())
    if excess[worst] > 1:
        raise UserError(
            f"before the first step the loss of {batch['id'][worst]} is {actual[worst]:.6f}, but "
            f"{expected[worst]:.6f} where policy and reference are equal. So they are not: look "
            "for another dtype on one side, dropout left on, an adapter on one side (one that "
            "came from SFT is part of the reference too: --ref adapter), or a reference that is "
            "not what the policy starts from (if this is intended, name it by --ref_model)")
    return expected.mean().item()


# --- The cache ------------------------------------------------------------------------------------

def cache_key(args, fixed, task):
    """Hash all inputs of the cached log-probs: weights and configs, rows, the answers that the loss
    reads, dtype, ld_alpha, --quantize, and the length to which mismatched answers are truncated."""
    inputs = [fixed[name] for name in ("weights", "settings", "rows", "held_out")]
    inputs += [task.dtype, args.ld_alpha, args.quantize, needs_of(task.loss)]
    if needs_kl(task.loss):
        inputs.append(args.max_length)
    return hashlib.blake2b(str(inputs).encode(), digest_size=12).hexdigest()


def reference_logps(args, reference, rows, indices, tokenizer, task, ranks, title=None):
    """Compute (len(indices), K) log-probs of the answers of a row, 0 where it has no k-th answer. A
    title shows a progress bar."""
    def compute(batch):
        with torch.autocast(**task.autocast):
            return {"logps": concatenated_forward(reference, batch)["logps"]}

    tokens = data.column(getattr(rows, "rows", rows), "tokens")[indices]
    pieces = split_step(args, len(indices), tokens, ranks, args.ref_batch_size)
    selections = [(rows, indices[piece.pairs]) for piece in pieces]
    hidden = title is None or ranks.rank > 0
    bar = tqdm.tqdm(pieces, title, disable=hidden, mininterval=bar_interval())
    batches = load_batches(selections, tokenizer, task.row_format, ranks.device)
    with contextlib.closing(batches):
        tables = of_all_pairs(compute, batches, bar, len(indices), ranks)
    return tables["logps"].cpu()


def cache_reference(args: Namespace, reference: Callable, splits: dict, fixed: dict,
                    tokenizer: Any, task: Task, ranks: Ranks) -> dict:
    """Add the column ref_logps, K numbers per row, to the splits {name: rows}; for KTO also
    ref_mismatched_logp, of the answer of another row: see answers.Mismatched.

    fixed   hashes of what a run reads: see train.prepare

    The log-probs are read from a file. If the file does not exist, or not as it was written, all
    ranks compute it together.
    """
    key = cache_key(args, fixed, task) if ranks.rank == 0 else None
    key = broadcast(key, ranks)
    path = pathlib.Path("runs") / "references" / f"{key}.safetensors"
    tables = read_cache(path, key) if ranks.rank == 0 else None
    tables = broadcast(tables, ranks)
    source = "read from"
    if tables is None:
        source, tables = "kept in", {}
        for name, rows in splits.items():
            if len(rows):
                tables[name] = reference_table(args, reference, rows, name, tokenizer, task, ranks)
                check_finite(tables[name], rows)
        if ranks.rank == 0:
            write_cache(path, key, tables)
        barrier(ranks)
    with_logps = {}
    for name, rows in splits.items():
        if len(rows):
            table = tables[name]
            check_cache(args, path, table, reference, rows, tokenizer, task, ranks)
            if ranks.rank == 0:
                print(f"reference of {len(rows)} {name} rows {source} {path}")
            if needs_kl(task.loss):
                rows = rows.add_column("ref_mismatched_logp", table[:, -1].tolist())
                table = table[:, :-1]
            rows = rows.add_column("ref_logps", table.tolist())
        with_logps[name] = rows
    return with_logps


def mismatched_rows(args: Namespace, task: Task, rows: Any) -> Mismatched | None:
    """Return the rows with the answers of other rows, or None if the loss does not need them."""
    if not needs_kl(task.loss):
        return None
    apart = task.row_format.family == "encoder_decoder"  # answers with a max_length of their own
    return Mismatched(rows, 2 * args.max_length if apart else args.max_length)


def reference_table(args, reference, rows, name, tokenizer, task, ranks):
    """Compute (rows, K) log-probs of all rows, and for KTO one more column of `Mismatched`."""
    indices, parts = np.arange(len(rows)), [rows]
    if needs_kl(task.loss):
        parts.append(mismatched_rows(args, task, rows))
    columns = []
    for part in parts:
        columns.append(reference_logps(args, reference, part, indices, tokenizer, task, ranks,
                                       f"reference, {name}"))
    return torch.cat(columns, 1)


def check_finite(table, rows):
    """Raise a UserError if the reference gives a row no log-prob, as a model with broken weights
    does."""
    finite = table.isfinite().all(1)  # (rows,)
    if not finite.all():
        first = int(finite.int().argmin())
        raise UserError(f"--ref cache: the reference gives {rows[first]['id']} the log-probs "
                        f"{table[first].tolist()}")


def tables_digest(key: str, tables: dict) -> str:
    """Hash the log-probs of a cache and its key, so that a renamed file is recognized too."""
    digest = hashlib.blake2b(key.encode(), digest_size=12)
    for name, table in sorted(tables.items()):
        digest.update(f"{name} {table.dtype} {tuple(table.shape)}".encode())
        digest.update(table.contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_cache(path, key, tables):
    try:
        with written_aside(path) as temporary:
            save_file(tables, temporary, {"digest": tables_digest(key, tables)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the cache of --ref cache could not be written ({error}); make "
                        "room, or start train.py in another folder") from error


def read_cache(path, key):
    """Read {split: (rows, K) log-probs}, or None if there is no file, or a damaged one, which is
    computed again."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            saved = (file.metadata() or {}).get("digest")
            tables = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError):
        saved, tables = None, {}
    if saved == tables_digest(key, tables):
        return tables
    print(f"{path}: is damaged, so the log-probs of the reference are computed again")
    return None


def check_cache(args, path, table, reference, rows, tokenizer, task, ranks):
    """Compute the log-probs of four rows again and compare them with the log-probs of the file."""
    some = np.linspace(0, len(rows) - 1, min(4, len(rows))).astype(int)
    again = reference_logps(args, reference, rows, some, tokenizer, task, ranks)
    table = table[:, :again.shape[1]]
    lengths = torch.ones_like(again)
    for i, answers in enumerate(rows[some]["answer_ids"]):
        lengths[i, :len(answers)] = torch.tensor([len(answer) for answer in answers])
    bound = rounding(task.dtype, lengths, task.device)
    excess = (again - table[some]).abs() / bound
    if excess.max() <= 1:
        return
    worst = int(excess.amax(1).argmax())
    row = rows[int(some[worst])]["id"]
    raise UserError(f"{path}: has other log-probs than the reference gives now for row {row}: "
                    f"{table[some][worst].tolist()} and {again[worst].tolist()}; "
                    "delete the file, and the next run computes it again")

