"""Compute many experts side by side, one per core of a CPU.

A matrix product of few rows does not fill several cores: PyTorch's threads wait for each other more
than they compute. So each core takes the next expert, or block of experts, and computes it alone.
Large products do fill the cores and are left to PyTorch. The two must not alternate: PyTorch's
threads spin for some milliseconds after each operation and would take time from ours.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Callable, Optional, Sequence

import torch

from .matmul import watched

# Multiplications. With fewer the pool seldom gains, and generation is slower (docs/kernels.md).
_WORTH = 2**31
_ENOUGH = 128  # rows that keep a core busy


def side_by_side(work: Callable[[int], None], counts: Sequence[int], size: int, cpu: bool) -> None:
    """Call work(i) for every expert or block of experts i, without autograd. No two may write to
    the same place.

    Args:
        counts: rows of each.
        size: multiplications per row.
        cpu: whether the work is on a CPU; elsewhere it runs one by one, because kernels are queued.
    """
    # Without OpenMP the number of threads cannot change once threads exist.
    threads = torch.get_num_threads() if cpu and torch.backends.openmp.is_available() else 1
    rows = sum(counts)
    # An expert with much more than one core's share would keep the others waiting.
    shared = 2 * threads * max(counts, default=0) <= 3 * rows
    few = rows < _ENOUGH * threads * len(counts)
    if threads == 1 or not shared or not few or watched() or rows * size < _WORTH:
        for i in range(len(counts)):
            work(i)
        return
    # Largest first, so that all finish at about the same time; taking the next one is atomic.
    order = iter(sorted(range(len(counts)), key=counts.__getitem__, reverse=True))

    inference = torch.is_inference_mode_enabled()

    def share() -> None:
        with torch.inference_mode(inference), torch.no_grad():  # of each thread its own
            for i in order:
                work(i)

    pool = _Helpers.get(threads - 1)
    torch.set_num_threads(1)
    try:
        helping = [pool.submit(share) for _ in range(threads - 1)]
        try:
            share()
        finally:
            wait(helping)
        for done in helping:
            done.result()  # raises what a helper raised
    finally:
        torch.set_num_threads(threads)


class _Helpers:
    """Threads beside the caller's, kept between calls."""

    pool: Optional[ThreadPoolExecutor] = None
    size = 0

    @classmethod
    def get(cls, size: int) -> ThreadPoolExecutor:
        if cls.pool is None or cls.size != size:
            cls.pool, cls.size = ThreadPoolExecutor(size, "experts"), size
            # A thread sets its number of threads once, and with it that of MKL for all: so now,
            # before the caller sets its own again.
            together = threading.Barrier(size)

            def prepare() -> None:
                torch.set_num_threads(1)
                together.wait()

            wait([cls.pool.submit(prepare) for _ in range(size)])
        return cls.pool

    @classmethod
    def forget(cls) -> None:
        cls.pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_Helpers.forget)  # a forked process has none of them
