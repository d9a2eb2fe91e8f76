"""Saves with all processes: each writes its experts, then rank 0 the checkpoint that lists them."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any, Callable, Dict, List, Tuple

import torch.distributed as dist
from fairseq import utils
from fairseq.trainer import Trainer

from .. import context, fully_sharded
from ..diverging import check_weights
from ..errors import UserError
from ..expert_parallel import all_gather, is_expert, placement, process_count
from .collective import broadcast, code_version
from .experts import expert_indices, saves_together
from .format import FOLDER, MANIFEST, ExpertFile, Manifest, Piece, describe, file_name, new_save
from .writing import write

logger = logging.getLogger(__name__)


def takes_part(trainer: Trainer) -> bool:
    """Whether this process may save now; if all must save together, only when all of them do."""
    return context.saving.get() is trainer or not saves_together(trainer)


def call_to_gather(trainer: Trainer) -> None:
    """On rank 0, before it gathers the state of a sharded model: call the others to join."""
    sharded = fully_sharded.is_sharded(trainer.get_model())
    if context.saving.get() is trainer and sharded and dist.get_rank() == 0:
        broadcast(("gather", None))


def lead(save: Callable[[], None]) -> None:
    """Rank 0's part of a save. The others always learn how it ended."""
    try:
        save()
    except Exception as error:
        with contextlib.suppress(RuntimeError):  # where a process is gone, this one fails as well
            broadcast(("failed", str(error)))
        raise
    broadcast(("done", None))


def follow(trainer: Trainer, save_dir: str) -> None:
    """The part of the other ranks. Raises UserError if rank 0 failed."""
    while True:
        word, value = broadcast(None)
        if word == "gather":
            trainer.state_dict()
        elif word == "write":
            _write_own_experts(trainer, save_dir, value)
        elif word == "failed":
            raise UserError(value)
        else:
            return


def with_experts_apart(trainer: Trainer, state: Dict[str, Any], filename: str) -> Dict[str, Any]:
    """On rank 0: have all processes write their experts, and put the manifest in their place."""
    save = new_save(state)
    broadcast(("write", save))
    files = _write_own_experts(trainer, os.path.dirname(filename), save)
    indices = expert_indices(trainer)
    optimizer = state.get("last_optimizer_state")
    if optimizer is not None:
        kept = {i: s for i, s in optimizer["state"].items() if i not in set(indices.values())}
        optimizer = {**optimizer, "state": kept}
        state = {**state, "last_optimizer_state": optimizer}
    experts = trainer.cfg.model.moe_expert_count
    manifest = Manifest(save, experts, indices, files, process_count(), code_version())
    model = {n: t for n, t in state["model"].items() if not is_expert(n)}
    return {**state, "model": model, MANIFEST: manifest.write()}


def _write_own_experts(trainer: Trainer, save_dir: str, save: str) -> List[ExpertFile]:
    """On all ranks at once. Returns the manifest's list of files. Raises UserError if a file could
    not be written: on rank 0 only, which reports it to the others."""
    held = placement(trainer.cfg.model.moe_expert_count, process_count(), dist.get_rank())
    entry, failure = None, None
    if dist.get_rank() == held.replicas[0]:
        name = file_name(save, held.first, held.local)
        path = os.path.join(save_dir, name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            piece = Piece(save, held.first, held.local, *_own_experts(trainer))
            check_weights(piece.model.items(), os.path.join(save_dir, FOLDER), saving=True)
            write(piece.write(), path)
            entry = describe(name, held.first, held.local, path)
        except Exception as error:
            if not isinstance(error, UserError):
                logger.exception("writing experts failed")
            failure = str(error)
    outcomes = all_gather((entry, failure))
    failures = [failure for _, failure in outcomes if failure is not None]
    if failures and dist.get_rank() == 0:
        raise UserError(failures[0])
    return sorted((entry for entry, _ in outcomes if entry), key=lambda entry: entry.first)


def _own_experts(trainer: Trainer) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """The parameters of this process's experts and their optimizer state, on the CPU."""
    locations = fully_sharded.locations(trainer.get_model())
    own = {name: location.parameter for name, location in locations.items() if is_expert(name)}
    for name, location in locations.items():
        if hasattr(location.parameter, "expert") != (name in own):
            # trained as one thing and saved as the other, it would be lost on all ranks but one
            raise RuntimeError(f"{name}: marked as an expert's parameter or named as one, not both")
    optimizer = {}
    if not trainer.cfg.checkpoint.no_save_optimizer_state:
        saved = trainer.optimizer.state_dict()["state"]
        numbers = fully_sharded.optimizer_numbers(trainer.get_model())
        # frozen parameters have no number
        optimizer = {n: saved[numbers[p]] for n, p in own.items() if numbers.get(p) in saved}
    model = {name: parameter.detach() for name, parameter in own.items()}
    return utils.move_to_cpu(model), utils.move_to_cpu(optimizer)
