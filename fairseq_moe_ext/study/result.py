"""A study's files -> result.json: cost, perplexity and accuracy of every run, speed-up factors."""

import json
import math
import re
from pathlib import Path
from typing import Any, Dict, List, Tuple

from .. import cost
from ..errors import UserError
from ..evaluation.cost_table import checkpoint_settings, shape_of
from ..evaluation.speedup import overlap, speedup_factors
from .plan import FAMILIES, Plan, Run, typed

GROUPS = ("in_domain", "out_of_domain")
SHOT = "-shot"  # behind a number of examples: the group of mean accuracies


def collect(plan: Plan) -> Dict[str, Any]:
    """Everything that the runs finished so far tell. Raises UserError if none is."""
    runs = [_run(plan, run) for run in plan.runs if (run.folder / "evaluation.json").is_file()]
    if not runs:
        raise UserError(f"{plan.out}: no run is finished: start `fairseq-moe study` again")
    return {
        "title": plan.title,
        "context": plan.context,
        "tokens_per_update": plan.tokens_per_update,
        "planned": len(plan.runs),
        "runs": runs,
        "factors": factors(runs),
        "commands": [
            typed(command)
            for run in plan.runs[: len({(r.family, r.size) for r in plan.runs})]
            for command in run.commands
        ],
    }


def _run(plan: Plan, run: Run) -> Dict[str, Any]:
    found = json.loads((run.folder / "evaluation.json").read_text(encoding="utf-8"))
    settings, types = checkpoint_settings(run.folder / "checkpoint_best.pt")
    shape = shape_of(settings, types)
    tokens = run.updates * plan.tokens_per_update
    parameters = cost.parameters(shape)
    return {
        "family": run.family,
        "size": run.size,
        "seed": run.seed,
        "parameters": parameters.total,
        "active": parameters.active,
        "tokens": tokens,
        "flops": tokens * cost.training_flops_per_token(shape, plan.context),
        "seconds": _seconds(run.folder / "train.log"),
        "sets": found["sets"],
        "mean": found["mean"],
        "priming": _priming(run.folder / "priming.json"),
    }


def _priming(path: Path) -> Dict[str, Any]:
    """What `fairseq-moe priming` found: mean accuracies by shots, each task's, and of bias sets the
    figures by domain."""
    if not path.is_file():
        return {"mean": {}, "tasks": [], "bias": []}
    found = json.loads(path.read_text(encoding="utf-8"))
    tasks = [one for one in found["results"] if "accuracy" in one]
    keys = ("task", "shots", "accuracy", "spread", "questions")
    return {
        "mean": found["mean"],
        "tasks": [{key: one[key] for key in keys} for one in tasks],
        "bias": [one for one in found["results"] if "domains" in one],
    }


def _seconds(log: Path) -> float:
    """Seconds in training steps, as fairseq counted them over interruptions too."""
    epochs: Dict[str, float] = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        found = re.search(r'"epoch": (\d+).*"train_train_wall": "([\d.]+)"', line)
        if found:
            epochs[found[1]] = float(found[2])
    return sum(epochs.values())


def performance(run: Dict[str, Any], group: str) -> float:
    """Of a run: perplexity on a group of GROUPS or on a set, or mean accuracy in per cent on
    "N-shot"; NaN where it was not measured."""
    for where in (run["mean"], run["sets"]):
        if group in where:
            return where[group]["perplexity"]
    shots = group[: -len(SHOT)] if group.endswith(SHOT) else ""
    return 100 * run["priming"]["mean"].get(shots, math.nan)


def points(runs: List[Dict[str, Any]], family: str, group: str) -> List[Tuple[float, float]]:
    """(FLOPs, perplexity, mean over seeds) of each size of a family."""
    sizes: Dict[str, List[Tuple[float, float]]] = {}
    for run in runs:
        if run["family"] == family:
            sizes.setdefault(run["size"], []).append((run["flops"], performance(run, group)))
    return sorted((found[0][0], sum(p for _, p in found) / len(found)) for found in sizes.values())


def groups(runs: List[Dict[str, Any]]) -> List[str]:
    """What was measured: means of perplexity, accuracies by shots, all sets."""
    shots = [f"{number}{SHOT}" for number in runs[0]["priming"]["mean"]]
    return [g for g in GROUPS if g in runs[0]["mean"]] + shots + list(runs[0]["sets"])


def factors(runs: List[Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """For each group: the factors of the families' means over seeds, the geometric mean of each
    seed's factors, and a remark: the overlap, or why there is no factor."""
    found: Dict[str, Dict[str, Any]] = {}
    for group in groups(runs):
        every = {family: points(runs, family, group) for family in FAMILIES}
        entry: Dict[str, Any] = {"curve": [], "by_seed": {}, "remark": ""}
        found[group] = entry
        try:
            curve = speedup_factors(*every.values())
        except UserError as error:
            entry["remark"] = str(error)
            continue
        entry["remark"] = overlap(*every.values())
        entry["curve"] = [
            {"performance": f.performance, "dense_flops": f.dense_cost, "factor": f.factor}
            for f in curve
        ]
        for seed in sorted({run["seed"] for run in runs}):
            mine = [run for run in runs if run["seed"] == seed]
            try:
                of_seed = speedup_factors(*(points(mine, family, group) for family in FAMILIES))
            except UserError:  # not all of its sizes are trained yet
                continue
            if of_seed:
                logs = [math.log(f.factor) for f in of_seed]
                entry["by_seed"][str(seed)] = math.exp(sum(logs) / len(logs))
    return found


def table(result: Dict[str, Any]) -> List[List[str]]:
    """Speed-up factors by group: geometric mean over seeds, its range, the range of the curve, and
    the performance that both families show."""
    rows = [["speed-up factor", "mean", "seeds", "along the curve", "overlap"]]
    for group, found in result["factors"].items():
        curve, seeds = found["curve"], list(found["by_seed"].values())
        along = [point["factor"] for point in curve]
        mean = math.exp(sum(map(math.log, seeds)) / len(seeds)) if seeds else math.nan
        rows.append(
            [
                group.replace("_", " "),
                f"{mean:.2f}" if seeds else "-",
                f"{min(seeds):.2f} to {max(seeds):.2f} (n = {len(seeds)})" if seeds else "-",
                f"{min(along):.2f} to {max(along):.2f}" if along else "-",
                found["remark"] if along else "none",
            ]
        )
    return rows


def remarks(result: Dict[str, Any]) -> List[str]:
    """Why groups have no factor, a line each reason."""
    reasons: Dict[str, List[str]] = {}
    for group, found in result["factors"].items():
        if not found["curve"]:
            reasons.setdefault(found["remark"], []).append(group.replace("_", " "))
    return [f"{', '.join(groups)}: {reason}" for reason, groups in reasons.items()]
