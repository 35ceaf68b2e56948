"""Loads, makes, saves and merges models.

    python model.py new --tokenizer DIR --hidden_size 256 --layers 4 --out DIR
    python model.py merge --adapter DIR --out DIR

`new` makes a Llama with random weights, for tests and timing. `merge` adds an adapter to the
weights of its base.

`load_model` reads a model in three steps, so that a 16-bit file never takes 4 bytes per weight of
host memory: it reads the file's dtype on the CPU, quantizes layer by layer if asked to, then moves
tensor by tensor to the device and converts there.
"""
from errors import Parser, UserError, run_script, stop_hub_retries  # first, see errors.py
import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import pathlib

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)
from transformers.utils import cached_file

from files import moved_into, new_folder
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

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


# --- Load -----------------------------------------------------------------------------------------

def load_pretrained(auto_class, name: str, **options):
    """Call auto_class.from_pretrained, and raise each failure as a UserError of one sentence."""
    is_local_path = os.path.isabs(name) or name.startswith(".") or name.count("/") > 1
    if (is_local_path or os.path.isdir(os.path.dirname(name) or "?")) and not os.path.isdir(name):
        raise UserError(f"{name}: no such model folder")
    if not os.path.isdir(name):
        stop_hub_retries()
    try:
        return auto_class.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        kind = "Tokenizer" if auto_class is AutoTokenizer else "ModelForCausalLM"
        problem = f"{kind} not found locally or on the Hub"
        if os.path.isdir(name):
            problem = f"no usable {kind} in this folder"
        raise UserError(f"{name}: {problem} ({str(error).splitlines()[0]})") from error


def load_tokenizer(name: str):
    return load_pretrained(AutoTokenizer, name)


def load_adapter_tokenizer(adapter: str, base: str):
    """Load the tokenizer that was saved with an adapter, or else that of its base.

    The adapter was trained behind its own chat template, which --chat_template may have set.
    """
    if not os.path.exists(os.path.join(adapter, "tokenizer_config.json")):
        return load_tokenizer(base)
    tokenizer = load_tokenizer(adapter)
    if not tokenizer.chat_template:
        tokenizer.chat_template = load_tokenizer(base).chat_template
    return tokenizer


def check_vocabulary(name: str, model, tokenizer):
    """Raise a UserError if the tokenizer has ids that the model has no embedding for."""
    words = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > words:
        raise UserError(f"{name}: {len(tokenizer)} tokens in its tokenizer, {words} in its "
                        "embedding: not a pair")


FLASH_PACKAGES = ("flash_attn", "flash_attn_interface", "kernels")


def load_config(name: str):
    """Load the config of a model, and reject a model whose weights are quantized already.

    Such a model needs the kernels of its method, and cannot be merged or saved here. A config that
    asks for flash attention is rejected where flash attention is not installed.
    """
    config = load_pretrained(AutoConfig, name)
    parts = [config]
    for part in config.sub_configs:
        if getattr(config, part, None) is not None:
            parts.append(getattr(config, part))
    for part in parts:
        quantization = getattr(part, "quantization_config", None)
        if quantization:
            if not isinstance(quantization, dict):
                quantization = quantization.to_dict()
            method = quantization.get("quant_method", "an unnamed method")
            raise UserError(
                f"{name}: its weights are quantized already ({method}); pass the model that it was "
                "made from (with an adapter, --quantize nf4 stores that one in 4 bits)")
        attention = str(part._attn_implementation)
        if "flash" in attention and not any(map(importlib.util.find_spec, FLASH_PACKAGES)):
            raise UserError(
                f"{name}: its config asks for {attention}, which is not installed; delete "
                "attn_implementation from its config.json (the default, sdpa, needs no package)")
    return config


