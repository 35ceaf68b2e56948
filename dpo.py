"""DPO in one sitting: pairs -> log-probs -> the loss of each pair -> gradients -> the next update.

    python dpo.py                                             # SFT, then DPO, in the embedded world
    python dpo.py --model ./sft-model --dataset pairs.jsonl   # DPO on your own model and pairs

`train`, the loop, calls preference_logps (log-probs of both answers under policy and reference) and
preference_loss (losses.py, and metrics). train.py calls them too. It adds micro-batches, bfloat16,
many GPUs, LoRA, held-out rows, saved models, and the faster log-probs of packing.py and logps.py.

A batch comes from data.pad_rows: right-padded tensors input_ids, attention_mask and labels,
(B, K, T) each. Here a row is a pair: K = 2, and [:, 0] is the chosen answer, [:, 1] the rejected.
answers.py has what other kinds of rows need.

Letters: B rows, K answers of a row, N answers in all (2B for pairs), T tokens, V vocabulary.
"""
from errors import Parser, UserError, run_script  # first, see errors.py
import functools
import math

import torch
import torch.nn.functional as F

import data
import world
from families import family_of
from loading import load_tokenizer
from losses import (
    LOSSES,
    hyperparameters,
    needs_of,
    needs_reference,
    sides_of,
    tensor_arguments,
)
from model import load_model
from optimizers import learning_rate_factor
from ranges import real_number, whole_number

IGNORE = -100  # label of a token that is not scored, as in torch and transformers
INPUTS = ("input_ids", "attention_mask", "labels")
# For a model of your own. Good learning rates are 1e-7 to 1e-6, good betas 0.01 to 0.5.
SETTINGS = {"lr": 5e-7, "lr_schedule": "linear", "batch_size": 8, "epochs": 1, "beta": 0.1}


def get_batch_logps(logits, labels, label_pad_token_id=IGNORE, is_encoder_decoder=False):
    """Sum of the log-probs of each row's scored tokens, and the number of these tokens.

    Args      logits (B, T, V); labels (B, T): input ids, or label_pad_token_id if not scored;
              is_encoder_decoder: the logits at position t predict the label at t
    Returns   logps (B,), sums in fp32 or better and never averages; lengths (B,) integers
    Example   The logits at position t predict the label at t + 1, so the first label and the last
              logits are not used:

                  input_ids   prompt  answer  EOS    pad
                  labels       -100   answer  EOS   -100
                  scored               answer, by the prompt's logits, and EOS, by the answer's
                  lengths = 2
    """
    if logits.shape[:-1] != labels.shape:
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"logits are (B, T, V) and labels (B, T), got {shapes}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    labels = labels if is_encoder_decoder else labels[:, 1:]  # (B, T-1), or (B, T)
    logits = logits[:, :labels.shape[1]].to(dtype)  # (B, T-1, V), or (B, T, V)
    # −log π(label) at each position, and 0 where the label is label_pad_token_id.
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none",
                          ignore_index=label_pad_token_id)  # (B(T-1),)
    logps = -nll.view(labels.shape).sum(-1)
    lengths = (labels != label_pad_token_id).sum(-1)
    return logps, lengths


