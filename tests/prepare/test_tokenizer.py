"""Byte-level BPE: the ids are those of fairseq's own `--bpe gpt2`, on any text."""

import json
import os
import random
import tempfile

import pytest
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode, get_encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.prepare import dictionary, tokenizer
from fairseq_moe_ext.prepare.tokenizer import ByteLevelBPE, byte_symbols, train_bpe


@pytest.fixture(scope="module")
def ours(bpe_folder):
    return ByteLevelBPE.from_files(bpe_folder / "encoder.json", bpe_folder / "vocab.bpe")


@pytest.fixture(scope="module")
def fairseqs(bpe_folder):
    return get_encoder(str(bpe_folder / "encoder.json"), str(bpe_folder / "vocab.bpe"))


def line_by_line(encoder, text, newline):
    """What fairseq's encoder gives for each line, and `newline` in between."""
    ids = []
    for number, line in enumerate(text.split("\n")):
        ids += [newline] * (number > 0) + encoder.encode(line)
    return ids


ODD = [
    "",
    " ",
    "  \n  x  \n\n\n   ",
    "tabs\tand \t mixed\t\t\tspaces   end   ",
    "carriage\r\nreturn\r end\r",
    "e\u0301 o\u0308\u0301 \u0301alone combining",
    "👩‍👩‍👧‍👦 🏳️‍🌈 😀😀 flag🇫🇷 \ufe0f",
    "日本語の文章。中文 句子，한국어 ไทย हिन्दी العربية שלום",
    "".join(map(chr, range(0x20))) + "\x7f\x80\x85\x9f\xa0\xad",
    "\u00a0nbsp\u2003em\u2028line\u2029paragraph\u3000ideographic\u200bzero\ufeff",
    "it's IT'S they're we've I'll he'd 's 'S ''s",
    "1234½²³①Ⅳ１２３ x2 2x",
    "a" * 3000 + " " * 500 + "b",
    "<|endoftext|> </s> <unk>",
    "\U0010ffff\ue000\ufffe\U000e0001",
    # letters and digits that tokenizers' own tables do not know, see tokenizer.py
    "a\u088fb \u0c5c\u0cdc \u208f1 \ua7ce\ua7d2x \U000107bb\U00010940 \U00031350漢",
]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_text_is_encoded_as_fairseq_does(ours, fairseqs, text):
    assert ours.encode(text) == line_by_line(fairseqs, text, ours.newline)


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(max_size=60)
    | st.text(alphabet="ab1 \t\n\r'!é日\u0301\u3000\x0c\x1c\x85", max_size=40)
)
def test_any_text_is_encoded_as_fairseq_does(ours, fairseqs, text):
    assert ours.encode(text) == line_by_line(fairseqs, text, ours.newline)


def test_code_points_of_all_planes_are_encoded_as_fairseq_does(ours, fairseqs):
    """All below U+3100, and every 61st above: alone, after a letter, a digit, a sign, a space."""
    points = [*range(0x3100), *range(0x3100, 0x110000, 61)]
    lines = [f"a{c}1{c}!{c} {c}{c}" for c in map(chr, points) if not c.isascii() or c > "\r"]
    text = "\n".join(line for line in lines if not "\ud800" <= line[1] <= "\udfff")
    assert ours.encode(text) == line_by_line(fairseqs, text, ours.newline)


def test_forgetting_words_changes_nothing(bpe_folder, documents, monkeypatch):
    texts = ["\n\n".join(documents[i : i + 50]) for i in range(0, 400, 50)]
    files = (bpe_folder / "encoder.json", bpe_folder / "vocab.bpe")
    expected = list(map(ByteLevelBPE.from_files(*files).encode, texts))
    monkeypatch.setattr(tokenizer, "MAX_REMEMBERED_WORDS", 3)
    monkeypatch.setattr(tokenizer, "MAX_REMEMBERED_LENGTH", 4)
    assert list(map(ByteLevelBPE.from_files(*files).encode, texts)) == expected


def test_decoding_gives_the_text_back(ours, fairseqs):
    line = "Hi, naïve 日本 \t 😀 \x00\x1f e\u0301 end "
    assert fairseqs.decode(ours.encode(line)) == line


def test_the_stand_ins_of_bytes_are_fairseqs():
    assert dict(enumerate(byte_symbols())) == bytes_to_unicode()


