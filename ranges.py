"""Numbers of the command line: argparse types whose ranges are written as in a paper.

    parser.add_argument("--beta", type=real_number("> 0"))    # refuses 0, nan and "x"
    parser.add_argument("--steps", type=whole_number(">= 1"))

registry.py has the ranges, because the hyper-parameters of losses have them too. A whole number
fits into 64 bits with a sign, as in torch and numpy.
"""
import argparse
import re
from collections.abc import Callable

from registry import REAL, describe_range, in_range

# Whole numbers as a user writes them. Python's int() reads more: "1_000", " 5 ", "٣".
WHOLE = re.compile(r"[+-]?[0-9]+")
MOST_DIGITS = 4000  # int() raises for more


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
