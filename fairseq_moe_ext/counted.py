"""How much of the data a figure is over is said; over nothing, or NaN, there is no figure.

Wrappers of stock's functions, put in place by `apply()`; each names the place in fairseq 0.12.2.
"""

import functools
import inspect
import logging
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple, Sequence

import numpy as np
from fairseq.data import FairseqDataset, TokenBlockDataset, data_utils
from fairseq.data.shorten_dataset import TruncateDataset
from fairseq.models import BaseFairseqModel
from fairseq.tasks import FairseqTask
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.trainer import Trainer

from . import data_bin
from .errors import DAMAGED, NotFinite, UserError

logger = logging.getLogger(__name__)
SKIP = "--skip-invalid-size-inputs-valid-test"


def apply() -> None:
    """Put the wrappers in place, once."""
    if hasattr(FairseqTask.filter_indices_by_size, "says_how_much"):
        return
    _say_which_samples_are_too_long()
    _count_what_eval_lm_is_given()
    _say_what_max_valid_steps_leaves_out()
    _find_forgotten_validation_sets()
    _refuse_a_loss_that_is_no_number()


def _say_which_samples_are_too_long() -> None:
    """fairseq/tasks/fairseq_task.py:167 says how many samples it leaves out as too long for the
    model, not how much of the data they are, nor minds if none is left; and raises a plain
    Exception where it may leave none out."""
    stock = FairseqTask.filter_indices_by_size

    @functools.wraps(stock)
    def filter_indices_by_size(
        self, indices, dataset, max_positions=None, ignore_invalid_inputs=False
    ):
        kept = stock(self, indices, dataset, max_positions, True)
        by_line = hasattr(
            self, "next_line"
        )  # fairseq-interactive's, told one by one (generation.py)
        if len(kept) == len(indices) or by_line:
            return kept
        counted, whole = _tokens(dataset, kept), _tokens(dataset, indices)
        told = (
            f"{len(indices) - len(kept):,} of {len(indices):,} samples are longer than "
            f"{_longest(max_positions)}, which is what the model takes (or --max-tokens)"
        )
        if not len(kept):
            raise UserError(f"{told}, and none is left: lower --tokens-per-sample")
        if not ignore_invalid_inputs:
            raise UserError(
                f"{told}: lower --tokens-per-sample, or add {SKIP}, with which {counted:,} of "
                f"{whole:,} tokens are counted"
            )
        logger.warning(f"{told}, and are left out: counted {counted:,} of {whole:,} tokens")
        return kept

    filter_indices_by_size.says_how_much = True
    FairseqTask.filter_indices_by_size = filter_indices_by_size


def _longest(max_positions: Any) -> Any:
    """The one limit out of an int or several."""
    limits = max_positions.values() if isinstance(max_positions, dict) else max_positions
    limits = [limits] if isinstance(limits, (int, float)) else limits
    flat = [x for limit in limits for x in np.ravel(limit) if x is not None]
    return min(flat)


def _tokens(dataset: FairseqDataset, indices: np.ndarray) -> int:
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


