"""BASE layers: every expert gets the same number of tokens (Lewis et al., arXiv 2103.16716; stock's
formulation, fairseq/modules/base_layer.py@0.12.2)."""

from __future__ import annotations

from typing import Any, Optional, Tuple

import torch
from torch import Tensor

from ..router import TopKRouter, register_router
from ..routing import Routing, counted_tokens, distribution, not_padding, real_rows, send

PRECISION = 1e-3  # of the range of scores: how far their mean may be from the optimum
ROUNDS = 10_000


def balanced_assignment(scores: Tensor) -> Tensor:
    """scores (T, E) -> (T,) int64, an expert for each token: no expert gets more than ceil(T / E)
    tokens, and the sum of the scores is at most T * PRECISION * (their range) below the largest
    possible.

    An auction (Bertsekas 1988, doi 10.1007/BF02186476, for experts with many equal places). A token
    bids for its best expert up to the price at which the second best is as good. An expert keeps
    its highest bidders, and its price is the lowest bid that it keeps. Large steps find approximate
    prices first, from which small steps start."""
    tokens, num_experts = scores.shape
    places = -(-tokens // num_experts)
    scores = torch.nan_to_num(scores.detach().double())
    # rows that fill the remaining places
    absent = scores.new_zeros(places * num_experts - tokens, num_experts)
    scores = torch.cat([scores, absent])
    spread = float(scores.max() - scores.min()) if scores.numel() else 0.0
    if num_experts == 1 or spread == 0:
        return torch.arange(tokens, device=scores.device) % num_experts
    price = scores.new_zeros(num_experts)
    for step in (0.1, 0.01, PRECISION):
        owner, price = _auction(scores, price, places, step * spread)
    return owner[:tokens]


def _auction(scores: Tensor, price: Tensor, places: int, step: float) -> Tuple[Tensor, Tensor]:
    """One auction: scores (N, E), initial price (E,) -> the expert of each token (N,), and
    prices."""
    num_experts = len(price)
    owner = torch.full((len(scores),), -1, device=scores.device)  # -1: none
    bids = scores.new_zeros(len(scores))
    for _ in range(ROUNDS):
        free = (owner < 0).nonzero().flatten()  # (F,)
        if len(free) == 0:
            return owner, price
        value, wanted = (scores[free] - price).topk(2, dim=1)
        owner[free] = wanted[:, 0]
        bids[free] = price[wanted[:, 0]] + (value[:, 0] - value[:, 1]) + step
        owner, price = _highest_bidders(owner, bids, price, places)
    free = (owner < 0).nonzero().flatten()  # take the remaining places, in order
    left = places - torch.bincount(owner[owner >= 0], minlength=num_experts)
    owner[free] = torch.arange(num_experts, device=owner.device).repeat_interleave(left)
    return owner, price


def _highest_bidders(
    owner: Tensor, bids: Tensor, price: Tensor, places: int
) -> Tuple[Tensor, Tensor]:
    """owner (N,), each with a bid (N,) -> owner with -1 where an expert has more than its places,
    and prices (E,): the lowest bid held, where all places are taken."""
    order = bids.argsort(descending=True, stable=True)
    order = order[owner[order].argsort(stable=True)]  # by expert, the highest bid first
    counts = torch.bincount(owner, minlength=len(price))
    rank = torch.arange(len(owner), device=owner.device)
    rank -= (counts.cumsum(0) - counts)[owner[order]]
    last = order[rank == places - 1]  # one of each expert that is full
    price = price.clone()
    price[owner[last]] = bids[last]
    owner = owner.clone()
    owner[order[rank >= places]] = -1
    return owner, price


@register_router("base")
class BaseRouter(TopKRouter):
    """One expert a token, y += sigmoid(logit) * expert(x). In training the assignment with equal
    loads and the largest sum of logits; at evaluation each token's best expert, or with
    balanced_evaluation the assignment again; then a row depends on its batch."""

    heeds = frozenset("balanced_evaluation route_scale fp32_product input_jitter".split())
    default_top_k = 1
    causal = False
    capacity_free = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.settings.top_k != 1:
            raise ValueError(f"top_k {self.settings.top_k}: the router base gives a token 1 expert")

    def route(
        self, logits: Tensor, capacity: Optional[int], padding_mask: Optional[Tensor]
    ) -> Routing:
        """As TopKRouter's."""
        s = self.settings
        scores = torch.sigmoid(logits)
        if self.training or s.balanced_evaluation:
            experts = self._assigned(logits.detach(), padding_mask)
        else:
            experts = logits.detach().argmax(dim=1, keepdim=True)
        return send(
            distribution(scores),
            experts,
            scores.gather(1, experts),
            not_padding(experts, padding_mask),
            scale=s.route_scale,
            capacity=capacity,
            counted=counted_tokens(padding_mask, s.count_padding),
            scope=self.scope,
        )

    def _assigned(self, logits: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        """(T, 1) int64, computed with the tokens of all processes in scope; 0 for padding."""
        real = real_rows(padding_mask)
        everyone, mine = self.scope.gather(logits[real])
        experts = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        experts[real] = balanced_assignment(everyone)[mine]
        return experts.unsqueeze(1)
