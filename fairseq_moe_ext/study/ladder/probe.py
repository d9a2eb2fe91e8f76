"""The speed of each arm's training steps, one arm after the other with nothing beside it: of runs
that share a machine the clock says little."""

import statistics
from pathlib import Path
from typing import List, Sequence

from ... import cores, outputs
from ...errors import UserError
from .. import logs
from .. import plan as plans
from ..runner import Runner
from . import result
from .forecast import training_flops
from .stages import LR, PROBE, Arm, Ladder, Stage, study_file

UPDATES, SKIPPED = 10, 3  # of an arm; the first ones pay for the start


def run(ladder: Ladder, arms: Sequence[Arm]) -> None:
    """Time the arms that are not yet in probe.json, and write it after each."""
    known = result.seconds_per_token(ladder)
    left = [arm for arm in arms if arm.name not in known]
    folder = ladder.out / PROBE
    threads = cores.usable()
    runner = Runner(folder, f"out: {folder}")
    try:
        runner.open()
        for arm in left:
            command = _command(ladder, arm, folder)
            log = folder / f"{arm.name}.log"
            log.unlink(missing_ok=True)
            runner.call(command, log, threads)
            known[arm.name] = seconds_per_token(log)
            outputs.write_json(
                ladder.out / "probe.json",
                {"seconds_per_token": known, "updates": UPDATES, "threads": threads},
            )
            speed = training_flops(arm, ladder) / known[arm.name] / 1e9
            print(
                f"{arm.name}: {1 / known[arm.name]:,.0f} tokens/s, {speed:.0f} GFLOP/s", flush=True
            )
    finally:
        runner.stop()
    print(f"{len(known)} arms are in {ladder.out / 'probe.json'}")


def _command(ladder: Ladder, arm: Arm, folder: Path) -> List[str]:
    """The arm's training, some updates of it, with nothing saved."""
    rates = {arm.name: ladder.tried[ladder.searched(arm)][0].flags[LR]}
    stage = Stage(PROBE, 0, UPDATES, [1], [arm])
    file = folder / f"{arm.name}.yaml"
    outputs.write_text(file, study_file(ladder, stage, rates))
    train = plans.read(file).runs[0].train
    return [*train, "--no-save", "--disable-validation", "--log-interval", "1"]


def seconds_per_token(log: Path) -> float:
    """The median over the updates behind the first ones."""
    speeds = [float(values["wps"]) for values in logs.measurements(log, "train_inner")][SKIPPED:]
    if not speeds:
        raise UserError(f"{log}: has no speed in it; probe again")
    return 1 / statistics.median(speeds)
