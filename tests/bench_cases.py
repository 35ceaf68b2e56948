"""Make the models and pairs of the table of speed.

    python tests/bench_cases.py OUT pairs.jsonl TOKENIZER

pairs.jsonl has dialogues such as HH-RLHF's, TOKENIZER is the folder of a large tokenizer.
"""
import json
import pathlib
import sys

import transformers
from tokenizers import ByteLevelBPETokenizer

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from layouts import Shape, examples
from loading import load_tokenizer
from model import new_model, save_model
from registry import Needs
from sources import Source

# Hidden size and layers; the names say roughly how many weights there are without embeddings.
SIZES = {"5m": (256, 4), "25m": (512, 4)}
LENGTHS = (128, 256, 512, 1024, 2048, 4096)


def pieces(tokenizer, ids, prompt, answer):
    """Pairs of these lengths, cut out of running text; the answers count their EOS."""
    for start in range(0, len(ids) - prompt - 2 * answer, prompt + 2 * answer - 2):
        first = start + prompt
        second = first + answer - 1
        parts = {
            "prompt": ids[start:first],
            "chosen": ids[first:second],
            "rejected": ids[second:second + answer - 1],
        }
        yield {name: tokenizer.decode(part) for name, part in parts.items()}


def read_pairs(path):
    """The rows that training would keep."""
    rows = []
    for example in examples(Source(path), Needs(), Shape()):
        chosen, rejected = example["answers"]
        if chosen.strip() and rejected.strip() and chosen.strip() != rejected.strip():
            rows.append({"prompt": example["prompt"], "chosen": chosen, "rejected": rejected})
    return rows


def small_tokenizer(rows):
    backend = ByteLevelBPETokenizer()
    texts = [" ".join(row.values()) for row in rows]
    backend.train_from_iterator(
        texts, 8192, 1, special_tokens=["<eos>", "<pad>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend._tokenizer, eos_token="<eos>", pad_token="<pad>")


def main(out, texts, large):
    rows = read_pairs(texts)
    small = small_tokenizer(rows)
    for size, shape in SIZES.items():
        for vocabulary, tokenizer in (("8k", small), ("50k", load_tokenizer(large))):
            model = new_model(tokenizer, *shape, max_position_embeddings=4096)
            save_model(model, tokenizer, out / f"{size}_{vocabulary}")

    text = "".join(row["prompt"] + row["chosen"] for row in rows)
    ids = small(text, verbose=False)["input_ids"]
    cases = {
        "hh": rows,
        "400_100": pieces(small, ids, 400, 100),
        "32_128": pieces(small, ids, 32, 128),
    }
    for length in LENGTHS:
        cases[f"len_{length}"] = pieces(small, ids, length // 3, length // 3)
    for name, pairs in cases.items():
        lines = [json.dumps(pair) + "\n" for pair in pairs]
        (out / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
