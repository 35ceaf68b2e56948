"""The loss that balances the experts of a mixture, over all real tokens of an optimizer step.

A router that prefers a few experts trains these more, and so prefers them still more. Switch
Transformers (arXiv:2101.03961, eqs. 4 to 6) add a loss against that, here as transformers computes
it (load_balancing_loss_func of each architecture):

    L = E Σ_e f_e P_e       f_e  experts chosen per token that are e; top_k = Σ_e f_e
                            P_e  mean probability of e by the router's softmax; 1 = Σ_e P_e

    Example     E = 4 experts, top_k = 2. A uniform router has P_e = 1/4, so L = 4 · 2 · 1/4 = 2.
                A router that chooses the first two experts only, each with P_e = 1/2, has
                f = (1, 1, 0, 0) and L = 4 · (1/2 + 1/2) = 4.

The means are over the tokens of all layers, micro-batches and ranks. L is not a sum over
micro-batches, but f has no gradient: pass 1 of a step counts f, without a graph, and then each
micro-batch adds E Σ_e f_e · (its part of P_e), whose gradients add up to that of L.

Only the policy's forward is recorded: `Routing` is an option of dpo.preference_logps.
"""
import contextlib
import math
import sys
from typing import NamedTuple

import torch

from errors import UserError
from packing import find_targets, to_device
from reach import nested_configs


class RouterLoss(NamedTuple):
    """The loss of a run: `coefficient` · L is added to the mean loss of the rows."""
    coefficient: float
    top_k: int  # experts that a router chooses for a token


class Routing:
    """What the routers did in one forward of logps.FastLogps.

    Each token counts once for each answer that it belongs to: a token of a prompt as often as the
    row has answers, as in padded rows, where the prompt is repeated. Padding does not count.
    """

    def __init__(self):
        self.router_logits = ()  # a tensor (..., E) for each layer with experts
        self.weights = None  # of the tokens, flat

    @contextlib.contextmanager
    def recorded(self, model, inputs: dict):
        """Inside, a forward of the model on these inputs is recorded.

        The decoder is asked for its router logits, not the whole model, which would compute L
        of each micro-batch from them.
        """
        def ask(module, arguments, options):
            return arguments, options | {"output_router_logits": True}

        def take(module, arguments, outputs):
            self.router_logits = getattr(outputs, "router_logits", None) or ()

        self.weights = token_weights(inputs)
        hooks = [model.base_model.register_forward_pre_hook(ask, with_kwargs=True),
                 model.base_model.register_forward_hook(take)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def sums(self, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum over layers and tokens -> how often each expert is chosen (E,), and the routers'
        probabilities of each expert (E,), which have a graph."""
        chosen, probability = 0, 0
        for logits in self.router_logits:
            logits = logits.flatten(0, -2)  # (T, E)
            dtype = torch.promote_types(logits.dtype, torch.float32)
            probabilities = logits.to(dtype).softmax(-1)
            indices = probabilities.topk(top_k).indices  # (T, top_k)
            choices = torch.zeros_like(probabilities).scatter(-1, indices, 1.0)  # (T, E)
            weights = self.weights.to(choices)
            chosen = chosen + weights @ choices
            probability = probability + weights @ probabilities
        return chosen, probability

    def counts(self, top_k: int, rows: int) -> torch.Tensor:
        """How often each expert is chosen, (rows, E), as batches.of_all_pairs adds it up: in the
        first row, and zeros in the others."""
        with torch.no_grad():
            chosen, _ = self.sums(top_k)
        table = chosen.new_zeros(rows, len(chosen))
        table[0] = chosen
        return table


def token_weights(inputs: dict) -> torch.Tensor:
    """How many answers each token of a padded or a packed batch belongs to, flat."""
    if "packed" not in inputs:
        return inputs["attention_mask"].flatten()
    weights = []
    for prompt, *answers in inputs["packed"]:
        weights += [len(answers)] * prompt + [1] * sum(answers)
    return to_device(torch.tensor(weights), inputs["input_ids"].device)


def balance_loss(routing: Routing, top_k: int, counts: torch.Tensor) -> torch.Tensor:
    """This micro-batch's part of L, (), with a graph. The parts of all micro-batches add up to L.

    counts      how often each expert is chosen in the whole step, (E,)
    """
    _, probability = routing.sums(top_k)  # (E,)
    tokens = counts.sum() / top_k  # of all layers together
    shares = (counts / tokens).to(probability)  # f
    return len(counts) * (shares * probability).sum() / tokens.to(probability)


# --- Which models have such a loss ----------------------------------------------------------------

def find_no_router_loss(module) -> str | None:
    """Return why a model has no such loss, or None if a forward of two tokens has router logits.

    transformers defines the loss in the module of each class whose routers choose by a softmax. A
    router with a bias for the choice alone (DeepSeek-V3, arXiv:2408.15664) is balanced by that.
    """
    model = module.model
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    kind = type(model).__name__.removeprefix("FSDP")
    if not any("expert" in name for name in names):
        return f"{kind} is a dense model: it has no experts to balance; leave the flag out"
    if not defines_router_loss(model):
        return (f"transformers has no load-balancing loss for {kind}, whose routers are made to be "
                "balanced otherwise; leave the flag out")
    if module.is_encoder_decoder:
        return "the routers of an encoder-decoder are not balanced here; leave the flag out"
    if any("correction_bias" in name for name in names):
        return (f"the routers of {kind} choose by a bias besides their probabilities, which this "
                "loss does not know; leave the flag out")
    ids = torch.tensor([[1, 2]], device=model.device)
    routing = Routing()
    with torch.no_grad():
        module(targets=find_targets(ids), routing=routing, input_ids=ids,
               attention_mask=torch.ones_like(ids))
    if not routing.router_logits:
        return (f"this version of transformers returns no router logits of {kind} with this "
                "config.json; leave the flag out")
    return None


def defines_router_loss(model) -> bool:
    """Return whether transformers has the loss for this class or, under FSDP, its base class."""
    modules = [sys.modules[kind.__module__] for kind in type(model).__mro__]
    return any(hasattr(module, "load_balancing_loss_func") for module in modules)


def experts_per_token(model) -> int:
    """Return top_k. The model has it under one name; a config has names of its own."""
    if hasattr(model, "num_experts_per_tok"):
        return model.num_experts_per_tok
    return model.config.get_text_config().num_experts_per_tok


def asked_coefficient(model) -> float:
    """Return the coefficient in the model's config if output_router_logits asks for the loss there,
    else 0. reach.turn_off_router_logits has noted whether it does."""
    if not getattr(model, "asks_for_router_loss", False):
        return 0.0
    value = getattr(model, "router_aux_loss_coef", None)
    for config in nested_configs(model.config):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if value is None:
                value = getattr(config, name, None)
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise UserError(f"{model.name_or_path}: config.json asks for the router loss "
                        f"(output_router_logits), and its router_aux_loss_coef is {value!r}; give "
                        "--router_aux_loss_coef, a number of at least 0")
    return float(value)
