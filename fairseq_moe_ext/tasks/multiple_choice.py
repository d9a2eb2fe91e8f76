"""The task `multiple_choice`: fine-tuning on questions with candidates, one of them right.

Two ways (--choice-scoring). `head`, the paper's: a linear layer on the final position of each
candidate, softmax over candidates; where all questions have the same classes, one sequence and an
output a class (Radford et al. 2018, section 3.3). `sum` and `mean`: the language model's
log-probability of the candidate's own tokens, as in few-shot evaluation.
"""

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Set

import torch
from fairseq.data import Dictionary
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.tasks import FairseqTask, register_task
from fairseq.tasks.language_modeling import LanguageModelingTask
from omegaconf import II

from .. import accuracy, ranges
from ..data_bin import DICTIONARY
from ..errors import UserError
from ..questions import scoring
from ..questions.formats import Item as Question
from ..wording import count
from .choice_dataset import ChoiceDataset, Item
from .choice_files import NAMES, ChoiceFiles

logger = logging.getLogger(__name__)

_CLASSES = "choice_classes"  # a key in checkpoints
_METRICS = ("accuracy", "loss", "inner_loss")


@dataclass
class MultipleChoiceTaskConfig(FairseqDataclass):
    data: Optional[str] = field(
        default=None,
        metadata={"help": "folder with the model's dict.txt, encoder.json and vocab.bpe"},
    )
    choice_data: Optional[str] = field(
        default=None, metadata={"help": "folder with the questions' files"}
    )
    choice_task: Optional[str] = field(
        default=None,
        metadata={
            "help": "name of a published data set, whose files are in the folder of that name "
            "in --choice-data: " + ", ".join(NAMES) + "; default: your own files"
        },
    )
    choice_valid_share: float = field(
        default=0.0,
        metadata={
            "help": "use this share of the training set as the split valid, so that the checkpoint "
            "is not chosen on the published validation set (split test); related questions "
            "(of one passage, premise, pair of twins, ...) stay together"
        },
    )
    choice_published_text: bool = field(
        default=False,
        metadata={
            "help": "keep the text as published: HellaSwag's with WikiHow's markers ([header], "
            "[title], [step]), which are otherwise removed, as in lm-eval"
        },
    )
    choice_scoring: ChoiceEnum(["head", "sum", "mean"]) = field(
        default="head",
        metadata={
            "help": "how to score a candidate: a linear layer on its final position (head), or the "
            "sum or mean of the log-probabilities of its own tokens"
        },
    )
    tokens_per_sample: int = field(
        default=1024, metadata={"help": "longest sequence; longer ones lose their beginning"}
    )
    max_target_positions: Optional[int] = field(
        default=None, metadata={"help": "maximum number of tokens in the target sequence"}
    )
    train_subset: str = II("dataset.train_subset")
    valid_subset: str = II("dataset.valid_subset")
    disable_validation: bool = II("dataset.disable_validation")
    best_checkpoint_metric: str = II("checkpoint.best_checkpoint_metric")
    maximize_best_checkpoint_metric: bool = II("checkpoint.maximize_best_checkpoint_metric")


