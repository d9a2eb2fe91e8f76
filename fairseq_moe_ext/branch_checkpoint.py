"""Checkpoints of fairseq's `moe` branch, as which Meta's models were released, read in place.

Where a command is given X.pt, such a checkpoint is X-shared.pt and, for each process r that trained
it, X-rank-r.pt with that process's experts; X.pt itself does not exist. fairseq's FSDP adds -shardN
to the names. `apply()` wraps the functions of fairseq through which checkpoints are read, so that
fairseq-eval-lm, fairseq-train and `from_pretrained` take them, on any number of processes.

What is translated:

    names      experts.{i}.fc1.weight of rank file r -> row r * (experts a file) + i of our stacked
               experts.fc1.weight, as far as it is this process's
    settings   a flat `args` or a plain `cfg` of the branch's transformer_lm -> our model's
    optimizer  state by the number of the parameter in the branch's model -> by ours
"""

import functools
import glob
import logging
import os
import re
from argparse import Namespace
from dataclasses import fields
from enum import Enum
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from fairseq import checkpoint_utils, trainer
from fairseq.criterions import CRITERION_DATACLASS_REGISTRY
from fairseq.dataclass.configs import FairseqConfig
from fairseq.dataclass.utils import overwrite_args_by_name
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from omegaconf import OmegaConf
from torch import Tensor

from .compat import load_weights_only
from .config import EXPERT_GRAD_SCALES, MoETransformerLMConfig, check_overrides
from .errors import UserError
from .expert_parallel import placement, process_count
from .fully_sharded import places
from .models.language_model import MODEL_NAME
from .moe.experts import TensorPerExpert

logger = logging.getLogger(__name__)

State = Dict[str, Any]

_PART = re.compile(r"(?P<base>.+?)-(shared|rank-(?P<rank>\d+))(?P<shard>-shard\d+)?\.pt")
_EXPERT = re.compile(r"(?P<experts>.+\.moe_layer\.experts)\.(?P<index>\d+)\.(?P<name>.+)")
_GATE = re.compile(r"(?P<layer>.+\.moe_layer)\.gate\.wg\.weight")


class BranchFiles(NamedTuple):
    """The files of one checkpoint."""

    base: str  # the name by which it goes, X.pt
    shared: str
    ranks: Dict[int, str]


class PathForTraining(str):
    """The path of a checkpoint whose optimizer state is wanted, too."""

    parameters: Dict[str, Any]  # those of the optimizer, by name, in its order


def find(path: str) -> Optional[BranchFiles]:
    """The files for which `path` stands: X.pt, or one of the parts. None if it is no checkpoint of
    the branch, as is any X.pt that has experts itself. UserError if the shared file is missing."""
    if not path.endswith(".pt"):
        return None
    part = _PART.fullmatch(path)
    base = part["base"] if part else path[: -len(".pt")]
    shared: Dict[bool, str] = {}
    ranks: Dict[int, str] = {}
    for file in sorted(glob.glob(glob.escape(base) + "-*.pt"), key=len, reverse=True):
        match = _PART.fullmatch(file)
        if match is None or match["base"] != base:
            continue
        if match["rank"] is None:  # every shard has all of the shared weights
            shared[match["shard"] is None] = file
        else:
            ranks[int(match["rank"])] = file  # the shortest name last: one without a shard
    if not ranks:
        return None
    whole = base + ".pt"
    if part is None and os.path.exists(whole):
        if not _lacks_experts(whole):
            return None
        shared = {True: whole}  # the shared file under another name, as some guides advise
    if not shared:
        raise UserError(
            f"{base}-shared.pt: missing, though {ranks[min(ranks)]} is there; a checkpoint of "
            "fairseq's moe branch is both, and one -rank- file for each process: copy it again"
        )
    return BranchFiles(whole, shared.get(True) or shared[False], ranks)


