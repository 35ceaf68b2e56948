"""Writes the output of a run: the lines before the first step, the progress bar, metrics.jsonl.

    python log.py runs/sigmoid --plot curves.png      # the curves of a run, or of several runs

`introduce` prints a summary of the run before its first step. `Log` then writes the flags once,
one row of metrics.jsonl for each logged step, and draws the bar. It sends each row to the trackers
of --report_to (trackers.py). Only rank 0 writes. The curves are drawn by plots.py.
"""
from errors import Parser, run_script  # first, see errors.py
import json
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import tqdm

from batches import Task
from checkpoint import METRICS_FILE, SAMPLES_FILE, write_flags
from files import read_list, written_aside
from logps import FastLogps
from lora import NF4Linear, lora_layers
from losses import kind_of
from optimizers import MOMENTS
from parallel import Ranks, crowded_line, shard
from plots import parse_rows, plot_runs
from reach import frozen_line
from trackers import open_trackers
from world import brief


def bar_interval() -> float:
    """Return the seconds between updates of a progress bar: more where the bar goes to a file."""
    return 0.2 if sys.stderr.isatty() else 5


class Log:
    """Writes the flags, metrics.jsonl, the bar and messages on rank 0, and nothing elsewhere."""

    def __init__(self, folder: Path, flags: dict, checkpoint: Path | None, start: int, steps: int,
                 ranks: Ranks):
        self.on, self.path = ranks.rank == 0, folder / METRICS_FILE
        self.samples_path = folder / SAMPLES_FILE
        self.bar = tqdm.tqdm(total=steps, initial=start, desc=flags["loss"], disable=not self.on,
                             dynamic_ncols=True, mininterval=bar_interval())
        self.first = True  # no step has ended yet
        self.trackers = []
        if not self.on:
            return
        write_flags(folder, flags)
        rows = parse_rows(self.path, self.begin(self.path, checkpoint, start))
        samples = []
        # The file of a run that sampled, and does no more since it was resumed, is cut too.
        if flags["sample_every"] is not None or SAMPLES_FILE in (read_list(folder) or ()):
            text = self.begin(self.samples_path, checkpoint, start)
            samples = [json.loads(line) for line in text.split("\n") if line]
        self.trackers = open_trackers(flags["report_to"], folder, flags, rows, samples)

    def begin(self, path: Path, checkpoint: Path | None, start: int) -> str:
        """Begin a file of rows -> the text of those that it has.

        A resumed run repeats the steps after its checkpoint, which has the rows up to there.
        """
        rows = b""
        if checkpoint and (checkpoint / path.name).exists():
            rows = (checkpoint / path.name).read_bytes()
            if not has_prefix(path, rows):
                self.say(f"{path}: its rows up to step {start} were changed or are missing; "
                         f"they are now those of {checkpoint}")
        with written_aside(path) as temporary:
            temporary.write_bytes(rows)
        return rows.decode("utf-8")

    def row(self, step: int, split: str, values: dict):
        if self.on:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        for tracker in self.trackers:
            tracker.row(step, split, values)

    def samples(self, step: int, rows: list[dict]):
        """Write rows of samples.py."""
        if self.on:
            with open(self.samples_path, "a", encoding="utf-8", newline="\n") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        for tracker in self.trackers:
            tracker.samples(step, rows)

    def close(self):
        """End the bar and the trackers."""
        self.bar.close()
        for tracker in self.trackers:
            tracker.close()

    def tick(self, values: dict):
        """Advance the bar by one step with these metrics."""
        if self.first and "wpo/weight" in values:
            self.say_weight(values["wpo/weight"])
        self.first = False
        text = brief(values, {"tokens_per_second": "tokens/s"})
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()

    def say_weight(self, weight: float):
        """Say what WPO does to the loss of the first step, if the mean weight is far from 1."""
        text = f"--wpo: the mean weight of the pairs of the first step is {weight:.3g}"
        if weight > 2:
            self.say(f"{text}, which multiplies the loss: their tokens are more probable than "
                     "tokens that the policy samples. --wpo_clamp limits each weight to 1")
        elif weight < 0.5:
            self.say(f"{text}, which scales the loss down: their tokens are less probable than "
                     "tokens that the policy samples")

    def say(self, text: str):
        if self.on:
            self.bar.write(text)


