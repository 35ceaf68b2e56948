"""Rows of text -> token ids -> batches, and a report of what was cut or dropped on the way.

    python data.py FILE --model M          # what training with this tokenizer would see: counts, lengths, two rows as token ids

A row becomes a prompt and its answers. Each answer is scored from its first token to the token that ends it; the prompt and the
padding are never scored. What can go wrong in between is settled here once:

    boundary     prompt, prompt + chosen and prompt + rejected are tokenised whole, and the answers begin where the three stop
                 agreeing: a tokenizer that merges across the boundary cannot make the two answers see different prompts
    BOS          at most one, in front: where the tokenizer puts one before a text, or the chat template writes it
    EOS          ends an answer that really ended, unless its chat template ended it with another special token; an answer that
                 is cut loses it with the rest of its tail
    truncation   the oldest tokens of the prompt go first, the same for both answers; then the tails of the answers
    drops        rows that cannot teach anything (an empty answer, chosen equal to rejected) are counted and named
"""
import argparse
import csv
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import sys
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow.parquet
import torch
import transformers

IGNORE = -100  # label of a token that is not scored: torch's ignore_index, and dpo.IGNORE
SOURCE = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()  # caches made by other code are not ours


# --- Files -> rows ----------------------------------------------------------------------------------------------------

def json_rows(path):
    """JSON lines, numbered as the lines of the file, or one JSON list, numbered from 1."""
    with open(path, encoding="utf-8-sig") as file:
        if path.suffix.lower() == ".json" and file.read(4096).lstrip()[:1] == "[":
            file.seek(0)
            yield from enumerate(json.load(file), 1)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{path}, row {number}: not a whole JSON object ({error})") from None


def csv_rows(path):
    """Every value is text, as it stands in the file: no guessing that "NA" is missing or "42" a number."""
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)  # or an open quote would swallow all rows after it
        if len(set(reader.fieldnames or ())) < len(reader.fieldnames or ()):
            raise ValueError(f"{path}: its header names a column twice")
        for number, row in enumerate(reader, 1):
            if None in row:
                raise ValueError(f"{path}, row {number}: more cells than the header names; text with commas must be quoted")
            yield number, row


def parquet_rows(path):
    batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


READERS = {".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}


class Source(NamedTuple):
    """One part of a --dataset: a file, a folder of files, a folder of `save_to_disk`, or a data set of the hub."""
    name: str
    split: str | None = None
    share: float | None = None


def sources(spec):
    """`NAME[:SPLIT][:SHARE]`, or several with commas between; a path that exists is itself, whatever it looks like."""
    found = []
    for part in [spec] if os.path.exists(spec) else spec.split(","):
        name, *more = [part] if os.path.exists(part) else part.strip().split(":")
        share = more.pop() if more and re.fullmatch(r"\d*\.?\d+", more[-1]) else None
        if len(more) > 1 or not name or share is not None and not 0 < float(share) < math.inf:
            raise ValueError(f"{part}: a data set is NAME, NAME:SPLIT or NAME:SPLIT:SHARE, with a share above 0")
        found.append(Source(name, more[0] if more else None, None if share is None else float(share)))
    if len({source.share is None for source in found}) > 1:
        raise ValueError(f"{spec}: give every part a share, or none")
    return found


def find_files(source):
    """The files that a source names, or [] where it is a saved data set or one of the hub."""
    path = pathlib.Path(source.name)
    files = sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in READERS) if path.is_dir() else (
        [path] if path.is_file() else [])
    if is_saved(path):
        return []
    if path.is_dir() and not files:
        raise ValueError(f"{path}: no {', '.join(READERS)} file in this folder")
    if path.is_file() and path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: not a kind of file that is read; those are {', '.join(READERS)}")
    if not path.exists() and (path.suffix.lower() in READERS or path.is_absolute() or source.name.startswith(".")):
        raise ValueError(f"{path}: no such file")
    if files and source.split:
        raise ValueError(f"{source.name}:{source.split}: a file has no splits")
    return files


