"""A router of one's own, as a fairseq plugin on top of fairseq_moe_ext:

    fairseq-train DATA --user-dir examples/add_a_router --arch moe_lm_tiny --moe-router cosine ...

Cosine router (Chi et al. 2022, arXiv 2204.09179, section 3.2): tokens and experts meet on a sphere,
at a learned temperature, so that a token's length has no say in its choice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fairseq_moe_ext  # noqa: F401  (registers the models, the criterion and the tasks)
from fairseq_moe_ext.moe.router import TopKRouter, register_router


@register_router("cosine")
class CosineRouter(TopKRouter):
    """logit_e = cos(x, w_e) / temperature."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.log_temperature = nn.Parameter(torch.tensor(0.07).log())

    def logits(self, x: Tensor) -> Tensor:
        """x (T, D) -> (T, E)."""
        cosine = F.linear(F.normalize(x, dim=-1), F.normalize(self.wg.weight, dim=-1))
        return cosine / self.log_temperature.exp().clamp(min=0.01).to(x.dtype)
