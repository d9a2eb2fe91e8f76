"""Figures that say what a router does, under the names the branch logs them by."""

from __future__ import annotations

import math
from typing import Dict

import torch
from torch import Tensor

from .routing import Routing

# Experts counted as the most and as the least used: a fifth of them.
BALANCE_SHARE = 0.2

FIGURES = ("entropy_gating",) + tuple(
    figure
    for expert in ("expert1", "expert2")
    for figure in (
        f"overflow_{expert}",
        f"unused_{expert}_count",
        f"{expert}_balance_top",
        f"{expert}_balance_bottom",
    )
)


def routing_stats(routing: Routing) -> Dict[str, Tensor]:
    """FIGURES of one routing, scalars without gradient:

    entropy_gating: mean entropy of the router's probabilities, in nats.
    overflow_expert1, _expert2: percentage of routed first, second choices beyond capacity.
    expertK_balance_top, _bottom: percentage of tokens whose K-th choice is among the most, least
        chosen fifth of the experts (padding included, as in the branch).
    unused_expertK_count: experts that are no token's K-th choice.

    The top-1 gate yields the keys of the first choice only.
    """
    tokens, num_experts = routing.probs.shape
    with torch.no_grad():
        entropy = torch.special.entr(routing.probs).sum(dim=1)  # (T,)
        stats = {"entropy_gating": entropy.mean() if tokens else entropy.sum()}
        tokens = max(tokens, 1)  # a rank may have none: figures 0, not 0/0
        fifth = max(math.ceil(num_experts * BALANCE_SHARE), 1)
        for k in range(routing.experts.size(1)):
            name = f"expert{k + 1}"
            chosen = routing.experts[:, k]  # (T,)
            dropped = routing.routed[:, k] & ~routing.kept[:, k]
            # A batch of padding alone routes nothing and overflows nowhere: 0, not 0/0.
            routed = routing.counts[k].sum().clamp(min=1)
            stats[f"overflow_{name}"] = 100.0 * dropped.sum() / routed
            histogram = torch.zeros(num_experts, device=chosen.device)
            histogram.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=histogram.dtype))
            stats[f"unused_{name}_count"] = (histogram == 0).sum().to(histogram.dtype)
            # The branch adds float32's smallest normal number to each share; so do we, to meet its
            # figures to the last digit.
            share = (100.0 * histogram / tokens).sort(descending=True).values
            share = share + torch.finfo(torch.float32).tiny
            stats[f"{name}_balance_top"] = share[:fifth].sum()
            stats[f"{name}_balance_bottom"] = share[-fifth:].sum()
    return stats
