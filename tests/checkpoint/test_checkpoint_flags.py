"""fairseq's flags of checkpoints: followed on two processes as on one, or refused by name."""

import re

import pytest
import torch
from processes import run_processes
from training import TRAIN, error_of, expert_files, manifest_of, referred_files, train, train_on


@pytest.mark.parametrize(
    "flags, names",
    [
        ("--save-interval-updates 4 --keep-interval-updates 1", "1 2 2_28 best last"),
        ("--keep-last-epochs 1", "2 best last"),
        ("--no-epoch-checkpoints", "best last"),
        ("--no-last-checkpoints", "1 2 best"),
        ("--keep-best-checkpoints 1 --best-checkpoint-metric loss", "1 2 best .best_loss last"),
        ("--no-save", ""),
        ("--no-save-optimizer-state --no-epoch-checkpoints", "best last"),
    ],
)
def test_flags_of_checkpoints_mean_what_they_mean(data, tmp_path, flags, names):
    """On two processes as on one; and no expert file stays that nothing refers to."""
    line = f"{data} {TRAIN} --moe-expert-count 4 {flags} --max-update 32"
    line = line.replace(" --disable-validation", "")
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        train_on(world, f"{line} --save-dir {folder}")
        found[world] = sorted(re.sub(r"_\d+\.\d+", "", p.stem)[10:] for p in folder.glob("*.pt"))
        assert not list(folder.rglob("*.tmp"))
    assert found[2] == found[1]
    assert [name.strip("_") for name in found[2]] == sorted(names.split())
    assert expert_files(tmp_path / "2") == referred_files(tmp_path / "2")
    if "--no-save-optimizer-state" in flags:
        for file in manifest_of(tmp_path / "2" / "checkpoint_last.pt").files:
            assert torch.load(tmp_path / "2" / file.name, weights_only=True)["optimizer"] == {}
        rest = [
            train_on(1, f"{line} --save-dir {tmp_path / str(w)} --max-update 2") for w in (1, 2)
        ]
        assert rest[1] == pytest.approx(rest[0], rel=1e-4)  # from parameters equal but for rounding


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--finetune-from-model none.pt", "none.pt: no such file"),
        ("--finetune-from-model none.pt --reset-optimizer", "--reset-optimizer"),
        ("--finetune-from-model dict.txt --restore-file x.pt", "--restore-file"),
        ("--save-dir dict.txt", "--save-dir dict.txt: dict.txt is not a folder"),
        ("--save-dir dict.txt/run", "--save-dir dict.txt/run: dict.txt is not a folder"),
        ("--save-dir /proc/run", "--save-dir /proc/run: cannot be written to"),
    ],
)
def test_flags_that_cannot_be_followed_end_in_one_line(
    data, tmp_path, monkeypatch, capsys, flags, words
):
    monkeypatch.chdir(data)
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {tmp_path}/run {flags}"
    try:
        message = error_of(0, train, 1, line)
    except SystemExit:  # while the command line is read
        message = capsys.readouterr().err[len("error: ") : -1]
    assert message.startswith(flags.split()[0]) and words in message
    assert "\n" not in message and len(message) < 250
    assert not list(tmp_path.rglob("*.pt"))


def test_a_run_that_begins_again_in_its_folder_is_warned_of(data, runs, tmp_path, caplog):
    """As a command with --restore-file that is killed and repeated."""
    folder, _ = runs(1, 4)
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {tmp_path} --max-update 16"
    first = f"--restore-file {folder}/checkpoint_last.pt"
    for times in range(2):
        train(0, 1, f"{line} {first}")
        warned = [message for message in caplog.messages if message.startswith(first)]
        assert len(warned) == times
    assert f"will overwrite {tmp_path}/checkpoint_last.pt" in warned[0]
    assert f"--continue-once {folder}/checkpoint_last.pt" in warned[0]
    caplog.clear()
    for flag in (first.replace("--restore-file", "--continue-once"), f"{first} --no-save"):
        train(0, 1, f"{line} {flag}")
    train(0, 1, f"{line} --restore-file {tmp_path}/checkpoint_last.pt")
    assert "will overwrite" not in caplog.text


@pytest.mark.parametrize(
    "flag", ["--store-ema", "--zero-sharding os", "--use-bmuf", "--fp16-adam-stats"]
)
def test_what_cannot_be_saved_is_refused_by_name(data, tmp_path, flag):
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {tmp_path} {flag}"
    for message in run_processes(2, error_of, train, 2, line):
        assert flag in message and "2 processes" in message
