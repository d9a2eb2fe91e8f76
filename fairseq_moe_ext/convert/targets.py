"""Writes a checkpoint in a layout, as jobs that write one file each."""

from __future__ import annotations

import glob
import logging
import os
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..branch.files import is_part
from ..branch.optimizer import parameter_numbers
from ..branch.writing import branch_order, branch_rest, branch_settings, left_out
from ..checkpoint.collective import code_version
from ..checkpoint.format import MANIFEST, Manifest, Piece, describe, file_name, new_save
from ..errors import UserError
from ..expert_parallel import is_expert
from ..moe.experts import TensorPerExpert
from .archive import AnyTensor, Lazy, bytes_of, dtype_of, pieces_of, write_torch
from .source import Source

logger = logging.getLogger(__name__)

Progress = Callable[[int], Any]


class Job(NamedTuple):
    """A file to be written."""

    path: str
    size: int  # bytes of its tensors
    write: Callable[[str, Progress], None]  # under a temporary name, which it is given


def cast(model: Dict[str, AnyTensor], dtype: torch.dtype) -> Dict[str, AnyTensor]:
    """The tensors of a model, converted to another precision while they are written."""
    made: Dict[int, AnyTensor] = {}  # tied tensors stay one

    def converted(name: str, value: AnyTensor) -> AnyTensor:
        old = dtype_of(value)
        if not old.is_floating_point or old == dtype or _keeps_precision(name):
            return value
        if isinstance(value, TensorPerExpert):
            parts: List[Any] = [converted(name, part) for part in value]  # Lazy ones, too
            return TensorPerExpert(parts)
        key = value.data_ptr() if isinstance(value, Tensor) and value.numel() else id(value)
        if key not in made:
            made[key] = Lazy(tuple(value.shape), dtype, lambda: _cast_pieces(name, value, dtype))
        return made[key]

    return {name: converted(name, value) for name, value in model.items()}


def _keeps_precision(name: str) -> bool:
    """Whether a tensor is no weight: a router's state (register_state), whose small steps float16
    would lose, or stock's version, or the tensor that marks a device, which stock leaves unset."""
    state = ".moe_layer.gate." in name and not name.endswith(".wg.weight")
    return state or name == "decoder.version" or name.endswith("._float_tensor")


