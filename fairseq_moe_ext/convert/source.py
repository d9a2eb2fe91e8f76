"""Any checkpoint of a language model as one view, of which the tensors lie in mapped files."""

from __future__ import annotations

import os
from argparse import Namespace
from copy import deepcopy
from dataclasses import MISSING, dataclass, fields
from types import SimpleNamespace
from typing import Any, Dict, List, Optional

import torch
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from torch import Tensor

from ..branch.files import BranchFiles, find, flat_settings
from ..branch.optimizer import is_parameter
from ..branch.reading import BARE, read
from ..branch.settings import ONE_PROCESS, translated_settings
from ..checkpoint.format import MANIFEST, Manifest, Piece
from ..checkpoint.intact import check_records
from ..checkpoint.loading import (
    check_kind,
    check_optimizer_parts,
    open_pieces,
    refuse_folder,
)
from ..checkpoint.settings import check_fields, check_settings
from ..compat import load_weights_only
from ..config import MoETransformerLMConfig, saved_pad_rule
from ..errors import UserError
from ..expert_parallel import Placement, is_expert
from ..models.architectures import ARCHITECTURES
from ..models.language_model import MODEL_NAME, MoETransformerLanguageModel
from ..moe.experts import TensorPerExpert
from .archive import AnyTensor

_HEAD = "choice_head.weight"  # of fine-tuning with --choice-scoring head


@dataclass
class Optimizer:
    """What an optimizer remembers. `by_name` is None where it cannot be told parameter by
    parameter, as with --fp16's one flat tensor; `state` is then as saved."""

    rest: Dict[str, Any]  # param_groups, loss_scale, ...
    by_name: Optional[Dict[str, Dict[str, Any]]]
    state: Dict[int, Any]


@dataclass
class Source:
    """A checkpoint. Experts' tensors are TensorPerExpert, of all experts."""

    path: str
    rest: Dict[str, Any]  # all of fairseq's state but model and optimizer
    settings: Dict[str, Any]  # of our model
    model: Dict[str, AnyTensor]  # in the order of the file to be
    order: List[str]  # parameters as the optimizer numbers them
    optimizer: Optional[Optimizer]

    @property
    def experts(self) -> int:
        """Experts in a sparse layer; 0: a dense model."""
        if self.settings["moe_freq"] == 0 or self.settings["alternate_decoder_ffn_embed_dim"]:
            return 0
        return self.settings["moe_expert_count"]

    @property
    def head(self) -> int:
        """Outputs of the head that scores candidates; 0: there is none."""
        return self.model[_HEAD].shape[0] if _HEAD in self.model else 0

    @property
    def types(self) -> int:
        return self.model["decoder.embed_tokens.weight"].shape[0]


def open_checkpoint(path: str, weights_only: bool) -> Source:
    """Ours (one file, or one and its folder of experts), stock fairseq's transformer_lm, or one of
    the branch. Raises UserError for what is none of these."""
    files = find(path)
    if files is not None:
        return _of_branch(files, weights_only)
    refuse_folder(path)
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such checkpoint; check the path")
    check_records(path)
    state = load_weights_only(path, map_location="cpu", mmap=True)
    check_kind(path, state)
    check_settings(path, state)
    manifest = Manifest.read(path, state)
    model, _ = state.pop("model"), state.pop(MANIFEST, None)
    optimizer = state.pop("last_optimizer_state", None)
    flat = flat_settings({"args": state.get("args"), "cfg": state.get("cfg")})
    settings = _settings(path, flat)
    if "decoder.embed_tokens.weight" not in model:
        raise UserError(
            f"{path}: there is no decoder.embed_tokens.weight in it; name the file X.pt"
        )
    ours = str(flat.get("_name") or flat.get("arch")) in (MODEL_NAME, *ARCHITECTURES)
    source = Source(path, state, settings, model, [], None)
    pieces = _pieces(path, manifest, model)
    for name in pieces[0].model if pieces else ():
        model[name] = TensorPerExpert(part for piece in pieces for part in piece.model[name])
    if ours:
        set_order(source)
    else:
        tied = settings["share_decoder_input_output_embed"]
        source.order = [name for name in model if is_parameter(name, tied)]
    if optimizer is not None and not weights_only:
        source.optimizer = _optimizer(source, optimizer, pieces, manifest)
    return source


def set_order(source: Source) -> None:
    """Give a model of ours the order of its keys and parameters. UserError if they do not fit its
    settings."""
    ours = build_on_meta(source.settings, source.types)
    if source.head:
        with torch.device("meta"):
            ours.add_choice_head(source.head)
    expected = ours.state_dict()
    missing = [n for n in expected if n not in source.model and ".output_projection." not in n]
    unknown = [name for name in source.model if name not in expected]
    for what, names in (("missing", missing), ("unknown", unknown)):
        if names:
            raise UserError(
                f"{source.path}: does not fit the settings in it: {names[0]} is {what}, and "
                f"{len(names) - 1} more; it is damaged or of another version"
            )
    for name, value in source.model.items():
        if tuple(value.shape) != tuple(expected[name].shape):
            raise UserError(
                f"{source.path}: does not fit the settings in it: {name} is {tuple(value.shape)}, "
                f"not {tuple(expected[name].shape)}"
            )
    source.model = {name: source.model[name] for name in expected if name in source.model}
    source.order = [name for name, _ in ours.named_parameters()]


