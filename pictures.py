"""Draws the pictures of figures.py from the rows of their runs, and sums the rows up in tables.

    draw_frontier(rows)      # a matplotlib figure, white in a light and in a dark page
    table_frontier(rows)     # rows of text for docs/figures.md, the first is the header

Every color has a marker, a line style or a label of its own too. A line is the mean over the seeds;
dots or a band show each seed, or the smallest and the largest of them.
"""
import math

import numpy as np
import torch

import world
from errors import reading
from experiments import EXPECTING_FLIPS, SHARED_WORDS
from losses import LOSSES, hyperparameters
from plots import COLORS, MARKERS, NO_MATPLOTLIB
from registry import kind_of, tensor_arguments

WIDTH, DPI = 8.0, 130  # inches, dots per inch
GRAY = "0.45"
BLUE, ORANGE, GREEN, PINK, SKY, YELLOW = COLORS
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))


# --- Rows -----------------------------------------------------------------------------------------

def with_settings(rows: list[dict], **settings) -> list[dict]:
    """The rows with these settings."""
    found = []
    for row in rows:
        if all(row["settings"].get(name) == value for name, value in settings.items()):
            found.append(row)
    return found


def numbers_of(rows: list[dict], name: str) -> torch.Tensor:
    """A number of each result, (seeds,), or a curve of each, (seeds, steps, columns)."""
    values = [row["result"][name] for row in rows]
    return torch.tensor(values, dtype=torch.float64)


def last_of(rows: list[dict], column: int) -> torch.Tensor:
    """The end of a column of the curves, (seeds,)."""
    curves = numbers_of(rows, "curve")  # (seeds, steps, columns)
    return curves[:, -1, column]


def settings_of(rows: list[dict], name: str) -> list:
    """The different values of a setting, without the rows that lack it."""
    values = {}  # a dict keeps the order
    for row in rows:
        if name in row["settings"]:
            values[row["settings"][name]] = None
    return list(values)


def spread(values: torch.Tensor, digits: int = 2) -> str:
    """"1.20 (1.18 to 1.23)": mean, smallest and largest."""
    numbers = values.mean(), values.min(), values.max()
    mean, low, high = [decimal(number, digits) for number in numbers]
    if low == high:
        return mean
    return f"{mean} ({low} to {high})"


def cells(rows: list[dict], *names: str, digits: int = 2) -> list[str]:
    """The spread of numbers of the results, as cells of a table."""
    return [spread(numbers_of(rows, name), digits) for name in names]


def end_cells(rows: list[dict], *columns: int, digits: int = 2) -> list[str]:
    """The spread of the ends of columns of the curves, as cells of a table."""
    return [spread(last_of(rows, column), digits) for column in columns]


def decimal(number: float, digits: int) -> str:
    """A number with a minus sign, and no minus before a zero."""
    text = f"{float(number):.{digits}f}"
    if not float(text):
        text = text.lstrip("-")
    return text.replace("-", "−")


# --- Panels ---------------------------------------------------------------------------------------

def canvas(rows: int, columns: int, height: float, dpi: int = DPI, **options):
    """Make a white figure -> the figure, its panels as a flat list."""
    with reading("the pictures cannot be drawn", NO_MATPLOTLIB):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), dpi=dpi, layout="constrained", facecolor="white")
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
    default = {"fontsize": 8, "va": "center"}
    panel.text(x, y, text, color=color, **default | options)


def zero_line(panel):
    panel.axhline(0, color=GRAY, linewidth=0.8)


def draw_band(panel, rows, column, look):
    """Draw a column of the curves against the step, column 0: the mean as a line, and a band from
    the smallest to the largest. Returns the mean at the end."""
    curves = numbers_of(rows, "curve")  # (seeds, steps, columns)
    steps = curves[0, :, 0]
    values = curves[:, :, column]
    mean = values.mean(0)
    panel.plot(steps, mean, **look)
    fill(panel, steps, values.amin(0), values.amax(0), look)
    return mean[-1].item()


def fill(panel, x, low, high, look):
    panel.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)


