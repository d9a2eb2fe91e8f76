"""What stock fairseq 0.12.2 needs to run with today's Python, torch, numpy and hydra.

All that leans on a non-public detail of fairseq for that purpose is here. Two ways lead in:

- installed: the start-up hook (`fairseq_moe_ext_hook.py`) loads this file by its path when fairseq
  is first imported, and nothing of it when fairseq is not;
- `--user-dir path/to/fairseq_moe_ext` alone: fairseq is there already (Python 3.9 and 3.10 import
  it unaided), and `fairseq_moe_ext/__init__.py` calls `apply()`.

`apply()` goes through PATCHES, at the end of this file, from top to bottom. Each patch is one
function that says what breaks, where (file:line in fairseq 0.12.2), and when the patch may go; its
condition stands beside it in the table. Functions of fairseq are wrapped, never copied.
"""

import argparse
import atexit
import contextlib
import dataclasses
import datetime
import difflib
import functools
import importlib
import importlib.util
import inspect
import logging
import os
import pickle
import re
import shutil
import struct
import sys
import time
import traceback
import types
import warnings
import zipfile
from pathlib import Path
from typing import Callable, Iterator, List, NamedTuple, Optional

from fairseq_moe_ext.errors import OneLineParser, UserError
from fairseq_moe_ext.files import read_text
from fairseq_moe_ext.finding import plugin_by_itself
from fairseq_moe_ext.generation import (
    overlong_lines,
    prompts_with_ends,
    repeated_ngrams,
    topk_of_a_small_dictionary,
)
from fairseq_moe_ext.literals import literal

_LOADED_BY_HOOK = "fairseq_moe_ext" not in sys.modules  # so it is installed
applied: List[str] = []  # names of the patches in force, in order


class Patch(NamedTuple):
    """One repair and the condition under which this machine needs it."""

    apply: Callable[[], None]
    needed: Callable[[], bool]


def apply() -> None:
    """Put every needed patch in force; import fairseq if nobody has. Once is enough."""
    _complete_package()
    if "fairseq" not in sys.modules:
        with _fit_to_import():
            import fairseq  # noqa: F401  (with the start-up hook, this ends in apply() by itself)
    if applied:
        return
    applied.append("")  # a patch that imports more of fairseq must not start a second round
    for patch in PATCHES:
        if patch.needed():
            patch.apply()
            applied.append(patch.apply.__name__)
    applied.remove("")


def wrap_loader(spec) -> None:
    """Make the loader in fairseq's module spec import fairseq and patch it (for the hook)."""
    stock = spec.loader

    class Loader:
        def create_module(self, spec):
            return stock.create_module(spec)

        def exec_module(self, module):
            spec.loader = module.__loader__ = stock  # for whoever asks the module later
            with _fit_to_import():
                stock.exec_module(module)
            apply()

    spec.loader = Loader()


def _complete_package() -> None:
    """Give the package its submodules that the hook loaded by path, before there was a package."""
    package = sys.modules.get("fairseq_moe_ext")
    for name in ("errors", "files", "finding", "generation", "literals", "compat"):
        module = sys.modules.get("fairseq_moe_ext." + name)
        if package is not None and module is not None:
            setattr(package, name, module)


@contextlib.contextmanager
def _fit_to_import() -> Iterator[None]:
    """What must hold while fairseq's own modules are imported, and only then."""
    quiet_warnings()
    if sys.version_info < (3, 11):
        yield
    else:
        with relaxed_dataclass_defaults():
            yield


@contextlib.contextmanager
def relaxed_dataclass_defaults() -> Iterator[None]:
    """Let fairseq's dataclasses have instances of dataclasses as defaults.

    Breaks: `import fairseq`, on Python 3.11 and later, which refuses a default whose class has no
    `__hash__`; until 3.10 only list, dict and set were refused.
    Where: fairseq/dataclass/configs.py:1106 and every other config within a config.
    How: for a class of fairseq's, such a default passes for hashable during that one check.
    Ends: with a fairseq that uses `default_factory`.
    """
    strict = dataclasses._get_field

    def get_field(cls, name, annotation, *rest):
        default = getattr(cls, name, None)
        if isinstance(default, dataclasses.Field):
            default = default.default
        kind = type(default)
        is_fairseq = cls.__module__.partition(".")[0] == "fairseq"
        if not (is_fairseq and dataclasses.is_dataclass(kind) and kind.__hash__ is None):
            return strict(cls, name, annotation, *rest)
        kind.__hash__ = object.__hash__
        try:
            return strict(cls, name, annotation, *rest)
        finally:
            kind.__hash__ = None

    dataclasses._get_field = get_field
    try:
        yield
    finally:
        dataclasses._get_field = strict


# What stock fairseq's own lines provoke at every start and a user can do nothing about: the start
# of the message, and of the module it is put down to.
_KNOWN_WARNINGS = (
    # fairseq/dataclass/utils.py:397 and :399
    (r"hydra\.experimental\.\w+\(\) is no longer", ""),
    (r"\nThe strict flag in the compose API", ""),
    # fairseq/config/config.yaml, fairseq/dataclass/initialize.py:19
    (r"In 'config': Usage of deprecated keyword in package header", ""),
    (r"\n'.*' is validated against ConfigStore schema", ""),
    # fairseq_cli/hydra_train.py:25
    (r"\nThe version_base parameter is not", r"hydra\.experimental|fairseq_cli"),
    (r"Future Hydra versions will no longer change working directory", ""),
    # fairseq/tasks/fairseq_task.py:514, fairseq/data/iterators.py, modules/multihead_attention.py
    (r"`torch\.cuda\.amp\.", "fairseq|fairscale"),
    (r"'pin_memory' argument is set as true but no acc", ""),
    (r"Support for mismatched key_padding_mask and attn_mask", ""),
)


def quiet_warnings() -> None:
    """Hide the known warnings about stock fairseq's own lines, unless the user set -W.

    Breaks: nothing; but some 30 lines of them at every start bury the lines that matter.
    Ends: with the lines of fairseq that are named above.
    """
    if sys.warnoptions:
        return
    for message, module in _KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=module)


class _View(types.ModuleType):
    """A module as one other module sees it: some names replaced, all others passed on."""

    def __init__(self, module, **replacements):
        super().__init__(module.__name__, module.__doc__)
        self.__dict__.update(replacements)
        self._module = module

    def __getattr__(self, name):
        return getattr(self._module, name)


