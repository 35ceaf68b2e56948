"""The log-probs of dpo.py from rows without padding, each prompt computed once; and log-probs without all logits at once.

    prompt a | chosen a | rejected a | prompt b | chosen b | ...        one flat row for a whole micro-batch, (1, T)

The positions of a rejected answer start again after its prompt, and it does not see the chosen one. The last token of an answer
predicts nothing and is not fed. The hidden state at the end of a prompt predicts the first token of both answers, so it is used twice.

A model is not patched: it is told to use the attention function registered here, which is transformers' own `sdpa` but where the
keyword argument `packed` says how a row is laid out, and hooks in its last block leave out what nothing reads. Whether that is right
for a model is not believed but tried: `can_pack`.

Letters: B pairs, S sides (2, or 1 without rejected answers), T tokens fed, K keys, L tokens of the longest answer, N scored tokens.
"""
import contextlib
import functools
import inspect
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None
if varlen_attn and "enable_gqa" not in inspect.signature(varlen_attn).parameters:  # that of an older torch, which knows no windows either
    varlen_attn = None

IGNORE = -100  # label of a token that is not scored, as everywhere
FULL_LOGITS = 2**27  # so many are kept for backward, 512 MiB in fp32; what is more is made twice
CHUNK = 2**24  # so many are worked on at a time
CACHE = 2**18  # and so many by a CPU
BREAK_EVEN = 150_000  # see is_faster
NAME = "sdpa_or_packed"
INPUTS = ("input_ids", "position_ids", "attention_mask", "packed", "labels", "predictors")  # what `collate` makes


# --- Attention --------------------------------------------------------------------------------------------------------

def segments(packed):
    """((prompt, answer, answer), ...) tokens fed of each pair -> [(first key of the prefix, keys of the prefix, first query, queries)].
    The queries see all of their prefix, and themselves up to their own place. A prompt and its first answer are one segment."""
    found, start = [], 0
    for prompt, first, *others in packed:
        found.append((start, 0, start, prompt + first))
        place = start + prompt + first
        for length in others:
            found += [(start, prompt, place, length)] if length else []
            place += length
        start = place
    return found


@functools.lru_cache(maxsize=2)  # computed for the first layer of a micro-batch
def index_of(packed, device):
    """-> where the keys of all segments stand in the row (K,); how many queries and how many keys each has; the ends of both."""
    found = segments(packed)
    keys = [np.r_[prefix:prefix + length, first:first + count] for prefix, length, first, count in found]
    sizes = [count for *_, count in found], list(map(len, keys))
    ends = [to_device(torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32), device) for x in sizes]
    return to_device(torch.from_numpy(np.concatenate(keys)), device), *sizes, ends


def to_device(tensor, device):
    """Without waiting for what a GPU is doing: only from pinned memory is it so."""
    return (tensor.pin_memory() if tensor.is_cpu and device.type == "cuda" else tensor).to(device, non_blocking=True)


def attention(module, query, key, value, attention_mask, packed=None, **options):
    """query (1, heads, T, size), key and value (1, key heads, T, size) -> (1, T, heads, size), None."""
    if packed is None:
        return AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]:
        raise ValueError(f"its attention has {unknown[0]}")
    index, *sizes = index_of(packed, query.device)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, size)
    key, value = key[index], value[index]  # (K, key heads, size)
    on_gpu = query.is_cuda and varlen_attn and query.dtype in (torch.bfloat16, torch.float16)
    attend = in_one_call if on_gpu else one_by_one
    return attend(query, key, value, *sizes, options.get("scaling"), options.get("sliding_window"))[None], None


def one_by_one(query, key, value, queries, keys, ends, scale, window):
    """A call of SDPA for each segment. `split` and `cat`, since in backward each slice of a row would be as long as the row."""
    groups, out = query.shape[1] // key.shape[1], []
    for q, k, v in zip(query.split(queries), key.split(keys), value.split(keys)):
        mask = visible(len(q), len(k), window, q.device)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))  # (1, heads, tokens, size)
        x = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=groups > 1)
        out.append(x[0].transpose(0, 1))
    return torch.cat(out)  # (T, heads, size)


