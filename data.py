"""Turns rows of text into token ids and batches, and reports the rows it truncated or dropped.

    python data.py FILE --model M      # counts, lengths and two rows, as training would see them

A row becomes a prompt and its answers. The scored tokens of an answer run from its first token to
the token that ends it; the prompt and the padding are never scored. With one token per word:

    {"prompt": "a cat", "chosen": " sat", "rejected": " ran"}
    prompt_ids    a cat
    chosen_ids    sat <eos>
    rejected_ids  ran <eos>

These rules hold for every row:

    boundary     prompt, prompt + chosen and prompt + rejected are tokenized whole. The answers
                 begin at the first token where the three differ, so both answers have the same
                 prompt even if the tokenizer merges characters across the boundary.
    BOS          begins a row at most once: if the tokenizer adds one to a text, or if the chat
                 template writes one.
    EOS          ends an answer unless the chat template ended it with another special token. A
                 truncated answer loses its EOS with the rest of its tail.
    truncation   removes the oldest tokens of the prompt first, the same for both answers, then the
                 tails of the answers.
    messages     the chat template writes them; templates.py checks that no text is lost.
    drops        rows without a training signal (an empty answer, chosen equal to rejected) are
                 dropped, counted and named in the report.

Files -> rows -> prompt and answers -> token ids -> batches: the sections below, in this order.
"""
from errors import UserError, nearest, run_script, stop_hub_retries  # first, see errors.py
import argparse
import ast
import csv
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow.compute
import pyarrow.parquet
import torch

import templates
from loading import load_tokenizer, text_with_tokens
from templates import begins_with

# The label of a token that is not scored.
IGNORE = torch.nn.CrossEntropyLoss().ignore_index
# A part of every cache key: token ids that other code made are not reused.
SOURCE = hashlib.sha256()
for code in (__file__, templates.__file__):
    SOURCE.update(pathlib.Path(code).read_bytes())
SOURCE = SOURCE.hexdigest()


def first_line(error):
    """Return the first line of an exception's message, or its name if it has no message."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


# --- Files -> rows --------------------------------------------------------------------------------
# A text must be read exactly as the file has it, and every row with its number. The CSV and JSON
# readers of `datasets`, pandas and pyarrow infer types instead: "2020-01-01" becomes a date, a
# message with an optional key becomes a string of JSON, and surplus cells of a CSV row disappear.
# The standard library reads both formats as they are. Parquet has types; `datasets` reads it by
# pyarrow, too.

def json_line_rows(path):
    """Yield (number, row), numbered as the lines of the file."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}, row {number}: not a whole JSON object ({error})") from None
            yield number, row


def json_rows(path):
    """Yield (number, row) of one JSON list, numbered from 1, or of JSON lines."""
    with open(path, encoding="utf-8-sig") as file:
        if file.read(4096).lstrip().startswith("["):
            file.seek(0)
            yield from enumerate(json.load(file), 1)
            return
    yield from json_line_rows(path)


def csv_rows(path):
    """Yield (number, row). Every value is the text of the file: "NA" is not null, "42" no int."""
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        # strict: an open quote is an error instead of swallowing all rows after it.
        reader = csv.DictReader(file, strict=True)
        names = reader.fieldnames
        if names is not None and len(set(names)) < len(names):
            raise UserError(f"{path}: its header names a column twice")
        for number, row in enumerate(reader, 1):
            # DictReader puts surplus cells under the key None.
            if None in row:
                raise UserError(f"{path}, row {number}: more cells than the header names; "
                                "text with commas must be quoted")
            yield number, row


def parquet_rows(path):
    """Yield (number, row), numbered from 1."""
    number = 0
    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield number, row


READERS = {
    ".jsonl": json_line_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}
# The readers raise these exceptions for a file whose content does not fit its suffix.
UNREADABLE = (UnicodeDecodeError, csv.Error, pyarrow.ArrowException, OSError, json.JSONDecodeError,
              RecursionError)


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
    if path.is_dir():
        return find_files_of_folder(path, source.split)
    if path.is_file():
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


def nearest_file(path):
    """Name the files whose names resemble the name of a missing one."""
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, [file.name for file in path.parent.iterdir()])


def is_saved(path):
    """Return whether `save_to_disk` wrote this folder. dataset_info.json alone does not tell: the
    Hub and LLaMA-Factory have files of this name next to files of rows."""
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def other_saved_splits(path, split):
    """List the splits of a folder of `save_to_disk` that are not read."""
    try:
        names = json.loads((path / "dataset_dict.json").read_text())["splits"]
    except (OSError, ValueError, KeyError):
        return []
    return [name for name in names if name != (split or "train")]


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
    for pattern in ("*", "*/*", "*/*/*"):
        for file in sorted(path.glob(pattern)):
            is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if is_hidden or not file.is_file():
                continue
            if file.name in NOT_ROWS:
                reason = "describes a data set and holds no rows; --columns names columns"
                not_read.setdefault(reason, []).append(str(file))
            elif file.suffix.lower() in OTHER_KINDS:
                not_read.setdefault("of a kind that is not read", []).append(str(file))
            elif file.suffix.lower() in READERS:
                files = direct if file.parent == path else below
                files.append(file)
    return direct, below, not_read


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


def open_dataset(source):
    """Load the data set of a folder of `save_to_disk`, or of the Hub."""
    split = source.split or "train"
    on_disk = is_saved(pathlib.Path(source.name))
    # The network, the Hub and old files raise exceptions of many kinds. Each means that the data
    # set cannot be read.
    try:
        if on_disk:
            saved = datasets.load_from_disk(source.name)
        else:
            stop_hub_retries()
            saved = datasets.load_dataset(source.name, split=split)
    except Exception as error:
        if "Unknown split" in str(error):
            raise UserError(f"{source.name}:{split}: {first_line(error)}") from error
        raise UserError(
            f"{source.name}: not found locally or on the Hub ({first_line(error)})"
            f"{nearest_file(pathlib.Path(source.name))}") from error
    if not on_disk:
        return saved
    # A saved folder contains a dictionary of splits, or one data set without splits.
    splits = "none"
    if isinstance(saved, datasets.DatasetDict):
        splits = ", ".join(saved)
        if split in saved:
            return saved[split]
    elif not source.split:
        return saved
    raise UserError(
        f"{source.name}: there is no split {split} in this folder; there are {splits}")


def read_rows(source):
    """Yield (where, row): a row as a dict, and its name in errors, drops and logs."""
    files, _ = find_files(source)
    if not files:
        for number, row in enumerate(open_dataset(source), 1):
            yield f"{source.name}, row {number}", row
    for path in files:
        read = READERS[path.suffix.lower()]
        try:
            for number, row in read(path):
                yield f"{path}, row {number}", row
        except UNREADABLE as error:
            kind = path.suffix[1:]
            raise UserError(f"{path}: cannot be read as {kind} ({error})") from error


