"""Mistakes end in one line, and nothing is written."""

import os
import re

import pytest
import torch
from converting import DENSE, MOE, convert, load, mistake, same
from training import expert_files

from fairseq_moe_ext.branch.files import BranchFiles, find
from fairseq_moe_ext.branch.optimizer import unfit
from fairseq_moe_ext.checkpoint import cleanup
from fairseq_moe_ext.convert import readers, targets
from fairseq_moe_ext.errors import UserError

MISTAKES = [
    (MOE, "x.pt --dtype int4", "--dtype int4: not known"),
    (MOE, "x.pt --expert-files 3", "3 does not divide the 4 experts.*use one of 1, 2, 4"),
    (MOE + " --moe-balance bias", "x.pt --to branch", "--moe-balance bias.*no bias"),
    (MOE, "x.pt --to branch --rank-files 8", "8 does not divide the 4 experts"),
    (MOE, "x --to xglm", "has features that XGLM lacks: 4 experts"),
    (MOE, "x.pt --upcycle --moe-expert-count 2", "has 4 experts already"),
    (MOE, "x.pt --rank-files 2", "--rank-files needs --to branch"),
    (MOE, "x.pt --moe-freq 2", "--moe-freq needs --upcycle"),
    (MOE, "x", "must end in .pt"),
    (MOE, "x-rank-1.pt", "x-rank-1.pt: would be read as a part of .*/x.pt, .*; choose a name"),
    (MOE, "x-rank-1-shard0.pt --expert-files 2", "a part of .*/x.pt"),
    (MOE, "x-rank-0.pt --to branch", "a part of .*/x.pt"),
    (MOE, "set-shared.pt", "a part of .*/set.pt"),
    (MOE, "x.pt --seed 2", "--seed needs --upcycle"),
    (DENSE, "x.pt --upcycle", "add --moe-expert-count"),
    (
        DENSE,
        "x.pt --upcycle --moe-expert-count 4 --moe-top-k 3 --moe-top1-expert",
        "--moe-top-k 3 with --moe-top1-expert: remove one",
    ),
    (
        DENSE,
        "x.pt --upcycle --moe-expert-count 4 --moe-freq 2 --moe-layers 0,1",
        "--moe-freq 2 with --moe-layers 0,1, which names all MoE layers: remove one",
    ),
    (DENSE, "x.pt --upcycle --moe-expert-count 1", "too few for top-2"),
    (DENSE, "x.pt --expert-files 2", "a dense model"),
    (DENSE, "x.pt --to branch", "--to branch: .* is a dense model, .*: remove --to branch, or add"),
    (DENSE + " --decoder-learned-pos", "x --to xglm", "--decoder-learned-pos"),
    (DENSE, "there.pt", "there.pt: exists"),
    (MOE, "set.pt --to branch", "set-rank-0.pt: exists"),
    (MOE + " --fp16", "x.pt --expert-files 2", "joins all parameters.*--weights-only"),
]


@pytest.mark.parametrize("flags, line, words", MISTAKES)
def test_mistakes_end_in_one_line_and_nothing_is_written(run, tmp_path, capsys, flags, line, words):
    source, _ = run(flags)
    (tmp_path / "there.pt").write_text("kept")
    (tmp_path / "set-rank-0.pt").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    dest, *rest = line.split()
    assert re.search(words, mistake(capsys, source, tmp_path / dest, *rest))
    assert sorted(tmp_path.rglob("*")) == before
    assert all(path.read_text() == "kept" for path in before)


@pytest.mark.parametrize(
    "flags, line, words",
    [
        (DENSE, "x.pt --upcycle --moe-expert-count -4", "--moe-expert-count -4: use 1 or more"),
        (DENSE, "x.pt --upcycle --moe-expert-count 1", "too few for top-2"),
        (DENSE, "x.pt --upcycle --moe-expert-count 4 --expert-files 3", "3 does not divide the 4"),
        (MOE, "x.pt --upcycle --moe-expert-count 4", "has 4 experts already"),
        (MOE + " --moe-balance bias", "x.pt --to branch", "--moe-balance bias.*no bias"),
        (
            DENSE,
            "x.pt --to branch --upcycle --moe-expert-count 4 --moe-top-k 3",
            "3 experts per token; the branch has only top-1",
        ),
        (MOE, "x.pt --to branch --rank-files 3", "--rank-files 3 does not divide the 4 experts"),
        (MOE, "x.pt --expert-files 3", "--expert-files 3 does not divide the 4 experts"),
        (MOE, "x --to xglm", "has features that XGLM lacks: 4 experts"),
        (MOE, "x --to hf --data {other}", "other/dict.txt: not the dictionary of .*.pt"),
        (
            MOE,
            "x --to hf --no-tokenizer --evaluation t.json",
            "--evaluation t.json: not a file that",
        ),
        (MOE, "x --to hf --no-tokenizer --evaluation no.json", "--evaluation no.json: cannot be"),
    ],
)
def test_flags_are_checked_before_all_bytes_are(
    run, tmp_path, capsys, monkeypatch, flags, line, words
):
    def open_checkpoint(path, weights_only):
        raise AssertionError("read")

    source, _ = run(flags)
    monkeypatch.setattr(readers, "open_checkpoint", open_checkpoint)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.json").write_text('{"path": "x.pt"}')
    (tmp_path / "other").mkdir()
    lines = (source.parent / "dict.txt").read_text().splitlines()
    (tmp_path / "other" / "dict.txt").write_text("\n".join(reversed(lines)) + "\n")
    before = sorted(tmp_path.rglob("*"))
    words_of_line = line.format(other=tmp_path / "other").split()
    assert re.search(words, mistake(capsys, source, *words_of_line))
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_replaced_by_a_file_is_named(run, tmp_path, capsys):
    """A folder, and a link: it would be replaced, and what it names would stay."""
    source, _ = run(MOE)
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "elsewhere.pt").write_text("kept")
    (tmp_path / "link.pt").symlink_to("elsewhere.pt")
    (tmp_path / "dangling.pt").symlink_to("nowhere.pt")
    for name, words in (
        ("folder.pt", "folder.pt: is a folder; name a file in it"),
        ("link.pt", f"link.pt: is a link to {tmp_path}/elsewhere.pt; name that file"),
        ("dangling.pt", f"dangling.pt: is a link to {tmp_path}/nowhere.pt; name that file"),
    ):
        for flags in ([], ["--overwrite"]):
            assert words in mistake(capsys, source, tmp_path / name, *flags)
    assert (tmp_path / "link.pt").is_symlink() and len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "elsewhere.pt").read_text() == "kept"


