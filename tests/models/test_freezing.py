"""--moe-freeze: what is frozen stays to the bit, with weight decay too, on one process and on two;
and --moe-expert-dropout, which is for experts alone."""

import pytest
import torch
from processes import run_processes
from small_models import MOE, build_model, random_tokens
from updates import UPDATES, WORLD, assert_same, configure, train

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.kernels.batched_ffn import by_chunk

ADAM = "--optimizer adam --lr 0.05 --weight-decay 0.1"
PARTS = {
    "none": set(),
    "gate": {"gate"},
    "experts": {"experts"},
    "gate_and_experts": {"gate", "experts"},
}


def part_of(name):
    return "experts" if ".experts." in name else "gate" if ".gate." in name else "rest"


@pytest.mark.parametrize("choice", PARTS)
def test_what_is_frozen_stays_and_all_else_moves(folder, choice):
    cfg = configure(folder, f"--moe-expert-count 4 {ADAM} --moe-freeze {choice}")
    # float32, as stock's gradient norm, without experts, takes no float64
    start, end = (
        train(0, cfg, "legacy_ddp", 1, updates=updates, dtype=torch.float32).parameters
        for updates in (0, 3)
    )
    moved = {part: False for part in ("gate", "experts", "rest")}
    for name in start:
        if part_of(name) in PARTS[choice]:
            assert torch.equal(start[name], end[name]), name
        moved[part_of(name)] |= not torch.equal(start[name], end[name])
    assert {part for part in moved if not moved[part]} == PARTS[choice]


@pytest.mark.parametrize("choice", ["gate", "experts"])
@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_two_processes_equal_one(folder, choice, backend):
    cfg = configure(folder, f"--moe-expert-count 4 {WORLD} --moe-freeze {choice}")
    one = train(0, cfg, backend, 1, dtype=torch.float32)
    many = run_processes(2, train, cfg, backend, 2, 1, None, UPDATES, torch.float32)
    assert_same(one, many, 4, rtol=1e-5)


@pytest.mark.parametrize("choice", PARTS)
def test_losses_of_a_frozen_gate_train_nothing(choice):
    """Else they would train the layers before it to suit a gate that does not change."""
    layer = build_model(**MOE, moe_freeze=choice).decoder.layers[1].moe_layer
    x = torch.randn(20, 16, requires_grad=True)
    out = layer(x)
    assert out.balance_loss > 0 and out.z_loss > 0
    trains = out.balance_loss.requires_grad, out.z_loss.requires_grad
    assert trains == (("gate" not in PARTS[choice]),) * 2
    out.out.sum().backward()
    assert x.grad.any()


def test_a_dense_model_has_nothing_to_freeze():
    with pytest.raises(UserError, match="--moe-freeze gate: a dense model"):
        build_model(moe_freeze="gate")
    with pytest.raises(UserError, match="--moe-freeze gates is unknown: use none, gate, experts"):
        build_model(**MOE, moe_freeze="gates")


def test_experts_have_a_dropout_of_their_own(monkeypatch):
    tokens = random_tokens()
    plain = build_model(**MOE, moe_dropless=True)
    model = build_model(**MOE, moe_dropless=True, moe_expert_dropout=0.5)
    for layer in model.decoder.layers:
        assert layer.activation_dropout == 0
    masks = []

    def recorded(x, chunks, weights, activation, mask, *rest):
        masks.append(mask)
        return by_chunk(x, chunks, weights, activation, mask, *rest)

    monkeypatch.setattr("fairseq_moe_ext.moe.experts.by_chunk", recorded)
    model.train()(tokens)
    assert len(masks) == 2 and all(set(mask.unique().tolist()) == {0, 2} for mask in masks)
    assert all(0.4 < float((mask == 0).double().mean()) < 0.6 for mask in masks)
    masks.clear()
    logits = model.eval()(tokens)[0]
    assert masks == [None, None]
    assert torch.equal(logits, plain.eval()(tokens)[0])


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_a_dropout_that_is_none(value):
    with pytest.raises(UserError, match="--moe-expert-dropout .* is out of range"):
        build_model(**MOE, moe_expert_dropout=value)
