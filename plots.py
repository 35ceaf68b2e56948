"""Draws the curves of runs from their metrics.jsonl, finished or still going on.

    python log.py runs/sigmoid --plot curves.png
    python log.py runs/sigmoid runs/ipo --plot curves.png     # one color per run

A panel shows one metric: the rows of training as a thin line, the rows of evaluations as a line
with markers in the same color. Of several evaluation sets, each has its own dashes. A metric that
no run has, such as the log-prob of rejected answers with --loss sft, has no panel. A run draws its
own curves when it ends, into curves.png.
"""
import itertools
import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from checkpoint import METRICS_FILE
from errors import UserError, reading
from files import written_aside

CURVES_FILE = "curves.png"
NO_MATPLOTLIB = "; pip install matplotlib"

# metric: title and unit of its panel, in the order of the panels
PANELS = {
    "loss": ("loss", "mean per row"),
    "rewards/accuracies": ("accuracy", "share of rows"),
    "rewards/margins": ("reward margin", "nats × β"),
    "logps/chosen": ("log-prob of chosen", "nats per answer"),
    "logps/rejected": ("log-prob of rejected", "nats per answer"),
    "grad_norm": ("gradient norm", "before clipping"),
    "rewards/chosen": ("reward of chosen", "nats × β"),
    "rewards/rejected": ("reward of rejected", "nats × β"),
    "lr": ("learning rate", "of the optimizer"),
    "world/share": ("share of the achievable", "(J − J_ref) / (J* − J_ref)"),
    "world/mass": ("mass on well-formed answers", "probability"),
    "tokens_per_second": ("speed", "tokens / s"),
}

# The colors of Okabe and Ito, which color-blind people can tell apart, without yellow and black.
# Each run has a marker of its own too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DPI = 100
COLUMNS = 3
WIDTH, HEIGHT = 9.6, 2.35  # inches: of the picture, and of a row of panels
LEGEND = 0.24  # inches: a line of the legend
LONGEST = 36  # characters of a name in the legend


# --- Read -----------------------------------------------------------------------------------------

class Curves(NamedTuple):
    """The rows of metrics.jsonl of one run."""
    name: str
    rows: list[dict]


def read_metrics(folder: str | pathlib.Path) -> list[dict]:
    """Read metrics.jsonl of a run. Half of a last line, which the run is writing, is left out."""
    path = pathlib.Path(folder) / METRICS_FILE
    if not path.is_file():
        raise UserError(f"{folder}: has no {METRICS_FILE}; give the folder of a run that has begun "
                        "to train")
    with reading(str(path)):
        text = path.read_text(encoding="utf-8")
    return parse_rows(path, text)


def parse_rows(path: pathlib.Path, text: str) -> list[dict]:
    """Parse the text of metrics.jsonl."""
    rows, lines = [], text.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        row = parse_row(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines) or line.endswith("\n"):
            raise UserError(f"{path}: line {number} is no row of a run, an object with step and "
                            "split; the file was changed")
    return rows


def parse_row(line: str) -> dict | None:
    """Parse a line of metrics.jsonl. None if it is not a row."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("split"), str):
        return None
    return row if isinstance(row.get("step"), int) else None


def series(rows: list[dict], metric: str, split: str) -> tuple[list, list]:
    """Return steps and values of a metric in the rows of a split. A value that is no finite number
    leaves a gap in its line."""
    steps, values = [], []
    for row in rows:
        if metric not in row or row["split"] != split:
            continue
        value = row[metric]
        drawn = isinstance(value, (int, float)) and math.isfinite(value)
        steps.append(row["step"])
        values.append(value if drawn else math.nan)
    return steps, values


def evaluation_splits(runs: list[Curves]) -> dict[str, str]:
    """Return {split: dashes of its line} of all evaluation sets of these runs. The metrics of the
    world are those of no set, so they have the line of a single set."""
    names = {"eval": 0, "world": 0}
    for run in runs:
        for row in run.rows:
            if row["split"].startswith("eval/"):
                names.setdefault(row["split"], len(names) - 2)
    return {split: DASHES[number % len(DASHES)] for split, number in names.items()}


def named_runs(folders: Sequence[str]) -> list[Curves]:
    """Read runs. Each is named by its folder; by the whole path if two folders have one name."""
    names = [pathlib.Path(os.path.abspath(folder)).name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs = []
    for name, folder in zip(names, folders):
        rows = read_metrics(folder)
        if not rows:
            print(f"{folder}: has no row yet")
        runs.append(Curves(name, rows))
    return runs


# --- Draw -----------------------------------------------------------------------------------------

def draw_curves(runs: list[Curves]) -> Any:
    """Draw the panels of these runs. Returns a matplotlib figure."""
    with reading("the curves cannot be drawn", NO_MATPLOTLIB):
        from matplotlib.figure import Figure

    found, last_step = set(), 1
    for row in itertools.chain(*[run.rows for run in runs]):
        found.update(row)
        last_step = max(last_step, row["step"])
    metrics = [metric for metric in PANELS if metric in found]
    if not metrics:
        raise UserError("there is no row to draw yet")

    rows = math.ceil(len(metrics) / COLUMNS)
    entries = list_legend(runs)
    legend_lines = math.ceil(len(entries) / COLUMNS)
    top = 0.15 + LEGEND * legend_lines  # inches above the panels
    height = top + HEIGHT * rows
    figure = Figure(figsize=(WIDTH, height), dpi=DPI)
    # Fixed margins: matplotlib's automatic layouts draw everything twice.
    figure.subplots_adjust(left=0.075, right=0.99, bottom=0.45 / height,
                           top=1 - (top + 0.3) / height, wspace=0.3, hspace=0.5)
    splits = evaluation_splits(runs)
    for number, metric in enumerate(metrics, 1):
        panel = figure.add_subplot(rows, COLUMNS, number)
        draw_panel(panel, runs, metric, splits)
        panel.set_xlim(0, 1.02 * last_step)
        if number > len(metrics) - COLUMNS:
            panel.set_xlabel("optimizer step", fontsize=9)
    add_legend(figure, entries)
    return figure


def style(number: int) -> dict:
    """Return color and marker of a run. After six runs the colors repeat, with another marker."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)]}


