"""How well properties other than the subject tell the classes apart.

Where the pictures of a class come from one device, one archive or one export, a classifier may
learn the source. The size of the files alone distinguished images of Covid-19 (compare
DeGrave, Janizek and Lee 2021, "AI for radiographic COVID-19 detection selects shortcuts over
signal").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.metrics.folds import grouped_folds

_FOLDS = 5
_TREES, _LEAF = 20, 8
# Images that the model learns from, drawn at random.
_MOST = 5_000
# Standard errors below an AUC that is warned of: with ten classes and clean data, one study in a
# hundred would exceed 3.
_ERRORS = 3.0
# The AUC that a warning's lower bound must exceed.
LIMIT = 0.65
# Images, groups of images and folds that a class needs.
_LEAST = 10
# A class of so many images is not sampled.
_ALL_UP_TO = 200
# Largest difference within an even frame, in grey levels: JPEG changes it a little.
_EVEN = 12


@dataclass(frozen=True)
class Predicted:
    """How well features tell one class from the others: area under the ROC curve and a lower
    bound. by: the AUC of each feature alone, best first."""

    label: str
    auc: float
    low: float
    by: dict[str, float]

    @property
    def suspicious(self) -> bool:
        return self.low > LIMIT


def predicted_classes(
    features: Mapping[str, np.ndarray], labels: Sequence[str], groups: Sequence[str], seed: int
) -> list[Predicted]:
    """How well `features` (n, or n by some numbers) predict each class, by random forests that did
    not see the group; classes with fewer than 10 images or 2 groups are left out.

    Empty if fewer than two classes remain or no feature varies.
    """
    varying = {
        name: np.asarray(values, np.float64).reshape(len(labels), -1)
        for name, values in features.items()
        if len(labels) and len(np.unique(values, axis=0)) > 1
    }
    names = np.asarray([str(label) for label in labels])
    group = np.asarray([str(one) for one in groups])
    order = np.random.default_rng(seed % 2**32).permutation(len(names))
    share = min(1.0, _MOST / max(1, len(names)))
    chosen: dict[str, np.ndarray] = {}
    for name in sorted(set(names.tolist())):
        of_class = order[names[order] == name]
        # A rare class keeps all its images; prevalence does not change an AUC.
        some = of_class[: max(_ALL_UP_TO, round(share * len(of_class)))]
        if len(some) >= _LEAST and len(set(group[some])) > 1:
            chosen[name] = some
    kept = list(chosen)
    if len(kept) < 2 or not varying:
        return []
    rows = np.sort(np.concatenate(list(chosen.values())))
    numbers = np.searchsorted(kept, names[rows])
    _, group_numbers = np.unique(group[rows], return_inverse=True)

    fewest = min(len(set(group_numbers[numbers == number])) for number in range(len(kept)))
    folds = grouped_folds(numbers, group_numbers, min(_FOLDS, fewest), seed)

    def areas(columns: Sequence[str]) -> list[float]:
        values = np.concatenate([varying[name][rows] for name in columns], axis=1)
        return _areas(values, numbers, folds)

    together = areas(list(varying))
    alone = {name: areas([name]) for name in varying} if len(varying) > 1 else {}
    return [
        Predicted(
            label, together[number],
            together[number] - _ERRORS * standard_error(
                together[number], *(len(set(group_numbers[side].tolist()))
                                    for side in (numbers == number, numbers != number))
            ),
            dict(
                sorted(
                    ({name: each[number] for name, each in alone.items()} or
                     {next(iter(varying)): together[number]}).items(),
                    key=lambda entry: -entry[1],
                )
            ),
        )
        for number, label in enumerate(kept)
    ]  # fmt: skip


def _areas(
    values: np.ndarray, numbers: np.ndarray, folds: Sequence[tuple[np.ndarray, np.ndarray]]
) -> list[float]:
    """The area under the ROC curve of each class against the others, out of fold."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.metrics import roc_auc_score

    probabilities = np.zeros((len(numbers), int(numbers.max()) + 1))
    for train, rest in folds:
        # Balanced: a rare class must not vanish in the leaves.
        forest = RandomForestClassifier(
            _TREES, min_samples_leaf=_LEAF, class_weight="balanced", random_state=0
        ).fit(values[train], numbers[train])
        probabilities[np.ix_(rest, forest.classes_)] = forest.predict_proba(values[rest])
    return [
        float(roc_auc_score(numbers == number, probabilities[:, number]))
        for number in range(probabilities.shape[1])
    ]


def standard_error(area: float, positives: int, negatives: int) -> float:
    """The standard error of an area under the ROC curve (Hanley and McNeil 1982)."""
    square = area * area
    first, second = area / (2 - area), 2 * square / (1 + area)
    variance = (
        area * (1 - area) + (positives - 1) * (first - square) + (negatives - 1) * (second - square)
    ) / (positives * negatives)
    return float(np.sqrt(max(variance, 0.0)))


def even_frame(thumbnails: np.ndarray) -> np.ndarray:
    """The grey level of the outermost ring of each small grey picture, uint8 (n, side, side), -1
    where the ring is not even: float32 (n,).

    One pixel wide: a wider margin can be the subject's, as that of a handwritten digit.
    """
    ring = np.ones(thumbnails.shape[1:], bool)
    ring[1:-1, 1:-1] = False
    values = thumbnails[:, ring].astype(np.int16)
    even = np.ptp(values, axis=1) <= _EVEN
    return np.where(even, values.mean(1), -1).astype(np.float32)