# --- Rows -> prompt and answers, as text or as messages -------------------------------------------

# The text before each answer in HH-RLHF and in data sets of its format.
TURN = "\n\nAssistant:"


def rename_columns(row, columns, where):
    """Apply --columns, {our name: the file's name}, to a row."""
    existing = row if isinstance(row, dict) else {}
    for name in columns.values():
        if name not in existing:
            raise UserError(f"{where}: --columns names {name!r}; the row has "
                            f"{quote_names(existing)}{nearest(name, existing)}")
    renamed = {name: value for name, value in row.items() if name not in columns.values()}
    for ours, theirs in columns.items():
        renamed[ours] = row[theirs]
    return renamed


def quote_names(names):
    return ", ".join(map(repr, names)) or "no fields at all"


def choose_fields(row, where, sides):
    """Choose the fields to read from every row of a file, by its first row."""
    names = set(row) if isinstance(row, dict) else set()
    for fields in (("prompt", *sides), sides, ("chosen", "rejected")):
        if not names.issuperset(fields):
            continue
        # One answer without a prompt must be a dialogue: a text does not mark where the answer
        # begins.
        if len(fields) > 1 or isinstance(row[fields[0]], list):
            return fields
    needed, existing = ", ".join(("prompt", *sides)), quote_names(sorted(names))
    raise UserError(f"{where}: needs the fields {needed}, or chosen and rejected with the prompt "
                    f"inside both (--columns renames other fields); it has {existing}")


def read_field(row, field, where):
    """Read a text, or a list of messages {"role": text, "content": text}."""
    value = row.get(field) if isinstance(row, dict) else None
    if value is None:
        raise UserError(f"{where}: the field '{field}' is missing")
    if isinstance(value, str):
        texts = [value]
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = [read_message(message, field, where) for message in value]
        texts = []
        for message in value:
            texts += message.values()
    else:
        start = json.dumps(value, default=str)[:60]
        raise UserError(f"{where}: the field '{field}' holds {start}, which is not text and no "
                        "list of messages")
    if not all(map(is_unicode, texts)):
        raise UserError(
            f"{where}: the field '{field}' holds half of a surrogate pair, which is not text")
    return value


def read_message(message, field, where):
    """Read the role and the content of a message. `list_unread` checks its other keys."""
    texts = {key: message.get(key) for key in ("role", "content")}
    if not all(isinstance(text, str) for text in texts.values()):
        start = json.dumps(message, default=str)[:80]
        raise UserError(f"{where}: the field '{field}' holds the message {start}; "
                        "a message has a role and a content, both text")
    return texts


def is_unicode(text):
    """Return False for half of a surrogate pair, which UTF-8 cannot encode."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def read_score(row, field, where):
    value = row.get(field) if isinstance(row, dict) else None
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        start = json.dumps(value, default=str)[:60]
        raise UserError(f"{where}: the loss reads the field '{field}', a finite number, "
                        f"and the row has {start}")
    return score


# --- Columns of a row, and keys of a message, that are not read -----------------------------------
# The report lists them. A row is an error if one of them holds a part of what the model should see,
# or says that the row should not be trained on as it is. Names are compared by `plain_name`.

CONTEXT = {
    "system", "systemprompt", "systemmessage", "systeminstruction", "sysprompt",
    "history", "chathistory", "conversationhistory", "dialoguehistory", "previousturn",
    "input", "context", "passage", "document", "doc", "retrieveddocument",
    "tool", "function", "toolcall", "functioncall", "chattemplatekwarg",
    "image", "imagepath", "imageurl", "imagefile", "img", "pixelvalue",
    "video", "videopath", "videourl", "audio", "audiopath", "audiourl",
}
# Keys of a message alone: the same name of a column may be the judge's reasoning.
MESSAGE_CONTEXT = CONTEXT | {
    "reasoning", "reasoningcontent", "reasoningdetail", "thinking", "think",
}
# Columns with the prompt under another name, in a row whose answers do not show where it ends.
PROMPT_NAMES = {
    "question", "instruction", "query", "problem", "userprompt", "usermessage", "prompttext",
    "message", "conversation", "trajectory", "dialogue", "request", "post", "user", "human",
    "input", "context", "history",
}
# False says that a row or a message should not be trained on, or that an answer is bad.
SWITCHES = {"label", "train", "trainable", "loss"}
# Every row counts the same, so a weight may only be 1.
WEIGHTS = {"weight", "sampleweight", "lossweight"}


@functools.lru_cache(maxsize=1024)
def plain_name(name):
    """Return the letters of a name in lower case, without a plural s: `Tools`, `tool` -> tool."""
    return re.sub(r"[^a-z]", "", str(name).lower()).removesuffix("s")


def is_blank(value):
    """Return whether a value holds nothing: no text and no number, however deep."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null", "None", "nan")
    if isinstance(value, dict):
        return all(is_blank(item) for item in value.values())
    if isinstance(value, list):
        return all(is_blank(item) for item in value)
    return value is None


def texts_of(value):
    """Return the texts of a field: a text, or the contents of messages."""
    items = value if isinstance(value, list) else [value]
    items = [item.get("content") if isinstance(item, dict) else item for item in items]
    return [item for item in items if isinstance(item, str)]


def is_repeated(value, texts):
    """Return whether one of these texts contains the value. A short value must be a whole line of a
    text, because many texts contain it by chance."""
    if not isinstance(value, str):
        return False
    value = value.strip()
    words = re.compile(rf"(?<!\w){re.escape(value)}(?!\w)")
    for text in texts:
        if len(value) >= 8 and words.search(text):
            return True
        if value in [line.strip() for line in text.splitlines()]:
            return True
    return False


def why_it_matters(name, value, context, texts):
    """Return why a row with this unread column or key is an error, or "".

    context     names whose content the model should see
    texts       the texts that are read: a value that they repeat is not lost
    """
    plain = plain_name(name)
    if plain in WEIGHTS and str(value) not in ("1", "1.0", "True"):
        return "every row counts the same"
    if plain in SWITCHES and str(value).strip().lower() == "false":
        return "it says false, and the text would be trained on"
    holds_content = isinstance(value, (str, list, dict, bytes))
    if plain in context and holds_content and not is_repeated(value, texts):
        return "the model would not see it"
    return ""


