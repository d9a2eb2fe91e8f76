"""Checkpoints on any number of processes: training goes on as if nothing had happened."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fairseq import checkpoint_utils, options, tasks
from fairseq.data import Dictionary, indexed_dataset, iterators
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import fsdp_enable_wrap, fsdp_wrap
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import progress_bar
from fairseq.trainer import Trainer
from fairseq_cli import train as fairseq_train
from fairseq_cli import validate as fairseq_validate
from processes import run_processes

import fairseq_moe_ext
from fairseq_moe_ext import distributed_training, fingerprint
from fairseq_moe_ext.checkpoint import removing, saving, together
from fairseq_moe_ext.checkpoint.format import VERSION
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.kernels.expert_ffn import scale_gradient
from fairseq_moe_ext.models import language_model
from fairseq_moe_ext.moe.experts import Experts, GroupedLinear

GLOBAL_BATCH, SAVED, UPDATES = 8, 4, 14  # sentences; the updates before and after the checkpoint
MODEL = "--task language_modeling --arch moe_lm_tiny --criterion moe_cross_entropy --cpu"
MODEL += " --decoder-layers 2 --decoder-embed-dim 8 --decoder-ffn-embed-dim 12 --dropout 0"
MODEL += " --decoder-attention-heads 2 --tokens-per-sample 8 --attention-dropout 0"
MODEL += " --moe-gate-loss-wt 0.1 --moe-routing-scope world --ddp-backend legacy_ddp"
MODEL += f" --user-dir {Path(fairseq_moe_ext.__file__).parent}"
TRAIN = f"{MODEL} --optimizer adam --lr 0.01 --clip-norm 0.5 --max-update {UPDATES}"
TRAIN += " --required-batch-size-multiple 1 --num-workers 0 --curriculum 100"
TRAIN += " --no-progress-bar --log-format none --disable-validation"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def make_data(folder):
    """A data-bin of 1,000 tokens: 125 rows, 16 updates an epoch."""
    dictionary = Dictionary()
    for i in range(20):
        dictionary.add_symbol(f"w{i}", n=100 - i)
    dictionary.save(str(folder / "dict.txt"))
    for split, sentences in (("train", 100), ("valid", 8)):
        writer = indexed_dataset.make_builder(str(folder / f"{split}.bin"), "mmap", len(dictionary))
        for i in range(sentences):
            words = " ".join(f"w{(i * i + j * (1 + i % 3)) % 20}" for j in range(9))
            writer.add_item(dictionary.encode_line(words, add_if_not_exist=False))
        writer.finalize(str(folder / f"{split}.idx"))
    return str(folder)


def settings(line, rank, world):
    parser = options.get_training_parser()
    line += f" --distributed-world-size {world} --distributed-rank {rank}"
    sys.argv[1:] = line.split()  # the first, partial parse reads these
    return convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, line.split()))


def train(rank, world, line, batch=None):
    """fairseq-train in this process; returns the loss of each update, over all processes."""
    losses = []
    stock = Trainer._reduce_and_log_stats

    def record(self, logs, sample_size, grad_norm=None):
        losses.append(float(sum(log["inner_loss"] for log in logs)) / float(sample_size))
        return stock(self, logs, sample_size, grad_norm)

    vars(checkpoint_utils.save_checkpoint).pop("best", None)
    Trainer._reduce_and_log_stats = record
    try:
        line += f" --batch-size {batch or GLOBAL_BATCH // world}"
        fairseq_train.main(settings(line, rank, world))
    finally:
        Trainer._reduce_and_log_stats = stock
    return losses


def train_on(world, line, batch=None):
    """Losses of a run on so many processes."""
    if world == 1:
        return train(0, 1, line, batch)
    results = run_processes(world, train, world, line, batch)
    assert all(result == results[0] for result in results)
    return results[0]


def first_run(data, folder, world, experts, options=""):
    """An uninterrupted run that leaves checkpoint_1_4.pt; returns its losses."""
    line = f"{data} {TRAIN} --moe-expert-count {experts} {options} --save-dir {folder}"
    losses = train_on(world, f"{line} --save-interval-updates {SAVED} --keep-interval-updates -1")
    assert len(losses) == UPDATES
    return losses


def resume(data, folder, world, experts, options="", batch=None, save_dir=None):
    """Losses of a run that goes on from checkpoint_1_4.pt."""
    line = f"{data} {TRAIN} --moe-expert-count {experts} {options} --save-dir {save_dir or folder}"
    line += f" --restore-file {folder}/checkpoint_1_{SAVED}.pt --no-save"
    return train_on(world, line, batch)


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """(processes, experts) -> folder and losses of an uninterrupted run; each is made once."""
    made = {}

    def run(world, experts):
        if (world, experts) not in made:
            folder = tmp_path_factory.mktemp(f"run{world}_{experts}")
            made[world, experts] = folder, first_run(data, folder, world, experts)
        return made[world, experts]

    return run


def loaded(rank, world, line, path):
    """Name -> parameter and what the optimizer remembers of it, after loading a checkpoint."""
    cfg = settings(f"{line} --batch-size 1", rank, world)
    task = tasks.setup_task(cfg.task)
    trainer = Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))
    assert trainer.load_checkpoint(path) is not None
    state = trainer.optimizer.state_dict()["state"]
    parameters = trainer.get_model().named_parameters()
    found = {name: {"": p.detach(), **state[i]} for i, (name, p) in enumerate(parameters)}
    return {
        **found,
        "scale": {"": torch.tensor(trainer.optimizer.state_dict().get("loss_scale", 0))},
    }


def joined(states, experts):
    """What all processes loaded, as one process has it."""
    whole = {}
    for name, of_first in states[0].items():
        whole[name] = {}
        for key, value in of_first.items():
            values = [state[name][key] for state in states]
            if ".experts." in name and isinstance(value, torch.Tensor) and value.numel() > 1:
                value = torch.cat(values[: min(experts, len(states))])
            else:
                assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(value)) for v in values)
            whole[name][key] = value
    return whole


def error_of(rank, function, *args):
    try:
        function(rank, *args)
    except UserError as error:
        return str(error)
    return "no error"


def expert_files(folder):
    return {path.name for path in (Path(folder) / "experts").glob("*")}


def referred_files(folder):
    """Expert files that the checkpoints of a folder refer to."""
    found = set()
    for path in Path(folder).glob("*.pt"):
        manifest = torch.load(path, weights_only=True).get("experts", {"files": ()})
        found |= {file["name"].split("/")[1] for file in manifest["files"]}
    return found


@pytest.mark.parametrize(
    "experts, first, then",
    [
        (4, 2, 4),
        (2, 4, 2),
        *(
            pytest.param(*numbers, marks=pytest.mark.slow)
            for numbers in [(4, 1, 2), (4, 2, 1), (4, 2, 2), (2, 4, 4), (2, 4, 1), (2, 1, 4)]
        ),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(data, runs, experts, first, then):
    """experts < processes: with replicas."""
    goes_on(data, runs, experts, first, then)


@pytest.mark.slow
@pytest.mark.parametrize(
    "experts, first, then",
    [
        *((8, 8, then) for then in (1, 2, 4, 8)),
        *((8, first, 8) for first in (1, 2, 4)),
        *((4, 8, then) for then in (2, 8)),
        (2, 8, 1),
    ],
)
def test_eight_processes_too(data, runs, experts, first, then):
    goes_on(data, runs, experts, first, then)


def goes_on(data, runs, experts, first, then):
    folder, losses = runs(first, experts)
    resumed = resume(data, folder, then, experts)
    expected = losses[SAVED:]
    assert len(resumed) == len(expected) == 10
    if first == then:
        assert resumed == expected
    else:
        assert resumed == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_pytorch_ddp_goes_on(data, tmp_path):
    """From two processes to one and to four."""
    losses = first_run(data, tmp_path, 2, 4, "--ddp-backend pytorch_ddp")
    for then in (1, 4):
        resumed = resume(data, tmp_path, then, 4, "--ddp-backend pytorch_ddp")
        assert resumed == pytest.approx(losses[SAVED:], rel=1e-5)


def test_with_update_freq_instead_of_processes(data, runs, tmp_path):
    """Half the processes, twice the batches each: the place in the data is that of all."""
    options = "--moe-dropless --moe-gate-loss-wt 0"  # which treat each micro-batch by itself
    losses = first_run(data, tmp_path, 2, 4, options)
    resumed = resume(data, tmp_path, 1, 4, f"{options} --update-freq 2", batch=GLOBAL_BATCH // 2)
    assert resumed == pytest.approx(losses[SAVED:], rel=1e-5)


SHARDED = "--ddp-backend fully_sharded --min-params-to-wrap"


@pytest.fixture(scope="module")
def sharded_run(data, tmp_path_factory):
    """As runs(2, 4), with each layer's shared parameters sharded."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, first_run(data, folder, 2, 4, f"{SHARDED} 0")


