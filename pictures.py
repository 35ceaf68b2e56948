"""Draws the pictures of figures.py from the rows of their runs, and sums the rows up in tables.

    picture = PICTURES["frontier"]
    picture.draw(rows)      # a matplotlib figure, white in a light and in a dark page
    picture.table(rows)     # rows of text for docs/figures.md, the first is the header

Every color has a marker, a line style or a label of its own too. A line is the mean over the seeds;
dots or a band show each seed or the smallest and the largest of them.
"""
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import world
from errors import reading
from experiments import FLIPS, SEEDS, optimal_frontier
from losses import LOSSES, hyperparameters
from plots import COLORS, MARKERS, NO_MATPLOTLIB
from registry import kind_of, tensor_arguments

WIDTH, DPI = 8.0, 130  # inches, dots per inch
GRAY = "0.45"
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = COLORS


class Picture(NamedTuple):
    title: str
    see: str  # what to see, in a sentence or three
    draw: Callable[[list[dict]], Any]
    table: Callable[[list[dict]], list[list[str]]]


# --- Rows -----------------------------------------------------------------------------------------

def select(rows: list[dict], **settings) -> list[dict]:
    """The results of the rows with these settings, in the order of the seeds."""
    found = []
    for row in rows:
        if all(row["settings"].get(name) == value for name, value in settings.items()):
            found.append(row["result"])
    return found


def values_of(results: list[dict], name: str) -> torch.Tensor:
    """One number of each result, or one curve of each: (seeds, ...)."""
    return torch.tensor([result[name] for result in results], dtype=torch.float64)


def settings_of(rows: list[dict], name: str) -> list:
    """The different values of a setting, in the order of the rows."""
    return list(dict.fromkeys(row["settings"].get(name) for row in rows))


def spread(values: torch.Tensor, digits: int = 2) -> str:
    """"1.20 (1.18 to 1.23)": mean, smallest and largest."""
    low, mean, high = values.min(), values.mean(), values.max()
    texts = [f"{number:.{digits}f}".replace("-", "−") for number in (mean, low, high)]
    if texts[1] == texts[2]:
        return texts[0]
    return f"{texts[0]} ({texts[1]} to {texts[2]})"


# --- Canvas ---------------------------------------------------------------------------------------

