"""Loads, makes, saves and merges models.

    python model.py new --tokenizer DIR --hidden_size 256 --layers 4 --out DIR
    python model.py merge --adapter DIR --out DIR

`new` makes a Llama with random weights, for tests and timing. `merge` adds an adapter to the
weights of its base.

`load_model` reads a model in three steps, so that a 16-bit file never takes 4 bytes per weight of
host memory: it reads the file's dtype on the CPU, quantizes layer by layer if asked to, then moves
tensor by tensor to the device and converts there.
"""
from errors import Parser, UserError, run_script  # first, see errors.py
import argparse
import json
import os
import pathlib
import shutil

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from families import auto_class_of, text_inputs
from files import moved_into, new_folder
from loading import (
    MOST_LAYERS,
    build_on_meta,
    check_loaded,
    check_sizes,
    check_vocabulary,
    copy_processor,
    last_token,
    load_adapter_tokenizer,
    load_config,
    load_pretrained,
    load_tokenizer,
    read_headers,
    stored_dtype,
    weight_files,
)
from lora import (
    NF4Linear,
    base_fingerprint,
    describe_base,
    has_stacked_experts,
    load_adapter,
    merge,
    quantize,
    read_adapter,
    read_run_file,
)
from ranges import whole_number
from reach import original_config, turn_off_noise

# --- Load -----------------------------------------------------------------------------------------

def load_model(name: str, dtype=torch.float32, device="cpu", four_bits=False, upcast=True,
               revision: str | None = None, attention: str | None = None):
    """Load a language model with every weight from its files and all training noise off.

    dtype       of the parameters; modules that transformers keeps in fp32 stay in fp32
    device      on "meta" the model has shapes without values
    four_bits   quantize the linear layers, each from the CPU to the device
    upcast      False: parameters of a 16-bit file stay in its dtype, for `parallel.scatter`
    revision    a branch, tag or commit of a model of the Hub
    attention   transformers' attn_implementation

    Policy and reference are both loaded by this function, so that they differ only by training.
    Another dtype, or dropout on one side, would make a log-ratio that is not 0 at the start.
    """
    device = torch.device(device)
    if os.path.exists(os.path.join(name, "adapter_config.json")):
        raise UserError(f"{name}: is an adapter, not a model: pass it by --adapter, and the model "
                        "it belongs to by --model")
    config = load_config(name, revision, attention)
    if device.type == "meta":
        model = build_on_meta(name, config, dtype)
    else:
        model = read_model(name, config, dtype, revision)
        model.base_fingerprint = base_fingerprint(model)
        if four_bits:
            quantize(model, device)
        move(model, device, dtype if upcast else None)
    model.base_revision = revision  # for the files of an adapter
    turn_off_noise(model)
    return model


def read_model(name, config, dtype, revision=None):
    """Read the model to the CPU in the narrower of the files' dtype and `dtype`.

    Some buffers are in no file and are computed when a model is built. A later upcast cannot
    recover such a buffer once it is rounded to 16 bits, for example Gemma's scale of the
    embeddings. Such a model is read in `dtype` itself.
    """
    headers = read_headers(weight_files(name, config, revision))
    check_sizes(name, config, headers)
    stored = stored_dtype(headers) if dtype in (torch.float32, torch.float64) else None
    # Weights of another shape are reported below, where a model class would raise a RuntimeError.
    options = {"config": config, "ignore_mismatched_sizes": True, "use_safetensors": True}
    if revision:
        options["revision"] = revision
    auto_class = auto_class_of(name, config)
    model, info = load_pretrained(
        auto_class, name, dtype=stored or dtype, output_loading_info=True, **options)
    check_loaded(name, model, info)
    if stored and stored in {buffer.dtype for buffer in computed_buffers(model)}:
        model = load_pretrained(auto_class, name, dtype=dtype, **options)
    return model


def computed_buffers(model) -> list:
    """Return the buffers that are in no file, because the model computes them."""
    buffers = []
    for module in model.modules():
        names = module._non_persistent_buffers_set
        buffers += [module.get_buffer(name) for name in names if getattr(module, name) is not None]
    return buffers


