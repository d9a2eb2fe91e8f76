"""How many processes a command of fairseq starts on a machine that has GPUs. Here they are only
said to be there, so nothing may use them."""

import re

import pytest
import torch
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf
from stock_commands import ROOT, TRAIN, on_cpu_only, python

from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.expert_parallel import check_own_gpu
from fairseq_moe_ext.patches import commands

pytestmark = on_cpu_only
TORCHRUN = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "WORLD_SIZE": "3", "RANK": "2"}
SLURM = {"SLURM_LOCALID": "2"}
LINE = f"bin {TRAIN} --max-update 1"


@pytest.fixture
def two_gpus(monkeypatch):
    """Two, and how many processes are spawned, each time that any are."""
    spawned = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.multiprocessing, "spawn", lambda fn, args, nprocs, join: spawned.append(nprocs)
    )
    monkeypatch.setattr(torch.distributed, "init_process_group", start_nothing)
    return spawned


def start_nothing(*args, **kwargs):
    raise AssertionError("a process waits for others")


def test_on_a_cpu_it_is_one(command, two_gpus, tmp_path):
    status, err = command("train", f"{LINE} --cpu --save-dir {tmp_path}")
    assert (status, two_gpus) == (0, []), err
    saved = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)["cfg"]
    assert saved["distributed_training"]["distributed_world_size"] == 1


@pytest.mark.parametrize(
    "flags", ["", "--cpu --distributed-backend gloo --distributed-world-size=2"]
)
def test_it_is_two_on_gpus_and_where_two_are_asked_for(command, two_gpus, flags):
    status, err = command("train", f"{LINE} --no-save {flags}")
    assert (status, two_gpus) == (0, [2]), err


NCCL = "--distributed-backend nccl: needs GPUs, but --cpu uses none; add --distributed-backend gloo"


@pytest.mark.parametrize(
    "flags, variables, words",
    [
        ("--cpu --distributed-world-size 2", {}, NCCL),
        ("--cpu", TORCHRUN, NCCL),
        ("--device-id 2", {**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK 2: this process sees only"),
        ("--device-id 3", {**TORCHRUN, "LOCAL_RANK": "1"}, "--device-id 3: this process sees only"),
        (
            "--distributed-port 1",
            SLURM,
            "SLURM_LOCALID 2: .* start one process for each, and let it see all of its machine",
        ),
        ("--distributed-world-size 3", {}, "--distributed-world-size 3: .* but there are 2 here"),
    ],
)
def test_what_cannot_start_is_an_error(command, two_gpus, monkeypatch, flags, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    status, err = command("train", f"{LINE} --no-save {flags}")
    assert status == 1 and two_gpus == []
    assert re.search(f"^error: {words}", err, flags=re.M)
    assert "Traceback" not in err


def test_one_process_of_torchrun_may_use_a_cpu_beside_a_gpu(two_gpus, monkeypatch):
    """NCCL starts on the GPU, and has nothing to do."""
    for name, value in {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    cfg = OmegaConf.structured(FairseqConfig)
    cfg.common.cpu = True
    commands.check_processes(cfg)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="nccl: needs GPUs, but there are none here"):
        commands.check_processes(cfg)


@pytest.mark.parametrize("local_id, told", [("2", True), ("0", False), (None, False)])
def test_a_task_of_slurm_is_told_to_see_all_gpus(monkeypatch, local_id, told):
    """Its one GPU has the number 0 (--gpus-per-task). torchrun may be one task a machine."""
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    if local_id is not None:
        monkeypatch.setenv("SLURM_LOCALID", local_id)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError) as error:
        check_own_gpu("LOCAL_RANK", "2", "--cpu")
    assert ("srun --gpus-per-node, no --gpus-per-task" in str(error.value)) == told


def test_a_gpu_for_each(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_own_gpu("LOCAL_RANK", "1", "--cpu")


@pytest.mark.parametrize("given", ["", "command line", "YAML"])
def test_hydra(work, tmp_path, given):
    config = (ROOT / "hydra_conf/moe_lm_tiny.yaml").read_text()
    if given == "YAML":
        config += "distributed_training: {distributed_world_size: 2}\n"
    (tmp_path / "moe_lm_tiny.yaml").write_text(config)
    words = f"""fairseq-hydra-train --config-dir {tmp_path} --config-name moe_lm_tiny
        hydra.searchpath=[file://{ROOT}/hydra_conf]
        common.cpu=true common.fp16=false distributed_training.distributed_backend=gloo
        task=language_modeling task.data={work}/bin task.tokens_per_sample=32 dataset.batch_size=4
        dataset.num_workers=0 model.decoder_layers=2 optimization.max_update=1
        checkpoint.no_save=true hydra.run.dir={tmp_path}""".split()
    if given == "command line":
        words.append("distributed_training.distributed_world_size=2")
    out = python(f"""
import sys, torch
torch.cuda.device_count = lambda: 2
torch.multiprocessing.spawn = lambda fn, args, nprocs, join: print("processes:", nprocs)
sys.argv = {words}
from fairseq_cli.hydra_train import cli_main
cli_main()
""")
    assert ("processes: 2" in out.stdout) == bool(given)
    log = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert ("one process, not one for each of 2 GPUs" in log) == (not given)
    assert ("num_updates: 1" in log or "done training" in log) == (not given)
