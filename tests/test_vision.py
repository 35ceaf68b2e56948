"""Rows with images: their tokens and pixels, their log-probs, and runs on them."""
import argparse
import functools
import importlib.util
import json
import shutil
import zlib

import pytest
import torch
from conftest import (
    ALONE,
    differences,
    make_rows,
    read_metrics,
    resume,
    run_training,
    to_arguments,
    unfinished,
    write_jsonl,
)
from PIL import Image
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlms import MAKERS, TEMPLATE, draw, image_rows, make_vlm

import batches
import data
import dpo
import loading
import model
import sample
import train
import vision
from errors import UserError
from logps import FastLogps
from model import load_model
from reach import turn_off_noise

KINDS = [kind for kind in ("llava", "idefics3") if kind in MAKERS]
RUN = {"batch_size": 4, "micro_batch_size": 2, "max_length": 128, "eval_share": 0.1, "log_every": 1,
       "lr": 1e-2, "dtype": "float64", "eval_every": 0}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with models of KINDS, ten rows of messages and ten of text for them."""
    home = tmp_path_factory.mktemp("vision")
    for kind in KINDS:
        make_vlm(kind, home / kind)
    write_jsonl(home / "rows.jsonl", image_rows(home / "images", 10))
    write_jsonl(home / "text.jsonl", image_rows(home / "images", 10, chat=False))
    return home


@pytest.fixture
def run(home, tmp_path):
    """Train in this process on rows with images -> the output folder."""
    def train_in(out="out", ranks=ALONE, **flags):
        flags = RUN | {"model": home / "llava", "dataset": home / "rows.jsonl"} | flags
        assert not train.main(to_arguments(flags | {"output_dir": tmp_path / out}), ranks)
        return tmp_path / out
    return train_in


def load_rows(processor, path, limits=data.ANY_LENGTH, **shape):
    """Rows of a file as token ids, and the account of them."""
    shape = data.ANY_LAYOUT._replace(images=True, **shape)
    return data.load_tokens(str(path), processor.tokenizer, limits=limits, shape=shape,
                            open_processor=lambda: processor)


def batch_of(rows, indices, processor, **options):
    row_format = batches.RowFormat(processor=processor, **options)
    return batches.collate_on_cpu(rows[indices], processor.tokenizer, row_format)


def logps_of(vlm, batch):
    with torch.no_grad():
        return dpo.concatenated_forward(FastLogps(vlm), batch)["logps"]  # (B, K)


@functools.cache
def model_and_processor(kind):
    config, processor = MAKERS[kind]()
    torch.manual_seed(0)
    vlm = AutoModelForImageTextToText.from_config(config).double()
    turn_off_noise(vlm)
    return vlm, processor


# --- Log-probs ------------------------------------------------------------------------------------

@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", list(MAKERS))
def test_log_probs_are_those_of_the_model_on_what_its_processor_gives_for_prompt_and_answer(
    kind, chat, tmp_path
):
    vlm, processor = model_and_processor(kind)
    rows = image_rows(tmp_path / "images", 5, chat)
    for row in rows if not chat else []:
        place = getattr(processor, "boi_token", processor.image_token)
        row["prompt"] = row["prompt"].replace("<image>", place)
    loaded, account = load_rows(processor, write_jsonl(tmp_path / "rows.jsonl", rows))
    assert account["kept"] == 5
    logps = logps_of(vlm, batch_of(loaded, range(5), processor))  # (5, 2)
    for i, row in enumerate(loaded):
        images = [Image.open(path) for path in row["image_paths"]]
        for k, ids in enumerate(row["answer_ids"]):
            inputs = {"input_ids": torch.tensor([row["prompt_ids"] + ids])}
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
            if images:
                answer = processor.tokenizer.decode(ids)
                inputs = processor(images=[images], text=[row["image_text"] + answer],
                                   add_special_tokens=False, return_tensors="pt")
                assert inputs["input_ids"][0].tolist() == row["prompt_ids"] + ids
            with torch.no_grad():
                logits = vlm(**inputs).logits[0, :-1].log_softmax(-1)
            scored = logits[-len(ids):].gather(-1, torch.tensor(ids)[:, None])
            assert abs(scored.sum() - logps[i, k]) < 1e-9


@pytest.mark.parametrize("kind", list(MAKERS))
def test_log_probs_do_not_depend_on_the_other_rows_nor_on_the_path_of_the_head(kind, tmp_path):
    vlm, processor = model_and_processor(kind)
    rows = image_rows(tmp_path / "images", 5)
    loaded, _ = load_rows(processor, write_jsonl(tmp_path / "rows.jsonl", rows))
    together = logps_of(vlm, batch_of(loaded, range(5), processor))
    chunked = logps_of(vlm, batch_of(loaded, [4, 2, 3, 0, 1], processor, full_logits=False))
    assert torch.allclose(chunked, together[[4, 2, 3, 0, 1]], rtol=0, atol=1e-9)
    for i in range(5):
        alone = logps_of(vlm, batch_of(loaded, [i], processor))
        assert torch.allclose(alone[0], together[i], rtol=0, atol=1e-9)


def test_logits_that_read_later_tokens_behind_an_image_are_a_fault(tmp_path):
    vlm, processor = model_and_processor("gemma3")
    rows, _ = load_rows(processor, write_jsonl(tmp_path / "rows.jsonl",
                                               image_rows(tmp_path / "images", 2)))
    trial = train.trial_of_image([rows], processor, ALONE)
    assert trial(FastLogps(vlm)) is None
    trial.keywords["inputs"]["token_type_ids"].fill_(1)  # the answer as a part of the image
    assert "depend on later tokens" in trial(FastLogps(vlm))


@pytest.mark.parametrize("flag", ["model", "ref_model", "eval_dataset"])
def test_a_processor_of_another_model_is_one_line_before_the_first_step(home, run, tmp_path, flag):
    config, processor = MAKERS["llava"]()
    config.vision_config.image_size = 42
    other = AutoModelForImageTextToText.from_config(config)
    model.save_model(other, processor, tmp_path / "other")
    flags = {"model": tmp_path / "other"}
    if flag == "ref_model":
        flags = {"ref_model": tmp_path / "other"}
    if flag == "eval_dataset":  # no training row has an image
        flags["dataset"] = write_jsonl(tmp_path / "text.jsonl", make_rows(10))
        flags |= {"eval_dataset": home / "rows.jsonl", "eval_share": None}
    name = "ref_model" if flag == "ref_model" else "model"
    with pytest.raises(UserError, match=rf"--{name} .*other: .*rows.jsonl, row \d+: the model "
                                        "cannot read its image.*28.*42"):
        run(dry_run=True, **flags)


def test_another_image_changes_the_log_probs_of_its_row_alone(tmp_path):
    vlm, processor = model_and_processor(KINDS[-1])
    path = write_jsonl(tmp_path / "rows.jsonl", image_rows(tmp_path / "images", 4))
    rows, _ = load_rows(processor, path)
    before = logps_of(vlm, batch_of(rows, range(4), processor))
    draw(tmp_path / "images" / "1.png", "yellow")
    with pytest.raises(UserError, match="row 2: an image has changed since the rows were read"):
        batch_of(rows, range(4), processor)
    again, _ = load_rows(processor, path)
    assert data.digest(again) != data.digest(rows)
    after = logps_of(vlm, batch_of(again, range(4), processor))
    changed = (after != before).all(1)
    assert changed.tolist() == [False, True, False, False]


def test_several_images_of_several_sizes_keep_their_order(tmp_path):
    for color, size in (("red", (30, 30)), ("blue", (60, 20))):
        draw(tmp_path / f"{color}.png", color, size)
    pair = make_rows(1)[0]
    rows = []
    for images in (["red.png", "blue.png"], ["blue.png", "red.png"], ["red.png"]):
        prompt = "<image> and " * len(images)
        rows.append(pair | {"images": images, "prompt": [{"role": "user", "content": prompt}]})
    for kind in KINDS:
        vlm, processor = model_and_processor(kind)
        loaded, _ = load_rows(processor, write_jsonl(tmp_path / "rows.jsonl", rows))
        logps = logps_of(vlm, batch_of(loaded, range(3), processor))
        assert abs(logps[0] - logps[1]).min() > 1e-3
        alone = torch.cat([logps_of(vlm, batch_of(loaded, [i], processor)) for i in range(3)])
        assert torch.allclose(alone, logps, rtol=0, atol=1e-9)


# --- Rows -----------------------------------------------------------------------------------------

def one_row(tmp_path, **changed):
    """Load one row with an image on LLaVA -> rows, account."""
    draw(tmp_path / "a.png")
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hue?"}]}]
    row = {"prompt": prompt, "chosen": [{"role": "assistant", "content": "red"}],
           "rejected": [{"role": "assistant", "content": "blue"}], "images": ["a.png"]}
    row |= changed
    if row["prompt"] is None:
        row.pop("prompt")
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    return load_rows(model_and_processor("llava")[1], path)


PLAIN = [{"role": "user", "content": "hue?"}]
SPELLED = [{"role": "user", "content": "<image>hue?"}]
PATH_PART = [{"role": "user", "content": [{"type": "image", "path": "a.png"},
                                          {"type": "text", "text": "hue?"}]}]
IMAGE_PART = [{"role": "user", "content": [{"type": "image", "image": "a.png"},
                                           {"type": "text", "text": "hue?"}]}]


@pytest.mark.parametrize("changed", [
    {}, {"prompt": PLAIN}, {"prompt": SPELLED}, {"prompt": PATH_PART, "images": None},
    {"prompt": IMAGE_PART, "images": None}, {"images": None, "image": "a.png"},
    {"images": [{"path": "a.png", "bytes": None}]}, {"images": ["../outside.png"]},
    {"images": ["link.png"]}, {"prompt": "user: <image>hue?<eos>assistant: ",
                                                     "chosen": "red", "rejected": "blue"},
], ids=["parts", "first", "spelled", "path", "image", "column", "struct", "outside", "link",
        "text"])
def test_each_way_to_write_an_image_gives_the_same_tokens(changed, tmp_path):
    draw(tmp_path / "outside.png")
    tmp_path = tmp_path / "rows"
    tmp_path.mkdir()
    (tmp_path / "link.png").symlink_to("../outside.png")
    rows, account = one_row(tmp_path, **changed)
    tokenizer = model_and_processor("llava")[1].tokenizer
    prompt = tokenizer.decode(rows[0]["prompt_ids"])
    # The space before the answer is in its first token.
    assert prompt == f"user: {'<image>' * 4}hue?<eos>assistant:"
    assert rows[0]["tokens"] == len(rows[0]["prompt_ids"]) + sum(map(len, rows[0]["answer_ids"]))
    put_first = "are put before the first message" in str(account["noted"])
    assert put_first == (changed == {"prompt": PLAIN})


@pytest.mark.parametrize("row, columns", [
    ({"conversations": [{"from": "human", "value": "<image>hue?"}],
      "chosen": {"from": "gpt", "value": "red"}, "rejected": {"from": "gpt", "value": "blue"}}, ()),
    ({"instruction": "hue?", "input": "", "chosen": "red", "rejected": "blue"}, ()),
    ({"question": SPELLED, "chosen": "red", "rejected": "blue"}, (("prompt", "question"),)),
    ({"chosen": SPELLED + [{"role": "assistant", "content": "red"}],
      "rejected": SPELLED + [{"role": "assistant", "content": "blue"}]}, ()),
], ids=["sharegpt", "alpaca", "columns", "dialogues"])
def test_images_belong_to_rows_of_every_layout(row, columns, tmp_path):
    draw(tmp_path / "a.png")
    processor = model_and_processor("llava")[1]
    path = write_jsonl(tmp_path / "rows.jsonl", [row | {"photos": ["a.png"]}])
    loaded, _ = load_rows(processor, path, columns=(*columns, ("images", "photos")))
    prompt = processor.tokenizer.decode(loaded[0]["prompt_ids"])
    assert prompt == f"user: {'<image>' * 4}hue?<eos>assistant:"


def test_a_bos_that_the_tokenizer_adds_is_in_front_of_a_text_with_an_image(tmp_path):
    processor = MAKERS["llava"]()[1]
    backend = processor.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1)])
    processor.tokenizer.bos_token = "<pad>"
    assert processor.tokenizer("a")["input_ids"][0] == 1
    rows = image_rows(tmp_path / "images", 4, chat=False)
    loaded, _ = load_rows(processor, write_jsonl(tmp_path / "rows.jsonl", rows))
    assert [ids.count(1) for ids in loaded["prompt_ids"]] == [1] * 4
    assert [ids[0] for ids in loaded["prompt_ids"]] == [1] * 4
    inputs = batch_of(loaded, range(4), processor)["inputs"]
    assert len(inputs["pixel_values"]) == 6


def test_images_inside_a_data_set_are_read_as_from_their_files(tmp_path):
    import datasets

    draw(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    row = {"prompt": SPELLED, "chosen": " red", "rejected": " blue"}
    stored = datasets.Dataset.from_list([row | {"images": [Image.open(tmp_path / "a.png")]}])
    stored.save_to_disk(tmp_path / "saved")
    bare = datasets.Dataset.from_list([row | {"images": [{"bytes": content, "path": None}]}])
    bare.to_parquet(tmp_path / "rows.parquet")
    path = write_jsonl(tmp_path / "rows.jsonl", [row | {"images": ["a.png"]}])
    vlm, processor = model_and_processor("llava")
    found = []
    for name in (path, tmp_path / "saved", tmp_path / "rows.parquet"):
        rows, _ = load_rows(processor, name)
        found.append(logps_of(vlm, batch_of(rows, [0], processor)))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("mode, options", [
    ("L", {}), ("RGBA", {}), ("P", {}), ("1", {}), ("CMYK", {"format": "JPEG"}),
    ("LA", {}), ("RGB", {"format": "BMP"}), ("RGB", {"format": "GIF"}),
])
def test_images_of_other_modes_and_formats_are_read(mode, options, tmp_path):
    draw(tmp_path / "b.png", mode=mode, **options)
    rows, _ = one_row(tmp_path, images=["b.png"])
    batch = batch_of(rows, [0], model_and_processor("llava")[1])
    assert batch["inputs"]["pixel_values"].shape == (2, 3, 28, 28)


def test_a_photo_is_turned_upright(tmp_path):
    upright = Image.open(draw(tmp_path / "b.png", size=(40, 20)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "c.png", exif=exif)
    pixels = []
    for name in ("b.png", "c.png"):
        rows, _ = one_row(tmp_path, images=[name])
        batch = batch_of(rows, [0], model_and_processor("llava")[1])
        pixels.append(batch["inputs"]["pixel_values"])
    assert torch.equal(*pixels)


def bad_image(kind, path):
    """Write a file that is no image to be trained on."""
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no image")
    elif kind == "cut":
        content = draw(path, size=(200, 200)).read_bytes()
        path.write_bytes(content[:len(content) // 2])
    elif kind == "animated":
        frames = [Image.new("RGB", (9, 9), color) for color in ("red", "blue")]
        frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:])
    elif kind == "deep":
        Image.new("I;16", (9, 9)).save(path)
    elif kind == "huge":
        header = b"IHDR" + (100_000).to_bytes(4) * 2 + bytes([8, 2, 0, 0, 0])
        content = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4) + header
        path.write_bytes(content + zlib.crc32(header).to_bytes(4) + bytes(4) + b"IDAT" + bytes(4))
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nowhere.png")


@pytest.mark.parametrize("kind, message", [
    ("empty", "is of no kind that Pillow can read"), ("text", "is of no kind that Pillow can"),
    ("cut", "cannot be read: "), ("animated", "has 2 frames; save the one"),
    ("deep", "has more than 8 bits per channel"), ("huge", "cannot be read: Image size"),
    ("folder", "is no file"), ("link", "is no file"), ("missing", "is no file"),
])
def test_a_file_that_is_no_image_to_be_trained_on_names_file_and_row(kind, message, tmp_path):
    bad_image(kind, tmp_path / "bad.png")
    with pytest.raises(UserError, match=rf"rows.jsonl, row 1: the image .*/bad.png {message}"):
        one_row(tmp_path, images=["bad.png"])


TWO_PLACES = [{"role": "user", "content": "<image> or <image>?"}]
SEEN = [{"role": "assistant", "content": [{"type": "image"}]}]
BOTH_TURNS = {"chosen": SPELLED + [{"role": "assistant", "content": "red"}],
              "rejected": PLAIN + [{"role": "assistant", "content": "blue"}], "prompt": None}
PART_TURNS = BOTH_TURNS | {"chosen": PATH_PART + [{"role": "assistant", "content": "red"}],
                           "images": None}


@pytest.mark.parametrize("changed, message", [
    ({"images": ["https://a.b/c.png"]}, "the field 'images' holds the URL https://a.b/c.png; "
     "images are never downloaded"),
    ({"images": ["data:image/png;base64,AAAA"]}, "holds the URL"),
    ({"images": ["file:///a.png"]}, "holds the URL"),
    ({"images": None, "image": "s3://a/b.png"}, "'image' holds the URL"),
    ({"prompt": [{"role": "user", "content": [{"type": "image", "url": "http://a/b.png"}]}],
      "images": None}, "a message holds the URL"),
    ({"prompt": TWO_PLACES}, "2 places for images, and the row has 1 images"),
    ({"images": ["a.png", "a.png"]}, "1 places for images, and the row has 2 images"),
    ({"images": None}, "1 places for images, and the row has 0 images"),
    ({"prompt": PATH_PART}, "images in a column and in its messages"),
    ({"image": "a.png"}, "has the columns images and image; keep one"),
    ({"chosen": SEEN}, "an answer has an image, and the model writes none"),
    ({"images": [3]}, "holds '3', which is no image"),
    ({"images": [""]}, "and the row has 0 images"),
    ({"images": "a.png"}, "not a list with something in it"),
    ({"images": [{"url": "a.png"}]}, "which is no image"),
    ({"prompt": [{"role": "system", "content": "Hi."}]}, "no message of the user"),
    ({"prompt": "user: hue?", "chosen": "red", "rejected": "blue"}, "has 0 places for images"),
    (PART_TURNS, "an answer has an image"),
    ({"images": ["a.png\0"]}, "which is no image"),
    ({"images": None, "image": ["a.png"]}, "which is no image"),
    ({"images": [{"bytes": "iVBO", "path": None}]}, "which is no image"),
])
def test_a_row_whose_images_and_places_do_not_fit_is_an_error(changed, message, tmp_path):
    with pytest.raises(UserError, match=f"row 1: .*{message}|row 1{message}"):
        one_row(tmp_path, **changed)


def test_a_processor_that_refuses_an_image_names_the_row(tmp_path):
    draw(tmp_path / "thin.png", size=(4000, 2))
    row = {"prompt": SPELLED, "chosen": "red", "rejected": "blue", "images": ["thin.png"]}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    message = "row 1: the model's processor cannot use its images: absolute aspect ratio"
    with pytest.raises(UserError, match=message):
        load_rows(model_and_processor("qwen2_vl")[1], path)


def dropped(account):
    return {reason: entry["count"] for reason, entry in account["dropped"].items()}


def test_dialogues_of_which_one_has_a_place_for_the_image_share_no_prompt(tmp_path):
    with pytest.raises(UserError, match=r"none of its 1 rows can be used \(no prompt"):
        one_row(tmp_path, **BOTH_TURNS)


def test_text_that_spells_the_token_of_an_image_is_dropped_with_and_without_an_image(tmp_path):
    rows = image_rows(tmp_path / "images", 8)
    rows[0]["chosen"][0]["content"] = "an <image> of it"
    rows[3]["prompt"][0]["content"] = "what is <image>?"
    processor = model_and_processor("llava")[1]
    _, account = load_rows(processor, write_jsonl(tmp_path / "chat.jsonl", rows))
    assert dropped(account) == {"text that spells the control token <image>": 2}
    rows = image_rows(tmp_path / "images", 8, chat=False)
    rows[0]["rejected"], rows[3]["prompt"] = "an <image> of it", "what is <image>?"
    _, account = load_rows(processor, write_jsonl(tmp_path / "text.jsonl", rows))
    assert dropped(account) == {"text that spells the token of an image": 2}


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
def test_a_prompt_with_images_is_never_cut_and_its_answers_are(mode, tmp_path):
    rows = image_rows(tmp_path / "images", 8)
    for row in rows[:4]:
        row["prompt"][0]["content"] += " and a cat" * 20
    rows[4]["chosen"][0]["content"] = "the cat sat " * 40
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    processor = model_and_processor("llava")[1]
    loaded, account = load_rows(processor, path, data.Limits(64, 40, truncation_mode=mode))
    assert dropped(account) == {"the prompt is too long, and one with images is never cut": 3}
    assert account["noted"]["prompt truncated"]["count"] == 1  # the row without an image
    assert account["noted"]["answers truncated"]["count"] == 1
    for row in loaded:
        count = row["prompt_ids"].count(processor.image_token_id)
        assert count == 4 * len(row["image_paths"])


def test_the_prompt_of_one_text_and_two_images_is_two_prompts(tmp_path):
    for color in ("red", "blue"):
        draw(tmp_path / f"{color}.png", color)
    row = {"prompt": SPELLED, "chosen": "red", "rejected": "blue"}
    rows = [row | {"images": [f"{color}.png"]} for color in ("red", "blue", "red")]
    loaded, _ = load_rows(model_and_processor("llava")[1],
                          write_jsonl(tmp_path / "rows.jsonl", rows))
    keys = loaded["prompt_key"]
    assert keys[0] == keys[2] != keys[1]


def test_a_template_that_reads_parts_alone_gets_parts(tmp_path):
    processor = MAKERS["llava"]()[1]
    start, end = TEMPLATE.index("{% if m["), TEMPLATE.index("{% else %}") + len("{% else %}")
    reads_parts = TEMPLATE[:start] + TEMPLATE[end:].replace("{% endif %}{{ '<eos>'", "{{ '<eos>'")
    processor.tokenizer.chat_template = reads_parts.replace("IMAGE", "<image>")
    rows = image_rows(tmp_path / "images", 4)
    loaded, account = load_rows(processor, write_jsonl(tmp_path / "rows.jsonl", rows))
    assert account["kept"] == 4
    by_both, _ = load_rows(model_and_processor("llava")[1], tmp_path / "rows.jsonl")
    assert loaded["prompt_ids"] == by_both["prompt_ids"]
    assert loaded["answer_ids"] == by_both["answer_ids"]


def test_the_report_shows_the_tokens_of_an_image_as_one(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    data.main(["rows.jsonl", "--model", "llava"])
    assert "'user: [image: 4 tokens]0 " in capsys.readouterr().out


# --- Models ---------------------------------------------------------------------------------------

def test_rows_with_images_are_refused_without_a_processor_and_by_a_model_of_text(
    home, folder, tmp_path, run
):
    make_vlm("llava", tmp_path / "bare", processor=False)
    with pytest.raises(UserError, match="bare: has no processor, neither processor_config.json"):
        run(model=tmp_path / "bare")
    with pytest.raises(UserError, match="row 1: the column 'images' is not read"):
        run(model=folder)
    assert not loading.has_processor(folder)


def test_a_processor_without_a_chat_template_asks_for_one(home, tmp_path, run):
    shutil.copytree(home / "llava", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template; pass one by --chat_template FILE"):
        run(model=tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_text_rows_train_a_vision_model_without_its_processor(kind, tmp_path, run, pairs):
    make_vlm(kind, tmp_path / "model", processor=False)
    out = run(model=tmp_path / "model", dataset=pairs, max_steps=1)
    assert load_model(str(out)).config.model_type == kind


def test_flags_that_images_contradict_are_refused(home, tmp_path, run, pairs, folder):
    with pytest.raises(UserError, match="--attention packed: rows with images are not packed"):
        run(attention="packed")
    with pytest.raises(UserError, match="--sample_every: prompts with images are not answered"):
        run(sample_every=1)
    with pytest.raises(UserError, match="--train_vision: no row of --dataset .* has an image"):
        run(dataset=pairs, train_vision=True)
    with pytest.raises(UserError, match="--train_vision: .* sees no images"):
        run(model=folder, dataset=pairs, train_vision=True)


# --- Runs -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_a_run_does_not_depend_on_micro_batches_and_its_model_loads(kind, home, run, capsys):
    small = run("small", model=home / kind, micro_batch_size=1)
    assert "[image: " in capsys.readouterr().out
    large = run("large", model=home / kind, micro_batch_size=4)
    assert differences(read_metrics(small), read_metrics(large), 1e-7) == []
    losses = [row["loss"] for row in read_metrics(small)]
    assert abs(losses[0] - 0.6931) < 1e-3 and losses[1] != losses[0]
    before, after = load_file(home / kind / "model.safetensors"), load_file(
        small / "model.safetensors")
    tower = {name for name in before if "vision" in name}
    kept = {name for name in before if torch.equal(before[name].double(), after[name].double())}
    assert tower and tower <= kept and len(kept) < len(before) / 2 + len(tower)
    processor = AutoProcessor.from_pretrained(small)
    assert processor.chat_template == TEMPLATE.replace("IMAGE", "<image>")
    saved = AutoModelForImageTextToText.from_pretrained(small)
    inputs = processor(images=[[Image.new("RGB", (30, 30))]], text=["<image> a cat"],
                       return_tensors="pt")
    assert saved(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("optimizer", [{}, {"optimizer": "rmsprop"}], ids=str)
def test_a_run_that_is_resumed_ends_as_an_uninterrupted_one(optimizer, home, tmp_path, run):
    flags = {"save_every": 1, "keep_checkpoints": 1, "lora_rank": 2, "train_vision": True,
             "eval_every": 1, "batch_size": 1, "micro_batch_size": 1, "max_steps": 3, **optimizer}
    rows = [json.loads(line) for line in open(home / "rows.jsonl")]
    # The first steps have no image.
    rows = sorted(rows, key=lambda row: len(row["images"]))
    (tmp_path / "images").symlink_to(home / "images")
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    whole = run("whole", dataset=path, shuffle="false", **flags)
    killed = whole.parent / "killed"
    shutil.copytree(whole, killed)
    unfinished(killed)
    resume(killed)
    assert differences(read_metrics(whole), read_metrics(killed)) == []
    left, right = (load_file(out / "adapter_model.safetensors") for out in (whole, killed))
    assert any("vision" in name for name in left)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_changed_image_stops_the_resume_of_a_run(home, run, tmp_path):
    shutil.copytree(home / "images", tmp_path / "images")
    shutil.copy(home / "rows.jsonl", tmp_path)
    out = run(dataset=tmp_path / "rows.jsonl", save_every=1)
    unfinished(out)
    draw(tmp_path / "images" / "0.png", "gray")
    with pytest.raises(UserError, match="rows"):
        resume(out)


def test_the_cache_of_the_reference_gives_the_run_of_a_second_model(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    live, cached = run("live"), run("cached", ref="cache")
    assert differences(read_metrics(live), read_metrics(cached), 1e-9) == []


SLOW = pytest.mark.slow


@pytest.mark.parametrize("flags", [
    {"loss": "sft"}, {"loss": "kto", "unpair": True}, {"dataset": "text.jsonl", "wpo": True},
    {"gradient_checkpointing": True, "train_vision": True},
    pytest.param({"quantize": "nf4", "lora_rank": 2}, marks=SLOW),
    pytest.param({"dtype": "bfloat16"}, marks=SLOW),
    pytest.param({"tokens_per_micro_batch": 90}, marks=SLOW),
], ids=lambda flags: " ".join(flags))
def test_other_losses_and_options_train_on_images(flags, home, run):
    flags = {"micro_batch_size": None} | flags if "tokens_per_micro_batch" in flags else flags
    if "dataset" in flags:
        flags = flags | {"dataset": home / flags["dataset"]}
    out = run(**({"dtype": "float32", "max_steps": 2} | flags))
    assert all(row["grad_norm"] > 0 for row in read_metrics(out) if row["split"] == "train")


def test_train_vision_trains_the_tower_and_lora_adapts_no_vision_layer_without_it(home, run):
    out = run("tower", train_vision=True)
    before, after = (load_file(path / "model.safetensors") for path in (home / "llava", out))
    changed = {name for name in before if not torch.equal(before[name].double(), after[name])}
    assert any("vision_tower" in name for name in changed)
    assert any("projector" in name for name in changed)
    adapter = load_file(run("adapter", lora_rank=2) / "adapter_model.safetensors")
    assert not any("vision" in name or "projector" in name for name in adapter)


def test_an_adapter_gives_the_same_logits_in_peft(home, run):
    peft = pytest.importorskip("peft")
    out = run(lora_rank=2, dtype="float32")
    processor = AutoProcessor.from_pretrained(out)
    inputs = processor(images=[[Image.new("RGB", (30, 30), "red")]], text=["<image> a cat"],
                       return_tensors="pt")
    base = AutoModelForImageTextToText.from_pretrained(home / "llava").eval()
    plain = base(**inputs).logits
    theirs = peft.PeftModel.from_pretrained(base, out)(**inputs).logits
    train_model = load_model(str(home / "llava"))
    train.load_adapter(train_model, str(out))
    ours = train_model(**inputs).logits
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(ours, plain, atol=1e-3)


def test_an_adapter_is_merged_continued_and_scored_with_the_processor(home, run, tmp_path, capsys):
    out = run(lora_rank=2, dtype="float32")
    model.main(["merge", "--adapter", str(out), "--out", str(tmp_path / "merged")])
    AutoProcessor.from_pretrained(tmp_path / "merged")
    again = run("again", adapter=out, dtype="float32", max_steps=1)
    assert read_metrics(again)[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    sample.main(["--model", str(out), "--score", str(home / "rows.jsonl"),
                 "--out", str(tmp_path / "scores.jsonl")])
    assert len(open(tmp_path / "scores.jsonl").readlines()) == 10
    with pytest.raises(UserError, match="prompts with images are not answered here"):
        sample.main(["--model", str(out), "--dataset", str(home / "rows.jsonl")])


def test_pillow_is_asked_for_where_it_is_missing(home, run, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *more: None if name == "PIL" else find_spec(name, *more))
    with pytest.raises(UserError, match="Pillow, which reads images and is not installed: pip"):
        run()


def test_a_reference_that_sees_images_in_another_way_is_refused(home):
    (vlm, processor), (other, _) = map(model_and_processor, ("llava", "qwen2_vl"))
    rows, _ = load_rows(processor, home / "rows.jsonl")
    args = argparse.Namespace(model="m", ref_model="r", train_vision=False)
    with pytest.raises(UserError, match="--ref_model r: is a qwen2_vl model, and the rows have"):
        train.settle_images(args, lambda: processor, FastLogps(vlm), FastLogps(other), [rows])


def test_a_processor_with_more_to_say_of_each_token_is_refused(home):
    own = model_and_processor("llava")[1]
    rows, _ = load_rows(own, home / "rows.jsonl")

    class Processor:
        image_processor = own.image_processor

        def __call__(self, **inputs):
            outputs = own(**inputs)
            return {**outputs, "cross_attention_mask": outputs["input_ids"][..., None]}

    with pytest.raises(UserError, match="row 1: the model's processor gives cross_attention_mask"):
        vision.outputs_of_row(rows[:1], 0, Processor())


def test_sharded_weights_refuse_rows_without_an_image(home):
    vlm, processor = model_and_processor("llava")
    rows, _ = load_rows(processor, home / "rows.jsonl")
    args = argparse.Namespace(parallel="fsdp", model="m", train_vision=False)
    with pytest.raises(UserError, match="--parallel fsdp: 2 rows have no image"):
        train.settle_images(args, lambda: processor, FastLogps(vlm), None, [rows])


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"train_vision": True}, {}, {"lora_rank": 2},
                                   {"parallel": "fsdp", "train_vision": True},
                                   {"parallel": "fsdp"}], ids=str)
def test_two_processes_train_as_one(flags, home, tmp_path, run):
    rows = image_rows(tmp_path / "images", 10)
    if "parallel" in flags:
        for row in rows:
            path = draw(tmp_path / "images" / "same.png")
            row["images"] = [str(path)]
            row["prompt"][0]["content"] = f"<image>{row['prompt'][0]['content'][-5:]}"
    flags = RUN | flags | {"model": home / "llava", "micro_batch_size": 1,
                           "dataset": write_jsonl(tmp_path / "rows.jsonl", rows)}
    done = run_training(flags | {"output_dir": tmp_path / "two"}, ranks=2)
    assert done.returncode == 0, done.stderr
    one = run("one", **flags | {"parallel": None})
    assert differences(read_metrics(one), read_metrics(tmp_path / "two"), 1e-6) == []


# --- TRL ------------------------------------------------------------------------------------------

def test_log_probs_and_loss_equal_those_of_trl(home, tmp_path):
    trl = pytest.importorskip("trl", minversion="1.0")
    import datasets

    vlm, processor = model_and_processor("llava")
    rows, _ = load_rows(processor, home / "rows.jsonl")
    reference = load_model(make_vlm("llava", tmp_path / "other", seed=1), torch.float64)
    kept = [row for row in map(json.loads, open(home / "rows.jsonl")) if row["images"]]
    places = [i for i in range(len(rows)) if rows[i]["image_paths"]]
    for row in kept:  # TRL puts the images first
        text = row["prompt"][0]["content"].removeprefix("<image>")
        row["prompt"] = [{"role": "user", "content": text}]
        row["images"] = [Image.open(home / path) for path in row["images"]]
    settings = trl.DPOConfig(output_dir=tmp_path / "out", beta=0.1, max_length=None, report_to=[],
                             per_device_train_batch_size=len(kept), use_cpu=True, bf16=False)
    trainer = trl.DPOTrainer(vlm, reference, settings, processing_class=processor,
                             train_dataset=datasets.Dataset.from_list(kept))
    inputs = trainer.data_collator(kept)
    ours = batch_of(rows, places, processor)
    names = ("input_ids", "pixel_values")
    assert all(torch.equal(inputs[name], ours["inputs"][name]) for name in names)
    with torch.no_grad():
        logps = trainer.compute_ref_log_probs(reference, inputs)
        found = dpo.concatenated_forward(FastLogps(reference), ours)["logps"]
        logps = torch.stack(logps, 1).double()
        assert torch.allclose(logps, found, rtol=0, atol=1e-4)
        loss = trainer.compute_loss(vlm, inputs)
        tensors = dpo.preference_logps(FastLogps(vlm), FastLogps(reference), ours,
                                       dpo.LOSSES["sigmoid"])
        losses, _ = dpo.preference_loss(tensors, dpo.LOSSES["sigmoid"], {"beta": 0.1})
    print("difference of log-probs", (logps - found).abs().max().item(),
          "loss", losses.mean().item(), "TRL", loss.item())
    assert abs(losses.mean() - loss) < 1e-4
