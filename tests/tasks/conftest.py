import pytest
from choice_data import write_choices, write_classes
from mixture_data import make_data

from fairseq_moe_ext.questions.vocabulary import Vocabulary


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("prepared") / "data", tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def choices(tmp_path_factory):
    """A folder of questions with choices of their own."""
    return write_choices(tmp_path_factory.mktemp("choices"))


@pytest.fixture(scope="session")
def classes(tmp_path_factory):
    """A folder of texts with a class each."""
    return write_classes(tmp_path_factory.mktemp("classes"))


@pytest.fixture(scope="session")
def vocabulary(data):
    return Vocabulary(data)
