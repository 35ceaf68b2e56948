"""The machine around a run: terminals, pipes, signals, other runs in the folder, no network."""
import ast
import datetime
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import tqdm
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
import checkpoint
import errors
import files
import parallel
import streams
import train
import world


def start_script(name, *arguments, **environment):
    """Start a script of the product with these environment variables; None unsets one."""
    variables = {key: value for key, value in (os.environ | environment).items()
                 if value is not None}
    return subprocess.Popen(
        [sys.executable, str(ROOT / name), *map(str, arguments)], text=True, env=variables,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, errors="replace")


# --- Terminals and pipes --------------------------------------------------------------------------

@pytest.mark.parametrize("encoding, shown", [
    ("ascii", r"na\xefve \u4f60 \U0001f600 n\udcff"),
    ("latin-1", r"naïve \u4f60 \U0001f600 n\udcff"),
    ("utf-8", "naïve 你 \U0001f600 n\\udcff"),
])
@pytest.mark.parametrize("kind", [streams.Output, streams.Lines])
def test_characters_that_a_stream_cannot_encode_are_escaped(tmp_path, encoding, shown, kind):
    file = open(tmp_path / "log", "w", encoding=encoding)
    with streams.make_stream(kind, file) as stream:
        print("naïve 你 \U0001f600 n\udcff", file=stream)
    assert (tmp_path / "log").read_text(encoding=encoding) == f"{shown}\n"


