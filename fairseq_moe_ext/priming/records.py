"""Lines of a data set's published files, which know where they stand.

Files are read as UTF-8, with or without a byte order mark.
"""

import csv
import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Mapping, NamedTuple, TypeVar

from ..errors import UserError

Value = TypeVar("Value")


class Record(NamedTuple):
    """One line, or one element where the file is one JSON object."""

    path: Path
    place: str  # "line 3", counted from 1
    values: Mapping[str, Any]

    def get(self, *keys: str) -> Any:
        """The value at values[key][key]...; UserError with file and place where there is none."""
        found: Any = self.values
        for key in keys:
            if not isinstance(found, Mapping) or found.get(key) is None:
                raise self.mistake(f"no field {'.'.join(keys)!r}")
            found = found[key]
        return found

    def text(self, *keys: str) -> str:
        found = self.get(*keys)
        if not isinstance(found, str):
            raise self.mistake(f"field {'.'.join(keys)!r} is {found!r}, not text")
        return found

    def items(self, *keys: str) -> list:
        found = self.get(*keys)
        if not isinstance(found, list) or not found:
            raise self.mistake(f"field {'.'.join(keys)!r} is {found!r}, not a list with something")
        return found

    def among(self, key: str, meaning: Mapping[str, Value]) -> Value:
        """What the field's value stands for; UserError for one that stands for nothing."""
        word = str(self.get(key))
        if word not in meaning:
            choices = ", ".join(meaning)
            raise self.mistake(f"field {key!r} is {word!r}; one of {choices} is needed")
        return meaning[word]

    def part(self, values: Any) -> "Record":
        """A part of the line, as a record of the same place."""
        return Record(self.path, self.place, values if isinstance(values, Mapping) else {})

    def mistake(self, words: str) -> UserError:
        return UserError(f"{self.path}, {self.place}: {words}")


Reader = Callable[[Path], Iterator[Record]]


def read_jsonl(path: Path) -> Iterator[Record]:
    """A JSON object a line; blank lines are passed over."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(_decoded(file, path), start=1):
            if line.strip():
                yield Record(path, f"line {number}", _json(line, path, number))


def read_jsonl_and_labels(path: Path) -> Iterator[Record]:
    """NAME.jsonl, and beside it NAME-labels.lst with a label a line, which becomes the field
    "label"."""
    labels_path = path.with_name(f"{path.stem}-labels.lst")
    try:
        labels = labels_path.read_text(encoding="utf-8-sig").split()
    except (OSError, ValueError):
        raise UserError(
            f"{labels_path}: missing or not text; it has the answers to {path.name}, a line each"
        ) from None
    records = list(read_jsonl(path))
    if len(labels) != len(records):
        raise UserError(
            f"{labels_path}: {len(labels)} labels for the {len(records)} lines of {path.name}; "
            "take both from the same release"
        )
    for record, label in zip(records, labels):
        yield record._replace(values={**record.values, "label": label})


def read_csv(path: Path) -> Iterator[Record]:
    """Comma-separated, quoted, with a head."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        yield from _rows(csv.DictReader(_decoded(file, path)), path)


def read_tsv(path: Path) -> Iterator[Record]:
    """Tab-separated with a head, as GLUE's files: a quotation mark is a character as any."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(_decoded(file, path), delimiter="\t", quoting=csv.QUOTE_NONE)
        yield from _rows(rows, path)


def read_json(path: Path) -> Record:
    """One JSON object for the whole file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError:
        raise UserError(f"{path}: not UTF-8; take the file as it was published") from None
    return Record(path, "line 1", _json(text, path, 1))


def _rows(rows: csv.DictReader, path: Path) -> Iterator[Record]:
    try:
        for values in rows:
            yield Record(path, f"line {rows.line_num}", values)
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num}: {error}") from None


def _json(text: str, path: Path, line: int) -> Dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}, line {line}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}, line {line}: not a JSON object")
    return found


def _decoded(file: Any, path: Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; take the file as it was published") from None
