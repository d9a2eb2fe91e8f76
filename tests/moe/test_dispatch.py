"""Rows in expert order, with spare ones where products want other numbers of rows."""

import pytest
import torch
from closeness import assert_near

from fairseq_moe_ext.kernels.chunks import Chunk
from fairseq_moe_ext.moe.dispatch import lay_out, permute, unpermute
from fairseq_moe_ext.moe.routing import route


def routed(capacity):
    torch.manual_seed(0)
    return route(torch.randn(23, 4, dtype=torch.float64), 2, capacity=capacity)


def chunked(counts):
    """Expert 3 alone, then 0 and 2 with as many rows, then 1; spare rows in each."""
    chunks = []
    for experts in ([3], [0, 2], [1]):
        start = chunks[-1].place.stop if chunks else 0
        chunks.append(Chunk(experts, max(counts[e] for e in experts) + 2, start))
    return chunks


@pytest.mark.parametrize("chunked", [None, chunked], ids=["close", "spare"])
@pytest.mark.parametrize("capacity", [None, 8])
def test_there_and_back(capacity, chunked):
    """Through experts that multiply by their number: output and gradients of a loop."""
    routing = routed(capacity)
    rows = lay_out(routing, chunked)
    kept = [int((routing.kept & (routing.experts == e)).sum()) for e in range(4)]
    order = range(4)
    if chunked is None:
        assert rows.counts == kept and rows.chunks is None
    else:
        order = [3, 0, 2, 1]
        as_many = max(kept[0], kept[2]) + 2
        assert rows.counts == [as_many, kept[1] + 2, as_many, kept[3] + 2]
        assert rows.chunks == chunked(kept)
    assert len(rows.token) == sum(rows.counts)
    x = torch.randn(23, 3, dtype=torch.float64, requires_grad=True)
    weights = routing.weights.detach().requires_grad_()
    number = torch.cat([torch.full((rows.counts[e], 1), 1.0 + e) for e in order]).double()
    found = unpermute(number * permute(x, rows), weights, rows)

    true = []
    for token in range(23):
        true.append(torch.zeros(3, dtype=torch.float64))
        for k in range(2):
            if routing.kept[token, k]:
                factor = weights[token, k] * (1 + routing.experts[token, k])
                true[-1] = true[-1] + factor * x[token]
    true = torch.stack(true)
    assert_near(found, true, 1e-14, "output")
    weight = torch.randn_like(true)
    for mine, each in zip(
        torch.autograd.grad((found * weight).sum(), [x, weights]),
        torch.autograd.grad((true * weight).sum(), [x, weights]),
    ):
        assert_near(mine, each, 1e-14, "gradient")


def test_a_row_that_is_not_finite_stays_with_its_token():
    """Dropped choices have no row, and are not read from another's."""
    routing = routed(5)
    rows = lay_out(routing)
    none = ~routing.kept.any(dim=1)
    some = routing.kept.any(dim=1) & ~routing.kept.all(dim=1)
    assert none.any() and some.any()
    x = torch.randn(23, 3, dtype=torch.float64, requires_grad=True)
    weights = routing.weights.detach().requires_grad_()
    y = permute(x, rows)
    y = torch.cat([torch.full_like(y[:1], torch.inf), y[1:]])
    out = unpermute(y, weights, rows)
    others = torch.arange(23) != rows.token[0]
    assert out[others].isfinite().all() and not out[rows.token[0]].isfinite().any()
    (of_weights,) = torch.autograd.grad(out.sum(), weights)
    assert of_weights[others].isfinite().all() and not of_weights[~routing.kept].any()

    grad = torch.zeros_like(y)
    grad[0] = torch.inf
    (of_x,) = torch.autograd.grad(permute(x, rows), x, grad)
    assert of_x[others].isfinite().all()
