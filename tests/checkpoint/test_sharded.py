"""--ddp-backend fully_sharded: checkpoints tell nothing of it, and go on under any backend."""

import pytest
import torch
from fairseq import tasks
from fairseq.distributed import fsdp_enable_wrap, fsdp_wrap
from fairseq.distributed import utils as distributed_utils
from fairseq.trainer import Trainer
from fairseq_cli import train as fairseq_train
from processes import run_processes
from training import (
    EVAL,
    SAVED,
    SHARDED,
    TRAIN,
    error_of,
    first_run,
    perplexity,
    resume,
    settings,
    train,
    train_on,
)

from fairseq_moe_ext import metrics_file
from fairseq_moe_ext.checkpoint.format import Manifest


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
    """Whose optimizer states are the same, but for the name that fairseq gives the optimizer; and
    to the bit, if nothing else changes."""
    runs = [(2, f"{SHARDED} 0"), (1, "")]
    for (first, backend), (then, other) in (runs, runs[::-1]):
        folder = tmp_path / str(first)
        losses = first_run(data, folder, first, 4, f"--bf16 {backend}")
        saved = torch.load(folder / "checkpoint_last.pt", weights_only=True)["cfg"]
        assert saved["common"]["bf16"] and saved["model"]["bf16"]
        assert resume(data, folder, first, 4, f"--bf16 {backend}") == losses[SAVED:]
        resumed = resume(data, folder, then, 4, f"--bf16 {other}")
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
        manifest = Manifest.read("", state)
        experts = [torch.load(folder / file.name, weights_only=True) for file in manifest.files]
        for content in experts:
            del content["save"]
        whole = state["model"], state["last_optimizer_state"], manifest.indices
        files.append((state.keys(), *whole, experts))
    assert files[0][0] == files[1][0]
    for one, other in zip(files[0][1:4], files[1][1:4]):
        assert_alike(one, other)
    for one, other in zip(files[0][4], files[1][4]):
        assert_alike(one, other)


def test_a_sharded_run_keeps_its_metrics(runs, sharded_run):
    logged = [
        metrics_file.read(folder / metrics_file.NAME) for folder, _ in (runs(2, 4), sharded_run)
    ]
    assert [record["tag"] for record in logged[1]] == ["train"]
    assert [record.keys() for record in logged[0]] == [record.keys() for record in logged[1]]


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
        ("--memory-efficient-bf16", "fairscale shards only float32 and float16: use --bf16"),
        ("--compile", "--compile with --ddp-backend fully_sharded"),
        ("--use-sharded-state", "--use-sharded-state with"),
        ("--cpu-offload", "--cpu-offload with"),
        ("--not-fsdp-flatten-parameters", "--not-fsdp-flatten-parameters with"),
        ("--fp32-reduce-scatter", "--fp32-reduce-scatter with"),
        ("--optimizer adafactor", "--optimizer adafactor"),
        ("--moe-expert-count 3", "3 cannot be sharded over 2 processes"),
    ],
)
def test_what_cannot_be_sharded_right_is_refused_by_name(data, tmp_path, flag, words):
    line = f"{data} {TRAIN} --moe-expert-count 4 {SHARDED} 0 --save-dir {tmp_path} {flag}"
    for message in run_processes(2, error_of, train, 2, line):
        assert words in message and "\n" not in message


def test_a_dense_model_is_not_refused_for_experts(data, tmp_path):
    line = f"{data} {TRAIN} --moe-freq 0 --moe-expert-count 0 --save-dir {tmp_path}"
    line = f"{line} --max-update 1 --store-ema".replace("--moe-routing-scope world", "")
    for message in run_processes(2, error_of, train, 2, f"{line} {SHARDED} 0"):
        assert message.startswith("--store-ema: not supported with --ddp-backend fully_sharded;")
        assert message.endswith("or use pytorch_ddp")
    line = line.replace("legacy", "pytorch")
    assert set(run_processes(2, error_of, train, 2, line)) == {"no error"}


def test_one_process_has_nothing_to_shard(data, tmp_path, capsys):
    line = f"{data} {TRAIN} --moe-expert-count 4 {SHARDED} 0 --save-dir {tmp_path}"
    cfg = settings(f"{line} --batch-size 8", 0, 1)
    with pytest.raises(SystemExit):
        distributed_utils.call_main(cfg, fairseq_train.main)
    assert "--ddp-backend fully_sharded: one process" in capsys.readouterr().err
