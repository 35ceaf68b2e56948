"""No flag is accepted and ignored: each changes what a run computes, writes or runs through its model, or it is refused."""
import json
import pathlib
import tempfile

import pytest
import torch
from conftest import ALONE, make_rows, read_metrics, tiny_model, write_jsonl
from safetensors.torch import load_file

import dpo
import model as models
import train
from flags import build_parser
from losses import LOSSES, find, hyperparameters

LORA = {"lora_rank": 4}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
CHANGES = {  # flag: (flags of the run it is added to, its value); None: refused there
    "loss": ({}, "ipo"), "model": ({}, "OTHER"), "dataset": ({}, "ROWS"), "eval_dataset": ({"eval_share": None}, "ROWS"), "eval_share": ({}, 0.3),
    "output_dir": ({}, "ELSEWHERE"), "resume": ({}, True), "adapter": ({}, "ADAPTER"), "lora_rank": ({}, 2), "lora_alpha": (LORA, 1),
    "lora_target": (LORA, "q_proj"), "lora_dropout": (LORA, 0.5), "rslora": (LORA, True), "dora": (LORA, True), "quantize": (LORA, "nf4"),
    "gradient_checkpointing": ({}, True), "ref": ({}, "cache"), "ref_model": ({}, "OTHER"), "ref_batch_size": ({"ref": "cache"}, 1),
    "sync_ref_every": ({}, 1), "sync_ref_alpha": ({"sync_ref_every": 1}, 0.1), "batch_size": ({}, 4), "micro_batch_size": ({}, 1), "attention": ({}, "packed"), "deterministic": ({}, True), "compile": ({}, True),
    "tokens_per_micro_batch": ({"micro_batch_size": None}, 30), "epochs": ({}, 2),
    "max_steps": ({}, 1), "lr": ({}, 1e-3), "lr_schedule": ({}, "cosine"), "warmup_steps": ({}, 2), "max_grad_norm": ({}, 1e-3),
    "max_length": ({}, 8), "max_prompt_length": ({}, 2), "max_completion_length": ({}, 2), "truncation_mode": ({"max_prompt_length": 2}, "keep_start"),
    "overlong": ({"max_length": 16}, "drop"), "columns": ({}, "chosen=rejected,rejected=chosen"), "chat_template": ({"dataset": "CHAT"}, "TEMPLATE"),
    "strict": ({"dataset": "TIES"}, True), "shuffle": ({}, "false"), "seed": ({}, 1), "parallel": ({}, "fsdp"), "dtype": ({}, "float64"),
    "log_every": ({}, 2), "eval_every": ({}, 1), "save_every": ({}, 1), "keep_checkpoints": ({"save_every": 1}, 1), "reference_free": ({}, True),
    "f_divergence": ({}, "js"), "f_alpha": ({"f_divergence": "alpha"}, 0.9), "wpo": ({}, True), "ld_alpha": ({}, 0.5),
}
REFUSED = {"resume": "there is no run in", "parallel": "one process alone has nothing to share", "strict": "chosen equals rejected"}
HYPER = {name: next(loss for loss in LOSSES if name in hyperparameters(LOSSES[loss])) for loss in LOSSES for name in hyperparameters(LOSSES[loss])}
VALUES = {"chipo_r_max": 1e-3, "simpo_gamma": 3.0, "label_smoothing": 0.2, "cpo_alpha": 0.3, "slic_delta": 0.05, "dpop_lambda": 5.0}


@pytest.fixture(scope="module")
def places(tokenizer, folder, tmp_path_factory):
    home = tmp_path_factory.mktemp("flags")
    rows = [row | {"chosen_score": 2.0 + i, "rejected_score": 1.0} for i, row in enumerate(make_rows(22))]

    def turn(role, text):
        return [{"role": role, "content": text}]

    files = {"PAIRS": rows, "ROWS": make_rows(14, seed=3), "TIES": rows + [rows[0] | {"chosen": "same", "rejected": "same"}],
             "CHAT": [{"prompt": turn("user", row["prompt"]), **{side: turn("assistant", row[side]) for side in ("chosen", "rejected")}} for row in rows]}
    found = {name: write_jsonl(home / f"{name}.jsonl", content) for name, content in files.items()}
    other = tiny_model("llama", tokenizer)
    other.lm_head.weight.data.mul_(2)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    models.save_model(other, tokenizer, home / "other")
    models.save_model(tiny_model("llama", tokenizer), tokenizer, home / "start")
    tokenizer.chat_template = None
    (home / "template.jinja").write_text(TEMPLATE)
    train.main([f"--model={home / 'start'}", f"--dataset={found['ROWS']}", "--max_length=64", "--max_steps=2", "--lr=0.1", "--loss=sft", "--lora_rank=3",
                f"--output_dir={home / 'adapter'}"], ALONE)
    return found | {"OTHER": home / "other", "ADAPTER": home / "adapter", "TEMPLATE": home / "template.jinja", "ELSEWHERE": home / "elsewhere",
                    "START": home / "start", "seen": {}, "home": home}


