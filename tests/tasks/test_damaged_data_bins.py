"""Every reader of data-bins refuses what is not whole, in the same words."""

import functools
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from fairseq.data import Dictionary, data_utils
from fairseq.data.indexed_dataset import MMapIndexedDataset
from mixture_data import make_task

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.evaluation.texts import find_sets, read_texts

evaluated = functools.partial(make_task, path="checkpoint.pt")
HEADER = "<9sQBQ"
MAGIC = b"MMIDIDX\x00\x00"


def write(
    folder, sentences, dtype=np.uint16, code=8, version=1, sizes=None, offsets=None, more=b""
):
    """A data-bin by the format alone: header, sizes, offsets; the tokens."""
    sizes = [len(sentence) for sentence in sentences] if sizes is None else sizes
    lengths = [len(sentence) * np.dtype(dtype).itemsize for sentence in sentences]
    starts = np.cumsum([0, *lengths])[:-1] if offsets is None else offsets
    (folder / "test.idx").write_bytes(
        struct.pack(HEADER, MAGIC, version, code, len(sentences))
        + more
        + np.array(sizes, "<i4").tobytes()
        + np.array(starts, "<i8").tobytes()
    )
    flat = [token for sentence in sentences for token in sentence]
    (folder / "test.bin").write_bytes(np.array(flat, dtype).tobytes())


GOOD = [[5, 6, 7, 2], [2], [8, 2]]


def cut(folder, name, count):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:count] if count < 0 else content + bytes(count))


def put(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def resize(name, count):
    return lambda folder: cut(folder, name, count)


def rewrite(sentences=GOOD, **options):
    return lambda folder: write(folder, sentences, **options)


def as_megatron(folder):
    """With the number of documents, and where they begin."""
    write(folder, GOOD, more=struct.pack("<Q", 2))
    cut(folder, "test.idx", 16)


TEXT = b"once upon a time there was no index\n"
NO_INDEX = r"test\.idx: not an index of fairseq's mmap format"
NO_ORDER = r"test\.idx: its sentences are not contiguous"
OF_TYPE = r"test\.idx: unknown version 1 or token type "

# how a good data-bin is spoiled, and what is said of it
KINDS = {
    "cut .bin": (resize("test.bin", -4), r"test\.bin: 10 bytes, expected 14 by its \.idx"),
    "long .bin": (resize("test.bin", 2), r"test\.bin: 16 bytes, expected 14 by its \.idx"),
    "empty .bin": (put("test.bin", b""), r"test\.bin: 0 bytes, expected 14"),
    "nothing in both": (rewrite([]), r"test\.bin: holds no tokens"),
    "cut .idx": (resize("test.idx", -4), r"test\.idx: 58 bytes, expected 62 \(3 sentences\)"),
    "empty .idx": (put("test.idx", b""), r"test\.idx: .*0 bytes"),
    "magic cut short": (put("test.idx", MAGIC[:7]), r"test\.idx: .*7 bytes"),
    "header cut short": (resize("test.idx", -42), r"test\.idx: .*20 bytes"),
    "torch's .idx": (put("test.idx", b"TNTIDX\x00\x00" + bytes(40)), NO_INDEX),
    "Megatron's .idx": (as_megatron, r"test\.idx: 86 bytes, expected 62 .*Megatron"),
    "text": (put("test.idx", TEXT), NO_INDEX),
    "negative size": (rewrite(sizes=[4, -1, 4]), NO_ORDER),
    "offsets that wrap": (rewrite(offsets=[0, -8, 10]), NO_ORDER),
    "sizes that overlap": (rewrite(sizes=[5, 1, 2]), NO_ORDER),
    "version 2": (rewrite(version=2), r"test\.idx: unknown version 2"),
    "unknown type": (rewrite(code=77), OF_TYPE + "77"),
    "no whole numbers": (rewrite(dtype=np.float64, code=6), OF_TYPE + "6"),
    "beyond the dictionary": (
        rewrite([*GOOD, [60000, 2]]),
        r"test\.bin: token id 60000 is outside the dictionary \(12 entries\)",
    ),
    "negative token": (
        rewrite([*GOOD, [-3, 2]], dtype=np.int32, code=4),
        r"test\.bin: token id -3 is outside the dictionary \(12 entries\)",
    ),
}

OTHER_FORMATS = "torch's .idx", "text", "empty .idx", "magic cut short"  # stock's task takes them


def spoil(folder, how):
    write(folder, GOOD)
    change, words = KINDS[how]
    change(folder)
    return words


@pytest.fixture
def folder(tmp_path):
    """Of one corpus."""
    for where in (tmp_path, tmp_path / "c"):
        where.mkdir(exist_ok=True)
        (where / "dict.txt").write_text("".join(f"w{i} 1\n" for i in range(8)))
    return tmp_path / "c"


def readers(folder):
    dictionary = Dictionary.load(str(folder / "dict.txt"))
    data = folder.parent
    return {
        "evaluate": lambda: read_texts(find_sets([data], "test"), "test", 4, dictionary),
        "stock's task": lambda: evaluated(folder, task="language_modeling").load_dataset("test"),
        "our task": lambda: evaluated(data).load_dataset("test/c"),
        "load_indexed_dataset": lambda: data_utils.load_indexed_dataset(
            str(folder / "test"), dictionary, "mmap"
        ),
    }


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")  # in __del__
def test_every_reader_refuses_it(folder, how):
    message = spoil(folder, how)
    for name, read in readers(folder).items():
        if name == "stock's task" and how in OTHER_FORMATS:
            continue
        with pytest.raises(UserError, match=message) as error:
            read()
        assert "\n" not in str(error.value), name


@pytest.mark.parametrize("dtype, code", [(np.uint16, 8), (np.int32, 4), (np.int64, 5)])
def test_what_is_whole_is_read_whole(folder, dtype, code):
    write(folder, [*GOOD, [], [11, 2]], dtype=dtype, code=code)
    read = readers(folder)
    (text,) = read["evaluate"]()
    assert text.tokens.tolist() == [5, 6, 7, 2, 2, 8, 2, 11, 2]
    stored = read["load_indexed_dataset"]()
    assert [sentence.tolist() for sentence in stored] == [*GOOD, [], [11, 2]]
    read["our task"]()
    read["stock's task"]()


def test_an_index_of_many_sentences_is_checked_to_its_end(folder):
    sizes = np.full(1_200_000, 2)
    offsets = 4 * np.arange(len(sizes))
    write(folder, [[5, 2]] * len(sizes), offsets=offsets)
    assert len(MMapIndexedDataset(str(folder / "test"))) == len(sizes)
    offsets[-2] += 2
    write(folder, [[5, 2]] * len(sizes), offsets=offsets)
    with pytest.raises(UserError, match="are not contiguous"):
        MMapIndexedDataset(str(folder / "test"))


def test_a_damaged_counts_file_is_named(folder):
    write(folder, GOOD)
    for content in ("{", "[]", '{"corpora": 3}'):
        (folder.parent / "counts.json").write_text(content)
        with pytest.raises(UserError, match=r"counts\.json: not a file that `fairseq-moe prepare`"):
            readers(folder)["evaluate"]()
    (folder.parent / "counts.json").write_text('{"corpora": {}}')
    (text,) = readers(folder)["evaluate"]()
    assert text.bytes is None


def test_a_half_data_bin(folder):
    for missing in ("test.idx", "test.bin"):
        write(folder, GOOD)
        Path(folder / missing).unlink()
        for read in readers(folder).values():
            with pytest.raises(UserError, match=rf"{missing}: missing"):
                read()
        shutil.rmtree(folder / missing, ignore_errors=True)
