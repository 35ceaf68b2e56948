"""A very long text is cut before it is tokenized, and its row gets the same tokens."""

import random

import datasets
import pytest
from conftest import SHARED, make_tokenizer, write_jsonl
from test_data import merging_tokenizer
from test_templates import CHATML
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

import data
from data import Limits, load_tokens

BOTH = ("chosen", "rejected")
WORDS = "the cat sat on a mat don't 12345 x=y; naïve 漢字，仮名。 a\nb  two \t Straße <eos>"
WORDS = WORDS.split(" ")


def long_text(generator, characters):
    words = []
    while characters > 0:
        words.append(generator.choice(WORDS))
        characters -= len(words[-1]) + 1
    return " ".join(words)


def fast(backend, **options):
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **options)


def trained(model, trainer, pre_tokenizer, normalizer=None):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    generator = random.Random(1)
    backend.train_from_iterator([long_text(generator, 300) for _ in range(50)], trainer)
    return backend


def bpe(pre_tokenizer, normalizer=None):
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>", "<unk>"], show_progress=False)
    return trained(models.BPE(unk_token="<unk>"), trainer, pre_tokenizer, normalizer)


def metaspace():
    return fast(bpe(pre_tokenizers.Metaspace()))


def spaces_replaced():
    """As Llama 2's: no pre-tokenizer, and no token that crosses the beginning of a word."""
    backend = bpe(pre_tokenizers.Metaspace())
    backend.pre_tokenizer = pre_tokenizers.Sequence([])
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return fast(backend)


def wordpiece():
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[UNK]", "<eos>"], show_progress=False)
    return fast(trained(models.WordPiece(unk_token="[UNK]"), trainer,
                        pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()))


def unigram():
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<eos>", "<unk>"], unk_token="<unk>", show_progress=False)
    return fast(trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(),
                        normalizers.NFKC()))


def with_bos():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    return tokenizer


def gpt2():
    folder = SHARED / "tokenizers" / "gpt2"
    if not folder.exists():
        pytest.skip("the project's shared tokenizers are not here")
    return AutoTokenizer.from_pretrained(folder)


# Tokenizers by which a text is cut, and those by which it must not be.
CUT = {
    "byte-level": make_tokenizer, "BOS": with_bos, "GPT-2": gpt2, "metaspace": metaspace,
    "spaces replaced": spaces_replaced, "wordpiece": wordpiece, "unigram": unigram,
}


def across_words():
    """Its tokens may cross the spaces between words."""
    return fast(bpe(pre_tokenizers.Sequence([])))


def every_ten():
    """Splits by position: the pieces after a cut depend on the text before it."""
    return fast(bpe(pre_tokenizers.FixedLength(10)))


def greedy():
    """Splits after each third word."""
    return fast(bpe(pre_tokenizers.Split(Regex(r"(\S+\s+){3}"), "isolated")))


def token_with_space():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("cat sat")])
    return tokenizer


def token_that_takes_space():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("mat", rstrip=True)])
    return tokenizer


def dropout():
    backend = make_tokenizer().backend_tokenizer
    backend.model.dropout = 0.1
    return fast(backend)


WHOLE = {
    "tokens across words": across_words, "split by position": every_ten, "split by count": greedy,
    "added token with a space": token_with_space, "added token that takes a space":
    token_that_takes_space, "dropout": dropout,
}


