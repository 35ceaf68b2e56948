"""Implements LoRA, rsLoRA and DoRA, reads and writes PEFT's files, and quantizes to 4 bits (NF4).

`add_adapter` replaces each target layer by a `Lora`: the frozen layer plus low-rank updates.
`use_adapter` selects which update is active. `quantize` replaces linear layers by `NF4Linear`.
`merge` turns all of them back into plain layers.

Example     W₀ = 2 (1 x 1), rank 1, alpha 1, A = 3, B = 4, x = 1, so s·BA = 12
            LoRA    y = (2 + 12) · 1 = 14
            DoRA    y = m · 14 / |14| = m, with m = |W₀| = 2 until m is trained
"""
import contextlib
import functools
import hashlib
import importlib.util
import json
import pathlib
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from errors import UserError, nearest, reading
from families import task_type_of
from files import RUN_FILE, moved_into, read_json, read_run_file
from limits import run_limited

# --- Low-rank updates -----------------------------------------------------------------------------

class LoraSettings(NamedTuple):
    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        """Return α/r (arXiv:2106.09685, Sec. 4.1), or α/√r for rsLoRA, because with α/r a large
        rank learns more slowly (arXiv:2312.03732)."""
        return self.alpha / (self.rank ** 0.5 if self.rslora else self.rank)


class Lora(torch.nn.Module):
    """A frozen linear layer and named low-rank updates. At most one update is active.

    LoRA (arXiv:2106.09685, Sec. 4.1, eq. 3)    y = W₀x + s·BAx
    DoRA (arXiv:2402.09353, Sec. 4.1, eq. 5)    y = m ⊙ (W₀ + s·BA)x / ‖W₀ + s·BA‖

    A (r, in) is random, B (out, r) starts at 0, s is the scale. DoRA's m (out,) starts at ‖W₀‖.
    The norm ‖·‖ is detached (Sec. 4.3, eq. 11). It has one value for each output, the norm of a row
    of torch's (out, in) weight, as in PEFT; the paper writes norms of columns.
    The paper draws A from a Gaussian; the authors' code and this code draw A as torch
    initializes a linear layer, Kaiming uniform. A, B and m are fp32 or better.
    Dropout applies to the input of A, and only where gradients are enabled: references and
    evaluations have none.
    """

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.settings = {}
        self.active = None
        self.A = torch.nn.ParameterDict()
        self.B = torch.nn.ParameterDict()
        self.magnitude = torch.nn.ParameterDict()

    def add(self, name, settings, generator=None):
        """Add an update that changes nothing yet.

        A is drawn on the CPU and in fp32, so that the same generator gives the same adapter on
        every device, in every dtype, on one process and on many.
        """
        weight = dense_weight(self.base)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        A = torch.empty(settings.rank, weight.shape[1])
        torch.nn.init.kaiming_uniform_(A, a=5 ** 0.5, generator=generator)
        B = torch.zeros(weight.shape[0], settings.rank, dtype=dtype, device=weight.device)
        self.settings[name] = settings
        self.A[name] = torch.nn.Parameter(A.to(weight.device, dtype))
        self.B[name] = torch.nn.Parameter(B)
        if settings.dora:
            self.magnitude[name] = torch.nn.Parameter(self.norm(name))

    def forward(self, x):
        y = self.base(x)
        if self.active is None:
            return y
        settings = self.settings[self.active]
        A, B = self.A[self.active], self.B[self.active]
        if settings.dropout:
            x = F.dropout(x, settings.dropout, training=torch.is_grad_enabled())
        # Autocast casts x, A and B to its dtype itself, so an fp32 copy of x would be useless
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(A.dtype)
        low_rank = settings.scale * F.linear(x, A)  # (..., r): scaled here, at the smallest tensor
        if not settings.dora:
            return y + F.linear(low_rank, B).to(y.dtype)

        # With ratio = m / ‖W₀ + s·BA‖, eq. 5 is ratio ⊙ (W₀x + s·BAx) + bias. It is written as the
        # base layer's output plus a correction, because ratio ⊙ (y - bias) + bias rounds twice:
        # here ratio = 1 and B = 0 give exactly y, in every dtype, with and without a bias.
        with torch.autocast(x.device.type, enabled=False):
            norm = self.norm(self.active)
        ratio = self.magnitude[self.active] / norm  # (out,)
        product = y if self.base.bias is None else y - self.base.bias  # W₀x
        correction = (ratio - 1) * product + F.linear(low_rank, ratio[:, None] * B)
        return (y + correction).to(y.dtype)

    def weight(self, name):
        """Compute W₀ + s·BA, (out, in), before DoRA's magnitudes."""
        A, B = self.A[name], self.B[name]
        base = dense_weight(self.base).to(A.dtype)
        return torch.addmm(base, B, A, alpha=self.settings[name].scale)

    @torch.no_grad()
    def norm(self, name):
        """Compute ‖W₀ + s·BA‖, (out,), detached.

        The sum is in fp64, so that CPU and GPU round to the same fp32 norm, except for rare ties.
        Then a magnitude computed on the CPU, divided by the norm computed on a GPU, is exactly 1.
        """
        weight = self.weight(name)
        norm = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64)
        return norm.to(weight.dtype)

    def merged(self, name):
        """Compute the (out, in) weight of a plain layer equal to base and update together."""
        weight = self.weight(name)
        if self.settings[name].dora:
            weight = weight * (self.magnitude[name] / self.norm(name))[:, None]
        return weight


