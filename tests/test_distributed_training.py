"""Training on N processes equals training on one, through fairseq's Trainer."""

import importlib
import sys
from types import SimpleNamespace

import fairseq_cli
import pytest
import small_models
import torch
from processes import run_processes
from training import TRAIN, make_data, train_on
from updates import (
    BACKENDS,
    CAPACITY,
    DROPLESS,
    LENGTHS,
    ROWS,
    UPDATES,
    WORLD,
    as_sample,
    assert_same,
    batches,
    configure,
    joined,
    make_trainer,
    one_process,
    processes,
    record,
)

from fairseq_moe_ext import fully_sharded, patches
from fairseq_moe_ext.cost import memory_per_device
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.models.precision import bfloat16_pays
from fairseq_moe_ext.patches import eval_lm, messages
from fairseq_moe_ext.shape import shape_of
from fairseq_today import registry

PLACES = [(2, 4), (2, 2), (4, 8), (4, 4), (4, 2)]  # processes, experts
# Run always: each backend with experts more than, as many as and fewer than processes, both rules.
OFTEN = [
    ("legacy_ddp", 2, 4, CAPACITY),
    ("legacy_ddp", 4, 4, DROPLESS),
    ("legacy_ddp", 4, 2, CAPACITY),
    ("pytorch_ddp", 4, 8, DROPLESS),
    ("pytorch_ddp", 2, 2, CAPACITY),
    ("pytorch_ddp", 4, 2, DROPLESS),
    ("fully_sharded", 2, 4, DROPLESS),
    ("fully_sharded", 4, 4, CAPACITY),
    ("fully_sharded", 4, 2, CAPACITY),
]
OFTEN_IN_FLOAT32 = [OFTEN[0], OFTEN[4], OFTEN[8]]


def grid(often):
    """All backends, places and rules; slow but for some."""
    cases = [
        (backend, world, experts, rule)
        for backend in BACKENDS
        for world, experts in PLACES
        for rule in (DROPLESS, CAPACITY)
    ]
    return [
        pytest.param(*case, marks=[] if case in often else [pytest.mark.slow]) for case in cases
    ]


@pytest.mark.parametrize("backend, world, experts, rule", grid(OFTEN))
def test_world_scope_equals_one_process(folder, backend, world, experts, rule):
    flags = f"--moe-expert-count {experts} {rule} {WORLD}"
    one = one_process(folder, flags)
    assert one.figures[0]["gnorm"] > 0.5  # so that clipping matters
    assert (one.figures[0]["overflow_expert1"] > 0) == (rule == CAPACITY)
    assert_same(one, processes(world, folder, flags, backend), experts)


@pytest.mark.parametrize("backend, world, experts, rule", grid(OFTEN_IN_FLOAT32))
def test_world_scope_equals_one_process_in_float32(folder, backend, world, experts, rule):
    flags = f"--moe-expert-count {experts} {rule} {WORLD}"
    how = (1, None, UPDATES, torch.float32)
    many = processes(world, folder, flags, backend, *how)
    assert_same(one_process(folder, flags, *how), many, experts, 1e-5)


