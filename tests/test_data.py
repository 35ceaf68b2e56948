"""From text to token ids: no text is lost, doubled, merged or added silently."""

import csv
import json

import datasets
import forked
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import SHARED, make_rows, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
from conversations import split_prompt, split_row
from data import (
    IGNORE,
    Limits,
    describe,
    hold_out,
    load_tokens,
    micro_batches,
    pad_rows,
    truncate,
    window,
)
from errors import UserError
from layouts import examples
from registry import Needs
from selection import Shape
from sources import Source

BOTH = ("chosen", "rejected")


@pytest.fixture
def load(tokenizer, tmp_path):
    """Write rows to a file and load them -> kept rows, a report on the other rows."""

    def run(
        rows,
        name="rows.jsonl",
        sides=BOTH,
        limits=Limits(),
        tokenizer=tokenizer,
        strict=False,
        scored=False,
        columns=(),
    ):
        path = tmp_path / name
        if isinstance(rows, str):
            path.write_text(rows, encoding="utf-8")
        else:
            write_jsonl(path, rows)
        needs = Needs(answers=sides, scores=scored, ordered_scores=scored and len(sides) == 2)
        shape = Shape(columns=columns)
        rows, account = load_tokens(str(path), tokenizer, needs, limits, shape, strict)
        return rows, describe(account)

    return run


