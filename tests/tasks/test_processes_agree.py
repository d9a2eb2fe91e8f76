"""N processes give the figures of one where rows are padded and a subset has several corpora: the
batches of a step are of one corpus, and padded to one length."""

import dataclasses
import math

import pytest
import torch
from fairseq import metrics, tasks
from fairseq.trainer import Trainer
from fairseq_cli import eval_lm
from mixture_data import configure
from omegaconf import OmegaConf
from processes import run_processes
from small_models import make_config
from updates import joined, whole_parameters

from fairseq_moe_ext.criterions.moe_cross_entropy import MoECrossEntropyCriterion
from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

EXPERTS, UPDATES, BLOCK = 4, 3, 128


def run(rank, world, data, mode, flags, rows):
    """Figures of validation and of some updates, the perplexity that eval-lm gives of all corpora,
    and the parameters; of batches of so many rows a process."""
    cfg = configure(
        data, "--sample-break-mode", mode, "--batch-size", rows, "--tokens-per-sample", BLOCK
    )
    cfg.dataset.batch_size_valid = cfg.task.batch_size_valid = rows
    cfg.distributed_training.distributed_world_size = world
    cfg.distributed_training.distributed_rank = rank
    cfg.distributed_training.ddp_backend = "legacy_ddp"
    shape = dict(moe_freq=2, moe_expert_count=EXPERTS, moe_second_expert_policy="all")
    settings = make_config(**shape, tokens_per_sample=BLOCK, batch_size=rows, **flags)
    cfg.model = OmegaConf.create(dataclasses.asdict(settings))
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(1)
    model = MoETransformerLanguageModel.build_model(settings, task).double()
    criterion = MoECrossEntropyCriterion(task, 0.1, "average", "none", 0.1, False, False)
    trainer = Trainer(cfg, task, model, criterion)
    for split in ("train", "valid"):
        task.load_dataset(split)
    with metrics.aggregate(new_root=True) as valid:
        for sample in trainer.get_valid_iterator("valid").next_epoch_itr(shuffle=False):
            trainer.valid_step(sample)
    loader = task.eval_lm_dataloader(
        task.dataset("valid"), batch_size=rows, num_shards=world, shard_id=rank, num_workers=0
    )
    loss = eval_lm.eval_lm([model], task.source_dictionary, loader, device=torch.device("cpu"))[
        "loss"
    ]
    with metrics.aggregate(new_root=True) as train:
        batches = iter(trainer.get_train_iterator(1).next_epoch_itr(shuffle=False))
        for _ in range(UPDATES):
            trainer.train_step([next(batches)])
    found = {f"{name} {key}": value for name, meters in (("valid", valid), ("train", train))
             for key, value in averages(meters).items()}  # fmt: skip
    return {**found, "eval-lm": float(loss)}, whole_parameters(model)


def averages(meters):
    """Not rounded, as the trainer logs them to users; but no times."""
    found = {key: float(m.avg) for key, m in meters.items() if hasattr(m, "avg")}
    return {key: v for key, v in found.items() if key not in ("wps", "ups", "wpb", "train_wall")}


WORLD = {"moe_routing_scope": "world"}
MASKED = {"use_moe_pad_mask": True}


@pytest.mark.parametrize(
    "world, mode, flags",
    [
        (2, "eos", WORLD),
        *(
            pytest.param(world, mode, flags, marks=[pytest.mark.slow])
            for world in (2, 4)
            for mode in ("eos", "complete")
            for flags in (WORLD, {**WORLD, **MASKED}, {**WORLD, "moe_pad_rule": "branch"})
            if (world, mode, flags) != (2, "eos", WORLD)
        ),
    ],
)
def test_processes_that_route_together_are_one_with_larger_batches(data, world, mode, flags):
    one, whole = run(0, 1, data, mode, flags, 8)
    assert one["valid overflow_expert1"] > 0 and one["train overflow_expert1"] >= 0
    many = run_processes(world, run, world, data, mode, flags, 8 // world)
    assert_same(one, whole, many)


@pytest.mark.parametrize("flags", [{}, pytest.param(MASKED, marks=pytest.mark.slow)])
def test_processes_that_route_alone_validate_as_one(data, flags):
    one, _ = run(0, 1, data, "eos", flags, 4)
    for found, _ in run_processes(2, run, 2, data, "eos", flags, 4):
        for key, value in found.items():
            if not key.startswith("train") and key != "valid bsz":  # a step is of two batches
                assert value == pytest.approx(one[key], rel=1e-6), key


def assert_same(one, whole, many):
    for found, _ in many:
        assert found.keys() == one.keys()
        for key, value in one.items():
            if not math.isnan(value):
                assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-9), key
    parameters = joined([parameters for _, parameters in many], EXPERTS)
    for name, value in parameters.items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-6, msg=name)
