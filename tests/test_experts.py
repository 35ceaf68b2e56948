"""The loss that balances the experts of a mixture."""
import json

import pytest
import torch
import transformers
from conftest import (
    ALONE,
    SHARED,
    differences,
    make_rows,
    read_metrics,
    resume,
    run_training,
    unfinished,
    write_jsonl,
)
from steps import SIZES, Words, flat_gradient, make_columns
from transformers import AutoModelForCausalLM

import experts
import lora
import model as models
import reach
import train
from batches import collate_on_cpu, make_task, with_router_loss
from errors import UserError
from experts import RouterLoss, Routing, balance_loss
from logps import FastLogps
from losses import find
from variants import Variants

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 32}
DBRX = {
    "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
}
JAMBA = {"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1,
         "expert_layer_offset": 0, "use_mamba_kernels": False}
# Architectures with a router loss in transformers, and the options that are not those of SIZES.
BALANCED = {
    "Mixtral": EXPERTS,
    "Qwen2Moe": EXPERTS | {"shared_expert_intermediate_size": 32},
    "Qwen3Moe": EXPERTS,
    "Olmoe": EXPERTS,
    "Phimoe": EXPERTS | {"sliding_window": None},
    "GptOss": EXPERTS,
    "Jamba": EXPERTS | JAMBA,
    "Dbrx": DBRX,
    "GraniteMoe": EXPERTS | {"logits_scaling": 2.0},  # no bare head: logps.has_bare_head
}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 0, "num_key_value_heads": 4,
}


def build(name, vocabulary=SIZES["vocab_size"], **options):
    """A model of an architecture with random weights, whose routers are not uniform."""
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": vocabulary, "eos_token_id": 0, "bos_token_id": None}
    config = getattr(transformers, f"{name}Config")(**sizes | options)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "gate.weight" in path or "router" in path:
                parameter.normal_(std=0.5)
    reach.turn_off_noise(model)
    return model


def collate(columns, router_loss, packed=False, loss="sigmoid"):
    task = make_task(find(loss), {}, Variants(), "float32", ALONE.device, packed)
    task = with_router_loss(task, router_loss)
    return task, collate_on_cpu(columns, Words(pad_token_id=0, size=97), task.row_format)


def routing_of(module, inputs):
    routing = Routing()
    module(routing=routing, **inputs)
    return routing


def whole_loss(routing, top_k=2):
    """L of the tokens of one forward."""
    return balance_loss(routing, top_k, routing.counts(top_k, 1)[0])


def fixed_routing(router_logits, weights):
    routing = Routing()
    routing.router_logits, routing.weights = router_logits, weights
    return routing


# --- The formula ----------------------------------------------------------------------------------

@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_loss_of_uniform_routers_is_top_k(top_k):
    routing = fixed_routing([torch.zeros(7, 4, dtype=torch.float64)] * 3, torch.ones(7))
    assert whole_loss(routing, top_k).item() == pytest.approx(top_k, rel=1e-12)


def test_routers_that_choose_two_of_four_experts_for_sure_have_twice_the_loss_of_uniform_ones():
    logits = torch.tensor([[30.0, 30.0, -30.0, -30.0]]).expand(5, 4)
    assert whole_loss(fixed_routing([logits], torch.ones(5))).item() == pytest.approx(4.0)


