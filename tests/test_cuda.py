"""What train.py does on a GPU, seen on a pretended one: see fakegpu.py for how, and what it misses.

All runs happen once, in one process of their own; each test reads what was noted of one run.
"""
import json
import os
import shutil
import subprocess
import sys

import gpu
import pytest
import torch
from conftest import (
    ROOT,
    differences,
    make_rows,
    marked_slow,
    read_metrics,
    selected,
    write_jsonl,
)
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import model as models

LAYERS, STEPS, PAIRS, VOCABULARY = 2, 3, 8, 384
SYNCS_PER_STEP = 2  # one for the metrics of a step, one for the norm of its gradient

# Llama-like models with two query heads to a key head; Mistral's window is shorter than its rows.
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "initializer_range": 0.1}
CONFIGS = {
    "llama": lambda size: LlamaConfig(vocab_size=size, **SMALL),
    "qwen2": lambda size: Qwen2Config(vocab_size=size, **SMALL),
    "qwen3": lambda size: Qwen3Config(vocab_size=size, head_dim=8, **SMALL),
    "mistral": lambda size: MistralConfig(vocab_size=size, sliding_window=8, **SMALL),
    "gpt2": lambda size: GPT2Config(vocab_size=size, n_embd=32, n_layer=LAYERS, n_head=2,
                                    n_positions=128),
}

# Ways to train, with packed and with padded rows, in bfloat16 on the Llama.
WAYS = {
    "full": "",
    "lora": "--lora_rank 4",
    "dora": "--lora_rank 4 --dora",
    "nf4": "--lora_rank 4 --quantize nf4",
    "cache": "--ref cache",
    "tr-dpo": "--sync_ref_every 1",
    "wpo": "--wpo",
    "ld": "--ld_alpha 0.5",
    "recomputed": "--gradient_checkpointing",
    "sft": "--loss sft",
    "aot": "--loss aot",
    "bco": "--loss bco_pair",
    "kto": "--loss kto_pair",
    "orpo": "--loss orpo",
    "simpo": "--loss simpo",
    "labels": "--loss kto --unpair",
    "lists": "--loss plackett_luce --dataset lists.jsonl",
}
# The other models, and float32, which the one-call kernel does not take.
MODELS = ["qwen2", "qwen3", "mistral", "gpt2"]
EXTRA = {
    "dora qwen2 packed": "--model qwen2 --lora_rank 4 --dora --attention packed",
    "nf4 gpt2 packed": "--model gpt2 --lora_rank 4 --quantize nf4 --attention packed",
    "full float32 packed": "--dtype float32 --attention packed",
    "full float32 padded": "--dtype float32 --attention padded",
    "mistral float32 packed": "--model mistral --dtype float32 --attention packed",
    "lora float32 packed": "--lora_rank 4 --dtype float32 --attention packed",
    "interrupted": "--attention packed",
    "resumed": "--attention packed --resume",
}
# In four micro-batches a step too, besides the two of all cases.
COUNTED = ["full", "lora", "cache", "aot", "labels", "lists"]
# With packed rows only: what these ways add does not see how rows are laid out.
ONLY_PACKED = ["dora", "tr-dpo", "recomputed", "bco", "kto", "orpo", "simpo"]


def make_lists(pairs):
    """Lists of two, three or four answers."""
    lists = []
    for i, row in enumerate(pairs):
        answers = [row["chosen"], row["rejected"], " a dog ran", " the sun sat on a mat"]
        lists.append({"prompt": row["prompt"], "responses": answers[:2 + i % 3]})
    return lists


def list_cases() -> dict:
    """{name: flags} of every run."""
    cases = {}
    for attention in ("packed", "padded"):
        for name, flags in WAYS.items():
            if attention == "packed" or name not in ONLY_PACKED:
                cases[f"{name} {attention}"] = f"{flags} --attention {attention}"
        for name in MODELS:
            cases[f"full {name} {attention}"] = f"--model {name} --attention {attention}"
        for name in COUNTED:
            flags = f"{cases[f'{name} {attention}']} --micro_batch_size {PAIRS // 4}"
            cases[f"{name} {attention} in four"] = flags
    return cases | EXTRA


