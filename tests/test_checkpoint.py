"""Checkpoints on any number of processes: training goes on as if nothing had happened."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils, options, tasks
from fairseq.data import Dictionary, indexed_dataset, iterators
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from fairseq_cli import train as fairseq_train
from processes import run_processes

import fairseq_moe_ext
from fairseq_moe_ext import checkpoint
from fairseq_moe_ext.errors import UserError

GLOBAL_BATCH, SAVED, UPDATES = 8, 4, 14  # sentences; the updates before and after the checkpoint
MODEL = "--task language_modeling --arch moe_lm_tiny --criterion moe_cross_entropy --cpu"
MODEL += " --decoder-layers 2 --decoder-embed-dim 8 --decoder-ffn-embed-dim 12 --dropout 0"
MODEL += " --decoder-attention-heads 2 --tokens-per-sample 8 --attention-dropout 0"
MODEL += " --moe-gate-loss-wt 0.1 --moe-routing-scope world --ddp-backend legacy_ddp"
MODEL += f" --user-dir {Path(fairseq_moe_ext.__file__).parent}"
TRAIN = f"{MODEL} --optimizer adam --lr 0.01 --clip-norm 0.5 --max-update {UPDATES}"
TRAIN += " --required-batch-size-multiple 1 --num-workers 0 --curriculum 100"
TRAIN += " --no-progress-bar --log-format none --disable-validation"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data-bin of 1,000 tokens: 125 sentences, 16 updates, and then some."""
    folder = tmp_path_factory.mktemp("data")
    dictionary = Dictionary()
    for i in range(20):
        dictionary.add_symbol(f"w{i}", n=100 - i)
    dictionary.save(str(folder / "dict.txt"))
    for split, sentences in (("train", 100), ("valid", 8)):
        writer = indexed_dataset.make_builder(str(folder / f"{split}.bin"), "mmap", len(dictionary))
        for i in range(sentences):
            words = " ".join(f"w{(i * i + j * (1 + i % 3)) % 20}" for j in range(9))
            writer.add_item(dictionary.encode_line(words, add_if_not_exist=False))
        writer.finalize(str(folder / f"{split}.idx"))
    return str(folder)


def settings(line, rank, world):
    parser = options.get_training_parser()
    line += f" --distributed-world-size {world} --distributed-rank {rank}"
    sys.argv[1:] = line.split()  # the first, partial parse reads these
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, line.split()))


def train(rank, world, line, batch=None):
    """fairseq-train in this process; returns the loss of each update, over all processes."""
    losses = []
    stock = Trainer._reduce_and_log_stats

    def record(self, logs, sample_size, grad_norm=None):
        losses.append(float(sum(log["inner_loss"] for log in logs)) / float(sample_size))
        return stock(self, logs, sample_size, grad_norm)

    vars(checkpoint_utils.save_checkpoint).pop("best", None)
    Trainer._reduce_and_log_stats = record
    try:
        line += f" --batch-size {batch or GLOBAL_BATCH // world}"
        fairseq_train.main(settings(line, rank, world))
    finally:
        Trainer._reduce_and_log_stats = stock
    return losses


def train_on(world, line, batch=None):
    """Losses of a run on so many processes."""
    if world == 1:
        return train(0, 1, line, batch)
    results = run_processes(world, train, world, line, batch)
    assert all(result == results[0] for result in results)
    return results[0]


def first_run(data, folder, world, experts, options=""):
    """An uninterrupted run that leaves checkpoint_1_4.pt; returns its losses."""
    line = f"{data} {TRAIN} --moe-expert-count {experts} {options} --save-dir {folder}"
    losses = train_on(world, f"{line} --save-interval-updates {SAVED} --keep-interval-updates -1")
    assert len(losses) == UPDATES
    return losses


def resume(data, folder, world, experts, options="", batch=None, save_dir=None):
    """Losses of a run that goes on from checkpoint_1_4.pt."""
    line = f"{data} {TRAIN} --moe-expert-count {experts} {options} --save-dir {save_dir or folder}"
    line += f" --restore-file {folder}/checkpoint_1_{SAVED}.pt --no-save"
    return train_on(world, line, batch)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """(processes, experts) -> folder and losses of an uninterrupted run; each is made once."""
    made = {}

    def run(world, experts):
        if (world, experts) not in made:
            folder = tmp_path_factory.mktemp(f"run{world}_{experts}")
            made[world, experts] = folder, first_run(data, folder, world, experts)
        return made[world, experts]

    return run


@pytest.mark.parametrize("experts, first, then", [
    (4, 2, 2), (2, 4, 4), (4, 1, 2), (4, 2, 1), (4, 2, 4), (2, 4, 2), (2, 4, 1), (2, 1, 4),
])
def test_a_resumed_run_equals_the_uninterrupted_one(data, runs, experts, first, then):
    """experts < processes: with replicas."""
    folder, losses = runs(first, experts)
    resumed = resume(data, folder, then, experts)
    expected = losses[SAVED:]
    assert len(resumed) == len(expected) == 10
    if first == then:
        assert resumed == expected
    else:
        assert resumed == pytest.approx(expected, rel=1e-5)
