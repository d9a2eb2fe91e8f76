"""Figures and pages: well-formed, self-contained, and showing the numbers they were given."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from fairseq_moe_ext.evaluation import figures, report


def numbers(svg, pattern):
    return [float(found) for found in re.findall(pattern, svg)]


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
    svg = figures.line_chart("t", series, "x", "y", log_y=True)
    ElementTree.fromstring(svg)
    (line,) = re.findall(r'points="([^"]*)"', svg)
    (x0, y0), (x1, y1), (x2, y2) = [map(float, point.split(",")) for point in line.split()]
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1), "the middle of a logarithmic axis"
    assert y0 > y1 > y2, "larger is higher up"
    assert x2 <= figures.WIDTH and y2 >= 0


def test_values_that_no_axis_can_show_are_left_out():
    points = [(1, 2.0), (2, math.nan), (3, math.inf), (4, 0.0), (5, 4.0)]
    svg = figures.line_chart("t", [figures.Series("a", points, 1)], "x", "y", log_y=True)
    (line,) = re.findall(r'points="([^"]*)"', svg)
    assert len(line.split()) == 2
    assert "nan" not in svg and "inf" not in svg
    assert "no measurements" in figures.line_chart("t", [], "x", "y")
    flat = figures.line_chart("t", [figures.Series("a", [(0, 5.0)], 0)], "x", "y", log_y=True)
    ElementTree.fromstring(flat)


def test_series_differ_in_more_than_colour():
    series = [figures.Series(str(i), [(0, i), (1, i + 1)], i) for i in range(4)]
    svg = figures.line_chart("t", series, "x", "y")
    assert len(set(re.findall(r'stroke-dasharray="([^"]*)"', svg))) == 4
    shapes = {re.search(rf"<(\w+) class=\"m s{i}\"", svg).group(1) for i in range(2)}
    assert shapes == {"circle", "rect"}


def test_heatmap_prints_every_share_and_refuses_ragged_rows():
    svg = figures.heatmap("t", ["a", "b"], [[0.25, 0.75], [1.0, 0.0]], "expert", 1.0)
    ElementTree.fromstring(svg)
    assert re.findall(r'class="c [io]"[^>]*>(\d+)<', svg) == ["25", "75", "100", "0"]
    shades = numbers(svg, r'fill-opacity="([\d.]+)"')
    assert sorted(shades) == [shades[3], shades[0], shades[1], shades[2]]
    with pytest.raises(ValueError, match="2 labels"):
        figures.heatmap("t", ["a", "b"], [[1.0], [0.5, 0.5]], "expert", 1.0)


def test_text_is_escaped_everywhere():
    evil = '<b onclick="x">&'
    parts = [
        figures.line_chart(evil, [figures.Series(evil, [(0, 1), (1, 2)], 0)], evil, evil),
        figures.heatmap(evil, [evil], [[1.0]], evil, 1.0),
        figures.legend([evil], [0]),
        report.table((evil, evil), [(evil,), ((evil + "\n" + evil, "total"), (evil, "good"))]),
        report.paragraph(evil),
        report.heading(evil),
        report.bullets([evil]),
        report.cards([(evil, evil)]),
        report.folded(evil, report.code(evil)),
        report.grid([], evil),
    ]
    html = report.page(evil, parts)
    assert "<b onclick" not in html
    assert html.count("&lt;b onclick") >= len(parts)


def test_a_page_refers_to_nothing_outside_itself(tmp_path):
    html = report.page("t", [report.paragraph("p")])
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(", html)
    path = tmp_path / "report.html"
    report.write(path, html)
    assert path.read_text(encoding="utf-8") == html
    assert list(tmp_path.iterdir()) == [path]


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="row of 2 cells in a table of 3"):
        report.table(("a", "b", "c"), [("1", "2")])
