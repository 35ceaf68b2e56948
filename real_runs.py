"""The runs of real_model.py: which runs there are, their rows, and the commands that make them.

Each run of EXPERIMENTS is three commands:

    train.py             trains on the first rows of a file
    sample.py --score    computes the log-probs of the held-out answers, in float32
    sample.py --dataset  answers the first held-out prompts

`run_command` runs a command once and keeps a record of it in --out. `compare_trainers` runs the
same steps by this project and by another trainer.
"""
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import time
from argparse import Namespace
from typing import NamedTuple

import data
from answers import partners
from checkpoint import has_model
from errors import UserError, reading
from files import read_json, write_text
from loading import load_tokenizer
from lora import LoraSettings, add_adapter, save_adapter, target_modules
from losses import find, hyperparameters, kind_of, needs_of, needs_reference
from model import load_model
from plots import read_metrics

ROOT = pathlib.Path(__file__).resolve().parent


# --- The experiments ------------------------------------------------------------------------------

class Rows(NamedTuple):
    """A file of pairs, below --data."""
    file: str
    title: str
    is_chat: bool  # whether prompt and answers become messages, for the chat template
    note: str = ""  # for the page


FILES = {
    "instructions": Rows(
        "instructions_600.jsonl", "Instructions: polite against impolite", True,
        "Prompt and answers, texts in `prompt`, `chosen` and `rejected`, become chat messages. The "
        "chosen answer is the politer wording."),
    "hh": Rows(
        "hh_harmless_512.jsonl", "HH-harmless: the less harmful answer", False,
        "Transcripts of HH, in `chosen` and `rejected`, without the chat template."),
}
LONGEST = 700  # characters of a row, so that a run takes minutes

# Flags of every run. In one epoch, each training row is new when its metrics are computed.
COMMON = {"batch_size": 4, "micro_batch_size": 4, "max_length": 256, "eval_share": 0,
          "log_every": 1, "dtype": "bfloat16"}
# A pair is two labeled answers, so a step with as many pairs has twice as many rows.
LABELS = {"unpair": True, "batch_size": 8, "micro_batch_size": 8}
LORA = {"lora_rank": 16}


class RealRun(NamedTuple):
    """A run of train.py. Flags that are not here are the defaults, --lr and --beta too."""
    name: str  # of its folder
    rows: str  # a key of FILES
    loss: str
    flags: dict = LORA

    def all_flags(self) -> dict:
        labels = LABELS if kind_of(find(self.loss)) == "labels" else {}
        return COMMON | labels | self.flags


TUNED = {"lora_rank": 16, "lr": "5e-4"}
EXPERIMENTS = (
    RealRun("sigmoid", "instructions", "sigmoid", TUNED),
    RealRun("sigmoid-default", "instructions", "sigmoid"),
    RealRun("sft", "instructions", "sft"),
    RealRun("ipo", "instructions", "ipo", TUNED),
    RealRun("simpo", "instructions", "simpo", TUNED),
    RealRun("orpo", "instructions", "orpo", TUNED),
    RealRun("kto", "instructions", "kto", TUNED),
    RealRun("sigmoid-full", "instructions", "sigmoid", {"lr": "2e-5"}),
    RealRun("hh-sigmoid", "hh", "sigmoid", TUNED),
    RealRun("hh-sft", "hh", "sft"),
    RealRun("hh-kto", "hh", "kto", TUNED),
    RealRun("simpo-default", "instructions", "simpo"),
    RealRun("orpo-default", "instructions", "orpo"),
    RealRun("ipo-default", "instructions", "ipo"),
    RealRun("kto-default", "instructions", "kto"),
)
COMPARED = ("sft", "sigmoid", "ipo", "simpo", "orpo", "kto")  # losses, with another trainer
COMPARED_FLAGS = {"batch_size": 2, "micro_batch_size": 2, "max_length": 256, "eval_share": 0,
                  "log_every": 1, "dtype": "float32", "shuffle": "false", "lr": "2e-4",
                  "lr_schedule": "constant", "warmup_steps": 0}
