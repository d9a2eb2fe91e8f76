"""Sparse layers of modeling_fairseq_moe.py: routers and experts.

Routers work as at evaluation, also in training; those that balance a batch in fairseq_moe_ext's
training (sinkhorn, base) do not do so here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def gated(gate: Any) -> Any:
    """An activation that multiplies one half of its input by the other's (arXiv 2002.05202)."""

    def activation(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return gate(first) * second

    return activation


GATED = {"swiglu": gated(F.silu), "geglu": gated(F.gelu)}
ACTIVATIONS = {
    **GATED,
    "gelu": F.gelu,
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "linear": lambda x: x,
    "relu": F.relu,
    "tanh": torch.tanh,
}


class Routing(NamedTuple):
    """Which experts N tokens take. K is num_experts_per_tok, or E for routers whose tokens take as
    many as they like."""

    probs: Tensor  # (N, E) that sum to 1, for the balancing loss
    experts: Tensor  # (N, K)
    weights: Tensor  # (N, K), differentiable
    taken: Tensor  # (N, K) bool: which of these a token takes
    counted: Tensor  # (N, K) bool: which of these the balancing loss counts; null experts, too
    variable_width: bool = False  # a token takes any number of experts


class Gate(nn.Linear):
    """A linear layer that computes in a precision of its own."""

    def forward(self, x: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor:
        """x (N, D) -> (N, E). dtype: None: as every linear layer."""
        if dtype is None:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))


