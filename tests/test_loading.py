"""Loading: no code of a model folder runs, and a folder that is not what it claims is refused.

Each broken folder gives one line that names the file, and never a traceback or another model.
"""
import ast
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file
from steps import SIZES
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as token_models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import limits
import loading
import model as models
from data import load_tokens
from errors import UserError
from limits import run_limited
from logps import FastLogps
from verify import find_fault


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the tiny model that a test may break."""
    return shutil.copytree(folder, tmp_path / "m")


def edit(path, **entries):
    """Change entries of a JSON file. None deletes one."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= entries
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "del"}))


def refusal(folder):
    """Load model and tokenizer as a run does -> the line of the error."""
    with pytest.raises(UserError) as error:
        tokenizer = models.load_tokenizer(str(folder))
        models.check_vocabulary(str(folder), models.load_model(str(folder)), tokenizer)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- Code -----------------------------------------------------------------------------------------

OWN_CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    pass
class Words(PreTrainedTokenizerFast):
    pass
"""
OWN = {
    "config and model": ("config.json", {"model_type": "own", "auto_map": {
        "AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}),
    "tokenizer": ("tokenizer_config.json", {
        "tokenizer_class": "Words", "auto_map": {"AutoTokenizer": ["own.Words", "own.Words"]}}),
}


@pytest.mark.parametrize("name", OWN)
def test_code_of_a_model_folder_never_runs_also_where_a_terminal_could_answer(name, copy, pairs):
    """On a terminal transformers asks whether to run the code, and a user may press y."""
    file, entries = OWN[name]
    marker = copy.parent / "code_ran"
    (copy / "own.py").write_text(OWN_CODE.format(marker=str(marker)))
    edit(copy / file, **entries)
    command = [sys.executable, str(ROOT / "train.py"), "--model", str(copy), "--dataset", pairs,
               "--max_steps", "1", "--max_length", "64", "--output_dir", str(copy.parent / "out")]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=copy.parent)
    os.close(theirs)
    os.write(ours, b"y\ny\ny\n")
    output = b""
    try:
        while chunk := os.read(ours, 4096):
            output += chunk
    except OSError:  # the terminal ends with the process
        pass
    process.wait(60)
    assert not marker.exists()
    assert b"[y/N]" not in output
    if name != "tokenizer":  # its tokenizer.json is enough
        assert process.returncode == 2 and b"needs code of its own" in output, output


def test_every_from_pretrained_of_the_product_forbids_code():
    calls = []
    for path in ROOT.glob("*.py"):
        if not path.name.startswith("test_"):
            nodes = ast.walk(ast.parse(path.read_text()))
            called = [node for node in nodes if isinstance(node, ast.Call)]
            calls += [ast.unparse(call) for call in called
                      if getattr(call.func, "attr", "") in ("from_pretrained", "from_config")]
    assert len(calls) == 2 and all("trust_remote_code=False" in call for call in calls)


def test_a_kernel_that_the_config_names_is_not_fetched(copy):
    edit(copy / "config.json", attn_implementation="somebody/kernels")
    assert "somebody/kernels" in refusal(copy) and "never run" in refusal(copy)


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-2.bin"])
@pytest.mark.parametrize("left", ["nothing", "an index of pickles", "junk"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(copy, file, left):
    marker = str(copy.parent / "code_ran")
    torch.save({"weight": Bomb(marker)}, copy / file)
    (copy / "model.safetensors").unlink()
    if left == "junk":
        (copy / file).write_bytes(b"junk")
    if left == "an index of pickles":
        index = {"metadata": {}, "weight_map": {"weight": file}}
        (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    line = refusal(copy)
    assert not os.path.exists(marker)
    if left == "an index of pickles":
        assert "model.safetensors.index.json" in line and file in line
    else:
        assert file in line and "save_pretrained" in line


def test_a_hub_model_without_safetensors_may_be_offline_or_pickled(copy, monkeypatch):
    """Nobody has seen a pickle, so the message names none."""
    config = transformers.AutoConfig.from_pretrained(copy)
    monkeypatch.setattr(loading, "cached_file", lambda *names, **options: None)
    with pytest.raises(UserError) as error:
        loading.weight_files("org/model", config)
    assert "org/model: has no model.safetensors or" in str(error.value)
    assert "in the cache or on the Hub; if the network is off, download it" in str(error.value)
    assert "pytorch_model.bin" not in str(error.value)


@pytest.mark.parametrize("content, message", [
    ({}, "has no weight_map with the file of each tensor; copy it from the model again"),
    ({"weight_map": {"a": "../x.safetensors"}},
     "its files name ../x.safetensors; a weight file must be in the model's folder"),
])
def test_an_index_that_names_no_file_of_the_folder_is_refused(copy, content, message):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps(content))
    assert message in refusal(copy)


class RepositoryNotFoundError(Exception):
    """A stand-in: the class of huggingface_hub needs a response of a server."""


class GatedRepoError(RepositoryNotFoundError):
    pass


@pytest.mark.parametrize("cause, beginning", [
    (RepositoryNotFoundError(), "org/model: not found locally or on the Hub (the reason is here)"),
    (GatedRepoError(), "org/model: cannot be loaded from the Hub or its cache: the reason is here"),
    (None, "org/model: cannot be loaded from the Hub or its cache: the reason is here"),
])
def test_only_a_name_that_does_not_exist_is_said_to_be_not_found(monkeypatch, cause, beginning):
    def from_pretrained(name, **options):
        raise OSError("the reason is here") from cause

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    with pytest.raises(UserError) as error:
        loading.load_config("org/model")
    assert str(error.value) == beginning


def test_a_file_in_place_of_a_model_folder_is_called_a_file(copy):
    assert "config.json: is a file; pass the folder" in refusal(copy / "config.json")


def test_a_damaged_safetensors_file_never_falls_back_to_a_pickle(copy):
    marker = str(copy.parent / "code_ran")
    torch.save({"weight": Bomb(marker)}, copy / "pytorch_model.bin")
    (copy / "model.safetensors").write_bytes(b"junk")
    assert "model.safetensors" in refusal(copy) and not os.path.exists(marker)


# --- Files that a library chokes on ---------------------------------------------------------------

NOT_OBJECTS = {
    "null": b"null", "list": b"[1]", "number": b"5", "text": b'"x"', "empty": b"",
    "truncated": b'{"model_type": "llama", "hid', "utf-16": "{}".encode("utf-16"),
    "binary": bytes(range(200, 256)), "deep": b'{"a": ' * 100_000,
}
FILES = ["config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json",
         "special_tokens_map.json", "model.safetensors.index.json"]


@pytest.mark.parametrize("content", [*NOT_OBJECTS, "folder"])
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_no_json_object_is_named(copy, file, content):
    (copy / file).unlink(missing_ok=True)
    if content == "folder":
        (copy / file).mkdir()
    else:
        (copy / file).write_bytes(NOT_OBJECTS[content])
    if file.endswith("index.json"):
        (copy / "model.safetensors").unlink()
    line = refusal(copy)
    assert file in line or content == "folder" and "has no" in line, line


@pytest.mark.parametrize("entries", [
    {"hidden_size": "abc"}, {"hidden_size": -32}, {"hidden_size": 0}, {"hidden_size": 32.5},
    {"hidden_size": 10**12}, {"hidden_size": None}, {"hidden_size": 31},
    {"num_attention_heads": 0}, {"num_attention_heads": 3}, {"num_attention_heads": -2},
    {"num_attention_heads": "2"}, {"num_key_value_heads": 3}, {"num_key_value_heads": 0},
    {"vocab_size": 1000}, {"vocab_size": 10**15}, {"vocab_size": 0}, {"vocab_size": [320]},
    {"num_hidden_layers": 10**9}, {"num_hidden_layers": 5000}, {"num_hidden_layers": -1},
    {"num_hidden_layers": 3}, {"num_hidden_layers": 1}, {"intermediate_size": 10**10},
    {"hidden_act": "no_such"}, {"hidden_act": 5}, {"rope_parameters": {"rope_type": "alien"}},
    {"rope_parameters": "fast"}, {"pad_token_id": 99999}, {"pad_token_id": "<pad>"},
    {"model_type": "alien"}, {"model_type": "del", "architectures": "del"}, {"model_type": 5},
    {"model_type": None}, {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": {"quant_method": "alien"}}, {"quantization_config": 5},
    {"quantization_config": "x"}, {"dtype": "alien"}, {"attention_bias": "yes"},
    {"rms_norm_eps": "small"}, {"auto_map": 5, "model_type": "own"},
    {"attn_implementation": "alien"}, {"model_type": "bert"}, {"model_type": "t5"},
    {"model_type": "clip"}, {"max_position_embeddings": "x"},
    {"transformers_weights": "../other.safetensors"}, {"transformers_weights": "w.bin"},
], ids=str)
def test_a_config_that_describes_no_model_or_another_model_is_refused(copy, entries):
    edit(copy / "config.json", **entries)
    started = time.monotonic()
    line = refusal(copy)
    assert time.monotonic() - started < 20
    assert "config" in line or "weights" in line or ".safetensors" in line, line
    assert "tokenizer" not in line, line


@pytest.mark.parametrize("change", [
    "truncated", "header", "empty", "huge header", "text", "another shape", "missing", "folder"])
def test_weights_that_are_damaged_are_named(copy, change):
    path = copy / "model.safetensors"
    content = path.read_bytes()
    path.unlink()
    if change == "folder":
        path.mkdir()
    elif change == "another shape":
        (copy / "x").write_bytes(content)
        tensors = load_file(copy / "x")
        tensors["model.norm.weight"] = torch.ones(7)
        save_file(tensors, path, {"format": "pt"})
    elif change != "missing":
        path.write_bytes({
            "truncated": content[:-100], "header": content[:50], "empty": b"", "text": b"hello",
            "huge header": b"\xff" * 7 + b"\x7f" + content[8:],
        }[change])
    line = refusal(copy)
    assert "model.safetensors" in line or "model.norm.weight" in line


@pytest.mark.parametrize("shard", [
    "gone.safetensors", "../outside.safetensors", "/etc/passwd", "weights.bin", 5, None,
    "sub/model.safetensors"])
def test_an_index_that_names_a_missing_or_an_outside_file_is_refused(copy, shard):
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors, copy.parent / "outside.safetensors", {"format": "pt"})
    (copy / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {key: shard for key in tensors}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    line = refusal(copy)
    assert str(shard) in line and str(copy) in line


def test_a_model_in_several_files_still_loads(folder, tokenizer, tmp_path):
    model = models.load_model(folder)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = models.load_model(str(tmp_path))
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def without_vocabulary(folder):
    (folder / "tokenizer.json").unlink()


def edit_tokenizer(folder, **entries):
    """Change entries of the model in tokenizer.json."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= entries
    content["model"] = {key: value for key, value in content["model"].items() if value != "del"}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("break_it", [
    without_vocabulary,
    lambda folder: edit_tokenizer(folder, merges="del"),
    lambda folder: edit_tokenizer(folder, vocab="del"),
    lambda folder: edit_tokenizer(folder, vocab=[]),
    lambda folder: edit_tokenizer(folder, merges=[["no", "such"]]),
    lambda folder: edit_tokenizer(folder, type="Alien"),
    lambda folder: (folder / "tokenizer.json").write_text('{"another": "file"}'),
    lambda folder: edit(folder / "tokenizer_config.json", chat_template=5),
    lambda folder: edit(folder / "tokenizer_config.json", eos_token=5),
    lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class=5),
    lambda folder: edit(folder / "tokenizer_config.json", auto_map=5),
])
def test_a_broken_tokenizer_is_refused_in_one_line(copy, break_it):
    break_it(copy)
    assert "tokenizer" in refusal(copy)


