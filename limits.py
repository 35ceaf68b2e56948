"""Runs the programs that data brings, chat templates and patterns, with limits on time and memory.

A chat template may loop for ever, or write a text that fills the memory; a pattern such as (a+)+b
may take years on one name. No check of the program can know that, so it runs in a child process,
which the operating system ends.
"""
import importlib
import multiprocessing
import os
import pathlib
import signal
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from errors import UserError

SECONDS = 10  # of processor time, for one item
PATIENCE = 300  # seconds that the parent waits for one item on a busy machine
MEMORY = 2**30  # bytes, beyond what the process has already


def run_limited(function: Callable, items: list, names: list[str], advice: str = "") -> list:
    """Return [function(item) for item in items], computed in a child process with limits.

    A UserError of the function is raised here. An item that exceeds a limit is a UserError that
    begins with its name, such as "row 5: the chat template", and ends with `advice`, such as "; use
    another". On Windows, which cannot fork, the function runs in this process and without limits.
    """
    if not hasattr(os, "fork"):
        return [function(item) for item in items]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        receiver.close()
        answer(function, items, sender)
    sender.close()
    results, status = [], None
    try:
        for name in names:
            results.append(receive(receiver, name, advice))
    except (EOFError, OSError):  # the child has ended, perhaps in the middle of a result
        _, status = os.waitpid(child, 0)
        raise UserError(end_of_child(names[len(results)], status, advice)) from None
    finally:
        receiver.close()
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return results


def answer(function, items, sender) -> NoReturn:
    """Send (kind, result) of each item, in the child process, which ends here."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the child without a traceback
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        limit_memory()
        for item in items:
            # The signal ends the process, also inside a function written in C.
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            sender.send(outcome_of(function, item))
    finally:
        os._exit(0)


def outcome_of(function, item):
    """Return ("result", result), or the kind of an exception and its text."""
    try:
        return "result", function(item)
    except UserError as error:
        return "user", str(error)
    except MemoryError:
        return "memory", ""
    except BaseException:
        return "bug", traceback.format_exc()


def receive(receiver, name, advice) -> Any:
    """Receive the result of one item, or raise."""
    if not receiver.poll(PATIENCE):
        raise UserError(f"{name} gave no result in {PATIENCE} seconds and was stopped{advice}")
    kind, value = receiver.recv()
    if kind == "user":
        raise UserError(value)
    if kind == "memory":
        raise UserError(f"{name} used more than {MEMORY / 2**30:.0f} GB of memory and was stopped"
                        f"{advice}")
    if kind == "bug":
        raise RuntimeError(f"in the child process of {name}:\n{value}")
    return value


def end_of_child(name, status, advice) -> str:
    """Say why the child process ended before the result of an item, from its status of waitpid."""
    code = os.waitstatus_to_exitcode(status)  # negative: a signal
    if code == -signal.SIGPROF:
        return (f"{name} used more than {SECONDS} seconds of processor time and was stopped"
                f"{advice}")
    how = f"by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"with status {code}"
    return f"{name}: the process that ran it ended {how}"


def limit_memory():
    """Limit the memory of this process to what it has and MEMORY. Linux only."""
    sizes = pathlib.Path("/proc/self/statm")
    if not sizes.exists():
        return
    resource = importlib.import_module("resource")  # only Unix has it
    used = int(sizes.read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + MEMORY
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
