"""Is a model causal and without noise, and does it support packed rows, or padded rows without a
mask? Tried on short rows.

`can_pack` and `can_drop_mask` compare log-probs and gradients of the run's own model, in the run's
own dtype, with those of single rows. No list of architectures is needed.

Letters as in packing.py: B pairs, S sides, L tokens of the longest answer, H hidden size.
"""
import contextlib
import itertools
import pathlib
import random
import traceback
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import packing
from dpo import IGNORE
from packing import HALF, NAME, Unsupported, autocast_dtype, find_targets, padded

# Two trial pairs, in numbers of tokens.
PROMPTS = (9, 5)
ANSWERS = ((7, 4), (1, 8))  # of the chosen answers, of the rejected answers
WIDTH = 20  # of an unpacked trial row with filler tokens at its end
WINDOW = 6  # of every sliding window during the trial
MARGIN = 8  # a difference up to MARGIN times the measured rounding counts as rounding


def can_pack(module) -> str | None:
    """None if the model of a logps.FastLogps gives packed rows the log-probs of single rows, else
    the reason.

    Two short pairs are tried, with every sliding window shrunk below their length. Each answer's
    log-prob, and the gradient of this log-prob with respect to the token embeddings, must equal
    those of an unpacked row up to rounding. `unpacked_trials` measures the model's rounding. At all
    tokens that an answer must not see, the gradient must be exactly zero. (Comparing values alone
    would miss a leak below rounding. Comparing bits would refuse mixtures of experts, where the
    rounding of a token depends on the other tokens of its expert.) The model, which may be sharded,
    is left unchanged.
    """
    return verify(module, compare_packed)


def can_drop_mask(module) -> str | None:
    """None if right-padded rows have the same log-probs under `no_mask`, else the reason.

    This holds for causal models, because padding comes after every scored token. Attention then
    needs no (2B, 1, T, T) mask and no synchronization with the GPU to inspect the mask.
    """
    return verify(module, compare_unmasked)


def verify(module, compare: Callable) -> str | None:
    """Run a comparison without autocast and, if the run uses autocast, with it -> the first
    difference, or None.

    A comparison continues after a difference, because with sharded weights every rank must run the
    same forwards.
    """
    model = module.model
    if module.is_encoder_decoder:
        return "an encoder-decoder reads prompt and answer apart"
    before, device = model.config._attn_implementation, model.device.type
    if before not in ("sdpa", NAME):
        return f"its attention is {before} and not sdpa"
    autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    reasons = []
    try:
        with narrow_windows(model, WINDOW), torch.enable_grad():
            for enabled in [False, True] if autocast else [False]:
                with torch.autocast(device, dtype, enabled=enabled):
                    reasons += compare(module)
    except Exception as error:
        # Kernels and models raise errors of many types. A RuntimeError below a line of this project
        # is a torch kernel that refuses its input. Every other error raised in a file of this
        # project is a bug.
        refused = isinstance(error, (RuntimeError, Unsupported))
        if not refused and raised_here(error):
            raise
        first_line = next(iter(str(error).splitlines()), "")
        return f"it fails on the trial rows ({type(error).__name__}: {first_line})"
    finally:
        model.config._attn_implementation = before
    return reasons[0] if reasons else None


def find_fault(module, inputs: dict | None = None, start: int = 4) -> str | None:
    """None if the model of a logps.FastLogps can be trained: its logits depend on no later token,
    and a training forward gives the same logits each time. Else a sentence.

    inputs      of a row, such as one with an image, in place of a short row of random ids
    start       the first token that the logits before it must not depend on

    One forward of a row shows both. The gradient of the first logits with respect to the
    embeddings of later tokens is zero in a causal model, in every dtype; in a bidirectional model
    with random weights it is a thousandth of that with respect to earlier ones. A forward that
    leaves the state of every generator of random numbers as it was has no noise.
    """
    model = module.model
    if inputs is None:
        ids = torch.tensor(trial_rows(model)[2][:8], device=model.device)[None]  # (1, 8)
        inputs = module.trial_inputs(ids)
    leaves = []

    def record(embedding, inputs, output):
        leaves.append(output.detach().requires_grad_())
        return leaves[-1].clone()  # some models scale the embeddings in place

    hook = module.read_embeddings().register_forward_hook(record)
    before = generator_states(model.device)
    try:
        with torch.enable_grad():
            logits = module(**inputs)  # (1, T, V)
    finally:
        hook.remove()
    drew_numbers = generator_states(model.device) != before
    first = logits[:, max(0, start - 4):start].float().square().sum()
    gradient, = torch.autograd.grad(first, leaves[-1])  # (1, T, H)
    norms = gradient[0].float().norm(dim=-1)
    earlier, later = norms[:start], norms[start:]
    if later.norm() > 1e-5 * earlier.norm():
        return ("its logits at a token depend on later tokens, so it is no causal language model "
                "(but a bidirectional one, such as BERT?); pass a causal one")
    return find_noise(module, inputs) if drew_numbers else None


