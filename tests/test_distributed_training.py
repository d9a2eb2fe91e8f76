"""Training on N processes equals training on one, through fairseq's Trainer."""

import sys
from pathlib import Path

import pytest
import torch
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer
from processes import run_processes
from small_models import PAD, TYPES, make_task

import fairseq_moe_ext
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.expert_parallel import placement, traffic

ROWS, LENGTH, UPDATES = 8, 6, 5
FLAGS = "--task language_modeling --arch moe_lm_tiny --criterion moe_cross_entropy --cpu"
FLAGS += " --decoder-layers 2 --decoder-embed-dim 8 --decoder-ffn-embed-dim 12"
FLAGS += " --decoder-attention-heads 2 --tokens-per-sample 8 --dropout 0 --attention-dropout 0"
FLAGS += " --optimizer sgd --lr 0.5 --moe-gate-loss-wt 0.1 --batch-size 8"
FLAGS += f" --user-dir {Path(fairseq_moe_ext.__file__).parent}"


def make_trainer(folder, flags, world_size, dtype=torch.float64):
    """fairseq's Trainer of a small model."""
    parser = options.get_training_parser()
    arguments = f"{folder} {FLAGS} {flags} --distributed-world-size {world_size}"
    sys.argv[1:] = arguments.split()  # the first, partial parse reads these
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments.split()))
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(1)
    model = task.build_model(cfg.model).to(dtype)
    return Trainer(cfg, task, model, task.build_criterion(cfg.criterion))


def batches():
    """A batch for each update, of which the rows go to the processes in turn."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(UPDATES):
        tokens = torch.randint(4, TYPES, (ROWS, LENGTH + 1), generator=generator)
        tokens[1, 4:] = PAD  # in rows of the first process, whatever their number
        yield tokens


def as_sample(tokens):
    target = tokens[:, 1:].contiguous()
    return {
        "id": torch.arange(len(tokens)),
        "nsentences": len(tokens),
        "ntokens": int(target.ne(PAD).sum()),
        "net_input": {
            "src_tokens": tokens[:, :-1].contiguous(),
            "src_lengths": torch.full((len(tokens),), LENGTH),
        },
        "target": target,
    }


def train(
    rank, folder, flags, world_size, parts=1, idle=None, updates=UPDATES, dtype=torch.float64
):
    """Some updates; returns their logs and the parameters of this process.

    parts: micro-batches an update; idle: an update at which only process 0 has data.
    """
    trainer = make_trainer(folder, flags, world_size, dtype)
    traffic.take()  # what earlier tests in this process have sent
    trainer.reset_dummy_batch(as_sample(next(batches())))
    norms, logs = [], []
    clip = trainer.clip_grad_norm
    trainer.clip_grad_norm = lambda limit: norms.append(clip(limit)) or norms[-1]
    for update, tokens in zip(range(updates), batches()):
        samples = [as_sample(part.chunk(world_size)[rank]) for part in tokens.chunk(parts)]
        if update == idle:
            samples = [as_sample(tokens[:2]) if rank == 0 else {}]
        log = trainer.train_step(samples)
        figures = {key: float(log[key]) for key in log if key not in UNCOMPARED}
        logs.append({**figures, "gnorm": float(norms[-1])})
    parameters = trainer.get_model().named_parameters()
    return logs, {name: parameter.detach() for name, parameter in parameters}


UNCOMPARED = ("wps", "ups", "wall", "train_wall", "gb_free", "wpb", "bsz")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    make_task().source_dictionary.save(str(path / "dict.txt"))
    return str(path)


def whole_model(results, experts):
    """The parameters of all processes as one process has them."""
    parameters = dict(results[0][1])
    for name, value in parameters.items():
        if ".experts." in name:
            holders = placement(experts, len(results), 0).holders
            parameters[name] = torch.cat([results[r][1][name] for r in holders])
        else:
            for _, other in results[1:]:
                torch.testing.assert_close(other[name], value, rtol=1e-12, atol=1e-14)
    return parameters


def assert_same(one, many, experts, rtol=1e-9, atol=1e-11):
    for name, value in whole_model(many, experts).items():
        torch.testing.assert_close(value, one[1][name], rtol=rtol, atol=atol, msg=name)
    for logs, _ in many:  # losses, figures and the gradient's norm, as printed
        for log, expected in zip(logs, one[0]):
            assert log == pytest.approx(expected, abs=2e-3)


WORLD = "--moe-routing-scope world --moe-normalize-expert-grad world_size --clip-norm 0.5"


@pytest.mark.parametrize("capacity", ["--moe-dropless", "--moe-capacity-factor 1"])
@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
@pytest.mark.parametrize("world, experts", [(2, 4), (2, 2), (4, 4), (4, 2)])
def test_world_scope_equals_one_process(folder, world, experts, backend, capacity):
    flags = f"--moe-expert-count {experts} --ddp-backend {backend} {capacity} {WORLD}"
    one = train(0, folder, flags, 1)
    assert one[0][0]["gnorm"] > 0.5  # so that clipping matters
    assert_same(one, run_processes(world, train, folder, flags, world), experts)


@pytest.mark.parametrize(
    "options",
    [
        "--moe-top1-expert",
        "--checkpoint-activations",
        "--moe-normalize-expert-grad sqrt_num_experts",
        "--moe-z-loss-wt 0.1 --moe-log-per-layer",
        "--use-moe-pad-mask --moe-gate-loss-transform neg_log",
    ],
)
def test_other_settings_equal_one_process(folder, options):
    flags = f"--moe-expert-count 4 --ddp-backend legacy_ddp {WORLD} {options}"
    one = train(0, folder, flags, 1)
    assert_same(one, run_processes(2, train, folder, flags, 2), 4)


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_in_float32_with_recomputed_activations(folder, backend):
    world, experts = 2, 4
    flags = f"--moe-expert-count {experts} --ddp-backend {backend} {WORLD} --moe-capacity-factor 1"
    flags += " --checkpoint-activations"
    one = train(0, folder, flags, 1, 1, None, UPDATES, torch.float32)
    many = run_processes(world, train, folder, flags, world, 1, None, UPDATES, torch.float32)
    assert_same(one, many, experts, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_gradient_accumulation_equals_one_process(folder, backend):
    flags = f"--moe-expert-count 2 --ddp-backend {backend} {WORLD}"
    one = train(0, folder, flags, 1, 2)
    assert_same(one, run_processes(4, train, folder, flags, 4, 2), 2)


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
@pytest.mark.parametrize("world, experts", [(2, 4), (4, 2)])
def test_process_scope_equals_one_process_with_the_batches_as_groups(
    folder, world, experts, backend
):
    """The branch's rule: each process's batch is a group with a capacity of its own; so is each
    micro-batch of one process."""
    flags = f"--moe-expert-count {experts} --ddp-backend {backend} --clip-norm 0.5"
    flags += " --moe-normalize-expert-grad world_size"
    one = train(0, folder, flags, 1, world)
    many = run_processes(world, train, folder, flags, world)
    assert_same(one, many, experts)


@pytest.mark.parametrize("scope", ["process", "world"])
def test_a_process_without_data_neither_hangs_nor_counts(folder, scope):
    flags = f"--moe-expert-count 2 --ddp-backend legacy_ddp --moe-routing-scope {scope}"
    flags += " --moe-normalize-expert-grad world_size"
    one = train(0, folder, flags, 1, 2 if scope == "process" else 1, 2)
    assert_same(one, run_processes(2, train, folder, flags, 2, 1, 2), 2)


def test_expert_gradients_by_the_root_of_the_world_size(folder):
    """One update of SGD: the experts' step is sqrt(2) times what world_size gives."""
    steps = {}
    for choice in ("world_size", "sqrt_world_size"):
        flags = (
            f"--moe-expert-count 2 --ddp-backend legacy_ddp --moe-normalize-expert-grad {choice}"
        )
        start, end = (run_processes(2, train, folder, flags, 2, 1, None, n)[0][1] for n in (0, 1))
        steps[choice] = {name: end[name] - start[name] for name in start}
    for name, step in steps["world_size"].items():
        factor = 2**0.5 if ".experts." in name else 1.0
        torch.testing.assert_close(steps["sqrt_world_size"][name], step * factor)


