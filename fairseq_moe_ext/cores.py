"""How many of the machine's cores this process may use."""

import math
import os
from contextlib import suppress
from pathlib import Path

# CPU time per period, in microseconds ("200000 100000" by `docker run --cpus 2`), or "max 100000"
# without a limit (cgroup v2).
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def threads(most: int) -> int:
    """Threads of a command that may take `most`; fewer if OMP_NUM_THREADS is set to fewer."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(most, int(given)) if given.isdecimal() and int(given) > 0 else most


def usable() -> int:
    """The cores that taskset and cpusets allow, but no more than the container's CPU quota, rounded
    up."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with suppress(OSError, ValueError):
        quota, period = map(int, _QUOTA.read_text().split())  # ValueError: no limit
        return max(1, min(found or 1, math.ceil(quota / period)))
    return found or 1
