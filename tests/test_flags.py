"""No flag is accepted and ignored: each changes the results, files or forwards of a run, or it is
refused."""
import argparse
import importlib.util
import json
import pathlib
import re
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

import bench
import data
import dpo
import flags
import model as models
import registry
import train
import world
from errors import Parser, UserError, any_name
from flags import build_parser
from losses import LOSSES, find, hyperparameters, kind_of
from ranges import real_number, whole_number

TEMPLATE = (
    "{{ word }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
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
    "eval_only": ({}, True),
    "dry_run": ({}, True),
    "adapter": ({}, "ADAPTER"),
    "lora_rank": ({}, 2),
    "lora_alpha": (LORA, 1),
    "lora_target": (LORA, "q_proj"),
    "lora_dropout": (LORA, 0.5),
    "rslora": (LORA, True),
    "dora": (LORA, True),
    "quantize": (LORA, "nf4"),
    "train_vision": ({}, True),
    "gradient_checkpointing": ({}, True),
    "router_aux_loss_coef": ({}, 0.1),
    "ref": ({}, "cache"),
    "ref_model": ({}, "OTHER"),
    "ref_batch_size": ({"ref": "cache"}, 1),
    "sync_ref_every": ({}, 1),
    "sync_ref_alpha": ({"sync_ref_every": 1}, 0.1),
    "batch_size": ({}, 4),
    "micro_batch_size": ({}, 1),
    "attention": ({}, "packed"),
    "deterministic": ({}, True),
    "attn_implementation": ({}, "eager"),
    "revision": ({}, "v2"),
    "compile": ({}, True),
    "tokens_per_micro_batch": ({"micro_batch_size": None}, 30),
    "epochs": ({}, 2),
    "max_steps": ({}, 1),
    "lr": ({}, 1e-3),
    "lr_schedule": ({}, "cosine"),
    "min_lr": ({}, 5e-3),
    "warmup_steps": ({}, 2),
    "optimizer": ({}, "rmsprop"),
    "weight_decay": ({}, 0.5),
    "adam_beta1": ({}, 0.5),
    "adam_beta2": ({}, 0.9),
    "adam_eps": ({}, 1e-2),
    "max_grad_norm": ({}, 1e-3),
    "max_length": ({}, 8),
    "max_prompt_length": ({}, 2),
    "max_completion_length": ({}, 2),
    "truncation_mode": ({"max_prompt_length": 2}, "keep_start"),
    "overlong": ({"max_length": 16}, "drop"),
    "columns": ({}, "chosen=rejected,rejected=chosen"),
    "ignore_columns": ({}, "sources"),
    "chat_template": ({"dataset": "CHAT"}, "TEMPLATE"),
    "layout": ({}, "kto"),
    "pairs": ({"dataset": "RANKED", "loss": "sigmoid", "pairs": "best_worst"}, "all"),
    "unpair": ({"loss": "kto"}, True),
    "template_kwargs": ({"dataset": "CHAT"}, '{"word": "hm"}'),
    "strict": ({"dataset": "TIES"}, True),
    "shuffle": ({}, "false"),
    "seed": ({}, 1),
    "parallel": ({}, "fsdp"),
    "dtype": ({}, "float64"),
    "log_every": ({}, 2),
    "eval_every": ({}, 1),
    "keep_best": ({"eval_every": 1, "lr": 3.0}, "eval/loss"),
    "early_stop": ({"eval_every": 1, "lr": 3.0, "keep_best": "eval/loss", "epochs": 3}, 1),
    "save_every": ({}, 1),
    "save_last": ({}, True),
    "keep_checkpoints": ({"save_every": 1}, 1),
    "sample_every": ({}, 0),
    "sample_prompts": ({"sample_every": 0, "sample_tokens": 2}, 1),
    "sample_tokens": ({"sample_every": 0, "sample_prompts": 1}, 2),
    "report_to": ({}, "tensorboard"),
    "push_to_hub": ({}, "me/mine"),
    "reference_free": ({}, True),
    "f_divergence": ({}, "js"),
    "f_alpha": ({"f_divergence": "alpha"}, 0.9),
    "wpo": ({}, True),
    "wpo_clamp": ({"wpo": True, "adapter": "ADAPTER"}, True),
    "ld_alpha": ({}, 0.5),
}
REFUSED = {
    "resume": "--output_dir out does not exist",
    "eval_only": "--batch_size: is not read with --eval_only; leave it out",
    "parallel": "one process alone has nothing to share",
    "revision": "is not a model of the Hub and has no revisions",
    "layout": "--layout kto needs the fields prompt, completion, label",
    "strict": "chosen equals rejected",
    "ignore_columns": "no row has an unread column",
    "router_aux_loss_coef": "is a dense model",
    "push_to_hub": "there is no network, or HF_HUB_OFFLINE is set",
    "train_vision": "sees no images",
}
if importlib.util.find_spec("tensorboard") is None:
    REFUSED["report_to"] = "pip install tensorboard"
