"""Generated answers: those of transformers, alone as in a batch, repeatable, without a trace."""
import contextlib
import math

import forked
import pytest
import torch
from conftest import ROOT, tiny_model
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)

import generation
import packing
from generation import Sampling, choose_tokens, encode_prompts, generate, stop_ids
from logps import FastLogps
from lora import LoraSettings, add_adapter, target_modules

CHAT = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<pad>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")
TEXTS = ["the cat", "sat on a mat and saw one more dog", "rain", "far from home in rain or sun"]


def make_model(kind, tokenizer):
    """A tiny model in float64, in which the next token has no ties up to rounding."""
    options = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
               "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
               "max_position_embeddings": 128, "initializer_range": 0.1}
    torch.manual_seed(0)
    if kind == "mistral":
        model = AutoModelForCausalLM.from_config(MistralConfig(**options, sliding_window=5))
    elif kind == "qwen3":
        model = AutoModelForCausalLM.from_config(Qwen3Config(**options, head_dim=16))
    else:
        model = tiny_model(kind, tokenizer)
    return model.double().eval()


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral", "qwen3"])
def model(request, tokenizer):
    return make_model(request.param, tokenizer)


@pytest.fixture(scope="module")
def llama(tokenizer):
    return make_model("llama", tokenizer)


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return encode_prompts(TEXTS, tokenizer, TEXTS)


def ids_of(answers):
    return [answer.ids for answer in answers]


def test_greedy_answers_are_those_of_transformers(model, tokenizer, prompts):
    for prompt, answer in zip(prompts, generate(model, tokenizer, prompts, Sampling(20))):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False,
                               eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
        assert answer.ids == whole[0, len(prompt):].tolist()


def test_a_greedy_answer_of_a_batch_is_that_of_its_prompt_alone(model, tokenizer, prompts):
    assert generation.pads_exactly(model, None)
    together = generate(model, tokenizer, prompts, Sampling(20, batch_size=4))
    alone = [generate(model, tokenizer, [prompt], Sampling(20))[0] for prompt in prompts]
    assert ids_of(together) == ids_of(alone)
    assert [answer.text for answer in together] == [answer.text for answer in alone]


@pytest.mark.parametrize("config", [
    BloomConfig(vocab_size=319, hidden_size=32, n_layer=2, n_head=2),
    MambaConfig(vocab_size=319, hidden_size=32, num_hidden_layers=2, state_size=8),
    Gemma2Config(vocab_size=319, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=64, num_key_value_heads=1, head_dim=16, sliding_window=4),
], ids=["padding is nan", "padding is in the state", "padding is nan in a window"])
def test_the_batch_of_a_model_that_cannot_pad_answers_as_its_prompts_alone(
        config, tokenizer, prompts):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    model.generation_config.eos_token_id = None
    for parameter in model.parameters():
        parameter.data.mul_(3)
    together = generate(model, tokenizer, prompts + prompts, Sampling(10))
    alone = [generate(model, tokenizer, [prompt], Sampling(10))[0] for prompt in prompts]
    assert ids_of(together) == ids_of(alone + alone)
    for prompt, answer in zip(prompts, alone):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False,
                               eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
        assert answer.ids == whole[0, len(prompt):].tolist()


def test_a_sampled_answer_depends_on_the_seed_and_not_on_the_size_of_batches(
        model, tokenizer, prompts):
    def sample(seed, size):
        generator = torch.Generator().manual_seed(seed)
        settings = Sampling(20, temperature=1.5, top_p=0.9, batch_size=size)
        return ids_of(generate(model, tokenizer, prompts, settings, generator))

    assert sample(0, 1) == sample(0, 2) == sample(0, 4)
    assert sample(0, 4) != sample(1, 4)


