"""Rows of every layout are read as one: a prompt, its answers, and what is known of them."""
import json

import pyarrow.parquet
import pytest
from conftest import write_jsonl
from layout_rows import ROWS, arena, bot, helpsteer, orca, pair, safe, says, shp, user, webgpt

import data
import layouts
from conversations import split_prompt, split_row
from errors import UserError
from layouts import LAYOUTS, examples
from registry import Needs
from selection import Shape
from sources import Source

PAIRS = Needs()
LABELS = Needs("labels", ())
LISTS = Needs("lists", ())
SCORED = Needs("lists", (), scores=True)
RANKED = Needs("lists", (), ranked=True)
SFT = Needs(answers=("chosen",))
NPO = Needs(answers=("rejected",))


@pytest.fixture
def read(tmp_path):
    """Write rows to a file and read them -> examples."""
    def run(rows, needs=PAIRS, **shape):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        return list(examples(Source(path), needs, Shape(**shape)))
    return run


@pytest.fixture
def fails(read):
    """The error of rows, which begins with the name of the row."""
    def run(rows, needs=PAIRS, **shape):
        with pytest.raises(UserError) as error:
            read(rows, needs, **shape)
        assert "rows.jsonl" in str(error.value) and "\n" not in str(error.value)
        return str(error.value).partition("rows.jsonl, ")[2]
    return run


def first_example(path, needs, shape=None):
    return next(examples(Source(path), needs, shape or Shape()))


def value_of(example, text):
    return json.loads(text) if example["chat"] else text


def needs_for(layout):
    return LABELS if layout == "kto" else LISTS


CASES = []
for layout_name, layout_rows in ROWS.items():
    for case_number, case in enumerate(layout_rows, 1):
        CASES.append(pytest.param(layout_name, *case, id=f"{layout_name}{case_number}"))


# --- Every layout

def test_every_layout_has_ten_rows():
    assert list(ROWS) == list(LAYOUTS)
    assert {len(rows) for rows in ROWS.values()} == {10}


@pytest.mark.parametrize("name", ["auto", "by name"])
@pytest.mark.parametrize("layout, row, expected", CASES)
def test_a_row_is_read_as_its_layout_says(tmp_path, layout, row, expected, name):
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    shape = Shape() if name == "auto" else Shape(layout)
    needs = needs_for(layout)
    is_hh = layout == "hh" and expected.problem  # alone, such a row is text without marks
    if not (is_hh and name == "auto"):
        assert layouts.find_layout(Source(path), needs, shape) == layout
        example = first_example(path, needs, shape)
        assert value_of(example, example["prompt"]) == expected.prompt
        answers = [value_of(example, answer) for answer in example["answers"]]
        assert example["problem"] == expected.problem
        assert answers == expected.answers
        assert example["ranks"] == (expected.ranks if expected.label is None else [0])
        assert example["labels"] == ([] if expected.label is None else [expected.label])
        assert json.loads(example["options"] or "{}") == expected.options
        assert example["scores"] == [] and example["weight"] == 1


@pytest.mark.parametrize("layout, row, expected", [
    case for case in CASES if case.values[2].scores])
def test_the_scores_follow_the_answers(tmp_path, layout, row, expected):
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    example = first_example(path, SCORED)
    assert example["scores"] == expected.scores
    assert [value_of(example, answer) for answer in example["answers"]] == expected.answers


@pytest.mark.parametrize("rows, better", [
    ([safe(1), safe(0)], ["r1", "r0"]),
    ([shp(0), shp(1)], ["B", "A"]),
    ([helpsteer(1), helpsteer(-1)], [[bot("two")], [bot("one")]]),
    ([arena("model_b"), arena("model_a")], [[bot("B")], [bot("A")]]),
    ([webgpt(-1, 1), webgpt(1, -1)], ["a1", "a0"]),
])
@pytest.mark.parametrize("needs", [PAIRS, SFT, LISTS])
def test_the_better_answer_is_the_chosen_one_also_where_the_file_has_it_second(
        read, rows, better, needs):
    found = [value_of(example, example["answers"][0]) for example in read(rows, needs)]
    assert found == better
    if needs == PAIRS:
        worse = [value_of(example, example["answers"][1]) for example in read(rows)]
        assert worse == better[::-1]
        assert [value_of(e, e["answers"][0]) for e in read(rows, NPO)] == better[::-1]


