"""A damaged JSON file gives the right result or one line that names it: never a traceback, and
never another result.

Each JSON that the program reads is damaged key by key: a key is dropped, its value is replaced by
one of another type, the text is cut. The seed is fixed.
"""
import json
import random
import shutil

import datasets
import pytest
import torch
from conftest import ALONE, TINY_RUN, make_rows, read_metrics, to_arguments, unfinished

import checkpoint
import data
import lora
import model as models
import reference
import train
from errors import UserError
from log import Log

VALUES = [None, True, -1, 10**400, 1.5, float("nan"), "", "x", [], [1], {}, {"x": 1}]


# --- Damage ---------------------------------------------------------------------------------------

def key_paths(content, path=()):
    """The paths of all keys of nested JSON; of a list, only of its first element."""
    if isinstance(content, dict):
        keys = list(content)
    elif isinstance(content, list):
        keys = [0] if content else []
    else:
        return []
    paths = []
    for key in keys:
        paths += [(*path, key), *key_paths(content[key], (*path, key))]
    return paths


def value_at(content, path):
    for key in path:
        content = content[key]
    return content


def changed(text, path, change):
    """The JSON text after change(parent, key) at a path."""
    content = json.loads(text)
    parent = content
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return json.dumps(content)


def kind(value):
    """A number is not told from another one, nor a text: they may be what the user means."""
    return float if type(value) is int else type(value)


def damages(text, count, seed=0, retype=False):
    """[(name, text)] of `count` damages of a JSON text, and some that are not of a key.

    retype      values are replaced by values of another type only
    """
    content = json.loads(text)
    found = []
    for path in key_paths(content):
        name = ".".join(map(str, path))
        found.append((f"without {name}", changed(text, path, lambda at, key: at.pop(key))))
        for value in VALUES:
            if retype and kind(value_at(content, path)) is kind(value):
                continue
            replace = lambda at, key, value=value: at.__setitem__(key, value)  # noqa: E731
            found.append((f"{name} = {value!r:.20}", changed(text, path, replace)))
    chosen = random.Random(seed).sample(found, min(count, len(found)))
    for share in (0.0, 0.3, 0.9, 0.999):
        chosen.append((f"cut at {share}", text[:int(share * len(text))]))
    for junk in ("null", "[]", "3", '"x"', "{}", "[" * 5000, "\0" * 20, "\udcff{}"):
        chosen.append((f"{junk[:5]!r}", junk))
    return chosen


def problems(path, read, is_right, count, named=None, retype=False):
    """Damage a JSON file in many ways -> what was neither a right result nor a good line.

    A good line names the file, or its folder, or `named`.
    """
    original = path.read_bytes()
    found = []
    for name, text in damages(original.decode(), count, retype=retype):
        path.write_bytes(text.encode(errors="surrogateescape"))
        try:
            if not is_right(read()):
                found.append(f"{name}: another result")
        except UserError as error:
            if not any(str(name) in str(error) for name in (path.name, path.parent, named)):
                found.append(f"{name}: no file in {error}")
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}: {str(error)[:100]}")
        finally:
            path.write_bytes(original)
    return found


def test_a_damage_is_made_of_each_key_of_nested_json():
    text = json.dumps({"a": {"b": [{"c": 1}]}})
    assert key_paths(json.loads(text)) == [
        ("a",), ("a", "b"), ("a", "b", 0), ("a", "b", 0, "c")]
    every = dict(damages(text, 10**6))
    assert every["without a.b.0.c"] == '{"a": {"b": [{}]}}'
    assert every["a.b = [1]"] == '{"a": {"b": [1]}}'
    assert len(every) == 4 * (1 + len(VALUES)) + 12


# --- The files of a run ---------------------------------------------------------------------------

def killed_run(home, folder, pairs, **flags):
    flags = TINY_RUN | {"model": folder, "dataset": pairs, "max_steps": 6, "save_every": 2} | flags
    train.main(to_arguments(flags | {"output_dir": home}), ALONE)
    return unfinished(home)


@pytest.fixture(scope="module")
def killed(folder, pairs, tmp_path_factory):
    return killed_run(tmp_path_factory.mktemp("runs") / "killed", folder, pairs, loss="bco_pair")


@pytest.fixture(scope="module")
def killed_adapter(folder, pairs, tmp_path_factory):
    home = tmp_path_factory.mktemp("runs") / "killed"
    return killed_run(home, folder, pairs, lora_rank=2)


def resumed_flags(out):
    args, loss, hyper = train.parse_args(["--resume", f"--output_dir={out}"])
    return vars(args), loss.__name__, hyper


@pytest.mark.parametrize("run, name", [("killed", "config.json"), ("killed_adapter", "run.json")])
def test_the_flags_of_a_run(run, name, request):
    out = request.getfixturevalue(run)
    expected = resumed_flags(out)
    assert problems(out / name, lambda: resumed_flags(out), expected.__eq__, 300) == []


