"""Computing in bfloat16 on a CPU (`--bf16`): parameters, their gradients and the optimizer keep
float32, products read copies of the weights. In evaluation these copies are all there is.

fairseq instead keeps a bfloat16 model with float32 copies and converts its gradients. Sums that
must be exact (the vocabulary's gradient, reductions over processes, routing) would then be in
bfloat16.
"""

import functools
import logging
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..expert_parallel import all_gather, process_rank
from ..kernels.matmul import Linear, best_times, product
from ..moe.experts import GroupedLinear
from ..wording import BF16_IN_FLOAT32

logger = logging.getLogger(__name__)

_WORTH = 1.2  # products are half of a step and more


@functools.cache
def speed_over_float32() -> float:
    """How many times as fast as our float32 product one of bfloat16 is, on one thread (20 ms
    where the CPU has instructions for it)."""
    x = torch.ones(512, 512, device="cpu", dtype=torch.float32)
    y = x.to(torch.bfloat16)
    float32, bfloat16 = best_times([lambda: product(x[:128], x), lambda: product(y[:128], y)], 5)
    return float32 / bfloat16


def bfloat16_pays() -> bool:
    """Whether --bf16 is to compute in bfloat16 on the CPU of rank 0, as processes exchange rows in
    one precision. All processes call this at once."""
    return bool(all_gather(process_rank() == 0 and _pays_here())[0])


@functools.cache
def _pays_here() -> bool:
    """One line in the log says if not."""
    available = torch.backends.mkldnn.is_available()
    speed = speed_over_float32() if available else 0.0
    if speed < _WORTH:
        reason = f"as fast as float32 {speed:.1f} times over" if available else "no oneDNN"
        logger.info(f"{BF16_IN_FLOAT32}, because this CPU gains nothing from bfloat16 ({reason})")
    return speed >= _WORTH


def has_own_bfloat16(model: Any) -> bool:
    """Whether a model is ours, which computes in bfloat16 on a CPU when its decoder says so."""
    return hasattr(getattr(model, "decoder", None), "bfloat16_on_cpu")


def rounded(x: Tensor, on: bool) -> Tensor:
    """What goes into the first layer, in bfloat16 if that is on and x float32 on a CPU."""
    on = on and x.device.type == "cpu" and x.dtype == torch.float32
    return x.to(torch.bfloat16) if on else x


def in_bfloat16(model: nn.Module, cpu: bool) -> nn.Module:
    """A model for evaluation under --bf16: on a GPU converted; on a CPU as in training, but with
    the weights of products converted once, not in each call. Raises UserError for a model of
    fairseq's own, on a CPU."""
    if torch.cuda.is_available() and not cpu:
        return model.to(torch.bfloat16)
    if not has_own_bfloat16(model):
        raise UserError(
            f"--bf16: on a CPU only for models of this package, not for {type(model).__name__}: "
            "convert it with `fairseq-moe convert`, or remove --bf16"
        )
    pays = bfloat16_pays()
    cast(Any, model.decoder).bfloat16_on_cpu = pays
    for module in model.modules() if pays else ():
        if isinstance(module, (Linear, GroupedLinear)):
            for name, weights in list(module.named_parameters(recurse=False)):
                # An embedding that is tied to it keeps float32.
                setattr(module, name, nn.Parameter(weights.to(torch.bfloat16), requires_grad=False))
    return model


def take_bfloat16(cfg: Any, model: nn.Module) -> None:
    """Make fairseq's trainer keep our model in float32 on a CPU, where the model itself computes in
    bfloat16; before fairseq/trainer.py:105@0.12.2 converts it."""
    on_cpu = cfg.common.cpu or not torch.cuda.is_available()
    if not (cfg.common.bf16 and on_cpu and has_own_bfloat16(model)):
        return
    if cfg.common.memory_efficient_bf16:
        if process_rank() == 0 and speed_over_float32() < 1:
            logger.warning(
                f"--memory-efficient-bf16: on this CPU a matrix product takes "
                f"{1 / speed_over_float32():.3g} times as long in bfloat16 as in float32; use "
                "--bf16 instead, which computes in float32 here"
            )
        return
    cfg.common.bf16 = False
    cast(Any, model.decoder).bfloat16_on_cpu = bfloat16_pays()