@pytest.mark.skipif(not (SHARED / "oracle").exists(), reason="needs the oracle's vectors")
def test_loss_and_gradient_equal_the_recorded_case_of_trl_and_transformers():
    cases = json.loads((SHARED / "oracle" / "vectors.json").read_text())["cases"]
    case, = [case for case in cases if case["loss"] == "tok_moe_aux"]
    logits = torch.tensor(case["inputs"]["router_logits"], dtype=torch.float64)  # (2, 42, 4)
    layers = [layer.requires_grad_() for layer in logits]
    mask = torch.tensor(case["inputs"]["attention_mask"]).flatten()
    loss = whole_loss(fixed_routing(layers, mask), case["params"]["top_k"])
    expected = case["outputs"]
    # The case was computed with float32 counts.
    assert loss.item() == pytest.approx(expected["aux_loss"], rel=1e-6)
    gradients = torch.stack(torch.autograd.grad(loss, layers))
    wanted = torch.tensor(expected["grad_aux_wrt_router_logits"], dtype=torch.float64)
    assert torch.allclose(gradients, wanted, rtol=1e-6, atol=1e-9)
    # The total: sigmoid with beta 0.1, and aux_coef times this loss.
    sides = {}
    for name in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"):
        sides[f"{name}_logps"] = torch.tensor(expected[f"{name}_logps"], dtype=torch.float64)
    total = find("sigmoid")(**sides, beta=0.1).mean() + case["params"]["aux_coef"] * loss
    assert total.item() == pytest.approx(expected["loss_mean"], rel=1e-7)


# --- In a model -----------------------------------------------------------------------------------

