"""Figures of a classifier's probabilities: does it rank images well, and does it know how sure it
may be?

    ROC-AUC    how often an image of the class is given more of it than one of another (ties count
               half); 0.5 by chance
    PR-AUC     average precision, the sum of precision over steps of recall; by chance, the class's
               share of the images
    Brier      the mean over images of the sum over classes of (probability - truth)², from 0 to 2
               (Brier 1950; half of it where others count one class of two)
    ECE        the mean gap between confidence and accuracy, over bins of confidence of the
               likeliest class (Guo et al. 2017)

labels are class numbers int (n,); probabilities are float (n, classes).
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

    weights: (…, n), how often each image counts; leading axes are resamples, for all of which the
    images are sorted once. NaN where a class, or all but one, has no image.
    """
    return _of_classes(_roc_area, labels, probabilities, weights)


def average_precision(
    labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Area under the precision-recall curve of each class against all others: float64 (…, classes),
    by steps and not by straight lines, which are too kind (Davis and Goadrich 2006).

    weights: as of `roc_auc`. NaN where a class has no image.
    """
    return _of_classes(_steps_of_precision, labels, probabilities, weights)


def brier(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over images of the sum over classes of squared errors (Brier 1950): 0 is best, 2
    worst."""
    errors = probabilities.astype(np.float64)
    errors[np.arange(len(labels)), labels] -= 1
    return float((errors**2).sum(1).mean())


@dataclass(frozen=True)
class Reliability:
    """What a reliability diagram shows, for each bin of confidence: mean confidence and share that
    is right, float64 (bins,), NaN in empty bins; images, int64 (bins,)."""

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> Reliability:
    """Confidence in the likeliest class against how often it is right, in `bins` equal parts of 0
    to 1, each open below and closed above."""
    confidence = probabilities.max(1).astype(np.float64)
    right = probabilities.argmax(1) == labels
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    bin_of = np.searchsorted(edges, confidence, side="left")
    count = np.bincount(bin_of, minlength=bins)

    def mean(values: np.ndarray) -> np.ndarray:
        sums = np.bincount(bin_of, values, bins)
        return np.divide(sums, count, out=np.full(bins, np.nan), where=count > 0)

    return Reliability(mean(confidence), mean(right), count)


def expected_calibration_error(
    labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS
) -> float:
    """Mean over images of |confidence - accuracy| of their bin (Guo et al. 2017, equation 3)."""
    found = reliability(labels, probabilities, bins)
    gaps = np.abs(found.confidence - found.accuracy)
    return float(np.nansum(found.count * gaps) / found.count.sum())


def macro(figure: np.ndarray) -> float:
    """Mean over the classes that have a figure; NaN where none has."""
    known = figure[~np.isnan(figure)]
    return float(known.mean()) if len(known) else float("nan")


PROBABILITY_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "roc_auc": lambda labels, probabilities: macro(roc_auc(labels, probabilities)),
    "average_precision": lambda labels, probabilities: macro(
        average_precision(labels, probabilities)
    ),
    "brier": brier,
    "ece": expected_calibration_error,
}


def of_probabilities(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """All figures of `PROBABILITY_METRICS`: areas are means over the classes that occur."""
    return {name: metric(labels, probabilities) for name, metric in PROBABILITY_METRICS.items()}


def known_of_probabilities(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
    """`of_probabilities` without those that have no value, which JSON does not know."""
    found = of_probabilities(labels, probabilities)
    return {name: value for name, value in found.items() if np.isfinite(value)}


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Mean over images of -log of the probability of the true class: the cross entropy that a
    classifier is trained by. A probability of 0 counts as 1e-12."""
    of_truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(of_truth, 1e-12)).mean())


def _of_classes(
    figure: Callable[[np.ndarray, np.ndarray], np.ndarray], labels: np.ndarray,
    probabilities: np.ndarray, weights: np.ndarray | None,
) -> np.ndarray:  # fmt: skip
    """`figure` of every class, from the weight of its images and of all others that score at least
    each threshold, falling: (…, thresholds) both."""
    labels = np.asarray(labels)
    weights = np.ones(len(labels)) if weights is None else np.asarray(weights, np.float64)
    found = []
    for number in range(probabilities.shape[1]):
        order = np.argsort(-probabilities[:, number], kind="stable")
        score = probabilities[order, number]
        # Images of one score pass a threshold together.
        last = np.r_[np.flatnonzero(score[1:] != score[:-1]), len(score) - 1]
        sorted_weights = weights[..., order]
        own = np.cumsum(sorted_weights * (labels[order] == number), -1)[..., last]
        every = np.cumsum(sorted_weights, -1)[..., last]
        found.append(figure(own, every - own))
    return np.stack(found, -1)


def _roc_area(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Trapezes under the curve of true positives over false ones."""
    steps = np.diff(others, prepend=0, axis=-1)
    heights = own - np.diff(own, prepend=0, axis=-1) / 2
    return _ratio((steps * heights).sum(-1), own[..., -1] * others[..., -1])


def _steps_of_precision(own: np.ndarray, others: np.ndarray) -> np.ndarray:
    both = own + others
    precision = np.divide(own, both, out=np.zeros_like(both), where=both > 0)
    return _ratio((np.diff(own, prepend=0, axis=-1) * precision).sum(-1), own[..., -1])


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)
