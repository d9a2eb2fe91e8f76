"""Tables as plain text and as Markdown. The first row is the header; the first column is text, the
others are numbers."""

import argparse
import json
from typing import Any, Sequence


def plain(rows: Sequence[Sequence[str]]) -> str:
    """A table in fixed width, for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join(c.rjust(w + 2) for c, w in zip(row[1:], widths[1:]))
        for row in rows
    )


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
        return json.dumps(value, indent=1)
    return markdown(rows) if args.markdown else plain(rows)
