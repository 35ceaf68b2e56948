"""Packed rows have the log-probs and gradients of padded rows, and fewer tokens."""
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, weights
from steps import (
    PACKS,
    PACKS_NOT,
    WINDOW,
    Words,
    build,
    distance,
    flat_gradient,
    make_batch,
    make_columns,
    outcome,
    preference_step,
)

import batches
import data
import lora
import model as models
import packing
from dpo import concatenated_forward
from logps import FastLogps
from losses import sft, sigmoid

COLUMNS = make_columns()
PADDED = make_batch(COLUMNS)  # with labels: its log-probs are those of dpo.get_batch_logps
PACKED = make_batch(COLUMNS, packed=True)


@pytest.fixture
def llama():
    return FastLogps(build("Llama").double())


def side_logps(module, batch):
    """(2B,) log-probs, of the chosen answers first."""
    return concatenated_forward(module, batch)["logps"].T.flatten()


# --- Packed rows equal padded rows ----------------------------------------------------------------

@pytest.mark.parametrize("name", PACKS)
def test_packed_rows_have_the_loss_and_the_gradient_of_padded_rows(name):
    """In float64, except Mixtral, whose router is float32. The gradients differ by more than the
    losses, because transformers computes norms in float32."""
    dtype = torch.float32 if name == "Mixtral" else torch.float64
    module = FastLogps(build(name, **PACKS[name]).to(dtype))
    packed, packed_gradient = outcome(module, PACKED)
    padded, gradient = outcome(module, PADDED)
    assert distance(packed, padded) < (1e-6 if name == "Mixtral" else 1e-12)
    assert distance(packed_gradient, gradient) < 1e-6


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2", "Gemma"])
@pytest.mark.parametrize("autocast", [False, True])
def test_packing_rounds_no_more_than_padding(name, autocast):
    """Both are compared with float64, in float32 and in bfloat16 autocast."""
    module = FastLogps(build(name, **PACKS[name]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        packed = outcome(module, PACKED)
        padded = outcome(module, PADDED)
    exact = outcome(module.double(), PADDED)
    for found, other, expected in zip(packed, padded, exact):
        assert distance(found, expected) < 2 * distance(other, expected) + 1e-7


@pytest.mark.parametrize("variants", [
    {"wpo": True},
    {"ld_alpha": 0.3},
    {"wpo": True, "ld_alpha": 0.0},
])
def test_variants_of_a_loss_are_the_same_packed(llama, variants):
    packed_batch = make_batch(COLUMNS, packed=True, **variants)
    padded_batch = make_batch(COLUMNS, **variants)
    packed, packed_gradient = outcome(llama, packed_batch, **variants)
    padded, gradient = outcome(llama, padded_batch, **variants)
    assert distance(packed, padded) < 1e-12
    assert distance(packed_gradient, gradient) < 1e-6


def test_every_output_has_the_name_and_the_value_of_padded_rows(llama):
    padded_batch = make_batch(COLUMNS, full_logits=False)
    packed = concatenated_forward(llama, PACKED, alignment=True)
    padded = concatenated_forward(llama, padded_batch, alignment=True)
    assert packed.keys() == padded.keys()
    for name, values in padded.items():
        assert torch.allclose(packed[name], values, rtol=1e-10)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("variants", [{}, {"wpo": True}, {"ld_alpha": 0.3}])
def test_forward_and_backward_never_wait_to_read_a_value_from_the_device(
        monkeypatch, packed, variants):
    """Tensors on the device "meta" have no values. Every step that would wait for a GPU to read a
    value fails there. Padded rows have no mask, because transformers reads a value of the mask.

    Without variants, packed rows use the attention that only a GPU runs, so that its arguments are
    checked by torch.
    """
    # torch does not know whether "meta" has autocast.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    if not variants:
        monkeypatch.setattr(packing, "one_by_one", packing.in_one_call)
    device = torch.device("meta")
    with device:
        policy, reference = FastLogps(build("Llama")), FastLogps(build("Llama"))
    for module in (policy, reference):
        module.bare_head = True
        packing.enable(module.model)
    task = batches.make_task(
        sigmoid, {}, batches.Variants(**variants), "float32", device, packed, masked=False
    )
    tokenizer = Words(pad_token_id=0, size=97)
    batch = batches.collate(COLUMNS, tokenizer, device, task.row_format)
    losses, metrics = preference_step(policy, reference, batch, sigmoid, **variants)
    losses.sum().backward()
    assert losses.is_meta
    assert all(value.is_meta for value in metrics.values())
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_rows_without_rejected_answers_are_prompt_and_answer(llama):
    columns = make_columns(rejected=None)
    packed_batch = make_batch(columns, packed=True)
    tokens = 0
    for prompt, (answer,) in zip(columns["prompt_ids"], columns["answer_ids"]):
        tokens += len(prompt) + len(answer) - 1
    assert packed_batch["inputs"]["input_ids"].shape == (1, tokens)
    packed, packed_gradient = outcome(llama, packed_batch, sft)
    padded, gradient = outcome(llama, make_batch(columns), sft)
    assert distance(packed, padded) < 1e-12
    assert distance(packed_gradient, gradient) < 1e-6


@pytest.mark.parametrize("lengths", [
    {"prompts": (1,), "chosen": (1,), "rejected": (1,)},
    {"prompts": (1, 1), "chosen": (2, 1), "rejected": (1, 2)},
])
def test_the_shortest_possible_rows_have_the_loss_of_padded_rows(llama, lengths):
    columns = make_columns(**lengths)
    packed, _ = outcome(llama, make_batch(columns, packed=True))
    padded, _ = outcome(llama, make_batch(columns))
    assert distance(packed, padded) < 1e-12


def enable_gradient_checkpointing(module):
    options = {"use_reentrant": False}
    module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    module.train()


def test_gradient_checkpointing_recomputes_packed_rows_as_packed_rows(llama):
    expected = outcome(llama, PACKED)
    enable_gradient_checkpointing(llama)
    for found, value in zip(outcome(llama, PACKED), expected):
        assert torch.equal(found, value)
    _, padded_gradient = outcome(llama, PADDED)
    assert distance(padded_gradient, expected[1]) < 1e-6


def test_gradient_checkpointing_recomputes_with_the_layout_of_its_own_forward(llama):
    """Backward of the first batch, after the forward of a batch with another layout."""
    _, expected = outcome(llama, PACKED)
    other_columns = make_columns(seed=2, prompts=(3, 8), chosen=(2, 9), rejected=(6, 1))
    other = make_batch(other_columns, packed=True)
    enable_gradient_checkpointing(llama)
    losses, _ = preference_step(llama, None, PACKED, sigmoid, reference_free=True)
    preference_step(llama, None, other, sigmoid, reference_free=True)
    llama.zero_grad()
    losses.mean().backward()
    assert distance(flat_gradient(llama), expected) < 1e-12


def test_an_adapter_that_is_on_or_off_has_the_same_log_probs_packed(tokenizer):
    """Its base is frozen, so gradients exist only for the adapter."""
    model = tiny_model("llama", tokenizer).double()
    module = FastLogps(model)
    base_logps = side_logps(module, PADDED)
    settings = lora.LoraSettings(4, 8.0)
    lora.add_adapter(model, "policy", lora.target_modules(model, None), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".B." in name:
                parameter.normal_(std=0.1)
    packed, packed_gradient = outcome(module, PACKED)
    padded, gradient = outcome(module, PADDED)
    assert distance(packed, padded) < 1e-12
    assert distance(packed_gradient, gradient) < 1e-6
    assert distance(side_logps(module, PACKED), base_logps) > 1e-3
    with lora.use_adapter(model, None):
        assert distance(side_logps(module, PACKED), base_logps) < 1e-12


# --- Attention ------------------------------------------------------------------------------------

def attention_inputs(groups):
    """-> query (T, heads, size), key and value (K, key heads, size), the Layout of PACKED."""
    torch.manual_seed(0)
    layout = packing.layout_of(PACKED["inputs"]["packed"], torch.device("cpu"))
    tokens = PACKED["inputs"]["input_ids"].shape[1]
    query = torch.randn(tokens, 4, 8)
    key = torch.randn(tokens, 4 // groups, 8).index_select(0, layout.keys)
    value = torch.randn(tokens, 4 // groups, 8).index_select(0, layout.keys)
    return query, key, value, layout


def flash_attention(query, key, value, query_ends, key_ends, most_queries, most_keys, *, dropout_p,
                    is_causal, return_debug_mask, scale, window_size_left, window_size_right):
    """torch's FlashAttention of sequences of different lengths, as its documentation describes
    it."""
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert dropout_p == 0
    assert is_causal == (window_size_left < 0)
    assert most_queries == query_ends.diff().max()
    assert most_keys == key_ends.diff().max()
    outputs = []
    for (a, b), (c, d) in zip(itertools.pairwise(query_ends), itertools.pairwise(key_ends)):
        # The last query is aligned with the last key.
        queries, keys = b - a, d - c
        own = torch.arange(queries)[:, None] + (keys - queries)
        behind = own - torch.arange(keys)  # how far a key is before the query
        mask = behind >= -window_size_right
        if window_size_left >= 0:
            mask &= behind <= window_size_left
        q, k, v = (x.transpose(0, 1) for x in (query[a:b], key[c:d], value[c:d]))
        output = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs), None, None, None, None


@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_kernel_for_gpus_is_asked_for_the_same_attention(monkeypatch, window, groups):
    """A stand-in takes the place of the kernel, which no CPU runs."""
    inputs = attention_inputs(groups)
    expected = packing.one_by_one(*inputs, 0.3, window)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_attention)
    found = packing.in_one_call(*inputs, 0.3, window)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("window", [None, 6, 100])
@pytest.mark.parametrize("groups", [1, 2])
def test_segments_whose_prompt_is_recomputed_have_the_attention_of_masked_segments(window, groups):
    *tensors, layout = attention_inputs(groups)
    leaves = [tensor.double().requires_grad_() for tensor in tensors]
    found = packing.one_by_one(*leaves, layout, 0.3, window, masked=False)
    expected = packing.one_by_one(*leaves, layout, 0.3, window, masked=True)
    assert torch.allclose(found, expected, atol=1e-12)
    slope = torch.randn_like(found)
    gradients = torch.autograd.grad((found * slope).sum(), leaves)
    wanted = torch.autograd.grad((expected * slope).sum(), leaves)
    for gradient, value in zip(gradients, wanted):
        assert torch.allclose(gradient, value, atol=1e-12)


def test_queries_keys_and_values_are_all_cast_to_the_dtype_of_autocast(monkeypatch):
    """Rotary embeddings leave queries and keys in float32, and values in bfloat16. A kernel that
    takes all segments at once needs one dtype."""
    module = FastLogps(build("Llama"))
    seen, one_by_one = [], packing.one_by_one

    def spy(query, key, value, *more):
        seen.append({query.dtype, key.dtype, value.dtype})
        return one_by_one(query, key, value, *more)

    monkeypatch.setattr(packing, "one_by_one", spy)
    with torch.autocast("cpu", torch.bfloat16):
        concatenated_forward(module, PACKED)
    assert seen == [{torch.bfloat16}] * 2  # in each of two layers


@pytest.mark.parametrize("argument", ["softcap", "s_aux", "position_bias"])
def test_attention_refuses_an_argument_that_packed_rows_cannot_have(argument):
    tensor = torch.zeros(1, 1, 3, 4)
    options = {"packed": ((1, 1, 1),), argument: tensor}
    with pytest.raises(packing.Unsupported, match=argument):
        packing.attention(None, tensor, tensor, tensor, None, **options)


# --- Fewer tokens, and nothing else changes -------------------------------------------------------

def test_a_prompt_is_computed_once_and_nothing_is_padded():
    columns = {"prompt_ids": [[5, 6, 7]], "answer_ids": [[[8, 9, 0], [4, 0]]]}
    batch = packing.pack_rows(columns)
    # The last token of an answer predicts nothing and is not fed.
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3]]
    targets = batch["targets"]
    assert targets.ids.tolist() == [8, 9, 0, 4, 0]
    # The end of the prompt, at index 2, predicts the first token of both answers.
    assert targets.predictors.tolist() == [2, 3, 4, 2, 5]
    # One answer per row of a table with 3 columns.
    assert targets.width == 3
    assert targets.places.tolist() == [0, 1, 2, 3, 4]
    assert targets.lengths.tolist() == [3, 2]


def test_a_model_that_has_run_packed_rows_runs_padded_ones_and_is_saved_as_before(llama, tmp_path):
    before = side_logps(llama, PADDED)
    llama.model.save_pretrained(tmp_path / "before")
    concatenated_forward(llama, PACKED)
    assert torch.equal(side_logps(llama, PADDED), before)
    llama.model.save_pretrained(tmp_path / "after")
    saved_before = (tmp_path / "before" / "config.json").read_text()
    saved_after = (tmp_path / "after" / "config.json").read_text()
    assert json.loads(saved_after) == json.loads(saved_before)
    assert packing.NAME not in saved_after


def test_a_model_with_a_window_runs_padded_rows_with_its_window_after_packed_ones():
    module = FastLogps(build("Mistral", **WINDOW).double())
    before = side_logps(module, PADDED)
    packing.enable(module.model)
    assert torch.equal(side_logps(module, PADDED), before)


def change_answer(columns, side, index):
    """The columns with other tokens, and as many, in one answer."""
    answers = [list(row) for row in columns["answer_ids"]]
    answers[index][side] = [(token + 1) % 97 for token in answers[index][side]]
    return columns | {"answer_ids": answers}


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT2", "Olmo2"])
def test_another_answer_leaves_every_other_log_prob_bitwise_equal(name):
    module = FastLogps(build(name, **PACKS[name]))
    before = side_logps(module, PACKED)  # (2B,)
    for row, (side, index) in enumerate(itertools.product((0, 1), range(5))):
        columns = change_answer(COLUMNS, side, index)
        after = side_logps(module, make_batch(columns, packed=True))
        changed = (after != before).nonzero().flatten()
        assert changed.tolist() == [row]


# --- --attention and --tokens_per_micro_batch -----------------------------------------------------

def test_packed_and_padded_runs_end_with_the_same_weights_up_to_rounding(fit):
    flags = {"dtype": "float64", "epochs": 2}
    by_tokens = flags | {"micro_batch_size": None}
    runs = {
        "padded": fit("--attention=padded", out="padded", **flags),
        "packed": fit("--attention=packed", out="packed", **flags),
        "packed, 70 tokens": fit("--attention=packed", "--tokens_per_micro_batch=70",
                                 out="packed 70", **by_tokens),
        "auto, 1 token": fit("--tokens_per_micro_batch=1", out="auto 1", **by_tokens),
    }
    settled = {}
    for name, (folder, _) in runs.items():
        config = json.loads((folder / "config.json").read_text())["flags"]
        settled[name] = (config["attention"], config["tokens_per_micro_batch"])
    assert settled == {
        "padded": ("padded", None),
        "packed": ("packed", None),
        "packed, 70 tokens": ("packed", 70),
        "auto, 1 token": ("padded", 1),
    }
    expected = weights(runs["padded"][0])
    for folder, _ in runs.values():
        found = weights(folder)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert distance(found[name], value) < 1e-5


def test_auto_packs_long_rows_and_says_which_rows_it_chose(fit, monkeypatch, capsys):
    fit(max_steps=1, out="short")
    line = "attention: padded rows; packed, rows as short as these would be slower\n"
    assert line in capsys.readouterr().out
    monkeypatch.setattr(packing, "SHORT", 0)
    fit(max_steps=1, out="long", lora_rank=2, lora_dropout=0.1)
    assert "attention: packed rows\n" in capsys.readouterr().out


def test_a_model_that_cannot_be_packed_is_padded_by_auto_and_refused_by_packed(
        fit, tokenizer, tmp_path, monkeypatch, capsys):
    options, _ = PACKS_NOT["Lfm2"]
    model = build("Lfm2", **(options | {"vocab_size": len(tokenizer)}))
    models.save_model(model, tokenizer, tmp_path / "lfm2")
    reason = "an answer's log-prob depends on other tokens than its own"
    monkeypatch.setattr(packing, "SHORT", 0)
    fit(max_steps=1, out="padded", model=tmp_path / "lfm2")
    assert f"attention: padded rows; {reason}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=f"--attention packed: {reason}"):
        fit("--attention=packed", max_steps=1, out="refused", model=tmp_path / "lfm2")


@pytest.mark.parametrize("tokens, hidden, faster", [
    ([208] * 100, 64, True),  # of a row of hh_harmless
    ([11] * 100, 64, False),  # of a row of world.py
    ([339, 59, 59, 59] * 25, 64, True),  # long and short rows
    ([64] * 100, 64, True),  # the bound
    ([64] * 99 + [63], 64, False),
    ([32] * 100, 128, True),  # half as many tokens, with twice the hidden size
])
def test_long_rows_and_wide_models_are_packed_and_short_rows_of_narrow_models_are_not(
        tokens, hidden, faster):
    assert packing.is_faster(np.array(tokens), hidden) is faster


@pytest.mark.parametrize("ranks", [1, 3, 4])
def test_micro_batches_by_tokens_hold_each_pair_once_and_are_as_many_on_each_rank(ranks):
    tokens = np.random.default_rng(0).integers(10, 90, 200)
    window = np.random.default_rng(1).permutation(200)[:50]
    counts, indices = [], []
    for rank in range(ranks):
        pieces = data.micro_batches(window, 150, rank, ranks, tokens)
        counts.append(len(pieces))
        for piece, weight in pieces:
            assert tokens[piece].sum() <= 150
            if weight:
                indices += piece.tolist()
    assert counts == counts[:1] * ranks
    assert indices == window.tolist()


def test_a_row_above_the_budget_of_tokens_is_a_micro_batch_alone():
    tokens = np.array([20, 30, 40])
    pieces = data.micro_batches(np.arange(3), 1, 0, 1, tokens)
    assert [piece.tolist() for piece, _ in pieces] == [[0], [1], [2]]


def test_a_rank_without_pairs_gets_a_micro_batch_of_weight_0():
    tokens = np.array([20, 30])
    found = []
    for rank in range(4):
        for _, weight in data.micro_batches(np.arange(2), 150, rank, 4, tokens):
            found.append(weight)
    assert found == [1, 1, 0, 0]
