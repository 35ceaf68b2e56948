"""Turns rows of text into token ids and batches, and reports the rows it truncated or dropped.

    python data.py FILE --model M      # counts, lengths and two rows, as training would see them

A row becomes a prompt and its K answers: two of a pair, the chosen one first; K of a ranking, best
first; one with a label. The scored tokens of an answer run from its first token to the token that
ends it; the prompt and the padding are never scored, nor are the turns of a tool or user inside an
answer. With one token per word:

    {"prompt": "a cat", "chosen": " sat", "rejected": " ran"}
    prompt_ids    a cat
    answer_ids    sat <eos>, ran <eos>

These rules hold for every row:

    boundary     the prompt, and the prompt with each answer, are tokenized whole. The answers begin
                 at the first token where these texts differ, so all answers have the same prompt
                 even if the tokenizer merges characters across the boundary.
    BOS          begins a row at most once: if the tokenizer adds one to a text, or if the chat
                 template writes one.
    EOS          ends an answer unless the chat template ended it with another special token. A
                 truncated answer loses its EOS with the rest of its tail.
    truncation   removes the oldest tokens of the prompt first, the same for both answers, then the
                 tails of the answers. shorten.py removes most of a very long text before.
    messages     the chat template writes them; templates.py checks that no text is lost.
    families     an encoder-decoder reads the prompt, with all that its tokenizer puts around a
                 text, in its encoder, and writes the answer: each is tokenized and truncated alone.
    drops        rows without a training signal (an empty answer, chosen equal to rejected) are
                 dropped, counted and named in the report.

Files -> rows (sources.py) -> prompt and answers (layouts.py, unread.py) -> text (templates.py) ->
token ids -> batches: the last two are the sections below, in this order.
"""
from errors import (  # first, see errors.py
    Parser,
    UserError,
    any_name,
    nearest,
    printable,
    reading,
    run_script,
)
import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
import torch

import conversations
import fields
import formats
import images
import layouts
import loading
import selection
import shorten
import sources
import templates
import unread
import vision
import written
from layouts import LAYOUTS, Shape, examples, find_layout, known_names
from loading import (
    has_processor,
    load_family,
    load_processor,
    load_tokenizer,
    text_with_tokens,
)
from ranges import whole_number
from registry import Needs, needs_of
from shorten import shorten_texts
from sources import (
    check_whole,
    evaluation_sets,
    find_files,
    list_empty,
    open_dataset,
    parse_sources,
)
from unread import check_ignored, count_unread

# The label of a token that is not scored.
IGNORE = torch.nn.CrossEntropyLoss().ignore_index
# A part of every cache key: token ids that other code made are not reused.
CODE = [pathlib.Path(__file__)]
CODE += [pathlib.Path(file.__file__) for file in (
    conversations, fields, formats, images, layouts, loading, selection, shorten, sources,
    templates, unread, vision, written)]
SOURCE = hashlib.sha256(b"".join(path.read_bytes() for path in CODE)).hexdigest()


# --- Rows of text, cached -------------------------------------------------------------------------

def load_text(source, needs, shape):
    """Load the rows of `examples` as a data set, which `datasets` caches until a file changes."""
    files, _ = find_files(source)
    show_progress(source, files)
    arguments = {"source": tuple(source), "needs": tuple(needs), "shape": tuple(shape)}
    if next(examples(**arguments), None) is None:
        raise UserError(f"{source.name}: there is no row in it")
    # The state of the data is part of the cache key. A tuple: `datasets` splits lists into shards.
    state = tuple(file_state(file) for file in files)
    if not state:
        state = open_dataset(source)._fingerprint
    cache_key = {"code": SOURCE, "stamps": state}
    with reading_cache(Exception):
        rows = datasets.Dataset.from_generator(
            examples, layouts.example_features(), gen_kwargs=arguments | cache_key)
    check_whole(rows)
    return rows


# What `datasets` raises about its files. Our functions that it calls open none themselves.
CACHE_ERRORS = (OSError, pyarrow.ArrowException, json.JSONDecodeError)


@contextlib.contextmanager
def reading_cache(kinds):
    """Turn the exceptions of these kinds that `datasets` raises about its own files into one line.

    An exception of `examples` is raised as it is: a UserError names the file and the row.
    """
    what = f"the cache of `datasets` in {datasets.config.HF_DATASETS_CACHE} cannot be used"
    advice = "; delete this folder, or set HF_DATASETS_CACHE to another with free space"
    try:
        yield
    except datasets.exceptions.DatasetGenerationError as error:
        if not isinstance(error.__cause__, CACHE_ERRORS):
            raise error.__cause__ from None
        with reading(what, advice):
            raise error.__cause__ from error
    except kinds:
        with reading(what, advice):
            raise


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
    family              of the model, see families.py. The prompt of an encoder-decoder and each of
                        its answers have max_length tokens of their own
    """
    max_length: int = 1024
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_end"
    overlong: str = "cut"
    family: str = "decoder"


def truncate(prompt: list, answers: list, limits: Limits, front=0, back=0, target=0):
    """Truncate token lists to the limits. Returns (prompt, answers).

    The first `front` tokens of the prompt (BOS) always stay, and for an encoder the last `back`.
    The answers of an encoder-decoder follow `target` tokens of their own, and not the prompt.
    """
    apart = limits.family == "encoder_decoder"
    answer_limit = limits.max_completion_length or limits.max_length
    prompt_limit = limits.max_prompt_length
    if prompt_limit is None and apart:
        prompt_limit = limits.max_length
    elif prompt_limit is None:
        longest = min(max(map(len, answers)), answer_limit)
        prompt_limit = max(limits.max_length - longest, limits.max_length // 2)
    # Truncate the prompt first.
    if len(prompt) > prompt_limit:
        if limits.truncation_mode == "keep_end":
            surplus = len(prompt) - prompt_limit
            prompt = prompt[:front] + prompt[front + surplus:]
        else:
            prompt = prompt[:prompt_limit - back] + prompt[len(prompt) - back:]
    # Then truncate the answers.
    before = target if apart else len(prompt)
    answer_limit = min(limits.max_length - before, answer_limit)
    return prompt, [answer[:answer_limit] for answer in answers]


def special_ids(tokenizer):
    """Return the ids that the tokenizer puts before a text (BOS, none, or several), and [EOS]."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no EOS token, so the model could not learn to stop: "
                        "set eos_token in its tokenizer_config.json")
    return ids_around(tokenizer, "text")[0], [tokenizer.eos_token_id]


