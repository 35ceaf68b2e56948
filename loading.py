"""Reads a model folder: its config, its tokenizer, and the headers of its weights.

A folder is data that somebody else wrote. No code of it runs, and it is checked before it is used:

    code        `load_pretrained` never allows classes of the folder, and weights are safetensors:
                reading a pickle can run any program
    sizes       config.json must describe the model whose numbers the files hold (`check_sizes`)
    tokens      every id of the tokenizer must have an embedding (`check_vocabulary`), and every
                character a token (`leaves_out`, `loses`)

Whatever transformers raises about a file becomes one line that names the file.
"""
import functools
import importlib.util
import math
import os
import pathlib
import shutil
import unicodedata
from typing import Any, NamedTuple

import torch
import transformers
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import cached_file

from errors import UserError, hub_failure, reading, stop_hub_retries
from families import AUTO_CLASSES, auto_class_of, family_of, family_of_adapter
from files import read_json

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# Small files that a class reads, and that are checked before. transformers ignores some of these
# where they are damaged, and names none.
JSON_FILES = {
    AutoConfig: ("config.json",),
    AutoTokenizer: ("config.json", "tokenizer_config.json", "special_tokens_map.json",
                    "added_tokens.json"),
    AutoProcessor: PROCESSOR_FILES,
} | dict.fromkeys(AUTO_CLASSES.values(), ("generation_config.json",))
# What each class reads, for its error.
PARTS_OF_FOLDER = {
    AutoConfig: "config.json",
    AutoTokenizer: "tokenizer.json or another file of the tokenizer",
    AutoProcessor: "processor_config.json or preprocessor_config.json",
} | dict.fromkeys(AUTO_CLASSES.values(), "the weights and config.json")
TAKE_CONFIG = "; take config.json from the model that the weights belong to"
COPY_FILE = "; copy it from the model again"
# Files with a vocabulary, of which a tokenizer needs one.
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken",
                    "tekken.json", "vocab-*.json", "vocab")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


# --- Any file -------------------------------------------------------------------------------------

def load_pretrained(auto_class: type, name: str, **options) -> Any:
    """Call auto_class.from_pretrained, and raise each failure as a UserError of one sentence."""
    is_local_path = os.path.isabs(name) or name.startswith(".") or name.count("/") > 1
    if os.path.isfile(name):
        raise UserError(f"{name}: is a file; pass the folder that has the model's files")
    if (is_local_path or os.path.isdir(os.path.dirname(name) or "?")) and not os.path.isdir(name):
        raise UserError(f"{name}: no such model folder; pass an existing folder or a Hub id")
    if not os.path.isdir(name):
        stop_hub_retries()
    for file in JSON_FILES[auto_class]:
        path = pathlib.Path(name, file)
        if path.exists():
            read_json(path, COPY_FILE)
    try:
        with reading(f"{name}: {PARTS_OF_FOLDER[auto_class]} cannot be used"):
            return auto_class.from_pretrained(name, trust_remote_code=False, **options)
    except UserError as error:
        if "custom code" in str(error.__cause__):
            raise UserError(f"{name}: needs code of its own (auto_map in its config), and code of "
                            "a model is never run here; pass a model whose classes transformers "
                            "has") from error
        if auto_class is AutoTokenizer and os.path.exists(os.path.join(name, "config.json")):
            load_pretrained(AutoConfig, name)  # raises where that is the file at fault
        if not os.path.isdir(name):
            raise UserError(hub_failure(name, error.__cause__)) from error
        raise


# --- The config -----------------------------------------------------------------------------------

FLASH_PACKAGES = ("flash_attn", "flash_attn_interface", "kernels")
MOST_LAYERS = 10_000  # some configs make a list with an entry for each layer


# What a run adds to the config.json of its model. It is not true of a model trained from there.
RUN_ENTRIES = ("flags", "digest", "best", "loss_state")


