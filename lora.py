"""LoRA, rsLoRA and DoRA by hand, in PEFT's files, and frozen weights in 4 bits (NF4)."""
import contextlib
import functools
import json
import pathlib
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from checkpoint import written_aside


class LoraSettings(NamedTuple):
    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self):
        """α/r (arXiv:2106.09685, Sec. 4.1), or with rsLoRA α/√r, so that a large rank does not learn more slowly (arXiv:2312.03732)."""
        return self.alpha / (self.rank ** 0.5 if self.rslora else self.rank)


class Lora(torch.nn.Module):
    """A frozen linear layer and, beside it, low-rank updates by name, of which one or none is active.

    LoRA (arXiv:2106.09685, Sec. 4.1, eq. 3)    y = W₀x + s·BAx, A (r, in), B (out, r) = 0 at the start, s the scale
    DoRA (arXiv:2402.09353, Sec. 4.1, eq. 5)    y = m ⊙ (W₀ + s·BA)x / ‖W₀ + s·BA‖, m (out,) = ‖W₀‖ at the start; norms are of the
                                                rows of (out, in) weights, and a constant to the gradient (Sec. 4.3, eq. 11)

    The paper draws A from a Gaussian; its authors' code and we take torch's default for a linear layer, Kaiming. A and B are fp32 or better.
    Dropout falls on what enters A, and only where a gradient is taken: references and evaluations see none.
    """

    def __init__(self, base):
        super().__init__()
        self.base, self.settings, self.active = base.requires_grad_(False), {}, None
        self.A, self.B, self.magnitude = torch.nn.ParameterDict(), torch.nn.ParameterDict(), torch.nn.ParameterDict()

    def add(self, name, settings):
        weight = dense_weight(self.base)
        kind = {"device": weight.device, "dtype": torch.promote_types(weight.dtype, torch.float32)}
        self.settings[name] = settings
        self.A[name] = torch.nn.Parameter(torch.empty(settings.rank, weight.shape[1], **kind))
        torch.nn.init.kaiming_uniform_(self.A[name], a=5 ** 0.5)
        self.B[name] = torch.nn.Parameter(torch.zeros(weight.shape[0], settings.rank, **kind))
        if settings.dora:
            self.magnitude[name] = torch.nn.Parameter(weight.to(kind["dtype"]).norm(dim=1))

    def forward(self, x):
        y = self.base(x)
        if self.active is None:
            return y
        settings, A, B = self.settings[self.active], self.A[self.active], self.B[self.active]
        z = F.dropout(x, settings.dropout, training=torch.is_grad_enabled()) if settings.dropout else x
        update = settings.scale * F.linear(F.linear(z.to(A.dtype), A), B)
        if not settings.dora:
            return y + update.to(y.dtype)
        bias = 0 if self.base.bias is None else self.base.bias
        with torch.no_grad():
            norm = self.weight(self.active).norm(dim=1)  # (out,)
        ratio = self.magnitude[self.active] / norm
        return (ratio * (y - bias + update)).to(y.dtype) + bias

    def weight(self, name):
        """W₀ + s·BA, (out, in), before DoRA's magnitudes."""
        A, B = self.A[name], self.B[name]
        return dense_weight(self.base).to(A.dtype) + self.settings[name].scale * B @ A

    def merged(self, name):
        """(out, in), the weight that does what base and update do together."""
        weight = self.weight(name)
        return weight * (self.magnitude[name] / weight.norm(dim=1))[:, None] if self.settings[name].dora else weight


def dense_weight(layer):
    """(out, in), whatever holds it."""
    return layer.dense() if isinstance(layer, NF4Linear) else layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def linear_layers(model):
    """{name: layer} of every linear layer but the head, adapted ones too."""
    head, inside = model.get_output_embeddings(), {layer.base for layer in lora_layers(model).values()}
    return {name: layer for name, layer in model.named_modules()
            if isinstance(layer, (torch.nn.Linear, Conv1D, NF4Linear, Lora)) and layer is not head and layer not in inside}


def lora_layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Lora)}


