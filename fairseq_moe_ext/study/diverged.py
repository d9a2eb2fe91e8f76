"""A run whose training diverged ends without ending the others; its perplexities are infinite."""

import contextlib
import math
from pathlib import Path
from typing import cast

from fairseq.data import Dictionary

from .. import data_bin, files, outputs
from ..errors import UserError
from ..evaluation.perplexity import SetResult
from ..evaluation.study_result import RunResult, as_written
from ..shape import shape_of
from . import command_line, logs, trained
from .plan import Run, training_words

FILE = "diverged.json"  # in the run's folder
# of the last line of its log (diverging.py, errors.py); damaged checkpoints have another remedy
SAID = "training diverged; lower"


def note(run: Run, error: UserError) -> bool:
    """Write that a run diverged, if that is why its training failed."""
    if SAID not in str(error):
        return False
    vocabulary = len(Dictionary.load(str(run.data / data_bin.DICTIONARY)))
    outputs.write_json(run.folder / FILE, {"error": str(error), "vocabulary": vocabulary})
    return True


def noted(folder: Path) -> bool:
    return (folder / FILE).is_file()


def line(run: Run) -> str:
    return (
        f"{run.name}: its training diverged (the end of {run.folder}/train.log): its perplexity "
        f"counts as infinite; delete {run.folder} to train it again"
    )


def result(run: Run, like: RunResult, context: int, tokens_per_update: int) -> RunResult:
    """On the sets that another run was evaluated on. Raises UserError for damaged files."""
    with as_written(run.folder / FILE):
        vocabulary = int(files.read_json(run.folder / FILE)["vocabulary"])
    words = training_words(run.train)
    shape = shape_of(command_line.check_training(words, run.name), vocabulary)
    seconds = 0.0
    with contextlib.suppress(UserError):  # the first update diverged
        seconds = logs.training_seconds(run.folder / "train.log")
    sets = {name: _infinite(found) for name, found in like["sets"].items()}
    return {
        **trained.result(run, shape, context, tokens_per_update),
        "seconds": seconds,
        "protocol": like["protocol"],
        "sets": sets,
        "mean": {group: {"perplexity": math.inf} for group in like["mean"]},
        "priming": {"mean": {}, "tasks": [], "bias": []},
        "router": {},
    }


def _infinite(found: SetResult) -> SetResult:
    kept = {key: found[key] for key in ("in_domain", "tokens") if key in found}  # type: ignore
    return cast(SetResult, {**kept, "perplexity": math.inf, "dropped": None})
