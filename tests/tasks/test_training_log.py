"""What fairseq-train prints and keeps: the short line, metrics.jsonl, names in groups."""

import json
import logging
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from fairseq.logging import progress_bar
from small_models import build_model
from training import MODEL, fairseq, make_data

from fairseq_moe_ext import metrics_file, training_line
from fairseq_moe_ext.config import MoETransformerLMConfig
from fairseq_moe_ext.errors import UserError
from fairseq_moe_ext.patches.progress import Watched, group_of


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(data, tmp_path, caplog):
    """flags -> the messages of the bar, of a run of fairseq-train in this process."""

    def run(flags, folder="run"):
        line = f"fairseq-train {data} {MODEL} --optimizer adam --lr 0.01 --num-workers 0"
        line += f" --batch-size 8 --no-progress-bar --save-dir {tmp_path / folder} {flags}"
        caplog.clear()
        with caplog.at_level(logging.INFO):
            fairseq(line)
        brief = [r for r in caplog.records if getattr(r, "brief", False)]
        return [logging.getLogger().handlers[0].formatter.format(r) for r in brief]

    return run


def numbers(path):
    return {r["num_updates"]: r for r in metrics_file.read(path) if r["tag"] == "train_inner"}


def test_the_line_is_short_and_the_first_comes_soon(train):
    lines = train("--max-update 25 --log-interval 20 --disable-validation")
    assert len(lines) == 2, "one at update 10, one at 20"
    assert all(len(line) <= 100 for line in lines)
    form = r"[\d:]{8} \| 10/25 ppl [\d.]+ lr 0.01 gate [\d.]+ [\d.]+k? tokens/s MFU \d+ % "
    form += r"left 0:00:\d\d"
    assert re.fullmatch(form, lines[0]), lines[0]
    assert "| 20/25 " in lines[1]


def test_the_number_of_updates_is_known_under_other_logs(train, tmp_path, monkeypatch):
    """Stock's bars of TensorBoard and the like do not know their length."""
    monkeypatch.setattr(progress_bar, "SummaryWriter", None)
    monkeypatch.setattr(progress_bar, "wandb", None)
    flags = "--max-epoch 1 --log-interval 8 --disable-validation --wandb-project none"
    lines = train(f"{flags} --tensorboard-logdir {tmp_path / 'logs'}")
    assert [line.split()[2] for line in lines] == ["8/16", "16/16"]


@pytest.mark.parametrize(
    "flags, updates",
    [
        ("--total-num-update 20 --max-epoch 2", 32),  # 16 updates an epoch
        ("--total-num-update 20 --max-update 24", 24),
        ("--total-num-update 24 --max-update 24", None),
        ("--total-num-update 20 --max-epoch 2 --max-update 20", None),
        ("--total-num-update 20 --max-epoch 2 --end-learning-rate 1e-3", None),
    ],
)
def test_a_decay_that_ends_before_the_training_is_warned_of_once(train, caplog, flags, updates):
    train(f"--lr-scheduler polynomial_decay --disable-validation --no-save {flags}")
    words = "--total-num-update 20: from there on the learning rate is 0, but training has "
    found = [r.getMessage() for r in caplog.records if "--total-num-update" in r.getMessage()]
    expected = f"{words}{updates} updates: use --total-num-update {updates}"
    assert found == [expected] * (updates is not None)


def test_the_longest_line_fits():
    stats = {"ppl": 138512.3, "lr": 1.25e-4, "moe_gate_loss": 12.0712, "wps": 276123.0, "ups": 0.1}
    flags = dict(decoder_layers=2, decoder_embed_dim=8, decoder_ffn_embed_dim=8)
    settings = MoETransformerLMConfig(**flags, tokens_per_sample=64)
    speed = training_line.Speed(settings, 100, 1, peak=1e12)
    line = training_line.line(stats, 1_000_000, 2_000_000, speed)
    assert line.endswith("left 116 d") and len(line) <= 89
    assert training_line.line({"ppl": 2.0}, 5, None, None) == "update 5 ppl 2"


