"""Write files and folders under a temporary name, then rename them.

A rename is atomic, so a reader, or a run that is resumed after a kill, finds the old file or the
new one and never half a file. Every temporary name is in a folder of its own, {PARTIAL}xxxxxxxx, in
the folder of the target: a rename works only within one file system. The temporary folder is
deleted on an exception. After a kill it is still there: see `delete_partial`.

    with written_aside(path) as temporary:              # a file, or a folder that does not exist
        temporary.write_text("all of it, or nothing")
    with moved_into(folder, last="config.json") as aside:    # files of a folder that has others
        (aside / "config.json").write_text("{}")
"""
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from errors import UserError, reading

PARTIAL = ".partial-"

# Everything that PEFT's files have no place for: the fingerprint of the base, the flags of the run.
# It is not config.json, because transformers would take an adapter with that file for a model.
RUN_FILE = "run.json"


@contextlib.contextmanager
def moved_into(folder: str | pathlib.Path, last: str | None = None) -> Iterator[pathlib.Path]:
    """Yield a temporary folder, then move its files into `folder`. The file named `last` is moved
    last: where it is, the others are too."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # A failed cleanup is ignored: the files are in place, or the original exception propagates.
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder,
                                     ignore_cleanup_errors=True) as aside:
        yield pathlib.Path(aside)
        names = [name for name in os.listdir(aside) if name != last]
        if last is not None:
            names.append(last)
        for name in names:
            os.replace(os.path.join(aside, name), folder / name)


@contextlib.contextmanager
def written_aside(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path for a file or a folder, then rename it to `path`. An existing file is
    replaced."""
    path = pathlib.Path(path)
    with moved_into(path.parent) as aside:
        yield aside / path.name


def write_text(path: pathlib.Path, text: str) -> None:
    """Replace the content of a text file."""
    with written_aside(path) as temporary:
        temporary.write_text(text)


def delete_partial(folder: pathlib.Path) -> None:
    """Delete what a killed process was writing in this folder. No other process may write there."""
    for path in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(path, ignore_errors=True)


def free_name(path: pathlib.Path) -> pathlib.Path:
    """The path, or the first of path-2, path-3, ... that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


# --- JSON that is read again ----------------------------------------------------------------------

def read_json(path: str | pathlib.Path, advice: str = "") -> dict:
    """Read a JSON object from a file. A file that has none is a UserError that names the file.

    advice      the end of the error: what to do
    """
    with reading(f"{path}: cannot be read", advice):
        content = json.loads(pathlib.Path(path).read_bytes())  # UTF-8, UTF-16 or UTF-32
    if not isinstance(content, dict):
        raise UserError(f"{path}: must have a JSON object in braces, not {content!r:.40}{advice}")
    return content


def json_digest(content: dict) -> str:
    """Hash the values in a JSON object: the layout of its file and the order of its keys do not
    count."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def read_run_file(folder: str | pathlib.Path) -> dict:
    """Read run.json of a run with an adapter, or the config.json of another run; {} if the folder
    has neither, as the folder of an adapter made by PEFT."""
    for name in (RUN_FILE, "config.json"):
        path = pathlib.Path(folder) / name
        if not os.path.lexists(path):
            continue
        content = read_json(path, "; put a good copy in its place, or delete it")
        if not isinstance(content.get("flags", {}), dict):
            raise UserError(f"{path}: its flags must be a JSON object in braces, not "
                            f"{content['flags']!r:.40}; put a good copy in its place, or delete it")
        return content
    return {}
