"""result.json of a study: what it holds, how it is read, and which of its runs can be compared.

Where a comment says that older files lack a value, the reader leaves it out or fills in an empty
one. Costs are FLOPs; intervals are at 95 %.
"""

import contextlib
import math
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, TypedDict, cast

from .. import files
from ..errors import UserError
from .perplexity import MeanResult, SetResult

UNLIKE_TRAINING = "not trained on the same text in every run"
SHOT = "-shot"  # behind a number of examples: the group of mean accuracies


class TaskResult(TypedDict, total=False):
    """Accuracy on one task with one number of shots, as `fairseq-moe priming` writes it."""

    task: str
    shots: int
    accuracy: float  # share of the questions
    interval: Optional[Sequence[float]]
    spread: Optional[float]  # standard deviation over draws of examples
    questions: int
    chance: Optional[float]  # this and what follows: older files lack it
    majority: Optional[float]
    questions_cut: Optional[int]
    questions_left_out: Optional[int]


class BiasResult(TypedDict, total=False):
    """One bias set, as `fairseq-moe priming` writes it."""

    task: str
    domains: Dict[str, Dict[str, Any]]  # domain, and "overall" -> metric -> value
    intersentence: Dict[str, Dict[str, Any]]  # likewise, of StereoSet alone; older files lack it


class Priming(TypedDict):
    """Few-shot evaluation of one run; empty where there was none."""

    mean: Dict[str, float]  # number of shots -> mean accuracy
    tasks: List[TaskResult]
    bias: List[BiasResult]  # older files lack it


class RouterMetrics(TypedDict, total=False):
    """Means over MoE layers; of a dense model all are missing."""

    load_max: float  # choices of the most chosen expert over the mean, per update
    overflow: float  # choices dropped, in per cent
    experts_per_token: float  # before dropping, over the whole training
    flops_per_token: float  # computed in training


class Protocol(TypedDict):
    """How perplexity was evaluated, in tokens (evaluation/perplexity.py)."""

    context: int
    stride: int  # as the context: blocks


class Trained(TypedDict):
    """What a training was, and what it cost."""

    family: str
    size: str
    seed: int
    parameters: int
    active: int  # parameters that a token meets
    experts: int  # of an MoE layer; 1 in a dense model; older files lack it
    tokens: int  # trained on
    flops: float  # by the experts that tokens took, dropped ones included
    precision: str  # that the training computed in; older files lack it
    text: str  # digest of what it was trained on; "": not noted; older files lack it


class RunResult(Trained):
    """One trained and evaluated model."""

    seconds: float  # in training steps
    protocol: Protocol  # older files lack it
    sets: Dict[str, SetResult]
    mean: Dict[str, MeanResult]
    priming: Priming
    router: RouterMetrics  # older files lack it


class CurvePoint(TypedDict):
    """A point of the paper's figure 1."""

    performance: float
    dense_flops: float
    factor: float


class GroupFactors(TypedDict):
    """The speed-up factors of one group of sets or of tasks."""

    curve: List[CurvePoint]  # of the families' means over seeds
    by_seed: Dict[str, float]  # seed -> geometric mean of its factors
    remark: str  # the overlap, or why there is no factor


class Compared(TypedDict):
    """An arm against the reference, on one group of sets."""

    difference: float  # of perplexity in %, by the mean of its logarithms over seeds
    interval: List[float]  # over seeds; empty with one seed
    p: Optional[float]
    real: bool  # at 5 %, all arms taken together


class OfArms(TypedDict, total=False):
    """What only a study of arms has in result.json."""

    reference: str
    comparison: Dict[str, Dict[str, Compared]]  # group of sets -> arm


class StudyResult(OfArms):
    """result.json."""

    title: str
    context: int  # tokens of a block
    tokens_per_update: int
    planned: int  # runs; `runs` has the finished ones
    runs: List[RunResult]
    factors: Dict[str, GroupFactors]
    commands: List[str]


def read(path: Path, flag: str = "") -> StudyResult:
    """Raises UserError, which begins with the flag, for a file that is missing or holds something
    else."""
    remedy = "run `fairseq-moe study` first"
    content = files.read_json(path, f"{flag}{path}", remedy)
    if not is_result(content) or "factors" not in content:
        raise UserError(f"{flag}{path}: lacks factors and runs: {remedy}")
    if not content["runs"]:
        raise UserError(f"{flag}{path}: contains no runs: run `fairseq-moe study`")
    with as_written(f"{flag}{path}"):
        for run in content["runs"]:
            restore_infinity(run)
            run.get("priming", {}).setdefault("bias", [])
    return cast(StudyResult, content)


def restore_infinity(found: Mapping[str, Any]) -> None:
    """Put the infinite perplexities of a training that diverged back into `sets` and `mean`: JSON
    has null for them."""
    for result in (*found["sets"].values(), *found["mean"].values()):
        if result["perplexity"] is None:
            result["perplexity"] = math.inf
        if result.get("interval"):
            result["interval"] = [math.inf if x is None else x for x in result["interval"]]


@contextlib.contextmanager
def as_written(*read: Any) -> Iterator[None]:
    """Raise UserError, with the names of the files that were read, if what is computed from them
    fails because something else is in them."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise UserError(
            f"{', '.join(map(str, read))}: not in the format that was written "
            f"({type(error).__name__}: {error}): create it again"
        ) from error


def is_result(content: object) -> bool:
    """Whether a JSON file's content is a study's result, complete or not."""
    return isinstance(content, Mapping) and {"runs", "planned"} <= set(content)


def sets_of(run: RunResult, group: str) -> List[str]:
    """The sets that a group's perplexity of a run averages over; none of an accuracy."""
    if group in run["mean"]:
        inside = group == "in_domain"
        every = run["sets"].items()
        return sorted(name for name, found in every if found.get("in_domain", inside) == inside)
    return [group] if group in run["sets"] else []


def unlike(runs: Sequence[RunResult], group: str) -> str:
    """Why a group's metrics of the runs cannot be compared or averaged; "" if they can be. Text
    that was not noted counts as that of the others."""
    if len({run["text"] for run in runs if run.get("text")}) > 1:
        return UNLIKE_TRAINING
    if len({_measured_on(run, group) for run in runs}) > 1:
        return "not measured on the same text or questions in every run"
    return ""


def _measured_on(run: RunResult, group: str) -> Tuple:
    """How, and on what, a group's metric of a run was measured."""
    names = sets_of(run, group)
    if not names:
        tasks = [
            result for result in run["priming"]["tasks"] if f"{result['shots']}{SHOT}" == group
        ]
        return tuple(sorted((result["task"], result["questions"]) for result in tasks))
    protocol = tuple(sorted(run.get("protocol", {}).items()))
    return protocol, *((name, run["sets"][name].get("tokens")) for name in names)
