"""Uploads a finished run to the Hub: `--push_to_hub NAME`.

The files that the run wrote are uploaded: the model or the adapter, its tokenizer, README.md with
the curves, metrics.jsonl. Checkpoints and the folders of trackers are not.
"""
import pathlib
import sys

import huggingface_hub
from huggingface_hub.utils import validate_repo_id

from errors import UserError, reading, stop_hub_retries
from files import read_list


def check_hub_name(name: str | None) -> None:
    """Raise a UserError, before the run begins, if it cannot be uploaded under this name."""
    if name is None:
        return
    if name.lower() in ("true", "false"):  # as other trainers write it
        raise UserError(f"--push_to_hub {name}: give the name of the repository on the Hub")
    with reading(f"--push_to_hub {name}"):
        validate_repo_id(name)
    stop_hub_retries()
    if sys.modules["huggingface_hub.constants"].HF_HUB_OFFLINE:
        raise UserError(f"--push_to_hub {name}: there is no network, or HF_HUB_OFFLINE is set; "
                        "leave the flag out, and push the finished run by --resume")
    if huggingface_hub.get_token() is None:
        raise UserError(f"--push_to_hub {name}: there is no token of the Hub; run "
                        "`hf auth login`, or set HF_TOKEN")


def saved_files(folder: pathlib.Path) -> list[str]:
    """Return the names of the files of a finished run, without folders such as checkpoints."""
    names = read_list(folder) or set()
    return sorted(name for name in names if (folder / name).is_file())


def push(folder: pathlib.Path, name: str, retry: str) -> None:
    """Upload the files of a finished run. `retry` is the command that tries again."""
    with reading(f"--push_to_hub {name}", f"; the model is saved in {folder}. To push it again: "
                                          f"{retry} --push_to_hub {name}"):
        url = huggingface_hub.create_repo(name, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=url.repo_id, folder_path=folder, allow_patterns=saved_files(folder),
            commit_message="Upload a run")
    print(f"uploaded to {url}")
