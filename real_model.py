"""Train a real model with each loss, and write docs/real_model.md about what it learned.

    python real_model.py --model DIR --data DIR
    python real_model.py --model DIR --data DIR --compare "VENV/bin/python tests/trl_steps.py"

--model is a chat model, --data a folder with the files of real_runs.FILES. The runs are in
real_runs.py; each is a few commands, which the page prints. Their results are kept in --out. A
finished command is skipped, so a second call continues where the first was stopped, or only writes
the page again. Every figure of the page is computed from these results.

The log-ratio of a held-out answer is its log-prob after training minus its log-prob before. A pair
is right if the chosen answer has the higher log-ratio; this is defined for every loss, with and
without a reference. The interval of the share of right pairs is Wilson's, for example

    8 of 8 right     a share of 1, and a 95 % interval of 0.68 to 1
"""
from errors import Parser, UserError, any_name, reading, run_script  # first, see errors.py
import json
import os
import pathlib
from argparse import Namespace
from typing import NamedTuple

import numpy as np

from real_runs import (
    COMPARED_FLAGS,
    EXPERIMENTS,
    FILES,
    LORA,
    METRICS,
    NEW_TOKENS,
    ROOT,
    RealRun,
    compare_trainers,
    read_comparison,
    run_experiments,
    sample_words,
    score_words,
    shown_command,
    split_rows,
    their_lines,
    train_words,
)
from files import read_json, read_run_file, write_text
from model import load_model
from plots import Curves, draw_panel, read_metrics
from ranges import whole_number


# --- What a run learned ---------------------------------------------------------------------------

