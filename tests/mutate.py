"""Change the bodies of the losses, one thing at a time, and list the changes that no test finds.

    python tests/mutate.py                      # all losses and helpers of losses.py: minutes
    python tests/mutate.py --claims ipo sft     # these two, without test_losses.py

The changes: a sign, a factor, a term that is dropped, a detach more or less, a sum for an average,
a clamp, hinge or sort that is dropped, two arguments that are swapped. A change replaces the code
of the function in place, so all tests see it; those that call the function run until one fails.
One change of `dr_dpo` survives because it changes nothing: all its losses are one number, which is
their mean.
"""
import ast
import inspect
import sys

import pytest
from _pytest.runner import runtestprotocol

sys.path.insert(0, ".")  # it runs in the root of the repository
import losses

HELPERS = [losses.f_divergence_score, losses.update_delta, losses.update_gap,
           losses.update_bco_labels, losses.capped_exp]
FORMULAS = {f.__name__: inspect.unwrap(f) for f in [*losses.LOSSES.values(), *HELPERS]}
OPERATIONS = {
    ast.Add: ("({0}) - ({1})", "{0}", "{1}"),
    ast.Sub: ("({0}) + ({1})", "{0}", "-({1})"),
    ast.Mult: ("({0}) / ({1})", "{0}", "{1}"),
    ast.Div: ("({0}) * ({1})", "{0}"),
    ast.Pow: ("{0}", "({0}).abs()"), ast.USub: ("{0}",), ast.Invert: ("{0}",),
    ast.BitAnd: ("{0}", "{1}"), ast.BitOr: ("{0}", "{1}"),
    ast.Return: ("-({0})", "2 * ({0})", "({0}).mean() + 0 * ({0})"),
}
CALLS = {  # {0} is the object of the method, or the first argument of a function of torch
    "detach": ["{0}"], "clamp": ["{0}"], "to": ["{0}"], "relu": ["{0}", "2 * {0}"],
    "mean": ["{0}.sum()", "{0}"], "sort": ["torch.stack([{0}]).max(0)"], "is_tensor": [],
    "ones_like": [],  # the values of its argument do not matter
    "masked_fill": ["{0}"], "triu": ["{0}", "{0}.triu()"], "eye": [], "where": [],
    "softmax": ["{0}.softmax(0)", "{0}.log_softmax(-1)"], "exp": ["{0}"],
    "log_softmax": ["{0}.log_softmax(0)", "{0}.softmax(-1)", "{0}"], "sum": ["{0}.mean(-1)"],
}
SWAPS = [("chosen", "rejected"), ("rejected", "chosen"), ("policy", "ref"), ("ref", "policy"),
         ("undesirable", "desirable"), ("desirable", "undesirable")]


def replacements(node, arguments):
    """Sources of the expressions that may take the place of this one, or of a returned value."""
    operation = type(getattr(node, "op", node))
    parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
    if parts and operation in OPERATIONS:
        return [form.format(*map(ast.unparse, parts)) for form in OPERATIONS[operation]]
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return [str(2 * node.value + 1), str(node.value / 2 - 1)]
    if isinstance(node, ast.Name) and node.id in arguments:
        swapped = {node.id.replace(old, new) for old, new in SWAPS} & arguments - {node.id}
        return sorted(swapped) + [f"{node.id}.detach()"] * node.id.startswith("policy")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        of_torch = ast.unparse(node.func.value) in ("F", "torch")
        inside = f"({ast.unparse(node.args[0] if of_torch else node.func.value)})"
        forms = CALLS.get(node.func.attr, ["{1}(-{0})", "{1}(2 * {0})"] if of_torch else [])
        return [form.format(inside, ast.unparse(node.func)) for form in forms]
    return []


def mutants(function):
    """Yield (number and text of its line, code) for each change of a function."""
    lines, first = inspect.getsourcelines(function)
    skipped = next(i for i, line in enumerate(lines) if line.startswith("def "))
    source = "".join(lines[skipped:]).encode()
    starts = [i for i, byte in enumerate(b"\n" + source) if byte == ord("\n")]  # of the lines
    arguments = set(inspect.signature(function).parameters)
    nodes = list(ast.walk(ast.Module(ast.parse(source).body[0].body, [])))
    dtypes = [node.value for node in nodes if getattr(node, "attr", "") == "dtype"]
    for node in nodes:
        old = node.value if isinstance(node, ast.Return) else node
        for new in replacements(node, arguments) if node not in dtypes else []:
            start = starts[old.lineno - 1] + old.col_offset
            end = starts[old.end_lineno - 1] + old.end_col_offset
            changed = (source[:start] + f"({new})".encode() + source[end:]).decode()
            space = {}
            exec(changed, vars(losses) | {"__name__": "mutant"}, space)
            line = f"{first + skipped + old.lineno - 1}: {changed.splitlines()[old.lineno - 1]}"
            yield " ".join(line.split()), space[function.__name__].__code__


class Run:
    """A plugin of pytest that takes the place of its loop over the tests."""

    def __init__(self, names):
        self.names = names

    def pytest_runtestloop(self, session):
        callers = {name: [] for name in FORMULAS}
        for item in session.items:
            called = set()
            sys.setprofile(lambda frame, event, argument: called.add(frame.f_code))  # noqa: B023
            assert passes(item), f"{item.nodeid} fails without a change"
            sys.setprofile(None)
            for name, function in FORMULAS.items():
                # test_a_copy_of_a_loss_... compares a loss with its source: it finds every change.
                if function.__code__ in called and "copy_of_a_loss" not in item.name:
                    callers[name].append(item)
        for name in self.names:
            self.mutate(FORMULAS[name], callers[name])
        return True

    def mutate(self, function, tests):
        original, changes, survivors = function.__code__, list(mutants(function)), []
        for line, code in changes:
            function.__code__ = code
            killer = next((item for item in tests if not passes(item)), None)
            if killer is None:
                survivors.append(f"    losses.py:{line}")
            else:  # it may find the next change too
                tests.insert(0, tests.pop(tests.index(killer)))
        function.__code__ = original
        print(f"{function.__name__}: {len(changes)} changes, {len(tests)} tests, "
              f"{len(survivors)} survive", *survivors, sep="\n", flush=True)


def passes(item):
    return not any(report.failed for report in runtestprotocol(item, log=False))


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if name != "--claims"]
    files = ["tests/test_claims.py", "tests/test_many_answers.py"]
    files += ["test_losses.py"] * ("--claims" not in sys.argv)
    pytest.main(["-n0", "-q", "-s", *files], plugins=[Run(names or FORMULAS)])
