"""How many of the machine's cores this process may use."""

import math
import os
from contextlib import suppress
from pathlib import Path

# Microseconds of all cores per period of the container (`docker run --cpus 2`: "200000 100000"), or
# "max 100000" (cgroup v2).
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable() -> int:
    """Those that it may run on (taskset, cpusets), but no more than the time of its container."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with suppress(OSError, ValueError):
        quota, period = map(int, _QUOTA.read_text().split())  # ValueError: no limit
        return max(1, min(found or 1, math.ceil(quota / period)))
    return found or 1
