"""Whether a file is as it was written."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator, List

from .. import cores, files
from ..errors import UserError

_PIECE = 1 << 22  # bytes read at a time
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError)
_REMEDY = "it is damaged: copy it again, or use another checkpoint"


def check_digest(path: str, digest: str, of: str) -> None:
    """Raise UserError unless a file has the digest that the checkpoint `of` gives for it."""
    if files.digest_of(path) != digest:
        raise UserError(f"{path}: not the bytes that {of} was saved with; {_REMEDY}")


def check_records(path: str) -> None:
    """Raise UserError if bytes of a checkpoint have changed. torch.save writes a CRC for each
    record, which torch.load does not check. Files of torch before 1.6 have no CRC."""
    if not zipfile.is_zipfile(path):
        return
    try:
        records = iter(_records(path))
        threads = min(8, cores.usable())
        with ThreadPoolExecutor(threads) as pool:  # zlib sums without Python's lock
            for check in [pool.submit(_check_records, path, records) for _ in range(threads)]:
                check.result()
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def digest_of_records(path: str) -> str:
    """A digest of a checkpoint's file from the CRCs of its records, which are not read: fast at any
    size. UserError for a damaged file."""
    if not zipfile.is_zipfile(path):
        return files.digest_of(path)
    try:
        records = [(record.filename, record.file_size, record.CRC) for record in _records(path)]
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    return hashlib.sha256(repr(records).encode()).hexdigest()


def _records(path: str) -> List[zipfile.ZipInfo]:
    with zipfile.ZipFile(path) as archive:
        return archive.infolist()


def _damaged(path: str, error: Exception) -> UserError:
    return UserError(f"{path}: {str(error) or 'cut short'}; {_REMEDY}")


def _check_records(path: str, records: Iterator[zipfile.ZipInfo]) -> None:
    # Each thread opens the file: a shared one seeks from where another thread has left it
    # (line 820 of zipfile/__init__.py in Python 3.13.0).
    with zipfile.ZipFile(path) as archive:
        for record in records:
            with archive.open(record) as stream:  # raises BadZipFile at the end for another CRC
                while stream.read(_PIECE):
                    pass