ANSWERED, NEW_TOKENS = 4, 40  # prompts that are answered, and tokens of an answer


# --- Rows -----------------------------------------------------------------------------------------

def read_pairs(path: pathlib.Path) -> list[dict]:
    """Read the pairs of a file that can be split: neither too long, nor with equal answers, nor
    with a prompt that an earlier pair has."""
    with reading(f"--data: {path} cannot be read"):
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    pairs, prompts = [], set()
    for number, row in enumerate(rows, 1):
        chosen, rejected = row.get("chosen"), row.get("rejected")
        if not isinstance(chosen, str) or not isinstance(rejected, str):
            raise UserError(f"--data: {path}, row {number} has no texts chosen and rejected")
        prompt = row.get("prompt") or os.path.commonprefix([chosen, rejected])
        is_long = len(row.get("prompt", "")) + max(len(chosen), len(rejected)) > LONGEST
        if chosen.strip() != rejected.strip() and prompt not in prompts and not is_long:
            pairs.append(row)
        prompts.add(prompt)
    return pairs


def as_chat(row: dict) -> dict:
    """Write a pair as messages."""
    messages = {"prompt": [{"role": "user", "content": row["prompt"].strip()}]}
    for side in ("chosen", "rejected"):
        messages[side] = [{"role": "assistant", "content": row[side]}]
    return messages


def split_rows(args: Namespace, name: str) -> None:
    """Write train.jsonl and held_out.jsonl of a file into its folder of --out."""
    rows = FILES[name]
    path = args.data / rows.file
    pairs = read_pairs(path)
    if len(pairs) < args.train_rows + args.held_out:
        raise UserError(f"--data: {path} has {len(pairs)} pairs that can be used; lower "
                        f"--train_rows {args.train_rows} or --held_out {args.held_out}")
    if rows.is_chat:
        pairs = [as_chat(row) for row in pairs]
    parts = {"train": pairs[:args.train_rows],
             "held_out": pairs[args.train_rows:args.train_rows + args.held_out]}
    (args.out / name).mkdir(exist_ok=True)
    for part, members in parts.items():
        text = "".join(json.dumps(row) + "\n" for row in members)
        path = args.out / name / f"{part}.jsonl"
        # The same file is not written again: its time is a part of the cache of its tokens.
        if not path.is_file() or path.read_text() != text:
            write_text(path, text)


# --- Commands -------------------------------------------------------------------------------------

def script_words(script: str, flags: dict) -> list[str]:
    """Return the words of a command behind "python". A flag that is True has no value."""
    words = [script]
    for name, value in flags.items():
        words.append(f"--{name}")
        if value is not True:
            words.append(str(value))
    return words


def shown_command(args: Namespace, words: list[str]) -> str:
    """Format a command for the page, with M for --model and R for --out."""
    shown = []
    for word in words:
        short = "M" if word == str(args.model) else word.replace(str(args.out), "R", 1)
        shown.append(shlex.quote(short))
    return f"python {' '.join(shown)}"


def run_process(words: list, log: pathlib.Path) -> int:
    """Run a command with its output in a file -> its exit status."""
    with open(log, "w") as file:
        return subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode


def run_command(args: Namespace, name: str, words: list[str], run: pathlib.Path | None = None,
                python: str = sys.executable) -> None:
    """Run a command once, and record its words, its seconds, the date and the machine.

    run         the folder of a run of train.py; if it exists, the run was stopped and is resumed
    """
    record_path, log = args.out / f"{name}.json", args.out / f"{name}.log"
    if record_path.is_file():
        made_by = read_json(record_path)["words"]
        if made_by != words:
            raise UserError(f"--out {args.out}: {name} was made by another command, "
                            f"{shlex.join(made_by)}; give another folder")
        return
    is_resumed = run is not None and run.exists()
    resumed = ["--resume"] if is_resumed else []
    print(f"{name}: {shlex.join(words)}", flush=True)
    began, before = time.time(), child_seconds()
    status = run_process([python, *words, *resumed], log)
    if status:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise UserError(f"{name}: ended with status {status} ({lines[-1]}); {log} has its output")
    record = {"words": words, "seconds": time.time() - began}
    record["cpu_seconds"] = None if is_resumed else child_seconds() - before
    write_text(record_path, json.dumps(record | describe_machine(), indent=2) + "\n")


