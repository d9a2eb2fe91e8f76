"""Detect the kind of an input file by its content, and refuse unsupported kinds by name.

Files are Parquet or Arrow tables, or text, JSON Lines, CSV or TSV. The last four may be compressed
with gzip, bzip2, xz or Zstandard; among them the file name's ending (.csv, .tsv, .jsonl, .ndjson)
decides first, then the content.
"""

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple, Type

from .. import files
from ..errors import UserError
from ..wording import count
from . import tables

try:
    import zstandard
except ImportError:  # an extra
    zstandard = None

FORMATS = ("auto", "text", "jsonl", *tables.DELIMITERS)
BYTE_ORDER_MARK = "\ufeff"
_HEAD = 1 << 16  # bytes that are looked at
_LINE = 1 << 26  # bytes of a first line of JSON that are looked at
_PIECE = 1 << 12  # bytes of Zstandard unpacked at once: at most 128 MB

_OPENERS: Dict[str, Callable] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
_SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz"}
_PACKED: Tuple[Tuple[bytes, str], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
)
# what a damaged file makes those three raise, beside an OSError without a number
BROKEN: Tuple[Type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)
_ZSTD = "zstd"
if zstandard is not None:
    _SUFFIXES[".zst"] = _ZSTD
    _PACKED += ((b"\x28\xb5\x2f\xfd", _ZSTD),)
    _OPENERS[_ZSTD] = lambda raw: io.BufferedReader(_Zstd(raw))
    BROKEN += (zstandard.ZstdError,)

