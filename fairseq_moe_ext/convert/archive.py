"""Writes files of torch.save and safetensors tensor by tensor, so that memory stays small.

torch.save needs everything that it writes in memory. Here a tensor may be a `Lazy`: its shape, its
dtype and a function that yields it piece by piece when its turn comes.

The format of torch.save (since torch 1.6) is an uncompressed zip: `data.pkl`, a pickle in which a
tensor is a call of torch._utils._rebuild_tensor_v2 on a persistent id ("storage", its class, the
name of its record, "cpu", its length), and for each storage a record `data/<name>` of bare bytes,
aligned to 64 bytes so that it can be mapped. That of safetensors is the length of a header, the
header as JSON and the bare bytes (huggingface/safetensors, README, "Format").
"""

from __future__ import annotations

import ctypes
import io
import json
import mmap
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, BinaryIO, Callable, Dict, Iterable, Iterator, List, Tuple, Union

import numpy
import torch
from torch import Tensor

from ..errors import UserError
from ..moe.experts import TensorPerExpert

PIECE = 1 << 26  # bytes written at a time
_MADV_PAGEOUT = 21  # include/uapi/asm-generic/mman-common.h
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
_ALIGNMENT = 64
_LOCAL_HEADER = 30  # bytes of zip's local file header before the name
_OLDEST = (1980, 1, 1, 0, 0, 0)  # of zip; so that equal contents are equal files

_STORAGES = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(eq=False)  # by identity: an object with two references is written once
class Lazy:
    """A tensor that is made when it is written; `pieces` yields it in order, flattened or not."""

    shape: Tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterator[Tensor]]

    def numel(self) -> int:
        return torch.Size(self.shape).numel()


AnyTensor = Union[Tensor, TensorPerExpert, Lazy]


def dtype_of(value: AnyTensor) -> torch.dtype:
    return dtype_of(value[0]) if isinstance(value, TensorPerExpert) else value.dtype


def bytes_of(value: AnyTensor) -> int:
    size = torch.Size(value.shape).numel()
    return size * torch.empty(0, dtype=dtype_of(value)).element_size()