CASES = list_cases()
PACKED = [name for name in CASES if "packed" in CASES[name]]
HALF_PACKED = [name for name in PACKED if "float32" not in name]
# One layout of rows is enough for what does not depend on it, and one model of those that attend
# alike. These cases run by `pytest -m slow`.
SLOW = {
    "lora padded", "nf4 padded", "cache padded", "wpo padded", "ld packed", "sft padded",
    "aot packed", "labels padded", "lists padded", "orpo packed", "kto packed", "recomputed packed",
    "dora qwen2 packed", "nf4 gpt2 packed", "mistral float32 packed", "lora float32 packed",
}
for model in ("qwen2", "gpt2"):
    SLOW |= {f"full {model} packed", f"full {model} padded"}
IN_FOUR = [f"{name} {attention}" for attention in ("packed", "padded") for name in COUNTED]
SLOW_IN_FOUR = set(IN_FOUR) - {"full packed", "aot padded"}
SLOW |= {f"{name} in four" for name in SLOW_IN_FOUR}


class Run:
    """What was noted of one run; `explain` of some events is the message of a failing test."""

    def __init__(self, result, folder):
        self.name, self.error = result["name"], result["error"]
        self.printed, self.events, self.folder = result["printed"], result["events"], folder

    def find(self, *kinds, updates=range(STEPS + 1)):
        found = [event for event in self.events if event["kind"] in kinds]
        return [event for event in found if event["updates"] in updates]

    def count(self, *kinds, **where):
        return sum(event["count"] for event in self.find(*kinds, **where))

    def explain(self, events):
        lines = [f"{event['count']} x {event['kind']}: {event['operation']} at {event['where']}, "
                 f"after {event['updates']} updates" for event in events]
        return "\n".join([f"{self.name} ({CASES[self.name]})", *lines, self.error or ""])


@pytest.fixture(scope="module")
def runs(tokenizer, tmp_path_factory, request) -> dict:
    """{name: Run} of the cases, and of the one that is repeated on the CPU. With a slow test among
    those that are going to run, of every case."""
    every = not SLOW.isdisjoint(selected(request, "name"))
    if shutil.which("g++") is None:
        pytest.skip("the pretended GPU needs g++")
    home = tmp_path_factory.mktemp("cuda")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(VOCABULARY))
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):  # zeros at first, which no pretrained model has
                torch.nn.init.normal_(parameter)
        models.save_model(model, tokenizer, home / name)
    write_jsonl(home / "pairs.jsonl", make_rows(30))
    write_jsonl(home / "lists.jsonl", make_lists(make_rows(30)))

    common = f"--model llama --dataset pairs.jsonl --dtype bfloat16 --batch_size {PAIRS} "
    common += f"--micro_batch_size {PAIRS // 2} --max_steps {STEPS} --save_every 2 --log_every 1 "
    common += "--max_length 64 --eval_share 0.1 --lr 1e-3"
    cases = []
    for name, flags in CASES.items():
        if name in SLOW and not every:
            continue
        folder = "interrupted" if name == "resumed" else name
        # of a flag that is given twice the last one counts
        flags = [*common.split(), *flags.split(), "--output_dir", folder]
        # the loop sees a signal at its next step, and saves after that
        interrupt = 1 if name == "interrupted" else None
        cases.append({"name": name, "flags": flags, "interrupt": interrupt})
    on_cpu = next(case for case in cases if case["name"] == "full float32 padded")
    cases.append({"name": "on the CPU", "device": "cpu", "flags": [*on_cpu["flags"][:-1], "cpu"]})

    (home / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, str(ROOT / "tests" / "fakegpu.py"), "cases.json", "out.json"]
    # one thread: the models are tiny, and the threads of a test run are many already
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, cwd=home, env=environment, check=True, stderr=subprocess.DEVNULL)
    found = {}
    for case, result in zip(cases, json.loads((home / "out.json").read_text()), strict=True):
        found[case["name"]] = Run(result, home / case["flags"][-1])
    return found


# --- The pretended GPU itself ---------------------------------------------------------------------