def _lacks_experts(path: str) -> bool:
    """Whether a checkpoint has neither experts nor, as checkpoint.py's, names of their files."""
    state = _load(path)
    return "experts" not in state and not any(".experts." in name for name in state["model"])


def read(
    files: BranchFiles,
    overrides: Optional[Dict[str, Any]],
    parameters: Optional[Dict[str, Any]],
    stack: Callable[[List[Tensor]], Any] = torch.stack,
) -> State:
    """What fairseq/checkpoint_utils.py:load_checkpoint_to_cpu@0.12.2 returns of one file.

    The model's experts are those of this process, as TensorPerExpert of tensors that lie in mapped
    files.

    Args:
        overrides: of settings (--model-overrides).
        parameters: see PathForTraining; None: leave the optimizer state out.
        stack: makes one of what the optimizer remembers of the experts.
    """
    shared = _load(files.shared)
    if not flat_settings(shared):
        raise UserError(f"{files.shared}: there are no settings in it, neither args nor cfg")
    parts = _expert_parts(files, shared)
    state = dict(BARE)
    for source in (shared, parts[0].state):  # the branch goes by the rank file
        state.update((key, value) for key, value in source.items() if value)
    state["model"] = _model_state(shared, parts)
    state["last_optimizer_state"] = None
    if parameters is not None:
        state["last_optimizer_state"] = _optimizer_state(files, shared, parts, parameters, stack)
    state["extra_state"] = _shared_position(state)
    if state.get("args") is not None:
        state["args"] = _translated_args(files, state["args"])
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


def flat_settings(state: State) -> Dict[str, Any]:
    """The model's settings as the branch saved them: `args`, or the part `model` of `cfg`; nothing
    if neither is there."""
    if state.get("args") is not None:
        return vars(state["args"])
    return (state.get("cfg") or {}).get("model") or {}


# What a file may lack that was made for the weights alone.
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

# Reading the parts -------------------------------------------------------------------------------


class _Part(NamedTuple):
    """A rank file."""

    path: str
    state: State
    first: int  # number of its first expert
    local: int  # experts in it
    used: Sequence[int]  # those of this process, from 0 in the file


def _load(path: str) -> State:
    state = load_weights_only(path, map_location="cpu", mmap=True)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path}: not a checkpoint of fairseq: there is no model in it")
    return state


