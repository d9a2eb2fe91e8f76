"""The result of a comparison of fine-tuned models (examples/finetune), as JSON. Accuracies are in
per cent."""

from pathlib import Path
from typing import Any, Dict, List, Optional, TypedDict, cast

from .. import files
from ..errors import UserError


class Before(TypedDict, total=False):
    """A pretrained model on the test questions. Only the accuracy is in every file."""

    accuracy: float
    interval: List[float]  # 95 %, over questions
    chance: float
    cut: float  # of questions


class Row(TypedDict, total=False):
    """One recipe over its seeds. The first three are in every file."""

    accuracy: List[float]  # by seed
    mean: float
    deviation: Optional[float]  # standard deviation over seeds; None for one seed
    difference: float  # of the mean from that of the row "plain"; not in "plain" itself
    beyond: bool  # whether that is significant (older files: twice its error); with several seeds
    dropped: Optional[float]  # percentage of choices dropped in training
    overflow: Optional[float]  # in older files, of first choices alone
    interval: List[float]  # 95 % of the mean, over questions


class Run(TypedDict, total=False):
    """One fine-tuning. `valid`, `train` and `dropped` have a value for each epoch."""

    row: str
    seed: int
    accuracy: float
    interval: List[float]
    chance: float
    cut: float
    valid: List[float]
    train: List[float]
    dropped: List[float]
    overflow: List[float]  # in older files
    precision: str  # that the training computed in; older files lack it
    seconds: float
    command: List[str]


class Result(TypedDict, total=False):
    """`rows` and `before` are in every file; `before` has the models "dense" and "moe"."""

    settings: Dict[str, Any]
    before: Dict[str, Before]
    rows: Dict[str, Row]
    runs: List[Run]
    commands: Dict[str, str]  # of each row


def read(path: Path) -> Result:
    """Raises UserError for a file that holds something else."""
    remedy = "create it with examples/finetune/run.py"
    content = files.read_json(path, remedy=remedy)
    if not isinstance(content, dict) or not {"rows", "before"} <= set(content):
        raise UserError(f"{path}: lacks before and rows: {remedy}")
    return cast(Result, content)
