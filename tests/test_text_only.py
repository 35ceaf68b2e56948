"""Training on texts alone of models that also read images.

Some of these classes ask for inputs that only a processor of images makes, such as token_type_ids.
A run on texts needs none of them: it trains the language model, and the saved folder loads with the
class of the files. Each model here is tiny, with random weights.
"""
import json

import pytest
import torch
import transformers
from conftest import make_rows, resume, unfinished, weights, write_jsonl
from transformers import AutoModelForCausalLM

import lora
import model as models
from errors import UserError

TEXT = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0,
}
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                            "mrope_section": [2, 3, 3]}}
QWEN_TOWER = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 14,
              "spatial_merge_size": 2}
LLAMA4 = {"num_local_experts": 2, "attention_chunk_size": 64, "intermediate_size_mlp": 32}
IDS = {"pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0}
# Class: its config, and the options of the config.
CLASSES = {
    "Gemma3ForConditionalGeneration": ("Gemma3Config", {
        "text_config": TEXT | {"sliding_window": 64}, "vision_config": TOWER,
        "mm_tokens_per_image": 1, "image_token_index": 319, "boi_token_index": 318,
        "eoi_token_index": 317} | IDS),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", TEXT | {"sliding_window": 64}),
    "Llama4ForCausalLM": ("Llama4TextConfig", TEXT | LLAMA4),
    "Qwen2VLForConditionalGeneration": ("Qwen2VLConfig", {
        "text_config": TEXT | ROPE, "vision_config": QWEN_TOWER, "image_token_id": 319,
        "video_token_id": 318, "vision_start_token_id": 317, "vision_end_token_id": 316}),
    "Mistral3ForConditionalGeneration": ("Mistral3Config", {
        "text_config": TEXT | {"model_type": "mistral"},
        "vision_config": TOWER | {"model_type": "pixtral", "head_dim": 16},
        "image_token_index": 319, "spatial_merge_size": 1}),
    "LlavaForConditionalGeneration": ("LlavaConfig", {
        "text_config": TEXT | {"model_type": "llama"},
        "vision_config": TOWER | {"model_type": "clip_vision_model"}, "image_token_index": 319}),
}
# These are loaded as models with images, which families.py knows.
WITH_IMAGES = ("Qwen2VL", "Mistral3", "Llava")
try:
    import families
    vision_loads = "vision" in families.AUTO_CLASSES
except ImportError:
    vision_loads = False
needs_vision = pytest.mark.skipif(not vision_loads, reason="classes with images are not loaded")
RUN = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 2, "eval_share": 0.2}


def make(name):
    config, options = CLASSES[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options))


@pytest.fixture(scope="module")
def ten_rows(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("ten") / "ten.jsonl", make_rows(10))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("flags", [
    pytest.param({}, id="padded"),
    pytest.param({"gradient_checkpointing": True, "attention": "packed"}, id="packed",
                 marks=pytest.mark.slow),
])
def test_a_model_that_reads_images_trains_on_texts_and_loads_again_with_its_class(
        name, flags, fit, tokenizer, ten_rows, tmp_path):
    if name.startswith(WITH_IMAGES) and not vision_loads:
        pytest.skip("classes with images are not loaded")
    if name == "Llama4ForCausalLM" and flags:
        pytest.skip("its chunked attention has no packed rows")
    model = make(name)
    models.save_model(model, tokenizer, tmp_path / "m")
    out, metrics = fit(model=tmp_path / "m", dataset=ten_rows, **RUN, **flags)
    losses = [row["loss"] for row in metrics if row["split"] == "train"]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-5) and losses[1] < losses[0]
    assert json.loads((out / "config.json").read_text())["architectures"] == [name]
    saved, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # The language model has been trained, and what text does not reach is as it was.
    changed = {path for path, tensor in saved.state_dict().items()
               if not torch.equal(tensor, model.state_dict()[path])}
    assert any("q_proj" in path for path in changed)
    assert not any("vision" in path or "visual" in path or "multi_modal" in path
                   for path in changed)


def test_a_resumed_run_of_such_a_model_ends_bit_for_bit_the_same(
        fit, tokenizer, ten_rows, tmp_path):
    models.save_model(make("Gemma3ForConditionalGeneration"), tokenizer, tmp_path / "m")
    out, _ = fit(model=tmp_path / "m", dataset=ten_rows, **RUN, save_every=1)
    expected = transformers.Gemma3ForConditionalGeneration.from_pretrained(out).state_dict()
    resume(unfinished(out))
    found = transformers.Gemma3ForConditionalGeneration.from_pretrained(out).state_dict()
    assert all(torch.equal(found[path], tensor) for path, tensor in expected.items())


def test_an_adapter_of_such_a_model_is_on_its_language_model_and_computes_the_same_in_peft(
        fit, tokenizer, ten_rows, tmp_path):
    peft = pytest.importorskip("peft")
    models.save_model(make("Gemma3ForConditionalGeneration"), tokenizer, tmp_path / "m")
    out, _ = fit(model=tmp_path / "m", dataset=ten_rows, **RUN, lora_rank=2)
    assert all("language_model" in key for key in weights(out))
    ids = torch.arange(1, 13)[None]
    ours = models.load_model(str(tmp_path / "m"))
    lora.load_adapter(ours, out)
    base = transformers.Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "m").eval()
    theirs = peft.PeftModel.from_pretrained(base, out).eval()
    assert torch.allclose(ours(ids).logits, theirs(input_ids=ids).logits, atol=1e-5)


@needs_vision
def test_llama4_with_a_vision_tower_trains_or_the_error_says_how_to_train_its_language_model(
        fit, tokenizer, ten_rows, tmp_path):
    """The class fails on every input in transformers 5.24, and works in 5.17."""
    tower = TOWER | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    config = transformers.Llama4Config(text_config=TEXT | LLAMA4, vision_config=tower, **IDS)
    path = tmp_path / "m"
    models.save_model(transformers.Llama4ForConditionalGeneration(config), tokenizer, path)
    try:
        fit(model=path, dataset=ten_rows, **RUN)
        return
    except UserError as error:
        assert f"AutoModelForCausalLM.from_pretrained({str(path)!r}).save_pretrained('m-text')" in (
            str(error))
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / "m-text")
    tokenizer.save_pretrained(tmp_path / "m-text")
    _, metrics = fit(model=tmp_path / "m-text", dataset=ten_rows, **RUN, out="text")
    assert metrics[1]["loss"] < metrics[0]["loss"]