def generator_states(device: torch.device) -> list:
    """Return the states of the generators of random numbers that a model may use."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state(device))
    return [*(bytes(state.numpy()) for state in states), random.getstate(),
            str(np.random.get_state())]


def find_noise(module, inputs: dict) -> str | None:
    """None if a training forward of this row always gives the same logits, else a sentence that
    names the module with the noise.

    The row is computed several times, each time from another seed of torch's generators. Rounding
    is measured by two forwards from one seed, because some GPU kernels add in a random order.
    reach.turn_off_noise turns off the noise that is known.
    """
    model = module.model
    # Only the generator of the CPU is restored: every step seeds all of them.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        logits, checksums = seeded_forward(module, inputs, 0)  # (1, T, V)
        again, _ = seeded_forward(module, inputs, 0)
        others = [seeded_forward(module, inputs, seed) for seed in range(1, 5)]
    rounding = relative_distance(again, logits)
    bound = max(MARGIN * rounding, 2 * torch.finfo(autocast_dtype(logits)).eps)
    for other_logits, other_checksums in others:
        if relative_distance(other_logits, logits) > bound:
            # The first module with another output: an inner one ends before the outer one.
            names = [name for name in checksums if checksums[name] != other_checksums[name]]
            name = names[0] if names else ""
            kind = type(model.get_submodule(name)).__name__
            return (f"in training, its module {name} ({kind}) gives another output each time for "
                    "the same row. This noise would make policy and reference differ; turn it off "
                    "in the model's config.json")
    return None


def seeded_forward(module, inputs, seed: int) -> tuple[torch.Tensor, dict]:
    """Run a forward from this seed -> the logits, and {name of a module: a sum over its output} in
    the order in which the modules end."""
    sums, hooks = {}, []

    def record(name):
        def hook(part, inputs, output):
            if isinstance(output, tuple):
                output = output[0]
            if torch.is_tensor(output):
                sums.setdefault(name, output.double().square().sum())  # of its first call
        return hook

    for name, part in module.model.named_modules():
        hooks.append(part.register_forward_hook(record(name)))
    torch.manual_seed(seed)
    try:
        logits = module(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, {name: value.item() for name, value in sums.items()}


def relative_distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def raised_here(error: Exception) -> bool:
    """Whether the innermost frame of the traceback is in a file of this project."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    folder = pathlib.Path(__file__).parent
    return pathlib.Path(innermost.filename).parent == folder


class Trial(NamedTuple):
    """An answer's log-prob, and its gradient with respect to the embeddings of the row's tokens."""
    logp: torch.Tensor  # ()
    gradient: torch.Tensor  # (tokens, H)


class Rounding(NamedTuple):
    """Relative differences of log-prob and gradient that count as rounding."""
    logp: float
    gradient: float


def compare_packed(module) -> list[str]:
    """Compare packed rows with unpacked rows -> the differences beyond rounding."""
    expected, rounding, reasons = unpacked_trials(module)
    prompts, answers, _ = trial_rows(module.model)
    pairs = [list(pair) for pair in zip(*answers)]
    batch = packing.pack_rows({"prompt_ids": prompts, "answer_ids": pairs})
    logps, embedded = logps_and_embeddings(module, **batch)  # (S B,), (1, T, H)
    ends = np.cumsum(batch["packed"]).reshape(len(prompts), -1)  # of prompt, chosen, rejected
    for i, (side, pair) in enumerate(itertools.product((0, 1), range(len(prompts)))):
        # Indices of the answer and its prompt in the packed row.
        prompt_end = ends[pair, 0]
        answer_end = ends[pair, 1 + side]
        fed = len(answers[side][pair]) - 1
        prompt_start = prompt_end - len(prompts[pair])
        places = np.r_[prompt_start:prompt_end, answer_end - fed:answer_end]
        wanted = torch.zeros_like(embedded[0])
        wanted[places] = expected[i].gradient[:len(places)]
        gradient, = torch.autograd.grad(logps[i], embedded, retain_graph=True)
        found = Trial(logps[i].detach(), gradient[0])
        wanted = Trial(expected[i].logp, wanted)
        reasons += difference(found, wanted, rounding, "in a row of its own")
    return reasons


def compare_unmasked(module) -> list[str]:
    """Compare padded rows without a mask with single rows -> the differences beyond rounding."""
    _, _, reasons = unpacked_trials(module)
    return reasons


