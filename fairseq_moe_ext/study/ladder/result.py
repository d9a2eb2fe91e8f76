"""A ladder's finished runs -> its result.json: what each sparse arm saves."""

import math
import statistics
from pathlib import Path
from typing import (
    Any,
    Dict,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    TypedDict,
    Union,
    cast,
)

from ... import data_bin, files
from ...errors import UserError
from ...evaluation.study_result import as_written, restore_infinity, unlike
from .. import trained
from ..result import GROUPS, mean_flops, performance
from . import finished, forecast, probe, rates, saving
from .finished import LadderRun
from .forecast import Forecast
from .saving import Saving
from .stages import LR, Arm, Ladder, Stage, float32_twin
from .units import Units

OVER_SEEDS = "seeds"


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
    remarks: List[str]  # what was left out, and which savings are missing; older files lack it


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
    with as_written(path):
        for run in content["runs"]:
            restore_infinity(run)
    return cast(LadderResult, content)


def collect(ladder: Ladder) -> LadderResult:
    """Of all runs that are finished, also those of stages that were not asked for this time."""
    runs, left_out = finished.collect(ladder)
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
    found, missing = savings(ladder, runs, probed)
    counted = _text(ladder)
    return {
        "ladder": _described(ladder),
        "rates": chosen,
        "seconds_per_token": probed,
        "forecasts": forecast.read(ladder.forecast),
        "text": counted,
        "planned": sum(len(stage.seeds) * len(stage.arms) for stage in ladder.stages),
        "runs": runs,
        "factors": found,
        "remarks": _without(ladder, counted) + left_out + missing,
    }


def _without(ladder: Ladder, counted: Mapping[str, Any]) -> List[str]:
    """A line, if the text lacks corpora that it should have: means are over the others."""
    if not counted:
        return []
    lacking = [name for name in ladder.corpora if name not in counted["corpora"]]
    return lacking and [f"The text has no {', '.join(lacking)}: means are over the other sets."]


def _text(ladder: Ladder) -> Dict[str, Any]:
    """As the first run noted it; of an older run that of the data folder, or as it was noted before
    that was deleted. Raises UserError for a damaged file."""
    folders = (
        ladder.folder(stage, arm, seed)
        for stage in ladder.stages
        for seed in stage.seeds
        for arm in stage.arms
    )
    noted = (folder / trained.TEXT for folder in folders)
    for path in (*noted, Path(ladder.data) / data_bin.COUNTS):
        if path.is_file():
            with as_written(path):
                counted = files.read_json(path)
                for corpus in counted["corpora"].values():
                    sum(corpus.get(split, {}).get("tokens", 0) for split in data_bin.SPLITS)
                return cast(Dict[str, Any], counted)
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
        stage.name: {
            "tokens": stage.tokens,
            "updates": stage.updates,
            "seeds": stage.seeds,
            "bf16": stage.bf16,
        }
        for stage in ladder.stages
    }
    return {"title": ladder.title, "arms": arms, "stages": stages}


class _Of(NamedTuple):
    """The runs on one number of tokens: arm -> seed -> run."""

    tokens: int
    runs: Dict[str, Dict[int, LadderRun]]
    units: Units
    bf16: bool  # asked for in all of them


