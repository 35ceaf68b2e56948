"""Nothing of the user's data is left out silently: columns, keys of messages, files, splits and
names in lists."""
import json

import pytest
from conftest import make_rows, write_jsonl

import data
import train
from data import Limits, describe, load_tokens
from errors import UserError
from layouts import examples
from registry import Needs
from selection import Shape
from sources import Source

PAIRS = Needs()


SFT = Needs(answers=("chosen",))


@pytest.fixture
def load(tmp_path):
    """Write rows to a file and read them -> the number of examples, and the rows with each column
    or key that is not read."""
    def run(rows, needs=PAIRS, **shape):
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        found = list(examples(Source(path), needs, Shape(**shape)))
        unread = {}
        for example in found:
            for name in json.loads(example["unread"]):
                unread[name] = unread.get(name, 0) + 1
        return {"kept": len(found), "unread": unread}
    return run


def pair(**more):
    return {"prompt": "Name a fruit.", "chosen": " Apple.", "rejected": " Rock."} | more


def dialogue(**keys):
    answer = {"role": "assistant", "content": "Apple."} | keys
    return {
        "prompt": [{"role": "user", "content": "Name a fruit."}],
        "chosen": [answer],
        "rejected": [{"role": "assistant", "content": "Rock."}],
    }


# --- columns

@pytest.mark.parametrize("name, value", [
    ("System Prompt", "Answer in Dutch."),
    ("chat_history", [["hello", "hi"]]),
    ("image", {"bytes": None, "path": "cat.png"}),
    ("audios", ["a.wav"]),
    ("functions", [{"name": "weather"}]),
    ("input", "apples and rocks"),
    ("context", "Pears are green and grow on trees."),
    ("documents", [{"text": "Pears are green."}]),
    ("chat_template_kwargs", {"enable_thinking": False}),
    ("loss_weight", 0.5),
    ("label", False),
    ("label", 1),
    ("margin", 0.5),
    ("score_A", 3),
])
def test_a_column_that_changes_what_a_row_means_is_an_error_unless_it_is_ignored(
        load, tmp_path, name, value):
    rows = [pair(), pair(**{name: value})]
    with pytest.raises(UserError) as error:
        load(rows)
    assert f"rows.jsonl, row 2: the column '{name}' is not read" in str(error.value)
    assert f"--ignore_columns {name} trains without it" in str(error.value)
    assert load(rows, ignored=(name,))["unread"] == {name: 1}


@pytest.mark.parametrize("name, value", [
    ("source", "set A"), ("index", 3), ("meta", {"author": "x"}), ("score_chosen", 8),
    ("model", "m-7b"), ("created", "2020-01-01"), ("sample_weight", 1), ("images", 0),
    ("messages", [{"role": "user", "content": "Name a fruit."}]), ("question", "Name a fruit."),
    ("reasoning", "The judge prefers fruit."), ("chosen_score", 2.0),
])
def test_a_column_of_bookkeeping_is_listed_with_its_rows(load, name, value):
    account = load([pair(**{name: value}), pair(), pair(**{name: value})])
    assert account["kept"] == 3 and account["unread"] == {name: 2}


@pytest.mark.parametrize("value", [None, "", " ", [], {}, "[]", [None], {"bytes": None}])
def test_a_column_without_content_is_not_mentioned(load, value):
    account = load([pair(system=value, images=value, labels=value)])
    assert account["kept"] == 1 and account["unread"] == {}


def test_what_the_prompt_repeats_is_not_lost(load):
    text = "You are a helpful assistant."
    assert load([pair(system=text, prompt=f"{text}\n\nName a fruit.")])["kept"] == 1
    short = pair(input="fruit", prompt="Name one of:\nfruit\n")
    assert load([short])["unread"] == {"input": 1}
    # A short value inside a word is no repetition.
    with pytest.raises(UserError, match="the column 'input' is not read"):
        load([pair(input="am")])


def test_the_scores_and_the_id_are_read_where_the_loss_reads_them(load):
    rows = [pair(id="x", chosen_score=2.0, rejected_score=1.0)]
    assert load(rows, Needs(scores=True))["unread"] == {}
    assert load(rows, SFT)["unread"] == {
        "rejected": 1, "chosen_score": 1, "rejected_score": 1}