def draw_sweep(panel, groups, x, y, number):
    """Draw two numbers of the results: a dot for each seed, a line through the means of groups of
    rows. Returns the means."""
    means = []
    for rows in groups:
        across, up = numbers_of(rows, x), numbers_of(rows, y)
        panel.plot(across, up, **dots(number))
        means.append((across.mean().item(), up.mean().item()))
    across, up = zip(*means)
    panel.plot(across, up, **line(number))
    return means


def line(number: int) -> dict:
    """Color and style of the n-th line of a panel."""
    color = COLORS[number % len(COLORS)]
    return {"color": color, "linestyle": STYLES[number % len(STYLES)], "linewidth": 1.4}


def dots(number: int) -> dict:
    """Color and marker of the n-th kind of dots of a panel."""
    marker = MARKERS[number % len(MARKERS)]
    look = line(number) | {"marker": marker, "linestyle": "none"}
    return look | {"markersize": 3.5, "alpha": 0.7}


def marked_line(number: int) -> dict:
    return dots(number) | line(number) | {"alpha": 1}


def by_beta(rows, **settings):
    """-> the betas of the rows with these settings, and the rows of each beta."""
    rows = with_settings(rows, **settings)
    betas = settings_of(rows, "beta")
    return betas, [with_settings(rows, beta=beta) for beta in betas]


# --- The frontier ---------------------------------------------------------------------------------

KL_AXIS = "KL to the reference [nats per answer]"
REWARD_AXIS = "expected true reward"


def draw_frontier_panel(panel, rows, loss):
    """Draw the exact frontier and the runs of a loss -> betas, and [(KL, reward), ...]."""
    _, kls, rewards = optimum_of(rows)
    panel.plot(kls, rewards, color=GRAY, linewidth=1.4)
    betas, groups = by_beta(rows, loss=loss)
    means = draw_sweep(panel, groups, "kl", "reward", 0)
    panel.set_xlim(0, 6.5)
    panel.set_ylim(-0.2, 5.8)
    return betas, means


def optimum_of(rows):
    """-> beta, KL and expected true reward along the exact frontier, (points,) each."""
    optimum, = numbers_of(with_settings(rows, loss="optimum"), "points")
    return optimum.unbind(-1)


def draw_frontier(rows):
    losses = settings_of(rows, "loss")
    losses.remove("optimum")
    columns = math.ceil(len(losses) / 2)
    figure, panels = canvas(2, columns, 4.4, sharex=True, sharey=True)
    for panel, loss in zip(panels, losses):
        betas, means = draw_frontier_panel(panel, rows, loss)
        for end in (0, -1):
            kl, reward = means[end]
            write(panel, kl + 0.3, reward - 0.3, f"β {betas[end]:g}", BLUE, fontsize=7)
        name_axes(panel, loss)
    write(panels[0], 0.2, 5.4, "gray: exact optimum", GRAY, fontsize=7)
    figure.supxlabel(KL_AXIS, fontsize=9)
    figure.supylabel(REWARD_AXIS, fontsize=9)
    return figure


def table_frontier(rows):
    header = "loss | β | expected true reward | KL [nats] | optimum at this KL | mass"
    lines = []
    _, kls, rewards = optimum_of(rows)
    for loss in settings_of(rows, "loss"):
        for beta, group in zip(*by_beta(rows, loss=loss)):
            kl = numbers_of(group, "kl").mean().item()
            # np.interp wants rising x; the KL of the optimum falls with beta.
            best = np.interp(kl, kls.flip(0), rewards.flip(0))
            row = [f"`{loss}`", f"{beta:g}", *cells(group, "reward", "kl")]
            lines.append([*row, decimal(best, 2), *cells(group, "mass")])
    return header, lines


# --- The theorem ----------------------------------------------------------------------------------

IMPLICIT_AXIS = "implicit reward β log π/π_ref"


def draw_theorem_panel(panel, implicit):
    """Draw the implicit reward of all answers against the true one, both centered per prompt."""
    truth = world.true_reward().flatten()
    ends = -7, 7
    panel.plot(ends, ends, color=GRAY, linewidth=1)
    panel.scatter(truth, implicit.flatten(), s=3, color=BLUE, alpha=0.25, linewidths=0)
    panel.set_xlim(ends)
    panel.set_ylim(ends)


