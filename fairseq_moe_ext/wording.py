"""Numbers, values and names in sentences and tables."""

import difflib
from typing import Iterable

# Of the log line of a CPU that gains nothing from bfloat16; a study reads it there.
BF16_IN_FLOAT32 = "--bf16: computing in float32"


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


def has_flag(words: Iterable[str], *flags: str) -> bool:
    """Whether the words of a command line have one of these flags, as --flag or --flag=VALUE."""
    return any(word.partition("=")[0] in flags for word in words)


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


def with_prefix(value: float, digits: int = 3) -> str:
    """A number in short: 1500000 -> 1.5M, 0.25 -> 0.25, 3.0 -> 3."""
    if abs(value) >= 1e15:
        return f"{value:.{digits}g}".replace("e+", "e")
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def clock(seconds: float) -> str:
    """As min:s."""
    whole = int(seconds + 0.5)
    return f"{whole // 60}:{whole % 60:02d}"


def duration(seconds: float) -> str:
    """As h:min:s; from 100 hours on in days."""
    seconds = max(0, round(seconds))
    if seconds >= 100 * 3600:
        return f"{seconds / 86400:.0f} d"
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