# Without these flags, the run is refused.
NEEDED = {"unpair": "row 1: has several answers of one prompt, and the loss reads answers with a"}


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
    "slic_delta": 0.05, "dpop_lambda": 5.0, "shift_lambda": 0.5, "repo_gamma": 0.01,
}


@pytest.fixture(scope="module")
def paths(tokenizer, tmp_path_factory):
    """{name in capitals: model, adapter, file of rows or template}"""
    home = tmp_path_factory.mktemp("flags")

    def turn(role, text):
        return [{"role": role, "content": text}]

    # Files of rows.
    rows, conversations, ranked = [], [], []
    for i, row in enumerate(make_rows(22)):
        rows.append(row | {"chosen_score": 2.0 + i, "rejected_score": 1.0})
        conversation = {"prompt": turn("user", row["prompt"])}
        for side in ("chosen", "rejected"):
            conversation[side] = turn("assistant", row[side])
        conversations.append(conversation)
        answers = [row["chosen"], row["rejected"], " worst"]
        ranked.append({"prompt": row["prompt"], "responses": answers})
    files = {
        "PAIRS": rows,
        "ROWS": make_rows(14, seed=3),
        "TIES": rows + [rows[0] | {"chosen": "same", "rejected": "same"}],
        "CHAT": conversations,
        "RANKED": ranked,
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
    tokenizer.chat_template = "{{ word }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
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


# To compile takes a minute; test_model.py compiles less.
SLOW = {"compile": pytest.mark.slow}


@pytest.mark.parametrize("flag", [pytest.param(flag, marks=SLOW.get(flag, ())) for flag in CHANGES])
def test_a_flag_changes_the_run_or_is_refused(flag, paths, observe):
    base, value = CHANGES[flag]
    changed = base | {flag: value}
    if flag in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[flag]):
            observe(changed)
    elif flag in NEEDED:
        with pytest.raises(ValueError, match=NEEDED[flag]):
            observe(base)
        observe(changed)
    elif flag == "output_dir":
        observe(changed)
        assert (paths["ELSEWHERE"] / "model.safetensors").exists()
    else:
        assert differ(observe(base), observe(changed))


def test_pairs_chooses_the_answers_that_unpair_gives_a_label(observe):
    """Of three ranked answers, best_worst labels the first and the last."""
    base = {"loss": "kto", "dataset": "RANKED", "unpair": True}
    with pytest.raises(UserError, match="row 1: has 3 answers, .*; pass --pairs best_worst"):
        observe(base)
    observe(base | {"pairs": "best_worst"})
    message = "row 1: its answer 2 is the better one of one pair and the"
    with pytest.raises(UserError, match=message):
        observe(base | {"pairs": "all"})


@pytest.mark.parametrize("name", HYPER)
def test_a_hyper_parameter_changes_the_run_of_a_loss_that_reads_it(name, observe):
    default = hyperparameters(find(HYPER[name]))[name]
    value = VALUES.get(name, (default or 1.0) * 1.5)
    base = {"loss": HYPER[name], "max_steps": 3}
    if kind_of(find(HYPER[name])) == "labels":
        base["unpair"] = True
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


