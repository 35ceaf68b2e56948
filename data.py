"""Rows of text -> token ids -> batches, and an account of what was cut or dropped on the way.

A row becomes a prompt and its answers. Each answer is scored from its first token to its end-of-sequence token; the prompt and
the padding are never scored. What can go wrong in between is settled here once:

    boundary     prompt, prompt + chosen and prompt + rejected are tokenised whole, and the answers begin where the three stop
                 agreeing: a tokenizer that merges across the boundary cannot make the two answers see different prompts
    BOS          at most one, in front, if the tokenizer puts one there itself
    EOS          ends an answer that really ended; an answer that is cut loses it with the rest of its tail
    truncation   the oldest tokens of the prompt go first, the same for both answers; then the tails of the answers
    drops        rows that cannot teach anything (an empty answer, chosen equal to rejected) are counted and named
"""
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

IGNORE = -100  # label of a token that is not scored: torch's ignore_index, and dpo.IGNORE
SOURCE = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()  # caches made by other code are not ours


# ------------------------------------------------------------------------------------------------------------------------
# Files -> rows of text
# ------------------------------------------------------------------------------------------------------------------------

def json_rows(path):
    """JSON lines, numbered as the lines of the file, or one JSON list, numbered from 1."""
    with open(path, encoding="utf-8-sig") as file:
        if path.suffix == ".json" and file.read(1) == "[":
            file.seek(0)
            yield from enumerate(json.load(file), 1)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    reason = f"{error.msg}, column {error.colno}"
                    raise ValueError(f"{path}, row {number}: not a whole JSON object ({reason})") from None


def csv_rows(path):
    """Every value is text, as it stands in the file: no guessing that "NA" is missing or "42" a number."""
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 1):
            if None in row:
                raise ValueError(f"{path}, row {number}: more cells than the header names; text with commas must be quoted")
            yield number, row


def parquet_rows(path):
    batches = pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024)
    yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)


READERS = {".jsonl": json_rows, ".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}


def find_files(spec):
    """The files that a --dataset names, or [] where it names none and must be a data set of the hub."""
    path = pathlib.Path(spec)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in READERS)
        if not files:
            raise ValueError(f"{spec}: no {', '.join(READERS)} file in this folder")
        return files
    if path.is_file() and path.suffix not in READERS:
        raise ValueError(f"{spec}: not a kind of file that is read; those are {', '.join(READERS)}")
    if not path.exists() and (path.suffix in READERS or path.is_absolute() or spec.startswith(".")):
        raise ValueError(f"{spec}: no such file")
    return [path] if path.is_file() else []


def load_hub(spec):
    try:
        return datasets.load_dataset(spec, split="train")
    except Exception as error:  # the network and the hub fail in many ways; all mean the same to the user
        raise ValueError(f"{spec}: no such file, and not to be had from the hub ({str(error).splitlines()[0]})") from error


def read_rows(spec):
    """Yield (where, row): the row as a dict, and the name that errors, drops and logs call it by."""
    for source in find_files(spec) or [spec]:
        try:
            for number, row in enumerate(load_hub(spec), 1) if source == spec else READERS[source.suffix](source):
                yield f"{source}, row {number}", row
        except (UnicodeDecodeError, csv.Error, pyarrow.ArrowInvalid, json.JSONDecodeError) as error:
            raise ValueError(f"{source}: cannot be read as {source.suffix[1:]} ({error})") from error


# ------------------------------------------------------------------------------------------------------------------------
# Rows of text -> prompt, chosen, rejected
# ------------------------------------------------------------------------------------------------------------------------

TURN = "\n\nAssistant:"  # what comes before an answer in HH-RLHF and the sets made like it


def fields_of(row, where, sides):
    """The format of a file, read off its first row: which columns hold text that we need."""
    keys = set(row) if isinstance(row, dict) else set()
    for fields in (("prompt", *sides), ("chosen", "rejected")):
        if keys.issuperset(fields):
            return fields
    raise ValueError(f"{where}: needs the fields {', '.join(('prompt', *sides))}, or chosen and rejected with the prompt "
                     f"inside both; it has {', '.join(map(repr, sorted(keys))) or 'no fields at all'}")


def text_of(row, field, where):
    value = row.get(field) if isinstance(row, dict) else None
    if value is None:
        raise ValueError(f"{where}: the field '{field}' is missing")
    if not isinstance(value, str):
        raise ValueError(f"{where}: the field '{field}' holds {json.dumps(value, default=str)[:60]}, which is not text")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise ValueError(f"{where}: the field '{field}' holds half of a surrogate pair, which is not text")
    return value


def score_of(row, field, where):
    value = row.get(field) if isinstance(row, dict) else None
    try:
        if math.isfinite(float(value)):
            return float(value)
    except (TypeError, ValueError):
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