def load_model(name: str, dtype=torch.float32, device="cpu", four_bits=False, upcast=True):
    """Load a causal language model with every weight from its files and all training noise off.

    dtype       of the parameters; modules that transformers keeps in fp32 stay in fp32
    device      on "meta" the model has shapes without values
    four_bits   quantize the linear layers, each from the CPU to the device
    upcast      False: parameters of a 16-bit file stay in its dtype, for `parallel.scatter`

    Policy and reference are both loaded by this function, so that they differ only by training.
    Another dtype, or dropout on one side, would make a log-ratio that is not 0 at the start.
    """
    device = torch.device(device)
    if os.path.exists(os.path.join(name, "adapter_config.json")):
        raise UserError(f"{name}: is an adapter, not a model: pass it by --adapter, and the model "
                        "it belongs to by --model")
    config = load_config(name)
    if device.type == "meta":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = read_model(name, config, dtype)
        model.base_fingerprint = base_fingerprint(model)
        if four_bits:
            quantize(model, device)
        move(model, device, dtype if upcast else None)
    turn_off_noise(model)
    return model


def read_model(name, config, dtype):
    """Read the model to the CPU in the narrower of the files' dtype and `dtype`.

    Some buffers are in no file and are computed when a model is built. A later upcast cannot
    recover such a buffer once it is rounded to 16 bits, for example Gemma's scale of the
    embeddings. Such a model is read in `dtype` itself.
    """
    stored = files_dtype(name) if dtype in (torch.float32, torch.float64) else None
    # Weights of another shape are reported below, where a model class would raise a RuntimeError.
    options = {"config": config, "ignore_mismatched_sizes": True}
    model, info = load_pretrained(
        AutoModelForCausalLM, name, dtype=stored or dtype, output_loading_info=True, **options)
    if stored and stored in {buffer.dtype for buffer in computed_buffers(model)}:
        model = load_pretrained(AutoModelForCausalLM, name, dtype=dtype, **options)
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise UserError(
            f"{name}: {len(missing)} weights are not in the files or have another shape, such as "
            f"{missing[0]}; transformers would initialize them randomly")
    return model


def files_dtype(name):
    """Return the dtype of a model's safetensors files if all their floating-point tensors have the
    same 16-bit dtype, else None. Mixed files are read in the dtype that the caller asks for."""
    dtypes = set()
    try:
        for path in safetensors_files(name):
            with safe_open(path, "pt") as file:
                dtypes |= {file.get_slice(key).get_dtype() for key in file.keys()}
    except (OSError, SafetensorError):
        return None  # from_pretrained reads other formats, or says what is wrong
    floating = {dtype for dtype in dtypes if "F" in dtype}  # BF16, F16, F32, F8_E4M3, ...
    if floating == {"BF16"}:
        return torch.bfloat16
    return torch.float16 if floating == {"F16"} else None


