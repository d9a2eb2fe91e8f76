"""What stock fairseq 0.12.2 needs to run with today's Python, torch, numpy and hydra.

It knows nothing of the plugin beside it, but for finding.py, and is of use without it. Two ways
lead in:

- installed: the start-up hook (`fairseq_moe_ext_hook.py`) imports this package when fairseq is
  first imported, and nothing of it when fairseq is not;
- `--user-dir path/to/fairseq_moe_ext` alone: fairseq is there already (Python 3.9 and 3.10 import
  it unaided), and the plugin, which finds this package beside it, calls `apply()`.

    registry.py     a table's row, and the one rule for "once"
    imports.py      what must hold while fairseq is imported; numpy's old names
    torch_today.py  checkpoints, and objects between processes
    score.py        BLEU of fairseq-score
    on_cpu.py       data parallelism, FSDP and half precision on a CPU
    finding.py      the plugin for command lines and checkpoints that name it
    errors.py       the exception for a user's mistake

While fairseq is imported: `imports.quiet_warnings`, and `imports.relaxed_dataclass_defaults` on
Python 3.11 and later (fairseq/dataclass/configs.py:1106@0.12.2). Then PATCHES, from top to bottom,
and where the hook leads in, finding.PATCHES. Functions of fairseq are wrapped, never copied.
"""

import importlib.util
import sys

from . import imports, on_cpu, score, torch_today
from .registry import Condition, replace, wrap
from .registry import apply as _apply


def _is(module: str, release: tuple) -> bool:
    version = sys.modules[module].__version__.split(".")[:2]  # fairseq has imported it
    return tuple(map(int, version)) >= release


def _has_gpu() -> bool:
    return sys.modules["torch"].cuda.is_available()


NUMPY_1_24 = Condition("numpy >= 1.24", lambda: _is("numpy", (1, 24)))
NUMPY_2 = Condition("numpy >= 2.0", lambda: _is("numpy", (2, 0)))
TORCH_2_6 = Condition("torch >= 2.6", lambda: _is("torch", (2, 6)))
NO_GPU = Condition("no GPU", lambda: not _has_gpu())
NO_XLA = Condition("no torch_xla", lambda: importlib.util.find_spec("torch_xla") is None)
FAIRSCALE_ON_CPU = Condition(
    "fairscale, no GPU",
    lambda: not _has_gpu() and importlib.util.find_spec("fairscale") is not None,
)

_FSDP = "fairscale.nn.data_parallel.fully_sharded_data_parallel:"
_DEVICE = "a fairscale that asks for its device, or a fairseq with PyTorch's own FSDP"

