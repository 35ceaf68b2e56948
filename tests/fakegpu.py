"""Run train.main on a pretended GPU, and write down what a real one would refuse or wait for.

    python tests/fakegpu.py CASES.json OUT.json

CASES.json is a list of {"name", "flags"}, the command line of a run; "interrupt": the number of
updates after which SIGTERM arrives; "device": "cpu" for a run to compare with. OUT.json is a list
of {"name", "error", "printed", "events"}; see `Recorder.note` for an event.

A GpuTensor reports the device cuda:0 and keeps its values in a CPU tensor. Autograd and autocast
treat it as any CUDA tensor. Below them, each operator reaches `Recorder.run`, which checks the
devices and dtypes, notes whether the CPU would wait, computes on the CPU tensors and wraps the
result. So the values are real: the trainer's own checks pass or fail as they would, and a run can
be compared with one on the CPU. Times, memory and the rounding of CUDA kernels are not simulated.

Not seen: copies made in other threads, CUDA calls that are no operators of tensors, and whatever
asks `torch.cuda.is_available()`, which stays false. A process that has loaded this file is not fit
for anything else, hence the command line.
"""
import collections
import contextlib
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import traceback
import weakref

ROOT = pathlib.Path(__file__).resolve().parent.parent


def build_library() -> str:
    """Compile fakegpu.cpp for the installed torch, once for each version of both -> its path."""
    source = pathlib.Path(__file__).with_suffix(".cpp")
    version = importlib.metadata.version("torch")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:12]
    folder = pathlib.Path(tempfile.gettempdir()) / f"fakegpu-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{version}-{digest}.so"
    if not library.exists():
        # find_spec does not import torch, which must not happen before the library is loaded
        torch_home = importlib.util.find_spec("torch").submodule_search_locations[0]
        aside = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-O0", "-shared", "-fPIC", "-std=c++20", f"-I{torch_home}/include"]
        command += [str(source), "-o", str(aside), f"-L{torch_home}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run([*command, f"-Wl,-rpath,{torch_home}/lib"], check=True)
        os.replace(aside, library)
    return str(library)


LIBRARY = ctypes.CDLL(build_library(), mode=ctypes.RTLD_GLOBAL)
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

LIBRARY.install_guard()
aten = torch.ops.aten
GPU = torch.device("cuda", 0)
HALF = (torch.bfloat16, torch.float16)


# --- The tensor -----------------------------------------------------------------------------------

class GpuTensor(torch.Tensor):
    """A tensor on cuda:0. Its values are those of the CPU tensor `values`, of the same layout."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device=GPU)
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """In threads without the recorder's dispatch mode, such as those of a checkpoint."""
        return recorder.run(func, args, kwargs or {})

    def tolist(self):
        """Torch refuses this for subclasses."""
        recorder.note("sync", "tolist")
        return self.values.tolist()

    def __format__(self, specification):
        """Torch does this for its own class alone."""
        return format(self.item(), specification)

    def __repr__(self, **options):
        return f"GpuTensor({self.values})"


def on_gpu(value) -> bool:
    return isinstance(value, GpuTensor)


def map_values(change, value):
    """change(value), or of each element of lists and tuples, as operators take and return them."""
    if isinstance(value, (list, tuple)):
        return type(value)([map_values(change, x) for x in value])
    return change(value)


def is_gpu(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


# --- What waits, and what is refused --------------------------------------------------------------

# The result of these has a size or a value that the CPU has to know.
SYNCHRONIZING = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::allclose",
    "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::bincount", "aten::multinomial",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::mv"}
COPIES = {"aten::copy_", "aten::_to_copy"}


class Recorder(TorchDispatchMode):
    """Run every operator of the process, and count what happened by kind, time and place."""

    def __init__(self):
        super().__init__()
        self.start()

    def start(self, interrupt=None):
        self.events = collections.Counter()
        self.masks = {}  # id -> weak reference to each that an operator of this run has read
        self.updates = 0
        self.interrupt = interrupt
        self.pinned = {}  # address -> storage, which is kept so that no other gets its address

    def note(self, kind, operation):
        """Count an event by kind, optimizer updates before it, operator and source lines.

        mixed devices, mixed dtypes, kernel   a GPU would raise an error
        sync                                  the CPU waits until the GPU has done all its work
        blocking copy                         CPU to GPU, from memory that is not pinned
        async copy                            CPU to GPU, from pinned memory
        flash, sdpa                           a call of an attention kernel
        mask                                  a bool matrix that outlives the layer or the step
        """
        self.events[kind, self.updates, operation, source_lines()] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        """Check an operator, compute it on the CPU and wrap what it returns."""
        tensors = []

        def unwrap(value):
            if isinstance(value, torch.Tensor):
                tensors.append(value)
            return value.values if on_gpu(value) else value

        plain_args = map_values(unwrap, args)
        plain_kwargs = {name: map_values(unwrap, value) for name, value in kwargs.items()}
        wrappers = {id(x.values): x for x in tensors if on_gpu(x)}
        to_gpu = bool(wrappers)
        if kwargs.get("device") is not None:
            to_gpu = is_gpu(kwargs["device"])
            plain_kwargs["device"] = "cpu"
        if not wrappers and not to_gpu:
            return func(*args, **kwargs)

        self.check(func, args, kwargs, tensors)
        compute = EMULATED.get(str(func), func)
        result = compute(*plain_args, **plain_kwargs)

        def wrap(value):
            if type(value) is not torch.Tensor:
                return value
            # an operator that works in place returns its argument, which has its wrapper already
            wrapper = wrappers.get(id(value))
            if wrapper is None:
                return GpuTensor(value) if to_gpu else value
            if wrapper.shape != value.shape:
                raise NotImplementedError(f"{func} changes the shape of its argument")
            return wrapper

        return map_values(wrap, result)

    def check(self, func, args, kwargs, tensors):
        """Note what a GPU would do with this operator besides computing it."""
        name = func._schema.name
        on_cpu = [x for x in tensors if not on_gpu(x)]
        for mask in filter(is_mask, tensors):
            self.masks[id(mask)] = weakref.ref(mask)
        repeats = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        if name in SYNCHRONIZING or repeats:
            self.note("sync", name)
        elif name in COPIES:
            self.check_copy(name, args, kwargs)
        elif name in INDEXING:
            self.check_indices(name, args, on_cpu)
        elif on_cpu and not takes_cpu_scalars(func, on_cpu):
            self.note("mixed devices", f"{name} of {describe(tensors)}")
        elif name in PRODUCTS:
            self.check_product(func, args, tensors)

    def check_copy(self, name, args, kwargs):
        if name == "aten::copy_":
            target, source = args[0].device, args[1]
            non_blocking = len(args) > 2 and args[2]
        else:
            target, source = kwargs.get("device") or args[0].device, args[0]
            non_blocking = kwargs.get("non_blocking")
        if not is_gpu(target):
            self.note("sync", f"{name} to the CPU")
        elif not on_gpu(source):
            unblocked = non_blocking and is_pinned(source)
            self.note("async copy" if unblocked else "blocking copy", name)

    def check_indices(self, name, args, on_cpu):
        """A bool index is a nonzero(), but for `x[mask] = number`; one on the CPU is copied."""
        indices = [x for x in args[1] if x is not None]
        fills = name != "aten::index" and args[2].numel() == 1
        for index in indices:
            if not on_gpu(index):
                self.note("blocking copy", f"{name} by an index on the CPU")
            elif index.dtype == torch.bool and not fills:
                self.note("sync", f"{name} by a bool index")
        values = [x for x in on_cpu if all(x is not index for index in indices)]
        if any(x.dim() > 0 for x in values):
            self.note("mixed devices", f"{name} of {describe([args[0], *on_cpu])}")

    def check_product(self, func, args, tensors):
        """All of one dtype; the overloads with an out_dtype may add and return another."""
        name = func._schema.name
        if func._overloadname.startswith("dtype"):
            tensors = args[-3:-1]
        if len({x.dtype for x in tensors}) > 1:
            self.note("mixed dtypes", f"{name} of {describe(tensors)}")

    def after_update(self, optimizer, args, kwargs):
        """A hook of every optimizer: the events that follow belong to the next step."""
        # To load an optimizer's state, torch first makes one by a step with zero gradients.
        callers = [frame.filename for frame in traceback.extract_stack()]
        if any("distributed/checkpoint" in name for name in callers):
            return
        self.note_masks("step")
        self.updates += 1
        if self.updates == self.interrupt:
            os.kill(os.getpid(), signal.SIGTERM)

    def after_block(self, module, args, output):
        """A hook of every module: at the end of a block nothing is left of its mask."""
        name = type(module).__name__
        if name.endswith(("Layer", "Block")) and not torch.is_grad_enabled():
            self.note_masks("block")

    def note_masks(self, moment):
        self.masks = {key: mask for key, mask in self.masks.items() if mask() is not None}
        for _ in self.masks:
            self.note("mask", f"a bool matrix at the end of a {moment}")


def takes_cpu_scalars(func, on_cpu) -> bool:
    """Element by element, a CPU tensor without dimensions is a number to a CUDA kernel."""
    elementwise = torch.Tag.pointwise in func.tags or "_foreach" in func._schema.name
    return elementwise and all(x.dim() == 0 for x in on_cpu)


MOST_ANSWERS = 4  # of a list, in the runs of test_cuda.py


def is_mask(tensor) -> bool:
    """Whether it is a bool matrix on the GPU, or several, but no row or column, and not as narrow
    as the table of the answers that exist."""
    if not on_gpu(tensor) or tensor.dtype != torch.bool or tensor.dim() < 2:
        return False
    return tensor.shape[-2] > 1 and tensor.shape[-1] > MOST_ANSWERS


def describe(tensors, most=4) -> str:
    kinds = [f"{x.device.type} {name_of(x.dtype)}" for x in tensors[:most]]
    if len(tensors) > most:
        kinds.append(f"{len(tensors) - most} more")
    return ", ".join(kinds)


def name_of(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def source_lines(most=3) -> str:
    """The innermost lines of the project, or of transformers where they called, that run now."""
    lines = []
    frame = sys._getframe(1)
    while frame is not None and len(lines) < most:
        path = pathlib.PurePath(frame.f_code.co_filename)
        if path.parent == ROOT or "transformers" in path.parts:
            lines.append(f"{path.name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)


# --- Kernels that only CUDA has -------------------------------------------------------------------

def segments(arguments):
    """For each segment of a flash-attention call: rows of queries, rows of keys, who sees whom.

    A query sees `window_size_left` keys before its own and `window_size_right` after it, where
    -1 is no limit; its own key is counted from the end, so the last query stands at the last key.
    """
    left, right = arguments.get("window_size_left"), arguments.get("window_size_right")
    left = -1 if left is None else left
    right = -1 if right is None else right
    if arguments["is_causal"]:
        right = 0
    query_ends = arguments["cum_seq_q"].tolist()
    key_ends = arguments["cum_seq_k"].tolist()
    for i in range(len(query_ends) - 1):
        queries = slice(query_ends[i], query_ends[i + 1])
        keys = slice(key_ends[i], key_ends[i + 1])
        key = torch.arange(keys.stop - keys.start)
        own = torch.arange(queries.stop - queries.start)[:, None]
        own = own + len(key) - len(own)
        visible = torch.ones(len(own), len(key), dtype=torch.bool)
        if left >= 0:
            visible &= key >= own - left
        if right >= 0:
            visible &= key <= own + right
        yield queries, keys, visible


def probabilities(arguments, queries, keys, visible):
    """-> softmax of a segment's scores (heads, queries, keys), their logsumexp, and the scale."""
    query, key = arguments["query"], arguments["key"]
    scale = arguments.get("scale") or query.shape[-1] ** -0.5
    key = key[keys].float().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = scale * torch.einsum("qhd,khd->hqk", query[queries].float(), key)
    scores = scores.masked_fill(~visible, -torch.inf)
    logsumexp = scores.logsumexp(-1)
    return (scores - logsumexp[..., None]).exp().nan_to_num(), logsumexp, scale


def named(func, args, kwargs):
    """Arguments by name: their order is not the same in all versions of torch."""
    return dict(zip([x.name for x in func._schema.arguments], args)) | kwargs


def flash_forward(*args, **kwargs):
    """The values of flash attention over a packed row, in float32 and rounded at the end."""
    arguments = named(aten._flash_attention_forward.default, args, kwargs)
    check_flash(arguments)
    query, value = arguments["query"], arguments["value"]
    out = torch.zeros_like(query)
    logsumexp = torch.zeros(query.shape[1], len(query))
    for queries, keys, visible in segments(arguments):
        weights, logsumexp[:, queries], _ = probabilities(arguments, queries, keys, visible)
        values = value[keys].float().repeat_interleave(query.shape[1] // value.shape[1], 1)
        out[queries] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
    unused = torch.zeros(2, dtype=torch.uint64)
    return out, logsumexp, unused, torch.zeros(0, dtype=torch.uint64), torch.zeros(0)


def flash_backward(*args, **kwargs):
    """dV = Pᵀ dO; dS = P ⊙ (dO Vᵀ − rowsum(dO ⊙ O)); dQ = s dS K; dK = s dSᵀ Q."""
    arguments = named(aten._flash_attention_backward.default, args, kwargs)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    gradients = [torch.zeros_like(x, dtype=torch.float32) for x in (query, key, value)]
    groups = query.shape[1] // key.shape[1]

    def sum_groups(gradient):  # (keys, heads, size) -> (keys, key heads, size)
        return gradient.unflatten(1, (key.shape[1], groups)).sum(2)

    for queries, keys, visible in segments(arguments):
        weights, _, scale = probabilities(arguments, queries, keys, visible)
        q = query[queries].float()
        k, v = (x[keys].float().repeat_interleave(groups, 1) for x in (key, value))
        grad_out = arguments["grad_out"][queries].float()
        delta = (grad_out * arguments["out"][queries].float()).sum(-1).T[..., None]
        of_weights = torch.einsum("qhd,khd->hqk", grad_out, v)
        of_scores = scale * weights * (of_weights - delta)
        gradients[0][queries] += torch.einsum("hqk,khd->qhd", of_scores, k)
        gradients[1][keys] += sum_groups(torch.einsum("hqk,qhd->khd", of_scores, q))
        gradients[2][keys] += sum_groups(torch.einsum("hqk,qhd->khd", weights, grad_out))
    return tuple(gradient.to(query.dtype) for gradient in gradients)


def check_flash(arguments):
    """Note the call, and what the CUDA kernel would refuse (flash_api.cpp, mha_varlen_fwd)."""
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    heads, size = query.shape[-2:]
    key_heads = key.shape[-2]
    recorder.note("flash", f"{name_of(query.dtype)}, {heads}:{key_heads} heads of {size}")
    if len({query.dtype, key.dtype, value.dtype}) > 1 or query.dtype not in HALF:
        recorder.note("kernel", f"dtypes {describe([query, key, value])}")
    if size % 8 or size > 256 or heads % key_heads:
        recorder.note("kernel", f"{heads}:{key_heads} heads of {size}")
    if any(x.dim() != 3 or x.stride(-1) != 1 for x in (query, key, value)):
        recorder.note("kernel", "not (tokens, heads, size) with a contiguous last dimension")
    check_ends("cum_seq_q", arguments["cum_seq_q"], arguments["max_q"], len(query))
    check_ends("cum_seq_k", arguments["cum_seq_k"], arguments["max_k"], len(key))


def check_ends(name, ends, longest, total):
    """The ends of the segments begin with 0, and `longest` bounds the length of each."""
    if ends.dtype != torch.int32 or ends[0] != 0 or ends[-1] != total:
        recorder.note("kernel", f"{name} is {ends.dtype} and ends at {ends[-1]} of {total}")
    if ends.diff().max() > longest:
        recorder.note("kernel", f"{name} has a segment longer than {longest}")


def mm_in(left, right, out_dtype, out=None):
    """A product of half-precision matrices whose result is float32, as it is accumulated."""
    if out is None:
        return left.to(out_dtype) @ right.to(out_dtype)
    return out.copy_(left.to(out_dtype) @ right.to(out_dtype))


def addmm_in(total, left, right, out_dtype, beta=1, alpha=1, out=None):
    result = beta * total.to(out_dtype) + alpha * mm_in(left, right, out_dtype)
    return result if out is None else out.copy_(result)


EMULATED = {
    "aten._flash_attention_forward.default": flash_forward,
    "aten._flash_attention_backward.default": flash_backward,
    "aten.mm.dtype": mm_in,
    "aten.mm.dtype_out": mm_in,
    "aten.addmm.dtype": addmm_in,
    "aten.addmm.dtype_out": addmm_in,
}


# --- Calls that never become an operator ----------------------------------------------------------

def pretend():
    """Patch what torch asks the driver, or does before an operator is dispatched."""
    torch.cuda._lazy_init = lambda: None  # would load the driver
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # or autocast is off
    torch.cuda.get_rng_state = lambda *args: torch.get_rng_state()
    torch.cuda.is_bf16_supported = lambda *args, **kwargs: True  # or autocast refuses bfloat16
    torch.cuda.synchronize = lambda *args: recorder.note("sync", "torch.cuda.synchronize")
    # module.to("cuda") keeps each Parameter object, as on a GPU; else tied weights come apart
    torch.__future__.set_swap_module_params_on_conversion(True)

    # torch.tensor(..., device="cuda") makes a CPU tensor and copies it, by an operator that is seen
    torch._C._set_only_lift_cpu_tensors(True)
    torch.Tensor.pin_memory = pin_memory
    torch.Tensor.is_pinned = is_pinned
    on_cpu = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda query, *args, **kwargs: (
        sdpa if on_gpu(query) else on_cpu)(query, *args, **kwargs)

    register_optimizer_step_post_hook(recorder.after_update)
    torch.nn.modules.module.register_module_forward_hook(recorder.after_block)


def pin_memory(tensor, device=None):
    """A copy whose address is remembered: a build without CUDA has no pinned memory."""
    tensor = tensor.clone()
    storage = tensor.untyped_storage()
    recorder.pinned[storage.data_ptr()] = storage
    return tensor


def is_pinned(tensor, device=None) -> bool:
    return not on_gpu(tensor) and tensor.untyped_storage().data_ptr() in recorder.pinned


def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
         enable_gqa=False):
    """SDPA by the CPU's kernel: to choose among CUDA's, torch would ask the driver."""
    options = {"a mask": attn_mask is not None, "enable_gqa": enable_gqa}
    recorder.note("sdpa", " and ".join(name for name, given in options.items() if given))
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if len({query.dtype, key.dtype, value.dtype}) > 1:
        recorder.note("mixed dtypes", f"SDPA of {describe([query, key, value])}")
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = attn_mask.logical_not()
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(hidden, -torch.inf)
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    attend = aten._scaled_dot_product_flash_attention_for_cpu
    return attend(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]


recorder = Recorder()


# --- The runs -------------------------------------------------------------------------------------

def run_case(case) -> dict:
    """Run train.main once -> its events, what it printed, and the error that ended it."""
    import train
    from parallel import Ranks
    ranks = Ranks(0, 1, torch.device(case.get("device", GPU)))
    error, printed = None, io.StringIO()
    recorder.start(case.get("interrupt"))
    try:
        with recorder, contextlib.redirect_stdout(printed):
            train.main(case["flags"], ranks)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised} at {innermost_lines(raised)}"
    names = ("kind", "updates", "operation", "where")
    events = [dict(zip(names, key)) | {"count": n} for key, n in recorder.events.items()]
    return {"name": case["name"], "error": error, "printed": printed.getvalue(), "events": events}


def innermost_lines(error, most=6) -> str:
    frames = traceback.extract_tb(error.__traceback__)[:-most - 1:-1]
    return " < ".join(f"{pathlib.PurePath(frame.filename).name}:{frame.lineno}" for frame in frames)


def main(cases_path, out_path):
    torch.set_num_threads(1)
    pretend()
    cases = json.loads(pathlib.Path(cases_path).read_text())
    results = [run_case(case) for case in cases]
    pathlib.Path(out_path).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
