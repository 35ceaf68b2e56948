"""Files of users that are cut, damaged, doubtful or hostile: the right rows, or one line that names
file and row. Never a traceback, and never other rows than the file has."""

import gzip
import json
import os
import socket
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, write_jsonl

from data import PAIRS, describe, load_tokens
from errors import UserError
from registry import Needs

SCORED = Needs(scores=True, ordered_scores=True)
ROW = {"prompt": "a cat", "chosen": " sat", "rejected": " ran"}
LINE = json.dumps(ROW)
DIGITS = "9" * 5000
DEEP = "[" * 900 + "1" + "]" * 900


@pytest.fixture
def read(tmp_path, tokenizer):
    """Write a file, or take a path, and load it -> ids of the rows, the report."""

    def run(content=None, name="rows.jsonl", scored=False):
        path = tmp_path / name
        if isinstance(content, str):
            content = content.encode()
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, pyarrow.Table):
            pyarrow.parquet.write_table(content, path)
        rows, account = load_tokens(str(path), tokenizer, SCORED if scored else PAIRS)
        return list(rows["id"]), describe(account)

    return run


def row(**more):
    return json.dumps(ROW | more)


# --- damaged and hostile text


@pytest.mark.parametrize("name, content, where", [
    ("rows.json", f'[{LINE}, {{"prompt": {DIGITS}}}]', "rows.json, row 2: "),
    ("rows.jsonl", f'{LINE}\n{{"prompt": {DIGITS}}}', "rows.jsonl, row 2: "),
    ("rows.json", f"[{LINE}, {LINE}", "the list ends after row 2 without ']'"),
    ("rows.json", f"[{LINE} {LINE}]", "after row 1 of the list it has '{"),
    ("rows.json", f"[{LINE}, ]", "rows.json, row 2: "),
    ("rows.json", f"[{LINE}] [{LINE}]", "after row 1 of the list it has '] ["),
    ("rows.json", "[" * 100_000, "rows.json, row 1: "),
    ("rows.jsonl", '{"a":' * 5000, "rows.jsonl, row 1: "),
    ("rows.jsonl", LINE.encode("utf-16"), "rows.jsonl: cannot be read as jsonl: 'utf-8'"),
    ("rows.json", f"[{LINE}]".encode("utf-16-le"), "rows.json, row 1: "),
    ("rows.csv", "prompt,chosen,rejected\na,b,c\n".encode("utf-16-le"), "line 1: has a NUL"),
    ("rows.csv", "prompt,chosen,rejected\na,b\0,c\n", "rows.csv, line 2: has a NUL"),
    ("rows.csv", 'prompt,chosen,rejected\na,b,c\na,"b,c\nd,e,f\n', "rows.csv, row 2: "),
    ("rows.csv", '"prompt,chosen', "rows.csv: cannot be read as csv: its header"),
    ("rows.jsonl", gzip.compress(LINE.encode(), mtime=0)[:30], "rows.jsonl: cannot be read as"),
    ("rows.csv", b"PK\x03\x04" + bytes(50), "rows.csv, line 1: has a NUL"),
    ("rows.parquet", b"", "rows.parquet: cannot be read as parquet"),
])
def test_a_damaged_file_is_one_line_with_the_place_of_the_damage(read, name, content, where):
    with pytest.raises(UserError) as error:
        read(content, name)
    assert where in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("field, message", [
    ("chosen", "the field 'chosen' holds [[["),
    ("weight", "the field 'weight' holds [[["),
    ("system_prompt", "the column 'system_prompt' is not read"),
    ("image", "the column 'image' is not read"),
])
def test_a_value_nested_900_deep_is_one_line(read, field, message):
    with pytest.raises(UserError, match=r"row 1: " + message.replace("[", r"\[")):
        read(row(**{field: "deep"}).replace('"deep"', DEEP))


def test_a_deep_value_that_is_not_read_is_listed_and_the_row_kept(read):
    ids, report = read(row(meta="deep", id="deep").replace('"deep"', DEEP))
    assert len(ids) == 1 and "not read: meta (1 rows)" in report


