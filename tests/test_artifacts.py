"""An artifact meets another than it was made with: adapters and bases, references, templates,
quantized models, and the data of a resumed run."""
import copy
import importlib.util
import json
import os
import shutil

import pytest
import torch
from conftest import make_rows, resume, tiny_model, unfinished, write_jsonl
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, pipeline

import data
import loading
import lora
import model as models
from errors import UserError
from lora import KNOWN_ENTRIES, LoraSettings, add_adapter, read_adapter, save_adapter

TEMPLATE = "{% for m in messages %}{{ '## ' + m['role'] + ': ' + m['content'] }}{% endfor %}"


@pytest.fixture
def sft(fit):
    """The folder of an adapter that was trained by SFT on the model of `fit`."""
    return fit(loss="sft", lora_rank=4, max_steps=2, out="sft")[0]


def changed_copy(folder, target, change):
    """Copy a model's folder and change its weights, {name: tensor}."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def scale_all(tensors):
    for tensor in tensors.values():
        tensor *= 1.001


def scale_one_projection(tensors):
    tensors["model.layers.1.mlp.up_proj.weight"] *= -1


def swap_layers(tensors):
    first, second = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    tensors[first][0], tensors[second][0] = tensors[second][0].clone(), tensors[first][0].clone()


# --- An adapter on another base -------------------------------------------------------------------

@pytest.mark.parametrize("change", [scale_all, scale_one_projection, swap_layers])
def test_an_adapter_on_another_base_of_the_same_shape_is_refused_in_training_and_merge(
        fit, sft, folder, tmp_path, change):
    other = changed_copy(folder, tmp_path / "other", change)
    message = f"was trained on {folder}, whose weights differ from those of {other}"
    with pytest.raises(UserError, match=message):
        fit(model=other, adapter=sft, max_steps=1, out="dpo")
    with pytest.raises(UserError, match=message):
        models.main(["merge", f"--adapter={sft}", f"--model={other}", f"--out={tmp_path}/merged"])
    assert not (tmp_path / "merged").exists()


def test_a_base_whose_weights_changed_in_place_is_refused_when_the_run_is_resumed(
        fit, folder, tmp_path):
    base = changed_copy(folder, tmp_path / "base", lambda tensors: None)
    out, _ = fit(model=base, lora_rank=4, max_steps=4, save_every=2)
    unfinished(out)
    shutil.rmtree(base)
    changed_copy(folder, base, scale_all)
    with pytest.raises(UserError, match="was trained on"):
        resume(out)


@pytest.mark.parametrize("flags", [{}, {"dtype": "bfloat16"}, {"dtype": "float64"},
                                   {"quantize": "nf4"}], ids=str)
def test_a_moved_base_is_accepted_in_every_dtype_and_so_is_its_bfloat16_file(
        fit, sft, folder, tmp_path, flags):
    moved = shutil.copytree(folder, tmp_path / "moved")
    fit(model=moved, adapter=sft, max_steps=1, out="moved-run", **flags)
    model = models.load_model(folder).bfloat16()
    models.save_model(model, AutoTokenizer.from_pretrained(folder), tmp_path / "narrow")
    fit(model=tmp_path / "narrow", adapter=sft, max_steps=1, out="narrow-run", **flags)


def test_a_second_stage_keeps_the_fingerprint_of_the_base_and_its_adapter_merges(
        fit, sft, tmp_path):
    dpo, _ = fit(adapter=sft, max_steps=2, out="dpo")
    saved = [lora.read_run_file(path)["base_fingerprint"] for path in (sft, dpo)]
    assert saved[0] == saved[1]
    models.main(["merge", f"--adapter={dpo}", f"--out={tmp_path}/merged"])
    assert (tmp_path / "merged" / "config.json").exists()


def test_an_adapter_without_a_fingerprint_gets_a_line_that_names_both_bases(
        fit, sft, folder, tmp_path, capsys):
    (sft / "run.json").unlink()  # as PEFT saves it
    other = changed_copy(folder, tmp_path / "other", scale_all)
    fit(model=other, adapter=sft, max_steps=1, out="dpo")
    models.main(["merge", f"--adapter={sft}", f"--model={other}", f"--out={tmp_path}/merged"])
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if folder in line and str(other) in line]) >= 2


def test_the_fingerprint_of_a_large_parameter_depends_on_its_columns_and_rows(tokenizer):
    model = torch.nn.Linear(512, 512, bias=False)
    before = lora.base_fingerprint(model)
    for part in (model.weight[:, 7], model.weight[300]):
        part.data.add_(1)
        assert lora.base_fingerprint(model) != before
        part.data.sub_(1)


# --- Adapters that are more than W + s BA ---------------------------------------------------------

def peft_like(tokenizer, path, base, **config):
    """Write an adapter, and then change adapter_config.json."""
    model = tiny_model("llama", tokenizer)
    add_adapter(model, "policy", lora.target_modules(model, None), LoraSettings(4, 8))
    save_adapter(model, tokenizer, path, base)
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return path


@pytest.mark.parametrize("config, words", [
    ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, which changes the base"),
    ({"init_lora_weights": "pissa_niter_16"}, "which changes the base"),
    ({"init_lora_weights": "olora"}, "which changes the base"),
    ({"init_lora_weights": "corda"}, "which changes the base"),
    ({"init_lora_weights": "loftq"}, "which changes the base"),
    ({"init_lora_weights": "lora_ga"}, "which changes the base"),
    ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    ({"use_qalora": True}, "use_qalora"),
    ({"lora_bias": True}, "lora_bias"),
    ({"bias": "all"}, "bias"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"target_parameters": ["experts.down_proj"]}, "target_parameters"),
    ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
    ({"kasa_config": {"beta": 1}}, "kasa_config"),
    ({"an_entry_of_a_later_version": "yes"}, "an_entry_of_a_later_version"),
    ({"peft_type": "OFT"}, "its peft_type is OFT"),
], ids=str)
def test_an_adapter_that_computes_anything_but_lora_is_refused_with_what_to_do(
        tokenizer, folder, tmp_path, config, words):
    path = peft_like(tokenizer, tmp_path / "adapter", folder, **config)
    with pytest.raises(UserError, match=words) as error:
        read_adapter(path)
    assert "merge_and_unload" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [
    {"init_lora_weights": True}, {"init_lora_weights": False}, {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"}, {"init_lora_weights": "eva", "eva_config": {"rho": 2}},
    {"megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}},
    {"runtime_config": {"ephemeral_gpu_offload": False}, "exclude_modules": ["lm_head"]},
], ids=str)
def test_entries_that_change_nothing_are_accepted(tokenizer, folder, tmp_path, config):
    read_adapter(peft_like(tokenizer, tmp_path / "adapter", folder, **config))


def test_every_entry_that_peft_writes_for_lora_rslora_and_dora_is_known(tmp_path):
    peft = pytest.importorskip("peft")
    for options in ({}, {"use_rslora": True}, {"use_dora": True}):
        peft.LoraConfig(r=4, target_modules=["q_proj"], **options).save_pretrained(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert not {key for key in config.keys() - KNOWN_ENTRIES if config[key]}
        lora.check_adapter_config(tmp_path, config)


# --- The reference of --ref_model -----------------------------------------------------------------

def swapped_tokenizer(tokenizer, pairs):
    """A copy of the tokenizer in which tokens have each other's ids."""
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = text["model"]["vocab"]
    for left, right in pairs:
        vocabulary[left], vocabulary[right] = vocabulary[right], vocabulary[left]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(text)),
                                   eos_token="<eos>", pad_token="<pad>")


