"""What a sparse model saves against a ladder of dense ones on as many tokens. Numbers in, numbers
out."""

import math
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from ...evaluation.perplexity import UnitLosses
from ...evaluation.speedup import cost_to_reach
from ..paired import paired

Points = Sequence[Tuple[float, float]]  # (cost, perplexity) of each dense model
DRAWS = 1000


class Saving(NamedTuple):
    """How many times the cost a dense model needs for the same perplexity. Beyond the dense models
    there is no number: `beyond` is 1 where the sparse model is better than all of them, -1 where it
    is worse; then `factor` is that of the best, or the smallest, of them: the saving is more, or
    less."""

    factor: float
    beyond: int = 0


def saving(dense: Points, cost: float, perplexity: float) -> Saving:
    """ln cost is linear in ln perplexity between neighbouring dense models. Of two or more."""
    logs = [(c, math.log(p)) for c, p in dense]
    reached = cost_to_reach(logs, math.log(perplexity))
    if reached is not None:
        return Saving(reached / cost)
    best, cost_of_best = min((p, c) for c, p in dense)
    if perplexity < best:  # a larger dense model that is worse shows nothing
        return Saving(cost_of_best / cost, 1)
    return Saving(min(c for c, _ in dense) / cost, -1)


Ends = Tuple[Optional[float], Optional[float]]  # None: beyond the dense models


def ends_over_seeds(savings: Sequence[Saving]) -> Optional[Ends]:
    """The 95 % interval of Student's t of ln factor; None unless two seeds or more have one."""
    if len(savings) < 2 or any(one.beyond for one in savings):
        return None
    found = paired([math.log(one.factor) for one in savings])
    return math.exp(found.low), math.exp(found.high)


def ends_of(savings: Sequence[Saving]) -> Ends:
    """The 2.5 and the 97.5 percentile of draws."""
    ordered = sorted(
        math.inf if s.beyond > 0 else 0.0 if s.beyond < 0 else s.factor for s in savings
    )
    last = len(ordered) - 1
    low, high = ordered[round(0.025 * last)], ordered[round(0.975 * last)]
    return low if 0 < low < math.inf else None, high if 0 < high < math.inf else None


def drawn_perplexities(models: Sequence[UnitLosses], seed: int, draws: int = DRAWS) -> np.ndarray:
    """(draws, M) perplexities of each model on a test set whose units are drawn anew, the same
    ones for all models."""
    sums = np.array([model["nats"] for model in models])  # (M, U)
    sizes = np.array(models[0]["tokens"], dtype=np.float64)  # (U,)
    units = len(sizes)
    rng = np.random.default_rng(seed)
    found = np.empty((draws, len(models)))
    for i in range(draws):
        times = np.bincount(rng.integers(units, size=units), minlength=units)
        found[i] = sums @ times / (sizes @ times)
    return np.exp(found)


def ends_over_units(costs: Sequence[float], perplexities: np.ndarray) -> Ends:
    """Of draws, (draws, M): the last model is the sparse one."""
    return ends_of(
        [saving(list(zip(costs[:-1], row[:-1])), costs[-1], row[-1]) for row in perplexities]
    )


def ends_by_intervals(dense: Points, cost: float, perplexity: float, width: float) -> Ends:
    """Where perplexity is known to a factor of exp(width) either way."""

    def end(shift: float) -> Optional[float]:
        found = saving(dense, cost, perplexity * math.exp(shift))
        return None if found.beyond else found.factor

    return end(width), end(-width)


def joint_width(intervals: Sequence[Optional[Sequence[float]]]) -> Optional[float]:
    """Half the width, in ln perplexity, of the difference between the last model and the least
    certain of the others, as if independent; None where one has no interval."""
    halves: List[float] = []
    for ends in intervals:
        if not ends:
            return None
        halves.append(math.log(ends[1] / ends[0]) / 2)
    return math.hypot(halves[-1], max(halves[:-1]))


def tokens_for(target: float, factor_of: Callable[[float], float]) -> Optional[float]:
    """The tokens at which a growing factor reaches the target; None below a quadrillion."""
    low, high = 1.0, 1e15
    if factor_of(high) < target:
        return None
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if factor_of(middle) < target else (low, middle)
    return high