def test_the_log_probs_are_those_of_the_model_for_the_whole_text(model, tokenizer, prompts):
    settings = Sampling(20, temperature=1.5, top_p=0.5)
    for prompt, answer in zip(prompts, generate(model, tokenizer, prompts, settings)):
        logits = model(torch.tensor([prompt + answer.ids])).logits[0, len(prompt) - 1:-1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        assert torch.allclose(torch.tensor(answer.logps, dtype=torch.float64), expected)


def test_a_token_is_sampled_with_its_probability_among_those_of_top_p():
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    logits = probabilities.log().expand(1000, 4)
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for top_p, expected in ((1.0, [100, 400, 200, 300]), (0.6, [0, 571, 0, 429]),
                            (1e-9, [0, 1000, 0, 0])):
        tokens = choose_tokens(logits, Sampling(temperature=1.0, top_p=top_p), uniform)
        assert tokens.bincount(minlength=4).tolist() == expected


def test_a_low_temperature_samples_the_greedy_token_and_a_high_one_all_alike():
    logits = torch.tensor([[0.0, 1.0, 0.5]]).expand(900, 3)
    uniform = (torch.arange(900, dtype=torch.float64) + 0.5) / 900
    cold = choose_tokens(logits, Sampling(temperature=1e-3), uniform)
    hot = choose_tokens(logits, Sampling(temperature=1e6), uniform)
    assert cold.eq(1).all() and hot.bincount().tolist() == [300, 300, 300]


def test_generation_leaves_no_trace_in_a_model_that_is_being_trained(tokenizer, prompts):
    torch.manual_seed(0)
    model = tiny_model("llama", tokenizer)
    add_adapter(model, "policy", target_modules(model, None), LoraSettings(4, 8.0, dropout=0.5))
    options = {"use_reentrant": False}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    packing.enable(model)
    model.train()
    model.lm_head.eval()

    def state():
        modes = [module.training for module in model.modules()]
        random = torch.get_rng_state().tolist()
        return modes, random, torch.is_grad_enabled(), model.config.to_dict()

    before = state()
    answers = generate(model, tokenizer, prompts, Sampling(8, temperature=1.0))
    assert state() == before
    assert ids_of(answers) == ids_of(
        generate(model, tokenizer, prompts, Sampling(8, temperature=1.0)))


def test_the_mode_is_restored_after_ctrl_c_in_the_middle_of_an_answer(llama, prompts):
    llama.train()
    uniform = torch.zeros(len(prompts), 20)
    steps = generation.answer_steps(llama, prompts, Sampling(20), set(), uniform)
    next(steps)
    assert not llama.training
    with contextlib.suppress(KeyboardInterrupt):
        steps.throw(KeyboardInterrupt)
    assert llama.training
    llama.eval()


def test_generation_computes_the_same_under_packed_attention(model, tokenizer, prompts):
    before = model.config._attn_implementation
    plain = generate(model, tokenizer, prompts, Sampling(12))
    packing.enable(model)
    enabled = generate(model, tokenizer, prompts, Sampling(12))
    model.config._attn_implementation = before
    assert ids_of(plain) == ids_of(enabled)


def test_a_reference_without_a_model_of_its_own_is_the_policy_without_its_adapter(
        tokenizer, prompts):
    model = make_model("llama", tokenizer)
    expected = ids_of(generate(model, tokenizer, prompts, Sampling(12)))
    add_adapter(model, "policy", target_modules(model, None), LoraSettings(4, 8.0))
    for name, parameter in model.named_parameters():
        if ".B." in name:
            torch.nn.init.normal_(parameter)
    policy = FastLogps(model)
    assert ids_of(generate(model, tokenizer, prompts, Sampling(12))) != expected
    with generation.reference_model(policy, lambda **inputs: None) as reference:
        assert ids_of(generate(reference, tokenizer, prompts, Sampling(12))) == expected


def test_an_answer_ends_at_each_eos_of_the_generation_config_and_where_the_template_ends_a_turn(
        llama, tokenizer):
    llama.generation_config.eos_token_id = None
    assert stop_ids(llama, tokenizer) == {tokenizer.eos_token_id}
    llama.generation_config.eos_token_id = [5, 7]
    assert stop_ids(llama, tokenizer) == {tokenizer.eos_token_id, 5, 7}
    tokenizer.chat_template = CHAT
    assert stop_ids(llama, tokenizer) == {tokenizer.eos_token_id, tokenizer.pad_token_id, 5, 7}
    tokenizer.chat_template = llama.generation_config.eos_token_id = None


def test_an_answer_ends_with_its_stop_token_which_is_scored_and_not_part_of_the_text(
        llama, tokenizer, prompts):
    free = generate(llama, tokenizer, prompts[:1], Sampling(10))[0]
    llama.generation_config.eos_token_id = free.ids[4]
    answer = generate(llama, tokenizer, prompts[:1], Sampling(10))[0]
    llama.generation_config.eos_token_id = None
    end = free.ids.index(free.ids[4])
    assert answer.ids == free.ids[:end + 1] and answer.ended and not free.ended
    assert len(answer.logps) == end + 1
    assert tokenizer.decode(prompts[0] + free.ids[:end]).endswith(answer.text)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_answer_ends_at_the_last_position_of_the_model_alone_and_in_a_batch(kind, tokenizer):
    """GPT-2 has a table of 128 positions and cannot compute another one."""
    model = make_model(kind, tokenizer)
    long = [5] * 125
    answers = generate(model, tokenizer, [long, [5, 6]], Sampling(20))
    assert len(answers[0].ids) == 3 and len(answers[1].ids) == 20
    assert answers[0].ids == generate(model, tokenizer, [long], Sampling(20))[0].ids


def test_prompts_become_the_tokens_that_training_reads(tokenizer):
    text, chat = encode_prompts(["the cat", [{"role": "user", "content": "the cat"}]],
                                with_template(tokenizer), ["a", "b"])
    assert text == tokenizer("the cat")["input_ids"]
    assert chat == tokenizer("<|user|>the cat<pad><|assistant|>")["input_ids"]
    tokenizer.chat_template = None


def with_template(tokenizer):
    tokenizer.chat_template = CHAT
    return tokenizer


def test_texts_of_any_script_are_answered(llama, tokenizer):
    texts = ["naïve café", "你好，世界", "emoji 👩‍🚀 and \u202e marks", "\x00\x1b[2J"]
    prompts = encode_prompts(texts, tokenizer, texts)
    assert [tokenizer.decode(ids) for ids in prompts] == texts
    for answer in generate(llama, tokenizer, prompts, Sampling(5)):
        assert len(answer.ids) <= 5 and all(math.isfinite(logp) for logp in answer.logps)


SHARDED = """
import sys
sys.path[:0] = sys.argv[2:]
import parallel
from generation import Sampling, generate, sharded_forward
from loading import load_tokenizer
from logps import FastLogps
from model import load_model

def make(device, unreached=None):
    return FastLogps(load_model(sys.argv[1], device=device))

ranks = parallel.init_distributed()
tokenizer = load_tokenizer(sys.argv[1])
prompts, settings = [[5, 6], [7, 8, 9, 10]], Sampling(8, temperature=1.0)
whole = generate(make(ranks.device).model, tokenizer, prompts, settings)
module = parallel.build_on_ranks(make, ranks, "fsdp", "float32")
forward = sharded_forward(module)
sharded = generate(module.model, tokenizer, prompts, settings, forward=forward)
print([answer.ids for answer in sharded] == [answer.ids for answer in whole], flush=True)
parallel.leave_distributed(ranks)
"""


def test_all_ranks_generate_the_same_answers_from_sharded_weights(folder, tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    done = forked.run(tmp_path / "sharded.py", folder, ROOT, ROOT / "tests", ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "True"]
