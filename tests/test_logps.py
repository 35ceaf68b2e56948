"""Log-probs without full logits: FastLogps has the values of dpo.get_batch_logps, with less memory.
"""
import weakref

import pytest
import torch
import torch.nn.functional as F
from steps import (
    PACKS,
    VOCABULARY,
    build,
    distance,
    make_batch,
    make_columns,
    outcome,
    preference_step,
)
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

import batches
import dpo
import logps
from logps import ChunkedLogps, FastLogps
from losses import sigmoid

COLUMNS = make_columns()
PADDED = make_batch(COLUMNS, full_logits=False)  # with Targets
PACKED = make_batch(COLUMNS, packed=True)
# 0.25 is exact in float32, the dtype of the weights of LD-DPO.
VARIANTS = [{}, {"wpo": True}, {"ld_alpha": 0.25}, {"wpo": True, "ld_alpha": 0.0}]


def no_call(*inputs):
    raise AssertionError("this function must not be called")


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returned."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        results = output if isinstance(output, (tuple, list)) else [output]
        for result in results:
            if torch.is_tensor(result):
                self.numbers = max(self.numbers, result.numel())
        return output


def largest_tensor(model, batch, **variants):
    """Elements of the largest tensor of a forward and backward."""
    with Largest() as largest:
        losses, _ = preference_step(model, None, batch, sigmoid, reference_free=True, **variants)
        losses.mean().backward()
    return largest.numbers


# --- Full logits up to a budget, and chunks above it ----------------------------------------------

@pytest.fixture
def full_logits(monkeypatch):
    """A list of the shapes of the logits that dpo.get_batch_logps was called with."""
    shapes, get_batch_logps = [], dpo.get_batch_logps

    def spy(logits, labels):
        shapes.append(logits.shape)
        return get_batch_logps(logits, labels)

    monkeypatch.setattr(dpo, "get_batch_logps", spy)
    return shapes


def batch_with_budget(monkeypatch, logits, **options):
    """The padded batch of COLUMNS where FULL_LOGITS is this number."""
    monkeypatch.setattr(batches, "FULL_LOGITS", logits)
    return make_batch(COLUMNS, **options)


def count_logits():
    """The number of logits of the padded batch: 2B T V."""
    return make_batch(COLUMNS)["inputs"]["input_ids"].numel() * VOCABULARY


def test_logits_within_the_budget_go_to_get_batch_logps_and_more_are_selected_first(
        monkeypatch, full_logits):
    """GPT-2 computes its norms in float64, so the gradient can be compared to 1e-12."""
    model = FastLogps(build("GPT2", **PACKS["GPT2"]).double())
    count = count_logits()
    within = batch_with_budget(monkeypatch, count)
    above = batch_with_budget(monkeypatch, count - 1)
    losses, gradient = outcome(model, within)
    assert full_logits == [(*within["inputs"]["labels"].shape, VOCABULARY)]
    selected_losses, selected_gradient = outcome(model, above)
    assert len(full_logits) == 1
    assert distance(selected_losses, losses) < 1e-12
    assert distance(selected_gradient, gradient) < 1e-12


def test_a_batch_above_the_budget_never_has_all_its_logits(monkeypatch):
    model = FastLogps(build("Llama"))
    count = count_logits()
    within = batch_with_budget(monkeypatch, count)
    above = batch_with_budget(monkeypatch, count - 1)
    assert largest_tensor(model, within) == count
    assert largest_tensor(model, above) < count


def single_row_terms(model, prompt, answer):
    """log π of each token of the answer, and log Σ_v π(v)² there: (tokens,) each. Computed from the
    log-softmax of this row alone."""
    row = torch.tensor([prompt + answer])
    logits = model(row).logits[0, len(prompt) - 1:-1]  # (tokens, V)
    logp = logits.log_softmax(-1)
    token_logps = logp.gather(-1, torch.tensor(answer)[:, None])[:, 0]
    return token_logps, logp.exp().square().sum(-1).log()


def reference_free_sigmoid(model, wpo=False, ld_alpha=1.0):
    """The losses of COLUMNS (B,), by the formulas of the papers, one row at a time."""
    losses = []
    for prompt, (chosen, rejected) in zip(COLUMNS["prompt_ids"], COLUMNS["answer_ids"]):
        common = min(len(chosen), len(rejected))
        margin, alignment = 0.0, 0.0
        for answer, sign in ((chosen, 1), (rejected, -1)):
            token_logps, squares = single_row_terms(model, prompt, answer)
            logp = token_logps[:common].sum() + ld_alpha * token_logps[common:].sum()
            margin = margin + sign * logp
            alignment = alignment + (token_logps - squares).mean().detach()
        weight = alignment.exp() if wpo else 1.0
        losses.append(-weight * F.logsigmoid(0.1 * margin))
    return torch.stack(losses)