@pytest.mark.parametrize(
    "options",
    [
        "--moe-top1-expert",
        "--checkpoint-activations",
        "--moe-normalize-expert-grad sqrt_num_experts",
        "--moe-z-loss-wt 0.1 --moe-log-per-layer",
        "--use-moe-pad-mask --moe-gate-loss-transform neg_log",
        "--use-moe-pad-mask --moe-pad-rule counted --moe-z-loss-wt 0.1",
        "--use-moe-pad-mask --moe-pad-rule branch --moe-capacity-factor 1",
        "--moe-pad-rule branch --moe-capacity-factor 1",
    ],
)
def test_other_settings_equal_one_process(folder, options):
    flags = f"--moe-expert-count 4 {WORLD} {options}"
    assert_same(one_process(folder, flags), processes(2, folder, flags), 4)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_recomputed_activations_equal_one_process(folder, backend):
    flags = f"--moe-expert-count 2 --checkpoint-activations {CAPACITY} {WORLD}"
    assert_same(one_process(folder, flags), processes(2, folder, flags, backend), 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_accumulation_equals_one_process(folder, backend):
    flags = f"--moe-expert-count 2 {WORLD}"
    assert_same(one_process(folder, flags, 2), processes(4, folder, flags, backend, 2), 2)


SLOW_IN_GROUPS = [("legacy_ddp", 4, 2), ("pytorch_ddp", 2, 4), ("fully_sharded", 2, 4)]


@pytest.mark.parametrize(
    "backend, world, experts",
    [
        pytest.param(b, w, e, marks=[pytest.mark.slow] if (b, w, e) in SLOW_IN_GROUPS else [])
        for b in BACKENDS
        for w, e in [(2, 4), (4, 2)]
    ],
)
def test_process_scope_equals_one_process_with_the_batches_as_groups(
    folder, backend, world, experts
):
    """The branch's rule: each process's batch is a group with a capacity of its own; so is each
    micro-batch of one process."""
    flags = f"--moe-expert-count {experts} {CAPACITY} --clip-norm 0.5"
    flags += " --moe-normalize-expert-grad world_size"
    one = one_process(folder, flags, world)
    assert one.figures[0]["overflow_expert1"] > 0
    many = processes(world, folder, flags, backend)
    # What is a process's batch there is a micro-batch here.
    one = one._replace(outputs=[torch.cat(one.outputs)])
    assert_same(one, many, experts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scope", ["process", "world"])
def test_a_process_without_data_neither_hangs_nor_counts(folder, scope, backend):
    flags = f"--moe-expert-count 2 --moe-routing-scope {scope}"
    flags += " --moe-normalize-expert-grad world_size"
    one = one_process(folder, flags, 2 if scope == "process" else 1, 2)
    many = processes(2, folder, flags, backend, 1, 2)
    assert_same(one._replace(outputs=[torch.cat(one.outputs)]), many, 2)


@pytest.mark.parametrize(
    "flags, backend",
    [
        ("--arch dense_lm_tiny --moe-freq 0", "legacy_ddp"),
        ("--arch dense_lm_tiny --moe-freq 0", "pytorch_ddp"),
        ("--arch dense_lm_tiny --moe-freq 0", "fully_sharded"),
        ("--moe-expert-count 4 --moe-gate-loss-transform neg_log", "legacy_ddp"),
        ("--moe-expert-count 4", "pytorch_ddp"),
    ],
)
def test_a_process_may_lack_the_last_of_several_batches(tmp_path, flags, backend):
    """Seven batches are an update of four and one of three, in each epoch. SGD without clipping:
    the size of a gradient shows in the losses that follow."""
    line = f"{make_data(tmp_path)} {TRAIN} --moe-routing-scope process {flags} --no-save"
    line += " --moe-normalize-expert-grad world_size --optimizer sgd --lr 0.5 --clip-norm 0"
    line += f" --max-update 6 --save-dir {tmp_path}"
    one = train_on(1, f"{line} --update-freq 4", 18)
    many = train_on(2, f"{line} --update-freq 2 --ddp-backend {backend}", 18)
    assert many == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "choice, factor",
    [("world_size", 1), ("sqrt_world_size", 2**0.5), ("sqrt_num_experts", 1 / 4**0.5)],
)
def test_scale_of_the_gradients_of_experts(folder, backend, choice, factor):
    """On 2 processes with 4 experts, relative to the gradient of the loss, which one process has;
    the other parameters have that, and the norm is of what comes out."""
    flags = f"--moe-expert-count 4 {WORLD}"
    one = one_process(folder, flags)
    flags += f" --moe-normalize-expert-grad {choice}"
    many = processes(2, folder, flags, backend, 1, None, 1)
    expected = {
        name: value * (factor if ".experts." in name else 1)
        for name, value in one.gradients[0].items()
    }
    found = joined([run.gradients[0] for run in many], 4)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-11, msg=name)
    norm = sum(float(value.square().sum()) for value in expected.values()) ** 0.5
    assert [run.figures[0]["gnorm"] for run in many] == pytest.approx([norm] * 2, rel=1e-9)


def test_eval_lm_may_be_imported_later(monkeypatch):
    """As a notebook may; it counts the whole set all the same."""
    monkeypatch.delitem(sys.modules, "fairseq_cli.eval_lm", raising=False)
    monkeypatch.setattr(fairseq_cli, "eval_lm", None, raising=False)
    others = [finder for finder in sys.meta_path if type(finder).__module__ != registry.__name__]
    monkeypatch.setattr(sys, "meta_path", others)
    registry.apply([registry.wrap("fairseq_cli.eval_lm:eval_lm", eval_lm.eval_lm, "")])
    module = importlib.import_module("fairseq_cli.eval_lm")
    assert module.eval_lm.__name__ == "eval_lm"
    assert not hasattr(module.eval_lm.__wrapped__, "__wrapped__")  # once


