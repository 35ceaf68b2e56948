"""Errors that a user can fix, and how a script reports them."""
import argparse
import difflib
import sys
from collections.abc import Callable, Iterable


class UserError(ValueError):
    """A mistake that the user can fix: one line that names file, row, field or flag and says what
    to do. Every other exception is a bug and shows its traceback."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as a UserError."""

    def error(self, message):
        raise UserError(message)


def nearest(name: str, existing: Iterable[str]) -> str:
    """Return "; the nearest are A, B" for the end of an error about a name that does not exist, or
    "" if no existing name resembles it."""
    near = difflib.get_close_matches(name, [str(other) for other in existing], n=3)
    if not near:
        return ""
    verb = "is" if len(near) == 1 else "are"
    return f"; the nearest {verb} {', '.join(near)}"


def run_script(main: Callable[[list[str]], None]):
    """Call main(arguments). A UserError becomes one line on stderr and exit status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        line = " ".join(str(error).splitlines())
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
