"""Gates that are never trained."""

from __future__ import annotations

from torch import nn

from ..router import TopKRouter, register_router


class FixedLinear(nn.Linear):
    """A linear layer without bias; its weight is not trained, but checkpoints save it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        weight = self.weight.detach()
        del self.weight  # the parameter
        self.register_buffer("weight", weight)


@register_router("random")
class RandomRouter(TopKRouter):
    """`topk` whose gate keeps its random initial weights: the control for claims about routing. A
    gate that has learned something performs better than this one."""

    learned = False

    def add_gate(self) -> None:
        self.wg = FixedLinear(self.dim, self.num_logits)
