"""Write files and folders under a temporary name, then rename them; know which ones a run owns.

A rename is atomic, so a reader, or a run that is resumed after a kill, finds the old file or the
new one and never half a file. Files are flushed to disk before the rename, and get the permissions
of the umask. Every temporary name is in a folder of its own, *.partial-xxxxxxxx, in the folder of
the target: a rename works only within one file system. The temporary folder is deleted on an
exception. After a kill it is still there: see `delete_partial`.

    with written_aside(path) as temporary:              # a file, or a folder that does not exist
        temporary.write_text("all of it, or nothing")
    with moved_into(folder, last="config.json") as aside:    # files of a folder that has others
        (aside / "config.json").write_text("{}")

The folder of a run has a list, .written.json, of the names that the run wrote into it. A name is
listed before the file is there. The run replaces and deletes only what is listed. Another file that
has a name which the run needs is renamed, and a line says so.
"""
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator

import filelock

from errors import UserError, reading

PARTIAL = ".partial-"
LOCK = ".lock"
LIST = ".written.json"

# What systems put into folders that a user takes for empty.
SYSTEM_FILES = {".DS_Store", "Thumbs.db", "desktop.ini", "lost+found"}

# Everything that PEFT's files have no place for: the fingerprint of the base, the flags of the run.
# It is not config.json, because transformers would take an adapter with that file for a model.
RUN_FILE = "run.json"


# --- Temporary folders ----------------------------------------------------------------------------

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
def temporary_folder(parent: pathlib.Path, name: str = "") -> Iterator[pathlib.Path]:
    """Make a folder {name}{PARTIAL}xxxxxxxx with a lock in it, and delete it at the end if it is
    still there."""
    path, lock = None, None
    # Another process may delete the new folder before it is locked.
    while path is None or not path.exists():
        path = pathlib.Path(tempfile.mkdtemp(prefix=name + PARTIAL, dir=parent))
        lock = lock_folder(path)
    with lock or contextlib.nullcontext():
        try:
            yield path
        finally:
            # A failed cleanup is ignored: all files are in place, or the exception propagates.
            shutil.rmtree(path, ignore_errors=True)


def lock_folder(path: pathlib.Path) -> filelock.AcquireReturnProxy | None:
    """Lock a folder. None if another process has the lock, or there are no locks."""
    try:
        return lock_file(path / LOCK)
    except (filelock.Timeout, OSError, NotImplementedError):
        return None


def delete_partial(folder: pathlib.Path, alone: bool = False) -> None:
    """Delete what killed processes were writing in this folder.

    A temporary folder is locked while its process is alive, and then it stays. One without a lock
    is deleted only if no other process may write into `folder`: if this one is `alone`.
    """
    for path in folder.glob(f"*{PARTIAL}*"):
        if not is_partial(path):
            continue
        lock = lock_folder(path) if (path / LOCK).exists() else None
        if alone or lock is not None:
            shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            lock.lock.release()


def is_partial(path: pathlib.Path) -> bool:
    """Return whether `temporary_folder` made this folder."""
    named = re.fullmatch(rf".*{re.escape(PARTIAL)}[a-z0-9_]{{8}}", path.name)
    return named is not None and path.is_dir() and not path.is_symlink()


# --- Permissions and the disk ---------------------------------------------------------------------

def umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def finish(folder: pathlib.Path) -> None:
    """Give a folder and all files in it the permissions of the umask, and flush them to disk.

    safetensors and tempfile make files and folders that only their owner can read.
    """
    mask = umask()
    for path in [*folder.rglob("*"), folder]:
        mode = path.stat().st_mode
        usual = 0o777 if path.is_dir() else 0o666
        if mode | usual & ~mask != mode:
            with contextlib.suppress(OSError):  # a file system without permissions
                path.chmod(mode | usual & ~mask)
        flush(path)


