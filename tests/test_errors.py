"""A user's mistake is one line and exit status 2; every other exception shows its traceback."""
import ast
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import flags
from errors import UserError, printable, report


def run_script(script, *arguments):
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


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


# Each of these bugs raises a ValueError in the code of the product.
@pytest.mark.parametrize("name, bug", [
    ("data.py", "int('x')"),
    ("data.py", "max([])"),
    ("data.py", "first, second = [1]"),
    ("bench.py", "int('x')"),
    ("train.py", "int('x')"),
    ("train.py", "first, second = max([])"),
    ("model.py", "int('x')"),
])
def test_a_bug_in_a_script_shows_its_traceback(tmp_path, name, bug):
    result = run_script(plant(bug, name, tmp_path))
    assert result.returncode == 1, result.stderr
    assert "Traceback (most recent call last)" in result.stderr and "ValueError" in result.stderr
    assert "in main" in result.stderr


@pytest.mark.parametrize("name, arguments, message", [
    ("data.py", ["rows.jsonl", "--model=M", "--columns=prompt"], "--columns prompt: write OURS="),
    ("bench.py", ["--model=M", "--data=/nowhere.jsonl"], "--data /nowhere.jsonl: cannot be read"),
    ("bench.py", ["--model=M", "--data=/nowhere.jsonl", "--steps=-1"], "--steps: must be a whole"),
    ("train.py", ["--loss=sigmod"], "--loss sigmod: there is no such loss"),
    ("train.py", ["--model=/nowhere/m", "--dataset=d", "--output_dir=/nowhere/out"],
     "/nowhere/m: no such model folder"),
    ("model.py", ["new", "--tokenizer=/nowhere/m", "--out=o"], "/nowhere/m: no such model folder"),
    ("model.py", ["new", "--tokenizer=M", "--out=/tmp"], "--out /tmp: exists already"),
])
def test_a_mistake_of_the_user_is_reported_in_one_line_with_exit_status_2(name, arguments, message):
    result = run_script(ROOT / name, *arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


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


def test_a_message_with_line_breaks_is_printed_as_one_line(tmp_path):
    (tmp_path / "script.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from errors import UserError, run_script\n"
        "def main(argv):\n    raise UserError('file: wrong\\nhere')\n"
        "run_script(main)\n")
    result = run_script(tmp_path / "script.py")
    assert result.returncode == 2 and result.stderr == "error: file: wrong here\n"


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
