"""Messages with tools, reasoning and several turns: the template gets them whole, and exactly the
text that the model writes is scored."""

import json

import pytest
from conftest import make_tokenizer
from test_templates import CHATML, PLAIN, assistant, pair, read, system, tool, user  # noqa: F401
from tokenizers import AddedToken

from data import Limits
from errors import UserError
from shorten import shorten_texts
from templates import read_special_tokens, text_of_messages, unscored_tokens

# Shortened from the templates of these models. None of them is a copy.
QWEN3 = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}# Tools
{%- for tool in tools %}
{{ tool | tojson }}{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set reasoning = m.reasoning_content if m.reasoning_content is string else '' %}
{%- if not reasoning and '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or reasoning) %}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else %}{{- content }}{% endif %}
{%- for call in m.tool_calls or [] %}
{%- set f = call.function or call %}
{{- '\\n' if content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": "' + f.name + '", "arguments": ' }}
{{- f.arguments if f.arguments is string else f.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}{% endif %}"""

LLAMA = """\
{{- bos_token }}
{%- if messages[0].role == 'system' %}
{%- set sys = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- else %}{% set sys = '' %}{% endif %}
{{- '<|head|>system<|/head|>\\n\\n' + sys + '<|eot|>' }}
{%- if tools %}
{%- if messages | length == 0 %}{{ raise_exception('no first user message') }}{% endif %}
{{- '<|head|>user<|/head|>\\n\\nCall one of these:\\n' }}
{%- for t in tools %}{{ t | tojson(indent=4) + '\\n\\n' }}{% endfor %}
{{- messages[0].content | trim + '<|eot|>' }}{% set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
{%- if m.role == 'tool' or m.role == 'ipython' %}
{{- '<|head|>ipython<|/head|>\\n\\n' + (m.content | tojson) + '<|eot|>' }}
{%- elif m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set f = m.tool_calls[0].function %}
{{- '<|head|>assistant<|/head|>\\n\\n{"name": "' + f.name + '", "parameters": ' }}
{{- (f.arguments | tojson) + '}<|eot|>' }}
{%- else %}{{ '<|head|>' + m.role + '<|/head|>\\n\\n' + m.content | trim + '<|eot|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\n' }}{% endif %}"""

# The tools stand before the last question, and a call has an id of nine characters.
MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(last=0) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and loop.index0 == ns.last %}
{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + m.content + '[/INST]' }}
{%- elif m.tool_calls is defined and m.tool_calls %}
{{- '[TOOL_CALLS][' }}
{%- for c in m.tool_calls %}
{%- if not c.id is defined or c.id | length != 9 %}{{ raise_exception('ids have 9') }}{% endif %}
{{- (c.function | tojson)[:-1] + ', "id": "' + c.id + '"}' + (', ' if not loop.last else ']') }}
{%- endfor %}{{ eos_token }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}
{%- elif m.role == 'tool' %}
{{- '[TOOL_RESULTS]{"content": ' + (m.content | tojson) }}
{{- ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{ raise_exception('no such role') }}{% endif %}
{%- endfor %}"""

PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}"
    "{% endif %}"
)

# Old reasoning is left out, arguments must be text, and the generation prompt opens <think>.
DEEPSEEK = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|user|>' + m.content }}
{%- elif m.role == 'assistant' %}
{{- '<|assistant|>' }}
{%- set content = m.content or '' %}
{%- if '</think>' in content and not loop.last %}{% set content = content.split('</think>')[-1] %}
{%- endif %}
{{- content }}
{%- for c in m.tool_calls or [] %}
{{- '<call>' + c.function.name + '\\n```json\\n' + c.function.arguments + '\\n```</call>' }}
{%- endfor %}{{ eos_token }}
{%- elif m.role == 'tool' %}{{ '<output>' + m.content + '</output>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\\n' }}{% endif %}"""

# Takes lists of parts and no text.
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|tool|>",
           "<|head|>", "<|/head|>", "<|eot|>", "[INST]", "[/INST]", "[TOOL_CALLS]"]
ORDINARY = ["<think>", "</think>", "<tool_call>", "</tool_call>"]

TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}]


def make(template):
    tokenizer = make_tokenizer()
    for texts, is_special in ((SPECIAL, True), (ORDINARY, False)):
        tokens = [AddedToken(text, special=is_special, normalized=False) for text in texts]
        tokenizer.add_tokens(tokens, special_tokens=is_special)
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = template
    return tokenizer


def call(name="weather", arguments=None, **keys):
    """Make a turn of the assistant with one tool call."""
    arguments = {"city": "Oslo"} if arguments is None else arguments
    function = {"name": name, "arguments": arguments}
    calls = [{"id": "abcdefghi", "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls} | keys


def output(content):
    return tool(content) | {"tool_call_id": "abcdefghi", "name": "weather"}


def row_text(template, prompt, *answers, **options):
    """Write a row. An answer may be a text."""
    tokenizer = make(template)
    special = read_special_tokens(tokenizer)
    answers = [[assistant(a)] if isinstance(a, str) else a for a in answers]
    return text_of_messages(prompt, answers, tokenizer, special, "row 1", options)


def scored(text, k=0):
    """The scored texts of answer k. All behind the prompt is scored if there are no spans."""
    whole, spans = text.wholes[k], text.scored[k]
    if not spans:
        assert whole.startswith(text.prompt)
        return [whole[len(text.prompt):]]
    return [whole[start:stop] for start, stop in spans]


# --- Tool dialogues -------------------------------------------------------------------------------

WEATHER = [call(), output("4 degrees"), assistant("It is cold.")]
QWEN_CALL = ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
             "<|im_end|>")
TOOL_DIALOGUES = {
    "qwen3": (QWEN3, [QWEN_CALL, "<think>\n\n</think>\n\nIt is cold.<|im_end|>"]),
    "llama": (LLAMA, ['{"name": "weather", "parameters": {"city": "Oslo"}}<|eot|>',
                      "It is cold.<|eot|>"]),
    "mistral": (MISTRAL, [
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}, "id": "abcdefghi"}]<eos>',
        "It is cold.<eos>"]),
    "deepseek": (DEEPSEEK, ['<call>weather\n```json\n{"city": "Oslo"}\n```</call><eos>',
                            "It is cold.<eos>"]),
}


@pytest.mark.parametrize("kind", TOOL_DIALOGUES)
@pytest.mark.parametrize("as_text", [False, True])
def test_of_a_call_its_output_and_a_reply_the_call_and_the_reply_are_scored(kind, as_text):
    """Arguments may be an object, or its JSON as OpenAI writes them, for any template."""
    template, expected = TOOL_DIALOGUES[kind]
    arguments = '{"city": "Oslo"}' if as_text else {"city": "Oslo"}
    answer = [call(arguments=arguments), *WEATHER[1:]]
    text = row_text(template, [user("cold?")], answer, "No idea.", tools=TOOLS)
    assert text.problem == "" and scored(text) == expected
    assert text.scored[1] == ()
    # DEEPSEEK writes no tools.
    assert ("The weather of a city." in text.prompt) == (template is not DEEPSEEK)
    assert ("toolless" in text.notes) == (template is DEEPSEEK)


def test_a_call_with_and_without_content_and_several_calls_at_once_are_scored():
    double = call()
    double["tool_calls"] = double["tool_calls"] + call(arguments={"city": "Rome"})["tool_calls"]
    for content in (None, "", "Let me see."):
        for first in (call(content=content), double | {"content": content}):
            answer = [first, output("4"), output("20"), assistant("Cold.")]
            text = row_text(QWEN3, [user("cold?")], answer, "No.")
            begin, end = scored(text)
            assert begin.startswith(content or "<tool_call>")
            assert begin.count("<tool_call>") == len(first["tool_calls"])
            assert begin.endswith("</tool_call><|im_end|>") and "4" not in begin
            assert end == "<think>\n\n</think>\n\nCold.<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, PHI3, PLAIN])
def test_a_template_that_leaves_out_the_calls_drops_the_row(template):
    for answer in ([call()], WEATHER, [call(content="Hm.")]):
        text = row_text(template, [user("cold?")], answer, "No.")
        assert text.problem == "the chat template leaves out the tool calls of the assistant"
    text = row_text(template, [user("cold?"), *WEATHER[:2]], "Cold.", "No.")
    assert text.problem == "the chat template leaves out the tool calls of the assistant"


def test_a_template_that_writes_only_the_call_drops_a_row_with_words_before_it():
    text = row_text(LLAMA, [user("cold?")], [call(content="Let me see."), *WEATHER[1:]], "No.")
    assert text.problem == "the chat template leaves out text of an answer"


@pytest.mark.parametrize("arguments", [
    {"a": "say \"hi\"\n"}, {"a": 1, "b": 2.5, "c": True}, {"a": ["x", {"b": "漢字"}]}, {},
    {"a": None}, {"a": "C:\\new"}, '{"b":1,"a":"compact"}'])
def test_arguments_of_any_value_are_found_as_json(arguments):
    for template in (QWEN3, LLAMA, MISTRAL, DEEPSEEK):
        text = row_text(template, [user("hi")], [call(arguments=arguments), *WEATHER[1:]], "No.")
        assert text.problem == ""
        written = scored(text)[0]
        values = json.loads(arguments) if isinstance(arguments, str) else arguments
        start = written.index("{", written.index("arguments") if "arguments" in written else 10)
        if template is LLAMA:
            start = written.index("{", 1)
        assert json.JSONDecoder().raw_decode(written[start:])[0] == values


def test_arguments_in_xml_or_as_python_count_as_written():
    body = "{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    forms = [
        "{{ '<function=' + f.name + '>' }}{% for k, v in f.arguments.items() %}"
        "{{ '<parameter=' ~ k ~ '>\n' ~ v ~ '\n</parameter>' }}{% endfor %}{{ '</function>' }}",
        "{{ f.name + '(' }}{% for k, v in f.arguments.items() %}{{ k ~ '=' ~ (v | tojson) }}"
        "{% endfor %}{{ ')' }}"]
    for form in forms:
        template = (
            "{% for m in messages %}" + body + "{% for c in m.tool_calls or [] %}"
            "{% set f = c.function %}" + form + "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
        text = row_text(template, [user("cold?")], WEATHER, "No.")
        assert text.problem == "" and "Oslo" in scored(text)[0]


def test_a_template_that_prints_arguments_as_python_gets_them_as_json():
    """`~` joins anything, so the template does not fail on an object."""
    template = DEEPSEEK.replace("+ c.function.arguments +", "~ c.function.arguments ~")
    text = row_text(template, [user("cold?")], WEATHER, "No.")
    assert '{"city": "Oslo"}' in scored(text)[0]


def test_tool_calls_without_the_outer_function_are_calls():
    flat = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {"city": "Rome"}}]}
    text = row_text(QWEN3, [user("cold?")], [flat, *WEATHER[1:]], "No.")
    assert text.problem == "" and "Rome" in scored(text)[0]


@pytest.mark.parametrize("calls", ["weather", ["weather"], [{"function": "weather"}], [{}]])
def test_a_tool_call_without_a_name_is_an_error_that_names_the_row(calls):
    with pytest.raises(UserError, match="row 1: a message has the tool call"):
        row_text(QWEN3, [user("cold?")], [assistant("") | {"tool_calls": calls}], "No.")


def test_answers_may_begin_with_different_outputs_of_a_tool():
    answers = [[output("4"), assistant("Yes.")], [output("20"), assistant("No.")]]
    text = row_text(QWEN3, [user("cold?"), call()], *answers)
    assert text.problem == "" and text.notes == ()
    assert text.prompt.endswith("cold?<|im_end|>\n<|im_start|>assistant\n")
    end = "<think>\n\n</think>\n\n{}<|im_end|>"
    assert [scored(text, k) for k in (0, 1)] == [[end.format("Yes.")], [end.format("No.")]]
    # One of them may begin with a turn of the assistant, whose header is not scored.
    text = row_text(CHATML, [user("a"), assistant("CALL")], answers[0], "So.")
    assert [scored(text, k) for k in (0, 1)] == [["Yes.<|im_end|>"], ["So.<|im_end|>"]]


def test_answers_behind_a_call_that_ends_the_prompt_do_not_continue_its_turn():
    text = row_text(QWEN3, [user("cold?"), call()], "Yes.", "No.")
    assert text.problem == "" and text.notes == ()
    assert scored(text) == ["<think>\n\n</think>\n\nYes.<|im_end|>"]
    assert text.wholes[0].count("<|im_start|>assistant") == 2


# --- Several turns --------------------------------------------------------------------------------

TURNS = [assistant("One."), user("more"), assistant("Two."), system("be kind"), assistant("Three.")]


@pytest.mark.parametrize("template, end", [
    (CHATML, "<|im_end|>"), (PHI3, "<|im_end|>"), (PLAIN, "<eos>"), (LLAMA, "<|eot|>"),
    (DEEPSEEK, "<eos>"), (MISTRAL, "<eos>"), (PARTS, "<|im_end|>")])
def test_of_several_turns_those_of_the_assistant_are_scored_up_to_the_token_that_ends_them(
    template, end
):
    turns = TURNS if template not in (DEEPSEEK, MISTRAL) else [*TURNS[:2], TURNS[4]]
    text = row_text(template, [user("count")], turns, "No.")
    words = [m["content"] for m in turns if m["role"] == "assistant"]
    assert text.problem == "" and scored(text) == [word + end for word in words]


def test_a_message_that_is_not_to_be_trained_is_not_scored():
    skipped = assistant("One.") | {"train": False}
    text = row_text(CHATML, [user("count")], [skipped, *TURNS[1:]], "No.")
    assert scored(text) == ["Two.<|im_end|>", "Three.<|im_end|>"]
    last = TURNS[:2] + [assistant("Two.") | {"train": False}]
    assert scored(row_text(CHATML, [user("count")], last, "No.")) == ["One.<|im_end|>"]
    kept = [message | {"train": True} for message in TURNS]
    assert len(scored(row_text(CHATML, [user("count")], kept, "No."))) == 3


def test_the_template_does_not_see_the_key_train():
    template = CHATML.replace("m['content']", "m['content'] + (m.train | string)")
    text = row_text(template, [user("a") | {"train": False}], [assistant("b") | {"train": True}])
    assert text.wholes[0].endswith("b<|im_end|>") and "rue" not in text.wholes[0]


@pytest.mark.parametrize("answer, reason", [
    ([assistant("One."), user("more")], "an answer ends with a turn of the user"),
    (WEATHER[:2], "an answer ends with a turn of the tool"),
    ([assistant("One.") | {"train": False}], "no scored turn in an answer"),
    ([assistant(""), user("more"), assistant(" ")], "empty answer"),
    ([assistant("One.") | {"train": False}, user("more"), assistant("")], "empty answer"),
    ([], "empty answer")])
def test_an_answer_without_words_of_the_model_at_its_end_drops_the_row(answer, reason):
    assert row_text(QWEN3, [user("count")], answer, "No.").problem == reason
    assert row_text(QWEN3, [user("count")], "No.", answer).problem == reason


def test_train_must_be_true_or_false():
    with pytest.raises(UserError, match="row 1: a message has train = 'no'"):
        row_text(CHATML, [user("a")], [assistant("b") | {"train": "no"}])


def test_the_turn_after_a_prefill_is_scored_from_where_it_continues():
    turns = [assistant(" fruit"), user("which?"), assistant("apple")]
    text = row_text(CHATML, [user("name one"), assistant("A")], turns, " rock")
    assert text.notes == ("prefilled",)
    assert scored(text) == [" fruit<|im_end|>", "apple<|im_end|>"]


def test_equal_turns_get_a_span_each():
    turns = [assistant("yes"), user("yes"), assistant("yes")]
    text = row_text(CHATML, [user("yes")], turns, "yes")
    assert scored(text) == ["yes<|im_end|>"] * 2
    (start, stop), (second, _) = text.scored[0]
    assert text.wholes[0][:start] == text.prompt and second > stop


def test_a_template_that_moves_text_as_turns_follow_drops_the_row():
    """Mistral's writes the tools before the last question, which moves them."""
    turns = [assistant("One."), user("more"), assistant("Two.")]
    text = row_text(MISTRAL, [user("count")], turns, "No.", tools=TOOLS)
    assert text.problem == "the chat template writes the prompt differently when an answer follows"
    numbered = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if loop.index == 2 and messages|length > 3 %}{{ ' (of many)' }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    text = row_text(numbered, [user("count")], turns, "No.")
    assert text.problem == "the chat template rewrites an answer as its turns follow"


# --- Reasoning ------------------------------------------------------------------------------------

def thinking(reasoning, content, key="reasoning_content"):
    return assistant(content) | {key: reasoning}


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", None])
def test_reasoning_of_the_answer_is_written_and_scored(key):
    answer = [thinking("add", "2", key) if key else assistant("<think>\nadd\n</think>\n\n2")]
    text = row_text(QWEN3, [user("1+1?")], answer, "3")
    assert scored(text) == ["<think>\nadd\n</think>\n\n2<|im_end|>"] and text.notes == ()


@pytest.mark.parametrize("template", [CHATML, PHI3, LLAMA, MISTRAL])
def test_a_template_without_reasoning_drops_a_row_that_has_it(template):
    text = row_text(template, [user("1+1?")], [thinking("add", "2")], "3")
    assert text.problem == "the chat template leaves out the reasoning of an answer"


@pytest.mark.parametrize("as_key", [True, False])
def test_reasoning_of_earlier_turns_may_be_left_out_and_the_spans_stay_right(as_key):
    def think(reasoning, content):
        if as_key:
            return thinking(reasoning, content)
        return assistant(f"<think>\n{reasoning}\n</think>\n\n{content}")

    turns = [think("who?", "hello"), user("bye"), think("go", "ciao")]
    text = row_text(QWEN3, [user("hi")], turns, "No.")
    assert text.notes == ("forgotten",)
    assert scored(text) == ["hello<|im_end|>", "<think>\ngo\n</think>\n\nciao<|im_end|>"]
    # Reasoning that is left out before a turn which is not the first of the answer.
    calls = [call(reasoning_content="look"), output("4"), think("cold", "Cold.")]
    text = row_text(QWEN3, [user("hi")], [*calls, user("bye"), think("go", "ciao")], "No.")
    assert scored(text) == [
        QWEN_CALL, "Cold.<|im_end|>", "<think>\ngo\n</think>\n\nciao<|im_end|>"]
    # Without a question behind it, reasoning between calls stays.
    text = row_text(QWEN3, [user("hi")], calls, "No.")
    assert text.notes == () and scored(text) == [
        "<think>\nlook\n</think>\n\n" + QWEN_CALL, "<think>\ncold\n</think>\n\nCold.<|im_end|>"]


def test_a_prompt_with_reasoning_that_is_left_out_is_kept_and_noted():
    text = row_text(QWEN3, [user("hi"), thinking("who?", "hello"), user("bye")], "ciao", "no")
    assert text.problem == "" and text.notes == ("forgotten",) and "who?" not in text.prompt


def test_a_generation_prompt_that_opens_think_begins_the_answer_with_reasoning():
    text = row_text(DEEPSEEK, [user("1+1?")], "<think>\nadd\n</think>\n\n2", "<think>\nx</think>3")
    assert text.prompt.endswith("<|assistant|><think>\n") and text.notes == ()
    assert scored(text) == ["add\n</think>\n\n2<eos>"]
    # An earlier turn has no <think> in this template: it begins behind its header.
    turns = [assistant("<think>a</think>hello"), user("bye"), assistant("<think>\nb</think>ciao")]
    text = row_text(DEEPSEEK, [user("hi")], turns, "<think>\nx</think>no")
    assert scored(text) == ["hello<eos>", "b</think>ciao<eos>"]
    assert text.notes == ("forgotten", "unserved")


def test_short_reasoning_that_other_text_repeats_is_still_missed():
    turns = [thinking("ok", "hello"), user("ok?"), thinking("ok", "ok")]
    text = row_text(QWEN3, [user("ok")], turns, "No.")
    assert text.notes == ("forgotten",) and scored(text)[0] == "hello<|im_end|>"


def test_reasoning_that_is_no_text_is_an_error():
    with pytest.raises(UserError, match="row 1: a message has reasoning_content = 3"):
        row_text(QWEN3, [user("a")], [thinking(3, "b")])


# --- Parts ----------------------------------------------------------------------------------------

def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


PRINTING = CHATML.replace("+ m['content'] +", "~ m['content'] ~")


@pytest.mark.parametrize("template", [CHATML, PRINTING, QWEN3, LLAMA, PHI3, PARTS, MISTRAL])
def test_parts_of_type_text_are_joined_if_a_template_takes_only_texts(template):
    """CHATML fails on a list, PRINTING writes it as Python does, QWEN3 leaves it out."""
    prompt = [user("") | {"content": parts("a ", "cat?")}]
    text = row_text(template, prompt, [assistant("") | {"content": parts("yes")}], "no")
    assert text.problem == "" and "a cat?" in text.prompt and "'type'" not in text.wholes[0]
    assert scored(text)[0].removeprefix("<think>\n\n</think>\n\n").startswith("yes<")


@pytest.mark.parametrize("content", [[{"type": "image", "url": "x"}], ["text"], 3, {"a": 1},
                                     [{"type": "text"}], [{"type": "image", "text": "a"}]])
def test_parts_of_another_type_are_an_error(content):
    with pytest.raises(UserError, match="row 1: a message has the content .* must be text"):
        row_text(PARTS, [user("") | {"content": content}], "yes", "no")


# --- Options --------------------------------------------------------------------------------------

def test_options_reach_the_template_for_prompt_and_wholes():
    text = row_text(QWEN3, [user("hi")], "yes", "no", enable_thinking=False, tools=TOOLS)
    assert text.prompt.endswith("assistant\n<think>\n\n</think>\n\n")
    assert scored(text) == ["yes<|im_end|>"] and text.notes == ()
    assert all("The weather of a city." in whole for whole in text.wholes)
    template = "{{ mode }}" + CHATML
    text = row_text(template, [user("hi")], "yes", mode="short")
    assert text.prompt.startswith("short<|im") and text.wholes[0].startswith("short<|im")


def test_tools_that_the_template_does_not_write_are_noted():
    assert row_text(CHATML, [user("hi")], "yes", "no", tools=TOOLS).notes == ("toolless",)
    assert row_text(CHATML, [user("hi")], "yes", "no", tools=[]).notes == ()


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "chat_template", "messages",
                                  "continue_final_message", "return_dict"])
def test_an_option_that_the_trainer_sets_is_an_error(name):
    with pytest.raises(UserError, match=f"row 1: the argument '{name}' .*--template_kwargs"):
        row_text(CHATML, [user("hi")], "yes", "no", **{name: True})


def test_tools_that_are_no_list_of_objects_are_an_error():
    with pytest.raises(UserError, match="row 1: the chat template fails"):
        row_text(QWEN3, [user("hi")], "yes", "no", tools=["weather"])


# --- Control tokens -------------------------------------------------------------------------------

def control_rows():
    name = "say <|im_end|> now"
    yield [user(name)], [assistant("yes")], {}
    yield [system(name), user("hi")], [assistant("yes")], {}
    yield [user("hi")], [assistant(name)], {}
    yield [user("hi")], [assistant("yes<|im_end|>")], {}
    yield [user("hi")], [call(), output(name), assistant("yes")], {}
    yield [user("hi")], [call(arguments={"city": name}), *WEATHER[1:]], {}
    yield [user("hi")], [call(arguments={name: "city"}), *WEATHER[1:]], {}
    yield [user("hi")], [call(arguments=json.dumps({"city": name})), *WEATHER[1:]], {}
    yield [user("hi")], [thinking(name, "yes")], {}
    yield [user("") | {"content": parts("<|im_", "end|>")}], [assistant("yes")], {}
    yield [user("hi"), assistant("<|im")], [assistant("_end|>")], {}
    yield [user("hi")], [assistant("yes")], {"tools": [{"type": "function", "function": {
        "name": "f", "description": name}}]}


@pytest.mark.parametrize("prompt, answer, options", control_rows())
def test_a_message_that_spells_a_control_token_drops_its_row(prompt, answer, options):
    text = row_text(QWEN3, prompt, answer, "no", **options)
    assert text.problem == "text that spells the control token <|im_end|>"


def test_a_control_token_is_named_by_its_own_text():
    for token in ("<s>", "<eos>", "<|user|>"):
        text = row_text(CHATML, [user(f"a {token} b")], "yes", "no")
        assert text.problem == f"text that spells the control token {token}"


def test_tags_of_reasoning_and_other_ordinary_tokens_are_no_control_tokens():
    prompt = [user("what is <think> and <tool_call>?")]
    assert row_text(CHATML, prompt, "<think>a</think>b", "no").problem == ""
    # Some tokenizers mark <think> as special.
    tokenizer = make(CHATML)
    token = AddedToken("<think>", special=True, normalized=False)
    tokenizer.add_tokens([token], special_tokens=True)
    special = read_special_tokens(tokenizer)
    text = text_of_messages(prompt, [[assistant("<think>a</think>b")]], tokenizer, special, "row 1")
    assert text.problem == ""


def test_a_tokenizer_that_splits_control_tokens_keeps_the_row():
    tokenizer = make(CHATML)
    tokenizer.split_special_tokens = True
    special = read_special_tokens(tokenizer)
    prompt, answer = [user("say <|im_end|>")], [assistant("yes")]
    assert text_of_messages(prompt, [answer], tokenizer, special, "row 1").problem == ""


# --- Tokens ---------------------------------------------------------------------------------------

def test_a_token_is_scored_if_its_first_character_is_in_a_span():
    offsets = [(0, 2), (2, 5), (5, 6), (6, 9), (9, 9), (9, 12)]
    assert unscored_tokens(offsets, 2, [(5, 6), (9, 12)]) == [1]
    assert unscored_tokens(offsets, 1, [(3, 8)]) == [0, 3, 4]
    assert unscored_tokens(offsets, 0, [(0, 12)]) == []
    assert unscored_tokens(offsets, 6, [(0, 12)]) == []


@pytest.mark.parametrize("kind", TOOL_DIALOGUES)
def test_the_scored_tokens_decode_to_the_scored_text(kind):
    template, expected = TOOL_DIALOGUES[kind]
    tokenizer = make(template)
    special = read_special_tokens(tokenizer)
    text = text_of_messages([user("cold?")], [WEATHER], tokenizer, special, "row 1")
    encoded = tokenizer(text.wholes[0], add_special_tokens=False, return_offsets_mapping=True)
    start = len(tokenizer(text.prompt, add_special_tokens=False)["input_ids"])
    answer = encoded["input_ids"][start:]
    unscored = unscored_tokens(encoded["offset_mapping"], start, text.scored[0])
    ids = [token for i, token in enumerate(answer) if i not in unscored]
    if kind == "deepseek":  # <think> of the generation prompt is not in the whole
        return
    assert tokenizer.decode(ids) == "".join(expected)


def test_a_long_row_with_unscored_turns_is_not_shortened():
    long = " ".join(["word"] * 20_000)
    turns = [assistant(long), user("more"), assistant("Two.")]
    tokenizer = make(CHATML)
    text = row_text(CHATML, [user("count")], turns, "No.")
    plain = row_text(CHATML, [user("count")], long, "No.")
    most = Limits().max_length
    after, shorter = shorten_texts([text, plain], most, tokenizer)
    assert after == text and len(shorter.wholes[0]) < len(plain.wholes[0])


# --- A real model's template ----------------------------------------------------------------------

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)


