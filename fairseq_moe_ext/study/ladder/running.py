"""Runs a ladder's stages one after the other; the same call goes on after an interruption."""

import contextlib
import threading
from pathlib import Path
from typing import Iterator, List, NamedTuple, Sequence

from ... import cli, outputs
from ...errors import UserError
from . import page, progress, rates, result
from .result import LadderResult
from .stages import LR, Ladder, Stage, select, study_file

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
    seeds = sorted({seed for stage in ladder.stages for seed in stage.seeds})
    for seed in asked.seeds:
        if seed not in seeds:
            raise UserError(f"--seeds {seed}: not a seed; they are {', '.join(map(str, seeds))}")
    picked = select(ladder.arms, asked.arms or ["*"], "--arms")
    wanted = []
    for stage in ladder.stages:
        if asked.stages and stage.name not in asked.stages:
            continue
        if stage.name != LR:
            stage = stage._replace(
                arms=[arm for arm in stage.arms if arm in picked],
                seeds=[s for s in stage.seeds if not asked.seeds or s in asked.seeds],
            )
        if stage.arms and stage.seeds:
            wanted.append(stage)
    if not wanted:
        raise UserError("--stages, --arms, --seeds: no run is in all of them; leave one out")
    return wanted


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
    unknown = result.without_saving(ladder, stage, found)
    if unknown:
        print(
            f"stage {stage.name}: not run, because they have no saving at {stage.screen}: "
            + ", ".join(arm.name for arm in unknown)
        )
    arms = [arm for arm in stage.arms if arm.family == "dense" or arm in passed]
    return stage._replace(arms=arms if passed else [])


def write_study(ladder: Ladder, stage: Stage) -> Path:
    """A whole stage's file for `fairseq-moe study`, so that its result is of all that is done.
    Raises UserError before the rates are chosen."""
    found = None if stage.name == LR else rates.of_arms(ladder, rates.choose(ladder))
    ladder.out.mkdir(parents=True, exist_ok=True)
    path = ladder.out / f"{stage.name}.yaml"
    outputs.write_text(path, study_file(ladder, stage, found))
    return path


def do(ladder: Ladder, stages: Sequence[Stage], jobs: int, gflops: float) -> int:
    """Run the stages; the exit status. After each one result.json and the page are written."""
    check_result(ladder)
    for stage in stages:
        whole = screened(ladder, ladder.stage(stage.name))
        names = [
            ladder.folder(stage, arm, seed).name
            for seed in stage.seeds
            for arm in stage.arms
            if arm in whole.arms
        ]
        if not names:
            print(f"{stage.name}: no arm saved {stage.at_least:g} times at {stage.screen}; not run")
            continue
        file = write_study(ladder, whole)
        with _progress(ladder, gflops):
            words = ["study", str(file), "--jobs", str(jobs), "--runs", ",".join(names)]
            status = cli.main(words)
        if status:
            return status
        write_result(ladder)
    return 0


def check_result(ladder: Ladder) -> None:
    """Raise UserError before any work if result.json or a page is another's."""
    result.read(ladder.out)
    if ladder.out.is_dir():
        page.check(ladder.out)


def write_result(ladder: Ladder) -> LadderResult:
    """result.json, report.html and tables.md, of what is done. Raises UserError if nothing is."""
    found = result.collect(ladder)
    if not found["runs"]:
        raise UserError(f"{ladder.out}: no run is finished yet")
    outputs.write_json(ladder.out / "result.json", found)
    page.write(ladder.out, found)
    for line in found["remarks"]:
        print(line)
    return found


def tidy(ladder: Ladder) -> None:
    """Delete all checkpoints but the best of runs that are evaluated: nothing goes on from them,
    and those of many experts fill a disk."""
    for stage in ladder.stages:
        for arm in stage.arms:
            for seed in stage.seeds:
                folder = ladder.folder(stage, arm, seed)
                if (folder / "evaluation.json").is_file():
                    for path in folder.glob("checkpoint_*.pt"):
                        if path.name != "checkpoint_best.pt":
                            path.unlink()


@contextlib.contextmanager
def _progress(ladder: Ladder, gflops: float) -> Iterator[None]:
    """The progress page is written now, every minute, and at the end; so is the disk tidied."""
    ended = threading.Event()

    def rewrite() -> None:
        while not ended.wait(PROGRESS_EVERY):
            with contextlib.suppress(OSError, UserError):  # a full disk must not end a training
                progress.write(ladder, gflops)
                tidy(ladder)

    progress.write(ladder, gflops)
    print(f"progress: {ladder.out / progress.NAME}", flush=True)
    thread = threading.Thread(target=rewrite, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        progress.write(ladder, gflops)
        tidy(ladder)
