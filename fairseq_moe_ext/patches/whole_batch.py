"""The balancing loss over all micro-batches and processes of an update (--moe-balance-over
global_batch), whose choices must be known before the first gradient."""

import contextlib
from typing import Any, Dict, Iterator, List, Sequence

import torch
from fairseq import metrics

from ..expert_parallel import process_count, sum_over_processes
from ..moe.balance import Balance, WholeBatch
from ..moe.layer import MoELayer


@contextlib.contextmanager
def counted(trainer: Any, samples: Sequence[Dict[str, Any]]) -> Iterator[None]:
    """While an update of several micro-batches is made, its layers know the whole batch's choices
    and the decoder its sample size, by which the parts of the loss are weighted.

    They are counted by forward passes of all micro-batches, with the same random numbers as those
    that follow; this costs about a third of an update. With one micro-batch the processes' sums are
    at hand in its own forward pass, and nothing is counted.
    """
    if len(samples) < 2:
        yield
        return
    model = trainer.get_model()
    balances = [
        module.balance
        for module in model.modules()
        if isinstance(module, MoELayer) and module.balance.over == "global_batch"
    ]
    if not balances or not model.decoder.balanced_by_loss:
        yield
        return
    try:
        for balance in balances:
            balance.counting = True
        with _no_backward(trainer.optimizer), _no_logs_of_traffic(model.decoder):
            sample_size = _forward(trainer, samples)
        model.decoder.whole_sample_size = _sum_over_processes(balances, sample_size)
        for balance in balances:
            balance.counting = False
        yield
    finally:
        model.decoder.whole_sample_size = None
        for balance in balances:
            balance.counting, balance.whole = False, None


@contextlib.contextmanager
def _no_backward(optimizer: Any) -> Iterator[None]:
    optimizer.backward = lambda loss: None  # hides the class's
    try:
        yield
    finally:
        del optimizer.backward


@contextlib.contextmanager
def _no_logs_of_traffic(decoder: Any) -> Iterator[None]:
    """Leave the cost of the exchanges to the next pass, whose logging outputs are kept."""
    logs, decoder.record_traffic = decoder.record_traffic, False
    try:
        yield
    finally:
        decoder.record_traffic = logs


def _forward(trainer: Any, samples: Sequence[Dict[str, Any]]) -> float:
    """All forward passes as the update will make them; the sum of this process's sample sizes."""
    total = 0.0
    trainer._set_seed()  # as fairseq/trainer.py:782@0.12.2
    trainer.model.train()
    trainer.criterion.train()
    with torch.no_grad(), metrics.aggregate(new_root=True):
        for sample in samples:
            sample, is_dummy = trainer._prepare_sample(sample)
            _, sample_size, _ = trainer.task.train_step(
                sample=sample,
                model=trainer.model,
                criterion=trainer.criterion,
                optimizer=trainer.optimizer,
                update_num=trainer.get_num_updates(),
                ignore_grad=is_dummy,
            )
            total += 0.0 if is_dummy else float(sample_size)
    return total


def _sum_over_processes(balances: List[Balance], sample_size: float) -> float:
    """Make what the layers have counted that of all processes; returns the sum of sample sizes."""
    held = [(balance, balance.whole) for balance in balances if balance.whole is not None]
    if process_count() == 1:
        return sample_size
    parts = [torch.cat([w.counts.flatten(), w.tokens.view(1)]).double() for _, w in held]
    size = parts[0].new_tensor([sample_size])
    summed = sum_over_processes(torch.cat([*parts, size])).to(size.device)
    for (balance, whole), part in zip(held, summed.split([len(part) for part in parts] + [1])):
        counts, tokens = part[:-1], part[-1]
        balance.whole = WholeBatch(counts.view(len(whole.counts), -1), tokens)
    return float(summed[-1])
