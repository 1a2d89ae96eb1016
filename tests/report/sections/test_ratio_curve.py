from __future__ import annotations

import re

import pytest

from engine.comparison.arms import Arm
from engine.report.plots import WIDTH, Line, Point
from engine.report.sections.ratio_curve import Level, Saturation, plot, ratio_curve, saturations_of
from engine.results.comparison import SaturationPoint
from tests.pages import plain_text
from tests.results import evaluate_result, interval, search_spec, study_results, trained

START = Point(0.0, 0.5, 0.45, 0.55)


def test_points_lie_where_their_values_say() -> None:
    points = [Point(x, y, y - 0.05, y + 0.05) for x, y in ((0, 0.5), (1, 0.7), (2, 0.6))]
    levels = [Level("b", 0.55, "c1")]
    svg = plot([Line("a", points[1:], "c0")], levels, points[0], "macro f1")
    found = sorted(
        (float(x), float(y)) for x, y in re.findall(r'circle[^>]*cx="([\d.]+)" cy="([\d.]+)"', svg)
    )
    assert len(found) == 3
    heights = [y for _, y in found]
    assert heights[1] < heights[2] < heights[0]  # SVG counts downwards
    assert all(0 <= x <= WIDTH and 0 <= y <= 320 for x, y in found)


def test_a_saturation_is_a_named_band_whose_point_leads_to_the_curve() -> None:
    points = [Point(x, y, y - 0.05, y + 0.05) for x, y in ((1, 0.7), (2, 0.72), (4, 0.71))]
    lines = [Line("a_b", points, "c0"), Line("c", points, "c1")]
    held = Saturation("a_b", SaturationPoint(ratio=1, low=0, high=2), 4)
    svg = plot(lines, [], START, "macro F1", [held])
    assert svg.count('<g class="saturation') == 1
    (kind, group) = re.findall(r'<g class="saturation (\w+)">(.*?)</g>', svg)[0]
    assert kind == "c0"
    assert "a_b: saturation at x1 (0 to 2)" in group
    assert ">a b<" in svg  # its name stands there, so that no colour is needed
    dot = r'<circle class="dot[^>]*cx="([\d.]+)" cy="([\d.]+)"[^>]*><title>([^:]*):'
    dots = {name: (float(x), float(y)) for x, y, name in re.findall(dot, svg)}
    ring = re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)"', group)
    assert tuple(map(float, ring.groups())) == dots["a_b x1"]
    band = re.search(r'<rect x="([\d.]+)".*? width="([\d.]+)"', group)
    left, width = map(float, band.groups())
    assert left == pytest.approx(dots["real x0"][0])
    assert left + width == pytest.approx(dots["a_b x2"][0], abs=0.11)
    # Above the curves, not upon them.
    (row,) = re.findall(r'<rect [^>]*y="([\d.]+)"', group)
    whiskers = re.findall(r'class="whisker[^>]*y2="([\d.]+)"', svg)
    assert float(row) + 10 < min(map(float, whiskers))
    assert "saturation" not in plot(lines, [], START, "macro F1")


def test_names_of_a_user_are_escaped() -> None:
    name = "<b>&"
    lines = [Line(name, [Point(1, 0.5, 0.4, 0.6)], "c0")]
    svg = plot(lines, [Level(name, 0.5, "c1")], START, name)
    assert "<b>" not in svg
    assert "&lt;b&gt;&amp;" in svg


def test_no_saturation_is_claimed_at_the_largest_ratio() -> None:
    arms = [
        Arm(name=f"g {ratio}", family="g", mixes=("m",), ratio=ratio, role="compared")
        for ratio in (0.5, 1.0, 2.0, None)
    ]
    trials = tuple(
        trained(name, ratio=ratio, role=role, fit=fit, stage="search", macro_f1=0.5 + 0.1 * ratio)
        for name, ratio, role in (("real", 0.0, "baseline"), ("g 0.5", 0.5, "compared"),
                                  ("g 1", 1.0, "compared"), ("g 2", 2.0, "compared"))
        for fit in range(2)
    )  # fmt: skip

    def curve(ratio: float, low: float, high: float, seeds: int = 5) -> tuple[str, list[bool]]:
        results = study_results(
            trials=trials, search_spec=search_spec(*arms, seeds=seeds),
            evaluate=evaluate_result(
                saturation={"g": SaturationPoint(ratio=ratio, low=low, high=high)},
                val={item.trial.arm.name: interval(0.5, 0.4, 0.6) for item in trials},
            ),
        )  # fmt: skip
        seen = [saturation.seen for saturation in saturations_of(results)]
        return plain_text(ratio_curve(results).html), seen

    text, seen = curve(0.5, 0.0, 1.0)
    assert seen == [True]
    assert "beyond a ratio of 0.5 (95% interval: 0 to 1), more images" in text
    assert "A diamond above the curves" in text
    for point in ((2.0, 1.0, 2.0), (1.0, 0.5, 2.0)):
        text, seen = curve(*point)
        assert seen == [False]
        assert "no saturation was seen up to x2" in text
        assert "more images add" not in text
        assert "diamond" not in text
    text, seen = curve(0.5, 0.0, 1.0, seeds=4)
    assert seen == []
    assert "too few replicates (4, minimum 5)" in text
    text, _ = curve(0.0, 0.0, 0.5)
    assert "g: no ratio adds more than 1 point to real images alone" in text
