"""The column of a table that holds the documents: CSV, TSV, Parquet, Arrow."""

import csv
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Iterator, List, Optional, Tuple

from ..errors import UserError

DELIMITERS = {"csv": ",", "tsv": "\t"}
# first bytes -> format, where pyarrow is there to read it
MAGIC = ((b"PAR1", "parquet"), (b"ARROW1", "arrow"), (b"\xff\xff\xff\xff", "arrow"))
HAS_ARROW = find_spec("pyarrow") is not None
_ROWS = 1024  # of a Parquet file that are read at once
_LONGEST = 1 << 30  # characters of a cell


def header(head: bytes, form: str) -> List[str]:
    """The names of the columns, from the first bytes of a CSV or TSV file; [] if there are none."""
    text = io.StringIO(head.decode("utf-8-sig", "replace"), newline="")
    try:
        return next(_reader(text, form), [])
    except csv.Error:
        return []


def no_column(where: str, field: str, columns: List[str]) -> UserError:
    listed = ", ".join(columns[:8]) or "none"
    return UserError(
        f"{where}: a table without a column {field!r} (columns: {listed}); name it with "
        "--text-field"
    )


def _check_column(where: str, field: str, columns: List[str]) -> None:
    """Raise UserError unless exactly one column has the name."""
    if field not in columns:
        raise no_column(where, field, columns)
    if columns.count(field) > 1:
        raise UserError(
            f"{where}: {columns.count(field)} columns are called {field!r}; rename all but one"
        )


def csv_column(stream: BinaryIO, path: Path, form: str, field: str) -> Iterator[str]:
    """The cells of a column. Raises UserError for a row that is not as long as the header."""
    csv.field_size_limit(_LONGEST)
    rows = _reader(io.TextIOWrapper(stream, "utf-8-sig", newline=""), form)
    try:
        columns: List[str] = next(rows, [])
        _check_column(str(path), field, columns)
        column = columns.index(field)
        for row in rows:
            if not row:
                continue
            if len(row) != len(columns):
                raise UserError(
                    f"{path}, line {rows.line_num}: {len(row)} columns, and the header has "
                    f"{len(columns)}; correct the line, or read the file as text with --format text"
                )
            yield row[column]
    except csv.Error as error:
        raise UserError(
            f"{path}, line {rows.line_num}: not {form.upper()} ({error}); correct the line, or "
            "read the file as text with --format text"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 near line {rows.line_num + 1} (0x{error.object[error.start]:02x}); "
            "convert the file to UTF-8 or remove it"
        ) from None


def _reader(text: Any, form: str) -> Any:
    """In TSV a quotation mark is a character like any other."""
    quoting: Any = csv.QUOTE_MINIMAL if form == "csv" else csv.QUOTE_NONE
    return csv.reader(text, delimiter=DELIMITERS[form], quoting=quoting, strict=True)


def arrow_column(raw: BinaryIO, path: Path, form: str, field: str) -> Iterator[Tuple[str, float]]:
    """The cells of a column, each with the share of the table that is read by then. Raises
    UserError for a broken file, a column that is not text, and a cell that is null."""
    import pyarrow

    try:
        number = 0
        for batch, share in _batches(raw, path, form, field):
            column = batch.column(batch.schema.get_field_index(field))
            if not _is_text(column.type):
                raise UserError(
                    f"{path}: column {field!r} is {column.type}, not text; name the column with "
                    "--text-field"
                )
            for cell in _texts(column, path, number):
                if cell is None:
                    raise UserError(
                        f"{path}, row {number}: column {field!r} is null; remove the row"
                    )
                number += 1
                yield cell, share
    except pyarrow.ArrowException as error:
        words = " ".join(str(error).split())
        raise UserError(f"{path}: broken {form} file ({words}); copy it again") from None


def _texts(column: Any, path: Path, number: int) -> List[Optional[str]]:
    """The cells of a column, whose first is the row `number`. pyarrow checks text only here."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, at row {number} or after: not UTF-8 (0x{error.object[error.start]:02x}); "
            "convert the file to UTF-8 or remove it"
        ) from None


def _is_text(kind: Any) -> bool:
    """Also of pandas' categories (a dictionary of strings) and of polars' string views."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    is_view = getattr(types, "is_string_view", lambda kind: False)  # pyarrow 16
    return types.is_string(kind) or types.is_large_string(kind) or is_view(kind)


def _batches(raw: BinaryIO, path: Path, form: str, field: str) -> Iterator[Tuple[Any, float]]:
    import pyarrow.ipc
    import pyarrow.parquet

    if form == "parquet":
        table = pyarrow.parquet.ParquetFile(raw)
        names = table.schema_arrow.names
        _check_column(str(path), field, names)
        done, rows = 0, max(1, table.metadata.num_rows)
        for batch in table.iter_batches(_ROWS, columns=[field]):
            done += batch.num_rows
            yield batch, done / rows
        return
    whole = raw.read(6) == b"ARROW1"
    raw.seek(0)
    reader = pyarrow.ipc.open_file(raw) if whole else pyarrow.ipc.open_stream(raw)
    _check_column(str(path), field, reader.schema.names)
    if whole:
        number = reader.num_record_batches
        for i in range(number):
            yield reader.get_batch(i), (i + 1) / number
        return
    for batch in reader:
        yield batch, 0.5  # a stream does not say how long it is
