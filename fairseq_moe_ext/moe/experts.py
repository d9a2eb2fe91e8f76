"""The feed-forward networks of many experts as stacked weights."""

from __future__ import annotations

import math
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Experts in a batched product at most, and rows of padding an expert has in it on average at most:
# to read an expert's weights takes as long as to compute some eight rows.
_BATCH = 8
_PADDING = 8


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
        function = _GroupedMM if _grouped_mm_serves(x) else _GroupedLinear
        return function.apply(x, weight, bias, counts, grad_scale)

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


class _Batch(NamedTuple):
    """Neighbouring experts that are computed as one batched product, each one's rows padded with
    zeros to those of the longest."""

    experts: slice
    rows: slice  # theirs among the N
    shape: Tuple[int, int]  # n experts, R rows each
    slots: Optional[Tensor]  # (rows,) int64: places among the n * R; None: all are filled

    def take(self, x: Tensor) -> Tensor:
        """x (N, D) -> (n, R, D), a view where no padding is needed."""
        mine = x[self.rows]
        if self.slots is not None:
            padded = x.new_zeros(self.shape[0] * self.shape[1], x.size(1))
            mine = padded.index_copy_(0, self.slots, mine)
        return mine.view(*self.shape, x.size(1))

    def product(self, out: Tensor, a: Tensor, b: Tensor, bias: Optional[Tensor] = None) -> None:
        """a (n, R, in) @ b (n, in, out) + bias (n, out) -> rows of out (N, out)."""
        mine = out[self.rows]
        whole = out.new_empty(*self.shape, out.size(1)) if self.slots is not None else mine
        whole = whole.view(*self.shape, out.size(1))
        if self.shape[0] == 1 and bias is not None:
            torch.addmm(bias[0], a[0], b[0], out=whole[0])
        elif bias is not None:
            torch.baddbmm(bias.unsqueeze(1), a, b, out=whole)
        else:
            torch.bmm(a, b, out=whole)
        if self.slots is not None:
            torch.index_select(whole.view(-1, out.size(1)), 0, self.slots, out=mine)


def _batches(counts: List[int], device: torch.device) -> List[_Batch]:
    """Group neighbouring experts while padding costs less than the batch gains.

    A product of few rows takes the time to read the weights, which two threads do for two experts
    at once better than for one together; so does a GPU for many.
    """
    sizes: List[Tuple[int, int, int]] = []  # experts, longest, rows of each batch
    for count in counts:
        if sizes:
            n, longest, rows = sizes[-1]
            longest, rows = max(longest, count), rows + count
            if n < _BATCH and longest * (n + 1) - rows <= _PADDING * (n + 1):
                sizes[-1] = n + 1, longest, rows
                continue
        sizes.append((1, count, count))
    # slots[row]: the row's place in its batch; one tensor for all, so that it travels once
    shifts = []  # of each expert: its first place in its batch, less its first row
    expert = row = 0
    for n, longest, _ in sizes:
        for i, count in enumerate(counts[expert : expert + n]):
            shifts.append(i * longest - row)
            row += count
        expert += n
    slots = torch.tensor(shifts).repeat_interleave(torch.tensor(counts)) + torch.arange(row)
    slots = slots.to(device)
    batches = []
    expert = row = 0
    for n, longest, rows in sizes:
        mine = slots[row : row + rows] if rows < n * longest else None
        batches.append(
            _Batch(slice(expert, expert + n), slice(row, row + rows), (n, longest), mine)
        )
        expert, row = expert + n, row + rows
    return batches


class _GroupedLinear(torch.autograd.Function):
    # Products that read each expert's weight and write into place. Under autograd each weight[e]
    # would make a gradient of all experts' size; here it is written once.
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, counts: List[int], grad_scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.batches, ctx.grad_scale = _batches(counts, x.device), grad_scale
        out = x.new_empty(x.size(0), weight.size(1))
        for batch in ctx.batches:
            batch.product(out, batch.take(x), weight[batch.experts].mT, bias[batch.experts])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = weight.new_empty(weight.shape[:2]) if ctx.needs_input_grad[2] else None
        for batch in ctx.batches:
            g = batch.take(grad)  # (n, R, out)
            if grad_x is not None:
                batch.product(grad_x, g, weight[batch.experts])
            if grad_weight is not None:
                gw = grad_weight[batch.experts]
                torch.baddbmm(gw, g.mT, batch.take(x), beta=0, alpha=ctx.grad_scale, out=gw)
            if grad_bias is not None:
                torch.sum(g, dim=1, out=grad_bias[batch.experts])
        if grad_bias is not None:
            grad_bias.mul_(ctx.grad_scale)
        return grad_x, grad_weight, grad_bias, None, None


def _grouped_mm_serves(x: Tensor) -> bool:
    """Whether PyTorch has one kernel for all experts' products of x (N, D). Not yet run: no GPU."""
    return x.is_cuda and x.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")


class _GroupedMM(torch.autograd.Function):
    # The same as _GroupedLinear, each of its products by one kernel.
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, counts: List[int], grad_scale: float
    ) -> Tensor:
        rows = torch.tensor(counts, device=x.device)
        ends = rows.cumsum(0).to(torch.int32)  # (E,)
        expert = rows.new_tensor(range(len(counts))).repeat_interleave(rows)  # (N,)
        ctx.save_for_backward(x, weight, rows, ends, expert)
        ctx.grad_scale = grad_scale
        return F.grouped_mm(x, weight.mT, offs=ends).add_(bias.index_select(0, expert))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight, rows, ends, expert = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = F.grouped_mm(grad, weight, offs=ends)
        if ctx.needs_input_grad[1]:
            grad_weight = F.grouped_mm(grad.mT, x, offs=ends)
            grad_weight[rows == 0] = 0  # whatever the kernel leaves for an expert without rows
            grad_weight.mul_(ctx.grad_scale)
        if ctx.needs_input_grad[2]:
            exact = torch.promote_types(grad.dtype, torch.float32)  # sums of many rows
            summed = torch.zeros(weight.shape[:2], dtype=exact, device=grad.device)
            summed.index_add_(0, expert, grad.to(exact)).mul_(ctx.grad_scale)
            grad_bias = summed.to(grad.dtype)
        return grad_x, grad_weight, grad_bias, None, None


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
