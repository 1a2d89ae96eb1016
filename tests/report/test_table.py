from __future__ import annotations

from typing import Any

import pytest

from engine.report.table import as_text, comparison, stars
from engine.results.comparison import Effect
from tests.results import (
    NOTHING,
    arm_figure,
    arm_result,
    confirm_result,
    contrast,
    evaluate_result,
    search_result,
    val_mean,
)


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
    effect = effect.model_copy(update={"low": 0.1, "high": 0.3})
    one = contrast(word="helps", generator_fits=5, low=0.1, high=0.3, p_helps=0.002, effect=effect,
                   bootstrap=effect)  # fmt: skip
    evaluate = evaluate_result(arms=opened, contrasts=[one])
    table = comparison(added, search, confirm_result(), evaluate)
    assert [row.added for row in table] == [0, 5, 10]
    assert [row.test for row in table] == [pytest.approx(0.75), pytest.approx(0.95), None]
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
    none = Effect(estimate=0.0, low=0.0, high=0.0)
    evaluate = evaluate_result(arms=opened, to_baseline={"g only": none})
    table = comparison({"real": 0, "g only": 40}, search, confirm_result(), evaluate)
    assert [row.mark for row in table] == ["baseline", "no real images"]
    text = as_text(table, "accuracy")
    assert text.count("no spread") == 2
    assert "0.900 to 0.900" not in text


@pytest.mark.parametrize(
    ("p", "more", "want"),
    [
        (0.02, {}, "*"), (0.004, {}, "**"), (0.0004, {}, "***"),
        (0.0004, {"word": "undecided"}, ""), (0.0004, {"word": "equivalent"}, ""),
        # Another training of the generator may give another result.
        (0.0004, {"generator_fits": 1}, ""),
    ],
)  # fmt: skip
def test_stars_stand_for_an_adjusted_p_of_a_verdict(
    p: float, more: dict[str, Any], want: str
) -> None:
    assert stars(contrast(**{"word": "helps", "p_helps": p, "generator_fits": 5, **more})) == want
