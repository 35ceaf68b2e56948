"""Turns the images of a prompt into the inputs of a vision-language model.

The processor of the model, an image processor with a tokenizer, writes each place of an image as
many tokens and computes its pixels. With four tokens to an image:

    the row         "<image> what?"   cat.png     answers " A cat", " A dog"
    prompt_ids      <image> <image> <image> <image> what ?
    a batch         input_ids (2, T), pixel_values (2, 3, H, W): the pixels of cat.png twice

`see_prompt` makes the tokens, once for all answers of a row. The row keeps these and its images, as
files or bytes. `add_images` makes the pixels when a batch is made: once for each row, and repeated
for each of its answers, in the order of dpo.concatenated_inputs.
"""
import json
from typing import Any, NamedTuple

import torch

from errors import UserError, reading
from images import Picture, content_key, open_picture

# Outputs of a processor with a number for each token of the prompt. A batch has its own of TOKENS.
TOKENS = ("input_ids", "attention_mask", "labels")
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
TOO_LONG = "the prompt is too long, and one with images is never cut"
SPELLED = "text that spells the token of an image"
MERGED = "tokens merge across the end of an image"


class SeenPrompt(NamedTuple):
    """A prompt whose images are written as tokens."""
    ids: list[int]
    keys: list[int]  # four for each image: images.content_key


def pictures_of(columns: dict, i: int) -> list[Picture]:
    """Return the images of row i of {column: list}."""
    pairs = zip(columns["image_paths"][i], columns["image_bytes"][i])
    return [Picture(path, content) for path, content in pairs]


def run_processor(processor: Any, prompt: str, pictures: list[Picture], where: str) -> tuple:
    """Run a processor on a prompt -> its outputs, a dict of tensors with a first dimension of 1 or
    of images, and the keys of the images."""
    images, keys = [], []
    for picture in pictures:
        content = picture.read(where)
        images.append(open_picture(picture, content, where))
        keys += content_key(content)
    if not getattr(processor.image_processor, "do_convert_rgb", False):
        images = [image.convert("RGB") for image in images]
    with reading(f"{where}: the model's processor cannot use its images"):
        outputs = processor(images=[images], text=[prompt], add_special_tokens=False,
                            return_tensors="pt")
    return dict(outputs), keys


def processor_settings(processor: Any) -> str:
    """Return all settings of a processor but its tokenizer's, as text."""
    entries = processor.to_dict()
    entries.pop("tokenizer", None)
    return json.dumps(entries, default=str, sort_keys=True)


# --- A prompt as token ids ------------------------------------------------------------------------

def see_prompt(processor: Any, prompt: str, pictures: list[Picture], where: str) -> SeenPrompt:
    """Write a prompt and its images as tokens. Each image needs a place in the prompt."""
    token = getattr(processor, "boi_token", None) or processor.image_token
    places = prompt.count(token)
    if places != len(pictures):
        raise UserError(f"{where}: its prompt has {places} places for images ({token}), and the "
                        f"row has {len(pictures)} images; give each place one")
    outputs, keys = run_processor(processor, prompt, pictures, where)
    return SeenPrompt(outputs["input_ids"][0].tolist(), keys)


def prompt_with_images(seen: SeenPrompt, plain: list[int], start: int) -> list[int] | None:
    """Return the tokens of a prompt with images up to the answers, or None if the tokens of an
    image are not apart from those of the answers.

    plain    the tokens of the prompt with one place for each image
    start    the number of those that are before the answers
    """
    tail = plain[start:]  # tokens that the answers change
    if seen.ids[len(seen.ids) - len(tail):] != tail:
        return None
    return seen.ids[:len(seen.ids) - len(tail)]


def find_image_problem(row: dict, seen: SeenPrompt | None, processor: Any) -> str:
    """Return why a tokenized row cannot be trained on next to rows with images, or ""."""
    if seen and row["prompt_truncated"]:
        return TOO_LONG
    # The model would read a spelled token as an image, and take the pixels of another row for it.
    spelled = list(row["answer_ids"])
    if not seen:
        spelled.append(row["prompt_ids"])
    if any(processor.image_token_id in ids for ids in spelled):
        return SPELLED
    return ""


def decode_prompt(ids: list[int], tokenizer: Any, image_id: int | None) -> str:
    """Decode a prompt, with [image: 12 tokens] in place of the tokens of an image."""
    text, pending, count = "", [], 0
    for token in [*ids, None]:
        if token == image_id and token is not None:
            count += 1
            continue
        if count:
            text += f"{tokenizer.decode(pending)}[image: {count} tokens]"
            pending, count = [], 0
        # Seen so far, and not an image.
        if token is not None:
            pending.append(token)
    return text + tokenizer.decode(pending)


# --- A batch --------------------------------------------------------------------------------------

def add_images(inputs: dict, rows: dict, processor: Any, places: torch.Tensor) -> None:
    """Add the pixels of the images of {column: list} to the inputs of a model, in place.

    inputs    input_ids (N, T), of N answers
    places    (N,) where each answer is in the flattened (K, B) table: see data.known_of_answers

    Rows without images add no pixels. The pixels of a row are computed without the other rows, so
    they do not depend on them; where sizes differ, zeros are added, as processors do.
    """
    count = len(rows["id"])
    by_row = [outputs_of_row(rows, i, processor) for i in range(count)]
    order = (places % count).tolist()  # the row of each answer
    names = {}
    for outputs in by_row:
        names |= dict.fromkeys(outputs)
    for name in names:
        if name in TOKEN_TYPES:
            inputs[name] = torch.zeros_like(inputs["input_ids"])  # (N, T), 0 is text
            for n, i in enumerate(order):
                types = by_row[i].get(name, [])
                inputs[name][n, :len(types)] = torch.as_tensor(types)
        else:
            pieces = [by_row[i][name] for i in order if name in by_row[i]]
            inputs[name] = concatenate_padded(pieces)


def outputs_of_row(rows, i, processor) -> dict:
    """Run the processor on row i -> its outputs that are not tokens, with the types of the tokens
    of the prompt, (P,), as the row has them."""
    pictures, where = pictures_of(rows, i), rows["id"][i]
    if not pictures:
        return {}
    outputs, keys = run_processor(processor, rows["image_text"][i], pictures, where)
    if keys != rows["image_keys"][i]:
        raise UserError(f"{where}: an image has changed since the rows were read; start again")
    ids, prompt_ids = outputs["input_ids"][0].tolist(), rows["prompt_ids"][i]
    # The row may have a BOS in front, and answers may have changed the last tokens of the prompt.
    front = next(n for n in range(len(prompt_ids)) if ids[:len(prompt_ids) - n] == prompt_ids[n:])
    for name in outputs.keys() - {*TOKENS, *TOKEN_TYPES}:
        if outputs[name].shape[:2] == (1, len(ids)):
            raise UserError(f"{where}: the model's processor gives {name} for each token of a "
                            "prompt, which this program cannot continue for the answers; pass "
                            "another model")
    for name in outputs.keys() & set(TOKEN_TYPES):
        types = outputs[name][0, :len(prompt_ids) - front]
        outputs[name] = torch.cat([types.new_zeros(front), types])
    return {name: value for name, value in outputs.items() if name not in TOKENS}


def concatenate_padded(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate along the first dimension, with zeros behind the others where sizes differ."""
    sizes = torch.tensor([tensor.shape[1:] for tensor in tensors]).amax(0).tolist()
    padded = []
    for tensor in tensors:
        larger = tensor.new_zeros(len(tensor), *sizes)
        larger[tuple(map(slice, tensor.shape))] = tensor
        padded.append(larger)
    return torch.cat(padded)
