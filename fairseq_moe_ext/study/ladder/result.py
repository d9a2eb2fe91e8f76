"""A ladder's finished runs -> its result.json: what each sparse arm saves."""

import math
import statistics
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, TypedDict, cast

import numpy as np

from ... import data_bin, files
from ...errors import UserError
from ...evaluation.perplexity import UnitLosses
from ...evaluation.study_result import RunResult, as_written, sets_of, unlike
from ..plan import Run
from ..result import GROUPS, mean_flops, of_run, performance
from . import forecast, probe, rates, saving
from .forecast import Forecast
from .saving import Saving
from .stages import LR, Arm, Ladder, Stage, float32_twin

UNITS = "unit_losses.json"
OVER_SEEDS = "seeds"
OVER_UNITS = "units of test text"
OVER_INTERVALS = "perplexities, as if independent"


class Factor(TypedDict):
    """What an arm saves on a number of tokens, by one group of sets or set."""

    arm: str
    tokens: int
    group: str
    seeds: int
    factor: float  # in FLOPs; where `beyond`, a bound
    beyond: int  # 1: better than every dense model, -1: worse
    # At 95 %. An end of None is beyond the dense models. None: one of several seeds has a bound, or
    # the dense models that it lies between lack that seed.
    interval: Optional[saving.Ends]
    interval_over: str
    with_router: float  # the router's FLOPs counted
    in_seconds: Optional[float]  # in seconds on this machine, a bound as `factor`; None: not probed


class LadderRun(RunResult):
    """A run of a stage."""

    stage: str


class LadderResult(TypedDict):
    """result.json."""

    ladder: Dict[str, Any]  # its title, and its arms and stages by name
    rates: Dict[str, Dict[str, Any]]  # arm -> learning rate, those tried, the arms that take it
    seconds_per_token: Dict[str, float]  # of arms, by the probe
    forecasts: List[Forecast]  # made before the runs
    text: Dict[str, Any]  # counts.json of `fairseq-moe prepare`; {} where there is none
    planned: int
    runs: List[LadderRun]
    factors: List[Factor]


def is_result(content: Any) -> bool:
    """Whether a result.json is a ladder's."""
    return isinstance(content, dict) and "ladder" in content and "factors" in content


def read(folder: Path) -> Optional[LadderResult]:
    """None before there is one. Raises UserError for a result.json that is another's."""
    path = folder / "result.json"
    if not path.exists():
        return None
    content = files.read_json(path)
    if not is_result(content):
        raise UserError(f"{path}: is not a ladder's result; move it elsewhere")
    return cast(LadderResult, content)


def collect(ladder: Ladder) -> LadderResult:
    """Of all runs that are finished, also those of stages that were not asked for this time."""
    runs: List[LadderRun] = []
    planned = 0
    for stage in ladder.stages:
        for seed in stage.seeds:
            for arm in stage.arms:
                planned += 1
                folder = ladder.folder(stage, arm, seed)
                if (folder / "evaluation.json").is_file():
                    run = Run(arm.family, arm.name, seed, stage.updates, folder, [], [], [])
                    found = of_run(run, ladder.context, ladder.tokens_per_update)
                    runs.append(LadderRun(stage=stage.name, **found))
    try:
        chosen = {
            name: {
                "value": rate.value,
                "tried": [(v, p if p < math.inf else None) for v, p in rate.tried],
                "at_the_edge": rate.at_the_edge,
                "also": [a.name for a in ladder.arms if ladder.searched(a) == name != a.name],
            }
            for name, rate in rates.choose(ladder).items()
        }
    except UserError:
        chosen = {}
    probed = probe.seconds_per_token(ladder)
    return {
        "ladder": _described(ladder),
        "rates": chosen,
        "seconds_per_token": probed,
        "forecasts": forecast.read(ladder.forecast),
        "text": _text(ladder),
        "planned": planned,
        "runs": runs,
        "factors": factors(ladder, runs, probed),
    }


def _text(ladder: Ladder) -> Dict[str, Any]:
    """Of the data folder, or as it was noted before that was deleted."""
    path = Path(ladder.data) / data_bin.COUNTS
    if path.is_file():
        return cast(Dict[str, Any], files.read_json(path))
    earlier = read(ladder.out)
    return earlier.get("text", {}) if earlier else {}


def _described(ladder: Ladder) -> Dict[str, Any]:
    arms = {
        arm.name: {
            "family": arm.family,
            "base": arm.base,
            "experts": arm.experts,
            "granularity": arm.granularity,
            "router": forecast.router(arm, ladder),
            "float32_twin": float32_twin(arm, ladder.arms),
            "own_flags": dict(arm.own),
        }
        for arm in ladder.arms
    }
    stages = {
        stage.name: {"tokens": stage.tokens, "updates": stage.updates, "seeds": stage.seeds}
        for stage in ladder.stages
    }
    return {"title": ladder.title, "arms": arms, "stages": stages}


