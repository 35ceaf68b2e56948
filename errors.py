"""Errors that a user can fix, and how a script starts and ends.

A script imports this file first, before torch and transformers, whose imports take seconds: Ctrl-C
during these imports then ends the script without a traceback.
"""
import argparse
import contextlib
import difflib
import os
import re
import signal
import socket
import sys
import traceback
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator

from streams import is_script, prepare_streams, script_signals_and_streams

# `script_signals_and_streams` sets the handler back. A shell may have Ctrl-C ignored: keep that.
if is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
if is_script():
    prepare_streams()


class UserError(ValueError):
    """A mistake that the user can fix: one line that names file, row, field or flag and says what
    to do. Every other exception is a bug and shows its traceback."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as a UserError, refuses text that is empty or not UTF-8, and explains
    --debug, which `arguments` removes, at the end of --help."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register("type", None, given_text)  # of every flag without a type of its own
        # argparse would take -1e-5 and -inf for the names of flags.
        self._negative_number_matcher = re.compile(r"-[0-9.]|-inf|-nan", re.IGNORECASE)

    def error(self, message):
        raise UserError(message)

    def parse_known_args(self, args=None, namespace=None):
        namespace, unknown = super().parse_known_args(args, namespace)
        for name, value in vars(namespace).items():
            if value == []:  # what argparse makes of "--seed=--"
                self.error(f"argument --{name}: expected one argument")
        return namespace, unknown

    def format_help(self):
        if not hasattr(self, "debug_group"):
            self.debug_group = self.add_argument_group("errors")
            self.debug_group.add_argument(
                "--debug", action="store_true",
                help="show the traceback of an error, not only its line")
        return super().format_help()


def any_name(text: str) -> str:
    """The argparse type of a data file, whose name may have bytes that are not UTF-8. Refuses what
    an unset variable of a shell leaves of --dataset "$DATA", or of a list "$A,$B"."""
    if not text.strip(", \t\n"):
        raise argparse.ArgumentTypeError("its value is empty; give one, or leave the flag out")
    return text


def given_text(text: str) -> str:
    """The argparse type of other text: `any_name`, but refuses bytes that are not UTF-8, which the
    libraries that read and write models cannot open."""
    try:
        any_name(text).encode()
    except UnicodeEncodeError:
        advice = "rename it"
        if sys.getfilesystemencoding() != "utf-8":
            advice = f"the locale's encoding is {sys.getfilesystemencoding()}; set PYTHONUTF8=1"
        raise argparse.ArgumentTypeError(f"{text}: is not UTF-8; {advice}") from None
    return text


def arguments() -> list[str]:
    """Return the arguments of the script without --debug, which changes nothing in a run."""
    return [argument for argument in sys.argv[1:] if argument != "--debug"]


def printable(text: str) -> str:
    """Return text from data or a file name with every character that is not printable escaped.

    These are the escape sequences of a terminal, which could clear the screen or recolor it, line
    breaks, marks that reverse the direction of the text, and the bytes of a file name that are not
    UTF-8: "\\x1b[2J", "\\n", "\\u202e", "\\udcff".
    """
    if text.isprintable():
        return text
    shown = []
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode("ascii")
        shown.append(character)
    return "".join(shown)


def report(sentence: str) -> None:
    """Print the error that is being handled as one line, with --debug after its traceback. In a run
    of several processes, the line names the rank, except rank 0."""
    if "--debug" in sys.argv[1:]:
        traceback.print_exc()
    rank = os.environ.get("RANK", "")
    prefix = f"error on rank {rank}" if rank.isdecimal() and int(rank) else "error"
    print(f"{prefix}: {printable(' '.join(sentence.split()))}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def reading(what: str, advice: str = "") -> Iterator[None]:
    """Turn whatever a library raises about a file of the user into one line.

    what      names the flag, the file or both, as in "--model m: config.json"
    advice    what to do, as in "; convert it by ..."

    Only the call of the library belongs inside: a bug of ours must show its traceback. No exception
    of a library is documented well enough to be listed here, so all of them count.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{what}: {library_reason(error)}{advice}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether Python, torch or a GPU had no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return re.search("can't allocate memory|[Ss]ize calculation overflowed", str(error)) is not None


def library_reason(error: BaseException, most: int = 300) -> str:
    """Return the first line of an exception's message, and the second one after a colon, with its
    type where the message alone, such as the key of a KeyError, explains nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else ""
    if reason.endswith(":"):
        reason = " ".join(lines[:2])
    if len(reason.split()) < 3:
        reason = f"{type(error).__name__} {reason}".strip()
    if len(reason) > most:
        reason = f"{reason[:most]} ..."
    return reason


# The exceptions of the Hub's clients for a name that does not exist, on the Hub or, without a
# network, in the cache. A private or gated repository is a GatedRepoError, which has its own name.
NOT_ON_THE_HUB = {"RepositoryNotFoundError", "LocalEntryNotFoundError", "HFValidationError",
                  "DatasetNotFoundError", "FileNotFoundError"}
GATED = "GatedRepoError"


def hub_failure(name: str, error: BaseException, advice: str = "") -> str:
    """Return the line about a model or data set of the Hub that a library cannot load.

    error       what the library raised. Its causes tell a missing name from other failures
    advice      the end of the line if the name was not found
    """
    kinds, cause = set(), error
    while cause is not None:
        kinds.add(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    if kinds & NOT_ON_THE_HUB and GATED not in kinds:
        return f"{name}: not found locally or on the Hub ({library_reason(error)}){advice}"
    return f"{name}: cannot be loaded from the Hub or its cache: {library_reason(error)}"


def nearest(name: str, existing: Iterable[str]) -> str:
    """Return "; the nearest are A, B" for the end of an error about a name that does not exist, or
    "" if no existing name resembles it."""
    near = difflib.get_close_matches(name, [str(other) for other in existing], n=3)
    if not near:
        return ""
    verb = "is" if len(near) == 1 else "are"
    return f"; the nearest {verb} {', '.join(near)}"


def stop_hub_retries() -> None:
    """Turn off requests to the Hub if no network reaches it. Call before the first request.

    huggingface_hub would repeat each request for half a minute. A cached file is found either way.
    Behind a proxy, only the proxy knows the names of hosts: then nothing is changed.
    """
    constants = sys.modules["huggingface_hub.constants"]  # transformers has imported it
    host = urllib.parse.urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # it has its own copy
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        print(f"{host}: no network reaches it, so only local files are read", file=sys.stderr)


def run_script(main: Callable[[list[str]], None]):
    """Call main(arguments). A UserError, or an error of the disk such as no space left, becomes one
    line on stderr and exit status 2; Ctrl-C one word and exit status 130."""
    with script_signals_and_streams():
        try:
            main(arguments())
        except BrokenPipeError:  # see script_signals_and_streams
            raise
        except (UserError, OSError) as error:
            report(str(error))
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