def test_the_template_of_smollm2_scores_turns_and_drops_what_it_cannot_write():
    text = row_text(SMOLLM2, [user("count")], TURNS, "No.")
    assert scored(text) == ["One.<|im_end|>", "Two.<|im_end|>", "Three.<|im_end|>"]
    prompt = [user("") | {"content": parts("a ", "cat?")}]
    assert "user\na cat?<|im_end|>" in row_text(SMOLLM2, prompt, "yes").prompt
    # Calls inside the content are text.
    calls = [assistant('<tool_call>{"name": "f"}</tool_call>'), tool("4"), assistant("Cold.")]
    assert scored(row_text(SMOLLM2, [user("a")], calls)) == [
        '<tool_call>{"name": "f"}</tool_call><|im_end|>', "Cold.<|im_end|>"]
    reasons = {
        "tool calls of the assistant": ([user("a")], WEATHER),
        "reasoning of an answer": ([user("a")], [thinking("x", "y")]),
    }
    for reason, (prompt, answer) in reasons.items():
        problem = row_text(SMOLLM2, prompt, answer).problem
        assert problem == f"the chat template leaves out the {reason}"
    text = row_text(SMOLLM2, [user("say <|im_start|>")], "y")
    assert text.problem == "text that spells the control token <|im_start|>"


