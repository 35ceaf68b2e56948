"""Break runs at random moments of their whole life, resume them, and compare every file.

    python tests/kill.py --faults --runs 100 --seed 0

A run makes the embedded world first, in a small size, then caches its reference, writes and deletes
checkpoints, and saves the model. Each run has one fault, every third run two:

    clock   SIGKILL after a random time
    kill    SIGKILL before a random write, rename, mkdir or unlink, of any library
    torn    a random write is cut in half or another change is made, then SIGKILL
    full    from a random write or mkdir on, the disk is full
    fail    a random change fails with an input/output error

A process that has imported everything is forked for each run, which saves the seconds of the
imports. faulty_disk.c, loaded by LD_PRELOAD, makes the faults.
"""
import ctypes
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback

import datasets
from conftest import differences, to_arguments
from safetensors.torch import load_file

import files
import train
import world

KINDS = ("write", "rename", "mkdir", "unlink")
# Fault: the number of faulty_disk.c, and the kinds of changes that it may hit.
FAULTS = {
    "kill": (1, KINDS),
    "torn": (2, KINDS),
    "full": (3, ("write", "mkdir")),
    "fail": (4, KINDS),
}
FLAGS = {
    "loss": "bco_pair", "ref": "cache", "batch_size": 16, "micro_batch_size": 8, "max_steps": 12,
    "warmup_steps": 2, "log_every": 1, "eval_every": 5, "save_every": 2, "keep_checkpoints": 1,
    "output_dir": "out",
}
# Files with times or flags in them, which differ between a resumed run and an uninterrupted one.
NOT_COMPARED = {"config.json", "metrics.jsonl", "state.json", "curves.png", "README.md"}
START = "---- train.py"  # in the log, before each process
SECONDS = 120  # after which a run counts as hung


def shrink_world():
    """Make the world of this process small: its making and evaluation take a fraction of a
    second."""
    world.LENGTH = 2
    world.COUNTS.update(sft=256, pairs=96, eval=32)
    world.SFT["epochs"] = 1


def load_shim():
    """Return faulty_disk.c of this process. Start the process again with it, if it lacks it."""
    library = os.environ.get("FAULTY_DISK")
    if library:
        return ctypes.CDLL(library)
    folder = tempfile.mkdtemp(prefix="faulty-disk-")
    source = pathlib.Path(__file__).with_name("faulty_disk.c")
    library = f"{folder}/faulty_disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    added = {"LD_PRELOAD": library, "FAULTY_DISK": library, "TOKENIZERS_PARALLELISM": "false"}
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | added)


def run_child(shim, folder, arguments, fault):
    """train.py in this process, in its own folder, with a fault. Never returns."""
    status = 1
    try:
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        datasets.config.HF_DATASETS_CACHE = pathlib.Path(folder) / "datasets"
        print(START)
        sys.argv = ["train.py", *arguments]
        shim.arm(*fault)
        train.run()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        counts = [shim.count_of(kind) for kind in range(len(KINDS))]
        shim.arm(-1, 0, 0)
        pathlib.Path("counts").write_text(" ".join(map(str, counts)))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def live(shim, folder, arguments, fault=(-1, 0, 0), until=SECONDS):
    """Run train.py in a fork, and kill it after `until` seconds -> its exit status, negative for a
    signal, and its time."""
    start = time.time()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        run_child(shim, folder, arguments, fault)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.time() - start
        if time.time() - start > until:
            os.kill(child, signal.SIGKILL)
            until = SECONDS * 2
        time.sleep(0.002)


def draw_fault(choose, counts, seconds):
    """-> a description, faulty_disk's three numbers, and the time of a SIGKILL."""
    name = choose.choice(["clock", *FAULTS])
    if name == "clock":
        until = choose.uniform(0, seconds)
        return f"clock {until:.2f} s", (-1, 0, 0), until
    action, kinds = FAULTS[name]
    kind = choose.choice(kinds)
    number = choose.randint(1, counts[kind])
    return f"{name} {kind} {number}", (KINDS.index(kind), number, action), SECONDS


def next_arguments(folder):
    """The command line after a fault: --resume if there is something to resume."""
    out = folder / "out"
    if (out / "config.json").exists() or list(out.glob("checkpoint-*")):
        return ["--output_dir=out", "--resume"]
    return to_arguments(FLAGS)


