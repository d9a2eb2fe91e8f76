"""Matrix products on a CPU, by the faster of PyTorch's two libraries.

PyTorch computes float32 products with MKL, which does not use AVX-512 on AMD processors. oneDNN,
which PyTorch contains too, does. On processors that compute 512 bits at a time (AMD family 26) it
takes less than half the time; on those that split them in two halves (family 25) it gains nothing.
From PyTorch 2.9 a public switch passes products to oneDNN. Its name allows bfloat16, which oneDNN
makes of float32 only where a processor has instructions for tiles of it (AMX). So we time one
product and look at its error, and use the switch, for our own products alone, if oneDNN is clearly
faster and as exact. Elsewhere, and under `torch.backends.mkldnn.flags(enabled=False)`, PyTorch's
choice stays. It also stays for small products, as in generation. One or two rows only read the
weights, and a call of oneDNN costs some 25 us more. On Zen 5 the two libraries are equal at 2**22
multiplications.
"""

import contextlib
import functools
import math
import threading
import time
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dtypes import autocast_dtype
from .first_order import once_differentiable

FEW_ROWS = 2  # for these, a product only reads the weights
SMALL = 2**22  # multiplications


class Linear(nn.Linear):
    """Drop-in torch.nn.Linear that computes in the precision of its input; not twice
    differentiable where oneDNN computes it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        onednn_is_faster()  # is decided before torch.compile looks into `forward`

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """F.linear in the precision of x: (..., K), (M, K), (M,) -> (..., M)"""
    if autocast_dtype(x) is not None:
        return F.linear(x, weight, bias)
    weight = weight.to(x.dtype)
    bias = bias if bias is None else bias.to(x.dtype)
    if _is_small(x, weight.size(0)) or not _by_onednn(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.size(-1))  # (N, K)
    if torch.is_grad_enabled():
        out = _Linear.apply(rows, weight, bias)
    else:
        out = _products()[0](rows, weight.t(), bias)
    return out.view(*x.shape[:-1], -1)


def product(a: Tensor, b: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """a (N, K) @ b (K, M) + bias (M,) -> (N, M); without autograd."""
    rows, onednn = len(a), not _is_small(a, b.size(1)) and _by_onednn(a, b)
    if onednn:
        a = _padded(a)
    with _switched(onednn, a):
        return (torch.mm(a, b) if bias is None else torch.addmm(bias, a, b))[:rows]


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out (N, M) = a (N, K) @ b (K, M); without autograd."""
    onednn = _by_onednn(a, b)
    if onednn and _missing(len(a)):
        out.copy_(product(a, b))
        return
    with _switched(onednn, a):
        torch.mm(a, b, out=out)


def write_outer(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out (N, M) = the sum over k of a[k] (N,) outer b[k] (M,); without autograd.

    a (K, N), b (K, M)."""
    _outer(out, a, b, 0)


def add_outer(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out (N, M) += the sum over k of a[k] (N,) outer b[k] (M,); without autograd."""
    _outer(out, a, b, 1)


def outer(a: Tensor, b: Tensor) -> Tensor:
    """The sum over k of a[k] (N,) outer b[k] (M,) -> (N, M); without autograd."""
    out = a.new_empty(a.size(1), b.size(1))
    write_outer(out, a, b)
    return out


def _outer(out: Tensor, a: Tensor, b: Tensor, keep: int) -> None:
    onednn = _by_onednn(a, b)
    if onednn:
        a, b = _padded(a), _padded(b)
    with _switched(onednn, a):
        torch.addmm(out, a.t(), b, beta=keep, out=out)  # with beta=0 out is not read


class _Linear(torch.autograd.Function):
    # Autograd would compute the gradients outside the switch.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _products()[0](x, weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        multiply, multiply_outer = _products()
        return (
            multiply(grad, weight, None) if for_x else None,
            multiply_outer(grad, x) if for_weight else None,
            grad.sum(dim=0) if for_bias else None,
        )


def _is_small(x: Tensor, outputs: int) -> bool:
    """Whether a product of x (..., K) is so small that oneDNN gains nothing."""
    small = x.numel() <= FEW_ROWS * x.size(-1) or x.numel() * outputs <= SMALL
    return x.dtype == torch.float32 and small


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.device.type == b.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
        and a.numel() > 0
        and b.numel() > 0
        and not watched()  # before the probe, whose products nobody wants to see
        and (a.dtype == torch.bfloat16 or (a.dtype == torch.float32 and onednn_is_faster()))
    )


def products_by_onednn(x: Tensor) -> bool:
    """Whether oneDNN computes products of rows like x's (..., D)."""
    return _by_onednn(x, x)


def watched() -> bool:
    """True under a TorchDispatchMode such as FlopCounterMode, which does not see other threads.
    torch.compile has modes of its own and needs no other threads."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


class _Switch:
    """Has oneDNN compute float32 products while it is entered. PyTorch's switch is the process's,
    and threads may need it at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = "none"

    def __enter__(self) -> None:
        settings = _settings()
        if settings is None:
            return
        with self._lock:
            if self._users == 0:
                self._before = settings.fp32_precision
                settings.fp32_precision = "bf16"
            self._users += 1

    def __exit__(self, *exception: object) -> None:
        settings = _settings()
        if settings is None:
            return
        with self._lock:
            self._users -= 1
            if self._users == 0:
                settings.fp32_precision = "none"  # that of all of oneDNN, or of PyTorch
                if settings.fp32_precision != self._before:
                    settings.fp32_precision = self._before


