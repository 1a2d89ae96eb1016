from __future__ import annotations

import pytest

from engine.report import plots


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0.93, 1.0, [0.94, 0.96, 0.98, 1.0]),
        (0, 37, [0, 10, 20, 30]),
    ],
)
def test_ticks_are_round_numbers_within(low: float, high: float, want: list[float]) -> None:
    assert plots.ticks(low, high) == pytest.approx(want)


def test_an_element_has_rounded_and_escaped_attributes() -> None:
    drawn = plots.element("circle", "<b>", kind="dot c1", cx=1.26, cy=3, text_anchor='"')
    assert drawn == (
        '<circle class="dot c1" cx="1.3" cy="3" text-anchor="&#34;"><title>&lt;b&gt;</title>'
        "</circle>"
    )
    assert plots.element("line", x1=0.0) == '<line x1="0.0"/>'
