"""Memory grows linearly in tokens: no tensor of tokens x experts x capacity, no weight copies."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import GateSettings


class Ledger(TorchDispatchMode):
    """Notes the numbers in every new tensor that an operator returns, backward included."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.total = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        held = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if tensor(t)}
        for leaf in tree_leaves(result):
            # neither view nor in-place
            if tensor(leaf) and leaf.untyped_storage()._cdata not in held:
                self.largest = max(self.largest, leaf.numel())
                self.total += leaf.numel()
        return result


def tensor(value):
    return isinstance(value, torch.Tensor)


def measure(tokens, experts, dim=16, hidden=16, **settings):
    """Numbers in the largest tensor and in all tensors made by a forward and backward pass."""
    torch.manual_seed(0)
    layer = MoELayer.build(dim, hidden, experts, GateSettings(**settings))
    x = torch.randn(tokens, dim, requires_grad=True)
    mask = torch.rand(tokens) < 0.1
    with Ledger() as ledger:
        output = layer(x, mask)
        (output.out.sum() + output.balance_loss + output.z_loss).backward()
    return ledger


def test_the_ledger_sees_what_it_should():
    weights = torch.randn(4, 5, requires_grad=True)
    with Ledger() as ledger:
        (weights.t().contiguous() @ weights).sum().backward()
    # t() is a view; its copy (20), the product (25), the sum (1) and the backward tensors are new.
    assert ledger.largest == 25
    assert ledger.total >= 20 + 25 + 1


SETTINGS = [
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 2, "dropless": True},
    {"top_k": 2, "batch_prioritized": True},
    {"top_k": 2, "second_expert_policy": "random", "normalize_before_dropping": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_largest_tensor_is_tokens_by_experts_or_weights(settings):
    tokens, experts, dim, hidden = 512, 32, 16, 24
    largest = measure(tokens, experts, dim, hidden, **settings).largest
    rows = tokens * settings["top_k"] * max(dim, hidden)
    bound = max(tokens * experts, rows, experts * dim * hidden)
    capacity = settings["top_k"] * tokens // experts
    assert largest <= bound
    assert bound * 8 < tokens * experts * capacity, "the bound would not notice"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_total_grows_linearly_in_tokens(settings):
    totals = [measure(tokens, 16, **settings).total for tokens in (256, 512, 1024)]
    # Doubling the tokens doubles the growth: quadratic memory would make it four times as much.
    assert totals[2] - totals[1] <= 2.1 * (totals[1] - totals[0])


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_total_grows_linearly_in_experts(settings):
    """With a few tokens all cost is in the weights and their gradients, once each: indexing the
    stacked weights expert by expert under autograd would make a gradient of all of them each time.
    """
    experts, dim, hidden = 64, 16, 16
    total = measure(8, experts, dim, hidden, **settings).total
    assert total <= 4 * 2 * experts * dim * hidden + 100 * 8 * (experts + dim + hidden)


def test_without_gradients_no_hidden_numbers_of_all_experts():
    layer = MoELayer.build(16, 64, 4, GateSettings(top_k=1, dropless=True))
    with torch.no_grad(), Ledger() as ledger:
        layer(torch.randn(4000, 16))
    assert ledger.largest < 4000 * 64
