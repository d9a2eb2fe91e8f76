"""The speed of each arm's training steps, one arm after the other with nothing beside it: of runs
that share a machine the clock says little. In rounds, because others may use the machine, too: the
speed of a training has differed by a third from one probe to the next."""

import math
import statistics
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

from ... import cores, files, outputs
from ...errors import UserError
from ...evaluation.study_result import as_written
from .. import logs
from .. import plan as plans
from ..runner import Runner
from .forecast import training_flops
from .stages import LR, PROBE, Arm, Ladder, Stage, study_file

UPDATES, SKIPPED = 10, 3  # of a training; the first ones pay for the start
ROUNDS = 3


class _Probed(NamedTuple):
    """probe.json: of arms by name."""

    seconds_per_token: Dict[str, float]
    how: Dict[str, Dict[str, Any]]  # `_how` of each arm; older files lack a part
    threads: int  # of the arm that was timed last; 0: not known


def seconds_per_token(ladder: Ladder) -> Dict[str, float]:
    """What the probe measured so far, of arms that have the same settings as then, with as many
    threads as the last one. Raises UserError for a damaged file."""
    probed = _read(ladder)
    outdated = _outdated(ladder, probed, probed.threads)
    return {name: s for name, s in probed.seconds_per_token.items() if name not in outdated}


def _read(ladder: Ladder) -> _Probed:
    path = ladder.out / "probe.json"
    if not path.is_file():
        return _Probed({}, {}, 0)
    with as_written(path):
        content = files.read_json(path)
        found: Dict[str, float] = content["seconds_per_token"]
        for name, seconds in found.items():
            if not 0 < seconds < math.inf:
                raise ValueError(f"{seconds} seconds of {name}")
        threads = content.get("threads", 0)
        how = {name: {"threads": threads} for name in found if threads}
        how.update({name: dict(of) for name, of in content.get("timed_with", {}).items()})
        return _Probed(found, how, threads)


def _outdated(ladder: Ladder, probed: _Probed, threads: int) -> List[str]:
    """The arms that were timed with other settings, or another number of threads, updates or
    rounds."""
    now = {arm.name: _how(ladder, arm, threads) for arm in ladder.arms}
    return [
        name
        for name, how in probed.how.items()
        if name in now and any(now[name].get(key) != value for key, value in how.items())
    ]


def _how(ladder: Ladder, arm: Arm, threads: int) -> Dict[str, Any]:
    settings = ladder.settings(arm)
    return {"threads": threads, "settings": settings, "updates": UPDATES, "rounds": ROUNDS}


def run(ladder: Ladder, arms: Sequence[Arm]) -> None:
    """Time the arms that are not yet in probe.json, and all that are outdated, in turn, and write
    the median of its rounds after an arm's last."""
    threads = cores.threads(cores.usable())
    probed = _read(ladder)
    known, how = probed.seconds_per_token, probed.how
    again = _outdated(ladder, probed, threads)
    if again:
        print(
            f"timing {', '.join(again)} again: their settings, or the number of threads, updates "
            "or rounds have changed",
            flush=True,
        )
    left = [
        arm for arm in ladder.arms if arm.name in again or (arm in arms and arm.name not in known)
    ]
    folder = ladder.out / PROBE
    runner = Runner(folder, f"out: {folder}")
    timed: Dict[str, List[float]] = {arm.name: [] for arm in left}
    try:
        runner.open()
        for arm in list(left) * ROUNDS:
            command = _command(ladder, arm, folder)
            log = folder / f"{arm.name}.log"
            log.unlink(missing_ok=True)
            runner.call(command, log, threads)
            timed[arm.name].append(_logged(log))
            if len(timed[arm.name]) < ROUNDS:
                continue
            known[arm.name] = statistics.median(timed[arm.name])
            how[arm.name] = _how(ladder, arm, threads)
            outputs.write_json(
                ladder.out / "probe.json",
                {"seconds_per_token": known, "threads": threads, "timed_with": how},
            )
            print(_line(arm, timed[arm.name], training_flops(arm, ladder)), flush=True)
    finally:
        runner.stop()
    print(f"{len(known)} arms are in {ladder.out / 'probe.json'}")


def _line(arm: Arm, seconds: Sequence[float], flops: float) -> str:
    """d0: 27,384 (26,930 to 28,580) tokens/s, 170 GFLOP/s"""
    middle, slowest, fastest = statistics.median(seconds), max(seconds), min(seconds)
    ends = f"{1 / slowest:,.0f} to {1 / fastest:,.0f}"
    return f"{arm.name}: {1 / middle:,.0f} ({ends}) tokens/s, {flops / middle / 1e9:.0f} GFLOP/s"


def _command(ladder: Ladder, arm: Arm, folder: Path) -> List[str]:
    """The arm's training, some updates of it, with nothing saved."""
    rates = {arm.name: ladder.tried[ladder.searched(arm)][0].flags[LR]}
    stage = Stage(PROBE, 0, UPDATES, [1], [arm])
    file = folder / f"{arm.name}.yaml"
    outputs.write_text(file, study_file(ladder, stage, rates))
    train = plans.read(file).runs[0].train
    return [*train, "--no-save", "--disable-validation", "--log-interval", "1"]


def _logged(log: Path) -> float:
    """Seconds per token: the median over the updates behind the first ones."""
    speeds = [float(values["wps"]) for values in logs.measurements(log, "train_inner")][SKIPPED:]
    if not speeds:
        raise UserError(f"{log}: has no speed in it; probe again")
    return 1 / statistics.median(speeds)
