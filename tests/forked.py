"""Run scripts in processes that are forked from one that has imported torch and transformers.

`python train.py` spends five seconds of CPU on its imports, a tiny run a tenth of a second. Here
the imports of the libraries happen once for each process of pytest. A forked process has its own
arguments, environment, working directory, session and output, and runs the file of the script.
What it does not show is the start itself: test_train.py, test_faults.py and test_environment.py
also start scripts by python and torchrun.
"""
import multiprocessing
import operator
import os
import pathlib
import runpy
import socket
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["torch.distributed.fsdp", "transformers.modeling_utils", "datasets", "filelock"])


def hide_matplotlib(setitem):
    """Let its imports fail, because the curves of a tiny run take longer than the run. What
    test_plots.py and test_card.py start in their own process has it."""
    for name in ("matplotlib", "matplotlib.figure"):
        setitem(sys.modules, name, None)


def become(script, arguments, environment, cwd, folder):
    """Become `python SCRIPT ARGUMENTS`, with its output in two files of `folder`."""
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    hide_matplotlib(operator.setitem)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(pathlib.Path(script).parent))
    runpy.run_path(str(script), run_name="__main__")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def rank_environment(rank, ranks, port):
    """What torchrun sets for one of the processes that it starts; nothing for a single one."""
    if ranks == 1:
        return {}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


class Forked:
    """A script in a forked process, with the part of subprocess.Popen that the tests use."""

    def __init__(self, script, arguments, cwd=None, environment=None):
        # Deleted with this object, after the test.
        self.home = tempfile.TemporaryDirectory(prefix="forked-")
        self.output = pathlib.Path(self.home.name)
        given = (ROOT / script, [str(argument) for argument in arguments],
                 dict(os.environ) | (environment or {}), cwd or os.getcwd(), self.output)
        self.process = SERVER.Process(target=become, args=given)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def kill(self):
        self.process.kill()

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked script", timeout)
        return self.returncode

    def communicate(self, timeout=None):
        self.wait(timeout)
        return tuple((self.output / name).read_text() for name in ("stdout", "stderr"))


def wait_for_all(processes, timeout):
    """Wait for all, or until one fails or the time is over; then end the others."""
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        if time.monotonic() > end or any(process.poll() for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.01)


def run(script, *arguments, ranks=1, cwd=None, timeout=300):
    """Run a script, by default one of the project's -> a subprocess.CompletedProcess. With several
    ranks its returncode is 1 if one of them failed, and its output is that of all."""
    port, processes = free_port(), []
    for rank in range(ranks):
        environment = rank_environment(rank, ranks, port)
        processes.append(Forked(script, arguments, cwd, environment))
    wait_for_all(processes, timeout)
    code = processes[0].returncode
    if ranks > 1:
        code = int(any(process.returncode for process in processes))
    outputs = zip(*[process.communicate() for process in processes])
    return subprocess.CompletedProcess(arguments, code, *map("".join, outputs))