def test_exchanges_are_counted(folder):
    """Dropless top-2: every token's two rows of 8 float64 go there, back, and again as gradients;
    what stays on the process is not counted, so at most all of it is."""
    flags = "--moe-expert-count 2 --moe-dropless --record-a2a-perf-stats"
    run, _ = processes(2, folder, flags, "legacy_ddp", 1, None, 3)
    forward_only, *both = [figures["all_to_all_mb"] for figures in run.figures]  # averaged
    tokens, rows = ROWS // 2 * (LENGTHS[0] + LENGTHS[4]) / 2, 2  # of the mean process, with padding
    one_way = tokens * rows * 8 * 8 / 2 / 1e6  # either of two experts is elsewhere
    assert forward_only == pytest.approx(2 * one_way)
    assert both == pytest.approx([4 * one_way] * 2)
    assert all(figures["all_to_all_cpu_time_ms"] > 0 for figures in run.figures)


def test_exchanges_of_a_pass_that_counts_are_counted_too(folder):
    """A mean over an update's batches, each of which goes forth and back three times."""
    flags = "--moe-expert-count 2 --moe-dropless --record-a2a-perf-stats"
    run, _ = processes(
        2, folder, f"{flags} --moe-balance-over global_batch", "legacy_ddp", 2, None, 3
    )
    tokens = ROWS // 4 * (LENGTHS[0] + LENGTHS[2] + LENGTHS[4] + LENGTHS[6]) / 4
    found = [figures["all_to_all_mb"] for figures in run.figures[1:]]
    assert found == pytest.approx([6 * tokens * 2 * 8 * 8 / 2 / 1e6] * 2)


MOE = f"--moe-expert-count 4 {WORLD}"
DENSE = "--arch dense_lm_tiny --moe-freq 0"


@pytest.mark.parametrize(
    "model, options",
    [
        (MOE, "--min-params-to-wrap 0 --share-decoder-input-output-embed"),
        (DENSE, "--min-params-to-wrap 0"),
        *(
            pytest.param(model, options, marks=pytest.mark.slow)
            for model, options in [
                (MOE, "--min-params-to-wrap 0"),
                (MOE, "--min-params-to-wrap 0 --no-reshard-after-forward"),
                (MOE, "--criterion cross_entropy --min-params-to-wrap 0"),
                (DENSE, "--checkpoint-activations"),
                (DENSE, "--min-params-to-wrap 0 --no-reshard-after-forward"),
                (DENSE, "--min-params-to-wrap 0 --share-decoder-input-output-embed"),
                (DENSE, "--criterion cross_entropy --min-params-to-wrap 0"),
            ]
        ),
    ],
)
def test_sharding_layer_by_layer_equals_one_process(folder, model, options):
    """Without --min-params-to-wrap, in the tests above, the small model is in one FSDP. Dense ones
    in float32: the norm that fairseq takes on one process has no float64, nor has the softmax of
    its cross_entropy."""
    flags = f"{model} {options} --clip-norm 0.5"
    how = (1, None, UPDATES, torch.float32 if model == DENSE else torch.float64)
    one = one_process(folder, flags, *how)
    assert one.figures[0]["gnorm"] > 0.5  # so that it clips
    many = processes(2, folder, flags, "fully_sharded", *how)
    single = model == DENSE or "--criterion cross_entropy" in options
    assert_same(one, many, 4, 1e-5 if single else 1e-9)