def dense_weight(layer):
    """Return the (out, in) weight of a linear layer of any kind."""
    if isinstance(layer, NF4Linear):
        return layer.dense()
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def linear_layers(model) -> dict:
    """Return {name: layer} of every linear layer but the head. An adapted layer is one layer."""
    head = model.get_output_embeddings()
    inside = {layer.base for layer in lora_layers(model).values()}
    kinds = (torch.nn.Linear, Conv1D, NF4Linear, Lora)
    return {
        name: layer for name, layer in model.named_modules()
        if isinstance(layer, kinds) and layer is not head and layer not in inside
    }


def lora_layers(model) -> dict:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Lora)}


def target_modules(model, target: str | None) -> list:
    """Return the names of the layers to adapt.

    target      None, or PEFT's all-linear: all linear layers but the head; else names separated by
                commas, which match the end of a layer's name, or a regular expression that matches
                a whole name. Each name must match a layer
    """
    names = list(linear_layers(model))
    if target in (None, "all-linear"):
        if has_stacked_experts(model):
            raise UserError(
                "--lora_target: the experts of this model are not linear layers and cannot be "
                "adapted; name the layers to adapt, such as q_proj,k_proj,v_proj,o_proj")
        return names
    # A pattern such as (a+)+b may take years on one name.
    choose = functools.partial(chosen_layers, model, names)
    names_of_items = [f"--lora_target {target}: this pattern"]
    advice = "; name layers, such as q_proj,v_proj"
    chosen, = run_limited(choose, [target], names_of_items, advice)
    return [name for name in names if name in chosen]


def chosen_layers(model, names: list, target: str) -> set:
    """Return the layers of --lora_target: a regular expression that matches whole names, else names
    separated by commas."""
    parts = [part.strip() for part in target.split(",")]
    if matching_layers(names, target):
        parts = [target]
        for alternative, pattern in alternatives(target):
            if not matching_layers(names, pattern):
                refuse_target(model, alternative, names)
    chosen = set()
    for part in parts:
        layers = matching_layers(names, part)
        if part and not layers:
            refuse_target(model, part, names)
        chosen.update(layers)
    if not chosen:
        refuse_target(model, target, names)
    return chosen


def matching_layers(names, part):
    """List the names that end in a part of --lora_target, or match it as a regular expression."""
    try:
        pattern = re.compile(part)
    except re.error as error:
        raise UserError(f"--lora_target {part}: is not a regular expression ({error})") from None
    is_name = part != "" and "," not in part
    return [name for name in names
            if (is_name and f".{name}".endswith(f".{part}")) or pattern.fullmatch(name)]


