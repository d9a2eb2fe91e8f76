"""The feed-forward networks of many experts as stacked weights."""

from __future__ import annotations

import math
from typing import Callable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .side_by_side import for_each_expert


class TensorPerExpert(list):
    """A stacked tensor as the list of its parts, which may lie in different files; a state dict may
    hold it in place of the stacked one."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self), *(self[0].shape if self else ())])


class GroupedLinear(nn.Module):
    """E linear layers side by side; the rows of expert e go through weight[e] and bias[e].

    Initialised as E separate `nn.Linear`, each from a seed of its own, so that an expert starts
    the same wherever it lives.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        first: int = 0,
        in_files: bool = False,
    ) -> None:
        """
        Args:
            first: number of the first of these experts among all.
            in_files: make no room for the weights: they stay where the state dict to be loaded has
                them, say in mapped files, and in its precision. They cannot be trained.
        """
        super().__init__()
        self.first = first
        self.in_files = in_files
        device = "meta" if in_files else None
        self.weight = nn.Parameter(
            torch.empty(num_experts, out_features, in_features, device=device)
        )
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U(-1/sqrt(in), 1/sqrt(in)) for weights and biases, as nn.Linear."""
        seed = int(torch.randint(2**31, (1,), device="cpu"))
        if self.weight.is_meta:
            return
        bound = 1 / math.sqrt(self.weight.size(-1))
        generator = torch.Generator(self.weight.device)
        with torch.no_grad():
            for expert, (weight, bias) in enumerate(zip(self.weight, self.bias), self.first):
                generator.manual_seed(seed + expert)
                weight.uniform_(-bound, bound, generator=generator)
                bias.uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor, counts: List[int], grad_scale: float = 1.0) -> Tensor:
        """x (N, in) in expert order, counts[e] rows of expert e -> (N, out).

        The gradients of weight and bias are multiplied by grad_scale, x's is not.
        """
        if self.in_files:
            return self._forward_from_files(x, counts)
        # Under FSDP with --fp16 experts stay in float32, as their optimizer wants them.
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return _GroupedLinear.apply(x, weight, bias, counts, grad_scale)

    def _forward_from_files(self, x: Tensor, counts: List[int]) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("experts that are read from files (in_files) cannot be trained")
        out = x.new_empty(x.size(0), len(self.bias[0]))
        for rows, x_e, w_e, b_e in zip(out.split(counts), x.split(counts), self.weight, self.bias):
            if len(rows) > 0:
                torch.addmm(b_e.to(x), x_e, w_e.to(x).t(), out=rows)
        return out

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        """As PyTorch's, but takes a TensorPerExpert too, from which each expert is copied by
        itself; with in_files none is copied."""
        rest_of_state = dict(state_dict)  # for PyTorch's function, which wants whole tensors
        for name in ("weight", "bias"):
            value = state_dict.get(prefix + name)
            if value is None:
                continue  # PyTorch's reports it missing
            if self.in_files:
                delattr(self, name)  # no longer a parameter: it is not moved, cast or counted
                setattr(self, name, TensorPerExpert(value))
                del rest_of_state[prefix + name]
            elif isinstance(value, TensorPerExpert):
                with torch.no_grad():
                    for target, part in zip(getattr(self, name), value):
                        target.copy_(part)
                rest_of_state[prefix + name] = getattr(self, name)
        super()._load_from_state_dict(rest_of_state, prefix, *rest)

    def extra_repr(self) -> str:
        in_features, out_features = self.weight[0].shape[::-1]
        return f"experts={len(self.bias)}, in_features={in_features}, out_features={out_features}"


class _GroupedLinear(torch.autograd.Function):
    # Matrix products that read one expert's weight and write into place. Under autograd each
    # weight[e] would make a gradient of all experts' size; here it is written once.
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, counts: List[int], grad_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts, ctx.grad_scale = counts, grad_scale
        out = x.new_empty(x.size(0), weight.size(1))
        outs, xs = out.split(counts), x.split(counts)

        def multiply(e: int) -> None:
            if counts[e] > 0:
                torch.addmm(bias[e], xs[e], weight[e].t(), out=outs[e])

        for_each_expert(multiply, counts, weight[0].numel(), x.device.type == "cpu")
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        counts, scale = ctx.counts, ctx.grad_scale
        for_x, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad_x = torch.empty_like(x) if for_x else None
        grad_weight = torch.empty_like(weight) if for_weight else None
        grad_bias = grad.new_empty(weight.shape[:2]) if for_bias else None
        grads, xs = grad.split(counts), x.split(counts)
        grads_x = grad_x.split(counts) if for_x else ()

        def multiply(e: int) -> None:
            g_e = grads[e]
            if for_x and counts[e] > 0:
                torch.mm(g_e, weight[e], out=grads_x[e])
            if for_weight and counts[e] > 0:
                torch.addmm(grad_weight[e], g_e.t(), xs[e], beta=0, alpha=scale, out=grad_weight[e])
            elif for_weight:
                grad_weight[e].zero_()
            if for_bias:
                torch.sum(g_e, dim=0, out=grad_bias[e])

        for_each_expert(multiply, counts, 2 * weight[0].numel(), x.device.type == "cpu")
        return grad_x, grad_weight, grad_bias.mul_(scale) if for_bias else None, None, None


class Experts(nn.Module):
    """E feed-forward networks: linear, activation, dropout, linear, dropout.

    Args:
        activation: elementwise function of a tensor.
        activation_dropout, dropout: probabilities, behind the activation and at the end.
        grad_scale: factor on the gradients of the experts' parameters (the paper's 1/sqrt(E)).
        first: number of the first of these experts among all, where others are elsewhere.
        in_files: leave the weights in the files that they are loaded from; see GroupedLinear.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        ffn_dim: int,
        *,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        activation_dropout: float = 0.0,
        dropout: float = 0.0,
        grad_scale: float = 1.0,
        first: int = 0,
        in_files: bool = False,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.activation_dropout = activation_dropout
        self.dropout = dropout
        self.grad_scale = grad_scale
        self.fc1 = GroupedLinear(num_experts, dim, ffn_dim, first, in_files)
        self.fc2 = GroupedLinear(num_experts, ffn_dim, dim, first, in_files)

    def forward(self, x: Tensor, counts: List[int]) -> Tensor:
        """x (N, D) in expert order, counts[e] rows of expert e -> (N, D)."""
        hidden = self.activation(self.fc1(x, counts, self.grad_scale))  # (N, F)
        hidden = F.dropout(hidden, self.activation_dropout, self.training)
        out = self.fc2(hidden, counts, self.grad_scale)
        return F.dropout(out, self.dropout, self.training)
