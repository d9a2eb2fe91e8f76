"""The layouts that can be read: the files of a checkpoint in each, and how to open it as a
Source."""

from __future__ import annotations

import os
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from omegaconf import OmegaConf
from torch import Tensor

from fairseq_today.torch_today import load_weights_only

from .. import files as own_files
from ..branch import outline as branch_outline
from ..branch.files import BranchFiles, find, flat_settings, load, saved_settings
from ..branch.optimizer import is_parameter
from ..branch.outline import vocabulary_of
from ..branch.reading import read
from ..branch.settings import ONE_PROCESS, translated_settings
from ..checkpoint.format import MANIFEST, Manifest, Piece, check_kind
from ..checkpoint.intact import check_records
from ..checkpoint.loading import check_optimizer_parts, open_pieces, refuse_folder
from ..checkpoint.settings import check_fields, check_settings
from ..config import MoETransformerLMConfig, defaults, saved_pad_rule
from ..errors import Unfit, UserError
from ..expert_parallel import Placement, is_expert
from ..models.architectures import ARCHITECTURES, is_ours, name_of
from ..models.language_model import MODEL_NAME
from ..moe.experts import TensorPerExpert
from .source import Optimizer, Source, build_on_meta, set_order

Files = List[Tuple[str, Optional[str]]]  # with the digest that each should have; None: not known


class Reader(NamedTuple):
    """A layout."""

    base: Callable[[str], Optional[str]]  # the name by which a checkpoint goes; None: not of these
    files: Callable[[str], Files]  # those of a checkpoint that are there; UserError for no file
    open: Callable[[str, bool], Source]  # a path, and whether to read only the weights


def reader_of(path: str) -> Reader:
    """The layout of a checkpoint."""
    return next(reader for reader in READERS if reader.base(path) is not None)


def open_checkpoint(path: str, weights_only: bool) -> Source:
    """Ours (one file, or one and its folder of experts), stock fairseq's transformer_lm, or one of
    the branch. Raises UserError for any other file."""
    return reader_of(path).open(path, weights_only)


def outline(path: str) -> Source:
    """A checkpoint without the tensors of experts in files of their own, of which no byte is
    checked. Raises UserError."""
    state = branch_outline.outline(path)
    model, settings = state.pop("model"), _settings(path, state)
    vocabulary_of(path, model)
    return Source(path, state, settings, model, [], None)


# ---- Ours, and stock's


def _our_files(path: str) -> Files:
    own_files.check(path)
    try:
        manifest = Manifest.read(path, load_weights_only(path, map_location="cpu", mmap=True))
    except UserError:
        manifest = None  # said when it is opened
    listed = manifest.files if manifest is not None else []
    there = [(file.path(path), file.sha256) for file in listed]
    return [(path, None), *(file for file in there if os.path.isfile(file[0]))]


