"""ReMoE: ReLU as the router (Wang et al., arXiv 2412.14711)."""

from __future__ import annotations

from typing import Any, Dict, Optional

import torch
from torch import Tensor

from ...kernels.dtypes import at_least_float32
from ..balance import counted_rows
from ..router import TopKRouter, register_router
from ..routing import Routing, counted_tokens, distribution, send_ranked

FIRST_WEIGHT, FACTOR = 1e-8, 1.2  # of the L1 loss, as in the paper
FLOOR = 1e-16  # not in the paper: from 0 it would never rise again


@register_router("relu")
class ReluRouter(TopKRouter):
    """A token goes to every expert whose logit is positive; the logit is its weight. An L1 loss on
    the weights makes the router sparse. The loss has a coefficient that grows while tokens have
    more than top_k experts on average, and shrinks while they have fewer. The loss is larger for
    experts with more tokens, which balances them. Each layer has its own coefficient; the paper has
    one for all layers."""

    heeds = frozenset("route_scale fp32_product input_jitter".split())
    capacity_free = True
    l1_weight: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_state("l1_weight", torch.full((), FIRST_WEIGHT, dtype=torch.float64))

    def route(
        self, logits: Tensor, capacity: Optional[int], padding_mask: Optional[Tensor]
    ) -> Routing:
        """As TopKRouter's, with K = E: `routed` says which of the ranked experts a token takes."""
        scores = torch.relu(logits)
        return send_ranked(
            distribution(scores),
            scores,
            logits.detach() > 0,
            padding_mask,
            scale=self.settings.route_scale,
            counted=counted_tokens(padding_mask, self.settings.count_padding),
            scope=self.scope,
        )

    def loss(
        self, logits: Tensor, routing: Routing, padding_mask: Optional[Tensor]
    ) -> Optional[Tensor]:
        """l1_weight * sum_e(share_e * mean over tokens of relu(logit_e)), with share_e = E / top_k
        times the share of tokens that take expert e, without padding."""
        scores = torch.relu(logits.to(at_least_float32(logits)))
        scores, tokens = counted_rows(scores, counted_tokens(padding_mask, count_padding=False))
        load = routing.counts.sum(dim=0).to(scores)
        summed = torch.cat([scores.sum(dim=0), load, tokens.to(scores).view(1)])
        sizes = [self.num_experts, self.num_experts, 1]
        scores, load, tokens = self.scope.total(summed).split(sizes)
        tokens = tokens.clamp(min=1)
        share = load.detach() / tokens * self.num_experts / self.settings.top_k
        return self.l1_weight.to(scores) * (share * scores / tokens).sum()

    def after_update(self, observed: Dict[str, Tensor]) -> None:
        """Raise or lower the weight of the L1 loss."""
        wanted = observed["tokens"] * self.settings.top_k
        excess = torch.sign(observed["load"].sum() - wanted).squeeze()
        self.l1_weight *= FACTOR ** excess.to(self.l1_weight)
        self.l1_weight.clamp_(min=FLOOR)
