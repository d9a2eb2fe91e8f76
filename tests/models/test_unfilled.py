"""Models that are about to be loaded are not initialised first, and are the same."""

from types import SimpleNamespace

import pytest
import torch
from fairseq import checkpoint_utils
from small_models import MOE, build_model, make_config, make_task
from torch.overrides import TorchFunctionMode

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.kernels import matmul
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel


class Draws(TorchFunctionMode):
    """Counts the calls that fill a tensor with random numbers."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__ in ("kaiming_uniform_", "normal_", "uniform_")
        return function(*args, **(kwargs or {}))


class Task(SimpleNamespace):
    def build_model(self, cfg, from_checkpoint=False):
        return MoETransformerLanguageModel.build_model(cfg, self)


def load(path, flags, weights, **options):
    """-> the model, and how many times random numbers were drawn for it."""
    path.touch()
    state = {"cfg": SimpleNamespace(model=make_config(**flags), task={}), "model": weights}
    with Draws() as draws:
        (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task(
            [str(path)], task=Task(**vars(make_task())), state=state, **options
        )
    return model, draws.count


@pytest.mark.parametrize("flags", [{}, MOE, {"decoder_learned_pos": True}])
def test_nothing_is_drawn_for_what_is_loaded(tmp_path, flags):
    with Draws() as draws:
        weights = build_model(**flags).state_dict()
    assert draws.count > 0
    model, drawn = load(tmp_path / "x.pt", flags, weights)
    assert drawn == 0
    found = model.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_what_may_be_missing_is_initialised(tmp_path):
    weights = build_model(**MOE).state_dict()
    del weights["decoder.layers.0.fc1.weight"]
    model, drawn = load(tmp_path / "x.pt", MOE, weights, strict=False)
    assert drawn > 0
    weight = model.decoder.layers[0].fc1.weight
    assert 0.5 / 4 < weight.abs().max() <= 1 / 4  # U(-1/sqrt(in), 1/sqrt(in))
    with pytest.raises(UserError, match="fc1.weight is not in the checkpoint"):
        load(tmp_path / "x.pt", MOE, weights)


def test_a_load_that_fails_leaves_the_next_model_initialised(tmp_path):
    with pytest.raises(UserError):
        load(tmp_path / "x.pt", {}, {})
    with Draws() as draws:
        build_model()
    assert draws.count > 0


def test_loading_first_decides_on_the_matrix_products_as_building_first_does(tmp_path, monkeypatch):
    if matmul._settings() is None:
        pytest.skip("this PyTorch has no switch to oneDNN")
    weights = build_model().state_dict()
    monkeypatch.setattr(matmul, "_found_faster", lambda: 0 < matmul.compared_with_mkl()[1] < 1e-2)
    monkeypatch.setattr(matmul, "_faster", None)  # as in a new process
    load(tmp_path / "x.pt", {}, weights)
    assert matmul._faster is True
