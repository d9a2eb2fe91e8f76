"""N processes equal one: the layer, its losses, figures and gradients."""

import pytest
import torch
import torch.distributed as dist
from processes import run_processes

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.expert_parallel import ExpertParallel, WorldScope, placement
from fairseq_moe_ext.moe.exchange import HERE
from fairseq_moe_ext.moe.layer import MoELayer
from fairseq_moe_ext.moe.router import GateSettings

DIM, FFN, TOKENS = 6, 10, 24


@pytest.mark.parametrize("experts, world", [(8, 2), (4, 4), (2, 4), (1, 3), (6, 1), (2, 8)])
def test_placement_covers_every_expert_once_in_each_set_of_holders(experts, world):
    places = [placement(experts, world, rank) for rank in range(world)]
    for rank, place in enumerate(places):
        assert rank in place.holders and rank in place.replicas
        held = [places[r].first + i for r in place.holders for i in range(place.local)]
        assert held == list(range(experts))
        assert all(places[r].first == place.first for r in place.replicas)
        assert len(place.holders) * len(place.replicas) == world


def test_placement_names_numbers_that_would_do():
    words = "6 cannot be spread over 4 processes.* 2, 4, 8 experts would do, or 2, 3, 6 processes"
    with pytest.raises(UserError, match=words):
        placement(6, 4, 0)
    with pytest.raises(UserError, match=" 510, 513, 516 experts would do, or 1, 2, 4 processes"):
        placement(512, 3, 0)


def sizes_of(world, uneven):
    """Tokens of each process; the last may have none."""
    if not uneven:
        return [TOKENS // world] * world
    sizes = [3 * (world - rank) for rank in range(world)]
    sizes[0] += TOKENS - sum(sizes) + sizes[-1]
    sizes[-1] = 0
    return sizes


def build(experts, settings, exchange=HERE, **options):
    torch.manual_seed(5)
    options = {"grad_scale": 1.0, **options}
    return MoELayer.build(DIM, FFN, experts, settings, exchange=exchange, **options).double()


def inputs():
    torch.manual_seed(6)
    x = torch.randn(TOKENS, DIM, dtype=torch.float64)
    # uneven use of the experts, so that capacity drops some
    return x + x[:, :1], torch.randn(TOKENS, DIM, dtype=torch.float64), torch.rand(TOKENS) < 0.2


def step(layer, x, weight, padding, share=1.0):
    """Forward and backward; `share` is this process's share of the scope's loss."""
    x = x.clone().requires_grad_()
    result = layer(x, padding)
    loss = (result.out * weight).sum() + share * (result.balance_loss + 0.1 * result.z_loss)
    loss.backward()
    return {
        "out": result.out.detach(),
        "balance_loss": result.balance_loss.detach(),
        "z_loss": result.z_loss.detach(),
        "stats": result.stats,
        "x": x.grad,
        "gate": layer.gate.wg.weight.grad,
        "experts": [p.grad for p in layer.experts.parameters()],
        "weights": [p.detach() for p in layer.experts.parameters()],
    }


def in_a_process(rank, experts, settings, sizes, scope):
    parallel = ExpertParallel(experts)
    options = {"scope": WorldScope()} if scope == "world" else {}
    layer = build(experts, settings, parallel, **options)
    mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    # Data-parallel training sums the processes' losses; each has its tokens' share of the world's.
    share = sizes[rank] / TOKENS if scope == "world" else 1.0
    result = step(layer, *(t[mine] for t in inputs()), share=share)
    dist.all_reduce(result["gate"])
    return result


def combined(results, experts):
    """The processes' results as one process would have them."""
    world = len(results)
    holders = placement(experts, world, 0).holders
    whole = {key: torch.cat([r[key] for r in results]) for key in ("out", "x")}
    for key in ("experts", "weights"):
        whole[key] = [torch.cat(parts) for parts in zip(*(results[r][key] for r in holders))]
    whole["gate"] = results[0]["gate"]
    for rank, result in enumerate(results):  # replicas agree
        twin = results[rank % len(holders)]
        for grad, same in zip(result["experts"], twin["experts"]):
            torch.testing.assert_close(grad, same, rtol=0, atol=0)
    return whole


def assert_same(one, many):
    for key in ("out", "x", "gate", "experts", "weights"):
        torch.testing.assert_close(many[key], one[key], rtol=1e-9, atol=1e-12, msg=key)


SETTINGS = {
    "dropless": GateSettings(dropless=True, second_expert_policy="all"),
    "capacity": GateSettings(capacity_factor=1.0, second_expert_policy="all"),
    "tight": GateSettings(capacity_factor=0.5, second_expert_policy="all"),
    "top1": GateSettings(top_k=1),
    "top4": GateSettings(top_k=4, capacity_factor=2.0, second_expert_policy="all"),
}


@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("world, experts", [(2, 8), (2, 2), (4, 8), (4, 4), (4, 2)])
def test_world_pool_equals_one_process(world, experts, name, uneven):
    settings, sizes = SETTINGS[name], sizes_of(world, uneven)
    settings = settings._replace(top_k=min(settings.top_k, experts))
    one = step(build(experts, settings), *inputs())
    results = run_processes(world, in_a_process, experts, settings, sizes, "world")
    assert_same(one, combined(results, experts))
    for result in results:
        for key in ("balance_loss", "z_loss", "stats"):
            torch.testing.assert_close(result[key], one[key], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["dropless", "capacity"])
@pytest.mark.parametrize("world, experts", [(2, 4), (4, 4), (4, 2)])
def test_process_pool_equals_one_process_with_the_batches_as_groups(world, experts, name):
    settings, sizes = SETTINGS[name], sizes_of(world, uneven=False)
    layer = build(experts, settings)
    groups = [step(layer, *part) for part in zip(*(t.split(sizes) for t in inputs()))]
    one = {key: torch.cat([g[key] for g in groups]) for key in ("out", "x")}
    one.update({key: groups[-1][key] for key in ("gate", "experts", "weights")})  # accumulated
    results = run_processes(world, in_a_process, experts, settings, sizes, "process")
    assert_same(one, combined(results, experts))
    for result, group in zip(results, groups):
        for key in ("balance_loss", "z_loss", "stats"):
            torch.testing.assert_close(result[key], group[key], rtol=1e-9, atol=1e-12)
