"""Generates answers: prompts of token ids -> token ids, their log-probs and texts.

    settings = Sampling(max_new_tokens=64, temperature=0.7)
    answers = generate(model, tokenizer, prompts, settings, torch.Generator().manual_seed(0))

`answer_steps` is the loop: one forward computes the next token of every answer of a batch, and the
keys and values of earlier tokens stay in the model's cache. `generate` collects its tokens, and the
chat of sample.py prints them as they come. For two prompts of 2 and 3 tokens, padded on the left:

    step 0    input_ids  . 5 6    positions  0 0 1    -> the tokens 7 and 4
                         1 2 3               0 1 2
    step 1    input_ids  7        positions  2        -> the next tokens
                         4                   3

The encoder of an encoder-decoder reads the prompts in step 0 only, padded on the right. Its decoder
begins with tokens of its own, see encoder_decoder.decoder_prefix.

The loop is written here, and is not transformers' model.generate, for three properties:

    repeatable     an answer depends on its own prompt, the seed and its place in the list of
                   prompts, not on the size of the batches: each answer has its own random numbers
    no traces      the global random state is not read or changed, and each module is in training
                   or evaluation mode again as before. So training may generate between two steps
    exact          the log-probs are those of the model, before temperature and top_p

Letters: B prompts of a batch, T tokens of the longest prompt, V vocabulary.
"""
import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers.modeling_outputs import BaseModelOutput

import data
from encoder_decoder import decoder_prefix, mask_of
from errors import UserError
from families import family_of
from loading import leaves_out, loses, position_count
from lora import use_adapter
from packing import padded
from templates import read_special_tokens, render, texts_of_rows

# The argument and output with the keys and values of earlier tokens, in versions of transformers,
# and its name in models with a recurrent state.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")


class Sampling(NamedTuple):
    """How the tokens of an answer are chosen, and when it ends."""
    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: the most probable token, else 0.7 to 1
    top_p: float = 1.0  # sample from the most probable tokens that have this probability together
    batch_size: int = 8  # prompts of one forward


class Answer(NamedTuple):
    """An answer to one prompt."""
    ids: list[int]  # with the token that ends the answer, if it ended
    logps: list[float]  # log-prob of each token under the model that wrote it
    text: str  # without the token that ends it
    ended: bool  # False: cut off at max_new_tokens, or where the model has no more positions


def generate(model: torch.nn.Module, tokenizer: Any, prompts: list[list[int]],
             settings: Sampling = Sampling(), generator: torch.Generator | None = None,
             forward: Callable | None = None) -> list[Answer]:
    """Generate one answer to each prompt.

    model       a decoder or encoder-decoder of transformers, on any device. A bfloat16 run calls
                this under the autocast of its training
    prompts     token ids, as `data.load_tokens` and `encode_prompts` make them
    generator   of the CPU, read if the temperature is above 0 (default: seeded with 0)
    forward     in place of the model's own: `sharded_forward`. All ranks then call this function
                with the same arguments, and get the same answers
    """
    generator = generator or torch.Generator().manual_seed(0)
    shape = (len(prompts), settings.max_new_tokens)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    ends, answers = stop_ids(model, tokenizer), [None] * len(prompts)
    prefix = decoder_prefix(model, tokenizer)
    for indices in split_prompts(model, prompts, settings.batch_size, forward, prefix):
        batch = [prompts[index] for index in indices]
        ids, logps = [[] for _ in batch], [[] for _ in batch]
        steps = answer_steps(model, batch, settings, ends, uniform[indices], forward, prefix)
        for step_tokens, step_logps, running in steps:
            for i in running.nonzero()[:, 0].tolist():
                ids[i].append(step_tokens[i].item())
                logps[i].append(step_logps[i].item())
        for i, index in enumerate(indices):
            text = answer_text(tokenizer, [] if prefix else batch[i], ids[i], ends)
            ended = not ends.isdisjoint(ids[i][-1:])
            answers[index] = Answer(ids[i], logps[i], text, ended)
    return answers


def split_prompts(model, prompts, size, forward, prefix) -> list[list[int]]:
    """Split the indices of the prompts into batches, without padding if the model computes padded
    prompts otherwise."""
    groups = {0: list(range(len(prompts)))}
    if len(set(map(len, prompts))) > 1 and not pads_exactly(model, forward, prefix):
        groups = {}
        for index, prompt in enumerate(prompts):
            groups.setdefault(len(prompt), []).append(index)
    batches = []
    for indices in groups.values():
        for start in range(0, len(indices), size):
            batches.append(indices[start:start + size])
    return batches


