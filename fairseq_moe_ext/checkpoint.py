"""Checkpoints of experts that are spread over processes, for any number of processes.

One process writes fairseq's single file, with all experts. Of W processes, rank 0 writes that file
without the experts, and each set of experts is written by one of the processes that hold it:

    checkpoint_last.pt             all but the experts, and "experts": the manifest
    experts/<save>-<first>-<count>.pt   count experts from `first` on, and their optimizer state

    manifest  {format, save, num_experts, world_size, code, indices, files: [{name, first, count,
              bytes}]}; `indices`: name of an experts' parameter -> its number in the optimizer
    file      {save, first, count, model: {name: tensor (count, ...)}, optimizer: {name: {...}}}

The name <save> is new for every save, so that files of two saves never mix, and the expert files
come first: a file checkpoint*.pt refers to nothing that is not whole on disk. Its copies
(checkpoint_best.pt) refer to the same expert files, which go when no *.pt of the folder refers to
them any more.

Wrappers of stock's functions, put in place by `apply()`. Each names the place in fairseq 0.12.2.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import itertools
import logging
import os
import re
import secrets
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils, utils
from fairseq.data import iterators
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from torch import Tensor

from . import fully_sharded
from .compat import load_weights_only
from .errors import UserError
from .expert_parallel import Placement, placement, process_count

logger = logging.getLogger(__name__)

FORMAT = 1
FOLDER = "experts"  # beside the checkpoints
_EXPERT_FILE = re.compile(r"\d+-\d+-[0-9a-f]{16}-\d+-\d+\.pt(\.tmp)?")
_EXPERT_PARAMETER = re.compile(r"\.experts\.fc[12]\.(weight|bias)$")

_saving: Optional[Trainer] = None  # while all processes save together
_loading: Optional[_Loading] = None  # while a trainer loads


class _Loading(NamedTuple):
    trainer: Trainer
    optimizer: bool  # its state is wanted


def apply() -> None:
    """Put the wrappers in place, once."""
    if hasattr(checkpoint_utils.save_checkpoint, "spreads_experts"):
        return
    _write_for_good()
    _save_experts_apart()
    _load_experts_of_this_process()
    _resume_trainers()
    _keep_the_place_in_the_data()
    checkpoint_utils.save_checkpoint.spreads_experts = True


# ---- Writing


def write(state: Dict[str, Any], path: str) -> int:
    """Write a file that is there either whole, after a loss of power too, or not at all.

    Returns its size in bytes. Raises UserError where it cannot be written; nothing is left then.
    """
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
            size = stream.tell()
        os.replace(temporary, path)
        sync_folder(os.path.dirname(path) or ".")
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        cause = _os_error_behind(error)
        if cause is None:
            raise
        raise _cannot_write(f"{path} ({_size_in_memory(state):,} bytes)", cause) from error
    return size


def _cannot_write(file: str, error: OSError) -> UserError:
    return UserError(
        f"{file} cannot be written ({error.strerror or error}); make room, or choose "
        "another --save-dir; the last complete checkpoint is as it was"
    )


def _os_error_behind(error: Optional[BaseException]) -> Optional[OSError]:
    """torch.save tells of a full disk as a RuntimeError on top of the OSError, or instead of it."""
    text = str(error)
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__ or error.__context__
    return OSError("writing failed") if "PytorchStreamWriter" in text else None


def _size_in_memory(state: Any) -> int:
    """Bytes of the tensors in a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(_size_in_memory, state.values()))
    return sum(map(_size_in_memory, state)) if isinstance(state, (list, tuple)) else 0


