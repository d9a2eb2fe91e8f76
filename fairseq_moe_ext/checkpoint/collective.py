"""Messages between processes."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import os
from typing import Any, Iterator

import torch
import torch.distributed as dist

from ..errors import UserError
from ..expert_parallel import all_gather


def broadcast(word: Any) -> Any:
    """Rank 0's value, on all ranks."""
    box = [word]
    dist.broadcast_object_list(box, src=0)
    return box[0]


@contextlib.contextmanager
def same_error_on_all_ranks() -> Iterator[None]:
    """Raise the error of one rank on all ranks, so that none waits for it."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    texts = [text for text in all_gather(failure and str(failure)) if text is not None]
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    if texts:
        raise UserError(texts[0])


def check_code_versions() -> None:
    """Raises UserError, on all ranks, if they do not run the same code."""
    codes = all_gather(code_version())
    for rank, code in enumerate(codes):
        if code != codes[0]:
            raise UserError(
                f"process {rank} runs {code}, process 0 {codes[0]}: install the same version on "
                "all machines"
            )


@functools.cache
def code_version() -> str:
    """A string that identifies the versions of this package and of torch."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    digest = hashlib.sha256()
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.py"), recursive=True)):
        with open(path, "rb") as stream:
            digest.update(stream.read())
    return f"fairseq_moe_ext {digest.hexdigest()[:12]} with torch {torch.__version__}"