def _open_ours(path: str, weights_only: bool) -> Source:
    refuse_folder(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such checkpoint; check the path")
    check_records(path)
    state = load_weights_only(path, map_location="cpu", mmap=True)
    check_kind(path, state)
    check_settings(path, state)
    manifest = Manifest.read(path, state)
    model, _ = state.pop("model"), state.pop(MANIFEST, None)
    optimizer = state.pop("last_optimizer_state", None)
    settings = _settings(path, state)
    vocabulary_of(path, model)
    source = Source(path, state, settings, model, [], None)
    pieces = _pieces(path, manifest, model)
    for name in pieces[0].model if pieces else ():
        model[name] = TensorPerExpert(part for piece in pieces for part in piece.model[name])
    if is_ours(flat_settings(state)):
        set_order(source)
    else:
        tied = settings["share_decoder_input_output_embed"]
        source.order = [name for name in model if is_parameter(name, tied)]
    if optimizer is not None and not weights_only:
        source.optimizer = _optimizer(source, optimizer, pieces, manifest)
    return source


def _pieces(path: str, manifest: Optional[Manifest], model: Dict[str, Tensor]) -> List[Piece]:
    """The experts' files; of a single file, its experts as one."""
    if manifest is not None:
        everything = Placement(manifest.num_experts, 0, (0,), (0,))
        return open_pieces(path, manifest, everything)
    stacked = {name: value for name, value in model.items() if is_expert(name)}
    if not stacked:
        return []
    return [Piece("", 0, len(next(iter(stacked.values()))), stacked, {})]


def _optimizer(
    source: Source, saved: Dict[str, Any], pieces: List[Piece], manifest: Optional[Manifest]
) -> Optimizer:
    if "state" not in saved:
        raise Unfit(
            f"{source.path}: its optimizer state is of several optimizers (--optimizer composite)",
            "add --weights-only",
        )
    state = saved["state"]
    rest = {key: value for key, value in saved.items() if key != "state"}
    numbered = sum(len(group["params"]) for group in saved["param_groups"])
    if numbered != len(source.order):
        if manifest is not None and manifest.indices:
            raise Unfit(
                f"{source.path}: its optimizer state has {numbered} tensors, but its settings "
                f"train {len(source.order)} parameters",
                "add --weights-only",
            )
        return Optimizer(rest, None, state)
    if manifest is not None:
        names = manifest.indices if state else ()
        check_optimizer_parts(source.path, pieces, names, "--weights-only")
    by_name: Dict[str, Dict[str, Any]] = {}
    for number, name in enumerate(source.order):
        if manifest is not None and name in manifest.indices:
            states = [piece.optimizer[name] for piece in pieces if name in piece.optimizer]
        else:
            states = [state[number]] if number in state else []
        if not states:
            continue
        by_name[name] = states[0]
        if is_expert(name):
            by_name[name] = _per_expert(source.path, name, states, pieces)
    return Optimizer(rest, by_name, {})


def _per_expert(
    path: str, name: str, states: List[Dict[str, Any]], pieces: List[Any]
) -> Dict[str, Any]:
    split: Dict[str, Any] = {}
    for key, value in states[0].items():
        if isinstance(value, Tensor) and value.shape == pieces[0].model[name].shape:
            split[key] = TensorPerExpert(part for state in states for part in state[key])
        elif len(states) == 1 or not isinstance(value, Tensor) or value.numel() == 1:
            split[key] = value
        else:
            raise Unfit(
                f"{path}: the optimizer's {key} of {name} joins several experts and cannot be "
                "split",
                "add --weights-only",
            )
    return split


# ---- The branch's


def _parts(path: str) -> BranchFiles:
    files = find(path)
    assert files is not None
    return files


def _branch_base(path: str) -> Optional[str]:
    files = find(path)
    return None if files is None else files.base


def _branch_files(path: str) -> Files:
    return [(file, None) for file in _parts(path).all]


def _open_branch(path: str, weights_only: bool) -> Source:
    files = _parts(path)
    parameters = None
    for part, _ in _branch_files(path):
        check_records(part)
    if not weights_only and load(files.shared).get("last_optimizer_state") is not None:
        model = read(files, None, None)
        settings = _settings(files.base, model)
        vocabulary = vocabulary_of(files.base, model["model"])
        parameters = dict(build_on_meta(settings, vocabulary).named_parameters())
    try:
        state = read(files, None, parameters, stack=TensorPerExpert)
    except Unfit as error:
        raise Unfit(error.reason, "add --weights-only") from error
    settings = _settings(files.base, state)
    model, saved = state.pop("model"), state.pop("last_optimizer_state", None)
    if state["cfg"] is not None:
        state["cfg"] = OmegaConf.to_container(state["cfg"], resolve=True, enum_to_str=True)
    source = Source(files.base, state, settings, model, [], None)
    set_order(source)
    if saved is not None:
        by_name = {source.order[number]: value for number, value in saved.pop("state").items()}
        source.optimizer = Optimizer(saved, by_name, {})
    return source


# ---- Both


def _settings(path: str, state: Dict[str, Any]) -> Dict[str, Any]:
    return complete_settings(path, saved_settings(path, state))


def complete_settings(path: str, flat: Dict[str, Any]) -> Dict[str, Any]:
    """All settings of our model, from those saved by us, stock fairseq or the branch."""
    if not is_ours(flat):
        return translated_settings(path, flat)
    settings = {**defaults(), **ARCHITECTURES.get(name_of(flat), {})}
    settings.update({key: flat[key] for key in settings if key in flat})
    settings["moe_pad_rule"] = saved_pad_rule(flat)
    # How a run was started is no matter for converting what it left.
    settings.update(ONE_PROCESS)
    check_fields(path, "model", settings, MoETransformerLMConfig)
    return {**settings, "_name": MODEL_NAME}


READERS = (
    Reader(_branch_base, _branch_files, _open_branch),
    Reader(lambda path: path, _our_files, _open_ours),  # the last: it says what is no checkpoint
)