def safetensors_files(name) -> list:
    """Return the paths of the weights of a folder or a Hub model, downloaded if necessary."""
    optional = {"_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, "model.safetensors.index.json", **optional)
    if index is None:
        return [cached_file(name, "model.safetensors")]
    names = set(json.loads(pathlib.Path(index).read_text())["weight_map"].values())
    return [cached_file(name, file) for file in sorted(names)]


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
    for block in blocks:
        for name, module in block.named_children():
            norm = type(module).__name__.endswith("Norm")
            mlp = name in ("mlp", "feed_forward")
            four_bits = any(isinstance(layer, NF4Linear) for layer in module.modules())
            if norm or (mlp and not four_bits and not has_stacked_experts(block)):
                module.compile(dynamic=True)


# --- What a model's code adds: noise, a router loss, parameters that text does not reach ----------

def turn_off_noise(model):
    """Make a training forward equal to the forward of the served model, in place.

    Gradient checkpointing needs modules in training mode: those with the attribute
    `gradient_checkpointing`, which are the decoder and its blocks. Every other module is set to
    evaluation mode, which turns off a router's jitter and sampling, among others. All dropouts are
    set to 0, because blocks have some too. verify.find_noise tries whether noise is left.
    """
    turn_off_dropout(model)
    for module in model.modules():
        module.training = hasattr(module, "gradient_checkpointing")
    model.training = True


def turn_off_dropout(model):
    """Set every dropout to 0 and leave the model in training mode.

    Some forwards read a dropout from the config, so its entries are set to 0 too.
    `original_config` puts them back for the file that is saved.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            named = "drop" in name and isinstance(value, float)
            if named or (isinstance(module, torch.nn.modules.dropout._DropoutNd) and name == "p"):
                setattr(module, name, 0.0)
    model.changed_config = []
    for config in nested_configs(model.config):
        for name, value in list(vars(config).items()):
            if "drop" in name and isinstance(value, float) and value:
                model.changed_config.append((config, name, value))
                setattr(config, name, 0.0)
    model.train()


def nested_configs(config) -> list:
    """Return a config and all configs inside it, such as text_config and vision_config."""
    configs = [config]
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            configs += nested_configs(value)
    return configs


@contextlib.contextmanager
def original_config(model):
    """Inside, the config has the values of the model's files, without `turn_off_dropout`."""
    changed = getattr(model, "changed_config", [])
    for config, name, value in changed:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in changed:
            setattr(config, name, 0.0)


def router_loss_line(model) -> str:
    """Return a line if the config asks for the loss that balances the experts, else "".

    transformers adds this loss to the cross-entropy that it computes from labels, which preference
    losses do not use.
    """
    for config in nested_configs(model.config):
        if getattr(config, "output_router_logits", False):
            names = [name for name in vars(config) if "aux_loss" in name or "z_loss" in name]
            entries = [f"{name} {getattr(config, name)}" for name in sorted(names)]
            entries.insert(0, "output_router_logits")
            return (f"router loss: the model's config.json asks for it ({', '.join(entries)}), but "
                    "it is not added here: the experts are not balanced during training")
    return ""


def unreached_by_text(model) -> list[str]:
    """Return the names of the modules and parameters that no text reaches, such as a vision tower.

    The graph of a short forward shows which parameters can have a gradient. A module is named as a
    whole, not each of its parameters. Experts of one kind in a list are never named: a router may
    choose any of them for another text.
    """
    used = set()
    reached = graph_leaves(short_forward(model, used))
    for module in used:  # 4-bit weights have no gradient
        if isinstance(module, NF4Linear):
            reached.update(id(tensor) for tensor in module.buffers())
    return unreached_below(model, "", reached)


def short_forward(model, used: set):
    """Run four tokens -> the logits' node of the autograd graph. `used` gets each called module."""
    device = model.get_input_embeddings().weight.device
    ids = torch.arange(1, 5, device=device)[None] % model.get_input_embeddings().num_embeddings
    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda module, inputs: used.add(module)))
    try:
        with torch.enable_grad():
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            return model(**inputs, use_cache=False).logits.grad_fn
    finally:
        for hook in hooks:
            hook.remove()


def graph_leaves(node) -> set[int]:
    """Return the ids of the tensors in which backward from this node would accumulate."""
    leaves, seen, todo = set(), {node}, [node]
    if node is None:  # every parameter is frozen
        return leaves
    while todo:
        node = todo.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                todo.append(before)
    return leaves


def unreached_below(module, path: str, reached: set[int]) -> list[str]:
    """Return the largest parts of a module, which is itself reached in part, without reached
    tensors."""
    names = []
    for name, parameter in module.named_parameters(path, recurse=False):
        if parameter.requires_grad and id(parameter) not in reached:
            names.append(name)
    reached_kinds = set()
    for child in module.children():
        if any_reached(child, reached):
            reached_kinds.add(type(child))
    for name, child in module.named_children():
        name = f"{path}.{name}" if path else name
        if any_reached(child, reached):
            names += unreached_below(child, name, reached)
        elif has_weights(child) and not (is_list(module) and type(child) in reached_kinds):
            names.append(name)
    return names


def any_reached(module, reached) -> bool:
    tensors = itertools.chain(module.parameters(), module.buffers())
    return any(id(tensor) in reached for tensor in tensors)


def has_weights(module) -> bool:
    """Return whether a module has parameters that can be trained, or 4-bit weights."""
    if any(parameter.requires_grad for parameter in module.parameters()):
        return True
    return any(isinstance(layer, NF4Linear) for layer in module.modules())