@pytest.mark.parametrize(
    "then, options",
    [
        (2, f"{SHARDED} 0"),
        (1, ""),
        pytest.param(2, "", marks=pytest.mark.slow),
        pytest.param(2, f"{SHARDED} 100000000", marks=pytest.mark.slow),
        pytest.param(4, f"{SHARDED} 0", marks=pytest.mark.slow),
    ],
)
def test_sharded_runs_go_on_under_any_backend(data, runs, sharded_run, then, options):
    folder, losses = sharded_run
    assert losses == pytest.approx(runs(2, 4)[1], rel=1e-5)
    assert resume(data, folder, then, 4, options) == pytest.approx(losses[SAVED:], rel=1e-5)


def test_bfloat16_goes_on_sharded_and_back(data, tmp_path):
    """Whose optimizer states are the same, but for the name that fairseq gives the optimizer."""
    runs = [(2, f"{SHARDED} 0"), (1, "")]
    for (first, backend), (then, other) in (runs, runs[::-1]):
        losses = first_run(data, tmp_path / str(first), first, 4, f"--bf16 {backend}")
        resumed = resume(data, tmp_path / str(first), then, 4, f"--bf16 {other}")
        assert resumed == pytest.approx(losses[SAVED:], rel=0.02)


@pytest.mark.parametrize("first", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_other_runs_go_on_sharded(data, runs, first):
    folder, losses = runs(first, 4)
    resumed = resume(data, folder, 2, 4, f"{SHARDED} 0")
    assert resumed == pytest.approx(losses[SAVED:], rel=1e-5)


@pytest.mark.slow
def test_dense_models_are_sharded_too(data, tmp_path):
    options = "--arch dense_lm_tiny --moe-freq 0"
    losses = first_run(data, tmp_path, 2, 0, f"{options} {SHARDED} 0")
    assert losses == pytest.approx(first_run(data, tmp_path / "one", 1, 0, options), rel=1e-5)
    for world, backend in ((4, f"{SHARDED} 0"), (1, "")):
        resumed = resume(data, tmp_path, world, 0, f"{options} {backend}")
        assert resumed == pytest.approx(losses[SAVED:], rel=1e-5)


def assert_alike(one, other, name=""):
    """Files of two backends: the same names, shapes and, but for rounding, numbers. The gradient of
    a bias of keys is nothing but rounding, of which Adam makes what it makes."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_alike(one[key], other[key], f"{name}/{key}")
    elif name.endswith("k_proj.bias"):
        assert one.shape == other.shape
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=lambda m: f"{name}: {m}")
    else:
        assert one == other


def test_files_tell_nothing_of_sharding(runs, sharded_run):
    files = []
    for folder, _ in (runs(2, 4), sharded_run):
        state = torch.load(folder / f"checkpoint_1_{SAVED}.pt", weights_only=True)
        experts = [
            torch.load(folder / f["name"], weights_only=True) for f in state["experts"]["files"]
        ]
        for content in experts:
            del content["save"]
        indices = state["experts"]["indices"]
        files.append(
            (state.keys(), state["model"], state["last_optimizer_state"], indices, experts)
        )
    assert files[0][0] == files[1][0]
    for one, other in zip(files[0][1:4], files[1][1:4]):
        assert_alike(one, other)
    for one, other in zip(files[0][4], files[1][4]):
        assert_alike(one, other)


def test_sharded_run_without_anything_to_save(data, tmp_path):
    """fairseq's processes but the first would wait for it for ever."""
    flags = "--no-epoch-checkpoints --no-last-checkpoints --max-update 4"
    line = f"{data} {TRAIN} --moe-expert-count 4 {SHARDED} 0 {flags}"
    assert len(train_on(2, f"{line} --save-dir {tmp_path}")) == 4


def saves_by_itself(rank, line, path):
    """What stock's Trainer does on the process in which training fails, here rank 0."""
    cfg = settings(f"{line} --batch-size 1", rank, 2)
    task = tasks.setup_task(cfg.task)
    with fsdp_enable_wrap(cfg.distributed_training):
        model = fsdp_wrap(task.build_model(cfg.model))
    trainer = Trainer(cfg, task, model, task.build_criterion(cfg.criterion))
    if rank == 0:
        trainer.consolidate_optimizer()
        trainer.save_checkpoint(path, {})


def test_a_process_that_fails_does_not_wait_for_others_to_save(data, tmp_path):
    line = f"{data} {TRAIN} --moe-expert-count 4 {SHARDED} 0"
    run_processes(2, saves_by_itself, line, str(tmp_path / "crash.pt"))
    assert not list(tmp_path.iterdir())


def test_evaluation_of_a_sharded_run(data, runs, sharded_run):
    found = []
    for folder, _ in (runs(2, 4), sharded_run):
        line = f"{data} {EVAL} --path {folder}/checkpoint_last.pt"
        line += " --model-overrides {'moe_eval_capacity_token_fraction':1.0}"
        found.append(perplexity(0, 1, line))
        assert run_processes(2, perplexity, 2, line) == pytest.approx([found[-1]] * 2, rel=1e-6)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
def test_sharded_half_precision_goes_on(data, tmp_path):
    """--fp16 and --bf16: float32 pieces; --memory-efficient-fp16: float16 ones."""
    for precision in ("--fp16", "--memory-efficient-fp16", "--bf16"):
        folder = tmp_path / precision.strip("-")
        options = f"{SHARDED} 0 {precision} --fp16-init-scale 4"
        losses = first_run(data, folder, 2, 4, options)
        assert losses[-1] < losses[0]
        assert resume(data, folder, 2, 4, options) == losses[SAVED:]
        assert resume(data, folder, 4, 4, options) == pytest.approx(losses[SAVED:], rel=1e-2)


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--memory-efficient-bf16", "fairscale shards float32 and float16: use --bf16"),
        ("--compile", "--compile with --ddp-backend fully_sharded"),
        ("--use-sharded-state", "--use-sharded-state with"),
        ("--cpu-offload", "--cpu-offload with"),
        ("--not-fsdp-flatten-parameters", "--not-fsdp-flatten-parameters with"),
        ("--fp32-reduce-scatter", "--fp32-reduce-scatter with"),
        ("--optimizer adafactor", "--optimizer adafactor"),
        ("--moe-expert-count 3", "3 cannot be spread over 2 processes"),
    ],
)
def test_what_cannot_be_sharded_right_is_refused_by_name(data, tmp_path, flag, words):
    line = f"{data} {TRAIN} --moe-expert-count 4 {SHARDED} 0 --save-dir {tmp_path} {flag}"
    for message in run_processes(2, error_of, train, 2, line):
        assert words in message and "\n" not in message


