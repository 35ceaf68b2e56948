"""Losses of single answers with a label, and of lists of K answers: what differs from pairs.

dpo.py computes the log-probs of any number of answers. For these losses, this file has

    answer_tensors   the arguments of the loss, in place of dpo.pair_tensors
    answers_loss     the loss of each row and its metrics, in place of dpo.preference_loss
    group_means      the mean over the desirable answers alone, and over the others alone
    partners         rows whose prompts differ: KTO's reference point needs the log-probs of an
    Mismatched       answer behind the prompt of another row

A metric of the chosen answer is, for labels, a mean over the desirable answers, and for lists the
metric of the best answer; of the rejected answer, a mean over the other answers.
"""
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset

import data
from dpo import preference_loss
from losses import hyperparameters, kind_of


def answer_tensors(tables: dict, batch: dict, loss) -> dict:
    """(B, K) tables -> the arguments of the loss: a list keeps its tables; an answer with a label
    has one number in each, (N,), since K = 1."""
    if kind_of(loss) == "lists":
        tensors = tables | {"mask": batch["mask"]}
    else:
        tensors = {name: table[:, 0] for name, table in tables.items()}
        tensors["labels"] = batch["desirable"]
    if "weight" in batch:
        tensors["weight"] = batch["weight"]
    return tensors


def answers_loss(tensors: dict, loss, hyper: dict, score=None) -> tuple:
    """The loss of each row (B,) with a graph, and its metrics, {name: (B,)}, without.

    dpo.preference_loss, with the metrics of labels or of lists. There are no scores of f-DPO here.
    """
    losses, metrics = preference_loss(tensors, loss, hyper)
    describe = label_metrics if kind_of(loss) == "labels" else list_metrics
    metrics |= describe(tensors, (hyperparameters(loss) | hyper)["beta"])
    if "kl" in tensors:  # a number of the step, the same for all its rows
        metrics["kl"] = tensors["kl"].expand(losses.shape)
    return losses, {name: value.detach() for name, value in metrics.items()}


def label_metrics(tensors, beta):
    """{metric: (N,)}, where a metric of the desirable answers is 0 for the others: see
    `group_means`."""
    logps, labels = tensors["policy_logps"], tensors["labels"]
    rewards = beta * (logps - tensors["ref_logps"])
    zeros = torch.zeros_like(logps)
    return {
        "logps/chosen": torch.where(labels, logps, zeros),
        "logps/rejected": torch.where(labels, zeros, logps),
        "rewards/chosen": torch.where(labels, rewards, zeros),
        "rewards/rejected": torch.where(labels, zeros, rewards),
        "desirable": labels.to(logps.dtype),
    }


def group_means(means: dict) -> dict:
    """{metric: mean over all answers} of `label_metrics` -> the means over the desirable answers,
    and over the others, of the metrics that are theirs. Other metrics are returned unchanged.

    A group without an answer has no mean, so its metrics are left out.
    """
    if "desirable" not in means:
        return means
    share, grouped = means["desirable"], dict(means)
    for side, part in (("chosen", share), ("rejected", 1 - share)):
        for name in (f"logps/{side}", f"rewards/{side}"):
            total = grouped.pop(name)
            if part > 0:
                grouped[name] = total / part
    if {"rewards/chosen", "rewards/rejected"} <= grouped.keys():
        grouped["rewards/margins"] = grouped["rewards/chosen"] - grouped["rewards/rejected"]
    return grouped


def list_metrics(tensors, beta):
    """{metric: (B,)}: the best answer against the mean of the others. It is accurate if the best
    answer has the highest reward, and no other has the same."""
    logps, mask = tensors["policy_logps"], tensors["mask"]  # (B, K)
    rewards = beta * (logps - tensors["ref_logps"])
    others, counts = mask[:, 1:], mask[:, 1:].sum(-1)

    def mean_of_others(values):
        return values[:, 1:].masked_fill(~others, 0).sum(-1) / counts

    highest = rewards[:, 1:].masked_fill(~others, -torch.inf).amax(-1)
    best, rejected = rewards[:, 0], mean_of_others(rewards)
    return {
        "logps/chosen": logps[:, 0],
        "logps/rejected": mean_of_others(logps),
        "rewards/chosen": best,
        "rewards/rejected": rejected,
        "rewards/margins": best - rejected,
        "rewards/accuracies": (best > highest).to(logps.dtype),
    }


# --- The reference point of KTO -------------------------------------------------------------------

def partners(rows: Dataset) -> np.ndarray:
    """(rows,) indices: for each row another row, with another prompt if there is one.

    The rows are sorted by a hash of their prompts, so that rows of one prompt are neighbors, and
    shifted by the largest number of rows of one prompt. Each row is the partner of one row. The
    partners depend on the rows alone, so the reference point of a step does not depend on the order
    of its rows, on micro-batches or on ranks. The paper and TRL take the next row of a batch.
    """
    keys = data.column(rows, "prompt_key")
    order = np.argsort(keys, kind="stable")
    _, counts = np.unique(keys, return_counts=True)
    found = np.empty(len(rows), dtype=np.int64)
    found[order] = np.roll(order, -counts.max())
    return found


class Mismatched(Sequence):
    """The prompts of a data set, each with the answer of its partner, where the data set has one
    answer to each prompt. Read like the data set: rows[indices] -> {column: list}."""

    def __init__(self, rows: Dataset, max_length: int):
        self.rows, self.partners, self.max_length = rows, partners(rows), max_length

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, indices):
        columns, others = self.rows[indices], self.rows[self.partners[indices]]
        answers = zip(columns["prompt_ids"], others["answer_ids"])
        # Prompt and answer were truncated with others.
        columns["answer_ids"] = []
        for prompt, (answer,) in answers:
            columns["answer_ids"].append([answer[:max(1, self.max_length - len(prompt))]])
        if "unscored" in others:
            columns["unscored"] = []
            for (answer,), (places,) in zip(columns["answer_ids"], others["unscored"]):
                columns["unscored"].append([[place for place in places if place < len(answer)]])
        if "ref_mismatched_logp" in columns:
            columns["ref_logps"] = [[logp] for logp in columns["ref_mismatched_logp"]]
        return columns
