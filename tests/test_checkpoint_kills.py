"""Processes killed at any moment, while writing too, leave a checkpoint to go on from."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fairseq import checkpoint_utils
from fairseq.trainer import Trainer
from test_checkpoint import TRAIN, expert_files, make_data, referred_files, train

EXPERTS = 4
LINE = f"{TRAIN} --moe-expert-count {EXPERTS} --save-interval-updates 1 --no-epoch-checkpoints"
LINE += " --keep-interval-updates 2"


def work(rank, world, meeting, line, learning):
    """A process of a training run that takes its time to write; `learning` is set at an update."""
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
    sync, step = os.fsync, Trainer.train_step

    def slow_sync(descriptor):
        time.sleep(0.02)
        sync(descriptor)

    def train_step(*args, **kwargs):
        learning.set()
        return step(*args, **kwargs)

    os.fsync, Trainer.train_step = slow_sync, train_step
    train(rank, world, line)


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
        self.started = 0

    def start(self, world, updates):
        self.started += 1
        learning = self.context.Event()
        meeting = self.folder / f"meeting{self.started}"
        line = f"{self.line} --max-update {updates}"
        processes = [
            self.context.Process(target=work, args=(rank, world, meeting, line, learning))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        return processes, learning

    def kill_at_a_random_moment(self, world):
        """Returns whether something was being written just then."""
        processes, learning = self.start(world, 10**6)
        assert learning.wait(90), "the run did not go on from the checkpoint"
        time.sleep(self.random.uniform(0, 0.8))
        victims = self.random.choice([processes, [self.random.choice(processes)]])
        assert all(process.is_alive() for process in processes)
        for process in victims:
            process.kill()
        deadline = time.monotonic() + self.random.choice([0, 0.3])  # till the others are stopped
        for process in processes:
            process.join(max(0, deadline - time.monotonic()))
        for process in processes:
            process.kill()
            process.join()
        unfinished = list(self.run.rglob("*.tmp"))
        return bool(unfinished) or expert_files(self.run) != referred_files(self.run)

    def finish(self, world, updates):
        processes, _ = self.start(world, updates)
        for process in processes:
            process.join(120)
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
@pytest.mark.timeout(1500)
def test_fifty_kills(tmp_path):
    assert kill_and_resume(tmp_path, 50, [1, 2, 2, 4], seed=2) >= 10


def launch(world, line):
    """fairseq-train, as a user starts it."""
    command = Path(sys.executable).parent / "fairseq-train"
    start = f"-m torch.distributed.run --standalone --nproc_per_node {world}".split()
    return subprocess.Popen(
        [sys.executable, *start, str(command), *line.split(), "--distributed-backend", "gloo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_update(folder, updates, process):
    deadline = time.monotonic() + 120
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
