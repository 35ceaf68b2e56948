"""The embedded world: a language small enough to enumerate, so that what training should reach is known exactly.

A prompt names a thing ("the sea is"), an answer is three words (" cold dark wild"): there are 8 x 512 of them. A true reward
says how good an answer is for its thing; which words stand side by side counts too, so it is no sum over words.
A reference policy is trained by `train.py --loss sft` on samples of a Markov chain. Pairs are sampled from that reference and
labelled by Bradley-Terry on the true reward, P(y beats y') = σ(r(y) − r(y')). This is the setting in which the DPO paper
(arXiv:2305.18290v3, Sec. 4) makes its claims, and here they can be measured instead of estimated.

Tables are (X, A): X things by A answers, in the order of THINGS and of `answers()`.
"""
import hashlib
import itertools
import json
import pathlib

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

THINGS = ("sea", "city", "night", "road", "wind", "house", "winter", "river")
WORDS = ("cold", "dark", "wild", "calm", "old", "bright", "loud", "wide")
LENGTH = 3
STD = 2.0  # of the true reward: of two answers one standard deviation apart the better one wins 88 times in 100
BETA = 1.0  # of the objective J where the loss has no beta of its own

MODEL = dict(hidden_size=64, layers=1, num_attention_heads=4, initializer_range=0.1, max_position_embeddings=16)
COUNTS = {"sft": 16_384, "pairs": 65_536, "eval": 4_096}  # rows
COMMON = dict(batch_size=256, micro_batch_size=128, lr_schedule="cosine", warmup_steps=20, max_length=16, dtype="float32")
SFT_FLAGS = COMMON | dict(loss="sft", lr=3e-3, epochs=4, eval_share=0.0)
FLAGS = COMMON | dict(lr=2e-3, epochs=2, beta=BETA, eval_every=64)  # the defaults of train.py here
OWN_FLAGS = {  # of single losses: averages are over 4 tokens, and some betas are no scale of a log-ratio but set its target
    "ipo": dict(beta=0.5), "sigmoid_norm": dict(beta=4.0), "simpo": dict(beta=4.0, gamma=0.0), "alphapo": dict(beta=4.0),
    "sppo_hard": dict(beta=0.25), "cal_dpo": dict(beta=0.25), "nca_pair": dict(beta=0.3), "dpop": dict(dpop_lambda=1.0),
    "apo_down": dict(lr=5e-4, epochs=1),
}


def flags(loss):
    return FLAGS | OWN_FLAGS.get(loss, {})


# --- The language, the truth, and the chain that the reference imitates -----------------------------------------------

def prompts():
    return [f"the {thing} is" for thing in THINGS]


def answers():
    """All A answers, the last word changing fastest. Each begins with the space that parts it from its prompt."""
    return ["".join(f" {word}" for word in words) for words in itertools.product(WORDS, repeat=LENGTH)]


def answer_words():
    """(A, LENGTH) indices into WORDS."""
    return torch.cartesian_prod(*[torch.arange(len(WORDS))] * LENGTH)


