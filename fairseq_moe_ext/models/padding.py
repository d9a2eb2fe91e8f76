"""How padding is treated in a model with experts, by --moe-pad-rule (config.py)."""

from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairseq.models import FairseqLanguageModel
from torch import Tensor

from ..config import MoETransformerLMConfig
from ..expert_parallel import collective_device, process_count
from ..moe.router import TopKRouter
from ..shape import shape_of


class Filled(NamedTuple):
    """A batch, and what the rule adds to it."""

    tokens: Tensor  # (B, S)
    missing: int  # tokens up to a full batch
    share: float  # of this process in the batch's metrics, which cover all processes or its own


class PadRule:
    """How a decoder pads and masks its batches."""

    def __init__(self, cfg: MoETransformerLMConfig, padding_idx: int) -> None:
        self.padding_idx = padding_idx
        self.rule = str(cfg.moe_pad_rule or "real")
        self.masked = cfg.use_moe_pad_mask
        self.experts = bool(shape_of(cfg).sparse)
        self.together = self.experts and process_count() > 1 and cfg.moe_routing_scope == "world"
        # Rows of a full batch, in a step of training or validation; None: as many tokens as any
        # process has; 0: not in such a step.
        self.full_rows: Optional[int] = 0

    def fill(self, tokens: Tensor) -> Filled:
        """Tokens (B, S), by all processes at once; where these route together, all get the length
        of the longest."""
        rows, length = tokens.shape
        branch = self.experts and self.rule == "branch"
        active, largest = 1, rows * length
        if self.together or (branch and self.full_rows is None and process_count() > 1):
            everyone = _all_gather(rows, length)  # (processes, 2)
            largest = int(everyone.prod(dim=1).max())
            if self.together:
                # Padding takes slots: as of one process that has the rows of all.
                length = int(everyone[:, 1].max())
                tokens = F.pad(tokens, (0, length - tokens.size(1)), value=self.padding_idx)
                active = max(1, int((everyone[:, 0] > 0).sum()))
        missing = 0
        if branch and self.full_rows != 0:
            full = largest if self.full_rows is None else self.full_rows * length
            missing = max(0, full - rows * length)
        return Filled(tokens, missing, (rows > 0) / active)

    def unrouted(self, tokens: Tensor, missing: int = 0) -> Optional[Tensor]:
        """Which of tokens (B, S), and of the missing ones, go to no expert: (B S + missing,) bool;
        None: all tokens are routed."""
        if not self.masked and missing == 0:
            return None
        mask = tokens.eq(self.padding_idx).flatten()
        if not self.masked:
            mask = torch.zeros_like(mask)
        return F.pad(mask, (0, missing), value=True)

    def attention_mask(self, padding: Tensor, new: int) -> Optional[Tensor]:
        """The mask that the last `new` positions need if a batch has padding on the left, or if
        several positions follow earlier ones; otherwise None.

        A causal mask hides padding on the right from all but padding itself. By the branch's rule
        padding does not attend to padding either, and is therefore routed differently.

        padding (B, S) bool -> (B, 1, new, S) bool. A position may always look at itself, so that no
        row of padding becomes NaN.
        """
        length = padding.size(1)
        branch = self.experts and self.rule == "branch"
        if new == 1:
            if not padding.any():
                return None
            mask = ~padding
            mask[:, -1] = True
            return mask[:, None, None, :]
        # On a GPU the CPU waits for this answer, as in stock
        # (fairseq/models/transformer/transformer_decoder.py:328@0.12.2); so it asks only once.
        matters = padding if branch else padding[:, :-1] & ~padding[:, 1:]  # else on the left alone
        if new == length and not matters.any():
            return None
        causal = torch.ones(length, length, dtype=torch.bool, device=padding.device).tril()
        itself = torch.eye(length, dtype=torch.bool, device=padding.device)
        seen = causal & ~padding[:, None, None, :]
        if branch:
            itself = itself & ~seen.any(dim=-1, keepdim=True)
        return (seen | itself)[:, :, -new:]


def set_pad_rule(model: FairseqLanguageModel, rule: str) -> None:
    """Use this rule from now on."""
    model.decoder.pad_rule.rule = rule
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.settings = module.settings._replace(count_padding=rule != "real")


def _all_gather(*numbers: int) -> Tensor:
    """Numbers of each process: (processes, numbers) int64, on the CPU."""
    own = torch.tensor(numbers, device=collective_device())
    everyone = [torch.empty_like(own) for _ in range(process_count())]
    dist.all_gather(everyone, own)
    return torch.stack(everyone).cpu()
