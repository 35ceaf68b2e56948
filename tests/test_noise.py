"""What a model's code adds to a training forward: noise, and parts without text.

`load_model` turns noise off, `find_fault` names what is left, and what text does not reach is
frozen and gets no adapter.
"""
import json

import pytest
import torch
import transformers
from conftest import TINY_RUN, differences, read_metrics, resume, run_training, unfinished
from safetensors.torch import load_file
from steps import SIZES
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

import model as models
import reach
import train
from errors import UserError
from logps import FastLogps
from verify import find_fault

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Architecture: options of its config that add noise in training mode.
NOISY = {
    "Mixtral": EXPERTS | {"router_jitter_noise": 0.3},
    "Phimoe": EXPERTS | {"router_jitter_noise": 0.01, "input_jitter_noise": 0.1},
    "MiniMax": EXPERTS | {"router_jitter_noise": 0.3},
    "OPT": {"layerdrop": 0.5, "word_embed_proj_dim": 32, "ffn_dim": 64},
    "Dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2,
                       "moe_jitter_eps": 0.3, "hidden_size": 32},
    },
    "BioGpt": {"layerdrop": 0.5},
}


def noisy_model(name, words):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        **SIZES | {"vocab_size": words, "eos_token_id": 0, "bos_token_id": None} | NOISY[name])
    return AutoModelForCausalLM.from_config(config)


def same_each_time(model):
    """Whether training forwards from several seeds equal each other in every bit."""
    logits = []
    for seed in range(5):
        torch.manual_seed(seed)
        logits.append(model(torch.arange(1, 13)[None], use_cache=False).logits)
    return all(torch.equal(logits[0], other) for other in logits)


@pytest.mark.parametrize("name", NOISY)
def test_a_loaded_model_in_training_mode_equals_the_served_model_whatever_noise_its_config_asks_for(
        name, tokenizer, tmp_path):
    noisy = noisy_model(name, len(tokenizer))
    models.save_model(noisy, tokenizer, tmp_path)
    assert not same_each_time(noisy.train())
    loaded = models.load_model(str(tmp_path))
    assert loaded.training and same_each_time(loaded)
    ids = torch.arange(1, 13)[None]
    assert torch.equal(loaded(ids).logits, noisy.eval()(ids).logits)


def test_dropout_that_a_forward_reads_from_the_config_is_off_and_stays_in_the_saved_config(
        tokenizer, tmp_path):
    noisy = noisy_model("OPT", len(tokenizer))
    models.save_model(noisy, tokenizer, tmp_path / "noisy")
    loaded = models.load_model(str(tmp_path / "noisy"))
    assert loaded.config.layerdrop == 0
    models.save_model(loaded, tokenizer, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["layerdrop"] == 0.5
    assert loaded.config.layerdrop == 0


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *inputs: calls.append(1))
    return calls


def test_gradient_checkpointing_works_after_the_noise_is_off(tokenizer, tmp_path):
    models.save_model(noisy_model("Mixtral", len(tokenizer)), tokenizer, tmp_path)
    gradients = []
    for checkpointed in (False, True):
        model = models.load_model(str(tmp_path))
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        calls = count_calls(model.model.layers[1].self_attn)
        model(torch.arange(1, 13)[None], use_cache=False).logits.square().sum().backward()
        assert len(calls) == 1 + checkpointed  # recomputed in backward
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*gradients)


class Noise(torch.nn.Module):
    """Noise of a kind that nobody knows by name."""

    def forward(self, hidden):
        return hidden + 0.01 * torch.randn_like(hidden)


class RareNoise(torch.nn.Module):
    def forward(self, hidden):
        return hidden * (torch.rand([]) > 0.5)


@pytest.mark.parametrize("kind", [Noise, RareNoise])
def test_noise_that_is_left_is_named_by_its_module(kind, folder):
    model = models.load_model(folder)
    assert find_fault(FastLogps(model)) is None
    model.model.layers[1].mlp.down_proj = torch.nn.Sequential(
        model.model.layers[1].mlp.down_proj, kind())
    assert f"layers.1.mlp.down_proj.1 ({kind.__name__})" in find_fault(FastLogps(model))


@pytest.mark.parametrize("loss", ["simpo", "sigmoid"])
def test_a_run_on_a_model_with_unknown_noise_is_refused(fit, loss, monkeypatch):
    def load_noisy_model(*arguments, **options):
        model = load_model(*arguments, **options)
        model.lm_head = torch.nn.Sequential(model.lm_head, Noise())
        return model

    load_model = train.load_weights
    monkeypatch.setattr(train, "load_weights", load_noisy_model)
    with pytest.raises(UserError, match=r"lm_head.1 \(Noise\)"):
        fit(loss=loss, attention="padded")


