"""Data-bins and dictionaries: byte for byte what fairseq's own classes write."""

import numpy as np
import pytest
import torch
from fairseq.data import Dictionary, indexed_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.prepare import binarize, dictionary
from fairseq_moe_ext.prepare.binarize import SplitWriter, dtype_of
from fairseq_moe_ext.prepare.encode import EncodedSplit

LINES = st.lists(st.lists(st.integers(0, 49), max_size=6), min_size=1, max_size=12)


def encoded(lines, newline):
    ids = [i for line in lines for i in [*line, newline]]
    return EncodedSplit(
        np.array(ids, np.uint32), np.array([len(line) + 1 for line in lines], np.int32), 1, len(ids)
    )


@pytest.mark.parametrize("vocabulary", [54, 65499, 65500, 70000])
@pytest.mark.parametrize("block", [1, 3, 1 << 22])
@settings(max_examples=25, deadline=None)
@given(parts=st.lists(LINES, min_size=1, max_size=4))
def test_the_files_are_those_of_fairseqs_builder(tmp_path_factory, vocabulary, block, parts):
    folder = tmp_path_factory.mktemp("bin")
    table = np.array([vocabulary - 1 - i for i in range(50)] + [2])
    writer = SplitWriter(folder / "ours", newline=50)
    builder = indexed_dataset.make_builder(str(folder / "stock.bin"), "mmap", vocab_size=vocabulary)
    for number, lines in enumerate(parts):
        writer.add(encoded(lines, newline=50))
        for line in [[]] * (number > 0) + lines:
            builder.add_item(torch.tensor([vocabulary - 1 - i for i in line] + [2]))
    previous, binarize.BLOCK = binarize.BLOCK, block
    try:
        writer.finish(table, dtype_of(vocabulary))
    finally:
        binarize.BLOCK = previous
    builder.finalize(str(folder / "stock.idx"))
    for suffix in (".bin", ".idx"):
        ours, stock = (folder / f"{name}{suffix}" for name in ("ours", "stock"))
        assert ours.read_bytes() == stock.read_bytes()
    assert sorted(path.suffix for path in folder.iterdir()) == [".bin", ".bin", ".idx", ".idx"]
    assert writer.documents == len(parts)
    assert writer.lines == sum(map(len, parts)) + len(parts) - 1


@pytest.mark.parametrize("vocabulary", [1, 65499, 65500, 1 << 20])
def test_the_type_of_a_token_is_fairseqs(vocabulary):
    assert dtype_of(vocabulary) == np.dtype(indexed_dataset.best_fitting_int_dtype(vocabulary))


def test_the_dictionary_is_sorted_filled_up_and_read_by_fairseq(tmp_path):
    counts = np.array([5, 0, 9, 0, 0, 5, 0, 0, 0, 0, 0, 9])
    lines = dictionary.build(counts, size=20)
    dictionary.write(lines, tmp_path / "dict.txt")
    stock = Dictionary.load(str(tmp_path / "dict.txt"))
    assert len(stock) == 20
    assert stock.symbols[4:10] == ["11", "2", "0", "5", "1", "10"]
    assert stock.symbols[-4:] == [f"madeupword000{i}" for i in range(4)]
    assert stock.count[4:8] == [9, 9, 5, 5]
    assert dictionary.read(tmp_path / "dict.txt", bpe_size=12) == lines
    table = dictionary.lookup(lines, bpe_size=12)
    assert table.tolist() == [stock.index(str(i)) for i in range(12)] + [stock.eos()]


def test_the_dictionary_is_filled_up_to_a_multiple_of_eight_or_to_a_size():
    assert len(dictionary.build(np.zeros(50257), None)) == 50260, "50,264 with the special ones"
    assert len(dictionary.build(np.zeros(12), None)) == 12
    assert len(dictionary.build(np.zeros(50257), 51200)) == 51196
    with pytest.raises(UserError, match="--dict-size 15: .* at least 16"):
        dictionary.build(np.zeros(12), 15)


@pytest.mark.parametrize(
    "text, message",
    [
        ("12 1\n400 5\n", "line 2: BPE id 400, but the tokenizer has only 400 tokens"),
        ("the 3\n", "line 1: 'the' is not a BPE id"),
        ("1 1\n2\n", "line 2: '2' is not '<symbol> <count>'"),
        ("1 1\n1 2\n", "a symbol occurs twice"),
        ("", "empty"),
    ],
)
def test_a_dictionary_that_does_not_fit_is_refused(tmp_path, text, message):
    (tmp_path / "dict.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"--dict .*dict\.txt.*" + message):
        dictionary.read(tmp_path / "dict.txt", bpe_size=400)


def test_ids_without_an_entry_are_unknown():
    table = dictionary.lookup([("1", 5), ("madeupword0000", 0)], bpe_size=3)
    assert table.tolist() == [3, 4, 3, 2]
