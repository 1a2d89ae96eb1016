from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from engine.comparison.verdict import Predictions, figures_of

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
