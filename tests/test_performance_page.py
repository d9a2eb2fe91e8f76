"""docs/performance.md, docs/kernels.md and benchmarks/README.md say what the results files say, and
what `make benchmark` measures again."""

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "amd-family26-model2"
KEPT = "-malloc-mmap-max-0-malloc-trim-threshold-100000000000"  # memory, by KEEP_FREED
PAGE, KERNELS, NOTES = (
    (ROOT / path).read_text(encoding="utf-8")
    for path in ("docs/performance.md", "docs/kernels.md", "benchmarks/README.md")
)
SHAPES = ("96", "256", "wide")
AUTOCAST = "bf16: plain PyTorch, autocast"
PEERS = {
    "plain PyTorch": "plain PyTorch",
    "the same, compiled": "plain PyTorch, compiled",
    "ours, with PyTorch's choice of products": "ours, PyTorch's products",
    "ours": "ours",
    "ours, 8 experts, top-2, equal FLOPs": "ours, 8 experts",
    "ours, 64 experts, top-2, equal FLOPs": "ours, 64 experts",
    "ours, 8 experts in every other layer": "ours, 8 experts, every other layer",
    "ours, 64 experts in every other layer": "ours, 64 experts, every other layer",
    "Hugging Face's OLMoE, 8 experts, equal FLOPs": "OLMoE, 8 experts",
    "plain PyTorch, bfloat16 autocast": "bf16: plain PyTorch, autocast",
    "ours, `--bf16`": "bf16: ours",
    "ours, `--bf16`, 8 experts": "bf16: ours, 8 experts",
    "ours, `--bf16`, 64 experts": "bf16: ours, 64 experts",
    "ours, `--bf16`, 8 experts in every other layer": "bf16: ours, 8 experts, every other layer",
    "ours, `--bf16`, 64 experts in every other layer": "bf16: ours, 64 experts, every other layer",
    "OLMoE, 8 experts, bfloat16": "bf16: OLMoE, 8 experts",
}


def section(page, heading):
    return page[page.index(f"## {heading}\n") :].split("\n## ")[0]


FASTER = "ours_is_faster"
STEP = section(PAGE, "A step against plain PyTorch")


def rows_of(name, folder=RESULTS):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["rows"]


@pytest.fixture
def file():
    return json.loads((RESULTS / "peers.json").read_text(encoding="utf-8"))


@pytest.fixture
def speed(file):
    """case -> its speeds against plain PyTorch of the same run, one a shape."""
    rows = file["rows"]
    return lambda case: [rows[f"{shape}: {case}"]["speed"] for shape in SHAPES]


