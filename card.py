"""Writes the model card of a finished run: README.md in its folder, in the format of the Hub.

It has the base model, the data, the loss with its formula and paper (from the docstring in
losses.py), the hyper-parameters, the last metrics, the curves, and code that loads the model. It is
made from the files of the folder alone. It names no license: that is for the author to choose.
"""
import inspect
import json
import os
import pathlib
import re
from collections.abc import Callable

from checkpoint import FREE_ON_RESUME, is_adapter, is_complete
from errors import UserError
from families import AUTO_CLASSES
from files import (
    RUN_FILE,
    free_name,
    read_json,
    read_list,
    read_run_file,
    write_list,
    write_text,
)
from flags import build_parser
from loading import has_processor, load_family
from losses import LOSSES, find, hyperparameters, kind_of
from plots import CURVES_FILE, PANELS, read_metrics, write_curves

CARD_FILE = "README.md"

SYMBOLS = {
    "pairs": """\
w, l      log-probs of the chosen and of the rejected answer, summed over its tokens
w°, l°    the same under the reference
a, b, h   log-ratios a = w − w° and b = l − l°, and their margin h = a − b
n_w, n_l  numbers of tokens; a bar marks an average per token: w̄ = w/n_w""",
    "labels": """\
ℓ, ℓ°     log-probs of an answer under the policy and the reference, summed over its tokens
r         the implicit reward β(ℓ − ℓ°)
L_D, L_U  the loss of a good and of a bad answer""",
    "lists": """\
ℓ_k, ℓ°_k log-probs of answer k under the policy and the reference, summed over its tokens
r_k       the implicit reward β(ℓ_k − ℓ°_k)
s_k       its score""",
}

# Flags that the table of hyper-parameters always has. Others are there if they were changed.
SHOWN = ("lr", "lr_schedule", "warmup_steps", "batch_size", "epochs", "max_steps", "max_grad_norm",
         "max_length", "dtype", "seed", "ref", "lora_rank", "lora_alpha")
# Flags that other parts of the card are about, or that change no result.
LEFT_OUT = FREE_ON_RESUME | {"loss", "model", "adapter", "dataset", "eval_dataset",
                             "micro_batch_size", "tokens_per_micro_batch"}


# --- The loss -------------------------------------------------------------------------------------

def docstring_section(function: Callable, name: str) -> str:
    """Return a section of the docstring of a loss, such as its formula, without indentation."""
    lines, inside = [], False
    for line in inspect.getdoc(function).splitlines():
        if line and not line[0].isspace():
            inside = line.split()[0] == name and line[len(name):].startswith("  ")
            line = " " * len(name) + line[len(name):]
        if inside:
            lines.append(line)
    return inspect.cleandoc("\n" + "\n".join(lines))


def describe_loss(loss: Callable) -> str:
    """Return formula and papers of a loss; of a weighted sum, those of each part."""
    texts = []
    for name, weight in loss.parts.items():
        function = LOSSES[name]
        heading = f"### {name}" if len(loss.parts) == 1 else f"### {weight:g} × {name}"
        summary = inspect.getdoc(function).splitlines()[0]
        papers = docstring_section(function, "Paper").splitlines()
        linked = [re.sub(r"arXiv:(\d+\.\d+)(v\d+)?", link_paper, line) for line in papers]
        citation = "  \n".join(["Citation:", *linked])
        formula = docstring_section(function, "Formula")
        texts.append(f"{heading}\n\n{summary}\n\n```text\n{formula}\n```\n\n{citation}")
    texts.append(f"Symbols:\n\n```text\n{SYMBOLS[kind_of(loss)]}\n```")
    return "\n\n".join(texts)


def link_paper(match: re.Match) -> str:
    return f"[{match.group()}](https://arxiv.org/abs/{match[1]}{match[2] or ''})"


# --- Base and data --------------------------------------------------------------------------------

def hub_base(flags: dict) -> str | None:
    """Return the name of the base on the Hub, through runs of this project that came before. None
    if the last of them began with a folder whose origin is not known."""
    seen = set()
    name = flags["model"]
    while os.path.isdir(name) and name not in seen:
        seen.add(name)
        name = read_run_file(name).get("flags", {}).get("model", name)
    local = name in ("world", "") or os.path.lexists(name) or os.path.isabs(name)
    return None if local or name.startswith((".", "~")) else name


