"""Writes a row, text or messages, as the strings that the tokenizer gets, and checks them.

A chat template is a program. For each row of messages it runs once for the prompt, as a server runs
it for a request, and once for the prompt with each answer:

    messages        user: hi    assistant: hello
    prompt          <|user|>hi<|end|><|assistant|>
    whole           <|user|>hi<|end|><|assistant|>hello<|end|>

Three properties make such a row trainable, and `text_of_messages` checks each row for them:

    complete    a whole has the content of every message, in order; a system message may move
    served      a whole begins with the prompt, so training and serving see the same prompt
    own words   an answer has only turns of the assistant

A row without the first or the last is dropped. If the template writes only the end of the prompt
otherwise, such as a generation prompt that opens <think>, the row is kept, counted and named.
"""
import json
import re
from collections.abc import Callable
from typing import NamedTuple

from errors import UserError
from limits import run_limited
from loading import leaves_out, loses

# What can happen to the text of a row that is kept, and the words of the report.
TEXT_NOTES = {
    "unserved": "answers follow another prompt than the chat template's generation prompt",
    "prefilled": "the prompt ends with the beginning of the assistant's answer",
    "forgotten": "the chat template leaves out the reasoning of earlier turns",
    "control": "text that spells a control token becomes that token",
}


class RowText(NamedTuple):
    """A row as text, ready for the tokenizer."""
    prompt: str
    answers: list  # the answers without prompt, to find empty and equal answers
    wholes: list  # prompt + answer, for each answer
    problem: str = ""  # why the row is dropped, or ""
    notes: tuple = ()  # keys of TEXT_NOTES
    scored: tuple = ()


class SpecialTokens(NamedTuple):
    """The control tokens of a tokenizer: their texts, and a pattern that finds one in a text."""
    texts: tuple
    pattern: re.Pattern
    bos: str
    eos: str


def read_special_tokens(tokenizer) -> SpecialTokens:
    special = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    texts = tuple(token.content for token in special)
    alternatives = "|".join(map(re.escape, texts))
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
    return RowText(prompt, answers, wholes, problem, notes)


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

MOST_ADDED = 1_000_000  # characters that a template may add to a row, for tools and instructions


def render(messages, tokenizer, where, **options):
    """Write messages as text by the tokenizer's chat template."""
    if not messages:
        return ""
    # A template is a program and raises exceptions of any kind.
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except MemoryError:  # see limits.py
        raise
    except Exception as error:
        raise UserError(f"{where}: the chat template fails on this row: {error}") from error
    given = sum(len(message["content"]) for message in messages)
    if len(text) > MOST_ADDED + 10 * given:
        raise UserError(f"{where}: the chat template writes {len(text):,} characters for messages "
                        f"of {given:,}; pass another one by --chat_template FILE")
    return text


def texts_of_rows(text_of_row: Callable, count: int, ids: list[str]) -> list[RowText]:
    """Return [text_of_row(i) for each i below count], where the rows hold messages. The chat
    template is a program of the model's folder, so it gets limits."""
    names = [f"{where}: the chat template" for where in ids]
    advice = "; pass another one by --chat_template FILE"
    return run_limited(text_of_row, list(range(count)), names, advice)


def text_of_messages(prompt: list, answers: list, tokenizer, special: SpecialTokens,
                     where: str, options={}) -> RowText:
    """Turn prompt and answers, lists of messages, into RowText."""
    if tokenizer.chat_template is None:
        raise UserError(f"{where}: the row holds messages, and the tokenizer has no chat template; "
                        "pass one by --chat_template FILE")
    texts = ["".join(message["content"] for message in answer) for answer in answers]

    # A prompt that ends with a turn of the assistant is a prefill: the answers continue that turn.
    is_prefilled = begins_with(prompt[-1:], ("assistant",))
    is_prefilled = is_prefilled and all(begins_with(answer, ("assistant",)) for answer in answers)
    dialogues = [prompt + answer for answer in answers]
    served = {"add_generation_prompt": True}
    if is_prefilled:
        dialogues = [continue_turn(prompt, answer) for answer in answers]
        served = {"continue_final_message": True}
    prompt_text = render(prompt, tokenizer, where, **served)
    wholes = []
    for dialogue in dialogues:
        wholes.append(remove_padding(render(dialogue, tokenizer, where), special))

    problem, notes = check_roles(prompt, answers), set()
    if is_prefilled:
        notes.add("prefilled")
    # The prompt that the answers follow must be the prompt that is served.
    if not problem and not all(whole.startswith(prompt_text) for whole in wholes):
        turns = render(prompt, tokenizer, where).rstrip().removesuffix(special.eos).rstrip()
        if is_prefilled or not all(whole.startswith(turns) for whole in wholes):
            problem = "the chat template writes the prompt differently when an answer follows"
        notes.add("unserved")
    # The template must have written every message.
    for dialogue, whole in zip(dialogues, wholes):
        if not problem and not has_all(dialogue, whole):
            loss, is_forgotten = find_loss(dialogue, whole, len(prompt) - is_prefilled)
            problem = loss
            if is_forgotten:
                notes.add("forgotten")
    contents = [message["content"] for message in prompt]
    if any(map(special.pattern.search, contents + texts)):
        notes.add("control")
    return RowText(prompt_text, texts, wholes, problem, tuple(notes))


