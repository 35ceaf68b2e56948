"""The files of a run, each written aside and renamed (files.py): save, verify, resume, lock.

    config.json         the flags of the run; when the run has ended, the model's configuration too
    run.json            instead of config.json in a run with an adapter: the flags of the run
    metrics.jsonl       see log.Log
    checkpoint-N/       after step N: the model or adapter as a folder of its own,
        optimizer/      the optimizer's state and a moving reference, in one file per rank,
        state.json      the step, the schedule, the flags, and a hash of every other file
    .lock               held by the process that writes in this folder

Nothing here knows models or adapters: train.py passes their tensors and a function that saves them.
"""
import contextlib
import hashlib
import io
import json
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import filelock
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from errors import UserError
from files import RUN_FILE, delete_partial, free_name, write_text, written_aside
from parallel import Ranks, barrier, broadcast, first_reason, gather, reshard, whole

LARGE = 10 * 10**9  # bytes of a checkpoint, above which one is kept instead of two


# --- The folder of a run --------------------------------------------------------------------------

@contextlib.contextmanager
def explained_write_errors(folder: pathlib.Path):
    """Turn a write error, such as a full disk, into one line. files.py deletes partial files."""
    try:
        yield
    except BrokenPipeError:  # the reader of the output has ended; no file is wrong
        raise
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        cause = error
        if isinstance(error, dcp.CheckpointException):
            cause = next(iter(error.failures.values()))[0]
        raise UserError(
            f"--output_dir {folder}: could not be written ({cause}); what was there before is "
            f"whole. Make room, then: python train.py --output_dir {folder} --resume") from error


def read_config(folder: str | pathlib.Path, name: str = "config.json") -> dict:
    try:
        return json.loads((pathlib.Path(folder) / name).read_text())
    except (OSError, json.JSONDecodeError):
        return {}


def saved_flags(folder: str | None) -> dict:
    """The flags of the run that --resume continues."""
    if folder is None:
        raise UserError("--resume needs the --output_dir of the run to go on with")
    for name in (RUN_FILE, "config.json"):
        config = read_config(folder, name)
        if "flags" in config:
            return config["flags"]
    raise UserError(f"--resume: there is no run in {folder}")


def write_flags(folder: pathlib.Path, flags: dict) -> None:
    """Write the flags of a run that begins, and delete those of a run that left no checkpoint.

    With an adapter the file is run.json: transformers would take the folder of an adapter for a
    model because of a config.json.
    """
    name, other = "config.json", RUN_FILE
    if flags.get("adapter") or flags.get("lora_rank"):
        name, other = other, name
    write_text(folder / name, json.dumps({"flags": flags}, indent=2) + "\n")
    (folder / other).unlink(missing_ok=True)


def is_complete(folder: str | pathlib.Path) -> bool:
    """Has the run ended? Then config.json has the model's entries, or there is an adapter."""
    has_adapter = (pathlib.Path(folder) / "adapter_config.json").exists()
    return has_adapter or "model_type" in read_config(folder)


def checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """Complete checkpoints, oldest first. checkpoint-best, without a number, is the user's."""
    numbers = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal():
            numbers[path] = int(number)
    return sorted(numbers, key=numbers.get)


