"""Tables, separators and duplicates; pyarrow and zstandard where they are installed."""

import json

import pytest

from fairseq_moe_ext import cli
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.prepare import kinds
from fairseq_moe_ext.prepare.documents import Source, list_files, read_documents

TEXTS = ['one,\n\ntwo "quoted"', "three", "vier Ä 中"]


def read(path, **source):
    return [text for text, _ in read_documents(path, Source(**source))]


def test_a_column_of_csv(tmp_path):
    rows = ["id,text", '1,"one,\n\ntwo ""quoted"""', "2,three", "", "3,vier Ä 中"]
    (tmp_path / "a.csv").write_text("\r\n".join(rows), encoding="utf-8-sig", newline="")
    assert read(tmp_path / "a.csv") == TEXTS
    assert read(tmp_path / "a.csv", field="id") == ["1", "2", "3"]
    (tmp_path / "a.dat").write_bytes((tmp_path / "a.csv").read_bytes())
    assert read(tmp_path / "a.dat", format="csv") == TEXTS


def test_a_column_of_tsv_whose_quotation_marks_are_text(tmp_path):
    (tmp_path / "a.tsv").write_text('id\ttext\n1\t"one\n2\ttwo" three\n')
    assert read(tmp_path / "a.tsv") == ['"one', 'two" three']


@pytest.mark.parametrize(
    "content, words",
    [
        ("id,text\n1,x\n2\n", r"line 3: 1 columns, and the header has 2"),
        ('id,text\n1,"x\n', r"line 2: not CSV"),
        ("id,body\n1,x\n", r"without a column 'text' \(columns: id, body\); .*--text-field"),
        ("text,text\n1,x\n", r"2 columns are called 'text'; rename all but one"),
        (b"id,text\n1,\xff\n", r"not UTF-8 near line \d \(0xff\)"),
    ],
)
def test_damaged_tables_are_refused(tmp_path, content, words):
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=words):
        read(path)


