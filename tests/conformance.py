"""Compare each loss with other implementations, where they are installed: values and gradients.

    pip install trl liger-kernel
    pip install --no-deps llamafactory torchtune
    python tests/conformance.py > docs/conformance.md

64 random pairs in float64. A cell has the largest relative difference of the mean loss and of its
gradient, each relative to its largest value. test_conformance.py compares the file with new
measurements, and requires a reason for every difference. What each function of another project
takes (sums or averages, one gamma or another) is translated here; the rest is their code.
"""
import ast
import collections
import datetime
import importlib
import importlib.metadata
import importlib.util
import inspect
import pathlib
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from losses import find, hyperparameters, kind_of, tensor_arguments

PAIRS = 64
KL = 1.5  # the mean log-ratio of mismatched prompts and answers
ROUNDING = 1e-6  # a larger difference is no rounding: TRL and Liger compute parts in float32
PACKAGES = {
    "TRL": "trl",
    "TRL experimental": "trl",
    "Liger": "liger_kernel",
    "torchtune": "torchtune",
    "LLaMA-Factory": "llamafactory",
}


# --- The pairs, and our losses --------------------------------------------------------------------

def make_pairs():
    """The tensors (PAIRS,) that losses take, and the two log-probs of which gradients are taken."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high):
        return low + (high - low) * torch.rand(PAIRS, generator=generator, dtype=torch.float64)

    lengths = torch.randint(3, 40, (2, PAIRS), generator=generator)
    average, shift = uniform(-2.5, -0.5), uniform(-0.15, 0.15)
    tensors = {
        "policy_chosen_logps": average * lengths[0],
        "policy_rejected_logps": uniform(-2.5, -0.5) * lengths[1],
        "chosen_lengths": lengths[0],
        "rejected_lengths": lengths[1],
        "chosen_scores": uniform(1.0, 2.0),
        "rejected_scores": uniform(-1.0, 0.5),
    }
    tensors["ref_chosen_logps"] = tensors["policy_chosen_logps"] + shift * lengths[0]
    drift = uniform(-0.15, 0.15) * lengths[1]
    tensors["ref_rejected_logps"] = tensors["policy_rejected_logps"] + drift
    for name in ("policy_chosen_logps", "policy_rejected_logps"):
        tensors[name].requires_grad_()
    return tensors


def ours(spec, tensors, hyper):
    loss = find(spec)
    if kind_of(loss) == "labels":
        tensors = as_answers(tensors)
    given = {name: tensors[name] for name in tensor_arguments(loss) if name in tensors}
    return loss(**given, **hyperparameters(loss) | hyper).mean()


def as_answers(tensors):
    """Chosen answers as good ones, then rejected answers as bad ones, and kl. (2 * PAIRS,)"""
    return {"policy_logps": torch.cat(sums(tensors)), "ref_logps": torch.cat(references(tensors)),
            "labels": torch.arange(2 * PAIRS) < PAIRS, "kl": KL}


def sums(tensors):
    return tensors["policy_chosen_logps"], tensors["policy_rejected_logps"]


def references(tensors):
    return tensors["ref_chosen_logps"], tensors["ref_rejected_logps"]


def averages(tensors):
    lengths = tensors["chosen_lengths"], tensors["rejected_lengths"]
    return [logps / length for logps, length in zip(sums(tensors), lengths)]


# --- TRL ------------------------------------------------------------------------------------------

class TokenLogps(torch.nn.Module):
    """A model whose output has the log-probs of tokens: each token of an answer has the same."""

    def __init__(self, chosen, rejected, lengths):
        super().__init__()
        self.logps, self.lengths = torch.cat([chosen, rejected]), lengths  # (2B,)
        self.is_gradient_checkpointing = False

    def forward(self, input_ids, **others):
        scored = torch.arange(input_ids.shape[1] - 1) < self.lengths[:, None]  # (2B, T-1)
        zeros = torch.zeros(scored.shape)
        logps = (self.logps / self.lengths)[:, None] * scored
        return SimpleNamespace(log_probs=logps, entropy=zeros, mean_logits=zeros,
                               is_top1=zeros.bool(), log_sum_sq_probs=zeros, logits=zeros)


def trl_trainer(tensors, settings):
    """A trainer with the attributes that TRL's losses read, and the inputs of its losses."""
    lengths = torch.cat([tensors["chosen_lengths"], tensors["rejected_lengths"]])
    width = int(lengths.max()) + 1
    places = torch.arange(width)
    mask = (places >= 1) & (places <= lengths[:, None])  # (2B, T)
    inputs = {"input_ids": torch.ones(mask.shape, dtype=torch.long),
              "attention_mask": torch.ones(mask.shape, dtype=torch.long),
              "completion_mask": mask.long()}
    trainer = MagicMock()
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda x: x
    models = dict(model=TokenLogps(*sums(tensors), lengths),
                  ref_model=TokenLogps(*references(tensors), lengths))
    for name, value in (models | settings).items():
        setattr(trainer, name, value)
    return trainer, inputs