def is_saved(path):
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def load_set(source):
    """A folder of `save_to_disk`, or a data set of the hub."""
    split = source.split or "train"
    try:
        if not is_saved(pathlib.Path(source.name)):
            return datasets.load_dataset(source.name, split=split)
        saved = datasets.load_from_disk(source.name)
    except Exception as error:  # the network, the hub and old files fail in many ways; all mean the same to the user
        raise ValueError(f"{source.name}: no such file, and not to be had from the hub ({str(error).splitlines()[0]})") from error
    if isinstance(saved, datasets.DatasetDict) and split not in saved or isinstance(saved, datasets.Dataset) and source.split:
        splits = ", ".join(saved) if isinstance(saved, datasets.DatasetDict) else "none"
        raise ValueError(f"{source.name}: there is no split {split} in this folder; there are {splits}")
    return saved[split] if isinstance(saved, datasets.DatasetDict) else saved


def read_rows(source):
    """Yield (where, row): the row as a dict, and the name that errors, drops and logs call it by."""
    files = find_files(source)
    if not files:
        yield from ((f"{source.name}, row {number}", row) for number, row in enumerate(load_set(source), 1))
    for path in files:
        try:
            yield from ((f"{path}, row {number}", row) for number, row in READERS[path.suffix.lower()](path))
        except (UnicodeDecodeError, csv.Error, pyarrow.ArrowException, OSError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read as {path.suffix[1:]} ({error})") from error


# --- Rows -> prompt and answers, as text or as messages ---------------------------------------------------------------

TURN = "\n\nAssistant:"  # what comes before an answer in HH-RLHF and the sets made like it


def rename(row, columns, where):
    """--columns: our names for theirs."""
    missing = [theirs for theirs in columns.values() if not isinstance(row, dict) or theirs not in row]
    if missing:
        raise ValueError(f"{where}: --columns names {missing[0]!r}; the row has {', '.join(map(repr, row))}")
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return others | {ours: row[theirs] for ours, theirs in columns.items()}


def fields_of(row, where, sides):
    """Which columns we need of a file, read off its first row."""
    keys = set(row) if isinstance(row, dict) else set()
    for fields in (("prompt", *sides), sides, ("chosen", "rejected")):
        if keys.issuperset(fields) and (len(fields) > 1 or isinstance(row[fields[0]], list)):
            return fields
    raise ValueError(f"{where}: needs the fields {', '.join(('prompt', *sides))}, or chosen and rejected with the prompt "
                     f"inside both (--columns gives others these names); it has "
                     f"{', '.join(map(repr, sorted(keys))) or 'no fields at all'}")


def value_of(row, field, where):
    """A text, or a list of messages {"role": ..., "content": ...} with nothing else in them."""
    value = row.get(field) if isinstance(row, dict) else None
    if value is None:
        raise ValueError(f"{where}: the field '{field}' is missing")
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        for message in value:
            if unread := [key for key in ("tool_calls", "function_call", "reasoning_content", "thinking") if message.get(key)]:
                raise ValueError(f"{where}: the field '{field}' holds a message with {unread[0]}, which is not read; write it into the content")
            if not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise ValueError(f"{where}: the field '{field}' holds the message {json.dumps(message, default=str)[:80]}; "
                                 "a message has a role and a content, both text")
        value = [{"role": message["role"], "content": message["content"]} for message in value]
    elif not isinstance(value, str):
        raise ValueError(f"{where}: the field '{field}' holds {json.dumps(value, default=str)[:60]}, which is not text and no "
                         "list of messages")
    for text in [value] if isinstance(value, str) else [message[key] for message in value for key in message]:
        if not is_unicode(text):
            raise ValueError(f"{where}: the field '{field}' holds half of a surrogate pair, which is not text")
    return value


def is_unicode(text):
    return not any("\ud800" <= c <= "\udfff" for c in text)


def score_of(row, field, where):
    value = row.get(field) if isinstance(row, dict) else None
    try:
        if math.isfinite(float(value)):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{where}: the loss reads the field '{field}', a finite number, and the row has {json.dumps(value, default=str)[:60]}")


def split_prompt(chosen, rejected):
    """The prompt inside two dialogues: what they share, cut back so that neither answer loses its beginning. That is to the
    last turn of the assistant, or where turns are not marked, to before the last white space."""
    shared = os.path.commonprefix([chosen, rejected])
    if TURN in shared:
        return shared[:shared.rindex(TURN) + len(TURN)]
    space = re.search(r"\s\S*$", shared)
    return shared[:space.start()] if space else ""


def split_messages(dialogues):
    """The prompt inside dialogues that are lists of messages: what all share, cut back so that each goes on with a turn of the
    assistant."""
    length = min(map(len, dialogues))
    while length and (any(dialogue[:length] != dialogues[0][:length] for dialogue in dialogues) or
                      any(len(dialogue) == length or dialogue[length]["role"] != "assistant" for dialogue in dialogues)):
        length -= 1
    return dialogues[0][:length]


def split_row(prompt, answers, where):
    """Prompt (None: inside the answers) and answers of any of the formats -> prompt and answers, all text or all messages."""
    if all(isinstance(part, str) for part in (prompt or "", *answers)):
        if prompt is None and len(answers) == 1:
            raise ValueError(f"{where}: one text without a prompt: nobody knows where its answer begins")
        if prompt is None:
            prompt = split_prompt(*answers)
            answers = [answer[len(prompt):] for answer in answers]
        return prompt, answers
    if prompt is None and any(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{where}: one of chosen and rejected is a text, the other a list of messages; without a prompt, both must be lists")
    answers = [[{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer for answer in answers]
    if prompt is not None and all(answer[0]["role"] in ("assistant", "tool") for answer in answers):
        return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt, answers
    shared = prompt if isinstance(prompt, list) else split_messages(answers)  # whole dialogues, prompt and all
    if any(answer[:len(shared)] != shared for answer in answers) or (
            isinstance(prompt, str) and prompt.strip() not in [message["content"].strip() for message in shared]):
        raise ValueError(f"{where}: the answers begin neither with a turn of the assistant nor with the prompt")
    return shared, [answer[len(shared):] for answer in answers]


def examples(source, sides, scored=False, columns=(), **key):
    """Yield {id, chat, prompt, chosen, rejected} for every row, messages as JSON where `chat`, and {chosen,rejected}_score if
    `scored`. `key` is for the cache alone: what the file and the code were."""
    fields = chat = None
    for where, row in read_rows(Source(*source)):
        row = rename(row, dict(columns), where) if columns else row
        fields = fields or fields_of(row, where, sides)
        if "prompt" not in fields and isinstance(row, dict) and row.get("prompt") is not None:
            raise ValueError(f"{where}: has a prompt, and the first row of its file had none: which is meant?")
        values = {field: value_of(row, field, where) for field in fields}
        prompt, answers = split_row(values.get("prompt"), [values[field] for field in fields if field != "prompt"], where)
        if chat not in (None, not isinstance(prompt, str)):
            raise ValueError(f"{where}: some rows of this file are texts, others are messages")
        if unread := [name for name in ("system", "tools") if row.get(name)]:
            raise ValueError(f"{where}: the column '{unread[0]}' is not read; write it into the prompt, or take it out")
        chat = not isinstance(prompt, str)
        parts = [json.dumps(part) if chat else part for part in (prompt, *answers)]
        scores = {f"{side}_score": score_of(row, f"{side}_score", where) for side in sides} if scored else {}
        name = where + (f" (id {row['id']})" if row.get("id") is not None and is_unicode(str(row["id"])) else "")
        yield {"id": name, "chat": chat, **dict(zip(("prompt", *sides), parts)), **scores}


def load_text(source, sides, scored=False, columns=()):
    """A data set of what `examples` yields, read once and kept by `datasets` until the file changes."""
    files = find_files(source)
    stamps = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ctime_ns) for file in files)  # no list: that would be shards
    sizes = [path.stat().st_size for path in files or pathlib.Path(source.name).rglob("*")]  # of a hub's set unknown
    if sizes and sum(sizes) < 20e6:  # done before a bar could be read
        datasets.disable_progress_bars()
    else:
        datasets.enable_progress_bars()
    given = {"source": tuple(source), "sides": sides, "scored": scored, "columns": columns}
    if next(examples(**given), None) is None:
        raise ValueError(f"{source.name}: there is no row in it")
    try:
        return datasets.Dataset.from_generator(
            examples, gen_kwargs=given | {"code": SOURCE, "stamps": stamps or load_set(source)._fingerprint})
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ from None  # ours, with the file and the row in it


# --- Prompt and answers -> token ids ----------------------------------------------------------------------------------

class Limits(NamedTuple):
    """Most tokens of a whole row, of its prompt and of an answer with its EOS. A prompt limit of None leaves the prompt what
    the longer answer does not need, and half of max_length at least. `overlong`: cut such a row, drop it, or stop."""
    max_length: int = 1024
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_end"
    overlong: str = "cut"


def fit(prompt, answers, limits, front=0):
    """Cut token lists to the limits -> prompt, answers. The first `front` tokens of the prompt (BOS) always stay."""
    spare = limits.max_length - min(max(map(len, answers)), limits.max_completion_length or limits.max_length)
    room = limits.max_prompt_length or max(spare, limits.max_length // 2)
    if len(prompt) > room:
        keep_end = limits.truncation_mode == "keep_end"
        prompt = prompt[:front] + prompt[len(prompt) - room + front:] if keep_end else prompt[:room]
    space = min(limits.max_length - len(prompt), limits.max_completion_length or limits.max_length)
    return prompt, [answer[:space] for answer in answers]


def special_tokens(tokenizer):
    """What the tokenizer puts before a text (BOS, or nothing, or more than one token), and [EOS]."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so the model could not learn to stop: set eos_token in its "
                         "tokenizer_config.json")
    bare, dressed = (tokenizer("a", add_special_tokens=on)["input_ids"] for on in (False, True))
    front = next(i for i in range(len(dressed)) if dressed[i:i + len(bare)] == bare)
    return dressed[:front], [tokenizer.eos_token_id]


def render(prompt, answers, tokenizer, ends, where):
    """Messages -> the text of the prompt, that of each whole dialogue, and whether they agree, by the tokenizer's own chat template. Some
    templates write a prompt in another way once an answer follows it: then no answer belongs to the prompt that a user would send.
    The template's white space after the token that ends the last turn, one of `ends`, goes: a model that says it has stopped."""
    if tokenizer.chat_template is None:
        raise ValueError(f"{where}: the row holds messages, and the tokenizer has no chat template; pass one by --chat_template FILE")
    try:
        start, turns, *wholes = (
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate) if messages else ""
            for messages, generate in ((prompt, True), (prompt, False), *((prompt + answer, False) for answer in answers)))
    except Exception as error:  # a template is a foreign program, and its errors are of any kind
        raise ValueError(f"{where}: the chat template fails on this row: {error}") from error
    wholes = [whole.rstrip() if whole.rstrip().endswith(ends) else whole for whole in wholes]
    return start, wholes, all(whole.startswith(turns.rstrip()) for whole in wholes)


def tokenize_row(texts, prompt, wholes, bos, eos, limits):
    """One row: its answers as text, the ids of its prompt, the ids of prompt + answer for each answer, and what to put before and
    after: [BOS] or [], and for each answer [EOS] or []."""
    start = len(os.path.commonprefix([prompt, *wholes]))
    front = [] if wholes[0][:len(bos)] == bos else bos
    answers = [whole[start:] for whole in wholes]
    ended = [answer if answer[-1:] == end else answer + end for answer, end in zip(answers, eos)]
    short_prompt, short = fit(front + wholes[0][:start], ended, limits, len(bos))
    prompt_cut, answers_cut = len(short_prompt) < len(front) + start, sum(map(len, short)) < sum(map(len, ended))
    problem = ""
    if any(not text.strip() for text in texts) or not all(answers):
        problem = "empty answer"
    elif not short_prompt:
        problem = "no prompt"
    elif len(texts) == 2 and texts[0] == texts[1]:
        problem = "chosen equals rejected"
    elif limits.overlong != "cut" and (prompt_cut or answers_cut):
        problem = "too long"
    elif len(short) == 2 and short[0] == short[1]:
        problem = "chosen equals rejected once cut" if answers_cut else "chosen and rejected are the same tokens"
    return {"prompt_ids": short_prompt, "problem": problem, "prompt_cut": prompt_cut, "answers_cut": answers_cut,
            "merged": start < len(prompt), "prompt_length": len(short_prompt), "chosen_length": len(short[0]),
            "tokens": len(short_prompt) + sum(map(len, short))}, short


def tokenize(batch, tokenizer, sides, limits):
    """The function that Dataset.map runs over a batch of {column: list}."""
    (bos, eos), rows = special_tokens(tokenizer), []
    ends = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)  # EOS, ends of turns
    texts = [[batch[side][i] for side in sides] for i in range(len(batch["id"]))]  # of the answers, for each row
    texts = [[text.rstrip() if text.rstrip().endswith(tokenizer.eos_token) else text for text in row] for row in texts]
    prompts, wholes = list(batch["prompt"]), [[batch["prompt"][i] + text for text in row] for i, row in enumerate(texts)]
    problems = [""] * len(texts)
    for i in np.flatnonzero(batch["chat"]):
        prompt, answers = json.loads(batch["prompt"][i]), [json.loads(text) for text in texts[i]]
        texts[i] = ["".join(message["content"] for message in answer) for answer in answers]
        prompts[i], wholes[i], agree = render(prompt, answers, tokenizer, ends, batch["id"][i])
        if prompt and any(message["role"] in ("user", "system") for answer in answers for message in answer):
            problems[i] = "turns of the user inside an answer"
        elif prompt and not agree:
            problems[i] = "the chat template writes the prompt otherwise when an answer follows"

    def encode(texts):
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    prompt_ids, whole_ids = encode(prompts), [encode(list(side)) for side in zip(*wholes)]  # one call per side: it runs in parallel
    for i, chat in enumerate(batch["chat"]):
        ids = [side[i] for side in whole_ids]
        front = bos if not chat else ids[0][:1] if ids[0][:1] == [tokenizer.bos_token_id] else []  # a template writes its own
        end = [[] if chat and whole.endswith(ends) else eos for whole in wholes[i]]
        row, answers = tokenize_row(texts[i], prompt_ids[i], ids, front, end, limits)
        row["problem"] = problems[i] or row["problem"]
        row["repeats"] = bool(prompts[i].strip()) and not chat and all(text.startswith(prompts[i]) for text in texts[i])
        row["prompt_key"] = int.from_bytes(hashlib.blake2b(batch["prompt"][i].encode(), digest_size=7).digest(), "big")
        rows.append(row | {f"{side}_ids": answer for side, answer in zip(sides, answers)})
    scores = {name: batch[name] for name in batch if name.endswith("_score")}
    for row, (better, worse) in zip(rows, zip(*scores.values())):
        row["problem"] = row["problem"] or ("" if better > worse else "chosen_score not above rejected_score")
    return {"id": batch["id"], **scores, **{name: [row[name] for row in rows] for name in rows[0]}}


def load_tokens(spec, tokenizer, sides, limits, strict=False, scored=False, columns=()):
    """A --dataset -> (rows of token ids fit to train on, an account of all rows that `describe` puts into words).

    Columns of a row: id, prompt_ids, {side}_ids (what ends it included), prompt_length, chosen_length, tokens (of the prompt and all
    answers), prompt_key (a hash of the prompt, 0 <= key < 2**56) and, if `scored`, {side}_score. `columns` are pairs (our name, the
    file's name). With strict, a row that would be dropped is an error, and so is a long one with limits.overlong "error".
    """
    parts, named, account = [], sources(spec), {"data": spec, "rows": 0, "dropped": {}, "noted": {}}
    template, backend = tokenizer.chat_template, tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer
    for source in named:
        text = load_text(source, sides, scored, columns)
        key = datasets.fingerprint.Hasher.hash([text._fingerprint, backend, template, tokenizer.special_tokens_map, sides, limits, SOURCE,
                                                getattr(tokenizer, "split_special_tokens", False)])
        rows = text.map(tokenize, batched=True, remove_columns=text.column_names, new_fingerprint=key, desc="tokenising",
                        features=features(sides, scored), fn_kwargs={"tokenizer": tokenizer, "sides": sides, "limits": limits})
        account["messages"] = account.get("messages", False) or bool(text[0]["chat"])
        parts.append(keep(rows, account, strict, limits.overlong))
        if not len(parts[-1]):
            raise ValueError(f"{source.name}: none of its {len(rows)} rows can be used ({name_rows(account['dropped'])})")
    rows = datasets.concatenate_datasets(mixture(parts, named))
    account["kept"], account["left_out"] = len(rows), sum(map(len, parts)) - len(rows)
    return rows.remove_columns(["problem", "prompt_cut", "answers_cut", "merged", "repeats"]), account


def features(sides, scored):
    """The types of the columns: nothing can be inferred of a thousand empty prompts."""
    ids, whole, yes = datasets.Sequence(datasets.Value("int64")), datasets.Value("int64"), datasets.Value("bool")
    return datasets.Features(
        {"id": datasets.Value("string"), "problem": datasets.Value("string"), "prompt_ids": ids}
        | {f"{side}_score": datasets.Value("float64") for side in sides if scored} | {f"{side}_ids": ids for side in sides}
        | dict.fromkeys(("prompt_cut", "answers_cut", "merged", "repeats"), yes)
        | dict.fromkeys(("prompt_length", "chosen_length", "tokens", "prompt_key"), whole))


def keep(rows, account, strict, overlong):
    """The rows without a problem. Those with one, and those of which one should know, go into the account."""
    problems = column(rows, "problem")
    groups = {("dropped", str(problem)): problems == problem for problem in sorted(set(problems) - {""})}
    for name, note in (("prompt_cut", "prompt cut"), ("answers_cut", "answers cut"), ("repeats", "prompt repeated inside both answers"),
                       ("merged", "tokens merged across the end of the prompt")):
        groups["noted", note] = column(rows, name) & (problems == "")
    for (kind, name), members in groups.items():
        if members.any():
            entry, found = account[kind].setdefault(name, {"count": 0, "first": []}), np.flatnonzero(members)
            entry["first"] += [rows[int(i)]["id"] for i in found[:3 - len(entry["first"])]]
            entry["count"] += len(found)
    account["rows"] += len(rows)
    fatal = {name: entry for name, entry in account["dropped"].items() if strict or name == "too long" and overlong == "error"}
    if fatal:
        raise ValueError(f"{name_rows(fatal)}. Mend these rows, or leave out " +
                         ("--strict to drop them" if strict else "--overlong error to cut them"))
    return rows.select(np.flatnonzero(problems == ""))


def mixture(parts, sources):
    """As many rows as there can be when each part has its share of them and no row comes twice. Without shares: all."""
    if sources[0].share is None:
        return parts
    total = min(len(part) / source.share for part, source in zip(parts, sources))
    takes = [min(len(part), round(total * source.share)) for part, source in zip(parts, sources)]
    if 0 in takes:
        raise ValueError(f"{sources[takes.index(0)].name}: its share of the mixture is less than one row")
    return [part.select(np.sort(np.random.default_rng(0).permutation(len(part))[:take])) for part, take in zip(parts, takes)]


def column(rows, name):
    """A whole column of numbers or strings as an array."""
    return rows.select_columns([name]).with_format("numpy")[:][name]


def digest(rows):
    """A short name of these rows in this order, by their prompts and lengths."""
    return hashlib.blake2b(b"".join(column(rows, name).tobytes() for name in ("prompt_key", "tokens", "chosen_length")), digest_size=12).hexdigest()


def hold_out(rows, share):
    """Split off about `share` of the prompts -> (rest, held out). By a hash of the prompt: no prompt is on both sides, and a
    prompt is on the same side in every run."""
    held = column(rows, "prompt_key") < share * 2**56
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


# --- The report -------------------------------------------------------------------------------------------------------

def name_rows(groups):
    """{reason: {count, first}} -> a sentence."""
    return "; ".join(f"{name}: {', '.join(entry['first'])}" + (f" and {entry['count'] - 3} more" if entry["count"] > 3 else "")
                     for name, entry in groups.items())


def describe(account):
    dropped = sum(entry["count"] for entry in account["dropped"].values())
    lines = [f"{account['data']}: {account['kept']} of {account['rows']} rows kept"
             + (f", {dropped} dropped ({name_rows(account['dropped'])})" if dropped else "")
             + (f", {account['left_out']} left out by the shares" if account["left_out"] else "")]
    lines += [f"  {entry['count']} rows: {name_rows({name: entry})}" for name, entry in account["noted"].items()]
    return "\n".join(lines)


def statistics(rows, held_out=None):
    """What should be known of token ids before training on them."""
    prompt, chosen, tokens, keys = (column(rows, name) for name in ("prompt_length", "chosen_length", "tokens", "prompt_key"))
    parts = {"prompt": prompt, "chosen": chosen}
    pairs = "rejected_ids" in rows.column_names
    if pairs:
        parts["rejected"] = tokens - prompt - chosen
    found = {"lengths": {name: {"mean": float(part.mean()), "median": float(np.median(part)), "95th":
             float(np.percentile(part, 95)), "max": int(part.max())} for name, part in parts.items()}}
    if pairs:
        found["chosen_longer"] = float((chosen > parts["rejected"]).mean())
        found["rejected_longer"] = float((chosen < parts["rejected"]).mean())
    found["rows_that_share_their_prompt"] = len(keys) - len(np.unique(keys))
    if held_out is not None and len(held_out):
        found["prompts_in_both"] = len(np.intersect1d(keys, column(held_out, "prompt_key")))
    found["tokens_per_epoch"] = int(tokens.sum())
    found["tokens_per_epoch_prompt_once_for_each_answer"] = int((tokens + prompt).sum() if pairs else tokens.sum())
    return found


def describe_statistics(found):
    lines = [f"  {name:8} tokens: mean {part['mean']:.0f}, median {part['median']:.0f}, 95th percentile {part['95th']:.0f}, max {part['max']}"
             for name, part in found["lengths"].items()]
    if "chosen_longer" in found:
        lines.append(f"  chosen is the longer answer in {found['chosen_longer']:.0%} of the pairs, rejected in {found['rejected_longer']:.0%}")
    lines.append(f"  {found['rows_that_share_their_prompt']} rows have a prompt that an earlier row has too" + (
        f"; {found['prompts_in_both']} prompts are both trained and held out" if "prompts_in_both" in found else ""))
    lines.append(f"  {found['tokens_per_epoch']:,} tokens an epoch, each prompt once; "
                 f"{found['tokens_per_epoch_prompt_once_for_each_answer']:,} with the prompt before each answer")
    return "\n".join(lines)


def show(rows, tokenizer, count=2, most=None):
    """The first rows as the model sees them: the prompt, then in brackets the scored tokens, parted by bars. `most`: characters of a
    part that are shown, its end of a prompt, its beginning and end of an answer."""
    lines = []
    for row in (rows[i] for i in range(min(count, len(rows)))):
        prompt = tokenizer.decode(row["prompt_ids"])
        lines += [row["id"], "  prompt   " + ("… " if most and len(prompt) > most else "") + repr(prompt[-most:] if most else prompt)]
        for side in (side for side in ("chosen", "rejected") if f"{side}_ids" in row):
            text = "|".join(repr(tokenizer.decode([token]))[1:-1] for token in row[f"{side}_ids"])
            short = f"{text[:most // 2]} … {text[-most // 2:]}" if most and len(text) > most else text
            lines.append(f"  {side:8} [{short}]")
    return "\n".join(lines)


# --- Token ids -> batches ---------------------------------------------------------------------------------------------

def window(step, count, batch_size, seed, shuffle):
    """Indices of the pairs of one optimizer step, over all ranks: a function of its arguments alone, so that a run can stop and
    go on anywhere. An epoch sees each of the `count` rows once; its last window is the rest, however short."""
    epoch, place = divmod(step, math.ceil(count / batch_size))
    return epoch_order(count, seed, epoch, shuffle)[place * batch_size:(place + 1) * batch_size]


@functools.lru_cache(maxsize=1)
def epoch_order(count, seed, epoch, shuffle):
    return np.random.default_rng((seed, epoch)).permutation(count) if shuffle else np.arange(count)


def micro_batches(window, size, rank, ranks, tokens=None):
    """This rank's share of a window in pieces of at most `size` pairs, or of `size` tokens if those of each entry are given -> [(indices,
    weight)]. All ranks get as many pieces, since a forward of sharded weights needs them all; where pairs are lacking, a piece is one pair
    of weight 0."""
    shares = np.array_split(window, ranks)
    if tokens is None:
        cut = [np.array_split(share, math.ceil(len(shares[0]) / size)) for share in shares]
    else:
        cut = [fill(share, tokens[share], size) for share in shares]
    pieces = [piece for piece in cut[rank] if len(piece)]
    return [(piece, 1.0) for piece in pieces] + [(window[:1], 0.0)] * (max(map(len, cut)) - len(pieces))


def fill(indices, tokens, most):
    """Indices in pieces of at most so many tokens, in their order. A longer row is a piece of its own."""
    pieces, held = [], math.inf
    for index, count in zip(indices, tokens):
        if held + count > most:
            pieces.append([])
            held = 0
        pieces[-1].append(index)
        held += count
    return [np.array(piece) for piece in pieces]


def collate(rows, pad_token_id):
    """{column: list of lists} -> a batch for dpo.py, both sides right-padded to the longest row of either."""
    batch, sides = known(rows), [side for side in ("chosen", "rejected") if f"{side}_ids" in rows]
    width = max(len(p) + len(a) for side in sides for p, a in zip(rows["prompt_ids"], rows[f"{side}_ids"]))
    for side in sides:
        pairs = list(zip(rows["prompt_ids"], rows[f"{side}_ids"]))
        batch[f"{side}_input_ids"] = padded([p + a for p, a in pairs], width, pad_token_id)  # (B, T)
        batch[f"{side}_labels"] = padded([[IGNORE] * len(p) + a for p, a in pairs], width, IGNORE)  # (B, T)
        batch[f"{side}_attention_mask"] = padded([[1] * len(p + a) for p, a in pairs], width, 0)  # (B, T)
    return batch


def known(rows):
    """What a batch has besides tokens: id, and where there are such columns scores and the reference's log-probs."""
    columns = {f"{side}_score": f"{side}_scores" for side in ("chosen", "rejected")} | {
        f"ref_{side}_logp": f"ref_{side}_logps" for side in ("chosen", "rejected")}
    return {"id": rows["id"]} | {name: torch.tensor(rows[column], dtype=torch.float64)  # (B,)
                                 for column, name in columns.items() if column in rows}


def padded(rows, width, value):
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


# --- python data.py ---------------------------------------------------------------------------------------------------

def at_least(low, kind):
    """The type of a flag that is a number."""
    def number(text):
        value = kind(text)
        if not low <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be >= {low}, got {text}")
        return value
    return number


def add_flags(add):
    """The flags that say which tokens a row becomes."""
    add("--max_length", type=at_least(2, int), default=1024, help="tokens of prompt and answer together")
    add("--max_prompt_length", type=at_least(1, int), help="default: what the answers leave, half of max_length at least")
    add("--max_completion_length", type=at_least(1, int), help="tokens of an answer with its EOS (default: no own limit)")
    add("--truncation_mode", choices=("keep_end", "keep_start"), default="keep_end", help="which end of a long prompt stays")
    add("--overlong", choices=("cut", "drop", "error"), default="cut", help="what becomes of a row beyond these lengths")
    add("--columns", help="names of the file's columns, such as prompt=instruction,chosen=output")
    add("--chat_template", help="a file with a chat template (jinja) in place of the tokenizer's own")
    add("--strict", action="store_true", help="a row that would be dropped is an error")


def read_flags(args):
    """-> limits, columns."""
    if args.max_prompt_length and args.max_prompt_length >= args.max_length:
        raise ValueError(f"--max_prompt_length {args.max_prompt_length}: leaves an answer no room in --max_length {args.max_length}")
    if args.chat_template and not os.path.isfile(args.chat_template):
        raise ValueError(f"--chat_template {args.chat_template}: no such file")
    columns = tuple(tuple(pair.split("=", 1)) for pair in args.columns.split(",")) if args.columns else ()
    ours = ("prompt", "chosen", "rejected", "chosen_score", "rejected_score", "id")
    if len({pair[0] for pair in columns}) < len(columns):
        raise ValueError(f"--columns {args.columns}: names a column twice")
    if wrong := [pair for pair in columns if len(pair) < 2 or pair[0] not in ours or not pair[1]]:
        raise ValueError(f"--columns {'='.join(wrong[0])}: write OURS=THEIRS, where OURS is one of {', '.join(ours)}")
    limits = Limits(args.max_length, args.max_prompt_length, args.max_completion_length, args.truncation_mode, args.overlong)
    return limits, columns


def read_template(path):
    try:
        return pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--chat_template {path}: cannot be read ({error})") from error


def check_template(path, accounts):
    if path and not any(account["messages"] for account in accounts):
        raise ValueError(f"--chat_template {path}: no row holds messages, so it is not read")


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="what train.py takes as --dataset")
    parser.add_argument("--model", required=True, help="a folder or hub id with the tokenizer")
    parser.add_argument("--eval_dataset", help="held-out rows, to count the prompts that both have")
    parser.add_argument("--chosen_only", action="store_true", help="as --loss sft reads it")
    parser.add_argument("--scores", action="store_true", help="as --loss odpo reads it, with chosen_score and rejected_score")
    parser.add_argument("--json", action="store_true", help="the report as one JSON object")
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)
    limits, columns = read_flags(args)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {args.model}: no tokenizer there ({str(error).splitlines()[0]})") from error
    if args.chat_template:
        tokenizer.chat_template = read_template(args.chat_template)
    sides = ("chosen",) if args.chosen_only else ("chosen", "rejected")
    specs = [args.dataset] + ([args.eval_dataset] if args.eval_dataset else [])
    loaded = [load_tokens(spec, tokenizer, sides, limits, args.strict, args.scores, columns) for spec in specs]
    check_template(args.chat_template, [account for _, account in loaded])
    found = [statistics(rows, loaded[1][0] if i == 0 and len(loaded) > 1 else None) for i, (rows, _) in enumerate(loaded)]
    if args.json:
        print(json.dumps([account | numbers for (_, account), numbers in zip(loaded, found)], indent=2))
    else:
        print("\n".join(f"{describe(account)}\n{describe_statistics(numbers)}" for (_, account), numbers in zip(loaded, found)))
        print("\nAs the model sees them, scored tokens in brackets:\n" + show(loaded[0][0], tokenizer))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
