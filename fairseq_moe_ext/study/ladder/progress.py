"""progress.html: where a ladder's runs stand, for a browser that reloads it."""

import contextlib
import math
import time
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence, Tuple

from ... import files, outputs
from ...errors import UserError
from ...evaluation import figures, report
from .. import diverged, logs
from ..result import GROUPS
from . import hours
from .stages import Arm, Ladder, Stage

NAME = "progress.html"
RELOAD = 60  # seconds
RUNS_IF_YOUNGER = 600.0  # seconds since a log grew
_MOST_POINTS = 60  # of a curve
_PER_CHART = 4  # lines


class State(NamedTuple):
    """Where a run stands."""

    word: str  # "done", "diverged", "evaluation", "running", "stopped", "to do"
    updates: int = 0
    minutes: float = math.nan  # in training steps
    perplexity: float = math.nan  # in domain, on the test sets
    curve: Sequence[Tuple[float, float]] = ()  # (updates, training perplexity)


def state(folder: Path, updates: int) -> State:
    """By the files of a run's folder."""
    log = folder / "train.log"
    if not log.is_file():
        return State("to do")
    lines = logs.without_repeats(log, "train_inner")
    curve = [(float(values["num_updates"]), _perplexity(values)) for values in lines]
    step = max(1, len(curve) // _MOST_POINTS)
    curve = curve[step - 1 :: step]
    at = int(lines[-1]["num_updates"]) if lines else 0
    minutes = sum(float(v.get("train_wall", 0)) for v in lines) / 60
    with contextlib.suppress(UserError, KeyError, TypeError):
        mean = files.read_json(folder / "evaluation.json")["mean"]
        perplexity = mean[GROUPS[0]]["perplexity"]  # null: infinity
        return State(
            "done", updates, minutes, math.inf if perplexity is None else perplexity, curve
        )
    if diverged.noted(folder):
        return State("diverged", at, minutes, math.inf, curve)
    if (folder / "trained").is_file():
        return State("evaluation", updates, minutes, curve=curve)
    young = time.time() - log.stat().st_mtime < RUNS_IF_YOUNGER
    return State("running" if young else "stopped", at, minutes, curve=curve)


def _perplexity(values: Mapping[str, Any]) -> float:
    """Of a line of training; NaN where it diverged."""
    names = ("inner_loss", "nll_loss", "loss")  # not all criterions log the first ones
    bits = next((float(values[name]) for name in names if name in values), math.nan)
    return 2**bits if bits < 100 else math.nan


Row = Tuple[Arm, int, State]  # and the seed


def write(ladder: Ladder, gflops: float) -> None:
    """Write the page, whole or not at all."""
    outputs.write_text(ladder.out / NAME, html(ladder, gflops))


def html(ladder: Ladder, gflops: float) -> str:
    """progress.html as a string; `gflops` is the speed of arms that were not probed."""
    by_stage: Dict[str, List[Row]] = {
        stage.name: [
            (arm, seed, state(ladder.folder(stage, arm, seed), stage.updates))
            for seed in stage.seeds
            for arm in stage.arms
        ]
        for stage in ladder.stages
    }
    states = [found for rows in by_stage.values() for _, _, found in rows]
    done = sum(found.word in ("done", "diverged") for found in states)
    now = sum(found.word in ("running", "evaluation") for found in states)
    return report.render(
        "ladder_progress.html",
        title=f"{ladder.title}: progress",
        reload=RELOAD,
        summary=f"{done} of {len(states)} runs are done, {now} at work; "
        f"written {time.strftime('%Y-%m-%d %H:%M:%S')}.",
        hours=hours.said(ladder, ladder.stages, gflops),
        stages=[
            {
                "name": f"{stage.name}: {stage.updates:,} updates",
                "table": _table(stage, by_stage[stage.name]),
                "charts": _charts(by_stage[stage.name]),
            }
            for stage in ladder.stages
        ],
    )


def _table(stage: Stage, rows: Sequence[Row]) -> report.Table:
    cells = [
        [
            f"{arm.name}, seed {seed}",
            found.word,
            f"{found.updates:,} of {stage.updates:,}" if found.updates else "",
            "" if math.isnan(found.minutes) else f"{found.minutes:.1f}",
            "" if math.isnan(found.perplexity) else f"{found.perplexity:.2f}",
        ]
        for arm, seed, found in rows
    ]
    return report.table(["", "state", "updates", "minutes", "perplexity in domain"], cells)


def _charts(rows: Sequence[Row]) -> List[Dict[str, object]]:
    """Training perplexity of what has begun, some lines a chart, each chart with its legend."""
    begun = [(f"{arm.name}, seed {seed}", found.curve) for arm, seed, found in rows if found.curve]
    charts = []
    for first in range(0, len(begun), _PER_CHART):
        part = begun[first : first + _PER_CHART]
        series = [figures.Series(name, curve, i) for i, (name, curve) in enumerate(part)]
        charts.append(
            {
                "chart": figures.line_chart(
                    "training perplexity", series, "updates", "", log_y=True, markers=False
                ),
                "legend": figures.legend([name for name, _ in part], list(range(len(part)))),
            }
        )
    return charts
