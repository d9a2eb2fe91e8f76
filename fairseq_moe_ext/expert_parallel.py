"""Experts distributed over processes: rank arithmetic, process groups, the exchange of tokens.

With E experts and W processes, where one number is a multiple of the other:

- E >= W: each process holds E / W experts, process r those from r * E / W on;
- E < W: E consecutive processes hold one expert each. W / E such sets are replicas of each other,
  whose experts' gradients are summed.

Every process joins every collective, even without tokens of its own.
"""

from __future__ import annotations

import functools
import math
import os
import time
from datetime import timedelta
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from .errors import UserError
from .kernels.first_order import once_differentiable
from .kernels.transfer import to_device
from .moe.exchange import Arrival
from .moe.scope import RoutingScope
from .wording import count


class Traffic:
    """What a layer's exchanges of rows have cost this process since the last call of `take`."""

    def __init__(self) -> None:
        self.bytes = 0  # sent to other processes
        self.seconds = 0.0  # in the exchanges, waiting for others included; on a GPU not counted

    def take(self) -> Tuple[int, float]:
        """Bytes and seconds since the last call."""
        taken = self.bytes, self.seconds
        self.bytes, self.seconds = 0, 0.0
        return taken


class Placement(NamedTuple):
    """Which experts a process holds, and which processes hold the others."""

    local: int  # experts of this process
    first: int  # number of the first of them
    holders: Tuple[int, ...]  # ranks that together hold all experts once, this one among them
    replicas: Tuple[int, ...]  # ranks that hold the same experts, this one among them


def placement(num_experts: int, world_size: int, rank: int) -> Placement:
    """Raises UserError when neither number divides the other."""
    if num_experts % world_size != 0 and world_size % num_experts != 0:
        raise UserError(
            f"--moe-expert-count {num_experts} cannot be sharded over {world_size} processes: one "
            f"must divide the other; use {_nearest(num_experts, world_size)} experts, or "
            f"{_nearest(world_size, num_experts)} processes"
        )
    holders = min(num_experts, world_size)
    local = num_experts // holders
    start = rank - rank % holders
    return Placement(
        local,
        rank % holders * local,
        tuple(range(start, start + holders)),
        tuple(range(rank % holders, world_size, holders)),
    )


def _nearest(number: int, other: int) -> str:
    """The three numbers nearest to `number` that divide `other` or are multiples of it."""
    fitting = [n for n in range(1, number + 2 * other + 1) if n % other == 0 or other % n == 0]
    return ", ".join(map(str, sorted(sorted(fitting, key=lambda n: abs(n - number))[:3])))


class ExpertParallel:
    """The exchange (moe/exchange.py) of one layer's rows between the processes that hold its
    experts.

    All processes build it at once, in the same order, because it creates process groups.
    """

    def __init__(self, num_experts: int) -> None:
        world_size, rank = dist.get_world_size(), dist.get_rank()
        self.placement = placement(num_experts, world_size, rank)
        self.holders, self.replicas = None, None  # the world
        if num_experts < world_size:
            self.holders, self.replicas = _groups(num_experts, world_size, rank, dist.group.WORLD)
        self.traffic = Traffic()

    def held(self, num_experts: int) -> range:
        return range(self.placement.first, self.placement.first + self.placement.local)

    def send(self, x: Tensor, counts: List[int]) -> Tuple[Tensor, Arrival]:
        local = self.placement.local
        sent = to_device(counts, x.device).view(-1, local)  # (holders, local)
        received = torch.empty_like(sent)  # rows from each holder, for each expert
        dist.all_to_all_single(received, sent, group=self.holders)
        arrived = received.tolist()  # the only wait for a GPU here
        going = [sum(counts[i : i + local]) for i in range(0, len(counts), local)]
        coming = [sum(of_holder) for of_holder in arrived]
        x = _AllToAll.apply(x, going, coming, self.holders, self.traffic)
        order = _by_expert(received, len(x))
        inverse = order.argsort()
        x = _Reorder.apply(x, order, inverse)
        of_expert = [sum(rows) for rows in zip(*arrived)]
        return x, Arrival(of_expert, (going, coming, order, inverse))

    def compute(self, experts: nn.Module, x: Tensor, counts: List[int]) -> Tensor:
        weights = dict(experts.named_parameters())
        if len(self.placement.replicas) == 1 or not weights:  # those in files are not trained
            return experts(x, counts)
        summed = _SumOfGradients.apply(self.replicas, *weights.values())
        return functional_call(experts, dict(zip(weights, summed)), (x, counts))

    def send_back(self, y: Tensor, arrival: Arrival) -> Tensor:
        going, coming, order, inverse = arrival.way
        y = _Reorder.apply(y, inverse, order)
        return _AllToAll.apply(y, coming, going, self.holders, self.traffic)