def front_matter(folder: pathlib.Path, flags: dict, loss: Callable) -> str:
    """Return the metadata that the Hub reads. Strings of JSON are strings of YAML."""
    adapted = is_adapter(folder)
    lines = []
    base = hub_base(flags)
    if base:
        lines.append(f"base_model: {json.dumps(base)}")
    lines.append(f"library_name: {'peft' if adapted else 'transformers'}")
    lines.append("tags:")
    tags = ["preference-optimization", *loss.parts, *(["lora"] if adapted else [])]
    lines += [f"- {json.dumps(tag)}" for tag in tags]
    return "\n".join(["---", *lines, "---"])


def describe_sources(flags: dict) -> str:
    """Return the lines about the base model and the data."""
    base = f"`{flags['model']}`"
    if flags["model"] == "world":
        base = "the reference policy of the embedded world, a toy language"
    elif hub_base(flags) not in (None, flags["model"]):
        base += f", which was trained from `{hub_base(flags)}`"
    if flags["adapter"]:
        base += f", with the adapter `{flags['adapter']}`"
    held_out = "rows that the world holds out"
    if flags["eval_dataset"]:
        held_out = f"`{flags['eval_dataset']}`"
    elif flags["eval_share"] is not None:
        held_out = f"{100 * flags['eval_share']:g} % of its prompts"
    data = f"`{flags['dataset']}`"
    if flags["dataset"] == "world":
        data = "preferences sampled in the embedded world"
    return f"- Base model: {base}\n- Data: {data}\n- Held out: {held_out}"


# --- Tables ---------------------------------------------------------------------------------------

def hyperparameter_table(flags: dict, loss: Callable) -> str:
    """Return the hyper-parameters of the loss, the flags in SHOWN, and what else was changed."""
    defaults = vars(build_parser(loss).parse_args([]))
    names = [*hyperparameters(loss), *SHOWN]
    for name in flags:
        changed = flags[name] != defaults.get(name)
        if changed and name not in LEFT_OUT and name not in names:
            names.append(name)
    lines = ["| flag | value |", "|---|---|"]
    for name in names:
        if flags.get(name) is not None:
            lines.append(f"| `{name}` | {table_cell(flags[name])} |")
    return "\n".join(lines)


