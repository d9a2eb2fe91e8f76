"""Losses that keep a router balanced and its logits small."""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from ..kernels.dtypes import at_least_float32
from .routing import Routing
from .scope import PROCESS, RoutingScope


class WholeBatch(NamedTuple):
    """Sums over all tokens that count in an optimizer update, over processes and micro-batches."""

    counts: Tensor  # (K, E): how often an expert is a token's K-th choice, before dropping
    tokens: Tensor  # ()


class Balance:
    """Computes a layer's balancing loss over the tokens that --moe-balance-over selects: the tokens
    of a micro-batch in scope, each sequence separately, or all tokens of an update.

    For a whole batch of several micro-batches, the choices must be known before the first gradient,
    so a pass over the micro-batches counts them (patches/whole_batch.py). With one micro-batch per
    update, a scope of all processes is enough.
    """

    def __init__(self, over: str = "micro_batch", scope: RoutingScope = PROCESS) -> None:
        self.over = over
        self.scope = scope
        self.counting = False
        self.whole: Optional[WholeBatch] = None

    def loss(self, routing: Routing, length: Optional[int] = None) -> Tensor:
        """The loss, a scalar. With `whole` set, these tokens' part of the loss of the whole batch;
        while counting, 0. length: tokens per sequence."""
        if self.counting:
            self._count(routing)
            return routing.probs.new_zeros(())
        if self.over == "sequence" and length is not None:
            return sequence_balance_loss(routing, length, self.scope)
        return balance_loss(routing, self.scope, self.whole)

    def _count(self, routing: Routing) -> None:
        _, tokens = counted_rows(routing.probs, routing.counted)
        before = self.whole or WholeBatch(torch.zeros_like(routing.counts), tokens.new_zeros(()))
        self.whole = WholeBatch(before.counts + routing.counts, before.tokens + tokens)


def balance_loss(
    routing: Routing, scope: RoutingScope = PROCESS, whole: Optional[WholeBatch] = None
) -> Tensor:
    """GShard's balancing loss, E^2 * mean_e(mean probability_e * share of first choices_e): 1 if
    both are uniform, E if all tokens choose one expert (arXiv 2006.16668, algorithm 1; the paper,
    section 2). The gradient flows through the probabilities only.

    Means are over the tokens in scope that count (`routing.counted`); padding that counts has no
    first choice. The share is of all choices instead (DeepSeekMoE, arXiv 2401.06066, equation 13)
    if tokens have more than two choices or a variable number, or if there are null experts, which a
    token mostly chooses last. Choices count before dropping. Returns a scalar.

    If `whole` is given, the share is of the whole batch's choices, and the sum of these tokens'
    probabilities is divided by the whole batch's number of tokens. The results of all parts, and
    their gradients, then add up to those of the whole batch (Qiu et al., arXiv 2501.11873, who
    approximate the shares by those of earlier micro-batches).
    """
    num_experts = routing.probs.size(1)
    # float32 at least: a count may exceed float16's 65504
    probs = routing.probs.to(at_least_float32(routing.probs))
    probs, tokens = counted_rows(probs, routing.counted)
    counts = routing.counts if whole is None else whole.counts
    of_first = _first_choices_alone(routing)
    chosen = counts[0] if of_first else counts.sum(dim=0)
    if whole is None:
        summed = torch.cat([probs.sum(dim=0), chosen.to(probs), tokens.to(probs).view(1)])
        prob, chosen, tokens = scope.total(summed).split([num_experts, num_experts, 1])
    else:
        prob, chosen, tokens = probs.sum(dim=0), chosen.to(probs), whole.tokens.to(probs)
    tokens = tokens.clamp(min=1)  # without tokens: 0, not 0/0
    choices = tokens if of_first else chosen.sum().clamp(min=1)
    return (prob / tokens * (chosen / choices)).mean() * num_experts**2


def sequence_balance_loss(routing: Routing, length: int, scope: RoutingScope = PROCESS) -> Tensor:
    """balance_loss of each sequence separately (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20),
    averaged over sequences with their counted tokens in scope as weights. As in balance_loss, of
    one or two choices the first counts; in the paper all do.

    length: tokens per sequence; the T tokens are the concatenated sequences. Returns a scalar.
    """
    num_experts, k = routing.probs.size(1), routing.experts.size(1)
    probs = routing.probs.to(at_least_float32(routing.probs))
    ones, _ = counted_rows(torch.ones_like(probs[:, :1]), routing.counted)
    tokens = ones.view(-1, length).sum(dim=1)  # (B,)
    probs, _ = counted_rows(probs, routing.counted)
    prob = probs.view(-1, length, num_experts).sum(dim=1)  # (B, E)
    is_chosen = routing.routed if routing.chosen is None else routing.chosen
    of_first = _first_choices_alone(routing)
    ranks = 1 if of_first else k
    chosen = torch.zeros_like(prob).scatter_add_(
        1,
        routing.experts[:, :ranks].reshape(-1, length * ranks),
        is_chosen[:, :ranks].reshape(-1, length * ranks).to(prob),
    )
    choices = tokens if of_first else chosen.sum(dim=1)
    # of a sequence: E^2 * mean_e(prob / tokens * chosen / choices), times its tokens
    losses = (prob * chosen).mean(dim=1) / choices.clamp(min=1) * num_experts**2
    loss, tokens = scope.total(torch.stack([losses.sum(), tokens.sum()]))
    return loss / tokens.clamp(min=1)


def _first_choices_alone(routing: Routing) -> bool:
    """Whether the balancing loss counts first choices only, not all choices."""
    return len(routing.counts) <= 2 and not (routing.null_experts or routing.variable_width)


def z_loss(
    logits: Tensor, counted: Optional[Tensor] = None, scope: RoutingScope = PROCESS
) -> Tensor:
    """Router z-loss: the mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5),
    computed in float32 at least. logits (T, E), counted (T,) bool, None: all; returns a scalar."""
    logits = logits.to(at_least_float32(logits))
    squares, tokens = counted_rows(torch.logsumexp(logits, dim=-1, keepdim=True).square(), counted)
    squares = squares.sum()
    total, tokens = scope.total(torch.stack([squares, tokens.to(squares)]))
    return total / tokens.clamp(min=1)  # without tokens: 0


def counted_rows(rows: Tensor, counted: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """rows (T, N) with zeros in rows that do not count, and the number of rows that count, a scalar
    int64. counted (T,) bool, None: all."""
    if counted is None:
        # full, not tensor: copying a number would wait for the GPU
        return rows, torch.full((), len(rows), device=rows.device)
    return rows.masked_fill(~counted.unsqueeze(1), 0), counted.sum()
