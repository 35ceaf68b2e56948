"""The log-probs of all answers of a small language, in one forward: each prefix is computed once.

The 512 answers of three words to a prompt have 1 + 8 + 64 = 73 different prefixes before their last
word. Here they are one sequence, the prompt and then all prefixes, and a mask lets each word see
only the prompt and the words before it in its own answer:

    the sea is   cold  dark  ...   cold cold   cold dark   dark cold  ...
                 \\_ one word _/    \\_______ two words _________________/

So a step of training can take the loss of all pairs at once, without sampling noise of batches, in
the time that 100 rows of a batch need. `answer_table` gives what world.answer_logps gives.

Letters: X prompts, A answers, V words of the vocabulary, S tokens of the sequence.
"""
from typing import NamedTuple

import torch

import world

PROMPT = 3  # tokens of "the sea is"


class Language(NamedTuple):
    """Answers of words from the vocabulary. With `ends`, the log-prob of an answer has that of its
    EOS; without, three words are the whole answer. With `shorter`, answers of 1 to `longest` words
    are answers too (only with ends)."""
    vocabulary: tuple = world.WORDS
    longest: int = world.LENGTH
    ends: bool = False
    shorter: bool = False

    def lengths(self) -> torch.Tensor:
        """Number of words of each answer (A,), shortest answers first."""
        shortest = 1 if self.shorter else self.longest
        counts = torch.arange(shortest, self.longest + 1)
        sizes = len(self.vocabulary) ** counts  # answers of each length
        return counts.repeat_interleave(sizes)


class Tree(NamedTuple):
    """The tokens of a language, as inputs of a causal LM, and where its prefixes are."""
    language: Language
    inputs: dict  # input_ids and position_ids (X, S), attention_mask (1, 1, S, S) booleans
    levels: list[slice]  # of the prefixes of 0, 1, 2, ... words
    words: torch.Tensor  # (V,) token ids
    eos: int


def make_tree(language: Language, tokenizer) -> Tree:
    """Lay out all prefixes of a language."""
    vocabulary = list(language.vocabulary)
    words = torch.tensor(tokenizer.convert_tokens_to_ids(vocabulary))  # (V,)
    prompts = torch.tensor(tokenizer(world.prompts())["input_ids"])  # (X, PROMPT)
    depth = language.longest if language.ends else language.longest - 1

    # The prefixes of one more word: every word after every prefix.
    levels = [slice(PROMPT - 1, PROMPT)]
    parents = [torch.arange(-1, PROMPT - 1)]
    tokens = []
    for _ in range(depth):
        before = torch.arange(levels[-1].start, levels[-1].stop)
        parents.append(before.repeat_interleave(len(words)))
        tokens.append(words.repeat(len(before)))
        start = levels[-1].stop
        levels.append(slice(start, start + len(tokens[-1])))
    parents = torch.cat(parents)  # (S,)
    end = len(parents)

    # A token sees what its parent sees, and itself. Its position is the number of its ancestors.
    sees = torch.eye(end, dtype=torch.bool)
    for token in range(1, end):
        sees[token] |= sees[parents[token]]
    positions = sees.sum(-1) - 1  # (S,)
    answers = torch.cat(tokens).expand(len(prompts), -1)
    inputs = {
        "input_ids": torch.cat([prompts, answers], dim=1),  # (X, S)
        "position_ids": positions.expand(len(prompts), -1),
        "attention_mask": sees[None, None],
    }
    return Tree(language, inputs, levels, words, tokenizer.eos_token_id)


def prefix_logps(model, tree: Tree) -> tuple[list, list]:
    """Log-probs of all prefixes of 0, 1, 2, ... words, (X, V ** words) each, and those of the same
    words with EOS after them (without EOS, if the language does not score it)."""
    logits = model(**tree.inputs, use_cache=False).logits  # (X, S, tokens)
    logps = logits.log_softmax(-1)
    prefixes, ended = [logps.new_zeros(len(logps), 1)], []
    for level in tree.levels:
        ended.append(prefixes[-1] + logps[:, level, tree.eos])
        following = logps[:, level][..., tree.words]  # (X, V ** words, V)
        prefixes.append((prefixes[-1][..., None] + following).flatten(1))
    if not tree.language.ends:
        return prefixes, prefixes
    return prefixes, ended


def answer_table(model, tree: Tree) -> torch.Tensor:
    """Log-probs of all answers, (X, A), in the order of Language.lengths and of world.answers."""
    _, whole = prefix_logps(model, tree)
    return join_lengths(whole, tree.language)


def join_lengths(whole: list, language: Language) -> torch.Tensor:
    """The second result of prefix_logps -> log-probs of the answers of the language, (X, A)."""
    first = 1 if language.shorter else language.longest
    return torch.cat(whole[first:language.longest + 1], dim=-1)
