"""What single routers promise, and noise on inputs and outputs of any."""

import math

import pytest
import torch
from closeness import assert_near
from router_layers import adapted, batch, layer_of, observed, settings_of
from router_loops import best_assignment, table

from fairseq_moe_ext.moe.routers.base import PRECISION, balanced_assignment
from fairseq_moe_ext.moe.routers.hash import balanced_table, plain_table
from fairseq_moe_ext.moe.routers.sinkhorn import sinkhorn
from fairseq_moe_ext.moe.routers.threshold import BINS, RANGE, STEPS, histogram, upper_quantile


def test_sinkhorn_s_plan_has_equal_columns_and_rows_of_one():
    torch.manual_seed(0)
    plan = sinkhorn(torch.randn(60, 6) * 2)
    torch.testing.assert_close(plan.sum(1), torch.ones(60, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 10.0).double(), rtol=1e-3, atol=0)


def test_sinkhorn_balances_what_the_scores_do_not():
    layer = layer_of("sinkhorn", k=1)
    x, _ = batch(200)
    x = x + 2 * layer.gate.wg.weight[0].detach()
    uneven, even = layer.eval()(x).stats["load_max"], layer.train()(x).stats["load_max"]
    assert even < 1.1 < 1.6 < uneven


@pytest.mark.parametrize("tokens, experts", [(1, 3), (4, 3), (6, 3), (7, 2), (5, 1)])
def test_the_assignment_is_the_best_one(tokens, experts):
    for seed in range(20):
        scores = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(seed))
        owner = balanced_assignment(scores)
        assert torch.bincount(owner, minlength=experts).max() <= -(-tokens // experts)
        found = float(scores.double()[torch.arange(tokens), owner].sum())
        best = best_assignment(scores.double().tolist(), experts)[0] if experts > 1 else found
        assert (
            best - found
            <= tokens * PRECISION * float(scores.max() - scores.min().clamp(max=0)) + 1e-9
        )


@pytest.mark.parametrize("kind", ["equal", "one expert", "nan", "ties", "large"])
def test_the_assignment_ends(kind):
    torch.manual_seed(0)
    scores = {
        "equal": torch.zeros(50, 7),
        "one expert": torch.tensor([9.0, 0, 0, 0]).expand(40, 4),
        "nan": torch.full((10, 4), float("nan")),
        "ties": torch.randint(0, 2, (300, 8)).float(),
        "large": torch.randn(2000, 16) * 1e4 + torch.arange(16) * 1e4,
    }[kind]
    counts = torch.bincount(balanced_assignment(scores), minlength=scores.size(1))
    assert counts.max() <= -(-len(scores) // scores.size(1))


def test_the_table_of_hash_balances_by_frequency():
    zipf = [10_000 // (rank + 1) for rank in range(500)]
    for k in (1, 2):
        table_ = balanced_table(zipf, 8, k)
        assert table_ == table(zipf, 8, k)
        loads = [sum(f for f, experts in zip(zipf, table_) if e in experts) for e in range(8)]
        assert max(loads) <= max(1.02 * sum(loads) / 8, zipf[0])
        assert all(len(set(experts)) == k for experts in table_)


@pytest.mark.parametrize("experts, k", [(8, 2), (6, 3), (256, 4)])
def test_the_experts_of_an_id_are_no_fixed_group(experts, k):
    """Experts that always act together are one of k times the width."""
    zipf = [1_000_000 // (rank + 1) for rank in range(4000)]
    for found in (balanced_table(zipf, experts, k), plain_table(4000, experts, k)):
        # experts / k of them, if the least loaded stay equal
        sets = {frozenset(row) for row in found}
        assert len(sets) > min(0.9 * math.comb(experts, k), 0.8 * len(zipf))


def test_without_frequencies_it_is_a_plain_hash():
    plain = plain_table(1000, 8, 2)
    assert all(0 <= e < 8 for row in plain for e in row)
    assert all(len(set(row)) == 2 for row in plain)
    counts = [sum(e in row for row in plain) for e in range(8)]
    assert min(counts) > 200  # of 250
    layer = layer_of("hash", experts=8)
    layer.gate.set_token_counts([1] * 1000)
    assert layer.gate.table.tolist() == plain


def test_hash_without_tokens_says_so():
    with pytest.raises(ValueError, match="token_ids"):
        layer_of("hash")(batch()[0])


def test_the_quantile_is_that_of_the_values():
    torch.manual_seed(0)
    values = torch.randn(4000, 3, dtype=torch.float64) * torch.tensor([1.0, 3.0, 0.2])
    counts = histogram(values, None)
    assert counts.shape == (3, BINS) and counts.sum() == 12_000
    found = upper_quantile(counts, torch.tensor([1000.0, 40.0, 2000.0]).double())
    exact = [
        values[:, e].sort(descending=True).values[n - 1] for e, n in enumerate((1000, 40, 2000))
    ]
    torch.testing.assert_close(found, torch.stack(exact), atol=1 / STEPS, rtol=0)
    out = histogram(torch.tensor([[99.0], [-99.0], [0.0]]), torch.tensor([True, True, False]))
    assert out[0, 0] == out[0, -1] == 1 and out.sum() == 2
    assert float(upper_quantile(out, torch.tensor([1.0]).double())) == RANGE - 1 / STEPS


def test_threshold_is_in_the_range_of_its_histogram():
    """Of logits that are all higher, no update lifts it beyond, and the expert takes each token."""
    layer = layer_of("threshold", k=1, score="sigmoid")
    with torch.no_grad():
        layer.gate.wg.weight[1:] = 0
    x = layer.gate.wg.weight[0].detach() * torch.linspace(40, 80, 20).double()[:, None]
    x = x / layer.gate.wg.weight[0].detach().square().sum()
    for _ in range(3):
        layer.gate.after_update(observed(layer, x, None))
    assert RANGE - 1 / STEPS <= layer.gate.threshold[0] <= RANGE
    assert layer.gate(x)[1].counts.sum(0)[0] == 20, "not a quarter of them"


def test_threshold_takes_k_experts_a_token_on_average():
    layer = adapted(layer_of("threshold", experts=8, score="sigmoid"), updates=20)
    x, _ = batch(2000, seed=7)
    load = observed(layer, x, None)["load"] / 2000
    assert float(load.sum()) == pytest.approx(2.0, rel=0.1)
    assert float(load.max()) < 0.4  # each expert a quarter


def test_the_moving_quantile_weighs_the_first_updates_alike():
    layer = layer_of("threshold", k=1, threshold_decay=0.75)
    quantiles, state = [], None
    for seed in range(6):
        sums = observed(layer, *batch(50, seed))
        quantiles.append(upper_quantile(sums["histogram"], torch.full((4,), 12.5).double()))
        layer.gate.after_update(sums)
        rate = max(0.25, 1 / (seed + 1))
        state = quantiles[-1] if state is None else state + rate * (quantiles[-1] - state)
        torch.testing.assert_close(layer.gate.threshold, state)


def test_relu_becomes_sparse_and_its_loss_follows_the_sign_of_the_error():
    layer = layer_of("relu", experts=8, k=2)
    layer.gate.l1_weight.fill_(1e-3)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    actives = []
    for update in range(150):
        x = 1 + batch(64, update)[0]
        found, sums = layer(x), observed(layer, x, None)
        optimizer.zero_grad()
        (found.router_loss + (found.out - x.abs()).square().mean()).backward()
        optimizer.step()
        before = float(layer.gate.l1_weight)
        layer.gate.after_update(sums)
        actives.append(float(sums["load"].sum()) / 64)
        sign = (actives[-1] > 2) - (actives[-1] < 2)
        assert float(layer.gate.l1_weight) == pytest.approx(before * 1.2**sign)
    assert actives[0] > 4 and actives[-1] < 2


def test_relus_loss_comes_back_after_any_number_of_updates_with_few_experts():
    gate = layer_of("relu", experts=8, k=6).gate
    few = {"load": torch.tensor([[1.0]]), "tokens": torch.tensor([[64.0]])}
    many = {"load": torch.tensor([[512.0]]), "tokens": torch.tensor([[64.0]])}
    for _ in range(5000):
        gate.after_update(few)
    for _ in range(102):  # 1.2 ** 102 is 1e8
        gate.after_update(many)
    assert float(gate.l1_weight) > 1e-8


@pytest.mark.parametrize("router, trains", [("random", False), ("hash", False), ("topk", True)])
def test_losses_on_a_gate_that_is_not_trained_train_nothing_else(router, trains):
    layer, plain = layer_of(router), layer_of("topk")
    x, ids = batch(9)
    x.requires_grad_()
    found = layer(x, token_ids=ids)
    assert found.balance_loss.requires_grad == found.z_loss.requires_grad == trains
    found.out.sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    if router == "random":  # but they are logged as ever
        plain.load_state_dict(layer.state_dict())
        expected = plain(x, token_ids=ids)
        assert torch.equal(found.balance_loss, expected.balance_loss)
        assert torch.equal(found.z_loss, expected.z_loss)


def test_random_has_nothing_to_train_and_its_gate_is_saved():
    layer = layer_of("random")
    assert [n for n, _ in layer.gate.named_parameters()] == []
    assert "gate.wg.weight" in layer.state_dict()


# ---- noise on inputs and outputs


def test_jitter_is_of_the_gate_s_input_in_training():
    layer = layer_of("topk", input_jitter=0.3)
    x, _ = batch(500)
    torch.manual_seed(3)
    noisy, _ = layer.gate(x)
    torch.manual_seed(3)
    factor = torch.empty_like(x).uniform_(0.7, 1.3)
    assert_near(noisy, (x * factor) @ layer.gate.wg.weight.T, 1e-12, "logits")
    assert 0.7 <= factor.min() < 0.72 and 1.28 < factor.max() < 1.3
    plain, _ = layer.eval().gate(x)
    assert_near(plain, x @ layer.gate.wg.weight.T, 1e-12, "logits")


@pytest.mark.parametrize("which", ["eom", "fom"])
def test_masking_of_outputs(which):
    settings = settings_of("topk")._replace(**{which: 0.3})
    layer = layer_of("topk", settings=settings)
    x, _ = batch(3000)
    plain = layer.eval().gate(x)[1].weights
    masked = layer.train().gate(x)[1].weights
    zero = masked == 0
    assert_near(masked[~zero], plain[~zero] / 0.7, 1e-12, "what is left")
    both = float(zero.all(dim=1).double().mean())
    assert float(zero.double().mean()) == pytest.approx(0.3, abs=0.02)
    assert both == pytest.approx(0.09 if which == "eom" else 0.3, abs=0.02)
    assert layer(x).expert_counts.sum() == 6000  # the choice is as it was


@pytest.mark.parametrize("product", [False, True])
def test_the_product_in_float32(product):
    """Its weight is float32 in the product alone; without it, logits are rounded before."""
    settings = settings_of("topk")._replace(use_fp32=True, fp32_product=product)
    layer = layer_of("topk", settings=settings).bfloat16()
    x = batch(50)[0].bfloat16()
    logits, _ = layer.gate(x)
    exact = x.double() @ layer.gate.wg.weight.double().T
    assert logits.dtype == torch.float32
    assert (float((logits - exact).abs().max()) < 1e-5) == product
    if product:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert float((layer.gate(x)[0] - exact).abs().max()) < 1e-5
