"""LoRA, rsLoRA and DoRA adapters, 4-bit weights, and every kind of reference."""
import argparse
import contextlib
import gc
import json
import math
import re
import shutil

import forked
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    TINY_RUN,
    differences,
    read_metrics,
    resume,
    run_training,
    tiny_model,
    unfinished,
    weights,
)
from safetensors.torch import load_file, save_file
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, Qwen2Config
from transformers.pytorch_utils import Conv1D

import data
import limits
import model as models
import reach
import reference as references
import train
from checkpoint import saved_flags
from dpo import SequenceLogps, concatenated_forward
from errors import UserError
from logps import FastLogps
from lora import (
    Lora,
    LoraSettings,
    NF4Linear,
    adapter_tensors,
    add_adapter,
    load_adapter,
    lora_layers,
    merge,
    nf4_levels,
    nf4_pairs,
    nf4_quantize,
    nf4_unpack,
    quantize,
    save_adapter,
    target_modules,
    use_adapter,
)

INPUT_IDS = torch.arange(24).view(2, 12) % 20 + 3
KINDS = {
    "lora": LoraSettings(4, 8.0),
    "rslora": LoraSettings(4, 8.0, rslora=True),
    "dora": LoraSettings(4, 8.0, dora=True),
}


def adapted_model(tokenizer, settings=KINDS["lora"], kind="llama"):
    """A tiny model with an adapter, "policy", that changes the logits."""
    model = tiny_model(kind, tokenizer).eval()
    reach.turn_off_dropout(model)
    add_adapter(model, "policy", target_modules(model, None), settings)
    randomize_adapter(model, "policy")
    return model


@torch.no_grad()
def randomize_adapter(model, name, seed=3):
    """Change B and the magnitudes, so that the adapter changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        if name not in layer.settings:
            continue
        B = layer.B[name]
        B.copy_(0.1 * torch.randn(B.shape, generator=generator))
        if name in layer.magnitude:
            magnitude = layer.magnitude[name]
            magnitude.mul_(1 + 0.1 * torch.rand(magnitude.shape, generator=generator))


def logits(model):
    with torch.no_grad():
        return model(INPUT_IDS).logits


# --- LoRA, rsLoRA, DoRA

@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_leaves_the_logits_unchanged(tokenizer, kind):
    model = tiny_model("llama", tokenizer).eval()
    before = logits(model)
    add_adapter(model, "policy", target_modules(model, None), KINDS[kind])
    assert torch.allclose(logits(model), before, atol=1e-6)


def adapted_linear(base, settings=KINDS["lora"]):
    """A `Lora` around `base` whose update "a" is active and has a random B."""
    layer = Lora(base)
    layer.add("a", settings)
    torch.nn.init.normal_(layer.B["a"])
    layer.active = "a"
    return layer


def small_layer(settings, bias=True):
    """An adapted linear layer 6 -> 5."""
    torch.manual_seed(0)
    return adapted_linear(torch.nn.Linear(6, 5, bias=bias), settings)


@pytest.mark.parametrize("settings, scale", [
    (LoraSettings(4, 8.0), 2.0),
    (LoraSettings(4, 8.0, rslora=True), 4.0),
], ids=["lora", "rslora"])
def test_lora_scales_its_update_by_alpha_over_r_and_rslora_by_alpha_over_root_r(settings, scale):
    """arXiv:2106.09685 eq. 3 with the scale of Sec. 4.1; arXiv:2312.03732."""
    x = torch.randn(3, 6)
    layer = small_layer(settings)
    expected = layer.base(x) + scale * (x @ layer.A["a"].T @ layer.B["a"].T)
    assert torch.allclose(layer(x), expected, atol=1e-6)


def test_dora_scales_each_row_of_the_updated_weight_to_its_magnitude_but_not_the_bias():
    """arXiv:2402.09353 eq. 5; a new magnitude is the norm of the row of W₀."""
    layer = small_layer(LoraSettings(2, 4.0, dora=True))
    x = torch.randn(3, 6)
    magnitude = layer.magnitude["a"]
    assert torch.allclose(magnitude, layer.base.weight.norm(dim=1))
    magnitude.data.mul_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    updated = layer.base.weight + 2 * layer.B["a"] @ layer.A["a"]  # (5, 6)
    weight = F.normalize(updated, dim=1) * magnitude[:, None]
    expected = x @ weight.T + layer.base.bias
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_dora_detaches_the_norm_in_its_gradient():
    """arXiv:2402.09353 Sec. 4.3 eq. 11."""
    layer = small_layer(LoraSettings(2, 4.0, dora=True), bias=False)
    x = torch.randn(3, 6)
    layer(x).sum().backward()
    gradient = layer.B["a"].grad.clone()

    updated = layer.base.weight + 2 * layer.B["a"] @ layer.A["a"]
    ratio = (layer.magnitude["a"] / updated.norm(dim=1)).detach()  # (5,)
    B = layer.B["a"].detach().requires_grad_()
    update = 2 * (x @ layer.A["a"].T @ B.T)
    (ratio * update).sum().backward()
    assert torch.allclose(gradient, B.grad, atol=1e-5)


def linear(kind, dtype):
    """A linear layer 48 -> 40 whose bias is as large as its products."""
    torch.manual_seed(1)
    if kind == "Conv1D":
        layer = Conv1D(40, 48)
    else:
        layer = torch.nn.Linear(48, 40, bias=kind == "bias")
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    return layer.to(dtype)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["bias", "no bias", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_output_of_a_new_dora_adapter_is_bit_identical_to_that_of_its_base(
        dtype, kind, autocast):
    layer = Lora(linear(kind, dtype))
    x = torch.randn(64, 48).to(dtype)
    layer.add("a", KINDS["dora"])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        base_output = layer(x)
        layer.active = "a"
        assert torch.equal(layer(x), base_output)


@pytest.fixture(scope="module")
def biased(tokenizer, tmp_path_factory):
    """A folder with a bfloat16 Qwen2 whose projections have random biases."""
    path = tmp_path_factory.mktemp("biased")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=len(tokenizer) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    models.save_model(model.bfloat16(), tokenizer, path)
    return str(path)


def test_a_bfloat16_dora_run_of_a_model_with_biases_starts_at_a_margin_of_exactly_0(fit, biased):
    _, metrics = fit("--dora", model=biased, lora_rank=4, dtype="bfloat16", max_steps=2)
    assert metrics[0]["rewards/margins"] == 0
    assert metrics[1]["rewards/margins"] != 0


@pytest.mark.slow
def test_a_bfloat16_dora_run_under_fsdp_starts_at_a_margin_of_exactly_0(biased, pairs, tmp_path):
    flags = TINY_RUN | {
        "model": biased, "dataset": pairs, "output_dir": tmp_path / "out", "micro_batch_size": 4,
        "dtype": "bfloat16", "lora_rank": 4, "dora": True, "max_steps": 2, "parallel": "fsdp",
    }
    result = run_training(flags, ranks=2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = read_metrics(tmp_path / "out")
    assert metrics[0]["rewards/margins"] == 0
    assert metrics[1]["rewards/margins"] != 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_depends_only_on_its_seed_and_leaves_the_global_random_state_unchanged(
        tokenizer, kind):
    drawn = {}  # dtype: {key: A}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = tiny_model("llama", tokenizer).to(dtype)
        torch.manual_seed(int(torch.rand(()) * 1000))
        before = torch.random.get_rng_state()
        add_adapter(model, "policy", target_modules(model, None), KINDS[kind], seed=7)
        assert torch.equal(torch.random.get_rng_state(), before)
        tensors = adapter_tensors(model, "policy")
        drawn[dtype] = {key: tensor for key, tensor in tensors.items() if "lora_A" in key}
    expected = drawn[torch.float32]
    # Each of the 14 layers has another A.
    assert len({tensor.sum().item() for tensor in expected.values()}) == 14
    for key, tensor in expected.items():
        assert torch.equal(drawn[torch.float64][key], tensor.double())
        assert torch.equal(drawn[torch.bfloat16][key], tensor)


def test_another_seed_draws_another_adapter(tokenizer):
    drawn = []
    for seed in (0, 1):
        model = tiny_model("llama", tokenizer)
        target = "model.layers.0.mlp.up_proj"
        add_adapter(model, "policy", [target], KINDS["lora"], seed=seed)
        drawn.append(lora_layers(model)[target].A["policy"])
    assert not torch.equal(drawn[0], drawn[1])


def saved_for_backward(compute):
    """The tensors that autograd keeps between forward and backward."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        compute()
    return saved


