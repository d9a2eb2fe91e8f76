"""Token ids to the .bin and .idx of fairseq's mmap format, in bounded memory.

The format is that of MMapIndexedDatasetBuilder (fairseq/data/indexed_dataset.py:391-587@0.12.2),
and a test compares the bytes with what that class writes. We do not use that class because it needs
torch, one call per line of text, and all lines' sizes as Python integers in memory.
"""

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .encode import EncodedSplit

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
BLOCK = 1 << 22  # tokens or lines at a time
_BPE_ID = np.dtype(np.uint32)
_SIZE = np.dtype(np.int32)


def dtype_of(size: int) -> np.dtype:
    """The number type that fairseq uses for tokens of a dictionary with `size` symbols.

    fairseq/data/indexed_dataset.py:22@0.12.2; the special symbols count.
    """
    return np.dtype(np.uint16 if size < 65500 else np.uint32)


class SplitWriter:
    """Collects one split of one corpus, then writes its data-bin.

    Until the dictionary is known, BPE ids are kept in temporary files beside the data-bin.
    """

    def __init__(self, prefix: Path, newline: int):
        """`prefix`: path of the data-bin without .bin; `newline`: the newline's BPE id, N."""
        self._prefix = prefix
        self._newline = newline
        self._ids: BinaryIO = open(f"{prefix}.ids.tmp", "wb")
        self._sizes: BinaryIO = open(f"{prefix}.sizes.tmp", "wb")
        self.counts = np.zeros(newline + 1, dtype=np.int64)  # (N + 1,)
        self.documents = 0
        self.lines = 0
        self.tokens = 0
        self.bytes = 0

    def add(self, part: EncodedSplit) -> None:
        """Append documents, with a blank line before them unless they are the first."""
        if self.documents:
            self._append(np.array([self._newline], _BPE_ID), np.array([1], _SIZE), 1)
        self._append(part.ids, part.sizes, part.bytes)
        self.documents += part.documents

    def _append(self, ids: np.ndarray, sizes: np.ndarray, num_bytes: int) -> None:
        self._ids.write(ids.astype(_BPE_ID, copy=False).tobytes())
        self._sizes.write(sizes.astype(_SIZE, copy=False).tobytes())
        self.counts += np.bincount(ids, minlength=len(self.counts))
        self.lines += len(sizes)
        self.tokens += len(ids)
        self.bytes += num_bytes

    def close(self) -> None:
        self._ids.close()
        self._sizes.close()

    def finish(self, table: np.ndarray, dtype: np.dtype) -> None:
        """Write the .bin and .idx and remove the temporary files.

        Args:
            table: (N + 1,) dictionary index of every BPE id.
            dtype: type of a token in the .bin.
        """
        self.close()
        table = table.astype(dtype)
        with open(f"{self._prefix}.bin", "wb") as file:
            for ids in _blocks(self._ids.name, _BPE_ID):
                file.write(table[ids].tobytes())
        with open(f"{self._prefix}.idx", "wb") as file:
            file.write(_MAGIC + struct.pack("<QBQ", _VERSION, _CODES[dtype.type], self.lines))
            for sizes in _blocks(self._sizes.name, _SIZE):
                file.write(sizes.tobytes())
            start = 0  # bytes into the .bin
            for sizes in _blocks(self._sizes.name, _SIZE):
                ends = start + np.cumsum(sizes.astype(np.int64) * dtype.itemsize)
                file.write(np.concatenate([[start], ends[:-1]]).astype(np.int64).tobytes())
                start = int(ends[-1])
        Path(self._ids.name).unlink()
        Path(self._sizes.name).unlink()


# codes of fairseq/data/indexed_dataset.py:117@0.12.2
_CODES = {np.uint16: 8, np.uint32: 9}


def _blocks(path: str, dtype: np.dtype):
    """The numbers in a file, BLOCK of them at a time."""
    with open(path, "rb") as file:
        while True:
            block = np.frombuffer(file.read(BLOCK * dtype.itemsize), dtype)
            if not len(block):
                return
            yield block
