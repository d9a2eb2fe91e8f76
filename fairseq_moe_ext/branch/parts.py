"""The parts of a checkpoint that a process needs, checked to belong together."""

import functools
import logging
import os
import re
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from ..checkpoint.format import last_history
from ..errors import UserError
from ..expert_parallel import placement, process_count, process_rank
from ..moe.experts import TensorPerExpert
from ..wording import count, short
from .files import BranchFiles, State, flat_settings, load
from .flat import Pieces, whole_model
from .settings import FIELDS

logger = logging.getLogger(__name__)

_EXPERT = re.compile(r"(?P<experts>.+\.moe_layer\.experts)\.(?P<index>\d+)\.(?P<name>.+)")


class Part(NamedTuple):
    """A rank file."""

    path: str
    state: State
    local: int  # experts in it
    used: Sequence[int]  # those of this process, from 0 in the file
    pieces: Pieces  # of FSDP's flat tensors in it


def expert_parts(files: BranchFiles, shared: State) -> List[Part]:
    """The rank files with experts of this process. UserError if a file that the checkpoint needs is
    missing, here or on another process, or does not belong to it."""
    settings = flat_settings(shared)
    experts = int(settings.get("moe_expert_count") or 0)
    lowest = load(files.ranks[min(files.ranks)])
    local = _local_experts(lowest)
    if local == 0:  # a dense twin, whose only rank file holds nothing
        _check_one_run(files.shared, shared, files.ranks[min(files.ranks)], lowest)
        return [Part(files.ranks[min(files.ranks)], lowest, 0, (), lambda number: lowest)]
    if experts % local != 0:
        raise UserError(
            f"{files.ranks[min(files.ranks)]}: has {count(local, 'expert')} per layer, which does "
            f"not divide the {experts} of {files.shared}; the files come from different runs: copy "
            "the checkpoint again"
        )
    needed = experts // local
    missing = [rank for rank in range(needed) if rank not in files.ranks]
    if missing:
        name = os.path.basename(files.base)[: -len(".pt")]
        listed = ", ".join(f"{name}-rank-{rank}.pt" for rank in missing[:4])
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise UserError(
            f"{files.base}: {listed}{more} missing: its {experts} experts are in {needed} files, "
            f"-rank-0 to -rank-{needed - 1}, {local} in each; copy the checkpoint again"
        )
    left = [rank for rank in files.ranks if rank >= needed]
    if left and local > 1:  # one expert a process may have replicas on further ones
        logger.warning(
            f"{files.ranks[min(left)]} is ignored, like all -rank- files from {needed} on: "
            f"{files.base} has {experts} experts, {local} in each file"
        )
    held = placement(experts, process_count(), process_rank())
    parts = []
    for number in range(held.first // local, -(-(held.first + held.local) // local)):
        path = files.ranks[number]
        state = lowest if number == min(files.ranks) else load(path)
        _check_one_run(files.shared, shared, path, state)
        if _local_experts(state) != local:
            raise UserError(
                f"{path}: has {count(_local_experts(state), 'expert')} per layer, "
                f"{files.ranks[min(files.ranks)]} has {local}; the files come from different "
                "runs: copy the checkpoint again"
            )
        start = number * local
        used = range(max(held.first - start, 0), min(held.first + held.local - start, local))
        parts.append(Part(path, state, local, used, _replicas(files, state, number, needed)))
    return parts


def shared_pieces(files: BranchFiles, shared: State) -> Pieces:
    """Opens FSDP's shared files, one of each process."""

    @functools.cache
    def piece(number: int) -> State:
        if not files.shards and number == 0:  # one process's, or renamed
            return shared
        return _opened(files.shards.get(number), f"shared-shard{number}", files, shared)

    return piece


def _replicas(files: BranchFiles, state: State, rank: int, stride: int) -> Pieces:
    """Opens the files of the processes with the same experts, among which FSDP shards these."""

    @functools.cache
    def piece(number: int) -> State:
        other = rank + number * stride
        if number == 0:
            return state
        return _opened(files.ranks.get(other), f"rank-{other}-shard{other}", files, state)

    return piece


def _opened(path: Optional[str], part: str, files: BranchFiles, other: State) -> State:
    if path is None:
        raise UserError(
            f"{files.base[: -len('.pt')]}-{part}.pt: missing; it holds a shard of each tensor "
            "that FSDP has sharded: copy the checkpoint again"
        )
    state = load(path)
    _check_one_run(files.shared, other, path, state)
    return state


def _local_experts(state: State) -> int:
    indices = {match["index"] for match in map(_EXPERT.fullmatch, state["model"]) if match}
    return len(indices)


def _check_one_run(path: str, state: State, other_path: str, other: State) -> None:
    """Raise UserError if two files are from different runs or updates."""
    for name, value, other_value in zip(_MARKS, _marks(state), _marks(other)):
        if value and other_value and value != other_value:
            raise UserError(
                f"{other_path}: belongs to another checkpoint than {path}: {name} "
                f"{short(other_value)} and {short(value)}; copy the files of one checkpoint again"
            )


_MARKS = ("num_updates", "position in the data", "optimizer", "seed", "model settings")


def _marks(state: State) -> Tuple[Any, ...]:
    """The values that all files of one checkpoint share."""
    history = last_history(state)
    extra = state.get("extra_state") or {}
    args, cfg = state.get("args"), state.get("cfg") or {}
    seed = getattr(args, "seed", None) if args is not None else cfg.get("common", {}).get("seed")
    model = {
        key: value
        for key, value in flat_settings(state).items()
        if key in FIELDS or key in ("arch", "_name")
    }
    return (
        history.get("num_updates"),
        extra.get("train_iterator"),
        history.get("optimizer_name"),
        seed,
        model,
    )


def model_state(shared: State, pieces: Pieces, parts: List[Part]) -> Dict[str, Any]:
    """The state of our model: shared tensors, and experts as TensorPerExpert. Raises UserError for
    an expert that its file lacks, and Misfit for pieces that belong to other tensors."""
    model = whole_model(shared, pieces)
    model.pop("decoder.embed_positions.weights", None)  # the sinusoids, in old checkpoints
    for part in parts:
        of_part = whole_model(part.state, part.pieces)
        for key in of_part:
            match = _EXPERT.fullmatch(key)
            if match is None or int(match["index"]) != 0:
                continue
            stack = model.setdefault(f"{match['experts']}.{match['name']}", TensorPerExpert())
            for index in part.used:
                name = f"{match['experts']}.{index}.{match['name']}"
                if name not in of_part:
                    raise UserError(
                        f"{part.path}: {name} is missing; the file is damaged: copy it again"
                    )
                stack.append(of_part[name])
    return model
