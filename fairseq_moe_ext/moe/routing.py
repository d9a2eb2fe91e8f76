"""From router logits to a routing: which experts a token goes to, with what weight, in which slot.

With one or two experts per token the numbers equal those of fairseq's `moe` branch. Everything is
computed by index: nothing here is larger than tokens x experts.
"""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Union

import torch
from torch import Tensor

from .scope import PROCESS, RoutingScope

SCORES: Dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "sigmoid": torch.sigmoid,
}
RUNNER_UP_POLICIES = ("sampling", "all", "random")


class Routing(NamedTuple):
    """The decision of a router for T tokens, E experts and at most K choices per token.

    A token may have fewer than K choices: `routed` is False for the others. So a routing of
    variable width (threshold, relu) is a Routing with K = E: experts (T, E) ranks all of them, and
    `routed` is the mask of what goes where.
    """

    probs: Tensor  # (T, E) scores that sum to 1, differentiable: what balances and is logged
    experts: Tensor  # (T, K) int64: the chosen experts, best first
    weights: Tensor  # (T, K) combine weights, differentiable; 0 where the choice is dropped
    slots: Tensor  # (T, K) int64: position in the expert's queue; meaningful where `routed`
    local_slots: Tensor  # (T, K) int64: the same among this process's choices alone
    routed: Tensor  # (T, K) bool: sent to the expert
    kept: Tensor  # (T, K) bool: routed, and within the expert's capacity
    counts: Tensor  # (K, E) int64: routed choices of each rank an expert gets, before dropping
    counted: Optional[Tensor] = None  # (T,) bool: tokens that losses and metrics count; None: all
    null_experts: int = 0  # this many of the last experts compute nothing: never `routed`
    variable_width: bool = False  # a token takes any number of experts, also if K = E is small
    chosen: Optional[Tensor] = None  # (T, K) bool: those in `counts`, null ones too; None: `routed`


def token_capacity(
    tokens: int, experts: int, *, factor: Optional[float] = None, fraction: Optional[float] = None
) -> int:
    """Slots an expert has: ``int(factor * ceil(tokens / experts))``, the rule of training, or
    ``ceil(fraction * tokens)``, the branch's rule of evaluation. At least 1, so that a short batch
    under a factor below 1 still reaches some expert; at most one for each token, so that a huge
    factor is no limit.
    Raises ValueError for both of them, or neither."""
    if fraction is not None and factor is None:
        return max(1, math.ceil(fraction * tokens))
    if factor is not None and fraction is None:
        return max(1, int(min(factor * math.ceil(tokens / experts), tokens)))
    raise ValueError("token_capacity takes one of factor and fraction")


