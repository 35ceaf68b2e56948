"""One batch is one update, whatever the number of micro-batches, processes and shards it is cut into.

`torchrun tests/test_parallel.py CASES OUT` runs the cases (JSON: name -> flags) on its processes; pytest compares them with one process.
"""
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ALONE, ROOT, make_rows, read_metrics, same_metrics, tiny_model, write_jsonl
from safetensors.torch import load_file

import lora
import model as models
import packing
import parallel
import train
from losses import LOSSES, find, hyperparameters, needs_reference

SUMS = ["sigmoid:0.8,bco_pair:0.2,sft:1", "aot,sft"]
CUTS = {"whole": 8, "halves": 4, "uneven": 3, "quarters": 2}  # name: micro_batch_size; windows of 8 pairs and of 3
COMMON = {"batch_size": 8, "max_length": 64, "dtype": "float64", "lr": 1e-30, "log_every": 1, "epochs": 1, "max_grad_norm": 1e-3}


def record(flags, out, ranks):
    """The gradients that the optimizer of each step is given, after clipping; and metrics.jsonl. The weights stay as they are."""
    gradients, clip = [], train.clip_gradients

    def clipped(module, max_norm):
        norm = clip(module, max_norm)
        gradients.append({name.removeprefix("module."): parallel.whole(parameter.grad).clone() for name, parameter in module.named_parameters()
                          if parameter.requires_grad})
        return norm

    train.clip_gradients = clipped
    try:
        train.main([f"--{name}" if value is True else f"--{name}={value}" for name, value in (flags | {"output_dir": out}).items()], ranks)
    finally:
        train.clip_gradients = clip
    return gradients


@pytest.fixture(scope="module")
def world(tokenizer, tmp_path_factory):
    """The flags of every case, on 11 rows and 5 held out, with a reference that is another model than the policy."""
    home = tmp_path_factory.mktemp("parallel")
    for name, seed in (("policy", 0), ("reference", 1)):
        model = tiny_model("llama", tokenizer)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        models.save_model(model, tokenizer, home / name)
    for name, count in (("rows", 11), ("held_out", 5)):
        write_jsonl(home / f"{name}.jsonl", [row | {"chosen_score": 2.0 + i % 3, "rejected_score": 1.0 + 0.1 * i}
                                            for i, row in enumerate(make_rows(count, seed=len(name)))])
    return home


def flags_of(world, loss, **more):
    flags = COMMON | {"loss": loss, "model": world / "policy", "dataset": world / "rows.jsonl", "eval_dataset": world / "held_out.jsonl"}
    names = hyperparameters(find(loss))
    flags |= {"beta": 0.3} if "beta" in names else {}
    flags |= {"ref_model": world / "reference"} if needs_reference(find(loss)) and more.get("ref") != "adapter_off" else {}
    return {name: value if value is True else str(value) for name, value in (flags | more).items()}


def torchrun(cases, out):
    """Run the cases on two processes -> {case: gradients}."""
    out.mkdir(parents=True)
    (out / "cases.json").write_text(json.dumps(cases))
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__,
                             str(out / "cases.json"), str(out)], capture_output=True, text=True, timeout=600,
                            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert (out / "gradients.pt").exists(), result.stdout[-2000:] + result.stderr[-5000:]
    return torch.load(out / "gradients.pt")


@pytest.fixture(scope="module")
def two_processes(world):
    """Every loss on two processes with DDP, in micro-batches of 2 pairs."""
    cases = {loss: flags_of(world, loss, micro_batch_size=2) for loss in [*LOSSES, *SUMS]}
    return torchrun(cases, world / "ddp"), world / "ddp"


