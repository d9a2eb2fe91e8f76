"""Every router equals its plain loop, and has the properties that docs/routers.md says it has.

Parametrised over the registered routers: a new one is tested once router_loops.py has its loop."""

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_near
from router_loops import LOOPS, Case, balance, best_assignment, l1, table

from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import ROUTERS, GateSettings
from fairseq_moe_ext.moe.routers.base import PRECISION, balanced_assignment
from fairseq_moe_ext.moe.routers.hash import balanced_table, plain_table
from fairseq_moe_ext.moe.routers.sinkhorn import sinkhorn
from fairseq_moe_ext.moe.routers.threshold import BINS, RANGE, STEPS, histogram, upper_quantile

NAMES = sorted(name for name in LOOPS)
DIM, FFN, TYPES = 5, 7, 12
COUNTS = [1, 40, 3, 30, 17, 2, 2, 9, 0, 5, 11, 4]


def test_every_router_has_a_loop():
    ours = {n for n, kind in ROUTERS.items() if kind.__module__.startswith("fairseq_moe_ext")}
    assert ours == set(LOOPS)


def settings_of(name, k=2, **options):
    """GateSettings without dropping and without noise, as far as the router heeds them."""
    k = ROUTERS[name].default_top_k if k is None or name == "base" else k
    options = {o: v for o, v in options.items() if o in ROUTERS[name].heeds | {"top_groups"}}
    if "groups" not in options:
        options.pop("top_groups", None)
    return GateSettings(top_k=k, dropless=True, second_expert_policy="all", **options)


def layer_of(name, experts=4, seed=0, settings=None, **options):
    torch.manual_seed(seed)
    settings = settings or settings_of(name, **options)
    layer = MoELayer.build(DIM, FFN, experts, settings, router=name, token_counts=COUNTS).double()
    for p in layer.parameters():
        p.data.normal_(std=0.7)
    return layer


def batch(tokens=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, DIM, generator=generator).double()
    return x, torch.randint(TYPES, (tokens,), generator=generator)


def adapted(layer, updates=1):
    """The layer after updates, on other batches."""
    for seed in range(100, 100 + updates):
        x, ids = batch(40, seed)
        layer.gate.after_update(observed(layer, x, ids))
    return layer


def observed(layer, x, ids, padding=None):
    logits, routing = layer.gate(x, padding, token_ids=ids)
    return layer.gate.observe(logits, routing, padding)


def truth(name, layer, x, case):
    """Output, balancing loss and router's loss by the loop, differentiable in x and the weights."""
    gate, experts = layer.gate, layer.experts
    if name == "hash":
        logits = x.new_zeros(len(x), gate.num_experts)
    else:
        logits = torch.stack([torch.stack([(row * w).sum() for w in gate.wg.weight]) for row in x])
    choices = LOOPS[name](logits, case)
    rows = []
    for t, row in enumerate(x):
        out = torch.zeros_like(row)
        for e, weight in choices[t]:
            hidden = F.gelu(experts.fc1.weight[e] @ row + experts.fc1.bias[e])
            out = out + weight * (experts.fc2.weight[e] @ hidden + experts.fc2.bias[e])
        rows.append(out)
    own = l1(logits, choices, case, float(gate.l1_weight)) if name == "relu" else None
    return torch.stack(rows), balance(name, logits, choices, case), own, choices


def clear_cut(name, layer, x, case):
    """Whether the best assignment is better than the second by more than the auction's step."""
    if name != "base" or not (case.training or case.balanced_evaluation):
        return True
    logits = layer.gate.wg(x).detach()[case.real(len(x))]
    first, second, _ = best_assignment(logits.tolist(), logits.size(1))
    return first - second > len(logits) * PRECISION * float(
        logits.max() - logits.min().clamp(max=0)
    )


