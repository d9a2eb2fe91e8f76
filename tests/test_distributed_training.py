"""Training on N processes equals training on one, through fairseq's Trainer."""

import contextlib
import copy
import functools
import importlib
import re
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple

import fairseq_cli
import pytest
import torch
import torch.distributed as dist
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import fsdp_enable_wrap, fsdp_wrap
from fairseq.distributed.fully_sharded_data_parallel import FullyShardedDataParallel
from fairseq.trainer import Trainer
from processes import run_processes
from small_models import PAD, TYPES, make_task

import fairseq_moe_ext
from fairseq_moe_ext.distributed_training import CommandFinder, _evaluate_the_whole_set
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.expert_parallel import placement, traffic
from fairseq_moe_ext.fully_sharded import is_sharded, places

BACKENDS = ["legacy_ddp", "pytorch_ddp", "fully_sharded"]
ROWS, LENGTH, UPDATES = 8, 6, 5
LENGTHS = (6, 3, 6, 6, 5, 4, 3, 2)  # so 2 and 4 processes pad their rows to different lengths
FLAGS = "--task language_modeling --arch moe_lm_tiny --criterion moe_cross_entropy --cpu"
FLAGS += " --decoder-layers 2 --decoder-embed-dim 8 --decoder-ffn-embed-dim 12"
FLAGS += " --decoder-attention-heads 2 --tokens-per-sample 8 --dropout 0 --attention-dropout 0"
FLAGS += " --optimizer sgd --lr 0.5 --moe-gate-loss-wt 0.1 --batch-size 8"
FLAGS += f" --user-dir {Path(fairseq_moe_ext.__file__).parent}"


@functools.cache
def configure(folder, flags):
    """fairseq's settings; the processes get them ready, as Hydra takes most of a test's time."""
    parser = options.get_training_parser()
    arguments = f"{folder} {FLAGS} {flags}"
    if "--criterion cross_entropy" in flags:
        arguments = arguments.replace("--moe-gate-loss-wt 0.1", "")
    sys.argv[1:] = arguments.split()  # the first, partial parse reads these
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments.split()))


def make_trainer(cfg, backend, world_size, dtype=torch.float64):
    """fairseq's Trainer of a small model."""
    cfg = copy.deepcopy(cfg)
    cfg.distributed_training.ddp_backend = cfg.model.ddp_backend = backend
    cfg.distributed_training.distributed_world_size = world_size
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(1)
    if backend == "fully_sharded":
        with fsdp_enable_wrap(cfg.distributed_training):
            model = fsdp_wrap(task.build_model(cfg.model))
        if dtype == torch.float64:  # FSDP builds for float32 and float16 alone
            model = model.double()
            for module in model.modules():
                if isinstance(module, FullyShardedDataParallel):
                    module.compute_dtype = module.buffer_dtype = dtype
    else:
        model = task.build_model(cfg.model).to(dtype)
    return Trainer(cfg, task, model, task.build_criterion(cfg.criterion))


