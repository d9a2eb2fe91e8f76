"""benchmarks/peers.py measures in groups what does not fit into memory at once."""

import gc
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
from benchmark_programs import BENCHMARKS, kept, programs
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_moe_ext.models import precision

MIB = 2**20


@pytest.fixture
def program(monkeypatch, tmp_path):
    return programs(monkeypatch, tmp_path)


@pytest.fixture
def peers(program):
    return program("peers")


class Models:
    """Cases with models of so many MiB, gradients and moments included; how many of them lived at
    once, and what was measured together."""

    def __init__(self, peers, monkeypatch, sizes):
        self.alive, self.most, self.groups = weakref.WeakSet(), 0, []
        dense = {"sparse": "dense", "large sparse": "dense"}
        cases = {
            label: peers.Case(self.build(mib), dense=dense.get(label, ""))
            for label, mib in sizes.items()
        }
        monkeypatch.setattr(peers, "CASES", cases)
        monkeypatch.setattr(peers, "training_step", self.training_step)
        monkeypatch.setattr(peers.measure, "peak_memory", lambda work, device: MIB)
        monkeypatch.setattr(peers.measure, "in_turn", self.in_turn)

    @staticmethod
    def build(mib):
        def build(shape):
            model = torch.nn.Module()
            model.weight = torch.nn.Parameter(torch.empty(mib * MIB // 16))
            return model

        return build

    def training_step(self, case, shape, like):
        model = case.build(shape)
        self.alive.add(model)
        held = sum(each.weight.numel() for each in self.alive) * 16 // MIB
        self.most = max(self.most, held)
        return lambda: model

    def in_turn(self, runs, rounds, optional):
        """The machine is slower by a second in each group; a case takes a second more than the one
        before it."""
        self.groups.append(list(runs))
        number = len(self.groups)
        return {label: [number + place] * rounds for place, label in enumerate(runs)}


SIZES = {"plain PyTorch": 10, "dense": 10, "sparse": 20, "other": 10, "large sparse": 60}


def test_groups_fit_and_have_what_their_cases_are_compared_with(peers):
    cases = {label: peers.Case(None, dense="dense" if "sparse" in label else "") for label in SIZES}
    for room in (80, 90, 100, 110, 1000):
        found = peers.groups(cases, SIZES, room)
        assert {label for group in found for label in group} == set(SIZES)
        for group in found:
            assert group[0] == "plain PyTorch" and sum(SIZES[label] for label in group) <= room
    apart = [["plain PyTorch", "dense", "sparse"], ["plain PyTorch", "dense", "large sparse"]]
    assert peers.groups(cases, SIZES, 1000) == [["plain PyTorch", "dense", "other"], *apart]
    several = [["plain PyTorch", "dense"], ["plain PyTorch", "other"]]
    assert peers.groups(cases, SIZES, 20) == [*several, *apart]


def test_a_shape_runs_in_groups_of_the_free_memory(peers, monkeypatch, tmp_path):
    models = Models(peers, monkeypatch, SIZES)
    monkeypatch.setattr(peers.measure, "free_memory", lambda device: 80 * MIB / peers.FILLED)
    peers.run({"96": peers.SHAPES["96"]}, [["sparse", "other", "large sparse"]], 3, torch.empty(0))
    first = ["plain PyTorch", "dense", "other"]
    second, third = ([*first[:2], label] for label in ("sparse", "large sparse"))
    assert models.groups == [first, second, third]
    gc.collect()
    assert models.most <= 80 and not models.alive, "models of a group stay"
    rows = kept(tmp_path, "peers")
    assert list(rows) == [f"96: {label}" for label in [*first, "sparse", "large sparse"]]
    # each ratio from its own group: 1, 2, 3 s in the first, 2, 3, 4 and 3, 4, 5 s in the others
    assert [row["seconds"] for row in rows.values()] == [1, 2, 3, 4, 5]
    assert [row["speed"] for row in rows.values()] == [1, 0.5, 0.333, 0.5, 0.6]
    assert [row.get("to_dense") for row in rows.values()] == [None, None, None, 1.333, 1.25]
    (path,) = tmp_path.glob("results/*/peers.md")
    table = path.read_text()
    assert "| 96: large sparse | 5.000 | 0.60 | 3.00 | 1.25 |" in table


def test_of_a_case_in_several_choices_the_first_row_counts(peers, monkeypatch, tmp_path):
    """Those of plain PyTorch that are measured beside compiled models are for the ratios alone."""
    models = Models(peers, monkeypatch, SIZES)
    monkeypatch.setattr(peers.measure, "free_memory", lambda device: 1000 * MIB)
    shapes = {name: peers.SHAPES[name] for name in ("96", "256")}
    peers.run(shapes, [["dense"], ["other"]], 1, torch.empty(0))
    first, second = ["plain PyTorch", "dense"], ["plain PyTorch", "other"]
    assert models.groups == [first, first, second, second]
    rows = kept(tmp_path, "peers")
    assert [row["seconds"] for row in rows.values()] == [1, 2, 2, 3, 4, 5]
    assert rows["256: other"]["speed"] == 0.8


def test_on_a_gpu_only_plain_pytorch_is_measured_more_than_once(peers):
    """Of any other case the later rows would be for nothing."""
    named = [label for chosen in peers.GPU_CASES for label in chosen]
    assert len(named) == len(set(named))
    later = [label for chosen in peers.GPU_CASES[1:] for label in chosen]
    assert not any(peers.CASES[label].dense for label in later)


def test_the_floor_is_that_of_the_library_that_computes(peers, monkeypatch, tmp_path):
    Models(peers, monkeypatch, {"plain PyTorch": 1})
    cases = {
        "plain PyTorch": peers.Case(Models.build(1)),
        "MKL": peers.Case(Models.build(1), onednn=False),
    }
    monkeypatch.setattr(peers, "CASES", cases)
    rates = {True: 4e9, False: 2e9}
    monkeypatch.setattr(peers.measure, "matrix_rate", lambda *sizes: rates[sizes[-1]])
    shape = peers.SHAPES["96"]
    peers.run({"96": shape}, [["MKL"]], 1, torch.empty(0))
    rows = kept(tmp_path, "peers")
    assert rows["96: plain PyTorch"]["floor"] == pytest.approx(shape.flops / 4e9, abs=1e-4)
    assert rows["96: MKL"]["floor"] == pytest.approx(shape.flops / 2e9, abs=1e-4)


def test_a_case_that_cannot_fit_is_left_out_and_named(peers, monkeypatch, tmp_path, capsys):
    models = Models(peers, monkeypatch, SIZES)
    monkeypatch.setattr(peers, "GIB", MIB)
    monkeypatch.setattr(peers.measure, "free_memory", lambda device: 60 * MIB)
    peers.run({"96": peers.SHAPES["96"]}, [["large sparse", "other"]], 1, torch.empty(0))
    assert models.groups == [["plain PyTorch", "dense", "other"]]
    message = (
        "96: large sparse: left out: needs 106.7 GiB of free memory, there are 60.0; end other "
        "programs\n"
    )
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bfloat16_is_left_out_where_training_would_not_use_it(
    peers, monkeypatch, capsys, device, pays
):
    """By others, too: without instructions for it, a step would take minutes. On another device
    what the CPU gains does not count."""
    monkeypatch.setattr(precision, "bfloat16_pays", lambda: pays)
    measured = []
    monkeypatch.setattr(peers, "compare", lambda name, shape, cases, *_: measured.extend(cases))
    peers.run({"96": peers.SHAPES["96"]}, [list(peers.CASES)], 1, torch.empty(0, device=device))
    without = [label for label in peers.CASES if not label.startswith("bf16: ")]
    every = pays or device != "cpu"
    assert measured == (list(peers.CASES) if every else without)
    said = "bf16: ours, 8 experts: left out: this CPU gains nothing from bfloat16\n"
    assert (said in capsys.readouterr().out) != every


@pytest.mark.parametrize("name", ["peers", "trainer"])
def test_without_any_case_left_nothing_is_measured(program, monkeypatch, tmp_path, capsys, name):
    """Nor does plain PyTorch alone replace its row, which others are compared with."""
    monkeypatch.setattr(precision, "bfloat16_pays", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--shapes", "96", "--cases", "bf16: *"])
    with pytest.raises(SystemExit) as ended:
        program(name).main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "nothing was measured\n"
    assert not list(tmp_path.rglob("*.json"))


def test_every_case_is_built_for_its_size_without_memory(peers):
    """As many bytes as the model has, on the meta device, where 64 experts take none."""
    pytest.importorskip("transformers")
    from plain_gpt import Experts

    shape = peers.Shape(2, 16, 2, 96, 40, 2, 64)
    for label, case in peers.CASES.items():
        parameters = list(case.build(shape).parameters())
        assert peers.model_bytes(case, shape) == 16 * sum(p.numel() for p in parameters), label
    for label, case in peers.CASES.items():
        assert bool(case.dense) == ("experts" in label and "OLMoE" not in label), label
        if case.dense == "plain PyTorch":
            sparse = [isinstance(block.ffn, Experts) for block in case.build(shape).blocks]
            assert sparse == [False, True], label
        elif case.dense:
            assert case.dense == ("bf16: ours" if case.bf16 else "ours")
            sparse = [each.moe_layer is not None for each in case.build(shape).model.decoder.layers]
            assert sparse == [False, True] if "every other layer" in label else all(sparse), label


def test_plain_experts_are_a_loop_over_tokens(peers):
    """And their balancing loss is that of the router's two favourites."""
    from plain_gpt import Experts

    torch.manual_seed(0)
    layer = Experts(5, 8, 12).double()
    x = torch.randn(30, 8, dtype=torch.float64)
    out, firsts = layer(x), [0] * 5
    for token, row in enumerate(x):
        probs = layer.router(row).softmax(dim=0)
        first, second = probs.argsort(descending=True)[:2].tolist()
        firsts[first] += 1
        y = probs[first] * layer.networks[first](row) + probs[second] * layer.networks[second](row)
        torch.testing.assert_close(out[token], y / (probs[first] + probs[second]))
    means = layer.router(x).softmax(dim=1).mean(dim=0)
    assert float(layer.balance) == pytest.approx(5 * sum(
        share / 30 * float(mean) for share, mean in zip(firsts, means)
    ))  # fmt: skip


class Products(TorchDispatchMode):
    """The precisions of all products of matrices."""

    FACTOR = {"mm": 0, "bmm": 0, "_grouped_mm": 0, "addmm": 1, "baddbmm": 1}

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.FACTOR:
            self.found.setdefault(name, set()).add(args[self.FACTOR[name]].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("label", [
    "bf16: plain PyTorch, autocast", "bf16: Hugging Face GPT-2, autocast", "bf16: OLMoE, 8 experts",
])  # fmt: skip
def test_peers_in_bfloat16_compute_all_products_in_it(peers, label):
    """Those of experts too, which autocast does not reach."""
    pytest.importorskip("transformers")
    step = peers.training_step(
        peers.CASES[label], peers.Shape(2, 48, 2, 96, 40, 2, 8), torch.empty(0)
    )
    with Products() as products:
        step()
    grouped = "OLMoE" in label and hasattr(torch.nn.functional, "grouped_mm")
    assert ("_grouped_mm" in products.found) == grouped
    assert set.union(*products.found.values()) == {torch.bfloat16}, products.found


def test_published_rows_whose_experts_computed_in_float32_say_so():
    """The file's mark is in its table, and the page says it as long as there is one: rows that are
    measured again have none."""
    folder = BENCHMARKS / "results" / "amd-family26-model2"
    measured = json.loads((folder / "peers.json").read_text(encoding="utf-8"))["measured"]
    marked = {key for key, each in measured.items() if each.get("experts") == "in float32"}
    table = (folder / "peers.md").read_text(encoding="utf-8").splitlines()
    lines = [line for line in table if line.endswith(", experts in float32 |")]
    assert {line.split("|")[1].strip() for line in lines} == marked
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    assert ("with autocast, experts computed in float32" in page) == bool(marked)


def test_ratios_of_an_older_file_come_by_way_of_plain_pytorch(peers):
    rows = {"96: ours": {"speed": 2.0}, "96: ours, 8 experts": {"speed": 1.6}}
    assert peers.to_dense(rows, "96: ours, 8 experts") == "1.25*"
    assert peers.to_dense(rows, "96: ours") == "-"
    rows["96: ours, 8 experts"]["to_dense"] = 1.2
    assert peers.to_dense(rows, "96: ours, 8 experts") == "1.20"


def test_free_memory_is_what_the_system_says(peers):
    free = peers.measure.free_memory()
    assert 0 < free
    if sys.platform == "linux":
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        assert free < 1024 * int(lines["MemTotal"].split()[0])
