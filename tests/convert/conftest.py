"""Runs whose checkpoints are converted; each is made once."""

import pytest
from converting import convert
from hf_models import KINDS, TEXT
from training import SAVED, TRAIN, make_data, prepare_text, train_on, train_small


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


@pytest.fixture(scope="session")
def hf_data(tmp_path_factory):
    return prepare_text(tmp_path_factory.mktemp("hf"), TEXT, vocabulary=290)


@pytest.fixture(scope="session")
def converted(hf_data, tmp_path_factory):
    """kind -> checkpoint and folder of transformers'; each is made once."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            flags = f"""--task mixture_language_modeling --decoder-ffn-embed-dim 24 --dropout 0
                --max-update 4 --moe-gate-loss-wt 0.25 {KINDS[kind]}"""
            made[kind] = train_small(hf_data, folder / "run", flags), folder / "hf"
            convert(*made[kind], "--to", "hf")
        return made[kind]

    return make
