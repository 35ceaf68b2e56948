"""Finds the files of a --dataset, and reads their rows as they are.

    pairs.jsonl                 a file
    pairs                       a folder of files: those of one split, `train` if none is named
    pairs:test                  the same, of another split
    saved                       a folder that `save_to_disk` of `datasets` wrote
    acme/pairs                  a data set of the Hub
    a.jsonl:0.3, b.jsonl:0.7    a mixture

`read_rows` yields each row as a dict with its name in errors and logs: file and number. layouts.py
finds the prompt and the answers in it. Files of a folder that are not read are named in the report.
"""
import csv
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import datasets
import pyarrow.parquet

from errors import (
    UserError,
    hub_failure,
    library_reason,
    nearest,
    printable,
    reading,
    stop_hub_retries,
)
from files import LIST

# --- The readers ----------------------------------------------------------------------------------
# A text must be read exactly as the file has it, and every row with its number. The CSV and JSON
# readers of `datasets`, pandas and pyarrow infer types instead: "2020-01-01" becomes a date, a
# message with an optional key becomes a string of JSON, and surplus cells of a CSV row disappear.
# The standard library reads both formats as they are. Parquet and Arrow have types.

class KeyTwiceError(ValueError):
    """A key of a JSON object has two values, and which of them is meant is unknown."""


def one_value_for_each_key(pairs):
    """Make a dict of the keys and values of a JSON object."""
    row = dict(pairs)
    if len(row) < len(pairs):
        for key, value in pairs:
            if row[key] != value:
                raise KeyTwiceError(f"the key {key!r} is there twice, with different values")
    return row


JSON = json.JSONDecoder(object_pairs_hook=one_value_for_each_key)


def open_text(path):
    return open(path, encoding="utf-8-sig", newline="")


def lines_of(path):
    """Yield the lines of a text file."""
    with reading(what_is_read(path)), open_text(path) as file:
        yield from file


def what_is_read(path):
    return f"{path}: cannot be read as {path.suffix[1:]}"


def json_line_rows(path):
    """Yield (number, row), numbered as the lines of the file."""
    for number, line in enumerate(lines_of(path), 1):
        if line.strip():
            yield number, decode_row(f"{path}, row {number}", JSON.decode, line)


def decode_row(where, decode, *text):
    """Call decode(*text), and raise each failure as a UserError about the row."""
    try:
        advice = "; write one object per line, or one list of all rows in a .json file"
        with reading(f"{where}: not valid JSON", advice):
            return decode(*text)
    except UserError as error:
        if isinstance(error.__cause__, KeyTwiceError):
            raise UserError(f"{where}: {error.__cause__}; keep one of them") from error
        raise


def json_rows(path):
    """Yield (number, row) of one JSON list, numbered from 1, or of JSON lines."""
    with reading(what_is_read(path)), open_text(path) as file:
        is_list = file.read(4096).lstrip().startswith("[")
        file.seek(0)
        text = file.read() if is_list else ""
    yield from json_list_rows(path, text) if is_list else json_line_rows(path)


def json_list_rows(path, text):
    """Yield (number, row) of the text of one JSON list. Its rows are parsed one by one, so that an
    error names the row."""
    position, number, after = text.index("["), 0, ","
    while after == ",":
        position = skip_space(text, position + 1)
        if text[position:position + 1] == "]" and number == 0:
            after = "]"
            break
        number += 1
        row, position = decode_row(f"{path}, row {number}", JSON.raw_decode, text, position)
        yield number, row
        position = skip_space(text, position)
        after = text[position:position + 1]
    if not after:
        raise UserError(f"{path}: the list ends after row {number} without ']': the file is "
                        "truncated; copy it again")
    if after != "]" or text[position + 1:].strip():
        raise UserError(f"{path}: not valid JSON: after row {number} of the list it has "
                        f"{text[position:position + 40]!r}; write a comma after each row but the "
                        "last one, and nothing after ']'")


def skip_space(text, position):
    """Return the position of the next character that is no white space of JSON."""
    return SPACE.match(text, position).end()