def half_of(whole, half):
    """What a run leaves that is killed after its checkpoint of step 2."""
    half.mkdir()
    shutil.copytree(whole / "checkpoint-2", half / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", half)
    flags = json.loads((whole / "config.json").read_text())["flags"]
    (half / "config.json").write_text(json.dumps({"flags": flags | {"output_dir": str(half)}}))


def same(left, right, tolerance=1e-10):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        scale = max(gradient.abs().max() for gradient in a.values())
        for name in a:
            assert (a[name] - b[name]).abs().max() <= tolerance * scale, name


def same_runs(left, right, tolerance=1e-9):
    left, right = read_metrics(left), read_metrics(right)
    assert [row["split"] for row in left].count("eval") == (3 if len(left) > 3 else 1)
    same_metrics(left, right, tolerance)


@pytest.mark.parametrize("loss", [*LOSSES, *SUMS])
def test_gradients_and_metrics_are_those_of_the_whole_batch_however_it_is_cut(loss, world, two_processes, tmp_path):
    found = {cut: record(flags_of(world, loss, micro_batch_size=size), tmp_path / cut, ALONE) for cut, size in CUTS.items()}
    assert sum(gradient.abs().sum() for gradient in found["whole"][0].values()) > 0
    for cut in ("halves", "uneven", "quarters"):
        same(found["whole"], found[cut])
        same_runs(tmp_path / "whole", tmp_path / cut)
    gradients, out = two_processes
    same(found["whole"], gradients[loss])
    same_runs(tmp_path / "whole", out / loss)


SHARDED = {f"{loss}, {kind}{', checkpointing' if checkpointing else ''}": (loss, more | checkpointing)
           for loss in ("sigmoid", "aot", "simpo", "sft") for checkpointing in ({}, {"gradient_checkpointing": True})
           for kind, more in (("full", {}), ("LoRA", {"lora_rank": 4}))}
SHARDED["sigmoid, DoRA with its base as the reference"] = "sigmoid", {"lora_rank": 4, "dora": True, "ref": "adapter_off"}
SHARDED["sigmoid, a cached reference"] = "sigmoid", {"ref": "cache"}
SHARDED["sigmoid, tied embeddings"] = "sigmoid", {}
LONG = {"lr": 1e-2, "epochs": 3, "save_every": 2, "eval_every": 2, "keep_checkpoints": 9, "micro_batch_size": 2}
MOVING = {"bco_pair, a model that moves": ("bco_pair", {"sync_ref_every": 1}), "aot, an adapter on its base": ("aot", {"lora_rank": 4, "ref": "adapter_off"}),
          "sigmoid, momentum": ("sigmoid", {})}


@contextlib.contextmanager
def optimizer_of(case):
    """Gradient descent with momentum instead of AdamW, in the cases that say so."""
    make = train.make_optimizer
    if "momentum" in case:
        train.make_optimizer = lambda model, lr, device: torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    try:
        yield
    finally:
        train.make_optimizer = make


@pytest.fixture(scope="module")
def shards(world, tokenizer):
    """A few losses under FSDP2 and DDP, and the same flags for one process."""
    models.save_model(tiny_model("gpt2", tokenizer), tokenizer, world / "gpt2")
    cases = {case: flags_of(world, loss, micro_batch_size=2, **more) for case, (loss, more) in SHARDED.items()}
    cases["sigmoid, tied embeddings"]["model"] = str(world / "gpt2")
    sharded = {f"fsdp, {case}": flags | {"parallel": "fsdp"} for case, flags in cases.items()}
    replicated = {f"ddp, {case}": flags for case, flags in cases.items() if "LoRA" in case or "checkpointing" in case}
    for case, (loss, more) in MOVING.items():
        cases[case] = flags_of(world, loss, **LONG, **more)
        sharded |= {f"fsdp, {case}": cases[case] | {"parallel": "fsdp"}, f"resumed, {case}": {"resume": True}}
    return torchrun(sharded | replicated, world / "fsdp"), cases


# Where the check of packed rows fails: on these ranks, at this call of the attention function; "backward": in its gradient.
FAILURES = {"both ranks, in the second block": ([0, 1], 2), "both ranks, after some rows": ([0, 1], 7),
            "both ranks, in backward": ([0, 1], "backward"), "rank 1 alone": ([1], 2)}
UNPACKED = {"lr": 1e-2, "epochs": 2, "micro_batch_size": 2, "eval_every": 2, "log_every": 1, "lora_rank": None}


@contextlib.contextmanager
def failing_check(ranks, rank, call):
    """Packed rows fail in the check, as with a kernel that refuses the head size: an error inside the forward of some block."""
    check, attend, calls = packing.can_pack, torch.nn.functional.scaled_dot_product_attention, []

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("no kernel for this gradient")

    def refuses(*given, **named):
        calls.append(1)
        if call == "backward":
            return Fails.apply(attend(*given, **named))
        if len(calls) == call:
            raise RuntimeError("no kernel for this head size")
        return attend(*given, **named)

    def checked(module):
        calls.clear()
        torch.nn.functional.scaled_dot_product_attention = refuses if rank in ranks else attend
        try:
            return check(module)
        finally:
            torch.nn.functional.scaled_dot_product_attention = attend

    packing.can_pack = checked
    try:
        yield
    finally:
        packing.can_pack = check


@pytest.fixture(scope="module")
def failures(world):
    flags = {name: value for name, value in (flags_of(world, "sigmoid", **UNPACKED)).items() if value != "None"}
    cases = {"fsdp, padded": flags | {"parallel": "fsdp", "attention": "padded"}, "ddp, padded": flags | {"attention": "padded"}}
    for kind in ("fsdp", "ddp"):
        for name in FAILURES:
            if kind == "fsdp" or "alone" in name:
                cases[f"{kind}, {name}"] = flags | {"parallel": kind, "attention": "auto"}
    return torchrun(cases, world / "failures"), world / "failures"


@pytest.mark.parametrize("case", [*(f"fsdp, {name}" for name in FAILURES), "ddp, rank 1 alone"])
def test_a_check_of_packed_rows_that_fails_in_the_middle_leaves_a_run_with_padded_rows_and_nothing_else(case, failures):
    """Gradients, metrics and weights are bit for bit those of --attention padded, where no check was made."""
    gradients, out = failures
    padded = f"{case.split(',')[0]}, padded"
    same(gradients[padded], gradients[case], 0)
    same_metrics(read_metrics(out / padded), read_metrics(out / case), 0)
    expected, found = (load_file(out / name / "model.safetensors") for name in (padded, case))
    assert expected.keys() == found.keys() and all(torch.equal(value, found[name]) for name, value in expected.items())
    start = models.load_model(str(out.parent / "policy"), torch.float64).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in found.items())