def ids_around(tokenizer, argument):
    """Return the ids that the tokenizer puts before and behind a text, given as this argument:
    "text" that a model reads, or "text_target" that an encoder-decoder writes."""
    text = text_with_tokens(tokenizer)
    plain = tokenizer(**{argument: text}, add_special_tokens=False)["input_ids"]
    with_special = tokenizer(**{argument: text}, add_special_tokens=True)["input_ids"]
    starts = range(len(with_special))
    front = next(i for i in starts if with_special[i:i + len(plain)] == plain)
    return with_special[:front], with_special[front + len(plain):]


@functools.lru_cache(maxsize=4)
def target_front(tokenizer) -> list[int]:
    """Return the ids between the token that starts a decoder and an answer: [<s>] of BART, [] of
    T5."""
    return ids_around(tokenizer, "text_target")[0]


class Edges(NamedTuple):
    """The special tokens around the texts of a row."""
    front: list  # before the prompt: [BOS] or []
    back: list  # behind the prompt of an encoder: [EOS] of T5
    target: list  # before each answer of an encoder-decoder: see target_front
    end: list  # [EOS], behind each answer


def read_edges(tokenizer, family):
    front, end = special_ids(tokenizer)
    if family != "encoder_decoder":
        return Edges(front, [], [], end)
    return Edges(front, ids_around(tokenizer, "text")[1], target_front(tokenizer), end)


def surround(ids: list, front: list, back: list) -> list:
    """Put special tokens around a text that does not have them yet."""
    if ids[:len(front)] != front:
        ids = front + ids
    if ids[len(ids) - len(back):] != back:
        ids = ids + back
    return ids


def prompt_of_text(ids: list, tokenizer, family: str) -> list[int]:
    """Add the special tokens of a prompt that no chat template wrote: BOS, and for an encoder what
    the tokenizer puts behind a text, such as EOS of T5."""
    edges = read_edges(tokenizer, family)
    return surround(ids, edges.front, edges.back)


def read_apart(text):
    """Return the RowText of a row for an encoder-decoder, whose wholes are the answers alone."""
    start = len(text.prompt)
    scored = []
    for spans in text.scored:
        scored.append([(first - start, stop - start) for first, stop in spans])
    return text._replace(wholes=[whole[start:] for whole in text.wholes], scored=scored)


def tokenize_row(text, prompt, wholes, edges, ends, limits, offsets, seen=None):
    """Tokenize one row. Returns its columns.

    text     RowText
    prompt   the ids of the prompt
    wholes   the ids of prompt + answer, for each answer; of an encoder-decoder: of the answer
    edges    the ids to put around them
    ends     the ids to put after each answer, [EOS] or []
    offsets  for each answer the characters of the tokens of its whole, if only a part is scored
    seen     a vision.SeenPrompt of the prompt, if it has images
    """
    front, back = edges.front, edges.back
    if limits.family == "encoder_decoder":
        start, is_merged = 0, False
        whole_prompt = surround(prompt, front, back)
    else:
        # The answers begin where the tokens of the prompt and of the wholes differ.
        start = len(os.path.commonprefix([prompt, *wholes]))
        is_merged = start < len(prompt)
        # Add no second BOS where the text has its own.
        whole_prompt = wholes[0][:start]
        if seen:
            whole_prompt = vision.prompt_with_images(seen, prompt, start)
        if whole_prompt is None:
            text, whole_prompt = text._replace(problem=vision.MERGED), []
        if wholes[0][:len(front)] != front:
            whole_prompt = front + whole_prompt
    answers = [whole[start:] for whole in wholes]
    ended = []
    for answer, end in zip(answers, ends):  # no second EOS either
        ended.append(answer if answer[-1:] == end else answer + end)
    prompt_ids, answer_ids = truncate(whole_prompt, ended, limits, len(front), len(back),
                                      len(edges.target))
    unscored = [[] for _ in answer_ids]
    for k, characters in offsets.items():
        positions = templates.unscored_tokens(characters, start, text.scored[k])
        unscored[k] = [place for place in positions if place < len(answer_ids[k])]
    scored = [len(ids) - len(left_out) for ids, left_out in zip(answer_ids, unscored)]

    answer_tokens = sum(map(len, answer_ids))
    row = {
        "prompt_ids": prompt_ids,
        "answer_ids": answer_ids,
        "unscored": unscored,
        "prompt_truncated": len(prompt_ids) < len(whole_prompt),
        "answers_truncated": answer_tokens < sum(map(len, ended)),
        "merged": is_merged and "unserved" not in text.notes,
        "prompt_length": len(prompt_ids),
        "first_length": scored[0],
        "last_length": scored[-1],
        "answers": len(answer_ids),
        "tokens": len(prompt_ids) + answer_tokens,
    }
    is_empty = not all(answers) or not all(answer.strip() for answer in text.answers)
    row["problem"] = "empty answer" if is_empty else find_problem(text, row, limits)
    if not row["problem"] and not all(scored):
        row["problem"] = "no scored token is left of an answer"
    if text.problem:
        row["problem"] = text.problem
    row |= {name: name in text.notes for name in templates.TEXT_NOTES}
    return row


