"""One batch gives one update for any number of micro-batches, processes and shards.

`torchrun tests/test_parallel.py CASES OUT` trains with the flags of each case (JSON: name -> flags)
on its processes and writes the gradients into the folder OUT; the tests compare them with those of
one process.
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
import torch.nn.functional as F
from conftest import (
    ALONE,
    ROOT,
    TINY_RUN,
    differences,
    make_rows,
    marked_slow,
    one_of_each,
    read_metrics,
    selected,
    tiny_model,
    to_arguments,
    write_jsonl,
)
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import lora
import model as models
import packing
import parallel
import train
from checkpoint import saved_flags, write_flags
from losses import (
    LOSSES,
    find,
    hyperparameters,
    kind_of,
    needs_reference,
    tensor_arguments,
)

SUMS = ["sigmoid:0.8,bco_pair:0.2,sft:1", "aot,sft"]
# Name: micro_batch_size. The two steps have 8 and 3 pairs.
SPLITS = {"whole": 8, "halves": 4, "uneven": 3}
COMMON = TINY_RUN | {
    "eval_share": None, "dtype": "float64", "lr": 1e-30, "epochs": 1, "max_grad_norm": 1e-3,
}


def record(flags, out, ranks):
    """Train -> for each step, the gradients that the optimizer receives: {index: tensor}.

    At the learning rate of COMMON the weights do not change.
    """
    gradients = []

    def before_step(optimizer, args, kwargs):
        step = {}
        for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
            step[index] = parallel.whole(parameter.grad).clone()
        # torch initializes the state of an optimizer by a step with zero gradients.
        if any(gradient.any() for gradient in step.values()):
            gradients.append(step)

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        train.main(to_arguments(flags | {"output_dir": out}), ranks)
    finally:
        hook.remove()
    return gradients


@pytest.fixture(scope="module")
def world(tokenizer, tmp_path_factory):
    """A folder with 11 training rows, 5 held-out rows, a policy and another model as reference."""
    home = tmp_path_factory.mktemp("parallel")
    for name, seed in (("policy", 0), ("reference", 1)):
        model = tiny_model("llama", tokenizer)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        models.save_model(model, tokenizer, home / name)
    for name, count in (("rows", 11), ("held_out", 5)):
        rows = []
        for i, row in enumerate(make_rows(count, seed=len(name))):
            scores = {"chosen_score": 2.0 + i % 3, "rejected_score": 1.0 + 0.1 * i}
            rows.append(row | scores)
        write_jsonl(home / f"{name}.jsonl", rows)
        write_jsonl(home / f"{name}_labels.jsonl", labelled(rows))
        write_jsonl(home / f"{name}_lists.jsonl", listed(rows))
    return home


def labelled(rows):
    """One answer of each pair, with a label, and a weight where the row has an odd number."""
    made = []
    for i, row in enumerate(rows):
        side = "rejected" if i % 3 else "chosen"
        made.append({"prompt": row["prompt"], "completion": row[side], "label": side == "chosen",
                     "weight": 1.0 + i % 2})
    return made


def listed(rows):
    """Two, three or four answers to each prompt, with scores."""
    made = []
    for i, row in enumerate(rows):
        answers = [row["chosen"], row["rejected"], " a dog ran", " the sun sat on a mat"]
        count = 2 + i % 3
        scores = [3.0, 2.5, 1.0, 0.25 * i - 5]
        made.append({"prompt": row["prompt"], "responses": answers[:count],
                     "scores": scores[:count]})
    return made


def flags_of(world, loss, **more):
    """The flags of a run with this loss on the files of `world`."""
    end = {"pairs": "", "labels": "_labels", "lists": "_lists"}[kind_of(find(loss))]
    flags = COMMON | {
        "loss": loss, "model": world / "policy", "dataset": world / f"rows{end}.jsonl",
        "eval_dataset": world / f"held_out{end}.jsonl",
    }
    if "beta" in hyperparameters(find(loss)):
        flags["beta"] = 0.3
    if needs_reference(find(loss)) and more.get("ref") != "adapter_off":
        flags["ref_model"] = world / "reference"
    flags |= more
    # JSON has no paths.
    for name, value in flags.items():
        if isinstance(value, pathlib.Path):
            flags[name] = str(value)
    return flags


def torchrun(cases, out):
    """Run the cases on two processes -> {case: gradients}."""
    out.mkdir(parents=True)
    (out / "cases.json").write_text(json.dumps(cases))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [sys.executable, *launcher, __file__, str(out / "cases.json"), str(out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(script, capture_output=True, text=True, timeout=600, env=environment)
    output = result.stdout[-2000:] + result.stderr[-5000:]
    assert (out / "gradients.pt").exists(), output
    return torch.load(out / "gradients.pt")


@pytest.fixture(scope="module")
def two_processes(world, request):
    """The losses on two processes with DDP, in micro-batches of 2 pairs."""
    cases = {}
    for loss in [*LOSSES, *SUMS]:
        if loss in selected(request, "loss"):
            cases[loss] = flags_of(world, loss, micro_batch_size=2)
    return torchrun(cases, world / "ddp"), world / "ddp"


def what_is_split(loss):
    """What the trainer reads of a loss: losses with the same arguments, tags and state are split
    into micro-batches by the same code."""
    function = find(loss)
    return (*tensor_arguments(function), *sorted(function.tags), bool(function.update))


def copy_until_step_2(whole, half):
    """Make the folder of a run that is killed after its checkpoint of step 2."""
    half.mkdir()
    shutil.copytree(whole / "checkpoint-2", half / "checkpoint-2")
    shutil.copy(whole / "metrics.jsonl", half)
    write_flags(half, saved_flags(whole) | {"output_dir": str(half)})


def differing_gradients(left, right, tolerance):
    """(step, index) of the gradients that differ by more than `tolerance` times the step's largest
    gradient."""
    assert len(left) == len(right) > 0
    differing = []
    for step, (left_step, right_step) in enumerate(zip(left, right)):
        assert left_step.keys() == right_step.keys()
        scale = max(gradient.abs().max() for gradient in left_step.values())
        for index, gradient in left_step.items():
            assert gradient.shape == right_step[index].shape
            if not (gradient - right_step[index]).abs().max() <= tolerance * scale:
                differing.append((step, index))
    return differing


def same_gradients(left, right, tolerance=1e-10):
    assert differing_gradients(left, right, tolerance) == []


def same_runs(left, right, tolerance=1e-9):
    """The metrics of two folders are equal, and contain every evaluation."""
    left, right = read_metrics(left), read_metrics(right)
    evaluations = [row["split"] for row in left].count("eval")
    assert evaluations == (3 if len(left) > 3 else 1)
    assert not differences(left, right, tolerance)


@pytest.mark.parametrize("loss", one_of_each([*LOSSES, *SUMS], what_is_split))
def test_micro_batches_and_two_processes_give_the_gradients_and_metrics_of_the_whole_batch(
        loss, world, two_processes, tmp_path):
    gradients = {}
    for name, size in SPLITS.items():
        flags = flags_of(world, loss, micro_batch_size=size)
        gradients[name] = record(flags, tmp_path / name, ALONE)
    whole = gradients["whole"]
    assert sum(gradient.abs().sum() for gradient in whole[0].values()) > 0
    for name in ("halves", "uneven"):
        same_gradients(whole, gradients[name])
        same_runs(tmp_path / "whole", tmp_path / name)
    ddp_gradients, out = two_processes
    same_gradients(whole, ddp_gradients[loss])
    same_runs(tmp_path / "whole", out / loss)


# Case: loss, flags.
SHARDED = {}
for sharded_loss in ("sigmoid", "aot", "simpo", "sft"):
    SHARDED |= {
        f"{sharded_loss}, full": (sharded_loss, {}),
        f"{sharded_loss}, LoRA": (sharded_loss, {"lora_rank": 4}),
    }
for sharded_loss in ("sigmoid", "aot"):  # once and twice through the model in a step
    SHARDED |= {
        f"{sharded_loss}, full, checkpointing": (
            sharded_loss, {"gradient_checkpointing": True}),
        f"{sharded_loss}, LoRA, checkpointing": (
            sharded_loss, {"lora_rank": 4, "gradient_checkpointing": True}),
    }
for sharded_loss in ("kto", "plackett_luce", "simper", "beta_dpo", "npo"):
    SHARDED[f"{sharded_loss}, full"] = (sharded_loss, {})
SHARDED |= {
    "sigmoid, DoRA with its base as the reference": (
        "sigmoid", {"lora_rank": 4, "dora": True, "ref": "adapter_off"}),
    "sigmoid, a cached reference": ("sigmoid", {"ref": "cache"}),
    "sigmoid, tied embeddings": ("sigmoid", {}),
}
# What these add to the others is covered by the tests of one process.
SLOW = {
    "simpo, full", "simpo, LoRA", "sft, LoRA", "aot, full, checkpointing",
    "sigmoid, LoRA, checkpointing", "simper, full", "beta_dpo, full", "npo, full",
}
LONG = {
    "lr": 1e-2, "epochs": 3, "save_every": 2, "eval_every": 2, "keep_checkpoints": 9,
    "micro_batch_size": 2,
}
MOVING = {
    "bco_pair, a moving reference": ("bco_pair", {"sync_ref_every": 1}),
    "aot, an adapter with its base as the reference": (
        "aot", {"lora_rank": 4, "ref": "adapter_off"}),
    "sigmoid, momentum": ("sigmoid", {}),
}


@contextlib.contextmanager
def optimizer_of(case):
    """Inside, cases named after momentum are trained by SGD with momentum instead of AdamW."""
    make = train.make_optimizer

    def make_sgd(model, args, device):
        return torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)

    if "momentum" in case:
        train.make_optimizer = make_sgd
    try:
        yield
    finally:
        train.make_optimizer = make


@pytest.fixture(scope="module")
def shards(world, tokenizer, request):
    """Gradients of some losses under FSDP2 and DDP, and {case: flags} for one process."""
    models.save_model(tiny_model("gpt2", tokenizer), tokenizer, world / "gpt2")
    one_process, two_processes = {}, {}
    for case, (loss, more) in SHARDED.items():
        if case in SLOW and case not in selected(request, "case"):
            continue
        flags = flags_of(world, loss, micro_batch_size=2, **more)
        if "tied embeddings" in case:
            flags["model"] = str(world / "gpt2")
        one_process[case] = flags
        two_processes[f"fsdp, {case}"] = flags | {"parallel": "fsdp"}
        if "LoRA" in case or "checkpointing" in case:
            two_processes[f"ddp, {case}"] = flags
    for case, (loss, more) in MOVING.items():
        flags = flags_of(world, loss, **LONG, **more)
        one_process[case] = flags
        two_processes[f"fsdp, {case}"] = flags | {"parallel": "fsdp"}
        two_processes[f"resumed, {case}"] = {"resume": True}
    return torchrun(two_processes, world / "fsdp"), one_process


# Case: the ranks on which the check of packed rows fails, and the call of the attention function
# that fails; "backward": its gradient. A name: the module whose forward fails.
FAILURES = {
    "both ranks, in the second block": ([0, 1], 2),
    "both ranks, after some rows": ([0, 1], 7),
    "both ranks, in backward": ([0, 1], "backward"),
    "rank 1 alone": ([1], 2),
    "rank 1 alone, in the MLP of the second block": ([1], "layers.1.mlp"),
    "rank 1 alone, in the embedding": ([1], "embed_tokens"),
    "rank 0 alone, in the last norm": ([0], "model.norm"),
    "rank 0 alone, in the head": ([0], "lm_head"),
}
PARTS = ("layers.1.mlp", "embed_tokens", "model.norm", "lm_head")
TWO_EPOCHS = {"lr": 1e-2, "epochs": 2, "micro_batch_size": 2, "eval_every": 2}


class NoBackward(torch.autograd.Function):
    """The identity, whose backward raises an error."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("no kernel for this gradient")


