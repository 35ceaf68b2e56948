"""Makes every picture of README and docs from runs in the world, and docs/figures.md from them.

    python figures.py                 # all pictures: about 15 minutes on one CPU core
    python figures.py frontier noise  # these two

A run takes one to seven seconds. Finished runs are kept in figures/NAME.jsonl, so an interrupted
command continues, and drawing alone takes seconds. After a change of the code of a run, the run is
repeated. experiments.py has the runs, pictures.py the drawing.
"""
from errors import Parser, UserError, reading, run_script  # first, see errors.py
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import tqdm

import pictures
import results
from experiments import EXPERIMENTS, Experiment, short_numbers
from files import written_aside
from log import bar_interval

PAGE = pathlib.Path(__file__).parent / "docs" / "figures.md"
NO_RUNS = Experiment(lambda: [], lambda settings: {})


class Picture(NamedTuple):
    """A picture file and its part of the page."""
    title: str
    see: str  # what to see, in a few sentences
    draw: Callable[[list[dict]], Any]
    table: Callable[[list[dict]], tuple[str, list[list[str]]]]


FRONTIER = Picture(
    "The frontier",
    "Each dot is a run (three seeds for each β), the gray line is the best expected true reward at "
    "that KL, computed from eq. 4 of the DPO paper. No loss can be above it.",
    pictures.draw_frontier, pictures.table_frontier)
THEOREM = Picture(
    "The theorem",
    "Eq. 5 of the DPO paper: the policy that is optimal for a reward has that reward as β log π/π_ref, "
    "up to a constant per prompt. A dot is one of the 4,096 answers.",
    pictures.draw_theorem, pictures.table_theorem)
BOTH_FALL = Picture(
    "Both fall", "", pictures.draw_both_fall, pictures.table_both_fall)
CAUSES = Picture(
    "Both fall: three causes", "", pictures.draw_causes, pictures.table_causes)
JUDGE = Picture(
    "Judge or writer?", "", pictures.draw_judge, pictures.table_judge)
OVERFITTING = Picture(
    "Overfitting", "", pictures.draw_overfitting, pictures.table_overfitting)
NOISE = Picture("Noise", "", pictures.draw_noise, pictures.table_noise)
LENGTH = Picture("Length", "", pictures.draw_length, pictures.table_length)
START = Picture("Start", "", pictures.draw_start, pictures.table_start)
MISSPECIFIED = Picture(
    "Misspecified", "", pictures.draw_misspecified, pictures.table_misspecified)
EVERY_LOSS = Picture(
    "Every loss", "", pictures.draw_every_loss, pictures.table_every_loss)

# Name of a command: its pictures, {file: picture}.
CATALOG = {
    "frontier": {"frontier": FRONTIER},
    "theorem": {"theorem": THEOREM},
    "both_fall": {"both_fall": BOTH_FALL, "both_fall_causes": CAUSES},
    "judge_or_writer": {"judge_or_writer": JUDGE},
    "overfitting": {"overfitting": OVERFITTING},
    "noise": {"noise": NOISE},
    "length": {"length": LENGTH},
    "start": {"start": START},
    "misspecified": {"misspecified": MISSPECIFIED},
    "every_loss": {"every_loss": EVERY_LOSS},
}
README = "readme"  # the picture of two panels at the top of the README


# --- Runs -----------------------------------------------------------------------------------------

def make_runs(names: list[str], folder: pathlib.Path):
    """Make the runs that are missing, and keep each when it ends."""
    waiting = []
    for name in names:
        experiment = EXPERIMENTS.get(name, NO_RUNS)
        for settings in results.missing(name, experiment.plan(), experiment.run, folder):
            waiting.append((name, settings))
    bar = tqdm.tqdm(waiting, dynamic_ncols=True, disable=not waiting, mininterval=bar_interval())
    for name, settings in bar:
        bar.set_description(name)
        run = EXPERIMENTS[name].run
        results.append(name, settings, run, short_numbers(run(settings)), folder)


