"""Make the models and pairs of the README's table of speed.

    python tests/bench_cases.py OUT pairs.jsonl TOKENIZER      # dialogues such as HH-RLHF's, and the folder of a large tokenizer
"""
import itertools
import json
import pathlib
import sys

import transformers
from tokenizers import ByteLevelBPETokenizer

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import data
from model import load_tokenizer, new_model, save_model

SIZES = {"5m": (256, 4), "25m": (512, 4)}  # hidden size, layers; the names count the weights without embeddings, roughly


def pieces(tokenizer, ids, prompt, answer):
    """Pairs of these lengths out of running text; the answers count their EOS."""
    for start in range(0, len(ids) - prompt - 2 * answer, prompt + 2 * answer - 2):
        first = start + prompt
        second = first + answer - 1
        parts = {"prompt": ids[start:first], "chosen": ids[first:second], "rejected": ids[second:second + answer - 1]}
        yield {name: tokenizer.decode(part) for name, part in parts.items()}


def main(out, texts, large):
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in data.examples(data.Source(texts), ("chosen", "rejected"))]
    rows = [row for row in rows if row["chosen"].strip() and row["rejected"].strip() and row["chosen"].strip() != row["rejected"].strip()]
    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator([" ".join(row.values()) for row in rows], 8192, 1, special_tokens=["<eos>", "<pad>"], show_progress=False)
    small = transformers.PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token="<eos>", pad_token="<pad>")
    for (size, shape), (vocabulary, tokenizer) in itertools.product(SIZES.items(), {"8k": small, "50k": load_tokenizer(large)}.items()):
        save_model(new_model(tokenizer, *shape, max_position_embeddings=4096), tokenizer, out / f"{size}_{vocabulary}")
    ids = small("".join(row["prompt"] + row["chosen"] for row in rows), verbose=False)["input_ids"]
    sets = {"hh": rows, "400_100": pieces(small, ids, 400, 100), "32_128": pieces(small, ids, 32, 128)}
    sets |= {f"len_{length}": pieces(small, ids, length // 3, length // 3) for length in (128, 256, 512, 1024, 2048, 4096)}
    for name, some in sets.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *sys.argv[2:])
