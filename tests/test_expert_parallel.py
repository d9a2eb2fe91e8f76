"""N processes equal one: the layer, its losses, figures and gradients."""

from datetime import timedelta
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from expert_layers import SETTINGS, TOKENS, assert_same, build, combined, inputs, step
from fairseq.distributed import utils as distributed_utils
from processes import end_processes, run_processes
from waits import Waits
from wide_experts import as_wide

from fairseq_moe_ext import expert_parallel
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.expert_parallel import ExpertParallel, WorldScope, placement
from fairseq_moe_ext.kernels.expert_ffn import by_expert
from fairseq_moe_ext.moe import experts as moe_experts
from fairseq_moe_ext.patches import commands


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
    words = "6 cannot be sharded over 4 processes.* 2, 4, 8 experts, or 2, 3, 6 processes"
    with pytest.raises(UserError, match=words):
        placement(6, 4, 0)
    with pytest.raises(UserError, match=" 510, 513, 516 experts, or 1, 2, 4 processes"):
        placement(512, 3, 0)


def sizes_of(world, uneven):
    """Tokens of each process; the last may have none."""
    if not uneven:
        return [TOKENS // world] * world
    sizes = [3 * (world - rank) for rank in range(world)]
    sizes[0] += TOKENS - sum(sizes) + sizes[-1]
    sizes[-1] = 0
    return sizes


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


def wide_in_a_process(rank, *how):
    with as_wide():
        return in_a_process(rank, *how)


@pytest.mark.parametrize("world, experts", [(2, 8), (4, 2)])
def test_processes_with_wide_experts_equal_one_with_narrow_ones(world, experts):
    settings, sizes = SETTINGS["tight"], sizes_of(world, uneven=True)
    one = step(build(experts, settings), *inputs())
    results = run_processes(world, wide_in_a_process, experts, settings, sizes, "world")
    assert_same(one, combined(results, experts))


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


def exchange_in_a_process(rank):
    """The waits of an exchange, and the gradients of two backward passes through it."""
    parallel = ExpertParallel(4)
    counts = [[2, 0, 1, 3], [1, 4, 0, 2]][rank]
    x = torch.arange(sum(counts) * 2.0).view(-1, 2).add(100 * rank).requires_grad_()
    with Waits() as waits:
        rows, arrival = parallel.send(x, counts)
        back = parallel.send_back(rows * (rank + 1), arrival)
    assert arrival.counts == [[3, 4], [1, 5]][rank]
    twice = [torch.autograd.grad((back * x).sum(), x, retain_graph=True)[0] for _ in range(2)]
    return waits.counts, twice


def test_an_exchange_waits_once_and_goes_back_as_often_as_asked():
    for counts, (first, second) in run_processes(2, exchange_in_a_process):
        assert torch.equal(first, second)
        assert counts == {"tolist": 1}


def scope_in_a_process(rank):
    with Waits() as waits:
        rows, mine = WorldScope().gather(torch.full((rank + 1, 2), float(rank)))
        tokens = WorldScope().tokens(rank + 1)
    assert rows[mine].unique().tolist() == [rank]
    return waits.counts, tokens, len(rows)


def test_a_scope_of_all_processes_waits_once_for_each_answer():
    found = run_processes(2, scope_in_a_process)
    assert found == [({"tolist": 1, "__int__": 1}, 3, 3)] * 2


def replica_in_a_process(rank):
    """One of two replicas computes by the plain loop, the other not, as on a GPU one without rows
    does."""
    kernel = [None, by_expert][rank]
    with mock.patch.object(moe_experts, "kernel_for", lambda x, weights: kernel):
        return in_a_process(rank, 1, SETTINGS["top1"], sizes_of(2, uneven=True), "world")


def test_replicas_may_compute_in_different_ways():
    one = step(build(1, SETTINGS["top1"]), *inputs())
    assert_same(one, combined(run_processes(2, replica_in_a_process), 1))


def world_after_world(rank, folder):
    """A sum over replicas and their ranks, in a world, and in another after its end."""
    found = []
    for number in range(2):
        if number:
            dist.destroy_process_group()
            meeting, timeout = f"file://{folder}/again", timedelta(seconds=60)
            dist.init_process_group(
                "gloo", init_method=meeting, world_size=2, rank=rank, timeout=timeout
            )
        replicas = ExpertParallel(1).replicas
        total = torch.ones(1)
        dist.all_reduce(total, group=replicas)
        found.append((float(total), dist.get_process_group_ranks(replicas)))
    return found


def test_a_second_world_in_one_process_has_its_own_groups(tmp_path):
    assert run_processes(2, world_after_world, str(tmp_path)) == [[(2.0, [0, 1])] * 2] * 2
    end_processes(2)  # fairscale keeps groups of the world that has ended


@pytest.mark.parametrize("seconds", [5, -1])
def test_every_group_has_the_limit_of_heartbeat_timeout(seconds, monkeypatch):
    """A new group has torch's own limit, whatever that of the processes' first group is."""
    limits = []
    monkeypatch.setattr(dist, "new_group", lambda ranks=None, timeout=None: limits.append(timeout))
    monkeypatch.setattr(distributed_utils.get_global_group, "_global_group", None, raising=False)
    monkeypatch.setattr("atexit.register", lambda function: None)
    try:
        commands.distributed_init(lambda cfg: 0, SimpleNamespace(heartbeat_timeout=seconds))
        expert_parallel._groups.__wrapped__(4, 2, 0, None)
    finally:
        expert_parallel.limit_groups(None)
    limit = timedelta(seconds=seconds) if seconds > 0 else None
    # fairseq's own group is made where it is first needed unless it has a limit
    assert len(limits) == (4 if limit else 3) and set(limits) == {limit}
