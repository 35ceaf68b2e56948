"""Time the training step of train.py: its speed, its memory, and its share of the machine's peak.

    python bench.py --model M --data pairs.jsonl --batch_size 8 --no_shuffle --threads 1
    python bench.py --compare "python tests/bench_trl.py" --model M ... --no_shuffle

    python bench.py --model M --data pairs.jsonl --start 200000

The first command prints one JSON line. The second prints the ratios to another trainer. The third
prints the seconds from the start of train.main to the end of its first step with 200,000 rows: a
first time, and with the cache of the first time. Above START_BOUND it ends with an error.

bench.py runs train.main and reads the clock at the end of each optimizer step, so a step time
includes all that a user waits for, such as the loading of rows and the metrics.
`unique_tokens_per_s` counts each prompt once, `nonpad_tokens_per_s` once for each answer.

Peak memory above the state (weights, reference, AdamW's moments) is the memory of activations,
logits and gradients. On a CPU it is peak_rss_mb - rss_before_train_mb - optimizer_mb: the process's
peak, minus its peak when models and rows were loaded but no batch, minus the moments. On a GPU it
is peak_gpu_mb - state_mb. If another trainer does not print these numbers, bench.py uses ours.
"""
from errors import Parser, UserError, any_name, run_script  # first, see errors.py
import argparse
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
from typing import NamedTuple

import datasets
import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import data
import train
from checkpoint import saved_flags
from loading import load_tokenizer
from model import load_model
from parallel import init_distributed
from ranges import whole_number
from registry import Needs

SWITCHES = {
    "bf16": "autocast to bfloat16",
    "gc": "gradient checkpointing",
    "precompute_ref": "compute the reference's log-probs before the first step",
    "no_shuffle": "take the rows in the order of the file",
}
NUMBERS = {  # name: the lowest value, the default
    "batch_size": (1, 8),
    "steps": (1, 6),
    "warmup": (0, 2),
    "max_length": (2, 1024),
    "lora_r": (0, 0),
    "threads": (1, torch.get_num_threads()),
}


# --- FLOPs of the model, speed and memory of the machine ------------------------------------------

def floor(lengths, body, vocabulary, hidden, layers, passes):
    """Count the FLOPs that these rows need at least.

    lengths     (B, 3) tokens of prompt, chosen and rejected
    body        weights of the model without its embeddings and its head
    passes      1 for a forward, 2 for a backward, 1 for a backward through frozen weights

    Every token goes through the weights of the body once, tokens of answers through the head too,
    and a query is multiplied by the keys that it attends to.
    """
    prompt, chosen, rejected = lengths.T
    answers = chosen + rejected
    keys = prompt * (prompt + 1) / 2
    for answer in (chosen, rejected):
        keys = keys + answer * prompt + answer * (answer + 1) / 2
    weights = body * lengths.sum() + vocabulary * hidden * answers.sum()
    attention = 2 * hidden * layers * keys.sum()
    return passes * 2 * (weights + attention)


# The longest time that one matrix product may take.
MATMUL_SECONDS = 0.5


def matmul_peak(dtype, device, size=2048, repeats=10):
    """Measure the FLOP/s of a square matrix product, the best of several.

    Smaller products come first. The size is doubled while the next product is expected to take less
    than MATMUL_SECONDS: a CPU without bfloat16 instructions needs a minute for 2048 x 2048.
    """
    side = min(size, 128)
    seconds = time_products(side, 3, dtype, device)
    while side < size and 8 * seconds < MATMUL_SECONDS:
        side = min(2 * side, size)
        seconds = time_products(side, repeats if side == size else 2, dtype, device)
    return 2 * side**3 / seconds


def time_products(side, repeats, dtype, device):
    """Return the seconds of the fastest of several products of two (side, side) matrices."""
    x = torch.randn(side, side, dtype=dtype, device=device)
    seconds = []
    for _ in range(repeats):
        start = now()
        x @ x
        seconds.append(now() - start)
    return min(seconds)


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Memory(NamedTuple):
    """Memory in MB. The numbers of the GPU are 0 if there is none."""
    peak_rss: float
    gpu: float
    peak_gpu: float