def find_problem(text, row, limits):
    """Return why a row without an empty answer cannot be trained on, or ""."""
    if not row["prompt_ids"]:
        return "no prompt"
    # Equal answers have no order. For tokens, a tuple can be in a set.
    equal = "chosen equals rejected" if len(text.answers) == 2 else "two answers are equal"
    if len(set(text.answers)) < len(text.answers):
        return equal
    if limits.overlong != "cut" and (row["prompt_truncated"] or row["answers_truncated"]):
        return "too long"
    if len(set(map(tuple, row["answer_ids"]))) < len(text.answers):
        if row["answers_truncated"]:
            return f"{equal} after truncation"
        return "chosen and rejected are the same tokens" if len(text.answers) == 2 else equal
    return ""


def text_of_row(batch, i, tokenizer, special, options):
    """Turn row i of a batch of `examples` into RowText. `options` go to the chat template."""
    prompt, answers = batch["prompt"][i], batch["answers"][i]
    if batch["chat"][i]:
        messages = [json.loads(answer) for answer in answers]
        own_options = json.loads(batch["options"][i] or "{}")
        text = templates.text_of_messages(json.loads(prompt), messages, tokenizer, special,
                                          batch["id"][i], own_options | options)
    else:
        text = templates.text_of_texts(prompt, answers, batch["has_own_prompt"][i], special)
    return text._replace(images=len(batch["image_paths"][i]))


def texts_of_batch(batch, tokenizer, special, limits, options):
    """Turn all rows of a batch of `examples` into RowText."""
    count = len(batch["id"])
    def text_of(i):
        return text_of_row(batch, i, tokenizer, special, options)

    if any(batch["chat"]):
        texts = templates.texts_of_rows(text_of, count, batch["id"])
    else:
        texts = [text_of(i) for i in range(count)]
    texts = shorten_texts(texts, limits.max_length, tokenizer)
    if limits.family == "encoder_decoder":
        texts = [read_apart(text) for text in texts]
    return templates.refuse_unwritable(texts, tokenizer)


def tokenize(batch, tokenizer, needs, limits, options, processor=None):
    """Tokenize a batch {column: list} of rows of `examples`. Dataset.map runs this function.

    needs, limits   Needs and Limits, which `datasets` passes as tuples
    options         of the chat template, from --template_kwargs
    processor       of the images, or None if no row has any
    """
    needs, limits = Needs(*needs), Limits(*limits)
    edges = read_edges(tokenizer, limits.family)
    special = templates.read_special_tokens(tokenizer)
    texts = texts_of_batch(batch, tokenizer, special, limits, options)

    # One call for the prompts and one for the wholes: a call encodes its texts in parallel.
    prompt_ids = encode(tokenizer, [text.prompt for text in texts])
    wholes_of_all = itertools.chain.from_iterable(text.wholes for text in texts)
    whole_ids = iter(encode(tokenizer, list(wholes_of_all)))

    # Token ids -> rows.
    rows, prompts_seen = [], see_prompts(batch, texts, processor)
    for i, text in enumerate(texts):
        is_chat = batch["chat"][i]
        wholes = list(itertools.islice(whole_ids, len(text.wholes)))
        end_ids = [edges.end] * len(wholes)
        own = edges
        if is_chat:
            # A chat template writes its own BOS and ends its turns with its own special token.
            beginning = (prompt_ids[i] or wholes[0])[:1]
            front = beginning if beginning == [tokenizer.bos_token_id] else []
            own = edges._replace(front=front, back=[])
            end_ids = [[] if whole.endswith(special.texts) else edges.end for whole in text.wholes]
        offsets = offsets_of(text, tokenizer)
        seen = prompts_seen[i]
        row = tokenize_row(text, prompt_ids[i], wholes, own, end_ids, limits, offsets, seen)
        if processor:
            row |= image_columns(batch, i, text, seen)
            row["problem"] = row["problem"] or vision.find_image_problem(row, seen, processor)
        repeats = all(answer.startswith(text.prompt) for answer in text.answers)
        row["repeats"] = repeats and not is_chat and bool(text.prompt.strip())
        row["unclosed"] = any(leaves_thinking_open(text, answer) for answer in text.answers)
        row["prompt_key"] = hash_prompt(batch["prompt"][i] + str(seen.keys if seen else ""))
        # Problems that the layout found, and scores that contradict the preference.
        row["problem"] = batch["problem"][i] or row["problem"]
        if needs.ordered_scores and not row["problem"]:
            chosen_score, rejected_score = batch["scores"][i]
            if not chosen_score > rejected_score:
                row["problem"] = "chosen_score not above rejected_score"
        rows.append(row)

    columns = {"id": batch["id"], "weight": batch["weight"], "layout_notes": batch["notes"]}
    if needs.scores:
        columns["scores"] = batch["scores"]
    if needs.kind == "labels":
        columns["desirable"] = [labels[0] for labels in batch["labels"]]
    for name in rows[0]:
        columns[name] = [row[name] for row in rows]
    return columns