def pieces_of(value: AnyTensor) -> Iterator[Tensor]:
    """The tensor in order, in contiguous pieces of PIECE bytes at most where it can be cut."""
    if isinstance(value, TensorPerExpert):
        for part in value:
            yield from pieces_of(part)
    elif isinstance(value, Lazy):
        for piece in value.pieces():
            yield from pieces_of(piece)
    elif value.is_contiguous():
        for piece in value.detach().reshape(-1).split(max(1, PIECE // value.element_size())):
            yield piece
            _let_go(piece)
    else:
        yield value.detach().contiguous()


def _let_go(piece: Tensor) -> None:
    """Release the memory of mapped pages that have been read. The kernel would keep them while
    memory is free, and the process would seem as large as its files. This is only advice (Linux 5.4
    and later); the pages stay readable."""
    start = -(-piece.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (piece.data_ptr() + piece.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if _libc is not None and start < end:
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


def write_torch(state: Any, path: str, progress: Callable[[int], Any]) -> None:
    """Write `state` so that torch.load(path) gives it, with every Lazy and TensorPerExpert as the
    tensor that it represents. Tensors that are one in memory are one in the file."""
    records: List[AnyTensor] = []
    pickled = io.BytesIO()
    _Pickler(pickled, records).dump(state)
    with open(path, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        _record(archive, "data.pkl", [pickled.getvalue()])
        _record(archive, "byteorder", [b"little"])
        for number, value in enumerate(records):
            _record(archive, f"data/{number}", _bytes(value, progress))
        _record(archive, "version", [b"3\n"])
        archive.close()  # before the bytes are brought to disk
        _sync(stream)


def write_safetensors(tensors: Dict[str, AnyTensor], path: str, progress) -> None:
    header: Dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, value in tensors.items():
        start, end = end, end + bytes_of(value)
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype_of(value)],
            "shape": list(value.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            for piece in _bytes(value, progress):
                stream.write(piece)
        _sync(stream)


def read_safetensors(path: str) -> Dict[str, Tensor]:
    """The tensors of a file, mapped. UserError for a file that is not safetensors or is
    truncated."""
    dtypes = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
    size = os.path.getsize(path)
    try:
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if not 0 < length <= size - 8:
                raise ValueError("no header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = 0
        for start, following in sorted(entry["data_offsets"] for entry in header.values()):
            if start != end or following < start:
                raise ValueError(f"tensors overlap or leave a gap at byte {end:,}")
            end = following
        if 8 + length + end != size:
            raise ValueError(f"{8 + length + end:,} bytes expected")
        # torch.from_file takes only paths in UTF-8
        whole = torch.from_numpy(numpy.memmap(path, numpy.uint8, mode="c"))
        tensors = {}
        for name, entry in header.items():
            start, end = (8 + length + offset for offset in entry["data_offsets"])
            dtype = dtypes[entry["dtype"]]
            part = whole[start:end]
            if start % torch.empty(0, dtype=dtype).element_size():
                part = part.clone()  # the format does not promise that tensors are aligned
            tensors[name] = part.view(dtype).view(entry["shape"])
        return tensors
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, struct.error) as error:
        raise UserError(
            f"{path}: truncated or not a safetensors file ({size:,} bytes; "
            f"{str(error).splitlines()[0]}); copy it again"
        ) from error


class _Storage:
    """The representation of a storage in the pickle."""

    def __init__(self, value: AnyTensor, key: str) -> None:
        self.id = "storage", _STORAGES[dtype_of(value)], key, "cpu", torch.Size(value.shape).numel()


class _Pickler(pickle.Pickler):
    def __init__(self, stream: BinaryIO, records: List[AnyTensor]) -> None:
        super().__init__(stream, protocol=2)
        self.records = records
        self.storages: Dict[Any, _Storage] = {}

    def persistent_id(self, obj: Any) -> Any:
        return obj.id if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, (Tensor, TensorPerExpert, Lazy)):
            return NotImplemented
        same: Any = id(obj)  # alive as long as `records` is
        if isinstance(obj, Tensor) and obj.numel() > 0 and obj.is_contiguous():
            same = obj.data_ptr(), tuple(obj.shape), obj.dtype
        if same not in self.storages:
            self.storages[same] = _Storage(obj, str(len(self.records)))
            self.records.append(obj)
        shape = torch.Size(obj.shape)
        strides, step = [], 1
        for length in reversed(shape):
            strides.append(step)
            step *= max(1, length)
        hooks: Dict[str, Any] = OrderedDict()
        args = self.storages[same], 0, tuple(shape), tuple(reversed(strides)), False, hooks
        return torch._utils._rebuild_tensor_v2, args


def _record(
    archive: zipfile.ZipFile, name: str, pieces: Iterable[Union[bytes, memoryview]]
) -> None:
    info = zipfile.ZipInfo(f"archive/{name}", _OLDEST)
    zip64 = 20  # bytes that zipfile adds to our padding with force_zip64
    assert archive.fp is not None  # it is open
    start = archive.fp.tell() + _LOCAL_HEADER + len(info.filename) + zip64 + 4
    info.extra = struct.pack("<2sH", b"FB", -start % _ALIGNMENT) + bytes(-start % _ALIGNMENT)
    with archive.open(info, "w", force_zip64=True) as stream:
        for piece in pieces:
            stream.write(piece)


def _bytes(value: AnyTensor, progress: Callable[[int], Any]) -> Iterator[memoryview]:
    for piece in pieces_of(value):
        data = piece.reshape(-1).view(torch.uint8).numpy().data
        yield data
        progress(len(data))


def _sync(stream: BinaryIO) -> None:
    stream.flush()
    os.fsync(stream.fileno())
