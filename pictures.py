"""Draws the pictures of figures.py from the rows of their runs, and sums the rows up in tables.

    picture = PICTURES["frontier"]
    picture.draw(rows)      # a matplotlib figure, white in a light and in a dark page
    picture.table(rows)     # rows of text for docs/figures.md, the first is the header

Every color has a marker, a line style or a label of its own too. A line is the mean over the seeds;
dots or a band show each seed, or the smallest and the largest of them.
"""
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import world
from errors import reading
from experiments import SHARED_WORDS, optimal_frontier
from losses import LOSSES, hyperparameters
from plots import COLORS, MARKERS, NO_MATPLOTLIB
from registry import kind_of, tensor_arguments

WIDTH, DPI = 8.0, 130  # inches, dots per inch
GRAY = "0.45"
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = COLORS
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))


class Picture(NamedTuple):
    title: str
    see: str  # what to see
    draw: Callable[[list[dict]], Any]
    table: Callable[[list[dict]], list[list[str]]]


# --- Rows -----------------------------------------------------------------------------------------

def with_settings(rows: list[dict], **settings) -> list[dict]:
    """The rows with these settings."""
    found = []
    for row in rows:
        if all(row["settings"].get(name) == value for name, value in settings.items()):
            found.append(row)
    return found


def values_of(rows: list[dict], name: str) -> torch.Tensor:
    """A number of each result, (seeds,), or a curve of each, (seeds, steps, columns)."""
    return torch.tensor([row["result"][name] for row in rows], dtype=torch.float64)


def last_of(rows: list[dict], column: int) -> torch.Tensor:
    """The end of a column of the curves, (seeds,)."""
    return values_of(rows, "curve")[:, -1, column]


def settings_of(rows: list[dict], name: str) -> list:
    """The different values of a setting, without the rows that lack it."""
    values = [row["settings"].get(name) for row in rows]
    return [value for value in dict.fromkeys(values) if value is not None]


def spread(values: torch.Tensor, digits: int = 2) -> str:
    """"1.20 (1.18 to 1.23)": mean, smallest and largest."""
    numbers = values.mean(), values.min(), values.max()
    mean, low, high = [decimal(number, digits) for number in numbers]
    if low == high:
        return mean
    return f"{mean} ({low} to {high})"


def decimal(number: float, digits: int) -> str:
    """A number with a minus sign, and no minus before a zero."""
    text = f"{float(number):.{digits}f}"
    if not float(text):
        text = text.lstrip("-")
    return text.replace("-", "−")


# --- Panels ---------------------------------------------------------------------------------------

def canvas(rows: int, columns: int, height: float, **options):
    """Make a white figure -> the figure, its panels as a flat list."""
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


def name_axes(panel, title="", x="", y=""):
    panel.set_title(title, fontsize=9, fontweight="bold", loc="left")
    panel.set_xlabel(x, fontsize=8)
    panel.set_ylabel(y, fontsize=8)


def write(panel, x, y, text, color="black", **options):
    """Write a label next to a line, in the units of the panel."""
    options = {"fontsize": 8, "va": "center"} | options
    panel.text(x, y, text, color=color, **options)


def zero_line(panel):
    panel.axhline(0, color=GRAY, linewidth=0.8)


def draw_band(panel, rows, column, color, style="-"):
    """Draw a column of the curves against the step, column 0. Returns the mean at the end."""
    curves = values_of(rows, "curve")  # (seeds, steps, columns)
    steps, values = curves[0, :, 0], curves[:, :, column]
    mean = values.mean(0)
    panel.plot(steps, mean, linestyle=style, color=color, linewidth=1.6)
    low, high = values.amin(0), values.amax(0)
    panel.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
    return mean[-1].item()


