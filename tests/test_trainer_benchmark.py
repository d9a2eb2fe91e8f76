"""benchmarks/trainer.py measures the same updates twice, once by fairseq's trainer."""

import json
import sys
from pathlib import Path

import pytest
import torch
from fairseq import options
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fairseq_moe_ext.models import precision
from fairseq_moe_ext.moe.router import ROUTERS

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import trainer as benchmark  # noqa: E402
from train_step import make_data  # noqa: E402

SHAPE = benchmark.Shape(dim=8, heads=2, rows=2, context=8)


@pytest.fixture
def data(tmp_path):
    for corpus in ("one", "two"):
        (tmp_path / corpus).mkdir()
        make_data(tmp_path / corpus, 4096, SHAPE.vocabulary)
    (tmp_path / "dict.txt").write_text((tmp_path / "one" / "dict.txt").read_text())
    return tmp_path


def test_the_bare_loop_makes_updates_and_says_what_took_how_long(data, monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(benchmark, "wait", lambda: waited.append(torch.rand(1)))
    line = benchmark.flags(data, SHAPE, benchmark.CASES["8 experts, adam"], 2 * benchmark.TURN)
    monkeypatch.setattr(sys, "argv", sys.argv)
    benchmark.bare(line)
    parts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(waited) == 2, "once a turn"
    assert list(parts) == list(benchmark.BARE) and all(spent > 0 for spent in parts.values())


class Precisions(TorchDispatchMode):
    """Of all tensors that are computed."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.found |= {each.dtype for each in tree_leaves(out) if isinstance(each, torch.Tensor)}
        return out


@pytest.mark.parametrize("pays", [True, False])
def test_the_bare_loop_computes_in_bfloat16_where_the_trainer_does(data, monkeypatch, pays):
    monkeypatch.setattr(benchmark, "wait", lambda: 0.0)
    monkeypatch.setattr(precision, "bfloat16_pays", lambda: pays)
    monkeypatch.setattr(sys, "argv", sys.argv)
    with Precisions() as precisions:
        benchmark.bare(benchmark.flags(data, SHAPE, benchmark.CASES["bf16: dense"], 20))
    assert (torch.bfloat16 in precisions.found) == pays


def test_every_row_that_is_kept_is_shown():
    """The table leaves out a row of a shape or a case that the program does not know."""
    paths = list(benchmark.measure.RESULTS.glob("*/trainer.json"))
    assert paths
    for path in paths:
        table = path.with_suffix(".md").read_text(encoding="utf-8").splitlines()
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            shape, case = row.split(": ", 1)
            assert shape in benchmark.SHAPES and case in benchmark.CASES
            assert any(line.startswith(f"| {row} | ") for line in table)


def test_a_sparse_model_stands_beside_the_dense_one_of_equal_flops(data, monkeypatch):
    case = benchmark.CASES["bf16: 64 experts, every other layer"]
    sparse, dense = (
        benchmark.flags(data, SHAPE, each, 1) for each in (case, case._replace(experts=0))
    )
    assert {"moe_lm_tiny", "--bf16"} <= set(sparse) and {"dense_lm_tiny", "--bf16"} <= set(dense)
    assert not any(word.startswith("--moe") for word in dense if word != "--moe-gate-loss-wt")

    def value(flag):
        return int(sparse[sparse.index(flag) + 1])

    monkeypatch.setattr(sys, "argv", ["fairseq-train", *sparse])  # read by the first parse
    parsed = options.parse_args_and_arch(options.get_training_parser(), sparse)
    assert parsed.moe_second_expert_policy == "all"
    assert parsed.moe_top_k is None and not parsed.moe_top1_expert
    top_k = ROUTERS[parsed.moe_router].default_top_k
    assert top_k == 2
    assert value("--moe-freq") == 2
    assert top_k * value("--moe-expert-ffn-dim") == value("--decoder-ffn-embed-dim")


@pytest.mark.slow
def test_the_parts_of_the_difference_add_up_to_it():
    row = benchmark.compare(SHAPE, benchmark.CASES["8 experts"], 1)
    assert row["bare_ms"] > 0 and row["trainer_ms"] > row["more_ms"]["metrics"] > 0
    assert set(row["more_ms"]) == set(benchmark.PARTS)
    assert row["to_dense"] > 0
    whole = sum(row["more_ms"].values())
    assert whole == pytest.approx(row["trainer_ms"] - row["bare_ms"], abs=0.1)