class TopKRouter(nn.Module):
    """Sends each token to the experts that a linear layer without bias scores best."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.k = config.num_experts_per_tok
        self.settings = {**ROUTER_DEFAULTS, **config.router_settings}
        self.num_experts, null = config.num_experts, self.settings["null_experts"]
        self.register_buffer("balance_bias", None)
        if self.settings["bias"]:
            self.balance_bias = torch.zeros(self.num_experts + null, dtype=torch.float32)
        self.add_gate(config)

    def add_gate(self, config: Any) -> None:
        outputs = self.num_experts + (self.settings["null_experts"] > 0)
        self.wg = Gate(config.hidden_size, outputs, bias=False)

    def _apply(self, fn: Any, *rest: Any, **named: Any) -> Any:
        """Move the router's state to another device, but keep its dtype when the model is cast."""
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, *rest, **named)
        for name, value in before.items():
            device = getattr(self, name).device
            kept = torch.empty_like(value, device=device) if value.is_meta else value.to(device)
            setattr(self, name, kept)
        return self

    def forward(self, x: Tensor, token_ids: Optional[Tensor]) -> Routing:
        """x (N, D), token_ids (N,)."""
        return self.route(self.logits(x))

    def logits(self, x: Tensor) -> Tensor:
        """x (N, D) -> (N, E)."""
        s = self.settings
        logits = self.wg(x, at_least_float32(x) if s["float32_product"] else None)
        if s["null_experts"] > 1:  # they share a logit
            logits = torch.cat([logits, *[logits[:, -1:]] * (s["null_experts"] - 1)], 1)
        return logits.to(at_least_float32(logits)) if s["float32"] else logits

    def scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.settings["score"] == "sigmoid" else logits.softmax(-1)

    def route(self, logits: Tensor) -> Routing:
        """logits (N, E)."""
        scores = self.scores(logits)
        liked, rivals = scores.detach(), logits.detach()
        if self.balance_bias is not None:  # affects only the choice
            liked = rivals = liked + self.balance_bias
        if self.settings["top_groups"] < self.settings["groups"]:
            forbidden = ~self.allowed(liked)
            liked = liked.masked_fill(forbidden, -math.inf)
            rivals = rivals.masked_fill(forbidden, -math.inf)
        # Logits distinguish experts whose probabilities, near 0 or 1, are equal.
        experts = liked.argmax(-1, keepdim=True)
        if self.k > 1:
            rest = best(rivals.scatter(1, experts, -math.inf), self.k - 1)
            experts = torch.cat([experts, rest], 1)
        return self.chosen(scores, experts)

    def chosen(self, scores: Tensor, experts: Tensor) -> Routing:
        """A token's experts (N, K), weighted by scores (N, E)."""
        weights, taken = scores.gather(1, experts), experts < self.num_experts
        if self.settings["normalize"] == "before":
            weights = normalized(weights)
        weights = weights * taken  # null experts compute nothing
        if self.settings["normalize"] == "after":
            weights = normalized(weights)
        weights = weights * self.settings["scale"]
        return Routing(distribution(scores), experts, weights, taken, torch.ones_like(taken))

    def active(self, scores: Tensor, taken: Tensor) -> Routing:
        """All experts that are taken (N, E) bool, weighted by scores (N, E)."""
        experts = torch.arange(scores.size(1), device=scores.device).expand_as(scores)
        weights = scores * taken * self.settings["scale"]
        return Routing(distribution(scores), experts, weights, taken, taken, variable_width=True)

    def allowed(self, liked: Tensor) -> Tensor:
        """liked (N, E) -> (N, E) bool: the experts of a token's best groups, a group's score being
        the sum of its best ones (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""
        groups, top = self.settings["groups"], self.settings["top_groups"]
        grouped = liked.unflatten(1, (groups, -1))
        scores = grouped.topk(-(-self.k // top), dim=2).values.sum(2)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best(scores, top), True)
        return chosen.unsqueeze(2).expand_as(grouped).flatten(1)


class RandomRouter(TopKRouter):
    """Top-k by a gate that is not trained."""

    def add_gate(self, config: Any) -> None:
        super().add_gate(config)
        weight = self.wg.weight.detach()
        del self.wg.weight  # a buffer: from_pretrained makes every parameter trainable
        self.wg.register_buffer("weight", weight)


class SinkhornRouter(TopKRouter):
    """Top-k, as this router is at evaluation."""

    def route(self, logits: Tensor) -> Routing:
        return self.chosen(self.scores(logits), best(logits.detach(), self.k))


class BaseRouter(TopKRouter):
    """The best expert, weighted by the sigmoid of its logit, as this router is at evaluation."""

    def route(self, logits: Tensor) -> Routing:
        return self.chosen(logits.sigmoid(), logits.detach().argmax(-1, keepdim=True))


class HashRouter(TopKRouter):
    """A table of experts by token id."""

    table: Tensor

    def add_gate(self, config: Any) -> None:
        table = torch.zeros(config.vocab_size, self.k, dtype=torch.long)
        self.register_buffer("table", table)

    def forward(self, x: Tensor, token_ids: Optional[Tensor]) -> Routing:
        if token_ids is None:
            raise ValueError("the router hash goes by tokens: pass input_ids, not inputs_embeds")
        experts = self.table[token_ids]
        dtype = at_least_float32(x) if self.settings["float32"] else x.dtype
        weights = x.new_full(experts.shape, 1 / self.k, dtype=dtype)
        probs = weights.new_zeros(len(x), self.num_experts).scatter(1, experts, weights)
        taken = torch.ones_like(experts, dtype=torch.bool)
        return Routing(probs, experts, weights * self.settings["scale"], taken, taken)


class ThresholdRouter(TopKRouter):
    """Every expert whose score exceeds its threshold, a quantile that training has found."""

    threshold: Tensor
    updates: Tensor

    def add_gate(self, config: Any) -> None:
        super().add_gate(config)
        self.register_buffer("threshold", torch.zeros(config.num_experts, dtype=torch.float64))
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    def route(self, logits: Tensor) -> Routing:
        values = logits.detach()
        top = torch.zeros_like(values, dtype=torch.bool).scatter(1, best(values, self.k), True)
        values = values.to(at_least_float32(values))
        if self.settings["score"] != "sigmoid":  # thresholds are of log(s / (1 - s))
            log_p = F.log_softmax(values, dim=-1)
            values = log_p - torch.log1p(-log_p.exp())
        taken = torch.where(self.updates > 0, values > self.threshold, top)
        return self.active(self.scores(logits), taken)


class ReluRouter(TopKRouter):
    """Every expert whose logit is positive, weighted by it."""

    def add_gate(self, config: Any) -> None:
        super().add_gate(config)
        self.register_buffer("l1_weight", torch.zeros((), dtype=torch.float64))

    def route(self, logits: Tensor) -> Routing:
        return self.active(logits.relu(), logits.detach() > 0)


ROUTERS = {
    "base": BaseRouter,
    "hash": HashRouter,
    "random": RandomRouter,
    "relu": ReluRouter,
    "sinkhorn": SinkhornRouter,
    "threshold": ThresholdRouter,
    "topk": TopKRouter,
}
ROUTER_DEFAULTS = {
    "score": "softmax",  # or "sigmoid"
    "normalize": None,  # or "before", "after" null experts are left out: weights by their sum
    "scale": 1.0,  # factor on the weights
    "groups": 1,
    "top_groups": 1,
    "float32": False,  # logits in float32 at least
    "float32_product": False,  # and the product that they come from
    "null_experts": 0,  # beside the others
    "bias": False,  # of the scores that choose
}


def normalized(weights: Tensor) -> Tensor:
    """(N, K) -> (N, K), each row divided by its sum."""
    eps = torch.finfo(weights.dtype).eps
    return weights / weights.sum(1, keepdim=True).clamp(min=eps)


def best(scores: Tensor, count: int) -> Tensor:
    """scores (N, E) -> (N, count): the largest, best first; of equal ones the lower number."""
    chosen = []
    left = scores.detach().clamp(min=torch.finfo(scores.dtype).min)
    for _ in range(count):
        chosen.append(left.argmax(1, keepdim=True))
        left.scatter_(1, chosen[-1], -math.inf)
    return torch.cat(chosen, dim=1)


def distribution(scores: Tensor) -> Tensor:
    """Scores (N, E) from 0 on, each row divided by its sum."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