def sync_folder(folder: str) -> None:
    """Bring a renaming to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_for_good() -> None:
    """fairseq/checkpoint_utils.py:549 renames, but syncs nothing; and it is where rank 0 has the
    whole state in hand, from which the experts are taken out."""
    stock = checkpoint_utils.torch_persistent_save

    @functools.wraps(stock)
    def torch_persistent_save(obj, filename, async_write=False):
        if async_write or PathManager.path_requires_pathmanager(filename):
            return stock(obj, filename, async_write)
        if _saving is not None and _has_spread_experts(_saving):
            obj = _with_experts_apart(_saving, obj, filename)
        write(obj, filename)

    checkpoint_utils.torch_persistent_save = torch_persistent_save


# ---- Saving, together


def _save_experts_apart() -> None:
    """fairseq/checkpoint_utils.py:33 decides on rank 0 alone whether and under which names to
    save. The others wait for its word."""
    stock = checkpoint_utils.save_checkpoint

    @functools.wraps(stock)
    def save_checkpoint(cfg, trainer, epoch_itr, val_loss):
        def save():
            try:
                stock(cfg, trainer, epoch_itr, val_loss)
            except OSError as error:  # in copying or pruning
                raise _cannot_write(error.filename2 or cfg.save_dir, error) from error
            finally:
                if trainer.is_data_parallel_master and not cfg.no_save:
                    remove_unused_files(cfg.save_dir, trainer.checkpoint_suffix)

        global _saving
        if cfg.no_save or not _saves_together(trainer):
            return save()
        _saving = trainer
        try:
            if dist.get_rank() == 0:
                _lead(save)
            else:
                save()
                _follow(trainer, cfg.save_dir)
        finally:
            _saving = None

    checkpoint_utils.save_checkpoint = save_checkpoint
    _gather_what_is_sharded()
    _save_together_or_not_at_all()


def _gather_what_is_sharded() -> None:
    """All processes must take part in gathering a state that FSDP has sharded. fairseq/checkpoint_
    utils.py:51 has the others do so at every save, though rank 0 may have nothing to write, and
    then hangs. Here they wait for its word. What is saved tells nothing of FSDP."""
    stock = Trainer.state_dict

    @functools.wraps(stock)
    def state_dict(self):
        sharded = fully_sharded.is_sharded(self.get_model())
        if _saving is self and sharded and dist.get_rank() == 0:
            _broadcast(("gather", None))
        state = stock(self)
        state.pop("fsdp_metadata", None)
        return state

    Trainer.state_dict = state_dict
    Trainer.always_call_state_dict_during_save_checkpoint = False


def _save_together_or_not_at_all() -> None:
    """fairseq/trainer.py:860 has a process in which training fails write crash.pt. It has neither
    the experts of others nor what is sharded, and would wait for them to join the gathering."""

    def only_together(stock):
        @functools.wraps(stock)
        def method(self, *args):
            if _saving is self or not _saves_together(self):
                stock(self, *args)

        return method

    Trainer.consolidate_optimizer = only_together(Trainer.consolidate_optimizer)
    Trainer.save_checkpoint = only_together(Trainer.save_checkpoint)


def _lead(save: Callable[[], None]) -> None:
    """Rank 0's part of a save: the others learn how it ended, whatever happened."""
    try:
        save()
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # where a process is gone, this one fails as well
            _broadcast(("failed", str(error)))
        raise
    _broadcast(("done", None))


def _follow(trainer: Trainer, save_dir: str) -> None:
    """The part of the other ranks."""
    while True:
        word, value = _broadcast(None)
        if word == "gather":
            trainer.state_dict()
        elif word == "write":
            _write_own_experts(trainer, save_dir, value)
        elif word == "failed":
            raise UserError(value)
        else:
            return


def _with_experts_apart(trainer: Trainer, state: Dict[str, Any], filename: str) -> Dict[str, Any]:
    """On rank 0: have the experts written, and replace them in the state by the manifest."""
    history = state["optimizer_history"][-1]
    epoch = state["extra_state"]["train_iterator"]["epoch"]
    save = f"{epoch}-{history['num_updates']}-{secrets.token_hex(8)}"
    _broadcast(("write", save))
    files = _write_own_experts(trainer, os.path.dirname(filename), save)
    indices = _expert_indices(trainer)
    optimizer = state.get("last_optimizer_state")
    if optimizer is not None:
        kept = {i: s for i, s in optimizer["state"].items() if i not in set(indices.values())}
        optimizer = {**optimizer, "state": kept}
        state = {**state, "last_optimizer_state": optimizer}
    return {
        **state,
        "model": {n: t for n, t in state["model"].items() if not _is_expert(n)},
        "experts": {
            "format": FORMAT,
            "save": save,
            "num_experts": trainer.cfg.model.moe_expert_count,
            "world_size": process_count(),
            "code": code_version(),
            "indices": indices,
            "files": files,
        },
    }


