"""The criterion: its loss from its parts, its log keys, dense models, and a gate gone astray."""

import math
from types import SimpleNamespace

import pytest
import torch
from fairseq import metrics
from small_models import MOE, build_model, build_stock_model, make_task, random_tokens

from fairseq_moe_ext.criterions.moe_cross_entropy import MoECrossEntropyCriterion
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.moe.router import ROUTERS
from fairseq_moe_ext.moe.stats import METRICS


def make_criterion(**options):
    task = SimpleNamespace(target_dictionary=make_task().target_dictionary)
    defaults = dict(
        moe_gate_loss_wt=0.3,
        moe_gate_loss_combine_method="average",
        moe_gate_loss_transform="none",
        moe_z_loss_wt=0.0,
        moe_log_per_layer=False,
        sentence_avg=False,
    )
    return MoECrossEntropyCriterion(task, **{**defaults, **options})


@pytest.fixture
def sample():
    tokens = random_tokens()
    target = tokens.roll(-1, dims=1)
    target[1, 5:] = 1
    return {
        "net_input": {"src_tokens": tokens, "src_lengths": None},
        "target": target,
        "ntokens": int(target.ne(1).sum()),
    }


def parts(model, sample):
    """Cross-entropy in nats and the layers' records, the plain way."""
    logits, extra = model(sample["net_input"]["src_tokens"])
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), sample["target"].flatten(), ignore_index=1, reduction="sum"
    )
    return nll, extra["moe"]


def test_loss_is_the_sum_of_its_parts(sample):
    model = build_model(**MOE).double().train()
    nll, records = parts(model, sample)
    balance = [record.balance_loss for record in records]
    z = [record.z_loss for record in records]
    n = sample["ntokens"]
    for options, expected in [
        ({}, nll + 0.3 * n * sum(balance) / 2),
        ({"moe_gate_loss_combine_method": "sum"}, nll + 0.3 * n * sum(balance)),
        ({"moe_gate_loss_transform": "neg_log"}, nll - 0.3 * n * torch.log(sum(balance) / 2)),
        ({"moe_z_loss_wt": 0.2}, nll + 0.3 * n * sum(balance) / 2 + 0.2 * n * sum(z) / 2),
        ({"moe_gate_loss_wt": 0.0}, nll),
        ({"sentence_avg": True}, nll + 0.3 * 3 * sum(balance) / 2),
    ]:
        loss, sample_size, log = make_criterion(**options)(model, sample)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(log["inner_loss"], nll.detach())
        assert sample_size == (3 if options.get("sentence_avg") else n)


@pytest.mark.parametrize("transform", ["none", "neg_log"])
@pytest.mark.parametrize("rows", ["none", "padding"])
def test_a_batch_without_tokens_has_no_loss(sample, transform, rows):
    """As a process has that lacks a batch while others have one."""
    model = build_model(**MOE, use_moe_pad_mask=True).train()
    tokens, target = sample["net_input"]["src_tokens"], sample["target"]
    if rows == "none":
        tokens, target = tokens[:0], target[:0]
    tokens, target = tokens.clone().fill_(1), target.clone().fill_(1)
    empty = {"net_input": {"src_tokens": tokens, "src_lengths": None}, "target": target}
    criterion = make_criterion(moe_gate_loss_transform=transform, moe_z_loss_wt=0.1)
    loss, _, log = criterion(model, {**empty, "ntokens": 0})
    loss.backward()
    assert loss.item() == 0
    assert all(math.isfinite(value) for value in log.values())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_gradient_reaches_the_gates(sample):
    model = build_model(**MOE).train()
    loss, _, _ = make_criterion(moe_gate_loss_wt=1000.0)(model, sample)
    loss.backward()
    strong = model.decoder.layers[1].moe_layer.gate.wg.weight.grad.clone()
    model.zero_grad()
    make_criterion(moe_gate_loss_wt=0.0)(model, sample)[0].backward()
    assert strong.norm() > 10 * model.decoder.layers[1].moe_layer.gate.wg.weight.grad.norm()


def test_a_z_loss_that_is_off_may_be_infinite(sample):
    model = build_model(**MOE).train()
    for layer in (1, 3):
        model.decoder.layers[layer].moe_layer.gate.wg.weight.data *= 1e22
    assert math.isinf(parts(model, sample)[1][0].z_loss)
    assert math.isfinite(make_criterion(moe_z_loss_wt=0.0)(model, sample)[0])


def reduced(criterion, logs):
    with metrics.aggregate() as meters:
        criterion.reduce_metrics(logs)
    return meters.get_smoothed_values()


