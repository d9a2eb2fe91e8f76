"""Data, a trained model, and fairseq's commands in this process."""

import pytest
from command_runs import MOE, TRAIN
from training import fairseq, status_of, write_data_bin


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data-bin of 40 sentences over 20 words, each word likely followed by the next one."""
    folder = tmp_path_factory.mktemp("data")
    rows = [[4 + (i + j) % 20 for j in range(9)] for i in range(40)]
    write_data_bin(folder, {"train": rows, "valid": rows[:10]})
    return folder


@pytest.fixture
def command(caplog, capsys):
    """Run a command of fairseq in this process; its log and status."""

    def run(name, line):
        caplog.clear()
        with caplog.at_level("INFO"):
            status = status_of(f"fairseq-{name} {line}")
        out, err = capsys.readouterr()
        return status, caplog.text, out, err

    return run


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A folder with checkpoints of a small MoE model."""
    folder = tmp_path_factory.mktemp("trained")
    fairseq(f"fairseq-train {data} {TRAIN} {MOE} --save-dir {folder}")
    return folder