def batches():
    """A batch for each update, of which the rows go to the processes in turn."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(UPDATES):
        tokens = torch.randint(4, TYPES, (ROWS, LENGTH + 1), generator=generator)
        for row, length in zip(tokens, LENGTHS):
            row[length + 1 :] = PAD
        yield tokens


def as_sample(tokens):
    """As a task collates it: no longer than its longest row."""
    tokens = tokens[:, : int(tokens.ne(PAD).sum(dim=1).max())]
    target = tokens[:, 1:].contiguous()
    return {
        "id": torch.arange(len(tokens)),
        "nsentences": len(tokens),
        "ntokens": int(target.ne(PAD).sum()),
        "net_input": {
            "src_tokens": tokens[:, :-1].where(target.ne(PAD), PAD),
            "src_lengths": target.ne(PAD).sum(dim=1),
        },
        "target": target,
    }


class Run(NamedTuple):
    """What a process has seen of some updates."""

    figures: List[Dict[str, float]]  # of each update, over all processes, not rounded
    gradients: List[Dict[str, torch.Tensor]]  # of each update, before they are clipped
    parameters: Dict[str, torch.Tensor]  # after the last update
    outputs: List[torch.Tensor]  # then, logits of the rows of each micro-batch of the first update


def train(rank, cfg, backend, world_size, parts=1, idle=None, updates=UPDATES, dtype=torch.float64):
    """Some updates, as a Run of this process.

    parts: micro-batches an update; idle: an update at which only process 0 has data.
    """
    trainer = make_trainer(cfg, backend, world_size, dtype)
    model = trainer.get_model()
    figures, gradients = record(trainer)
    traffic.take()  # what earlier tests in this process have sent
    trainer.reset_dummy_batch(as_sample(next(batches())))
    trainer.task.args.batch_size = ROWS // parts // world_size  # full ones, by the branch's rule
    for update, tokens in zip(range(updates), batches()):
        samples = [as_sample(part.chunk(world_size)[rank]) for part in tokens.chunk(parts)]
        if update == idle:
            samples = [as_sample(tokens[:2]) if rank == 0 else {}]
        trainer.train_step(samples)
    parameters = whole_parameters(model)
    with torch.no_grad():
        outputs = [
            trainer.model(part.chunk(world_size)[rank][:, :-1])[0]
            for part in next(batches()).chunk(parts)
        ]
    return Run(figures, gradients, parameters, outputs)


LOSSES = ("loss", "inner_loss", "moe_loss", "moe_z_loss")


def record(trainer):
    """Lists that get the figures and the gradients of each update, to all digits."""
    figures, gradients = [], []
    clip, log = trainer.clip_grad_norm, trainer._reduce_and_log_stats

    def clip_grad_norm(limit):
        gradients.append(whole_gradients(trainer.get_model()))
        return clip(limit)

    def reduce_and_log_stats(outputs, sample_size, grad_norm=None):
        total = {key: sum(float(output[key]) for output in outputs) for key in outputs[0]}
        count = total.pop("batch_count", 1)  # of the batches of all processes
        for key in total.keys() - {"ntokens", "nsentences", "sample_size"}:
            total[key] /= float(sample_size) if key in LOSSES else count
        figures.append({**total, "gnorm": float(grad_norm or 0)})
        return log(outputs, sample_size, grad_norm)

    trainer.clip_grad_norm, trainer._reduce_and_log_stats = clip_grad_norm, reduce_and_log_stats
    return figures, gradients


def whole_parameters(model):
    """Those of this process's experts, and all others."""
    gather = model.summon_full_params() if is_sharded(model) else contextlib.nullcontext()
    with gather:
        return {
            re.sub(r"_fsdp_wrapped_module\.|_fpw_module\.", "", name): parameter.detach().clone()
            for name, parameter in model.named_parameters()
        }


def whole_gradients(model):
    """As whole_parameters."""
    whole, gradients = {}, {}
    for name, place in places(model).items():
        gradient = place.parameter.grad
        if gradient is None:  # frozen
            continue
        if place.start is not None:
            if place.parameter not in whole:
                pieces = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
                dist.all_gather(pieces, gradient)
                whole[place.parameter] = torch.cat(pieces)
            gradient = whole[place.parameter][place.start :][: place.shape.numel()]
        gradients[name] = gradient.view(place.shape).clone()
    return gradients


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    make_task().source_dictionary.save(str(path / "dict.txt"))
    return str(path)


@functools.cache
def one_process(folder, flags, *how):
    """The run of one process, which many tests compare with."""
    return train(0, configure(folder, flags), "legacy_ddp", 1, *how)


def processes(world, folder, flags, backend="legacy_ddp", *how):
    """The runs of so many processes."""
    return run_processes(world, train, configure(folder, flags), backend, world, *how)


def joined(states, experts):
    """Tensors by name, of all processes, as one process has them."""
    whole = {}
    for name, value in states[0].items():
        if ".experts." in name:
            places = [placement(experts, len(states), rank) for rank in range(len(states))]
            whole[name] = torch.cat([states[r][name] for r in places[0].holders])
            twins = [(r, place.replicas[0]) for r, place in enumerate(places)]
        else:
            whole[name] = value
            twins = [(r, 0) for r in range(len(states))]
        assert all(torch.equal(states[r][name], states[twin][name]) for r, twin in twins), name
    return whole