def wilson(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Compute Wilson's interval of a share, 95 % for this z: the shares p that lie within z
    standard deviations of the observed one, |right/count − p| ≤ z sqrt(p(1 − p)/count)."""
    share, spread = right / count, z * z / count
    center = (share + spread / 2) / (1 + spread)
    half = z * (share * (1 - share) / count + spread / (4 * count)) ** 0.5 / (1 + spread)
    return center - half, center + half


class Learned(NamedTuple):
    """What held-out pairs show about a run, and the flags and the time of the run."""
    experiment: RealRun
    flags: dict  # all of train.py
    pairs: int
    right: int  # pairs whose chosen answer has the higher log-ratio
    per_token: int  # pairs whose chosen answer has the higher log-prob per token
    changes: np.ndarray  # (2,) mean change of the log-prob of chosen and of rejected
    cpu_seconds: float | None

    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.pairs)


def read_jsonl(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_logps(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the log-probs of chosen and rejected answers, and their numbers of tokens, (N, 2)."""
    lines = read_jsonl(path)
    logps = np.array([line["policy_logps"] for line in lines])
    return logps, np.array([line["lengths"] for line in lines])


def count_per_token(path: pathlib.Path) -> int:
    """Count the pairs whose chosen answer has the higher log-prob per token."""
    logps, lengths = read_logps(path)
    averages = logps / lengths
    return int((averages[:, 0] > averages[:, 1]).sum())


def learned(args: Namespace, experiment: RealRun) -> Learned | None:
    """Compare the held-out log-probs of a run with those before. None if it has not ended."""
    name = experiment.name
    scores = args.out / f"{name}-scores.jsonl"
    if not (args.out / f"{name}-score.json").is_file():
        return None
    before, _ = read_logps(args.out / experiment.rows / "before.jsonl")
    ratios = read_logps(scores)[0] - before  # (N, 2)
    flags = read_run_file(args.out / name)["flags"]
    record = read_json(args.out / f"{name}-train.json")
    return Learned(experiment, flags, len(ratios), int((ratios[:, 0] > ratios[:, 1]).sum()),
                   count_per_token(scores), ratios.mean(0), record["cpu_seconds"])


SMALL = 0.1  # nats: a smaller change of the margin is a direction, which no answer shows yet


def verdict(result: Learned) -> str:
    """Say whether the share of right pairs differs from one half, which a model has that learned
    nothing, and whether the margin between chosen and rejected answers has grown visibly."""
    low, high = result.interval()
    if low <= 0.5:
        return "wrong way" if high < 0.5 else "not shown"
    return "yes" if result.changes[0] - result.changes[1] >= SMALL else "direction"


def short(value: float) -> str:
    """Format a learning rate as one writes it behind --lr: 5e-4, 2.5e-6."""
    mantissa, exponent = f"{value:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


# --- The page -------------------------------------------------------------------------------------

def page_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def signed(value: float, digits: int = 2) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def result_row(result: Learned) -> list[str]:
    low, high = result.interval()
    minutes = "resumed"
    if result.cpu_seconds is not None:
        minutes = f"{result.cpu_seconds / 60:.1f}"
    return [f"`{result.experiment.name}`", short(result.flags["lr"]),
            f"{result.right / result.pairs:.2f}", f"{low:.2f} to {high:.2f}", verdict(result),
            f"{result.per_token / result.pairs:.2f}", signed(result.changes[0]),
            signed(result.changes[1]), minutes]


def results_section(args: Namespace, rows: str, results: list[Learned]) -> str:
    """The table of one file of pairs."""
    before = args.out / rows / "before.jsonl"
    count = len(read_jsonl(before))
    share = count_per_token(before) / count
    head = ["run", "lr", "right", "95 % interval", "learned", "per token", "Δ chosen",
            "Δ rejected", "CPU min"]
    lines = [["before", "", "", "", "", f"{share:.2f}", "", "", ""]]
    lines += [result_row(result) for result in results if result.experiment.rows == rows]
    about = f"`{FILES[rows].file}`. {FILES[rows].note}".strip()
    return f"## {FILES[rows].title}\n\n{about}\n\n{page_table(head, lines)}"


def default_lines(results: list[Learned]) -> list[str]:
    """Say for each run with the default learning rate what it learned."""
    lines = []
    for result in results:
        if "lr" in result.experiment.flags:
            continue
        low, high = result.interval()
        kind = "LoRA" if "lora_rank" in result.experiment.flags else "full"
        margin = result.changes[0] - result.changes[1]
        lines.append(f"- `{result.experiment.name}`, {kind}, lr {short(result.flags['lr'])}: "
                     f"{verdict(result)} ({result.right} of {result.pairs} pairs right, "
                     f"{low:.2f} to {high:.2f}; margin {signed(margin)} nats; log-prob of chosen "
                     f"{signed(result.changes[0])} nats)")
    return lines


COMPARISON = """\
Both trainers start from the same adapter and take the same {steps} steps: {batch} pairs in the same
order ({batch} answers for `kto`), float32, lr {lr}, constant. A cell has the largest absolute
difference over these steps. Log-probs are sums over an answer, in nats. TRL {trl}, PEFT {peft}.
`tests/trl_steps.py` says what it changes in TRL, for `kto` and `orpo`. An empty cell: TRL does not
log the metric, or in another unit: log-probs of `simpo` and `orpo` as averages per token, and
rewards of `ipo` as sums.

{table}

```
python real_model.py --model M --data DIR --compare "PYTHON tests/trl_steps.py"
```

adds this table, where `PYTHON` has TRL."""


def comparison_section(args: Namespace) -> str:
    """The table of the largest differences from the other trainer."""
    compared = read_comparison(args)
    if not compared:
        return "Not compared: see `--compare`."
    names = [name for name in METRICS if any(name in found for found in compared.values())]
    rows = []
    for loss, found in compared.items():
        cells = [f"{found[name]:.0e}" if name in found else "" for name in names]
        rows.append([f"`{loss}`", *cells])
    steps = their_lines(args, next(iter(compared)))
    last = steps[-1]
    return COMPARISON.format(
        steps=len(steps), batch=COMPARED_FLAGS["batch_size"], lr=COMPARED_FLAGS["lr"],
        trl=last.get("trl", "?"), peft=last.get("peft", "?"),
        table=page_table(["loss", *[f"`{name}`" for name in names]], rows))


def cell(text: str, most: int = 220) -> str:
    """Write an answer into one cell of a table."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    for mark in "`*_<>[]":
        text = text.replace(mark, f"\\{mark}")
    return text if len(text) <= most else f"{text[:most]} …"


def answers_section(args: Namespace) -> str:
    """A table for each prompt: its answer before, and after each run that has answered."""
    files = {"before": args.out / "answers-before.jsonl"}
    for experiment in EXPERIMENTS:
        files[experiment.name] = args.out / f"{experiment.name}-answers.jsonl"
    answers = {name: read_jsonl(path) for name, path in files.items() if path.is_file()}
    if "before" not in answers:
        return ""
    held_out = read_jsonl(args.out / "instructions" / "held_out.jsonl")
    tables = []
    for i, line in enumerate(answers["before"]):
        prompt = held_out[i]["prompt"][0]["content"]
        rows = [[f"`{name}`", cell(lines[i]["policy"]["text"])] for name, lines in answers.items()]
        for side in ("chosen", "rejected"):
            rows.append([f"({side})", cell(line[side]["text"])])
        tables.append(f"**{cell(prompt)}**\n\n{page_table(['run', 'answer'], rows)}")
    return "\n\n".join(tables)


def commands_section(args: Namespace, results: list[Learned]) -> str:
    """The commands of every run, and the two that follow each."""
    lines = []
    for result in results:
        lines.append(shown_command(args, train_words(args, result.experiment)))
    first = results[0].experiment
    folder, out = args.out / first.name, args.out / f"{first.name}-scores.jsonl"
    lines.append(shown_command(args, score_words(args, first.rows, folder, out)))
    out = args.out / f"{first.name}-answers.jsonl"
    lines.append(shown_command(args, sample_words(args, first.rows, folder, out)))
    return "```\n" + "\n".join(lines) + "\n```"


PANELS = ("loss", "rewards/margins", "logps/chosen", "logps/rejected")
WINDOW = 8  # steps of the running mean


def running_means(rows: list[dict]) -> list[dict]:
    """Return a row for each step after the first WINDOW - 1, with the mean of each metric over the
    last WINDOW steps. They are drawn as the rows of an evaluation, as a line with markers."""
    means = []
    for end in range(WINDOW, len(rows) + 1):
        group = rows[end - WINDOW:end]
        row = {"step": group[-1]["step"], "split": "eval"}
        for metric in PANELS:
            values = [each[metric] for each in group if metric in each]
            if values:
                row[metric] = sum(values) / len(values)
        means.append(row)
    return means


def draw_runs(args: Namespace, results: list[Learned], path: pathlib.Path) -> None:
    """Draw the curves of training: a row of panels for each run."""
    with reading("the curves cannot be drawn", "; pip install matplotlib"):
        from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 1.75 * len(results) + 0.4), dpi=80, layout="constrained")
    for number, result in enumerate(results):
        name = result.experiment.name
        rows = [row for row in read_metrics(args.out / name) if row["split"] == "train"]
        runs = [Curves(name, rows + running_means(rows))]
        for column, metric in enumerate(PANELS, 1):
            panel = figure.add_subplot(len(results), len(PANELS), number * len(PANELS) + column)
            draw_panel(panel, runs, metric, {"eval": "-"})
            panel.set_ylabel("")
            if not any(metric in row for row in rows):
                panel.text(0.5, 0.5, "not logged", transform=panel.transAxes, ha="center")
                panel.set(xticks=[], yticks=[])
            if column == 1:
                panel.set_ylabel(name, fontsize=10, fontweight="bold")
    with reading(f"--page: {path} cannot be written"):
        figure.savefig(path)


def machine_line(args: Namespace, results: list[Learned]) -> str:
    """Say on which machine and when the runs were made."""
    records = [read_json(args.out / f"{result.experiment.name}-train.json") for result in results]
    last = max(records, key=lambda record: record["date"])
    return (f"{last['processor']}, {last['cores']} cores, OMP_NUM_THREADS={last['threads']}; "
            f"{last['versions']}; {last['date']}")


def missing_line(results: list[Learned]) -> str:
    """Name the runs that have not ended."""
    ended = {result.experiment.name for result in results}
    missing = [f"`{one.name}`" for one in EXPERIMENTS if one.name not in ended]
    return f"Not finished when this page was written: {', '.join(missing)}." if missing else ""


COLUMNS = """\
- *learned*: "not shown" if the interval contains 0.5. Above 0.5 it is "yes" if the margin, Δ chosen
  minus Δ rejected, grew by 0.1 nats or more, and "direction" if it grew by less: most pairs moved
  in the right direction, but hardly.
  `sft` and `orpo` imitate the chosen answer: for them, Δ chosen shows learning too. `sft` does not
  tell the answers apart.
- *per token*: the share of pairs whose chosen answer has the higher log-prob per token
- *Δ chosen*, *Δ rejected*: the mean change of the log-prob of an answer, in nats
- *CPU min*: processor time of the training command, with its start"""

PAGE = """\
# What each loss learns on a real model

This page says whether each loss of `train.py` learns with its default learning rate, and with which
one it does. This command makes the page and its picture; every figure is computed from its runs:

```
python real_model.py --model M --data DIR
```

Model: {model}, {parameters:,} parameters. Machine: {machine}.

Each run trains for one epoch on {train} pairs, from the same model, with one seed. LoRA has rank
{rank} on all linear layers. A held-out pair is *right* if training raised the log-prob of its
chosen answer more than that of its rejected one. Without learning, half of the pairs are right.
The interval is Wilson's.

{columns}

{results}

{missing}

Two runs differ if their intervals do not overlap. If they overlap, these pairs do not show which
run is better.

## The defaults

{defaults}

Where a default of a preference loss shows nothing or a direction alone, set `--lr` as in the
tables, or train for more steps: the defaults are for models of billions of parameters and for
hundreds of steps.

## Curves

A row for each run, a column for each metric. Thin: one step. With markers: the mean of the last
{window} steps. A step logs the log-probs of its pairs before it trains on them.

![curves of training]({picture})

## Answers before and after

Greedy, at most {tokens} tokens, to the first held-out prompts. *(chosen)* and *(rejected)* are the
answers of the file.

{answers}

## Next to TRL

{comparison}

## The commands

`M` is the folder of the model, `R` that of the runs. The last two commands score and answer; they
are the same for each run.

{commands}

## Limits

- One small model, one seed, few pairs. A larger model needs a lower learning rate.
- A right pair is not a better answer: nobody judged the answers.
- Few learning rates were tried. Others may be better.
- The time is that of a processor. Programs that ran at the same time made it longer.
"""


def count_parameters(args: Namespace) -> int:
    model = load_model(args.model, device="meta")
    return sum(parameter.numel() for parameter in model.parameters())


def write_real_page(args: Namespace) -> None:
    """Write the page of the runs that have ended, and the picture next to it."""
    results = [learned(args, experiment) for experiment in EXPERIMENTS]
    results = [result for result in results if result is not None]
    if not results:
        raise UserError(f"--out {args.out}: no run has ended; leave out --only_page")
    picture = args.page.with_suffix(".png")
    args.page.parent.mkdir(parents=True, exist_ok=True)
    draw_runs(args, results, picture)
    sections = [results_section(args, rows, results) for rows in FILES
                if any(result.experiment.rows == rows for result in results)]
    text = PAGE.format(
        model=args.name or pathlib.Path(args.model).name, parameters=count_parameters(args),
        machine=machine_line(args, results), train=args.train_rows, rank=LORA["lora_rank"],
        columns=COLUMNS, results="\n\n".join(sections), missing=missing_line(results),
        defaults="\n".join(default_lines(results)), window=WINDOW, picture=picture.name,
        tokens=NEW_TOKENS, answers=answers_section(args), comparison=comparison_section(args),
        commands=commands_section(args, results))
    write_text(args.page, text.replace("\n\n\n\n", "\n\n"))
    print(f"{args.page} and {picture}: {len(results)} of {len(EXPERIMENTS)} runs")


# --- The command line -----------------------------------------------------------------------------

def parse_real_args(argv: list[str]):
    parser = Parser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="the folder of a chat model")
    add("--data", required=True, type=pathlib.Path, help="the folder of the files of pairs")
    add("--out", default=pathlib.Path("runs/real_model"), type=pathlib.Path,
        help="where runs and scores are kept (default runs/real_model)")
    add("--page", default=ROOT / "docs" / "real_model.md", type=pathlib.Path,
        help="the page; its pictures go into the same folder (default docs/real_model.md)")
    add("--train_rows", type=whole_number(">= 1"), default=128, help="training pairs of a run")
    add("--name", help="the name of the model on the page (default: that of its folder)")
    add("--held_out", type=whole_number(">= 1"), default=128, help="held-out pairs")
    add("--compare", type=any_name,
        help="the command of another trainer, which gets a job file and prints a JSON line per "
             "step: see tests/trl_steps.py")
    add("--only_page", action="store_true",
        help="run nothing, and write the page of the runs that have ended")
    add("--compare_steps", type=whole_number(">= 1"), default=4, help="steps of the comparison")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse_real_args(argv)
    args.model, args.out = os.path.abspath(args.model), args.out.absolute()
    (args.out / "compare").mkdir(parents=True, exist_ok=True)
    if not args.only_page:
        for name in FILES:
            split_rows(args, name)
        run_experiments(args)
        if args.compare:
            compare_trainers(args)
    write_real_page(args)


if __name__ == "__main__":
    run_script(main)