@pytest.mark.parametrize("full", [True, False], ids=["within the budget", "above it"])
@pytest.mark.parametrize("variants", VARIANTS)
def test_wpo_and_ld_have_the_values_of_their_papers_within_the_budget_too(variants, full):
    model = FastLogps(build("GPT2", **PACKS["GPT2"]).double())
    losses, gradient = outcome(model, make_batch(COLUMNS, full_logits=full, **variants), **variants)
    expected = reference_free_sigmoid(model.model, **variants)
    model.zero_grad()
    expected.mean().backward()
    parameters = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert distance(losses, expected.detach()) < 1e-12
    assert distance(gradient, parameters) < 1e-12


# --- Logits in chunks -----------------------------------------------------------------------------

@pytest.fixture
def small_chunks(monkeypatch):
    """At most 5 positions in a chunk, and the logits of at most 20 positions kept for backward."""
    monkeypatch.setattr(logps, "CHUNK", {"cpu": VOCABULARY * 5})
    monkeypatch.setattr(logps, "KEPT_LOGITS", VOCABULARY * 20)


def all_logits(hidden, weight, bias, targets):
    return logps.selected_logps(F.linear(hidden, weight, bias), targets)


def recomputed(*tensors):
    return ChunkedLogps.apply(*tensors, False)[0]


def kept(*tensors):
    return ChunkedLogps.apply(*tensors, True)[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("function", [recomputed, kept])
def test_chunked_log_probs_are_those_of_all_logits_in_value_and_gradient(
        monkeypatch, function, bias, frozen):
    monkeypatch.setattr(logps, "CHUNK", {"cpu": VOCABULARY * 4})  # at most 4 positions at a time
    monkeypatch.setattr(logps, "CACHE", VOCABULARY * 3)  # in parts of 3 and 1
    torch.manual_seed(0)
    hidden = torch.randn(23, 16).double()
    weight = torch.randn(VOCABULARY, 16).double()
    offset = torch.randn(VOCABULARY).double() if bias else None
    targets = torch.randint(VOCABULARY, (23,))
    slope = torch.randn(23).double()

    # The head's parameters have no gradient if it is frozen.
    leaves = [hidden.requires_grad_()]
    if not frozen:
        leaves += [x.requires_grad_() for x in (weight, offset) if x is not None]
    found = function(hidden, weight, offset, targets)
    expected = all_logits(hidden, weight, offset, targets)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad((found * slope).sum(), leaves)
    wanted = torch.autograd.grad((expected * slope).sum(), leaves)
    for gradient, value in zip(gradients, wanted):
        assert torch.allclose(gradient, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, options", [
    ("Llama", {}),
    ("Llama", {"tie_word_embeddings": True}),
    ("GPT2", PACKS["GPT2"]),
])
@pytest.mark.parametrize("batch", [PADDED, PACKED], ids=["padded", "packed"])
def test_many_positions_are_scored_in_chunks_with_the_same_loss_and_gradient(
        monkeypatch, small_chunks, name, options, batch):
    model = FastLogps(build(name, **options).double())
    with monkeypatch.context() as patch:
        patch.setattr(model, "bare_head", False)  # logits by the model's own forward
        whole, gradient = outcome(model, batch)
    monkeypatch.setattr(logps, "selected_logps", no_call)
    found, chunked = outcome(model, batch)
    assert distance(found, whole) < 1e-12
    assert distance(chunked, gradient) < 1e-6


@pytest.mark.parametrize("positions, alive", [(23, [5, 4, 3, 2, 1]), (12, [2, 1, 0, 0, 0])])
def test_logits_are_kept_up_to_the_budget_freed_one_by_one_and_recomputed_in_a_second_backward(
        monkeypatch, small_chunks, positions, alive):
    monkeypatch.setattr(logps, "KEPT_LOGITS", VOCABULARY * positions)
    hidden = torch.randn(23, 16).double()
    weight = torch.randn(VOCABULARY, 16).double().requires_grad_()
    targets = torch.randint(VOCABULARY, (23,))
    token_logps, _ = ChunkedLogps.apply(hidden, weight, None, targets, True)
    references = [weakref.ref(logits) for logits in token_logps.grad_fn.kept]

    # Count the kept logits that exist whenever backward begins with a chunk.
    counts, cached_parts = [], logps.cached_parts

    def counted(logits, rows):
        existing = [reference for reference in references if reference() is not None]
        counts.append(len(existing))
        return cached_parts(logits, rows)

    monkeypatch.setattr(logps, "cached_parts", counted)
    first, = torch.autograd.grad(token_logps.sum(), weight, retain_graph=True)
    assert counts == alive
    second, = torch.autograd.grad(token_logps.sum(), weight)
    assert counts == alive + [0] * 5
    assert torch.equal(first, second)


