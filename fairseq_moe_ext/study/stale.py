"""Results of a run's evaluation and priming that the study's file no longer asks for.

Beside each result, NAME.json, the study writes the command that made it, NAME.command.json, whose
settings count. Older studies did not. What the result says of itself must fit, too.
"""

import os
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Collection, Dict, List, NamedTuple, Optional, Sequence

from .. import files, outputs
from ..evaluation.study_result import as_written
from .plan import Run

EVALUATION, PRIMING = "evaluation", "priming"
_FLAGS = ("--context", "--batch-size", "--bootstrap", "--tasks", "--shots", "--draws")


class Step(NamedTuple):
    """What is done to a trained model."""

    name: str
    command: List[str]  # [] for none


def steps(run: Run) -> List[Step]:
    return [Step(EVALUATION, run.evaluate), Step(PRIMING, run.prime)]


def record(run: Run, step: Step) -> None:
    """Write the command that makes the result. Before it is started."""
    outputs.write_json(run.folder / f"{step.name}.command.json", step.command)


def is_stale(run: Run, step: Step, sets: Collection[str]) -> bool:
    """Whether other settings made the result. Raises UserError for a damaged file.

    Args:
        sets: names of the test sets; none: not known.
    """
    result = run.folder / f"{step.name}.json"
    if not step.command or not result.is_file():
        return False
    with as_written(result):
        if not _fits(files.read_json(result), step, sets):
            return True
    recorded = run.folder / f"{step.name}.command.json"
    if not recorded.is_file():
        return False
    with as_written(recorded):
        return _settings(files.read_json(recorded)) != _settings(step.command)


def _settings(command: Sequence[str]) -> Dict[str, Any]:
    """What changes the result. Other words may differ: where Python is, or flags of a newer plugin
    that only write more."""
    folders = takewhile(lambda word: not word.startswith("--"), command[4:])
    return {
        "folders": [os.path.realpath(folder) for folder in folders],
        "stride": _stride(command),
        **{flag: _value(command, flag) for flag in _FLAGS},
    }


def _fits(content: Any, step: Step, sets: Collection[str]) -> bool:
    if not isinstance(content, dict):
        return True  # collecting it names the file
    if step.name == PRIMING:
        shots = content.get("settings", {}).get("shots")
        return shots is None or ",".join(map(str, shots)) == _value(step.command, "--shots")
    asked = _stride(step.command)
    same_sets = not sets or {*content.get("sets", sets)} == {*sets}
    return same_sets and str(content.get("stride", asked)) == str(asked)


def _stride(command: Sequence[str]) -> Optional[str]:
    return _value(command, "--stride") or _value(command, "--context")


def _value(command: Sequence[str], flag: str) -> Optional[str]:
    return command[command.index(flag) + 1] if flag in command else None


def put_aside(run: Run, step: Step) -> Path:
    """Keep the result as NAME.before.json (then before-2, ...), so that the step is done again."""
    (run.folder / "trained").touch()  # which studies did not always write
    result = run.folder / f"{step.name}.json"
    names = (result.with_suffix(f".before{'' if n == 1 else -n}.json") for n in count(1))
    kept = next(path for path in names if not os.path.lexists(path))
    os.rename(result, kept)
    return kept
