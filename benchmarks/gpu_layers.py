"""MoE layers for GPUs that layer.py compares ours with, each where it works: a plain one with
torch's grouped products, ScatterMoE (arXiv 2403.08245), SonicMoE (arXiv 2512.14080). Top-2. Only
the first has been run yet, on a CPU: no GPU.
"""

from __future__ import annotations

import measure
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Routed(nn.Module):
    """A linear router without losses."""

    def __init__(self, experts: int, dim: int) -> None:
        super().__init__()
        self.router = nn.Linear(dim, experts, bias=False)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (S, M) -> weights and experts of the two best, (S, 2) each."""
        weights, experts = self.router(x).float().softmax(-1).topk(2)
        return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), experts


class PlainGroupedLayer(_Routed):
    """As one writes it with PyTorch alone: sort by expert, grouped products, sum by weight."""

    def __init__(self, experts: int, dim: int, hidden: int) -> None:
        super().__init__(experts, dim)
        self.w1 = nn.Parameter(torch.randn(experts, dim, hidden) * dim**-0.5)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, dim) * hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts = self.route(x)
        order = experts.flatten().argsort(stable=True)  # (2 S,)
        ends = F.one_hot(experts.flatten(), len(self.w1)).sum(0).cumsum(0, dtype=torch.int32)
        token = order // 2
        hidden = F.gelu(F.grouped_mm(x[token], self.w1, offs=ends))
        rows = F.grouped_mm(hidden, self.w2, offs=ends) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, token, rows)


def _scattermoe(experts: int, dim: int, hidden: int) -> nn.Module:
    from scattermoe.mlp import MLP

    class Layer(_Routed):
        def __init__(self) -> None:
            super().__init__(experts, dim)
            self.mlp = MLP(dim, hidden, experts, 2, activation=nn.GELU())

        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(x, *self.route(x))

    return Layer()


def _sonicmoe(experts: int, dim: int, hidden: int) -> nn.Module:
    """Its experts have three matrices; F is two thirds of ours, which makes the same FLOPs."""
    from sonicmoe import KernelBackendMoE, MoE
    from sonicmoe.enums import ActivationType

    moe = MoE(
        num_experts=experts,
        num_experts_per_tok=2,
        hidden_size=dim,
        intermediate_size=2 * hidden // 3 // 64 * 64,
        activation_function=ActivationType.SWIGLU,
        add_bias=False,
        std=0.02,
    )

    def batched(moe: nn.Module, x: Tensor) -> Tensor:
        return moe(x, kernel_backend_moe=KernelBackendMoE.sonicmoe)[0].view_as(x)

    return measure.Wrapped(moe, batched)


# (experts, dim, hidden) -> a layer (S, M) -> (S, M)
LAYERS = {"grouped_mm": PlainGroupedLayer, "scattermoe": _scattermoe, "sonicmoe": _sonicmoe}
