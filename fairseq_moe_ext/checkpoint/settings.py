"""The settings in a checkpoint, and overrides of them, checked before anything is built from them.

A file without code may still cause code to run: through an architecture that evaluates its
settings, or a task or tokenizer that downloads what they name. So a file may name only what our
commands support, and each setting must have the type that its dataclass declares. What the user's
own imported code registers is accepted.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import math
import re
import typing
from argparse import Namespace
from numbers import Number
from typing import Any, Dict, Iterator, List, Mapping, Optional, Set, Tuple

from fairseq.dataclass.configs import FairseqConfig
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_DATACLASS_REGISTRY, TASK_REGISTRY
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import DictConfig, open_dict

from .. import ours
from ..config import defaults
from ..errors import UserError
from ..literals import literal, plain
from ..wording import did_you_mean, short

logger = logging.getLogger(__name__)

_CRITERIA = {
    "adaptive_loss",
    "cross_entropy",
    "label_smoothed_cross_entropy",
    "label_smoothed_cross_entropy_with_rdrop",
}
# Strings that transformer_lm evaluates: fairseq/models/transformer_lm.py:283@0.12.2,
# fairseq/models/transformer_lm.py:295@0.12.2,
# fairseq/models/transformer/transformer_decoder.py:147@0.12.2,
# fairseq/modules/multihead_attention.py:96@0.12.2
_EXPRESSIONS = {
    "adaptive_input_cutoff",
    "adaptive_softmax_cutoff",
    "character_filters",
    "decoder_xformers_att_config",
}
_BUILT = {"model", "task", "criterion"} | {
    field.name
    for field in dataclasses.fields(FairseqConfig)
    if dataclasses.is_dataclass(field.type)
}
_READING = {"bpe", "tokenizer", "scoring", "task"}  # groups whose settings name files to be read
_MOST = 2**20  # layers, experts, width of a layer
_SIZES = {
    "decoder_attention_heads",
    "decoder_embed_dim",
    "decoder_ffn_embed_dim",
    "decoder_input_dim",
    "decoder_layers",
    "decoder_output_dim",
    "moe_expert_count",
    "moe_expert_ffn_dim",
    "moe_latent_dim",
    "moe_null_experts",
    "moe_shared_expert_ffn_dim",
    "moe_shared_experts",
}
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.self_attn\.")
# omegaconf's: another setting's value, as ${common.fp16}; not what calls, as ${oc.env:HOME}
_REFERENCE = re.compile(r"\$\{[\w.]+\}")


def check_settings(path: str, state: Dict[str, Any]) -> None:
    """Raise UserError for a setting of another type than its dataclass says."""
    _check_form(path, state)
    args, cfg = state.get("args"), state.get("cfg")
    if args is not None:
        kinds = _flat_kinds(vars(args))
        for name, value in vars(args).items():
            if not any(_fits(value, kind) for kind in kinds.get(name, [Any])):
                raise _misfit(path, "", name, value, kinds[name][0])
    _check_sizes(path, state)
    for group, settings in _groups({"cfg": cfg}):
        kind = _dataclass_of(group, settings.get("_name"))
        if kind is not None:
            check_fields(path, group, settings, kind)
    for group, settings in _groups(state):
        _check_values(path, group, settings)


def _check_form(path: str, state: Dict[str, Any]) -> None:
    """Raise UserError unless the settings are groups of plain values by name."""
    args, cfg = state.get("args"), state.get("cfg")
    for kind, value in ((Namespace, args), (dict, cfg)):
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{path}: expected settings, but found {short(repr(value))}; {_REMEDY}")
    for group, settings in (cfg or {}).items():
        if group in _BUILT and not isinstance(settings, (dict, Namespace, type(None))):
            raise _misfit(path, "", group, settings, "a group of settings")
    for group, settings in _groups(state):
        for name, value in settings.items():
            if not isinstance(name, str) or not _is_plain(value):
                raise _misfit(path, group, name, value, "a setting")


def _check_values(path: str, group: str, settings: Dict[str, Any]) -> None:
    """Raise UserError for an invalid expression, or for an address on the network."""
    for name in _EXPRESSIONS & settings.keys() if group in ("", "model") else ():
        _check_expression(path, group, name, settings[name])
    files = set(settings) if group in _READING else set()
    if group == "":
        files = settings.keys() & _flat_kinds(settings, _READING).keys()
    for name in files:
        _check_file(path, group, name, settings)


def _check_sizes(path: str, state: Dict[str, Any]) -> None:
    """Raise UserError for sizes that would exhaust memory when the model is built, and that the
    file's own tensors contradict."""
    weights = state.get("model")
    matches = [_LAYER.match(str(name)) for name in weights] if isinstance(weights, dict) else []
    layers = max((int(match[1]) + 1 for match in matches if match), default=None)
    for group, settings in _groups(state):
        for name in _SIZES & settings.keys() if group in ("", "model") else ():
            value = settings[name]
            most = layers if name == "decoder_layers" and layers is not None else _MOST
            if isinstance(value, int) and value > most:
                kind = f"{most} at most" if most == _MOST else f"{most} as its tensors"
                raise _misfit(path, group, name, value, kind)


