"""Runs whose checkpoints are converted; each is made once."""

import pytest
from training import SAVED, TRAIN, make_data, train_on


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    """flags -> checkpoint of an uninterrupted run on one process, and the losses after it."""
    made = {}

    def start(flags):
        if flags not in made:
            folder = tmp_path_factory.mktemp("run")
            line = f"{data} {TRAIN} {flags} --save-dir {folder} --keep-interval-updates -1"
            losses = train_on(1, f"{line} --save-interval-updates {SAVED}")
            made[flags] = folder / f"checkpoint_1_{SAVED}.pt", losses[SAVED:]
        return made[flags]

    return start