SEEN = {  # what is done with x, a float tensor on the GPU, or with y, one on the CPU: what is noted
    "x.tolist()": ["sync"],
    "x.cpu()": ["sync"],
    "x.cpu().numpy()": ["sync"],
    "float(x[0])": ["sync"],
    "bool((x > 0).all())": ["sync"],
    "f'{x[0]:.2f}'": ["sync"],
    "x[x > 0]": ["sync"],
    "x[x > 0] = 0": [],
    "x[[0, 1]]": ["blocking copy"],
    "x.nonzero()": ["sync"],
    "x.repeat_interleave(x.long() + 1)": ["sync"],
    "x.repeat_interleave(2)": [],
    "y.copy_(x)": ["sync"],
    "x.copy_(y)": ["blocking copy"],
    "y.to('cuda')": ["blocking copy"],
    "y.to('cuda', non_blocking=True)": ["blocking copy"],
    "y.pin_memory()[1:].to('cuda', non_blocking=True)": ["async copy"],
    "torch.tensor([1.0], device='cuda')": ["blocking copy"],
    "torch.zeros(3, device='cuda')": [],
    "torch.stack([x.sum(), y.sum()])": ["mixed devices"],
    "x + y": ["mixed devices"],
    "x + y.sum()": [],
    "x.masked_scatter(x > 0, y)": ["mixed devices"],
    "x.new_ones(3, 3) @ x.new_ones(3, 3)": [],
    "torch.mm(x.new_ones(3, 3).bfloat16(), x.new_ones(3, 3))": ["mixed dtypes"],
}
TRY = """
import json, sys, fakegpu, torch
fakegpu.pretend()
found = []
for line in json.load(sys.stdin):
    with fakegpu.recorder:
        y = torch.arange(3.0)
        x = torch.arange(3.0, device="cuda")
        fakegpu.recorder.start()
        try:
            exec(line)
        except RuntimeError:  # what a GPU refuses, a CPU may refuse too
            pass
    found.append([kind for kind, *_ in fakegpu.recorder.events])
print(json.dumps(found))
"""


