"""Numbers, values and names in sentences and tables."""

import difflib
from typing import Iterable


def count(number: int, noun: str) -> str:
    """(1, "seed") -> "1 seed", (2000, "seed") -> "2,000 seeds"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def short(value: object) -> str:
    """As text that fits a line."""
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."


def flag(name: str) -> str:
    """moe_freq -> --moe-freq."""
    return "--" + name.replace("_", "-")


def did_you_mean(word: object, names: Iterable[object]) -> str:
    """ "; did you mean NAME?" with the name that is most like a word; "" if none is like it."""
    close = difflib.get_close_matches(str(word), [*map(str, names)], n=1)
    return f"; did you mean {close[0]}?" if close else ""


def signed(value: float, digits: int = 1) -> str:
    """With its sign, but for what is shown as 0."""
    shown = f"{value:+.{digits}f}".replace("-", "−")
    return shown[1:] if not float(shown[1:]) else shown


def small(value: float, digits: int = 2) -> str:
    """A number, not negative, that is shown as 0 only if it is 0."""
    shown = f"{value:.{digits}f}"
    return f"< {10**-digits:.{digits}f}" if value > 0 and not float(shown) else shown


def clock(seconds: float) -> str:
    """As min:s."""
    whole = int(seconds + 0.5)
    return f"{whole // 60}:{whole % 60:02d}"