def unpacked_trials(module):
    """-> a Trial of each answer, chosen ones first; the model's Rounding; differences beyond it.

    All rows are one batch without a mask. Filler tokens on the right make them WIDTH tokens long; a
    causal model does not see these. The first and the last row are then computed again alone,
    without filler. Their differences show whether the batch is correct, and how much this model
    rounds. A fixed tolerance does not work: one that is strict enough for 2 layers is below the
    rounding of 30 layers.
    """
    prompts, answers, filler = trial_rows(module.model)
    rows = []
    for side in answers:
        rows.extend(zip(prompts, side))  # (prompt, answer), the chosen ones first
    ids = [(prompt + answer[:-1] + filler)[:WIDTH] for prompt, answer in rows]
    predictors = []
    for i, (prompt, answer) in enumerate(rows):
        first = WIDTH * i + len(prompt) - 1
        predictors.append(list(range(first, first + len(answer))))
    labels = padded([answer for _, answer in rows], IGNORE)
    targets = find_targets(labels, padded(predictors, 0))
    packing.enable(module.model)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": packing.no_mask()}
    logps, embedded = logps_and_embeddings(module, targets, **inputs)
    gradients, = torch.autograd.grad(logps.sum(), embedded)  # (rows, WIDTH, H)
    trials = [Trial(*each) for each in zip(logps.detach(), gradients)]

    rounding, reasons = least_rounding(embedded), []
    half = autocast_dtype(embedded) in HALF
    most = Rounding(0.1, 0.5) if half else Rounding(0.01, 0.1)  # a larger one is an error
    for i in (0, len(rows) - 1):
        alone = single_trial(module, *rows[i])
        where = "with no other token after the row"
        reasons += difference(trials[i], alone, most, where)
        measured = distances(trials[i], alone)
        rounding = Rounding(*(max(old, MARGIN * new) for old, new in zip(rounding, measured)))
    return trials, rounding, reasons


def single_trial(module, prompt: list, answer: list) -> Trial:
    """The Trial of a row computed alone, its gradient padded with zeros to WIDTH tokens."""
    ids = prompt + answer[:-1]
    predictors = torch.arange(len(prompt) - 1, len(ids))[None]
    targets = find_targets(torch.tensor([answer]), predictors)
    logps, embedded = logps_and_embeddings(module, targets, input_ids=torch.tensor([ids]))
    gradient, = torch.autograd.grad(logps.sum(), embedded)
    return Trial(logps[0].detach(), F.pad(gradient[0], (0, 0, 0, WIDTH - len(ids))))


def trial_rows(model):
    """-> prompts, answers of both sides, and WIDTH filler tokens, all of random ids."""
    random = np.random.default_rng(0)
    vocabulary = model.get_input_embeddings().num_embeddings

    def draw(counts):
        return [random.integers(vocabulary, size=count).tolist() for count in counts]

    return draw(PROMPTS), [draw(counts) for counts in ANSWERS], draw([WIDTH])[0]


def least_rounding(embedded: torch.Tensor) -> Rounding:
    """The lower bound of Rounding: only two rows are measured, which may round little by chance."""
    dtype = autocast_dtype(embedded)
    eps = torch.finfo(dtype).eps
    if embedded.is_cuda and dtype == torch.float32:
        eps = 2**-10  # TF32
    least = max(1e-4, 16 * eps)
    return Rounding(least, least)


def distances(found: Trial, expected: Trial) -> Rounding:
    """Relative distances of log-prob and gradient."""
    logp = (found.logp - expected.logp).abs()
    gradient = (found.gradient - expected.gradient).norm()
    return Rounding(
        logp=(logp / expected.logp.abs()).item(),
        gradient=(gradient / expected.gradient.norm()).item(),
    )


def difference(found: Trial, expected: Trial, rounding: Rounding, where: str) -> list[str]:
    """[] if both are equal up to rounding, and their gradients zero at the same tokens."""
    if not torch.equal(found.gradient.any(-1), expected.gradient.any(-1)):
        return ["an answer's log-prob depends on other tokens than its own"]
    logp, gradient = distances(found, expected)
    if logp <= rounding.logp and gradient <= rounding.gradient:
        return []
    explained = f"{rounding.logp:.1e} and {rounding.gradient:.1e}"
    return [f"an answer's log-prob is not what it is {where}: it differs by {logp:.1e} and its "
            f"gradient by {gradient:.1e}, where rounding explains {explained}"]


def logps_and_embeddings(module, targets, **inputs):
    """-> (rows,) log-probs in fp32 or better, and the embeddings of the fed tokens, with respect to
    which the log-probs can be differentiated."""
    model, embedded = module.model, []

    def replace(embedding, args, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    def on_device(value):
        return value.to(model.device) if torch.is_tensor(value) else value

    hook = model.get_input_embeddings().register_forward_hook(replace)
    try:
        logits = module(**{name: on_device(value) for name, value in inputs.items()})
    finally:
        hook.remove()
    targets = packing.Targets(*map(on_device, targets))
    logits = logits.flatten(0, 1).index_select(0, targets.predictors)  # (N, V)
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    token_logps = logps.gather(-1, targets.ids[:, None])[:, 0]  # (N,)
    return targets.sum_rows(token_logps), embedded[0]


@contextlib.contextmanager
def narrow_windows(model, width: int):
    """Inside, no attention window is wider than `width`: in the config, from which transformers
    makes masks, and in the layers."""
    names = ("sliding_window", "attention_chunk_size")
    changed = []
    try:
        for owner in (model.config.get_text_config(), *model.modules()):
            for name in names:
                value = vars(owner).get(name)
                if isinstance(value, int) and value > width:
                    changed.append((owner, name, value))
                    setattr(owner, name, width)
        yield
    finally:
        for owner, name, value in changed:
            setattr(owner, name, value)
