"""Mistakes in a command of fairseq end it with one line."""

import re
import sys
import traceback

import pytest
import torch
from stock_commands import TRAIN, on_cpu_only

from fairseq_moe_ext.branch.files import BranchFiles
from fairseq_moe_ext.branch.optimizer import unfit
from fairseq_moe_ext.errors import NotFinite, UserError, not_finite
from fairseq_moe_ext.patches import commands
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


@pytest.mark.parametrize(
    "command, remedy",
    [
        ("fairseq-train", ": add --checkpoint-activations, or halve --batch-size (or"),
        ("fairseq-hydra-train", ": set model.checkpoint_activations=true, or halve dataset.batch_"),
        ("fairseq-eval-lm", "'moe_experts_on_disk': True"),
        ("fairseq-preprocess", ": lower --workers"),
    ],
)
def test_lack_of_memory_is_told_with_what_helps_the_command(command, remedy, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"/usr/bin/{command}", "data"])
    assert remedy in mistake_to_print(MemoryError())


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
    (tmp_path / "checkpoint_best.pt").touch()
    assert f"{tmp_path} has checkpoint_best.pt, checkpoint0.pt" in find(no_model)


def stop(cfg):
    raise not_finite(3)


def run_as_fairseq_does(rank, main, cfg):  # fairseq/distributed/utils.py:319@0.12.2
    main(cfg)


def spawn(cfg, main):
    torch.multiprocessing.spawn(run_as_fairseq_does, (main, cfg), nprocs=1)


class PluginsError(UserError):
    """A mistake that a user's own plugin finds."""


MISTAKES = {
    "ours": UserError("--moe-expert-count 0: too few"),
    "another class": NotFinite("the router yields NaN"),
    "the branch's": unfit(BranchFiles("x.pt", "x-shared.pt", {}, {}), "it is flat"),
    "a plugin's": PluginsError("--mine 0: use 1"),
    "behind another": RuntimeError("Cannot load model parameters"),
    "a file": FileNotFoundError(2, "No such file or directory", "x.pt"),
    "a folder": IsADirectoryError(21, "Is a directory", "x"),
    "memory": MemoryError(),
}


@pytest.fixture
def end(monkeypatch, capsys):
    """The status and stderr of a command whose main is given, with its processes started so."""
    monkeypatch.setattr(commands, "use_one_process_on_a_cpu", lambda cfg, given: None)
    monkeypatch.setattr(commands, "check_processes", lambda cfg: None)
    monkeypatch.setattr(commands, "_is_hydras", lambda main: False)

    def run(start, main):
        with pytest.raises(SystemExit) as stopped:
            commands.call_main(start, None, main)
        return stopped.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_spawned_process_is_the_line_it_is_in_one(end, name):
    def fail(cfg):
        raise MISTAKES[name] from (UserError("why") if name == "behind another" else None)

    def in_text(cfg, main):  # as torch/multiprocessing/spawn.py does
        try:
            main(cfg)
        except Exception:
            text = "\n\n-- Process 0 terminated with the following error:\n"
            text += traceback.format_exc()
        raise type("ProcessRaisedException", (Exception,), {})(text)

    status, line = end(lambda cfg, main: main(cfg), fail)
    assert status == 1 and line.startswith("error: ") and line.count("\n") == 1
    assert end(in_text, fail) == (status, line)


def test_a_mistake_in_a_process_that_is_spawned(end):
    assert end(spawn, stop) == (1, f"error: {not_finite(3)}\n")


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
