"""The registry of losses: `@loss` fills it, `find` reads it.

    @loss("margin", beta="> 0")               # in losses.py, above the function of a loss
    LOSSES["sigmoid"]                         # the function of that name
    find("sigmoid:0.8,bco_pair:0.2,sft:1")    # a weighted sum, as --loss takes it

Each loss is defined by one function. Its signature lists its inputs: the tensor arguments come
first, the keyword-only arguments are its hyper-parameters. The functions below read the signature.
With them dpo.py computes the tensors, flags.py makes the flags, and `table` prints the losses.

A loss is of one of three kinds, told apart by its arguments alone: a loss with `labels` takes
single answers that are good or bad, a loss with `mask` takes lists of K answers, and any other loss
takes pairs. `needs_of` says what the loss asks of a row of the data.
"""
from errors import Parser, reading, run_script  # first, see errors.py
import difflib
import functools
import inspect
import math
import operator
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

LOSSES = {}  # name: function; losses.py fills it when it is imported

COMPARE = {
    ">": operator.gt, ">=": operator.ge, "!=": operator.ne,
    "(": operator.gt, "[": operator.ge, ")": operator.lt, "]": operator.le,
}
# Of each kind of loss: what a tensor argument has one number for, its shape, its dimensions.
SHAPES = {
    "pairs": ("pair", "(B,)", 1),
    "labels": ("answer", "(N,)", 1),
    "lists": ("answer", "(B, K)", 2),
}
# Endings of the names of arguments that have this shape.
ROW_TENSORS = ("logps", "lengths", "scores", "labels", "mask", "weights")
# A number as a user writes it. Python's float() reads more: "1_0", " 5 ", "٣", "nan".
REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


# --- @loss ----------------------------------------------------------------------------------------

def loss(*tags: str, update: Callable | None = None, **ranges: str) -> Callable:
    """Register a loss under its own name, and check its arguments at every call.

    Args   tags     properties that the signature cannot express: see losses.py
           update   of a loss with state, see `start_state`: a pure function (state, means, beta) ->
                    state of the next step. `means` has the metrics of this step, over all rows
           ranges   for every hyper-parameter its range, as `in_range` reads it. A tensor argument
                    may have one too: chosen_scores="> rejected_scores".

    The wrapped function raises ValueError where tensors do not all have the shape of the kind, (B,)
    for pairs, and where an argument is out of its range. Without the first check, a wrong shape
    would broadcast silently.
    """

    def register(function):
        unchecked = hyperparameters(function).keys() - ranges.keys()
        if unchecked:
            raise TypeError(f"@loss of {function.__name__}: no range for {', '.join(unchecked)}")
        names, kind = tensor_arguments(function), kind_of(function)
        check = check_shapes if kind == "pairs" else check_shapes_and_booleans
        for name in hyperparameters(function):
            read_range(ranges[name])  # a wrong range fails here, not at the first call

        @functools.wraps(function)
        def checked(*tensors, **named):
            given = dict(zip(names, tensors, strict=False)) | named
            check(function.__name__, kind, given)
            check_ranges(ranges, given)
            return function(*tensors, **named)

        checked.tags = set(tags)
        checked.ranges = ranges
        checked.update = update
        checked.parts = {function.__name__: 1.0}  # of a sum: its losses and their weights
        LOSSES[function.__name__] = checked
        return checked

    return register


def check_shapes(loss_name, kind, given):
    """Raise ValueError unless all tensors of rows have one shape, that of the kind of the loss."""
    per, expected, dimensions = SHAPES[kind]
    shapes = {name: tuple(value.shape) for name, value in given.items()
              if name.endswith(ROW_TENSORS) and value is not None}
    if len(set(shapes.values())) > 1 or any(len(each) != dimensions for each in shapes.values()):
        raise ValueError(f"{loss_name} takes one number per {per}, all tensors of one shape "
                         f"{expected}, got {shapes}")


