"""The interface of all kinds of tasks: settings, loaded model, jobs."""

import sys
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch

from ..expert_parallel import process_rank
from ..questions.scoring import Scorer
from ..questions.vocabulary import Vocabulary
from . import model


def say(words: str) -> None:
    """A line on stderr, of the first process."""
    if process_rank() == 0:
        print(words, file=sys.stderr, flush=True)


class Settings(NamedTuple):
    """The flags that say how tasks are run."""

    shots: Tuple[int, ...] = (0,)
    draws: int = 25
    seed: int = 1
    limit: Optional[int] = None  # questions of a task
    rule: Optional[str] = None  # for all tasks of choice; None: each by its own
    languages: Optional[Tuple[str, str]] = None  # of translation
    beam: int = 1
    max_new_tokens: Optional[int] = None  # of a generated answer; None: 128, or half the context
    published_text: bool = False  # HellaSwag with WikiHow's markers


class Loaded(NamedTuple):
    """A model that is ready."""

    model: torch.nn.Module
    context: int  # tokens of a prompt and its answer
    vocabulary: Vocabulary
    max_tokens: int  # of a batch

    def scorer(self, progress: str) -> Scorer:
        return model.ModelScorer(self.model, self.max_tokens, progress)


Result = Dict[str, Any]
Job = Callable[[Loaded], Result]  # a task with one number of shots, whose files are read
