"""Round numbers along an axis, and their labels."""

import math
from typing import List, Sequence

from ...wording import with_prefix


def linear_ticks(low: float, high: float, wanted: int = 5) -> List[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> List[float]:
    """Round numbers inside [low, high] for a logarithmic axis; finer ones where the range is short.

    low must be above 0.
    """
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8)):
        ticks = [
            m * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for m in steps
            if low <= m * 10.0**power <= high
        ]
        if len(ticks) >= 3:
            return ticks
    return linear_ticks(low, high)


def labels(ticks: Sequence[float]) -> List[str]:
    """Labels with as few digits as distinguish them."""
    for digits in range(3, 9):
        shown = [with_prefix(tick, digits) for tick in ticks]
        if len(set(shown)) == len(ticks):
            break
    return shown