def test_the_report_counts_rows_whose_messages_cannot_be_trained_on(read):  # noqa: F811
    rows = [pair([user("a cat?")]), pair([user("say <|im_end|>")]),
            pair([user("a dog?")], [assistant("yes"), user("more")])]
    *_, report = read(rows, CHATML)
    assert "1 of 3 rows kept, 2 dropped" in report
    assert "text that spells the control token <|im_end|>" in report
    assert "an answer ends with a turn of the user" in report


def test_consecutive_turns_of_the_assistant_are_scored_without_the_header_between_them():
    for template, end in ((QWEN3, "<|im_end|>"), (CHATML, "<|im_end|>"), (PHI3, "<|im_end|>"),
                          (LLAMA, "<|eot|>"), (PLAIN, "<eos>"), (DEEPSEEK, "<eos>")):
        turns = [assistant("One."), assistant("Two."), user("more"), assistant("Three.")]
        text = row_text(template, [user("count")], turns, "No.")
        texts = [part.removeprefix("<think>\n\n</think>\n\n") for part in scored(text)]
        assert texts == [word + end for word in ("One.", "Two.", "Three.")]


def test_a_template_that_fails_on_the_beginning_of_an_answer_drops_the_row():
    failing = "{% if messages|length == 3 %}{{ raise_exception('three') }}{% endif %}" + CHATML
    turns = [assistant("One."), user("more"), assistant("Two.")]
    text = row_text(failing, [user("count")], turns, "No.")
    assert text.problem == "the chat template rewrites an answer as its turns follow"


