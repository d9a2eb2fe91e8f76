"""Backward passes that autograd cannot differentiate."""

import functools
from typing import Any, Callable

import torch


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the `backward` of an autograd function: raise RuntimeError under create_graph=True.
    PyTorch's decorator of this name raises only if the engine comes by the operation again, and
    yields wrong second derivatives where it comes by a residual connection."""

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: fairseq_moe_ext's fast operations can be differentiated only "
                "once"
            )
        return backward(ctx, *grads)

    return checked