# --- A model that is not what it claims -----------------------------------------------------------

BIDIRECTIONAL = ["Bert", "Roberta", "RoFormer", "Camembert", "MegatronBert"]


@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_a_bidirectional_model_is_found_by_its_behavior(name):
    config = getattr(transformers, f"{name}Config")(**SIZES)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert "later tokens" in find_fault(FastLogps(model))
    config.is_decoder = True
    model = AutoModelForCausalLM.from_config(config).eval()
    # Some architectures stay bidirectional in transformers 5.17.
    ids = torch.arange(1, 9)[None]
    other = torch.cat([ids[:, :4], ids[:, 4:] + 9], 1)
    is_causal = torch.allclose(model(ids).logits[:, :4], model(other).logits[:, :4], atol=1e-5)
    assert (find_fault(FastLogps(model)) is None) == is_causal


def test_a_run_on_a_bidirectional_policy_or_reference_names_its_flag(fit, tokenizer, tmp_path):
    sizes = SIZES | {"vocab_size": len(tokenizer)}
    model = AutoModelForCausalLM.from_config(transformers.BertConfig(**sizes))
    models.save_model(model, tokenizer, tmp_path / "bert")
    with pytest.raises(UserError, match="--model .*bert: its logits at a token depend on later"):
        fit(model=tmp_path / "bert", max_steps=1)
    with pytest.raises(UserError, match="--ref_model .*bert: its logits at a token depend on lat"):
        fit(ref_model=tmp_path / "bert", max_steps=1)


