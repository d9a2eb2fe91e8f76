"""Files to documents: what separates them, what stays as it is, and what is refused."""

import gzip
import io
import json
import os
import re

import pytest

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.prepare import documents
from fairseq_moe_ext.prepare.corpora import parse_corpora
from fairseq_moe_ext.prepare.documents import Source, list_files, read_documents


def read(path, **source):
    return [text for text, _ in read_documents(path, Source(**source))]


def test_blank_lines_separate_documents_and_everything_else_stays(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\n  first \n\tsecond\n \t \n\n\nthird\n\x0bfourth")
    assert read(path) == ["  first \n\tsecond", "third\n\x0bfourth"]


def test_line_and_file_separate_documents(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\nthree\n\n", encoding="utf-8")
    assert read(path, separator="line") == ["one", "two", "three"]
    assert read(path, separator="file") == ["one\n\ntwo\nthree"]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_all_newlines_count_alike(tmp_path, newline):
    path = tmp_path / "a.txt"
    path.write_bytes(f"one{newline}two".encode())
    assert read(path) == ["one\ntwo"]
    path.write_bytes(f"one{newline}{newline}two".encode())
    assert read(path, separator="file") == ["one\n\ntwo"]
    assert read(path) == ["one", "two"]
    path.write_bytes(newline.join(["one", "two", "three", ""]).encode())
    assert read(path, separator="line") == ["one", "two", "three"]
    assert read(path, ends="w") == ["one", "three"]
    path.write_bytes(newline.join(json.dumps({"text": str(i)}) for i in range(3)).encode())
    assert read(path, format="jsonl") == ["0", "1", "2"]


@pytest.mark.parametrize("block", range(2, 9))
def test_carriage_returns_end_lines_where_a_file_begins_with_them(tmp_path, monkeypatch, block):
    """However its blocks fall; as in Python's text files."""
    monkeypatch.setattr(documents, "_BLOCK", block)
    path = tmp_path / "a.txt"
    for text in ("\r\rb\r\rc\r", "\r\ra\r", "\r\rbcdefgh\r\nc\nd\r\r\ne", "\r\rbcdefghi\r\n"):
        path.write_bytes(text.encode())
        with open(path, "rb") as stream, open(path, newline="") as lines:
            assert list(documents._lines(stream)) == [line.encode() for line in lines]


def test_a_carriage_return_within_a_long_first_line_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_BLOCK", 8)
    path = tmp_path / "a.txt"
    for text in (b"ab\rcdefghijk\nlm\rn\n", b"abcdefg\r\nh\ri\n"):
        path.write_bytes(text)
        with open(path, "rb") as stream:
            assert list(documents._lines(stream)) == io.BytesIO(text).readlines()


def test_a_long_line_between_carriage_returns_is_looked_at_once(tmp_path, monkeypatch):
    """Not again with every block that it continues in."""
    monkeypatch.setattr(documents, "_BLOCK", 4)
    split, looked_at = re.split, []
    monkeypatch.setattr(re, "split", lambda p, text: looked_at.append(len(text)) or split(p, text))
    path = tmp_path / "a.txt"
    path.write_bytes(b"\r\r" + b"a" * 4000 + b"\rb")
    with open(path, "rb") as stream:
        assert [len(line) for line in documents._lines(stream)] == [1, 1, 4001, 1]
    assert sum(looked_at) == 4004


def test_lines_of_other_files_end_with_newlines_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n10 %\r20 %\r\rdone\n\ntwo")
    assert read(path) == ["one\n10 %\n20 %\n\ndone", "two"]


def test_a_byte_order_mark_is_dropped_at_the_beginning_only(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\n\n\ufefftwo".encode())
    assert read(path) == ["one", "\ufefftwo"]
    path = tmp_path / "a.jsonl"
    path.write_bytes("\ufeff".encode() + json.dumps({"text": "\ufeffone"}).encode())
    assert read(path) == ["\ufeffone"]


def test_jsonl_is_told_by_its_name_and_keeps_blank_lines_inside(tmp_path):
    lines = [{"text": "one\n\ntwo\n"}, {"text": " \n"}, {"text": "three", "other": 1}]
    data = "\n".join(map(json.dumps, lines)).encode() + b"\n\n"
    for name in ("a.jsonl", "a.ndjson", "A.JSONL"):
        (tmp_path / name).write_bytes(data)
        assert read(tmp_path / name) == ["one\n\ntwo", "three"]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    assert read(tmp_path / "a.jsonl.gz") == ["one\n\ntwo", "three"]
    (tmp_path / "a.dat").write_bytes(data)
    assert read(tmp_path / "a.dat", format="jsonl") == ["one\n\ntwo", "three"]
    assert len(read(tmp_path / "a.jsonl", format="text")) == 1


def test_another_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n', encoding="utf-8")
    assert read(tmp_path / "a.jsonl", field="body") == ["one"]


@pytest.mark.parametrize("separator", ["blank-line", "line", "file"])
@pytest.mark.parametrize("compress", [False, True])
def test_text_that_is_not_utf8_is_refused_with_its_byte_offset(tmp_path, separator, compress):
    data = "öne\n\ntwo\n\nthr".encode() + b"\xe9e\n"
    path = tmp_path / ("a.txt.gz" if compress else "a.txt")
    path.write_bytes(gzip.compress(data) if compress else data)
    offset = data.index(b"\xe9")
    with pytest.raises(UserError, match=rf"a\.txt.*not UTF-8 at byte {offset} .*\(0xe9\)"):
        read(path, separator=separator)


def test_jsonl_that_is_not_utf8_is_refused_with_its_byte_offset(tmp_path):
    data = b'{"text": "one"}\n{"text": "\xff"}\n'
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=f"not UTF-8 at byte {data.index(0xFF)} "):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"body": "x"}', r"line 3: no field 'text' \(its fields: body\).*--text-field"),
        ('["text"]', "line 3: no field 'text'"),
        ('{"text": 1}', "line 3: field 'text' is a number, not a string"),
        ('{"text": null}', "line 3: field 'text' is null, not a string"),
        ('{"text": ["a"]}', "line 3: field 'text' is a list, not a string"),
        ('{"text": ', "line 3: not JSON.*--format text"),
        ("plain text", "line 3: not JSON.*--format text"),
        ("[" * 100_000, "line 3: not JSON: nested too deep"),
        ('{"text": "x", "other": "\\udfff"}', "line 3: .*surrogate"),
        ('{"text": "\\ud800"}', "line 3: .*surrogate"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl, " + message):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("separator", ["blank-line", "file"])
def test_a_document_too_large_for_memory_is_refused(tmp_path, monkeypatch, separator):
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 20)
    path = tmp_path / "a.txt"
    path.write_text("short\n\n" + "line\n" * 5, encoding="utf-8")
    with pytest.raises(UserError, match=r"longer than 20 bytes.*--documents"):
        read(path, separator=separator)
    assert len(read(path, separator="line")) == 6


def test_broken_gzip_files_are_refused(tmp_path):
    path = tmp_path / "a.txt.gz"
    for data in (b"not gzip at all", b""):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.txt\.gz: broken gzip file"):
            read(path)
    path.write_bytes(gzip.compress(b"text " * 1000)[:-10])
    with pytest.raises(UserError, match=r"a\.txt\.gz: broken gzip file"):
        read(path)


def test_paths_folders_and_globs(tmp_path):
    for name in ("b/2.txt", "b/1.txt", "b/c/3.txt", "b/.hidden", "b/.git/4.txt", "a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(*patterns):
        found = [list_files(str(tmp_path / pattern), "--corpus x") for pattern in patterns]
        return [str(path.relative_to(tmp_path)) for paths in found for path in paths]

    assert names("b", "a.txt") == ["b/1.txt", "b/2.txt", "b/c/3.txt", "a.txt"]
    assert names("**/*.txt") == ["a.txt", "b/1.txt", "b/2.txt", "b/c/3.txt"]
    (tmp_path / "empty").mkdir()
    for pattern in ("none.txt", "*.md", "empty"):
        with pytest.raises(UserError, match="--corpus x: .*no such file"):
            names(pattern)


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("in/a.txt", "elsewhere/b.txt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "in" / "circle").symlink_to(tmp_path / "in")
    for name in ("x", "y"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "elsewhere")
    found = list_files(str(tmp_path / "in"), "--corpus x")
    assert [str(path.relative_to(tmp_path)) for path in found] == ["in/a.txt", "in/x/b.txt"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "a.txt").touch()
    scan = os.scandir

    def refuses(path):  # root may read everything
        if str(path).endswith("theirs"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuses)
    for folder in (tmp_path, tmp_path / "theirs"):
        with pytest.raises(UserError, match="--corpus x: .*/theirs: cannot be read .Permission"):
            list_files(str(folder), "--corpus x")


def test_a_file_that_a_flag_names_twice_is_listed_once(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).touch()
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    for more in (f"{tmp_path}/a.txt", f"{tmp_path}/*.txt", f"{tmp_path}"):
        for split in ("", ":train"):
            (corpus,) = parse_corpora([f"x{split}={tmp_path},{more}"], [])
            (paths,) = corpus.files.values()
            assert [path.name for path in paths] == ["a.txt", "b.txt"]


def test_the_position_counts_bytes_on_disk(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\n" * 100_000, encoding="utf-8")
    positions = [position for _, position in read_documents(path, Source())]
    assert positions == sorted(positions)
    assert positions[0] < positions[-1] == path.stat().st_size
