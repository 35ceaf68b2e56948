"""Sends the rows of metrics.jsonl to TensorBoard and to Weights & Biases: `--report_to`.

Both are optional packages. Each metric has its name in metrics.jsonl, behind the split: train/loss,
eval/rewards/margins, world/share. The flags of the run are its config there. The answers of
--sample_every are texts in TensorBoard and a table in W&B, by the name samples.

A resumed run sends the rows up to its checkpoint again, before its own. No step is there twice:
    tensorboard    the files are in tensorboard/ of the run's folder. The new file begins with a
                   mark that makes TensorBoard drop every earlier row of this folder
    wandb          the id of the run is in wandb/id.txt of the run's folder, and a resumed run has
                   the same id. W&B ignores a step that it has already. Offline, each start makes a
                   folder of its own below wandb/, and the newest one has all rows
So a tracker that --resume adds gets the whole run.
"""
import importlib
import importlib.util
import itertools
import json
import os
import pathlib
import secrets
import textwrap
from typing import Any

from errors import UserError, reading
from files import make_way, write_text

TRACKERS = ("wandb", "tensorboard")


def read_names(text: str) -> list[str]:
    """Return the trackers of --report_to; none for the word "none"."""
    names = text.split(",")
    if names == ["none"]:
        return []
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"--report_to {text}: {name!r} is no tracker; give one of "
                            f"{', '.join(TRACKERS)}, both with a comma between, or none")
    return names


def check_trackers(text: str | None) -> None:
    """Raise a UserError if the packages of --report_to are not installed, or W&B has no key."""
    names = read_names(text or "none")
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--report_to {text}: {' and '.join(missing)} not installed; "
                        f"pip install {' '.join(missing)}, or leave it out: metrics.jsonl has all "
                        "metrics")
    if "wandb" in names:
        with reading("--report_to wandb", " Or set WANDB_MODE=offline"):
            importlib.import_module("wandb").login()


def tag(split: str, metric: str) -> str:
    """Return the name of a metric in a tracker. The metrics of the world name their split."""
    return metric if metric.startswith(f"{split}/") else f"{split}/{metric}"


class TensorBoard:
    """Writes rows into tensorboard/ of the run's folder. Each row is flushed, because a run may be
    killed."""

    def __init__(self, folder: pathlib.Path, flags: dict):
        make_way(folder, ["tensorboard"])
        with reading("--report_to tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=0)
        text = json.dumps(flags, indent=2)
        self.writer.add_text("flags", f"```json\n{text}\n```")

    def row(self, step: int, split: str, values: dict) -> None:
        for metric, value in values.items():
            self.writer.add_scalar(tag(split, metric), value, step)
        self.writer.flush()

    def samples(self, step: int, rows: list[dict]) -> None:
        for number, row in enumerate(rows, 1):
            self.writer.add_text(f"samples/{number}", as_markdown(row), step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Sends rows to W&B. The project is that of WANDB_PROJECT, the name that of the folder."""

    def __init__(self, folder: pathlib.Path, flags: dict):
        make_way(folder, ["wandb"])
        identity = folder / "wandb" / "id.txt"
        if not identity.exists():
            write_text(identity, secrets.token_hex(8))
        wandb = importlib.import_module("wandb")
        # W&B would put its own streams in the place of stdout and stderr.
        settings = wandb.Settings(console="off")
        project = os.environ.get("WANDB_PROJECT", "preference-optimization")
        with reading("--report_to wandb"):
            self.run: Any = wandb.init(
                project=project, name=folder.name, id=identity.read_text().strip(),
                resume="allow", dir=str(folder), config=flags, settings=settings)
        self.first = self.run.step  # the steps before are there already

    def row(self, step: int, split: str, values: dict) -> None:
        if step < self.first:
            return
        named = {tag(split, metric): value for metric, value in values.items()}
        self.run.log(named | {"step": step}, step=step)

    def samples(self, step: int, rows: list[dict]) -> None:
        if step < self.first:
            return
        cells = [flatten(row) for row in rows]
        columns = list(cells[0])
        table = importlib.import_module("wandb").Table(
            columns=columns, data=[[row[name] for name in columns] for row in cells])
        self.run.log({"samples": table}, step=step)

    def close(self) -> None:
        self.run.finish()


def flatten(row: dict) -> dict:
    """{"id": ..., "policy": {"text": ...}} of samples.jsonl -> {"id": ..., "policy/text": ...}"""
    cells = {}
    for name, value in row.items():
        if isinstance(value, dict):
            cells |= {f"{name}/{key}": each for key, each in value.items()}
        else:
            cells[name] = value
    return cells


def as_markdown(row: dict) -> str:
    """Format a row of samples.jsonl. Text that is indented can hold no Markdown."""
    parts = [f"prompt {row['id']}:", textwrap.indent(row["prompt"], "    ", lambda line: True)]
    for side in ("policy", "reference"):
        if side in row:
            figures = {name: value for name, value in row[side].items() if name != "text"}
            text = textwrap.indent(row[side]["text"], "    ", lambda line: True)
            parts += [f"{side}: `{json.dumps(figures)}`", text]
    return "\n\n".join(parts)


def open_trackers(text: str | None, folder: pathlib.Path, flags: dict, rows: list[dict],
                  samples: list[dict]) -> list:
    """Open the trackers of --report_to, and send them these rows of metrics.jsonl and of
    samples.jsonl, step by step, because W&B takes no row of an earlier step."""
    kinds = {"tensorboard": TensorBoard, "wandb": WandB}
    trackers = [kinds[name](folder, flags) for name in read_names(text or "none")]
    by_step = sorted(rows + samples, key=lambda row: row["step"])
    # The split of a row of metrics; None for all samples of the step.
    groups = itertools.groupby(by_step, key=lambda row: (row["step"], row.get("split")))
    for (step, split), group in groups:
        group = list(group)
        for tracker in trackers:
            if split is None:
                tracker.samples(step, group)
                continue
            for row in group:
                values = {name: row[name] for name in row if name not in ("step", "split")}
                tracker.row(step, split, values)
    return trackers
