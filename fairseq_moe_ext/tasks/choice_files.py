"""Where the examples of the task multiple_choice come from.

The paper's eight data sets (section 3.3) and COPA, as published, below FOLDER/NAME; or one's own:

    FOLDER/{train,valid,test}.jsonl    {"context": "...", "choices": ["...", "..."], "label": 0}

or, with the same classes for all examples,

    FOLDER/labels.txt                  a class a line
    FOLDER/{train,valid,test}.jsonl    {"text": "...", "label": "one of the classes"}
"""

import hashlib
from pathlib import Path
from typing import Dict, List, Optional, Tuple

from ..errors import UserError
from ..priming.formats import CLASSES, TASKS, Item, find_file, read_items
from ..priming.records import Record, read_jsonl

LABELS_FILE = "labels.txt"
NAMES = sorted(set(TASKS) - {"record"})  # of whose questions some have several right answers
# Published validation sets beside the one that the paper evaluates on.
_VALID: Dict[str, Tuple[str, ...]] = {"openbookqa": ("dev.jsonl",)}


class ChoiceFiles:
    """Splits of a data set as lists of questions with one right candidate each.

    classes: names of the answers where all questions have the same; None where each has its own.
    suffix: the language model is to score what follows the candidates, not the candidates.
    """

    def __init__(self, folder: Path, name: Optional[str], valid_share: float) -> None:
        """
        Args:
            name: of a published data set; None: one's own files.
            valid_share: of the training set, by a hash of the question, for the split valid.

        Raises:
            UserError: no such folder or data set, or a labels.txt that names no classes.
        """
        if not folder.is_dir():
            raise UserError(f"--choice-data {folder}: no such folder; name that of the questions")
        if name is not None and name not in NAMES:
            raise UserError(
                f"--choice-task {name}: unknown; there are {', '.join(NAMES)}; for files of one's "
                "own leave the flag out"
            )
        self.folder = folder
        self.name = name
        self.valid_share = valid_share
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
            raise UserError(f"subset {split}: {self.name} has train, valid and test")
        return find_file(self.folder / self.name, names[split], task.origin)

    def read(self, split: str) -> List[Item]:
        """Raises UserError for a file that is missing or empty, and for a line, by its number, that
        is not what it must be."""
        path = self.path(split)
        if self.name is not None:
            items = read_items(TASKS[self.name], path)
        elif self.classes is None:
            items = [_own_choices(line) for line in read_jsonl(path)]
        else:
            items = [_own_text(line, self.classes) for line in read_jsonl(path)]
        if self.valid_share and split in ("train", "valid"):
            held_out = split == "valid"
            items = [item for item in items if (_draw(item) < self.valid_share) == held_out]
        if not items:
            raise UserError(f"{path}: no example for the split {split} in it")
        return items


def _own_classes(folder: Path) -> Optional[Tuple[str, ...]]:
    path = folder / LABELS_FILE
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8").split("\n")
    classes = tuple(line.strip() for line in lines if line.strip())
    if len(set(classes)) < max(2, len(classes)):
        raise UserError(f"{path}: has to name two or more different classes, one a line")
    return classes


def _own_choices(line: Record) -> Item:
    context = line.text("context")
    choices = line.items("choices")
    if len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise line.mistake(f"field 'choices' is {choices!r}; two or more texts are needed")
    label = line.among("label", {str(i): i for i in range(len(choices))})
    return Item(tuple(context + choice for choice in choices), frozenset({label}))


def _own_text(line: Record, classes: Tuple[str, ...]) -> Item:
    text = line.text("text")
    label = line.among("label", {name: i for i, name in enumerate(classes)})
    return Item(tuple(f"{text}\n{name}" for name in classes), frozenset({label}))


def _draw(item: Item) -> float:
    """A number from 0 to below 1 that depends on the question's text alone."""
    digest = hashlib.sha256("\0".join(item.candidates).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