def test_logged_values(sample):
    model = build_model(**MOE).double().train()
    criterion = make_criterion(moe_z_loss_wt=0.1)
    loss, n, log = criterion(model, sample)
    logged = reduced(criterion, [log, log])  # two batches alike average to one
    nll, records = parts(model, sample)
    bits = n * math.log(2)
    assert logged["loss"] == pytest.approx(float(loss) / bits, abs=1e-3)
    assert logged["inner_loss"] == pytest.approx(float(nll) / bits, abs=1e-3)
    assert logged["ppl"] == pytest.approx(math.exp(float(nll) / n), rel=2e-3)
    gate_loss = sum(float(record.balance_loss) for record in records) / 2
    assert logged["moe_gate_loss"] == pytest.approx(gate_loss, abs=1e-7)
    z_loss = sum(float(record.z_loss) for record in records) / 2
    assert logged["moe_z_loss"] == pytest.approx(z_loss, abs=1e-7)
    for metric in METRICS:
        mean = sum(float(record.stats[metric]) for record in records) / 2
        assert logged[metric] == pytest.approx(mean, abs=1e-3)


def test_sentence_avg_logs_perplexity_per_token(sample):
    criterion = make_criterion(sentence_avg=True)
    model = build_model(**MOE).double().train()
    logged = reduced(criterion, [criterion(model, sample)[2]])
    nll, _ = parts(model, sample)
    assert logged["ppl"] == pytest.approx(math.exp(float(nll) / sample["ntokens"]), rel=2e-3)


def test_top1_logs_its_overflow_too(sample):
    criterion = make_criterion()
    model = build_model(**{**MOE, "moe_top1_expert": True, "moe_capacity_factor": 0.5}).train()
    logged = reduced(criterion, [criterion(model, sample)[2]])
    assert logged["overflow_expert1"] > 0
    assert not any("expert2" in key for key in logged)


def test_per_layer_figures_on_request(sample):
    criterion = make_criterion(moe_log_per_layer=True)
    model = build_model(**MOE).train()
    logged = reduced(criterion, [criterion(model, sample)[2]])
    _, records = parts(model, sample)
    for record in records:
        value = logged[f"layer{record.layer}_gate_loss"]
        assert value == pytest.approx(float(record.balance_loss), abs=1e-3)
        assert f"layer{record.layer}_entropy_gating" in logged


def test_dense_models_ours_and_stock(sample):
    for model in (build_model().double(), build_stock_model(0)):
        criterion = make_criterion()
        loss, n, log = criterion(model, sample)
        logits = model(sample["net_input"]["src_tokens"])[0]
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), sample["target"].flatten(), ignore_index=1, reduction="sum"
        )
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
        logged = reduced(criterion, [log])
        assert set(logged) == {"loss", "inner_loss", "ppl"}


def test_without_reduction_the_loss_is_per_token(sample):
    model = build_model().double()
    loss, _, _ = make_criterion()(model, sample, reduce=False)
    assert loss.shape == (36,)
    summed, _, _ = make_criterion()(model, sample)
    torch.testing.assert_close(loss.sum().double(), summed, rtol=1e-6, atol=0)


def test_other_keys_of_a_log_are_left_alone(sample):
    criterion = make_criterion()
    log = criterion(build_model(**MOE).train(), sample)[2]
    assert "a_task_s_own" not in reduced(criterion, [{**log, "a_task_s_own": 3.0}])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("router", [name for name, kind in ROUTERS.items() if kind.learned])
def test_nan_in_a_gate_names_the_layer(sample, router, training):
    model = build_model(**MOE, moe_router=router).train(training)
    model.decoder.layers[3].moe_layer.gate.wg.weight.data[0, 0] = math.nan
    model.decoder.router_updates.begin()  # so that it observes
    with pytest.raises(UserError, match="router of layer 3"):
        make_criterion()(model, sample)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_nan_in_a_gate_is_told_a_batch_later_on_a_gpu(sample):
    model = build_model(**MOE).train().cuda()
    model.decoder.layers[3].moe_layer.gate.wg.weight.data[0, 0] = math.nan
    sample["net_input"]["src_tokens"] = sample["net_input"]["src_tokens"].cuda()
    sample["target"] = sample["target"].cuda()
    criterion = make_criterion()
    criterion(model, sample)
    with pytest.raises(UserError, match="router of layer 3"):
        criterion(model, sample)


@pytest.mark.parametrize("name", ["moe_gate_loss_wt", "moe_z_loss_wt"])
@pytest.mark.parametrize("weight", [-0.1, math.nan, math.inf])
def test_weights_that_are_none(name, weight):
    with pytest.raises(UserError, match="--" + name.replace("_", "-")):
        make_criterion(**{name: weight})