def load_config(name: str, revision: str | None = None,
                attention: str | None = None) -> PretrainedConfig:
    """Load the config of a model, and reject a model that cannot be trained here.

    revision    a branch, tag or commit of a model of the Hub
    attention   the name that transformers gives to a kernel, in place of the config's

    Weights that are quantized already need the kernels of their method, and cannot be merged or
    saved here. A kernel for attention that the config names is code, which is not fetched. Flash
    attention is rejected where it is not installed.
    """
    path = pathlib.Path(name, "config.json")
    if path.exists():
        check_layers(path, read_json(path, COPY_FILE))
    options = {"revision": revision} if revision else {}
    if attention:
        options["attn_implementation"] = attention
    config = load_pretrained(AutoConfig, name, **options)
    for entry in RUN_ENTRIES:
        vars(config).pop(entry, None)
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
        check_attention(name, str(part._attn_implementation), attention)
    return config


def load_family(name: str) -> str:
    """Return the family of the model or adapter in a folder or on the Hub. A folder with no more
    than a tokenizer is taken for a decoder's."""
    folder = pathlib.Path(name)
    if (folder / "adapter_config.json").exists():
        adapter = read_json(folder / "adapter_config.json", COPY_FILE)
        return family_of_adapter(adapter)
    if folder.is_dir() and not (folder / "config.json").exists():
        return "decoder"
    return family_of(load_pretrained(AutoConfig, name))


def check_layers(path, entries):
    """Raise a UserError for a number of layers that no model has, also of a part of a model."""
    for key, value in entries.items():
        if isinstance(value, dict):
            check_layers(path, value)
        elif "layer" in key and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(f"{path}: {key} is {value}, and no model has that many{COPY_FILE}")


def check_attention(name, attention, chosen):
    """Raise a UserError for attention that is not installed, or that is code to be fetched.
    `chosen` is the value of --attn_implementation or None, and then the config chooses."""
    is_flash = "flash" in attention
    if is_flash and chosen and not any(map(importlib.util.find_spec, FLASH_PACKAGES)):
        raise UserError(f"--attn_implementation {attention}: is not installed; install flash-attn, "
                        "or choose sdpa, which needs no package")
    advice = "delete attn_implementation from its config.json (the default, sdpa, needs no package)"
    if "/" in attention:
        raise UserError(f"{name}: its config asks for the kernel {attention}, which is code of its "
                        f"own and is never run here; {advice}")
    if is_flash and not any(map(importlib.util.find_spec, FLASH_PACKAGES)):
        raise UserError(f"{name}: its config asks for {attention}, which is not installed; "
                        f"{advice}")


# --- The tokenizer --------------------------------------------------------------------------------

def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """Load a tokenizer. Without a vocabulary, transformers would make an empty one."""
    if not has_vocabulary(name):
        raise UserError(f"{name}: has no tokenizer.json, nor another file with the vocabulary of a "
                        "tokenizer; copy the tokenizer of the model into the folder")
    options = {"revision": revision} if revision else {}
    tokenizer = load_pretrained(AutoTokenizer, name, **options)
    if not isinstance(tokenizer.chat_template, (str, dict, type(None))):
        raise UserError(f"{name}: chat_template in tokenizer_config.json must be a string, and is "
                        f"{tokenizer.chat_template!r}")
    return tokenizer


def has_vocabulary(name: str) -> bool:
    """Return False for a folder without a tokenizer."""
    folder = pathlib.Path(name)
    return not folder.is_dir() or any(any(folder.glob(file)) for file in VOCABULARY_FILES)


def load_adapter_tokenizer(adapter: str, base: str, revision: str | None = None) -> Any:
    """Load the tokenizer that was saved with an adapter, or else that of this revision of its base.

    The adapter was trained behind its own chat template, which --chat_template may have set.
    """
    if not os.path.exists(os.path.join(adapter, "tokenizer_config.json")):
        return load_tokenizer(base, revision)
    tokenizer = load_tokenizer(adapter)
    if not tokenizer.chat_template:
        tokenizer.chat_template = load_tokenizer(base, revision).chat_template
    return tokenizer


