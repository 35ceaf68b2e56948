"""Agreement with TRL, where TRL is installed: its trainers' methods, on the same logits.

Known differences are claims of their own: label smoothing, and the end of a prompt.
"""
import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import datasets
import pytest
import torch
from conftest import SHARED, make_rows, write_jsonl
from steps import make_batch, preference_step
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import dpo
from logps import FastLogps
from losses import LOSSES, find, hyperparameters, orpo, sigmoid, simpo
from model import save_model

trl = pytest.importorskip("trl", minversion="1.0")

VOCABULARY = 13
ROWS = {
    "id": ["a", "b", "c"],
    "prompt_ids": [[1, 2, 3], [4], [5, 6]],
    "answer_ids": [
        [[7, 8, 0], [2, 0]],
        [[9, 10, 11, 12, 0], [3, 4, 5, 0]],
        [[1, 0], [6, 7, 8, 9, 10, 0]],
    ],
}


class Table(torch.nn.Module):
    """A model with fixed logits (2B, T, V). Gradients are compared at these logits."""

    def __init__(self, seed, shape, requires_grad):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        logits = 2 * torch.randn(*shape, VOCABULARY, generator=generator)
        self.logits = torch.nn.Parameter(logits, requires_grad=requires_grad)
        self.is_gradient_checkpointing = False

    def get_output_embeddings(self):
        """No head, so that logps.py uses the logits of forward()."""
        return None

    def forward(self, input_ids, labels=None, **others):
        """The logits for dpo.py, and the outputs of TRL's fused head: at each position the log-prob
        of the next label, 0 where a token is not scored."""
        logits = self.logits[:len(input_ids)]  # (B, T, V) of the chosen rows for loss sft
        logps = logits[:, :-1].log_softmax(-1)  # (2B, T-1, V)
        targets = input_ids[:, 1:]
        scored = torch.ones_like(targets) if labels is None else labels[:, 1:] != -100
        zeros = torch.zeros(targets.shape)
        return SimpleNamespace(
            logits=logits,
            log_probs=logps.gather(-1, targets[..., None])[..., 0] * scored,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            log_sum_sq_probs=(2 * logps).logsumexp(-1),
        )


BATCH = data.pad_rows(ROWS, 0)
INPUTS = dpo.concatenated_inputs(BATCH)
POLICY = Table(0, INPUTS["input_ids"].shape, True)
REFERENCE = Table(1, INPUTS["input_ids"].shape, False)


def trl_loss_and_gradient(loss_types, weights=None, discopop_tau=None, **settings):
    """DPOTrainer's loss (), and its gradient at the policy's logits."""
    trainer = MagicMock()
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.gather = lambda x: x
    trainer.accelerator.gather_for_metrics = lambda x: x
    trainer.args.discopop_tau = discopop_tau
    defaults = dict(
        beta=0.1, label_smoothing=0.0, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5,
        ld_alpha=None, use_weighting=False, aux_loss_enabled=False, precompute_ref_logps=False,
        model=POLICY, ref_model=REFERENCE, loss_types=loss_types,
        loss_weights=weights or [1.0] * len(loss_types), _total_train_tokens=0, _tp_size=1)
    for name, value in (defaults | settings).items():
        setattr(trainer, name, value)
    inputs = {
        "input_ids": INPUTS["input_ids"],
        "attention_mask": INPUTS["attention_mask"],
        "completion_mask": (INPUTS["labels"] != -100).long(),
    }
    loss = trl.DPOTrainer._compute_loss(trainer, POLICY, inputs, False)
    return loss, torch.autograd.grad(loss, POLICY.logits)[0]


def our_loss_and_gradient(spec, hyper=None, **variants):
    """The mean loss () of preference_step, and its gradient at the policy's logits."""
    policy, reference = FastLogps(POLICY), FastLogps(REFERENCE)
    batch = make_batch(ROWS, **variants) if variants else BATCH
    losses, _ = preference_step(policy, reference, batch, find(spec), hyper, **variants)
    loss = losses.mean()
    return loss, torch.autograd.grad(loss, POLICY.logits)[0]