# Alternatives of a regular expression that have no brackets of their own, as in .*(q_proj|v_proj).
ALTERNATIVES = re.compile(r"(?:^|\(\?:|\()([^()|?\[\]{}]+(?:\|[^()|?\[\]{}]+)+)(?=\)|$)")


def alternatives(target):
    """List each alternative of a regular expression, with the expression that has it alone."""
    pairs = []
    for match in ALTERNATIVES.finditer(target):
        before, after = target[:match.start(1)], target[match.end(1):]
        for alternative in match[1].split("|"):
            pairs.append((alternative, f"{before}{alternative}{after}"))
    return pairs


def refuse_target(model, part, names):
    """Raise for a part of --lora_target that matches no layer."""
    head = model.get_output_embeddings()
    head_names = [name for name, layer in model.named_modules() if layer is head]
    reason = "no linear layer has such a name"
    if matching_layers(head_names, part):
        reason = "is the head, which is not adapted"
    stacked = stacked_experts(model)
    if matching_layers(stacked, part):
        reason = "is a tensor that stacks the weights of experts, which is not adapted"
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    default = "" if stacked else "; without this flag all of them are adapted"
    raise UserError(f"--lora_target {part}: {reason}; there are {', '.join(endings)}"
                    f"{nearest(part, endings)}{default}")


def stacked_experts(model) -> list:
    """Return the names of the 3-D tensors in which a model stores the weights of its experts."""
    return [name for name, tensor in model.named_parameters()
            if "expert" in name and tensor.ndim == 3]


def has_stacked_experts(model) -> bool:
    return bool(stacked_experts(model))


def add_adapter(model, name: str, targets: list, settings: LoraSettings, seed: int = 0):
    """Add an update to each target and freeze everything else. The first update is active.

    The update depends only on the seed: no global random state is read or changed.
    """
    if not lora_layers(model):
        model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for target in targets:
        layer = model.get_submodule(target)
        if not isinstance(layer, Lora):
            layer = Lora(layer)
            model.set_submodule(target, layer)
        layer.add(name, settings, generator)
        if layer.active is None:
            layer.active = name


@contextlib.contextmanager
def use_adapter(model, name: str | None):
    """Activate the update of this name, or none, for the block. After the block, also after an
    exception, the update that was active before is active again."""
    before = {layer: layer.active for layer in lora_layers(model).values()}
    try:
        for layer in before:
            layer.active = name if name in layer.settings else None
        yield
    finally:
        for layer, active in before.items():
            layer.active = active


# --- The base of an adapter -----------------------------------------------------------------------

SAMPLE_SIZE = 2**14  # values of each parameter, at least, in the fingerprint


@torch.no_grad()
def base_fingerprint(model) -> str:
    """Hash the shape and evenly spaced values of every parameter of a model without adapters.

    An adapter is saved with the fingerprint of its base, so that another base of the same shape is
    recognized. The values are rounded to bfloat16, in which the frozen base of a GPU run is
    computed: so one base has one fingerprint, whatever the dtype of its file and of the run. Names
    of parameters are left out, because they differ between versions of transformers.
    """
    digests = []
    for parameter in model.parameters():
        stride = parameter.numel() // SAMPLE_SIZE | 1  # odd, so that it reaches every column
        sample = parameter.detach().flatten()[::stride]
        content = sample.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy()
        digest = hashlib.blake2b(content, digest_size=16)
        digest.update(str(tuple(parameter.shape)).encode())
        digests.append(digest.digest())
    return hashlib.blake2b(b"".join(sorted(digests)), digest_size=16).hexdigest()


def check_base(model, folder, named):
    """Raise a UserError if an adapter was trained on other weights than this model's.

    named       the base that adapter_config.json names
    """
    recorded = read_run_file(folder).get("base_fingerprint")
    actual = getattr(model, "base_fingerprint", None)  # None under fsdp, except on rank 0
    if recorded and actual and recorded != actual:
        given = model.name_or_path
        raise UserError(
            f"{folder}: was trained on {named}, whose weights differ from those of {given}; pass "
            f"the base that it was trained on by --model (to use it on {given} on purpose, delete "
            f"base_fingerprint from {pathlib.Path(folder) / RUN_FILE})")