def _cast_pieces(name: str, value: AnyTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    for piece in pieces_of(value):
        small = piece.to(dtype)
        if not torch.equal(torch.isfinite(small), torch.isfinite(piece)):
            largest = float(piece.abs().max())
            raise UserError(
                f"--dtype {str(dtype)[6:]}: {name} has values up to {largest:.4g}, too large for "
                "it: use bfloat16 or float32"
            )
        yield small


# ---- Ours


def fairseq_jobs(source: Source, path: str, files: Optional[int]) -> List[Job]:
    """One file; with `files`, that many files of experts and one of the rest. The last job writes
    the file that the checkpoint is named by."""
    if not files:
        state = {**source.rest, "model": source.model}
        state["last_optimizer_state"] = _whole_optimizer(source)
        return [_job(path, state)]
    local = share(source.path, source.experts, "--expert-files", files)
    save = new_save(source.rest)
    names = [name for name in source.model if is_expert(name)]
    states = _states_of(source, names) if source.optimizer is not None else {}
    folder = os.path.dirname(path)
    jobs, listed = [], []
    for first in range(0, source.experts, local):
        rows = slice(first, first + local)
        model = {n: TensorPerExpert(source.per_expert(n)[rows]) for n in names}
        optimizer = {n: _rows_of_state(source, n, states[n], rows, files) for n in states}
        name = file_name(save, first, local)
        content = Piece(save, first, local, model, optimizer).write()
        jobs.append(_job(os.path.join(folder, name), content))
        listed.append((name, first, local))

    indices = {name: number for number, name in enumerate(source.order) if is_expert(name)}
    state = {**source.rest, "model": {n: v for n, v in source.model.items() if n not in names}}
    state["last_optimizer_state"] = _whole_optimizer(source, without=names)

    def write(temporary: str, progress: Progress) -> None:
        scratch = os.path.basename(os.path.dirname(temporary))
        parts = [partial(job.path, scratch) for job in jobs]
        entries = [describe(*entry, part) for entry, part in zip(listed, parts)]
        manifest = Manifest(save, source.experts, indices, entries, files, code_version())
        write_torch({**state, MANIFEST: manifest.write()}, temporary, progress)

    return [*jobs, Job(path, _size(state), write)]


def partial(path: str, scratch: str) -> str:
    """Where a file is written before it is renamed: in the folder `scratch` beside it."""
    return os.path.join(os.path.dirname(path), scratch, os.path.basename(path))


def _job(path: str, state: Dict[str, Any]) -> Job:
    return Job(path, _size(state), lambda temporary, bar: write_torch(state, temporary, bar))


def _size(state: Any) -> int:
    if isinstance(state, (Tensor, TensorPerExpert, Lazy)):
        return bytes_of(state)
    if isinstance(state, dict):
        return sum(map(_size, state.values()))
    return sum(map(_size, state)) if isinstance(state, (list, tuple)) else 0


def share(path: str, experts: int, flag: str, files: int) -> int:
    """Experts per file. UserError if they cannot be distributed evenly."""
    if not experts:
        raise UserError(
            f"{flag} {files}: {path} is a dense model, which has no experts to "
            f"distribute: remove {flag}"
        )
    if files < 1 or experts % files:
        fitting = [n for n in range(1, experts + 1) if experts % n == 0]
        raise UserError(
            f"{flag} {files} does not divide the {experts} experts of {path}: use one of "
            f"{', '.join(map(str, fitting))}"
        )
    return experts // files


def share_of_rank(path: str, experts: int, ranks: int) -> int:
    """Experts per file of the branch's. Raises UserError for a dense model, and for experts that
    the files cannot share equally."""
    if not experts:
        raise UserError(
            f"--to branch: {path} is a dense model, and this layout is for models with experts: "
            "remove --to branch, or add --upcycle"
        )
    return share(path, experts, "--rank-files", ranks)


def _whole_optimizer(source: Source, without: Any = ()) -> Optional[Dict[str, Any]]:
    if source.optimizer is None:
        return None
    if source.optimizer.by_name is None:
        return {**source.optimizer.rest, "state": source.optimizer.state}
    numbers = {name: number for number, name in enumerate(source.order)}
    states = source.optimizer.by_name.items()
    state = {numbers[name]: value for name, value in states if name not in without}
    return {**source.optimizer.rest, "state": state}


def _states_of(source: Source, names: List[str]) -> Dict[str, Any]:
    assert source.optimizer is not None
    if source.optimizer.by_name is None:
        raise UserError(
            f"{source.path}: its optimizer state joins all parameters (as --fp16 saves it), so "
            "it cannot be split by expert: add --weights-only"
        )
    by_name = source.optimizer.by_name
    return {name: by_name[name] for name in names if name in by_name}


def _rows_of_state(
    source: Source, name: str, state: Dict[str, Any], rows: slice, files: int
) -> Dict[str, Any]:
    rows_of = {}
    for key, value in state.items():
        if isinstance(value, TensorPerExpert):
            value = TensorPerExpert(value[rows])
        elif isinstance(value, Tensor) and value.numel() > 1 and files > 1:
            raise UserError(
                f"{source.path}: the optimizer's {key} of {name} joins several experts and "
                "cannot be split: add --weights-only"
            )
        rows_of[key] = value
    return rows_of


# ---- The branch's


_Part = Tuple[Dict[str, AnyTensor], Dict[int, Any]]  # weights, and optimizer state by number


def branch_jobs(source: Source, path: str, ranks: int) -> List[Job]:
    """X-rank-0.pt, ..., and X-shared.pt, the last job, of X.pt. Raises UserError for a model or an
    optimizer that the branch's layout cannot hold."""
    local = share_of_rank(source.path, source.experts, ranks)
    if source.head:
        raise UserError(
            f"--to branch: {source.path} has a head that scores candidates, which the branch "
            "lacks: fine-tune with --choice-scoring sum or mean, or convert without --to"
        )
    model = branch_settings(source.path, source.settings)
    lost = left_out(source.settings)
    if lost:
        logger.warning(
            f"{source.path}: the branch's layout cannot record {', '.join(lost)}: fairseq's moe "
            "branch does without them; with this plugin, pass them again"
        )
    base = path[: -len(".pt")]
    rest = branch_rest(source.rest, model, ranks)
    shared = {n: source.model[n] for n in branch_order(source.model)}
    names = [name for name in source.model if is_expert(name)]
    # The numbers of the branch's parameters are those of one process, which has `local` experts.
    names_of_one_process = {_of_expert(n, i): None for n in names for i in range(local)}
    numbers = parameter_numbers(
        {**rest, "model": shared}, {"model": _by_expert(names_of_one_process)}
    )
    states, rest_of_optimizer = {}, None
    if source.optimizer is not None:
        states = _states_of(source, source.order)
        if len(source.optimizer.rest["param_groups"]) != 1:
            raise UserError(
                f"{source.path}: its optimizer has several groups of parameters, and the branch's "
                "has one: add --weights-only"
            )
        group = {**source.optimizer.rest["param_groups"][0], "params": list(range(len(numbers)))}
        rest_of_optimizer = {**source.optimizer.rest, "param_groups": [group]}
    parts: Dict[str, _Part] = {
        f"rank-{rank}": _of_rank(source, states, numbers, range(rank * local, (rank + 1) * local))
        for rank in range(ranks)
    }
    parts["shared"] = shared, {numbers[n]: s for n, s in states.items() if not is_expert(n)}
    jobs = []
    for part, (weights, state) in parts.items():
        optimizer = None
        if rest_of_optimizer is not None:
            optimizer = {**rest_of_optimizer, "state": dict(sorted(state.items()))}
        content = {**rest, "model": weights, "last_optimizer_state": optimizer}
        jobs.append(_job(f"{base}-{part}.pt", content))
    return jobs


def _of_rank(
    source: Source, states: Dict[str, Any], numbers: Dict[str, int], experts: Sequence[int]
) -> _Part:
    """The experts of a process."""
    weights: Dict[str, AnyTensor] = {}
    state: Dict[int, Any] = {}
    for index, expert in enumerate(experts):
        for name in filter(is_expert, source.model):
            key = _of_expert(name, index)
            weights[key] = source.per_expert(name)[expert]
            if name in states:
                rows = slice(expert, expert + 1)
                kept = _rows_of_state(source, name, states[name], rows, source.experts)
                state[numbers[key]] = {
                    k: v[0] if isinstance(v, TensorPerExpert) else v for k, v in kept.items()
                }
    return _by_expert(weights), state


def _of_expert(name: str, index: int) -> str:
    return name.replace(".experts.", f".experts.{index}.")


def _by_expert(weights: Dict[str, Any]) -> Dict[str, Any]:
    """Layer by layer, and in a layer expert by expert, as a module of the branch has them."""

    def layer_and_expert(name: str) -> Tuple[int, int]:
        layer, _, rest = name.partition(".experts.")
        return int(layer.split(".")[2]), int(rest.split(".")[0])

    return dict(sorted(weights.items(), key=lambda item: layer_and_expert(item[0])))


def branch_files_in_the_way(path: str) -> List[str]:
    """Files that are parts of the branch's X.pt."""
    base = path[: -len(".pt")]
    return [f for f in glob.glob(glob.escape(base) + "-*.pt") if is_part(f, base)]