def find_targets(model, target):
    """Names of the layers to adapt: all linear ones, or those that `target` means: names with commas between, or a regular expression
    of the whole name."""
    names = list(linear_layers(model))
    if target is None:
        if any(p.ndim == 3 for name, p in model.named_parameters() if "expert" in name):
            raise ValueError("--lora_target: the experts of this model are not linear layers and cannot be adapted; name the layers "
                             "to adapt, such as q_proj,k_proj,v_proj,o_proj")
        return names
    patterns = target.split(",")
    try:
        found = [name for name in names if any(name == p or name.endswith(f".{p}") for p in patterns) or re.fullmatch(target, name)]
    except re.error as error:
        raise ValueError(f"--lora_target {target}: is no regular expression ({error})") from None
    if not found:
        raise ValueError(f"--lora_target {target}: no linear layer has such a name; there are "
                         f"{', '.join(sorted({name.rsplit('.', 1)[-1] for name in names}))}")
    return found


def add_adapter(model, name, targets, settings, seed=0):
    """Put a new update beside each target. The model is frozen but for its updates, and the first of them is the active one."""
    if not lora_layers(model):
        model.requires_grad_(False)
    torch.manual_seed(seed)
    for target in targets:
        layer = model.get_submodule(target)
        if not isinstance(layer, Lora):
            layer = Lora(layer)
            model.set_submodule(target, layer)
        layer.add(name, settings)
        layer.active = layer.active or name


@contextlib.contextmanager
def use_adapter(model, name):
    """Inside, the update of this name is active, or with None the bare base; afterwards what was active before, whatever happens."""
    before = {layer: layer.active for layer in lora_layers(model).values()}
    try:
        for layer in before:
            layer.active = name if name in layer.settings else None
        yield
    finally:
        for layer, active in before.items():
            layer.active = active


# Files as peft has them: adapter_config.json, and adapter_model.safetensors with base_model.model.{layer}.lora_A.weight (r, in),
# .lora_B.weight (out, r) and for DoRA .lora_magnitude_vector (out,)

def adapter_tensors(model, name):
    """{key in the file: parameter}"""
    parts = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}
    return {f"base_model.model.{path}.{key}": getattr(layer, part)[name] for path, layer in lora_layers(model).items()
            for key, part in parts.items() if name in getattr(layer, part)}


def save_adapter(model, tokenizer, folder, base, name="policy", tensors=None, **extra):
    """Written aside and moved into place, adapter_config.json last. `extra` becomes config.json. `tensors`: as in save_model."""
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.settings}
    settings = next(iter(layers.values())).settings[name]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": settings.rank,
              "lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "use_rslora": settings.rslora, "use_dora": settings.dora,
              "target_modules": sorted(layers), "bias": "none", "inference_mode": True,
              "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in layers.values())}
    tensors = {key: tensor.detach().contiguous() for key, tensor in (tensors or adapter_tensors(model, name)).items()}
    with written_aside(folder, last="adapter_config.json") as aside:
        save_file(tensors, aside / "adapter_model.safetensors")
        tokenizer.save_pretrained(aside)
        if extra:
            (aside / "config.json").write_text(json.dumps(extra, indent=2) + "\n")
        (aside / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_adapter(folder):
    """-> LoraSettings, {layer: {key: tensor}}, name of the base model."""
    folder = pathlib.Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder}: no usable adapter here, which is adapter_config.json and adapter_model.safetensors ({error})") from error
    odd = {key: config.get(key) for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "lora_bias") if config.get(key)}
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or odd:
        raise ValueError(f"{folder}: only LoRA, rsLoRA and DoRA adapters are read, without trained biases, and of one rank; this one has "
                         f"{odd or {key: config.get(key) for key in ('peft_type', 'bias')}}")
    layers = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)", key)
        if not match:
            raise ValueError(f"{folder}: the tensor {key} is no part of a LoRA")
        layers.setdefault(match[1], {})[match[2]] = tensor
    settings = LoraSettings(config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), bool(config.get("use_rslora")),
                            bool(config.get("use_dora")))
    return settings, layers, config.get("base_model_name_or_path")


def load_adapter(model, folder, name="policy", trainable=True):
    """Read an adapter of ours or of peft's. Every tensor must find its place, and every place its tensor."""
    settings, layers, _ = read_adapter(folder)
    if unknown := sorted(layers.keys() - linear_layers(model).keys()):
        raise ValueError(f"{folder}: made for another model: this one has no linear layer {unknown[0]}")
    add_adapter(model, name, list(layers), settings)
    places = adapter_tensors(model, name)
    given = {f"base_model.model.{layer}.{key}": tensor for layer, tensors in layers.items() for key, tensor in tensors.items()}
    for key in sorted(places.keys() | given.keys()):
        if key not in given or key not in places or places[key].shape != given[key].shape:
            found, wanted = (tuple(where[key].shape) if key in where else "missing" for where in (given, places))
            raise ValueError(f"{folder}: {key} is {found}, but should be {wanted}")
        places[key].data.copy_(given[key])
        places[key].requires_grad_(trainable)


