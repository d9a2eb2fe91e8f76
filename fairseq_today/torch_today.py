"""What stock fairseq 0.12.2 needs to work with today's torch: loading, and objects between
ranks."""

import argparse
import os
import pickle
import re
import zipfile
from typing import Any

from .errors import Unreadable, UserError, first_line
from .registry import View


def loading_weights_only(torch: Any) -> Any:
    """torch 2.6 and later load weights only, and refuse published checkpoints, which have an
    argparse.Namespace; earlier ones run any code that a file has.

    Here checkpoints are data: tensors, numbers, text, settings; never a pickle that runs code.
    """
    torch.serialization.add_safe_globals(_checkpoint_types())
    return View(torch, load=load_weights_only)


def _checkpoint_types() -> list:
    """The classes found in checkpoints of fairseq beyond those that torch allows by itself."""
    import _codecs

    import numpy
    from fairseq.data import Dictionary

    # numpy's functions that make a scalar and an array again: logged values, such as the counts of
    # stock's --eval-bleu
    rebuilding = [value.__reduce__()[0] for value in (numpy.float64(0), numpy.zeros(1))]
    dtypes = {type(numpy.dtype(code)) for code in "?bBhHiIlLqQefd"}
    return [
        argparse.Namespace,  # args of models without a dataclass, and of all before fairseq 0.10
        Dictionary,  # task_state of some published models
        numpy.dtype,
        numpy.ndarray,
        *dtypes,
        *rebuilding,
        *map(_under_the_other_name, rebuilding),
        _codecs.encode,
    ]


def _under_the_other_name(function):
    """The function as numpy 1 (numpy.core.multiarray) and 2 (numpy._core.multiarray) call it: a
    file may come from the other."""

    def renamed(*args):
        return function(*args)

    core = "numpy.core" if function.__module__.startswith("numpy._core") else "numpy._core"
    renamed.__module__ = core + ".multiarray"
    renamed.__name__ = renamed.__qualname__ = function.__name__
    return renamed


def load_weights_only(file, map_location=None, mmap: bool = False):
    """torch.load of data alone. Raises a one-line UserError for an invalid file.

    mmap: take a path, and map the file into memory instead of reading it. Files of before torch
    1.6, compressed ones, and those whose path is not UTF-8 cannot be mapped and are read.
    """
    import torch

    name = file if isinstance(file, str) else getattr(file, "name", "the checkpoint")
    remedy = "copy it again, or name another"
    try:
        if mmap and _can_be_mapped(file):
            return torch.load(file, map_location=map_location, weights_only=True, mmap=True)
        return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)|(?:class|function) ([\w.]+\.\w+)", str(error))
        if refused is None:
            said = re.search(r"WeightsUnpickler error: (?!Unsupported operand)([^\n]+)", str(error))
            # Not torch's own first line, which advises to load it with weights_only=False.
            reason = f"; {said.group(1)}" if said else ""
            raise Unreadable(
                f"{name}: not a checkpoint, or damaged ({_size(name)}{reason}); {remedy}"
            ) from error
        function = refused.group(1) or refused.group(2)
        raise UserError(
            f"{name}: rejected, because loading it would run {function}, which belongs in no "
            "checkpoint; do not use this file, or convert it on a machine where you trust it"
        ) from error
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # the bytes of any file may be any instruction to the unpickler
        if "allocat" in str(error):  # torch's RuntimeError for too little memory
            raise
        # others are about bytes that were read as instructions, such as KeyError: 101
        told = isinstance(error, (OSError, RuntimeError, zipfile.BadZipFile))
        reason = f"; {first_line(error)}" if told else ""
        raise Unreadable(
            f"{name}: truncated or not a checkpoint ({_size(name)}{reason}); {remedy}"
        ) from error


def _can_be_mapped(path: str) -> bool:
    """Whether torch takes the path, and the file stores tensors uncompressed; torch.load would
    read compressed bytes as numbers."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return False
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())
    except zipfile.BadZipFile:
        return True  # torch.load says why


def _size(path: str) -> str:
    return f"{os.path.getsize(path):,} bytes" if os.path.isfile(path) else "size unknown"


def broadcast_of_objects(stock, obj, src_rank, group, dist_device):
    """Resuming on several processes, the other ranks unpickle what rank 0 sends with torch.load,
    which refuses fairseq's placeholders since torch 2.6.

    It comes from a process of the same job, as all that the process group carries, not from a
    file. torch's own broadcast of objects does it.
    """
    import torch.distributed

    box = [obj]
    torch.distributed.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
    return box[0]
