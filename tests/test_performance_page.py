"""docs/performance.md says what the results files say, and what `make benchmark` measures again."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "amd-family26-model2"
PAGE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
STEP = PAGE[PAGE.index("## A step against plain PyTorch") : PAGE.index("## One MoE layer")]
SHAPES = ("96", "256", "wide")
AUTOCAST = "bf16: plain PyTorch, autocast"
PEERS = {
    "plain PyTorch": "plain PyTorch",
    "the same, compiled": "plain PyTorch, compiled",
    "ours, with PyTorch's choice of products": "ours, PyTorch's products",
    "ours": "ours",
    "ours, 8 experts, top-2, equal FLOPs": "ours, 8 experts",
    "ours, 64 experts, top-2, equal FLOPs": "ours, 64 experts",
    "Hugging Face's OLMoE, 8 experts, equal FLOPs": "OLMoE, 8 experts",
    "plain PyTorch, bfloat16 autocast": "bf16: plain PyTorch, autocast",
    "ours, `--bf16`": "bf16: ours",
    "ours, `--bf16`, 8 experts": "bf16: ours, 8 experts",
    "ours, `--bf16`, 64 experts": "bf16: ours, 64 experts",
    "OLMoE, 8 experts, bfloat16 autocast": "bf16: OLMoE, 8 experts",
}


@pytest.fixture
def file():
    return json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))


@pytest.fixture
def speed(file):
    """case -> its speeds against plain PyTorch of the same run, one a shape."""
    rows = file["rows"]
    return lambda case: [rows[f"{shape}: {case}"]["speed"] for shape in SHAPES]


def said(text):
    assert text in " ".join(PAGE.split()), text


def listed(values, form="{:.2f}"):
    *first, last = (form.format(value) for value in values)
    return f"{', '.join(first)} and {last}"


def table_of_the_step():
    """(case, cells) of each line."""
    (table,) = (block for block in STEP.split("\n\n") if block.startswith("| seconds |"))
    before = ""
    for line in table.splitlines()[2:]:
        label, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        compiled = label == "the same, compiled" and before != "plain PyTorch"
        yield f"{AUTOCAST}, compiled" if compiled else PEERS[label], cells
        before = label


def test_seconds_of_a_step_are_those_of_the_file(file):
    days = set()
    for case, cells in table_of_the_step():
        rows = {shape: file["rows"].get(f"{shape}: {case}") for shape in SHAPES}
        forms = ("{:.3f}", "{:.2f}", "{:.2f}")
        expected = [
            f.format(row["seconds"]) if row else "-" for f, row in zip(forms, rows.values())
        ]
        assert cells == expected, case
        days |= {file["measured"][f"{shape}: {case}"]["date"] for shape in SHAPES if rows[shape]}
    (intro,) = (
        block for block in STEP.split("\n\n") if block.startswith("`python benchmarks/peers")
    )
    assert set(re.findall(r"2026-\d\d-\d\d", intro)) == days
    for case, name in (
        ("Hugging Face GPT-2", "GPT-2 took"),
        ("stock fairseq", "stock `transformer_lm`"),
    ):
        shown = [file["rows"][f"{shape}: {case}"]["seconds"] for shape in SHAPES]
        said(f"{name} {shown[0]:.3f}, {shown[1]:.2f} and {shown[2]:.2f} s")


def test_ratios_of_a_step_are_of_one_run(speed):
    """From the speeds against plain PyTorch in the same run, not from seconds of several runs."""
    bf16, autocast = speed("bf16: ours"), speed(AUTOCAST)
    compiled = speed(f"{AUTOCAST}, compiled")
    own = listed(speed("ours, PyTorch's products"))
    said(f"ours is {listed(speed('ours'))} times as fast as plain PyTorch in float32")
    said(f"{listed(a / b for a, b in zip(bf16, autocast))} times as fast as plain autocast")
    said(f"With PyTorch's choice of products it is {own} times as fast")
    said(f"Compiled autocast takes {listed(a / b for a, b in zip(bf16, compiled))} times as long")


def test_sparse_against_dense_is_of_one_run(file, monkeypatch):
    """By both in turn, or else by the speeds of both against plain PyTorch; the page says which."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    to_dense = importlib.import_module("peers").to_dense
    apart = False
    for experts, verb in ((8, "a step takes"), (64, "it takes")):
        float32, bf16 = (
            [to_dense(file["rows"], f"{shape}: {case}, {experts} experts") for shape in SHAPES]
            for case in ("ours", "bf16: ours")
        )
        apart |= any(value.endswith("*") for value in [*float32, *bf16])
        float32, bf16 = (
            listed((value.rstrip("*") for value in values), "{}") for values in (float32, bf16)
        )
        dense = " the dense one" if experts == 8 else ""
        said(f"With {experts} experts {verb} {float32} times{dense} in float32, and {bf16} times")
    text = "Sparse and dense models did not all take turns in one run"
    assert (text in " ".join(STEP.split())) == apart