def trl_dpo(names, tensors, hyper, weights=None):
    """DPOTrainer's mean loss."""
    import trl
    settings = dict(
        beta=0.1, label_smoothing=0.0, f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5,
        ld_alpha=None, use_weighting=False, aux_loss_enabled=False, precompute_ref_logps=False,
        loss_types=names, loss_weights=weights or [1.0] * len(names), _total_train_tokens=0,
        _tp_size=1)
    trainer, inputs = trl_trainer(tensors, settings | hyper)
    trainer.args.discopop_tau = hyper.get("discopop_tau")
    return trl.DPOTrainer._compute_loss(trainer, trainer.model, inputs, False)


def trl_kto(kind, tensors, hyper):
    """KTOTrainer's mean loss, where the mismatched answers have a log-ratio of KL."""
    import trl
    settings = dict(
        loss_type=kind, calculate_KL=kind == "kto", aux_loss_enabled=False,
        precompute_ref_logps=False, _total_train_tokens=0, _tp_size=1,
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)))
    trainer, inputs = trl_trainer(tensors, settings | hyper)
    mismatched = {trainer.model: torch.full((2 * PAIRS,), KL), trainer.ref_model: torch.zeros(1)}
    trainer._compute_kl_logps = lambda model, batch: mismatched[model]
    inputs["label"] = as_answers(tensors)["labels"]
    return trl.KTOTrainer._compute_loss(trainer, trainer.model, inputs, False)


def trl_cpo(kind, logps, hyper):
    from trl.experimental.cpo import CPOTrainer
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), loss_type=kind,
                              label_smoothing=hyper.get("label_smoothing", 0.0),
                              beta=hyper["beta"], simpo_gamma=hyper.get("gamma"),
                              alpha=hyper.get("alphapo_alpha", 0.0))
    return CPOTrainer.cpo_loss(trainer, *logps)[0].mean()


def trl_orpo(tensors, hyper):
    from trl.experimental.orpo import ORPOTrainer
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=hyper["beta"])
    return -ORPOTrainer.odds_ratio_loss(trainer, *averages(tensors))[0].mean()


# --- Liger, torchtune, LLaMA-Factory --------------------------------------------------------------

def liger(kind, logps, hyper, ref=()):
    module = importlib.import_module(f"liger_kernel.chunked_loss.{kind.lower()}_loss")
    function = getattr(module, f"LigerFusedLinear{kind}Function").preference_loss_fn
    known = inspect.signature(function).parameters
    named = {name: value for name, value in hyper.items() if name in known}
    target = torch.zeros(2 * PAIRS, 1)  # of which only the number of rows is read
    return function(*logps, target, *ref, **named)[0]


def torchtune(name, tensors, **hyper):
    import torchtune.rlhf.loss
    module = getattr(torchtune.rlhf.loss, name)(**hyper)
    return module(*sums(tensors), *references(tensors))[0].mean()


