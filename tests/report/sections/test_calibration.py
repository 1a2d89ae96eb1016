from __future__ import annotations

import re

import pytest

from engine.report.plots import Point
from engine.report.sections.calibration import ClassPoint, frequency, reliability


def marks(svg: str) -> list[tuple[float, float]]:
    found = re.findall(r'circle class="(?:mark|dot)[^>]*cx="([\d.-]+)" cy="([\d.-]+)"', svg)
    return [(float(x), float(y)) for x, y in found]


def test_who_is_as_sure_as_right_lies_on_the_dashed_line() -> None:
    bins = [(0.25, 0.25, 0.1), (0.5, 0.5, 0.2), (0.9, 0.9, 0.7)]
    svg = reliability([("real", "neutral", bins)])
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
    points = [ClassPoint(str(n), n, Point(0, 0.8, 0.7, 0.9)) for n in (10, 100, 1000)]
    svg = frequency([("real", "neutral", points)], "F1")
    places = [x for x, _ in marks(svg)]
    assert places[1] - places[0] == pytest.approx(places[2] - places[1], abs=0.2)
    assert "100, real: 100 images, 0.800 (0.700 to 0.900)" in svg


def test_names_of_a_user_are_escaped() -> None:
    name = "<b>&"
    point = ClassPoint(name, 5, Point(0, 0.5, 0.4, 0.6))
    for svg in (
        reliability([(name, "c0", [(0.5, 0.5, 1.0)])]),
        frequency([(name, "c0", [point])], name),
    ):
        assert "<b>" not in svg
        assert "&lt;b&gt;&amp;" in svg
