"""What the quickstart shows while it works: one line a finished step, one live line below it.

On a terminal the live line is overwritten in place; elsewhere (a file, a CI log) it is printed
afresh every few seconds, if it has changed.
"""

import shutil
import sys
import time
from pathlib import Path
from typing import List, Optional, Tuple

from fairseq_moe_ext.study.logs import measurement

SECONDS_BETWEEN_LINES = 15.0  # where the output is not a terminal


class Screen:
    """Finished lines and one live line on standard output."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.live = ""
        self.last_printed = 0.0

    def line(self, text: str = "") -> None:
        self._clear()
        print(text, flush=True)

    def show(self, text: str) -> None:
        """Replace the live line."""
        if self.terminal:
            width = shutil.get_terminal_size().columns - 1
            text = text[:width]
            print("\r" + text.ljust(len(self.live)), end="", flush=True)
            self.live = text
        elif text != self.live and time.monotonic() - self.last_printed >= SECONDS_BETWEEN_LINES:
            self.last_printed, self.live = time.monotonic(), text
            print(text, flush=True)

    def _clear(self) -> None:
        if self.live and self.terminal:
            print("\r" + " " * len(self.live) + "\r", end="", flush=True)
            self.live = ""


class LogTail:
    """New whole lines of a file that another process appends to."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, encoding="utf-8", errors="replace")  # noqa: SIM115
        self.file.seek(0, 2)
        self.rest = ""

    def lines(self) -> List[str]:
        *whole, self.rest = (self.rest + self.file.read()).split("\n")
        return whole

    def close(self) -> None:
        self.file.close()


class TrainingProgress:
    """How far one training is, from fairseq's own log."""

    def __init__(self, title: str, updates: int) -> None:
        self.title = title
        self.updates = updates
        self.left = 0.0  # seconds, as far as is known
        self.text = "starts"
        self._first: Optional[Tuple[int, float]] = None  # update and time of the first measurement

    def read(self, line: str) -> None:
        """Take note of a line of the log."""
        found = measurement(line)
        if found is None or found.tag != "train_inner":
            return
        update, now = int(found.values["num_updates"]), time.monotonic()
        if self._first is None:
            self._first = (update, now)
        elif update > self._first[0]:
            pace = (now - self._first[1]) / (update - self._first[0])
            self.left = pace * (self.updates - update)
        loss, speed = float(found.values["inner_loss"]), float(found.values["wps"])
        self.text = f"{update}/{self.updates} perplexity {2**loss:,.2f} {speed:,.0f} tokens/s"

    def __str__(self) -> str:
        return f"{self.title} {self.text}"