_ON, _OFF = _Switch(), contextlib.nullcontext()


def _switched(onednn: bool, x: Tensor) -> ContextManager[None]:
    """For products of x. Those in bfloat16 oneDNN computes without the switch."""
    return _ON if onednn and x.dtype == torch.float32 else _OFF


@functools.cache
def _settings() -> Any:
    """That have the switch; None before PyTorch 2.9."""
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    return settings if hasattr(settings, "fp32_precision") else None


_faster: Optional[bool] = None  # not a cache of functools, into which torch.compile would look


def onednn_is_faster() -> bool:
    """Whether float32 products use oneDNN in this process, decided at the first call. We have seen
    either twice the speed of MKL or the same, so noise does not change the answer."""
    global _faster
    if _faster is None:
        _faster = _found_faster()
    return _faster


def _found_faster() -> bool:
    if not (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and _settings() is not None
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    ):
        return False
    speed, error = compared_with_mkl()
    return speed > 1.4 and error < 1e-5


def compared_with_mkl() -> Tuple[float, float]:
    """MKL's time for a product divided by oneDNN's, on one thread (15 ms). And the largest error of
    oneDNN's, as a fraction of the largest number; bfloat16 would make it 1e-3."""
    # Whatever device or precision is the default: models are built on "meta", too. And by no method
    # that models/unfilled.py has do nothing while a model is built that a checkpoint will fill.
    generator = torch.Generator("cpu").manual_seed(0)
    factors = torch.rand(2, 512, 512, generator=generator, device="cpu", dtype=torch.float32)
    x, weight = 2 * factors - 1
    x = x[:128]
    found: Dict[bool, Tensor] = {}

    def multiply(onednn: bool) -> None:
        with _switched(onednn, x):
            found[onednn] = torch.mm(x, weight)

    mkl, onednn = best_times([lambda: multiply(False), lambda: multiply(True)], 12)
    true = torch.mm(x.double(), weight.double())
    return mkl / onednn, float((found[True] - true).abs().max() / true.abs().max())


def best_times(ways: Sequence[Callable[[], object]], rounds: int, threads: int = 1) -> List[float]:
    """Seconds of each, the best of several rounds in turn; without autograd. Other processes
    disturb one thread least."""
    best = [math.inf] * len(ways)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            for _ in range(rounds):
                for i, way in enumerate(ways):
                    start = time.perf_counter()
                    way()
                    best[i] = min(best[i], time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return best


def _missing(rows: int) -> int:
    """Rows up to one of eight sizes between two powers of two."""
    step = max(4, 2 ** (rows.bit_length() - 4)) if rows > 8 else 4
    return -rows % step


def program_rows(x: Tensor, counts: List[int]) -> List[int]:
    """How many rows like x's (..., D) to compute for each expert: counts, with the spare rows of
    `_padded` where oneDNN computes."""
    return [program_size(rows) for rows in counts] if _by_onednn(x, x) else counts


def program_size(rows: int) -> int:
    """Of so many rows, with the spare ones of `_padded`."""
    return rows if rows <= FEW_ROWS else rows + _missing(rows)


def faster_products(x: Tensor, multiplications: Optional[int] = None) -> ContextManager[None]:
    """Within, the faster library computes PyTorch's own products of rows like x's: without
    padding, and without the microseconds of a switch for each product. For few multiplications,
    all together, it is PyTorch's choice."""
    small = multiplications is not None and multiplications <= SMALL
    return _switched(not small and _by_onednn(x, x), x)


def _padded(x: Tensor) -> Tensor:
    """x (N, M) with rows of zeros, as many as _missing says.

    For each size oneDNN generates programs, in some 0.3 ms, and keeps them, 1 MB and more. With
    every new number of rows memory would grow: products of 100 to 1,700 rows took 4 GB."""
    missing = _missing(len(x))
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def _products() -> Tuple[Any, Any]:
    """Functions of a (N, K), b (K, M) and a bias -> (N, M), and of a (K, N), b (K, M) -> (N, M)."""
    return (_opaque_product, _opaque_outer) if torch.compiler.is_compiling() else (product, outer)


# torch.compile would not set the switch, and would recompile for each number of padded rows: keep
# it out of these. What an operator returns may not be a part of a tensor.
@torch.library.custom_op("fairseq_moe_ext::product", mutates_args=())
def _opaque_product(a: Tensor, b: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    return product(a, b, bias).contiguous()


_opaque_outer = torch.library.custom_op("fairseq_moe_ext::outer", outer, mutates_args=())


@_opaque_product.register_fake
def _(a: Tensor, b: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    return a.new_empty(a.size(0), b.size(1))


@_opaque_outer.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.size(1), b.size(1))
