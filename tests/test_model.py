"""Models in and out of folders, onto devices and into shards.

`torchrun tests/test_model.py FOLDER OUT` places models on its processes; pytest reads what it found.
"""
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, same_metrics, tiny_model, weights
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Qwen2Config

import lora
import model as models
import parallel
import train


def test_a_loaded_model_has_no_dropout_and_its_saved_config_keeps_it(tokenizer, tmp_path):
    """GPT-2's default is 0.1 everywhere: two passes in training mode differ, until load_model."""
    noisy = tiny_model("gpt2", tokenizer).train()
    models.save_model(noisy, tokenizer, tmp_path)
    ids = torch.arange(20)[None]
    assert not torch.equal(noisy(ids).logits, noisy(ids).logits)
    quiet = models.load_model(str(tmp_path))
    assert quiet.training and torch.equal(quiet(ids).logits, quiet(ids).logits)
    models.save_model(quiet, tokenizer, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["attn_pdrop"] == 0.1


def test_llama_attention_dropout_is_turned_off_too(tokenizer, tmp_path):
    models.save_model(tiny_model("llama", tokenizer, attention_dropout=0.5), tokenizer, tmp_path)
    quiet, ids = models.load_model(str(tmp_path)), torch.arange(20)[None]
    assert torch.equal(quiet(ids).logits, quiet(ids).logits)


def test_what_is_saved_is_what_is_loaded_bit_for_bit(folder, tokenizer, tmp_path):
    model = models.load_model(folder)
    models.save_model(model, tokenizer, tmp_path, flags={"seed": 3})
    saved = weights(tmp_path)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert json.loads((tmp_path / "config.json").read_text())["flags"] == {"seed": 3}
    assert not list(tmp_path.glob(".*"))  # nothing half-written is left


def test_weights_that_are_not_in_the_file_are_an_error_not_random_numbers(folder, tokenizer, tmp_path):
    models.save_model(models.load_model(folder), tokenizer, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 weights are not in the files or have another shape, such as model.layers.1.mlp.up_proj"):
        models.load_model(str(tmp_path))


@pytest.mark.parametrize("spoil, message", [
    (lambda path: (path / "model.safetensors").write_bytes(b"short"), "no usable ModelForCausalLM in this folder"),
    (lambda path: (path / "model.safetensors").unlink(), "no usable ModelForCausalLM in this folder"),
    (lambda path: (path / "config.json").write_text("{"), "no usable ModelForCausalLM in this folder"),
])
def test_a_spoiled_folder_is_one_sentence(folder, tokenizer, tmp_path, spoil, message):
    models.save_model(models.load_model(folder), tokenizer, tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message):
        models.load_model(str(tmp_path))


def test_a_folder_that_is_not_there_and_a_name_the_hub_cannot_be_asked_for(tmp_path):
    with pytest.raises(ValueError, match="no such model folder"):
        models.load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="not found locally or on the Hub"):
        models.load_tokenizer("some-org/some-model")


def test_model_new_makes_a_folder_that_loads_and_the_same_one_for_the_same_seed(folder, tmp_path):
    for name in ("one", "two"):
        arguments = ["new", "--tokenizer", folder, "--hidden_size", "64", "--layers", "2", "--out", tmp_path / name]
        subprocess.run([sys.executable, ROOT / "model.py", *arguments], check=True, capture_output=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert model.config.hidden_size == 64 and model.config.num_hidden_layers == 2
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "one"))
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "one").values(), weights(tmp_path / "two").values()))


# --- dtypes and places

def family(name):
    """A tiny model of this kind, as tests/test_packing.py builds it."""
    import test_packing
    options = test_packing.PACKS[name] if name in test_packing.PACKS else test_packing.PACKS_NOT[name][0]
    return test_packing.build(name, **options)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Phi3", "Olmo2", "Olmo3", "GPTNeoX", "Gemma3Text", "Cohere",
                                  "GPT2", "Mixtral", "Bloom", "Gemma2", "GptOss", "Mamba", "Lfm2", "RecurrentGemma", "Llama4Text", "Qwen3Next"])
def test_every_parameter_and_buffer_has_the_dtype_and_bits_that_transformers_gives(name, stored, tmp_path):
    """In a file of 16 bits too, where they are widened after loading: frequencies and scales are in no file and must not be rounded."""
    family(name).to(stored).save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found, expected = models.load_model(str(tmp_path), dtype), AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        for kind in ("named_parameters", "named_buffers"):
            left, right = dict(getattr(found, kind)()), dict(getattr(expected, kind)())
            assert left.keys() == right.keys()  # tied parameters are still one
            for key, tensor in right.items():
                assert left[key].dtype == tensor.dtype and torch.equal(left[key], tensor), (key, dtype)
        assert found.dtype == expected.dtype and found.config.dtype == expected.config.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modules_that_transformers_keeps_in_fp32_stay_there(tokenizer, tmp_path, monkeypatch, dtype):
    models.save_model(tiny_model("llama", tokenizer).bfloat16(), tokenizer, tmp_path)
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules_strict", ["input_layernorm"])
    model = models.load_model(str(tmp_path), dtype)
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.float32 and model.lm_head.weight.dtype == dtype


