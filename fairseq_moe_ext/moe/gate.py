"""The gate: a linear router and the settings by which its logits become a routing."""

from __future__ import annotations

import math
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from .pool import PROCESS, Pool
from .routing import (
    SECOND_EXPERT_POLICIES,
    Routing,
    counted_tokens,
    route_top1,
    route_top2,
    token_capacity,
)


class GateSettings(NamedTuple):
    """How a gate routes; the flag of each field is in config.py."""

    top_k: int = 2  # 1 or 2 experts a token
    use_fp32: bool = False  # softmax and weights in float32 at least
    second_expert_policy: str = "sampling"
    normalize_before_dropping: bool = False
    batch_prioritized: bool = False
    capacity_factor: Optional[float] = None  # training; None: top_k
    eval_token_fraction: float = 0.25  # evaluation; <= 0: training's rule
    dropless: bool = False  # no capacity, in training and at evaluation
    count_padding: bool = False  # that is routed nowhere: in capacity, losses and figures

    def check(self) -> None:
        """Raise ValueError for a setting that would silently be another."""
        if self.top_k not in (1, 2):
            raise ValueError(f"top_k {self.top_k}: a token goes to 1 or 2 experts")
        if self.second_expert_policy not in SECOND_EXPERT_POLICIES:
            policies = ", ".join(SECOND_EXPERT_POLICIES)
            raise ValueError(f"second_expert_policy {self.second_expert_policy!r}: use {policies}")
        factor, fraction = self.capacity_factor, self.eval_token_fraction
        if factor is not None and not 0 < factor < math.inf:
            raise ValueError(f"capacity_factor {factor}: use a number above 0, or None")
        if not -math.inf < fraction <= 1:
            raise ValueError(
                f"eval_token_fraction {fraction}: use a share of the batch, above 0 up to 1, or a "
                "negative number for training's rule"
            )


class Gate(nn.Module):
    """Routes tokens by a linear layer without bias."""

    def __init__(
        self, dim: int, num_experts: int, settings: GateSettings, pool: Pool = PROCESS
    ) -> None:
        super().__init__()
        settings.check()
        if num_experts < settings.top_k:
            raise ValueError(f"{num_experts} experts: top_k {settings.top_k} needs as many")
        self.pool = pool
        self.wg = nn.Linear(dim, num_experts, bias=False)
        self.settings = settings

    def capacity(self, tokens: int, padding_mask: Optional[Tensor] = None) -> Optional[int]:
        """Slots an expert has for a pool with this process's number of tokens, by the present
        mode; None: no limit."""
        s = self.settings
        if s.dropless:
            return None
        counted = counted_tokens(padding_mask, s.count_padding)
        tokens = self.pool.tokens(tokens if counted is None else int(counted.sum()))
        if not self.training and s.eval_token_fraction > 0:
            return token_capacity(tokens, self.wg.out_features, fraction=s.eval_token_fraction)
        factor = s.top_k if s.capacity_factor is None else s.capacity_factor
        return token_capacity(tokens, self.wg.out_features, factor=factor)

    def forward(
        self, x: Tensor, capacity: Optional[int], padding_mask: Optional[Tensor] = None
    ) -> Tuple[Tensor, Routing]:
        """x (T, D), padding_mask (T,) bool -> logits (T, E) and their routing."""
        s = self.settings
        logits = self.wg(x)
        if s.use_fp32:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if s.top_k == 1:
            return logits, route_top1(
                logits,
                capacity=capacity,
                padding_mask=padding_mask,
                count_padding=s.count_padding,
                pool=self.pool,
            )
        # The noise is a means of exploration: at evaluation the runner-up is taken as it is.
        policy = s.second_expert_policy if self.training else "all"
        return logits, route_top2(
            logits,
            capacity=capacity,
            padding_mask=padding_mask,
            count_padding=s.count_padding,
            second_expert_policy=policy,
            normalize_before_dropping=s.normalize_before_dropping,
            batch_prioritized=s.batch_prioritized,
            pool=self.pool,
        )