def test_a_renamed_column_is_read_and_the_column_that_it_replaces_is_listed(load):
    rows = [{"input": "Name a fruit.", "prompt": 7, "chosen": " Apple.", "rejected": " Rock."}]
    assert load(rows, columns=(("prompt", "input"),))["unread"] == {"prompt": 1}


@pytest.mark.parametrize("name", ["question", "instruction", "input", "query", "Problem"])
def test_a_prompt_under_another_name_is_an_error_that_names_columns(load, name):
    rows = [{name: "What is red?", "chosen": "It is blood.", "rejected": "It is snow."}]
    with pytest.raises(UserError, match=f"row 1: the column '{name}' .*--columns prompt={name}"):
        load(rows)
    assert load(rows, columns=(("prompt", name),))["kept"] == 1


def test_rows_with_the_prompt_inside_both_answers_may_have_any_such_column(load):
    start = "\n\nHuman: What is red?\n\nAssistant:"
    rows = [{"question": "Other text.", "chosen": f"{start} Blood.", "rejected": f"{start} Snow."}]
    assert load(rows)["unread"] == {"question": 1}
    rows = [{"question": "What is red?"}]
    rows[0] |= {"chosen": "What is red? Blood", "rejected": "What is red? Snow"}
    assert load(rows)["kept"] == 1


def test_rows_of_two_splits_in_one_file_are_an_error(load):
    rows = [pair(split="train_sft"), pair(split="test_sft")]
    with pytest.raises(UserError, match="row 2: its column 'split' has 'test_sft'"):
        load(rows)
    assert load(rows, ignored=("split",))["kept"] == 2
    assert load([rows[1], rows[1]])["unread"] == {"split": 2}


# --- keys of a message

@pytest.mark.parametrize("key, value", [
    ("reasoning", "fruit grow"), ("images", ["a.png"]), ("weight", 0), ("trainable", False),
    ("function_call", {"name": "f"}), ("documents", ["Pears are green."]),
])
def test_a_message_key_that_changes_what_a_message_means_is_an_error_unless_it_is_ignored(
        load, key, value):
    rows = [dialogue(), dialogue(**{key: value})]
    with pytest.raises(UserError) as error:
        load(rows)
    assert f"row 2: the field 'chosen' holds a message with {key}, which is not" in str(error.value)
    assert load(rows, ignored=(key,))["unread"] == {f"chosen[].{key}": 1}


@pytest.mark.parametrize("key, value", [
    ("speaker", "bot"), ("id", 4), ("timestamp", "12:00"), ("weight", 1), ("trainable", True),
])
def test_another_message_key_is_listed_with_its_rows(load, key, value):
    account = load([dialogue(**{key: value}), dialogue(), dialogue(**{key: None})])
    assert account["kept"] == 3 and account["unread"] == {f"chosen[].{key}": 1}


@pytest.mark.parametrize("key, value", [
    ("tool_calls", [{"name": "f"}]), ("thinking", "fruit grow"), ("train", False), ("name", "bot"),
])
def test_a_key_that_a_template_reads_may_be_ignored_and_is_then_listed(load, tmp_path, key, value):
    rows = [dialogue(**{key: value}), dialogue()]
    assert load(rows)["unread"] == {}
    assert load(rows, ignored=(key,))["unread"] == {f"chosen[].{key}": 1}
    example = next(examples(Source(str(tmp_path / "rows.jsonl")), PAIRS, Shape(ignored=(key,))))
    assert key not in json.loads(example["answers"][0])[0]


# --- names in lists

def test_a_name_of_ignore_columns_must_be_a_column_or_key_that_is_not_read(load):
    accounts = [load([dialogue(speaker="x") | {"images": ["a.png"]}], ignored=("images",))]
    data.check_ignored(("images", "speaker"), accounts)
    message = "--ignore_columns image: no row has an unread .* the nearest is images"
    with pytest.raises(UserError, match=message):
        data.check_ignored(("images", "image"), accounts)
    with pytest.raises(UserError, match="--ignore_columns prompt: no row has an unread column"):
        data.check_ignored(("prompt",), accounts)


