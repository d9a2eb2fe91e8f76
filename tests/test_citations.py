"""Comments and docstrings that lean on non-public details cite `path.py:line@version`; the version
installed here must have these lines, and in the table of patches they must be about the target."""

import importlib.util
import re
from pathlib import Path

import pytest

import fairseq_today
from fairseq_moe_ext.patches import PATCHES
from fairseq_today import finding

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    f for room in ("fairseq_moe_ext", "fairseq_today") for f in (ROOT / room).rglob("*.py")
)
LOOSE = re.compile(r"[\w/]+\.py:[\d:]\S*")
CITATION = re.compile(
    r"(?P<path>(?P<package>fairseq|fairseq_cli|fairscale|lm_eval)/[\w/]+\.py)"
    r":(?P<lines>\d+(?:[,-]\d+)*)@(?P<version>\d+(?:\.\d+)+)"
)
ROWS = [*PATCHES, *fairseq_today.PATCHES, *finding.PATCHES]


def joined(text):
    """The text with strings that continue on the next line in one piece."""
    return re.sub(r'"\n\s*"', "", text)


def cited(match):
    """The lines that a citation names; None where the package is not installed."""
    spec = importlib.util.find_spec(match["package"])
    if spec is None:
        return None
    file = Path(next(iter(spec.submodule_search_locations))).parent / match["path"]
    text = file.read_text(encoding="utf-8").split("\n")
    return [text[int(number) - 1] for number in re.split("[,-]", match["lines"])]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_citations_have_one_form_and_name_lines_that_exist(file):
    text = joined(file.read_text(encoding="utf-8"))
    for loose in LOOSE.findall(text):
        assert CITATION.match(loose), f"{loose}: cite fairseq/file.py:line@version"
    for match in CITATION.finditer(text):
        for line in cited(match) or ():
            assert line.strip(), f"{match[0]}: names an empty line"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.targets[0])
def test_a_patch_cites_a_line_about_its_target(row):
    """The definition of what is wrapped, or a call of it."""
    citations = list(CITATION.finditer(row.where))
    assert citations, row.where
    module, _, target = row.targets[0].partition(":")
    if module.partition(".")[0] not in ("fairseq", "fairseq_cli", "fairscale"):
        return  # called by a line of fairseq's that need not name it
    lines = [line for match in citations for line in cited(match) or ()]
    names = target.split(".")
    assert any(name in line for name in names for line in lines), (row.targets, lines)
