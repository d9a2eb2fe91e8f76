"""Losses that keep a router balanced and its logits small."""

from __future__ import annotations

import torch
from torch import Tensor

from .pool import PROCESS, Pool
from .routing import Routing


def balance_loss(routing: Routing, pool: Pool = PROCESS) -> Tensor:
    """GShard's balancing loss, E^2 * mean_e(mean probability_e * share of first choices_e): 1 when
    both are uniform, E when all goes to one expert (arXiv 2006.16668, algorithm 1; the paper,
    section 2). The gradient flows through the probabilities alone.

    First choices count before dropping and without padding; probabilities count with padding, as
    in the branch. Means are over the pool's tokens. Returns a scalar.
    """
    num_experts = routing.probs.size(1)
    # float32 at least: a count may exceed float16's 65504
    probs = routing.probs.to(torch.promote_types(routing.probs.dtype, torch.float32))
    summed = torch.cat(
        [probs.sum(dim=0), routing.counts[0].to(probs), probs.new_ones(1) * len(probs)]
    )
    prob, first, tokens = pool.total(summed).split([num_experts, num_experts, 1])
    tokens = tokens.clamp(min=1)  # of no tokens: 0, not 0/0
    return (prob / tokens * (first / tokens)).mean() * num_experts**2


def z_loss(logits: Tensor, pool: Pool = PROCESS) -> Tensor:
    """Router z-loss, mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5),
    computed in float32 at least. logits (T, E); returns a scalar."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    squares = torch.logsumexp(logits, dim=-1).square().sum()
    total, tokens = pool.total(torch.stack([squares, squares.new_tensor(len(logits))]))
    return total / tokens.clamp(min=1)  # 0 of no tokens
