"""N Gloo processes that run functions of tests; started once, as starting takes seconds."""

import atexit
import functools
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 300  # seconds, of a collective and of half a result; busy machines are slow


def run_processes(world_size, function, *args):
    """function(rank, *args), of a test module, in each of world_size processes -> their results."""
    return _start(world_size).run(function, args)


@functools.cache
def _start(world_size):
    pool = _Pool(world_size)
    atexit.register(pool.stop)
    return pool


class _Pool:
    def __init__(self, world_size):
        context = mp.get_context("spawn")  # a fork of a process with OpenMP threads may hang
        self.folder = tempfile.TemporaryDirectory()
        self.calls = [context.SimpleQueue() for _ in range(world_size)]
        self.results = [context.Queue() for _ in range(world_size)]
        self.processes = [
            context.Process(
                target=_serve,
                args=(rank, world_size, self.folder.name, self.calls[rank], self.results[rank]),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def run(self, function, args):
        for call in self.calls:
            call.put((function, args))
        outcomes = [result.get(timeout=2 * TIMEOUT) for result in self.results]
        failures = [failure for failure, _ in outcomes if failure]
        assert not failures, "\n".join(failures)
        return [value for _, value in outcomes]

    def stop(self):
        for process in self.processes:
            process.terminate()
        self.folder.cleanup()


def _serve(rank, world_size, folder, calls, results):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        world_size=world_size,
        rank=rank,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while True:
        function, args = calls.get()
        try:
            results.put((None, function(rank, *args)))
        except Exception:
            results.put((f"process {rank}:\n{traceback.format_exc()}", None))
