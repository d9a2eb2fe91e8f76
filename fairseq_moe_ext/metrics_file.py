"""metrics.jsonl beside the checkpoints: one object for each time that training logs.

    {"tag": "train_inner", "num_updates": 200, "epoch": 1, "time": 1764358419.2, "loss": 7.129, ...}

The tag is "train_inner" for a log interval, "train" for an epoch, and the subset's name for a
validation. Numbers are numbers; NaN and infinity are null.
"""

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

from . import files, outputs
from .errors import UserError

NAME = "metrics.jsonl"

logger = logging.getLogger(__name__)


class MetricsFile:
    """Appends to the file of a run. Lines of updates that a resumed run will log again are removed.
    If a run starts from scratch, or from another checkpoint than its last, the existing file is
    renamed, not replaced."""

    def __init__(self, folder: Path, done: int, start: Optional[str] = None) -> None:
        """
        Args:
            done: updates that the run has done so far.
            start: the checkpoint that it starts from, where that is not its last one.
        """
        self.path: Optional[Path] = folder / NAME
        try:
            self._begin(self.path, done, start)
        except (OSError, UserError) as error:
            self._give_up(error)

    def add(self, tag: str, num_updates: int, epoch: int, stats: Dict[str, Any]) -> None:
        """Write one object. Training continues if the file cannot be written."""
        if self.path is None:
            return
        record = {"tag": tag, "num_updates": num_updates, "epoch": epoch, "time": time.time()}
        record.update((name, _number(value)) for name, value in stats.items() if name not in record)
        line = json.dumps(record) + "\n"
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            self._give_up(error)

    def _begin(self, path: Path, done: int, start: Optional[str]) -> None:
        if not path.is_file():
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        kept = "".join(line for line in text.splitlines(keepends=True) if _is_before(line, done))
        ours = start is None or Path(start).resolve().parent == path.parent.resolve()
        if done == 0 or not ours or (start is not None and kept != text):
            number = 1
            while os.path.lexists(path.with_name(f"metrics-{number}.jsonl")):
                number += 1
            os.rename(path, path.with_name(f"metrics-{number}.jsonl"))
        if done > 0 and ours and kept != text:
            outputs.write_text(path.resolve(), kept)  # it may be a link to another disk

    def _give_up(self, error: Exception) -> None:
        why = files.reason(error)
        logger.warning(f"{self.path}: cannot be written ({why}); training continues without it")
        self.path = None


def read(path: Path) -> List[Dict[str, Any]]:
    """The objects of a file. Skips lines that are not objects, such as a truncated one."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _is_before(line: str, done: int) -> bool:
    try:
        return line.endswith("\n") and json.loads(line)["num_updates"] <= done
    except (ValueError, TypeError, KeyError):
        return False


def _number(value: Any) -> Any:
    """A meter of fairseq's, a tensor or a number, as JSON has it."""
    for name in ("avg", "sum"):  # of AverageMeter and TimeMeter, and of StopwatchMeter
        value = getattr(value, name, value) if not hasattr(value, "tolist") else value
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (int, float, str, bool, list, type(None))) else str(value)
