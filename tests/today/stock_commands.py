"""Console scripts of this environment, run as a user would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PLUGIN = ROOT / "fairseq_moe_ext"
MODEL = "--task language_modeling --arch transformer_lm_gpt2_tiny --tokens-per-sample 32"
TRAIN = f"{MODEL} --optimizer adam --lr 0.001 --max-tokens 256 --num-workers 0 --no-progress-bar"
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "LOGLEVEL"}
ENVIRONMENT["OMP_NUM_THREADS"] = "1"

on_cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="this is about a CPU alone")


def run(line, folder, **kwargs):
    """Run a console script of this environment as a user would."""
    script, *arguments = line.split()
    command = [str(BIN / script), *arguments]
    return subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **kwargs
    )


def succeeded(result):
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


def one_error(result):
    """The one error line of a command that failed without a traceback."""
    assert result.returncode == 1, result.stderr[-3000:]
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr[-3000:]
    return lines[0]


def python(code, *options):
    result = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result
