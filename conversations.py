"""Reads messages, and separates the prompt from the answers of a row.

    {"from": "human", "value": "hi"}    ->   {"role": "user", "content": "hi"}

    user: hi  assistant: a              ->   prompt:  user: hi
    user: hi  assistant: b                   answers: assistant: a    assistant: b

A message keeps the keys that a chat template or the mask of the scored tokens reads. Every other
key is listed in the report, or is an error where it holds content for the model.
"""
import ast
import json
import os
import re

from errors import UserError
from sources import JSON, KeyTwiceError
from templates import begins_with
from unread import is_blank, list_unread_keys
from written import content_text

# The text before each answer in HH-RLHF and in data sets of its format.
TURN = "\n\nAssistant:"


def beginning(value, most=60) -> str:
    """Write the beginning of a value as JSON, for an error."""
    try:
        return json.dumps(value, default=str)[:most]
    except (RecursionError, TypeError):  # nested too deep, or keys that are no texts
        return f"a {type(value).__name__} that JSON cannot write"


# --- Messages -------------------------------------------------------------------------------------

# Roles under other names, in lower case.
ROLES = {
    "human": "user", "user": "user", "prompter": "user",
    "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "function": "tool", "observation": "tool", "tool": "tool",
    "system": "system", "developer": "developer",
}
# The role of ShareGPT for a message whose text is a call of a tool.
CALL = "function_call"
# The keys that a message keeps besides role and content.
KEPT = ("tool_calls", "reasoning_content", "thinking", "name", "tool_call_id", "train")
OTHER_NAMES = "roles under other names"


def read_messages(messages: list, field: str, row) -> list:
    """Return the messages of a field with role and content, and the other keys that are kept.

    row    the Fields of the row, where unread keys and renamed roles are noted
    """
    keys = list_unread_keys(messages, field, KEPT, row.ignored, row.where)
    row.unread_keys |= dict.fromkeys(keys)
    return [read_message(message, field, row) for message in messages]


def read_message(message, field, row):
    role = first_value(message, "role", "from")
    content = first_value(message, "content", "value")
    kept = {}
    for key in KEPT:
        if not is_blank(message.get(key)) and key not in row.ignored:
            kept[key] = message[key]
    if role == CALL:
        role, content, kept = "assistant", None, kept | {"tool_calls": read_calls(content, row)}
    # A message that calls tools may have no text.
    is_text = isinstance(content, str) or (content is None and "tool_calls" in kept)
    if isinstance(content, list) and content:
        is_text = True
        check_parts(content, field, row)
    if not isinstance(role, str) or not is_text:
        raise UserError(f"{row.where}: the field '{field}' holds the message "
                        f"{beginning(message, 80)}; a message has a role and a content, both text")
    if not isinstance(kept.get("train", True), bool):
        raise UserError(f"{row.where}: the field '{field}' holds a message with train "
                        f"{beginning(kept['train'])}; write true or false")
    name = ROLES.get(role.strip().lower(), role)
    if name != role:
        row.notes.add(OTHER_NAMES)
    return {"role": name, "content": content} | kept


def first_value(message, *names):
    """Return the first value that is there. A file of Arrow has null where a key is missing."""
    for name in names:
        if message.get(name) is not None:
            return message[name]
    return None


def read_calls(content, row):
    """Read the text of a function_call of ShareGPT: {"name": ..., "arguments": {...}}, or several.
    """
    try:
        value = JSON.decode(content) if isinstance(content, str) else content
    except (ValueError, RecursionError):
        value = None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise UserError(f"{row.where}: a message of the role {CALL} holds {beginning(content)}; it "
                        "is JSON with a name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def check_parts(parts, field, row):
    """Raise unless every part of a content is text, or an image for a model that sees images."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "image" and row.images:
            continue
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"{row.where}: the field '{field}' holds a message with a part of the "
                            f"type {beginning(kind)}; only parts of type text are read, so leave "
                            "out the row")


def is_message(value) -> bool:
    keys = set(value) if isinstance(value, dict) else set()
    has_role = not keys.isdisjoint(("role", "from"))
    return has_role and not keys.isdisjoint(("content", "value", "tool_calls"))


# --- Messages that arrive as text -----------------------------------------------------------------

# How messages begin that a CSV cell or a JSON string holds as text.
MESSAGES_AS_TEXT = re.compile(r""""?\s*(\[\s*)?\{""")
QUOTED_ROLE = re.compile(r"""["'](role|from)\\*["']\s*:""")


def parse_messages(text: str, field: str, where: str):
    """Parse text that is a list of messages, as JSON or as Python writes it. Other text is returned
    unchanged."""
    if not MESSAGES_AS_TEXT.match(text.lstrip()) or not QUOTED_ROLE.search(text):
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
    messages = value if isinstance(value, list) else [value]
    return value if all(map(is_message, messages)) else text


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
    # Several answers share the beginning that the first shares with each of the others.
    prompts = [split_prompt(texts[0], text) for text in texts[1:]]
    prompt = min(prompts, key=len)
    return prompt, [text[len(prompt):] for text in texts]


def split_conversation(prompt, answers_by_field, where):
    """Separate prompt and answers, as split_row, where one of them is a list of messages."""
    answers = list(answers_by_field.values())
    if prompt is None and any(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: one of {' and '.join(answers_by_field)} is text, the other a "
                        "list of messages; without a prompt, both must be lists")
    answers = [as_messages("assistant", answer) for answer in answers]
    # Answers that continue the prompt.
    if prompt is not None and all(begins_with(answer, ("assistant", "tool")) for answer in answers):
        return move_tool_outputs(as_messages("user", prompt), answers)
    # Answers that are whole dialogues and repeat the prompt.
    shared = prompt if isinstance(prompt, list) else split_messages(answers)
    contents = [content_text(message).strip() for message in shared]
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


def as_messages(role: str, value) -> list:
    """Turn a text into one message of this role, and return a list of messages unchanged."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def with_system(messages: list, system: str, where: str) -> list:
    """Put the text of a column before the messages, as their system message."""
    if not system.strip():
        return messages
    if begins_with(messages, ("system", "developer")):
        if content_text(messages[0]).strip() == system.strip():
            return messages
        raise UserError(f"{where}: has a system message and another one in the column 'system'; "
                        "remove one of them")
    return [{"role": "system", "content": system}, *messages]