_AS_LINES = "convert it to JSON Lines (.jsonl.gz: an object with the text on each line)"
_ARROW = "pip install pyarrow, or " + _AS_LINES
_ZSTANDARD = "unpack it (zstd -d), pack it with gzip, or pip install zstandard"
_UNPACK = "unpack it and name the files"
_TO_UTF8 = "convert it to UTF-8 (iconv -t UTF-8)"
_NO_TEXT = "leave it out; a glob names files of one kind ('docs/**/*.txt')"
# offset, bytes there, what such a file is, what to do
_REFUSED: Tuple[Tuple[int, bytes, str, str], ...] = (
    (0, b"\x28\xb5\x2f\xfd", "packed with Zstandard", _ZSTANDARD),
    (1, b"\x2aM\x18", "packed with Zstandard", _ZSTANDARD),
    (0, b"\x04\x22M\x18", "packed with LZ4", "unpack it (lz4 -d), or pack it with gzip"),
    (0, b"LZIP", "packed with lzip", "unpack it, or pack it with gzip"),
    (0, b"\x1f\x9d", "packed with compress", "unpack it, or pack it with gzip"),
    (0, b"\x1f\x8b", "packed twice", "unpack it once (gzip -d)"),
    (0, b"BZh91AY&SY", "packed twice", "unpack it once"),
    (0, b"\xfd7zXZ\0", "packed twice", "unpack it once"),
    (257, b"ustar", "a tar archive", _UNPACK + " (tar xf)"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (0, b"PK\x05\x06", "an empty zip archive", _NO_TEXT),
    (0, b"PAR1", "a Parquet table", _ARROW),
    (0, b"ARROW1", "an Arrow table", _ARROW),
    (0, b"\xff\xff\xff\xff", "an Arrow table", _ARROW),
    (0, b"FEA1", "a Feather table", _AS_LINES),
    (0, b"ORC", "an ORC table", _AS_LINES),
    (0, b"Obj\x01", "an Avro file", _AS_LINES),
    (0, b"SQLite format 3\0", "an SQLite database", _AS_LINES),
    (0, b"\x89HDF", "an HDF5 file", _AS_LINES),
    (0, b"WARC/", "a web archive (WARC)", "take the text out of its records; " + _AS_LINES),
    (0, b"%PDF-", "a PDF", "convert it to text (pdftotext)"),
    (0, b"{\\rtf", "a document (RTF)", "save it as plain text"),
    (0, b"\xd0\xcf\x11\xe0", "an Office document", "save it as plain text"),
    (0, b"\x89PNG", "an image (PNG)", _NO_TEXT),
    (0, b"\xff\xd8\xff", "an image (JPEG)", _NO_TEXT),
    (0, b"GIF8", "an image (GIF)", _NO_TEXT),
    (0, b"\x7fELF", "a program", _NO_TEXT),
    (0, b"\xff\xfe\0\0", "UTF-32 text", _TO_UTF8),
    (0, b"\0\0\xfe\xff", "UTF-32 text", _TO_UTF8),
    (0, b"\xff\xfe", "UTF-16 text", _TO_UTF8),
    (0, b"\xfe\xff", "UTF-16 text", _TO_UTF8),
)
_TABLES = {".csv": "csv", ".tsv": "tsv"}
_LINES = (".jsonl", ".ndjson")
_JSON_OBJECT = re.compile(r'\{\s*("[^"\n]*"\s*:|\}\s*$)')
_JSON_ARRAY = re.compile(r'\[\s*\{\s*"')


_WORDS = {
    "text": "text",
    "jsonl": "JSON Lines",
    "csv": "CSV",
    "tsv": "TSV",
    "parquet": "Parquet",
    "arrow": "Arrow",
    "": "nothing (empty)",
}


class Kind(NamedTuple):
    """packing: "gzip", "bzip2", "xz", "zstd" or ""; format: "text", "jsonl", "csv", "tsv",
    "parquet", "arrow", or "" for an empty file."""

    packing: str
    format: str


def kind_of(path: Path, form: str, field: str) -> Kind:
    """The kind of one file. `form`: of FORMATS, what the user says of it.

    Raises:
        UserError: a kind that is not read, an unreadable file.
    """
    with files.open_binary(path) as raw:
        packing = _packing(raw, path)
        try:
            stream = unpacked(raw, packing)
            head = stream.read(_HEAD)
            table = next((f for magic, f in tables.MAGIC if head.startswith(magic)), None)
            if table and not packing and tables.HAS_ARROW:
                return Kind("", table)
            _refuse(head, path)
            return Kind(packing, _format(head, stream, path, form, field))
        except BROKEN as error:
            raise broken(path, packing, error) from None
        except OSError as error:
            if error.errno is None:
                raise broken(path, packing, error) from None
            raise files.unreadable(path, error) from None


def unpacked(raw: BinaryIO, packing: str) -> BinaryIO:
    return _OPENERS[packing](raw) if packing else raw


class _Zstd(io.RawIOBase):
    """As zstandard's stream_reader, but that takes a file that ends within a frame for a whole
    one. This raises EOFError."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed, self._text = packed, memoryview(b"")
        self._frame: Any = None  # that is being unpacked

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._text:
            ended = self._frame is None or self._frame.eof
            left = self._frame.unused_data if ended and self._frame is not None else b""
            packed = left or self._packed.read(_PIECE)
            if not packed and not ended:
                raise EOFError("it ends within a frame")
            if not packed:
                return 0
            if ended:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._text = memoryview(self._frame.decompress(packed))
        size = min(len(buffer), len(self._text))
        buffer[:size], self._text = self._text[:size], self._text[size:]
        return size


def broken(path: Path, packing: str, error: Exception) -> UserError:
    return UserError(f"{path}: broken {packing} file ({error}); copy or compress it again")


def check_one_kind(kinds: Iterable[Tuple[Path, Kind]], where: str) -> None:
    """Raise UserError if one folder or glob contains files of two formats: a README beside JSON
    Lines would become training text."""
    first: Dict[str, Path] = {}
    for path, kind in kinds:
        if kind.format:
            first.setdefault(kind.format, path)
    if len(first) > 1:
        (format_a, a), (format_b, b) = sorted(first.items())[:2]
        raise UserError(
            f"{where}: {a} is {_WORDS[format_a]}, {b} is {_WORDS[format_b]}; name files of one "
            "kind, by a glob ('folder/**/*.jsonl') or one by one"
        )


def listed(kinds: Iterable[Kind]) -> str:
    """In words, as "3 files of text, 1 file of JSON Lines"."""
    formats = [kind.format for kind in kinds]
    return ", ".join(
        f"{count(formats.count(f), 'file')} of {_WORDS[f]}" for f in _WORDS if f in formats
    )


def _packing(raw: BinaryIO, path: Path) -> str:
    head = raw.read(6)
    raw.seek(0)
    packing = next((name for magic, name in _PACKED if head.startswith(magic)), "")
    if packing == "bzip2" and not re.match(rb"BZh[1-9][1\x17]", head):
        packing = ""
    promised = _SUFFIXES.get(path.suffix.lower(), "")
    if promised and not packing and not _refusal(head):
        raise UserError(
            f"{path}: broken {promised} file (it does not begin like one); copy or compress it "
            "again, or rename it if it is not compressed"
        )
    return packing


def _refusal(head: bytes) -> Optional[Tuple[str, str]]:
    """(what it is, what to do) for bytes that begin no text."""
    for offset, magic, what, remedy in _REFUSED:
        if head.startswith(magic, offset):
            return what, remedy
    if head.startswith(b"PK\x03\x04"):
        if b"[Content_Types].xml" in head or b"word/" in head or head[30:38] == b"mimetype":
            return "a document (.docx, .xlsx, .odt, .epub or the like)", "save it as plain text"
        return "a zip archive", _UNPACK
    return None


def _refuse(head: bytes, path: Path) -> None:
    refusal = _refusal(head)
    if refusal is None and b"\0" in head:
        zeros = [head[i::2].count(0) for i in (0, 1)]
        if max(zeros) > len(head) // 8 and min(zeros) < max(zeros) // 8:
            refusal = "UTF-16 text", _TO_UTF8
        else:
            refusal = f"binary (a null at byte {head.index(0)})", _NO_TEXT
    if refusal is not None:
        raise UserError(f"{path}: {refusal[0]}, which cannot be read; {refusal[1]}")


def is_packed(path: Path) -> bool:
    """Whether its name says so."""
    return path.suffix.lower() in _SUFFIXES


def _suffix(path: Path) -> str:
    """The ending of the name, without that of the packing."""
    name = path.with_suffix("") if is_packed(path) else path
    return name.suffix.lower()


def _format(head: bytes, stream: BinaryIO, path: Path, form: str, field: str) -> str:
    text = head.decode("utf-8", "replace").lstrip(BYTE_ORDER_MARK).lstrip()
    if not text:
        return "" if len(head) < _HEAD else "text"
    if form != "auto":
        return form
    if _suffix(path) in _TABLES:
        columns = tables.header(head, _TABLES[_suffix(path)])
        if field not in columns:
            error = tables.no_column(str(path), field, columns)
            raise UserError(f"{error}, or read the file as text with --format {{corpus}}=text")
        return _TABLES[_suffix(path)]
    if _suffix(path) in _LINES:
        return "jsonl"
    is_json = _suffix(path) == ".json"
    if _JSON_ARRAY.match(text) or (is_json and text.startswith("[")):
        raise _not_lines(path, "one JSON array", "jq -c '.[]'")
    if not text.startswith("{"):
        return "text"
    record = _first_object(head, stream)
    if record is None:
        if is_json or _JSON_OBJECT.match(text):
            raise _not_lines(path, "JSON, but no object on line 1", "jq -c .")
        return "text"
    if field not in record:
        keys = ", ".join(sorted(record)[:8])
        raise UserError(
            f"{path}: JSON without a field {field!r} (fields on line 1: {keys}); name the field "
            "with --text-field, or read it as text with --format {corpus}=text"
        )
    return "jsonl"


def _first_object(head: bytes, stream: BinaryIO) -> Optional[dict]:
    """The JSON object that the first non-blank line contains; None if it is not one."""
    line, newline, _ = head.decode("utf-8-sig", "surrogateescape").lstrip().partition("\n")
    if not newline and len(head) == _HEAD:
        line += stream.readline(_LINE).decode("utf-8", "surrogateescape")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _not_lines(path: Path, what: str, jq: str) -> UserError:
    return UserError(
        f"{path}: {what}; write one object per line ({jq} {path.name} > lines.jsonl), or read it "
        f"as text with --format {{corpus}}=text"
    )


def kinds_of(
    groups: List[List[Path]], form: str, field: str, where: str, name: str
) -> List[Tuple[Path, Kind]]:
    """The kinds of all files of a corpus, checked before any is read.

    Args:
        groups: the files that each path, folder or glob named.
        where: flag and corpus, for the message.

    Raises:
        UserError: a file of a kind that is not read, or a folder or glob with two kinds.
    """
    kinds: List[Tuple[Path, Kind]] = []
    try:
        for group in groups:
            group_kinds = [(path, kind_of(path, form, field)) for path in group]
            if form == "auto":
                check_one_kind(group_kinds, where)
            kinds += group_kinds
    except UserError as error:
        raise UserError(str(error).replace("{corpus}", name)) from None
    return kinds
