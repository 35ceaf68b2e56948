"""One process or many: ranks, DDP, FSDP2 and collectives.

No other file calls torch.distributed, except for the sharded files of a checkpoint. Every function
here also works with one process, where it does nothing.
"""
import datetime
import os
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

# DDP's broadcast_buffers is deprecated since torch 2.13; its replacement is not in 2.11.
warnings.filterwarnings("ignore", ".*broadcast_buffers")


class Ranks(NamedTuple):
    rank: int
    size: int
    device: torch.device


def init_distributed() -> Ranks:
    """Join the group that torchrun started: NCCL on GPUs, gloo on CPUs. Without it: one rank."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    # The others wait while rank 0 tokenizes. torchrun notices at once when a process dies.
    patience = datetime.timedelta(hours=2)
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=patience, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=patience)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def place(make, ranks, parallel, dtype):
    """make(device) -> the module that computes: for ddp a whole one on each rank's device, for fsdp each rank's shard of it.

    FSDP2: each block and then the root gather their weights for their turn and drop them after it. Rank 0 alone reads the values, into host
    memory; all ranks make the shapes, and are sent their shards.
    """
    if parallel == "ddp":
        return make(ranks.device)
    source, module = make(torch.device("cpu")) if ranks.rank == 0 else None, make(torch.device("meta"))
    kinds = module.model._no_split_modules or ()
    blocks = [block for block in module.modules() if type(block).__name__ in kinds]
    if not blocks:
        raise ValueError(f"--parallel fsdp: {type(module.model).__name__} does not say which of its modules are blocks; use ddp")
    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False) if dtype == "bfloat16" else MixedPrecisionPolicy()
    for part in (*blocks, module):
        fully_shard(part, mp_policy=precision)
    module.to_empty(device=ranks.device)
    set_model_state_dict(module, source.state_dict() if source else {}, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in module.named_buffers():  # those that no file holds, such as a rotary embedding's frequencies
        dist.broadcast(buffer.copy_(source.get_buffer(name)) if source else buffer, 0)
    module.bare_head = broadcast(source and source.bare_head, ranks)
    return module


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded parameter or gradient. A collective: all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this rank stores."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def wrap(module: torch.nn.Module, ranks: Ranks) -> torch.nn.Module:
    """Wrap in DDP, which averages gradients over the ranks in backward; FSDP does so by itself."""
    if ranks.size == 1 or isinstance(module, FSDPModule):
        return module
    # Without device_ids: DDP would copy the labels to the GPU.
    return DDP(module, gradient_as_bucket_view=True, broadcast_buffers=False)


def bare(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside DDP's wrapper, if it has one."""
    return module.module if isinstance(module, DDP) else module


def sync_gradients(module: torch.nn.Module, on: bool) -> None:
    """Set whether the next backward averages gradients: the last of an optimizer step has to."""
    if isinstance(module, DDP):
        module.require_backward_grad_sync = on
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(on)


def reset_shards(module: torch.nn.Module) -> None:
    """Bring FSDP back to its state before a forward or backward that an exception cut short.

    After the exception the modules keep their gathered weights and FSDP believes that it is still
    inside a forward. Without this reset, model.parameters() returns the gathered tensors, which no
    later step shards again, and an optimizer step changes weights that nothing reads.
    """
    if not isinstance(module, FSDPModule):
        return
    if hasattr(module, "reset_iter_state"):  # torch 2.13
        module.reset_iter_state()
        return
    state = module._get_fsdp_state()
    state._lazy_init()
    state._comm_ctx.all_gather_state = None
    state._state_ctx.iter_forward_root = None
    state._root_post_backward_final_callback()


def clip_gradients(module: torch.nn.Module, max_norm: float) -> torch.Tensor:
    """Scale the gradients to at most max_norm, over all ranks -> their norm before, shape ().

    The norm stays on the device, so that a GPU does not have to be waited for here.
    """
    trained = [parameter for parameter in module.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in trained]
    norm = whole(torch.nn.utils.get_total_norm(gradients))
    torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm


def sum_over_ranks(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Sum a tensor over the ranks, in place. It must be on ranks.device: NCCL takes no others."""
    if ranks.size > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(value: Any, ranks: Ranks) -> Any:
    """Rank 0's value, on every rank. Any object that pickle can copy."""
    box = [value]
    if ranks.size > 1:
        dist.broadcast_object_list(box)
    return box[0]


def gather(value: Any, ranks: Ranks) -> list:
    """The values of all ranks, on every rank."""
    box = [value] * ranks.size
    if ranks.size > 1:
        dist.all_gather_object(box, value)
    return box


def first_reason(reason: str | None, ranks: Ranks) -> str | None:
    """The reason of the lowest rank that has one, on every rank; None where no rank has one."""
    for found in gather(reason, ranks):
        if found is not None:
            return found
    return None


def barrier(ranks: Ranks) -> None:
    if ranks.size > 1:
        dist.barrier()


def leave_distributed(ranks: Ranks) -> None:
    """Wait for all ranks, then close the connections: gloo may abort if one closes them early."""
    if ranks.size > 1:
        dist.barrier()
        dist.destroy_process_group()
