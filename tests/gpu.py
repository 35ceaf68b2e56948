"""Check correctness and measure speed on a GPU, in about five minutes.

    python tests/gpu.py               # prints one block of markdown for BENCHMARKS.md
    python tests/gpu.py --dry_run     # every part of this script on a CPU, with a tiny model

Models and rows are random and made here, so nothing is downloaded. A section that fails prints
FAILED and its error, the others go on, and the exit status is 1. Without a GPU it is 2.
"""
import argparse
import contextlib
import datetime
import importlib.util
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

DRY = "--dry_run" in sys.argv
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
if DRY:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import batches
import data
import packing
import train
import verify
from dpo import concatenated_forward
from logps import FastLogps
from model import save_model
from parallel import Ranks

DEVICE = torch.device("cpu") if DRY else torch.device("cuda", 0)
WORDS = 4000  # of the tokenizer, each of which is one token


class Size(NamedTuple):
    """How large everything is."""
    model: dict  # of the table of speed
    heads: tuple  # (query heads, key heads, size of a head, sliding window) of the attention tried
    lengths: dict  # name: tokens of prompt and answer, and the spread of their logarithms
    batch: int
    steps: int
    max_length: int


# The shape of Qwen2-0.5B without its biases. The lengths of HH-RLHF's dialogues are wide spread.
REAL = Size(
    model={"vocab_size": 151_936, "hidden_size": 896, "num_hidden_layers": 24,
           "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 4864},
    heads=((9, 3, 64, None), (8, 8, 64, None), (9, 3, 64, 48), (8, 8, 128, None)),
    lengths={"HH": (110, 55, 0.7), "1:4": (64, 256, 0.1), "4:1": (512, 128, 0.1)},
    batch=8, steps=8, max_length=1024)
TINY = Size(
    model={"vocab_size": WORDS + 2, "hidden_size": 32, "num_hidden_layers": 2,
           "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64},
    heads=((9, 3, 8, None), (8, 8, 8, None), (9, 3, 8, 12), (8, 8, 16, None)),
    lengths={"1:4": (4, 16, 0.1)},
    batch=2, steps=3, max_length=64)
SIZE = TINY if DRY else REAL

# Ways to train that the second section takes two steps of.
KINDS = {
    "full": "", "full, padded": "--attention padded", "full, float32": "--dtype float32",
    "recomputed": "--gradient_checkpointing", "LoRA": "--lora_rank 8",
    "DoRA": "--lora_rank 8 --dora", "NF4 + LoRA": "--lora_rank 8 --quantize nf4",
    "--ref cache": "--ref cache", "TR-DPO": "--sync_ref_every 1", "--wpo": "--wpo",
    "--ld_alpha 0.5": "--ld_alpha 0.5", "sft": "--loss sft", "aot": "--loss aot",
    "bco_pair": "--loss bco_pair", "kto_pair": "--loss kto_pair", "orpo": "--loss orpo",
    "simpo": "--loss simpo",
}


# --- What to train on -----------------------------------------------------------------------------

def make_tokenizer():
    """One token a word, so that a text has as many tokens as words."""
    names = ["<eos>", "<pad>", *(f"w{i}" for i in range(WORDS))]
    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def make_rows(count: int, prompt: int, answer: int, spread: float) -> list[dict]:
    """Pairs of random words, whose lengths are log-normal around these medians."""
    random = np.random.default_rng(0)

    def text(median):
        length = int(np.clip(median * np.exp(spread * random.standard_normal()), 2, 4 * median))
        return " ".join(f"w{i}" for i in random.integers(WORDS, size=length))

    rows = []
    for _ in range(count):
        row = {"prompt": text(prompt), "chosen": " " + text(answer), "rejected": " " + text(answer)}
        rows.append(row)
    return rows


def write_rows(path: pathlib.Path, rows: list[dict]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_model(folder: pathlib.Path, sizes: dict) -> pathlib.Path:
    """A random Llama with a tied head, in bfloat16 files, which are written and read faster.

    For a Qwen2, transformers would load a tokenizer of its own kind instead of the one made here.
    """
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, tie_word_embeddings=True, max_position_embeddings=4096,
                         eos_token_id=0, pad_token_id=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save_model(model, make_tokenizer(), folder)
    return folder


def small_case(home: pathlib.Path):
    """-> a model of two layers, and rows for it."""
    model, rows = home / "small", home / "small.jsonl"
    if not rows.exists():
        make_model(model, SIZE.model | {"num_hidden_layers": 2, "vocab_size": WORDS + 2})
        write_rows(rows, make_rows(24, 12, 8, 0.5))
    return model, rows


# --- Correctness of attention ---------------------------------------------------------------------

def check_attention(home: pathlib.Path) -> list[str]:
    """Packed rows in bfloat16 against padded rows in float32, and padded ones in bfloat16 too.

    bfloat16 alone rounds log-probs and gradients. Packed rows may be twice as far from float32 as
    padded rows in bfloat16 are, and a thousandth more.
    """
    torch.set_float32_matmul_precision("highest")  # no TF32 in what is compared with
    columns = ["heads", "size", "window", "log-probs: packed", "padded", "gradient: packed",
               "padded", "can_pack"]
    lines = table(columns)
    wrong = []
    for heads, key_heads, size, window in SIZE.heads:
        packed, padded, verdict = try_heads(heads, key_heads, size, window)
        cells = [f"{heads}:{key_heads}", size, window or "none", f"{packed[0]:.1e}",
                 f"{padded[0]:.1e}", f"{packed[1]:.1e}", f"{padded[1]:.1e}", verdict or "passes"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
        far = any(ours > 2 * theirs + 1e-3 for ours, theirs in zip(packed, padded))
        if far or verdict:
            wrong.append(lines[-1])
    torch.set_float32_matmul_precision("high")
    if wrong:
        raise ArithmeticError("beyond bfloat16's rounding, or refused: " + " ".join(wrong))
    text = ("Relative distance from padded rows in float32; tolerance: twice that of padded rows "
            "in bfloat16, plus 1e-3.")
    return [text, "", *lines]


def try_heads(heads, key_heads, size, window):
    """-> relative errors of log-probs and gradient, of packed and of padded bfloat16 rows, and
    what can_pack says."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=WORDS + 2, hidden_size=heads * size, intermediate_size=2 * heads * size,
        num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=key_heads,
        head_dim=size, sliding_window=window, initializer_range=0.05, max_position_embeddings=4096)
    module = FastLogps(AutoModelForCausalLM.from_config(config)).to(DEVICE)
    random = np.random.default_rng(0)
    lists = []
    for counts in ((90, 3, 40), (70, 20, 1), (10, 60, 33)):  # of prompts, chosen, rejected
        lists.append([random.integers(2, WORDS, size=count).tolist() for count in counts])
    prompts, *answers = lists
    pairs = [list(pair) for pair in zip(*answers)]
    rows = {"id": ["a", "b", "c"], "prompt_ids": prompts, "answer_ids": pairs}

    exact = logps_and_gradient(module, data.pad_rows(rows, 1), torch.float32)
    padded = logps_and_gradient(module, data.pad_rows(rows, 1), torch.bfloat16)
    packed_batch = data.known_of_answers(rows) | {"inputs": packing.pack_rows(rows)}
    packed = logps_and_gradient(module, packed_batch, torch.bfloat16)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        verdict = verify.can_pack(module)
    return relative_errors(packed, exact), relative_errors(padded, exact), verdict


def logps_and_gradient(module, batch, dtype):
    """-> log-probs of all answers, and the gradient of their sum by all weights, as one vector."""
    batch = batches.batch_to_device(batch, DEVICE)
    module.zero_grad()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = concatenated_forward(module, batch)
    logps = out["logps"].T.flatten()
    logps.sum().backward()
    gradients = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return logps.detach().double(), torch.cat(gradients).double()


def relative_errors(found, exact) -> list[float]:
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, exact)]


# --- One training step of each kind ---------------------------------------------------------------

def try_kinds(home: pathlib.Path) -> list[str]:
    """Two steps of every way to train: finite loss, and the check before the first step passes."""
    model, rows = small_case(home)
    lines = table(["way", "loss", "gradient norm", "attention", "s"])
    wrong = []
    for name, flags in KINDS.items():
        try:
            lines.append(try_kind(home, name, flags, model, rows))
        except Exception as error:
            wrong.append(f"{name}: {last_line(error)}")
            lines.append(f"| {name} | FAILED: {last_line(error)} | | | |")
    if wrong:
        raise Failed(lines, f"{len(wrong)} of {len(KINDS)} ways to train failed")
    return lines


def try_kind(home, name, flags, model, rows) -> str:
    """-> a line of the table, from a run of train.main."""
    folder = home / f"run {name}"
    given = training_flags(model, rows, folder)
    start = time.perf_counter()
    printed = io.StringIO()
    with contextlib.chdir(home), contextlib.redirect_stdout(printed):
        # of a flag that is given twice the last one counts
        train.main([*given, *flags.split()], Ranks(0, 1, DEVICE))
    seconds = time.perf_counter() - start
    printed = printed.getvalue()
    last = read_metrics(folder)[-1]
    if not (math.isfinite(last["loss"]) and math.isfinite(last["grad_norm"])):
        raise ArithmeticError(f"loss {last['loss']}, gradient norm {last['grad_norm']}")
    if flags.split("--loss ")[-1] not in ("sft", "orpo", "simpo") and "step-0" not in printed:
        raise AssertionError("no step-0 check")
    attention = "packed" if "attention: packed" in printed else "padded"
    numbers = f"{last['loss']:.4f} | {last['grad_norm']:.3g}"
    return f"| {name} | {numbers} | {attention} | {seconds:.1f} |"


def training_flags(model, rows, folder) -> list[str]:
    flags = {"model": model, "dataset": rows, "output_dir": folder, "batch_size": 8,
             "micro_batch_size": 4, "max_steps": 2, "eval_share": 0.1, "log_every": 1, "lr": 1e-5,
             "dtype": "bfloat16", "attention": "packed"}
    return [f"--{name}={value}" for name, value in flags.items()]


def read_metrics(folder) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"]


# --- FSDP -----------------------------------------------------------------------------------------

def try_fsdp(home: pathlib.Path) -> list[str]:
    """Two steps on two GPUs, against the losses of the same steps on one."""
    if not DRY and torch.cuda.device_count() < 2:
        return ["One GPU here: not run."]
    model, rows = small_case(home)
    folders = {"one": home / "fsdp one", "two": home / "fsdp two"}
    with contextlib.redirect_stdout(sys.stderr):
        train.main(training_flags(model, rows, folders["one"]), Ranks(0, 1, DEVICE))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [*training_flags(model, rows, folders["two"]), "--parallel=fsdp"]
    call([sys.executable, *launcher, str(ROOT / "train.py"), *flags])
    losses = {}
    for name, folder in folders.items():
        losses[name] = [row["loss"] for row in read_metrics(folder)]
    distance = max(abs(a - b) for a, b in zip(losses["one"], losses["two"]))
    if distance > 1e-2:
        raise ArithmeticError(f"losses {losses['two']} on two, {losses['one']} on one")
    return [f"Two processes: losses within {distance:.1e} of those of one, over two steps."]


# --- Speed ----------------------------------------------------------------------------------------

def measure_speed(home: pathlib.Path) -> list[str]:
    """bench.py with packed and with padded rows, and TRL where it is installed."""
    model = make_model(home / "model", SIZE.model)
    lines = table(["lengths", "trainer", "tokens/s", "step, s", "peak memory, MiB",
                   "share of bf16 peak"])
    peak = 0.0
    for name, (prompt, answer, spread) in SIZE.lengths.items():
        rows = make_rows(SIZE.batch * SIZE.steps, prompt, answer, spread)
        path = write_rows(home / f"{name.replace(':', '_')}.jsonl", rows)
        runs = run_trainers(model, path)
        ours = runs["packed rows"]
        peak = max(peak, ours["matmul_tflops"])
        for trainer, run in runs.items():
            # all trainers do the same work, so the FLOPs that it needs at least are ours
            share = ours["floor_tflop"] / run["step_s_median"] / ours["matmul_tflops"]
            memory = run["peak_gpu_mb"] or run["peak_rss_mb"]
            lines.append(f"| {name} | {trainer} | {run['unique_tokens_per_s']:.0f} "
                         f"| {run['step_s_median']:.3f} | {memory:.0f} | {share:.0%} |")
    shape = (f"{SIZE.model['num_hidden_layers']} layers of {SIZE.model['hidden_size']}, vocabulary "
             f"{SIZE.model['vocab_size']:,}")
    text = (f"Full fine-tuning of a random Llama ({shape}, tied head), bfloat16 autocast, "
            f"{SIZE.batch} pairs a step, reference in each step. A prompt's tokens count once. "
            f"Measured bf16 matrix products: {peak:.3g} TFLOP/s.")
    if importlib.util.find_spec("trl") is None:
        text += " TRL is not installed."
    return [text, "", *lines]


def run_trainers(model, path) -> dict:
    """{trainer: the JSON line that its benchmark prints}"""
    shared = [f"--model={model}", f"--data={path}", "--bf16", "--no_shuffle"]
    numbers = {"batch_size": SIZE.batch, "steps": SIZE.steps, "warmup": SIZE.steps // 3,
               "max_length": SIZE.max_length, "lora_r": 0, "threads": torch.get_num_threads()}
    shared += [f"--{name}={value}" for name, value in numbers.items()]
    bench, bench_trl = str(ROOT / "bench.py"), str(ROOT / "tests" / "bench_trl.py")
    runs = {}
    for attention in ("packed", "padded"):
        command = [sys.executable, bench, *shared, f"--attention={attention}"]
        runs[f"{attention} rows"] = json.loads(call(command).splitlines()[-1])
    if importlib.util.find_spec("trl") is not None:
        printed = call([sys.executable, bench_trl, *shared])
        runs["TRL"] = json.loads(printed.splitlines()[-1])
    return runs


# --- The block ------------------------------------------------------------------------------------

class Failed(Exception):
    """A section that fails and still has lines to show."""

    def __init__(self, lines, reason):
        super().__init__(reason)
        self.lines = lines


SECTIONS = {
    "Attention of packed rows": check_attention,
    "Two steps of every kind": try_kinds,
    "FSDP": try_fsdp,
    "Speed": measure_speed,
}


def call(command: list[str]) -> str:
    """Run a command -> what it prints. The end of its error output becomes an error."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        # torchrun prints a summary of its own after the error of the process that failed
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or [done.stderr]
        script = next(name for name in command if name.endswith(".py"))
        raise RuntimeError(f"{script} ended with status {done.returncode}: {lines[0]}")
    return done.stdout


def table(columns: list[str]) -> list[str]:
    """The first two lines of a table."""
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def heading() -> list[str]:
    if DRY:
        card = "CPU (a dry run: the numbers mean nothing)"
    else:
        memory = torch.cuda.get_device_properties(0).total_memory
        card = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
        card += f", {memory / 2**30:.0f} GiB"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return [f"## {card}", "", f"`python tests/gpu.py`, {datetime.date.today()}, {versions}"]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="on a CPU, with a tiny model")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    args = parser.parse_args(argv)
    if not DRY and not torch.cuda.is_available():
        print("tests/gpu.py: there is no GPU here; --dry_run tries the script on a CPU")
        return 2

    failed = False
    print("\n".join(heading()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for title in args.sections:
            start = time.perf_counter()
            try:
                lines = SECTIONS[title](pathlib.Path(folder))
            except Exception as error:
                failed = True
                lines = [*getattr(error, "lines", []), "", f"FAILED: {last_line(error)}"]
            seconds = time.perf_counter() - start
            if not DRY:
                torch.cuda.empty_cache()  # for the processes that the next section starts
            print(f"\n### {title}\n\n" + "\n".join(lines) + f"\n\n({seconds:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