@register_task("multiple_choice", dataclass=MultipleChoiceTaskConfig)
class MultipleChoiceTask(FairseqTask):
    """See the module; `scoring` is "head", "sum" or "mean"."""

    def __init__(self, cfg: MultipleChoiceTaskConfig, dictionary: Dictionary) -> None:
        super().__init__(cfg)
        self.args = cfg  # the name in LanguageModelingTask
        self.dictionary = dictionary
        self.scoring = str(cfg.choice_scoring)
        assert cfg.choice_data is not None  # setup_task checks it
        self.files = ChoiceFiles(
            Path(cfg.choice_data),
            cfg.choice_task,
            cfg.choice_valid_share,
            cfg.choice_published_text,
        )
        self._train_keys: Set[bytes] = set()  # of the training questions, once they are read
        # One sequence with a score a class, or a sequence for each candidate.
        classes = self.files.classes if self.scoring == "head" else None
        self.outputs = len(classes) if classes is not None else 1

    @classmethod
    def setup_task(cls, cfg: MultipleChoiceTaskConfig, **kwargs) -> "MultipleChoiceTask":
        """Raises UserError for invalid or conflicting flags."""
        if not cfg.data or not (Path(cfg.data) / DICTIONARY).is_file():
            raise UserError(
                f"{Path(cfg.data or '.') / DICTIONARY}: missing; name the folder with the model's "
                f"{DICTIONARY}"
            )
        if cfg.choice_data is None:
            raise UserError("--choice-data is missing: name the folder with the questions")
        ranges.check({"choice_valid_share": cfg.choice_valid_share})
        metric, maximize = cfg.best_checkpoint_metric, cfg.maximize_best_checkpoint_metric
        if metric not in _METRICS:
            raise UserError(
                f"--best-checkpoint-metric {metric}: multiple_choice does not log it; it logs "
                + ", ".join(_METRICS)
            )
        if maximize != (metric == "accuracy"):
            raise UserError(
                f"--best-checkpoint-metric {metric}: "
                + (
                    "the best accuracy is the largest: add --maximize-best-checkpoint-metric"
                    if metric == "accuracy"
                    else "the best loss is the smallest: remove --maximize-best-checkpoint-metric"
                )
            )
        return cls(cfg, Dictionary.load(str(Path(cfg.data) / DICTIONARY)))

    # from_pretrained scores and samples by the language model, whatever the task.
    build_dataset_for_inference = LanguageModelingTask.build_dataset_for_inference
    inference_step = LanguageModelingTask.inference_step

    @property
    def source_dictionary(self) -> Dictionary:
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        return self.dictionary

    def max_positions(self) -> int:
        return self.cfg.tokens_per_sample

    def state_dict(self) -> Dict[str, Any]:
        """Like stock's, and the classes in the order of the head's outputs."""
        state = super().state_dict()
        return {**state, _CLASSES: list(self.files.classes or ())} if self.outputs > 1 else state

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Like stock's. Raises UserError if the head's outputs are of other classes."""
        rest = dict(state_dict)
        saved, classes = rest.pop(_CLASSES, None), list(self.files.classes or ())
        if saved and self.outputs > 1 and classes != saved:
            raise UserError(
                f"--choice-data {self.cfg.choice_data}: its classes are {', '.join(classes)}, but "
                f"the checkpoint's {', '.join(saved)}: use questions of these, and list them in "
                "this order"
            )
        super().load_state_dict(rest)

    def build_model(self, cfg: FairseqDataclass, from_checkpoint: bool = False):
        """Like stock's, with a head if it scores. Reads all questions before training, which stock
        would do only after the weights. Raises UserError for a model that cannot have a head, and
        like load_dataset."""
        if not from_checkpoint:
            wanted = "" if self.cfg.disable_validation else self.cfg.valid_subset
            for split in [self.cfg.train_subset, *filter(None, wanted.split(","))]:
                self.load_dataset(split)
        model = super().build_model(cfg, from_checkpoint)
        if not hasattr(model, "add_choice_head"):
            raise UserError(
                f"--arch: {type(model).__name__} cannot score candidates; use a dense_lm or moe_lm "
                "architecture, into which stock's transformer_lm checkpoints load"
            )
        if self.scoring == "head":
            model.add_choice_head(self.outputs)
        return model

    def build_criterion(self, cfg: FairseqDataclass, **kwargs):
        """As stock's. Raises UserError for a criterion that scores tokens, not candidates."""
        criterion = super().build_criterion(cfg, **kwargs)
        if not hasattr(criterion, "scores"):
            raise UserError(
                f"--criterion {getattr(cfg, '_name', '')}: does not score candidates; with --task "
                "multiple_choice use --criterion multiple_choice"
            )
        return criterion

    def load_dataset(self, split: str, combine: bool = False, **kwargs) -> None:
        """Read and encode a split, and say what is in it. Raises UserError for a file that is not
        as it should be, a tokenizer that is not the model's, a choice that is too long."""
        from ..questions.vocabulary import Vocabulary  # needs the package tokenizers

        if split in self.datasets:
            return
        ends = 2 if self.scoring == "head" else 0  # one </s> before a choice and one behind it
        limit = self.cfg.tokens_per_sample - ends
        if limit < 1:
            raise UserError(
                f"--tokens-per-sample {self.cfg.tokens_per_sample}: leaves no room for a choice "
                f"between two </s>: use {ends + 1} or more"
            )
        vocabulary = Vocabulary(Path(self.cfg.data))
        path, questions = self.files.path(split), self.files.read(split)
        logger.info(f"{split}: encoding {count(len(questions), 'question')} of {path}")
        tokens = [[vocabulary.encode(text) for text in each.candidates] for each in questions]
        vocabulary.check((row for rows in tokens for row in rows), str(path))
        items = []
        for question, rows in zip(questions, tokens):
            sequences = self._sequences(rows)
            fitting = [scoring.cut(row, limit) for row in sequences]
            if [_scored(row) for row in fitting] != [_scored(row) for row in sequences]:
                raise UserError(
                    f"{path}, {question.location}: a choice is longer than --tokens-per-sample "
                    f"{self.cfg.tokens_per_sample}: shorten it, or raise the limit"
                )
            item = self._item(fitting, min(question.right))
            items.append(item._replace(cut=fitting != sequences))
        self.datasets[split] = ChoiceDataset(
            items, self.dictionary.pad(), self.outputs, shuffle=split == self.cfg.train_subset
        )
        logger.info(f"{split}: {describe(questions, self.files.classes)}")
        cut = sum(item.cut for item in items)
        self._compare_with_train(split, questions)
        if cut:
            logger.warning(
                f"{split}: {cut:,} of {len(items):,} questions are longer than --tokens-per-sample "
                f"{self.cfg.tokens_per_sample}; they lose their beginning"
            )

    def _compare_with_train(self, split: str, questions: Sequence[Question]) -> None:
        """Log how many questions of a validation set are related to training questions."""
        if split == self.cfg.train_subset:
            self._train_keys.update(key for question in questions for key in question.keys)
            return
        related = sum(not self._train_keys.isdisjoint(question.keys) for question in questions)
        if related:
            logger.warning(
                f"{split}: {related:,} of {len(questions):,} questions are related to a training "
                "question: the same passage, premise, twin, ... or the same question"
            )

    def _sequences(self, candidates: List[List[int]]) -> List[scoring.Row]:
        """The sequences that the model gets, with the tokens from which on a row is scored."""
        if self.outputs > 1:
            shared = scoring.common_prefix(candidates)
            return [scoring.Row(tuple(candidates[0][:shared]), shared)]
        rows = [tuple(row) for row in candidates]
        if self.scoring == "head":
            return [scoring.Row(row, len(row)) for row in rows]
        return scoring.rows_of("suffix" if self.files.suffix else "sum", rows)

    def _item(self, rows: List[scoring.Row], label: int) -> Item:
        tokens = [torch.tensor(row.tokens, dtype=torch.long) for row in rows]
        eos = torch.tensor([self.dictionary.eos()])
        if self.scoring == "head":
            ended = [torch.cat([eos, row, eos]) for row in tokens]
            return Item(ended, [1] * len(rows), [], label)
        inputs = [torch.cat([eos, row[:-1]]) for row in tokens]
        return Item(inputs, [_scored(row) for row in rows], tokens, label)


def _scored(row: scoring.Row) -> int:
    """How many of a row's tokens are scored."""
    return len(row.tokens) - row.start


def describe(questions: List[Question], classes: Optional[Sequence[str]]) -> str:
    """One line: the number of questions, the distribution of right answers, and chance."""
    labels = [min(question.right) for question in questions]
    counts = Counter(labels)
    chance = accuracy.chance([1] * len(questions), [len(q.candidates) for q in questions])
    shares = ", ".join(
        f"{classes[label] if classes else label} {100 * counts[label] / len(labels):.1f} %"
        for label in sorted(counts)
    )
    return (
        f"{count(len(questions), 'question')}; right answer: {shares}; accuracy of the most "
        f"frequent answer {100 * accuracy.majority(labels):.1f} %, of chance "
        f"{100 * chance:.1f} %"
    )
