"""Joins the shards of FSDP's flat tensors and cuts them into parameters.

fairscale's FSDP concatenates the parameters of a wrapped module; each process of its group keeps a
shard; the last shards are padded with zeros to the length of the first. The optimizer of a process
knows only these shards, and numbers them as the file's `shard_metadata` lists them
(fairscale/nn/data_parallel/fully_sharded_data_parallel.py:740,2117@0.4.13):

    shard_metadata  {param_metadata: [{fsdp_path, params: {name of the flat one: {names, shapes,
                    numels, padding}}, shared_param_info: [(one name, its tied one)]}]}

The weights are sharded only with --use-sharded-state; the optimizer's state always is.
"""

import math
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .files import State

Pieces = Callable[[int], State]  # the file with the pieces of this number, from the first


class Misfit(Exception):
    """A file's tensors do not match its description of FSDP's."""


class Flat(NamedTuple):
    """A flat tensor."""

    key: str  # its name in the model of a file
    names: List[str]  # of what it joins
    shapes: List[torch.Size]

    def taken_apart(self, pieces: Pieces, *keys: Any) -> Dict[str, Tensor]:
        """The joined tensors by name; mapped, not copied, if there is one shard. `keys` lead to the
        tensor in a file. Misfit if the shards differ in length."""
        sizes, where = [math.prod(shape) for shape in self.shapes], "/".join(map(str, keys))
        shards = [_at(pieces(0), keys)]
        total, length = sum(sizes), shards[0].numel()
        if not 0 < length <= total:
            raise Misfit(f"{where} has {length:,} numbers, but FSDP joined {total:,}")
        shards += [_at(pieces(number), keys) for number in range(1, math.ceil(total / length))]
        if any(piece.numel() != length for piece in shards):
            raise Misfit(f"the shards of {where} differ in length")
        whole = torch.cat(shards)[:total] if len(shards) > 1 else shards[0].flatten()
        parts = zip(self.names, whole.split(sizes), self.shapes)  # padding is last, and gone
        return {name: part.view(shape) for name, part, shape in parts}


def _at(value: Any, keys: Sequence[Any]) -> Tensor:
    for key in keys:
        if key not in (value or ()):
            raise Misfit(f"a file lacks {'/'.join(map(str, keys))}")
        value = value[key]
    return value


def is_of_fsdp(state: State) -> bool:
    """Whether a file describes how FSDP has joined parameters."""
    return bool(state.get("shard_metadata"))


def flat_tensors(state: State) -> Iterator[Flat]:
    """Those of the process that wrote a file, as its optimizer numbers them."""
    for module in state["shard_metadata"]["param_metadata"]:
        path = module["fsdp_path"] + "." if module["fsdp_path"] else ""
        for name, joined in module["params"].items():
            yield Flat(path + name, [path + n for n in joined["names"]], joined["shapes"])


def whole_model(state: State, pieces: Pieces) -> Dict[str, Any]:
    """The model of a file, with flat tensors taken apart if it has any."""
    model = dict(state["model"])
    if not is_of_fsdp(state):
        return model
    for flat in flat_tensors(state):
        if model.pop(flat.key, None) is not None:
            model.update(flat.taken_apart(pieces, "model", flat.key))
    for name, tied in _tied(state):
        if name in model or tied in model:
            model.setdefault(name, model.get(tied))
            model.setdefault(tied, model[name])
    return model


def _tied(state: State) -> Iterator[Tuple[str, str]]:
    for module in state["shard_metadata"]["param_metadata"]:
        path = module["fsdp_path"] + "." if module["fsdp_path"] else ""
        for name, tied in module["shared_param_info"]:
            yield path + name, path + tied


def optimizer_state(pieces: Pieces) -> Dict[str, Optional[State]]:
    """A file's optimizer state of each parameter, by name; None: no state, or it is in other files.
    Misfit if it belongs to other tensors."""
    saved, flats = pieces(0)["last_optimizer_state"], list(flat_tensors(pieces(0)))
    count = sum(len(group["params"]) for group in saved["param_groups"])
    if count != len(flats):
        raise Misfit(f"it has {count} tensors, but FSDP made {len(flats)}")
    states: Dict[str, Optional[State]] = {}
    for number, flat in enumerate(flats):
        if number not in saved["state"]:
            states.update(dict.fromkeys(flat.names))
            continue
        by_key = {
            key: flat.taken_apart(pieces, "last_optimizer_state", "state", number, key)
            if isinstance(value, Tensor) and value.dim() > 0
            else dict.fromkeys(flat.names, value)
            for key, value in saved["state"][number].items()
        }
        for name in flat.names:
            states[name] = {key: values[name] for key, values in by_key.items()}
    return states