def test_a_disturbed_run_is_named(file):
    """seconds x speed is what plain PyTorch took in the run of a row. The page names each run in
    which that is a tenth more than in the row of plain PyTorch."""
    took = {key: row["seconds"] * row["speed"] for key, row in file["rows"].items()}
    disturbed = [
        key for key in took if took[key] > 1.1 * took[f"{key.split(': ')[0]}: plain PyTorch"]
    ]
    for shape in SHAPES:
        of_shape = sorted(took[key] for key in disturbed if key.startswith(shape))
        if of_shape:
            *others, last = (f"{seconds:.2f} s" for seconds in of_shape)
            said(f"plain PyTorch took {', '.join(others)}{' and ' * bool(others)}{last}")
    if any(key.startswith("wide") for key in disturbed):
        calm = [took[key] for key in took if key.startswith("wide") and key not in disturbed]
        said(f"{min(calm):.2f} to {max(calm):.2f} s in all others of that width")


def test_memory_of_a_step_is_that_of_the_file(file):
    cases = ("ours", "plain PyTorch", "Hugging Face GPT-2", "bf16: ours", AUTOCAST)
    ours, plain, gpt2, bf16, autocast = (file["rows"][f"96: {case}"]["mib"] for case in cases)
    said(f"a step at width 96 allocates {ours} MiB (plain PyTorch {plain}, Hugging Face's GPT-2 "
         f"{gpt2}), or {bf16} with `--bf16` (plain autocast {autocast})")  # fmt: skip


def test_both_processors_are_compared_by_the_same_numbers(file):
    """The column of Zen 5 repeats seconds of the table of the step."""
    for label, shape, cases in (
        ("dense step, 6 x 256 wide: plain PyTorch, ours, s", "256", ("plain PyTorch", "ours")),
        ("4 x 96 wide", "96", ("plain PyTorch", "ours")),
        ("4 x 768 wide, vocabulary 50,000, 4 x 512 tokens", "wide", ("plain PyTorch", "ours")),
        ("bfloat16, 6 x 256 wide: plain autocast, ours, s", "256", (AUTOCAST, "bf16: ours")),
        ("bfloat16, 4 x 768 wide", "wide", (AUTOCAST, "bf16: ours")),
        ("bfloat16, 4 x 96 wide", "96", (AUTOCAST, "bf16: ours")),
    ):
        digits = 3 if shape == "96" else 2
        both = [f"{file['rows'][f'{shape}: {case}']['seconds']:.{digits}f}" for case in cases]
        said(f"| {label} | {', '.join(both)} |")


def test_the_table_of_the_ablation_is_that_of_its_file():
    file = {}
    for line in (RESULTS / "ablation.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if ";" in cells[0] and len(cells) == 7:
            file[cells[0]] = cells[2:6]
    table = PAGE[PAGE.index("**Which parts pay.**") :].split("\n\n")[1].splitlines()[2:]
    assert len(table) == 2 * len(file) / 3 > 0
    where = ""
    for line in table:
        shape, precision, *shown = [cell.strip() for cell in line.split("|")[1:-1]]
        where = shape or where
        expected = file[f"{where}; {precision}"]
        if precision == "float32":
            choice = file[f"{where}; float32, PyTorch's choice of products"]
            expected = [f"{one} ({other})" for one, other in zip(expected, choice)]
        assert shown == expected


def test_no_moe_layer_is_faster_than_its_floor():
    rows = json.loads((RESULTS / "layer.json").read_text(encoding="utf-8"))["rows"]
    for key, row in rows.items():
        times = [time for name, time in row["times"].items() if "dense" not in name]
        assert row["floor"] < min(times), key


def test_every_row_of_the_results_has_its_day():
    for path in (ROOT / "benchmarks" / "results").glob("*/*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        assert set(content["measured"]) == set(content["rows"]) != set(), path
        for measured in content["measured"].values():
            assert re.fullmatch(r"20\d\d-\d\d-\d\d", measured["date"])


def recipe():
    """(with KEEP_FREED, command) of each program that `make benchmark` runs."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    lines = re.search(r"^benchmark:.*\n((?:\t.*\n)+)", text, flags=re.M)[1].splitlines()
    found = [re.fullmatch(r"\t(\$\(KEEP_FREED\) )?\$\(RUN\) (benchmarks/.*)", x) for x in lines[1:]]
    return [(bool(each[1]), each[2]) for each in found]


def test_make_benchmark_runs_the_commands_of_the_page():
    before_gpus = PAGE[: PAGE.index("## On a GPU")]
    shown = re.findall(r"`python\s+(benchmarks/[^`]+)`", before_gpus)
    assert {" ".join(command.split()) for command in shown} == {command for _, command in recipe()}
    assert len(recipe()) == len(set(recipe())) > 10


def test_make_benchmark_sets_the_variables_of_the_results():
    """The first command of each program, which those in the folder of the page are of."""
    first = {}
    for keeps, command in recipe():
        first.setdefault(Path(command.split()[0]).stem, keeps)
    for program, keeps in first.items():
        machine = json.loads((RESULTS / f"{program}.json").read_text("utf-8"))["machine"]
        assert keeps == ("MALLOC_MMAP_MAX_=0" in machine.get("variables", "")), program