def draw_sweep(panel, groups, x, y, look):
    """Draw two numbers of the results: a dot for each seed, a line through the means of groups of
    rows. Returns the means."""
    means = []
    for rows in groups:
        across, up = values_of(rows, x), values_of(rows, y)
        panel.plot(across, up, look["marker"], color=look["color"], markersize=3.5, alpha=0.6)
        means.append((across.mean().item(), up.mean().item()))
    across, up = zip(*means)
    panel.plot(across, up, look.get("style", "-"), color=look["color"], linewidth=1.4)
    return means


def look_of(number: int) -> dict:
    """Color, marker and line style of the n-th line of a panel."""
    names = ("color", "marker", "style")
    tables = (COLORS, MARKERS, STYLES)
    return {name: table[number % len(table)] for name, table in zip(names, tables)}


def by_beta(rows, **settings):
    """-> the betas of the rows with these settings, and the rows of each beta."""
    rows = with_settings(rows, **settings)
    betas = settings_of(rows, "beta")
    return betas, [with_settings(rows, beta=beta) for beta in betas]


# --- The frontier ---------------------------------------------------------------------------------

OPTIMAL_BETAS = [2 ** (exponent / 4) for exponent in range(-14, 13)]
KL_AXIS = "KL to the reference [nats per answer]"
REWARD_AXIS = "expected true reward"


def draw_frontier_panel(panel, rows, loss, look):
    """Draw the exact frontier and the runs of a loss -> betas, and [(KL, reward), ...]."""
    kls, rewards = zip(*optimal_frontier(OPTIMAL_BETAS))
    panel.plot(kls, rewards, color=GRAY, linewidth=1.4)
    betas, groups = by_beta(rows, loss=loss)
    means = draw_sweep(panel, groups, "kl", "reward", look)
    panel.set_xlim(0, 6.5)
    panel.set_ylim(-0.2, 5.8)
    return betas, means


def draw_frontier(rows):
    losses = settings_of(rows, "loss")
    columns = math.ceil(len(losses) / 2)
    figure, panels = canvas(2, columns, 4.4, sharex=True, sharey=True)
    for number, (panel, loss) in enumerate(zip(panels, losses)):
        look = look_of(number) | {"style": "-"}
        betas, means = draw_frontier_panel(panel, rows, loss, look)
        for end in (0, -1):
            kl, reward = means[end]
            write(panel, kl + 0.3, reward - 0.4, f"β {betas[end]:g}", look["color"], fontsize=7)
        name_axes(panel, loss)
    write(panels[0], 0.2, 5.4, "gray: exact optimum", GRAY, fontsize=7)
    figure.supxlabel(KL_AXIS, fontsize=9)
    figure.supylabel(REWARD_AXIS, fontsize=9)
    return figure


def table_frontier(rows):
    lines = [["loss", "β", "expected true reward", "KL [nats]", "optimum at this KL", "mass"]]
    curve = optimal_frontier([2 ** (exponent / 40) for exponent in range(-240, 160)])
    for loss in settings_of(rows, "loss"):
        for beta, group in zip(*by_beta(rows, loss=loss)):
            kl = values_of(group, "kl")
            best = interpolate(curve, kl.mean().item())
            cells = [spread(values_of(group, "reward")), spread(kl), decimal(best, 2)]
            lines.append([f"`{loss}`", f"{beta:g}", *cells, spread(values_of(group, "mass"))])
    return lines


def interpolate(curve, x):
    """The height at x of a curve [[x, y], ...] whose x fall."""
    for (right, high), (left, low) in zip(curve, curve[1:]):
        if left <= x <= right:
            return low + (high - low) * (x - left) / (right - left)
    return math.nan


# --- The theorem ----------------------------------------------------------------------------------

IMPLICIT_AXIS = "implicit reward β log π/π_ref"


def draw_theorem_panel(panel, implicit):
    """Draw the implicit reward of all answers against the true one, both centered per prompt."""
    truth = world.true_reward().flatten()
    panel.plot([-7, 7], [-7, 7], color=GRAY, linewidth=1)
    panel.scatter(truth, implicit.flatten(), s=3, color=BLUE, alpha=0.25, linewidths=0)
    panel.set_xlim(-7, 7)
    panel.set_ylim(-7, 7)


