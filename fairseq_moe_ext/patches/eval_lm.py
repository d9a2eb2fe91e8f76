"""fairseq-eval-lm: sums in float64 over the whole set, and how much of the set they cover."""

import functools
import inspect
import math
from typing import Any, Dict, Iterable, Iterator, Optional, Tuple

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.sequence_scorer import SequenceScorer
from torch import Tensor

from fairseq_today.errors import UserError

from ..checkpoint.collective import check_code_versions
from ..counted import Offered, check_offered, longest, shorter, stored, total, what_was_counted
from ..errors import DAMAGED
from ..expert_parallel import collective_device, process_count, process_rank
from ..trainer_checks import warn_of_drops
from .tasks import nothing


def eval_lm_dataloader(stock, *args, **kwargs):
    """Stock leaves out samples that are too long without being asked, and ignores that
    --context-window makes samples longer. The returned iterator gets the attribute `offered`."""
    bound = inspect.signature(stock).bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    dataset, most = call["dataset"], call["max_positions"]
    most = math.inf if most is None else longest(most)
    sizes = np.asarray(dataset.sizes)
    window = call["context_window"]
    if window > 0 and len(sizes) and sizes.max() + window > most:
        raise UserError(
            f"--context-window {window}: with a sample of {sizes.max()} tokens this is more than "
            f"the {most} tokens that the model takes: {shorter(most)}"
        )
    fitting = sizes[sizes <= most]
    iterator = stock(*args, **kwargs)
    iterator.offered = Offered(
        stored(dataset), len(sizes), total(sizes), len(fitting), total(fitting), most
    )
    return iterator


def prepare_for_inference_(stock, self, cfg):
    """Tells the model whether samples may be left out (fairseq_cli/eval_lm.py:274@0.12.2)."""
    stock(self, cfg)
    dataset = getattr(cfg, "dataset", None)
    self.may_skip = bool(getattr(dataset, "skip_invalid_size_inputs_valid_test", False))


def eval_lm(stock, *args, **kwargs):
    """Stock sums scores in float32 and reports, for each process, the loss of its share of the
    batches. Here the sums are in float64 and over the whole set, and all processes take the same
    number of steps. A loss over a part of the set says so; a loss over nothing is not reported."""
    bound = inspect.signature(stock).bind(*args, **kwargs)
    bound.apply_defaults()
    call = bound.arguments
    offered = getattr(getattr(call["batch_iterator"], "iterable", None), "offered", None)
    if offered is not None:
        check_offered(offered, call["models"][0])
    if process_rank() == 0:
        warn_of_drops(call["models"][0])
    if process_count() > 1:
        check_code_versions()
        call["batch_iterator"] = _with_empty_batches(call["batch_iterator"])
    dictionary = call["target_dictionary"] or call["source_dictionary"]
    sums = _Sums(dictionary, call["post_process"], call["remove_bos_token"])
    names = stock.__globals__
    names["SequenceScorer"] = functools.partial(_AddingScorer, sums)
    try:
        stock(**call)
    finally:
        names["SequenceScorer"] = SequenceScorer
    loss, tokens = sums.result()
    warning = what_was_counted(offered, tokens) if offered is not None else ""
    if warning:
        names["logger"].warning(warning)
    return {"loss": loss, "perplexity": 2**loss}


def _with_empty_batches(batches: Iterable[Dict[str, Any]]) -> Iterator[Dict[str, Any]]:
    """Batches, with an empty one where a process has none."""
    for batch in batches:
        yield batch if "net_input" in batch else nothing()


class _Sums:
    """The sums that stock's eval_lm takes over its hypotheses."""

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
        """Add tokens (S,) and their log-probabilities (S,)."""
        tokens, scores = tokens[self.first :].cpu(), scores[self.first :].cpu()
        if not scores.isfinite().all():  # stock leaves out infinity, and continues with NaN
            raise UserError(
                "the model gives a token the log-probability "
                f"{float(scores[~scores.isfinite()][0])}: {DAMAGED}"
            )
        self.scores += float(scores.sum(dtype=torch.float64))
        self.tokens += len(tokens)
        self.count += len(tokens) - int(torch.isin(tokens[:-1], self.pieces).sum())

    def result(self) -> Tuple[float, int]:
        """Bits per word and the number of scored tokens, over all processes. Raises UserError if no
        token was scored."""
        sums = torch.tensor([self.scores, self.count, self.tokens], dtype=torch.float64)
        if process_count() > 1:
            sums = sums.to(collective_device())
            torch.distributed.all_reduce(sums)
        scores, count, tokens = sums.tolist()
        if not count > 0:
            raise UserError(
                "no token was scored: the subset, or this shard of it, is empty; choose another "
                "--gen-subset or --shard-id"
            )
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