class _Of(NamedTuple):
    """The runs on one number of tokens: arm -> seed -> run."""

    tokens: int
    stages: List[Stage]
    runs: Dict[str, Dict[int, LadderRun]]


def factors(ladder: Ladder, runs: Sequence[LadderRun], probed: Mapping[str, float]) -> List[Factor]:
    """Of every sparse arm, on every number of tokens, by every group and set."""
    found: List[Factor] = []
    for tokens in sorted({stage.tokens for stage in ladder.stages if stage.name != LR}):
        stages = [s for s in ladder.stages if s.name != LR and s.tokens == tokens]
        names = {stage.name for stage in stages}
        by_arm: Dict[str, Dict[int, LadderRun]] = {}
        for run in runs:
            if run["stage"] in names:
                by_arm.setdefault(run["size"], {})[run["seed"]] = run
        of = _Of(tokens, stages, by_arm)
        dense = [arm for arm in ladder.arms if arm.family == "dense" and arm.name in by_arm]
        if len(dense) < 2:
            continue
        units = _Units(ladder, of)
        for arm in ladder.arms:
            if arm.family == "moe" and arm.name in by_arm:
                for group in _groups(by_arm[arm.name]):
                    finite = [d for d in dense if not _diverged(by_arm[d.name], group)]
                    if len(finite) < 2 or _diverged(by_arm[arm.name], group):
                        continue
                    one = _factor(ladder, arm, finite, of, group, probed, units)
                    found += [one] if one is not None else []
    return found


def _diverged(by_seed: Mapping[int, LadderRun], group: str) -> bool:
    return any(performance(run, group) == math.inf for run in by_seed.values())


def _groups(by_seed: Mapping[int, LadderRun]) -> List[str]:
    run = next(iter(by_seed.values()))
    return [group for group in GROUPS if group in run["mean"]] + list(run["sets"])


def _curve(dense: Sequence[Arm], of: _Of, seed: int) -> List[LadderRun]:
    """The dense runs of a seed; of a size that lacks it, its first seed."""
    return [
        of.runs[arm.name].get(seed) or of.runs[arm.name][min(of.runs[arm.name])] for arm in dense
    ]


def _factor(
    ladder: Ladder,
    arm: Arm,
    dense: Sequence[Arm],
    of: _Of,
    group: str,
    probed: Mapping[str, float],
    units: "_Units",
) -> Optional[Factor]:
    by_seed = of.runs[arm.name]
    mine = [by_seed[seed] for seed in sorted(by_seed)]
    curves = [_curve(dense, of, run["seed"]) for run in mine]
    if unlike([*mine, *(run for curve in curves for run in curve)], group):
        return None  # not on the same text
    savings = _savings(curves, mine, group)
    if len({one.beyond for one in savings} - {0}) > 1:
        return None  # one seed is better than every dense model, another worse
    whole = _mean(savings)
    if len(mine) > 1:
        interval = _over_seeds(savings, curves, mine, group)
        over = OVER_SEEDS if interval else ""
    else:
        interval, over = units.interval(curves[0], mine[0], group)
    flops = mean_flops(mine)
    routed = flops + mine[0]["tokens"] * forecast.router_flops(arm, ladder)
    return {
        "arm": arm.name,
        "tokens": of.tokens,
        "group": group,
        "seeds": len(mine),
        "factor": whole.factor,
        "beyond": whole.beyond,
        "interval": interval,
        "interval_over": over,
        "with_router": whole.factor * flops / routed,
        "in_seconds": _in_seconds(curves, mine, group, probed),
    }


def _savings(
    curves: Sequence[Sequence[LadderRun]], mine: Sequence[LadderRun], group: str
) -> List[Saving]:
    """Of each seed."""
    return [
        saving.saving(_points(curve, group), run["flops"], performance(run, group))
        for curve, run in zip(curves, mine)
    ]


def _over_seeds(
    savings: Sequence[Saving],
    curves: Sequence[Sequence[LadderRun]],
    mine: Sequence[LadderRun],
    group: str,
) -> Optional[saving.Ends]:
    """None where one seed has a bound, or a saving that rests on a dense run of another seed: the
    savings would share that run, and their interval be too narrow."""
    paired = [[r for r in curve if r["seed"] == one["seed"]] for curve, one in zip(curves, mine)]
    if min(map(len, paired)) < 2 or _savings(paired, mine, group) != savings:
        return None
    return saving.ends_over_seeds(savings)


