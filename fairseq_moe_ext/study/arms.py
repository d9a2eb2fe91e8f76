"""A study of arms: models that differ by flags, each compared with one of them, paired by seed."""

import math
from typing import Dict, List, Optional, Sequence, Tuple

from ..evaluation.study_result import Compared, RunResult, StudyResult, unlike
from ..text_table import markdown
from ..wording import count, signed, small
from .paired import Difference, holm, paired
from .result import GROUPS, computed_in, mean_flops, performance

LEVEL = 0.05
_NONE = "no seed in common on the same text, or diverged"

Runs = Sequence[RunResult]


def by_arm(runs: Runs) -> Dict[str, Dict[int, RunResult]]:
    """The finished runs of each arm by seed."""
    arms: Dict[str, Dict[int, RunResult]] = {}
    for run in runs:
        arms.setdefault(run["size"], {})[run["seed"]] = run
    return arms


BySeed = Dict[int, RunResult]


def shared(runs: BySeed, base: BySeed, group: str) -> List[int]:
    """The seeds that both have, evaluated in the same way on the same text. None if a run of either
    diverged: the seeds that are left would flatter it."""
    if any(performance(run, group) == math.inf for run in [*runs.values(), *base.values()]):
        return []
    return [
        seed
        for seed in sorted(runs.keys() & base.keys())
        if not unlike([runs[seed], base[seed]], group)
    ]


def difference(runs: BySeed, base: BySeed, group: str) -> Difference:
    """Of the logarithms of perplexity, one minus the other, over the seeds that they share."""
    return paired(
        [
            math.log(performance(runs[seed], group) / performance(base[seed], group))
            for seed in shared(runs, base, group)
        ]
    )


def measured(runs: Runs) -> List[str]:
    """The groups of sets that all runs were evaluated on."""
    return [group for group in GROUPS if all(group in run["mean"] for run in runs)]


def compare(runs: Runs, reference: str) -> Dict[str, Dict[str, Compared]]:
    """For each group of sets, compare each arm with the reference, if they share a seed."""
    arms = by_arm(runs)
    base = arms.get(reference, {})
    result: Dict[str, Dict[str, Compared]] = {}
    for group in measured(runs):
        differences = {
            name: difference(by_seed, base, group)
            for name, by_seed in arms.items()
            if name != reference and shared(by_seed, base, group)
        }
        real = holm({name: d.p for name, d in differences.items()}, LEVEL)
        result[group] = {
            name: {
                "difference": _percent(d.mean),
                "interval": [] if math.isnan(d.p) else [_percent(d.low), _percent(d.high)],
                "p": None if math.isnan(d.p) else d.p,
                "real": name in real,
            }
            for name, d in differences.items()
        }
    return result


def _percent(logarithm: float) -> float:
    return 100 * math.expm1(logarithm)


def percent(d: Difference) -> str:
    """−0.31 (−0.52 to −0.10); without an interval where there is one seed."""
    mean, low, high = map(_percent, (d.mean, d.low, d.high))
    return signed(mean, 2) if math.isnan(d.p) else _with_ends(mean, low, high, 2)


def _with_ends(mean: float, low: float, high: float, digits: int = 1) -> str:
    return f"{signed(mean, digits)} ({signed(low, digits)} to {signed(high, digits)})"


def table(result: StudyResult) -> List[List[str]]:
    """The arms, the best in domain first: perplexity, the difference to the reference with its 95 %
    interval and whether it is real, load, drops, FLOPs and minutes. Means over seeds."""
    runs, reference = result["runs"], result["reference"]
    groups = measured(runs)
    head = ["arm", "seeds"]
    for group in groups:
        head += [f"perplexity {group.replace('_', ' ')}", f"against {reference}, %", "significant"]
    head += ["load", "dropped, %", "experts per token", "FLOPs", "minutes"]
    rows = []
    for name, by_seed in by_arm(runs).items():
        arm_runs = list(by_seed.values())
        row = [name, str(len(arm_runs))]
        for group in groups:
            values = [performance(run, group) for run in arm_runs]
            half_range = f" ± {small((max(values) - min(values)) / 2)}" if len(values) > 1 else ""
            mean = f"{_mean(values):.2f}{half_range}"
            row.append("different text" if unlike(arm_runs, group) else mean)
            row += _against(result["comparison"][group].get(name), name == reference)
        rows.append(
            (_mean([performance(run, groups[0]) for run in arm_runs]), row + _cost(arm_runs))
        )
    return [head, *(row for _, row in sorted(rows))]


def _against(compared: Optional[Compared], is_reference: bool) -> List[str]:
    if compared is None:
        return ["reference" if is_reference else _NONE, ""]
    if not compared["interval"]:
        return [signed(compared["difference"]), "one seed"]
    low, high = compared["interval"]
    ends = _with_ends(compared["difference"], low, high)
    return [ends, "yes" if compared["real"] else "no"]


def _cost(runs: Runs) -> List[str]:
    routers = [run["router"] for run in runs if run["router"]]
    cells = ["", "", ""]
    flops = mean_flops(runs)
    if routers:
        cells = [
            f"{_mean([r['load_max'] for r in routers]):.2f}",
            small(_mean([r["overflow"] for r in routers])),
            f"{_mean([r['experts_per_token'] for r in routers]):.2f}",
        ]
        flops = _mean([run["tokens"] * run["router"]["flops_per_token"] for run in runs])
    return [*cells, f"{flops:.3g}", f"{_mean([run['seconds'] for run in runs]) / 60:.1f}"]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pairs(result: StudyResult, group: str) -> Tuple[List[List[str]], int]:
    """Row against column in %, of all pairs of arms, those in bold whose own 95 % interval leaves
    out 0; and how many pairs have an interval."""
    arms = by_arm(result["runs"])
    names = [row[0] for row in table(result)[1:]]
    rows, with_interval = [["", *names]], 0
    for name in names:
        cells = []
        for other in names:
            if name == other or not shared(arms[name], arms[other], group):
                cells.append("")
                continue
            d = difference(arms[name], arms[other], group)
            with_interval += not math.isnan(d.p)
            cell = signed(_percent(d.mean))
            cells.append(f"**{cell}**" if d.low > 0 or d.high < 0 else cell)
        rows.append([name, *cells])
    return rows, with_interval // 2  # each pair is in two cells


def page(result: StudyResult) -> str:
    """comparison.md."""
    runs = result["runs"]
    parts = [f"# {result['title']}", _explained(result), markdown(table(result))]
    for group in measured(runs):
        rows, with_interval = pairs(result, group)
        words = "Row against column, perplexity in %."
        if with_interval:
            words += (
                " Bold: the pair's own 95 % interval excludes 0. If no two arms differed, about "
                f"{LEVEL * with_interval:.0f} of these pairs would be bold."
            )
        parts += [f"## Every pair, {group.replace('_', ' ')}", words, markdown(rows)]
    return "\n\n".join(parts) + "\n"


def _explained(result: StudyResult) -> str:
    return (
        f"{len(result['runs'])} of {count(result['planned'], 'run')} are finished. Numbers are "
        "means over seeds; ± is half the range. A difference is between the logarithms of "
        "perplexity, paired by seed, with the 95 % interval of Student's t over seeds: of "
        f"trainings, on this test text. Significant means at {100 * LEVEL:.0f} %, "
        "after Holm's correction for all arms. Load is that of the most chosen expert divided "
        "by the mean, per update and layer, in the last fifth of training. FLOPs are those that "
        f"training computed. {computed_in(result['runs'])}".rstrip()
    )