# --- Forgotten flags ------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, message", [
    ("--model org/name", "--model org/name: give --dataset too, the pairs to train on"),
    ("--model START --loss ipo --lora_rank 4 --output_dir x", "START: give --dataset too"),
    ("--model START --eval_dataset ROWS", "START: give --dataset too"),
    ("--model START --loss sft --max_steps 3", "START: give --dataset too"),
    ("--adapter ADAPTER", "--adapter ADAPTER: give --dataset too"),
    ("--adapter ADAPTER --model START", "--model START: give --dataset too"),
    ("--dataset ROWS", "--dataset ROWS: give --model too, the model to train"),
    ("--dataset ROWS --model world", "--dataset ROWS: give --model too"),
    ("--dataset ROWS --lora_rank 4 --eval_dataset PAIRS", "--dataset ROWS: give --model too"),
    ("--eval_dataset ROWS", "--eval_dataset ROWS: give --model and --dataset too"),
    ("--eval_dataset ROWS --dataset world", "--eval_dataset ROWS: give --model and --dataset too"),
    ("--ref_model OTHER", "--ref_model OTHER: give --model and --dataset too"),
    ("--ref_model OTHER --dataset world", "--ref_model OTHER: give --model and --dataset too"),
    ("--ref_model OTHER --ref cache --lora_rank 2", "--ref_model OTHER: give --model and"),
])
def test_a_real_model_or_data_set_without_the_other_is_refused_and_no_toy_data_takes_its_place(
        paths, flags, message):
    for name, path in paths.items():
        flags, message = (re.sub(rf"\b{name}\b", str(path), text) for text in (flags, message))
    with pytest.raises(UserError) as error:
        train.parse_args(flags.split())
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("flags, model", [
    ("", "world"),
    ("--model world --dataset world", "world"),
    ("--model world --ref_model START", "world"),
    ("--model START --dataset world --ref_model OTHER", "START"),
    ("--model START --dataset world", "START"),
    ("--model START --dataset world --eval_dataset ROWS", "START"),
    ("--adapter ADAPTER --dataset ROWS", "START"),
    ("--adapter ADAPTER --dataset world", "START"),
    ("--adapter ADAPTER --dataset ROWS --model OTHER", "OTHER"),
    ("--adapter ADAPTER --model world", "world"),
])
def test_the_world_is_trained_on_if_it_is_named_or_nothing_else_is(paths, flags, model):
    arguments = [str(paths.get(part, part)) for part in flags.split()]
    assert train.parse_args(arguments)[0].model == str(paths.get(model, model))


def test_an_adapter_of_the_world_continues_in_the_world_without_other_flags(paths, tmp_path):
    for path in paths["ADAPTER"].iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(world.folder() / "reference")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    args, _, _ = train.parse_args(["--adapter", str(tmp_path)])
    assert args.dataset == "world" and args.model == str(world.folder() / "reference")

    del config["base_model_name_or_path"]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="names no base model; give --model"):
        train.parse_args(["--adapter", str(tmp_path), "--dataset", "rows.jsonl"])


# --- Values of every flag of every script ---------------------------------------------------------

class Parsed(Exception):
    """Raised in place of parsing: its argument is the parser."""


def parsers_of(main, monkeypatch):
    """The parser of a script, and those of its commands."""
    def stop(parser, *arguments):
        raise Parsed(parser)

    with monkeypatch.context() as patch, pytest.raises(Parsed) as caught:
        patch.setattr(Parser, "parse_args", stop)
        main([])
    parser, = caught.value.args
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action.choices, dict) and action.nargs == "A...":
            parsers += action.choices.values()
    return parsers


@pytest.fixture(params=["train", "data", "dpo", "bench", "model", "losses"])
def script_flags(request, monkeypatch):
    """(parser, flag, its type) of every flag of a script with a value; None is the type of text."""
    mains = {"data": data.main, "dpo": dpo.main, "bench": bench.main, "model": models.main,
             "losses": registry.print_table}
    if request.param == "train":
        parsers = [build_parser(loss) for loss in LOSSES.values()]
    else:
        parsers = parsers_of(mains[request.param], monkeypatch)
    found = {}
    for parser in parsers:
        for action in parser._actions:
            flag = (action.option_strings or [None])[0]
            if flag and action.nargs is None and not action.choices:
                found[parser.prog, flag] = parser, flag, action.type
    assert found
    return list(found.values())


