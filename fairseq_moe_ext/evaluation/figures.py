"""Small charts by matplotlib: inline SVG for pages, and SVG and PNG files, without a browser.

A chart is drawn 360 units wide and meant to be shown at about that many pixels; a wider page puts
charts side by side, so that text has the same size at every width. In SVG the colours are CSS
variables of templates/style.css, so that one chart serves light, dark and print, and text is text.
Series differ in dash and marker as well as in colour. The same numbers give the same bytes.
"""

import contextlib
import functools
import io
import logging
import math
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from .. import outputs
from .report import style_sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 360  # units of every chart; about as many CSS pixels
HEIGHT = 232  # of a line chart
PNG_SCALE = 2.5  # dots a unit
MARKERS = ("o", "s", "D", "^")
DASHES: Tuple[Any, ...] = ((0, (6, 4)), "-", (0, (2, 3)), (0, (9, 3, 2, 3)))

# CSS variable -> its colour in a light page (templates/style.css), as PNG has it; all differ, so
# that each can be told in an SVG. Series: blue, vermilion, green and purple after Okabe and Ito.
COLOURS = {
    "ink": "#1d2430",
    "soft": "#5a6472",
    "rule": "#d9dde3",
    "paper": "#ffffff",
    "heat": "#0b4f8a",
    "onheat": "#fefefe",
    "s0": "#0072b2",
    "s1": "#d55e00",
    "s2": "#007a5a",
    "s3": "#a3588a",
}
_TEXT, _TITLE, _SMALLEST = 11.5, 13.5, 9.0  # units


class Series(NamedTuple):
    """One line of a chart. `style` (0 to 3) picks its colour, dash and marker."""

    label: str
    points: Sequence[Tuple[float, float]]
    style: int
    intervals: Sequence[Optional[Tuple[float, float]]] = ()  # of each point's y: an error bar


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


def short(value: float, digits: int = 3) -> str:
    """A number as an axis shows it: 1500000 -> 1.5M, 0.25 -> 0.25, 3.0 -> 3."""
    if abs(value) >= 1e15:
        return f"{value:.{digits}g}".replace("e+", "e")
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def _labels(ticks: Sequence[float]) -> List[str]:
    """As few digits as tell them apart."""
    for digits in range(3, 9):
        shown = [short(tick, digits) for tick in ticks]
        if len(set(shown)) == len(ticks):
            break
    return shown


class Chart:
    """A drawn chart. A template prints it as inline SVG."""

    def __init__(self, title: str, figure: "Figure", tips: Sequence[str] = ()) -> None:
        self.title = title
        self.figure = figure
        self.tips = tips  # of the cells, in the order in which they were drawn

    def svg(self) -> str:
        """An <svg> element for a page that has the style sheet."""
        with _matplotlib(f"chart {self.title}"):
            text = io.StringIO()
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            self.figure.savefig(text, format="svg", facecolor="none", metadata=nothing)
        return _themed(text.getvalue(), self.title, self.tips)

    __html__ = svg  # what Jinja2 asks for

    def write_svg(self, path: Path) -> None:
        """A file of its own, with the style sheet that a page would give it."""
        opening, rest = self.svg().split(">", 1)
        opening = opening.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        style = escape(style_sheet(), quote=False)
        outputs.write_text(path, f"{opening}><style>{style}</style>{rest}\n")

    def write_png(self, path: Path) -> None:
        """For light paper."""
        with _matplotlib(), outputs.partial_file(path) as file:
            self.figure.savefig(
                file, format="png", dpi=72 * PNG_SCALE, facecolor="white", metadata={"Software": ""}
            )


@contextlib.contextmanager
def _matplotlib(salt: str = "") -> Iterator[None]:
    """matplotlib with our settings, whatever the user's are. Imported only where something is
    drawn. It warns of a home that cannot be written, and works without."""
    for name in ("matplotlib", "matplotlib.font_manager"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "figure.dpi": 72,  # a point is a unit
                "savefig.dpi": 72,
                "svg.fonttype": "none",
                "svg.hashsalt": salt,
                "text.parse_math": False,
                "text.color": COLOURS["ink"],
                "font.size": _TEXT,
                "font.family": "DejaVu Sans",  # comes with it; wider than what a page shows
                "lines.scale_dashes": False,
                "axes.unicode_minus": True,
            }
        )
        yield


