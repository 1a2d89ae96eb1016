from __future__ import annotations

import re

from engine.report.plots import Line, Point
from engine.report.sections.training import curves


def test_curves_are_drawn_for_each_arm_in_its_colour() -> None:
    lines = [Line(name, [Point(0, 1.0, 0, 0), Point(50, 0.2, 0, 0)], colour)
             for name, colour in (("real", "neutral"), ("more", "c3"))]  # fmt: skip
    svg = curves(lines, "training loss")
    assert re.findall(r'polyline class="line (\w+)"', svg) == ["neutral", "c3"]


def test_names_of_a_user_are_escaped() -> None:
    name = "<b>&"
    svg = curves([Line(name, [Point(1, 1, 1, 1)], "c0")], name)
    assert "<b>" not in svg
    assert "&lt;b&gt;&amp;" in svg
