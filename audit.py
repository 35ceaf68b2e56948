"""Scores the answers of a preference file by the implicit reward of a run, and audits its labels.

    python sample.py --score FILE --model RUN --out scores.jsonl

The implicit reward of an answer y to a prompt x is β log π(y|x)/π_ref(y|x) (arXiv:2305.18290v3,
Sec. 4), and the margin of a pair is the reward of the chosen answer minus that of the rejected one.
By Bradley-Terry the label of a pair is right with probability σ(margin): where the margin is the
most negative, the label is the most surely flipped. For example:

    rewards 0.5 and 2.5    margin -2    the label is right with probability σ(-2) = 0.12

Rows, batches, reference and rewards are those of the run's evaluations, so the mean of the margins
of its held-out rows is the `rewards/margins` that it logged.
"""
import contextlib
import json
from argparse import Namespace
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset

import data
import world
from answers import list_metrics
from batches import Task, load_batches, make_task, of_all_pairs, split_step
from dpo import concatenated_forward
from errors import printable
from files import written_aside
from flags import read_variants
from losses import kind_of, needs_of, needs_reference, sides_of
from runs import ALONE, Opened
from train import most_answers, settle_attention, with_images

SHOWN = 10  # pairs of the audit that are printed


class Scores(NamedTuple):
    """Of each row, (N,) or (N, K) in float64. Answers that a row lacks have zeros."""
    mask: np.ndarray  # (N, K)
    lengths: np.ndarray  # (N, K) scored tokens
    policy_logps: np.ndarray  # (N, K)
    ref_logps: np.ndarray  # (N, K), zeros where the loss reads no reference
    rewards: np.ndarray  # (N, K)
    margins: np.ndarray  # (N,), or (0,) for single answers with a label


# --- Rows -----------------------------------------------------------------------------------------

def needs_of_run(args: Namespace, loss) -> data.Needs:
    """Return the rows that a run's loss compares. Pairs, if the loss reads single answers and the
    run made them of pairs, or imitates chosen answers."""
    kind = kind_of(loss)
    made_of_pairs = kind == "labels" and args.unpair
    imitates = kind == "pairs" and len(sides_of(loss)) < 2
    if made_of_pairs or imitates:
        return data.PAIRS
    return needs_of(loss)


def load_scored_rows(opened: Opened, spec: str) -> tuple[Dataset, dict]:
    """Load rows as the run did, or the held-out rows of the world."""
    args = Namespace(**vars(opened.args))
    needs = needs_of_run(args, opened.loss)
    args.unpair = args.unpair and needs.kind == "labels"
    if spec == "world":
        _, held_out = world.row_files(needs.kind)
        spec = str(world.folder() / held_out)
    limits, shape, options = data.read_flags(args, opened.family)
    shape = shape._replace(images=opened.open_processor is not None)
    return data.load_tokens(spec, opened.tokenizer, needs, limits, shape, args.strict, options,
                            opened.open_processor)


# --- Scores ---------------------------------------------------------------------------------------

def score_rows(opened: Opened, rows: Dataset) -> Scores:
    """Compute the rewards of all answers, in the batches and by the attention of the run."""
    args, loss, reference = opened.args, opened.loss, opened.reference
    if args.reference_free or not needs_reference(loss):
        reference = None
    processor = opened.open_processor() if with_images(rows) else None
    attention, masked = settle_attention(args, opened.policy, reference, [rows], opened.dtype,
                                         ALONE, processor)
    task = make_task(loss, opened.hyper, read_variants(args), opened.dtype, ALONE.device,
                     attention == "packed", masked, most_answers(rows), opened.family, processor)

    def compute(batch):
        return logp_tables(task, opened.policy, reference, batch)

    pieces = split_step(args, len(rows), data.column(rows, "tokens"), ALONE)
    indices = np.arange(len(rows))
    selections = [(rows, indices[piece.pairs]) for piece in pieces]
    batches = load_batches(selections, opened.tokenizer, task.row_format, task.device)
    with contextlib.closing(batches):
        tables = of_all_pairs(compute, batches, pieces, len(rows), ALONE)
    answer_rewards, margins = reward_tables(task, tables, rows, needs_of_run(args, loss).kind)
    tables |= {"rewards": answer_rewards, "margins": margins}
    return Scores(**{name: table.cpu().numpy() for name, table in tables.items()})


def logp_tables(task: Task, policy, reference, batch: dict) -> dict:
    """Compute (B, K) log-probs under policy and reference, lengths and mask of a batch."""
    with torch.autocast(**task.autocast):
        tables = concatenated_forward(policy, batch)
        logps = tables["logps"]
        ref_logps = torch.zeros_like(logps)
        if reference is not None:
            ref_logps = concatenated_forward(reference, batch)["logps"]
    return {"policy_logps": logps, "ref_logps": ref_logps, "lengths": tables["lengths"],
            "mask": batch["mask"]}


def reward_tables(task: Task, tables: dict, rows: Dataset, kind: str) -> tuple:
    """Compute rewards (N, K), as the evaluation of the loss does, and margins (N,), or (0,)."""
    beta = task.hyper.get("beta", 1.0)
    tensors = {name: tables[name] for name in ("policy_logps", "ref_logps", "mask")}
    if task.score:  # f-DPO
        tensors = task.score(tensors)
    answer_rewards = beta * (tensors["policy_logps"] - tensors["ref_logps"])  # (N, K)
    if kind == "labels":
        return answer_rewards, answer_rewards.new_empty(0)
    if kind == "lists":
        return answer_rewards, list_metrics(tensors, beta)["rewards/margins"]
    if "average" in task.loss.tags:
        answer_rewards = answer_rewards / tables["lengths"]
    return answer_rewards, answer_rewards[:, 0] - answer_rewards[:, 1]