def implicit_rewards(rows):
    """The implicit rewards that the first seed keeps, (X, A)."""
    kept = numbers_of(rows[:1], "implicit_times_100")
    rewards = kept / 100
    return rewards.view(len(world.THINGS), -1)


def draw_theorem(rows):
    figure, panels = canvas(1, 2, 3.6, sharey=True)
    implicit = implicit_rewards(rows)
    draw_theorem_panel(panels[0], torch.zeros_like(implicit))
    draw_theorem_panel(panels[1], implicit)
    name_axes(panels[0], "before: policy = reference", "true reward r", IMPLICIT_AXIS)
    name_axes(panels[1], "after DPO", "true reward r")
    correlation = numbers_of(rows, "correlation").mean()
    write(panels[1], -6.5, 6, f"correlation {correlation:.2f}")
    write(panels[1], 3.6, 5.6, "gray: equal", GRAY, ha="right")
    return figure


def table_theorem(rows):
    header = "seed | correlation over all answers | slope"
    lines = []
    for row in rows:
        result = row["result"]
        seed = str(row["settings"]["seed"])
        correlation = decimal(result["correlation"], 3)
        lines.append([seed, correlation, decimal(result["slope"], 2)])
    return header, lines


def draw_readme(frontier_rows, theorem_rows):
    """The picture at the top of the README: the frontier of DPO, and the theorem."""
    figure, (frontier, theorem) = canvas(1, 2, 3.7)
    betas, means = draw_frontier_panel(frontier, frontier_rows, "sigmoid")
    for beta, (kl, reward) in zip(betas, means):
        write(frontier, kl + 0.2, reward - 0.3, f"β = {beta:g}", BLUE)
    write(frontier, 0.3, 5.1, "gray: the best possible,\ncomputed exactly", GRAY)
    name_axes(frontier, "DPO comes close to the best possible", KL_AXIS, REWARD_AXIS)
    draw_theorem_panel(theorem, implicit_rewards(theorem_rows))
    correlation = numbers_of(theorem_rows, "correlation").mean()
    text = f"4,096 answers, correlation {correlation:.2f}"
    write(theorem, -6.5, 6.2, text)
    title = "and finds a reward that it never saw"
    name_axes(theorem, title, "true reward r", IMPLICIT_AXIS)
    return figure


# --- Both fall ------------------------------------------------------------------------------------

CHOSEN, REJECTED, FORWARD_KL, MASS = 1, 2, 3, 4  # columns of the curves
SIDES = {CHOSEN: "chosen", REJECTED: "rejected"}
CHANGE_AXIS = "change of log π [nats]"


def draw_both_fall(rows):
    losses = settings_of(rows, "loss")
    options = {"sharex": True, "sharey": "row", "height_ratios": [2, 1]}
    figure, panels = canvas(2, len(losses), 4.0, **options)
    for loss, top, bottom in zip(losses, panels, panels[len(losses):]):
        group = with_settings(rows, loss=loss)
        for number, column in enumerate(SIDES):
            draw_band(top, group, column, line(number))
        curves = numbers_of(group, "curve")
        divergence = curves[:, :, FORWARD_KL].mean(0)
        top.plot(curves[0, :, 0], -divergence, ":", color="black")
        zero_line(top)
        draw_band(bottom, group, MASS, line(2))
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
    header = ("loss | change of chosen [nats] | of rejected | mean of both | −KL(π_ref‖π) | "
              "mass")
    lines = []
    for loss in settings_of(rows, "loss"):
        group = with_settings(rows, loss=loss)
        both = (last_of(group, CHOSEN) + last_of(group, REJECTED)) / 2
        row = [f"`{loss}`", *end_cells(group, CHOSEN, REJECTED), spread(both)]
        divergence = spread(-last_of(group, FORWARD_KL))
        row.append(divergence)
        lines.append(row + end_cells(group, MASS))
    optimum = numbers_of(with_settings(rows, loss="sigmoid"), "at_optimum")  # (seeds, 2)
    chosen, rejected = optimum.T
    both = (chosen + rejected) / 2
    row = [spread(chosen), spread(rejected), spread(both)]
    lines.append(["π* for β = 1", *row, "", "1.00"])
    return header, lines