def test_an_ignored_column_may_be_empty_in_every_row(load):
    accounts = [load([pair(system="")], ignored=("system",))]
    data.check_ignored(("system",), accounts)


def test_spaces_around_the_names_of_columns_are_forgiven():
    expected = (("prompt", "my question"), ("chosen", "good"))
    assert data.read_columns("prompt=my question,chosen=good") == expected
    assert data.read_columns(" prompt = my question , chosen =good ,") == expected


@pytest.mark.parametrize("columns, message", [
    ("promt=question", "--columns promt=question: write OURS=THEIRS.*the nearest is prompt"),
    ("prompt=question;chosen=good", "row 1: --columns names 'question;chosen=good'"),
    ("prompt=questin", "row 1: --columns names 'questin'.*the nearest is question"),
    ("prompt=Question", "row 1: --columns names 'Question'.*the nearest is question"),
    ("prompt=question,prompt=good", "names a column twice"),
])
def test_a_name_of_columns_that_matches_nothing_is_named_with_the_nearest(load, columns, message):
    rows = [{"question": "What is red?", "chosen": " Blood.", "rejected": " Snow."}]
    with pytest.raises(UserError, match=message):
        load(rows, columns=data.read_columns(columns))


def test_spaces_inside_a_mixture_are_forgiven(tmp_path, tokenizer):
    a = write_jsonl(tmp_path / "a.jsonl", make_rows(8))
    b = write_jsonl(tmp_path / "b.jsonl", make_rows(8, seed=1))
    spaced = load_tokens(f" {a} : 1, {b}: 0.5 ", tokenizer, PAIRS, Limits())[0]
    assert spaced["id"][:] == load_tokens(f"{a}:1,{b}:0.5", tokenizer, PAIRS, Limits())[0]["id"][:]
    with pytest.raises(UserError, match=r"c.jsonl: no such file; the nearest are .*\.jsonl"):
        load_tokens(f"{a}:1, {tmp_path}/c.jsonl:1", tokenizer, PAIRS, Limits())
    with pytest.raises(UserError, match="a file has no splits; a share is a number"):
        load_tokens(f"{a}:70%,{b}:30%", tokenizer, PAIRS, Limits())


# --- folders

def make_folder(path, *names):
    """Write files whose rows have the file's name as their id."""
    for name in names:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.name.startswith("dataset_info"):
            file.write_text('{"pairs": {"file_name": "pairs.jsonl", "ranking": true}}')
        elif file.suffix == ".jsonl":
            write_jsonl(file, [row | {"id": name} for row in make_rows(2)])
        elif file.suffix == ".json":
            file.write_text(json.dumps([row | {"id": name} for row in make_rows(2)]))
        else:
            file.write_text("")
    return str(path)


# {names in the folder: {split: names that are read}}
LAYOUTS = [
    (["train.jsonl", "test.jsonl"], {"": ["train.jsonl"], "test": ["test.jsonl"],
                                     "train": ["train.jsonl"]}),
    (["pairs.jsonl", "pairs_test.json"], {"": ["pairs.jsonl"], "test": ["pairs_test.json"],
                                          "train": ["pairs.jsonl"]}),
    (["a.jsonl", "b.jsonl"], {"": ["a.jsonl", "b.jsonl"], "b": ["b.jsonl"]}),
    (["contest.jsonl", "latest.jsonl"], {"": ["contest.jsonl", "latest.jsonl"]}),
    (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl",
      "data/test-00000-of-00001.jsonl"],
     {"": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
      "test": ["data/test-00000-of-00001.jsonl"]}),
    (["data/train_prefs-00000-of-00001.jsonl", "data/test_prefs-00000-of-00001.jsonl"],
     {"": ["data/train_prefs-00000-of-00001.jsonl"],
      "test_prefs": ["data/test_prefs-00000-of-00001.jsonl"]}),
    (["train/0.jsonl", "validation/0.jsonl", "test/0.jsonl"],
     {"": ["train/0.jsonl"], "validation": ["validation/0.jsonl"], "val": ["validation/0.jsonl"]}),
    (["all.jsonl", "test/0.jsonl"], {"": ["all.jsonl"], "test": ["test/0.jsonl"]}),
    (["dev.jsonl"], {"": ["dev.jsonl"]}),
    (["pairs.jsonl", "dataset_info.json"], {"": ["pairs.jsonl"], "train": ["pairs.jsonl"]}),
    (["default/train/0.jsonl", "default/test/0.jsonl", ".cache/x/old.jsonl"],
     {"": ["default/train/0.jsonl"]}),
]


