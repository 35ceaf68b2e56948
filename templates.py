"""Writes a row, text or messages, as the strings that the tokenizer gets, and checks them.

A chat template is a program. For each row of messages it runs once for the prompt, as a server runs
it for a request, and once for the prompt with each answer:

    messages        user: hi    assistant: hello
    prompt          <|user|>hi<|end|><|assistant|>
    whole           <|user|>hi<|end|><|assistant|>hello<|end|>

Four properties make such a row trainable, and `text_of_messages` checks each row for them:

    complete    a whole has every message, in order (written.py)
    served      a whole begins with the prompt, so training and serving see the same prompt
    own words   an answer ends with a turn of the assistant, and only its turns are scored
    no control  no message spells a control token such as <|im_end|>

A row without one of the first, third and fourth is dropped. If the template writes only the end of
the prompt otherwise, such as a generation prompt that opens <think>, the row is kept, counted and
named.

An answer of several turns runs the template once more for each turn, to find its characters in the
whole. The scored ones are in brackets:

    <|user|>rain?<|end|><|assistant|>[CALL<|end|>]<|tool|>wet<|end|><|assistant|>[Yes.<|end|>]

Text in a message that spells a control token would become that token, and end or open a turn. TRL
1.16 encodes it so, and vLLM passes contents to the template without escaping them; here such a row
is dropped. A tokenizer with split_special_tokens encodes it as text, so the row is kept.
"""
import functools
import inspect
import json
import os
import re
from collections.abc import Callable
from typing import NamedTuple

from errors import UserError
from limits import run_limited
from loading import leaves_out, loses
from written import (
    REASONING_KEYS,
    REASONING_TAGS,
    content_text,
    find_loss,
    has_all,
    parse_arguments,
    reasoning_text,
    squeeze,
    without_reasoning,
    words_of,
)

# What can happen to the text of a row that is kept, and the words of the report.
TEXT_NOTES = {
    "unserved": "answers follow another prompt than the chat template's generation prompt",
    "prefilled": "the prompt ends with the beginning of the assistant's answer",
    "forgotten": "the chat template leaves out the reasoning of earlier turns",
    "toolless": "the chat template does not write the tools of the row",
    "control": "text that spells a control token becomes that token",
}


class RowText(NamedTuple):
    """A row as text, ready for the tokenizer."""
    prompt: str
    answers: list  # the answers without prompt, to find empty and equal answers
    wholes: list  # prompt + answer, for each answer
    problem: str = ""  # why the row is dropped, or ""
    notes: tuple = ()  # keys of TEXT_NOTES
    # For each answer the scored characters of its whole, [(start, stop), ...], or () where all of
    # the whole behind the prompt is scored.
    scored: tuple | list = ()
    images: int = 0  # number of images in the prompt


class SpecialTokens(NamedTuple):
    """The control tokens of a tokenizer: their texts, and a pattern that finds one in a text."""
    texts: tuple
    pattern: re.Pattern
    bos: str
    eos: str


def read_special_tokens(tokenizer) -> SpecialTokens:
    special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = tuple(token.content for token in special)
    # Tags around reasoning are ordinary text of an answer, whatever the tokenizer calls them.
    alternatives = "|".join(re.escape(text) for text in texts if not REASONING_TAGS.fullmatch(text))
    # A tokenizer with split_special_tokens encodes such text as ordinary text.
    if getattr(tokenizer, "split_special_tokens", False):
        alternatives = ""
    # (?!) never matches.
    pattern = re.compile(alternatives or "(?!)")
    return SpecialTokens(texts, pattern, tokenizer.bos_token or "", tokenizer.eos_token)


# --- Rows of text ---------------------------------------------------------------------------------

def text_of_texts(prompt: str, answers: list, has_own_prompt: bool,
                  special: SpecialTokens) -> RowText:
    """Turn a prompt and answers, all of them text, into RowText.

    has_own_prompt    whether the prompt is a field of its own, which may be empty, or was searched
                      inside the answers
    """
    answers = [strip_after_end(answer, special.eos) for answer in answers]
    wholes = [prompt + answer for answer in answers]
    problem = ""
    if not has_own_prompt and not prompt.strip():
        problem = "no prompt"
    # BOS in front and a control token that ends an answer are where they belong.
    inside = [prompt.removeprefix(special.bos)]
    inside += [remove_end(answer, special.texts) for answer in answers]
    notes = ("control",) if any(map(special.pattern.search, inside)) else ()
    return RowText(prompt, answers, wholes, problem, notes, [()] * len(answers))