def test_a_report_is_printed_where_the_locale_has_only_ascii(folder, tmp_path):
    rows = [{"prompt": f"{i} \U0001f600", "chosen": " naïve", "rejected": " no"} for i in range(4)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    process = start_script("data.py", pairs, "--model", folder, LC_ALL="C", PYTHONUTF8="0",
                           PYTHONCOERCECLOCALE="0")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0 and r"\U0001f600" in stdout, stderr


@pytest.mark.parametrize("script, arguments", [
    ("losses.py", []),
    ("train.py", ["--model=MODEL", "--dataset=PAIRS", "--output_dir=OUT", "--max_steps=500",
                  "--batch_size=8", "--max_length=64", "--eval_every=1", "--save_every=1"]),
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


def run_shell(script, redirection, tmp_path):
    """Run a Python program that prepares its streams first, in a shell with this redirection."""
    path = tmp_path / "program.py"
    path.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                    f"import os, streams\nstreams.prepare_streams()\n{script}\n")
    return subprocess.run(["bash", "-c", f"{sys.executable} {path} {redirection}"],
                          capture_output=True, text=True, timeout=60, cwd=tmp_path)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&-", ">&- 2>&- <&-"])
def test_the_output_of_a_script_whose_streams_are_closed_does_not_go_into_its_files(
        closed, tmp_path):
    program = (
        "file = open('weights', 'w'); file.write('whole'); file.flush()\n"
        "print('a line'); print('an error', file=sys.stderr)\n"
        "os.write(1, b'a note'); os.write(2, b'a note')\n"
        "assert file.fileno() > 2")
    done = run_shell(program, closed, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "weights").read_text() == "whole"


@pytest.mark.parametrize("program, redirection, status, message", [
    ("print('x')", ">/dev/full", 2, "error: the output cannot be written to <stdout>: [Errno 28]"),
    ("print('x', flush=True)", ">/dev/full", 2, "<stdout>: [Errno 28] No space left on device"),
    ("print('x', file=sys.stderr)", "2>/dev/full", 2, ""),
    ("sys.exit(3)", ">/dev/full", 3, ""),
    ("print('x' * 100_000, flush=True)", "| true; exit ${PIPESTATUS[0]}", 141, ""),
    ("print('x', flush=True, file=sys.stderr)", "2>&1 >/dev/null | sleep 0; exit 0", 0, ""),
])
def test_output_that_cannot_be_written_is_not_called_an_error_of_the_files_of_a_run(
        program, redirection, status, message, tmp_path):
    program = f"with streams.script_signals_and_streams():\n    {program}"
    done = run_shell(program, redirection, tmp_path)
    assert done.returncode == status and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


# --- Progress bars and lines ----------------------------------------------------------------------

def draw_bar(stream, text):
    """Draw a bar of three steps on a stream, and write a text while it is open."""
    bar = tqdm.tqdm(total=3, desc="steps", file=stream, mininterval=0, ncols=60)
    for i in range(3):
        bar.update()
        if i == 1:
            print(text, file=stream)
    bar.close()
    print("the end", file=stream, flush=True)


@pytest.mark.parametrize("text", ["error: wrong", "two\nerror: wrong", "Warning: this"])
def test_a_line_never_shares_its_line_with_a_bar_in_a_file(text, tmp_path):
    with streams.make_stream(streams.Lines, open(tmp_path / "log", "w")) as stream:
        draw_bar(stream, text)
    lines = (tmp_path / "log").read_bytes().decode().split("\n")
    assert [line for line in lines if not line.startswith("steps:")] == [
        *text.split("\n"), "the end", ""]
    assert "0/3" in lines[0] and "3/3" in lines[-3] and "\r" not in "".join(lines)


@pytest.mark.parametrize("text", ["error: wrong", "two\nerror: wrong", "Warning: this"])
def test_a_line_never_shares_its_line_with_a_bar_on_a_terminal(text):
    master, terminal = os.openpty()
    shown = b""
    with streams.make_stream(streams.Lines, open(terminal, "w")) as stream:
        draw_bar(stream, text)
        while not shown.endswith(b"the end\r\n"):
            shown += os.read(master, 10_000)
    os.close(master)
    shown = shown.decode().replace("\r\n", "\n")
    lines = shown.split("\n")
    for line in [*text.split("\n"), "the end"]:
        assert line in lines
    assert shown.count("\r") >= 4  # the bar is drawn in place


def test_a_bar_in_a_file_is_a_line_every_few_seconds(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(streams.time, "monotonic", lambda: float(next(clock)) / 2)
    with streams.make_stream(streams.Lines, open(tmp_path / "log", "w")) as stream:
        for i in range(101):
            stream.write(f"\rsteps: {i:3}%")
        stream.write("\n")
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0] == "steps:   0%" and lines[-1] == "steps: 100%" and 5 < len(lines) < 25


def test_a_broken_pipe_that_is_not_the_output_is_reported(fit, monkeypatch, capsys):
    def broken(*arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(train, "main", broken)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        train.run()
    assert end.value.code == 2 and "error: [Errno 32]" in capsys.readouterr().err


# --- Ctrl-C ---------------------------------------------------------------------------------------

def test_ctrl_c_during_the_imports_prints_no_traceback():
    process = start_script("train.py", "--help")
    time.sleep(1.2)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr, stderr
    assert process.returncode in (-signal.SIGINT, 130, 0)


@pytest.mark.parametrize("name", ["train", "data", "model", "dpo", "bench", "registry", "sample"])
def test_every_script_imports_errors_before_anything_that_takes_seconds(name):
    """errors.py and streams.py import the standard library alone."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert imports[0].module == "errors"
    for quick in ("errors", "streams"):
        text = (ROOT / f"{quick}.py").read_text()
        for word in re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE):
            assert word in sys.stdlib_module_names | {"streams"}


def test_importing_the_product_leaves_the_handler_of_ctrl_c_and_the_streams():
    program = ("import signal, sys, errors; print(signal.getsignal(signal.SIGINT));"
               "print(sys.stdout is sys.__stdout__, sys.stderr is sys.__stderr__)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "default_int_handler" in done.stdout and "True True" in done.stdout


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


def test_the_first_ctrl_c_saves_and_says_how_to_go_on(long_flags, tmp_path):
    process = start_training(long_flags)
    wait_for_checkpoint(process, tmp_path / "out")
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert stderr.count("stopping after this step; press Ctrl-C again to quit at once") == 1, stderr
    assert "to continue: python train.py" in stdout
    lines = [line for line in stderr.splitlines() if "stopping" in line]
    assert lines[0].startswith("stopping")


@pytest.mark.parametrize("number, words", [
    (signal.SIGINT, "press Ctrl-C again to quit at once"),
    (signal.SIGTERM, "send SIGTERM again to quit at once"),
])
@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_signal_says_what_happens_now_and_what_a_second_one_does_on_rank_0(
        capfd, number, words, rank):
    with train.caught_signals(parallel.Ranks(rank, 2, torch.device("cpu"))) as caught:
        os.kill(os.getpid(), number)
        assert caught == [number] and signal.getsignal(number) is signal.SIG_DFL
    assert signal.getsignal(number) is not signal.SIG_DFL or number == signal.SIGTERM
    expected = "" if rank else f"\nstopping after this step; {words}\n"
    assert capfd.readouterr().err == expected


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


def test_a_file_that_a_full_disk_does_not_take_is_named(tmp_path):
    path = tmp_path / "page.html"
    with pytest.raises(OSError, match="No space left on device: '.*page.html'"):
        with files.written_aside(path):
            raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


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


# --- The environment of several processes ---------------------------------------------------------

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
             "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")


@pytest.fixture
def environment(monkeypatch):
    """Set the variables of a launcher, as in environment("RANK=0 WORLD_SIZE=2")."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def set_variables(text):
        for part in text.split():
            monkeypatch.setenv(*part.split("=", 1))
    return set_variables


@pytest.mark.parametrize("text, message", [
    ("RANK=0", "RANK=0 is set, but WORLD_SIZE is not"),
    ("RANK=3", "RANK=3 is set, but WORLD_SIZE is not"),
    ("WORLD_SIZE=8", "WORLD_SIZE=8 is set, but RANK is not"),
    ("RANK= WORLD_SIZE=8", "WORLD_SIZE=8 is set, but RANK is not"),
    ("RANK=2 WORLD_SIZE=2", "RANK=2: must be below WORLD_SIZE=2"),
    ("RANK=1 WORLD_SIZE=1", "RANK=1: must be below WORLD_SIZE=1"),
    ("RANK=abc WORLD_SIZE=2", "RANK (environment variable): must be a whole number >= 0"),
    ("RANK=-1 WORLD_SIZE=2", "RANK (environment variable): must be a whole number >= 0"),
    ("RANK=0.0 WORLD_SIZE=2", "RANK (environment variable)"),
    ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE (environment variable): must be a whole number >= 1"),
    ("RANK=0 WORLD_SIZE=99999999999999999999", "WORLD_SIZE (environment variable)"),
    ("RANK=0 WORLD_SIZE=2", "MASTER_ADDR= MASTER_PORT=: must be the address of rank 0"),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1", "a port from 1 to 65535"),
    ("RANK=0 WORLD_SIZE=2 MASTER_PORT=29500", "MASTER_ADDR= MASTER_PORT=29500: must be"),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=99999", "a port from 1 to 65535"),
    ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=x", "MASTER_PORT (environment"),
    ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=2", "LOCAL_RANK=2: must be below"),
    ("RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=1", "LOCAL_WORLD_SIZE=1; start all"),
    ("RANK=1 WORLD_SIZE=4 LOCAL_RANK=one", "LOCAL_RANK (environment variable)"),
])
def test_variables_of_a_launcher_that_do_not_fit_together_are_one_line(environment, text, message):
    environment(text)
    with pytest.raises(train.UserError) as error:
        parallel.init_distributed()
    assert message in str(error.value) and "torchrun" in str(error.value)


@pytest.mark.parametrize("text", [
    "", "RANK=", "RANK= WORLD_SIZE=", "WORLD_SIZE=1", "RANK=0 WORLD_SIZE=1",
    "RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=99999", "SLURM_PROCID=0 SLURM_NTASKS=8",
])
def test_one_process_needs_no_group(environment, text):
    environment(text)
    assert parallel.init_distributed() == ALONE and not dist.is_initialized()


def test_several_tasks_of_a_cluster_without_ranks_are_said_to_be_runs_of_their_own(
        environment, capsys):
    environment("SLURM_STEP_NUM_TASKS=4")
    assert parallel.init_distributed() == ALONE
    assert "SLURM_STEP_NUM_TASKS=4, but RANK is not set" in capsys.readouterr().err
    environment("RANK=0 WORLD_SIZE=1")
    parallel.init_distributed()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("text, count, message", [
    ("LOCAL_RANK=2", 2, "LOCAL_RANK=2: this process sees 2 GPUs;"),
    ("RANK=2 WORLD_SIZE=4 LOCAL_RANK=2 LOCAL_WORLD_SIZE=4", 1, "this process sees 1 GPUs;"),
    ("LOCAL_RANK=1 CUDA_VISIBLE_DEVICES=3", 1, "sees 1 GPUs in CUDA_VISIBLE_DEVICES=3; start at"),
    ("RANK=0 WORLD_SIZE=2", 2, "LOCAL_RANK is not set: set it to this process's GPU number"),
])
def test_a_local_rank_without_a_gpu_is_one_line(environment, monkeypatch, text, count, message):
    environment(text)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(train.UserError, match=message):
        parallel.init_distributed()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("rank, message", [
    (0, "rank 1, rank 2 of 3 did not start within 1 seconds"),
    (1, "MASTER_ADDR=127.0.0.1 MASTER_PORT=.*is rank 0 running there"),
])
def test_a_rank_that_does_not_start_is_named_after_the_time_for_the_start(
        environment, monkeypatch, rank, message):
    monkeypatch.setattr(parallel, "START_SECONDS", 1)
    environment(f"RANK={rank} WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}")
    start = time.monotonic()
    with pytest.raises(train.UserError, match=message):
        parallel.init_distributed()
    assert time.monotonic() - start < 30


def test_two_processes_with_one_rank_are_refused():
    store, second = dist.HashStore(), datetime.timedelta(seconds=0.1)
    with pytest.raises(train.UserError, match="rank 0, rank 2 of 3 did not start"):
        parallel.wait_for_ranks(store, 1, 3, second)
    with pytest.raises(train.UserError, match="RANK=1: another process has the same RANK"):
        parallel.wait_for_ranks(store, 1, 3, second)


def test_a_later_step_may_wait_longer_than_the_start():
    assert parallel.START_SECONDS <= 900 < 3600 <= parallel.STEP_SECONDS


# --- Errors of the machine ------------------------------------------------------------------------

@pytest.mark.parametrize("error, message", [
    (OSError(28, "No space left on device"), "Make room, then: python train.py"),
    (OSError(122, "Disk quota exceeded"), "Make room, then: python train.py"),
    (OSError(27, "File too large"), "Make room, then: python train.py"),
    (PermissionError(13, "Permission denied"), r"Permission denied.*When it can be written again"),
    (OSError(30, "Read-only file system"), r"Read-only file system.*When it can be written again"),
])
def test_an_error_of_the_output_folder_is_called_what_it_is(tmp_path, error, message):
    with pytest.raises(train.UserError, match=message):
        with checkpoint.explained_write_errors(tmp_path, ALONE):
            raise error


@pytest.mark.parametrize("size, message", [
    (1, "Make room, then: python train.py --output_dir .* --resume$"),
    (2, "Make room, then: start it again, by the same launcher, with --output_dir .* --resume$"),
])
def test_the_command_to_continue_is_that_of_one_process_or_of_the_launcher(tmp_path, size, message):
    ranks = parallel.Ranks(0, size, torch.device("cpu"))
    with pytest.raises(train.UserError, match=message):
        with checkpoint.explained_write_errors(tmp_path, ranks):
            raise OSError(28, "No space left on device")


def test_an_error_of_another_file_is_not_called_one_of_the_output_folder(tmp_path):
    error = OSError(5, "Input/output error", "/data/pairs.arrow")
    with pytest.raises(OSError) as caught:
        with checkpoint.explained_write_errors(tmp_path, ALONE):
            raise error
    assert caught.value is error and "/data/pairs.arrow" in train.explain(error)


@pytest.mark.parametrize("error, message", [
    (MemoryError(), "out of memory (MemoryError)"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    (RuntimeError("Storage size calculation overflowed with sizes=[9, 32]"), "out of memory"),
    (PermissionError(13, "Permission denied", "x/y"), "Permission denied: 'x/y'"),
])
def test_an_error_of_the_machine_is_one_line(error, message):
    assert message in train.explain(error) and "\n" not in train.explain(error)


def test_a_rank_names_itself_in_the_line_of_its_error(environment, capsys):
    environment("RANK=2 WORLD_SIZE=4")
    errors.report("--lr: wrong")
    environment("RANK=0")
    errors.report("--lr: wrong")
    assert capsys.readouterr().err == "error on rank 2: --lr: wrong\nerror: --lr: wrong\n"


def test_ctrl_c_ends_a_process_that_waits_in_a_library_at_once(environment, monkeypatch):
    handlers = []

    def join(*arguments):
        handlers.append(signal.getsignal(signal.SIGINT))
        raise train.UserError("nobody there")

    environment("RANK=0 WORLD_SIZE=2")
    monkeypatch.setattr(parallel, "join_store", join)
    with pytest.raises(train.UserError):
        parallel.init_distributed()
    assert handlers == [signal.SIG_DFL]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("text, turns", [("LOCAL_RANK= LOCAL_WORLD_SIZE=", 2), ("LOCAL_RANK=1", 2)])
def test_an_empty_local_rank_is_the_rank(environment, monkeypatch, text, turns):
    environment(text)
    passed = []
    monkeypatch.setattr(parallel, "gather", lambda value, ranks: [value] * ranks.size)
    monkeypatch.setattr(parallel, "barrier", lambda ranks: passed.append(1))
    ranks = parallel.Ranks(1, 2, torch.device("cpu"))
    assert parallel.in_turn(lambda: len(passed), ranks) == 1 and len(passed) == turns


def test_on_a_terminal_text_of_stdout_begins_below_a_bar_of_stderr(monkeypatch):
    terminal = io.BytesIO()
    terminal.name = "terminal"
    for name, kind in (("stdout", streams.Output), ("stderr", streams.Lines)):
        stream = kind(io.BufferedWriter(terminal), "utf-8", write_through=True)
        stream.isatty = lambda: True
        monkeypatch.setattr(sys, name, stream)
    sys.stderr.write("\r 50%")
    sys.stderr.flush()
    print("checkpoint-2 is kept")
    print("next")
    sys.stdout.flush()
    assert terminal.getvalue() == b"\r 50%\ncheckpoint-2 is kept\nnext\n"
