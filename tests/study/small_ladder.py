"""A small ladder's file, and the command that runs it."""

import importlib.util
from pathlib import Path

STUDY = Path(__file__).resolve().parents[2] / "examples" / "study"

SMALL = """\
title: A small ladder
data: {folder}/data
out: {folder}/ladder
context: 32
vocabulary: 280
train: {{batch-size: 4, optimizer: adam, lr-scheduler: polynomial_decay, cpu: true, num-workers: 0,
  log-interval: 1, decoder-attention-heads: 1}}
evaluate: {{bootstrap: 20}}
dense:
  a: {{decoder-layers: 1, decoder-embed-dim: 8, decoder-ffn-embed-dim: 32}}
  b: {{decoder-layers: 2, decoder-embed-dim: 16, decoder-ffn-embed-dim: 64}}
moe:
  bases: [a]
  flags: {{moe-freq: 1, moe-dropless: true}}
  arms: {{E4: {{experts: 4}}, 4x2: {{experts: 4, granularity: 2}}}}
learning-rate:
  tokens: 384
  values: {{a: [1e-2, 1e-3], a-E4: [1e-2]}}
stages:
  first: {{tokens: 384}}
  second: {{tokens: 640, screen: first, at-least: 0}}
"""


def write(folder, change=lambda text: text):
    path = folder / "ladder.yaml"
    path.write_text(change(SMALL.format(folder=folder)))
    return path


def command():
    """examples/study/ladder.py."""
    spec = importlib.util.spec_from_file_location("study_ladder", STUDY / "ladder.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
