"""The learning rate of each arm: the best of those that the stage `lr` tried."""

import math
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Tuple

from ...errors import UserError
from .. import diverged, logs, trained
from ..plan import Run
from .stages import LR, Ladder, runs_of


class Rate(NamedTuple):
    """A learning rate that was chosen."""

    value: Any  # as the file has it; None: all that were tried diverged
    tried: List[Tuple[Any, float]]  # each value, and the in-domain validation perplexity it gave

    @property
    def at_the_edge(self) -> bool:
        """Whether a rate beyond those that were tried might be better."""
        values = [float(value) for value, _ in self.tried]
        return (
            len(values) > 1
            and self.value is not None
            and float(self.value) in (min(values), max(values))
        )


def choose(ladder: Ladder) -> Dict[str, Rate]:
    """The best for each arm whose rate is searched. One value alone needs no run. Raises UserError
    unless all others are trained, with the settings that the file has."""
    search = [stage for stage in ladder.stages if stage.name == LR]  # none: one rate an arm
    tries = {run.folder: run for stage in search for run in runs_of(ladder, stage, None)}
    return {name: _best(ladder, name, tries) for name in ladder.tried}


def of_arms(ladder: Ladder, chosen: Mapping[str, Rate]) -> Dict[str, Any]:
    """The value for every arm of the ladder. Raises UserError for one whose tries all diverged."""
    names = {arm.name: ladder.searched(arm) for arm in ladder.arms}
    for name in names.values():
        if chosen[name].value is None:
            values = ", ".join(str(value) for value, _ in chosen[name].tried)
            raise UserError(
                f"learning-rate: values: {name}: no finite perplexity on the validation text with "
                f"any of {values}; list lower ones"
            )
    return {arm: chosen[name].value for arm, name in names.items()}


def _best(ladder: Ladder, name: str, tries: Mapping[Path, Run]) -> Rate:
    arms = ladder.tried[name]
    if len(arms) == 1:
        return Rate(arms[0].flags[LR], [])
    tried, stage = [], ladder.stage(LR)
    for arm in arms:
        folder = ladder.folder(stage, arm, stage.seeds[0])
        if not (folder / "trained").is_file() and not diverged.noted(folder):
            raise UserError(
                f"{folder}: not trained yet; learning rates are chosen when the stage {LR} is done"
            )
        other = trained.differs(tries[folder])
        if other:
            raise UserError(f"{folder}: {other}: delete this folder to try it again")
        perplexity = math.inf if diverged.noted(folder) else validated(folder / "train.log")
        tried.append((arm.flags[LR], perplexity))
    value, perplexity = min(tried, key=lambda one: one[1])
    return Rate(value if perplexity < math.inf else None, tried)


def validated(log: Path) -> float:
    """The lowest perplexity on the validation text of the training domains; infinity of none."""
    found = logs.by_epoch(log, "valid", "valid_in_domain_ppl")
    return min((x for x in found if math.isfinite(x)), default=math.inf)