@functools.lru_cache(maxsize=256)
def visible(queries, keys, window, device):
    """(queries, keys) bool: a query sees its own place, the last that of the last key, and those before it, `window` places in all.
    None where that is what `is_causal` means."""
    if queries == keys and (window is None or window >= keys):
        return None
    own, places = torch.arange(keys - queries, keys, device=device)[:, None], torch.arange(keys, device=device)
    return (places <= own) & (places > own - (window or keys))


def in_one_call(query, key, value, queries, keys, ends, scale, window):
    """All segments in one call. Never run where this was written, which has no GPU: `can_pack` must pass under the run's own autocast."""
    return varlen_attn(query, key, value, *ends, max(queries), max(keys), scale=scale, enable_gqa=query.shape[1] != key.shape[1],
                       window_size=(-1 if window is None else window - 1, 0))  # aligned at the last key, as `visible` is


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])  # where nothing is packed


def enable(model):
    """From now on the model obeys `packed`. For good, since gradient checkpointing asks again in backward; not saved with the model."""
    if model.config._attn_implementation != NAME:
        model.config._attn_implementation = NAME


# --- Batches ----------------------------------------------------------------------------------------------------------

def collate(rows):
    """{column: list of lists} -> the arguments of dpo.SequenceLogps.

    input_ids, position_ids (1, T); packed, see `segments`; attention_mask, of a shape that transformers hands on as it is instead of
    making a (T, T) mask; labels (S B, L), the tokens to score, chosen answers first,
    IGNORE after the end of each; predictors (S B, L), at which of the T tokens they are predicted
    """
    prompts, answers = rows["prompt_ids"], [rows[f"{side}_ids"] for side in ("chosen", "rejected") if f"{side}_ids" in rows]
    fed = [(len(prompt), *(len(answer) - 1 for answer in pair)) for prompt, *pair in zip(prompts, *answers)]
    ids = [part for prompt, *pair in zip(prompts, *answers) for part in (prompt, *(answer[:-1] for answer in pair))]
    positions = [np.arange(prefix, prefix + count) for _, prefix, _, count in segments(tuple(fed))]
    ends = np.cumsum(fed).reshape(len(fed), -1)  # (B, 1 + S), of prompt and answers in the row
    last = np.tile(ends[:, 0] - 1, len(answers))[:, None]  # (S B, 1), of the prompt
    begins, lengths = ends[:, :-1].T.reshape(-1, 1), np.array([len(a) for side in answers for a in side])[:, None]
    rank = np.arange(lengths.max())  # (L,)
    labels = np.full((len(lengths), len(rank)), IGNORE)
    labels[rank < lengths] = np.concatenate([answer for side in answers for answer in side])
    return {"input_ids": torch.tensor([list(itertools.chain(*ids))]), "position_ids": torch.from_numpy(np.concatenate(positions))[None],
            "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool), "packed": tuple(fed),
            "labels": torch.from_numpy(labels),
            "predictors": torch.from_numpy(np.where(rank == 0, last, (begins + rank - 1) * (rank < lengths)))}


def is_faster(prompt, chosen, tokens, size, hidden):
    """Are packed rows faster than padded ones in batches of `size`? By tokens of each row's prompt, chosen answer and whole.

    Packing saves work, about the square of the hidden size for each token and layer, and costs SDPA calls, one for each answer and layer.
    Measured on one CPU core, equal speed at tokens saved a row * hidden²: 90,000 (hidden 64), 180,000 (hidden 128).
    """
    answers = np.stack([chosen, tokens - prompt - chosen])[:, :10_000]
    longest, sides = prompt[:10_000] + answers.max(0), 1 + answers[1].any()
    padded = np.repeat(np.maximum.reduceat(longest, range(0, len(longest), size)), size)[:len(longest)].mean()
    return bool((sides * padded - tokens[:10_000].mean() + sides) * hidden**2 > BREAK_EVEN)


# --- Is it right for this model? --------------------------------------------------------------------------------------

