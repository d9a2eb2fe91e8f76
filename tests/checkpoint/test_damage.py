"""Damaged files, and what is no checkpoint, are told in one line."""

import os

import pytest
import torch
from pickles import RunsCode
from processes import run_processes
from training import EVAL, TRAIN, copy_of, error_of, fit_manifest, perplexity, train

from fairseq_moe_ext.checkpoint.intact import check_records


def rot(files):
    content = bytearray(files[1].read_bytes())
    content[len(content) // 2] ^= 1
    files[1].write_bytes(content)
    return f"{files[1]}: not the bytes that {files[1].parent.parent}"


def remove(files):
    files[1].unlink()
    return f"{files[1]}: missing; it holds experts 2 to 3"


def truncate(files):
    size = files[1].stat().st_size
    os.truncate(files[1], size - 100)
    return f"{files[1]}: {size - 100:,} bytes, expected {size:,}"


def damage(files):
    files[1].write_bytes(b"x" * files[1].stat().st_size)
    return f"{files[1]}: not a checkpoint, or damaged"


def poison(files):
    """By code in a pickle; a size and digest that fit, as its writer would see to."""
    content = torch.load(files[1], weights_only=True)
    torch.save({**content, "more": RunsCode(os.system, "true")}, files[1])
    fit_manifest(files[1].parent.parent / "checkpoint_last.pt", files)
    return f"{files[1]}: rejected, because loading it would run"


def mix(files):
    files[1].write_bytes(files[0].read_bytes())
    return "the files come from two runs"


@pytest.mark.parametrize("harm", [remove, truncate, damage, rot, mix, poison])
def test_damaged_expert_files_are_told_in_one_line(data, runs, tmp_path, harm):
    path, files = copy_of(runs, tmp_path)
    words = harm(files)
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {path.parent} --no-save"
    messages = [error_of(0, train, 1, line), *run_processes(2, error_of, train, 2, line)]
    messages.append(error_of(0, perplexity, 1, f"{data} {EVAL} --path {path}"))
    for message in messages:
        assert words in message and "\n" not in message


def test_whole_records_are_never_called_damaged(tmp_path):
    """Python 3.12's zipfile misread some of them when threads shared one."""
    torch.save([torch.rand(100) for _ in range(500)], tmp_path / "x.pt")
    for _ in range(10):
        check_records(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("what", ["a tensor", "no model", "experts", "a folder"])
def test_what_is_no_checkpoint_is_told_in_one_line(data, runs, tmp_path, what):
    path, files = copy_of(runs, tmp_path)
    words = "contains no model"
    if what == "a tensor":
        torch.save(torch.zeros(3), path)
    elif what == "no model":
        torch.save({"weights": 1}, path)
    elif what == "experts":
        path, words = files[0], "contains only experts"
    else:
        path, words = path.parent, "is a folder"
    line = f"{data} {TRAIN} --moe-expert-count 4 --restore-file {path} --no-save"
    messages = [error_of(0, train, 1, line), *run_processes(2, error_of, train, 2, line)]
    messages.append(error_of(0, perplexity, 1, f"{data} {EVAL} --path {path}"))
    for message in messages:
        where = message.removeprefix("--restore-file ")
        assert where.startswith(f"{path}: ") and words in message and "\n" not in message


@pytest.mark.parametrize(
    "flag", ["--finetune-from-model", "--restore-file", "--continue-once", "--save-dir"]
)
def test_training_names_the_flag_for_another_checkpoint(data, tmp_path, flag):
    """Of a damaged checkpoint_last.pt in --save-dir the one that names what to go on from."""
    path = tmp_path / "checkpoint_last.pt"
    path.write_text("hello world")
    value = tmp_path if flag == "--save-dir" else path
    line = f"{data} {TRAIN} --moe-expert-count 4 --no-save {flag} {value}"
    message = error_of(0, train, 1, line)
    remedy = flag if flag != "--save-dir" else "--restore-file"
    assert message.startswith(f"{path}: ")
    assert message.endswith(f"; copy it again, or name another with {remedy}")
