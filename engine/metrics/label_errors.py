"""Likely label errors, by confident learning (Northcutt, Jiang and Chuang 2021, as in cleanlab).

A classifier that has not seen an image says how likely its label is. What is flagged comes from how
often it takes each class for each other, so that a class it is unsure of is not flagged as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_FOLDS = 5
# Principal components that are learnt from, and rows that they are found in.
_COMPONENTS, _COMPONENTS_FROM = 256, 20_000
_LEAST = 2


@dataclass(frozen=True)
class LabelErrors:
    """Of n images: whether the label is in doubt, bool (n,), the probability of the given label,
    float64 (n,), the likeliest class, int64 (n,), and the probability of that."""

    flagged: np.ndarray
    confidence: np.ndarray
    suggested: np.ndarray
    suggested_confidence: np.ndarray

    # How often the likeliest class is the given one.
    agreed: float

    @property
    def order(self) -> np.ndarray:
        """Rows that are flagged, the least likely label first."""
        found = np.flatnonzero(self.flagged)
        return found[np.argsort(self.confidence[found], kind="stable")]


def label_errors(
    vectors: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int
) -> LabelErrors | None:
    """Which labels a classifier of the other groups' images contradicts.

    vectors: float32 (n, width). labels: int64 (n,), every number from 0 on is there. groups: of n
    images; one lies in one fold. None where a class has fewer than two groups.
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
        float((suggested == labels).mean()),
    )


def out_of_fold(
    vectors: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int
) -> np.ndarray | None:
    """Probabilities float64 (n, classes) of a logistic regression on standardised principal
    components that has seen no image of the same group; None where that cannot be."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.preprocessing import StandardScaler

    classes = int(labels.max()) + 1 if len(labels) else 0
    held = [len(set(groups[labels == number])) for number in range(classes)]
    if classes < 2 or min(held) < _LEAST:
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
    found = np.zeros((len(labels), classes))
    folds = StratifiedGroupKFold(min(_FOLDS, *held), shuffle=True, random_state=seed % 2**32)
    for train, rest in folds.split(features, labels, groups):
        model = LogisticRegression(C=0.01, max_iter=200).fit(features[train], labels[train])
        found[np.ix_(rest, model.classes_)] = model.predict_proba(features[rest])
    return found