def list_unread(row, fields, read, ignored, where) -> list:
    """List the columns and the message keys that are not read: `source`, `chosen[].name`.

    fields      {our name: the file's name} of the prompt and the answers
    read        the names of all columns that are read
    ignored     the names of --ignore_columns
    """
    unread = []
    dialogue = row.get(fields["chosen"])
    prompt = texts_of(row.get(fields["prompt"]) if "prompt" in fields else dialogue)
    needs_prompt = "prompt" not in fields and not holds_prompt(dialogue)
    for name, value in row.items():
        if name in read or (is_blank(value) and name not in ignored):
            continue
        may_be_prompt = needs_prompt and (plain_name(name) in PROMPT_NAMES or is_question(value))
        context = CONTEXT | {plain_name(name)} if may_be_prompt else CONTEXT
        reason = why_it_matters(name, value, context, prompt)
        if reason and name not in ignored:
            advice = "write it into the prompt, or remove the column"
            if plain_name(name) in WEIGHTS | SWITCHES:
                advice = "remove the row or the column"
            if may_be_prompt:
                advice = f"if it is the prompt, pass --columns prompt={name}"
            raise UserError(f"{where}: the column '{name}' is not read: {reason}; {advice}; "
                            f"--ignore_columns {name} trains without it")
        unread.append(name)
    for field, name in fields.items():
        unread += list_unread_keys(row.get(name), field, ignored, where)
    return unread


def is_question(value):
    return isinstance(value, str) and value.rstrip().endswith("?")


def holds_prompt(dialogue):
    """Return whether an answer marks the end of the prompt inside it."""
    if isinstance(dialogue, str):
        return TURN in dialogue
    roles = [item.get("role") for item in dialogue or [] if isinstance(item, dict)]
    return len(roles) > 0 and roles[0] != "assistant"


def list_unread_keys(value, field, ignored, where):
    """List the keys of the messages of one field, as list_unread."""
    unread = {}
    messages = value if isinstance(value, list) else []
    for message in messages:
        items = message.items() if isinstance(message, dict) else ()
        for key, content in items:
            if key in ("role", "content") or (is_blank(content) and key not in ignored):
                continue
            reason = why_it_matters(key, content, MESSAGE_CONTEXT, texts_of([message]))
            if reason and key not in ignored:
                raise UserError(
                    f"{where}: the field '{field}' holds a message with {key}, which is not read: "
                    f"{reason}; write it into the content; --ignore_columns {key} trains without "
                    "it")
            unread[f"{field}[].{key}"] = True
    return list(unread)


def count_unread(text, unread):
    """Add the numbers of rows of {name: rows}, from the rows of `examples`."""
    for group in text.data.column("unread").value_counts().to_pylist():
        for name in json.loads(group["values"]):
            unread[name] = unread.get(name, 0) + group["counts"]


def check_ignored(ignored: tuple, accounts: list[dict]):
    """Raise if a name of --ignore_columns is no column and no key that is not read."""
    existing = set()
    for account in accounts:
        for name in account["unread"]:
            existing |= {name, name.rpartition("[].")[2]}
    for name in ignored:
        if name not in existing:
            listed = ", ".join(sorted(existing)) or "none"
            raise UserError(f"--ignore_columns {name}: no row has such a column or key that is not "
                            f"read; there are: {listed}{nearest(name, existing)}")


# --- Messages that arrive as text -----------------------------------------------------------------

# How messages begin that a CSV cell or a JSON string holds as text.
MESSAGES_AS_TEXT = re.compile(r"""\s*"?\s*(\[\s*)?\{""")
QUOTED_ROLE = re.compile(r"""["'](role|from)\\*["']\s*:""")
# The keys of a message: of the usual format, and of ShareGPT.
MESSAGE_KEYS = (("role", "content"), ("from", "value"))


def parse_messages(row, theirs, where):
    """Replace text that is a list of messages, as JSON or as Python writes it, by the list. theirs
    has the file's names of our fields."""
    if not isinstance(row, dict):
        return row
    parsed = {}
    for field in ("prompt", "chosen", "rejected"):
        name = theirs.get(field, field)
        text = row.get(name)
        if isinstance(text, str) and MESSAGES_AS_TEXT.match(text):
            parsed[name] = parse_message_list(text, name, where)
    return row | parsed if parsed else row


def parse_message_list(text, field, where):
    """Parse text that begins as a list of messages does. Other text is returned unchanged."""
    if not QUOTED_ROLE.search(text):
        return text
    value = text
    try:
        # A JSON string may hold JSON.
        while isinstance(value, str):
            value = json.loads(value)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            # Text in braces is an answer; a list with roles is a damaged list of messages.
            if text.lstrip().startswith("{"):
                return text
            raise UserError(f"{where}: the field '{field}' holds a list of messages as text that "
                            f"is not JSON: {text[:60]!r}; write it as JSON") from None
    # read_field reports a single message, which is not in a list.
    messages = [value] if isinstance(value, dict) else value
    return value if is_message_list(messages) else text


def is_message_list(value):
    if not isinstance(value, list):
        return False
    for item in value:
        keys = set(item) if isinstance(item, dict) else set()
        if not any(keys.issuperset(pair) for pair in MESSAGE_KEYS):
            return False
    return True


# --- Prompt and answers apart ---------------------------------------------------------------------

def split_prompt(chosen: str, rejected: str) -> str:
    """Find the prompt inside two dialogues: their common prefix up to the last turn of the
    assistant, so that neither answer loses its beginning. Where turns are not marked, the prompt
    ends before the last white space of the prefix."""
    shared = os.path.commonprefix([chosen, rejected])
    if TURN in shared:
        return shared[:shared.rindex(TURN) + len(TURN)]
    space = re.search(r"\s\S*$", shared)
    return shared[:space.start()] if space else ""


def split_messages(dialogues):
    """Find the prompt inside dialogues that are lists of messages: the longest common prefix after
    which every dialogue continues with a turn of the assistant. Turns of the assistant at the end
    of this prefix belong to the answers."""
    for length in range(min(map(len, dialogues)), 0, -1):
        prompt = dialogues[0][:length]
        if prompt[-1]["role"] == "assistant":
            continue
        answers = [dialogue[length:] for dialogue in dialogues]
        are_equal = all(dialogue[:length] == prompt for dialogue in dialogues)
        if are_equal and all(begins_with(answer, ("assistant",)) for answer in answers):
            return prompt
    return []


def split_row(prompt, answers: list, where: str):
    """Separate prompt and answers, which may come in any of the formats.

    prompt is None where the answers contain it. Returns prompt and answers, all of them text or
    all of them lists of messages.
    """
    if isinstance(prompt, list) or any(isinstance(answer, list) for answer in answers):
        return split_conversation(prompt, answers, where)
    if prompt is not None:
        return prompt, answers
    if len(answers) == 1:
        raise UserError(f"{where}: one text without a prompt: where its answer begins is unknown; "
                        "give it a prompt")
    prompt = split_prompt(*answers)
    return prompt, [answer[len(prompt):] for answer in answers]


