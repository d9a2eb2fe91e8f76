"""Expert threshold routing (arXiv 2603.11535): the causal counterpart of expert choice."""

from __future__ import annotations

from typing import Any, Dict, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.dtypes import at_least_float32
from ..router import TopKRouter, register_router
from ..routing import SCORES, Routing, best, counted_tokens, probabilities, send_ranked

# Histogram bins of the scores' logits: from -RANGE to RANGE, STEPS bins per unit.
RANGE, STEPS = 16, 16
BINS = 2 * RANGE * STEPS


def logit_of_score(logits: Tensor, score: str) -> Tensor:
    """log(s / (1 - s)) of the scores s, in float32 at least: (T, E) -> (T, E)."""
    logits = logits.to(at_least_float32(logits))
    if score == "sigmoid":
        return logits
    log_p = F.log_softmax(logits, dim=-1)
    return log_p - torch.log1p(-log_p.exp())


def histogram(values: Tensor, counted: Optional[Tensor]) -> Tensor:
    """values (T, E), counted (T,) bool, None: all -> (E, BINS) float64: how many lie in each bin;
    those out of range in the first or last."""
    # NaN, which is an error said elsewhere, has a bin too
    bins = ((values + RANGE) * STEPS).floor().nan_to_num(0).clamp(0, BINS - 1).long()  # (T, E)
    ones = torch.ones_like(bins, dtype=torch.float64)
    if counted is not None:
        ones = ones * counted.unsqueeze(1)
    found = ones.new_zeros(values.size(1), BINS)
    return found.scatter_add_(1, bins.t(), ones.t())


def upper_quantile(counts: Tensor, number: Tensor) -> Tensor:
    """counts (E, BINS) -> (E,): the values that `number` (E,) of an expert's tokens exceed,
    interpolated linearly within a bin."""
    above = counts.flip(1).cumsum(1).flip(1)  # (E, BINS): in this bin and those above it
    # the highest bin with enough tokens in it and above it; the lowest bin if there is none
    place = (above >= number.unsqueeze(1)).sum(dim=1, keepdim=True).clamp(min=1) - 1  # (E, 1)
    inside = counts.gather(1, place).clamp(min=torch.finfo(counts.dtype).tiny)
    share = (above.gather(1, place) - number.unsqueeze(1)) / inside  # of the bin, below the value
    return ((place + share.clamp(0, 1)) / STEPS - RANGE).squeeze(1)


@register_router("threshold")
class ThresholdRouter(TopKRouter):
    """A token goes to every expert whose score for it exceeds the expert's threshold: the moving
    average of the score that a share top_k / E of the tokens of an update exceeds. A token looks at
    no other token of its batch, so the router is causal. It has top_k experts on average once the
    thresholds keep up with the scores; at first they lag, and it has more. Before the first update
    it takes its top_k best. A threshold is at most RANGE: where logits are higher, an expert takes
    all tokens. Evaluation uses the thresholds of the last update, which checkpoints save."""

    heeds = frozenset("score route_scale threshold_decay fp32_product input_jitter".split())
    capacity_free = True
    threshold: Tensor
    updates: Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # of the scores' logits, which are as fine near 0 and 1 as between
        self.register_state("threshold", torch.zeros(self.num_experts, dtype=torch.float64))
        self.register_state("updates", torch.zeros((), dtype=torch.long))

    def route(
        self, logits: Tensor, capacity: Optional[int], padding_mask: Optional[Tensor]
    ) -> Routing:
        """As TopKRouter's, with K = E: `routed` says which of the ranked experts a token takes."""
        s = self.settings
        scores = SCORES[s.score](logits)
        values = logit_of_score(logits.detach(), s.score)
        top = torch.zeros_like(values, dtype=torch.bool).scatter(1, best(logits, s.top_k), True)
        return send_ranked(
            probabilities(scores, s.score),
            scores,
            torch.where(self.updates > 0, values > self.threshold, top),
            padding_mask,
            scale=s.route_scale,
            counted=counted_tokens(padding_mask, s.count_padding),
            scope=self.scope,
        )

    def observe(
        self, logits: Tensor, routing: Routing, padding_mask: Optional[Tensor]
    ) -> Dict[str, Tensor]:
        """Also histogram (E, BINS): of the scores' logits."""
        with torch.no_grad():
            values = logit_of_score(logits, self.settings.score)
            counts = histogram(values, counted_tokens(padding_mask, count_padding=False))
        return {**super().observe(logits, routing, padding_mask), "histogram": counts}

    def after_update(self, observed: Dict[str, Tensor]) -> None:
        """Move the thresholds. The first updates are averaged with equal weights, so that none
        dominates. An update without tokens changes nothing."""
        tokens = observed["tokens"]  # (1,)
        number = (tokens * self.settings.top_k / self.num_experts).expand(self.num_experts)
        new = upper_quantile(observed["histogram"], number)
        counts = tokens[0] > 0
        rate = (1 / (self.updates.to(new) + 1)).clamp(min=1 - self.settings.threshold_decay)
        self.threshold.lerp_(new.to(self.threshold), (rate * counts).to(self.threshold))
        self.updates += counts