def implicit_rewards(rows):
    """The implicit rewards that the first seed keeps, (X, A)."""
    kept = torch.tensor(rows[0]["result"]["implicit_times_100"], dtype=torch.float64)
    return kept.view(len(world.THINGS), -1) / 100


def draw_theorem(rows):
    figure, panels = canvas(1, 2, 3.6, sharey=True)
    implicit = implicit_rewards(rows)
    draw_theorem_panel(panels[0], torch.zeros_like(implicit))
    draw_theorem_panel(panels[1], implicit)
    name_axes(panels[0], "before: policy = reference", "true reward r", IMPLICIT_AXIS)
    name_axes(panels[1], "after DPO", "true reward r")
    correlation = values_of(rows, "correlation").mean()
    write(panels[1], -6.5, 6, f"correlation {correlation:.2f}")
    write(panels[1], 3.6, 5.6, "gray: equal", GRAY, ha="right")
    return figure


def table_theorem(rows):
    lines = [["seed", "correlation over all answers", "slope"]]
    for row in rows:
        correlation, slope = row["result"]["correlation"], row["result"]["slope"]
        lines.append([str(row["settings"]["seed"]), decimal(correlation, 3), decimal(slope, 2)])
    return lines


def draw_readme(frontier_rows, theorem_rows):
    """The picture at the top of the README: the frontier of DPO, and the theorem."""
    figure, panels = canvas(1, 2, 3.7)
    look = {"color": ORANGE, "marker": "o"}
    betas, means = draw_frontier_panel(panels[0], frontier_rows, "sigmoid", look)
    for beta, (kl, reward) in zip(betas, means):
        write(panels[0], kl + 0.2, reward - 0.3, f"β = {beta:g}", ORANGE)
    write(panels[0], 0.3, 5.1, "gray: the best possible,\ncomputed exactly", GRAY)
    name_axes(panels[0], "DPO comes close to the best possible", KL_AXIS, REWARD_AXIS)
    draw_theorem_panel(panels[1], implicit_rewards(theorem_rows))
    correlation = values_of(theorem_rows, "correlation").mean()
    write(panels[1], -6.5, 6.2, f"4,096 answers, correlation {correlation:.2f}")
    name_axes(panels[1], "and finds a reward that it never saw", "true reward r", IMPLICIT_AXIS)
    return figure


# --- Both fall ------------------------------------------------------------------------------------

CHOSEN, REJECTED, FORWARD_KL, MASS = 1, 2, 3, 4  # columns of the curves
SIDES = {CHOSEN: ("chosen", BLUE, "-"), REJECTED: ("rejected", ORANGE, "--")}
CHANGE_AXIS = "change of log π [nats]"


def draw_both_fall(rows):
    losses = settings_of(rows, "loss")
    options = {"sharex": True, "sharey": "row", "height_ratios": [2, 1]}
    figure, panels = canvas(2, len(losses), 4.0, **options)
    for loss, top, bottom in zip(losses, panels, panels[len(losses):]):
        group = with_settings(rows, loss=loss)
        for column, (_, color, style) in SIDES.items():
            draw_band(top, group, column, color, style)
        curves = values_of(group, "curve")
        top.plot(curves[0, :, 0], -curves[:, :, FORWARD_KL].mean(0), ":", color="black")
        zero_line(top)
        draw_band(bottom, group, MASS, GREEN)
        bottom.set_ylim(0, 1.05)
        name_axes(top, loss)
        name_axes(bottom, x="step")
    panels[0].set_ylabel(CHANGE_AXIS, fontsize=8)
    panels[len(losses)].set_ylabel("mass on answers", fontsize=8)
    write(panels[1], 8, 0.45, "chosen", BLUE)
    write(panels[1], 8, -1.1, "rejected", ORANGE)
    write(panels[3], 8, -3.0, "dotted:\n−KL(π_ref‖π)", "black")
    return figure


