"""Tables as plain text and as Markdown. The first row is the header; the first columns are
text, the others numbers."""

import argparse
from typing import Any, Sequence

from .outputs import as_json


def plain(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in fixed width, for a terminal. left: number of columns of text."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    align = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return "\n".join("  ".join(f(c, w) for f, c, w in zip(align, row, widths)) for row in rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|---" + "|---:" * (len(rows[0]) - 1) + "|"
    return "\n".join([head, rule, *body])


def add_form_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `formed` reads."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown")


def formed(args: argparse.Namespace, value: Any, rows: Sequence[Sequence[str]]) -> str:
    """A result in the format that the flags set: the value as JSON, or its table."""
    if args.json:
        return as_json(value)
    return markdown(rows) if args.markdown else plain(rows)