def test_a_missing_part_is_named(run, tmp_path, capsys):
    source, _ = run(MOE)
    convert(source, tmp_path / "x.pt", "--expert-files", 2)
    sorted((tmp_path / "experts").iterdir())[0].unlink()
    assert "missing; it holds experts" in mistake(capsys, tmp_path / "x.pt", tmp_path / "y.pt")
    assert "no such checkpoint" in mistake(capsys, tmp_path / "z.pt", tmp_path / "y.pt")
    assert not list(tmp_path.rglob(".*")) and not (tmp_path / "y.pt").exists()


def test_sources_that_are_none(run, tmp_path, capsys):
    source, _ = run(MOE)
    convert(source, tmp_path / "x.pt", "--expert-files", 2)
    part = sorted((tmp_path / "experts").iterdir())[0]
    text, folder = tmp_path / "text.pt", tmp_path / "hf"
    text.write_text("12 lines\n")
    cases = [
        (tmp_path, [], f"{tmp_path}: is a folder"),
        (part, [], f"{part}: contains only experts"),
        (text, [], f"{text}: not a checkpoint"),
        (folder, ["--from", "xglm"], f"{folder / 'config.json'}: cannot be read"),
    ]
    for path, flags, words in cases:
        assert words in mistake(capsys, path, tmp_path / "y.pt", *flags)
    assert not (tmp_path / "y.pt").exists()


def test_values_too_large_for_float16(run, tmp_path, capsys):
    source, _ = run(DENSE)
    state = load(source)
    state["model"]["decoder.layer_norm.weight"][0] = 1e5
    torch.save(state, tmp_path / "big.pt")
    error = mistake(capsys, tmp_path / "big.pt", tmp_path / "x.pt", "--dtype", "fp16")
    assert "decoder.layer_norm.weight has values up to 1e+05" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["big.pt"]


def test_overwriting(run, tmp_path):
    source, _ = run(MOE)
    path = tmp_path / "x.pt"
    convert(source, path, "--expert-files", 4)
    convert(source, path, "--expert-files", 2, "--overwrite")
    assert len(expert_files(tmp_path)) == 2  # those of the first are gone
    convert(source, tmp_path / "set.pt", "--to", "branch", "--rank-files", 4)
    convert(source, tmp_path / "set.pt", "--to", "branch", "--rank-files", 2, "--overwrite")
    assert not (tmp_path / "set-rank-2.pt").exists()
    assert find(str(tmp_path / "set.pt")).ranks.keys() == {0, 1}


@pytest.mark.parametrize(
    "other",
    [
        lambda source, folder: convert(source, folder / "b.pt", "--overwrite"),
        lambda source, folder: cleanup.remove_unused_files(str(folder)),  # as trainings do
    ],
)
@pytest.mark.parametrize("flags", [["--expert-files", 2], []])
def test_what_is_being_written_is_left_alone(run, tmp_path, monkeypatch, other, flags):
    source, _ = run(MOE)
    stock = targets.write_torch

    def write_torch(state, path, progress):
        stock(state, path, progress)
        monkeypatch.setattr(targets, "write_torch", stock)
        other(source, tmp_path)

    monkeypatch.setattr(targets, "write_torch", write_torch)
    killed = tmp_path / ".checkpoint_a.pt.converting"
    killed.mkdir()
    (killed / "checkpoint_a.pt").write_text("half")
    convert(source, tmp_path / "checkpoint_a.pt", *flags)
    convert(tmp_path / "checkpoint_a.pt", tmp_path / "back.pt")
    assert same(load(tmp_path / "back.pt"), load(source))
    assert not list(tmp_path.rglob(".*"))


def test_a_full_disk_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    source, _ = run(MOE)

    stock = os.fsync
    for name in (".x.pt.converting/", ".lock"):

        def fsync(descriptor, name=name):
            if name in os.readlink(f"/proc/self/fd/{descriptor}"):
                raise OSError(28, "No space left on device")
            stock(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        error = mistake(capsys, source, tmp_path / "x.pt", "--expert-files", 2)
        assert "cannot be written (No space left on device)" in error
        assert "free some disk space" in error or name == ".lock"
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_optimizer_state_of_the_branch_that_cannot_be_had_names_this_commands_flag(monkeypatch):
    files = BranchFiles("x.pt", "x-shared.pt", {}, {})

    def read(files, *args, **kwargs):
        raise unfit(files, "it is flat")

    monkeypatch.setattr(readers, "find", lambda path: files)
    monkeypatch.setattr(readers, "read", read)
    with pytest.raises(UserError) as error:
        readers.open_checkpoint("x.pt", weights_only=True)
    words = "x.pt: its optimizer state cannot be continued: it is flat; add --weights-only"
    assert str(error.value) == words