SPACE = re.compile(r"[ \t\n\r]*")


def csv_rows(path):
    """Yield (number, row). Every value is the text of the file: "NA" is not null, "42" no int."""
    csv.field_size_limit(sys.maxsize)
    # strict: an open quote is an error instead of swallowing all rows after it.
    reader = csv.DictReader(lines_without_nul(path), strict=True)
    names = read_csv_header(reader, path)
    check_distinct(f"{path}: the header", names)
    number = 0
    while True:
        number += 1
        with reading(f"{path}, row {number}: cannot be read as csv"):
            row = next(reader, None)
        if row is None:
            return
        # DictReader puts surplus cells under the key None.
        if None in row:
            raise UserError(f"{path}, row {number}: more cells than the header names; "
                            "text with commas must be quoted")
        yield number, row


def check_distinct(what, names):
    """Raise for a name that two columns have."""
    for name in set(names):
        if names.count(name) > 1:
            raise UserError(f"{what} names the column {name!r} twice; rename one")


def read_csv_header(reader, path):
    with reading(f"{what_is_read(path)}: its header"):
        return reader.fieldnames or []


def lines_without_nul(path):
    """Yield the lines of a text file. A NUL is a sign of another encoding, such as UTF-16."""
    for number, line in enumerate(lines_of(path), 1):
        if "\0" in line:
            raise UserError(f"{path}, line {number}: has a NUL character, so it is not text in "
                            "UTF-8; save it as UTF-8")
        yield line


class Unreadable(NamedTuple):
    """The value of a column of Parquet or Arrow that Python cannot represent, such as a date of the
    year 20000. It is an error only where the column is read."""
    reason: str


def parquet_rows(path):
    """Yield (number, row), numbered from 1."""
    with reading(what_is_read(path)):
        stream = open(path, "rb")  # pyarrow opens no name that is not UTF-8
    with stream:
        with reading(what_is_read(path)):
            file = pyarrow.parquet.ParquetFile(stream)
            names = file.schema_arrow.names
        check_distinct(f"{path}: the schema", names)
        yield from table_rows(batches_of_parquet(file, path))


def batches_of_parquet(file, path):
    with reading(what_is_read(path)):
        yield from file.iter_batches(batch_size=1024)


def table_rows(batches):
    """Yield (number, row) of tables of Arrow, numbered from 1."""
    number = 0
    for batch in batches:
        columns = [values_of(column) for column in batch.columns]
        for values in zip(*columns):
            number += 1
            yield number, dict(zip(batch.schema.names, values))


def values_of(column):
    """Return the values of a column of Arrow as objects of Python."""
    # Types such as dates raise exceptions of many kinds.
    try:
        return column.to_pylist()
    except Exception as error:
        return [Unreadable(f"{column.type}: {library_reason(error)}")] * len(column)


READERS = {
    ".jsonl": json_line_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}


# --- The parts of a --dataset ---------------------------------------------------------------------

class Source(NamedTuple):
    """One part of a --dataset: a file, a folder of files, a folder of `save_to_disk`, or a data set
    of the Hub."""
    name: str
    split: str | None = None
    share: float | None = None


def parse_sources(spec):
    """Split a --dataset into its parts: `NAME[:SPLIT][:SHARE]`, or several separated by commas.

    A path that exists is taken as it is, even with a comma or a colon in it.
    """
    if os.path.exists(spec):
        return [Source(spec)]
    parts = [parse_source(text) for text in spec.split(",")]
    if len({part.share is None for part in parts}) > 1:
        raise UserError(f"{spec}: give every part a share, or none")
    return parts


def parse_source(text):
    text = text.strip()
    if os.path.exists(text):
        return Source(text)
    name, *options = [part.strip() for part in text.split(":")]
    share = None
    if options and re.fullmatch(r"\d*\.?\d+", options[-1]):
        share = float(options.pop())
    share_is_wrong = share is not None and not 0 < share < math.inf
    if len(options) > 1 or not name or share_is_wrong:
        raise UserError(f"{text}: a data set is NAME, NAME:SPLIT or NAME:SPLIT:SHARE, "
                        "with a share above 0")
    split = options[0] if options else None
    return Source(name, split, share)