def row(prompt="a cat", chosen=" sat", rejected=" ran"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


# --- formats


def test_the_same_rows_give_the_same_tokens_from_every_kind_of_file(load, tmp_path, tokenizer):
    rows = make_rows(5) + [
        row("NA", " 42", " None"),
        row('quotes " and, commas', " \n two lines", " ü 😀 漢字 e\u0301"),
    ]
    expected = load(rows)[0].remove_columns("id")[:]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    write_csv(tmp_path / "rows.csv", rows)
    write_parquet(tmp_path / "rows.parquet", rows)
    for name in ("rows.json", "rows.csv", "rows.parquet"):
        kept, _ = load_tokens(str(tmp_path / name), tokenizer)
        assert kept.remove_columns("id")[:] == expected, name


@pytest.mark.parametrize("optional", [{}, {"name": None}])
def test_a_json_list_has_the_texts_of_the_same_json_lines(tmp_path, optional):
    """Readers that infer types make a date of "2020-01-01", a number of "7", and a string of a
    message with an optional key."""
    rows = [row("when?", "2020-01-01", "7"), row("why?", "NA", "null")]
    if optional:
        rows = [next(every_format(text)) for text in rows]
        rows[0]["chosen"][0] |= optional
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    write_jsonl(tmp_path / "rows.jsonl", rows)
    files = [Source(str(tmp_path / name)) for name in ("rows.json", "rows.jsonl")]
    from_list, from_lines = (list(examples(file, Needs(), Shape())) for file in files)
    assert [text.pop("id") for text in from_list] == [
        f"{tmp_path}/rows.json, row 1", f"{tmp_path}/rows.json, row 2",
    ]
    assert [text.pop("id") for text in from_lines] == [
        f"{tmp_path}/rows.jsonl, row 1", f"{tmp_path}/rows.jsonl, row 2",
    ]
    assert from_list == from_lines


def test_a_folder_is_read_file_by_file_in_the_order_of_their_names(load, tmp_path, tokenizer):
    folder = tmp_path / "many"
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", make_rows(3, seed=1))
    write_jsonl(folder / "a.jsonl", make_rows(2, seed=2))
    ids = load_tokens(str(folder), tokenizer)[0]["id"]
    expected = [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]
    assert list(ids) == [f"{folder}/{name}.jsonl, row {number}" for name, number in expected]


def test_a_prompt_inside_two_dialogues_ends_with_their_last_shared_turn():
    """Otherwise an answer would lose its first word."""
    history = "\n\nHuman: hi\n\nAssistant: Hello there.\n\nHuman: why?\n\nAssistant:"
    chosen, rejected = history + " Because it is so.", history + " Because I say so."
    assert split_prompt(chosen, rejected) == history  # not "... Because ", which both share
    assert split_prompt("Q: why? Because it is", "Q: why? Because I say") == "Q: why? Because"
    # "th" is the beginning of a word, not a prompt.
    assert split_prompt("one two three", "one two thirty") == "one two"
    assert split_prompt("abc", "abd") == ""


def test_explicit_prompts_and_prompts_inside_both_give_the_same_tokens(load):
    prompt = "\n\nHuman: go on\n\nAssistant:"
    explicit = load([row(prompt, " one", " two")])[0]
    rows = [{"chosen": prompt + " one", "rejected": prompt + " two"}]
    inside = load(rows, name="inside.jsonl")[0]
    assert explicit[0] == inside[0] | {"id": explicit[0]["id"]}


def test_sft_needs_no_rejected_answer(load):
    rows = [{"prompt": "a", "chosen": " b"}, {"prompt": "a", "chosen": " c"}]
    kept, _ = load(rows, sides=("chosen",))
    assert list(map(len, kept["answer_ids"])) == [1, 1]


# --- tokens


def test_the_scored_tokens_decode_to_the_answer_and_eos(load, tokenizer):
    rows = make_rows(30) + [
        row("ende", "ü 😀", "漢字"),
        row("e", "\u0301 x", "y"),
        row("🙂", "🙂🙂", " 🙂"),
    ]
    kept, _ = load(rows)
    for tokens, text in zip(kept, rows):
        for side, answer in zip(BOTH, tokens["answer_ids"], strict=True):
            assert answer[-1] == tokenizer.eos_token_id
            whole = tokens["prompt_ids"] + answer[:-1]
            assert tokenizer.decode(whole) == text["prompt"] + text[side]
            assert whole == tokenizer(text["prompt"] + text[side])["input_ids"]


def merging_tokenizer():
    """BPE over letters that merges "b" + "c": across the boundary of prompt "ab", answer "cd"."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", "a", "b", "c", "d", "x", "bc", " "])}
    backend = Tokenizer(models.BPE(vocabulary, [("b", "c")]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_both_answers_have_the_same_prompt_when_tokens_merge_across_the_boundary(load):
    """Prompt "ab" is a b, but "abcd" is a bc d. The three texts have only "a" in common, so "b" is
    scored with the answers."""
    kept, _ = load([row("ab", "cd", "xd")], tokenizer=merging_tokenizer())
    ids = merging_tokenizer().convert_tokens_to_ids
    assert kept[0]["prompt_ids"] == ids(["a"])
    assert kept[0]["answer_ids"][0] == ids(["bc", "d", "<eos>"])
    assert kept[0]["answer_ids"][1] == ids(["b", "x", "d", "<eos>"])


def bos_tokenizer(tokenizer):
    """The same BPE, which puts <bos> before a text as Llama's does."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<bos>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


@pytest.mark.parametrize("prompt", ["a cat", "<bos>a cat", ""])
def test_bos_is_first_and_appears_once_even_if_the_text_begins_with_it(load, tokenizer, prompt):
    with_bos = bos_tokenizer(tokenizer)
    tokens = load([row(prompt)], tokenizer=with_bos)[0][0]
    whole = tokens["prompt_ids"] + tokens["answer_ids"][0]
    assert whole[0] == with_bos.bos_token_id and whole.count(with_bos.bos_token_id) == 1


def test_a_tokenizer_without_bos_adds_none_and_a_prompt_without_tokens_is_dropped(load, tokenizer):
    kept, account = load([row(""), row()])
    assert len(kept) == 1
    assert "1 dropped (no prompt: " in account
    assert kept[0]["prompt_ids"] == tokenizer("a cat")["input_ids"]


def test_an_answer_that_ends_with_eos_gets_no_second_one(load, tokenizer):
    kept, _ = load([row(chosen=" sat<eos>")])
    assert kept[0]["answer_ids"][0].count(tokenizer.eos_token_id) == 1


def test_a_cut_answer_loses_eos_and_an_answer_that_just_fits_keeps_it(load, tokenizer):
    length = len(load([row()])[0][0]["answer_ids"][0])
    rows = [row(rejected=" ran far from home")]
    kept = load(rows, limits=Limits(max_completion_length=length))[0][0]
    chosen, rejected = kept["answer_ids"]
    assert chosen[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in rejected
    assert len(rejected) == length


# --- truncation


def test_a_prompt_is_cut_only_as_far_as_its_answers_need():
    prompt, answers = list(range(100)), [[1] * 10, [2] * 20]

    def cut(front=0, prompt=prompt, **limits):
        return truncate(prompt, answers, Limits(**limits), front)

    assert cut(max_length=120) == (prompt, answers)
    # The prompt keeps its last 50 tokens, which the longer answer leaves.
    assert cut(max_length=70) == (prompt[-50:], answers)
    assert cut(max_length=70, truncation_mode="keep_start") == (prompt[:50], answers)
    # The prompt keeps half of max_length at least.
    assert cut(max_length=30) == (prompt[-15:], [[1] * 10, [2] * 15])
    assert cut(max_length=70, max_prompt_length=5) == (prompt[-5:], answers)
    short = [[1] * 4, [2] * 4]
    assert cut(max_completion_length=4) == (prompt, short)
    assert cut(max_length=104, max_completion_length=4) == (prompt, short)
    # BOS stays.
    assert cut(max_length=70, front=1, prompt=[7] + prompt) == ([7] + prompt[-49:], answers)


def test_a_prompt_of_10000_tokens_leaves_the_answers_whole_and_keeps_its_end(load, tokenizer):
    long = "x" * 10_000 + " end"
    kept, account = load([row(long)], limits=Limits(max_length=64))
    tokens = kept[0]
    assert tokenizer.decode(tokens["answer_ids"][0]) == " sat<eos>"
    assert "1 rows: prompt truncated" in account
    assert tokenizer.decode(tokens["prompt_ids"]).endswith("x end")
    assert len(tokens["prompt_ids"]) + max(map(len, tokens["answer_ids"])) == 64


# --- rows without a training signal


def test_useless_rows_are_dropped_counted_and_named(load):
    rows = [
        row(),
        row(chosen="   "),
        row(rejected=""),
        row(chosen=" ran"),
        row(chosen=" same start a", rejected=" same start b"),
    ]
    kept, account = load(rows, limits=Limits(max_completion_length=2))
    assert len(kept) == 1 and "1 of 5 rows kept, 4 dropped" in account
    for reason in (
        "empty answer: ",
        "chosen equals rejected: ",
        "chosen equals rejected after truncation: ",
    ):
        assert reason in account
    assert all(f"rows.jsonl, row {number}" in account for number in (2, 3, 4, 5))


def test_strict_makes_useless_rows_an_error(load):
    with pytest.raises(UserError, match="chosen equals rejected: .*rows.jsonl, row 2"):
        load([row(), row(chosen=" ran")], strict=True)


def test_sft_keeps_a_row_whose_answers_are_equal(load):
    assert len(load([row(chosen=" ran")], sides=("chosen",))[0]) == 1


def test_scores_are_read_from_json_and_csv_for_a_loss_that_needs_them(load):
    rows = [row(), row(chosen=" slept")]
    for r, (better, worse) in zip(rows, ((2, -0.5), (1e9 + 1e-6, 1e9))):
        r |= {"chosen_score": better, "rejected_score": worse}
    from_json = load(rows, scored=True)[0]
    batch = pad_rows(from_json[[0, 1]], 0)
    assert batch["scores"].tolist() == [[2, -0.5], [1e9 + 1e-6, 1e9]]
    lines = ["prompt,chosen,rejected,chosen_score,rejected_score"]
    lines += [",".join(map(str, r.values())) for r in rows]
    from_csv = load("\n".join(lines) + "\n", "rows.csv", scored=True)[0]
    assert from_csv.remove_columns("id")[:] == from_json.remove_columns("id")[:]
    assert "scores" not in load(rows)[0].column_names


def test_a_score_is_read_without_a_rejected_answer(load):
    kept, _ = load([row() | {"chosen_score": 2}], sides=("chosen",), scored=True)
    assert kept["scores"][:] == [[2]]


def test_a_score_against_the_preference_drops_the_row_and_a_score_that_is_no_number_is_an_error(
    load,
):
    rows = [
        row() | {"chosen_score": 1, "rejected_score": 0},
        row() | {"chosen_score": 1, "rejected_score": 1.0},
    ]
    kept, account = load(rows, scored=True)
    assert len(kept) == 1
    assert "1 dropped (chosen_score not above rejected_score: " in account
    assert "row 2" in account
    message = "row 1: the loss reads the field 'chosen_score', a finite number"
    for bad in (None, "high", float("nan"), float("inf"), [1]):
        with pytest.raises(UserError, match=message):
            load([rows[0] | {"chosen_score": bad}], scored=True)
    with pytest.raises(UserError, match="row 1: the loss reads the field 'chosen_score'"):
        load([row()], scored=True)


def test_a_rejected_answer_is_read_alone_and_beside_a_chosen_one(load):
    alone = {"prompt": "a cat", "rejected": " ran"}
    kept, report = load([alone], sides=("rejected",))
    pairs, _ = load([row()], "pairs.jsonl", sides=("rejected",))
    both = load([row()], "pairs.jsonl")[0]
    assert kept["answer_ids"][:] == pairs["answer_ids"][:] == [[both[0]["answer_ids"][1]]]
    assert data.statistics(kept)["lengths"].keys() == {"prompt", "answer"}
    dialogue = {"chosen": "\n\nHuman: hi\n\nAssistant: sat", "rejected":
                "\n\nHuman: hi\n\nAssistant: ran"}
    split, _ = load([dialogue], "dialogue.jsonl", sides=("rejected",))
    both = load([dialogue], "dialogue.jsonl")[0]
    assert split["answer_ids"][:] == [[both[0]["answer_ids"][1]]]
    with pytest.raises(UserError, match="needs the fields prompt, rejected"):
        load([{"prompt": "a cat", "chosen": " sat"}], sides=("rejected",))


@pytest.mark.skipif(not SHARED.exists(), reason="the project's shared data is not here")
def test_real_dialogues_split_where_their_last_answer_begins():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    path = SHARED / "data" / "hh_harmless_512.jsonl"
    kept, account = load_tokens(str(path), tokenizer, limits=Limits(max_length=4096))
    assert "511 of 512 rows kept, 1 dropped (empty answer: " in describe(account)
    assert "row 87)" in describe(account)
    texts = [json.loads(line) for line in open(path)]
    for tokens in kept:
        prompt = tokenizer.decode(tokens["prompt_ids"])
        text = texts[int(tokens["id"].split("row ")[1]) - 1]
        assert prompt.endswith("\n\nAssistant:")
        for side, answer in zip(BOTH, tokens["answer_ids"], strict=True):
            assert prompt + tokenizer.decode(answer) == text[side] + "<|endoftext|>"


# --- bad files

BAD = {
    "a missing key": (
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n',
        "row 2: the field 'rejected' is missing or null",
    ),
    "null": (
        '{"prompt": "a", "chosen": null, "rejected": "c"}\n',
        "row 1: the field 'chosen' is missing or null",
    ),
    "a number": (
        '{"prompt": "a", "chosen": "b", "rejected": 7}\n',
        "row 1: the field 'rejected' holds 7, which is neither text nor",
    ),
    "NaN": (
        '{"prompt": NaN, "chosen": "b", "rejected": "c"}\n',
        "row 1: the field 'prompt' holds NaN, which is neither text nor",
    ),
    "a list": (
        '{"prompt": "a", "chosen": ["b"], "rejected": "c"}\n',
        "row 1: the field 'chosen' holds",
    ),
    "half a surrogate": (
        '{"prompt": "a", "chosen": "\\ud83d", "rejected": "c"}\n',
        "row 1: the field 'chosen' holds half of a surrogate",
    ),
    "a line cut in half": (
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": "a", "cho',
        "row 3: not valid JSON: Unterminated string",
    ),
    "a list of several lines": (
        '[\n{"prompt": "a", "chosen": "b", "rejected": "c"}\n]\n',
        "or one list of all rows in a .json file",
    ),
    "single quotes": ("{'prompt': 'a'}\n", "row 1: not valid JSON: Expecting property name"),
    "other keys": ('{"question": "a", "answer": "b"}\n', "it has 'answer', 'question'"),
    "not an object": ("[1, 2]\n", "it has no fields at all"),
    "an empty file": ("", "there is no row in it"),
    "blank lines": ("\n\n", "there is no row in it"),
    "too deep": ("[" * 100_000, "row 1: not valid JSON"),
    "half a surrogate in a role": (
        '{"prompt": [{"role": "\\ud83d", "content": "a"}], "chosen": "b", "rejected": "c"}\n',
        "half of a surrogate",
    ),
    "no usable row": (
        '{"prompt": "a", "chosen": "b", "rejected": "b"}\n',
        "none of its 1 rows can be used",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_an_error_that_names_file_row_and_field(load, tmp_path, kind):
    text, message = BAD[kind]
    with pytest.raises(UserError) as error:
        load(text)
    assert message in str(error.value) and str(tmp_path / "rows.jsonl") in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        (
            "rows.csv",
            b"prompt,chosen,rejected\na,b,c,d\n",
            "row 1: more cells than the header names",
        ),
        ("rows.csv", b"prompt,chosen,rejected\na,b\n", "row 1: the field 'rejected' is missing"),
        ("rows.jsonl", b'{"prompt": "\xff"}\n', "cannot be read as jsonl"),
        ("rows.parquet", b"PAR1 and then nothing", "cannot be read as parquet"),
        ("rows.json", b"[{]", "row 1: not valid JSON"),
        ("rows.json", b" \n[{}]", "needs the fields prompt, chosen, rejected"),
        ("rows.txt", b"hello", "cannot read this kind of file"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_an_error(
    tmp_path, tokenizer, name, content, message
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokens(str(tmp_path / name), tokenizer)


def test_a_missing_file_is_an_error(tmp_path, tokenizer):
    with pytest.raises(UserError, match="nowhere.jsonl: no such file"):
        load_tokens(str(tmp_path / "nowhere.jsonl"), tokenizer)


def test_a_data_set_of_the_hub_is_read_like_a_file_and_read_again_when_it_changes(
    monkeypatch, tokenizer
):
    for count in (3, 4):
        rows = datasets.Dataset.from_list(make_rows(count))
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split, rows=rows: rows)
        kept, _ = load_tokens("org/pairs", tokenizer)
        assert kept["id"][count - 1] == f"org/pairs, row {count}"


def test_an_unknown_split_of_the_hub_is_named_with_the_splits_that_exist(monkeypatch, tokenizer):
    def load_dataset(name, split):
        raise ValueError(f'Unknown split "{split}". Should be one of [\'train\', \'test\'].')

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"^org/pairs:trian: Unknown split .* \['train', 'test'\]"):
        load_tokens("org/pairs:trian", tokenizer)


def test_a_changed_file_is_read_again(load):
    assert len(load([row()])[0]) == 1
    assert len(load([row(), row(chosen=" jumped")])[0]) == 2


def test_a_tokenizer_without_eos_is_refused(load):
    bare = PreTrainedTokenizerFast(tokenizer_object=merging_tokenizer().backend_tokenizer)
    with pytest.raises(UserError, match="no EOS token"):
        load([row("ab", "cd", "xd")], tokenizer=bare)


# --- held-out rows, windows and batches


def test_no_prompt_is_both_trained_and_held_out_and_the_split_is_always_the_same(load):
    rows = [row(f"prompt {i % 40}", f" a{i}", f" b{i}") for i in range(200)]
    kept, _ = load(rows)
    trained, held = hold_out(kept, 0.3)
    assert len(trained) + len(held) == 200 and 20 < len(held) < 100
    assert not set(data.column(trained, "prompt_key")) & set(data.column(held, "prompt_key"))
    again = load(rows[::-1], name="reversed.jsonl")[0]
    held_again = hold_out(again, 0.3)[1]
    assert set(data.column(held_again, "prompt_key")) == set(data.column(held, "prompt_key"))
    assert len(hold_out(kept, 0.0)[1]) == 0


@pytest.mark.parametrize(
    "count, batch, size, ranks",
    [(10, 4, 2, 1), (10, 4, 3, 2), (5, 4, 2, 3), (1, 8, 4, 4), (100, 16, 5, 8)],
)
def test_an_epoch_sees_each_row_once_on_any_number_of_ranks(count, batch, size, ranks):
    steps = -(-count // batch)
    for epoch in (0, 1):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            rows = window(step, count, batch, seed=3, shuffle=True)
            shares = [micro_batches(rows, size, rank, ranks) for rank in range(ranks)]
            weighted = []
            for share in shares:
                assert len(share) > 0  # each rank takes part in each step
                for part, weight in share:
                    assert 0 < len(part) <= size
                    weighted += list(part) if weight else []
            assert weighted == rows.tolist()  # in order: rank by rank is the window itself
            seen += weighted
        assert sorted(seen) == list(range(count))


def test_the_order_follows_from_seed_and_epoch_alone():
    def epoch(number, seed=0, shuffle=True):
        steps = range(3 * number, 3 * number + 3)
        return np.concatenate([window(step, 10, 4, seed, shuffle) for step in steps])

    assert (epoch(0) == epoch(0)).all()
    assert (epoch(0) != epoch(1)).any()
    assert (epoch(0) != epoch(0, seed=1)).any()
    assert (epoch(2, shuffle=False) == np.arange(10)).all()


def test_a_batch_is_padded_on_the_right_and_scores_answers_alone():
    rows = {
        "id": ["a", "b"],
        "prompt_ids": [[5, 6], [7]],
        "answer_ids": [[[8, 0], [1, 2, 3, 0]], [[9, 9, 0], [0]]],
    }
    batch = pad_rows(rows, pad_token_id=4)
    assert batch["input_ids"].tolist() == [
        [[5, 6, 8, 0, 4, 4], [5, 6, 1, 2, 3, 0]],
        [[7, 9, 9, 0, 4, 4], [7, 0, 4, 4, 4, 4]],
    ]
    assert batch["labels"].tolist() == [
        [[IGNORE, IGNORE, 8, 0, IGNORE, IGNORE], [IGNORE, IGNORE, 1, 2, 3, 0]],
        [[IGNORE, 9, 9, 0, IGNORE, IGNORE], [IGNORE, 0, IGNORE, IGNORE, IGNORE, IGNORE]],
    ]
    assert batch["attention_mask"].tolist() == [
        [[1, 1, 1, 1, 0, 0], [1] * 6],
        [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]],
    ]
    assert batch["mask"].tolist() == [[True, True], [True, True]]
    assert batch["places"].tolist() == [0, 1, 2, 3]


# --- conversations

IDENTITY = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turn(role, content):
    return {"role": role, "content": content}


def chat_tokenizer(tokenizer, template, **special):
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    chat = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", **special
    )
    chat.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    chat.chat_template = template
    return chat


def every_format(text):
    """Yield the same pair in each format that a file may have."""
    user = turn("user", text["prompt"])
    chosen, rejected = turn("assistant", text["chosen"]), turn("assistant", text["rejected"])
    yield {"prompt": [user], "chosen": [chosen], "rejected": [rejected]}
    yield {"prompt": [user], "chosen": text["chosen"], "rejected": text["rejected"]}
    yield {"prompt": text["prompt"], "chosen": [chosen], "rejected": [rejected]}
    yield {"chosen": [user, chosen], "rejected": [user, rejected]}
    # UltraFeedback.
    yield {
        "prompt": text["prompt"],
        "chosen": [user, chosen],
        "rejected": [user, rejected],
        "messages": [user, chosen],
    }
    yield {"prompt": [user], "chosen": [user, chosen], "rejected": [user, rejected]}


def test_strings_and_messages_through_an_identity_template_give_the_same_tokens_in_every_format(
    load, tokenizer
):
    chat = chat_tokenizer(tokenizer, IDENTITY)
    texts = [row(), row("who? 漢字", " me 🙂", " you")]
    expected = load(texts, tokenizer=chat)[0].remove_columns(["id", "prompt_key"])[:]
    for i, rows in enumerate(zip(*map(every_format, texts))):
        kept, _ = load(list(rows), name=f"{i}.jsonl", tokenizer=chat)
        assert kept.remove_columns(["id", "prompt_key"])[:] == expected, rows[0]


def test_json_and_parquet_give_the_same_messages(load, tmp_path, tokenizer):
    rows = [next(every_format(row())), next(every_format(row(chosen=" slept")))]
    chat = chat_tokenizer(tokenizer, CHATML)
    write_parquet(tmp_path / "rows.parquet", rows)
    from_parquet, _ = load_tokens(str(tmp_path / "rows.parquet"), chat)
    from_json, _ = load(rows, tokenizer=chat)
    assert from_parquet.remove_columns("id")[:] == from_json.remove_columns("id")[:]


def test_the_chat_template_writes_the_prompt_and_the_end_of_the_turn_is_the_last_scored_token(
    load, tokenizer
):
    """ChatML ends a turn with <|im_end|> and a line break. No EOS is added, and the line break,
    which no model generates, is removed."""
    chat = chat_tokenizer(tokenizer, CHATML)
    history = [
        turn("system", "be kind"),
        turn("user", "hi"),
        turn("assistant", "hello"),
        turn("user", "a cat?"),
    ]
    rows = [
        {
            "chosen": history + [turn("assistant", "sat")],
            "rejected": history + [turn("assistant", "ran")],
        },
        {
            "prompt": history,
            "chosen": [turn("assistant", "sat")],
            "rejected": [turn("assistant", "ran")],
        },
    ]
    for i, one in enumerate(rows):
        tokens = load([one], name=f"{i}.jsonl", tokenizer=chat)[0][0]
        prompt = chat.decode(tokens["prompt_ids"])
        assert prompt == (
            "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\nhello<|im_end|>\n"
            "<|im_start|>user\na cat?<|im_end|>\n<|im_start|>assistant\n"
        )
        assert chat.decode(tokens["answer_ids"][0]) == "sat<|im_end|>"
        assert chat.decode(tokens["answer_ids"][1]) == "ran<|im_end|>"


def test_a_cut_answer_has_no_end_of_turn(load, tokenizer):
    chat = chat_tokenizer(tokenizer, CHATML)
    rows = [{"prompt": [turn("user", "hi")], "chosen": "sat on a mat", "rejected": "ran"}]
    kept, account = load(rows, tokenizer=chat, limits=Limits(max_completion_length=3))
    end = chat.convert_tokens_to_ids("<|im_end|>")
    assert end not in kept[0]["answer_ids"][0]
    assert len(kept[0]["answer_ids"][0]) == 3
    assert "1 rows: answers truncated" in account


def test_the_bos_of_a_template_appears_once_and_stays_when_the_prompt_is_cut(load, tokenizer):
    bos = bos_tokenizer(tokenizer)
    bos.chat_template = "{{ bos_token }}" + IDENTITY
    rows = [{"prompt": [turn("user", "x" * 200)], "chosen": " sat", "rejected": " ran"}]
    tokens = load(rows, tokenizer=bos, limits=Limits(max_length=32))[0][0]
    assert tokens["prompt_ids"][0] == bos.bos_token_id
    assert tokens["prompt_ids"].count(bos.bos_token_id) == 1


def test_dialogues_split_at_a_turn_of_the_assistant_even_if_the_answers_begin_alike(
    load, tokenizer
):
    """A first sentence that both answers share stays in the answers; a first turn that they share
    belongs to the prompt."""
    chat = chat_tokenizer(tokenizer, CHATML)
    start = [turn("user", "hi"), turn("assistant", "hello")]
    rows = [
        {
            "chosen": start + [turn("user", "why?"), turn("assistant", "so. yes")],
            "rejected": start + [turn("user", "why?"), turn("assistant", "so. no")],
        },
        {
            "chosen": [turn("user", "hi"), turn("assistant", "hello")],
            "rejected": [turn("user", "hi"), turn("assistant", "hello")],
        },
    ]
    kept, account = load(rows, tokenizer=chat)
    assert chat.decode(kept[0]["answer_ids"][0]) == "so. yes<|im_end|>"
    assert chat.decode(kept[0]["answer_ids"][1]) == "so. no<|im_end|>"
    assert "1 dropped (chosen equals rejected: " in account


def test_dialogues_that_share_nothing_have_no_prompt_and_are_dropped(load, tokenizer):
    rows = [
        {
            "chosen": [turn("user", "hi"), turn("assistant", "a")],
            "rejected": [turn("user", "ho"), turn("assistant", "a")],
        },
        {
            "chosen": [turn("user", "hi"), turn("assistant", "a")],
            "rejected": [turn("user", "hi"), turn("assistant", "b")],
        },
    ]
    kept, account = load(rows, tokenizer=chat_tokenizer(tokenizer, CHATML))
    assert len(kept) == 1 and "1 dropped (no prompt: " in account


def test_a_file_may_not_change_its_format(load, tokenizer):
    message = "row 2: has a prompt, and the first row of its file had none"
    with pytest.raises(UserError, match=message):
        load([{"chosen": "a b", "rejected": "a c"}, row()])
    mixed = json.dumps(row()) + "\n" + json.dumps(next(every_format(row())))
    message = "row 2: the row is a list of messages, but earlier rows are text"
    with pytest.raises(UserError, match=message):
        load(mixed, tokenizer=chat_tokenizer(tokenizer, CHATML))
    with pytest.raises(UserError, match="row 1: one text without a prompt"):
        split_row(None, {"chosen": "hi"}, "row 1")


LOOP_LAST = (
    "{% for m in messages %}{% if loop.last and messages[0]['role'] == 'system' %}"
    "[{{ messages[0]['content'] }}]{% endif %}"
    "{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"
)


def test_a_row_is_dropped_if_the_template_writes_its_prompt_differently_before_an_answer(
    load, tokenizer
):
    """Mistral's template puts the system message before the last turn, and an answer becomes the
    last turn."""
    chat = chat_tokenizer(tokenizer, LOOP_LAST)
    system = [turn("system", "be kind"), turn("user", "hi")]
    rows = [
        {"prompt": [turn("user", "hi")], "chosen": " yes", "rejected": " no"},
        {"prompt": system, "chosen": " yes", "rejected": " no"},
    ]
    kept, account = load(rows, tokenizer=chat)
    assert len(kept) == 1
    reason = "the chat template writes the prompt differently when an answer follows"
    assert f"1 dropped ({reason}: " in account


@pytest.mark.parametrize(
    "prompt, answer",
    [
        ([turn("system", "s")], [turn("user", "hi"), turn("assistant", "a")]),
        ([turn("user", "2+2?")], [turn("user", "bye"), turn("assistant", "a")]),
        ("2+2?", [turn("user", "bye"), turn("assistant", "a")]),
        ([turn("user", "hi")], [turn("model", "a")]),
    ],
)
def test_answers_that_begin_with_another_prompt_are_an_error(load, tokenizer, prompt, answer):
    other = answer[:-1] + [turn("assistant", "b")]
    rows = [{"prompt": prompt, "chosen": answer, "rejected": other}]
    role = answer[0]["role"]
    message = f"row 1: chosen begins with the role '{role}'; an answer begins with the role 'assis"
    with pytest.raises(UserError, match=message):
        load(rows, tokenizer=chat_tokenizer(tokenizer, CHATML))


@pytest.mark.parametrize("other, message", [
    ([turn("model", "b")], "row 1: rejected begins with the role 'model'; an answer begins with"),
    ([turn("user", "hi"), turn("assistant", "b")], "row 1: one answer begins with the role"),
])
def test_of_two_answers_the_one_in_another_form_is_named(load, tokenizer, other, message):
    rows = [{"prompt": [turn("user", "hi")], "chosen": [turn("assistant", "a")], "rejected": other}]
    with pytest.raises(UserError, match=message):
        load(rows, tokenizer=chat_tokenizer(tokenizer, CHATML))


def test_the_turn_of_a_tool_may_follow_the_prompt(load, tokenizer):
    chat = chat_tokenizer(tokenizer, CHATML)
    prompt = [turn("user", "rain?"), turn("assistant", "CALL")]
    chosen = [turn("tool", "no"), turn("assistant", "dry")]
    rejected = [turn("tool", "no"), turn("assistant", "wet")]
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]
    tokens = load(rows, tokenizer=chat)[0][0]
    assert "rain?" in chat.decode(tokens["prompt_ids"])
    assert chat.decode(tokens["answer_ids"][0]).endswith("dry<|im_end|>")


def test_a_turn_of_the_user_is_never_scored(load, tokenizer):
    chat = chat_tokenizer(tokenizer, CHATML)

    def dialogue(*texts):
        roles = ["user", "assistant", "user", "assistant"]
        return [turn(role, text) for role, text in zip(roles, texts)]

    rejected = dialogue("hi", "z", "go on", "zz")
    rows = [
        {"chosen": dialogue("hi", "a", "go on", "aa"), "rejected": rejected},
        {"chosen": dialogue("hi", "b", "go on", "bb"), "rejected": rejected},
        {"chosen": dialogue("hi", "a"), "rejected": dialogue("hi", "b")},
    ]
    kept, account = load(rows, tokenizer=chat)
    batch, scored = pad_rows(kept[:], 0), []
    for row_labels in batch["labels"]:
        for labels in row_labels:
            scored.append(chat.decode(labels[labels != IGNORE]))
    end = "<|im_end|>"
    assert scored == [f"a{end}aa{end}", f"z{end}zz{end}", f"b{end}bb{end}", f"z{end}zz{end}",
                      f"a{end}", f"b{end}"]
    assert "dropped" not in account
    # The turns are in the input, where the template writes them.
    follow_up = f"\n<|im_start|>user\ngo on{end}\n<|im_start|>assistant\n"
    assert chat.decode(kept[0]["answer_ids"][0]) == f"a{end}{follow_up}aa{end}"
    for role in ("system", "user"):
        chosen = dialogue("hi", "a") + [turn(role, "be kind")]
        more = [{"chosen": chosen, "rejected": dialogue("hi", "b")}, rows[-1]]
        _, account = load(more, tokenizer=chat)
        assert f"1 dropped (an answer ends with a turn of the {role}: " in account


def test_text_of_a_row_that_would_not_be_read_is_an_error(load, tokenizer):
    chat = chat_tokenizer(tokenizer, CHATML)
    seen = {"role": "assistant", "content": "let me see", "images": ["a.png"]}
    message = "row 1: the field 'chosen' holds a message with images, which is not read"
    with pytest.raises(UserError, match=message):
        load([{"prompt": "hi", "chosen": [seen], "rejected": "no"}], tokenizer=chat)
    for column in ("system", "tools"):
        with pytest.raises(UserError, match=f"row 1: the column '{column}' is not read"):
            load([row() | {column: '["be kind"]'}])


def test_an_open_quote_in_a_csv_does_not_swallow_the_rows_after_it(load):
    for text, message in (
        ('say it:, b, c\nsay it:, b," c\nsay more:, e, f\n', "cannot be read as csv"),
        ('a,b,"c"d\n', "cannot be read as csv"),
    ):
        with pytest.raises(UserError, match=message):
            load("prompt,chosen,rejected\n" + text, "rows.csv")
    with pytest.raises(UserError, match="header names the column 'chosen' twice; rename one"):
        load("prompt,chosen,chosen,rejected\na,b,b,c\n", "rows.csv")


def test_a_tokenizer_that_splits_special_tokens_does_not_share_the_cache_of_one_that_does_not(
    load, tokenizer
):
    chat = chat_tokenizer(tokenizer, CHATML)
    rows = [row(chosen=" a<|im_end|>b")]
    before = load(rows, tokenizer=chat)[0][0]["answer_ids"][0]
    chat.split_special_tokens = True
    assert load(rows, tokenizer=chat)[0][0]["answer_ids"][0] != before


def test_an_answer_that_ends_with_eos_and_a_line_break_has_one_eos(load, tokenizer):
    assert tokenizer.decode(load([row(chosen=" sat<eos>\n")])[0][0]["answer_ids"][0]) == " sat<eos>"


def test_every_token_that_the_tokenizer_puts_before_a_text_comes_first(load, tokenizer):
    """GLM puts two tokens before a text, neither of them a BOS."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["[gMASK]", "<sop>"])
    backend.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("[gMASK]", "<sop>")],
    )
    glm = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    for text in (row(), row("x" * 400)):
        tokens = load([text], tokenizer=glm, limits=Limits(max_length=40))[0][0]
        assert glm.convert_ids_to_tokens(tokens["prompt_ids"][:2]) == ["[gMASK]", "<sop>"]


def test_a_thousand_useless_rows_may_come_before_the_first_good_one(load):
    assert len(load([row("")] * 1001 + [row()])[0]) == 1


def test_a_part_of_a_mixture_without_usable_rows_is_an_error_and_rows_left_out_are_counted(
    tmp_path, tokenizer
):
    a = write_jsonl(tmp_path / "a.jsonl", make_rows(20))
    b = write_jsonl(tmp_path / "b.jsonl", [row(rejected=" ")])
    with pytest.raises(UserError, match="b.jsonl: none of its 1 rows can be used"):
        load_tokens(f"{a},{b}", tokenizer)
    c = write_jsonl(tmp_path / "c.jsonl", make_rows(20, seed=5))
    with pytest.raises(UserError, match="c.jsonl: its share of the mixture is less than one row"):
        load_tokens(f"{a}:1,{c}:0.0001", tokenizer)
    _, account = load_tokens(f"{a}:1,{c}:0.5", tokenizer)
    assert "30 of 40 rows kept, 10 left out by the shares; layout trl" in describe(account)


def test_sft_trains_on_the_last_turn_of_a_dialogue(load, tokenizer):
    chat = chat_tokenizer(tokenizer, CHATML)
    dialogue = [
        turn("user", "hi"),
        turn("assistant", "hello"),
        turn("user", "bye"),
        turn("assistant", "see you"),
    ]
    kept = load([{"chosen": dialogue}], sides=("chosen",), tokenizer=chat)[0]
    assert chat.decode(kept[0]["answer_ids"][0]) == "see you<|im_end|>"
    assert chat.decode(kept[0]["prompt_ids"]).count("<|im_end|>") == 3


def test_no_chat_template_is_an_error_that_says_how_to_pass_one(load):
    message = ("row 1: the row holds messages, and the tokenizer has no chat template; "
               "pass one by --chat_template")
    with pytest.raises(UserError, match=message):
        load([next(every_format(row()))])


def test_a_template_that_fails_on_a_row_is_an_error_that_names_the_row(load, tokenizer):
    chat = chat_tokenizer(tokenizer, "{{ raise_exception('no system turns here') }}")
    message = "row 1: the chat template fails on this row: no system turns here"
    with pytest.raises(UserError, match=message):
        load([next(every_format(row()))], tokenizer=chat)


@pytest.mark.parametrize(
    "value, message",
    [
        ([], "holds \\[\\], which is neither text nor a list of messages"),
        ([turn("user", "a"), "b"], "which is neither text nor a list"),
        ([{"from": "human", "text": "hi"}], "both text"),
        ([turn("user", None)], "a message has a role and a content"),
        ([turn("user", [{"type": "image", "image": "a"}])], "only parts of type text are read"),
        ([turn("user", "\ud83d")], "half of a surrogate pair"),
    ],
)
def test_a_value_that_is_no_message_is_an_error_that_names_file_row_and_field(load, value, message):
    with pytest.raises(UserError, match=rf"rows.jsonl, row 2: the field 'prompt'.* {message}"):
        load(json.dumps(row()) + "\n" + json.dumps(row() | {"prompt": value}))


# --- boundaries, for every kind of tokenizer


def trained(model, trainer, pre_tokenizer, decoder):
    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    corpus = [" ".join(row.values()) for row in make_rows(300)]
    backend.train_from_iterator(
        corpus, trainer(vocab_size=400, special_tokens=["<eos>", "<unk>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def tokenizers_of_every_kind():
    return {
        "byte-level": trained(
            models.BPE(),
            lambda **o: trainers.BpeTrainer(
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **o),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        ),
        "metaspace": trained(
            models.Unigram(),
            lambda **o: trainers.UnigramTrainer(unk_token="<unk>", **o),
            pre_tokenizers.Metaspace(),
            decoders.Metaspace(),
        ),
        "wordpiece": trained(
            models.WordPiece(unk_token="<unk>"),
            trainers.WordPieceTrainer,
            pre_tokenizers.BertPreTokenizer(),
            decoders.WordPiece(),
        ),
        "merging": merging_tokenizer(),
    }


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "wordpiece", "merging"])
def test_prompt_and_answer_ids_are_the_ids_of_the_text_and_both_answers_share_the_prompt(
    load, kind
):
    """Each of 200 random texts is cut into prompt and answer at a random character."""
    tokenizer, generator = tokenizers_of_every_kind()[kind], np.random.default_rng(0)
    alphabet = "abcdx" if kind == "merging" else "the cat sat on a mat. é漢🙂e\u0301\n"
    texts = [
        "".join(generator.choice(list(alphabet), generator.integers(3, 30))) for _ in range(400)
    ]
    rows = []
    for one, two in zip(texts[::2], texts[1::2]):
        at = int(generator.integers(1, len(one) - 1))
        rows.append({"prompt": one[:at], "chosen": one[at:], "rejected": two})
    kept, _ = load(rows, tokenizer=tokenizer)
    assert len(kept) > 100
    for tokens in kept:
        text = rows[int(tokens["id"].split("row ")[1]) - 1]
        for side, answer in zip(BOTH, tokens["answer_ids"], strict=True):
            assert answer[-1] == tokenizer.eos_token_id
            whole = tokenizer(text["prompt"] + text[side], add_special_tokens=False)["input_ids"]
            assert tokens["prompt_ids"] + answer[:-1] == whole
        alone = tokenizer(text["prompt"], add_special_tokens=False)["input_ids"]
        assert alone[: len(tokens["prompt_ids"])] == tokens["prompt_ids"]


def test_rows_whose_tokens_merge_across_the_boundary_are_counted_and_named(load):
    kept, account = load(
        [row("ab", "cd", "xd"), row("ax", "cd", "xd")], tokenizer=merging_tokenizer()
    )
    assert len(kept) == 2
    assert "1 rows: tokens merged across the end of the prompt: " in account
    assert "row 1" in account


def test_a_prompt_repeated_inside_both_answers_is_counted_and_named(load):
    _, account = load(
        [row(), row("a cat", "a cat sat", "a cat ran"), row("a cat", "a cat sat", " ran")]
    )
    assert "1 rows: prompt repeated inside both answers: " in account and "row 2" in account


@pytest.mark.parametrize("blank", ["", " ", "\n\t ", "\u3000"])
def test_an_answer_that_is_only_white_space_is_dropped(load, blank):
    kept, account = load([row(), row(rejected=blank)])
    assert len(kept) == 1 and "1 dropped (empty answer: " in account


# --- long rows


def test_long_rows_are_cut_dropped_or_an_error_as_overlong_says(load):
    rows, short = [row(), row("a cat " * 40)], dict(max_length=32)
    kept, account = load(rows, limits=Limits(**short))
    assert len(kept) == 2 and "1 rows: prompt truncated: " in account
    kept, account = load(rows, limits=Limits(**short, overlong="drop"))
    assert len(kept) == 1 and "1 dropped (too long: " in account and "row 2)" in account
    message = "too long: .*row 2. Fix these rows, or leave out --overlong error"
    with pytest.raises(UserError, match=message):
        load(rows, limits=Limits(**short, overlong="error"))


@pytest.mark.parametrize("seed", range(5))
def test_under_any_limits_every_row_has_a_prompt_and_scored_tokens_within_the_limits(load, seed):
    generator = np.random.default_rng(seed)
    length = int(generator.integers(2, 12))

    def random_limit(high):
        if high == 1 or generator.random() > 0.7:
            return None
        return int(generator.integers(1, high))

    mode = str(generator.choice(["keep_end", "keep_start"]))
    limits = Limits(length, random_limit(length), random_limit(9), truncation_mode=mode)
    kept, _ = load(make_rows(40, seed) + [row("x" * 10_000)], limits=limits)
    longest = limits.max_completion_length or length
    for tokens in kept:
        assert tokens["prompt_ids"]
        for count in map(len, tokens["answer_ids"]):
            assert 0 < count <= limits.max_length - len(tokens["prompt_ids"])
            assert count <= longest


# --- several parts


def test_columns_may_have_other_names(load):
    renamed = [{"question": "a cat", "good": " sat", "bad": " ran", "prompt": 7, "id": "x1"}]
    columns = (("prompt", "question"), ("chosen", "good"), ("rejected", "bad"))
    kept, expected = load(renamed, columns=columns)[0], load([row()])[0]
    assert kept.remove_columns("id")[:] == expected.remove_columns("id")[:]
    assert kept[0]["id"].endswith("rows.jsonl, row 1 (id x1)")
    message = ("row 1: --columns names 'nice'; "
               "the row has 'question', 'good', 'bad', 'prompt', 'id'")
    with pytest.raises(UserError, match=message):
        load(renamed, columns=(("chosen", "nice"),))


def test_several_files_are_read_one_after_the_other(tmp_path, tokenizer):
    one = write_jsonl(tmp_path / "one.jsonl", make_rows(2, seed=0))
    two = write_jsonl(tmp_path / "two.jsonl", make_rows(3, seed=1))
    rows, account = load_tokens(f"{one},{two}", tokenizer)
    assert list(rows["id"]) == [
        f"{one}, row 1", f"{one}, row 2", f"{two}, row 1", f"{two}, row 2", f"{two}, row 3",
    ]
    assert account["rows"] == account["kept"] == 5


def test_a_mixture_has_its_shares_and_no_row_twice(tmp_path, tokenizer):
    a = write_jsonl(tmp_path / "a.jsonl", make_rows(70))
    b = write_jsonl(tmp_path / "b.jsonl", make_rows(100))
    rows, account = load_tokens(f"{a}:0.7,{b}:0.3", tokenizer)
    names = list(rows["id"])
    assert len(names) == len(set(names)) == 100
    assert sum(name.startswith(a) for name in names) == 70
    assert account["kept"] == 100
    assert names == list(load_tokens(f"{a}:0.7,{b}:0.3", tokenizer)[0]["id"])
    assert len(load_tokens(f"{a}:1,{b}:1", tokenizer)[0]) == 140


@pytest.mark.parametrize(
    "spec, message",
    [
        ("{a}:0.5,{a}", "give every part a share, or none"),
        ("{a}:0", "with a share above 0"),
        ("{a}:x:y:1", "a data set is NAME, NAME:SPLIT"),
        ("{a}:test", "a file has no splits"),
        (",{a}", "a data set is NAME"),
        ("{a},./nowhere.jsonl", "nowhere.jsonl: no such file"),
    ],
)
def test_a_wrong_data_set_name_is_refused(tmp_path, tokenizer, spec, message):
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(3))
    with pytest.raises(UserError, match=message):
        load_tokens(spec.format(a=path), tokenizer)


def test_a_folder_of_save_to_disk_is_read_by_its_splits(tmp_path, tokenizer):
    parts = {
        "train": datasets.Dataset.from_list(make_rows(4)),
        "test": datasets.Dataset.from_list(make_rows(3, seed=1)),
    }
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "both")
    parts["test"].save_to_disk(tmp_path / "one")
    assert len(load_tokens(f"{tmp_path}/both", tokenizer)[0]) == 4
    assert len(load_tokens(f"{tmp_path}/both:test", tokenizer)[0]) == 3
    one, _ = load_tokens(f"{tmp_path}/one", tokenizer)
    assert one[0]["id"] == f"{tmp_path}/one, row 1"
    account = load_tokens(f"{tmp_path}/both", tokenizer)[1]
    assert "not read, other splits of the folder: test" in describe(account)
    for spec in ("both:dev", "one:test"):
        with pytest.raises(UserError, match="there is no split"):
            load_tokens(f"{tmp_path}/{spec}", tokenizer)


# --- the report


def test_the_statistics_of_three_rows_equal_a_count_by_hand(load):
    tokenizer = merging_tokenizer()  # one token per letter
    texts = [row("aa", "d", "xx"), row("aa", "dd", "x"), row("aaaa", "ddd", "xxx")]
    rows, _ = load(texts, tokenizer=tokenizer)
    texts = [row("aa", "d", "x"), row("x", "d", "a")]
    held, _ = load(texts, name="held.jsonl", tokenizer=tokenizer)
    statistics = data.statistics(rows, held)
    assert statistics["lengths"]["prompt"] == {
        "mean": pytest.approx(8 / 3),
        "median": 2.0,
        "95th": pytest.approx(3.8),
        "max": 4,
    }
    # Answers are counted with EOS.
    assert statistics["lengths"]["chosen"]["max"] == 4
    assert statistics["lengths"]["rejected"]["mean"] == pytest.approx(3)
    assert statistics["chosen_longer"] == pytest.approx(1 / 3)
    assert statistics["rejected_longer"] == pytest.approx(1 / 3)
    assert statistics["rows_that_share_their_prompt"] == 1 and statistics["prompts_in_both"] == 1
    assert statistics["tokens_per_epoch"] == 8 + 9 + 9
    assert statistics["tokens_per_epoch_prompt_once_for_each_answer"] == 16 + 9 + 9


def test_columns_statistics_and_digest_are_read_from_arrays_without_a_row(load, monkeypatch):
    """To read a column row by row takes seconds for 50,000 rows."""
    rows, _ = load(make_rows(300))
    some = rows.select([7, 3, 299, 3])
    expected = {name: some[name][:] for name in ("id", "tokens", "prompt_key")}
    numbers = data.statistics(rows, some)

    def fail(*arguments, **options):
        raise AssertionError("a row was read")

    for name in ("__getitem__", "__iter__", "iter", "with_format"):
        monkeypatch.setattr(datasets.Dataset, name, fail)
    for name, values in expected.items():
        assert data.column(some, name).tolist() == values
    assert data.statistics(rows, some) == numbers
    assert data.digest(rows) != data.digest(some)


def test_rows_are_shown_as_the_model_sees_them_with_scored_tokens_in_brackets(load):
    tokenizer = merging_tokenizer()
    shown = data.show(load([row("aa", "d", "bcx")], tokenizer=tokenizer)[0], tokenizer)
    assert shown.splitlines()[1:] == [
        "  prompt   'aa'",
        "  chosen   [d|<eos>]",
        "  rejected [bc|x|<eos>]",
    ]


def run_report(*arguments):
    return forked.run("data.py", *arguments)


def test_python_data_py_reports_every_kind_of_file_and_no_library_prints_anything(folder, tmp_path):
    rows = make_rows(9) + [row("x" * 9000)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows))
    write_csv(tmp_path / "c.csv", rows)
    write_parquet(tmp_path / "d.parquet", rows)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "e")
    write_jsonl(tmp_path / "f.jsonl", [list(every_format(r))[3] for r in rows])
    (tmp_path / "template").write_text(CHATML)
    template = ["--chat_template", tmp_path / "template"]
    for name, more in (
        ("a.jsonl", []), ("b.json", []), ("c.csv", []), ("d.parquet", []), ("e", []),
        ("f.jsonl", template),
    ):
        result = run_report(tmp_path / name, "--model", folder, *more)
        assert result.returncode == 0 and result.stderr == "", (name, result.stderr)
        assert "10 of 10 rows kept; layout trl\n  1 rows: prompt truncated: " in result.stdout
        assert "scored tokens in brackets" in result.stdout


def test_the_json_report_counts_the_prompts_that_train_and_eval_share(folder, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(9))
    held = write_jsonl(tmp_path / "b.jsonl", make_rows(9)[:2] + [row(rejected=" ")])
    result = run_report(path, "--model", folder, "--eval_dataset", held, "--json")
    report, other = json.loads(result.stdout)
    assert report["kept"] == report["rows"] == 9
    assert report["prompts_in_both"] == 2
    assert report["lengths"]["prompt"]["max"] > 0
    assert other["dropped"]["empty answer"]["count"] == 1


def test_the_report_of_several_evaluation_sets_names_each_and_counts_the_prompts_of_all(
        folder, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", make_rows(9))
    near = write_jsonl(tmp_path / "b.jsonl", make_rows(9)[:2])
    far = write_jsonl(tmp_path / "c.jsonl", make_rows(9)[1:4])
    sets = f"near={near},far={far}"
    result = run_report(path, "--model", folder, "--eval_dataset", sets, "--json")
    reports = json.loads(result.stdout)
    assert [report["split"] for report in reports] == ["train", "eval/near", "eval/far"]
    assert [report["kept"] for report in reports] == [9, 2, 3]
    assert reports[0]["prompts_in_both"] == 4
    result = run_report(path, "--model", folder, "--eval_dataset", sets)
    lines = result.stdout.splitlines()
    assert lines[0].startswith(path)
    assert any(line.startswith(f"near: {near}") for line in lines)
    assert any(line.startswith(f"far: {far}") for line in lines)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["nowhere.jsonl", "--model", "{folder}"], "nowhere.jsonl: no such file"),
        (["{pairs}", "--model", "/nowhere"], "/nowhere: no such model folder"),
        (
            ["{pairs}", "--model", "{folder}", "--columns", "prompt"],
            "--columns prompt: write OURS=THEIRS",
        ),
        (
            ["{pairs}", "--model", "{folder}", "--columns", "chosen=a,chosen=b"],
            "names a column twice",
        ),
        (
            ["{pairs}", "--model", "{folder}", "--chat_template", "{pairs}"],
            "no row holds messages, so it is not used",
        ),
        (
            ["{pairs}", "--model", "{folder}", "--template_kwargs", '{{"a": 1}}'],
            "--template_kwargs {\"a\": 1}: no row holds messages, so it is not used",
        ),
        (
            ["{pairs}", "--model", "{folder}", "--columns", "answer=chosen"],
            "OURS is one of prompt, chosen",
        ),
        (
            ["{pairs}", "--model", "{folder}", "--chat_template", "nowhere"],
            "--chat_template nowhere: no such file",
        ),
    ],
)
def test_an_error_of_the_report_is_one_line_and_exit_status_2(folder, pairs, flags, message):
    result = run_report(*(flag.format(folder=folder, pairs=pairs) for flag in flags))
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
