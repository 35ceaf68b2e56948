"""Runs a model on one process or many: ranks, DDP, FSDP2 and collectives.

No other file calls torch.distributed, except for the sharded files of a checkpoint. Every function
here also works with one process, where it does nothing.
"""
import argparse
import datetime
import os
import pathlib
import sys
import warnings
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP

from errors import UserError, reading
from ranges import whole_number
from streams import ended_by_ctrl_c

# DDP's broadcast_buffers is deprecated since torch 2.13; its replacement is not in 2.11.
warnings.filterwarnings("ignore", ".*broadcast_buffers")


class Ranks(NamedTuple):
    rank: int
    size: int
    device: torch.device


# How long the ranks wait for each other. At the start every rank has only to import torch, which
# may take minutes on a cold disk. Later the other ranks wait while rank 0 tokenizes, evaluates the
# world or writes, which may take longer on large data. A process that has died is found at once: by
# torchrun, or by gloo as a closed connection.
START_SECONDS = 600
STEP_SECONDS = 7200

ALONE_OR_TORCHRUN = (
    "start all processes with torchrun, or unset RANK and WORLD_SIZE to run one process")


def init_distributed() -> Ranks:
    """Join the group that torchrun started: NCCL on GPUs, gloo on CPUs. Without it: one rank."""
    rank, size = read_launch()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = choose_gpu(size)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    if size == 1:
        warn_of_tasks()
        return Ranks(0, 1, device)
    with ended_by_ctrl_c():
        store = join_store(rank, size)
        options = {"timeout": datetime.timedelta(seconds=STEP_SECONDS)}
        if device.type == "cuda":
            options["device_id"] = device
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, **options)
    return Ranks(rank, size, device)


def read_launch() -> tuple[int, int]:
    """Read the rank and the number of ranks from the environment variables of torchrun. Variables
    that are empty count as unset, and WORLD_SIZE=1 as a run of one process."""
    rank, size = read_variable("RANK"), read_variable("WORLD_SIZE", ">= 1")
    if rank is None and size in (None, 1):
        return 0, 1
    if rank is None:
        raise UserError(f"WORLD_SIZE={size} is set, but RANK is not: {ALONE_OR_TORCHRUN}")
    if size is None:
        raise UserError(f"RANK={rank} is set, but WORLD_SIZE is not: {ALONE_OR_TORCHRUN}")
    if rank >= size:
        raise UserError(f"RANK={rank}: must be below WORLD_SIZE={size}; {ALONE_OR_TORCHRUN}")
    local_rank, local_size = read_variable("LOCAL_RANK"), read_variable("LOCAL_WORLD_SIZE", ">= 1")
    if local_rank is not None and local_rank >= (local_size or size):
        raise UserError(f"LOCAL_RANK={local_rank}: must be below the number of processes of this "
                        f"machine, LOCAL_WORLD_SIZE={local_size or size}; {ALONE_OR_TORCHRUN}")
    return rank, size


def warn_of_tasks() -> None:
    """Print a line if a cluster started several tasks, of which each will be a run of its own."""
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        count = os.environ.get(name, "")
        if count.isdecimal() and int(count) > 1 and not os.environ.get("RANK"):
            print(f"{name}={count}, but RANK is not set: each of these tasks is a run of its own. "
                  "For one run on all of them, start torchrun once on each machine",
                  file=sys.stderr)