def find_files(source: Source) -> tuple[list, dict]:
    """List the files of a source, none for a folder of `save_to_disk` or a data set of the Hub.

    Returns (files, {reason: files or splits of the source that are not read}).
    """
    path, kinds = pathlib.Path(source.name), ", ".join(READERS)
    if is_saved(path):
        return [], {"other splits of the folder": other_saved_splits(path, source.split)}
    if os.path.isdir(path):
        return find_files_of_folder(path, source.split)
    if os.path.lexists(path):
        check_is_file(path)
        if path.suffix.lower() not in READERS:
            raise UserError(f"{path}: cannot read this kind of file; use one of {kinds}")
        if source.split:
            raise UserError(f"{source.name}:{source.split}: a file has no splits; "
                            "a share is a number, as in FILE:0.7")
        return [path], {}
    # A name of the Hub has no suffix of a file and does not look like a path.
    is_path = path.is_absolute() or source.name.startswith(".")
    if is_path or path.suffix.lower() in READERS:
        raise UserError(f"{path}: no such file{nearest_file(path)}")
    return [], {}


def check_is_file(path):
    """Raise for a link to nothing, a pipe, a socket or a device: no rows can be read from it, or
    not twice."""
    if not os.path.exists(path):
        raise UserError(f"{path}: a link to {os.readlink(path)}, which does not exist")
    if not os.path.isfile(path):
        raise UserError(f"{path}: not a regular file but a pipe, a socket or a device; write the "
                        "rows to a file")


def nearest_file(path):
    """Name the files whose names resemble the name of a missing one."""
    if not os.path.isdir(path.parent):
        return ""
    return nearest(path.name, [file.name for file in path.parent.iterdir()])


def is_saved(path):
    """Return whether `save_to_disk` wrote this folder. dataset_info.json alone does not tell: the
    Hub and LLaMA-Factory have files of this name next to files of rows."""
    names = ("state.json", "dataset_dict.json")
    return any(os.path.exists(path / name) for name in names)


def other_saved_splits(path, split):
    """List the splits of a folder of `save_to_disk` that are not read."""
    try:
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
        return [str(name) for name in names if name != (split or "train")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []  # `open_dataset` names the fault


# --- The splits of a folder of files. They follow from the names, as for `datasets`:
# test.jsonl, pairs_test.jsonl, test/0000.parquet, data/test-00000-of-00002.parquet,
# data/test_prefs-00000-of-00001.parquet.

SPLIT_WORDS = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "holdout": "validation", "heldout": "validation",
}
SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_WORDS)})s?(?![a-z])")
# A shard of a file, as the Hub names it; older names end in a hash.
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(-[0-9a-f]{16})?")
# Files that describe a data set and hold no rows.
NOT_ROWS = ("dataset_info.json", "dataset_infos.json")
# Files that probably hold rows, which no reader here reads.
OTHER_KINDS = (".gz", ".zst", ".bz2", ".xz", ".zip", ".arrow", ".tsv", ".xlsx", ".ndjson")


def find_files_of_folder(path, split):
    """Choose the files of one split of a folder: of the training split if `split` is None.

    Files without the name of a split are training rows. Returns as find_files.
    """
    direct, below, not_read = list_folder(path)
    # Subfolders are read if there is no file outside them, or if the split is in them alone.
    files = direct or below
    if split and not any(is_of_split(path, file, split) for file in direct):
        files = direct + below
    if not files:
        raise UserError(f"{path}: no {', '.join(READERS)} file in this folder")
    if not direct:
        check_one_data_set(path, files)

    chosen = choose_split(path, files, split)
    for file in direct + below:
        if file in chosen:
            continue
        name = split_of_file(path, file)
        reason = f"of the split {name}" if name else "of another subfolder or split"
        not_read.setdefault(reason, []).append(str(file))
    return chosen, not_read