class StackedLinear(nn.Module):
    """The linear layers of all experts: weight (E, out, in), bias (E, out)."""

    def __init__(self, experts: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, outputs, inputs))
        self.bias = nn.Parameter(torch.empty(experts, outputs))

    def forward(self) -> Tuple[Tensor, Tensor]:
        """Both. By a call, since accelerate brings what is on disk or another device to a call."""
        return self.weight, self.bias


class FeedForward(nn.Module):
    """One feed-forward network, for all tokens: experts that are shared."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.hidden_dropout = config.expert_dropout
        self.dropout = config.dropout
        self.fc1 = nn.Linear(config.hidden_size, inner_width(config, width))
        self.fc2 = nn.Linear(width, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        x = F.dropout(self.activation(self.fc1(x)), self.hidden_dropout, self.training)
        return F.dropout(self.fc2(x), self.dropout, self.training)


class Experts(nn.Module):
    """Feed-forward networks; each token uses those that its router chooses."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        dim, experts = config.latent_size or config.hidden_size, config.num_experts
        self.activation = ACTIVATIONS[config.activation]
        self.hidden_dropout = config.expert_dropout
        self.dropout = config.dropout
        self.fc1 = StackedLinear(experts, dim, inner_width(config, width))
        self.fc2 = StackedLinear(experts, width, dim)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (N, D) -> the weighted sum of each token's experts (N, D)."""
        (w1, b1), (w2, b2) = self.fc1(), self.fc2()
        out = torch.zeros_like(x)
        for expert in routing.experts[routing.taken].unique().tolist():
            row, choice = ((routing.experts == expert) & routing.taken).nonzero(as_tuple=True)
            hidden = F.linear(x[row], w1[expert], b1[expert])
            hidden = F.dropout(self.activation(hidden), self.hidden_dropout, self.training)
            y = F.linear(hidden, w2[expert], b2[expert])
            y = F.dropout(y, self.dropout, self.training)
            y = y * routing.weights[row, choice, None].to(y.dtype)
            out = out.index_add(0, row, y.to(out.dtype))  # under autocast y is in half precision
        return out


class Latent(nn.Module):
    """Projections to the narrower vectors that experts compute on, and back."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.down = nn.Linear(config.hidden_size, config.latent_size, bias=False)
        self.up = nn.Linear(config.latent_size, config.hidden_size, bias=False)


class MoELayer(nn.Module):
    """A router and its experts; no expert has a capacity, so no token is dropped."""

    def __init__(self, config: Any, width: int) -> None:
        super().__init__()
        self.gate = ROUTERS[config.router](config)
        self.experts = Experts(config, width)
        self.shared = FeedForward(config, config.shared_size) if config.shared_size else None
        self.latent = Latent(config) if config.latent_size else None

    def forward(
        self, x: Tensor, real: Optional[Tensor], token_ids: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        """x (B, T, D), real (B, T) bool, False for padding, token_ids (B, T) -> the shape of x, and
        the balancing loss ()."""
        tokens = x.flatten(0, 1)
        routing = self.gate(tokens, None if token_ids is None else token_ids.flatten())
        y = tokens if self.latent is None else self.latent.down(tokens)
        y = self.experts(y, routing)
        y = y if self.latent is None else self.latent.up(y)
        y = y if self.shared is None else y + self.shared(tokens)
        return y.view_as(x), balance_loss(
            routing, self.gate.settings["null_experts"], None if real is None else real.flatten()
        )


def balance_loss(routing: Routing, null_experts: int, real: Optional[Tensor] = None) -> Tensor:
    """E times the sum over experts of mean probability times share of first choices, or with more
    than two choices per token, or any number, or null experts, of all (arXiv 2006.16668, algorithm
    1)."""
    probs, experts, counted = routing.probs, routing.experts, routing.counted
    if real is not None:
        probs, experts, counted = probs[real], experts[real], counted[real]
    if experts.size(1) <= 2 and not (null_experts or routing.variable_width):
        experts, counted = experts[:, :1], counted[:, :1]
    counts = torch.bincount(experts[counted], minlength=probs.size(1))
    share = counts / counts.sum().clamp(min=1)
    return probs.size(1) * (probs.float().sum(0) / max(1, len(probs)) * share).sum()


def inner_width(config: Any, width: int) -> int:
    """Outputs of the first linear layer of a network."""
    return 2 * width if config.activation in GATED else width


def init_weights(module: nn.Module, dim: int) -> None:
    """Only for models that are not loaded: as torch's layers, embeddings as fairseq's."""
    if isinstance(module, StackedLinear):
        bound = 1 / math.sqrt(module.weight.size(-1))
        nn.init.uniform_(module.weight, -bound, bound)
        nn.init.uniform_(module.bias, -bound, bound)
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=dim**-0.5)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
