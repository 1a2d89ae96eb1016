"""Likely label errors, by confident learning (Northcutt, Jiang and Chuang 2021, as in cleanlab).

A classifier that was not trained on an image estimates how likely its label is. The flags take into
account how often it confuses each pair of classes, so that a difficult class is not flagged as a
whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from engine.metrics.folds import grouped_folds

_FOLDS = 5
# Principal components that are learnt from, and rows that they are computed from.
_COMPONENTS, _COMPONENTS_FROM = 256, 20_000
# Images below which one thread is as fast as several.
_FEW = 10_000
# The fewest groups of a class.
_LEAST = 2
# Labels and share of wrong labels below a point at which the two are compared.
_COUNTED, _MASS = 10, 0.02
# Labels that the number of wrong ones is estimated from: arrays of n by classes are large.
_ESTIMATED_FROM = 20_000
# Agreement below which the list of suspects would mislead.
WEAK = 0.6


@dataclass(frozen=True)
class LabelErrors:
    """Doubtful labels of n images.

    flagged: whether the label is doubtful, bool (n,). confidence: the probability of the given
    label, float64 (n,). suggested: the likeliest class, int64 (n,), with its probability.
    agreed: share of images whose likeliest class is the given one, averaged over classes.
    wrong: estimated number of wrong labels and more, as `wrong_labels` gives them.
    """

    flagged: np.ndarray
    confidence: np.ndarray
    suggested: np.ndarray
    suggested_confidence: np.ndarray
    agreed: float
    wrong: tuple[float, float]

    @property
    def weak(self) -> bool:
        """Whether the classifier is too weak to accuse a label: most of its contradictions are its
        own errors."""
        return self.agreed < WEAK

    @property
    def order(self) -> np.ndarray:
        """The flagged rows, least likely label first."""
        rows = np.flatnonzero(self.flagged)
        return rows[np.argsort(self.confidence[rows], kind="stable")]


def label_errors(
    vectors: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int
) -> LabelErrors | None:
    """The labels that a classifier trained on the other groups contradicts.

    vectors: float32 (n, width). labels: int64 (n,), with every number from 0 on. groups: (n,); each
    lies in one fold. None if a class has fewer than two groups.
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    probabilities = out_of_fold(vectors, labels, groups, seed)
    if probabilities is None:
        return None
    flagged = find_label_issues(labels, probabilities, filter_by="prune_by_noise_rate", n_jobs=1)
    confidence = get_label_quality_scores(labels, probabilities, method="self_confidence")
    suggested = probabilities.argmax(1)
    return LabelErrors(
        np.asarray(flagged) & (suggested != labels),
        confidence,
        suggested,
        probabilities.max(1),
        float(np.mean([(suggested == labels)[labels == number].mean()
                       for number in range(probabilities.shape[1])])),
        wrong_labels(probabilities, labels),
    )  # fmt: skip


def wrong_labels(probabilities: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """An estimate of how many labels are wrong, if wrong ones are drawn at random, and the same
    with two standard errors more.

    The probability that the classifier gives to such a label is known from the data: it is the
    probability of a class that an image does not have, drawn by frequency. The labels are a mixture
    of these and of right ones; the share of wrong ones is at most the ratio of the two distribution
    functions at every point (Blanchard, Lee and Scott 2010), and close to it where right labels
    are rare. Confusions of classes that look alike are more likely than these, and not counted.

    probabilities: out of fold, float64 (n, classes). labels: int64 (n,).
    """
    every = max(1, len(labels) // _ESTIMATED_FROM)
    probabilities, labels = probabilities[::every], labels[::every]
    count, classes = probabilities.shape
    given = probabilities[np.arange(count), labels]
    weights = np.tile(np.bincount(labels, minlength=classes) / count, (count, 1))
    weights[np.arange(count), labels] = 0
    weights /= weights.sum(1, keepdims=True) * count
    order = np.argsort(probabilities, axis=None)
    values, mass = probabilities.ravel()[order], np.cumsum(weights.ravel()[order])
    limits = np.quantile(given, np.linspace(0.001, 0.5, 200))
    below = (given[:, None] <= limits).mean(0)
    of_wrong = np.concatenate([[0.0], mass])[np.searchsorted(values, limits, side="right")]
    usable = (below * count >= _COUNTED) & (of_wrong >= _MASS)
    if not usable.any():
        return 0.0, float(count * every)
    below, of_wrong = below[usable], of_wrong[usable]
    error = 1.96 * np.sqrt(below * (1 - below) / count)
    bound = min(float(((below + error) / of_wrong).min()), 1.0)
    estimate = min(float((below / of_wrong).min()), bound)
    return estimate * count * every, bound * count * every


def out_of_fold(
    vectors: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int
) -> np.ndarray | None:
    """Probabilities float64 (n, classes) of a logistic regression on standardised principal
    components, trained without images of the same group; None if a class has too few groups."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    classes = int(labels.max()) + 1 if len(labels) else 0
    group_counts = [len(set(groups[labels == number])) for number in range(classes)]
    if classes < 2 or min(group_counts) < _LEAST:
        return None
    sample = vectors[:: max(1, len(vectors) // _COMPONENTS_FROM)]
    scaler = StandardScaler().fit(sample)
    width = min(_COMPONENTS, *sample.shape)
    axes = PCA(width, random_state=0).fit(scaler.transform(sample))
    features = np.concatenate(
        [
            axes.transform(scaler.transform(vectors[start : start + _COMPONENTS_FROM]))
            for start in range(0, len(vectors), _COMPONENTS_FROM)
        ]
    ).astype(np.float32)
    probabilities = np.zeros((len(labels), classes))
    count = min(_FOLDS, *group_counts)
    # The products of few images are small: more threads would wait for each other, on a busy
    # machine for long.
    with threadpool_limits(1 if len(labels) < _FEW else None, "blas"):
        for train, rest in grouped_folds(labels, groups, count, seed):
            model = LogisticRegression(C=0.01, max_iter=200).fit(features[train], labels[train])
            probabilities[np.ix_(rest, model.classes_)] = model.predict_proba(features[rest])
    return probabilities
