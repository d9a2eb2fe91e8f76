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
    mean_prob = routing.probs.mean(dim=0)  # (E,)
    share = routing.counts[0].to(mean_prob.dtype) / tokens  # (E,)
    return (mean_prob * share).mean() * num_experts**2


def z_loss(logits: Tensor) -> Tensor:
    """Router z-loss, mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5),
    computed in float32 at least. logits (T, E); returns a scalar."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.logsumexp(logits, dim=-1).square().mean()
