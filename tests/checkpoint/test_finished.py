"""A command that is repeated after its run has ended trains no further."""

import logging
import os

import pytest
import torch
from training import MODEL, expert_files, train

from fairseq_moe_ext.cli import main
from fairseq_moe_ext.errors import UserError

LINE = MODEL + " --moe-expert-count 4 --optimizer adam --lr 0.01 --num-workers 0"
LINE += " --no-progress-bar --log-format none --disable-validation"


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """A run of 5 of its 16 updates an epoch."""
    folder = tmp_path_factory.mktemp("finished")
    assert len(train(0, 1, f"{data} {LINE} --save-dir {folder} --max-update 5")) == 5
    return folder


def repeated(data, folder, flags, caplog):
    """The number of updates of a repeated command, which leaves its checkpoint as it is."""
    last = folder / "checkpoint_last.pt"
    before = last.read_bytes()
    caplog.clear()
    caplog.set_level("INFO")
    losses = train(0, 1, f"{data} {LINE} --save-dir {folder} {flags}")
    assert last.read_bytes() == before or losses
    return len(losses)


@pytest.mark.parametrize("flags", ["--max-update 5", "--max-update 4"])
def test_after_max_update(data, folder, caplog, flags):
    assert repeated(data, folder, flags, caplog) == 0
    assert f"nothing left to train: 5 updates are done, {flags}; raise it to" in caplog.text


@pytest.mark.parametrize("start", ["--restore-file", "--continue-once"])
def test_a_new_run_from_a_checkpoint_beyond_its_end(data, folder, tmp_path, start):
    """It would leave no checkpoint."""
    flags = f"{start} {folder / 'checkpoint_last.pt'} --save-dir {tmp_path / 'new'}"
    line = f"{data} {LINE} {flags} --max-update 3"
    with pytest.raises(UserError, match=f"--max-update 3: .*{start} .*, or add --reset-optimizer"):
        train(0, 1, line)
    assert not list((tmp_path / "new").glob("*.pt"))
    assert len(train(0, 1, f"{line} --reset-optimizer")) == 3
    if start == "--continue-once":  # the command of a run that has ended
        assert train(0, 1, line) == []


def test_a_new_run_from_a_checkpoint_beyond_its_last_epoch(data, folder, tmp_path):
    state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    state["extra_state"]["train_iterator"] = {"epoch": 3, "iterations_in_epoch": 0}
    torch.save(state, tmp_path / "pre.pt")
    line = f"{data} {LINE} --restore-file {tmp_path / 'pre.pt'} --no-save --max-update 7"
    line += " --max-epoch 2"
    with pytest.raises(UserError, match="--max-epoch 2: .*, or add --reset-dataloader"):
        train(0, 1, line)
    assert len(train(0, 1, f"{line} --reset-dataloader")) == 2


def edited(folder, tmp_path, **extra):
    """The checkpoint with other values in its extra state."""
    state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    state["extra_state"].update(extra)
    torch.save(state, tmp_path / "checkpoint_last.pt")
    return tmp_path


def test_after_max_epoch(data, folder, tmp_path, caplog):
    """fairseq-train does not even begin an epoch."""
    place = {"epoch": 3, "iterations_in_epoch": 0}
    spent = edited(folder, tmp_path, train_iterator=place)
    assert repeated(data, spent, "--max-epoch 2 --no-save", caplog) == 0
    assert "nothing left to train: 5 updates are done, --max-epoch 2; raise it to" in caplog.text


def test_after_stop_time_hours(data, folder, tmp_path, caplog):
    spent = edited(folder, tmp_path, previous_training_time=7300)
    flags = "--max-update 6 --no-save --stop-time-hours"
    assert repeated(data, spent, f"{flags} 2", caplog) == 0
    assert "--stop-time-hours 2" in caplog.text
    assert repeated(data, spent, f"{flags} 3", caplog) == 1