def check_shapes_and_booleans(loss_name, kind, given):
    """Raise ValueError as check_shapes, and unless labels and mask are booleans."""
    check_shapes(loss_name, kind, given)
    for name in ("labels", "mask"):
        if name in given and given[name].dtype != torch.bool:
            raise ValueError(f"{name} must be a tensor of bool, got {given[name].dtype}")


def check_ranges(ranges, given):
    """Raise ValueError unless every argument is in its range. None, or no value, is the default."""
    for name, text in ranges.items():
        value = given.get(name)
        bound = text.removeprefix("> ")
        if value is None:
            continue
        if bound in given:
            check_above(name, value, bound, given[bound])
        elif not in_range(value, text):
            raise ValueError(f"{name} must be {describe_range(text)}, got {value}")


def check_above(name, value, bound_name, bound):
    """Raise ValueError unless one tensor is above another in every pair. Tensors on a GPU are not
    checked: reading a value would make the CPU wait in every micro-batch, and data.py drops such
    rows on loading."""
    if value.device.type == "cpu" and not (value > bound).all():
        raise ValueError(f"{name} must be above {bound_name} in every pair")


def in_range(value: float, text: str) -> bool:
    """Return whether a number is in the range "> 0", ">= 0", "!= 0", "finite", "[0, 0.5)" or the
    like. Infinity and NaN are in no range."""
    compare_low, low, compare_high, high = read_range(text)
    return math.isfinite(value) and compare_low(value, low) and compare_high(value, high)


@functools.cache
def read_range(text: str) -> tuple[Callable, float, Callable, float]:
    """-> two comparisons and their bounds: "[0, 0.5)" -> >=, 0.0, <, 0.5."""
    if text == "finite":
        return operator.gt, -math.inf, operator.lt, math.inf
    if text.startswith(("[", "(")):
        low, high = text[1:-1].split(",")
        return COMPARE[text[0]], float(low), COMPARE[text[-1]], float(high)
    sign, bound = text.split()
    return COMPARE[sign], float(bound), operator.lt, math.inf


def describe_range(text: str) -> str:
    if text.startswith(("[", "(")):
        return f"in {text}"
    return text if text == "finite" else f"{text} and finite"


# --- Reading the signature of a loss --------------------------------------------------------------

class Needs(NamedTuple):
    """What a loss asks of a row of the data: see `needs_of`."""
    kind: str = "pairs"  # "pairs", "labels" or "lists"
    answers: tuple[str, ...] = ("chosen", "rejected")  # pairs: the sides that it reads; else ()
    scores: bool = False  # it reads a score of each answer
    ordered_scores: bool = False  # pairs: the score of the chosen answer must be the higher one
    ranked: bool = False  # lists: each answer has a rank of its own, the best one first
    one_best: bool = False  # lists: the first answer is the best, the others have no order


def needs_of(function: Callable) -> Needs:
    """Return what a loss, or a sum of losses, asks of a row of the data."""
    kind, ranked, one_best = kind_of(function), False, False
    if kind == "lists":
        parts = [LOSSES[part] for part in function.parts]
        ordered = [part for part in parts if not needs_scores(part)]
        ranked = any("one_best" not in part.tags for part in ordered)
        one_best = bool(ordered) and not ranked
    return Needs(kind, sides_of(function), needs_scores(function), needs_ordered_scores(function),
                 ranked, one_best)


def kind_of(function: Callable) -> str:
    """Return the kind of rows that a loss takes: "pairs", "labels" (single answers, good or bad) or
    "lists" (K answers)."""
    names = tensor_arguments(function)
    if "labels" in names:
        return "labels"
    return "lists" if "mask" in names else "pairs"


def tensor_arguments(function: Callable) -> list[str]:
    """Return the names of the tensors that a loss takes, in order."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]


def hyperparameters(function: Callable) -> dict:
    """Return {name: default} of the hyper-parameters of a loss, which become flags of train.py. In
    a sum, the default is `...` where the parts have different defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def needs_reference(function: Callable) -> bool:
    """Return whether a loss reads log-probs of the reference model."""
    return any(name.startswith("ref_") for name in tensor_arguments(function))


