"""can_pack and can_drop_mask accept the models that they should, and refuse every other one."""
import os
import re

import pytest
import torch
import transformers
from steps import PACKS, PACKS_NOT, WINDOW, build, distance, make_batch, make_columns, outcome

import model as models
import packing
import verify
from logps import FastLogps

WIDE_WINDOW = {"sliding_window": 64}  # longer than the rows of the check, which shrinks it


def can_pack(model):
    return verify.can_pack(FastLogps(model))


# --- Models that support packed rows, or padded rows without a mask -------------------------------

@pytest.mark.parametrize("name", PACKS)
def test_an_architecture_that_supports_packed_rows_is_accepted(name):
    model = build(name, **PACKS[name])
    assert can_pack(model) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert can_pack(model) is None


def make_sharp_model(layers=30, scale=7.0):
    """A deep model with nearly one-hot attention, so that rounding grows from layer to layer."""
    model = build("Llama", num_hidden_layers=layers)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= scale
            layer.self_attn.k_proj.weight *= scale
    return model


def test_the_rounding_of_a_deep_model_is_allowed_and_a_wrong_layout_is_not(monkeypatch):
    model = make_sharp_model()
    assert can_pack(model) is None
    monkeypatch.setattr(packing, *MUTATIONS["positions continue after chosen"])
    reason = can_pack(model)
    assert "is not what it is in a row of its own: it differs by" in reason
    assert re.search(r"where rounding explains \d\.\de-\d\d", reason)


@pytest.mark.skipif("REAL_MODEL" not in os.environ,
                    reason="REAL_MODEL names the folder of a pretrained model")
