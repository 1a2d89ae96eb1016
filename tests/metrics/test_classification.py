from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from engine.metrics.classification import (
    METRICS,
    balanced_accuracy,
    confusion,
    f1,
    macro_f1,
    precision,
    recall,
    summary,
    worst_class_recall,
)


def some(classes: int = 4, images: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.choice(classes, images, p=[0.6, 0.25, 0.1, 0.05])
    wrong = random.random(images) < 0.4
    return labels, np.where(wrong, random.integers(0, classes, images), labels)


def test_all_metrics_equal_scikit_learn() -> None:
    labels, predicted = some()
    matrix = confusion(labels, predicted, 4)
    assert matrix.tolist() == reference.confusion_matrix(labels, predicted).tolist()
    want = reference.precision_recall_fscore_support(labels, predicted)
    for found, expected in zip((precision, recall, f1), want, strict=False):
        assert found(matrix) == pytest.approx(expected)
    expected = {
        "accuracy": reference.accuracy_score(labels, predicted),
        "balanced_accuracy": reference.balanced_accuracy_score(labels, predicted),
        "macro_precision": reference.precision_score(labels, predicted, average="macro"),
        "macro_recall": reference.recall_score(labels, predicted, average="macro"),
        "macro_f1": reference.f1_score(labels, predicted, average="macro"),
        "weighted_precision": reference.precision_score(labels, predicted, average="weighted"),
        "weighted_f1": reference.f1_score(labels, predicted, average="weighted"),
        "worst_class_recall": reference.recall_score(labels, predicted, average=None).min(),
    }
    assert {name: float(metric(matrix)) for name, metric in METRICS.items()} == pytest.approx(
        expected
    )


def test_class_without_images_scores_zero_and_is_not_part_of_balanced_accuracy() -> None:
    matrix = np.array([[3, 1, 0], [1, 3, 0], [0, 0, 0]])
    assert worst_class_recall(matrix) == pytest.approx(0.75)
    assert worst_class_recall(np.zeros((2, 2))) == 0
    assert f1(matrix).tolist() == [0.75, 0.75, 0.0]
    assert macro_f1(matrix) == pytest.approx(0.5)
    assert balanced_accuracy(matrix) == pytest.approx(0.75)


def test_many_matrices_are_scored_at_once() -> None:
    matrices = np.stack([confusion(*some(seed=seed), 4) for seed in range(6)]).reshape(2, 3, 4, 4)
    for metric in METRICS.values():
        found = metric(matrices)
        assert found.shape == (2, 3)
        assert found[1, 2] == pytest.approx(metric(matrices[1, 2]))


def test_summary_has_plain_numbers_for_each_class() -> None:
    labels, predicted = some()
    found = summary(confusion(labels, predicted, 4), ["a", "b", "c", "d"])
    assert found["per_class"]["a"]["images"] == int((labels == 0).sum())
    assert type(found["per_class"]["d"]["recall"]) is float
    assert sum(map(sum, found["confusion"])) == 300