def test_after_patience(data, folder, tmp_path, caplog):
    waited = edited(folder, tmp_path, should_stop_early={"best": 1.0, "num_runs": 2})
    flags = "--max-update 6 --no-save --patience"
    line = LINE.replace(" --disable-validation", "")
    for patience, updates in ((2, 0), (3, 1)):
        run = f"{data} {line} --save-dir {waited} {flags} {patience} --validate-after-updates 9"
        assert len(train(0, 1, run)) == updates


def test_another_metric_is_compared_with_itself(data, tmp_path, caplog):
    """A perplexity is never better than a loss."""
    line = LINE.replace(" --disable-validation", " --validate-interval-updates 1 --patience 1")
    line = f"{data} {line} --lr-scheduler reduce_lr_on_plateau --save-dir {tmp_path}"
    best = tmp_path / "checkpoint_best.pt"
    found = []
    for updates, flags in ((2, ""), (3, ""), (5, "--best-checkpoint-metric ppl")):
        train(0, 1, f"{line} --max-update {updates} {flags}")
        state = torch.load(best, weights_only=True)
        found.append(state["extra_state"]["best"])
        assert state["optimizer_history"][-1]["num_updates"] == updates
        assert caplog.text.count(f"{flags} (it has loss): the validations") == (updates == 5)
    assert found[1] < found[0] and found[2] > 2 * found[0]


@pytest.mark.parametrize("start", ["--finetune-from-model", "--reset-optimizer --restore-file"])
def test_the_hours_begin_with_the_updates(data, folder, tmp_path, start):
    pre = edited(folder, tmp_path, previous_training_time=36000) / "checkpoint_last.pt"
    flags = f"--no-save --max-update 3 --stop-time-hours 5 --save-dir {tmp_path / 'new'}"
    assert len(train(0, 1, f"{data} {LINE} {flags} {start} {pre}")) == 3


def test_no_checkpoint_is_named_as_a_part_of_the_branchs(data, tmp_path):
    line = f"{data} {LINE} --save-dir {tmp_path} --max-update 1 --checkpoint-suffix=-rank-0"
    with pytest.raises(UserError, match="--checkpoint-suffix -rank-0: .* would be read as a part"):
        train(0, 1, line)
    assert not list(tmp_path.glob("*.pt"))


@pytest.fixture
def no_logs():
    """A worker of pytest-xdist cannot send lines that are not UTF-8."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def test_a_folder_whose_name_is_not_utf8(data, folder, tmp_path, capsys, no_logs):
    """torch maps no file by such a path."""
    other = tmp_path / os.fsdecode(b"caf\xe9")
    line = f"{data} {LINE} --save-dir {other} --save-interval-updates 1 --max-update"
    assert len(train(0, 1, f"{line} 1")) == len(train(0, 1, f"{line} 2")) == 1
    last, new = str(other / "checkpoint_last.pt"), str(other / "new.pt")
    for words in (
        ["show", last],
        ["convert", last, new, "--expert-files", "2"],
        ["convert", last, new, "--overwrite", "--expert-files", "4"],
        ["convert", new, str(other / "hf"), "--to", "hf", "--no-tokenizer"],
        ["convert", str(other / "hf"), str(other / "back.pt"), "--from", "hf"],
        ["average", last, new, "--output", str(other / "mean.pt")],
        ["verify", str(other)],
    ):
        assert main(words) == 0, (words, capsys.readouterr().err)
    assert len(expert_files(other)) == 4
    capsys.readouterr()  # see no_logs


def test_after_max_epoch_or_the_least_learning_rate(data, tmp_path, caplog):
    flags = "--max-epoch 1 --lr 0.01 --lr-scheduler fixed"
    line = f"{data} {LINE} --save-dir {tmp_path}"
    assert len(train(0, 1, f"{line} {flags}")) == 16
    assert repeated(data, tmp_path, flags, caplog) == 0