def test_a_file_with_16_and_32_bit_weights_is_read_without_rounding(tokenizer, tmp_path):
    model = tiny_model("llama", tokenizer).bfloat16()
    model.model.norm.float().weight.data.uniform_()
    models.save_model(model, tokenizer, tmp_path)
    assert torch.equal(models.load_model(str(tmp_path)).model.norm.weight, model.model.norm.weight)


def test_a_16_bit_file_stays_in_16_bits_on_the_host_until_each_weight_is_on_the_device(tokenizer, tmp_path, monkeypatch):
    """The device is "meta": an fp32 tensor of the host would be a copy of weights that the host need not have."""
    models.save_model(tiny_model("llama", tokenizer).bfloat16(), tokenizer, tmp_path)
    read, move, widened = [], models.move, []

    class Host(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            out = operator(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.device.type == "cpu" and out.dtype == torch.float32 and out.ndim == 2:
                widened.append(out.shape)
            return out

    def watched(model, device, dtype):
        read.append({parameter.dtype for parameter in model.parameters()})
        host = list(model.parameters())
        with Host():
            move(model, torch.device("meta"), dtype)
        assert sum(parameter.numel() for parameter in host) == 0  # and is freed there
        assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("meta", torch.float32)}

    monkeypatch.setattr(models, "move", watched)
    models.load_model(str(tmp_path))
    assert read == [{torch.bfloat16}] and not widened


def test_a_model_is_widened_one_weight_at_a_time(tokenizer, tmp_path):
    """100 MiB of bfloat16 that become 200 MiB: at the peak there is little more than both."""
    config = Qwen2Config(vocab_size=320, hidden_size=512, intermediate_size=2048, num_hidden_layers=13, num_attention_heads=8, num_key_value_heads=8)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size / 2**20
    code = ("import resource, sys, model\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
            "before = peak(); kept = model.load_model(sys.argv[1]); print(peak() - before)")
    out = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=ROOT, check=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert 90 < size < 150 and float(out.stdout) < 3.6 * size


# --- two processes

@pytest.fixture(scope="module")
def biased(tokenizer, tmp_path_factory):
    """A bfloat16 file of a model with biases and a tied head."""
    path = tmp_path_factory.mktemp("biased")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(
        vocab_size=len(tokenizer) + 1, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    models.save_model(model.bfloat16(), tokenizer, path)
    return str(path)


@pytest.fixture(scope="module")
def placed(biased, tmp_path_factory):
    out = tmp_path_factory.mktemp("placed") / "found.pt"
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, biased, str(out)],
                            capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"})
    assert out.exists(), result.stderr[-5000:]
    return torch.load(out)


def test_the_processes_of_a_machine_load_in_turn(placed):
    (first_start, first_end), (second_start, second_end) = sorted(placed["turns"])
    assert first_start < first_end <= second_start < second_end


@pytest.mark.parametrize("kind", ["full", "lora", "dora"])
def test_under_fsdp_policy_and_reference_are_exactly_equal_at_the_start(placed, kind):
    policy, reference = placed[kind]["logps"]
    assert torch.equal(policy, reference)


def test_under_fsdp_frozen_weights_are_bf16_and_trained_ones_fp32(placed):
    assert placed["full"]["reference"] == {torch.bfloat16} and placed["full"]["policy"] == {torch.float32}
    for kind in ("lora", "dora"):
        assert placed[kind]["frozen"] == {torch.bfloat16} and placed[kind]["trained"] == {torch.float32}
    assert placed["moving"] == {torch.float32}  # small steps towards the policy add up


def test_under_fsdp_the_first_process_holds_the_weights_in_the_dtype_of_the_file(placed):
    assert placed["full"]["sources"] == [[torch.bfloat16], [torch.bfloat16]]  # of policy and reference


def test_after_a_forward_the_root_of_a_sharded_reference_is_in_shards_again(placed):
    assert placed["full"]["resharded"]


def test_a_sharded_adapter_is_the_one_of_a_single_process(placed, biased):
    args = train.parse_args(FLAGS["dora"] + [f"--model={biased}"])[0]
    alone = train.load_policy(args, biased, None, "bfloat16", torch.device("cpu"))
    for name, tensor in lora.adapter_tensors(alone.model, "policy").items():
        assert torch.equal(placed["dora"]["adapter"][name], tensor), name


def test_a_sharded_dora_computes_with_its_fp32_values_as_a_whole_one_does(placed, biased):
    """A change of the magnitudes by a thousandth would be lost in bfloat16."""
    args = train.parse_args(FLAGS["dora"] + [f"--model={biased}"])[0]
    alone = train.load_policy(args, biased, None, "bfloat16", torch.device("cpu"))
    before = logps_of(alone)
    stir(alone)
    after = logps_of(alone)
    assert not torch.equal(before, after) and torch.equal(placed["dora"]["stirred"], after)


def test_a_bfloat16_run_that_began_with_ddp_goes_on_with_fsdp(fit, biased, pairs, tmp_path):
    flags = dict(model=biased, dtype="bfloat16", max_steps=4, save_every=2)
    out, _ = fit(**flags)
    shutil.rmtree(out / "checkpoint-4", ignore_errors=True)
    for path in list(out.iterdir()):
        if path.is_file() and path.name not in ("config.json", "metrics.jsonl"):
            path.unlink()
    (out / "config.json").write_text(json.dumps({"flags": json.loads((out / "config.json").read_text())["flags"]}))
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(ROOT / "train.py"),
                             "--output_dir", str(out), "--resume", "--parallel", "fsdp"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumed after step 2" in result.stdout


# --- compiling

@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("more", [{}, {"lora_rank": 4}])
def test_compiled_mlps_and_norms_change_a_run_by_rounding_alone_and_no_name(fit, tokenizer, tmp_path, kind, more):
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs a compiler")
    models.save_model(tiny_model(kind, tokenizer), tokenizer, tmp_path / "start")
    flags = dict(model=tmp_path / "start", max_steps=3, attention="packed", **more)
    plain, metrics = fit(**flags, out="plain")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, again = fit("--compile", **flags, out="compiled")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"] and not counters["recompile_limit"]
    same_metrics(metrics, again, 1e-3)
    file = "adapter_model.safetensors" if more else "model.safetensors"
    assert load_file(plain / file).keys() == load_file(compiled / file).keys()


def test_a_model_without_known_blocks_is_not_compiled_in_silence():
    with pytest.raises(ValueError, match="--compile: .* does not say which of its modules are blocks"):
        model = torch.nn.Linear(2, 2)
        model._no_split_modules = None
        models.compile_blocks(model)


FLAGS = {kind: ["--dataset=none", "--parallel=fsdp", "--dtype=bfloat16", *more] for kind, more in {
    "full": [], "lora": ["--lora_rank=4"], "dora": ["--lora_rank=4", "--dora"]}.items()}


@torch.no_grad()
def stir(module):
    for layer in lora.lora_layers(module.model).values():
        for parameter in layer.magnitude.values():
            parameter.mul_(1.001)


@torch.no_grad()
def logps_of(module):
    ids = torch.arange(24).view(2, 12) % 20 + 3
    with torch.autocast("cpu", torch.bfloat16):
        return module(input_ids=ids, labels=ids)[0]


def place(kind, folder, ranks):
    """-> what can be seen of a policy and its reference in shards."""
    args = train.parse_args([*FLAGS[kind], f"--model={folder}"])[0]
    sources, scatter = [], parallel.scatter
    parallel.scatter = lambda source, *given: (source and sources.append(list({p.dtype for p in source.parameters()})), scatter(source, *given))
    policy = parallel.build_on_ranks(lambda device: train.load_policy(args, folder, None, "bfloat16", device), ranks, "fsdp", "bfloat16")
    reference = train.load_reference(args, policy, folder, "bfloat16", ranks)
    parallel.scatter = scatter
    seen = {"sources": sources, "adapter": {name: parallel.whole(tensor.detach()) for name, tensor in lora.adapter_tensors(policy.model, "policy").items()}}
    seen |= {kind: {p.dtype for p in policy.parameters() if p.requires_grad == (kind == "trained")} for kind in ("trained", "frozen")}
    seen["policy"] = {p.dtype for p in policy.parameters()}
    seen["logps"] = [logps_of(reference), logps_of(policy)]
    if isinstance(reference, torch.nn.Module):
        seen["reference"] = {p.dtype for p in reference.parameters()}
        seen["resharded"] = all(isinstance(p, DTensor) for p in reference.parameters())
    stir(policy)
    seen["stirred"] = logps_of(policy)
    return seen


if __name__ == "__main__":
    ranks = parallel.init_distributed()
    folder = sys.argv[1]

    def slow():
        start = time.monotonic()
        time.sleep(0.2)
        return start, time.monotonic()

    found = {"turns": parallel.gather(parallel.build_on_ranks(lambda device: slow(), ranks, "ddp", "float32"), ranks)}
    for kind in FLAGS:
        found[kind] = place(kind, folder, ranks)
    args = train.parse_args([*FLAGS["full"], f"--model={folder}", "--sync_ref_every=1"])[0]
    found["moving"] = {p.dtype for p in train.load_reference(args, None, folder, "bfloat16", ranks).parameters()}
    if ranks.rank == 0:
        torch.save(found, sys.argv[2])
    parallel.leave_distributed(ranks)
