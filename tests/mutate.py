"""Change the bodies of the losses, one thing at a time, and list the changes that no test finds.

    python tests/mutate.py                  # every function of losses.py with a formula
    python tests/mutate.py sigmoid ipo      # these functions
    python tests/mutate.py --claims ipo     # against tests/test_claims.py alone

The changes: a sign, a factor, a term or factor that is dropped, a detach more or less, a sum for an
average, a clamp, hinge or sort that is dropped, two arguments that are swapped. A change replaces
the code of the function in place, so all tests see it, and only the tests that call the function
run, until one fails. Prints the survivors; exits with status 1 if there are any.
"""
import argparse
import ast
import inspect
import pathlib
import sys
import textwrap

import pytest
from _pytest.runner import runtestprotocol

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import losses

READ_SOURCE = "test_a_copy_of_a_loss"  # compares a function with its source: it finds every change
SWAPS = [("chosen", "rejected"), ("rejected", "chosen"), ("policy", "ref"), ("ref", "policy")]
DROPPED = ("detach", "clamp", "relu", "to")


def formulas():
    """{name: function without its checks}"""
    helpers = [losses.f_divergence_score, losses.update_delta, losses.capped_exp]
    functions = [inspect.unwrap(function) for function in losses.LOSSES.values()]
    return {function.__name__: function for function in functions + helpers}


def replacements(node, arguments):
    """Expressions that may take the place of this one, as source."""
    if isinstance(node, ast.BinOp):
        left, right = f"({ast.unparse(node.left)})", f"({ast.unparse(node.right)})"
        return {
            ast.Add: [f"{left} - {right}", left, right],
            ast.Sub: [f"{left} + {right}", left, f"-{right}"],
            ast.Mult: [f"{left} / {right}", left, right],
            ast.Div: [f"{left} * {right}", left],
            ast.Pow: [left, f"{left}.abs()"],
        }[type(node.op)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return [f"({ast.unparse(node.operand)})"]
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return [str(2 * node.value + 1), str(node.value / 2 - 1)]
    if isinstance(node, ast.Name) and node.id in arguments:
        names = {node.id.replace(old, new) for old, new in SWAPS} & set(arguments) - {node.id}
        detached = [f"{node.id}.detach()"] if node.id.startswith("policy") else []
        return [*sorted(names), *detached]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return replacements_of_call(node)
    return []


def replacements_of_call(node):
    name, source, owner = node.func.attr, ast.unparse(node), ast.unparse(node.func.value)
    inside = owner if owner not in ("F", "torch") else ast.unparse(node.args[0])
    if name in DROPPED:
        return [f"({inside})"]
    if name == "sort":
        return [f"torch.stack([{inside}]).max(0)"]  # its values are not sorted
    if name == "mean":
        return [f"({inside}).sum()", f"({inside})"]
    if owner in ("F", "torch") and len(node.args) == 1:
        return [f"{owner}.{name}(-({inside}))", f"{owner}.{name}(2 * ({inside}))"]
    return [f"(2 * {source})"]


def mutants(function):
    """Yield (number of the line, its new text, code) for each change of a function."""
    lines, first = inspect.getsourcelines(function)
    skipped = next(i for i, line in enumerate(lines) if line.startswith("def "))
    source = textwrap.dedent("".join(lines[skipped:])).encode()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    tree = ast.parse(source).body[0]
    arguments = inspect.signature(function).parameters
    for node in (node for statement in tree.body for node in ast.walk(statement)):
        options = replacements(node, arguments)
        if isinstance(node, ast.expr) and node in [each.value for each in returns(tree)]:
            value = ast.unparse(node)
            options += [f"-({value})", f"2 * ({value})", f"({value}).mean() + 0 * ({value})"]
        for new in options:
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            changed = b"".join([source[:start], f"({new})".encode(), source[end:]]).decode()
            space = {}
            exec(changed, vars(losses) | {"__name__": "mutant"}, space)
            code = space[function.__name__].__code__
            line = changed.splitlines()[node.lineno - 1].strip()
            yield first + skipped + node.lineno - 1, line, code


def returns(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Return)]


class Run:
    """A plugin that takes the place of pytest's loop over the tests."""

    def __init__(self, names):
        self.names, self.survivors = names, 0

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if READ_SOURCE not in item.name]

    def pytest_runtestloop(self, session):
        self.find_callers(session.items)
        functions = formulas()
        for name in self.names or functions:
            self.mutate(name, functions[name])
        return True

    def find_callers(self, items):
        """Run all tests once, and note the functions of losses.py that each calls."""
        self.callers = {}

        def note(frame, event, argument):
            if frame.f_code.co_filename == losses.__file__:
                self.callers.setdefault(frame.f_code.co_name, {})[item] = True

        for item in items:
            sys.setprofile(note)
            passed = passes(item)
            sys.setprofile(None)
            assert passed, f"{item.nodeid} fails without a change"

    def mutate(self, name, function):
        tests, original, count, survivors = list(self.callers.get(name, [])), function.__code__, 0, []
        for number, line, code in mutants(function):
            function.__code__, count = code, count + 1
            killer = next((item for item in tests if not passes(item)), None)
            if killer is None:
                survivors.append(f"    losses.py:{number}: {line}")
            else:
                tests.sort(key=lambda item: item is not killer)  # it may find the next one too
        function.__code__ = original
        self.survivors += len(survivors)
        print(f"{name}: {count} changes, {len(tests)} tests, {len(survivors)} survive", flush=True)
        print("".join(f"{line}\n" for line in survivors), end="", flush=True)


def passes(item):
    return not any(report.failed for report in runtestprotocol(item, nextitem=None, log=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("functions", nargs="*", choices=[*formulas(), []])
    parser.add_argument("--claims", action="store_true")
    args = parser.parse_args()
    files = ["tests/test_claims.py"] if args.claims else ["test_losses.py", "tests/test_claims.py"]
    run = Run(args.functions)
    pytest.main(["-n", "0", "-q", "-s", "--rootdir", str(ROOT), *(str(ROOT / f) for f in files)],
                plugins=[run])
    sys.exit(run.survivors > 0)