def list_folder(path):
    """Returns the files directly in a folder, the files at most two folders below, and
    {reason: files that hold no rows or cannot be read}."""
    direct, below, not_read = [], [], {}
    for depth, file in visible_files(path):
        suffix, reason = file.suffix.lower(), ""
        if file.name in NOT_ROWS:
            reason = "describes a data set and holds no rows; --columns names columns"
        elif suffix in OTHER_KINDS:
            reason = "of a kind that is not read"
        elif suffix in READERS and depth > 2:
            reason = "more than two folders below"
        elif suffix in READERS:
            check_is_file(file)
            files = below if depth else direct
            files.append(file)
        elif not file.is_file():
            reason = "a pipe, a socket or a link to nothing"
        if reason:
            not_read.setdefault(reason, []).append(str(file))
    return direct, below, not_read


def visible_files(path):
    """Yield (folders above it, file) of the files and links of a folder, without hidden ones and
    those of a run, which may write its output below its data."""
    lists = [*path.glob(f"*/{LIST}"), *path.glob(f"*/*/{LIST}")]
    runs = {file.parent for file in lists}
    for depth, pattern in enumerate(("*", "*/*", "*/*/*", "*/*/*/*")):
        for file in sorted(path.glob(pattern)):
            is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            is_output = not runs.isdisjoint(file.parents)
            if not is_hidden and not is_output and not file.is_dir():
                yield depth, file


def list_empty(files: list) -> list:
    """List the files without a row, of several that are read together."""
    return [str(file) for file in files if next(READERS[file.suffix.lower()](file), None) is None]


def check_one_data_set(path, files):
    """Raise if the subfolders are more than the splits of one data set."""
    folders = set()
    for file in files:
        parts = file.parent.relative_to(path).parts
        names = [part for part in parts if part != "data" and not SPLIT_WORD.search(part.lower())]
        folders.add("/".join(names))
    if len(folders) > 1:
        raise UserError(f"{path}: no file directly in this folder; name one of its subfolders, or "
                        f"several separated by commas: {', '.join(sorted(folders - {''}))}")


def split_of_file(path, file):
    """Return the split of a file in the folder `path`, or None if its name has none."""
    stem = file.stem
    shard = SHARD.fullmatch(stem)
    if shard and SPLIT_WORD.search(shard[1].lower()):
        return shard[1]
    folders = file.parent.relative_to(path).parts
    for name in (stem, *reversed(folders)):
        word = SPLIT_WORD.search(name.lower())
        if word:
            return SPLIT_WORDS[word[1]]
    return None


def kind_of_split(name):
    """Return train, validation or test for a name such as train_prefs, or None."""
    word = SPLIT_WORD.search(name.lower())
    return SPLIT_WORDS[word[1]] if word else None


def is_of_split(path, file, split):
    return split in (file.stem, split_of_file(path, file))


def choose_split(path, files, split):
    """Choose the files of a split. Raises if the split is not there or is not clear."""
    names = {file: split_of_file(path, file) for file in files}
    existing = sorted({name for name in names.values() if name})
    without = [file for file in files if names[file] is None]
    kind = kind_of_split(split or "train")

    # A name as the user wrote it; else any of its kind, so that `val` finds `validation`.
    chosen = []
    if split:
        chosen = [file for file in files if is_of_split(path, file, split)]
    if not chosen and split in (None, *SPLIT_WORDS):
        chosen = [file for file in files if names[file] and kind_of_split(names[file]) == kind]
        variants = sorted({names[file] for file in chosen})
        if len(variants) > 1:
            raise UserError(f"{path}: has the splits {', '.join(existing)}; name one of them, as "
                            f"in {path}:{variants[0]}")
    if split is None or (kind == "train" and not chosen):
        chosen = [file for file in files if file in chosen or file in without]
    # A folder of one split alone is read by the name of the folder.
    if not chosen and split is None and len(existing) == 1:
        return files
    if not chosen:
        there = ", ".join(existing) or ", ".join(file.name for file in files[:5])
        raise UserError(f"{path}: there is no split {split or 'train'} in this folder; "
                        f"there are {there}; name one, as in {path}:{(existing or ['train'])[0]}")
    return chosen