def check_fields(path: str, group: str, settings: Dict[str, Any], kind: type) -> None:
    """Raise UserError for a setting that is not what a dataclass says."""
    kinds = _kinds(kind)
    for name, value in settings.items():
        if name in kinds and not _fits(value, kinds[name]):
            raise _misfit(path, group, name, value, kinds[name])


def drop_unknown(path: str, state: Dict[str, Any]) -> None:
    """Drop settings of our kinds that other versions had. fairseq ignores them only in a model of
    one file (fairseq/checkpoint_utils.py:473@0.12.2), and refuses them in a task, a criterion and a
    model of several shards. Warns of what no other group says, too."""
    groups = dict(_groups({"cfg": state.get("cfg")}))
    for group, settings in groups.items():
        kind = _dataclass_of(group, settings.get("_name"))
        if kind is None or not ours.is_ours(kind):
            continue
        for name in sorted(settings.keys() - _kinds(kind).keys()):
            value = settings.pop(name)
            if not any(name in others for others in groups.values()):
                logger.warning(
                    f"{path}: its setting {group}.{name} is {short(repr(value))}, which this "
                    "version does not have: it is ignored; to keep it, use the version that wrote "
                    "the file"
                )


def take_overrides(overrides: Mapping[str, Any], cfg: Mapping[str, Any]) -> None:
    """Raise UserError for an unknown name in --model-overrides of a language model, and set those
    that the saved settings lack, because the file is older. fairseq ignores both
    (fairseq/dataclass/utils.py:453@0.12.2), so it would evaluate with other settings than the user
    wants.

    Args:
        cfg: the checkpoint's settings by group, in which fairseq has set the names that it knows.
    """
    name = ours.name_of(cfg.get("model"))
    model_class = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)
    own = model_class is not None and ours.is_ours(model_class)
    if not own and model_class is not TransformerLanguageModel:
        return
    known = _known_names(cfg)
    for key in overrides.keys() - known:
        remedy = did_you_mean(key, known) or "; docs/flags.md lists the model's"
        # no flag is named: from_pretrained takes overrides, too
        raise UserError(f"override '{key}': the model and fairseq have no such setting{remedy}")
    model = cfg["model"]
    if own and isinstance(model, DictConfig):
        with open_dict(model):
            model.update({k: v for k, v in overrides.items() if k in defaults() and k not in model})


def _known_names(cfg: Mapping[str, Any]) -> Set[str]:
    """The names of a checkpoint's settings, of the model's and of all that fairseq declares."""
    kinds: List[Any] = [*_kinds(FairseqConfig).values(), *TASK_DATACLASS_REGISTRY.values()]
    for registry in REGISTRIES.values():
        kinds += registry["dataclass_registry"].values()
    known = {*cfg, *defaults(), "world_size"}  # the last is in the branch's guides, without effect
    for kind in kinds:
        known.update(getattr(kind, "__dataclass_fields__", ()))
    for group in cfg.values():
        known.update(vars(group) if isinstance(group, Namespace) else ())
        known.update(group if isinstance(group, Mapping) else ())
    return known


def check_buildable(path: str, state: Dict[str, Any], with_task: bool) -> None:
    """Raise UserError unless our commands support the model, and the task and criterion if they are
    also built from the file."""
    model = _named(state, "model", "arch")
    if model is None:
        raise UserError(f"{path}: its settings name no architecture; use another checkpoint")
    model_class = ARCH_MODEL_REGISTRY.get(model) or MODEL_REGISTRY.get(model)
    if model_class is None:
        raise UserError(not_registered(path, "architecture", model))
    if not _is_good(model_class, {TransformerLanguageModel}):
        raise UserError(
            f"{path}: has the architecture {short(repr(model))}; this plugin loads only its own "
            "models and stock transformer_lm: run without --user-dir"
        )
    if not with_task:
        return
    task = _named(state, "task", "task")
    if task is not None and task not in TASK_REGISTRY:
        raise UserError(not_registered(path, "task", task))
    if not _is_good(TASK_REGISTRY.get(task), {LanguageModelingTask}):
        raise UserError(
            f"{path}: has the task {short(repr(task))}; this plugin supports only its own tasks "
            "and stock language_modeling: run without --user-dir"
        )
    criteria = REGISTRIES["criterion"]["registry"]
    criterion = _named(state, "criterion", "criterion")
    if criterion is not None and criterion not in _CRITERIA:
        if criterion not in criteria:
            raise UserError(not_registered(path, "criterion", criterion))
        if not _is_good(criteria.get(criterion), set()):
            raise UserError(
                f"{path}: has the criterion {short(repr(criterion))}; this plugin supports only "
                f"its own criterions and {', '.join(sorted(_CRITERIA))}: run without --user-dir"
            )


def not_registered(path: str, kind: str, name: str) -> str:
    """What to say of a model, task or criterion that no plugin here has registered."""
    return (
        f"{path}: has the {kind} {short(repr(name))}, which is not registered: name the plugin "
        "that registers it (--user-dir)"
    )