def begins_with(messages: list, roles: tuple) -> bool:
    return len(messages) > 0 and messages[0]["role"] in roles


def continue_turn(prompt, answer):
    """Join the last turn of a prompt and the first turn of an answer, without anything between.

    An answer may also repeat the words of that turn. A single word may repeat by chance.
    """
    start, content = prompt[-1]["content"], answer[0]["content"]
    is_repeated = len(start.split()) > 1 and content.startswith(start.rstrip())
    if not is_repeated:
        content = start + content
    return prompt[:-1] + [answer[0] | {"content": content}] + answer[1:]


def remove_padding(whole, special):
    """Remove what a model never writes after the token that ends its turn: white space and, in
    templates like Phi-3's, an EOS that closes the text if no generation prompt is asked for."""
    whole = strip_after_end(whole, special.texts)
    shorter = whole.removesuffix(special.eos).rstrip()
    return shorter if shorter.endswith(special.texts) else whole


def check_roles(prompt, answers):
    """Return why the turns of a row cannot be trained on, or ""."""
    if not prompt:
        return "no prompt"
    for answer in answers:
        for message in answer:
            role = message["role"]
            # The model does not write the turns of other roles, so they must not be scored.
            if role != "assistant":
                return f"turns of the {role} inside an answer"
    return ""


def has_all(messages, text):
    """Return whether the text has the content of every message, in order."""
    position = 0
    for message in messages:
        content = message["content"].strip()
        start = text.find(content, position)
        if start < 0:
            return False
        position = start + len(content)
    return True


def find_loss(messages, text, prompt_count):
    """Return (what the text lacks of the messages, or "", whether earlier reasoning is left out).

    Templates may change white space, write the output of a tool as JSON, move a system message,
    and leave out the reasoning of earlier turns. None of these is a loss: a server does the same.

    prompt_count    the number of messages before the answer
    """
    text, position, gaps, is_forgotten = squeeze(text), 0, [], False
    for index, message in enumerate(messages):
        if message["role"] in ("system", "developer"):
            continue
        forms = written_forms(message, index < prompt_count)
        starts = [text.find(form, position) for form in forms]
        found = [i for i in range(len(forms)) if starts[i] >= 0]
        if not found:
            return name_loss(message, index < prompt_count), is_forgotten
        form, start = forms[found[0]], starts[found[0]]
        is_forgotten = is_forgotten or found[0] == 2
        gaps.append(text[position:start])
        position = start + len(form)
    gaps.append(text[position:])

    # A system message may be anywhere outside the other messages.
    outside = "\n".join(gaps)
    for message in messages:
        is_system = message["role"] in ("system", "developer")
        if is_system and squeeze(message["content"]) not in outside:
            return name_loss(message, True), is_forgotten
    return "", is_forgotten


def squeeze(text):
    """Remove all white space."""
    return "".join(text.split())


def written_forms(message, is_in_prompt):
    """List the forms in which a template may write a content: as text, as JSON, and, for an earlier
    turn of the assistant, without its reasoning."""
    content = message["content"]
    as_json = json.dumps(content.strip(), ensure_ascii=False)[1:-1]
    forms = [squeeze(content), squeeze(as_json)]
    if is_in_prompt and message["role"] == "assistant" and "</think>" in content:
        forms.append(squeeze(content.rpartition("</think>")[2]))
    return forms


def name_loss(message, is_in_prompt):
    if is_in_prompt:
        return f"the chat template leaves out text of the {message['role']}"
    if "</think>" in message["content"]:
        return "the chat template leaves out the reasoning before </think>"
    return "the chat template leaves out text of an answer"


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
            text = RowText("", text.answers, [""] * len(text.wholes), NO_TOKEN)
        checked.append(text)
    return checked
