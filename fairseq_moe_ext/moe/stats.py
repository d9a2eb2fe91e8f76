"""Metrics of a routing; those that the branch also has keep its names."""

from __future__ import annotations

import math
from typing import Dict

import torch
from torch import Tensor

from ..kernels.dtypes import at_least_float32
from .balance import counted_rows
from .routing import Routing
from .scope import PROCESS, RoutingScope

# The share of experts that counts as most used, and as least used.
BALANCE_SHARE = 0.2

METRICS = ("entropy_gating", "overflow", "load_max", "max_vio", "experts_per_token") + tuple(
    figure
    for expert in ("expert1", "expert2")
    for figure in (
        f"overflow_{expert}",
        f"unused_{expert}_count",
        f"{expert}_balance_top",
        f"{expert}_balance_bottom",
    )
)


NULL_SHARE = "null_share"  # where there are null experts


def routing_stats(routing: Routing, scope: RoutingScope = PROCESS) -> Dict[str, Tensor]:
    """METRICS of one routing, scalars without gradient, over the tokens in scope that count:

    - entropy_gating: mean entropy of the router's probabilities, in nats.
    - overflow: percentage of routed choices beyond capacity.
    - load_max: choices of the most chosen expert, before dropping, over the mean of all experts.
    - max_vio: MaxVio, load_max - 1 (Wang et al., arXiv 2408.15664).
    - experts_per_token: mean number of experts that a token is sent to, before dropping, without
      null experts.
    - overflow_expert1, _expert2: percentage of routed first, second choices beyond capacity.
    - expertK_balance_top, _bottom: percentage of tokens whose K-th choice is among the most, least
      chosen fifth of the experts.
    - unused_expertK_count: experts that are no token's K-th choice.

    With null experts, all metrics but entropy_gating cover the other experts only, and NULL_SHARE
    is the percentage of choices that are null experts: the share of the experts' FLOPs that is
    saved.

    With one choice per token only the keys of the first exist; with more than two, those of two.
    """
    num_experts, k = routing.probs.size(1), routing.experts.size(1)
    with torch.no_grad():
        # summed in double precision: float16 ends at 65504
        entropy, tokens = counted_rows(_entropy(routing.probs), routing.counted)
        entropy = entropy.sum(dtype=torch.float64)
        sums = scope.total(
            torch.cat(
                [
                    torch.stack([entropy, tokens.to(entropy)]),
                    (routing.routed & ~routing.kept).sum(dim=0),
                    routing.counts.flatten(),
                    _histogram(routing).flatten(),
                ]
            )
        )
        each = k * num_experts
        entropy, tokens, dropped, loads, histogram = sums.split([1, 1, k, each, each])
        tokens = tokens.clamp(min=1)  # without tokens the metrics are 0, not 0/0
        computing = num_experts - routing.null_experts
        histogram = histogram.view(k, num_experts)[:, :computing]
        # The branch adds float32's smallest normal number to each share; so do we, to reproduce its
        # metrics to the last digit.
        share = 100.0 * histogram / tokens + torch.finfo(torch.float32).tiny
        share = share.sort(dim=1, descending=True).values
        fifth = max(math.ceil(computing * BALANCE_SHARE), 1)
        loads = loads.view(k, num_experts)
        everything = loads.sum()
        loads = loads[:, :computing]
        load = loads.sum(dim=0)
        stats = {
            "entropy_gating": (entropy / tokens)[0],
            "overflow": 100.0 * dropped.sum() / load.sum().clamp(min=1),
            "load_max": computing * load.max() / load.sum().clamp(min=1),
            "experts_per_token": (load.sum() / tokens)[0],
        }
        stats["max_vio"] = (stats["load_max"] - 1).clamp(min=0)  # without choices load_max is 0
        if routing.null_experts:
            null = everything - load.sum()
            stats[NULL_SHARE] = 100.0 * null / everything.clamp(min=1)
        routed = loads.sum(dim=1)
        for i in range(min(k, 2)):
            name = f"expert{i + 1}"
            stats[f"overflow_{name}"] = 100.0 * dropped[i] / routed[i].clamp(min=1)
            stats[f"unused_{name}_count"] = (histogram[i] == 0).sum().to(share.dtype)
            stats[f"{name}_balance_top"] = share[i, :fifth].sum()
            stats[f"{name}_balance_bottom"] = share[i, -fifth:].sum()
    return stats


def _entropy(probs: Tensor) -> Tensor:
    """(T, E) -> (T, 1), in nats."""
    probs = probs.to(at_least_float32(probs))
    # torch.special.entr takes twice as long on a CPU (Zen 5).
    logs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log_()
    return logs.mul_(probs).sum(dim=1, keepdim=True).neg_()


def _histogram(routing: Routing) -> Tensor:
    """(K, E) int64: how many tokens' K-th choice an expert is."""
    if routing.variable_width:  # beyond what a token takes it has no choice
        return routing.counts
    experts = routing.experts
    ones, _ = counted_rows(torch.ones_like(experts), routing.counted)
    return torch.zeros_like(routing.counts).scatter_add_(1, experts.t(), ones.t())