def see_prompts(batch, texts, processor):
    """Return the vision.SeenPrompt of each row with images that may be trained on, else None."""
    seen = []
    for i, text in enumerate(texts):
        pictures = vision.pictures_of(batch, i)
        is_usable = pictures and not text.problem and not batch["problem"][i]
        prompt = None
        if is_usable:
            prompt = vision.see_prompt(processor, text.prompt, pictures, batch["id"][i])
        seen.append(prompt)
    return seen


def image_columns(batch, i, text, seen):
    """Return the columns of the images of a row, and the text that its processor reads."""
    return {
        "image_paths": batch["image_paths"][i],
        "image_bytes": batch["image_bytes"][i],
        "image_keys": seen.keys if seen else [],
        "image_text": text.prompt if seen else "",
    }


def encode(tokenizer, strings):
    """Token ids of each string, without special tokens."""
    # Without masks, which would be as long as the ids and are not used.
    return tokenizer(strings, add_special_tokens=False, return_attention_mask=False,
                     return_token_type_ids=False, verbose=False)["input_ids"]


def offsets_of(text, tokenizer):
    """{k: (begin, end) of the characters of each token of the k-th whole}, for the answers of which
    only a part is scored."""
    offsets = {}
    for k, spans in enumerate(text.scored):
        if spans:
            whole = tokenizer(text.wholes[k], add_special_tokens=False,
                              return_offsets_mapping=True)
            offsets[k] = whole["offset_mapping"]
    return offsets


# The tags around the reasoning of an answer.
THINK = re.compile(r"<(/?)think(?:ing)?>")


def leaves_thinking_open(text, answer):
    """Return whether an answer opens <think> and does not close it, so that it never answers.

    Some templates open <think> at the end of the prompt instead.
    """
    tags = THINK.findall(answer)
    if tags:
        return tags[-1] == ""
    opened = text.prompt.rstrip().endswith(("<think>", "<thinking>"))
    return opened and "unserved" not in text.notes


