"""State that an outer wrapper hands to an inner one through functions of fairseq in between.

Those functions cannot pass it on. Each value holds inside one `with during(...)`; this is the only
place for such state.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import Any, Dict, Iterator, NamedTuple, Optional, TypeVar


class Loading(NamedTuple):
    """A trainer loads a checkpoint."""

    trainer: Any
    optimizer: bool  # its state is wanted
    shapes: Optional[Dict[str, Any]]  # of the trained parameters, for a file of the branch


class Building(NamedTuple):
    """A model is built from the settings of a checkpoint, and filled from it."""

    with_task: bool  # its task is built, too
    whole: bool  # the checkpoint must have every parameter


class Training(NamedTuple):
    """A run of fairseq-train."""

    cfg: Any
    trainer: Any


T = TypeVar("T")

loading: ContextVar[Optional[Loading]] = ContextVar("loading", default=None)
building: ContextVar[Optional[Building]] = ContextVar("building", default=None)
# Whether text continues after an </s> at the end of a prompt, which is then a newline of it;
# otherwise the </s> ends a sentence.
prompts_go_on: ContextVar[bool] = ContextVar("prompts_go_on", default=False)
# Processes that hold the same experts, while a trainer clips gradients.
expert_replicas: ContextVar[int] = ContextVar("expert_replicas", default=1)
training: ContextVar[Optional[Training]] = ContextVar("training", default=None)
saving: ContextVar[Any] = ContextVar("saving", default=None)  # the trainer that all save together


@contextlib.contextmanager
def during(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Give the variable this value inside the context."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
