"""Agreement with TRL, where it is installed: its trainers' own methods, on the same logits. Known differences are stated as such."""
import json
from types import SimpleNamespace
from unittest.mock import MagicMock

import datasets
import pytest
import torch
from conftest import SHARED
from transformers import AutoTokenizer

import data
import dpo
from losses import LOSSES, find, hyperparameters, orpo, sigmoid, simpo

trl = pytest.importorskip("trl", minversion="1.0")

VOCABULARY = 13
ROWS = {"id": ["a", "b", "c"], "prompt_ids": [[1, 2, 3], [4], [5, 6]],
        "chosen_ids": [[7, 8, 0], [9, 10, 11, 12, 0], [1, 0]], "rejected_ids": [[2, 0], [3, 4, 5, 0], [6, 7, 8, 9, 10, 0]]}


class Table(torch.nn.Module):
    """A "model" that answers with fixed logits, the leaves that gradients are compared on."""

    def __init__(self, seed, shape, requires_grad):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.nn.Parameter(torch.randn(*shape, VOCABULARY, generator=generator) * 2, requires_grad=requires_grad)
        self.is_gradient_checkpointing = False

    def get_output_embeddings(self):
        return None  # so that the whole model is asked for its logits

    def forward(self, input_ids, labels=None, **others):
        """What dpo.py reads, and what TRL's fused head returns: per position the log-prob of the next label, 0 where it has none."""
        logits = self.logits[:len(input_ids)]  # the chosen rows alone, for a loss that has no pairs
        logp, target = logits[:, :-1].log_softmax(-1), input_ids[:, 1:]
        scored = torch.ones_like(target) if labels is None else labels[:, 1:] != -100
        zero = torch.zeros(target.shape)
        return SimpleNamespace(logits=logits, log_probs=logp.gather(-1, target[..., None])[..., 0] * scored, entropy=zero,
                               mean_logits=zero, is_top1=zero.bool(), log_sum_sq_probs=(2 * logp).logsumexp(-1))


BATCH = data.collate(ROWS, 0)
INPUTS = dpo.concatenated_inputs(BATCH)
POLICY, REFERENCE = Table(0, INPUTS["input_ids"].shape, True), Table(1, INPUTS["input_ids"].shape, False)


def theirs(losses, weights=None, **settings):
    trainer = MagicMock()
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda x: x
    defaults = dict(beta=0.1, label_smoothing=0.0, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, ld_alpha=None,
                    use_weighting=False, aux_loss_enabled=False, precompute_ref_logps=False, model=POLICY, ref_model=REFERENCE,
                    loss_types=losses, loss_weights=weights or [1.0] * len(losses), _total_train_tokens=0, _tp_size=1)
    trainer.args.discopop_tau = settings.pop("discopop_tau", None)
    for name, value in (defaults | settings).items():
        setattr(trainer, name, value)
    inputs = {"input_ids": INPUTS["input_ids"], "attention_mask": INPUTS["attention_mask"], "completion_mask": (INPUTS["labels"] != -100).long()}
    loss = trl.DPOTrainer._compute_loss(trainer, POLICY, inputs, False)
    return loss, torch.autograd.grad(loss, POLICY.logits)[0]


def ours(spec, hyper=None, **variants):
    policy, reference = dpo.SequenceLogps(POLICY), dpo.SequenceLogps(REFERENCE)
    loss = dpo.preference_step(policy, reference, BATCH, find(spec), hyper or {}, **variants)[0].mean()
    return loss, torch.autograd.grad(loss, POLICY.logits)[0]


def agree(a, b):
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(a, b))


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
                                  "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"])
def test_loss_and_gradient_on_logits_equal_trl(name):
    settings = hyperparameters(LOSSES[name])
    assert agree(ours(name), theirs([name], **settings))