def observe(places, flags, monkeypatch):
    """Everything about a run but what it says: its weights, metrics and files, and every forward of its model's blocks."""
    key = json.dumps(flags, sort_keys=True)
    if key in places["seen"]:
        return places["seen"][key]
    here = pathlib.Path(tempfile.mkdtemp(dir=places["home"]))
    monkeypatch.chdir(here)
    common = {"model": "START", "dataset": "PAIRS", "output_dir": "out", "batch_size": 8, "micro_batch_size": 3, "max_length": 64, "lr": 1e-2,
              "eval_share": 0.1, "log_every": 1, "warmup_steps": 0}
    given = {name: places.get(value, value) if isinstance(value, str) else value for name, value in (common | flags).items() if value is not None}
    if "max_steps" in given:
        given.pop("epochs", None)
    shapes, kernels, init = [], set(), dpo.SequenceLogps.__init__

    def watched(self, model):
        init(self, model)
        for block in model.model.layers:
            block.self_attn.o_proj.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
            block.register_forward_hook(lambda *given: kernels.add(torch.are_deterministic_algorithms_enabled()))

    monkeypatch.setattr(dpo.SequenceLogps, "__init__", watched)
    train.main([f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()], ALONE)
    monkeypatch.setattr(dpo.SequenceLogps, "__init__", init)
    out = here / given["output_dir"]
    kept = load_file(out / ("adapter_model.safetensors" if (out / "adapter_config.json").exists() else "model.safetensors"))
    found = {"weights": kept, "files": sorted(str(path.relative_to(here)) for path in here.rglob("*") if "references" not in path.parts), "forwards": shapes, "deterministic": kernels,
             "metrics": [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in read_metrics(out)]}
    places["seen"][key] = found
    return found


def differ(left, right):
    same = left["weights"].keys() == right["weights"].keys() and all(torch.equal(value, right["weights"][name]) for name, value in left["weights"].items())
    return not same or any(left[part] != right[part] for part in ("files", "metrics", "forwards", "deterministic"))


@pytest.mark.parametrize("flag", CHANGES)
def test_a_flag_changes_the_run_or_is_refused(flag, places, monkeypatch):
    base, value = CHANGES[flag]
    if flag in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[flag]):
            observe(places, base | {flag: value}, monkeypatch)
    elif flag == "output_dir":
        observe(places, base | {flag: value}, monkeypatch)
        assert (places["ELSEWHERE"] / "model.safetensors").exists()
    else:
        assert differ(observe(places, base, monkeypatch), observe(places, base | {flag: value}, monkeypatch))


@pytest.mark.parametrize("name", HYPER)
def test_a_hyper_parameter_changes_the_run_of_a_loss_that_reads_it(name, places, monkeypatch):
    default = hyperparameters(find(HYPER[name]))[name]
    base = {"loss": HYPER[name], "max_steps": 3}
    value = VALUES.get(name, (default or 1.0) * 1.5)
    assert differ(observe(places, base, monkeypatch), observe(places, base | {name: value}, monkeypatch))


def test_every_flag_of_every_loss_is_walked_here():
    known = {name for loss in LOSSES.values() for name in vars(build_parser(loss).parse_args([]))}
    assert known == set(CHANGES) | set(HYPER)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_flag_of_another_loss_is_refused(loss):
    for name in HYPER.keys() - hyperparameters(find(loss)).keys():
        with pytest.raises(ValueError, match=f"--{name} is not read by --loss {loss}; it is read by"):
            train.parse_args(["--loss", loss, f"--{name}", "0.3"])


def test_a_run_that_is_repeated_is_the_same(places, monkeypatch):
    """Else every comparison above would find a difference."""
    first = observe(places, {}, monkeypatch)
    places["seen"].clear()
    again = observe(places, {"output_dir": "out", "seed": 0}, monkeypatch)
    assert not differ(first | {"files": []}, again | {"files": []})
