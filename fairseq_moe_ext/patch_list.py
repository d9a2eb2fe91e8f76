"""`fairseq-moe patches`: which functions of fairseq are wrapped, why, and what is in force here."""

import argparse
import textwrap
from typing import List

import fairseq_today
from fairseq_today import finding, registry

from .patches import PATCHES

TABLES = (
    ("What stock fairseq 0.12.2 needs to run here (fairseq_today/)", fairseq_today.PATCHES),
    ("How the plugin is found without --user-dir (fairseq_today/finding.py)", finding.PATCHES),
    ("What the plugin changes (fairseq_moe_ext/patches/)", PATCHES),
)


def state(patch: registry.Patch) -> str:
    """Whether a row is in force in this process."""
    if not patch.condition.holds():
        return "not needed here"
    there = [registry.is_in_force(patch, target) for target in patch.targets]
    if all(there):
        return "in force"
    late = all(target.startswith("fairseq_cli.") for target in patch.targets)
    return "when the command is imported" if late else "only where installed"


def rows() -> List[str]:
    """All tables as lines of text."""
    lines = []
    for title, table in TABLES:
        lines += [title, "=" * len(title), ""]
        for patch in table:
            lines += [_wrapped(target, "") for target in patch.targets]
            lines += [
                _wrapped(patch.why, "    "),
                _wrapped(f"where: {patch.where}", "    "),
                f"    ends: {'never' if patch.ends == registry.NEVER else f'with {patch.ends}'}",
                f"    needed: {patch.condition.text}; {state(patch)}",
                "",
            ]
    return lines


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(
        text,
        98,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(args: argparse.Namespace) -> None:
    print("\n".join(rows()).rstrip())