def addresses(tensors):
    return {tensor.data_ptr() for tensor in tensors}


def test_under_autocast_q_k_and_v_save_one_shared_bfloat16_input_and_no_fp32_copy_of_it():
    layers = [adapted_linear(linear("no bias", torch.bfloat16)) for _ in range(3)]
    x = torch.randn(2, 30, 48, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        saved = saved_for_backward(lambda: [layer(x) for layer in layers])
    inputs = [tensor for tensor in saved if tensor.numel() == x.numel()]
    assert {tensor.dtype for tensor in inputs} == {torch.bfloat16}
    assert addresses(inputs) == {x.data_ptr()}


@pytest.mark.parametrize("kind", ["bias", "no bias", "Conv1D"])
def test_a_frozen_layer_saves_only_its_weight_and_an_adapter_its_input_once(kind):
    base = linear(kind, torch.float32)
    layer = adapted_linear(base)
    x = torch.randn(2, 30, 48, requires_grad=True)
    layer.active = None
    assert addresses(saved_for_backward(lambda: layer(x))) == {base.weight.data_ptr()}

    # Beyond the inputs, an adapter saves one tensor: the low-rank product (2, 30, 4).
    layer.active = "a"
    operands = addresses([x, base.weight, layer.A["a"], layer.B["a"]])
    others = {}
    for tensor in saved_for_backward(lambda: layer(x)):
        if tensor.data_ptr() not in operands:
            others[tensor.data_ptr()] = tensor.numel()
    assert list(others.values()) == [2 * 30 * 4]

    # A frozen adapter does not save the low-rank product either.
    layer.requires_grad_(False)
    assert addresses(saved_for_backward(lambda: layer(x))) <= operands


@pytest.mark.parametrize("kind", ["bias", "no bias", "Conv1D"])
def test_fp32_lora_is_bit_identical_to_its_formula_in_values_and_gradients(kind):
    layer = adapted_linear(linear(kind, torch.float32))
    x = torch.randn(2, 30, 48, requires_grad=True)
    leaves = [x, layer.A["a"], layer.B["a"]]
    expected = layer.base(x) + 2.0 * F.linear(F.linear(x, layer.A["a"]), layer.B["a"])
    output_gradient = torch.randn_like(expected)
    y = layer(x)
    assert torch.equal(y, expected)
    gradients = torch.autograd.grad(y, leaves, output_gradient)
    expected_gradients = torch.autograd.grad(expected, leaves, output_gradient)
    for gradient, expected_gradient in zip(gradients, expected_gradients):
        assert torch.equal(gradient, expected_gradient)


def test_on_a_bfloat16_base_only_the_adapter_is_trained_and_it_is_fp32(tokenizer):
    model = tiny_model("llama", tokenizer).bfloat16()
    add_adapter(model, "policy", target_modules(model, None), KINDS["dora"])
    model(INPUT_IDS).logits.float().sum().backward()
    for name, parameter in model.named_parameters():
        in_adapter = name.endswith(".policy")
        assert parameter.requires_grad == in_adapter, name
        assert (parameter.grad is not None) == in_adapter, name
        assert parameter.dtype == (torch.float32 if in_adapter else torch.bfloat16), name


def test_adapter_dropout_applies_only_where_gradients_are_enabled():
    layer = small_layer(LoraSettings(4, 8.0, dropout=0.5))
    x = torch.randn(200, 6)
    with torch.no_grad():
        clean = layer(x)
        assert torch.equal(clean, layer(x))
    noisy = layer(x)
    assert not torch.allclose(noisy, clean)
    assert torch.allclose(noisy.mean(0), clean.mean(0), atol=1.0)


def test_use_adapter_none_gives_the_base_and_restores_the_adapter_after_an_exception(tokenizer):
    model = tiny_model("llama", tokenizer).eval()
    base_logits = logits(model)
    add_adapter(model, "policy", target_modules(model, None), KINDS["lora"])
    randomize_adapter(model, "policy")
    adapted_logits = logits(model)
    with contextlib.suppress(RuntimeError), use_adapter(model, None):
        assert torch.equal(logits(model), base_logits)
        raise RuntimeError
    assert torch.equal(logits(model), adapted_logits)
    assert not torch.allclose(adapted_logits, base_logits)


def test_a_second_adapter_on_a_base_leaves_the_first_unchanged_and_trainable(tokenizer):
    model = adapted_model(tokenizer)
    first = logits(model)
    add_adapter(model, "reference", target_modules(model, "q_proj"), KINDS["dora"])
    randomize_adapter(model, "reference", seed=9)
    assert torch.equal(logits(model), first)
    with use_adapter(model, "reference"):
        assert not torch.allclose(logits(model), first)
    assert all(parameter.requires_grad for parameter in adapter_tensors(model, "policy").values())


# --- which layers

@pytest.mark.parametrize("kind, count", [("llama", 14), ("gpt2", 8)])
def test_by_default_every_linear_layer_except_the_head_is_adapted(tokenizer, kind, count):
    targets = target_modules(tiny_model(kind, tokenizer), None)
    assert len(targets) == count
    assert "lm_head" not in targets


def test_lora_target_selects_layers_by_the_end_of_their_name_or_by_a_regular_expression(tokenizer):
    model = tiny_model("llama", tokenizer)
    assert target_modules(model, "q_proj,v_proj") == [
        "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj",
    ]
    assert target_modules(model, r".*\.1\..*down_proj") == ["model.layers.1.mlp.down_proj"]
    assert target_modules(model, " v_proj , q_proj,") == target_modules(model, "q_proj,v_proj")
    assert target_modules(model, r".*\.(q|v)_proj") == target_modules(model, "q_proj,v_proj")
    assert target_modules(model, r".{1,40}\.(?:q_proj|v_proj)") == target_modules(
        model, "q_proj,v_proj")
    assert target_modules(model, "all-linear") == target_modules(model, None)


@pytest.mark.parametrize("target, message", [
    ("c_attn", "no linear layer has such a name; there are down_proj, gate_proj"),
    ("q_proj(", "is not a regular expression"),
    ("lm_head", "--lora_target lm_head: is the head, which is not adapted"),
    ("q_proj,v_prj", "--lora_target v_prj: no linear layer .* the nearest are? .*v_proj"),
    ("q_proj, lm_head", "--lora_target lm_head: is the head"),
    (r".*\.(q_proj|k_prj)", "--lora_target k_prj: no linear layer .* the nearest are? .*k_proj"),
    (r".*q_proj|.*v_prj", "--lora_target .*v_prj: no linear layer"),
    ("q_proj|v_proj", r"--lora_target q_proj\|v_proj: no linear layer"),
    (r"model\.layers\.(0|7)\..*", "--lora_target 7: no linear layer"),
    ("q_proj;v_proj", "--lora_target q_proj;v_proj: no linear layer"),
    (",", "--lora_target ,: no linear layer"),
])
def test_a_target_that_matches_no_layer_raises_an_error(tokenizer, target, message):
    with pytest.raises(ValueError, match=message):
        target_modules(tiny_model("llama", tokenizer), target)


def test_experts_in_stacked_tensors_raise_an_error_unless_other_layers_are_named(tokenizer):
    model = AutoModelForCausalLM.from_config(MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2))
    if not any(parameter.ndim == 3 for parameter in model.parameters()):
        pytest.skip("this version of transformers has experts of linear layers")
    message = "--lora_target: the experts of this model are not linear layers"
    with pytest.raises(ValueError, match=message):
        target_modules(model, None)
    assert target_modules(model, "q_proj,o_proj")