def test_a_prompt_ends_where_an_answer_without_the_opened_reasoning_begins():
    """Both <think> and <b> begin with <, which belongs to the answer."""
    text = row_text(DEEPSEEK, [user("hi")], "<b>yes</b>", "<think>\nx</think>no")
    assert text.prompt.endswith("<|assistant|>") and text.notes == ("unserved",)
    assert scored(text) == ["<b>yes</b><eos>"]
    turns = [assistant("<b>yes</b>"), user("more"), assistant("<b>no</b>")]
    assert scored(row_text(DEEPSEEK, [user("hi")], turns)) == [
        "<b>yes</b><eos>", "<b>no</b><eos>"]


def test_a_template_that_ends_the_last_turn_by_another_token_scores_the_end_of_each_turn():
    """As gpt-oss, which ends the last turn by <|return|> and the others by <|end|>."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|user|>' + m.content }}"
        "{{ '<eos>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}")
    turns = [assistant("One."), user("more"), assistant("Two.")]
    assert scored(row_text(template, [user("count")], turns)) == [
        "<|user|>One.<|im_end|>", "<|user|>Two.<eos>"]


def test_turns_that_no_token_ends_are_scored_up_to_their_last_letter():
    for closing in ("", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"):
        template = (
            "{% for m in messages %}{{ m.role | title + ': ' + m.content + '\n\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}" + closing)
        turns = [assistant("One. "), user("more"), assistant("Two.")]
        first, last = scored(row_text(template, [user("count")], turns))
        assert first == " One." and last.strip().startswith("Two.")
