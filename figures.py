"""Makes every picture of README and docs from runs in the world, and docs/figures.md from them.

    python figures.py                 # all pictures: about 15 minutes on one CPU core
    python figures.py frontier noise  # these two
    python figures.py book            # docs/losses.html, as python book.py

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

import book
import pictures
import results
from experiments import EXPERIMENTS, Experiment, short_numbers
from files import written_aside
from log import bar_interval

PAGE = pathlib.Path(__file__).parent / "docs" / "figures.md"
BOOK = "book"
NO_RUNS = Experiment(lambda: [], lambda settings: {})


class Section(NamedTuple):
    """A picture, and its section of the page."""
    title: str
    see: str  # what to see, in a few sentences
    draw: Callable[[list[dict]], Any]
    table: Callable[[list[dict]], tuple[str, list[list[str]]]]


FRONTIER = Section(
    "The frontier", """
A dot is a run (three seeds for each β), a line joins the means, and the gray line is the exact
optimum of eq. 3 of the DPO paper: no policy can have a higher expected true reward at its KL. The
margin losses follow the frontier, and β decides where on it a run stops. At a small β they fall
short of it. `kto_pair` and `simpo` stay visibly below it at every β. `simpo` has no reference, so a
large β does not bring it back to KL 0.
""", pictures.draw_frontier, pictures.table_frontier)
THEOREM = Section(
    "The theorem", """
A dot is one of 512 answers to one of 8 prompts. Eq. 5 of the DPO paper says that the optimal policy
for a reward has this reward as β log π/π_ref, up to a constant per prompt, which is subtracted
here. Before training all implicit rewards are 0. After DPO they are close to the true reward, which
DPO has never seen: it saw which of two answers won. The slope is slightly below 1.
""", pictures.draw_theorem, pictures.table_theorem)
BOTH_FALL = Section(
    "Both fall", """
Mean change of log π over the training pairs. EOS is scored here. If both answers of the pairs are
samples of π_ref, the mean change of all of them is E_ref[log π/π_ref] = −KL(π_ref‖π), the dotted
line, whatever the loss: **together they can only fall**. A loss decides the margin between them,
and the chosen answer falls where KL(π_ref‖π) is above half of the margin. That is no fault by
itself: at the optimum π* (last row of the table) only answers with r > β log Z rise, and the mean
chosen answer falls. The lower row is a fault: `sigmoid` compares answers only, and half of the
probability or more leaves the well-formed answers, mostly because they no longer end. (In the runs
without EOS on this page its mass stays near 1 at β = 1.) `sigmoid,sft`, `dpop` and `nca_pair` tie
the probability down. `apo_zero` keeps the mass, and its chosen answers still fall.
""", pictures.draw_both_fall, pictures.table_both_fall)
CAUSES = Section(
    "Both fall: three causes", """
**1. The chosen answer is only relatively good.** At the start, the gradient of the expected loss by
log π(y) is β/2 times (how often y is rejected − how often y is chosen). All pairs are a middling
and a bad answer (blue). With pairs in which a good answer beats a middling one (dashed), the same
middling answers are pushed down by the pairs that they lose. They fall even without these pairs:
the good answers, which are in none of the pairs, take most of the probability. **2. The answers
share much.** A small step along ∇w − ∇l changes w by the step times ‖∇w‖² − ⟨∇w, ∇l⟩. A dot is a
pair trained alone, from the reference, by 20 plain gradient steps. The more words the answers
share, the larger ⟨∇w, ∇l⟩, and the less the chosen answer rises. Near a ratio of 1 it falls, and
only pairs that share two of three words come there. **3. The policy can't tell them apart.** A
policy of few dimensions can't fit the rewards, gets a small margin, and moves both answers
together: for each nat of margin the chosen answer falls further in policies of 2, 4 and 8
dimensions than in one of 64. The seeds of size 2 differ much.
""", pictures.draw_causes, pictures.table_causes)
JUDGE = Section(
    "Judge or writer?", """
Accuracy on held-out pairs reads the sign of the margin, the expected true reward how far
probability has moved. Left: `sigmoid` with β 1 and β 4 end with the same accuracy, near that of the
true reward itself (dotted: labels are noisy), and β 1 writes far better. `kto_pair` judges worse
than `sigmoid` with β 4 and writes better. Right: pairs of the 128 answers that the reference gives
least, a tenth of its probability. Trained on them, a policy judges such pairs as well as before,
and pairs of the reference worse, and it writes nearly as well. Accuracy does not say which policy
writes better.
""", pictures.draw_judge, pictures.table_judge)
OVERFITTING = Section(
    "Overfitting", """
