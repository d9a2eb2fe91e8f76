"""Loads a checkpoint with the experts of this process, however many processes wrote it."""

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
from ..expert_parallel import (
    Placement,
    all_gather,
    is_expert,
    placement,
    process_count,
    process_rank,
)
from ..models.precision import has_own_bfloat16
from .collective import same_error_on_all_ranks
from .experts import expert_indices, saves_together, trained_parameters
from .format import FOLDER, ExpertFile, Manifest, Piece, check_kind, save_of
from .intact import check_digest, check_records
from .settings import check_buildable, check_settings, drop_unknown


def read_mapped(file: Any, map_location: Any = None) -> Any:
    """What a file holds, checked, as far as this version knows its settings. Replaces torch.load in
    fairseq/checkpoint_utils.py."""
    under_way, building = context.loading.get(), context.building.get()
    together = under_way is not None and saves_together(under_way.trainer)
    if not together or process_rank() == 0:
        check_records(file.name)
    state = load_weights_only(file.name, map_location=map_location, mmap=True)
    check_kind(file.name, state)
    check_settings(file.name, state)
    if building is not None:
        check_buildable(file.name, state, with_task=building.with_task)
    drop_unknown(file.name, state)
    return state


def load(stock: Callable[..., Any], path: str, *args: Any, **kwargs: Any) -> Dict[str, Any]:
    """The state that fairseq's load_checkpoint_to_cpu, `stock`, loads, with this process's
    experts."""
    refuse_folder(path)
    under_way = context.loading.get()
    together = under_way is not None and saves_together(under_way.trainer)
    with same_error_on_all_ranks() if together else contextlib.nullcontext():
        state = _with_own_experts(path, _with_settings(path, stock, *args, **kwargs))
    # A trainer without them reads on one rank; all processes of an evaluation read.
    if together or (under_way is None and any(map(is_expert, state["model"]))):
        _check_same_save(path, state)
    return state


def _check_same_save(path: str, state: Dict[str, Any]) -> None:
    """Raise UserError, on all ranks, if a training has saved between the reading of two."""
    saves = all_gather(save_of(state))
    if saves != saves[:1] * len(saves):
        raise _changed(path)


def _changed(path: str) -> UserError:
    return UserError(
        f"{path}: changed while it was read: repeat the command, or name a copy (with the folder "
        f"{FOLDER} beside it, if there is one)"
    )


