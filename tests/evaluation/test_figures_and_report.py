"""Figures and pages: well-formed, self-contained, and showing the numbers they were given."""

import math
import os
import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
import zlib
from html import unescape

import pytest
from markupsafe import escape

from fairseq_moe_ext import outputs
from fairseq_moe_ext.evaluation import figures, report


def drawn(chart):
    """Its inline SVG, well-formed."""
    svg = chart.svg()
    ElementTree.fromstring(svg)
    return svg


def texts(svg):
    """What is written: (where on x, start, middle or end of it is at x, y, text)."""
    found = re.findall(
        r'<text style="[^"]*text-anchor: (\w+)[^"]*" x="([^"]*)" y="([^"]*)"[^>]*>([^<]*)</text>',
        svg,
    )
    assert len(found) == svg.count("<text ")
    return [(float(x), anchor, float(y), unescape(text)) for anchor, x, y, text in found]


def lines(svg, style):
    """The corners of a series' line."""
    (group,) = re.findall(rf'<g class="line s{style}"><path d="([^"]*)"', svg)
    return [tuple(map(float, corner)) for corner in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", group)]


def test_ticks_are_round_and_inside():
    assert figures.linear_ticks(0, 1.5e6, 4) == [0, 5e5, 1e6, 1.5e6]
    assert figures.linear_ticks(-6.5, 0.3, 4) == [-6, -4, -2, 0]
    assert figures.linear_ticks(3, 3) == [3]
    assert figures.log_ticks(40, 900) == [50, 100, 200, 500]
    assert figures.log_ticks(1, 1e5) == [1, 10, 100, 1000, 1e4, 1e5]
    for low, high in ((41.0, 43.0), (95, 130), (1.01, 1.02)):
        ticks = figures.log_ticks(low, high)
        assert len(ticks) >= 3 and all(low <= tick <= high for tick in ticks)


def test_points_stand_where_their_values_are():
    series = [figures.Series("a", [(0, 10), (50, 100), (100, 1000)], 0)]
    svg = drawn(figures.line_chart("t", series, "x", "y", log_y=True))
    (x0, y0), (x1, y1), (x2, y2) = lines(svg, 0)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1), "the middle of a logarithmic axis"
    assert y0 > y1 > y2, "larger is higher up"
    assert x2 <= figures.WIDTH and y2 >= 0
    (hundred,) = [y for _, anchor, y, text in texts(svg) if (anchor, text) == ("end", "100")]
    assert hundred == pytest.approx(y1 + 4, abs=2), "its tick is beside it"


def test_error_bars_reach_from_end_to_end():
    points, ends = [(1, 20.0), (2, 30.0), (3, 25.0)], [(10.0, 40.0), None, (25.0, 25.0)]
    svg = drawn(figures.line_chart("t", [figures.Series("a", points, 1, ends)], "x", "y"))
    (bars,) = re.findall(r'<g class="error-bars">(.*?)</g>', svg)
    ((x, low, x_again, high),) = re.findall(r'd="M ([\d.]+) ([\d.]+) L ([\d.]+) ([\d.]+) "', bars)
    (at, middle), (_, higher), _ = lines(svg, 1)
    assert x == x_again and float(x) == pytest.approx(at, abs=0.01)
    unit = (middle - higher) / 10  # from 20 to 30
    assert float(low) == pytest.approx(middle + 10 * unit, abs=0.01)
    assert float(high) == pytest.approx(middle - 20 * unit, abs=0.01)


def test_values_that_no_axis_can_show_are_left_out():
    points = [(1, 2.0), (2, math.nan), (3, math.inf), (4, 0.0), (5, 4.0)]
    line = figures.Series("a", points, 1, [(1.0, math.inf)] * 5)
    svg = drawn(figures.line_chart("t", [line], "x", "y", log_y=True))
    assert len(lines(svg, 1)) == 2 and "error-bars" not in svg
    assert "nan" not in svg and "inf" not in svg
    assert "no measurements" in drawn(figures.line_chart("t", [], "x", "y"))
    drawn(figures.line_chart("t", [figures.Series("a", [(0, 5.0)], 0)], "x", "y", log_y=True))


