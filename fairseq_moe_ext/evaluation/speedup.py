"""The speed-up factor: how many times less compute one family of models needs (Artetxe et al. 2021,
section 4). Numbers in, numbers out."""

import math
from typing import List, NamedTuple, Optional, Sequence, Tuple

from ..errors import UserError
from ..wording import count

Points = Sequence[Tuple[float, float]]  # (training cost, performance) of each model of a family


class Factor(NamedTuple):
    """A point of the paper's figure 1."""

    performance: float
    dense_cost: float
    moe_cost: float

    @property
    def factor(self) -> float:
        """How many times more compute the dense family needs for the same performance."""
        return self.dense_cost / self.moe_cost


def frontier(points: Points, rising: bool = False) -> List[Tuple[float, float]]:
    """The models that no cheaper or equally costly one equals or beats, the cheapest first.

    Args:
        rising: whether a higher performance is better (accuracy), not a lower one (perplexity).
    """
    sign = -1 if rising else 1
    kept: List[Tuple[float, float]] = []
    for cost, performance in sorted(points, key=lambda point: (point[0], sign * point[1])):
        if not kept or sign * performance < sign * kept[-1][1]:
            kept.append((cost, performance))
    return kept


def cost_to_reach(points: Points, performance: float, rising: bool = False) -> Optional[float]:
    """Training cost c(t) that a family needs to reach performance t; None outside what it showed.

    Between the two neighbouring models of the frontier that have t between them, ln c is linear in
    t: c(t) = exp(ln c_lo + r (ln c_hi - ln c_lo)), r = (t - t_lo) / (t_hi - t_lo). No
    extrapolation.
    """
    kept = frontier(points, rising)
    for cost, reached in kept:
        if reached == performance:
            return cost
    for (low_cost, low), (high_cost, high) in zip(kept, kept[1:]):
        if min(low, high) < performance < max(low, high):
            r = (performance - low) / (high - low)
            return math.exp(math.log(low_cost) + r * math.log(high_cost / low_cost))
    return None


def speedup_factors(dense: Points, moe: Points, rising: bool = False) -> List[Factor]:
    """A factor for every observed performance of either family that the other reaches too, in
    order of the dense cost. Empty when the families do not overlap.

    Raises UserError for a family of one point (nothing to interpolate) or an invalid cost.
    """
    for name, points in (("dense", dense), ("MoE", moe)):
        if len(points) < 2:
            raise UserError(
                f"the {name} family has {count(len(points), 'point')}: a speed-up "
                "factor is interpolated between at least two; train another size"
            )
        for cost, performance in points:
            if not 0 < cost < math.inf or not math.isfinite(performance):
                raise UserError(
                    f"the {name} family has a point of cost {cost}, performance {performance}: "
                    "give costs above 0 and finite numbers"
                )
    factors = set()
    for performance in {t for _, t in [*dense, *moe]}:
        a, b = (cost_to_reach(points, performance, rising) for points in (dense, moe))
        if a is not None and b is not None:
            factors.add(Factor(performance, a, b))
    return sorted(factors, key=lambda factor: factor.dense_cost)


def worse_though_larger(models: Sequence[Tuple[str, float, float]]) -> str:
    """A warning that names models whose perplexity is higher than that of a cheaper one; "" if
    there are none. Of (name, training cost, perplexity) of a family."""
    worse = [
        name
        for name, cost, perplexity in sorted(models, key=lambda model: model[1])
        if any(c < cost and p < perplexity for _, c, p in models)
    ]
    if not worse:
        return ""
    return (
        f"{', '.join(worse)} {'has' if len(worse) == 1 else 'have'} a higher perplexity than a "
        "smaller model of the family. If a dense model is badly trained, the saving looks too "
        "large; if a sparse one is, too small. Check its learning rate"
    )


def in_words(factor: float) -> str:
    """What MoE needs for the same performance: "1.30 times less compute than", dense."""
    shown = f"{max(factor, 1 / factor):.2f}"
    if shown == "1.00":
        return "as much compute as"
    return f"{shown} times {'less' if factor > 1 else 'more'} compute than"


def overlap(dense: Points, moe: Points, rising: bool = False) -> str:
    """A description of two families' overlap: the range of performance that both frontiers reach,
    or that there is none."""
    dense, moe = frontier(dense, rising), frontier(moe, rising)
    low = max(min(t for _, t in points) for points in (dense, moe))
    high = min(max(t for _, t in points) for points in (dense, moe))
    if low > high:
        return (
            f"no overlap: dense models reach {_range(dense)}, MoE models {_range(moe)}, and "
            "nothing is extrapolated; train larger dense or smaller MoE models"
        )
    return _between(low, high)


def _range(points: Points) -> str:
    return _between(min(t for _, t in points), max(t for _, t in points))


def _between(low: float, high: float) -> str:
    ends = (f"{t:.2f}" if t < 1e6 else f"{t:.3g}" for t in (low, high))
    return " to ".join(dict.fromkeys(ends))