PATCHES = (
    replace(
        (
            "fairseq.data.data_utils:np",
            "fairseq.data.language_pair_dataset:np",
            "fairseq.data.token_block_dataset:np",
            "fairseq.modules.dynamic_crf_layer:np",
        ),
        imports.with_old_names,
        "fairseq/data/data_utils.py:488@0.12.2, fairseq/data/language_pair_dataset.py:292@0.12.2, "
        "fairseq/data/token_block_dataset.py:125@0.12.2, "
        "fairseq/modules/dynamic_crf_layer.py:108@0.12.2",
        "a fairseq that says int and float",
        NUMPY_1_24,
    ),
    wrap(
        "fairseq.data.indexed_dataset:MMapIndexedDatasetBuilder.finalize",
        imports.whole_offsets,
        "fairseq/data/indexed_dataset.py:415,583@0.12.2",
        "a fairseq that converts the sizes",
        NUMPY_2,
    ),
    replace(
        "fairseq.checkpoint_utils:torch",
        torch_today.loading_weights_only,
        "fairseq/checkpoint_utils.py:315,878@0.12.2",
        "a fairseq that does the same",
    ),
    wrap(
        "fairseq.distributed.utils:_broadcast_object_slow",
        torch_today.broadcast_of_objects,
        "fairseq/distributed/utils.py:749,770@0.12.2",
        "a fairseq that says `weights_only=False` there",
        TORCH_2_6,
    ),
    wrap(
        "fairseq.distributed.utils:all_gather_list",
        on_cpu.gather,
        "fairseq/distributed/utils.py:585@0.12.2",
        "a fairseq that asks which device the group wants",
        NO_GPU,
    ),
    wrap(
        "fairseq.models.distributed_fairseq_model:DistributedDataParallel",
        on_cpu.ddp,
        "fairseq/models/distributed_fairseq_model.py:60,62@0.12.2",
        "a fairseq that passes device ids for GPUs only",
    ),
    replace(
        _FSDP + "torch",
        on_cpu.without_streams,
        "fairscale/nn/data_parallel/fully_sharded_data_parallel.py:1692,1744,1808,1978,"
        "2048,2100,2257@0.4.13",
        _DEVICE,
        FAIRSCALE_ON_CPU,
    ),
    wrap(
        _FSDP + "FullyShardedDataParallel._setup_streams",
        on_cpu.setup_streams,
        "fairscale/nn/data_parallel/fully_sharded_data_parallel.py:1368@0.4.13",
        _DEVICE,
        FAIRSCALE_ON_CPU,
    ),
    wrap(
        _FSDP + "_get_default_cuda_device",
        on_cpu.default_device,
        "fairscale/nn/data_parallel/fully_sharded_data_parallel.py:2520@0.4.13",
        _DEVICE,
        FAIRSCALE_ON_CPU,
    ),
    wrap(
        "torch:Tensor.record_stream",
        on_cpu.record_stream,
        "fairscale/nn/data_parallel/fully_sharded_data_parallel.py:1740@0.4.13",
        _DEVICE,
        FAIRSCALE_ON_CPU,
    ),
    replace(
        "fairscale.internal.reduce_scatter_bucketer:dist",
        on_cpu.reducing_by_all_reduce,
        "fairscale/internal/reduce_scatter_bucketer.py:38,145@0.4.13",
        _DEVICE,
        FAIRSCALE_ON_CPU,
    ),
    replace(
        "fairseq.trainer:torch",
        on_cpu.zero_where_the_gradient_is,
        "fairseq/trainer.py:992@0.12.2",
        "a fairseq that uses the device of the parameters",
    ),
    replace(
        "fairseq.optim.fp16_optimizer:torch",
        on_cpu.with_a_device_of_its_own,
        "fairseq/optim/fp16_optimizer.py:38,119@0.12.2",
        "a fairseq that uses the device of the parameters",
    ),
    wrap(
        "fairseq.optim.fp16_optimizer:_FP16OptimizerMixin.build_fp32_params",
        on_cpu.build_fp32_params,
        "fairseq/optim/fp16_optimizer.py:31,38,119@0.12.2",
        "a fairseq that uses the device of the parameters",
    ),
    wrap(
        "fairseq.options:parse_args_and_arch",
        on_cpu.bf16_without_tpu,
        "fairseq/options.py:88,201@0.12.2",
        "a fairseq that separates bf16 and TPUs",
        NO_XLA,
    ),
    wrap(
        "fairseq.scoring.bleu:Scorer.__init__",
        score.scorer_of_numbers,
        "fairseq_cli/score.py:67@0.12.2",
        "a fairseq that passes a BleuConfig there",
    ),
    wrap(
        "sacrebleu:corpus_bleu",
        score.bleu_of_files,
        "fairseq_cli/score.py:61@0.12.2",
        "a fairseq that passes lists of lines",
    ),
)


def apply() -> None:
    """Put in force what is needed here; import fairseq if nobody has. Once is enough."""
    if "fairseq" not in sys.modules:
        with imports.fit_to_import():
            import fairseq  # noqa: F401  (with the hook, this ends in `hooked` by itself)
    _apply(PATCHES)


def wrap_loader(spec) -> None:
    """Make the loader in fairseq's module spec import fairseq and patch it (for the hook)."""
    stock = spec.loader

    class Loader:
        def create_module(self, spec):
            return stock.create_module(spec)

        def exec_module(self, module):
            from . import finding

            spec.loader = module.__loader__ = stock  # for whoever asks the module later
            with imports.fit_to_import():
                stock.exec_module(module)
            apply()
            _apply(finding.PATCHES)

    spec.loader = Loader()