@pytest.mark.parametrize("case", SHARDED)
def test_sharded_weights_give_the_gradients_and_metrics_of_whole_ones(case, world, shards, tmp_path):
    gradients, cases = shards
    one = record(cases[case], tmp_path / "one", ALONE)
    for kind in ("fsdp", "ddp"):
        if f"{kind}, {case}" in gradients:
            same(one, gradients[f"{kind}, {case}"])
            same_runs(tmp_path / "one", world / "fsdp" / f"{kind}, {case}")


@pytest.mark.parametrize("case", MOVING)
def test_a_sharded_run_of_many_steps_is_that_of_one_process_and_goes_on_bit_for_bit(case, world, shards, tmp_path):
    """Evaluated and saved at the same steps, its reference moved; the second was begun from the first's checkpoint of step 2."""
    gradients, cases = shards
    with optimizer_of(case):
        one = record(cases[case], tmp_path / "one", ALONE)
    whole, resumed = gradients[f"fsdp, {case}"], gradients[f"resumed, {case}"]
    same(one, whole, 1e-6)
    assert len(whole) == 6 and len(resumed) == 4
    same(whole[2:], resumed, 0)
    same_runs(tmp_path / "one", world / "fsdp" / f"fsdp, {case}", 1e-6)
    same_runs(world / "fsdp" / f"fsdp, {case}", world / "fsdp" / f"resumed, {case}", 0)


def test_a_sharded_run_leaves_one_folder_in_the_format_of_any_other(world, shards):
    """At a learning rate of 1e-30 the weights are those of the start, and tied weights are stored once."""
    for case, start in (("fsdp, sigmoid, full", "policy"), ("fsdp, sigmoid, tied embeddings", "gpt2")):
        saved, before = (models.load_model(str(path), torch.float64).state_dict() for path in (world / "fsdp" / case, world / start))
        assert all(torch.allclose(value, saved[name], rtol=0, atol=1e-20) for name, value in before.items())
    stored = load_file(world / "fsdp" / "fsdp, sigmoid, tied embeddings" / "model.safetensors")
    assert "lm_head.weight" not in stored and "transformer.wte.weight" in stored
    assert lora.read_adapter(world / "fsdp" / "fsdp, sigmoid, LoRA")[0].rank == 4


def test_under_fsdp_the_first_process_alone_reads_the_weights(shards):
    """Policy and reference, once each: host memory holds one copy of a model, however many processes there are."""
    reads = shards[0]["reads"]
    assert reads["fsdp, sigmoid, full"] == [2, 0] and reads["fsdp, aot, LoRA"] == [2, 0] and reads["fsdp, sft, full"] == [1, 0]
    assert reads["ddp, aot, LoRA"] == [2, 2]


def test_aot_sorts_the_whole_batch_and_not_a_part_of_it(world, tmp_path):
    """What is computed from micro-batches that each sort for themselves is another gradient: the equality above is no accident."""
    flags = flags_of(world, "aot", micro_batch_size=2)
    right = record(flags, tmp_path / "right", ALONE)
    tags, find("aot").tags = find("aot").tags, frozenset()
    try:
        wrong = record(flags, tmp_path / "wrong", ALONE)
    finally:
        find("aot").tags = tags
    with pytest.raises(AssertionError):
        same(right, wrong, 1e-3)


if __name__ == "__main__":
    ranks = parallel.init_distributed()
    found, calls, load = {"reads": {}}, [], models.load_pretrained
    models.load_pretrained = lambda kind, *given, **named: calls.append(kind) or load(kind, *given, **named)
    for case, flags in json.loads(pathlib.Path(sys.argv[1]).read_text()).items():
        calls.clear()
        if "resume" in flags and ranks.rank == 0:
            half_of(pathlib.Path(sys.argv[2]) / case.replace("resumed", "fsdp"), pathlib.Path(sys.argv[2]) / case)
        parallel.barrier(ranks)
        inside = contextlib.nullcontext()
        failure = FAILURES.get(case.split(", ", 1)[-1])
        if failure:
            packing.is_faster = lambda *given: True
            inside = failing_check(failure[0], ranks.rank, failure[1])
        with inside, optimizer_of(case):
            found[case] = record(flags, pathlib.Path(sys.argv[2]) / case, ranks)
        found["reads"][case] = parallel.gather(calls.count(models.AutoModelForCausalLM), ranks)
    if ranks.rank == 0:
        torch.save(found, pathlib.Path(sys.argv[2]) / "gradients.pt")
    parallel.leave_distributed(ranks)
