"""The task `mixture_language_modeling`: language modelling over a mixture of corpora.

One data folder with a data-bin per corpus (see data_bin.py). Training draws from all corpora with
a train split; validation goes over every corpus, each in batches of its own, and logs a perplexity
per corpus and their means. A subset is a split ("valid": of all corpora) or a split of one corpus
("valid/docs").
"""

import logging
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import torch
from fairseq import metrics
from fairseq.data import FairseqDataset, LMContextWindowDataset
from fairseq.data.iterators import EpochBatchIterator
from fairseq.tasks import register_task
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from omegaconf import II

from .. import data_bin, ranges
from ..errors import UserError
from ..wording import did_you_mean
from .mixture_dataset import MixtureDataset, SeparateCorporaDataset, apportion, release

logger = logging.getLogger(__name__)

IN_DOMAIN, OUT_OF_DOMAIN = "in_domain", "out_of_domain"
_NLL = "corpus_nll/"  # keys of the logging output: sum over a corpus's tokens, in nats
_TOKENS = "corpus_tokens/"


@dataclass
class MixtureLanguageModelingConfig(LanguageModelingConfig):
    train_corpora: Optional[str] = field(
        default=None,
        metadata={
            "help": "comma-separated names of the corpora to train on (default: all that have a "
            "train split); the others are out of domain"
        },
    )
    corpus_weights: Optional[str] = field(
        default=None,
        metadata={
            "help": "shares of the training tokens, such as docs=0.5,code=0.3,web=0.2; they are "
            "scaled to sum to 1 (default: proportional to size, every block once per epoch)"
        },
    )
    corpus_temperature: Optional[float] = field(
        default=None,
        metadata={
            "help": "make the shares of the training tokens proportional to size ** (1 / "
            "temperature): 1 is proportional to size, larger is more even"
        },
    )
    train_subset: str = II("dataset.train_subset")


