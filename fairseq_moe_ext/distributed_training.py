"""What fairseq's trainer and eval-lm must know of experts that are spread over processes.

Wrappers of stock's functions, put in place by `apply()`; each names the place in fairseq 0.12.2
that it wraps. In training on one process, or without experts, they pass calls through.
"""

import functools
import importlib.util
import inspect
import math
import sys
from types import ModuleType
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
from fairseq import trainer, utils
from fairseq.data import Dictionary
from fairseq.data.lm_context_window_dataset import LMContextWindowDataset
from fairseq.sequence_scorer import SequenceScorer
from fairseq.tasks import FairseqTask
from torch import Tensor

from .checkpoint.together import check_code_versions
from .config import validate_processes
from .counted import check_offered, validate_every_corpus, what_was_counted
from .errors import DAMAGED, UserError
from .expert_parallel import (
    collective_device,
    process_count,
    sum_of_experts,
    sum_over_processes,
)
from .models import compiled


def apply() -> None:
    """Put the wrappers in place, once."""
    if getattr(utils.clip_grad_norm_, "counts_experts", False):
        return
    _refuse_what_cannot_be_trained()
    _count_experts_in_the_gradient_norm()
    _leave_dummy_batches_empty()
    _give_each_batch_its_context()
    _validate_on_any_share()
    for command, wrap in (
        ("fairseq_cli.eval_lm", _evaluate_the_whole_set),
        ("fairseq_cli.train", validate_every_corpus),
    ):
        for name in (command, "__main__"):  # the latter with `python -m`
            module = sys.modules.get(name)
            if getattr(getattr(module, "__spec__", None), "name", "") == command:
                wrap(module)
        if command not in sys.modules:
            sys.meta_path.insert(0, CommandFinder(command, wrap))


class CommandFinder:
    """Finds nothing itself: wraps a module, once, when it is imported."""

    def __init__(self, command: str, wrap: Callable[[ModuleType], None]) -> None:
        self.command, self.wrap = command, wrap

    def find_spec(self, name, path=None, target=None):
        if name != self.command:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        stock = spec.loader.exec_module

        def exec_module(module):
            stock(module)
            self.wrap(module)

        spec.loader.exec_module = exec_module
        return spec


def _refuse_what_cannot_be_trained() -> None:
    """The first that stock does when it has a model to train (fairseq_cli/train.py:110)."""
    stock = trainer.Trainer.__init__

    @functools.wraps(stock)
    def __init__(self, cfg, task, model, *args, **kwargs):
        if process_count() > 1 and getattr(model, "has_experts", False):
            validate_processes(cfg.model, process_count())
        if getattr(cfg.model, "compile", False):
            compiled.check()
        stock(self, cfg, task, model, *args, **kwargs)

    trainer.Trainer.__init__ = __init__


def _count_experts_in_the_gradient_norm() -> None:
    """fairseq/utils.py:347 leaves parameters with the attribute `expert` out of the norm, though it
    clips them by it; and fairseq/trainer.py:1253, which adds up the squares of FSDP's pieces, wants
    a GPU and rounds to float32."""
    stock = utils.clip_grad_norm_

    @functools.wraps(stock)
    def clip_grad_norm_(params, max_norm, aggregate_norm_fn=None) -> Tensor:
        params = [params] if isinstance(params, Tensor) else list(params)
        experts = [p.grad for p in params if hasattr(p, "expert") and p.grad is not None]
        if not experts and aggregate_norm_fn is None:
            return stock(params, max_norm)
        shared = [p.grad for p in params if not hasattr(p, "expert") and p.grad is not None]
        shared_squares = _sum_of_squares(shared)
        if aggregate_norm_fn is not None:  # FSDP's: each process has a piece of each gradient
            shared_squares = sum_over_processes(shared_squares)
        shared_norm = shared_squares.sqrt()
        norm = shared_norm
        if experts:
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


def _give_each_batch_its_context() -> None:
    """fairseq/data/lm_context_window_dataset.py:49 (--context-window) takes for a batch's context
    what it collated before, which on several processes, or with several workers, is not what stands
    before the batch; and it trips over a batch of nothing."""
    stock_item, stock_collater = LMContextWindowDataset.__getitem__, LMContextWindowDataset.collater

    @functools.wraps(stock_item)
    def __getitem__(self, index):
        return {**stock_item(self, index), "index": int(index)}

    @functools.wraps(stock_collater)
    def collater(self, samples):
        if not samples:
            return {}
        before, missing = samples[0]["index"], self.context_window
        found = [torch.zeros(0, dtype=torch.long)]
        while before > 0 and missing > 0:
            before -= 1
            found.insert(0, self.dataset[before]["source"])
            missing -= len(found[0])
        self.prev_tokens = torch.cat(found)[-self.context_window :].numpy()
        return stock_collater(self, samples)

    LMContextWindowDataset.__getitem__ = __getitem__
    LMContextWindowDataset.collater = collater


