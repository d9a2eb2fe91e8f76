"""Small charts by matplotlib: inline SVG for pages, and SVG and PNG files, without a browser.

A chart is drawn 360 units wide and meant to be shown at about that many pixels; a wider page puts
charts side by side, so that text has the same size at every width. In SVG the colours are CSS
variables of templates/style.css, so that one chart serves light, dark and print, and text is text.
Series differ in dash and marker as well as in colour. The same numbers give the same bytes.

ticks.py     round numbers along an axis, and their labels
chart.py     a drawn chart as SVG or PNG, and text that fits into it
lines.py     lines with error bars, and their legend
heatmap.py   shares as shaded cells
"""

from .chart import COLOURS, WIDTH, Chart
from .heatmap import heatmap
from .lines import Legend, Series, legend, line_chart
from .ticks import linear_ticks, log_ticks

__all__ = [
    "COLOURS",
    "WIDTH",
    "Chart",
    "Legend",
    "Series",
    "heatmap",
    "legend",
    "line_chart",
    "linear_ticks",
    "log_ticks",
]
