"""Encoder-decoders: log-probs are those of the model, the encoder runs once, runs end as others."""
import argparse
import json
import shutil

import pytest
import torch
import transformers
from conftest import (
    ALONE,
    TINY_RUN,
    make_rows,
    make_tokenizer,
    read_metrics,
    resume,
    run_training,
    to_arguments,
    unfinished,
    write_jsonl,
)
from safetensors.torch import load_file
from steps import distance, flat_gradient
from tokenizers.processors import TemplateProcessing

import card
import data
import dpo
import model as models
import sample
import train
from batches import RowFormat, collate_on_cpu, make_task
from encoder_decoder import EncoderDecoderLogps, decoder_prefix, logps_module
from errors import UserError
from families import family_of
from files import read_run_file
from generation import Sampling, encode_prompts, generate
from lora import read_adapter
from losses import LOSSES, needs_of
from reach import turn_off_noise
from reference import mismatched_rows
from variants import Variants
from verify import can_drop_mask, can_pack, find_fault

KINDS = ("T5", "MT5", "Bart", "Pegasus")
FAMILY = "encoder_decoder"


# --- Models, tokenizers and rows ------------------------------------------------------------------

def make_s2s_tokenizer(bos=False):
    """A tokenizer that puts EOS behind a text, as T5's, and with `bos` also BOS before it, as
    BART's."""
    tokenizer = make_tokenizer()
    special = [("<eos>", tokenizer.eos_token_id)]
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<bos>"})
        special.append(("<bos>", tokenizer.bos_token_id))
    single = "<bos> $A <eos>" if bos else "$A <eos>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=special)
    return tokenizer


def make_s2s_model(kind, tokenizer, **options):
    """A model of this architecture with random weights, the same ones in every call."""
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
           "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
           "decoder_start_token_id": tokenizer.pad_token_id}
    if kind in ("T5", "MT5"):
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2,
                 "num_heads": 4}
    else:
        sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
                 "encoder_attention_heads": 4, "decoder_attention_heads": 4,
                 "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
                 "init_std": 0.1}
    if kind == "MT5":
        sizes |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    if kind == "Bart":
        ids["decoder_start_token_id"] = tokenizer.eos_token_id
    config = getattr(transformers, f"{kind}Config")(**(ids | sizes | options))
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


@pytest.fixture(scope="module")
def tokenizers():
    with_bos, without = make_s2s_tokenizer(bos=True), make_s2s_tokenizer()
    return {kind: with_bos if kind == "Bart" else without for kind in KINDS}


@pytest.fixture(scope="module")
def folders(tokenizers, tmp_path_factory):
    """A folder of each architecture."""
    home = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        model = make_s2s_model(kind, tokenizers[kind])
        models.save_model(model, tokenizers[kind], home / kind)
    return home


@pytest.fixture(scope="module")
def ten_rows(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("rows") / "ten.jsonl", make_rows(10))


def load(rows, tokenizer, needs=data.PAIRS, **limits):
    limits = data.Limits(**{"family": FAMILY} | limits)
    return data.load_tokens(rows, tokenizer, needs, limits)


def make_module(kind, tokenizer):
    model = make_s2s_model(kind, tokenizer).double()
    turn_off_noise(model)
    return logps_module(model)


def collate(rows, tokenizer, **options):
    return collate_on_cpu(rows, tokenizer, RowFormat(family=FAMILY, **options))


def logps_of(module, batch):
    return dpo.concatenated_forward(module, batch)["logps"]


# --- Log-probs ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_the_cross_entropy_that_the_model_computes_itself(
        kind, tokenizers, ten_rows):
    tokenizer = tokenizers[kind]
    module = make_module(kind, tokenizer)
    rows, _ = load(ten_rows, tokenizer)
    logps = logps_of(module, collate(rows[:], tokenizer))
    front = tokenizer("the").input_ids[:1] if kind == "Bart" else []
    for i, row in enumerate(rows):
        prompt = torch.tensor([row["prompt_ids"]])
        for k, answer in enumerate(row["answer_ids"]):
            labels = torch.tensor([front + answer])
            shifted = module.model.prepare_decoder_input_ids_from_labels(labels=labels)
            labels[:, :len(front)] = -100
            loss = module.model(input_ids=prompt, decoder_input_ids=shifted, labels=labels).loss
            torch.testing.assert_close(-loss * len(answer), logps[i, k], rtol=0, atol=1e-6)


