"""Lines over one x axis, with error bars, and the legend of a grid of such charts."""

import math
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from .chart import COLOURS, TEXT_SIZE, TITLE_SIZE, WIDTH, Chart, canvas, drawing, text_width, write
from .ticks import labels, linear_ticks, log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 232  # of a line chart
MARKERS = ("o", "s", "D", "^")
DASHES: Tuple[Any, ...] = ((0, (6, 4)), "-", (0, (2, 3)), (0, (9, 3, 2, 3)))


class Series(NamedTuple):
    """One line of a chart. `style` (0 to 3) picks its colour, dash and marker."""

    label: str
    points: Sequence[Tuple[float, float]]
    style: int
    intervals: Sequence[Optional[Tuple[float, float]]] = ()  # of each point's y: an error bar


class Legend(NamedTuple):
    """The key to one line of all charts of a grid."""

    label: str
    sample: Chart


def legend(names: Sequence[str], styles: Sequence[int]) -> List[Legend]:
    return [Legend(name, _sample(style)) for name, style in zip(names, styles)]


def _sample(style: int) -> Chart:
    from matplotlib.figure import Figure

    with drawing():
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


def _drawable(series: Series, log_x: bool, log_y: bool) -> _Drawn:
    def shown(y: float) -> bool:
        return math.isfinite(y) and (y > 0 or not log_y)

    drawn = _Drawn(series.style, [], [])
    for i, (x, y) in enumerate(series.points):
        if shown(y) and (x > 0 or not log_x):
            ends = series.intervals[i] if i < len(series.intervals) else None
            drawn.points.append((x, y))
            if ends is None or not all(map(shown, ends)):
                ends = (y, y)
            drawn.ends.append((min(ends[0], y), max(ends[1], y)))
    return drawn


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    markers: bool = True,
    zero_line: bool = False,
    percent: bool = False,
    log_x: bool = False,
) -> Chart:
    """A chart of lines over one x axis.

    Points that are not finite (or not above 0 on a logarithmic axis) are left out. Without any
    point the chart says so. `zero_line` includes y = 0 and draws it; `percent` prints y ticks with
    a sign and %.
    """
    drawn = [line for line in (_drawable(s, log_x, log_y) for s in series) if line.points]
    with drawing():
        figure, whole = canvas(HEIGHT)
        if not drawn:
            write(whole, 50, 17, title, WIDTH - 56, size=TITLE_SIZE, weight="bold")
            write(whole, 50, HEIGHT / 2, "no measurements yet", WIDTH - 56)
            return Chart(title, figure)
        x_low, x_high = _x_range([x for line in drawn for x, _ in line.points], log_x)
        ends = [end for line in drawn for pair in line.ends for end in pair]
        y_low, y_high = _y_range(ends, zero_line, log_y)
        ticks = log_ticks(y_low, y_high) if log_y else linear_ticks(y_low, y_high, 4)
        shown = [_percent(tick) for tick in ticks] if percent else labels(ticks)
        left = max(50.0, 24 + max(text_width(label, TEXT_SIZE) for label in shown))
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
        axes.set_xticks(x_ticks, labels(x_ticks))
        axes.minorticks_off()
        _thin_out(figure, axes)
        if zero_line:
            axes.axhline(0, color=COLOURS["soft"], linewidth=1.5, zorder=1)
        for line in drawn:
            _error_bars(axes, line)
            _plot(axes, line.points, line.style, markers or len(line.points) == 1)
        write(whole, left, 17, title, WIDTH - left - 4, size=TITLE_SIZE, weight="bold")
        across = WIDTH - left - right
        middle = left + across / 2
        write(whole, middle, HEIGHT - 6, x_label, across, align="center", colour="soft")
        middle = (top + HEIGHT - bottom) / 2
        high = HEIGHT - top - bottom
        turned: Dict[str, Any] = {"rotation": 90, "rotation_mode": "anchor"}
        write(whole, 12, middle, y_label, high, align="center", colour="soft", **turned)
    return Chart(title, figure)


def _x_range(every: Sequence[float], log: bool) -> Tuple[float, float]:
    if log:
        return min(every) / 1.15, max(every) * 1.15
    return min(0.0, min(every)), max(every) or 1.0


def _y_range(every: Sequence[float], zero: bool, log: bool) -> Tuple[float, float]:
    low, high = min(every), max(every)
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
    """Remove tick labels that would overlap another, or leave the chart."""
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


def _error_bars(axes: "Axes", line: _Drawn) -> None:
    bars = [(x, y, *ends) for (x, y), ends in zip(line.points, line.ends) if ends[0] < ends[1]]
    if not bars:
        return
    x, y, low, high = zip(*bars)
    below = [b - a for a, b in zip(low, y)]
    above = [b - a for a, b in zip(y, high)]
    colour = COLOURS[f"s{line.style % 4}"]
    drawn = axes.errorbar(
        x, y, yerr=[below, above], fmt="none", ecolor=colour, elinewidth=1.4, capsize=3.5
    )
    for lines in drawn.lines[2]:
        lines.set_gid("is-error-bars")