@pytest.mark.parametrize("names, reads", LAYOUTS)
def test_a_folder_is_read_by_its_splits_and_the_other_files_are_named(
        tmp_path, tokenizer, names, reads):
    folder = make_folder(tmp_path / "rows", *names)
    for split, expected in reads.items():
        spec = f"{folder}:{split}" if split else folder
        rows, account = load_tokens(spec, tokenizer, PAIRS, Limits())
        read = [name.rpartition("(id ")[2][:-1] for name in rows["id"]]
        assert list(dict.fromkeys(read)) == expected
        for name in set(names) - set(expected):
            assert name in describe(account) or name.startswith(".")


@pytest.mark.parametrize("names, split, message", [
    (["data/train_sft-00000-of-00001.jsonl", "data/train_prefs-00000-of-00001.jsonl"], "",
     "has the splits train_prefs, train_sft; name one of them, as in .*:train_prefs"),
    (["test.jsonl", "validation.jsonl"], "", "no split train .* there are test, validation"),
    (["train.jsonl", "test.jsonl"], ":trian", "there is no split trian .* there are test, train"),
    (["helpful/train.jsonl", "harmless/train.jsonl"], "",
     "name one of its subfolders, .*: harmless, helpful"),
    (["README.md"], "", "no .jsonl, .json, .csv, .parquet file in this folder"),
])
def test_a_folder_whose_training_rows_are_not_clear_is_an_error(
        tmp_path, tokenizer, names, split, message):
    folder = make_folder(tmp_path / "rows", *names)
    with pytest.raises(UserError, match=message):
        load_tokens(folder + split, tokenizer, PAIRS, Limits())


def test_files_of_other_kinds_in_a_folder_are_named(tmp_path, tokenizer):
    folder = make_folder(tmp_path / "rows", "a.jsonl", "b.jsonl.gz", "README.md")
    account = load_tokens(folder, tokenizer, PAIRS, Limits())[1]
    assert f"not read, of a kind that is not read: {folder}/b.jsonl.gz" in describe(account)


# --- flags of other trainers

@pytest.mark.parametrize("flags, message", [
    ("--learning_rate 1e-6", "--learning_rate: --lr 1e-6$"),
    ("--learning-rate=1e-6", "--learning-rate: --lr 1e-6$"),
    ("--num_train_epochs 3.0 --bf16 True", "_epochs: --epochs 3; --bf16: --dtype bfloat16$"),
    ("--per_device_train_batch_size 4 --gradient_accumulation_steps 8",
     "--micro_batch_size 4, and --batch_size 64 = 4 x 8 x 2 "),
    ("--gradient_accumulation_steps auto", "--batch_size 1 x auto x 2 "),
    ("--loss_type ipo", "--loss_type: --loss ipo$"),
    ("--use_dora true --use_peft false", "--use_dora: --dora; --use_peft: leave it out$"),
    ("--loss simpo --ref_model_mixup_alpha 0.6", "--sync_ref_alpha 0.6$"),
    ("--precompute_ref_log_probs", "--precompute_ref_log_probs: --ref cache$"),
    ("--lora_rank 4 --lora_target q_proj, v_proj", "--lora_target q_proj, v_proj: no flag reads "),
    ("--gradient_checkpointing True", "--gradient_checkpointing True: no flag reads 'True'"),
    ("--batchsize 3", "--batchsize: there is no such flag; the nearest is --batch_size"),
])
def test_a_flag_of_another_trainer_is_an_error_with_its_translation(monkeypatch, flags, message):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=message):
        train.parse_args(flags.split())