def test_labels_of_an_encoder_decoder_are_predicted_at_their_own_position():
    logits = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[3, 1, 2, -100], [5, -100, -100, -100]])
    logps, lengths = dpo.get_batch_logps(logits, labels, is_encoder_decoder=True)
    log_softmax = logits.log_softmax(-1)
    first = log_softmax[0, 0, 3] + log_softmax[0, 1, 1] + log_softmax[0, 2, 2]
    torch.testing.assert_close(logps, torch.stack([first, log_softmax[1, 0, 5]]))
    assert lengths.tolist() == [3, 1]


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_the_log_probs_of_a_row_do_not_depend_on_the_other_rows_of_its_batch(
        kind, tokenizers, ten_rows):
    tokenizer = tokenizers[kind]
    module = make_module(kind, tokenizer)
    rows, _ = load(ten_rows, tokenizer)
    together = logps_of(module, collate(rows[:], tokenizer))
    for i in range(len(rows)):
        alone = logps_of(module, collate(rows[i:i + 1], tokenizer))
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_the_encoder_runs_once_for_the_answers_of_a_row_with_equal_log_probs_and_gradients(
        kind, tokenizers, ten_rows):
    tokenizer = tokenizers[kind]
    module = make_module(kind, tokenizer)
    rows, _ = load(ten_rows, tokenizer)
    rows = rows[:3]
    sizes = []
    module.model.get_encoder().register_forward_hook(
        lambda encoder, inputs, output: sizes.append(len(output[0])))

    logps = logps_of(module, collate(rows, tokenizer))
    assert sizes == [3]
    logps.diff(dim=1).sum().backward()
    gradient = flat_gradient(module)

    module.zero_grad()
    apart = {"id": rows["id"] * 2, "prompt_ids": rows["prompt_ids"] * 2, "answer_ids": []}
    for k in (0, 1):
        apart["answer_ids"] += [[answers[k]] for answers in rows["answer_ids"]]
    by_answer = logps_of(module, collate(apart, tokenizer)).view(2, 3).T
    assert sizes == [3, 6]
    torch.testing.assert_close(by_answer, logps, rtol=0, atol=1e-9)
    by_answer.diff(dim=1).sum().backward()
    assert distance(flat_gradient(module), gradient) < 1e-6  # T5 computes parts in float32


def test_targets_give_the_log_probs_of_labels_and_weights_of_tokens(tokenizers, ten_rows):
    tokenizer = tokenizers["T5"]
    module = make_module("T5", tokenizer)
    rows, _ = load(ten_rows, tokenizer)
    expected = logps_of(module, collate(rows[:], tokenizer))
    batch = collate(rows[:], tokenizer, full_logits=False)
    torch.testing.assert_close(logps_of(module, batch), expected)

    # LD-DPO with alpha 0 counts as many tokens of both answers.
    task = make_task(LOSSES["sigmoid"], {}, Variants(ld_alpha=0.0), "float64", ALONE.device,
                     family=FAMILY)
    weighted = logps_of(module, collate_on_cpu(rows[:], tokenizer, task.row_format))
    for i, row in enumerate(rows):
        shorter = min(map(len, row["answer_ids"]))
        cut = dict(row, answer_ids=[ids[:shorter] for ids in row["answer_ids"]])
        cut = {name: [value] for name, value in cut.items()}
        torch.testing.assert_close(weighted[i], logps_of(module, collate(cut, tokenizer))[0])


def test_a_token_that_is_not_scored_is_read_by_the_decoder(tokenizers):
    tokenizer = tokenizers["T5"]
    module = make_module("T5", tokenizer)
    rows = {"id": ["a"], "prompt_ids": [[5, 6]], "answer_ids": [[[7, 8, 9]]]}
    whole = logps_of(module, collate(rows, tokenizer))
    part = logps_of(module, collate(rows | {"unscored": [[[1]]]}, tokenizer))
    only = logps_of(module, collate(rows | {"unscored": [[[0, 2]]]}, tokenizer))
    torch.testing.assert_close(part + only, whole)


def test_rows_with_different_numbers_of_answers_have_each_answer_behind_its_own_prompt(tokenizers):
    tokenizer = tokenizers["Bart"]
    module = make_module("Bart", tokenizer)
    rows = {"id": ["a", "b"], "prompt_ids": [[5, 6], [9, 4, 3]],
            "answer_ids": [[[7, 0]], [[8, 0], [7, 8, 0], [6, 0]]]}
    logps = logps_of(module, collate(rows, tokenizer, most_answers=4))
    assert logps.shape == (2, 4) and not logps[0, 1:].any() and not logps[1, 3]
    for i, k in ((0, 0), (1, 0), (1, 1), (1, 2)):
        alone = {"id": ["x"], "prompt_ids": rows["prompt_ids"][i:i + 1],
                 "answer_ids": [[rows["answer_ids"][i][k]]]}
        expected = logps_of(module, collate(alone, tokenizer))[0, 0]
        torch.testing.assert_close(logps[i, k], expected)


