"""Losses that keep a router balanced and its logits small."""

from __future__ import annotations

from typing import Optional, Tuple

import torch
from torch import Tensor

from .routing import Routing
from .scope import PROCESS, RoutingScope


def balance_loss(routing: Routing, scope: RoutingScope = PROCESS) -> Tensor:
    """GShard's balancing loss, E^2 * mean_e(mean probability_e * share of first choices_e): 1 when
    both are uniform, E when all tokens choose one expert (arXiv 2006.16668, algorithm 1; the paper,
    section 2). The gradient flows through the probabilities only.

    Means are over the tokens in scope that count (`routing.counted`); padding that counts has no
    first choice. With more than two choices per token, the share is of all choices
    (DeepSeekMoE, arXiv 2401.06066, equation 13); so it is with null experts, which a token mostly
    chooses last. Choices count before dropping. Returns a scalar.
    """
    num_experts = routing.probs.size(1)
    # float32 at least: a count may exceed float16's 65504
    probs = routing.probs.to(torch.promote_types(routing.probs.dtype, torch.float32))
    probs, tokens = counted_rows(probs, routing.counted)
    of_first = len(routing.counts) <= 2 and routing.null_experts == 0
    chosen = routing.counts[0] if of_first else routing.counts.sum(dim=0)
    summed = torch.cat([probs.sum(dim=0), chosen.to(probs), tokens.to(probs).view(1)])
    prob, chosen, tokens = scope.total(summed).split([num_experts, num_experts, 1])
    tokens = tokens.clamp(min=1)  # without tokens: 0, not 0/0
    choices = tokens if of_first else chosen.sum().clamp(min=1)
    return (prob / tokens * (chosen / choices)).mean() * num_experts**2


def z_loss(
    logits: Tensor, counted: Optional[Tensor] = None, scope: RoutingScope = PROCESS
) -> Tensor:
    """Router z-loss, mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5),
    computed in float32 at least. logits (T, E), counted (T,) bool, None: all; returns a scalar."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    squares, tokens = counted_rows(torch.logsumexp(logits, dim=-1, keepdim=True).square(), counted)
    squares = squares.sum()
    total, tokens = scope.total(torch.stack([squares, tokens.to(squares)]))
    return total / tokens.clamp(min=1)  # without tokens: 0


def counted_rows(rows: Tensor, counted: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """rows (T, N) with zeros where a row does not count, and the number that count, a scalar int64.
    counted (T,) bool, None: all."""
    if counted is None:
        return rows, torch.tensor(len(rows), device=rows.device)
    return rows.masked_fill(~counted.unsqueeze(1), 0), counted.sum()
