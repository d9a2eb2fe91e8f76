"""What a run was trained with: command.json and text.json in its folder, the latter the counts.json
of its data. Older folders lack text.json, and their text counts as that of every other run."""

import hashlib
import json
import os
from itertools import takewhile
from pathlib import Path
from typing import Collection, Dict, Optional, Sequence

from .. import cost, data_bin, files, outputs
from ..errors import UserError
from ..evaluation.study_result import Trained, as_written
from ..shape import Shape
from . import logs
from .plan import Run

COMMAND, TEXT = "command.json", "text.json"
# where things are, and how often something is logged
_CHANGE_NOTHING = ("--user-dir", "--save-dir", "--log-interval")
_LEARNT_FROM = data_bin.SPLITS[:2]  # validation chooses checkpoint_best.pt
_COUNTED = ("documents", "tokens", "bytes")


def record(run: Run) -> None:
    """Before the training starts, or goes on."""
    outputs.write_json(run.folder / COMMAND, run.train)
    counts = run.data / data_bin.COUNTS
    if counts.is_file() and not (run.folder / TEXT).exists():
        outputs.write_json(run.folder / TEXT, files.read_json(counts))


def check(run: Run) -> None:
    """Raise UserError if the run's folder holds a training that the file does not ask for."""
    if os.path.lexists(run.folder) and not run.folder.is_dir():
        raise UserError(f"{run.folder}: not a folder; move it elsewhere")
    other = differs(run) or _differs_in_text(run)
    if other:
        raise UserError(
            f"{run.folder}: {other}: set another `out`, or delete this folder to train it again"
        )


def differs(run: Run, ignored: Collection[str] = ()) -> str:
    """The first setting of its training that the file has changed since, in words; "" for none, or
    only ignored flags. Raises UserError for a damaged file."""
    path = run.folder / COMMAND
    if not os.path.lexists(path):
        return ""
    with as_written(path):
        begun, asked = _settings(files.read_json(path)), _settings(run.train)
        for name in [*begun, *asked]:
            if name not in ignored and not _same(begun.get(name), asked.get(name)):
                was, now = _shown(name, begun.get(name)), _shown(name, asked.get(name))
                return f"was trained {was}, and the file now trains {now}"
    return ""


def _settings(command: Sequence[str]) -> Dict[str, str]:
    """Name -> value of what changes the training."""
    words = command[1:]
    data = [os.path.realpath(word) for word in takewhile(_is_value, words)]
    found = {"data": " ".join(data)}
    flag = ""
    for word in words[len(data) :]:
        if not _is_value(word):
            flag = word
            found[flag] = ""
        else:
            found[flag] = f"{found[flag]} {word}".strip()
    return {name: value for name, value in found.items() if name not in _CHANGE_NOTHING}


def _shown(name: str, value: Optional[str]) -> str:
    return f"without {name}" if value is None else f"with {name} {value}".rstrip()


def _is_value(word: str) -> bool:
    return not word.startswith("--")


def _same(before: Optional[str], now: Optional[str]) -> bool:
    """8e-3 is 0.008."""
    try:
        return before == now or float(before or "") == float(now or "")
    except ValueError:
        return False


def _differs_in_text(run: Run) -> str:
    counts = run.data / data_bin.COUNTS
    noted = digest(run.folder / TEXT)
    if not noted or not counts.is_file() or noted == digest(counts):
        return ""
    return f"was trained on other text than {run.data} now has ({counts})"


def digest(counts: Path) -> str:
    """Of the text that is trained and validated on; "" where there is no such file. Raises
    UserError for a damaged one."""
    if not counts.is_file():
        return ""
    with as_written(counts):
        content = files.read_json(counts)
        text = [
            (name, [[corpus.get(split, {}).get(key) for key in _COUNTED] for split in _LEARNT_FROM])
            for name, corpus in sorted(content["corpora"].items())
            if not corpus.get("held_out")
        ]
    return hashlib.sha256(json.dumps([content.get("types"), text]).encode()).hexdigest()[:16]


def result(run: Run, shape: Shape, context: int, tokens_per_update: int) -> Trained:
    """What result.json says of a run's training. Raises UserError for damaged files."""
    parameters = cost.parameters(shape)
    tokens = run.updates * tokens_per_update
    return {
        "family": run.family,
        "size": run.size,
        "seed": run.seed,
        "parameters": parameters.total,
        "active": parameters.active,
        "experts": shape.experts if shape.sparse else 1,
        "tokens": tokens,
        "flops": tokens * cost.training_flops_per_token(shape, context),
        "precision": logs.precision(run.folder / "train.log"),
        "text": digest(run.folder / TEXT),
    }