def has_prefix(path: Path, content: bytes) -> bool:
    """Return whether a file exists and begins with these bytes."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(content)) == content


def introduce(args: Namespace, task: Task, model: FastLogps, reference: Callable | None,
              splits: tuple, steps: int, folder: Path, plan: str, ranks: Ranks):
    """Print a summary of the run before its first step."""
    if ranks.rank > 0 or args.eval_only:
        return
    rows, held_out = splits
    counts = ", ".join(str(len(part)) for part in held_out.values())
    where = f"{ranks.size} x {ranks.device.type}"
    if ranks.size > 1:
        where += f", {args.parallel}"
    units = {"pairs": "pairs", "labels": "answers", "lists": "lists"}[kind_of(task.loss)]
    print(f"{args.loss} {task.hyper}: {steps} steps of {args.batch_size} {units} from {len(rows)} "
          f"rows, {counts} rows held out; {task.dtype} on {where}; {folder}")
    adapted = lora_layers(model.model)
    if adapted:
        kinds = sorted({path.rsplit(".", 1)[-1] for path in adapted})
        print(f"adapter on {len(adapted)} layers: {', '.join(kinds)}")
    frozen = frozen_line(model.model, task.row_format.processor is not None)
    for line in (frozen, crowded_line(ranks)):
        if line:
            print(line)
    print(memory_line(model, reference, MOMENTS[args.optimizer]))
    print(plan)
    if task.compares_pairs:
        print(f"{args.loss} compares all {args.batch_size} pairs of a step with each other, "
              "which costs a second forward")


def metric_lines(splits: dict) -> str:
    """Format all metrics of {split: metrics} as a table, with a column for each evaluation set."""
    names = {}
    for metrics in splits.values():
        names |= metrics
    width = max(map(len, [*names, ""]))
    titles = [split.removeprefix("eval/") for split in splits]
    lines = [" ".join([" " * width, *[f"{title:>12}" for title in titles]])]
    for name in names:
        cells = []
        for title, metrics in zip(titles, splits.values()):
            text = f"{metrics[name]:.6g}" if name in metrics else ""
            cells.append(f"{text:>{max(12, len(title))}}")
        lines.append(" ".join([f"{name:{width}}", *cells]).rstrip())
    return "\n".join(lines)


def memory_parts(policy: FastLogps, reference: Callable | None, moments: int) -> dict:
    """Return {part: bytes} of the memory that each rank needs besides activations. `moments` is the
    number of tensors as large as the weights that the optimizer keeps."""
    def size(tensors):
        return sum(shard(tensor).numel() * tensor.element_size() for tensor in tensors)

    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    second = []
    if isinstance(reference, torch.nn.Module):
        second = [*reference.parameters(), *reference.buffers()]
    return {
        "weights": size([*policy.parameters(), *policy.buffers()]),
        "gradients": size(trained),
        "optimizer": moments * size(trained),
        "reference": size(second),
    }


def memory_line(policy, reference, moments):
    """Format the numbers of parameters, and `memory_parts`."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    parts = memory_parts(policy, reference, moments)
    count = sum(parameter.numel() for parameter in policy.parameters())
    for module in policy.modules():
        if isinstance(module, NF4Linear):
            count += module.shape.numel()
    sizes = ", ".join(f"{name} {part / 2**20:,.1f} MiB" for name, part in parts.items())
    return (f"{count:,} parameters, {sum(p.numel() for p in trained):,} of them trained; "
            f"on each rank {sizes}")


def main(arguments: list[str]):
    """Run the command `python log.py`."""
    parser = Parser(description="Draw the curves of runs, finished or still going on")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --output_dir of a run")
    parser.add_argument("--plot", required=True, metavar="FILE.png", help="the picture to write")
    args = parser.parse_args(arguments)
    plot_runs(args.runs, args.plot)


if __name__ == "__main__":
    run_script(main)