@pytest.mark.parametrize(
    "flags, world, ends",
    [
        (MOE, 2, ["train_step", "valid_step"]),
        (MOE, 1, []),
        (DENSE, 2, []),
        (f"{DENSE} --ddp-backend pytorch_ddp", 2, ["train_step"]),
        (f"{DENSE} --ddp-backend c10d", 2, ["train_step"]),
        (f"{DENSE} --ddp-backend pytorch_ddp --update-freq 2", 2, ["train_step"]),
        (f"{DENSE} --ddp-backend fully_sharded", 2, ["train_step", "valid_step"]),
    ],
)
def test_lack_of_memory_ends_a_process_that_others_wait_for(
    folder, monkeypatch, flags, world, ends
):
    """Elsewhere stock skips a batch of training, and tries one of validation again."""
    cfg = configure(folder, f"--ddp-backend legacy_ddp {flags}")
    trainer = make_trainer(cfg, "legacy_ddp", 1, torch.float32)
    trainer.cfg.distributed_training.ddp_backend = cfg.distributed_training.ddp_backend
    monkeypatch.setattr(patches.trainer, "process_count", lambda: world)
    sample, left = as_sample(next(batches())), []

    def full(task, *args, **kwargs):
        if left.pop():
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return 0.0, 1, {}

    micro_batches = cfg.optimization.update_freq[0]
    for name, given in (("train_step", [sample] * micro_batches), ("valid_step", sample)):
        left[:] = [False] * micro_batches + [True]
        monkeypatch.setattr(type(trainer.task), name, full)
        monkeypatch.setattr(trainer, "_reduce_and_log_stats", lambda logs, size: {})
        if name in ends:
            with pytest.raises(torch.cuda.OutOfMemoryError) as error:
                getattr(trainer, name)(given)
            assert "2.00 GiB were requested: lower" in messages.mistake_to_print(error.value)
        else:
            assert getattr(trainer, name)(given) == (None if name == "train_step" else {})


def shard_sizes(rank, cfg):
    model = make_trainer(cfg, "fully_sharded", 2, torch.float32).get_model()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(n for name, n in sizes.items() if ".experts." in name)
    return sum(sizes.values()) - experts, experts


def test_a_process_holds_its_share(folder):
    """Of shared parameters half, and its own experts whole."""
    cfg = configure(folder, "--moe-expert-count 4 --min-params-to-wrap 0")
    model = make_trainer(cfg, "legacy_ddp", 1, torch.float32).get_model()
    experts = sum(p.numel() for p in model.parameters() if hasattr(p, "expert"))
    shared = sum(p.numel() for p in model.parameters()) - experts
    for own_shared, own_experts in run_processes(2, shard_sizes, cfg):
        assert own_experts == experts / 2
        assert shared / 2 <= own_shared < shared / 2 + 8  # padding, in each FSDP


def bytes_held(rank, cfg):
    """Of parameters, gradients and the optimizer's moments, after an update."""
    trainer = make_trainer(cfg, "fully_sharded", 2, torch.float32)
    assert trainer.train_step([as_sample(next(batches()).chunk(2)[rank])])
    parameters = list(trainer.get_model().parameters())
    states = trainer.optimizer.optimizer.state.values()
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    tensors = [*parameters, *(p.grad for p in parameters if p.grad is not None), *moments]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "memory-efficient-fp16"])
def test_a_sharding_process_holds_the_bytes_that_are_computed(folder, precision):
    cfg = configure(folder, f"--moe-expert-count 4 --optimizer adam --lr 0.01 --{precision}")
    shape = shape_of(cfg.model, small_models.VOCABULARY)
    memory = memory_per_device(shape, 1, world_size=2, precision=precision, sharding="full")
    expected = memory.parameters + memory.master + memory.gradients + memory.optimizer
    for held in run_processes(2, bytes_held, cfg):
        assert held == pytest.approx(expected, rel=0.02)  # padding of shards


def train_halved(rank, cfg, backend, world):
    trainer = make_trainer(cfg, backend, world, torch.float32)
    figures, _ = record(trainer)
    for tokens in batches():
        for _ in "ab":
            trainer.train_step([as_sample(tokens.chunk(world)[rank])])
    return figures


@pytest.mark.parametrize(
    "backend, precision",
    [
        ("legacy_ddp", "--memory-efficient-fp16"),
        ("legacy_ddp", "--bf16"),
        ("pytorch_ddp", "--memory-efficient-fp16"),
        ("pytorch_ddp", "--bf16"),
        ("fully_sharded", "--bf16"),
        *(
            pytest.param("fully_sharded", precision, marks=pytest.mark.slow)
            for precision in ("--memory-efficient-fp16", "--fp16", "--fp16 --fp32-reduce-scatter")
        ),
    ],
)
def test_half_precision_learns_on_two_processes(folder, precision, backend):
    """At first with the loss and the norm of the gradients that one process has in float32."""
    flags = f"--moe-expert-count 2 {DROPLESS} {WORLD} --optimizer adam --lr 0.01"
    exact = train_halved(0, configure(folder, flags), "legacy_ddp", 1)[0]
    cfg = configure(folder, f"{flags} {precision}")
    for figures in run_processes(2, train_halved, cfg, backend, 2):
        assert figures[0]["loss"] == pytest.approx(exact["loss"], rel=2**-10)
        assert figures[0]["gnorm"] == pytest.approx(exact["gnorm"], rel=2**-8)
        assert figures[-1]["inner_loss"] < figures[0]["inner_loss"] - 0.05


