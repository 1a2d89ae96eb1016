"""Metrics of a classifier's confusion matrix. (`engine.metrics.probabilities` has those of its
probabilities.)

A confusion matrix counts images: rows are true classes, columns are predicted classes. Leading axes
are allowed everywhere, to score thousands of resampled matrices at once. Undefined values of
classes without true or predicted images are 0, as in scikit-learn with `zero_division=0`.
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
    """Share of the images predicted as a class that belong to it: (…, classes)."""
    return _ratio(_diagonal(matrix), matrix.sum(-2))


def recall(matrix: np.ndarray) -> np.ndarray:
    """Share of the images of a class that are predicted as it: (…, classes)."""
    return _ratio(_diagonal(matrix), matrix.sum(-1))


def f1(matrix: np.ndarray) -> np.ndarray:
    """Harmonic mean of precision and recall: (…, classes)."""
    return _ratio(2 * _diagonal(matrix), matrix.sum(-1) + matrix.sum(-2))


def macro_f1(matrix: np.ndarray) -> np.ndarray:
    """Mean of `f1` over all classes."""
    return np.asarray(f1(matrix).mean(-1))


def balanced_accuracy(matrix: np.ndarray) -> np.ndarray:
    """Mean of `recall` over the classes that occur."""
    present = matrix.sum(-1) > 0
    return _ratio((recall(matrix) * present).sum(-1), present.sum(-1))


def macro_precision(matrix: np.ndarray) -> np.ndarray:
    """Mean of `precision` over all classes."""
    return np.asarray(precision(matrix).mean(-1))


def macro_recall(matrix: np.ndarray) -> np.ndarray:
    """Mean of `recall` over all classes."""
    return np.asarray(recall(matrix).mean(-1))


def weighted_precision(matrix: np.ndarray) -> np.ndarray:
    """Mean of `precision`, weighted by the images of each class. (For recall this is accuracy.)"""
    return _weighted(precision(matrix), matrix)


def weighted_f1(matrix: np.ndarray) -> np.ndarray:
    """Mean of `f1`, weighted by the images of each class."""
    return _weighted(f1(matrix), matrix)


def worst_class_recall(matrix: np.ndarray) -> np.ndarray:
    """The lowest `recall` of the classes that occur."""
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
    """All metrics of one confusion matrix as plain numbers."""
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


def _weighted(values: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    images = matrix.sum(-1)
    return _ratio((values * images).sum(-1), images.sum(-1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    out = np.zeros(np.shape(whole))
    return np.asarray(np.divide(part, whole, out=out, where=np.asarray(whole) > 0))