def route(
    logits: Tensor,
    k: int,
    *,
    score: str = "softmax",
    bias: Optional[Tensor] = None,
    runner_up: str = "all",
    normalize: Optional[str] = "after",
    scale: float = 1.0,
    groups: int = 1,
    top_groups: int = 1,
    prioritized: bool = False,
    capacity: Optional[int] = None,
    padding_mask: Optional[Tensor] = None,
    count_padding: bool = False,
    null_experts: int = 0,
    noise: Optional[Tensor] = None,
    scope: RoutingScope = PROCESS,
) -> Routing:
    """Send each token to its k best experts.

    With k = 1 and `normalize` None it is Switch's top-1 gate (arXiv 2101.03961, section 2.1), with
    k = 2 GShard's top-2 gate (arXiv 2006.16668, algorithm 1).

    Args:
        logits: (T, E) router logits, E >= k.
        score: the score that chooses and weights an expert: "softmax" over experts, or "sigmoid" of
            its own logit (DeepSeek-V3, arXiv 2412.19437, equation 15).
        bias: (E,), added to the scores for the choice only, not for the weights (Wang et al.,
            arXiv 2408.15664, equation 3).
        runner_up: "all": the best of the rest follow the first; "sampling": those under Gumbel
            noise; "random", for k = 2: the runner-up, kept when 2 * its weight exceeds a uniform
            number.
        normalize: divide a token's weights by their sum "before" choices are dropped (a dropped
            weight is lost), "after" (the survivors share it), or None: leave them as they are.
        scale: factor on the weights.
        groups, top_groups: choose among the experts of the best top_groups of so many equal groups
            (`allowed_experts`).
        prioritized: fill slots in the order of the tokens' best score (Riquelme et al., arXiv
            2106.05974, section 4.1), not of their position.
        capacity: slots an expert has; None keeps every choice (dropless).
        padding_mask: (T,) bool, True where a token is padding and is routed nowhere.
        count_padding: count padding in losses and metrics anyway, as in the branch.
        null_experts: the number of experts, the last ones, that compute nothing. A choice of one
            counts in `counts`, which balances, but is not routed: with `normalize` "after" it has
            no part in the weights (Kilian et al., arXiv 2601.15370, section 3).
        noise: (T, E) Gumbel samples for "sampling", (T,) uniform ones for "random"; drawn when
            None.
        scope: the processes whose tokens queue for the same experts, lower ranks first; with
            `prioritized`, only this process.

    Raises:
        ValueError: for settings that no router has, or that contradict each other.
    """
    num_experts = logits.size(-1)
    check_routing(k, num_experts, score, runner_up, normalize)
    check_groups(k, num_experts, groups, top_groups)
    if prioritized and scope is not PROCESS:
        raise ValueError("prioritized orders the tokens of one process only")
    scores = SCORES[score](logits)  # (T, E)

    liked = scores.detach() if bias is None else scores.detach() + bias
    # Logits distinguish experts whose float32 probabilities, near 0 or 1, are equal.
    rivals = logits.detach() if bias is None else liked
    if top_groups < groups:
        forbidden = ~allowed_experts(liked, k, groups, top_groups)
        liked = liked.masked_fill(forbidden, -math.inf)
        rivals = rivals.masked_fill(forbidden, -math.inf)
    experts = liked.argmax(dim=-1, keepdim=True)  # (T, 1)
    if k > 1:
        if runner_up == "sampling":
            rivals = rivals + (gumbel(rivals.shape, rivals.device) if noise is None else noise)
        rivals = rivals.scatter(1, experts, -math.inf)
        experts = torch.cat([experts, best(rivals, k - 1)], dim=1)  # (T, K)

    weights = scores.gather(1, experts)  # (T, K)
    if normalize == "before":
        weights = normalized(weights)
    routed = not_padding(experts, padding_mask)
    if runner_up == "random" and k == 2:
        uniform = torch.rand_like(weights[:, 1]) if noise is None else noise
        lucky = 2 * weights[:, 1].detach() > uniform
        routed = torch.stack([routed[:, 0], routed[:, 1] & lucky], dim=1)
    return send(
        probabilities(scores, score),
        experts,
        weights,
        routed,
        normalize=normalize == "after",
        scale=scale,
        order=scores.amax(dim=-1).argsort(descending=True, stable=True) if prioritized else None,
        capacity=capacity,
        counted=counted_tokens(padding_mask, count_padding),
        null_experts=null_experts,
        scope=scope,
    )


def send(
    probs: Tensor,
    experts: Tensor,
    weights: Tensor,
    routed: Tensor,
    *,
    normalize: bool = False,
    scale: float = 1.0,
    order: Optional[Tensor] = None,
    capacity: Optional[int] = None,
    counted: Optional[Tensor] = None,
    null_experts: int = 0,
    scope: RoutingScope = PROCESS,
) -> Routing:
    """Queue choices at their experts, drop those beyond capacity, and settle the weights.

    Args:
        probs, experts, weights, routed, counted: as Routing has them, before dropping.
        normalize: divide the weights of a token's kept choices by their sum.
        scale: factor on the weights.
        order: (T,), of the tokens in a queue; None: as they stand.
        capacity, null_experts, scope: as `route`.
    """
    counts, local_slots, slots = queue(experts, routed, probs.size(1), scope, order)
    chosen = routed
    if null_experts:
        routed = routed & (experts < probs.size(1) - null_experts)
    kept = within(slots, routed, capacity)
    weights = weights * kept
    if normalize:
        weights = normalized(weights)
    if scale != 1:
        weights = weights * scale
    return Routing(
        probs,
        experts,
        weights,
        slots,
        local_slots,
        routed,
        kept,
        counts,
        counted,
        null_experts,
        chosen=chosen,
    )