def table_both_fall(rows):
    lines = [["loss", "change of chosen [nats]", "of rejected", "mean of both",
              "−KL(π_ref‖π)", "mass"]]
    for loss in settings_of(rows, "loss"):
        group = with_settings(rows, loss=loss)
        chosen, rejected = last_of(group, CHOSEN), last_of(group, REJECTED)
        columns = [chosen, rejected, (chosen + rejected) / 2, -last_of(group, FORWARD_KL)]
        columns.append(last_of(group, MASS))
        lines.append([f"`{loss}`", *[spread(column) for column in columns]])
    optimum = values_of(with_settings(rows, loss="sigmoid"), "at_optimum")
    columns = [optimum[:, 0], optimum[:, 1], optimum.mean(-1)]
    lines.append(["π* for β = 1", *[spread(column) for column in columns], "", "1.00"])
    return lines


# --- Both fall: three causes ----------------------------------------------------------------------

def draw_causes(rows):
    figure, panels = canvas(1, 3, 3.2)
    draw_relative(panels[0], rows)
    draw_shared(panels[1], rows)
    draw_alike(panels[2], rows)
    return figure


def draw_relative(panel, rows):
    texts = {False: "only pairs that it wins", True: "and pairs that it loses"}
    for with_better, text in texts.items():
        group = with_settings(rows, cause="relative", with_better=with_better)
        look = look_of(int(with_better))
        end = draw_band(panel, group, CHOSEN, look["color"], look["style"])
        write(panel, 60, end + 0.1, text, look["color"], ha="right")
    zero_line(panel)
    name_axes(panel, "1  only relatively good", "step", "change of log π(middling) [nats]")


def draw_shared(panel, rows):
    for number, shared in enumerate(SHARED_WORDS):
        look = look_of(number)
        points = values_of(with_settings(rows, cause="shared", shared=shared), "pairs")
        points = points.flatten(0, 1)  # (pairs, 3)
        panel.plot(points[:, 0], points[:, 1], look["marker"], color=look["color"], alpha=0.7,
                   markersize=3, label=f"{shared} words shared")
    zero_line(panel)
    panel.legend(fontsize=7, frameon=False, handletextpad=0.1, loc="upper right")
    name_axes(panel, "2  much shared", "⟨∇w, ∇l⟩ / ‖∇w‖²", "change of log π(chosen) [nats]")


def draw_alike(panel, rows):
    sizes = settings_of(rows, "hidden_size")
    groups = [with_settings(rows, hidden_size=size) for size in sizes]
    for column, (name, color, style) in SIDES.items():
        ends = [last_of(group, column) for group in groups]
        for size, end in zip(sizes, ends):
            panel.plot([size] * len(end), end, MARKERS[column], color=color, markersize=3)
        means = [end.mean().item() for end in ends]
        panel.plot(sizes, means, style, color=color, linewidth=1.4)
        write(panel, sizes[-1], means[-1] + 0.12, name, color, ha="right")
    zero_line(panel)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    name_axes(panel, "3  can't tell apart", "hidden size of the policy", CHANGE_AXIS)


def table_causes(rows):
    lines = [["variant", "change of chosen [nats]", "of rejected", "also"]]
    for with_better in (False, True):
        group = with_settings(rows, cause="relative", with_better=with_better)
        name = "and pairs that it loses" if with_better else "only pairs that it wins"
        changes = [spread(last_of(group, column)) for column in SIDES]
        lines.append([f"1: middling answer, {name}", *changes, ""])
    for shared in SHARED_WORDS:
        points = values_of(with_settings(rows, cause="shared", shared=shared), "pairs")
        falls = 100 * (points[:, :, CHOSEN] < 0).double().mean(-1)
        changes = [spread(points[:, :, column].mean(-1)) for column in SIDES]
        also = f"chosen falls in {spread(falls, 0)} % of the pairs"
        lines.append([f"2: {shared} of 3 words shared", *changes, also])
    for size in settings_of(rows, "hidden_size"):
        group = with_settings(rows, hidden_size=size)
        changes = [spread(last_of(group, column)) for column in SIDES]
        accuracy, mass = spread(values_of(group, "accuracy")), spread(last_of(group, MASS))
        also = f"accuracy {accuracy}, mass {mass}"
        lines.append([f"3: hidden size {size}", *changes, also])
    return lines


