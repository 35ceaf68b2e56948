"""The machine around a run: terminals, pipes, signals, other runs in the folder, no network."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ALONE,
    ROOT,
    TINY_RUN,
    differences,
    read_metrics,
    resume,
    start_training,
    to_arguments,
    wait_for_checkpoint,
    write_jsonl,
)

import bench
import parallel
import train
import world

SCRIPTS = ("train.py", "data.py", "model.py", "dpo.py", "bench.py", "losses.py")


def start_script(name, *arguments, **environment):
    """Start a script of the product with these environment variables; None unsets one."""
    variables = {key: value for key, value in (os.environ | environment).items()
                 if value is not None}
    return subprocess.Popen(
        [sys.executable, str(ROOT / name), *map(str, arguments)], text=True, env=variables,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, errors="replace")


# --- Terminals and pipes --------------------------------------------------------------------------

@pytest.fixture
def unicode_pairs(tmp_path):
    rows = []
    for i in range(22):
        rows.append({"prompt": f"{i} ¿qué? \U0001f600" + " long" * 80, "chosen": " 你好",
                     "rejected": " naïve"})
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "latin-1"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
])
@pytest.mark.parametrize("script", ["train.py", "data.py", "losses.py"])
def test_characters_that_the_output_cannot_encode_are_escaped(
        folder, unicode_pairs, tmp_path, environment, script):
    arguments = {
        "train.py": to_arguments({
            "model": folder, "dataset": unicode_pairs, "output_dir": tmp_path / "out",
            "max_steps": 1, "max_length": 128, "overlong": "drop", "strict": None,
            "max_prompt_length": None} | {"batch_size": 2}),
        "data.py": [unicode_pairs, "--model", folder, "--max_length=2000"],
        "losses.py": [],
    }[script]
    if script == "train.py":
        rows = [{"prompt": f"{i} \U0001f600", "chosen": " 你好", "rejected": " no"}
                for i in range(4)]
        write_jsonl(tmp_path / "pairs.jsonl", rows)
    process = start_script(script, *arguments, **environment)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert {"train.py": r"\U0001f600", "data.py": r"\U0001f600", "losses.py": r"\u"}[script] in (
        stdout)


@pytest.mark.parametrize("script, arguments", [
    ("train.py", ["--help"]),
    ("data.py", ["--help"]),
    ("model.py", ["new", "--help"]),
    ("losses.py", []),
    ("data.py", ["PAIRS", "--model", "MODEL"]),
    ("train.py", ["--model=MODEL", "--dataset=PAIRS", "--output_dir=OUT", "--max_steps=500",
                  "--batch_size=8", "--max_length=64", "--eval_every=1"]),
])
def test_a_closed_pipe_ends_a_script_without_a_message(
        script, arguments, folder, pairs, tmp_path):
    names = {"PAIRS": pairs, "MODEL": folder, "OUT": str(tmp_path / "out")}
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    process = start_script(script, *arguments, PYTHONUNBUFFERED="1")
    process.stdout.readline()
    process.stdout.close()
    stderr = process.stderr.read()
    assert process.wait(60) in (0, 141)
    for word in ("Traceback", "error", "Broken pipe", "Make room"):
        assert word not in stderr, stderr


def test_a_broken_pipe_that_is_not_the_output_is_reported(fit, monkeypatch, capsys):
    def broken(*arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(train, "main", broken)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        train.run()
    assert end.value.code == 2 and "error: [Errno 32]" in capsys.readouterr().err


# --- Ctrl-C ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("seconds", [0.4, 1.2])
def test_ctrl_c_during_the_imports_prints_no_traceback(script, seconds):
    process = start_script(script, "--help")
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr, stderr
    assert process.returncode in (-signal.SIGINT, 130, 0)


def test_importing_the_product_leaves_the_handler_of_ctrl_c(tmp_path):
    program = "import signal, errors, train; print(signal.getsignal(signal.SIGINT))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "default_int_handler" in done.stdout


def test_ctrl_c_while_the_world_is_made_names_no_folder_that_does_not_exist(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py")], cwd=tmp_path, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    line = process.stdout.readline()
    assert "the reference policy is trained first" in line
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in stderr
    assert "interrupted before the first step" in stderr
    for path in re.findall(r"runs/[\w-]+", line + stdout + stderr):
        assert (tmp_path / path).exists(), path


@pytest.fixture
def long_flags(folder, pairs, tmp_path):
    return TINY_RUN | {"model": folder, "dataset": pairs, "output_dir": tmp_path / "out",
                       "max_steps": 3000, "save_every": 5, "lr": 1e-5}


@pytest.mark.parametrize("torchrun", [0, 2])
@pytest.mark.parametrize("number, words", [
    (signal.SIGINT, "press Ctrl-C again to quit at once"),
    (signal.SIGTERM, "send SIGTERM again to quit at once"),
])
def test_the_first_signal_says_what_happens_now_and_what_a_second_one_does(
        long_flags, tmp_path, number, words, torchrun):
    process = start_training(long_flags, torchrun)
    wait_for_checkpoint(process, tmp_path / "out")
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert stderr.count("stopping after this step") == 1, stderr
    if not torchrun:  # torchrun answers Ctrl-C by sending SIGTERM to its processes
        assert f"stopping after this step; {words}" in stderr
    assert "to go on: python train.py" in stdout


def test_a_second_ctrl_c_quits_at_once(fit, monkeypatch):
    """The second signal has the default handler, which ends the process."""
    handlers = []

    def step(*arguments):
        if not handlers:
            os.kill(os.getpid(), signal.SIGINT)
        handlers.append(signal.getsignal(signal.SIGINT))
        return train_step(*arguments)

    train_step = train.train_step
    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(AssertionError, match="assert not True"):  # `fit` expects a run to end
        fit(max_steps=4)
    assert handlers == [signal.SIG_DFL] * 2  # the run ends after the next step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- Killed early, and a long warm-up -------------------------------------------------------------

@pytest.mark.parametrize("what", ["empty folder", "only the lock", "config", "config and metrics"])
def test_a_run_killed_before_its_first_checkpoint_resumes_or_starts_again(fit, tmp_path, what):
    whole, _ = fit(max_steps=3, out="whole")
    out = tmp_path / "killed"
    out.mkdir()
    if what != "empty folder":
        (out / ".lock").touch()
    if "config" in what:
        flags = json.loads((whole / "config.json").read_text())["flags"]
        flags["output_dir"] = str(out)
        (out / "config.json").write_text(json.dumps({"flags": flags}))
    if "metrics" in what:
        (out / "metrics.jsonl").write_text("")
    if "config" in what:
        assert not resume(out)
    else:
        with pytest.raises(train.UserError, match=f"--resume: .*{out}.*"):
            resume(out)
        fit(max_steps=3, out="killed")
    assert not differences(whole, out)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup, long", [(2, False), (3, True), (40, True)])
def test_a_warmup_that_does_not_end_within_the_run_is_one_line(
        fit, capsys, schedule, warmup, long):
    out, metrics = fit(max_steps=3, warmup_steps=warmup, lr_schedule=schedule, lr=1e-3)
    text = capsys.readouterr().out
    assert (f"--warmup_steps {warmup}: the run has only 3 steps" in text) == long
    highest = max(row["lr"] for row in read_metrics(out) if row["split"] == "train")
    assert (highest < 1e-3) == long
    assert not long or f"reaches {highest:.3g} of --lr 0.001" in text


# --- Other runs, other machines -------------------------------------------------------------------

def test_two_runs_that_make_the_world_at_once_both_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    makers = []

    def write(home, *others):
        makers.append(home)
        (home / "reference").mkdir(parents=True)
        if len(makers) == 1:  # another run finishes the same world before this one
            assert world.make(None, ALONE.device).exists()

    monkeypatch.setattr(world, "write_folder", write)
    home = world.make(None, ALONE.device)
    assert len(makers) == 2 and (home / "reference").exists()
    assert [path.name for path in home.parent.iterdir()] == [home.name]


def test_an_error_while_the_world_is_made_is_raised(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(world, "write_folder", full)
    with pytest.raises(OSError, match="No space left"):
        world.make(None, ALONE.device)


def test_two_runs_without_output_dir_get_two_folders(folder, pairs, tmp_path, monkeypatch):
    """Both choose their folder before either has written a file into its own."""
    monkeypatch.chdir(tmp_path)
    flags = TINY_RUN | {"model": folder, "dataset": pairs, "max_steps": 1}
    prepare, nested = train.prepare, []

    def prepare_after_another(*arguments):
        if not nested:
            nested.append(1)
            train.main(to_arguments(flags), ALONE)
        return prepare(*arguments)

    monkeypatch.setattr(train, "prepare", prepare_after_another)
    train.main(to_arguments(flags), ALONE)
    for name in ("sigmoid", "sigmoid-2"):
        assert (tmp_path / "runs" / name / "model.safetensors").exists()


def test_a_run_that_fails_before_its_first_step_leaves_no_folder(
        folder, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = TINY_RUN | {"model": folder, "dataset": pairs, "max_steps": 1, "max_length": 4000}
    with pytest.raises(train.UserError, match="--max_length"):
        train.main(to_arguments(flags), ALONE)
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.parametrize("threads, cores, load, crowded", [
    (1, 1, 9.0, False),
    (8, 8, 0.3, False),
    (8, 8, 6.0, True),
    (8, 2, 0.0, True),
    (64, 64, 1.0, False),
])
def test_a_line_says_when_threads_outnumber_idle_cores(
        threads, cores, load, crowded, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    line = parallel.crowded_line(ALONE)
    assert bool(line) == crowded
    assert not crowded or f"{threads} threads" in line and "OMP_NUM_THREADS" in line


def test_the_measured_peak_takes_seconds_on_a_cpu_with_slow_products(monkeypatch):
    """A clock that gives every product the time of a CPU with 1e8 FLOP/s."""
    sides = []

    def slow_products(side, repeats, dtype, device):
        sides.append((side, repeats))
        return 2 * side**3 / 1e8

    monkeypatch.setattr(bench, "time_products", slow_products)
    assert bench.matmul_peak(torch.bfloat16, ALONE.device) == pytest.approx(1e8)
    assert sum(repeats * 2 * side**3 / 1e8 for side, repeats in sides) < 5
    sides.clear()
    monkeypatch.setattr(bench, "MATMUL_SECONDS", 1e9)
    bench.matmul_peak(torch.bfloat16, ALONE.device)
    assert sides[-1] == (2048, 10)  # on a fast machine, as before


@pytest.mark.parametrize("script, arguments", [
    ("train.py", ["--model=acme/none", "--dataset=PAIRS", "--output_dir=OUT"]),
    ("train.py", ["--model=MODEL", "--dataset=acme/none", "--max_length=64", "--output_dir=OUT"]),
    ("data.py", ["acme/none", "--model", "MODEL"]),
    ("data.py", ["PAIRS", "--model", "acme/none"]),
    ("dpo.py", ["--model=acme/none", "--dataset=acme/none"]),
])
def test_without_a_network_the_sentence_about_the_hub_comes_without_retries(
        script, arguments, folder, pairs, tmp_path):
    names = {"PAIRS": pairs, "MODEL": folder, "OUT": str(tmp_path / "out")}
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    process = start_script(script, *arguments, HF_HUB_OFFLINE=None,
                           HF_ENDPOINT="https://no-such-host.invalid")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "no-such-host.invalid: no network reaches it" in stderr
    assert "acme/none" in stderr.splitlines()[-1] and "Retrying" not in stderr
