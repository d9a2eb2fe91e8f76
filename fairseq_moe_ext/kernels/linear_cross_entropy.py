"""Cross-entropy of a linear layer's outputs, without ever holding all of them.

With 2,048 tokens and a vocabulary of 50,000, logits take 400 MB in float32, and stock's loss
keeps three such tensors. Here logits exist for one chunk of tokens at a time. Both gradients of
the chunk are computed while its logits exist; the backward pass only scales them. No product is
computed twice.
"""

from typing import Any, Tuple

import torch
from torch import Tensor

from .dtypes import at_least_float32, autocast_dtype, without_autocast
from .first_order import once_differentiable
from .matmul import add_outer, outer, write_outer, write_product

# At most 64 MB in float32, for vocabularies so large that fewer tokens at a time would make their
# products slow; else 8 MB, which stay in the processor's cache until they have been used.
LOGITS_AT_A_TIME = 2**24
_IN_CACHE, _ENOUGH_TOKENS = 2**21, 512
# Softmax goes through so many logits at a time.
_SOFTMAX_AT_A_TIME = 2**19
# The gradient of the vocabulary's weights is added up in float32 in parts of so many numbers.
_GRADIENTS_AT_A_TIME = 2**20
# In float16 a probability of 1/50,000 is below the smallest normal number; so gradients of the
# logits are scaled by this factor, like loss scaling does.
_FP16_SCALE = 128.0


def linear_cross_entropy(
    features: Tensor, weight: Tensor, target: Tensor, ignore_index: int
) -> Tensor:
    """Sum over tokens of the cross-entropy of softmax(weight @ feature) and the target, in nats.

    Args:
        features: (N, D).
        weight: (V, D).
        target: (N,) int64; tokens whose target is ignore_index do not count.

    Returns:
        A scalar in float32 at least. Softmax and sum are computed in float32 at least.
    """
    wanted = autocast_dtype(features)
    if wanted is not None:
        with without_autocast(features):
            return linear_cross_entropy(features.to(wanted), weight, target, ignore_index)
    if not torch.is_grad_enabled():  # needs_input_grad is true of parameters even under no_grad
        features, weight = features.detach(), weight.detach()
    return _LinearCrossEntropy.apply(features, weight, target, ignore_index)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, target: Tensor, ignore_index: int
    ) -> Tensor:
        exact = at_least_float32(features)
        scale = _FP16_SCALE if features.dtype == torch.float16 else 1.0
        needs_features, needs_weight = ctx.needs_input_grad[:2]
        grad_features = torch.empty_like(features) if needs_features else None
        grad_weight = torch.empty_like(weight, dtype=exact) if needs_weight else None
        loss = torch.zeros((), dtype=exact, device=features.device)
        counted = target.ne(ignore_index)  # (N,)
        at_a_time = tokens_at_a_time(weight.size(0), features)
        weight_as = weight.to(features.dtype)
        # One tensor for all chunks: on a CPU allocating memory costs more than softmax and loss.
        logits = features.new_empty(at_a_time, weight.size(0))
        for start in range(0, features.size(0), at_a_time or 1):
            part = slice(start, start + at_a_time)
            x, keep = features[part], counted[part]  # (C, D), (C,)
            z = logits[: len(x)]  # (C, V)
            write_product(z, x, weight_as.t())
            index = target[part].where(keep, 0).unsqueeze(1)  # (C, 1)
            loss += _to_gradients(z, index, keep, scale)
            if grad_features is not None:
                write_product(grad_features[part], z, weight_as)
            if grad_weight is not None:
                _add_outer(grad_weight, z, x, scale, first=start == 0)
        if grad_weight is not None and len(features) == 0:
            grad_weight.zero_()
        ctx.scale = scale
        ctx.dtype = weight.dtype
        ctx.save_for_backward(grad_features, grad_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, Tensor, None, None]:
        grad_features, grad_weight = ctx.saved_tensors
        # On a CPU the usual case saves a copy; on a GPU the question would synchronise.
        as_it_is = grad.device.type == "cpu" and grad == 1 and ctx.scale == 1
        if grad_features is not None and not as_it_is:
            grad_features = grad_features * (grad / ctx.scale).to(grad_features.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight if as_it_is else grad_weight * grad).to(ctx.dtype)
        return grad_features, grad_weight, None, None


def tokens_at_a_time(vocabulary: int, features: Tensor) -> int:
    """Rows of logits that exist at once: a power of two, for which oneDNN has few programs."""
    half = 2 if features.element_size() == 2 else 1
    most = half * LOGITS_AT_A_TIME // vocabulary
    rows = min(most, max(_ENOUGH_TOKENS, half * _IN_CACHE // vocabulary))
    return min(2 ** (max(1, rows).bit_length() - 1), len(features))


def _add_outer(total: Tensor, z: Tensor, x: Tensor, scale: float, first: bool) -> None:
    """total (V, D) += z (C, V), transposed, @ x (C, D) / scale, in the precision of total; what
    total holds does not count the first time."""
    if total.dtype == z.dtype:
        (write_outer if first else add_outer)(total, z, x)
        return
    x = x if scale == 1 else x / scale
    # On a CPU in parts that are still in the cache when they are added.
    rows = max(1, _GRADIENTS_AT_A_TIME // x.size(1)) if x.device.type == "cpu" else len(total)
    for its_total, its_z in zip(total.split(rows), z.split(rows, dim=1)):
        part = outer(its_z, x)
        its_total.copy_(part) if first else its_total.add_(part)


def _to_gradients(logits: Tensor, index: Tensor, keep: Tensor, scale: float) -> Tensor:
    """Put d loss / d logits, times scale, in the place of logits (C, V): softmax - onehot(index)
    for the tokens to keep, (C, 1) and (C,). Returns their loss, ()."""
    exact = at_least_float32(logits)
    loss = torch.zeros((), dtype=exact, device=logits.device)
    on_cpu = logits.device.type == "cpu"
    step = max(1, _SOFTMAX_AT_A_TIME // logits.size(1)) if on_cpu else len(logits)
    all_kept = on_cpu and bool(keep.all())  # on a GPU the question would synchronise
    for part in zip(*(each.split(step) for each in (logits, index, keep.unsqueeze(1)))):
        z, at, kept = part
        p = z.to(exact)
        given = p.gather(1, at)
        top = p.amax(dim=1, keepdim=True)
        p = torch.softmax(p, dim=1, out=p if on_cpu else None)  # in place: nothing is copied
        # The largest probability is 1 / sum of exp(z - top): never small.
        nll = top - p.amax(dim=1, keepdim=True).log() - given
        loss += nll.masked_fill(~kept, 0).sum()
        p.scatter_add_(1, at, torch.full_like(given, -1))
        if scale != 1 or not all_kept:
            p *= kept if scale == 1 else kept * scale
        if p is not z:
            z.copy_(p)
    return loss
