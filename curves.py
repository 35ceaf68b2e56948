"""Computes what each loss does to the answers of one example, for the plots of docs/losses.html.

    sweep = sweep_loss(LOSSES["sigmoid"])
    sweep.planes[sweep.start]         # loss and pushes at the default hyper-parameters

A plot has the loss, and its pushes: −∂L/∂log π of each answer, above 0 where the loss makes the
answer more probable. All values are those of the functions in losses.py, by autograd.

The example is one pair: a chosen answer of 30 tokens and a rejected one of 20, both with −1.5 nats
per token under the reference, and with the scores 3 and 1. The horizontal axis is the margin. Half
of the margin raises the chosen answer, half lowers the rejected one. A loss that compares the pairs
of a batch gets three more pairs. A loss of labels gets the answer once as good and once as bad. A
loss of lists gets three answers, and y_1 moves.

The sliders of the page stop at the values of β and of the label smoothing for which curves were
computed here, so that the page draws only values of the Python functions.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from registry import (
    compares_answers,
    hyperparameters,
    in_range,
    kind_of,
    needs_reference,
    needs_scores,
    sides_of,
    tensor_arguments,
)

STEPS = 80  # of the horizontal axis
LENGTHS = {"chosen": 30.0, "rejected": 20.0}  # tokens
SCORES = {"chosen": 3.0, "rejected": 1.0}
LIST_SCORES = (3.0, 2.0, 1.0)
PER_TOKEN = -1.5  # nats: the average log-prob of a token under the reference
BETA_STEPS = 6  # stops of the slider for β, from the default to ten times its value
SMOOTHINGS = tuple(i / 20 for i in range(10))
OTHER_MARGINS = (-2.0, -1.0, 1.0)  # βh of the other pairs of a batch

# Half of the width of the horizontal axis is 6/β nats: βh from −6 to 6. Not so for these losses,
# whose β is no scale of the margin or whose curve bends elsewhere. No curve has a corner at a point
# that is computed, because there the last bits decide between two gradients.
RADIUS = {
    "discopop": 16.0, "ipo": 12.0, "sppo_hard": 1500.0, "cal_dpo": 24.0, "chipo": 8.0,
    "repo": 1.9, "slic": 3.9, "sft": 45.0,
}
# Without a reference, an average log-prob above 0 would have no meaning.
LARGEST_AVERAGE = 2.8


class Sweep(NamedTuple):
    """The curves of a loss at every stop of its sliders."""
    axis: str  # what the horizontal axis has
    radius: float  # the axis goes from −radius to radius
    losses: list[str]  # names of the curves of the first panel
    pushes: list[str]  # and of the second
    betas: list[float]
    smoothings: list[float]
    planes: list[tuple[torch.Tensor, torch.Tensor]]  # β by β, and for each β every smoothing
    start: int  # the plane of the defaults


def sweep_loss(function: Callable) -> Sweep:
    """Compute the curves of a loss for all values of its sliders."""
    defaults = hyperparameters(function)
    betas = beta_stops(defaults["beta"]) if "beta" in defaults else []
    smoothings = smoothing_stops(function) if "label_smoothing" in defaults else []
    radius = radius_of(function)
    x = torch.linspace(-radius, radius, STEPS + 1, dtype=torch.float64)
    planes = []
    start = 0
    for named in slider_values(betas, smoothings):
        if named.items() <= defaults.items():
            start = len(planes)
        planes.append(compute_curves(function, x, named))
    losses, pushes = curve_names(function)
    return Sweep(describe_axis(function), radius, losses, pushes, betas, smoothings, planes, start)


def slider_values(betas: list[float], smoothings: list[float]) -> list[dict[str, float]]:
    """Return the hyper-parameters of each plane: β by β, and for each β every smoothing."""
    values = [{"beta": beta} for beta in betas] or [{}]
    if not smoothings:
        return values
    both = []
    for named in values:
        both += [named | {"label_smoothing": smoothing} for smoothing in smoothings]
    return both


def beta_stops(default: float) -> list[float]:
    """Return the values of β, from a tenth of the default to ten times its value."""
    stops = []
    for step in range(-BETA_STEPS, BETA_STEPS + 1):
        factor = 10 ** (step / BETA_STEPS)
        stops.append(float(f"{default * factor:.3g}"))
    return stops


def smoothing_stops(function):
    """Return the values of label smoothing: those in the range of the loss, and its default."""
    stops = {hyperparameters(function)["label_smoothing"]}
    for value in SMOOTHINGS:
        if in_range(value, function.ranges["label_smoothing"]):
            stops.add(value)
    return sorted(stops)


def radius_of(function: Callable) -> float:
    """Return half of the width of the horizontal axis, in nats or in nats per token."""
    radius = RADIUS.get(function.__name__)
    if radius is None:
        radius = 6 / hyperparameters(function).get("beta", 0.1)
    if "average" in function.tags and not needs_reference(function):
        radius = min(radius, LARGEST_AVERAGE)
    return radius


def describe_axis(function: Callable) -> str:
    """Return what the horizontal axis has, with its unit."""
    kind, sides = kind_of(function), sides_of(function)
    if kind == "labels":
        return "log-ratio ℓ − ℓ° of the answer (nats)"
    if kind == "lists":
        return "log-ratio of y₁ (nats)"
    if len(sides) == 1:
        return f"change of the log-prob of the {sides[0]} answer (nats)"
    if "average" in function.tags:
        margin = "h̄" if needs_reference(function) else "w̄ − l̄"
        return f"margin {margin} (nats per token)"
    return f"margin {'h' if needs_reference(function) else 'w − l'} (nats)"


def curve_names(function: Callable) -> tuple[list[str], list[str]]:
    """Return the names of the curves of both panels."""
    kind = kind_of(function)
    if kind == "labels":
        return ["good", "bad"], ["good", "bad"]
    if kind == "lists":
        return ["L"], ["y₁", "y₂", "y₃"]
    return ["L"], list(sides_of(function))


# --- Values and gradients -------------------------------------------------------------------------

def compute_curves(function: Callable, x: torch.Tensor, named: dict) -> tuple:
    """Return the loss (curves, N) and the pushes (curves, N) at the margins x (N,)."""
    kind = kind_of(function)
    if kind == "labels":
        return label_curves(function, x, named)
    if kind == "lists":
        return list_curves(function, x, named)
    if "batch" in function.tags:
        return batch_curves(function, x, named)
    return pair_curves(function, x, named)


def pair_curves(function, x, named):
    """One pair at each margin."""
    tensors = margin_tensors(function, x)
    leaves = policy_leaves(function, tensors)
    losses = function(**tensors, **named)  # (N,)
    return losses.detach()[None], pushes_of(losses, leaves)


def policy_leaves(function, tensors):
    """Return the log-probs of the policy, which get gradients."""
    names = [f"policy_{side}_logps" for side in sides_of(function)]
    return [tensors[name].requires_grad_() for name in names]


def pushes_of(losses, leaves):
    """Return −∂L/∂log π (answers, N)."""
    slopes = torch.autograd.grad(losses.sum(), leaves)
    return -torch.stack(slopes)


def margin_tensors(function: Callable, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of a pair at each margin x (N,)."""
    tensors = {}
    for side in LENGTHS:
        tensors |= side_tensors(function, side, x)
    wanted = tensor_arguments(function)
    return {name: value for name, value in tensors.items() if name in wanted}


