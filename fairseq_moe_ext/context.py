"""What is under way while a function of fairseq runs: what our wrapper round it tells one within.

fairseq's functions in between pass nothing on; each value holds inside of one `with` alone.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from typing import Any, Dict, Iterator, NamedTuple, Optional, TypeVar


class Loading(NamedTuple):
    """A trainer loads a checkpoint."""

    trainer: Any
    optimizer: bool  # its state is wanted
    shapes: Optional[Dict[str, Any]]  # of the parameters that are trained, for a file of the branch


class Building(NamedTuple):
    """A model is built by the settings of a checkpoint, and filled from it."""

    with_task: bool  # its task is built, too
    whole: bool  # the checkpoint must have every parameter


class Training(NamedTuple):
    """A run of fairseq-train."""

    cfg: Any
    trainer: Any


T = TypeVar("T")

loading: ContextVar[Optional[Loading]] = ContextVar("loading", default=None)
building: ContextVar[Optional[Building]] = ContextVar("building", default=None)
# An </s> that ends a prompt is a newline of it, behind which text goes on; else it ends a sentence.
prompts_go_on: ContextVar[bool] = ContextVar("prompts_go_on", default=False)
# Processes that hold the same experts, while a trainer clips gradients.
expert_replicas: ContextVar[int] = ContextVar("expert_replicas", default=1)
training: ContextVar[Optional[Training]] = ContextVar("training", default=None)
saving: ContextVar[Any] = ContextVar("saving", default=None)  # the trainer that all save together


@contextlib.contextmanager
def during(variable: ContextVar[T], value: T) -> Iterator[None]:
    """What is done within finds the variable with this value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
