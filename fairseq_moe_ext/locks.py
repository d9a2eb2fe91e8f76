"""Lock files that give one process at a time the right to write an output, and name it.

    with Lock(folder / "lock", f"--save-dir {folder}"):
        ...

The file is created with O_EXCL, which is atomic on NFS too, names its owner in JSON, and is removed
when the work is done. If a killed process left it, another process on the same machine takes it
over, and so does the same SLURM job after a requeue, on any machine. The owner also holds a flock
on the file. That detects what a PID cannot: an owner in another container of this machine, or a
child that outlived its parent (where `descriptor` was passed on). Between machines a flock counts
only where the file system shares it: NFS before Linux 2.6.12 or mounted with local_lock, and Lustre
mounted with localflock, do not. There a requeued job relies on SLURM's having ended the first one.
"""

import atexit
import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Union

from .errors import UserError

_START = b'{"pid"'  # of the content of every lock; older versions' are empty
_held: Set[int] = set()  # descriptors; a forked child must not hold them beyond its parent's end


def _close_in_child() -> None:
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def beside(path: Union[str, Path]) -> Path:
    """The path of the lock for an output file, or for a folder that appears when it is complete. It
    is the same under all names of the output."""
    return Path(os.path.realpath(path) + ".lock")


class Lock:
    """Held from construction until `release` or the end of `with`. Raises UserError if another
    process holds it; `what` is the flag and value that the message names."""

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self.what = what
        self.process = os.getpid()
        try:
            self.descriptor = self._take()
        except OSError as error:
            raise UserError(
                f"{what}: cannot be written ({error.strerror}); choose another path"
            ) from error
        _held.add(self.descriptor)
        atexit.register(self.release)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock. A second call does nothing."""
        if self.descriptor not in _held or os.getpid() != self.process:
            return
        with contextlib.suppress(OSError):
            if _is(self.path, self.descriptor):
                os.unlink(self.path)
        _held.remove(self.descriptor)
        os.close(self.descriptor)
        atexit.unregister(self.release)

    def _take(self) -> int:
        """Take the lock, and return the descriptor of its file."""
        while True:
            descriptor, is_new = _open(self.path)
            try:
                self._claim(descriptor, is_new)
                if _is(self.path, descriptor):
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its owner has just removed it

    def _claim(self, descriptor: int, is_new: bool) -> None:
        """Write this process into the file as its owner. Raises UserError if it has another."""
        if not is_new:
            _owner_in(descriptor)  # gives the process that has just made it time to flock it
            self._refuse_foreign(descriptor)
        flocked = _flock(descriptor)
        if flocked is False or not is_new:
            owner = _owner_in(descriptor)
            # The kernel has released it, whatever the container's host name and PID were. SLURM
            # ends a job before it requeues it, but not on a machine that it cannot reach: only
            # with a flock.
            gone = (
                flocked
                and owner is not None
                and (owner["boot"] == _boot() is not None or _is_before(owner["job"], _job()))
            )
            alive = not gone and _is_alive(owner, os.fstat(descriptor).st_mtime)
            if flocked is False or alive:
                if _is(self.path, descriptor):
                    raise UserError(self._held_by(owner))
                return
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(_ourselves()).encode(), 0)
            os.fsync(descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
            raise

    def _refuse_foreign(self, descriptor: int) -> None:
        """Raise UserError for a file that is no lock, such as poetry.lock. A crash of the machine
        may leave a lock empty, cut or with zero bytes."""
        start = os.pread(descriptor, 10_000, 0).replace(b"\0", b"")[: len(_START)]
        if not _START.startswith(start):
            raise UserError(
                f"{self.path}: is not a lock, but has the name of the lock for {self.what}: move "
                "it, or choose another path"
            )

    def _held_by(self, owner: Optional[Dict[str, Any]]) -> str:
        who = "another process"
        if owner:
            who = f"PID {owner['pid']} on {owner['host']} since {owner['since']}"
            who += f" ({owner['command']})"
            if not _is_alive(owner, 0):
                who = f"a process left behind by {who}"
        return (
            f"{self.what} is being worked on by {who}; wait for it, end it, or choose another "
            f"path; if it has certainly ended, delete {self.path}"
        )


def _open(path: Path) -> tuple:
    """(descriptor, whether the file is new)."""
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        with contextlib.suppress(FileNotFoundError):  # gone in between
            # O_NONBLOCK: do not wait if this is a FIFO.
            return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW), False


def _is(path: Path, descriptor: int) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _flock(descriptor: int) -> Optional[bool]:
    """False if another process holds it; None if the file system has no flock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _ourselves() -> Dict[str, Any]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "boot": _boot(),
        "start": _start_of(os.getpid()),
        "job": _job(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": " ".join(map(shlex.quote, [os.path.basename(sys.argv[0]), *sys.argv[1:]]))[:80],
    }


def _owner_in(descriptor: int) -> Optional[Dict[str, Any]]:
    """The owner named in the file. None: it has none two seconds after it was written, or is no
    lock of ours."""
    while True:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            owner = json.loads(os.pread(descriptor, 10_000, 0))
            needed = ("pid", "host", "boot", "start", "since", "command")
            return {**{key: owner[key] for key in needed}, "job": owner.get("job")}
        if time.time() - os.fstat(descriptor).st_mtime > 2:
            return None
        time.sleep(0.1)


def _is_alive(owner: Optional[Dict[str, Any]], written: float) -> bool:
    """Whether the owner is still running; yes if in doubt."""
    if owner is None:  # killed before it wrote its name, or an older version's lock
        return time.time() - written < 60
    if owner["host"] != socket.gethostname():
        return True
    if owner["boot"] != _boot():
        return False
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is another user's
    return _start_of(owner["pid"]) == owner["start"]


def _job() -> Optional[List[str]]:
    """Cluster, number and restarts of the SLURM job that this process belongs to, or None."""
    number = os.environ.get("SLURM_JOB_ID")
    if not number:
        return None
    environ = os.environ.get
    return [environ("SLURM_CLUSTER_NAME", ""), number, environ("SLURM_RESTART_COUNT", "0")]


def _is_before(theirs: Any, ours: Optional[List[str]]) -> bool:
    """Whether ours is the same job after a restart."""
    if not isinstance(theirs, list) or ours is None or theirs[:-1] != ours[:-1]:
        return False
    restarts = str(theirs[-1]), ours[-1]
    return all(map(str.isdecimal, restarts)) and int(restarts[0]) < int(restarts[1])


def _boot() -> Optional[str]:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None


def _start_of(pid: int) -> Optional[str]:
    """When a process started, in the kernel's ticks; None if it has ended or this is unknown."""
    with contextlib.suppress(OSError, IndexError):
        # The program's name, in brackets, may contain anything; state is 3rd, start 22nd.
        rest = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if rest[0] in "ZX" else rest[19]
    return None