def pads_exactly(model, forward, prefix=None) -> bool:
    """Return whether two tokens behind a padded prompt have the log-probs that they have behind the
    prompt alone. In some models padding becomes NaN, or part of a recurrent state."""
    def two_logps(prompts):
        uniform = torch.zeros(len(prompts), 2)
        steps = answer_steps(model, prompts, Sampling(2), set(), uniform, forward, prefix)
        return torch.stack([logps[0] for _, logps, _ in steps])

    alone, padded = two_logps([[1]]), two_logps([[1], [1, 2, 3, 4, 5]])
    # An error is far larger, or NaN; rounding in bfloat16 is smaller.
    return torch.allclose(alone, padded, rtol=0, atol=0.1)


@torch.no_grad()
def answer_steps(model: torch.nn.Module, prompts: list[list[int]], settings: Sampling,
                 ends: set[int], uniform: torch.Tensor, forward: Callable | None = None,
                 prefix: list[int] | None = None) -> Iterator[tuple]:
    """Yield the next token of each answer, its log-prob, and whether the answer was still running,
    (B,) each on the CPU, until no answer is running.

    ends        the ids that end an answer
    uniform     (B, max_new_tokens) random numbers in [0, 1)
    prefix      the tokens that a decoder reads which does not read the prompts
    """
    most = position_count(model)
    lengths = torch.tensor([len(prompt) for prompt in prompts])  # (B,)
    if prefix:
        lengths = torch.full_like(lengths, len(prefix) - 1)
    running = lengths < most
    end_ids = torch.tensor(sorted(ends))
    inputs = first_inputs(prompts, prefix)
    parameters = inspect.signature(model.forward).parameters
    cache_name = next(name for name in CACHE_NAMES if name in parameters)
    options = {"use_cache": True}
    if "logits_to_keep" in parameters:  # logits of the whole prompt could be gigabytes
        options["logits_to_keep"] = 1
    with evaluating(model):
        for step in range(settings.max_new_tokens):
            given = dict(inputs)
            # A recurrent state needs no mask, and some models misread one of all tokens.
            if step > 0 and getattr(model, "_is_stateful", False):
                del given["attention_mask"]
            if "position_ids" not in parameters:
                given.pop("position_ids", None)
            given = {name: value.to(model.device) for name, value in given.items()}
            output = (forward or model)(**given, **options)

            # The small rest runs on the CPU, where every kernel is deterministic.
            logits = output.logits[:, -1]  # (B, V)
            dtype = torch.promote_types(logits.dtype, torch.float32)
            logits = logits.to("cpu", dtype)
            tokens = choose_tokens(logits, settings, uniform[:, step])  # (B,)
            logps = logits.log_softmax(-1)  # (B, V)
            logps = logps.gather(1, tokens[:, None])[:, 0]  # (B,)
            yield tokens, logps, running

            has_room = lengths + step + 1 < most
            running = running & has_room & ~torch.isin(tokens, end_ids)
            if not running.any():
                return
            options[cache_name] = output[cache_name]
            if prefix:
                options["encoder_outputs"] = BaseModelOutput(output.encoder_last_hidden_state)
            inputs = next_inputs(inputs, tokens, most)


def first_inputs(prompts: list[list[int]], prefix: list[int] | None) -> dict:
    """The inputs of step 0, (B, T) each, and of a decoder with a prefix, (B, prefix)."""
    if prefix:
        starts = torch.tensor([prefix] * len(prompts))
        return {"input_ids": padded(prompts, 0), "attention_mask": mask_of(prompts),
                "decoder_input_ids": starts}
    input_ids, mask = pad_left(prompts)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # 0 for padding
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}


def next_inputs(inputs: dict, tokens: torch.Tensor, most: float) -> dict:
    """The inputs of the next step, which reads one token of each answer, (B,)."""
    input_ids, mask = tokens[:, None], inputs["attention_mask"]
    if "decoder_input_ids" in inputs:
        return {"attention_mask": mask, "decoder_input_ids": input_ids}
    mask = torch.cat([mask, torch.ones_like(input_ids)], dim=1)
    # An answer that has ended is computed with the others, within the model's positions.
    positions = (inputs["position_ids"][:, -1:] + 1).clamp(max=most - 1)
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}