def split_conversation(prompt, answers, where):
    """Separate prompt and answers, as split_row, where one of them is a list of messages."""
    if prompt is None and any(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: one of chosen and rejected is a text, the other a list of "
                        "messages; without a prompt, both must be lists")
    answers = [as_messages("assistant", answer) for answer in answers]
    # Answers that continue the prompt.
    if prompt is not None and all(begins_with(answer, ("assistant", "tool")) for answer in answers):
        return move_tool_outputs(as_messages("user", prompt), answers)
    # Answers that are whole dialogues and repeat the prompt.
    shared = prompt if isinstance(prompt, list) else split_messages(answers)
    matches = all(answer[:len(shared)] == shared for answer in answers)
    if isinstance(prompt, str):
        contents = [message["content"].strip() for message in shared]
        matches = matches and prompt.strip() in contents
    if not matches:
        raise UserError(
            f"{where}: the answers begin neither with a turn of the assistant nor with the prompt")
    return shared, [answer[len(shared):] for answer in answers]


def move_tool_outputs(prompt, answers):
    """Move the outputs of tools that begin all answers to the prompt: the model does not write
    them. Returns (prompt, answers)."""
    while begins_with(answers[0], ("tool",)):
        output = answers[0][0]
        if any(answer[:1] != [output] for answer in answers):
            break
        prompt = prompt + [output]
        answers = [answer[1:] for answer in answers]
    return prompt, answers


def as_messages(role, value):
    """Turn a text into one message of this role, and return a list of messages unchanged."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def examples(source: Source, sides: tuple, scored=False, columns=(), ignored=(),
             **cache_key) -> Iterator[dict]:
    """Yield {id, chat, has_own_prompt, prompt, chosen, rejected, unread} for every row.

    scored          adds {side}_score
    unread          a JSON list of the columns and message keys that are not read
    chat            whether prompt and answers are JSON of messages instead of text
    has_own_prompt  whether the prompt is a field of the row, or is searched inside the answers
    cache_key       unused here; `datasets` hashes it with the other arguments
    """
    fields = file_is_chat = None
    theirs, kinds = dict(columns), set()
    for where, row_of_file in read_rows(Source(*source)):
        row_of_file = parse_messages(row_of_file, theirs, where)
        row = rename_columns(row_of_file, theirs, where) if columns else row_of_file
        # Every row of a file must have the format of the first.
        if fields is None:
            fields = choose_fields(row, where, sides)
        if "prompt" not in fields and isinstance(row, dict) and row.get("prompt") is not None:
            raise UserError(f"{where}: has a prompt, and the first row of its file had none; "
                            "give every row a prompt, or none")
        # Columns and keys that are not read, which may be an error.
        unread = []
        if isinstance(row, dict):
            names = {field: theirs.get(field, field) for field in fields}
            score_names = [f"{side}_score" for side in sides] if scored else []
            others = [theirs.get(name, name) for name in ("id", *score_names)]
            read = {*names.values(), *others}
            unread = list_unread(row_of_file, names, read, ignored, where)
        if "split" in unread and "split" not in ignored:
            kinds.add(kind_of_split(str(row_of_file["split"])))
        if len(kinds - {None}) > 1:
            raise UserError(f"{where}: its column 'split' has {row_of_file['split']!r}, and an "
                            "earlier row has another split; write each split to a file of its own; "
                            "--ignore_columns split reads all rows")
        values = {field: read_field(row, field, where) for field in fields}
        prompt = values.pop("prompt", None)
        prompt, answers = split_row(prompt, list(values.values()), where)
        is_chat = not isinstance(prompt, str)
        if file_is_chat not in (None, is_chat):
            raise UserError(f"{where}: some rows of this file are texts, others are messages")
        file_is_chat = is_chat

        example = {
            "id": name_row(row, where),
            "chat": is_chat,
            "has_own_prompt": "prompt" in fields,
            "unread": json.dumps(unread),
        }
        for name, part in zip(("prompt", *sides), (prompt, *answers)):
            example[name] = json.dumps(part) if is_chat else part
        if scored:
            for side in sides:
                name = f"{side}_score"
                example[name] = read_score(row, name, where)
        yield example


def name_row(row, where):
    """Return the name of a row in errors and logs: file and number, and its id if it has one."""
    row_id = row.get("id")
    if row_id is None or not is_unicode(str(row_id)):
        return where
    return f"{where} (id {row_id})"


def load_text(source, sides, scored=False, columns=(), ignored=()):
    """Load the rows of `examples` as a data set, which `datasets` caches until a file changes."""
    files, _ = find_files(source)
    show_progress(source, files)
    arguments = {"source": tuple(source), "sides": sides, "scored": scored, "columns": columns,
                 "ignored": ignored}
    if next(examples(**arguments), None) is None:
        raise UserError(f"{source.name}: there is no row in it")
    # The state of the data is part of the cache key. A tuple: `datasets` splits lists into shards.
    state = tuple(file_state(file) for file in files)
    if not state:
        state = open_dataset(source)._fingerprint
    cache_key = {"code": SOURCE, "stamps": state}
    try:
        return datasets.Dataset.from_generator(examples, gen_kwargs=arguments | cache_key)
    except datasets.exceptions.DatasetGenerationError as error:
        # Raise the exception of `examples`, which names the file and the row.
        raise error.__cause__ from None


def file_state(file):
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def show_progress(source, files):
    """Turn the progress bars of `datasets` off for data that is read in seconds. The size of a data
    set of the Hub is unknown, so its bars stay on."""
    if not files:
        files = pathlib.Path(source.name).rglob("*")
    sizes = [file.stat().st_size for file in files]
    if sizes and sum(sizes) < 20e6:
        datasets.disable_progress_bars()
    else:
        datasets.enable_progress_bars()


# --- Prompt and answers -> token ids --------------------------------------------------------------

class Limits(NamedTuple):
    """The largest numbers of tokens of a row (prompt and one answer), of its prompt, and of an
    answer with its EOS.

    max_prompt_length   None: the tokens that the longer answer does not need, and at least half of
                        max_length
    overlong            a longer row is truncated ("cut"), dropped ("drop") or an error ("error")
    """
    max_length: int = 1024
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_end"
    overlong: str = "cut"


def truncate(prompt: list, answers: list, limits: Limits, front=0):
    """Truncate token lists to the limits. Returns (prompt, answers).

    The first `front` tokens of the prompt (BOS) always stay.
    """
    answer_limit = limits.max_completion_length or limits.max_length
    prompt_limit = limits.max_prompt_length
    if prompt_limit is None:
        longest = min(max(map(len, answers)), answer_limit)
        prompt_limit = max(limits.max_length - longest, limits.max_length // 2)
    # Truncate the prompt first.
    if len(prompt) > prompt_limit:
        if limits.truncation_mode == "keep_end":
            surplus = len(prompt) - prompt_limit
            prompt = prompt[:front] + prompt[front + surplus:]
        else:
            prompt = prompt[:prompt_limit]
    # Then truncate the answers.
    answer_limit = min(limits.max_length - len(prompt), answer_limit)
    return prompt, [answer[:answer_limit] for answer in answers]


def special_ids(tokenizer):
    """Return the ids that the tokenizer puts before a text (BOS, none, or several), and [EOS]."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so the model could not learn to stop: "
                        "set eos_token in its tokenizer_config.json")
    text = text_with_tokens(tokenizer)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    with_special = tokenizer(text, add_special_tokens=True)["input_ids"]
    starts = range(len(with_special))
    front = next(i for i in starts if with_special[i:i + len(plain)] == plain)
    return with_special[:front], [tokenizer.eos_token_id]


