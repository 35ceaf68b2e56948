"""No flag is accepted and ignored: each changes the results, files or forwards of a run, or it is
refused."""
import json
import pathlib
import tempfile

import pytest
import torch
from conftest import (
    ALONE,
    TINY_RUN,
    differences,
    make_rows,
    tiny_model,
    to_arguments,
    write_jsonl,
)

import model as models
import train
from flags import build_parser
from losses import LOSSES, find, hyperparameters

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LORA = {"lora_rank": 4}

# flag: (other flags of the two runs that are compared, value of the flag in the second run).
# Names in capitals are paths of the fixture `paths`.
CHANGES = {
    "loss": ({}, "ipo"),
    "model": ({}, "OTHER"),
    "dataset": ({}, "ROWS"),
    "eval_dataset": ({"eval_share": None}, "ROWS"),
    "eval_share": ({}, 0.3),
    "output_dir": ({}, "ELSEWHERE"),
    "resume": ({}, True),
    "adapter": ({}, "ADAPTER"),
    "lora_rank": ({}, 2),
    "lora_alpha": (LORA, 1),
    "lora_target": (LORA, "q_proj"),
    "lora_dropout": (LORA, 0.5),
    "rslora": (LORA, True),
    "dora": (LORA, True),
    "quantize": (LORA, "nf4"),
    "gradient_checkpointing": ({}, True),
    "ref": ({}, "cache"),
    "ref_model": ({}, "OTHER"),
    "ref_batch_size": ({"ref": "cache"}, 1),
    "sync_ref_every": ({}, 1),
    "sync_ref_alpha": ({"sync_ref_every": 1}, 0.1),
    "batch_size": ({}, 4),
    "micro_batch_size": ({}, 1),
    "attention": ({}, "packed"),
    "deterministic": ({}, True),
    "compile": ({}, True),
    "tokens_per_micro_batch": ({"micro_batch_size": None}, 30),
    "epochs": ({}, 2),
    "max_steps": ({}, 1),
    "lr": ({}, 1e-3),
    "lr_schedule": ({}, "cosine"),
    "warmup_steps": ({}, 2),
    "max_grad_norm": ({}, 1e-3),
    "max_length": ({}, 8),
    "max_prompt_length": ({}, 2),
    "max_completion_length": ({}, 2),
    "truncation_mode": ({"max_prompt_length": 2}, "keep_start"),
    "overlong": ({"max_length": 16}, "drop"),
    "columns": ({}, "chosen=rejected,rejected=chosen"),
    "ignore_columns": ({}, "sources"),
    "chat_template": ({"dataset": "CHAT"}, "TEMPLATE"),
    "strict": ({"dataset": "TIES"}, True),
    "shuffle": ({}, "false"),
    "seed": ({}, 1),
    "parallel": ({}, "fsdp"),
    "dtype": ({}, "float64"),
    "log_every": ({}, 2),
    "eval_every": ({}, 1),
    "save_every": ({}, 1),
    "keep_checkpoints": ({"save_every": 1}, 1),
    "reference_free": ({}, True),
    "f_divergence": ({}, "js"),
    "f_alpha": ({"f_divergence": "alpha"}, 0.9),
    "wpo": ({}, True),
    "ld_alpha": ({}, 0.5),
}
REFUSED = {
    "resume": "there is no run in",
    "parallel": "one process alone has nothing to share",
    "strict": "chosen equals rejected",
    "ignore_columns": "no row has such a column",
}


def first_readers():
    """{hyper-parameter: the first loss that reads it}"""
    readers = {}
    for loss in LOSSES:
        for name in hyperparameters(LOSSES[loss]):
            readers.setdefault(name, loss)
    return readers


HYPER = first_readers()
# The value of a hyper-parameter is 1.5 times its default, except where that is out of range or has
# no effect.
VALUES = {
    "chipo_r_max": 1e-3, "simpo_gamma": 3.0, "label_smoothing": 0.2, "cpo_alpha": 0.3,
    "slic_delta": 0.05, "dpop_lambda": 5.0,
}


