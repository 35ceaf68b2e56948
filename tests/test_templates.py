"""From messages to text: no turn is lost, added, scored by mistake or put behind another prompt."""

import csv
import json
import os

import pytest
from conftest import make_tokenizer, write_jsonl
from tokenizers import AddedToken, processors

import limits
from data import describe, load_tokens
from errors import UserError
from layouts import Shape
from registry import Needs

BOTH = ("chosen", "rejected")
CONTROL_TOKENS = ["<s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>"]

# The generation prompt comes last in each of these templates.
OPEN = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
PLAIN = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    + OPEN
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A request that asks for no answer is closed with EOS, as a finished text is.
CLOSING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}"
    "{% endif %}"
)


def only(*roles):
    """Make a template that writes the turns of these roles and no others."""
    return (
        "{% for m in messages %}{% if m['role'] in " + repr(list(roles)) + " %}"
        "{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endif %}{% endfor %}" + OPEN
    )


def with_content(expression, generation_prompt="<|assistant|>"):
    """Make a template that writes `expression` of the content c of each turn of the assistant."""
    return (
        "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' %}"
        "{% set c = " + expression + " %}{% endif %}"
        "{{ '<|' + m['role'] + '|>' + c + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + generation_prompt + "' }}{% endif %}"
    )


@pytest.fixture
def read(tmp_path):
    """Load rows with a tokenizer that has this chat template -> prompts, chosen answers and
    rejected answers as text, the report."""

    def run(rows, template=None, sides=BOTH, columns=(), add_bos=False, name="rows.jsonl"):
        tokenizer = make_tokenizer()
        tokens = [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.chat_template = template
        if add_bos:
            add_bos_to(tokenizer)
        path = tmp_path / name
        if isinstance(rows, list):
            write_jsonl(path, rows)
        else:
            path.write_text(rows, encoding="utf-8")
        kept, account = load_tokens(str(path), tokenizer, Needs(answers=sides),
                                    shape=Shape(columns=columns))
        texts = []
        for column in (kept["prompt_ids"], *zip(*kept["answer_ids"])):
            texts.append([tokenizer.decode(ids) for ids in column])
        return *texts, describe(account)

    return run


def add_bos_to(tokenizer):
    tokenizer.bos_token = "<s>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))])


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def tool(content):
    return {"role": "tool", "content": content}


def pair(prompt, chosen="yes", rejected="no"):
    """Make a row of messages. An answer may be a text or a list of messages."""
    answers = []
    for answer in (chosen, rejected):
        answers.append(answer if isinstance(answer, list) else [assistant(answer)])
    return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


GOOD = pair([user("a cat?")])


# --- The prompt is the one that is served ---------------------------------------------------------

def test_a_template_that_closes_a_finished_text_with_eos_gives_good_rows(read):
    rows = [GOOD, pair([system("be kind"), user("hi"), assistant("oh"), user("a cat?")])]
    prompts, chosen, rejected, report = read(rows, CLOSING)
    assert prompts == [
        "<|user|>\na cat?<|im_end|>\n<|assistant|>\n",
        "<|system|>\nbe kind<|im_end|>\n<|user|>\nhi<|im_end|>\n<|assistant|>\noh<|im_end|>\n"
        "<|user|>\na cat?<|im_end|>\n<|assistant|>\n",
    ]
    # The EOS that closes the text follows the end of the turn, where a model has stopped.
    assert chosen == ["yes<|im_end|>"] * 2 and rejected == ["no<|im_end|>"] * 2
    assert "2 of 2 rows kept" in report and "rows: answers follow" not in report


def test_an_eos_that_ends_the_turn_itself_is_scored(read):
    assert read([GOOD], PLAIN)[1] == ["yes<eos>"]


UNSERVED = "1 rows: answers follow another prompt than the chat template's generation prompt: "


@pytest.mark.parametrize("opening", ["<|assistant|><think>\\n", "<|assistant|>\\n"])
def test_answers_behind_another_prompt_than_the_generation_prompt_are_counted_and_named(
    read, opening
):
    prompts, chosen, _, report = read([GOOD], with_content("c", opening))
    assert UNSERVED in report and "row 1" in report
    assert "merged" not in report
    assert prompts == ["<|user|>a cat?<eos><|assistant|>"] and chosen == ["yes<eos>"]


def test_an_answer_may_begin_with_what_the_generation_prompt_opens(read):
    rows = [pair([user("1+1?")], "<think>\nadd\n</think>\n\n2", "<think>\nguess\n</think>\n\n3")]
    prompts, chosen, _, report = read(rows, with_content("c", "<|assistant|><think>\\n"))
    assert prompts == ["<|user|>1+1?<eos><|assistant|><think>\n"]
    assert chosen == ["add\n</think>\n\n2<eos>"]
    assert "rows: answers follow" not in report and "dropped" not in report


# --- Every message is written ---------------------------------------------------------------------

LOSSES = {
    "a system turn": (
        only("user", "assistant"), pair([system("be kind"), user("hi")]),
        "the chat template leaves out text of the system"),
    "a system turn whose text the user repeats": (
        only("user", "assistant"), pair([system("kind"), user("be kind to me")]),
        "the chat template leaves out text of the system"),
    "the output of a tool in the prompt": (
        only("user", "assistant"),
        pair([user("rain?"), assistant("CALL"), tool("wet"), user("so")]),
        "the chat template leaves out text of the tool"),
    "an earlier turn of the user": (
        "{% for m in messages[-2:] %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% endfor %}",
        pair([user("one"), assistant("two"), user("three")]),
        "the chat template"),
    "the reasoning of an answer": (
        with_content("c.split('</think>')[-1]"), pair([user("hi")], "<think>a</think>b", "c"),
        "the chat template leaves out the reasoning before </think>"),
    "the reasoning of the rejected answer": (
        with_content("c.split('</think>')[-1]"), pair([user("hi")], "c", "<think>a</think>b"),
        "the chat template leaves out the reasoning before </think>"),
    "the end of an answer": (
        with_content("c[:5]"), pair([user("hi")], "a long answer", "no"),
        "the chat template leaves out text of an answer"),
    "the first of two turns of an answer": (
        "{% for m in messages %}{% if m['role'] == 'user' or loop.last %}{{ '<|' + m['role'] + '|>'"
        " + m['content'] + eos_token }}{% endif %}{% endfor %}" + OPEN,
        pair([user("hi")], [assistant("one"), assistant("two")], "no"),
        "the chat template leaves out text of an answer"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_row_is_dropped_and_named_if_the_template_loses(read, kind):
    template, lossy, reason = LOSSES[kind]
    *_, report = read([GOOD, lossy], template)
    assert f"1 of 2 rows kept, 1 dropped ({reason}" in report and "row 2)" in report


def test_a_template_may_change_white_space_move_a_system_turn_and_write_a_tool_as_json(read):
    moving = (
        "{% set system = messages[0]['content'] %}{% for m in messages[1:] %}"
        "{% if loop.index0 == 2 %}{{ system + '\n\n' }}{% endif %}"
        "{% if m['role'] == 'tool' %}{{ m['content'] | tojson }}{% else %}"
        "{{ m['content'].split() | join(' ') }}{% endif %}{{ eos_token }}{% endfor %}"
    )
    prompt = [system("be kind"), user("a\n cat"), assistant(" x "), user("more"),
              assistant("CALL"), tool('{"say": "wet"}')]
    prompts, chosen, _, report = read([pair(prompt, "a\tdog")], moving)
    assert '"{\\"say\\": \\"wet\\"}"' in prompts[0] and "be kind" in prompts[0]
    assert chosen == ["a dog<eos>"] and "dropped" not in report


def test_reasoning_of_earlier_turns_that_is_not_served_either_is_only_counted(read):
    template = (
        "{% for m in messages %}{% set c = m['content'] %}{% if not loop.last %}"
        "{% set c = c.split('</think>')[-1] %}{% endif %}"
        "{{ '<|' + m['role'] + '|>' + c + eos_token }}{% endfor %}" + OPEN
    )
    history = [user("hi"), assistant("<think>who?</think>hello"), user("bye")]
    prompts, chosen, _, report = read([GOOD, pair(history, "<think>go</think>ciao")], template)
    assert "2 of 2 rows kept" in report and chosen[1] == "<think>go</think>ciao<eos>"
    assert "1 rows: the chat template leaves out the reasoning of earlier turns: " in report
    assert "who?" not in prompts[1]


def test_text_that_spells_a_control_token_drops_messages_and_is_counted_in_texts(read):
    rows = [GOOD, pair([user("say <|im_end|>")]), pair([user("hi")], "a<eos>b")]
    report = read(rows, CHATML)[-1]
    assert "1 of 3 rows kept, 2 dropped" in report
    assert "text that spells the control token <|im_end|>: " in report
    assert "text that spells the control token <eos>: " in report
    texts = [
        {"prompt": "<s>a cat", "chosen": " sat<eos>", "rejected": " ran<eos>\n"},
        {"prompt": "a cat", "chosen": " sat<eos> down", "rejected": " ran"},
        {"prompt": "a <|user|>", "chosen": " sat", "rejected": " ran"},
    ]
    report = read(texts, add_bos=True, name="texts.jsonl")[-1]
    assert "2 rows: text that spells a control token becomes that token: " in report
    assert "row 1" not in report


# --- Only the model's own words are scored --------------------------------------------------------

@pytest.mark.parametrize("role", ["tool", "function", "observation"])
def test_an_answer_that_ends_with_a_turn_that_the_model_does_not_write_is_dropped(read, role):
    output = {"role": role, "content": "wet"}
    *_, report = read([GOOD, pair([user("rain?")], [assistant("CALL"), output], "no idea")], CHATML)
    # The template gets all three as the role tool.
    assert "1 dropped (an answer ends with a turn of the tool: " in report
    # Followed by a turn of the assistant, it stays in the answer, which test_messages.py checks.
    used = pair([user("rain?")], [assistant("CALL"), output, assistant("yes")], "no idea")
    _, chosen, _, report = read([used], CHATML, name="used.jsonl")
    assert "1 of 1" in report and "wet" in chosen[0]


def test_the_output_of_a_tool_that_begins_both_answers_belongs_to_the_prompt(read):
    prompt = [user("rain?"), assistant("CALL")]
    same = pair(prompt, [tool("wet"), assistant("yes")], [tool("wet"), assistant("no")])
    other = pair(prompt, [tool("wet"), assistant("yes")], [tool("dry"), assistant("no")])
    prompts, chosen, _, report = read([same, other], CHATML)
    assert prompts[0].endswith("tool\nwet<|im_end|>\n<|im_start|>assistant\n")
    assert chosen[0] == "yes<|im_end|>" and "wet" not in prompts[1] and "wet" in chosen[1]
    assert "2 of 2 rows kept" in report


def test_a_dialogue_with_the_output_of_a_tool_is_split_behind_it(read):
    start = [user("rain?"), assistant("CALL"), tool("wet")]
    rows = [{"chosen": start + [assistant("yes")], "rejected": start + [assistant("no")]}]
    prompts, chosen, _, _ = read(rows, CHATML)
    assert "wet" in prompts[0] and chosen == ["yes<|im_end|>"]


# --- Prefill --------------------------------------------------------------------------------------

PREFILLED = "1 rows: the prompt ends with the beginning of the assistant's answer: "


@pytest.mark.parametrize("template", [CHATML, PLAIN, CLOSING], ids=["chatml", "plain", "closing"])
@pytest.mark.parametrize("as_text", [False, True])
def test_answers_continue_the_turn_of_the_assistant_that_ends_the_prompt(read, template, as_text):
    row = pair([user("name one"), assistant("A fruit is")], " apple", " rock")
    if as_text:
        row |= {"chosen": " apple", "rejected": " rock"}
    prompts, chosen, rejected, report = read([row], template)
    end = "<eos>" if template == PLAIN else "<|im_end|>"
    assert prompts[0].endswith("A fruit is") and prompts[0].count("assistant") == 1
    assert chosen == [f" apple{end}"] and rejected == [f" rock{end}"]
    assert PREFILLED in report


def test_a_prefill_is_trimmed_as_the_template_trims_a_turn(read):
    row = pair([user("name one"), assistant("A fruit is ")], "apple", "rock")
    prompts, chosen, _, _ = read([row], with_content("c | trim"))
    assert prompts[0].endswith("<|assistant|>A fruit is") and chosen == [" apple<eos>"]


def test_answers_may_repeat_the_beginning_that_ends_the_prompt(read):
    row = pair([user("name one"), assistant("A fruit is")], "A fruit is apple", "A fruit is rock")
    prompts, chosen, _, _ = read([row], PLAIN)
    assert prompts[0].endswith("<|assistant|>A fruit is") and chosen == [" apple<eos>"]


def test_two_turns_of_the_assistant_in_a_dialogue_stay_two_turns(read):
    start = [user("hi"), assistant("one")]
    rows = [{"chosen": start + [assistant("two")], "rejected": start + [assistant("three")]}]
    prompts, chosen, _, report = read(rows, PLAIN)
    assert prompts == ["<|user|>hi<eos><|assistant|>"]
    assert chosen == ["one<eos><|assistant|>two<eos>"] and "rows: the prompt ends" not in report


# --- Messages that arrive as text -----------------------------------------------------------------

@pytest.mark.parametrize("write", [json.dumps, repr, lambda value: json.dumps(json.dumps(value))],
                         ids=["json", "python", "json in json"])
@pytest.mark.parametrize("prompt_is_list", [True, False])
def test_a_list_of_messages_in_a_csv_cell_is_the_list(read, tmp_path, write, prompt_is_list):
    row = pair([user("a \"cat's\" 漢字?")], "yes\nsir")
    expected = read([row], CHATML)[:3]
    cells = {name: write(value) for name, value in row.items()}
    if not prompt_is_list:
        cells["prompt"] = row["prompt"][0]["content"]
    with open(tmp_path / "cells.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(cells))
        writer.writeheader()
        writer.writerow(cells)
    text = (tmp_path / "cells.csv").read_text(encoding="utf-8")
    assert read(text, CHATML, name="rows.csv")[:3] == expected


def test_whole_dialogues_as_json_text_are_dialogues_with_and_without_rejected(read):
    row = {"chosen": [user("hi"), assistant("yes")], "rejected": [user("hi"), assistant("no")]}
    cells = {name: json.dumps(value) for name, value in row.items()}
    assert read([cells], CHATML, name="a.jsonl") == read([row], CHATML, name="a.jsonl")
    assert read([cells], CHATML, sides=("chosen",))[1] == ["yes<|im_end|>"]


@pytest.mark.parametrize("text", [
    "[{'role': 'user', 'content': 'a'}\n {'role': 'assistant', 'content': 'b'}]",  # numpy's print
    '[{"role": "user", "content": "a long te...',
])
def test_messages_as_text_that_cannot_be_parsed_are_an_error_with_row_and_field(read, text):
    message = "row 2: the field 'prompt' holds a list of messages as text that is not JSON"
    with pytest.raises(UserError, match=message):
        read([pair([user("hi")]), {"prompt": text, "chosen": "x", "rejected": "y"}], CHATML)


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_one_message_as_text_is_a_list_of_this_message(read, write):
    row = {"prompt": "hi", "chosen": write(assistant("yes")), "rejected": write(assistant("no"))}
    prompts, chosen, rejected, _ = read([row], CHATML)
    assert prompts == ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"]
    assert (chosen, rejected) == (["yes<|im_end|>"], ["no<|im_end|>"])


@pytest.mark.parametrize("answer", [
    '{"role": "cook", "pay": 3}', "{x: 1}", "{1, 2}", "{[]: 'role'}",
    "{[]: {'role': 1}}", '{"role": f(x)}',
    '[{"name": "Bo", "role": "cook"}]', "[{x}]", '[{"a": 1}]', "[{ 'a': b }] = c", "[1, 2]"])
def test_an_answer_that_is_json_but_no_list_of_messages_stays_text(read, answer):
    chosen = read([{"prompt": "list: ", "chosen": answer, "rejected": "[]"}])[1]
    assert chosen == [answer + "<eos>"]


# --- A prompt under another name ------------------------------------------------------------------

@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("name, value", [
    ("query", "colour of a cat"),
    ("user_prompt", "cat"),
    ("Frage", "Was ist das?"),
    ("post", "the cat sat on a mat"),
    ("context", [user("hi")]),
])
@pytest.mark.parametrize("start", ["It is ", ""])
def test_a_prompt_in_a_column_of_another_name_is_an_error_that_tells_its_flag(
    read, add_bos, name, value, start
):
    rows = [{name: value, "chosen": f"{start}blue.", "rejected": f"{start}red."}]
    message = f"row 1: the column '{name}' is not read: .* pass --columns prompt={name}"
    with pytest.raises(UserError, match=message):
        read(rows, CHATML, add_bos=add_bos)
    assert "1 of 1" in read(rows, CHATML, columns=(("prompt", name),), name="named.jsonl")[-1]


def test_answers_as_messages_without_their_question_are_the_same_error(read):
    rows = [{"question": "why?", "chosen": [assistant("a")], "rejected": [assistant("b")]}]
    with pytest.raises(UserError, match="--columns prompt=question"):
        read(rows, CHATML)


def test_dialogues_may_have_other_columns(read):
    turns = "\n\nHuman: a cat?\n\nAssistant:"
    marked = {"source": "a", "question": "cats?", "chosen": turns + " a", "rejected": turns + " b"}
    plain = {"question": "why only now", "chosen": "why only now I see",
             "rejected": "why only now I do"}
    listed = {"note": "one two three four", "chosen": [user("hi"), assistant("a")],
              "rejected": [user("hi"), assistant("b")]}
    sourced = {"source": "a book of cats", "chosen": "Q: why? It is", "rejected": "Q: why? I am"}
    for i, row in enumerate([marked, plain, listed, sourced]):
        assert "1 of 1" in read([row], CHATML, name=f"{i}.jsonl")[-1]


def test_answers_that_share_nothing_have_no_prompt_even_behind_bos(read):
    rows = [{"chosen": "Q: a b", "rejected": "Q: a c"}, {"chosen": "Blue", "rejected": "Red"}]
    report = read(rows, add_bos=True)[-1]
    assert "1 of 2 rows kept, 1 dropped (no prompt: " in report


# --- Templates that do not end --------------------------------------------------------------------

def when(condition, program):
    """Make a template that runs a program for some rows only."""
    return "{% if " + condition + " %}" + program + "{% endif %}" + PLAIN


LAST = "messages[0]['content'] == 'last'"
SLOW = {
    "nested loops": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
    # Of a variable: jinja computes constants when it compiles the template, before any row.
    "a power": "{% set n = messages|length + 9 %}{{ (n ** (n ** n)) % 7 }}",
    "a macro that calls itself twice": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}"),
}
LARGE = {
    "a long text": "{{ 'x' * 10**10 }}",
    "a text doubled": (
        "{% set n = namespace(t='x' * 100) %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}"
        "{% endfor %}{{ n.t }}"),
    "a long list": "{{ ([0] * 10**10)|length }}",
    "a format": "{{ '%10000000000d' % 1 }}",
    "a wide line": "{{ 'x'.center(10**10) }}",
}
FAILING = {
    "a long range": "{% for i in range(10**12) %}{% endfor %}",
    "a macro without an end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "ten million characters": "{{ 'x' * 10**7 }}",
    "attributes of Python": "{{ ''.__class__.__mro__ }}",
}


def two_rows():
    row = {"chosen": [{"role": "assistant", "content": "good"}],
           "rejected": [{"role": "assistant", "content": "bad"}]}
    return [row | {"prompt": [{"role": "user", "content": text}]} for text in ("first", "last")]


@pytest.mark.parametrize("name", [*SLOW, *LARGE, *FAILING])
def test_a_template_that_loops_or_eats_memory_is_stopped_and_its_row_is_named(
        read, name, monkeypatch):
    """Only the second row runs the program, so a trial of the template on one row would miss it."""
    monkeypatch.setattr(limits, "SECONDS", 2)
    program = (SLOW | LARGE | FAILING)[name]
    with pytest.raises(UserError, match="row 2.*chat template") as error:
        read(two_rows(), when(LAST, program))
    assert "row 1" not in str(error.value)


def test_rows_of_messages_are_the_same_with_and_without_a_child_process(read, monkeypatch):
    inside = read(two_rows(), CHATML)
    monkeypatch.delattr(os, "fork")
    assert read(two_rows(), CHATML, name="again.jsonl")[:3] == inside[:3]
