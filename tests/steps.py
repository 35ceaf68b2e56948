"""Tiny models, and batches and losses as train.py computes them, in one call each, for the tests.

A test compares two ways to compute the same thing: `outcome` of one model with two batches of the
same columns, and the `distance` of the two results.
"""
import types

import numpy as np
import torch
import transformers

from batches import collate_on_cpu, make_task
from dpo import preference_logps
from losses import sigmoid
from variants import Variants

# --- Models of many architectures -----------------------------------------------------------------

VOCABULARY = 97
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "head_dim": 8,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 6}  # shorter than the rows
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# Architectures that support packed rows: the options that are not those of SIZES.
PACKS = {
    "Llama": {},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 1, **WINDOW},
    "Qwen3": {},
    "Mistral": WINDOW,
    "Gemma": {},
    "Phi3": WINDOW,
    "Olmo2": {},
    "Olmo3": WINDOW,
    "GPTNeoX": {},
    "Gemma3Text": WINDOW,
    "Cohere": {},
    "GPT2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
    "Mixtral": EXPERTS,
}

# Architectures that do not: their options, and a regular expression for the reason.
PACKS_NOT = {
    "Bloom": ({"n_layer": 2, "n_head": 4}, "eager"),
    "Gemma2": ({}, "eager|softcap"),
    "GptOss": (EXPERTS, "eager"),
    "Mamba": ({"state_size": 4}, "eager"),
    "Lfm2": (
        {"layer_types": ["conv", "full_attention"], "initializer_range": 0.02},
        "other tokens",
    ),
    "RecurrentGemma": (
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "lru_width": 32,
            "attention_window_size": 8,
        },
        "not what it is",
    ),
    "Llama4Text": ({"num_local_experts": 2, "attention_chunk_size": 64}, "other tokens"),
    "Qwen3Next": (
        {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "moe_intermediate_size": 32,
            "num_experts": 4,
            **EXPERTS,
        },
        "other tokens",
    ),
}


def build(name, **options):
    """A model of this architecture with random weights, the same ones in every call."""
    torch.manual_seed(0)
    # The configs of GPT2 and Bloom have other names for their sizes.
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32}
    if name not in ("GPT2", "Bloom"):
        sizes = SIZES
    config = getattr(transformers, f"{name}Config")(**(sizes | options))
    return transformers.AutoModelForCausalLM.from_config(config)


# --- Batches --------------------------------------------------------------------------------------

class Words(types.SimpleNamespace):
    """All that `collate_on_cpu` reads of a tokenizer."""

    def __len__(self):
        return self.size


def make_columns(seed=1, prompts=(9, 1, 14, 3, 7), chosen=(5, 8, 1, 12, 3),
                 rejected=(4, 1, 10, 2, 9)):
    """{column: list} of rows of random token ids, from the lengths of their prompts and answers. By
    default, some prompts and answers have one token. rejected=None: rows of one answer."""
    random = np.random.default_rng(seed)
    lists = []
    for counts in (prompts, chosen, rejected):
        if counts is not None:
            lists.append([random.integers(1, VOCABULARY, count).tolist() for count in counts])
    return {
        "id": [f"row {i}" for i in range(len(prompts))],
        "prompt_ids": lists[0],
        "answer_ids": [list(answers) for answers in zip(*lists[1:])],
    }


def make_batch(columns, packed=False, pad=0, full_logits=True, masked=True, **variants):
    """{column: list} -> a batch of batches.py. With full_logits=False, or a variant that needs
    them, a padded batch has Targets, so that logps.FastLogps computes its log-probs. Without a mask
    the model needs packing.enable."""
    size = VOCABULARY if full_logits else 2**40
    device = torch.device("cpu")
    task = make_task(sigmoid, {}, Variants(**variants), "float64", device, packed, masked)
    return collate_on_cpu(columns, Words(pad_token_id=pad, size=size), task.row_format)


# --- Losses and gradients -------------------------------------------------------------------------

def preference_step(policy, reference, batch, loss, hyper=None, **variants):
    """-> losses (B,) with a graph, {metric: (B,)}. The batch must have the same ld_alpha and wpo,
    see make_batch."""
    task = make_task(loss, hyper or {}, Variants(**variants), "float64", torch.device("cpu"))
    tensors = preference_logps(policy, reference, batch, task.loss, **task.options)
    return task.preference_loss(tensors, task.loss, task.hyper, task.score)


def outcome(model, batch, loss=sigmoid, **variants):
    """-> the losses (B,), and the gradient of their mean with respect to all parameters, as one
    vector. The loss needs no reference: with sigmoid, the step is reference-free."""
    if loss is sigmoid:
        variants["reference_free"] = True
    losses, _ = preference_step(model, None, batch, loss, **variants)
    model.zero_grad()
    losses.mean().backward()
    return losses.detach(), flat_gradient(model)


def flat_gradient(model):
    """The gradients of all parameters that have one, as one float64 vector."""
    gradients = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return torch.cat(gradients)


def distance(found, expected):
    """The norm of the difference, relative to the norm of the expected tensor."""
    difference = found.double() - expected.double()
    return (difference.norm() / expected.double().norm()).item()