OPTIONS = {
    "plain": {},
    "sigmoid": {"score": "sigmoid"},
    "scaled": {"route_scale": 2.5, "normalize_weights": "none"},
    "padding": {},
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_it_equals_its_loop(name, options, training):
    """Output, losses, loads, and the gradients of everything."""
    compared = 0
    for seed in range(8):
        for k in (1, 2, 3) if name != "base" else (1,):
            layer = layer_of(name, seed=seed, k=k, **OPTIONS[options])
            if seed % 2:
                adapted(layer)
            if name == "relu":
                layer.gate.l1_weight.fill_(0.3)
            layer.train(training)
            x, ids = batch(6, seed)
            padding = torch.zeros(6, dtype=torch.bool)
            if options == "padding":
                padding[[1, 4]] = True
            s, learned = layer.gate.settings, name == "threshold" and seed % 2
            case = Case(
                k, training, s.score, s.route_scale,
                normalize=s.normalize == "after" and "normalize_weights" in layer.gate.heeds,
                padding=padding.tolist(), tokens=ids.tolist(), counts=COUNTS,
                threshold=layer.gate.threshold.tolist() if learned else None,
            )  # fmt: skip
            if not clear_cut(name, layer, x, case):
                continue
            compared += 1
            compare(name, layer, x, ids, padding, case)
    assert compared > 3


def compare(name, layer, x, ids, padding, case):
    ours, true = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = layer(ours, padding, token_ids=ids)
    out, loss, own, choices = truth(name, layer, true, case)
    assert_near(found.out, out, 1e-9, "out")
    assert_near(found.balance_loss, loss, 1e-9, "balance loss")
    assert (found.router_loss is None) == (own is None)
    load = [sum(e == expert for c in choices for expert, _ in c) for e in range(4)]
    sums = observed(layer, x, ids, padding)
    assert found.expert_counts.sum(dim=0).tolist() == load == sums["load"].tolist()
    assert sums["tokens"].item() == len(case.real(len(x)))

    r = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    total = (found.out * r).sum() + 0.7 * found.balance_loss
    true_total = (out * r).sum() + 0.7 * loss
    if own is not None:
        assert_near(found.router_loss, own, 1e-9, "router's loss")
        total, true_total = total + found.router_loss, true_total + own
    parameters = list(layer.parameters())
    given = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
    expected = torch.autograd.grad(true_total, [true, *parameters], **given)
    for grad, right in zip(torch.autograd.grad(total, [ours, *parameters], **given), expected):
        assert_near(grad, right, 1e-8, "gradient", scale=1 + float(right.abs().max()))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("groups, top_groups, k", [(4, 1, 2), (4, 2, 3), (2, 1, 4), (4, 2, 4)])
def test_groups_limit_the_choice(groups, top_groups, k, score):
    options = {"groups": groups, "top_groups": top_groups, "score": score}
    limited = 0
    for seed in range(5):
        layer = layer_of("topk", experts=8, seed=seed, k=k, **options)
        x, ids = batch(6, seed)
        case = Case(k, True, score, normalize=k > 1, groups=groups, top_groups=top_groups)
        out, _, _, choices = truth("topk", layer, x, case)
        assert_near(layer(x).out, out, 1e-9, "out")
        assert all(len({e // (8 // groups) for e, _ in c}) <= top_groups for c in choices)
        plain = layer_of("topk", experts=8, seed=seed, k=k, score=score)
        limited += not torch.equal(plain(x).out, layer(x).out)
    assert limited > 0


@pytest.mark.parametrize("when", ["training", "evaluation"])
@pytest.mark.parametrize("name", NAMES)
def test_no_token_sees_the_future(name, when):
    """Unless the router says so, and then it does: the test would notice."""
    seen = 0
    for seed in range(10):
        layer = adapted(layer_of(name, seed=seed)).train(when == "training")
        x, ids = batch(8, seed)
        before = layer(x, token_ids=ids).out
        for t in range(1, 8):
            other, other_ids = x.clone(), ids.clone()
            other[t:], other_ids[t:] = -3 * other[t:], (ids[t:] + 1) % TYPES
            after = layer(other, token_ids=other_ids).out
            seen += not torch.allclose(before[:t], after[:t], rtol=1e-10, atol=1e-12)
    leaks = name == "expert_choice" or (when == "training" and not ROUTERS[name].causal)
    assert (seen > 0) == leaks


@pytest.mark.parametrize("name", [name for name in NAMES if name != "expert_choice"])
def test_at_evaluation_a_row_does_not_depend_on_its_batch(name):
    layer = adapted(layer_of(name)).eval()
    x, ids = batch(12)
    whole = layer(x, token_ids=ids).out
    for t in range(12):
        alone = layer(x[t : t + 1], token_ids=ids[t : t + 1]).out
        assert_near(alone, whole[t : t + 1], 1e-12, "row")


def test_balanced_evaluation_of_base_sees_the_batch():
    layer = layer_of("base", balanced_evaluation=True).eval()
    x, _ = batch(12)
    assert layer(x).expert_counts.tolist() == [[3, 3, 3, 3]]
    layer.gate.settings = layer.gate.settings._replace(balanced_evaluation=False)
    assert (
        layer(x).expert_counts[0].tolist()
        == torch.bincount(layer.gate.wg(x).argmax(1), minlength=4).tolist()
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", [n for n in NAMES if ROUTERS[n].learned])
def test_the_gradient_of_the_gate_is_that_of_finite_differences(name, score):
    """With one expert a token, where a normalised weight would be 1 whatever the gate says."""
    layer = adapted(layer_of(name, k=1, score=score))
    x, ids = batch(8)
    weight = layer.gate.wg.weight
    r = torch.randn(x.shape, dtype=torch.float64)

    def loss():
        return (layer(x, token_ids=ids).out * r).sum()

    (grad,) = torch.autograd.grad(loss(), weight)
    assert grad.abs().max() > 1e-3
    step = 1e-6
    for index in [(0, 0), (1, 2), (2, 4), (3, 1)]:
        with torch.no_grad():
            weight[index] += step
            above = loss()
            weight[index] -= 2 * step
            below = loss()
            weight[index] += step
        assert_near(grad[index], (above - below) / (2 * step), 1e-5, "gradient", scale=1.0)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_observed_sums_over_batches(name):
    """Two micro-batches, or two processes, give what one of both gives, where each token is routed
    by itself."""
    if not ROUTERS[name].causal:
        pytest.skip("routes batches, not tokens")
    layer = adapted(layer_of(name))
    x, ids = batch(10)
    whole = observed(layer, x, ids)
    parts = [observed(layer, x[p], ids[p]) for p in (slice(0, 4), slice(4, 10))]
    assert whole.keys() == parts[0].keys()
    for key in whole:
        torch.testing.assert_close(parts[0][key] + parts[1][key], whole[key])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_in_half_precision_and_keeps_its_state(name, dtype):
    layer = adapted(layer_of(name), updates=2)
    state = {n: layer.gate._buffers[n].clone() for n in layer.gate._state_names}
    layer.to(dtype)
    x, ids = batch(10)
    x = x.to(dtype).requires_grad_()
    found = layer(x, token_ids=ids)
    loss = found.out.float().sum() + found.balance_loss
    (loss if found.router_loss is None else loss + found.router_loss).backward()
    assert found.out.dtype == dtype and x.grad.isfinite().all()
    for n, before in state.items():
        assert layer.gate._buffers[n].dtype == before.dtype
        assert torch.equal(layer.gate._buffers[n], before)


def test_a_state_survives_fsdp_s_cast_by_assignment():
    gate = layer_of("relu").gate
    gate.l1_weight.fill_(3e-9)
    gate.l1_weight = gate.l1_weight.half()  # 0 in float16
    assert gate.l1_weight.dtype == torch.float64 and float(gate.l1_weight) == 3e-9


@pytest.mark.parametrize("name", NAMES)
def test_its_state_survives_a_state_dict(name):
    layer = adapted(layer_of(name), updates=3)
    other = layer_of(name, seed=9)
    if name == "hash":
        other.gate.set_token_counts(COUNTS[::-1])
    other.load_state_dict(layer.state_dict())
    x, ids = batch(10)
    found, wanted = (one(x, token_ids=ids) for one in (other.eval(), layer.eval()))
    assert torch.equal(found.out, wanted.out)


# ---- of single routers


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
