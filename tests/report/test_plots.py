from __future__ import annotations

import re
from typing import Any

import pytest

from engine.core.notice import Notice
from engine.report import plots
from engine.report.table import as_text, comparison, stars
from tests.results import (
    NOTHING,
    arm_figure,
    arm_result,
    contrast,
    evaluate_result,
    search_result,
    val_mean,
)


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


START = plots.Point(0.0, 0.5, 0.45, 0.55)


def test_points_lie_where_their_values_say() -> None:
    points = [plots.Point(x, y, y - 0.05, y + 0.05) for x, y in ((0, 0.5), (1, 0.7), (2, 0.6))]
    levels = [plots.Level("b", 0.55, 1)]
    svg = plots.ratio_curve([plots.Line("a", points[1:], 0)], levels, points[0], "macro f1")
    found = sorted(
        (float(x), float(y)) for x, y in re.findall(r'circle[^>]*cx="([\d.]+)" cy="([\d.]+)"', svg)
    )
    assert len(found) == 3
    heights = [y for _, y in found]
    assert heights[1] < heights[2] < heights[0]  # SVG counts downwards
    assert all(0 <= x <= plots.WIDTH and 0 <= y <= plots.HEIGHT for x, y in found)


def test_names_of_a_user_are_escaped_everywhere() -> None:
    name = "<b>&"
    points = [plots.Point(1, 0.5, 0.4, 0.6)]
    drawn = [
        plots.ratio_curve([plots.Line(name, points, 0)], [plots.Level(name, 0.5, 1)], START, name),
        plots.recall_by_class(
            [plots.Gain(name, [0.5, 0.6], (0.1, 0.0, 0.2), (0.1, 0.0, 0.2))], [name, name], [0, 1]
        ),
    ]
    for svg in drawn:
        assert "<b>" not in svg
        assert "&lt;b&gt;&amp;" in svg


