"""The numbers of bench.py agree with counts by hand; a comparison requires the same work."""
import json
import shlex
import sys

import numpy as np
import pytest
import torch
from conftest import write_jsonl

import bench
from errors import UserError


def test_the_floor_of_one_pair_equals_a_count_by_hand():
    """The pair has 2 prompt tokens, 3 chosen and 1 rejected; the model has 10 weights in its body,
    a vocabulary of 7, a hidden size of 4 and 5 layers. The prompt's queries attend to 1 + 2 keys,
    those of chosen to 3 + 4 + 5, and that of rejected to 3."""
    forward = 2 * 10 * 6 + 2 * 7 * 4 * (3 + 1) + 4 * 4 * 5 * (3 + 12 + 3)
    assert bench.floor(np.array([[2, 3, 1]]), 10, 7, 4, 5, passes=1) == forward
    assert bench.floor(np.array([[2, 3, 1]] * 3), 10, 7, 4, 5, passes=4) == 3 * 4 * forward


def test_the_padded_tokens_of_a_step_equal_a_count_by_hand():
    """The micro-batches have 2 pairs and 1 pair, with longest rows of 2 + 3 and 1 + 6 tokens. Each
    pair is two rows."""
    lengths = np.array([[[2, 3, 1], [1, 1, 2], [1, 1, 6]]])
    assert bench.count_padded(lengths, 2) == 2 * (2 * 5) + 2 * (1 * 7)


def test_the_measured_peak_of_the_machine_is_between_1e8_and_1e15_flops():
    peak = bench.matmul_peak(torch.float32, torch.device("cpu"), size=128, repeats=3)
    assert 1e8 < peak < 1e15


@pytest.fixture
def flags(folder, pairs):
    return ["--model", folder, "--data", pairs, "--batch_size", "4", "--steps", "3",
            "--warmup", "1", "--max_length", "64", "--no_shuffle"]


@pytest.mark.parametrize("more", [
    [],
    ["--attention=packed", "--micro_batch_size=3", "--gc"],
    ["--lora_r=2", "--bf16"],
    ["--precompute_ref", "--warmup=0"],
])
def test_a_run_prints_one_json_line(flags, more, capsys):
    threads = torch.get_num_threads()
    bench.main([*flags, *more])
    torch.set_num_threads(threads)
    line, = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["first_loss"] == pytest.approx(0.6931, abs=1e-4)
    assert line["last_loss"] == pytest.approx(0.6931, abs=1e-2)
    assert line["attention"] == ("packed" if "--attention=packed" in more else "padded")
    assert (line["padding_fraction"] == 0) == (line["attention"] == "packed")
    assert 0 < line["unique_tokens_per_s"] < line["nonpad_tokens_per_s"]
    assert line["step_s_mean"] == pytest.approx(4 / line["pairs_per_s"], rel=1e-2)
    assert line["init_s"] > 0
    assert line["peak_rss_mb"] >= line["rss_before_train_mb"] > 0
    assert 0 < line["share_of_peak"] < 1
    assert line["trained_parameters"] == line["parameters"] or "--lora_r=2" in more
    moments = 8 * line["trained_parameters"] / 2**20
    assert line["optimizer_mb"] == pytest.approx(moments, abs=1e-3)


def test_a_file_of_few_rows_is_repeated_to_fill_every_batch(flags, capsys):
    """22 rows and the first 2 again make 3 batches of 8. Other trainers receive the same rows."""
    bench.main([*flags, "--batch_size", "8"])
    assert json.loads(capsys.readouterr().out)["pairs_per_s"] > 0


def test_rows_that_would_be_dropped_are_an_error(flags, tmp_path):
    rows = [
        {"prompt": "a", "chosen": " cat", "rejected": " dog"},
        {"prompt": "a", "chosen": " b", "rejected": " b"},
    ]
    path = write_jsonl(tmp_path / "same.jsonl", rows)
    with pytest.raises(UserError, match="6 of its first rows"):
        bench.main([*flags, "--data", path])


def fake_trainer(tmp_path, **changes):
    """The command of a trainer that runs bench.py and multiplies numbers of its line by factors."""
    script = tmp_path / "fake.py"
    script.write_text(
        "import json, subprocess, sys\n"
        f"command = [sys.executable, {bench.__file__!r}, *sys.argv[1:]]\n"
        "done = subprocess.run(command, capture_output=True, text=True)\n"
        "line = json.loads(done.stdout)\n"
        f"for name, factor in {changes}.items():\n"
        "    line[name] *= factor\n"
        "print('a line before')\n"
        "print(json.dumps(line))\n")
    return shlex.join([sys.executable, str(script)])


def test_a_comparison_runs_both_trainers_with_the_same_flags(flags, tmp_path, capsys):
    slow = fake_trainer(tmp_path, unique_tokens_per_s=0.01, step_s_mean=100)
    bench.main([*flags, "--repeats", "1", "--compare", slow])
    result = json.loads(capsys.readouterr().out)
    assert result["speed"] == result["speeds"][0] > 10
    assert len(result["peak_above_state_mb"]) == 1 and result["shares_of_peak"][0][0] > 0


LINE = {"first_loss": 0.6931, "last_loss": 0.5, "unique_tokens_per_s": 100.0, "step_s_mean": 2.0}


@pytest.mark.parametrize("changes", [{"last_loss": 0.55}, {"unique_tokens_per_s": 150.0}])
def test_lines_of_different_work_are_an_error(changes):
    with pytest.raises(UserError, match="not the same work"):
        bench.check_same_work(LINE, LINE | changes)


def test_the_same_work_at_another_speed_is_no_error():
    faster = {"unique_tokens_per_s": 150.0, "step_s_mean": 2.0 / 1.5}
    bench.check_same_work(LINE, LINE | faster)


def test_the_error_of_a_command_that_fails_is_quoted(flags):
    program = "import sys; print('no such thing', file=sys.stderr); sys.exit(3)"
    with pytest.raises(UserError, match="ended with status 3: no such thing"):
        bench.call([sys.executable, "-c", program], 1)


def test_a_start_with_many_rows_is_timed_with_and_without_a_cache(flags, capsys, monkeypatch):
    threads = torch.get_num_threads()
    bench.main([*flags, "--start=40"])
    line, = map(json.loads, capsys.readouterr().out.splitlines())
    assert line["rows"] == 40 and line["start_s"] > 0 and line["cached_start_s"] > 0
    monkeypatch.setitem(bench.START_BOUND, "cached_start_s", (0.0, 1e-9))
    with pytest.raises(UserError, match="--start 40: cached_start_s is .*, above its bound"):
        bench.main([*flags, "--start=40"])
    torch.set_num_threads(threads)