def lock_file(path: pathlib.Path) -> filelock.AcquireReturnProxy:
    """Lock a file until the returned context manager ends. The operating system releases the lock
    when the process ends, however it ends.

    Raises filelock.Timeout if another process has the lock. On a file system without locks, new
    versions of filelock warn and then create a marker, which would outlive a killed process. Here
    the warning is an error, as this case is in older versions.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return filelock.FileLock(path).acquire(timeout=0)
        except UserWarning:
            raise NotImplementedError("its file system has no locks") from None


@contextlib.contextmanager
def claim(folder: pathlib.Path, resume: bool, ranks: Ranks):
    """Lock the folder for one run, and refuse a folder with another run in it unless `resume`."""
    if ranks.rank > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = lock_file(folder / ".lock")
    except filelock.Timeout:
        raise UserError(f"--output_dir {folder}: another run is writing there") from None
    except (OSError, NotImplementedError) as error:
        raise UserError(f"--output_dir {folder}: cannot be locked ({error}); choose a folder on "
                        "another file system") from error
    with lock:
        if not resume and (is_complete(folder) or checkpoints(folder)):
            raise UserError(f"--output_dir {folder} holds a run already: "
                            "continue it with --resume, or choose another")
        delete_partial(folder)
        yield


# --- How large checkpoints are, and whether they fit ----------------------------------------------

def tensor_bytes(tensors) -> int:
    """Bytes of these tensors without sharding, each stored once: tied weights are one tensor."""
    distinct = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def plan_checkpoints(folder: pathlib.Path, size: int, start: int, steps: int, save_every: int,
                     keep: int | None, ranks: Ranks) -> tuple[int, str]:
    """Check that the disk has room for the checkpoints of a run -> how many to keep, and a line.

    size            bytes of one checkpoint
    start, steps    the step from which the run continues, and the last step
    keep            --keep_checkpoints; by default 2, and 1 if a checkpoint is LARGE

    A new checkpoint is written before an old one is deleted, so the disk needs room for keep + 1.
    If there is no room for the checkpoints that are due, raise now and not hours later. If none is
    due before the end, the returned line only mentions the lack of room.
    """
    if keep is None:
        keep = 1 if size > LARGE else 2
    due = 0
    if save_every:
        due = (steps - 1) // save_every - start // save_every
    text = f"a checkpoint has {readable(size)}; "
    if due:
        text += f"written every {save_every} steps and when interrupted, the newest {keep} kept"
    else:
        text += "written when interrupted"
    # Rank 0 decides for all ranks: it has the folder.
    problem = None
    if ranks.rank == 0:
        existing = len(checkpoints(folder))
        most = min(keep + 1, existing + max(1, due))
        needed = (most - existing) * size
        free = shutil.disk_usage(existing_parent(folder)).free
        if needed > free:
            problem = f"{readable(free)} free, but checkpoints need {readable(needed)}"
    problem = first_reason(problem, ranks)
    if problem and due:
        raise UserError(f"--output_dir {folder}: {problem}; make room, or lower "
                        "--keep_checkpoints, or write none by --save_every 0")
    if problem:
        text += f". There is no room for it: {problem}"
    return keep, text


def existing_parent(folder: pathlib.Path) -> pathlib.Path:
    for path in (folder, *folder.absolute().parents):
        if path.exists():
            return path


def readable(size: int) -> str:
    """Bytes as text in GB, MB or kB."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1000:.1f} kB"


# --- Save -----------------------------------------------------------------------------------------

def without_ties(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor once, under its first name: a state_dict has a tied weight under several."""
    names = {id(tensor): name for name, tensor in reversed(named.items())}
    return {name: named[name] for name in names.values()}


def gather_tensors(named: dict[str, torch.Tensor], ranks: Ranks) -> dict[str, torch.Tensor]:
    """Gather whole tensors on the CPU of rank 0, each tied weight once; other ranks get {}. A
    collective: all ranks must call it."""
    gathered = {}
    for name, tensor in without_ties(named).items():
        tensor = whole(tensor.detach())
        if ranks.rank == 0:
            gathered[name] = tensor.cpu()
    return gathered


class HashedFile(io.BufferedWriter):
    """A file that hashes the bytes written to it, so that a large file is not read again."""

    def __init__(self, path):
        super().__init__(io.FileIO(path, "w"))
        self.hash = hashlib.blake2b()

    def write(self, data):
        self.hash.update(data)
        return super().write(data)


class HashingFileSystem(FileSystem):
    """The file system of torch's checkpoint writer. `digests` has the hash of each new file."""

    def __init__(self):
        self.digests = {}

    @contextlib.contextmanager
    def create_stream(self, path, mode):
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with HashedFile(path) as file:
            yield file
        self.digests[pathlib.Path(path)] = file.hash.hexdigest()


def file_digests(folder: pathlib.Path, ranks: Ranks, written: dict | None = None) -> dict[str, str]:
    """{file: hash} of a checkpoint. Each rank reads its share of the files.

    `written` has the hashes of the files that this rank has just written; no rank reads these.
    """
    digests = {str(path.relative_to(folder)): digest for path, digest in (written or {}).items()}
    known = set()
    for part in gather(digests, ranks):
        known |= part.keys()
    files = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and name != "state.json" and name not in known:
            files.append((name, path))
    for name, path in files[ranks.rank::ranks.size]:
        with open(path, "rb") as file:
            digests[name] = hashlib.file_digest(file, "blake2b").hexdigest()
    merged = {}
    for part in gather(digests, ranks):
        merged |= part
    return merged


def save_checkpoint(folder: pathlib.Path, step: int, save_model: Callable, tensors: dict,
                    state: dict, keep: int, ranks: Ranks) -> None:
    """Write everything that the next step depends on as checkpoint-{step}; delete old ones.

    save_model(folder) saves the model or adapter; tensors are those of `optimizer_tensors`; state
    is JSON. No state of a random number generator is needed: the order of the rows and the dropout
    of an adapter follow from the seed, the step and the rank.
    """
    # Rank 0 makes a temporary folder and renames it at the end of this block.
    with contextlib.ExitStack() as stack:
        temporary = None
        if ranks.rank == 0:
            temporary = stack.enter_context(written_aside(folder / f"checkpoint-{step}"))
        temporary = broadcast(temporary, ranks)
        save_model(temporary)
        barrier(ranks)
        # Every rank writes its shards and hashes them on the way. Only the model's files are read
        # again for their hashes, because the libraries that write them take no file object.
        writer = HuggingFaceStorageWriter(str(temporary / "optimizer"), save_distributed=True)
        writer.fs = HashingFileSystem()
        dcp.save(tensors, storage_writer=writer, no_dist=ranks.size == 1)
        digests = file_digests(temporary, ranks, writer.fs.digests)
        if ranks.rank == 0:
            text = json.dumps({"step": step, "files": digests} | state, indent=2)
            (temporary / "state.json").write_text(text + "\n")
    if ranks.rank == 0:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    barrier(ranks)


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer,
                      moving: dict) -> dict:
    """{name: tensor} of the optimizer's state, which torch initializes here before the first step,
    and of `moving`. The tensors are not copied: to load a checkpoint is to write into them."""
    reshard(model)  # torch looks up the optimizer's parameters among those of the model
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    tensors = {f"reference.{name}": tensor for name, tensor in moving.items()}
    for name, value in get_optimizer_state_dict(model, optimizer, options=options).items():
        if not name.startswith("state."):  # learning rate, betas: from the flags and the schedule
            continue
        name = name.removeprefix("state.")
        if not isinstance(value, torch.Tensor):
            raise NotImplementedError(f"{type(optimizer).__name__} keeps {name} as a "
                                      f"{type(value).__name__}; a checkpoint stores only tensors")
        tensors[name] = value
    return tensors