def rows_of(name: str, folder: pathlib.Path = results.FOLDER) -> list[dict]:
    """The rows of all runs of a picture, in the order of the plan."""
    plan = EXPERIMENTS.get(name, NO_RUNS).plan()
    return results.tidy(name, plan, folder) if plan else []


# --- Pictures and the page ------------------------------------------------------------------------

def draw_pictures(name: str, folder: pathlib.Path):
    """Write the pictures of a name."""
    rows = rows_of(name, folder)
    for file, picture in CATALOG[name].items():
        digest = drawing_digest(picture.draw, rows)
        save_picture(picture.draw(rows), folder / f"{file}.png", digest)


def drawing_digest(drawing: Callable, *rows: list[dict]) -> str:
    """Hash what a picture depends on: the code that draws it, and the results."""
    text = results.code_digest(drawing, {}) + json.dumps(rows)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def save_picture(figure, path, digest):
    """Write a PNG. Its description is the digest, so that a test finds an old picture."""
    metadata = {"Software": None, "Description": digest}
    with reading(str(path)), written_aside(path) as temporary:
        figure.savefig(temporary, format="png", metadata=metadata)


def page(folder: pathlib.Path = results.FOLDER) -> str:
    """The text of docs/figures.md."""
    lines = INTRODUCTION.splitlines()
    for name, files in CATALOG.items():
        rows = rows_of(name, folder)
        for file, picture in files.items():
            lines += ["", f"## {picture.title}", "", picture.see, ""]
            lines += [f'<img src="../figures/{file}.png" alt="{picture.title}" width="800">', ""]
            lines += [f"`python figures.py {name}`", ""]
            lines += format_table(*picture.table(rows))
    return "\n".join(lines) + "\n"


def format_table(header: str, rows: list[list[str]]) -> list[str]:
    """The lines of a Markdown table. header has its cells between " | "."""
    rule = "---|" * len(header.split(" | "))
    return [f"| {header} |", f"|{rule}", *[f"| {' | '.join(cells)} |" for cells in rows]]


INTRODUCTION = """\
# Figures

`python figures.py` makes these pictures and this page from runs in the [embedded world](world.md), in about 15 minutes on one CPU core.
Finished runs are in `figures/*.jsonl`: the command repeats only runs whose code has changed, so drawing takes seconds.

Every run starts at the reference and takes 60 steps of AdamW on the loss of all pairs at once: `tree.py` computes the log-probs of all
answers in one forward. A seed draws other pairs; the reference is the same. A number is the mean over three seeds, with the smallest and
the largest in parentheses. Rewards are nats: a difference of 1 makes an answer win with odds of e to 1. Where no EOS is mentioned,
answers are exactly three words and their EOS is not scored.
"""


def main(argv):
    parser = Parser(description="Make the pictures of README and docs from runs in the world")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(CATALOG)}; "
                        "default: all")
    names = parser.parse_args(argv).names or list(CATALOG)
    unknown = [name for name in names if name not in CATALOG]
    if unknown:
        raise UserError(f"{unknown[0]}: is no picture; there are {', '.join(CATALOG)}")
    torch.set_num_threads(1)  # faster than two for models this small
    folder = results.FOLDER
    folder.mkdir(exist_ok=True)
    make_runs(names, folder)
    for name in names:
        draw_pictures(name, folder)
    if {"frontier", "theorem"} & set(names):
        rows = rows_of("frontier", folder), rows_of("theorem", folder)
        digest = drawing_digest(pictures.draw_readme, *rows)
        save_picture(pictures.draw_readme(*rows), folder / f"{README}.png", digest)
    with written_aside(PAGE) as temporary:
        temporary.write_text(page(folder), encoding="utf-8")
    print(f"{folder}: {', '.join(names)}; {PAGE}")


if __name__ == "__main__":
    run_script(main)
