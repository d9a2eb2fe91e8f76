"""Cross-entropy plus the losses of the MoE layers' gates; logs the branch's metrics."""

import math
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from fairseq import metrics, utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models import BaseFairseqModel
from fairseq.tasks import FairseqTask
from omegaconf import II
from torch import Tensor

from .. import ranges
from ..errors import not_finite
from ..moe.stats import METRICS, NULL_SHARE

_TRAFFIC = ("all_to_all_mb", "all_to_all_cpu_time_ms")
_LAYER_METRIC = re.compile(r"layer\d+_")


@dataclass
class MoECrossEntropyConfig(FairseqDataclass):
    moe_gate_loss_wt: float = field(
        default=1.0,
        metadata={
            "help": "weight of the balancing loss of the gates (the default is that of fairseq's "
            "moe branch; the pages use 0.01)"
        },
    )
    moe_gate_loss_combine_method: ChoiceEnum(["average", "sum"]) = field(
        default="average", metadata={"help": "how to combine the balancing losses of the layers"}
    )
    moe_gate_loss_transform: ChoiceEnum(["none", "neg_log"]) = field(
        default="none", metadata={"help": "function to apply to the combined balancing loss"}
    )
    moe_z_loss_wt: float = field(
        default=0.0,
        metadata={"help": "weight of the router z-loss, combined over layers in the same way"},
    )
    moe_log_per_layer: bool = field(
        default=False, metadata={"help": "also log the metrics of each MoE layer"}
    )
    sentence_avg: bool = II("optimization.sentence_avg")


@register_criterion("moe_cross_entropy", dataclass=MoECrossEntropyConfig)
class MoECrossEntropyCriterion(FairseqCriterion):
    """loss = cross-entropy + weight * sample size * transform(combined balancing loss) (the
    branch's moe_cross_entropy; GShard, arXiv 2006.16668, equation 4). For dense models, ours or
    stock's, it is the cross-entropy alone."""

    def __init__(
        self,
        task: FairseqTask,
        moe_gate_loss_wt: float,
        moe_gate_loss_combine_method: str,
        moe_gate_loss_transform: str,
        moe_z_loss_wt: float,
        moe_log_per_layer: bool,
        sentence_avg: bool,
    ) -> None:
        super().__init__(task)
        ranges.check({"moe_gate_loss_wt": moe_gate_loss_wt, "moe_z_loss_wt": moe_z_loss_wt})
        self.gate_loss_weight = moe_gate_loss_wt
        self.combine = torch.sum if str(moe_gate_loss_combine_method) == "sum" else torch.mean
        self.neg_log = str(moe_gate_loss_transform) == "neg_log"
        self.z_loss_weight = moe_z_loss_wt
        self.log_per_layer = moe_log_per_layer
        self.sentence_avg = sentence_avg
        self.last_counts: Dict[int, Tensor] = {}  # layer -> (K, E) of the last batch here
        self._asked: Optional[Tuple[Tensor, torch.cuda.Event]] = None

    def forward(
        self, model: BaseFairseqModel, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, int, Dict[str, Any]]:
        """Returns the loss, the sample size by which the trainer divides its gradient, and the
        logging outputs, which may be summed over processes and steps."""
        inner_loss, extra = self.cross_entropy(model, sample, reduce)
        nsentences = sample["target"].size(0)
        sample_size = nsentences if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "inner_loss": inner_loss.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": nsentences,
            "sample_size": sample_size,
            "batch_count": 1,
        }
        loss = self.with_gate_losses(inner_loss, extra, sample_size, logging_output)
        return loss, sample_size, logging_output

    def with_gate_losses(
        self, loss: Tensor, extra: Any, sample_size: int, logging_output: Dict[str, Any]
    ) -> Tensor:
        """loss + weight * sample size * gates' loss, if the model's second output has any.
        Adds the loss and the gates' metrics to the logging output."""
        records = extra.get("moe") if isinstance(extra, dict) else None
        if records:
            self.last_counts = {record.layer: record.expert_counts for record in records}
            records = _of_whole_batch(records, extra.get("whole_sample_size"), sample_size)
            gate_loss, z_loss = self._gate_losses(records)
            weight = self.gate_loss_weight if extra.get("balanced_by_loss", True) else 0.0
            # a loss that is off has no backward pass, and if infinite does no harm
            if weight > 0:
                loss = loss + sample_size * (weight * gate_loss)
            if self.z_loss_weight > 0:
                loss = loss + sample_size * (self.z_loss_weight * z_loss)
            router_losses = [r.router_loss for r in records if r.router_loss is not None]
            if router_losses:
                router_loss = self.combine(torch.stack(router_losses))
                loss = loss + sample_size * router_loss
                logging_output["moe_router_loss"] = sample_size * router_loss.detach()
            logging_output["moe_loss"] = sample_size * gate_loss.detach()
            if self.z_loss_weight > 0:
                logging_output["moe_z_loss"] = sample_size * z_loss.detach()
            # Metrics of a batch that several processes share count once.
            share = logging_output["batch_count"] = extra["share"]
            values = {**self._averaged(records), **extra.get("traffic", {})}
            logging_output.update({name: share * value for name, value in values.items()})
        logging_output["loss"] = loss.detach()
        return loss

    def cross_entropy(
        self, model: BaseFairseqModel, sample: Dict[str, Any], reduce: bool
    ) -> Tuple[Tensor, Any]:
        """Cross-entropy in nats, summed (reduce) or per token, and the model's second output. A
        criterion of your own overrides this."""
        if reduce and getattr(model, "computes_loss", False):
            return model(**sample["net_input"], target=sample["target"])
        logits, extra = model(**sample["net_input"])[:2]
        lprobs = model.get_normalized_probs((logits, extra), log_probs=True)
        nll = F.nll_loss(
            lprobs.view(-1, lprobs.size(-1)),
            sample["target"].view(-1),
            ignore_index=self.padding_idx,
            reduction="sum" if reduce else "none",
        )
        return nll, extra

    def _gate_losses(self, records: Sequence[Any]) -> Tuple[Tensor, Tensor]:
        """The balancing loss, transformed, and the z-loss, each combined over layers: scalars."""
        balance = torch.stack([record.balance_loss for record in records])  # (layers,)
        if balance.is_cuda:  # elsewhere, and at evaluation, the decoder has looked
            self._check_finite(torch.isfinite(balance), [record.layer for record in records])
        gate_loss = self.combine(balance)
        if self.neg_log:
            # without tokens the loss is 0, transformed too
            gate_loss = -torch.log(gate_loss.masked_fill(gate_loss == 0, 1))
        return gate_loss, self.combine(torch.stack([record.z_loss for record in records]))

    def _check_finite(self, finite: Tensor, layers: List[int]) -> None:
        """Raise UserError if a layer's loss was not finite in the batch before: finite (layers,)
        bool, on a GPU.

        By now that answer has arrived; asking about this batch would synchronise. No update is made
        with that batch: the trainer stops at gradients that are not finite and runs it again
        (fairseq/trainer.py:964@0.12.2), which ends here. With --fp16 or --amp it lowers the loss
        scale and skips that batch, or tries it again (fairseq/trainer.py:987@0.12.2).
        """
        asked = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True)
        asked.copy_(finite, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        before, self._asked = self._asked, (asked, copied)
        if before is not None:
            finite, copied = before
            copied.synchronize()
            if not finite.all():
                raise not_finite(layers[int((~finite).nonzero()[0])])

    def _averaged(self, records: Sequence[Any]) -> Dict[str, Tensor]:
        """Each metric averaged over MoE layers, and on request those of each layer."""
        averaged = {
            name: torch.stack([record.stats[name] for record in records]).mean()
            for name in records[0].stats
        }
        if self.log_per_layer:
            for record in records:
                stats = {"gate_loss": record.balance_loss.detach(), **record.stats}
                averaged.update({f"layer{record.layer}_{k}": v for k, v in stats.items()})
        return averaged

    @staticmethod
    def logged(cfg: MoECrossEntropyConfig, sparse: bool) -> List[str]:
        """Names of the logged metrics, for a model with experts (sparse) or without."""
        return ["loss", "inner_loss", *(["nll_loss"] if cfg.sentence_avg else []), "ppl"] + (
            logged_of_gates(cfg) if sparse else []
        )

    @staticmethod
    def reduce_metrics(logging_outputs: List[Dict[str, Any]]) -> None:
        """Log the loss (base 2, with the gates' share), inner_loss (base 2, the language model's
        alone), ppl, moe_gate_loss and moe_z_loss (natural, unweighted), and the mean over batches
        of every metric of the gates."""
        total = partial(summed, logging_outputs)
        sample_size, ntokens = total("sample_size"), total("ntokens")
        inner_loss = total("inner_loss")
        bits = sample_size * math.log(2)
        metrics.log_scalar("loss", total("loss") / bits, sample_size, round=3)
        metrics.log_scalar("inner_loss", inner_loss / bits, sample_size, round=3)
        per_token = "inner_loss"
        if sample_size != ntokens:
            per_token = "nll_loss"
            metrics.log_scalar("nll_loss", inner_loss / ntokens / math.log(2), ntokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters[per_token].avg))
        log_gates(logging_outputs)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


