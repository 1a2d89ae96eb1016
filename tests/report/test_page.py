from __future__ import annotations

import pytest

from engine.report import page
from engine.report.page import CONTENTS, figure_interval, with_contents


def test_an_interval_of_replicates_that_are_alike_is_none() -> None:
    assert page.interval(0.9, 0.95) == "0.900 to 0.950"
    assert page.points_interval(-0.01, 0.02) == "-1.0 to +2.0"
    for found in (page.interval(0.9, 0.9), page.points_interval(0.0, 1e-15)):
        assert found == "no spread"


@pytest.mark.parametrize(
    ("p", "want"), [(0.0, "p < 0.001"), (0.0009, "p < 0.001"), (0.001, "p = 0.001"),
                    (1.0, "p = 1.000")],
)  # fmt: skip
def test_a_small_p_is_not_nothing(p: float, want: str) -> None:
    assert f"p {page.p_value(p, '= ')}" == want
    assert page.p_value(0.04) == "0.040"


def test_one_point_is_singular() -> None:
    assert [page.in_points(share) for share in (0.01, 0.015, 0.02)] == [
        "1 point", "1.5 points", "2 points"
    ]  # fmt: skip


def test_contents_link_to_every_heading() -> None:
    two = "<h2>Two <span>of it</span></h2><h2>Two</h2>"
    page = with_contents(f"{CONTENTS}<h2>One</h2><p>a</p>{two}")
    assert '<a href="#section-1">One</a> · <a href="#section-2">Two</a>' in page
    assert '<h2 id="section-1">One</h2>' in page
    assert '<h2 id="section-2">Two <span>of it</span></h2>' in page
    assert '<h2 id="section-3">Two</h2>' in page
    assert "#section-3" not in page
    assert CONTENTS not in page


def test_an_interval_of_a_figure_ends_where_the_metric_does() -> None:
    assert figure_interval(-0.02, 1.04, "macro_f1") == "0.000 to 1.000"
    assert figure_interval(0.9, 1.3, "brier") == "0.900 to 1.300"
