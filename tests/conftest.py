"""Before torch is imported: a thread a process, as tests start many and share the cores."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

# Files go to workers one by one (--dist loadfile): the longest first, or one worker is left with
# them at the end.
LONGEST = ("test_quickstart.py", "test_readme.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