def build_on_meta(settings: Dict[str, Any], types: int) -> MoETransformerLanguageModel:
    """Our model without memory for its parameters."""
    dictionary = Dictionary()
    for number in range(types - len(dictionary)):
        dictionary.add_symbol(str(number))
    known = {field.name for field in fields(MoETransformerLMConfig)}
    cfg = MoETransformerLMConfig(**{k: v for k, v in settings.items() if k in known})
    with torch.device("meta"):
        return MoETransformerLanguageModel.build_model(
            cfg, SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
        )


def fresh_rest(cfg: Dict[str, Any]) -> Dict[str, Any]:
    """The rest of the state of a model that no training has led to."""
    return {
        "args": None,
        "cfg": cfg,
        "criterion": None,
        "task_state": {},
        **deepcopy(BARE),
    }


def _settings(path: str, flat: Dict[str, Any]) -> Dict[str, Any]:
    if not flat:
        raise UserError(f"{path}: there are no settings in it, neither args nor cfg")
    name = str(flat.get("_name") or flat.get("arch"))
    if name not in (MODEL_NAME, *ARCHITECTURES):
        return translated_settings(path, flat)
    defaults = {f.name: f.default for f in fields(MoETransformerLMConfig) if f.default != MISSING}
    settings = {**defaults, **ARCHITECTURES.get(name, {})}
    settings.update({key: flat[key] for key in settings if key in flat})
    settings["moe_pad_rule"] = saved_pad_rule(flat)
    # How a run was started is no matter for converting what it left.
    settings.update(ONE_PROCESS)
    check_fields(path, "model", settings, MoETransformerLMConfig)
    return {**settings, "_name": MODEL_NAME}


def _of_branch(files: BranchFiles, weights_only: bool) -> Source:
    parameters = None
    for part in files_of_branch(files):
        check_records(part)
    if not weights_only:
        model = read(files, None, None)
        settings = _settings(files.base, _flat(model))
        types = model["model"]["decoder.embed_tokens.weight"].shape[0]
        parameters = dict(build_on_meta(settings, types).named_parameters())
    try:
        state = read(files, None, parameters, stack=TensorPerExpert)
    except UserError as error:
        remedy = "add --reset-optimizer to train on with a fresh one"
        raise UserError(str(error).replace(remedy, "add --weights-only")) from error
    settings = _settings(files.base, _flat(state))
    model, saved = state.pop("model"), state.pop("last_optimizer_state", None)
    if state["cfg"] is not None:
        state["cfg"] = OmegaConf.to_container(state["cfg"], resolve=True, enum_to_str=True)
    source = Source(files.base, state, settings, model, [], None)
    set_order(source)
    if saved is not None:
        by_name = {source.order[number]: value for number, value in saved.pop("state").items()}
        source.optimizer = Optimizer(saved, by_name, {})
    return source


def files_of_branch(files: BranchFiles) -> List[str]:
    return sorted({files.shared, *files.ranks.values(), *files.shards.values()})


def _flat(state: Dict[str, Any]) -> Dict[str, Any]:
    return vars(state["args"]) if state.get("args") is not None else dict(state["cfg"]["model"])


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
    state = saved["state"]
    rest = {key: value for key, value in saved.items() if key != "state"}
    if sum(len(group["params"]) for group in saved["param_groups"]) != len(source.order):
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
    found: Dict[str, Any] = {}
    for key, value in states[0].items():
        if isinstance(value, Tensor) and value.shape == pieces[0].model[name].shape:
            found[key] = TensorPerExpert(part for state in states for part in state[key])
        elif len(states) == 1 or not isinstance(value, Tensor) or value.numel() == 1:
            found[key] = value
        else:
            raise UserError(
                f"{path}: the optimizer's {key} of {name} joins several experts and cannot be "
                "taken apart: add --weights-only"
            )
    return found


def with_settings(rest: Dict[str, Any], settings: Dict[str, Any]) -> Dict[str, Any]:
    """A state that says to be of a model of these settings."""
    if rest.get("args") is None:
        return {**rest, "cfg": {**rest["cfg"], "model": dict(settings)}}
    changed = {key: value for key, value in settings.items() if key != "_name"}
    args = Namespace(**{**vars(rest["args"]), **changed, "arch": MODEL_NAME})
    return {**rest, "args": args, "cfg": None}  # fairseq goes by `args` where both are there
