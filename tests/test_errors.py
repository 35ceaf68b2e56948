"""A user's mistake is one line and exit status 2; every other exception shows its traceback."""
import ast
import shutil
import sys

import forked
import pytest
from conftest import ROOT

import bench
import data
import dpo
import errors
import flags
import model
import registry
import train
from errors import UserError, printable, report

SCRIPTS = {"train.py": train.run, "data.py": data.main, "dpo.py": dpo.main, "bench.py": bench.main,
           "model.py": model.main, "losses.py": registry.print_table}


@pytest.fixture
def run(monkeypatch):
    """Run a script in this process, as run(name, *arguments)."""
    def run_named(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        if name == "train.py":
            train.run()
        else:
            errors.run_script(SCRIPTS[name])
    return run_named


def plant(bug, name, folder):
    """Copy the product to a folder, with a bug as the first statement of main in one script."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    tree = ast.parse((ROOT / name).read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    main, = [function for function in functions if function.name == "main"]
    main.body = ast.parse(bug).body + main.body
    (folder / name).write_text(ast.unparse(tree))
    return folder / name


def test_a_bug_in_a_script_shows_its_traceback(tmp_path):
    result = forked.run(plant("first, second = max([])", "train.py", tmp_path))
    assert result.returncode == 1, result.stderr
    assert "Traceback (most recent call last)" in result.stderr and "ValueError" in result.stderr
    assert "in main" in result.stderr


# Each of these bugs raises a ValueError in the code of the product.
@pytest.mark.parametrize("bug", [lambda: int("x"), lambda: max([]), lambda: float("1,5")])
@pytest.mark.parametrize("name, function", [
    ("data.py", (data, "read_flags")),
    ("bench.py", (bench, "measure")),
    ("train.py", (train, "parse_args")),
    ("model.py", (model, "load_tokenizer")),
])
def test_a_bug_is_no_mistake_of_the_user(run, monkeypatch, bug, name, function):
    monkeypatch.setattr(*function, lambda *arguments, **options: bug())
    arguments = {
        "data.py": ["rows", "--model=m"],
        "bench.py": ["--model=m", "--data=d"],
        "model.py": ["new", "--tokenizer=t", "--out=/nowhere/o"],
    }
    with pytest.raises(ValueError) as caught:
        run(name, *arguments.get(name, []))
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize("name, arguments, message", [
    ("data.py", ["rows.jsonl", "--model=M", "--columns=prompt"], "--columns prompt: write OURS="),
    ("bench.py", ["--model=M", "--data=/nowhere.jsonl"], "--data /nowhere.jsonl: cannot be read"),
    ("bench.py", ["--model=M", "--data=/nowhere.jsonl", "--steps=-1"], "--steps: must be a whole"),
    ("bench.py", ["--model=M", "--data=d", "--steps=2"], "--warmup 2: leaves no step to time"),
    ("train.py", ["--loss=sigmod"], "--loss sigmod: there is no such loss"),
    ("train.py", ["--model=/nowhere/m", "--dataset=d", "--output_dir=/nowhere/out"],
     "/nowhere/m: no such model folder"),
    ("train.py", ["--model=m", "--dataset=d", "--lr", "-1e-5"], "--lr: must be a number > 0"),
    ("model.py", ["new", "--tokenizer=/nowhere/m", "--out=o"], "/nowhere/m: no such model folder"),
    ("model.py", ["new", "--tokenizer=M", "--out=/tmp"], "--out /tmp: exists already"),
    ("model.py", [], "command"),
    ("losses.py", ["--plt=x"], "unrecognized arguments: --plt=x"),
    ("losses.py", ["--plot=x.nothing"], "--plot x.nothing: "),
    ("dpo.py", ["--model=m"], "give both --model and --dataset"),
])
def test_a_mistake_of_the_user_is_reported_in_one_line_with_exit_status_2(
        run, capsys, monkeypatch, name, arguments, message):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as end:
        run(name, *arguments)
    printed = capsys.readouterr()
    assert end.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and message in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_takes_debug_and_explains_it_last(run, capsys, name):
    with pytest.raises(SystemExit) as end:
        run(name, "--debug", "--help")
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.endswith("--debug show the traceback of an error, not only its line")
    with pytest.raises(SystemExit):
        run(name, "--nonsense", "--debug")
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback") and printed.splitlines()[-1].startswith("error: ")


def test_only_losses_registry_variants_and_dpo_raise_a_plain_value_error():
    """These files know parameters, not flags: flags.py turns their range errors into UserError."""
    files = set()
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and "ValueError(" in ast.unparse(node):
                files.add(path.stem)
    assert files - {"losses", "registry", "variants", "dpo"} == set()


def test_a_bug_inside_a_loss_is_not_reported_as_a_flag(monkeypatch):
    monkeypatch.setattr(flags, "check_variants", lambda *arguments, **options: int("x"))
    with pytest.raises(ValueError, match="invalid literal") as caught:
        flags.parse_args([])
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize("arguments", [
    ["--beta=-1"],
    ["--ld_alpha=2"],
    ["--f_divergence=alpha", "--f_alpha=2"],
    ["--loss=sigmoid:x"],
])
def test_a_value_out_of_range_is_reported_as_its_flag(arguments):
    name, _ = arguments[-1].split("=")
    with pytest.raises(UserError, match=name):
        flags.parse_args(arguments)


@pytest.mark.parametrize("text, shown", [
    ("row \x1b[2J\x1b]0;title\x07", r"row \x1b[2J\x1b]0;title\x07"),
    ("two\nlines\ttab\r", r"two\nlines\ttab\r"),
    ("naïve 你好 \U0001f600", "naïve 你好 \U0001f600"),
    ("name\udcff.jsonl", r"name\udcff.jsonl"),
    ("\u202egnp.exe\u200b\x9b31m\x7f", r"\u202egnp.exe\u200b\x9b31m\x7f"),
])
def test_what_comes_from_data_cannot_control_the_terminal(text, shown):
    assert printable(text) == shown and shown.isprintable()


def test_an_error_about_such_a_text_is_escaped(capsys):
    report("row \x1b[31mred\x1b[0m of n\udcff.jsonl\nis wrong")
    assert capsys.readouterr().err == (
        "error: row \\x1b[31mred\\x1b[0m of n\\udcff.jsonl is wrong\n")