def side_tensors(function, side, x):
    """Return the tensors of one answer of the pair."""
    length = LENGTHS[side]
    reference = PER_TOKEN * length
    start, change = reference, x
    if compares_answers(function):  # the margin is half the rise of one, half the fall of the other
        change = x / 2 if side == "chosen" else -x / 2
        if not needs_reference(function):  # it is w − l itself, so both start at one value
            start = PER_TOKEN * sum(LENGTHS.values()) / 2
    if "average" in function.tags:
        start, change = reference, length * change
    return {
        f"policy_{side}_logps": start + change,
        f"ref_{side}_logps": torch.full_like(x, reference),
        f"{side}_lengths": torch.full_like(x, length),
        f"{side}_scores": torch.full_like(x, SCORES[side]),
    }


def batch_curves(function, x, named):
    """A batch of four pairs, three of which stay where they are. The loss is its mean, and a push
    is that of the pair that moves, times the number of pairs."""
    scale = hyperparameters(function)["beta"]
    margins = torch.tensor(OTHER_MARGINS, dtype=x.dtype) / scale
    others = margin_tensors(function, margins)
    moving = margin_tensors(function, x)
    leaves = policy_leaves(function, moving)

    def batch_loss(pair):
        batch = {}
        for name, value in pair.items():
            batch[name] = torch.cat([value[None], others[name]])  # (4,)
        return function(**batch, **named).mean()

    losses = torch.func.vmap(batch_loss)(moving)  # (N,)
    count = 1 + len(OTHER_MARGINS)
    return losses.detach()[None], count * pushes_of(losses, leaves)