def canvas(rows: int, columns: int, height: float, **options):
    """Make a white figure and its panels, as a flat list."""
    with reading("the pictures cannot be drawn", NO_MATPLOTLIB):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()
    for panel in panels:
        panel.grid(color="0.92", linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    return figure, panels


def label(panel, title="", x="", y="", size=9):
    """Name the axes. A title is on the left, above the panel."""
    panel.set_title(title, fontsize=size, fontweight="bold", loc="left")
    panel.set_xlabel(x, fontsize=8)
    panel.set_ylabel(y, fontsize=8)


def note(panel, x, y, text, color="black", **options):
    """Write a label next to a line, in the units of the panel."""
    options = {"fontsize": 8, "va": "center"} | options
    panel.text(x, y, text, color=color, **options)


def draw_curves_of_seeds(panel, curves, column, color, style="-", **options):
    """Draw the mean over seeds of a column of curves (seeds, steps, columns), and a band from the
    smallest to the largest. Column 0 is the step."""
    steps, values = curves[0, :, 0], curves[:, :, column]
    panel.plot(steps, values.mean(0), style, color=color, linewidth=1.6, **options)
    panel.fill_between(steps, values.amin(0), values.amax(0), color=color, alpha=0.2, linewidth=0)
    return values.mean(0)[-1].item()


# --- The frontier ---------------------------------------------------------------------------------

OPTIMAL_BETAS = [2 ** (exponent / 4) for exponent in range(-16, 13)]


def draw_frontier_panel(panel, rows, loss, color, marker):
    """Draw the exact frontier, and E[r] against KL of a loss: a dot is a seed, the line is the mean
    for each beta."""
    panel.plot(*zip(*optimal_frontier(OPTIMAL_BETAS)), color=GRAY, linewidth=1.4)
    means = []
    for beta in settings_of([row for row in rows if row["settings"]["loss"] == loss], "beta"):
        results = select(rows, loss=loss, beta=beta)
        kl, reward = values_of(results, "kl"), values_of(results, "reward")
        panel.plot(kl, reward, marker, color=color, markersize=3.5, alpha=0.6)
        means.append([kl.mean(), reward.mean(), beta])
    panel.plot(*zip(*[point[:2] for point in means]), color=color, linewidth=1.4)
    panel.set_xlim(0, 7)
    panel.set_ylim(-0.2, 6)
    return means


def draw_frontier(rows):
    losses = settings_of(rows, "loss")
    figure, panels = canvas(2, math.ceil(len(losses) / 2), 4.4, sharex=True, sharey=True)
    for number, (panel, loss) in enumerate(zip(panels, losses)):
        color = COLORS[number % len(COLORS)]
        means = draw_frontier_panel(panel, rows, loss, color, MARKERS[number % len(MARKERS)])
        for kl, reward, beta in (means[0], means[-1]):
            note(panel, kl + 0.25, reward - 0.35, f"β {beta:g}", color, fontsize=7)
        label(panel, loss)
    note(panels[0], 2.2, 5.5, "exact optimum", GRAY)
    figure.supxlabel("KL to the reference [nats per answer]", fontsize=9)
    figure.supylabel("expected true reward", fontsize=9)
    return figure


def table_frontier(rows):
    lines = [["loss", "β", "expected true reward", "KL [nats]", "optimum at this KL", "mass"]]
    curve = optimal_frontier([2 ** (exponent / 40) for exponent in range(-240, 160)])
    for loss in settings_of(rows, "loss"):
        for beta in settings_of([row for row in rows if row["settings"]["loss"] == loss], "beta"):
            results = select(rows, loss=loss, beta=beta)
            kl = values_of(results, "kl")
            best = interpolate(curve, kl.mean().item())
            cells = [spread(values_of(results, "reward")), spread(kl), f"{best:.2f}"]
            lines.append([f"`{loss}`", f"{beta:g}", *cells, spread(values_of(results, "mass"))])
    return lines


def interpolate(curve, x):
    """The value at x of a curve [[x, y], ...] with falling x."""
    for (right, high), (left, low) in zip(curve, curve[1:]):
        if left <= x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return math.nan


# --- The theorem ----------------------------------------------------------------------------------

def draw_theorem_panel(panel, implicit):
    """Draw the implicit reward of all answers against the true one. Both are centered per prompt."""
    truth = world.true_reward()
    panel.plot([-7, 7], [-7, 7], color=GRAY, linewidth=1)
    panel.scatter(truth.flatten(), implicit.flatten(), s=3, color=BLUE, alpha=0.25, linewidths=0)
    panel.set_xlim(-7, 7)
    panel.set_ylim(-7, 7)


def implicit_rewards(rows):
    """The implicit rewards that the first seed keeps, (X, A)."""
    kept = torch.tensor(rows[0]["result"]["implicit_times_100"], dtype=torch.float64) / 100
    return kept.view(len(world.THINGS), -1)


def draw_theorem(rows):
    figure, panels = canvas(1, 2, 3.6, sharey=True)
    implicit = implicit_rewards(rows)
    draw_theorem_panel(panels[0], torch.zeros_like(implicit))
    draw_theorem_panel(panels[1], implicit)
    label(panels[0], "before: policy = reference", "true reward r", "implicit reward β log π/π_ref")
    label(panels[1], "after DPO", "true reward r")
    correlation = values_of(select(rows), "correlation").mean()
    note(panels[1], -6.5, 6, f"correlation {correlation:.2f}")
    note(panels[1], 4, 6.3, "equal", GRAY, ha="right")
    return figure


def table_theorem(rows):
    lines = [["seed", "correlation over all answers", "slope"]]
    for row in rows:
        result = row["result"]
        numbers = [f"{result['correlation']:.3f}", f"{result['slope']:.2f}"]
        lines.append([str(row["settings"]["seed"]), *numbers])
    return lines


def draw_readme(rows):
    """The picture at the top of the README: frontier of DPO, and theorem."""
    figure, panels = canvas(1, 2, 3.7)
    means = draw_frontier_panel(panels[0], rows["frontier"], "sigmoid", ORANGE, "o")
    for kl, reward, beta in means:
        note(panels[0], kl + 0.2, reward - 0.3, f"β = {beta:g}", ORANGE)
    note(panels[0], 1.3, 4.9, "the best possible\n(computed exactly)", GRAY, ha="center")
    label(panels[0], "DPO reaches the frontier", "KL to the reference [nats per answer]",
          "expected true reward")
    draw_theorem_panel(panels[1], implicit_rewards(rows["theorem"]))
    correlation = values_of(select(rows["theorem"]), "correlation").mean()
    note(panels[1], -6.5, 6, f"all 4,096 answers, correlation {correlation:.2f}")
    label(panels[1], "and recovers the reward it never saw", "true reward r",
          "implicit reward β log π/π_ref")
    return figure


# --- Both fall ------------------------------------------------------------------------------------

CHANGES = {1: ("chosen", BLUE, "-"), 2: ("rejected", ORANGE, "--")}  # column: name and look


def draw_changes(panel, curves):
    """Draw the mean changes of both log-probs, and minus the KL divergence of π from π_ref."""
    for column, (_, color, style) in CHANGES.items():
        draw_curves_of_seeds(panel, curves, column, color, style)
    panel.plot(curves[0, :, 0], -curves[:, :, 3].mean(0), ":", color="black", linewidth=1.2)
    panel.axhline(0, color=GRAY, linewidth=0.8)


def draw_both_fall(rows):
    losses = [loss for loss in settings_of(rows, "loss") if loss]
    figure, panels = canvas(2, len(losses), 4.0, sharex=True, sharey="row",
                            height_ratios=[2, 1])
    for number, loss in enumerate(losses):
        curves = values_of(select(rows, loss=loss), "curve")
        top, bottom = panels[number], panels[len(losses) + number]
        draw_changes(top, curves)
        draw_curves_of_seeds(bottom, curves, 4, GREEN)
        bottom.set_ylim(0, 1.05)
        label(top, loss)
        label(bottom, x="step")
    panels[0].set_ylabel("change of log π [nats]", fontsize=8)
    panels[len(losses)].set_ylabel("mass on answers", fontsize=8)
    note(panels[1], 5, 1.2, "chosen", BLUE)
    note(panels[1], 5, -2.2, "rejected", ORANGE)
    note(panels[0], 8, 0.8, "−KL(π_ref‖π)", "black")
    return figure


def table_both_fall(rows):
    lines = [["loss", "change of chosen [nats]", "of rejected", "of both, mean",
              "−KL(π_ref‖π)", "mass"]]
    for loss in settings_of(rows, "loss"):
        if loss:
            ends = values_of(select(rows, loss=loss), "curve")[:, -1]  # (seeds, columns)
            both = (ends[:, 1] + ends[:, 2]) / 2
            columns = [ends[:, 1], ends[:, 2], both, -ends[:, 3], ends[:, 4]]
            lines.append([f"`{loss}`", *[spread(column) for column in columns]])
    optimum = values_of(select(rows, loss="sigmoid"), "at_optimum")
    return lines + [["π* for β = 1", spread(optimum[:, 0]), spread(optimum[:, 1]),
                     spread(optimum.mean(-1)), "", "1.00"]]


def draw_causes(rows):
    figure, panels = canvas(1, 3, 3.2)
    draw_relative(panels[0], rows)
    draw_shared(panels[1], rows)
    draw_alike(panels[2], rows)
    return figure


def draw_relative(panel, rows):
    for with_better, color, style in ((False, BLUE, "-"), (True, PINK, "--")):
        curves = values_of(select(rows, cause="relative", with_better=with_better), "curve")
        end = draw_curves_of_seeds(panel, curves, 1, color, style)
        text = "and pairs where they lose" if with_better else "only pairs where they win"
        note(panel, 58, end + (0.12 if not with_better else -0.14), text, color, ha="right")
    panel.axhline(0, color=GRAY, linewidth=0.8)
    label(panel, "1  only relatively good", "step", "change of log π(middling) [nats]")


def draw_shared(panel, rows):
    for number, shared in enumerate((0, 1, 2)):
        points = values_of(select(rows, cause="shared", shared=shared), "pairs").flatten(0, 1)
        panel.plot(points[:, 0], points[:, 1], MARKERS[number], color=COLORS[number],
                   markersize=3, alpha=0.7, label=f"{shared} words shared")
    panel.axhline(0, color=GRAY, linewidth=0.8)
    panel.legend(fontsize=7, frameon=False, handletextpad=0.1, loc="upper right")
    label(panel, "2  much shared", "⟨∇w, ∇l⟩ / ‖∇w‖²", "change of log π(chosen) [nats]")


def draw_alike(panel, rows):
    sizes = [size for size in settings_of(rows, "hidden_size") if size]
    for column, (name, color, style) in CHANGES.items():
        ends = [values_of(select(rows, cause="alike", hidden_size=size), "curve")[:, -1, column]
                for size in sizes]
        means = [end.mean() for end in ends]
        panel.plot(sizes, means, style, color=color, marker=MARKERS[column], markersize=4)
        for size, end in zip(sizes, ends):
            panel.plot([size] * len(end), end, ".", color=color, markersize=3, alpha=0.6)
        note(panel, sizes[-1], means[-1] + 0.13, name, color, ha="right")
    panel.axhline(0, color=GRAY, linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    label(panel, "3  can't tell apart", "hidden size of the policy", "change of log π [nats]")


def table_causes(rows):
    lines = [["variant", "change of chosen [nats]", "of rejected", "more"]]
    for with_better in (False, True):
        ends = values_of(select(rows, cause="relative", with_better=with_better), "curve")[:, -1]
        name = "with pairs where they lose" if with_better else "only pairs where they win"
        lines.append([f"middling answers, {name}", spread(ends[:, 1]), spread(ends[:, 2]), ""])
    for shared in (0, 1, 2):
        points = values_of(select(rows, cause="shared", shared=shared), "pairs")
        falls = 100 * (points[:, :, 1] < 0).double().mean(-1)
        changes = [spread(points[:, :, column].mean(-1)) for column in (1, 2)]
        more = f"chosen falls in {spread(falls, 0)} % of the pairs"
        lines.append([f"{shared} of 3 words shared", *changes, more])
    for size in settings_of(rows, "hidden_size"):
        if size:
            results = select(rows, cause="alike", hidden_size=size)
            ends = values_of(results, "curve")[:, -1]
            accuracy = spread(values_of(results, "accuracy"))
            more = f"accuracy {accuracy}, mass {spread(ends[:, 4])}"
            lines.append([f"hidden size {size}", spread(ends[:, 1]), spread(ends[:, 2]), more])
    return lines