def test_one_process_has_nothing_to_shard(data, tmp_path, capsys):
    line = f"{data} {TRAIN} --moe-expert-count 4 {SHARDED} 0 --save-dir {tmp_path}"
    cfg = settings(f"{line} --batch-size 8", 0, 1)
    with pytest.raises(SystemExit):
        distributed_utils.call_main(cfg, fairseq_train.main)
    assert "--ddp-backend fully_sharded: one process" in capsys.readouterr().err


PRECISIONS = ["--memory-efficient-fp16", "--fp16 --fp16-no-flatten-grads", "--bf16"]


@pytest.mark.parametrize("precision", ["", *PRECISIONS])
def test_every_number_is_there_again(data, tmp_path, precision):
    """Parameters, optimizer state and loss scale; written by 1 and 2, loaded on 1, 2 and 4."""
    line = f"{data} {TRAIN} --moe-expert-count 4 {precision} --fp16-init-scale 4"
    for writers, readers in ((1, 2), (2, 4)):
        folder = tmp_path / str(writers)
        train_on(writers, f"{line} --max-update 2 --save-dir {folder}")
        path = str(folder / "checkpoint_last.pt")
        one = joined([loaded(0, 1, line, path)], 4)
        assert torch.all(one["decoder.layers.1.moe_layer.experts.fc1.bias"]["exp_avg"] != 0)
        seen = joined(run_processes(readers, loaded, readers, line, path), 4)
        assert seen.keys() == one.keys()
        for name, state in one.items():
            for key, value in state.items():
                found, value = torch.as_tensor(seen[name][key]), torch.as_tensor(value)
                assert torch.equal(found, value) and found.dtype == value.dtype


