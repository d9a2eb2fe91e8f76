"""The layout of the released models, from their names to perplexities."""

import re
import shlex
from pathlib import Path

import branch_files
import pytest
from branch_checkpoints import SMALL, USER_DIR, make_data_bin, perplexities, run
from fairseq.data import Dictionary
from training import error_in, prepare_text

from fairseq_moe_ext import cli
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder laid out as en_moe_lm_15b, of small width."""
    folder = tmp_path_factory.mktemp("released")
    settings = {**branch_files.RELEASED_15B, "decoder_embed_dim": 24, "decoder_ffn_embed_dim": 32}
    branch_files.write(str(folder), settings, 50264, 64, branch_files.random_tensors())
    return folder


def gpt2_dictionary(lines, padding=0):
    dictionary = Dictionary()
    for i in range(lines):
        dictionary.add_symbol(str(i), n=1)
    for i in range(padding):
        dictionary.add_symbol(f"madeupword{1000 + i}", n=0)
    return dictionary


@pytest.mark.parametrize("world", [1, 2])
def test_the_released_layout_goes_all_the_way(released, tmp_path, world):
    data = make_data_bin(tmp_path, gpt2_dictionary(50260))
    assert len((tmp_path / "dict.txt").read_text().splitlines()) == 50260
    results = [
        perplexities(
            world,
            data,
            *("--path", released / "model.pt", "--batch-size", "1", "--tokens-per-sample", "32"),
            *("--sample-break-mode", "eos"),
            "--model-overrides",
            "{'world_size': 4, 'moe_eval_capacity_token_fraction': 1.0, "
            f"'moe_experts_on_disk': {on_disk}}}",
        )
        for on_disk in (False, True)
    ]
    assert results[0] == results[1] and 1e3 < results[0][0] < 1e6


def test_a_dictionary_of_another_size_is_told_with_its_remedy(
    released, tmp_path, capsys, monkeypatch
):
    data = make_data_bin(tmp_path, gpt2_dictionary(50257))
    line = f"{data} --path {released}/model.pt --user-dir {USER_DIR} --gen-subset valid --cpu"
    status, err = run(capsys, "eval_lm", line)
    assert status == 1 and re.search("50264.*50261.*madeupword", error_in(err))


def test_a_padded_dictionary_fits_a_padded_vocabulary(tmp_path):
    settings = {**SMALL, "moe_freq": 4, "memory_efficient_fp16": True}
    branch_files.write(str(tmp_path), settings, 51200, 2, branch_files.random_tensors())
    (tmp_path / "data").mkdir()
    data = make_data_bin(tmp_path / "data", gpt2_dictionary(50260, 51200 - 50264))
    lm = MoETransformerLanguageModel.from_pretrained(str(tmp_path), "model.pt", data)
    assert len(lm.src_dict) == 51200


def test_the_other_commands_of_the_page(tmp_path, capsys, monkeypatch):
    page = Path(__file__).parents[2] / "docs" / "released_models.md"
    part = page.read_text(encoding="utf-8").split("\n## Other commands\n")[1].split("```")[1]
    lines = part.replace("\\\n", " ").splitlines()[1:]
    prepare_text(tmp_path, "Berlin is a city. It is on the Spree.\n\nThe cat is not.\n" * 20)
    (tmp_path / "data").rename(tmp_path / "gpt2")
    (tmp_path / "mine.txt").write_text("Berlin is a city on the Spree.\n" * 4)
    (tmp_path / "tasks" / "sst2").mkdir(parents=True)
    for split in ("train", "dev"):
        rows = "sentence\tlabel\nthe city\t1\na cat\t0\n"
        (tmp_path / "tasks" / "sst2" / f"{split}.tsv").write_text(rows)
    (tmp_path / "en_moe_lm_15b").mkdir()
    size = 4 + len((tmp_path / "gpt2" / "dict.txt").read_text().splitlines())
    name = str(tmp_path / "en_moe_lm_15b")
    branch_files.write(name, SMALL, size, 2, branch_files.random_tensors())
    monkeypatch.chdir(tmp_path)
    assert len(lines) == 5
    for line in lines:
        assert cli.main(shlex.split(line)[1:]) == 0, line
        assert capsys.readouterr().out, line
    assert (tmp_path / "experts.html").is_file()
