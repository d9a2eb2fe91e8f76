"""What fairseq's commands log with `--log-format json`."""

import json
import math
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional

from .. import files
from ..errors import UserError
from ..wording import BF16_IN_FLOAT32

# The settings that fairseq logs when a training starts (fairseq_cli/train.py:74@0.12.2).
_COMMON = re.compile(r"\| fairseq_cli\.train \| \{.*?'common': (\{[^{}]*\})")


class Measurement(NamedTuple):
    """A line of the log: the tag is "train_inner", "train", or the name of a validation subset."""

    tag: str
    values: Dict[str, Any]


def measurement(line: str) -> Optional[Measurement]:
    """Of any other line, None.

    Such a line is "time | INFO | tag | {json}" (fairseq/logging/progress_bar.py:217@0.12.2).
    """
    parts = line.split(" | ", 3)
    if len(parts) != 4 or not parts[3].startswith("{"):
        return None
    try:
        return Measurement(parts[2], json.loads(parts[3]))
    except json.JSONDecodeError:
        return None  # a line cut off by a kill


def measurements(log: Path, tag: str) -> Iterator[Dict[str, Any]]:
    """The values under a tag, line by line. Raises UserError for what is no file."""
    files.check(log)
    with open(log, encoding="utf-8", errors="replace") as file:
        for line in file:
            measured = measurement(line)
            if measured is not None and measured.tag == tag:
                yield measured.values


def without_repeats(log: Path, tag: str) -> List[Dict[str, Any]]:
    """The values under a tag; of an update that a resumed run repeated, the last."""
    found: Dict[Any, Dict[str, Any]] = {}
    for line, values in enumerate(measurements(log, tag)):
        update = values.get("num_updates", values.get(f"{tag}_num_updates", f"line {line}"))
        found[values.get("epoch"), update] = values
    return list(found.values())


def by_epoch(log: Path, tag: str, key: str) -> List[float]:
    """A metric under a tag in every line that has it."""
    return [float(values[key]) for values in without_repeats(log, tag) if key in values]


def training_seconds(log: Path) -> float:
    """Seconds spent in training steps, without validation and saving, as fairseq counted them.

    fairseq saves its stopwatch in checkpoints, so the last line of an interrupted epoch counts the
    whole epoch. A kill between an epoch's last checkpoint and its line leaves none
    (fairseq_cli/train.py:330@0.12.2); then the lines within it count, each in whole seconds. Raises
    UserError if there are no such lines either.
    """
    epochs = {
        values["epoch"]: float(values["train_train_wall"])
        for values in measurements(log, "train")
        if "epoch" in values and "train_train_wall" in values
    }
    unfinished = [
        float(values["train_wall"])
        for values in without_repeats(log, "train_inner")
        if {"epoch", "train_wall"} <= values.keys() and values["epoch"] not in epochs
    ]
    if not epochs and not unfinished:
        raise UserError(f"{log}: logs no training; to train this run again, delete {log.parent}")
    seconds = sum(epochs.values()) + sum(unfinished)
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{seconds} seconds of training in {log}")
    return seconds


def precision(log: Path) -> str:
    """What a training computed in, "float32", "bfloat16" or "float16", by the settings that it
    logged at its start and the line of a CPU that gains nothing from bfloat16. Of one that was
    continued on another machine perhaps two: "bfloat16 and float32". "" where nothing was logged.
    """
    files.check(log)
    starts: List[str] = []
    with open(log, encoding="utf-8", errors="replace") as file:
        for line in file:
            common = _COMMON.search(line)
            if common:
                starts.append(_asked(common.group(1)))
            elif starts and BF16_IN_FLOAT32 in line:
                starts[-1] = "float32"
    return " and ".join(dict.fromkeys(starts))


def _asked(common: str) -> str:
    flags = set(re.findall(r"'(\w+)': True", common))
    if "bf16" in flags or "memory_efficient_bf16" in flags:
        return "bfloat16"
    return "float16" if flags & {"fp16", "memory_efficient_fp16", "amp"} else "float32"
