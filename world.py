"""The embedded world: a language small enough to enumerate, so that its optimum is known exactly.

A prompt names a thing ("the sea is"), an answer is three words (" cold dark wild"). There are 8
prompts and 512 answers to each. A true reward says how good an answer is for its thing. It depends
on neighboring words too, so it is not a sum over words.

dpo.train_sft trains a reference policy on samples of a Markov chain. Pairs are sampled from
that reference and labeled by Bradley-Terry on the true reward, P(y beats y') = σ(r(y) - r(y')). The
DPO paper (arXiv:2305.18290v3, Sec. 4) makes its claims in this setting; here its claims can be
computed exactly instead of estimated.

Tables are (X, A): X things by A answers, in the order of THINGS and of `answers()`.
"""
import hashlib
import itertools
import json
import pathlib
from collections.abc import Callable

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import data
from files import delete_partial, folder_aside
from model import new_model, save_model
from registry import Needs

THINGS = ("sea", "city", "night", "road", "wind", "house", "winter", "river")
WORDS = ("cold", "dark", "wild", "calm", "old", "bright", "loud", "wide")
LENGTH = 3  # words of an answer
# Standard deviation of the true reward. Of two answers that are one standard deviation apart, the
# better one wins 88 times in 100.
STD = 2.0
ANSWERS = Needs(answers=("chosen",))  # of the rows with one answer
BETA = 1.0  # weight of the KL divergence in J, unless the beta of the loss sets it

MODEL = {
    "hidden_size": 64,
    "layers": 1,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
    "max_position_embeddings": 16,
}
COUNTS = {"sft": 16_384, "pairs": 65_536, "eval": 4_096}  # rows
LIST_COUNTS = {"lists": 32_768, "eval_lists": 2_048}  # with as many answers as pairs and eval
LISTED = 4  # answers of a list
COMMON = {
    "batch_size": 256,
    "micro_batch_size": 128,
    "lr_schedule": "cosine",
    "warmup_steps": 20,
    "max_length": 16,
    "dtype": "float32",
}
SFT = COMMON | {"lr": 3e-3, "epochs": 4}  # of the reference policy
# The defaults of train.py in the world. At its end, policy and reference answer three prompts.
FLAGS = COMMON | {"lr": 2e-3, "epochs": 2, "beta": BETA, "eval_every": 64, "sample_every": 0}
# Other defaults for single losses: some losses average over the 4 tokens of an answer, and in some
# beta does not scale the log-ratio but sets its target.
OWN_FLAGS = {
    "ipo": {"beta": 0.5},
    "sigmoid_norm": {"beta": 4.0},
    "simpo": {"beta": 4.0, "gamma": 0.0},
    "alphapo": {"beta": 4.0},
    "sppo_hard": {"beta": 0.25},
    "cal_dpo": {"beta": 0.25},
    "nca_pair": {"beta": 0.3},
    "dpop": {"dpop_lambda": 1.0},
    "apo_down": {"lr": 5e-4, "epochs": 1},
    "repo": {"repo_gamma": 0.25},
    "alpha_dpo": {"beta": 4.0, "gamma": 0.0, "alpha_dpo_alpha": 0.05},
    "dr_dpo": {"dr_beta": 4.0},
    "npo": {"lr": 2e-4, "epochs": 1},
    "kto": {"unpair": True},
    "bco": {"unpair": True},
    "apo_zero_unpaired": {"unpair": True},
}


def flags(loss: str) -> dict:
    """Return the defaults of train.py in the world, for this loss."""
    return FLAGS | OWN_FLAGS.get(loss, {})


# --- The language, the true reward, and the chain that the reference imitates ---------------------

def prompts() -> list[str]:
    return [f"the {thing} is" for thing in THINGS]


def answers() -> list[str]:
    """List all A answers; the last word changes fastest. Each answer begins with a space."""
    texts = []
    for words in itertools.product(WORDS, repeat=LENGTH):
        texts.append("".join(f" {word}" for word in words))
    return texts


def answer_words() -> torch.Tensor:
    """Return the words of all answers as (A, LENGTH) indices into WORDS."""
    indices = torch.arange(len(WORDS))
    return torch.cartesian_prod(*[indices] * LENGTH)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per word."""
    tokens = ["<pad>", "<unk>", "<eos>", "the", "is", *THINGS, *WORDS]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def draw(seed, *shapes):
    """Draw standard normal tables, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    tables = []
    for shape in shapes:
        tables.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    return tables