class WiderExperts(Experts):
    """Experts with a matrix more than ours."""

    def __init__(self, num_experts, dim, *args, first=0, **options):
        super().__init__(num_experts, dim, *args, first=first, **options)
        self.fc3 = GroupedLinear(num_experts, dim, dim, first)

    def forward(self, x, counts):
        stacks = (scale_gradient(p, self.grad_scale) for p in self.fc3.parameters())
        parts = zip(x.split(counts), *stacks)
        return super().forward(x, counts) + torch.cat([F.linear(*part) for part in parts])


def train_wider(rank, world, line):
    with mock.patch("fairseq_moe_ext.moe.layer.Experts", WiderExperts):
        return train(rank, world, line, GLOBAL_BATCH // world)


def test_a_matrix_more_of_the_experts_is_saved_with_them(data, tmp_path):
    """Trained, saved and loaded by one definition of what is an expert's."""
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {tmp_path}"
    often = f"--save-interval-updates {SAVED} --keep-interval-updates -1"
    losses = run_processes(2, train_wider, 2, f"{line} {often}")[0]
    path = tmp_path / f"checkpoint_1_{SAVED}.pt"
    manifest = torch.load(path, weights_only=True)["experts"]
    assert "decoder.layers.1.moe_layer.experts.fc3.weight" in manifest["indices"]
    again = f"{line} --restore-file {path} --no-save"
    assert run_processes(2, train_wider, 2, again)[0] == losses[SAVED:]
    assert train_wider(0, 1, again) == pytest.approx(losses[SAVED:], rel=1e-5)


def save_marked_wrong(rank, line):
    with mock.patch.object(language_model, "mark_experts", lambda model: True):
        return error_of(rank, train, 2, line)


def test_what_is_named_and_what_is_marked_as_an_expert_s_agree(data, tmp_path):
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {tmp_path} --max-update 1"
    for error in run_processes(2, save_marked_wrong, line):
        assert "marked as an expert's parameter or named as one, not both" in error
    assert not list(tmp_path.glob("*.pt"))


def test_joined_fp16_state_is_refused_by_name(data, tmp_path):
    line = f"{data} {TRAIN} --moe-expert-count 4 --fp16"
    train_on(1, f"{line} --max-update 2 --save-dir {tmp_path}")
    line += f" --fp16-no-flatten-grads --save-dir {tmp_path} --no-save"
    for message in run_processes(2, error_of, train, 2, line):
        assert "optimizer state is of 1 tensors" in message
        assert "--reset-optimizer" in message
    assert len(train_on(2, f"{line} --reset-optimizer --max-update 4")) == 4


def test_an_optimizer_state_that_does_not_fit_is_told_in_one_line(data, runs):
    folder, _ = runs(2, 4)
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {folder} --no-save"
    assert "--reset-optimizer" in error_of(0, train, 1, f"{line} --optimizer sgd")
    assert "--reset-optimizer" in error_of(0, train, 1, f"{line} --fp16")
    assert "--moe-freeze" in error_of(0, train, 1, f"{line} --moe-freeze experts")
    for message in run_processes(2, error_of, train, 2, f"{line} --optimizer sgd"):
        assert "--reset-optimizer" in message


@pytest.mark.parametrize("part", ["shared", "experts"])
def test_an_optimizer_state_of_other_shapes_is_told_in_one_line(data, runs, tmp_path, part):
    path, files = copy_of(runs, tmp_path)
    if part == "shared":
        state = torch.load(path, weights_only=True)
        next(iter(state["last_optimizer_state"]["state"].values()))["exp_avg"] = torch.zeros(3, 3)
        torch.save(state, path)
    else:
        content = torch.load(files[1], weights_only=True)
        of_first = next(iter(content["optimizer"].values()))
        of_first["exp_avg"] = of_first["exp_avg"][:, :-1].clone()
        torch.save(content, files[1])
        fit_manifest(path, files)
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {path.parent} --no-save"
    messages = [error_of(0, train, 1, line), *run_processes(2, error_of, train, 2, line)]
    for message in messages:
        assert f"{path}: " in message and "optimizer" in message and "\n" not in message
        assert "--reset-optimizer" in message


def test_adafactor_goes_on_where_its_factors_span_the_same_experts(data, tmp_path):
    options = "--optimizer adafactor"
    losses = first_run(data, tmp_path, 2, 4, options)
    assert resume(data, tmp_path, 2, 4, options) == losses[SAVED:]
    line = f"{data} {TRAIN} --moe-expert-count 4 {options} --no-save --save-dir {tmp_path}"
    assert "--reset-optimizer" in error_of(0, train, 1, line)


def test_a_run_goes_on_with_either_adam(data, runs, tmp_path):
    folder, losses = runs(2, 4)
    resumed = resume(data, folder, 2, 4, "--optimizer fused_adam")
    assert resumed == pytest.approx(losses[SAVED:], rel=1e-5)
    assert first_run(data, tmp_path, 1, 4, "--optimizer fused_adam") == pytest.approx(losses, 1e-5)
    assert resume(data, tmp_path, 1, 4) == pytest.approx(losses[SAVED:], rel=1e-5)


def test_one_process_writes_the_file_of_stock(data, runs):
    folder, _ = runs(1, 4)
    state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    assert "experts" not in state and not (folder / "experts").exists()
    assert len(state["model"]["decoder.layers.1.moe_layer.experts.fc1.weight"]) == 4


def test_each_process_writes_its_own_experts_once(data, runs):
    for world, experts, files in ((2, 4, 2), (4, 2, 2)):
        folder, _ = runs(world, experts)
        state = torch.load(folder / "checkpoint_last.pt", weights_only=True)
        assert not any(".experts." in name for name in state["model"])
        manifest = state["experts"]
        assert len(manifest["files"]) == files and manifest["world_size"] == world
        saved = state["last_optimizer_state"]
        assert not set(manifest["indices"].values()) & set(saved["state"])
        for i, file in enumerate(manifest["files"]):
            assert (file["first"], file["count"]) == (i * experts // 2, experts // 2)
            content = torch.load(folder / file["name"], weights_only=True)
            assert content["model"].keys() == content["optimizer"].keys()
            assert {len(value) for value in content["model"].values()} == {experts // 2}
        assert expert_files(folder) == referred_files(folder)


EVAL = f"--user-dir {Path(fairseq_moe_ext.__file__).parent} --gen-subset valid --cpu"
EVAL += " --tokens-per-sample 8 --num-workers 0 --batch-size 4 --log-format none"


def eval_lm_command():
    from fairseq_cli import eval_lm

    if not hasattr(
        eval_lm.eval_lm, "__wrapped__"
    ):  # imported after the package, as no command does
        distributed_training._evaluate_the_whole_set(eval_lm)
    return eval_lm


def perplexity(rank, world, line):
    eval_lm = eval_lm_command()
    parser = options.get_eval_lm_parser()
    line += f" --distributed-world-size {world} --distributed-rank {rank}"
    sys.argv[1:] = line.split()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, line.split()))
    return float(eval_lm.main(cfg)["perplexity"])


@pytest.mark.parametrize("writers, experts", [(1, 4), (2, 4), (4, 2)])
def test_evaluation_on_any_number_of_processes(data, runs, writers, experts):
    folder, _ = runs(writers, experts)
    line = f"{data} {EVAL} --path {folder}/checkpoint_last.pt"
    line += " --model-overrides {'moe_eval_capacity_token_fraction':1.0}"
    one = perplexity(0, 1, line)
    assert 1 < one < 25
    for world in (2, 4):
        for many in run_processes(world, perplexity, world, line):
            assert many == pytest.approx(one, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        "--batch-size 16",  # one batch: more processes than that
        "--batch-size 2 --context-window 3",
        "--add-bos-token --tokens-per-sample 6",
        "--remove-bpe",
    ],
)
def test_evaluation_counts_every_token_once(data, runs, tmp_path, monkeypatch, options):
    """As stock does on one process."""
    folder = shutil.copytree(data, tmp_path / "data")
    words = (folder / "dict.txt").read_text()
    (folder / "dict.txt").write_text(words.replace("w3 ", "w3@@ ").replace("w7 ", "w7@@ "))
    run = shutil.copytree(runs(2, 4)[0], tmp_path / "run")
    state = torch.load(run / "checkpoint_last.pt", weights_only=False)
    del state["task_state"][fingerprint.KEY]  # or that dictionary would be refused
    torch.save(state, run / "checkpoint_last.pt")
    line = f"{folder} {EVAL} --path {run}/checkpoint_last.pt {options}"
    line += " --model-overrides {'moe_eval_capacity_token_fraction':1.0}"
    one = perplexity(0, 1, line)
    for world in (2, 4):
        for many in run_processes(world, perplexity, world, line):
            assert many == pytest.approx(one, rel=1e-6)
    eval_lm = eval_lm_command()
    monkeypatch.setattr(eval_lm, "eval_lm", eval_lm.eval_lm.__wrapped__)
    assert one == pytest.approx(perplexity(0, 1, line), rel=1e-6)


