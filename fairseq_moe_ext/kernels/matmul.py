"""float32 matrix products on a CPU, by the faster of PyTorch's two libraries.

PyTorch uses MKL, which does not use AVX-512 on AMD processors. oneDNN, which PyTorch contains for
convolutions and bfloat16, does. On processors that compute 512 bits at a time (AMD family 26) it
takes less than half the time; on those that split them in two halves (family 25) it gains nothing.
So we time one product, and use oneDNN if it is clearly faster. Elsewhere, in other precisions, and
under `torch.backends.mkldnn.flags(enabled=False)`, PyTorch's choice stays.
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
        # With so few terms a product is mostly writing. MKL writes in place, and in strips of 16
        # rows up to twice as fast as all at once.
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
    """Rows of out, and what belongs there: oneDNN cannot write in place, so a small part is copied
    while it is in the cache."""
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
    """True under a TorchDispatchMode such as FlopCounterMode, which sees neither our oneDNN
    products nor other threads. torch.compile has modes of its own and needs neither."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


@functools.cache
def onednn_is_faster() -> bool:
    """Whether float32 products use oneDNN in this process, decided at the first call. We have seen
    either twice the speed of MKL or the same, so noise does not change the answer."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and speed_over_mkl() > 1.4
    )


def speed_over_mkl() -> float:
    """MKL's time for a product divided by oneDNN's: the best of several rounds in turn, on one
    thread, which other processes disturb least (15 ms)."""
    # Whatever device or precision is the default: models are built on "meta", too.
    x = torch.ones(128, 512, device="cpu", dtype=torch.float32)
    weight = torch.ones(512, 512, device="cpu", dtype=torch.float32)
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

    For each size oneDNN generates a program, in some 0.3 ms, and keeps it. These fragment the
    heap, so memory would grow with every new number of rows."""
    rows = len(x)
    step = max(4, 2 ** (rows.bit_length() - 4)) if rows > 8 else 4
    return F.pad(x, (0, 0, 0, -rows % step)) if rows % step else x


def _compute(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    x, weight = _dense(x), _dense(weight)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """x (N, M), contiguous in memory itself or transposed."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


# torch.compile accepts oneDNN's operator only with constant weights, and would recompile for each
# number of padded rows: keep it out of these.
_opaque_onednn = torch.library.custom_op("fairseq_moe_ext::linear", _onednn, mutates_args=())
_opaque_outer = torch.library.custom_op("fairseq_moe_ext::outer", _outer, mutates_args=())


@_opaque_onednn.register_fake
def _(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    return x.new_empty(x.size(0), weight.size(0))


@_opaque_outer.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.size(1), b.size(1))
