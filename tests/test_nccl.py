"""The exchange of tokens over NCCL equals one process on the CPU; on one GPU, and on two.

Not yet run, for want of GPUs.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from expert_layers import SETTINGS, TOKENS, assert_same, build, combined, inputs, step

from fairseq_moe_ext.expert_parallel import (
    ExpertParallel,
    WorldScope,
    replica_count,
    sum_of_experts,
)

pytestmark = pytest.mark.gpu


def on_gpu(rank, world, experts, name, folder):
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/meeting", world_size=world, rank=rank
    )
    layer = build(experts, SETTINGS[name], ExpertParallel(experts), scope=WorldScope()).cuda()
    mine = slice(rank * TOKENS // world, (rank + 1) * TOKENS // world)
    result = step(layer, *(t[mine].cuda() for t in inputs()), share=1 / world)
    dist.all_reduce(result["gate"])
    seen = [None] * world
    dist.all_gather_object(seen, rank)  # as checkpoint/ talks
    assert seen == list(range(world))
    from_cpu = sum_of_experts(torch.ones(()), replica_count(experts))
    assert float(from_cpu) == min(experts, world)
    kept = {key: result[key] for key in ("out", "x", "gate", "experts", "weights")}
    torch.save(kept, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["dropless", "capacity"])
@pytest.mark.parametrize("world, experts", [(1, 4), (2, 4), (2, 2)])
def test_nccl_equals_one_process_on_the_cpu(tmp_path, world, experts, name):
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs")
    one = step(build(experts, SETTINGS[name]), *inputs())
    mp.spawn(on_gpu, (world, experts, name, str(tmp_path)), nprocs=world)
    results = [torch.load(tmp_path / f"{rank}.pt", map_location="cpu") for rank in range(world)]
    assert_same(one, combined(results, experts))
