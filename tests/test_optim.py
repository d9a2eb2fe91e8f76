"""fused_adam against fairseq's adam: parameters, state, and going from one to the other."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fairseq.optim import MemoryEfficientFP16Optimizer
from fairseq.optim.adam import FairseqAdam
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.optim.shard import shard_
from omegaconf import OmegaConf

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.optim import FairseqFusedAdam


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make(kind, seed=0, **flags):
    torch.manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(*shape)) for shape in [(3, 5), (7,), (2, 3, 4)]]
    cfg = {"adam_betas": "(0.9, 0.98)", "adam_eps": 1e-3, "weight_decay": 0.1, "lr": [0.01]}
    cfg.update(use_old_adam=False, fp16_adam_stats=False, tpu=False, **flags)
    return params, kind(OmegaConf.create(cfg), params)


def walk(params, optimizer, seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return params


def assert_equal(ours, theirs):
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_steps_are_those_of_fairseqs_adam():
    # With an epsilon this large its place shows.
    ours, stock = make(FairseqFusedAdam), make(FairseqAdam)
    assert_equal(walk(*ours, range(6)), walk(*stock, range(6)))
    assert ours[1].optimizer.param_groups[0]["eps"] == 1e-3


@pytest.mark.parametrize(
    "first, second", [(FairseqAdam, FairseqFusedAdam), (FairseqFusedAdam, FairseqAdam)]
)
def test_a_run_goes_on_with_either(first, second):
    whole = walk(*make(FairseqAdam), range(6))
    params, optimizer = make(first)
    walk(params, optimizer, range(3))
    state = optimizer.state_dict()
    assert state["state"][0]["step"] == 3 and isinstance(state["state"][0]["step"], int)
    others, other = make(second, seed=1)
    for a, b in zip(others, params):
        a.data.copy_(b.data)
    other.load_state_dict(state)
    assert_equal(walk(others, other, range(3, 6)), whole)


def half(params, optimizer):
    """As under --ddp-backend fully_sharded --fp16, whose parameters are float32."""
    common = {"fp16_init_scale": 4, "fp16_scale_window": 10, "fp16_scale_tolerance": 0.0}
    common.update(tpu=False, bf16=False, min_loss_scale=1e-4, threshold_loss_scale=None)
    cfg = {"common": {**common, "model_parallel_size": 1}, "optimization": {"update_freq": [1]}}
    cfg = OmegaConf.create({**cfg, "distributed_training": {"distributed_world_size": 2}})
    return MemoryEfficientFP16Optimizer(cfg, params, optimizer, allow_unsupported=True)


def sharded(params, optimizer):
    """As under --zero-sharding os."""
    shard_(optimizer, dist.group.WORLD)
    return optimizer


@pytest.mark.parametrize("wrap", [half, sharded])
@pytest.mark.parametrize("second", [FairseqAdam, FairseqFusedAdam])
@pytest.mark.parametrize("first", [FairseqAdam, FairseqFusedAdam])
def test_a_run_goes_on_in_wrappers_that_set_the_state_themselves(group_of_one, wrap, first, second):
    if wrap is sharded:
        pytest.importorskip("fairscale")
    whole = walk(*make(FairseqAdam), range(6))
    params, optimizer = make(first)
    optimizer = wrap(params, optimizer)
    walk(params, optimizer, range(3))
    if wrap is sharded:
        optimizer.optimizer.consolidate_state_dict()
    others, other = make(second, seed=1)
    other = wrap(others, other)
    for a, b in zip(others, params):
        a.data.copy_(b.data)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_equal(walk(others, other, range(3, 6)), whole)


@pytest.mark.parametrize("kind", [FairseqAdam, FairseqFusedAdam])
def test_amp_divides_gradients_by_the_loss_scale_once(kind):
    """And skips an update that overflows. The scaler that --amp makes works on a GPU alone."""
    expected, optimizer = make(kind)
    params, inner = make(kind)
    common = {"fp16_init_scale": 1024, "min_loss_scale": 1e-4}
    amp = AMPOptimizer(OmegaConf.create({"common": common, "optimizer": {}}), params, inner)
    amp._grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    for seed in range(3):
        walk(expected, optimizer, [seed])
        amp.zero_grad()
        amp.backward(sum((p * q.grad).sum() for p, q in zip(params, expected)))
        amp.clip_grad_norm(0.0)
        amp.step()
    assert_equal(params, expected)
    amp.backward(torch.inf * params[0].sum())
    amp.clip_grad_norm(0.0)
    amp.step()
    assert_equal(params, expected)
    assert amp.scaler.get_scale() == 512


def test_flags_of_adam_alone_are_refused():
    with pytest.raises(UserError, match="--fp16-adam-stats belongs to --optimizer adam"):
        cfg = SimpleNamespace(use_old_adam=False, fp16_adam_stats=True)
        FairseqFusedAdam(cfg, [])