def choose_tokens(logits: torch.Tensor, settings: Sampling, uniform: torch.Tensor) -> torch.Tensor:
    """The next token of each answer: logits (B, V), uniform (B,) in [0, 1) -> (B,).

    A sampled token is the first one, from the most probable down, at which the cumulative
    probability exceeds the random number.
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    scaled = logits.double() / settings.temperature
    probabilities = scaled.softmax(-1)  # (B, V)
    probabilities, order = probabilities.sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = before < settings.top_p
    kept[:, 0] = True
    cumulative = (probabilities * kept).cumsum(-1)
    threshold = uniform * cumulative[:, -1]  # (B,)
    index = (cumulative <= threshold[:, None]).sum(-1)
    index = index.minimum(kept.sum(-1) - 1)
    return order.gather(1, index[:, None])[:, 0]


def pad_left(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """-> input_ids and attention mask, (B, T). Padding is on the left, so that the next token of
    each prompt follows the last column. It is masked, so that any id will do."""
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt)
        ids[row, start:] = torch.tensor(prompt)
        mask[row, start:] = 1
    return ids, mask


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Set evaluation mode, in which gradient checkpointing does not turn off the cache, and then
    set the mode of every module back. The modules of a model in training differ: see reach.py."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def sharded_forward(module: torch.nn.Module) -> Callable:
    """Return the forward of module.model for a FastLogps that FSDP may have sharded.

    FSDP gathers the embeddings and the head around a forward of `module` itself, not of
    module.model. FastLogps.forward returns no cache, so another method is registered. All ranks
    compute the same answers; whole weights on rank 0 alone might not fit into its memory.
    """
    module.cached_forward = lambda **inputs: module.model(**inputs)
    register_fsdp_forward_method(module, "cached_forward")
    return module.cached_forward


@contextlib.contextmanager
def reference_model(policy: torch.nn.Module, reference: Callable) -> Iterator[torch.nn.Module]:
    """Yield the model of a reference of `load_reference`, to generate from it. Where the reference
    is the policy without its adapter, or with a frozen adapter, the policy is that inside."""
    if isinstance(reference, torch.nn.Module):
        yield reference.model
        return
    # Without an adapter of this name, no adapter is active.
    with use_adapter(policy.model, "reference"):
        yield policy.model


# --- Text to tokens, and back ---------------------------------------------------------------------

def stop_ids(model: torch.nn.Module, tokenizer: Any) -> set[int]:
    """Return the ids that end an answer: EOS of the tokenizer, those of generation_config.json, and
    the token with which the chat template ends a turn, such as <|im_end|>."""
    ends = {tokenizer.eos_token_id}
    generation_config = getattr(model, "generation_config", None)
    named = getattr(generation_config, "eos_token_id", None)
    ends.update(named if isinstance(named, list) else [named])
    if tokenizer.chat_template is not None:
        question = {"role": "user", "content": "question"}
        reply = {"role": "assistant", "content": "answer"}
        text, = write_chats([[question, reply]], tokenizer, ["a turn"], {})
        end = text.rpartition("answer")[2]
        match = read_special_tokens(tokenizer).pattern.search(end)
        if match:
            ends.add(tokenizer.convert_tokens_to_ids(match[0]))
    return ends - {None}


def write_chats(chats: list[list[dict]], tokenizer: Any, names: list[str], options: dict,
                **served) -> list[str]:
    """Write each list of messages by the chat template. A template is a program of the model's
    folder, so it has limits: see limits.py."""
    def text_of(i):
        return render(chats[i], tokenizer, names[i], options, **served)

    return texts_of_rows(text_of, len(chats), names)


def encode_prompts(prompts: list, tokenizer: Any, names: list[str],
                   options: dict | None = None, family: str = "decoder") -> list[list[int]]:
    """Turn prompts, each a text or a list of messages, into token ids, as data.py does in training.

    names       of the prompts, for errors
    options     of the chat template, from --template_kwargs
    family      of the model, see families.py
    """
    chats, chat_names = [], []
    for prompt, name in zip(prompts, names):
        if not isinstance(prompt, str):
            chats.append(prompt)
            chat_names.append(name)
    written = iter(())
    if chats:
        written = iter(write_chats(chats, tokenizer, chat_names, options or {},
                                   add_generation_prompt=True))
    rows = []
    for prompt, name in zip(prompts, names):
        is_text = isinstance(prompt, str)
        text = prompt if is_text else next(written)
        if leaves_out(tokenizer) and loses(tokenizer, text):
            raise UserError(f"{name}: the tokenizer has no token for some of its text")
        ids = data.encode(tokenizer, [text])[0]
        if is_text:  # a chat template writes its own BOS
            ids = data.prompt_of_text(ids, tokenizer, family)
        if not ids:
            raise UserError(f"{name}: has no token; write at least a word")
        rows.append(ids)
    return rows


def check_prompt_room(model: torch.nn.Module, prompts: list[list[int]], names: list[str]) -> None:
    """Raise a UserError if a prompt leaves the model no position for an answer, or is longer than
    an encoder."""
    most = position_count(model)
    room, use = most - 1, "prompt and answer"
    if family_of(model.config) == "encoder_decoder":
        room, use = most, "a prompt"
    for ids, name in zip(prompts, names):
        if len(ids) > room:
            raise UserError(f"{name}: has {len(ids):,} tokens, and the model has {most:,} "
                            f"positions for {use}; shorten it")


def answer_text(tokenizer: Any, prompt: list[int], ids: list[int], ends: set[int]) -> str:
    """Decode an answer without the token that ends it.

    It is decoded behind its prompt, because some tokenizers drop the space before a first word.
    """
    if ids and ids[-1] in ends:
        ids = ids[:-1]
    before = tokenizer.decode(prompt)
    whole = tokenizer.decode(prompt + ids)
    if whole.startswith(before):
        return whole[len(before):]
    return tokenizer.decode(ids)
