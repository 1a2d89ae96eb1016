from __future__ import annotations

import re

from engine.report.plots import WIDTH
from engine.report.sections.classes import (
    ClassRow,
    RecallRow,
    class_changes,
    forest,
    recalls_of,
)
from engine.report.sections.verdict import verdict
from tests.pages import plain_text
from tests.results import (
    arm_figure,
    arm_result,
    contrast,
    evaluate_result,
    interval,
    study_results,
)

ARMS = [("a", "c0"), ("b", "c1")]


def marks(svg: str) -> list[tuple[float, float]]:
    found = re.findall(r'circle class="(?:mark|dot)[^>]*cx="([\d.-]+)" cy="([\d.-]+)"', svg)
    return [(float(x), float(y)) for x, y in found]


def test_a_gain_stands_on_its_side_of_the_line_within_its_interval() -> None:
    rows = [
        ClassRow("up", [(0.05, 0.02, 0.08)]),
        ClassRow("down", [(-0.03, -0.06, 0.0)]),
        ClassRow("all", [(0.01, -0.01, 0.03)], whole=True),
    ]
    svg = forest(rows, ["to real"])
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
        ClassRow("always", [(0.05, 0.05, 0.05)]),
        ClassRow("up", [(0.05, 0.02, 0.08)]),
        ClassRow("all", [(0.05, 0.02, 0.08)], whole=True),
    ]
    assert forest(rows, ["to real"]).count('class="mark s0 grey"') == 1
    assert "+5.0 (no spread)" in forest(rows, ["to real"])
    assert forest(rows, ["to real"], enough=False).count('class="mark s0 grey"') == 2


def test_an_interval_beyond_the_chart_ends_in_an_arrow_and_says_its_figures() -> None:
    wide = forest([ClassRow("a", [(0.01, -0.6, 0.62)])], ["to real"])
    assert wide.count('class="tip') == 2
    assert "(-60.0 to +62.0)" in wide
    ends = [float(x) for x in re.findall(r'x[12]="([\d.]+)"', wide)]
    assert max(ends) <= WIDTH
    assert 'class="tip' not in forest([ClassRow("a", [(0.0, -0.1, 0.1)])], ["b"])


def test_a_gain_beyond_chance_is_marked_and_none_is_not() -> None:
    gains = [
        RecallRow("up", [0.5, 0.6], (0.1, 0.05, 0.15), (0.0, -0.1, 0.1)),
        RecallRow("down", [0.5, 0.4], (-0.1, -0.2, -0.05), (-0.0, -0.1, 0.1)),
        RecallRow("same", [0.5, 0.5], (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)),
    ]  # fmt: skip
    svg = recalls_of(gains, ARMS)
    assert svg.count('class="good"') == svg.count('class="bad"') == 1
    assert "+10.0 (+5 to +15)" in svg
    close = RecallRow("close", [0.5, 0.6], (0.002, 0.001, 0.003), (0.0, -0.1, 0.1))
    assert "+0.2 (+0.1 to +0.3)" in recalls_of([close], ARMS)
    # Red beside "(-3 to 0)" would be a riddle.
    just = RecallRow("just", [0.5, 0.4], (-0.02, -0.034, -0.003), (0.0, -0.1, 0.002))
    svg = recalls_of([just], ARMS)
    assert "-2.0 (-3.4 to -0.3)" in svg
    assert "0.0 (-10 to 0)" in svg
    svg = recalls_of(gains, ARMS, "class_weighted")
    assert re.findall(r">(to [^<]*)<", svg) == ["to class weighted", "to real"]
    # Equal differences everywhere, and intervals of few replicates, say nothing.
    always = RecallRow("always", [0.5, 0.6], (0.1, 0.1, 0.1), (0.1, 0.1, 0.1))
    assert 'class="good"' not in recalls_of([always], ARMS)
    few = recalls_of(gains, ARMS, enough=False)
    assert 'class="good"' not in few
    assert 'class="bad"' not in few


def test_held_against_real_images_a_gain_stands_there_once() -> None:
    gain = RecallRow("up", [0.5, 0.6], (0.1, 0.05, 0.15), (0.1, 0.05, 0.15))
    svg = recalls_of([gain], [("real", "neutral"), ("g", "c1")], "real")
    assert re.findall(r">(to [^<]*)<", svg) == ["to real"]
    assert svg.count("+10.0 (+5 to +15)") == 1


def test_a_gain_without_spread_says_so() -> None:
    gain = RecallRow("always", [0.5, 0.6], (0.1, 0.1, 0.1), (0.0, 0.0, 0.0))
    svg = recalls_of([gain], ARMS)
    assert "+10.0 (no spread)" in svg
    assert ">0<" in svg


def test_a_join_runs_from_the_least_to_the_most() -> None:
    gain = RecallRow("a", [0.0, 1.0], (1.0, 0.9, 1.1), (1.0, 0.9, 1.1))
    svg = recalls_of([gain], ARMS)
    ((low, high),) = re.findall(r'class="join" x1="([\d.]+)" x2="([\d.]+)"', svg)
    # As text, 470 would come before 56.
    assert float(low) < float(high)


def test_names_of_a_user_are_escaped() -> None:
    name = "<b>&"
    gain = (0.1, 0.0, 0.2)
    for svg in (
        forest([ClassRow(name, [gain])], [name]),
        recalls_of([RecallRow(name, [0.5, 0.6], gain, gain)], [(name, "c0"), (name, "c1")]),
    ):
        assert "<b>" not in svg
        assert "&lt;b&gt;&amp;" in svg


def test_classes_that_gain_and_lose_are_told_where_replicates_are_enough() -> None:
    gains = [(0.1, 0.05, 0.15), (-0.1, -0.2, -0.05), (0.1, 0.1, 0.1), (0.0, -0.1, 0.1)]
    arms = {
        name: arm_result({"macro_f1": arm_figure(0.5)}, family="g") for name in ("real", "g x1")
    }
    # In alphabetical order, as classes are.
    names = ("a up", "b down", "c always", "d same")
    for replicates, gained, lost in ((5, ["a up"], ["b down"]), (4, [], [])):
        pair = contrast(recall_gain=[interval(*gain) for gain in gains], replicates=replicates)
        results = study_results(
            classes=names, generators={"g": ()},
            evaluate=evaluate_result(arms=arms, contrasts=[pair]),
        )  # fmt: skip
        (change,) = class_changes(results)
        assert (change.gained, change.lost) == (gained, lost)
        text = plain_text(verdict(results).html)
        said = "Recall of classes: a up gains; b down loses (descriptive, not corrected"
        assert (said in text) == bool(gained)
        assert ("Recall of classes" in text) == bool(gained)
