"""The lock on the folder that a training saves to."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import Any, Optional

from ..errors import UserError
from ..expert_parallel import all_gather, process_rank
from ..locks import Lock

# The lock on the --save-dir that this process trains into: one training at a time, process-wide.
_lock: Optional[Lock] = None
_PATIENCE = 10  # seconds; NFS may remember for a while that a name was absent


def hold(save_dir: str) -> None:
    """Lock the folder for this training until it ends."""
    _release()  # the folder that this process trained into before
    global _lock
    os.makedirs(save_dir, exist_ok=True)
    _lock = Lock(_lock_of(save_dir), f"--save-dir {save_dir}")


def check_shared(save_dir: str) -> None:
    """Raise UserError, on all ranks, if one does not see the folder that rank 0 holds: what it
    writes of a checkpoint would be elsewhere, and nothing would say so until the run resumes."""
    path = _lock_of(save_dir)
    ours = all_gather(path.read_bytes() if process_rank() == 0 else b"")[0]
    seen = all_gather((_holds(path, ours), socket.gethostname()))
    for rank, (there, host) in enumerate(seen):
        if not there:
            raise UserError(
                f"--save-dir {save_dir}: process {rank} on {host} does not see the folder that "
                f"process 0 on {seen[0][1]} writes to; use a folder on a file system that all "
                "machines share"
            )


def _lock_of(save_dir: str) -> Path:
    return Path(save_dir) / "lock"


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file has this content, here and soon."""
    end = time.monotonic() + _PATIENCE
    while True:
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # NFS then asks the server anew
            if path.read_bytes() == content:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.5)


def _release() -> None:
    global _lock
    if _lock is not None:
        _lock.release()
    _lock = None


def then_release(main: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a training, and unlock its folder at the end."""
    try:
        return main(*args, **kwargs)
    finally:
        _release()