def send_ranked(
    probs: Tensor,
    scores: Tensor,
    active: Tensor,
    padding_mask: Optional[Tensor] = None,
    **options: Any,
) -> Routing:
    """`send` each token to all experts that are active for it, weighted by their scores; K = E.

    probs, scores (T, E), active (T, E) bool."""
    # the active ones first, so that dispatch has no more columns than any token has experts
    liked = scores.detach().masked_fill(~active, -1)
    experts = liked.argsort(dim=1, descending=True, stable=True)  # (T, E)
    routed = active.gather(1, experts) & not_padding(experts, padding_mask)
    routing = send(probs, experts, scores.gather(1, experts), routed, **options)
    return routing._replace(variable_width=True)


def allowed_experts(liked: Tensor, k: int, groups: int, top_groups: int) -> Tensor:
    """liked (T, E) -> (T, E) bool: the experts of a token's best top_groups of `groups` groups,
    where a group's score is the sum of its best ceil(k / top_groups) (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2, "node-limited routing"); of equal ones the lower number first."""
    grouped = liked.unflatten(1, (groups, -1))  # (T, groups, E / groups)
    scores = grouped.topk(-(-k // top_groups), dim=2).values.sum(dim=2)  # (T, groups)
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best(scores, top_groups), True)
    return chosen.unsqueeze(2).expand_as(grouped).flatten(1)


def distribution(scores: Tensor) -> Tensor:
    """Scores (T, E) from 0 on, each row divided by its sum; a row of zeros stays zero."""
    return scores / scores.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def probabilities(scores: Tensor, score: str) -> Tensor:
    """Scores (T, E) of a kind in SCORES -> Routing.probs."""
    return scores if score == "softmax" else distribution(scores)


def check_routing(
    k: int,
    num_experts: int,
    score: str = "softmax",
    runner_up: str = "all",
    normalize: Optional[str] = None,
) -> None:
    """Raise ValueError for arguments that `route` does not support."""
    if not 1 <= k <= num_experts:
        raise ValueError(f"k = {k}: a token takes at least 1 expert and at most {num_experts}")
    if score not in SCORES:
        raise ValueError(f"score {score!r} is none of {tuple(SCORES)}")
    if runner_up not in RUNNER_UP_POLICIES:
        raise ValueError(f"runner_up {runner_up!r} is none of {RUNNER_UP_POLICIES}")
    if runner_up == "random" and k > 2:
        raise ValueError(f"runner_up 'random' is a rule for the second of 2 experts, not for {k}")
    if normalize not in (None, "before", "after"):
        raise ValueError(f"normalize {normalize!r} is none of None, 'before', 'after'")


def check_groups(k: int, num_experts: int, groups: int, top_groups: int) -> None:
    """Raise ValueError unless a token can take k experts of top_groups of so many groups."""
    if groups < 1 or num_experts % groups != 0:
        raise ValueError(
            f"{groups} groups cannot have equal shares of the experts: use a number that divides "
            f"{num_experts}"
        )
    if not 1 <= top_groups <= groups:
        raise ValueError(f"a token takes experts of 1 to all {groups} groups, not of {top_groups}")
    held = top_groups * (num_experts // groups)
    if k > held:
        raise ValueError(
            f"a token's groups, {top_groups} of {groups}, hold fewer experts ({held}) than it "
            f"takes ({k}): raise the number of its groups, or lower that of its experts"
        )


def best(scores: Tensor, count: int) -> Tensor:
    """scores (T, E) -> (T, count): the experts with the largest scores, best first; of equal ones
    the lower number first, which topk would not keep to."""
    if count == 1:
        return scores.argmax(dim=1, keepdim=True)
    if 4 * count > scores.size(1):
        return scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    # One by one: to sort 8,192 tokens by 512 experts on a CPU takes as long as 50 of these.
    chosen: List[Tensor] = []
    left = scores.detach().clamp(min=torch.finfo(scores.dtype).min)
    for _ in range(count):
        chosen.append(left.argmax(dim=1, keepdim=True))
        left.scatter_(1, chosen[-1], -math.inf)
    return torch.cat(chosen, dim=1)


def counted_tokens(padding_mask: Optional[Tensor], count_padding: bool) -> Optional[Tensor]:
    """padding_mask (T,) bool -> which tokens capacity, losses and metrics count (T,); None: all."""
    return None if padding_mask is None or count_padding else ~padding_mask.bool()


def not_padding(experts: Tensor, padding_mask: Optional[Tensor]) -> Tensor:
    """experts (T, K), padding_mask (T,) bool -> (T, K) bool: whether a choice is a token's."""
    if padding_mask is None:
        return torch.ones_like(experts, dtype=torch.bool)
    return ~padding_mask.bool().unsqueeze(1).expand_as(experts)


def real_rows(padding_mask: Optional[Tensor]) -> Union[slice, Tensor]:
    """padding_mask (T,) bool -> the indices of the tokens that are not padding; all for None. With
    indices, the CPU waits for a GPU once; with a mask, at each use."""
    return slice(None) if padding_mask is None else (~padding_mask.bool()).nonzero()[:, 0]


def normalized(weights: Tensor) -> Tensor:
    """(T, K) -> (T, K), each row divided by its sum; a row of zeros stays zero."""
    eps = torch.finfo(weights.dtype).eps
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=eps)


def within(slots: Tensor, routed: Tensor, capacity: Optional[int]) -> Tensor:
    return routed if capacity is None else routed & (slots < capacity)


def queue(
    experts: Tensor,
    routed: Tensor,
    num_experts: int,
    scope: RoutingScope,
    order: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Give each routed choice its position in its expert's queue.

    First choices precede second choices, and so on; within each, lower process ranks come first,
    then tokens in order, or in `order` (T,). For example, of three tokens with the choices
    [[0, 1], [1, 0], [0, 1]] expert 0 has the queue token 0, token 2 (first choices), token 1
    (second), and expert 1 the queue token 1, token 0, token 2.

    Returns:
        counts (K, E): choices of each rank an expert gets here; local_slots (T, K): the position
        among this process's choices; slots (T, K): the position among all in scope.
    """
    tokens, k = experts.shape
    counts = experts.new_zeros(k, num_experts)
    counts.scatter_add_(1, experts.t(), routed.t().to(counts.dtype))
    if tokens == 1 and scope is PROCESS:  # generation: behind the token's own better choices
        slots = ((experts.t() == experts) & routed).tril(-1).sum(dim=1).view(1, k)
        return counts, slots, slots
    # Choices that are not routed queue for a dummy expert, number E, after all others.
    line = experts.masked_fill(~routed, num_experts)  # (T, K)
    if order is not None:
        line = line[order]
    line, choice = line.t().reshape(-1).sort(stable=True)  # (K T,), by expert, in slot order
    starts = counts.new_zeros(num_experts + 1)
    torch.cumsum(counts.sum(dim=0), dim=0, out=starts[1:])
    position = torch.arange(tokens * k, device=experts.device) - starts[line]
    local_slots = torch.empty_like(position).scatter_(0, choice, position).view(k, tokens).t()
    if order is not None:
        local_slots = torch.empty_like(local_slots).index_copy_(0, order, local_slots)
    if scope is PROCESS:
        return counts, local_slots, local_slots
    before, total = scope.before_and_total(counts)  # (K, E) each
    # Ahead of the local ones: better ranks on other processes, this rank on lower processes.
    ahead = before + (total - counts).cumsum(dim=0) - (total - counts)
    return counts, local_slots, local_slots + ahead.gather(1, experts.t()).t()


def gumbel(shape: torch.Size, device: torch.device) -> Tensor:
    """Standard Gumbel samples in float32; for the same seed those of torch.distributions.Gumbel,
    which the branch draws, but in one tensor."""
    float32 = torch.finfo(torch.float32)
    uniform = torch.rand(shape, device=device, dtype=torch.float32)
    uniform.mul_(1 - float32.eps).add_(float32.tiny)
    return uniform.log_().neg_().log_().neg_()
