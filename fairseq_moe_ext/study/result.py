"""A study's files -> result.json: cost, perplexity and accuracy of every run, speed-up factors."""

import math
from statistics import geometric_mean, mean
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple

from .. import accuracy
from ..errors import UserError
from ..evaluation import paper
from ..evaluation.speedup import Factor, overlap, speedup_factors, worse_though_larger
from ..evaluation.study_result import SHOT, GroupFactors, RunResult, StudyResult, TaskResult, unlike
from . import finished, trained
from .plan import FAMILIES, Plan, typed

GROUPS = ("in_domain", "out_of_domain")
FEWEST_UNITS = 20  # for an interval that can be relied on
Runs = Sequence[RunResult]


def collect(plan: Plan) -> StudyResult:
    """All results of the runs that are finished. Raises UserError if none is."""
    asked = [run for run in plan.runs if not trained.differs(run)]
    found = finished.results(asked, plan.context, plan.tokens_per_update)
    runs = [result for result in found if result is not None]
    if not runs:
        raise UserError(f"{plan.out}: no run is finished: run `fairseq-moe study` again")
    return {
        "title": plan.title,
        "context": plan.context,
        "tokens_per_update": plan.tokens_per_update,
        "planned": len(plan.runs),
        "runs": runs,
        "factors": {} if plan.reference else factors(runs),
        "commands": [
            typed(command)
            for run in plan.runs[: len({(r.family, r.size) for r in plan.runs})]
            for command in run.commands
        ],
    }


def left_out(plan: Plan) -> List[str]:
    """Finished runs that are not the file's, a line each."""
    return [
        f"{run.folder}: left out: {other}"
        for run in plan.runs
        if finished.done(run) and (other := trained.differs(run))
    ]


def performance(run: RunResult, group: str) -> float:
    """Of a run: perplexity on a group of GROUPS or on a set, or mean accuracy in per cent on
    "N-shot"; NaN where it was not measured."""
    for where in (run["mean"], run["sets"]):
        if group in where:
            return where[group]["perplexity"]
    shots = group[: -len(SHOT)] if group.endswith(SHOT) else ""
    return 100 * run["priming"]["mean"].get(shots, math.nan)


def mean_performance(runs: Runs, group: str) -> float:
    """Over the seeds of one model."""
    return sum(performance(run, group) for run in runs) / len(runs)


def mean_flops(runs: Runs) -> float:
    """Over the seeds of one model, which differ where the router chooses the number of experts."""
    return mean(run["flops"] for run in runs)


def computed_in(runs: Sequence[Mapping[str, Any]], name: str = "size") -> str:
    """A sentence on the precision of trainings; "" of older results. `name`: the key of what runs
    are called, if they differ."""
    sizes: Dict[str, List[str]] = {}
    for run in runs:
        names = sizes.setdefault(run.get("precision") or "", [])
        names += [run[name]] * (run[name] not in names)
    sizes.pop("", None)
    if len(sizes) < 2:
        return "".join(f"Trainings computed in {precision}." for precision in sizes)
    parts = [f"in {precision} {', '.join(names)}" for precision, names in sizes.items()]
    return f"Trainings computed {'; '.join(parts)}."


def few_units(runs: Runs) -> str:
    """A sentence that names test sets with too few units for intervals; "" if there are none."""
    units = {n: s["units"] for run in runs for n, s in run["sets"].items() if "units" in s}
    few = [f"{name} ({number})" for name, number in units.items() if number < FEWEST_UNITS]
    if not few:
        return ""
    return (
        f"Intervals over test text are rough for sets with fewer than {FEWEST_UNITS} units of it: "
        f"{', '.join(few)}."
    )


Interval = Optional[Tuple[float, float]]


def points(runs: Runs, family: str, group: str) -> List[Tuple[float, float]]:
    """(FLOPs, performance, mean over seeds) of each size of a family."""
    return [(flops, value) for flops, value, _ in _with_intervals(runs, family, group)]


def intervals(runs: Runs, family: str, group: str) -> List[Interval]:
    """Of each of `points`: from the lowest to the highest seed, or, of one seed, the 95 % interval
    over the text that it was tested on; of an accuracy the one over questions. None: not known."""
    return [interval for *_, interval in _with_intervals(runs, family, group)]


def _with_intervals(runs: Runs, family: str, group: str) -> List[Tuple[float, float, Interval]]:
    """Without sizes whose seeds cannot be compared."""
    found = [
        (mean_flops(of_size), mean_performance(of_size, group), _interval(of_size, group))
        for of_size in _sizes(runs, family)
        if not unlike(of_size, group)
    ]
    return sorted(found, key=lambda point: point[:2])


