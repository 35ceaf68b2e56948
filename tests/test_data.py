"""From text to the right tokens: nothing is lost, doubled, merged or glued on without a word."""
import json

import numpy as np
import pytest
import torch
from conftest import SHARED, make_rows, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import data
from data import IGNORE, Limits, collate, describe, fit, hold_out, load_tokens, micro_batches, split_prompt, window

BOTH = ("chosen", "rejected")


@pytest.fixture
def load(tokenizer, tmp_path):
    """Write rows to a file and load them -> kept rows, the account of the others."""
    def run(rows, name="rows.jsonl", sides=BOTH, limits=Limits(), tokenizer=tokenizer, strict=False, scored=False, columns=()):
        path = tmp_path / name
        path.write_text(rows, encoding="utf-8") if isinstance(rows, str) else write_jsonl(path, rows)
        rows, account = load_tokens(str(path), tokenizer, sides, limits, strict, scored, columns)
        return rows, describe(account)
    return run


def row(prompt="a cat", chosen=" sat", rejected=" ran"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# --- formats

def test_the_same_rows_give_the_same_tokens_from_every_kind_of_file(load, tmp_path, tokenizer):
    rows = make_rows(5) + [row("NA", " 42", " None"), row("quotes \" and, commas", " \n two lines", " ü 😀 漢字 e\u0301")]
    expected = load(rows)[0].remove_columns("id")[:]
    import csv
    import pyarrow
    import pyarrow.parquet
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with open(tmp_path / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected"])
        writer.writeheader()
        writer.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.json", "rows.csv", "rows.parquet"):
        assert load_tokens(str(tmp_path / name), tokenizer, BOTH, Limits())[0].remove_columns("id")[:] == expected, name


def test_a_folder_is_all_its_files_in_order(load, tmp_path, tokenizer):
    folder = tmp_path / "many"
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", make_rows(3, seed=1))
    write_jsonl(folder / "a.jsonl", make_rows(2, seed=2))
    ids = load_tokens(str(folder), tokenizer, BOTH, Limits())[0]["id"]
    expected = [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]
    assert list(ids) == [f"{folder}/{name}.jsonl, row {number}" for name, number in expected]


def test_a_dialogue_with_the_prompt_inside_is_cut_at_the_last_turn_so_no_answer_loses_its_first_word():
    history = "\n\nHuman: hi\n\nAssistant: Hello there.\n\nHuman: why?\n\nAssistant:"
    chosen, rejected = history + " Because it is so.", history + " Because I say so."
    assert split_prompt(chosen, rejected) == history  # not "... Because ", which both share
    assert split_prompt("Q: why? Because it is", "Q: why? Because I say") == "Q: why? Because"
    assert split_prompt("one two three", "one two thirty") == "one two"  # "th" is the beginning of a word, not a prompt
    assert split_prompt("abc", "abd") == ""


def test_explicit_prompts_and_prompts_inside_both_give_the_same_tokens(load):
    prompt = "\n\nHuman: go on\n\nAssistant:"
    explicit = load([row(prompt, " one", " two")])[0]
    inside = load([{"chosen": prompt + " one", "rejected": prompt + " two"}], name="inside.jsonl")[0]
    assert explicit[0] == inside[0] | {"id": explicit[0]["id"]}


def test_sft_needs_no_rejected_answer(load):
    kept, _ = load([{"prompt": "a", "chosen": " b"}, {"prompt": "a", "chosen": " c"}], sides=("chosen",))
    assert len(kept) == 2 and "rejected_ids" not in kept.column_names


# --- tokens

def test_decoded_scored_tokens_are_the_answer_and_eos(load, tokenizer):
    rows = make_rows(30) + [row("ende", "ü 😀", "漢字"), row("e", "\u0301 x", "y"), row("🙂", "🙂🙂", " 🙂")]
    kept, _ = load(rows)
    for tokens, text in zip(kept, rows):
        for side in BOTH:
            assert tokens[f"{side}_ids"][-1] == tokenizer.eos_token_id
            whole = tokens["prompt_ids"] + tokens[f"{side}_ids"][:-1]
            assert tokenizer.decode(whole) == text["prompt"] + text[side]
            assert whole == tokenizer(text["prompt"] + text[side])["input_ids"]


def merging_tokenizer():
    """BPE over letters that merges "b" + "c", across the boundary of prompt "ab" and answer "cd"."""
    vocabulary = {token: i for i, token in enumerate(["<eos>", "a", "b", "c", "d", "x", "bc", " "])}
    backend = Tokenizer(models.BPE(vocabulary, [("b", "c")]))
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def test_where_tokens_merge_across_the_boundary_both_answers_still_see_one_prompt(load):
    """prompt "ab" is a b, but "abcd" is a bc d: the three agree on "a" alone, and "b" is scored with the answers."""
    kept, _ = load([row("ab", "cd", "xd")], tokenizer=merging_tokenizer())
    ids = merging_tokenizer().convert_tokens_to_ids
    assert kept[0]["prompt_ids"] == ids(["a"])
    assert kept[0]["chosen_ids"] == ids(["bc", "d", "<eos>"]) and kept[0]["rejected_ids"] == ids(["b", "x", "d", "<eos>"])


def bos_tokenizer(tokenizer):
    """The same BPE, but putting <bos> in front as Llama's does."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<bos>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


@pytest.mark.parametrize("prompt", ["a cat", "<bos>a cat", ""])
def test_bos_stands_once_and_in_front_also_when_the_text_brings_its_own(load, tokenizer, prompt):
    with_bos = bos_tokenizer(tokenizer)
    tokens = load([row(prompt)], tokenizer=with_bos)[0][0]
    whole = tokens["prompt_ids"] + tokens["chosen_ids"]
    assert whole[0] == with_bos.bos_token_id and whole.count(with_bos.bos_token_id) == 1


def test_no_bos_is_invented_and_a_prompt_without_tokens_is_dropped(load, tokenizer):
    kept, account = load([row(""), row()])
    assert len(kept) == 1 and "1 dropped (no prompt: " in account and kept[0]["prompt_ids"] == tokenizer("a cat")["input_ids"]


def test_eos_is_not_doubled_when_the_answer_brings_its_own(load, tokenizer):
    kept, _ = load([row(chosen=" sat<eos>")])
    assert kept[0]["chosen_ids"].count(tokenizer.eos_token_id) == 1


def test_a_cut_answer_loses_eos_and_an_answer_that_just_fits_keeps_it(load, tokenizer):
    length = len(load([row()])[0][0]["chosen_ids"])
    rows = [row(rejected=" ran far from home")]
    kept = load(rows, limits=Limits(max_completion_length=length))[0][0]
    assert kept["chosen_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in kept["rejected_ids"] and len(kept["rejected_ids"]) == length


# --- truncation

def test_a_prompt_gives_way_to_its_answers_only_as_far_as_it_must():
    prompt, answers = list(range(100)), [[1] * 10, [2] * 20]
    assert fit(prompt, answers, Limits(max_length=120)) == (prompt, answers)
    assert fit(prompt, answers, Limits(max_length=70)) == (prompt[-50:], answers)  # the last 50, what the longer answer leaves
    assert fit(prompt, answers, Limits(max_length=70, truncation_mode="keep_start")) == (prompt[:50], answers)
    assert fit(prompt, answers, Limits(max_length=30)) == (prompt[-15:], [[1] * 10, [2] * 15])  # never below half of max_length
    assert fit(prompt, answers, Limits(max_length=70, max_prompt_length=5)) == (prompt[-5:], answers)
    assert fit(prompt, answers, Limits(max_completion_length=4)) == (prompt, [[1] * 4, [2] * 4])
    assert fit([7] + prompt, answers, Limits(max_length=70), front=1) == ([7] + prompt[-49:], answers)  # BOS stays


def test_a_prompt_of_10000_tokens_leaves_the_answers_whole_and_keeps_its_end(load, tokenizer):
    long = "x" * 10_000 + " end"
    kept, account = load([row(long)], limits=Limits(max_length=64))
    tokens = kept[0]
    assert tokenizer.decode(tokens["chosen_ids"]) == " sat<eos>" and "1 rows: prompt cut" in account
    assert tokenizer.decode(tokens["prompt_ids"]).endswith("x end")
    assert len(tokens["prompt_ids"]) + max(len(tokens[f"{side}_ids"]) for side in BOTH) == 64


# --- rows that teach nothing

def test_useless_rows_are_dropped_counted_and_named(load):
    rows = [row(), row(chosen="   "), row(rejected=""), row(chosen=" ran"), row(chosen=" same start a", rejected=" same start b")]
    kept, account = load(rows, limits=Limits(max_completion_length=2))
    assert len(kept) == 1 and "1 of 5 rows kept, 4 dropped" in account
    for reason in ("empty answer: ", "chosen equals rejected: ", "chosen equals rejected once cut: "):
        assert reason in account
    assert all(f"rows.jsonl, row {number}" in account for number in (2, 3, 4, 5))


def test_strict_makes_them_errors(load):
    with pytest.raises(ValueError, match="chosen equals rejected: .*rows.jsonl, row 2"):
        load([row(), row(chosen=" ran")], strict=True)


def test_sft_keeps_a_row_whose_answers_are_equal(load):
    assert len(load([row(chosen=" ran")], sides=("chosen",))[0]) == 1


def test_scores_come_along_for_the_loss_that_reads_them_from_json_and_csv(load):
    rows = [row(), row(chosen=" slept")]
    for r, (better, worse) in zip(rows, ((2, -0.5), (1e9 + 1e-6, 1e9))):
        r |= {"chosen_score": better, "rejected_score": worse}
    from_json = load(rows, scored=True)[0]
    batch = collate(from_json[[0, 1]], 0)
    assert batch["chosen_scores"].tolist() == [2, 1e9 + 1e-6] and batch["rejected_scores"].tolist() == [-0.5, 1e9]
    csv = "prompt,chosen,rejected,chosen_score,rejected_score\n" + "".join(",".join(map(str, r.values())) + "\n" for r in rows)
    assert load(csv, "rows.csv", scored=True)[0].remove_columns("id")[:] == from_json.remove_columns("id")[:]
    assert "chosen_score" not in load(rows)[0].column_names


def test_a_score_that_contradicts_the_preference_drops_the_row_and_one_that_is_no_number_is_an_error(load):
    rows = [row() | {"chosen_score": 1, "rejected_score": 0}, row() | {"chosen_score": 1, "rejected_score": 1.0}]
    kept, account = load(rows, scored=True)
    assert len(kept) == 1 and "1 dropped (chosen_score not above rejected_score: " in account and "row 2" in account
    for bad in (None, "high", float("nan"), float("inf"), [1]):
        with pytest.raises(ValueError, match="row 1: the loss reads the field 'chosen_score', a finite number"):
            load([rows[0] | {"chosen_score": bad}], scored=True)
    with pytest.raises(ValueError, match="row 1: the loss reads the field 'chosen_score'"):
        load([row()], scored=True)


@pytest.mark.skipif(not SHARED.exists(), reason="the project's shared data is not here")
def test_real_dialogues_split_where_their_last_answer_begins():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    path = SHARED / "data" / "hh_harmless_512.jsonl"
    kept, account = load_tokens(str(path), tokenizer, BOTH, Limits(max_length=4096))
    assert "511 of 512 rows kept, 1 dropped (empty answer: " in describe(account) and "row 87)" in describe(account)
    texts = [json.loads(line) for line in open(path)]
    for tokens in kept:
        prompt = tokenizer.decode(tokens["prompt_ids"])
        text = texts[int(tokens["id"].split("row ")[1]) - 1]
        assert prompt.endswith("\n\nAssistant:")
        assert prompt + tokenizer.decode(tokens["chosen_ids"]) == text["chosen"] + "<|endoftext|>"
        assert prompt + tokenizer.decode(tokens["rejected_ids"]) == text["rejected"] + "<|endoftext|>"


# --- bad files

BAD = {
    "a missing key": ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n', "row 2: the field 'rejected' is missing"),
    "null": ('{"prompt": "a", "chosen": null, "rejected": "c"}\n', "row 1: the field 'chosen' is missing"),
    "a number": ('{"prompt": "a", "chosen": "b", "rejected": 7}\n', "row 1: the field 'rejected' holds 7, which is not text"),
    "NaN": ('{"prompt": NaN, "chosen": "b", "rejected": "c"}\n', "row 1: the field 'prompt' holds NaN, which is not text"),
    "a list": ('{"prompt": "a", "chosen": ["b"], "rejected": "c"}\n', "row 1: the field 'chosen' holds"),
    "half a surrogate": ('{"prompt": "a", "chosen": "\\ud83d", "rejected": "c"}\n', "row 1: the field 'chosen' holds half of a surrogate"),
    "a line cut in half": ('{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": "a", "cho', "row 3: not a whole JSON object"),
    "other keys": ('{"question": "a", "answer": "b"}\n', "it has 'answer', 'question'"),
    "not an object": ("[1, 2]\n", "it has no fields at all"),
    "an empty file": ("", "there is no row in it"),
    "blank lines": ("\n\n", "there is no row in it"),
    "no usable row": ('{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "none of its 1 rows can be used"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_an_error_that_names_file_row_and_field(load, tmp_path, kind):
    text, message = BAD[kind]
    with pytest.raises(ValueError) as error:
        load(text)
    assert message in str(error.value) and str(tmp_path / "rows.jsonl") in str(error.value)


@pytest.mark.parametrize("name, content, message", [
    ("rows.csv", b"prompt,chosen,rejected\na,b,c,d\n", "row 1: more cells than the header names"),
    ("rows.csv", b"prompt,chosen,rejected\na,b\n", "row 1: the field 'rejected' is missing"),
    ("rows.jsonl", b'{"prompt": "\xff"}\n', "cannot be read as jsonl"),
    ("rows.parquet", b"PAR1 and then nothing", "cannot be read as parquet"),
    ("rows.json", b"[{]", "cannot be read as json"),
    ("rows.txt", b"hello", "not a kind of file that is read"),
])
def test_a_file_that_is_not_what_its_name_says_is_an_error(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokens(str(tmp_path / name), tokenizer, BOTH, Limits())


def test_a_file_that_is_not_there_is_an_error(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="nowhere.jsonl: no such file"):
        load_tokens(str(tmp_path / "nowhere.jsonl"), tokenizer, BOTH, Limits())


def test_a_data_set_of_the_hub_is_read_like_a_file_and_again_when_it_changes(monkeypatch, tokenizer):
    import datasets
    for count in (3, 4):
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(make_rows(count)))
        assert load_tokens("org/pairs", tokenizer, BOTH, Limits())[0]["id"][count - 1] == f"org/pairs, row {count}"


def test_a_changed_file_is_read_again(load):
    assert len(load([row()])[0]) == 1
    assert len(load([row(), row(chosen=" jumped")])[0]) == 2


def test_a_tokenizer_without_eos_is_refused(load):
    bare = PreTrainedTokenizerFast(tokenizer_object=merging_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match="no EOS token"):
        load([row("ab", "cd", "xd")], tokenizer=bare)


# --- held-out rows, windows and batches

def test_no_prompt_is_both_trained_and_held_out_and_the_split_is_always_the_same(load):
    rows = [row(f"prompt {i % 40}", f" a{i}", f" b{i}") for i in range(200)]
    kept, _ = load(rows)
    trained, held = hold_out(kept, 0.3)
    assert len(trained) + len(held) == 200 and 20 < len(held) < 100
    assert not set(data.column(trained, "prompt_key")) & set(data.column(held, "prompt_key"))
    again = load(rows[::-1], name="reversed.jsonl")[0]
    assert set(data.column(hold_out(again, 0.3)[1], "prompt_key")) == set(data.column(held, "prompt_key"))
    assert len(hold_out(kept, 0.0)[1]) == 0


@pytest.mark.parametrize("count, batch, size, ranks", [(10, 4, 2, 1), (10, 4, 3, 2), (5, 4, 2, 3), (1, 8, 4, 4), (100, 16, 5, 8)])
def test_an_epoch_sees_each_row_once_on_any_number_of_ranks(count, batch, size, ranks):
    steps = -(-count // batch)
    for epoch in (0, 1):
        seen = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            rows = window(step, count, batch, seed=3, shuffle=True)
            shares = [micro_batches(rows, size, rank, ranks) for rank in range(ranks)]
            assert all(0 < len(part) <= size for share in shares for part, _ in share)  # each rank takes part in each step
            weighted = [i for share in shares for part, weight in share for i in part if weight]
            assert weighted == rows.tolist()  # in order: rank by rank is the window itself
            seen += weighted
        assert sorted(seen) == list(range(count))


def test_the_order_follows_from_seed_and_epoch_alone():
    def epoch(number, **change):
        return np.concatenate([window(number * 3 + i, **(dict(count=10, batch_size=4, seed=0, shuffle=True) | change)) for i in range(3)])

    assert (epoch(0) == epoch(0)).all() and (epoch(0) != epoch(1)).any() and (epoch(0) != epoch(0, seed=1)).any()
    assert (epoch(2, shuffle=False) == np.arange(10)).all()


def test_a_batch_is_padded_on_the_right_and_scores_answers_alone():
    rows = {"id": ["a", "b"], "prompt_ids": [[5, 6], [7]], "chosen_ids": [[8, 0], [9, 9, 0]], "rejected_ids": [[1, 2, 3, 0], [0]]}
    batch = collate(rows, pad_token_id=4)
    assert batch["chosen_input_ids"].tolist() == [[5, 6, 8, 0, 4, 4], [7, 9, 9, 0, 4, 4]]
    assert batch["chosen_labels"].tolist() == [[IGNORE, IGNORE, 8, 0, IGNORE, IGNORE], [IGNORE, 9, 9, 0, IGNORE, IGNORE]]
    assert batch["rejected_input_ids"].tolist() == [[5, 6, 1, 2, 3, 0], [7, 0, 4, 4, 4, 4]]
    assert torch.equal(batch["rejected_attention_mask"], torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]]))