def strip_after_end(text, ends):
    """Remove white space after a token that ends the text. A model that wrote this token has
    stopped, so it never writes the white space."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(ends) else text


def remove_end(text, ends):
    """Remove the control token at the end of a text."""
    if text.endswith(ends):
        return text[:max(text.rfind(end) for end in ends)]
    return text


# --- Rows of messages -----------------------------------------------------------------------------

ASSISTANT = ("assistant",)
MOST_ADDED = 1_000_000  # characters that a template may add to a row, for instructions


def render(messages, tokenizer, where, options, **served):
    """Write messages as text by the tokenizer's chat template."""
    if not messages:
        return ""
    # A template is a program and raises exceptions of any kind.
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options, **served)
    except MemoryError:  # see limits.py
        raise
    except Exception as error:
        raise UserError(f"{where}: the chat template fails on this row: {error}") from error
    if len(text) <= MOST_ADDED:
        return text
    given = sum(map(len, list_strings([messages, options])))
    if len(text) > MOST_ADDED + 10 * given:
        raise UserError(f"{where}: the chat template writes {len(text):,} characters for messages "
                        f"of {given:,}; pass another one by --chat_template FILE")
    return text


def list_strings(value):
    """List all texts inside nested lists and dicts, keys included."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    strings = []
    if isinstance(value, list):
        for item in value:
            strings += list_strings(item)
    return strings


def texts_of_rows(text_of_row: Callable, count: int, ids: list[str]) -> list[RowText]:
    """Return [text_of_row(i) for each i below count], where the rows hold messages. The chat
    template is a program of the model's folder, so it gets limits."""
    names = [f"{where}: the chat template" for where in ids]
    advice = "; pass another one by --chat_template FILE"
    return run_limited(text_of_row, list(range(count)), names, advice)