def hash_prompt(prompt):
    """Hash a prompt to a number in [0, 2**56)."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=7).digest(), "big")


PAIRS = Needs()  # of a loss that compares a chosen and a rejected answer
ANY_LENGTH, ANY_LAYOUT = Limits(), Shape()


def load_tokens(spec: str, tokenizer, needs=PAIRS, limits=ANY_LENGTH, shape=ANY_LAYOUT,
                strict=False, options=None, open_processor=None) -> tuple[datasets.Dataset, dict]:
    """Load a --dataset. Returns the rows of token ids that can be trained on, and an account of all
    rows, which `describe` formats.

    needs       the rows that the loss reads: registry.needs_of
    shape       the layout of the files, and what to make of it
    strict      a row that would be dropped is an error
    options     keyword arguments of the chat template
    open_processor  is called if a row has images, which is an error unless shape.images

    The columns of a row:

        id, prompt_ids                  its name, and the tokens of its prompt
        answer_ids                      K lists: the tokens of each answer, with its last one
        unscored                        K lists: positions in each answer that are not scored; no
                                        column if all are empty
        scores, desirable               K numbers, and a label, where the loss reads them
        weight                          if one of them is not 1
        prompt_length, answers, tokens  of the prompt; K; of the prompt and all answers
        first_length, last_length       scored tokens of the first and of the last answer
        prompt_key                      a hash of the prompt, 0 <= key < 2**56
        image_paths, image_bytes        the images of the prompt, if any row has images; image_text
        image_keys, image_text          is its text, and image_keys are hashes of the images
    """
    mixture, parts = parse_sources(spec), []
    account = {"data": spec, "rows": 0, "dropped": {}, "noted": {}, "messages": False,
               "unread": {}, "not_read": {}, "layouts": {}}
    texts = [load_text(source, needs, shape) for source in mixture]
    processor = open_processor() if any(map(has_images, texts)) else None
    for source, text in zip(mixture, texts):
        account["layouts"][source.name] = find_layout(source, needs, shape)
        count_unread(text, account["unread"])
        files, not_read = find_files(source)
        if len(files) > 1:
            not_read = not_read | {"without a row": list_empty(files)}
        for reason, names in not_read.items():
            account["not_read"].setdefault(reason, []).extend(names)
        with reading_cache(CACHE_ERRORS):
            rows = text.map(
                tokenize, batched=True, remove_columns=text.column_names, desc="tokenizing",
                new_fingerprint=cache_name(text, tokenizer, needs, limits, options, processor),
                features=token_features(needs, processor),
                batch_size=100 if processor else 1000,  # rows may hold images
                fn_kwargs={"tokenizer": tokenizer, "needs": needs, "limits": limits,
                           "options": options or {}, "processor": processor})
        check_whole(rows)
        account["messages"] = account["messages"] or bool(text[0]["chat"])
        usable = select_usable(rows, account, strict, limits.overlong)
        if len(usable) == 0:
            reasons = list_rows(account["dropped"])
            raise UserError(
                f"{source.name}: none of its {len(rows)} rows can be used ({reasons})")
        parts.append(usable)
    rows = without_defaults(datasets.concatenate_datasets(mix(parts, mixture)))
    if needs.kind == "labels":
        check_labels(spec, rows)
    account["kept"] = len(rows)
    account["left_out"] = sum(map(len, parts)) - len(rows)
    return rows.remove_columns(["problem", "layout_notes", *NOTES]), account


def check_labels(spec, rows):
    """Raise if all answers have the same label."""
    labels = set(column(rows, "desirable").tolist())
    if len(labels) == 1:
        raise UserError(f"{spec}: every answer has the label {str(labels.pop()).lower()}; a loss "
                        "of labels needs good and bad answers")


def without_defaults(rows):
    """Remove the columns that say nothing: weights that are all 1, and no unscored tokens."""
    if (column(rows, "weight") == 1).all():
        rows = rows.remove_columns("weight")
    if not len(pyarrow.compute.list_flatten(rows.data.column("unscored"), recursive=True)):
        rows = rows.remove_columns("unscored")
    return rows


def has_images(text):
    """Return whether a row of `examples` has an image."""
    counts = pyarrow.compute.list_value_length(text.data.column("image_paths"))
    return (pyarrow.compute.max(counts).as_py() or 0) > 0


def count_without_images(rows):
    """Return how many rows have no image."""
    if "image_paths" not in rows.column_names:
        return len(rows)
    return len(rows) - sum(1 for paths in rows["image_paths"] if paths)


def image_states(text, processor):
    """Return the settings of a processor, and the state of all files of images."""
    if processor is None:
        return []
    states = [vision.processor_settings(processor)]
    for path in sorted(set(itertools.chain(*text["image_paths"]))):
        if os.path.isfile(path):
            states.append(file_state(pathlib.Path(path)))
    return states


def cache_name(text, tokenizer, needs, limits, options, processor):
    """Return a cache name of the token ids, which changes with everything they depend on."""
    backend = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer
    return datasets.fingerprint.Hasher.hash([
        text._fingerprint, backend, tokenizer.chat_template, tokenizer.special_tokens_map, needs,
        limits, options, SOURCE, getattr(tokenizer, "split_special_tokens", False),
        *image_states(text, processor)])


# Columns that mark rows for the report, and the words of the report.
NOTES = {
    "prompt_truncated": "prompt truncated",
    "answers_truncated": "answers truncated",
    "repeats": "prompt repeated inside both answers",
    "merged": "tokens merged across the end of the prompt",
    "unclosed": "an answer opens <think> and never closes it",
    **templates.TEXT_NOTES,
}


# Columns of images, without their hashes.
IMAGES = ("image_paths", "image_bytes", "image_text")


def token_features(needs, processor):
    """Return the types of the columns, which a first batch of empty prompts does not show."""
    ids = datasets.Sequence(datasets.Value("int64"))
    types = {
        "id": datasets.Value("string"),
        "problem": datasets.Value("string"),
        "layout_notes": datasets.Sequence(datasets.Value("string")),
        "prompt_ids": ids,
        "answer_ids": datasets.Sequence(ids),
        "unscored": datasets.Sequence(ids),
        "weight": datasets.Value("float64"),
    }
    if needs.scores:
        types["scores"] = datasets.Sequence(datasets.Value("float64"))
    if needs.kind == "labels":
        types["desirable"] = datasets.Value("bool")
    if processor:
        types |= {
            "image_paths": datasets.Sequence(datasets.Value("string")),
            "image_bytes": datasets.Sequence(datasets.Value("large_binary")),
            "image_keys": ids,
            "image_text": datasets.Value("string"),
        }
    types |= dict.fromkeys(NOTES, datasets.Value("bool"))
    numbers = ("prompt_length", "first_length", "last_length", "answers", "tokens", "prompt_key")
    types |= dict.fromkeys(numbers, datasets.Value("int64"))
    return datasets.Features(types)


def select_usable(rows, account, strict, overlong):
    """Select the rows without a problem. The account counts the rows with a problem or a note."""
    problems = column(rows, "problem")
    for problem in sorted(set(problems) - {""}):
        count_rows(account["dropped"], str(problem), rows, problems == problem)
    for name, note in NOTES.items():
        count_rows(account["noted"], note, rows, column(rows, name) & (problems == ""))
    with_notes = pyarrow.compute.list_value_length(rows.data.column("layout_notes"))
    if pyarrow.compute.max(with_notes).as_py():
        notes = rows["layout_notes"]
        for note in sorted(set(itertools.chain(*notes))):
            has_note = np.array([note in each for each in notes])
            count_rows(account["noted"], note, rows, has_note & (problems == ""))
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


def mix(parts, mixture):
    """Take as many rows as possible such that each part has its share and no row occurs twice.
    Without shares, take all rows."""
    if mixture[0].share is None:
        return parts
    total = min(len(part) / source.share for part, source in zip(parts, mixture))
    mixed = []
    for part, source in zip(parts, mixture):
        count = min(len(part), round(total * source.share))
        if count == 0:
            raise UserError(f"{source.name}: its share of the mixture is less than one row; "
                            "give it a larger share")
        order = np.random.default_rng(0).permutation(len(part))
        mixed.append(part.select(np.sort(order[:count])))
    return mixed


def column(rows: datasets.Dataset, name: str) -> np.ndarray:
    """Return a whole column of numbers or strings as an array.

    It is taken from the stored rows, of which `rows` may be a selection: `datasets` would take the
    selected rows one by one.
    """
    values = np.array(rows.data.column(name))  # (stored rows,), a copy
    if rows._indices is None:
        return values
    return values[rows._indices.column(0).to_numpy()]  # (rows,)


def digest(rows: datasets.Dataset) -> str:
    """Hash these rows in this order, by their token ids and numbers, such as scores.

    The name of a row is left out, so that a data file may be moved. Every stored row is hashed by
    array operations and `rows` selects among the hashes, because to select the ids themselves is
    ten times slower.
    """
    names = [name for name, kind in rows.features.items()
             if getattr(kind, "dtype", None) != "string" and name not in IMAGES]
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
    """Hash each number, or each list of values with their positions -> (n,) uint64."""
    if not pyarrow.types.is_list(values.type):
        values = values.to_numpy(zero_copy_only=False)
        return mix_bits(values.astype(np.result_type(values, np.int64)).view(np.uint64))
    lengths = pyarrow.compute.list_value_length(values).to_numpy().astype(np.int64)
    ends = np.cumsum(lengths)
    inner = values.flatten()
    if pyarrow.types.is_integer(inner.type):  # ids, which fit into 32 bits
        inner = inner.to_numpy().astype(np.uint64) << np.uint64(32)
    else:  # numbers, or lists
        inner = hash_column(inner)
    positions = np.arange(len(inner)) - np.repeat(ends - lengths, lengths)
    hashes = mix_bits(inner + positions.astype(np.uint64))
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
    line = f"{printable(account['data'])}: {account['kept']} of {account['rows']} rows kept"
    dropped = sum(entry["count"] for entry in account["dropped"].values())
    if dropped:
        line += f", {dropped} dropped ({list_rows(account['dropped'])})"
    layouts_read = sorted(set(account["layouts"].values()))
    if account["left_out"]:
        line += f", {account['left_out']} left out by the shares"
    line += f"; layout {', '.join(layouts_read)}"
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
            names = map(printable, names[:3])
            lines.append(f"  not read, {reason}: {', '.join(names)}{more}")
    names_by_count = {}
    for name, count in account["unread"].items():
        names_by_count.setdefault(count, []).append(name)
    if names_by_count:
        parts = [f"{', '.join(names)} ({count} rows)" for count, names in names_by_count.items()]
        lines.append(f"  columns and message keys not read: {printable('; '.join(parts))}")
    return lines


def statistics(rows: datasets.Dataset, held_out: datasets.Dataset | None = None) -> dict:
    """Compute the numbers of the report: lengths, repeated prompts and tokens of an epoch."""
    prompt = column(rows, "prompt_length")  # (N,), as all of these
    first, last = column(rows, "first_length"), column(rows, "last_length")
    counts = column(rows, "answers")
    tokens = column(rows, "tokens")
    keys = column(rows, "prompt_key")
    lengths = {"prompt": prompt}
    numbers = {"lengths": lengths}
    if counts.max() == 1:
        lengths["answer"] = first
    else:
        lengths |= {"chosen": first, "rejected": last}
        numbers["chosen_longer"] = float((first > last).mean())
        numbers["rejected_longer"] = float((first < last).mean())
    if counts.max() > 2:
        numbers["answers_per_row"] = float(counts.mean())
    if "desirable" in rows.column_names:
        numbers["desirable"] = float(column(rows, "desirable").mean())
    if "weight" in rows.column_names:
        weights = column(rows, "weight")
        numbers["weights"] = {"mean": float(weights.mean()), "zero": int((weights == 0).sum())}
    tokens_by_answer = tokens + (counts - 1) * prompt
    for name, values in lengths.items():
        lengths[name] = {
            "mean": float(values.mean()),
            "median": float(np.median(values)),
            "95th": float(np.percentile(values, 95)),
            "max": int(values.max()),
        }
    numbers["rows_that_share_their_prompt"] = len(keys) - len(np.unique(keys))
    if held_out is not None and len(held_out):
        shared = np.intersect1d(keys, column(held_out, "prompt_key"))
        numbers["prompts_in_both"] = len(shared)
    numbers["tokens_per_epoch"] = int(tokens.sum())
    numbers["tokens_per_epoch_prompt_once_for_each_answer"] = int(tokens_by_answer.sum())
    return numbers


def all_prompts(held_out: dict) -> datasets.Dataset:
    """Return the hashes of the prompts of all evaluation sets {split: rows}, as rows."""
    return datasets.concatenate_datasets(
        [rows.select_columns(["prompt_key"]) for rows in held_out.values()])


def describe_statistics(numbers: dict) -> str:
    """Format the numbers of `statistics` as the lines of the report."""
    lines = []
    for name, part in numbers["lengths"].items():
        lines.append(f"  {name:8} tokens: mean {part['mean']:.0f}, median {part['median']:.0f}, "
                     f"95th percentile {part['95th']:.0f}, max {part['max']}")
    if "chosen_longer" in numbers:
        lines.append(f"  chosen is the longer answer in {numbers['chosen_longer']:.0%} of the "
                     f"pairs, rejected in {numbers['rejected_longer']:.0%}")
    if "answers_per_row" in numbers:
        lines.append(f"  {numbers['answers_per_row']:.1f} answers to a prompt; chosen is the best "
                     "of them here, rejected the worst")
    if "desirable" in numbers:
        lines.append(f"  {numbers['desirable']:.0%} of the answers are desirable")
    if "weights" in numbers:
        lines.append(f"  weights: mean {numbers['weights']['mean']:.3g}, "
                     f"{numbers['weights']['zero']} of them 0")
    line = (f"  {numbers['rows_that_share_their_prompt']} rows have a prompt that an earlier row "
            "has too")
    if "prompts_in_both" in numbers:
        line += f"; {numbers['prompts_in_both']} prompts are both trained and held out"
    lines.append(line)
    by_answer = numbers["tokens_per_epoch_prompt_once_for_each_answer"]
    lines.append(f"  {numbers['tokens_per_epoch']:,} tokens an epoch, each prompt once; "
                 f"{by_answer:,} with the prompt before each answer")
    return "\n".join(lines)


def show(rows: datasets.Dataset, tokenizer, count=2, most: int | None = None,
         image_id: int | None = None) -> str:
    """Format the first rows as the model sees them: the prompt, then in brackets the scored tokens,
    separated by bars.

    most    the largest number of characters to show: the end of a prompt, the beginning and the end
            of an answer
    image_id  the token of an image, many of which are shown as [image: 12 tokens]
    """
    lines = []
    for i in range(min(count, len(rows))):
        row = rows[i]
        prompt = vision.decode_prompt(row["prompt_ids"], tokenizer, image_id)
        mark = ""
        if most and len(prompt) > most:
            prompt, mark = prompt[-most:], "… "
        lines += [row["id"], f"  prompt   {mark}{prompt!r}"]
        for k, name in enumerate(answer_names(row)):
            unscored = row["unscored"][k] if "unscored" in row else []
            text = show_answer(row["answer_ids"][k], unscored, tokenizer)
            if most and len(text) > most:
                text = f"{text[:most // 2]} … {text[-most // 2:]}"
            lines.append(f"  {name:8} {text}")
    return "\n".join(lines)


def answer_names(row):
    """Name the answers of a row, with their scores and labels."""
    count = len(row["answer_ids"])
    names = ["chosen", "rejected"] if count == 2 else [f"answer {k + 1}" for k in range(count)]
    if count == 1:
        names = ["answer"]
    if "desirable" in row:
        names = ["desirable" if row["desirable"] else "undesirable"]
    if "scores" in row:
        names = [f"{name} ({score:g})" for name, score in zip(names, row["scores"])]
    return names


def show_answer(ids, unscored, tokenizer):
    """Write the scored tokens in brackets and separated by bars, the others between brackets."""
    text, is_open = "", False
    for place, token in enumerate(ids):
        word = repr(tokenizer.decode([token]))[1:-1]
        is_scored = place not in unscored
        if is_scored:
            text += "|" if is_open else "["
        elif is_open:
            text += "]"
        text += word
        is_open = is_scored
    return text + "]" if is_open else text


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
    """Make a batch for dpo.py from {column: list}: input_ids, attention_mask and labels (B, K, T),
    right-padded to the longest answer with its prompt, and what `known_of_answers` returns."""
    batch = known_of_answers(rows)
    answers_of_row = rows["answer_ids"]
    most = batch["mask"].shape[1]
    width = 0
    for prompt, answers in zip(rows["prompt_ids"], answers_of_row):
        width = max(width, len(prompt) + max(map(len, answers)))
    shape = (len(answers_of_row), most, width)
    input_ids = torch.full(shape, pad_token_id)  # (B, K, T)
    labels = torch.full(shape, IGNORE)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for i, prompt in enumerate(rows["prompt_ids"]):
        for k, answer in enumerate(answers_of_row[i]):
            end = len(prompt) + len(answer)
            input_ids[i, k, :end] = torch.tensor(prompt + answer)
            attention_mask[i, k, :end] = 1
            labels[i, k, len(prompt):end] = torch.tensor(labels_of_answer(rows, i, k))
    return batch | {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def labels_of_answer(rows: dict, i: int, k: int) -> list:
    """Return the ids of an answer, with IGNORE for the tokens that are not scored."""
    labels = rows["answer_ids"][i][k]
    if "unscored" in rows and rows["unscored"][i][k]:
        labels = list(labels)
        for place in rows["unscored"][i][k]:
            labels[place] = IGNORE
    return labels


def known_of_answers(rows: dict, most: int = 0) -> dict:
    """Make the part of a batch that is not tokens: id, and what is known of the answers.

    most    K, if it is above the answers of each of these rows

    mask (B, K) says which row has a k-th answer; places (N,) where each of the N answers is in the
    flattened (K, B) table. Where the rows have them: scores and ref_logps (B, K), desirable (B,)
    booleans, weight (B,).
    """
    counts = torch.tensor([len(answers) for answers in rows["answer_ids"]])
    most = most or int(counts.max())
    mask = torch.arange(most) < counts[:, None]  # (B, K)
    batch = {"id": rows["id"], "mask": mask, "places": mask.T.flatten().nonzero()[:, 0]}
    for name in ("scores", "ref_logps"):
        if name in rows:
            batch[name] = pad_right(rows[name], most)
    if "desirable" in rows:
        batch["desirable"] = torch.tensor(rows["desirable"])
    if "weight" in rows:
        batch["weight"] = torch.tensor(rows["weight"], dtype=torch.float64)
    return batch


def pad_right(rows, width):
    """Lists of numbers -> (B, width), with zeros behind them."""
    rows = [row + [0.0] * (width - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.float64)


# --- Flags, and `python data.py` ------------------------------------------------------------------

def add_flags(add: Callable):
    """Add the flags that decide which tokens a row becomes."""
    add("--max_length", type=whole_number(">= 2"), default=1024,
        help="tokens of prompt and answer together; of each of them in an encoder-decoder")
    add("--max_prompt_length", type=whole_number(">= 1"),
        help="tokens of the prompt (default: all that the longer answer does not need, at least "
             "half of max_length)")
    add("--max_completion_length", type=whole_number(">= 1"),
        help="tokens of an answer with its EOS (default: max_length)")
    add("--truncation_mode", choices=("keep_end", "keep_start"), default="keep_end",
        help="the end of a long prompt to keep")
    add("--overlong", choices=("cut", "drop", "error"), default="cut",
        help="truncate a row beyond these lengths, drop it, or stop with an error")
    add("--columns", help="names of the file's columns, such as prompt=instruction,chosen=output")
    add("--ignore_columns",
        help="columns, or keys of a message, to train without, although they may change what a "
             "row means: images,system")
    add("--layout", default="auto",
        help=f"how the file is laid out: auto, {', '.join(LAYOUTS)}")
    add("--pairs", choices=("best_worst", "all", "adjacent"),
        help="the pairs to make of a row with more than two answers, for a loss of pairs")
    add("--unpair", action="store_true",
        help="read a pair as two answers with a label, for a loss of labels")
    add("--template_kwargs", metavar="JSON",
        help="arguments of the chat template, such as '{\"enable_thinking\": false}'")
    add("--chat_template", help="a file with a chat template (jinja) instead of the tokenizer's")
    add("--strict", action="store_true", help="a row that would be dropped is an error")


def split_list(text: str | None) -> list:
    """Split a flag's list of names at its commas, without the spaces around them."""
    names = [name.strip() for name in (text or "").split(",")]
    return [name for name in names if name]


