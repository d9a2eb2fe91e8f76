"""Stock fairseq's data-bins and dictionaries on today's numpy, and damaged ones."""

import argparse
import pickle
import struct
from pathlib import Path

import numpy
import pytest
import torch
from fairseq import utils
from fairseq.data import Dictionary, TokenBlockDataset, data_utils, indexed_dataset
from stock_commands import python

import fairseq_moe_ext
from fairseq_moe_ext.errors import UserError


def test_numpy_aliases_reach_the_lines_that_use_them():
    blocks = TokenBlockDataset(
        [torch.tensor([4, 5, 2]), torch.tensor([6, 2])],
        [3, 2],
        None,
        pad=1,
        eos=2,
        break_mode="eos",
    )
    assert [block.tolist() for block in blocks] == [[4, 5, 2], [6, 2]]
    mask = data_utils.compute_mask_indices((1, 40), None, 0.5, 4, "uniform", 2, no_overlap=True)
    assert mask.any()
    from fairseq.modules import dynamic_crf_layer

    assert dynamic_crf_layer.np.float("inf") == float("inf")


def test_numpy_itself_stays_as_it_is():
    code = "import numpy; before = set(dir(numpy)); import fairseq; print(set(dir(numpy)) - before)"
    added = python(code).stdout.strip().splitlines()[-1]
    assert "'int'" not in added and "'compat'" not in added


def test_offsets_beyond_2_gib_are_right(tmp_path):
    builder = indexed_dataset.MMapIndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=numpy.uint16)
    builder._sizes = list(numpy.full(5, 2**30, dtype=numpy.int32))  # as merge_file_ collects them
    builder.finalize(str(tmp_path / "x.idx"))
    index = indexed_dataset.MMapIndexedDataset.Index(str(tmp_path / "x.idx"))
    assert index._pointers.tolist() == [i * 2**31 for i in range(5)]


def test_a_whole_data_bin_loads_and_pickles(work):
    dataset = data_utils.load_indexed_dataset(str(work / "bin" / "train"))
    assert len(dataset) == 120
    again = pickle.loads(pickle.dumps(dataset))  # as workers of a data loader get it
    assert again[7].tolist() == dataset[7].tolist()
    (work / "bin" / "train.idx").stat()


def test_the_header_of_an_index_is_as_check_data_bin_reads_it(work):
    head = (work / "bin" / "train.idx").read_bytes()[:26]
    assert struct.unpack("<9sQBQ", head) == (b"MMIDIDX\x00\x00", 1, 8, 120)


def test_user_dir_of_an_imported_package_is_accepted():
    package = Path(fairseq_moe_ext.__file__).parent
    utils.import_user_module(argparse.Namespace(user_dir=str(package)))


@pytest.mark.parametrize(
    "lines, words",
    [
        ("5 1\n6 1\n5 1\n", "dict.txt: '5' occurs twice; use the dict.txt that the model"),
        ("5 1\nsix\n", "dict.txt: Incorrect dictionary format, expected"),
    ],
)
def test_a_dictionary_that_is_none_is_named(tmp_path, lines, words):
    (tmp_path / "dict.txt").write_text(lines)
    with pytest.raises(UserError) as error:
        Dictionary.load(str(tmp_path / "dict.txt"))
    assert f"{tmp_path}/{words}" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError):
        Dictionary.load(str(tmp_path / "none.txt"))
