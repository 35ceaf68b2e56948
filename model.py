"""Models in and out of folders.

    python model.py new --tokenizer DIR --hidden_size 256 --layers 4 --out DIR    # a random-weight Llama, for tests and timing
    python model.py merge --adapter DIR --out DIR                                 # an adapter into the weights of its base
"""
import argparse
import json
import os
import pathlib

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from checkpoint import written_aside
from lora import load_adapter, merge, quantize, read_adapter

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# --- Load, make, save -------------------------------------------------------------------------------------------------

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


def load_model(name, dtype=torch.float32, device="cpu"):
    """A causal language model with every weight read from the file and every dropout off; on the device "meta" its shapes alone.

    Policy and reference both come through here, so that they differ in nothing but what training changes: a reference in
    another dtype, or dropout on one side, is a log-ratio that is not 0 before the first step.
    """
    if os.path.exists(os.path.join(name, "adapter_config.json")):
        raise ValueError(f"{name}: is an adapter, not a model: pass it by --adapter, and the model it belongs to by --model")
    if torch.device(device).type == "meta":
        with torch.device("meta"):
            model, missing = AutoModelForCausalLM.from_config(load_pretrained(AutoConfig, name), dtype=dtype), []
    else:
        model, info = load_pretrained(AutoModelForCausalLM, name, dtype=dtype, output_loading_info=True)
        missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ValueError(f"{name}: {len(missing)} weights are not in the files or have another shape, such as {missing[0]}; "
                         "transformers would start them at random")
    turn_off_dropout(model)
    return model.to(device)


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


def save_model(model, tokenizer, folder, tensors=None, **extra):
    """save_pretrained, written aside and moved into place with config.json last: the folder loads once it is complete. What
    is in `extra` joins the model's own entries in config.json. `tensors`: its weights, if it holds a shard of them only."""
    with written_aside(folder, last="config.json") as aside:
        model.save_pretrained(aside, state_dict=tensors)
        tokenizer.save_pretrained(aside)
        config = json.loads((aside / "config.json").read_text())
        (aside / "config.json").write_text(json.dumps(config | extra, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------------------

def merge_command(args):
    """Merge in fp32 into the very base the adapter was trained on, save, load again, and compare."""
    config = pathlib.Path(args.adapter) / "config.json"
    flags = json.loads(config.read_text()).get("flags", {}) if config.exists() else {}
    base = args.model or read_adapter(args.adapter)[2]
    tokenizer, model = load_tokenizer(base), load_model(base)
    if flags.get("quantize"):
        quantize(model)
    load_adapter(model, args.adapter)
    ids = torch.randint(len(tokenizer), (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        adapted = model(ids).logits
        merge(model)
        save_model(model, tokenizer, args.out)
        merged = load_model(args.out)
        difference = (merged(ids).logits - adapted).abs().max().item()
        print(f"{args.out}: {base} with {args.adapter}; loaded again, its logits differ from the adapted model's by at most {difference:.2g}, "
              f"where they reach {adapted.abs().max():.3g}")
        if flags.get("quantize"):
            quantize(merged)
            again = (merged(ids).logits - adapted).abs()
            print(f"put into 4 bits again, they would differ by at most {again.max():.2g}, {again.mean():.2g} on average")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="make a random-weight Llama folder")
    new.add_argument("--tokenizer", required=True, help="folder whose tokenizer the model gets")
    new.add_argument("--hidden_size", type=int, default=256)
    new.add_argument("--layers", type=int, default=4)
    new.add_argument("--seed", type=int, default=0)
    new.add_argument("--out", required=True)
    joined = commands.add_parser("merge", help="put an adapter into the weights of its base")
    joined.add_argument("--adapter", required=True)
    joined.add_argument("--model", help="the base (default: what the adapter names)")
    joined.add_argument("--out", required=True)
    args = parser.parse_args()
    if os.path.exists(args.out):
        parser.error(f"--out {args.out} exists already")
    try:
        if args.command == "merge":
            return merge_command(args)
        tokenizer = load_tokenizer(args.tokenizer)
    except ValueError as error:
        parser.error(error)
    model = new_model(tokenizer, args.hidden_size, args.layers, args.seed)
    save_model(model, tokenizer, args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")


if __name__ == "__main__":
    main()