def llama_factory(method, tensors, **attributes):
    """A method of its DPO trainer, taken out of the file: the module imports all of the project."""
    package = pathlib.Path(importlib.util.find_spec("llamafactory").origin).parent
    tree = ast.parse((package / "train" / "dpo" / "trainer.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    function, = [node for node in functions if node.name == method]
    scope = {"torch": torch, "F": F}
    exec(compile(ast.Module([function], []), "llamafactory", "exec"), scope)
    return scope[method](SimpleNamespace(**attributes), *averages(tensors)).mean()


# --- What is compared -----------------------------------------------------------------------------

TRL_LOSSES = ["sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
              "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"]
LIGER_LOSSES = ["sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard",
                "apo_zero", "apo_down", "discopop"]
CDPO = {"label_smoothing": 0.2}
SIMPO = {"beta": 2.0, "gamma": 0.7}
SMOOTH = {"beta": 0.1, "label_smoothing": 0.2, "cpo_alpha": 0.0}
ORPO = {"beta": 0.1, "nll_weight": 0.0}
ALPHAPO = {"beta": 2.5, "gamma": 0.1, "alphapo_alpha": 0.25}
KTO = {"beta": 0.1, "desirable_weight": 1.3, "undesirable_weight": 0.7}
MPO = "sigmoid:0.8,bco_pair:0.2,sft:1"


def list_cases() -> list:
    """(row, our loss, our hyper-parameters, project, function of the tensors)"""
    cases = []

    def add(row, spec, hyper, project, function):
        cases.append((row, spec, hyper, project, function))

    for name in TRL_LOSSES:
        hyper = hyperparameters(find(name))
        add(name, name, hyper, "TRL", lambda t, n=name, h=hyper: trl_dpo([n], t, h))
    add("sigmoid, label smoothing", "sigmoid", CDPO, "TRL",
        lambda t: trl_dpo(["sigmoid"], t, CDPO))
    add("MPO", MPO, {}, "TRL",
        lambda t: trl_dpo(["sigmoid", "bco_pair", "sft"], t, {}, [0.8, 0.2, 1.0]))
    for name in ("kto", "apo_zero_unpaired"):
        add(name, name, KTO, "TRL", lambda t, n=name: trl_kto(n, t, KTO))
    for name in LIGER_LOSSES:
        hyper = hyperparameters(find(name))
        add(name, name, hyper, "Liger",
            lambda t, h=hyper, n=name: liger("DPO", sums(t), h | {"loss_type": n}, references(t)))
    add("sigmoid, label smoothing", "sigmoid", CDPO, "Liger",
        lambda t: liger("DPO", sums(t), CDPO, references(t)))
    add("sigmoid", "sigmoid", {}, "torchtune", lambda t: torchtune("DPOLoss", t))
    add("sigmoid, label smoothing", "sigmoid", CDPO, "torchtune",
        lambda t: torchtune("DPOLoss", t, **CDPO))
    add("hinge", "hinge", {"beta": 0.05}, "torchtune",
        lambda t: torchtune("RSOLoss", t, gamma=0.05))
    add_reference_free(add)
    return cases


def add_reference_free(add):
    add("cpo, preference term", "cpo", SMOOTH, "TRL experimental",
        lambda t: trl_cpo("sigmoid", sums(t), SMOOTH))
    add("cpo, preference term", "cpo", SMOOTH, "Liger", lambda t: liger("CPO", sums(t), SMOOTH))
    add("simpo", "simpo", SIMPO, "TRL experimental", lambda t: trl_cpo("simpo", averages(t), SIMPO))
    add("simpo", "simpo", SIMPO, "Liger", lambda t: liger("SimPO", averages(t), SIMPO))
    add("simpo", "simpo", SIMPO, "LLaMA-Factory",
        lambda t: llama_factory("simpo_loss", t, beta=2.0, simpo_gamma=0.7))
    add("alphapo", "alphapo", ALPHAPO, "TRL experimental",
        lambda t: trl_cpo("simpo", averages(t), ALPHAPO))
    add("orpo, odds ratio", "orpo", ORPO, "TRL experimental", lambda t: trl_orpo(t, ORPO))
    add("orpo, odds ratio", "orpo", ORPO, "Liger", lambda t: liger("ORPO", averages(t), ORPO))
    add("orpo", "orpo", {"beta": 0.1}, "LLaMA-Factory",
        lambda t: llama_factory("odds_ratio_loss", t, beta=0.1))


# Why a cell is not 0. Checked: each of these differences exists, and no other.
REASONS = {
    ("sigmoid, label smoothing", "TRL"): "ignores label smoothing here",
    ("sigmoid, label smoothing", "Liger"): "ignores label smoothing here",
    ("orpo", "LLaMA-Factory"): "averages the likelihood of each answer; we average over the tokens "
                               "of the batch",
}


def difference(case) -> float:
    """The largest difference of value and gradient, relative to the largest of each."""
    _, spec, hyper, _, function = case
    results = []
    for compute in (lambda t: ours(spec, t, hyper), function):
        tensors = make_pairs()
        value = compute(tensors)
        gradients = torch.autograd.grad(value, sums(tensors), allow_unused=True)
        filled = [torch.zeros(PAIRS) if gradient is None else gradient for gradient in gradients]
        results.append((value.detach(), torch.cat(filled)))
    gaps = [(left - right).abs().max() / left.abs().max() for left, right in zip(*results)]
    return float(max(gaps))


def is_installed(project) -> bool:
    return importlib.util.find_spec(PACKAGES[project]) is not None


def measure() -> dict:
    """{(row, project): difference} for the projects that are installed."""
    return {(case[0], case[3]): difference(case) for case in list_cases() if is_installed(case[3])}


def cell(found, row, project) -> str:
    if (row, project) not in found:
        return ""
    value = found[row, project]
    return f"{value:.0e}" if value else "0"


def version(project) -> str:
    return f"{project} {importlib.metadata.version(PACKAGES[project].replace('_', '-'))}"


def table(found) -> str:
    projects = [project for project in PACKAGES if is_installed(project)]
    lines = ["| loss | " + " | ".join(version(project) for project in projects) + " |",
             "|---" * (1 + len(projects)) + "|"]
    for row in dict.fromkeys(row for row, _ in found):
        cells = [cell(found, row, project) for project in projects]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    print(f"""# Agreement with other implementations

`python tests/conformance.py` prints this page ({datetime.date.today()}, torch {torch.__version__},
CPU), and `tests/test_conformance.py` compares it with new measurements. Each cell is the largest
difference between our mean loss or its gradient and theirs, over 64 random pairs in float64,
relative to the largest value. An empty cell: not compared. Differences up
to 1e-6 are rounding, since TRL and Liger compute parts in float32.

The comparison translates what goes in: averages or sums of log-probs, each project's own gamma.
`bco_pair` is compared at δ = 0, because TRL and Liger leave δ out; `cpo` and one row of `orpo`
without their likelihood term. `kto` and `apo_zero_unpaired` get the 64 pairs as 128 answers with
labels, and `kto` the same mean log-ratio of mismatched answers, which is not estimated here.

{table(measure())}

Differences beyond rounding:
""")
    for (row, project), reason in REASONS.items():
        print(f"- {row}, {project}: {reason}.")


if __name__ == "__main__":
    main()
