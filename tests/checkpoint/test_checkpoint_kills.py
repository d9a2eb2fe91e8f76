"""Processes killed at any moment, while writing too, leave a checkpoint to go on from."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer
from training import TRAIN, expert_files, launch, make_data, referred_files, train

EXPERTS = 4
LINE = f"{TRAIN} --moe-expert-count {EXPERTS} --save-interval-updates 1 --no-epoch-checkpoints"
LINE += " --keep-interval-updates 2"
LIMIT = 240  # seconds, for what takes a few where nothing else runs


def work(rank, world, meeting, line, reached, moment):
    """A process of a training run that takes its time to write; `reached` is set at the moment that
    is one of MOMENTS, which then takes a second, or at an update where that is None."""
    os.environ["LOGLEVEL"] = "WARNING"
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{meeting}",
            world_size=world,
            rank=rank,
            timeout=timedelta(seconds=60),
        )
    sync = os.fsync

    def slow_sync(descriptor):
        time.sleep(0.02)
        sync(descriptor)

    os.fsync = slow_sync
    owner, name = MOMENTS.get(moment, (Trainer, "train_step"))
    stock = getattr(owner, name)

    def at_the_moment(*args, **kwargs):
        reached.set()
        time.sleep(1 if moment else 0)
        return stock(*args, **kwargs)

    setattr(owner, name, at_the_moment)
    train(rank, world, line)


MOMENTS = {
    "validation": (Trainer, "valid_step"),
    "writing": (os, "fsync"),  # of the first file
    "renaming": (os, "replace"),
    "copying": (shutil, "copyfile"),  # checkpoint_1_2.pt is whole, checkpoint_last.pt not yet
}


def updates_of(path):
    """Loads a checkpoint with all its experts; the number of updates that made it."""
    state = checkpoint_utils.load_checkpoint_to_cpu(str(path))
    weights = state["model"]["decoder.layers.1.moe_layer.experts.fc1.weight"]
    assert weights.shape[0] == EXPERTS and torch.isfinite(weights).all()
    return state["optimizer_history"][-1]["num_updates"]


class Runs:
    """Training runs in one folder, of processes forked from one that has imported everything."""

    def __init__(self, folder, seed):
        data = make_data(folder)
        self.line = f"{data} {LINE} --save-dir {folder / 'run'}"
        self.folder, self.run = folder, folder / "run"
        self.random = random.Random(seed)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["test_checkpoint_kills"])
        with pytest.MonkeyPatch.context() as patch:  # Python 3.11's does not take our sys.path
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
            forkserver.ensure_running()
        self.started = 0

    def start(self, world, updates, moment=None):
        self.started += 1
        reached = self.context.Event()
        meeting = self.folder / f"meeting{self.started}"
        line = f"{self.line} --max-update {updates}"
        if moment == "validation":
            line = line.replace(" --disable-validation", " --validate-interval-updates 1")
        processes = [
            self.context.Process(target=work, args=(rank, world, meeting, line, reached, moment))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        return processes, reached

    def kill_at_a_random_moment(self, world):
        """Returns whether something was being written just then."""
        processes, reached = self.start(world, 10**6)
        assert reached.wait(LIMIT), "the run did not go on from the checkpoint"
        time.sleep(self.random.uniform(0, 0.8))
        victims = self.random.choice([processes, [self.random.choice(processes)]])
        assert all(process.is_alive() for process in processes)
        for process in victims:
            process.kill()
        self.end(processes, self.random.choice([0, 0.3]))
        unfinished = list(self.run.rglob("*.tmp"))
        return bool(unfinished) or expert_files(self.run) != referred_files(self.run)

    def kill_at(self, moment, world):
        """Kills a process in the midst of it: one that writes experts, or the one that copies."""
        processes, reached = self.start(world, 10**6, moment)
        assert reached.wait(LIMIT)
        time.sleep(0.3)
        assert all(process.is_alive() for process in processes)
        processes[0 if moment == "copying" else -1].kill()
        self.end(processes, 0.3)

    def end(self, processes, seconds):
        """Kills those that have not stopped in so many seconds."""
        deadline = time.monotonic() + seconds
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        for process in processes:
            process.kill()
            process.join()

    def finish(self, world, updates):
        processes, _ = self.start(world, updates)
        for process in processes:
            process.join(LIMIT)
        assert [process.exitcode for process in processes] == [0] * world


def kill_and_resume(folder, moments, worlds, seed):
    """Returns how many kills hit a run while it was writing."""
    runs = Runs(folder, seed)
    runs.finish(2, 1)
    updates, while_writing = 1, 0
    for _ in range(moments):
        while_writing += runs.kill_at_a_random_moment(runs.random.choice(worlds))
        files = {path.name: updates_of(path) for path in runs.run.glob("*.pt")}
        assert files["checkpoint_last.pt"] >= updates  # no complete checkpoint was lost
        updates = files["checkpoint_last.pt"]
    runs.finish(runs.random.choice(worlds), updates + 3)
    assert updates_of(runs.run / "checkpoint_last.pt") == updates + 3
    assert not list(runs.run.rglob("*.tmp"))
    return while_writing


def test_a_few_kills(tmp_path):
    kill_and_resume(tmp_path, 3, [1, 2], seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment, world",
    [
        ("validation", 2),
        ("writing", 1),
        ("writing", 2),
        ("renaming", 2),
        ("copying", 1),
        ("copying", 2),
    ],
)
def test_a_kill_in_the_midst_of(tmp_path, moment, world):
    runs = Runs(tmp_path, seed=3)
    runs.finish(world, 2)
    runs.kill_at(moment, world)
    assert updates_of(runs.run / "checkpoint_last.pt") == 2  # the last complete one
    runs.finish(world, 4)
    assert updates_of(runs.run / "checkpoint_last.pt") == 4
    assert not list(runs.run.rglob("*.tmp"))
    assert expert_files(runs.run) == referred_files(runs.run)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_fifty_kills(tmp_path):
    assert kill_and_resume(tmp_path, 50, [1, 2, 2, 4], seed=2) >= 10


def wait_for_update(folder, updates, process):
    deadline = time.monotonic() + LIMIT
    while not list(folder.glob(f"checkpoint_*_{updates}.pt")):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_whose_process_is_killed_ends_and_goes_on(tmp_path, victim):
    folder = tmp_path / "run"
    line = f"{make_data(tmp_path)} {LINE} --batch-size 4 --save-dir {folder}"
    run = launch(2, f"{line} --max-update 100000")
    try:
        wait_for_update(folder, 3, run)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        os.kill(int(children[victim]), signal.SIGKILL)
        run.communicate(timeout=120)
    finally:
        run.kill()
    assert run.returncode != 0
    updates = updates_of(folder / "checkpoint_last.pt")
    assert updates >= 3
    for world in (1, 2):  # each goes on for two updates
        updates += 2
        again = launch(world, f"{line} --max-update {updates}")
        text, _ = again.communicate(timeout=240)
        assert again.returncode == 0, text[-3000:]
        assert updates_of(folder / "checkpoint_last.pt") == updates