class WorldScope(RoutingScope):
    """The tokens of all processes: capacity, loss and metrics as if one process had them."""

    def tokens(self, here: int) -> int:
        return int(self.total(torch.full((), here, device=collective_device())))

    def total(self, x: Tensor) -> Tensor:
        return _Sum.apply(x)

    def gather(self, x: Tensor) -> Tuple[Tensor, slice]:
        sizes = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(process_count())]
        dist.all_gather(sizes, sizes[0] + len(x))
        rows = torch.cat(sizes).tolist()
        padded = x.new_zeros(max(rows), *x.shape[1:])  # the collective wants equal shapes
        padded[: len(x)] = x
        everyone = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(everyone, padded)
        before = sum(rows[: dist.get_rank()])
        whole = torch.cat([part[:number] for part, number in zip(everyone, rows)])
        return whole, slice(before, before + len(x))

    def before_and_total(self, counts: Tensor) -> Tuple[Tensor, Tensor]:
        everyone = [torch.empty_like(counts) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, counts.contiguous())
        stacked = torch.stack(everyone)  # (W, K, E)
        return stacked[: dist.get_rank()].sum(dim=0), stacked.sum(dim=0)


def replica_count(num_experts: int, world_size: Optional[int] = None) -> int:
    """Of so many processes (by default of all), those that hold the same experts, if each layer has
    this many."""
    return max(1, (world_size or process_count()) // max(1, num_experts))


def expert_grad_scale(choice: str, experts: int, world_size: int) -> float:
    """Factor on the experts' gradients, which are sums over the tokens of all processes. Those of
    other parameters are means over processes.

    Args:
        choice: of moe_normalize_expert_grad. world_size: the mean, like other parameters.
            sqrt_world_size: the branch's rule; an expert that several processes hold is averaged
            over them first. sqrt_num_experts: the mean, divided once more.
    """
    replicas = replica_count(experts, world_size)
    return {
        "world_size": 1 / world_size,
        "sqrt_world_size": 1 / (replicas * math.sqrt(world_size / replicas)),
        "sqrt_num_experts": 1 / (world_size * math.sqrt(experts)),
    }[choice]


def sum_of_experts(x: Tensor, replicas: int) -> Tensor:
    """Sum of a metric over the experts of all processes. Each expert counts once, although it has
    this many replicas."""
    if process_count() == 1:
        return x
    return sum_over_processes(x) / replicas


def sum_over_processes(x: Tensor) -> Tensor:
    """Sum of a metric over all processes."""
    x = x.to(collective_device(), copy=True)
    dist.all_reduce(x)
    return x


def is_expert(name: str) -> bool:
    """Whether this names an expert's parameter, one below a module called `experts`. Training,
    saving, loading and converting all use this test."""
    return ".experts." in name


def mark_experts(model: nn.Module) -> bool:
    """Mark the parameters of experts for the data-parallel wrappers, which must not reduce them:
    fairseq's by the attribute `expert`, PyTorch's by names. Returns whether there are any
    (fairseq/distributed/legacy_distributed_data_parallel.py:140@0.12.2)."""
    ignored = []
    for name, parameter in model.named_parameters():
        if is_expert(name):
            parameter.expert = True  # type: ignore[attr-defined]
            ignored.append(name)
    if process_count() > 1:
        model._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]
    return bool(ignored)


def process_count() -> int:
    """Processes that train together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """This process's number among them; 0 without torch.distributed."""
    return dist.get_rank() if process_count() > 1 else 0


def all_gather(value: Any) -> List[Any]:
    """An object of each process, on all of them."""
    if process_count() == 1:
        return [value]
    values: List[Any] = [None] * process_count()
    dist.all_gather_object(values, value)
    return values