def summed(logging_outputs: List[Dict[str, Any]], key: str) -> Any:
    """The sum of a value over logging outputs; some of them may lack it."""
    return sum(log.get(key, 0) for log in logging_outputs)


def _of_whole_batch(
    records: Sequence[Any], whole: Optional[float], sample_size: float
) -> Sequence[Any]:
    """Where the balancing losses are parts of that of an update (--moe-balance-over global_batch),
    have the trainer add them up: it weights each micro-batch by its share of the sample size."""
    if whole is None:
        return records
    factor = whole / sample_size if sample_size else 0.0
    return [record._replace(balance_loss=factor * record.balance_loss) for record in records]


def logged_of_gates(cfg: MoECrossEntropyConfig) -> List[str]:
    """What log_gates logs for every model with experts, without the additions of
    --moe-log-per-layer."""
    return ["moe_gate_loss", *(["moe_z_loss"] if cfg.moe_z_loss_wt > 0 else []), *METRICS]


_LOGGED_LOSSES = {
    "moe_loss": "moe_gate_loss",
    "moe_z_loss": "moe_z_loss",
    "moe_router_loss": "moe_router_loss",  # of routers with a loss of their own, weighted
}


def log_gates(logging_outputs: List[Dict[str, Any]]) -> None:
    """Log moe_gate_loss, moe_z_loss (natural, unweighted) and moe_router_loss, and the mean over
    batches of every metric, where there are any."""
    total = partial(summed, logging_outputs)
    logged = dict.fromkeys(key for log in logging_outputs for key in log)
    sample_size, batches = total("sample_size"), total("batch_count")
    for key, name in _LOGGED_LOSSES.items():
        if key in logged:
            metrics.log_scalar(name, total(key) / sample_size, sample_size, round=8)
    for key in logged:
        if key in (*METRICS, NULL_SHARE, *_TRAFFIC) or _LAYER_METRIC.match(key):
            metrics.log_scalar(key, total(key) / batches, batches, round=3)