def make_tokenizer():
    """One token per word."""
    vocabulary = ["<pad>", "<unk>", "<eos>", "the", "is", *THINGS, *WORDS]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def draw(seed, *shapes):
    """Standard normal tables, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def true_reward():
    """(X, A), mean 0 and standard deviation STD over the answers to a prompt: how well each word fits the thing, plus how
    well neighbours go together, which is to the taste of some things and against that of the others."""
    x, v, words = len(THINGS), len(WORDS), answer_words()
    fits, goes_with, taste = draw(1, (x, v), (v, v), (x, 1))
    reward = fits[:, words].sum(-1)  # (X, A)
    for first, second in zip(words.T, words.T[1:]):
        reward = reward + taste.sign() * goes_with[first, second]
    return STD * (reward - reward.mean(-1, keepdim=True)) / reward.std(-1, keepdim=True)


def chain_logps():
    """(X, A) log-probs of the Markov chain: the first word depends on the thing, each other word on the word before it."""
    x, v, words = len(THINGS), len(WORDS), answer_words()
    first, then = (table.mul(0.5).log_softmax(-1) for table in draw(2, (x, v), (v, v)))
    return first[:, words[:, 0]] + sum(then[a, b] for a, b in zip(words.T, words.T[1:]))


def sample(logps, count, answers_each, seed):
    """`count` prompts in turn and, for each, different answers from the policy -> (count,), (count, answers_each) indices."""
    things = torch.arange(count) % len(THINGS)
    return things, torch.multinomial(logps.softmax(-1)[things], answers_each, generator=torch.Generator().manual_seed(seed))


def sample_pairs(logps, count, seed):
    """Pairs of answers from the policy, labelled by Bradley-Terry -> indices of things, of chosen and of rejected answers,
    (count,) each, and their scores, (count, 2), the chosen one's first.

    A score is the true reward plus Gumbel noise, and the higher score is chosen: the difference of two such noises is logistic,
    so y beats y' with probability σ(r(y) − r(y')). `odpo` reads the scores."""
    things, both = sample(logps, count, 2, seed)
    uniform = torch.rand((count, 2), generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    scores, order = (true_reward()[things[:, None], both] - (-uniform.log()).log()).sort(-1, descending=True)
    chosen, rejected = both.gather(-1, order).T
    return things, chosen, rejected, scores


# --- What can be said exactly of a policy -----------------------------------------------------------------------------

def metrics(policy, reference, beta):
    """Compare a policy with the truth, from its and the reference's log-probs of every answer, (X, A) each.

    reward, kl, objective   of the policy renormalised on the well-formed answers: E[r], KL(π || π_ref), J = E[r] − β KL
    optimum                 J* = β log Z with Z = Σ π_ref exp(r/β), reached by π* = π_ref exp(r/β) / Z (DPO paper, eq. 4)
    share                   (J − J_ref) / (J* − J_ref), how much of the achievable was achieved
    correlation             of the implicit reward β log π/π_ref with r over all answers to a prompt; mean over prompts
    mass                    the probability still on well-formed answers, of which a loss that only compares them knows nothing
    """
    reference, truth = reference.double().log_softmax(-1), true_reward()
    mass, policy = policy.double().exp().sum(-1).mean(), policy.double().log_softmax(-1)
    reward, start = ((logps.exp() * truth).sum(-1).mean() for logps in (policy, reference))
    kl = (policy.exp() * (policy - reference)).sum(-1).mean()
    objective, optimum = reward - beta * kl, beta * (reference + truth / beta).logsumexp(-1).mean()
    implicit = policy - reference
    implicit = implicit - implicit.mean(-1, keepdim=True)
    correlation = torch.nn.functional.cosine_similarity(implicit, truth, dim=-1).mean()  # truth has mean 0 already
    values = {"reward": reward, "kl": kl, "objective": objective, "optimum": optimum,
              "share": (objective - start) / (optimum - start), "correlation": correlation, "mass": mass}
    return {f"world/{name}": value.item() for name, value in values.items()}


# --- Its folder: sft.jsonl, every.jsonl (all prompts and answers), reference/ (a model), reference.npy, pairs.jsonl, eval.jsonl ---

def folder():
    """Named after this very file: a world made by other code is another world."""
    return pathlib.Path("runs") / f"world-{hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()[:8]}"


def write_rows(path, things, scores=(), **sides):
    """One JSON line per row, answers given by index."""
    texts, questions = answers(), prompts()
    with open(path, "w") as file:
        for i, thing in enumerate(things.tolist()):
            row = {"prompt": questions[thing], **{side: texts[indices[i]] for side, indices in sides.items()}}
            row |= {f"{side}_score": scores[i][k].item() for k, side in enumerate(sides)} if len(scores) else {}
            file.write(json.dumps(row) + "\n")


def write_texts(home):
    """What the reference is trained on, and the list of everything that can be said."""
    things, chosen = sample(chain_logps(), COUNTS["sft"], 1, seed=3)
    write_rows(home / "sft.jsonl", things, chosen=chosen.squeeze(-1))
    x, a = len(THINGS), len(WORDS) ** LENGTH
    write_rows(home / "every.jsonl", torch.arange(x).repeat_interleave(a), chosen=torch.arange(a).repeat(x))


def write_pairs(home, reference):
    """What the policy is trained and tested on; reference (X, A) are the trained reference's log-probs."""
    np.save(home / "reference.npy", reference.numpy())
    for seed, name in ((4, "pairs"), (6, "eval")):
        things, chosen, rejected, scores = sample_pairs(reference.double(), COUNTS[name], seed)
        write_rows(home / f"{name}.jsonl", things, scores, chosen=chosen, rejected=rejected)