@contextlib.contextmanager
def failing_check(failing_ranks, rank, failing_call):
    """Inside, attention raises an error in verify.can_pack, as a kernel does that does not support
    a head size, and only there."""
    check, attention = train.can_pack, F.scaled_dot_product_attention
    calls = []

    def failing_attention(*inputs, **options):
        calls.append(1)
        if failing_call == "backward":
            return NoBackward.apply(attention(*inputs, **options))
        if len(calls) == failing_call:
            raise RuntimeError("no kernel for this head size")
        return attention(*inputs, **options)

    failing_parts = []  # their ids

    def failing_forward(part, *inputs):
        if id(part) in failing_parts:
            raise ValueError("no kernel for this shape")
        return forwards[type(part).__name__.removeprefix("FSDP")](part, *inputs)

    def check_with_failing_attention(module):
        calls.clear()
        if rank in failing_ranks and failing_call in PARTS:
            for name, part in module.named_modules():
                if name.endswith(f".{failing_call}"):
                    failing_parts.append(id(part))
            assert len(failing_parts) == 1
        elif rank in failing_ranks:
            F.scaled_dot_product_attention = failing_attention
        try:
            return check(module)
        finally:
            F.scaled_dot_product_attention = attention
            failing_parts.clear()

    kinds, forwards = (torch.nn.Embedding, torch.nn.Linear, LlamaRMSNorm, LlamaMLP), {}
    for kind in kinds:
        forwards[kind.__name__] = kind.forward
        kind.forward = failing_forward
    train.can_pack = check_with_failing_attention
    try:
        yield
    finally:
        train.can_pack = check
        for kind in kinds:
            kind.forward = forwards[kind.__name__]