def savings(
    ladder: Ladder, runs: Sequence[LadderRun], probed: Mapping[str, float]
) -> Tuple[List[Factor], List[str]]:
    """Of every sparse arm, on every number of tokens, by every group and set; and a line for each
    arm that lacks some, with the reason."""
    found: List[Factor] = []
    remarks: List[str] = []
    for tokens in sorted({stage.tokens for stage in ladder.stages if stage.name != LR}):
        stages = [s for s in ladder.stages if s.name != LR and s.tokens == tokens]
        names = {stage.name for stage in stages}
        by_arm: Dict[str, Dict[int, LadderRun]] = {}
        for run in runs:
            if run["stage"] in names:
                by_arm.setdefault(run["size"], {})[run["seed"]] = run
        of = _Of(tokens, by_arm, Units(ladder, stages), any(stage.bf16 for stage in stages))
        timed = {} if of.bf16 else probed  # the probe has float32
        dense = [arm for arm in ladder.arms if arm.family == "dense" and arm.name in by_arm]
        sparse = [arm for arm in ladder.arms if arm.family == "moe" and arm.name in by_arm]
        if sparse and len(dense) < 2:
            remarks.append(f"On {tokens:,} tokens no saving: fewer than two dense models are done.")
            continue
        for arm in sparse:
            lacking: Dict[str, List[str]] = {}
            for group in _groups(by_arm[arm.name]):
                one = _factor(ladder, arm, dense, of, group, timed)
                if isinstance(one, str):
                    lacking.setdefault(one, []).append(group.replace("_", " "))
                else:
                    found.append(one)
            for reason, groups in lacking.items():
                where = f"{arm.name} on {tokens:,} tokens"
                remarks.append(f"{where}: no saving ({', '.join(groups)}): {reason}.")
    return found, remarks


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
    ladder: Ladder, arm: Arm, dense: Sequence[Arm], of: _Of, group: str, probed: Mapping[str, float]
) -> Union[Factor, str]:
    """Or why there is none."""
    by_seed = of.runs[arm.name]
    if _diverged(by_seed, group):
        return "it diverged"
    dense = [one for one in dense if not _diverged(of.runs[one.name], group)]
    if len(dense) < 2:
        return "all dense models but one diverged" if dense else "all dense models diverged"
    mine = [by_seed[seed] for seed in sorted(by_seed)]
    curves = [_curve(dense, of, run["seed"]) for run in mine]
    compared = [*mine, *(run for curve in curves for run in curve)]
    reason = unlike(compared, group)
    if reason:
        return reason
    if of.bf16 and len({run.get("precision") for run in compared}) > 1:
        return "some trainings with --bf16 computed in float32"
    of_seeds = _savings(curves, mine, group)
    if len({one.beyond for one in of_seeds} - {0}) > 1:
        return "one seed is better than every dense model, another worse"
    whole = _mean(of_seeds)
    if len(mine) > 1:
        interval = _over_seeds(of_seeds, curves, mine, group)
        over = OVER_SEEDS if interval else ""
    else:
        interval, over = of.units.interval(curves[0], mine[0], group)
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
    """The saving in seconds of training steps, by the probe. None if it lacks the model, or a dense
    one that the saving in FLOPs rests on."""
    timed = [[run for run in curve if run["size"] in probed] for curve in curves]
    if mine[0]["size"] not in probed or min(map(len, timed)) < 2:
        return None
    if _savings(timed, mine, group) != _savings(curves, mine, group):
        return None
    savings = [
        saving.saving(
            [(probed[run["size"]], performance(run, group)) for run in curve],
            probed[one["size"]],
            performance(one, group),
        )
        for curve, one in zip(timed, mine)
    ]
    return _mean(savings).factor


def passing(ladder: Ladder, stage: Stage, result: LadderResult) -> List[Arm]:
    """The sparse arms of a stage that saved enough in domain in the stage that screens it."""
    saved = _screen(ladder, stage, result)
    return [a for a in stage.arms if a.name in saved and saved[a.name] >= stage.at_least]


def without_saving(ladder: Ladder, stage: Stage, result: LadderResult) -> List[Arm]:
    """The sparse arms of a stage that the stage that screens it knows nothing of."""
    saved = _screen(ladder, stage, result)
    return [arm for arm in stage.arms if arm.family == "moe" and arm.name not in saved]


def _screen(ladder: Ladder, stage: Stage, result: LadderResult) -> Dict[str, float]:
    """Arm -> saving in domain in the stage that screens a stage."""
    tokens = ladder.stage(stage.screen).tokens
    return {
        found["arm"]: 0.0 if found["beyond"] < 0 else found["factor"]
        for found in result["factors"]
        if found["tokens"] == tokens and found["group"] == GROUPS[0]
    }
