"""The finished runs of a ladder, as far as its file asks for them."""

from typing import Dict, List, Optional, Tuple

from ...errors import UserError
from ...evaluation.study_result import RunResult
from .. import finished, trained
from ..plan import Run
from . import rates
from .stages import LR, Ladder, runs_of


class LadderRun(RunResult):
    """A run of a stage."""

    stage: str


def collect(ladder: Ladder) -> Tuple[List[LadderRun], List[str]]:
    """Their results, also those of stages that were not asked for this time; and a line for each
    run that was trained with other settings than the file has, and is left out."""
    given = _rates(ladder)
    found: List[Tuple[str, Run]] = []  # with the stage
    left_out: List[str] = []
    for stage in ladder.stages:
        if not (ladder.out / stage.name).is_dir():
            continue
        of_arms = None if stage.name == LR else given or {arm.name: 1 for arm in ladder.arms}
        ignored = () if given or stage.name == LR else ("--lr",)
        family = {arm.name: arm.family for arm in stage.arms}
        for run in filter(finished.done, runs_of(ladder, stage, of_arms)):
            other = trained.differs(run, ignored)
            if other:
                left_out.append(f"{run.folder}: left out: {other}")
            else:
                found.append((stage.name, run._replace(family=family[run.size])))
    asked = [run for _, run in found]
    results = finished.results(asked, ladder.context, ladder.tokens_per_update)
    runs = [
        LadderRun(stage=name, **result)
        for (name, _), result in zip(found, results)
        if result is not None
    ]
    return runs, left_out


def _rates(ladder: Ladder) -> Optional[Dict[str, object]]:
    """The learning rate of each arm; None before they are chosen."""
    try:
        return rates.of_arms(ladder, rates.choose(ladder))
    except UserError:
        return None