def _expert_parts(files: BranchFiles, shared: State) -> List[_Part]:
    """The rank files with experts of this process. UserError if a file that the checkpoint needs is
    missing, here or on another process, or does not belong to it."""
    settings = flat_settings(shared)
    experts = _number(settings, "moe_expert_count")
    lowest = _load(files.ranks[min(files.ranks)])
    local = _local_experts(lowest)
    if local == 0:  # a dense twin, whose only rank file holds nothing
        _check_one_run(files.shared, shared, files.ranks[min(files.ranks)], lowest)
        return [_Part(files.ranks[min(files.ranks)], lowest, 0, 0, ())]
    if experts % local != 0:
        raise UserError(
            f"{files.ranks[min(files.ranks)]}: has {local} experts a layer, which do not divide "
            f"the {experts} of {files.shared}; they are of different runs"
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
            f"{files.ranks[min(left)]} is left unread, as are all -rank- files from {needed} on: "
            f"{files.base} has {experts} experts, {local} in each file"
        )
    world_size, rank = process_count(), _rank()
    place = placement(experts, world_size, rank)
    parts = []
    for number in range(place.first // local, -(-(place.first + place.local) // local)):
        path = files.ranks[number]
        state = lowest if number == min(files.ranks) else _load(path)
        _check_one_run(files.shared, shared, path, state)
        if _local_experts(state) != local:
            raise UserError(
                f"{path}: has {_local_experts(state)} experts a layer, "
                f"{files.ranks[min(files.ranks)]} has {local}; they are of different runs"
            )
        start = number * local
        used = range(max(place.first - start, 0), min(place.first + place.local - start, local))
        parts.append(_Part(path, state, start, local, used))
    return parts


def _rank() -> int:
    return dist.get_rank() if process_count() > 1 else 0


def _local_experts(state: State) -> int:
    indices = {match["index"] for match in map(_EXPERT.fullmatch, state["model"]) if match}
    return len(indices)


def _check_one_run(path: str, state: State, other_path: str, other: State) -> None:
    """Raise UserError if two files are seen to be of different runs or updates."""
    for name, value, other_value in zip(_MARKS, _marks(state), _marks(other)):
        if value and other_value and value != other_value:
            raise UserError(
                f"{other_path}: belongs to another checkpoint than {path}: {name} "
                f"{_short(other_value)} and {_short(value)}; copy the files of one checkpoint again"
            )


_MARKS = ("num_updates", "position in the data", "optimizer", "seed", "model settings")


def _marks(state: State) -> Tuple[Any, ...]:
    """What all files of one checkpoint have in common."""
    history = (state.get("optimizer_history") or [{}])[-1]
    extra = state.get("extra_state") or {}
    args, cfg = state.get("args"), state.get("cfg") or {}
    seed = getattr(args, "seed", None) if args is not None else cfg.get("common", {}).get("seed")
    model = {
        key: value
        for key, value in flat_settings(state).items()
        if key in _FIELDS or key in ("arch", "_name")
    }
    return (
        history.get("num_updates"),
        extra.get("train_iterator"),
        history.get("optimizer_name"),
        seed,
        model,
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."


def _model_state(shared: State, parts: List[_Part]) -> Dict[str, Any]:
    """The state of our model: shared tensors, and experts as TensorPerExpert."""
    model = dict(shared["model"])
    model.pop("decoder.embed_positions.weights", None)  # the sinusoids, in old checkpoints
    for part in parts:
        for key in part.state["model"]:
            match = _EXPERT.fullmatch(key)
            if match is None or int(match["index"]) != 0:
                continue
            stack = model.setdefault(f"{match['experts']}.{match['name']}", TensorPerExpert())
            for index in part.used:
                name = f"{match['experts']}.{index}.{match['name']}"
                if name not in part.state["model"]:
                    raise UserError(f"{part.path}: {name} is not in it; the file is damaged")
                stack.append(part.state["model"][name])
    return model


# Settings ----------------------------------------------------------------------------------------

_FIELDS = {field.name: field for field in fields(MoETransformerLMConfig)}

# Settings of the branch that change what the model computes and that we do not have, with the value
# that means they are off.
_UNSUPPORTED: Dict[str, Any] = {
    "adaptive_input": False,
    "adaptive_softmax_cutoff": None,
    "character_embeddings": False,
    "decoder_normalize_before": True,
    "decoder_layers_to_keep": None,
    "quant_noise_scalar": 0,
    "use_stable_embedding": False,
    "base_layers": 0,
    "dummy_a2a": False,
    "scale_fc": False,
    "scale_attn": False,
    "scale_heads": False,
    "scale_resids": False,
}

# How the checkpoint was trained is no matter for reading it; fairseq-train goes by its own command.
ONE_PROCESS: Dict[str, Any] = {
    "ddp_backend": "legacy_ddp",
    "fp16": False,
    "memory_efficient_fp16": False,
    "fp16_no_flatten_grads": False,
    "bf16": False,
    "max_tokens": None,
    "batch_size": None,
}
_OWN_SETTINGS: Dict[str, Any] = {
    **ONE_PROCESS,
    "moe_expert_ffn_dim": None,  # the branch has the flag and never reads it
    "moe_capacity_factor": None,
    "moe_dropless": False,
    "moe_routing_scope": "process",
    "moe_experts_on_disk": False,
}


def translated_settings(path: str, saved: Dict[str, Any]) -> Dict[str, Any]:
    """Our model's settings from the branch's flat ones; UserError for what we do not have."""
    arch = str(saved.get("_name") or saved.get("arch"))
    if not arch.startswith("transformer_lm"):
        raise UserError(
            f"{path}: a model of the architecture {arch}; of fairseq's moe branch, transformer_lm "
            "and its sizes can be read (transformer_lm_gpt, ..._gpt2_*, ..._gpt3_*)"
        )
    unsupported = {name: off for name, off in _UNSUPPORTED.items() if saved.get(name, off) != off}
    unsupported = {name: saved[name] for name in unsupported if saved[name] or unsupported[name]}
    dim = saved.get("decoder_embed_dim")
    for name in ("decoder_input_dim", "decoder_output_dim"):
        if saved.get(name, dim) != dim:
            unsupported[name] = saved[name]
    if unsupported:
        listed = ", ".join(f"{name} {_short(value)}" for name, value in unsupported.items())
        raise UserError(
            f"{path}: was trained with settings that this plugin does not have, so it would "
            f"compute something else: {listed}"
        )
    stock = {field.name: field.default for field in fields(TransformerLanguageModelConfig)}
    settings: Dict[str, Any] = {}
    for name, field in _FIELDS.items():
        value = saved.get(name, stock.get(name, field.default))  # old files lack newer settings
        if not str(value).startswith("${"):
            settings[name] = value
    settings.update(_OWN_SETTINGS)
    settings["activation_dropout"] = (
        saved.get("activation_dropout") or saved.get("relu_dropout") or 0.0
    )
    fraction = settings["moe_eval_capacity_token_fraction"]
    settings["moe_eval_capacity_token_fraction"] = min(fraction, 1.0) if fraction > 0 else -1.0
    if str(settings["moe_normalize_expert_grad"]) not in [str(x.value) for x in EXPERT_GRAD_SCALES]:
        settings["moe_normalize_expert_grad"] = "world_size"  # what the branch does with others
    settings.setdefault("tokens_per_sample", 1024)
    settings.setdefault("max_target_positions", None)
    settings["_name"] = MODEL_NAME
    return settings


def complete_cfg(model: Dict[str, Any], saved: Dict[str, Any]) -> Dict[str, Any]:
    """fairseq's settings with the saved values, as far as this version knows them, and those of
    our model."""
    cfg = OmegaConf.to_container(OmegaConf.structured(FairseqConfig), enum_to_str=True)
    for group, default in cfg.items():
        value = saved.get(group)
        if isinstance(default, dict) and isinstance(value, dict):
            default.update({key: v for key, v in value.items() if key in default})
        elif group in saved:
            cfg[group] = value
    cfg["model"] = model
    cfg["task"] = _known(saved.get("task") or {}, TASK_DATACLASS_REGISTRY, "language_modeling")
    cfg["criterion"] = _known(
        saved.get("criterion") or {}, CRITERION_DATACLASS_REGISTRY, "moe_cross_entropy"
    )
    return cfg


def _known(saved: Dict[str, Any], registry: Dict[str, Any], default: str) -> Dict[str, Any]:
    """The settings that the dataclass of the saved name has; of the default name, if it is not
    registered here."""
    name = saved.get("_name")
    name = name if name in registry else default
    allowed = {field.name for field in fields(registry[name])}
    return {**{key: value for key, value in saved.items() if key in allowed}, "_name": name}


def _translated_args(files: BranchFiles, saved: Namespace) -> Namespace:
    """The flat `args` with our model's settings in place of the branch's."""
    args = Namespace(**vars(saved))
    for name, value in translated_settings(files.base, vars(saved)).items():
        if name not in _OWN_SETTINGS or name.startswith("moe_"):  # the rest belongs to all groups
            setattr(args, name, value)
    args.arch = MODEL_NAME
    del args._name
    if args.task not in TASK_DATACLASS_REGISTRY:
        args.task = "language_modeling"
    if args.criterion not in CRITERION_DATACLASS_REGISTRY:
        args.criterion = "moe_cross_entropy"
    args.distributed_world_size = 1
    args.ddp_backend = "legacy_ddp"
    args.fp16 = args.memory_efficient_fp16 = False
    return args


def _number(settings: Dict[str, Any], name: str) -> int:
    return int(settings.get(name) or 0)


def _shared_position(state: State) -> Dict[str, Any]:
    """`extra_state` with the place in the data as checkpoint.py keeps it, for any number of
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
        place = {"batches": batches, "of": None, "sentences": batches * batch_size}
        extra["train_iterator"]["all_processes"] = place
    return extra


# Optimizer ---------------------------------------------------------------------------------------


def _optimizer_state(
    files: BranchFiles,
    shared: State,
    parts: List[_Part],
    parameters: Dict[str, Any],
    stack: Callable[[List[Tensor]], Any],
) -> Optional[State]:
    """The state of an optimizer of our parameters. UserError if it cannot be had."""
    if shared.get("last_optimizer_state") is None:
        logger.warning(f"{files.base} has no optimizer state; updates are counted from 0")
        return None
    saved = shared["last_optimizer_state"]
    groups = saved["param_groups"]
    numbers = parameter_numbers(shared, parts[0].state)
    in_groups = sorted(number for group in groups for number in group["params"])
    if len(groups) != 1 or in_groups != list(range(len(numbers))):
        raise _unfit(
            files,
            f"it is of {len(in_groups)} tensors in {len(groups)} groups, the model has "
            f"{len(numbers)} parameters; --ddp-backend fully_sharded and --fp16 with flat "
            "gradients write such",
        )
    state: Dict[int, State] = {}
    for number, (name, parameter) in enumerate(parameters.items()):
        if name in numbers:
            entries = [saved["state"].get(numbers[name])]
        else:
            entries = _expert_entries(files, parts, numbers, name)
        if all(entry is None for entry in entries):
            continue  # no update has touched it
        merged = _merged(files, name, entries, stack if name not in numbers else None)
        if "step" not in merged and "step" in groups[0]:  # apex's Adam counts for the group
            merged["step"] = groups[0]["step"]
        for key, value in merged.items():
            same_kind = (
                isinstance(value, (Tensor, TensorPerExpert)) and len(value.shape) == parameter.dim()
            )
            if same_kind and value.shape != parameter.shape:
                raise _unfit(
                    files, f"{key} of {name} is {tuple(value.shape)}, not {tuple(parameter.shape)}"
                )
        state[number] = merged
    group = {**groups[0], "params": list(range(len(parameters)))}
    return {**saved, "param_groups": [group], "state": state}


def parameter_numbers(shared: State, part: State) -> Dict[str, int]:
    """The number of each parameter in the branch's model, by its name in the files: experts stand
    behind their gate, the rest in the order of the shared file. Every process counts its own."""
    names: List[str] = []
    tied = flat_settings(shared).get("share_decoder_input_output_embed")
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
    """Whether an optimizer has what goes by this name in a file: no buffers, tied weights once."""
    buffers = (".version", "._float_tensor", ".embed_positions.weights")
    return not name.endswith(buffers) and not (tied and name == "decoder.output_projection.weight")


def _expert_entries(
    files: BranchFiles, parts: List[_Part], numbers: Dict[str, int], name: str
) -> List[Optional[State]]:
    """The states of this process's experts for one of our stacked parameters."""
    experts, _, rest = name.partition(".experts.")
    entries = []
    for part in parts:
        saved = (part.state.get("last_optimizer_state") or {}).get("state", {})
        for index in part.used:
            key = f"{experts}.experts.{index}.{rest}"
            if key not in numbers:
                raise _unfit(files, f"there is nothing for {name}")
            entries.append(saved.get(numbers[key]))
    if not entries:
        raise _unfit(files, f"there is nothing for {name}")
    return entries


def _merged(
    files: BranchFiles,
    name: str,
    entries: List[Optional[State]],
    stack: Optional[Callable[[List[Tensor]], Any]],
) -> State:
    """One parameter's state from that of its experts; without `stack`, of a shared one."""
    if any(entry is None or entry.keys() != entries[0].keys() for entry in entries):
        raise _unfit(files, f"that of {name} is not there for all experts")
    merged: State = {}
    for key, first in entries[0].items():
        values = [entry[key] for entry in entries]
        if isinstance(first, Tensor) and first.dim() > 0:
            merged[key] = first.clone() if stack is None else stack(values)
        elif all(value == first for value in values):
            merged[key] = first
        else:
            raise _unfit(files, f"{key} of {name} differs between experts")
    return merged


def _unfit(files: BranchFiles, why: str) -> UserError:
    return UserError(
        f"{files.base}: its optimizer state cannot be continued: {why}; add --reset-optimizer to "
        "train on with a fresh one"
    )


# Writing -----------------------------------------------------------------------------------------

# `cfg.model` of the branch's transformer_lm beyond what we have.
_BRANCH_DEFAULTS: Dict[str, Any] = {
    "_name": "transformer_lm_gpt",
    "relu_dropout": 0.0,
    "decoder_normalize_before": True,
    "adaptive_softmax_cutoff": None,
    "adaptive_softmax_dropout": 0.0,
    "adaptive_softmax_factor": 4.0,
    "character_embeddings": False,
    "character_filters": "[(1, 64), (2, 128), (3, 192), (4, 256), (5, 256), (6, 256), (7, 256)]",
    "character_embedding_dim": 4,
    "char_embedder_highway_layers": 2,
    "adaptive_input": False,
    "adaptive_input_factor": 4.0,
    "adaptive_input_cutoff": None,
    "tie_adaptive_weights": False,
    "tie_adaptive_proj": False,
    "offload_activations": False,
    "decoder_layerdrop": 0.0,
    "decoder_layers_to_keep": None,
    "quant_noise_pq": 0.0,
    "quant_noise_pq_block_size": 8,
    "quant_noise_scalar": 0.0,
    "min_params_to_wrap": 100000000,
    "dummy_a2a": False,
    "use_stable_embedding": False,
    "base_layers": 0,
    "base_sublayers": 1,
    "base_shuffle": 0,
    "add_bos_token": False,
    "tpu": False,
    "world_size": 1,
    "distributed_rank": 0,
    "batch_size_valid": None,
}
_NOT_THE_BRANCH_S = {
    "bf16",
    "max_tokens",
    "moe_capacity_factor",
    "moe_dropless",
    "moe_experts_on_disk",
    "moe_routing_scope",
}


def branch_settings(path: str, settings: Dict[str, Any]) -> Dict[str, Any]:
    """`cfg.model` as the branch has it, from our model's settings; UserError for what it cannot
    compute. How it was trained (dropless, capacity) has no place there; dropless evaluation has."""
    ffn_dim = settings["decoder_ffn_embed_dim"]
    if settings["moe_expert_ffn_dim"] not in (None, ffn_dim):
        raise UserError(
            f"{path}: its experts are {settings['moe_expert_ffn_dim']} wide (--moe-expert-ffn-dim) "
            f"and its dense layers {ffn_dim}; the branch gives both one width, so there is no such "
            "model in its layout"
        )
    kept = {
        key: str(value) if isinstance(value, Enum) else value
        for key, value in settings.items()
        if key in _FIELDS and key not in _NOT_THE_BRANCH_S
    }
    dim = settings["decoder_embed_dim"]
    made = {**_BRANCH_DEFAULTS, "decoder_input_dim": dim, "decoder_output_dim": dim, **kept}
    made.update(_name="transformer_lm_gpt", moe_expert_ffn_dim=None)
    if settings["moe_dropless"]:
        made["moe_eval_capacity_token_fraction"] = 1.0
    if made["max_target_positions"] is None:
        made["max_target_positions"] = made["tokens_per_sample"]
    return made


def branch_rest(rest: State, model: Dict[str, Any], ranks: int) -> State:
    """All of a file but model and optimizer, with the settings as `cfg` and the place in the data
    as a process of so many counts it."""
    if rest.get("cfg") is not None:
        cfg = dict(rest["cfg"])
    else:
        cfg = complete_cfg({}, {})
    task = {"tokens_per_sample": model["tokens_per_sample"], "data": "???"}
    task.update({k: v for k, v in (cfg.get("task") or {}).items() if k in _TASK_FIELDS})
    cfg["task"] = {**task, "_name": "language_modeling"}
    cfg["model"] = model
    cfg["distributed_training"] = {
        **(cfg.get("distributed_training") or {}),
        "distributed_world_size": ranks,
    }
    extra = dict(rest.get("extra_state") or {})
    position = extra.get("train_iterator")
    if position is not None:
        position = dict(position)
        place = position.pop("all_processes", None)
        batches = place["batches"] if place else position.get("iterations_in_epoch", 0)
        position["iterations_in_epoch"] = batches // ranks
        extra["train_iterator"] = position
    return {**rest, "args": None, "cfg": cfg, "extra_state": extra}


_TASK_FIELDS = {
    "data",
    "sample_break_mode",
    "tokens_per_sample",
    "output_dictionary_size",
    "self_target",
    "future_target",
    "past_target",
    "add_bos_token",
    "max_target_positions",
    "shorten_method",
    "shorten_data_split_list",
    "pad_to_fixed_length",
    "pad_to_fixed_bsz",
    "seed",
    "batch_size",
    "batch_size_valid",
    "dataset_impl",
    "data_buffer_size",
    "tpu",
    "use_plasma_view",
    "plasma_path",
}


def branch_order(names: Iterable[str]) -> List[str]:
    """The keys of the shared file from those of our model: a layer's final norm comes last."""
    order: List[str] = []
    held: List[str] = []  # the final norm of the layer that is being listed
    for name in names:
        if ".experts." in name:
            continue
        if ".final_layer_norm." in name:
            held.append(name)
            continue
        if held and not name.startswith(held[0].split("final_layer_norm")[0]):
            order, held = order + held, []
        order.append(name)
    return order + held


def is_part(path: str, base: str) -> bool:
    """Whether a file is the shared one or one of the ranks' of BASE.pt."""
    match = _PART.fullmatch(path)
    return match is not None and match["base"] == base


# fairseq's functions -----------------------------------------------------------------------------


def apply() -> None:
    """Put the wrappers in place, once."""
    if hasattr(checkpoint_utils.load_checkpoint_to_cpu, "reads_branch"):
        return
    _name_an_existing_file()
    _read_the_branch()
    _measure_as_the_branch()
    _train_no_experts_on_disk()
    _restore_from_the_branch()
    _finetune_from_the_branch()


def _name_an_existing_file() -> None:
    """fairseq/checkpoint_utils.py:422 wants the file that it is given to exist."""
    stock = checkpoint_utils.get_maybe_sharded_checkpoint_filename

    @functools.wraps(stock)
    def get_maybe_sharded_checkpoint_filename(filename, *args, **kwargs):
        files = find(filename)
        return stock(filename, *args, **kwargs) if files is None else files.shared

    checkpoint_utils.get_maybe_sharded_checkpoint_filename = get_maybe_sharded_checkpoint_filename


def _read_the_branch() -> None:
    """fairseq/checkpoint_utils.py:288 reads one file."""
    stock = checkpoint_utils.load_checkpoint_to_cpu

    @functools.wraps(stock)
    def load_checkpoint_to_cpu(path, arg_overrides=None, *args, **kwargs):
        files = find(path)
        if files is None:
            state = stock(path, arg_overrides, *args, **kwargs)
        else:
            state = read(files, arg_overrides, getattr(path, "parameters", None))
        check_overrides(arg_overrides or {}, state.get("cfg") or {})
        return state

    load_checkpoint_to_cpu.reads_branch = True
    checkpoint_utils.load_checkpoint_to_cpu = load_checkpoint_to_cpu


def _measure_as_the_branch() -> None:
    """fairseq-eval-lm goes by the task's settings on its own command line. Where the branch padded
    the last block to full length, that gives the experts more capacity and the padding takes some
    of it, so it has to be padded here, too, for the same perplexity. `--model-overrides
    "{'pad_to_fixed_length': False}"` leaves it as it is. (fairseq/checkpoint_utils.py:393)"""
    stock = checkpoint_utils.load_model_ensemble_and_task

    @functools.wraps(stock)
    def load_model_ensemble_and_task(filenames, *args, **kwargs):
        models, cfg, task = stock(filenames, *args, **kwargs)
        wanted = cfg.task.get("pad_to_fixed_length", False)
        settings = getattr(task, "args", None)
        if wanted and not getattr(settings, "pad_to_fixed_length", True) and find(filenames[-1]):
            settings.pad_to_fixed_length = True
            logger.info(
                "blocks are padded to their full length, as when the checkpoint was trained"
            )
        return models, cfg, task

    checkpoint_utils.load_model_ensemble_and_task = load_model_ensemble_and_task


def _train_no_experts_on_disk() -> None:
    """fairseq/trainer.py:47 would fail on parameters that are not there."""
    stock = trainer.Trainer.__init__

    @functools.wraps(stock)
    def __init__(self, cfg, *args, **kwargs):
        if getattr(cfg.model, "moe_experts_on_disk", False):
            raise UserError(
                "--moe-experts-on-disk: experts that stay in a checkpoint's files cannot be "
                "trained; drop it (it is for fairseq-eval-lm's --model-overrides)"
            )
        stock(self, cfg, *args, **kwargs)

    trainer.Trainer.__init__ = __init__


def _restore_from_the_branch() -> None:
    """fairseq/trainer.py:446 wants the file to exist, and has one process read it for all; here
    each reads its own experts."""
    stock = trainer.Trainer.load_checkpoint

    @functools.wraps(stock)
    def load_checkpoint(self, filename, reset_optimizer=False, *args, **kwargs):
        files = find(filename)
        if files is None:
            return stock(self, filename, reset_optimizer, *args, **kwargs)
        path = PathForTraining(files.shared)
        if not reset_optimizer:
            common = self.cfg.common
            halves = common.fp16 or common.bf16
            lean = common.memory_efficient_fp16 or common.memory_efficient_bf16
            if halves and not lean and not common.fp16_no_flatten_grads:
                raise _unfit(
                    files,
                    "--fp16 and --bf16 keep one flat tensor for all parameters unless "
                    "--fp16-no-flatten-grads is given; give it",
                )
            path.parameters = {  # shapes
                name: torch.empty(place.shape, device="meta")
                for name, place in places(self.get_model()).items()
                if place.parameter.requires_grad
            }
        settings = self.cfg.checkpoint
        before = settings.load_checkpoint_on_all_dp_ranks
        settings.load_checkpoint_on_all_dp_ranks = True
        try:
            return stock(self, path, reset_optimizer, *args, **kwargs)
        finally:
            settings.load_checkpoint_on_all_dp_ranks = before

    trainer.Trainer.load_checkpoint = load_checkpoint


def _finetune_from_the_branch() -> None:
    """fairseq/checkpoint_utils.py:229 wants --finetune-from-model to exist."""
    stock = checkpoint_utils.load_checkpoint

    @functools.wraps(stock)
    def load_checkpoint(cfg, *args, **kwargs):
        if cfg.finetune_from_model is not None:
            files = find(cfg.finetune_from_model)
            if files is not None:
                cfg.finetune_from_model = files.shared
        return stock(cfg, *args, **kwargs)

    checkpoint_utils.load_checkpoint = load_checkpoint
