"""What an accuracy is worth: its interval, and what guessing gives. Numbers in, numbers out.

Chance is a guess among the candidates: the mean over questions of right ones / candidates. Where
all questions have the same answers, always giving the most frequent one may be better; that is the
majority. An accuracy says something only above the higher of the two, `floor`.
"""

import math
from collections import Counter
from typing import Any, Mapping, Optional, Sequence, Tuple

_Z_95 = 1.959963984540054  # standard normal quantile of 97.5 %

Interval = Tuple[float, float]


def wilson_interval(correct: float, examples: float) -> Interval:
    """Ends of the 95 % confidence interval of a share of which `correct` of `examples` were seen
    (Wilson 1927): between 0 and 1, also where none or all were right."""
    if examples == 0:
        return 0.0, 1.0
    share, z2 = correct / examples, _Z_95**2 / examples
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    # By rounding the ends of none and all would be a little off 0 and 1.
    return (
        0.0 if correct == 0 else middle - half,
        1.0 if correct == examples else middle + half,
    )


def mean_interval(shares: Sequence[float], examples: Sequence[float]) -> Interval:
    """Ends of the 95 % interval of the plain mean of shares of different questions: the distances
    to the ends of each one's, added as independent errors are (Newcombe 1998, method 10)."""
    ends = [wilson_interval(share * n, n) for share, n in zip(shares, examples)]
    mean = sum(shares) / len(shares)
    below = math.sqrt(sum((share - low) ** 2 for share, (low, _) in zip(shares, ends)))
    above = math.sqrt(sum((high - share) ** 2 for share, (_, high) in zip(shares, ends)))
    return mean - below / len(shares), mean + above / len(shares)


def chance(right: Sequence[int], candidates: Sequence[int]) -> float:
    """Of questions with so many right ones of so many candidates each."""
    return sum(r / n for r, n in zip(right, candidates)) / len(candidates)


def majority(labels: Sequence[int]) -> float:
    """Accuracy of the most frequent label, always."""
    return max(Counter(labels).values()) / len(labels)


def floor(task: Mapping[str, Any]) -> Optional[float]:
    """Of a task's figures, the accuracy that needs no reading; None of a file older than these."""
    if task.get("chance") is None:
        return None
    return max(task["chance"], task.get("majority") or 0.0)


def in_percent(low: float, high: float) -> str:
    """An interval as tables have it, from shares."""
    return f"{100 * low:.1f} to {100 * high:.1f}"
