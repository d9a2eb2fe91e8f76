"""Shares as shaded cells."""

import math
from typing import TYPE_CHECKING, Optional, Sequence

from .chart import COLOURS, TEXT_SIZE, TITLE_SIZE, WIDTH, Chart, canvas, drawing, text_width, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def heatmap(
    title: str,
    rows: Sequence[str],
    values: Sequence[Sequence[float]],
    column_label: str,
    highest: float,
    rule_before: Optional[int] = None,
) -> Chart:
    """Shares (0 to 1) as shaded cells with the percentage in each.

    rows: one label a row; values: one sequence a row, all of the same length (columns are
    numbered from 0); highest: the share that gets the full shade, the same for all heat maps of a
    grid; rule_before: a line is drawn above that row. Raises ValueError when shapes disagree.
    """
    columns = len(values[0]) if values else 0
    if len(rows) != len(values) or any(len(row) != columns for row in values) or not columns:
        raise ValueError(f"{len(rows)} labels for rows of lengths {[len(row) for row in values]}")
    top, cell_height = 30, 25
    bottom = top + cell_height * len(rows)
    tips = []
    with drawing():
        figure, whole = canvas(bottom + 38)
        left = min(150.0, 8 + max(text_width(label, TEXT_SIZE) for label in rows))
        cell = (WIDTH - left - 2) / columns
        numbers = all(
            text_width(f"{v * 100:.0f}", TEXT_SIZE) <= cell - 3 for row in values for v in row
        )
        write(whole, 0, 17, title, WIDTH, size=TITLE_SIZE, weight="bold")
        for r, (label, row) in enumerate(zip(rows, values)):
            y = top + r * cell_height
            write(whole, left - 6, y + 16.5, label, left - 7, align="right")
            for c, value in enumerate(row):
                tips.append(f"{label}, {column_label} {c}: {value:.1%}")
                _cell(whole, left + c * cell, y, cell, cell_height, value, highest, numbers)
        if rule_before is not None:
            above = top + rule_before * cell_height - 0.8
            whole.plot([0, WIDTH - 2], [above, above], color=COLOURS["soft"], linewidth=1.5)
        every = math.ceil((text_width(str(columns - 1), TEXT_SIZE) + 4) / cell)
        for c in range(0, columns, every):
            x = left + (c + 0.5) * cell - 0.7
            write(whole, x, bottom + 14, str(c), WIDTH, align="center")
        across = WIDTH - left
        x = left + across / 2
        write(whole, x, bottom + 31, column_label, across, align="center", colour="soft")
    return Chart(title, figure, tips)


def _cell(
    axes: "Axes",
    x: float,
    y: float,
    width: float,
    height: float,
    value: float,
    highest: float,
    number: bool,
) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    shade = min(1.0, value / highest) if highest > 0 else 0.0
    colour = to_rgba(COLOURS["heat"], 0.04 + 0.96 * shade)
    gap = min(1.5, width / 4)
    axes.add_patch(
        Rectangle(
            (x, y),
            width - gap,
            height - 1.5,
            facecolor=colour,
            linewidth=0,
            gid="is-cell",
            clip_on=False,
        )
    )
    if number:
        ink = "onheat" if shade > 0.62 else "ink"
        middle = x + (width - gap) / 2
        write(axes, middle, y + 16, f"{value * 100:.0f}", width, align="center", colour=ink)