def text_of_messages(prompt: list, answers: list, tokenizer, special: SpecialTokens, where: str,
                     options: dict | None = None) -> RowText:
    """Turn prompt and answers, lists of messages, into RowText.

    The template gets the messages as they are. If it fails on them or loses some of their text, it
    gets them in the other forms that templates expect, see `rewrite`.

    options    keyword arguments for the chat template: tools, enable_thinking, ...
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: the row holds messages, and the tokenizer has no chat template; "
                        "pass one by --chat_template FILE")
    options = options or {}
    check_options(options, tokenizer, where)
    trained = [[is_trained(message, where) for message in answer] for answer in answers]
    prompt = [read_keys(message, where) for message in prompt]
    answers = [[read_keys(message, where) for message in answer] for answer in answers]
    problem = check_turns(prompt, answers, trained)
    if problem:
        return drop_row(map(join_words, answers), problem)
    # A finished turn of the assistant that ends the prompt is followed by another one. Templates
    # may write it otherwise where it is the last, so it is an unscored turn of the answers.
    if len(prompt) > 1 and begins_with(prompt[-1:], ASSISTANT) and not is_prefill(prompt, answers):
        answers = [prompt[-1:] + answer for answer in answers]
        trained = [[False, *are_trained] for are_trained in trained]
        prompt = prompt[:-1]

    write = functools.partial(render, tokenizer=tokenizer, where=where, options=options)
    tools = list_strings(options.get("tools"))
    tried, dropped, failure = [], None, None
    for form, other_arguments in FORMS:
        change = functools.partial(rewrite, form=form, other_arguments=other_arguments)
        row = [list(map(change, messages)) for messages in (prompt, *answers)]
        if row in tried:
            continue
        tried.append(row)
        try:
            text = write_row(row[0], row[1:], trained, write, special, tools)
        except UserError as error:
            failure = failure or error
            continue
        if not text.problem:
            return note_tools(text, options)
        dropped = dropped or text
    if dropped is None:
        raise failure
    return dropped


def drop_row(answers, problem):
    """Make the RowText of a row that is dropped."""
    answers = list(answers)
    return RowText("", answers, [""] * len(answers), problem, (), [()] * len(answers))


def join_words(messages):
    return "".join(map(words_of, messages))


# --- What the template gets -----------------------------------------------------------------------

# The forms of a message in the order in which they are tried: of its content, and whether the
# arguments of its tool calls change, see `rewrite`.
FORMS = (("as it is", False), ("text", False), ("as it is", True), ("text", True),
         ("parts", False), ("parts", True))

def check_options(options, tokenizer, where):
    """Raise a UserError for an argument of the template that the trainer sets."""
    if not options:
        return
    own = inspect.signature(tokenizer.apply_chat_template).parameters.keys()
    for name in options:
        if name == "messages" or (name in own and name not in ("tools", "documents")):
            raise UserError(f"{where}: the argument {name!r} of the chat template is set by the "
                            "trainer; remove it from --template_kwargs")


def is_trained(message, where):
    """Return whether a message of an answer is scored: one of the assistant without
    "train": false."""
    train = message.get("train")
    if train not in (None, True, False):
        raise UserError(f"{where}: a message has train = {train!r}; it must be true or false")
    return message["role"] == "assistant" and train in (None, True)


def read_keys(message, where):
    """Return the keys of a message that the template gets, as transformers 5.24 passes them to
    it: null is no key, and reasoning has each of its names."""
    kept = {}
    for key, value in message.items():
        if key != "train" and value is not None:
            kept[key] = value
    for key in REASONING_KEYS:
        if not isinstance(kept.get(key, ""), str):
            raise UserError(f"{where}: a message has {key} = {kept[key]!r}; it must be text")
    reasoning = next((kept[key] for key in REASONING_KEYS if key in kept), None)
    if reasoning is not None:
        kept = {"thinking": reasoning} | kept | {"reasoning_content": reasoning}
    # images.py has read the images of a prompt. Parts of other types cannot be trained on.
    content = kept.get("content", "")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, (str, list)) or not all(map(is_text_part, parts)):
        raise UserError(f"{where}: a message has the content {str(content)[:60]}; it must be text, "
                        'or a list of {"type": "text", "text": TEXT}')
    check_calls(kept.get("tool_calls", []), where)
    return kept


def is_text_part(part):
    if part == {"type": "image"}:
        return True
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        return False
    return isinstance(part.get("text"), str)


def check_calls(calls, where):
    """Raise a UserError for tool calls without the name of a function."""
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: a message has the tool call {str(call)[:60]}; it must be "
                            '{"type": "function", "function": {"name": TEXT, "arguments": ...}}')


def rewrite(message, form, other_arguments):
    """Return a message in another form that templates expect.

    form               of the content. "text": one text instead of a list of parts or of nothing,
                       for templates that add a content to other text; "parts": a list of parts
                       instead of one text, for templates that look for images in it
    other_arguments    the arguments of tool calls as an object instead of as the JSON of one,
                       as vLLM passes them, or the other way round
    """
    content = message.get("content")
    has_images = isinstance(content, list) and {"type": "image"} in content
    if form == "text" and not has_images:
        message = message | {"content": content_text(message)}
    if form == "parts" and isinstance(content, str) and content:
        message = message | {"content": [{"type": "text", "text": content}]}
    if other_arguments and message.get("tool_calls"):
        calls = list(map(change_arguments, message["tool_calls"]))
        message = message | {"tool_calls": calls}
    return message


def change_arguments(call):
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_arguments(function)
    else:
        arguments = json.dumps(arguments, ensure_ascii=False)
    changed = function | {"arguments": arguments}
    return call | {"function": changed} if "function" in call else changed


# --- Prompt and wholes ----------------------------------------------------------------------------

def write_row(prompt, answers, trained, write, special, tools):
    """Write a row by the template and check it.

    trained    for each answer, whether each message is scored
    write      the template: a function of messages
    tools      the texts in the tools of the row
    """
    texts = list(map(join_words, answers))
    follows = all(begins_with(answer, ASSISTANT) for answer in answers)
    is_prefilled = is_prefill(prompt, answers)
    dialogues = [prompt + answer for answer in answers]
    served = {"add_generation_prompt": follows}
    if is_prefilled:
        dialogues = [continue_turn(prompt, answer) for answer in answers]
        served = {"continue_final_message": True}
    control = find_control(dialogues, tools, special)
    if control:
        return drop_row(texts, f"text that spells the control token {control}")
    prompt_text = write(prompt, **served)
    wholes = [remove_padding(write(dialogue), special) for dialogue in dialogues]

    # The prompt that the answers follow must be the prompt that is served.
    notes, shared = {"prefilled"} if is_prefilled else set(), len(prompt_text)
    for whole in wholes:
        start = find_start(prompt_text, prompt, whole, write, special)
        if start is None or (is_prefilled and start < len(prompt_text)):
            return drop_row(
                texts, "the chat template writes the prompt differently when an answer follows")
        if follows and start < len(prompt_text):
            notes.add("unserved")
        shared = min(shared, start)
    # The template must have written every message.
    first = len(prompt) - is_prefilled
    for dialogue, whole in zip(dialogues, wholes):
        if not has_all(dialogue, whole):
            loss, is_forgotten = find_loss(dialogue, whole, first)
            if loss:
                return drop_row(texts, loss)
            if is_forgotten:
                notes.add("forgotten")

    # The turns of others inside an answer are not scored.
    scored = []
    for dialogue, whole, are_trained in zip(dialogues, wholes, trained):
        spans = ()
        if len(are_trained) > 1 or not follows:
            opened = prompt_text if follows else None
            spans = find_spans(dialogue, first, are_trained, opened, whole, write, special)
        if spans is None:
            return drop_row(texts, "the chat template rewrites an answer as its turns follow")
        scored.append(spans)
    return RowText(prompt_text[:shared], texts, wholes, "", tuple(sorted(notes)), scored)


def begins_with(messages: list, roles: tuple) -> bool:
    return len(messages) > 0 and messages[0]["role"] in roles


def is_prefill(prompt, answers):
    """Return whether the prompt ends with a turn of the assistant that the answers continue."""
    if not begins_with(prompt[-1:], ASSISTANT) or prompt[-1].get("tool_calls"):
        return False
    return all(begins_with(answer, ASSISTANT) for answer in answers)


def continue_turn(prompt, answer):
    """Join the last turn of a prompt and the first turn of an answer, without anything between.

    An answer may also repeat the words of that turn. A single word may repeat by chance.
    """
    start, content = content_text(prompt[-1]), content_text(answer[0])
    is_repeated = len(start.split()) > 1 and content.startswith(start.rstrip())
    if not is_repeated:
        content = start + content
    return prompt[:-1] + [prompt[-1] | answer[0] | {"content": content}] + answer[1:]


def remove_padding(whole, special):
    """Remove what a model never writes after the token that ends its turn: white space and, in
    templates like Phi-3's, an EOS that closes the text if no generation prompt is asked for."""
    whole = strip_after_end(whole, special.texts)
    shorter = whole.removesuffix(special.eos).rstrip()
    return shorter if shorter.endswith(special.texts) else whole