def test_a_json_list_longer_than_a_read_gives_its_rows_with_their_numbers(read, tmp_path):
    ids, _ = read("\ufeff\n [" + ",\r\n".join([LINE] * 500) + "\n]\n", "rows.json")
    assert ids == [f"{tmp_path}/rows.json, row {number}" for number in range(1, 501)]


@pytest.mark.parametrize("name, form", [("rows.jsonl", "{}\n"), ("rows.json", "[{}]")])
def test_a_key_with_two_values_is_an_error_and_with_the_same_value_twice_is_not(read, name, form):
    """Python takes the last value in silence."""
    for twice in (LINE[:-1] + ', "chosen": " lay"}', LINE[:-1] + ', "meta": {"a": 1, "a": 2}}'):
        with pytest.raises(UserError, match="row 1: .* is there twice, with different values"):
            read(form.replace("{}", twice), name)
    assert len(read(form.replace("{}", LINE[:-1] + ', "chosen": " sat"}'), name)[0]) == 1


def test_a_key_with_two_values_inside_messages_as_text_is_an_error(read):
    messages = '[{"role": "user", "content": "hi", "content": "ho"}]'
    with pytest.raises(UserError, match="the field 'prompt' .* 'content' is there twice"):
        read(row(prompt=messages))


# --- scores


@pytest.mark.parametrize("score", [
    "true", "NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, '"nan"', '"inf"', '"1_0"',
    '"\u0665"', '""', "[5]",
])
def test_a_score_that_is_not_a_finite_number_is_an_error(read, score):
    text = LINE[:-1] + f', "chosen_score": {score}, "rejected_score": -1}}'
    with pytest.raises(UserError, match="row 1: the loss reads the field 'chosen_score', a finite"):
        read(text, scored=True)


@pytest.mark.parametrize("score", ["5", '"5"', '" 5.0 "', '"+.5e1"'])
def test_a_score_may_be_a_number_as_text_as_csv_has_it(read, score):
    text = LINE[:-1] + f', "chosen_score": {score}, "rejected_score": 4.5}}'
    assert len(read(text, scored=True)[0]) == 1


# --- Parquet and Arrow


def table(**more):
    return pyarrow.table({name: [value] * 3 for name, value in ROW.items()} | more)


FAR = pyarrow.array([10**7] * 3, pyarrow.int32()).cast(pyarrow.date32())  # the year 29349
NOT_UTF8 = pyarrow.Array.from_buffers(
    pyarrow.string(), 3, pyarrow.array([b"\xff"] * 3).buffers())
ODD = {
    "date": FAR,
    "timestamp": pyarrow.array([2**62] * 3, pyarrow.timestamp("ms")),
    "zone": pyarrow.array([1] * 3, pyarrow.timestamp("us", tz="Mars/Base")),
    "duration": pyarrow.array([2**62] * 3, pyarrow.duration("ms")),
    "inside": pyarrow.StructArray.from_arrays([FAR], ["day"]),
    "not UTF-8": NOT_UTF8,
}


@pytest.mark.parametrize("kind", ODD)
def test_a_column_that_python_cannot_represent_is_an_error_only_where_it_is_read(read, kind):
    ids, report = read(table(extra=ODD[kind]), "rows.parquet")
    assert len(ids) == 3 and "not read: extra (3 rows)" in report
    with pytest.raises(UserError, match="row 1: the field 'chosen' cannot be read: "):
        read(table(chosen=ODD[kind]), "rows.parquet")
    with pytest.raises(UserError, match="row 1: the column 'context' is not read"):
        read(table(context=ODD[kind]), "rows.parquet")


def test_two_columns_of_one_name_are_an_error(read):
    arrays = [pyarrow.array(["a"])] * 4
    twice = pyarrow.Table.from_arrays(arrays, names=[*ROW, "chosen"])
    with pytest.raises(UserError, match="rows.parquet: the schema names the column .chosen. twice"):
        read(twice, "rows.parquet")


