"""What a file is, is told by its content; other kinds than text and JSON Lines are refused."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile

import pytest

from fairseq_moe_ext import cli
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.prepare import kinds, pipeline, tables
from fairseq_moe_ext.prepare.documents import Source, read_documents
from fairseq_moe_ext.prepare.kinds import Kind, kind_of

LINES = b"".join(
    json.dumps({"url": "x", "text": text}).encode() + b"\n" for text in ("one\n\ntwo", "three")
)
TEXT = b"one\ntwo\n\nthree\n"
PACK = {"": bytes, ".gz": gzip.compress, ".GZ": gzip.compress, ".bz2": bz2.compress}
PACK[".xz"] = lzma.compress


def read(path, **source):
    return [text for text, _ in read_documents(path, Source(**source))]


@pytest.mark.parametrize("packed", [*PACK, "unnamed"])
@pytest.mark.parametrize(
    "name", ["c4.json", "a.jsonl", "A.JSONL", "a.txt", "a", "a.ndjson", "a.md"]
)
def test_json_lines_are_read_under_any_name(tmp_path, name, packed):
    """C4's and Dolma's shards are called NAME.json.gz."""
    path = tmp_path / (name if packed == "unnamed" else name + packed)
    path.write_bytes(gzip.compress(LINES) if packed == "unnamed" else PACK[packed](LINES))
    assert read(path) == ["one\n\ntwo", "three"]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", ["a.txt", "a", "a.py", "a.json"])
def test_text_is_read_under_any_name(tmp_path, name, packed):
    path = tmp_path / (name + packed)
    path.write_bytes(PACK[packed](TEXT))
    assert read(path) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    "text", ["{\n  int x;\n}", "[1] Smith et al.", "{a}", "[Music]", "{'a': 1}"]
)
def test_brackets_do_not_make_text_json(tmp_path, text):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read(tmp_path / "a.txt") == [text]


def test_a_first_line_beyond_what_is_looked_at_first(tmp_path):
    long = "é" * 100_000
    (tmp_path / "a.json").write_text(json.dumps({"text": long}, ensure_ascii=False) + "\n{}\n")
    assert kind_of(tmp_path / "a.json", "auto", "text") == Kind("", "jsonl")


def archive(kind):
    buffer = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as file:
            file.addfile(tarfile.TarInfo("a.txt"))
    else:
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("[Content_Types].xml" if kind == "docx" else "a.txt", "text")
    return buffer.getvalue()


REFUSED = {
    "a.tar": (archive("tar"), "a tar archive, .*tar xf"),
    "a.tar.gz": (gzip.compress(archive("tar")), "a tar archive"),
    "a.tgz": (gzip.compress(archive("tar")), "a tar archive"),
    "a.tar.xz": (lzma.compress(archive("tar")), "a tar archive"),
    "a.zip": (archive("zip"), "a zip archive, .*unpack it"),
    "a.docx": (archive("docx"), "a document .*save it as plain text"),
    "a.doc": (b"\xd0\xcf\x11\xe0\xa1", "an Office document"),
    "a.rtf": (b"{\\rtf1 text}", r"a document \(RTF\)"),
    "a.pdf": (b"%PDF-1.7\n", "a PDF, .*pdftotext"),
    "a.7z": (b"7z\xbc\xaf\x27\x1c\0", "a 7z archive"),
    "a.warc.gz": (gzip.compress(b"WARC/1.0\r\nWARC-Type: warcinfo\r\n"), "a web archive"),
    "a.gz": (gzip.compress(gzip.compress(TEXT)), "packed twice"),
    "a.png": (b"\x89PNG\r\n", "an image"),
    "a.db": (b"SQLite format 3\0", "an SQLite database"),
    "utf16.txt": ("text".encode("utf-16"), "UTF-16 text, .*iconv"),
    "utf16le.txt": ("long text\n".encode("utf-16-le") * 9, "UTF-16 text"),
    "utf16be.jsonl": ('{"text": "x"}\n'.encode("utf-16-be") * 9, "UTF-16 text"),
    "utf32.txt": ("text".encode("utf-32"), "UTF-32 text"),
    "a.bin": (bytes(range(1, 200)) + b"\0", "binary .a null at byte 199"),
    "a.csv": (b"id,body\n1,x\n", r"a table without a column 'text' \(columns: id, body\)"),
    "a.tsv.gz": (gzip.compress(b"id\tb,text\n1\tx\n"), "--text-field.*--format NAME=text"),
    "array.json": (b'[\n {"text": "x"}]', r"one JSON array; .*jq -c '\.\[\]' array\.json"),
    "array.txt": (b'[{"text": "x"}]', "one JSON array"),
    "numbers.json": (b"[1, 2]", "one JSON array"),
    "pretty.json": (b'{\n  "text": "x"\n}', "JSON, but no object on line 1; .*jq -c . pretty.json"),
    "pretty.txt": (b'{"text":\n  "x"\n}', "JSON, but no object on line 1"),
    "cut.json": (b'{"text": "x', "JSON, but no object on line 1"),
    "fields.json": (
        b'{"body": "x"}\n',
        r"JSON without a field 'text' \(.*: body\); .*--text-field",
    ),
    "list.json": (b'{"a": ' + b"[" * 100_000 + b"\n", "JSON, but no object on line 1"),
}


if kinds.zstandard is None:
    packed = b"\x28\xb5\x2f\xfd\x04\0"
    REFUSED["a.txt"] = packed, "packed with Zstandard, .*zstd -d.* pip install zstandard"
    REFUSED["a.jsonl.zst"] = packed, "packed with Zstandard"
if not tables.HAS_ARROW:
    REFUSED["a.parquet"] = b"PAR1\x15\x04", "a Parquet table, .*pip install pyarrow.*JSON Lines"
    REFUSED["a.arrow"] = b"\xff\xff\xff\xff\x10\0", "an Arrow table"
    REFUSED["b.arrow"] = b"ARROW1\0\0", "an Arrow table"


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_are_refused_by_name_before_the_work(tmp_path, capsys, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    line = f"prepare {tmp_path}/data --corpus NAME={tmp_path / name} --train-bpe 300"
    with pytest.raises(UserError, match=message.replace("NAME", "{corpus}")):
        kind_of(tmp_path / name, "auto", "text")
    assert cli.main(line.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / name}: ") and error.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == [name]


@pytest.mark.parametrize(
    "name, form",
    [("a.jsonl", "auto"), ("a.jsonl.gz", "auto"), ("a.txt", "csv"), ("a.bin", "jsonl")],
)
def test_a_missing_field_is_found_before_the_work(tmp_path, capsys, monkeypatch, name, form):
    """Whatever says the kind of the file, and though another corpus comes first."""
    content = b"body\nx\n" if form == "csv" else b'{"body": "x"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (tmp_path / "first.txt").write_text("one\n\ntwo")
    monkeypatch.setattr(pipeline.data_folder, "new_folder", None)  # the work starts with it
    line = f"prepare {tmp_path}/data --corpus a={tmp_path}/first.txt --corpus b={tmp_path / name}"
    assert cli.main([*line.split(), "--train-bpe", "300", "--format", f"b={form}"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {tmp_path / name}") and "body" in error


def test_what_the_user_says_counts_more(tmp_path, capsys):
    """One format for all, or for one corpus."""
    (tmp_path / "a.json").write_bytes(b'{\n  "key": "x"\n}' * 9)
    (tmp_path / "b.csv").write_bytes(b"id,text\n1,x\n" * 9)
    (tmp_path / "c.txt").write_bytes(LINES * 9)
    line = (
        f"prepare {tmp_path}/data --workers 1 --valid-fraction 0 --test-fraction 0 --train-bpe 260"
    )
    line += f" --corpus a={tmp_path}/a.json,{tmp_path}/b.csv --corpus c={tmp_path}/c.txt"
    assert cli.main([*line.split(), "--format", "a=text"]) == 0
    assert capsys.readouterr().err.startswith("a: 2 files of text\nc: 1 file of JSON Lines\n")
    counts = json.loads((tmp_path / "data" / "counts.json").read_text())["corpora"]
    assert counts["c"]["train"]["documents"] == 18
    assert cli.main([*line.split(), "--overwrite", "--format", "text"]) == 0
    counts = json.loads((tmp_path / "data" / "counts.json").read_text())["corpora"]
    assert counts["c"]["train"]["documents"] == 1
    for word, message in (("b=text", "no corpus 'b'"), ("a=xml", "not one of auto"), ("x", "not")):
        assert cli.main([*line.split(), "--format", word]) == 1
        assert f"--format {word}: {message}" in capsys.readouterr().err


def test_a_folder_of_both_is_refused_and_two_paths_are_not(tmp_path, capsys):
    folder = tmp_path / "c4"
    folder.mkdir()
    (folder / "README.md").write_bytes(TEXT * 20)
    (folder / "c4.json.gz").write_bytes(gzip.compress(LINES * 20))
    (folder / "empty.txt").touch()
    (folder / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    line = (
        f"prepare {tmp_path}/data --workers 1 --valid-fraction 0 --test-fraction 0 --train-bpe 260"
    )
    for pattern in (folder, folder / "*"):
        assert cli.main([*line.split(), "--corpus", f"a={pattern}"]) == 1
        assert "c4.json.gz is JSON Lines, " in capsys.readouterr().err
    both = f"a={folder / '*.md'},{folder / '*.json.gz'},{folder / 'empty.txt'}"
    assert cli.main([*line.split(), "--corpus", both]) == 0
    words = "a: 1 file of text, 1 file of JSON Lines, 1 file of nothing (empty)\n"
    assert capsys.readouterr().err.startswith(words)