# --- files

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_an_adapter_gives_equal_logits_here_and_in_peft_whichever_of_them_saved_it(
        tokenizer, tmp_path, kind, base):
    peft = pytest.importorskip("peft")
    ours = adapted_model(tokenizer, KINDS[kind], base)
    save_adapter(ours, tokenizer, tmp_path / "ours", "somewhere")
    plain = tiny_model(base, tokenizer).eval()
    reach.turn_off_dropout(plain)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    loaded = tiny_model(base, tokenizer).eval()
    reach.turn_off_dropout(loaded)
    load_adapter(loaded, tmp_path / "theirs")
    assert torch.allclose(logits(loaded), logits(ours), atol=1e-6)
    our_tensors = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    their_tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert their_tensors.keys() == our_tensors.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_with_equal_logits_and_has_the_names_and_shapes_of_peft(
        tokenizer, tmp_path, kind):
    model = adapted_model(tokenizer, KINDS[kind])
    save_adapter(model, tokenizer, tmp_path, "somewhere")
    loaded = tiny_model("llama", tokenizer).eval()
    load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    path = "base_model.model.model.layers.0.mlp.down_proj"
    assert tensors[f"{path}.lora_A.weight"].shape == (4, 64)
    assert tensors[f"{path}.lora_B.weight"].shape == (32, 4)
    assert (f"{path}.lora_magnitude_vector" in tensors) == (kind == "dora")