def flush(path: pathlib.Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    flags = os.O_WRONLY
    if path.is_dir():
        flags = os.O_RDONLY
        if os.name == "nt":  # folders cannot be opened there
            return
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # this file system cannot
            raise
    finally:
        os.close(descriptor)


# --- Write aside, then rename ---------------------------------------------------------------------

@contextlib.contextmanager
def moved_into(folder: str | pathlib.Path, last: str | None = None) -> Iterator[pathlib.Path]:
    """Yield a temporary folder, then move its files into `folder`. The file named `last` is moved
    last: where it is, the others are too. What killed processes left in `folder` is deleted."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    delete_partial(folder)
    with temporary_folder(folder) as aside:
        yield aside
        finish(aside)
        names = [name for name in os.listdir(aside) if name not in (LOCK, last)]
        if last is not None:
            names.append(last)
        if names != [LIST]:
            make_way(folder, names)
        for name in names:
            os.replace(aside / name, folder / name)
        flush(folder)


@contextlib.contextmanager
def written_aside(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path for a file or a folder, then rename it to `path`. An existing file is
    replaced. An error without a file name, as of a full disk, gets that of `path`."""
    path = pathlib.Path(path)
    try:
        with moved_into(path.parent) as aside:
            yield aside / path.name
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def folder_aside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a new folder next to `path`, then rename it to `path`.

    What a killed process leaves has the name of `path` in its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(path.parent, path.name) as aside:
        yield aside
        finish(aside)
        os.replace(aside, path)
        (path / LOCK).unlink(missing_ok=True)
        flush(path.parent)


@contextlib.contextmanager
def after_error(undo: Callable, *arguments) -> Iterator[None]:
    """Call undo(*arguments) after an exception, which then propagates."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            undo(*arguments)
        raise


def missing_folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the folders that have to be made for this one, itself first."""
    return [path for path in (folder, *folder.parents) if not os.path.exists(path)]


def remove_folders(folders: Iterable[pathlib.Path]) -> None:
    """Remove these folders up to the first one that is not empty."""
    for path in folders:
        path.rmdir()


@contextlib.contextmanager
def new_folder(path: str | pathlib.Path, flag: str) -> Iterator[pathlib.Path]:
    """Make a folder that must not exist yet. After an error remove it if it is still empty."""
    path = pathlib.Path(path)
    made = missing_folders(path)
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{flag} {path}: exists already; choose another folder") from None
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot be made ({error}); choose another") from error
    with after_error(remove_folders, made):
        yield path


def write_text(path: pathlib.Path, text: str) -> None:
    """Replace the content of a text file."""
    with written_aside(path) as temporary:
        temporary.write_text(text)


def free_name(path: pathlib.Path) -> pathlib.Path:
    """The path, or the first of path-2, path-3, ... that does not exist."""
    candidate, number = path, 1
    while os.path.lexists(candidate):  # a broken link exists only for lexists
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


# --- The list of what a run wrote -----------------------------------------------------------------

def read_list(folder: pathlib.Path) -> set[str] | None:
    """Return the names that a run wrote into its folder, or None if the folder has no list."""
    try:
        names = json.loads((folder / LIST).read_text())["written"]
        return set(names) if isinstance(names, list) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_list(folder: pathlib.Path, names: Iterable[str]) -> None:
    """Replace the list of the names that a run wrote into its folder."""
    content = {"about": "names that the run wrote here, and so may replace or delete",
               "written": sorted(names)}
    write_text(folder / LIST, json.dumps(content, indent=2) + "\n")


def make_way(folder: pathlib.Path, names: list[str]) -> None:
    """List these names before they are written into the folder of a run. Rename what has such a
    name and is not the run's. A folder without a list is not the folder of a run."""
    listed = read_list(folder)
    if listed is None:
        return
    for name in names:
        if name not in listed and os.path.lexists(folder / name):
            kept = free_name(folder / name)
            os.replace(folder / name, kept)
            print(f"{folder / name} was not written by this run, and is now {kept}")
    if not listed.issuperset(names):
        write_list(folder, listed.union(names))


def others(folder: pathlib.Path) -> list[str]:
    """Return the names in a folder that are neither a run's list, lock and temporary folders nor
    what systems put there."""
    names = []
    for path in sorted(folder.iterdir()):
        is_lock = path.name == LOCK and is_empty_file(path)
        own_list = path.name == LIST and read_list(folder) is not None
        known = path.name in SYSTEM_FILES or is_partial(path)
        if not (is_lock or own_list or known):
            names.append(path.name)
    return names


def is_empty_file(path):
    return path.is_file() and not path.is_symlink() and path.stat().st_size == 0


def abandon(folder: pathlib.Path) -> None:
    """Delete the list and the lock of a run that ended before it wrote anything else."""
    if not others(folder):
        (folder / LIST).unlink(missing_ok=True)
        (folder / LOCK).unlink(missing_ok=True)


def delete_if_abandoned(folder: pathlib.Path) -> None:
    """Delete the folder of a run that was killed before it wrote anything but its list."""
    if not folder.is_dir() or read_list(folder) is None or others(folder):
        return
    lock = lock_folder(folder)
    if lock is not None:
        abandon(folder)
        lock.lock.release()
        with contextlib.suppress(OSError):  # a file of the system is there
            folder.rmdir()


# --- JSON that is read again ----------------------------------------------------------------------

def read_json(path: str | pathlib.Path, advice: str = "") -> dict:
    """Read a JSON object from a file. A file that has none is a UserError that names the file.

    advice      the end of the error: what to do
    """
    with reading(f"{path}: cannot be read", advice):
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8-sig"))
    if not isinstance(content, dict):
        raise UserError(f"{path}: must have a JSON object in braces, not {content!r:.40}{advice}")
    return content


def json_digest(content: dict) -> str:
    """Hash the values in a JSON object: the layout of its file and the order of its keys do not
    count."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def read_run_file(folder: str | pathlib.Path,
                  advice: str = "; put a good copy in its place, or delete it") -> dict:
    """Read run.json of a run with an adapter, or the config.json of another run; {} if the folder
    has neither, as the folder of an adapter made by PEFT.

    advice      the end of an error: what to do
    """
    for name in (RUN_FILE, "config.json"):
        path = pathlib.Path(folder) / name
        if not os.path.lexists(path):
            continue
        content = read_json(path, advice)
        if not isinstance(content.get("flags", {}), dict):
            raise UserError(f"{path}: its flags must be a JSON object in braces, not "
                            f"{content['flags']!r:.40}{advice}")
        return content
    return {}