# --- Judge or writer ------------------------------------------------------------------------------

HELD_OUT, OWN, REWARD = 1, 2, 3  # columns of the curves


def draw_paths(panel, groups):
    """Draw E[r] against accuracy on held-out pairs of the reference, over training."""
    for number, (name, group) in enumerate(groups.items()):
        look = look_of(number)
        curves = values_of(group, "curve")[:, 1:]  # before the first step every pair is a tie
        mean = curves.mean(0)
        panel.plot(mean[:, HELD_OUT], mean[:, REWARD], linestyle=look["style"],
                   color=look["color"], linewidth=1.4, label=name)
        ends = curves[:, -1]
        panel.plot(ends[:, HELD_OUT], ends[:, REWARD], look["marker"], color=look["color"],
                   markersize=4)
    ceiling = values_of(group, "ceiling").mean()
    panel.axvline(ceiling, color=GRAY, linewidth=1, linestyle=":")
    panel.legend(fontsize=7, frameon=False, loc="upper left")
    panel.set_ylim(0, 3.4)


def judge_groups(rows, off_policy):
    """{name: rows} of the losses that were trained on pairs of one kind."""
    groups = {}
    for row in with_settings(rows, off_policy=off_policy):
        settings = row["settings"]
        groups.setdefault(f"{settings['loss']} β {settings['beta']:g}", []).append(row)
    return groups


def draw_judge(rows):
    figure, panels = canvas(1, 2, 3.6, sharex=True, sharey=True)
    on_policy = judge_groups(rows, False)
    draw_paths(panels[0], on_policy)
    pairs = {}
    for name, group in judge_groups(rows, True).items():
        loss = group[0]["settings"]["loss"]
        same = next(each for each in on_policy.values() if each[0]["settings"]["loss"] == loss)
        pairs |= {f"{loss}, pairs of the reference": same, f"{name}, unlikely answers": group}
    draw_paths(panels[1], pairs)
    x = "accuracy on held-out pairs of the reference"
    name_axes(panels[0], "losses", x, REWARD_AXIS)
    name_axes(panels[1], "off-policy pairs", x)
    ceiling = values_of(rows, "ceiling").mean()
    write(panels[0], ceiling - 0.004, 0.2, "the true reward's own accuracy", GRAY, ha="right")
    return figure


def table_judge(rows):
    lines = [["loss", "pairs", "accuracy, pairs of the reference", "accuracy, pairs as trained on",
              REWARD_AXIS]]
    for off_policy, kind in ((False, "of the reference"), (True, "of unlikely answers")):
        for name, group in judge_groups(rows, off_policy).items():
            cells = [spread(last_of(group, column), 3) for column in (HELD_OUT, OWN)]
            lines.append([name, kind, *cells, spread(last_of(group, REWARD))])
    ceiling = spread(values_of(rows, "ceiling"), 3)
    lines.append(["the true reward itself", "", ceiling, "", ""])
    return lines


# --- Overfitting ----------------------------------------------------------------------------------

MARGIN, SMALLEST, LARGEST, TRUTH = 1, 2, 3, 4  # columns of the curves


def draw_overfitting(rows):
    figure, panels = canvas(1, 3, 3.2, sharex=True)
    for panel, loss in zip(panels, ("sigmoid", "ipo")):
        for number, (beta, group) in enumerate(zip(*by_beta(rows, loss=loss))):
            look = look_of(number)
            end = draw_band(panel, group, MARGIN, look["color"], look["style"])
            write(panel, 150, end * 0.9, f"β {beta:g}", look["color"], ha="right")
            if loss == "ipo":
                panel.axhline(target_of_ipo(beta), color=GRAY, linewidth=0.8, linestyle=":")
        name_axes(panel, loss, "step", "margin h [nats]")
    for number, loss in enumerate(("sigmoid", "ipo")):
        group = with_settings(rows, loss=loss, beta=0.25)
        look = look_of(number + 2)
        end = draw_band(panels[2], group, TRUTH, look["color"], look["style"])
        write(panels[2], 150, end + 0.12, f"{loss} β 0.25", look["color"], ha="right")
    name_axes(panels[2], "true reward", "step", REWARD_AXIS)
    return figure