LORA_A = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


def keep(tensors):
    """Change no tensor."""


def remove(tensors):
    del tensors[LORA_A]


def transpose(tensors):
    tensors[LORA_A] = tensors[LORA_A].T.contiguous()


def add_layer(tensors):
    tensors[LORA_A.replace("down", "sideways")] = tensors[LORA_A]


def add_tensor(tensors):
    tensors["something"] = tensors[LORA_A]


@pytest.mark.parametrize("change, config, message", [
    (remove, {}, "down_proj.lora_A.weight is missing, but should be \\(4, 64\\)"),
    (transpose, {}, "adapter_config.json says r = 4, but .*lora_A.weight is \\(64, 4\\)"),
    (add_layer, {}, "made for another model: .* no linear layer .*sideways"),
    (add_tensor, {}, "the tensor something is no part of a LoRA"),
    (keep, {"peft_type": "IA3"}, "only LoRA, rsLoRA and DoRA adapters are read"),
    (keep, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    (keep, {"use_dora": True}, "lora_magnitude_vector is missing"),
], ids=["missing tensor", "wrong shape", "unknown layer", "unknown tensor", "other method",
        "whole modules", "missing magnitudes"])
def test_an_adapter_that_does_not_fit_the_model_raises_an_error_that_names_what_differs(
        tokenizer, tmp_path, change, config, message):
    save_adapter(adapted_model(tokenizer), tokenizer, tmp_path, "somewhere")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(copies, tmp_path / "adapter_model.safetensors")
    config_path = tmp_path / "adapter_config.json"
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | config))
    with pytest.raises(ValueError, match=message):
        load_adapter(tiny_model("llama", tokenizer), tmp_path)


@pytest.mark.parametrize("entries", [
    {"r": None}, {"r": "4"}, {"r": -4}, {"r": 4.0}, {"r": True}, {"r": 0}, {"r": 10**12},
    {"lora_alpha": None}, {"lora_alpha": 0}, {"lora_alpha": -8}, {"lora_alpha": "8"},
    {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}, {"lora_dropout": 1},
    {"lora_dropout": -0.1}, {"lora_dropout": "x"}, {"use_rslora": "false"}, {"use_dora": 1},
    {"base_model_name_or_path": 5},
], ids=str)
def test_an_entry_of_adapter_config_json_of_a_wrong_type_or_range_is_named(
        tokenizer, tmp_path, entries):
    save_adapter(adapted_model(tokenizer), tokenizer, tmp_path, "somewhere")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(UserError, match="adapter_config.json.* (says )?" + [*entries][0]) as error:
        load_adapter(tiny_model("llama", tokenizer), tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "run.json"])
@pytest.mark.parametrize("content", [
    b"", b"null", b"[1]", b'{"r": 4, ', "{}".encode("utf-16"), b"\xff\xfe\xfd", b"5"])
def test_a_damaged_file_of_an_adapter_is_named(tokenizer, tmp_path, file, content):
    save_adapter(adapted_model(tokenizer), tokenizer, tmp_path, "somewhere", seed=1)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=file):
        load_adapter(tiny_model("llama", tokenizer), tmp_path)


def test_a_pickled_adapter_is_refused_with_the_way_to_convert_it(tokenizer, tmp_path):
    save_adapter(adapted_model(tokenizer), tokenizer, tmp_path, "somewhere")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin.*save_pretrained"):
        load_adapter(tiny_model("llama", tokenizer), tmp_path)


HOSTILE = r"([\w.]+)+!"  # takes 2^n steps on a name of n letters


@pytest.mark.parametrize("target", [HOSTILE, r".*\.(q|v)_proj", "all-linear", ["q_proj"], None])
def test_target_modules_of_an_adapter_file_are_never_matched(tokenizer, tmp_path, target):
    """The tensors name the layers, so the usual patterns of PEFT are read and a hostile one is
    harmless."""
    saved = adapted_model(tokenizer)
    save_adapter(saved, tokenizer, tmp_path, "somewhere")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": target}))
    model = tiny_model("llama", tokenizer)
    load_adapter(model, tmp_path)
    assert lora_layers(model).keys() == lora_layers(saved).keys()


def test_a_pattern_of_lora_target_that_never_ends_is_stopped(tokenizer, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 1)
    with pytest.raises(UserError, match=r"^--lora_target .* used more than 1 sec.*q_proj,v_proj"):
        target_modules(tiny_model("llama", tokenizer), HOSTILE)


def test_a_model_folder_as_adapter_and_an_adapter_folder_as_model_raise_errors(
        tokenizer, tmp_path, folder):
    with pytest.raises(ValueError, match="no usable adapter here"):
        load_adapter(tiny_model("llama", tokenizer), folder)
    save_adapter(adapted_model(tokenizer), tokenizer, tmp_path, folder)
    with pytest.raises(ValueError, match="is an adapter, not a model: pass it by --adapter"):
        models.load_model(str(tmp_path))