def _write_own_experts(trainer: Trainer, save_dir: str, save: str) -> List[Dict[str, Any]]:
    """On all ranks at once. Returns the manifest's list of files; raises UserError, on rank 0 only
    as the others hear it from there, if one could not be written."""
    place = placement(trainer.cfg.model.moe_expert_count, process_count(), dist.get_rank())
    entry, failure = None, None
    if dist.get_rank() == place.replicas[0]:
        name = f"{FOLDER}/{save}-{place.first}-{place.local}.pt"
        try:
            os.makedirs(os.path.join(save_dir, FOLDER), exist_ok=True)
            content = {"save": save, "first": place.first, "count": place.local}
            content.update(_own_experts(trainer))
            size = write(content, os.path.join(save_dir, name))
            entry = {"name": name, "first": place.first, "count": place.local, "bytes": size}
        except Exception as error:
            if not isinstance(error, UserError):
                logger.exception("writing experts failed")
            failure = str(error)
    outcomes = _all_gather((entry, failure))
    failures = [failure for _, failure in outcomes if failure is not None]
    if failures and dist.get_rank() == 0:
        raise UserError(failures[0])
    return sorted((entry for entry, _ in outcomes if entry), key=lambda entry: entry["first"])


def _own_experts(trainer: Trainer) -> Dict[str, Any]:
    """The parameters of this process's experts and their optimizer state, on the CPU."""
    places = fully_sharded.places(trainer.get_model())
    own = {name: place.parameter for name, place in places.items() if _is_expert(name)}
    state = {"model": {n: p.detach() for n, p in own.items()}, "optimizer": {}}
    if not trainer.cfg.checkpoint.no_save_optimizer_state:
        saved = trainer.optimizer.state_dict()["state"]
        numbers = fully_sharded.optimizer_numbers(trainer.get_model())
        state["optimizer"] = {n: saved[numbers[p]] for n, p in own.items() if numbers[p] in saved}
    return utils.move_to_cpu(state)


def _expert_indices(trainer: Trainer) -> Dict[str, int]:
    """Name of each parameter of experts -> its number in a saved state of the optimizer, which gets
    the parameters in this order (fairseq/trainer.py:271) unless they are sharded."""
    names = _trained_parameters(trainer)
    return {name: i for i, name in enumerate(names) if _is_expert(name)}


def _trained_parameters(trainer: Trainer) -> List[str]:
    places = fully_sharded.places(trainer.get_model())
    parameters = itertools.chain(
        ((name, place.parameter) for name, place in places.items()),
        trainer.get_criterion().named_parameters(),
    )
    return [name for name, parameter in parameters if parameter.requires_grad]


def _is_expert(name: str) -> bool:
    return _EXPERT_PARAMETER.search(name) is not None


def _saves_together(trainer: Trainer) -> bool:
    """Whether all processes take part in saving, and each reads what is loaded."""
    sharded = fully_sharded.is_sharded(trainer.get_model())
    return _has_spread_experts(trainer) or (process_count() > 1 and sharded)


def _has_spread_experts(trainer: Trainer) -> bool:
    return process_count() > 1 and getattr(trainer.get_model(), "has_experts", False)


# ---- Removing


def remove_unused_files(save_dir: str, suffix: str = "") -> None:
    """Remove the expert files of a folder that none of its checkpoints refers to, and what killed
    processes have left. Where a checkpoint cannot be read, all expert files stay.

    Args:
        suffix: of the checkpoints that this process writes (--checkpoint-suffix, FSDP's shards).
    """
    for path in glob.glob(os.path.join(glob.escape(save_dir), f"checkpoint*{suffix}.pt.tmp")):
        _remove(path)
    folder = os.path.join(save_dir, FOLDER)
    if not os.path.isdir(folder):
        return
    used = set()
    for path in glob.glob(os.path.join(glob.escape(save_dir), "*.pt")):
        try:
            status = os.stat(path)
            used.update(_files_of(path, status.st_ino, status.st_mtime_ns, status.st_size))
        except Exception as error:
            logger.warning(f"{path} cannot be read, so no file of {folder} is removed: {error}")
            return
    for name in os.listdir(folder):
        if _EXPERT_FILE.fullmatch(name) and f"{FOLDER}/{name}" not in used:
            _remove(os.path.join(folder, name))


@functools.lru_cache(maxsize=1024)
def _files_of(path: str, *identity: int) -> Tuple[str, ...]:
    """Names of the expert files that a checkpoint refers to; it is mapped, not read whole."""
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return tuple(file["name"] for file in state.get("experts", {}).get("files", ()))


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)


# ---- Loading


class Piece(NamedTuple):
    """Some experts, as one file has them; the tensors are mapped."""

    first: int
    count: int
    model: Dict[str, Tensor]  # (count, ...)
    optimizer: Dict[str, Dict[str, Any]]  # by parameter; {} where none was saved


