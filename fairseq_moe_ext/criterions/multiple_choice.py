"""Cross-entropy over the candidates of each example, with the losses of the MoE layers' gates."""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Dict, List, Tuple

import torch
import torch.nn.functional as F
from fairseq import metrics
from fairseq.criterions import register_criterion
from fairseq.dataclass import ChoiceEnum
from fairseq.logging.meters import AverageMeter
from fairseq.models import BaseFairseqModel
from fairseq.tasks import FairseqTask
from torch import Tensor

from ..accuracy import wilson_interval
from ..errors import UserError
from ..kernels.dtypes import at_least_float32
from .moe_cross_entropy import (
    MoECrossEntropyConfig,
    MoECrossEntropyCriterion,
    log_gates,
    logged_of_gates,
    summed,
)


@dataclass
class MultipleChoiceConfig(MoECrossEntropyConfig):
    choice_loss: ChoiceEnum(["candidates", "likelihood"]) = field(
        default="candidates",
        metadata={
            "help": "the loss: cross-entropy of the softmax over an example's candidates, or "
            "negative log-likelihood of the right candidate's tokens (not with --choice-scoring "
            "head)"
        },
    )


@register_criterion("multiple_choice", dataclass=MultipleChoiceConfig)
class MultipleChoiceCriterion(MoECrossEntropyCriterion):
    """loss = sum over examples of -log softmax(scores over candidates)[right one] (Radford et al.
    2018, section 3.3) + the gates' losses as in moe_cross_entropy, each weighted by the number of
    examples."""

    def __init__(self, cfg: MultipleChoiceConfig, task: FairseqTask) -> None:
        super().__init__(
            task,
            cfg.moe_gate_loss_wt,
            cfg.moe_gate_loss_combine_method,
            cfg.moe_gate_loss_transform,
            cfg.moe_z_loss_wt,
            cfg.moe_log_per_layer,
            cfg.sentence_avg,
        )
        if not hasattr(task, "scoring"):
            raise UserError(
                "--criterion multiple_choice needs --task multiple_choice; for language "
                "modelling use moe_cross_entropy"
            )
        self.mean = task.scoring == "mean"
        self.likelihood = str(cfg.choice_loss) == "likelihood"
        if self.likelihood and task.scoring == "head":
            raise UserError(
                "--choice-loss likelihood with --choice-scoring head: a head gives no likelihood; "
                "use --choice-scoring sum or mean"
            )

    def forward(
        self, model: BaseFairseqModel, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, int, Dict[str, Any]]:
        """Returns the loss, the number of examples, and the logging outputs, which may be summed
        over processes and steps.

        sample: as ChoiceDataset.collater makes it.
        """
        scores, extra = self.scores(model, sample)  # (B, C)
        right = sample["target"]
        if self.likelihood:
            nll = -scores.gather(1, right.unsqueeze(1)).squeeze(1)  # (B,)
        else:
            nll = F.cross_entropy(scores, right, reduction="none")
        inner_loss = nll.sum() if reduce else nll
        sample_size = right.size(0)
        logging_output = {
            "inner_loss": inner_loss.detach(),
            "correct": scores.argmax(dim=1).eq(right).sum(),
            "chance": (1 / sample["score_index"].ge(0).sum(dim=1)).sum(),
            "cut": sample["cut"].sum(),
            "ntokens": sample["ntokens"],
            "nsentences": sample_size,
            "sample_size": sample_size,
            "batch_count": 1,
        }
        loss = self.with_gate_losses(inner_loss, extra, sample_size, logging_output)
        return loss, sample_size, logging_output

    def scores(self, model: BaseFairseqModel, sample: Dict[str, Any]) -> Tuple[Tensor, Any]:
        """Scores of the candidates, (B, C) in float32 at least, -inf where an example has fewer
        than C; and the model's second output."""
        scores, extra = model(**sample["net_input"])  # (R, outputs)
        scores = scores.to(at_least_float32(scores))
        if self.mean:
            scores = scores / sample["net_input"]["scored"].sum(dim=1, keepdim=True)
        flat = torch.cat([scores.flatten(), scores.new_full((1,), -math.inf)])  # -1: no candidate
        return flat[sample["score_index"]], extra

    @staticmethod
    def logged(cfg: MultipleChoiceConfig, sparse: bool) -> List[str]:
        """As the base class's."""
        names = ["loss", "inner_loss", "accuracy", "accuracy_low", "accuracy_high"]
        return names + (logged_of_gates(cfg) if sparse else [])

    @staticmethod
    def reduce_metrics(logging_outputs: List[Dict[str, Any]]) -> None:
        """Log the loss (base 2 per example, with the gates' share), inner_loss (without), accuracy
        in percent with the ends of its 95 % interval (Wilson 1927), accuracy_low and accuracy_high;
        chance, the accuracy of guessing; cut, the percentage of examples whose beginning was left
        out; and the gates' metrics."""
        total = partial(summed, logging_outputs)
        examples = total("sample_size")
        bits = examples * math.log(2)
        metrics.log_scalar("loss", total("loss") / bits, examples, round=3)
        metrics.log_scalar("inner_loss", total("inner_loss") / bits, examples, round=3)
        metrics.log_scalar("accuracy", 100.0 * total("correct") / examples, examples, round=2)
        for end, name in enumerate(("accuracy_low", "accuracy_high")):
            metrics.log_derived(name, lambda meters, end=end: _ends(meters["accuracy"])[end])
        metrics.log_scalar("chance", 100.0 * total("chance") / examples, examples, round=2)
        metrics.log_scalar("cut", 100.0 * total("cut") / examples, examples, round=2)
        log_gates(logging_outputs)


def _ends(accuracy: AverageMeter) -> Tuple[float, float]:
    """From the meter of the accuracy, whose weights are the examples."""
    examples = float(accuracy.count)
    low, high = wilson_interval(float(accuracy.avg) / 100 * examples, examples)
    return round(100 * low, 2), round(100 * high, 2)
