import pytest
from mixture_data import make_data


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("prepared") / "data", tmp_path_factory.mktemp("text"))
