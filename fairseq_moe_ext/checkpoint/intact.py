"""Whether a file is as it was written."""

from __future__ import annotations

import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Iterator

from .. import cores, files
from ..errors import UserError

_PIECE = 1 << 22  # bytes read at a time
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
        with zipfile.ZipFile(path) as archive:
            records = iter(archive.infolist())
        threads = min(8, cores.usable())
        with ThreadPoolExecutor(threads) as pool:  # zlib sums without Python's lock
            for check in [pool.submit(_check_records, path, records) for _ in range(threads)]:
                check.result()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise UserError(f"{path}: {str(error) or 'cut short'}; {_REMEDY}") from error


def _check_records(path: str, records: Iterator[zipfile.ZipInfo]) -> None:
    # Each thread opens the file: a shared one seeks from where another thread has left it
    # (line 820 of zipfile/__init__.py in Python 3.13.0).
    with zipfile.ZipFile(path) as archive:
        for record in records:
            with archive.open(record) as stream:  # raises BadZipFile at the end for another CRC
                while stream.read(_PIECE):
                    pass