def has_processor(name: str, revision: str | None = None) -> bool:
    """Return whether a folder or a model of the Hub has a processor of images."""
    return any(find_file(name, file, revision) for file in PROCESSOR_FILES)


def copy_processor(name: str, folder: str) -> None:
    """Copy the files of the processor of images, if there are any and the folder has none."""
    for file in PROCESSOR_FILES:
        path = find_file(name, file, None)
        if path and not os.path.exists(os.path.join(folder, file)):
            shutil.copy(path, folder)


def load_processor(name: str, tokenizer: Any, revision: str | None = None,
                   keeps_template: bool = False) -> Any:
    """Load what turns the images of a model into numbers, and give it this tokenizer.

    keeps_template    the tokenizer has the chat template of a flag or an adapter. Else both get
                      that of the processor, which writes the places of images
    """
    if not has_processor(name, revision):
        raise UserError(f"{name}: has no processor, neither {' nor '.join(PROCESSOR_FILES)}, which "
                        "says how an image becomes numbers; copy the processor's files from the "
                        "model")
    if importlib.util.find_spec("PIL") is None:
        raise UserError(f"{name}: its processor needs Pillow, which reads images and is not "
                        "installed: pip install pillow")
    options = {"revision": revision} if revision else {}
    processor = load_pretrained(AutoProcessor, name, **options)
    token = getattr(processor, "image_token", None)
    if getattr(processor, "image_processor", None) is None or token is None:
        raise UserError(f"{name}: its processor is a {type(processor).__name__}, which reads no "
                        "images into prompts; copy the processor's files from the model")
    if tokenizer.convert_tokens_to_ids(token) != processor.image_token_id:
        raise UserError(f"{name}: its processor writes an image as {token}, which is no token of "
                        "the tokenizer; copy the files of both from the model")
    if not (keeps_template and tokenizer.chat_template):
        tokenizer.chat_template = processor.chat_template or tokenizer.chat_template
    processor.tokenizer, processor.chat_template = tokenizer, tokenizer.chat_template
    return processor


def position_count(model) -> float:
    """Return how many tokens a model can read, infinite if its config does not say."""
    config, counts = model.config.get_text_config(), []
    for part in ("", "encoder_", "decoder_"):  # encoder and decoder of LED have different numbers
        counts.append(getattr(config, f"max_{part}position_embeddings", None) or math.inf)
    return min(counts)