# --- What is tried before the first step ----------------------------------------------------------

@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_a_model_without_noise_whose_decoder_is_causal_has_no_fault(kind, tokenizers):
    module = make_module(kind, tokenizers[kind])
    assert find_fault(module) is None
    assert "apart" in can_pack(module) and "apart" in can_drop_mask(module)


def test_a_decoder_that_reads_later_tokens_and_a_layer_with_noise_are_found(tokenizers):
    module = make_module("T5", tokenizers["T5"])
    module.model.decoder.config.is_decoder = False  # then T5 makes no causal mask
    for layer in module.model.decoder.modules():
        if hasattr(layer, "is_causal"):
            layer.is_causal = False
    assert "depend on later tokens" in find_fault(module)
    noisy = make_module("T5", tokenizers["T5"])
    noisy.model.decoder.block[1].layer[2].dropout = torch.nn.Dropout(0.5)
    assert "decoder.block.1.layer.2.dropout" in find_fault(noisy)


# --- Tokens ---------------------------------------------------------------------------------------

def tokens_of(row, tokenizer):
    prompt = tokenizer.convert_ids_to_tokens(row["prompt_ids"])
    return prompt, [tokenizer.convert_ids_to_tokens(ids) for ids in row["answer_ids"]]


@pytest.fixture
def one_pair(tmp_path):
    row = {"prompt": "the cat sat on", "chosen": " a mat and saw", "rejected": " rain or sun"}
    return write_jsonl(tmp_path / "pair.jsonl", [row])


def test_the_encoder_gets_what_the_tokenizer_puts_around_a_text_and_an_answer_ends_with_eos(
        tokenizers, one_pair):
    for kind in ("T5", "Bart"):
        tokenizer = tokenizers[kind]
        rows, account = load(one_pair, tokenizer)
        assert rows[0]["prompt_ids"] == tokenizer("the cat sat on").input_ids
        for ids, text in zip(rows[0]["answer_ids"], (" a mat and saw", " rain or sun")):
            assert ids == tokenizer(text, add_special_tokens=False).input_ids + [
                tokenizer.eos_token_id]
        assert account["noted"] == {}


def test_prompt_and_answers_are_truncated_each_on_its_own(tokenizers, one_pair):
    tokenizer = tokenizers["Bart"]
    whole = tokens_of(load(one_pair, tokenizer)[0][0], tokenizer)
    prompt, (chosen, rejected) = whole
    assert (len(prompt), len(chosen), len(rejected)) == (7, 5, 4)

    # <bos> before the answer counts as one of the decoder's tokens.
    cut = tokens_of(load(one_pair, tokenizer, max_length=4)[0][0], tokenizer)
    assert cut == (prompt[:1] + prompt[-3:], [chosen[:3], rejected[:3]])
    cut = tokens_of(load(one_pair, tokenizer, max_length=4, truncation_mode="keep_start")[0][0],
                    tokenizer)
    assert cut[0] == prompt[:3] + prompt[-1:]
    cut = tokens_of(load(one_pair, tokenizer, max_prompt_length=5, max_completion_length=2)[0][0],
                    tokenizer)
    assert cut == (prompt[:1] + prompt[-4:], [chosen[:2], rejected[:2]])
    with pytest.raises(UserError, match="none of its 1 rows can be used .too long"):
        load(one_pair, tokenizer, max_length=5, overlong="drop")


def test_an_answer_may_be_as_long_as_the_decoder_and_a_prompt_as_the_encoder(tokenizers, tmp_path):
    tokenizer = tokenizers["Bart"]
    module = make_module("Bart", tokenizer)  # 64 positions
    text = " cat" * 90
    rows = [{"prompt": text, "chosen": text, "rejected": " rain" + text}]
    rows, _ = load(write_jsonl(tmp_path / "long.jsonl", rows), tokenizer, max_length=64)
    assert len(rows[0]["prompt_ids"]) == 64 and len(rows[0]["answer_ids"][0]) == 63
    assert logps_of(module, collate(rows[:], tokenizer)).isfinite().all()


CHAT = ("{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content }}"
        "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")


