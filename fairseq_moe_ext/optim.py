"""fairseq's Adam in one pass over memory (`--optimizer fused_adam`).

Without Apex, fairseq's `adam` is a Python loop of about ten operations per parameter, each of which
reads and writes tensors of the parameter's size. PyTorch's fused AdamW needs one.
"""

import math
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, Mapping, Optional, Sequence

import torch
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig
from torch import Tensor

from .errors import UserError
from .wording import flag


@dataclass
class FusedAdamConfig(FairseqAdamConfig):
    """The flags of fairseq's adam."""


@register_optimizer("fused_adam", dataclass=FusedAdamConfig)
class FairseqFusedAdam(FairseqAdam):
    """fairseq's adam (fairseq/optim/adam.py:45@0.12.2), equal up to rounding. It has the same
    state, so a run may continue with either."""

    def __init__(self, cfg: FusedAdamConfig, params: Iterable[Tensor]) -> None:
        FairseqOptimizer.__init__(self, cfg)
        for name in ("use_old_adam", "fp16_adam_stats"):
            if getattr(cfg, name):
                raise UserError(
                    f"{flag(name)} belongs to --optimizer adam: remove it, or use that optimizer"
                )
        self._optimizer = FusedAdam(params, **self.optimizer_config)


# fairseq resumes from a state whose optimizer has this name (fairseq/trainer.py:597@0.12.2).
FairseqFusedAdam.__name__ = FairseqAdam.__name__


# These would keep their averages in half precision, too.
_NEED_FLOAT32 = ("fused_adam", "sgd", "adagrad", "adadelta", "lamb")


def check_precision(given: Mapping[str, Any], spell: Callable[[str], str]) -> None:
    """Raise UserError for flags of half precision that an optimizer cannot follow. Stock names its
    class and no flag (fairseq/optim/fp16_optimizer.py:486@0.12.2)."""
    for half, instead in (("fp16", "fp16_no_flatten_grads"), ("bf16", "bf16")):
        if given.get("optimizer") in _NEED_FLOAT32 and given.get(f"memory_efficient_{half}"):
            needed = spell(half) if half == instead else f"{spell(half)} {spell(instead)}"
            raise UserError(
                f"{spell(f'memory_efficient_{half}')} does not work with {spell('optimizer')} "
                f"{given['optimizer']}: use {needed}, or {spell('optimizer')} adam"
            )


class FusedAdam(torch.optim.AdamW):
    """PyTorch's fused AdamW with epsilon where fairseq adds it, and with fairseq's state: `step`
    (an integer), `exp_avg`, `exp_avg_sq`."""

    supports_flat_params = True
    supports_memory_efficient_fp16 = False  # its averages would be float16 too

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        betas: Sequence[float],
        eps: float,
        weight_decay: float,
    ) -> None:
        first, second = betas
        super().__init__(params, lr, (first, second), eps, weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Optional[Callable[[], Any]] = None) -> Any:
        """PyTorch adds epsilon to sqrt(v / (1 - beta2^t)); fairseq adds it to sqrt(v), before the
        division. The two agree if epsilon is scaled by the step t, which a group's parameters
        share."""
        self._use_tensors()
        epsilons = [group["eps"] for group in self.param_groups]
        for group in self.param_groups:
            steps = [self.state[p]["step"] for p in group["params"] if p in self.state]
            step = 1 + (int(steps[0]) if steps else 0)
            group["eps"] /= math.sqrt(1 - group["betas"][1] ** step)
        try:
            return super().step(closure)
        finally:
            for group, eps in zip(self.param_groups, epsilons):
                group["eps"] = eps

    def _use_tensors(self) -> None:
        """A saved state may come in past `load_state_dict`, as the file has it
        (fairseq/optim/fp16_optimizer.py:385@0.12.2, fairscale/optim/oss.py:461@0.4.13)."""
        for p, entry in self.state.items():
            if entry and not torch.is_tensor(entry["step"]):
                tensors = {name: torch.as_tensor(value) for name, value in entry.items()}
                self.state[p] = {name: t.to(p.device, torch.float32) for name, t in tensors.items()}

    def state_dict(self) -> Dict[str, Any]:
        """In the form of fairseq's adam."""
        state = super().state_dict()
        state["state"] = {
            index: {**entry, "step": int(entry["step"])} if "step" in entry else entry
            for index, entry in state["state"].items()
        }
        return state

    def __setstate__(self, state: Dict[str, Any]) -> None:
        for group in state["param_groups"]:  # fairseq's adam has no such key
            group["fused"] = True
        super().__setstate__(state)
