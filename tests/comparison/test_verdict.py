"""From predictions and scores of arms: figures, the gain of a larger budget, and where more images
add nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn import metrics as reference

from engine.comparison.verdict import Predictions, budget_effect, figures_of, saturations
from engine.results.comparison import ArmResult, SaturationPoint
from engine.wording import verdict_in_words
from tests.results import arm_figure, arm_result

CLASSES = ("a", "b", "c")


def predictions(fits: int = 2, seeds: int = 2, images: int = 60) -> Predictions:
    random = np.random.default_rng(1)
    labels = np.arange(images) % 3
    scores = random.standard_normal((fits * seeds, images, 3)) + 1.5 * np.eye(3)[labels]
    likely = np.exp(scores)
    return Predictions(
        CLASSES, labels, np.arange(images).astype(str),
        {"real": (likely / likely.sum(-1, keepdims=True)).astype(np.float32)}, fits,
    )  # fmt: skip


def test_figures_of_an_arm_are_means_of_its_classifiers_with_intervals() -> None:
    made = predictions()
    tested, held = figures_of(made, "real", "real", 0.0, "baseline"), made.probabilities["real"]
    areas = [reference.roc_auc_score(made.labels, one, multi_class="ovr") for one in held]
    assert tested.figures["roc_auc"].mean == pytest.approx(np.mean(areas))
    assert tested.classifiers["roc_auc"] == pytest.approx(areas)
    # Two classifiers of a fit are one replicate.
    assert tested.figures["roc_auc"].replicates == pytest.approx(np.reshape(areas, (2, 2)).mean(1))
    assert tested.figures["roc_auc"].low < np.mean(areas) < tested.figures["roc_auc"].high
    f1 = [reference.f1_score(made.labels, one.argmax(1), average="weighted") for one in held]
    assert tested.figures["weighted_f1"].mean == pytest.approx(np.mean(f1))
    worst = [reference.recall_score(made.labels, one.argmax(1), average=None).min() for one in held]
    assert tested.figures["worst_class_recall"].mean == pytest.approx(np.mean(worst))
    of_b = [reference.roc_auc_score(made.labels == 1, one[:, 1]) for one in held]
    assert tested.per_class["b"].roc_auc == pytest.approx(np.mean(of_b))


def test_the_reliability_table_is_of_all_classifiers_together() -> None:
    made = predictions()
    tested = figures_of(made, "real", "real", 0.0, "baseline")
    bins, held = tested.reliability, made.probabilities["real"]
    assert sum(one.images for one in bins) == held.shape[0] * held.shape[1]
    right = sum(one.images * one.accuracy for one in bins)
    assert right / (4 * 60) == pytest.approx(tested.figures["accuracy"].mean)


def test_who_names_a_class_alone_gets_no_figure_of_probabilities() -> None:
    made = predictions()
    hard = np.eye(3, dtype=np.float32)[made.probabilities["real"].argmax(-1)]
    named = Predictions(CLASSES, made.labels, made.groups, {"real": hard}, 2)
    tested = figures_of(named, "real", "real", 0.0, "baseline")
    assert "brier" not in tested.figures
    assert tested.per_class["a"].roc_auc is None
    assert tested.reliability == []
    assert "macro_f1" in tested.figures


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
