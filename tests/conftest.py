"""Tiny models, rows and runs that the tests share.

Nothing is downloaded, and the only cache that is written is a temporary folder.

    fit(loss="ipo")                  trains in this process    -> output folder, its metrics
    run_training(flags, ranks=2)     trains in two processes   -> a finished process
    start_training(flags)            starts a process that a test can kill
    resume(out)                      continues a run in this process
    differences(left, right)         compares two runs         -> a list that is empty if they agree

TINY_RUN has the flags of a run of about a tenth of a second.
"""
import atexit
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

# `datasets` reads this variable when it is imported.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="datasets-")
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"
# One thread, here and in the processes that tests start: for models this small, threads of several
# processes wait for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with Ctrl-C ignored, and processes that tests start inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

import forked
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

import checkpoint
import files
import model as models
import parallel
import train

ROOT = pathlib.Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
ALONE = parallel.Ranks(0, 1, torch.device("cpu"))

WORDS = "the cat sat on a mat and saw one more dog that ran far from home in rain or sun".split()

# --model, --dataset and --output_dir are missing here, because they differ from test to test.
TINY_RUN = {
    "batch_size": 8, "micro_batch_size": 3, "max_length": 64, "lr": 1e-2, "eval_share": 0.1,
    "log_every": 1,
}


# --- Rows and models ------------------------------------------------------------------------------

def make_rows(count, seed=0):
    """Make rows whose prompts and answers differ in length, so that batches need padding."""
    generator = torch.Generator().manual_seed(seed)

    def phrase(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))

    rows = []
    for i in range(count):
        prompt = f"{i} {phrase(1, 8)}"
        chosen, rejected = f" {phrase(1, 12)} good", f" {phrase(1, 12)} bad"
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def write_jsonl(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def make_tokenizer():
    """Train a byte-level BPE, which can encode any text."""
    backend = ByteLevelBPETokenizer()
    texts = [" ".join(row.values()) for row in make_rows(200)]
    backend.train_from_iterator(
        texts, vocab_size=320, special_tokens=["<eos>", "<pad>"], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def tiny_model(kind, tokenizer, **options):
    """Make a model with random weights: "gpt2" or "llama"."""
    torch.manual_seed(0)
    if kind == "gpt2":  # learned absolute positions, tied head, dropout on by default
        config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2,
                            n_positions=128, **options)
    else:
        config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                             num_hidden_layers=2, num_attention_heads=2,
                             max_position_embeddings=128, initializer_range=0.1, **options)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="session")
def folder(tokenizer, tmp_path_factory):
    """A folder with a model and its tokenizer."""
    path = tmp_path_factory.mktemp("model")
    models.save_model(tiny_model("llama", tokenizer), tokenizer, path)
    return str(path)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A file with 22 pairs."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", make_rows(22))


# --- Runs -----------------------------------------------------------------------------------------

@pytest.fixture(autouse=True, scope="module")
def no_curves(request):
    """Without matplotlib, a run writes no curves, which would take longer than a tiny run itself.
    Tests of curves and pictures have matplotlib."""
    drawing = ("test_plots", "test_card", "test_figures", "test_real_model")
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in drawing:
            forked.hide_matplotlib(patch.setitem)
        yield



def to_arguments(flags):
    """{"lr": 0.1, "dora": True, "epochs": None} -> ["--lr=0.1", "--dora"]"""
    arguments = []
    for name, value in flags.items():
        if value is True:
            arguments.append(f"--{name}")
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments


def command(*arguments, torchrun=0):
    """The command line that starts train.py, in `torchrun` processes if that is not 0."""
    launcher = []
    if torchrun:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    return [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, arguments)]