def read_variable(name: str, allowed: str = ">= 0") -> int | None:
    """Read a whole number from an environment variable; None if it is not set."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    try:
        return whole_number(allowed)(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name} (environment variable): {error}; {ALONE_OR_TORCHRUN}") from None


def choose_gpu(size: int) -> torch.device:
    """Return the GPU of this rank, whose number is LOCAL_RANK."""
    local_rank, count = read_variable("LOCAL_RANK"), torch.cuda.device_count()
    if local_rank is None and size > 1:
        raise UserError("LOCAL_RANK is not set: set it to this process's GPU number on its "
                        "machine, or start with torchrun")
    local_rank = local_rank or 0
    if local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        limit = f" in CUDA_VISIBLE_DEVICES={visible}" if visible else ""
        raise UserError(f"LOCAL_RANK={local_rank}: this process sees {count} GPUs{limit}; start at "
                        f"most {count} processes here, as in torchrun --nproc_per_node {count}, "
                        "or let each process see all GPUs")
    return torch.device("cuda", local_rank)


def join_store(rank: int, size: int) -> dist.Store:
    """Connect to rank 0, or to torchrun, and wait until every rank has done so.

    dist.init_process_group alone would wait as long as for a later step, and would not say which
    ranks are missing.
    """
    address, port = os.environ.get("MASTER_ADDR", "").strip(), read_variable("MASTER_PORT", ">= 1")
    if not address or not port or port >= 2**16:
        raise UserError(f"MASTER_ADDR={address} MASTER_PORT={port or ''}: must be the address of "
                        f"rank 0 and a port from 1 to 65535; {ALONE_OR_TORCHRUN}")
    timeout = datetime.timedelta(seconds=START_SECONDS)
    # torchrun has a store of its own, and counts its restarts of all ranks.
    is_master = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    advice = "; is rank 0 running there?"
    if is_master:
        advice = "; if another program has this port, choose another MASTER_PORT"
    with reading(f"MASTER_ADDR={address} MASTER_PORT={port}", advice):
        store = dist.TCPStore(address, port, size, is_master, timeout, wait_for_workers=False)
        store = dist.PrefixStore(f"start {attempt}", store)
        wait_for_ranks(store, rank, size, timeout)
    return store


def wait_for_ranks(store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
    """Wait until every rank has called this function, or raise and name the missing ranks."""
    if store.add(f"rank {rank}", 1) > 1:
        raise UserError(f"RANK={rank}: another process has the same RANK; {ALONE_OR_TORCHRUN}")
    names = [f"rank {other}" for other in range(size)]
    try:
        store.wait(names, timeout)
    except dist.DistStoreError:
        missing = [name for name in names if not store.check([name])]
        raise UserError(f"{', '.join(missing)} of {size} did not start within {START_SECONDS} "
                        "seconds; the output of these processes may say why") from None


def free_cores() -> float:
    """Estimate how many cores of this machine are idle: those that this process may use, less the
    load that other processes cause."""
    if not hasattr(os, "sched_getaffinity"):  # only Linux has both
        return float(os.cpu_count() or 1)
    cores = len(os.sched_getaffinity(0))
    quota = pathlib.Path("/sys/fs/cgroup/cpu.max")  # of a container
    if quota.exists():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, int(limit) / int(period))
    return cores - os.getloadavg()[0] * cores / (os.cpu_count() or 1)


def crowded_line(ranks: Ranks) -> str:
    """Return a line if the threads of this machine's ranks outnumber its idle cores, else ""."""
    if ranks.device.type != "cpu" or torch.get_num_threads() == 1:
        return ""
    local_size = read_variable("LOCAL_WORLD_SIZE", ">= 1") or ranks.size
    threads = local_size * torch.get_num_threads()
    free = max(0.0, free_cores())
    # A load average is rough: a few threads more than idle cores are no reason for a line.
    if threads <= 1.25 * free + 0.5:
        return ""
    return (f"this machine is busy: {threads} threads for about {free:.1f} idle cores; fewer may "
            "be faster, because threads wait for each other: OMP_NUM_THREADS=1")


def build_on_ranks(make, ranks: Ranks, parallel: str, dtype: str):
    """Build the module of this rank by make(device), under fsdp also by make(device, unreached)
    with the parts of the model that text does not reach.

    ddp     each rank makes a whole module on its device, the ranks of a machine one after another
    fsdp    each rank has a shard of each parameter (FSDP2). Each block, and then the root, gathers
            its parameters for its forward and backward and frees them afterwards. Only rank 0
            reads the weights, into host memory. Every rank makes the module without values, on
            "meta", and receives its shards.
    """
    if parallel == "ddp":
        return in_turn(lambda: make(ranks.device), ranks)

    source = make(torch.device("cpu")) if ranks.rank == 0 else None
    # A module without values cannot try which parts text reaches, so send the result of the source.
    unreached = broadcast(source and getattr(source.model, "unreached", []), ranks)
    module = make(torch.device("meta"), unreached) if unreached else make(torch.device("meta"))
    kinds = module.model._no_split_modules or ()
    blocks = {}
    for name, block in module.model.named_modules():
        if type(block).__name__ in kinds:
            blocks[name] = block
    if not blocks:
        raise UserError(f"--parallel fsdp: {type(module.model).__name__} does not say which of "
                        "its modules are blocks; use ddp")

    # transformers keeps some modules in fp32. Only the source shows which, so send its dtypes.
    dtypes = {name: p.dtype for name, p in source.named_parameters()} if source else None
    dtypes = broadcast(dtypes, ranks)
    for name, parameter in module.named_parameters():
        parameter.data = parameter.to(torch.promote_types(parameter.dtype, dtypes[name]))

    # In a bf16 run FSDP gathers fp32 weights in bf16. With an adapter it casts nothing: the frozen
    # base is stored in bf16, and A, B and m stay fp32 for autocast, as under ddp. The root of a
    # frozen module is resharded after its forward too, because no backward follows.
    frozen = not any(parameter.requires_grad for parameter in module.parameters())
    fixed = [name for name, p in module.model.named_parameters() if not p.requires_grad]
    parts = tuple(f"{part}." for part in unreached)
    adapted = not frozen and not all(f"{name}.".startswith(parts) for name in fixed)
    precision = MixedPrecisionPolicy()
    if dtype == "bfloat16" and not adapted:
        precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # FSDP would fail in backward at a block in mixed precision that no forward has gathered.
    for name, block in blocks.items():
        reached = not f"{name}.".startswith(parts)
        fully_shard(block, mp_policy=precision if reached else MixedPrecisionPolicy())
    fully_shard(module, mp_policy=precision, reshard_after_forward=True if frozen else None)

    module.to_empty(device=ranks.device)
    scatter(source, module, dtypes, ranks)
    module.bare_head = broadcast(source and source.bare_head, ranks)
    # Only the source has had all values at once.
    module.model.base_fingerprint = broadcast(
        source and getattr(source.model, "base_fingerprint", None), ranks)
    return module


