"""Puts an accuracy into context: its confidence interval and the accuracy of guessing.

Chance is the accuracy of a random guess: the mean over questions of right candidates / candidates.
If all questions have the same answers, always giving the most frequent one may be better: the
majority. An accuracy means something only above the higher of the two, `floor`.
"""

import math
from collections import Counter
from typing import Any, Mapping, Optional, Sequence, Tuple

Z_95 = 1.959963984540054  # standard normal quantile of 97.5 %

Interval = Tuple[float, float]


def wilson_interval(correct: float, examples: float) -> Interval:
    """Ends of the 95 % confidence interval of the share `correct` / `examples` (Wilson 1927). They
    are between 0 and 1 even if none or all were right."""
    if examples == 0:
        return 0.0, 1.0
    share, z2 = correct / examples, Z_95**2 / examples
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    # Rounding would move the ends for none and all slightly off 0 and 1.
    return (0.0 if correct == 0 else middle - half, 1.0 if correct == examples else middle + half)


def mean_interval(shares: Sequence[float], examples: Sequence[float]) -> Interval:
    """Ends of the 95 % interval of the unweighted mean of shares over different questions. The
    distances to the ends of their intervals add like independent errors (Newcombe 1998, method
    10)."""
    ends = [wilson_interval(share * n, n) for share, n in zip(shares, examples)]
    mean = sum(shares) / len(shares)
    below = math.sqrt(sum((share - low) ** 2 for share, (low, _) in zip(shares, ends)))
    above = math.sqrt(sum((high - share) ** 2 for share, (_, high) in zip(shares, ends)))
    return mean - below / len(shares), mean + above / len(shares)


def chance(right: Sequence[int], candidates: Sequence[int]) -> float:
    """Accuracy of random guesses, from the right candidates and all candidates per question."""
    return sum(r / n for r, n in zip(right, candidates)) / len(candidates)


def majority(labels: Sequence[int]) -> float:
    """Accuracy of always giving the most frequent label."""
    return max(Counter(labels).values()) / len(labels)


def floor(task: Mapping[str, Any]) -> Optional[float]:
    """The best accuracy without reading the questions, from a task's results; None for older files
    without it."""
    if task.get("chance") is None:
        return None
    return max(task["chance"], task.get("majority") or 0.0)


def in_percent(low: float, high: float) -> str:
    """An interval of shares, in percent, for a table."""
    return f"{100 * low:.1f} to {100 * high:.1f}"