def test_bfloat16_computes_the_same_sharded(folder):
    """Parameters are float32, and rounded to bfloat16 for computing, by FSDP as by our models on a
    CPU, which leave norms and positions in float32. A CPU that gains nothing from bfloat16 computes
    in float32 with either."""
    flags = f"--moe-expert-count 2 {DROPLESS} {WORLD} --min-params-to-wrap 0"
    how = (1, None, 1, torch.float32)
    exact = processes(2, folder, flags, "fully_sharded", *how)
    replicated = processes(2, folder, f"{flags} --bf16", "legacy_ddp", *how)
    sharded = processes(2, folder, f"{flags} --bf16", "fully_sharded", *how)
    pays = bfloat16_pays()
    for run, same, full in zip(sharded, replicated, exact):
        for each in (run, same):
            assert each.outputs[0].dtype == (torch.bfloat16 if pays else torch.float32)
        assert run.figures[0]["loss"] == pytest.approx(same.figures[0]["loss"], rel=2**-8)
        assert (run.figures[0]["loss"] != full.figures[0]["loss"]) == pays
        for name, expected in full.gradients[0].items():
            atol = 0.05 * max(float(expected.abs().max()), 1e-2)  # keys' biases have but rounding
            for gradient in (run.gradients[0][name], same.gradients[0][name]):
                assert gradient.dtype == run.parameters[name].dtype == torch.float32
                torch.testing.assert_close(gradient, expected, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("gpu", [True, False])
def test_sharded_bfloat16_is_that_of_the_processor(monkeypatch, gpu, pays):
    """On a CPU that gains nothing from it, FSDP computes in float32, and need not reduce in it."""
    wrap = {"use_sharded_state": False, "cpu_offload": False, "flatten_parameters": True}
    wrap.update(mixed_precision=False, fp32_reduce_scatter=True, compute_dtype=torch.float32)
    monkeypatch.setattr(fully_sharded, "is_wrapping", lambda: True)
    monkeypatch.setattr(fully_sharded.ConfigAutoWrap, "kwargs", wrap)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    cfg = SimpleNamespace(bf16=True, compile=False, moe_freeze="none")
    fully_sharded.prepare(cfg, lambda: pays)
    rounds = gpu or pays
    assert wrap["compute_dtype"] == (torch.bfloat16 if rounds else torch.float32)
    assert wrap["mixed_precision"] == wrap["fp32_reduce_scatter"] == rounds


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--moe-expert-count 3", "3 cannot be sharded over 2 processes"),
        ("--moe-expert-count 2 --fp16", "--memory-efficient-fp16 or --fp16-no-flatten-grads"),
        ("--moe-expert-count 2 --amp", "--amp: each process would decide alone"),
        (f"{DENSE} --amp", ""),
        (f"{DENSE} --amp --ddp-backend fully_sharded", "--amp: each process would decide alone"),
        ("--moe-expert-count 2 --ddp-backend slowmo", "--ddp-backend slowmo"),
        (
            "--moe-expert-count 2 --moe-routing-scope world --moe-batch-prioritized-routing",
            "--moe-routing-scope process",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(folder, flags, words):
    cfg = configure(folder, f"--ddp-backend legacy_ddp {flags}")
    for message in run_processes(2, refusal, cfg):
        assert words in message and bool(words) == bool(message)


def test_evaluation_orders_the_tokens_of_one_process(folder):
    """A checkpoint of one process may say otherwise."""
    settings = dict(small_models.MOE, moe_batch_prioritized_routing=True, moe_routing_scope="world")
    small_models.build_model(**settings)
    words = "add --model-overrides \"{'moe_routing_scope': 'process'}\""
    assert all(words in message for message in run_processes(2, refused_model, settings))


def refused_model(rank, settings):
    try:
        small_models.build_model(**settings)
    except UserError as error:
        return str(error)
    return ""


def test_one_process_under_torchrun_may_use_amp(folder):
    """It is a group of its own."""
    cfg = configure(folder, "--ddp-backend legacy_ddp --moe-expert-count 2 --amp")
    assert run_processes(1, refusal, cfg, 1) == [""]


def refusal(rank, cfg, world=2):
    try:
        make_trainer(cfg, cfg.distributed_training.ddp_backend, world)
    except UserError as error:
        return str(error)
    return ""