def _interval(model_runs: Runs, group: str) -> Interval:
    measured = [
        where[group] for where in (model_runs[0]["mean"], model_runs[0]["sets"]) if group in where
    ]
    if not measured:
        mean = mean_accuracy(model_runs, group[: -len(SHOT)])
        return None if math.isnan(mean.mean) else (100 * mean.low, 100 * mean.high)
    if len(model_runs) > 1:
        values = [performance(run, group) for run in model_runs]
        return min(values), max(values)
    interval = measured[0].get("interval")
    return (interval[0], interval[1]) if interval else None


def _sizes(runs: Runs, family: str) -> List[List[RunResult]]:
    """The runs of each size of a family."""
    by_size: Dict[str, List[RunResult]] = {}
    for run in runs:
        if run["family"] == family:
            by_size.setdefault(run["size"], []).append(run)
    return list(by_size.values())


def groups(runs: Runs) -> List[str]:
    """What was measured: means of perplexity, accuracies by shots, all sets."""
    shots = dict.fromkeys(f"{number}{SHOT}" for run in runs for number in run["priming"]["mean"])
    means = {group for run in runs for group in run["mean"]}
    sets = dict.fromkeys(name for run in runs for name in run["sets"])
    return [group for group in GROUPS if group in means] + list(shots) + list(sets)


def primed_tasks(runs: Runs, group: str) -> List[str]:
    """The tasks over which the accuracy "N-shot" is the mean."""
    return list(
        dict.fromkeys(
            task["task"]
            for run in runs
            for task in run["priming"]["tasks"]
            if f"{task['shots']}{SHOT}" == group
        )
    )


def label(runs: Runs, group: str, title: str) -> str:
    """The title of a group, with the tasks that a mean accuracy is over."""
    if not _is_accuracy(runs, group):
        return title
    return f"{title}, mean of {paper.tasks_in_words(primed_tasks(runs, group))}"


def _is_accuracy(runs: Runs, group: str) -> bool:
    return group.endswith(SHOT) and group not in runs[0]["sets"]


def factors(runs: Runs) -> Dict[str, GroupFactors]:
    """For each group: the factors of the families' means over seeds, the geometric mean of each
    seed's factors, and a remark: the overlap, or why there is no factor. Of seeds that all sizes
    have, if there are any."""
    by_group: Dict[str, GroupFactors] = {}
    whole = whole_seeds(runs)
    seeds = {run["seed"] for run in whole}
    runs = whole or runs
    for group in groups(runs):
        entry: GroupFactors = {"curve": [], "by_seed": {}, "remark": ""}
        by_group[group] = entry
        try:
            curve = _factors(runs, group)
        except UserError as error:
            entry["remark"] = str(error)
            continue
        dense, moe = (points(runs, family, group) for family in FAMILIES)
        entry["remark"] = overlap(dense, moe, _is_accuracy(runs, group))
        entry["curve"] = [
            {"performance": f.performance, "dense_flops": f.dense_cost, "factor": f.factor}
            for f in curve
        ]
        for seed in sorted(seeds):
            try:
                of_seed = _factors([run for run in runs if run["seed"] == seed], group)
            except UserError:  # all of its models are near chance
                continue
            if of_seed:
                entry["by_seed"][str(seed)] = geometric_mean([f.factor for f in of_seed])
    return by_group


def whole_seeds(runs: Runs) -> List[RunResult]:
    """The runs of seeds with which every size is finished that is finished with any seed."""
    models = {(run["family"], run["size"]) for run in runs}
    of_seed: Dict[int, Set[Tuple[str, str]]] = {}
    for run in runs:
        of_seed.setdefault(run["seed"], set()).add((run["family"], run["size"]))
    return [run for run in runs if of_seed[run["seed"]] == models]


def _factors(runs: Runs, group: str) -> List[Factor]:
    """Along the curve. Raises UserError if there is none."""
    if reason := unlike(runs, group):
        raise UserError(reason)
    diverged = [
        f"{family} {model_runs[0]['size']}"
        for family in FAMILIES
        for model_runs in _sizes(runs, family)
        if mean_performance(model_runs, group) == math.inf
    ]
    if diverged:
        raise UserError(
            f"{', '.join(diverged)} diverged (infinite perplexity): lower the learning rate, or "
            "remove the size from the file"
        )
    rising = _is_accuracy(runs, group)
    dense, moe = (points(runs, family, group) for family in FAMILIES)
    along = speedup_factors(dense, moe, rising)
    if not rising:
        return along
    above, level = set(), 0.0
    for model_runs in (size for family in FAMILIES for size in _sizes(runs, family)):
        mean = mean_accuracy(model_runs, group[: -len(SHOT)])
        if mean.floor is None:
            raise UserError("priming.json lacks its chance level: run priming again")
        level = mean.floor
        if mean.low > level:
            above.add(mean_performance(model_runs, group))
    kept = [factor for factor in along if factor.performance in above]
    if not above or (along and not kept):
        raise UserError(
            f"{'no model is' if not above else 'where both families are, none is'} above chance "
            f"({100 * level:.1f} %) by more than the noise of its "
            "questions (95 % interval)"
        )
    return kept


