"""Differences between models that were trained with the same seeds, by Student's t."""

import math
from typing import Dict, List, NamedTuple, Sequence


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


def t_share(t: float, freedom: int) -> float:
    """P(T <= t), t >= 0, of Student's t with whole degrees of freedom (Abramowitz and Stegun,
    26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for i in range(2 if odd else 1, freedom, 2):
        total += term
        term *= cosine**2 * i / (i + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 + inside) / 2


def t_quantile(share: float, freedom: int) -> float:
    """The t with t_share(t) = share, from 0.5 up."""
    low, high = 0.0, 1.0
    while t_share(high, freedom) < share:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_share(middle, freedom) < share else (low, middle)
    return high
