"""`fairseq-moe prepare` from end to end."""

import gzip
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from fairseq.data import Dictionary, TokenBlockDataset, encoders
from fairseq.data.data_utils import load_indexed_dataset
from fairseq_cli import preprocess
from omegaconf import OmegaConf
from training import error_in

from fairseq_moe_ext import cli
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.prepare import encode, pipeline
from fairseq_moe_ext.prepare.corpora import parse_corpora
from fairseq_moe_ext.prepare.splits import SplitRule

COLON = "':' separates paths in fairseq, which cannot read one with it in its name"
SPLITS = ("train", "valid", "test")


def run(*arguments):
    """The exit status of fairseq-moe prepare, in this process unless --workers says otherwise."""
    return cli.main(["prepare", "--workers", "1", *map(str, arguments)])


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def text(tmp_path, documents):
    """Two corpora to train on and one that is held out, in three forms."""
    a, b, c = documents[:200], documents[200:300], documents[300:]
    (tmp_path / "a.txt").write_text("\n\n".join(a), encoding="utf-8")
    lines = [json.dumps({"body": text}) for text in b]
    (tmp_path / "b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "c").mkdir()
    for i in range(0, 100, 50):
        data = "\n\n".join(c[i : i + 50]).encode()
        (tmp_path / "c" / f"{i}.txt.gz").write_bytes(gzip.compress(data))
    return tmp_path


@pytest.fixture
def flags(text):
    return [
        "--corpus", f"a={text / 'a.txt'}", "--corpus", f"b={text / 'b.jsonl'}",
        "--heldout", f"c={text / 'c'}", "--field", "body",
        "--valid-fraction", 0.1, "--test-fraction", 0.1,
    ]  # fmt: skip


@pytest.fixture
def data(text, flags, bpe_folder):
    files = ("--gpt2-encoder-json", bpe_folder / "encoder.json")
    files += ("--gpt2-vocab-bpe", bpe_folder / "vocab.bpe")
    assert run(text / "data", *flags, *files) == 0
    return text / "data"


def lines_of(data, corpus, split):
    """The lines of a data-bin as text, read with fairseq's own classes alone."""
    vocabulary = Dictionary.load(str(data / corpus / "dict.txt"))
    bpe = encoders.build_bpe(
        OmegaConf.create(
            {
                "_name": "gpt2",
                "gpt2_encoder_json": str(data / "encoder.json"),
                "gpt2_vocab_bpe": str(data / "vocab.bpe"),
            }
        )
    )
    items = load_indexed_dataset(str(data / corpus / split), vocabulary)
    assert all(item[-1] == vocabulary.eos() for item in items)
    return [bpe.decode(vocabulary.string(item)) for item in items]


def test_a_folder_that_fairseq_would_take_for_two_is_not_begun(flags, tmp_path, capsys):
    for folder in (tmp_path / "c:d", tmp_path / "c:d" / "data"):
        assert run(folder, *flags) == 1
        assert f"error: {folder}: {COLON}" in error_in(capsys.readouterr().err)
    assert not (tmp_path / "c:d").exists()


def test_every_document_comes_back_from_exactly_one_split(data, documents):
    for corpus, expected, splits in (
        ("a", documents[:200], SPLITS),
        ("b", documents[200:300], SPLITS),
        ("c", documents[300:], SPLITS[1:]),
    ):
        found = []
        for split in splits:
            texts = "\n".join(lines_of(data, corpus, split)).split("\n\n")
            rule = SplitRule(0.1, 0.1, 1, held_out=corpus == "c")
            assert texts == [text for text in expected if rule(text) == split]
            found += texts
        assert sorted(found) == sorted(expected)
        present = {path.stem for path in (data / corpus).glob("*.idx")}
        assert present == set(splits)


def test_counts_are_those_of_the_text(data, documents, capsys):
    report = json.loads((data / "counts.json").read_text())
    assert report["bpe_types"] == 400
    assert report["types"] == len(Dictionary.load(str(data / "dict.txt"))) == 408
    assert report["corpora"]["c"]["held_out"] and not report["corpora"]["a"]["held_out"]
    for corpus, splits in report["corpora"].items():
        for split in SPLITS:
            if corpus == "c" and split == "train":
                assert split not in splits
                continue
            lines = lines_of(data, corpus, split)
            items = load_indexed_dataset(str(data / corpus / split))
            assert splits[split] == {
                "documents": sum(line == "" for line in lines) + 1,
                "lines": len(lines),
                "tokens": int(items.sizes.sum()),
                "unknown": 0,
                "bytes": len("".join(line + "\n" for line in lines).encode()),
            }
    assert sum(report["corpora"]["a"][split]["documents"] for split in SPLITS) == 200


def test_the_dictionary_counts_the_training_text_and_is_everywhere(data):
    counts = np.zeros(408, dtype=int)
    for corpus in ("a", "b"):
        for item in load_indexed_dataset(str(data / corpus / "train")):
            counts += np.bincount(item.numpy(), minlength=408)
    vocabulary = Dictionary.load(str(data / "dict.txt"))
    assert counts[4:].tolist() == vocabulary.count[4:]
    assert vocabulary.count[4:] == sorted(vocabulary.count[4:], reverse=True)
    for corpus in "abc":
        assert (data / corpus / "dict.txt").read_bytes() == (data / "dict.txt").read_bytes()


@pytest.mark.parametrize("given_dictionary", [True, False])
def test_the_data_bin_equals_that_of_fairseq_preprocess(data, tmp_path, given_dictionary):
    """Given the same encoded text; without our dictionary, its own agrees with ours as well."""
    vocabulary = Dictionary.load(str(data / "dict.txt"))
    encoded = tmp_path / "encoded.txt"
    items = load_indexed_dataset(str(data / "a" / "train"), vocabulary)
    encoded.write_text("".join(vocabulary.string(item) + "\n" for item in items))
    arguments = ["--only-source", "--trainpref", str(encoded), "--destdir", str(tmp_path / "bin")]
    if given_dictionary:
        arguments += ["--srcdict", str(data / "dict.txt")]
    args = preprocess.options.get_preprocessing_parser().parse_args(arguments)
    preprocess.main(args)
    if given_dictionary:
        for name in ("train.bin", "train.idx", "dict.txt"):
            assert (data / "a" / name).read_bytes() == (tmp_path / "bin" / name).read_bytes()
    else:
        stock = Dictionary.load(str(tmp_path / "bin" / "dict.txt"))
        theirs = load_indexed_dataset(str(tmp_path / "bin" / "train"), stock)
        assert [stock.string(i) for i in theirs] == [vocabulary.string(i) for i in items]


def test_complete_doc_finds_the_documents(data):
    """fairseq takes a line of </s> alone for the end of a document."""
    vocabulary = Dictionary.load(str(data / "dict.txt"))
    items = load_indexed_dataset(str(data / "a" / "train"), vocabulary)
    blocks = TokenBlockDataset(
        items, items.sizes, 10_000, pad=vocabulary.pad(), eos=vocabulary.eos(),
        break_mode="complete_doc",
    )  # fmt: skip
    counts = json.loads((data / "counts.json").read_text())["corpora"]["a"]["train"]
    assert len(blocks) == counts["documents"]


def test_the_result_does_not_depend_on_workers_or_chunks(text, flags, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_CHARACTERS", 700)
    monkeypatch.setattr(encode, "WORKER_BYTES", 1)
    started = []
    start = encode.ProcessPoolExecutor
    monkeypatch.setattr(
        encode, "ProcessPoolExecutor", lambda n, **rest: started.append(n) or start(n, **rest)
    )
    assert run(text / "two", *flags, "--train-bpe", 350, "--workers", 2) == 0
    assert started == [2]
    monkeypatch.undo()  # too little text for another process
    assert run(text / "small", *flags, "--train-bpe", 350, "--workers", 2) == 0
    assert contents(text / "small") == contents(text / "two")
    assert started == [2]
    assert run(text / "one", *flags, "--train-bpe", 350) == 0
    assert contents(text / "one") == contents(text / "two")
    assert json.loads((text / "one" / "counts.json").read_text())["bpe_types"] == 350


def test_packed_text_counts_as_more_when_workers_are_chosen(tmp_path):
    paths = [tmp_path / name for name in ("a.txt", "b.jsonl.gz", "c.parquet")]
    for path in paths:
        path.write_bytes(b"x" * 10)
    assert pipeline._text_size(paths) == 10 + 40 + 40


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("kind", ["hexadecimal", "repetitive", "chinese"])
def test_the_bpe_is_trained_on_as_much_text_as_asked_for(tmp_path, monkeypatch, name, kind):
    """However well the text is packed."""
    line = {
        "hexadecimal": lambda i: hashlib.sha256(b"%d" % i).hexdigest(),
        "repetitive": lambda i: f"document {i} the cat sat on the mat and more words here",
        "chinese": lambda i: f"{i} 木木木木木木木木木木",
    }[kind]
    text = "\n\n".join(map(line, range(20_000))).encode()
    pack = gzip.compress if name.endswith("gz") else bytes
    (tmp_path / name).write_bytes(pack(text))
    used = []

    def train_bpe(documents, size, folder):
        used.extend(documents)
        raise UserError("enough")

    monkeypatch.setattr(pipeline, "train_bpe", train_bpe)
    line = ["--train-bpe", 300, "--train-bpe-bytes", 100_000]
    assert run(tmp_path / "data", "--corpus", f"a={tmp_path / name}", *line) == 1
    size = sum(len(document.encode()) for document in used)
    assert 30_000 < size < 126_000
    order = [text.index(document.encode()) for document in used]
    assert order == sorted(order) and order[0] < len(text) / 100
    assert order[-1] > len(text) * (0.85 if name == "a.txt" else 0.2)


def test_a_second_domain_is_prepared_with_the_dictionary_of_the_first(data, text, documents):
    more = text / "more.txt"
    more.write_text("\n\n".join(documents[:50]) + "\n\nunseen 𝔘𝔫𝔦𝔠𝔬𝔡𝔢\n", encoding="utf-8")
    tokenizer = ["--gpt2-encoder-json", data / "encoder.json", "--gpt2-vocab-bpe"]
    tokenizer += [data / "vocab.bpe"]
    arguments = ["--heldout", f"more:test={more}", *tokenizer, "--dict", data / "dict.txt"]
    assert run(text / "second", *arguments) == 0
    for place in (text / "second", text / "second" / "more"):
        assert (place / "dict.txt").read_bytes() == (data / "dict.txt").read_bytes()
    assert "\n".join(lines_of(text / "second", "more", "test")) == more.read_text("utf-8").rstrip()


@pytest.mark.parametrize("name", ["encoder.json", "vocab.bpe"])
def test_bpe_of_another_dictionary_is_refused(data, text, capsys, name):
    """Its ids are in range, as those of all BPEs of one size are."""
    other = text / name
    if name == "encoder.json":  # two merged tokens exchange their ids
        tokens = json.loads((data / name).read_text())
        one, two = sorted(tokens, key=tokens.get)[-2:]
        other.write_text(json.dumps({**tokens, one: tokens[two], two: tokens[one]}))
    else:
        first, *merges = (data / name).read_text().splitlines()
        other.write_text("\n".join([first, *reversed(merges)]) + "\n")
    bpe = {n: data / n for n in ("encoder.json", "vocab.bpe")}
    flags = dict(zip(bpe, ("--gpt2-encoder-json", "--gpt2-vocab-bpe")))

    def prepare(dictionary, **given):
        tokenizer = [word for n in bpe for word in (flags[n], {**bpe, **given}[n])]
        corpus = f"more:test={text / 'a.txt'}"
        return run(text / "second", "--heldout", corpus, *tokenizer, "--dict", dictionary)

    for dictionary in (data / "dict.txt", data / "a" / "dict.txt"):
        assert prepare(dictionary, **{name: other}) == 1
        assert error_in(capsys.readouterr().err) == (
            f"error: {flags[name]} {other}: differs from {data / name}, which belongs to --dict "
            f"{dictionary}: give that file, or the dict.txt of this tokenizer"
        )
        assert not (text / "second").exists()
    assert prepare(data / "a" / "dict.txt") == 0


def test_ids_missing_from_a_given_dictionary_are_counted_as_unknown(data, text, capsys):
    small = text / "small.txt"
    small.write_text("".join((data / "dict.txt").read_text().splitlines(True)[:100]))
    tokenizer = ["--gpt2-encoder-json", data / "encoder.json", "--gpt2-vocab-bpe"]
    tokenizer += [data / "vocab.bpe"]
    arguments = ["--corpus", f"a:train={text / 'a.txt'}", *tokenizer, "--dict", small]
    assert run(text / "second", *arguments) == 0
    counts = json.loads((text / "second" / "counts.json").read_text())["corpora"]["a"]["train"]
    items = load_indexed_dataset(str(text / "second" / "a" / "train"))
    assert counts["unknown"] == sum(int((item == 3).sum()) for item in items) > 0
    assert re.search(r"unknown", capsys.readouterr().out)


def test_splits_made_by_the_user(text, bpe_folder, documents):
    arguments = list(
        itertools.chain.from_iterable(
            ("--corpus", f"a:{split}={path}")
            for split, path in zip(SPLITS, (text / "a.txt", text / "b.jsonl", text / "c"))
        )
    )
    tokenizer = ["--gpt2-encoder-json", bpe_folder / "encoder.json", "--gpt2-vocab-bpe"]
    tokenizer += [bpe_folder / "vocab.bpe"]
    assert run(text / "data", *arguments, "--field", "body", *tokenizer) == 0
    for split, part in zip(SPLITS, (documents[:200], documents[200:300], documents[300:])):
        assert "\n".join(lines_of(text / "data", "a", split)).split("\n\n") == part


def test_the_bpe_is_trained_on_train_documents_only(text, documents):
    (text / "v.txt").write_text("zqxjzqxj " * 500, encoding="utf-8")
    flags = ["--corpus", f"a:train={text / 'a.txt'}", "--corpus", f"a:valid={text / 'v.txt'}"]
    flags += ["--heldout", f"h:test={text / 'v.txt'}", "--train-bpe", 350]
    assert run(text / "data", *flags) == 0
    assert not any("zq" in t for t in json.loads((text / "data" / "encoder.json").read_text()))


def test_shares_of_documents_are_those_asked_for():
    rule = SplitRule(valid=0.1, test=0.2, seed=1)
    found = [rule(f"document {i}") for i in range(20_000)]
    # standard deviations are 0.0021 and 0.0028
    assert found.count("valid") / 20_000 == pytest.approx(0.1, abs=0.01)
    assert found.count("test") / 20_000 == pytest.approx(0.2, abs=0.01)
    held_out = SplitRule(valid=0.1, test=0.2, seed=1, held_out=True)
    found = [held_out(f"document {i}") for i in range(20_000)]
    assert found.count("valid") / 20_000 == pytest.approx(1 / 3, abs=0.015)
    assert found.count("train") == 0
    other = SplitRule(valid=0.1, test=0.2, seed=2)
    assert any(rule(f"document {i}") != other(f"document {i}") for i in range(100))


def test_copies_of_a_document_are_in_one_split(text, documents):
    copies = [document for document in documents[:100] for _ in range(3)]
    (text / "a.txt").write_text("\n\n".join(copies), encoding="utf-8")
    arguments = ["--corpus", f"a={text / 'a.txt'}", "--train-bpe", 300]
    assert run(text / "data", *arguments, "--valid-fraction", 0.3, "--test-fraction", 0.3) == 0
    texts = ["\n".join(lines_of(text / "data", "a", split)).split("\n\n") for split in SPLITS]
    assert sum(map(len, texts)) == 300 and all(texts)
    assert not any(set(a) & set(b) for a, b in itertools.combinations(texts, 2))


GOOD = ["--corpus", "a=a.txt", "--train-bpe", "300", "--valid-fraction", "0.1"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], r"--corpus: missing"),
        (["--corpus", "a"], r"--corpus a: not of the form NAME=PATH"),
        (["--corpus", "a="], r"--corpus a=: not of the form"),
        (["--corpus", "a=none.txt"], r"--corpus a: none\.txt: no such file"),
        (["--corpus", "a/b=a.txt"], r"--corpus: a corpus cannot be called 'a/b'"),
        (["--corpus", "in_domain=a.txt"], r"--corpus: the name 'in_domain' is reserved"),
        (["--corpus", "valid1=a.txt"], r"--corpus: the name 'valid1' is reserved"),
        (["--corpus", "a:dev=a.txt"], r"--corpus a:dev: the split 'dev' is not one of train, val"),
        (["--heldout", "a:train=a.txt"], r"--heldout a:train: the split 'train' is not one of"),
        (["--corpus", "a:valid=a.txt"], r"--corpus a: no train split"),
        (["--corpus", "a=a.txt", "--corpus", "a=a.txt"], r"a: the corpus is given twice"),
        (["--corpus", "a=a.txt", "--heldout", "a=a.txt"], r"a: the corpus is given twice"),
        (["--corpus", "a:train=a.txt", "--corpus", "a=a.txt"], r"a: given both with and"),
        (["--corpus", "a:train=a*", "--corpus", "a:valid=./a.txt"], r"a:valid: \S*a\.txt .* a:tra"),
        (["--corpus", "a:valid=a.txt", "--corpus", "a:train=a*"], r"a:train: a\.txt .* a:valid,"),
        ([*GOOD, "--heldout", "h:test=./a.txt"], r"--heldout h:test: a\.txt .* of --corpus a,"),
        ([*GOOD, "--corpus", "b=a.txt"], r"--corpus b: a\.txt is also .* --corpus a, .* leave"),
        (["--corpus", "a=a.txt"], r"tokenizer: give .* or --train-bpe VOCAB_SIZE"),
        ([*GOOD, "--gpt2-vocab-bpe", "x"], r"--train-bpe: cannot be combined with"),
        ([*GOOD, "--train-bpe", "256"], r"--train-bpe 256: .*more than 256"),
        ([*GOOD, "--train-bpe-bytes", "0"], r"--train-bpe-bytes 0: must be above 0"),
        ([*GOOD, "--dict", "x"], r"--dict: cannot be combined with --train-bpe"),
        (["--heldout", "h=a.txt", "--train-bpe", "300"], r"--train-bpe: there is no --corpus"),
        (
            ["--heldout", "h=a.txt", "--gpt2-encoder-json", "x", "--gpt2-vocab-bpe", "x"],
            r"--dict: missing; without a --corpus",
        ),
        ([*GOOD, "--valid-fraction", "-0.1"], r"--valid-fraction -0\.1: must be at least 0"),
        ([*GOOD, "--test-fraction", "nan"], r"--test-fraction nan: must be at least 0"),
        ([*GOOD, "--valid-fraction", "0.5", "--test-fraction", "0.5"], r"together 1\.0, must be"),
        (
            [*GOOD, "--heldout", "h=empty.txt", "--valid-fraction", "0", "--test-fraction", "0"],
            r"--heldout: .* cannot both be 0",
        ),
        ([*GOOD, "--train-bpe", "10000000000000"], r"--train-bpe 10{13}: must be at most 1048576"),
        ([*GOOD, "--train-bpe", "-1"], r"--train-bpe -1: .*more than 256"),
        ([*GOOD, "--dict-size", "10000000000000"], r"--dict-size 10{13}: must be at most 1048576"),
        ([*GOOD, "--dict-size", "0"], r"--dict-size 0: too small"),
        ([*GOOD, "--dict-size", "303"], r"--dict-size 303: too small for 300 BPE tokens"),
        ([*GOOD, "--dict-size", "-8"], r"--dict-size -8: too small"),
        ([*GOOD, "--workers", "100000"], r"--workers 100000: must be .* at most 1024"),
        ([*GOOD, "--corpus", "f=fifo"], r"--corpus f: fifo: a FIFO"),
        ([*GOOD, "--corpus", "f=fifos"], r"--corpus f: fifos/fifo: a FIFO"),
        ([*GOOD, "--corpus", "f=/dev/null"], r"--corpus f: /dev/null: a device"),
        ([*GOOD, "--corpus", "f=" + "x" * 300], r"--corpus f: x+: no such file"),
        ([*GOOD, "--workers", "0"], r"--workers 0: must be at least 1"),
        ([*GOOD, "--dict-size", "100"], r"--dict-size 100: too small for .* at least"),
        (["--corpus", "e=empty.txt", "--train-bpe", "300"], r"--corpus e: empty; no document"),
        ([*GOOD, "--heldout", "h:test=empty.txt"], r"--heldout h: empty; no document"),
        ([*GOOD, "--corpus", "b:train=small.txt", "--corpus", "b:test=empty.txt"], r"b:test: e"),
        ([*GOOD, "--corpus", "s=small.txt"], "--corpus s: of its 2 documents none fell into"),
        ([*GOOD, "--corpus", "l=latin.txt"], r"latin\.txt: not UTF-8 at byte 3 \(0xe9\)"),
        ([*GOOD, "--corpus", "j=j.jsonl"], r"j\.jsonl, line 2: no field 'text'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing_behind(
    text, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(text)
    (text / "empty.txt").write_text("\n \n\n", encoding="utf-8")
    (text / "small.txt").write_text("one\n\ntwo", encoding="utf-8")
    (text / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (text / "j.jsonl").write_text('{"text": "x"}\n{"body": "x"}\n', encoding="utf-8")
    (text / "fifos").mkdir()
    os.mkfifo(text / "fifo")
    os.mkfifo(text / "fifos" / "fifo")
    before = contents(text)
    assert run("data", *arguments) == 1
    assert re.search(message, error_in(capsys.readouterr().err))
    assert contents(text) == before
    assert not [path for path in text.iterdir() if "data" in path.name]


def test_the_small_corpora_are_encoded_first(text, monkeypatch, flags):
    """Those that may lack a split. With --dedup the order says which of two documents is kept."""
    order = []
    encode_one = pipeline._encode

    def encode(corpus, *rest):
        order.append(corpus.name)
        return encode_one(corpus, *rest)

    monkeypatch.setattr(pipeline, "_encode", encode)
    (text / "small.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    line = [*flags, "--corpus", f"s:train={text / 'small.txt'}", "--train-bpe", 300]
    assert run(text / "data", *line) == 0
    given = list(json.loads((text / "data" / "counts.json").read_text())["corpora"])
    assert order[0] == "s" != given[0] and sorted(order) == sorted(given)
    order.clear()
    assert run(text / "data", *line, "--dedup", "--overwrite") == 0
    assert order == given


def test_an_existing_folder_is_replaced_only_if_told_and_only_if_ours(text, flags, capsys):
    flags = [*flags, "--train-bpe", 300]
    assert run(text / "data", *flags) == 0
    before = contents(text / "data")
    assert run(text / "data", *flags, "--split-seed", 2) == 1
    assert "data: exists; choose another folder or add --overwrite" in capsys.readouterr().err
    assert contents(text / "data") == before
    assert run(text / "data", *flags, "--split-seed", 2, "--overwrite") == 0
    assert contents(text / "data") != before
    split = json.loads((text / "data" / "counts.json").read_text())["split"]
    assert split == {"valid_fraction": 0.1, "test_fraction": 0.1, "split_seed": 2}
    (text / "home").mkdir()
    (text / "home" / "thesis.tex").touch()
    assert run(text / "home", *flags, "--overwrite") == 1
    assert "--overwrite replaces only folders" in capsys.readouterr().err
    assert (text / "home" / "thesis.tex").exists()


def test_a_place_that_cannot_be_written_is_named(text, flags, capsys):
    (text / "file").touch()
    for name in ("file/data", "file/in/data"):
        assert run(text / name, *flags, "--train-bpe", 300) == 1
        said = f"error: {text / name}: {text / 'file'} is not a folder; name another"
        assert error_in(capsys.readouterr().err) == said


def test_a_name_with_a_comma_is_a_glob(tmp_path):
    (tmp_path / "a,b.txt").write_text("text\n")
    said = "a: no such file, .*; commas separate paths, so write [?] for one in a name"
    with pytest.raises(UserError, match=said):
        parse_corpora([f"x={tmp_path}/a,b.txt"], [])
    with pytest.raises(UserError, match="; check the path$"):
        parse_corpora([f"x={tmp_path}/c.txt"], [])
    (corpus,) = parse_corpora([f"x={tmp_path}/a?b.txt"], [])
    assert corpus.files == {None: [tmp_path / "a,b.txt"]}


def test_a_failure_with_overwrite_leaves_the_old_folder(text, flags):
    flags = [*flags, "--train-bpe", 300]
    assert run(text / "data", *flags) == 0
    before = contents(text / "data")
    (text / "b.jsonl").write_text("{}", encoding="utf-8")
    assert run(text / "data", *flags, "--overwrite") == 1
    assert contents(text / "data") == before


def test_the_table_names_every_corpus_and_split(text, flags, capsys):
    assert run(text / "data", *flags, "--train-bpe", 300) == 0
    table = capsys.readouterr().out
    rows = [line.split()[0] for line in table.splitlines()]
    assert rows[:9] == ["corpus", "a", "a", "a", "b", "b", "b", "c", "c"]
    tokens = json.loads((text / "data" / "counts.json").read_text())["corpora"]["c"]["test"][
        "tokens"
    ]
    assert re.search(rf"c \(held out\) +test +\d+ +\d+ +{tokens:,} ", table)


def peak_memory(corpus, dest):
    """Peak memory in MB of preparing one file of text, in a process of its own."""
    script = (
        "import sys, resource; from fairseq_moe_ext import cli; "
        "from fairseq_moe_ext.prepare import binarize, encode; "
        "encode.CHUNK_CHARACTERS = 1 << 17; binarize.BLOCK = 1 << 14; "
        "status = cli.main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(status)"
    )
    arguments = ["prepare", dest, "--corpus", f"a={corpus}", "--train-bpe", "300", "--workers", "1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], check=True, capture_output=True
    )
    unit = 1 if sys.platform == "darwin" else 1024  # bytes or KiB
    return int(done.stdout.split()[-1]) * unit / 1e6


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path, documents):
    """8 MB more text: 8 MB and more if a corpus were held in memory, its tokens not counted."""
    block = "\n\n".join(documents) + "\n\n"
    for name, size in (("small", 2_000_000), ("large", 10_000_000)):
        repeats = size // len(block.encode())
        with open(tmp_path / name, "w", encoding="utf-8") as file:
            file.writelines(block.replace("paper", f"paper{i % 97}") for i in range(repeats))
    small = peak_memory(tmp_path / "small", tmp_path / "data.small")
    large = peak_memory(tmp_path / "large", tmp_path / "data.large")
    assert large - small < 5, (small, large)


@pytest.mark.slow
def test_the_command_line_is_the_console_scripts(tmp_path):
    """As `fairseq-moe`, in a process of its own, with workers and without a terminal."""
    (tmp_path / "a.txt").write_text("one two\n\nthree four\n" * 500, encoding="utf-8")
    command = [sys.executable, "-m", "fairseq_moe_ext.cli"]
    here = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, "prepare", "data", "--corpus", "a:train=a.txt", "--train-bpe", "270"],
        cwd=tmp_path, env=here, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "a: 1 file of text"
    assert "encoding" not in done.stderr  # quick work shows no progress
    failed = subprocess.run(
        [*command, "prepare", "data", "--corpus", "a:train=a.txt", "--train-bpe", "270"],
        cwd=tmp_path, env=here, capture_output=True, text=True,
    )  # fmt: skip
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: data: exists")
    assert "Traceback" not in failed.stderr
