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
from fairseq_moe_ext.expert_parallel import placement

ROWS, LENGTH, UPDATES = 8, 6, 5
FLAGS = "--task language_modeling --arch moe_lm_tiny --criterion moe_cross_entropy --cpu"
FLAGS += " --decoder-layers 2 --decoder-embed-dim 8 --decoder-ffn-embed-dim 12"
FLAGS += " --decoder-attention-heads 2 --tokens-per-sample 8 --dropout 0 --attention-dropout 0"
FLAGS += " --optimizer sgd --lr 0.5 --moe-gate-loss-wt 0.1 --batch-size 8"
FLAGS += f" --user-dir {Path(fairseq_moe_ext.__file__).parent}"


def make_trainer(folder, flags, world_size):
    """fairseq's Trainer of a small model in float64."""
    parser = options.get_training_parser()
    arguments = f"{folder} {FLAGS} {flags} --distributed-world-size {world_size}"
    sys.argv[1:] = arguments.split()  # the first, partial parse reads these
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments.split()))
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(1)
    model = task.build_model(cfg.model).double()
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


def train(rank, folder, flags, world_size, idle=None, parts=1):
    """Five updates. parts: micro-batches of a process, for gradient accumulation; idle: number of
    an update at which only process 0 has data."""
    trainer = make_trainer(folder, flags, world_size)
    trainer.model.train()
    logs = []
    for update, tokens in enumerate(batches()):
        share = ROWS // world_size
        mine = tokens[rank * share : (rank + 1) * share]
        samples = [as_sample(part) for part in mine.chunk(parts)]
        if update == idle:
            samples = [as_sample(tokens[: ROWS // world_size])] if rank == 0 else [{}]
        log = trainer.train_step(samples)
        gnorm = float(trainer._last_gnorm) if hasattr(trainer, "_last_gnorm") else None
        logs.append({k: float(v) for k, v in log.items() if k not in UNCOMPARED} | {"g": gnorm})
    return logs, {n: p.detach() for n, p in trainer.get_model().named_parameters()}


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


def assert_same(one, many, experts, names_of_logs=None):
    for name, value in whole_model(many, experts).items():
        torch.testing.assert_close(value, one[1][name], rtol=1e-9, atol=1e-11, msg=name)
    for log, expected in zip(many[0][0], one[0]):
        for key in names_of_logs or expected:
            assert log[key] == pytest.approx(expected[key], abs=2e-3), key


@pytest.mark.parametrize("capacity", ["--moe-dropless", "--moe-capacity-factor 1"])
@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp"])
@pytest.mark.parametrize("world, experts", [(2, 4), (2, 2), (4, 4), (4, 2)])
def test_world_scope_equals_one_process(folder, world, experts, backend, capacity):
    flags = f"--moe-expert-count {experts} --ddp-backend {backend} --clip-norm 0.5 {capacity}"
    flags += " --moe-routing-scope world --moe-normalize-expert-grad world_size"
    one = train(0, folder, flags, 1)
    many = run_processes(world, train, folder, flags, world)
    assert_same(one, many, experts)
