"""Small worlds to train in, pairs of their answers, and a fit that takes all pairs in each step.

    ground = embedded_world()
    pairs = draw_pairs(ground.reference, ground.truth, seed=0)
    table = fit(ground, pairs, "sigmoid", {"beta": 1.0})    # log-probs of all answers (X, A)

`fit` differs from dpo.train in one point: tree.py gives the log-probs of all answers, so each step
takes the loss of all pairs and not of a batch. 60 such steps, a second, reach what two epochs of
batches reach: for `sigmoid` a share of 0.96 of the achievable. In most runs an answer is its three
words; its EOS, which all answers have, is not scored. A seed draws other pairs; the reference is
the same.
"""
import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

import dpo
import world
from losses import find
from model import load_model, new_model
from optimizers import learning_rate_factor
from tree import Language, Tree, answer_table, join_lengths, make_tree, prefix_logps

PAIRS = 65_536
STEPS, LR = 60, 1e-2


# --- Worlds ---------------------------------------------------------------------------------------

class Ground(NamedTuple):
    """A world to train in. Tables are (X, A), prompts by answers."""
    model: torch.nn.Module  # the reference; a run starts with a copy
    tree: Tree
    reference: torch.Tensor  # log-probs of the answers
    truth: torch.Tensor  # their true reward
    lengths: torch.Tensor  # (A,) tokens that an answer has, EOS included


def make_ground(model, language, tokenizer, truth):
    tree = make_tree(language, tokenizer)
    with torch.no_grad():
        reference = answer_table(model, tree)
    lengths = language.lengths().to(reference.dtype) + 1
    return Ground(model, tree, reference, truth, lengths)


@functools.cache
def embedded_world(ends: bool = False) -> Ground:
    """The world of world.py and its reference, which is trained if no other run has trained it."""
    home = world.make(dpo.train_sft, torch.device("cpu"))
    model = load_model(str(home / "reference"))
    return make_ground(model, Language(ends=ends), world.make_tokenizer(), world.true_reward())


@functools.cache
def small_world(hidden_size: int) -> Ground:
    """The world with a policy of another size, which is fitted to the same Markov chain."""
    tokenizer = world.make_tokenizer()
    model = new_model(tokenizer, **world.MODEL | {
        "hidden_size": hidden_size, "num_attention_heads": 1})
    tree = make_tree(Language(), tokenizer)
    imitate(model, tree, world.chain_logps())
    return make_ground(model, Language(), tokenizer, world.true_reward())


LENGTH_WORDS, LONGEST = world.WORDS[:3], 4  # of the world with answers of different lengths
STOP = 0.3  # probability that an answer ends, after each of its words
LENGTH_BIAS = 0.8  # a word more makes an answer win as if its reward were higher by this much


@functools.cache
def length_world() -> Ground:
    """A world with answers of one to four words. The true reward has nothing to do with length:
    among the answers of each length it has mean 0 and standard deviation world.STD."""
    words, things = len(LENGTH_WORDS), len(world.THINGS)
    shapes = (things, words), (words, words), (things, words), (words, words)
    first, following, fits, goes_with = world.draw(11, *shapes)
    first_logps = (0.5 * first).log_softmax(-1)
    next_logps = (0.5 * following).log_softmax(-1)

    # The chain that the reference imitates, and the true reward, for the answers of each length.
    chain, reward = [], []
    for count in range(1, LONGEST + 1):
        columns = [torch.arange(words)] * count
        answer = torch.cartesian_prod(*columns).view(-1, count)
        logps = first_logps[:, answer[:, 0]]  # (X, words ** count)
        value = fits[:, answer].sum(-1)
        for before, after in world.neighbors(answer):
            logps = logps + next_logps[before, after]
            value = value + goes_with[before, after]
        last = STOP if count < LONGEST else 1.0
        stops = torch.tensor([1 - STOP] * (count - 1) + [last])
        chain.append(logps + stops.log().sum())
        value = value - value.mean(-1, keepdim=True)
        reward.append(world.STD * value / value.std(-1, keepdim=True))

    tokenizer = world.make_tokenizer()
    language = Language(LENGTH_WORDS, LONGEST, ends=True, shorter=True)
    model = new_model(tokenizer, **world.MODEL)
    imitate(model, make_tree(language, tokenizer), torch.cat(chain, -1))
    return make_ground(model, language, tokenizer, torch.cat(reward, -1))


def imitate(model, tree, chain):
    """SFT without sampling: minimize KL(chain || model) over all answers."""
    probabilities = chain.exp().to(torch.float32)

    def objective():
        table = answer_table(model, tree)
        return table, -(probabilities * table).sum(-1).mean()

    optimize(list(model.parameters()), objective, steps=150)


# --- Pairs, and a fit to them ---------------------------------------------------------------------