def describe_base(folder: str, given: str) -> str:
    """Make a line that names both bases of an adapter without a fingerprint, else ""."""
    if read_run_file(folder).get("base_fingerprint"):
        return ""
    named = read_adapter(folder)[2]
    return (f"{folder}: its files name the base {named} but have no fingerprint of it; it is used "
            f"on {given}, and only you can tell whether that is the same model")


# --- PEFT's files ---------------------------------------------------------------------------------
# adapter_config.json, and adapter_model.safetensors with base_model.model.{layer}.lora_A.weight
# (r, in), .lora_B.weight (out, r) and for DoRA .lora_magnitude_vector (out,)

PARTS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}
KEY = re.compile(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")

# Entries of adapter_config.json that are read, or that change nothing once the tensors are known.
# Every other entry with a value, of any version of PEFT, may change what the adapter computes.
KNOWN_ENTRIES = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias",
    "target_modules", "exclude_modules", "layers_pattern", "fan_in_fan_out", "init_lora_weights",
    "ensure_weight_tying", "runtime_config", "megatron_core", "qalora_group_size",
    "eva_config", "corda_config", "lora_ga_config", "loftq_config",
}
# Initializations that leave the base as it is. The others (pissa, olora, corda, loftq, lora_ga)
# subtract the initial update from the base, so their tensors belong to a base that is in no file.
PLAIN_INITS = {"true", "false", "none", "gaussian", "eva", "orthogonal"}


def adapter_tensors(model, name: str) -> dict:
    """Return {key in the file: parameter} of the update of this name."""
    tensors = {}
    for path, layer in lora_layers(model).items():
        for key, part in PARTS.items():
            if name in getattr(layer, part):
                tensors[f"base_model.model.{path}.{key}"] = getattr(layer, part)[name]
    return tensors


def adapter_config(layers, name, base) -> dict:
    """Make adapter_config.json for these {path: Lora}, which share their settings."""
    settings = next(iter(layers.values())).settings[name]
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "target_modules": sorted(layers),
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in layers.values()),
    }


def save_adapter(model, tokenizer, folder, base, name: str = "policy", tensors=None, **extra):
    """Write the adapter's files aside, then move them into place, adapter_config.json last.

    tensors     {key in the file: tensor}, where the model has only a shard of them
    extra       entries of run.json, such as the flags
    """
    layers = {path: layer for path, layer in lora_layers(model).items() if name in layer.settings}
    tensors = tensors or adapter_tensors(model, name)
    tensors = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    config = adapter_config(layers, name, base)
    config["task_type"] = task_type_of(model.config)
    config["revision"] = getattr(model, "base_revision", None)
    if getattr(model, "base_fingerprint", None):
        extra["base_fingerprint"] = model.base_fingerprint
    with moved_into(folder, last="adapter_config.json") as aside:
        save_file(tensors, aside / "adapter_model.safetensors")
        tokenizer.save_pretrained(aside)
        if extra:
            (aside / RUN_FILE).write_text(json.dumps(extra, indent=2) + "\n")
        (aside / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def check_adapter_config(folder, config):
    """Raise a UserError if the adapter computes anything but LoRA, rsLoRA or DoRA on the base as
    it is in its files. Its tensors alone would then give another model, without any error."""
    advice = ("if PEFT can merge it (merge_and_unload), merge it there and pass the merged model "
              "by --model")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: only LoRA, rsLoRA and DoRA adapters are read; its peft_type is "
                        f"{config.get('peft_type')}; {advice}")
    init = str(config.get("init_lora_weights")).lower()
    if init not in PLAIN_INITS:
        raise UserError(
            f"{folder}: init_lora_weights is {init}, which changes the base, and the changed base "
            "is in no file; save it in PEFT with path_initial_model_for_weight_conversion, or "
            "merge it in PEFT (merge_and_unload) and pass the merged model by --model")
    unsupported = {key: config[key] for key in config.keys() - KNOWN_ENTRIES if config[key]}
    if config.get("bias", "none") != "none":
        unsupported["bias"] = config["bias"]
    if unsupported:
        raise UserError(f"{folder}: only LoRA, rsLoRA and DoRA adapters are read, of one rank and "
                        f"without trained biases; adapter_config.json has {unsupported}; {advice}")


