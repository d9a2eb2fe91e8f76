"""Stock fairseq on several processes of a CPU."""

import importlib.util
import os
import re
import socket
import subprocess

import pytest
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils as distributed_utils
from omegaconf import OmegaConf
from stock_commands import BIN, TRAIN, on_cpu_only, run, succeeded

RANKS = """
import sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
from types import SimpleNamespace
from fairseq.distributed import utils
from fairseq.models import DistributedFairseqModel
rank = dist.get_rank()
assert utils.all_gather_list({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
sent = {"t": torch.arange(3), "n": [1.5, "text"]} if rank == 0 else None
got = utils.broadcast_object(sent, src_rank=0, group=utils.get_global_group())
assert got["t"].tolist() == [0, 1, 2] and got["n"] == [1.5, "text"], got
args = SimpleNamespace(tpu=False, ddp_backend="pytorch_ddp", device_id=rank,
    broadcast_buffers=False, bucket_cap_mb=25, find_unused_parameters=False,
    gradient_as_bucket_view=False, ddp_comm_hook="none", heartbeat_timeout=-1)
layer = torch.nn.Linear(2, 1, bias=False)
model = DistributedFairseqModel(args, layer, utils.get_global_group(), torch.device("cpu"))
model(torch.full((1, 2), float(rank))).sum().backward()
assert layer.weight.grad.tolist() == [[0.5, 0.5]], layer.weight.grad
time.sleep(0.1)  # as commands.py's _part
"""


@on_cpu_only
def test_objects_and_gradients_go_between_processes(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    succeeded(run("torchrun --standalone --nproc_per_node 2 ranks.py", tmp_path))


LOSS = """
import os, pathlib, sys, time
import torch, torch.distributed as dist
from fairseq.dataclass.configs import FairseqConfig
from fairseq.distributed import utils
from omegaconf import OmegaConf
import fairseq_moe_ext

def main(cfg):
    dist.all_reduce(torch.zeros(1))
    if dist.get_rank() == 1:
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), 9)
        time.sleep(300)  # longer than its_error waits
    dist.all_reduce(torch.zeros(1), group=utils.get_global_group())  # as fairseq's reductions

pathlib.Path("ready" + os.environ["RANK"]).touch()
while sys.argv[1] != "alone" and len(list(pathlib.Path().glob("ready*"))) < 2:
    time.sleep(0.01)  # imports take long on a busy machine: the limit is to count from here
cfg = OmegaConf.structured(FairseqConfig)
cfg.model = {}
cfg.distributed_training.distributed_backend = "gloo"
cfg.distributed_training.heartbeat_timeout = 60 if sys.argv[1] == "killed" else 5
utils.call_main(cfg, main)
"""


def start_rank(rank, tmp_path, how, port):
    """One of two processes, as SLURM or torchrun starts it, but alone."""
    (tmp_path / "loss.py").write_text(LOSS)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        [BIN / "python", "loss.py", how],
        cwd=tmp_path,
        env={**os.environ, **where, "WORLD_SIZE": "2", "RANK": str(rank)},
        stderr=subprocess.PIPE,
        text=True,
    )


def its_error(process):
    _, stderr = process.communicate(timeout=200)
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert process.returncode == 1 and len(errors) == 1 and "Traceback" not in stderr, stderr
    return errors[0]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@on_cpu_only
@pytest.mark.parametrize("how", ["killed", pytest.param("silent", marks=pytest.mark.slow)])
def test_a_process_that_is_gone_ends_the_others_with_one_line(tmp_path, how):
    port = free_port()
    first, second = (start_rank(rank, tmp_path, how, port) for rank in (0, 1))
    try:
        assert "another process has stopped or no longer answers" in its_error(first)
    finally:
        second.kill()
        second.communicate()


@on_cpu_only
def test_a_port_in_use_is_reported(tmp_path):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message = its_error(start_rank(0, tmp_path, "alone", port))
    assert f"127.0.0.1:{port}: the port is in use" in message and "--distributed-port" in message


@on_cpu_only
@pytest.mark.slow
def test_processes_that_cannot_meet_say_so(tmp_path):
    message = its_error(start_rank(1, tmp_path, "alone", free_port()))
    assert "not all 2 processes connected" in message


@on_cpu_only
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["pytorch_ddp", "legacy_ddp"])
def test_two_processes_train_and_resume(work, tmp_path, backend):
    line = f"torchrun --standalone --nproc_per_node 2 {BIN / 'fairseq-train'} bin {TRAIN}"
    line += f" --distributed-backend gloo --ddp-backend {backend} --save-dir {tmp_path}"
    succeeded(run(f"{line} --max-update 2", work))
    output = succeeded(run(f"{line} --max-update 4", work))
    assert re.search(r"Loaded checkpoint .*@ 2 updates", output)
    assert "num_updates 4" in output


@pytest.mark.parametrize("flag", ["--ddp-backend fully_sharded", "--zero-sharding os"])
def test_missing_fairscale_is_named_before_any_work(flag, monkeypatch, capsys):
    cfg = OmegaConf.structured(FairseqConfig)
    cfg.distributed_training.ddp_backend = "fully_sharded" if "ddp" in flag else "legacy_ddp"
    cfg.distributed_training.zero_sharding = "os" if "zero" in flag else "none"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(SystemExit):
        distributed_utils.call_main(cfg, lambda cfg: None)
    expected = f"error: {flag}: needs fairscale, which is not installed: pip install fairscale\n"
    assert capsys.readouterr().err == expected