def test_the_dialogues_of_an_arena_begin_where_they_differ(read):
    """Later turns of the user are part of each answer."""
    row = {"prompt": '["Sky?", "Sure?"]', "response_a": '["Red.", "Yes."]',
           "response_b": '["Blue.", "Of course."]', "winner_model_a": 0, "winner_model_b": 1,
           "winner_tie": 0, "model_a": "m"}
    example, = read([row])
    assert value_of(example, example["prompt"]) == [user("Sky?")]
    assert value_of(example, example["answers"][0]) == [
        bot("Blue."), user("Sure?"), bot("Of course.")]
    tie, = read([row | {"winner_model_b": 0, "winner_tie": 1}])
    assert tie["problem"] == "ties only"


def test_a_csv_file_has_the_lists_scores_and_labels_as_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,responses,scores\na,"[""b"", ""c""]","[1, 2]"\n')
    assert first_example(str(path), SCORED)["scores"] == [2, 1]
    path.write_text("prompt,completion,label,weight\na,b,True,0.5\na,c,False,\n")
    rows = list(examples(Source(str(path)), LABELS, Shape()))
    assert [row["labels"] for row in rows] == [[True], [False]]
    assert [row["weight"] for row in rows] == [0.5, 1]


def test_parquet_adds_no_null_keys_to_calls_and_tools(tmp_path):
    calls = [{"function": {"name": "f", "arguments": {name: "x"}}} for name in ("a", "b")]
    tools = [{"name": "f", "parameters": {name: "int"}} for name in ("a", "b")]
    rows = [{"prompt": [user("hi")], "chosen": [bot("", tool_calls=calls)],
             "rejected": [bot("no")], "tools": tools}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    example = first_example(str(tmp_path / "rows.parquet"), PAIRS)
    assert json.loads(example["answers"][0]) == [bot("", tool_calls=calls)]
    assert json.loads(example["answers"][1]) == [bot("no")]
    assert json.loads(example["options"]) == {"tools": tools}


def test_the_first_note_may_come_after_a_thousand_rows(tmp_path):
    """`datasets` would take the types of the columns from the first thousand rows."""
    rows = [pair("a", "b", prompt=[user(str(number))]) for number in range(1100)]
    rows.append(pair("a", "b", prompt=[says("human", "hi")]))
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    text = data.load_text(Source(path), PAIRS, Shape())
    assert text[1100]["notes"] == ["roles under other names"]
    assert text[:]["labels"] == [[]] * 1101


# --- The layout of a file

def test_a_row_of_two_layouts_is_an_error_that_names_both(fails, read):
    row = pair(" b", " c", prompt="a", responses=[" d", " e"])
    message = fails([row])
    assert "may be of the layout trl (prompt, chosen, rejected) or ranked (prompt, resp" in message
    assert "--layout trl or --layout ranked" in message
    assert read([row], layout="trl")[0]["answers"] == [" b", " c"]
    assert read([row], layout="ranked")[0]["answers"] == [" d", " e"]
    assert read([row], ignored=("responses",))[0]["answers"] == [" b", " c"]
    row = orca("s", generations=["x", "y"], rating=[1, 2], name="input")
    assert "scored (input, generations, rating) or orca (input" in fails([row])


@pytest.mark.parametrize("row, message", [
    ({"prompt": "a", "completion": " b"}, "the nearest layout is kto, without 'label'"),
    ({"prompt": "a", "response_0": "b", "response_1": "c"},
     "the nearest layout is labelled_pair, without 'better_response_id'"),
    ({"history": "a", "human_ref_A": "b", "human_ref_B": "c"}, "labelled_pair, without 'labels'"),
    ({"input": {}, "preferred_output": []}, "openai, without 'non_preferred_output'"),
    ({"answer": "b"}, "it has 'answer'"),
])
def test_a_row_of_no_layout_is_an_error_that_names_the_nearest(fails, row, message):
    assert message in fails([row])


@pytest.mark.parametrize("layout, message", [
    ("kto", "--layout kto needs the fields prompt, completion, label; the row lacks 'completion', "
            "'label' and has 'chosen', 'prompt', 'rejected'; it may be of the layout trl"),
    ("openai", "lacks 'input', 'preferred_output', 'non_preferred_output'"),
    ("rankd", "--layout rankd: there is no such layout"),
])
def test_a_layout_whose_fields_are_missing_is_an_error_that_says_which(fails, layout, message):
    assert message in fails([pair(" b", " c", prompt="a")], layout=layout)


def test_columns_that_rename_the_fields_of_a_layout_are_named(fails):
    columns = (("prompt", "history"), ("chosen", "human_ref_A"), ("rejected", "human_ref_B"))
    message = fails([shp(1)], layout="labelled_pair", columns=columns)
    assert "leave --columns out" in message


def test_a_file_may_not_change_its_layout(fails):
    rows = [{"prompt": "a", "responses": ["b", "c"]}, pair("b", "c", prompt="a")]
    assert fails(rows) == "row 2: the field 'responses' is missing or null"
    assert "row 2: has a prompt, and the first row of its file had none" in fails(
        [pair("a b", "a c"), pair(" b", " c", prompt="a")])
    rows = [pair(" b", " c", prompt="a"), pair("b", "c", prompt=[user("a")])]
    assert "row 2: the row is a list of messages, but earlier rows are text" in fails(rows)


@pytest.mark.parametrize("row, prompt", [
    ({"question": "a", "chosen": "b", "rejected": "c"}, "question"),
    ({"instruction": "a", "chosen": "b", "rejected": "c"}, "instruction"),
])
def test_a_prompt_under_another_name_may_be_renamed_or_read_by_a_layout(fails, read, row, prompt):
    message = fails([row])
    assert f"pass --columns prompt={prompt}" in message and "the layout" in message
    assert read([row], columns=(("prompt", prompt),))[0]["prompt"] == "a"
    layout = "alpaca" if prompt == "instruction" else "orca"
    assert json.loads(read([row], layout=layout)[0]["prompt"]) == [user("a")]


def test_columns_of_any_layout_may_be_renamed(read):
    row = {"q": "a", "good_to_bad": [" b", " c"], "w": 2}
    columns = (("prompt", "q"), ("responses", "good_to_bad"), ("weight", "w"))
    example, = read([row], columns=columns)
    assert (example["prompt"], example["answers"]) == ("a", [" b", " c"])
    assert (example["weight"], example["unread"]) == (2, "[]")
    assert {"prompt", "responses", "weight", "id", "label"} <= set(layouts.known_names())


def test_an_empty_prompt_is_a_prompt(read):
    example, = read([pair("The sky", ["The sea", "The sun"], prompt="")], LISTS)
    assert (example["prompt"], example["has_own_prompt"]) == ("", True)
    assert example["answers"] == ["The sky", "The sea", "The sun"]


# --- What the loss needs

FOUR = {"prompt": "p", "responses": ["a", "b", "c", "d"]}
TIES = {"prompt": "p", "responses": ["a", "b", "c", "d"], "scores": [3, 1, 1, 0]}


def answers_of(found):
    return [example["answers"] for example in found]


def test_pairs_of_several_answers_need_the_flag_pairs(fails, read):
    assert "row 1: has 4 answers, and the loss reads pairs; pass --pairs best_worst|all|adj" in (
        fails([FOUR]))
    assert answers_of(read([FOUR], pairs="best_worst")) == [["a", "d"]]
    assert answers_of(read([FOUR], pairs="adjacent")) == [["a", "b"], ["b", "c"], ["c", "d"]]
    every = read([FOUR], pairs="all")
    assert answers_of(every) == [list(two) for two in ("ab", "ac", "ad", "bc", "bd", "cd")]
    assert len({example["id"] for example in every}) == 6
    assert every[1]["id"].endswith("rows.jsonl, row 1, answers 1 and 3")
    assert {tuple(example["ranks"]) for example in every} == {(0, 1)}


def test_tied_pairs_are_left_out_and_noted_once(read):
    assert answers_of(read([TIES], pairs="adjacent")) == [["a", "b"], ["c", "d"]]
    every = read([TIES], Needs(scores=True), pairs="all")
    assert ["b", "c"] not in answers_of(every) and len(every) == 5
    assert [example["scores"] for example in every][:2] == [[3, 1], [3, 1]]
    assert [example["notes"] for example in every] == [["tied pairs left out"]] + [[]] * 4
    assert read([TIES], pairs="best_worst")[0]["notes"] == []


@pytest.mark.parametrize("needs", [PAIRS, SFT, NPO, LISTS, RANKED])
def test_a_row_of_ties_has_a_problem(read, needs):
    example, = read([TIES | {"scores": [2, 2, 2, 2]}], needs, pairs="all")
    assert example["problem"] == "ties only"
    assert len(example["answers"]) == max(1, len(needs.answers) or 2)


def test_a_pair_of_scored_answers_is_a_pair_without_a_flag(read):
    rows = [{"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}]
    example, = read(rows, Needs(scores=True))
    assert (example["answers"], example["scores"]) == (["b", "a"], [2, 1])


def test_one_answer_is_the_best_or_the_worst(read):
    assert answers_of(read([TIES], SFT)) == [["a"]]
    assert answers_of(read([TIES], NPO)) == [["d"]]
    rows = [pair("b", ["c", "d"], prompt="a")]
    assert answers_of(read(rows, SFT)) == [["b"]]


def test_a_loss_of_one_answer_reads_labelled_rows_of_its_label(read):
    rows = [{"prompt": "p", "completion": "a", "label": True},
            {"prompt": "p", "completion": "b", "label": False}]
    assert [example["problem"] for example in read(rows, SFT)] == ["", "labelled false"]
    assert [example["problem"] for example in read(rows, NPO)] == ["labelled true", ""]
    assert {tuple(example["labels"]) for example in read(rows, SFT)} == {()}


@pytest.mark.parametrize("needs", [PAIRS, LISTS])
def test_labelled_rows_are_no_pairs_and_no_lists(fails, needs):
    rows = [{"prompt": "p", "completion": "a", "label": True}]
    assert "row 1: has one answer with a label, and the loss reads" in fails(rows, needs)


def test_a_list_of_a_loss_with_ranks_keeps_the_first_of_tied_answers(read):
    assert answers_of(read([TIES], RANKED)) == [["a", "b", "d"]]
    example, = read([TIES], RANKED)
    assert example["notes"] == ["tied answers dropped"] and example["ranks"] == [0, 1, 2]
    example, = read([TIES], SCORED)
    assert example["scores"] == [3, 1, 1, 0] and example["ranks"] == [0, 1, 1, 2]
    assert example["notes"] == []


def test_a_list_of_one_best_answer_keeps_the_first_of_the_best(read):
    example, = read([TIES | {"scores": [2, 3, 3, 2]}], LISTS)
    assert example["answers"] == ["b", "a", "d"] and example["notes"] == ["tied answers dropped"]
    assert read([TIES | {"scores": [2, 2, 2, 2]}], SCORED)[0]["problem"] == ""


def test_pairs_become_labelled_answers_by_unpair_alone(fails, read):
    rows = [pair(" b", " c", prompt="a", weight=2)]
    assert "--unpair labels the better answer of a pair true" in fails(rows, LABELS)
    found = read(rows, LABELS, unpair=True)
    assert answers_of(found) == [[" b"], [" c"]]
    assert [(e["labels"], e["weight"], e["ranks"]) for e in found] == [
        ([True], 2, [0]), ([False], 2, [0])]
    assert [e["id"].rpartition(", ")[2] for e in found] == ["answer 1", "answer 2"]
    assert answers_of(read([shp(0)], LABELS, unpair=True)) == [["B"], ["A"]]


def test_answers_that_unpair_would_label_twice_are_an_error(fails, read):
    message = fails([FOUR], LABELS, unpair=True, pairs="all")
    assert "answer 2 is the better one of one pair and the worse one of another" in message
    assert answers_of(read([FOUR], LABELS, unpair=True, pairs="best_worst")) == [["a"], ["d"]]
    several = [pair("b", ["c", "d"], prompt="a")]
    found = read(several, LABELS, unpair=True, pairs="all")
    assert answers_of(found) == [["b"], ["c"], ["d"]]


def test_the_scores_of_a_pair_are_columns_in_every_layout_of_pairs(read, fails):
    needs = Needs(scores=True)
    for row in (pair(" b", " c", prompt="a"), orca("s"), pair("b", "c", instruction="a", input="")):
        example, = read([row | {"chosen_score": "2", "rejected_score": 1}], needs)
        assert example["scores"] == [2, 1] and example["unread"] == "[]"
        assert "the loss reads the field 'chosen_score', a finite number" in fails([row], needs)
    assert "this row of the layout labelled_pair has none" in fails([safe(0)], needs)
    row = pair("b", ["c", "d"], prompt="a", chosen_score=3, rejected_score=[1, 2])
    assert read([row], SCORED)[0]["scores"] == [3, 1, 2]


# --- Bad input

@pytest.mark.parametrize("row, message", [
    ({"prompt": "a", "completion": "b", "label": "good"}, "'label' holds \"good\"; a label"),
    ({"prompt": "a", "completion": "b", "label": 2}, "'label' holds 2; a label is true or false"),
    ({"prompt": "a", "completion": "b", "label": [True]}, "'label' holds [true]; a label is"),
    ({"prompt": "a", "completion": "b", "label": None}, "'label' is missing or null"),
    ({"prompt": "a", "responses": []}, "'responses' holds [], which is not a list with something"),
    ({"prompt": "a", "responses": ["b"]}, "has 1 answer, and the loss compares at least two"),
    ({"prompt": "a", "responses": "b"}, "'responses' holds \"b\", which is not a list"),
    ({"prompt": "a", "responses": ["b", 7]}, "'responses[2]' holds 7, which is neither text nor"),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [1]},
     "'scores' has 1 numbers for 2 answers"),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [1, None]}, "'scores' holds null, which"),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [1, float("nan")]}, "holds NaN, which is"),
    ({"prompt": "a", "responses": ["b", "c"], "scores": [1, float("inf")]}, "holds Infinity,"),
    ({"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2, 3]}, "has 3 numbers for 2 answers"),
    ({"instruction": "a", "completions": [{"response": "b"}, {"response": "c"}]},
     "'completions[1]' has no overall_score and no ratings"),
    ({"prompt": "a", "answers": [{"answer": "b", "rank": 1}, {"answer": "c"}]},
     "'answers[2].rank' holds null, which is not a finite number"),
    (pair("b", "c", prompt="a", weight=-1), "'weight' holds -1; a weight is at least 0"),
    (pair("b", "c", prompt="a", weight="inf"), "'weight' holds \"inf\", which is not a finite"),
    (pair("b", "c", prompt="a", weight=[1]), "'weight' holds [1], which is not a finite number"),
    (safe(0, better_response_id=2), "'better_response_id' holds 2; it is one of 0, 1"),
    (shp(1) | {"labels": "yes"}, "'labels' holds \"yes\"; it is one of 1, 0, true, false"),
    (arena("m-7b"), "'winner' holds \"m-7b\"; it is one of model_a"),
    (helpsteer(None), "'overall_preference' is missing or null"),
    (pair("b", "c", instruction="a", history=[["x"]]), "'history' holds [\"x\"]; write each"),
    (pair("b", "c", instruction="", input=""), "'instruction' and 'input' are missing or empty"),
    ({"conversations": [says("human", "x")], "chosen": "b", "rejected": 3}, "'rejected' holds 3"),
    (orca("s") | {"system": {"x": "y"}}, "'system' holds {\"x\": \"y\"}, which is not text"),
    ({"input": {"text": "x"}, "preferred_output": "a", "non_preferred_output": "b"},
     "'input.messages' holds null"),
    (pair("b", "c", prompt="a", tools=[{"name": "f"}]), "only a chat template writes"),
])
def test_bad_input_is_one_line_with_file_and_row(fails, row, message):
    assert fails([row], LABELS if "completion" in row else PAIRS).startswith("row 1: ")
    assert message in fails([row], LABELS if "completion" in row else PAIRS)


