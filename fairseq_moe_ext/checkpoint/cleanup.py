"""Expert files that no checkpoint refers to."""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
from typing import List, Set, Tuple

from fairseq_today.torch_today import load_weights_only

from .format import FILE_NAME, FOLDER, Manifest

logger = logging.getLogger(__name__)


def remove_unused_files(save_dir: str, suffix: str = "") -> None:
    """Remove the expert files in a folder that none of its checkpoints refers to, and the temporary
    files of killed processes. If a checkpoint cannot be read, all expert files stay.

    Args:
        suffix: of the checkpoints that this process writes (--checkpoint-suffix, FSDP's shards).
    """
    for path in glob.glob(os.path.join(glob.escape(save_dir), f"checkpoint*{suffix}.pt.tmp")):
        _remove(path)
    try:
        unused = unused_files(save_dir)
    except UnreadableCheckpoint as error:
        logger.warning(f"{error}, so no file in {os.path.join(save_dir, FOLDER)} is removed")
        return
    for path in unused:
        _remove(path)


class UnreadableCheckpoint(Exception):
    """A checkpoint whose expert files are therefore unknown."""


def unused_files(save_dir: str) -> List[str]:
    """Paths of the expert files in a folder that none of its checkpoints refers to, sorted.

    Raises UnreadableCheckpoint.
    """
    folder = os.path.join(save_dir, FOLDER)
    if not os.path.isdir(folder):
        return []
    used: Set[str] = set()
    for path in glob.glob(os.path.join(glob.escape(save_dir), "*.pt")):
        try:
            status = os.stat(path)
            used.update(_files_of(path, status.st_ino, status.st_mtime_ns, status.st_size))
        except Exception as error:
            raise UnreadableCheckpoint(f"{path} cannot be read ({error})") from error
    names = [name for name in os.listdir(folder) if FILE_NAME.fullmatch(name)]
    return [os.path.join(folder, n) for n in sorted(names) if f"{FOLDER}/{n}" not in used]


@functools.lru_cache(maxsize=1024)
def _files_of(path: str, *identity: int) -> Tuple[str, ...]:
    """Names of the expert files that a checkpoint refers to. The checkpoint is mapped, not read
    whole."""
    state = load_weights_only(path, map_location="cpu", mmap=True)
    manifest = Manifest.read(path, state)
    return tuple(file.name for file in manifest.files) if manifest is not None else ()


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)