@register_task("mixture_language_modeling", dataclass=MixtureLanguageModelingConfig)
class MixtureLanguageModelingTask(LanguageModelingTask):
    """See the module; `corpora` are the folders by name, `trained` the names trained on."""

    has_corpora = True  # of which a validation looks at every one

    def __init__(self, args, dictionary, output_dictionary=None, targets=None):
        super().__init__(args, dictionary, output_dictionary, targets)
        self._train_iterator: Optional[EpochBatchIterator] = None
        self.corpora: Dict[str, Path] = {}
        if args.data:
            data = Path(args.data)
            self.corpora = data_bin.find_corpora(data)
            data_bin.check_dictionaries(data, self.corpora)
        # in domain; --train-corpora may name corpora that this folder does not have when a trained
        # model is loaded with other data, so it is checked only when training data are loaded
        split, _, corpus = args.train_subset.partition("/")
        names = [corpus] if corpus else _names(args.train_corpora)
        self.trained = data_bin.trained_on(self.corpora, names, split)
        self.trained_before: List[str] = []  # by the runs that this one goes on from

    @classmethod
    def setup_task(cls, args, **kwargs):
        """As stock's. Raises UserError for data or settings that this task cannot have."""
        if args.data and os.pathsep in args.data:
            raise UserError(
                f"{args.data}: '{os.pathsep}' separates data folders, and "
                "mixture_language_modeling takes one: put all corpora into one folder, or rename "
                f"one with '{os.pathsep}' in its name"
            )
        if args.data:
            data_bin.find_corpora(Path(args.data))  # before the dictionary is read
        if args.dataset_impl not in (None, "mmap"):
            raise UserError(
                f"--dataset-impl {args.dataset_impl}: mixture_language_modeling reads mmap "
                "data-bins only"
            )
        args.dataset_impl = "mmap"  # stock would guess it, and say less of a damaged file
        if args.shorten_data_split_list:
            raise UserError(
                f"--shorten-data-split-list {args.shorten_data_split_list}: not supported by "
                "mixture_language_modeling; --shorten-method alone applies to all splits"
            )
        if args.corpus_weights is not None and args.corpus_temperature is not None:
            raise UserError(
                "--corpus-weights and --corpus-temperature both set the shares: remove one of them"
            )
        _names(args.train_corpora)
        _weights(args.corpus_weights)
        ranges.check({"corpus_temperature": args.corpus_temperature})
        return super().setup_task(args, **kwargs)

    def state_dict(self) -> Dict[str, Any]:
        """As stock's, plus the corpora trained on, which a checkpoint records."""
        names = [data_bin.own_name(name, self.corpora[name]) for name in self.trained]
        trained = sorted({*names, *self.trained_before})
        return {**super().state_dict(), data_bin.TRAINED: trained}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Like stock's; only evaluations call it (fairseq/checkpoint_utils.py:439@0.12.2)."""
        super().load_state_dict(state_dict)
        if data_bin.TRAINED in state_dict:
            self.trained = data_bin.trained_on(self.corpora, state_dict[data_bin.TRAINED])

    def load_dataset(self, split: str, epoch: int = 1, combine: bool = False, **kwargs) -> None:
        """Load a subset: SPLIT, of all corpora that have it, or SPLIT/CORPUS.

        Raises:
            UserError: an unknown corpus, no such split, a data-bin that is empty, incomplete or
                not in the mmap format, an impossible mixture.
        """
        name, _, corpus = split.partition("/")
        chosen = self._with_split(name, corpus)
        if not corpus and len(chosen) < len(self.corpora) and split != "train":
            missing = ", ".join(name for name in self.corpora if name not in chosen)
            logger.warning(f"subset {split}: not found for {missing}; its metrics leave them out")
        # fairseq-validate passes `task_cfg`, and reads all of a training's text once
        training = split == self.args.train_subset and "task_cfg" not in kwargs
        if training:
            chosen = self._to_train_on(chosen)
        parts = {corpus: self._load_part(corpus, name, epoch, combine) for corpus in chosen}
        if training:
            counts = self._blocks_per_epoch(parts)
            self.datasets[split] = MixtureDataset(parts, counts, seed=self.args.seed)
        else:
            order = list(self.corpora)
            self.datasets[split] = SeparateCorporaDataset(
                [order.index(corpus) for corpus in parts], list(parts.values())
            )

    def _with_split(self, split: str, corpus: str) -> List[str]:
        """Names of the corpora that have `split`; only `corpus`, unless it is ""."""
        data = self.args.data
        if not self.corpora:
            raise UserError(
                f"{data}: contains no data-bin, nor do its folders (looked for *.idx); make some "
                "with `fairseq-moe prepare`"
            )
        if corpus and corpus not in self.corpora:
            raise UserError(
                f"subset {split}/{corpus}: {data} has no corpus {corpus!r}; it has "
                + ", ".join(self.corpora)
                + did_you_mean(corpus, self.corpora)
            )
        names = [
            name
            for name, folder in self.corpora.items()
            if corpus in ("", name) and data_bin.has_split(folder, split)
        ]
        if not names:
            there = "; ".join(
                f"{name}: {', '.join(data_bin.splits_of(folder))}"
                for name, folder in self.corpora.items()
                if corpus in ("", name)
            )
            subset = f"{split}/{corpus}" if corpus else split
            raise UserError(f"subset {subset}: no such data-bin in {data}; there are {there}")
        return names

    def _to_train_on(self, having: List[str]) -> List[str]:
        """The corpora of --train-corpora, each of which must be in `having`; or all of them."""
        chosen = _names(self.args.train_corpora)
        if chosen is None:
            return having
        for name in chosen:
            if name not in having:
                raise UserError(
                    f"--train-corpora {self.args.train_corpora}: {self.args.data} has no corpus "
                    f"{name!r} with a train split; those with one: {', '.join(having)}"
                    + did_you_mean(name, having)
                )
        return [name for name in having if name in chosen]

    def validation_metrics(self, subset: str) -> List[str]:
        """Names of what validation on a subset logs beside what the criterion does. Raises
        UserError for a subset that is not there."""
        split, _, corpus = subset.partition("/")
        corpora = self._with_split(split, corpus)
        trained = [name in self.trained for name in corpora]
        means = {IN_DOMAIN: any(trained), OUT_OF_DOMAIN: not all(trained)}
        return [f"{name}_ppl" for name in [*corpora, *(mean for mean in means if means[mean])]]

    def check_training(self) -> None:
        """Raise UserError for missing training corpora, before any is loaded."""
        split, _, corpus = self.args.train_subset.partition("/")
        self._weights_of(self._to_train_on(self._with_split(split, corpus)))

    def _load_part(self, corpus: str, split: str, epoch: int, combine: bool) -> FairseqDataset:
        """One corpus's split, as the stock task makes it."""
        key = os.path.relpath(self.corpora[corpus] / split, self.args.data)
        super().load_dataset(key, epoch=epoch, combine=combine)
        return self.datasets.pop(key)

    def _weights_of(self, corpora: List[str]) -> Optional[Dict[str, float]]:
        """The weights of --corpus-weights, which must name exactly these corpora."""
        weights = _weights(self.args.corpus_weights)
        for name in sorted(weights.keys() - {*corpora}) if weights else ():
            raise UserError(
                f"--corpus-weights {self.args.corpus_weights}: {name!r} is not among the training "
                f"corpora: {', '.join(corpora)}{did_you_mean(name, corpora)}"
            )
        for name in corpora if weights else ():
            if name not in (weights or {}):
                raise UserError(
                    f"--corpus-weights {self.args.corpus_weights}: no weight for {name!r}; add "
                    "one, or exclude the corpus with --train-corpora"
                )
        return weights

    def _blocks_per_epoch(self, parts: Dict[str, FairseqDataset]) -> List[int]:
        """Blocks of each corpus in one epoch; in total as many as exist."""
        blocks = np.array([len(part) for part in parts.values()])  # (corpora,)
        tokens = np.array([part.sizes.sum(dtype=np.int64) for part in parts.values()])
        weights = self._weights_of(list(parts))
        if weights is not None:
            shares = np.array([weights[name] for name in parts])
        elif self.args.corpus_temperature is not None:
            # in proportion to the largest, so that no power overflows
            shares = (tokens / tokens.max()) ** (1 / self.args.corpus_temperature)
        else:
            return blocks.tolist()
        counts = apportion(shares / (tokens / blocks), int(blocks.sum()))
        for name, count in zip(parts, counts):
            if count == 0:
                flag = "--corpus-weights" if weights is not None else "--corpus-temperature"
                raise UserError(
                    f"{flag}: the share of {name!r} is less than one block of "
                    f"{self.args.tokens_per_sample} tokens per epoch; raise it, or exclude the "
                    "corpus with --train-corpora"
                )
        for name, count, size in zip(parts, counts, blocks):
            logger.info(f"mixture: {count:,} blocks of {name} per epoch; it has {size:,}")
        return counts

    def get_batch_iterator(self, dataset, *args, **kwargs):
        """Like stock's, but ends the workers of the previous epoch, which stock leaves to
        chance. With --context-window, too, no batch mixes two corpora."""
        if isinstance(dataset, LMContextWindowDataset):
            dataset.batch_by_size = dataset.dataset.batch_by_size
        iterator = super().get_batch_iterator(dataset, *args, **kwargs)
        if isinstance(dataset, MixtureDataset):
            previous, self._train_iterator = self._train_iterator, iterator
            if previous not in (None, iterator):
                release(previous)
        return iterator

    def valid_step(self, sample, model, criterion):
        loss, sample_size, logging_output = super().valid_step(sample, model, criterion)
        if "corpus" in sample:
            # The same keys on every rank, of the same kind: they are summed over ranks in one
            # vector (fairseq/trainer.py:1411@0.12.2).
            names = ("inner_loss", "nll_loss", "loss")  # the last may be smoothed, or include more
            nll = next(logging_output[name] for name in names if name in logging_output)
            nll = torch.as_tensor(nll).detach()
            for index, name in enumerate(self.corpora):
                of_corpus = index == sample["corpus"]
                logging_output[_NLL + name] = nll if of_corpus else torch.zeros_like(nll)
                logging_output[_TOKENS + name] = logging_output["ntokens"] if of_corpus else 0
        return loss, sample_size, logging_output

    def reduce_metrics(self, logging_outputs: List[Dict[str, Any]], criterion) -> None:
        """Log what the criterion logs, and in validation the perplexities of corpora.

        <corpus>_ppl of every corpus of the subset, and in_domain_ppl and out_of_domain_ppl, the
        plain means over corpora trained on and not trained on, if there are any. They are those of
        the language-modelling loss alone (`inner_loss` or `nll_loss` if the criterion has it).
        """
        super().reduce_metrics(logging_outputs, criterion)
        for name in self.corpora:
            tokens = sum(log.get(_TOKENS + name, 0) for log in logging_outputs)
            if not tokens > 0:
                continue
            nll = sum(log.get(_NLL + name, 0) for log in logging_outputs)
            # a name that begins with "_" is kept, but not shown
            metrics.log_scalar(_meter(name), nll / tokens / math.log(2), tokens)
            _log_mean_perplexity(f"{name}_ppl", [name])
            trained = name in self.trained
            _log_mean_perplexity(
                f"{IN_DOMAIN if trained else OUT_OF_DOMAIN}_ppl",
                [other for other in self.corpora if (other in self.trained) == trained],
            )


