"""Rows in expert order, with spare ones where products want other numbers of rows."""

import pytest
import torch
from closeness import assert_near

from fairseq_moe_ext.moe.dispatch import lay_out, permute, unpermute
from fairseq_moe_ext.moe.routing import route


def routed(capacity):
    torch.manual_seed(0)
    return route(torch.randn(23, 4, dtype=torch.float64), 2, capacity=capacity)


@pytest.mark.parametrize(
    "rounded", [None, lambda counts: [-(-n // 5) * 5 for n in counts]], ids=["close", "spare"]
)
@pytest.mark.parametrize("capacity", [None, 8])
def test_there_and_back(capacity, rounded):
    """Through experts that multiply by their number: output and gradients of a loop."""
    routing = routed(capacity)
    rows = lay_out(routing, rounded)
    kept = [int((routing.kept & (routing.experts == e)).sum()) for e in range(4)]
    assert rows.counts == (kept if rounded is None else rounded(kept))
    assert len(rows.token) == sum(rows.counts)
    x = torch.randn(23, 3, dtype=torch.float64, requires_grad=True)
    weights = routing.weights.detach().requires_grad_()
    number = torch.arange(1.0, 5).double().repeat_interleave(torch.tensor(rows.counts)).unsqueeze(1)
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
