"""Runs whose checkpoints the tests of this folder go on from; each is made once."""

import pytest
from training import SHARDED, first_run, make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def runs(data, tmp_path_factory):
    """(processes, experts) -> folder and losses of an uninterrupted run; each is made once."""
    made = {}

    def run(world, experts):
        if (world, experts) not in made:
            folder = tmp_path_factory.mktemp(f"run{world}_{experts}")
            made[world, experts] = folder, first_run(data, folder, world, experts)
        return made[world, experts]

    return run


@pytest.fixture(scope="session")
def sharded_run(data, tmp_path_factory):
    """As runs(2, 4), with each layer's shared parameters sharded."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, first_run(data, folder, 2, 4, f"{SHARDED} 0")