def test_training_gives_gpt2s_format_and_the_same_files_every_time(tmp_path, documents, bpe_folder):
    encoder = json.loads((bpe_folder / "encoder.json").read_text(encoding="ascii"))
    merges = (bpe_folder / "vocab.bpe").read_text(encoding="utf-8")
    assert sorted(encoder.values()) == list(range(400))
    assert set(byte_symbols()) <= encoder.keys()
    assert merges.startswith("#version: 0.2\n") and merges.endswith("\n")
    assert len(merges.splitlines()) == 1 + 400 - 256
    train_bpe(iter(documents), 400, tmp_path)
    for name in ("encoder.json", "vocab.bpe"):
        assert (tmp_path / name).read_bytes() == (bpe_folder / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder.json", "vocab.bpe"]


def test_training_needs_no_temporary_folder(tmp_path, monkeypatch):
    """It may be full where the data folder is not."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert train_bpe(["some words, some words"], 258, tmp_path) == 258


def test_training_learns_nothing_across_lines(tmp_path):
    train_bpe(["a b\na b\n"] * 50, 300, tmp_path)
    newline = byte_symbols()[ord("\n")]
    tokens = json.loads((tmp_path / "encoder.json").read_text()).keys()
    assert [token for token in tokens if newline in token] == [newline]


def test_training_says_how_many_types_the_text_had(tmp_path):
    size = train_bpe(["only these few words"], 5000, tmp_path)
    assert 256 <= size < 300
    assert len(json.loads((tmp_path / "encoder.json").read_text())) == size


def test_files_of_another_format_are_refused(tmp_path, bpe_folder):
    encoder = json.loads((bpe_folder / "encoder.json").read_text())
    merges = (bpe_folder / "vocab.bpe").read_text(encoding="utf-8")
    good = {"e": json.dumps(encoder), "m": merges}
    rng = random.Random(0)
    last = rng.choice(sorted(set(encoder) - set(byte_symbols())))
    cases = {
        r"encoder.json: cannot be read \(No such file": {"e": None},
        r"vocab.bpe: cannot be read \(No such file": {"m": None},
        "encoder.json: not JSON": {"e": "{"},
        "encoder.json: not GPT-2's format": {"e": json.dumps({**encoder, "zzzz": 4000})},
        "1 of the 256 bytes": {
            "e": json.dumps({("zz" if k == "A" else k): v for k, v in encoder.items()})
        },
        "not JSON: nested too deep": {"e": "[" * 100_000},
        "not JSON: half of a surrogate": {"e": json.dumps({**encoder, "\ud800": 400})},
        "encoder.json: not GPT-2's format, an": {"e": json.dumps({**encoder, "A": [1]})},
        "encoder.json: not GPT-2's format, an o": {"e": json.dumps({**encoder, "A": 1.0})},
        "token '日本' does not consist of GPT-2's symbols": {
            "e": json.dumps({**encoder, "日本": 400})
        },
        "vocab.bpe: 72 merges, but 72 more tokens .* come from none": {
            "m": "\n".join(merges.split("\n")[:73]) + "\n"
        },
        "vocab.bpe: 143 merges, but 1 more tokens": {"m": merges.rstrip("\n")},
        "vocab.bpe: 143 merges, but 1 more tokens .*first line": {
            "m": merges.replace("#version: 0.2\n", "")
        },
        "line 146: 'x' is not a merge": {"m": merges + "x\n"},
        "line 2: .* is not a merge": {"m": f"#version: 0.2\n{last} qqqq\n"},
    }
    for message, broken in cases.items():
        for key, name in (("e", "encoder.json"), ("m", "vocab.bpe")):
            text = {**good, **broken}[key]
            (tmp_path / name).unlink(missing_ok=True)
            if text is not None:
                (tmp_path / name).write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            ByteLevelBPE.from_files(tmp_path / "encoder.json", tmp_path / "vocab.bpe")


def test_special_tokens_need_no_merge(tmp_path, bpe_folder):
    encoder = json.loads((bpe_folder / "encoder.json").read_text())
    encoder.update({"<|endoftext|>": 400, "[PAD]": 401})
    (tmp_path / "encoder.json").write_text(json.dumps(encoder), encoding="utf-8")
    assert len(ByteLevelBPE.from_files(tmp_path / "encoder.json", bpe_folder / "vocab.bpe")) == 402


def test_a_fifo_is_refused(tmp_path, bpe_folder):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UserError, match="--gpt2-vocab-bpe .*fifo: a FIFO"):
        ByteLevelBPE.from_files(bpe_folder / "encoder.json", tmp_path / "fifo")
    with pytest.raises(UserError, match="--gpt2-encoder-json .*fifo: a FIFO"):
        ByteLevelBPE.from_files(tmp_path / "fifo", bpe_folder / "vocab.bpe")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"0 1\n1 \xe9\n", r"not UTF-8 at byte 6 \(0xe9\)"),
        (b"0 1\n1 \xc2\xb2\n", "line 2: .* is not '<symbol> <count>'"),
        (b"0 1\n\xc2\xb2 1\n", "line 2: .* is not a BPE id"),
        (b"0 1\n00 1\n", "line 2: '00' is not a BPE id"),
        (b"0 1\n1 " + b"9" * 5000, "line 2: "),
        (b"9" * 5000 + b" 1", "is not a BPE id"),
        (b"0 1\n\n", "line 2: '' is not"),
        (b"", "empty"),
        (b"0 1\n0 1\n", "occurs twice"),
    ],
)
def test_a_dictionary_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "dict.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        dictionary.read(tmp_path / "dict.txt", 400)
