"""Writes a file completely or not at all."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Dict, Iterator, Optional

import torch
from torch import Tensor

from ..errors import UserError


def write(state: Dict[str, Any], path: str) -> int:
    """Write a file completely or not at all, even if power is lost.

    Returns its size in bytes. Raises UserError if it cannot be written; then nothing is left.
    """
    try:
        with temporarily(path) as temporary, open(temporary, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
        sync_folder(os.path.dirname(path) or ".")
    except (OSError, RuntimeError) as error:
        cause = _os_error_behind(error)
        if cause is None:
            raise
        raise cannot_write(f"{path} ({_size_in_memory(state):,} bytes)", cause) from error
    return size


@contextlib.contextmanager
def temporarily(path: str) -> Iterator[str]:
    """Another name for a file until it is written; what is not complete is removed."""
    temporary = path + ".tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def cannot_write(file: str, error: OSError) -> UserError:
    """The error for a file, or a copy of one, that cannot be written."""
    return UserError(
        f"{file} cannot be written ({error.strerror or error}); free some disk space, or choose "
        "another --save-dir; the last complete checkpoint is unchanged"
    )


def _os_error_behind(error: Optional[BaseException]) -> Optional[OSError]:
    """torch.save reports a full disk as a RuntimeError that wraps the OSError or replaces it."""
    text = str(error)
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return OSError("writing failed") if "PytorchStreamWriter" in text else None


def _size_in_memory(state: Any) -> int:
    """Bytes of the tensors in a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(_size_in_memory, state.values()))
    return sum(map(_size_in_memory, state)) if isinstance(state, (list, tuple)) else 0


def sync_folder(folder: str) -> None:
    """Write a renamed file's folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