def target_of_ipo(beta: float) -> float:
    """The margin of whole answers at which IPO stops: 1/(2β) for each of its 4 tokens."""
    return (world.LENGTH + 1) / (2 * beta)


def table_overfitting(rows):
    lines = [["loss", "β", "mean margin after 50 steps [nats]", "after 150", "target of IPO",
              "smallest, largest after 150", REWARD_AXIS]]
    for loss in settings_of(rows, "loss"):
        for beta, group in zip(*by_beta(rows, loss=loss)):
            middle = values_of(group, "curve")[:, 5, MARGIN]
            target = decimal(target_of_ipo(beta), 2) if loss == "ipo" else "none"
            smallest, largest = last_of(group, SMALLEST).min(), last_of(group, LARGEST).max()
            cells = [spread(middle), spread(last_of(group, MARGIN)), target]
            cells.append(f"{decimal(smallest, 2)}, {decimal(largest, 2)}")
            lines.append([f"`{loss}`", f"{beta:g}", *cells, spread(last_of(group, TRUTH))])
    return lines


# --- Noise ----------------------------------------------------------------------------------------

def best_betas(rows, loss):
    """{share of flips: (beta, rows)} of the beta with the highest mean share of the achievable."""
    best = {}
    for flips in settings_of(rows, "flips"):
        # Without flips, cDPO and robust DPO are DPO.
        name = "sigmoid" if loss in ("cdpo", "robust") and not flips else loss
        found = zip(*by_beta(rows, loss=name, flips=flips))
        best[flips] = max(found, key=lambda pair: values_of(pair[1], "share").mean())
    return best


def draw_noise(rows):
    figure, panels = canvas(1, 2, 3.4, sharex=True)
    for number, loss in enumerate(settings_of(rows, "loss")):
        look = look_of(number)
        best = best_betas(rows, loss)
        flips = [100 * share for share in best]
        for panel, name in zip(panels, ("share", "reward")):
            values = [values_of(group, name) for _, group in best.values()]
            means = [value.mean().item() for value in values]
            low = [value.min().item() for value in values]
            high = [value.max().item() for value in values]
            panel.fill_between(flips, low, high, color=look["color"], alpha=0.15, linewidth=0)
            panel.plot(flips, means, linestyle=look["style"], marker=look["marker"],
                       color=look["color"], markersize=4, label=loss)
    name_axes(panels[0], "share of the achievable", "flipped labels [%]", "share of J, β = 1")
    name_axes(panels[1], "true reward", "flipped labels [%]", REWARD_AXIS)
    panels[0].legend(fontsize=8, frameon=False, loc="lower left")
    return figure


def table_noise(rows):
    lines = [["loss", "flipped", "best β", "share of the achievable", REWARD_AXIS, "KL [nats]"]]
    for loss in settings_of(rows, "loss"):
        for flips, (beta, group) in best_betas(rows, loss).items():
            cells = [spread(values_of(group, name)) for name in ("share", "reward", "kl")]
            lines.append([f"`{loss}`", f"{100 * flips:.0f} %", f"{beta:g}", *cells])
    return lines


# --- Length ---------------------------------------------------------------------------------------

