"""Properties of the source as a whole: imports, lengths of functions, documented tables."""
import ast
import graphlib
import re
import statistics
import sys

import pytest
from conftest import ROOT

import flags
import losses
import registry

# File: the product files that it may import.
ALLOWED_IMPORTS = {
    "streams": set(),
    "errors": {"streams"},
    "files": {"errors"},
    "registry": {"errors"},
    "ranges": {"registry"},
    "losses": {"registry"},
    "limits": {"errors"},
    "families": {"errors"},
    "loading": {"errors", "families", "files"},
    "written": set(),
    "templates": {"errors", "limits", "loading", "written"},
    "sources": {"errors", "files"},
    "unread": {"errors"},
    "conversations": {"errors", "sources", "templates", "unread", "written"},
    "fields": {"conversations", "errors", "registry", "sources", "unread"},
    "selection": {"errors", "registry"},
    "formats": {"conversations", "errors", "fields", "registry", "selection"},
    "images": {"errors"},
    "vision": {"errors", "images"},
    "layouts": {
        "conversations", "errors", "fields", "formats", "images", "registry", "selection",
        "sources", "unread",
    },
    "shorten": set(),
    "data": {
        "conversations", "errors", "fields", "formats", "images", "layouts", "loading", "losses",
        "ranges", "registry", "selection", "shorten", "sources", "templates", "unread", "vision",
        "written",
    },
    "answers": {"data", "dpo", "losses"},
    "encoder_decoder": {"data", "dpo", "errors", "families", "logps", "packing"},
    "optimizers": {"errors"},
    "parallel": {"errors", "ranges", "streams"},
    "checkpoint": {"errors", "files", "parallel"},
    "best": {"errors", "files", "trackers"},
    "plots": {"checkpoint", "errors", "files"},
    "trackers": {"errors", "files"},
    "hub": {"errors", "files"},
    "lora": {"errors", "families", "files", "limits"},
    "reach": {"errors", "families", "lora"},
    "model": {"errors", "families", "files", "loading", "lora", "ranges", "reach"},
    "world": {"data", "files", "model", "registry"},
    "dpo": {
        "data", "errors", "families", "loading", "losses", "model", "optimizers", "ranges", "world",
    },
    "packing": {"data", "dpo"},
    "logps": {"dpo", "families", "packing"},
    "experts": {"errors", "packing", "reach"},
    "verify": {"dpo", "packing"},
    "variants": {"dpo", "losses"},
    "flags": {
        "best", "checkpoint", "data", "errors", "files", "hub", "losses", "lora", "optimizers",
        "ranges", "saved", "sources", "trackers", "variants", "world",
    },
    "saved": {"checkpoint", "dpo", "errors", "files", "lora", "plots", "world"},
    "card": {
        "checkpoint", "errors", "families", "files", "flags", "loading", "losses", "plots",
    },
    "batches": {
        "answers", "data", "dpo", "encoder_decoder", "experts", "losses", "packing", "parallel",
        "variants", "vision",
    },
    "log": {
        "batches", "checkpoint", "errors", "files", "logps", "lora", "losses", "optimizers",
        "parallel", "plots", "reach", "trackers", "world",
    },
    "reference": {
        "answers", "batches", "checkpoint", "data", "dpo", "encoder_decoder", "errors", "files",
        "loading", "log", "logps", "lora", "losses", "model", "parallel", "vision",
    },
}
ALLOWED_IMPORTS["rehearsal"] = {
    "checkpoint", "data", "log", "losses", "optimizers", "parallel",
}
ALLOWED_IMPORTS["formulas"] = set()
ALLOWED_IMPORTS["curves"] = {"registry"}
ALLOWED_IMPORTS["book"] = {"card", "curves", "errors", "files", "formulas", "losses", "registry"}
ALLOWED_IMPORTS["generation"] = {
    "data", "encoder_decoder", "errors", "families", "loading", "lora", "packing", "templates",
}
ALLOWED_IMPORTS["samples"] = {
    "batches", "data", "dpo", "errors", "families", "generation", "log", "parallel", "world",
}
ALLOWED_IMPORTS["train"] = set(ALLOWED_IMPORTS)
ALLOWED_IMPORTS["runs"] = set(ALLOWED_IMPORTS)
ALLOWED_IMPORTS["audit"] = set(ALLOWED_IMPORTS)
ALLOWED_IMPORTS["chat"] = {"encoder_decoder", "errors", "generation", "runs"}
ALLOWED_IMPORTS["sample"] = {
    "audit", "chat", "data", "errors", "generation", "ranges", "runs", "world",
}
ALLOWED_IMPORTS["real_runs"] = {
    "answers", "checkpoint", "data", "errors", "files", "loading", "lora", "losses", "model",
    "plots",
}
ALLOWED_IMPORTS["real_model"] = {"errors", "files", "real_runs", "model", "plots", "ranges"}
ALLOWED_IMPORTS["bench"] = {
    "checkpoint", "data", "errors", "loading", "model", "parallel", "ranges", "registry", "train",
}

