"""From router logits to a routing: which experts a token goes to, with what weight, in which slot.

The semantics are those of fairseq's `moe` branch (top-1 and top-2 gates; GShard, arXiv
2006.16668, algorithm 1), computed by index: nothing here is larger than tokens x experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .pool import PROCESS, Pool

SECOND_EXPERT_POLICIES = ("all", "sampling", "random")


class Routing(NamedTuple):
    """The decision of a gate for T tokens, E experts and K choices a token."""

    probs: Tensor  # (T, E) softmax of the logits, differentiable
    experts: Tensor  # (T, K) int64: the chosen experts, best first
    weights: Tensor  # (T, K) combine weights, differentiable; 0 where the choice is dropped
    slots: Tensor  # (T, K) int64: place in the expert's queue; meaningful where `routed`
    places: Tensor  # (T, K) int64: the same among this process's choices alone
    routed: Tensor  # (T, K) bool: sent to the expert (not padding, not sampled away)
    kept: Tensor  # (T, K) bool: routed, and within the expert's capacity
    counts: Tensor  # (K, E) int64: routed choices of each rank an expert gets, before dropping
    counted: Optional[Tensor] = None  # (T,) bool: tokens that losses and figures count; None: all


def token_capacity(
    tokens: int,
    experts: int,
    *,
    factor: Optional[float] = None,
    fraction: Optional[float] = None,
) -> int:
    """Slots an expert has: ``int(factor * ceil(tokens / experts))``, the rule of training, or
    ``ceil(fraction * tokens)``, the branch's rule of evaluation. At least 1, so that a short batch
    under a factor below 1 still reaches some expert."""
    if (factor is None) == (fraction is None):
        raise ValueError("token_capacity takes one of factor and fraction")
    if fraction is not None:
        return max(1, math.ceil(fraction * tokens))
    return max(1, int(factor * math.ceil(tokens / experts)))


def route_top1(
    logits: Tensor,
    *,
    capacity: Optional[int] = None,
    padding_mask: Optional[Tensor] = None,
    count_padding: bool = False,
    pool: Pool = PROCESS,
) -> Routing:
    """Switch-style routing: each token to its best expert, weighted by that probability.

    Args:
        logits: (T, E) router logits.
        capacity: slots an expert has; None keeps every choice (dropless).
        padding_mask: (T,) bool, True where a token is padding and is routed nowhere.
        count_padding: losses and figures count it all the same, as in the branch.
        pool: the processes whose tokens queue before the same experts, those of lower rank first.
    """
    probs = torch.softmax(logits, dim=-1)  # (T, E)
    experts = probs.argmax(dim=-1, keepdim=True)  # (T, 1)
    routed = _not_padding(experts, padding_mask)
    counts, places, slots = _queue(experts, routed, logits.size(-1), pool)
    kept = _within(slots, routed, capacity)
    weights = probs.gather(1, experts) * kept
    counted = counted_tokens(padding_mask, count_padding)
    return Routing(probs, experts, weights, slots, places, routed, kept, counts, counted)


def route_top2(
    logits: Tensor,
    *,
    capacity: Optional[int] = None,
    padding_mask: Optional[Tensor] = None,
    count_padding: bool = False,
    second_expert_policy: str = "all",
    normalize_before_dropping: bool = False,
    batch_prioritized: bool = False,
    noise: Optional[Tensor] = None,
    pool: Pool = PROCESS,
) -> Routing:
    """GShard-style routing: each token to its two best experts, weights renormalised over them.

    Args:
        logits: (T, E) router logits, E >= 2.
        capacity: slots an expert has; None keeps every choice (dropless).
        padding_mask: (T,) bool, True where a token is padding and is routed nowhere.
        count_padding: losses and figures count it all the same, as in the branch.
        second_expert_policy: "all": the runner-up; "sampling": the runner-up under Gumbel noise;
            "random": the runner-up, kept when 2 * its weight exceeds a uniform number.
        normalize_before_dropping: divide by the sum of the two weights before choices are dropped
            (a dropped weight is then lost) rather than after (the survivor gets it all).
        batch_prioritized: fill slots in the order of the tokens' best probability (Riquelme et
            al., arXiv 2106.05974, section 4.1), not of their position.
        noise: (T, E) Gumbel samples for "sampling", (T,) uniform ones for "random"; drawn when
            None.
        pool: the processes whose tokens queue before the same experts, those of lower rank first;
            with batch_prioritized, this one alone.
    """
    if batch_prioritized and pool is not PROCESS:
        raise ValueError("batch_prioritized orders the tokens of one process only")
    if second_expert_policy not in SECOND_EXPERT_POLICIES:
        raise ValueError(
            f"second_expert_policy {second_expert_policy!r} is none of {SECOND_EXPERT_POLICIES}"
        )
    if logits.size(-1) < 2:
        raise ValueError(f"top-2 routing needs at least 2 experts, not {logits.size(-1)}")
    probs = torch.softmax(logits, dim=-1)  # (T, E)
    first = probs.argmax(dim=-1, keepdim=True)  # (T, 1)
    rivals = logits.detach()
    if second_expert_policy == "sampling":
        rivals = rivals + (_gumbel_like(rivals) if noise is None else noise)
    second = rivals.scatter(1, first, -math.inf).argmax(dim=-1, keepdim=True)
    experts = torch.cat([first, second], dim=1)  # (T, 2)

    weights = probs.gather(1, experts)  # (T, 2)
    if normalize_before_dropping:
        weights = _normalize(weights)
    routed = _not_padding(experts, padding_mask)
    if second_expert_policy == "random":
        uniform = torch.rand_like(weights[:, 1]) if noise is None else noise
        lucky = 2 * weights[:, 1].detach() > uniform
        routed = torch.stack([routed[:, 0], routed[:, 1] & lucky], dim=1)
    order = probs.amax(dim=-1).argsort(descending=True, stable=True) if batch_prioritized else None
    counts, places, slots = _queue(experts, routed, logits.size(-1), pool, order)
    kept = _within(slots, routed, capacity)
    weights = weights * kept
    if not normalize_before_dropping:
        weights = _normalize(weights)
    counted = counted_tokens(padding_mask, count_padding)
    return Routing(probs, experts, weights, slots, places, routed, kept, counts, counted)


def counted_tokens(padding_mask: Optional[Tensor], count_padding: bool) -> Optional[Tensor]:
    """padding_mask (T,) bool -> which tokens capacity, losses and figures count (T,); None: all."""
    return None if padding_mask is None or count_padding else ~padding_mask.bool()


def _not_padding(experts: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    if padding_mask is None:
        return torch.ones_like(experts, dtype=torch.bool)
    return ~padding_mask.bool().unsqueeze(1).expand_as(experts)


def _normalize(weights: Tensor) -> Tensor:
    """(T, 2) -> (T, 2), each row divided by its sum; a row of zeros stays zero."""
    eps = torch.finfo(weights.dtype).eps
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=eps)


def _within(slots: Tensor, routed: Tensor, capacity: Optional[int]) -> Tensor:
    return routed if capacity is None else routed & (slots < capacity)


def _queue(
    experts: Tensor,
    routed: Tensor,
    num_experts: int,
    pool: Pool,
    order: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queue the routed choices up before their experts: every first choice before any second
    one, and within those by process, and by token, or by `order` (T,), the tokens from first to
    last.

    Returns counts (K, E), the choices of each rank an expert gets here, places (T, K) among those,
    and slots (T, K) among the pool's.
    """
    tokens, k = experts.shape
    counts = experts.new_zeros(k, num_experts)
    counts.scatter_add_(1, experts.t(), routed.t().to(counts.dtype))
    # Choices that go nowhere queue before expert number E, behind all others.
    queue = experts.masked_fill(~routed, num_experts)  # (T, K)
    if order is not None:
        queue = queue[order]
    queue, choice = queue.t().reshape(-1).sort(stable=True)  # (K T,), by expert, in slot order
    starts = counts.new_zeros(num_experts + 1)
    torch.cumsum(counts.sum(dim=0), dim=0, out=starts[1:])
    place = torch.arange(tokens * k, device=experts.device) - starts[queue]
    places = torch.empty_like(place).scatter_(0, choice, place).view(k, tokens).t()
    if order is not None:
        places = torch.empty_like(places).index_copy_(0, order, places)
    before, total = pool.ranks(counts)  # (K, E) each
    # Ahead in the pool's queue: all choices of better rank, and those of this rank elsewhere.
    ahead = before + (total - counts).cumsum(dim=0) - (total - counts)
    return counts, places, places + ahead.gather(1, experts.t()).t()


def _gumbel_like(logits: Tensor) -> Tensor:
    """Standard Gumbel samples, (T, E) float32: from one seed the same as the branch's."""
    zero = torch.zeros((), device=logits.device)
    return torch.distributions.Gumbel(zero, zero + 1).rsample(logits.shape)
