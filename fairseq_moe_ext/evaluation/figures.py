"""Small charts as inline SVG: numbers in, a string out.

A chart is drawn 360 units wide and meant to be shown at about that many pixels; a wider page puts
charts side by side (`report.grid`), so that text has the same size at every width. Colours are CSS
variables of `report.STYLE`, so that one chart serves light, dark and print. Series differ in dash
and marker as well as in colour.
"""

import math
from dataclasses import dataclass
from html import escape
from typing import List, Optional, Sequence, Tuple

WIDTH = 360  # units of every chart; about as many CSS pixels
HEIGHT = 232  # of a line chart
MARKERS = ("circle", "square", "diamond", "triangle")
DASHES = ("6 4", "", "2 3", "9 3 2 3")


@dataclass(frozen=True)
class Series:
    """One line of a chart. `style` (0 to 3) picks its colour, dash and marker."""

    label: str
    points: Sequence[Tuple[float, float]]
    style: int


def linear_ticks(low: float, high: float, wanted: int = 5) -> List[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> List[float]:
    """Round numbers inside [low, high] for a logarithmic axis; finer ones where the range is short.

    low must be above 0.
    """
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 6, 8)):
        found = [
            m * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for m in steps
            if low <= m * 10.0**power <= high
        ]
        if len(found) >= 3:
            return found
    return linear_ticks(low, high)


def short(value: float) -> str:
    """A number as an axis shows it: 1500000 -> 1.5M, 0.25 -> 0.25, 3.0 -> 3."""
    if abs(value) >= 1e15:
        return f"{value:.3g}".replace("e+", "e")
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _line(css: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _marker(style: int, x: float, y: float) -> str:
    kind = MARKERS[style % len(MARKERS)]
    css = f'class="m s{style}"'
    if kind == "circle":
        return f'<circle {css} cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>'
    if kind == "square":
        return f'<rect {css} x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>'
    turn = 4.2
    corners = {
        "diamond": ((x, y - turn), (x + turn, y), (x, y + turn), (x - turn, y)),
        "triangle": ((x, y - turn), (x + turn, y + 3), (x - turn, y + 3)),
    }[kind]
    return f'<polygon {css} points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in corners)}"/>'


def legend(labels: Sequence[str], styles: Sequence[int]) -> str:
    """The key to the lines, one for all charts of a grid, as HTML that wraps."""
    items = []
    for label, style in zip(labels, styles):
        dash = DASHES[style % len(DASHES)]
        items.append(
            '<span><svg width="34" height="12" viewBox="0 0 34 12" aria-hidden="true">'
            f'<line class="l s{style}" x1="0" y1="6" x2="34" y2="6" stroke-dasharray="{dash}"/>'
            f"{_marker(style, 17, 6)}</svg> {escape(label)}</span>"
        )
    return f'<p class="legend">{"".join(items)}</p>'


def standalone(svg: str, style: str) -> str:
    """A chart as a file of its own, with the style sheet that a page would give it."""
    opening, rest = svg.split(">", 1)
    opening = opening.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return f"{opening}><style>{escape(style)}</style>{rest}"


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    markers: bool = True,
    zero_line: bool = False,
    y_range: Optional[Tuple[float, float]] = None,
    percent: bool = False,
    log_x: bool = False,
) -> str:
    """A chart of lines over one x axis, as an SVG string.

    Points that are not finite (or not above 0 on a logarithmic axis) are left out. Without any
    point the chart says so. `zero_line` includes y = 0 and draws it; `y_range` fixes the axis, so
    that charts of a grid can be compared; `percent` prints y ticks with a sign and %.
    """
    height, left, right, top, bottom = HEIGHT, 50, 14, 30, 42
    clean = [
        (
            one,
            [
                (x, y)
                for x, y in one.points
                if math.isfinite(y) and (y > 0 or not log_y) and (x > 0 or not log_x)
            ],
        )
        for one in series
    ]
    every = [point for _, points in clean for point in points]
    name = escape(title)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">',
        f'<text class="t" x="{left}" y="17">{name}</text>',
    ]
    if not every:
        parts.append(f'<text x="{left}" y="{height / 2}">no measurements yet</text></svg>')
        return "".join(parts)

    x_low, x_high = min(0.0, min(x for x, _ in every)), max(x for x, _ in every) or 1.0
    if log_x:
        x_low, x_high = min(x for x, _ in every) / 1.15, x_high * 1.15
    y_low, y_high = y_range or (min(y for _, y in every), max(y for _, y in every))
    if zero_line:
        y_low, y_high = min(y_low, 0.0), max(y_high, 0.0)
    if log_y:
        y_low, y_high = y_low / 1.06, y_high * 1.06
    else:
        margin = 0.06 * (y_high - y_low) or abs(y_high) * 0.05 or 1.0
        y_low, y_high = y_low - margin, y_high + margin

    right_edge, base = WIDTH - right, height - bottom

    def across(x: float) -> float:
        share = (x - x_low) / (x_high - x_low)
        if log_x:
            share = math.log(x / x_low) / math.log(x_high / x_low)
        return left + share * (right_edge - left)

    def up(y: float) -> float:
        if log_y:
            share = math.log(y / y_low) / math.log(y_high / y_low)
        else:
            share = (y - y_low) / (y_high - y_low)
        return base - share * (base - top)

    for tick in log_ticks(y_low, y_high) if log_y else linear_ticks(y_low, y_high, 4):
        y = up(tick)
        label = f"{tick:+g} %".replace("+0 ", "0 ").replace("-", "−") if percent else short(tick)
        css = "z" if zero_line and tick == 0 else "g"
        parts.append(_line(css, left, y, right_edge, y))
        parts.append(f'<text class="e" x="{left - 6}" y="{y + 4:.1f}">{label}</text>')
    for tick in log_ticks(x_low, x_high)[:6] if log_x else linear_ticks(x_low, x_high, 4):
        x = across(tick)
        parts.append(_line("k", x, base, x, base + 4))
        parts.append(f'<text class="c" x="{x:.1f}" y="{base + 17}">{short(tick)}</text>')
    parts.append(_line("k", left, base, right_edge, base))
    x, y = (left + right_edge) / 2, (top + base) / 2
    parts.append(f'<text class="c a" x="{x:.1f}" y="{height - 6}">{escape(x_label)}</text>')
    parts.append(
        f'<text class="c a" transform="translate(11 {y:.1f}) rotate(-90)">{escape(y_label)}</text>'
    )
    for one, points in clean:
        if not points:
            continue
        path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        dash = DASHES[one.style % len(DASHES)]
        parts.append(
            f'<polyline class="l s{one.style}" stroke-dasharray="{dash}" points="{path}"/>'
        )
        if markers:
            for x, y in points:
                parts.append(_marker(one.style, across(x), up(y)))
    parts.append("</svg>")
    return "".join(parts)


