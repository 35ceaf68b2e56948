"""Models in folders, on devices and in shards.

`torchrun tests/test_model.py FOLDER OUT` loads models on its processes and writes their properties
into the file OUT; the tests read this file.
"""
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time

import forked
import pytest
import torch
from conftest import ROOT, differences, tiny_model, unfinished, weights
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2Config

import lora
import model as models
import parallel
import train

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_a_loaded_model_has_no_dropout_and_the_config_saved_with_it_keeps_the_probability(
        tokenizer, tmp_path):
    """GPT-2's default is 0.1 everywhere, so that two passes in training mode differ."""
    noisy = tiny_model("gpt2", tokenizer).train()
    models.save_model(noisy, tokenizer, tmp_path)
    ids = torch.arange(20)[None]
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)
    quiet = models.load_model(str(tmp_path))
    assert quiet.training
    assert torch.equal(quiet(ids).logits, quiet(ids).logits)
    models.save_model(quiet, tokenizer, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["attn_pdrop"] == 0.1


def test_a_loaded_llama_has_no_attention_dropout(tokenizer, tmp_path):
    noisy = tiny_model("llama", tokenizer, attention_dropout=0.5)
    models.save_model(noisy, tokenizer, tmp_path)
    quiet = models.load_model(str(tmp_path))
    ids = torch.arange(20)[None]
    assert torch.equal(quiet(ids).logits, quiet(ids).logits)


def test_a_saved_folder_has_exactly_the_weights_tokenizer_and_flags_and_no_temporary_file(
        folder, tokenizer, tmp_path):
    model = models.load_model(folder)
    models.save_model(model, tokenizer, tmp_path, flags={"seed": 3})
    saved = weights(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert json.loads((tmp_path / "config.json").read_text())["flags"] == {"seed": 3}
    assert not list(tmp_path.glob(".*"))


def test_a_weight_that_is_missing_in_the_file_raises_an_error_instead_of_being_random(
        folder, tokenizer, tmp_path):
    models.save_model(models.load_model(folder), tokenizer, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = "1 weights are not in the files, such as model.layers.1.mlp.up_proj"
    with pytest.raises(ValueError, match=message):
        models.load_model(str(tmp_path))


@pytest.mark.parametrize("file, content", [
    ("model.safetensors", "short"),
    ("model.safetensors", None),
    ("config.json", "{"),
], ids=["truncated weights", "no weights", "truncated config"])
def test_a_damaged_folder_raises_an_error_of_one_line(folder, tokenizer, tmp_path, file, content):
    models.save_model(models.load_model(folder), tokenizer, tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=file) as error:
        models.load_model(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_missing_folder_and_a_name_that_is_not_on_the_hub_raise_errors(tmp_path):
    with pytest.raises(ValueError, match="no such model folder"):
        models.load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="not found locally or on the Hub"):
        models.load_tokenizer("some-org/some-model")


def test_model_py_new_writes_a_folder_that_loads_and_equal_weights_for_equal_seeds(
        folder, tmp_path):
    for name in ("one", "two"):
        flags = ["--tokenizer", folder, "--hidden_size", "64", "--layers", "2"]
        forked.run("model.py", "new", *flags, "--out", tmp_path / name).check_returncode()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.config.hidden_size == 64
    assert model.config.num_hidden_layers == 2
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "one"))
    second = weights(tmp_path / "two")
    for name, value in weights(tmp_path / "one").items():
        assert torch.equal(value, second[name]), name


# --- dtypes and devices

FAMILIES = [
    "Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Phi3", "Olmo2", "Olmo3", "GPTNeoX",
    "Gemma3Text", "Cohere", "GPT2", "Mixtral", "Bloom", "Gemma2", "GptOss", "Mamba", "Lfm2",
    "RecurrentGemma", "Llama4Text", "Qwen3Next",
]


def family(name):
    """A tiny model of this architecture, built by tests/test_packing.py."""
    import test_packing
    if name in test_packing.PACKS:
        options = test_packing.PACKS[name]
    else:
        options = test_packing.PACKS_NOT[name][0]
    return test_packing.build(name, **options)


def same_tensors(found, expected):
    """Two {name: tensor} have equal names, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_and_buffer_has_the_dtype_and_bits_that_from_pretrained_gives(
        name, stored, tmp_path):
    """Weights of a 16-bit file are widened after loading. Buffers in no file, such as frequencies
    and scales, must not be rounded to 16 bits before."""
    family(name).to(stored).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = models.load_model(str(tmp_path), dtype)
        expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        # Tied parameters are still one, so the names are equal.
        same_tensors(dict(found.named_parameters()), dict(expected.named_parameters()))
        same_tensors(dict(found.named_buffers()), dict(expected.named_buffers()))
        assert found.dtype == expected.dtype
        assert found.config.dtype == expected.config.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_that_transformers_keeps_in_fp32_stay_in_fp32(
        tokenizer, tmp_path, monkeypatch, dtype):
    models.save_model(tiny_model("llama", tokenizer).bfloat16(), tokenizer, tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    model = models.load_model(str(tmp_path), dtype)
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == dtype


def test_a_file_with_16_and_32_bit_weights_is_read_without_rounding(tokenizer, tmp_path):
    model = tiny_model("llama", tokenizer).bfloat16()
    norm = model.model.norm
    norm.float().weight.data.uniform_()
    models.save_model(model, tokenizer, tmp_path)
    assert torch.equal(models.load_model(str(tmp_path)).model.norm.weight, norm.weight)


class WideHostTensors(TorchDispatchMode):
    """Records the operators that make a new fp32 matrix on the CPU."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not operator.is_view and out.ndim == 2:
            if out.device.type == "cpu" and out.dtype == torch.float32:
                self.operators.append(operator)
        return out


def test_a_16_bit_file_is_read_in_16_bits_and_widened_on_the_device_where_the_host_frees_it(
        tokenizer, tmp_path, monkeypatch):
    """The device is "meta", so an fp32 matrix on the CPU would be a needless copy on the host.

    load_model reads no values for "meta", so the device is replaced when the values are read.
    """
    models.save_model(tiny_model("llama", tokenizer).bfloat16(), tokenizer, tmp_path)
    move = models.move
    host_parameters, dtypes_read = [], set()

    def move_to_meta(model, device, dtype):
        host_parameters.extend(model.parameters())
        dtypes_read.update(dtypes_of(host_parameters))
        move(model, torch.device("meta"), dtype)

    monkeypatch.setattr(models, "move", move_to_meta)
    with WideHostTensors() as wide:
        model = models.load_model(str(tmp_path))
    assert dtypes_read == {torch.bfloat16}
    assert wide.operators == []
    assert sum(parameter.numel() for parameter in host_parameters) == 0
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert dtypes_of(model.parameters()) == {torch.float32}


MEMORY_OF_LOADING = """
import resource, sys
import model

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak()
loaded = model.load_model(sys.argv[1])
print(peak() - before)
"""


def test_widening_a_model_needs_little_more_memory_than_its_16_bit_and_32_bit_weights(tmp_path):
    """100 MiB of bfloat16 become 200 MiB of fp32."""
    config = Qwen2Config(
        vocab_size=320, hidden_size=512, intermediate_size=2048, num_hidden_layers=13,
        num_attention_heads=8, num_key_value_heads=8)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size / 2**20
    assert 90 < size < 150
    result = subprocess.run([sys.executable, "-c", MEMORY_OF_LOADING, tmp_path], cwd=ROOT,
                            capture_output=True, text=True, check=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert float(result.stdout) < 3.6 * size


# --- two processes

@pytest.fixture(scope="module")
def biased(tokenizer, tmp_path_factory):
    """A folder with a bfloat16 model that has biases and a tied head."""
    path = tmp_path_factory.mktemp("biased")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=len(tokenizer) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=True))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    models.save_model(model.bfloat16(), tokenizer, path)
    return str(path)