ALLOWED_IMPORTS |= {
    "tree": {"world"},
    "grounds": {"dpo", "losses", "model", "optimizers", "tree", "world"},
    "experiments": {"grounds", "losses", "tree", "world"},
    "results": {"errors", "files", "losses"},
    "pictures": {"errors", "experiments", "losses", "plots", "registry", "world"},
    "figures": {"book", "errors", "experiments", "files", "log", "pictures", "results"},
}

OTHER_TRAINERS = {"trl", "peft", "bitsandbytes", "accelerate", "deepspeed"}

# File: its syntax tree.
SOURCES = {}
for source_path in ROOT.glob("*.py"):
    if not source_path.name.startswith("test_"):
        SOURCES[source_path.stem] = ast.parse(source_path.read_text())


def imported(tree):
    """Top-level names of the modules that this code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def function_lengths(tree):
    """(name, lines without the docstring) of each function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            docstring_lines = docstring.count("\n") + 1 if docstring else 0
            yield node.name, node.end_lineno - node.lineno + 1 - docstring_lines


def all_function_lengths():
    """(name, lines without the docstring) of each function of the product."""
    lengths = []
    for tree in SOURCES.values():
        lengths.extend(function_lengths(tree))
    return lengths


def test_each_product_file_imports_only_the_files_allowed_for_it_and_none_in_a_cycle():
    assert set(SOURCES) == set(ALLOWED_IMPORTS)
    graphlib.TopologicalSorter(ALLOWED_IMPORTS).prepare()  # raises CycleError for a cycle
    for name, tree in SOURCES.items():
        assert set(imported(tree)) & set(ALLOWED_IMPORTS) <= ALLOWED_IMPORTS[name], name


def test_losses_imports_only_torch_and_registry():
    assert set(imported(SOURCES["losses"])) == {"torch", "registry"}


def test_matplotlib_is_imported_only_inside_functions():
    for name, tree in SOURCES.items():
        at_import = [node for node in tree.body if not isinstance(node, ast.FunctionDef)]
        assert "matplotlib" not in set(imported(ast.Module(at_import, []))), name


def test_no_product_file_imports_a_module_that_only_unix_has():
    """train.py can be imported on Windows. bench.py reads its memory from `resource`."""
    for name, tree in SOURCES.items():
        unix = {"fcntl", "grp", "pwd", "resource", "syslog", "termios"}
        if name == "bench":
            unix.remove("resource")
        assert not set(imported(tree)) & unix, name


def test_no_product_file_imports_another_trainer():
    for name, tree in SOURCES.items():
        assert not set(imported(tree)) & OTHER_TRAINERS, name


def test_requirements_list_every_imported_package():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    packages = {re.match(r"[\w.-]+", line).group() for line in lines}
    available = packages | set(SOURCES) | set(sys.stdlib_module_names)
    for name, tree in SOURCES.items():
        assert set(imported(tree)) <= available, name


def test_a_function_has_at_most_60_lines_and_the_median_function_at_most_12():
    lengths = all_function_lengths()
    assert [pair for pair in lengths if pair[1] > 60] == []
    assert statistics.median(lines for _, lines in lengths) <= 12


def test_no_two_functions_or_classes_have_one_name():
    """Except the `main` of each script."""
    files = {}
    for file, tree in SOURCES.items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
                files.setdefault(node.name, []).append(file)
    assert {name: where for name, where in files.items() if len(where) > 1} == {}


def test_the_body_of_a_function_in_losses_has_at_most_15_lines():
    for node in SOURCES["losses"].body:
        if isinstance(node, ast.FunctionDef):
            body = node.body[1 if ast.get_docstring(node) else 0:]
            assert node.end_lineno - body[0].lineno < 15, node.name


def test_in_train_only_run_calls_main():
    callers = set()
    for function in SOURCES["train"].body:
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "main":
                callers.add(function.name)
    assert callers == {"run"}


def test_docs_losses_contains_the_tables_of_losses_that_registry_generates():
    assert "\n".join(registry.table()) in (ROOT / "docs/losses.md").read_text()


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_hyperparameter_of_a_loss_is_a_flag_that_replaces_no_flag_of_the_trainer(name):
    loss = losses.LOSSES[name]
    # argparse raises an error if a flag of this name exists already.
    defaults = vars(flags.build_parser(loss).parse_args([]))
    assert losses.hyperparameters(loss).items() <= defaults.items()
    assert ("ref_model" in defaults) == losses.needs_reference(loss)
