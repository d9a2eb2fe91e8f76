"""Mistakes in a command of fairseq end it with one line."""

import re

import pytest
import torch
from stock_commands import TRAIN, on_cpu_only

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.patches.messages import mistake_to_print


@on_cpu_only
@pytest.mark.parametrize(
    "options, words",
    [
        ("--distributed-world-size 2", "--distributed-world-size 2: .*torchrun"),
        (
            "--distributed-world-size 2 --distributed-init-method tcp://localhost:23456",
            "--distributed-world-size 2: .*torchrun",
        ),
        (
            "--distributed-world-size 2 --distributed-no-spawn "
            "--distributed-init-method tcp://localhost:23456",
            "--distributed-backend nccl: .*gloo",
        ),
    ],
)
def test_processes_that_cannot_start_are_an_error(command, options, words):
    status, err = command("train", f"bin {TRAIN} --max-update 1 --no-save {options}")
    assert status == 1
    assert re.search(f"^error: {words}", err, flags=re.M)
    assert "Traceback" not in err


def test_a_mistake_is_found_behind_other_exceptions():
    def chained(inner, explicit):
        try:
            try:
                raise inner
            except Exception as error:
                raise Exception("outer") from (error if explicit else None)
        except Exception as error:
            return error

    find = mistake_to_print
    assert find(UserError("a")) == "a"
    assert find(chained(UserError("a"), explicit=True)) == "a"
    assert find(chained(FileNotFoundError("a"), explicit=True)) is None  # somebody dealt with it
    assert find(FileNotFoundError(2, "No such file", "x.txt")) == "x.txt: no such file or folder"
    assert find(ValueError("a bug")) is None


def test_what_is_missing_is_named_with_what_is_there(tmp_path):
    find = mistake_to_print
    model, data = tmp_path / "best.pt", tmp_path / "train"
    no_model = OSError(f"Model file not found: {model}")
    no_data = FileNotFoundError(f"Dataset not found: train ({data})")
    assert find(no_model) == f"{model}: no such checkpoint; {tmp_path} has no *.pt"
    assert find(no_data) == f"{data}.idx: no such data-bin; {tmp_path} has no *.idx"
    for name in (*(f"checkpoint{i}.pt" for i in range(7)), "test.idx"):
        (tmp_path / name).touch()
    there = ", ".join(f"checkpoint{i}.pt" for i in range(5))
    assert find(no_model) == f"{model}: no such checkpoint; {tmp_path} has {there} and 2 more"
    assert find(no_data) == f"{data}.idx: no such data-bin; {tmp_path} has test.idx"


def fail(rank):
    raise UserError("--moe-expert-count 0: too few")


def test_a_mistake_in_a_spawned_process_is_found():
    with pytest.raises(Exception) as caught:  # noqa: B017  (its class has moved between versions)
        torch.multiprocessing.spawn(fail, nprocs=1)
    assert mistake_to_print(caught.value) == "--moe-expert-count 0: too few"


def test_a_missing_dataset_is_one_line(command):
    status, err = command("train", f"nowhere {TRAIN} --max-update 1 --no-save")
    assert status == 1
    assert [line for line in err.splitlines() if line.startswith("error:")] == [
        "error: nowhere/dict.txt: no such file; "
        "create a data folder with fairseq-preprocess or fairseq-moe prepare"
    ]
    assert "Traceback" not in err


def test_debugging_keeps_the_traceback(command, monkeypatch):
    monkeypatch.setenv("LOGLEVEL", "DEBUG")
    with pytest.raises(FileNotFoundError):
        command("train", f"nowhere {TRAIN} --max-update 1 --no-save")
