"""Finds the prompt and the answers in a row of any layout.

    {"prompt": "a cat", "chosen": " sat", "rejected": " ran"}          texts
    {"chosen": "... Assistant: sat", "rejected": ...}                  the prompt inside both
    {"prompt": [{"role": "user", "content": "a cat"}], ...}            messages
    {"prompt": "[{'role': 'user', ...}]", ...}                         messages as text

`examples` yields one layout for all of them: a prompt and its answers, all of them texts or all of
them lists of messages. Every row of a file must have the layout of the first.
"""
import ast
import decimal
import json
import math
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from errors import UserError, nearest, printable
from registry import Needs
from sources import JSON, KeyTwiceError, Source, Unreadable, kind_of_split, read_rows
from templates import begins_with
from unread import list_unread

# --- The fields of a row --------------------------------------------------------------------------

# The text before each answer in HH-RLHF and in data sets of its format.
TURN = "\n\nAssistant:"


# A number as text. float() alone would read "1_0" and digits of every script too.
NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")


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
        raise UserError(f"{where}: the field '{field}' is missing or null")
    if isinstance(value, str):
        texts = [value]
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        value = [read_message(message, field, where) for message in value]
        texts = []
        for message in value:
            texts += message.values()
    elif isinstance(value, Unreadable):
        raise UserError(f"{where}: the field '{field}' cannot be read: {value.reason}")
    else:
        raise UserError(f"{where}: the field '{field}' holds {beginning(value)}, which is "
                        "neither text nor a list of messages")
    if not all(map(is_unicode, texts)):
        raise UserError(
            f"{where}: the field '{field}' holds half of a surrogate pair, which is not text")
    return value


def read_message(message, field, where):
    """Read the role and the content of a message. `list_unread` checks its other keys."""
    texts = {key: message.get(key) for key in ("role", "content")}
    if not all(isinstance(text, str) for text in texts.values()):
        advice = ""
        if "from" in message and "value" in message:  # ShareGPT
            advice = "; rename from to role and value to content"
        raise UserError(f"{where}: the field '{field}' holds the message {beginning(message, 80)}; "
                        f"a message has a role and a content, both text{advice}")
    return texts


def beginning(value, most=60):
    """Write the beginning of a value as JSON, for an error."""
    try:
        return json.dumps(value, default=str)[:most]
    except (RecursionError, TypeError):  # nested too deep, or keys that are no texts
        return f"a {type(value).__name__} that JSON cannot write"


def is_unicode(text):
    """Return False for half of a surrogate pair, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_score(row, field, where):
    """Read a finite number. CSV has it as text, so a text that is a number is one everywhere."""
    value = row.get(field) if isinstance(row, dict) else None
    is_number = isinstance(value, (int, float, decimal.Decimal)) and not isinstance(value, bool)
    is_number = is_number or (isinstance(value, str) and NUMBER.fullmatch(value.strip()))
    try:
        score = float(value) if is_number else math.nan
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise UserError(f"{where}: the loss reads the field '{field}', a finite number, "
                        f"and the row has {beginning(value)}; rename a column with --columns "
                        f"{field}=NAME")
    return score


def holds_prompt(dialogue):
    """Return whether an answer marks the end of the prompt inside it."""
    if isinstance(dialogue, str):
        return TURN in dialogue
    roles = [item.get("role") for item in dialogue or [] if isinstance(item, dict)]
    return len(roles) > 0 and roles[0] != "assistant"


# --- Messages that arrive as text -----------------------------------------------------------------

# How messages begin that a CSV cell or a JSON string holds as text.
MESSAGES_AS_TEXT = re.compile(r""""?\s*(\[\s*)?\{""")
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
        if isinstance(text, str) and MESSAGES_AS_TEXT.match(text.lstrip()):
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
            value = JSON.decode(value)
    except KeyTwiceError as error:
        raise UserError(f"{where}: the field '{field}' holds messages as text: {error}") from error
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


def split_row(prompt, answers: dict, where: str):
    """Separate prompt and answers, which may come in any of the formats.

    answers are {field: answer}. prompt is None where they contain it. Returns prompt and answers,
    all of them text or all of them lists of messages.
    """
    texts = list(answers.values())
    if isinstance(prompt, list) or any(isinstance(text, list) for text in texts):
        return split_conversation(prompt, answers, where)
    if prompt is not None:
        return prompt, texts
    if len(texts) == 1:
        raise UserError(f"{where}: one text without a prompt: where its answer begins is unknown; "
                        "give it a prompt")
    prompt = split_prompt(*texts)
    return prompt, [text[len(prompt):] for text in texts]