class SequenceLogps(torch.nn.Module):
    """Wraps a causal LM so that forward() returns the results of `get_batch_logps`.

    All of it runs in one forward of one module, because DDP and FSDP put their hooks there.
    encoder_decoder.py has that of an encoder-decoder.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, labels=None, **inputs):
        """input_ids, attention_mask and labels (N, T) -> logps (N,), lengths (N,)."""
        if labels is None:  # the second path of a subclass, logps.FastLogps
            return self.fast_forward(**inputs)
        logits = self.model(**inputs, use_cache=False).logits  # (N, T, V)
        return get_batch_logps(logits, labels)


def concatenated_inputs(batch):
    """The answers as rows of one batch: all first answers, then all second answers, and so on. Of
    pairs these are the B chosen answers, then the B rejected. In a batch of batches.py this is done
    already.

    input_ids, attention_mask and labels (B, K, T); mask (B, K), False for a missing answer
    -> input_ids, attention_mask and labels (N, T)
    """
    if "inputs" in batch:
        return batch["inputs"]
    exists = batch["mask"].T  # (K, B)
    return {name: batch[name].transpose(0, 1)[exists] for name in INPUTS}  # (N, T) each


def concatenated_forward(model, batch, **options):
    """All answers in one forward of a SequenceLogps -> logps, lengths and, with alignment=True (for
    WPO, see logps.FastLogps), alignment: (B, K) each, 0 where a row has no k-th answer.

    One forward has half the overhead of two. DDP expects one before each backward.
    """
    rows, answers = batch["mask"].shape
    outputs = model(**concatenated_inputs(batch), **options)  # (N,) each
    tables = {}
    for name, values in zip(("logps", "lengths", "alignment"), outputs):
        flat = values.new_zeros(answers * rows).index_copy(0, batch["places"], values)
        tables[name] = flat.view(answers, rows).T  # (B, K)
    return tables


def preference_logps(policy, reference, batch, loss, reference_free=False, name_tensors=None,
                     **options):
    """All tensors that a loss may take from a batch -> {name: (B,)}, as `pair_tensors` names them.

    policy, reference   SequenceLogps, or a wrapper of one. The reference is not called if its
                        log-probs are in the batch. They are zeros if the loss has no `ref_*`
                        arguments, or with reference_free
    batch               optionally with scores and the cached ref_logps, (B, K) each
    name_tensors        in place of pair_tensors, for other rows than pairs: see answers.py
    """
    tables = {name: batch[name] for name in ("scores", "ref_logps") if name in batch}
    # The reference runs first, so that its activations are freed before the policy's exist.
    reads_reference = needs_reference(loss) and not reference_free
    if reads_reference and "ref_logps" not in tables:
        with torch.no_grad():
            tables["ref_logps"] = concatenated_forward(reference, batch)["logps"]
    # Only the policy's log-probs have a graph.
    tables |= concatenated_forward(policy, batch, **options)
    tables["policy_logps"] = logps = tables.pop("logps")
    if reference_free or "ref_logps" not in tables:
        tables["ref_logps"] = torch.zeros_like(logps)
    tables["ref_logps"] = tables["ref_logps"].to(logps.dtype)
    return (name_tensors or pair_tensors)(tables, batch, loss)


def pair_tensors(tables, batch, loss):
    """Split (B, 2) tables by side, as the arguments of a loss: policy_logps become
    policy_chosen_logps and policy_rejected_logps, lengths chosen_lengths and rejected_lengths."""
    tensors = {name: batch[name] for name in ("weight",) if name in batch}
    for name, table in tables.items():
        owner, _, quantity = name.rpartition("_")  # "policy" and "logps", or "" and "lengths"
        for k, side in enumerate(sides_of(loss)):
            tensors[f"{owner}_{side}_{quantity}".lstrip("_")] = table[:, k]
    return tensors


def preference_loss(tensors, loss, hyper, score=None):
    """The loss of each pair (B,) with a graph, and its metrics, {name: (B,)}, without.

    tensors   from `preference_logps`; the loss gets those that its signature names
    hyper     {name: value} of keyword-only arguments of the loss that are not its defaults
    score     f-DPO: a function that replaces the log-probs in `tensors`, see variants.py
    Example   losses, metrics = preference_loss(tensors, LOSSES["sigmoid"], {"beta": 0.1})
    """
    logps = {f"logps/{side}": tensors[f"policy_{side}_logps"] for side in sides_of(loss)}
    if score:
        tensors = score(tensors)
    hyper = hyperparameters(loss) | hyper
    inputs = {name: tensors[name] for name in tensor_arguments(loss) if name in tensors}
    losses = loss(**inputs, **hyper)  # (B,)
    if "weight" in tensors:  # a column of the data
        losses = losses * tensors["weight"].to(losses.dtype)
    metrics = {"loss": losses} | logps
    if len(logps) == 2:
        metrics |= rewards(loss, tensors, hyper.get("beta", 1.0))
    return losses, {name: value.detach() for name, value in metrics.items()}


def rewards(loss, tensors, beta):
    """{metric: (B,)}: beta times the log-ratio of policy to reference in nats (the log-prob where
    the reference is zeros), per token where the loss averages. A tie does not count as accurate."""
    chosen = beta * (tensors["policy_chosen_logps"] - tensors["ref_chosen_logps"])
    rejected = beta * (tensors["policy_rejected_logps"] - tensors["ref_rejected_logps"])
    if "average" in loss.tags:
        chosen = chosen / tensors["chosen_lengths"]
        rejected = rejected / tensors["rejected_lengths"]
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
    }


def train(policy, reference, rows, tokenizer, loss, hyper, settings, steps):
    """Train on rows of data.load_tokens, and yield the metrics of each step.

    settings   lr, lr_schedule, batch_size, and optionally warmup_steps (default: steps // 10)
    """
    device = policy.model.device
    pad = tokenizer.pad_token_id or 0  # masked, whatever it is
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings["lr"], weight_decay=0.0)
    factor = functools.partial(learning_rate_factor, schedule=settings["lr_schedule"],
                               warmup=settings.get("warmup_steps", steps // 10), steps=steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(steps):
        # The next pairs, in the random order of this epoch.
        indices = data.window(step, len(rows), settings["batch_size"], seed=0, shuffle=True)
        batch = data.pad_rows(rows[indices], pad)
        batch = {name: value.to(device) for name, value in batch.items() if name != "id"}

        # Log-probs under policy and reference, the loss of each pair, the gradient of their mean.
        tensors = preference_logps(policy, reference, batch, loss)
        losses, metrics = preference_loss(tensors, loss, hyper)
        losses.mean().backward()

        # Clip the gradient to norm 1, and raise an error if it is not finite. Then update.
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        yield metrics | {"grad_norm": norm}


# --- python dpo.py --------------------------------------------------------------------------------

def train_sft(model, rows, tokenizer):
    """Train the reference policy of the world, by SFT on its texts."""
    policy, settings = SequenceLogps(model), world.SFT
    steps = settings["epochs"] * math.ceil(len(rows) / settings["batch_size"])
    for _ in train(policy, None, rows, tokenizer, LOSSES["sft"], {}, settings, steps):
        pass
    return policy


def main(argv):
    parser = Parser(description="SFT, then DPO, in the world; or DPO on your own")
    parser.add_argument("--model", help="a folder, or a name on the Hub (default: the world's)")
    parser.add_argument("--dataset", help="pairs, as train.py reads them (default: the world's)")
    parser.add_argument("--beta", type=real_number("> 0"), help="default: 0.1, or 1")
    parser.add_argument("--steps", type=whole_number(">= 1"), help="default: 1 epoch, or 2")
    args = parser.parse_args(argv)  # the second defaults are those of the world
    if bool(args.model) != bool(args.dataset):
        parser.error("give both --model and --dataset, or neither for the world")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings, home, source, dataset = SETTINGS, None, args.model, args.dataset
    if not source:
        settings, home = world.FLAGS, world.make(train_sft, device)
        source, dataset = str(home / "reference"), str(home / "pairs.jsonl")

    # Policy and reference start from the same weights; only the policy gets an optimizer.
    tokenizer = load_tokenizer(source)
    policy = SequenceLogps(load_model(source, device=device))
    if family_of(policy.model.config) == "encoder_decoder":
        raise UserError(f"--model {source}: is no decoder; train it by train.py")
    reference = SequenceLogps(load_model(source, device=device))
    positions = getattr(policy.model.config, "max_position_embeddings", 1024)
    limits = data.Limits(min(1024, positions))  # tokens of prompt and answer
    rows, account = data.load_tokens(dataset, tokenizer, needs_of(LOSSES["sigmoid"]), limits)
    print(data.describe(account))
    hyper = {"beta": args.beta or settings["beta"]}
    steps = args.steps or settings["epochs"] * math.ceil(len(rows) / settings["batch_size"])
    updates = train(policy, reference, rows, tokenizer, LOSSES["sigmoid"], hyper, settings, steps)
    for step, metrics in enumerate(updates, 1):
        if step % 64 and step < steps:
            continue
        means = {name: value.mean().item() for name, value in metrics.items()}
        print(f"step {step} train: {world.brief(means)}")
        if home:
            values = world.evaluate_policy(policy, home, tokenizer, hyper["beta"], device)
            print(f"step {step} world: {world.brief(values)}")
    if home:
        print(world.sum_up(values))


if __name__ == "__main__":
    run_script(main)