# --- Both fall: three causes ----------------------------------------------------------------------

def draw_causes(rows):
    figure, panels = canvas(1, 3, 3.2)
    draw_relative(panels[0], rows)
    draw_shared(panels[1], rows)
    draw_alike(panels[2], rows)
    return figure


def draw_relative(panel, rows):
    texts = {False: ("only pairs that it wins", 0.55), True: ("and pairs that it loses", 0.3)}
    for number, (with_better, (text, above)) in enumerate(texts.items()):
        group = with_settings(rows, cause="relative", with_better=with_better)
        look = line(number)
        end = draw_band(panel, group, CHOSEN, look)
        write(panel, 60, end + above, text, look["color"], ha="right")
    zero_line(panel)
    name_axes(panel, "1  only relatively good", "step", "change of log π(middling) [nats]")


def draw_shared(panel, rows):
    for number, shared in enumerate(SHARED_WORDS):
        group = with_settings(rows, cause="shared", shared=shared)
        points = numbers_of(group, "pairs").flatten(0, 1)  # (pairs, 3)
        overlaps, chosen, _ = points.T
        panel.plot(overlaps, chosen, **dots(number), label=f"{shared} of 3 words shared")
    zero_line(panel)
    panel.legend(fontsize=7, frameon=False, handletextpad=0.1, loc="lower left")
    name_axes(panel, "2  much shared", "⟨∇w, ∇l⟩ / ‖∇w‖²", "change of log π(chosen) [nats]")


def draw_alike(panel, rows):
    sizes = settings_of(rows, "hidden_size")
    groups = [with_settings(rows, hidden_size=size) for size in sizes]
    for number, (column, name) in enumerate(SIDES.items()):
        means = []
        for size, group in zip(sizes, groups):
            ends = last_of(group, column)
            panel.plot([size] * len(ends), ends, **dots(number))
            means.append(ends.mean().item())
        look = line(number)
        panel.plot(sizes, means, **look)
        write(panel, sizes[-1], means[-1] + 0.12, name, look["color"], ha="right")
    zero_line(panel)
    panel.set_xscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    name_axes(panel, "3  can't tell apart", "hidden size of the policy", CHANGE_AXIS)


def table_causes(rows):
    header = "variant | change of chosen [nats] | of rejected | also"
    lines = []
    for with_better in (False, True):
        group = with_settings(rows, cause="relative", with_better=with_better)
        name = "and pairs that it loses" if with_better else "only pairs that it wins"
        lines.append([f"1: middling answer, {name}", *end_cells(group, *SIDES), ""])
    for shared in SHARED_WORDS:
        group = with_settings(rows, cause="shared", shared=shared)
        points = numbers_of(group, "pairs")  # (seeds, pairs, 3)
        falls = 100 * (points[:, :, CHOSEN] < 0).double().mean(-1)
        changes = [spread(points[:, :, column].mean(-1)) for column in SIDES]
        also = f"chosen falls in {spread(falls, 0)} % of the pairs"
        lines.append([f"2: {shared} of 3 words shared", *changes, also])
    for size in settings_of(rows, "hidden_size"):
        group = with_settings(rows, hidden_size=size)
        accuracy, = cells(group, "accuracy")
        mass, = end_cells(group, MASS)
        chosen, rejected = last_of(group, CHOSEN), last_of(group, REJECTED)
        per_nat = spread(chosen / (chosen - rejected))
        also = f"chosen per nat of margin {per_nat}; accuracy {accuracy}; mass {mass}"
        lines.append([f"3: hidden size {size}", *end_cells(group, *SIDES), also])
    return header, lines


# --- Judge or writer ------------------------------------------------------------------------------

HELD_OUT, OWN, REWARD = 1, 2, 3  # columns of the curves


