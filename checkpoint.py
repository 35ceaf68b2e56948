"""The files of a run, each written aside and renamed (files.py): save, verify, resume, lock.

    config.json         the flags of the run; when the run has ended, the model's configuration too
    run.json            instead of config.json in a run with an adapter: the flags of the run
    metrics.jsonl       see log.Log
    samples.jsonl       with --sample_every, see samples.py
    checkpoint-N/       after step N: the model or adapter as a folder of its own,
        optimizer/      the optimizer's state and a moving reference, in one file per rank,
        metrics.jsonl   the rows up to step N, and samples.jsonl likewise,
        state.json      the step, the schedule, the flags, a hash of every other file, and a hash
                        of itself. A resumed run reads nothing of a run that no hash covers
    .lock               held by the process that writes in this folder
    .written.json       what the run wrote here, and so may replace or delete: see files.py

Nothing here knows models or adapters: train.py passes their tensors and a function that saves them.
"""
import contextlib
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Sequence
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
from files import (
    LOCK,
    RUN_FILE,
    SYSTEM_FILES,
    abandon,
    after_error,
    delete_partial,
    free_name,
    json_digest,
    lock_file,
    others,
    read_json,
    read_list,
    read_run_file,
    remove_folders,
    temporary_folder,
    write_list,
    write_text,
    written_aside,
)
from parallel import Ranks, barrier, broadcast, first_reason, gather, reshard, whole

METRICS_FILE = "metrics.jsonl"  # see log.Log
SAMPLES_FILE = "samples.jsonl"  # see samples.py
LARGE = 10 * 10**9  # bytes of a checkpoint, above which one is kept instead of two

# Flags that a resumed run may change: they change no weight, except by rounding.
FREE_ON_RESUME = {
    "resume", "log_every", "eval_every", "save_every", "keep_checkpoints", "output_dir", "parallel",
    "attention", "compile", "deterministic", "report_to", "push_to_hub", "save_last",
    "eval_only", "dry_run", "sample_every", "sample_prompts", "sample_tokens",
}
# Flags of which a resumed run may have a higher value: it becomes a longer run. --epochs may be
# replaced by --max_steps, and the other way round, if that gives no fewer steps.
LENGTH = ("epochs", "max_steps", "early_stop")


# --- The folder of a run --------------------------------------------------------------------------

@contextlib.contextmanager
def explained_write_errors(folder: pathlib.Path, ranks: Ranks):
    """Turn a write error, such as a full disk, into one line. files.py deletes partial files. An
    error of a file elsewhere, such as a data set that cannot be read any more, passes."""
    try:
        yield
    except BrokenPipeError:  # the reader of the output has ended; no file is wrong
        raise
    except (OSError, SafetensorError, dcp.CheckpointException) as error:
        cause = error
        if isinstance(error, dcp.CheckpointException):
            cause = next(iter(error.failures.values()))[0]
            if not isinstance(cause, (OSError, SafetensorError)):  # a bug
                raise
        path = getattr(cause, "filename", None)
        if isinstance(path, str) and not pathlib.Path(path).resolve().is_relative_to(
                folder.resolve()):
            raise
        full = re.search("no space|quota|too large", str(cause), re.IGNORECASE)
        remedy = "Make room, then" if full else "When it can be written again"
        raise UserError(
            f"--output_dir {folder}: could not be written ({cause}); what was there before is "
            f"whole. {remedy}: {how_to_continue(folder, ranks)}") from error


def how_to_continue(folder: pathlib.Path, ranks: Ranks) -> str:
    """Say how to start a run again. Only the user knows how several processes were started."""
    if ranks.size == 1:
        return f"python train.py --output_dir {folder} --resume"
    return f"start it again, by the same launcher, with --output_dir {folder} --resume"


def flags_digest(flags: dict) -> str:
    """Hash the flags of a run except its folder, which may be moved."""
    return json_digest({name: flags[name] for name in flags if name != "output_dir"})