@torch.no_grad()
def merge(model, name="policy"):
    """Replace each adapted layer by a plain one with the update in its weights, and each 4-bit layer by a dense one. In place."""
    for path, layer in linear_layers(model).items():
        base = layer.base if isinstance(layer, Lora) else layer
        if isinstance(layer, Lora) or isinstance(base, NF4Linear):
            weight = layer.merged(name) if isinstance(layer, Lora) else base.dense()
            if isinstance(base, NF4Linear):
                base, bias = torch.nn.Linear(*weight.T.shape, bias=base.bias is not None), base.bias
                base.bias = bias
            base.weight = torch.nn.Parameter(weight.T.contiguous() if isinstance(base, Conv1D) else weight)
            model.set_submodule(path, base)


# --- 4-bit weights (QLoRA, arXiv:2305.14314) --------------------------------------------------------------------------

BLOCK, BLOCK_OF_BLOCKS = 64, 256


@functools.cache
def nf4_levels(device=torch.device("cpu")):
    """The 16 levels of the 4-bit NormalFloat: quantiles of a normal distribution, scaled into [−1, 1], with an exact 0 and one more level
    above it than below. The outermost quantile, 0.9677083, is that of the authors' code."""
    upper = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    lower = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([-lower, upper, torch.zeros(1, dtype=torch.float64)]).sort().values
    return (levels / levels.max()).float().to(device)  # (16,)


def nf4_quantize(weight):
    """Any shape -> codes (n/2,) uint8, two to a byte, and absmax (n/64,) fp32: each block of 64 is scaled by its largest value."""
    blocks = F.pad(weight.float().flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    levels = nf4_levels(weight.device)
    codes = torch.bucketize(blocks / absmax.clamp(min=1e-38)[:, None], (levels[1:] + levels[:-1]) / 2).to(torch.uint8).flatten()
    return codes[::2] << 4 | codes[1::2], absmax


class NF4Linear(torch.nn.Module):
    """A frozen linear layer in 4 bits a weight: 4 + 8/64 + 32/(64·256) = 4.127 bits with double quantisation, 0.516 bytes.

    The scales of the blocks are quantised too (Sec. 3): their mean is taken off, and 256 of them share an fp32 scale of 8-bit floats
    (here e4m3). The dense weight exists during one matrix product at a time, forward and backward, in the dtype of the input.
    """

    def __init__(self, weight, bias):
        super().__init__()
        self.shape, self.bias = weight.shape, bias
        codes, absmax = nf4_quantize(weight)
        mean = absmax.mean()
        scales = F.pad(absmax - mean, (0, -len(absmax) % BLOCK_OF_BLOCKS)).view(-1, BLOCK_OF_BLOCKS)
        largest = scales.abs().amax(1).clamp(min=1e-38)
        for name, value in {"codes": codes, "mean": mean, "largest": largest,
                            "scales": (scales / largest[:, None] * 448).to(torch.float8_e4m3fn).view(torch.uint8)}.items():
            self.register_buffer(name, value)

    def dense(self, dtype=torch.float32):
        absmax = (self.scales.view(torch.float8_e4m3fn).float() / 448 * self.largest[:, None]).flatten() + self.mean
        values = nf4_levels(self.codes.device)[torch.stack([self.codes >> 4, self.codes & 15], 1).flatten().int()].view(-1, BLOCK)
        return (values * absmax[:len(values), None]).flatten()[:self.shape.numel()].view(self.shape).to(dtype)

    def forward(self, x):
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        y = DequantizedProduct.apply(x.to(dtype), self)
        return y if self.bias is None else y + self.bias.to(dtype)


class DequantizedProduct(torch.autograd.Function):
    """x Wᵀ for a W that is made anew in backward instead of being kept from forward: all of a model's dense weights at once are what
    4 bits are there to avoid."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dense(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.layer.dense(gradient.dtype), None


def quantize(model):
    """Put every linear layer of the blocks into 4 bits, in place."""
    for path, layer in linear_layers(model).items():
        model.set_submodule(path, NF4Linear(dense_weight(layer).detach(), layer.bias))