def draw_length(rows):
    figure, panels = canvas(1, 2, 3.6, sharex=True)
    for number, loss in enumerate(settings_of(rows, "loss")):
        look = look_of(number)
        _, groups = by_beta(rows, loss=loss)
        for panel, name in zip(panels, ("reward", "words")):
            means = draw_sweep(panel, groups, "kl", name, look)
            panel.plot([], [], linestyle=look["style"], marker=look["marker"],
                       color=look["color"], label=loss)
    before = values_of(rows, "words_before").mean()
    panels[1].axhline(before, color=GRAY, linewidth=1)
    write(panels[1], max(kl for kl, _ in means), before - 0.06, "reference", GRAY, ha="right")
    panels[0].legend(fontsize=8, frameon=False, loc="lower right")
    name_axes(panels[0], "true reward", KL_AXIS, REWARD_AXIS)
    name_axes(panels[1], "length", KL_AXIS, "words of an answer, expected")
    return figure


def table_length(rows):
    lines = [["loss", "β", REWARD_AXIS, "KL [nats]", "words of an answer"]]
    for loss in settings_of(rows, "loss"):
        for beta, group in zip(*by_beta(rows, loss=loss)):
            cells = [spread(values_of(group, name)) for name in ("reward", "kl", "words")]
            lines.append([f"`{loss}`", f"{beta:g}", *cells])
    before = decimal(values_of(rows, "words_before").mean(), 2)
    return lines + [["reference", "", "0.00" if False else "", "0.00", before]]


# --- Start ----------------------------------------------------------------------------------------

START = -4.0  # log-prob of both answers where the policy is the reference

def loss_of_margin(name: str, margins: torch.Tensor):
    """A loss of pairs with β = 1 at these margins h -> its values, and the pushes −∂L/∂w, ∂L/∂l.

    Under π_ref both answers have the log-prob START, under π half of the margin more and half of it
    less. Each pair is a batch of its own; answers have one token, scores differ by e.
    """
    function = LOSSES[name]
    hyper = {"beta": 1.0} if "beta" in hyperparameters(function) else {}
    ones = torch.ones(1, dtype=torch.float64)
    columns = []
    for margin in margins.double():
        sides = torch.stack([START + margin / 2, START - margin / 2])[:, None]  # (2, 1)
        chosen, rejected = sides.requires_grad_()
        given = {
            "policy_chosen_logps": chosen,
            "policy_rejected_logps": rejected,
            "ref_chosen_logps": START * ones,
            "ref_rejected_logps": START * ones,
            "chosen_lengths": ones,
            "rejected_lengths": ones,
            "chosen_scores": torch.e * ones,
            "rejected_scores": 0 * ones,
        }
        names = tensor_arguments(function)
        tensors = {each: value for each, value in given.items() if each in names}
        loss = function(**tensors, **hyper).sum()
        gradient, = torch.autograd.grad(loss, sides)
        columns.append(torch.stack([loss.detach(), -gradient[0, 0], gradient[1, 0]]))
    return torch.stack(columns).unbind(-1)


def draw_start(rows):
    figure, panels = canvas(1, 3, 3.2)
    margins = torch.linspace(-0.4, 0.6, 101)
    for number, loss in enumerate(("discopop", "sigmoid")):
        look = look_of(number)
        value, push, _ = loss_of_margin(loss, margins)
        panels[0].plot(margins, value, look["style"], color=look["color"])
        panels[1].plot(margins, push, look["style"], color=look["color"], label=loss)
        for row in with_settings(rows, loss=loss):
            path = row["result"]["path"]
            panels[2].plot(range(0, 4 * len(path), 4), path, look["style"], color=look["color"],
                           linewidth=1)
    for panel in panels[:2]:
        panel.axvline(0, color=GRAY, linewidth=0.8)
    zero_line(panels[1])
    zero_line(panels[2])
    panels[1].legend(fontsize=8, frameon=False)
    panels[2].set_ylim(-0.4, 0.6)
    name_axes(panels[0], "loss", "z = βh")
    name_axes(panels[1], "push on the chosen answer", "z = βh", "−∂L/∂z")
    name_axes(panels[2], "a pair from policy = reference", "step", "z = βh")
    return figure


