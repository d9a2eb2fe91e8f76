"""The files of a checkpoint as the experts of this process, whoever wrote them."""

from __future__ import annotations

import contextlib
import os
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import torch
from fairseq.trainer import Trainer
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from fairseq_today.torch_today import load_weights_only

from .. import context, files, fully_sharded
from ..errors import UserError
from ..expert_parallel import Placement, is_expert, placement, process_count, process_rank
from .collective import same_error_on_all_ranks
from .experts import expert_indices, saves_together, trained_parameters
from .format import FOLDER, ExpertFile, Manifest, Piece, is_piece
from .intact import check_digest, check_records
from .settings import check_buildable, check_settings


def read_mapped(file: Any, map_location: Any = None) -> Any:
    """What a file holds, checked. Replaces torch.load in fairseq/checkpoint_utils.py."""
    under_way, building = context.loading.get(), context.building.get()
    together = under_way is not None and saves_together(under_way.trainer)
    if not together or process_rank() == 0:
        check_records(file.name)
    state = load_weights_only(file.name, map_location=map_location, mmap=True)
    check_kind(file.name, state)
    check_settings(file.name, state)
    if building is not None:
        check_buildable(file.name, state, with_task=building.with_task)
    return state


def load(stock: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
    """What fairseq's load_checkpoint_to_cpu, `stock`, makes of a file, with this process's experts,
    whoever wrote them."""
    refuse_folder(path)
    under_way = context.loading.get()
    together = under_way is not None and saves_together(under_way.trainer)
    with same_error_on_all_ranks() if together else contextlib.nullcontext():
        state = _with_own_experts(path, _with_settings(path, stock, *args, **kwargs))
    if under_way is not None and under_way.optimizer:
        _name_the_optimizer_as_here(state, under_way.trainer)
    return state


def _with_settings(path: str, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A state with its settings as omegaconf's; UserError if they cannot be."""
    try:
        return stock(path, *args, **kwargs)
    except (HydraException, OmegaConfBaseException, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: its settings cannot be read ({str(error).splitlines()[0]}): it is damaged or "
            "of another version of fairseq"
        ) from error


def _name_the_optimizer_as_here(state: Dict[str, Any], trainer: Trainer) -> None:
    """With --bf16 fairseq's FP16Optimizer keeps float32 parameters for an optimizer, and its state
    is that of the optimizer; FSDP has them itself, and the optimizer no wrapper. A run goes on with
    either, though fairseq/trainer.py:597@0.12.2 compares names."""
    history = state.get("optimizer_history")
    if not history or state.get("last_optimizer_state") is None:
        return
    saved, own, wrapper = history[-1]["optimizer_name"], trainer.optimizer, "FP16Optimizer"
    if type(own).__name__ == wrapper and trainer.cfg.common.bf16:
        same = saved == type(own.fp32_optimizer).__name__
    else:
        kind = getattr((state.get("cfg") or {}).get("optimizer"), "_name", None)
        same = saved == wrapper and kind == trainer.cfg.optimizer._name
        same = same and fully_sharded.is_sharded(trainer.get_model())
    if same:
        history[-1] = {**history[-1], "optimizer_name": type(own).__name__}


def refuse_folder(path: str) -> None:
    """Raise UserError for a folder, FIFO, ... where a checkpoint is wanted."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; name a checkpoint in it, *.pt")
    if os.path.exists(path):
        files.check(path)


def check_kind(path: str, state: Any) -> None:
    """Raise UserError for what is no checkpoint, or a part of one."""
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path}: not a checkpoint of fairseq: there is no model in it")
    if is_piece(state):
        raise UserError(
            f"{path}: holds experts alone; name the checkpoint beside the folder {FOLDER}"
        )


def _with_own_experts(path: str, state: Dict[str, Any]) -> Dict[str, Any]:
    """The state of a checkpoint, of which the tensors are mapped -> that of this process. Only the
    tensors of the model are mapped there, which are copied anyhow: who kept one would keep the
    space of a file that is removed."""
    kept = {"model", "last_optimizer_state"}
    state = {key: value if key in kept else _copy(value) for key, value in state.items()}
    manifest = Manifest.read(path, state)
    optimizer = state.get("last_optimizer_state")
    trainer = _trainer_that_wants_optimizer() if optimizer is not None else None
    copy = _copy
    if trainer is not None and fully_sharded.is_sharded(trainer.get_model()):
        copy = _itself  # FSDP copies the pieces that it takes
    if manifest is not None:
        indices = manifest.indices
        place = placement(manifest.num_experts, process_count(), process_rank())
        pieces = open_pieces(path, manifest, place)
    else:
        whole = {name: value for name, value in state["model"].items() if is_expert(name)}
        if process_count() == 1 or not whole:
            return {**state, "last_optimizer_state": copy(optimizer)} if trainer else state
        num_experts = len(next(iter(whole.values())))
        place = placement(num_experts, process_count(), process_rank())
        indices, saved = {}, {}
        if optimizer is not None and trainer is not None:
            indices, saved = _indices_in(optimizer, path, trainer), optimizer["state"]
        by_name = {name: saved[i] for name, i in indices.items() if i in saved}
        pieces = [Piece("", 0, num_experts, whole, by_name)]
    model = {n: t for n, t in state["model"].items() if not is_expert(n)}
    for name in pieces[0].model:
        model[name] = _rows(place, [(piece, piece.model[name]) for piece in pieces])
    state = {**state, "model": model}
    if optimizer is None:
        return state
    if trainer is not None:
        own = {i: s for i, s in optimizer["state"].items() if i not in set(indices.values())}
        check_optimizer_parts(
            path, pieces, indices if optimizer["state"] else (), "--reset-optimizer"
        )
        own = copy(own)
        for name in pieces[0].optimizer:
            own[indices[name]] = _own_optimizer_state(path, place, name, pieces)
        state["last_optimizer_state"] = {**optimizer, "state": own}
    else:
        del state["last_optimizer_state"]  # it lacks the experts' part
    return state


def _trainer_that_wants_optimizer() -> Optional[Trainer]:
    loading = context.loading.get()
    return loading.trainer if loading is not None and loading.optimizer else None


def open_pieces(path: str, manifest: Manifest, place: Placement) -> List[Piece]:
    """The expert files that hold experts of this process."""
    end = place.first + place.local
    return [
        # each file is checked by one process, that of its first expert
        _open_piece(path, file, manifest.save, place.first <= file.first)
        for file in manifest.files
        if file.first < end and place.first < file.end
    ]


def _open_piece(path: str, file: ExpertFile, save: str, check: bool) -> Piece:
    """A file of experts; its tensors are mapped."""
    name = file.path(path)
    if not os.path.isfile(name):
        raise UserError(
            f"{name}: missing; it holds experts {file.first} to {file.end - 1} of {path}: copy the "
            f"folder {FOLDER} with the checkpoint, or load another one"
        )
    size = os.path.getsize(name)
    if size != file.bytes:
        raise UserError(
            f"{name}: {size:,} bytes, expected {file.bytes:,} by {path}; it is truncated or of "
            "another run: copy it again, or load another checkpoint"
        )
    try:
        piece = Piece.read(load_weights_only(name, map_location="cpu", mmap=True))
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"{name}: damaged or not a file of experts ({str(error).splitlines()[0]}); copy it "
            "again, or load another checkpoint"
        ) from error
    if (piece.save, piece.first, piece.count) != (save, file.first, file.count):
        raise UserError(
            f"{name}: of save {piece.save}, but {path} is of save {save}: files of two runs are "
            f"mixed; copy a checkpoint and its folder {FOLDER} together"
        )
    # after what says more of a file of another run, or with code in it
    if check and file.sha256 is not None:
        check_digest(name, file.sha256, path)
    elif check:
        check_records(name)
    return piece


def check_optimizer_parts(path: str, pieces: List[Piece], names: Iterable[str], flag: str) -> None:
    """Raise UserError where a file lacks what the optimizer remembers of its experts, though others
    have theirs, or the rest of the model, of which `names` are the experts' parameters, has."""
    wanted = set(names).union(*(piece.optimizer for piece in pieces))
    for piece in pieces:
        missing = sorted(wanted - piece.optimizer.keys())
        if missing:
            raise UserError(
                f"{path}: the optimizer state of {missing[0]} is missing for experts {piece.first} "
                f"to {piece.first + piece.count - 1}, and is there for others: copy the checkpoint "
                f"again, or add {flag} to go on with none"
            )


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
        of_each = [
            isinstance(s.get(key), Tensor) and s[key].shape == piece.model[name].shape
            for piece, s in zip(pieces, states)
        ]
        if all(of_each):
            own[key] = _rows(place, [(piece, s[key]) for piece, s in zip(pieces, states)])
        elif not isinstance(value, Tensor) or value.numel() == 1 or same_experts:
            own[key] = _copy(value)
        else:
            raise UserError(
                f"{path}: the optimizer's {key} of {name} joins several experts, or is damaged, "
                "and cannot be spread over another number of processes: use as many as wrote it, "
                "or --reset-optimizer"
            )
    return own


def _indices_in(optimizer: Dict[str, Any], path: str, trainer: Trainer) -> Dict[str, int]:
    """As `expert_indices`, for the state in a single file, which does not say."""
    names = trained_parameters(trainer)
    saved = sum(len(group["params"]) for group in optimizer["param_groups"])
    if saved != len(names):
        raise UserError(
            f"{path}: its optimizer state is of {saved} tensors, the model has {len(names)} "
            "parameters (--fp16 on one process joins them all into one), so it cannot be spread "
            f"over {process_count()} processes: add --reset-optimizer"
        )
    return expert_indices(trainer)


def _itself(state: Any) -> Any:
    return state


def _copy(state: Any) -> Any:
    """Tensors that were mapped, in memory of their own."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return type(state)(map(_copy, state)) if type(state) in (list, tuple) else state