def validated(rank, world, line):
    """inner_loss a token over the whole valid set, in nats, after one update."""
    sums = []
    stock = Trainer._reduce_and_log_stats

    def record(self, logs, sample_size, grad_norm=None):
        if grad_norm is None:
            sums.append((sum(float(log["inner_loss"]) for log in logs), float(sample_size)))
        return stock(self, logs, sample_size, grad_norm)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(Trainer, "_reduce_and_log_stats", record)
        fairseq_train.main(settings(line, rank, world))
    loss, tokens = (sum(values) for values in zip(*sums))
    assert tokens == 80  # each once
    return loss / tokens


@pytest.mark.parametrize("backend", ["legacy_ddp", "pytorch_ddp", "fully_sharded"])
def test_validation_is_of_the_whole_set(data, tmp_path, backend):
    """In three batches, so that some processes have none."""
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {tmp_path} --no-save --max-update 1"
    line = line.replace(" --disable-validation", "") + " --batch-size 2 --batch-size-valid 4"
    line += " --lr 1e-30 --moe-eval-capacity-token-fraction 1.0"
    one = validated(0, 1, line)
    for world in (2, 4):
        many = run_processes(world, validated, world, f"{line} --ddp-backend {backend}")
        assert many == pytest.approx([one] * world, rel=1e-6)


