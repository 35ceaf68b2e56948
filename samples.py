"""--sample_every: while a run trains, its policy and its reference answer the same few prompts.

The prompts are the first --sample_prompts different ones of the held-out rows. Answers are greedy,
so two answers to a prompt differ by the weights alone. A line of samples.jsonl is an object of
`sample.py --out` with the step:

    {"step": 200, "id": "pairs.jsonl:7", "prompt": "the sea is",
     "policy": {"text": " cold dark wild", "ended": true, "tokens": 4, "logp": -1.9,
                "ref_logp": -5.2, "reward": 3.3},
     "reference": {"text": " old calm wide", ...}}

`logp` and `ref_logp` are the log-probs of this answer under policy and reference, summed over its
tokens, and `reward` is β (logp - ref_logp). `ended` is false for an answer that was cut off.

A fixed reference answers once, before the first step; one that moves answers each time. So with
--ref cache too there are answers of the reference, although its model is then freed, but no
ref_logp and no reward. Without a reference, the policy answers alone.

With --parallel fsdp all ranks compute the same answers, because each forward needs the shards of
every rank. With ddp rank 0 answers alone: the other ranks have to wait either way, and ranks that
share a CPU would slow it down. Training is the same bit for bit with and without samples: see
generation.py.
"""
import contextlib
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

import data
from batches import RowFormat, Task, collate
from dpo import concatenated_forward
from errors import printable
from families import family_of
from generation import Answer, Sampling, generate, reference_model, sharded_forward
from log import Log
from parallel import Ranks
from world import true_reward_of

LINE = 100  # characters of a line on the console


class Sampler:
    """The prompts of a run, and what answers them."""

    def __init__(self, args: Namespace, task: Task, policy: torch.nn.Module,
                 reference: Callable | None, splits: tuple, tokenizer: Any, in_world: bool,
                 ranks: Ranks):
        """splits   the training rows, and {name: rows} of the evaluation sets"""
        self.every, self.in_world = args.sample_every, in_world
        self.policy, self.reference, self.tokenizer = policy, reference, tokenizer
        self.autocast, self.beta = task.autocast, task.hyper.get("beta", 1.0)
        self.takes_part = ranks.rank == 0 or args.parallel == "fsdp"
        self.prompts = first_prompts(*splits, args.sample_prompts)
        # As many prompts in a forward as pairs in one of training, so that both fit.
        self.settings = Sampling(args.sample_tokens, batch_size=args.micro_batch_size or 4)
        self.fixed_answers = None
        if reference is not None and not args.sync_ref_every and self.takes_part:
            self.fixed_answers = self.generate("reference")
        if args.ref == "cache" and isinstance(reference, torch.nn.Module):
            self.reference = None  # frees its memory

    def is_due(self, step: int, last: bool) -> bool:
        """Return whether to sample after this step, as --eval_every does."""
        return last or self.every > 0 and step % self.every == 0

    def sample(self, step: int, log: Log) -> None:
        """Let policy and reference answer all prompts, and log their answers."""
        if not self.takes_part:
            return
        sides = {"policy": self.generate("policy")}
        if self.fixed_answers is not None:
            sides["reference"] = self.fixed_answers
        elif self.reference is not None:
            sides["reference"] = self.generate("reference")
        rows = []
        for i, prompt in enumerate(self.prompts):
            answers = {side: written[i] for side, written in sides.items()}
            rows.append({"step": step} | self.describe(prompt, answers))
        log.samples(step, rows)
        log.say("\n".join([f"step {step} samples:", *console_lines(rows)]))

    def generate(self, side: str) -> list[Answer]:
        """Let the policy or the reference answer all prompts."""
        module = self.policy
        if side == "reference" and isinstance(self.reference, torch.nn.Module):
            module = self.reference
        forward = sharded_forward(module) if isinstance(module, FSDPModule) else None
        prompts = [prompt["prompt_ids"] for prompt in self.prompts]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast(**self.autocast))
            model = self.policy.model
            if side == "reference":
                model = stack.enter_context(reference_model(self.policy, self.reference))
            return generate(model, self.tokenizer, prompts, self.settings, forward=forward)

    def describe(self, prompt: dict, answers: dict[str, Answer]) -> dict:
        """Make the object of one prompt: the text of each answer, its log-probs, its reward, and in
        the world its true reward."""
        text = self.tokenizer.decode(prompt["prompt_ids"])
        row = {"id": prompt["id"], "prompt": text}
        measured = measure_answers(
            self.policy, self.reference, self.tokenizer, self.autocast, self.beta,
            prompt["prompt_ids"], [answer.ids for answer in answers.values()])
        for (side, answer), values in zip(answers.items(), measured):
            row[side] = {"text": answer.text, "ended": answer.ended} | values
            if self.in_world:
                row[side]["true_reward"] = true_reward_of(text, answer.text)
        return row