def test_utilisation_is_flops_over_the_peak():
    flags = dict(decoder_layers=2, decoder_embed_dim=8, decoder_ffn_embed_dim=12)
    settings = MoETransformerLMConfig(**flags, tokens_per_sample=16)
    speed = training_line.Speed(settings, 100, 2, peak=1e6)
    # Attention's 4 products of 8 x 8 and its scores with 16 tokens, 2 products of 8 x 12; logits.
    token = 2 * (4 * 8 * 8 + 2 * 8 * 16 + 2 * 8 * 12) * 2 + 2 * 8 * 100
    assert speed.utilisation(50.0) == pytest.approx(3 * token * 50 / 2e6)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_the_peak_of_a_cpu_is_that_of_the_models_own_products(monkeypatch, precision):
    """PyTorch's own choice of library is half as fast on some processors, and float32 slower than
    bfloat16: MFU would be above the share of the peak."""
    seen = []

    def product(a, b):
        seen.append((a.dtype, b.dtype, len(a)))
        time.sleep(0.01)

    monkeypatch.setattr(training_line, "product", product)
    peak = training_line.peak_of(torch.device("cpu"), precision)
    assert set(seen) == {(precision, precision, seen[0][2])}
    assert 0.5 < peak / (2 * seen[0][2] ** 3 / 0.01) <= 1
    monkeypatch.undo()
    before = torch.get_num_threads()
    assert 1e8 < training_line.peak_of(torch.device("cpu"), precision) < 1e16
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "flags, pays, precision",
    [
        ("", True, torch.float32),
        ("--bf16", True, torch.bfloat16),
        ("--bf16", False, torch.float32),
        ("--memory-efficient-bf16", True, torch.bfloat16),
    ],
)
def test_mfu_is_of_the_precision_that_training_computes_in(
    train, monkeypatch, flags, pays, precision
):
    monkeypatch.setattr("fairseq_moe_ext.models.precision.bfloat16_pays", lambda: pays)
    asked = []
    monkeypatch.setattr(training_line, "peak_of", lambda device, p: asked.append(p))
    train(f"{flags} --max-update 1 --log-interval 1 --disable-validation --no-save")
    assert asked == [precision]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_mfu_of_a_sharded_model_is_of_what_fsdp_computes_in(monkeypatch, precision):
    """Its parameters are float32 in each."""
    asked = []
    monkeypatch.setattr(training_line, "peak_of", lambda device, p: asked.append(p))
    model = build_model()
    model.compute_dtype = precision  # FSDP's
    settings = MoETransformerLMConfig(decoder_layers=1, decoder_embed_dim=8, tokens_per_sample=8)
    trainer = SimpleNamespace(get_model=lambda: model, device=torch.device("cpu"))
    Watched._speed(SimpleNamespace(trainer=trainer, cfg=SimpleNamespace(model=settings)))
    assert asked == [precision]


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("A100-SXM4-40GB", 312e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_the_peak_is_that_of_exactly_this_gpu_or_there_is_none(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    settings = MoETransformerLMConfig(decoder_layers=1, decoder_embed_dim=8, tokens_per_sample=8)
    speed = training_line.Speed(
        settings, 100, 1, training_line.peak_of(torch.device("cuda"), torch.float32)
    )
    assert speed.peak == peak
    line = training_line.line({"wps": 1e3}, 1, None, speed)
    assert ("MFU" in line) is (peak is not None) and line.startswith("update 1 1k tokens/s")


def test_metrics_are_kept_as_numbers(train, tmp_path):
    train("--max-update 4 --log-interval 2 --moe-log-per-layer")
    found = metrics_file.read(tmp_path / "run" / "metrics.jsonl")
    assert [r["num_updates"] for r in found if r["tag"] == "train_inner"] == [2, 4]
    assert {r["tag"] for r in found} == {"train_inner", "valid", "train"}
    inner = next(r for r in found if r["tag"] == "train_inner")
    for name in ("loss", "ppl", "lr", "moe_gate_loss", "load_max", "layer1_load_max", "wall"):
        assert isinstance(inner[name], (int, float)), name
    valid = next(r for r in found if r["tag"] == "valid")
    assert valid["num_updates"] == 4 and isinstance(valid["loss"], float)


def test_a_resumed_run_has_each_update_once(train, tmp_path):
    """Its file equals that of an uninterrupted run, in all that is not time."""
    flags = "--log-interval 1 --disable-validation --save-interval-updates 3"
    train(f"--max-update 6 {flags}", "whole")
    train(f"--max-update 5 {flags}")
    last = tmp_path / "run" / "checkpoint_last.pt"
    last.unlink()
    next((tmp_path / "run").glob("checkpoint_*_3.pt")).rename(last)
    path = tmp_path / "run" / "metrics.jsonl"
    with open(path, "a") as file:
        file.write('{"tag": "train_inner", "num_up')  # killed while it wrote
    train(f"--max-update 6 {flags}")
    whole, parts = numbers(tmp_path / "whole" / "metrics.jsonl"), numbers(path)
    assert list(parts) == list(whole) == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "moe_gate_loss", "load_max", "gnorm"):
        assert [r[name] for r in parts.values()] == [r[name] for r in whole.values()], name
    assert all(line.endswith("}\n") for line in path.read_text().splitlines(keepends=True))


def test_a_new_run_in_the_folder_renames_the_file_of_the_old_one(train, tmp_path):
    flags = "--max-update 2 --log-interval 1 --disable-validation"
    train(flags)
    (tmp_path / "run" / "checkpoint_last.pt").unlink()
    train(flags)
    old = tmp_path / "run" / "metrics-1.jsonl"
    assert len(numbers(old)) == len(numbers(tmp_path / "run" / "metrics.jsonl")) == 2


def test_training_goes_on_where_the_file_cannot_be_written(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").mkdir()
    file = metrics_file.MetricsFile(tmp_path, 0)
    file.add("train_inner", 1, 1, {"loss": 1.0})
    file.add("train_inner", 2, 1, {"loss": 1.0})
    assert caplog.text.count("training continues without") == 1


def write_updates(folder, count):
    records = (json.dumps({"tag": "train_inner", "num_updates": n}) for n in range(1, count + 1))
    (folder / "metrics.jsonl").write_text("".join(f"{record}\n" for record in records))


def test_a_run_from_an_earlier_checkpoint_keeps_the_record_of_the_later_updates(tmp_path):
    write_updates(tmp_path, 5)
    metrics_file.MetricsFile(tmp_path, 3, str(tmp_path / "checkpoint_1_3.pt"))
    assert list(numbers(tmp_path / "metrics-1.jsonl")) == [1, 2, 3, 4, 5]
    assert list(numbers(tmp_path / "metrics.jsonl")) == [1, 2, 3]


@pytest.mark.parametrize("done", [3, 5, 9])
def test_a_run_from_another_runs_checkpoint_has_its_own_record(tmp_path, done):
    write_updates(tmp_path, 5)
    metrics_file.MetricsFile(tmp_path, done, "elsewhere/checkpoint_last.pt")
    assert list(numbers(tmp_path / "metrics-1.jsonl")) == [1, 2, 3, 4, 5]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_file_may_be_a_link(tmp_path):
    (tmp_path / "large").mkdir()
    write_updates(tmp_path / "large", 5)
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "large" / "metrics.jsonl")
    metrics_file.MetricsFile(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").is_symlink()
    assert list(numbers(tmp_path / "large" / "metrics.jsonl")) == [1, 2, 3]


def test_training_goes_on_where_the_file_cannot_be_renewed(tmp_path, caplog, monkeypatch):
    def write_text(path, text):
        raise UserError(f"{path}: is read-only; name another file")

    write_updates(tmp_path, 5)
    monkeypatch.setattr(metrics_file.outputs, "write_text", write_text)
    metrics_file.MetricsFile(tmp_path, 3)
    assert "is read-only" in caplog.text and "training continues without" in caplog.text


def test_infinity_is_null(tmp_path):
    file = metrics_file.MetricsFile(tmp_path, 0)
    file.add("train_inner", 1, 1, {"a": float("nan"), "b": torch.tensor(2.0), "c": float("inf")})
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (record["a"], record["b"], record["c"]) == (None, 2.0, None)


def test_names_in_groups():
    assert {name: group_of(name) for name in ("loss", "load_max", "layer3_overflow", "wps")} == {
        "loss": "loss/loss",
        "load_max": "router/load_max",
        "layer3_overflow": "layer3/overflow",
        "wps": "speed/wps",
    }
    assert (
        group_of("num_updates") == "num_updates" and group_of("moe_z_loss") == "router/moe_z_loss"
    )
    assert group_of("gnorm") == "optimizer/gnorm"


def test_the_load_of_the_last_batch_is_over_its_mean(monkeypatch):
    from types import SimpleNamespace

    from fairseq_moe_ext import context
    from fairseq_moe_ext.patches import progress

    counts = {1: torch.tensor([[3, 1, 0, 0], [0, 0, 4, 0]])}
    criterion = SimpleNamespace(last_counts=counts)
    trainer = SimpleNamespace(get_criterion=lambda: criterion)
    with context.during(context.training, context.Training(None, trainer)):
        assert progress.loads("train_inner")[1].tolist() == [1.5, 0.5, 2, 0]
        assert progress.loads("valid") == {}
    assert progress.loads("train_inner") == {}


def test_tensorboard_gets_groups_and_histograms(train, tmp_path):
    pytest.importorskip("tensorboardX")
    if progress_bar.SummaryWriter is None:
        pytest.skip("fairseq was imported without tensorboardX")
    logs = tmp_path / "logs"
    train(f"--max-update 2 --log-interval 1 --disable-validation --tensorboard-logdir {logs}")
    content = b"".join(path.read_bytes() for path in (logs / "train_inner").iterdir())
    for name in ("router/load_max", "loss/ppl", "speed/wps", "optimizer/lr", "layer1/expert_load"):
        assert name.encode() in content


@pytest.mark.slow
def test_wandb_gets_groups_and_histograms_offline(data, tmp_path):
    """In a process of its own, as wandb starts others and writes into its folder."""
    pytest.importorskip("wandb")
    line = f"{data} {MODEL} --optimizer adam --lr 0.01 --num-workers 0 --batch-size 8"
    line += f" --max-update 2 --log-interval 1 --disable-validation --save-dir {tmp_path / 'run'}"
    code = "import sys; from fairseq_cli.train import cli_main; cli_main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *line.split(), "--wandb-project", "offline"],
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("*.wandb"))
    for name in ("router/load_max", "loss/ppl", "speed/wps", "layer1/expert_load"):
        assert f"train_inner/{name}".encode() in content
