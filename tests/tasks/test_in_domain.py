"""In domain is what a model was trained on, wherever domains are decided."""

import json
import shutil

import pytest
import torch
from mixture_data import CORPORA, HELD_OUT, make_task
from training import USER_DIR, fairseq

from fairseq_moe_ext import cli, data_bin

SHAPE = """--arch dense_lm_tiny --decoder-layers 1 --decoder-embed-dim 16 --decoder-ffn-embed-dim 16
    --decoder-attention-heads 2 --tokens-per-sample 32 --criterion moe_cross_entropy
    --optimizer adam --lr 0.01 --batch-size 8 --max-update 1 --cpu --num-workers 0"""


def train(data, folder, flags):
    fairseq(f"fairseq-train {data} {SHAPE} {flags} --save-dir {folder} --user-dir {USER_DIR}")
    return folder / "checkpoint_last.pt"


@pytest.fixture(scope="module")
def some(data, tmp_path_factory):
    """A checkpoint of a model trained on two of three corpora with a train split."""
    flags = "--task mixture_language_modeling --train-corpora small,big"
    return train(data, tmp_path_factory.mktemp("some"), flags)


def inside(tmp_path, checkpoint, *folders):
    """What `fairseq-moe evaluate` counts as in domain."""
    out = tmp_path / "found.json"
    line = f"evaluate {' '.join(map(str, folders))} --path {checkpoint} --cpu --subset valid"
    assert cli.main([*line.split(), "--json", str(out), "--bootstrap", "2", "--overwrite"]) == 0
    found = json.loads(out.read_text())
    names = {name for name, one in found["sets"].items() if one["in_domain"]}
    perplexities = [found["sets"][name]["perplexity"] for name in names]
    if names:
        mean = sum(perplexities) / len(names)
        assert found["mean"]["in_domain"]["perplexity"] == pytest.approx(mean)
    return names


def without_record(checkpoint, path):
    state = torch.load(checkpoint, weights_only=False)
    assert state["task_state"].pop(data_bin.TRAINED) == ["big", "small"]
    torch.save(state, path)
    return path


def test_evaluate_goes_by_the_corpora_trained_on(data, some, tmp_path):
    assert inside(tmp_path, some, data) == {"big", "small"}
    old = without_record(some, tmp_path / "old.pt")
    assert inside(tmp_path, old, data) == {"big", "small"}, "by its --train-corpora"
    assert inside(tmp_path, some, data / "mid") == set(), "a plain data-bin, with a train split"
    assert inside(tmp_path, some, data / "small") == {"small"}


def test_a_train_split_that_the_model_has_not_seen_is_out_of_domain(data, tmp_path):
    everything = train(data, tmp_path / "all", "--task mixture_language_modeling")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copyfile(data / "dict.txt", other / "dict.txt")
    shutil.copytree(data / "mid", other / "new")
    shutil.copytree(data / "mid", other / "mid_too")
    assert inside(tmp_path, everything, data, other) == set(CORPORA)


def test_one_data_bin_by_stocks_task(data, tmp_path):
    one = train(data / "mid", tmp_path / "one", "--task language_modeling")
    assert inside(tmp_path, one, data) == {"mid"}
    assert inside(tmp_path, one, data / "mid") == {"mid"}
    renamed = tmp_path / "renamed"
    shutil.copytree(data / "mid", renamed)
    assert inside(tmp_path, one, renamed) == {"renamed"}, "has a train split; nothing else tells"


def test_a_plain_data_bin_has_the_name_of_its_folder(data, tmp_path):
    one = train(data / "mid", tmp_path / "one", "--task mixture_language_modeling")
    state = torch.load(one, weights_only=False)
    assert state["task_state"][data_bin.TRAINED] == ["mid"]
    assert inside(tmp_path, one, data) == inside(tmp_path, one, data / "mid") == {"mid"}
    task = make_task(data / "mid")
    task.load_state_dict(state["task_state"])
    assert task.trained == [data_bin.PLAIN]
    state["task_state"][data_bin.TRAINED] = [data_bin.PLAIN]  # as older files have it
    torch.save(state, tmp_path / "older.pt")
    assert inside(tmp_path, tmp_path / "older.pt", data) == {"mid"}


def test_one_corpus_by_the_train_subset(data, tmp_path):
    """And that of the run before, where a run goes on with another one."""
    flags = "--task mixture_language_modeling --train-subset train/small"
    one = train(data, tmp_path / "one", flags)
    assert inside(tmp_path, one, data) == {"small"}
    flags = f"--task mixture_language_modeling --train-corpora big --restore-file {one}"
    two = train(data, tmp_path / "two", f"{flags} --max-update 2")
    assert inside(tmp_path, two, data) == {"big", "small"}


def test_a_corpus_called_data(data, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    shutil.copyfile(data / "dict.txt", folder / "dict.txt")
    for old, new in (("small", "data"), ("mid", "web")):
        shutil.copytree(data / old, folder / new)
    one = train(folder, tmp_path / "one", "--task mixture_language_modeling --train-corpora data")
    assert inside(tmp_path, one, folder) == {"data"}
    assert inside(tmp_path, one, folder / "web") == set()


def test_the_task_takes_what_the_checkpoint_tells(data, some):
    task = make_task(data)
    assert task.trained == sorted(CORPORA)
    task.load_state_dict(torch.load(some, weights_only=False)["task_state"])
    assert task.trained == ["big", "small"]
    names = ("--train-corpora", "small, far")
    assert make_task(data, *names, path="checkpoint.pt").trained == ["far", "small"]
    assert not set(HELD_OUT) & set(make_task(data).trained)
