"""Whoever reads a speed must see of which processor it is: other processors have others."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
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
