"""From the scores of arms: the gain of a larger budget, and where more images add nothing."""

from __future__ import annotations

from typing import Any

from engine.comparison.verdict import budget_effect, saturations
from engine.results.comparison import ArmResult, SaturationPoint
from engine.wording import verdict_in_words
from tests.results import arm_figure, arm_result


def test_limiting_budget_is_reported() -> None:
    def arms(real: list[float], double: list[float]) -> dict[str, ArmResult]:
        return {
            "real": arm_result({"macro_f1": arm_figure(*real)}),
            "real_double": arm_result({"macro_f1": arm_figure(*double)}),
        }

    short = budget_effect(arms([0.5, 0.52, 0.51], [0.6, 0.61, 0.62]), "macro_f1")
    assert short.low > 0
    assert "raise training.steps" in verdict_in_words([], "macro_f1", "real", short)
    enough = budget_effect(arms([0.5, 0.52, 0.51], [0.51, 0.5, 0.52]), "macro_f1")
    assert enough.low < 0 < enough.high
    assert "Warning" not in verdict_in_words([], "macro_f1", "real", enough)
    assert budget_effect({"real": arm_result()}, "macro_f1") is None


def test_saturation_uses_the_replicates_of_each_family() -> None:
    def trial(family: str, ratio: float, value: float, role: str = "compared") -> dict[str, Any]:
        return {"family": family, "ratio": ratio, "role": role, "macro_f1": value}

    trials = [trial("real", 0.0, value, "baseline") for value in (0.5, 0.52)]
    for ratio, value in ((1.0, 0.7), (2.0, 0.705)):
        trials += [trial("g", ratio, value + shift) for shift in (0, 0.02)]
    trials += [trial("g unfiltered", 1.0, 0.9, "shown")]
    found = saturations(trials, "macro_f1", 1, 0.01)
    assert found == {"g": SaturationPoint(ratio=1.0, low=1.0, high=1.0)}
    assert saturations(trials, "macro_f1", 2, 0.001)["g"].ratio == 2.0