def read_flags(args: argparse.Namespace,
               family: str = "decoder") -> tuple[Limits, Shape, dict]:
    """Check the flags of add_flags, for a model of this family. Returns limits, shape, and options
    of the chat template."""
    if args.max_prompt_length and args.max_prompt_length >= args.max_length:
        raise UserError(f"--max_prompt_length {args.max_prompt_length}: leaves no tokens for an "
                        f"answer in --max_length {args.max_length}")
    if args.chat_template and not os.path.isfile(args.chat_template):
        raise UserError(f"--chat_template {args.chat_template}: no such file")
    limits = Limits(args.max_length, args.max_prompt_length, args.max_completion_length,
                    args.truncation_mode, args.overlong, family)
    if args.layout not in ("auto", *LAYOUTS):
        raise UserError(f"--layout {args.layout}: there is no such layout; there are auto, "
                        f"{', '.join(LAYOUTS)}{nearest(args.layout, LAYOUTS)}")
    shape = Shape(args.layout, args.pairs, args.unpair, read_columns(args.columns),
                  tuple(split_list(args.ignore_columns)))
    return limits, shape, read_template_kwargs(args.template_kwargs)


def read_template_kwargs(text):
    """Read --template_kwargs: an object whose keys are names of arguments."""
    try:
        options = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"--template_kwargs {text}: is not JSON ({error})") from error
    if not isinstance(options, dict):
        raise UserError(f"--template_kwargs {text}: must be a JSON object, such as "
                        "'{\"enable_thinking\": false}'")
    for name in ("messages", "conversation", "tokenize", "add_generation_prompt",
                 "continue_final_message", "chat_template", "return_tensors", "return_dict"):
        if name in options:
            raise UserError(f"--template_kwargs: {name} is set by this program; remove it")
    return options


