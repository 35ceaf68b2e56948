"""Finds what a run left: the folder of its weights, the model that it started from, its flags.

    name                      policy                          reference
    the folder of a run       the model or adapter in it, or  that of the run, see reference.py
                              its newest checkpoint
    a folder of an adapter    the base that its file names,   the same model with the adapter off
                              with the adapter
    any other model           that model                      none
    world                     the newest run in the world,    the world's reference policy
                              or its reference policy
"""
import contextlib
import pathlib
from typing import NamedTuple

import torch

import world
from checkpoint import (
    METRICS_FILE,
    checkpoints,
    has_model,
    is_adapter,
    is_complete,
    read_state,
)
from dpo import train_sft
from errors import UserError
from files import read_run_file
from lora import read_adapter
from plots import read_metrics

# With --sync_ref_every a run does not save its reference.
MOVED_REFERENCE = "the reference of this run moved; here it is the one that it started from"


class Saved(NamedTuple):
    """Where the parts of a run are."""
    weights: str | None  # folder of the trained model or adapter; None: a model as it is
    source: str  # the model that the run started from, or the base of the adapter
    flags: dict  # of the run; {} for a model that train.py did not save
    note: str = ""


def find_saved(name: str) -> Saved:
    """Find the policy and the source of --model: see the table above."""
    if name == "world":
        return find_world_run()
    folder = pathlib.Path(name)
    flags = flags_of(folder)
    if has_model(folder) or not flags:
        return saved_in(folder, name, flags)
    newest = [path for path in checkpoints(folder) if has_model(path)]
    if not newest:
        raise UserError(f"{name}: this run has not saved a model yet; wait for its first "
                        "checkpoint (--save_every) or its end")
    note = f"{name}: the run has not ended; the policy is that of {newest[-1].name}"
    return saved_in(newest[-1], name, flags)._replace(note=note)


def find_world_run() -> Saved:
    """Find the newest run in the world, below runs/ of the current folder."""
    home, newest = world.make(train_sft, torch.device("cpu")), {}
    for path in home.parent.iterdir():
        with contextlib.suppress(UserError):  # a folder of something else
            if flags_of(path).get("model") == "world" and is_complete(path):
                newest[path] = path.stat().st_mtime
    if not newest:
        note = "world: there is no finished run below runs/; this is the reference policy"
        return Saved(None, str(home / "reference"), {"model": "world"}, note)
    folder = max(newest, key=newest.get)
    return saved_in(folder, str(folder), flags_of(folder))._replace(note=f"world: {folder}")


def saved_in(folder: pathlib.Path, name: str, flags: dict) -> Saved:
    """Find the source of the weights in this folder."""
    if is_adapter(folder):
        base = read_adapter(folder)[2] or ""
        return Saved(str(folder), base, flags)
    if not flags:
        return Saved(None, name, {})
    source = flags["model"]
    if source == "world":
        source = str(world.make(train_sft, torch.device("cpu")) / "reference")
    return Saved(str(folder), source, flags)


def trained_state(saved: Saved) -> tuple[int, dict]:
    """Return the step of the weights, and the numbers that the loss of the run carried there from
    step to step: 0 and {} for a model that train.py did not save."""
    if saved.weights is None or not saved.flags:
        return 0, {}
    folder = pathlib.Path(saved.weights)
    state = read_state(folder) if folder.name.startswith("checkpoint-") else {}
    if state:
        return state["step"], state["loss_state"]
    content = read_run_file(folder)
    if "best" in content:
        return content["best"]["step"], content.get("loss_state", {})
    rows = read_metrics(folder) if (folder / METRICS_FILE).exists() else []
    return max([row["step"] for row in rows], default=0), content.get("loss_state", {})


def flags_of(folder: pathlib.Path) -> dict:
    """Return the flags of the run that wrote this folder, which may be a checkpoint, or {}."""
    if not folder.is_dir():
        return {}
    flags = read_run_file(folder).get("flags", {})
    if not flags and folder.name.startswith("checkpoint-"):
        flags = read_state(folder).get("flags", {})
    return flags