def test_labels_that_are_all_alike_are_an_error_of_a_loss_of_labels(tmp_path, tokenizer):
    rows = [{"prompt": "p", "completion": str(i), "label": True} for i in range(3)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="rows.jsonl: every answer has the label true"):
        data.load_tokens(path, tokenizer, LABELS)
    assert data.load_tokens(path, tokenizer, SFT)[1]["kept"] == 3


# --- Columns that are not read

@pytest.mark.parametrize("row, columns, message", [
    (shp(1), "history,human_ref_A,human_ref_B", "'labels' is not read: it says which answer"),
    (safe(1), "prompt,response_0,response_1", "'better_response_id' is not read"),
    (helpsteer(1), "context,response1,response2", "'overall_preference' is not read"),
])
def test_columns_that_would_leave_the_verdict_out_are_an_error_that_names_the_layout(
        fails, read, row, columns, message):
    names = tuple(zip(("prompt", "chosen", "rejected"), columns.split(",")))
    error = fails([row], columns=names)
    assert message in error and "--layout labelled_pair without --columns reads it" in error
    ignored = ("labels", "score_A", "score_B", "better_response_id", "safer_response_id",
               "overall_preference")
    assert len(read([row], columns=names, ignored=ignored)) == 1


@pytest.mark.parametrize("name, value, advice", [
    ("label", True, "the layout kto read"), ("labels", 1, "the layout labelled_pair read"),
    ("winner", "model_a", "labelled_pair"), ("preference", 1, "remove the row or the column"),
    ("margin", 0.5, "losses with scores read chosen_score and rejected_score"),
    ("kto_tag", False, "kto"), ("score_A", 3, "labelled_pair"), ("images", ["a.png"], "remove the"),
    ("input", "more", "alpaca"), ("history", [["a", "b"]], "alpaca"), ("system", "s", "orca"),
    ("overall_preference", -3, "labelled_pair"),
    ("Overall Preference", -3, "remove the row"),
    ("sample_weight", 2, "--columns weight=sample_we"),
    ("chat_template_kwargs", {"enable_thinking": "no"}, "--template_kwargs"),
])
def test_a_column_that_changes_the_meaning_is_an_error_that_names_what_reads_it(
        fails, read, name, value, advice):
    row = pair(" b", " c", prompt="a") | {name: value}
    message = fails([row])
    assert f"row 1: the column '{name}' is not read" in message and advice in message
    assert json.loads(read([row], ignored=(name,))[0]["unread"]) == [name]