def _themed(text: str, title: str, tips: Sequence[str]) -> str:
    """matplotlib's SVG for the style sheet: CSS variables for colours, the page's font, classes in
    place of ids that nothing refers to."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.S)
    size = re.search(r'viewBox="[^"]*"', text)[0]
    name = escape(title)
    opening = f'<svg class="chart" {size} role="img" aria-label="{name}">'
    text = opening + text[text.index(">") + 1 :]
    referred = set(re.findall(r'#([\w-]+)(?=[")])', text))
    text = re.sub(
        r' id="([^"]*)"', lambda m: m[0] if m[1] in referred else _class(m[1]), text
    ).replace("xlink:href", "href")
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(
        r"font: (?:(bold|\d+) )?([\d.]+px) [^;\"]*(;? ?)",
        lambda m: f"font-size: {m[2]}" + ("; font-weight: 650" if m[1] else "") + m[3],
        text,
    )
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    parts = text.split('<g class="cell">')
    assert len(parts) == len(tips) + 1
    text = parts[0] + "".join(
        f'<g class="cell"><title>{escape(tip)}</title>{part}' for tip, part in zip(tips, parts[1:])
    )
    return re.sub(r"\s*\n\s*", " ", text).replace("> <", "><").strip()


def _class(name: str) -> str:
    """Of an id that says what a group is, as we give it, a class; of matplotlib's own nothing."""
    return f' class="{name[3:]}"' if name.startswith("is-") else ""


@functools.cache
def _renderer() -> Any:
    from matplotlib.backends.backend_agg import RendererAgg

    return RendererAgg(1, 1, 72)


def _width(text: str, size: float, weight: str = "normal") -> float:
    """Units across."""
    from matplotlib.font_manager import FontProperties

    font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
    return _renderer().get_text_width_height_descent(text, font, False)[0]


def _fitted(text: str, size: float, room: float, weight: str = "normal") -> Tuple[str, float]:
    """The text and its size so that it fits: smaller if need be, then cut."""
    needed = _width(text, size, weight)
    if needed <= room:
        return text, size
    if size * room / needed >= _SMALLEST:
        return text, size * room / needed
    fitting, too_long = 0, len(text)
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        if _width(text[:middle] + "…", _SMALLEST, weight) <= room:
            fitting = middle
        else:
            too_long = middle
    return text[:fitting].rstrip() + "…", _SMALLEST