64 pairs, no answer in two of them, the better one always chosen. The margin of `sigmoid` has no
end, and a small β lets it grow faster. `ipo` brings every pair to its target (dotted), 1/(2β) for
each of 4 tokens. Both are as the papers say. What the growth does to other answers depends on the
pairs: the expected true reward, which 64 of 2,048,000 possible pairs hardly determine, differs more
between the seeds of `sigmoid` than of `ipo`, and is not lower on average.
""", pictures.draw_overfitting, pictures.table_overfitting)
NOISE = Section("Noise", """
A share of the labels is flipped. Each loss has its best β of a sweep, by the share of the
achievable; `cdpo` (`sigmoid` with label smoothing) and `robust` are told the true share. At their
best β, `sigmoid`, `cdpo`, `ipo` and `hinge` lose alike: a smaller or larger β corrects the noise as
well as another loss does. `robust` does worse, which its paper does not lead one to expect: it
removes the bias of the flips by amplifying each label, 16,384 labels leave much variance, and its
loss has no minimum. At 40 % no β of its sweep has a share above 0: its true reward is the highest,
at a KL of 5 nats.
""", pictures.draw_noise, pictures.table_noise)
LENGTH = Section("Length", """
Answers of one to four words. The true reward has nothing to do with length, but in the labels each
word counts as 0.8 of reward. `sigmoid` learns the accident: its answers get the longest. `rdpo` is
told the 0.8 and has the most true reward for its KL. `ld_dpo` (LD-DPO, `sigmoid` with `--ld_alpha
0.5`) gets nearly as long as `sigmoid`. The two losses of averages, `sigmoid_norm` and `simpo`, stay
shorter than `sigmoid`, and do a little better than it.
""", pictures.draw_length, pictures.table_length)
START = Section("Start", """
The derivative of `discopop` at z = 0, where the policy is the reference, pushes against the chosen
answer. A pair that is trained alone falls into the minimum near z = −0.12 and stays there, with the
wrong order. With `sigmoid` it leaves the picture at the top. In a run on all pairs other pairs
carry it over the maximum: see `discopop` in [world.md](world.md).
""", pictures.draw_start, pictures.table_start)
MISSPECIFIED = Section("Misspecified", """
192 policies with one parameter, log π = log π_ref + θ φ(y) − log Z, where φ says whether the answer
has a certain word at a certain position. No θ gives the true reward. Both θ are computed exactly,
not trained: that of the expected DPO loss, and the best one, which maximizes E[r] − β KL. With
pairs of the reference DPO's θ gains in all policies but one, which loses less than 0.001, though
less than the best θ. With pairs from 16 answers to each prompt, which a seed draws, about a quarter
of the policies end worse than the reference. So DPO may prefer the worse answers, as
arXiv:2510.20413 says, and it depends on which pairs are frequent.
""", pictures.draw_misspecified, pictures.table_misspecified)
EVERY_LOSS = Section("Every loss", """
Value and pushes of each loss of pairs against the margin, at β = 1 (other hyper-parameters at their
defaults). The policy starts with log-prob −4 for both answers, of one token, and half of the margin
is a rise of the chosen answer, half a fall of the rejected one. Losses that compare the pairs of a
batch are left out. Where blue and dashed lines agree, the loss is a function of the margin.
""", pictures.draw_every_loss, pictures.table_every_loss)

# Name of a command: its pictures, {file: section}.
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
    return results.ordered_results(name, plan, folder) if plan else []


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
        figure.savefig(temporary, format="png", metadata=metadata, pil_kwargs={"optimize": True})


def page(folder: pathlib.Path = results.FOLDER) -> str:
    """The text of docs/figures.md."""
    lines = INTRODUCTION.splitlines()
    for name, files in CATALOG.items():
        rows = rows_of(name, folder)
        for file, picture in files.items():
            lines += ["", f"## {picture.title}", "", picture.see.strip(), ""]
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

`python figures.py` makes these pictures and this page from runs in the [embedded world](world.md).
On one CPU core it takes about 15 minutes. Finished runs are kept in `figures/*.jsonl`, and the
command repeats only runs whose code has changed, so drawing takes seconds.

Every run starts at the reference and takes 60 steps of AdamW on the loss of all pairs at once:
`tree.py` computes the log-probs of all answers in one forward. A seed draws other pairs; the
reference is the same. A number is the mean over three seeds, with the smallest and the largest in
parentheses. Rewards are nats: an answer whose reward is higher by 1 wins with odds of e to 1.
Unless EOS is mentioned, answers are exactly three words and their EOS is not scored.
"""


def main(argv):
    parser = Parser(description="Make the pictures of README and docs from runs in the world")
    every = [*CATALOG, BOOK]
    parser.add_argument("names", nargs="*", metavar="NAME", default=every,
                        help=f"{', '.join(every)}; default: all")
    asked = parser.parse_args(argv).names
    unknown = [name for name in asked if name not in every]
    if unknown:
        raise UserError(f"{unknown[0]}: is no picture; there are {', '.join(every)}")
    if BOOK in asked:
        book.write_book()
        print(f"wrote {book.PAGE}")
    names = [name for name in asked if name != BOOK]
    if names:
        make_figures(names)


def make_figures(names: list[str]) -> None:
    """Make the missing runs of these pictures, the pictures, and the page."""
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
