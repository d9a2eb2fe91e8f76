"""The feed-forward networks of many experts as stacked weights."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Callable, Dict, List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.batched_ffn import batched, by_chunk
from ..kernels.chunks import Chunk, laid_out
from ..kernels.dropout import dropout
from ..kernels.dropout import mask as dropout_mask
from ..kernels.dtypes import autocast_dtype, without_autocast
from ..kernels.expert_ffn import kernel_for
from ..kernels.matmul import Linear
from ..kernels.stacks import Weights, scale_gradient
from .activations import Activation, inner_width
from .routing import Routing


class TensorPerExpert(List[Tensor]):
    """A stacked tensor as a list of its parts, which may be in different files. A state dict may
    hold it instead of the stacked one."""

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self), *(self[0].shape if self else ())])


class GroupedLinear(nn.Module):
    """The parameters of E linear layers, weight (E, out, in) and bias (E, out).

    Initialised as E separate `nn.Linear`, each from its own seed, so that an expert starts with the
    same values on any process.
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
            in_files: allocate no weights. They stay where the loaded state dict has them, for
                example in mapped files, in its precision. They cannot be trained.
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

    def _load_from_state_dict(self, state_dict: Dict[str, Any], prefix: str, *rest: Any) -> None:
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


class Experts(nn.Module):
    """E feed-forward networks: linear, activation, dropout, linear, dropout.

    Args:
        activation: elementwise function of a tensor, or a gated one of moe/activations.py, for
            which the first linear layer has 2 F outputs.
        activation_dropout, dropout: probabilities, behind the activation and at the end.
        grad_scale: factor on the gradients of the experts' parameters; see expert_grad_scale.
        first: number of the first of these experts among all, where others are elsewhere.
        in_files: leave the weights in the files that they are loaded from; see GroupedLinear.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        ffn_dim: int,
        *,
        activation: Activation = F.gelu,
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
        self.ffn_dim = ffn_dim
        inner = inner_width(activation, ffn_dim)
        self.inner = inner
        self.fc1 = GroupedLinear(num_experts, dim, inner, first, in_files)
        self.fc2 = GroupedLinear(num_experts, ffn_dim, dim, first, in_files)

    @property
    def is_plain(self) -> bool:
        """Whether rows may go another way than through `forward`: not if a subclass has its own."""
        return type(self).forward is Experts.forward

    def chunked(self, x: Tensor) -> Optional[Callable[[List[int]], List[Chunk]]]:
        """How rows like x's (..., D) should lie, by their experts' numbers of rows; None: in expert
        order, as a `forward` of a subclass has them. It spares the kernel a copy."""
        if not self.is_plain or x.device.type != "cpu" or kernel_for(x, self._weights()) is None:
            return None
        return partial(laid_out, x=x, inner=self.inner)

    def forward(self, x: Tensor, counts: List[int], chunks: Optional[List[Chunk]] = None) -> Tensor:
        """x (N, D) in expert order, or as the chunks say; counts[e] rows of expert e -> (N, D).
        Raises RuntimeError where experts in files (`in_files`) would be trained."""
        if self.fc1.in_files and torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("experts that are read from files (in_files) cannot be trained")
        wanted = autocast_dtype(x)
        if wanted is None:
            return self._compute(x, counts, chunks)
        with without_autocast(x):
            return self._compute(x.to(wanted), counts, chunks)

    def _weights(self) -> Weights:
        return Weights(self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)

    def _compute(self, x: Tensor, counts: List[int], chunks: Optional[List[Chunk]]) -> Tensor:
        weights, mask = self._weights(), None
        if self.training and self.activation_dropout > 0:
            mask = dropout_mask(x.new_empty(x.size(0), self.ffn_dim), self.activation_dropout)
        compute = kernel_for(x, weights) or plain_expert_ffn
        if compute is batched and chunks is not None:
            out = by_chunk(x, chunks, weights, self.activation, mask, self.grad_scale)
        else:
            out = compute(x, counts, weights, self.activation, mask, self.grad_scale)
        return dropout(out, self.dropout, self.training)

    def choice_by_choice(self, x: Tensor, routing: Routing) -> Tensor:
        """Each token through its experts, summed by weight, without sorting rows by expert: faster
        for a token or two, as in generation. Without gradients and dropout; x (T, D) -> (T, D)."""
        out, stacks = torch.zeros_like(x), self._weights()
        choices = zip(routing.experts.tolist(), routing.kept.tolist(), routing.weights.to(x.dtype))
        for token, (experts, kept, weights) in enumerate(choices):
            row, its_out = x[token : token + 1], out[token]
            for expert, weight in (
                (e, w) for e, is_kept, w in zip(experts, kept, weights) if is_kept
            ):
                w1, b1, w2, b2 = (stack[expert].to(x) for stack in stacks)
                hidden = self.activation(F.linear(row, w1, b1))  # (1, F)
                its_out.addcmul_(F.linear(hidden, w2, b2)[0], weight)
        return out


class FeedForward(nn.Module):
    """One feed-forward network, for all tokens: an expert that is shared.

    N shared experts of width F are one network of width N F, as their outputs are summed.
    """

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        activation: Activation = F.gelu,
        activation_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        """Args as those of Experts."""
        super().__init__()
        self.activation = activation
        self.activation_dropout = activation_dropout
        self.dropout = dropout
        self.fc1 = Linear(dim, inner_width(activation, ffn_dim))
        self.fc2 = Linear(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        hidden = dropout(self.activation(self.fc1(x)), self.activation_dropout, self.training)
        return dropout(self.fc2(hidden), self.dropout, self.training)


def plain_expert_ffn(
    x: Tensor,
    counts: List[int],
    weights: Weights,
    activation: Activation,
    mask: Optional[Tensor] = None,
    grad_scale: float = 1.0,
) -> Tensor:
    """What every kernel computes: each row through the network of its expert.

    Args:
        x: (N, D) in expert order, counts[e] rows of expert e.
        activation: as that of Experts.
        mask: (N, F), a factor on what the activation yields, for dropout.
        grad_scale: factor on the gradients of the weights, not on x's.

    Returns:
        (N, D)
    """
    out = []
    factors = x.new_ones(x.size(0), 1) if mask is None else mask
    stacks = (scale_gradient(w, grad_scale) if isinstance(w, Tensor) else w for w in weights)
    for rows, factor, *of_expert in zip(x.split(counts), factors.split(counts), *stacks):
        w1, b1, w2, b2 = (w.to(x) for w in of_expert)
        hidden = activation(F.linear(rows, w1, b1)) * factor  # (n, F)
        out.append(F.linear(hidden, w2, b2))  # (n, D)
    return torch.cat(out)
