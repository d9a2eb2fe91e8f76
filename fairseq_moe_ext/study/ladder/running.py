"""Runs a ladder's stages one after the other; the same call goes on after an interruption."""

import contextlib
import threading
from pathlib import Path
from typing import Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ... import cli, files, outputs
from ...errors import UserError
from ...evaluation import study_result
from ...wording import count
from . import page, progress, rates, result
from .forecast import training_flops
from .result import LadderResult
from .stages import LR, Arm, Ladder, Stage, select, study_file

PROGRESS_EVERY = 60.0  # seconds


class Chosen(NamedTuple):
    """The part of a ladder that is asked for; empty: all."""

    stages: Sequence[str] = ()
    arms: Sequence[str] = ()  # patterns
    seeds: Sequence[int] = ()


def chosen(ladder: Ladder, asked: Chosen) -> List[Stage]:
    """The stages with their arms and seeds, as far as they are asked for. The stage LR is whole.
    Raises UserError for names that are none."""
    names = [stage.name for stage in ladder.stages]
    for name in asked.stages:
        if name not in names:
            raise UserError(f"--stages {name}: not a stage; they are {', '.join(names)}")
    if asked.arms:
        select(ladder.arms, asked.arms, "--arms")
    wanted = []
    for stage in ladder.stages:
        if asked.stages and stage.name not in asked.stages:
            continue
        if stage.name != LR:
            stage = stage._replace(
                arms=[a for a in stage.arms if not asked.arms or a in _picked(ladder, asked)],
                seeds=[s for s in stage.seeds if not asked.seeds or s in asked.seeds],
            )
        if stage.arms and stage.seeds:
            wanted.append(stage)
    if not wanted:
        raise UserError("--stages, --arms, --seeds: no run is in all of them; leave one out")
    return wanted


def _picked(ladder: Ladder, asked: Chosen) -> List[Arm]:
    return select(ladder.arms, asked.arms, "--arms")


def hours(
    ladder: Ladder, stage: Stage, probed: Mapping[str, float], gflops: float
) -> Tuple[int, float]:
    """How many runs of a stage are left, and the hours of their training: by the probe, and at so
    many GFLOP/s where an arm was not probed. One after the other, on all cores."""
    left, seconds = 0, 0.0
    tokens = stage.updates * ladder.tokens_per_update
    for arm in stage.arms:
        of_arm = training_flops(arm, ladder) / (1e9 * gflops)
        each = tokens * probed.get(arm.name.split(f"-{LR}")[0], of_arm)
        for seed in stage.seeds:
            if not (ladder.folder(stage, arm, seed) / "evaluation.json").is_file():
                left, seconds = left + 1, seconds + each
    return left, seconds / 3600


def say_hours(ladder: Ladder, stages: Sequence[Stage], gflops: float) -> None:
    """A line for each stage, and their sum."""
    probed = result.seconds_per_token(ladder)
    total = 0.0
    for stage in stages:
        left, of_stage = hours(ladder, stage, probed, gflops)
        total += of_stage
        at_most = f", at most: only arms that saved {stage.at_least:g} times at {stage.screen}"
        print(
            f"{stage.name}: {count(left, 'run')} left, {of_stage:.1f} hours"
            + (at_most if stage.screen else "")
        )
    by = "by the probe" if probed else f"at {gflops:g} GFLOP/s (--probe measures it)"
    print(f"in all {total:.1f} hours of training, {by}", flush=True)


def screened(ladder: Ladder, stage: Stage) -> Stage:
    """Without the sparse arms that did not save enough; without any arm if none did. Raises
    UserError before the screen has a result."""
    if not stage.screen:
        return stage
    found = result.collect(ladder)
    tokens = ladder.stage(stage.screen).tokens
    if not any(factor["tokens"] == tokens for factor in found["factors"]):
        raise UserError(
            f"stage {stage.name}: is for arms that saved enough in the stage {stage.screen}, which "
            "has no factor yet; run that first"
        )
    passed = result.passing(ladder, stage, found)
    arms = [arm for arm in stage.arms if arm.family == "dense" or arm in passed]
    return stage._replace(arms=arms if passed else [])


def write_study(ladder: Ladder, stage: Stage) -> Path:
    """The stage's file for `fairseq-moe study`. Raises UserError before the rates are chosen."""
    found: Optional[Dict[str, str]] = None
    if stage.name != LR:
        found = {family: rate.value for family, rate in rates.choose(ladder).items()}
    ladder.out.mkdir(parents=True, exist_ok=True)
    path = ladder.out / f"{stage.name}.yaml"
    outputs.write_text(path, study_file(ladder, stage, found))
    return path


def do(ladder: Ladder, stages: Sequence[Stage], jobs: int) -> int:
    """Run the stages; the exit status. After each one result.json and the page are written."""
    check_result(ladder)
    for stage in stages:
        stage = screened(ladder, stage)
        if not stage.arms:
            print(f"{stage.name}: no arm saved {stage.at_least:g} times at {stage.screen}; not run")
            continue
        file = write_study(ladder, stage)
        with _progress(ladder):
            status = cli.main(["study", str(file), "--jobs", str(jobs)])
        if status:
            return status
        write_result(ladder)
    return 0


def check_result(ladder: Ladder) -> None:
    """Raise UserError before any work if result.json is another's."""
    path = ladder.out / "result.json"
    if path.exists() and not study_result.is_result(files.read_json(path)):
        raise UserError(f"{path}: is not a ladder's result; move it elsewhere")


def write_result(ladder: Ladder) -> LadderResult:
    """result.json, report.html, tables.md and the progress page, of what is done."""
    found = result.collect(ladder)
    if not found["runs"]:
        raise UserError(f"{ladder.out}: no run is finished yet")
    outputs.write_json(ladder.out / "result.json", found)
    page.write(ladder.out, found)
    progress.write(ladder)
    return found


@contextlib.contextmanager
def _progress(ladder: Ladder) -> Iterator[None]:
    """The progress page is written now, every minute, and at the end."""
    ended = threading.Event()

    def rewrite() -> None:
        while not ended.wait(PROGRESS_EVERY):
            with contextlib.suppress(OSError, UserError):  # a full disk must not end a training
                progress.write(ladder)

    progress.write(ladder)
    print(f"progress: {ladder.out / progress.NAME}", flush=True)
    thread = threading.Thread(target=rewrite, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        progress.write(ladder)