def test_a_gain_beyond_chance_is_marked_and_none_is_not() -> None:
    gains = [
        plots.Gain("up", [0.5, 0.6], (0.1, 0.05, 0.15), (0.0, -0.1, 0.1)),
        plots.Gain("down", [0.5, 0.4], (-0.1, -0.2, -0.05), (-0.0, -0.1, 0.1)),
        plots.Gain("same", [0.5, 0.5], (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ]  # fmt: skip
    svg = plots.recall_by_class(gains, ["a", "b"], [0, 1])
    assert svg.count('class="good"') == svg.count('class="bad"') == 1
    assert "+10.0 (+5 to +15)" in svg
    close = plots.Gain("close", [0.5, 0.6], (0.002, 0.001, 0.003), (0.0, -0.1, 0.1))
    assert "+0.2 (+0.1 to +0.3)" in plots.recall_by_class([close], ["a", "b"], [0, 1])
    # Red beside "(-3 to 0)" would be a riddle.
    just = plots.Gain("just", [0.5, 0.4], (-0.02, -0.034, -0.003), (0.0, -0.1, 0.002))
    svg = plots.recall_by_class([just], ["a", "b"], [0, 1])
    assert "-2.0 (-3.4 to -0.3)" in svg
    assert "0.0 (-10 to 0)" in svg
    svg = plots.recall_by_class(gains, ["a", "b"], [0, 1], "class_weighted")
    assert re.findall(r">(to [^<]*)<", svg) == ["to class weighted", "to real"]
    # Equal differences everywhere, and intervals of few replicates, say nothing.
    always = plots.Gain("always", [0.5, 0.6], (0.1, 0.1, 0.1), (0.1, 0.1, 0.1))
    assert 'class="good"' not in plots.recall_by_class([always], ["a", "b"], [0, 1])
    few = plots.recall_by_class(gains, ["a", "b"], [0, 1], enough=False)
    assert 'class="good"' not in few
    assert 'class="bad"' not in few


def test_a_saturation_is_a_named_band_whose_point_leads_to_the_curve() -> None:
    points = [plots.Point(x, y, y - 0.05, y + 0.05) for x, y in ((1, 0.7), (2, 0.72), (4, 0.71))]
    lines = [plots.Line("a_b", points, 0), plots.Line("c", points, 1)]
    held = plots.Saturation("a_b", 1, 0, 2)
    svg = plots.ratio_curve(lines, [], START, "macro F1", [held])
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
    assert "saturation" not in plots.ratio_curve(lines, [], START, "macro F1")


def test_held_against_real_images_a_gain_stands_there_once() -> None:
    gain = plots.Gain("up", [0.5, 0.6], (0.1, 0.05, 0.15), (0.1, 0.05, 0.15))
    svg = plots.recall_by_class([gain], ["real", "g"], ["neutral", 1], "real")
    assert re.findall(r">(to [^<]*)<", svg) == ["to real"]
    assert svg.count("+10.0 (+5 to +15)") == 1


def test_a_gain_without_spread_says_so() -> None:
    gain = plots.Gain("always", [0.5, 0.6], (0.1, 0.1, 0.1), (0.0, 0.0, 0.0))
    svg = plots.recall_by_class([gain], ["a", "b"], [0, 1])
    assert "+10.0 (no spread)" in svg
    assert ">0<" in svg


def test_a_join_runs_from_the_least_to_the_most() -> None:
    gain = plots.Gain("a", [0.0, 1.0], (1.0, 0.9, 1.1), (1.0, 0.9, 1.1))
    svg = plots.recall_by_class([gain], ["x", "y"], [0, 1])
    ((low, high),) = re.findall(r'class="join" x1="([\d.]+)" x2="([\d.]+)"', svg)
    # As text, 470 would come before 56.
    assert float(low) < float(high)


def test_the_table_says_closed_arms_by_leaving_them_empty() -> None:
    added = {"real": 0, "g x1": 5, "g x2": 10}
    means = {"real": 0.8, "g x1": 0.9, "g x2": 0.7}
    search = search_result(
        objective="accuracy", arms={name: val_mean(mean) for name, mean in means.items()}
    )
    opened = {
        name: arm_result(
            {"accuracy": arm_figure(mean - 0.01, mean + 0.01, low=mean - 0.1, high=mean + 0.1)},
            ratio=ratio, role="compared" if ratio else "baseline",
        )
        for name, mean, ratio in (("real", 0.75, 0.0), ("g x1", 0.95, 1.0))
    }  # fmt: skip
    effect = NOTHING.model_copy(update={"estimate": 0.2})
    one = contrast(low=0.1, high=0.3, p_adjusted=0.004, effect=effect, bootstrap=effect)
    evaluate = evaluate_result(arms=opened, contrasts=[one])
    table = comparison(added, search, evaluate)
    assert [row.added for row in table] == [0, 5, 10]
    assert [row.test for row in table] == [pytest.approx(0.75), pytest.approx(0.95), None]
    assert table[1].high == 1.0  # no share is larger
    assert [row.mark for row in table] == ["baseline", "compared", ""]
    assert [row.stars for row in table] == ["", "**", ""]
    assert (table[1].against_low, table[1].against_high) == (0.1, 0.3)
    assert table[2].against_low is None
    text = as_text(table, "accuracy")
    assert "+20.0" in text
    assert len({len(line) for line in text.splitlines()[:2]}) <= 2


def test_replicates_that_are_alike_have_no_spread_in_the_table() -> None:
    figures = {"accuracy": arm_figure(0.9, 0.9, low=0.9, high=0.9)}
    opened = {"real": arm_result(figures),
              "g only": arm_result(figures, ratio=None, role="shown")}  # fmt: skip
    search = search_result(objective="accuracy", arms={name: val_mean(0.9, 0.0) for name in opened})
    evaluate = evaluate_result(arms=opened)
    table = comparison({"real": 0, "g only": 40}, search, evaluate)
    assert [row.mark for row in table] == ["baseline", "no real images"]
    text = as_text(table, "accuracy")
    assert text.count("no spread") == 2
    assert "0.900 to 0.900" not in text


@pytest.mark.parametrize(
    ("p", "more", "want"),
    [
        (0.06, {}, ""), (0.04, {}, "*"), (0.009, {}, "**"), (0.0005, {}, "***"),
        (0.0005, {"obstacle": Notice.of("few_replicates", replicates=2, minimum=5)}, ""),
        (0.0005, {"bootstrap": NOTHING.model_copy(update={"estimate": -0.1})}, ""),
    ],
)  # fmt: skip
def test_stars_stand_for_an_adjusted_p_alone(p: float, more: dict[str, Any], want: str) -> None:
    effect = NOTHING.model_copy(update={"estimate": 0.1})
    assert stars(contrast(p_adjusted=p, **{"effect": effect, "bootstrap": effect, **more})) == want