def test_messages_are_written_by_the_template_which_adds_its_own_special_tokens(tmp_path):
    tokenizer = make_s2s_tokenizer()
    tokenizer.chat_template = CHAT
    say = {role: lambda text, role=role: {"role": role, "content": text}
           for role in ("user", "assistant")}
    turns = [say["assistant"]("rain"), say["user"]("and"), say["assistant"]("sun")]
    rows = [{"prompt": [say["user"]("the cat")], "chosen": turns,
             "rejected": [say["assistant"]("mat")]}]
    rows, _ = load(write_jsonl(tmp_path / "chat.jsonl", rows), tokenizer)
    assert tokenizer.decode(rows[0]["prompt_ids"]) == "<user>the cat<assistant>"
    assert tokenizer.decode(rows[0]["answer_ids"][0]) == "rain<eos><user>and<assistant>sun<eos>"
    scored = [ids for place, ids in enumerate(rows[0]["answer_ids"][0])
              if place not in rows[0]["unscored"][0]]
    assert tokenizer.decode(scored) == "rain<eos>sun<eos>"
    served = encode_prompts([[say["user"]("the cat")]], tokenizer, ["one"], {}, FAMILY)
    assert served == [rows[0]["prompt_ids"]]


def test_a_very_long_text_is_shortened_before_it_is_tokenized_without_another_result(
        tokenizers, tmp_path, monkeypatch):
    tokenizer = tokenizers["T5"]
    text = " ".join(row["prompt"] for row in make_rows(3000))
    rows = [{"prompt": text, "chosen": " cat " + text, "rejected": " dog " + text}]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    shortened, _ = load(path, tokenizer, max_length=30)
    monkeypatch.setattr(data, "shorten_texts", lambda texts, most, tokenizer: texts)
    monkeypatch.setattr(data, "SOURCE", "another cache")
    whole, _ = load(path, tokenizer, max_length=30)
    assert shortened[0]["prompt_ids"] == whole[0]["prompt_ids"]
    assert shortened[0]["answer_ids"] == whole[0]["answer_ids"]


def test_the_report_shows_prompt_and_answers_of_the_family_of_the_model(folders, one_pair, capsys):
    data.main([one_pair, f"--model={folders / 'Bart'}"])
    printed = capsys.readouterr().out
    assert "prompt   '<bos>the cat sat on<eos>'" in printed
    assert "rejected [ rain| or| sun|<eos>]" in printed


# --- Answers --------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_generated_answer_is_that_of_transformers_alone_and_in_a_batch(kind, tokenizers):
    tokenizer = tokenizers[kind]
    model = make_s2s_model(kind, tokenizer).double().eval()
    model.generation_config.forced_eos_token_id = None  # which would end each answer
    texts = ["the cat", "sat on a mat and saw one more dog", "rain"]
    prompts = encode_prompts(texts, tokenizer, texts, None, FAMILY)
    assert prompts == tokenizer(texts).input_ids
    answers = generate(model, tokenizer, prompts, Sampling(9))
    prefix = torch.tensor([decoder_prefix(model, tokenizer)])
    for prompt, answer in zip(prompts, answers):
        expected = model.generate(torch.tensor([prompt]), decoder_input_ids=prefix,
                                  max_new_tokens=9, do_sample=False, num_beams=1)
        assert answer.ids == expected[0, prefix.shape[1]:].tolist()
        assert generate(model, tokenizer, [prompt], Sampling(9))[0].ids == answer.ids
        # The log-probs are those of training.
        rows = {"id": ["x"], "prompt_ids": [prompt], "answer_ids": [[answer.ids]]}
        logps = logps_of(logps_module(model), collate(rows, tokenizer))
        torch.testing.assert_close(logps[0, 0].item(), sum(answer.logps))


# --- Runs -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(folders, ten_rows, tmp_path_factory):
    """Folders of finished runs on ten rows: SFT, then DPO from its model, and DPO by LoRA."""
    home = tmp_path_factory.mktemp("runs")
    flags = TINY_RUN | {"dataset": ten_rows, "eval_share": 0.2, "save_every": 2, "max_steps": 4,
                        "keep_checkpoints": 9}
    for name, more in {
        "sft": {"loss": "sft", "model": folders / "T5"},
        "dpo": {"model": home / "sft", "eval_every": 2},
        "lora": {"model": folders / "Bart", "lora_rank": 2, "lora_alpha": 8},
    }.items():
        more["output_dir"] = home / name
        train.main(to_arguments(flags | more), ALONE)
    return home


