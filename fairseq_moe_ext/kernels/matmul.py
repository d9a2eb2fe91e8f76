"""Matrix products of float32 on a CPU, by the faster of the two libraries that PyTorch has.

PyTorch gives them to MKL, which on AMD's processors does without AVX-512. oneDNN, which PyTorch has
for convolutions and bfloat16, uses it. Where the processor computes 512 bits at a time (AMD family
26) it takes less than half the time; where it takes them in two halves (family 25) it gains
nothing. So a product is timed once, and oneDNN is taken where it is clearly faster. Elsewhere, in
other precisions, and under `torch.backends.mkldnn.flags(enabled=False)`, all is as PyTorch has it.
"""

import functools
import math
import time
from typing import Any, Iterator, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Numbers of a product that oneDNN computes at a time where it is to be copied; tests take fewer.
PART = 2**21


class Linear(nn.Linear):
    """Drop-in torch.nn.Linear; not twice differentiable where oneDNN computes it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        onednn_is_faster()  # is decided before torch.compile looks into `forward`

    def forward(self, x: Tensor) -> Tensor:
        if not _by_onednn(x, self.weight):
            return super().forward(x)
        out = _Linear.apply(x.reshape(-1, x.size(-1)), self.weight, self.bias)
        return out.view(*x.shape[:-1], -1)


def product(a: Tensor, b: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """a (N, K) @ b (K, M) + bias (M,) -> (N, M); without autograd."""
    if _by_onednn(a, b):
        return _onednn(a, b.t(), bias)
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out (N, M) = a (N, K) @ b (K, M); without autograd."""
    if not _by_onednn(a, b):
        torch.mm(a, b, out=out)
        return
    step = max(1, PART // len(a))
    for start in range(0, b.size(1), step):
        part = slice(start, start + step)
        out[:, part] = _onednn(a, b[:, part].t())


def write_outer(out: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """out (N, M) = scale * the sum over k of a[k] (N,) outer b[k] (M,); without autograd.

    a (K, N), b (K, M)."""
    if not _by_onednn(a, b):
        torch.addmm(out, a.t(), b, beta=0, alpha=scale, out=out)  # with beta=0 out is not read
    elif len(a) < 16 and a.size(1) % 16 == 0 and out.is_contiguous():
        # Of so few terms a product is little more than its writing. MKL writes into place, and in
        # strips of 16 rows up to twice as fast as at once.
        strips = a.t().unflatten(0, (-1, 16))
        b = b.expand(len(strips), *b.shape)
        out = out.view(len(strips), 16, -1)
        torch.baddbmm(out, strips, b, beta=0, alpha=scale, out=out)
    else:
        for room, part in _outer_parts(out, a, b):
            torch.mul(part, scale, out=room)


def add_outer(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out (N, M) += the sum over k of a[k] (N,) outer b[k] (M,); without autograd."""
    if not _by_onednn(a, b):
        out.addmm_(a.t(), b)
        return
    for room, part in _outer_parts(out, a, b):
        room += part


def _outer_parts(out: Tensor, a: Tensor, b: Tensor) -> Iterator[Tuple[Tensor, Tensor]]:
    """Rows of out, and what belongs there: oneDNN cannot write into place, and a small part is
    copied while the processor has it at hand."""
    a, b = _padded(a), _padded(b)
    step = max(1, PART // out.size(1))
    for start in range(0, len(out), step):
        part = slice(start, start + step)
        yield out[part], _outer(a[:, part], b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (_opaque_onednn if torch.compiler.is_compiling() else _onednn)(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        onednn, outer = _onednn, _outer
        if torch.compiler.is_compiling():
            onednn, outer = _opaque_onednn, _opaque_outer
        return (
            onednn(grad, weight.t()) if for_x else None,
            outer(grad, x) if for_weight else None,
            grad.sum(dim=0) if for_bias else None,
        )


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype == torch.float32
        and a.device.type == b.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and onednn_is_faster()
        and a.numel() > 0
        and b.numel() > 0
        and not watched()
    )


def watched() -> bool:
    """Whether there is a dispatch mode, as torch's FLOP counter, which knows PyTorch's own products
    alone, and of those its own thread's. torch.compile has modes of its own, and needs neither."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


@functools.cache
def onednn_is_faster() -> bool:
    """Whether float32 products go to oneDNN in this process. Decided when it is first asked; twice
    the speed of MKL or the same was seen, so that noise does not turn the answer."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and speed_over_mkl() > 1.4
    )


def speed_over_mkl() -> float:
    """Time of a product by MKL over that by oneDNN: the best of some rounds in turn, on one thread,
    as other processes disturb that least (15 ms)."""
    x, weight = torch.ones(128, 512), torch.ones(512, 512)
    best = [math.inf, math.inf]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            for _ in range(12):
                for way, multiply in enumerate((F.linear, _onednn)):
                    start = time.perf_counter()
                    multiply(x, weight)
                    best[way] = min(best[way], time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return best[0] / best[1]


def _onednn(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """x (N, I), weight (O, I), bias (O,) -> (N, O)"""
    return _compute(_padded(x), weight, bias)[: len(x)]


def _outer(a: Tensor, b: Tensor) -> Tensor:
    """The sum over k of a[k] (N,) outer b[k] (M,); a (K, N), b (K, M) -> (N, M)"""
    return _compute(_padded(a).t(), _padded(b).t(), None)


def _padded(x: Tensor) -> Tensor:
    """x (N, M) with rows of zeros up to one of eight sizes between two powers of two.

    For each size oneDNN writes a program, in some 0.3 ms, and keeps it; what it keeps lies between
    what is freed, so that memory would grow with every new number of an expert's rows."""
    rows = len(x)
    step = max(4, 2 ** (rows.bit_length() - 4)) if rows > 8 else 4
    return F.pad(x, (0, 0, 0, -rows % step)) if rows % step else x


def _compute(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    x, weight = _dense(x), _dense(weight)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """x (N, M) such that its numbers, or those of x.t(), follow each other in memory."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


# torch.compile takes oneDNN's operator with constant weights alone, and would compile anew for each
# number of rows that is padded: it is not to look into these.
_opaque_onednn = torch.library.custom_op("fairseq_moe_ext::linear", _onednn, mutates_args=())
_opaque_outer = torch.library.custom_op("fairseq_moe_ext::outer", _outer, mutates_args=())


@_opaque_onednn.register_fake
def _(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    return x.new_empty(x.size(0), weight.size(0))


@_opaque_outer.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.size(1), b.size(1))
