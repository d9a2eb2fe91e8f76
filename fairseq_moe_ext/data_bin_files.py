"""Checks that the two files of a data-bin are complete and fit a dictionary."""

import os
import struct

from .errors import UserError


def check_data_bin(path: str):
    """The numpy type of the tokens. Raises UserError unless PATH.idx and PATH.bin, in the mmap
    format, are complete.

    The .idx is 26 bytes of header (magic, version, type, number of sentences), then an int32 size
    and an int64 offset for every sentence; see fairseq/data/indexed_dataset.py:392@0.12.2.
    """
    import numpy
    from fairseq.data.indexed_dataset import _code_to_dtype

    index, tokens = path + ".idx", path + ".bin"
    remedy = "the file is truncated or damaged: copy it again or rebuild the data-bin"
    header = struct.Struct("<9sQBQ")
    with open(index, "rb") as stream:
        head = stream.read(header.size)
        index_size = stream.seek(0, os.SEEK_END)
    if len(head) < header.size:
        raise UserError(f"{index}: {index_size} bytes, {header.size} or more expected; {remedy}")
    magic, version, dtype_code, count = header.unpack(head)
    if magic != b"MMIDIDX\x00\x00":
        raise UserError(
            f"{index}: not an index of fairseq's mmap format; rebuild the data-bin with "
            "`fairseq-preprocess --dataset-impl mmap`, or set --dataset-impl to its format"
        )
    dtype = _code_to_dtype.get(dtype_code)
    if version != 1 or dtype is None or not numpy.issubdtype(dtype, numpy.integer):
        raise UserError(f"{index}: unknown version {version} or token type {dtype_code}; {remedy}")
    expected = header.size + 12 * count
    if index_size != expected:
        raise UserError(
            f"{index}: {index_size} bytes, expected {expected} ({count} sentences); {remedy} "
            "with fairseq (Megatron's index has another format)"
        )
    expected = _size_by_index(index, header.size, count, numpy.dtype(dtype).itemsize, remedy)
    actual = os.path.getsize(tokens)
    if actual != expected:
        raise UserError(f"{tokens}: {actual} bytes, expected {expected} by its .idx; {remedy}")
    if not actual:
        raise UserError(f"{tokens}: holds no tokens; give it some text or leave this split out")
    return dtype


def _size_by_index(index: str, start: int, count: int, itemsize: int, remedy: str) -> int:
    """Bytes of the .bin according to its .idx. Raises UserError unless each sentence begins where
    the previous one ends.

    Args:
        start: offset of the sizes in the file; the offsets of the sentences follow them.
    """
    import numpy

    end, chunk = 0, 1 << 20
    for first in range(0, count, chunk):
        rows = min(chunk, count - first)
        sizes = numpy.fromfile(index, "<i4", rows, offset=start + 4 * first)
        offsets = numpy.fromfile(index, "<i8", rows, offset=start + 4 * count + 8 * first)
        ends = end + itemsize * numpy.cumsum(sizes, dtype=numpy.int64)
        if (sizes < 0).any() or (offsets != ends - itemsize * sizes.astype(numpy.int64)).any():
            raise UserError(f"{index}: its sentences are not contiguous; {remedy}")
        end = int(ends[-1])
    return end


def check_tokens(tokens: str, values, dictionary) -> None:
    """Raise UserError for token ids outside the dictionary.

    Args:
        tokens: name of the file.
        values: all of them, a numpy array of integers.
    """
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= len(dictionary):
        raise UserError(
            f"{tokens}: token id {low if low < 0 else high} is outside the dictionary "
            f"({len(dictionary)} entries): use the dict.txt that the data-bin was built with, or "
            "rebuild the data-bin"
        )