# --- merging

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("four_bits", [False, True])
def test_a_merged_model_has_plain_layers_and_the_logits_of_the_adapted_model(
        tokenizer, kind, base, four_bits):
    model = tiny_model(base, tokenizer).eval()
    reach.turn_off_dropout(model)
    plain_names = set(model.state_dict())
    if four_bits:
        quantize(model)
    add_adapter(model, "policy", target_modules(model, None), KINDS[kind])
    randomize_adapter(model, "policy")
    before = logits(model)
    merge(model)
    assert torch.allclose(logits(model), before, atol=1e-5)
    assert not lora_layers(model)
    assert set(model.state_dict()) == plain_names


def test_model_py_merge_prints_how_far_the_saved_model_is_from_the_adapted_model(
        fit, folder, tmp_path):
    out, _ = fit(lora_rank=4, max_steps=3, lr=1e-2, quantize="nf4")
    merged = tmp_path / "merged"
    result = forked.run("model.py", "merge", "--adapter", out, "--out", merged)
    assert result.returncode == 0, result.stderr
    pattern = r"differ from the adapted model's by at most (\S+),"
    assert float(re.search(pattern, result.stdout)[1]) < 1e-4
    assert "quantized to 4 bits again, its logits would differ by at most" in result.stdout
    assert weights(merged).keys() == weights(folder).keys()


def test_an_adapter_that_names_no_base_is_merged_into_the_model_of_the_model_flag(
        tokenizer, folder, tmp_path):
    model = tiny_model("llama", tokenizer)
    add_adapter(model, "policy", target_modules(model, None), KINDS["lora"])
    save_adapter(model, tokenizer, tmp_path / "adapter", None)
    config_path = tmp_path / "adapter" / "adapter_config.json"
    without_base = json.loads(config_path.read_text()) | {"base_model_name_or_path": None}
    config_path.write_text(json.dumps(without_base))
    flags = ["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]
    with pytest.raises(UserError, match="does not name its base; give it by --model"):
        models.main(flags)
    models.main([*flags, "--model", folder])
    assert weights(tmp_path / "merged").keys() == weights(folder).keys()


# --- 4 bits

# arXiv:2305.14314, Appendix E
PUBLISHED_LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]


def test_the_16_levels_are_those_of_the_qlora_paper():
    assert torch.allclose(nf4_levels(), torch.tensor(PUBLISHED_LEVELS), atol=2e-7)


def test_codes_and_scales_equal_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours, absmax = nf4_quantize(weight)
    assert torch.equal(codes.flatten(), ours)
    assert torch.allclose(state.absmax, absmax)


def blocks_of_64(weight):
    """Any shape -> (n/64, 64), padded with zeros."""
    return F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)