def tokenize_row(text, prompt, wholes, front, ends, limits):
    """Tokenize one row. Returns its columns.

    text     RowText
    prompt   the ids of the prompt; wholes: of prompt + answer, for each answer
    front    the ids to put before the row, [BOS] or []
    ends     the ids to put after each answer, [EOS] or []
    """
    # The answers begin where the tokens of prompt, prompt + chosen and prompt + rejected differ.
    start = len(os.path.commonprefix([prompt, *wholes]))
    answers = [whole[start:] for whole in wholes]
    # Add no second BOS and no second EOS where the text has its own.
    whole_prompt = wholes[0][:start]
    if wholes[0][:len(front)] != front:
        whole_prompt = front + whole_prompt
    ended = []
    for answer, end in zip(answers, ends):
        ended.append(answer if answer[-1:] == end else answer + end)
    prompt_ids, answer_ids = truncate(whole_prompt, ended, limits, len(front))

    answer_tokens = sum(map(len, answer_ids))
    row = {
        "prompt_ids": prompt_ids,
        "answer_ids": answer_ids,
        "prompt_truncated": len(prompt_ids) < len(whole_prompt),
        "answers_truncated": answer_tokens < sum(map(len, ended)),
        "merged": start < len(prompt) and "unserved" not in text.notes,
        "prompt_length": len(prompt_ids),
        "chosen_length": len(answer_ids[0]),
        "tokens": len(prompt_ids) + answer_tokens,
    }
    is_empty = not all(answers) or not all(answer.strip() for answer in text.answers)
    row["problem"] = "empty answer" if is_empty else find_problem(text, row, limits)
    if text.problem:
        row["problem"] = text.problem
    row |= {name: name in text.notes for name in templates.TEXT_NOTES}
    return row


def find_problem(text, row, limits):
    """Return why a row without an empty answer cannot be trained on, or ""."""
    is_pair = len(text.answers) == 2
    if not row["prompt_ids"]:
        return "no prompt"
    if is_pair and text.answers[0] == text.answers[1]:
        return "chosen equals rejected"
    if limits.overlong != "cut" and (row["prompt_truncated"] or row["answers_truncated"]):
        return "too long"
    if is_pair and row["answer_ids"][0] == row["answer_ids"][1]:
        if row["answers_truncated"]:
            return "chosen equals rejected after truncation"
        return "chosen and rejected are the same tokens"
    return ""


def text_of_row(batch, i, tokenizer, sides, special):
    """Turn row i of a batch of `examples` into RowText."""
    prompt = batch["prompt"][i]
    answers = [batch[side][i] for side in sides]
    if batch["chat"][i]:
        messages = [json.loads(answer) for answer in answers]
        return templates.text_of_messages(
            json.loads(prompt), messages, tokenizer, special, batch["id"][i])
    return templates.text_of_texts(prompt, answers, batch["has_own_prompt"][i], special)


def tokenize(batch, tokenizer, sides, limits):
    """Tokenize a batch {column: list} of rows of `examples`. Dataset.map runs this function."""
    bos, eos = special_ids(tokenizer)
    special = templates.read_special_tokens(tokenizer)
    count = len(batch["id"])

    def text_of(i):
        return text_of_row(batch, i, tokenizer, sides, special)

    if any(batch["chat"]):
        texts = templates.texts_of_rows(text_of, count, batch["id"])
    else:
        texts = [text_of(i) for i in range(count)]
    texts = templates.refuse_unwritable(texts, tokenizer)

    # One call for the prompts and one for each side: a call encodes its texts in parallel.
    def encode(strings):
        return tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"]

    prompt_ids = encode([text.prompt for text in texts])
    whole_ids = []
    for k in range(len(sides)):
        whole_ids.append(encode([text.wholes[k] for text in texts]))

    # Token ids -> rows.
    rows = []
    for i, text in enumerate(texts):
        is_chat = batch["chat"][i]
        wholes = [side_ids[i] for side_ids in whole_ids]
        front, end_ids = bos, [eos] * len(sides)
        if is_chat:
            # A chat template writes its own BOS and ends its turns with its own special token.
            has_bos = wholes[0][:1] == [tokenizer.bos_token_id]
            front = wholes[0][:1] if has_bos else []
            end_ids = [[] if whole.endswith(special.texts) else eos for whole in text.wholes]
        row = tokenize_row(text, prompt_ids[i], wholes, front, end_ids, limits)
        repeats = all(answer.startswith(text.prompt) for answer in text.answers)
        row["repeats"] = repeats and not is_chat and bool(text.prompt.strip())
        row["prompt_key"] = hash_prompt(batch["prompt"][i])
        row |= {f"{side}_ids": answer for side, answer in zip(sides, row.pop("answer_ids"))}
        rows.append(row)

    # Scores must agree with the preference.
    columns = {"id": batch["id"]}
    columns |= {name: batch[name] for name in batch if name.endswith("_score")}
    if {"chosen_score", "rejected_score"} <= set(columns):
        scores = zip(columns["chosen_score"], columns["rejected_score"])
        for row, (chosen, rejected) in zip(rows, scores):
            if not row["problem"] and not chosen > rejected:
                row["problem"] = "chosen_score not above rejected_score"
    for name in rows[0]:
        columns[name] = [row[name] for row in rows]
    return columns