def in_turn(make, ranks: Ranks):
    """Call make() on each rank, one rank of a machine at a time, so that host memory has
    one model on its way to a GPU, not one per GPU."""
    if ranks.size == 1:
        return make()
    local_rank = read_variable("LOCAL_RANK")
    if local_rank is None:
        local_rank = ranks.rank
    local_size = read_variable("LOCAL_WORLD_SIZE", ">= 1") or ranks.size
    made = None
    for turn in range(max(gather(local_size, ranks))):
        if turn == local_rank:
            made = make()
        barrier(ranks)
    return made


@torch.no_grad()
def scatter(source, module, dtypes, ranks: Ranks):
    """Fill a sharded module with the values of rank 0's `source`, one parameter at a time.

    A parameter is sent in the dtype of `source`. Each rank receives only its own shard and converts
    the shard on its device.
    """
    for name, parameter in module.named_parameters():
        full = torch.empty(parameter.shape, dtype=dtypes[name], device=ranks.device)
        if source:
            full.copy_(source.get_parameter(name))
        part = distribute_tensor(full, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(part.to_local())
    for name, buffer in module.named_buffers():  # also buffers that are in no file: inv_freq
        if source:
            buffer.copy_(source.get_buffer(name))
        dist.broadcast(buffer, 0)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather the full tensor of a sharded parameter or gradient. All ranks must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this rank stores."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def wrap(module: torch.nn.Module, ranks: Ranks, some_unused=False) -> torch.nn.Module:
    """Wrap a module in DDP, which averages gradients over the ranks in backward. FSDP averages them
    without a wrapper. some_unused: a forward may leave out a part of the trained weights."""
    if ranks.size == 1 or isinstance(module, FSDPModule):
        return module
    # Without device_ids: DDP would copy the labels to the GPU.
    return DDP(module, gradient_as_bucket_view=True, broadcast_buffers=False,
               find_unused_parameters=some_unused)


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside DDP's wrapper, or a module without wrapper as it is."""
    return module.module if isinstance(module, DDP) else module


def sync_gradients(module: torch.nn.Module, on: bool) -> None:
    """Set whether the next backward averages gradients over ranks. Only the last backward of an
    optimizer step needs the average."""
    if isinstance(module, DDP):
        module.require_backward_grad_sync = on
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(on)


def reset_shards(module: torch.nn.Module) -> None:
    """Bring FSDP back to its state before a forward or backward that raised an exception.

    After the exception the modules keep their gathered weights and FSDP believes that it is still
    inside a forward. Without this reset, model.parameters() returns the gathered tensors, which no
    later step shards again, and an optimizer step changes weights that nothing reads.
    """
    if not isinstance(module, FSDPModule):
        return
    state = module._get_fsdp_state()
    state._lazy_init()  # there may have been no forward yet
    if hasattr(module, "reset_iter_state"):  # torch 2.13
        module.reset_iter_state()
        return
    state._comm_ctx.all_gather_state = None
    state._state_ctx.iter_forward_root = None
    state._root_post_backward_final_callback()


def reshard(module: torch.nn.Module) -> None:
    """Under FSDP, make model.parameters() the shards that are trained. After a forward without a
    backward, the root has its gathered weights in their place. Its blocks never do."""
    if isinstance(module, FSDPModule):
        module.reshard()


def sum_over_ranks(tensor: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """Sum a tensor over the ranks, in place. It must be on ranks.device: NCCL takes no others."""
    if ranks.size > 1:
        dist.all_reduce(tensor)
    return tensor


def broadcast(value: Any, ranks: Ranks) -> Any:
    """Return rank 0's value on every rank. The value may be any object that pickle can copy."""
    values = [value]
    if ranks.size > 1:
        dist.broadcast_object_list(values)
    return values[0]


def gather(value: Any, ranks: Ranks) -> list:
    """Return the list of all ranks' values on every rank."""
    values = [value] * ranks.size
    if ranks.size > 1:
        dist.all_gather_object(values, value)
    return values


def first_reason(reason: str | None, ranks: Ranks) -> str | None:
    """Return on every rank the reason of the lowest rank that has one; None if no rank has one."""
    for rank_reason in gather(reason, ranks):
        if rank_reason is not None:
            return rank_reason
    return None


def barrier(ranks: Ranks) -> None:
    """Wait until every rank has called this function."""
    if ranks.size > 1:
        dist.barrier()


def leave_distributed(ranks: Ranks) -> None:
    """Wait for all ranks, then close the connections: gloo may abort if one closes them early."""
    if ranks.size > 1:
        with ended_by_ctrl_c():  # nothing is left to save
            dist.barrier()
            dist.destroy_process_group()