def numpy_aliases() -> None:
    """Give the modules of fairseq that use them the names that numpy has dropped.

    Breaks: `--sample-break-mode eos`, the hub's `score` and `sample` (np.compat.long, gone in numpy
    2), and masking and CRF layers (np.int, np.float, gone in numpy 1.24).
    Where: fairseq/data/token_block_dataset.py:125, fairseq/data/language_pair_dataset.py:292,
    fairseq/data/data_utils.py:488, fairseq/modules/dynamic_crf_layer.py:108.
    Ends: with a fairseq that says int and float.
    """
    import numpy
    from fairseq.data import data_utils, language_pair_dataset, token_block_dataset
    from fairseq.modules import dynamic_crf_layer

    aliases = {"int": int, "float": float, "compat": types.SimpleNamespace(long=int)}
    view = _View(numpy, **aliases)
    for module in (data_utils, dynamic_crf_layer, language_pair_dataset, token_block_dataset):
        module.np = view


def data_bins_beyond_2_gib() -> None:
    """Keep the offsets of a data-bin in whole numbers of Python.

    Breaks: `fairseq-preprocess --workers N` on a corpus of 2 GiB or more, with no error: merging
    the workers' parts collects sizes as np.int32, and since numpy 2 their sum stays np.int32, so
    the offsets written into the .idx wrap round (a RuntimeWarning, and other tokens are read).
    Where: fairseq/data/indexed_dataset.py:415, sizes from :579.
    Ends: with a fairseq that converts the sizes.
    """
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

    stock = MMapIndexedDatasetBuilder.finalize

    @functools.wraps(stock)
    def finalize(self, index_file):
        self._sizes = [int(size) for size in self._sizes]
        stock(self, index_file)

    MMapIndexedDatasetBuilder.finalize = finalize


def named_dictionaries() -> None:
    """Tell of a dict.txt that is none in one line with its name (UserError).

    Breaks: a traceback that ends in the line that is wrong, without the file.
    Where: fairseq/data/dictionary.py:229.
    Ends: never.
    """
    from fairseq.data import Dictionary

    stock = Dictionary.add_from_file

    @functools.wraps(stock)
    def add_from_file(self, f):
        if isinstance(f, str) and os.path.exists(f):
            read_text(f)  # a FIFO would make stock wait; of another encoding it says no name
        try:
            return stock(self, f)
        except (RuntimeError, ValueError) as error:
            if not isinstance(f, str):  # stock calls itself with the open file
                raise
            twice = re.search(r"loading Dictionary: ('.*')\. Duplicate", str(error))
            reason = f"{twice[1]} stands in it twice" if twice else _first_line(error)
            remedy = "use the dict.txt that the model was trained with"
            raise UserError(f"{f}: {reason}; {remedy}") from error

    Dictionary.add_from_file = add_from_file


def named_inputs() -> None:
    """Tell of a --user-dir that is no package, and of a tokenizer that is none, with the name.

    Breaks: ModuleNotFoundError, UnicodeDecodeError or JSONDecodeError without the file.
    Where: fairseq/utils.py:491, fairseq/data/encoders/gpt2_bpe.py:34.
    Ends: never.
    """
    from fairseq import utils
    from fairseq.data.encoders import gpt2_bpe

    stock_import, stock_encoder = utils.import_user_module, gpt2_bpe.get_encoder

    @functools.wraps(stock_import)
    def import_user_module(args):
        folder = getattr(args, "user_dir", None)
        try:
            return stock_import(args)
        except (ModuleNotFoundError, ValueError) as error:
            name = os.path.basename(os.path.abspath(folder))
            if getattr(error, "name", "") not in ("", name) or os.path.isdir(folder) and name:
                raise
            raise UserError(f"--user-dir {folder}: no folder of a Python package") from error

    @functools.wraps(stock_encoder)
    def get_encoder(encoder_json_path, vocab_bpe_path):
        try:
            return stock_encoder(encoder_json_path, vocab_bpe_path)
        except (ValueError, AttributeError) as error:  # of Unicode and JSON, too
            raise UserError(
                f"{encoder_json_path} and {vocab_bpe_path}: no byte-level BPE "
                f"({_first_line(error)}); copy both again from where the model was made"
            ) from error

    utils.import_user_module = import_user_module
    gpt2_bpe.get_encoder = get_encoder


def checked_data_bins() -> None:
    """Refuse a data-bin with a missing, truncated or foreign file, naming it and both sizes, and
    tokens beyond the dictionary.

    Breaks: nothing at once; stock reads a cut .bin until a batch touches the lost part (then:
    buffer is smaller than requested size), and says of a cut .idx only that its format is odd. It
    reads all of the .bin once (:383), so looking at the tokens costs little.
    Where: fairseq/data/indexed_dataset.py:77 and :486.
    Ends: with a fairseq that checks.
    """
    import numpy
    from fairseq.data import indexed_dataset

    stock = indexed_dataset.make_dataset

    @functools.wraps(stock)
    def make_dataset(path, impl, fix_lua_indexing=False, dictionary=None):
        files = [path + ".idx", path + ".bin"]
        there = [os.path.isfile(file) for file in files]
        if any(there) and not all(there):
            raise UserError(
                f"{files[there.index(False)]}: missing, though {files[there.index(True)]} is "
                "there; a data-bin is both files: copy it again or make it anew"
            )
        if all(there) and os.path.getsize(files[0]) < 8:
            raise UserError(f"{files[0]}: only {os.path.getsize(files[0])} bytes; it is truncated")
        found = stock(path, impl, fix_lua_indexing, dictionary)
        if dictionary is not None and isinstance(found, indexed_dataset.MMapIndexedDataset):
            values = numpy.memmap(files[1], dtype=found._index.dtype, mode="r")
            check_tokens(files[1], values, dictionary)
        return found

    def new(cls, path=None, *args, **kwargs):  # in __new__: __del__ trips over a half-made object
        if path is not None:
            check_data_bin(path)
        return object.__new__(cls)

    indexed_dataset.make_dataset = make_dataset
    indexed_dataset.MMapIndexedDataset.__new__ = new


def check_data_bin(path: str):
    """The type of the tokens (numpy). Raises UserError unless PATH.idx and PATH.bin, of the mmap
    format, are whole.

    The .idx is 26 bytes of header (magic, version, type, number of sentences), then an int32 size
    and an int64 offset for every sentence; see fairseq/data/indexed_dataset.py:392@0.12.2.
    """
    import numpy
    from fairseq.data.indexed_dataset import _code_to_dtype

    index, tokens = path + ".idx", path + ".bin"
    remedy = "the file is truncated or damaged: copy it again or make the data-bin anew"
    header = struct.Struct("<9sQBQ")
    with open(index, "rb") as stream:
        head = stream.read(header.size)
        index_size = stream.seek(0, os.SEEK_END)
    if len(head) < header.size:
        raise UserError(f"{index}: {index_size} bytes, {header.size} or more expected; {remedy}")
    magic, version, dtype_code, count = header.unpack(head)
    if magic != b"MMIDIDX\x00\x00":
        raise UserError(
            f"{index}: not an index of fairseq's mmap format; make the data-bin anew with "
            "`fairseq-preprocess --dataset-impl mmap`, or set --dataset-impl to its format"
        )
    dtype = _code_to_dtype.get(dtype_code)
    if version != 1 or dtype is None or not numpy.issubdtype(dtype, numpy.integer):
        raise UserError(f"{index}: of version {version}, tokens of type {dtype_code}; {remedy}")
    expected = header.size + 12 * count
    if index_size != expected:
        raise UserError(
            f"{index}: {index_size} bytes, expected {expected} ({count} sentences); {remedy} with "
            "fairseq (Megatron's index is another)"
        )
    expected = _size_by_index(index, header.size, count, numpy.dtype(dtype).itemsize, remedy)
    actual = os.path.getsize(tokens)
    if actual != expected:
        raise UserError(f"{tokens}: {actual} bytes, expected {expected} by its .idx; {remedy}")
    if not actual:
        raise UserError(f"{tokens}: holds no tokens; give it some text or leave this split out")
    return dtype