def test_a_run_of_sft_and_one_of_dpo_lower_their_losses_and_evaluate(finished):
    for name in ("sft", "dpo", "lora"):
        rows = read_metrics(finished / name)
        losses = [row["loss"] for row in rows if row["split"] == "train"]
        assert losses[-1] < losses[0], name
        assert rows[-1]["split"] == "eval"
    assert read_metrics(finished / "dpo")[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_the_saved_model_is_loaded_by_the_class_of_transformers(finished, ten_rows):
    loaded = transformers.AutoModelForSeq2SeqLM.from_pretrained(finished / "dpo")
    assert isinstance(loaded, transformers.T5ForConditionalGeneration)
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "dpo")
    rows, _ = load(ten_rows, tokenizer)
    batch = collate(rows[:], tokenizer)
    ours = logps_of(logps_module(models.load_model(str(finished / "dpo"))), batch)
    torch.testing.assert_close(logps_of(logps_module(loaded.eval()), batch), ours)


@pytest.mark.parametrize("name", ["dpo", "lora"])
def test_a_killed_run_that_is_resumed_ends_with_the_same_bits(name, finished, tmp_path, capsys):
    killed = unfinished(shutil.copytree(finished / name, tmp_path / "killed"))
    shutil.rmtree(killed / "checkpoint-4", ignore_errors=True)
    resume(killed)
    assert "resumed after step 2" in capsys.readouterr().out
    file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
    expected, found = load_file(finished / name / file), load_file(killed / file)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    lines = [[row | {"tokens_per_second": 0} for row in read_metrics(folder)]
             for folder in (finished / name, killed)]
    assert lines[0] == lines[1]


def test_an_adapter_names_its_task_and_its_layers_and_is_merged(finished, tmp_path, capsys):
    out = finished / "lora"
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert "model.decoder.layers.0.encoder_attn.q_proj" in config["target_modules"]
    assert read_adapter(out)[0].rank == 2
    models.main(["merge", f"--adapter={out}", f"--out={tmp_path / 'merged'}"])
    assert "AutoModelForSeq2SeqLM" in (out / "README.md").read_text()
    merged = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    assert isinstance(merged, transformers.BartForConditionalGeneration)


def test_an_adapter_gives_the_same_logits_in_peft_which_saves_it_for_us(finished, tmp_path):
    peft = pytest.importorskip("peft")
    base = json.loads((finished / "lora" / "adapter_config.json").read_text())
    base = base["base_model_name_or_path"]
    theirs = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(finished / "lora").eval()
    ids = torch.tensor([[5, 6, 7, 0]])
    logits = theirs(input_ids=ids, decoder_input_ids=ids).logits
    theirs.save_pretrained(tmp_path / "theirs")
    for adapter in (finished / "lora", tmp_path / "theirs"):
        ours = models.load_model(base)
        models.load_adapter(ours, adapter)
        found = ours(input_ids=ids, decoder_input_ids=ids).logits
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)


def test_the_code_of_the_card_loads_a_model_that_answers(finished):
    code = card.loading_code(finished / "dpo", read_run_file(finished / "dpo")["flags"])
    names = {}
    exec(code.split("```")[1].removeprefix("python"), names)
    assert isinstance(names["model"], transformers.T5ForConditionalGeneration)


