"""The programs of benchmarks/, on tiny models: that they run, and where they write."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch, tmp_path):
    """name -> a program of benchmarks/ as a module, which keeps results in `tmp_path`."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(importlib.import_module("measure"), "RESULTS", tmp_path / "results")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(importlib.import_module("measure"), "matrix_rate", lambda *sizes: 1e9)
    return importlib.import_module


@pytest.fixture
def tiny(program):
    return program("peers").Shape(2, 16, 2, 96, 40, 2, 64)


def kept(tmp_path, name):
    """The rows of the one machine that there is."""
    (path,) = tmp_path.glob(f"results/*/{name}.json")
    assert path.with_suffix(".md").exists()
    return json.loads(path.read_text())["rows"]


def test_no_machine_writes_over_the_results_of_another(program, monkeypatch, tmp_path):
    """Neither one of another processor, nor one of the same with other cores; but the same machine
    replaces what it measured with other software."""
    measure = program("measure")
    seen = {}
    for number, (name, cores, version) in enumerate(
        [("a", 2, "1"), ("b", 2, "1"), ("a", 64, "1"), ("a", 2, "1"), ("a", 2, "2"), ("a", 64, "1")]
    ):
        machine = {"cpu": name, "cores": cores, "memory_gib": 8, "system": "x", "torch": version}
        monkeypatch.setattr(measure, "processor", lambda device="cpu", name=name: name)
        monkeypatch.setattr(measure, "machine", lambda machine=machine: dict(machine))
        measure.keep("speed", {f"row {number}": {"s": number}})
        measure.keep_table("speed", "Speed", ["s"], [[str(number)]])
        seen[name, cores, version] = number
        for path in tmp_path.glob("results/*/speed.json"):
            content = json.loads(path.read_text())
            there = content["machine"]
            key = there["cpu"], there["cores"], there["torch"]
            assert f"row {seen[key]}" in content["rows"]
            assert str(seen[key]) in path.with_suffix(".md").read_text().splitlines()[-1]
    folders = {path.parent.name for path in tmp_path.glob("results/*/speed.json")}
    assert folders == {"a", "b", "a-64-cores-8-gib"}
    rows = json.loads((tmp_path / "results/a/speed.json").read_text())["rows"]
    assert list(rows) == ["row 4"]  # those of the older version are gone
    rows = json.loads((tmp_path / "results/a-64-cores-8-gib/speed.json").read_text())["rows"]
    assert list(rows) == ["row 2", "row 5"]