def read_columns(text):
    """Read --columns. Returns pairs (our name, the file's name)."""
    ours = known_names()
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


def check_template(args: argparse.Namespace, accounts: list[dict]):
    """Raise if no row uses the chat template that a flag changes."""
    if any(account["messages"] for account in accounts):
        return
    for name in ("chat_template", "template_kwargs"):
        value = getattr(args, name)
        if value:
            raise UserError(f"--{name} {value}: no row holds messages, so it is not used")


def needs_of_loss(name):
    """The Needs of --loss."""
    import losses  # it fills the registry, which needs no data

    try:
        return needs_of(losses.find(name))
    except ValueError as error:
        raise UserError(f"--loss: {error}") from error


def load_report_tokenizer(args):
    tokenizer = load_tokenizer(args.model)
    if args.chat_template:
        tokenizer.chat_template = read_template(args.chat_template)
    return tokenizer


def report_processor(args, tokenizer):
    """A function that loads the processor of a model that sees images, once; else None."""
    if not has_processor(args.model):
        return None
    keeps_template = bool(args.chat_template)
    return functools.cache(
        lambda: load_processor(args.model, tokenizer, keeps_template=keeps_template))


def main(argv):
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=any_name, help="the same as --dataset of train.py")
    parser.add_argument("--model", required=True, help="a folder or Hub id with the tokenizer")
    parser.add_argument("--eval_dataset", type=any_name,
                        help="held-out rows, to count the prompts in both data sets; several sets "
                             "as NAME=ROWS,NAME=ROWS")
    parser.add_argument("--loss", default="sigmoid",
                        help="the loss to read rows for: kto reads labels, plackett_luce rankings")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)
    limits, shape, options = read_flags(args)
    needs = needs_of_loss(args.loss)
    limits = limits._replace(family=load_family(args.model))
    tokenizer = load_report_tokenizer(args)
    open_processor = report_processor(args, tokenizer)
    shape = shape._replace(images=open_processor is not None)

    # The data sets, as training would load them.
    specs = {"train": args.dataset}
    if args.eval_dataset:
        specs |= evaluation_sets(args.eval_dataset)
    held_out, accounts = {}, []
    for split, spec in specs.items():
        held_out[split], account = load_tokens(
            spec, tokenizer, needs, limits, shape, args.strict, options, open_processor)
        accounts.append(account)
    rows = held_out.pop("train")
    check_template(args, accounts)
    check_ignored(shape.ignored, accounts)

    # The report.
    numbers = [statistics(rows, all_prompts(held_out) if held_out else None)]
    numbers += map(statistics, held_out.values())
    if args.json:
        reports = []
        for split, account, part in zip(specs, accounts, numbers):
            reports.append({"split": split} | account | part)
        print(json.dumps(reports, indent=2))
        return
    for split, account, part in zip(specs, accounts, numbers):
        name = split.partition("/")[2]
        print(f"{name + ': ' if name else ''}{describe(account)}")
        print(describe_statistics(part))
    image_id = open_processor().image_token_id if "image_paths" in rows.column_names else None
    shown = show(rows, tokenizer, image_id=image_id)
    print(f"\nAs the model sees them, scored tokens in brackets:\n{shown}")


if __name__ == "__main__":
    run_script(main)
