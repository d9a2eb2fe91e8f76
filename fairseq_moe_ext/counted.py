"""Counts how much of the data a metric covers. A metric of no data, or NaN, is not reported.

The wrappers in patches/ (eval_lm.py, tasks.py, trainer.py) call this module.
"""

from typing import Any, NamedTuple, Sequence, Union

import numpy as np
from fairseq.data import FairseqDataset, TokenBlockDataset
from fairseq.data.shorten_dataset import TruncateDataset
from fairseq.models import BaseFairseqModel

from .errors import UserError

_IN_BLOCKS = "--sample-break-mode none or --shorten-method truncate"
SKIP = "--skip-invalid-size-inputs-valid-test"


def longest(max_positions: Any) -> Any:
    """The smallest of the limits of a model or data set, which may be nested."""
    limits = max_positions.values() if isinstance(max_positions, dict) else max_positions
    limits = [limits] if isinstance(limits, (int, float)) else limits
    flat = [x for limit in limits for x in np.ravel(limit) if x is not None]
    return min(flat)


def shorter(limit: Any, break_mode: Any = "any") -> str:
    """The flags with which no sample is longer than limit. In other modes than none a sample may be
    a line of any length, whatever --tokens-per-sample is."""
    lines = f" with {_IN_BLOCKS}" if by_lines(break_mode) else ""
    return f"use --tokens-per-sample {limit} or less{lines}"


def room_for(dataset: FairseqDataset, indices: np.ndarray) -> str:
    """The flags with which no line is too long for a model to be trained, which takes as many
    tokens as the least of three flags. indices: of the lines."""
    most = max(int(np.max(dataset.size(index))) for index in indices)
    return (
        f"use {_IN_BLOCKS}, or raise --tokens-per-sample (and --max-target-positions and "
        f"--max-tokens, where they are lower) to {most}"
    )


def by_lines(break_mode: Any) -> bool:
    return str(break_mode).lower() != "none"


def tokens(dataset: FairseqDataset, indices: np.ndarray) -> int:
    """Tokens in some samples."""
    try:
        return int(np.sum(dataset.num_tokens_vec(indices), dtype=np.int64))
    except NotImplementedError:
        return sum(int(dataset.num_tokens(index)) for index in indices)


class Offered(NamedTuple):
    """What fairseq-eval-lm is to evaluate."""

    stored: int  # tokens in the data-bin
    samples: int
    tokens: int  # in the samples
    fitting: int  # samples that the model accepts
    fitting_tokens: int
    longest: float  # tokens that the model accepts


def total(sizes: Union[Sequence[int], np.ndarray]) -> int:
    return int(np.sum(sizes, dtype=np.int64))


def stored(dataset: FairseqDataset) -> int:
    """Tokens in the data-bins behind a data set of blocks, with the blank lines that
    --sample-break-mode complete_doc leaves out."""
    if isinstance(dataset, TokenBlockDataset):
        sentences = dataset.dataset
        while isinstance(sentences, TruncateDataset):  # --shorten-method
            sentences = sentences.dataset
        return total(sentences.sizes)
    if hasattr(dataset, "datasets"):
        return sum(map(stored, dataset.datasets))
    return stored(dataset.dataset) if hasattr(dataset, "dataset") else total(dataset.sizes)


def check_offered(offered: Offered, model: BaseFairseqModel) -> None:
    """Raise UserError if fairseq-eval-lm would leave samples out without being asked to."""
    if offered.fitting < offered.samples and not getattr(model, "may_skip", False):
        raise UserError(
            f"--tokens-per-sample: {offered.samples - offered.fitting:,} of {offered.samples:,} "
            f"samples are longer than {offered.longest}, the longest that the model takes, so "
            f"only {offered.fitting_tokens:,} of {offered.tokens:,} tokens would be counted: "
            f"{shorter(offered.longest)}, or add {SKIP} to leave them out"
        )


def what_was_counted(offered: Offered, counted: int) -> str:
    """A line that reports what fairseq-eval-lm has not scored and why; "" if it scored
    everything."""
    if counted == offered.stored:
        return ""
    reasons = []
    if offered.fitting < offered.samples:
        reasons.append(f"{offered.samples - offered.fitting:,} samples are too long for the model")
    if offered.tokens < offered.stored:
        out = f"{offered.stored - offered.tokens:,} tokens"
        reasons.append(f"--sample-break-mode or --shorten-method leaves out {out}")
    if counted < offered.fitting_tokens:
        reasons.append("the others are in other shares (--num-shards)")
    return f"counted {counted:,} of {offered.stored:,} tokens ({'; '.join(reasons)})"
