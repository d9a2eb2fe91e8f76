"""Shows on stderr how far a work of more than ten seconds is; quick work shows nothing.

    with progress_bar.bar("encoding", 1000, "token") as done:
        done.update(10)

On a terminal it is a bar, elsewhere a line a minute, which also suits a log file.
"""

import sys
import time
from types import TracebackType
from typing import Optional, Type, Union

from tqdm import tqdm

from .wording import duration

FIRST = 10.0  # seconds
EVERY = 60.0  # between lines


class Lines:
    """As tqdm, where there is no terminal."""

    def __init__(self, what: str, total: int, unit: str, shown: bool) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.n: float = 0
        self.started = time.monotonic()
        self.next = self.started + FIRST if shown else float("inf")

    def update(self, n: float = 1) -> None:
        """So much more is done."""
        self.n += n
        now = time.monotonic()
        if now < self.next or not 0 < self.n < self.total:
            return
        self.next = now + EVERY
        left = (now - self.started) * (self.total - self.n) / self.n
        print(
            f"{self.what}: {self.n:,.0f} of {self.total:,} {self.unit}s "
            f"({self.n / self.total:.0%}), {duration(left)} left",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Nothing is left to clear."""

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        where: Optional[TracebackType],
    ) -> None:
        self.close()


def bar(what: str, total: int, unit: str, shown: bool = True) -> Union[tqdm, Lines]:
    """To be updated by what is done of `total`, and closed. `shown` no: on other processes than
    the first."""
    if not sys.stderr.isatty():
        return Lines(what, total, unit, shown)
    return tqdm(
        total=total, desc=what, unit=unit, unit_scale=unit == "B", leave=False, disable=not shown
    )
