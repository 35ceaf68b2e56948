"""How much a reader has to hold in mind: bounds on the code of each product file.

A dense line packs many operations into few characters. The syntax tree shows that where a count of
lines does not: `total += price * amount` has 7 nodes, a comprehension in a call easily has 30.
"""
import ast
import io
import tokenize

import pytest
from conftest import ROOT

NODES = 8.0  # nodes of the syntax tree per code line, on average over a file
COLUMNS = 100
FUNCTION = 50  # code lines of a function

FILES = sorted(path.name for path in ROOT.glob("*.py") if not path.name.startswith("test_"))
NOT_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def is_docstring(node):
    """A string that stands alone as a statement."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return False
    return isinstance(node.value.value, str)


def code_lines(text):
    """Numbers of the lines that hold code: not blank, not only a comment, not a docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if is_docstring(node):
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return lines


def nodes_per_line(text):
    """Nodes of the syntax tree, without the Load and Store of names. A docstring is one node."""
    count = 0
    for node in ast.walk(ast.parse(text)):
        if not is_docstring(node) and not isinstance(node, ast.expr_context):
            count += 1
    return count / len(code_lines(text))


def wide_lines(text):
    return [number for number, line in enumerate(text.splitlines(), 1) if len(line) > COLUMNS]


def nested_comprehensions(text):
    """Line numbers of the comprehensions with more than one `for`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, COMPREHENSIONS) and len(node.generators) > 1:
            found.append(node.lineno)
    return found


def long_functions(text):
    """(name, code lines) of the functions above the bound."""
    lines, found = code_lines(text), []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            count = len(lines.intersection(range(node.lineno, node.end_lineno + 1)))
            if count > FUNCTION:
                found.append((node.name, count))
    return found


def test_the_measure_ignores_docstrings_comments_and_blank_lines():
    head = '"""Page."""\n\n# why\ntotal = 1\n\n\n'
    text = head + 'def f():\n    """Says\n    what."""\n    return total\n'
    assert code_lines(text) == {4, 7, 10}
    # Module, Constant; Assign, Name, Constant; FunctionDef, arguments, Constant; Return, Name
    assert nodes_per_line(text) == 10 / 3


@pytest.mark.parametrize("name", FILES)
def test_a_code_line_has_on_average_at_most_eight_syntax_nodes(name):
    assert nodes_per_line((ROOT / name).read_text()) <= NODES


@pytest.mark.parametrize("name", FILES)
def test_a_line_has_at_most_a_hundred_columns(name):
    assert not wide_lines((ROOT / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_a_comprehension_has_one_for(name):
    assert nested_comprehensions((ROOT / name).read_text()) == []


@pytest.mark.parametrize("name", FILES)
def test_a_function_other_than_main_has_at_most_fifty_code_lines(name):
    found = long_functions((ROOT / name).read_text())
    assert [pair for pair in found if pair[0] != "main"] == []