def open_dataset(source: Source) -> datasets.Dataset:
    """Load the data set of a folder of `save_to_disk`, or of the Hub."""
    path = pathlib.Path(source.name)
    if is_saved(path):
        with reading(f"{source.name}: cannot be read as a folder of save_to_disk"):
            saved = datasets.load_from_disk(source.name)
        rows = choose_saved_split(source, saved)
        check_whole(rows)
        return rows
    split = source.split or "train"
    stop_hub_retries()
    # The network, the Hub and old files raise exceptions of many kinds. Each means that the data
    # set cannot be read.
    try:
        return datasets.load_dataset(source.name, split=split)
    except Exception as error:
        reason = library_reason(error)
        if "Unknown split" in reason:
            raise UserError(f"{source.name}:{split}: {reason}") from error
        raise UserError(hub_failure(source.name, error, nearest_file(path))) from error


# The last bytes of a file that `datasets` writes: the end of a stream of Arrow.
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def check_whole(rows: datasets.Dataset):
    """Raise if a file of Arrow was cut between two of its batches: pyarrow reads it without an
    error, as fewer rows."""
    for entry in rows.cache_files:
        path = pathlib.Path(entry["filename"])
        with reading(f"{path}: cannot be read"), open(path, "rb") as file:
            file.seek(-len(END_OF_STREAM), os.SEEK_END)
            end = file.read()
        if end != END_OF_STREAM:
            raise UserError(f"{path}: was cut: the end of its rows is missing; write it again, or "
                            "delete it if it is a file of a cache")


def choose_saved_split(source, saved):
    """A saved folder has a dictionary of splits, or one data set without splits."""
    split = source.split or "train"
    splits = "none"
    if isinstance(saved, datasets.DatasetDict):
        splits = ", ".join(saved)
        if split in saved:
            return saved[split]
    elif not source.split:
        return saved
    raise UserError(
        f"{source.name}: there is no split {split} in this folder; there are {splits}")


def dataset_rows(source):
    """Yield (number, row) of a data set of `datasets`. Its tables have all columns as they are
    stored: images, for example, are not decoded."""
    rows = open_dataset(source).with_format("arrow")
    yield from table_rows(tables_of_dataset(rows, source))


def tables_of_dataset(rows, source):
    with reading(f"{source.name}: cannot be read"):
        yield from rows.iter(batch_size=1024)


def read_rows(source: Source) -> Iterator[tuple[str, object, str]]:
    """Yield (where, row, folder): a row as a dict, its name in errors, drops and logs, and the
    folder that paths in it are relative to."""
    files, _ = find_files(source)
    if not files:
        for number, row in dataset_rows(source):
            yield f"{source.name}, row {number}", row, source.name
    for path in files:
        name = printable(str(path))
        for number, row in READERS[path.suffix.lower()](path):
            yield f"{name}, row {number}", row, str(path.parent)


# --- Several evaluation sets ----------------------------------------------------------------------

EVAL_SET = re.compile(r"(\w[\w-]*)=(.*)", re.DOTALL)


def evaluation_sets(spec: str) -> dict[str, str]:
    """Return {split of metrics.jsonl: rows} of --eval_dataset.

    "FILE" is {"eval": "FILE"}, and "a=FILE,b=FILE" {"eval/a": "FILE", "eval/b": "FILE"}. The rows
    of a name may be a mixture, because a part without a name belongs to the set before it.
    """
    if os.path.exists(spec) or not EVAL_SET.fullmatch(spec.partition(",")[0]):
        return {"eval": spec}
    sets, split = {}, None
    for part in spec.split(","):
        match = EVAL_SET.fullmatch(part)
        if match is None:
            sets[split] += f",{part}"
            continue
        split = f"eval/{match[1]}"
        if split in sets or not match[2]:
            problem = "names two sets" if split in sets else "names no rows"
            raise UserError(f"--eval_dataset {spec}: {match[1]} {problem}; write "
                            "NAME=ROWS,NAME=ROWS with different names")
        sets[split] = match[2]
    return sets
