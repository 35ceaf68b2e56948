"""stdout and stderr of a script: closed ones, characters that they lack, and progress bars.

A line that a script prints always begins at the start of a line, so that `grep ^error` finds it.
A progress bar would prevent that: each time it is drawn it returns to the start of its line by a
carriage return and leaves the cursor at its end. `Lines` therefore ends the bar's line first.
"""
import contextlib
import io
import os
import pathlib
import select
import signal
import sys
import time
from collections.abc import Iterator

BAR_SECONDS = 5  # between two lines of a bar that is not drawn on a terminal


def is_script() -> bool:
    """Return whether Python was started with a file of this folder, as in `python train.py`."""
    path = getattr(sys.modules["__main__"], "__file__", None)
    here = pathlib.Path(__file__).resolve().parent
    return path is not None and pathlib.Path(path).resolve().parent == here


class OutputError(Exception):
    """stdout or stderr is a file on a full disk, say. It is no OSError, which would be taken for an
    error of the files of a run."""


class Output(io.TextIOWrapper):
    """A stream that raises OutputError where it cannot be written. On a terminal its text begins
    below a bar of stderr."""

    def write(self, text: str) -> int:
        bars = sys.stderr
        if bars is not self and isinstance(bars, Lines) and bars.behind_bar and bars.isatty():
            if self.isatty():
                bars.write("\n")
                bars.flush()
        with explained_output(self.name):
            return super().write(text)

    def flush(self) -> None:
        with explained_output(self.name):
            super().flush()


@contextlib.contextmanager
def explained_output(name):
    try:
        yield
    except BrokenPipeError:  # see script_signals_and_streams
        raise
    except OSError as error:
        raise OutputError(f"the output cannot be written to {name}: {error}") from error


class Lines(Output):
    """A stream on which a progress bar shares its line with nothing else.

    On a terminal a bar is drawn in one line again and again, and other text begins below it. In a
    pipe or a file, the first state of a bar, one every BAR_SECONDS, and the last are a line each.
    """
    last_bar = ""  # as it was drawn last
    drawn = -float("inf")  # when
    behind_bar = False  # nothing else was written since

    def write(self, text: str) -> int:
        if text.startswith("\r"):
            shown = self.draw(text)
        elif self.behind_bar and text:
            shown = self.end_bar(text)
        else:
            shown = text
        super().write(shown)
        return len(text)

    def draw(self, text):
        """Return what is to be written for a bar, or for the spaces that erase one."""
        bar = text.strip()
        if self.isatty():
            self.behind_bar = bar != ""
            return text
        self.behind_bar = True
        recent = time.monotonic() - self.drawn < BAR_SECONDS and "100%" not in bar
        if not bar or bar == self.last_bar or recent:
            return ""
        self.last_bar, self.drawn = bar, time.monotonic()
        return f"{bar}\n"

    def end_bar(self, text):
        """Return what is to be written for other text behind a bar."""
        self.behind_bar = False
        if self.isatty():
            return text if text.startswith("\n") else f"\n{text}"
        return "" if text == "\n" else text


def prepare_streams() -> None:
    """Open streams that are closed, escape characters that a stream cannot show, draw bars apart.

    A closed stream, as in `python train.py >&-`, becomes /dev/null. Otherwise the next file that is
    opened, such as a checkpoint, would get its number and the output with it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, this one
    sys.stdout = make_stream(Output, sys.stdout or open(1, "w", closefd=False))
    sys.stderr = make_stream(Lines, sys.stderr or open(2, "w", closefd=False))


def make_stream(kind, stream):
    """Return a stream of this class in place of a stream of Python. A character that its encoding
    lacks, such as an emoji in ASCII, is written as \\U0001f600."""
    return kind(stream.detach(), stream.encoding, "backslashreplace",
                line_buffering=stream.line_buffering, write_through=stream.write_through)


@contextlib.contextmanager
def script_signals_and_streams() -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt; at the end all output is written.

    A closed pipe, as in `python data.py ... | head -1`, ends the script without a message and with
    exit status 141, as it ends other programs.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        try:
            yield
        finally:
            flush_output()
    except BrokenPipeError:
        if not output_is_closed():
            raise
        discard_output()
        sys.exit(141)
    except OutputError as error:
        with contextlib.suppress(OutputError):
            print(f"error: {error}", file=sys.stderr)
        discard_output()
        sys.exit(2)
    finally:
        # Nothing is left to do, so Ctrl-C ends the process without a traceback.
        if is_script() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def discard_output():
    """Let Python, which flushes both streams at exit, write to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)


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


@contextlib.contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Inside, Ctrl-C ends the process at once, also in a call of a library that waits and would let
    no handler of Python run."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