def _points(curve: Sequence[LadderRun], group: str) -> List[Tuple[float, float]]:
    return [(run["flops"], performance(run, group)) for run in curve]


def _mean(savings: Sequence[Saving]) -> Saving:
    """The geometric mean over seeds; a bound as soon as one of them is."""
    beyond = [one.beyond for one in savings if one.beyond]
    return Saving(statistics.geometric_mean([s.factor for s in savings]), (beyond or [0])[0])


def _in_seconds(
    curves: Sequence[Sequence[LadderRun]],
    mine: Sequence[LadderRun],
    group: str,
    probed: Mapping[str, float],
) -> Optional[float]:
    """The saving in seconds of training steps, by the probe."""
    needed = [run["size"] for run in [*curves[0], mine[0]]]
    if not all(name in probed for name in needed):
        return None
    savings = [
        saving.saving(
            [(probed[run["size"]], performance(run, group)) for run in curve],
            probed[one["size"]],
            performance(one, group),
        )
        for curve, one in zip(curves, mine)
    ]
    return _mean(savings).factor


class _Units:
    """The losses of units of test text in the runs on one number of tokens, read when needed."""

    def __init__(self, ladder: Ladder, of: _Of) -> None:
        self.folders = {
            (stage.name, arm.name, seed): ladder.folder(stage, arm, seed)
            for stage in of.stages
            for arm in stage.arms
            for seed in stage.seeds
        }
        self._losses: Dict[Path, Optional[Dict[str, UnitLosses]]] = {}
        self._drawn: Dict[Tuple[Tuple[Path, ...], str], np.ndarray] = {}

    def interval(
        self, curve: Sequence[LadderRun], mine: LadderRun, group: str
    ) -> Tuple[Optional[saving.Ends], str]:
        """Of one seed, and over what it is."""
        runs = [*curve, mine]
        costs = [run["flops"] for run in runs]
        folders = [self.folders[run["stage"], run["size"], run["seed"]] for run in runs]
        losses = [self._of(folder) for folder in folders]
        if all(losses):
            names = sets_of(mine, group)
            by_set = [self._draws(folders, name, i) for i, name in enumerate(names)]
            units = losses[-1] or {}
            if any(len(units[name]["tokens"]) == 1 for name in names):  # nothing to draw
                return None, ""
            perplexities = np.mean(by_set, axis=0)  # (draws, M)
            return saving.ends_over_units(costs, perplexities), OVER_UNITS
        intervals = [
            where[group].get("interval")
            for run in runs
            for where in (run["mean"], run["sets"])
            if group in where
        ]
        width = saving.joint_width(intervals)
        if width is None:
            return None, ""
        ends = saving.ends_by_intervals(
            _points(curve, group), mine["flops"], performance(mine, group), width
        )
        return ends, OVER_INTERVALS

    def _of(self, folder: Path) -> Optional[Dict[str, UnitLosses]]:
        if folder not in self._losses:
            path = folder / UNITS
            self._losses[folder] = _unit_losses(path) if path.is_file() else None
        return self._losses[folder]

    def _draws(self, folders: Sequence[Path], name: str, seed: int) -> np.ndarray:
        """(draws, M) perplexities on a set."""
        key = (tuple(folders), name)
        if key not in self._drawn:
            models = [(self._of(folder) or {}).get(name) for folder in folders]
            for folder, model in zip(folders, models):
                if model is None or model["tokens"] != (models[0] or model)["tokens"]:
                    raise UserError(
                        f"{folder / UNITS}: lacks {name}, or has other units of it than "
                        f"{folders[0] / UNITS}: delete this file, or evaluate both runs again"
                    )
            self._drawn[key] = saving.drawn_perplexities([m for m in models if m], seed)
        return self._drawn[key]


def _unit_losses(path: Path) -> Dict[str, UnitLosses]:
    """Raises UserError for a damaged file."""
    with as_written(path):
        found: Dict[str, UnitLosses] = files.read_json(path)
        for name, units in found.items():
            nats, tokens = units["nats"], units["tokens"]
            finite = all(0 <= n < math.inf for n in nats) and all(0 < n for n in tokens)
            if not (nats and len(nats) == len(tokens) and finite):
                raise ValueError(f"losses of {name}")
        return found


def passing(ladder: Ladder, stage: Stage, result: LadderResult) -> List[Arm]:
    """The sparse arms of a stage that saved enough in domain in the stage that screens it."""
    tokens = ladder.stage(stage.screen).tokens
    saved = {
        found["arm"]: 0.0 if found["beyond"] < 0 else found["factor"]
        for found in result["factors"]
        if found["tokens"] == tokens and found["group"] == GROUPS[0]
    }
    return [a for a in stage.arms if a.name in saved and saved[a.name] >= stage.at_least]