def _load_experts_of_this_process() -> None:
    """fairseq/checkpoint_utils.py:281 is the one way to all checkpoints: of trainers, fairseq-eval-
    lm, from_pretrained. What it returns has this process's experts, whoever wrote them."""
    stock = checkpoint_utils.load_checkpoint_to_cpu
    read = checkpoint_utils.torch.load  # compat's, with its messages

    def read_mapped(file, map_location=None):
        try:
            return torch.load(file.name, map_location=map_location, mmap=True, weights_only=True)
        except Exception:  # of an old format, or not a checkpoint: `read` knows
            return read(file, map_location=map_location)

    @functools.wraps(stock)
    def load_checkpoint_to_cpu(path, *args, **kwargs):
        together = _loading is not None and _saves_together(_loading.trainer)
        with _same_error_on_all_ranks() if together else contextlib.nullcontext():
            return _with_own_experts(path, stock(path, *args, **kwargs))

    checkpoint_utils.torch.load = read_mapped
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu


def _with_own_experts(path: str, state: Dict[str, Any]) -> Dict[str, Any]:
    """The state of a checkpoint, of which the tensors are mapped -> that of this process. Only the
    tensors of the model are mapped there, which are copied anyhow: who kept one would keep the
    space of a file that is removed."""
    kept = {"model", "last_optimizer_state"}
    state = {key: value if key in kept else _copy(value) for key, value in state.items()}
    manifest = state.get("experts")
    optimizer = state.get("last_optimizer_state")
    wanted = optimizer is not None and _loading is not None and _loading.optimizer
    copy = _copy
    if wanted and fully_sharded.is_sharded(_loading.trainer.get_model()):
        copy = _itself  # FSDP copies the pieces that it takes
    rank = dist.get_rank() if process_count() > 1 else 0
    if manifest is not None:
        num_experts, indices = manifest["num_experts"], manifest["indices"]
        place = placement(num_experts, process_count(), rank)
        pieces = open_pieces(path, manifest, place)
    else:
        whole = {name: value for name, value in state["model"].items() if _is_expert(name)}
        if process_count() == 1 or not whole:
            return {**state, "last_optimizer_state": copy(optimizer)} if wanted else state
        num_experts = len(next(iter(whole.values())))
        place = placement(num_experts, process_count(), rank)
        indices = _indices_in(optimizer, path) if wanted else {}
        saved = optimizer["state"] if wanted else {}
        by_name = {name: saved[i] for name, i in indices.items() if i in saved}
        pieces = [Piece(0, num_experts, whole, by_name)]
    model = {n: t for n, t in state["model"].items() if not _is_expert(n)}
    for name in pieces[0].model:
        model[name] = _rows(place, [(piece, piece.model[name]) for piece in pieces])
    state = {**state, "model": model}
    if wanted:
        own = {i: s for i, s in optimizer["state"].items() if i not in set(indices.values())}
        own = copy(own)
        for name in pieces[0].optimizer:
            own[indices[name]] = _own_optimizer_state(path, place, name, pieces)
        state["last_optimizer_state"] = {**optimizer, "state": own}
    elif optimizer is not None:
        del state["last_optimizer_state"]  # nobody wants it, and the experts' is not there
    return state


def open_pieces(path: str, manifest: Dict[str, Any], place: Placement) -> List[Piece]:
    """The expert files that hold experts of this process."""
    if manifest["format"] > FORMAT:
        raise UserError(
            f"{path}: of format {manifest['format']}, and this fairseq_moe_ext reads {FORMAT} at "
            "most: install the version that wrote it"
        )
    folder = os.path.dirname(os.path.realpath(path))
    end = place.first + place.local
    return [
        _open_piece(path, folder, file, manifest["save"])
        for file in manifest["files"]
        if file["first"] < end and place.first < file["first"] + file["count"]
    ]


