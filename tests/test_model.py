"""Models in and out of folders."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, tiny_model, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import model as models


def test_a_loaded_model_has_no_dropout_and_its_saved_config_keeps_it(tokenizer, tmp_path):
    """GPT-2's default is 0.1 everywhere: two passes in training mode differ, until load_model."""
    noisy = tiny_model("gpt2", tokenizer).train()
    models.save_model(noisy, tokenizer, tmp_path)
    ids = torch.arange(20)[None]
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)
    quiet = models.load_model(str(tmp_path))
    assert quiet.training and torch.equal(quiet(ids).logits, quiet(ids).logits)
    models.save_model(quiet, tokenizer, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["attn_pdrop"] == 0.1


def test_llama_attention_dropout_is_turned_off_too(tokenizer, tmp_path):
    models.save_model(tiny_model("llama", tokenizer, attention_dropout=0.5), tokenizer, tmp_path)
    quiet, ids = models.load_model(str(tmp_path)), torch.arange(20)[None]
    assert torch.equal(quiet(ids).logits, quiet(ids).logits)


def test_what_is_saved_is_what_is_loaded_bit_for_bit(folder, tokenizer, tmp_path):
    model = models.load_model(folder)
    models.save_model(model, tokenizer, tmp_path, flags={"seed": 3})
    saved = weights(tmp_path)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert json.loads((tmp_path / "config.json").read_text())["flags"] == {"seed": 3}
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_weights_that_are_not_in_the_file_are_an_error_not_random_numbers(folder, tokenizer, tmp_path):
    models.save_model(models.load_model(folder), tokenizer, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are not in the files or have another shape, such as model.layers.1.mlp.up_proj"):
        models.load_model(str(tmp_path))


@pytest.mark.parametrize("spoil, message", [
    (lambda path: (path / "model.safetensors").write_bytes(b"short"), "no usable ModelForCausalLM in this folder"),
    (lambda path: (path / "model.safetensors").unlink(), "no usable ModelForCausalLM in this folder"),
    (lambda path: (path / "config.json").write_text("{"), "no usable ModelForCausalLM in this folder"),
])
def test_a_spoiled_folder_is_one_sentence(folder, tokenizer, tmp_path, spoil, message):
    models.save_model(models.load_model(folder), tokenizer, tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        models.load_model(str(tmp_path))


def test_a_folder_that_is_not_there_and_a_name_the_hub_cannot_be_asked_for(tmp_path):
    with pytest.raises(ValueError, match="no such model folder"):
        models.load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="not found locally or on the Hub"):
        models.load_tokenizer("some-org/some-model")


def test_model_new_makes_a_folder_that_loads_and_the_same_one_for_the_same_seed(folder, tmp_path):
    for name in ("one", "two"):
        arguments = ["new", "--tokenizer", folder, "--hidden_size", "64", "--layers", "2", "--out", tmp_path / name]
        subprocess.run([sys.executable, ROOT / "model.py", *arguments], check=True, capture_output=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.config.hidden_size == 64 and model.config.num_hidden_layers == 2
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "one"))
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "two").values()))
