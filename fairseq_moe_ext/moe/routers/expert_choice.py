"""Expert choice (Zhou et al., arXiv 2202.09368): each expert takes the tokens it scores best."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from ..router import TopKRouter, register_router
from ..routing import SCORES, Routing, counted_tokens, probabilities, send_ranked


@register_router("expert_choice")
class ExpertChoiceRouter(TopKRouter):
    """Each expert takes its best top_k / E of the batch's tokens, so whether a token is taken
    depends on the tokens that follow it. It exists for the test that shows this."""

    heeds = frozenset("score route_scale fp32_product input_jitter".split())
    causal = False
    capacity_free = True
    refused = (
        "an expert that chooses among all tokens of a batch sees tokens that a language model "
        "should predict; use threshold, its causal counterpart"
    )

    def route(
        self, logits: Tensor, capacity: Optional[int], padding_mask: Optional[Tensor]
    ) -> Routing:
        """As TopKRouter's, with K = E: `routed` says which of the ranked experts take a token."""
        s = self.settings
        scores = SCORES[s.score](logits)
        liked = scores.detach()
        if padding_mask is not None:
            liked = liked.masked_fill(padding_mask.bool().unsqueeze(1), -1)
        number = min(len(logits), max(1, round(len(logits) * s.top_k / self.num_experts)))
        chosen = liked.argsort(dim=0, descending=True, stable=True)[:number]  # (number, E)
        return send_ranked(
            probabilities(scores, s.score),
            scores,
            torch.zeros_like(liked, dtype=torch.bool).scatter(0, chosen, True),
            padding_mask,
            scale=s.route_scale,
            counted=counted_tokens(padding_mask, s.count_padding),
            scope=self.scope,
        )