def text_pairs(spec, sides, scored=False, **key):
    """Yield {id, prompt, chosen, rejected} for every row, and {chosen,rejected}_score if `scored`. `key` is for the cache alone:
    what the file and the code were."""
    fields = None
    for where, row in read_rows(spec):
        fields = fields or fields_of(row, where, sides)
        text = {field: text_of(row, field, where) for field in fields}
        if "prompt" not in text:
            prompt = split_prompt(text["chosen"], text["rejected"])
            text = {"prompt": prompt, **{side: text[side][len(prompt):] for side in sides}}
        scores = {f"{side}_score": score_of(row, f"{side}_score", where) for side in sides} if scored else {}
        yield {"id": where, **text, **scores}


def load_text(spec, sides, scored=False):
    """A data set of what `text_pairs` yields, read once and kept by `datasets` until the file changes."""
    files = find_files(spec)
    stamps = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)  # no list: that would be shards
    if files and sum(size for _, size, _ in stamps) < 20e6:  # done before a bar could be read
        datasets.disable_progress_bars()
    else:
        datasets.enable_progress_bars()
    if next(text_pairs(spec, sides, scored), None) is None:
        raise ValueError(f"{spec}: there is no row in it")
    try:
        options = {"spec": spec, "sides": sides, "scored": scored, "code": SOURCE, "stamps": stamps or load_hub(spec)._fingerprint}
        return datasets.Dataset.from_generator(text_pairs, gen_kwargs=options)
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__ from None  # ours, with the file and the row in it


# ------------------------------------------------------------------------------------------------------------------------
# Text -> token ids
# ------------------------------------------------------------------------------------------------------------------------

class Limits(NamedTuple):
    """Most tokens of a whole row, of its prompt and of an answer with its EOS. A prompt limit of None leaves the prompt what
    the longer answer does not need, and half of max_length at least."""
    max_length: int = 1024
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_end"