def _count_what_eval_lm_is_given() -> None:
    """fairseq/tasks/language_modeling.py:348 leaves out what is too long whether the user has asked
    for it or not, and does not see that --context-window makes samples longer. The iterator that it
    returns gets `offered`; the models learn from fairseq_cli/eval_lm.py:263 what was asked."""
    stock = LanguageModelingTask.eval_lm_dataloader
    stock_prepare = BaseFairseqModel.prepare_for_inference_
    signature = inspect.signature(stock)

    @functools.wraps(stock)
    def eval_lm_dataloader(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        dataset, longest = call["dataset"], call["max_positions"]
        longest = math.inf if longest is None else _longest(longest)
        sizes = np.asarray(dataset.sizes)
        window = call["context_window"]
        if window > 0 and len(sizes) and sizes.max() + window > longest:
            raise UserError(
                f"--tokens-per-sample {sizes.max() + window} with --context-window {window}: the "
                f"model takes {longest} tokens, context included: use --tokens-per-sample {longest}"
            )
        fitting = sizes[sizes <= longest]
        found = stock(*args, **kwargs)
        found.offered = Offered(
            _stored(dataset), len(sizes), _sum(sizes), len(fitting), _sum(fitting), longest
        )
        return found

    @functools.wraps(stock_prepare)
    def prepare_for_inference_(self, cfg):
        stock_prepare(self, cfg)
        dataset = getattr(cfg, "dataset", None)
        self.may_skip = bool(getattr(dataset, "skip_invalid_size_inputs_valid_test", False))

    LanguageModelingTask.eval_lm_dataloader = eval_lm_dataloader
    BaseFairseqModel.prepare_for_inference_ = prepare_for_inference_


def _sum(sizes: Sequence[int]) -> int:
    return int(np.sum(sizes, dtype=np.int64))


def _stored(dataset: FairseqDataset) -> int:
    """Tokens in the data-bins that a dataset of blocks is made of; --sample-break-mode complete_doc
    makes no block of blank lines."""
    if isinstance(dataset, TokenBlockDataset):
        sentences = dataset.dataset
        while isinstance(sentences, TruncateDataset):  # --shorten-method
            sentences = sentences.dataset
        return _sum(sentences.sizes)
    if hasattr(dataset, "datasets"):
        return sum(map(_stored, dataset.datasets))
    return _stored(dataset.dataset) if hasattr(dataset, "dataset") else _sum(dataset.sizes)


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


def _say_what_max_valid_steps_leaves_out() -> None:
    """fairseq_cli/train.py:434 ends a validation after --max-valid-steps batches, and one more, of
    each process, without a word; of several corpora it would see the first alone. There that many
    batches of each are what the iterator has, however many processes share them."""
    stock = Trainer.get_valid_iterator

    @functools.wraps(stock)
    def get_valid_iterator(self, subset, *args, **kwargs):
        iterator = stock(self, subset, *args, **kwargs)
        steps = getattr(self, "max_valid_steps", None) or self.cfg.dataset.max_valid_steps
        if steps is None:
            return iterator
        if not hasattr(iterator, "batches_in_all"):  # it is used again in later validations
            iterator.batches_in_all = iterator.frozen_batches
        batches = iterator.batches_in_all
        if hasattr(iterator.dataset, "first_of_each"):
            taken = iterator.dataset.first_of_each(batches, steps)
            iterator._frozen_batches = tuple(taken)
        else:
            taken = batches[: (steps + 1) * iterator.num_shards]
        if len(taken) < len(batches):
            logger.warning(
                f"--max-valid-steps {steps}: {sum(map(len, taken)):,} of "
                f"{sum(map(len, batches)):,} samples of {subset} are counted"
            )
        return iterator

    Trainer.get_valid_iterator = get_valid_iterator


def _find_forgotten_validation_sets() -> None:
    """fairseq/data/data_utils.py:586 refuses valid1 and the like that --valid-subset does not name,
    but does not look into the folders of corpora."""
    stock = data_utils.raise_if_valid_subsets_unintentionally_ignored

    @functools.wraps(stock)
    def raise_if_valid_subsets_unintentionally_ignored(cfg):
        stock(cfg)
        if getattr(cfg.task, "_name", None) != "mixture_language_modeling" or not cfg.task.data:
            return
        for name, folder in data_bin.find_corpora(Path(cfg.task.data)).items():
            subsets = cfg.dataset.valid_subset.replace(f"/{name}", "")
            dataset = SimpleNamespace(**{**cfg.dataset, "valid_subset": subsets})
            try:
                stock(SimpleNamespace(dataset=dataset, task=SimpleNamespace(data=str(folder))))
            except ValueError as error:
                raise UserError(f"{folder}: {error}") from error

    data_utils.raise_if_valid_subsets_unintentionally_ignored = (
        raise_if_valid_subsets_unintentionally_ignored
    )


def validate_every_corpus(train: ModuleType) -> None:
    """Wrap fairseq_cli/train.py:379, which is to end no validation of several corpora by itself."""
    stock = train.validate

    @functools.wraps(stock)
    def validate(cfg, trainer, task, *args, **kwargs):
        steps = cfg.dataset.max_valid_steps
        if steps is None or not getattr(task, "has_corpora", False):
            return stock(cfg, trainer, task, *args, **kwargs)
        trainer.max_valid_steps, cfg.dataset.max_valid_steps = steps, None
        try:
            return stock(cfg, trainer, task, *args, **kwargs)
        finally:
            trainer.max_valid_steps, cfg.dataset.max_valid_steps = None, steps

    train.validate = validate


def _refuse_a_loss_that_is_no_number() -> None:
    """fairseq_cli/validate.py:119 and fairseq/trainer.py:1067 go on with it, and print nan."""
    stock = FairseqTask.valid_step

    @functools.wraps(stock)
    def valid_step(self, sample, model, criterion):
        loss, sample_size, logging_output = stock(self, sample, model, criterion)
        if not math.isfinite(float(loss.sum())):
            raise NotFinite(f"the validation loss is {float(loss.sum())}: {DAMAGED}")
        return loss, sample_size, logging_output

    FairseqTask.valid_step = valid_step
