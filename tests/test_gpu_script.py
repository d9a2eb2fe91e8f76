"""benchmarks/gpu.py on a CPU: that no part loses what it or another could have measured."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_programs import BENCHMARKS, kept, programs

from fairseq_moe_ext.models import precision


@pytest.fixture
def program(monkeypatch, tmp_path):
    return programs(monkeypatch, tmp_path)


@pytest.mark.parametrize("part, file", [("layer", "layer"), ("statistics", "gpu_statistics")])
def test_parts_of_the_gpu_script(program, part, file, tmp_path):
    """In this process, on a CPU; "step" is below."""
    getattr(program("gpu"), part)(torch.empty(0), tiny=True)
    assert kept(tmp_path, file)


def test_gpu_script_keeps_to_its_time(program, monkeypatch, tmp_path, capsys):
    """A part that hangs is ended with its children, one that fails is reported with what it left
    out, and what would come after the last minute is not begun."""
    gpu = program("gpu")
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "part = sys.argv[-1]\n"
        "print('this is', part, flush=True)\n"
        "if part == 'slow':\n"
        "    subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print('peer: left out: RuntimeError: a | b\\n' * 2 + '.' * 5000)\n"
        "sys.exit(part == 'broken')\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "PARTS", {"good": 20, "broken": 20, "slow": 1.5, "late": 20})
    now, later = gpu.time.monotonic, [0.0]
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now() + later[0]))
    attempt = gpu.attempt

    def attempted(command, limit):
        found = attempt(command, limit)
        later[0] += {"broken": 578, "slow": 600}.get(command[-1], 0)  # of 600 seconds
        return found

    monkeypatch.setattr(gpu, "attempt", attempted)
    outcomes = gpu.run(list(gpu.PARTS), 10, "cpu", True)
    assert [one.outcome for one in outcomes] == ["done", "failed", "stopped", "not begun"]
    assert outcomes[2].seconds < 10 and "this is slow" in outcomes[2].output
    rows = kept(tmp_path, "gpu")
    assert [row["outcome"] for row in rows.values()] == ["done", "failed", "stopped", "not begun"]
    assert rows["broken"]["left out"] == "peer: left out: RuntimeError: a | b"
    (table,) = tmp_path.glob("results/*/gpu.md")
    assert " peer: left out: RuntimeError: a / b |" in table.read_text()


def test_all_parts_fit_into_eight_minutes(program):
    assert sum(program("gpu").PARTS.values()) <= 8 * 60


def test_a_part_may_take_what_others_left_but_not_what_is_kept_for_later_ones(program, monkeypatch):
    gpu, limits, now = program("gpu"), [], [0.0]
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def attempt(command, limit):
        limits.append(limit)
        now[0] += {"layer": 40, "step": 260, "statistics": 50, "tests": 30}[command[-1]]
        return gpu.Outcome("done", 1)

    monkeypatch.setattr(gpu, "attempt", attempt)
    gpu.run(["layer", "step", "statistics", "tests"], 8, "cpu", True)
    assert limits == [140, 480 - 40 - 170, 480 - 300 - 120, 480 - 350]
    limits.clear()
    gpu.run(["statistics", "tests"], 2, "cpu", True)  # less than the parts' own
    assert limits == [50, 70]


def test_rows_of_an_older_file_stay(program, monkeypatch, tmp_path):
    """They do not say what was left out."""
    gpu = program("gpu")
    program("measure").keep("gpu", {"layer": {"outcome": "done", "seconds": 9.0}}, "cpu")
    monkeypatch.setattr(gpu, "attempt", lambda command, limit: gpu.Outcome("done", 1, "", "a | b"))
    gpu.run(["tests"], 2, "cpu", True)
    (table,) = tmp_path.glob("results/*/gpu.md")
    assert "| layer | done | 9 | - |" in table.read_text()
    assert "| tests | done | 1 | a / b |" in table.read_text()


def test_pytorchs_notice_is_not_counted_as_a_wait(program, monkeypatch):
    """It comes once a process, when the mode is set."""

    def set_mode(mode):
        if mode == "warn":
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does not yet detect all "
                "synchronizing operations",
                stacklevel=1,
            )

    def work():
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    assert program("gpu").synchronisations(work, cuda=True) == 2


def test_a_peer_that_does_not_work_costs_its_column_alone(program, monkeypatch, tmp_path, capsys):
    layer = program("layer")

    class Broken(torch.nn.Module):
        def forward(self, x):
            raise TypeError("no such kernel")

    def unbuilt(shape):
        raise AttributeError("no such argument")

    monkeypatch.setattr(layer, "mixtral_layer", lambda shape: Broken())
    monkeypatch.setattr(layer, "fairscale_layer", unbuilt)
    program("gpu").layer(torch.empty(0), tiny=True)
    (row,) = kept(tmp_path, "layer").values()
    assert set(row["times"]) == {"dense", "our dense", "capacity", "dropless", "one-hot"}
    lines = capsys.readouterr().out.splitlines()
    assert "transformers: left out: TypeError: no such kernel" in lines
    assert "fairscale: left out: AttributeError: no such argument" in lines


def test_our_layers_are_kept_before_peers_begin(program, monkeypatch, tmp_path):
    """An error on a GPU may be one of everything that follows."""
    layer = program("layer")

    def fatal(*of):
        raise KeyboardInterrupt

    monkeypatch.setattr(layer, "OneHotLayer", fatal)
    with pytest.raises(KeyboardInterrupt):
        program("gpu").layer(torch.empty(0), tiny=True)
    (row,) = kept(tmp_path, "layer").values()
    assert set(row["times"]) == {"dense", "our dense", "capacity", "dropless"}


def test_peers_of_a_step_that_do_not_work_cost_their_rows_alone(
    program, monkeypatch, tmp_path, capsys
):
    """One is not installed; one, compiled, raises at its first call. Those of ours that need no
    compiler come first."""
    monkeypatch.setattr(precision, "bfloat16_pays", lambda: True)  # as on a GPU
    peers, cases = program("peers"), program("peers").CASES
    made = peers.training_step

    def missing(shape):
        raise ModuleNotFoundError("No module named 'transformers'")

    def training_step(case, shape, like):
        if case.compiled or case is cases["bf16: ours, --compile"]:
            return lambda: 1 / 0
        return made(case, shape, like)

    for label in ("bf16: Hugging Face GPT-2, autocast", "bf16: OLMoE, 8 experts"):
        monkeypatch.setitem(cases, label, cases[label]._replace(build=missing))
    monkeypatch.setattr(peers, "training_step", training_step)
    program("gpu").step(torch.empty(0), tiny=True)
    sparse = [f"bf16: ours, {experts} experts" for experts in (8, 64)]
    working = ["plain PyTorch", "ours", "bf16: plain PyTorch, autocast", "bf16: ours", *sparse]
    assert list(kept(tmp_path, "peers")) == [f"125m: {label}" for label in working]
    lines = capsys.readouterr().out.splitlines()
    for label in ("bf16: Hugging Face GPT-2, autocast", "bf16: OLMoE, 8 experts"):
        said = "ModuleNotFoundError: No module named 'transformers'"
        assert f"{label}: left out: {said}" in lines
    for label in ("bf16: plain PyTorch, autocast, compiled", "bf16: ours, --compile"):
        assert f"{label}: left out: ZeroDivisionError: division by zero" in lines


def test_tests_are_found_where_the_plugin_is_not_installed():
    """From the checkout, without the hook of an installation: fairseq needs the plugin's mends on
    today's Python."""
    site = Path(torch.__file__).parents[1]
    path = os.pathsep.join(map(str, (BENCHMARKS.parent, BENCHMARKS, site)))
    start = "import site; site.sethelper(); import gpu; gpu.tests(None, False)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", start],  # no hook, nor what else `site` sets up: `help`
        env={**os.environ, "PYTHONPATH": path},
        cwd=BENCHMARKS.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "error" not in done.stdout, done.stdout + done.stderr
