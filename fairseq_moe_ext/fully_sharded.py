"""Models whose shared parameters are sharded over processes (`--ddp-backend fully_sharded`).

fairscale's FSDP (Rajbhandari et al. 2020, arXiv 1910.02054, stage 3) joins the parameters of a
wrapped module into one flat tensor and shards it over processes; the whole tensor is gathered when
the module computes. Experts are already distributed (expert_parallel.py), so FSDP
must leave them alone: it skips parameters that have the attribute `_is_sharded`
(fairscale/nn/data_parallel/fully_sharded_data_parallel.py:407@0.4.13).

Checkpoints have the names, shapes and numbers of the model without FSDP.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Optional, TypeVar

import torch
import torch.distributed as dist
from fairseq.distributed import fsdp_wrap
from fairseq.distributed.fully_sharded_data_parallel import FullyShardedDataParallel, has_FSDP
from torch import Tensor, nn

from .errors import UserError

ModuleType = TypeVar("ModuleType", bound=nn.Module)

if has_FSDP:
    from fairscale.nn.misc import FlattenParamsWrapper
    from fairscale.nn.wrap.auto_wrap import ConfigAutoWrap

_WRAPPERS = ("_fsdp_wrapped_module.", "_fpw_module.")  # what FSDP puts into names


# ---- Building


def is_wrapping() -> bool:
    """Whether the model that is being built is to be sharded (fairseq_cli/train.py:92@0.12.2)."""
    return has_FSDP and ConfigAutoWrap.in_autowrap_context


def prepare(cfg: Any, bfloat16_pays: Callable[[], bool]) -> None:
    """Make FSDP wrap according to the settings of the model that is to be built. With --bf16, which
    fairseq does not pass on to FSDP (fairseq/distributed/fully_sharded_data_parallel.py:98@0.12.2),
    it keeps float32 and computes in bfloat16, unless on a CPU that gains nothing from it. Raises
    UserError for settings with which it cannot train or save correctly.

    Args:
        cfg: of the model, with bf16.
        bfloat16_pays: whether to compute in bfloat16; called only without a GPU, by all processes.
    """
    if not is_wrapping():
        return
    settings = ConfigAutoWrap.kwargs
    if cfg.bf16 and (torch.cuda.is_available() or bfloat16_pays()):
        settings.update(mixed_precision=True, compute_dtype=torch.bfloat16)
    elif cfg.bf16:
        settings["fp32_reduce_scatter"] = False  # everything is float32; FSDP would reject the flag
    refused = {
        "--compile": (
            cfg.compile,
            "FSDP changes parameters while they are compiled: remove one of them",
        ),
        "--use-sharded-state": (
            settings["use_sharded_state"],
            "such checkpoints load only on the same number of processes: remove it",
        ),
        "--cpu-offload": (
            settings["cpu_offload"],
            "not supported for experts, and untested: remove it",
        ),
        "--not-fsdp-flatten-parameters": (
            not settings["flatten_parameters"],
            "its optimizer state cannot be saved: remove it",
        ),
        f"--moe-freeze {cfg.moe_freeze}": (
            str(cfg.moe_freeze) in ("gate", "gate_and_experts"),
            "FSDP joins gates with trained parameters: freeze only the experts, or use pytorch_ddp",
        ),
        f"--moe-freeze {cfg.moe_freeze} and shared or latent experts": (
            str(cfg.moe_freeze) == "experts" and (cfg.moe_shared_experts or cfg.moe_latent_dim),
            "FSDP joins shared experts with trained parameters: use pytorch_ddp",
        ),
        "--fp32-reduce-scatter": (
            settings["fp32_reduce_scatter"] and not settings["mixed_precision"],
            "needs float32 parameters: use --bf16, or --fp16 without --memory-efficient-fp16, "
            "or remove it",
        ),
    }
    for flag, (given, remedy) in refused.items():
        if given:
            raise UserError(f"{flag} with --ddp-backend fully_sharded: {remedy}")


def pass_bfloat16_check(cfg: Any, model: nn.Module) -> None:
    """Pass the check of fairseq/trainer.py:72@0.12.2, which refuses --bf16 with FSDP. As `prepare`
    does it, the trainer has float32 parameters and gradients, and nothing to convert."""
    if is_sharded(model) and cfg.common.bf16:
        if cfg.common.memory_efficient_bf16:
            raise UserError(
                "--memory-efficient-bf16 with --ddp-backend fully_sharded: fairscale shards "
                "only float32 and float16: use --bf16, with which each process keeps only its "
                "shard"
            )
        cfg.common.bf16 = False


def to_wrapping_precision(module: ModuleType) -> ModuleType:
    """The module in float16 if its parameters themselves are to be (--memory-efficient-fp16): FSDP
    expects that before it wraps them."""
    settings = ConfigAutoWrap.kwargs if is_wrapping() else {}
    half = settings.get("compute_dtype") is torch.float16 and not settings["mixed_precision"]
    return module.half() if half else module


def wrap_layer(layer: nn.Module, experts: Optional[nn.Module], min_params: int) -> nn.Module:
    """The layer, wrapped in its own FSDP module if the model is to be sharded and the layer has at
    least `min_params` parameters. Its experts, if any, stay whole."""
    if not is_wrapping():
        return layer
    for parameter in experts.parameters() if experts is not None else ():
        parameter._is_sharded = False  # type: ignore[attr-defined]
    return fsdp_wrap(to_wrapping_precision(layer), min_num_params=min_params)


# ---- Names and locations


class Location(NamedTuple):
    """Where a parameter of the model is: whole, or some numbers of a flat one."""

    parameter: nn.Parameter  # what the optimizer has
    start: Optional[int]  # in the flat parameter of all processes; None: it is whole
    shape: torch.Size


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP wraps the model."""
    return has_FSDP and isinstance(model, FullyShardedDataParallel)