def _names(value: Optional[str]) -> Optional[List[str]]:
    """The corpora of --train-corpora, None if it is not given."""
    if value is None:
        return None
    names = [name.strip() for name in value.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UserError(
            f"--train-corpora {value!r}: not a list of different corpora, such as docs,code"
        )
    return names


def _weights(value: Optional[str]) -> Optional[Dict[str, float]]:
    """The weights of --corpus-weights by corpus, None if it is not given."""
    if value is None:
        return None
    weights: Dict[str, float] = {}
    for item in value.split(","):
        name, _, number = (part.strip() for part in item.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or name in weights or not 0 < weight < math.inf:
            raise UserError(
                f"--corpus-weights {value}: {item.strip()!r} is not NAME=WEIGHT with a weight "
                "above 0, each corpus once; exclude corpora with --train-corpora"
            )
        weights[name] = weight
    return weights


def _meter(corpus: str) -> str:
    return f"_nll_{corpus}"


def _log_mean_perplexity(key: str, corpora: List[str]) -> None:
    def mean(meters) -> float:
        seen = [meters[_meter(name)].avg for name in corpora if _meter(name) in meters]
        return sum(map(_perplexity, seen)) / len(seen)

    metrics.log_derived(key, mean)


def _perplexity(bits) -> float:
    try:
        return 2 ** float(bits)
    except OverflowError:
        return math.inf