def _size_by_index(index: str, start: int, count: int, itemsize: int, remedy: str) -> int:
    """Bytes of the .bin by an .idx, of which every sentence must begin where the one before ends.

    Args:
        start: of the sizes in the file, behind which the offsets are.
    """
    import numpy

    end, chunk = 0, 1 << 20
    for first in range(0, count, chunk):
        rows = min(chunk, count - first)
        sizes = numpy.fromfile(index, "<i4", rows, offset=start + 4 * first)
        offsets = numpy.fromfile(index, "<i8", rows, offset=start + 4 * count + 8 * first)
        ends = end + itemsize * numpy.cumsum(sizes, dtype=numpy.int64)
        if (sizes < 0).any() or (offsets != ends - itemsize * sizes.astype(numpy.int64)).any():
            raise UserError(f"{index}: its sentences do not follow one another; {remedy}")
        end = int(ends[-1])
    return end


def check_tokens(tokens: str, values, dictionary) -> None:
    """Raise UserError for tokens beyond a dictionary.

    Args:
        tokens: name of the file.
        values: all of them, a numpy array of integers.
    """
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= len(dictionary):
        raise UserError(
            f"{tokens}: has the token {low if low < 0 else high}, and the dictionary "
            f"{len(dictionary)} types: take the dict.txt that the data-bin was made with, or make "
            "the data-bin anew"
        )


def checkpoints_without_code() -> None:
    """Load checkpoints as data: tensors, numbers, text, settings; never a pickle that runs code.

    Breaks: on torch 2.6 and later, whose torch.load takes weights only, published checkpoints with
    an argparse.Namespace; on earlier ones, any file may run any code.
    Where: fairseq/checkpoint_utils.py:315 and :878.
    Ends: never, unless fairseq does the same.
    """
    import torch
    from fairseq import checkpoint_utils

    torch.serialization.add_safe_globals(_checkpoint_types())
    checkpoint_utils.torch = _View(torch, load=load_weights_only)


def settings_without_code() -> None:
    """Read settings that are Python expressions as values; never run them.

    Breaks: nothing; but settings stand in checkpoints, and building a model, criterion or optimizer
    from one runs any code in them. Expressions of values mean what they meant.
    Where: each `eval(` in the modules of _EVALUATING, fairseq/models/fconv_lm.py:78 for one. A name
    of a module hides Python's own of that name from its functions.
    Ends: with a fairseq that says ast.literal_eval.
    """
    for name in _EVALUATING:
        importlib.import_module(name).eval = literal


