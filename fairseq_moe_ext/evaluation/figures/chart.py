"""A drawn chart as SVG or PNG, and text that fits into it."""

import contextlib
import functools
import io
import logging
import re
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Sequence, Tuple

from ... import outputs
from ..report import style_sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 360  # units of every chart; about as many CSS pixels
PNG_SCALE = 2.5  # dots a unit

# CSS variable -> its colour in a light page (templates/style.css), as PNG has it; all differ, so
# that an SVG can identify each. Series: blue, vermilion, green and purple after Okabe and Ito.
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
TEXT_SIZE, TITLE_SIZE, _SMALLEST = 11.5, 13.5, 9.0  # units


class Chart:
    """A drawn chart. A template prints it as inline SVG."""

    def __init__(self, title: str, figure: "Figure", tips: Sequence[str] = ()) -> None:
        self.title = title
        self.figure = figure
        self.tips = tips  # of the cells, in the order in which they were drawn

    def svg(self) -> str:
        """An <svg> element for a page that has the style sheet."""
        with drawing(f"chart {self.title}"):
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
        with drawing(), outputs.partial_file(path) as file:
            self.figure.savefig(
                file, format="png", dpi=72 * PNG_SCALE, facecolor="white", metadata={"Software": ""}
            )


@contextlib.contextmanager
def drawing(salt: str = "") -> Iterator[None]:
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
                "font.size": TEXT_SIZE,
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
    size = text[text.index('viewBox="') :].split('"')[1]
    name = escape(title)
    opening = f'<svg class="chart" viewBox="{size}" role="img" aria-label="{name}">'
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


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Units across."""
    from matplotlib.font_manager import FontProperties

    font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
    return _renderer().get_text_width_height_descent(text, font, False)[0]


def _fitted(text: str, size: float, room: float, weight: str = "normal") -> Tuple[str, float]:
    """The text and its size so that it fits: smaller if need be, then cut."""
    needed = text_width(text, size, weight)
    if needed <= room:
        return text, size
    if size * room / needed >= _SMALLEST:
        return text, size * room / needed
    fitting, too_long = 0, len(text)
    while too_long - fitting > 1:
        middle = (fitting + too_long) // 2
        if text_width(text[:middle] + "…", _SMALLEST, weight) <= room:
            fitting = middle
        else:
            too_long = middle
    return text[:fitting].rstrip() + "…", _SMALLEST


def canvas(height: float) -> Tuple["Figure", "Axes"]:
    """A figure, and its whole area in units from its upper left corner, to write on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    whole = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    whole.axis("off")
    return figure, whole


def write(
    axes: "Axes",
    x: float,
    y: float,
    text: str,
    room: float,
    *,
    size: float = TEXT_SIZE,
    align: str = "left",
    colour: str = "ink",
    weight: str = "normal",
    **how: Any,
) -> None:
    """Text on a baseline."""
    text, size = _fitted(text, size, room, weight)
    how = {"ha": align, "va": "baseline", "color": COLOURS[colour], **how}
    axes.text(x, y, text, fontsize=size, fontweight=weight, **how)
