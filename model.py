"""Models in and out of folders, and what runs them on more than one device.

    python model.py new --tokenizer DIR --hidden_size 256 --layers 4 --out DIR    # a random-weight Llama, for tests and timing
"""
import argparse
import json
import os
import pathlib
import shutil
from typing import NamedTuple

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from torch.nn.parallel import DistributedDataParallel as DDP
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------------------------------------
# Load, make, save
# ------------------------------------------------------------------------------------------------------------------------

def load_pretrained(auto_class, name, **options):
    """auto_class.from_pretrained, whose many ways to fail become one sentence."""
    local = os.path.isabs(name) or name.startswith(".") or name.count("/") > 1 or os.path.isdir(os.path.dirname(name) or "?")
    if local and not os.path.isdir(name):
        raise ValueError(f"{name}: no such model folder")
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        what = auto_class.__name__.removeprefix("Auto")
        where = "in this folder" if os.path.isdir(name) else "here, nor to be had from the hub"
        raise ValueError(f"{name}: no usable {what} {where} ({str(error).splitlines()[0]})") from error


def load_tokenizer(name):
    return load_pretrained(AutoTokenizer, name)


def load_model(name, dtype=torch.float32):
    """A causal language model with every weight read from the file and every dropout off.

    Policy and reference both come through here, so that they differ in nothing but what training changes: a reference in
    another dtype, or dropout on one side, is a log-ratio that is not 0 before the first step.
    """
    model, info = load_pretrained(AutoModelForCausalLM, name, dtype=dtype, output_loading_info=True)
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ValueError(f"{name}: {len(missing)} weights are not in the files or have another shape, such as {missing[0]}; "
                         "transformers would start them at random")
    turn_off_dropout(model)
    return model


def turn_off_dropout(model):
    """Set every dropout to 0 and leave the model in training mode, which gradient checkpointing asks for. The config, which
    is saved with the model, keeps its values."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(module, torch.nn.Dropout) and name == "p" or "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    model.train()


def new_model(tokenizer, hidden_size, layers, seed=0, **overrides):
    """A Llama with random weights and the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(
        **dict(vocab_size=len(tokenizer), hidden_size=hidden_size, num_hidden_layers=layers, intermediate_size=4 * hidden_size,
               num_attention_heads=max(1, hidden_size // 64), max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id,
               eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id) | overrides))


def save_model(model, tokenizer, folder, **extra):
    """save_pretrained, written aside and moved into place with config.json last: the folder loads once it is complete. What
    is in `extra` joins the model's own entries in config.json."""
    aside = pathlib.Path(folder) / ".saving"
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    config = json.loads((aside / "config.json").read_text())
    (aside / "config.json").write_text(json.dumps(config | extra, indent=2) + "\n")
    for file in sorted(aside.iterdir(), key=lambda file: file.name == "config.json"):
        os.replace(file, pathlib.Path(folder) / file.name)
    aside.rmdir()


# ------------------------------------------------------------------------------------------------------------------------
# Many processes, or one: nothing else in the project knows which
# ------------------------------------------------------------------------------------------------------------------------

class Ranks(NamedTuple):
    rank: int
    size: int
    device: torch.device


def init_distributed():
    """Join the group that torchrun started, NCCL on GPUs and gloo on CPUs; without torchrun, be alone."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def wrap(module, ranks):
    """Average gradients over the ranks during backward."""
    if ranks.size == 1:
        return module
    return DDP(module, device_ids=[ranks.device] if ranks.device.type == "cuda" else None, gradient_as_bucket_view=True)


def sync_gradients(module, on):
    """Whether the next backward talks to the other ranks: only the last of an optimizer step needs to."""
    if isinstance(module, DDP):
        module.require_backward_grad_sync = on


def sum_over_ranks(tensor, ranks):
    if ranks.size > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(value, ranks):
    """Rank 0's value, everywhere."""
    box = [value]
    if ranks.size > 1:
        dist.broadcast_object_list(box)
    return box[0]


def gather(value, ranks):
    """Every rank's value, everywhere."""
    box = [value] * ranks.size
    if ranks.size > 1:
        dist.all_gather_object(box, value)
    return box


def barrier(ranks):
    if ranks.size > 1:
        dist.barrier()


def leave_distributed(ranks):
    """All ranks wait for the last before any tears down its connections: gloo may abort otherwise."""
    if ranks.size > 1:
        dist.barrier()
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    new = parser.add_subparsers(dest="command", required=True).add_parser("new", help="make a random-weight Llama folder")
    new.add_argument("--tokenizer", required=True, help="folder whose tokenizer the model gets")
    new.add_argument("--hidden_size", type=int, default=256)
    new.add_argument("--layers", type=int, default=4)
    new.add_argument("--seed", type=int, default=0)
    new.add_argument("--out", required=True)
    args = parser.parse_args()
    if os.path.exists(args.out):
        parser.error(f"--out {args.out} exists already")
    try:
        tokenizer = load_tokenizer(args.tokenizer)
    except ValueError as error:
        parser.error(error)
    model = new_model(tokenizer, args.hidden_size, args.layers, args.seed)
    save_model(model, tokenizer, args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")


if __name__ == "__main__":
    main()