def check_turns(prompt, answers, trained):
    """Return why the turns of a row cannot be trained on, or ""."""
    if not prompt:
        return "no prompt"
    for answer, are_trained in zip(answers, trained):
        # The model does not write the turns of other roles, so they are not scored.
        if answer and answer[-1]["role"] != "assistant":
            return f"an answer ends with a turn of the {answer[-1]['role']}"
        if answer and not any(are_trained):
            return "no scored turn in an answer"
        own = [message for message, is_own in zip(answer, are_trained) if is_own]
        if not join_words(own).strip():
            return "empty answer"
    return ""


def find_control(dialogues, tools, special):
    """Return the first control token that a text of the messages spells, or ""."""
    for dialogue in dialogues:
        texts = list_strings(dialogue)
        for message in dialogue:
            if isinstance(message.get("content"), list):  # a token may be in two parts
                texts.append(content_text(message))
        for text in [*texts, *tools]:
            found = special.pattern.search(text)
            if found:
                return found.group()
    return ""


def note_tools(text, options):
    """Add a note to a row whose tools the template leaves out, as it does for a request."""
    for tool in options.get("tools") or []:
        name = tool.get("function", tool).get("name") if isinstance(tool, dict) else None
        if name and name not in text.prompt:
            return text._replace(notes=(*text.notes, "toolless"))
    return text


# --- The scored characters of an answer -----------------------------------------------------------

def find_spans(dialogue, first, trained, opened, whole, write, special):
    """Return the [(start, stop), ...] of the scored turns in the whole, or None where the template
    writes a turn otherwise as soon as others follow.

    first      the index of the first message of the answer
    trained    whether each message of the answer is scored
    opened     the text of the prompt, if it ends with a generation prompt or a prefill
    """
    spans = []
    for index, is_scored in enumerate(trained, first):
        if not is_scored:
            continue
        begun = opened if index == first else None
        try:
            span = find_turn(dialogue, index, begun, whole, write, special)
        except UserError:  # the template writes no dialogue that ends with this turn
            span = None
        if span is None:
            return None
        spans.append(span)
    return spans