def draw_paths(panel, groups):
    """Draw E[r] against accuracy on held-out pairs of the reference, over training."""
    for number, (name, group) in enumerate(groups.items()):
        curves = numbers_of(group, "curve")[:, 1:]  # before the first step every pair is a tie
        accuracies, rewards = curves[..., HELD_OUT], curves[..., REWARD]
        panel.plot(accuracies.mean(0), rewards.mean(0), **line(number), label=name)
        panel.plot(accuracies[:, -1], rewards[:, -1], **dots(number))
    ceiling = numbers_of(group, "ceiling").mean()
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
    figure, (left, right) = canvas(1, 2, 3.6, sharex=True, sharey=True)
    on_policy = judge_groups(rows, False)
    draw_paths(left, on_policy)
    pairs = {}
    for name, group in judge_groups(rows, True).items():
        if name in on_policy:
            pairs[f"{name}, pairs of the reference"] = on_policy[name]
        pairs[f"{name}, unlikely answers"] = group
    draw_paths(right, pairs)
    x = "accuracy on held-out pairs of the reference"
    name_axes(left, "losses", x, REWARD_AXIS)
    name_axes(right, "off-policy pairs", x)
    ceiling = numbers_of(rows, "ceiling").mean().item()
    write(left, ceiling - 0.004, 0.2, "the true reward's own accuracy", GRAY, ha="right")
    return figure


def table_judge(rows):
    header = ("loss | pairs | accuracy, pairs of the reference | "
              "accuracy, pairs as trained on | expected true reward")
    lines = []
    for off_policy, kind in ((False, "of the reference"), (True, "of unlikely answers")):
        for name, group in judge_groups(rows, off_policy).items():
            accuracies = end_cells(group, HELD_OUT, OWN, digits=3)
            lines.append([name, kind, *accuracies, *end_cells(group, REWARD)])
    ceiling = cells(rows, "ceiling", digits=3)
    lines.append(["the true reward itself", "", *ceiling, "", ""])
    return header, lines


# --- Overfitting ----------------------------------------------------------------------------------

MARGIN, SMALLEST, LARGEST, TRUTH = 1, 2, 3, 4  # columns of the curves


def draw_overfitting(rows):
    figure, panels = canvas(1, 3, 3.2, sharex=True)
    for panel, loss in zip(panels, ("sigmoid", "ipo")):
        for number, (beta, group) in enumerate(zip(*by_beta(rows, loss=loss))):
            look = line(number)
            end = draw_band(panel, group, MARGIN, look)
            write(panel, 150, end * 0.9, f"β {beta:g}", look["color"], ha="right")
            if loss == "ipo":
                target = target_of_ipo(beta)
                panel.axhline(target, color=GRAY, linewidth=0.8, linestyle=":")
        name_axes(panel, loss, "step", "margin h [nats]")
    for number, loss in enumerate(("sigmoid", "ipo")):
        group = with_settings(rows, loss=loss, beta=0.25)
        look = line(number + 2)
        draw_band(panels[2], group, TRUTH, look)
        write(panels[2], 0, 1.4 - 0.15 * number, f"{loss} β 0.25", look["color"])
    name_axes(panels[2], "true reward", "step", REWARD_AXIS)
    return figure


def target_of_ipo(beta: float) -> float:
    """The margin of whole answers at which IPO stops: 1/(2β) for each of its 4 tokens."""
    return (world.LENGTH + 1) / (2 * beta)


def table_overfitting(rows):
    header = ("loss | β | mean margin after 50 steps [nats] | after 150 | target of IPO | "
              "smallest, largest after 150 | expected true reward")
    lines = []
    for loss in settings_of(rows, "loss"):
        for beta, group in zip(*by_beta(rows, loss=loss)):
            curves = numbers_of(group, "curve")
            middle = curves[:, 5, MARGIN]  # a row for every 10 steps
            target = "none"
            if loss == "ipo":
                target = decimal(target_of_ipo(beta), 2)
            smallest = decimal(last_of(group, SMALLEST).min(), 2)
            largest = decimal(last_of(group, LARGEST).max(), 2)
            row = [f"`{loss}`", f"{beta:g}", spread(middle), *end_cells(group, MARGIN), target]
            lines.append([*row, f"{smallest}, {largest}", *end_cells(group, TRUTH)])
    return header, lines


