"""Reads the images of a row, and finds their places in its prompt.

    {"images": ["photos/cat.png"], "prompt": "What is on <image>?", ...}
    {"images": ["photos/cat.png"], "prompt": [{"role": "user", "content": [
        {"type": "image"}, {"type": "text", "text": "What?"}]}], ...}

An image is a file, whose path is relative to the data file, or bytes inside the rows, as `datasets`
stores it. Rows hold this `Picture` and no pixels: vision.py computes pixels when a batch is made.
Nothing is downloaded.
"""
import hashlib
import importlib
import importlib.util
import io
import os
import pathlib
import re
from typing import Any, NamedTuple

from errors import UserError, reading

COLUMNS = ("images", "image")  # of a row: a list of images, or one
PLACE = "<image>"  # an image inside the text of a message
URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)
# Modes of PIL with more than 8 bits per channel, which a conversion to RGB would clip.
DEEP_MODES = ("I", "F")
PUT_FIRST = "its images are put before the first message of the user, as no place is marked"


class Picture(NamedTuple):
    """An image of a row."""
    path: str  # of its file, or "" where the row has its bytes
    content: bytes = b""

    def read(self, where: str) -> bytes:
        """Return the bytes of the image's file."""
        if not self.path:
            return self.content
        if not os.path.isfile(self.path):
            raise UserError(f"{where}: the image {self.path} is no file; paths are relative to the "
                            "folder of the rows")
        with reading(f"{where}: the image {self.path} cannot be read"):
            return pathlib.Path(self.path).read_bytes()


# --- The images of a row --------------------------------------------------------------------------

def read_pictures(row: Any, folder: str) -> list[Picture]:
    """Read the column `images` or `image` of a row. `row` are its Fields, `folder` that of its
    file."""
    columns = [name for name in COLUMNS if row.has(name)]
    if len(columns) > 1:
        raise UserError(f"{row.where}: has the columns {' and '.join(columns)}; keep one of them")
    pictures = []
    for name in columns:
        values = row.list(name) if name == "images" else [row.value(name)]
        for value in values:
            pictures.append(read_picture(value, f"{row.where}: the field '{name}'", folder))
    return pictures


def read_picture(value: Any, what: str, folder: str) -> Picture:
    """Read a path, or the {"bytes": ..., "path": ...} of `datasets`."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return Picture("", value["bytes"])
        value = value.get("path")
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{what} holds {str(value)[:60]!r}, which is no image; write the path of "
                        "a file, relative to the folder of the rows")
    if URL.match(value):
        raise UserError(f"{what} holds the URL {value[:60]}; images are never downloaded: save it "
                        "as a file, and write its path")
    return Picture(os.path.abspath(os.path.join(folder, value)))


# --- Their places in the prompt -------------------------------------------------------------------

def is_image_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "image"


def place_pictures(prompt: list, answers: list, pictures: list[Picture], row: Any,
                   folder: str) -> tuple[list, list[Picture]]:
    """Find the places of the images in a prompt of messages.

    pictures    of the column; the parts of the messages may have images of their own instead
    row         the Fields of the row, whose notes say where images were put

    Returns the messages, with {"type": "image"} at each place, and the images in this order.
    """
    for answer in answers:
        if any(map(count_places, answer)):
            raise UserError(f"{row.where}: an answer has an image, and the model writes none; only "
                            "the messages of the prompt may have images")
    if not prompt:  # the row is dropped
        return prompt, pictures
    places = sum(map(count_places, prompt))
    if pictures and not places:
        prompt = [message | {"content": split_places(message["content"])} for message in prompt]
        places = sum(map(count_places, prompt))
    if pictures and not places:
        prompt, places = put_first(prompt, len(pictures), row.where), len(pictures)
        row.notes.add(PUT_FIRST)

    # Parts may name their image.
    placed, named = [], []
    for message in prompt:
        content = message["content"]
        if isinstance(content, list):
            content = [take_picture(part, named, row.where, folder) for part in content]
        placed.append(message | {"content": content})
    if named and pictures:
        raise UserError(f"{row.where}: has images in a column and in its messages; keep one")
    pictures = pictures or named
    if len(pictures) != places:
        raise UserError(f"{row.where}: its prompt has {places} places for images, and the row has "
                        f"{len(pictures)} images; give each place one")
    return placed, pictures


def count_places(message: dict) -> int:
    content = message["content"]
    return sum(map(is_image_part, content)) if isinstance(content, list) else 0


def split_places(content: Any) -> Any:
    """Split a text at each <image> into parts. Other contents are returned unchanged."""
    if not isinstance(content, str) or PLACE not in content:
        return content
    parts = []
    for text in content.split(PLACE):
        parts += [{"type": "text", "text": text}] if text else []
        parts.append({"type": "image"})
    return parts[:-1]


def put_first(prompt, count, where):
    """Put the places of all images before the first message of the user, as TRL does."""
    for index, message in enumerate(prompt):
        if message["role"] == "user":
            content = message["content"]
            if isinstance(content, str):
                content = [{"type": "text", "text": content}]
            changed = message | {"content": [{"type": "image"}] * count + content}
            return prompt[:index] + [changed] + prompt[index + 1:]
    raise UserError(f"{where}: has images, and no message of the user for them")


def take_picture(part, named, where, folder):
    """Return a part without the image that it may name, which is added to `named`."""
    if not is_image_part(part):
        return part
    values = [value for key, value in part.items() if key != "type" and value is not None]
    for value in values:
        named.append(read_picture(value, f"{where}: a message", folder))
    return {"type": "image"}


# --- Files ----------------------------------------------------------------------------------------

def content_key(content: bytes) -> list[int]:
    """Hash the file of an image to four numbers below 2**32."""
    digest = hashlib.blake2b(content, digest_size=16).digest()
    return [int.from_bytes(digest[i:i + 4], "big") for i in range(0, 16, 4)]


def open_picture(picture: Picture, content: bytes, where: str) -> Any:
    """Decode an image to PIL, upright. Images with several frames are refused, since it is unknown
    which of them is meant."""
    if importlib.util.find_spec("PIL") is None:
        raise UserError(f"{where}: has an image, and Pillow, which reads images, is not installed: "
                        "pip install pillow")
    pil, turning = map(importlib.import_module, ("PIL.Image", "PIL.ImageOps"))
    what = f"{where}: the image {picture.path or 'in the row'}"
    with reading(f"{what} cannot be read"):
        try:
            image = pil.open(io.BytesIO(content))
        except pil.UnidentifiedImageError as error:  # its message names no file
            raise UserError(f"{what} is of no kind that Pillow can read") from error
        frames = getattr(image, "n_frames", 1)
        image.load()
        upright = turning.exif_transpose(image)
    if frames > 1:
        raise UserError(f"{what} has {frames} frames; save the one to train on as an image")
    if upright.mode.split(";")[0] in DEEP_MODES:
        raise UserError(f"{what} has more than 8 bits per channel (mode {upright.mode}); save it "
                        "with 8 bits")
    return upright
