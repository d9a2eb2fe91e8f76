"""Before torch is imported: a thread a process, as tests start many and share the cores."""

import logging
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

# fairseq's commands keep the stream that they were imported with, in a test the one of its capture,
# which is closed behind it: logging is not to write a traceback of that into a later test's output.
logging.raiseExceptions = False
pytest.register_assert_rewrite("branch_checkpoints", "converting", "training", "updates")

# Files go to workers one by one (--dist loadfile): the longest first, or one worker is left with
# them at the end.
LONGEST = ("test_quickstart.py", "test_readme.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def device():
    """A device for a wrong command line: one at fault cannot damage it, even as root, since nobody
    can replace or remove the files of /dev/pts."""
    ends = os.openpty()
    yield os.ttyname(ends[1])
    for end in ends:
        os.close(end)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a dictionary, for the trainings of updates.py."""
    import updates

    return updates.save_dictionary(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def one_thread(request):
    """In tests of the mathematics: tensors of a few hundred numbers are faster on one thread."""
    if request.path.parent.name not in ("moe", "kernels"):
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
