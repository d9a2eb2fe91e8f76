"""Run a function in N Gloo processes and collect what each returns."""

import os
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _main(rank, world_size, folder, function, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        world_size=world_size,
        rank=rank,
        timeout=timedelta(seconds=60),
    )
    try:
        result = function(rank, *args)
    finally:
        dist.destroy_process_group()
    torch.save(result, os.path.join(folder, f"result{rank}.pt"))


def run_processes(world_size, function, *args):
    """function(rank, *args) in each of world_size processes -> the list of their results."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _main, (world_size, folder, function, args), nprocs=world_size, start_method="fork"
        )
        return [
            torch.load(os.path.join(folder, f"result{rank}.pt"), weights_only=True)
            for rank in range(world_size)
        ]