def memory():
    """Measure the memory of this process: its peak so far, and on the GPU the current size too."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    gpu, peak_gpu = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return Memory(rss, gpu / 2**20, peak_gpu / 2**20)


# --- One run of train.py --------------------------------------------------------------------------

class Recorder:
    """Observes a training run through hooks of torch.optim, without a change of train.py."""

    def __init__(self):
        self.start = now()
        self.step_ends = []
        self.trained = 0  # parameters
        self.before = None  # Memory when models and rows are loaded
        self.peak = None  # Memory after the last step

    def note_optimizer(self):
        self.before = memory()

    def note_step(self, optimizer, args, kwargs):
        self.step_ends.append(now())
        self.peak = memory()
        self.trained = 0
        for group in optimizer.param_groups:
            self.trained += sum(parameter.numel() for parameter in group["params"])


@contextlib.contextmanager
def recorded():
    """Record the optimizer that is made inside, and each of its steps."""
    recorder, make = Recorder(), torch.optim.Optimizer.__init__

    def make_and_note(optimizer, *args, **kwargs):
        recorder.note_optimizer()
        make(optimizer, *args, **kwargs)

    hook = register_optimizer_step_post_hook(recorder.note_step)
    try:
        with unittest.mock.patch.object(torch.optim.Optimizer, "__init__", make_and_note):
            yield recorder
    finally:
        hook.remove()


@contextlib.contextmanager
def empty_folder():
    """Run in an empty folder, with an empty cache of data sets and without output on stdout."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        stack.enter_context(unittest.mock.patch.object(
            datasets.config, "HF_DATASETS_CACHE", folder))
        yield


class TrainedRun(NamedTuple):
    """The results of a run of train.main."""
    recorder: Recorder
    lengths: np.ndarray  # (N, 3) tokens of prompt, chosen and rejected
    attention: str  # "packed" or "padded"
    metrics: list  # the rows of metrics.jsonl, one for each step


def train_flags(args):
    """Translate our flags into the flags of train.py."""
    flags = {
        "model": args.model,
        "dataset": "rows.jsonl",
        "output_dir": "out",
        "batch_size": args.batch_size,
        "micro_batch_size": args.micro_batch_size or args.batch_size,
        "max_steps": args.steps,
        "max_length": args.max_length,
        "attention": args.attention,
        "lr": 1e-6,
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "eval_share": 0,
        "eval_every": 0,
        "save_every": 0,
        "log_every": 1,
        "shuffle": "false" if args.no_shuffle else "true",
        "dtype": "bfloat16" if args.bf16 else "float32",
    }
    if args.lora_r:
        flags["lora_rank"] = args.lora_r
    if args.precompute_ref:
        flags["ref"] = "cache"
    argv = [f"--{name}={value}" for name, value in flags.items()]
    if args.gc:
        argv.append("--gradient_checkpointing")
    return argv


def run_training(args, ranks, lines):
    """Train on these lines of JSON. Returns a TrainedRun."""
    with empty_folder():
        pathlib.Path("rows.jsonl").write_text("".join(lines), encoding="utf-8")
        with recorded() as recorder:
            train.main(train_flags(args), ranks)
        flags = saved_flags("out")
        metrics = []
        for line in pathlib.Path("out/metrics.jsonl").read_text().splitlines():
            metrics.append(json.loads(line))
        # The rows that were trained on, from the cache of the run.
        rows, _ = data.load_tokens("rows.jsonl", load_tokenizer(args.model),
                                   Needs(), data.Limits(args.max_length))
        prompt = data.column(rows, "prompt_length")
        chosen = data.column(rows, "first_length")
        rejected = data.column(rows, "tokens") - prompt - chosen
    lengths = np.stack([prompt, chosen, rejected], 1)
    return TrainedRun(recorder, lengths, flags["attention"], metrics)


def read_lines(path, count):
    """Read `count` lines of a file; a file with fewer lines is repeated."""
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path}: cannot be read ({error})") from error
    lines = [line.strip() + "\n" for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"--data {path}: there is no row in it")
    repeats = count // len(lines) + 1
    return (lines * repeats)[:count]


def count_padded(lengths, size):
    """Count the tokens of padded micro-batches of `size` rows, with padding.

    lengths has the shape (steps, B, 3).
    """
    longest = lengths[..., 0] + lengths[..., 1:].max(-1)  # (steps, B)
    total = 0
    for start in range(0, longest.shape[1], size):
        piece = longest[:, start:start + size]  # (steps, size)
        total += 2 * piece.max(1).sum() * piece.shape[1]
    return total


def step_floor(args, lengths, trained):
    """Return the mean FLOPs of a step and the model's number of parameters."""
    model = load_model(args.model, device="meta")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if args.lora_r:
        parameters += trained
    head = model.get_output_embeddings().weight
    ends = {id(head): head}  # tied weights count once
    embeddings = model.get_input_embeddings().weight
    ends[id(embeddings)] = embeddings
    body = parameters - sum(weight.numel() for weight in ends.values())

    # The policy's forward and backward, and the reference's forward.
    passes = 2 if args.lora_r else 3
    if not args.precompute_ref:
        passes += 1
    layers = model.config.num_hidden_layers
    total = floor(lengths.reshape(-1, 3), body, *head.shape, layers, passes)
    return total / len(lengths), parameters


