"""Promises about the code as a whole: imports, requirements, lengths of functions, README."""
import ast
import re
import statistics
import sys

import pytest
from conftest import ROOT

import flags
import losses
import registry

ARROWS = {  # file: what of ours it may import
    "errors": set(), "registry": set(), "losses": {"registry"}, "data": {"errors"}, "world": set(),
    "packing": set(), "parallel": {"errors"},
    "checkpoint": {"errors", "parallel"}, "lora": {"checkpoint", "errors"}, "model": {"checkpoint", "errors", "lora"},
    "dpo": {"losses", "packing"},
}
ARROWS["flags"] = {"checkpoint", "data", "dpo", "errors", "losses", "lora", "world"}
ARROWS["batches"] = {"data", "dpo", "packing", "parallel"}
ARROWS["log"] = {"batches", "checkpoint", "dpo", "lora", "parallel"}
ARROWS["reference"] = {
    "batches", "checkpoint", "data", "dpo", "errors", "log", "lora", "model", "parallel",
}
ARROWS["train"] = set(ARROWS)
ARROWS["bench"] = {"data", "errors", "model", "parallel", "train"}
SOURCES = {path.stem: ast.parse(path.read_text()) for path in ROOT.glob("*.py") if not path.name.startswith("test_")}


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def lengths(tree):
    """Lines of each function without its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            page = ast.get_docstring(node, clean=False)
            yield node.name, node.end_lineno - node.lineno + 1 - (page.count("\n") + 1 if page else 0)


def test_imports_run_one_way():
    assert set(SOURCES) == set(ARROWS)
    for name, tree in SOURCES.items():
        assert set(imported(tree)) & set(ARROWS) <= ARROWS[name], name


def test_losses_imports_torch_and_registry_alone():
    assert set(imported(SOURCES["losses"])) == {"torch", "registry"}


def test_matplotlib_is_imported_only_to_draw():
    for name, tree in SOURCES.items():
        at_import = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
        assert "matplotlib" not in set(imported(ast.Module(at_import, []))), name


def test_no_product_file_imports_another_trainer():
    for name, tree in SOURCES.items():
        assert not set(imported(tree)) & {"trl", "peft", "bitsandbytes", "accelerate", "deepspeed"}, name


def test_requirements_name_every_package_that_is_imported():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    named = {re.match(r"[\w.-]+", line).group() for line in lines}
    for name, tree in SOURCES.items():
        assert set(imported(tree)) <= named | set(SOURCES) | set(sys.stdlib_module_names), name


def test_functions_are_short():
    found = [pair for tree in SOURCES.values() for pair in lengths(tree)]
    assert not [pair for pair in found if pair[1] > 60]
    assert statistics.median(lines for _, lines in found) <= 12
    for node in SOURCES["losses"].body:
        if isinstance(node, ast.FunctionDef):
            body = node.body[1 if ast.get_docstring(node) else 0:]
            assert node.end_lineno - body[0].lineno < 15, node.name


def test_only_the_script_itself_calls_main_of_train():
    callers = set()
    for function in SOURCES["train"].body:
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "main":
                callers.add(function.name)
    assert callers == {"run"}


def test_the_readme_has_the_table_of_losses_as_the_code_prints_it():
    assert "\n".join(registry.table()) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_keyword_of_a_loss_is_a_flag_and_shadows_none_of_the_trainer(name):
    known = vars(flags.build_parser(losses.LOSSES[name]).parse_args([]))  # argparse refuses a flag that is there already
    assert losses.hyperparameters(losses.LOSSES[name]).items() <= known.items()
    assert ("ref_model" in known) == losses.needs_reference(losses.LOSSES[name])