# --- Noise ----------------------------------------------------------------------------------------

def best_betas(rows, loss):
    """{share of flips: (beta, rows)} of the beta with the highest mean share of the achievable."""
    best = {}
    for flips in settings_of(rows, "flips"):
        # Without flips, cDPO and robust DPO are DPO.
        name = loss
        if loss in EXPECTING_FLIPS and not flips:
            name = "sigmoid"
        betas, groups = by_beta(rows, loss=name, flips=flips)
        shares = [numbers_of(group, "share").mean() for group in groups]
        highest = shares.index(max(shares))
        best[flips] = betas[highest], groups[highest]
    return best


def draw_noise(rows):
    figure, panels = canvas(1, 2, 3.4, sharex=True)
    for number, loss in enumerate(settings_of(rows, "loss")):
        best = best_betas(rows, loss)
        flips = [100 * share for share in best]
        for panel, name in zip(panels, ("share", "reward")):
            values = [numbers_of(group, name) for _, group in best.values()]
            values = torch.stack(values)  # (flips, seeds)
            look = marked_line(number)
            panel.plot(flips, values.mean(-1), **look, label=loss)
            fill(panel, flips, values.amin(-1), values.amax(-1), look)
    x = "flipped labels [%]"
    name_axes(panels[0], "share of the achievable", x, "share of J, β = 1")
    name_axes(panels[1], "true reward", x, REWARD_AXIS)
    panels[0].legend(fontsize=8, frameon=False, loc="lower left")
    return figure


def table_noise(rows):
    header = ("loss | flipped | best β | share of the achievable | expected true reward | "
              "KL [nats]")
    lines = []
    for loss in settings_of(rows, "loss"):
        for flips, (beta, group) in best_betas(rows, loss).items():
            row = [f"`{loss}`", f"{100 * flips:.0f} %", f"{beta:g}"]
            lines.append(row + cells(group, "share", "reward", "kl"))
    return header, lines


# --- Length ---------------------------------------------------------------------------------------

def draw_length(rows):
    figure, (left, right) = canvas(1, 2, 3.6, sharex=True)
    furthest = 0
    for number, loss in enumerate(settings_of(rows, "loss")):
        _, groups = by_beta(rows, loss=loss)
        draw_sweep(right, groups, "kl", "words", number)
        means = draw_sweep(left, groups, "kl", "reward", number)
        left.plot([], [], **marked_line(number), label=loss)  # for the legend
        furthest = max(furthest, means[0][0])
    before = numbers_of(rows, "words_before").mean().item()
    right.axhline(before, color=GRAY, linewidth=1)
    write(right, furthest, before - 0.06, "reference", GRAY, ha="right")
    left.legend(fontsize=8, frameon=False, loc="lower right")
    name_axes(left, "true reward", KL_AXIS, REWARD_AXIS)
    name_axes(right, "length", KL_AXIS, "words of an answer, expected")
    return figure


def table_length(rows):
    header = "loss | β | expected true reward | KL [nats] | words of an answer"
    lines = []
    for loss in settings_of(rows, "loss"):
        for beta, group in zip(*by_beta(rows, loss=loss)):
            lines.append([f"`{loss}`", f"{beta:g}", *cells(group, "reward", "kl", "words")])
    before = decimal(numbers_of(rows, "words_before").mean(), 2)
    lines.append(["reference", "", "", "0.00", before])
    return header, lines


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
        tensors = {each: given[each] for each in names if each in given}
        loss = function(**tensors, **hyper).sum()
        gradient, = torch.autograd.grad(loss, sides)
        of_chosen, of_rejected = gradient[:, 0]
        columns.append(torch.stack([loss.detach(), -of_chosen, of_rejected]))
    return torch.stack(columns).unbind(-1)


