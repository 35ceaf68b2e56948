"""A batch of pairs -> log-probs -> the loss of each pair and its metrics.

Letters: B pairs, 2B rows (the B chosen answers first, then the B rejected), T tokens, N scored tokens, V vocabulary, H hidden.
A batch comes from data.collate: for each side, `chosen` and `rejected`, right-padded (B, T) tensors `{side}_input_ids`,
`{side}_attention_mask` and `{side}_labels`, labels being the input ids where a token is scored and IGNORE elsewhere.
"""
import torch
import torch.nn.functional as F

from losses import hyperparameters, needs_reference, needs_rejected, tensor_arguments

IGNORE = -100  # label of a token that is not scored (prompt, padding): torch's and transformers' own value


def selected_logps(logits, targets):
    """log π(target) at each position: (N, V), (N,) -> (N,), in fp32 or better whatever the dtype of the logits."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets, reduction="none")


def sum_scored(token_logps, scored):
    """Sum each row's scored tokens: (N,), (B, T) bool -> (B,). Added up along the row, so batch mates play no part."""
    table = torch.zeros(scored.shape, dtype=token_logps.dtype, device=token_logps.device)
    return table.masked_scatter(scored, token_logps).sum(-1)


def get_batch_logps(logits, labels, label_pad_token_id=IGNORE):
    """Log-probability of each row's scored tokens, and how many they are. Sums, never averages: a loss divides by itself.

    Args      logits (B, T, V); labels (B, T), label_pad_token_id where a token is not scored
    Returns   logps (B,) in fp32 or better, lengths (B,) integers
    Example   The logits at position t predict the label at t + 1, so the first label and the last logits are not used:

                  input_ids   prompt  answer  EOS    pad
                  labels       -100   answer  EOS   -100        scored: answer from the prompt's logits, EOS from answer's
                  lengths = 2
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits are (B, T, V) and labels (B, T), got {tuple(logits.shape)} and {tuple(labels.shape)}")
    labels, logits = labels[:, 1:], logits[:, :-1]  # (B, T-1), (B, T-1, V)
    scored = labels != label_pad_token_id
    return sum_scored(selected_logps(logits[scored], labels[scored]), scored), scored.sum(-1)


class SequenceLogps(torch.nn.Module):
    """A causal language model that answers with log-probs: ids in, `get_batch_logps` of them out.

    The head runs on the scored positions alone: (N, V) logits in place of (2B, T, V), which for a long prompt is most of the
    memory of a step. It happens inside the root module's forward because that is what DDP and FSDP hook into.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.bare_head = has_bare_head(model)

    def forward(self, input_ids, attention_mask, labels):
        if not self.bare_head:  # logits that are scaled or capped after the head: only the model itself knows how
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits  # (2B, T, V)
            return get_batch_logps(logits, labels)
        body = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        labels = labels[:, 1:]
        scored = labels != IGNORE  # (2B, T-1)
        logits = self.model.get_output_embeddings()(body.last_hidden_state[:, :-1][scored])  # (N, V)
        return sum_scored(selected_logps(logits, labels[scored]), scored), scored.sum(-1)


@torch.no_grad()
def has_bare_head(model):
    """Are the model's logits just head(hidden)? Asked of the model on four tokens, since some scale or cap them (Gemma 2)."""
    if model.get_output_embeddings() is None or model.base_model is model:
        return False
    ids = torch.arange(4, device=model.device)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return torch.allclose(model.get_output_embeddings()(hidden), model(input_ids=ids, use_cache=False).logits)


def concatenated_inputs(batch, sides=("chosen", "rejected")):
    """Chosen rows, then rejected rows, as one batch: input_ids, attention_mask and labels, each (2B, T)."""
    return {name: torch.cat([batch[f"{side}_{name}"] for side in sides]) for name in ("input_ids", "attention_mask", "labels")}


def concatenated_forward(model, batch, sides=("chosen", "rejected")):
    """Both sides in one forward of `model`, a SequenceLogps: one call is half the overhead, and one use of each weight
    per step is what DDP can synchronise. Returns {chosen,rejected}_logps and {chosen,rejected}_lengths, each (B,)."""
    logps, lengths = model(**concatenated_inputs(batch, sides))  # (2B,), (2B,)
    rows = len(logps) // len(sides)
    named = {f"{side}_logps": part for side, part in zip(sides, logps.split(rows))}
    return named | {f"{side}_lengths": part for side, part in zip(sides, lengths.split(rows))}


def preference_step(policy, reference, batch, loss, hyper={}, batch_state=None):
    """The loss of each pair, and its metrics.

    policy, reference   SequenceLogps (or a wrapper of one); reference is only called if the loss asks for it
    loss                a function of losses.LOSSES: it is given the tensors that its signature names and no others
    hyper               its keyword-only arguments, where they are not its defaults
    batch_state         numbers about the whole optimizer step, of which this batch may be a part (`mean_chosen_length`)
    Returns             (B,) losses with a graph, {metric: (B,) tensor} without
    """
    sides = ("chosen", "rejected") if needs_rejected(loss) else ("chosen",)
    tensors = dict(batch_state or {})
    if needs_reference(loss):  # first, so that its activations are gone before the policy's exist
        with torch.no_grad():
            ref = concatenated_forward(reference, batch, sides)
        tensors |= {f"ref_{side}_logps": ref[f"{side}_logps"] for side in sides}
    out = concatenated_forward(policy, batch, sides)
    tensors |= {f"policy_{side}_logps": out[f"{side}_logps"] for side in sides}
    tensors |= {f"{side}_lengths": out[f"{side}_lengths"] for side in sides}
    hyper = hyperparameters(loss) | hyper
    losses = loss(**{name: tensors[name] for name in tensor_arguments(loss) if name in tensors}, **hyper)  # (B,)
    return losses, pair_metrics(losses, tensors, hyper.get("beta"))


def pair_metrics(losses, tensors, beta):
    """{metric: (B,)}. A reward is beta times the log-ratio of policy to reference, in nats; ties do not count as accurate."""
    metrics = {"loss": losses}
    for side in ("chosen", "rejected"):
        if f"policy_{side}_logps" in tensors:
            metrics[f"logps/{side}"] = tensors[f"policy_{side}_logps"]
    if "ref_chosen_logps" in tensors:
        chosen, rejected = (beta * (tensors[f"policy_{side}_logps"] - tensors[f"ref_{side}_logps"])
                            for side in ("chosen", "rejected"))
        metrics |= {"rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
                    "rewards/accuracies": (chosen > rejected).to(losses.dtype)}
    return {name: value.detach() for name, value in metrics.items()}
