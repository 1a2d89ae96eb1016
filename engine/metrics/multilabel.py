"""Metrics of a task with several labels per image.

Counts are (…, labels, 2, 2): images by whether a label applies (rows) and is predicted (columns).
As in scikit-learn with `zero_division=0`, values without true or predicted images are 0. Means over
labels are of the label itself, not of its absence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from engine.metrics import classification
from engine.metrics.classification import Metric
from engine.metrics.probabilities import BINS, Reliability, average_precision, macro, roc_auc


def label_counts(truth: np.ndarray, decisions: np.ndarray) -> np.ndarray:
    """Counts int64 (labels, 2, 2) of `truth` and `decisions`, bool (n, labels)."""
    both = (truth & decisions).sum(0)
    true, predicted = truth.sum(0), decisions.sum(0)
    neither = len(truth) - true - predicted + both
    counts = np.stack([neither, predicted - both, true - both, both], -1)
    return counts.reshape(-1, 2, 2).astype(np.int64)


def precision(counts: np.ndarray) -> np.ndarray:
    """Share of the images predicted to have a label that have it: (…, labels)."""
    return classification.precision(counts)[..., 1]


def recall(counts: np.ndarray) -> np.ndarray:
    """Share of the images with a label that are predicted to have it: (…, labels)."""
    return classification.recall(counts)[..., 1]


def f1(counts: np.ndarray) -> np.ndarray:
    """Harmonic mean of precision and recall: (…, labels)."""
    return classification.f1(counts)[..., 1]


def _weighted(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    images = counts[..., 1, :].sum(-1)
    whole = images.sum(-1)
    mean = np.divide((values * images).sum(-1), whole, out=np.zeros(whole.shape), where=whole > 0)
    return np.asarray(mean)


def _mean(of_label: Metric) -> Metric:
    return lambda counts: np.asarray(of_label(counts).mean(-1))


def _worst_recall(counts: np.ndarray) -> np.ndarray:
    present = counts[..., 1, :].sum(-1) > 0
    least = np.where(present, recall(counts), np.inf).min(-1)
    return np.where(present.any(-1), least, 0.0)


# Named as the metrics of single-label tasks that they correspond to. accuracy: share of right
# decisions, which is 1 - Hamming loss.
METRICS: dict[str, Metric] = {
    "accuracy": _mean(classification.accuracy),
    "balanced_accuracy": _mean(classification.balanced_accuracy),
    "macro_precision": _mean(precision), "macro_recall": _mean(recall), "macro_f1": _mean(f1),
    "weighted_precision": lambda counts: _weighted(precision(counts), counts),
    "weighted_f1": lambda counts: _weighted(f1(counts), counts),
    "worst_class_recall": _worst_recall,
}  # fmt: skip


def brier(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over images and labels of (probability - truth)², from 0 to 1."""
    return float(((probabilities.astype(np.float64) - truth) ** 2).mean())


def reliability(truth: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> Reliability:
    """How often labels apply, by their probability, over all images and labels, in `bins` equal
    parts of 0 to 1, each open below and closed above."""
    flat, right = probabilities.ravel().astype(np.float64), truth.ravel()
    bin_of = np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], flat, side="left")
    count = np.bincount(bin_of, minlength=bins)

    def mean(values: np.ndarray) -> np.ndarray:
        whole = np.bincount(bin_of, values, bins)
        means = np.divide(whole, count, out=np.full(bins, np.nan), where=count > 0)
        return np.asarray(means)

    return Reliability(mean(flat), mean(right), count)


def expected_calibration_error(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over images and labels of the gap between probability and frequency of their bin."""
    diagram = reliability(truth, probabilities)
    gaps = np.abs(diagram.confidence - diagram.accuracy)
    return float(np.nansum(diagram.count * gaps) / diagram.count.sum())


def log_loss(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over images and labels of the binary cross entropy. A probability of 0 counts as
    1e-12."""
    of_truth = np.where(truth, probabilities, 1 - probabilities).astype(np.float64)
    return float(-np.log(np.maximum(of_truth, 1e-12)).mean())


PROBABILITY_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "roc_auc": lambda truth, probabilities: float(macro(roc_auc(truth, probabilities))),
    "average_precision": lambda truth, probabilities: float(
        macro(average_precision(truth, probabilities))
    ),
    "brier": brier,
    "ece": expected_calibration_error,
}


def summary(counts: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """All metrics of the counts of one classifier as plain numbers. (A task with several labels per
    image has no confusion matrix.)"""
    scores = (precision(counts), recall(counts), f1(counts), counts[..., 1, :].sum(-1))
    return {
        **{name: float(metric(counts)) for name, metric in METRICS.items()},
        "per_class": {
            name: {
                "precision": float(of_label[0]), "recall": float(of_label[1]),
                "f1": float(of_label[2]), "images": int(of_label[3]),
            }
            for name, *of_label in zip(labels, *scores, strict=True)
        },
        "confusion": [],
    }  # fmt: skip