def draw_start(rows):
    figure, (value_panel, push_panel, path_panel) = canvas(1, 3, 3.2)
    margins = torch.linspace(-0.4, 0.6, 101)
    for number, loss in enumerate(("discopop", "sigmoid")):
        value, push, _ = loss_of_margin(loss, margins)
        value_panel.plot(margins, value, **line(number))
        push_panel.plot(margins, push, **line(number), label=loss)
        for row in with_settings(rows, loss=loss):
            path = row["result"]["path"]
            steps = range(0, 4 * len(path), 4)
            path_panel.plot(steps, path, **line(number))
    for panel in (value_panel, push_panel):
        panel.axvline(0, color=GRAY, linewidth=0.8)
    zero_line(push_panel)
    zero_line(path_panel)
    push_panel.legend(fontsize=8, frameon=False)
    path_panel.set_ylim(-0.4, 0.6)
    z = "z = βh"
    name_axes(value_panel, "loss", z)
    name_axes(push_panel, "push on the chosen answer", z, "−∂L/∂z")
    name_axes(path_panel, "a pair from policy = reference", "step", z)
    return figure


def table_start(rows):
    header = "loss | push −∂L/∂z at z = 0 | z at the end, three pairs"
    lines = []
    for loss in settings_of(rows, "loss"):
        _, push, _ = loss_of_margin(loss, torch.zeros(1))
        group = with_settings(rows, loss=loss)
        paths = numbers_of(group, "path")  # (seeds, steps)
        ends = [decimal(end, 2) for end in paths[:, -1]]
        lines.append([f"`{loss}`", decimal(push[0], 3), ", ".join(ends)])
    return header, lines


# --- Misspecified ---------------------------------------------------------------------------------

PAIR_KINDS = {"reference": "pairs of the reference", "few answers": "pairs of 16 answers"}

def draw_misspecified(rows):
    figure, panels = canvas(1, 2, 3.6, sharex=True, sharey=True)
    for panel, kind in zip(panels, settings_of(rows, "pairs")):
        for number, row in enumerate(with_settings(rows, pairs=kind)):
            best, trained = zip(*row["result"]["points"])
            panel.plot(best, trained, **dots(number), label=f"seed {number}")
        panel.plot([0, 0.7], [0, 0.7], color=GRAY, linewidth=1)
        panel.axhspan(-2, 0, color="0.93")
        panel.set_ylim(-0.9, 1.3)
        name_axes(panel, PAIR_KINDS[kind], "gain of the best θ in expected true reward")
    panels[0].set_ylabel("gain of DPO's θ", fontsize=8)
    write(panels[0], 0.7, -0.45, "below 0: worse\nthan the reference", ha="right")
    panels[1].legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def table_misspecified(rows):
    header = ("pairs from | seed | policies | worse than the reference | largest loss | "
              "mean gain of DPO | mean gain of the best θ")
    lines = []
    for row in rows:
        points = torch.tensor(row["result"]["points"], dtype=torch.float64)
        best, trained = points.T
        worse = int((trained < 0).sum())
        numbers = trained.min(), trained.mean(), best.mean()
        settings = row["settings"]
        counts = [settings["pairs"], str(settings["seed"])]
        counts += [str(len(points)), str(worse)]
        lines.append(counts + [decimal(number, 3) for number in numbers])
    return header, lines


# --- Every loss -----------------------------------------------------------------------------------

def losses_of_margin() -> list[str]:
    """The losses of pairs whose value at a margin is a number: not those of other rows, and not
    those that compare the pairs of a batch."""
    names = []
    for name, function in LOSSES.items():
        is_name = name == function.__name__
        if is_name and kind_of(function) == "pairs" and "batch" not in function.tags:
            names.append(name)
    return names


def draw_every_loss(rows):
    names = losses_of_margin()
    columns = 5
    figure, panels = canvas(math.ceil(len(names) / columns), columns, 10, dpi=85, sharex=True)
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
    header = ("loss, β = 1 | value at h = 0 | push on chosen at h = 0 | on rejected | "
              "on chosen at h = 4 | on rejected")
    lines = []
    for name in losses_of_margin():
        value, chosen, rejected = loss_of_margin(name, torch.tensor([0.0, 4.0]))
        numbers = value[0], chosen[0], rejected[0], chosen[1], rejected[1]
        lines.append([f"`{name}`", *[decimal(number, 3) for number in numbers]])
    return header, lines
