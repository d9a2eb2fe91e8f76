"""N Gloo processes that run functions of tests; started once, as starting takes seconds."""

import atexit
import faulthandler
import os
import signal
import tempfile
import time
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = 300  # seconds, of a collective and of half a result; busy machines are slow
AFTER_A_FAILURE = 10  # seconds for the others, which may wait for the process that failed

_pools = {}


def run_processes(world_size, function, *args):
    """function(rank, *args), of a test module, in each of world_size processes -> their results.

    Where one fails, dies or does not answer, all are ended; the next call starts new ones.
    """
    if world_size not in _pools:
        _pools[world_size] = _Pool(world_size)
        atexit.register(_pools[world_size].stop)
    outcomes = _pools[world_size].run(function, args)
    failures = [failure for failure, _ in outcomes if failure]
    if failures:
        end_processes(world_size)
        raise AssertionError("\n".join(failures))
    return [value for _, value in outcomes]


def end_processes(world_size):
    """The next call of run_processes starts new ones."""
    _pools.pop(world_size).stop()


class _Pool:
    def __init__(self, world_size):
        context = mp.get_context("spawn")  # a fork of a process with OpenMP threads may hang
        self.folder = tempfile.TemporaryDirectory()
        self.ends, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, self.folder.name, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.processes.append(process)

    def run(self, function, args):
        """(failure, result) of each process."""
        for end in self.ends:
            end.send((function, args))
        outcomes = {}
        deadline = time.monotonic() + 2 * TIMEOUT
        while len(outcomes) < len(self.ends):
            waiting = {end: rank for rank, end in enumerate(self.ends) if rank not in outcomes}
            ready = wait(list(waiting), max(0, deadline - time.monotonic()))
            if not ready:
                for rank in waiting.values():
                    os.kill(self.processes[rank].pid, signal.SIGUSR1)
                    outcomes[rank] = f"process {rank} has not answered; see stderr for where", None
                time.sleep(1)  # to write that
            for end in ready:
                rank = waiting[end]
                try:
                    outcomes[rank] = end.recv()
                except EOFError:
                    self.processes[rank].join()
                    outcomes[rank] = f"process {rank} ended: {self.processes[rank].exitcode}", None
                if outcomes[rank][0]:
                    deadline = min(deadline, time.monotonic() + AFTER_A_FAILURE)
        return [outcomes[rank] for rank in range(len(self.ends))]

    def stop(self):
        for process in self.processes:
            process.kill()
        self.folder.cleanup()


def _serve(rank, world_size, folder, end):
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        world_size=world_size,
        rank=rank,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while True:
        function, args = end.recv()
        try:
            end.send((None, function(rank, *args)))
        except Exception:
            end.send((f"process {rank}:\n{traceback.format_exc()}", None))