@pytest.mark.parametrize("with_checkpoints", [True, False])
def test_flags_without_their_digest(killed, tmp_path, with_checkpoints):
    """Where nothing but the file itself can show it, a value that was edited is what it says, as
    on a command line: these are told apart by their type only."""
    out = shutil.copytree(killed, tmp_path / "copy")
    content = {"flags": json.loads((out / "config.json").read_text())["flags"]}
    (out / "config.json").write_text(json.dumps(content))
    expected = resumed_flags(out)

    def is_right(found):
        if with_checkpoints:
            changed = {name for name in expected[0] if expected[0][name] != found[0][name]}
            return changed <= checkpoint.FREE_ON_RESUME and found[1:] == expected[1:]
        return all(type(found[0][name]) in (type(value), type(None), str, float, int, bool)
                   for name, value in expected[0].items())

    if not with_checkpoints:
        for path in out.glob("checkpoint-*"):
            shutil.rmtree(path)
    found = problems(out / "config.json", lambda: resumed_flags(out), is_right, 300)
    assert [line for line in found if "no file in" not in line] == []


def test_the_state_of_a_checkpoint(killed, tmp_path):
    out = shutil.copytree(killed, tmp_path / "copy")
    path = out / "checkpoint-4" / "state.json"
    states = {name: json.loads((out / name / "state.json").read_text())
              for name in ("checkpoint-2", "checkpoint-4")}
    flags = checkpoint.saved_flags(out)

    def read():
        assert checkpoint.saved_flags(out) == flags
        newest, state = checkpoint.newest_checkpoint(out, ALONE)
        for damaged in out.glob("damaged-*"):
            damaged.rename(out / "checkpoint-4")
        return newest, state

    def is_right(found):
        newest, state = found
        return state | {"digest": states[newest.name]["digest"]} == states[newest.name]

    assert problems(path, read, is_right, 300) == []


def test_the_metrics_of_a_run(killed, tmp_path):
    out = shutil.copytree(killed, tmp_path / "copy")
    newest, path = out / "checkpoint-4", out / "metrics.jsonl"
    flags, rows = checkpoint.saved_flags(out), read_metrics(newest)
    lines = path.read_text().splitlines()
    for number in (0, 3, len(lines) - 1):
        for _, text in damages(lines[number], 30, seed=number):
            damaged = [*lines[:number], text, *lines[number + 1:]]
            path.write_bytes("\n".join(damaged).encode(errors="surrogateescape"))
            Log(out, flags, newest, 4, 6, ALONE).bar.close()
            assert read_metrics(out) == rows


def test_the_header_of_a_cache_of_the_reference(tmp_path, monkeypatch):
    tables = {"train": torch.randn(5, 2), "eval": torch.zeros(0, 2)}
    path = tmp_path / "key.safetensors"
    reference.save_file(tables, path, {"digest": reference.tables_digest("key", tables)})
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, values = content[8:8 + size], content[8 + size:]
    for name, text in damages(header.decode(), 200):
        encoded = text.encode(errors="surrogateescape")
        for length in (len(encoded), size):
            path.write_bytes(length.to_bytes(8, "little") + encoded + values)
            found = reference.read_cache(path, "key")
            assert found is None or all(
                torch.equal(found[split], tables[split]) for split in tables), name


# --- Files that a user gives us -------------------------------------------------------------------

def adapter_result(folder, path):
    model = models.load_model(str(folder))
    lora.load_adapter(model, path)
    settings = {name: layer.settings["policy"] for name, layer in lora.lora_layers(model).items()}
    tensors = lora.adapter_tensors(model, "policy")
    return settings, {name: tensor.tolist() for name, tensor in tensors.items()}


def test_the_config_of_an_adapter(fit, folder):
    out, _ = fit(lora_rank=2, max_steps=1)
    expected = adapter_result(folder, out)
    found = problems(out / "adapter_config.json", lambda: adapter_result(folder, out),
                     expected.__eq__, 60, retype=True)
    assert found == []


IDS = torch.arange(24).view(2, 12)


@torch.no_grad()
def logits(folder):
    return models.load_model(str(folder))(IDS).logits


def test_the_config_of_a_model(folder, tmp_path):
    """A key that is dropped takes the default of transformers, which this model has already."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    expected = logits(copy)
    found = problems(copy / "config.json", lambda: logits(copy),
                     lambda other: torch.equal(expected, other), 120, retype=True)
    # true is the number 1 to transformers, which is another model and no damage.
    assert [line for line in found if "rope_theta = True" not in line] == []


def test_the_index_of_a_sharded_model(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "model.safetensors").unlink()
    models.load_model(folder).save_pretrained(copy, max_shard_size="40KB")
    expected = logits(copy)
    found = problems(copy / "model.safetensors.index.json", lambda: logits(copy),
                     lambda other: torch.equal(expected, other), 120, retype=True)
    assert found == []


@pytest.mark.parametrize("name", ["dataset_dict.json", "train/dataset_info.json",
                                  "train/state.json"])
def test_the_json_of_a_saved_data_set(tokenizer, tmp_path, name):
    rows = datasets.Dataset.from_list(make_rows(6))
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "rows")

    def read():
        loaded, _ = data.load_tokens(f"{tmp_path}/rows", tokenizer, limits=data.Limits(64))
        return data.digest(loaded)

    expected = read()
    path = tmp_path / "rows" / name
    assert problems(path, read, expected.__eq__, 40, tmp_path / "rows") == []