def test_the_pretended_gpu_notes_what_waits_and_what_mixes():
    if shutil.which("g++") is None:
        pytest.skip("the pretended GPU needs g++")
    command = [sys.executable, "-c", TRY]
    done = subprocess.run(command, cwd=ROOT / "tests", input=json.dumps(list(SEEN)), check=False,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = dict(zip(SEEN, json.loads(done.stdout), strict=True))
    assert found == SEEN


# --- Correctness ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", marked_slow(CASES, SLOW))
def test_every_way_to_train_runs_to_its_end(runs, name):
    assert runs[name].error is None, runs[name].explain([])


@pytest.mark.parametrize("name", marked_slow(CASES, SLOW))
def test_no_operator_mixes_tensors_of_the_cpu_and_the_gpu(runs, name):
    found = runs[name].find("mixed devices")
    assert not found, runs[name].explain(found)


@pytest.mark.parametrize("name", marked_slow(CASES, SLOW))
def test_no_matrix_product_and_no_attention_mixes_dtypes(runs, name):
    found = runs[name].find("mixed dtypes")
    assert not found, runs[name].explain(found)


def test_in_float32_the_pretended_gpu_trains_as_the_cpu_does(runs):
    gpu = read_metrics(runs["full float32 padded"].folder)
    cpu = read_metrics(runs["on the CPU"].folder)
    assert len(gpu) == len(cpu) == STEPS + 1
    assert not differences(gpu, cpu, 1e-4, absolute=1e-6)


@pytest.mark.parametrize("name", marked_slow(
    ["full", "full qwen2", "full qwen3", "full mistral", "full gpt2"], ["full qwen2", "full gpt2"]))
def test_the_one_call_attention_of_packed_rows_trains_as_padded_rows_do(runs, name):
    """Up to bfloat16's rounding of log-probs, here of about 50 nats: 3 decimal digits."""
    packed = read_metrics(runs[f"{name} packed"].folder)
    padded = read_metrics(runs[f"{name} padded"].folder)
    for left, right in zip(packed, padded, strict=True):
        for key in ("loss", "logps/chosen", "logps/rejected"):
            assert left[key] == pytest.approx(right[key], rel=1e-2), (key, left, right)


# --- Attention ------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", marked_slow(HALF_PACKED, SLOW))
def test_packed_rows_in_bfloat16_take_the_one_call_attention_in_every_layer(runs, name):
    run = runs[name]
    slow = run.find("sdpa", updates=range(1, STEPS + 1))
    assert not slow, run.explain(slow)
    calls = run.find("flash", updates=[1])
    assert run.count("flash", updates=[1]) > 0, run.explain(calls)
    assert run.count("flash", updates=[1]) % LAYERS == 0, run.explain(calls)


def test_a_micro_batch_is_one_attention_call_per_layer_for_policy_and_reference_each(runs):
    for name, micro_batches in {"full packed": 2, "full packed in four": 4}.items():
        run = runs[name]
        calls = run.find("flash", updates=[1])
        assert run.count("flash", updates=[1]) == 2 * LAYERS * micro_batches, run.explain(calls)


@pytest.mark.parametrize("name", marked_slow(HALF_PACKED, SLOW))
def test_the_attention_kernel_takes_its_inputs(runs, name):
    """One half-precision dtype, (tokens, heads, size) with contiguous sizes, ends that fit."""
    found = runs[name].find("kernel")
    assert not found, runs[name].explain(found)


@pytest.mark.parametrize("name", marked_slow(PACKED, SLOW))
def test_no_masked_attention_of_packed_rows_leaves_grouped_heads_to_sdpa(runs, name):
    """SDPA with a mask and enable_gqa has no fused kernel: it holds all scores in memory."""
    found = [event for event in runs[name].find("sdpa", updates=range(1, STEPS + 1))
             if event["operation"] == "a mask and enable_gqa"]
    assert not found, runs[name].explain(found)


@pytest.mark.parametrize("name", marked_slow(PACKED, SLOW))
def test_packed_rows_keep_no_attention_mask_on_the_gpu(runs, name):
    """Neither from layer to layer where no gradient is taken, nor from step to step."""
    found = runs[name].find("mask", updates=range(1, STEPS + 1))
    assert not found, runs[name].explain(found)


# --- Waiting --------------------------------------------------------------------------------------

# After the first update and before the second: one step without evaluation or checkpoint.
STEP = [1]


@pytest.mark.parametrize(
    "name", marked_slow([name for name in CASES if name != "resumed"], SLOW))
def test_the_cpu_waits_for_the_gpu_at_most_twice_a_step(runs, name):
    found = runs[name].find("sync", "blocking copy", updates=STEP)
    count = runs[name].count("sync", "blocking copy", updates=STEP)
    assert count <= SYNCS_PER_STEP, runs[name].explain(found)


@pytest.mark.parametrize("name", marked_slow(IN_FOUR, SLOW_IN_FOUR))
def test_more_micro_batches_do_not_wait_more_often(runs, name):
    two, four = runs[name], runs[f"{name} in four"]
    found = four.find("sync", "blocking copy", updates=STEP)
    counts = [run.count("sync", "blocking copy", updates=STEP) for run in (two, four)]
    assert counts[0] == counts[1], four.explain(found)


# --- Resuming -------------------------------------------------------------------------------------

def test_a_resumed_run_takes_the_same_path_to_the_same_metrics(runs):
    run = runs["resumed"]
    assert "resumed after step 2" in run.printed, run.explain([])
    assert run.count("flash") > 0, run.explain(run.find("sdpa"))
    whole = read_metrics(runs["full packed"].folder)
    assert not differences(read_metrics(run.folder), whole)


# --- The script for a real GPU --------------------------------------------------------------------

@pytest.mark.slow
def test_every_section_of_gpu_py_works_with_a_tiny_model_on_a_cpu():
    command = [sys.executable, str(ROOT / "tests" / "gpu.py"), "--dry_run"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout + done.stderr[-2000:]
    for title in gpu.SECTIONS:
        assert f"### {title}\n" in done.stdout
    for kind in gpu.KINDS:
        assert f"| {kind} |" in done.stdout


def test_without_a_gpu_gpu_py_says_so_and_ends_with_status_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().out


def test_a_section_of_gpu_py_that_fails_is_in_the_block_and_in_the_status(monkeypatch, capsys):
    def broken(home):
        raise ValueError("first line\nlast line")

    monkeypatch.setattr(gpu, "DRY", True)
    monkeypatch.setattr(gpu, "SECTIONS", {"Broken": broken, "Whole": lambda home: ["fine"]})
    assert gpu.main([]) == 1
    printed = capsys.readouterr().out
    assert "### Broken\n\n\nFAILED: ValueError: last line" in printed
    assert "### Whole\n\nfine" in printed