@pytest.mark.parametrize("peers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generate(program, tiny, peers, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    generate = program("generate")
    cases = list(generate.CASES) if peers else ["ours"]
    monkeypatch.setattr(generate, "SHAPES", {"tiny": tiny})
    monkeypatch.setattr(generate, "PROMPT", 3)
    monkeypatch.setattr(generate, "NEW", 4)
    line = "generate.py --shapes tiny --batches 2 --rounds 1 --one-thread --cases"
    monkeypatch.setattr(sys, "argv", [*line.split(), *cases])
    generate.main()
    rows = kept(tmp_path, "generate_one_thread")
    assert len(rows) == len(cases)
    assert rows["tiny, batch 2: ours"]["ours_is_faster"] == 1
    assert all(row["tokens_per_second"] > 0 for row in rows.values())


def test_evaluate_against_peers(program, tiny, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    evaluate = program("evaluate")
    monkeypatch.setitem(program("peers").SHAPES, "tiny", tiny)
    evaluate.against_peers(["tiny"], 1)
    file = "evaluate_peers" + ("_one_thread" if torch.get_num_threads() == 1 else "")
    rows = kept(tmp_path, file)
    assert [name.split(": ")[1] for name in rows] == list(evaluate.PEERS)


def test_prepare(program, monkeypatch, tmp_path):
    """With commands that run in this process."""
    prepare = program("prepare")
    from fairseq_cli import preprocess

    from fairseq_moe_ext.cli import main

    def command(name, *arguments):
        arguments = [str(one) if one != prepare.CORES else "1" for one in arguments]
        if name == "fairseq-moe":
            assert main(arguments) == 0
        else:
            monkeypatch.setattr(sys, "argv", [name, *arguments])
            preprocess.cli_main()

    monkeypatch.setattr(prepare, "command", command)
    monkeypatch.setattr(prepare, "VOCABULARY", 300)
    monkeypatch.setattr(sys, "argv", "prepare.py --megabytes 0.02 --rounds 1".split())
    prepare.main()
    rows = kept(tmp_path, "prepare")
    assert len(rows) == 6 and rows["tokenizers alone"]["speed"] == 1


@pytest.mark.parametrize("part", ["layer", "step", "statistics"])
def test_parts_of_the_gpu_script(program, part, tmp_path):
    """In this process, on a CPU."""
    if part != "statistics":
        pytest.importorskip("transformers")
    if part == "layer":
        pytest.importorskip("fairscale")
    getattr(program("gpu"), part)(torch.empty(0), tiny=True)
    names = {"layer": "layer", "step": "peers", "statistics": "gpu_statistics"}
    assert kept(tmp_path, names[part])


def test_gpu_script_keeps_to_its_time(program, monkeypatch, tmp_path, capsys):
    """A part that hangs is ended with its children, one that fails is reported, and what would
    come after the last minute is not begun."""
    gpu = program("gpu")
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "part = sys.argv[-1]\n"
        "print('this is', part, flush=True)\n"
        "if part == 'slow':\n"
        "    subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "sys.exit(part == 'broken')\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "PARTS", {"good": 20, "broken": 20, "slow": 1.5, "late": 20})
    now, later = gpu.time.monotonic, [0.0]
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: now() + later[0]))
    attempt = gpu.attempt

    def attempted(command, limit):
        found = attempt(command, limit)
        later[0] += 600 if command[-1] == "slow" else 0
        return found

    monkeypatch.setattr(gpu, "attempt", attempted)
    outcomes = gpu.run(list(gpu.PARTS), 10, "cpu", True)
    assert [one.outcome for one in outcomes] == ["done", "failed", "stopped", "not begun"]
    assert outcomes[2].seconds < 10 and "this is slow" in outcomes[2].output
    rows = kept(tmp_path, "gpu")
    assert [row["outcome"] for row in rows.values()] == ["done", "failed", "stopped", "not begun"]


def test_all_parts_fit_into_eight_minutes(program):
    assert sum(program("gpu").PARTS.values()) <= 8 * 60


def test_ablation(program, monkeypatch, tmp_path):
    """Each part is left out while a step runs, and is back behind it."""
    from fairseq_moe_ext.kernels import expert_ffn, matmul
    from fairseq_moe_ext.moe import experts
    from fairseq_moe_ext.moe import layer as moe_layer

    ablation = program("ablation")
    parts = [
        (expert_ffn, "side_by_side"),
        (expert_ffn, "program_rows"),
        (moe_layer, "program_rows"),
        (experts, "kernel_for"),
        (matmul, "_CACHED"),
        (matmul, "onednn_is_faster"),
    ]
    before = [getattr(*part) for part in parts]
    changed = {}
    for name, change in ablation.WITHOUT.items():
        with change(ablation.SHAPES[0]):
            changed[name] = [p[1] for p, old in zip(parts, before) if getattr(*p) is not old]
    expected = [["side_by_side"], ["program_rows"] * 2, ["kernel_for"], ["_CACHED"]]
    assert list(changed.values()) == expected
    monkeypatch.setattr(ablation, "SHAPES", [ablation.Shape(16, 4, 8, 16)])
    monkeypatch.setattr(sys, "argv", "ablation.py --rounds 1".split())
    ablation.main()
    assert [getattr(*part) for part in parts] == before
    rows = kept(tmp_path, "ablation")
    assert len(rows) == len(ablation.PRECISIONS)
    assert all(row[name] > 0 for row in rows.values() for name in ablation.WITHOUT)