def is_list(module) -> bool:
    return isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict))


def is_below(name: str, parts: list[str]) -> bool:
    """Return whether a module or parameter is one of these parts of a model, or inside one."""
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def freeze(model, parts: list[str]):
    """Freeze these parts of a model, and remember them in model.unreached."""
    model.unreached = parts
    for name, parameter in model.named_parameters():
        if is_below(name, parts):
            parameter.requires_grad_(False)


def frozen_line(model) -> str:
    """Return a line that says what `freeze` froze, or ""."""
    parts = getattr(model, "unreached", [])
    if not parts:
        return ""
    count = 0
    for name, parameter in model.named_parameters():
        if is_below(name, parts):
            count += parameter.numel()
    for name, module in model.named_modules():
        if isinstance(module, NF4Linear) and is_below(name, parts):
            count += module.shape.numel()
    shown = ", ".join(parts[:4])
    if len(parts) > 4:
        shown += f" and {len(parts) - 4} more"
    return f"frozen, because text does not reach them: {count:,} parameters of {shown}"


# --- Make and save --------------------------------------------------------------------------------

def new_model(tokenizer, hidden_size: int, layers: int, seed: int = 0, **overrides):
    """Make a Llama with random weights and the tokenizer's vocabulary."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": 4 * hidden_size,
        "num_attention_heads": max(1, hidden_size // 64),
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
    flags = read_run_file(args.adapter).get("flags", {})
    base = args.model or read_adapter(args.adapter)[2]
    if not base:
        raise UserError(f"--adapter {args.adapter}: does not name its base; give it by --model")
    tokenizer = load_adapter_tokenizer(args.adapter, base)
    model = load_model(base, four_bits=bool(flags.get("quantize")))
    check_vocabulary(f"{args.adapter} on {base}", model, tokenizer)
    load_adapter(model, args.adapter)
    line = describe_base(args.adapter, base)
    if line:
        print(line)
    ids = torch.randint(len(tokenizer), (4, 16), generator=torch.Generator().manual_seed(0))
    adapted = model(ids).logits  # (4, 16, V)

    merge(model)
    save_model(model, tokenizer, args.out)
    merged = load_model(args.out)
    difference = (merged(ids).logits - adapted).abs().max()
    print(f"{args.out}: {base} with {args.adapter}; loaded again, its logits differ from the "
          f"adapted model's by at most {difference:.2g}, where they reach "
          f"{adapted.abs().max():.3g}")

    if flags.get("quantize"):
        quantize(merged)
        error = (merged(ids).logits - adapted).abs()
        print(f"quantized to 4 bits again, its logits would differ by at most {error.max():.2g}, "
              f"{error.mean():.2g} on average")


def new_command(args):
    """Make a Llama with random weights and save it."""
    tokenizer = load_tokenizer(args.tokenizer)
    model = new_model(tokenizer, args.hidden_size, args.layers, args.seed)
    save_model(model, tokenizer, args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters, vocabulary {len(tokenizer):,}")


def parse_command(argv):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="make a random-weight Llama folder")
    new.add_argument("--tokenizer", required=True, help="folder whose tokenizer the model gets")
    new.add_argument("--hidden_size", type=whole_number(">= 2"), default=256)
    new.add_argument("--layers", type=whole_number(">= 1"), default=4)
    new.add_argument("--seed", type=whole_number(">= 0"), default=0)
    new.add_argument("--out", required=True)
    merged = commands.add_parser("merge", help="add an adapter to the weights of its base")
    merged.add_argument("--adapter", required=True)
    merged.add_argument("--model", help="the base (default: the base that the adapter names)")
    merged.add_argument("--out", required=True)
    return parser.parse_args(argv)


def main(argv: list[str]):
    args = parse_command(argv)
    # The folder is made first, so that one that cannot be written is found at once.
    with new_folder(args.out, "--out"):
        if args.command == "merge":
            merge_command(args)
        else:
            new_command(args)


if __name__ == "__main__":
    run_script(main)