@pytest.fixture(scope="module")
def paths(tokenizer, tmp_path_factory):
    """{name in capitals: model, adapter, file of rows or template}"""
    home = tmp_path_factory.mktemp("flags")

    def turn(role, text):
        return [{"role": role, "content": text}]

    # Files of rows.
    rows, conversations = [], []
    for i, row in enumerate(make_rows(22)):
        rows.append(row | {"chosen_score": 2.0 + i, "rejected_score": 1.0})
        conversation = {"prompt": turn("user", row["prompt"])}
        for side in ("chosen", "rejected"):
            conversation[side] = turn("assistant", row[side])
        conversations.append(conversation)
    files = {
        "PAIRS": rows,
        "ROWS": make_rows(14, seed=3),
        "TIES": rows + [rows[0] | {"chosen": "same", "rejected": "same"}],
        "CHAT": conversations,
    }
    paths = {}
    for name, content in files.items():
        paths[name] = write_jsonl(home / f"{name}.jsonl", content)

    # Models with a chat template, and the template of --chat_template.
    for name in ("START", "OTHER", "ADAPTER", "ELSEWHERE", "RUNS"):
        paths[name] = home / name.lower()
    paths["RUNS"].mkdir()
    start, other = tiny_model("llama", tokenizer), tiny_model("llama", tokenizer)
    other.lm_head.weight.data.mul_(2)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    models.save_model(start, tokenizer, paths["START"])
    models.save_model(other, tokenizer, paths["OTHER"])
    tokenizer.chat_template = None
    paths["TEMPLATE"] = home / "template.jinja"
    paths["TEMPLATE"].write_text(TEMPLATE)

    # An adapter.
    flags = {"model": paths["START"], "dataset": paths["ROWS"], "output_dir": paths["ADAPTER"],
             "loss": "sft", "lora_rank": 3, "lr": 0.1, "max_length": 64, "max_steps": 2}
    train.main(to_arguments(flags), ALONE)
    return paths


@pytest.fixture(scope="module")
def observations():
    """{flags: observation} of the runs so far."""
    return {}


@pytest.fixture
def observe(paths, observations, monkeypatch):
    """Train with these flags -> everything about the run except its printed lines."""
    def run(flags):
        key = json.dumps(flags, sort_keys=True)
        if key not in observations:
            home = pathlib.Path(tempfile.mkdtemp(dir=paths["RUNS"]))
            monkeypatch.chdir(home)
            observations[key] = train_in(home, paths, flags)
        return observations[key]
    return run


def train_in(home, paths, flags):
    defaults = {"model": "START", "dataset": "PAIRS", "output_dir": "out", "warmup_steps": 0}
    given = TINY_RUN | defaults | flags
    for name, value in given.items():
        if isinstance(value, str):
            given[name] = paths.get(value, value)

    # The output shapes of all modules show micro-batches, packing, padding and recomputation.
    forwards, kernels = [], set()

    def note(module, inputs, output):
        if isinstance(output, torch.Tensor):
            forwards.append((type(module).__name__, tuple(output.shape)))
        kernels.add(torch.are_deterministic_algorithms_enabled())

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        train.main(to_arguments(given), ALONE)
    finally:
        handle.remove()
    files = []
    for path in home.rglob("*"):
        if "references" not in path.parts:
            files.append(str(path.relative_to(home)))
    return {"out": home / given["output_dir"], "files": sorted(files), "forwards": forwards,
            "deterministic": kernels}


def differ(left, right):
    for part in ("files", "forwards", "deterministic"):
        if left[part] != right[part]:
            return True
    return bool(differences(left["out"], right["out"]))


@pytest.mark.parametrize("flag", CHANGES)
def test_a_flag_changes_the_run_or_is_refused(flag, paths, observe):
    base, value = CHANGES[flag]
    changed = base | {flag: value}
    if flag in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[flag]):
            observe(changed)
    elif flag == "output_dir":
        observe(changed)
        assert (paths["ELSEWHERE"] / "model.safetensors").exists()
    else:
        assert differ(observe(base), observe(changed))


@pytest.mark.parametrize("name", HYPER)
def test_a_hyper_parameter_changes_the_run_of_a_loss_that_reads_it(name, observe):
    default = hyperparameters(find(HYPER[name]))[name]
    value = VALUES.get(name, (default or 1.0) * 1.5)
    base = {"loss": HYPER[name], "max_steps": 3}
    assert differ(observe(base), observe(base | {name: value}))


def test_every_flag_of_every_loss_is_tested_here():
    flags = set()
    for loss in LOSSES.values():
        flags |= vars(build_parser(loss).parse_args([])).keys()
    assert flags == CHANGES.keys() | HYPER.keys()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_flag_of_another_loss_is_refused(loss):
    for name in HYPER.keys() - hyperparameters(find(loss)).keys():
        message = f"--{name} is not read by --loss {loss}; it is read by"
        with pytest.raises(ValueError, match=message):
            train.parse_args(["--loss", loss, f"--{name}", "0.3"])


def test_a_repeated_run_is_the_same(observe):
    """Otherwise each comparison above would find a difference."""
    assert not differ(observe({}), observe({"output_dir": "out", "seed": 0}))
