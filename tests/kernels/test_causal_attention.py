"""Causal attention in parts against a plain loop in float64, and against PyTorch's."""

import math

import pytest
import torch
import torch.nn.functional as F

from fairseq_moe_ext.kernels import causal_attention as kernel
from fairseq_moe_ext.kernels import matmul
from fairseq_moe_ext.kernels.causal_attention import causal_attention, serves


def plain(q, k, v, kept=None, factor=1.0):
    """Query by query; kept: per head, query and key."""
    rows = []
    for b in range(q.size(0)):
        for h in range(q.size(1)):
            for i in range(q.size(2)):
                scores = k[b, h, : i + 1] @ q[b, h, i] / math.sqrt(q.size(3))
                weights = scores.softmax(dim=0)
                if kept is not None:
                    weights = weights * kept[b, h, i, : i + 1] * factor
                rows.append(weights @ v[b, h, : i + 1])
    return torch.stack(rows).view(q.shape)


def drawn(shape, dtype=torch.float64, scale=1.0):
    torch.manual_seed(0)
    q, k, v, grad = (scale * torch.randn(4, *shape, dtype=torch.float64)).to(dtype)
    return [each.requires_grad_() for each in (q, k, v)], grad


def both(function, inputs, grad):
    """The output and the gradients of the inputs."""
    out = function(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad)]


@pytest.mark.parametrize("held", [2**20, 2**16, 1])
@pytest.mark.parametrize("shape", [(1, 1, 128, 4), (3, 2, 256, 8), (1, 5, 384, 3)])
def test_it_is_the_plain_loop(monkeypatch, shape, held):
    monkeypatch.setattr(kernel, "_HELD", held)
    inputs, grad = drawn(shape)
    for ours, truth in zip(both(causal_attention, inputs, grad), both(plain, inputs, grad)):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def test_it_takes_views():
    """As the model's: (B, S, H, d) transposed, from one product of three."""
    torch.manual_seed(0)
    joined = torch.randn(2, 128, 3 * 3 * 4, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 3, 128, 4, dtype=torch.float64).transpose(2, 3).contiguous()

    def function(of):
        parts = (part.view(2, 128, 3, 4).transpose(1, 2) for part in joined.chunk(3, dim=-1))
        return torch.autograd.grad(of(*parts), joined, grad.transpose(2, 3))[0]

    torch.testing.assert_close(function(causal_attention), function(plain), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 2, 256, 32), (1, 1, 1024, 64)])
def test_float32_is_as_exact_as_pytorchs(shape):
    inputs, grad = drawn(shape, torch.float32, scale=2.0)
    truth = both(stock, [each.double() for each in inputs], grad.double())
    for ours, theirs, true in zip(
        both(causal_attention, inputs, grad), both(stock, inputs, grad), truth
    ):
        assert error(ours, true) < 2 * error(theirs, true) + 1e-7


def stock(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def error(found, true):
    return float((found.double() - true).norm() / true.norm())


def test_bfloat16_rounds_weights_and_gradients_once():
    """Scores stay in float32: with scores of up to 40, rounded ones would be off by 0.1."""
    inputs, grad = drawn((3, 2, 256, 32), torch.bfloat16, scale=2.5)
    truth = both(stock, [each.detach().double().requires_grad_() for each in inputs], grad.double())
    eps = torch.finfo(torch.bfloat16).eps  # 2 ** -7; a rounding is off by half of it at most
    for ours, true in zip(both(causal_attention, inputs, grad), truth):
        assert ours.dtype == torch.bfloat16
        # of the weights or their gradients, of the output in the backward pass, and of the result
        assert error(ours, true) < 1.5 * eps


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_multiplies_the_weights_by_what_was_drawn(monkeypatch, p):
    """In the backward pass, too."""
    shape = (2, 2, 256, 4)
    inputs, grad = drawn(shape)
    kept = torch.ones(4, 256, 256, dtype=torch.bool)
    draw = kernel.keep
    parts = list(kernel._parts(4, 256))
    drawn_parts = []

    def keep(size, p):
        chosen, factor = draw(size, p)
        kept[parts[len(drawn_parts)]] = chosen
        drawn_parts.append(factor)
        return chosen, factor

    monkeypatch.setattr(kernel, "keep", keep)
    ours = both(lambda *inputs: causal_attention(*inputs, p), inputs, grad)
    assert drawn_parts == pytest.approx([1 / (1 - p)] * len(parts), rel=1e-4)
    below = torch.ones(256, 256).tril().bool()
    assert float(kept[:, below].double().mean()) == pytest.approx(1 - p, abs=0.01)
    per_head = kept.view(2, 2, 256, 256).double()
    truth = both(lambda *inputs: plain(*inputs, per_head, drawn_parts[0]), inputs, grad)
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_what_was_drawn_is_saved_as_autograd_saves(monkeypatch):
    """So that --checkpoint-activations can drop it."""
    monkeypatch.setattr(kernel, "_HELD", 2 * 128 * 256)
    inputs, _ = drawn((2, 2, 256, 4))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        causal_attention(*inputs, 0.1)
    masks = [x.shape for x in saved if x.dtype == torch.bool]
    assert masks == 2 * [(2, 128, 128), (2, 128, 256)]


def test_a_seed_s_dropout_is_the_same_with_any_number_of_threads():
    inputs, _ = drawn((3, 4, 256, 4))
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        found.append(causal_attention(*inputs, 0.3))
    torch.set_num_threads(before)
    for each in found[1:]:
        torch.testing.assert_close(each, found[0], rtol=1e-12, atol=1e-12)


def test_nothing_is_kept_or_dropped_at_the_ends():
    inputs, _ = drawn((1, 2, 128, 4))
    assert torch.equal(causal_attention(*inputs, 1e-9), causal_attention(*inputs))
    assert not causal_attention(*inputs, 1.0).any()


@pytest.mark.parametrize("onednn", [False, True])
def test_where_it_serves(monkeypatch, onednn):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: onednn)

    def served(shape=(1, 1, 128, 4), dropout=0.1, **kwargs):
        return serves(torch.zeros(*shape, **kwargs), dropout)

    assert served() and served(dropout=0.0) == onednn
    assert served(dtype=torch.float64) and not served(dtype=torch.float64, dropout=0.0)
    assert not served((1, 1, 100, 4)), "oneDNN keeps a program for each shape"
    assert not served((0, 1, 128, 4))
    assert not served(dtype=torch.float16)
    assert not served(device="meta")
    with torch.autocast("cpu", torch.bfloat16):
        assert not served()
    with torch.backends.mkldnn.flags(enabled=False):
        assert served() and not served(dropout=0.0) and not served(dtype=torch.bfloat16)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not served(dtype=torch.bfloat16)


def test_second_derivatives_are_refused():
    """Also where the engine can go round it: PyTorch's once_differentiable does not see it."""
    inputs, _ = drawn((1, 1, 128, 4))

    def loss(q):
        return (q + causal_attention(q, *inputs[1:])).square().sum()

    with pytest.raises(RuntimeError, match="can be differentiated only once"):
        torch.autograd.functional.hvp(loss, inputs[0].detach(), torch.ones(1, 1, 128, 4).double())
