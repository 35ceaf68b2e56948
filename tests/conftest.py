"""Small things to train, made on the spot. Nothing here is downloaded, and no cache outside the test's own folder is touched."""
import atexit
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")  # before `datasets` is imported
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
# One thread, here and in the processes that tests start: for models this small, threads of several
# processes wait for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

import model as models
import parallel
import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
ALONE = parallel.Ranks(0, 1, torch.device("cpu"))

WORDS = "the cat sat on a mat and saw one more dog that ran far from home in rain or sun".split()


def make_rows(count, seed=0):
    """Make rows whose prompts and answers differ in length, so that padding and truncation occur."""
    generator = torch.Generator().manual_seed(seed)

    def phrase(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))

    return [{"prompt": f"{i} {phrase(1, 8)}", "chosen": f" {phrase(1, 12)} good", "rejected": f" {phrase(1, 12)} bad"} for i in range(count)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_tokenizer():
    """Byte-level BPE, so that any text can be encoded."""
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator([" ".join(row.values()) for row in make_rows(200)], vocab_size=320, special_tokens=["<eos>", "<pad>"],
                                show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def tiny_model(kind, tokenizer, **options):
    torch.manual_seed(0)
    if kind == "gpt2":  # learned absolute positions, tied head, dropout on by default
        return AutoModelForCausalLM.from_config(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=128, **options))
    return AutoModelForCausalLM.from_config(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.1, **options))


@pytest.fixture(scope="session")
def folder(tokenizer, tmp_path_factory):
    """A model folder as users have them."""
    path = tmp_path_factory.mktemp("model")
    models.save_model(tiny_model("llama", tokenizer), tokenizer, path)
    return str(path)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", make_rows(22))


@pytest.fixture
def fit(folder, pairs, tmp_path):
    """Run train.main in this process on the tiny model and rows -> output folder, rows of metrics.jsonl."""
    def run(*flags, out="out", ranks=ALONE, **named):
        defaults = {"model": folder, "dataset": pairs, "batch_size": 8, "micro_batch_size": 3,
                    "max_length": 64, "lr": 1e-2, "eval_share": 0.1, "log_every": 1}
        given = defaults | named | {"output_dir": tmp_path / out}
        stopped = train.main([*flags, *(f"--{k}={v}" for k, v in given.items() if v is not None)], ranks)
        assert not stopped
        return tmp_path / out, read_metrics(tmp_path / out)
    return run


def read_metrics(path):
    return [json.loads(line) for line in (pathlib.Path(path) / "metrics.jsonl").read_text().splitlines()]


def same_metrics(left, right, tolerance):
    assert [(row["step"], row["split"]) for row in left] == [(row["step"], row["split"]) for row in right]
    for a, b in zip(left, right):
        for name in set(a) - {"tokens_per_second", "split"}:
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance), (name, a["step"], a["split"])


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()


def command(*arguments, torchrun=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"] if torchrun else []
    return [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, arguments)]


def launch(folder, pairs, out, torchrun=0, **more):
    """A run in a process of its own, or in several."""
    flags = dict(model=folder, dataset=pairs, output_dir=out, batch_size=8, micro_batch_size=3, max_length=64, lr=1e-2, eval_share=0.1,
                 log_every=1, save_every=5) | more
    return subprocess.Popen(command(*(f"--{k}={v}" for k, v in flags.items()), torchrun=torchrun), stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_checkpoint(process, out):
    while not list(out.glob("checkpoint-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def unfinished(out):
    """Turn the folder of a finished run into that of an interrupted one: checkpoints, but no model."""
    (out / "config.json").write_text(json.dumps({"flags": json.loads((out / "config.json").read_text())["flags"]}))
    for path in out.iterdir():
        if path.is_file() and path.name not in ("config.json", "metrics.jsonl", ".lock"):
            path.unlink()
    return out