def hash_prompt(prompt):
    """Hash a prompt to a number in [0, 2**56)."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=7).digest(), "big")


def load_tokens(spec: str, tokenizer, sides: tuple, limits: Limits, strict=False, scored=False,
                columns=(), ignored=()) -> tuple[datasets.Dataset, dict]:
    """Load a --dataset. Returns the rows of token ids that can be trained on, and an account of all
    rows, which `describe` formats.

    The columns of a row: id, prompt_ids, {side}_ids (with the token that ends the answer),
    prompt_length, chosen_length, tokens (of the prompt and all answers), prompt_key (a hash of the
    prompt, 0 <= key < 2**56) and, if `scored`, {side}_score.

    strict      a row that would be dropped is an error
    columns     pairs (our name, the file's name)
    ignored     columns and message keys that are not read, even if they change a row's meaning
    """
    sources, parts = parse_sources(spec), []
    account = {"data": spec, "rows": 0, "dropped": {}, "noted": {}, "messages": False,
               "unread": {}, "not_read": {}}
    for source in sources:
        text = load_text(source, sides, scored, columns, ignored)
        count_unread(text, account["unread"])
        for reason, names in find_files(source)[1].items():
            account["not_read"].setdefault(reason, []).extend(names)
        rows = text.map(
            tokenize, batched=True, remove_columns=text.column_names, desc="tokenizing",
            new_fingerprint=cache_name(text, tokenizer, sides, limits),
            features=token_features(sides, scored),
            fn_kwargs={"tokenizer": tokenizer, "sides": sides, "limits": limits})
        account["messages"] = account["messages"] or bool(text[0]["chat"])
        usable = select_usable(rows, account, strict, limits.overlong)
        if len(usable) == 0:
            reasons = list_rows(account["dropped"])
            raise UserError(
                f"{source.name}: none of its {len(rows)} rows can be used ({reasons})")
        parts.append(usable)
    rows = datasets.concatenate_datasets(mix(parts, sources))
    account["kept"] = len(rows)
    account["left_out"] = sum(map(len, parts)) - len(rows)
    return rows.remove_columns(["problem", *NOTES]), account


def cache_name(text, tokenizer, sides, limits):
    """Return a cache name of the token ids, which changes with everything they depend on."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer
    return datasets.fingerprint.Hasher.hash([
        text._fingerprint, backend, tokenizer.chat_template, tokenizer.special_tokens_map, sides,
        limits, SOURCE, getattr(tokenizer, "split_special_tokens", False)])


# Columns that mark rows for the report, and the words of the report.
NOTES = {
    "prompt_truncated": "prompt truncated",
    "answers_truncated": "answers truncated",
    "repeats": "prompt repeated inside both answers",
    "merged": "tokens merged across the end of the prompt",
    **templates.TEXT_NOTES,
}


def token_features(sides, scored):
    """Return the types of the columns, which a first batch of empty prompts does not show."""
    ids = datasets.Sequence(datasets.Value("int64"))
    types = {
        "id": datasets.Value("string"),
        "problem": datasets.Value("string"),
        "prompt_ids": ids,
    }
    if scored:
        types |= {f"{side}_score": datasets.Value("float64") for side in sides}
    types |= {f"{side}_ids": ids for side in sides}
    types |= dict.fromkeys(NOTES, datasets.Value("bool"))
    numbers = ("prompt_length", "chosen_length", "tokens", "prompt_key")
    types |= dict.fromkeys(numbers, datasets.Value("int64"))
    return datasets.Features(types)


def select_usable(rows, account, strict, overlong):
    """Select the rows without a problem. The account counts the rows with a problem or a note."""
    problems = column(rows, "problem")
    for problem in sorted(set(problems) - {""}):
        count_rows(account["dropped"], str(problem), rows, problems == problem)
    for name, note in NOTES.items():
        count_rows(account["noted"], note, rows, column(rows, name) & (problems == ""))
    account["rows"] += len(rows)

    # The user may have asked for an error instead.
    fatal = account["dropped"]
    if not strict:
        fatal = {name: entry for name, entry in fatal.items()
                 if name == "too long" and overlong == "error"}
    if fatal:
        flag = "--strict to drop them" if strict else "--overlong error to truncate them"
        raise UserError(f"{list_rows(fatal)}. Fix these rows, or leave out {flag}")
    return rows.select(np.flatnonzero(problems == ""))


def count_rows(groups, name, rows, members):
    """Add the rows that the mask `members` marks to groups[name]: their number, and the names of
    the first three."""
    indices = np.flatnonzero(members)
    if len(indices) == 0:
        return
    entry = groups.setdefault(name, {"count": 0, "first": []})
    missing = 3 - len(entry["first"])
    entry["first"] += [rows[int(i)]["id"] for i in indices[:missing]]
    entry["count"] += len(indices)


def mix(parts, sources):
    """Take as many rows as possible such that each part has its share and no row occurs twice.
    Without shares, take all rows."""
    if sources[0].share is None:
        return parts
    total = min(len(part) / source.share for part, source in zip(parts, sources))
    mixed = []
    for part, source in zip(parts, sources):
        count = min(len(part), round(total * source.share))
        if count == 0:
            raise UserError(f"{source.name}: its share of the mixture is less than one row; "
                            "give it a larger share")
        order = np.random.default_rng(0).permutation(len(part))
        mixed.append(part.select(np.sort(order[:count])))
    return mixed


def column(rows: datasets.Dataset, name: str) -> np.ndarray:
    """Return a whole column of numbers or strings as an array."""
    return rows.select_columns([name]).with_format("numpy")[:][name]


def digest(rows: datasets.Dataset) -> str:
    """Hash these rows in this order, by their token ids and numbers, such as scores.

    The name of a row is left out, so that a data file may be moved. Every stored row is hashed by
    array operations and `rows` selects among the hashes, because to select the ids themselves is
    ten times slower.
    """
    names = [name for name, kind in rows.features.items()
             if getattr(kind, "dtype", None) != "string"]
    hashes = [np.zeros(0, np.uint64)]
    for batch in rows.data.table.select(sorted(names)).to_batches(max_chunksize=10_000):
        hashes.append(np.zeros(len(batch), np.uint64))
        for values in batch.columns:
            hashes[-1] = mix_bits(hashes[-1] + hash_column(values))
    hashes = np.concatenate(hashes)  # (stored rows,)
    if rows._indices is not None:
        hashes = hashes[rows._indices.column(0).to_numpy()]  # (rows,)
    return hashlib.blake2b(hashes.tobytes(), digest_size=12).hexdigest()


def hash_column(values: pyarrow.Array) -> np.ndarray:
    """Hash each number, or each list of ids with their positions -> (n,) uint64."""
    if not pyarrow.types.is_list(values.type):
        values = values.to_numpy(zero_copy_only=False)
        return mix_bits(values.astype(np.result_type(values, np.int64)).view(np.uint64))
    lengths = pyarrow.compute.list_value_length(values).to_numpy().astype(np.int64)
    ends = np.cumsum(lengths)
    ids = values.flatten().to_numpy().astype(np.uint64)
    positions = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    hashes = mix_bits((ids << np.uint64(32)) + positions.astype(np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes)])  # modulo 2^64
    return sums[ends] - sums[ends - lengths]


def mix_bits(values: np.ndarray) -> np.ndarray:
    """Map 64-bit numbers to 64-bit numbers without a pattern, one to one (SplitMix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def hold_out(rows: datasets.Dataset, share: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split off about `share` of the prompts. Returns (rest, held out).

    A hash of the prompt decides, so no prompt is on both sides, and a prompt is on the same side in
    every run.
    """
    is_held_out = column(rows, "prompt_key") < share * 2**56
    rest, held_out = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    return rows.select(rest), rows.select(held_out)


# --- The report -----------------------------------------------------------------------------------

def list_rows(groups):
    """Format {reason: {count, first}} as one sentence."""
    sentences = []
    for name, entry in groups.items():
        sentence = f"{name}: {', '.join(entry['first'])}"
        if entry["count"] > 3:
            sentence += f" and {entry['count'] - 3} more"
        sentences.append(sentence)
    return "; ".join(sentences)


