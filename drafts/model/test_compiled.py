"""--compile changes no number beyond rounding, no name, and ends clearly without a compiler."""

import shutil

import pytest
import torch
from small_models import MOE, TYPES, build_model

from fairseq_moe_ext.errors import UserError

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
TOKENS = torch.arange(4, 28).reshape(2, 12) % (TYPES - 4) + 4


def step(**flags):
    model = build_model(dropout=0.3, decoder_layers=2, **flags).train()
    torch.manual_seed(3)
    loss, _ = model(TOKENS, target=TOKENS.flip(1))
    loss.backward()
    return model, loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, MOE, {"checkpoint_activations": True}])
def test_compiled_is_the_same(flags):
    torch._dynamo.reset()
    plain, loss, grads = step(**flags)
    compiled, loss_compiled, grads_compiled = step(compile=True, **flags)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # something was compiled
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    torch.testing.assert_close(loss_compiled, loss, rtol=1e-6, atol=0)
    for name, grad in grads.items():
        torch.testing.assert_close(grads_compiled[name], grad, rtol=1e-4, atol=1e-5, msg=name)
    compiled.eval()
    whole, _ = compiled(TOKENS[:, :5])
    state = {}
    for end in range(1, 6):
        newest, _ = compiled(TOKENS[:, :end], incremental_state=state)
    torch.testing.assert_close(newest[:, -1], whole[:, -1], rtol=1e-4, atol=1e-5)


def test_no_compiler_is_told(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--compile needs a C"):
        build_model(compile=True)