def _canvas(height: float) -> Tuple["Figure", "Axes"]:
    """A figure, and its whole area in units from its upper left corner, to write on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    whole = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    whole.axis("off")
    return figure, whole


def _write(
    axes: "Axes",
    x: float,
    y: float,
    text: str,
    room: float,
    *,
    size: float = _TEXT,
    align: str = "left",
    colour: str = "ink",
    weight: str = "normal",
    **how: Any,
) -> None:
    """Text on a baseline."""
    text, size = _fitted(text, size, room, weight)
    how = {"ha": align, "va": "baseline", "color": COLOURS[colour], **how}
    axes.text(x, y, text, fontsize=size, fontweight=weight, **how)


class Legend(NamedTuple):
    """The key to one line of all charts of a grid."""

    label: str
    sample: Chart


def legend(labels: Sequence[str], styles: Sequence[int]) -> List[Legend]:
    return [Legend(label, _sample(style)) for label, style in zip(labels, styles)]


def _sample(style: int) -> Chart:
    from matplotlib.figure import Figure

    with _matplotlib():
        figure = Figure(figsize=(34 / 72, 12 / 72), dpi=72)
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 34), ylim=(0, 12))
        axes.axis("off")
        _plot(axes, [(0, 6), (34, 6)], style, markers=False)
        _plot(axes, [(17, 6)], style)
    return Chart("", figure)


def _plot(
    axes: "Axes", points: Sequence[Tuple[float, float]], style: int, markers: bool = True
) -> None:
    x, y = zip(*points)
    axes.plot(
        x,
        y,
        color=COLOURS[f"s{style % 4}"],
        linestyle=DASHES[style % 4],
        linewidth=2.2,
        marker=MARKERS[style % 4] if markers else "",
        markersize=6 if style % 4 < 3 else 7,
        markeredgecolor=COLOURS["paper"],
        markeredgewidth=0.8,
        clip_on=False,
        gid=f"is-line s{style % 4}",
    )


class _Drawn(NamedTuple):
    """What of a series an axis can show."""

    style: int
    points: List[Tuple[float, float]]
    ends: List[Tuple[float, float]]  # of the error bar at each point; equal ones: none


def _drawable(one: Series, log_x: bool, log_y: bool) -> _Drawn:
    def shown(y: float) -> bool:
        return math.isfinite(y) and (y > 0 or not log_y)

    found = _Drawn(one.style, [], [])
    for i, (x, y) in enumerate(one.points):
        if shown(y) and (x > 0 or not log_x):
            ends = one.intervals[i] if i < len(one.intervals) else None
            found.points.append((x, y))
            usable = ends is not None and all(map(shown, ends))
            found.ends.append((min(ends[0], y), max(ends[1], y)) if usable else (y, y))
    return found


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
) -> Chart:
    """A chart of lines over one x axis.

    Points that are not finite (or not above 0 on a logarithmic axis) are left out. Without any
    point the chart says so. `zero_line` includes y = 0 and draws it; `y_range` fixes the axis, so
    that charts of a grid can be compared; `percent` prints y ticks with a sign and %.
    """
    drawn = [one for one in (_drawable(s, log_x, log_y) for s in series) if one.points]
    with _matplotlib():
        figure, whole = _canvas(HEIGHT)
        if not drawn:
            _write(whole, 50, 17, title, WIDTH - 56, size=_TITLE, weight="bold")
            _write(whole, 50, HEIGHT / 2, "no measurements yet", WIDTH - 56)
            return Chart(title, figure)
        x_low, x_high = _x_range([x for one in drawn for x, _ in one.points], log_x)
        y_low, y_high = _y_range(
            y_range or _ends_of(end for one in drawn for pair in one.ends for end in pair),
            zero_line,
            log_y,
        )
        ticks = log_ticks(y_low, y_high) if log_y else linear_ticks(y_low, y_high, 4)
        shown = [_percent(tick) for tick in ticks] if percent else _labels(ticks)
        left = max(50.0, 24 + max(_width(label, _TEXT) for label in shown))
        right, top, bottom = 14, 30, 42
        axes = figure.add_axes(
            (
                left / WIDTH,
                bottom / HEIGHT,
                (WIDTH - left - right) / WIDTH,
                (HEIGHT - top - bottom) / HEIGHT,
            ),
            xlim=(x_low, x_high),
            ylim=(y_low, y_high),
            xscale="log" if log_x else "linear",
            yscale="log" if log_y else "linear",
        )
        _frame(axes)
        axes.set_yticks(ticks, shown)
        x_ticks = log_ticks(x_low, x_high) if log_x else linear_ticks(x_low, x_high, 4)
        axes.set_xticks(x_ticks, _labels(x_ticks))
        axes.minorticks_off()
        _thin_out(figure, axes)
        if zero_line:
            axes.axhline(0, color=COLOURS["soft"], linewidth=1.5, zorder=1)
        for one in drawn:
            _error_bars(axes, one)
            _plot(axes, one.points, one.style, markers or len(one.points) == 1)
        _write(whole, left, 17, title, WIDTH - left - 4, size=_TITLE, weight="bold")
        across = WIDTH - left - right
        middle = left + across / 2
        _write(whole, middle, HEIGHT - 6, x_label, across, align="center", colour="soft")
        middle = (top + HEIGHT - bottom) / 2
        high = HEIGHT - top - bottom
        turned = {"align": "center", "colour": "soft", "rotation": 90, "rotation_mode": "anchor"}
        _write(whole, 12, middle, y_label, high, **turned)
    return Chart(title, figure)


def _ends_of(values: Iterator[float]) -> Tuple[float, float]:
    every = list(values)
    return min(every), max(every)


def _x_range(every: Sequence[float], log: bool) -> Tuple[float, float]:
    if log:
        return min(every) / 1.15, max(every) * 1.15
    return min(0.0, min(every)), max(every) or 1.0


def _y_range(ends: Tuple[float, float], zero: bool, log: bool) -> Tuple[float, float]:
    low, high = ends
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if log:
        return low / 1.06, high * 1.06
    margin = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _percent(value: float) -> str:
    return f"{value:+g} %".replace("+0 ", "0 ").replace("-", "−")


def _frame(axes: "Axes") -> None:
    """A line below, and a grid across."""
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["soft"])
    axes.patch.set_visible(False)
    axes.set_axisbelow(True)
    axes.yaxis.grid(True, color=COLOURS["rule"], linewidth=1)
    axes.tick_params("y", length=0, pad=6, labelcolor=COLOURS["ink"])
    axes.tick_params("x", length=4, pad=4, color=COLOURS["soft"], labelcolor=COLOURS["ink"])


def _thin_out(figure: "Figure", axes: "Axes") -> None:
    """Take away labels of ticks that would overprint another, or leave the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    for axis, low, high, gap in ((axes.xaxis, "x0", "x1", 7), (axes.yaxis, "y0", "y1", 2)):
        kept: List[str] = []
        end = -math.inf
        for label in axis.get_ticklabels():
            box = label.get_window_extent(renderer)
            free = getattr(box, low) >= end + gap and box.x1 <= WIDTH
            kept.append(label.get_text() if free else "")
            end = getattr(box, high) if free else end
        axis.set_ticklabels(kept)