def speed_fields(args, attention, lengths, seconds):
    """Compute speeds from the tokens (steps, B, 3) and the seconds (steps,) of each step."""
    unique, total = lengths.sum(), seconds.sum()
    nonpad = unique + lengths[..., 0].sum()
    padding = 0.0
    if attention == "padded":
        size = args.micro_batch_size or args.batch_size
        padding = 1 - nonpad / count_padded(lengths, size)
    return {
        "step_s_median": np.median(seconds),
        "step_s_mean": total / len(lengths),
        "pairs_per_s": args.batch_size * len(lengths) / total,
        "nonpad_tokens_per_s": nonpad / total,
        "unique_tokens_per_s": unique / total,
        "padding_fraction": padding,
    }


def memory_fields(recorder):
    optimizer_mb = 8 * recorder.trained / 2**20  # two moments in float32
    return {
        "rss_before_train_mb": recorder.before.peak_rss,
        "peak_rss_mb": recorder.peak.peak_rss,
        "peak_gpu_mb": recorder.peak.peak_gpu or None,
        "optimizer_mb": optimizer_mb,
        "state_mb": recorder.before.gpu + optimizer_mb,  # on the GPU
    }


def measure(args):
    """Train, and return the fields of the JSON line."""
    torch.set_num_threads(args.threads)
    ranks, count = init_distributed(), args.batch_size * args.steps
    result = run_training(args, ranks, read_lines(args.data, count))
    dropped = count - len(result.lengths)
    if dropped > 0:
        raise UserError(f"--data {args.data}: {dropped} of its first rows have no training "
                        "signal and were dropped; remove them")
    recorder, metrics = result.recorder, result.metrics

    # The tokens of each step.
    windows = []
    for step in range(args.steps):
        windows.append(data.window(step, count, args.batch_size, 0, not args.no_shuffle))
    lengths = result.lengths[windows]  # (steps, B, 3)

    # The seconds of each step. The start of the first follows from its speed in metrics.jsonl.
    first_step = lengths[0].sum() / metrics[0]["tokens_per_second"]
    loop_start = recorder.step_ends[0] - first_step
    seconds = np.diff([loop_start, *recorder.step_ends])  # (steps,)

    # The steps after the warmup, and the least time that the machine would need for them.
    lengths, seconds = lengths[args.warmup:], seconds[args.warmup:]
    least, parameters = step_floor(args, lengths, recorder.trained)
    peak = matmul_peak(torch.bfloat16 if args.bf16 else torch.float32, ranks.device)
    line = {
        "impl": "ours",
        "torch": torch.__version__,
        "device": ranks.device.type,
        "attention": result.attention,
        "micro_batch_size": args.micro_batch_size or args.batch_size,
    }
    line |= {name: getattr(args, name) for name in (*NUMBERS, *SWITCHES)}
    line |= {"parameters": parameters, "trained_parameters": recorder.trained}
    line |= speed_fields(args, result.attention, lengths, seconds)
    line |= {"init_s": loop_start - recorder.start}
    line |= memory_fields(recorder)
    line |= {
        "first_loss": metrics[0]["loss"],
        "last_loss": metrics[-1]["loss"],
        "floor_tflop": least / 1e12,
        "matmul_tflops": peak / 1e12,
        "share_of_peak": least / line["step_s_median"] / peak,
    }
    line["peak_above_state_mb"] = above_state(line, line)
    return {name: rounded(value) for name, value in line.items()}