def test_patterns_are_of_characters(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeff———\none\n———\néclair\nÄpfel\ntwo\n", encoding="utf-8")
    assert read(path, ends="^—{3}$") == ["one", "éclair\nÄpfel\ntwo"]
    assert read(path, starts="^[ÄÖ]") == ["———\none\n———\néclair", "Äpfel\ntwo"]
    assert read(path, starts=r"^\w{6}$") == ["———\none\n———", "éclair\nÄpfel\ntwo"]
    path.write_bytes("one\n———\n".encode() + b"\xe9\n")
    with pytest.raises(UserError, match="not UTF-8 at byte 14"):
        read(path, ends="^—{3}$")


def test_a_separator_is_left_out_and_blank_lines_stay(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n<|end|>\nthree\n<|end|>\n<|end|>\n\nfour <|end|> five\n")
    found = read(path, ends=r"^<\|end\|>$")
    assert found == ["one\n\ntwo", "three", "four <|end|> five"]


def test_the_articles_of_wikitext(tmp_path):
    text = " \n = One = \n \n a b \n \n = = Part = = \n \n c \n = Two = \n d \n"
    (tmp_path / "wiki.txt").write_text(text)
    found = read(tmp_path / "wiki.txt", starts=r"^ = [^=]+ = $")
    assert [one.split("\n")[0] for one in found] == [" = One = ", " = Two = "]
    assert " = = Part = = " in found[0] and len(read(tmp_path / "wiki.txt")) > 3


def test_offsets_of_separated_documents_are_those_of_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n--\ntwo\n\n\xff\n")
    with pytest.raises(UserError, match="not UTF-8 at byte 12"):
        read(tmp_path / "a.txt", ends="^--$")


@pytest.fixture
def prepare(tmp_path, capsys):
    def run(*arguments):
        line = ["prepare", str(tmp_path / "data"), "--workers", "1", "--train-bpe", "260"]
        line += ["--valid-fraction", "0", "--test-fraction", "0", "--overwrite"]
        status = cli.main([*line, *arguments])
        path = tmp_path / "data" / "counts.json"
        counts = json.loads(path.read_text())["corpora"] if status == 0 else None
        return counts, capsys.readouterr()

    return run


def test_duplicates_are_left_out_and_counted(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("one one\n\ntwo two\n\none one\n\n")
    (tmp_path / "b.txt").write_text("two two\n\nthree three\n\ntwo  two\n\n")
    line = ["--corpus", f"a={tmp_path}/a.txt", "--corpus", f"b={tmp_path}/b.txt"]
    counts, _ = prepare(*line)
    assert [counts[name]["train"]["documents"] for name in "ab"] == [3, 3]
    assert "duplicates" not in counts["a"]
    counts, said = prepare(*line, "--dedup")
    assert [counts[name]["train"]["documents"] for name in "ab"] == [2, 2]
    assert [counts[name]["duplicates"] for name in "ab"] == [1, 1]
    assert "a: 1 duplicate left out\nb: 1 duplicate left out" in said.out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--separator", "("], "--separator (: not a regular expression"),
        (["--separator", ""], "--separator '': matches every line"),
        (["--document-start", "x*"], "--document-start 'x*': matches every line"),
        (["--separator", "a", "--document-start", "b"], "use only one of them"),
        (
            ["--separator", "a", "--documents", "line"],
            "--separator a: cannot be combined with --documents line",
        ),
    ],
)
def test_patterns_that_cannot_be_are_refused(prepare, tmp_path, flags, words):
    (tmp_path / "a.txt").write_text("one\n")
    _, said = prepare("--corpus", f"a={tmp_path}/a.txt", *flags)
    assert said.err.startswith("error: ") and words in said.err and said.err.count("\n") == 1


def test_parquet_and_arrow(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": [1, 2, 3], "text": TEXTS})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    with pyarrow.ipc.new_file(tmp_path / "file.arrow", table.schema) as file:
        file.write_table(table)
    folder = tmp_path / "saved"
    folder.mkdir()
    for name in ("data-00000-of-00001.arrow", "cache-1.arrow"):
        with pyarrow.ipc.new_stream(folder / name, table.schema) as file:
            file.write_table(table)
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{}")
    assert list_files(str(folder), "x") == [folder / "data-00000-of-00001.arrow"]
    for path in (tmp_path / "a.parquet", tmp_path / "file.arrow", *list_files(str(folder), "x")):
        assert read(path) == TEXTS
        with pytest.raises(UserError, match=r"column 'id' is int64, not text"):
            read(path, field="id")
        with pytest.raises(UserError, match=r"without a column 'body' \(columns: id, text\)"):
            read(path, field="body")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[:-40])
    with pytest.raises(UserError, match="broken parquet file"):
        read(tmp_path / "cut.parquet")


def test_other_types_of_text_and_two_columns_of_a_name(tmp_path):
    """pandas' categories, polars' string views."""
    pyarrow = pytest.importorskip("pyarrow")
    texts = pyarrow.array(TEXTS)
    for kind in (texts.dictionary_encode(), texts.cast(pyarrow.string_view())):
        table = pyarrow.table({"text": kind})
        with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
            file.write(table)
        assert read(tmp_path / "a.arrow") == TEXTS
    table = pyarrow.table([texts, texts], names=["text", "text"])
    with pyarrow.ipc.new_file(tmp_path / "two.arrow", table.schema) as file:
        file.write(table)
    with pytest.raises(UserError, match="2 columns are called 'text'"):
        read(tmp_path / "two.arrow")


def test_zstandard(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    packed = zstandard.compress(lines[:20]) + zstandard.compress(lines[20:])  # two frames
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert read(tmp_path / "a.jsonl.zst") == TEXTS
    text = "".join(f"line {i}\n" for i in range(100_000)).encode()
    skipped = b"\x50\x2aM\x18\x03\0\0\0abc"  # a frame that holds no data
    whole = zstandard.compress(text) + skipped + zstandard.compress(b"") + zstandard.compress(b"z")
    (tmp_path / "a.txt.zst").write_bytes(whole)
    assert "".join(read(tmp_path / "a.txt.zst")) == text.decode() + "z"
    for cut in (whole[: len(whole) // 2], whole[:-1]):
        (tmp_path / "a.txt.zst").write_bytes(cut)
        with pytest.raises(UserError, match="broken zstd file .it ends within a frame"):
            read(tmp_path / "a.txt.zst")


def test_formats_have_words():
    formats = {*kinds.FORMATS, "parquet", "arrow", ""} - {"auto"}
    assert all(kinds.listed([kinds.Kind("", name)]) for name in formats)


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_cell_that_is_not_utf8_is_refused(tmp_path, form):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    cells = pyarrow.array([b"one", b"caf\xe9"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"text": cells})
    path = tmp_path / f"a.{form}"
    if form == "parquet":
        parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
    with pytest.raises(UserError, match=f"^{path}, at row 0 or after: not UTF-8 .0xe9.; convert"):
        read(path)