@pytest.fixture(scope="module")
def observed(biased, tmp_path_factory):
    """The properties that this file, as a script on two processes, writes about `biased`."""
    out = tmp_path_factory.mktemp("observed") / "observed.pt"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*TORCHRUN, __file__, biased, str(out)], capture_output=True,
                            text=True, timeout=300, env=os.environ | environment)
    assert out.exists(), result.stderr[-5000:]
    return torch.load(out)


def test_the_processes_of_a_machine_load_one_after_another(observed):
    (first_start, first_end), (second_start, second_end) = sorted(observed["turns"])
    assert first_start < first_end <= second_start < second_end


@pytest.mark.parametrize("kind", ["full", "lora", "dora"])
def test_under_fsdp_policy_and_reference_have_bit_identical_log_probs_at_the_start(observed, kind):
    assert torch.equal(observed[kind]["policy_logps"], observed[kind]["reference_logps"])


def test_under_fsdp_frozen_weights_are_bfloat16_and_trained_or_moving_weights_fp32(observed):
    assert observed["full"]["reference"] == {torch.bfloat16}
    assert observed["full"]["trained"] == {torch.float32}
    assert observed["full"]["frozen"] == set()
    for kind in ("lora", "dora"):
        assert observed[kind]["frozen"] == {torch.bfloat16}
        assert observed[kind]["trained"] == {torch.float32}
    # In bfloat16, the small steps of a moving reference towards the policy would be lost.
    assert observed["moving"] == {torch.float32}