@torch.no_grad()
def move(model, device: torch.device, dtype=None):
    """Move a model to a device and widen its parameters to `dtype` there, in place, one at a time.

    Each tensor is copied to the device in its host dtype and widened there. A host parameter is
    freed once it is moved. Tied parameters stay tied. As in from_pretrained, fp32 parameters stay
    fp32 where `dtype` has 16 bits. Buffers keep their dtype, except 16-bit buffers of a file, which
    are widened.
    """
    moved = {}  # id(old tensor): (old, new). `old` is kept, so that no other tensor gets its id
    for module in model.modules():
        named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, old in named:
            if id(old) not in moved:
                computed = name in module._non_persistent_buffers_set
                moved[id(old)] = old, moved_tensor(old, device, None if computed else dtype)
                if isinstance(old, torch.nn.Parameter):  # a buffer may be an attribute elsewhere
                    old.data = old.new_empty(0)
            setattr(module, name, moved[id(old)][1])
    if dtype is not None:
        model.config.dtype = dtype


def moved_tensor(old, device, dtype):
    """Copy a parameter or buffer to the device and widen it there."""
    is_parameter = isinstance(old, torch.nn.Parameter)
    new = old.detach().to(device)
    if dtype and new.is_floating_point() and (is_parameter or new.element_size() == 2):
        new = new.to(torch.promote_types(new.dtype, dtype))
    return torch.nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new


def compile_blocks(model):
    """Compile the MLPs and norms of the blocks, in place, for any number of rows and tokens.

    MLPs and norms contain the element-wise operations that a compiler fuses. Attention is left out:
    its shapes change with every batch, and its kernels are fused already. Experts are left out,
    because their shapes depend on the values. MLPs with 4-bit weights are left out, because
    lora.nf4_unpacker compiles their unpacking. Layers of one kind share their compiled code, and
    the names in state_dict do not change. Compiled code allows one backward per forward: compile
    after verify.can_pack.
    """
    kinds = model._no_split_modules or ()
    blocks = [block for block in model.modules() if type(block).__name__ in kinds]
    if not blocks:
        raise UserError(f"--compile: {type(model).__name__} does not say which of its modules are "
                        "blocks; leave the flag out")
    compiled = 0
    for block in blocks:
        for name, module in block.named_children():
            norm = type(module).__name__.endswith("Norm")
            mlp = name in ("mlp", "feed_forward")
            four_bits = any(isinstance(layer, NF4Linear) for layer in module.modules())
            if norm or (mlp and not four_bits and not has_stacked_experts(block)):
                module.compile(dynamic=True)
                compiled += 1
    if not compiled:
        raise UserError(f"--compile: the blocks of {type(model).__name__} have no MLP or norm that "
                        "can be compiled on its own; leave the flag out")


# --- Make and save --------------------------------------------------------------------------------