def draw_panel(panel, runs, metric, splits):
    """Draw one metric of all runs. `splits` has the dashes of each evaluation set."""
    title, unit = PANELS[metric]
    for number, run in enumerate(runs):
        look = style(number)
        steps, values = series(run.rows, metric, "train")
        panel.plot(steps, values, color=look["color"], linewidth=0.8, alpha=0.6)
        for split, dashes in splits.items():
            steps, values = series(run.rows, metric, split)
            if steps:
                panel.plot(steps, values, linewidth=1.6, linestyle=dashes, markersize=4.5,
                           markeredgecolor="white", markeredgewidth=0.6, **look)
    panel.set_title(title, fontsize=10, fontweight="bold", loc="left", pad=6)
    panel.set_ylabel(unit, fontsize=8)
    panel.tick_params(labelsize=8)
    panel.grid(color="0.9")
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    # Powers of ten in the labels themselves: their usual place is that of the title.
    panel.xaxis.set_major_locator(integer_steps())
    panel.yaxis.set_major_formatter(short_number)


def integer_steps():
    """Make the locator of the steps, which are whole numbers."""
    from matplotlib.ticker import MaxNLocator
    return MaxNLocator(nbins=5, integer=True)


def short_number(value: float, position: int | None = None) -> str:
    """Format the label of a tick: 0.25, -120, 12k, 5e-7."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.6g}k"
    text = f"{value:.4g}".replace("e-0", "e-")
    return text.replace("-", "−", 1) if text.startswith("-") else text


def list_legend(runs: list[Curves]) -> list[tuple[str, dict]]:
    """List the names of the legend, with the properties of their lines: the colors of the runs, and
    once for all panels the kinds of line."""
    entries = []
    for number, run in enumerate(runs):
        is_long = len(run.name) > LONGEST
        name = f"…{run.name[-LONGEST:]}" if is_long else run.name
        entries.append((name, {"linewidth": 1.6, **style(number)}))
    entries.append(("thin: training", {"color": "0.35", "linewidth": 0.8}))
    sets = evaluation_splits(runs)
    named = [split for split in sets if "/" in split]
    for split in named or ["eval"]:
        name = split.partition("/")[2][:LONGEST]
        title = f"held out: {name}" if name else "with markers: held out"
        look = {"color": "0.35", "linewidth": 1.6, "marker": "o", "markersize": 4.5}
        entries.append((title, look | {"linestyle": sets[split]}))
    return entries


def add_legend(figure, entries):
    """Name the lines once for all panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **look) for _, look in entries]
    legend = figure.legend(handles, ["name"] * len(entries), loc="upper left", ncols=COLUMNS,
                           bbox_to_anchor=(0.06, 1), fontsize=9, frameon=False)
    # matplotlib leaves out a label that begins with _, and reads formulas between dollar signs.
    for text, (name, _) in zip(legend.get_texts(), entries):
        text.set_parse_math(False)
        text.set_text(name)


def plot_runs(folders: Sequence[str], path: str) -> None:
    """Draw the curves of these runs into a picture. Its name says which format."""
    figure = draw_curves(named_runs(folders))
    with reading(f"--plot {path}"):
        figure.savefig(path)


def write_curves(folder: pathlib.Path) -> None:
    """Draw the curves of a run into its folder. Without matplotlib, a line says so: a run does not
    fail because of a picture."""
    try:
        figure = draw_curves([Curves(folder.name, read_metrics(folder))])
        with written_aside(folder / CURVES_FILE) as temporary, reading("matplotlib"):
            figure.savefig(temporary)
    except UserError as error:
        print(f"{folder / CURVES_FILE} is not written: {error}")
