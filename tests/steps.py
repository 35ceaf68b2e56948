"""Batches and losses as train.py computes them, in one call each, for the tests."""
import types

import torch

from batches import RowFormat, collate_on_cpu, make_task
from dpo import preference_logps, preference_loss
from variants import Variants


class Words(types.SimpleNamespace):
    """All that `collate_on_cpu` reads of a tokenizer."""

    def __len__(self):
        return self.size


def make_batch(columns, packed=False, pad=0, full_logits=True, **variants):
    """{column: list} -> a batch of batches.py. With full_logits=False, or a variant that needs
    them, a padded batch has Targets, so that logps.FastLogps computes its log-probs."""
    size = 97 if full_logits else 2**40
    options = Variants(**variants)
    row_format = RowFormat(packed, weigh=options.weigh, alignment=options.wpo)
    return collate_on_cpu(columns, Words(pad_token_id=pad, size=size), row_format)


def preference_step(policy, reference, batch, loss, hyper=None, **variants):
    """-> losses (B,) with a graph, {metric: (B,)}. The batch must have the same ld_alpha and wpo,
    see make_batch."""
    task = make_task(loss, hyper or {}, Variants(**variants), "float64", torch.device("cpu"))
    tensors = preference_logps(policy, reference, batch, task.loss, **task.options)
    return preference_loss(tensors, task.loss, task.hyper, task.score)