def test_a_weight_is_read_and_may_be_ignored(read):
    rows = [pair(" b", " c", prompt="a", weight=w) for w in (0, "0.5", 2, None)]
    assert [example["weight"] for example in read(rows)] == [0, 0.5, 2, 1]
    ignored = read(rows[2:3], ignored=("weight",))[0]
    assert (ignored["weight"], ignored["unread"]) == (1, '["weight"]')


# --- Messages

def test_the_keys_that_a_template_reads_are_kept_and_the_others_listed(read):
    keys = {"tool_calls": [{"function": {"name": "f", "arguments": None}}], "thinking": "hm",
            "reasoning_content": "so", "name": "x", "tool_call_id": "1", "train": False}
    rows = [pair([bot("a", **keys)], [bot("b", id=4, name=None)], prompt=[user("hi")])]
    example, = read(rows)
    assert json.loads(example["answers"][0]) == [bot("a", **keys)]
    assert json.loads(example["answers"][1]) == [bot("b")]
    assert json.loads(example["unread"]) == ["rejected[].id"]


@pytest.mark.parametrize("message, error", [
    (bot(None), "a message has a role and a content, both text"),
    ({"content": "x"}, "a message has a role"),
    (bot("x", train="no"), "holds a message with train \"no\"; write true or false"),
    (bot([{"type": "image_url", "image_url": "x"}]), "a part of the type \"image_url\""),
    (bot(["x"]), "a part of the type \"str\""),
    (bot("x", images=["x.png"]), "a message with images, which is not read"),
    (bot("x", weight=0), 'write "train": false to leave the message out of the loss'),
    (bot("x", thought="hm", reasoning="x is so"), "name it reasoning_content"),
    (says("function_call", "weather"), "it is JSON with a name and arguments"),
])
def test_a_message_that_is_not_understood_is_an_error(fails, message, error):
    assert error in fails([pair([message], [bot("b")], prompt=[user("hi")])])


