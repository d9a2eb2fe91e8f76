"""What fairseq's trainer and eval-lm must know of experts that are spread over processes.

Wrappers of stock's functions, put in place by `apply()`; without experts, or on one process, they
pass calls through. Each names the place in fairseq 0.12.2 that it wraps.
"""

import functools
import sys
from typing import Any, Dict, Iterable, Iterator, List

import torch
from fairseq import trainer, utils
from torch import Tensor

from .checkpoint import check_code_versions
from .expert_parallel import collective_device, process_count, sum_of_experts


def apply() -> None:
    """Put the wrappers in place, once."""
    if getattr(utils.clip_grad_norm_, "counts_experts", False):
        return
    _count_experts_in_the_gradient_norm()
    _leave_dummy_batches_empty()
    for name in ("fairseq_cli.eval_lm", "__main__"):  # the latter with `python -m`
        module = sys.modules.get(name)
        if getattr(getattr(module, "__spec__", None), "name", "") == "fairseq_cli.eval_lm":
            _evaluate_the_whole_set(module)


def _count_experts_in_the_gradient_norm() -> None:
    """fairseq/utils.py:347 leaves parameters with the attribute `expert` out of the norm, though it
    clips them by it."""
    stock = utils.clip_grad_norm_

    @functools.wraps(stock)
    def clip_grad_norm_(params, max_norm, aggregate_norm_fn=None) -> Tensor:
        params = [params] if isinstance(params, Tensor) else list(params)
        experts = [p.grad for p in params if hasattr(p, "expert") and p.grad is not None]
        if not experts:
            return stock(params, max_norm, aggregate_norm_fn)
        shared = [p.grad for p in params if not hasattr(p, "expert") and p.grad is not None]
        shared_norm = _sum_of_squares(shared).sqrt()
        if aggregate_norm_fn is not None:
            shared_norm = aggregate_norm_fn(shared_norm)
        expert_norm = sum_of_experts(_sum_of_squares(experts)).sqrt()
        norm = torch.hypot(shared_norm, expert_norm.to(shared_norm))
        if max_norm > 0:
            clip = (float(max_norm) / (norm + 1e-6)).clamp(max=1)
            for grad in shared + experts:
                grad.mul_(clip)
        return norm

    clip_grad_norm_.counts_experts = True
    utils.clip_grad_norm_ = clip_grad_norm_


def _sum_of_squares(grads: List[Tensor]) -> Tensor:
    """In float32 at least, as float16 would overflow; a scalar."""
    norms = [
        torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
        for g in grads
    ]
    return torch.stack(norms).square().sum() if norms else torch.zeros(())


def _leave_dummy_batches_empty() -> None:
    """A process that has run out of batches goes through its first one again and throws the result
    away (fairseq/trainer.py:1128), as it must join every collective. Its tokens would queue before
    other processes' experts; so it goes through no sentences instead."""
    stock = trainer.Trainer._prepare_sample

    @functools.wraps(stock)
    def _prepare_sample(self, sample, is_dummy=False):
        sample, is_dummy = stock(self, sample, is_dummy)
        if is_dummy and process_count() > 1 and getattr(self._model, "has_experts", False):
            sample = _no_sentences(sample)
        return sample, is_dummy

    trainer.Trainer._prepare_sample = _prepare_sample


def _no_sentences(sample: Dict[str, Any]) -> Dict[str, Any]:
    """A batch of language modelling, cut to its first zero rows."""
    empty = {
        key: value[:0] if isinstance(value, Tensor) and value.dim() > 0 else value
        for key, value in sample.items()
    }
    return {
        **empty,
        "net_input": {key: value[:0] for key, value in sample["net_input"].items()},
        "ntokens": 0,
        "nsentences": 0,
    }


def _evaluate_the_whole_set(eval_lm) -> None:
    """fairseq_cli/eval_lm.py:61 gives each process the loss of its own share of the batches, and
    passes a share's missing last batch over. Here each process takes as many steps as any, and the
    result is the set's."""
    stock = eval_lm.eval_lm

    @functools.wraps(stock)
    def whole(models, source_dictionary, batch_iterator, *args, **kwargs):
        if process_count() == 1:
            return stock(models, source_dictionary, batch_iterator, *args, **kwargs)
        check_code_versions()
        pad = (kwargs.get("target_dictionary") or source_dictionary).pad()
        batches = _CountingBatches(batch_iterator, pad)
        result = stock(models, source_dictionary, batches, *args, **kwargs)
        bits = torch.tensor(
            [float(result["loss"]) * batches.targets, batches.targets], dtype=torch.float64
        )
        bits = bits.to(collective_device())
        torch.distributed.all_reduce(bits)
        loss = float(bits[0] / bits[1])
        return {"loss": loss, "perplexity": 2**loss}

    eval_lm.eval_lm = whole


class _CountingBatches:
    """Batches, with an empty one where a share has none, and the number of targets that stock's
    scorer scores in them."""

    def __init__(self, batches: Iterable[Dict[str, Any]], pad: int) -> None:
        self.batches = batches
        self.pad = pad
        self.targets = 0

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        for batch in self.batches:
            if "net_input" not in batch:
                none = torch.zeros(0, 1, dtype=torch.long)
                inputs = {"src_tokens": none, "src_lengths": none[:, 0]}
                batch = {"id": none[:, 0], "net_input": inputs, "target": none, "ntokens": 0}
            starts = batch.get("start_indices", [0] * len(batch["target"]))
            for row, start in zip(batch["target"], starts):
                self.targets += int(row[start:].ne(self.pad).sum())
            yield batch