def neighbors(words):
    """Pair the columns of answer_words: (first, second), (second, third)."""
    return zip(words.T, words.T[1:])


def true_reward() -> torch.Tensor:
    """Compute the true reward (X, A), with mean 0 and standard deviation STD for each prompt.

    The reward of an answer is how well each word fits the thing, plus how well neighboring words go
    together; some things reward words that go together, the others punish them.
    """
    things, vocabulary, words = len(THINGS), len(WORDS), answer_words()
    fits, goes_with, taste = draw(
        1, (things, vocabulary), (vocabulary, vocabulary), (things, 1))
    reward = fits[:, words].sum(-1)  # (X, A)
    for first, second in neighbors(words):
        reward = reward + taste.sign() * goes_with[first, second]  # (X, A)
    centered = reward - reward.mean(-1, keepdim=True)
    return STD * centered / reward.std(-1, keepdim=True)


def true_reward_of(prompt: str, answer: str) -> float | None:
    """Return the true reward of an answer, or None for one that is not three words."""
    if prompt not in prompts() or answer not in answers():
        return None
    return true_reward()[prompts().index(prompt), answers().index(answer)].item()


def chain_logps() -> torch.Tensor:
    """Compute (X, A) log-probs under the Markov chain: the first word depends on the thing, each
    other word on the word before it."""
    things, vocabulary, words = len(THINGS), len(WORDS), answer_words()
    first_scores, next_scores = draw(2, (things, vocabulary), (vocabulary, vocabulary))
    first_logps = (0.5 * first_scores).log_softmax(-1)  # (X, V)
    next_logps = (0.5 * next_scores).log_softmax(-1)  # (V, V)
    rest = sum(next_logps[before, after] for before, after in neighbors(words))  # (A,)
    return first_logps[:, words[:, 0]] + rest


def sample(logps: torch.Tensor, count: int, answers_each: int, seed: int):
    """Take `count` prompts in turn and sample different answers to each from the policy.

    Returns indices of things, (count,), and of answers, (count, answers_each).
    """
    things = torch.arange(count) % len(THINGS)
    generator = torch.Generator().manual_seed(seed)
    probabilities = logps.softmax(-1)[things]  # (count, A)
    return things, torch.multinomial(probabilities, answers_each, generator=generator)


def sample_ranked(logps: torch.Tensor, count: int, answers_each: int, seed: int):
    """Sample answers from the policy and rank them: two by Bradley-Terry, K by Plackett-Luce.

    Returns indices of things, (count,), and of answers, (count, K), best first, and their scores,
    (count, K). `odpo`, `infonca` and others read the scores.

    A score is the true reward plus Gumbel noise. The difference of two such noises is logistic, so
    y beats y' with probability σ(r(y) - r(y')). The best of several answers is each of them with
    its probability under a softmax of the rewards, and so is the best of the rest.
    """
    things, drawn = sample(logps, count, answers_each, seed)  # (count,), (count, K)
    generator = torch.Generator().manual_seed(seed + 1)
    uniform = torch.rand((count, answers_each), generator=generator, dtype=torch.float64)
    gumbel = -(-uniform.log()).log()
    rewards = true_reward()[things[:, None], drawn]  # (count, K)
    scores, order = (rewards + gumbel).sort(-1, descending=True)
    return things, drawn.gather(-1, order), scores


# --- Exact properties of a policy -----------------------------------------------------------------

