"""Packed rows: the same log-probs as padded ones, or a reason why not."""
import itertools
import json
import os
import re
import types
import weakref

import numpy as np
import pytest
import torch
import transformers
from conftest import differences, tiny_model
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import data
import dpo
import lora
import model as models
import packing
import train
from dpo import SequenceLogps, concatenated_forward, preference_step
from losses import sft, sigmoid
from packing import ChunkedLogps

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1, "head_dim": 8, "pad_token_id": 0}
WINDOW = {"sliding_window": 6}  # shorter than the rows
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
PACKS = {  # config: what differs from SIZES
    "Llama": {}, "Qwen2": {"use_sliding_window": True, "max_window_layers": 1, **WINDOW}, "Qwen3": {}, "Mistral": WINDOW, "Gemma": {},
    "Phi3": WINDOW, "Olmo2": {}, "Olmo3": WINDOW, "GPTNeoX": {}, "Gemma3Text": WINDOW, "Cohere": {},
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
    "Mixtral": EXPERTS}
PACKS_NOT = {  # and a word of the reason
    "Bloom": ({"n_layer": 2, "n_head": 4}, "eager"), "Gemma2": ({}, "eager|softcap"), "GptOss": (EXPERTS, "eager"),
    "Mamba": ({"state_size": 4}, "eager"), "Lfm2": ({"layer_types": ["conv", "full_attention"], "initializer_range": 0.02}, "other tokens"),
    "RecurrentGemma": ({"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8}, "not what it is"),
    "Llama4Text": ({"num_local_experts": 2, "attention_chunk_size": 64}, "other tokens"),
    "Qwen3Next": ({**EXPERTS, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                   "layer_types": ["linear_attention", "full_attention"], "moe_intermediate_size": 32, "num_experts": 4}, "other tokens")}


def can_pack(model):
    return packing.can_pack(SequenceLogps(model))


def build(name, **options):
    torch.manual_seed(0)
    sizes = {} if name in ("GPT2", "Bloom") else SIZES
    config = getattr(transformers, f"{name}Config")(**{"vocab_size": 97, "hidden_size": 32, **sizes, **options})
    return transformers.AutoModelForCausalLM.from_config(config)


def make_columns(seed=1, prompts=(9, 1, 14, 3, 7), chosen=(5, 8, 1, 12, 3), rejected=(4, 1, 10, 2, 9)):
    """Among them a prompt of one token and answers of one."""
    random = np.random.default_rng(seed)
    sizes = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected}
    return {"id": [f"row {i}" for i in range(len(prompts))]} | {
        name: [random.integers(1, 97, size).tolist() for size in lengths] for name, lengths in sizes.items() if lengths}


COLUMNS = make_columns()
PADDED, PACKED = data.collate(COLUMNS, 0), packing.collate(COLUMNS)


def outcome(model, batch, loss=sigmoid, **variant):
    """Losses of the pairs and the gradient of their mean, all parameters in one vector."""
    losses, _ = preference_step(model, None, batch, loss, {}, **({"reference_free": True} if loss is sigmoid else {}), **variant)
    model.zero_grad()
    losses.mean().backward()
    return losses.detach(), torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture
def llama():
    return SequenceLogps(build("Llama").double())


# --- equality

@pytest.mark.parametrize("name", PACKS)
def test_packed_rows_have_the_loss_and_the_gradient_of_padded_ones(name):
    """In float64 where the model can: transformers computes its norms in fp32, which the gradient shows."""
    model = SequenceLogps(build(name, **PACKS[name]).to(torch.float32 if name == "Mixtral" else torch.float64))
    (packed, packed_gradient), (padded, gradient) = outcome(model, PACKED), outcome(model, PADDED)
    assert distance(packed, padded) < (1e-6 if name == "Mixtral" else 1e-12)
    assert distance(packed_gradient, gradient) < 1e-6


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2", "Gemma"])
@pytest.mark.parametrize("autocast", [False, True])
def test_packing_rounds_no_more_than_padding(name, autocast):
    """Both are compared with float64, in fp32 and in bf16 autocast."""
    model = SequenceLogps(build(name, **PACKS[name]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        packed, padded = outcome(model, PACKED), outcome(model, PADDED)
    for found, other, exact in zip(packed, padded, outcome(model.double(), PADDED)):
        assert distance(found, exact) < 2 * distance(other, exact) + 1e-7


@pytest.mark.parametrize("variant", [{"wpo": True}, {"ld_alpha": 0.3}, {"wpo": True, "ld_alpha": 0.0}])
def test_variants_of_a_loss_are_the_same_packed(llama, variant):
    (packed, packed_gradient), (padded, gradient) = outcome(llama, PACKED, **variant), outcome(llama, PADDED, **variant)
    assert distance(packed, padded) < 1e-12 and distance(packed_gradient, gradient) < 1e-6


def test_every_output_has_the_name_and_value_it_has_padded(llama):
    packed, padded = (concatenated_forward(llama, batch, alignment=True) for batch in (PACKED, PADDED))
    assert packed.keys() == padded.keys()
    assert all(torch.allclose(packed[name], padded[name], rtol=1e-10) for name in padded)


@pytest.mark.parametrize("variant", [{}, {"wpo": True}, {"ld_alpha": 0.3}])
def test_forward_and_backward_never_wait_to_read_a_value_from_the_device(monkeypatch, variant):
    """Tensors on "meta" have none, so that a step there fails where one on a GPU would wait. (Padded, transformers' mask reads one.)
    The attention that only a GPU runs is at least called there as torch allows."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which knows no "meta"
    if not variant:
        monkeypatch.setattr(packing, "one_by_one", packing.in_one_call)
    with torch.device("meta"):
        policy, reference = (SequenceLogps(build("Llama")) for _ in range(2))
    policy.bare_head = reference.bare_head = True
    batch = train.collate(make_columns(), types.SimpleNamespace(pad_token_id=0), torch.device("meta"), packed=True)
    losses, metrics = preference_step(policy, reference, batch, sigmoid, **variant)
    losses.sum().backward()
    assert losses.is_meta and all(value.is_meta for value in metrics.values())
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_rows_without_rejected_answers_are_prompt_and_answer(llama):
    columns = make_columns(rejected=None)
    packed, padded = packing.collate(columns), data.collate(columns, 0)
    assert packed["input_ids"].shape[1] == sum(len(p) + len(a) - 1 for p, a in zip(columns["prompt_ids"], columns["chosen_ids"]))
    (packed, packed_gradient), (padded, gradient) = outcome(llama, packed, sft), outcome(llama, padded, sft)
    assert distance(packed, padded) < 1e-12 and distance(packed_gradient, gradient) < 1e-6


@pytest.mark.parametrize("lengths", [dict(prompts=(1,), chosen=(1,), rejected=(1,)), dict(prompts=(1, 1), chosen=(2, 1), rejected=(1, 2))])
def test_the_shortest_rows_there_can_be(llama, lengths):
    columns = make_columns(**lengths)
    assert distance(outcome(llama, packing.collate(columns))[0], outcome(llama, data.collate(columns, 0))[0]) < 1e-12


def test_gradient_checkpointing_recomputes_packed_rows_as_packed(llama):
    expected = outcome(llama, PACKED)
    llama.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    llama.train()
    for found, value in zip(outcome(llama, PACKED), expected):
        assert torch.equal(found, value)
    assert distance(outcome(llama, PADDED)[1], expected[1]) < 1e-6
    other = packing.collate(make_columns(seed=2, prompts=(3, 8), chosen=(2, 9), rejected=(6, 1)))
    batches = [preference_step(llama, None, batch, sigmoid, reference_free=True)[0] for batch in (PACKED, other)]  # then both backward
    llama.zero_grad()
    batches[0].mean().backward()
    assert distance(torch.cat([p.grad.flatten() for p in llama.parameters()]), expected[1]) < 1e-12


def test_an_adapter_on_and_off_and_a_frozen_base(tokenizer):
    model = tiny_model("llama", tokenizer).double()
    bare = SequenceLogps(model)
    reference = concatenated_forward(bare, PADDED)["rejected_logps"]
    lora.add_adapter(model, "policy", lora.target_modules(model, None), lora.LoraSettings(4, 8.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".B." in name:
                parameter.normal_(std=0.1)
    assert distance(outcome(bare, PACKED)[1], outcome(bare, PADDED)[1]) < 1e-6
    assert distance(reference, concatenated_forward(bare, PACKED)["rejected_logps"]) > 1e-3
    with lora.use_adapter(model, None):
        assert distance(concatenated_forward(bare, PACKED)["rejected_logps"], reference) < 1e-12


def attention_inputs(groups):
    torch.manual_seed(0)
    layout = packing.layout_of(PACKED["packed"], torch.device("cpu"))
    tokens = PACKED["input_ids"].shape[1]
    query, key, value = (torch.randn(tokens, heads, 8) for heads in (4, 4 // groups, 4 // groups))
    return query, key.index_select(0, layout.keys), value.index_select(0, layout.keys), layout


@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_kernel_for_gpus_is_asked_for_the_same_attention(monkeypatch, window, groups):
    """By what its documentation says it does. The kernel itself runs on no CPU."""
    def flash(query, key, value, queries, keys, most_queries, most_keys, *, dropout_p, is_causal, return_debug_mask, scale,
              window_size_left, window_size_right):
        assert queries.dtype == keys.dtype == torch.int32 and dropout_p == 0 and is_causal == (window is None)
        assert (most_queries, most_keys) == (queries.diff().max(), keys.diff().max())
        out = []
        for (a, b), (c, d) in zip(queries.unfold(0, 2, 1).tolist(), keys.unfold(0, 2, 1).tolist()):
            behind = (torch.arange(b - a)[:, None] + (d - c) - (b - a)) - torch.arange(d - c)  # aligned at the last key
            mask = (behind >= -window_size_right) & ((behind <= window_size_left) if window_size_left >= 0 else True)
            heads = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
            out.append(torch.nn.functional.scaled_dot_product_attention(*heads, mask, scale=scale, enable_gqa=True).transpose(0, 1))
        return torch.cat(out), None, None, None, None

    inputs = attention_inputs(groups)
    expected = packing.one_by_one(*inputs, 0.3, window)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    assert torch.allclose(packing.in_one_call(*inputs, 0.3, window), expected, atol=1e-6)


@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize("groups", [1, 2])
def test_segments_whose_prompt_is_computed_again_have_the_attention_of_masked_ones(window, groups):
    inputs = attention_inputs(groups)
    leaves = [x.double().requires_grad_() for x in inputs[:3]]
    found, expected = (packing.one_by_one(*leaves, inputs[3], 0.3, window, masked) for masked in (False, True))
    assert torch.allclose(found, expected, atol=1e-12)
    slope = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * slope).sum(), leaves) for out in (found, expected)]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients))


def test_queries_and_keys_in_fp32_and_values_in_bf16_meet_in_the_dtype_of_autocast():
    """As rotary embeddings leave them. A kernel that takes all segments at once needs one dtype."""
    model, seen = SequenceLogps(build("Llama")), []
    packing.enable(model.model)
    inner = packing.one_by_one

    def spy(query, key, value, *more):
        seen.append({query.dtype, key.dtype, value.dtype})
        return inner(query, key, value, *more)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(packing, "one_by_one", spy)
        concatenated_forward(model, PACKED)
    assert seen == [{torch.bfloat16}] * 2


# --- what makes it fast, and what it leaves alone

def test_a_prompt_is_computed_once_and_nothing_is_padded():
    prompt, chosen, rejected = [5, 6, 7], [8, 9, 0], [10, 11, 0]
    batch = packing.collate({"prompt_ids": [prompt], "chosen_ids": [chosen], "rejected_ids": [rejected]})
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11]]  # the last token of an answer predicts nothing
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3, 4]]
    assert batch["labels"].tolist() == [chosen, rejected]
    assert batch["predictors"].tolist() == [[2, 3, 4], [2, 5, 6]]  # the end of the prompt predicts both answers


def test_a_model_that_has_run_packed_runs_padded_and_is_saved_as_before(llama, tmp_path):
    before = concatenated_forward(llama, PADDED)["chosen_logps"]
    llama.model.save_pretrained(tmp_path / "before")
    concatenated_forward(llama, PACKED)
    assert torch.equal(concatenated_forward(llama, PADDED)["chosen_logps"], before)
    llama.model.save_pretrained(tmp_path / "after")
    assert json.loads((tmp_path / "after/config.json").read_text()) == json.loads((tmp_path / "before/config.json").read_text())
    assert packing.NAME not in (tmp_path / "after/config.json").read_text()


def test_a_model_with_a_window_runs_padded_after_packed_with_its_window():
    model = SequenceLogps(build("Mistral", **WINDOW).double())
    before = concatenated_forward(model, PADDED)["chosen_logps"]
    packing.enable(model.model)
    assert torch.equal(concatenated_forward(model, PADDED)["chosen_logps"], before)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2", "Olmo2"])
def test_another_answer_leaves_every_other_log_prob_as_it_was_to_the_bit(name):
    model = SequenceLogps(build(name, **PACKS[name]))
    before = torch.cat([concatenated_forward(model, PACKED)[f"{side}_logps"] for side in ("chosen", "rejected")])
    for i, side in itertools.product(range(5), ("chosen", "rejected")):
        other = COLUMNS | {f"{side}_ids": [[(t + 1) % 97 for t in ids] if j == i else ids for j, ids in enumerate(COLUMNS[f"{side}_ids"])]}
        after = concatenated_forward(model, packing.collate(other))
        changed = torch.cat([after["chosen_logps"], after["rejected_logps"]]) != before
        assert changed.nonzero().flatten().tolist() == [i + 5 * (side == "rejected")]


# --- the self-check

@pytest.mark.parametrize("name", PACKS)
def test_a_model_that_packs_right_is_found_to(name):
    model = build(name, **PACKS[name])
    assert can_pack(model) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert can_pack(model) is None


def sharp(layers=30, scale=7.0):
    """A deep model whose attention is nearly one-hot, so that rounding grows from layer to layer."""
    model = build("Llama", num_hidden_layers=layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= scale
            layer.self_attn.k_proj.weight *= scale
    return model


def test_the_check_allows_what_a_deep_model_rounds_and_still_sees_a_wrong_layout(monkeypatch):
    model = sharp()
    assert can_pack(model) is None
    monkeypatch.setattr(packing, *MUTATIONS["positions go on"])
    assert "is not what it is in a row of its own: it differs by" in can_pack(model)  # says its numbers


@pytest.mark.skipif("REAL_MODEL" not in os.environ, reason="REAL_MODEL names the folder of a pretrained model")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_real_model_packs_and_the_check_is_four_short_forwards_for_each_dtype(autocast):
    module, calls = SequenceLogps(models.load_model(os.environ["REAL_MODEL"])), []
    module.register_forward_pre_hook(lambda *call: calls.append(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert packing.can_pack(module) is None
    assert len(calls) == 4 * (1 + autocast)


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen3", "GPT2", "Gemma", "Olmo2"])
def test_right_padded_rows_need_no_mask(name):
    """Padding comes after all that is scored, and a causal model does not look there."""
    model = SequenceLogps(build(name, **PACKS[name]).double())
    assert packing.can_drop_mask(model) is None
    expected, gradient = outcome(model, PADDED)
    model.needs_mask = False
    found, other = outcome(model, PADDED)
    assert distance(found, expected) < 1e-12 and distance(other, gradient) < 1e-6


def test_a_model_that_looks_ahead_needs_its_mask_and_cannot_be_packed():
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                     intermediate_size=64, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model = transformers.BertLMHeadModel(config)  # is_decoder is not set, so its attention is bidirectional
    for verdict in (packing.can_drop_mask, packing.can_pack):
        assert "depends on other tokens" in verdict(SequenceLogps(model))


def test_an_error_of_a_kernel_is_a_reason_and_an_error_of_ours_is_a_bug(monkeypatch):
    def refuse(*given, **named):
        raise RuntimeError("head_size should be a multiple of 8")

    model = SequenceLogps(build("Llama"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
        assert "head_size should be a multiple of 8" in packing.can_pack(model)
    monkeypatch.setattr(packing, "PROMPTS", None)
    with pytest.raises(TypeError):
        packing.can_pack(model)


@pytest.mark.parametrize("name", PACKS_NOT)
def test_a_model_that_cannot_be_packed_is_found_out(name):
    options, reason = PACKS_NOT[name]
    assert re.search(reason, can_pack(build(name, **options)))


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "position_bias"])
def test_what_attention_would_have_to_add_is_refused(argument):
    tensor = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match=argument):
        packing.attention(None, tensor, tensor, tensor, None, packed=((1, 1, 1),), **{argument: tensor})


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Lfm2"])
def test_the_check_leaves_the_model_and_the_random_numbers_alone(name):
    model = build(name, **(WINDOW if name == "Mistral" else PACKS_NOT["Lfm2"][0] if name == "Lfm2" else {})).eval()
    config, random, hooks = model.config.to_dict(), torch.get_rng_state(), len(model.get_input_embeddings()._forward_hooks)
    windows = [getattr(module, "sliding_window", None) for module in model.modules()]
    with torch.no_grad():
        can_pack(model)
        assert not torch.is_grad_enabled()
    assert model.config.to_dict() == config and model.config._attn_implementation == "sdpa" and not model.training
    assert torch.equal(torch.get_rng_state(), random) and len(model.get_input_embeddings()._forward_hooks) == hooks
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert [getattr(module, "sliding_window", None) for module in model.modules()] == windows


def with_batch(change):
    """A wrong collate: its batch, changed."""
    right = packing.collate

    def collate(rows):
        batch = right(rows)
        change(batch)
        return batch

    return "collate", collate


def restart(batch):  # at 0, as if a rejected answer were a row of its own
    batch["position_ids"] = torch.cat([torch.arange(n) for p, c, r in batch["packed"] for n in (p + c, r)])[None]


def go_on(batch):  # after the chosen answer
    batch["position_ids"] = torch.cat([torch.arange(sum(lengths)) for lengths in batch["packed"]])[None]


def one_later(batch):
    batch["predictors"] = torch.where(batch["predictors"] > 0, batch["predictors"] + 1, 0).clamp(max=batch["input_ids"].shape[1] - 1)


def first_of_rejected(batch):  # predicted by what stands before it in the row, which is the chosen answer
    half = len(batch["labels"]) // 2
    ends = np.cumsum(batch["packed"])
    batch["predictors"][half:, 0] = torch.from_numpy(ends[1::3] - 1)


SEGMENTS = packing.segments
MUTATIONS = {
    "positions restart at 0": with_batch(restart), "positions go on": with_batch(go_on),
    "every predictor one later": with_batch(one_later), "the end of chosen predicts rejected": with_batch(first_of_rejected),
    "rejected sees chosen": ("segments", lambda packed: [
        (p, n and first - p, first, c) for p, n, first, c in SEGMENTS(packed)]),
    "rejected sees no prompt": ("segments", lambda packed: [(p, 0, first, c) for p, n, first, c in SEGMENTS(packed)]),
    "rejected sees all but the end of the prompt": ("segments", lambda packed: [(p, max(0, n - 1), first, c) for p, n, first, c in SEGMENTS(packed)]),
    "a pair sees the pair before": ("segments", lambda packed: [(0, first if n == 0 else n, first, c) for p, n, first, c in SEGMENTS(packed)]),
    "one token more": ("visible", lambda q, k, w, device: torch.ones(q, k, dtype=torch.bool).tril(k - q + 1)),
    "windows forgotten": ("visible", lambda q, k, w, device: torch.ones(q, k, dtype=torch.bool).tril(k - q)),
    "windows one wider": ("visible", lambda q, k, w, device: torch.ones(q, k, dtype=torch.bool).tril(k - q).triu(k - q - w)),
    "aligned at the first key": ("visible", lambda q, k, w, device: torch.ones(q, k, dtype=torch.bool).tril())}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_layout_that_is_wrong_is_refused(monkeypatch, mutation, autocast):
    model = build("Mistral", **WINDOW)
    monkeypatch.setattr(packing, *MUTATIONS[mutation])
    packing.layout_of.cache_clear()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert can_pack(model)
    packing.layout_of.cache_clear()


# --- log-probs without all logits at once

@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_chunked_log_probs_are_those_of_all_logits_in_value_and_gradient(monkeypatch, bias, frozen):
    monkeypatch.setattr(packing, "CHUNK", {"cpu": 97 * 4})  # at most 4 positions at a time
    monkeypatch.setattr(packing, "CACHE", 97 * 3)  # in parts of 3 and 1
    torch.manual_seed(0)
    hidden, weight, offset = torch.randn(23, 16).double(), torch.randn(97, 16).double(), torch.randn(97).double()
    targets, slope, gradients = torch.randint(97, (23,)), torch.randn(23).double(), []
    for function in (lambda *given: ChunkedLogps.apply(*given, False)[0], lambda *given: ChunkedLogps.apply(*given, True)[0],
                     lambda h, w, b, t: dpo.selected_logps(torch.nn.functional.linear(h, w, b), t)):
        parts = [x.clone().requires_grad_(not frozen or x is hidden) for x in (hidden, weight, offset)]
        logps = function(parts[0], parts[1], parts[2] if bias else None, targets)
        (logps * slope).sum().backward()
        gradients.append([logps.detach(), *(part.grad for part in parts)])
    for found, kept, expected in zip(*gradients):
        assert found is kept is expected is None or all(torch.allclose(x, expected, rtol=1e-12, atol=1e-12) for x in (found, kept))


@pytest.mark.parametrize("name, options", [("Llama", {}), ("Llama", {"tie_word_embeddings": True}), ("GPT2", PACKS["GPT2"])])
@pytest.mark.parametrize("batch", [PADDED, PACKED], ids=["padded", "packed"])
def test_many_positions_are_scored_in_chunks_and_change_nothing(monkeypatch, name, options, batch):
    model = SequenceLogps(build(name, **options).double())
    whole, gradient = outcome(model, batch)
    monkeypatch.setattr(packing, "KEPT_LOGITS", 97 * 20)
    monkeypatch.setattr(packing, "CHUNK", {"cpu": 97 * 5})
    monkeypatch.setattr(dpo, "selected_logps", None)  # not called
    found, chunked = outcome(model, batch)
    assert distance(found, whole) < 1e-12 and distance(chunked, gradient) < 1e-6


@pytest.mark.parametrize("budget, alive", [(97 * 23, [5, 4, 3, 2, 1]), (97 * 12, [2, 1, 0, 0, 0])])
def test_logits_are_kept_up_to_the_budget_let_go_one_by_one_and_made_again_for_a_second_backward(monkeypatch, budget, alive):
    monkeypatch.setattr(packing, "CHUNK", {"cpu": 97 * 5})
    monkeypatch.setattr(packing, "KEPT_LOGITS", budget)
    hidden, weight, targets = torch.randn(23, 16).double(), torch.randn(97, 16).double().requires_grad_(), torch.randint(97, (23,))
    logps, _ = ChunkedLogps.apply(hidden, weight, None, targets, True)
    kept, found = [weakref.ref(logits) for logits in logps.grad_fn.kept], []
    parts = packing.cached_parts
    monkeypatch.setattr(packing, "cached_parts", lambda *given: found.append(sum(x() is not None for x in kept)) or parts(*given))
    first, second = (torch.autograd.grad(logps.sum(), weight, retain_graph=True)[0] for _ in range(2))
    assert found == alive + [0] * 5 and torch.equal(first, second)


def test_chunks_under_autocast_round_as_all_logits_do(monkeypatch):
    model = SequenceLogps(build("Llama"))
    exact = outcome(model.double(), PACKED)
    with torch.autocast("cpu", torch.bfloat16):
        kept = outcome(model.float(), PACKED)
        monkeypatch.setattr(packing, "KEPT_LOGITS", 97 * 20)
        chunked = outcome(model, PACKED)
        monkeypatch.setattr(model, "bare_head", False)
        whole = outcome(model, PACKED)
    for found in (kept, chunked):
        assert all(distance(x, value) < 1.5 * distance(other, value) + 1e-7 for x, other, value in zip(found, whole, exact))


class Largest(TorchDispatchMode):
    """The most numbers that a tensor had which an operation returned."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if torch.is_tensor(tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


@pytest.mark.parametrize("variant", [{}, {"wpo": True}])
def test_no_tensor_has_a_number_for_each_scored_token_and_word(monkeypatch, variant):
    model = SequenceLogps(build("Llama", vocab_size=1009).double())
    expected = outcome(model, PACKED, **variant)
    monkeypatch.setattr(packing, "KEPT_LOGITS", 1)
    monkeypatch.setattr(packing, "CHUNK", {"cpu": 1009 * 7})
    scored = int((PACKED["labels"] != dpo.IGNORE).sum())
    with Largest() as largest:
        losses, _ = preference_step(model, None, PACKED, sigmoid, reference_free=True, **variant)
        losses.mean().backward()
    assert 1009 * 32 <= largest.numbers < 1009 * scored  # the head itself is 1009 x 32
    assert all(distance(x, y) < 1e-12 for x, y in zip(outcome(model, PACKED, **variant), expected))


def test_a_head_that_scales_its_logits_is_asked_for_them_packed_too(monkeypatch):
    model = SequenceLogps(build("Cohere", logit_scale=0.5).double())
    monkeypatch.setattr(packing, "KEPT_LOGITS", 1)
    assert not model.bare_head and distance(outcome(model, PACKED)[0], outcome(model, PADDED)[0]) < 1e-12


# --- the flags

def test_packed_and_padded_runs_end_with_the_same_weights_but_for_rounding(fit):
    runs = [fit(*flags, out=str(i), dtype="float64", epochs=2, micro_batch_size=None if "tokens" in flags[-1] else 3)[0] for i, flags in enumerate((
        ["--attention=padded"], ["--attention=packed"], ["--attention=packed", "--tokens_per_micro_batch=70"], ["--tokens_per_micro_batch=1"]))]
    for other in runs[1:]:
        assert not differences(runs[0], other, 1e-5)
    flags = [json.loads((run / "config.json").read_text())["flags"] for run in runs]
    assert [(f["attention"], f["tokens_per_micro_batch"]) for f in flags] == [("padded", None), ("packed", None), ("packed", 70), ("padded", 1)]


def test_auto_says_which_path_it_took_and_why_not_the_other(fit, tokenizer, tmp_path, monkeypatch, capsys):
    fit(max_steps=1, out="short")
    assert "attention: padded rows; packed, rows as short as these would be slower" in capsys.readouterr().out
    monkeypatch.setattr(packing, "BREAK_EVEN", 0)
    fit(max_steps=1, out="long", lora_rank=2, lora_dropout=0.1)
    assert "attention: packed rows\n" in capsys.readouterr().out
    models.save_model(build("Lfm2", **PACKS_NOT["Lfm2"][0] | {"vocab_size": len(tokenizer)}), tokenizer, tmp_path / "lfm2")
    fit(max_steps=1, out="lfm2 out", model=tmp_path / "lfm2")
    assert "attention: padded rows; an answer's log-prob depends on other tokens than its own" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--attention packed: an answer's log-prob depends on other tokens"):
        fit("--attention=packed", max_steps=1, out="not", model=tmp_path / "lfm2")


def test_long_rows_are_packed_and_those_of_the_world_are_not():
    lengths = {"hh": (117, 39, 208), "world": (3, 4, 11), "chosen alone": (117, 39, 156)}
    arrays = {name: [np.full(100, n) for n in found] for name, found in lengths.items()}
    assert packing.is_faster(*arrays["hh"], 4, 64) and not packing.is_faster(*arrays["world"], 128, 64)
    assert not packing.is_faster(*arrays["chosen alone"], 4, 64)  # nothing is shared and nothing padded
    uneven = np.where(np.arange(100) % 4, 20, 300)  # one long prompt in each batch
    assert packing.is_faster(uneven, np.full(100, 39), uneven + 39, 4, 64)


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_packs_hold_each_pair_once_fit_the_budget_and_are_as_many_on_each_rank(ranks):
    tokens = np.random.default_rng(0).integers(10, 90, 200)
    window = np.random.default_rng(1).permutation(200)[:50]
    found = [data.micro_batches(window, 150, rank, ranks, tokens) for rank in range(ranks)]
    assert len({len(pieces) for pieces in found}) == 1
    assert [i for pieces in found for piece, weight in pieces for i in piece if weight] == window.tolist()
    assert all(tokens[piece].sum() <= 150 for pieces in found for piece, _ in pieces)
    assert [len(piece) for piece, _ in data.micro_batches(window[:3], 1, 0, 1, tokens)] == [1, 1, 1]  # a longer row goes alone
    assert [weight for rank in range(4) for _, weight in data.micro_batches(window[:2], 150, rank, 4, tokens)] == [1, 1, 0, 0]


# --- many processes

CASES = [("fsdp", 2**27, False), ("fsdp", 97 * 20, False), ("fsdp", 97 * 20, True), ("ddp", 97 * 20, True)]  # KEPT_LOGITS, tied head


def on_one_of_two_ranks(rank, folder):
    """What the rank finds on its own rows goes to `folder`/rank."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = []
    for kind, packing.KEPT_LOGITS, tied in CASES:
        model = SequenceLogps(build("Llama", tie_word_embeddings=tied).double())
        for part in (*model.model.model.layers, model) if kind == "fsdp" else ():
            fully_shard(part)
        policy = torch.nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
        losses = preference_step(policy, None, packing.collate(make_columns(seed=rank)), sigmoid, reference_free=True)[0]
        losses.mean().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        if kind == "fsdp":
            gradients = {name: gradient.full_tensor() for name, gradient in gradients.items()}
        found.append((losses.detach(), gradients))
    torch.save(found, f"{folder}/{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_with_ddp_and_fsdp2_find_what_one_process_does(tmp_path):
    torch.multiprocessing.spawn(on_one_of_two_ranks, (str(tmp_path),), nprocs=2)
    for (_, _, tied), *ranks in zip(CASES, *(torch.load(tmp_path / str(rank)) for rank in range(2))):
        model = SequenceLogps(build("Llama", tie_word_embeddings=tied).double())
        for rank, (losses, _) in enumerate(ranks):
            expected, _ = preference_step(model, None, data.collate(make_columns(seed=rank), 0), sigmoid, reference_free=True)
            (expected.mean() / 2).backward()
            assert distance(losses, expected.detach()) < 1e-12
        assert all(distance(ranks[0][1][name], p.grad) < 1e-6 for name, p in model.named_parameters())
