"""Figures of a classifier that are functions of its confusion matrix (those of its probabilities
are in `engine.metrics.probabilities`).

A confusion matrix counts images: rows are true classes, columns are predicted ones. Leading axes
are allowed everywhere, so that thousands of resampled matrices are scored at once. A class without
a true or predicted image scores 0 where its figure has no value, as scikit-learn with
`zero_division=0`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Metric = Callable[[np.ndarray], np.ndarray]


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts int64 (classes, classes) of class numbers `labels` and `predicted`."""
    cells = np.asarray(labels) * classes + np.asarray(predicted)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


def accuracy(matrix: np.ndarray) -> np.ndarray:
    """Share of images on the diagonal."""
    return _ratio(np.trace(matrix, axis1=-2, axis2=-1), matrix.sum((-2, -1)))


def precision(matrix: np.ndarray) -> np.ndarray:
    """Of the images called a class, the share that is: (…, classes)."""
    return _ratio(_diagonal(matrix), matrix.sum(-2))


def recall(matrix: np.ndarray) -> np.ndarray:
    """Of the images of a class, the share that is called so: (…, classes)."""
    return _ratio(_diagonal(matrix), matrix.sum(-1))


def f1(matrix: np.ndarray) -> np.ndarray:
    """Harmonic mean of precision and recall: (…, classes)."""
    return _ratio(2 * _diagonal(matrix), matrix.sum(-1) + matrix.sum(-2))


def macro_f1(matrix: np.ndarray) -> np.ndarray:
    """Mean of `f1` over the classes, every class alike."""
    return f1(matrix).mean(-1)


def balanced_accuracy(matrix: np.ndarray) -> np.ndarray:
    """Mean of `recall` over the classes that occur."""
    present = matrix.sum(-1) > 0
    return _ratio((recall(matrix) * present).sum(-1), present.sum(-1))


def macro_precision(matrix: np.ndarray) -> np.ndarray:
    """Mean of `precision` over the classes, every class alike."""
    return precision(matrix).mean(-1)


def macro_recall(matrix: np.ndarray) -> np.ndarray:
    """Mean of `recall` over the classes, every class alike."""
    return recall(matrix).mean(-1)


def weighted_precision(matrix: np.ndarray) -> np.ndarray:
    """Mean of `precision`, each class weighing as many images as it has. (Of recall, that is
    accuracy.)"""
    return _weighted(precision(matrix), matrix)


def weighted_f1(matrix: np.ndarray) -> np.ndarray:
    """Mean of `f1`, each class weighing as many images as it has."""
    return _weighted(f1(matrix), matrix)


def worst_class_recall(matrix: np.ndarray) -> np.ndarray:
    """The least `recall` among the classes that occur."""
    present = matrix.sum(-1) > 0
    least = np.where(present, recall(matrix), np.inf).min(-1)
    return np.where(present.any(-1), least, 0.0)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy, "balanced_accuracy": balanced_accuracy,
    "macro_precision": macro_precision, "macro_recall": macro_recall, "macro_f1": macro_f1,
    "weighted_precision": weighted_precision, "weighted_f1": weighted_f1,
    "worst_class_recall": worst_class_recall,
}  # fmt: skip


def summary(matrix: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """All figures of one confusion matrix as plain numbers."""
    return {
        **{name: float(metric(matrix)) for name, metric in METRICS.items()},
        "per_class": {
            name: {
                "precision": float(values[0]), "recall": float(values[1]), "f1": float(values[2]),
                "images": int(values[3]),
            }
            for name, *values in zip(
                classes, precision(matrix), recall(matrix), f1(matrix), matrix.sum(-1), strict=True
            )
        },
        "confusion": matrix.tolist(),
    }  # fmt: skip


def _diagonal(matrix: np.ndarray) -> np.ndarray:
    return np.diagonal(matrix, axis1=-2, axis2=-1)


def _weighted(figure: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    images = matrix.sum(-1)
    return _ratio((figure * images).sum(-1), images.sum(-1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.shape(whole)), where=np.asarray(whole) > 0)