def test_mpo_equals_trl():
    assert agree(ours("sigmoid:0.8,bco_pair:0.2,sft:1"), theirs(["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]))


@pytest.mark.parametrize("ours_is, theirs_is", [
    (dict(f_divergence="js"), dict(f_divergence_type="js_divergence")),
    (dict(f_divergence="forward_kl"), dict(f_divergence_type="forward_kl")),
    (dict(f_divergence="alpha", f_alpha=0.3), dict(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=0.7)),  # 1 − α
    (dict(ld_alpha=0.4), dict(ld_alpha=0.4)), (dict(wpo=True), dict(use_weighting=True))])
def test_variants_equal_trl(ours_is, theirs_is):
    assert agree(ours("sigmoid", **ours_is), theirs(["sigmoid"], **theirs_is))
    assert not agree(ours("sigmoid", **ours_is), ours("sigmoid"))


def test_trl_ignores_label_smoothing_for_sigmoid_and_we_do_not():
    assert agree(theirs(["sigmoid"], label_smoothing=0.3), theirs(["sigmoid"]))
    assert not agree(ours("sigmoid", {"label_smoothing": 0.3}), ours("sigmoid"))


def test_cpo_simpo_and_orpo_equal_trl():
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    chosen, rejected, n_w, n_l = torch.tensor([-9.0, -4.0, -30.0]), torch.tensor([-7.0, -20.0, -33.0]), torch.tensor([4, 2, 9]), torch.tensor([3, 8, 9])
    trainer = SimpleNamespace(alpha=0.0, beta=2.0, simpo_gamma=0.7, label_smoothing=0.1, loss_type="simpo",
                              accelerator=SimpleNamespace(device="cpu"))
    expected = CPOTrainer.cpo_loss(trainer, chosen / n_w, rejected / n_l)[0]
    assert torch.allclose(simpo(chosen, rejected, n_w, n_l, beta=2.0, gamma=0.7, label_smoothing=0.1), expected)
    trainer.loss_type = "sigmoid"
    zero = torch.zeros(3)
    assert torch.allclose(sigmoid(chosen, rejected, zero, zero, beta=2.0, label_smoothing=0.1), CPOTrainer.cpo_loss(trainer, chosen, rejected)[0])
    expected = -ORPOTrainer.odds_ratio_loss(trainer, chosen / n_w, rejected / n_l)[0]  # theirs is to be subtracted
    assert torch.allclose(orpo(chosen, rejected, n_w, n_l, beta=2.0, nll_weight=0.0), expected, rtol=1e-5)


@pytest.mark.skipif(not SHARED.exists(), reason="the project's shared data is not here")
@pytest.mark.parametrize("name", ["hh_harmless_512", "instructions_600"])
def test_prompt_and_answer_ids_equal_those_of_trl_except_where_it_moves_the_beginning_of_answers_into_the_prompt(name):
    """Real rows, GPT-2's tokenizer. Where a prompt inside both answers must be found, TRL takes all that the two share, so answers that
    begin alike lose their beginning; we cut back to the turn. These rows are counted, and as whole sequences they are equal too."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    rows, _ = data.load_tokens(str(SHARED / "data" / f"{name}.jsonl"), tokenizer, ("chosen", "rejected"), data.Limits(max_length=4096))
    texts = datasets.Dataset.from_list([json.loads(line) for line in open(SHARED / "data" / f"{name}.jsonl")])
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_end")
    theirs = trl.DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), texts, tokenizer, settings, "train")
    differing = 0
    for row in rows:
        other = theirs[int(row["id"].split("row ")[1]) - 1]
        parts = ("prompt_ids", "chosen_ids", "rejected_ids")
        if any(row[part] != other[part] for part in parts):
            differing += 1
            assert len(other["prompt_ids"]) > len(row["prompt_ids"])
        assert all(row["prompt_ids"] + row[part] == other["prompt_ids"] + other[part] for part in parts[1:])
    begin_alike = sum(row["chosen_ids"][0] == row["rejected_ids"][0] for row in rows)
    assert differing == (0 if "prompt" in texts.column_names else begin_alike)