def agree(left, right):
    """Whether two pairs of loss and gradient are equal up to fp32 rounding."""
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(left, right))


@pytest.mark.parametrize("name", [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
])
def test_loss_and_gradient_on_logits_equal_trl(name):
    settings = hyperparameters(LOSSES[name])
    assert agree(our_loss_and_gradient(name), trl_loss_and_gradient([name], **settings))


def test_mpo_equals_trl():
    ours = our_loss_and_gradient("sigmoid:0.8,bco_pair:0.2,sft:1")
    theirs = trl_loss_and_gradient(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])
    assert agree(ours, theirs)


ALPHA_OF_TRL = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7}  # 1 − α


@pytest.mark.parametrize("our_settings, trl_settings", [
    ({"f_divergence": "js"}, {"f_divergence_type": "js_divergence"}),
    ({"f_divergence": "forward_kl"}, {"f_divergence_type": "forward_kl"}),
    ({"f_divergence": "alpha", "f_alpha": 0.3}, ALPHA_OF_TRL),
    ({"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
    ({"wpo": True}, {"use_weighting": True}),
], ids=["js", "forward_kl", "alpha", "ld_alpha", "wpo"])
def test_a_variant_equals_trl_and_differs_from_plain_dpo(our_settings, trl_settings):
    ours = our_loss_and_gradient("sigmoid", **our_settings)
    assert agree(ours, trl_loss_and_gradient(["sigmoid"], **trl_settings))
    assert not agree(ours, our_loss_and_gradient("sigmoid"))


def test_label_smoothing_changes_the_sigmoid_loss_here_but_trl_does_not_apply_it():
    smoothed = trl_loss_and_gradient(["sigmoid"], label_smoothing=0.3)
    assert agree(smoothed, trl_loss_and_gradient(["sigmoid"]))
    ours = our_loss_and_gradient("sigmoid", {"label_smoothing": 0.3})
    assert not agree(ours, our_loss_and_gradient("sigmoid"))


CHOSEN_LOGPS = torch.tensor([-9.0, -4.0, -30.0])
REJECTED_LOGPS = torch.tensor([-7.0, -20.0, -33.0])
CHOSEN_LENGTHS = torch.tensor([4, 2, 9])
REJECTED_LENGTHS = torch.tensor([3, 8, 9])
SUMS = CHOSEN_LOGPS, REJECTED_LOGPS
MEANS = CHOSEN_LOGPS / CHOSEN_LENGTHS, REJECTED_LOGPS / REJECTED_LENGTHS


def cpo_trainer(loss_type):
    """The attributes that the methods of TRL's CPO and ORPO trainers read."""
    accelerator = SimpleNamespace(device="cpu")
    return SimpleNamespace(alpha=0.0, beta=2.0, simpo_gamma=0.7, label_smoothing=0.1,
                           loss_type=loss_type, accelerator=accelerator)


def test_simpo_equals_trl():
    from trl.experimental.cpo import CPOTrainer
    expected = CPOTrainer.cpo_loss(cpo_trainer("simpo"), *MEANS)[0]
    found = simpo(*SUMS, CHOSEN_LENGTHS, REJECTED_LENGTHS, beta=2.0, gamma=0.7, label_smoothing=0.1)
    assert torch.allclose(found, expected)


def test_cpo_equals_trl_as_the_sigmoid_loss_with_a_zero_reference():
    from trl.experimental.cpo import CPOTrainer
    expected = CPOTrainer.cpo_loss(cpo_trainer("sigmoid"), *SUMS)[0]
    zeros = torch.zeros(3)
    found = sigmoid(*SUMS, zeros, zeros, beta=2.0, label_smoothing=0.1)
    assert torch.allclose(found, expected)


def test_orpo_equals_trl():
    from trl.experimental.orpo import ORPOTrainer
    # TRL subtracts this term from the loss.
    expected = -ORPOTrainer.odds_ratio_loss(cpo_trainer("sigmoid"), *MEANS)[0]
    found = orpo(*SUMS, CHOSEN_LENGTHS, REJECTED_LENGTHS, beta=2.0, nll_weight=0.0)
    assert torch.allclose(found, expected, rtol=1e-5)


@pytest.mark.skipif(not SHARED.exists(), reason="the project's shared data is not here")
@pytest.mark.parametrize("name", ["hh_harmless_512", "instructions_600"])
def test_token_ids_equal_trl_except_that_trl_moves_the_common_start_of_two_answers_into_the_prompt(
        name):
    """Real rows with GPT-2's tokenizer.

    The rows of one file have no prompt column, so the prompt is what both conversations share. TRL
    takes all common text, so two answers that begin alike lose their beginning; this project ends
    the prompt at the last turn. The test counts these rows. Prompt and answer together are equal.
    """
    path = SHARED / "data" / f"{name}.jsonl"
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    limits = data.Limits(max_length=4096)
    rows, _ = data.load_tokens(str(path), tokenizer, limits=limits)
    texts = datasets.Dataset.from_list([json.loads(line) for line in open(path)])
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_end")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    trl_rows = trl.DPOTrainer._prepare_dataset(trainer, texts, tokenizer, settings, "train")

    differing = 0
    for row in rows:
        trl_row = trl_rows[int(row["id"].split("row ")[1]) - 1]
        prompt, trl_prompt = row["prompt_ids"], trl_row["prompt_ids"]
        answers, trl_answers = row["answer_ids"], [trl_row["chosen_ids"], trl_row["rejected_ids"]]
        if (prompt, answers) != (trl_prompt, trl_answers):
            differing += 1
            assert len(trl_prompt) > len(prompt)
        for answer, trl_answer in zip(answers, trl_answers, strict=True):
            assert prompt + answer == trl_prompt + trl_answer
    begin_alike = sum(chosen[0] == rejected[0] for chosen, rejected in rows["answer_ids"])
    assert differing == (0 if "prompt" in texts.column_names else begin_alike)


# --- A mixture of experts -------------------------------------------------------------------------

def test_two_steps_on_a_mixture_of_experts_have_the_router_loss_and_total_loss_of_trl(
        fit, tokenizer, tmp_path):
    """TRL's loss includes the router loss times its coefficient; the loss here is that of the
    pairs. The second step is after an update, so that policy and reference differ."""
    from test_experts import EXPERTS, build
    save_model(build("Mixtral", len(tokenizer), **EXPERTS), tokenizer, tmp_path / "m")
    rows = make_rows(8)
    _, ours = fit(
        model=tmp_path / "m", dataset=write_jsonl(tmp_path / "eight.jsonl", rows), eval_share=0,
        batch_size=8, micro_batch_size=8, max_steps=2, lr=1e-3, lr_schedule="constant",
        warmup_steps=0, attention="padded", router_aux_loss_coef=0.5, beta=0.1, shuffle="false")
    settings = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=2, per_device_train_batch_size=8,
        learning_rate=1e-3, lr_scheduler_type="constant", logging_steps=1, report_to="none",
        router_aux_loss_coef=0.5, beta=0.1, max_length=64, bf16=False, use_cpu=True,
        gradient_checkpointing=False, save_strategy="no")
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32),
        args=settings, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(rows))
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "aux_loss" in row]
    assert len(ours) == len(theirs) == 2
    for our_row, their_row in zip(ours, theirs):
        total = our_row["loss"] + 0.5 * our_row["aux_loss"]
        assert our_row["aux_loss"] == pytest.approx(their_row["aux_loss"], abs=1e-4)
        assert total == pytest.approx(their_row["loss"], abs=1e-4)