def sides_of(function: Callable) -> tuple[str, ...]:
    """Return the answers of a pair that a loss reads: ("chosen", "rejected"), or one of them. A
    loss of labels or of lists reads no pair: ()."""
    names = tensor_arguments(function)
    return tuple(side for side in ("chosen", "rejected") if f"policy_{side}_logps" in names)


def needs_rejected(function: Callable) -> bool:
    """Return whether a loss reads the rejected answer of a pair. `sft` does not."""
    return "rejected" in sides_of(function)


def compares_answers(function: Callable) -> bool:
    """Return whether a loss reads both answers of a pair. `sft` and `npo` do not."""
    return len(sides_of(function)) == 2


def needs_scores(function: Callable) -> bool:
    """Return whether a loss reads a score of each answer."""
    return not {"chosen_scores", "scores"}.isdisjoint(tensor_arguments(function))


def needs_ordered_scores(function: Callable) -> bool:
    """Return whether the score of the chosen answer must be above that of the rejected answer."""
    return any("chosen_scores" in LOSSES[part].ranges for part in function.parts)


def needs_kl(function: Callable) -> bool:
    """Return whether a loss takes `kl`: the mean, over all answers of the optimizer step, of the
    log-ratio of an answer to the prompt of another row. The trainer computes it in every step."""
    return "kl" in tensor_arguments(function)


def one_row(function: Callable) -> dict[str, torch.Tensor]:
    """Return the tensors of one row, with which a call of the loss checks its hyper-parameters."""
    shape = (1,) * SHAPES[kind_of(function)][2]
    tensors = {}
    for name in tensor_arguments(function):
        tensors[name] = torch.full(shape, 2.0 if "chosen" in name else 1.0)
        if name in ("labels", "mask"):
            tensors[name] = tensors[name].bool()
    return tensors


def start_state(function: Callable) -> dict[str, float]:
    """Return {name: value before the first step} of the numbers that a loss carries from step to
    step: its positional arguments with a number as their default, except `kl`, see `needs_kl`.
    `function.update` makes those of the next step."""
    state = {}
    for parameter in inspect.signature(function).parameters.values():
        is_number = isinstance(parameter.default, float) and parameter.name != "kl"
        if is_number and parameter.kind is not parameter.KEYWORD_ONLY:
            state[parameter.name] = parameter.default
    return state


# --- Sums of losses -------------------------------------------------------------------------------

def find(spec: str) -> Callable:
    """Return the loss for a spec `NAME` or `NAME:WEIGHT,NAME:WEIGHT`. The default weight is 1."""
    weights = {}
    for part in spec.split(","):  # "sigmoid:0.8"
        name, _, weight = part.strip().partition(":")
        if not name:
            raise ValueError(f"loss {spec}: a name is missing; write NAME:WEIGHT,NAME:WEIGHT")
        if name not in LOSSES:
            near = difflib.get_close_matches(name, LOSSES, n=1, cutoff=0)[0]
            raise ValueError(f"loss {name}: there is no such loss; the nearest name is {near}; "
                             f"all: {', '.join(LOSSES)}")
        if name in weights:
            raise ValueError(f"loss {spec}: names {name} twice")
        weights[name] = read_weight(spec, name, weight or "1")
    if list(weights.values()) == [1.0]:  # one loss, unweighted
        return LOSSES[name]
    return combine(weights)


def read_weight(spec, name, text):
    if not REAL.fullmatch(text) or not in_range(float(text), "> 0"):
        raise ValueError(f"loss {spec}: the weight of {name} must be a number > 0, got {text!r}")
    return float(text)