def _validate_on_any_share() -> None:
    """fairseq_cli/validate.py:119 gives a process whose share has a batch less than others' nothing
    at all, over which the criterion trips; here it joins with no sentences. (Trainers have seen to
    that before.)"""
    stock = FairseqTask.valid_step

    @functools.wraps(stock)
    def valid_step(self, sample, model, criterion):
        if sample:
            self.last_sample = sample
        elif getattr(self, "last_sample", None):
            sample = _no_sentences(self.last_sample)  # of the kind that this task has
        else:
            sample = _nothing(next(model.parameters()).device)
        return stock(self, sample, model, criterion)

    FairseqTask.valid_step = valid_step


def _nothing(device: Optional[torch.device] = None) -> Dict[str, Any]:
    """A batch of language modelling with no sentences."""
    none = torch.zeros(0, 1, dtype=torch.long, device=device)
    inputs = {"src_tokens": none, "src_lengths": none[:, 0]}
    counts = {"ntokens": 0, "nsentences": 0}
    return {"id": none[:, 0], "net_input": inputs, "target": none, **counts}


def _evaluate_the_whole_set(eval_lm) -> None:
    """fairseq_cli/eval_lm.py:61 adds up scores in float32, and gives each process the loss of its
    own share of the batches, of which it passes a missing last one over. Here the sums are in
    float64 and of the whole set, and each process takes as many steps as any. A figure over a part
    says so, and over nothing there is none."""
    stock = eval_lm.eval_lm
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def whole(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        offered = getattr(getattr(call["batch_iterator"], "iterable", None), "offered", None)
        if offered is not None:
            check_offered(offered, call["models"][0])
        if process_count() > 1:
            check_code_versions()
            call["batch_iterator"] = _with_empty_batches(call["batch_iterator"])
        dictionary = call["target_dictionary"] or call["source_dictionary"]
        sums = _Sums(dictionary, call["post_process"], call["remove_bos_token"])
        eval_lm.SequenceScorer = functools.partial(_AddingScorer, sums)
        try:
            stock(**call)
        finally:
            eval_lm.SequenceScorer = SequenceScorer
        loss, tokens = sums.result()
        told = what_was_counted(offered, tokens) if offered is not None else ""
        if told:
            eval_lm.logger.warning(told)
        return {"loss": loss, "perplexity": 2**loss}

    eval_lm.eval_lm = whole


def _with_empty_batches(batches: Iterable[Dict[str, Any]]) -> Iterator[Dict[str, Any]]:
    """Batches, with one of no sentences where a share has none."""
    for batch in batches:
        yield batch if "net_input" in batch else _nothing()


class _Sums:
    """What stock's eval_lm adds up over its hypotheses."""

    def __init__(self, dictionary: Dictionary, post_process: Optional[str], without_bos: bool):
        """
        Args:
            post_process: what a piece of a word ends with that goes on; it is no word of its own.
            without_bos: the first token is not scored.
        """
        self.scores = 0.0
        self.count = 0  # of words, where pieces are joined
        self.tokens = 0
        self.first = 1 if without_bos else 0
        pieces = []
        if post_process is not None:
            end = post_process.rstrip()
            pieces = [i for i in range(len(dictionary)) if dictionary[i].endswith(end)]
        self.pieces = torch.tensor(pieces, dtype=torch.long)

    def add(self, tokens: Tensor, scores: Tensor) -> None:
        """tokens (T,), and the logarithms of their probabilities (T,)."""
        tokens, scores = tokens[self.first :].cpu(), scores[self.first :].cpu()
        if not scores.isfinite().all():  # stock leaves out infinity, and goes on with NaN
            raise UserError(
                "the model gives a token the log-probability "
                f"{float(scores[~scores.isfinite()][0])}: {DAMAGED}"
            )
        self.scores += float(scores.sum(dtype=torch.float64))
        self.tokens += len(tokens)
        self.count += len(tokens) - int(torch.isin(tokens[:-1], self.pieces).sum())

    def result(self) -> Tuple[float, int]:
        """Bits a word, and how many tokens were scored, over all processes. Raises UserError if
        there was none."""
        sums = torch.tensor([self.scores, self.count, self.tokens], dtype=torch.float64)
        if process_count() > 1:
            sums = sums.to(collective_device())
            torch.distributed.all_reduce(sums)
        scores, count, tokens = sums.tolist()
        if not count > 0:
            raise UserError("no token was scored: the subset or this share of it is empty")
        return -scores / count / math.log(2), int(tokens)


class _AddingScorer(SequenceScorer):
    def __init__(self, sums: _Sums, *args) -> None:
        super().__init__(*args)
        self.sums = sums

    def generate(self, models, sample, **kwargs):
        hypotheses = super().generate(models, sample, **kwargs)
        for best, *_ in hypotheses:
            self.sums.add(best["tokens"], best["positional_scores"])
        return hypotheses
