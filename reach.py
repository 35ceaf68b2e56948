"""What a model's code adds to text: noise in training, router logits, parts that no text reaches.

`turn_off_noise` makes a training forward that of the served model. `unreached_by_text` finds the
parts that no text reaches, such as a vision tower, and `freeze` freezes them.
"""
import contextlib
import itertools
import os

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from errors import reading
from families import text_inputs
from lora import NF4Linear, has_stacked_experts

# --- Noise ----------------------------------------------------------------------------------------

def turn_off_noise(model):
    """Make a training forward equal to the forward of the served model, in place.

    Gradient checkpointing needs modules in training mode: those with the attribute
    `gradient_checkpointing`, which are the decoder and its blocks. Every other module is set to
    evaluation mode, which turns off a router's jitter and sampling, among others. The attention of
    T5 has the attribute too; in training mode its bias would require a gradient, for which SDPA
    takes another kernel than in the reference, and in bfloat16 rounds differently. All dropouts are
    set to 0, because blocks have some too. verify.find_fault tries whether noise is left.
    """
    turn_off_dropout(model)
    turn_off_router_logits(model)
    for module in model.modules():
        is_attention = type(module).__name__.endswith("Attention")
        module.training = hasattr(module, "gradient_checkpointing") and not is_attention
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
                change_config(model, config, name, 0.0)
    model.train()


def turn_off_router_logits(model):
    """Set output_router_logits to False in the config, and note in `asks_for_router_loss` whether
    it was True.

    With it, each forward of transformers computes the loss that balances the experts, also that of
    a reference. experts.py asks for router logits where they are read.
    """
    model.asks_for_router_loss = False
    for config in nested_configs(model.config):
        if getattr(config, "output_router_logits", False):
            model.asks_for_router_loss = True
            change_config(model, config, "output_router_logits", False)


def change_config(model, config, name, value):
    """Set an entry of a config for training only."""
    model.changed_config.append((config, name, getattr(config, name), value))
    setattr(config, name, value)


def nested_configs(config) -> list:
    """Return a config and all configs inside it, such as text_config and vision_config."""
    configs = [config]
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            configs += nested_configs(value)
    return configs


@contextlib.contextmanager
def original_config(model):
    """Inside, the config has the values of the model's files, without those of `change_config`."""
    changed = getattr(model, "changed_config", [])
    for config, name, original, _ in changed:
        setattr(config, name, original)
    try:
        yield
    finally:
        for config, name, _, value in changed:
            setattr(config, name, value)


# --- Parts that text does not reach ---------------------------------------------------------------

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
        inputs = text_inputs(model, ids) | {"attention_mask": torch.ones_like(ids)}
        what = f"{model.name_or_path}: cannot compute a text of four tokens"
        with torch.enable_grad(), reading(what, forward_advice(model)):
            return model(**inputs, use_cache=False).logits.grad_fn
    finally:
        for hook in hooks:
            hook.remove()


def forward_advice(model) -> str:
    """Return what to do about a model whose forward raises an error."""
    if model.dtype == torch.float64 and has_stacked_experts(model):
        return "; stacked experts have no float64 kernels, so choose another --dtype"
    text_class = AutoModelForCausalLM._model_mapping.get(type(model.config), None)
    if text_class not in (None, type(model)):
        name = model.name_or_path
        return (f"; this version of transformers cannot use {type(model).__name__} on text. To "
                "train its language model alone, save that in Python: transformers.AutoModelFor"
                f"CausalLM.from_pretrained({name!r}).save_pretrained("
                f"{os.path.basename(name) + '-text'!r}), then copy the tokenizer's files")
    return "; take config.json from the model that the weights belong to"


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


def frozen_line(model, sees_images=False) -> str:
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
    if sees_images:
        return (f"frozen, as only images reach them: {count:,} parameters of {shown}; "
                "--train_vision trains them")
    return f"frozen, because text does not reach them: {count:,} parameters of {shown}"