def _open_piece(path: str, folder: str, file: Dict[str, Any], save: str) -> Piece:
    name = os.path.join(folder, *file["name"].split("/"))
    if not os.path.isfile(name):
        raise UserError(
            f"{name}: missing; it holds experts {file['first']} to "
            f"{file['first'] + file['count'] - 1} of {path}: copy the folder {FOLDER} with the "
            "checkpoint, or load another one"
        )
    size = os.path.getsize(name)
    if size != file["bytes"]:
        raise UserError(
            f"{name}: {size:,} bytes, expected {file['bytes']:,} by {path}; it is truncated or of "
            "another run: copy it again, or load another checkpoint"
        )
    try:
        state = load_weights_only(name, map_location="cpu", mmap=True)
        found = state["save"], state["first"], state["count"]
        piece = Piece(state["first"], state["count"], state["model"], state["optimizer"])
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name}: damaged or not a file of experts ({str(error).splitlines()[0]}); copy it "
            "again, or load another checkpoint"
        ) from error
    if found != (save, file["first"], file["count"]):
        raise UserError(
            f"{name}: of save {found[0]}, but {path} is of save {save}: files of two runs are "
            f"mixed; copy a checkpoint and its folder {FOLDER} together"
        )
    return piece


def _rows(place: Placement, parts: List[Tuple[Piece, Tensor]]) -> Tensor:
    """Rows of this process out of tensors (count, ...) of some files -> (local, ...), in memory of
    its own."""
    end = place.first + place.local
    rows = [
        tensor[max(place.first - piece.first, 0) : max(end - piece.first, 0)]
        for piece, tensor in parts
    ]
    return torch.cat(rows)


def _own_optimizer_state(
    path: str, place: Placement, name: str, pieces: List[Piece]
) -> Dict[str, Any]:
    """What the optimizer remembers of a parameter of experts."""
    states = [piece.optimizer[name] for piece in pieces]
    same_experts = len(pieces) == 1 and pieces[0].count == place.local
    own = {}
    for key, value in states[0].items():
        if isinstance(value, Tensor) and value.shape == pieces[0].model[name].shape:
            own[key] = _rows(place, [(piece, s[key]) for piece, s in zip(pieces, states)])
        elif not isinstance(value, Tensor) or value.numel() == 1 or same_experts:
            own[key] = _copy(value)
        else:
            raise UserError(
                f"{path}: the optimizer's {key} of {name} joins several experts and cannot be "
                "spread over another number of processes: use as many as wrote it, or "
                "--reset-optimizer"
            )
    return own


def _indices_in(optimizer: Dict[str, Any], path: str) -> Dict[str, int]:
    """As `_expert_indices`, for the state in a single file, which does not say."""
    names = _trained_parameters(_loading.trainer)
    saved = sum(len(group["params"]) for group in optimizer["param_groups"])
    if saved != len(names):
        raise UserError(
            f"{path}: its optimizer state is of {saved} tensors, the model has {len(names)} "
            "parameters (--fp16 on one process joins them all into one), so it cannot be spread "
            f"over {process_count()} processes: add --reset-optimizer"
        )
    return _expert_indices(_loading.trainer)


def _itself(state: Any) -> Any:
    return state


