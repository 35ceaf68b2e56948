"""Ranges of numbers, written as in a paper: the hyper-parameters of losses and the flags use them.

    in_range(0.5, "[0, 1)")                                       # True
    parser.add_argument("--beta", type=real_number("> 0"))    # refuses 0, nan and "x"
    parser.add_argument("--steps", type=whole_number(">= 1"))

A whole number fits into 64 bits with a sign, as in torch and numpy.
"""
import argparse
import functools
import math
import operator
import re
from collections.abc import Callable

COMPARE = {
    ">": operator.gt, ">=": operator.ge, "!=": operator.ne,
    "(": operator.gt, "[": operator.ge, ")": operator.lt, "]": operator.le,
}

# Numbers as a user writes them. Python's int() and float() read more: "1_000", " 5 ", "٣", "nan".
WHOLE = re.compile(r"[+-]?[0-9]+")
REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
MOST_DIGITS = 4000  # int() raises for more


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


# --- Numbers of the command line ------------------------------------------------------------------

def whole_number(allowed: str) -> Callable[[str], int]:
    """Make the argparse type of a whole number in a range such as ">= 1" or "[1, 64]"."""
    expected = f"a whole number {describe_range(allowed)}".replace("and finite", "and below 2**63")

    def read(text):
        if WHOLE.fullmatch(text) and len(text) < MOST_DIGITS:
            value = int(text)
            if abs(value) < 2**63 and in_range(value, allowed):
                return value
        raise argparse.ArgumentTypeError(f"must be {expected}, got {shortened(text)}")
    return read


def real_number(allowed: str) -> Callable[[str], float]:
    """Make the argparse type of a number in a range such as "> 0" or "(0, 1]"."""
    expected = "a finite number"
    if allowed != "finite":
        expected = f"a number {describe_range(allowed)}"

    def read(text):
        if REAL.fullmatch(text) and in_range(float(text), allowed):
            return float(text)
        raise argparse.ArgumentTypeError(f"must be {expected}, got {shortened(text)}")
    return read


def shortened(text: str) -> str:
    """Return a value in quotes, as the line of an error shows it."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