@pytest.fixture(scope="module")
def failures(world):
    """Runs whose check of packed rows fails, and runs with padded rows: gradients and folder."""
    flags = flags_of(world, "sigmoid", **TWO_EPOCHS)
    cases = {}
    for kind in ("fsdp", "ddp"):
        cases[f"{kind}, padded"] = flags | {"parallel": kind, "attention": "padded"}
    for name in FAILURES:
        cases[f"fsdp, {name}"] = flags | {"parallel": "fsdp", "attention": "auto"}
    cases["ddp, rank 1 alone"] = flags | {"parallel": "ddp", "attention": "auto"}
    return torchrun(cases, world / "failures"), world / "failures"


@pytest.mark.parametrize("case", [*(f"fsdp, {name}" for name in FAILURES), "ddp, rank 1 alone"])
def test_a_run_whose_check_of_packed_rows_fails_is_bit_identical_to_one_with_padded_rows(
        case, failures):
    """With --attention padded no check is made. Gradients, metrics and weights are compared."""
    gradients, out = failures
    padded = f"{case.split(',')[0]}, padded"
    same_gradients(gradients[padded], gradients[case], 0)
    assert not differences(out / padded, out / case)
    found = load_file(out / case / "model.safetensors")
    start = models.load_model(str(out.parent / "policy"), torch.float64).state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in found.items())