def test_series_differ_in_more_than_colour():
    series = [figures.Series(str(i), [(0, i), (1, i + 1)], i) for i in range(4)]
    svg = drawn(figures.line_chart("t", series, "x", "y"))
    found = re.findall(
        r'<g class="line s(\d)"><path d="[^"]*" style="([^"]*)"/>(<defs>.*?<use [^>]*>)', svg
    )
    assert [number for number, _, _ in found] == list("0123")
    dashes = [re.search("stroke-dasharray: ([^;]*)", style) for _, style, _ in found]
    assert len({dash and dash[1] for dash in dashes}) == 4
    assert len({re.search(r'd="([^"]*)"', marker)[1] for _, _, marker in found}) == 4
    for number, style, marker in found:
        assert f"var(--s{number})" in style and f"var(--s{number})" in marker


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    "low, high", [(1.0, 2.0), (99_999.0, 100_001.0), (2e9, 7e21), (1e-7, 9e-5)]
)
def test_labels_do_not_overprint(low, high, log):
    from PIL import ImageFont

    font = ImageFont.load_default(size=11.5)
    line = figures.Series("a", [(low, low), (high, high)], 0)
    svg = drawn(figures.line_chart("A title " * 20, [line], "x " * 200, "y", log_y=log, log_x=log))
    boxes = []
    for x, anchor, y, text in texts(svg):
        width = font.getlength(text)
        left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        if text and text != "y":
            boxes.append((left, y - 8, left + width, y, text))
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            apart = one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3]
            assert apart or other[1] >= one[3], (one, other)
    assert len(boxes) >= 3 and all(box[2] <= figures.WIDTH + 1 for box in boxes), boxes


def test_heatmap_prints_every_share_and_refuses_ragged_rows():
    svg = drawn(figures.heatmap("t", ["a", "b"], [[0.25, 0.75], [1.0, 0.0]], "expert", 1.0))
    cells = re.findall(
        r'<g class="cell"><title>([^<]*)</title><path d="[^"]*" style="([^"]*)"', svg
    )
    assert [tip for tip, _ in cells] == [
        *("a, expert 0: 25.0%", "a, expert 1: 75.0%", "b, expert 0: 100.0%", "b, expert 1: 0.0%")
    ]
    shares = [float((re.search(r"opacity: ([\d.]+)", style) or [0, 1.0])[1]) for _, style in cells]
    assert shares == [pytest.approx(0.04 + 0.96 * x, abs=1e-4) for x in (0.25, 0.75, 1, 0)]
    written = [text for *_, text in texts(svg)]
    assert [text for text in written if text.isdigit()] == ["25", "75", "100", "0", "0", "1"]
    many = texts(drawn(figures.heatmap("t", ["a"], [[1 / 512] * 512], "expert", 1.0)))
    assert 3 <= len(many) <= 25, "numbers that would overprint are left out"
    with pytest.raises(ValueError, match="2 labels"):
        figures.heatmap("t", ["a", "b"], [[1.0], [0.5, 0.5]], "expert", 1.0)


PAGE = """{% extends "base.html" %}{% import "parts.html" as parts %}{% block content %}
{{ parts.table(table) }}{{ parts.cards([(evil, evil)]) }}{{ parts.bullets([evil]) }}
{{ parts.grid(charts, evil, legend) }}
{% call parts.folded(evil) %}{{ evil }}{% endcall %}{% endblock %}"""


def made_page(folder, evil):
    (folder / "page.html").write_text(PAGE)
    rows = [(evil,), ((evil + "\n" + evil, "total"), (evil, "good"))]
    line = figures.Series(evil, [(0, 1), (1, 2)], 0)
    return report.render(
        "page.html",
        folder,
        title=evil,
        evil=evil,
        table=report.table((evil, evil), rows),
        charts=[
            figures.line_chart(evil, [line], evil, evil),
            figures.heatmap(evil, [evil], [[1.0]], evil, 1.0),
        ],
        legend=figures.legend([evil], [0]),
    )


