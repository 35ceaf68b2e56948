"""The optimizer and the schedule: their formulas, and runs that resume."""
import argparse
import re

import pytest
import torch
from conftest import ALONE, differences, resume, tiny_model, unfinished, weights
from safetensors.torch import load_file
from transformers import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

import flags
import optimizers
import train
from errors import UserError

CPU = torch.device("cpu")
# transformers.Trainer.get_decay_parameter_names
UNDECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
STEPS = {"max_steps": 6, "save_every": 2}


def settings(**changes):
    """The values of the flags of an optimizer."""
    values = {"optimizer": "adamw", "lr": 0.1, "weight_decay": 0.0, "adam_beta1": 0.9,
              "adam_beta2": 0.999, "adam_eps": 1e-8, "lr_schedule": "linear", "min_lr": 0.0}
    return argparse.Namespace(**values | changes)


def rates(warmup, steps, **changes):
    """The learning rate of each step."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=settings(**changes).lr)
    scheduler = optimizers.make_schedule(optimizer, settings(**changes), warmup, steps)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


# --- The schedule ---------------------------------------------------------------------------------

@pytest.mark.parametrize("schedule", optimizers.SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 3, 8, 20])
def test_step_k_of_a_warmup_has_k_parts_of_the_learning_rate_and_no_step_has_none(
        schedule, warmup):
    values = rates(warmup, 8, lr_schedule=schedule)
    for k, value in enumerate(values[:warmup], 1):
        assert value == pytest.approx(0.1 * k / (warmup + 1), rel=1e-12)
    if warmup < 8:
        assert values[warmup] == max(values) == 0.1
    assert min(values) > 0


@pytest.mark.parametrize("ours, theirs, options", [
    ("linear", "linear", {}),
    ("cosine", "cosine", {}),
    ("constant", "constant_with_warmup", {}),
    ("cosine", "cosine_with_min_lr", {"min_lr": 0.03}),
])
def test_after_the_warmup_the_schedules_are_those_of_transformers(ours, theirs, options):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = get_scheduler(theirs, optimizer, 3, 11, scheduler_specific_kwargs=options)
    expected = []
    for _ in range(11):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates(3, 11, lr_schedule=ours, **options)[3:] == pytest.approx(expected[3:], rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_decays_to_min_lr(schedule):
    def decay(done):
        return optimizers.learning_rate_factor(done, schedule, 2, 10, lowest=0.25)

    assert decay(2) == 1 and decay(10) == pytest.approx(0.25) and decay(9) > 0.25
    assert all(decay(i) > decay(i + 1) for i in range(2, 10))


def test_the_first_step_of_a_warmup_moves_the_weights(fit, folder):
    out, _ = fit(max_steps=1, warmup_steps=5)
    start = weights(folder)
    assert any(not torch.equal(value, start[name]) for name, value in weights(out).items())


# --- The optimizers -------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_weights_decay_where_transformers_trainer_decays_them(kind, tokenizer):
    model = tiny_model(kind, tokenizer)
    named = dict(model.named_parameters())
    names = get_parameter_names(model, [torch.nn.LayerNorm], UNDECAYED)
    optimizer = optimizers.make_optimizer(model, settings(weight_decay=0.1), CPU)
    groups = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    ids = {id(parameter) for parameter in groups[0.1]}
    assert ids == {id(named[name]) for name in names if name in named}
    assert len(groups[0.1]) + len(groups[0.0]) == len(named)


def test_without_a_gradient_a_step_multiplies_weights_by_1_minus_lr_times_decay_and_no_bias():
    layer = torch.nn.Linear(3, 2).double()
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    optimizer = optimizers.make_optimizer(layer, settings(weight_decay=0.5), CPU)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(layer.weight, before["weight"] * (1 - 0.1 * 0.5), rtol=1e-15)
    assert torch.equal(layer.bias, before["bias"])


def test_two_steps_of_adamw_and_rmsprop_are_the_formulas():
    gradients = torch.tensor([[0.5, -2.0]]), torch.tensor([[1.0, 0.25]])
    options = {"adam_beta1": 0.6, "adam_beta2": 0.7, "adam_eps": 0.01, "lr": 0.1}
    ends = {}
    for name in optimizers.MOMENTS:
        layer = torch.nn.Linear(2, 1, bias=False)
        layer.weight.data.zero_()
        optimizer = optimizers.make_optimizer(layer, settings(optimizer=name, **options), CPU)
        for gradient in gradients:
            layer.weight.grad = gradient.clone()
            optimizer.step()
        ends[name] = layer.weight.detach()

    mean, square, adamw, rms, rmsprop = (torch.zeros(1, 2) for _ in range(5))
    for k, gradient in enumerate(gradients, 1):
        mean = 0.6 * mean + 0.4 * gradient
        square = 0.7 * square + 0.3 * gradient ** 2
        scale = (square / (1 - 0.7 ** k)).sqrt() + 0.01
        adamw = adamw - 0.1 * mean / (1 - 0.6 ** k) / scale
        rms = 0.99 * rms + 0.01 * gradient ** 2
        rmsprop = rmsprop - 0.1 * gradient / (rms.sqrt() + 1e-8)
    assert torch.allclose(ends["adamw"], adamw, rtol=1e-5)
    assert torch.allclose(ends["rmsprop"], rmsprop, rtol=1e-5)


@pytest.mark.parametrize("flags", [
    {"optimizer": "rmsprop"},
    {"optimizer": "rmsprop", "lora_rank": 2, "lr_schedule": "cosine", "min_lr": 1e-3},
    {"weight_decay": 0.5, "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_eps": 1e-3},
    {"weight_decay": 0.5, "lora_rank": 2, "dora": True},
], ids=str)
def test_a_run_resumes_bit_for_bit(fit, flags):
    whole, _ = fit(**STEPS, **flags, out="whole", warmup_steps=3)
    out, _ = fit(**STEPS, **flags, warmup_steps=3)
    resume(unfinished(out))
    assert not differences(whole, out)


def test_rmsprop_keeps_half_of_adamws_memory_and_the_printed_size_says_so(fit, capsys):
    printed, stored = [], []
    for name in optimizers.MOMENTS:
        out, _ = fit(max_steps=3, save_every=2, optimizer=name, out=name)
        printed.append(float(re.search("optimizer ([0-9.]+) MiB", capsys.readouterr().out)[1]))
        file, = (out / "checkpoint-2" / "optimizer").glob("*.safetensors")
        stored.append(sum(tensor.numel() for tensor in load_file(file).values()))
    assert printed[0] == pytest.approx(2 * printed[1], abs=0.15)
    assert stored[0] == pytest.approx(2 * stored[1], rel=0.01)  # and a step count of each


# --- Refused --------------------------------------------------------------------------------------

REAL = ["--model=m", "--dataset=d"]


@pytest.mark.parametrize("arguments, message", [
    (["--optimizer=rmsprop", "--weight_decay=0.1"], "--weight_decay 0.1: is read with --optimizer"),
    (["--optimizer=rmsprop", "--adam_beta1=0.8"], "--adam_beta1 0.8: is read with --optimizer"),
    (["--optimizer=rmsprop", "--adam_beta2=0.8"], "--adam_beta2 0.8: is read with --optimizer"),
    (["--optimizer=rmsprop", "--adam_eps=1"], "--adam_eps 1.0: is read with --optimizer"),
    (["--lr_schedule=constant", "--min_lr=1e-7"], "--min_lr 1e-07: --lr_schedule constant stays"),
    (["--min_lr=1e-6"], "--min_lr 1e-06: is above --lr 5e-07"),
    (["--adam_beta2=1"], "--adam_beta2: must be a number"),
    (["--weight_decay=-1"], "--weight_decay: must be a number"),
    (["--optimizer=sgd"], "invalid choice: 'sgd'"),
    (["--adam_epsilon=1e-6"], "--adam_epsilon: --adam_eps 1e-6"),
])
def test_a_flag_that_the_optimizer_does_not_read_is_refused(arguments, message):
    with pytest.raises(UserError) as error:
        flags.parse_args([*REAL, *arguments])
    assert message in str(error.value)


@pytest.mark.parametrize("name, value", [
    ("optimizer", "rmsprop"), ("weight_decay", 0.5), ("adam_beta1", 0.5), ("min_lr", 1e-3)])
def test_a_resumed_run_may_not_change_its_optimizer(fit, name, value):
    out = unfinished(fit(**STEPS)[0])
    with pytest.raises(UserError, match=f"--{name} {value}: the run in .* may not change"):
        train.main([f"--output_dir={out}", "--resume", f"--{name}={value}"], ALONE)