def find_turn(dialogue, index, opened, whole, write, special):
    """Return the (start, stop) of a turn of the assistant in the whole, or None."""
    # Later turns may remove the reasoning of the turns before this one.
    short = list(map(without_reasoning, dialogue[:index]))
    histories = [dialogue[:index]]
    if short != dialogue[:index]:
        histories.append(short)
    for history in histories:
        prompt_text = opened or write(history, add_generation_prompt=True)
        start = find_start(prompt_text, history, whole, write, special)
        if start is None and begins_with(history[-1:], ASSISTANT):
            start = find_next_turn(dialogue, index, prompt_text, whole, write, special)
        if start is None:
            continue
        if index == len(dialogue) - 1:
            return start, len(whole)
        text = remove_padding(write([*history, dialogue[index]]), special)
        if text.startswith(whole[:start]):
            stop = find_stop(text[start:], dialogue[index], whole, start, special)
            if stop is not None:
                return start, stop
    return None


def find_next_turn(dialogue, index, prompt_text, whole, write, special):
    """Return where a turn of the assistant begins that follows another one, or None. Some
    templates write the one before otherwise where it is the last, as Qwen3's does."""
    opening = prompt_text.removeprefix(write(dialogue[:index])).strip()
    before = find_turn(dialogue, index - 1, None, whole, write, special)
    if before is None or not opening:
        return None
    between = whole[before[1]:]
    start = len(whole) - len(between.lstrip())
    if not whole.startswith(opening, start):
        return None
    start += len(opening)
    # White space at the end of the generation prompt is not scored.
    return start + len(prompt_text) - len(prompt_text.rstrip())


def find_start(prompt_text, prompt, whole, write, special):
    """Return where the answer begins in a whole, or None if its prompt is another one.

    prompt_text    the prompt with what opens a turn of the assistant. Where another text opens it
                   in the whole, the answer begins where they differ, or where the prompt opens
                   <think>
    """
    if whole.startswith(prompt_text):
        return len(prompt_text)
    turns = write(prompt).rstrip().removesuffix(special.eos).rstrip()
    if not whole.startswith(turns):
        return None
    tag = REASONING_TAGS.search(prompt_text, len(turns))
    if tag and whole.startswith(prompt_text[:tag.start()]):
        return tag.start()
    return len(os.path.commonprefix([prompt_text, whole]))


def find_stop(turn, message, whole, start, special):
    """Return where a turn that begins at `start` ends in the whole, or None.

    turn    the text of the turn where no other follows: it may have more reasoning, an empty
            <think></think>, another token at its end, or EOS behind it
    """
    stop = find_end_of(turn.rstrip(), message, whole, start)
    if stop is not None:
        return stop
    # gpt-oss ends the last turn by <|return|> and the others by <|end|>.
    stop = find_end_of(remove_end(turn, special.texts), message, whole, start)
    ends = [end for end in special.texts if stop is not None and whole.startswith(end, stop)]
    if ends:
        return stop + max(map(len, ends))
    return find_end_of(turn.removesuffix(special.eos).rstrip(), message, whole, start)


def find_end_of(turn, message, whole, start):
    """Return where a turn ends that begins at `start` in the whole, perhaps without its reasoning,
    the tags of reasoning and white space around them. Return None if it is not there."""
    begins = [0]
    for tag in REASONING_TAGS.finditer(turn):
        space = len(turn) - len(turn[tag.end():].lstrip())
        begins += range(tag.end(), space + 1)
    for begin in begins:
        left_out = squeeze(REASONING_TAGS.sub("", turn[:begin]))
        if left_out in ("", squeeze(reasoning_text(message))):
            if whole.startswith(turn[begin:], start):
                return start + len(turn) - begin
    return None


def unscored_tokens(offsets: list, start: int, spans: list) -> list[int]:
    """Return the positions, in an answer, of the tokens that are not scored. A token is scored if
    its first character is in a span.

    offsets    the (begin, end) of the characters of each token of the whole
    start      the number of the answer's first token in the whole
    spans      [(start, stop), ...] in order, see RowText.scored
    """
    positions = []
    for position, (begin, _) in enumerate(offsets[start:]):
        if not any(first <= begin < stop for first, stop in spans):
            positions.append(position)
    return positions


# --- Text that a tokenizer has no token for -------------------------------------------------------

NO_TOKEN = "the tokenizer has no token for some of its text, and no unknown token"


def refuse_unwritable(texts: list[RowText], tokenizer) -> list[RowText]:
    """Give a problem to each row with text that the tokenizer would leave out, or fails on."""
    if not leaves_out(tokenizer):
        return texts
    checked = []
    for text in texts:
        strings = [text.prompt, *text.wholes]
        if not text.problem and any(loses(tokenizer, string) for string in strings):
            text = drop_row(text.answers, NO_TOKEN)
        checked.append(text)
    return checked