def start_training(flags, torchrun=0):
    """Start train.py in a process group of its own, which a test can interrupt or kill."""
    if not torchrun:
        return forked.Forked("train.py", to_arguments(flags))
    return subprocess.Popen(command(*to_arguments(flags), torchrun=torchrun), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def run_training(flags, ranks=1, cwd=None, timeout=300):
    """Run train.py in other processes and wait for their end -> a CompletedProcess."""
    return forked.run("train.py", *to_arguments(flags), ranks=ranks, cwd=cwd, timeout=timeout)


def run_by_torchrun(flags, ranks):
    """The same, by the command that a user types."""
    return subprocess.run(command(*to_arguments(flags), torchrun=ranks), text=True,
                          capture_output=True, timeout=300)


def one_of_each(cases, kind_of_case):
    """Parameters of a test: the first case of each kind, and the others marked slow."""
    seen, others = set(), []
    for case in cases:
        kind = kind_of_case(case)
        if kind in seen:
            others.append(case)
        seen.add(kind)
    return marked_slow(cases, others)


def marked_slow(cases, slow):
    """Parameters of a test, those in `slow` with the mark of this name."""
    parameters = []
    for case in cases:
        marks = [pytest.mark.slow] if case in slow else []
        parameters.append(pytest.param(case, marks=marks, id=case))
    return parameters


def selected(request, name):
    """The values of the parameter `name` in the tests of this module that are going to run."""
    values = set()
    for item in request.session.items:
        if item.path == request.path and hasattr(item, "callspec"):
            values.add(item.callspec.params.get(name))
    return values


@pytest.fixture
def fit(folder, pairs, tmp_path):
    """Run train.main in this process on the tiny model and rows -> output folder, its metrics."""
    def run(*arguments, out="out", ranks=ALONE, **flags):
        flags = TINY_RUN | {"model": folder, "dataset": pairs} | flags
        flags |= {"output_dir": tmp_path / out}
        stopped = train.main([*arguments, *to_arguments(flags)], ranks)
        assert not stopped
        return tmp_path / out, read_metrics(tmp_path / out)
    return run


def resume(out, *arguments):
    """Continue the run in this process -> whether a signal stopped it."""
    return train.main([f"--output_dir={out}", "--resume", *arguments], ALONE)


def wait_for_checkpoint(process, out):
    while not list(out.glob("checkpoint-*")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def unfinished(out):
    """Delete the final model from the folder, as if the run had ended after its last checkpoint."""
    flags = checkpoint.saved_flags(out)
    kept = ("metrics.jsonl", "samples.jsonl", ".lock", files.LIST)
    for path in out.iterdir():
        if path.is_file() and path.name not in kept:
            path.unlink()
    checkpoint.write_flags(out, flags)
    return out


# --- Comparing runs -------------------------------------------------------------------------------

def read_lines(path):
    """Read the objects of a file of JSON lines."""
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_metrics(folder):
    return read_lines(pathlib.Path(folder) / "metrics.jsonl")


def read_samples(folder):
    return read_lines(pathlib.Path(folder) / "samples.jsonl")


def weights(path):
    """{name: tensor} of the model that a run saved, or of its adapter."""
    adapter = pathlib.Path(path) / "adapter_model.safetensors"
    if adapter.exists():
        return load_file(adapter)
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()


def differences(left, right, tolerance=0.0, absolute=None):
    """Compare two runs -> sentences about the differences; an empty list if there are none.

    left, right  output folders, of which metrics and weights are compared, or only the rows of
                 two metrics.jsonl. tokens_per_second, a time, is left out
    tolerance    relative, and absolute where `absolute` is None; at 0, the runs must agree in
                 every bit
    """
    if absolute is None:
        absolute = tolerance
    if isinstance(left, list):
        return metric_differences(left, right, tolerance, absolute)
    found = metric_differences(read_metrics(left), read_metrics(right), tolerance, absolute)
    return found + weight_differences(weights(left), weights(right), tolerance, absolute)


def metric_differences(left, right, tolerance, absolute):
    steps = [[(row["step"], row["split"]) for row in rows] for rows in (left, right)]
    if steps[0] != steps[1]:
        return [f"steps and splits {steps[0]}, {steps[1]}"]
    found = []
    for one, two in zip(left, right):
        where = f"step {one['step']} {one['split']}"
        if one.keys() != two.keys():
            found.append(f"{where}: metrics {sorted(one)}, {sorted(two)}")
        for name in one.keys() & two.keys() - {"split", "tokens_per_second"}:
            if not math.isclose(one[name], two[name], rel_tol=tolerance, abs_tol=absolute):
                found.append(f"{where}: {name} {one[name]}, {two[name]}")
    return found


def weight_differences(left, right, tolerance, absolute):
    if left.keys() != right.keys():
        return [f"weights {sorted(left)}, {sorted(right)}"]
    found = []
    for name, value in left.items():
        other = right[name]
        if value.dtype != other.dtype or value.shape != other.shape:
            found.append(f"{name}: {value.dtype} {value.shape}, {other.dtype} {other.shape}")
        elif not torch.allclose(value, other, rtol=tolerance, atol=absolute):
            found.append(f"{name}: {(value - other).abs().max()} apart")
    return found
