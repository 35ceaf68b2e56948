"""Decides the family of a model from its config, once, when it is loaded.

    decoder           prompt and answer are one text, as in Llama: dpo.SequenceLogps
    encoder_decoder   the encoder reads the prompt, the decoder writes the answer, as in T5:
                      encoder_decoder.py
    vision            a decoder whose prompt may have images, as in LLaVA: vision.py. Without images
                      it is computed as a decoder
"""
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
)

from errors import UserError

AUTO_CLASSES = {
    "decoder": AutoModelForCausalLM,
    "encoder_decoder": AutoModelForSeq2SeqLM,
    "vision": AutoModelForImageTextToText,
}


def family_of(config: PretrainedConfig) -> str:
    """Return the family of a model of this config."""
    if getattr(config, "is_encoder_decoder", False):
        return "encoder_decoder"
    return "vision" if sees_images(config) else "decoder"


def sees_images(config: PretrainedConfig) -> bool:
    """Return whether the files of this config hold a model with a vision tower. Some configs have a
    second class, for texts alone: then the config names the class of its files."""
    if getattr(config, "vision_config", None) is None:
        return False
    with_images = AutoModelForImageTextToText._model_mapping.get(type(config), None)
    for_text = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if with_images is None or for_text in (None, with_images):
        return with_images is not None
    return with_images.__name__ in (getattr(config, "architectures", None) or ())


SEQ_2_SEQ = "SEQ_2_SEQ_LM"


def task_type_of(config: PretrainedConfig) -> str:
    """Return the task_type of PEFT's adapter_config.json for an adapter of this model."""
    return SEQ_2_SEQ if family_of(config) == "encoder_decoder" else "CAUSAL_LM"


def family_of_adapter(adapter: dict) -> str:
    """Return the family of the base of an adapter from the entries of its adapter_config.json."""
    return "encoder_decoder" if adapter.get("task_type") == SEQ_2_SEQ else "decoder"


def text_inputs(model, ids) -> dict:
    """Return the inputs of a model for a text of these ids, (N, T)."""
    inputs = {"input_ids": ids}
    if family_of(model.config) == "encoder_decoder":
        inputs["decoder_input_ids"] = ids
    return inputs


def auto_class_of(name: str, config: PretrainedConfig) -> type:
    """Return the class of transformers that loads a model of this config, or raise a UserError if
    no family has such models. `name` is that of the model, for the error."""
    auto_class = AUTO_CLASSES[family_of(config)]
    if type(config) not in auto_class._model_mapping:
        raise UserError(f"{name}: is a {config.model_type} model, which does not answer text by "
                        "text; pass a decoder, such as Llama, or an encoder-decoder, such as T5")
    return auto_class
