"""How long the runs of a ladder that are left will take."""

from typing import List, Mapping, Sequence, Tuple

from ...wording import count
from .. import diverged
from .forecast import training_flops
from .probe import seconds_per_token
from .stages import Ladder, Stage


def left(
    ladder: Ladder, stage: Stage, probed: Mapping[str, float], gflops: float
) -> Tuple[int, float]:
    """How many runs of a stage are left, and the hours of their training: by the probe, and at so
    many GFLOP/s where an arm was not probed. One after the other, on all cores."""
    runs, seconds = 0, 0.0
    tokens = stage.updates * ladder.tokens_per_update
    for arm in stage.arms:
        of_arm = training_flops(arm, ladder) / (1e9 * gflops)
        each = tokens * probed.get(stage.model(arm), of_arm)
        for seed in stage.seeds:
            folder = ladder.folder(stage, arm, seed)
            if not (folder / "evaluation.json").is_file() and not diverged.noted(folder):
                runs, seconds = runs + 1, seconds + each
    return runs, seconds / 3600


def said(ladder: Ladder, stages: Sequence[Stage], gflops: float) -> List[str]:
    """A line for each stage, and one for their sum."""
    probed = seconds_per_token(ladder)
    total, lines = 0.0, []
    for stage in stages:
        runs, of_stage = left(ladder, stage, probed, gflops)
        total += of_stage
        at_most = f", at most: only arms that saved {stage.at_least:g} times at {stage.screen}"
        lines.append(
            f"{stage.name}: {count(runs, 'run')} left, {of_stage:.1f} hours"
            + (at_most if stage.screen else "")
        )
    arms = {stage.model(arm) for stage in stages for arm in stage.arms}
    assumed = f"at {gflops:g} GFLOP/s (--probe measures it)"
    if arms <= {*probed}:
        by = "by the probe"
    elif arms & {*probed}:
        by = f"{len(arms & {*probed})} of {len(arms)} arms by the probe, the others {assumed}"
    else:
        by = assumed
    return [*lines, f"in all {total:.1f} hours of training on an idle machine, {by}"]
