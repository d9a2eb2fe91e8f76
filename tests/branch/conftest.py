"""A data-bin for the checkpoints of the branch."""

import pytest
from branch_checkpoints import make_data_bin
from small_models import make_task


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data-bin of 12 sentences."""
    return make_data_bin(tmp_path_factory.mktemp("data"), make_task().source_dictionary)