def test_policy_and_reference_answer_and_score_the_rows(finished, ten_rows, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    sample.main([f"--model={finished / 'dpo'}", f"--dataset={ten_rows}", "--count=2",
                 "--max_new_tokens=5", f"--out={out}"])
    line = json.loads(out.read_text().splitlines()[0])
    assert line["chosen"]["text"] == make_rows(1)[0]["chosen"]
    assert line["policy"]["reward"] != line["reference"]["reward"]
    scores = tmp_path / "scores.jsonl"
    sample.main([f"--model={finished / 'dpo'}", f"--score={ten_rows}", f"--out={scores}"])
    scored = json.loads(scores.read_text().splitlines()[0])
    assert scored["rewards"][0] == pytest.approx(line["chosen"]["reward"], abs=1e-4)


def test_with_gradient_checkpointing_the_policy_still_equals_its_reference_in_bfloat16(tokenizers):
    """The bias of T5's cross-attention must not select another kernel than in the reference."""
    logits = []
    for checkpointed in (False, True):
        model = make_s2s_model("T5", tokenizers["T5"]).to(torch.bfloat16)
        turn_off_noise(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.arange(1, 33).view(2, 16)
        with torch.no_grad():
            logits.append(model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits)
    assert torch.equal(*logits)


def test_the_cached_reference_and_the_one_in_memory_train_the_same_model(
        fit, folders, ten_rows, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = {"model": folders / "MT5", "dataset": ten_rows, "max_steps": 2, "eval_share": 0.2}
    one, _ = fit(**flags, out="memory")
    two, _ = fit(**flags, out="cache", ref="cache")
    left, right = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    for key, value in left.items():
        torch.testing.assert_close(right[key], value, rtol=1e-4, atol=1e-5)


def test_losses_of_labels_and_of_lists_train_too(fit, folders, ten_rows):
    for flags in ({"loss": "kto", "unpair": True}, {"loss": "plackett_luce"}):
        _, rows = fit(model=folders / "T5", dataset=ten_rows, max_steps=2, out=flags["loss"],
                      **flags)
        assert rows[-1]["split"] == "eval"


def test_the_answer_of_another_row_is_not_truncated_to_what_a_prompt_leaves(tokenizers, ten_rows):
    needs, device = needs_of(LOSSES["kto"]), ALONE.device
    shape = data.Shape(unpair=True)
    limits = data.Limits(max_length=8, family=FAMILY)
    rows, _ = data.load_tokens(ten_rows, tokenizers["T5"], needs, limits, shape)
    task = make_task(LOSSES["kto"], {}, Variants(), "float32", device, family=FAMILY)
    others = mismatched_rows(argparse.Namespace(max_length=8), task, rows)
    assert sorted(others[:]["answer_ids"]) == sorted(rows[:]["answer_ids"])


def test_policy_and_reference_answer_during_a_run(fit, folders, ten_rows):
    out, _ = fit(model=folders / "Bart", dataset=ten_rows, max_steps=2, sample_every=1,
                 sample_prompts=2, sample_tokens=4)
    lines = (out / "samples.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 4  # two prompts after each of two steps
    assert first["policy"]["reward"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_two_processes_train_the_model_of_one(parallel, kind, fit, folders, ten_rows, tmp_path):
    flags = {"model": folders / kind, "dataset": ten_rows, "max_steps": 3, "eval_share": 0.2}
    out, _ = fit(**flags)
    other = tmp_path / "two"
    process = run_training(TINY_RUN | flags | {"parallel": parallel, "output_dir": other}, ranks=2)
    assert process.returncode == 0, process.stderr
    left, right = load_file(out / "model.safetensors"), load_file(other / "model.safetensors")
    for key, value in left.items():
        # The gradient of a key's bias is 0 up to rounding, which Adam makes steps of.
        if not key.endswith("k_proj.bias"):
            torch.testing.assert_close(right[key], value, rtol=1e-3, atol=1e-5)


# --- Bad input ------------------------------------------------------------------------------------

def test_packed_rows_and_a_reference_of_another_family_are_refused(fit, folders, folder, ten_rows):
    flags = {"model": folders / "T5", "dataset": ten_rows}
    with pytest.raises(UserError, match="--attention packed: an encoder-decoder reads prompt"):
        fit(**flags, attention="packed")
    with pytest.raises(UserError, match="--ref_model .*only one of it and the policy"):
        fit(**flags, ref_model=folder)
    with pytest.raises(UserError, match="--compile: the blocks of T5"):
        fit(**flags, compile=True)
    with pytest.raises(UserError, match="is no decoder; train it by train.py"):
        dpo.main([f"--model={folders / 'T5'}", f"--dataset={ten_rows}"])


@pytest.mark.parametrize("kind", ["ViT", "Whisper", "CLIP"])
def test_a_model_of_no_family_is_refused_in_one_line(kind, tokenizers, tmp_path):
    config = getattr(transformers, f"{kind}Config")()
    config.save_pretrained(tmp_path)
    tokenizers["T5"].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"is a {config.model_type} model, which does not"):
        models.load_model(str(tmp_path))


def test_a_model_without_the_token_that_starts_its_decoder_is_refused(tokenizers):
    model = make_s2s_model("T5", tokenizers["T5"])
    model.config.decoder_start_token_id = None
    model.config.bos_token_id = None
    with pytest.raises(UserError, match="no decoder_start_token_id"):
        EncoderDecoderLogps(model)


def test_the_weights_of_a_decoder_alone_are_those_of_a_decoder(tokenizers):
    config = make_s2s_model("Bart", tokenizers["Bart"]).config
    assert family_of(config) == FAMILY
    assert family_of(transformers.BartForCausalLM(config).config) == "decoder"