def heatmap(
    title: str,
    rows: Sequence[str],
    values: Sequence[Sequence[float]],
    column_label: str,
    highest: float,
    rule_before: Optional[int] = None,
) -> str:
    """Shares (0 to 1) as shaded cells with the percentage in each, as an SVG string.

    rows: one label a row; values: one sequence a row, all of the same length (columns are
    numbered from 0); highest: the share that gets the full shade, the same for all heat maps of a
    grid; rule_before: a line is drawn above that row. Raises ValueError when shapes disagree.
    """
    columns = len(values[0]) if values else 0
    if len(rows) != len(values) or any(len(row) != columns for row in values) or not columns:
        raise ValueError(f"{len(rows)} labels for rows of lengths {[len(row) for row in values]}")
    left, top, cell_height = 140, 30, 25
    cell_width = (WIDTH - left - 2) / columns
    height = top + cell_height * len(rows) + 38
    name = escape(title)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{name}">',
        f'<text class="t" x="0" y="17">{name}</text>',
    ]
    numbers = cell_width >= 20
    for r, (label, row) in enumerate(zip(rows, values)):
        y = top + r * cell_height
        parts.append(f'<text class="e" x="{left - 7}" y="{y + 17}">{escape(label)}</text>')
        for c, value in enumerate(row):
            x = left + c * cell_width
            shade = min(1.0, value / highest) if highest > 0 else 0.0
            ink = "i" if shade > 0.62 else "o"
            parts.append(
                f'<rect class="h" x="{x:.1f}" y="{y}" width="{cell_width - 1.5:.1f}" '
                f'height="{cell_height - 1.5}" fill-opacity="{0.04 + 0.96 * shade:.3f}">'
                f"<title>{escape(label)}, {escape(column_label)} {c}: {value:.1%}</title></rect>"
            )
            if numbers:
                parts.append(
                    f'<text class="c {ink}" x="{x + cell_width / 2 - 0.7:.1f}" y="{y + 16.5}">'
                    f"{value * 100:.0f}</text>"
                )
    if rule_before is not None:
        y = top + rule_before * cell_height - 0.8
        parts.append(_line("z", 0, y, WIDTH - 2, y))
    bottom = top + cell_height * len(rows)
    every = 1 if numbers else 2 if columns <= 32 else max(1, columns // 8)
    for c in range(0, columns, every):
        x = left + (c + 0.5) * cell_width - 0.7
        parts.append(f'<text class="c" x="{x:.1f}" y="{bottom + 14}">{c}</text>')
    middle = left + (WIDTH - left) / 2
    parts.append(
        f'<text class="c a" x="{middle:.1f}" y="{bottom + 31}">{escape(column_label)}</text>'
    )
    parts.append("</svg>")
    return "".join(parts)