def saved_flags(folder: str | None) -> dict:
    """The flags of the run that --resume continues, from run.json, config.json or a checkpoint.

    The file and every checkpoint must have the same flags, except those that a resumed run may
    change: an edit of the file would make the run end elsewhere than it would have ended.
    """
    if folder is None:
        raise UserError("--resume: give the --output_dir of the run to continue")
    if not os.path.lexists(folder):
        raise UserError(f"--resume: --output_dir {folder} does not exist")
    saved = {}  # {file: flags}
    content = read_run_file(folder, repair_flags(folder))
    if "flags" in content:
        path = flags_path(folder)
        if "digest" in content and content["digest"] != flags_digest(content["flags"]):
            raise UserError(f"{path}: its flags are not those that the run saved"
                            f"{repair_flags(folder)}")
        saved[path] = content["flags"]
    for checkpoint in reversed(checkpoints(pathlib.Path(folder))):
        state = read_state(checkpoint)
        if state:
            saved[checkpoint / "state.json"] = state["flags"]
    if not saved:
        raise UserError(f"--resume: there is no run in {folder}: no run.json and no config.json "
                        "with the flags of a run, and no checkpoint that has them")
    check_agreement(saved)
    return next(iter(saved.values()))


def repair_flags(folder: str) -> str:
    """Say what to do about a damaged file with the flags of a run. A checkpoint has them too."""
    if checkpoints(pathlib.Path(folder)):
        return ("; put a good copy in its place, or delete it: --resume reads the flags from a "
                "checkpoint")
    return "; put a good copy in its place, or start again in another --output_dir"


def flags_path(folder: str | pathlib.Path) -> pathlib.Path:
    """The file of a run that has its flags."""
    path = pathlib.Path(folder) / RUN_FILE
    return path if path.exists() else path.with_name("config.json")


def may_change(name: str, value: Any, before: Any) -> bool:
    """Return whether a resumed run may have this value of a flag in place of the one before."""
    if name in FREE_ON_RESUME:
        return True
    given = [each for each in (value, before) if each is not None]
    # The values may come from an edited file.
    if name not in LENGTH or not all(type(each) in (int, float) for each in given):
        return False
    if len(given) == 2:
        return value >= before
    # The other one of the two flags is given: see train.check_length.
    return name in ("epochs", "max_steps")


def is_longer(flags: dict, saved: dict) -> bool:
    """Return whether these flags make a run longer."""
    return any(flags[name] != saved[name] for name in LENGTH)


def has_length(flags: dict) -> bool:
    """Return whether these flags say when the run ends."""
    return flags.get("epochs") is not None or flags.get("max_steps") is not None


def check_agreement(saved: dict) -> None:
    """Raise a UserError if two files have different values of a flag that may not change.

    A checkpoint may be that of a run which was shorter then.
    """
    first_path, first = next(iter(saved.items()))
    for path, flags in saved.items():
        for name in sorted(first.keys() | flags.keys()):
            values = [json.dumps(some.get(name, "no value")) for some in (first, flags)]
            in_both = name in first and name in flags
            # An edited file may have lost the length of the run.
            keeps_length = has_length(first) or not has_length(flags)
            if in_both and keeps_length and may_change(name, first[name], flags[name]):
                continue
            if values[0] != values[1]:
                raise UserError(
                    f"{first_path}: {name} is {values[0]}, but {path} has {values[1]}: one of the "
                    f"two was changed. Put a good copy of {first_path.name} in its place, or "
                    "delete it: --resume reads the flags from a checkpoint")


def write_flags(folder: pathlib.Path, flags: dict) -> None:
    """Write the flags of a run that begins.

    With an adapter the file is run.json: transformers would take the folder of an adapter for a
    model because of a config.json.
    """
    adapted = flags.get("adapter") or flags.get("lora_rank")
    content = {"flags": flags, "digest": flags_digest(flags)}
    write_text(folder / (RUN_FILE if adapted else "config.json"),
               json.dumps(content, indent=2) + "\n")


def is_complete(folder: str | pathlib.Path) -> bool:
    """Has the run ended? Then there are weights, and config.json has the model's entries or there
    is an adapter."""
    folder = pathlib.Path(folder)
    return any(folder.glob("*.safetensors")) and has_model(folder)


def has_model(folder: pathlib.Path) -> bool:
    """Is there a whole model or an adapter in this folder, and not only the flags of a run?"""
    return is_adapter(folder) or "model_type" in read_run_file(folder)


def is_adapter(folder: str | pathlib.Path) -> bool:
    """Is there an adapter in this folder?"""
    return (pathlib.Path(folder) / "adapter_config.json").exists()


def checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """Complete checkpoints, oldest first. Those that a user put here come before the run's own.

    A run that finds a name taken writes checkpoint-5-2. Only its list of files tells this one from
    a copy that a user made.
    """
    written, order = read_list(folder) or set(), {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if path.name in written:
            number = number.partition("-")[0]
        if number.isdecimal() and path.is_dir():
            order[path] = path.name in written, int(number), path.name
    return sorted(order, key=order.get)


def own_checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """The checkpoints that this run wrote, oldest first. A link in place of one is the user's."""
    written = read_list(folder) or set()
    paths = [path for path in checkpoints(folder) if path.name in written]
    return [path for path in paths if not path.is_symlink()]


def delete_old_checkpoints(folder: pathlib.Path, keep: int) -> None:
    """Delete the checkpoints that this run wrote, except the newest `keep`."""
    old = own_checkpoints(folder)[:-keep]
    for path in old:
        delete_checkpoint(path)
    if old:
        write_list(folder, read_list(folder).difference(path.name for path in old))


def delete_checkpoint(folder: pathlib.Path) -> None:
    """Delete a checkpoint, unless it has a file that its state.json does not name: a user put it
    there, or changed state.json. Then a line says that the checkpoint is kept.

    It is moved into a temporary folder first, so that a kill leaves no half of a checkpoint.
    """
    written = read_state(folder).get("files", {}).keys() | {"state.json"}
    added = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_dir() and name not in written and path.name not in SYSTEM_FILES:
            added.append(name)
    if added:
        print(f"{folder} is kept, because it has files that this run did not write: {added[0]}")
        return
    with temporary_folder(folder.parent) as aside:
        os.replace(folder, aside / folder.name)


def has_flags(folder: pathlib.Path) -> bool:
    """Return whether a file of the folder has the flags of a run."""
    for name in (RUN_FILE, "config.json"):
        with contextlib.suppress(UserError):  # no such file, or not a run's
            if "flags" in read_json(folder / name):
                return True
    return False


def reason_against_new_run(folder: pathlib.Path) -> str | None:
    """None for an empty folder; else a text about the run or the files that are there."""
    if has_flags(folder):
        if is_complete(folder):
            return " holds a finished run: choose another folder"
        what = "holds a run already: continue it with --resume"
        if not checkpoints(folder):
            what = ("holds a run already, which has no checkpoint yet: start it again from step 0 "
                    "with --resume")
        return f" {what}, or choose another folder"
    names = others(folder)
    if names:
        return (f" holds files that no run wrote, such as {names[0]}: choose a folder that is "
                "empty or does not exist")
    return None


@contextlib.contextmanager
def claim(folder: pathlib.Path, resume: bool, ranks: Ranks, made: Sequence[pathlib.Path] = ()):
    """Make and lock the folder of a run, and begin its list of files. Rank 0 does it.

    A new run needs a folder that is empty. `made` has the folders that this run made or will make,
    from the inside out. After an error they are removed if there is nothing in them.
    """
    with contextlib.ExitStack() as stack:
        reason = None
        if ranks.rank == 0:
            stack.enter_context(after_error(remove_folders, made))
            reason = take_folder(folder, resume, stack)
        reason = first_reason(reason, ranks)
        if reason is not None:
            raise UserError(f"--output_dir {folder}{reason}")
        yield


def take_folder(folder: pathlib.Path, resume: bool, stack: contextlib.ExitStack) -> str | None:
    """Make and lock the folder, and begin its list -> None, or why a run may not write there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Once before .lock is written, which has no place in the folder of a user.
        reason = None
        if not resume and read_list(folder) is None:
            reason = reason_against_new_run(folder)
        if reason is not None:
            return reason
        stack.enter_context(lock_file(folder / LOCK))
        stack.enter_context(after_error(abandon, folder))
        if not resume:
            reason = reason_against_new_run(folder)
        if reason is None:
            delete_partial(folder, alone=True)
            begin_list(folder)
        return reason
    except filelock.Timeout:
        return ": another run is writing there; wait, or choose another folder"
    except NotImplementedError as error:
        return f": cannot be locked ({error}); choose a folder on another file system"
    except OSError as error:
        return (f": cannot be written ({error}); make room or change its permissions, or choose "
                "another folder")


def begin_list(folder: pathlib.Path) -> None:
    """Write the list of a run's files, which shows that the folder can be written.

    An earlier version made no list. Then only the files are taken over that a resumed run replaces.
    """
    written = read_list(folder)
    if written is None:
        written = {RUN_FILE, "config.json", METRICS_FILE}
    write_list(folder, {name for name in written if os.path.lexists(folder / name)})


# --- How large checkpoints are, and whether they fit ----------------------------------------------

def tensor_bytes(tensors) -> int:
    """Bytes of these tensors without sharding, each stored once: tied weights are one tensor."""
    distinct = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in distinct.values())


def count_checkpoints(args: Any, start: int, steps: int) -> int:
    """Return how many checkpoints --save_every and --save_last write after the step `start`."""
    count = int(args.save_last)
    if args.save_every:
        count += max(0, (steps - 1) // args.save_every - start // args.save_every)
    return count


def plan_checkpoints(args: Any, folder: pathlib.Path | None, size: int, start: int, steps: int,
                     ranks: Ranks) -> tuple[int, str]:
    """Check that the disk has room for the checkpoints of a run -> how many to keep, and a line.

    args            with --save_every, --save_last, and --keep_checkpoints, by default 2, and 1 if a
                    checkpoint is LARGE
    size            bytes of one checkpoint
    start, steps    the step from which the run continues, and the last step

    A new checkpoint is written before an old one is deleted, so the disk needs room for keep + 1.
    If there is no room for the checkpoints that are due, raise now and not hours later. If none is
    due before the end, the returned line only mentions the lack of room.
    """
    keep = args.keep_checkpoints or (1 if size > LARGE else 2)
    due, occasions = count_checkpoints(args, start, steps), []
    if due > args.save_last:
        occasions.append(f"every {args.save_every} steps")
    if args.save_last:
        occasions.append("after the last step")
    others = f"{', '.join(occasions)} and " if occasions else ""
    text = f"a checkpoint has {readable(size)}; written {others}when interrupted"
    if due:
        text += f", the newest {keep} kept"
    # Rank 0 decides for all ranks: it has the folder. --eval_only has none.
    problem = None
    if ranks.rank == 0 and folder is not None:
        existing = len(own_checkpoints(folder))
        most = min(keep + 1, existing + max(1, due))
        needed = (most - existing) * size
        above = [path for path in (folder, *folder.parents) if path.is_dir()]
        free = shutil.disk_usage(above[0]).free  # --dry_run does not make the folder
        if needed > free:
            problem = f"{readable(free)} free, but checkpoints need {readable(needed)}"
    problem = first_reason(problem, ranks)
    if problem and due:
        raise UserError(f"--output_dir {folder}: {problem}; make room, or lower "
                        "--keep_checkpoints, or write none by --save_every 0 without --save_last")
    if problem:
        text += f". There is no room for it: {problem}"
    return keep, text


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


def file_digests(folder: pathlib.Path, names: list[str], ranks: Ranks,
                 known: dict | None = None) -> dict[str, str | None]:
    """{name: hash} of these files of a checkpoint, None for a file that cannot be read. Each rank
    reads its share of the files.

    `known` has the hashes of the files that this rank has just written; no rank reads these.
    """
    digests = dict(known or {})
    written = set()
    for part in gather(digests, ranks):
        written |= part.keys()
    unread = [name for name in names if name not in written]
    for name in unread[ranks.rank::ranks.size]:
        try:
            with open(folder / name, "rb") as file:
                digests[name] = hashlib.file_digest(file, "blake2b").hexdigest()
        except OSError:
            digests[name] = None
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
            path = free_name(folder / f"checkpoint-{step}")  # a user's copy may have the name
            temporary = stack.enter_context(written_aside(path))
        temporary = broadcast(temporary, ranks)
        save_model(temporary)
        if ranks.rank == 0:
            copy_logs(folder, temporary)
        barrier(ranks)
        # Every rank writes its shards and hashes them on the way. Only the model's files are read
        # again for their hashes, because the libraries that write them take no file object.
        writer = HuggingFaceStorageWriter(str(temporary / "optimizer"), save_distributed=True)
        writer.fs = HashingFileSystem()
        dcp.save(tensors, storage_writer=writer, no_dist=ranks.size == 1)
        written = {}
        for path, digest in writer.fs.digests.items():
            written[str(path.relative_to(temporary))] = digest
        barrier(ranks)
        names = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        names = [str(path.relative_to(temporary)) for path in names]
        digests = file_digests(temporary, names, ranks, written)
        if ranks.rank == 0:
            state = {"step": step, "files": digests} | state
            state["digest"] = json_digest(state)
            (temporary / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    if ranks.rank == 0:
        delete_old_checkpoints(folder, keep)
    barrier(ranks)


def copy_logs(folder: pathlib.Path, checkpoint: pathlib.Path):
    """Copy metrics.jsonl, and the run's samples.jsonl if there is one, into a checkpoint. The user
    may have deleted them."""
    (checkpoint / METRICS_FILE).touch()
    written = read_list(folder) or ()
    for name in (METRICS_FILE, SAMPLES_FILE):
        if name in written and (folder / name).exists():
            shutil.copyfile(folder / name, checkpoint / name)


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

def read_state(checkpoint: pathlib.Path) -> dict:
    """state.json of a checkpoint, or {} if it is not as it was saved."""
    try:
        state = read_json(checkpoint / "state.json")
    except UserError:
        return {}
    digest = state.pop("digest", None)
    if digest != json_digest(state):
        return {}
    _, number, *_ = checkpoint.name.split("-")
    return state if number == str(state["step"]) else {}


def newest_checkpoint(folder: pathlib.Path, ranks: Ranks) -> tuple[pathlib.Path | None, dict]:
    """-> the newest checkpoint whose files have the saved hashes, and its state; or None, {}.

    A file that no checkpoint lists, such as a note of the user, is ignored. A damaged checkpoint is
    renamed, and a line says so. A run that resumes from an older checkpoint ends with the same
    weights.
    """
    damaged = {}  # {checkpoint: its files that are missing or changed}
    for path in reversed(broadcast(checkpoints(folder), ranks)):
        state = read_state(path)
        saved = state.get("files", {})
        found = file_digests(path, sorted(saved), ranks)
        wrong = [name for name in sorted(saved) if found[name] != saved[name]]
        if state and not wrong:
            if ranks.rank == 0:
                set_aside(damaged)
            barrier(ranks)
            return path, state
        damaged[path] = wrong or ["state.json"]
    if damaged:
        files = "; ".join(f"{path.name}: {wrong[0]}" for path, wrong in damaged.items())
        raise UserError(f"--resume: every checkpoint in {folder} is damaged; "
                        f"begin again in another --output_dir ({files})")
    return None, {}


def set_aside(damaged: dict):
    """Rename damaged checkpoints, so that the run can write them again. Nothing is deleted."""
    for path, wrong in damaged.items():
        renamed = free_name(path.with_name(f"damaged-{path.name}"))
        print(f"{path} is damaged ({', '.join(wrong[:3])}) and is now {renamed}")
        os.replace(path, renamed)


class OwnFiles(FileSystem):
    """The file system of torch's checkpoint reader, which would read every file of the folder. It
    shows only the files of the checkpoint."""

    def __init__(self, paths):
        self.paths = paths

    def ls(self, path):
        return self.paths


# The inputs that must not change before a run is resumed. The tokenizer is the first one: if it
# changed, the tokens of the rows changed too.
CHANGED = {
    "tokenizer": "the tokenizer of the model or its chat template",
    "rows": "the rows of --dataset, their order or their tokens",
    "held_out": "the rows of --eval_dataset or their tokens",
    "weights": "the weights of the reference, or of the model below the adapter,",
    "settings": "config.json or adapter_config.json of the reference, or of the model below the "
                "adapter,",
    "world": "the files of the embedded world",
}


@torch.no_grad()
def load_checkpoint(folder: pathlib.Path, state: dict, fixed: dict, tensors: dict, optimizer: Any,
                    scheduler: Any, ranks: Ranks) -> tuple[int, dict]:
    """Fill `tensors` and the schedule -> the step after which they were saved, the loss's state.

    fixed has the hashes of what a run reads besides its checkpoint, by the names in CHANGED. They
    must equal the saved hashes. Only JSON and safetensors are read, so that loading a checkpoint
    runs no code from its files.
    """
    for name, what in CHANGED.items():
        if name in fixed and state[name] != fixed[name]:
            raise UserError(f"--resume: {what} changed since the run began; restore the "
                            "files, or start a new run in another --output_dir")
    reader = HuggingFaceStorageReader(str(folder / "optimizer"))
    reader.fs = OwnFiles([str(folder / name) for name in state["files"]
                          if name.startswith("optimizer/")])
    dcp.load(tensors, storage_reader=reader, no_dist=ranks.size == 1)
    # The learning rate is computed, because the schedule may be that of a longer run now.
    done, rates = state["scheduler"]["last_epoch"], []
    for group, rate, factor in zip(
            optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
        group["lr"] = rate * factor(done)
        rates.append(group["lr"])
    scheduler.load_state_dict(state["scheduler"] | {"_last_lr": rates})
    return state["step"], state["loss_state"]
