"""Before torch is imported: a thread a process, as tests start many and share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
