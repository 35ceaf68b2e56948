"""Time the training step of train.py: how fast, in how much memory, and at which share of what the machine can do.

    python bench.py --model M --data pairs.jsonl --batch_size 8 --no_shuffle --threads 1         # prints one JSON line
    python bench.py --compare "python tests/bench_trl.py" --model M ... --no_shuffle             # and its ratio to another trainer

It is train.main that runs, and the clock is read at the end of each optimizer step: between two is all that a user waits for, rows and
metrics too. `unique_tokens_per_s` counts each prompt once, `nonpad_tokens_per_s` before each answer.

Peak memory above the state (weights, reference, AdamW's moments) is of activations, logits and gradients. On a CPU peak_rss_mb −
rss_before_train_mb − optimizer_mb: the most the process ever had, at the end and when models and rows were there but no batch yet; on a GPU
peak_gpu_mb − state_mb. What another trainer doesn't print of this is taken from our line.
"""
import contextlib
import json
import os
import pathlib
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock

import datasets
import numpy as np
import torch

import data
import train
from parallel import init_distributed

SWITCHES = {"bf16": "autocast", "gc": "gradient checkpointing", "precompute_ref": "the reference's log-probs before the first step",
            "no_shuffle": "rows in the order of the file"}
NUMBERS = {"batch_size": 8, "steps": 6, "warmup": 2, "max_length": 1024, "lora_r": 0, "threads": torch.get_num_threads()}


def floor(lengths, body, vocabulary, hidden, layers, passes):
    """FLOPs that (B, 3) tokens of prompt, chosen and rejected can't do without: each goes through the body's weights once, tokens of
    answers through the head too, and queries meet the keys they see. A forward is one pass, a
    backward two, or one where weights are frozen."""
    prompt, *answers = lengths.T
    seen = prompt * (prompt + 1) / 2 + sum(answer * prompt + answer * (answer + 1) / 2 for answer in answers)
    weights = body * lengths.sum() + vocabulary * hidden * sum(answers).sum()
    return passes * (2 * weights + 4 * hidden * layers * seen.sum())


def matmul_peak(dtype, device, size=2048, repeats=10):
    """FLOP/s of a square matrix product, the best of several."""
    x, marks = torch.randn(size, size, dtype=dtype, device=device), []
    for _ in range(repeats):
        marks.append(now())
        x @ x
        marks.append(now())
    return 2 * size**3 / np.diff(marks)[::2].min()


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def memory():
    """MB: the most that this process had so far; on a GPU, what is held there now and the most that was, else zeros."""
    most, *gpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return [size / 2**20 for size in (most, *gpu)]


def run(args, ranks, rows):
    """train.main on some lines, in a folder of its own, where nothing is cached -> what was seen of it."""
    flags = {"model": args.model, "dataset": "rows.jsonl", "output_dir": "out", "batch_size": args.batch_size, "max_steps": args.steps,
             "micro_batch_size": args.micro_batch_size or args.batch_size, "max_length": args.max_length, "attention": args.attention,
             "lr": 1e-6, "lr_schedule": "constant", "warmup_steps": 0, "eval_share": 0, "eval_every": 0, "save_every": 0, "log_every": 1,
             "shuffle": "false" if args.no_shuffle else "true", "dtype": "bfloat16" if args.bf16 else "float32"}
    flags |= ({"lora_rank": args.lora_r} if args.lora_r else {}) | ({"ref": "cache"} if args.precompute_ref else {})
    seen = {"marks": [now()], "losses": []}

    class Clock(train.Log):
        def __init__(self, *given):
            super().__init__(*given)
            seen["marks"].append(now())

        def tick(self, values):
            seen["marks"].append(now())
            seen["losses"].append(values["loss"])
            seen["peak"] = memory()
            super().tick(values)

    def choose_attention(flags, models, rows, *others, inner=train.choose_attention):
        seen["model"], seen["rows"], seen["before"] = models[0].model, rows, memory()
        seen["attention"], line = inner(flags, models, rows, *others)
        return seen["attention"], line

    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr), \
            unittest.mock.patch.object(datasets.config, "HF_DATASETS_CACHE", folder), \
            unittest.mock.patch.multiple(train, Log=Clock, choose_attention=choose_attention):
        pathlib.Path("rows.jsonl").write_text("".join(rows))
        train.main([*(f"--{name}={value}" for name, value in flags.items()), *["--gradient_checkpointing"][:args.gc]], ranks)
        prompt, chosen, tokens = (data.column(seen["rows"], name) for name in ("prompt_length", "chosen_length", "tokens"))
    return seen | {"lengths": np.stack([prompt, chosen, tokens - prompt - chosen], 1)}