@pytest.fixture
def counted(monkeypatch):
    """A list of the lengths of the texts that tokenizers get."""
    lengths, encode = [], PreTrainedTokenizerFast.__call__

    def count(self, text, *arguments, **options):
        lengths.extend([len(text)] if isinstance(text, str) else map(len, text))
        return encode(self, text, *arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", count)
    return lengths


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load rows into a cache of its own -> columns, account. whole: no text is cut."""

    def run(rows, tokenizer, limits, whole=False):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / f"cache {whole}")
        with monkeypatch.context() as patch:
            if whole:
                patch.setattr(data, "shorten_texts", lambda texts, most, tokenizer: texts)
            rows = write_jsonl(tmp_path / "rows.jsonl", rows)
            rows, account = load_tokens(rows, tokenizer, limits=limits)
            return rows[:], account

    return run


def long_rows(seed, sizes=(8000, 20_000)):
    """Rows with one or all of their texts long, and prompts that merge with their answers."""
    generator, rows = random.Random(seed), [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    for long in ((1, 0, 0), (0, 1, 0), (0, 1, 1), (1, 1, 1), (1, 0, 1), (0, 0, 0)):
        texts = []
        for is_long in long:
            size = generator.choice(sizes) if is_long else generator.randrange(40)
            texts.append(long_text(generator, size))
        prompt, chosen, rejected = texts
        end = generator.choice(["", " ", "b"])
        rows.append({"prompt": "begin " + prompt + end, "chosen": generator.choice(["", "c"]) +
                     chosen + " good", "rejected": rejected + " bad"})
    return rows


LIMITS = [
    Limits(8), Limits(8, truncation_mode="keep_start"), Limits(30, 5, 9), Limits(30, None, 50),
    Limits(30, 29, 9, "keep_start"), Limits(16, overlong="drop"),
]


@pytest.fixture(autouse=True)
def short_texts_are_long(monkeypatch):
    """Cut texts of thousands of characters as those of millions."""
    monkeypatch.setattr("shorten.CHARACTERS", 1)
    monkeypatch.setattr("shorten.SLACK_CHARACTERS", 100)


@pytest.mark.parametrize("kind, limits", [
    *((kind, limits) for kind in CUT for limits in LIMITS[:2]),
    *(("byte-level", limits) for limits in LIMITS[2:]),
])
def test_rows_with_very_long_texts_get_the_tokens_of_the_whole_texts(load, kind, limits):
    tokenizer, rows = CUT[kind](), long_rows(0) + long_rows(1)
    assert load(rows, tokenizer, limits) == load(rows, tokenizer, limits, whole=True)


@pytest.mark.parametrize("kind", CUT)
def test_the_tokenizer_gets_a_small_part_of_a_very_long_text(load, kind, counted):
    tokenizer = CUT[kind]()
    rows = long_rows(0, [100_000])[:2]
    counted.clear()
    load(rows, tokenizer, Limits(8))
    assert max(counted) < 15_000


@pytest.mark.parametrize("kind", WHOLE)
def test_a_tokenizer_without_a_safe_place_to_cut_gets_the_whole_text(load, kind, counted):
    tokenizer = WHOLE[kind]()
    rows = long_rows(0, [20_000])
    counted.clear()
    load(rows, tokenizer, Limits(8))
    assert max(counted) > 20_000


@pytest.mark.parametrize("text", ["x" * 20_000, "漢" * 20_000, "1 2 3 " * 5000, " " * 20_000])
def test_a_text_without_a_safe_place_to_cut_is_tokenized_whole(load, tokenizer, text):
    rows = [{"prompt": text, "chosen": "a", "rejected": "b"},
            {"prompt": "a", "chosen": text + "a", "rejected": text + "b"}]
    assert load(rows, tokenizer, Limits(8)) == load(rows, tokenizer, Limits(8), whole=True)


@pytest.mark.parametrize("limits", LIMITS[:2])
def test_long_messages_get_the_tokens_of_the_whole_texts(load, limits):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    rows = []
    for row in long_rows(2):
        roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
        rows.append({name: [{"role": roles[name], "content": text}] for name, text in row.items()})
    assert load(rows, tokenizer, limits) == load(rows, tokenizer, limits, whole=True)


def test_a_template_that_writes_the_end_of_the_prompt_otherwise_gives_the_same_tokens(load):
    tokenizer = make_tokenizer()
    opened = "assistant\n<think>' }}{% endif"
    tokenizer.chat_template = CHATML.replace("assistant\n' }}{% endif", opened)
    rows = []
    for row in long_rows(3):
        row = {name: text.replace("<eos>", "end") for name, text in row.items()}
        messages = {"prompt": [{"role": "user", "content": row["prompt"]}]}
        for side in BOTH:
            messages[side] = [{"role": "assistant", "content": row[side]}]
        rows.append(messages)
    kept = load(rows, tokenizer, Limits(30))
    assert kept == load(rows, tokenizer, Limits(30), whole=True)
    assert kept[1]["noted"]["answers follow another prompt than the chat template's generation "
                            "prompt"]["count"] > 3


def test_the_merging_tokenizer_of_the_boundary_is_not_cut_wrongly(load):
    rows = [{"prompt": "ab " * 5000 + "ab", "chosen": "cd", "rejected": "xd"}]
    tokenizer = merging_tokenizer()
    assert load(rows, tokenizer, Limits(8)) == load(rows, tokenizer, Limits(8), whole=True)