def _copy(state: Any) -> Any:
    """Tensors that were mapped, in memory of their own."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return type(state)(map(_copy, state)) if type(state) in (list, tuple) else state


# ---- Trainers that load


def _resume_trainers() -> None:
    """fairseq/trainer.py:449 loads on rank 0 and sends the state round; experts differ."""
    stock = Trainer.load_checkpoint

    @functools.wraps(stock)
    def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
        global _loading
        settings = self.cfg.checkpoint
        on_all_ranks = settings.load_checkpoint_on_all_dp_ranks
        if fully_sharded.is_sharded(self.get_model()):
            _refuse_optimizers_that_join_numbers(self)
        if _saves_together(self):
            _refuse_what_cannot_be_saved(self.cfg)
            _check_ranks(filename)
            settings.load_checkpoint_on_all_dp_ranks = True
        _loading = _Loading(self, not reset_optimizer)
        try:
            return stock(self, filename, reset_optimizer, *args, **kwargs)
        except (AssertionError, ValueError) as error:
            text = str(error)
            if "please reset the optimizer" in text:  # fairseq/trainer.py:580
                raise UserError(f"{filename}: {text}") from error
            if "optimizer" in text and "parameter group" in text:  # torch.optim.Optimizer
                raise UserError(
                    f"{filename}: its optimizer state does not fit ({text}): use the precision "
                    "flags (--fp16 and the like) that wrote it, or add --reset-optimizer"
                ) from error
            raise
        finally:
            _loading = None
            settings.load_checkpoint_on_all_dp_ranks = on_all_ranks

    Trainer.load_checkpoint = load_checkpoint


def _refuse_what_cannot_be_saved(cfg: Any) -> None:
    """Raises UserError, when training starts, for settings under which experts of several processes
    would be saved or trained wrong."""
    refused = {
        "--store-ema": cfg.ema.store_ema,
        "--write-checkpoints-asynchronously": cfg.checkpoint.write_checkpoints_asynchronously,
        "--zero-sharding os": cfg.distributed_training.zero_sharding == "os",
        "--use-bmuf": cfg.optimization.use_bmuf,
        "--optimizer composite": getattr(cfg.optimizer, "_name", None) == "composite",
    }
    for flag, given in refused.items():
        if given:
            raise UserError(
                f"{flag}: not for experts on {process_count()} processes; drop it, or train on one"
            )


def _refuse_optimizers_that_join_numbers(trainer: Trainer) -> None:
    """Raises UserError for optimizers that need parameters whole (fairseq/trainer.py:336)."""
    try:
        trainer.optimizer  # noqa: B018 - is built now
    except AssertionError as error:
        raise UserError(
            f"--optimizer {trainer.cfg.optimizer._name}: --ddp-backend fully_sharded gives it "
            "pieces of parameters, and it needs them whole: use adam or sgd, or pytorch_ddp"
        ) from error


def _check_ranks(filename: str) -> None:
    """All ranks must run the same code and see the same checkpoint."""
    check_code_versions()
    seen = _all_gather(os.path.isfile(filename))
    for rank, there in enumerate(seen):
        if there != seen[0]:
            seeing, blind = (0, rank) if seen[0] else (rank, 0)
            raise UserError(
                f"{filename}: process {seeing} sees it, process {blind} does not; --save-dir and "
                "--restore-file must be on a file system that all machines share"
            )


def check_code_versions() -> None:
    """Raises UserError, on all ranks, if they do not run the same code."""
    codes = _all_gather(code_version())
    for rank, code in enumerate(codes):
        if code != codes[0]:
            raise UserError(
                f"process {rank} runs {code}, process 0 {codes[0]}: install the same version on "
                "all machines"
            )


@functools.cache
def code_version() -> str:
    """What tells two versions of this package apart, and of torch."""
    folder = os.path.dirname(os.path.abspath(__file__))
    digest = hashlib.sha256()
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "**", "*.py"), recursive=True)):
        with open(path, "rb") as stream:
            digest.update(stream.read())
    return f"fairseq_moe_ext {digest.hexdigest()[:12]} with torch {torch.__version__}"


# ---- The place in the data


def _keep_the_place_in_the_data() -> None:
    """fairseq/data/iterators.py:431 counts the batches of one process. On another number of
    processes, or with another batch size, the run goes on behind the sentences that all have
    seen; where no number of updates ends there, a few are seen twice."""
    stock_save = iterators.EpochBatchIterator.state_dict
    stock_load = iterators.EpochBatchIterator.load_state_dict

    @functools.wraps(stock_save)
    def state_dict(self):
        state = stock_save(self)
        batches = state["iterations_in_epoch"] * self.num_shards
        sentences = sum(map(len, self.frozen_batches[:batches])) if batches else 0
        place = {"batches": batches, "of": len(self.frozen_batches), "sentences": sentences}
        return {**state, "all_processes": place}

    @functools.wraps(stock_load)
    def load_state_dict(self, state):
        place = state.get("all_processes")
        if place is not None and place["batches"] > 0:
            self.epoch = state["epoch"]  # some samplers make the batches of an epoch
            batches = place["batches"]
            if place["of"] != len(self.frozen_batches):
                ends = itertools.accumulate(map(len, self.frozen_batches))
                batches = sum(1 for _ in itertools.takewhile(place["sentences"].__ge__, ends))
            state = {**state, "iterations_in_epoch": batches // self.num_shards}
        stock_load(self, state)

    iterators.EpochBatchIterator.state_dict = state_dict
    iterators.EpochBatchIterator.load_state_dict = load_state_dict


# ---- Talking


def _broadcast(word: Any) -> Any:
    """Rank 0's word, on all ranks."""
    box = [word]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _all_gather(value: Any) -> List[Any]:
    values = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def _same_error_on_all_ranks() -> Iterator[None]:
    """What fails on one rank fails on all, so that none waits for it."""
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    texts = [text for text in _all_gather(failure and str(failure)) if text is not None]
    if failure is not None and not isinstance(failure, UserError):
        raise failure
    if texts:
        raise UserError(texts[0])