def describe(account: dict) -> str:
    """Format the account of load_tokens: rows kept and dropped, and rows with a note."""
    line = f"{account['data']}: {account['kept']} of {account['rows']} rows kept"
    dropped = sum(entry["count"] for entry in account["dropped"].values())
    if dropped:
        line += f", {dropped} dropped ({list_rows(account['dropped'])})"
    if account["left_out"]:
        line += f", {account['left_out']} left out by the shares"
    lines = [line]
    for name, entry in account["noted"].items():
        lines.append(f"  {entry['count']} rows: {list_rows({name: entry})}")
    lines += describe_unread(account)
    return "\n".join(lines)


def describe_unread(account):
    """Format the files, columns and message keys that were not read."""
    lines = []
    for reason, names in account["not_read"].items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  not read, {reason}: {', '.join(names[:3])}{more}")
    names_by_count = {}
    for name, count in account["unread"].items():
        names_by_count.setdefault(count, []).append(name)
    if names_by_count:
        parts = [f"{', '.join(names)} ({count} rows)" for count, names in names_by_count.items()]
        lines.append(f"  columns and message keys not read: {'; '.join(parts)}")
    return lines


def statistics(rows: datasets.Dataset, held_out: datasets.Dataset | None = None) -> dict:
    """Compute the numbers of the report: lengths, repeated prompts and tokens of an epoch."""
    prompt = column(rows, "prompt_length")  # (N,), as all of these
    chosen = column(rows, "chosen_length")
    tokens = column(rows, "tokens")
    keys = column(rows, "prompt_key")
    lengths = {"prompt": prompt, "chosen": chosen}
    numbers, tokens_by_answer = {"lengths": {}}, tokens
    if "rejected_ids" in rows.column_names:
        rejected = tokens - prompt - chosen
        lengths["rejected"] = rejected
        numbers["chosen_longer"] = float((chosen > rejected).mean())
        numbers["rejected_longer"] = float((chosen < rejected).mean())
        tokens_by_answer = tokens + prompt
    for name, counts in lengths.items():
        numbers["lengths"][name] = {
            "mean": float(counts.mean()),
            "median": float(np.median(counts)),
            "95th": float(np.percentile(counts, 95)),
            "max": int(counts.max()),
        }
    numbers["rows_that_share_their_prompt"] = len(keys) - len(np.unique(keys))
    if held_out is not None and len(held_out):
        shared = np.intersect1d(keys, column(held_out, "prompt_key"))
        numbers["prompts_in_both"] = len(shared)
    numbers["tokens_per_epoch"] = int(tokens.sum())
    numbers["tokens_per_epoch_prompt_once_for_each_answer"] = int(tokens_by_answer.sum())
    return numbers


def describe_statistics(numbers: dict) -> str:
    """Format the numbers of `statistics` as the lines of the report."""
    lines = []
    for name, part in numbers["lengths"].items():
        lines.append(f"  {name:8} tokens: mean {part['mean']:.0f}, median {part['median']:.0f}, "
                     f"95th percentile {part['95th']:.0f}, max {part['max']}")
    if "chosen_longer" in numbers:
        lines.append(f"  chosen is the longer answer in {numbers['chosen_longer']:.0%} of the "
                     f"pairs, rejected in {numbers['rejected_longer']:.0%}")
    line = (f"  {numbers['rows_that_share_their_prompt']} rows have a prompt that an earlier row "
            "has too")
    if "prompts_in_both" in numbers:
        line += f"; {numbers['prompts_in_both']} prompts are both trained and held out"
    lines.append(line)
    by_answer = numbers["tokens_per_epoch_prompt_once_for_each_answer"]
    lines.append(f"  {numbers['tokens_per_epoch']:,} tokens an epoch, each prompt once; "
                 f"{by_answer:,} with the prompt before each answer")
    return "\n".join(lines)


def show(rows: datasets.Dataset, tokenizer, count=2, most: int | None = None) -> str:
    """Format the first rows as the model sees them: the prompt, then in brackets the scored tokens,
    separated by bars.

    most    the largest number of characters to show: the end of a prompt, the beginning and the end
            of an answer
    """
    lines = []
    for i in range(min(count, len(rows))):
        row = rows[i]
        prompt = tokenizer.decode(row["prompt_ids"])
        mark = ""
        if most and len(prompt) > most:
            prompt, mark = prompt[-most:], "… "
        lines += [row["id"], f"  prompt   {mark}{prompt!r}"]
        for side in ("chosen", "rejected"):
            if f"{side}_ids" not in row:
                continue
            tokens = [tokenizer.decode([token]) for token in row[f"{side}_ids"]]
            text = "|".join(repr(token)[1:-1] for token in tokens)
            if most and len(text) > most:
                text = f"{text[:most // 2]} … {text[-most // 2:]}"
            lines.append(f"  {side:8} [{text}]")
    return "\n".join(lines)


# --- Token ids -> batches -------------------------------------------------------------------------

def window(step: int, count: int, batch_size: int, seed: int, shuffle: bool) -> np.ndarray:
    """Return the indices of the rows of one optimizer step, over all ranks.

    The indices depend only on the arguments, so a run can stop and resume anywhere. An epoch has
    each of the `count` rows once; its last window has the remaining rows, however few.
    """
    epoch, number = divmod(step, math.ceil(count / batch_size))
    start = number * batch_size
    return epoch_order(count, seed, epoch, shuffle)[start:start + batch_size]


@functools.lru_cache(maxsize=1)
def epoch_order(count, seed, epoch, shuffle):
    """Return the order of the rows in an epoch."""
    if shuffle:
        return np.random.default_rng((seed, epoch)).permutation(count)
    return np.arange(count)


def micro_batches(indices: np.ndarray, size: int, rank: int, ranks: int,
                  tokens: np.ndarray | None = None) -> list[tuple[np.ndarray, float]]:
    """Split this rank's share of a window into micro-batches of at most `size` rows. Returns pairs
    (indices, weight).

    tokens      number of tokens of each row: then a micro-batch has at most `size` tokens

    All ranks get the same number of micro-batches, since every rank takes part in each forward of
    sharded weights. A rank with fewer rows gets micro-batches of one row and weight 0.
    """
    splits = []
    share_size = math.ceil(len(indices) / ranks)
    for share in np.array_split(indices, ranks):
        if tokens is None:
            splits.append(np.array_split(share, math.ceil(share_size / size)))
        else:
            splits.append(split_by_tokens(share, tokens[share], size))
    own = [(split, 1.0) for split in splits[rank] if len(split)]
    missing = max(map(len, splits)) - len(own)
    return own + [(indices[:1], 0.0)] * missing


