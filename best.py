"""--keep_best and --early_stop: the weights of the best evaluation, and a run that stops improving.

The best weights so far are in best/ of the run's folder, which loads like a finished run. At the
end of the run they become its model, as with load_best_model_at_end of transformers, and best/ is
deleted. Each checkpoint has best/ too, so that a resumed run has the best weights of that step;
they are hard links where the file system has these.

    best = judge(best, "eval/loss", splits, step)     # after each evaluation
    best.step == step                                 # then these weights are the best so far
"""
import json
import math
import os
import pathlib
import shutil
from typing import NamedTuple

from errors import UserError
from files import (
    LIST,
    LOCK,
    RUN_FILE,
    SYSTEM_FILES,
    free_name,
    moved_into,
    read_json,
    read_list,
    temporary_folder,
    write_list,
    written_aside,
)
from trackers import tag

BEST = "best"
# Whether a metric is better when it is higher. Any other metric is better neither way.
HIGHER_IS_BETTER = {
    "loss": False,
    "rewards/accuracies": True,
    "rewards/margins": True,
    "rewards/chosen": True,
    "logps/chosen": True,
    "world/objective": True,
    "world/share": True,
    "world/reward": True,
    "world/correlation": True,
    "world/mass": True,
}


class Best(NamedTuple):
    """The best evaluation so far."""
    step: int = 0  # 0: there is none
    value: float = 0.0
    waited: int = 0  # evaluations since then


# --- Which evaluation is the best -----------------------------------------------------------------

def is_higher_better(metric: str) -> bool:
    """Return the direction of SPLIT/METRIC; a UserError for a metric that has none."""
    for name, higher in HIGHER_IS_BETTER.items():
        if f"/{metric}".endswith(f"/{name}"):
            return higher
    names = [tag("world" if name.startswith("world") else "eval", name)
             for name in HIGHER_IS_BETTER]
    raise UserError(f"--keep_best {metric}: is not a metric that is better when it is higher, or "
                    f"lower; give one of {', '.join(names)}, or of a named evaluation set, as "
                    "eval/NAME/loss")


def tagged_metrics(splits: dict) -> dict[str, float]:
    """{split: metrics} -> {SPLIT/METRIC: value}. With named sets, eval/METRIC is the first's."""
    named = {}
    for split, metrics in splits.items():
        first = not any(name.startswith("eval/") for name in named)
        for metric, value in metrics.items():
            named[tag(split, metric)] = value
            if split.startswith("eval/") and first:
                named[tag("eval", metric)] = value
    return named


def judge(best: Best, metric: str, splits: dict, step: int) -> Best:
    """Compare an evaluation with the best one so far. Of two equal ones, the first is the best."""
    value = tagged_metrics(splits)[metric]
    better = value > best.value if is_higher_better(metric) else value < best.value
    if math.isfinite(value) and (better or not best.step):
        return Best(step, value, 0)
    return best._replace(waited=best.waited + 1)


# --- Its files ------------------------------------------------------------------------------------

def link_or_copy(source, target):
    """Make a hard link, or a copy on a file system without hard links. No file here is changed
    after it is written."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def copy_best(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copy best/ of a run into a checkpoint, or back."""
    ignored = shutil.ignore_patterns(LOCK, *SYSTEM_FILES)
    shutil.copytree(source / BEST, target / BEST, copy_function=link_or_copy, ignore=ignored)


def list_best(folder: pathlib.Path) -> None:
    """List the files of new best weights, so that files that a user adds are told apart."""
    write_list(folder, [path.name for path in folder.iterdir() if path.name != LOCK])


def remove_best(folder: pathlib.Path) -> None:
    """Delete best/ of a run. With a file that the run did not write, it is renamed."""
    path = folder / BEST
    if not os.path.lexists(path) or BEST not in (read_list(folder) or ()):
        return
    written = read_list(path) or set()
    added = set(os.listdir(path)) - written - SYSTEM_FILES - {LIST, LOCK}
    if added:
        kept = free_name(path)
        print(f"{path} has files that this run did not write, such as {min(added)}, and is now "
              f"{kept}")
        os.replace(path, kept)
        return
    with temporary_folder(folder) as aside:
        os.replace(path, aside / BEST)


def restore_best(folder: pathlib.Path, checkpoint: pathlib.Path | None) -> None:
    """Give a resumed run the best weights of its checkpoint."""
    remove_best(folder)
    if checkpoint is not None and (checkpoint / BEST).is_dir():
        with written_aside(folder / BEST) as temporary:
            copy_best(checkpoint, temporary.parent)


def adopt_best(folder: pathlib.Path, flags: dict, best: Best) -> None:
    """Make the best weights the model of the run, with the flags of the run and the step of the
    weights in config.json or run.json."""
    source = folder / BEST
    adapted = (source / "adapter_config.json").exists()
    with moved_into(folder, last="adapter_config.json" if adapted else "config.json") as aside:
        for name in read_list(source) or ():
            shutil.copyfile(source / name, aside / name)
        path = aside / (RUN_FILE if adapted else "config.json")
        record = {"metric": flags["keep_best"], "value": best.value, "step": best.step}
        content = read_json(path) | {"flags": flags, "best": record}
        path.write_text(json.dumps(content, indent=2) + "\n")
    remove_best(folder)
