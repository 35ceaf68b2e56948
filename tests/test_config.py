"""--config FILE.json: flags from a file, or those of another run."""
import json

import pytest
from conftest import ALONE, differences, read_metrics, to_arguments

import flags
import train
from errors import UserError

REAL = {"model": "m", "dataset": "d"}


def write(path, content):
    path.write_text(json.dumps(content))
    return f"--config={path}"


def parse(tmp_path, content, *arguments):
    """The flags of a run with this file and these arguments."""
    return flags.parse_args([write(tmp_path / "flags.json", content), *arguments])[0]


def test_a_file_gives_flags_and_the_command_line_wins_wherever_it_stands(tmp_path):
    content = REAL | {"lr": 1e-6, "shuffle": False, "lora_rank": 4, "dora": True, "rslora": False,
                      "max_steps": None, "loss": "ipo", "beta": 0.3}
    path = write(tmp_path / "flags.json", content)
    for argv in ([path, "--lr=2e-6"], ["--lr=2e-6", path], ["--lr", "2e-6", *path.split("=")]):
        args, loss, hyper = flags.parse_args(argv)
        assert (args.lr, args.shuffle, args.dora, args.rslora) == (2e-6, False, True, False)
        assert loss.__name__ == "ipo" and hyper["beta"] == 0.3
        assert not hasattr(args, "config")


@pytest.mark.parametrize("content", [{}, {"lr": 1e-6}, {"loss": "kto", "seed": 3}])
def test_a_file_is_the_same_as_its_flags_on_the_command_line(tmp_path, content):
    words = to_arguments(REAL | content)
    assert parse(tmp_path, REAL | content) == flags.parse_args(words)[0]


@pytest.mark.parametrize("loss", ["sigmoid", "sft", "simpo", "sigmoid:1,sft:0.5"])
@pytest.mark.parametrize("more", [{}, {"lora_rank": 2, "optimizer": "rmsprop"}])
def test_the_file_of_a_run_repeats_the_run_in_another_folder(fit, tmp_path, loss, more):
    out, metrics = fit(loss=loss, max_steps=3, **more)
    file = out / ("run.json" if more else "config.json")
    train.main([f"--config={file}", f"--output_dir={tmp_path / 'again'}"], ALONE)
    assert not differences(out, tmp_path / "again")
    again = json.loads((tmp_path / "again" / file.name).read_text())["flags"]
    saved = json.loads(file.read_text())["flags"]
    assert again | {"output_dir": 0} == saved | {"output_dir": 0}


def test_the_file_of_a_run_without_output_dir_makes_a_new_folder(fit, tmp_path, monkeypatch):
    out, metrics = fit(max_steps=2)
    monkeypatch.chdir(tmp_path)
    train.main([f"--config={out / 'config.json'}"], ALONE)
    assert not differences(metrics, read_metrics(tmp_path / "runs" / "sigmoid"))


@pytest.mark.parametrize("content, argument, name, other", [
    ({"epochs": 3}, "--max_steps=5", "max_steps", "epochs"),
    ({"max_steps": 3}, "--epochs=5", "epochs", "max_steps"),
    ({"micro_batch_size": 3}, "--tokens_per_micro_batch=5", "tokens_per_micro_batch",
     "micro_batch_size"),
])
def test_of_two_flags_that_exclude_each_other_the_command_line_wins(
        tmp_path, content, argument, name, other):
    args = parse(tmp_path, REAL | content, argument)
    assert getattr(args, name) == 5 and getattr(args, other) is None


def test_another_loss_on_the_command_line_gets_its_own_defaults_and_keeps_what_was_chosen(
        fit, tmp_path):
    out, _ = fit(max_steps=1)
    file = out / "config.json"
    simpo = flags.parse_args([f"--config={file}", "--loss=simpo"])[2]
    assert simpo == flags.parse_args(["--loss=simpo", *to_arguments(REAL)])[2]
    chosen, _ = fit(max_steps=1, beta=0.7, out="chosen")
    simpo = flags.parse_args([f"--config={chosen / 'config.json'}", "--loss=simpo"])[2]
    assert simpo["beta"] == 0.7


def test_the_flags_of_one_run_are_not_taken_over_by_another(fit, tmp_path):
    saved = {"flags": REAL | {"output_dir": "there", "resume": True, "push_to_hub": "me/mine"}}
    args = parse(tmp_path, saved)
    assert (args.output_dir, args.resume, args.push_to_hub) == (None, False, None)
    assert parse(tmp_path, REAL | {"output_dir": "here"}).output_dir == "here"


@pytest.mark.parametrize("content, message", [
    ({"lrr": 1}, "--lrr: there is no such flag; the nearest is --lr"),
    ({"flags": {"warmup": 1}}, "--warmup: there is no such flag; the nearest is --warmup_steps"),
    ({"learning_rate": 1e-6}, "--learning_rate: --lr 1e-06"),
    ({"lr": -1}, "argument --lr: must be a number > 0"),
    ({"lr": "fast"}, "argument --lr: must be a number > 0"),
    ({"lr": True}, "argument --lr: must be a number > 0"),
    ({"dora": 1}, "dora: is a switch, so it must be true or false"),
    ({"loss": "ipoo"}, "--loss"),
    ({"loss": "sft", "beta": 1}, "--beta is not read by --loss sft"),
    ({"lora_target": ["q_proj"]}, "lora_target: must be text, a number, true, false or null"),
    ({"config": "other.json"}, "config"),
    ({"model_type": "llama", "hidden_size": 3}, "there is no such flag"),
])
def test_a_wrong_file_is_one_line_that_names_the_file(tmp_path, content, message):
    with pytest.raises(UserError) as error:
        parse(tmp_path, content, *to_arguments(REAL))
    assert str(error.value).startswith(f"--config {tmp_path / 'flags.json'}: ")
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("text, message", [
    ("[1]", "must have a JSON object in braces"), ("{", "cannot be read"), (None, "cannot be read"),
])
def test_a_file_that_is_no_json_object_is_one_line(tmp_path, text, message):
    path = tmp_path / "flags.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=f"--config {path}: .*{message}"):
        flags.parse_args([f"--config={path}"])


def test_a_resumed_run_takes_no_file(tmp_path):
    with pytest.raises(UserError, match="--config .*: a resumed run has the flags that it saved"):
        parse(tmp_path, {}, "--resume", "--output_dir=x")


@pytest.mark.parametrize("one, two", [("sigmoid", "sft"), ("sft", "sigmoid"), ("ipo", "orpo")])
def test_a_run_without_a_reference_and_one_with_a_reference_take_flags_of_each_other(
        fit, one, two):
    out, _ = fit(loss=one, max_steps=1)
    args, _, hyper = flags.parse_args([f"--config={out / 'config.json'}", f"--loss={two}"])
    expected, _, expected_hyper = flags.parse_args([f"--loss={two}", *to_arguments(REAL)])
    assert args.ref == expected.ref and hyper == expected_hyper