def validated_by_command(rank, world, line):
    """What fairseq-validate prints at the end."""
    printed = []
    parser = options.get_validation_parser()
    line += f" --distributed-world-size {world} --distributed-rank {rank}"
    sys.argv[1:] = line.split()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, line.split()))
    with pytest.MonkeyPatch.context() as context:
        context.setattr(
            progress_bar.NoopProgressBar, "print", lambda self, stats, **kw: printed.append(stats)
        )
        fairseq_validate.main(cfg)
    return float(printed[0]["inner_loss"]), float(printed[0]["ppl"])


@pytest.mark.parametrize("model", ["--moe-expert-count 4", "--arch dense_lm_tiny --moe-freq 0"])
def test_fairseq_validate_is_of_the_whole_set(data, tmp_path, model):
    """In three batches, so that some processes have one less, or none."""
    line = f"{data} {TRAIN} {model} --max-update 1 --moe-eval-capacity-token-fraction 1.0"
    train_on(1, f"{line} --save-dir {tmp_path}")
    line = f"{data} {EVAL.replace('--gen-subset', '--valid-subset')}"
    line = line.replace("--tokens-per-sample 8", "--task language_modeling")
    line += f" --path {tmp_path}/checkpoint_last.pt"
    one = validated_by_command(0, 1, line)
    for world in (2, 4):
        many = run_processes(world, validated_by_command, world, line)
        assert many == [pytest.approx(one, rel=1e-3)] * world  # as printed


def files_read(rank, world, line):
    """Names of the files that an evaluation loads, in this process."""
    names, stock = [], torch.load

    def load(file, *args, **kwargs):
        names.append(os.path.basename(getattr(file, "name", file)))
        return stock(file, *args, **kwargs)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(torch, "load", load)
        perplexity(rank, world, line)
    return sorted(names)


def test_each_file_is_read_once(data, runs):
    """And on two processes, no process reads the other's experts."""
    folder, _ = runs(2, 4)
    line = f"{data} {EVAL} --path {folder}/checkpoint_last.pt"
    manifest = torch.load(folder / "checkpoint_last.pt", weights_only=True)["experts"]
    experts = [os.path.basename(file["name"]) for file in manifest["files"]]
    assert files_read(0, 1, line) == sorted(["checkpoint_last.pt", *experts])
    for rank, names in enumerate(run_processes(2, files_read, 2, line)):
        assert names == sorted(["checkpoint_last.pt", experts[rank]])


def test_from_pretrained(data, runs):
    """The same numbers from a checkpoint of two processes as from its experts in one file."""
    from fairseq_moe_ext.models.language_model import MoETransformerLanguageModel

    folder, _ = runs(2, 4)
    hub = MoETransformerLanguageModel.from_pretrained(str(folder), "checkpoint_last.pt", data)
    state = hub.models[0].state_dict()
    manifest = torch.load(folder / "checkpoint_last.pt", weights_only=True)["experts"]
    files = [torch.load(folder / f["name"], weights_only=True) for f in manifest["files"]]
    for name in manifest["indices"]:
        assert torch.equal(state[name], torch.cat([file["model"][name] for file in files]))
    assert hub.score("w1 w2 w3")["positional_scores"].shape == (3,)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        type(hub.models[0]).from_pretrained("nowhere")


@pytest.mark.parametrize(
    "flags, names",
    [
        ("--save-interval-updates 4 --keep-interval-updates 1", "1 2 2_28 best last"),
        ("--keep-last-epochs 1", "2 best last"),
        ("--no-epoch-checkpoints", "best last"),
        ("--no-last-checkpoints", "1 2 best"),
        ("--keep-best-checkpoints 1 --best-checkpoint-metric loss", "1 2 best .best_loss last"),
        ("--no-save", ""),
        ("--no-save-optimizer-state --no-epoch-checkpoints", "best last"),
    ],
)
def test_flags_of_checkpoints_mean_what_they_mean(data, tmp_path, flags, names):
    """On two processes as on one; and no expert file stays that nothing refers to."""
    line = f"{data} {TRAIN} --moe-expert-count 4 {flags} --max-update 32"
    line = line.replace(" --disable-validation", "")
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        train_on(world, f"{line} --save-dir {folder}")
        found[world] = sorted(re.sub(r"_\d+\.\d+", "", p.stem)[10:] for p in folder.glob("*.pt"))
        assert not list(folder.rglob("*.tmp"))
    assert found[2] == found[1]
    assert [name.strip("_") for name in found[2]] == sorted(names.split())
    assert expert_files(tmp_path / "2") == referred_files(tmp_path / "2")
    if "--no-save-optimizer-state" in flags:
        path = str(tmp_path / "2" / "checkpoint_last.pt")
        for file in torch.load(path, weights_only=True)["experts"]["files"]:
            assert torch.load(tmp_path / "2" / file["name"], weights_only=True)["optimizer"] == {}
        rest = [
            train_on(1, f"{line} --save-dir {tmp_path / str(w)} --max-update 2") for w in (1, 2)
        ]
        assert rest[1] == pytest.approx(rest[0], rel=1e-4)  # from parameters equal but for rounding