@pytest.mark.parametrize("evil", ['<b onclick="x">&', "-->]]>$x$ %", "#0072b2 {{ 7 * 7 }}"])
def test_text_is_escaped_everywhere(tmp_path, evil):
    html = made_page(tmp_path, evil)
    assert "<b onclick" not in html and "49" not in html
    assert html.count(str(escape(evil))) >= 12
    body = html[html.index("<main>") : html.index("</body>")]
    ElementTree.fromstring(body)
    assert html.startswith('<!doctype html>\n<html lang="en">')


def test_a_page_refers_to_nothing_outside_itself(tmp_path):
    html = made_page(tmp_path, "t")
    assert not re.search(r"https?:|<script|<link|<img|@import|url\((?!#)", html)
    path = tmp_path / "new" / "report.html"
    path.parent.mkdir()
    outputs.write_text(path, html)
    assert path.read_text(encoding="utf-8") == html
    assert list(path.parent.iterdir()) == [path]
    inside = re.findall(r'(?:href="|url\()#([\w-]+)', html)
    assert set(inside) == set(re.findall(r' id="([\w-]+)"', html)) and inside


def test_files_are_the_same_each_time_and_need_no_browser(tmp_path):
    for name in ("a", "b"):
        line = figures.Series("a", [(1, 2), (2, 3)], 0, [(1, 3), (2, 4)])
        chart = figures.line_chart("t", [line], "x", "y")
        chart.write_svg(tmp_path / f"{name}.svg")
        chart.write_png(tmp_path / f"{name}.png")
    for kind in ("svg", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    content = (tmp_path / "a.png").read_bytes()
    assert struct.unpack(">II", content[16:24]) == (900, 580)
    pixels = content[content.index(b"IDAT") + 4 :]
    assert len(set(zlib.decompressobj().decompress(pixels))) > 20, "something is drawn"
    assert len(list(tmp_path.iterdir())) == 4


def test_the_users_settings_and_home_change_nothing(tmp_path):
    """A matplotlibrc that asks for another look, and a home that cannot be written. And nothing is
    imported before it is needed, so that commands start quickly."""
    code = (
        "import sys; from fairseq_moe_ext.evaluation import evaluate_command, figures, report;"
        "from fairseq_moe_ext.study import command, page;"
        "print([name for name in ('matplotlib', 'jinja2', 'PIL') if name in sys.modules]);"
        "chart = figures.line_chart('t', [figures.Series('a', [(1, 2), (2, 3)], 0)], 'x', 'y');"
        "print(chart.svg())"
    )
    line = figures.Series("a", [(1, 2), (2, 3)], 0)
    expected = figures.line_chart("t", [line], "x", "y").svg()
    (tmp_path / "matplotlibrc").write_text("axes.grid: True\nfont.size: 30\nsavefig.dpi: 300\n")
    environment = {**os.environ, "HOME": "/dev/null", "TMPDIR": str(tmp_path)}
    for name in ("MPLCONFIGDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        environment.pop(name, None)
    environment["MATPLOTLIBRC"] = str(tmp_path / "matplotlibrc")
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0 and "atplotlib" not in done.stderr, done.stderr
    assert done.stdout.splitlines()[-2:] == ["[]", expected]


def test_the_colours_of_figures_are_those_of_a_light_page():
    light = report.style_sheet().partition("@media")[0]
    for name, colour in figures.COLOURS.items():
        found = re.search(rf"--{name}: (#\w+)", light)[1]
        long = "#" + "".join(2 * digit for digit in found[1:]) if len(found) == 4 else found
        assert long == (colour if name != "onheat" else "#ffffff"), name
    assert len(set(figures.COLOURS.values())) == len(figures.COLOURS)


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="row of 2 cells in a table of 3"):
        report.table(("a", "b", "c"), [("1", "2")])