class Pairs(NamedTuple):
    """Indices of prompts and answers, (B,) each."""
    things: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor

    def of(self, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The entries of a table (X, A) for chosen and rejected answers, (B,) each."""
        flat = table.flatten()
        start = self.things * table.shape[1]
        chosen = flat.index_select(0, start + self.chosen)
        rejected = flat.index_select(0, start + self.rejected)
        return chosen, rejected


def draw_pairs(logps, reward, seed: int, count: int = PAIRS, flips: float = 0.0) -> Pairs:
    """Sample pairs of answers from a policy, and label them by Bradley-Terry on a reward. A share
    `flips` of the labels is then flipped."""
    things, drawn = world.sample(logps.double(), count, 2, seed=100 + seed)
    generator = torch.Generator().manual_seed(200 + seed)
    first, second = drawn.T
    gap = reward[things, first] - reward[things, second]
    wins = gap.sigmoid()
    wins = (1 - flips) * wins + flips * (1 - wins)
    chance = torch.rand(count, generator=generator, dtype=torch.float64)
    is_first = chance < wins
    chosen = torch.where(is_first, first, second)
    rejected = torch.where(is_first, second, first)
    return Pairs(things, chosen, rejected)


def optimize(parameters, objective, steps, lr=LR, schedule="cosine", note=None):
    """Minimize with AdamW, as dpo.train. `objective` returns a table of log-probs and a loss;
    `note` gets each step's number and table, before the update."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    factor = functools.partial(
        learning_rate_factor, schedule=schedule, warmup=steps // 10, steps=steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(steps):
        table, loss = objective()
        if note:
            note(step, table.detach())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()


def fit(ground: Ground, pairs: Pairs, loss: str, hyper: dict, note: Callable | None = None,
        ld_alpha: float = 1.0, steps: int = STEPS, **options) -> torch.Tensor:
    """Train a copy of the reference on all pairs in each step. Returns its log-probs (X, A)."""
    policy, function = copy.deepcopy(ground.model), find(loss)
    side_logps = side_logps_of(ground, pairs, ld_alpha)
    with torch.no_grad():
        _, (ref_chosen, ref_rejected) = side_logps(ground.model)
    fixed = {
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
        "chosen_lengths": ground.lengths[pairs.chosen],
        "rejected_lengths": ground.lengths[pairs.rejected],
    }

    def objective():
        table, (chosen, rejected) = side_logps(policy)
        tensors = fixed | {"policy_chosen_logps": chosen, "policy_rejected_logps": rejected}
        losses, _ = dpo.preference_loss(tensors, function, hyper)
        return table, losses.mean()

    optimize(list(policy.parameters()), objective, steps, note=note, **options)
    with torch.no_grad():
        table = answer_table(policy, ground.tree)
    if note:
        note(steps, table)
    return table


def side_logps_of(ground, pairs, ld_alpha):
    """Make the function model -> table (X, A), and the log-probs of both sides, (B,) each."""
    if ld_alpha == 1:
        def plain(model):
            table = answer_table(model, ground.tree)
            return table, pairs.of(table)
        return plain

    def weighed(model):
        prefixes, whole = prefix_logps(model, ground.tree)
        table = join_lengths(whole, ground.tree.language)
        sides = []
        starts = common_starts(ground, pairs, torch.cat(prefixes, -1), table)
        for logps, first in zip(pairs.of(table), starts):
            sides.append(first + ld_alpha * (logps - first))
        return table, sides
    return weighed


def common_starts(ground, pairs, prefixes, table):
    """Log-probs of the first tokens of both answers, as many as the shorter one has, (B,) each.
    prefixes has those of all prefixes (X, P), shortest first.

    Of the shorter answer these are all tokens, of the longer one its first words. The words of an
    answer are the digits of its index, so a division by V takes off the last word.
    """
    size, words = len(ground.tree.words), ground.tree.language.lengths()  # V, (A,)
    counts = size ** torch.arange(LONGEST + 1)
    first_prefix = counts.cumsum(0) - counts  # of each number of words
    first_answer = first_prefix - 1  # an answer has at least one word
    shorter = torch.minimum(words[pairs.chosen], words[pairs.rejected])  # (B,)
    starts = []
    for answers, whole in zip((pairs.chosen, pairs.rejected), pairs.of(table)):
        is_longer = words[answers] > shorter
        kept = torch.where(is_longer, shorter + 1, words[answers])  # EOS of the shorter counts
        digits = answers - first_answer[words[answers]]
        digits = digits // size ** (words[answers] - kept)
        first = prefixes[pairs.things, first_prefix[kept] + digits]
        starts.append(torch.where(is_longer, first, whole))
    return starts


def share_better(table, ground, pairs):
    """Share of pairs whose chosen answer has the higher implicit reward."""
    chosen, rejected = pairs.of(table - ground.reference)
    return (chosen > rejected).double().mean().item()