def test_exchanges_are_counted(folder):
    """Dropless top-2: every token's two rows of 8 float64 go there, back, and again as gradients;
    what stays on the process is not counted, so at most all of it is."""
    flags = "--moe-expert-count 2 --ddp-backend legacy_ddp --moe-dropless --record-a2a-perf-stats"
    (logs, _), _ = run_processes(2, train, folder, flags, 2, 1, None, 3)
    forward_only, *both = [log["all_to_all_mb"] for log in logs]  # both processes, averaged
    tokens, rows = ROWS // 2 * LENGTH, 2
    one_way = tokens * rows * 8 * 8 / 2 / 1e6  # either of two experts is elsewhere
    assert forward_only == pytest.approx(2 * one_way, abs=1e-3)
    assert both == pytest.approx([4 * one_way] * 2, abs=1e-3)
    assert all(log["all_to_all_cpu_time_ms"] > 0 for log in logs)


def train_halved(rank, folder, flags):
    trainer = make_trainer(folder, flags, 2, torch.float32)
    logs = [
        trainer.train_step([as_sample(tokens.chunk(2)[rank])]) for tokens in batches() for _ in "ab"
    ]
    return [float(log["inner_loss"]) for log in logs if log is not None]


@pytest.mark.parametrize("precision", ["--memory-efficient-fp16", "--bf16"])
@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
def test_half_precision_learns_on_two_processes(folder, precision, backend):
    flags = f"--moe-expert-count 2 --ddp-backend {backend} {precision} --optimizer adam --lr 0.01"
    for losses in run_processes(2, train_halved, folder, flags):
        assert losses[-1] < losses[0] - 0.05


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
    for message in run_processes(2, refusal, folder, f"--ddp-backend legacy_ddp {flags}"):
        assert words in message


def refusal(rank, folder, flags):
    try:
        make_trainer(folder, flags, 2)
    except UserError as error:
        return str(error)
    return ""