def measure(args):
    """-> the fields of the JSON line."""
    torch.set_num_threads(args.threads)
    ranks, need = init_distributed(), args.batch_size * args.steps
    rows = [line.strip() + "\n" for line in open(args.data) if line.strip()]
    seen = run(args, ranks, (rows * (need // len(rows) + 1))[:need])
    if len(seen["lengths"]) < need:
        raise ValueError(f"--data {args.data}: {need - len(seen['lengths'])} of its first rows teach nothing and were dropped; take them out")
    windows = [data.window(step, need, args.batch_size, 0, not args.no_shuffle) for step in range(args.warmup, args.steps)]
    times, lengths = np.diff(seen["marks"]), seen["lengths"][windows]  # of each step, after the start; (steps, B, 3)
    total, unique, prompts, model = times[1 + args.warmup:].sum(), lengths.sum(), lengths[..., 0].sum(), seen["model"]
    size = args.micro_batch_size or args.batch_size
    longest = [(piece[..., 0] + piece[..., 1:].max(-1)).max(1) * piece.shape[1] for piece in np.split(lengths, range(size, args.batch_size, size), 1)]
    held, trained = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)
    outer = {id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings())}.values()
    passes = 1 + (1 if args.lora_r else 2) + (not args.precompute_ref)
    least = floor(lengths.reshape(-1, 3), held - sum(p.numel() for p in outer), *model.get_output_embeddings().weight.shape,
                  model.config.num_hidden_layers, passes) / len(lengths)
    peak, median = matmul_peak(torch.bfloat16 if args.bf16 else torch.float32, ranks.device), np.median(times[1 + args.warmup:])
    line = {"impl": "ours", "torch": torch.__version__, "device": ranks.device.type, "attention": seen["attention"], "micro_batch_size": size,
            **{name: getattr(args, name) for name in (*NUMBERS, *SWITCHES)}, "parameters": held, "trained_parameters": trained,
            "step_s_median": median, "step_s_mean": total / len(lengths), "pairs_per_s": lengths[..., 0].size / total,
            "nonpad_tokens_per_s": (unique + prompts) / total, "unique_tokens_per_s": unique / total,
            "padding_fraction": 1 - (unique + prompts) / (2 * np.sum(longest)) if seen["attention"] == "padded" else 0.0, "init_s": times[0],
            "rss_before_train_mb": seen["before"][0], "peak_rss_mb": seen["peak"][0], "peak_gpu_mb": seen["peak"][2] or None,
            "optimizer_mb": 8 * trained / 2**20, "state_mb": seen["before"][1] + 8 * trained / 2**20,  # on the GPU
            "first_loss": seen["losses"][0], "last_loss": seen["losses"][-1],
            "floor_tflop": least / 1e12, "matmul_tflops": peak / 1e12, "share_of_peak": least / median / peak}
    line["peak_above_state_mb"] = above_state(line, line)
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in line.items()}


# --- beside another trainer

def above_state(line, ours):
    if line["peak_gpu_mb"] is not None:
        return line["peak_gpu_mb"] - ours["state_mb"]
    return line["peak_rss_mb"] - line["rss_before_train_mb"] - ours["optimizer_mb"]


def call(command, threads):
    """-> the last line that it prints."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if done.returncode or not done.stdout.strip():
        raise ValueError(f"{shlex.join(command)}: ended with status {done.returncode}\n{done.stderr[-2000:]}")
    print(done.stdout.splitlines()[-1], file=sys.stderr, flush=True)
    return json.loads(done.stdout.splitlines()[-1])


def check_same_work(ours, theirs):
    ours, theirs = ((line["unique_tokens_per_s"] * line["step_s_mean"], line["first_loss"], line["last_loss"]) for line in (ours, theirs))
    if abs(ours[0] / theirs[0] - 1) > 0.02 or max(abs(a - b) for a, b in zip(ours[1:], theirs[1:])) > 5e-3:
        raise ValueError("--compare: not the same work: " + " and ".join(
            f"{tokens:.0f} tokens a step, losses {first:.4f} to {last:.4f}" for tokens, first, last in (ours, theirs)))


def compare(args):
    """Runs in turn, each a process of its own -> medians of ratios, ours over theirs."""
    shared = [f"--{name}={getattr(args, name)}" for name in ("model", "data", *NUMBERS)] + [f"--{name}" for name in SWITCHES if getattr(args, name)]
    mine, pairs = [f"--attention={args.attention}", *[f"--micro_batch_size={args.micro_batch_size}"][:bool(args.micro_batch_size)]], []
    for _ in range(args.repeats):
        pairs.append([call([*command, *shared], args.threads) for command in ([sys.executable, __file__, *mine], shlex.split(args.compare))])
        check_same_work(*pairs[-1])
    speeds = [ours["unique_tokens_per_s"] / theirs["unique_tokens_per_s"] for ours, theirs in pairs]
    above = [[above_state(line, pair[0]) for line in pair] for pair in pairs]
    shares = [[pair[0]["floor_tflop"] / line["step_s_median"] / pair[0]["matmul_tflops"] for line in pair] for pair in pairs]
    return {"speed": statistics.median(speeds), "memory": statistics.median(ours / theirs for ours, theirs in above), "speeds": speeds,
            "peak_above_state_mb": above, "shares_of_peak": shares}


def main(argv):
    parser = train.Parser(description=__doc__, formatter_class=train.Help, allow_abbrev=False)
    for name, what in {"model": "a folder with its tokenizer", "data": "a .jsonl file of pairs"}.items():
        parser.add_argument(f"--{name}", type=os.path.abspath, required=True, help=what)
    for name, default in {**NUMBERS, "micro_batch_size": None, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=data.at_least(0, int), default=default)
    for name, what in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=what)
    parser.add_argument("--attention", choices=("auto", "packed", "padded"), default="auto", help="as of train.py")
    parser.add_argument("--compare", metavar="COMMAND", help="run it in turn with ours; it is given the flags of both, and prints these fields")
    args = parser.parse_args(argv)
    print(json.dumps(compare(args) if args.compare else measure(args)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"error: {error}")