# --- Resume ---------------------------------------------------------------------------------------

def newest_checkpoint(folder: pathlib.Path, ranks: Ranks) -> tuple[pathlib.Path | None, dict]:
    """-> the newest checkpoint whose files have the saved hashes, and its state; or None, {}.

    A damaged checkpoint is renamed, and a line says so. A run that resumes from an older checkpoint
    ends with the same weights.
    """
    paths = broadcast(checkpoints(folder), ranks)
    for path in reversed(paths):
        try:
            state = json.loads((path / "state.json").read_text())
        except (OSError, ValueError):
            state = {}
        saved, found = state.get("files", {}), file_digests(path, ranks)
        if state and saved == found:
            return path, state
        if ranks.rank == 0:
            wrong = ["state.json"]
            if saved:
                wrong = sorted({name for name, _ in saved.items() ^ found.items()})
            renamed = free_name(path.with_name(f"damaged-{path.name}"))
            print(f"{path} is damaged ({', '.join(wrong[:3])}) and is now {renamed}")
            os.replace(path, renamed)
        barrier(ranks)
    if paths:
        raise UserError(f"--resume: every checkpoint in {folder} is damaged; "
                        "begin again in another --output_dir")
    return None, {}


@torch.no_grad()
def load_checkpoint(folder: pathlib.Path, state: dict, fixed: dict, tensors: dict, optimizer: Any,
                    scheduler: Any, ranks: Ranks) -> tuple[int, dict]:
    """Fill `tensors` and the schedule -> the step after which they were saved, the loss's state.

    fixed has the hashes of the rows and of the frozen weights. They must equal the saved hashes.
    Only JSON and safetensors are read, so that loading a checkpoint runs no code from its files.
    """
    if state["rows"] != fixed["rows"]:
        raise UserError("--resume: the data set is not the one that this run began with: "
                        "its rows, or their order, are others")
    if state["weights"] != fixed["weights"]:
        raise UserError("--resume: the reference, or the model below the adapter, "
                        "has other weights than when this run began")
    reader = HuggingFaceStorageReader(str(folder / "optimizer"))
    dcp.load(tensors, storage_reader=reader, no_dist=ranks.size == 1)
    scheduler.load_state_dict(state["scheduler"])
    for group, lr in zip(optimizer.param_groups, scheduler.get_last_lr()):
        group["lr"] = lr
    return state["step"], state["loss_state"]
