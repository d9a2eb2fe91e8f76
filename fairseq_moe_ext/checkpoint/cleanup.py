"""Expert files to which no checkpoint refers."""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
from typing import Tuple

import torch

from .format import FILE_NAME, FOLDER, Manifest

logger = logging.getLogger(__name__)


def remove_unused_files(save_dir: str, suffix: str = "") -> None:
    """Remove the expert files of a folder that none of its checkpoints refers to, and what killed
    processes have left. Where a checkpoint cannot be read, all expert files stay.

    Args:
        suffix: of the checkpoints that this process writes (--checkpoint-suffix, FSDP's shards).
    """
    for path in glob.glob(os.path.join(glob.escape(save_dir), f"checkpoint*{suffix}.pt.tmp")):
        _remove(path)
    folder = os.path.join(save_dir, FOLDER)
    if not os.path.isdir(folder):
        return
    used = set()
    for path in glob.glob(os.path.join(glob.escape(save_dir), "*.pt")):
        try:
            status = os.stat(path)
            used.update(_files_of(path, status.st_ino, status.st_mtime_ns, status.st_size))
        except Exception as error:
            logger.warning(f"{path} cannot be read, so no file of {folder} is removed: {error}")
            return
    for name in os.listdir(folder):
        if FILE_NAME.fullmatch(name) and f"{FOLDER}/{name}" not in used:
            _remove(os.path.join(folder, name))


@functools.lru_cache(maxsize=1024)
def _files_of(path: str, *identity: int) -> Tuple[str, ...]:
    """Names of the expert files that a checkpoint refers to; it is mapped, not read whole."""
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    manifest = Manifest.read(path, state)
    return tuple(file.name for file in manifest.files) if manifest is not None else ()


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)