def can_pack(module):
    """None if the model of a dpo.SequenceLogps, which may be sharded, gives packed rows the log-probs they have alone, else why not.

    Tried on a few short rows, under the autocast of the run and without, and with every sliding window shrunk below their length. Each
    answer's log-prob must have its value, and so must its gradient by the token embeddings, which is exactly zero at all other tokens
    however little the model made of them. (Comparing bits instead would miss a leak that rounds to nothing, and refuse mixtures of
    experts, whose bits depend on what else goes to an expert.) The model is left as it was, but for hooks that no padded row wakes.
    """
    model = module.model
    before, device = model.config._attn_implementation, model.device.type
    if before not in ("sdpa", NAME):
        return f"its attention is {before} and not sdpa"
    try:
        for autocast in {False, torch.is_autocast_enabled(device)}:
            with narrow_windows(model, 6), torch.enable_grad(), torch.autocast(device, torch.get_autocast_dtype(device), enabled=autocast):
                if reason := compare(module):
                    return reason
    except Exception as error:  # of the model's code, so of any kind
        return f"it fails on packed rows ({type(error).__name__}: {next(iter(str(error).splitlines()), '')})"
    finally:
        model.config._attn_implementation = before


def compare(module):
    """Packed rows with each row alone -> None or what differs."""
    model = module.model
    random, vocabulary = np.random.default_rng(0), model.get_input_embeddings().num_embeddings
    prompts, *answers = ([random.integers(vocabulary, size=n).tolist() for n in sizes] for sizes in ((9, 1, 5), (7, 4, 1), (10, 1, 8)))
    batch = collate({"prompt_ids": prompts, "chosen_ids": answers[0], "rejected_ids": answers[1]})
    found, embedded, dtype = logps_and_embeddings(module, **batch)
    ends = np.cumsum(batch["packed"]).tolist()
    for i, (side, pair) in enumerate(itertools.product((0, 1), range(3))):
        prompt, answer, end = prompts[pair], answers[side][pair], ends[3 * pair + side + 1]
        start = ends[3 * pair] - len(prompt)
        alone, tokens, _ = logps_and_embeddings(module, torch.tensor([answer]), torch.arange(len(answer))[None] + len(prompt) - 1,
                                             input_ids=torch.tensor([prompt + answer[:-1]]))
        expected = torch.zeros_like(embedded)
        expected[:, np.r_[start:start + len(prompt), end - len(answer) + 1:end]] = torch.autograd.grad(alone.sum(), tokens)[0]
        gradient = torch.autograd.grad(found[i], embedded, retain_graph=True)[0]  # (1, T, H)
        if not torch.equal(gradient.any(-1), expected.any(-1)):
            return "an answer's log-prob depends on other tokens than its own"
        close = max(1e-4, 16 * (2**-10 if embedded.is_cuda and dtype == torch.float32 else torch.finfo(dtype).eps))  # 2⁻¹⁰: TF32
        if not torch.allclose(found[i], alone[0], rtol=close) or (gradient - expected).norm() > close * expected.norm():
            return "an answer's log-prob is not what it is in a row of its own"


def logps_and_embeddings(module, labels, predictors, **inputs):
    """-> (S B,) log-probs, the embeddings of the tokens (1, T, H), by which they can be differentiated, and the dtype of the logits."""
    model, embedded = module.model, []
    hook = model.get_input_embeddings().register_forward_hook(lambda *call: embedded.append(call[-1].detach().requires_grad_()) or embedded[-1])
    labels, predictors, *values = (x.to(model.device) if torch.is_tensor(x) else x for x in (labels, predictors, *inputs.values()))
    try:
        logits = module(**dict(zip(inputs, values)))[0]  # (T, V)
    finally:
        hook.remove()
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)[predictors]  # (S B, L, V)
    return (logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != IGNORE)).sum(-1), embedded[0], logits.dtype


