"""How much of the data a figure is over is said; over nothing, or NaN, there is no figure.

The wrappers that ask for it are in patches/ (eval_lm.py, tasks.py, trainer.py).
"""

from typing import Any, NamedTuple, Sequence, Union

import numpy as np
from fairseq.data import FairseqDataset, TokenBlockDataset
from fairseq.data.shorten_dataset import TruncateDataset
from fairseq.models import BaseFairseqModel

from .errors import UserError

SKIP = "--skip-invalid-size-inputs-valid-test"


def longest(max_positions: Any) -> Any:
    """The one limit out of an int or several."""
    limits = max_positions.values() if isinstance(max_positions, dict) else max_positions
    limits = [limits] if isinstance(limits, (int, float)) else limits
    flat = [x for limit in limits for x in np.ravel(limit) if x is not None]
    return min(flat)


def tokens(dataset: FairseqDataset, indices: np.ndarray) -> int:
    try:
        return int(np.sum(dataset.num_tokens_vec(indices), dtype=np.int64))
    except NotImplementedError:
        return sum(int(dataset.num_tokens(index)) for index in indices)


class Offered(NamedTuple):
    """What fairseq-eval-lm is to evaluate."""

    stored: int  # tokens in the data-bin
    samples: int
    tokens: int  # in the samples
    fitting: int  # samples that the model takes
    fitting_tokens: int
    longest: float  # that the model takes


def total(sizes: Union[Sequence[int], np.ndarray]) -> int:
    return int(np.sum(sizes, dtype=np.int64))


def stored(dataset: FairseqDataset) -> int:
    """Tokens in the data-bins that a dataset of blocks is made of; --sample-break-mode complete_doc
    makes no block of blank lines."""
    if isinstance(dataset, TokenBlockDataset):
        sentences = dataset.dataset
        while isinstance(sentences, TruncateDataset):  # --shorten-method
            sentences = sentences.dataset
        return total(sentences.sizes)
    if hasattr(dataset, "datasets"):
        return sum(map(stored, dataset.datasets))
    return stored(dataset.dataset) if hasattr(dataset, "dataset") else total(dataset.sizes)


def check_offered(offered: Offered, model: BaseFairseqModel) -> None:
    """Raise UserError where fairseq-eval-lm would leave samples out without having been asked."""
    if offered.fitting < offered.samples and not getattr(model, "may_skip", False):
        raise UserError(
            f"--tokens-per-sample: {offered.samples - offered.fitting:,} of {offered.samples:,} "
            f"samples are longer than {offered.longest}, which is what the model takes, and "
            f"{offered.fitting_tokens:,} of {offered.tokens:,} tokens would be counted: use "
            f"--tokens-per-sample {offered.longest} or less with --sample-break-mode none, or add "
            f"{SKIP} to leave them out"
        )


def what_was_counted(offered: Offered, counted: int) -> str:
    """A line where fairseq-eval-lm has not scored everything, else ""."""
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