def change_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("key", [
    "model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_norm.weight", "score.weight", "model.embed_positions.weight"])
def test_a_tensor_that_the_model_has_no_place_for_is_named(copy, key):
    change_weights(copy, lambda tensors: tensors.update({key: torch.ones(32)}))
    assert key in refusal(copy) and "no place for" in refusal(copy)


@pytest.mark.parametrize("key", [
    "model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq",
    "transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"])
def test_a_buffer_that_earlier_versions_saved_is_harmless(copy, key):
    expected = models.load_model(str(copy)).state_dict()
    change_weights(copy, lambda tensors: tensors.update({key: torch.ones(16)}))
    found = models.load_model(str(copy)).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight",
                                 "model.embed_tokens.weight", "model.norm.weight"])
def test_a_weight_that_the_files_lack_is_named(copy, key):
    change_weights(copy, lambda tensors: tensors.pop(key))
    assert key in refusal(copy)


def test_a_model_with_a_tied_head_needs_no_head_in_its_files(tokenizer, tmp_path):
    config = transformers.LlamaConfig(**SIZES | {"vocab_size": 400}, tie_word_embeddings=True)
    models.save_model(AutoModelForCausalLM.from_config(config), tokenizer, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = models.load_model(str(tmp_path))
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- Tokens ---------------------------------------------------------------------------------------

def add_to_vocabulary(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["new"] = 4000
    (folder / "tokenizer.json").write_text(json.dumps(content))


def add_token(folder, special):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"], special_tokens=special)
    tokenizer.save_pretrained(folder)


def add_bos_of_post_processor(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    pieces = [{"SpecialToken": {"id": "<eos>", "type_id": 0}}]
    pieces += [{"Sequence": {"id": part, "type_id": 0}} for part in "AB"]
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": pieces[:2], "pair": pieces,
        "special_tokens": {"<eos>": {"id": "<eos>", "ids": [777], "tokens": ["<eos>"]}}}
    (folder / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("change, number", [
    (add_to_vocabulary, 4000), (lambda folder: add_token(folder, True), 319),
    (lambda folder: add_token(folder, False), 319), (add_bos_of_post_processor, 777)],
    ids=["vocabulary", "special token", "added token", "post-processor"])
def test_an_id_beyond_the_embedding_is_named_before_training(copy, change, number):
    change(copy)
    line = refusal(copy)
    assert f"id {number} for" in line and "do not belong together" in line


def no_unknown_token(kind):
    """Tokenizers that leave out what they have no token for, or fail on it."""
    backend = {
        "bpe": lambda: Tokenizer(token_models.BPE(
            {"<eos>": 0, "<pad>": 1, "t": 2, "h": 3, "e": 4, " ": 5}, [])),
        "words": lambda: Tokenizer(token_models.WordLevel(
            {"<eos>": 0, "<pad>": 1, "the": 2, "t": 3, "h": 4})),
        "unigram": lambda: Tokenizer(token_models.Unigram(
            [("<eos>", 0.0), ("<pad>", 0.0), ("t", -1.0), ("h", -1.0), ("e", -1.0), (" ", -1.0)])),
    }[kind]()
    if kind == "words":
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


@pytest.mark.parametrize("kind", ["bpe", "words", "unigram"])
def test_a_row_that_a_tokenizer_without_unknown_token_cannot_write_is_dropped_and_named(
        kind, tmp_path):
    good = {"prompt": "the", "chosen": " the", "rejected": " the the"}
    rows = [good, good | {"chosen": " zebra"}, good | {"prompt": "x", "chosen": " the the the"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, account = load_tokens(str(tmp_path / "rows.jsonl"), no_unknown_token(kind))
    assert len(kept) == 1 and len(kept[0]["prompt_ids"]) >= 1
    (reason, names), = account["dropped"].items()
    assert "no token for some of its text" in reason
    assert names["count"] == 2 and "row 2" in str(names) and "row 3" in str(names)


def test_a_byte_level_tokenizer_that_lacks_one_byte_is_found(tokenizer, copy):
    assert not loading.leaves_out(tokenizer)
    content = json.loads((copy / "tokenizer.json").read_text())
    letter = tokenizer.convert_ids_to_tokens(tokenizer("é")["input_ids"])[-1]
    vocabulary = content["model"]["vocab"]
    vocabulary["unused"] = vocabulary.pop(letter)
    content["model"]["merges"] = []
    (copy / "tokenizer.json").write_text(json.dumps(content))
    broken = models.load_tokenizer(str(copy))
    assert loading.leaves_out(broken)
    assert loading.loses(broken, "caf\u00e9") and not loading.loses(broken, "cafe")


# --- Programs with limits -------------------------------------------------------------------------

def forever(item):
    while item == "bad":
        pass
    return item.upper()


def fill_memory(item):
    return "x" * 10**10 if item == "bad" else item.upper()


def compute_a_power(item):
    return str(10**10**8)[:3] if item == "bad" else item.upper()  # one call, in C


@pytest.mark.parametrize("function, words", [
    (forever, "2 seconds"), (fill_memory, "1 GB"), (compute_a_power, "2 seconds")])
def test_what_takes_too_long_or_too_much_is_stopped_and_named(function, words, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 2)
    assert run_limited(function, ["a", "b"], ["first", "second"]) == ["A", "B"]
    started = time.monotonic()
    with pytest.raises(UserError, match=f"^second used more than {words}") as error:
        run_limited(function, ["a", "bad", "c"], ["first", "second", "third"], "; advice")
    assert str(error.value).endswith(" and was stopped; advice")
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_process_that_a_signal_ends_is_not_said_to_take_too_long(number):
    def end(item):
        os.kill(os.getpid(), number)

    message = f"^first: the process that ran it ended by signal {number:d}"
    with pytest.raises(UserError, match=message):
        run_limited(end, ["a"], ["first"])


def test_a_child_process_that_exits_is_named_with_its_status():
    with pytest.raises(UserError, match="^first: the process that ran it ended with status 3$"):
        run_limited(os._exit, [3], ["first"])


def test_an_error_of_the_user_passes_and_a_bug_shows_where_it_is():
    def user_error(item):
        raise UserError(f"{item}: wrong")

    def bug(item):
        return [][item]

    with pytest.raises(UserError, match="^a: wrong$"):
        run_limited(user_error, ["a"], ["first"])
    with pytest.raises(RuntimeError, match="in bug"):
        run_limited(bug, [1], ["first"])


# --- The commands ---------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, words", [
    (["--hidden_size=0"], "--hidden_size: must be a whole number in [2, 1048576]"),
    (["--hidden_size=-64"], "--hidden_size: must be a whole number in [2, 1048576]"),
    (["--hidden_size=x"], "--hidden_size: must be a whole number in [2, 1048576]"),
    (["--hidden_size=1e3"], "--hidden_size: must be a whole number in [2, 1048576]"),
    (["--hidden_size=130"], "--hidden_size 130: 2 heads must divide it"),
    (["--hidden_size=33"], "--hidden_size 33: 1 heads must divide it"),
    (["--layers=0"], "--layers: must be a whole number in [1, 10000]"),
    (["--layers=-3"], "--layers: must be a whole number in [1, 10000]"),
    (["--layers=" + "9" * 5000], "--layers: must be a whole number in [1, 10000]"),
    (["--seed=-1"], "--seed: must be a whole number >= 0 and below 2**63"),
    (["--seed=" + "9" * 30], "--seed: must be a whole number >= 0 and below 2**63"),
    (["--out="], "--out: its value is empty"),
    (["--tokenizer="], "--tokenizer: its value is empty"),
    (["--tokenizer=/nowhere"], "/nowhere: no such model folder"),
    (["--out=M/inside"], "is inside M"),
    (["--out=M"], "exists already"),
    (["--out=M/config.json/x"], "is inside M"),
    (["--out=/etc/passwd/x"], "--out /etc/passwd/x: cannot be made"),
    (["--hidden_size=1048576", "--layers=50"], "GB free"),
    (["--alien=1"], "unrecognized arguments: --alien=1"),
])
def test_model_py_new_refuses_what_gives_no_model(copy, arguments, words, monkeypatch):
    monkeypatch.chdir(copy.parent)
    shutil.move(copy, "M")
    with pytest.raises(UserError) as error:
        models.main(["new", "--tokenizer=M", "--out=new", *arguments])
    assert words in str(error.value)
    assert not os.path.exists("new")