@pytest.mark.parametrize("shape", [(64, 64), (7, 13), (1, 1), (300, 257)])
def test_the_error_in_a_block_is_at_most_half_a_gap_between_levels_and_zero_stays_zero(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[0, 0] = 0
    dense = NF4Linear(weight, None).dense()
    errors = blocks_of_64(dense - weight).abs().amax(1)  # (n/64,)
    absmax = blocks_of_64(weight).abs().amax(1)
    scale_error = (absmax - absmax.mean()).abs().max() / 16  # e4m3 rounds by at most a sixteenth
    half_gap = nf4_levels().diff().max() / 2
    assert (errors <= half_gap * absmax + scale_error + 1e-6).all()
    assert dense[0, 0] == 0


def test_a_4_bit_weight_takes_0_52_bytes_and_backward_keeps_no_dense_weight():
    layer = NF4Linear(torch.randn(512, 512), None)
    stored = sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
    assert stored / 512 ** 2 == pytest.approx(0.516, abs=0.001)
    x = torch.randn(2, 512, requires_grad=True)
    saved = saved_for_backward(lambda: layer(x).sum())
    assert sum(tensor.numel() for tensor in saved) < 512 * 8


def test_unpacking_gives_the_level_of_each_code_times_the_scale_of_its_block():
    weight = torch.randn(50, 77, generator=torch.Generator().manual_seed(2))
    codes, absmax = nf4_quantize(weight)
    single_codes = torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()
    expected = nf4_levels()[single_codes].view(-1, 64) * absmax[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(nf4_unpack(codes, absmax, nf4_pairs(), dtype), expected.to(dtype))


class Traffic(TorchDispatchMode):
    """Counts kernels, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.kernels = 0
        self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            self.kernels += 1
            for value in (*args, out):
                if isinstance(value, torch.Tensor):
                    self.bytes += value.numel() * value.element_size()
        return out


@pytest.mark.parametrize("dtype, most_bytes", [(torch.float32, 17.1), (torch.bfloat16, 23.1)])
def test_without_a_compiler_a_dense_weight_costs_at_most_8_kernels_and_23_bytes_per_weight(
        dtype, most_bytes):
    layer = NF4Linear(torch.randn(512, 512), None)
    layer.dense(dtype)
    with Traffic() as traffic:
        layer.dense(dtype)
    assert traffic.kernels <= 8
    assert traffic.bytes / 512**2 <= most_bytes


def test_compiled_unpacking_is_bit_identical_for_every_size_and_dtype():
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a compiler")
    compiled = torch.compile(nf4_unpack, dynamic=True)
    for shape in ((64, 64), (7, 13), (300, 257)):
        layer = NF4Linear(torch.randn(shape), None)
        for dtype in (torch.float32, torch.bfloat16):
            inputs = layer.codes, layer.absmax(), nf4_pairs(), dtype
            assert torch.equal(compiled(*inputs), nf4_unpack(*inputs))


def linear_shapes(model):
    """Shapes of the weights of all linear layers except the head, as (out, in)."""
    shapes = []
    for name in target_modules(model, None):
        layer = model.get_submodule(name)
        shape = tuple(layer.weight.shape)
        shapes.append(shape[::-1] if isinstance(layer, Conv1D) else shape)
    return shapes


class WeightCopies(TorchDispatchMode):
    """Counts the copies of weights that `tensor.to(...)` makes on a device in a dtype.

    shapes          of the weights
    count           copies made
    most_at_once    copies whose storages exist at the same time, at most
    """

    def __init__(self, shapes, device_type, dtype):
        super().__init__()
        self.shapes = set(shapes)
        self.target = device_type, dtype
        self.count = 0
        self.most_at_once = 0
        self.storages = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten._to_copy.default and self.is_counted(out):
            self.storages = [storage for storage in self.storages if not storage.expired()]
            self.storages.append(StorageWeakRef(out.untyped_storage()))
            self.most_at_once = max(self.most_at_once, len(self.storages))
            self.count += 1
        return out

    def is_counted(self, copy):
        return tuple(copy.shape) in self.shapes and (copy.device.type, copy.dtype) == self.target


def test_quantize_copies_one_16_bit_weight_at_a_time_to_the_device_and_leaves_no_dense_one_there(
        tokenizer):
    """The device is "meta": its tensors have no values, but a device and a storage."""
    model = tiny_model("gpt2", tokenizer).bfloat16()
    with WeightCopies(linear_shapes(model), "meta", torch.bfloat16) as copies:
        quantize(model, torch.device("meta"))
    assert copies.count == 8
    assert copies.most_at_once == 1
    assert not [name for name, p in model.named_parameters() if p.is_meta and p.ndim == 2]
    quantized = [layer for layer in model.modules() if isinstance(layer, NF4Linear)]
    assert len(quantized) == 8
    for layer in quantized:
        assert {buffer.device.type for buffer in layer.buffers()} == {"meta"}


def test_a_4_bit_model_is_loaded_with_at_most_one_linear_weight_in_fp32_at_a_time(biased):
    expected = AutoModelForCausalLM.from_pretrained(biased, dtype=torch.float32)
    with WeightCopies(linear_shapes(expected), "cpu", torch.float32) as copies:
        model = models.load_model(biased, four_bits=True)
    assert copies.count == 14
    assert copies.most_at_once == 1
    kinds = {type(layer).__name__ for layer in model.model.layers[0].mlp.children()}
    assert kinds == {"NF4Linear", "SiLUActivation"}
    quantize(expected)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_a_4_bit_model_is_quantized_first_so_no_dense_linear_weight_is_moved_to_the_device(
        biased, monkeypatch):
    """load_model reads no values for "meta", so the device is replaced when the model is moved."""
    move = models.move
    monkeypatch.setattr(
        models, "move", lambda model, _, dtype: move(model, torch.device("meta"), dtype))
    plain = AutoModelForCausalLM.from_pretrained(biased, dtype=torch.bfloat16)
    with WeightCopies(linear_shapes(plain), "meta", torch.bfloat16) as copies:
        model = models.load_model(biased, four_bits=True)
    assert copies.count == 0
    assert model.model.layers[0].mlp.up_proj.codes.is_meta


def test_the_gradient_of_a_4_bit_layer_is_that_of_its_dense_weight():
    layer = NF4Linear(torch.randn(40, 24), torch.nn.Parameter(torch.randn(40)))
    x = torch.randn(3, 24, requires_grad=True)
    y = layer(x)
    dense_y = F.linear(x, layer.dense(), layer.bias)
    assert torch.allclose(y, dense_y)
    gradient, = torch.autograd.grad(y.square().sum(), x)
    expected, = torch.autograd.grad(dense_y.square().sum(), x)
    assert torch.allclose(gradient, expected)


def test_quantize_replaces_every_linear_layer_except_the_head(tokenizer):
    model = tiny_model("llama", tokenizer)
    quantize(model)
    assert len([layer for layer in model.modules() if isinstance(layer, NF4Linear)]) == 14
    assert isinstance(model.lm_head, torch.nn.Linear)


# --- references

def sft_adapter(fit, **flags):
    """The folder of an adapter that was trained by SFT."""
    return fit(loss="sft", lora_rank=4, lr=3e-2, max_steps=6, out="sft", **flags)[0]


def test_a_new_adapter_without_reference_model_has_the_losses_of_one_with_a_second_model(fit):
    flags = dict(lora_rank=4, max_steps=4, dtype="float64")
    _, without = fit(**flags, out="off")
    _, second = fit(**flags, ref="model", out="second")
    assert not differences(without, second, 1e-9)
    assert without[-1]["loss"] != without[0]["loss"]


def test_after_adapter_sft_the_reference_is_that_adapter_and_the_base_raises_an_error(fit):
    """With the base instead of the SFT policy as the reference, the loss is near 0 and the accuracy
    near 1 within a few steps."""
    sft = sft_adapter(fit)
    dpo, metrics = fit(adapter=sft, max_steps=3, out="dpo")
    flags = saved_flags(dpo)
    assert flags["ref"] == "adapter"
    assert metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    for wrong in ("model", "adapter_off"):
        with pytest.raises(ValueError, match="an adapter on one side"):
            fit(adapter=sft, ref=wrong, max_steps=3, out=wrong)


@pytest.mark.slow
def test_after_300_steps_from_an_sft_adapter_the_reference_is_still_the_sft_model(
        fit, folder, pairs, tokenizer):
    """The metrics contain log π and the reward β (log π − log π_ref), so log π_ref is
    logps − rewards/β. Its mean over the held-out rows must stay that of the SFT model."""
    sft = sft_adapter(fit, dtype="float64")
    _, metrics = fit(adapter=sft, max_steps=300, eval_every=100, beta=0.5, dtype="float64",
                     lr=3e-3, out="dpo")
    rows, _ = data.load_tokens(pairs, tokenizer, limits=data.Limits(64))
    _, held_out = data.hold_out(rows, 0.1)
    model = models.load_model(folder, torch.float64)
    load_adapter(model, sft)
    with torch.no_grad():
        expected = concatenated_forward(SequenceLogps(model), data.pad_rows(held_out[:], 0))

    eval_rows = [row for row in metrics if row["split"] == "eval"]
    assert [row["step"] for row in eval_rows] == [100, 200, 300]
    for row in eval_rows:
        for k, side in enumerate(("chosen", "rejected")):
            reference_logps = row[f"logps/{side}"] - row[f"rewards/{side}"] / 0.5
            mean = expected["logps"][:, k].mean().item()
            assert reference_logps == pytest.approx(mean, abs=1e-9)
    # The policy itself has changed.
    assert eval_rows[-1]["rewards/margins"] != pytest.approx(0, abs=0.1)


@contextlib.contextmanager
def counted_forwards():
    """Yields a list with one element per forward pass of a SequenceLogps without gradients: those
    of the reference, of evaluation and of checks."""
    forwards = []

    def count(module, inputs):
        if isinstance(module, SequenceLogps) and not torch.is_grad_enabled():
            forwards.append(module)

    hook = register_module_forward_pre_hook(count)
    try:
        yield forwards
    finally:
        hook.remove()


def cached_references(path):
    return list((path / "runs" / "references").iterdir())


@pytest.mark.parametrize("start", ["full", "new adapter", "adapter"])
def test_a_cached_reference_gives_the_losses_of_a_live_one_and_the_next_run_reads_it(
        fit, tmp_path, monkeypatch, capsys, start):
    monkeypatch.chdir(tmp_path)
    flags = dict(max_steps=4, dtype="float64")
    if start == "new adapter":
        flags["lora_rank"] = 4
    if start == "adapter":
        flags["adapter"] = sft_adapter(fit)
    _, live = fit(**flags, out="live")
    _, cached = fit(**flags, ref="cache", ref_batch_size=7, out="cached")
    assert not differences(live, cached, 1e-9)
    path, = cached_references(tmp_path)

    # The next run reads the file: its losses are equal bit for bit.
    capsys.readouterr()
    flags |= dict(ref="cache", ref_batch_size=1)
    with counted_forwards() as read:
        _, again = fit(**flags, out="again")
    assert not differences(cached, again)
    assert "read from runs/references" in capsys.readouterr().out

    # Without the file, a run needs one forward more for each of the 22 rows.
    path.unlink()
    with counted_forwards() as computed:
        fit(**flags, out="computed")
    assert "kept in runs/references" in capsys.readouterr().out
    assert len(computed) == len(read) + 22


def test_with_a_cached_reference_the_policy_is_the_only_model_in_memory_during_training(
        fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = []

    def models_in_memory():
        gc.collect()
        return sum(type(thing) is LlamaForCausalLM for thing in gc.get_objects())

    before = models_in_memory()
    hook = register_optimizer_step_pre_hook(
        lambda *_: counts.append(models_in_memory() - before))
    try:
        fit(ref="model", max_steps=2, out="live")
        live = counts.copy()
        counts.clear()
        fit(ref="cache", max_steps=2, out="cached")
    finally:
        hook.remove()
    assert live == [2, 2]
    assert counts == [1, 1]


def test_other_weights_rows_token_weights_or_dtype_make_another_cache_file(
        fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other, _ = fit(loss="sft", max_steps=2, out="other")
    changes = ({}, {"model": other}, {"max_length": 16}, {"ld_alpha": 0.5}, {"dtype": "bfloat16"})
    for count, flags in enumerate(changes, 1):
        fit(**flags, ref="cache", max_steps=1, out=f"run{count}")
        assert len(cached_references(tmp_path)) == count


def test_a_cache_that_is_whole_but_not_what_the_reference_gives_now_raises_an_error(
        fit, tmp_path, monkeypatch):
    """As on another machine, or after a change of a kernel."""
    monkeypatch.chdir(tmp_path)
    fit(ref="cache", max_steps=1)
    path, = cached_references(tmp_path)
    tables = load_file(path)
    tables["train"] = tables["train"] - 1
    save_file(tables, path, {"digest": references.tables_digest(path.stem, tables)})
    with pytest.raises(ValueError, match="delete the file, and the next run computes it again"):
        fit(ref="cache", max_steps=1, out="next")


def test_an_interrupted_reference_pass_leaves_no_file(fit, tmp_path, monkeypatch):
    def interrupt(*inputs):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(references, "reference_logps", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fit(ref="cache", max_steps=1)
    assert not list(tmp_path.glob("runs/references/*"))


def test_two_processes_share_the_reference_pass_and_get_the_losses_of_one(folder, pairs, tmp_path):
    flags = TINY_RUN | {
        "model": folder, "dataset": pairs, "batch_size": 7, "micro_batch_size": 2,
        "dtype": "float64", "ref": "cache", "lora_rank": 4, "quantize": "nf4", "max_steps": 4,
    }
    metrics, caches = [], []
    for name, processes in (("one", 1), ("two", 2)):
        home = tmp_path / name
        home.mkdir()
        run_training(flags | {"output_dir": home / "out"}, ranks=processes, cwd=home)
        metrics.append(read_metrics(home / "out"))
        path, = cached_references(home)
        caches.append(load_file(path))
    assert not differences(*metrics, 1e-6)  # 4-bit bases compute in fp32
    assert torch.allclose(caches[0]["train"], caches[1]["train"], atol=1e-4)


# --- TR-DPO

@pytest.mark.parametrize("start", ["full", "adapter"])
def test_a_reference_set_to_the_policy_after_each_step_keeps_the_loss_at_log_2(fit, start):
    flags = dict(sync_ref_every=1, sync_ref_alpha=1, max_steps=4, dtype="float64", eval_share=0,
                 lr=1e-2)
    if start == "adapter":
        flags["adapter"] = sft_adapter(fit)
    _, metrics = fit(**flags)
    for row in metrics:
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics[-1]["grad_norm"] > 0


QUARTER_OF_THE_WAY = argparse.Namespace(ref="model", sync_ref_every=1, sync_ref_alpha=0.25)


def test_a_sync_moves_parameters_and_buffers_by_alpha_times_their_distance():
    """arXiv:2404.09656: θ_ref <- α θ + (1 − α) θ_ref."""
    policy, reference = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    for tensor in policy.state_dict().values():
        tensor.fill_(5)
    for _ in range(2):
        references.move_reference(QUARTER_OF_THE_WAY, policy, reference)
    assert torch.allclose(reference.bias, torch.full((3,), 5 * (1 - 0.75 ** 2)))
    assert torch.allclose(reference.running_mean, reference.bias)
    assert reference.num_batches_tracked == 5


def test_a_sync_moves_a_tied_weight_once(tokenizer):
    """state_dict() contains a tied weight under two names."""
    policy = FastLogps(tiny_model("gpt2", tokenizer))
    reference = FastLogps(tiny_model("gpt2", tokenizer))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 1
    model = reference.model
    before = model.transformer.wte.weight.clone()
    references.move_reference(QUARTER_OF_THE_WAY, policy, reference)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.allclose(model.lm_head.weight, before + 0.25)


@pytest.mark.parametrize("switches, flags", [
    ([], dict(sync_ref_every=2)),
    ([], dict(lora_rank=4, lora_dropout=0.3)),
    (["--dora", "--rslora"], dict(lora_rank=4, ref="cache")),
], ids=["moving reference", "dropout", "rsLoRA and DoRA, cached reference"])
def test_a_resumed_run_equals_an_uninterrupted_one_with_adapters_dropout_and_references(
        fit, tmp_path, monkeypatch, switches, flags):
    monkeypatch.chdir(tmp_path)
    whole, _ = fit(*switches, **flags, max_steps=6, out="whole")
    half, _ = fit(*switches, **flags, max_steps=6, save_every=3, out="half")
    unfinished(half)
    resume(half)
    assert not differences(whole, half)


# --- memory and flags

@pytest.mark.parametrize("flags", [{}, {"lora_rank": 4}], ids=["full", "LoRA"])
def test_gradient_checkpointing_changes_no_loss_and_no_gradient_norm(fit, flags):
    flags = flags | {"max_steps": 3, "dtype": "float64"}
    _, stored = fit(**flags, out="stored")
    _, recomputed = fit("--gradient_checkpointing", **flags, out="recomputed")
    assert not differences(stored, recomputed, 1e-12)


def test_a_bfloat16_lora_run_prints_the_step_0_loss_and_the_trained_parameters_and_memory(
        fit, capsys):
    fit(lora_rank=4, dtype="bfloat16", max_steps=2)
    printed = capsys.readouterr().out
    assert "step-0 check: the loss is 0.6931" in printed
    pattern = r"[\d,]+ parameters, [\d,]+ of them trained; on each rank weights"
    assert re.search(pattern, printed)


def test_the_default_learning_rate_of_an_adapter_is_ten_times_that_of_full_training():
    flags = ["--model", "m", "--dataset", "d"]
    assert train.parse_args(flags)[0].lr == 5e-7
    assert train.parse_args([*flags, "--lora_rank", "8"])[0].lr == 5e-6


@pytest.mark.parametrize("flags, message", [
    ("--lora_alpha 8",
     "--lora_alpha: is read for a new adapter only; give --lora_rank"),
    ("--dora",
     "--dora: is read for a new adapter only"),
    ("--lora_target q_proj --adapter x --model m",
     "and no --adapter"),
    ("--lora_rank 4 --adapter x --model m",
     "--lora_rank 4: --adapter x has its own rank"),
    ("--lora_rank 4 --lora_dropout 1",
     "--lora_dropout: must be a number in [0, 1), got '1'"),
    ("--quantize nf4",
     "--quantize nf4: 4-bit weights can't be trained"),
    ("--ref adapter",
     "--ref adapter: there is no --adapter"),
    ("--ref adapter_off",
     "--ref adapter_off: there is no adapter to turn off"),
    ("--ref none",
     "--ref none: this loss reads a reference"),
    ("--ref model --reference_free",
     "--ref model: is not read with --reference_free"),
    ("--ref_model x --lora_rank 4 --ref adapter_off",
     "--ref_model x: is not read with --ref adapter_off"),
    ("--ref_batch_size 4",
     "--ref_batch_size 4: is read with --ref cache only"),
    ("--sync_ref_every 4 --ref cache",
     "--sync_ref_every 4: a reference of --ref cache can't move"),
    ("--sync_ref_every 4 --lora_rank 2",
     "--sync_ref_every 4: a reference of --ref adapter_off can't move"),
    ("--sync_ref_alpha 0.5",
     "--sync_ref_alpha 0.5: is read with --sync_ref_every"),
    ("--sync_ref_every 4 --sync_ref_alpha 1.5",
     "--sync_ref_alpha: must be a number in (0, 1], got '1.5'"),
    ("--loss simpo --ref model",
     "--ref: --loss simpo has no reference"),
    ("--loss simpo --sync_ref_every 3",
     "--sync_ref_every: --loss simpo has no reference"),
    ("--adapter nowhere",
     "nowhere: no usable adapter here"),
])
def test_a_flag_that_would_have_no_effect_raises_an_error_with_the_reason(flags, message):
    with pytest.raises(ValueError) as error:
        train.parse_args(flags.split())
    assert message in str(error.value)