def fit(prompt, answers, limits, front=0):
    """Cut token lists to the limits -> prompt, answers. The first `front` tokens of the prompt (BOS) always stay."""
    spare = limits.max_length - max(map(len, answers))
    room = limits.max_prompt_length or max(spare, limits.max_length // 2)
    if len(prompt) > room:
        keep_end = limits.truncation_mode == "keep_end"
        prompt = prompt[:front] + prompt[len(prompt) - room + front:] if keep_end else prompt[:room]
    space = min(limits.max_length - len(prompt), limits.max_completion_length or limits.max_length)
    return prompt, [answer[:space] for answer in answers]


def special_tokens(tokenizer):
    """([BOS] if the tokenizer begins a text with it, else []), [EOS]."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no EOS token, so the model could not learn to stop: set eos_token in its "
                         "tokenizer_config.json")
    begins = tokenizer("a")["input_ids"][:1]
    return begins if begins == [tokenizer.bos_token_id] else [], [tokenizer.eos_token_id]


def tokenize_row(texts, prompt, wholes, bos, eos, limits):
    """One row: its answers as text, the ids of its prompt, the ids of prompt + answer for each answer."""
    start = len(os.path.commonprefix([prompt, *wholes]))
    front = [] if wholes[0][:1] == bos else bos
    answers = [whole[start:] for whole in wholes]
    ended = [answer if answer[-1:] == eos else answer + eos for answer in answers]
    short_prompt, short = fit(front + wholes[0][:start], ended, limits, len(bos))
    problem = ""
    if any(not text.strip() for text in texts) or not all(answers):
        problem = "empty answer"
    elif not short_prompt:
        problem = "no prompt"
    elif len(texts) == 2 and texts[0] == texts[1]:
        problem = "chosen equals rejected"
    elif len(short) == 2 and short[0] == short[1]:
        problem = "chosen equals rejected once cut"
    return {"prompt_ids": short_prompt, "problem": problem, "prompt_cut": len(short_prompt) < len(front) + start,
            "answers_cut": sum(map(len, short)) < sum(map(len, ended)), "chosen_length": len(short[0]),
            "tokens": len(short_prompt) + sum(map(len, short))}, short


def tokenize(batch, tokenizer, sides, limits):
    """The function that Dataset.map runs over a batch of {column: list of strings}."""
    bos, eos = special_tokens(tokenizer)

    def encode(texts):
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    prompts = encode(batch["prompt"])
    wholes = [encode([p + a for p, a in zip(batch["prompt"], batch[side])]) for side in sides]  # one encode call per side
    rows = []
    for i, prompt in enumerate(prompts):
        row, answers = tokenize_row([batch[side][i] for side in sides], prompt, [w[i] for w in wholes], bos, eos, limits)
        key = int.from_bytes(hashlib.blake2b(batch["prompt"][i].encode(), digest_size=7).digest(), "big")
        rows.append({**row, **{f"{side}_ids": answer for side, answer in zip(sides, answers)}, "prompt_key": key})
    scores = {name: batch[name] for name in batch if name.endswith("_score")}
    for i, (better, worse) in enumerate(zip(*scores.values())):
        rows[i]["problem"] = rows[i]["problem"] or ("" if better > worse else "chosen_score not above rejected_score")
    return {"id": batch["id"], **scores, **{name: [row[name] for row in rows] for name in rows[0]}}


def load_tokens(spec, tokenizer, sides, limits, strict=False, scored=False):
    """A --dataset -> (rows of token ids fit to train on, a sentence that accounts for all the others).

    Columns: id, prompt_ids, {side}_ids (EOS included), prompt_key (a hash of the prompt, 0 <= key < 2**56) and, if `scored`,
    {side}_score. With strict, a row that would be dropped is an error.
    """
    text = load_text(spec, sides, scored)
    tokens = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer
    key = datasets.fingerprint.Hasher.hash([text._fingerprint, tokens, tokenizer.special_tokens_map, sides, limits, SOURCE])
    rows = text.map(tokenize, batched=True, remove_columns=text.column_names, new_fingerprint=key, desc="tokenising",
                    fn_kwargs={"tokenizer": tokenizer, "sides": sides, "limits": limits})
    problems = column(rows, "problem")
    dropped = {problem: np.flatnonzero(problems == problem) for problem in sorted(set(problems) - {""})}
    named = [f"{problem}: {name_rows(rows, found)}" for problem, found in dropped.items()]
    kept = rows.select(np.flatnonzero(problems == ""))
    if named and strict:
        raise ValueError("; ".join(named) + ". Mend these rows, or leave out --strict to drop them")
    if not len(kept):
        raise ValueError(f"{spec}: none of its {len(rows)} rows can be used ({'; '.join(named)})")
    account = f"{spec}: {len(kept)} of {len(rows)} rows kept"
    account += f", {len(rows) - len(kept)} dropped ({'; '.join(named)})" if named else ""
    for cut, what in (("prompt_cut", "prompts"), ("answers_cut", "rows' answers")):
        account += f", {column(kept, cut).sum()} {what} cut"
    return kept.remove_columns(["problem", "prompt_cut", "answers_cut"]), account


def column(rows, name):
    """A whole column of numbers or strings as an array."""
    return rows.select_columns([name]).with_format("numpy")[:][name]


def name_rows(rows, found, most=3):
    names = ", ".join(rows[int(i)]["id"] for i in found[:most])
    return names + (f" and {len(found) - most} more" if len(found) > most else "")


def hold_out(rows, share):
    """Split off about `share` of the prompts -> (rest, held out). By a hash of the prompt: no prompt is on both sides, and a
    prompt is on the same side in every run."""
    held = column(rows, "prompt_key") < share * 2**56
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


# ------------------------------------------------------------------------------------------------------------------------
# Token ids -> batches
# ------------------------------------------------------------------------------------------------------------------------

def window(step, count, batch_size, seed, shuffle):
    """Indices of the pairs of one optimizer step, over all ranks: a function of its arguments alone, so that a run can stop and
    go on anywhere. An epoch sees each of the `count` rows once; its last window is the rest, however short."""
    epoch, place = divmod(step, math.ceil(count / batch_size))
    return epoch_order(count, seed, epoch, shuffle)[place * batch_size:(place + 1) * batch_size]


@functools.lru_cache(maxsize=1)
def epoch_order(count, seed, epoch, shuffle):
    return np.random.default_rng((seed, epoch)).permutation(count) if shuffle else np.arange(count)


def micro_batches(window, size, rank, ranks):
    """This rank's share of a window in pieces of at most `size` pairs -> [(indices, weight)]. A rank left without a pair gets
    one of weight 0, since all ranks must take part in the step."""
    mine = np.array_split(window, ranks)[rank]
    return [(mine[i:i + size], 1.0) for i in range(0, len(mine), size)] or [(window[:1], 0.0)]


def collate(rows, pad_token_id):
    """{column: list of lists} -> a batch for dpo.py, both sides right-padded to the longest row of either."""
    batch, sides = {"id": rows["id"]}, [side for side in ("chosen", "rejected") if f"{side}_ids" in rows]
    width = max(len(p) + len(a) for side in sides for p, a in zip(rows["prompt_ids"], rows[f"{side}_ids"]))
    for side in sides:
        pairs = list(zip(rows["prompt_ids"], rows[f"{side}_ids"]))
        batch[f"{side}_input_ids"] = padded([p + a for p, a in pairs], width, pad_token_id)  # (B, T)
        batch[f"{side}_labels"] = padded([[IGNORE] * len(p) + a for p, a in pairs], width, IGNORE)  # (B, T)
        batch[f"{side}_attention_mask"] = padded([[1] * len(p + a) for p, a in pairs], width, 0)  # (B, T)
        if f"{side}_score" in rows:
            batch[f"{side}_scores"] = torch.tensor(rows[f"{side}_score"], dtype=torch.float64)  # (B,)
    return batch


def padded(rows, width, value):
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