def assert_same(one, many, experts, rtol=1e-9):
    """Of each number of `many` processes' runs and that of one process, the difference is at most
    rtol times the largest of its tensor."""

    def assert_close(value, expected, what):
        # The floor is for gradients that are but rounding, as of the keys' biases.
        atol = rtol * max(float(expected.abs().max()), 1e-2)
        torch.testing.assert_close(value, expected, rtol=0, atol=atol, msg=lambda m: f"{what}: {m}")

    for run in many:
        for figures, expected in zip(run.figures, one.figures):
            assert figures == pytest.approx(expected, rel=rtol, abs=rtol)
    for update, expected in enumerate(one.gradients):
        found = joined([run.gradients[update] for run in many], experts)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert_close(value, expected[name], f"gradient of {name}, update {update}")
    found = joined([run.parameters for run in many], experts)
    assert found.keys() == one.parameters.keys()
    for name, value in found.items():
        assert_close(value, one.parameters[name], name)
    for part, expected in enumerate(one.outputs):
        assert_close(torch.cat([run.outputs[part] for run in many]), expected, "outputs")


WORLD = "--moe-routing-scope world --moe-normalize-expert-grad world_size --clip-norm 0.5"
DROPLESS, CAPACITY = "--moe-dropless", "--moe-capacity-factor 1"
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
    others = [finder for finder in sys.meta_path if not isinstance(finder, CommandFinder)]
    finder = CommandFinder("fairseq_cli.eval_lm", _evaluate_the_whole_set)
    monkeypatch.setattr(sys, "meta_path", [finder, *others])
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


def train_halved(rank, cfg, backend):
    trainer = make_trainer(cfg, backend, 2, torch.float32)
    logs = [
        trainer.train_step([as_sample(tokens.chunk(2)[rank])]) for tokens in batches() for _ in "ab"
    ]
    return [float(log["inner_loss"]) for log in logs if log is not None]


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
            for precision in (
                "--memory-efficient-fp16",
                "--fp16",
                "--fp16 --fp32-reduce-scatter",
            )
        ),
    ],
)
def test_half_precision_learns_on_two_processes(folder, precision, backend):
    cfg = configure(folder, f"--moe-expert-count 2 {precision} --optimizer adam --lr 0.01")
    for losses in run_processes(2, train_halved, cfg, backend):
        assert losses[-1] < losses[0] - 0.05


def test_bfloat16_computes_the_same_sharded(folder):
    """Parameters are float32, and rounded to bfloat16 for computing, by FSDP as by fairseq."""
    flags = f"--moe-expert-count 2 {DROPLESS} {WORLD} --min-params-to-wrap 0"
    how = (1, None, 1, torch.float32)
    exact = processes(2, folder, flags, "fully_sharded", *how)
    replicated = processes(2, folder, f"{flags} --bf16", "legacy_ddp", *how)
    sharded = processes(2, folder, f"{flags} --bf16", "fully_sharded", *how)
    for run, same, full in zip(sharded, replicated, exact):
        assert run.outputs[0].dtype == same.outputs[0].dtype == torch.bfloat16
        assert run.figures[0]["loss"] == pytest.approx(same.figures[0]["loss"], rel=1e-6)
        assert run.figures[0]["loss"] != full.figures[0]["loss"]
        for name, gradient in run.gradients[0].items():
            assert gradient.dtype == run.parameters[name].dtype == torch.float32
            expected = full.gradients[0][name]
            atol = 0.05 * max(float(expected.abs().max()), 1e-2)  # keys' biases have but rounding
            torch.testing.assert_close(gradient, expected, rtol=0, atol=atol, msg=name)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--moe-expert-count 3", "3 cannot be spread over 2 processes"),
        ("--moe-expert-count 2 --fp16", "--memory-efficient-fp16 or --fp16-no-flatten-grads"),
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
        assert words in message


def refusal(rank, cfg):
    try:
        make_trainer(cfg, cfg.distributed_training.ddp_backend, 2)
    except UserError as error:
        return str(error)
    return ""
