"""Read documents from files one by one, without holding a whole file in memory."""

import glob
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Iterator, List, Optional, Tuple

from .. import files
from ..errors import UserError
from . import kinds, tables
from .kinds import BYTE_ORDER_MARK

SEPARATORS = ("blank-line", "line", "file")
# The largest document held in memory; a file whose documents are not separated is the usual way
# to meet it.
MAX_DOCUMENT_BYTES = 1 << 30
_BLOCK = 1 << 20  # bytes that are read at a time from a file whose lines end with "\r"
_JSON_TYPES = {type(None): "null", bool: "true or false", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Source:
    """How files are read.

    format: "text", "jsonl", "csv", "tsv", or "auto" (detected from the content: kinds.py).
    separator: what ends a document of a text file: "blank-line", "line" (every line is a
        document) or "file".
    field: the JSONL field, or the column of a table, that holds the document.
    ends, starts: instead of `separator`, a regular expression that matches anywhere in a line
        that ends a document and is dropped, or that starts one.
    """

    format: str = "auto"
    separator: str = "blank-line"
    field: str = "text"
    ends: Optional[str] = None
    starts: Optional[str] = None


def list_files(pattern: str, where: str, remedy: str = "check the path") -> List[Path]:
    """The files that a path, folder or glob names, sorted.

    Folders are searched recursively; names that begin with a dot are skipped.

    Raises:
        UserError: a pattern that names no file, or a folder that may not be read. `where` names the
            flag, as "--corpus docs"; `remedy` is of a pattern that names none.
    """
    if os.path.isdir(pattern):
        paths = _walk(Path(pattern), where)
    elif os.path.lexists(pattern):
        paths = [Path(pattern)]
    else:
        paths = sorted(Path(p) for p in glob.glob(pattern, recursive=True))
        paths = [path for path in paths if not path.is_dir()]
    if not paths:
        raise UserError(
            f"{where}: {pattern}: no such file, or a folder or glob without files; {remedy}"
        )
    for path in paths:
        files.check(path, f"{where}: {path}")
    return paths


def read_documents(path: Path, source: Source) -> Iterator[Tuple[str, int]]:
    """Yield (document, bytes of the file on disk read so far).

    A document is its lines joined with "\\n": "\\r\\n" and "\\r" count as newlines, as in Python's
    text files; newlines at both ends and a leading byte order mark are dropped, everything else
    is kept as it is. Documents of white space only are skipped.

    Raises:
        UserError: text that is not UTF-8 (file and byte offset), a bad JSONL line (file and
            line), a document above MAX_DOCUMENT_BYTES, a broken packed file, an unreadable file,
            a kind that is not read.
    """
    packing, form = kinds.kind_of(path, source.format, source.field)
    try:
        with files.open_binary(path) as raw:
            stream = kinds.unpacked(raw, packing)
            for text, position in _texts(stream, raw, path, form, source):
                text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
                if text and not text.isspace():
                    yield text, position
    except kinds.BROKEN as error:
        raise kinds.broken(path, packing, error) from None
    except OSError as error:
        if error.errno is None:  # bz2's for a damaged file
            raise kinds.broken(path, packing, error) from None
        raise files.unreadable(path, error) from None


def _texts(
    stream: BinaryIO, raw: BinaryIO, path: Path, form: str, source: Source
) -> Iterator[Tuple[str, int]]:
    """The documents of a file of one format, and the bytes read so far."""
    if form in ("parquet", "arrow"):
        size = path.stat().st_size
        for text, share in tables.arrow_column(raw, path, form, source.field):
            yield text, int(share * size)
        return
    if form == "jsonl":
        texts = _jsonl(stream, path, source.field)
    elif form in tables.DELIMITERS:
        texts = tables.csv_column(stream, path, form, source.field)
    else:
        texts = _text(stream, path, source)
    for text in texts:
        yield text, raw.tell()


def _walk(folder: Path, where: str) -> List[Path]:
    """Follows links; visits each folder once, so cycles end."""
    paths, seen = [], set()

    def refuse(error: OSError) -> None:
        raise files.unreadable(f"{where}: {error.filename}", error)

    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = [name for name in _of_dataset(names) if not name.startswith(".")]
        paths += [Path(root, name) for name in sorted(names)]
    return paths


def _of_dataset(names: List[str]) -> List[str]:
    """In a folder that Hugging Face's `save_to_disk` wrote, only the files with text."""
    if "dataset_dict.json" in names:
        return [name for name in names if name != "dataset_dict.json"]
    arrows = [name for name in names if name.endswith(".arrow") and not name.startswith("cache-")]
    return arrows if arrows and "state.json" in names else names


def _text(stream: BinaryIO, path: Path, source: Source) -> Iterator[str]:
    pieces = _pieces(stream, path, source.separator)
    if source.ends is not None or source.starts is not None:
        pieces = _between(stream, path, source)
    for data, offset in pieces:
        text = _decode(data, path, offset)
        yield text[1:] if offset == 0 and text.startswith(BYTE_ORDER_MARK) else text


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, each with its end: "\\n", or "\\r" in a file that has no "\\n" where it
    begins. A "\\r" alone in a first block may be of a long line."""
    block = stream.readline(_BLOCK)
    needed = 2 if len(block) == _BLOCK else 1
    if block.endswith(b"\n") or block.count(b"\r") < needed:
        if block:
            yield block if block.endswith(b"\n") else block + stream.readline()
        yield from stream
        return
    line: List[bytes] = []  # its parts in the blocks
    while block:
        following = stream.read(_BLOCK)
        if following and block.endswith(b"\r"):  # together with a "\n" that follows
            block, following = block[:-1], b"\r" + following
        first, *others = re.split(rb"(?<=\n)|(?<=\r)(?!\n)", block)
        line.append(first)
        for other in others:
            yield b"".join(line)
            line = [other]
        block = following
    if any(line):
        yield b"".join(line)


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
    for line in _lines(stream):
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


def _between(stream: BinaryIO, path: Path, source: Source) -> Iterator[Tuple[bytes, int]]:
    """Like _pieces, separated by the lines that match `ends` or `starts`."""
    ends, starts = (
        None if pattern is None else re.compile(pattern) for pattern in (source.ends, source.starts)
    )
    offset = begun = 0  # of the next line, of the document
    lines: List[bytes] = []
    for line in _lines(stream):
        bare = line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")
        if offset == 0:
            bare = bare[bare.startswith(BYTE_ORDER_MARK) :]
        ended = ends is not None and ends.search(bare)
        if lines and (ended or (starts is not None and starts.search(bare))):
            yield b"".join(lines), begun
            lines = []
        if not lines:
            begun = offset
        offset += len(line)
        if not ended:
            lines.append(line)
            _check_size(offset - begun, path, begun)
    if lines:
        yield b"".join(lines), begun


def _check_size(size: int, path: Path, offset: int) -> None:
    if size > MAX_DOCUMENT_BYTES:
        raise UserError(
            f"{path}: the document at byte {offset} is longer than {MAX_DOCUMENT_BYTES:,} bytes; "
            "set what separates documents with --documents (blank-line, line, file) or --separator"
        )


def _jsonl(stream: BinaryIO, path: Path, field: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(_lines(stream), start=1):
        text = _decode(line, path, offset)
        offset += len(line)
        if not text.strip():
            continue
        try:
            record = files.parse_json(text.lstrip(BYTE_ORDER_MARK) if number == 1 else text)
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: not JSON: {error}; correct the line, or read the file as "
                "text with --format text"
            ) from None
        if not isinstance(record, dict) or field not in record:
            keys = ", ".join(sorted(map(str, record))[:8]) if isinstance(record, dict) else "none"
            raise UserError(
                f"{path}, line {number}: no field {field!r} (its fields: {keys}); "
                "name the field with --text-field"
            )
        if not isinstance(record[field], str):
            kind = _JSON_TYPES.get(type(record[field]), "a number")
            raise UserError(
                f"{path}, line {number}: field {field!r} is {kind}, not a string; correct or "
                "remove the line"
            )
        yield record[field]


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        unpacked = " of the unpacked text" if kinds.is_packed(path) else ""
        raise UserError(
            f"{path}: not UTF-8 at byte {offset + error.start}{unpacked} "
            f"(0x{data[error.start]:02x}); convert the file to UTF-8 or remove it"
        ) from None
