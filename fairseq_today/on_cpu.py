"""What stock fairseq 0.12.2 and its fairscale need to train on a CPU, over Gloo."""

import contextlib
import sys
from typing import Any

from .errors import UserError
from .registry import View


def gather(stock, data, group=None, max_size=16384):
    """Criterions whose logs cannot be summed gather them through CUDA buffers; here torch's own
    function does it, for objects of any size."""
    import torch.distributed
    from fairseq.distributed import utils
    from fairseq.utils import move_to_cpu

    group = utils.get_global_group() if group is None else group
    gathered = [None] * utils.get_world_size(group)
    torch.distributed.all_gather_object(gathered, move_to_cpu(data), group=group)
    return gathered


def ddp(stock, module, device_ids=None, output_device=None, **kwargs):
    """`--ddp-backend pytorch_ddp` hands device ids to PyTorch's DDP, which refuses them for a model
    on the CPU (ValueError)."""
    if not any(parameter.is_cuda for parameter in module.parameters()):
        device_ids = output_device = None
    return stock(module, device_ids=device_ids, output_device=output_device, **kwargs)


# --ddp-backend fully_sharded. On a CPU all happens in turn, and an all-reduce has the same sums.


class _NoStream:
    def wait_stream(self, stream):
        pass

    def synchronize(self):
        pass


_STREAM = _NoStream()


def without_streams(torch: Any) -> Any:
    """FSDP waits for CUDA streams, which overlap communication with computation, even without a
    GPU."""
    cuda = View(
        torch.cuda,
        synchronize=lambda: None,
        current_stream=lambda: _STREAM,
        stream=lambda stream: contextlib.nullcontext(),
    )
    return View(torch, cuda=cuda)


def setup_streams(stock, self):
    """FSDP uses streams that it does not create without a GPU."""
    stock(self)
    self._streams.update(dict.fromkeys(("fp32_to_fp16", "all_gather", "post_backward"), _STREAM))


def default_device(stock, module):
    """FSDP's device is CUDA's."""
    import torch

    return torch.device("cpu")


def record_stream(stock, self, stream):
    """FSDP calls Tensor.record_stream, which needs CUDA. It is a method, so it is replaced on the
    class."""


def reducing_by_all_reduce(dist: Any) -> Any:
    """Older versions of Gloo have no reduce-scatter."""
    import torch

    def reduce_scatter(output, inputs, group):
        inputs = torch.stack(tuple(inputs))
        torch.distributed.all_reduce(inputs, group=group)
        output.copy_(inputs[torch.distributed.get_rank(group)].view_as(output))

    def reduce_scatter_base(output, flat, group):
        reduce_scatter(output, flat.view(group.size(), -1), group)

    return View(dist, reduce_scatter=reduce_scatter, _reduce_scatter_base=reduce_scatter_base)


# --fp16 and --bf16


def zero_where_the_gradient_is(torch: Any) -> Any:
    """A gradient overflow under --fp16, by which the loss scale is adjusted, puts a zero on the
    GPU.

    It is the one use that fairseq/trainer.py has of torch.tensor.
    """

    class Zero(torch.Tensor):
        def cuda(self, *args, **kwargs):
            plain = self.as_subclass(torch.Tensor)
            return plain.cuda(*args, **kwargs) if torch.cuda.is_available() else plain

    def tensor(*args, **kwargs):
        return torch.tensor(*args, **kwargs).as_subclass(Zero)

    return View(torch, tensor=tensor)


def with_a_device_of_its_own(torch: Any) -> Any:
    """Gives fp16_optimizer.py its own current CUDA device, which `build_fp32_params` sets, apart
    from the rest of fairseq."""
    return View(torch, cuda=View(torch.cuda))


def build_fp32_params(stock, cls, args, params, flatten=True):
    """`--fp16` keeps its flat parameters under the current CUDA device and looks them up under the
    index of their own device, which is None for the CPU.

    No CUDA is an error, and `--cpu` beside a GPU trains nothing, silently.
    """
    from fairseq.optim import fp16_optimizer

    params = list(params)
    fp16_optimizer.torch.cuda.current_device = lambda: params[0].device.index
    return stock(cls, args, params, flatten)


def bf16_without_tpu(stock, parser, input_args=None, parse_known=False, **kwargs):
    """`--bf16` and `--memory-efficient-bf16` on the command line set `tpu`, which needs torch_xla.
    `--tpu` itself still means a TPU."""
    wants_tpu = "--tpu" in (sys.argv if input_args is None else input_args)
    try:
        result = stock(parser, input_args, parse_known, **kwargs)
    except ValueError as error:
        if not wants_tpu and "Cannot combine --fp16 and --tpu" in str(error):
            raise UserError("--fp16 and --bf16 are both given; choose one of them") from error
        raise
    args = result[0] if parse_known else result
    if getattr(args, "bf16", False) and not wants_tpu:
        args.tpu = False
    return result