@pytest.mark.parametrize("value", [
    "", " ", "x", "nan", "inf", "-inf", "1e400", "1_000", " 5 ", "\u0663", "9" * 5000, "1e",
    "0x10", "true", "5\n",
])
def test_every_number_of_every_script_refuses_what_is_no_number_and_names_flag_and_range(
        script_flags, value):
    for parser, flag, kind in script_flags:
        if kind in (None, any_name, flags.true_or_false):
            continue
        with pytest.raises(UserError) as error:
            parser.parse_args([f"{flag}={value}"])
        message = str(error.value)
        assert message.startswith(f"argument {flag}: must be a") and len(message) < 200
        assert re.search(r"(> |>= |in \[|in \(|!= |finite)", message), message
        assert len(message.splitlines()) == 1 or value in message


@pytest.mark.parametrize("value", ["-5", "-0.5", "-1e-5", "99999999999999999999", "-inf", "1.5"])
def test_a_number_out_of_range_is_refused_or_in_the_range_of_its_flag(script_flags, value):
    """Also as a word of its own, which argparse would take for the name of a flag."""
    for parser, flag, kind in script_flags:
        if kind in (None, any_name, flags.true_or_false):
            continue
        try:
            number = kind(value)
        except argparse.ArgumentTypeError as error:
            with pytest.raises(UserError, match=re.escape(f"argument {flag}: {error}")):
                parser.parse_args([flag, value])
        else:
            assert isinstance(number, float) and number == float(value)


@pytest.mark.parametrize("value, message", [
    ("", "its value is empty"), ("  ", "its value is empty"), ("\n", "its value is empty"),
    (",", "its value is empty"), (", ,", "its value is empty"),
])
def test_every_text_of_every_script_refuses_an_empty_value(script_flags, value, message):
    for parser, flag, kind in script_flags:
        if kind in (None, any_name):
            with pytest.raises(UserError, match=f"argument {flag}: {message}"):
                parser.parse_args([f"{flag}={value}"])


def test_a_name_that_is_not_utf_8_is_refused_except_for_files_of_data_and_flags(script_flags):
    for parser, flag, kind in script_flags:
        if kind is None:
            with pytest.raises(UserError, match=f"{flag}: n\udcff: is not UTF-8; rename it"):
                parser.parse_args([f"{flag}=n\udcff"])
        elif kind is any_name:
            assert "data" in flag or flag == "--config"
            assert kind("n\udcff.jsonl") == "n\udcff.jsonl"


@pytest.mark.parametrize("spec", ["sigmoid,", ",sigmoid", "sigmoid,,sft", ":0.5"])
def test_a_missing_name_in_a_sum_of_losses_is_refused(spec):
    with pytest.raises(UserError, match=f"--loss {spec}: a name is missing"):
        train.parse_args(["--loss", spec])


@pytest.mark.parametrize("flag", ["--seed", "--model", "--lr", "--dataset", "--columns"])
def test_two_dashes_are_no_value(flag):
    with pytest.raises(UserError, match=f"argument {flag}: expected one argument"):
        train.parse_args(["--model=m", "--dataset=d", f"{flag}=--"])


def test_an_empty_value_is_refused_before_the_flags_of_a_loss_are_known():
    for name in ("loss", "model", "dataset", "output_dir", "adapter", "columns"):
        with pytest.raises(UserError, match=f"--{name}: its value is empty"):
            train.parse_args([f"--{name}", ""])


@pytest.mark.parametrize("text, value", [
    ("5", 5), ("+5", 5), ("007", 7), (str(2**63 - 1), 2**63 - 1),
])
def test_whole_numbers_are_read(text, value):
    assert whole_number(">= 1")(text) == value


@pytest.mark.parametrize("text, value", [
    ("0.5", 0.5), (".5", 0.5), ("5.", 5.0), ("5e-7", 5e-7), ("1E+3", 1000.0), ("+1", 1.0),
])
def test_real_numbers_are_read(text, value):
    assert real_number("> 0")(text) == value


@pytest.mark.parametrize("flag", ["lora_rank", "epochs", "max_steps", "seed", "batch_size",
                                  "micro_batch_size", "tokens_per_micro_batch", "warmup_steps"])
def test_the_largest_whole_number_trains_or_is_one_line(paths, tmp_path, monkeypatch, flag):
    class Stepped(Exception):
        pass

    def step(*arguments):
        raise Stepped

    monkeypatch.setattr(train, "train_step", step)
    given = TINY_RUN | {"model": paths["START"], "dataset": paths["PAIRS"],
                        "output_dir": tmp_path / "out"}
    if flag == "tokens_per_micro_batch":
        del given["micro_batch_size"]
    with pytest.raises((Stepped, RuntimeError)) as caught:
        train.main(to_arguments(given | {flag: 2**63 - 1}), ALONE)
    if caught.type is not Stepped:
        assert "out of memory" in train.explain(caught.value)


