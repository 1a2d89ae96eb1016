from __future__ import annotations

from dataclasses import replace

from engine.comparison.arms import Arm
from engine.report.sections.arms import arms, figures
from tests.pages import plain_text
from tests.results import (
    arm_figure,
    arm_result,
    evaluate_result,
    search_result,
    search_spec,
    study_results,
    trained,
    val_mean,
)


def test_the_page_s_intervals_end_where_figures_do() -> None:
    figure = arm_figure(0.99, low=-0.1, high=1.4)
    tested = {"real": arm_result({"accuracy": figure, "brier": figure}), "x": arm_result()}
    text = plain_text(figures(study_results(evaluate=evaluate_result(arms=tested))).html)
    text = text.replace("\u2013", " to ")
    assert "arm accuracy Brier score ↓ real 0.990 0.000 to 1.000 0.990 0.000 to 1.400 x On" in text


def test_weighted_precision_stands_among_the_figures() -> None:
    tested = {"real": arm_result({"weighted_precision": arm_figure(0.5)})}
    text = plain_text(figures(study_results(evaluate=evaluate_result(arms=tested))).html)
    assert "arm weighted precision real" in text


def test_images_added_are_those_of_generators_whatever_real_ones_are_left() -> None:
    added = {"real": 0, "reduced": 0, "g only": 40}
    results = study_results(
        trials=tuple(replace(trained(name), added=count) for name, count in added.items()),
        search=search_result(arms={name: val_mean(0.5) for name in added}),
    )
    assert {row.arm: row.added for row in results.table} == added


def test_what_only_means_is_told_of_the_arm_that_is_called_so() -> None:
    def text_of(arm: Arm) -> str:
        return plain_text(arms(study_results(search_spec=search_spec(arm))).html)

    only = Arm(name="g only", family="g", mixes=("m",), ratio=None, role="shown",
               generators=("g",))  # fmt: skip
    assert "classification accuracy score" in text_of(only)
    assert "“unfiltered” adds" not in text_of(only)
    # The twin of an arm whose amount is no ratio is another thing.
    twin = text_of(only.model_copy(update={"twin_of": "g to 200"}))
    assert "“unfiltered” adds" in twin
    assert "classification accuracy score" not in twin
