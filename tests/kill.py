"""Kill runs at random moments, resume them, and compare their ends bit for bit with that of a run that was left alone.

    python tests/kill.py --runs 20                   # one process
    python tests/kill.py --runs 20 --processes 2     # DDP (--parallel fsdp: shards)

Each run is killed with SIGKILL, every second one while a checkpoint is being written, and resumed; one in three is killed once more
after that. Prints a table, and exits with status 1 if any end differs in a bit of any weight or of any metric.
"""
import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from conftest import (
    command,
    make_rows,
    make_tokenizer,
    read_metrics,
    tiny_model,
    weights,
    write_jsonl,
)

import files
import model as models


def launch(flags, processes):
    return subprocess.Popen(command(*(f"--{name}={value}" if value is not True else f"--{name}" for name, value in flags.items()),
                            torchrun=processes if processes > 1 else 0), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def last_step(out):
    try:
        return read_metrics(out)[-1]["step"]
    except (OSError, IndexError, json.JSONDecodeError):
        return 0


def is_saving(out):
    """Is a checkpoint half written?"""
    return any(out.glob(f"{files.PARTIAL}*/checkpoint-*"))


def kill_at(process, out, while_saving, moment):
    """SIGKILL to the whole process group after so many seconds of steps -> (step reached, whether a checkpoint was half written)."""
    start = last_step(out)
    while process.poll() is None and last_step(out) <= start:
        time.sleep(0.005)
    until = time.time() + moment
    while process.poll() is None and time.time() < until:
        time.sleep(0.001)
    while while_saving and process.poll() is None and not is_saving(out):
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    return last_step(out), is_saving(out)


def equal(left, right):
    a, b = weights(left), weights(right)
    rows = [[{name: value for name, value in row.items() if name != "tokens_per_second"} for row in read_metrics(path)] for path in (left, right)]
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items()) and rows[0] == rows[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    choose, home = random.Random(args.seed), pathlib.Path(tempfile.mkdtemp(prefix="kill-"))
    tokenizer = make_tokenizer()
    models.save_model(tiny_model("llama", tokenizer), tokenizer, home / "model")
    rows = write_jsonl(home / "rows.jsonl", make_rows(22))
    flags = {"model": home / "model", "dataset": rows, "loss": "bco_pair", "batch_size": 8, "micro_batch_size": 3, "max_length": 64, "lr": 1e-2,
             "eval_share": 0.1, "log_every": 1, "epochs": 60, "save_every": 7, "eval_every": 50, "sync_ref_every": 5, "parallel": args.parallel}
    process = launch(flags | {"output_dir": home / "whole"}, args.processes)
    assert process.wait() == 0, process.stderr.read()
    print(f"uninterrupted: {last_step(home / 'whole')} steps, a checkpoint every 7; {args.processes} process(es), {args.parallel}")
    print("| run | killed after step (* while writing a checkpoint) | end |\n|---|---|---|")
    same = 0
    for run in range(1, args.runs + 1):
        out, kills = home / f"run{run}", []
        process = launch(flags | {"output_dir": out}, args.processes)
        for _ in range(2 if run % 3 == 0 else 1):
            step, saving = kill_at(process, out, run % 2 == 0, choose.uniform(0, 2.5))
            kills.append(f"{step}{'*' if saving else ''}")
            process = launch({"output_dir": out, "resume": True}, args.processes)
        _, stderr = process.communicate()
        good = process.returncode == 0 and equal(home / "whole", out)
        same += good
        print(f"| {run} | {', '.join(kills)} | {'equal' if good else 'DIFFERS ' + stderr[-300:]} |", flush=True)
    print(f"{same} of {args.runs} ends equal the uninterrupted one bit for bit")
    sys.exit(same < args.runs)


if __name__ == "__main__":
    main()
