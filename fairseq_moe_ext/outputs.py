"""Output files: checked before the work starts, and written completely or not at all."""

import contextlib
import glob
import json
import math
import os
import time
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterable, Iterator, Mapping, Optional, Tuple

from . import files
from .errors import UserError


def check(
    outputs: Iterable[Tuple[str, Optional[Path]]], overwrite: bool, inputs: Iterable[Path] = ()
) -> None:
    """Raise UserError unless every output can be written without losing data.

    Args:
        outputs: (flag, file); None: the file is not written.
        overwrite: existing files may be replaced.
        inputs: files and folders that the command reads; no output may be one of them, or replace
            a file in one of the folders.
    """
    read = [os.path.realpath(path) for path in inputs]
    taken: Dict[str, str] = {}
    for flag, path in outputs:
        if path is None:
            continue
        where = f"{flag} {path}".strip()
        there = _check_path(path, where)
        real = os.path.realpath(path)
        if real in taken:
            raise UserError(f"{where}: {taken[real]} is the same file; name another")
        taken[real] = flag
        if not there:
            continue
        for name in read:
            if real == name or real.startswith(name + os.sep):
                raise UserError(f"{where}: is read by this command; name another file")
        if not overwrite:
            raise UserError(f"{where}: exists; name another file or give --overwrite")


_FOLDERS = ("save_dir", "tensorboard_logdir", "results_path")


def check_of_fairseq(given: Mapping[str, Any], spell: Callable[[str], str]) -> None:
    """Raise UserError for flags of fairseq that name a path which cannot be written. --log-file is
    appended to, and may be a device (/dev/stderr)."""
    for name in _FOLDERS:
        path = given.get(name)
        while path and not os.path.lexists(path):
            path = os.path.dirname(path)
        if path and not os.path.isdir(path):
            raise UserError(f"{spell(name)} {given[name]}: {path} is not a folder; name another")
    log = given.get("log_file")
    if not log:
        return
    where = f"{spell('log_file')} {log}"
    if os.path.exists(log):
        kind = files.kind_of(os.stat(log))
        if kind and kind != "a device":
            raise UserError(f"{where}: {kind}, not a file; name a regular file or a new one")
        others = {name: value for name, value in given.items() if name != "log_file"}
        for name, value in others.items():
            if isinstance(value, str) and os.path.isfile(value) and os.path.samefile(log, value):
                raise UserError(f"{where}: {spell(name)} is the same file; name another")
    elif not os.path.isdir(os.path.dirname(log) or "."):
        raise UserError(f"{where}: no folder {os.path.dirname(log)}; make it first")


def _check_path(path: Path, where: str) -> bool:
    """Whether there is a regular file, which can be replaced. Raises UserError if the path cannot
    be written or is something else."""
    try:
        kind = files.kind_of(os.lstat(path))
    except FileNotFoundError:
        folder = path.parent
        if not os.path.isdir(folder):
            raise UserError(f"{where}: no folder {folder}; make it first") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"{where}: the folder {folder} cannot be written to; name another"
            ) from None
        return False
    except (OSError, ValueError) as error:
        raise _unwritable(where, error) from None
    if kind:
        raise UserError(f"{where}: {kind}, not a file; name a regular file or a new one")
    if not os.access(path, os.W_OK):
        raise UserError(f"{where}: is read-only; name another file")
    return True


def _unwritable(where: str, error: Exception) -> UserError:
    return UserError(f"{where}: cannot be written: {files.reason(error)}; name another file")


_LEFT = 3600  # seconds since a file was last written to, after which its writer may be gone


def temporary_name(path: Path) -> Path:
    """The name under which this process writes a file. Removes what killed processes left under
    theirs, an hour ago or more: on a shared file system a PID may be one of another machine, which
    is still writing."""
    begin = f".{path.name[:60]}."
    for left in path.parent.glob(f"{glob.escape(begin)}*.tmp"):
        pid = left.name[len(begin) : -len(".tmp")]
        with contextlib.suppress(OSError):
            old = os.lstat(left).st_mtime < time.time() - _LEFT
            if old and pid.isdecimal() and _is_gone(int(pid)):
                os.unlink(left)
    return path.with_name(f"{begin}{os.getpid()}.tmp")


def _is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass  # it is another user's
    return False


@contextlib.contextmanager
def partial_file(path: Path, **how: Any) -> Iterator[IO]:
    """A file to write, under a temporary name until it is complete. Raises UserError if the path
    has become unfit since `check`.

    Args:
        how: arguments of `open` for a text file.
    """
    partial = temporary_name(path)
    try:
        _check_path(path, str(path))
        with open(partial, "w" if how else "wb", **how) as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(str(path), error) from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


def write_text(path: Path, text: str) -> None:
    """Write the file completely or not at all. Raises UserError where it cannot be written."""
    # A path in the text may contain bytes that are not UTF-8.
    with partial_file(path, encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def write_json(path: Path, value: object, indent: Optional[int] = 1) -> None:
    """As write_text, of what `as_json` gives."""
    write_text(path, as_json(value, indent) + "\n")


def as_json(
    value: object, indent: Optional[int] = 1, default: Optional[Callable[[Any], Any]] = None
) -> str:
    """NaN and infinity become null, because JSON has neither.

    Args:
        default: as of json.dumps.
    """
    return json.dumps(_finite(value), indent=indent, default=default, allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return value