def test_chunks_under_autocast_round_like_all_logits(monkeypatch):
    model = FastLogps(build("Llama"))
    exact = outcome(model.double(), PACKED)
    with torch.autocast("cpu", torch.bfloat16):
        kept = outcome(model.float(), PACKED)
        monkeypatch.setattr(logps, "KEPT_LOGITS", VOCABULARY * 20)
        recomputed = outcome(model, PACKED)
        monkeypatch.setattr(model, "bare_head", False)
        whole = outcome(model, PACKED)
    for found in (kept, recomputed):
        for value, other, expected in zip(found, whole, exact):
            assert distance(value, expected) < 1.5 * distance(other, expected) + 1e-7


@pytest.mark.parametrize("variants", [{}, {"wpo": True}])
def test_no_tensor_has_a_number_for_each_scored_token_and_word(monkeypatch, variants):
    words = 1009
    model = FastLogps(build("Llama", vocab_size=words).double())
    batch = make_batch(COLUMNS, packed=True, **variants)
    expected = outcome(model, batch, **variants)
    monkeypatch.setattr(logps, "KEPT_LOGITS", 1)
    monkeypatch.setattr(logps, "CHUNK", {"cpu": words * 7})
    head = words * 32
    scored = len(batch["inputs"]["targets"].ids)
    assert head <= largest_tensor(model, batch, **variants) < words * scored
    for value, wanted in zip(outcome(model, batch, **variants), expected):
        assert distance(value, wanted) < 1e-12


def test_a_model_that_scales_its_logits_computes_them_itself(monkeypatch):
    model = FastLogps(build("Cohere", logit_scale=0.5).double())
    monkeypatch.setattr(logps, "KEPT_LOGITS", 1)
    full, _ = outcome(model, make_batch(COLUMNS))
    for batch in (PADDED, PACKED):
        losses, _ = outcome(model, batch)
        assert distance(losses, full) < 1e-12


# --- Many processes -------------------------------------------------------------------------------

# Wrapper, KEPT_LOGITS, tied head, rows. With mixed rows, both batches are padded, and only that of
# rank 0 is within the budget of full logits.
CASES = [
    ("fsdp", 2**27, False, "packed"),
    ("fsdp", VOCABULARY * 20, False, "packed"),
    ("fsdp", VOCABULARY * 20, True, "packed"),
    ("ddp", VOCABULARY * 20, True, "packed"),
    ("fsdp", VOCABULARY * 20, True, "mixed"),
    ("ddp", VOCABULARY * 20, False, "mixed"),
]


def wrap(module, kind):
    if kind == "ddp":
        return torch.nn.parallel.DistributedDataParallel(module)
    for layer in module.model.model.layers:
        fully_shard(layer)
    return fully_shard(module)


def batch_of_rank(rank, rows):
    columns = make_columns(seed=rank)
    if rows == "packed":
        return make_batch(columns, packed=True)
    return make_batch(columns, full_logits=rank == 0)


def losses_and_gradients(rank, kind, tied, rows):
    """-> losses of this rank's own pairs, {parameter: gradient averaged over the ranks}."""
    module = FastLogps(build("Llama", tie_word_embeddings=tied).double())
    policy = wrap(module, kind)
    batch = batch_of_rank(rank, rows)
    losses, _ = preference_step(policy, None, batch, sigmoid, reference_free=True)
    losses.mean().backward()
    gradients = {}
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        gradients[name] = gradient.full_tensor() if kind == "fsdp" else gradient
    return losses.detach(), gradients


def on_one_of_two_ranks(rank, folder):
    """Writes the result of every case to the file `folder`/rank."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    results = []
    for kind, kept_logits, tied, rows in CASES:
        logps.KEPT_LOGITS = kept_logits
        results.append(losses_and_gradients(rank, kind, tied, rows))
    torch.save(results, f"{folder}/{rank}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_with_ddp_and_fsdp2_have_the_losses_and_gradients_of_one_process(tmp_path):
    torch.multiprocessing.spawn(on_one_of_two_ranks, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    for i, (_, _, tied, _) in enumerate(CASES):
        model = FastLogps(build("Llama", tie_word_embeddings=tied).double())
        for rank in range(2):
            batch = make_batch(make_columns(seed=rank))
            expected, _ = preference_step(model, None, batch, sigmoid, reference_free=True)
            (expected.mean() / 2).backward()
            assert distance(results[rank][i][0], expected.detach()) < 1e-12
        for name, parameter in model.named_parameters():
            for rank in range(2):
                gradients = results[rank][i][1]
                assert distance(gradients[name], parameter.grad) < 1e-6