def read_adapter(folder) -> tuple:
    """Read an adapter -> LoraSettings, {layer: {key: tensor}}, name of the base model."""
    folder = pathlib.Path(folder)
    check_files(folder)
    config = read_json(folder / "adapter_config.json", "; copy it again")
    check_adapter_config(folder, config)
    settings = read_settings(folder / "adapter_config.json", config)
    with reading(f"{folder / 'adapter_model.safetensors'}: is damaged", "; copy it again"):
        tensors = load_file(folder / "adapter_model.safetensors")

    layers = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise UserError(f"{folder}: the tensor {key} is no part of a LoRA")
        if match[2] == "lora_A.weight" and tensor.shape[:1] != (settings.rank,):
            raise UserError(f"{folder}: adapter_config.json says r = {settings.rank}, but {key} is "
                            f"{tuple(tensor.shape)}, (r, in)")
        layers.setdefault(match[1], {})[match[2]] = tensor
    if not layers:
        raise UserError(f"{folder}: adapter_model.safetensors has no tensor; copy it again")
    return settings, layers, config.get("base_model_name_or_path")


def check_files(folder: pathlib.Path):
    """Raise a UserError if a folder lacks a file of an adapter, or has a pickle in its place."""
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if (folder / file).is_file():
            continue
        missing = f"{folder}: no usable adapter here: it has no {file}"
        if file.endswith("json") or not (folder / "adapter_model.bin").exists():
            raise UserError(f"{missing}; pass a folder saved by train.py or PEFT")
        raise UserError(
            f"{missing}; pickled weights (adapter_model.bin) are not read, because a pickle can "
            "run any program. Where you trust it, convert it in Python: peft.AutoPeftModelFor"
            f"CausalLM.from_pretrained({str(folder)!r}).save_pretrained({folder.name + '-safe'!r})")


def read_settings(path: pathlib.Path, config: dict) -> LoraSettings:
    """Check the types and ranges of the entries that decide what an adapter computes."""
    def number(key, default, kinds, wanted, is_right):
        value = config.get(key, default)
        if type(value) not in kinds or not is_right(value):
            raise UserError(f"{path}: {key} is {value!r}, and must be {wanted}")
        return value

    flag = {"kinds": (bool, type(None)), "wanted": "true or false", "is_right": lambda value: True}
    base = config.get("base_model_name_or_path")
    if not isinstance(base, (str, type(None))):
        raise UserError(f"{path}: base_model_name_or_path is {base!r}, and must be a string")
    return LoraSettings(
        rank=number("r", None, (int,), "a whole number above 0", lambda r: r > 0),
        alpha=number("lora_alpha", None, (int, float), "a number above 0 (with 0 the adapter "
                     "changes nothing)", lambda alpha: 0 < alpha < float("inf")),
        dropout=number("lora_dropout", 0.0, (int, float), "in [0, 1)", lambda p: 0 <= p < 1),
        rslora=bool(number("use_rslora", False, **flag)),
        dora=bool(number("use_dora", False, **flag)),
    )