@pytest.fixture
def to_dense(monkeypatch):
    """A sparse row's time over the dense one's, by both in turn, or else (with a star) by the
    speeds of both against plain PyTorch."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("peers").to_dense


def said(text, page=PAGE):
    assert text in " ".join(page.split()), text


def listed(values, form="{:.2f}"):
    *first, last = (form.format(value) for value in values)
    return f"{', '.join(first)} and {last}"


def in_short(to_dense):
    """The rows of the table "In short". Ratios of a step are of the speeds against plain PyTorch in
    the same run, not of seconds of several runs; in brackets those with kept memory."""
    peers, kept = rows_of("peers"), rows_of("peers", RESULTS.with_name(RESULTS.name + KEPT))
    evaluated, generated = rows_of("evaluate_peers"), rows_of("generate")

    def step(case, other):
        for shape in SHAPES:
            pairs = (
                [rows.get(f"{shape}: {name}") for name in (case, other)] for rows in (peers, kept)
            )
            both = [f"{a['speed'] / b['speed']:.2f}" if a and b else "" for a, b in pairs]
            yield both[0] + (f" ({both[1]})" if both[1] else "")

    def sparse(case):
        for key in (f"{shape}: {case}" for shape in SHAPES):
            both = [
                to_dense(rows, key).rstrip("*") if key in rows else "" for rows in (peers, kept)
            ]
            yield (both[0] + (f" ({both[1]})" if both[1] else "")).strip() or "-"

    def evaluation(case):
        return (f"{evaluated[f'{shape}: {case}']['speed']:.2f}" for shape in SHAPES)

    def generation(batch):
        for shape in SHAPES:
            row = generated.get(f"{shape}, batch {batch}: ours, converted, by transformers")
            yield f"{row['ours_is_faster']:.2f}" if row else "-"

    def memory(case):
        for shape in SHAPES:
            ours, plain = (peers[f"{shape}: {name}"]["mib"] for name in (case, "plain PyTorch"))
            yield f"{ours / plain:.2f}"

    plain, dense = "plain PyTorch", "against a dense one of equal FLOPs"
    rows = {
        f"speed of a dense step, against {plain}": step("ours", plain),
        "the same with PyTorch's choice of products (what we use on Zen 3 and Zen 4)": step(
            "ours, PyTorch's products", plain
        ),
        "speed of a dense step, against Hugging Face's GPT-2": step("ours", "Hugging Face GPT-2"),
        "speed of a dense step, against stock `transformer_lm`": step("ours", "stock fairseq"),
        f"speed of a dense step with `--bf16`, against {plain}'s autocast": step(
            "bf16: ours", AUTOCAST
        ),
        "the same, against our float32": step("bf16: ours", "ours"),
        f"**time** of a step, {dense}: 8 experts in every other layer": sparse(
            "ours, 8 experts, every other layer"
        ),
        "8 experts in every layer": sparse("ours, 8 experts"),
        "64 experts in every other layer": sparse("ours, 64 experts, every other layer"),
        "64 experts in every layer": sparse("ours, 64 experts"),
        "with `--bf16`, 8 experts in every other layer": sparse(
            "bf16: ours, 8 experts, every other layer"
        ),
        "with `--bf16`, 8 experts in every layer": sparse("bf16: ours, 8 experts"),
        "with `--bf16`, 64 experts in every other layer": sparse(
            "bf16: ours, 64 experts, every other layer"
        ),
        "with `--bf16`, 64 experts in every layer": sparse("bf16: ours, 64 experts"),
        f"speed of evaluation, against {plain}": evaluation("ours"),
        "speed of generation, batch 1, against the same weights in transformers": generation(1),
        "the same, batch 16": generation(16),
        f"**memory** of a dense step besides parameters and moments, against {plain}": memory(
            "ours"
        ),
    }
    yield "| | 4 x 96 | 6 x 256 | 4 x 768 |"
    yield "|---|---|---|---|"
    for label, cells in rows.items():
        yield f"| {label} | {' | '.join(cells)} |"


def test_the_table_in_short_is_that_of_the_files(to_dense):
    table = "\n".join(in_short(to_dense))
    assert table in section(PAGE, "In short"), table


def zen_3(to_dense):
    """label -> cells of its table, from its file."""
    rows = rows_of("peers", RESULTS.with_name("amd-family25-model1"))
    plain, every = "plain PyTorch", ", every other layer"

    def cells(value, case):
        keys = [f"{shape}: {case}" for shape in SHAPES]
        return [f"{value(key):.2f}" if key in rows else "-" for key in keys]

    def speed(other):
        return lambda key: rows[key]["speed"] / rows[key.replace("ours", other)]["speed"]

    def time(key):
        return float(to_dense(rows, key))

    def memory(key):
        return rows[key]["mib"] / rows[key.replace("ours", plain)]["mib"]

    return {
        f"speed of a dense step, against {plain}": cells(speed(plain), "ours"),
        f"the same, against {plain} compiled": cells(speed(f"{plain}, compiled"), "ours"),
        "the same, against Hugging Face's GPT-2": cells(speed("Hugging Face GPT-2"), "ours"),
        "the same, against stock `transformer_lm`": cells(speed("stock fairseq"), "ours"),
        "**time** of a step, against a dense one of equal FLOPs: 8 experts in every other layer": (
            cells(time, f"ours, 8 experts{every}")
        ),
        "8 experts in every layer": cells(time, "ours, 8 experts"),
        "64 experts in every other layer": cells(time, f"ours, 64 experts{every}"),
        "64 experts in every layer": cells(time, "ours, 64 experts"),
        f"{plain}, 8 experts in every other layer, against its dense step": cells(
            time, f"{plain}, 8 experts{every}"
        ),
        f"{plain}, 64 experts in every other layer, against its dense step": cells(
            time, f"{plain}, 64 experts{every}"
        ),
        f"**memory** of a dense step besides parameters and moments, against {plain}": cells(
            memory, "ours"
        ),
    }


def test_the_table_of_zen_3_is_that_of_its_file(to_dense):
    table = section(PAGE, "On your processor").split("| Zen 3, float32 |")[1].split("\n\n")[0]
    shown = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert {label: cells for label, *cells in shown} == zen_3(to_dense)


def test_what_the_page_says_of_zen_3_is_in_its_files():
    folder = RESULTS.with_name("amd-family25-model1")
    peers, evaluated, generated = (
        rows_of(name, folder) for name in ("peers", "evaluate_peers", "generate")
    )
    for shape in SHAPES:
        took = [
            row["seconds"] * row["speed"] for key, row in peers.items() if key.startswith(shape)
        ]
        width = {"wide": "768"}.get(shape, shape)
        said(f"{min(took):.2f} to {max(took):.2f} s at width {width}")
    mib = [
        f"{peers[f'{shape}: {name}, 8 experts, every other layer']['mib']:,}"
        for name in ("plain PyTorch", "ours")
        for shape in ("96", "256")
    ]
    said(
        f"takes {mib[0]} and {mib[1]} MiB besides parameters and moments at widths 96 and 256, "
        f"ours {mib[2]} and {mib[3]} MiB"
    )
    speeds = listed(evaluated[f"{shape}: ours"]["speed"] for shape in SHAPES)
    said(f"Evaluation runs at {speeds} of plain PyTorch's speed")
    one, many, sparse_one, sparse_many = (
        f"{generated[f'256, batch {batch}: ours, converted, by transformers{kind}'][FASTER]:.2f}"
        for kind in ("", ", 8 experts")
        for batch in (1, 16)
    )
    said(
        f"Generation at width 256 runs at {one} (batch 1) and {many} (batch 16) of the speed of "
        f"the same weights in transformers, with 8 experts at {sparse_one} and {sparse_many}"
    )


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
    intro = STEP.split("\n\n")[1]
    assert set(re.findall(r"2026-\d\d-\d\d", intro)) == days
    for case, name in (
        ("Hugging Face GPT-2", "GPT-2 took"),
        ("stock fairseq", "stock `transformer_lm`"),
    ):
        shown = [file["rows"][f"{shape}: {case}"]["seconds"] for shape in SHAPES]
        said(f"{name} {shown[0]:.3f}, {shown[1]:.2f} and {shown[2]:.2f} s")


def test_a_sparse_training_against_a_dense_one():
    rows = rows_of("trainer")
    table = PAGE.split("### A sparse training against a dense one\n")[1].split("\n## ")[0]
    for label, case in (
        ("8 experts", "8 experts"),
        ("64 experts", "64 experts"),
        ("8 experts, `--bf16`", "bf16: 8 experts"),
        ("64 experts, `--bf16`", "bf16: 64 experts"),
    ):
        found = [rows.get(f"{shape}: {case}, every other layer") for shape in SHAPES]
        cells = [f"{row['to_dense']:.2f}" if row else "-" for row in found]
        assert f"| {label} | {' | '.join(cells)} |" in table
    in_first_table = [
        f"{shape}: {case}" for shape in ("96", "128") for case in ("dense", "8 experts")
    ]
    others = sorted(row["speed"] for key, row in rows.items() if key not in in_first_table)
    assert len(others) == 10
    said(
        "In the ten other cases of `trainer.md`, up to width 768 and with `--bf16`, speed by "
        f"wall-clock time is {others[0]:.2f} to {others[-1]:.2f}."
    )
    for key in in_first_table:
        row = rows[key]
        numbers = (
            f"| {row['speed']:.2f} | {row['cpu_speed']:.2f} | {row['more_ms']['gradients']:.1f}"
        )
        assert f"{numbers} of {row['trainer_ms']:.0f} |" in section(
            PAGE, "The trainer around the step"
        )


def test_ratios_to_compiled_models_are_of_one_run(speed):
    """From the speeds against plain PyTorch in the same run, not from seconds of several runs."""
    plain, autocast = (
        listed(a / b for a, b in zip(speed(ours), speed(f"{other}, compiled")))
        for ours, other in (("ours", "plain PyTorch"), ("bf16: ours", AUTOCAST))
    )
    said(f"Compiled, plain PyTorch takes {plain} times as long as ours, plain autocast {autocast}")


def test_shares_of_pytorch_s_own_floor_are_those_of_the_file(file):
    own = [file["rows"][f"{shape}: ours, PyTorch's products"] for shape in SHAPES]
    plain = [file["rows"][f"{shape}: plain PyTorch"]["seconds"] for shape in SHAPES]
    ours = listed(row["floor"] / row["seconds"] for row in own)
    plains = [row["floor"] / seconds for row, seconds in zip(own, plain)]
    said(f"Of it our model reaches {ours}, plain PyTorch {listed(plains)}")
    assert all(share > 1 / 1.5 for share in plains[1:])


def test_sparse_against_dense_is_of_one_run(file, to_dense):
    """Or the page says that it is not."""
    rows = file["rows"]
    apart = [key for key in rows if "experts" in key and to_dense(rows, key).endswith("*")]
    text = "Sparse and dense models did not all take turns in one run"
    assert (text in " ".join(STEP.split())) == bool(apart)


def test_steps_with_kept_memory_are_those_of_the_file():
    rows = rows_of("peers", RESULTS.with_name(RESULTS.name + KEPT))
    ours, plain = (
        [rows[f"{shape}: {case}"]["seconds"] for shape in ("96", "256")]
        for case in ("ours", "plain PyTorch")
    )
    said(
        f"take {ours[0]:.3f} and {ours[1]:.2f} s with our model, and {plain[0]:.3f} and "
        f"{plain[1]:.2f} s with plain PyTorch"
    )


def test_a_disturbed_run_is_named(file):
    """seconds x speed is what plain PyTorch took in the run of a row. NOTES name each run in
    which that is a tenth more than in the row of plain PyTorch."""
    took = {key: row["seconds"] * row["speed"] for key, row in file["rows"].items()}
    disturbed = [
        key for key in took if took[key] > 1.1 * took[f"{key.split(': ')[0]}: plain PyTorch"]
    ]
    for shape in SHAPES:
        of_shape = sorted(took[key] for key in disturbed if key.startswith(shape))
        if of_shape:
            *others, last = (f"{seconds:.2f} s" for seconds in of_shape)
            said(f"plain PyTorch took {', '.join(others)}{' and ' * bool(others)}{last}", NOTES)
    if any(key.startswith("wide") for key in disturbed):
        calm = [took[key] for key in took if key.startswith("wide") and key not in disturbed]
        said(f"{min(calm):.2f} to {max(calm):.2f} s in all others of that width", NOTES)


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
        said(f"| {label} | {', '.join(both)} |", KERNELS)


def ablation(folder):
    """The cells of its four columns by "shape; precision"."""
    lines = (folder / "ablation.md").read_text(encoding="utf-8").splitlines()
    rows = ([cell.strip() for cell in line.strip("| ").split("|")] for line in lines)
    return {cells[0]: cells[2:6] for cells in rows if ";" in cells[0] and len(cells) == 7}


def tables(text):
    """The cells of each table's lines, without its heads."""
    for block in text.split("\n\n"):
        if block.strip().startswith("| "):
            lines = block.splitlines()[2:]
            yield [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_the_tables_of_the_ablation_are_those_of_their_files():
    file, zen_3 = ablation(RESULTS), ablation(RESULTS.with_name("amd-family25-model1"))
    table, table_of_zen_3 = tables(section(KERNELS, "Which parts pay"))
    assert len(table) == 2 * len(file) / 3 > 0
    where = ""
    for shape, precision, *shown in table:
        where = shape or where
        expected = file[f"{where}; {precision}"]
        if precision == "float32":
            choice = file[f"{where}; float32, PyTorch's choice of products"]
            expected = [f"{one} ({other})" for one, other in zip(expected, choice)]
        assert shown == expected
    assert [shape for shape, *_ in table_of_zen_3] == [shape for shape, *_ in table if shape]
    same = []
    for shape, *shown in table_of_zen_3:
        for cell, measured in zip(shown, zen_3[f"{shape}; float32"]):
            assert cell in ("same", measured)
            same += [measured] if cell == "same" else []
    said(f"These ratios were {min(same)} to {max(same)}, so that is the noise", KERNELS)


def test_the_table_of_a_layer_is_that_of_its_file():
    rows = rows_of("layer")
    (table,) = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        for block in section(KERNELS, "One MoE layer").split("\n\n")
        if block.startswith("| ")
    )
    heads, _, *lines = table
    assert [shape for shape, *_ in lines] and {shape for shape, *_ in lines} == set(rows)
    for shape, *cells in lines:
        every = {**rows[shape]["times"], "floor": rows[shape]["floor"]}
        assert cells == [f"{every[head]:.2f}" for head in heads[1:]], shape
    most = rows["2048, 512, 256, 1024"]
    capacity, dropless = (most["times"][name] / most["floor"] for name in ("capacity", "dropless"))
    said(f"{capacity:.1f} times it with capacity, {dropless:.1f} times dropless", KERNELS)


def test_the_table_of_attention_is_that_of_its_file():
    rows = rows_of("attention")
    (table,) = (
        block.splitlines()
        for block in section(KERNELS, "Attention").split("\n\n")
        if block.startswith("| ")
    )
    for line in table[2:]:
        shape, *cells = [cell.strip() for cell in line.split("|")[1:-1]]
        keys = [
            f"{shape}; {precision}; dropout {p}"
            for precision in ("float32", "bfloat16")
            for p in ("0", "0.1")
        ]
        assert cells == [f"{rows[key]['PyTorch : ours']:.2f}" for key in keys], shape
    assert 6 * len(table[2:]) == len(rows)


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


def test_make_benchmark_runs_the_commands_of_the_pages():
    text = PAGE[: PAGE.index("## On a GPU")] + KERNELS
    shown = re.findall(r"`python\s+(benchmarks/[^`]+)`", text)
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
