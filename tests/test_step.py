"""One optimizer step, followed call by call: how much code a reader has to read."""
import pathlib
import sys

import torch
from conftest import ALONE, ROOT, make_rows, tiny_model, write_jsonl
from test_density import code_lines

import data
import train
from batches import collate, make_task
from logps import FastLogps
from losses import sigmoid
from variants import Variants


def functions_called(call):
    """Call -> the code objects of the functions of this project that run."""
    found = set()

    def note(frame, event, _):
        path = pathlib.Path(frame.f_code.co_filename)
        if event == "call" and path.parent == ROOT:
            found.add(frame.f_code)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def lines_of(code):
    """{(file, line)} of the code of a function, without comments and its docstring."""
    path = pathlib.Path(code.co_filename)
    lines = [line for *_, line in code.co_lines() if line]
    written = code_lines(path.read_text())
    return {(path.name, line) for line in written if code.co_firstlineno <= line <= max(lines)}


def test_one_plain_padded_sigmoid_step_is_170_lines_of_code_in_4_files(tokenizer, tmp_path):
    """From a batch of token ids to the updated weights, through the code of train.py."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", make_rows(4))
    rows, _ = data.load_tokens(pairs, tokenizer)
    policy, reference = (FastLogps(tiny_model("llama", tokenizer)) for _ in range(2))
    task = make_task(sigmoid, {"beta": 0.1}, Variants(), "float32", ALONE.device)
    batch = collate(rows[:4], tokenizer, ALONE.device, task.row_format)
    optimizer = torch.optim.AdamW(policy.parameters())
    step = train.Step(1, 4, [train.Piece(slice(0, 4), 1.0)], {})
    before = policy.model.get_input_embeddings().weight.clone()

    called = functions_called(lambda: train.train_step(
        task, policy, reference, optimizer, iter([batch]), step, 1.0, False, ALONE))

    assert not torch.equal(policy.model.get_input_embeddings().weight, before)
    names = {code.co_name for code in called}
    assert {"train_step", "get_batch_logps", "concatenated_forward", "sigmoid"} <= names
    lines = set().union(*map(lines_of, called))
    files = {file for file, _ in lines}
    assert len(files) <= 4, sorted(files)
    sizes = {code.co_qualname: len(lines_of(code)) for code in called}
    assert len(lines) <= 170, f"{len(lines)} lines: {sizes}"
