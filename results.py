"""The results of the runs behind the pictures: figures/NAME.jsonl, one line for each finished run.

    {"settings": {"loss": "ipo", "beta": 0.5, "seed": 0}, "code": "1f0c...", "result": {...}}

A line is appended when a run ends, so an interrupted command continues with the runs that are
missing. `code` is a hash of the code that made the result. After a change of that code the result
counts as missing.
"""
import ast
import functools
import hashlib
import inspect
import json
import pathlib
import textwrap
import types
from collections.abc import Callable, Iterator

from errors import UserError
from files import written_aside
from losses import LOSSES, find

FOLDER = pathlib.Path(__file__).parent / "figures"
FOLLOWED = ("experiments", "grounds", "tree", "losses", "pictures")  # modules whose code counts


# --- The code of a run ----------------------------------------------------------------------------

def code_digest(run: Callable, settings: dict) -> str:
    """Hash the code of a run and of the functions and constants that it reaches in FOLLOWED, and of
    its loss. Comments, docstrings and blank lines don't count."""
    parts = {}
    waiting = [run]
    if settings.get("loss") in LOSSES or "," in settings.get("loss", ""):
        waiting += [LOSSES[part] for part in find(settings["loss"]).parts]
    while waiting:
        function = inspect.unwrap(waiting.pop())
        name = f"{function.__module__}.{function.__qualname__}"
        if name not in parts:
            defaults = getattr(function, "__defaults__", None)
            parts[name] = code_of(function) + repr(defaults)
            constants, more = names_of(function)
            parts |= constants
            waiting += more
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def code_of(function) -> str:
    """The lines of a function or class without comments, docstrings and blank lines."""
    text = textwrap.dedent(inspect.getsource(function))
    documentation = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documentation.update(range(node.lineno, node.end_lineno + 1))
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if number not in documentation and line.strip() and not line.strip().startswith("#"):
            lines.append(line.rstrip())
    return "\n".join(lines)


def names_of(function) -> tuple[dict, list]:
    """The global names that a function reads: constants, {name: value}, and functions to follow."""
    constants, functions = {}, []
    if inspect.isclass(function):
        return constants, functions
    for code in nested_code(function.__code__):
        for name in code.co_names:
            value = function.__globals__.get(name)
            module = getattr(inspect.unwrap(value), "__module__", None) if callable(value) else None
            if module in FOLLOWED:
                functions.append(value)
            elif is_plain(value):
                constants[f"{function.__module__}.{name}"] = repr(value)
    return constants, functions


def is_plain(value) -> bool:
    """Whether a value has the same repr in every process: numbers, texts, and tables of them."""
    if isinstance(value, dict):
        return is_plain(tuple(value.items()))
    if isinstance(value, (tuple, list)):
        return all(is_plain(each) for each in value)
    return value is not None and isinstance(value, (int, float, str))


def nested_code(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from nested_code(constant)


# --- The file -------------------------------------------------------------------------------------

def key(settings: dict) -> str:
    return json.dumps(settings, sort_keys=True)


def read_results(name: str, folder: pathlib.Path = FOLDER) -> list[dict]:
    """Read the rows of a picture; half of a last line is left out."""
    path = folder / f"{name}.jsonl"
    rows = []
    if not path.exists():
        return rows
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            print(f"{path}: a line is not JSON, and its run is repeated")
    return rows


def missing(name: str, plan: list[dict], run: Callable, folder=FOLDER) -> list[dict]:
    """Return the settings of the plan that have no result of today's code."""
    finished = set()
    for row in read_results(name, folder):
        if row["code"] == code_digest(run, row["settings"]):
            finished.add(key(row["settings"]))
    return [settings for settings in plan if key(settings) not in finished]


def append(name: str, settings: dict, run: Callable, result: dict, folder=FOLDER):
    """Add the row of a finished run."""
    row = {"settings": settings, "code": code_digest(run, settings), "result": result}
    path = folder / f"{name}.jsonl"
    text = path.read_text() if path.exists() else ""
    with open(path, "a") as file:
        # A killed command may have left half a line.
        if text and not text.endswith("\n"):
            file.write("\n")
        file.write(json.dumps(row) + "\n")


def ordered_results(name: str, plan: list[dict], folder=FOLDER) -> list[dict]:
    """Keep the last row of each settings of the plan, in its order, and return them."""
    latest = {key(row["settings"]): row for row in read_results(name, folder)}
    absent = [settings for settings in plan if key(settings) not in latest]
    if absent:
        raise UserError(f"{folder / name}.jsonl lacks {len(absent)} of {len(plan)} runs; run "
                        f"python figures.py {name}")
    rows = [latest[key(settings)] for settings in plan]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / f"{name}.jsonl"
    if text != path.read_text():
        with written_aside(path) as temporary:
            temporary.write_text(text)
    return rows