def test_a_reference_with_another_vocabulary_of_the_same_size_is_refused(fit, tokenizer, tmp_path):
    other = swapped_tokenizer(tokenizer, [("a", "b")])
    models.save_model(tiny_model("llama", tokenizer), other, tmp_path / "reference")
    for ref in ("model", "cache"):
        with pytest.raises(UserError, match="--ref_model .* has another vocabulary"):
            fit(ref_model=tmp_path / "reference", ref=ref, max_steps=1, out=ref)


def test_a_reference_with_fewer_embeddings_is_refused(fit, tokenizer, tmp_path):
    model = tiny_model("llama", tokenizer)
    model.resize_token_embeddings(300)
    models.save_model(model, tokenizer, tmp_path / "reference")
    with pytest.raises(UserError, match="--ref_model .*: has 300 embeddings, but .* id 318"):
        fit(ref_model=tmp_path / "reference", max_steps=1)


def test_a_reference_with_fewer_positions_is_refused(fit, tokenizer, tmp_path):
    model = tiny_model("llama", tokenizer)
    model.config.max_position_embeddings = 48
    models.save_model(model, tokenizer, tmp_path / "reference")
    with pytest.raises(UserError, match="--max_length 64: --ref_model .* has 48 positions"):
        fit(ref_model=tmp_path / "reference", max_steps=1)


