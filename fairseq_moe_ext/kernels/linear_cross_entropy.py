"""Cross-entropy of a linear layer's outputs, without ever holding all of them.

With 2,048 tokens and a vocabulary of 50,000, logits take 400 MB in float32, and stock's loss
keeps three such tensors. Here logits exist for one chunk of tokens at a time. Both gradients of
the chunk are computed while its logits exist; the backward pass only scales them. No product is
computed twice.
"""

from typing import Any, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .matmul import add_outer, write_product

# 64 MB in float32; matrix products are still large enough.
LOGITS_AT_A_TIME = 2**24
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
    return _LinearCrossEntropy.apply(features, weight, target, ignore_index)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, target: Tensor, ignore_index: int
    ) -> Tensor:
        exact = torch.promote_types(features.dtype, torch.float32)
        scale = _FP16_SCALE if features.dtype == torch.float16 else 1.0
        needs_features, needs_weight = ctx.needs_input_grad[:2]
        grad_features = torch.empty_like(features) if needs_features else None
        grad_weight = torch.zeros_like(weight, dtype=exact) if needs_weight else None
        loss = torch.zeros((), dtype=exact, device=features.device)
        counted = target.ne(ignore_index)  # (N,)
        chunk = min(max(1, LOGITS_AT_A_TIME // weight.size(0)), features.size(0))
        # One tensor for all chunks: on a CPU allocating memory costs more than softmax and loss.
        logits = features.new_empty(chunk, weight.size(0))
        for start in range(0, features.size(0), chunk or 1):
            part = slice(start, start + chunk)
            x, keep = features[part], counted[part]  # (C, D), (C,)
            index = target[part].where(keep, 0).unsqueeze(1)  # (C, 1)
            z = logits[: len(x)]  # (C, V)
            write_product(z, x, weight.t())
            z = z.to(exact)
            at_target = z.gather(1, index).squeeze(1)
            top = z.amax(dim=1, keepdim=True)
            z.sub_(top).exp_()
            total = z.sum(dim=1, keepdim=True)
            nll = total.log().add_(top).squeeze(1) - at_target
            loss += nll.masked_fill(~keep, 0).sum()
            if not (needs_features or needs_weight):
                continue
            # d loss / d logits = softmax - onehot(target), for the tokens that count
            z.mul_(keep.unsqueeze(1) * scale / total)
            z.scatter_add_(1, index, keep.unsqueeze(1) * -torch.full_like(total, scale))
            z = z.to(features.dtype)
            if grad_features is not None:
                write_product(grad_features[part], z, weight)
            if grad_weight is not None:
                if exact == features.dtype:
                    add_outer(grad_weight, z, x)
                else:
                    grad_weight += z.t() @ (x / scale)
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