def load_adapter(model, folder, name: str = "policy", trainable: bool = True):
    """Add an adapter saved by this project or by PEFT. Its keys and shapes must fit the model, and
    the fingerprint of its base, if it has one, must be the model's."""
    settings, layers, base = read_adapter(folder)
    unknown = sorted(layers.keys() - linear_layers(model).keys())
    if unknown:
        raise UserError(f"{folder}: made for another model: this one has no linear layer "
                        f"{unknown[0]}")
    check_base(model, folder, base)
    add_adapter(model, name, list(layers), settings)
    parameters = adapter_tensors(model, name)
    saved = {}
    for layer, tensors in layers.items():
        saved |= {f"base_model.model.{layer}.{key}": tensor for key, tensor in tensors.items()}
    for key in sorted(parameters.keys() | saved.keys()):
        saved_shape = tuple(saved[key].shape) if key in saved else "missing"
        expected_shape = tuple(parameters[key].shape) if key in parameters else "missing"
        if saved_shape != expected_shape:
            raise UserError(f"{folder}: {key} is {saved_shape}, but should be {expected_shape}")
        parameters[key].data.copy_(saved[key])
        parameters[key].requires_grad_(trainable)


@torch.no_grad()
def merge(model, name: str = "policy"):
    """Replace each adapted layer by a plain one with the update in its weights, and each 4-bit
    layer by a dense one. In place."""
    for path, layer in linear_layers(model).items():
        adapted = isinstance(layer, Lora)
        base = layer.base if adapted else layer
        if not adapted and not isinstance(base, NF4Linear):
            continue
        weight = layer.merged(name) if adapted else base.dense()  # (out, in)
        plain = base
        if isinstance(base, NF4Linear):
            plain = torch.nn.Linear(*reversed(weight.shape), bias=base.bias is not None)
            plain.bias = base.bias
        if isinstance(plain, Conv1D):
            weight = weight.T.contiguous()
        plain.weight = torch.nn.Parameter(weight)
        model.set_submodule(path, plain)


# --- 4-bit weights (QLoRA, arXiv:2305.14314) ------------------------------------------------------

BLOCK = 64  # weights that share a scale
BLOCK_OF_BLOCKS = 256  # scales that share a scale
E4M3_MAX = 448  # largest 8-bit float of 4 exponent and 3 mantissa bits


@functools.cache
def nf4_levels(device=torch.device("cpu")):
    """Compute the 16 levels of the 4-bit NormalFloat, (16,).

    The levels are quantiles of a normal distribution scaled into [-1, 1], with an exact 0 and one
    more level above 0 than below. The outermost quantile, 0.9677083, is from the authors' code.
    """
    upper = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    lower = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    zero = torch.zeros(1, dtype=torch.float64)
    levels = torch.cat([-lower, upper, zero]).sort().values
    return (levels / levels.max()).float().to(device)


@functools.cache
def nf4_pairs(device=torch.device("cpu")):
    """Tabulate the two levels of each byte of codes, (256, 2)."""
    byte = torch.arange(256)
    codes = torch.stack([byte >> 4, byte & 15], dim=1)  # (256, 2)
    return nf4_levels()[codes].to(device)


def nf4_quantize(weight) -> tuple:
    """Quantize a weight to codes (n/2,) uint8, two to a byte, and absmax (n/64,) fp32.

    Each block of 64 weights is divided by its largest absolute value, absmax; a code is the index
    of the nearest level. The last block is padded with zeros.
    """
    padding = -weight.numel() % BLOCK
    blocks = F.pad(weight.float().flatten(), (0, padding)).view(-1, BLOCK)
    absmax = blocks.abs().amax(dim=1)  # (n/64,)
    levels = nf4_levels(weight.device)
    midpoints = (levels[1:] + levels[:-1]) / 2  # (15,)
    scaled = blocks / absmax.clamp(min=1e-38)[:, None]  # (n/64, 64)
    codes = torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8).flatten()
    return codes[::2] << 4 | codes[1::2], absmax


