"""Results of a run's evaluation and priming that the study's file no longer asks for.

Beside each result, NAME.json, the study writes the command that made it, NAME.command.json. Older
studies did not: then what the result says of itself must fit.
"""

import os
from typing import Any, Collection, List, NamedTuple, Optional, Sequence

from .. import files, outputs
from .plan import Run

EVALUATION, PRIMING = "evaluation", "priming"


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
    """Whether another command made the result. Raises UserError for a damaged file.

    Args:
        sets: names of the test sets; none: not known.
    """
    result = run.folder / f"{step.name}.json"
    if not step.command or not result.is_file():
        return False
    recorded = run.folder / f"{step.name}.command.json"
    if recorded.is_file():
        before = files.read_json(recorded)
        return not isinstance(before, list) or before[1:] != step.command[1:]  # but for its path
    return not _fits(files.read_json(result), step, sets)


def _fits(content: Any, step: Step, sets: Collection[str]) -> bool:
    if not isinstance(content, dict):
        return True  # collecting it names the file
    if step.name == PRIMING:
        shots = content.get("settings", {}).get("shots")
        return shots is None or ",".join(map(str, shots)) == _value(step.command, "--shots")
    asked = _value(step.command, "--stride") or _value(step.command, "--context")
    same_sets = not sets or {*content.get("sets", sets)} == {*sets}
    return same_sets and str(content.get("stride", asked)) == str(asked)


def _value(command: Sequence[str], flag: str) -> Optional[str]:
    return command[command.index(flag) + 1] if flag in command else None


def put_aside(run: Run, step: Step) -> None:
    """Keep the result as NAME.before.json, so that the step is done again."""
    (run.folder / "trained").touch()  # which studies did not always write
    result = run.folder / f"{step.name}.json"
    os.replace(result, result.with_suffix(".before.json"))