def _with_settings(path: str, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A state with its settings as omegaconf has them. UserError if they cannot be converted."""
    try:
        return stock(path, *args, **kwargs)
    except (HydraException, OmegaConfBaseException, AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: its settings cannot be read ({str(error).splitlines()[0]}): it is damaged or "
            "was written by another version of fairseq; use another checkpoint"
        ) from error


def name_the_optimizer_as_here(state: Dict[str, Any], trainer: Trainer) -> None:
    """Rename the saved optimizer if only its wrapper differs. With --bf16 fairseq's FP16Optimizer
    keeps float32 parameters for an optimizer, and its state is the optimizer's; FSDP, and our
    models on a CPU, keep them themselves and need no wrapper. Either can resume from the other, but
    stock compares the names (fairseq/trainer.py:597@0.12.2)."""
    history = state.get("optimizer_history")
    if not history:
        return
    saved, own, wrapper = history[-1]["optimizer_name"], trainer.optimizer, "FP16Optimizer"
    if type(own).__name__ == wrapper and trainer.cfg.common.bf16:
        same = saved == type(own.fp32_optimizer).__name__
    else:
        kind = getattr((state.get("cfg") or {}).get("optimizer"), "_name", None)
        # The branch's checkpoints do not record the kind.
        same = saved == wrapper and kind in (None, trainer.cfg.optimizer._name)
        model = trainer.get_model()
        same = same and (fully_sharded.is_sharded(model) or has_own_bfloat16(model))
    if same:
        history[-1] = {**history[-1], "optimizer_name": type(own).__name__}


def count_updates_as_here(state: Dict[str, Any], trainer: Trainer) -> None:
    """Move Adam's count of updates where this run's keeps it. Apex's has one for each group
    (fairseq/optim/fused_adam.py:302@0.12.2), fairseq's and ours one for each parameter."""
    own = type(getattr(trainer.optimizer, "optimizer", None)).__name__
    of_groups = own == "FusedAdamV2"
    saved = state["last_optimizer_state"]
    if not (of_groups or own in ("Adam", "FusedAdam")):
        return
    if "state" not in saved:  # that of --optimizer composite, which stock will refuse
        return
    entries, groups = dict(saved["state"]), [dict(group) for group in saved["param_groups"]]
    for group in groups:
        updated = [number for number in group["params"] if number in entries]
        steps = [int(entries[n]["step"]) for n in updated if "step" in entries[n]]
        if of_groups and steps:
            group.setdefault("step", max(steps))
            for n in updated:
                entries[n] = {key: value for key, value in entries[n].items() if key != "step"}
        elif not of_groups and "step" in group:
            step = group.pop("step")
            entries.update({n: {"step": step, **entries[n]} for n in updated})
    state["last_optimizer_state"] = {**saved, "state": entries, "param_groups": groups}


def refuse_folder(path: str) -> None:
    """Raise UserError if a checkpoint's path is a folder, FIFO, ..."""
    files.refuse_folder(path)
    if os.path.exists(path):
        files.check(path)


def _with_own_experts(path: str, state: Dict[str, Any]) -> Dict[str, Any]:
    """The state of a checkpoint, whose tensors are mapped -> that of this process.

    Only the model's tensors stay mapped, because they are copied later anyway. A mapped tensor
    would keep the disk space of a deleted file."""
    kept = {"model", "last_optimizer_state"}
    state = {key: value if key in kept else _copy(value) for key, value in state.items()}
    manifest = Manifest.read(path, state)
    optimizer = state.get("last_optimizer_state")
    trainer = _trainer_that_wants_optimizer() if optimizer is not None else None
    sharded = trainer is not None and fully_sharded.is_sharded(trainer.get_model())
    copy = (lambda state: state) if sharded else _copy  # FSDP copies the pieces that it takes
    if manifest is not None:
        indices = manifest.indices
        held = placement(manifest.num_experts, process_count(), process_rank())
        pieces = open_pieces(path, manifest, held)
    else:
        whole = {name: value for name, value in state["model"].items() if is_expert(name)}
        if process_count() == 1 or not whole:
            return {**state, "last_optimizer_state": copy(optimizer)} if trainer else state
        num_experts = len(next(iter(whole.values())))
        held = placement(num_experts, process_count(), process_rank())
        indices, saved = {}, {}
        if optimizer is not None and trainer is not None:
            indices, saved = _indices_in(optimizer, path, trainer), optimizer["state"]
        by_name = {name: saved[i] for name, i in indices.items() if i in saved}
        pieces = [Piece("", 0, num_experts, whole, by_name)]
    model = {n: t for n, t in state["model"].items() if not is_expert(n)}
    for name in pieces[0].model:
        model[name] = _rows(held, [(piece, piece.model[name]) for piece in pieces])
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
            own[indices[name]] = _own_optimizer_state(path, held, name, pieces)
        state["last_optimizer_state"] = {**optimizer, "state": own}
    else:
        del state["last_optimizer_state"]  # it lacks the experts' part
    return state


def _trainer_that_wants_optimizer() -> Optional[Trainer]:
    loading = context.loading.get()
    return loading.trainer if loading is not None and loading.optimizer else None


def open_pieces(path: str, manifest: Manifest, held: Placement) -> List[Piece]:
    """The expert files that hold experts of this process."""
    end = held.first + held.local
    return [
        # One process checks a file: the one that holds its first expert.
        _open_piece(path, file, manifest.save, held.first <= file.first)
        for file in manifest.files
        if file.first < end and held.first < file.end
    ]


def _open_piece(path: str, file: ExpertFile, save: str, check: bool) -> Piece:
    """Open a file of experts; its tensors are mapped."""
    name = file.path(path)
    if not os.path.isfile(name):
        if _save_at(path) != save:
            raise _changed(path)
        raise UserError(
            f"{name}: missing; it holds experts {file.first} to {file.end - 1} of {path}: copy the "
            f"folder {FOLDER} with the checkpoint, or load another one"
        )
    size = os.path.getsize(name)
    if size != file.bytes:
        raise UserError(
            f"{name}: {size:,} bytes, expected {file.bytes:,} by {path}; it is truncated or from "
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
            f"{name}: from save {piece.save}, but {path} is from save {save}: the files come "
            f"from two runs; copy a checkpoint and its folder {FOLDER} together"
        )
    # Checked last: the errors above say more about a file of another run, or one with code in it.
    if check and file.sha256 is not None:
        check_digest(name, file.sha256, path)
    elif check:
        check_records(name)
    return piece


def _save_at(path: str) -> Optional[str]:
    """Which save the checkpoint is of now; None: it has gone, or is one without expert files."""
    if not os.path.isfile(path):
        return None
    manifest = Manifest.read(path, load_weights_only(path, map_location="cpu", mmap=True))
    return None if manifest is None else manifest.save


def check_optimizer_parts(path: str, pieces: List[Piece], names: Iterable[str], flag: str) -> None:
    """Raise UserError if a file lacks the optimizer state of its experts although other files have
    theirs, or the rest of the model does. `names`: the experts' parameters."""
    wanted = set(names).union(*(piece.optimizer for piece in pieces))
    for piece in pieces:
        missing = sorted(wanted - piece.optimizer.keys())
        if missing:
            raise UserError(
                f"{path}: the optimizer state of {missing[0]} is missing for experts {piece.first} "
                f"to {piece.first + piece.count - 1}, but not for others: copy the checkpoint "
                f"again, or add {flag} to start with a new one"
            )


def _rows(held: Placement, parts: List[Tuple[Piece, Tensor]]) -> Tensor:
    """The experts of this process, (local, ...), copied from tensors (count, ...) of some files."""
    end = held.first + held.local
    rows = [
        tensor[max(held.first - piece.first, 0) : max(end - piece.first, 0)]
        for piece, tensor in parts
    ]
    return torch.cat(rows)


def _own_optimizer_state(
    path: str, held: Placement, name: str, pieces: List[Piece]
) -> Dict[str, Any]:
    """The optimizer state of a parameter of experts, for this process's experts."""
    states = [piece.optimizer[name] for piece in pieces]
    same_experts = len(pieces) == 1 and pieces[0].count == held.local
    own = {}
    for key, value in states[0].items():
        of_each = [
            isinstance(s.get(key), Tensor) and s[key].shape == piece.model[name].shape
            for piece, s in zip(pieces, states)
        ]
        if all(of_each):
            own[key] = _rows(held, [(piece, s[key]) for piece, s in zip(pieces, states)])
        elif same_experts or all(_is_number(s.get(key), value) for s in states):
            own[key] = _copy(value)
        else:
            raise UserError(
                f"{path}: the optimizer's {key} of {name} joins several experts, or is damaged, "
                "and cannot be sharded over another number of processes: use the number of "
                "processes that wrote it, or add --reset-optimizer"
            )
    return own


def _is_number(found: Any, value: Any) -> bool:
    """Whether it is the number `value`, and no tensor of several. A file may have one of its own:
    fairseq's fused Adam counts its float16 moments in such a unit (--fp16-adam-stats)."""
    several = any(isinstance(one, Tensor) and one.numel() > 1 for one in (found, value))
    return not several and bool(found == value)


def _indices_in(optimizer: Dict[str, Any], path: str, trainer: Trainer) -> Dict[str, int]:
    """Like `expert_indices`, for the state in a single file, which does not list them."""
    names = trained_parameters(trainer)
    saved = sum(len(group["params"]) for group in optimizer.get("param_groups", ()))
    if saved != len(names):
        raise UserError(
            f"{path}: its optimizer state has {saved} tensors, the model has {len(names)} "
            "parameters (--fp16 on one process joins them all into one; --optimizer composite "
            f"names them otherwise), so it cannot be sharded over {process_count()} processes: add "
            "--reset-optimizer"
        )
    return expert_indices(trainer)


def _copy(state: Any) -> Any:
    """The state with all tensors copied out of the mapped file."""
    if isinstance(state, Tensor):
        return state.clone()
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return type(state)(map(_copy, state)) if type(state) in (list, tuple) else state
