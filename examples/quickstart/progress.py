"""What the quickstart shows while it works: one line a finished step, one live line below it.

On a terminal the live line is overwritten in place; elsewhere (a file, a CI log) it is printed
afresh every few seconds.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Tuple

SECONDS_BETWEEN_LINES = 15.0  # where the output is not a terminal


def clock(seconds: float) -> str:
    """Seconds as min:s."""
    whole = int(seconds + 0.5)
    return f"{whole // 60}:{whole % 60:02d}"


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
        elif time.monotonic() - self.last_printed >= SECONDS_BETWEEN_LINES:
            self.last_printed = time.monotonic()
            print(text, flush=True)

    def _clear(self) -> None:
        if self.live:
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


def measurement(line: str) -> Optional[Tuple[str, Dict]]:
    """(tag, figures) of a line that `--log-format json` wrote, None for any other.

    Such a line is "time | INFO | tag | {json}" (fairseq/logging/progress_bar.py:151@0.12.2).
    """
    parts = line.split(" | ", 3)
    if len(parts) != 4 or not parts[3].startswith("{"):
        return None
    try:
        return parts[2], json.loads(parts[3])
    except json.JSONDecodeError:
        return None  # a line cut off by a kill


class TrainingProgress:
    """The live line of one training, from fairseq's own log."""

    def __init__(self, title: str, updates: int) -> None:
        self.title = title
        self.updates = updates
        self.started = time.monotonic()
        self.first: Optional[int] = None  # update this process began with
        self.text = "starting fairseq-train"

    def read(self, line: str) -> None:
        found = measurement(line)
        if found is None:
            return
        tag, figures = found
        if tag != "train_inner":
            return
        update = int(figures["num_updates"])
        now = time.monotonic()
        if self.first is None:
            self.first, self.started = update, now
        left = ""
        if update > self.first:
            seconds = (now - self.started) / (update - self.first) * (self.updates - update)
            left = f"  about {clock(seconds)} left"
        speed = float(figures["wps"])
        self.text = (
            f"update {update}/{self.updates}  loss {float(figures['inner_loss']):.2f} bits/token  "
            f"{speed:,.0f} tokens/s{left}"
        )

    def __str__(self) -> str:
        return f"  {self.title}: {self.text}"
