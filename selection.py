"""Chooses from the answers of a row what a loss needs: a pair, labelled answers, or a list.

    answers a, b, c with the ranks 0, 1, 1
    --pairs best_worst     (a, c)
    --pairs all            (a, b), (a, c); b and c are tied
    --pairs adjacent       (a, b)
    --unpair               of the pair (a, b): a is true, b is false
    a list                 a, b, c; for a loss that needs ranks without ties a, b
"""
import itertools
from typing import NamedTuple

from errors import UserError
from registry import Needs

PAIRS = ("best_worst", "all", "adjacent")
TIED = "ties only"
TIED_ANSWERS = "tied answers dropped"
TIED_PAIRS = "tied pairs left out"


class Shape(NamedTuple):
    """What the user asks of the data: the flags --layout, --pairs, --unpair, --columns and
    --ignore_columns; and whether the model sees images."""
    layout: str = "auto"
    pairs: str | None = None
    unpair: bool = False
    columns: tuple = ()  # pairs (our name, the file's name)
    ignored: tuple = ()
    images: bool = False


class Row(NamedTuple):
    """A row of any layout. Exactly one of ranks and labels is there."""
    prompt: object  # a text, a list of messages, or None where the answers contain it
    answers: list  # texts or lists of messages
    ranks: list = []  # 0 is best, equal numbers are ties
    labels: list = []  # of a single answer: [bool]
    scores: list = []  # one for each answer, or none
    names: tuple = ()  # the fields of the answers, for errors
    options: dict = {}  # for the chat template
    problem: str = ""  # why the row has to be dropped


class Choice(NamedTuple):
    """The answers that one example has."""
    answers: list  # their indices in the row, best first
    labels: list = []
    problem: str = ""
    notes: tuple = ()
    suffix: str = ""  # tells the examples of one row apart


def choose_answers(row: Row, needs: Needs, shape: Shape, where: str) -> list[Choice]:
    """Choose the answers of each example that a row gives."""
    if row.labels:
        return [choose_labelled(row, needs, shape, where)]
    if needs.kind == "labels":
        return unpair(row, shape, where)
    if needs.kind == "lists":
        return [choose_list(row, needs, where)]
    if len(needs.answers) == 1:
        return [choose_one(row, needs)]
    return choose_pairs(row, shape, where)


def best_first(row):
    """Return the indices of the answers. Tied answers stay in the order of the file."""
    return sorted(range(len(row.ranks)), key=row.ranks.__getitem__)


def are_tied(row):
    return len(row.ranks) > 1 and len(set(row.ranks)) == 1


def choose_labelled(row, needs, shape, where):
    """Choose the one answer of a row with a label."""
    label = row.labels[0]
    if needs.kind == "labels":
        if shape.unpair:
            raise UserError(f"{where}: has a label; leave out --unpair, which labels pairs")
        return Choice([0], [label])
    if needs.kind == "lists" or len(needs.answers) != 1:
        wanted = "several answers of one prompt" if needs.kind == "lists" else "pairs"
        raise UserError(f"{where}: has one answer with a label, and the loss reads {wanted}; use a "
                        "loss of labels, such as --loss kto")
    # Fine-tuning imitates the good answers, unlearning forgets the bad ones.
    wanted = needs.answers == ("chosen",)
    problem = "" if label == wanted else f"labelled {str(label).lower()}"
    return Choice([0], problem=problem)


def check_several(row, where):
    if len(row.ranks) < 2:
        raise UserError(f"{where}: has {len(row.ranks)} answer, and the loss compares at least two "
                        "answers of one prompt")


def choose_one(row, needs):
    """Choose the best answer, or the worst for a loss that reads rejected answers alone."""
    order = best_first(row)
    index = order[0] if needs.answers == ("chosen",) else order[-1]
    return Choice([index], problem=TIED if are_tied(row) else "")


def choose_pairs(row, shape, where):
    """Choose the pairs of a row by --pairs. Tied answers are no pair."""
    check_several(row, where)
    if len(row.ranks) > 2 and shape.pairs is None:
        reader = "--unpair" if shape.unpair else "the loss"
        raise UserError(f"{where}: has {len(row.ranks)} answers, and {reader} reads pairs; pass "
                        f"--pairs {'|'.join(PAIRS)}, or use a loss of lists, such as "
                        "--loss plackett_luce")
    order = best_first(row)
    if shape.pairs == "all":
        pairs = list(itertools.combinations(order, 2))
    elif shape.pairs == "adjacent":
        pairs = list(itertools.pairwise(order))
    else:
        pairs = [(order[0], order[-1])]
    untied = [(i, j) for i, j in pairs if row.ranks[i] != row.ranks[j]]
    if not untied:
        return [Choice(order[:2], problem=TIED)]

    # The first example carries the note, so that the report counts rows.
    choices, notes = [], (TIED_PAIRS,) if len(untied) < len(pairs) else ()
    for i, j in untied:
        suffix = f", answers {i + 1} and {j + 1}" if len(untied) > 1 else ""
        choices.append(Choice([i, j], notes=notes, suffix=suffix))
        notes = ()
    return choices


def unpair(row, shape, where):
    """Turn the pairs of a row into answers with labels."""
    if not shape.unpair:
        raise UserError(f"{where}: has several answers of one prompt, and the loss reads answers "
                        "with a label; --unpair labels the better answer of a pair true, the other "
                        "false")
    labels, choices = {}, []
    pairs = choose_pairs(row, shape, where)
    notes = pairs[0].notes
    for pair in pairs:
        if pair.problem:
            return [Choice(pair.answers[:1], [True], pair.problem)]
        for index, label in zip(pair.answers, (True, False)):
            if labels.setdefault(index, label) != label:
                raise UserError(f"{where}: its answer {index + 1} is the better one of one pair "
                                f"and the worse one of another, so --unpair with --pairs "
                                f"{shape.pairs} gives it no label; pass --pairs best_worst")
    for index, label in labels.items():
        choices.append(Choice([index], [label], notes=notes, suffix=f", answer {index + 1}"))
        notes = ()
    return choices


def choose_list(row, needs, where):
    """Choose the answers of a list, best first."""
    check_several(row, where)
    order = best_first(row)
    kept, notes = order, ()
    if are_tied(row) and not needs.scores:
        return Choice(order[:2], problem=TIED)
    if needs.ranked:
        kept = first_of_each_rank(row, order)
    elif not needs.scores:
        # One answer is best, and the others have no order.
        best = [index for index in order if row.ranks[index] == row.ranks[order[0]]]
        kept = best[:1] + order[len(best):]
    if len(kept) < len(order):
        notes = (TIED_ANSWERS,)
    if len(kept) < 2:
        return Choice(order[:2], problem=TIED)
    return Choice(kept, notes=notes)


def first_of_each_rank(row, order):
    kept, ranks = [], set()
    for index in order:
        if row.ranks[index] not in ranks:
            kept.append(index)
            ranks.add(row.ranks[index])
    return kept
