"""One view of any checkpoint of a language model; its tensors stay in mapped files."""

from __future__ import annotations

from argparse import Namespace
from copy import deepcopy
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, Dict, List, Mapping, Optional

import torch
from fairseq.data import Dictionary

from ..branch.outline import vocabulary_of
from ..branch.reading import BARE
from ..config import MoETransformerLMConfig
from ..errors import UserError
from ..models.language_model import MODEL_NAME, MoETransformerLanguageModel
from ..moe.experts import TensorPerExpert
from ..shape import shape_of
from .archive import AnyTensor

_HEAD = "choice_head.weight"  # of fine-tuning with --choice-scoring head


@dataclass
class Optimizer:
    """The optimizer state. `by_name` is None if it cannot be split by parameter, as with --fp16's
    single flat tensor; `state` is then as saved."""

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
    order: List[str]  # the trained parameters, as the optimizer numbers them
    optimizer: Optional[Optimizer]

    def per_expert(self, name: str) -> TensorPerExpert:
        """The tensor of a parameter of experts."""
        value = self.model[name]
        assert isinstance(value, TensorPerExpert), name
        return value

    @property
    def experts(self) -> int:
        """Experts in a sparse layer; 0: a dense model."""
        return self.settings["moe_expert_count"] if shape_of(self.settings).sparse else 0

    @property
    def head(self) -> int:
        """Outputs of the head that scores candidates; 0: there is none."""
        return self.model[_HEAD].shape[0] if _HEAD in self.model else 0

    @property
    def vocabulary(self) -> int:
        return vocabulary_of(self.path, self.model)


def set_order(source: Source) -> None:
    """Put the keys and parameters in our model's order. UserError if they do not fit its
    settings."""
    ours = build_on_meta(source.settings, source.vocabulary)
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
                f"{len(names) - 1} more; it is damaged or of another version: copy it again"
            )
    for name, value in source.model.items():
        if tuple(value.shape) != tuple(expected[name].shape):
            raise UserError(
                f"{source.path}: does not fit the settings in it: {name} is {tuple(value.shape)}, "
                f"not {tuple(expected[name].shape)}; copy the checkpoint again"
            )
    source.model = {name: source.model[name] for name in expected if name in source.model}
    source.order = [name for name, value in ours.named_parameters() if value.requires_grad]


def build_on_meta(settings: Dict[str, Any], vocabulary: int) -> MoETransformerLanguageModel:
    """Our model without memory for its parameters."""
    dictionary = Dictionary()
    for number in range(vocabulary - len(dictionary)):
        dictionary.add_symbol(str(number))
    known = {field.name for field in fields(MoETransformerLMConfig)}
    cfg = MoETransformerLMConfig(**{k: v for k, v in settings.items() if k in known})
    with torch.device("meta"):
        return MoETransformerLanguageModel.build_model(
            cfg, SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
        )


def fresh_rest(cfg: Dict[str, Any]) -> Dict[str, Any]:
    """The rest of the state for a model that was not trained."""
    return {"args": None, "cfg": cfg, "criterion": None, "task_state": {}, **deepcopy(BARE)}


def without(rest: Mapping[str, Any], *names: str) -> Dict[str, Any]:
    """The state without these parts of `extra_state`."""
    extra = rest.get("extra_state") or {}
    return {**rest, "extra_state": {k: v for k, v in extra.items() if k not in names}}


def with_settings(rest: Dict[str, Any], settings: Dict[str, Any]) -> Dict[str, Any]:
    """The state with these settings of the model."""
    if rest.get("args") is None:
        return {**rest, "cfg": {**rest["cfg"], "model": dict(settings)}}
    changed = {key: value for key, value in settings.items() if key != "_name"}
    args = Namespace(**{**vars(rest["args"]), **changed, "arch": MODEL_NAME})
    return {**rest, "args": args, "cfg": None}  # fairseq uses `args` if both are present