def rounded(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


# --- A start with many rows -----------------------------------------------------------------------

# Seconds for the model and the first step, and for each row: read and tokenized, or from the cache.
START_BOUND = {"start_s": (30.0, 5e-4), "cached_start_s": (30.0, 2e-5)}


def measure_start(args):
    """Return the fields of the JSON line of --start."""
    torch.set_num_threads(args.threads)
    ranks, lines = init_distributed(), read_lines(args.data, args.start)
    line = {"rows": args.start}
    with empty_folder():
        pathlib.Path("rows.jsonl").write_text("".join(lines))
        for name in START_BOUND:
            flags = [*train_flags(args), f"--output_dir={name}", "--max_steps=1"]
            with recorded() as recorder:
                train.main(flags, ranks)
            line[name] = rounded(recorder.step_ends[0] - recorder.start)
    for name, (fixed, per_row) in START_BOUND.items():
        most = fixed + per_row * args.start
        if line[name] > most:
            raise UserError(f"--start {args.start}: {name} is {line[name]}, above its bound {most}")
    return line


# --- Comparison with another trainer --------------------------------------------------------------

def above_state(line, ours):
    """Return the MB above the state. `ours` has the size of the state, which other trainers do not
    print."""
    if line["peak_gpu_mb"] is not None:
        return line["peak_gpu_mb"] - ours["state_mb"]
    return line["peak_rss_mb"] - line["rss_before_train_mb"] - ours["optimizer_mb"]


def call(command, threads):
    """Run a command and parse the last line that it prints."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    printed = done.stdout.splitlines()
    if done.returncode or not printed:
        print(done.stderr[-2000:], file=sys.stderr)
        last = done.stderr.splitlines()[-1:]
        raise UserError(f"{shlex.join(command)}: ended with status {done.returncode}: "
                        f"{''.join(last)}")
    print(printed[-1], file=sys.stderr, flush=True)
    return json.loads(printed[-1])


def check_same_work(ours, theirs):
    """Raise unless both lines have the same tokens per step and the same losses."""
    tokens = [line["unique_tokens_per_s"] * line["step_s_mean"] for line in (ours, theirs)]
    gaps = [abs(ours[name] - theirs[name]) for name in ("first_loss", "last_loss")]
    if abs(tokens[0] / tokens[1] - 1) <= 0.02 and max(gaps) <= 5e-3:
        return
    work = []
    for line, count in zip((ours, theirs), tokens):
        work.append(f"{count:.0f} tokens a step, "
                    f"losses {line['first_loss']:.4f} to {line['last_loss']:.4f}")
    raise UserError(f"--compare: not the same work: {' and '.join(work)}")


def compare(args):
    """Run both trainers in turn, each in its own process. Returns medians of the ratios, ours over
    theirs."""
    shared = [f"--{name}={getattr(args, name)}" for name in ("model", "data", *NUMBERS)]
    shared += [f"--{name}" for name in SWITCHES if getattr(args, name)]
    our_command = [sys.executable, __file__, f"--attention={args.attention}", *shared]
    if args.micro_batch_size:
        our_command.append(f"--micro_batch_size={args.micro_batch_size}")
    their_command = [*shlex.split(args.compare), *shared]

    speeds, above, shares = [], [], []
    for _ in range(args.repeats):
        ours, theirs = call(our_command, args.threads), call(their_command, args.threads)
        check_same_work(ours, theirs)
        lines = (ours, theirs)
        speeds.append(ours["unique_tokens_per_s"] / theirs["unique_tokens_per_s"])
        above.append([above_state(line, ours) for line in lines])
        fastest = ours["floor_tflop"] / ours["matmul_tflops"]  # seconds
        shares.append([fastest / line["step_s_median"] for line in lines])
    return {
        "speed": statistics.median(speeds),
        "memory": statistics.median(ours / theirs for ours, theirs in above),
        "speeds": speeds,
        "peak_above_state_mb": above,
        "shares_of_peak": shares,
    }


def main(argv):
    parser = Parser(description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with its tokenizer")
    parser.add_argument("--data", type=any_name, required=True, help="a .jsonl file of pairs")
    numbers = NUMBERS | {"micro_batch_size": (1, None), "repeats": (1, 5)}
    for name, (low, default) in numbers.items():
        parser.add_argument(f"--{name}", type=whole_number(f">= {low}"), default=default)
    for name, text in SWITCHES.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_argument("--attention", choices=("auto", "packed", "padded"), default="auto",
                        help="as in train.py (default auto)")
    parser.add_argument("--compare", metavar="COMMAND",
                        help="run this command in turn with ours; it gets the flags that both have "
                             "and prints the same fields")
    parser.add_argument("--start", type=whole_number(">= 1"), metavar="ROWS",
                        help="time the start of a run with this many rows, not its steps")
    args = parser.parse_args(argv)
    if args.warmup >= args.steps:
        parser.error(f"--warmup {args.warmup}: leaves no step to time; --steps is {args.steps}")
    # A run changes the current folder.
    args.model, args.data = os.path.abspath(args.model), os.path.abspath(args.data)
    mode = measure
    if args.compare:
        mode = compare
    elif args.start:
        mode = measure_start
    print(json.dumps(mode(args)))


if __name__ == "__main__":
    run_script(main)