def table_start(rows):
    lines = [["loss", "push −∂L/∂z at z = 0", "z at the end, three pairs"]]
    for loss in settings_of(rows, "loss"):
        _, push, _ = loss_of_margin(loss, torch.zeros(1))
        ends = [row["result"]["path"][-1] for row in with_settings(rows, loss=loss)]
        cells = ", ".join(decimal(end, 2) for end in ends)
        lines.append([f"`{loss}`", decimal(push[0], 3), cells])
    return lines


# --- Misspecified ---------------------------------------------------------------------------------

def draw_misspecified(rows):
    figure, panels = canvas(1, 2, 3.6, sharex=True, sharey=True)
    for panel, kind in zip(panels, settings_of(rows, "pairs")):
        for number, row in enumerate(with_settings(rows, pairs=kind)):
            best, trained = zip(*row["result"]["points"])
            look = look_of(number)
            panel.plot(best, trained, look["marker"], color=look["color"], markersize=3,
                       alpha=0.6, label=f"seed {number}")
        panel.plot([0, 1.2], [0, 1.2], color=GRAY, linewidth=1)
        panel.axhspan(-2, 0, color="0.93")
        panel.set_ylim(-0.9, 1.3)
        name_axes(panel, f"pairs from {kind}".replace("from few", "from a few"),
                  "gain of the best θ in expected true reward")
    panels[0].set_ylabel("gain of DPO's θ", fontsize=8)
    write(panels[0], 1.25, -0.45, "below 0: worse\nthan the reference", "black", ha="right")
    panels[1].legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def table_misspecified(rows):
    lines = [["pairs from", "seed", "policies", "worse than the reference", "largest loss",
              "mean gain of DPO", "mean gain of the best θ"]]
    for row in rows:
        points = torch.tensor(row["result"]["points"], dtype=torch.float64)
        best, trained = points.T
        worse = int((trained < 0).sum())
        numbers = [decimal(value, 3) for value in (trained.min(), trained.mean(), best.mean())]
        settings = row["settings"]
        cells = [settings["pairs"], str(settings["seed"]), str(len(points)), str(worse)]
        lines.append(cells + numbers)
    return lines


# --- Every loss -----------------------------------------------------------------------------------

def pair_losses() -> list[str]:
    """The losses of pairs whose value at a margin is a number: not those of other rows, and not
    those that compare the pairs of a batch."""
    names = []
    for name, function in LOSSES.items():
        is_name = name == function.__name__
        if is_name and kind_of(function) == "pairs" and "batch" not in function.tags:
            names.append(name)
    return names


def draw_every_loss(rows):
    names = pair_losses()
    columns = 5
    figure, panels = canvas(math.ceil(len(names) / columns), columns, 10, sharex=True)
    margins = torch.linspace(-6, 6, 49)
    for panel, name in zip(panels, names):
        value, chosen, rejected = loss_of_margin(name, margins)
        panel.plot(margins, value, color="black", linewidth=1.2)
        panel.plot(margins, chosen, color=BLUE, linewidth=1.2)
        panel.plot(margins, rejected, "--", color=ORANGE, linewidth=1.2)
        zero_line(panel)
        low, high = panel.get_ylim()
        panel.set_ylim(max(low, -3), min(high, 6))
        name_axes(panel, name)
        panel.tick_params(labelsize=7)
    for panel in panels[len(names):]:
        panel.remove()
    figure.supxlabel("margin h [nats], β = 1     black: loss     blue: push up on the chosen "
                     "answer, −∂L/∂w     dashed: push down on the rejected, ∂L/∂l", fontsize=8)
    return figure


def table_every_loss(rows):
    lines = [["loss, β = 1", "value at h = 0", "push on chosen at h = 0", "on rejected",
              "on chosen at h = 4", "on rejected"]]
    for name in pair_losses():
        value, chosen, rejected = loss_of_margin(name, torch.tensor([0.0, 4.0]))
        cells = [value[0], chosen[0], rejected[0], chosen[1], rejected[1]]
        lines.append([f"`{name}`", *[decimal(cell, 3) for cell in cells]])
    return lines