def split_by_tokens(indices, tokens, most):
    """Split indices in their order into parts of at most `most` tokens. A longer row is a
    separate part."""
    parts, total = [], math.inf
    for index, count in zip(indices, tokens):
        if total + count > most:
            parts.append([])
            total = 0
        parts[-1].append(index)
        total += count
    return [np.array(part) for part in parts]


def pad_rows(rows: dict, pad_token_id: int) -> dict:
    """Make a batch for dpo.py from {column: list of lists}, both sides right-padded to the longest
    row of either side."""
    batch = ids_and_scores(rows)
    sides = [side for side in ("chosen", "rejected") if f"{side}_ids" in rows]
    width = 0
    for side in sides:
        for prompt, answer in zip(rows["prompt_ids"], rows[f"{side}_ids"]):
            width = max(width, len(prompt) + len(answer))
    for side in sides:
        input_ids, labels, mask = [], [], []
        for prompt, answer in zip(rows["prompt_ids"], rows[f"{side}_ids"]):
            input_ids.append(prompt + answer)
            labels.append([IGNORE] * len(prompt) + answer)
            mask.append([1] * (len(prompt) + len(answer)))
        batch[f"{side}_input_ids"] = pad_right(input_ids, width, pad_token_id)  # (B, T)
        batch[f"{side}_labels"] = pad_right(labels, width, IGNORE)  # (B, T)
        batch[f"{side}_attention_mask"] = pad_right(mask, width, 0)  # (B, T)
    return batch


def ids_and_scores(rows: dict) -> dict:
    """Make the part of a batch that is not tokens: id and, where the rows have them, scores and the
    reference's log-probs."""
    batch = {"id": rows["id"]}
    for name in ("chosen_score", "rejected_score", "ref_chosen_logp", "ref_rejected_logp"):
        if name in rows:
            batch[f"{name}s"] = torch.tensor(rows[name], dtype=torch.float64)  # (B,)
    return batch


def pad_right(rows, width, value):
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


# --- Flags, and `python data.py` ------------------------------------------------------------------

def at_least(low: float, kind: type) -> Callable:
    """Make the argparse type of a number that is at least `low`."""
    def number(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be >= {low}, got {text}")
        return value
    return number


def add_flags(add: Callable):
    """Add the flags that decide which tokens a row becomes."""
    add("--max_length", type=at_least(2, int), default=1024,
        help="tokens of prompt and answer together")
    add("--max_prompt_length", type=at_least(1, int),
        help="tokens of the prompt (default: all that the longer answer does not need, at least "
             "half of max_length)")
    add("--max_completion_length", type=at_least(1, int),
        help="tokens of an answer with its EOS (default: max_length)")
    add("--truncation_mode", choices=("keep_end", "keep_start"), default="keep_end",
        help="the end of a long prompt to keep")
    add("--overlong", choices=("cut", "drop", "error"), default="cut",
        help="truncate a row beyond these lengths, drop it, or stop with an error")
    add("--columns", help="names of the file's columns, such as prompt=instruction,chosen=output")
    add("--ignore_columns",
        help="columns, or keys of a message, to train without, although they may change what a "
             "row means: images,system")
    add("--chat_template", help="a file with a chat template (jinja) instead of the tokenizer's")
    add("--strict", action="store_true", help="a row that would be dropped is an error")


def split_list(text: str | None) -> list:
    """Split a flag's list of names at its commas, without the spaces around them."""
    names = [name.strip() for name in (text or "").split(",")]
    return [name for name in names if name]


def read_limits(args: argparse.Namespace) -> tuple[Limits, tuple, tuple]:
    """Check the flags of add_flags. Returns (limits, columns, ignored)."""
    if args.max_prompt_length and args.max_prompt_length >= args.max_length:
        raise UserError(f"--max_prompt_length {args.max_prompt_length}: leaves no tokens for an "
                        f"answer in --max_length {args.max_length}")
    if args.chat_template and not os.path.isfile(args.chat_template):
        raise UserError(f"--chat_template {args.chat_template}: no such file")
    limits = Limits(args.max_length, args.max_prompt_length, args.max_completion_length,
                    args.truncation_mode, args.overlong)
    return limits, read_columns(args.columns), tuple(split_list(args.ignore_columns))


def read_columns(text):
    """Read --columns. Returns pairs (our name, the file's name)."""
    ours = ("prompt", "chosen", "rejected", "chosen_score", "rejected_score", "id")
    pairs = []
    for part in split_list(text):
        name, _, theirs = [word.strip() for word in part.partition("=")]
        if name not in ours or not theirs:
            raise UserError(f"--columns {part}: write OURS=THEIRS, where OURS is one of "
                            f"{', '.join(ours)}{nearest(name, ours)}")
        pairs.append((name, theirs))
    if len(dict(pairs)) < len(pairs):
        raise UserError(f"--columns {text}: names a column twice")
    return tuple(pairs)


def read_template(path: str) -> str:
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--chat_template {path}: cannot be read ({error})") from error


def check_template(path: str | None, accounts: list[dict]):
    """Raise if no row uses the chat template."""
    if path and not any(account["messages"] for account in accounts):
        raise UserError(f"--chat_template {path}: no row holds messages, so it is not used")


def load_report_tokenizer(args):
    tokenizer = load_tokenizer(args.model)
    if args.chat_template:
        tokenizer.chat_template = read_template(args.chat_template)
    return tokenizer


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="the same as --dataset of train.py")
    parser.add_argument("--model", required=True, help="a folder or Hub id with the tokenizer")
    parser.add_argument("--eval_dataset",
                        help="held-out rows, to count the prompts in both data sets")
    parser.add_argument("--chosen_only", action="store_true",
                        help="read only the chosen answers, as --loss sft does")
    parser.add_argument("--scores", action="store_true",
                        help="read chosen_score and rejected_score too, as --loss odpo does")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)
    limits, columns, ignored = read_limits(args)
    tokenizer = load_report_tokenizer(args)

    # The data sets, as training would load them.
    sides = ("chosen",) if args.chosen_only else ("chosen", "rejected")
    specs = [args.dataset]
    if args.eval_dataset:
        specs.append(args.eval_dataset)
    rows, accounts = [], []
    for spec in specs:
        tokens, account = load_tokens(
            spec, tokenizer, sides, limits, args.strict, args.scores, columns, ignored)
        rows.append(tokens)
        accounts.append(account)
    check_template(args.chat_template, accounts)
    check_ignored(ignored, accounts)

    # The report.
    held_out = rows[1] if args.eval_dataset else None
    numbers = [statistics(rows[0], held_out), *map(statistics, rows[1:])]
    if args.json:
        reports = [account | part for account, part in zip(accounts, numbers)]
        print(json.dumps(reports, indent=2))
        return
    for account, part in zip(accounts, numbers):
        print(describe(account), describe_statistics(part), sep="\n")
    print("\nAs the model sees them, scored tokens in brackets:\n" + show(rows[0], tokenizer))


if __name__ == "__main__":
    run_script(main)
