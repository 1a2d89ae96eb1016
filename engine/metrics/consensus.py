"""Which labels several classifiers agree to be wrong, and what they agree on instead.

Each voter has probabilities for images that it was not trained on. A label is flagged if enough
voters see another class. The new label is the class that most voters see; it replaces the old one
if as many voters as are needed for a flag see this same class, and are sure of it on average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Consensus:
    """The votes about n labels.

    flagged, changed: bool (n,). new: class numbers int64 (n,), the old ones where nothing changes.
    confidence: mean probability of the class that most voters see, (n,). against: number of voters
    that see another class than the label, int64 (n,). cut: labels that were doubtful and not
    flagged because of the cap.
    """

    flagged: np.ndarray
    changed: np.ndarray
    new: np.ndarray
    confidence: np.ndarray
    against: np.ndarray
    cut: int


def consensus(
    probabilities: Mapping[str, np.ndarray], labels: np.ndarray, needed: int, most: float,
    sure: float, judged: np.ndarray | None = None,
) -> Consensus:  # fmt: skip
    """Flag labels and decide on new ones.

    probabilities: of each voter, float (n, classes), out of fold. labels: class numbers (n,).
    needed: voters that must see another class for a flag, and the same class for a new label. most:
    the largest share of labels to flag; those whose label is least likely on average come first.
    sure: the least mean probability of a new label. judged: labels that the voters can judge, bool
    (n,); None: all.
    """
    every = np.stack(list(probabilities.values()))
    seen, mean = every.argmax(2), every.mean(0)
    count, classes = mean.shape
    against = (seen != labels).sum(0)
    doubtful = np.flatnonzero((against >= needed) & (True if judged is None else judged))
    # Ties by position.
    by_doubt = doubtful[np.argsort(mean[doubtful, labels[doubtful]], kind="stable")]
    allowed = int(most * count)
    flagged = np.zeros(count, bool)
    flagged[by_doubt[:allowed]] = True
    votes = np.zeros((count, classes), np.int64)
    for of_voter in seen:
        votes[np.arange(count), of_voter] += 1
    # Of classes with equal votes, the likelier.
    best = (votes + 0.5 * mean).argmax(1)
    confidence = mean[np.arange(count), best]
    enough = votes[np.arange(count), best] >= needed
    changed = flagged & enough & (confidence >= sure) & (best != labels)
    return Consensus(
        flagged, changed, np.where(changed, best, labels).astype(np.int64), confidence, against,
        max(0, len(doubtful) - allowed),
    )  # fmt: skip
