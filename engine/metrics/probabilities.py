"""Metrics of a classifier's probabilities: ranking and calibration.

    ROC-AUC    probability that an image of the class scores higher than another image (ties count
               half); 0.5 by chance
    PR-AUC     average precision, the sum of precision over steps of recall; by chance, the class's
               share of the images
    Brier      mean over images of the sum over classes of (probability - truth)², from 0 to 2
               (Brier 1950; some count only one class of two, which is half of it)
    ECE        mean gap between confidence and accuracy, over bins of the confidence in the
               likeliest class (Guo et al. 2017)

labels are class numbers int (n,); probabilities are float (n, classes). Areas also take labels bool
(n, classes), for images with several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

BINS = 15


def roc_auc(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Area under the ROC curve of each class against all others: float64 (…, classes).

    weights: (…, n), how often each image counts; leading axes are resamples, which share one sort
    of the images. NaN if a class has no image, or has all of them.
    """
    return _by_class(_roc_area, labels, probabilities, weights)


def average_precision(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve of each class against all others: float64 (classes,);
    NaN if a class has no image. It sums steps, because linear interpolation is too optimistic
    (Davis and Goadrich 2006)."""
    return _by_class(_steps_of_precision, labels, probabilities, None)


def brier(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over images of the sum over classes of squared errors (Brier 1950): 0 is best, 2
    worst."""
    errors = probabilities.astype(np.float64)
    errors[np.arange(len(labels)), labels] -= 1
    return float((errors**2).sum(1).mean())


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: mean confidence and accuracy of each bin, float64 (bins,), NaN in
    empty bins; and its images, int64 (bins,)."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> Reliability:
    """Accuracy by confidence in the likeliest class, in `bins` equal parts of 0 to 1, each open
    below and closed above."""
    confidence = probabilities.max(1).astype(np.float64)
    right = probabilities.argmax(1) == labels
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    bin_of = np.searchsorted(edges, confidence, side="left")
    count = np.bincount(bin_of, minlength=bins)

    def mean(values: np.ndarray) -> np.ndarray:
        return _ratio(np.bincount(bin_of, values, bins), count)

    return Reliability(mean(confidence), mean(right), count)


def expected_calibration_error(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS
) -> float:
    """Mean over images of |confidence - accuracy| of their bin (Guo et al. 2017, equation 3)."""
    diagram = reliability(labels, probabilities, bins)
    gaps = np.abs(diagram.confidence - diagram.accuracy)
    return float(np.nansum(diagram.count * gaps) / diagram.count.sum())


def macro(values: np.ndarray) -> np.ndarray:
    """Mean over the classes (last axis) that have a value; NaN if none has."""
    known = np.isfinite(values)
    return _ratio(np.where(known, values, 0).sum(-1), known.sum(-1))


PROBABILITY_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "roc_auc": lambda labels, probabilities: float(macro(roc_auc(labels, probabilities))),
    "average_precision": lambda labels, probabilities: float(
        macro(average_precision(labels, probabilities))
    ),
    "brier": brier,
    "ece": expected_calibration_error,
}


def probability_metrics(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """All `PROBABILITY_METRICS`; areas are means over the classes that occur."""
    return {name: metric(labels, probabilities) for name, metric in PROBABILITY_METRICS.items()}


def finite_probability_metrics(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """`probability_metrics` without undefined values, which JSON does not support."""
    metrics = probability_metrics(labels, probabilities)
    return {name: value for name, value in metrics.items() if np.isfinite(value)}


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over images of -log of the probability of the true class: the cross entropy that a
    classifier's training minimises. A probability of 0 counts as 1e-12."""
    of_truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(of_truth, 1e-12)).mean())


def _by_class(
    area: Callable[[np.ndarray, np.ndarray], np.ndarray], labels: np.ndarray,
    probabilities: np.ndarray, weights: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    """`area` of every class, from the weights of its images, and of all others, that score at least
    each threshold, from high to low: (…, thresholds) both."""
    labels = np.asarray(labels)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    areas = []
    for number in range(probabilities.shape[1]):
        order = np.argsort(-probabilities[:, number], kind="stable")
        score = probabilities[order, number]
        # Images with equal scores pass a threshold together.
        last = np.r_[np.flatnonzero(score[1:] != score[:-1]), len(score) - 1]
        sorted_weights = weights[..., order]
        of_class = labels[:, number] if labels.ndim == 2 else labels == number
        own = np.cumsum(sorted_weights * of_class[order], -1)[..., last]
        every = np.cumsum(sorted_weights, -1)[..., last]
        areas.append(area(own, every - own))
    return np.stack(areas, -1)


def _roc_area(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Sum of trapezoids under the curve of true positives over false positives."""
    steps = np.diff(others, prepend=0, axis=-1)
    heights = own - np.diff(own, prepend=0, axis=-1) / 2
    return _ratio((steps * heights).sum(-1), own[..., -1] * others[..., -1])


def _steps_of_precision(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    both = own + others
    precision = np.divide(own, both, out=np.zeros_like(both), where=both > 0)
    return _ratio((np.diff(own, prepend=0, axis=-1) * precision).sum(-1), own[..., -1])


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    out = np.full(np.shape(whole), np.nan)
    return np.asarray(np.divide(part, whole, out=out, where=whole > 0))
