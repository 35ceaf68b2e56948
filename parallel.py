"""One process or many: ranks, DDP, FSDP2 and collectives. Nothing else in the project knows how many processes run."""
import datetime
import os
import warnings
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor, DTensor
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


def place(make, ranks: Ranks, parallel: str, dtype: str):
    """make(device) -> the module that computes on this rank.

    ddp     each rank makes a whole module on its device, the ranks of a machine one after another
    fsdp    each rank has a shard of each parameter (FSDP2). Each block, and then the root, gathers
            its parameters for its forward and backward and frees them after it. Rank 0 alone
            reads the weights, into host memory; the other ranks make shapes and receive shards.
    """
    if parallel == "ddp":
        return in_turn(lambda: make(ranks.device), ranks)

    source = make(torch.device("cpu")) if ranks.rank == 0 else None
    module = make(torch.device("meta"))
    kinds = module.model._no_split_modules or ()
    blocks = [block for block in module.modules() if type(block).__name__ in kinds]
    if not blocks:
        raise ValueError(f"--parallel fsdp: {type(module.model).__name__} does not say which of "
                         "its modules are blocks; use ddp")

    # Modules that transformers keeps in fp32 are in fp32 in the source alone
    dtypes = {name: p.dtype for name, p in source.named_parameters()} if source else None
    dtypes = broadcast(dtypes, ranks)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.to(torch.promote_types(parameter.dtype, dtypes[name]))

    # fp32 weights that are trained in bf16 are gathered in bf16. Below an adapter nothing is cast:
    # the frozen base is stored in bf16, and A, B and m keep the fp32 in which autocast reads them,
    # as under ddp. The root of a module that never goes backward is resharded after forward too.
    frozen = not any(parameter.requires_grad for parameter in module.parameters())
    adapted = not frozen and not all(p.requires_grad for p in module.parameters())
    precision = MixedPrecisionPolicy()
    if dtype == "bfloat16" and not adapted:
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mp_policy=precision)
    fully_shard(module, mp_policy=precision, reshard_after_forward=True if frozen else None)

    module.to_empty(device=ranks.device)
    scatter(source, module, dtypes, ranks)
    module.bare_head = broadcast(source and source.bare_head, ranks)
    return module


def in_turn(make, ranks: Ranks):
    """make() on each rank, one rank of a machine at a time, so that a machine's memory has the
    weights on their way to one GPU and not to eight."""
    if ranks.size == 1:
        return make()
    local_rank = int(os.environ.get("LOCAL_RANK", ranks.rank))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", ranks.size))
    made = None
    for turn in range(max(gather(local_size, ranks))):
        if turn == local_rank:
            made = make()
        barrier(ranks)
    return made


@torch.no_grad()
def scatter(source, module, dtypes, ranks: Ranks):
    """Fill a sharded module with the values of rank 0's `source`, one parameter at a time.

    A parameter is sent in the dtype of `source`, and each rank gets its shard alone and converts
    it on its device.
    """
    for name, parameter in module.named_parameters():
        full = torch.empty(parameter.shape, dtype=dtypes[name], device=ranks.device)
        if source:
            full.copy_(source.get_parameter(name))
        part = distribute_tensor(full, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(part.to_local())
    for name, buffer in module.named_buffers():  # also those that no file has, as inv_freq
        if source:
            buffer.copy_(source.get_buffer(name))
        dist.broadcast(buffer, 0)


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