def label_curves(function, x, named):
    """An answer at each log-ratio, once with the label good and once with the label bad."""
    losses, pushes = [], []
    reference = torch.zeros_like(x)
    for label in (True, False):
        logps = x.clone().requires_grad_()
        labels = torch.full_like(x, label, dtype=torch.bool)
        values = function(logps, reference, labels, **named)  # (N,)
        losses.append(values.detach())
        pushes.append(pushes_of(values, [logps]))
    return torch.stack(losses), torch.cat(pushes)


def list_curves(function, x, named):
    """A list of three answers, at each log-ratio of the first."""
    zeros = torch.zeros_like(x)
    leaves = [x.clone().requires_grad_(), zeros.clone().requires_grad_(), zeros.requires_grad_()]
    logps = torch.stack(leaves, dim=1)  # (N, 3)
    tensors = {"mask": torch.ones_like(logps, dtype=torch.bool)}
    if needs_scores(function):
        scores = torch.tensor(LIST_SCORES, dtype=x.dtype)
        tensors["scores"] = scores.expand_as(logps)
    reference = torch.zeros_like(logps)
    losses = function(logps, reference, **tensors, **named)  # (N,)
    return losses.detach()[None], pushes_of(losses, leaves)


# --- Numbers as text ------------------------------------------------------------------------------

DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
LEVELS = 64 ** 2 - 1  # a value is two digits of base 64
TICKS = 5  # of a vertical axis, at most


def choose_ticks(curves: torch.Tensor) -> list[float]:
    """Return ticks in equal steps that contain all values and 0."""
    low = min(0.0, curves.min().item())
    high = max(0.0, curves.max().item())
    span = max(high - low, 1e-9)
    exponent = math.floor(math.log10(span / TICKS))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * 10.0 ** exponent
        first = math.floor(round(low / step, 6))
        last = math.ceil(round(high / step, 6))
        if last - first < TICKS:
            break
    return [i * step for i in range(first, last + 1)]


def write_number(value: float) -> str:
    """Write a number with few characters: 0.1, 600, 1e6."""
    text = f"{value:.6g}"
    return text.replace("e+0", "e").replace("e-0", "e-")


def encode_curves(curves: torch.Tensor) -> str:
    """Return curves (M, N) as text: the ticks of their axis, and two digits for each value, between
    the first and the last tick. Values are rounded before, so that the last bits, in which versions
    of torch differ, change nothing."""
    ticks = choose_ticks(curves)
    shares = (curves.flatten() - ticks[0]) / (ticks[-1] - ticks[0])
    digits = []
    for share in shares.tolist():
        level = math.floor(round(share, 9) * LEVELS + 0.5)
        digits += [DIGITS[level // 64], DIGITS[level % 64]]
    labels = [write_number(tick) for tick in ticks]
    return f"{' '.join(labels)}|{''.join(digits)}"


def decode_curves(text: str, count: int) -> torch.Tensor:
    """Return `count` curves (count, N), up to rounding: the reverse of `encode_curves`."""
    low, high, digits = axis_and_digits(text)
    numbers = [DIGITS.index(digit) for digit in digits]
    pairs = torch.tensor(numbers, dtype=torch.float64).view(count, -1, 2)
    levels = 64 * pairs[..., 0] + pairs[..., 1]  # (count, N)
    return low + levels / LEVELS * (high - low)


def axis_and_digits(text: str) -> tuple[float, float, str]:
    """Return the first and the last tick of encoded curves, and their digits."""
    labels, _, digits = text.partition("|")
    ticks = labels.split()
    return float(ticks[0]), float(ticks[-1]), digits