def nf4_unpack(codes, absmax, pairs, dtype):
    """Unpack codes (n/2,) with absmax (n/64,) and pairs (256, 2) to (n/64, 64) weights in `dtype`.

    A byte is looked up as a pair of levels instead of being split into two codes first. Bytes of
    memory traffic per weight, in eager mode and for bf16: codes to int32 0.5 + 2, look-up 2 + 4,
    product 4 + 4, cast 4 + 2, together 22.5 in 4 kernels. Compiled into one kernel: 0.5 + 2 = 2.5.
    With the 4 small kernels of `absmax`, the totals are about 23 and 3 bytes.
    There is one rounding in the product and one in the cast, compiled or not: the values are equal.
    """
    values = pairs.index_select(0, codes.int()).view(-1, BLOCK)  # (n/64, 64)
    return (values * absmax[:, None]).to(dtype)


@functools.cache
def nf4_unpacker(device_type):
    """Return nf4_unpack, compiled for CUDA if Triton is installed. A CPU gains nothing from it."""
    if device_type == "cuda" and importlib.util.find_spec("triton"):
        return torch.compile(nf4_unpack, dynamic=True)
    return nf4_unpack


class NF4Linear(torch.nn.Module):
    """A frozen linear layer with 4-bit weights.

    A weight takes 4 + 8/64 + 32/(64·256) = 4.127 bits, 0.516 bytes, with double quantization
    (Sec. 3): the mean of the blocks' scales is subtracted, each scale is stored as an 8-bit float,
    here e4m3, and 256 scales share one fp32 scale. The dense weight exists during one matrix
    product at a time, forward and backward, in the dtype of the input.
    """

    def __init__(self, weight, bias):
        super().__init__()
        self.shape = weight.shape
        self.weight = None  # T5 asks for the dtype of a weight, if there is one
        self.bias = bias
        codes, absmax = nf4_quantize(weight)
        mean = absmax.mean()
        padding = -len(absmax) % BLOCK_OF_BLOCKS
        scales = F.pad(absmax - mean, (0, padding)).view(-1, BLOCK_OF_BLOCKS)
        largest = scales.abs().amax(dim=1).clamp(min=1e-38)
        scales = (scales / largest[:, None] * E4M3_MAX).to(torch.float8_e4m3fn)
        self.register_buffer("codes", codes)  # (n/2,)
        self.register_buffer("mean", mean)  # ()
        self.register_buffer("largest", largest)  # (n/64/256,)
        self.register_buffer("scales", scales.view(torch.uint8))  # (n/64/256, 256)

    def absmax(self):
        """Compute the scale of each block of 64, (n/64,) fp32. This is never compiled, because a
        compiler may fuse product and sum, which rounds differently. The tensor is small, so the
        eager code is cheap."""
        scales = self.scales.view(torch.float8_e4m3fn).float() / E4M3_MAX
        absmax = (scales * self.largest[:, None]).flatten() + self.mean
        return absmax[:2 * len(self.codes) // BLOCK]

    def dense(self, dtype=torch.float32):
        """Unpack the weight, (out, in)."""
        device = self.codes.device
        unpack = nf4_unpacker(device.type)
        weights = unpack(self.codes, self.absmax(), nf4_pairs(device), dtype)
        return weights.flatten()[:self.shape.numel()].view(self.shape)

    def forward(self, x):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = DequantizedProduct.apply(x.to(dtype), self)
        return y if self.bias is None else y + self.bias.to(dtype)


class DequantizedProduct(torch.autograd.Function):
    """Computes x Wᵀ, and unpacks W again in backward. Autograd would keep the dense weights of all
    layers from forward to backward, and so lose the memory that 4-bit weights save."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return F.linear(x, layer.dense(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ ctx.layer.dense(gradient.dtype), None


@torch.no_grad()
def quantize(model, device=None):
    """Replace every linear layer but the head by an NF4Linear, in place and one at a time.

    The model may be on the CPU and `device` a GPU. Dense weights are copied to the GPU one at a
    time and freed once quantized, so the GPU never holds more than the 4-bit layers and one dense
    layer.
    """
    for path in list(linear_layers(model)):
        layer = model.get_submodule(path)
        bias = layer.bias
        if bias is not None:
            bias = torch.nn.Parameter(bias.to(device), requires_grad=bias.requires_grad)
        model.set_submodule(path, NF4Linear(dense_weight(layer).to(device), bias))
