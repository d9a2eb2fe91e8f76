"""The quickstart's text: deterministic, split by document, no text in two places."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from fairseq_moe_ext.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "quickstart"))
import corpora  # noqa: E402

SIZES = {"train_bytes": 60_000, "valid_bytes": 8_000, "test_bytes": 8_000}


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return folder, corpora.gather(folder, **SIZES)


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_split_holds_what_was_asked_for_and_what_is_reported(gathered):
    folder, counts = gathered
    assert sum(not domain.held_out for domain in corpora.DOMAINS) >= 3
    assert sum(domain.held_out for domain in corpora.DOMAINS) >= 2
    for domain in corpora.DOMAINS:
        splits = {"valid", "test"} | (set() if domain.held_out else {"train"})
        assert set(counts[domain.name]) == splits
        for split in splits:
            documents = read(folder / f"{domain.name}.{split}.jsonl")
            size = sum(len(document["text"].encode()) for document in documents)
            assert counts[domain.name][split] == {"documents": len(documents), "bytes": size}
            assert size >= SIZES[f"{split}_bytes"]
            without_the_last = size - len(documents[-1]["text"].encode())
            assert without_the_last < SIZES[f"{split}_bytes"], "stops at the first document over"
    expected = sum(len(counts[domain.name]) for domain in corpora.DOMAINS)
    assert len(list(folder.iterdir())) == expected, "no partial file is left"


def test_no_document_and_no_text_is_in_two_splits_or_domains(gathered):
    folder, _ = gathered
    names, texts = [], []
    for path in sorted(folder.glob("*.jsonl")):
        for document in read(path):
            names.append(document["id"])
            texts.append(document["text"])
    assert len(names) > 30
    assert len(set(names)) == len(names)
    assert len(set(texts)) == len(texts)


def test_gathering_again_gives_the_same_bytes(gathered, tmp_path):
    folder, _ = gathered
    corpora.gather(tmp_path, **SIZES)
    for path in folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_code_and_docstrings_of_one_file_share_no_docstring(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        '"""Of the module."""\n\nX = 1\n\n\ndef f(x):\n    """Of f,\n\n    long.\n'
        '    """\n    return x  # kept\n\n\nclass C:\n    """Of C."""\n\n    y = "kept too"\n'
    )
    words = corpora.docstrings(source)
    code = corpora.code_without_docstrings(source)
    assert words == "Of the module.\n\nf\nOf f,\n\nlong.\n\nC\nOf C."
    assert "Of " not in code and '"""' not in code
    assert "return x  # kept" in code and 'y = "kept too"' in code and "def f(x):" in code


def test_unreadable_empty_huge_and_repeated_documents_are_left_out():
    def fails():
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    good = "A sentence about nothing in particular. " * 20
    candidates = [
        ("not utf-8", fails),
        ("short", lambda: "x"),
        ("huge", lambda: "y" * (corpora.LARGEST_DOCUMENT + 1)),
        ("binary", lambda: good + "\0"),
        ("first", lambda: good),
        ("second", lambda: good + "\n\n"),
    ]
    domain = corpora.Domain("d", "D", "", False, lambda: candidates)
    found = list(corpora.documents(domain, set()))
    assert [text for _, text in found] == [good.rstrip()]
    assert list(corpora.documents(domain, set())) == found


def test_too_little_text_is_one_clear_line(tmp_path, monkeypatch):
    found = [(name, lambda name=name: f"A sentence about {name}. " * 20) for name in "abc"]
    lonely = corpora.Domain("lonely", "Lonely", "three files", False, lambda: found)
    monkeypatch.setattr(corpora, "DOMAINS", (lonely,))
    said = []
    with pytest.raises(UserError, match="'lonely'.*no text left for its train split") as raised:
        corpora.gather(tmp_path, 9, 400, 9, said.append)  # test 1, valid the other two documents
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="'lonely'.* has 399 of 400 bytes for its train split"):
        corpora.gather(tmp_path, 400, 9, 9, said.append)
    assert said == []
    monkeypatch.setattr(corpora, "DOMAINS", (dataclasses.replace(lonely, held_out=True),))
    corpora.gather(tmp_path, 1, 9000, 1, said.append)
    assert said[0] == "Lonely: valid has only 798 of 9,000 bytes, all there is"
    with pytest.raises(UserError, match="valid split must hold at least one byte, not 0"):
        corpora.gather(tmp_path, 1, 0, 1)


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match="'no_such_package'.*make install"):
        corpora.package_folder("no_such_package")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    sizes = [word for name in corpora.SPLITS for word in (f"--{name}-bytes", "9")]
    assert corpora.main([str(tmp_path / "file" / "text"), *sizes]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'file' / 'text'}: Not a directory\n"