def test_finetune_and_reset(data, runs, tmp_path):
    folder, losses = runs(2, 4)
    line = f"{data} {TRAIN} --moe-expert-count 4 --no-save --max-update 2 --save-dir {tmp_path}"
    last = f"{folder}/checkpoint_1_{SAVED}.pt"
    tuned = {w: train_on(w, f"{line} --finetune-from-model {last}") for w in (1, 2)}
    assert len(tuned[2]) == 2  # updates are counted from 0
    assert tuned[2] == pytest.approx(tuned[1], rel=1e-5)
    assert tuned[2][0] < losses[0]
    reset = "--reset-optimizer --reset-lr-scheduler --reset-meters --reset-dataloader"
    again = train_on(2, f"{line} --restore-file {last} {reset}")
    assert again == tuned[2]


class Rows(torch.utils.data.Dataset):
    def __getitem__(self, index):
        return index


def test_other_place_in_the_data_for_other_batches():
    def iterator(size, shards):
        rows = Rows()
        batches = [list(range(i, min(i + size, 100))) for i in range(0, 100, size)]
        return iterators.EpochBatchIterator(
            rows, list, batches, seed=1, num_shards=shards, disable_shuffling=True
        )

    def next_rows(size, shards, state):
        itr = iterator(size, shards)
        itr.load_state_dict(state)
        return next(itr.next_epoch_itr(shuffle=False))

    first = iterator(4, 2)
    batches = first.next_epoch_itr(shuffle=False)
    for _ in range(6):
        next(batches)
    state = first.state_dict()  # 6 batches of 4 on 2 processes: 48 rows
    for size, shards, row in (
        (4, 2, 48),
        (8, 1, 48),
        (2, 4, 48),
        (4, 4, 48),
        (4, 5, 40),
        (7, 1, 42),
    ):
        assert next_rows(size, shards, state)[0] == row
    stock = {key: value for key, value in state.items() if key != "all_processes"}
    assert next_rows(4, 1, stock)[0] == 24  # what stock does, and what its own files still do


def copy_of(runs, tmp_path, world=2, experts=4):
    folder, _ = runs(world, experts)
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "checkpoint_last.pt"
    manifest = torch.load(path, weights_only=True)["experts"]
    return path, [path.parent / file["name"] for file in manifest["files"]]


def fit_manifest(path, files):
    """Let the checkpoint's entry for files[1] be of that file as it is now."""
    state = torch.load(path, weights_only=True)
    size, digest = files[1].stat().st_size, hashlib.sha256(files[1].read_bytes()).hexdigest()
    state["experts"]["files"][1].update(bytes=size, sha256=digest)
    torch.save(state, path)


