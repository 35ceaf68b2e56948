"""Kill runs at random moments, resume them, and compare them bit for bit with an uninterrupted run.

    python tests/kill.py --runs 20                   # one process
    python tests/kill.py --runs 20 --processes 2     # DDP; --parallel fsdp: FSDP2
    python tests/kill.py --runs 100 --faults         # the whole life of a run, see crash.py

Each run is killed with SIGKILL and resumed. Every second run is killed while it writes a
checkpoint. Every third run is killed and resumed twice. Prints a table. Exits with status 1 if any
weight or metric of a resumed run differs in a bit.
"""
import argparse
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import crash
from conftest import (
    TINY_RUN,
    differences,
    make_rows,
    make_tokenizer,
    read_metrics,
    start_training,
    tiny_model,
    write_jsonl,
)

import files
import model as models

FLAGS = TINY_RUN | {
    "loss": "bco_pair", "epochs": 60, "save_every": 7, "eval_every": 50, "sync_ref_every": 5,
}


def launch(flags, processes):
    """Start a run in a process group of its own."""
    return start_training(flags, torchrun=processes if processes > 1 else 0)


def last_step(out):
    """The last step in metrics.jsonl; 0 if there is none yet or its line is incomplete."""
    try:
        return read_metrics(out)[-1]["step"]
    except (OSError, IndexError, json.JSONDecodeError):
        return 0


def is_saving(out):
    """Is a checkpoint half written?"""
    return any(out.glob(f"{files.PARTIAL}*/checkpoint-*"))


def kill_at(process, out, while_saving, seconds):
    """Send SIGKILL to the process group `seconds` after the next step, or at the next write of a
    checkpoint after that -> the last step, and whether a checkpoint was partly written."""
    start = last_step(out)
    while process.poll() is None and last_step(out) <= start:
        time.sleep(0.005)
    until = time.time() + seconds
    while process.poll() is None and time.time() < until:
        time.sleep(0.001)
    # Without a pause, because a small checkpoint takes milliseconds.
    while while_saving and process.poll() is None and not is_saving(out):
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    return last_step(out), is_saving(out)


def prepare(parallel):
    """Make a model and rows in a new folder -> the folder, the flags of a run."""
    home = pathlib.Path(tempfile.mkdtemp(prefix="kill-"))
    tokenizer = make_tokenizer()
    models.save_model(tiny_model("llama", tokenizer), tokenizer, home / "model")
    rows = write_jsonl(home / "rows.jsonl", make_rows(22))
    return home, FLAGS | {"model": home / "model", "dataset": rows, "parallel": parallel}


def killed_run(flags, out, processes, kills, while_saving, choose):
    """Start a run, kill and resume it `kills` times -> the last process, a list of the kills."""
    killed_after = []
    process = launch(flags | {"output_dir": out}, processes)
    for _ in range(kills):
        step, saving = kill_at(process, out, while_saving, choose.uniform(0, 2.5))
        killed_after.append(f"{step}{'*' if saving else ''}")
        process = launch({"output_dir": out, "resume": True}, processes)
    return process, killed_after


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", action="store_true",
                        help="kills, torn writes, a full disk and failing writes at any moment")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.faults:
        crash.main(args.runs, args.seed)
    choose = random.Random(args.seed)
    home, flags = prepare(args.parallel)
    whole = home / "whole"
    process = launch(flags | {"output_dir": whole}, args.processes)
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    print(f"uninterrupted: {last_step(whole)} steps, a checkpoint every {FLAGS['save_every']}; "
          f"{args.processes} process(es), {args.parallel}")
    print("| run | killed after step (* while writing a checkpoint) | end |\n|---|---|---|")

    equal_runs = 0
    for run in range(1, args.runs + 1):
        out = home / f"run{run}"
        kills = 2 if run % 3 == 0 else 1
        while_saving = run % 2 == 0
        process, killed_after = killed_run(
            flags, out, args.processes, kills, while_saving, choose)
        _, stderr = process.communicate()
        is_equal = process.returncode == 0 and not differences(whole, out)
        equal_runs += is_equal
        end = "equal" if is_equal else f"DIFFERS {stderr[-300:]}"
        print(f"| {run} | {', '.join(killed_after)} | {end} |", flush=True)
    print(f"{equal_runs} of {args.runs} ends equal the uninterrupted one bit for bit")
    sys.exit(equal_runs < args.runs)


if __name__ == "__main__":
    main()
