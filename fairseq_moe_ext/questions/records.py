"""Lines of a data set's published files, which know their file and line.

Files are read as UTF-8, with or without a byte order mark.
"""

import csv
import io
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    TextIO,
    Tuple,
    TypeVar,
)

from .. import files
from ..errors import UserError

Value = TypeVar("Value")


class Record(NamedTuple):
    """One line, or one element where the file is one JSON object."""

    path: Path
    location: str  # "line 3", counted from 1
    values: Mapping[str, Any]
    header: Tuple[str, ...] = ()  # of a table

    def get(self, *keys: str) -> Any:
        """The value at values[key][key]...; UserError with file and location if there is none."""
        if self.header and keys[0] not in self.header:
            raise UserError(
                f"{self.path}, line 1: the header is missing, or has no column {keys[0]!r}: it "
                f"reads {', '.join(self.header)[:80]!r}; use the file as published"
            )
        value: Any = self.values
        for key in keys:
            if not isinstance(value, Mapping) or value.get(key) is None:
                raise self.mistake(f"no field {'.'.join(keys)!r}")
            value = value[key]
        return value

    def text(self, *keys: str) -> str:
        value = self.get(*keys)
        if not isinstance(value, str):
            raise self.mistake(f"field {'.'.join(keys)!r} is {value!r}, not text")
        return value

    def number(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.mistake(f"field {key!r} is {value!r}, not a whole number")
        return value

    def items(self, *keys: str) -> list:
        value = self.get(*keys)
        if not isinstance(value, list) or not value:
            raise self.mistake(f"field {'.'.join(keys)!r} is {value!r}, not a non-empty list")
        return value

    def texts(self, *keys: str) -> List[str]:
        parts = [self.part({keys[-1]: part}) for part in self.items(*keys)]
        return [part.text(keys[-1]) for part in parts]

    def among(self, key: str, meaning: Mapping[str, Value]) -> Value:
        """The meaning of the field's value. UserError for an unknown value."""
        word = str(self.get(key))
        if word not in meaning:
            choices = ", ".join(meaning)
            raise self.mistake(f"field {key!r} is {word!r}; use one of {choices}")
        return meaning[word]

    def part(self, values: Any) -> "Record":
        """A part of the line, as a record with the same location."""
        return Record(self.path, self.location, values if isinstance(values, Mapping) else {})

    def mistake(self, words: str) -> UserError:
        return UserError(f"{self.path}, {self.location}: {words}")


Reader = Callable[[Path], Iterator[Record]]


def read_jsonl(path: Path) -> Iterator[Record]:
    """One JSON object per line; blank lines are skipped."""
    with _open(path) as file:
        for number, line in enumerate(_decoded(file, path), start=1):
            if line.strip():
                yield Record(path, f"line {number}", _json(line, path, number))


def read_jsonl_and_labels(path: Path) -> Iterator[Record]:
    """NAME.jsonl, and beside it NAME-labels.lst with one label per line, 0 or 1, which becomes the
    field "label"; a release that has the field needs no such file. Raises UserError for labels that
    are missing, wrong, or of another number of lines."""
    labels_path = path.with_name(f"{path.stem}-labels.lst")
    records = list(read_jsonl(path))
    if not labels_path.exists():
        if all("label" in record.values for record in records):
            yield from records
            return
        raise UserError(
            f"{labels_path}: missing; it contains the answers to {path.name}, one per line"
        )
    lines = files.read_text(labels_path, encoding="utf-8-sig").split("\n")
    labels = [(i, line.strip()) for i, line in enumerate(lines, start=1) if line.strip()]
    for i, label in labels:
        if label not in ("0", "1"):
            raise UserError(f"{labels_path}, line {i}: {label!r}; use 0 or 1")
    if len(labels) != len(records):
        raise UserError(
            f"{labels_path}: {len(labels)} labels for the {len(records)} lines of {path.name}; "
            "take both from the same release"
        )
    for record, (_, label) in zip(records, labels):
        yield record._replace(values={**record.values, "label": label})


def read_csv(path: Path) -> Iterator[Record]:
    """Comma-separated, quoted, with a header."""
    return _read_table(path)


def read_tsv(path: Path) -> Iterator[Record]:
    """Tab-separated with a header, as GLUE's files: a quotation mark is a character as any."""
    return _read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_json(path: Path) -> Record:
    """One JSON object for the whole file."""
    text = files.read_text(path, encoding="utf-8-sig")
    return Record(path, "line 1", _json(text, path, 1))


def _read_table(path: Path, **form: Any) -> Iterator[Record]:
    """One record per row, with the line on which the row begins. Blank lines are skipped."""
    with _open(path, newline="") as file:
        rows = csv.reader(_decoded(file, path), strict=True, **form)
        header: Tuple[str, ...] = ()
        line = 1
        try:
            for cells in rows:
                record = Record(path, f"line {line}", dict(zip(header, cells)), header)
                line = rows.line_num + 1
                if header and len(cells) > len(header):
                    raise record.mistake(
                        f"{len(cells)} columns; the header has {len(header)}; use the file as "
                        "published"
                    )
                if header and cells:
                    yield record
                header = header or tuple(cells)
        except csv.Error as error:
            raise UserError(f"{path}, line {line}: {error}; use the file as published") from None


def _open(path: Path, newline: Optional[str] = None) -> TextIO:
    return io.TextIOWrapper(files.open_binary(path), encoding="utf-8-sig", newline=newline)


def _json(text: str, path: Path, line: int) -> Dict[str, Any]:
    try:
        value = files.parse_json(text)
    except ValueError as error:
        raise UserError(f"{path}, line {line}: not JSON ({error}); correct the line") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}, line {line}: not a JSON object; correct the line")
    return value


def _decoded(file: Any, path: Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; use the file as published") from None
