"""Tables as plain text and as Markdown. The first row is the header; the first column is text, the
others are numbers."""

from typing import Sequence


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