def _is_good(cls: Optional[type], good: set) -> bool:
    """Whether a class is one of `good`, or not stock's."""
    return cls is not None and (cls in good or not ours.is_stocks(cls))


def _named(state: Dict[str, Any], group: str, of_args: str) -> Any:
    """The name under which something is registered, or None."""
    if state.get("args") is not None:
        name = getattr(state["args"], of_args, None)
    else:
        settings = (state.get("cfg") or {}).get(group)
        name = dict(_groups({"cfg": {group: settings}})).get(group, {}).get("_name")
    return name if isinstance(name, str) else None


def _groups(state: Dict[str, Any]) -> Iterator[Tuple[str, Dict[str, Any]]]:
    """Name of a group of settings, "" for flat ones, and the settings."""
    if state.get("args") is not None:
        yield "", vars(state["args"])
    for group, settings in (state.get("cfg") or {}).items():
        settings = vars(settings) if isinstance(settings, Namespace) else settings
        yield str(group), settings if isinstance(settings, dict) else {"_name": settings}


def _dataclass_of(group: str, name: Any) -> Optional[type]:
    if not isinstance(name, (str, type(None))):
        return None
    if group == "model":
        return getattr(ARCH_MODEL_REGISTRY.get(name), "__dataclass", None)
    if group == "task":
        return TASK_DATACLASS_REGISTRY.get(name)
    if group in REGISTRIES:
        return REGISTRIES[group]["dataclass_registry"].get(name)
    kind = _kinds(FairseqConfig).get(group)
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def _flat_kinds(flat: Dict[str, Any], groups: Any = None) -> Dict[str, List[Any]]:
    """Name of a flat setting -> the types that it may be of, in one group or another."""
    kinds: Dict[str, List[Any]] = {}
    for group in {*_kinds(FairseqConfig), *REGISTRIES} if groups is None else groups:
        kind = _dataclass_of(group, flat.get("arch" if group == "model" else group))
        for name, type_of in _kinds(kind).items() if kind is not None else ():
            kinds.setdefault(name, []).append(type_of)
            if name == "data":  # a list in old files (fairseq/checkpoint_utils.py:675@0.12.2)
                kinds[name].append(List[str])
    return kinds


def _kinds(kind: type) -> Dict[str, Any]:
    return {field.name: field.type for field in dataclasses.fields(kind)}


def _fits(value: Any, kind: Any) -> bool:
    """Whether a saved value has a type. A list or number may also be text, as in old files."""
    if value is None or kind is Any:
        return True
    if isinstance(value, str) and value.startswith("${"):  # another setting's
        return True
    if typing.get_origin(kind) is typing.Union:
        return any(
            _fits(value, option) for option in typing.get_args(kind) if option is not type(None)
        )
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return isinstance(value, (str, int, kind))
    if kind is str:
        return isinstance(value, (str, Number))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        inner = vars(value) if isinstance(value, Namespace) else value
        kinds = _kinds(kind)
        return isinstance(inner, dict) and all(
            _fits(item, kinds.get(name, Any)) for name, item in inner.items()
        )
    if isinstance(value, str):
        try:
            value = plain(value)
        except ValueError:
            return False
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, (list, tuple)) else [value]
        return all(_fits(item, *typing.get_args(kind)) for item in items)
    if typing.get_origin(kind) is dict or kind is dict:
        return isinstance(value, (dict, Namespace))
    if kind is float or kind is bool:
        return isinstance(value, Number)
    if kind is int:
        return isinstance(value, (int, float)) and math.isfinite(value) and value % 1 == 0
    return True


def _is_plain(value: Any) -> bool:
    """Whether a value contains only numbers and strings, none of which calls a resolver."""
    if isinstance(value, str):
        return "${" not in _REFERENCE.sub("", value)
    if isinstance(value, Namespace):
        value = vars(value)
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (Number, enum.Enum))


def _check_expression(path: str, group: str, name: str, value: Any) -> None:
    if isinstance(value, str):
        try:
            literal(value)
        except UserError:
            raise _misfit(path, group, name, value, "a list of numbers") from None


def _check_file(path: str, group: str, name: str, settings: Dict[str, Any]) -> None:
    """Raise UserError for an address on the network that is not one of stock's defaults."""
    value = settings[name]
    if not isinstance(value, str) or "://" not in value:
        return
    for one in (group,) if group else _READING:
        kind = _dataclass_of(one, settings.get("_name" if group else one))
        if kind is not None and getattr(kind(), name, None) == value:
            return
    raise _misfit(path, group, name, value, "a file of this machine")


_REMEDY = "it is damaged or malicious: use another checkpoint"


def _misfit(path: str, group: str, name: Any, value: Any, kind: Any) -> UserError:
    if not isinstance(kind, str):
        kind = getattr(kind, "__name__", None) or str(kind).replace("typing.", "")
    name = f"{group}.{name}" if group else name
    return UserError(f"{path}: its setting {name} is {short(repr(value))}, not {kind}; {_REMEDY}")
