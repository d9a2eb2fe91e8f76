"""Differences between models that were trained with the same seeds, by Student's t."""

import math
from typing import Dict, List, NamedTuple, Sequence

from ..student_t import t_quantile, t_share


class Difference(NamedTuple):
    """The mean of paired differences."""

    mean: float
    low: float  # ends of the 95 % interval
    high: float
    p: float  # two-sided, of no difference


def paired(differences: Sequence[float]) -> Difference:
    """Of n >= 2 pairs, n - 1 degrees of freedom. One pair has no interval: NaN."""
    n = len(differences)
    mean = sum(differences) / n
    if n < 2:
        return Difference(mean, math.nan, math.nan, math.nan)
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    error = math.sqrt(variance / n)
    if error == 0:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0)
    half = error * t_quantile(0.975, n - 1)
    return Difference(mean, mean - half, mean + half, 2 * (1 - t_share(abs(mean) / error, n - 1)))


def holm(p: Dict[str, float], level: float = 0.05) -> List[str]:
    """The names whose differences are real at this level, all comparisons taken together (Holm
    1979): the smallest p is held against level / their number, the next against level / (that - 1),
    and so on, up to the first that is too large. NaN is ignored: it is no comparison."""
    p = {name: value for name, value in p.items() if not math.isnan(value)}
    real = []
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        if p[name] > level / (len(p) - rank):
            break
        real.append(name)
    return real
