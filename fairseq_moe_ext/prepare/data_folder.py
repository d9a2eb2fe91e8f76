"""The folder DATA: built under another name and put in place in one step; nothing else is deleted.

The process that builds DATA holds the lock DATA.lock and works in .DATA.PID.tmp beside it. If it is
killed, the next process to hold the lock removes that folder. DATA is always either the old data or
the new: the kernel exchanges the two names in one step. On file systems without that step there are
two renames; after a kill between them the next run restores the old data (.DATA.PID.old).
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Set

from .. import data_bin, files
from ..errors import UserError
from ..locks import Lock, beside


@contextlib.contextmanager
def new_folder(dest: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder to fill, which is `dest` when the block ends without an exception.

    Raises:
        UserError: `dest` is there (without `overwrite`), is not what prepare made, cannot be
            written, or another prepare makes it. `dest` is then as it was before.
    """
    target = Path(os.path.realpath(dest))  # what a link names is replaced, the link stays
    parents = _make_parents(target.parent, dest)
    try:
        with Lock(beside(target), str(dest)):
            try:
                _remove_remains(target)
                check(dest, overwrite)
                scratch = _beside(target, "tmp")
                scratch.mkdir()
                try:
                    yield scratch
                    _put_in_place(scratch, target, overwrite)
                finally:
                    if scratch.is_dir():
                        remove(scratch)
            except OSError as error:  # reading has errors of its own
                words = files.reason(error)
                raise UserError(f"{dest}: cannot be written: {words}; name another") from None
    finally:
        for folder in parents:
            with contextlib.suppress(OSError):  # it has DATA
                folder.rmdir()


def check(dest: Path, overwrite: bool) -> None:
    """Raise UserError if `dest` cannot be created or replaced."""
    if not os.path.lexists(dest):
        return
    if not os.path.exists(dest):
        raise UserError(f"{dest}: a dangling symbolic link; remove it or name a folder")
    if not overwrite:
        raise UserError(f"{dest}: exists; choose another folder or add --overwrite")
    if os.path.ismount(dest) or os.path.samefile(dest, os.getcwd()):
        raise UserError(f"{dest}: is the current folder or a mount point; name a folder in it")
    if not dest.is_dir():
        raise UserError(f"{dest}: not a folder; choose another place")
    if any(dest.iterdir()):
        other = foreign(dest)
        if other is not None:
            raise UserError(
                f"{dest}: --overwrite replaces only folders that contain nothing but output of "
                f"fairseq-moe prepare, which did not write {other}; move that elsewhere or choose "
                "another folder"
            )


def foreign(folder: Path) -> Optional[Path]:
    """The first thing below a folder that prepare did not write there; None if there is none."""
    written = _written(folder)
    for at, names in sorted(written.items()):
        for entry in sorted(os.scandir(folder / at), key=lambda entry: entry.name):
            is_corpus = at == "" and entry.name in written
            if entry.is_symlink() or not (
                entry.is_dir() if is_corpus else entry.name in names and entry.is_file()
            ):
                return Path(entry.path)
    return None


def _written(folder: Path) -> Dict[str, Set[str]]:
    """Folder below DATA ("" for itself) -> the files that prepare wrote there, from counts.json."""
    try:
        counts = files.read_json(folder / data_bin.COUNTS)
        corpora = {name: splits.keys() & set(data_bin.SPLITS) for name, splits in _corpora(counts)}
    except (UserError, AttributeError, KeyError, TypeError):
        return {"": set()}
    written = {
        name: {
            data_bin.DICTIONARY,
            *(f"{split}.{end}" for split in splits for end in ("bin", "idx")),
        }
        for name, splits in corpora.items()
        if (folder / name).is_dir() and not (folder / name).is_symlink()
    }
    return {**written, "": {data_bin.DICTIONARY, *data_bin.TOKENIZER, data_bin.COUNTS}}


def _corpora(counts: Dict) -> List:
    for name in counts["corpora"]:
        data_bin.check_corpus_name(name, data_bin.COUNTS)
    return list(counts["corpora"].items())


def remove(folder: Path) -> None:
    """Remove a folder that we named: unfinished data completely; of finished data, which may
    contain newer files, only what prepare wrote."""
    if not (folder / data_bin.COUNTS).exists():
        shutil.rmtree(folder)
        return
    for at, names in sorted(_written(folder).items(), reverse=True):
        for name in names - {data_bin.COUNTS}:
            with contextlib.suppress(FileNotFoundError):
                (folder / at / name).unlink()
        if at:
            with contextlib.suppress(OSError):  # something else is in it
                (folder / at).rmdir()
    if os.listdir(folder) == [data_bin.COUNTS]:  # the last to go: it says what may go
        (folder / data_bin.COUNTS).unlink()
        folder.rmdir()
    else:
        print(
            f"{folder}: kept, because it contains files that prepare did not write", file=sys.stderr
        )


def _make_parents(folder: Path, dest: Path) -> List[Path]:
    """Make a folder with those above it; the new ones, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        other = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        raise UserError(f"{dest}: {other} is not a folder; name another") from None
    except OSError as error:
        raise UserError(f"{dest}: cannot be written: {files.reason(error)}; name another") from None
    return missing


def _stem(target: Path) -> str:
    """What the names beside DATA begin with: they may be longer than a name can be."""
    name = os.fsencode(target.name)
    short = target.name if len(name) <= 200 else hashlib.sha256(name).hexdigest()
    return f".{short}."


def _beside(target: Path, kind: str) -> Path:
    return target.parent / f"{_stem(target)}{os.getpid()}.{kind}"


def _remove_remains(target: Path) -> None:
    """Put back or remove what killed processes left; the lock says that nobody works on it."""
    pattern = re.compile(re.escape(_stem(target)) + r"[0-9]+\.(tmp|old)")
    for path in sorted(target.parent.iterdir()):
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            is_whole = (path / data_bin.COUNTS).exists()
            if path.suffix == ".old" and is_whole and not os.path.lexists(target):
                path.rename(target)
            else:
                remove(path)


def _put_in_place(scratch: Path, target: Path, overwrite: bool) -> None:
    """Give `scratch` the name `target`; what had it before is removed after that."""
    if not os.path.lexists(target):
        os.rename(scratch, target)
        return
    check(target, overwrite)  # hours may have passed
    if exchange(scratch, target):
        return  # whoever made `scratch` removes it, and with it the old data
    old = _beside(target, "old")
    os.rename(target, old)
    os.rename(scratch, target)
    remove(old)


def exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two paths in one step. False if the system has no such step."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    try:
        if sys.platform == "darwin":
            status = libc.renamex_np(*names, 2)  # RENAME_SWAP
        else:
            at = -100  # AT_FDCWD: from the current folder
            status = libc.renameat2(at, names[0], at, names[1], 2)  # RENAME_EXCHANGE
    except AttributeError:  # a C library without it
        return False
    if status == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))
