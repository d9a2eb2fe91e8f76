"""The chunked loss equals torch's on the whole of the logits, and never holds them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_moe_ext.kernels import linear_cross_entropy as module
from fairseq_moe_ext.kernels.linear_cross_entropy import linear_cross_entropy

PAD = 1


def case(dtype, n=37, v=29):
    torch.manual_seed(0)
    features = torch.randn(n, 8, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(v, 8, dtype=torch.float64).to(dtype).requires_grad_()
    target = torch.randint(0, v, (n,))
    target[::5] = PAD
    return features, weight, target


def reference(features, weight, target):
    logits = features.double() @ weight.double().t()
    return F.cross_entropy(logits, target, ignore_index=PAD, reduction="sum")


@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("chunk", [29, 29 * 5, 29 * 1000])  # 1, 5 and all tokens at a time
@pytest.mark.parametrize(
    "dtype, rtol",
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
def test_equals_torch(dtype, rtol, chunk, factor, monkeypatch):
    monkeypatch.setattr(module, "LOGITS_AT_A_TIME", chunk)
    monkeypatch.setattr(module, "_SOFTMAX_AT_A_TIME", 29 * 3)  # 3 tokens, as of 150,000 words
    monkeypatch.setattr(module, "_GRADIENTS_AT_A_TIME", 8 * 10)  # 10 of 29 rows
    features, weight, target = case(dtype)
    loss = linear_cross_entropy(features, weight, target, PAD)
    (factor * loss).backward()
    exact_features, exact_weight = (
        t.detach().double().requires_grad_() for t in (features, weight)
    )
    expected = reference(exact_features, exact_weight, target)
    (factor * expected).backward()
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=rtol, atol=0)
    for got, want in ((features.grad, exact_features.grad), (weight.grad, exact_weight.grad)):
        assert got.dtype == dtype
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error < rtol


def test_only_padding():
    features, weight, target = case(torch.float64)
    loss = linear_cross_entropy(features, weight, torch.full_like(target, PAD), PAD)
    loss.backward()
    assert loss == 0
    assert not features.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_are_computed(without, monkeypatch):
    features, weight, target = case(torch.float64)
    products, write = [], module.write_product
    monkeypatch.setattr(module, "_add_outer", None)
    monkeypatch.setattr(module, "write_product", lambda *args: products.append(write(*args)))
    with without():
        loss = linear_cross_entropy(features, torch.nn.Parameter(weight), target, PAD)
    assert len(products) == 1 and not loss.requires_grad
    torch.testing.assert_close(loss, reference(features, weight, target))


def test_float16_keeps_gradients_of_unlikely_types():
    """A uniform softmax over a large vocabulary has probabilities that float16 barely holds."""
    v = 50_000
    features = torch.zeros(2, 4, dtype=torch.float16, requires_grad=True)
    weight = torch.randn(v, 4).half()
    target = torch.tensor([3, 4])
    linear_cross_entropy(features, weight, target, PAD).backward()
    exact = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    reference(exact, weight, target).backward()
    torch.testing.assert_close(features.grad.double(), exact.grad, rtol=2e-3, atol=2e-3)


def test_no_tensor_of_all_logits(monkeypatch):
    n, v, chunk = 64, 1000, 4
    monkeypatch.setattr(module, "LOGITS_AT_A_TIME", chunk * v)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    features, weight, target = case(torch.float32, n=n, v=v)
    with Watch():
        linear_cross_entropy(features, weight, target, PAD).backward()
    assert largest == max(chunk * v, weight.numel()) < n * v
