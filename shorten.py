"""Removes the middle of a very long text before it is tokenized, where truncation would remove it.

To tokenize a text of 50 MB takes minutes, and a row keeps a thousand tokens of it. The first and
the last tokens must be the same as those of the whole text, so the text may be cut only where the
tokens on one side never depend on the other side, at a boundary:

    the cat| sat on the mat ... and the dog| ran        a boundary: a letter before, a space and a
                   removed                              letter behind

`find_boundaries` decides whether a tokenizer has boundaries. A pre-tokenizer that splits the text
there makes one, since the model encodes each piece on its own; so does a BPE without a token that
crosses it, since its merges never cross it. A tokenizer without them gets the whole text.
"""
import functools
import json
import random
import re
from typing import Any

# The characters at which a text may be cut, if they are between two letters.
SEPARATORS = (" ", "\n", "，", "。")
LETTER = r"[^\W\d_]"
# The characters of the texts by which a tokenizer is tried.
TRIED = "aaabbeeennstTHZßéñдн中文한ア  \n\t.,!?'’\"-_/<>|()0123456789，。"
# A token with a space behind a letter, in any way in which a vocabulary writes a space.
CROSSING = re.compile(r"[^\W\d_▁Ġ][ ▁Ġ]")
# Texts up to this many characters, and this many for each token of the limit, are not worth a cut.
CHARACTERS, SLACK_CHARACTERS = 32, 10_000
SLACK = 16  # tokens of the beginning of a text that depend on its being the beginning


def shorten_texts(texts: list, most: int, tokenizer: Any) -> list:
    """Shorten the strings of each RowText whose first and last `most` tokens are all that
    truncation keeps of its prompt and of its answers."""
    limit = CHARACTERS * most + SLACK_CHARACTERS
    # The spans of a row with unscored turns count characters, so such a row stays as it is. The
    # prompt of a row with images is never truncated.
    long = []
    for i, text in enumerate(texts):
        if max(map(len, text.wholes)) > limit and not any(text.scored) and not text.images:
            long.append(i)
    boundaries = find_boundaries(tokenizer) if long else None
    if boundaries is None:
        return texts
    texts = list(texts)
    for i in long:
        texts[i] = shorten_row(texts[i], most + SLACK, boundaries, tokenizer)
    return texts


def shorten_row(text, least, boundaries, tokenizer):
    """Remove the same middle from the part that prompt and wholes share, and another from what
    follows it in each whole."""
    shared = count_shared([text.prompt, *text.wholes])
    start = remove_middle(text.prompt[:shared], least, boundaries, tokenizer)
    wholes = []
    for whole in text.wholes:
        wholes.append(start + remove_middle(whole[shared:], least, boundaries, tokenizer))
    return text._replace(prompt=start + text.prompt[shared:], wholes=wholes)


def count_shared(strings):
    """Count the characters with which all strings begin, by bisection: `os.path.commonprefix`
    compares them one by one."""
    first, *others = strings
    if all(other.startswith(first) for other in others):
        return len(first)
    low, high = 0, min(map(len, strings))
    while low < high:
        middle = (low + high + 1) // 2
        if all(other.startswith(first[:middle]) for other in others):
            low = middle
        else:
            high = middle - 1
    return low


def remove_middle(text, least, boundaries, tokenizer):
    """Return the text without its middle, if at least `least` tokens are between the first boundary
    and the cut, and between the cut and the last boundary. Else return the text.

    The tokens outside the first and the last boundary may depend on what is joined to the text.
    """
    size = 8 * least  # characters to keep at each end
    while 3 * size < len(text):
        first, head = find_ends(boundaries, text, 0, size)
        tail, last = find_ends(boundaries, text, len(text) - size, len(text))
        kept = [text[first:head], text[tail:last]]
        counts = map(len, encode_plain(tokenizer, kept))
        if min(counts) >= least:
            return text[:head] + text[tail:]
        size *= 2
    return text


def find_ends(boundaries, text, start, end):
    """Return the places of the first and of the last boundary between start and end, or (0, 0)."""
    places = [match.start() + 1 for match in boundaries.finditer(text, start, end)]
    if not places:
        return 0, 0
    return places[0], places[-1]


def encode_plain(tokenizer, strings):
    return tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"]


# --- Has a tokenizer boundaries? ------------------------------------------------------------------

@functools.lru_cache(maxsize=4)
def find_boundaries(tokenizer: Any) -> re.Pattern | None:
    """Return a pattern whose matches are a letter and a separator before a letter, such that the
    tokens before the separator never depend on the text from there on, nor the other way round.
    None if the tokenizer has no such place."""
    if not tokenizer.is_fast:
        return None
    backend = tokenizer.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    if model.get("dropout"):
        return None
    can_cross = model.get("type") != "BPE" or any(map(CROSSING.search, model["vocab"]))
    safe = []
    for separator in SEPARATORS:
        is_apart, is_split = try_separator(backend, separator)
        never_merged = separator == " " and not can_cross
        if is_apart and (is_split or never_merged):
            safe.append(separator)
    pattern = re.compile(f"{LETTER}(?:{'|'.join(safe)})(?={LETTER})")
    if not safe or any(may_cross(token, pattern) for token in added_tokens(tokenizer)):
        return None
    return pattern


def added_tokens(tokenizer):
    return tokenizer.added_tokens_decoder.values()


def may_cross(token, boundaries):
    """Return whether an added token, which is found before all others, may hold a boundary or take
    the space of one."""
    content = token.content
    if token.lstrip and content[:1].isalpha():
        return True
    if token.rstrip and content[-1:].isalpha():
        return True
    return boundaries.search(f"a{content}a") is not None


def try_separator(backend, separator, count=200):
    """Encode random texts around a separator. Returns (whether the tokens of each side were the
    same whatever was on the other side, whether each text was split there before it was encoded).
    """
    generator, letters = random.Random(0), [char for char in TRIED if char.isalpha()]
    lefts, rights = [], []
    for _ in range(count):
        pieces = ["".join(generator.choices(TRIED, k=generator.randrange(24))) for _ in "ab"]
        lefts.append(pieces[0] + generator.choice(letters))
        rights.append(separator + generator.choice(letters) + pieces[1])

    # Each side twice, with another side each time.
    apart, split = True, True
    seen = {}  # {text of a side: its tokens}
    for left, right in [*zip(lefts, rights), *zip(lefts[1:], rights)]:
        encoding = backend.encode(left + right, add_special_tokens=False)
        number = sum(end <= len(left) for _, end in encoding.offsets)
        sides = {left: encoding.ids[:number], right: encoding.ids[number:]}
        for side, ids in sides.items():
            if seen.setdefault(side, ids) != ids:
                apart = False
        words = set(encoding.word_ids[:number])
        if not words.isdisjoint(encoding.word_ids[number:]):
            split = False
    return apart, split