def child_seconds() -> float:
    """Return the processor time of all commands that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def describe_machine() -> dict:
    """Return the date, the processor, the threads of a command and the versions."""
    processor = platform.processor() or platform.machine()
    path = pathlib.Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(": ")[2]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers")]
    return {"date": datetime.date.today().isoformat(), "processor": processor,
            "cores": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", "all"),
            "versions": ", ".join(versions)}


def train_words(args: Namespace, experiment: RealRun) -> list[str]:
    flags = {"loss": experiment.loss, "model": args.model,
             "dataset": args.out / experiment.rows / "train.jsonl"}
    flags |= experiment.all_flags()
    return script_words("train.py", flags | {"output_dir": args.out / experiment.name})


def score_words(args: Namespace, rows: str, model, out: pathlib.Path) -> list[str]:
    """The command that scores the held-out rows. A model before training needs --max_length."""
    flags = {"model": model, "score": args.out / rows / "held_out.jsonl", "dtype": "float32",
             "no_reference": True, "out": out}
    if model == args.model:
        flags["max_length"] = COMMON["max_length"]
    return script_words("sample.py", flags)


def sample_words(args: Namespace, rows: str, model, out: pathlib.Path) -> list[str]:
    flags = {"model": model, "dataset": args.out / rows / "held_out.jsonl", "count": ANSWERED,
             "max_new_tokens": NEW_TOKENS, "no_reference": True, "out": out}
    return script_words("sample.py", flags)


def run_experiments(args: Namespace) -> None:
    """Run every command that has not ended yet."""
    for rows in FILES:
        before = args.out / rows / "before.jsonl"
        run_command(args, f"{rows}-before-score", score_words(args, rows, args.model, before))
    answers = args.out / "answers-before.jsonl"
    run_command(args, "answers-before", sample_words(args, "instructions", args.model, answers))
    for experiment in EXPERIMENTS:
        name = experiment.name
        folder = args.out / name
        run_command(args, f"{name}-train", train_words(args, experiment), folder)
        scores = args.out / f"{name}-scores.jsonl"
        run_command(args, f"{name}-score", score_words(args, experiment.rows, folder, scores))
        if experiment.rows == "instructions":
            answers = args.out / f"{name}-answers.jsonl"
            words = sample_words(args, experiment.rows, folder, answers)
            run_command(args, f"{name}-answer", words)


# --- Next to another trainer ----------------------------------------------------------------------

def start_adapter(args: Namespace) -> pathlib.Path:
    """Save the adapter that both trainers start from: the one that --lora_rank 16 makes."""
    folder = args.out / "compare" / "adapter"
    if not has_model(folder):
        model = load_model(args.model)
        settings = LoraSettings(LORA["lora_rank"], 2.0 * LORA["lora_rank"])
        add_adapter(model, "policy", target_modules(model, None), settings)
        save_adapter(model, load_tokenizer(args.model), folder, args.model)
    return folder


def compared_words(args: Namespace, loss: str, adapter: pathlib.Path) -> list[str]:
    """The command of this project."""
    flags = {"loss": loss, "model": args.model, "adapter": adapter,
             "dataset": args.out / "instructions" / "train.jsonl"} | COMPARED_FLAGS
    flags["max_steps"] = args.compare_steps
    if needs_reference(find(loss)):
        flags["ref"] = "adapter_off"
    if kind_of(find(loss)) == "labels":
        flags["unpair"] = True
    return script_words("train.py", flags | {"output_dir": args.out / "compare" / f"ours-{loss}"})


def write_job(args: Namespace, loss: str, adapter: pathlib.Path) -> pathlib.Path:
    """Write the job file for the other trainer -> its path."""
    folder = args.out / "compare"
    rows = folder / f"{loss}-rows.jsonl"
    write_text(rows, "".join(compared_rows(args, loss)))
    job = {"loss": loss, "hyper": hyperparameters(find(loss)), "model": args.model,
           "adapter": str(adapter), "rows": str(rows), "steps": args.compare_steps,
           "lr": float(COMPARED_FLAGS["lr"])}
    job |= {name: COMPARED_FLAGS[name] for name in ("batch_size", "max_length")}
    path = folder / f"{loss}-job.json"
    write_text(path, json.dumps(job, indent=2) + "\n")
    return path


def compared_rows(args: Namespace, loss: str) -> list[str]:
    """Return the rows of the compared steps as JSON lines: their texts without EOS, the token ids
    of this project, and for labels the mismatched answers of KTO."""
    tokenizer, function = load_tokenizer(args.model), find(loss)
    labeled = kind_of(function) == "labels"
    rows, _ = data.load_tokens(
        str(args.out / "instructions" / "train.jsonl"), tokenizer, needs_of(function),
        data.Limits(COMPARED_FLAGS["max_length"]), data.ANY_LAYOUT._replace(unpair=labeled))
    mismatched = partners(rows) if labeled else None
    lines = []
    for i in range(COMPARED_FLAGS["batch_size"] * args.compare_steps):
        row = rows[i]
        line = {"prompt_ids": row["prompt_ids"], "answer_ids": row["answer_ids"]}
        line["prompt"] = tokenizer.decode(row["prompt_ids"])
        line["answers"] = [tokenizer.decode(ids[:-1]) for ids in row["answer_ids"]]
        if labeled:
            line["desirable"] = row["desirable"]
            line["mismatched_ids"] = rows[int(mismatched[i])]["answer_ids"][0]
        lines.append(json.dumps(line) + "\n")
    return lines


# Metrics that TRL defines in another way: averages per token, or sums where we log averages.
OTHER_UNITS = {"simpo": "logps", "orpo": "logps", "ipo": "rewards"}
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen",
           "logps/rejected", "kl", "grad_norm")


def largest_differences(loss: str, ours: list[dict], theirs: list[dict]) -> dict:
    """Return {metric: largest difference over the steps} of the metrics that both log."""
    found = {}
    for our_row, their_row in zip(ours, theirs, strict=True):
        for metric in METRICS:
            if metric not in our_row or metric not in their_row:
                continue
            if metric.partition("/")[0] == OTHER_UNITS.get(loss):
                continue
            value = our_row[metric]
            if metric == "kl":
                value = max(value, 0.0)  # the loss uses 0 if it is negative, and TRL logs this
            difference = abs(value - their_row[metric])
            found[metric] = max(found.get(metric, 0.0), difference)
    return found


def compare_trainers(args: Namespace) -> None:
    """Train each loss of COMPARED by both trainers, unless that was done before."""
    adapter = start_adapter(args)
    for loss in COMPARED:
        run_command(args, f"compare/{loss}-ours", compared_words(args, loss, adapter),
                    args.out / "compare" / f"ours-{loss}")
        job = write_job(args, loss, adapter)
        python, *script = shlex.split(args.compare)
        run_command(args, f"compare/{loss}-theirs", [*script, str(job)], python=python)


def their_lines(args: Namespace, loss: str) -> list[dict]:
    """Read the steps of the other trainer from its output."""
    text = (args.out / "compare" / f"{loss}-theirs.log").read_text()
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"')]


def read_comparison(args: Namespace) -> dict[str, dict]:
    """Return {loss: largest differences} of the losses that both trainers have finished."""
    compared = {}
    for loss in COMPARED:
        if (args.out / "compare" / f"{loss}-theirs.json").is_file():
            ours = read_metrics(args.out / "compare" / f"ours-{loss}")
            compared[loss] = largest_differences(loss, ours, their_lines(args, loss))
    return compared
