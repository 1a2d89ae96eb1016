from __future__ import annotations

import re

import pytest

from engine.report import charts
from engine.report.plots import WIDTH, Line, Point


def marks(svg: str) -> list[tuple[float, float]]:
    found = re.findall(r'circle class="(?:mark|dot)[^>]*cx="([\d.-]+)" cy="([\d.-]+)"', svg)
    return [(float(x), float(y)) for x, y in found]


def test_a_gain_stands_on_its_side_of_the_line_within_its_interval() -> None:
    rows = [
        charts.ForestRow("up", [(0.05, 0.02, 0.08)]),
        charts.ForestRow("down", [(-0.03, -0.06, 0.0)]),
        charts.ForestRow("all", [(0.01, -0.01, 0.03)], whole=True),
    ]
    svg = charts.forest(rows, ["to real"])
    (zero,) = re.findall(r'class="zero" x1="([\d.]+)"', svg)
    whiskers = [tuple(map(float, ends)) for ends in
                re.findall(r'whisker s0" x1="([\d.]+)" x2="([\d.]+)"', svg)]  # fmt: skip
    (up, _), (down, _) = marks(svg)
    assert up > float(zero) > down
    assert whiskers[0][0] > float(zero)  # the whole interval is a gain
    assert whiskers[1][1] == float(zero)
    assert all(low < x < high for x, (low, high) in zip((up, down), whiskers, strict=False))
    assert svg.count('<path class="mark') == 1  # the diamond
    assert "+5.0 (+2.0 to +8.0)" in svg


def test_what_has_no_spread_or_few_replicates_is_grey() -> None:
    rows = [
        charts.ForestRow("always", [(0.05, 0.05, 0.05)]),
        charts.ForestRow("up", [(0.05, 0.02, 0.08)]),
        charts.ForestRow("all", [(0.05, 0.02, 0.08)], whole=True),
    ]
    assert charts.forest(rows, ["to real"]).count('class="mark s0 grey"') == 1
    assert "+5.0 (no spread)" in charts.forest(rows, ["to real"])
    assert charts.forest(rows, ["to real"], enough=False).count('class="mark s0 grey"') == 2


def test_an_interval_beyond_the_chart_ends_in_an_arrow_and_says_its_figures() -> None:
    wide = charts.forest([charts.ForestRow("a", [(0.01, -0.6, 0.62)])], ["to real"])
    assert wide.count('class="tip') == 2
    assert "(-60.0 to +62.0)" in wide
    ends = [float(x) for x in re.findall(r'x[12]="([\d.]+)"', wide)]
    assert max(ends) <= WIDTH
    assert 'class="tip' not in charts.forest([charts.ForestRow("a", [(0.0, -0.1, 0.1)])], ["b"])


def test_who_is_as_sure_as_right_lies_on_the_dashed_line() -> None:
    bins = [(0.25, 0.25, 0.1), (0.5, 0.5, 0.2), (0.9, 0.9, 0.7)]
    svg = charts.reliability([charts.Bins("real", bins, "neutral")])
    (x1, x2, y1, y2) = map(
        float,
        re.search(r'zero" x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)" y2="([\d.]+)"', svg).groups(),
    )
    for x, y in marks(svg):
        assert (y - y1) / (y2 - y1) == pytest.approx((x - x1) / (x2 - x1), abs=0.01)
    sizes = [float(r) for r in re.findall(r' r="([\d.]+)"', svg)]
    assert sizes == sorted(sizes)
    assert "confidence 0.90, accuracy 0.90, 70.0% of images" in svg


def test_a_class_with_more_images_lies_to_the_right_as_its_logarithm_says() -> None:
    points = [charts.ClassPoint(str(n), n, Point(0, 0.8, 0.7, 0.9)) for n in (10, 100, 1000)]
    svg = charts.frequency([("real", "neutral", points)], "F1")
    places = [x for x, _ in marks(svg)]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    assert "100, real: 100 images, 0.800 (0.700 to 0.900)" in svg


def test_curves_are_drawn_for_each_arm_in_its_colour() -> None:
    lines = [Line(name, [Point(0, 1.0, 0, 0), Point(50, 0.2, 0, 0)], colour)
             for name, colour in (("real", "neutral"), ("more", 3))]  # fmt: skip
    svg = charts.curves(lines, "training loss")
    assert re.findall(r'polyline class="line (\w+)"', svg) == ["neutral", "c3"]


def test_names_of_a_user_are_escaped_in_every_chart() -> None:
    name = "<b>&"
    point = charts.ClassPoint(name, 5, Point(0, 0.5, 0.4, 0.6))
    for svg in (
        charts.forest([charts.ForestRow(name, [(0.1, 0.0, 0.2)])], [name]),
        charts.reliability([charts.Bins(name, [(0.5, 0.5, 1.0)], 0)]),
        charts.frequency([(name, 0, [point])], name),
        charts.curves([Line(name, [Point(1, 1, 1, 1)], 0)], name),
    ):
        assert "<b>" not in svg
        assert "&lt;b&gt;&amp;" in svg