@pytest.mark.parametrize("autocast", [False, True])
def test_a_real_model_packs_and_the_check_is_four_short_forwards_for_each_dtype(autocast):
    module = FastLogps(models.load_model(os.environ["REAL_MODEL"]))
    calls = []
    module.register_forward_pre_hook(lambda *call: calls.append(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert verify.can_pack(module) is None
    assert len(calls) == 4 * (1 + autocast)


@pytest.mark.parametrize("full_logits", [True, False])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen3", "GPT2", "Gemma", "Olmo2"])
def test_right_padded_rows_need_no_mask(name, full_logits):
    """Padding comes after all scored tokens, and a causal model does not attend to later tokens."""
    module = FastLogps(build(name, **PACKS[name]).double())
    assert verify.can_drop_mask(module) is None
    columns = make_columns()
    expected, gradient = outcome(module, make_batch(columns))
    packing.enable(module.model)
    unmasked = make_batch(columns, masked=False, full_logits=full_logits)
    assert unmasked["inputs"]["attention_mask"].numel() == 1
    losses, unmasked_gradient = outcome(module, unmasked)
    assert distance(losses, expected) < 1e-12
    assert distance(unmasked_gradient, gradient) < 1e-6


# --- Models that do not ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", PACKS_NOT)
def test_an_architecture_that_does_not_support_packed_rows_is_refused_with_the_reason(name):
    options, reason = PACKS_NOT[name]
    assert re.search(reason, can_pack(build(name, **options)))


def test_a_bidirectional_model_needs_its_mask_and_cannot_be_packed():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )
    model = transformers.BertLMHeadModel(config)  # bidirectional, as is_decoder is not set
    for verdict in (verify.can_drop_mask, verify.can_pack):
        assert "depends on other tokens" in verdict(FastLogps(model))


def test_an_error_of_a_kernel_is_a_reason_and_an_error_of_this_project_is_raised(monkeypatch):
    def refuse(*inputs, **options):
        raise RuntimeError("head_size should be a multiple of 8")

    module = FastLogps(build("Llama"))
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
        assert "head_size should be a multiple of 8" in verify.can_pack(module)
    monkeypatch.setattr(verify, "PROMPTS", None)
    with pytest.raises(TypeError):
        verify.can_pack(module)


# --- The model is left unchanged ------------------------------------------------------------------

def state_of(model):
    """The parts of a model, and of torch, that a check could leave changed."""
    windows = [getattr(module, "sliding_window", None) for module in model.modules()]
    trainable = [parameter.requires_grad for parameter in model.parameters()]
    without_gradient = [parameter.grad is None for parameter in model.parameters()]
    return {
        "config": model.config.to_dict(),
        "attention": model.config._attn_implementation,
        "windows": windows,
        "training": model.training,
        "trainable": trainable,
        "without gradient": without_gradient,
        "hooks": len(model.get_input_embeddings()._forward_hooks),
        "grad enabled": torch.is_grad_enabled(),
        "random numbers": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("name, options", [
    ("Llama", {}),
    ("Mistral", WIDE_WINDOW),
    ("Lfm2", PACKS_NOT["Lfm2"][0]),
])
@pytest.mark.parametrize("verdict", [verify.can_pack, verify.can_drop_mask])
def test_the_check_changes_neither_the_model_nor_the_random_numbers(name, options, verdict):
    model = build(name, **options).eval()
    module = FastLogps(model)
    with torch.no_grad():
        before = state_of(model)
        verdict(module)
        assert state_of(model) == before
    assert before["attention"] == "sdpa"
    assert all(before["without gradient"])


# --- Every wrong layout is refused ----------------------------------------------------------------

def change_batch(change):
    """A wrong packing.pack_rows, whose batches are changed in place."""
    pack_rows = packing.pack_rows

    def changed_pack_rows(rows):
        batch = pack_rows(rows)
        change(batch)
        return batch

    return "pack_rows", changed_pack_rows


def restart_positions(batch):
    """The positions of a rejected answer begin at 0."""
    positions = []
    for prompt, chosen, rejected in batch["packed"]:
        positions += [*range(prompt + chosen), *range(rejected)]
    batch["position_ids"] = torch.tensor([positions])


def continue_positions(batch):
    """The positions of a rejected answer continue after the chosen answer."""
    positions = []
    for counts in batch["packed"]:
        positions += range(sum(counts))
    batch["position_ids"] = torch.tensor([positions])


def predict_one_later(batch):
    last = batch["input_ids"].shape[1] - 1
    predictors = (batch["targets"].predictors + 1).clamp(max=last)
    batch["targets"] = batch["targets"]._replace(predictors=predictors)


def predict_rejected_by_chosen(batch):
    """The first token of a rejected answer is predicted by the token before it in the packed row,
    which is the end of the chosen answer."""
    targets = batch["targets"]
    rows = targets.places // targets.width  # (N,) row of the (2B, width) table
    columns = targets.places % targets.width  # (N,) column of the table
    pairs = len(targets.lengths) // 2
    ends = torch.tensor(batch["packed"]).flatten().cumsum(0)
    predictors = targets.predictors.clone()
    predictors[(rows >= pairs) & (columns == 0)] = ends[1::3] - 1
    batch["targets"] = targets._replace(predictors=predictors)


def put_tokens_into_the_next_row(batch):
    """Each answer's log-probs are added to the sum of another answer."""
    targets = batch["targets"]
    cells = len(targets.lengths) * targets.width
    batch["targets"] = targets._replace(places=(targets.places + targets.width) % cells)


def change_prefix(change):
    """A wrong packing.segments: change(segment) -> its prefix_start and prefix."""
    segments = packing.segments

    def changed_segments(packed):
        changed = []
        for segment in segments(packed):
            prefix_start, prefix = change(segment)
            changed.append(segment._replace(prefix_start=prefix_start, prefix=prefix))
        return changed

    return "segments", changed_segments


def prompt_and_chosen(segment):
    if segment.prefix == 0:
        return segment.prefix_start, 0
    return segment.prefix_start, segment.start - segment.prefix_start


def no_prompt(segment):
    return segment.prefix_start, 0


def prompt_without_its_end(segment):
    return segment.prefix_start, max(0, segment.prefix - 1)


def all_pairs_before(segment):
    return 0, segment.prefix or segment.start


def change_diagonal(diagonal):
    """A wrong packing.visible without windows: diagonal(queries, keys) of the last visible key."""
    def visible(queries, keys, window, device):
        return torch.ones(queries, keys, dtype=torch.bool).tril(diagonal(queries, keys))

    return "visible", visible


def wider_window(queries, keys, window, device):
    last = keys - queries
    return torch.ones(queries, keys, dtype=torch.bool).tril(last).triu(last - window)


# Each is a name in packing and a function to put there.
MUTATIONS = {
    "positions restart at 0": change_batch(restart_positions),
    "positions continue after chosen": change_batch(continue_positions),
    "every predictor is one later": change_batch(predict_one_later),
    "the end of chosen predicts rejected": change_batch(predict_rejected_by_chosen),
    "tokens are summed in another row": change_batch(put_tokens_into_the_next_row),
    "rejected sees chosen": change_prefix(prompt_and_chosen),
    "rejected does not see the prompt": change_prefix(no_prompt),
    "rejected does not see the end of the prompt": change_prefix(prompt_without_its_end),
    "a pair sees the pair before it": change_prefix(all_pairs_before),
    "one later token is visible": change_diagonal(lambda queries, keys: keys - queries + 1),
    "windows are ignored": change_diagonal(lambda queries, keys: keys - queries),
    "windows are one wider": ("visible", wider_window),
    "queries are aligned at the first key": change_diagonal(lambda queries, keys: 0),
}


@pytest.fixture
def no_cached_layout():
    """layout_of caches the layouts of packing.segments, which a test changes."""
    packing.layout_of.cache_clear()
    yield
    packing.layout_of.cache_clear()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_wrong_layout_is_refused(monkeypatch, no_cached_layout, mutation, autocast):
    model = build("Mistral", **WINDOW)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert can_pack(model) is None
        monkeypatch.setattr(packing, *MUTATIONS[mutation])
        packing.layout_of.cache_clear()
        assert "an answer's log-prob" in can_pack(model)


@pytest.mark.parametrize("mutation", ["windows are ignored", "windows are one wider"])
def test_a_wrong_window_is_refused_even_if_it_is_longer_than_the_rows_of_the_check(
        monkeypatch, no_cached_layout, mutation):
    model = build("Mistral", **WIDE_WINDOW)
    assert can_pack(model) is None
    monkeypatch.setattr(packing, *MUTATIONS[mutation])
    assert "an answer's log-prob" in can_pack(model)


@pytest.mark.parametrize("mutation", [
    "one later token is visible",
    "windows are ignored",
    "windows are one wider",
])
def test_a_wrong_mask_of_rows_without_a_mask_is_refused(monkeypatch, mutation):
    module = FastLogps(build("Mistral", **WINDOW))
    assert verify.can_drop_mask(module) is None
    monkeypatch.setattr(packing, *MUTATIONS[mutation])
    assert "an answer's log-prob" in verify.can_drop_mask(module)