def table_cell(value) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def metric_table(rows: list[dict]) -> str:
    """Return the last metrics of training and of the evaluation."""
    last = {row["split"]: row for row in rows}
    train = last.get("train", {})
    # A column for each evaluation set. The metrics of the world are in the first one.
    columns = {"last training step": train}
    for split, row in last.items():
        name = split.partition("/")[2]
        if split.startswith("eval"):
            columns[f"held out: {name}" if name else "held out"] = dict(row)
    if "world" in last:
        first = next((title for title in columns if title.startswith("held")), "held out")
        columns[first] = columns.get(first, {}) | last["world"]
    names = {}
    for row in columns.values():
        names |= row
    known = [name for name in PANELS if name in names]
    others = [name for name in names if name not in (*PANELS, "step", "split")]
    lines = [f"After {rows[-1]['step']} optimizer steps:", "",
             f"| metric | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in known + others:
        title = PANELS[name][0] if name in PANELS else name
        cells = [f"{row[name]:.4g}" if name in row else "" for row in columns.values()]
        lines.append(f"| {title} (`{name}`) | {' | '.join(cells)} |")
    return "\n".join(lines)


# --- How to load ----------------------------------------------------------------------------------

LOAD_MODEL = """\
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
model = {auto_class}.from_pretrained({name})
"""
LOAD_ADAPTER = """\
from peft import PeftModel
from transformers import {auto_class}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({name})
base = {auto_class}.from_pretrained({base})
model = PeftModel.from_pretrained(base, {name})
"""
CHAT = """
messages = [{"role": "user", "content": "Hello"}]
prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt",
                   return_token_type_ids=False)
"""
PLAIN = """
prompt = "the sea is"
inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
"""
GENERATE = """\
output = model.generate(**inputs, max_new_tokens=64)
"""
# The output of a decoder begins with the prompt.
PRINT = {
    "decoder": """\
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
""",
    "encoder_decoder": """\
print(tokenizer.decode(output[0], skip_special_tokens=True))
""",
}
PRINT["vision"] = PRINT["decoder"]
QUANTIZED = """

The adapter was trained on the base in 4 bits. To load the base so, pass
`quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")`."""

IMAGES = """

For a prompt with images, load `AutoProcessor` in place of `AutoTokenizer`."""


def loading_code(folder: pathlib.Path, flags: dict) -> str:
    """Return the code that loads the model and lets it answer, and what there is to know."""
    name = json.dumps(flags["push_to_hub"] or str(folder))
    family = load_family(str(folder))
    if has_processor(str(folder)):  # an adapter does not name the family of its base
        family = "vision"
    auto_class = AUTO_CLASSES[family].__name__
    code = LOAD_MODEL.format(name=name, auto_class=auto_class)
    if is_adapter(folder):
        base = read_json(folder / "adapter_config.json")["base_model_name_or_path"]
        code = LOAD_ADAPTER.format(name=name, base=json.dumps(base), auto_class=auto_class)
    has_template = (folder / "chat_template.jinja").exists()
    code += CHAT if has_template else PLAIN
    note = QUANTIZED if flags["quantize"] else ""
    if family == "vision":
        note += IMAGES
    return f"```python\n{code}{GENERATE}{PRINT[family]}```{note}"


# --- The card -------------------------------------------------------------------------------------

def make_card(folder: pathlib.Path, flags: dict) -> str:
    """Return the text of the model card of a finished run."""
    loss = find(flags["loss"])
    rows = read_metrics(folder)
    if not rows:
        raise UserError(f"{folder}: its metrics.jsonl has no row")
    title = pathlib.Path(flags["push_to_hub"] or os.path.abspath(folder)).name
    kind = "LoRA adapter" if is_adapter(folder) else "model"
    flags_file = RUN_FILE if is_adapter(folder) else "config.json"
    best = read_run_file(folder).get("best")
    if best:  # the weights are those of --keep_best, and the curves have the rest of the run
        rows = [row for row in rows if row["step"] <= best["step"]]
    metrics = metric_table(rows)
    if (folder / CURVES_FILE).exists():
        metrics += f"\n\n![curves of the metrics]({CURVES_FILE})"
    parts = [
        front_matter(folder, flags, loss),
        f"# {title}",
        f"A {kind} trained on preferences with the loss `{flags['loss']}`.",
        describe_sources(flags),
        f"## Loss\n\n{describe_loss(loss)}",
        f"## Hyper-parameters\n\n{hyperparameter_table(flags, loss)}\n\n"
        f"All flags are in `{flags_file}`.",
        f"## Metrics\n\n{metrics}",
        f"## How to load\n\n{loading_code(folder, flags)}",
        "## License\n\nThe author of this model has not chosen a license yet. Choose one that the "
        "base model and the data allow, and write it here and as `license:` into the first lines "
        "of this file.",
    ]
    return "\n\n".join(parts) + "\n"


def has_card(folder: pathlib.Path) -> bool:
    """Return whether a finished run has written its card. A run that is killed right after it saved
    its model has not."""
    listed = read_list(folder) or set()
    return CARD_FILE in listed and (folder / CARD_FILE).exists()


def reopen_run(folder: pathlib.Path) -> None:
    """Turn a finished run back into one that has not ended, because it is made longer.

    Its card is deleted, or renamed if its author edited it. The weights stay until the end of the
    longer run replaces them. A kill in between leaves a finished run, or one that can be resumed.
    """
    if not is_complete(folder):
        return
    path = folder / CARD_FILE
    if has_card(folder):
        try:
            written = make_card(folder, read_run_file(folder)["flags"])
        except UserError:  # metrics.jsonl was changed
            written = ""
        if path.read_bytes() == written.encode():
            path.unlink()
        else:
            kept = free_name(path)
            os.replace(path, kept)
            print(f"{path} is not as the run wrote it, and is now {kept}; the longer run writes a "
                  "new one")
        write_list(folder, read_list(folder) - {CARD_FILE})
    (folder / "adapter_config.json").unlink(missing_ok=True)


def document_run(folder: pathlib.Path) -> None:
    """Write the curves and the card of a finished run."""
    write_curves(folder)
    try:
        text = make_card(folder, read_run_file(folder)["flags"])
    except UserError as error:  # a line of metrics.jsonl was changed
        print(f"{folder / CARD_FILE} is not written: {error}")
        return
    write_text(folder / CARD_FILE, text)