_EVALUATING = (
    "fairseq.utils",  # eval_str_list, eval_str_dict, eval_bool
    "fairseq.criterions.ctc",
    "fairseq.data.audio.raw_audio_dataset",
    "fairseq.data.codedataset",
    "fairseq.models.fconv",
    "fairseq.models.fconv_lm",
    "fairseq.models.fconv_self_att",
    "fairseq.models.hubert.hubert",
    "fairseq.models.lightconv_lm",
    "fairseq.models.speech_to_text.s2t_wav_transformer",
    "fairseq.models.transformer_lm",
    "fairseq.models.wav2vec.wav2vec",
    "fairseq.models.wav2vec.wav2vec2",
    "fairseq.optim.adafactor",
    "fairseq.optim.adam",
    "fairseq.optim.adamax",
    "fairseq.optim.cpu_adam",
    "fairseq.optim.fused_lamb",
)


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
    """torch.load of data alone; what is wrong with the file is told in one line (UserError).

    mmap: take a path, and map the file into memory instead of reading it. Files of before torch
    1.6 and compressed ones cannot be mapped and are read.
    """
    import torch

    name = file if isinstance(file, str) else getattr(file, "name", "the checkpoint")
    remedy = "copy it again, or name another (fairseq-train: --restore-file)"
    try:
        if mmap and _can_be_mapped(file):
            return torch.load(file, map_location=map_location, weights_only=True, mmap=True)
        return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)|(?:class|function) ([\w.]+\.\w+)", str(error))
        if refused is None:
            reason = re.search(r"WeightsUnpickler error: ([^\n]+)", str(error))
            # Not torch's own first line, which advises to load it with weights_only=False.
            reason = reason.group(1) if reason else "unreadable"
            raise UserError(
                f"{name}: not a checkpoint, or damaged ({_size(name)}; {reason}); {remedy}"
            ) from error
        function = refused.group(1) or refused.group(2)
        raise UserError(
            f"{name}: refused, since loading it would run {function}, which belongs in no "
            "checkpoint; do not use this file, or convert it where you trust it"
        ) from error
    except (FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # the bytes of any file may be any instruction to the unpickler
        if "allocat" in str(error):  # torch's RuntimeError for too little memory
            raise
        raise UserError(
            f"{name}: truncated or not a checkpoint ({_size(name)}; {_first_line(error)}); {remedy}"
        ) from error


def _can_be_mapped(path: str) -> bool:
    """Whether tensors lie in a file as in memory; torch.load takes compressed bytes for numbers."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())
    except zipfile.BadZipFile:
        return True  # torch.load says why


def _size(path: str) -> str:
    return f"{os.path.getsize(path):,} bytes" if os.path.isfile(path) else "size unknown"


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line.split(". This is an internal miniz error")[0]


def whole_checkpoint_copies() -> None:
    """Copy checkpoint_best.pt to checkpoint_last.pt under another name first, then rename.

    Breaks: a run killed during the copy leaves a truncated checkpoint_last.pt, which the next start
    fails to load (the file it is copied from is written so already, checkpoint_utils.py:600).
    Where: fairseq/checkpoint_utils.py:125.
    Ends: with a fairseq that renames.
    """
    from fairseq import checkpoint_utils

    def copy(source, target, overwrite=False):
        shutil.copyfile(source, target + ".tmp")
        with open(target + ".tmp", "rb+") as copied:
            os.fsync(copied.fileno())
        os.replace(target + ".tmp", target)
        return True

    checkpoint_utils.PathManager = type(
        "PathManager", (checkpoint_utils.PathManager,), {"copy": staticmethod(copy)}
    )


def broadcast_of_objects() -> None:
    """Send objects from rank 0 with torch's own broadcast.

    Breaks: resuming on several processes, torch 2.6 and later: the other ranks unpickle what rank 0
    sends with torch.load, which refuses fairseq's placeholders. It comes from a process of the
    same job, as all that the process group carries, not from a file.
    Where: fairseq/distributed/utils.py:770.
    Ends: with a fairseq that says `weights_only=False` there.
    """
    import torch.distributed
    from fairseq.distributed import utils

    def broadcast_object_slow(obj, src_rank, group, dist_device):
        box = [obj]
        torch.distributed.broadcast_object_list(box, src=src_rank, group=group, device=dist_device)
        return box[0]

    utils._broadcast_object_slow = broadcast_object_slow


def gather_on_cpu() -> None:
    """Gather objects of all ranks with torch's own function where there is no GPU.

    Breaks: criterions whose logs cannot be summed, and others' calls, under Gloo: CUDA buffers.
    Where: fairseq/distributed/utils.py:585.
    Ends: with a fairseq that asks which device the group wants.
    """
    import torch.distributed
    from fairseq.distributed import utils
    from fairseq.utils import move_to_cpu

    def all_gather_list(data, group=None, max_size=16384):
        group = utils.get_global_group() if group is None else group
        gathered = [None] * utils.get_world_size(group)
        torch.distributed.all_gather_object(gathered, move_to_cpu(data), group=group)
        return gathered

    utils.all_gather_list = all_gather_list


def ddp_on_cpu() -> None:
    """Call PyTorch's DDP without device ids for a model on the CPU.

    Breaks: `--ddp-backend pytorch_ddp` on CPU (ValueError about device_ids).
    Where: fairseq/models/distributed_fairseq_model.py:62.
    Ends: with a fairseq that passes device ids for GPUs only.
    """
    from fairseq.models import distributed_fairseq_model

    stock = distributed_fairseq_model.DistributedDataParallel

    def on_any_device(module, device_ids=None, output_device=None, **kwargs):
        if not any(parameter.is_cuda for parameter in module.parameters()):
            device_ids = output_device = None
        return stock(module, device_ids=device_ids, output_device=output_device, **kwargs)

    distributed_fairseq_model.DistributedDataParallel = on_any_device


def fsdp_on_cpu() -> None:
    """Shard models with fairscale's FSDP on machines without a GPU, over Gloo.

    Breaks: `--ddp-backend fully_sharded`: CUDA streams, which overlap exchanges with computation,
    are waited for whether there are any or not; the device is CUDA's; older Gloo has no
    reduce-scatter. On a CPU all happens in turn, and an all-reduce has the same sums.
    Where: fairscale/nn/data_parallel/fully_sharded_data_parallel.py:1162, :1368, :1692, :1740,
    :1744, :1808, :1978, :2048, :2100, :2257, :2520 and
    fairscale/internal/reduce_scatter_bucketer.py:38, :145 (0.4.13).
    Ends: with a fairscale that asks for its device, or a fairseq with PyTorch's own FSDP.
    """
    import torch
    from fairscale.internal import reduce_scatter_bucketer
    from fairscale.nn.data_parallel import fully_sharded_data_parallel as fsdp

    class NoStream:
        def wait_stream(self, stream):
            pass

        def synchronize(self):
            pass

    stream = NoStream()
    cuda = _View(
        torch.cuda,
        synchronize=lambda: None,
        current_stream=lambda: stream,
        stream=lambda stream: contextlib.nullcontext(),
    )
    fsdp.torch = _View(torch, cuda=cuda)
    fsdp._get_default_cuda_device = lambda module: torch.device("cpu")
    torch.Tensor.record_stream = lambda self, stream: None  # a method, so there is no other place
    stock = fsdp.FullyShardedDataParallel._setup_streams

    @functools.wraps(stock)
    def _setup_streams(self):
        stock(self)
        self._streams.update(dict.fromkeys(("fp32_to_fp16", "all_gather", "post_backward"), stream))

    def reduce_scatter(output, inputs, group):
        inputs = torch.stack(tuple(inputs))
        torch.distributed.all_reduce(inputs, group=group)
        output.copy_(inputs[torch.distributed.get_rank(group)].view_as(output))

    def reduce_scatter_base(output, flat, group):
        reduce_scatter(output, flat.view(group.size(), -1), group)

    fsdp.FullyShardedDataParallel._setup_streams = _setup_streams
    reduce_scatter_bucketer.dist = _View(
        torch.distributed,
        reduce_scatter=reduce_scatter,
        _reduce_scatter_base=reduce_scatter_base,
    )


def fp16_on_cpu() -> None:
    """Train with --fp16 on a CPU.

    Breaks: `--fp16` keeps its flat parameters under the current CUDA device and looks them up under
    the index of their own device, which is None for the CPU: no CUDA is an error, and `--cpu`
    beside a GPU trains nothing, silently. A gradient overflow, the normal way in which the loss
    scale is found, puts a zero on the GPU.
    Where: fairseq/optim/fp16_optimizer.py:38 and :119, fairseq/trainer.py:992.
    Ends: with a fairseq that uses the device of the parameters.
    """
    import torch
    from fairseq import trainer
    from fairseq.optim import fp16_optimizer

    class Zero(torch.Tensor):
        def cuda(self, *args, **kwargs):
            plain = self.as_subclass(torch.Tensor)
            return plain.cuda(*args, **kwargs) if torch.cuda.is_available() else plain

    def tensor(*args, **kwargs):
        return torch.tensor(*args, **kwargs).as_subclass(Zero)

    trainer.torch = _View(torch, tensor=tensor)  # trainer.py:992 is its one use of torch.tensor

    mixin = fp16_optimizer._FP16OptimizerMixin
    stock = mixin.build_fp32_params.__func__
    cuda = _View(torch.cuda)
    fp16_optimizer.torch = _View(torch, cuda=cuda)

    @functools.wraps(stock)
    def build_fp32_params(cls, args, params, flatten=True):
        params = list(params)
        cuda.current_device = lambda: params[0].device.index
        return stock(cls, args, params, flatten)

    mixin.build_fp32_params = classmethod(build_fp32_params)


def bf16_without_tpu() -> None:
    """Let `--bf16` and `--memory-efficient-bf16` mean a number format, not a TPU.

    Breaks: both flags on the command line set `tpu`, which wants torch_xla. (In YAML they do not.)
    Where: fairseq/options.py:201.
    Ends: with a fairseq that separates the two. `--tpu` itself still means a TPU.
    """
    from fairseq import options

    stock = options.parse_args_and_arch

    @functools.wraps(stock)
    def parse_args_and_arch(parser, input_args=None, parse_known=False, **kwargs):
        wants_tpu = "--tpu" in (sys.argv if input_args is None else input_args)
        try:
            result = stock(parser, input_args, parse_known, **kwargs)
        except ValueError as error:
            if not wants_tpu and "Cannot combine --fp16 and --tpu" in str(error):
                raise UserError("--fp16 and --bf16 are both given; choose one of them") from error
            raise
        args = result[0] if parse_known else result
        if getattr(args, "bf16", False) and not wants_tpu:
            args.tpu = False
        return result

    options.parse_args_and_arch = parse_args_and_arch


def validation_without_task() -> None:
    """Let `fairseq-validate` run without --task, whose task is that of the checkpoint.

    Breaks: `KeyError: None`, as its parser has no default task to ask for flags.
    Where: fairseq/options.py:42 and :158, fairseq_cli/validate.py:56.
    Ends: with a fairseq that has a default there.
    """
    from fairseq import options

    stock = options.get_validation_parser

    @functools.wraps(stock)
    def get_validation_parser(default_task=None):
        return stock(default_task or "language_modeling")

    options.get_validation_parser = get_validation_parser


def settings_of_old_checkpoints() -> None:
    """Read the flat settings of a checkpoint from before --use-plasma-view as if it were off.

    Breaks: the text `${common.use_plasma_view}` that stands for a missing value is taken for true,
    and every command that reads data by the checkpoint's settings (`fairseq-validate`) wants
    pyarrow (AssertionError).
    Where: fairseq/dataclass/utils.py:244, fairseq/tasks/language_modeling.py:105.
    Ends: with a fairseq that leaves missing values out.
    """
    from fairseq import checkpoint_utils

    stock = checkpoint_utils.convert_namespace_to_omegaconf

    @functools.wraps(stock)
    def convert_namespace_to_omegaconf(args):
        args.use_plasma_view = getattr(args, "use_plasma_view", False)
        return stock(args)

    checkpoint_utils.convert_namespace_to_omegaconf = convert_namespace_to_omegaconf


def resumed_patience() -> None:
    """Begin every job with a clean record of its best loss, and a resumed one with its own.

    Breaks: the best validation loss, and how many validations were no better, are kept on the
    functions save_checkpoint and should_stop_early. The second job of a process
    (`fairseq-hydra-train --multirun`) compares with the first's, saves no checkpoint_best.pt and
    may stop early; a resumed run counts --patience from 0. Checkpoints from before this patch have
    the best loss alone.
    Where: fairseq/checkpoint_utils.py:42 and :258, fairseq_cli/train.py:227.
    Ends: with a fairseq that keeps both in the trainer.
    """
    from fairseq import checkpoint_utils
    from fairseq.trainer import Trainer

    stock, save, load = (
        checkpoint_utils.load_checkpoint,
        Trainer.save_checkpoint,
        Trainer.load_checkpoint,
    )

    def record() -> dict:
        for name in ("fairseq_cli.train", "__main__"):
            stop = getattr(sys.modules.get(name), "should_stop_early", None)
            if stop is not None:
                return vars(stop)
        return {}

    @functools.wraps(stock)
    def load_checkpoint(cfg, trainer, **kwargs):
        vars(checkpoint_utils.save_checkpoint).pop("best", None)
        record().clear()
        return stock(cfg, trainer, **kwargs)

    @functools.wraps(save)
    def save_with_record(self, filename, extra_state):
        return save(self, filename, {**extra_state, "should_stop_early": dict(record())})

    @functools.wraps(load)
    def load_with_record(
        self,
        filename,
        reset_optimizer=False,
        reset_lr_scheduler=False,
        optimizer_overrides=None,
        reset_meters=False,
    ):
        state = load(
            self, filename, reset_optimizer, reset_lr_scheduler, optimizer_overrides, reset_meters
        )
        if state is not None and not reset_optimizer and not reset_meters:
            best = state.get("best")
            before = {} if best is None else {"best": best, "num_runs": 0}
            record().update(state.get("should_stop_early") or before)
        return state

    checkpoint_utils.load_checkpoint = load_checkpoint
    Trainer.save_checkpoint, Trainer.load_checkpoint = save_with_record, load_with_record


def processes_that_can_start() -> None:
    """Refuse a number of processes that fairseq cannot start, before it starts none.

    Breaks: fairseq starts one process per GPU. On CPU, `--distributed-world-size 2` with an init
    method starts none and exits with 0; without one, an AssertionError. NCCL needs GPUs.
    fairscale's FSDP on one process wants a module that fairscale 0.4.13 has no more, and GPUs
    where there are any.
    Where: fairseq/distributed/utils.py:143 and :346, fully_sharded_data_parallel.py:92.
    Ends: with a fairseq that says so.
    """
    import torch
    from fairseq.distributed import utils

    stock = utils.call_main

    @functools.wraps(stock)
    def call_main(cfg, main, **kwargs):
        settings = cfg.distributed_training
        gpus = torch.cuda.device_count()
        launched = {"MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"} <= set(os.environ)
        size = settings.distributed_world_size
        spawns = not (launched or settings.distributed_no_spawn or settings.distributed_port > 0)
        one_machine = settings.distributed_init_method is None
        alone = os.environ["WORLD_SIZE"] == "1" if launched else size == 1 and spawns
        trains = cfg.common_eval.path is None
        wants_fairscale = {
            "--ddp-backend fully_sharded": settings.ddp_backend == "fully_sharded",
            "--zero-sharding os": settings.zero_sharding == "os",
        }
        for flag, wanted in wants_fairscale.items():
            if wanted and importlib.util.find_spec("fairscale") is None:
                raise UserError(
                    f"{flag}: needs fairscale, which is not installed: pip install fairscale"
                )
        if settings.ddp_backend == "fully_sharded" and trains and alone:
            raise UserError(
                "--ddp-backend fully_sharded: one process has nothing to shard; use legacy_ddp, "
                "which goes on from the same checkpoints"
            )
        if settings.ddp_backend == "fully_sharded" and trains and cfg.common.cpu and gpus > 0:
            raise UserError(
                "--cpu with --ddp-backend fully_sharded: fairscale takes the GPUs that it sees; "
                "hide them (CUDA_VISIBLE_DEVICES=), or use legacy_ddp"
            )
        if cfg.common.tpu:
            pass
        elif spawns and size > 1 and (gpus == 0 or (one_machine and size > gpus)):
            raise UserError(
                f"--distributed-world-size {size}: fairseq starts one process per GPU, and there "
                f"are {gpus} here; on CPU, start them with `torchrun --nproc_per_node {size} "
                "$(which fairseq-train) ... --distributed-backend gloo`"
            )
        elif (launched or size > 1) and gpus == 0 and settings.distributed_backend == "nccl":
            raise UserError(
                "--distributed-backend nccl: needs GPUs, and there are none here; add "
                "--distributed-backend gloo"
            )
        return stock(cfg, main, **kwargs)

    utils.call_main = call_main


def processes_that_meet_and_part() -> None:
    """Say in one line why processes cannot meet, and give their waiting an end.

    Breaks: a --distributed-port in use, or a process that is missing, ends in a traceback. A
    process that no longer answers (a stopped machine, a broken network) is waited for by the others
    for torch's half hour on Gloo; --heartbeat-timeout interrupts Python, which does not reach them
    there. So it becomes the time after which every collective fails, too.
    Where: fairseq/distributed/utils.py:284.
    Ends: with a fairseq that hands a timeout on.
    """
    import torch.distributed
    from fairseq.distributed import utils

    stock = utils.distributed_init

    @functools.wraps(stock)
    def distributed_init(cfg):
        settings = getattr(cfg, "distributed_training", cfg)
        seconds = getattr(settings, "heartbeat_timeout", -1)
        limit = {"timeout": datetime.timedelta(seconds=seconds)} if seconds > 0 else {}
        start = functools.partial(torch.distributed.init_process_group, **limit)
        utils.dist = _View(torch.distributed, init_process_group=start)
        try:
            rank = stock(cfg)
            atexit.register(_part)
            return rank
        except RuntimeError as error:
            where = settings.distributed_init_method
            if where == "env://":
                where = "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
            if "EADDRINUSE" in str(error) or "address already in use" in str(error):
                raise UserError(
                    f"{where}: the port is in use; choose another with --distributed-port "
                    "(torchrun: --master_port), or end the run that has it"
                ) from error
            if isinstance(error, torch.distributed.DistError):
                raise UserError(
                    f"{where}: not all {settings.distributed_world_size} processes met there "
                    f"({_first_line(error)}); start them all, with the same address, port and "
                    "world size"
                ) from error
            raise
        finally:
            utils.dist = torch.distributed

    utils.distributed_init = distributed_init


def _part() -> None:
    """Let Gloo's threads finish before Python ends. One that lets go of a tensor after that asks
    for the interpreter's lock, and aborts a process that is done."""
    from torch import distributed

    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
        time.sleep(0.1)  # a model under DDP may keep them


_LOST = re.compile(  # what Gloo, NCCL and the meeting point say when a process has gone
    r"third_party/gloo|gloo/transport|Application timeout caused pair closure|"
    r"Connection closed by peer|ncclRemoteError|Watchdog caught collective operation timeout"
)


def _lost_process(error: BaseException) -> Optional[str]:
    """One line for a collective that failed as another process is gone or silent, else None."""
    if not isinstance(error, RuntimeError) or not _LOST.search(str(error)):
        return None
    cause = re.sub(r"^\[\S+\]\s*", "", _first_line(error)).split(". This is")[0]
    return (
        f"another process has stopped or no longer answers ({cause}): its own log says why; the "
        "same command goes on from the last checkpoint"
    )


def hydra_command() -> None:
    """Give configs of fairseq-hydra-train this package's folder, and its users one-line errors.

    `${fairseq_moe_ext.user_dir:}` in a YAML is the folder of this file: a plugin is known to
    fairseq by common.user_dir alone, also in the processes that it spawns, and a YAML cannot know
    where pip put it. The rest breaks as follows, each at the line named:
    - a misspelt --config-name is no error; stock's defaults run instead, since hydra_init stores
      them under whatever name is asked for (fairseq/dataclass/initialize.py:19);
    - a wrong key or value is told over several lines, or with a traceback, without its group and
      the keys that there are (fairseq/dataclass/utils.py:500, hydra/_internal/utils.py:218@1.3).
    Ends: never.
    """
    from fairseq.dataclass import initialize, utils
    from hydra._internal import utils as hydra_utils
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    stock_init, stock_merge = initialize.hydra_init, utils.merge_with_parent

    @functools.wraps(stock_init)
    def hydra_init(cfg_name="config"):
        command = sys.modules.get("fairseq_cli.hydra_train")  # else another program with Hydra
        if command is not None:
            _check_config_name(cfg_name)
            report, job = hydra_utils.run_and_report, command._hydra_main
            hydra_utils.run_and_report = lambda task: report(lambda: _exit_on_mistake(task))
            command._hydra_main = lambda cfg: _exit_on_mistake(lambda: job(cfg))
        stock_init(cfg_name)

    @functools.wraps(stock_merge)
    def merge_with_parent(dc, cfg, *args, **kwargs):
        group = cfg._key() if OmegaConf.is_config(cfg) else None
        if (
            group == "task"
            and "data" in cfg
            and (OmegaConf.is_missing(cfg, "data") or cfg.data in (None, ""))
        ):
            raise UserError("task.data is not set: add task.data=FOLDER, with your data-bin")
        try:
            return stock_merge(dc, cfg, *args, **kwargs)
        except OmegaConfBaseException as error:
            if not isinstance(group, str):
                raise
            raise UserError(f"{group}.{_describe_setting(error)}") from error

    hydra_utils.get_args_parser = _one_line_once(hydra_utils.get_args_parser)
    initialize.hydra_init = hydra_init
    utils.merge_with_parent = merge_with_parent
    folder = os.path.dirname(os.path.abspath(__file__))
    OmegaConf.register_new_resolver("fairseq_moe_ext.user_dir", lambda: folder, replace=True)


def _one_line_once(stock: Callable) -> Callable:
    """For hydra's parser, which fairseq_cli/hydra_train.py:80 asks twice, once in vain."""
    told = set()

    @functools.wraps(stock)
    def get_args_parser():
        parser = stock()

        def error(message):
            if message in told:
                parser.exit(2)
            told.add(message)
            OneLineParser.error(parser, message)

        parser.error = error
        return parser

    return get_args_parser


def _check_config_name(name: str) -> None:
    """Raise UserError if neither --config-dir nor fairseq's own folder has NAME.yaml."""
    import fairseq
    from hydra._internal.utils import get_args

    args = get_args()
    if args.config_path is not None:
        return
    folders = [os.path.join(os.path.dirname(fairseq.__file__), "config")]
    if args.config_dir is not None:
        if not os.path.isdir(args.config_dir):
            raise UserError(f"--config-dir {args.config_dir}: no such folder")
        folders.insert(0, args.config_dir)
    name = name[:-5] if name.endswith(".yaml") else name
    if not any(os.path.isfile(os.path.join(folder, name + ".yaml")) for folder in folders):
        there = sorted(file[:-5] for file in os.listdir(folders[0]) if file.endswith(".yaml"))
        raise UserError(f"--config-name {name}: not in {folders[0]}; there are {', '.join(there)}")


def _exit_on_mistake(task: Callable):
    """Run a Hydra job or sweep; end on a mistake in its settings with one line and status 1."""
    try:
        return task()
    except Exception as error:
        mistake = _mistake_to_print(error) or _hydra_mistake_to_print(error)
        if mistake is None:
            raise
    print(f"error: {mistake}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def _hydra_mistake_to_print(error: BaseException) -> Optional[str]:
    """What is wrong with the command line or the YAMLs; None if it is none, or for LOGLEVEL=DEBUG.

    Other errors of omegaconf are those of a programmer, who needs the traceback.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

    if os.environ.get("LOGLEVEL", "").upper() == "DEBUG":
        return None
    if isinstance(error, InterpolationResolutionError):
        return _describe_setting(error)
    if isinstance(error, ValueError) and "override must be" in str(error):
        return _in_one_line(str(error))
    if not isinstance(error, HydraException):
        return None
    if isinstance(error.__cause__, OmegaConfBaseException):
        return _describe_setting(error.__cause__)
    return _in_one_line(str(error))


def _describe_setting(error) -> str:
    """What omegaconf has against a key or its value: the key, and what there is to choose from."""
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and error.parent_node is not None:
        there = [str(key) for key in error.parent_node if key != "_name"]
        close = difflib.get_close_matches(str(error.key), there, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(there))}"
        return f"{error.full_key}: no such setting; {remedy}"
    return f"{error.full_key}: {_in_one_line(str(error.msg or error))}"


def _in_one_line(text: str) -> str:
    """Hydra's or omegaconf's message without its notes; the options that it lists get commas."""
    text = re.split(r"\n\s*(?:full_key|object_type|Config search path|See https)\b", text)[0]
    text = re.sub(r"\n\t", ", ", text.strip())
    return re.sub(r"\s*\n\s*", "; ", text).replace(":, ", ": ")


def one_line_errors() -> None:
    """End a command on a user's mistake with one line on stderr and status 1, no traceback.

    A mistake is a UserError anywhere in the chain of causes, or a FileNotFoundError of fairseq's
    own on top of it; LOGLEVEL=DEBUG keeps the traceback. A flag that argparse refuses is one, too
    (status 2). fairseq-hydra-train catches exceptions but lets SystemExit through;
    fairseq-generate and fairseq-preprocess do not use call_main, hence the excepthook, in
    fairseq's commands only.
    Where: fairseq/distributed/utils.py:334, fairseq/options.py:88.
    Ends: never.
    """
    from fairseq import options
    from fairseq.dataclass import utils as dataclass_utils
    from fairseq.distributed import utils

    stock = utils.call_main
    stock_hook = sys.excepthook

    @functools.wraps(stock)
    def call_main(cfg, main, **kwargs):
        try:
            if _is_hydras(main):
                _check_run(cfg)
            return stock(cfg, main, **kwargs)
        except (Exception, KeyboardInterrupt) as error:  # the latter by --heartbeat-timeout, too
            mistake = _mistake_to_print(error)
            if mistake is None:
                raise
        print(f"error: {mistake}", file=sys.stderr, flush=True)
        _end_at_once_where_others_wait()
        raise SystemExit(1)

    def excepthook(kind, error, trace):
        mistake = _mistake_to_print(error)
        if mistake is None:
            stock_hook(kind, error, trace)
        else:
            print(f"error: {mistake}", file=sys.stderr, flush=True)

    stock_parse = options.parse_args_and_arch

    @functools.wraps(stock_parse)
    def parse_args_and_arch(parser, *args, **kwargs):
        try:
            found = stock_parse(parser, *args, **kwargs)
            starting = sys.modules.get("fairseq_moe_ext.starting")  # where the plugin is in use
            if starting is not None:
                starting.check_command_line(found[0] if isinstance(found, tuple) else found)
            return found
        except UserError as error:
            mistake = str(error)
        except RuntimeError as error:  # fairseq/options.py:153
            if str(error):
                raise
            mistake = "--arch is not given: name an architecture (moe_lm_tiny, ...; flags: --help)"
        parser.exit(1, f"error: {mistake}\n")

    options.argparse = _View(argparse, ArgumentParser=OneLineParser)
    dataclass_utils.eval_str_list = _whole_lists(dataclass_utils.eval_str_list)
    options.parse_args_and_arch = parse_args_and_arch
    utils.call_main = call_main
    if os.path.basename(sys.argv[0] if sys.argv else "").startswith("fairseq-"):
        sys.excepthook = excepthook


def _whole_lists(stock: Callable) -> Callable:
    """fairseq/dataclass/utils.py:26 makes [1] of --update-freq 1.5."""

    @functools.wraps(stock)
    def eval_str_list(x, x_type=float):
        try:
            found = stock(x, x_type)
        except (SyntaxError, TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(f"{x!r} is no number or list of numbers") from error
        if x_type is int and found is not None and found != stock(x, float):
            raise argparse.ArgumentTypeError(f"{x!r} is no whole number or list of such")
        return found

    return eval_str_list


def _is_hydras(main: Callable) -> bool:
    """Whether it is what fairseq-hydra-train calls, as it is or wrapped."""
    hydras = getattr(sys.modules.get("fairseq_cli.hydra_train"), "pre_main", None)
    while isinstance(main, functools.partial) and main.args:
        main = main.args[0]
    return hydras is not None and inspect.unwrap(main) is inspect.unwrap(hydras)


def _check_run(cfg) -> None:
    """Raise UserError for settings of fairseq-hydra-train that cannot be, where the plugin is in
    use."""
    from fairseq import utils

    utils.import_user_module(cfg.common)  # as fairseq_cli/train.py:48 does first
    starting = sys.modules.get("fairseq_moe_ext.starting")
    if starting is not None:
        starting.check_run(cfg)


def _end_at_once_where_others_wait() -> None:
    """End one of many processes with status 1. Python's own end takes Gloo's threads down in the
    midst of an exchange, and they abort (terminate called without an active exception, 134)."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        logging.shutdown()
        sys.stdout.flush()
        os._exit(1)


def _mistake_to_print(error: BaseException) -> Optional[str]:
    """The user's mistake behind an exception, in one line; None if there is none or for DEBUG."""
    if os.environ.get("LOGLEVEL", "").upper() == "DEBUG":
        return None
    if isinstance(error, OSError):
        missing = _missing_file(error)
        if missing is not None:
            return missing
    # A process that fairseq spawned for a GPU reports its exception as text.
    if type(error).__name__ == "ProcessRaisedException":
        found = re.findall(r"^(?:[\w.]+\.UserError|FileNotFoundError): (.+)$", str(error), re.M)
        return found[-1] if found else None
    # fairseq_cli/score.py:42, though "--sys -" is fine
    absent = re.fullmatch(r"(?:System output|Reference) file (.+) does not exist", str(error))
    if absent and isinstance(error, AssertionError):
        return f"{absent[1]}: no such file (--sys, --ref)"
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    # fairseq/trainer.py:581 raises "Cannot load model parameters" over the one that knows why
    ours = [str(error) for error in chain if isinstance(error, UserError)]
    others = (_lost_process, _out_of_memory, _not_installed, _not_text, _said_by_fairseq)
    said = (tell(error) for error in chain for tell in others)
    return next(filter(None, [*ours, *said]), None)


def _out_of_memory(error: BaseException) -> Optional[str]:
    """One line where a tensor did not fit, else None."""
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    text = str(error)
    if not full and not (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in text):
        return None
    asked = re.search(r"tried to allocate ([\d.]+ \w+)", text, re.I)
    return (
        f"out of memory{f', {asked[1]} were asked for' if asked else ''}: lower --batch-size, "
        "--max-tokens or --tokens-per-sample, or take a smaller model"
    )


_PLAIN = (AssertionError, Exception, NotImplementedError, RuntimeError, TypeError, ValueError)


def _said_by_fairseq(error: BaseException) -> Optional[str]:
    """What a `raise` or `assert` in fairseq's own files says, in one line, and where; else None.

    These are fairseq's words for a user's mistake, as far as nothing of ours has better ones; an
    exception that Python or torch raises within fairseq keeps its traceback.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if "fairseq_moe_ext.starting" not in sys.modules or type(error) not in _PLAIN or not frames:
        return None  # without the plugin, fairseq is as it was
    last = frames[-1]
    found = re.search(r"\bsite-packages/(fairseq(_cli)?/.+)", last.filename)
    deliberate = isinstance(error, AssertionError) or (last.line or "").startswith("raise")
    if found is None or not deliberate:
        return None
    said = _in_one_line(str(error)) or str(last.line)
    said = said if len(said) < 400 else f"{said[:200]} ... {said[-200:]}"
    return f"{said} ({found[1]}:{last.lineno}; LOGLEVEL=DEBUG tells more)"


def _not_text(error: BaseException) -> Optional[str]:
    """One line for an --input of another encoding (fairseq_cli/interactive.py:45), else None."""
    if isinstance(error, UnicodeDecodeError):
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename.endswith("fileinput.py"):
                name = frame.f_locals["self"].filename()
                return f"{name}: not UTF-8 ({error.reason}); write it in that encoding"
    return None


def _not_installed(error: BaseException) -> Optional[str]:
    """What fairseq says of a package that a flag needs, else None."""
    wanted = isinstance(error, ImportError) and re.search(r"\binstall\b", str(error))
    return _first_line(error) if wanted else None


def _missing_file(error: OSError) -> Optional[str]:
    """A line on a file that fairseq does not find: what lies in its folder, or how to make it."""
    text = str(error)
    if text.startswith("Model file not found: "):  # fairseq/checkpoint_utils.py:423
        path = Path(text[len("Model file not found: ") :])
        return f"{path}: no such checkpoint; {_there_are(path.parent, '.pt')}"
    unfound = re.match(r"file (.+) not found$", text)
    if unfound:  # fairseq/file_utils.py:75
        return f"{unfound[1]}: no such file or folder"
    if not isinstance(error, FileNotFoundError):
        if error.filename is None:
            return None
        name = os.fsdecode(error.filename)
        shown = name if len(name) < 200 else f"{name[:100]}...{name[-20:]}"
        return f"{shown}: {error.strerror}"
    dataset = re.match(r"Dataset not found: .+ \((.+)\)$", text)
    if dataset:  # fairseq/tasks/language_modeling.py:219
        path = Path(dataset.group(1))
        return f"{path}.idx: no such data-bin; {_there_are(path.parent, '.idx')}"
    path = error.filename if error.filename is not None else text
    if os.path.basename(path) == "dict.txt":
        made = "a data folder is made by fairseq-preprocess or fairseq-moe prepare"
        return f"{path}: no such file; {made}"
    # fairseq/utils.py:481 says nothing but the --user-dir
    return text if error.filename is None and " " in text else f"{path}: no such file or folder"


def _there_are(folder: Path, suffix: str, shown: int = 5) -> str:
    """What a folder has of a kind."""
    names = sorted(path.name for path in folder.glob(f"*{suffix}"))
    if not names:
        return f"there is no *{suffix} in {folder}"
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{folder} has {', '.join(names[:shown])}{more}"


def _numpy_is(release: tuple) -> bool:
    import numpy

    return tuple(int(part) for part in numpy.__version__.split(".")[:2]) >= release


def _torch_is(release: tuple) -> bool:
    import torch

    return tuple(int(part) for part in torch.__version__.split(".")[:2]) >= release


def _no_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _new_resolvers() -> bool:
    import omegaconf

    return hasattr(omegaconf.OmegaConf, "register_new_resolver")  # omegaconf >= 2.1


def _always() -> bool:
    return True


# While fairseq is imported: quiet_warnings, and relaxed_dataclass_defaults on Python >= 3.11. Then,
# from top to bottom (the last one is outermost round call_main and sees the errors of the others):
PATCHES = (
    Patch(numpy_aliases, needed=lambda: _numpy_is((1, 24))),
    Patch(data_bins_beyond_2_gib, needed=lambda: _numpy_is((2, 0))),
    Patch(checked_data_bins, needed=_always),
    Patch(named_dictionaries, needed=_always),
    Patch(named_inputs, needed=_always),
    Patch(checkpoints_without_code, needed=_always),
    Patch(settings_without_code, needed=_always),
    Patch(whole_checkpoint_copies, needed=lambda: importlib.util.find_spec("iopath") is None),
    Patch(broadcast_of_objects, needed=lambda: _torch_is((2, 6))),
    Patch(gather_on_cpu, needed=_no_gpu),
    Patch(ddp_on_cpu, needed=_always),
    Patch(fsdp_on_cpu, needed=lambda: _no_gpu() and importlib.util.find_spec("fairscale")),
    Patch(fp16_on_cpu, needed=_always),
    Patch(bf16_without_tpu, needed=lambda: importlib.util.find_spec("torch_xla") is None),
    Patch(repeated_ngrams, needed=_always),
    Patch(prompts_with_ends, needed=_always),
    Patch(topk_of_a_small_dictionary, needed=_always),
    Patch(overlong_lines, needed=_always),
    Patch(validation_without_task, needed=_always),
    Patch(settings_of_old_checkpoints, needed=_always),
    Patch(resumed_patience, needed=_always),
    Patch(processes_that_can_start, needed=_always),
    Patch(processes_that_meet_and_part, needed=_always),
    Patch(plugin_by_itself, needed=lambda: _LOADED_BY_HOOK),
    Patch(hydra_command, needed=_new_resolvers),
    Patch(one_line_errors, needed=_always),
)