def test_the_size_of_micro_batches_changes_nothing_on_a_model_with_jitter(
        fit, tokenizer, tmp_path):
    models.save_model(noisy_model("Mixtral", len(tokenizer)), tokenizer, tmp_path / "m")
    flags = {"loss": "simpo", "model": tmp_path / "m", "max_steps": 2, "attention": "padded"}
    _, one = fit(**flags, micro_batch_size=2, out="one")
    _, two = fit(**flags, micro_batch_size=8, out="two")
    assert not differences(one, two, 1e-4)


# --- What text does not reach ---------------------------------------------------------------------

@pytest.fixture(scope="session")
def vision(tokenizer, tmp_path_factory):
    """A folder with a language model that has a vision tower."""
    torch.manual_seed(0)
    ids = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 1}
    text = SIZES | ids | {"vocab_size": len(tokenizer) + 3, "sliding_window": 64}
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text, vision_config=tower, mm_tokens_per_image=1,
        image_token_index=len(tokenizer), boi_token_index=len(tokenizer) + 1,
        eoi_token_index=len(tokenizer) + 2, **ids)
    path = tmp_path_factory.mktemp("vision")
    models.save_model(Gemma3ForConditionalGeneration(config), tokenizer, path)
    return str(path)


def is_vision(name):
    return "vision" in name or "projector" in name


def test_exactly_the_parts_that_see_images_are_found(vision):
    model = models.load_model(vision)
    parts = reach.unreached_by_text(model)
    for name, _ in model.named_parameters():
        assert reach.is_below(name, parts) == is_vision(name), name
    assert len(parts) == 2  # the tower and the projector, each as a whole


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_text_model_is_reached_whole(folder, four_bits):
    assert reach.unreached_by_text(models.load_model(folder, four_bits=four_bits)) == []


def test_experts_that_a_short_text_does_not_choose_are_not_frozen():
    class Block(torch.nn.Module):
        """Routes every token to the first expert; has a gate for images too."""

        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
            self.image_gate = torch.nn.Linear(4, 4)

        def forward(self, hidden):
            return self.experts[0](hidden)

    block = Block()
    reached = reach.graph_leaves(block(torch.ones(1, 4)).grad_fn)
    assert reach.unreached_below(block, "", reached) == ["image_gate"]


@pytest.mark.parametrize("flags", [
    {}, {"lora_rank": 2}, {"lora_rank": 2, "lora_target": "q_proj,fc1"},
    {"lora_rank": 2, "quantize": "nf4"}, {"ref": "cache"}, {"gradient_checkpointing": True},
])
def test_a_vision_tower_is_frozen_gets_no_adapter_and_a_line_says_so(fit, vision, flags, capsys):
    out, _ = fit(model=vision, max_steps=2, **flags)
    assert "frozen, because text does not reach them:" in capsys.readouterr().out
    if "lora_rank" in flags:
        keys = load_file(out / "adapter_model.safetensors")
        assert keys and not any(is_vision(key) for key in keys)
        return
    before = Gemma3ForConditionalGeneration.from_pretrained(vision).state_dict()
    after = Gemma3ForConditionalGeneration.from_pretrained(out).state_dict()
    for name, value in before.items():
        if is_vision(name):
            assert torch.equal(value, after[name]), name
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_an_adapter_only_where_text_does_not_go_is_refused(fit, vision):
    with pytest.raises(UserError, match="--lora_target fc1: text does not reach.*vision_tower"):
        fit(model=vision, lora_rank=2, lora_target="fc1")


@pytest.mark.parametrize("flags", [
    {}, pytest.param({"lora_rank": 2}, marks=pytest.mark.slow),
    pytest.param({"parallel": "fsdp"}, marks=pytest.mark.slow),
    {"parallel": "fsdp", "lora_rank": 2},
    pytest.param({"parallel": "fsdp", "dtype": "bfloat16"}, marks=pytest.mark.slow),
])
def test_two_processes_train_a_model_with_a_vision_tower_as_one_does(
        fit, vision, pairs, tmp_path, flags):
    flags = {"model": vision, "dataset": pairs, "max_steps": 4, "log_every": 1} | flags
    done = run_training(TINY_RUN | flags | {"output_dir": tmp_path / "two"}, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    _, one = fit(**flags | {"parallel": "ddp"}, out="one")
    tolerance = 5e-2 if "dtype" in flags else 1e-3
    assert not differences(one, read_metrics(tmp_path / "two"), tolerance)


def test_a_stopped_run_on_a_model_with_a_vision_tower_resumes_bit_for_bit(fit, vision):
    whole, _ = fit(model=vision, max_steps=4, save_every=2, out="whole")
    half, _ = fit(model=vision, max_steps=4, save_every=2, out="half")
    resume(unfinished(half))
    assert not differences(whole, half)


def test_a_part_is_frozen_whole_and_counted(folder):
    model = models.load_model(folder)
    reach.freeze(model, ["model.layers.0.mlp"])
    assert not model.model.layers[0].mlp.up_proj.weight.requires_grad
    assert model.model.layers[1].mlp.up_proj.weight.requires_grad
    assert f"{3 * 32 * 64:,} parameters of model.layers.0.mlp" in reach.frozen_line(model)