def check_own_gpu(source: str, number: Any, on_a_cpu: str) -> None:
    """Raise UserError if this process, on a machine with GPUs, has none of its own.

    Args:
        number: of its GPU, as `source` says, a flag or a variable that torchrun or SLURM sets.
        on_a_cpu: the flags that make it use none.
    """
    gpus = torch.cuda.device_count()
    if int(number) >= gpus:
        start = "start one process for each"
        if os.environ.get("SLURM_LOCALID") == str(number):  # perhaps each has one, its number 0
            start += (
                ", and let it see all of its machine (srun --gpus-per-node, no --gpus-per-task)"
            )
        raise UserError(
            f"{source} {number}: this process sees only {count(gpus, 'GPU')}; {start}, or add "
            f"{on_a_cpu}"
        )


def collective_device() -> torch.device:
    """The device on which the default process group needs its tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


_limit: Optional[timedelta] = None  # of a collective of experts; None: torch's own


def limit_groups(limit: Optional[timedelta]) -> None:
    """Set how long processes that hold experts wait for each other."""
    global _limit
    _limit = limit


@functools.cache
def _groups(
    num_experts: int, world_size: int, rank: int, world: Any
) -> Tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Process groups of this rank's holders and of its replicas. They end with the world that they
    are parts of, so a later one has its own."""
    placements = [placement(num_experts, world_size, r) for r in range(world_size)]
    own = placements[rank]
    groups: Dict[Tuple[int, ...], dist.ProcessGroup] = {}
    # Each process must take part in making each group, in the same order.
    for ranks in sorted({p.holders for p in placements} | {p.replicas for p in placements}):
        groups[ranks] = dist.new_group(list(ranks), timeout=_limit)
    return groups[own.holders], groups[own.replicas]


def _by_expert(received: Tensor, rows: int) -> Tensor:
    """received (holders, local): rows from each holder for each expert, as they arrive, N' in all.
    Returns the order (N',) that groups rows by expert."""
    flat = received.flatten()
    starts = (flat.cumsum(0) - flat).view_as(received).t().flatten()  # by expert, then holder
    lengths = received.t().flatten()
    ends = lengths.cumsum(0)
    shift = (starts - (ends - lengths)).repeat_interleave(lengths, output_size=rows)
    return torch.arange(rows, device=received.device) + shift


class _AllToAll(torch.autograd.Function):
    """Send splits[i] rows to holder i; the gradient comes back the same way."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        sent: List[int],
        received: List[int],
        group: Optional[dist.ProcessGroup],
        traffic: Traffic,
    ) -> Tensor:
        ctx.args = received, sent, group, traffic
        return _exchanged(x, sent, received, group, traffic)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None, None, None]:
        return _exchanged(grad, *ctx.args), None, None, None, None


def _exchanged(
    x: Tensor,
    sent: List[int],
    received: List[int],
    group: Optional[dist.ProcessGroup],
    traffic: Traffic,
) -> Tensor:
    out = x.new_empty(sum(received), x.size(1))
    away = sum(sent) - sent[dist.get_rank(group)]
    traffic.bytes += away * x.size(1) * x.element_size()
    start = time.perf_counter()
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    if not x.is_cuda:  # there the call returns before the exchange is done
        traffic.seconds += time.perf_counter() - start
    return out


class _Reorder(torch.autograd.Function):
    """x[order]; the gradient gathers by the inverse instead of adding row by row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _SumOfGradients(torch.autograd.Function):
    """Identity whose gradients are summed over a group. All processes sum them in the same order,
    even if one computes its experts in another way (kernels/expert_ffn.py: no rows)."""

    @staticmethod
    def forward(
        ctx: Any, group: Optional[dist.ProcessGroup], *tensors: Tensor
    ) -> Tuple[Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tuple[Optional[Tensor], ...]:
        summed = [grad.contiguous() for grad in grads]
        for grad in summed:
            dist.all_reduce(grad, group=ctx.group)
        return None, *summed


class _Sum(torch.autograd.Function):
    """Sum over all processes; each process's gradient is the sum of all processes' gradients, as
    each has its own loss of the one sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.contiguous().clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Sum.forward(ctx, grad)