@pytest.mark.parametrize("case", marked_slow(SHARDED, SLOW))
def test_sharded_and_replicated_weights_give_the_gradients_and_metrics_of_one_process(
        case, world, shards, tmp_path):
    gradients, flags = shards
    one_process = record(flags[case], tmp_path / "one", ALONE)
    for kind in ("fsdp", "ddp"):
        name = f"{kind}, {case}"
        if name in gradients:
            same_gradients(one_process, gradients[name])
            same_runs(tmp_path / "one", world / "fsdp" / name)


@pytest.mark.parametrize("case", MOVING)
def test_a_sharded_run_of_many_steps_equals_one_process_and_resumes_bit_for_bit(
        case, world, shards, tmp_path):
    """All runs evaluate and save at the same steps. The resumed run starts from the checkpoint of
    step 2 of the sharded run."""
    gradients, flags = shards
    with optimizer_of(case):
        one_process = record(flags[case], tmp_path / "one", ALONE)
    whole, resumed = gradients[f"fsdp, {case}"], gradients[f"resumed, {case}"]
    same_gradients(one_process, whole, 1e-6)
    assert len(whole) == 6
    assert len(resumed) == 4
    same_gradients(whole[2:], resumed, 0)
    sharded_folder = world / "fsdp" / f"fsdp, {case}"
    same_runs(tmp_path / "one", sharded_folder, 1e-6)
    same_runs(sharded_folder, world / "fsdp" / f"resumed, {case}", 0)


