"""Saving by all processes together: each its experts, then rank 0 what refers to them."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch.distributed as dist
from fairseq import checkpoint_utils, utils
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer

from .. import fully_sharded
from ..diverging import check_weights
from ..errors import UserError
from ..expert_parallel import all_gather, is_expert, placement, process_count
from .experts import expert_indices, has_spread_experts, saves_together
from .format import (
    FOLDER,
    MANIFEST,
    ExpertFile,
    Manifest,
    Piece,
    describe,
    file_name,
    new_save,
)
from .removing import remove_unused_files
from .together import broadcast, code_version
from .writing import cannot_write, write

logger = logging.getLogger(__name__)

_saving: Optional[Trainer] = None  # while all processes save together


def apply() -> None:
    """Put the wrappers in place."""
    _tell_what_cannot_hold_checkpoints()
    _write_for_good()
    _save_experts_apart()
    _gather_what_is_sharded()
    _save_together_or_not_at_all()


def _write_for_good() -> None:
    """fairseq/checkpoint_utils.py:549 renames, but syncs nothing; and it is where rank 0 has the
    whole state in hand, from which the experts are taken out."""
    stock = checkpoint_utils.torch_persistent_save

    @functools.wraps(stock)
    def torch_persistent_save(obj, filename, async_write=False):
        if async_write or PathManager.path_requires_pathmanager(filename):
            return stock(obj, filename, async_write)
        check_weights(obj.get("model", {}).items(), filename, saving=True)
        if _saving is not None and has_spread_experts(_saving):
            obj = _with_experts_apart(_saving, obj, filename)
        write(obj, filename)

    checkpoint_utils.torch_persistent_save = torch_persistent_save


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
                raise cannot_write(error.filename2 or cfg.save_dir, error) from error
            finally:
                if trainer.is_data_parallel_master and not cfg.no_save:
                    remove_unused_files(cfg.save_dir, trainer.checkpoint_suffix)

        global _saving
        if cfg.no_save or not saves_together(trainer):
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


def _tell_what_cannot_hold_checkpoints() -> None:
    """fairseq/checkpoint_utils.py:841 makes --save-dir and writes a file there, when training
    starts."""
    stock = checkpoint_utils.verify_checkpoint_directory

    @functools.wraps(stock)
    def verify_checkpoint_directory(save_dir):
        try:
            stock(save_dir)
        except OSError as error:
            raise UserError(
                f"--save-dir {save_dir}: cannot be written to ({error.strerror or error}); choose "
                "another folder"
            ) from error

    checkpoint_utils.verify_checkpoint_directory = verify_checkpoint_directory


def _gather_what_is_sharded() -> None:
    """All processes must take part in gathering a state that FSDP has sharded. fairseq/checkpoint_
    utils.py:51 has the others do so at every save, though rank 0 may have nothing to write, and
    then hangs. Here they wait for its word. What is saved tells nothing of FSDP."""
    stock = Trainer.state_dict

    @functools.wraps(stock)
    def state_dict(self):
        sharded = fully_sharded.is_sharded(self.get_model())
        if _saving is self and sharded and dist.get_rank() == 0:
            broadcast(("gather", None))
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
            if _saving is self or not saves_together(self):
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
            broadcast(("failed", str(error)))
        raise
    broadcast(("done", None))


def _follow(trainer: Trainer, save_dir: str) -> None:
    """The part of the other ranks."""
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


def _with_experts_apart(trainer: Trainer, state: Dict[str, Any], filename: str) -> Dict[str, Any]:
    """On rank 0: have the experts written, and replace them in the state by the manifest."""
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
    """On all ranks at once. Returns the manifest's list of files; raises UserError, on rank 0 only
    as the others hear it from there, if one could not be written."""
    place = placement(trainer.cfg.model.moe_expert_count, process_count(), dist.get_rank())
    entry, failure = None, None
    if dist.get_rank() == place.replicas[0]:
        name = file_name(save, place.first, place.local)
        path = os.path.join(save_dir, name)
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            piece = Piece(save, place.first, place.local, *_own_experts(trainer))
            check_weights(piece.model.items(), os.path.join(save_dir, FOLDER), saving=True)
            write(piece.write(), path)
            entry = describe(name, place.first, place.local, path)
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
    places = fully_sharded.places(trainer.get_model())
    own = {name: place.parameter for name, place in places.items() if is_expert(name)}
    for name, place in places.items():
        if hasattr(place.parameter, "expert") != (name in own):
            # trained as one thing and saved as the other, it would be lost on all ranks but one
            raise RuntimeError(f"{name}: marked as an expert's parameter or named as one, not both")
    optimizer = {}
    if not trainer.cfg.checkpoint.no_save_optimizer_state:
        saved = trainer.optimizer.state_dict()["state"]
        numbers = fully_sharded.optimizer_numbers(trainer.get_model())
        optimizer = {n: saved[numbers[p]] for n, p in own.items() if numbers[p] in saved}
    model = {name: parameter.detach() for name, parameter in own.items()}
    return utils.move_to_cpu(model), utils.move_to_cpu(optimizer)
