"""Encoder-decoders, such as T5 and BART: what the forward is given, and what the logits predict.

The encoder reads a prompt once for all answers of its row. The decoder reads the token that starts
it (`start_id`), then the answer, and never the prompt. For the prompt (5 6 1) of T5, whose EOS is 1
and whose start is 0, with the answers (8 9 1) and (4 1), the last one padded:

    input_ids            5 6 1            of the encoder, once
    decoder_input_ids    0 8 9    0 4 .
    labels               8 9 1    4 1 .   each predicted by the logits at its own position

Some tokenizers put a token in front of each text that is written, such as <s> of BART. The decoder
reads it between its start and the answer, and it is not scored. Rows are padded on the right, and
never packed.

Letters: B rows, N answers, P tokens of the longest prompt, T of the longest answer, V vocabulary.
"""
from typing import Any

import torch
from transformers import PretrainedConfig

import data
from dpo import IGNORE, get_batch_logps
from errors import UserError
from families import family_of
from logps import FastLogps
from packing import padded


class EncoderDecoderLogps(FastLogps):
    """A FastLogps of an encoder-decoder. Its inputs are those of `collate_rows`.

    All logits are computed in full, (N, T, V): T has no tokens of the prompt.
    """
    is_encoder_decoder = True

    def __init__(self, model):
        super().__init__(model)
        self.start = start_id(model.config)

    def forward(self, labels=None, **inputs):
        """The inputs of `logits` and labels (N, T) -> logps (N,), lengths (N,)."""
        if labels is None:
            return self.fast_forward(**inputs)
        return get_batch_logps(self.logits(**inputs), labels, is_encoder_decoder=True)

    def logits(self, input_ids, attention_mask, answer_ids, answer_mask, rows):
        """input_ids and attention_mask (B, P); answer_ids and answer_mask (N, T); rows (N,), the
        index of each answer's prompt -> logits (N, T, V), which predict answer_ids."""
        encoded = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
        # In backward, the gradients of all answers of a row are added up.
        encoded.last_hidden_state = encoded.last_hidden_state.index_select(0, rows)  # (N, P, H)
        start = answer_ids.new_full((len(answer_ids), 1), self.start)
        output = self.model(
            encoder_outputs=encoded,
            attention_mask=attention_mask.index_select(0, rows),
            decoder_input_ids=torch.cat([start, answer_ids[:, :-1]], dim=1),
            decoder_attention_mask=answer_mask,
            use_cache=False,
        )
        return output.logits

    def trial_inputs(self, ids):
        """The same ids (1, T) as the prompt and as the answer."""
        mask, rows = torch.ones_like(ids), ids.new_zeros(1)
        return {"input_ids": ids, "attention_mask": mask, "answer_ids": ids, "answer_mask": mask,
                "rows": rows}

    def read_embeddings(self):
        return self.model.get_decoder().get_input_embeddings()


def logps_module(model) -> FastLogps:
    """Wrap a model in the module of its family."""
    if family_of(model.config) == "encoder_decoder":
        return EncoderDecoderLogps(model)
    return FastLogps(model)


def start_id(config: PretrainedConfig) -> int:
    """Return the token with which the decoder starts, as model.generate chooses it."""
    for name in ("decoder_start_token_id", "bos_token_id"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    raise UserError(f"{config.name_or_path}: its config.json has no decoder_start_token_id, the "
                    "token with which the decoder starts; take config.json from the model that the "
                    "weights belong to")


def decoder_prefix(model, tokenizer: Any) -> list[int]:
    """Return the tokens that the decoder reads before an answer; [] for a model without one."""
    if family_of(model.config) != "encoder_decoder":
        return []
    return [start_id(model.config), *data.target_front(tokenizer)]


def collate_rows(rows: dict, tokenizer: Any, pad: int) -> dict:
    """{column: list} -> the inputs of EncoderDecoderLogps, and labels (N, T).

    The answers are in the order of dpo.concatenated_inputs: all first answers, then all second
    answers, and so on.
    """
    front = data.target_front(tokenizer)
    answers, labels, owners = [], [], []
    for k in range(max(map(len, rows["answer_ids"]))):
        for i, row_answers in enumerate(rows["answer_ids"]):
            if k < len(row_answers):
                answers.append(front + row_answers[k])
                labels.append([IGNORE] * len(front) + data.labels_of_answer(rows, i, k))
                owners.append(i)
    return {
        "input_ids": padded(rows["prompt_ids"], pad),
        "attention_mask": mask_of(rows["prompt_ids"]),
        "answer_ids": padded(answers, pad),
        "answer_mask": mask_of(answers),
        "rows": torch.tensor(owners),
        "labels": padded(labels, IGNORE),
    }


def mask_of(lists: list) -> torch.Tensor:
    """Return the attention mask of lists that are padded on the right."""
    return padded([[1] * len(ids) for ids in lists], 0)
