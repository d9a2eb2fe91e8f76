"""Commands that run as processes of their own, with a log."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Sequence

from .. import cores
from ..errors import UserError


def console_script(name: str) -> str:
    """The command's path beside this Python, or else on PATH. Raises UserError if there is none."""
    beside = str(Path(sys.executable).parent)
    path = shutil.which(name, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if path is None:
        raise UserError(
            f"the command {name} is not installed: run pip install --no-deps fairseq==0.12.2"
        )
    return path


def start(
    command: Sequence[str], log: Path, threads: int = 0, keep: Sequence[int] = ()
) -> subprocess.Popen:
    """Start a command; what it prints is appended to the log.

    Args:
        threads: that it computes with at most (OMP_NUM_THREADS may set fewer); 0: as it finds best.
        keep: file descriptors that it inherits.
    """
    env = dict(os.environ)
    if threads:
        env["OMP_NUM_THREADS"] = str(cores.threads(threads))
    with open(log, "a", encoding="utf-8") as out:
        return subprocess.Popen(
            list(command),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=env,
            pass_fds=keep,
        )


def failure(command: Sequence[str], status: int, log: Path) -> UserError:
    """The error that reports a failed command, with the last line of its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    words = [line.strip() for line in lines if line.strip()][-1:]
    return UserError(
        f"{Path(command[0]).name} ended with status {status}: {' '.join(words)[:300]} "
        f"(all of it in {log})"
    )
