"""--compile changes no number beyond rounding and no name, and is refused where it cannot work."""

import copy

import pytest
import torch
from small_models import KINDS, MOE, build_model, random_tokens

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.models import compiled


def step(model, tokens):
    """Loss and gradients by name, of the same random numbers."""
    torch.manual_seed(3)
    loss, extra = model(tokens, target=tokens.roll(-1, dims=1))
    (loss + 10 * sum(record.balance_loss for record in extra["moe"])).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {**MOE, "checkpoint_activations": True},
        *({**MOE, **KINDS[kind]} for kind in ("gated", "all", "twin")),
    ],
)
def test_compiled_is_the_same(flags):
    torch._dynamo.reset()
    options = {"dropout": 0.3, "attention_dropout": 0.2, "tokens_per_sample": 128}
    plain = build_model(**options, **flags).train()
    model = build_model(**options, **flags, compile=True).train()
    assert list(plain.state_dict()) == list(model.state_dict())
    torch._dynamo.utils.counters.clear()
    # The second shape is compiled anew; for the third, attention is kernels/causal_attention.py's.
    for tokens in (random_tokens(), random_tokens(2, 9), random_tokens(2, 128)):
        loss, grads = step(plain, tokens)
        loss_compiled, grads_compiled = step(model, tokens)
        torch.testing.assert_close(loss_compiled, loss, rtol=1e-6, atol=0)
        for name, grad in grads.items():
            torch.testing.assert_close(grads_compiled[name], grad, rtol=1e-4, atol=1e-5, msg=name)
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] > 0
    in_training = dict(stats)
    model.eval()
    torch.testing.assert_close(model(tokens)[0], plain.eval()(tokens)[0])
    assert stats == in_training  # evaluation is not compiled
    torch.testing.assert_close(copy.deepcopy(model)(tokens)[0], model(tokens)[0])


def test_where_torch_has_no_compile_it_is_refused(monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("torch.compile is not supported on Python 3.15+")

    monkeypatch.setattr(torch, "compile", missing)
    compiled.check.cache_clear()
    with pytest.raises(UserError, match="--compile: .*Python 3.15"):
        compiled.check(cpu=False)


def test_it_is_tried_where_the_model_will_be(monkeypatch):
    """Under --cpu not on a GPU, which Triton may not be installed for."""
    devices = []
    monkeypatch.setattr(
        torch, "compile", lambda f, options: lambda x: devices.append(x.device.type)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compiled.check.cache_clear()
    compiled.check(cpu=True)
    compiled.check.cache_clear()
    assert devices == ["cpu"]