def test_a_reference_without_tokenizer_or_added_tokens_is_used_and_a_line_says_so(
        fit, tokenizer, folder, tmp_path, capsys):
    reference = tmp_path / "reference"
    tiny_model("llama", tokenizer).save_pretrained(reference)
    fit(ref_model=reference, max_steps=1, out="one")
    assert "has no tokenizer; its vocabulary is taken to be that of" in capsys.readouterr().out

    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<|turn|>"])
    model = tiny_model("llama", tokenizer)
    model.resize_token_embeddings(len(larger))
    models.save_model(model, larger, tmp_path / "policy")
    models.save_model(model, tokenizer, tmp_path / "second")
    fit(model=tmp_path / "policy", ref_model=tmp_path / "second", max_steps=1, out="two")
    assert "does not have 1 tokens of the policy, such as <|turn|>" in capsys.readouterr().out


# --- A base that cannot be trained as it is -------------------------------------------------------

def with_config(folder, target, **entries):
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return target


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 4}, {"lora_rank": 4, "quantize": "nf4"}],
                         ids=str)
@pytest.mark.parametrize("config", [
    {"quant_method": "gptq", "bits": 4, "group_size": 128},
    {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "fp8", "weight_block_size": [128, 128]},
    {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    {"load_in_8bit": True},
], ids=lambda config: config.get("quant_method", "none"))
def test_a_base_that_is_quantized_already_is_refused_before_its_weights_are_read(
        fit, folder, tmp_path, config, flags):
    quantized = with_config(folder, tmp_path / "quantized", quantization_config=config)
    with pytest.raises(UserError, match=f"{quantized}: its weights are quantized already"):
        fit(model=quantized, max_steps=1, **flags)


@pytest.mark.skipif(any(map(importlib.util.find_spec, loading.FLASH_PACKAGES)),
                    reason="flash attention is installed")
@pytest.mark.parametrize("flags", [{}, {"lora_rank": 4}], ids=str)
@pytest.mark.parametrize("entry", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["flash_attention_2", "flash_attention_3"])
def test_a_base_that_asks_for_flash_attention_which_is_not_installed_is_refused_in_one_line(
        fit, folder, tmp_path, entry, value, flags):
    asks = with_config(folder, tmp_path / "asks", **{entry: value})
    with pytest.raises(UserError, match=f"asks for {value}, which is not .* delete attn_imp"):
        fit(model=asks, max_steps=1, **flags)
    fit(model=with_config(folder, tmp_path / "eager", **{entry: "eager"}), max_steps=1, **flags)


def test_a_config_with_other_shapes_than_the_weights_is_refused_in_one_line(
        fit, folder, tmp_path):
    wrong = with_config(folder, tmp_path / "wrong", intermediate_size=48)
    message = r"down_proj.weight is \(32, 64\) in the files, and \(32, 48\) by config.json"
    with pytest.raises(UserError, match=message):
        fit(model=wrong, max_steps=1)


# --- The folder of an adapter ---------------------------------------------------------------------

def test_the_folder_of_an_adapter_has_no_config_json_and_its_flags_are_in_run_json(fit):
    out, _ = fit(lora_rank=4, max_steps=4, save_every=2)
    for path in (out, out / "checkpoint-2"):
        assert not (path / "config.json").exists()
    assert lora.read_run_file(out)["flags"]["lora_rank"] == 4
    unfinished(out)
    assert not resume(out)
    assert (out / "adapter_config.json").exists()


def test_the_flags_of_an_adapter_of_an_earlier_version_are_read_from_config_json(
        fit, tmp_path, capsys):
    out, _ = fit(lora_rank=4, max_steps=1, quantize="nf4")
    os.rename(out / "run.json", out / "config.json")
    models.main(["merge", f"--adapter={out}", f"--out={tmp_path}/merged"])
    assert "quantized to 4 bits again" in capsys.readouterr().out


def test_transformers_and_a_pipeline_load_the_folder_of_an_adapter_as_the_merged_model(
        fit, sft, tmp_path):
    pytest.importorskip("peft")
    models.main(["merge", f"--adapter={sft}", f"--out={tmp_path}/merged"])
    ids = torch.arange(12)[None] + 5
    expected = models.load_model(str(tmp_path / "merged"))(ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(sft)
    assert torch.allclose(loaded(ids).logits, expected, atol=1e-5)
    generator = pipeline("text-generation", model=str(sft))
    text = generator("the cat", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("the cat")
    assert torch.allclose(generator.model(ids).logits, expected, atol=1e-5)


# --- The chat template ----------------------------------------------------------------------------

@pytest.fixture
def dialogues(tmp_path):
    rows = []
    for row in make_rows(22):
        answers = {side: [{"role": "assistant", "content": row[side]}]
                   for side in ("chosen", "rejected")}
        rows.append({"prompt": [{"role": "user", "content": row["prompt"]}]} | answers)
    return write_jsonl(tmp_path / "dialogues.jsonl", rows)


@pytest.fixture
def templated(fit, dialogues, tmp_path):
    """An adapter that was trained with --chat_template on a base without a template."""
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    return fit(loss="sft", lora_rank=4, max_steps=1, dataset=dialogues, out="templated",
               chat_template=tmp_path / "own.jinja")[0]


def test_merge_keeps_the_chat_template_that_the_adapter_was_trained_with(templated, tmp_path):
    models.main(["merge", f"--adapter={templated}", f"--out={tmp_path}/merged"])
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE


def test_a_second_stage_by_adapter_or_model_uses_the_chat_template_of_the_first(
        fit, templated, dialogues, tmp_path, capsys):
    capsys.readouterr()
    out, _ = fit(adapter=templated, dataset=dialogues, max_steps=1, out="dpo")
    printed = capsys.readouterr().out
    assert f"chat template: that of {templated}" in printed
    assert "## user" in printed
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE

    full, _ = fit(loss="sft", max_steps=1, dataset=dialogues, out="full",
                  chat_template=tmp_path / "own.jinja")
    out, _ = fit(model=full, dataset=dialogues, max_steps=1, out="full-dpo")
    assert AutoTokenizer.from_pretrained(out).chat_template == TEMPLATE


def test_another_chat_template_than_that_of_the_adapter_is_used_and_a_line_says_so(
        fit, templated, dialogues, tmp_path, capsys):
    (tmp_path / "other.jinja").write_text(TEMPLATE.replace("##", "%%"))
    capsys.readouterr()
    out, _ = fit(adapter=templated, dataset=dialogues, max_steps=1, out="dpo",
                 chat_template=tmp_path / "other.jinja")
    assert "was trained with another chat template" in capsys.readouterr().out
    assert "%%" in AutoTokenizer.from_pretrained(out).chat_template


# --- The data of a resumed run --------------------------------------------------------------------

def reverse_letters(row, side):
    """Another answer of the same length in tokens, because single letters are tokens."""
    row[side] = row[side][:-1] + {"y": "z", "z": "y"}[row[side][-1]]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("index", [0, 11, 21])
def test_a_run_whose_data_file_changed_one_token_of_an_answer_is_not_resumed(
        fit, tmp_path, side, index):
    rows = [row | {"chosen": row["chosen"] + " y", "rejected": row["rejected"] + " y"}
            for row in make_rows(22)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    out, _ = fit(dataset=path, max_steps=4, save_every=2)
    unfinished(out)
    reverse_letters(rows[index], side)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="the rows of --dataset, .* changed since the run began"):
        resume(out)


def test_a_run_whose_data_file_changed_a_score_is_not_resumed(fit, tmp_path):
    rows = [row | {"chosen_score": 2.0, "rejected_score": 1.0} for row in make_rows(22)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    out, _ = fit(loss="odpo", dataset=path, max_steps=4, save_every=2)
    unfinished(out)
    rows[3]["chosen_score"] = 2.5
    write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match="the rows of --dataset, .* changed since the run began"):
        resume(out)


def test_the_digest_of_rows_depends_on_their_order_selection_and_numbers_and_not_on_their_storage(
        tokenizer, pairs):
    rows, _ = data.load_tokens(pairs, tokenizer, limits=data.Limits(64))
    digests = {data.digest(rows.select(indices)) for indices in
               ([0, 1, 2], [2, 1, 0], [0, 1], [0, 1, 1, 2], [], [5])}
    assert len(digests) == 6
    assert data.digest(rows.select([3, 1, 7])) == data.digest(
        rows.select([3, 1, 7]).flatten_indices())
    with_scores = {data.digest(rows.add_column("scores", scores)) for scores in (
        [[0.5, 0.5]] * 22, [[0.5, 0.5]] * 21 + [[0.5, 0.25]], [[float("nan"), 0.5]] * 22)}
    assert len(with_scores) == 3