def rot(files):
    content = bytearray(files[1].read_bytes())
    content[len(content) // 2] ^= 1
    files[1].write_bytes(content)
    return f"{files[1]}: not the bytes that {files[1].parent.parent}"


def remove(files):
    files[1].unlink()
    return f"{files[1]}: missing; it holds experts 2 to 3"


def truncate(files):
    size = files[1].stat().st_size
    os.truncate(files[1], size - 100)
    return f"{files[1]}: {size - 100:,} bytes, expected {size:,}"


def damage(files):
    files[1].write_bytes(b"x" * files[1].stat().st_size)
    return f"{files[1]}: not a checkpoint, or damaged"


class RunsCode:
    def __reduce__(self):
        return os.system, ("true",)


def poison(files):
    """By code in a pickle; a size and digest that fit, as its writer would see to."""
    content = torch.load(files[1], weights_only=True)
    torch.save({**content, "more": RunsCode()}, files[1])
    fit_manifest(files[1].parent.parent / "checkpoint_last.pt", files)
    return f"{files[1]}: refused, since loading it would run"


def mix(files):
    files[1].write_bytes(files[0].read_bytes())
    return "files of two runs are mixed"


@pytest.mark.parametrize("harm", [remove, truncate, damage, rot, mix, poison])
def test_damaged_expert_files_are_told_in_one_line(data, runs, tmp_path, harm):
    path, files = copy_of(runs, tmp_path)
    words = harm(files)
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {path.parent} --no-save"
    messages = [error_of(0, train, 1, line), *run_processes(2, error_of, train, 2, line)]
    messages.append(error_of(0, perplexity, 1, f"{data} {EVAL} --path {path}"))
    for message in messages:
        assert words in message and "\n" not in message


@pytest.mark.parametrize("what", ["a tensor", "no model", "experts", "a folder"])
def test_what_is_no_checkpoint_is_told_in_one_line(data, runs, tmp_path, what):
    path, files = copy_of(runs, tmp_path)
    words = "there is no model in it"
    if what == "a tensor":
        torch.save(torch.zeros(3), path)
    elif what == "no model":
        torch.save({"weights": 1}, path)
    elif what == "experts":
        path, words = files[0], "holds experts alone"
    else:
        path, words = path.parent, "is a folder"
    line = f"{data} {TRAIN} --moe-expert-count 4 --restore-file {path} --no-save"
    messages = [error_of(0, train, 1, line), *run_processes(2, error_of, train, 2, line)]
    messages.append(error_of(0, perplexity, 1, f"{data} {EVAL} --path {path}"))
    for message in messages:
        assert message.startswith(f"{path}: ") and words in message and "\n" not in message


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--finetune-from-model none.pt", "none.pt: no such file"),
        ("--finetune-from-model none.pt --reset-optimizer", "--reset-optimizer"),
        ("--finetune-from-model dict.txt --restore-file x.pt", "--restore-file"),
        ("--save-dir dict.txt", "--save-dir dict.txt: cannot be written to"),
        ("--save-dir dict.txt/run", "--save-dir dict.txt/run: cannot be written to"),
    ],
)
def test_flags_that_cannot_be_followed_end_in_one_line(data, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(data)
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {tmp_path}/run {flags}"
    message = error_of(0, train, 1, line)
    assert message.startswith(flags.split()[0]) and words in message
    assert "\n" not in message and len(message) < 250
    assert not list(tmp_path.rglob("*.pt"))


def test_a_newer_format_is_refused(data, runs, tmp_path):
    path, _ = copy_of(runs, tmp_path)
    state = torch.load(path, weights_only=True)
    state["experts"]["format"] = VERSION + 1
    torch.save(state, path)
    assert "install the version" in error_of(0, perplexity, 1, f"{data} {EVAL} --path {path}")


def test_experts_that_the_processes_cannot_hold(data, runs):
    folder, _ = runs(1, 3)
    line = f"{data} {EVAL} --path {folder}/checkpoint_last.pt"
    for message in run_processes(2, error_of, perplexity, 2, line):
        assert "3 cannot be spread over 2 processes" in message


@pytest.mark.parametrize("flag", ["--store-ema", "--zero-sharding os", "--use-bmuf"])
def test_what_cannot_be_saved_is_refused_by_name(data, tmp_path, flag):
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {tmp_path} {flag}"
    for message in run_processes(2, error_of, train, 2, line):
        assert flag in message and "2 processes" in message


def train_with(rank, patch, line):
    """Training in which rank 1, or another, is not as it should be."""
    with pytest.MonkeyPatch.context() as context:
        patch(rank, context)
        train(rank, 2, line)


def other_code(rank, context):
    context.setattr(together, "code_version", lambda: f"version {rank}")


def other_files(rank, context):
    stock = os.path.isfile
    context.setattr(os.path, "isfile", lambda path: rank == 1 and "last" in path or stock(path))


def full_disk_of_rank_1(rank, context):
    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    if rank == 1:
        context.setattr(os, "fsync", fsync)


def failing_copy(rank, context):
    def copyfile(*args):
        raise OSError(28, "No space left on device")

    context.setattr(shutil, "copyfile", copyfile)


def unexpected_error(rank, context):
    context.setattr(saving, "code_version", lambda: 1 / 0)


@pytest.mark.parametrize(
    "patch, words",
    [
        (other_code, "process 1 runs version 1, process 0 version 0"),
        (other_files, "process 1 sees it, process 0 does not"),
        (full_disk_of_rank_1, "bytes) cannot be written (No space left on device)"),
        (failing_copy, "No space left on device"),
    ],
)
def test_trouble_on_one_rank_ends_all_with_one_line(data, tmp_path, patch, words):
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-interval-updates 1 --save-dir {tmp_path}"
    for message in run_processes(2, error_of, train_with, patch, line):
        assert words in message and "\n" not in message
    assert not list(tmp_path.rglob("*.tmp"))
    assert expert_files(tmp_path) == referred_files(tmp_path)


def test_dense_models_want_the_same_code_too(data, tmp_path):
    line = f"{data} {TRAIN} --arch dense_lm_tiny --moe-freq 0 --save-dir {tmp_path}"
    for message in run_processes(2, error_of, train_with, other_code, line):
        assert "process 1 runs version 1, process 0 version 0" in message


def any_error_of(rank, *args):
    try:
        train_with(rank, *args)
    except Exception as error:
        return type(error).__name__, str(error)


def test_an_unexpected_error_on_rank_0_leaves_nobody_waiting(data, tmp_path):
    line = f"{data} {TRAIN} --moe-expert-count 4 --max-update 2 --save-dir {tmp_path}"
    outcomes = run_processes(2, any_error_of, unexpected_error, line)
    assert outcomes[0] == ("ZeroDivisionError", "division by zero")
    assert outcomes[1] == ("UserError", "division by zero")
    assert expert_files(tmp_path) == set()


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 400 KiB."""
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("world", [1, 2])
def test_full_disk_leaves_the_last_checkpoint(data, small_disk, world):
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {small_disk} --save-interval-updates 1"
    if world == 1:
        messages = [error_of(0, train, 1, line)]
    else:
        messages = run_processes(2, error_of, train, 2, line)
    for message in messages:
        assert "cannot be written (No space left on device); make room" in message
        assert "\n" not in message and str(small_disk) in message
    assert not list(small_disk.rglob("*.tmp"))
    updates = len(list(small_disk.glob("checkpoint_1_*.pt")))
    assert updates >= 2
    # The last checkpoint is whole, and training goes on from it.
    resumed = train_on(2, f"{line} --no-save")
    assert UPDATES - updates <= len(resumed) <= UPDATES - updates + 1


def test_stale_files_go_and_unreadable_checkpoints_keep_all(data, tmp_path, caplog):
    line = f"{data} {TRAIN} --moe-expert-count 4 --save-dir {tmp_path}"
    train_on(2, f"{line} --max-update 2")
    folder = tmp_path / "experts"
    stale = folder / "1-1-0123456789abcdef-0-2.pt"
    for path in (stale, stale.with_suffix(".pt.tmp"), folder / "notes.txt"):
        path.write_text("")
    (tmp_path / "other.pt").write_text("not a checkpoint")
    removing.remove_unused_files(str(tmp_path))
    assert stale.exists()
    assert "other.pt cannot be read, so no file" in caplog.text
    (tmp_path / "other.pt").unlink()
    used = referred_files(tmp_path)
    removing.remove_unused_files(str(tmp_path))
    assert expert_files(tmp_path) == used | {"notes.txt"} and len(used) == 2
    train_on(1, f"{line} --max-update 4")  # a single file takes the place of theirs
    assert expert_files(tmp_path) == {"notes.txt"}
