"""Reads files that a user names: regular files only, because a FIFO would make its reader wait."""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, Mapping, Optional, Sequence, Union

from .errors import UserError
from .wording import flag, has_flag

Name = Union[str, Path]

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a FIFO (named pipe)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind_of(status: os.stat_result) -> str:
    """The kind of a file in words; "" for a regular file."""
    return next((words for is_kind, words in _KINDS if is_kind(status.st_mode)), "")


def reason(error: Exception) -> str:
    """Why a file cannot be opened, without its name."""
    return getattr(error, "strerror", None) or str(error)


_REMEDY = "; name a file that is there and may be read"


def unreadable(where: Name, error: Exception) -> UserError:
    return UserError(f"{where}: cannot be read ({reason(error)}){_REMEDY}")


def check(path: Name, where: str = "") -> None:
    """Raise UserError unless `path` is a regular file or a link to one. `where`: the
    beginning of the message, such as "--dict x"; by default the path."""
    where = where or str(path)
    try:
        kind = kind_of(os.stat(path))
    except (OSError, ValueError) as error:  # ValueError: a null byte in a name from a file
        raise unreadable(where, error) from None
    if kind:
        raise UserError(f"{where}: {kind}, not a file; name a regular file")


def refuse_folder(path: Name, where: str = "") -> None:
    """Raise UserError, with what to name instead, if a checkpoint's path is a folder."""
    folder, where = Path(path), where or str(path)
    if not folder.is_dir():
        return
    if (folder / "config.json").is_file():
        raise UserError(
            f"{where}: is a folder for Hugging Face transformers: convert it first, with "
            f"`fairseq-moe convert {path} model.pt --from hf`"
        )
    there = listed(folder, ".pt")
    remedy = f"name a checkpoint in it: {there}" if there else "it has no *.pt; name a checkpoint"
    raise UserError(f"{where}: is a folder: {remedy}")


def check_checkpoint(path: Name, where: str = "") -> None:
    """Raise UserError unless a checkpoint's path is a file."""
    refuse_folder(path, where)
    if not os.path.isfile(path):
        raise UserError(f"{where or path}: no such checkpoint; check the path")


def listed(folder: Path, suffix: str, shown: int = 5) -> str:
    """The files of a folder with this suffix, the best and the last checkpoint first; "" for
    none."""
    names = sorted(path.name for path in folder.glob(f"*{suffix}"))
    names.sort(key=lambda name: not name.startswith(("checkpoint_best", "checkpoint_last")))
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def check_named(settings: Mapping[str, Any], argv: Optional[Sequence[str]] = None) -> None:
    """Raise UserError if a setting names a FIFO, a socket or a device, which may block for ever.

    Args:
        settings: flag, without dashes and with "_", -> value or list of values.
        argv: the command line, which distinguishes flags from positional arguments. None: all are
            flags.
    """
    for key, value in settings.items():
        spelled = flag(key)
        is_flag = argv is None or has_flag(argv, spelled)
        for path in value if isinstance(value, (list, tuple)) else [value]:
            kind = _waits(path) if isinstance(path, (str, Path)) else ""
            if kind:
                where = f"{spelled} {path}" if is_flag else str(path)
                raise UserError(f"{where}: {kind}, not a file; name a regular file")


def _waits(path: Name) -> str:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ""
    return "" if stat.S_ISDIR(status.st_mode) else kind_of(status)


def open_binary(path: Name, where: str = "") -> BinaryIO:
    """Open a regular file. Raises UserError if it is not one or cannot be opened."""
    check(path, where)
    try:
        return open(path, "rb")
    except OSError as error:
        raise unreadable(where or str(path), error) from None


def read_text(path: Name, where: str = "", encoding: str = "utf-8") -> str:
    """The text of a file, with all newlines as "\\n". Raises UserError, which names the byte if the
    text is not UTF-8."""
    with open_binary(path, where) as file:
        try:
            data = file.read()
        except OSError as error:
            raise unreadable(where or str(path), error) from None
    return text_of(data, where or str(path), encoding)


def text_of(data: bytes, where: str, encoding: str = "utf-8") -> str:
    """What read_text makes of a file's bytes. Raises UserError, which begins with `where`, for text
    that is not UTF-8."""
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        byte = f"byte {error.start} (0x{data[error.start]:02x})"
        raise UserError(
            f"{where}: not UTF-8 at {byte}; convert it to UTF-8, or name another file"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def digest_of(path: Name) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for piece in iter(lambda: stream.read(1 << 22), b""):
            digest.update(piece)
    return digest.hexdigest()


def parse_json(text: str) -> Any:
    """Parse JSON. Raises ValueError if it is invalid, nested too deep, or contains text that cannot
    be written as UTF-8 (half of a surrogate pair)."""
    try:
        value = json.loads(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeEncodeError:
        raise ValueError(
            "half of a surrogate pair (\\ud800 to \\udfff), which is not text"
        ) from None
    return value


def read_json(path: Name, where: str = "", remedy: str = "") -> Any:
    """Read JSON. Raises UserError for a file that cannot be read or is not JSON."""
    end = remedy and f": {remedy}"  # instead of the general one
    try:
        return parse_json(read_text(path, where))
    except UserError as error:
        raise UserError(f"{str(error).replace(_REMEDY, '') if end else error}{end}") from None
    except ValueError as error:
        raise UserError(f"{where or path}: not JSON: {error}{end}") from None