def tree(folder):
    """{relative path: content} of the files that a run leaves."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        compared = name.parts[0] in ("out", "runs") and path.name not in NOT_COMPARED
        if compared and path.is_file() and path.suffix not in (".lock", ""):
            contents[str(name)] = content_of(path)
    return contents


def content_of(path):
    """The bytes of a file, or of each tensor: safetensors orders its header at random."""
    if path.suffix != ".safetensors" or files.PARTIAL in str(path):
        return path.read_bytes()
    return {name: (str(tensor.dtype), tensor.shape, tensor.numpy().tobytes())
            for name, tensor in load_file(path).items()}


def compare(whole, folder):
    """-> what is wrong in the folder of a run that was broken and resumed."""
    expected, found = tree(whole), tree(folder)
    # A kill inside a write leaves a folder of this name.
    leftovers = {name for name in found.keys() - expected.keys() if files.PARTIAL in name}
    wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"{name} is too much" for name in found.keys() - expected.keys() - leftovers]
    wrong += [f"{name} differs" for name in expected.keys() & found.keys()
              if expected[name] != found[name]]
    if not wrong:
        wrong += differences(whole / "out", folder / "out")
    return wrong, len(leftovers)


def broken_run(shim, folder, choose, counts, seconds, faults):
    """Run, break and resume until the end -> the faults, and what went wrong on the way."""
    folder.mkdir()
    told, wrong, arguments = [], [], to_arguments(FLAGS)
    for _ in range(faults):
        text, fault, until = draw_fault(choose, counts, seconds)
        status, took = live(shim, folder, arguments, fault, until)
        told.append(f"{text} -> {status}")
        # An error is one line, in the words of a user.
        lines = [line for line in said(folder) if "error: " in line]
        if status == 2 and len(lines) == 1:
            told[-1] += f" ({lines[0].partition('error: ')[2][:120]})"
        elif status == 2:
            wrong.append(f"{len(lines)} lines of error")
        if status not in (0, 2, -signal.SIGKILL) or took > SECONDS:
            wrong.append(f"exit status {status} after {took:.0f} s")
        arguments = next_arguments(folder)
    status, took = live(shim, folder, arguments)
    if "Traceback" in (folder / "log").read_text(errors="replace"):
        wrong.append("a traceback")
    if status != 0:
        wrong.append(f"the resumed run has exit status {status} after {took:.0f} s")
    return told, wrong


def said(folder):
    """The lines of the last process, without the bars."""
    text = (folder / "log").read_text(errors="replace")
    return text.rpartition(START)[2].replace("\r", "\n").splitlines()


def main(runs, seed):
    shim = load_shim()
    shim.arm.argtypes = [ctypes.c_int, ctypes.c_long, ctypes.c_int]
    shim.count_of.restype = ctypes.c_long
    shrink_world()
    home = pathlib.Path(tempfile.mkdtemp(prefix="crash-"))
    whole = home / "whole"
    whole.mkdir()
    status, seconds = live(shim, whole, to_arguments(FLAGS))
    assert status == 0, (whole / "log").read_text()
    numbers = map(int, (whole / "counts").read_text().split())
    counts = dict(zip(KINDS, numbers))
    print(f"uninterrupted: {seconds:.1f} s, changes of files: {counts}")
    print("| run | fault -> exit status | files left over | end |\n|---|---|---|---|")

    good = 0
    for run in range(1, runs + 1):
        choose = random.Random(f"{seed} {run}")
        folder = home / f"run{run}"
        told, wrong = broken_run(shim, folder, choose, counts, seconds, 2 if run % 3 == 0 else 1)
        left = 0
        if not wrong:
            wrong, left = compare(whole, folder)
        good += not wrong
        end = f"WRONG: {'; '.join(wrong[:3])}; see {folder}/log" if wrong else "equal"
        print(f"| {run} | {', '.join(told)} | {left} | {end} |", flush=True)
        if not wrong:
            shutil.rmtree(folder)
    print(f"{good} of {runs} broken runs ended like the uninterrupted one, file by file")
    sys.exit(good < runs)
