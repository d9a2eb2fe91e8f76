"""The results of runs that are trained and evaluated, or diverged."""

from pathlib import Path
from typing import List, Optional, Sequence, cast

from .. import files
from ..branch.outline import settings_of
from ..evaluation.study_result import Priming, RunResult, TaskResult, as_written, restore_infinity
from ..shape import shape_of
from . import diverged, logs, trained
from .plan import Run
from .router_metrics import router_metrics

PRIMED = (
    *("task", "shots", "accuracy", "interval", "spread", "questions"),
    *("chance", "majority", "questions_cut", "questions_left_out"),  # older files lack these
)


def done(run: Run) -> bool:
    """Whether a run is evaluated, or diverged."""
    return (run.folder / "evaluation.json").is_file() or diverged.noted(run.folder)


def results(runs: Sequence[Run], context: int, tokens_per_update: int) -> List[Optional[RunResult]]:
    """Of each run; None of one that is not done. None of all before one is evaluated: on what runs
    that diverged would have been evaluated is not known."""
    found = [
        of_run(run, context, tokens_per_update)
        if (run.folder / "evaluation.json").is_file()
        else None
        for run in runs
    ]
    like = next((result for result in found if result is not None), None)
    if like is None:
        return found
    return [
        diverged.result(run, like, context, tokens_per_update)
        if result is None and done(run)
        else result
        for run, result in zip(runs, found)
    ]


def of_run(run: Run, context: int, tokens_per_update: int) -> RunResult:
    """The result of a run that is trained and evaluated. Raises UserError for damaged files."""
    with as_written(run.folder):
        return _of_run(run, context, tokens_per_update)


def _of_run(run: Run, context: int, tokens_per_update: int) -> RunResult:
    evaluation = files.read_json(run.folder / "evaluation.json")
    if not evaluation["sets"] or not evaluation["mean"]:
        raise ValueError("evaluation.json names no set")
    restore_infinity(evaluation)
    for name, found in [*evaluation["sets"].items(), *evaluation["mean"].items()]:
        if not found["perplexity"] > 0:  # infinity: the training diverged
            raise ValueError(f"perplexity {found['perplexity']} of {name} in evaluation.json")
    settings, vocabulary = settings_of(str(run.folder / "checkpoint_best.pt"))
    shape = shape_of(settings, vocabulary)
    router = router_metrics(run.folder / "train.log", shape, context)
    shape = shape._replace(experts_per_token=router.get("experts_per_token"))
    return {
        **trained.result(run, shape, context, tokens_per_update),
        "seconds": logs.training_seconds(run.folder / "train.log"),
        "protocol": {
            "context": evaluation.get("context", context),
            "stride": evaluation.get("stride", context),
        },
        "sets": evaluation["sets"],
        "mean": evaluation["mean"],
        "priming": priming_of(run),
        "router": router,
    }


def primed(path: Path) -> bool:
    """Whether `fairseq-moe priming` has come to its end; older files do not say."""
    return path.is_file() and files.read_json(path).get("complete", True)


def priming_of(run: Run) -> Priming:
    """What `fairseq-moe priming` found, if the file still asks for it: mean accuracies by shots,
    each task's, and the metrics of bias sets by domain."""
    path = run.folder / "priming.json"
    if not run.prime or not primed(path):
        return {"mean": {}, "tasks": [], "bias": []}
    content = files.read_json(path)
    tasks = [result for result in content["results"] if "accuracy" in result]
    return {
        "mean": content["mean"],
        "tasks": [cast(TaskResult, {key: result.get(key) for key in PRIMED}) for result in tasks],
        "bias": [result for result in content["results"] if "domains" in result],
    }
