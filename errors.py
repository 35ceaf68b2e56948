"""Errors that a user can fix, and how a script starts and ends.

A script imports this file first, before torch and transformers, whose imports take seconds: Ctrl-C
during these imports then ends the script without a traceback.
"""
import argparse
import contextlib
import difflib
import io
import os
import pathlib
import select
import signal
import socket
import sys
import traceback
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator


def is_script() -> bool:
    """Return whether Python was started with a file of this folder, as in `python train.py`."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    here = pathlib.Path(__file__).resolve().parent
    return path is not None and pathlib.Path(path).resolve().parent == here


# `script_signals_and_streams` sets the handler back. A shell may have Ctrl-C ignored: keep that.
if is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class UserError(ValueError):
    """A mistake that the user can fix: one line that names file, row, field or flag and says what
    to do. Every other exception is a bug and shows its traceback."""


class Parser(argparse.ArgumentParser):
    """Reports a wrong flag as a UserError. Each parser names --debug, which `arguments` removes."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.add_argument("--debug", action="store_true", default=argparse.SUPPRESS,
                          help="show the traceback of an error, not only its line")

    def error(self, message):
        raise UserError(message)


def arguments() -> list[str]:
    """Return the arguments of the script without --debug, which changes nothing in a run."""
    return [argument for argument in sys.argv[1:] if argument != "--debug"]


def report(sentence: str, rank: int = 0) -> None:
    """Print the error that is being handled as one line, with --debug after its traceback."""
    if "--debug" in sys.argv[1:]:
        traceback.print_exc()
    prefix = f"error on rank {rank}" if rank else "error"
    print(f"{prefix}: {' '.join(sentence.split())}", file=sys.stderr, flush=True)


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
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {library_reason(error)}{advice}") from error


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


def nearest(name: str, existing: Iterable[str]) -> str:
    """Return "; the nearest are A, B" for the end of an error about a name that does not exist, or
    "" if no existing name resembles it."""
    near = difflib.get_close_matches(name, [str(other) for other in existing], n=3)
    if not near:
        return ""
    verb = "is" if len(near) == 1 else "are"
    return f"; the nearest {verb} {', '.join(near)}"


@contextlib.contextmanager
def script_signals_and_streams() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt, and output that the terminal cannot show is escaped.

    A character that the encoding of the output lacks, such as an emoji in ASCII, is written as
    \\U0001f600. A closed pipe, as in `python data.py ... | head -1`, ends the script without a
    message and with exit status 141, as it ends other programs.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            flush_output()
    except BrokenPipeError:
        if not output_is_closed():
            raise
        # Python flushes both streams once more at exit, which must not raise again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(nowhere, number)
        sys.exit(141)


def flush_output():
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def output_is_closed() -> bool:
    """Return whether stdout or stderr is a pipe whose reader has ended."""
    if not hasattr(select, "poll"):  # on Windows
        return True
    poll = select.poll()
    for number in (1, 2):
        poll.register(number, select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


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
    """Call main(arguments). A UserError becomes one line on stderr and exit status 2; Ctrl-C one
    word and exit status 130."""
    with script_signals_and_streams():
        try:
            main(arguments())
        except UserError as error:
            report(str(error))
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)
