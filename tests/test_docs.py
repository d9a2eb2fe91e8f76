"""The site of docs/: its list of flags, its pages, and the build itself."""

import fnmatch
import importlib.util
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from fairseq_moe_ext.config import MoETransformerLMConfig
from fairseq_moe_ext.models.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def conf():
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_flags_has_every_flag_that_has_a_help_text():
    page = "\n".join(conf().flags_page()).split("## Criterion")[0]
    for flag in fields(MoETransformerLMConfig):
        shown = f"| `--{flag.name.replace('_', '-')}` |" in page
        assert shown == ("help" in flag.metadata), flag.name
    assert re.search(r"^\| `--moe-expert-count` \| `0` \| by size \| ", page, flags=re.M)


def test_the_page_of_flags_has_what_the_sparse_architectures_set():
    """Most of it is not the default, with which no documented command runs."""
    page = "\n".join(conf().flags_page())
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `--")]
    shown = {row[0].strip("| `"): row[2] for row in rows if len(row) == 4}
    for name, value in ARCHITECTURES["moe_lm_15b"].items():
        others = {str(ARCHITECTURES[arch][name]) for arch in ("moe_lm_15b", "moe_lm_tiny")}
        expected = "by size" if len(others) > 1 else f"`{value}`"
        assert shown.pop("--" + name.replace("_", "-")) == expected
    assert shown and set(shown.values()) == {""}


def test_the_page_of_flags_is_written_anew_after_a_change():
    written = (DOCS / "flags.md").read_text(encoding="utf-8")
    assert written == "\n".join(conf().flags_page()), "run python docs/conf.py"


def test_no_merge_left_its_marks():
    """Of the code ruff would say so."""
    for path in (*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "examples").rglob("*.md")):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if line.startswith(("<<<<<<< ", ">>>>>>> "))], path


def test_every_page_is_in_the_table_of_contents():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = set("\n".join(re.findall(r"```{toctree}\n(.*?)```", index, flags=re.S)).split())
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert pages == {name for name in listed if name[0] != ":"} - {"How", "to"} - {"Reference"}
    for path in DOCS.glob("*/*.md"):  # results, which are no pages
        patterns = conf().exclude_patterns
        assert any(fnmatch.fnmatch(path.parent.name, pattern) for pattern in patterns), path


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("furo")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "moe.routing" in (tmp_path / "api.html").read_text(encoding="utf-8")
