"""Files to documents, one after another, never a file whole in memory."""

import glob
import gzip
import json
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Iterator, List, Tuple

from fairseq_moe_ext.errors import UserError

FORMATS = ("auto", "text", "jsonl")
SEPARATORS = ("blank-line", "line", "file")
# The largest document held in memory; a file whose documents are not told apart is the usual way
# to meet it.
MAX_DOCUMENT_BYTES = 1 << 30
_JSONL_SUFFIXES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_BYTE_ORDER_MARK = "\ufeff"


@dataclass(frozen=True)
class Source:
    """How files are read.

    format: "text", "jsonl", or "auto" (JSONL for *.jsonl and *.ndjson, also with .gz; else text).
    separator: what ends a document of a text file: "blank-line", "line" (every line is a
        document) or "file".
    field: the JSONL field that holds the document.
    """

    format: str = "auto"
    separator: str = "blank-line"
    field: str = "text"


def list_files(patterns: List[str], where: str) -> List[Path]:
    """The files that paths, folders and globs name, in that order; a folder's files sorted.

    Folders are walked through to the bottom; names that begin with a dot are left out.

    Raises:
        UserError: a pattern that names no file. `where` tells the flag, as "--corpus docs".
    """
    files: List[Path] = []
    for pattern in patterns:
        if os.path.isfile(pattern):
            found = [Path(pattern)]
        elif os.path.isdir(pattern):
            found = _walk(Path(pattern))
        else:
            found = sorted(Path(p) for p in glob.glob(pattern, recursive=True))
            found = [path for path in found if path.is_file()]
        if not found:
            raise UserError(f"{where}: {pattern}: no such file, or a folder or glob without files")
        files.extend(found)
    return files


def read_documents(path: Path, source: Source) -> Iterator[Tuple[str, int]]:
    """Yield (document, bytes of the file on disk read so far).

    A document is its lines joined with "\\n": "\\r\\n" and "\\r" count as newlines, as in Python's
    text files; newlines at both ends and a leading byte order mark are dropped, everything else
    is kept as it is. Documents of nothing but white space are left out.

    Raises:
        UserError: text that is not UTF-8 (file and byte offset), a bad JSONL line (file and
            line), a document above MAX_DOCUMENT_BYTES, a broken .gz file, an unreadable file.
    """
    is_jsonl = source.format == "jsonl" or (
        source.format == "auto" and path.name.lower().endswith(_JSONL_SUFFIXES)
    )
    try:
        with open(path, "rb") as raw:
            stream: BinaryIO = raw
            if path.suffix == ".gz":
                stream = gzip.GzipFile(fileobj=raw)  # type: ignore[assignment]
            if is_jsonl:
                texts = _jsonl(stream, path, source.field)
            else:
                texts = _text(stream, path, source.separator)
            for text in texts:
                text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
                if text and not text.isspace():
                    yield text, raw.tell()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: broken gzip file ({error}); copy or compress it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None


def _walk(folder: Path) -> List[Path]:
    found = []
    for root, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        found += [Path(root, name) for name in sorted(files) if not name.startswith(".")]
    return found


def _text(stream: BinaryIO, path: Path, separator: str) -> Iterator[str]:
    for data, offset in _pieces(stream, path, separator):
        text = _decode(data, path, offset)
        yield text[1:] if offset == 0 and text.startswith(_BYTE_ORDER_MARK) else text


def _pieces(stream: BinaryIO, path: Path, separator: str) -> Iterator[Tuple[bytes, int]]:
    """Yield (bytes of one document, its offset in the file)."""
    if separator == "file":
        data = stream.read(MAX_DOCUMENT_BYTES + 1)
        _check_size(len(data), path, 0)
        yield data, 0
        return
    offset = 0  # of the next line
    lines: List[bytes] = []
    size = 0
    for line in stream:
        offset += len(line)
        size += len(line)
        blank = line.isspace()
        if not blank:
            lines.append(line)
        if lines and (blank or separator == "line"):
            yield b"".join(lines), offset - size
            lines = []
        if not lines:
            size = 0
        _check_size(size, path, offset - size)
    if lines:
        yield b"".join(lines), offset - size


def _check_size(size: int, path: Path, offset: int) -> None:
    if size > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"{path}: the document at byte {offset} is longer than {MAX_DOCUMENT_BYTES:,} bytes; "
            "say with --documents what separates them (blank-line, line, file)"
        )


def _jsonl(stream: BinaryIO, path: Path, field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(stream, start=1):
        text = _decode(line, path, offset)
        offset += len(line)
        if not text.strip():
            continue
        try:
            record = json.loads(text.lstrip(_BYTE_ORDER_MARK) if number == 1 else text)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(record, dict) or field not in record:
            keys = ", ".join(sorted(map(str, record))[:8]) if isinstance(record, dict) else "none"
            raise UserError(
                f"{path}, line {number}: no field {field!r} (fields there: {keys}); "
                "name the field with --field"
            )
        if not isinstance(record[field], str):
            kind = type(record[field]).__name__
            raise UserError(f"{path}, line {number}: field {field!r} is {kind}, not a string")
        document = record[field]
        if not _is_unicode(document):
            raise UserError(
                f"{path}, line {number}: field {field!r} has half of a surrogate pair (\\ud800 to "
                "\\udfff), which is no text; correct the line"
            )
        yield document


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        unpacked = " of the unpacked text" if path.suffix == ".gz" else ""
        raise UserError(
            f"{path}: not UTF-8 at byte {offset + error.start}{unpacked} "
            f"(0x{data[error.start]:02x}); convert the file to UTF-8 or leave it out"
        ) from None
