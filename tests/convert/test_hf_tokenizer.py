"""The tokenizer that `fairseq-moe convert --to hf` writes, against ours."""

import re
import shutil

import pytest
import torch
from converting import convert, mistake
from hf_models import TEXT, tokenizer_of

from fairseq_moe_ext.convert.hf_tokenizer import tokenizer_files
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.questions.vocabulary import Vocabulary

pytest.importorskip("transformers", reason="pip install transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "the cat", "", "\n", " \n\n  a\n", "the\ncat  sat \t\n on", "12 3rd  it's we'll \r\n x",
    "é 木 \U0001f600", "<s> <pad> </s> <unk> <|endoftext|> [MASK]", "Ċ Ġ ĉ",
    "a\u00a0b\u3000c \u200b\x1c\x85", "\u0e01\u0302 ² ½ Ⅷ ᾳ", "don't'S 'T", "a" * 300, "   ",
]  # fmt: skip


def test_the_tokenizer_gives_our_ids_for_any_text(converted, hf_data):
    """Also as the library of tokenizers reads the file, and for all code points."""
    vocabulary = Vocabulary(hf_data)
    generator = torch.Generator().manual_seed(3)
    every = [chr(i) for i in range(0x30000) if not 0xD800 <= i < 0xE000]
    order = torch.randperm(len(every), generator=generator).tolist()
    mixed = "".join(every[i] + " "[: n % 2] for n, i in enumerate(order))
    for kind in ("xglm", "top2"):
        _, folder = converted(kind)
        tokenizer = tokenizer_of(folder)
        bare = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        for text in [*TEXTS, TEXT, mixed]:
            expected = vocabulary.encode(text)
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected, text[:50]
            assert tokenizer(text)["input_ids"] == [2, *expected]
            assert bare.encode(text, add_special_tokens=False).ids == expected
            assert tokenizer.decode(expected, skip_special_tokens=True) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (1, 0)
    assert tokenizer.convert_tokens_to_ids("\n") == 2


def test_a_dictionary_of_words(tmp_path):
    from fairseq.data import Dictionary

    words = Dictionary()
    for word in ("the", "cat", "sat"):
        words.add_symbol(word)
    words.save(str(tmp_path / "dict.txt"))
    found = tokenizer_files(tmp_path, len(words), 32)
    (tmp_path / "tokenizer.json").write_text(found["tokenizer.json"])
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("the cat\nsat  the", " a\tcat </s>", "\n"):
        lines = text.split("\n")
        tokens = [words.encode_line(line, add_if_not_exist=False).tolist() for line in lines]
        expected = [token for line in tokens for token in line][:-1]
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected


@pytest.mark.parametrize(
    "symbols, words",
    [
        (
            "262 1234 5 madeupword0000 madeupword0001",
            "seems to contain BPE ids, which need encoder.json",
        ),
        ("▁the ▁cat s", "contains subwords, such as '▁the'"),
        ("the c@@ at s@@ it", "contains subwords, such as 'c@@'"),
        ("Ġthe Ġcat s", "contains subwords"),
        ("the sit ##ting", "contains subwords"),
        ("the</w> sit ting</w>", "contains subwords"),
        ("the cat ## @@ ▁▁ 12 1999 " + " ".join(f"w{i}" for i in range(60)), ""),
    ],
)
@pytest.mark.parametrize("one_file", [False, True])
def test_a_dictionary_that_is_not_of_words_is_refused(tmp_path, symbols, words, one_file):
    path, symbols = tmp_path / "dict.txt", symbols.split()
    path.write_text("".join(f"{symbol} 1\n" for symbol in symbols))
    if one_file:
        (tmp_path / "encoder.json").write_text("{}")
    if not words:
        assert tokenizer_files(tmp_path, len(symbols) + 4, 32)
        return
    with pytest.raises(UserError, match=f"^{path}: .*{re.escape(words)}.*--no-tokenizer"):
        tokenizer_files(tmp_path, len(symbols) + 4, 32)


@pytest.mark.parametrize("change, file", [("dictionary", "dict.txt"), ("bpe", "vocab.bpe")])
def test_the_tokenizer_of_another_model_is_refused(
    converted, hf_data, tmp_path, capsys, change, file
):
    """Its ids mean other text, although it is as large as the model's."""
    other = tmp_path / "other"
    shutil.copytree(hf_data, other)
    first = 0 if change == "dictionary" else 1  # of vocab.bpe a heading
    lines = (other / file).read_text().splitlines()
    (other / file).write_text("\n".join([*lines[:first], *reversed(lines[first:])]) + "\n")
    path, folder = converted("xglm")
    for source, layout in ((path, ()), (folder, ("--from", "hf"))):
        line = (source, tmp_path / "x", *layout, "--to", "hf", "--data")
        words = mistake(capsys, *line, other)
        assert f"{other}/{file}: " in words and str(source) in words
        assert not (tmp_path / "x").exists()
    convert(*line, hf_data)


def test_the_tokenizer_comes_through_the_branch_s_layout(converted, tmp_path, capsys, caplog):
    path, folder = converted("top2")
    convert(path, tmp_path / "b" / "x.pt", "--to", "branch", "--weights-only")
    convert(tmp_path / "b" / "x.pt", tmp_path / "hf", "--to", "hf")
    name = "tokenizer.json"
    assert (tmp_path / "hf" / name).read_bytes() == (folder / name).read_bytes()
    convert(tmp_path / "b" / "x.pt", tmp_path / "o" / "x.pt")  # the optimizer state is no matter
    assert "updates are counted" not in caplog.text
    (tmp_path / "b" / "vocab.bpe").write_text("#version: 0.2\n")  # of another model
    line = (tmp_path / "b" / "x.pt", tmp_path / "other", "--to", "hf", "--data", tmp_path / "b")
    assert "b/vocab.bpe: does not belong to the tokenizer of" in mistake(capsys, *line)
