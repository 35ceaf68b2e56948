"""The runs behind the pictures of figures.py: their settings, and what each run computes.

    plan = EXPERIMENTS["frontier"].plan()     # the settings of all runs of a picture
    EXPERIMENTS["frontier"].run(plan[0])      # one run, about a second -> {"reward": 4.2, ...}

All runs are in the worlds of grounds.py. A result is small and made of numbers alone, because
results.py keeps it as a line of JSON.
"""
import copy
from collections.abc import Callable
from typing import NamedTuple

import torch

import world
from grounds import (
    LENGTH_BIAS,
    PAIRS,
    STEPS,
    Pairs,
    draw_pairs,
    embedded_world,
    fit,
    length_world,
    share_better,
    small_world,
)
from losses import find, hyperparameters
from tree import answer_table

SEEDS = (0, 1, 2)


def short_numbers(value):
    """Numbers as they are kept: 4 significant digits."""
    if isinstance(value, dict):
        return {name: short_numbers(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [short_numbers(each) for each in value]
    if isinstance(value, (int, str)):
        return value
    return float(f"{float(value):.4g}")


def grid(**choices) -> list[dict]:
    """All combinations, the last name changing fastest."""
    plan = [{}]
    for name, values in choices.items():
        longer = []
        for settings in plan:
            longer += [settings | {name: value} for value in values]
        plan = longer
    return plan


def hyper_of(loss: str, **given) -> dict:
    """The hyper-parameters that a loss has in the world, and those that are given here."""
    own = {"beta": world.BETA}
    for part in find(loss).parts:
        own |= world.OWN_FLAGS.get(part, {})
    names = hyperparameters(find(loss))
    return {name: value for name, value in (own | given).items() if name in names}


# The frontier: one run for each loss, beta and seed.

FRONTIER_BETAS = {
    "sigmoid": (0.25, 0.5, 1.0, 2.0, 4.0),
    "ipo": (0.125, 0.25, 0.5, 1.0),
    "hinge": (0.25, 0.5, 1.0, 2.0),
    "exo_pair": (1.0, 2.0, 4.0, 8.0),
    "kto_pair": (0.25, 0.5, 1.0, 2.0),
    "nca_pair": (0.1, 0.2, 0.4, 0.8),
    "dpop": (0.25, 0.5, 1.0, 2.0),
    "simpo": (2.0, 4.0, 8.0, 16.0),
}


def plan_frontier():
    plan = [{"loss": "optimum", "seed": 0}]
    for loss, betas in FRONTIER_BETAS.items():
        plan += grid(loss=[loss], beta=betas, seed=SEEDS)
    return plan


def run_frontier(settings):
    if settings["loss"] == "optimum":
        return {"points": optimal_frontier()}
    ground = embedded_world()
    pairs = draw_pairs(ground.reference, ground.truth, settings["seed"])
    hyper = hyper_of(settings["loss"], beta=settings["beta"])
    table = fit(ground, pairs, settings["loss"], hyper)
    values = world.metrics(table, ground.reference, world.BETA)
    return {name.removeprefix("world/"): value for name, value in values.items()}


def optimal_frontier() -> list[list[float]]:
    """[β, KL, expected true reward] of the optimum π* for each of many β (DPO paper, eq. 4)."""
    ground, points = embedded_world(), []
    reference = ground.reference.double().log_softmax(-1)
    for exponent in range(-28, 33):
        beta = 2 ** (exponent / 8)
        best = (reference + ground.truth / beta).log_softmax(-1)
        values = world.metrics(best, reference, beta)
        points.append([beta, values["world/kl"], values["world/reward"]])
    return points


# The theorem: the implicit reward of every answer.

def plan_theorem():
    return grid(loss=["sigmoid"], beta=[1.0], seed=SEEDS)


def run_theorem(settings):
    """The rewards of all answers are kept for the first seed alone, times 100 as whole numbers."""
    ground = embedded_world()
    pairs = draw_pairs(ground.reference, ground.truth, settings["seed"])
    table = fit(ground, pairs, settings["loss"], {"beta": settings["beta"]})
    implicit = settings["beta"] * (table - ground.reference).double()
    implicit = implicit - implicit.mean(-1, keepdim=True)  # (X, A)
    truth = ground.truth
    correlation = torch.nn.functional.cosine_similarity(implicit, truth, dim=-1).mean()
    slope = ((implicit * truth).sum(-1) / (truth ** 2).sum(-1)).mean()
    rewards = []
    if settings["seed"] == SEEDS[0]:
        rewards = (100 * implicit).round().int().flatten().tolist()
    return {"correlation": correlation, "slope": slope, "implicit_times_100": rewards}


# Both fall: log-probs over training, and the three causes.

BOTH_FALL = ("sigmoid", "dpop", "apo_zero", "nca_pair", "sigmoid,sft")
HIDDEN_SIZES = (2, 4, 8, 16, 64)
SHARED_WORDS = (0, 1, 2)


def plan_both_fall():
    plan = grid(loss=BOTH_FALL, seed=SEEDS)
    plan += grid(cause=["relative"], with_better=[False, True], seed=SEEDS)
    plan += grid(cause=["shared"], shared=SHARED_WORDS, seed=SEEDS)
    return plan + grid(cause=["alike"], hidden_size=HIDDEN_SIZES, seed=SEEDS)


def run_both_fall(settings):
    causes = {"relative": run_relative, "shared": run_shared, "alike": run_alike}
    if "cause" in settings:
        return causes[settings["cause"]](settings)
    ground = embedded_world(ends=True)
    pairs = draw_pairs(ground.reference, ground.truth, settings["seed"])
    curve, note = changes(ground, pairs)
    fit(ground, pairs, settings["loss"], hyper_of(settings["loss"]), note=note)
    best = (ground.reference.double() + ground.truth).log_softmax(-1)
    at_optimum = [side.mean() for side in pairs.of(best - ground.reference)]
    return {"curve": curve, "at_optimum": at_optimum}


def changes(ground, pairs, every=3):
    """A list and the function that fills it: [step, mean change of log π(y_w), of log π(y_l),
    KL(π_ref || π) with the mass that left the answers, mass of all answers]."""
    curve = []

    def note(step, table):
        if step % every == 0:
            change = table - ground.reference
            chosen, rejected = pairs.of(change)
            forward_kl = -world.expectation(ground.reference.log_softmax(-1), change)
            mass = table.exp().sum(-1).mean()
            curve.append([step, chosen.mean(), rejected.mean(), forward_kl, mass])
    return curve, note


def run_relative(settings):
    """Cause 1. Answers are good, middling or bad, by thirds of the true reward. All pairs are of a
    middling and a bad answer; with_better adds those of a good and a middling one."""
    ground = embedded_world()
    third = ground.truth.argsort(-1).argsort(-1) * 3 // ground.truth.shape[1]  # 0 bad, 2 good
    drawn = draw_pairs(ground.reference, ground.truth, settings["seed"], 2 * PAIRS)
    chosen, rejected = drawn.of(third)
    low = torch.minimum(chosen, rejected)
    high = torch.maximum(chosen, rejected)
    middling = (low == 0) & (high == 1)
    used = middling
    if settings["with_better"]:
        used = middling | (low == 1) & (high == 2)
    pairs = Pairs(*[indices[used] for indices in drawn])
    watched = middling & (chosen == 1)  # the middling answer is chosen
    curve, note = changes(ground, Pairs(*[indices[watched] for indices in drawn]))
    fit(ground, pairs, "sigmoid", {"beta": 1.0}, note=note)
    return {"curve": curve, "pairs": int(used.sum())}


def run_shared(settings, count=16, steps=20, lr=0.02):
    """Cause 2. Plain gradient steps on one pair alone, whose answers share some words. Result, of
    each pair: ⟨∇w, ∇l⟩ / ‖∇w‖² at the start, and the changes of w and l after the steps."""
    ground = embedded_world()
    generator = torch.Generator().manual_seed(settings["seed"])
    rows = []
    for _ in range(count):
        pair = pair_that_shares(settings["shared"], generator)
        rows.append([overlap(ground, pair), *descend(ground, pair, steps, lr)])
    return {"pairs": rows}


def pair_that_shares(count, generator):
    """Draw a prompt and two answers that have `count` words in common, each at its position."""
    size = len(world.WORDS)
    thing = torch.randint(len(world.THINGS), (1,), generator=generator)
    chosen = torch.randint(size, (world.LENGTH,), generator=generator)
    shift = torch.randint(1, size, (world.LENGTH,), generator=generator)
    same = torch.randperm(world.LENGTH, generator=generator)[:count]
    shift[same] = 0
    rejected = (chosen + shift) % size
    place = size ** torch.arange(world.LENGTH).flip(0)  # words are the digits of an index
    return Pairs(thing, (chosen @ place)[None], (rejected @ place)[None])


def overlap(ground, pair):
    """⟨∇w, ∇l⟩ / ‖∇w‖² at the reference. A small step along ∇w − ∇l changes w by the step times
    ‖∇w‖² − ⟨∇w, ∇l⟩: the chosen answer falls if the ratio is above 1."""
    parameters = list(ground.model.parameters())
    chosen, rejected = pair.of(answer_table(ground.model, ground.tree))
    up = torch.autograd.grad(chosen.sum(), parameters, retain_graph=True)
    down = torch.autograd.grad(rejected.sum(), parameters)
    inner = sum((a * b).sum() for a, b in zip(up, down))
    square = sum((a ** 2).sum() for a in up)
    return (inner / square).item()


def descend(ground, pair, steps, lr):
    """Gradient descent on the loss of DPO with beta 1 -> the changes of w and l."""
    policy = copy.deepcopy(ground.model)
    optimizer = torch.optim.SGD(policy.parameters(), lr=lr)
    for _ in range(steps):
        chosen, rejected = pair.of(answer_table(policy, ground.tree) - ground.reference)
        torch.nn.functional.softplus(rejected - chosen).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        changed = pair.of(answer_table(policy, ground.tree) - ground.reference)
    return [side.item() for side in changed]


def run_alike(settings):
    """Cause 3. Policies of few dimensions, which can't tell many answers apart."""
    ground = small_world(settings["hidden_size"])
    pairs = draw_pairs(ground.reference, ground.truth, settings["seed"])
    curve, note = changes(ground, pairs, every=STEPS)
    table = fit(ground, pairs, "sigmoid", {"beta": 1.0}, note=note)
    return {"curve": curve, "accuracy": share_better(table, ground, pairs)}


# Judge or writer: held-out accuracy and expected true reward over training.

JUDGES = (("sigmoid", 1.0), ("sigmoid", 4.0), ("ipo", 0.5), ("kto_pair", 1.0), ("simpo", 4.0))
OFF_POLICY = (("sigmoid", 1.0), ("ipo", 0.5))  # trained on pairs of unlikely answers too
UNLIKELY = 128  # answers to a prompt: the least probable quarter, for off-policy pairs


def plan_judge_or_writer():
    plan = []
    for off_policy, losses in ((False, JUDGES), (True, OFF_POLICY)):
        for loss, beta in losses:
            plan += grid(loss=[loss], beta=[beta], off_policy=[off_policy], seed=SEEDS)
    return plan


def run_judge_or_writer(settings):
    """Off-policy pairs are drawn evenly from the answers that the reference hardly gives."""
    ground = embedded_world()
    unlikely = ground.reference.topk(UNLIKELY, -1, largest=False).indices
    source = ground.reference
    if settings["off_policy"]:
        source = torch.full_like(source, -torch.inf).scatter(-1, unlikely, 0.0)
    seed = settings["seed"]
    pairs = draw_pairs(source, ground.truth, seed)
    own = draw_pairs(source, ground.truth, 50 + seed, count=8192)
    held_out = draw_pairs(ground.reference, ground.truth, 60 + seed, count=8192)
    curve = []

    def note(step, table):
        if step % 3 == 0:
            reward = world.expectation(table.log_softmax(-1), ground.truth)
            on_policy = share_better(table, ground, held_out)
            curve.append([step, on_policy, share_better(table, ground, own), reward])

    hyper = hyper_of(settings["loss"], beta=settings["beta"])
    fit(ground, pairs, settings["loss"], hyper, note=note)
    perfect = ground.truth + ground.reference  # its implicit reward is the true one
    return {
        "curve": curve,
        "ceiling": share_better(perfect, ground, held_out),
        "unlikely": ground.reference.exp().gather(-1, unlikely).sum(-1).mean(),
    }


# Overfitting: few pairs whose labels are never contradicted.

SEPARABLE = 64


def plan_overfitting():
    return grid(loss=["sigmoid", "ipo"], beta=[0.25, 1.0], seed=SEEDS)


def run_overfitting(settings, steps=150):
    """No answer is in two pairs. The loss of all 64 pairs at a constant learning rate."""
    ground = embedded_world()
    generator = torch.Generator().manual_seed(settings["seed"])
    order = torch.randperm(ground.truth.shape[1], generator=generator)
    first, second = order[:2 * SEPARABLE].view(2, -1)
    things = torch.arange(SEPARABLE) % len(world.THINGS)
    better = ground.truth[things, first] > ground.truth[things, second]
    chosen = torch.where(better, first, second)
    pairs = Pairs(things, chosen, torch.where(better, second, first))
    curve = []

    def note(step, table):
        if step % 10 == 0:
            margins = torch.sub(*pairs.of(table - ground.reference))
            reward = world.expectation(table.log_softmax(-1), ground.truth)
            curve.append([step, margins.mean(), margins.min(), margins.max(), reward])

    fit(ground, pairs, settings["loss"], {"beta": settings["beta"]}, note=note, steps=steps,
        lr=1e-3, schedule="constant")
    return {"curve": curve}


# Noise: flipped labels.

FLIPS = (0.0, 0.2, 0.4)
NOISE_PAIRS = 16_384
EXPECTING_FLIPS = {"cdpo": "sigmoid", "robust": "robust"}  # name here: loss
NOISE_BETAS = {
    "sigmoid": (0.25, 0.5, 1.0, 2.0),
    "ipo": (0.25, 0.5, 1.0),
    "hinge": (0.25, 0.5, 1.0, 2.0),
    "cdpo": (0.0625, 0.125, 0.25, 0.5),
    "robust": (0.25, 1.0, 4.0, 16.0),
}


def plan_noise():
    """cDPO and robust DPO that expect no flips are DPO, so they have no runs without flips."""
    plan = []
    for loss, betas in NOISE_BETAS.items():
        flips = FLIPS[1:] if loss in EXPECTING_FLIPS else FLIPS
        plan += grid(loss=[loss], flips=flips, beta=betas, seed=SEEDS)
    return plan


def run_noise(settings):
    """cDPO and robust DPO are told the true share of flips."""
    ground = embedded_world()
    pairs = draw_pairs(ground.reference, ground.truth, settings["seed"], NOISE_PAIRS,
                       settings["flips"])
    loss, hyper = settings["loss"], {"beta": settings["beta"]}
    if loss in EXPECTING_FLIPS:
        loss = EXPECTING_FLIPS[loss]
        hyper["label_smoothing"] = settings["flips"]
    table = fit(ground, pairs, loss, hyper)
    values = world.metrics(table, ground.reference, world.BETA)
    return {name: values[f"world/{name}"] for name in ("reward", "kl", "share", "correlation")}


# Length: longer answers win by accident.

LENGTH_LOSSES = {
    "sigmoid": (0.5, 1.0, 2.0),
    "rdpo": (0.5, 1.0, 2.0),
    "ld_dpo": (0.5, 1.0, 2.0),
    "sigmoid_norm": (2.0, 4.0, 8.0),
    "simpo": (2.0, 4.0, 8.0),
}
LD_ALPHA = 0.5


def plan_length():
    plan = []
    for loss, betas in LENGTH_LOSSES.items():
        plan += grid(loss=[loss], beta=betas, seed=SEEDS)
    return plan


def run_length(settings):
    ground = length_world()
    labels = ground.truth + LENGTH_BIAS * ground.lengths
    pairs = draw_pairs(ground.reference, labels, settings["seed"], NOISE_PAIRS)
    loss, ld_alpha = settings["loss"], 1.0
    if loss == "ld_dpo":
        loss, ld_alpha = "sigmoid", LD_ALPHA
    hyper = hyper_of(loss, beta=settings["beta"], rdpo_alpha=LENGTH_BIAS)
    table = fit(ground, pairs, loss, hyper, ld_alpha=ld_alpha)
    return length_metrics(table, ground)


def length_metrics(table, ground):
    """Expected true reward, KL and words of an answer, of a policy renormalized on all answers."""
    policy = table.double().log_softmax(-1)
    reference = ground.reference.double().log_softmax(-1)
    words = (ground.lengths - 1).double()
    return {
        "reward": world.expectation(policy, ground.truth),
        "kl": world.expectation(policy, policy - reference),
        "words": world.expectation(policy, words),
        "words_before": world.expectation(reference, words),
    }


# Start: a single pair, from policy = reference.

def plan_start():
    return grid(loss=["discopop", "sigmoid"], seed=SEEDS)


def run_start(settings, steps=120):
    """Plain gradient steps on one pair, which the seed draws. beta is 1, so the margin is z."""
    ground = embedded_world()
    pairs = draw_pairs(ground.reference, ground.truth, settings["seed"], count=1)
    path = []

    def note(step, table):
        path.append(torch.sub(*pairs.of(table - ground.reference)).item())

    fit(ground, pairs, settings["loss"], {"beta": 1.0}, note=note, steps=steps, lr=1e-4,
        schedule="constant")
    return {"path": path[::4]}


# Misspecified: policies of one parameter.

FEW = 16  # answers of the pairs that are not drawn from the reference

def plan_misspecified():
    plan = [{"pairs": "reference", "seed": 0}]  # nothing is drawn
    return plan + grid(pairs=["few answers"], seed=SEEDS)


def run_misspecified(settings):
    """For each of 192 policies log π = log π_ref + θ φ(y) − log Z, where φ is 1 if the answer has a
    certain word at a certain position: the expected true reward at the θ that minimizes the
    expected loss of DPO, minus that of the reference, and the same for the θ that maximizes J.

    Pairs are drawn from the reference, or evenly from a few answers to each prompt, which the seed
    draws.
    """
    ground = embedded_world()
    reference = ground.reference.double().log_softmax(-1)
    generator = torch.Generator().manual_seed(settings["seed"])
    words = world.answer_words()
    points = []
    for truth, logps in zip(ground.truth, reference):
        source = logps.exp()
        if settings["pairs"] == "few answers":
            few = torch.randperm(len(logps), generator=generator)[:FEW]
            source = torch.zeros_like(source).index_fill(0, few, 1 / FEW)
        for position in range(world.LENGTH):
            for word in range(len(world.WORDS)):
                feature = (words[:, position] == word).double()
                points.append(one_parameter(feature, truth, logps, source, world.BETA))
    return {"points": points}


def one_parameter(feature, truth, reference, source, beta):
    """[gain of the best θ, gain of DPO's θ] in expected true reward."""
    start = reference.exp() @ truth
    thetas = torch.linspace(-6, 6, 481, dtype=torch.float64)
    policies = (reference + thetas[:, None] * feature).log_softmax(-1)  # (θ, A)
    rewards = policies.exp() @ truth
    kls = (policies.exp() * (policies - reference)).sum(-1)
    best = rewards[(rewards - beta * kls).argmax()]

    # The margin of a pair is θ, 0 or −θ, and βθ becomes the log-odds of the wins of the feature.
    has = feature.nonzero()[:, 0]
    others = (1 - feature).nonzero()[:, 0]
    wins = (truth[has, None] - truth[others]).sigmoid()
    weights = source[has, None] * source[others]
    if not weights.sum():  # no pair says anything about the feature
        return [best - start, 0.0]
    log_odds = torch.special.logit((weights * wins).sum() / weights.sum())
    trained = (reference + log_odds / beta * feature).log_softmax(-1).exp() @ truth
    return [best - start, trained - start]


class Experiment(NamedTuple):
    plan: Callable[[], list[dict]]
    run: Callable[[dict], dict]


EXPERIMENTS = {
    "frontier": Experiment(plan_frontier, run_frontier),
    "theorem": Experiment(plan_theorem, run_theorem),
    "both_fall": Experiment(plan_both_fall, run_both_fall),
    "judge_or_writer": Experiment(plan_judge_or_writer, run_judge_or_writer),
    "overfitting": Experiment(plan_overfitting, run_overfitting),
    "noise": Experiment(plan_noise, run_noise),
    "length": Experiment(plan_length, run_length),
    "start": Experiment(plan_start, run_start),
    "misspecified": Experiment(plan_misspecified, run_misspecified),
}