def locations(model: nn.Module) -> Dict[str, Location]:
    """The parameters under their names without FSDP, in the order that they have without it."""
    if not is_sharded(model):
        return {name: Location(p, None, p.shape) for name, p in model.named_parameters()}
    flattened: Dict[nn.Module, Dict[str, Location]] = {}
    for module in model.modules():
        for flat in module.flat_params if isinstance(module, FlattenParamsWrapper) else ():
            start = 0
            for (_, owner, name), shape in zip(flat._param_infos, flat._param_shapes):
                flattened.setdefault(owner, {})[name] = Location(flat, start, shape)
                start += shape.numel()
    by_name = {}
    for prefix, module in model.named_modules():
        prefix = _without_wrappers(prefix + "." if prefix else "")
        if isinstance(module, FlattenParamsWrapper):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                by_name[prefix + name] = Location(parameter, None, parameter.shape)
        for name, location in flattened.get(module, {}).items():
            by_name[prefix + name] = location
    return by_name


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


# ---- States


def load_state_dict(self, state_dict, strict=True):
    """Load a state that this process has read, with its own experts. Does what matters of the
    model's own `load_state_dict`, which is not called."""
    model, state_dict = self.unwrapped_module, dict(state_dict)
    model.upgrade_state_dict(state_dict)
    if strict and hasattr(model, "check_state"):
        shapes = {name: location.shape for name, location in locations(self).items()}
        buffers = self.named_buffers()
        shapes.update({_without_wrappers(name): buffer.shape for name, buffer in buffers})
        model.check_state(state_dict, shapes)
    return super(FullyShardedDataParallel, self).load_state_dict(state_dict, strict=strict)


def _trained(model: nn.Module) -> Dict[str, Location]:
    return {name: p for name, p in locations(model).items() if p.parameter.requires_grad}


def optimizer_numbers(model: nn.Module) -> Dict[nn.Parameter, int]:
    """The optimizer's number of each parameter (fairseq/trainer.py:293@0.12.2)."""
    return {p: i for i, p in enumerate(p for p in model.parameters() if p.requires_grad)}


def whole_optimizer_state(self, optimizer) -> Optional[Dict[str, Any]]:
    """The optimizer's state by the model's parameters, for rank 0, None for others; instead of
    fairscale's, which accepts no parameters besides its own. Gathers one tensor at a time. It
    contains only this process's experts."""
    live = optimizer.state_dict()
    numbers, state = optimizer_numbers(self), {}
    whole: Dict[nn.Parameter, Dict[str, Any]] = {}  # by flat parameter
    for i, location in enumerate(_trained(self).values()):
        of_parameter = live["state"].get(numbers[location.parameter])
        if of_parameter is None:
            continue
        if location.start is None:
            state[i] = of_parameter
            continue
        if location.parameter not in whole:
            whole[location.parameter] = {
                key: _gather(self, value) if _is_like(value, location.parameter) else value
                for key, value in of_parameter.items()
            }
        if self.rank == 0:
            end = location.start + location.shape.numel()
            state[i] = {
                key: value[location.start : end].view(location.shape).clone()
                if _is_like(of_parameter[key], location.parameter)
                else value
                for key, value in whole[location.parameter].items()
            }
    if self.rank != 0:
        return None
    return {**live, "state": state, "param_groups": _groups(live, len(_trained(self)))}


def _gather(fsdp: FullyShardedDataParallel, piece: Tensor) -> Optional[Tensor]:
    """The pieces of all processes, one behind the other, on rank 0's CPU."""
    pieces = [torch.empty_like(piece) for _ in range(fsdp.world_size)]
    dist.all_gather(pieces, piece.contiguous(), group=fsdp.process_group)
    return torch.cat([piece.cpu() for piece in pieces]) if fsdp.rank == 0 else None


def own_optimizer_state(self, state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """The part of this process, by its flat parameters and experts, of a whole state."""
    numbers, saved = optimizer_numbers(self), state_dict["state"]
    state: Dict[int, Dict[str, Any]] = {}
    pieces: Dict[nn.Parameter, List[Dict[str, Any]]] = {}
    shapes: Dict[nn.Parameter, List[torch.Size]] = {}
    for i, location in enumerate(_trained(self).values()):
        if i not in saved:
            continue
        if location.start is None:
            state[numbers[location.parameter]] = saved[i]
        else:
            pieces.setdefault(location.parameter, []).append(saved[i])
            shapes.setdefault(location.parameter, []).append(location.shape)
    for flat, of_parts in pieces.items():
        state[numbers[flat]] = own = dict(of_parts[0])
        for key, value in of_parts[0].items():
            if isinstance(value, Tensor) and value.shape == shapes[flat][0] and value.dim() > 0:
                own[key] = self._get_shard(torch.cat([s[key].flatten() for s in of_parts]))[0]
            elif isinstance(value, Tensor):
                own[key] = value.clone()
    return {**state_dict, "state": state, "param_groups": _groups(state_dict, len(numbers))}


def _is_like(value: Any, parameter: nn.Parameter) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == parameter.shape


def _groups(state: Dict[str, Any], count: int) -> List[Dict[str, Any]]:
    (group,) = state["param_groups"]
    return [{**group, "params": list(range(count))}]