def split_conversation(prompt, answers_by_field, where):
    """Separate prompt and answers, as split_row, where one of them is a list of messages."""
    answers = list(answers_by_field.values())
    if prompt is None and any(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: one of chosen and rejected is text, the other a list of "
                        "messages; without a prompt, both must be lists")
    answers = [as_messages("assistant", answer) for answer in answers]
    # Answers that continue the prompt.
    if prompt is not None and all(begins_with(answer, ("assistant", "tool")) for answer in answers):
        return move_tool_outputs(as_messages("user", prompt), answers)
    # Answers that are whole dialogues and repeat the prompt.
    shared = prompt if isinstance(prompt, list) else split_messages(answers)
    contents = [message["content"].strip() for message in shared]
    has_prompt = not isinstance(prompt, str) or prompt.strip() in contents
    repeats = [has_prompt and answer[:len(shared)] == shared for answer in answers]
    for field, answer, is_repeat in zip(answers_by_field, answers, repeats):
        if not is_repeat and not begins_with(answer, ("assistant", "tool")):
            raise UserError(
                f"{where}: {field} begins with the role {answer[0]['role']!r}; an answer begins "
                "with the role 'assistant', or repeats the messages of the prompt")
    if not all(repeats):
        raise UserError(f"{where}: one answer begins with the role 'assistant', the other repeats "
                        "the messages of the prompt; write both in one form")
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


def old_examples(source: Source, sides: tuple, scored=False, columns=(), ignored=(),
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
            dialogue = row_of_file.get(names["chosen" if "chosen" in fields else "rejected"])
            needs_prompt = "prompt" not in fields and not holds_prompt(dialogue)
            unread = list_unread(row_of_file, names, dialogue, read, ignored, needs_prompt, where)
        if "split" in unread and "split" not in ignored:
            kinds.add(kind_of_split(str(row_of_file["split"])))
        if len(kinds - {None}) > 1:
            raise UserError(f"{where}: its column 'split' has {row_of_file['split']!r}, and an "
                            "earlier row has another split; write each split to a file of its own; "
                            "--ignore_columns split reads all rows")
        values = {field: read_field(row, field, where) for field in fields}
        prompt = values.pop("prompt", None)
        prompt, answers = split_row(prompt, values, where)
        is_chat = not isinstance(prompt, str)
        if file_is_chat not in (None, is_chat):
            form, earlier = ("a list of messages", "text") if is_chat else ("text", "messages")
            raise UserError(f"{where}: the row is {form}, but earlier rows are {earlier}; write "
                            "all rows of the file in one form")
        file_is_chat = is_chat

        example = {
            "id": name_row(row, where),
            "chat": is_chat,
            "has_own_prompt": "prompt" in fields,
            "unread": json.dumps(unread),
        }
        parts = {"prompt": prompt} | dict(zip(values, answers))
        for name in ("prompt", *sides):
            example[name] = json.dumps(parts[name]) if is_chat else parts[name]
        if scored:
            for side in sides:
                name = f"{side}_score"
                example[name] = read_score(row, name, where)
        yield example


def name_row(row, where):
    """Return the name of a row in errors and logs: file and number, and its id if it has one."""
    row_id = row.get("id")
    if row_id is None:
        return where
    text = beginning(row_id) if isinstance(row_id, (list, dict)) else str(row_id)[:200]
    return f"{where} (id {printable(text)})"


class Shape(NamedTuple):
    layout: str = "auto"
    pairs: str | None = None
    unpair: bool = False
    columns: tuple = ()
    ignored: tuple = ()


LAYOUTS = {"trl": None}
COLUMNS = ("prompt", "chosen", "rejected", "chosen_score", "rejected_score", "id")


def examples(source, needs, shape, **cache_key):
    needs, shape = Needs(*needs), Shape(*shape)
    for row in old_examples(source, needs.answers or ("chosen", "rejected"), needs.scores,
                            shape.columns, shape.ignored):
        sides = needs.answers or ("chosen", "rejected")
        new = {name: row[name] for name in ("id", "chat", "has_own_prompt", "prompt", "unread")}
        new |= {"answers": [row[side] for side in sides], "ranks": [0, 1][:len(sides)],
                "scores": [row[f"{side}_score"] for side in sides] if needs.scores else [],
                "labels": [], "weight": 1.0, "options": "", "notes": [], "problem": ""}
        yield new
