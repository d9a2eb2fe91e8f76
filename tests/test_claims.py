"""Whoever reads a speed must see of which processor it is: other processors have others."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
    *sorted((ROOT / "examples").glob("*.ipynb")),
]
_NUMBER = r"(?:\d[\d:.,]*|two|three|four|five|six|seven|eight|nine|ten|fifteen|twenty)"
SPEED = re.compile(
    r"\d[\d.,]*k? (?:tokens/s|tokens a second|tokens per second|[GT]FLOP/s|[MG]B/s|µs|ms\b|s\b)"
    rf"|{_NUMBER} times (?:as fast|as slow|as long|faster|slower|the speed|the time)"
    rf"|(?:took|takes?|in) (?:\w+ ){{0,2}}?{_NUMBER} (?:seconds|minutes|hours)"
)
# a processor by its family, or a statement that nobody wrote it down
PROCESSOR = re.compile(r"family \d+|family was not recorded|Zen \d|\bA100\b|\bH[12]00\b")
NOT_MEASURED = re.compile(r"[Cc]omputed|[Cc]alculated|[Aa]ssum")
_BLOCKS = re.compile(r"\n\s*\n|\n(?=\s*- )")  # paragraphs, items of a list


def unnamed(page):
    """Speeds in sections of a page that name no processor; its first section may do so for all. A
    paragraph or an item may say instead that it measured nothing, for itself alone."""
    sections, fenced = [[]], False
    for line in page.splitlines():
        fenced ^= line.startswith("```")
        if not fenced and re.match("#{2,6} ", line):
            sections.append([])
        sections[-1].append(line)
    named = [bool(PROCESSOR.search(" ".join(lines))) for lines in sections]
    if named[0]:
        return []
    texts = ["\n".join(lines) for lines, says in zip(sections, named) if not says]
    blocks = [" ".join(block.split()) for text in texts for block in _BLOCKS.split(text)]
    measured = [block for block in blocks if not NOT_MEASURED.search(block)]
    return [found[0] for block in measured for found in SPEED.finditer(block)]


def text_of(path):
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_speed_names_its_processor(path):
    assert unnamed(text_of(path)) == []


@pytest.mark.parametrize(
    "claim",
    [
        "4.47k tokens/s",
        "reaches 214 GFLOP/s",
        "is 1.9 times as fast as stock",
        "three times faster",
        "It took 63 minutes on two\ncores.",
        "costs 0.3 ms",
        "reads 7.5 MB/s",
        "the first took 5 s",
        "Computed: 10 tokens/s.\n\nMeasured: 5 ms.",
        "- Calculated: 10 tokens/s.\n- Measured: 5 ms.",
        "```\n# 10 tokens/s\n```",
    ],
)
def test_a_speed_without_a_processor_is_found(claim):
    page = f"# Page\n\nText.\n\n## Part\n\nAMD EPYC, family 26: 5 ms.\n\n## Other\n\n{claim}\n"
    assert len(unnamed(page)) == 1
    assert not unnamed(page + "\nThis is of an AMD EPYC of family 25.\n")
    assert not unnamed(page.replace("Text.", "All of it on Zen 5."))
    assert len(unnamed(page.replace("Text.", "Some of it is calculated, or assumed."))) == 1


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


def test_a_step_of_peers_is_that_of_its_file():
    found = (ROOT / "benchmarks" / "results" / "amd-family26-model2" / "peers.md").read_text(
        "utf-8"
    )
    seconds = dict(re.findall(r"^\| ([^|]*) \| (\d\.\d+) \|", found, flags=re.M))
    page = (ROOT / "docs" / "performance.md").read_text("utf-8")
    page = page[page.index("## A step against plain PyTorch") :]
    label = ""
    for line in page.split("\n\n")[2].splitlines()[2:]:
        before, (label, *cells) = label, [cell.strip() for cell in line.split("|")[1:-1]]
        case = PEERS[label]
        if before == "plain PyTorch, bfloat16 autocast":
            case = "bf16: plain PyTorch, autocast, compiled"
        kept = [seconds.get(f"{shape}: {case}", "nan") for shape in ("96", "256", "wide")]
        expected = [kept[0], *(f"{float(each):.2f}" for each in kept[1:])]
        assert cells == [each.replace("nan", "-") for each in expected], label
    for case, name in (
        ("Hugging Face GPT-2", "GPT-2 took"),
        ("stock fairseq", "stock `transformer_lm`"),
    ):
        shown = [float(seconds[f"{shape}: {case}"]) for shape in ("96", "256", "wide")]
        text = f"{name} {shown[0]:.3f}, {shown[1]:.2f} and {shown[2]:.2f} s"
        assert text in " ".join(page.split())


def test_the_table_of_the_ablation_is_that_of_its_file():
    kept = ROOT / "benchmarks" / "results" / "amd-family26-model2" / "ablation.md"
    file = {}
    for line in kept.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if ";" in cells[0] and len(cells) == 7:
            file[cells[0]] = cells[2:6]
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    table = page[page.index("**Which parts pay.**") :].split("\n\n")[1].splitlines()[2:]
    assert len(table) == 2 * len(file) / 3 > 0
    where = ""
    for line in table:
        shape, precision, *shown = [cell.strip() for cell in line.split("|")[1:-1]]
        where = shape or where
        expected = file[f"{where}; {precision}"]
        if precision == "float32":
            choice = file[f"{where}; float32, PyTorch's choice of products"]
            both = [f"{one} ({other})" for one, other in zip(expected[:3], choice)]
            expected = [*both, expected[3]]
        assert shown == expected