def test_under_fsdp_rank_0_loads_policy_and_reference_in_the_dtype_of_the_file(observed):
    assert observed["full"]["sources"] == [{torch.bfloat16}, {torch.bfloat16}]


def test_after_a_forward_every_parameter_of_a_sharded_reference_is_sharded_again(observed):
    assert observed["full"]["resharded"]


def single_process_dora(folder):
    """The policy that one process loads with the flags of the sharded DoRA."""
    args = train.parse_args([*FLAGS["dora"], f"--model={folder}"])[0]
    return train.load_policy(args, folder, None, "bfloat16", torch.device("cpu"))


def test_a_sharded_adapter_equals_that_of_a_single_process(observed, biased):
    policy = single_process_dora(biased)
    for name, tensor in lora.adapter_tensors(policy.model, "policy").items():
        assert torch.equal(observed["dora"]["adapter"][name], tensor), name


def test_a_sharded_dora_computes_with_fp32_magnitudes_as_a_single_process_does(observed, biased):
    """bfloat16 would round away a change of the magnitudes by a thousandth."""
    policy = single_process_dora(biased)
    before = logps_of(policy)
    scale_magnitudes(policy)
    after = logps_of(policy)
    assert not torch.equal(before, after)
    assert torch.equal(observed["dora"]["scaled_logps"], after)


def test_a_bfloat16_run_that_began_with_ddp_resumes_with_fsdp(fit, biased):
    out, _ = fit(model=biased, dtype="bfloat16", max_steps=4, save_every=2)
    shutil.rmtree(out / "checkpoint-4", ignore_errors=True)
    unfinished(out)
    script = [str(ROOT / "train.py"), "--output_dir", str(out), "--resume", "--parallel", "fsdp"]
    result = subprocess.run([*TORCHRUN, *script], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumed after step 2" in result.stdout


# --- compiling

@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lora_flags", [{}, {"lora_rank": 4}], ids=["full", "LoRA"])
def test_compiled_mlps_and_norms_change_metrics_only_by_rounding_and_no_name_of_a_weight(
        fit, tokenizer, tmp_path, kind, lora_flags):
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a compiler")
    models.save_model(tiny_model(kind, tokenizer), tokenizer, tmp_path / "start")
    flags = dict(model=tmp_path / "start", max_steps=3, attention="packed", **lora_flags)
    eager, eager_metrics = fit(**flags, out="eager")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled, compiled_metrics = fit("--compile", **flags, out="compiled")
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]
    assert not counters["recompile_limit"]
    assert not differences(eager_metrics, compiled_metrics, 1e-3)
    file = "adapter_model.safetensors" if lora_flags else "model.safetensors"
    assert load_file(eager / file).keys() == load_file(compiled / file).keys()


