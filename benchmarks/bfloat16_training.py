"""What `fairseq-train --bf16` does on a GPU: the optimizer updates float32 copies of a bfloat16
model's parameters, from float32 copies of their gradients."""

import torch
from torch import nn


class BFloat16Training:
    """AdamW of a model that becomes one of bfloat16."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.copies = [p.detach().float() for p in self.parameters]
        model.to(torch.bfloat16)
        self.adam = torch.optim.AdamW(self.copies, lr=1e-4, fused=True)

    def zero_grad(self, set_to_none: bool) -> None:
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for copy, p in zip(self.copies, self.parameters):
            copy.grad = p.grad.float()
        self.adam.step()
        for copy, p in zip(self.copies, self.parameters):
            p.copy_(copy)