@pytest.mark.parametrize("name", BALANCED)
def test_the_loss_of_padded_rows_is_that_of_transformers_on_the_same_rows(name):
    model = build(name, **BALANCED[name])
    module = FastLogps(model)
    if reason := experts.find_no_router_loss(module):
        # transformers 5.17 returns none of these two.
        assert name in ("Dbrx", "GraniteMoe") and "no router logits" in reason
        return
    top_k = experts.experts_per_token(model)
    _, batch = collate(make_columns(), RouterLoss(0.1, top_k))
    inputs = batch["inputs"]
    found = whole_loss(routing_of(module, inputs), top_k)
    ids_and_mask = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    expected = model(**ids_and_mask, output_router_logits=True).aux_loss
    assert expected.item() != pytest.approx(top_k, rel=1e-4)  # the routers are not uniform
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = []
    for loss in (found, expected):
        model.zero_grad()
        loss.backward()
        gradients.append(flat_gradient(model))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_padding_does_not_count():
    module = FastLogps(build("Qwen3Moe", **EXPERTS))
    columns = make_columns()
    _, batch = collate(columns, RouterLoss(0.1, 2))
    inputs = dict(batch["inputs"])
    found = whole_loss(routing_of(module, inputs))
    for name in ("input_ids", "attention_mask"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, 9))
    inputs["targets"] = None
    assert whole_loss(routing_of(module, inputs)).item() == pytest.approx(found.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe"])
def test_packed_rows_count_the_tokens_of_padded_rows_but_the_last_of_each_answer(name):
    """The last token of an answer predicts nothing, so packed rows do not feed it. A prompt is fed
    once, and counts once for each answer."""
    module = FastLogps(build(name, **EXPERTS))
    columns = make_columns()
    _, packed = collate(columns, RouterLoss(0.1, 2), packed=True)
    _, padded = collate(columns, RouterLoss(0.1, 2))
    inputs = dict(padded["inputs"])
    last = inputs["attention_mask"].sum(-1) - 1
    expected = routing_of(module, inputs)
    expected.weights = inputs["attention_mask"].scatter(1, last[:, None], 0).flatten()
    found = routing_of(module, packed["inputs"])
    assert torch.allclose(found.counts(2, 1), expected.counts(2, 1))
    assert whole_loss(found).item() == pytest.approx(whole_loss(expected).item(), rel=1e-5)


# --- In a step ------------------------------------------------------------------------------------

def gradient_of_step(model, reference, loss, sizes, packed=False, coefficient=0.5, lr=1.0):
    """The gradient of one train_step on micro-batches of these sizes, and its metrics."""
    columns = make_columns()
    count = len(columns["id"])
    policy = FastLogps(model)
    pieces, micro_batches, start = [], [], 0
    for size in sizes:
        pieces.append(train.Piece(slice(start, start + size), 1.0))
        part = {name: values[start:start + size] for name, values in columns.items()}
        task, batch = collate(part, RouterLoss(coefficient, 2), packed, loss)
        micro_batches.append(batch)
        start += size
    assert start == count
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    step = train.Step(1, count, pieces, {})
    values = train.train_step(task, policy, reference, optimizer, iter(micro_batches * 2), step,
                              1e9, False, ALONE)
    after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return before - after, values


def different_models():
    """A policy, and a reference that differs from it."""
    policy = build("Qwen3Moe", **EXPERTS)
    reference = build("Qwen3Moe", **EXPERTS)
    policy.lm_head.weight.data.mul_(1.1)
    return policy, FastLogps(reference).requires_grad_(False)


@pytest.mark.parametrize("loss", ["sigmoid", "aot", "simpo"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_is_that_of_the_loss_over_the_whole_step_however_it_is_cut(loss, packed):
    """By autograd: the mean loss of the rows, plus 0.5 L of all tokens of the step."""
    model, reference = different_models()
    task, batch = collate(make_columns(), RouterLoss(0.5, 2), packed, loss)
    routing = Routing()
    losses, _ = train.pair_losses(task, FastLogps(model), reference, batch, {}, routing=routing)
    expected_balance = whole_loss(routing)
    model.zero_grad()
    (losses.mean() + 0.5 * expected_balance).backward()
    expected = flat_gradient(model).float()
    model.zero_grad()
    for sizes in ([5], [2, 3], [1, 1, 1, 2]):
        copy, _ = different_models()
        gradient, values = gradient_of_step(copy, reference, loss, sizes, packed)
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=2e-6), sizes
        assert values["aux_loss"] == pytest.approx(expected_balance.item(), rel=1e-6)
        assert values["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_mean_of_the_losses_of_micro_batches_would_be_another_loss():
    """What trainers add that compute L of each micro-batch."""
    model, _ = different_models()
    parts = []
    for rows in (slice(0, 2), slice(2, 5)):
        columns = {name: values[rows] for name, values in make_columns().items()}
        _, batch = collate(columns, RouterLoss(0.5, 2))
        parts.append(whole_loss(routing_of(FastLogps(model), batch["inputs"])).item())
    _, batch = collate(make_columns(), RouterLoss(0.5, 2))
    whole = whole_loss(routing_of(FastLogps(model), batch["inputs"])).item()
    assert abs(sum(parts) / 2 - whole) > 1e-3


# --- In a run -------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def mixture(tokenizer, tmp_path_factory):
    """A function that saves a Mixtral, and returns its folder."""
    def save(name, **options):
        path = tmp_path_factory.mktemp(name)
        model = build("Mixtral", len(tokenizer), **EXPERTS | options)
        for config, entry, original, _ in model.changed_config:
            setattr(config, entry, original)
        models.save_model(model, tokenizer, path)
        return str(path)
    return save


@pytest.fixture(scope="module")
def plain(mixture):
    return mixture("plain")


@pytest.fixture(scope="module")
def asking(mixture):
    return mixture("asking", output_router_logits=True, router_aux_loss_coef=0.5)


@pytest.fixture(scope="module")
def ten_rows(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("ten") / "ten.jsonl", make_rows(10))


RUN = {"max_steps": 2, "batch_size": 4, "micro_batch_size": 2, "attention": "padded"}


def aux_losses(metrics, split="train"):
    return [row.get("aux_loss") for row in metrics if row["split"] == split]


def test_the_config_turns_the_loss_on_and_the_flag_turns_it_off_or_gives_another_weight(
        fit, plain, asking, ten_rows, capsys):
    """Also: evaluations have none, and the saved config is the one that was read."""
    run = RUN | {"dataset": ten_rows, "eval_share": 0.4}
    _, off = fit(model=plain, **run, out="off")
    assert aux_losses(off) == [None, None]
    assert "router loss" not in capsys.readouterr().out
    out, on = fit(model=asking, **run, out="on")
    assert "router loss: 0.5 x aux_loss" in capsys.readouterr().out
    assert all(1 < value < 4 for value in aux_losses(on))
    assert aux_losses(on, "eval") == [None]
    assert on[0]["loss"] == pytest.approx(0.6931472, rel=1e-5)  # of the pairs alone
    assert json.loads((out / "config.json").read_text())["output_router_logits"] is True
    _, flagged = fit(model=plain, router_aux_loss_coef=0.5, **run, out="flagged")
    assert not differences(on, flagged)
    _, zero = fit(model=asking, router_aux_loss_coef=0, **run, out="zero")
    assert not differences(off, zero)


def test_the_size_of_micro_batches_and_gradient_checkpointing_change_nothing(fit, plain, ten_rows):
    flags = RUN | {"dataset": ten_rows, "router_aux_loss_coef": 0.5, "model": plain}
    _, small = fit(**flags | {"micro_batch_size": 1}, out="small")
    _, large = fit(**flags | {"micro_batch_size": 4, "gradient_checkpointing": True}, out="large")
    assert not differences(small, large, 1e-4)


@pytest.mark.parametrize("flags", [
    {"loss": "kto", "unpair": True}, {"loss": "sft"}, {"loss": "aot", "attention": "packed"},
    {"ref": "cache", "gradient_checkpointing": True}, {"wpo": True},
    {"lora_rank": 2, "lora_target": "q_proj,v_proj", "lora_dropout": 0.1},
], ids=["kto", "sft", "aot packed", "cache", "wpo", "lora"])
def test_the_loss_goes_with_losses_references_and_adapters_of_every_kind(
        flags, fit, plain, ten_rows):
    run = RUN | {"dataset": ten_rows, "router_aux_loss_coef": 0.5, "max_steps": 1} | flags
    _, metrics = fit(model=plain, **run)
    assert all(1 < value < 4 for value in aux_losses(metrics))


def test_the_loss_balances_the_experts_of_an_unbalanced_mixture():
    """By gradient descent on the router loss, next to which that of the pairs is small."""
    model, reference = different_models()
    for layer in model.model.layers:
        layer.mlp.gate.weight.data.mul_(0.2)
    found = []
    for _ in range(4):
        gradient, values = gradient_of_step(model, reference, "simpo", [2, 3], coefficient=100.0,
                                            lr=3e-4)
        found.append(values["aux_loss"])
    assert found == sorted(found, reverse=True)
    assert found[0] - 2 > 1.2 * (found[-1] - 2)


def test_a_run_that_is_resumed_ends_bit_for_bit_the_same(fit, plain, ten_rows):
    flags = RUN | {"dataset": ten_rows, "router_aux_loss_coef": 0.5, "save_every": 1}
    out, metrics = fit(model=plain, **flags, out="whole")
    again, _ = fit(model=plain, **flags, out="cut")
    unfinished(again)
    assert [path.name for path in again.glob("checkpoint-*")] == ["checkpoint-1"]
    resume(again)
    assert not differences(out, again)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_compute_the_loss_of_one(parallel, fit, plain, ten_rows, tmp_path):
    flags = RUN | {"dataset": ten_rows, "router_aux_loss_coef": 0.5, "model": plain}
    _, one = fit(**flags, out="one")
    out = tmp_path / "two"
    done = run_training(flags | {"parallel": parallel, "output_dir": out, "log_every": 1,
                                 "max_length": 64, "lr": 1e-2, "eval_share": 0.1}, ranks=2)
    assert done.returncode == 0, done.stderr
    assert not differences(one, read_metrics(out), 1e-4)


# --- What is refused ------------------------------------------------------------------------------

def test_the_flag_is_refused_for_a_dense_model(fit):
    with pytest.raises(UserError, match="^--router_aux_loss_coef 0.01: Llama.* is a dense model"):
        fit(router_aux_loss_coef=0.01)


@pytest.mark.parametrize("value", ["-0.1", "nan", "inf", "much"])
def test_a_coefficient_that_is_no_number_of_at_least_0_is_refused(value, fit):
    with pytest.raises(UserError, match="router_aux_loss_coef"):
        fit(router_aux_loss_coef=value)


@pytest.mark.parametrize("name, options, reason", [
    ("DeepseekV3", DEEPSEEK, "no load-balancing loss for DeepseekV3ForCausalLM"),
    ("Llama4Text", EXPERTS | {"attention_chunk_size": 64, "intermediate_size_mlp": 32},
     "no load-balancing loss for Llama4ForCausalLM"),
    ("MiniMaxM2", EXPERTS, "choose by a bias"),
    ("Qwen3Moe", EXPERTS | {"mlp_only_layers": [0, 1]}, "is a dense model"),
])
def test_a_model_without_routers_that_this_loss_knows_is_refused_with_the_reason(
        name, options, reason):
    assert reason in experts.find_no_router_loss(FastLogps(build(name, **options)))


def test_a_config_that_asks_for_a_loss_which_its_model_lacks_trains_and_says_so(
        fit, tokenizer, ten_rows, tmp_path, capsys):
    options = EXPERTS | {"attention_chunk_size": 64, "intermediate_size_mlp": 32}
    model = build("Llama4Text", len(tokenizer), **options)
    model.config.output_router_logits = True
    models.save_model(model, tokenizer, tmp_path / "m")
    _, metrics = fit(model=tmp_path / "m", dataset=ten_rows, **RUN | {"max_steps": 1})
    assert aux_losses(metrics) == [None]
    assert "it is not added: transformers has no" in capsys.readouterr().out


@pytest.mark.parametrize("value", [-0.5])
def test_a_coefficient_below_0_in_the_config_is_refused_unless_the_flag_gives_another(
        value, fit, mixture, ten_rows):
    folder = mixture("negative", output_router_logits=True, router_aux_loss_coef=value)
    run = RUN | {"dataset": ten_rows, "max_steps": 1, "model": folder}
    with pytest.raises(UserError, match="config.json asks for the router loss.*-0.5"):
        fit(**run)
    _, metrics = fit(**run, router_aux_loss_coef=0.1, out="given")
    assert aux_losses(metrics)[0] > 1


# --- Adapters, and other things that stacked experts lack -----------------------------------------

@pytest.mark.parametrize("target, message", [
    (None, "the experts of this model are not linear layers"),
    ("all-linear", "the experts of this model are not linear layers"),
    ("q_proj,down_proj", "--lora_target down_proj: is a tensor that stacks the weights of experts"),
    ("experts.gate_up_proj", "is a tensor that stacks the weights of experts, which is not"),
    (".*mlp.experts.(gate_up_proj|down_proj)", "is a tensor that stacks the weights of experts"),
    ("gate", "no linear layer has such a name; there are k_proj, o_proj, q_proj, v_proj"),
])
def test_stacked_experts_get_no_adapter_and_the_error_says_so(target, message, plain):
    model = models.load_model(plain)
    if not lora.has_stacked_experts(model):
        pytest.skip("this version of transformers has experts of linear layers")
    with pytest.raises(UserError) as caught:
        lora.target_modules(model, target)
    assert message in str(caught.value)
    assert "all of them are adapted" not in str(caught.value)


def test_an_adapter_of_a_mixture_computes_the_same_in_peft(fit, plain, ten_rows):
    peft = pytest.importorskip("peft")
    out, _ = fit(model=plain, dataset=ten_rows, **RUN, router_aux_loss_coef=0.5, lora_rank=2,
                 lora_target="q_proj,o_proj")
    ids = torch.arange(1, 13)[None]
    base = AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        before = base(ids).logits
        theirs = peft.PeftModel.from_pretrained(base, out).eval()(ids).logits
        ours = models.load_model(plain)
        lora.load_adapter(ours, out)
        assert torch.allclose(ours(ids).logits, theirs, atol=1e-5)
    assert not torch.allclose(before, theirs, atol=1e-3)


def test_a_mixture_in_float64_is_refused_with_the_dtype_as_the_reason(fit, plain, ten_rows):
    """No kernel for stacked experts takes float64, on a CPU."""
    with pytest.raises(UserError, match="have no float64 kernels, so choose another --dtype"):
        fit(model=plain, dataset=ten_rows, **RUN, dtype="float64")