@pytest.fixture
def saved(tmp_path):
    """A folder of save_to_disk with rows in several batches, its Arrow file, and its bytes."""
    rows = datasets.Dataset.from_list([ROW] * 3000)
    rows.save_to_disk(tmp_path / "saved")
    file, = (tmp_path / "saved").glob("*.arrow")
    return file, file.read_bytes()


def ends_of_batches(content):
    """The positions in a stream of Arrow at which a batch ends and another message begins."""
    stream = pyarrow.BufferReader(content)
    reader, ends = pyarrow.ipc.open_stream(stream), []
    for _ in reader:
        ends.append(stream.tell())
    return ends


def test_an_arrow_file_cut_anywhere_is_one_line_and_never_fewer_rows(read, saved):
    file, content = saved
    assert len(read(name="saved")[0]) == 3000
    boundaries = ends_of_batches(content)
    assert len(boundaries) > 1
    for size in (0, 1, 100, len(content) // 2, *boundaries, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(UserError, match="saved"):
            read(name="saved")


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize("content", ["", "[]", "null", '{"a"'])
def test_a_damaged_json_file_of_save_to_disk_is_one_line(read, saved, name, content):
    (saved[0].parent / name).write_text(content)
    with pytest.raises(UserError, match="saved: cannot be read as a folder of save_to_disk"):
        read(name="saved")


@pytest.mark.parametrize("content", ["", "[]", "null", '{"splits": 5}'])
def test_a_damaged_dictionary_of_splits_is_one_line(read, tmp_path, content):
    datasets.DatasetDict({"train": datasets.Dataset.from_list([ROW])}).save_to_disk(tmp_path / "d")
    (tmp_path / "d" / "dataset_dict.json").write_text(content)
    with pytest.raises(UserError, match="d: cannot be read as a folder of save_to_disk"):
        read(name="d")


def test_a_damaged_cache_is_one_line_that_says_what_to_delete(read, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    text = "\n".join([LINE] * 3000)
    assert len(read(text)[0]) == 3000
    arrows = list(cache.rglob("*.arrow"))
    assert len(arrows) == 2  # the text and the tokens
    info, = cache.rglob("dataset_info.json")
    for file in (*arrows, info):
        content = file.read_bytes()
        cuts = [content[:0], content[:100], content[:len(content) // 2], content[:-9]]
        if file == info:
            cuts = [b"", b"[]", b"null", b"{}"]
        else:
            cuts += [content[:end] for end in ends_of_batches(content)]
        for cut in cuts:
            file.write_bytes(cut)
            with pytest.raises(UserError, match="cache.*delete"):
                read(name="rows.jsonl")
        file.write_bytes(content)
    assert len(read(name="rows.jsonl")[0]) == 3000


# --- folders and names


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(path))  # the path of a socket has at most 108 bytes


SPECIAL = {
    "link": lambda path: path.symlink_to("nowhere.jsonl"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
    "socket": make_socket,
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_is_refused_where_rows_are_expected_and_named_elsewhere(
    read, tmp_path, monkeypatch, kind
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "many"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [ROW])
    SPECIAL[kind](folder / "other")
    ids, report = read(name="many")
    assert len(ids) == 1 and f"a link to nothing: {folder}/other" in report
    SPECIAL[kind](folder / "b.jsonl")
    for name in ("many", "many/b.jsonl"):
        with pytest.raises(UserError, match="many/b.jsonl: (a link to|not a regular file)"):
            read(name=name)


@pytest.mark.parametrize("name, content", [
    ("b.jsonl", ""), ("b.jsonl", "\n \n"), ("b.json", "[]"), ("b.json", ""), ("b.csv", ""),
    ("b.csv", "prompt,chosen,rejected\n"),
])
def test_a_file_of_a_folder_without_a_row_is_named(read, tmp_path, name, content):
    folder = tmp_path / "many"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [ROW])
    (folder / name).write_text(content)
    ids, report = read(name="many")
    assert len(ids) == 1 and f"not read, without a row: {folder}/{name}" in report


def test_a_file_three_folders_below_is_named(read, tmp_path):
    (tmp_path / "many/x/y/z").mkdir(parents=True)
    write_jsonl(tmp_path / "many/a.jsonl", [ROW])
    write_jsonl(tmp_path / "many/x/y/z/b.jsonl", [ROW])
    assert "more than two folders below: " in read(name="many")[1]


@pytest.mark.parametrize("name", [
    "/" + "x" * 5000, "x" * 5000 + ".jsonl", "/dev/null", "a\0.jsonl",
])
def test_a_name_that_is_no_file_is_one_line(tokenizer, name):
    with pytest.raises(UserError, match="no such file|not a regular file"):
        load_tokens(name, tokenizer)


@pytest.mark.parametrize("text", ["\x1b[31mred", "two\nlines", "\u202etxt.exe", "half \ud83d"])
def test_nothing_that_a_report_prints_from_data_controls_the_terminal(read, text):
    rows = [row(id=text), row(id=text, rejected=" sat"), row(**{text: 1})]
    ids, report = read("\n".join(rows))
    assert len(ids) == 2 and report.count("\\") >= 2
    assert all(line.isprintable() for line in [*ids, *report.split("\n")])


@pytest.mark.parametrize("name", [b"n\xff", b"two\nlines\x1b[2J", "漢字é\u202e".encode()])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_may_have_any_name(read, name, suffix):
    content = {".jsonl": LINE, ".json": f"[{LINE}]", ".parquet": table().slice(0, 1),
               ".csv": "prompt,chosen,rejected\na cat, sat, ran\n"}[suffix]
    if suffix == ".parquet":
        buffer = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(content, buffer)
        content = buffer.getvalue().to_pybytes()
    ids, report = read(content, os.fsdecode(name) + suffix)
    assert len(ids) == 1 and ids[0].isprintable() and report.isprintable()


def test_a_terminal_without_utf8_reads_a_file_with_a_name_in_utf8(tmp_path, folder):
    name = "é漢字.jsonl"
    write_jsonl(tmp_path / name, [ROW, ROW | {"chosen": " é😀"}])
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    result = subprocess.run(
        [sys.executable, ROOT / "data.py", name, "--model", folder], cwd=tmp_path, text=True,
        capture_output=True, env=environment)
    assert result.returncode == 0 and "2 of 2 rows kept" in result.stdout, result.stderr


# --- messages


@pytest.mark.parametrize("key", ["images", "image", "image_url", "attachments", "media", "files"])
def test_an_image_inside_a_message_is_an_error(read, key):
    message = {"role": "user", "content": "see", key: ["a.png"]}
    with pytest.raises(UserError, match=f"row 1: the field 'prompt' holds a message with {key}"):
        read(row(prompt=[message]))


def test_an_image_as_a_part_of_a_content_is_an_error(read):
    parts = [{"type": "image", "url": "a.png"}, {"type": "text", "text": "see"}]
    message = "row 1: the field 'prompt' holds a message with a part of the type \"image\""
    with pytest.raises(UserError, match=message):
        read(row(prompt=[{"role": "user", "content": parts}]))


@pytest.mark.parametrize("chosen, prompt", [
    ("<think>hm", "a"),
    ("<think>hm</think>x<think>y", "a"),
    ("<thinking>hm", "a"),
    (" hm", "a <think>\n"),
])
def test_an_answer_that_never_closes_its_reasoning_is_counted_and_named(read, chosen, prompt):
    rows = [row(), row(chosen="<think>hm</think> yes"), row(chosen=chosen, prompt=prompt),
            row(rejected=chosen, prompt=prompt), row(prompt="a <think>", chosen="</think>b",
                                                    rejected="x</think>")]
    ids, report = read("\n".join(rows))
    assert len(ids) == 5
    line, = [line for line in report.splitlines() if "never closes it" in line]
    assert line.startswith("  2 rows: ") and "row 3" in line and "row 4" in line