def combine(weights: dict[str, float]) -> Callable:
    """Make the loss Σ weight · loss from {name: weight}.

    A hyper-parameter that several parts have is one hyper-parameter of the sum. Where the defaults
    of the parts differ, the sum has no default (`...`), and the caller must give a value.

    Known sums:
        sigmoid,sft                     Iterative Reasoning PO, arXiv:2404.19733v3, eq. 1, which
                                        TRL once called RPO. With a reference of zeros it is CPO.
        sigmoid:0.8,bco_pair:0.2,sft:1  MPO, arXiv:2411.10442, Sec. 4.1, eq. 3. TRL's
                                        documentation quotes these weights.
    Both papers average the likelihood over each answer separately, `sft` over all tokens. Two other
    methods are called RPO: Regularized PO (arXiv:2405.16436), whose code gives the summed
    likelihood of y_w the small weight βη (5e-5 at β = 0.01), and reward-aware PO
    (arXiv:2406.11704).
    """
    functions = {name: LOSSES[name] for name in weights}
    sum_name = ",".join(f"{name}:{weight:g}" for name, weight in weights.items())
    kinds = {name: kind_of(function) for name, function in functions.items()}
    if len(set(kinds.values())) > 1:
        each = ", ".join(f"{name} takes {kind}" for name, kind in kinds.items())
        raise ValueError(f"loss {sum_name}: the losses of a sum take rows of one kind, but {each}")

    def weighted_sum(**named):
        # Every hyper-parameter needs a value.
        named = hyperparameters(weighted_sum) | named
        for name, value in named.items():
            if value is ...:
                raise ValueError(f"{name} must be given: it has different defaults in the parts "
                                 f"of {sum_name}")
        # Each part gets the arguments that its signature names.
        total = 0
        for name, function in functions.items():
            accepted = inspect.signature(function).parameters
            arguments = {key: value for key, value in named.items() if key in accepted}
            total = total + weights[name] * function(**arguments)
        return total

    # The sum has the same attributes as a loss in LOSSES.
    weighted_sum.__name__ = sum_name
    weighted_sum.__signature__ = merge_signatures(functions.values())
    weighted_sum.parts = weights
    weighted_sum.tags = merge_tags(functions.values())
    weighted_sum.update = merge_updates(sum_name, functions.values(), weighted_sum.tags)
    return weighted_sum


def merge_signatures(functions: Iterable[Callable]) -> inspect.Signature:
    """Merge signatures, each parameter once: tensors, tensors with a default, hyper-parameters."""
    merged = {}
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            if name in merged and merged[name].default != parameter.default:
                parameter = parameter.replace(default=...)
            merged[name] = parameter

    def position(parameter):
        if parameter.kind is parameter.KEYWORD_ONLY:
            return 2
        return 0 if parameter.default is parameter.empty else 1

    return inspect.Signature(sorted(merged.values(), key=position))


def merge_tags(functions):
    """Merge the tags of the parts of a sum. The sum has "batch" if one part has the tag, and any
    other tag only if all of its parts have the tag, except for parts that read one answer of a
    pair, such as `sft`."""
    others = []
    for function in functions:
        if kind_of(function) != "pairs" or compares_answers(function):
            others.append(function.tags - {"batch"})
    merged = set.intersection(*others) if others else set()
    if any("batch" in function.tags for function in functions):
        merged.add("batch")
    return merged


def merge_updates(sum_name, functions, tags):
    """Return the `update` of a sum: that of its part with state, or None."""
    with_state = [function for function in functions if function.update]
    if not with_state:
        return None
    names = ", ".join(function.__name__ for function in with_state)
    if len(with_state) > 1:
        raise ValueError(f"loss {sum_name}: a sum has one loss with state at most, not {names}")
    # The state follows from rewards/margins, which are per token where the whole loss averages.
    part = with_state[0]
    if ("average" in part.tags) != ("average" in tags):
        kind = "per token" if "average" in part.tags else "of whole answers"
        raise ValueError(f"loss {sum_name}: {names} has state {kind}, so the other parts that "
                         f"compare two answers must have rewards {kind} too")
    return part.update


# --- python losses.py -----------------------------------------------------------------------------

GROUPS = {  # {heading: whether a loss is in this group}, the first that fits
    "Labels": lambda function: kind_of(function) == "labels",
    "Lists of K answers": lambda function: kind_of(function) == "lists",
    "One answer": lambda function: not compares_answers(function),
    "Pairs with scores, and a reference": needs_scores,
    "Pairs and a reference": needs_reference,
    "Pairs": compares_answers,
}


