"""The branch's optimizer state, by our parameters.

A process of the branch numbers its own parameters, in the order of its modules. Without FSDP the
numbers follow from the names in the files; with FSDP, the files list the parameter of each number.
"""

import logging
import re
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from ..errors import Unfit
from ..fully_sharded import is_sharded, locations
from ..moe.experts import TensorPerExpert
from . import flat
from .files import BranchFiles, State, flat_settings
from .parts import Part

logger = logging.getLogger(__name__)

ByName = Dict[str, Optional[State]]  # by the names in one file; None: no update has touched it

_GATE = re.compile(r"(?P<layer>.+\.moe_layer)\.gate\.wg\.weight")


def optimizer_state(
    files: BranchFiles,
    shared: State,
    pieces: flat.Pieces,
    parts: List[Part],
    parameters: Dict[str, Any],
    stack: Callable[[List[Tensor]], Any],
) -> Optional[State]:
    """The state of an optimizer of our parameters. UserError if it cannot be converted.

    Args: as of reading.read; `pieces`: of FSDP's flat tensors in the shared file.
    """
    saved = shared.get("last_optimizer_state")
    if saved is None:
        logger.warning(f"{files.base} has no optimizer state; updates are counted from 0")
        return None
    of_shared, of_parts = _by_name(files, shared, pieces, parts)
    groups = saved["param_groups"]
    state: Dict[int, State] = {}
    for number, (name, parameter) in enumerate(parameters.items()):
        of_experts = name not in of_shared
        entries = _of_experts(files, parts, of_parts, name) if of_experts else [of_shared[name]]
        if all(entry is None for entry in entries):
            continue
        merged = _merged(files, name, entries, stack if of_experts else None)
        for key, value in merged.items():
            same_kind = (
                isinstance(value, (Tensor, TensorPerExpert)) and len(value.shape) == parameter.dim()
            )
            if same_kind and value.shape != parameter.shape:
                raise unfit(
                    files, f"{key} of {name} is {tuple(value.shape)}, not {tuple(parameter.shape)}"
                )
        state[number] = merged
    group = {**groups[0], "params": list(range(len(parameters)))}
    return {**saved, "param_groups": [group], "state": state}


def _by_name(
    files: BranchFiles, shared: State, pieces: flat.Pieces, parts: List[Part]
) -> Tuple[ByName, List[ByName]]:
    """The optimizer state by name, of the shared file and of each rank file."""
    saved = shared["last_optimizer_state"]
    if "param_id_map" in saved:
        raise unfit(
            files, "--ddp-backend fully_sharded of another version has gathered it in one file"
        )
    for part in parts:
        if part.local and part.state.get("last_optimizer_state") is None:
            raise unfit(files, f"{part.path} has none")
    if flat.is_of_fsdp(shared):
        try:
            of_parts = [flat.optimizer_state(part.pieces) if part.local else {} for part in parts]
            return flat.optimizer_state(pieces), of_parts
        except flat.Misfit as error:
            raise unfit(files, str(error)) from error
    numbers = parameter_numbers(shared, parts[0].state)
    groups = saved["param_groups"]
    in_groups = sorted(number for group in groups for number in group["params"])
    if len(groups) != 1 or in_groups != list(range(len(numbers))):
        raise unfit(
            files,
            f"it has {len(in_groups)} tensors in {len(groups)} groups, but the model has "
            f"{len(numbers)} parameters; --fp16 with flat gradients saves it so",
        )
    return _numbered(saved, numbers), [
        _numbered(part.state.get("last_optimizer_state"), numbers) for part in parts
    ]


def _numbered(saved: Optional[State], numbers: Dict[str, int]) -> ByName:
    state = (saved or {}).get("state", {})
    return {name: state.get(number) for name, number in numbers.items()}


def parameter_numbers(shared: State, part: State) -> Dict[str, int]:
    """The number of each parameter in the branch's model, by its name in the files: experts follow
    their gate, other parameters follow the order of the shared file. Every process counts its own
    parameters."""
    names: List[str] = []
    tied = bool(flat_settings(shared).get("share_decoder_input_output_embed"))
    for name in shared["model"]:
        if not is_parameter(name, tied):
            continue
        names.append(name)
        gate = _GATE.fullmatch(name)
        if gate is not None:
            experts = gate["layer"] + ".experts."
            names += [key for key in part["model"] if key.startswith(experts)]
    return {name: number for number, name in enumerate(names)}


def is_parameter(name: str, tied: bool) -> bool:
    """Whether a name in a file is a parameter of an optimizer: not a buffer, tied weights once."""
    buffers = (".version", "._float_tensor", ".embed_positions.weights")
    return not name.endswith(buffers) and not (tied and name == "decoder.output_projection.weight")


def _of_experts(
    files: BranchFiles, parts: List[Part], of_parts: List[ByName], name: str
) -> List[Optional[State]]:
    """The states of this process's experts for one of our stacked parameters."""
    experts, _, rest = name.partition(".experts.")
    names = [
        (by_name, f"{experts}.experts.{index}.{rest}")
        for part, by_name in zip(parts, of_parts)
        for index in part.used
    ]
    if not names or any(key not in by_name for by_name, key in names):
        raise unfit(files, f"it lacks {name}")
    return [by_name[key] for by_name, key in names]


def _merged(
    files: BranchFiles,
    name: str,
    entries: List[Optional[State]],
    stack: Optional[Callable[[List[Tensor]], Any]],
) -> State:
    """One parameter's state from that of its experts; without `stack`, of a shared one."""
    states = [entry for entry in entries if entry is not None]
    if len(states) < len(entries) or any(s.keys() != states[0].keys() for s in states):
        raise unfit(files, f"that of {name} is missing for some experts")
    merged: State = {}
    for key, first in states[0].items():
        values = [state[key] for state in states]
        if isinstance(first, Tensor) and first.dim() > 0:
            if any(value.shape != first.shape for value in values):
                raise unfit(files, f"{key} of {name} differs in shape between experts")
            merged[key] = first.clone() if stack is None else stack(values)
        elif all(value == first for value in values):
            merged[key] = first
        else:
            raise unfit(files, f"{key} of {name} differs between experts")
    return merged


def unfit(files: BranchFiles, why: str) -> Unfit:
    reason = f"{files.base}: its optimizer state cannot be continued: {why}"
    return Unfit(reason, "add --reset-optimizer to continue with a fresh one")


def shapes(trainer: Any, files: BranchFiles) -> Dict[str, Tensor]:
    """The shapes of a trainer's parameters, from which `reading.read` converts the branch's
    optimizer state. Raises UserError if the optimizer keeps its parameters in another form."""
    common = trainer.cfg.common
    apart = common.memory_efficient_fp16 or common.fp16_no_flatten_grads or common.bf16
    # fairseq/optim/fp16_optimizer.py:293@0.12.2; with FSDP never (fairseq/trainer.py:298@0.12.2)
    if common.fp16 and not apart and not is_sharded(trainer.get_model()):
        raise unfit(
            files,
            "--fp16 keeps one flat tensor for all parameters unless --fp16-no-flatten-grads is "
            "set; add it",
        )
    return {
        name: torch.empty(location.shape, device="meta")
        for name, location in locations(trainer.get_model()).items()
        if location.parameter.requires_grad
    }
