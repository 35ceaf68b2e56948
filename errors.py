"""Errors that a user can fix, and how a script reports them."""
import argparse
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake that the user can fix: one line that names file, row, field or flag and says what
    to do. Every other exception is a bug and shows its traceback."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as a UserError."""

    def error(self, message):
        raise UserError(message)


def run_script(main: Callable[[list[str]], None]):
    """Call main(arguments). A UserError becomes one line on stderr and exit status 2."""
    try:
        main(sys.argv[1:])
    except UserError as error:
        line = " ".join(str(error).splitlines())
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