def group_losses() -> dict[str, list[Callable]]:
    """Return {heading of GROUPS: its losses}, in the order of the table."""
    groups = {"Pairs and a reference": []}  # this group first
    for name, function in LOSSES.items():
        if name == function.__name__:  # else an older name of the same loss
            heading = next(each for each, fits in GROUPS.items() if fits(function))
            groups.setdefault(heading, []).append(function)
    return groups


def table() -> list[str]:
    """Return the lines of a Markdown table of the losses for each group, from signatures and
    docstrings."""
    lines = []
    for heading, functions in group_losses().items():
        rows = [table_row(function) for function in functions]
        lines += [f"**{heading}**", "", "| loss | summary | paper | hyper-parameters |"]
        lines += ["|---|---|---|---|", *rows, ""]
    return lines[:-1]


def table_row(function):
    """Format the row of a loss: the first line of its docstring and a link to its paper."""
    summary = function.__doc__.splitlines()[0]
    number = re.search(r"arXiv:(\d+[.]\d+)", function.__doc__).group(1)
    paper = f"[{number}](https://arxiv.org/abs/{number})"
    defaults = [f"`{key}` {value}" for key, value in hyperparameters(function).items()]
    return f"| `{function.__name__}` | {summary} | {paper} | {', '.join(defaults) or 'none'} |"


def curve(function: Callable, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a margin loss and its derivative at the margins h, with default hyper-parameters. The
    answers have 30 and 20 tokens (1 and 1 where the loss averages), and scores that differ by e."""
    h = h.clone().requires_grad_()
    zeros, ones = torch.zeros_like(h), torch.ones_like(h)
    averages = "average" in function.tags
    given = {
        "policy_chosen_logps": h,
        "chosen_lengths": ones if averages else 30 * ones,
        "rejected_lengths": ones if averages else 20 * ones,
        "chosen_scores": torch.e * ones,
        "rejected_scores": zeros,
    }
    tensors = {name: given.get(name, zeros) for name in tensor_arguments(function)}
    value = function(**tensors)
    slope, = torch.autograd.grad(value.sum(), h)
    return value.detach(), slope


def plot(path):
    """Draw every margin loss of single pairs, and its derivative, against βh. Each loss has a panel
    with its own scale, because the default β of the losses differ by a factor of 100."""
    with reading(f"--plot {path}", "; pip install matplotlib"):
        from matplotlib.figure import Figure

    functions = []
    for function in LOSSES.values():
        if "margin" in function.tags and "batch" not in function.tags:
            functions.append(function)
    rows = math.ceil(len(functions) / 3)
    figure = Figure(figsize=(12, 2.8 * rows), layout="constrained")
    z = torch.linspace(-6, 6, 601, dtype=torch.float64)  # βh
    for panel_number, function in enumerate(functions, 1):
        defaults = hyperparameters(function)
        value, slope = curve(function, z / defaults["beta"])
        panel = figure.add_subplot(rows, 3, panel_number)
        panel.plot(z, value, "tab:blue", label="L")
        panel.plot(z, slope / defaults["beta"], "tab:red", label="∂L/∂(βh)")
        panel.grid(color="0.9")
        settings = [f"{name} {value:g}" for name, value in defaults.items()]
        panel.set_title(", ".join([function.__name__, *settings]), fontsize=9)
        panel.set_xlabel("βh̄" if "average" in function.tags else "βh")
    figure.axes[0].legend()
    with reading(f"--plot {path}"):
        figure.savefig(path, dpi=120)


def main():
    """Run the command `python losses.py`."""
    run_script(print_table)


def print_table(arguments):
    """Print the table of all losses, or draw their curves with --plot FILE.png."""
    parser = Parser(description="Print a table of all losses")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the curves of all margin losses")
    path = parser.parse_args(arguments).plot
    if path is None:
        print("\n".join(table()))
        return
    plot(path)
