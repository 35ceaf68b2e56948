"""Lists the columns of a row, and the keys of a message, that are not read.

The report names them with their number of rows. A row is an error if one of them holds a part of
what the model should see (a system prompt, an image), or says which answer is better and no layout
read it (labels, winner):

    {"prompt": ..., "chosen": ..., "rejected": ..., "source": "web", "system": "Be brief."}
                                                     listed           an error

Names are compared by `plain_name`.
"""
import functools
import json
import re
from collections.abc import Callable

from errors import UserError, nearest

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
    "attachment", "file", "media", "picture", "photo",
}
# Columns with the prompt under another name, in a row whose answers do not show where it ends.
PROMPT_NAMES = {
    "question", "instruction", "query", "problem", "userprompt", "usermessage", "prompttext",
    "message", "conversation", "trajectory", "dialogue", "request", "post", "user", "human",
    "input", "context", "history",
}
# False says that a row or a message should not be trained on.
SWITCHES = {"train", "trainable", "loss", "label"}
# Only a column of the name `weight` is read, so these may only be 1.
WEIGHTS = {"weight", "sampleweight", "lossweight"}
# Columns that say which answer is good or better, or by how much, as `letters_and_digits`: score_0
# is a verdict, and score is not.
VERDICTS = {
    "label", "labels", "ktotag", "betterresponseid", "saferresponseid", "preference",
    "overallpreference", "preferencestrength", "winner", "winnermodela", "winnermodelb", "margin",
    "scorea", "scoreb", "score0", "score1",
}


# Texts that hold nothing.
BLANK = ("", "[]", "{}", "null", "None", "nan")


@functools.lru_cache(maxsize=1024)
def plain_name(name):
    """Return the letters of a name in lower case, without a plural s: `Tools`, `tool` -> tool."""
    return re.sub(r"[^a-z]", "", str(name).lower()).removesuffix("s")


def letters_and_digits(name):
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def is_blank(value):
    """Return whether a value holds nothing: no text and no number, however deep."""
    pending = [value]  # a list instead of recursion, which a value nested 1000 deep would end
    while pending:
        item = pending.pop()
        if isinstance(item, str):
            if item.strip() not in BLANK:
                return False
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list):
            pending += item
        elif item is not None:
            return False
    return True


def texts_of(value):
    """Return the texts of a field: a text, or the contents of messages."""
    texts = []
    for item in value if isinstance(value, list) else [value]:
        content = item.get("content") if isinstance(item, dict) else item
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                texts.append(text)
    return texts


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
    written = "" if isinstance(value, (list, dict)) else str(value).strip()
    if plain in WEIGHTS and written not in ("1", "1.0", "True"):
        return "it is a weight, and every text would count the same"
    if plain in SWITCHES and written.lower() == "false":
        return "it says false, and the text would be trained on"
    holds_content = isinstance(value, (str, list, tuple, dict, bytes))
    if plain in context and holds_content and not is_repeated(value, texts):
        return "the model would not see it"
    return ""


def list_unread(row: dict, read: set, ignored: tuple, texts: list, needs_prompt: bool,
                has_verdict: bool, layouts_that_read: Callable, where: str) -> list:
    """List the columns that are not read.

    read               the names of the columns that are read
    ignored            the names of --ignore_columns
    texts              the texts of the prompt, or of the first answer with the prompt inside
    needs_prompt       whether the row does not show where its prompt ends
    has_verdict        whether the layout reads from a column which answer is better
    layouts_that_read  a function of a column's name: the advice which layout reads it, or ""
    """
    unread = []
    for name, value in row.items():
        if name in read or (is_blank(value) and name not in ignored):
            continue
        may_be_prompt = needs_prompt and (plain_name(name) in PROMPT_NAMES or is_question(value))
        context = CONTEXT | {plain_name(name)} if may_be_prompt else CONTEXT
        reason = why_it_matters(name, value, context, texts)
        if not has_verdict and letters_and_digits(name) in VERDICTS:
            reason = "it says which answer is good or better, or by how much"
        if reason and name not in ignored:
            advice = advise(name, may_be_prompt, layouts_that_read(name))
            raise UserError(f"{where}: the column '{name}' is not read: {reason}; {advice}; "
                            f"--ignore_columns {name} trains without it")
        unread.append(name)
    return unread


def advise(name, may_be_prompt, layouts):
    """Say what to do about a column that matters and is not read."""
    advice = "write it into the prompt, or remove the column"
    if plain_name(name) in WEIGHTS:
        advice = "--columns weight=" + str(name) + " reads it"
    elif plain_name(name) == "margin":
        advice = "losses with scores read chosen_score and rejected_score"
    elif plain_name(name) == "chattemplatekwarg":
        advice = "--template_kwargs gives the chat template the same for all rows"
    elif plain_name(name) in SWITCHES or letters_and_digits(name) in VERDICTS:
        advice = "remove the row or the column"
    if may_be_prompt:
        advice = f"if it is the prompt, pass --columns prompt={name}"
    return f"{layouts}, or {advice}" if layouts else advice


def is_question(value):
    return isinstance(value, str) and value.rstrip().endswith("?")


def list_unread_keys(messages: list, field: str, kept: tuple, ignored: tuple, where: str) -> list:
    """List the keys of the messages of one field that are not read: `chosen[].id`.

    kept    the keys that messages keep besides role and content
    """
    unread = {}
    for message in messages:
        read = list(kept)
        # ShareGPT's names, where the others are missing.
        for name, other in (("role", "from"), ("content", "value")):
            read.append(name if message.get(name) is not None else other)
        for key, content in message.items():
            if (key in read and key not in ignored) or (is_blank(content) and key not in ignored):
                continue
            if key in ("role", "content"):
                continue
            reason = why_it_matters(key, content, MESSAGE_CONTEXT, texts_of([message]))
            if reason and key not in ignored:
                raise UserError(
                    f"{where}: the field '{field}' holds a message with {key}, which is not read: "
                    f"{reason}; {advise_key(key)}; --ignore_columns {key} trains without it")
            unread[f"{field}[].{key}"] = True
    return list(unread)


def advise_key(key):
    """Say what to do about a key of a message that matters and is not read."""
    if plain_name(key) in SWITCHES | WEIGHTS:
        return 'write "train": false to leave the message out of the loss'
    if "think" in plain_name(key) or "reason" in plain_name(key):
        return "name it reasoning_content, or write it into the content"
    return "write it into the content"


def count_unread(text, unread: dict):
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
            raise UserError(f"--ignore_columns {name}: no row has an unread column or message key "
                            f"of this name; unread are: {listed}{nearest(name, existing)}")
