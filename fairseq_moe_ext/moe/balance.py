"""Losses that keep a router balanced and its logits small."""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import Routing


def balance_loss(routing: Routing) -> Tensor:
    """GShard's balancing loss, E^2 * mean_e(mean probability_e * share of first choices_e): 1 when
    both are uniform, E when all goes to one expert (arXiv 2006.16668, algorithm 1; the paper,
    section 2). The gradient flows through the probabilities alone.

    First choices count before dropping and without padding; probabilities count with padding, as
    in the branch. Returns a scalar.
    """
    tokens, num_experts = routing.probs.shape
    if tokens == 0:  # a rank may have none: 0, not 0/0
        return routing.probs.sum()
    mean_prob = routing.probs.mean(dim=0)  # (E,)
    # float32 at least: a count may exceed float16's 65504
    wide = torch.promote_types(mean_prob.dtype, torch.float32)
    share = routing.counts[0].to(wide) / tokens  # (E,)
    return (mean_prob * share).mean() * num_experts**2


def z_loss(logits: Tensor) -> Tensor:
    """Router z-loss, mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5),
    computed in float32 at least. logits (T, E); returns a scalar."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.logsumexp(logits, dim=-1).square().sum() / max(len(logits), 1)  # 0 of no tokens
