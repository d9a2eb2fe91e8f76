"""The programs of benchmarks/ in a test's process."""

import importlib
import json
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def programs(monkeypatch, tmp_path):
    """name -> a program of benchmarks/ as a module, which keeps results in `tmp_path`."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(importlib.import_module("measure"), "RESULTS", tmp_path / "results")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(importlib.import_module("measure"), "matrix_rate", lambda *sizes: 1e9)
    return importlib.import_module


def kept(tmp_path, name):
    """The rows of the one machine that there is."""
    (path,) = tmp_path.glob(f"results/*/{name}.json")
    assert path.with_suffix(".md").exists()
    return json.loads(path.read_text())["rows"]