def _error_bars(axes: "Axes", one: _Drawn) -> None:
    bars = [(x, y, *ends) for (x, y), ends in zip(one.points, one.ends) if ends[0] < ends[1]]
    if not bars:
        return
    x, y, low, high = zip(*bars)
    below = [b - a for a, b in zip(low, y)]
    above = [b - a for a, b in zip(y, high)]
    colour = COLOURS[f"s{one.style % 4}"]
    drawn = axes.errorbar(
        x, y, yerr=[below, above], fmt="none", ecolor=colour, elinewidth=1.4, capsize=3.5
    )
    for lines in drawn.lines[2]:
        lines.set_gid("is-error-bars")


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
    with _matplotlib():
        figure, whole = _canvas(bottom + 38)
        left = min(150.0, 8 + max(_width(label, _TEXT) for label in rows))
        cell = (WIDTH - left - 2) / columns
        numbers = all(_width(f"{v * 100:.0f}", _TEXT) <= cell - 3 for row in values for v in row)
        _write(whole, 0, 17, title, WIDTH, size=_TITLE, weight="bold")
        for r, (label, row) in enumerate(zip(rows, values)):
            y = top + r * cell_height
            _write(whole, left - 6, y + 16.5, label, left - 7, align="right")
            for c, value in enumerate(row):
                tips.append(f"{label}, {column_label} {c}: {value:.1%}")
                _cell(whole, left + c * cell, y, cell, cell_height, value, highest, numbers)
        if rule_before is not None:
            y = top + rule_before * cell_height - 0.8
            whole.plot([0, WIDTH - 2], [y, y], color=COLOURS["soft"], linewidth=1.5)
        every = math.ceil((_width(str(columns - 1), _TEXT) + 4) / cell)
        for c in range(0, columns, every):
            x = left + (c + 0.5) * cell - 0.7
            _write(whole, x, bottom + 14, str(c), WIDTH, align="center")
        across = WIDTH - left
        x = left + across / 2
        _write(whole, x, bottom + 31, column_label, across, align="center", colour="soft")
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
        _write(axes, middle, y + 16, f"{value * 100:.0f}", width, align="center", colour=ink)