def metrics(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> dict[str, float]:
    """Compare a policy with the optimum. policy and reference are the log-probs of every answer,
    (X, A).

    reward, kl, objective   E[r], KL(π || π_ref) and J = E[r] - β KL of the policy, renormalized on
                            the well-formed answers
    optimum                 J* = β log Z with Z = Σ π_ref exp(r/β), which
                            π* = π_ref exp(r/β) / Z attains (DPO paper, eq. 4)
    share                   (J - J_ref) / (J* - J_ref), the share of the achievable
    correlation             of the implicit reward β log π/π_ref and r over all answers to a prompt;
                            the mean over prompts
    mass                    the probability of all well-formed answers, which a loss that only
                            compares answers does not constrain
    """
    truth = true_reward()
    mass = policy.double().exp().sum(-1).mean()
    policy = policy.double().log_softmax(-1)
    reference = reference.double().log_softmax(-1)

    # The objective of the policy, of the reference, and the optimum.
    log_ratio = policy - reference  # (X, A)
    reward = expectation(policy, truth)
    kl = expectation(policy, log_ratio)
    objective = reward - beta * kl
    start = expectation(reference, truth)
    optimum = beta * (reference + truth / beta).logsumexp(-1).mean()

    # Pearson's correlation is the cosine of the centered values; the mean of truth is 0 already.
    implicit = log_ratio - log_ratio.mean(-1, keepdim=True)
    correlation = torch.nn.functional.cosine_similarity(implicit, truth, dim=-1).mean()
    values = {
        "reward": reward,
        "kl": kl,
        "objective": objective,
        "optimum": optimum,
        "share": (objective - start) / (optimum - start),
        "correlation": correlation,
        "mass": mass,
    }
    return {f"world/{name}": value.item() for name, value in values.items()}


def expectation(logps, values):
    """Return the mean of values (X, A) under a policy, averaged over prompts."""
    return (logps.exp() * values).sum(-1).mean()


@torch.no_grad()
def answer_logps(policy: Callable, home: pathlib.Path, tokenizer, device) -> torch.Tensor:
    """(X, A) log-probs of all answers under a dpo.SequenceLogps."""
    every, _ = data.load_tokens(str(home / "every.jsonl"), tokenizer, ANSWERS)
    logps = []
    for i in range(0, len(every), 1024):
        batch = data.pad_rows(every[i:i + 1024], tokenizer.pad_token_id)
        inputs = {}
        for name in ("input_ids", "attention_mask", "labels"):
            inputs[name] = batch[name][:, 0].to(device)  # (1024, T)
        logps.append(policy(**inputs)[0])
    return torch.cat(logps).view(len(THINGS), -1).cpu()


def evaluate_policy(policy: Callable, home: pathlib.Path, tokenizer, beta: float, device) -> dict:
    """The `metrics` of a dpo.SequenceLogps."""
    reference = torch.from_numpy(np.load(home / "reference.npy"))
    return metrics(answer_logps(policy, home, tokenizer, device), reference, beta)


# --- Metrics in words -----------------------------------------------------------------------------

# With less probability than this on well-formed answers, the lines that print the share say so.
ENOUGH_MASS = 0.75

BRIEF = {
    "loss": "loss", "wpo/weight": "weight", "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "world/reward": "reward", "world/kl": "KL", "world/objective": "J", "world/optimum": "J*",
    "world/share": "share", "world/correlation": "correlation", "world/mass": "mass",
}


def brief(values: dict, more: dict | None = None) -> str:
    """The metrics of a step on one line."""
    shorts = BRIEF | (more or {})
    parts = {}
    for name, short in shorts.items():
        if name in values:
            parts[name] = f"{short} {values[name]:.4g}"
    if "world/share" in parts:
        parts["world/share"] += malformed_note(values["world/mass"])
    return " ".join(parts.values())


def malformed_note(mass: float) -> str:
    """A remark for `share`, which takes the policy renormalized on well-formed answers: without it,
    a policy that mostly writes something else would look good. "" where there is no need."""
    if mass >= ENOUGH_MASS:
        return ""
    return f" (of the {100 * mass:.2g} % of the probability that is on well-formed answers)"


def sum_up(values: dict) -> str:
    """The last lines of a run in the world."""
    v = {name.removeprefix("world/"): value for name, value in values.items()}
    return (f"\nexpected true reward {v['reward']:.3f}, KL to the reference {v['kl']:.3f} nats, "
            f"J = {v['objective']:.3f} of at most {v['optimum']:.3f}\n"
            f"probability on well-formed answers         {v['mass']:.3f}\n"
            f"share of the achievable                    {v['share']:.3f}"
            f"{malformed_note(v['mass'])}\n"
            f"correlation of implicit and true reward    {v['correlation']:.3f}")


# --- The folder of the world ----------------------------------------------------------------------
# sft.jsonl, every.jsonl (all prompts and answers), reference/ (a model), reference.npy, pairs.jsonl
# and eval.jsonl, lists.jsonl and eval_lists.jsonl.

def folder() -> pathlib.Path:
    """Return the folder of the world. Its name has a hash of this file, so other code has another
    folder."""
    digest = hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()
    return pathlib.Path("runs") / f"world-{digest[:8]}"


def row_files(kind: str) -> tuple[str, str]:
    """Return the names of the training rows and of the held-out rows for a kind of loss."""
    if kind == "lists":
        return "lists.jsonl", "eval_lists.jsonl"
    return "pairs.jsonl", "eval.jsonl"


def enumeration_digest(home: pathlib.Path) -> str:
    """Hash the files that `evaluate_policy` reads."""
    digest = hashlib.blake2b(digest_size=12)
    for name in ("every.jsonl", "reference.npy"):
        digest.update((home / name).read_bytes())
    return digest.hexdigest()


def make(train_sft: Callable, device: torch.device) -> pathlib.Path:
    """Return the folder. If it does not exist, make it: train_sft(model, rows, tokenizer) trains
    the reference policy -> a dpo.SequenceLogps, and pairs are sampled from it.

    What a killed run left of a world is deleted.
    """
    home = folder()
    delete_partial(home.parent)
    if home.exists():
        return home
    print("world: the reference policy is trained first, only once", flush=True)
    threads = torch.get_num_threads()
    # One thread sums in one order, so the world is the same for any number of threads or ranks.
    torch.set_num_threads(1)
    try:
        with folder_aside(home) as aside:
            write_folder(aside, train_sft, device)
    except OSError:
        # Another run may have finished the same world first; a folder cannot replace it.
        if not home.exists():
            raise
    finally:
        torch.set_num_threads(threads)
    print(f"world: the reference policy is kept in {home}")
    return home


def write_folder(home, train_sft, device):
    """Write the texts, train the reference policy on them, and write its pairs and lists."""
    (home / "reference").mkdir()
    write_texts(home)
    tokenizer = make_tokenizer()
    rows, _ = data.load_tokens(str(home / "sft.jsonl"), tokenizer, ANSWERS)
    model = new_model(tokenizer, **MODEL).to(device)
    reference = train_sft(model, rows, tokenizer)
    save_model(model, tokenizer, home / "reference")
    write_pairs(home, answer_logps(reference, home, tokenizer, device))


def write_rows(path, things, scores=None, **sides):
    """Write one JSON line per row; sides are indices of answers, scores (rows, sides)."""
    texts, questions = answers(), prompts()
    with open(path, "w") as file:
        for i, thing in enumerate(things.tolist()):
            row = {"prompt": questions[thing]}
            for side, indices in sides.items():
                row[side] = texts[indices[i]]
            if scores is not None:
                for k, side in enumerate(sides):
                    row[f"{side}_score"] = scores[i][k].item()
            file.write(json.dumps(row) + "\n")


def write_texts(home: pathlib.Path):
    """Write the rows that the reference is trained on, and all prompts with all answers."""
    things, chosen = sample(chain_logps(), COUNTS["sft"], 1, seed=3)
    write_rows(home / "sft.jsonl", things, chosen=chosen.squeeze(-1))
    things, count = torch.arange(len(THINGS)), len(WORDS) ** LENGTH
    every = torch.arange(count).repeat(len(THINGS))
    write_rows(home / "every.jsonl", things.repeat_interleave(count), chosen=every)


def write_pairs(home: pathlib.Path, reference: torch.Tensor):
    """Write the pairs and lists for training and evaluation, and the reference's log-probs,
    (X, A)."""
    np.save(home / "reference.npy", reference.numpy())
    for seed, name in ((4, "pairs"), (6, "eval")):
        things, ranked, scores = sample_ranked(reference.double(), COUNTS[name], 2, seed)
        chosen, rejected = ranked.T
        write_rows(home / f"{name}.jsonl", things, scores, chosen=chosen, rejected=rejected)
    for seed, name in ((8, "lists"), (10, "eval_lists")):
        lists = sample_ranked(reference.double(), LIST_COUNTS[name], LISTED, seed)
        write_lists(home / f"{name}.jsonl", *lists)


def write_lists(path, things, ranked, scores):
    """Write one JSON line per prompt: its answers, best first, and their scores."""
    texts, questions = answers(), prompts()
    with open(path, "w") as file:
        for thing, indices, numbers in zip(things.tolist(), ranked.tolist(), scores.tolist()):
            responses = [texts[index] for index in indices]
            row = {"prompt": questions[thing], "responses": responses, "scores": numbers}
            file.write(json.dumps(row) + "\n")
