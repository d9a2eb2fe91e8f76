"""S-BASE: Sinkhorn balances the choices of a batch in training (Clark et al., arXiv 2202.01169)."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..router import TopKRouter, register_router
from ..routing import (
    SCORES,
    Routing,
    best,
    counted_tokens,
    normalized,
    not_padding,
    probabilities,
    real_rows,
    send,
)

STEPS = 32  # times that columns and rows are normalised, in turn


def sinkhorn(logits: Tensor) -> Tensor:
    """logits (T, E) -> the plan (T, E) in float64: exp(logits), with rows and columns rescaled in
    turn so that rows sum to 1 and columns approximately to T / E."""
    tokens, num_experts = logits.shape
    logits = logits.detach().double()
    columns = logits.new_zeros(num_experts)
    for _ in range(STEPS):
        rows = -torch.logsumexp(logits + columns, dim=1, keepdim=True)  # (T, 1)
        columns = -torch.logsumexp(logits + rows, dim=0)  # (E,), up to log(T / E)
    return torch.softmax(logits + columns, dim=1)


@register_router("sinkhorn")
class SinkhornRouter(TopKRouter):
    """In training, a token takes the top_k experts of Sinkhorn's plan for the whole batch; at
    evaluation, those with its best scores. Scores are the weights. No gradient flows through the
    plan."""

    heeds = frozenset(
        "score normalize_weights route_scale fp32_product input_jitter null_experts".split()
    )
    causal = False

    def route(
        self, logits: Tensor, capacity: Optional[int], padding_mask: Optional[Tensor]
    ) -> Routing:
        """As TopKRouter's."""
        s = self.settings
        scores = SCORES[s.score](logits)
        liked = self._plan(logits, padding_mask) if self.training else logits.detach()
        experts = best(liked, s.top_k)  # (T, K)
        weights = scores.gather(1, experts)
        if s.normalize == "before":
            weights = normalized(weights)
        return send(
            probabilities(scores, s.score),
            experts,
            weights,
            not_padding(experts, padding_mask),
            normalize=s.normalize == "after",
            scale=s.route_scale,
            capacity=capacity,
            counted=counted_tokens(padding_mask, s.count_padding),
            null_experts=s.null_experts,
            scope=self.scope,
        )

    def _plan(self, logits: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
        """(T, E), computed from the tokens of all processes in scope; rows of padding are its
        logits."""
        real = real_rows(padding_mask)
        everyone, mine = self.scope.gather(logits.detach()[real])
        plan = logits.detach().to(torch.float64, copy=True)  # does not overwrite logits in float64
        plan[real] = sinkhorn(everyone)[mine]
        return plan
