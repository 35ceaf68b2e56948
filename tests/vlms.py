"""Tiny vision-language models with real processors, and rows with drawn images, for the tests.

    folder = make_vlm("llava", path)        a model folder: "llava", "idefics3", "gemma3"
    rows = image_rows(path, 6)              rows whose chosen answer names the color of their image

Idefics3 splits an image into tiles; LLaVA has one size of images. `Flattened` is a processor like
that of Qwen2-VL, which needs torchvision for its videos: its pixels are patches of all images.
Gemma3 has a token of its own for the place of an image.
"""
import torch
import transformers
from conftest import make_rows, make_tokenizer
from PIL import Image, ImageDraw
from tokenizers import AddedToken

import model as models

COLORS = ("red", "green", "blue", "white")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}"
    "{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "initializer_range": 0.1}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "image_size": 28, "patch_size": 14}


def tokenizer_with(*tokens):
    tokenizer = make_tokenizer()
    special = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", tokens[0])
    return tokenizer


def llava():
    tokenizer = tokenizer_with("<image>")
    pixels = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = transformers.LlavaProcessor(
        pixels, tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=tokenizer.chat_template)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**TOWER),
        text_config=transformers.LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        image_token_id=processor.image_token_id, image_seq_length=4)
    return config, processor


def idefics3():
    places = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    tokenizer = tokenizer_with("<image>", "<fake_token_around_image>", "<end_of_utterance>",
                               "<global-img>", *places)
    pixels = transformers.Idefics3ImageProcessorPil(
        size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = transformers.Idefics3Processor(
        pixels, tokenizer, image_seq_len=1, chat_template=tokenizer.chat_template)
    config = transformers.Idefics3Config(
        vision_config=TOWER, scale_factor=2, image_token_id=processor.image_token_id,
        text_config=transformers.LlamaConfig(vocab_size=len(tokenizer), **TEXT),
        pad_token_id=tokenizer.pad_token_id)
    return config, processor


class Flattened:
    """What Qwen2VLProcessor does with images, without its videos."""
    image_token = "<|image_pad|>"

    def __init__(self):
        self.tokenizer = tokenizer_with(self.image_token, "<|vision_start|>")
        self.image_token_id = self.tokenizer.convert_tokens_to_ids(self.image_token)
        self.image_processor = transformers.Qwen2VLImageProcessorPil(
            min_pixels=28 * 28, max_pixels=56 * 56, patch_size=14, merge_size=2)

    def to_dict(self):
        return self.image_processor.to_dict()

    def __call__(self, images, text, add_special_tokens, return_tensors):
        outputs = self.image_processor(images[0], return_tensors=return_tensors)
        string = text[0]
        for grid in outputs["image_grid_thw"]:
            count = int(grid.prod()) // 4
            string = string.replace(self.image_token, "\0" * count, 1)
        string = string.replace("\0", self.image_token)
        ids = self.tokenizer([string], add_special_tokens=add_special_tokens,
                             return_tensors=return_tensors)["input_ids"]
        types = (ids == self.image_token_id).long()
        return {"input_ids": ids, "mm_token_type_ids": types, **outputs}


def qwen2_vl():
    processor = Flattened()
    text = TEXT | {"vocab_size": len(processor.tokenizer), "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    config = transformers.Qwen2VLConfig(
        text_config=text, image_token_id=processor.image_token_id,
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2,
                       "mlp_ratio": 2, "patch_size": 14, "spatial_merge_size": 2})
    return config, processor


def gemma3():
    """Marks its images by token_type_ids: within an image, attention goes in both directions."""
    tokenizer = tokenizer_with("<start_of_image>", "<image_soft_token>", "<end_of_image>")
    tokenizer._set_model_specific_special_tokens({
        "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>"})
    pixels = transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    processor = transformers.Gemma3Processor(
        pixels, tokenizer, image_seq_length=4, chat_template=tokenizer.chat_template)
    text = TEXT | {"vocab_size": len(tokenizer), "head_dim": 16, "sliding_window": 16}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=TOWER, mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id, boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id)
    return config, processor


def is_available(make):
    """Some image processors of older transformers need torchvision."""
    try:
        make()
    except ImportError:
        return False
    return True


MAKERS = {"llava": llava, "idefics3": idefics3, "qwen2_vl": qwen2_vl, "gemma3": gemma3}
MAKERS = {kind: make for kind, make in MAKERS.items() if is_available(make)}


def make_vlm(kind, path, seed=0, processor=True):
    """Save a model with random weights and its processor -> the folder."""
    config, own = MAKERS[kind]()
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    models.save_model(model, own if processor else own.tokenizer, path)
    return str(path)


def draw(path, color="red", size=(40, 30), spot=(5, 5), mode="RGB", **options):
    """Draw an image of one color with a black spot, and save it."""
    image = Image.new("RGB", size, color)
    ImageDraw.Draw(image).rectangle((*spot, spot[0] + 6, spot[1] + 6), fill="black")
    image.convert(mode).save(path, **options)
    return path


def image_rows(folder, count, chat=True, seed=0):
    """Rows with an image each, of several sizes, below `folder`, except every fourth row, which
    has none."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, row in enumerate(make_rows(count, seed)):
        color, other = COLORS[i % 4], COLORS[(i + 1) % 4]
        question = row["prompt"]
        row |= {"chosen": f" {row['chosen']} {color}", "rejected": f" {row['rejected']} {other}"}
        row["images"] = []
        if i % 4 != 3:
            path = draw(folder / f"{i}.png", color, (30 + 10 * (i % 3), 40), (i % 20, 3))
            row["images"] = [str(path.relative_to(folder.parent))]
            question = f"<image>{question}"
        row["prompt"] = question
        if chat:
            row["prompt"] = [{"role": "user", "content": question}]
            for side in ("chosen", "rejected"):
                row[side] = [{"role": "assistant", "content": row[side]}]
        rows.append(row)
    return rows