def test_compiling_a_model_without_known_blocks_raises_an_error():
    model = torch.nn.Linear(2, 2)
    model._no_split_modules = None
    message = "--compile: .* does not say which of its modules are blocks"
    with pytest.raises(ValueError, match=message):
        models.compile_blocks(model)


# --- the script that runs on two processes

FSDP_FLAGS = ["--dataset=none", "--parallel=fsdp", "--dtype=bfloat16"]
FLAGS = {
    "full": FSDP_FLAGS,
    "lora": [*FSDP_FLAGS, "--lora_rank=4"],
    "dora": [*FSDP_FLAGS, "--lora_rank=4", "--dora"],
}


@torch.no_grad()
def scale_magnitudes(module):
    """Change DoRA's magnitudes by a thousandth."""
    for layer in lora.lora_layers(module.model).values():
        for parameter in layer.magnitude.values():
            parameter.mul_(1.001)


@torch.no_grad()
def logps_of(module):
    ids = torch.arange(24).view(2, 12) % 20 + 3
    with torch.autocast("cpu", torch.bfloat16):
        return module(input_ids=ids, labels=ids)[0]


def dtypes_of(parameters):
    return {parameter.dtype for parameter in parameters}


@contextlib.contextmanager
def recorded_sources():
    """Yields the dtypes of each model that this rank reads and scatters to all ranks."""
    sources = []
    scatter = parallel.scatter

    def recording_scatter(source, *inputs):
        if source:
            sources.append(dtypes_of(source.parameters()))
        scatter(source, *inputs)

    parallel.scatter = recording_scatter
    try:
        yield sources
    finally:
        parallel.scatter = scatter


def observe(kind, folder, ranks):
    """Load a policy and its reference in shards -> their properties."""
    args = train.parse_args([*FLAGS[kind], f"--model={folder}"])[0]

    def make(device):
        return train.load_policy(args, folder, None, "bfloat16", device)

    with recorded_sources() as sources:
        policy = parallel.build_on_ranks(make, ranks, "fsdp", "bfloat16")
        reference = train.load_reference(args, policy, folder, "bfloat16", ranks)
    parameters = list(policy.parameters())
    adapter = {}
    for name, tensor in lora.adapter_tensors(policy.model, "policy").items():
        adapter[name] = parallel.whole(tensor.detach())
    properties = {
        "sources": sources,
        "adapter": adapter,
        "trained": dtypes_of(p for p in parameters if p.requires_grad),
        "frozen": dtypes_of(p for p in parameters if not p.requires_grad),
        "reference_logps": logps_of(reference),
        "policy_logps": logps_of(policy),
    }
    if isinstance(reference, torch.nn.Module):
        parameters = list(reference.parameters())
        properties["reference"] = dtypes_of(parameters)
        properties["resharded"] = all(isinstance(p, DTensor) for p in parameters)
    scale_magnitudes(policy)
    properties["scaled_logps"] = logps_of(policy)
    return properties


def moving_reference_dtypes(folder, ranks):
    """Dtypes of a reference that TR-DPO moves."""
    args = train.parse_args([*FLAGS["full"], f"--model={folder}", "--sync_ref_every=1"])[0]
    return dtypes_of(train.load_reference(args, None, folder, "bfloat16", ranks).parameters())


def slow_load(device):
    """-> the times at which this load starts and ends."""
    start = time.monotonic()
    time.sleep(0.2)
    return start, time.monotonic()


def main(folder, out):
    ranks = parallel.init_distributed()
    turn = parallel.build_on_ranks(slow_load, ranks, "ddp", "float32")
    observed = {"turns": parallel.gather(turn, ranks)}
    for kind in FLAGS:
        observed[kind] = observe(kind, folder, ranks)
    observed["moving"] = moving_reference_dtypes(folder, ranks)
    if ranks.rank == 0:
        torch.save(observed, out)
    parallel.leave_distributed(ranks)


if __name__ == "__main__":
    main(*sys.argv[1:])