def head_count(hidden_size: int) -> int:
    return max(1, hidden_size // 64)


def new_model(tokenizer, hidden_size: int, layers: int, seed: int = 0, **overrides):
    """Make a Llama with random weights and the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": last_token(tokenizer)[1] + 1,
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * hidden_size,
        "num_attention_heads": head_count(hidden_size),
        "max_position_embeddings": 2048,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**options | overrides))


def save_model(model, tokenizer, folder, tensors=None, **extra):
    """Write the model aside, then move it into place, config.json last, so that the folder loads
    only when it is complete.

    tensors     the weights, {name: tensor}, where the model has only a shard of them
    extra       entries that are added to config.json
    """
    with moved_into(folder, last="config.json") as aside:
        with original_config(model):
            model.save_pretrained(aside, state_dict=tensors)
        tokenizer.save_pretrained(aside)
        config = json.loads((aside / "config.json").read_text())
        (aside / "config.json").write_text(json.dumps(config | extra, indent=2) + "\n")


# --- Commands -------------------------------------------------------------------------------------

@torch.no_grad()
def merge_command(args):
    """Merge an adapter in fp32 into the base that it was trained on, save, load again, compare."""
    named = read_adapter(args.adapter)[2]
    flags = read_run_file(args.adapter).get("flags", {})
    base = args.model or named
    if not base:
        raise UserError(f"--adapter {args.adapter}: does not name its base; give it by --model")
    if not args.model and os.path.isabs(base) and not os.path.isdir(base):
        raise UserError(f"--adapter {args.adapter}: names the base {base}, which is not there; "
                        "give it by --model")
    revision = flags.get("revision") if base == flags.get("model") else None
    tokenizer = load_adapter_tokenizer(args.adapter, base, revision)
    model = load_model(base, four_bits=bool(flags.get("quantize")), revision=revision)
    check_vocabulary(f"{args.adapter} on {base}", model, tokenizer)
    load_adapter(model, args.adapter)
    line = describe_base(args.adapter, base)
    if line:
        print(line)
    ids = torch.randint(len(tokenizer), (4, 16), generator=torch.Generator().manual_seed(0))
    adapted = model(**text_inputs(model, ids)).logits  # (4, 16, V)

    merge(model)
    save_model(model, tokenizer, args.out)
    for source in (args.adapter, base):  # one of them may have the processor of images
        copy_processor(source, args.out)
    merged = load_model(args.out)
    logits = merged(**text_inputs(merged, ids)).logits
    difference = (logits - adapted).abs().max()
    print(f"{args.out}: {base} with {args.adapter}; loaded again, its logits differ from the "
          f"adapted model's by at most {difference:.2g}, where they reach "
          f"{adapted.abs().max():.3g}")

    if flags.get("quantize"):
        quantize(merged)
        error = (merged(**text_inputs(merged, ids)).logits - adapted).abs()
        print(f"quantized to 4 bits again, its logits would differ by at most {error.max():.2g}, "
              f"{error.mean():.2g} on average")


def check_outside(out: str, source: str):
    """Raise a UserError if the new folder would be inside the folder that it is made from."""
    if pathlib.Path(source).resolve() in pathlib.Path(out).resolve().parents:
        raise UserError(f"--out {out}: is inside {source}, which it is made from; choose a folder "
                        "outside of it")


def check_room(out: str, parameters: int):
    """Raise a UserError if the disk of a folder has no room for a float32 model of this size."""
    free = shutil.disk_usage(out).free
    if 4 * parameters > free:
        raise UserError(f"--out {out}: a model of {parameters:,} parameters takes "
                        f"{4 * parameters / 2**30:,.1f} GB, and its disk has {free / 2**30:,.1f} "
                        "GB free; lower --hidden_size or --layers")


def new_command(args):
    """Make a Llama with random weights and save it."""
    heads = head_count(args.hidden_size)
    if args.hidden_size % (2 * heads):
        raise UserError(f"--hidden_size {args.hidden_size}: {heads} heads must divide it into "
                        "even parts; pass a multiple of 64, or an even number below 128")
    tokenizer = load_tokenizer(args.tokenizer)
    with torch.device("meta"):
        described = new_model(tokenizer, args.hidden_size, args.layers)
    check_room(args.out, described.num_parameters())
    model = new_model(tokenizer, args.hidden_size, args.layers, args.seed)
    save_model(model, tokenizer, args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")


def parse_command(argv):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="make a random-weight Llama folder")
    new.add_argument("--tokenizer", required=True, help="folder whose tokenizer the model gets")
    new.add_argument("--hidden_size", type=whole_number("[2, 1048576]"), default=256)
    new.add_argument("--layers", type=whole_number(f"[1, {MOST_LAYERS}]"), default=4)
    new.add_argument("--seed", type=whole_number(">= 0"), default=0)
    new.add_argument("--out", required=True)
    merged = commands.add_parser("merge", help="add an adapter to the weights of its base")
    merged.add_argument("--adapter", required=True)
    merged.add_argument("--model", help="the base (default: the base that the adapter names)")
    merged.add_argument("--out", required=True)
    return parser.parse_args(argv)


def main(argv: list[str]):
    args = parse_command(argv)
    check_outside(args.out, args.tokenizer if args.command == "new" else args.adapter)
    # The folder is made first, so that one that cannot be written is found at once.
    with new_folder(args.out, "--out"):
        if args.command == "merge":
            merge_command(args)
        else:
            new_command(args)


if __name__ == "__main__":
    run_script(main)