def right_probability(margins: np.ndarray) -> np.ndarray:
    """Compute σ(margin), the probability under Bradley-Terry that the label is right."""
    return torch.from_numpy(margins).sigmoid().numpy()


def audit_order(scores: Scores) -> np.ndarray:
    """Return the indices of the rows, those whose label is the most surely flipped first."""
    return np.argsort(scores.margins, kind="stable")


# --- Output ---------------------------------------------------------------------------------------

def score_lines(scores: Scores, rows: Dataset) -> list[dict]:
    """Make one JSON object per row, in the order of the file. Lists have an entry per answer."""
    lines = [{"id": name} for name in rows["id"]]
    tables = {
        "rewards": scores.rewards,
        "policy_logps": scores.policy_logps,
        "ref_logps": scores.ref_logps,
        "lengths": scores.lengths.astype(int),
    }
    for name, table in tables.items():
        for line, values, mask in zip(lines, table, scores.mask):
            line[name] = values[mask].tolist()

    numbers = {}
    if len(scores.margins):
        numbers["margin"] = scores.margins
        numbers["label_is_right"] = right_probability(scores.margins)
        numbers["audit_rank"] = audit_order(scores).argsort() + 1
    else:
        numbers["desirable"] = data.column(rows, "desirable")
    for name, values in numbers.items():
        for line, value in zip(lines, values.tolist()):
            line[name] = value
    return lines


def write_lines(path: str, lines: list[dict]) -> None:
    """Write JSON lines aside, then rename them to their file."""
    with written_aside(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def accuracy_lines(scores: Scores) -> list[str]:
    """Format the accuracy over all pairs, by difference in length, and by decile of |margin|."""
    right = scores.margins > 0  # a tie is not accurate, as in the metrics of a run
    mean = scores.margins.mean()
    lines = [f"{len(right)} pairs: accuracy {right.mean():.4f}, mean margin {mean:+.4f}"]

    # The chosen answer against the mean of the others.
    others = scores.lengths[:, 1:].sum(1) / scores.mask[:, 1:].sum(1)
    difference = scores.lengths[:, 0] - others
    groups = {"longer": difference > 0, "as long": difference == 0, "shorter": difference < 0}
    for name, members in groups.items():
        if members.any():
            accuracy = right[members].mean()
            lines.append(f"  chosen {name:8} {members.sum():6} pairs, accuracy {accuracy:.4f}")

    # σ(|margin|) is the accuracy that the model expects.
    size = np.abs(scores.margins)
    expected = right_probability(size)
    lines.append("  by decile of |margin|:")
    for members in np.array_split(np.argsort(size, kind="stable"), min(10, len(size))):
        first, last = size[members[0]], size[members[-1]]
        accuracy, mean = right[members].mean(), expected[members].mean()
        lines.append(f"  {first:8.4f} to {last:8.4f} {len(members):6} pairs, "
                     f"accuracy {accuracy:.4f}, expected {mean:.4f}")
    return lines


def audit_lines(scores: Scores, rows: Dataset, tokenizer) -> list[str]:
    """Format the pairs whose labels are the most surely flipped."""
    order = audit_order(scores)
    order = order[scores.margins[order] < 0][:SHOWN]
    if not len(order):
        return ["no pair has a negative margin"]
    lines = ["the labels that are the most surely flipped:"]
    probabilities = right_probability(scores.margins)
    for rank, i in enumerate(order.tolist(), 1):
        row, margin = rows[i], scores.margins[i]
        lines.append(f"{rank:4}. {printable(row['id'])}: margin {margin:+.4f}, "
                     f"right with probability {probabilities[i]:.4f}")
        prompt = excerpt(tokenizer, row["prompt_ids"], from_end=True)
        lines.append(f"      prompt   {prompt}")
        for name, ids in zip(("chosen", "rejected"), row["answer_ids"]):
            lines.append(f"      {name:8} {excerpt(tokenizer, ids)}")
    return lines


def excerpt(tokenizer, ids: list[int], from_end: bool = False, most: int = 80) -> str:
    """Decode the beginning of some tokens, or their end, on one line."""
    text = " ".join(tokenizer.decode(ids).split())
    if len(text) > most:
        text = f"… {text[-most:]}" if from_end else f"{text[:most]} …"
    return printable(text)


def label_lines(scores: Scores, rows: Dataset) -> list[str]:
    """Format the mean reward of the desirable answers, and of the others."""
    labels, lines = data.column(rows, "desirable"), []
    for name, members in (("desirable", labels), ("undesirable", ~labels)):
        if members.any():
            mean = scores.rewards[members, 0].mean()
            lines.append(f"{members.sum()} {name} answers: mean reward {mean:+.4f}")
    return lines


def score_file(opened: Opened, spec: str, out: str | None) -> None:
    """Score the rows of a file, write them, and print accuracy and audit."""
    rows, account = load_scored_rows(opened, spec)
    print(data.describe(account))
    scores = score_rows(opened, rows)
    if out:
        write_lines(out, score_lines(scores, rows))
        print(f"rewards, log-probs and lengths of {len(rows)} rows: {out}")
    if not len(scores.margins):
        print("\n".join(label_lines(scores, rows)))
        return
    print("\n".join(accuracy_lines(scores)))
    print("\n".join(audit_lines(scores, rows, opened.tokenizer)))
