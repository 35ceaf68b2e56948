"""The optimizer and the schedule of its learning rate, from the flags.

    optimizer = make_optimizer(model, args, device)
    scheduler = make_schedule(optimizer, args, warmup=100, steps=1000)
    optimizer.step(); scheduler.step()

A schedule multiplies --lr by a factor. Step k of a warm-up of W steps has the factor k / (W + 1),
so the first step moves the weights, and step W + 1 has the whole --lr. For W = 2, 6 steps and the
linear schedule, the factors are 1/3, 2/3, 1, 3/4, 2/4, 1/4.
"""
import functools
import math
from argparse import Namespace

import torch
from torch.optim.lr_scheduler import LambdaLR

from errors import UserError

# The tensors as large as the weights that each optimizer keeps.
MOMENTS = {"adamw": 2, "rmsprop": 1}


def make_optimizer(model: torch.nn.Module, args: Namespace,
                   device: torch.device) -> torch.optim.Optimizer:
    """Make the optimizer of all trainable parameters.

    RMSprop has torch's defaults, as in the code of the DPO paper: alpha 0.99, no momentum.
    """
    decayed, others = split_by_decay(model)
    if not decayed and not others:
        raise UserError("the policy has no trainable parameter: every one is frozen")
    if args.optimizer == "rmsprop":
        return torch.optim.RMSprop(decayed + others, lr=args.lr)
    groups = [{"params": decayed, "weight_decay": args.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    betas = args.adam_beta1, args.adam_beta2
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=args.lr, betas=betas, eps=args.adam_eps, fused=fused)


def start_moments(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its moments before the first step, zeros as torch would. A vision tower
    has no gradient in a step without images, and a checkpoint has the moments of all parameters."""
    names = ("exp_avg", "exp_avg_sq")
    if isinstance(optimizer, torch.optim.RMSprop):
        names = ("square_avg",)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            device = parameter.device if group.get("fused") else "cpu"
            state = {"step": torch.zeros((), device=device)}
            state |= {name: torch.zeros_like(parameter) for name in names}
            optimizer.state[parameter] = state


def split_by_decay(model: torch.nn.Module) -> tuple[list, list]:
    """Split the trainable parameters into those with weight decay and the others, which are biases
    and the weights of norms, as in transformers' Trainer."""
    decayed, others = {}, {}  # id: parameter, because a tied weight has several names
    for module in model.modules():
        is_norm = type(module).__name__.endswith("Norm")
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            exempt = is_norm or "bias" in name
            (others if exempt else decayed)[id(parameter)] = parameter
    return list(decayed.values()), list(others.values())


def linear_decay(progress: float) -> float:
    return 1 - progress


def cosine_decay(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


def no_decay(progress: float) -> float:
    return 1.0


# --lr_schedule: the factor after the warm-up. Progress is 0 at its end and 1 after the last step.
SCHEDULES = {"linear": linear_decay, "cosine": cosine_decay, "constant": no_decay}


def learning_rate_factor(done: int, schedule: str, warmup: int, steps: int,
                         lowest: float = 0.0) -> float:
    """The factor of the step after `done` steps. `lowest` is --min_lr / --lr, where decay ends."""
    if done < warmup:
        return (done + 1) / (warmup + 1)
    progress = min(1.0, (done - warmup) / max(1, steps - warmup))
    return lowest + (1 - lowest) * SCHEDULES[schedule](progress)


def make_schedule(optimizer: torch.optim.Optimizer, args: Namespace, warmup: int,
                  steps: int) -> LambdaLR:
    """Make the scheduler of --lr_schedule for a run of `steps` steps."""
    factor = functools.partial(learning_rate_factor, schedule=args.lr_schedule, warmup=warmup,
                               steps=steps, lowest=args.min_lr / args.lr)
    return LambdaLR(optimizer, factor)
