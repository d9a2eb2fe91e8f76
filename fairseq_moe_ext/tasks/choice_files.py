"""Reads the examples of the task multiple_choice.

The paper's eight data sets (section 3.3) and COPA, as published, in FOLDER/NAME; or your own:

    FOLDER/{train,valid,test}.jsonl    {"context": "...", "choices": ["...", "..."], "label": 0}

(and "group": "..." if questions with different contexts are related)

or, with the same classes for all examples,

    FOLDER/labels.txt                  one class per line
    FOLDER/{train,valid,test}.jsonl    {"text": "...", "label": "one of the classes"}
"""

import hashlib
import logging
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from .. import files
from ..errors import UserError
from ..questions.formats import CLASSES, TASKS, Item, find_file, given_keys, group_key, read_counted
from ..questions.records import Record, read_jsonl
from ..wording import did_you_mean

logger = logging.getLogger(__name__)

LABELS_FILE = "labels.txt"
NAMES = sorted(set(TASKS) - {"record"})  # some of whose questions have several right answers
# Published validation sets in addition to the one that the paper evaluates on.
_VALID: Dict[str, Tuple[str, ...]] = {"openbookqa": ("dev.jsonl", "dev_complete.jsonl")}


class ChoiceFiles:
    """Splits of a data set as lists of questions with one right candidate each.

    classes: names of the answers where all questions have the same; None where each has its own.
    suffix: the language model is to score what follows the candidates, not the candidates.
    """

    def __init__(
        self, folder: Path, name: Optional[str], valid_share: float, published: bool = False
    ) -> None:
        """
        Args:
            name: of a published data set; None: your own files.
            valid_share: share of the training set for the split valid; related questions
                stay together.
            published: leave the text as published, where priming does not.

        Raises:
            UserError: no such folder or data set, or a labels.txt that names no classes.
        """
        if not folder.is_dir():
            raise UserError(
                f"--choice-data {folder}: no such folder; name the folder with the questions"
            )
        if name is not None and name not in NAMES:
            raise UserError(
                f"--choice-task {name}: unknown{did_you_mean(name, NAMES)}; use one of "
                f"{', '.join(NAMES)}; for your own files remove the flag"
            )
        self.folder = folder
        self.name = name
        self.valid_share = valid_share
        self.published = published
        self.suffix = name is not None and TASKS[name].rule == "suffix"
        self.classes = _own_classes(folder) if name is None else CLASSES.get(name)

    def path(self, split: str) -> Path:
        """The file of a split. Raises UserError if it is missing."""
        if self.valid_share and split == "valid":
            split = "train"
        if self.name is None:
            path = self.folder / f"{split}.jsonl"
            if not path.is_file():
                raise UserError(
                    f"{path}: missing; --choice-data must have a file for each split, or else "
                    "--choice-task must name a published data set"
                )
            return path
        task = TASKS[self.name]
        names = {"train": task.examples, "test": task.evaluated}
        names["valid"] = _VALID.get(self.name, task.evaluated)
        if split not in names:
            raise UserError(f"subset {split}: not found; {self.name} has train, valid and test")
        return find_file(self.folder / self.name, names[split], task.origin)

    def read(self, split: str) -> List[Item]:
        """Raises UserError for a file that is missing or empty, and, with its number, for a line in
        the wrong form."""
        path = self.path(split)
        if self.name is not None:
            items, unanswered = read_counted(TASKS[self.name], path, self.published)
            if unanswered:
                logger.info(
                    f"{split}: {unanswered:,} of {len(items) + unanswered:,} questions "
                    f"of {path} have no right answer and are skipped"
                )
        elif self.classes is None:
            items = [_own_choices(line) for line in read_jsonl(path)]
        else:
            items = [_own_text(line, self.classes) for line in read_jsonl(path)]
        if not items:
            raise UserError(f"{path}: contains no example for the split {split}")
        if self.valid_share and split in ("train", "valid"):
            return self._share(items, split, path)
        return items

    def _share(self, items: Sequence[Item], split: str, path: Path) -> List[Item]:
        """The part of the training set for valid or train. Raises UserError if either would be
        empty."""
        groups = grouped(items)
        taken = hold_out(items, groups, self.valid_share)
        if not taken or len(taken) == len(groups):
            raise UserError(
                f"--choice-valid-share {self.valid_share}: the {len(items)} questions of {path} "
                f"cannot be split like that, because related ones form {len(groups)} groups of "
                f"{min(map(len, groups))} or more; use another share, or a file for valid"
            )
        valid = {i for group in taken for i in group}
        chosen = [item for i, item in enumerate(items) if (i in valid) == (split == "valid")]
        count = len(taken) if split == "valid" else len(groups) - len(taken)
        logger.info(
            f"{split}: {len(chosen):,} of the {len(items):,} questions of {path} "
            f"({100 * len(chosen) / len(items):.1f} %; --choice-valid-share {self.valid_share}), "
            f"in {count:,} of the {len(groups):,} groups of questions that belong together"
        )
        return chosen


def grouped(items: Sequence[Item]) -> List[List[int]]:
    """Numbers of the questions connected by common keys, directly or through others; in order."""
    parent = list(range(len(items)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: Dict[bytes, int] = {}
    for i, item in enumerate(items):
        for key in item.keys:
            parent[root(i)] = root(first.setdefault(key, i))
    groups: Dict[int, List[int]] = {}
    for i in range(len(items)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def hold_out(items: Sequence[Item], groups: Sequence[List[int]], share: float) -> List[List[int]]:
    """Whole groups with about that share of all questions. They are drawn by a hash of their text,
    so every process and every run draws the same, whatever their order in the file."""
    room = share * len(items)
    taken: List[List[int]] = []
    left: List[List[int]] = []
    for group in sorted(groups, key=lambda group: min(_hash(items[i]) for i in group)):
        (taken if len(group) <= room else left).append(group)
        room -= len(group) if len(group) <= room else 0
    smallest = min(left, key=len, default=None)
    # nearer to the share with it than without
    if smallest is not None and len(smallest) < 2 * room:
        taken.append(smallest)
    return taken


def _hash(item: Item) -> bytes:
    return hashlib.sha256("\0".join(item.candidates).encode()).digest()


def _own_classes(folder: Path) -> Optional[Tuple[str, ...]]:
    path = folder / LABELS_FILE
    if not path.exists():
        return None
    lines = files.read_text(path, encoding="utf-8-sig").split("\n")
    classes = tuple(line.strip() for line in lines if line.strip())
    if len(set(classes)) < max(2, len(classes)):
        raise UserError(f"{path}: must list two or more different classes, one per line")
    return classes


def _own_choices(line: Record) -> Item:
    context = line.text("context")
    choices = line.texts("choices")
    if len(choices) < 2 or not all(choice.strip() for choice in choices):
        raise line.mistake(f"field 'choices' is {choices!r}; give two or more texts")
    label = line.among("label", {str(i): i for i in range(len(choices))})
    return _own(line, context, [context + choice for choice in choices], label)


def _own_text(line: Record, classes: Tuple[str, ...]) -> Item:
    text = line.text("text")
    label = line.among("label", {name: i for i, name in enumerate(classes)})
    return _own(line, text, [f"{text}\n{name}" for name in classes], label)


def _own(line: Record, text: str, candidates: List[str], label: int) -> Item:
    shared = (*given_keys(line, "group"), *([group_key("text", text)] if text.strip() else []))
    return Item(tuple(candidates), frozenset({label}), shared=shared, location=line.location)