@contextlib.contextmanager
def narrow_windows(model, width):
    """Inside, every window of the model's attention is this wide, in the config, of which masks are made, and in the layers."""
    names = ("sliding_window", "attention_chunk_size")
    found = [(owner, name, vars(owner)[name]) for owner in (model.config.get_text_config(), *model.modules()) for name in names
             if isinstance(vars(owner).get(name), int) and vars(owner)[name] > width]
    try:
        for owner, name, _ in found:
            setattr(owner, name, width)
        yield
    finally:
        for owner, name, value in found:
            setattr(owner, name, value)


# --- Log-probs without all logits at once -----------------------------------------------------------------------------

class ChunkedLogps(torch.autograd.Function):
    """log π(target) at each position without the (N, V) log-softmax and its gradients: (N, H), (V, H), (V,) or None, (N,), keep -> (N,) in
    fp32 or better.

    ∂ log π(target) / ∂ logits = onehot(target) − π. What is kept for backward is the normaliser and, with `keep`, as many logits as may be:
    they become their own gradient. The others are made again. The gradient of the head is added up in fp32 or better.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, keep):
        device, room = hidden.device.type, None
        ctx.kept, ctx.dtype = [], torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        inputs, *head = (x if x is None else x.to(ctx.dtype) for x in (hidden, weight, bias))
        logps, total = (torch.empty(len(hidden), dtype=torch.promote_types(ctx.dtype, torch.float32), device=hidden.device) for _ in range(2))
        for rows in chunks(len(hidden), len(weight)):
            logits = logits_of(inputs[rows], *head, room)
            if keep and rows.stop * len(weight) <= FULL_LOGITS:
                ctx.kept.append(logits)
            else:
                room = logits
            for part, logp, norm, target in in_cache(logits, logps[rows], total[rows], targets[rows]):
                part = part.to(norm.dtype)
                norm.copy_(part.logsumexp(-1))
                logp.copy_(part.gather(-1, target[:, None])[:, 0] - norm)
        ctx.save_for_backward(hidden, weight, bias, targets, total)
        return logps

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, bias, targets, total = ctx.saved_tensors
        inputs, *head = (x if x is None else x.to(ctx.dtype) for x in (hidden, weight, bias))
        of_hidden, room = torch.empty_like(hidden), None
        of_weight, of_bias = (torch.zeros_like(x, dtype=total.dtype) if x is not None and needed else None
                              for x, needed in zip((weight, bias), ctx.needs_input_grad[1:3]))
        for rows in chunks(len(hidden), len(weight)):
            if ctx.kept:  # a second backward makes them again
                delta = ctx.kept.pop(0)
            else:
                delta = room = logits_of(inputs[rows], *head, room)
            for part, norm, factor, target in in_cache(delta, *(x[rows, None] for x in (total, gradient, targets))):
                part.copy_((part - norm).exp_().mul_(-factor).scatter_add_(1, target, factor))
            of_hidden[rows] = delta @ head[0]
            if of_bias is not None:
                of_bias += delta.sum(0, dtype=of_bias.dtype)
            if of_weight is not None and of_weight.dtype == ctx.dtype:
                of_weight.addmm_(delta.T, inputs[rows])
            elif of_weight is not None:
                of_weight += delta.T @ inputs[rows]
        return of_hidden, *(x if x is None else x.to(of.dtype) for x, of in ((of_weight, weight), (of_bias, bias))), None, None


def chunks(count, vocabulary):
    """-> slices of `count` positions with at most CHUNK logits each."""
    size = max(1, CHUNK // vocabulary)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def in_cache(logits, *others):
    """These in parts of so few rows that a CPU keeps them in its cache through several element-wise steps, which halves their time."""
    size = max(1, CACHE // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    return zip(*(x.split(size) for x in (logits, *others)))


def logits_of(hidden, weight, bias, room=None):
    """(n, H), (V, H), (V,) or None -> (n, V), written over `room`, or else into a new one, whose rows begin at multiples of 16 numbers:
    with an odd vocabulary (GPT-2's 50,257) they would not, and a matrix product takes up to twice as long."""
    if room is None:
        room = hidden.new_empty(len(hidden), -(-len(weight) // 16) * 16)[:, :len(weight)]
    logits = torch.mm(hidden, weight.T, out=room[:len(hidden)])
    return logits if bias is None else logits.add_(bias)
