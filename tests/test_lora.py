"""Adapters, 4-bit weights, and every kind of reference."""
import argparse
import contextlib
import gc
import json
import math
import re
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import ALONE, ROOT, command, read_metrics, tiny_model, unfinished, weights
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2Config
from transformers.pytorch_utils import Conv1D

import data
import model as models
import reference as references
import train
from dpo import SequenceLogps, concatenated_forward
from errors import UserError
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

IDS = torch.arange(24).view(2, 12) % 20 + 3
KINDS = {"lora": LoraSettings(4, 8.0), "rslora": LoraSettings(4, 8.0, rslora=True), "dora": LoraSettings(4, 8.0, dora=True)}


def adapted(tokenizer, settings=KINDS["lora"], kind="llama", name="policy", target=None):
    """A tiny model with an update that does something, in fp64 but for the adapter's own fp32."""
    model = tiny_model(kind, tokenizer).eval()
    models.turn_off_dropout(model)
    add_adapter(model, name, target_modules(model, target), settings)
    stir(model, name)
    return model


def stir(model, name, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in (layer for layer in lora_layers(model).values() if name in layer.settings):
            layer.B[name].copy_(0.1 * torch.randn(layer.B[name].shape, generator=generator))
            if name in layer.magnitude:
                layer.magnitude[name].mul_(1 + 0.1 * torch.rand(layer.magnitude[name].shape, generator=generator))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# --- LoRA, rsLoRA, DoRA

@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing(tokenizer, kind):
    model = tiny_model("llama", tokenizer).eval()
    before = logits(model)
    add_adapter(model, "policy", target_modules(model, None), KINDS[kind])
    assert torch.allclose(logits(model), before, atol=1e-6)


def layer_of(settings, bias=True):
    torch.manual_seed(0)
    layer = Lora(torch.nn.Linear(6, 5, bias=bias))
    layer.add("a", settings)
    layer.active = "a"
    layer.B["a"].data.normal_()
    return layer


def test_lora_adds_alpha_over_r_times_b_a_x():
    """2106.09685 eq. 3 with the scale of Sec. 4.1; rsLoRA (2312.03732) divides by the root of r."""
    x = torch.randn(3, 6)
    for settings, scale in ((LoraSettings(4, 8.0), 2.0), (LoraSettings(4, 8.0, rslora=True), 4.0)):
        layer = layer_of(settings)
        expected = layer.base(x) + scale * (x @ layer.A["a"].T @ layer.B["a"].T)
        assert torch.allclose(layer(x), expected, atol=1e-6)


def test_dora_gives_each_row_of_the_updated_weight_its_own_length():
    """2402.09353 eq. 5; at the start the lengths are those of W0, and the bias is no part of it."""
    layer, x = layer_of(LoraSettings(2, 4.0, dora=True)), torch.randn(3, 6)
    assert torch.allclose(layer.magnitude["a"], layer.base.weight.norm(dim=1))
    layer.magnitude["a"].data.mul_(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    direction = layer.base.weight + 2 * layer.B["a"] @ layer.A["a"]
    expected = x @ (F.normalize(direction, dim=1) * layer.magnitude["a"][:, None]).T + layer.base.bias
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_dora_takes_the_norm_as_a_constant_in_its_gradient():
    """2402.09353 Sec. 4.3 eq. 11."""
    layer, x = layer_of(LoraSettings(2, 4.0, dora=True), bias=False), torch.randn(3, 6)
    layer(x).sum().backward()
    found = layer.B["a"].grad.clone()
    ratio = (layer.magnitude["a"] / (layer.base.weight + 2 * layer.B["a"] @ layer.A["a"]).norm(dim=1)).detach()
    B = layer.B["a"].detach().requires_grad_()
    (ratio * (2 * (x @ layer.A["a"].T @ B.T))).sum().backward()
    assert torch.allclose(found, B.grad, atol=1e-5)


def linear(kind, dtype):
    """A linear layer 48 -> 40 whose bias is as large as its products."""
    torch.manual_seed(1)
    layer = Conv1D(40, 48) if kind == "Conv1D" else torch.nn.Linear(48, 40, bias=kind == "bias")
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    return layer.to(dtype)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["bias", "no bias", "Conv1D"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_new_dora_gives_exactly_the_output_of_its_base(dtype, kind, autocast):
    layer, x = Lora(linear(kind, dtype)), torch.randn(64, 48).to(dtype)
    layer.add("a", KINDS["dora"])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        base = layer(x)
        layer.active = "a"
        assert torch.equal(layer(x), base)


@pytest.fixture(scope="module")
def biased(tokenizer, tmp_path_factory):
    """A model whose projections have biases, in a bfloat16 file, as Qwen2 has them."""
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


def test_dora_in_bfloat16_starts_at_a_margin_of_exactly_0_with_biases(fit, biased):
    _, metrics = fit("--dora", model=biased, lora_rank=4, dtype="bfloat16", max_steps=2)
    assert metrics[0]["rewards/margins"] == 0 and metrics[1]["rewards/margins"] != 0


def test_dora_in_bfloat16_starts_at_a_margin_of_exactly_0_under_fsdp(biased, pairs, tmp_path):
    flags = dict(model=biased, dataset=pairs, batch_size=8, micro_batch_size=4, max_length=64, lr=1e-2, eval_share=0.1,
                 log_every=1, dtype="bfloat16", lora_rank=4, max_steps=2, parallel="fsdp")
    result = subprocess.run(command("--dora", *(f"--{k}={v}" for k, v in flags.items()), f"--output_dir={tmp_path / 'out'}", torchrun=2),
                            cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    metrics = read_metrics(tmp_path / "out")
    assert metrics[0]["rewards/margins"] == 0 and metrics[1]["rewards/margins"] != 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_follows_from_the_seed_alone_in_every_dtype_and_leaves_the_random_state(tokenizer, kind):
    drawn = []
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = tiny_model("llama", tokenizer).to(dtype)
        torch.manual_seed(int(torch.rand(()) * 1000))
        before = torch.random.get_rng_state()
        add_adapter(model, "policy", target_modules(model, None), KINDS[kind], seed=7)
        assert torch.equal(torch.random.get_rng_state(), before)
        drawn.append({key: tensor for key, tensor in adapter_tensors(model, "policy").items() if "lora_A" in key})
    assert len({tensor.sum().item() for tensor in drawn[0].values()}) == 14  # each layer has its own
    for key, tensor in drawn[0].items():
        assert torch.equal(drawn[1][key], tensor.double()) and torch.equal(drawn[2][key], tensor)


def test_another_seed_draws_another_adapter(tokenizer):
    one, two = tiny_model("llama", tokenizer), tiny_model("llama", tokenizer)
    add_adapter(one, "policy", ["model.layers.0.mlp.up_proj"], KINDS["lora"], seed=0)
    add_adapter(two, "policy", ["model.layers.0.mlp.up_proj"], KINDS["lora"], seed=1)
    assert not torch.equal(lora_layers(one).popitem()[1].A["policy"], lora_layers(two).popitem()[1].A["policy"])


def saved_for_backward(compute):
    """The tensors that autograd keeps between forward and backward."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        compute()
    return saved


def adapted_linear(base, settings=KINDS["lora"]):
    layer = Lora(base)
    layer.add("a", settings)
    torch.nn.init.normal_(layer.B["a"])
    layer.active = "a"
    return layer


def test_under_autocast_q_k_and_v_share_one_saved_input_and_make_no_fp32_copy_of_it():
    layers = [adapted_linear(linear("no bias", torch.bfloat16)) for _ in range(3)]
    x = torch.randn(2, 30, 48, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        saved = saved_for_backward(lambda: [layer(x) for layer in layers])
    inputs = [tensor for tensor in saved if tensor.numel() == x.numel()]
    assert {tensor.dtype for tensor in inputs} == {torch.bfloat16}
    assert {tensor.data_ptr() for tensor in inputs} == {x.data_ptr()}


@pytest.mark.parametrize("kind", ["bias", "no bias", "Conv1D"])
def test_a_frozen_layer_keeps_nothing_but_its_weight_and_an_adapter_its_input_once(kind):
    base = linear(kind, torch.float32)
    layer, x = adapted_linear(base), torch.randn(2, 30, 48, requires_grad=True)
    layer.active = None
    assert {tensor.data_ptr() for tensor in saved_for_backward(lambda: layer(x))} == {base.weight.data_ptr()}
    layer.active = "a"
    saved = saved_for_backward(lambda: layer(x))
    known = {tensor.data_ptr() for tensor in (x, base.weight, layer.A["a"], layer.B["a"])}
    others = {tensor.data_ptr(): tensor.numel() for tensor in saved if tensor.data_ptr() not in known}
    assert list(others.values()) == [2 * 30 * 4]  # the low-rank product
    layer.requires_grad_(False)
    assert {tensor.data_ptr() for tensor in saved_for_backward(lambda: layer(x))} <= known  # and that one is not needed then


@pytest.mark.parametrize("kind", ["bias", "no bias", "Conv1D"])
def test_lora_in_fp32_has_the_bits_of_the_formula_in_its_values_and_gradients(kind):
    layer, x = adapted_linear(linear(kind, torch.float32)), torch.randn(2, 30, 48, requires_grad=True)
    leaves = [x, layer.A["a"], layer.B["a"]]
    expected = layer.base(x) + 2.0 * F.linear(F.linear(x, layer.A["a"]), layer.B["a"])
    slope = torch.randn_like(expected)
    y = layer(x)
    assert torch.equal(y, expected)
    for found, wanted in zip(torch.autograd.grad(y, leaves, slope), torch.autograd.grad(expected, leaves, slope)):
        assert torch.equal(found, wanted)


def test_only_the_adapter_is_trained_and_is_fp32_on_a_bf16_base(tokenizer):
    model = tiny_model("llama", tokenizer).bfloat16()
    add_adapter(model, "policy", target_modules(model, None), KINDS["dora"])
    model(IDS).logits.float().sum().backward()
    for name, parameter in model.named_parameters():
        ours = name.endswith(".policy")
        assert parameter.requires_grad == ours and (parameter.grad is not None) == ours
        assert parameter.dtype == (torch.float32 if ours else torch.bfloat16), name


def test_dropout_falls_where_a_gradient_is_taken_and_nowhere_else():
    layer, x = layer_of(LoraSettings(4, 8.0, dropout=0.5)), torch.randn(200, 6)
    with torch.no_grad():
        clean = layer(x)
        assert torch.equal(clean, layer(x))
    noisy = layer(x)
    assert not torch.allclose(noisy, clean) and torch.allclose(noisy.mean(0), clean.mean(0), atol=1.0)


def test_the_reference_is_the_bare_base_and_the_adapter_comes_back_whatever_happens(tokenizer):
    model = tiny_model("llama", tokenizer).eval()
    bare = logits(model)
    add_adapter(model, "policy", target_modules(model, None), KINDS["lora"])
    stir(model, "policy")
    on = logits(model)
    with contextlib.suppress(RuntimeError), use_adapter(model, None):
        assert torch.equal(logits(model), bare)
        raise RuntimeError
    assert torch.equal(logits(model), on) and not torch.allclose(on, bare)


def test_two_adapters_on_one_base_do_not_touch_each_other(tokenizer):
    model = adapted(tokenizer)
    first = logits(model)
    add_adapter(model, "reference", target_modules(model, "q_proj"), KINDS["dora"])
    stir(model, "reference", seed=9)
    assert torch.equal(logits(model), first)
    with use_adapter(model, "reference"):
        assert not torch.allclose(logits(model), first)
    assert all(parameter.requires_grad for parameter in adapter_tensors(model, "policy").values())


# --- which layers

def test_every_linear_layer_but_the_head_is_adapted_unless_named(tokenizer):
    for kind, count, head in (("llama", 14, "lm_head"), ("gpt2", 8, "lm_head")):
        targets = target_modules(tiny_model(kind, tokenizer), None)
        assert len(targets) == count and head not in targets
    model = tiny_model("llama", tokenizer)
    assert target_modules(model, "q_proj,v_proj") == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    assert target_modules(model, r".*\.1\..*down_proj") == ["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize("target, message", [("c_attn", "no linear layer has such a name; there are down_proj, gate_proj"),
                                             ("q_proj(", "is not a regular expression"), ("lm_head", "no linear layer has such a name")])
def test_a_target_that_matches_nothing_is_refused(tokenizer, target, message):
    with pytest.raises(ValueError, match=message):
        target_modules(tiny_model("llama", tokenizer), target)


def test_experts_that_are_no_linear_layers_are_refused_with_a_reason_unless_others_are_named(tokenizer):
    model = AutoModelForCausalLM.from_config(MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2))
    if not any(p.ndim == 3 for p in model.parameters()):
        pytest.skip("this transformers has experts of linear layers")
    with pytest.raises(ValueError, match="--lora_target: the experts of this model are not linear layers"):
        target_modules(model, None)
    assert target_modules(model, "q_proj,o_proj")


# --- files

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_an_adapter_of_ours_loads_in_peft_and_one_of_peft_loads_here_with_equal_logits(tokenizer, tmp_path, kind, base):
    peft = pytest.importorskip("peft")
    ours = adapted(tokenizer, KINDS[kind], base)
    save_adapter(ours, tokenizer, tmp_path / "ours", "somewhere")
    plain = tiny_model(base, tokenizer).eval()
    models.turn_off_dropout(plain)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    assert torch.allclose(logits(theirs), logits(ours), atol=1e-5)

    theirs.save_pretrained(tmp_path / "theirs")
    again = tiny_model(base, tokenizer).eval()
    models.turn_off_dropout(again)
    load_adapter(again, tmp_path / "theirs")
    assert torch.allclose(logits(again), logits(ours), atol=1e-6)
    assert load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys() == load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_the_same_when_it_is_loaded_and_has_the_names_and_shapes_of_peft(tokenizer, tmp_path, kind):
    model = adapted(tokenizer, KINDS[kind])
    save_adapter(model, tokenizer, tmp_path, "somewhere")
    again = tiny_model("llama", tokenizer).eval()
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    path = "base_model.model.model.layers.0.mlp.down_proj"
    assert tensors[f"{path}.lora_A.weight"].shape == (4, 64) and tensors[f"{path}.lora_B.weight"].shape == (32, 4)
    assert (f"{path}.lora_magnitude_vector" in tensors) == (kind == "dora")


def spoil(folder, change=lambda tensors: None, **config):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize("change, config, message", [
    (lambda t: t.pop(FIRST), {}, "down_proj.lora_A.weight is missing, but should be \\(4, 64\\)"),
    (lambda t: t.update({FIRST: t[FIRST].T.contiguous()}), {}, "down_proj.lora_A.weight is \\(64, 4\\), but should be \\(4, 64\\)"),
    (lambda t: t.update({FIRST.replace("down", "sideways"): t[FIRST]}), {}, "made for another model: .* no linear layer .*sideways"),
    (lambda t: t.update({"something": t[FIRST]}), {}, "the tensor something is no part of a LoRA"),
    (lambda t: None, {"peft_type": "IA3"}, "only LoRA, rsLoRA and DoRA adapters are read"),
    (lambda t: None, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    (lambda t: None, {"use_dora": True}, "lora_magnitude_vector is missing"),
])
def test_an_adapter_that_does_not_fit_is_refused_by_key_and_shape(tokenizer, tmp_path, change, config, message):
    save_adapter(adapted(tokenizer), tokenizer, tmp_path, "somewhere")
    spoil(tmp_path, change, **config)
    with pytest.raises(ValueError, match=message):
        load_adapter(tiny_model("llama", tokenizer), tmp_path)


def test_a_folder_without_an_adapter_and_an_adapter_given_as_a_model_are_refused(tokenizer, tmp_path, folder):
    with pytest.raises(ValueError, match="no usable adapter here"):
        load_adapter(tiny_model("llama", tokenizer), folder)
    save_adapter(adapted(tokenizer), tokenizer, tmp_path, folder)
    with pytest.raises(ValueError, match="is an adapter, not a model: pass it by --adapter"):
        models.load_model(str(tmp_path))


# --- merging

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("four_bits", [False, True])
def test_a_merged_model_is_plain_and_does_what_the_adapted_one_did(tokenizer, kind, base, four_bits):
    model = tiny_model(base, tokenizer).eval()
    models.turn_off_dropout(model)
    plain = set(model.state_dict())
    if four_bits:
        quantize(model)
    add_adapter(model, "policy", target_modules(model, None), KINDS[kind])
    stir(model, "policy")
    before = logits(model)
    merge(model)
    assert torch.allclose(logits(model), before, atol=1e-5) and not lora_layers(model)
    assert set(model.state_dict()) == plain


def test_python_model_py_merge_says_how_far_the_saved_model_is_from_the_adapted_one(fit, folder, tmp_path):
    out, _ = fit(lora_rank=4, max_steps=3, lr=1e-2, quantize="nf4")
    result = subprocess.run([sys.executable, str(ROOT / "model.py"), "merge", "--adapter", out, "--out", tmp_path / "merged"],
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"differ from the adapted model's by at most (\S+),", result.stdout)[1]) < 1e-4
    assert "quantized to 4 bits again, its logits would differ by at most" in result.stdout
    assert weights(tmp_path / "merged").keys() == weights(folder).keys()


def test_an_adapter_that_names_no_base_is_merged_into_the_model_that_is_given(tokenizer, folder, tmp_path):
    model = tiny_model("llama", tokenizer)
    add_adapter(model, "policy", target_modules(model, None), KINDS["lora"])
    save_adapter(model, tokenizer, tmp_path / "adapter", None)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    flags = ["merge", "--adapter", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]
    with pytest.raises(UserError, match="does not name its base; give it by --model"):
        models.main(flags)
    models.main([*flags, "--model", folder])
    assert weights(tmp_path / "merged").keys() == weights(folder).keys()


# --- 4 bits

PUBLISHED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
             -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
             0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]  # 2305.14314, Appendix E


def test_the_16_levels_are_those_of_the_qlora_paper():
    assert torch.allclose(nf4_levels(), torch.tensor(PUBLISHED), atol=2e-7)


def test_codes_and_scales_equal_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    ours, absmax = nf4_quantize(weight)
    assert torch.equal(codes.flatten(), ours) and torch.allclose(state.absmax, absmax)


@pytest.mark.parametrize("shape", [(64, 64), (7, 13), (1, 1), (300, 257)])
def test_the_error_is_at_most_half_a_gap_of_the_levels_in_each_block_and_zero_stays_zero(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight[0, 0] = 0
    dense = NF4Linear(weight, None).dense()
    blocks = F.pad((dense - weight).flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    absmax = F.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64).abs().amax(1)
    spread = (absmax - absmax.mean()).abs().max() / 16  # an e4m3 number is right to a sixteenth
    gap = nf4_levels().diff().max() / 2
    assert (blocks.abs().amax(1) <= gap * absmax + spread + 1e-6).all() and dense[0, 0] == 0


def test_a_weight_takes_0_52_bytes_and_its_dense_form_is_not_kept_for_backward():
    layer = NF4Linear(torch.randn(512, 512), None)
    assert sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers()) / 512 ** 2 == pytest.approx(0.516, abs=0.001)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(torch.randn(2, 512, requires_grad=True)).sum()
    assert sum(kept) < 512 * 8


def test_unpacking_gives_the_level_of_each_code_times_the_scale_of_its_block():
    weight = torch.randn(50, 77, generator=torch.Generator().manual_seed(2))
    codes, absmax = nf4_quantize(weight)
    split = torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()
    expected = nf4_levels()[split].view(-1, 64) * absmax[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(nf4_unpack(codes, absmax, nf4_pairs(), dtype), expected.to(dtype))


class Traffic(TorchDispatchMode):
    """Kernels, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.kernels = self.bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if not operator.is_view:
            self.kernels += 1
            self.bytes += sum(x.numel() * x.element_size() for x in (*args, out) if isinstance(x, torch.Tensor))
        return out


@pytest.mark.parametrize("dtype, most", [(torch.float32, 17.1), (torch.bfloat16, 23.1)])
def test_a_dense_weight_costs_8_kernels_and_23_bytes_a_weight_without_a_compiler(dtype, most):
    layer = NF4Linear(torch.randn(512, 512), None)
    layer.dense(dtype)
    with Traffic() as traffic:
        layer.dense(dtype)
    assert traffic.kernels <= 8 and traffic.bytes / 512**2 <= most


def test_the_compiled_unpacking_has_the_same_bits_for_every_size_and_dtype():
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a compiler")
    compiled = torch.compile(nf4_unpack, dynamic=True)
    for shape in ((64, 64), (7, 13), (300, 257)):
        layer = NF4Linear(torch.randn(shape), None)
        for dtype in (torch.float32, torch.bfloat16):
            given = layer.codes, layer.absmax(), nf4_pairs(), dtype
            assert torch.equal(compiled(*given), nf4_unpack(*given))


def test_layers_are_quantized_one_by_one_on_the_device_and_no_dense_one_stays_there(tokenizer, monkeypatch):
    """"meta" is the device here: it has no values, but each tensor's place can be seen."""
    model, seen, init = tiny_model("gpt2", tokenizer).bfloat16(), [], NF4Linear.__init__

    def watched(layer, weight, bias):
        on_device = [parameter for parameter in model.parameters() if parameter.is_meta and parameter.ndim == 2]
        seen.append((weight.device.type, weight.dtype, len(on_device)))
        init(layer, weight, bias)

    monkeypatch.setattr(NF4Linear, "__init__", watched)
    quantize(model, torch.device("meta"))
    assert seen == [("meta", torch.bfloat16, 0)] * 8
    assert {buffer.device.type for layer in model.modules() if isinstance(layer, NF4Linear) for buffer in layer.buffers()} == {"meta"}


def test_a_4_bit_model_is_quantized_before_anything_is_moved_or_widened(biased, monkeypatch):
    found, move = [], models.move
    monkeypatch.setattr(models, "move", lambda model, *given: found.append({type(layer).__name__ for layer in model.model.layers[0].mlp.children()})
                        or move(model, *given))
    model = models.load_model(biased, four_bits=True)
    assert found == [{"NF4Linear", "SiLUActivation"}]
    expected = AutoModelForCausalLM.from_pretrained(biased, dtype=torch.float32)
    quantize(expected)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_the_gradient_through_4_bits_is_that_of_the_dense_weight(tokenizer):
    layer, x = NF4Linear(torch.randn(40, 24), torch.nn.Parameter(torch.randn(40))), torch.randn(3, 24, requires_grad=True)
    y = layer(x)
    assert torch.allclose(y, F.linear(x, layer.dense(), layer.bias))
    found, = torch.autograd.grad(y.square().sum(), x)
    expected, = torch.autograd.grad(F.linear(x, layer.dense(), layer.bias).square().sum(), x)
    assert torch.allclose(found, expected)
    model = tiny_model("llama", tokenizer)
    quantize(model)
    assert len([layer for layer in model.modules() if isinstance(layer, NF4Linear)]) == 14
    assert isinstance(model.lm_head, torch.nn.Linear)


# --- references

def losses_of(metrics):
    return [(row["loss"], row["rewards/margins"]) for row in metrics]


def close(a, b, tolerance=1e-9):
    return [pytest.approx(pair, abs=tolerance) for pair in losses_of(a)] == losses_of(b)


def test_a_new_adapter_with_its_base_as_reference_equals_a_second_model(fit):
    flags = dict(lora_rank=4, max_steps=4, dtype="float64")
    off, second = fit(**flags, out="off")[1], fit(**flags, ref="model", out="second")[1]
    assert close(off, second) and off[-1]["loss"] != off[0]["loss"]


def test_after_adapter_sft_the_reference_is_that_adapter_and_the_bare_base_is_caught(fit, folder):
    """The classic failure: the base instead of the SFT policy as reference, loss 0.0 and accuracy 1.0 within a few steps."""
    sft, _ = fit(loss="sft", lora_rank=4, lr=3e-2, max_steps=6, out="sft")
    dpo, metrics = fit(adapter=sft, max_steps=3, out="dpo")
    config = json.loads((dpo / "config.json").read_text())["flags"]
    assert config["ref"] == "adapter" and metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    for wrong in ("model", "adapter_off"):
        with pytest.raises(ValueError, match="an adapter on one side"):
            fit(adapter=sft, ref=wrong, max_steps=3, out=wrong)


def test_after_300_steps_from_an_sft_adapter_the_reference_is_still_the_sft_model(fit, folder, pairs, tokenizer):
    """The log gives log π and β (log π − log π_ref), so log π_ref = logps − rewards/β: that of the SFT model, at the start and at the end."""
    sft, _ = fit(loss="sft", lora_rank=4, lr=3e-2, max_steps=6, out="sft", dtype="float64")
    out, metrics = fit(adapter=sft, max_steps=300, eval_every=100, beta=0.5, dtype="float64", lr=3e-3, out="dpo")
    rows, held_out = data.hold_out(data.load_tokens(pairs, tokenizer, ("chosen", "rejected"), data.Limits(64))[0], 0.1)
    model = models.load_model(folder, torch.float64)
    load_adapter(model, sft)
    with torch.no_grad():
        expected = concatenated_forward(SequenceLogps(model), data.collate(held_out[:], 0))
    looks = [row for row in metrics if row["split"] == "eval"]
    assert [row["step"] for row in looks] == [100, 200, 300]
    for row in looks:
        for side in ("chosen", "rejected"):
            found = row[f"logps/{side}"] - row[f"rewards/{side}"] / 0.5
            assert found == pytest.approx(expected[f"{side}_logps"].mean().item(), abs=1e-9)
    assert looks[-1]["rewards/margins"] != pytest.approx(0, abs=0.1)  # while the policy has gone elsewhere


@pytest.mark.parametrize("start", ["full", "new adapter", "adapter"])
def test_a_cached_reference_gives_the_same_run_and_is_read_the_next_time(fit, tmp_path, monkeypatch, capsys, start):
    monkeypatch.chdir(tmp_path)
    flags = dict(max_steps=4, dtype="float64")
    if start == "new adapter":
        flags |= dict(lora_rank=4)
    if start == "adapter":
        flags |= dict(adapter=fit(loss="sft", lora_rank=4, lr=3e-2, max_steps=6, out="sft")[0])
    live, cached = fit(**flags, out="live")[1], fit(**flags, ref="cache", ref_batch_size=7, out="cached")[1]
    assert close(live, cached)
    assert len(list((tmp_path / "runs" / "references").iterdir())) == 1
    capsys.readouterr()
    calls = []
    compute = references.reference_logps
    monkeypatch.setattr(references, "reference_logps", lambda *given: calls.append(len(given[3])) or compute(*given))
    assert close(cached, fit(**flags, ref="cache", out="again")[1], 0)
    assert max(calls) <= 4 and "read from runs/references" in capsys.readouterr().out


def test_after_the_pass_no_reference_is_in_memory(fit, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    loaded, alive, load, step = [], [], references.load_weights, train.preference_step

    def watched(*given):
        model = load(*given)
        loaded.append(weakref.ref(model))
        return model

    for module in (train, references):
        monkeypatch.setattr(module, "load_weights", watched)
    monkeypatch.setattr(train, "preference_step", lambda *given, **named: alive.append(
        (gc.collect(), [model() is not None for model in loaded])[1]) or step(*given, **named))
    fit(ref="cache", max_steps=2)
    assert alive[-1] == [True, False]  # the policy, and no second model


def test_a_cache_is_made_anew_for_other_weights_rows_or_token_weights(fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other, _ = fit(loss="sft", max_steps=2, out="other")
    for i, flags in enumerate((dict(), dict(model=other), dict(max_length=16), dict(ld_alpha=0.5), dict(dtype="bfloat16"))):
        fit(**flags, ref="cache", max_steps=1, out=f"run{i}")
        assert len(list((tmp_path / "runs" / "references").iterdir())) == i + 1


@pytest.mark.parametrize("damage", ["torn", "short", "wrong"])
def test_a_damaged_cache_is_an_error_that_says_to_delete_it(fit, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    fit(ref="cache", max_steps=1)
    path, = (tmp_path / "runs" / "references").iterdir()
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:100])
    else:
        tensors = load_file(path)
        tensors["train"] = tensors["train"][:-1].clone() if damage == "short" else tensors["train"] - 1
        save_file(tensors, path)
    with pytest.raises(ValueError, match="delete the file, and the next run computes it again"):
        fit(ref="cache", max_steps=1, out="next")


def test_an_interrupted_pass_leaves_no_file(fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(references, "reference_logps", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        fit(ref="cache", max_steps=1)
    assert not list(tmp_path.glob("runs/references/*"))


def test_two_processes_share_the_pass_and_end_like_one(fit, folder, pairs, tmp_path):
    flags = dict(model=folder, dataset=pairs, batch_size=7, micro_batch_size=2, max_length=64, lr=1e-2, eval_share=0.1, log_every=1, dtype="float64",
                 ref="cache", lora_rank=4, quantize="nf4", max_steps=4)
    for out, processes in (("one", 0), ("two", 2)):
        (tmp_path / f"in-{out}").mkdir()
        subprocess.run(command(*(f"--{k}={v}" for k, v in flags.items()), f"--output_dir={tmp_path / out}", torchrun=processes),
                       cwd=tmp_path / f"in-{out}", capture_output=True, timeout=300)
    assert close(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two"), 1e-6)  # 4-bit bases compute in fp32
    one, two = (load_file(next(tmp_path.glob(f"in-{out}/runs/references/*.safetensors"))) for out in ("one", "two"))
    assert torch.allclose(one["train"], two["train"], atol=1e-4)


# --- TR-DPO

@pytest.mark.parametrize("start", ["full", "adapter"])
def test_a_reference_synced_all_the_way_after_each_step_is_the_policy_so_the_loss_stays_log_2(fit, start):
    flags = dict(sync_ref_every=1, sync_ref_alpha=1, max_steps=4, dtype="float64", eval_share=0, lr=1e-2)
    if start == "adapter":
        flags |= dict(adapter=fit(loss="sft", lora_rank=4, lr=3e-2, max_steps=6, out="sft")[0])
    _, metrics = fit(**flags)
    assert all(row["loss"] == pytest.approx(math.log(2), abs=1e-6) for row in metrics) and metrics[-1]["grad_norm"] > 0


def test_a_sync_moves_parameters_and_buffers_alpha_of_the_way():
    """2404.09656: θ_ref <- α θ + (1 − α) θ_ref."""
    policy, reference = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    for tensor in policy.state_dict().values():
        tensor.fill_(5)
    for _ in range(2):
        references.move_reference(argparse.Namespace(ref="model", sync_ref_every=1, sync_ref_alpha=0.25), policy, reference)
    assert torch.allclose(reference.bias, torch.full((3,), 5 * (1 - 0.75 ** 2)))
    assert torch.allclose(reference.running_mean, reference.bias) and reference.num_batches_tracked == 5


def test_a_sync_moves_a_tied_weight_once(tokenizer):
    """state_dict() has it under two names."""
    policy, reference = (SequenceLogps(tiny_model("gpt2", tokenizer)) for _ in range(2))
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 1
    before = reference.model.transformer.wte.weight.clone()
    references.move_reference(argparse.Namespace(ref="model", sync_ref_every=1, sync_ref_alpha=0.25), policy, reference)
    assert reference.model.lm_head.weight is reference.model.transformer.wte.weight
    assert torch.allclose(reference.model.lm_head.weight, before + 0.25)


@pytest.mark.parametrize("flags", [dict(sync_ref_every=2), dict(lora_rank=4, lora_dropout=0.3), dict(lora_rank=4, dora=None, rslora=None, ref="cache")])
def test_a_stopped_run_goes_on_exactly_with_its_adapter_dropout_and_moved_reference(fit, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    switches = [f"--{name}" for name, value in flags.items() if value is None]
    flags = {name: value for name, value in flags.items() if value is not None}
    whole, expected = fit(*switches, **flags, max_steps=6, out="whole")
    half, _ = fit(*switches, **flags, max_steps=6, save_every=3, out="half")
    unfinished(half)
    train.main(["--output_dir", str(half), "--resume"], ALONE)
    assert losses_of(read_metrics(half)) == losses_of(expected)
    if "lora_rank" in flags:
        first, second = (load_file(out / "adapter_model.safetensors") for out in (whole, half))
        assert all(torch.equal(first[key], second[key]) for key in first)


# --- memory and flags

def test_gradient_checkpointing_changes_no_gradient(fit):
    for flags in (dict(), dict(lora_rank=4)):
        name = str(len(flags))
        plain, less = fit(**flags, max_steps=3, dtype="float64", out=f"plain{name}")[1], fit(
            "--gradient_checkpointing", **flags, max_steps=3, dtype="float64", out=f"less{name}")[1]
        assert close(plain, less, 1e-12) and plain[0]["grad_norm"] == pytest.approx(less[0]["grad_norm"], rel=1e-12)


def test_bfloat16_keeps_the_frozen_base_in_two_bytes_and_says_what_is_held(fit, capsys):
    fit(lora_rank=4, dtype="bfloat16", max_steps=2)
    said = capsys.readouterr().out
    assert "step-0 check: the loss is 0.6931" in said and re.search(r"[\d,]+ parameters, [\d,]+ of them trained; on each rank weights", said)


def test_the_default_learning_rate_is_ten_times_that_of_full_training(fit):
    assert train.parse_args(["--model", "m", "--dataset", "d"])[0].lr == 5e-7
    assert train.parse_args(["--model", "m", "--dataset", "d", "--lora_rank", "8"])[0].lr == 5e-6


@pytest.mark.parametrize("flags, message", [
    ("--lora_alpha 8", "--lora_alpha: is read for a new adapter only; give --lora_rank"),
    ("--dora", "--dora: is read for a new adapter only"), ("--lora_target q_proj --adapter x --model m", "and no --adapter"),
    ("--lora_rank 4 --adapter x --model m", "--lora_rank 4: --adapter x has its own rank"),
    ("--lora_rank 4 --lora_dropout 1", "--lora_dropout 1.0: leaves nothing"),
    ("--quantize nf4", "--quantize nf4: 4-bit weights can't be trained"),
    ("--ref adapter", "--ref adapter: there is no --adapter"), ("--ref adapter_off", "--ref adapter_off: there is no adapter to turn off"),
    ("--ref none", "--ref none: this loss reads a reference"), ("--ref model --reference_free", "--ref model: is not read with --reference_free"),
    ("--ref_model x --lora_rank 4 --ref adapter_off", "--ref_model x: is not read with --ref adapter_off"),
    ("--ref_batch_size 4", "--ref_batch_size 4: is read with --ref cache only"),
    ("--sync_ref_every 4 --ref cache", "--sync_ref_every 4: a reference of --ref cache can't move"),
    ("--sync_ref_every 4 --lora_rank 2", "--sync_ref_every 4: a reference of --ref adapter_off can't move"),
    ("--sync_ref_alpha 0.5", "--sync_ref_alpha 0.5: is read with --sync_ref_every"),
    ("--sync_ref_every 4 --sync_ref_alpha 1.5", "--sync_ref_alpha 1.5: must be in (0, 1]"),
    ("--loss simpo --ref model", "--ref: --loss simpo has no reference"),
    ("--loss simpo --sync_ref_every 3", "--sync_ref_every: --loss simpo has no reference"),
    ("--adapter nowhere", "nowhere: no usable adapter here"),
])
def test_a_flag_that_would_not_be_read_is_refused_with_the_reason(flags, message):
    with pytest.raises(ValueError) as error:
        train.parse_args(flags.split())
    assert message in str(error.value)