def test_roles_under_other_names_are_mapped_and_noted(read):
    rows = [{"prompt": [says("Human", "hi")], "chosen": [{"role": "Assistant", "content": "a"}],
             "rejected": [says("gpt", "b")]}, pair("a", "b", prompt=[user("hi")])]
    first, second = read(rows)
    assert first["notes"] == ["roles under other names"] and second["notes"] == []
    assert first["prompt"] == second["prompt"] and first["answers"] == second["answers"]


def test_the_prompt_of_messages_with_parts_is_found(read):
    parts = [{"type": "text", "text": "Sky?"}]
    rows = [pair([user(parts), bot("a")], [user(parts), bot("b")], prompt="Sky?")]
    assert json.loads(read(rows)[0]["prompt"]) == [user(parts)]


def test_two_system_prompts_are_an_error(fails):
    row = {"conversations": [says("system", "a"), says("human", "b")], "system": "c",
           "chosen": "d", "rejected": "e"}
    assert "has a system message and another one in the column 'system'" in fails([row])


def test_one_text_without_a_prompt_is_an_error():
    with pytest.raises(UserError, match="row 1: one text without a prompt"):
        split_row(None, {"chosen": "hi"}, "row 1")


def test_a_prompt_inside_two_dialogues_ends_with_their_last_shared_turn():
    history = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: why?\n\nAssistant:"
    assert split_prompt(history + " Because a", history + " Because b") == history
    assert split_prompt("abc", "abd") == ""


def test_unpair_is_refused_for_rows_with_labels_and_named_for_rows_with_many_answers(tmp_path):
    unpaired = Shape(unpair=True)
    labelled = {"prompt": "a", "completion": " b", "label": True}
    path = write_jsonl(tmp_path / "labels.jsonl", [labelled])
    with pytest.raises(UserError, match="row 1: has a label; leave out --unpair"):
        list(examples(Source(path), LABELS, unpaired))
    ranked = {"prompt": "a", "responses": [" b", " c", " d"]}
    path = write_jsonl(tmp_path / "ranked.jsonl", [ranked])
    with pytest.raises(UserError, match="3 answers, and --unpair reads pairs; pass --pairs"):
        list(examples(Source(path), LABELS, unpaired))
