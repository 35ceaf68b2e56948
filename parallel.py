"""One process or many: ranks, DDP, FSDP2 and collectives. Nothing else in the project knows how many processes run."""
import datetime
import os
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel as DDP

warnings.filterwarnings("ignore", ".*broadcast_buffers")  # DDP: deprecated since torch 2.13, its replacement is not in 2.11


class Ranks(NamedTuple):
    rank: int
    size: int
    device: torch.device


def init_distributed():
    """Join the group that torchrun started, NCCL on GPUs and gloo on CPUs; without torchrun, be alone."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    patience = datetime.timedelta(hours=2)  # the others wait while rank 0 tokenises; one that dies is missed by torchrun at once
    dist.init_process_group("nccl" if cuda else "gloo", timeout=patience, device_id=device if cuda else None)
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


def whole(tensor):
    """A parameter or gradient as it is without sharding. All ranks must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(tensor):
    """What this rank holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def wrap(module, ranks):
    """Average gradients over the ranks during backward: what is sharded does so by itself."""
    if ranks.size == 1 or isinstance(module, FSDPModule):
        return module
    return DDP(module, gradient_as_bucket_view=True, broadcast_buffers=False)  # without device_ids, which would move labels to the GPU


def sync_gradients(module, on):
    """Whether the next backward talks to the other ranks: only the last of an optimizer step needs to."""
    if isinstance(module, DDP):
        module.require_backward_grad_sync = on
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(on)


def clip_gradients(module, max_norm):
    """Scale the gradients to max_norm where their norm, over all ranks, is above it -> the norm before."""
    trained = [parameter for parameter in module.parameters() if parameter.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm([parameter.grad for parameter in trained]))
    torch.nn.utils.clip_grads_with_norm_(trained, max_norm, norm)
    return norm.item()


def sum_over_ranks(tensor, ranks):
    if ranks.size > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(value, ranks):
    """Rank 0's value, everywhere."""
    box = [value]
    if ranks.size > 1:
        dist.broadcast_object_list(box)
    return box[0]


def gather(value, ranks):
    """Every rank's value, everywhere."""
    box = [value] * ranks.size
    if ranks.size > 1:
        dist.all_gather_object(box, value)
    return box


def barrier(ranks):
    if ranks.size > 1:
        dist.barrier()


def leave_distributed(ranks):
    """All ranks wait for the last before any tears down its connections: gloo may abort otherwise."""
    if ranks.size > 1:
        dist.barrier()
        dist.destroy_process_group()
