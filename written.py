"""Checks that a text has every message that a chat template had to write.

    messages    user: rain?    assistant: thinks "look it up", calls find(city="Oslo")
    text        <|user|>rain?<|end|><|assistant|><think>look it up</think>
                {"name": "find", "arguments": {"city": "Oslo"}}<|end|>

A message has up to three parts, in this order: reasoning, content, tool calls. Each must be in the
text, behind the message before. Templates may change white space, write the output of a tool as
JSON, move a system message, write the arguments of a call as JSON, as XML or as Python does, and
leave out the reasoning of earlier turns. None of these is a loss: a server does the same.
"""
import json
import re

# transformers fills `reasoning_content` and `thinking` from any of these.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
REASONING_TAGS = re.compile(r"</?think(?:ing)?>|\[/?THINK\]")
SYSTEM = ("system", "developer")


# --- The parts of a message -----------------------------------------------------------------------

def content_text(message: dict) -> str:
    """Return the content of a message as one text: parts are joined, and no content is ""."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)  # an image has none


def reasoning_text(message: dict) -> str:
    """Return the reasoning of a message, which is a key of its own or ends with </think>."""
    for key in REASONING_KEYS:
        if message.get(key):
            return message[key]
    before, end, _ = content_text(message).rpartition("</think>")
    return REASONING_TAGS.sub("", before) if end else ""


def called_functions(message: dict) -> list[dict]:
    """Return the {name, arguments} of each tool call of a message."""
    return [call.get("function", call) for call in message.get("tool_calls", [])]


def words_of(message: dict) -> str:
    """Return all that a message says as one text, to find empty and equal answers."""
    words = content_text(message)
    if any(message.get(key) for key in REASONING_KEYS):
        words = f"<think>{reasoning_text(message)}</think>{words}"
    if message.get("tool_calls"):
        words += json.dumps(called_functions(message), ensure_ascii=False)
    return words


def without_reasoning(message: dict) -> dict:
    """Return a turn of the assistant as templates write an earlier one."""
    if message["role"] != "assistant":
        return message
    kept = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    content = content_text(message)
    if "</think>" in content:
        kept["content"] = content.rpartition("</think>")[2]
    return kept


def squeeze(text: str) -> str:
    """Remove all white space."""
    return "".join(text.split())


# --- Is each part in the text? --------------------------------------------------------------------

def has_all(messages: list, text: str) -> bool:
    """Return whether the text has the content of every message, in order. This quick check covers
    messages with nothing but a text; it returns False for others."""
    position = 0
    for message in messages:
        content = message.get("content")
        if not isinstance(content, str) or not message.keys() <= {"role", "content"}:
            return False
        content = content.strip()
        start = text.find(content, position)
        if start < 0:
            return False
        position = start + len(content)
    return True


def find_loss(messages: list, text: str, prompt_count: int) -> tuple[str, bool]:
    """Return (what the text lacks of the messages, or "", whether earlier reasoning is left out).

    prompt_count    the number of messages before the answer
    """
    # Templates leave out no reasoning, that before the last question, or all but the last.
    questions = [i for i, message in enumerate(messages) if message["role"] == "user"]
    text, loss = squeeze(text), ""
    for count in (0, max(questions, default=0), len(messages) - 1):
        shorter = [without_reasoning(message) for message in messages[:count]]
        loss = find_loss_in_order(shorter + messages[count:], text, prompt_count)
        if not loss:
            return "", shorter != messages[:count]
    return loss, False


def find_loss_in_order(messages, text, prompt_count):
    """Return what a text, without white space, lacks of the messages, or ""."""
    position, gaps = 0, []
    for index, message in enumerate(messages):
        if message["role"] in SYSTEM:
            continue
        for kind, pieces in list_parts(message):
            start, end = find_pieces(pieces, text, position)
            if start < 0:
                return name_loss(message, kind, index < prompt_count)
            gaps.append(text[position:start])
            position = end
        if is_written_as_code(message, text):
            return name_loss(message, "text", index < prompt_count)
    gaps.append(text[position:])

    # A system message may be anywhere outside the other messages.
    outside = "\n".join(gaps)
    for message in messages:
        if message["role"] in SYSTEM and squeeze(content_text(message)) not in outside:
            return name_loss(message, "text", True)
    return ""


def list_parts(message):
    """List (kind, pieces) for each part of a message. A piece is a list of the forms in which a
    template may write it."""
    parts = []
    if any(message.get(key) for key in REASONING_KEYS):
        parts.append(("reasoning", [written_forms(reasoning_text(message))]))
    parts.append(("text", list(map(written_forms, texts_between_images(message)))))
    for function in called_functions(message):
        pieces = [written_forms(function["name"])]
        for value in list_values(parse_arguments(function)):
            pieces.append(written_forms(value))
        parts.append(("tool calls", pieces))
    return parts


def texts_between_images(message):
    """List the texts of a message that the template writes without a gap."""
    texts = [""]
    content = message.get("content")
    for part in content if isinstance(content, list) else [{"text": content_text(message)}]:
        if "text" in part:
            texts[-1] += part["text"]
        else:
            texts.append("")
    return texts


def find_pieces(pieces, text, position):
    """Find pieces in any order from a position on. Returns (start, end) around them, or (-1, -1)
    where one is missing."""
    starts, ends = [], []
    for forms in pieces:
        places = [(text.find(form, position), len(form)) for form in forms]
        found = [place for place in places if place[0] >= 0]
        if not found:
            return -1, -1
        start, length = min(found)
        starts.append(start)
        ends.append(start + length)
    return min(starts), max(ends)


def written_forms(value):
    """List the forms in which a template may write a value, without white space: as text, as JSON
    and as Python does."""
    if not isinstance(value, str):
        return [squeeze(json.dumps(value)), squeeze(str(value))]
    forms = []
    for text in (value, *as_json(value.strip())):
        if squeeze(text) not in forms:
            forms.append(squeeze(text))
    return forms


def as_json(text):
    """Return a text as JSON has it, without quotes, with letters of all scripts and with ASCII."""
    return json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def parse_arguments(function: dict):
    """Return the arguments of a call, parsed where they are the JSON of an object."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments


def list_values(value):
    """List the texts, numbers, ... inside nested lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return [] if value is None else [value]
    values = []
    for item in value:
        values += list_values(item)
    return values


def is_written_as_code(message, text):
    """Return whether a template that expects a text wrote a list as Python prints it, or one that
    expects an object wrote its JSON as a JSON string."""
    forms = []
    content = message.get("content")
    if isinstance(content, list):
        forms += [str(content), json.dumps(content), json.dumps(content, ensure_ascii=False)]
    for function in called_functions(message):
        arguments = function.get("arguments")
        if isinstance(arguments, dict) and arguments:
            forms.append(str(arguments))
        elif isinstance(arguments, str) and '"' in arguments:
            forms += as_json(arguments)
    return any(squeeze(form) in text for form in forms)


def name_loss(message, kind, is_in_prompt):
    role = message["role"]
    if kind == "tool calls":
        return f"the chat template leaves out the tool calls of the {role}"
    if is_in_prompt or role != "assistant":
        return f"the chat template leaves out {kind} of the {role}"
    if kind == "reasoning":
        return "the chat template leaves out the reasoning of an answer"
    if "</think>" in content_text(message):
        return "the chat template leaves out the reasoning before </think>"
    return "the chat template leaves out text of an answer"