@pytest.mark.parametrize("case, start", [
    ("fsdp, sigmoid, full", "policy"),
    ("fsdp, sigmoid, tied embeddings", "gpt2"),
])
def test_a_sharded_run_saves_the_whole_model_in_one_folder(case, start, world, shards):
    """At a learning rate of 1e-30 the saved weights are those of the start."""
    saved = models.load_model(str(world / "fsdp" / case), torch.float64).state_dict()
    before = models.load_model(str(world / start), torch.float64).state_dict()
    for name, value in before.items():
        assert torch.allclose(value, saved[name], rtol=0, atol=1e-20), name


def test_a_sharded_run_saves_a_tied_weight_once_and_an_adapter_in_its_own_format(world, shards):
    stored = load_file(world / "fsdp" / "fsdp, sigmoid, tied embeddings" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert "transformer.wte.weight" in stored
    assert lora.read_adapter(world / "fsdp" / "fsdp, sigmoid, LoRA")[0].rank == 4


def test_under_fsdp_only_rank_0_reads_weights_and_reads_each_model_once(shards):
    """Policy and reference: host memory contains one copy of a model for any number of ranks."""
    reads = shards[0]["reads"]  # case: models read by each rank
    assert reads["fsdp, sigmoid, full"] == [2, 0]
    assert reads["fsdp, aot, LoRA"] == [2, 0]
    assert reads["fsdp, sft, full"] == [1, 0]
    assert reads["ddp, aot, LoRA"] == [2, 2]


def test_aot_without_its_batch_tag_sorts_each_micro_batch_and_gets_other_gradients(
        world, tmp_path, monkeypatch):
    """The equality of gradients above is therefore not trivial."""
    flags = flags_of(world, "aot", micro_batch_size=2)
    whole_batch = record(flags, tmp_path / "whole_batch", ALONE)
    monkeypatch.setattr(find("aot"), "tags", frozenset())
    micro_batches = record(flags, tmp_path / "micro_batches", ALONE)
    assert differing_gradients(whole_batch, micro_batches, 1e-3) != []


# --- the script that runs on two processes

@contextlib.contextmanager
def counted_reads():
    """Yields a list of the models that from_pretrained reads inside."""
    from_pretrained = AutoModelForCausalLM.from_pretrained
    names = []

    def counting_from_pretrained(name, **options):
        names.append(name)
        return from_pretrained(name, **options)

    AutoModelForCausalLM.from_pretrained = counting_from_pretrained
    try:
        yield names
    finally:
        AutoModelForCausalLM.from_pretrained = from_pretrained


def run_case(case, flags, out, ranks):
    """Train with the flags of a case -> gradients, number of models that each rank reads."""
    if "resume" in flags and ranks.rank == 0:
        copy_until_step_2(out / case.replace("resumed", "fsdp"), out / case)
    parallel.barrier(ranks)
    fault = contextlib.nullcontext()
    failure = FAILURES.get(case.split(", ", 1)[-1])
    if failure:
        packing.is_faster = lambda *inputs: True
        failing_ranks, failing_call = failure
        fault = failing_check(failing_ranks, ranks.rank, failing_call)
    with fault, optimizer_of(case), counted_reads() as reads:
        gradients = record(flags, out / case, ranks)
    return gradients, parallel.gather(len(reads), ranks)


def main(cases_file, out):
    ranks = parallel.init_distributed()
    results = {"reads": {}}
    for case, flags in json.loads(pathlib.Path(cases_file).read_text()).items():
        results[case], results["reads"][case] = run_case(case, flags, pathlib.Path(out), ranks)
    if ranks.rank == 0:
        torch.save(results, pathlib.Path(out) / "gradients.pt")
    parallel.leave_distributed(ranks)


if __name__ == "__main__":
    main(*sys.argv[1:])
