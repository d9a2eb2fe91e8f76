"""Updates by fairseq's Trainer, one by one, on one process and on several: every number of them."""

import contextlib
import copy
import functools
import re
import sys
from pathlib import Path
from typing import Dict, List, NamedTuple

import pytest
import torch
import torch.distributed as dist
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import fsdp_enable_wrap, fsdp_wrap
from fairseq.distributed.fully_sharded_data_parallel import FullyShardedDataParallel
from fairseq.trainer import Trainer
from processes import run_processes
from small_models import PAD, VOCABULARY, make_task

import fairseq_moe_ext
from fairseq_moe_ext.expert_parallel import placement
from fairseq_moe_ext.fully_sharded import is_sharded, locations

BACKENDS = ["legacy_ddp", "pytorch_ddp", "fully_sharded"]
ROWS, LENGTH, UPDATES = 8, 6, 5
LENGTHS = (6, 3, 6, 6, 5, 4, 3, 2)  # so 2 and 4 processes pad their rows to different lengths
FLAGS = "--task language_modeling --arch moe_lm_tiny --criterion moe_cross_entropy --cpu"
FLAGS += " --decoder-layers 2 --decoder-embed-dim 8 --decoder-ffn-embed-dim 12"
FLAGS += " --decoder-attention-heads 2 --tokens-per-sample 8 --dropout 0 --attention-dropout 0"
FLAGS += " --optimizer sgd --lr 0.5 --moe-gate-loss-wt 0.1 --batch-size 8"
FLAGS += f" --user-dir {Path(fairseq_moe_ext.__file__).parent}"


def save_dictionary(folder):
    """A folder with all of a data-bin that a model is built from."""
    make_task().source_dictionary.save(str(folder / "dict.txt"))
    return str(folder)


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
        tokens = torch.randint(4, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
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
    for name, place in locations(model).items():
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