def first_prompts(rows: Any, held_out: dict, count: int) -> list[dict]:
    """Return id and prompt_ids of the first different prompts of the held-out rows, of all
    evaluation sets in their order; of the training rows if no row is held out."""
    parts = [part for part in held_out.values() if len(part)]
    if not parts:
        parts = [rows]
    columns = ["id", "prompt_ids", "prompt_key"]
    every = datasets.concatenate_datasets([part.select_columns(columns) for part in parts])
    _, first = np.unique(data.column(every, "prompt_key"), return_index=True)
    return list(every.select(np.sort(first)[:count]))


# --- Log-probs and rewards ------------------------------------------------------------------------

@torch.no_grad()
def measure_answers(policy: torch.nn.Module, reference: Callable | None, tokenizer: Any,
                    autocast: dict, beta: float, prompt: list[int],
                    answers: list[list[int]]) -> list[dict]:
    """Compute the log-probs of answers to one prompt under policy and reference, as training does,
    and their implicit rewards.

    autocast    arguments of torch.autocast
    """
    row = {"id": [""], "prompt_ids": [prompt], "answer_ids": [answers]}
    # Full logits would be rounded to bfloat16.
    row_format = RowFormat(full_logits=not autocast["enabled"],
                           family=family_of(policy.model.config))
    batch = collate(row, tokenizer, policy.model.device, row_format)
    with torch.autocast(**autocast):
        logps = concatenated_forward(policy, batch)["logps"][0].tolist()
        ref_logps = [None] * len(logps)
        if reference is not None:
            ref_logps = concatenated_forward(reference, batch)["logps"][0].tolist()
    measured = []
    for ids, logp, ref_logp in zip(answers, logps, ref_logps):
        values = {"tokens": len(ids), "logp": logp}
        if ref_logp is not None:
            values |= {"ref_logp": ref_logp, "reward": beta * (logp - ref_logp)}
        measured.append(values)
    return measured


# --- On the console -------------------------------------------------------------------------------

def console_lines(rows: list[dict]) -> list[str]:
    """Format the answers to each prompt, one line each. A long prompt is shown by its end, a long
    answer by its beginning."""
    lines = []
    for row in rows:
        prompt = printable(row["prompt"].strip())
        name = printable(row["id"])
        room = max(LINE - len(name) - 4, 20)
        if len(prompt) > room:
            prompt = f"…{prompt[1 - room:]}"
        lines.append(f"[{name}] {prompt}")
        for side in ("policy", "reference"):
            if side in row:
                lines.append(answer_line(side, row[side]))
    return lines


def answer_line(side: str, answer: dict) -> str:
    """Format an answer: its reward, or without a reference its log-prob, and the text."""
    figures = f"log-prob {answer['logp'] / answer['tokens']:.2f} per token"
    if "reward" in answer:
        figures = f"reward {answer['reward']:+.2f}"
    if "true_reward" in answer:
        truth = answer["true_reward"]
        figures += ", malformed" if truth is None else f", true reward {truth:+.2f}"
    text = printable(answer["text"].strip())
    line = f"  {side:9} {figures}: {text}"
    if len(line) > LINE or not answer["ended"]:
        line = f"{line[:LINE - 1]}…"
    return line
