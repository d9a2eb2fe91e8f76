"""Trouble on one process, or a full disk, ends all processes in one line and loses nothing."""

import os
import shutil
import subprocess

import pytest
import torch
from processes import run_processes
from training import (
    EVAL,
    SAVED,
    TRAIN,
    UPDATES,
    copy_of,
    error_of,
    expert_files,
    perplexity,
    referred_files,
    train,
    train_on,
)

from fairseq_moe_ext.checkpoint import collective, folder_lock, loading, saving
from fairseq_moe_ext.checkpoint.format import MANIFEST


def train_with(rank, patch, line):
    """Training in which rank 1, or another, is not as it should be."""
    with pytest.MonkeyPatch.context() as context:
        patch(rank, context)
        train(rank, 2, line)


def other_code(rank, context):
    context.setattr(collective, "code_version", lambda: f"version {rank}")


def other_files(rank, context):
    stock = os.path.isfile
    context.setattr(os.path, "isfile", lambda path: rank == 1 and "last" in path or stock(path))


def full_disk_of_rank_1(rank, context):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    if rank == 1:
        context.setattr(os, "fsync", fsync)


def failing_copy(rank, context):
    def copyfile(*args):
        raise OSError(28, "No space left on device")

    context.setattr(shutil, "copyfile", copyfile)


def unexpected_error(rank, context):
    context.setattr(saving, "code_version", lambda: 1 / 0)


@pytest.mark.parametrize(
    "patch, words",
    [
        (other_code, "process 1 runs version 1, process 0 version 0"),
        (other_files, "process 1 sees it, process 0 does not"),
        (full_disk_of_rank_1, "bytes) cannot be written (No space left on device)"),
        (failing_copy, "No space left on device"),
    ],
)
def test_trouble_on_one_rank_ends_all_with_one_line(data, tmp_path, patch, words):
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-interval-updates 1 --save-dir {tmp_path}"
    for message in run_processes(2, error_of, train_with, patch, line):
        assert words in message and "\n" not in message
    assert not list(tmp_path.rglob("*.tmp"))
    assert expert_files(tmp_path) == referred_files(tmp_path)


def train_in(rank, folders, line):
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folders[rank])
        context.setattr(folder_lock, "_PATIENCE", 0)
        train(rank, 2, line)


def test_a_save_dir_of_each_machine_s_own_is_refused_at_the_first_start(data, tmp_path):
    """Before: each machine kept its experts, and nothing said so until the run resumed."""
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        (folder / "runs").mkdir(parents=True)
    (folders[1] / "runs/lock").write_text('{"pid"')  # of another run, which was killed
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir runs"
    for message in run_processes(2, error_of, train_in, folders, line):
        assert message.startswith("--save-dir runs: process 1 on ") and "\n" not in message
        assert message.endswith("use a folder on a file system that all machines share")
    assert not list(tmp_path.rglob("*.pt"))
    assert run_processes(2, error_of, train_in, folders, f"{line} --no-save") == ["no error"] * 2


def of_two_saves(rank, function, line, flag, paths):
    return function(rank, 2, f"{line} {flag} {paths[rank]}")


@pytest.mark.parametrize(
    "world", [pytest.param(1, marks=pytest.mark.slow), 2], ids=["one file", "files of experts"]
)
def test_processes_that_read_two_saves_end_in_one_line(data, runs, tmp_path, world):
    folder, _ = runs(world, 4)
    paths = folder / f"checkpoint_1_{SAVED}.pt", folder / "checkpoint_last.pt"
    tuned = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {tmp_path}"
    for case in ((perplexity, f"{data} {EVAL}", "--path"), (train, tuned, "--finetune-from-model")):
        messages = run_processes(2, error_of, of_two_saves, *case, paths)
        assert all("changed while it was read: repeat the command" in m for m in messages)
        same = run_processes(2, of_two_saves, *case, paths[:1] * 2)
        assert same[0] == same[1]


def test_a_save_that_replaces_what_is_read_is_named(data, runs, tmp_path, monkeypatch):
    path, files = copy_of(runs, tmp_path)
    stock = loading.open_pieces

    def after_the_next_save(*args):
        state = torch.load(path, weights_only=True)
        torch.save({**state, MANIFEST: {**state[MANIFEST], "save": "next"}}, tmp_path / "next.pt")
        os.replace(tmp_path / "next.pt", path)
        files[1].unlink()
        return stock(*args)

    monkeypatch.setattr(loading, "open_pieces", after_the_next_save)
    words = error_of(0, perplexity, 1, f"{data} {EVAL} --path {path}")
    assert words.startswith(f"{path}: changed while it was read") and "\n" not in words


def test_dense_models_want_the_same_code_too(data, tmp_path):
    line = f"{data} {TRAIN} --arch dense_lm_tiny --moe-freq 0 --save-dir {tmp_path}"
    for message in run_processes(2, error_of, train_with, other_code, line):
        assert "process 1 runs version 1, process 0 version 0" in message


def any_error_of(rank, *args):
    try:
        train_with(rank, *args)
    except Exception as error:
        return type(error).__name__, str(error)


def test_an_unexpected_error_on_rank_0_leaves_nobody_waiting(data, tmp_path):
    line = f"{data} {TRAIN} --moe-expert-count 4 --max-update 2 --save-dir {tmp_path}"
    outcomes = run_processes(2, any_error_of, unexpected_error, line)
    assert outcomes[0] == ("ZeroDivisionError", "division by zero")
    assert outcomes[1] == ("UserError", "division by zero")
    assert expert_files(tmp_path) == set()


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 400 KiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("world", [1, 2])
def test_full_disk_leaves_the_last_checkpoint(data, small_disk, world):
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {small_disk} --save-interval-updates 1"
    if world == 1:
        messages = [error_of(0, train, 1, line)]
    else:
        messages = run_processes(2, error_of, train, 2, line)
    for message in messages:
        assert "cannot be written (No space left on device); free some" in message
        assert "\n" not in message and str(small_disk) in message
    assert not list(small_disk.rglob("*.tmp"))
    updates = len(list(small_disk.glob("checkpoint_1_*.pt")))
    assert updates >= 2
    # The last checkpoint is whole, and training goes on from it.
    resumed = train_on(2, f"{line} --no-save")
    assert UPDATES - updates <= len(resumed) <= UPDATES - updates + 1