def check_vocabulary(name: str, model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise a UserError if the tokenizer has ids that the model has no embedding for."""
    words = model.get_input_embeddings().num_embeddings
    token, number = last_token(tokenizer)
    if number >= words:
        raise UserError(f"{name}: its tokenizer has the id {number} for {token!r}, but its "
                        f"embedding has {words} rows, 0 to {words - 1}: tokenizer and "
                        "model do not belong together; copy the files of the tokenizer that the "
                        "model was trained with into the folder")


def last_token(tokenizer: Any) -> tuple[str, int]:
    """Return the token with the largest id that a tokenizer can write, and this id."""
    ids = dict(tokenizer.get_vocab())
    # The ids that the tokenizer puts around a text stand in its post-processor, a second time.
    for number in tokenizer(text_with_tokens(tokenizer))["input_ids"]:
        ids.setdefault(f"id {number}", number)
    return max(ids.items(), key=lambda item: item[1])


@functools.lru_cache(maxsize=4)
def leaves_out(tokenizer) -> bool:
    """Return whether a tokenizer leaves out text that it has no token for. It does if it has
    neither an unknown token nor a token for each byte, which letters of many scripts show."""
    if not tokenizer.is_fast:  # such a tokenizer has an unknown token
        return False
    codes = [*range(0x21, 0x7f), *range(0x80, 0x500, 3), *range(0x800, 0x30000, 0x800)]
    letters = [chr(code) for code in codes]  # their UTF-8 has every byte that UTF-8 can have
    letters = [letter for letter in letters if unicodedata.category(letter)[0] in "LNPS"]
    return any(loses(tokenizer, letter) for letter in letters)


def loses(tokenizer, text: str) -> bool:
    """Return whether the token ids of a text lack one of its characters.

    White space may be lost, and what the tokenizer's own rules remove from each text, such as
    accents.
    """
    try:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except Exception:  # some tokenizers raise an error for a word without a token
        return True
    ids = encoding["input_ids"]
    if "\ufffd" in tokenizer.decode(ids) and "\ufffd" not in text:  # some bytes of a character
        return True
    covered = bytearray(len(text))
    for start, end in encoding["offset_mapping"]:
        covered[start:end] = b"\1" * (end - start)
    normalizer = tokenizer.backend_tokenizer.normalizer
    for character, has_token in zip(text, covered):
        kept = normalizer.normalize_str(character) if normalizer else character
        if not has_token and kept.strip():
            return True
    return False


def text_with_tokens(tokenizer) -> str:
    """Return a short text that the tokenizer has tokens for: "a", if it has one for it."""
    if not leaves_out(tokenizer) or not loses(tokenizer, "a"):
        return "a"
    words = sorted(tokenizer.get_vocab())
    return next((word for word in words if word.isalnum()), "a")


# --- The weights ----------------------------------------------------------------------------------

class Header(NamedTuple):
    """What a safetensors file says about a tensor."""
    dtype: str  # BF16, F16, F32, F8_E4M3, ...
    shape: tuple


def weight_files(name: str, config: PretrainedConfig, revision: str | None = None) -> list:
    """Return the paths of the safetensors files of a folder or a Hub model, downloaded if
    necessary, and refuse a model that has pickles in their place."""
    named = getattr(config, "transformers_weights", None)
    candidates = [named] if named else ["model.safetensors", "model.safetensors.index.json"]
    for file in candidates:
        path = find_weights(name, file, revision)
        if path and not file.endswith(".index.json"):
            return [path]
        if path:
            return [find_shard(name, path, shard, revision) for shard in read_index(path)]
    refuse_pickles(name, candidates, auto_class_of(name, config))


def find_shard(name, index, shard, revision):
    """Return the path of a file that an index names."""
    path = find_weights(name, shard, revision)
    if path is None:
        raise UserError(f"{index}: names {shard}, which is not there; copy the model again")
    return path


def find_weights(name, file, revision):
    """Return the path of a file of weights, or None."""
    if pathlib.PurePath(file).name != file:
        raise UserError(f"{name}: its files name {file}; a weight file must be in the model's "
                        "folder, named without a slash")
    return find_file(name, file, revision)


def find_file(name, file, revision):
    """Return the path of a file of the model, or None."""
    optional = {"_raise_exceptions_for_missing_entries": False,
                "_raise_exceptions_for_connection_errors": False}
    with reading(f"{name}: {file} cannot be read"):
        return cached_file(name, file, revision=revision, **optional)


def read_index(path) -> list:
    """Return the names of the files that an index lists."""
    weight_map = read_json(pathlib.Path(path), COPY_FILE).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{path}: has no weight_map with the file of each tensor{COPY_FILE}")
    for file in weight_map.values():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise UserError(f"{path}: weight_map must name a .safetensors file for each tensor, "
                            f"and names {file}{COPY_FILE}")
    return sorted(set(weight_map.values()))


def refuse_pickles(name, candidates, auto_class):
    """Raise for a model without safetensors. Name the pickles that it has, and how to convert."""
    pickles = []
    for pattern in PICKLES:
        pickles += sorted(path.name for path in pathlib.Path(name).glob(pattern))
    missing = f"{name}: has no {' or '.join(candidates)}"
    convert = (f"transformers.{auto_class.__name__}.from_pretrained({name!r}).save_pretrained("
               f"{os.path.basename(name) + '-safe'!r}), then copy the tokenizer's files")
    if not os.path.isdir(name):
        raise UserError(
            f"{missing} in the cache or on the Hub; if the network is off, download it first; if "
            f"it has only pickled weights that you trust, convert them in Python: {convert}")
    if not pickles:
        raise UserError(f"{missing}; copy the weights of the model into the folder")
    raise UserError(
        f"{missing}; pickled weights ({', '.join(pickles[:2])}) are not read, because a pickle can "
        f"run any program. Where you trust it, convert it in Python: {convert}")


def read_headers(files: list) -> dict[str, Header]:
    """Return {tensor: Header} of safetensors files, without reading a value."""
    headers = {}
    for path in files:
        with reading(f"{path}: cannot be read", COPY_FILE), safe_open(path, "pt") as file:
            for key in file.keys():
                tensor = file.get_slice(key)
                headers[key] = Header(tensor.get_dtype(), tuple(tensor.get_shape()))
    return headers


def stored_dtype(headers: dict) -> torch.dtype | None:
    """Return the dtype of the files if all their floating-point tensors have the same 16-bit dtype,
    else None. Mixed files are read in the dtype that the caller asks for."""
    floating = {header.dtype for header in headers.values() if "F" in header.dtype}
    if floating == {"BF16"}:
        return torch.bfloat16
    return torch.float16 if floating == {"F16"} else None


def check_sizes(name: str, config: PretrainedConfig, headers: dict) -> None:
    """Raise a UserError if config.json describes a model of another size than the files hold.

    transformers would initialize what is missing: that takes all memory where a size is a thousand
    times too large. Here the described model is built without values.
    """
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > len(headers):  # to build them takes long, even without values
        raise UserError(f"{name}: config.json describes a model of {layers:,} layers, and the "
                        f"files hold {len(headers):,} tensors{TAKE_CONFIG}")
    stored = sum(torch.Size(header.shape).numel() for header in headers.values())
    model = build_on_meta(name, config, torch.float32)
    described = sum(parameter.numel() for parameter in model.parameters())
    if described > 2 * stored + 10**7:
        raise UserError(f"{name}: config.json describes a model of {described:,} parameters, and "
                        f"the files hold {stored:,} numbers{TAKE_CONFIG}")


def build_on_meta(name: str, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build the model of a config with shapes and without values."""
    auto_class = auto_class_of(name, config)
    what = f"{name}: no model can be built from config.json"
    with reading(what, TAKE_CONFIG), torch.device("meta"):
        return auto_class.from_config(config, dtype=dtype, trust_remote_code=False)


def check_loaded(name: str, model: PreTrainedModel, info: dict) -> None:
    """Raise a UserError if the files and the model do not have the same tensors.

    info    what from_pretrained reports. transformers initializes a tensor that is missing or has
            another shape randomly, and drops a tensor that the model has no place for
    """
    for key, stored, described in sorted(info["mismatched_keys"]):
        raise UserError(f"{name}: {key} is {tuple(stored)} in the files, and {tuple(described)} by "
                        f"config.json{TAKE_CONFIG}")
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(f"{name}: {len(missing)} weights are not in the files, such as "
                        f"{missing[0]}; transformers would initialize them randomly{TAKE_CONFIG}")
    unread = sorted(key for key in info["unexpected_keys"] if not is_buffer(key, model))
    if unread:
        shown = ", ".join(unread[:3])
        raise UserError(
            f"{name}: the files have {len(unread)} tensors that {type(model).__name__} with this "
            f"config.json has no place for, such as {shown}; transformers would drop them"
            f"{TAKE_CONFIG}")


# Masks and frequencies that earlier versions of transformers saved. The model computes them.
OLD_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias",
               "attention.masked_bias", "position_ids")


def is_buffer(key: str, model: PreTrainedModel) -> bool:
    """Return whether a tensor of a file is a buffer that the model computes itself."""
    computed = {path for path, _ in model.named_buffers()} - model.state_dict().keys()
    return key in computed or f".{key}".endswith(tuple(f".{name}" for name in OLD_BUFFERS))
