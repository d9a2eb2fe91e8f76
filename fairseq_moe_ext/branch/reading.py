"""Reads a checkpoint of the branch as the single state that fairseq expects from a file."""

from typing import Any, Callable, Dict, List, Optional

import torch
from fairseq import checkpoint_utils
from fairseq.dataclass.utils import overwrite_args_by_name
from omegaconf import OmegaConf
from torch import Tensor

from ..errors import UserError
from ..expert_parallel import process_count
from .files import BranchFiles, State, load, saved_settings
from .flat import Misfit
from .optimizer import optimizer_state
from .parts import expert_parts, model_state, shared_pieces
from .settings import complete_cfg, translated_args, translated_settings

# What a file with weights only may lack.
BARE: State = {
    "optimizer_history": [
        {
            "criterion_name": "MoECrossEntropyCriterion",
            "optimizer_name": "FairseqAdam",
            "lr_scheduler_state": {"best": None},
            "num_updates": 0,
        }
    ],
    "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
}


def read(
    files: BranchFiles,
    overrides: Optional[Dict[str, Any]],
    parameters: Optional[Dict[str, Any]],
    stack: Callable[[List[Tensor]], Any] = torch.stack,
) -> State:
    """What fairseq/checkpoint_utils.py:281@0.12.2 (load_checkpoint_to_cpu) returns of one file.

    The model's experts are those of this process, as TensorPerExpert of tensors that lie in mapped
    files.

    Args:
        overrides: of settings (--model-overrides).
        parameters: the optimizer's, by name, in its order; None: do not read its state.
        stack: joins the optimizer state of the experts into one tensor.

    Raises:
        UserError: for files that are damaged, missing or not of one checkpoint.
    """
    shared = load(files.shared)
    saved_settings(files.shared, shared)
    parts = expert_parts(files, shared)
    state = dict(BARE)
    for source in (shared, parts[0].state):  # the branch uses the rank file's
        state.update((key, value) for key, value in source.items() if value)
    state.pop("shard_metadata", None)  # from here on nothing is sharded
    pieces = shared_pieces(files, shared)
    try:
        state["model"] = model_state(shared, pieces, parts)
    except Misfit as error:
        raise UserError(f"{files.base}: {error}; copy the checkpoint again") from error
    state["last_optimizer_state"] = None
    if parameters is not None:
        state["last_optimizer_state"] = optimizer_state(
            files, shared, pieces, parts, parameters, stack
        )
    state["extra_state"] = _shared_position(state)
    if state.get("args") is not None:
        state["args"] = translated_args(files.base, state["args"])
        for name, value in (overrides or {}).items():
            setattr(state["args"], name, value)
        state["cfg"] = None
    else:
        state["args"] = None
        state["cfg"] = OmegaConf.create(
            complete_cfg(translated_settings(files.base, state["cfg"]["model"]), state["cfg"])
        )
        overwrite_args_by_name(state["cfg"], overrides or {})
    return checkpoint_utils._upgrade_state_dict(state)


def _shared_position(state: State) -> Dict[str, Any]:
    """`extra_state` with the position in the data as checkpoint/ keeps it, for any number of
    processes: the branch counts the batches of one process."""
    extra = dict(state["extra_state"])
    position = extra.get("train_iterator")
    if not position or not position.get("iterations_in_epoch"):
        return extra
    if state.get("args") is not None:
        world_size, batch_size = (
            getattr(state["args"], name, None) for name in ("distributed_world_size", "batch_size")
        )
    else:
        world_size = state["cfg"].get("distributed_training", {}).get("distributed_world_size")
        batch_size = state["cfg"].get("dataset", {}).get("batch_size")
    batches = position["iterations_in_epoch"] * (world_size or 1)
    extra["train_iterator"] = {**position, "iterations_in_epoch": batches // process_count()}
    if batch_size:
        position_of_all = {"batches": batches, "of": None, "sentences": batches * batch_size}
        extra["train_iterator"]["all_processes"] = position_of_all
    return extra