class Accuracy(NamedTuple):
    """Shares; low and high are the ends of the 95 % interval over questions."""

    mean: float
    low: float
    high: float
    chance: Optional[float]  # None: of a file that does not say
    floor: Optional[float]  # accuracy.floor; None as chance


def mean_accuracy(runs: Runs, shots: str, task: Optional[str] = None) -> Accuracy:
    """Of a model, its runs being its seeds: of a task, or the plain mean of all. The interval is
    that of one run: other seeds answer the same questions."""
    tasks: Dict[str, List[TaskResult]] = {}
    for run in runs:
        for result in run["priming"]["tasks"]:
            if str(result["shots"]) == shots and task in (None, result["task"]):
                tasks.setdefault(result["task"], []).append(result)
    shares = [sum(result["accuracy"] for result in every) / len(every) for every in tasks.values()]
    firsts = [every[0] for every in tasks.values()]
    if not firsts:
        return Accuracy(math.nan, math.nan, math.nan, None, None)
    ends = accuracy.mean_interval(shares, [result["questions"] for result in firsts])
    floors = [floor for result in firsts if (floor := accuracy.floor(result)) is not None]
    mean = sum(shares) / len(shares)
    if len(floors) < len(firsts):
        return Accuracy(mean, *ends, None, None)
    chance = sum(result["chance"] or 0.0 for result in firsts) / len(firsts)
    return Accuracy(mean, *ends, chance, sum(floors) / len(floors))


def over_seeds(group: GroupFactors) -> str:
    """The range of a group's factors over seeds, in words."""
    seeds = group["by_seed"].values()
    if len(seeds) < 2:
        return "one seed, no interval" if seeds else "no seed is complete"
    return f"{min(seeds):.2f} to {max(seeds):.2f} over {len(seeds)} seeds"


def seeds_mean(group: GroupFactors) -> float:
    """The geometric mean of a group's factors over seeds; NaN of none."""
    seeds = group["by_seed"].values()
    return geometric_mean(seeds) if seeds else math.nan


def table(result: StudyResult) -> List[List[str]]:
    """Speed-up factors by group: geometric mean over seeds, its range, the range of the curve, and
    the performance that both families show."""
    rows = [["speed-up factor", "mean", "seeds", "along the curve", "overlap"]]
    for group, found in result["factors"].items():
        along = [point["factor"] for point in found["curve"]]
        ends = f"{min(along):.2f} to {max(along):.2f}" if len(along) > 1 else ""
        mean = seeds_mean(found)
        rows.append(
            [
                label(result["runs"], group, group.replace("_", " ")),
                "-" if math.isnan(mean) else f"{mean:.2f}",
                over_seeds(found) if along else "-",
                ends or (f"{along[0]:.2f}, one point" if along else "-"),
                found["remark"] if along else "none",
            ]
        )
    return rows


def remarks(result: StudyResult) -> List[str]:
    """Why groups have no factor, a line each reason."""
    reasons: Dict[str, List[str]] = {}
    for group, found in result["factors"].items():
        if not found["curve"]:
            reasons.setdefault(found["remark"], []).append(group.replace("_", " "))
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def warnings(result: StudyResult) -> List[str]:
    """Models that are worse than smaller ones of their family, a line each family."""
    found = (warning(result["runs"], family, f"{family} ") for family in FAMILIES)
    return [f"In domain {line}." for line in found if line]


def warning(runs: Runs, family: str, prefix: str = "") -> str:
    """worse_though_larger of a family's sizes in domain, their names behind a prefix; "" where they
    were not measured on the same text."""
    sizes = [size for size in _sizes(runs, family) if GROUPS[0] in size[0]["mean"]]
    if unlike([run for of_size in sizes for run in of_size], GROUPS[0]):
        return ""
    return worse_though_larger(
        [
            (prefix + of_size[0]["size"], mean_flops(of_size), mean_performance(of_size, GROUPS[0]))
            for of_size in sizes
        ]
    )