@pytest.mark.parametrize("below", ["", "/run", "/deep/run"])
def test_an_output_dir_that_is_a_file_or_below_one_is_refused_before_anything_is_loaded(
        tmp_path, below):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    flags = ["--model", "/nowhere", "--dataset", "/nowhere.jsonl", f"--output_dir={file}{below}"]
    for more in ([], ["--resume"]):
        with pytest.raises(UserError, match=f"{file}.*"):
            train.main([*flags, *more], ALONE)
    with pytest.raises(UserError, match=f"--output_dir {file}{below}: {file} is a file"):
        train.main(flags, ALONE)
    assert file.read_text() == "mine"

    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=f"{link} is a file"):
        train.main([*flags[:4], f"--output_dir={link}{below}"], ALONE)


@pytest.mark.parametrize("loss", ["sft", "slic", "slic,sft"])
def test_beta_is_refused_by_a_loss_without_beta_and_the_message_names_losses_that_read_it(loss):
    message = f"--beta is not read by --loss {loss}; it is read by sigmoid"
    with pytest.raises(UserError, match=message):
        train.parse_args(["--loss", loss, "--model", "m", "--dataset", "d", "--beta", "0.1"])


# --- Help -----------------------------------------------------------------------------------------

def help_of(arguments, capsys):
    """-> {flag: its help on one line}, as `python train.py ARGUMENTS --help` prints it."""
    with pytest.raises(SystemExit) as stop:
        train.parse_args([*arguments, "--help"])
    assert stop.value.code == 0
    parts = re.split(r"\n  --(\w+)", capsys.readouterr().out)
    return {flag: " ".join(text.split()) for flag, text in zip(parts[1::2], parts[2::2])}


@pytest.mark.parametrize("arguments", [[], ["--dataset", "world"], ["--model", "m"]], ids=str)
def test_help_shows_the_defaults_of_real_runs_and_those_in_the_world_as_such(arguments, capsys):
    shown = help_of(arguments, capsys)
    for flag, end in {
        "batch_size": "(default 64; in the world 256)",
        "micro_batch_size": "(default 4; in the world 128)",
        "epochs": "(default 1; in the world 2)",
        "lr_schedule": "(default linear; in the world cosine)",
        "max_length": "(default 1024; in the world 16)",
        "dtype": "(default auto; in the world float32)",
        "beta": "(default 0.1; in the world 1.0)",
    }.items():
        assert end in shown[flag]
    assert "for sft 1e-5" in shown["lr"] and "in the world 0.002)" in shown["lr"]
    assert "world" not in shown["seed"]  # the same everywhere


def test_the_defaults_that_help_shows_are_those_that_a_run_gets(capsys):
    """Of every loss, for each flag with `(default VALUE)` or `(default VALUE; in the world VALUE)`.
    The defaults of these flags are read with another flag only."""
    elsewhere = {"loss", "sync_ref_alpha", "f_alpha", "sample_prompts", "sample_tokens"}
    for loss in LOSSES:
        shown = help_of(["--loss", loss], capsys)
        real = vars(train.parse_args(["--loss", loss, "--model", "m", "--dataset", "d"])[0])
        in_world = vars(train.parse_args(["--loss", loss])[0])
        compared = 0
        for flag, text in shown.items():
            match = re.search(r"\(default ([\w.-]+)(?:; in the world ([\w.-]+))?\)", text)
            if match and flag not in elsewhere:
                assert match[1] == str(real[flag])
                assert (match[2] or match[1]) == str(in_world[flag])
                compared += 1
        assert compared >= 12


def test_help_with_a_loss_shows_the_defaults_of_that_loss(capsys):
    assert "(default 2.0; in the world 4.0)" in help_of(["--loss", "simpo"], capsys)["beta"]
    assert "(default 50.0; in the world 1.0)" in help_of(["--loss", "dpop"], capsys)["dpop_lambda"]
    assert "in the world 0.0005)" in help_of(["--loss", "apo_down"], capsys)["lr"]
