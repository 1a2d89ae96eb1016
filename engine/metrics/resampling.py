"""The bootstrap of a difference between two arms, over replicates and test groups at once.

It resamples two factors as in Owen 2007, "The pigeonhole bootstrap". Intervals are percentiles
(Efron and Tibshirani 1993, ch. 13) where test has many groups. With fewer than `MANY_GROUPS`
effective ones percentiles are too narrow; there the draws give only the standard error, and a t
distribution with a degree of freedom less than effective groups gives the interval (as Cameron and
Miller 2015, section VI, for few clusters).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import sparse, stats

from engine.core.errors import DataError
from engine.metrics.classification import Metric
from engine.metrics.probabilities import macro, roc_auc
from engine.results.comparison import Estimate

# From as many effective groups on, percentile intervals cover as they should.
MANY_GROUPS = 40
# The largest share of draws that a class without images may void.
_MOST_VOID = 0.5
# Numbers in memory at once.
_CELLS = 2**22


@dataclass(frozen=True)
class Resampled:
    """A difference between two arms, and its values in resampled studies.

    draws: (n,) with replicates and test groups resampled. of_groups: (n,) with only the `groups`
    resampled, the uncertainty that more replicates cannot reduce.
    effective_groups: the number of equal groups that the test set is equivalent to (Kish 1965).
    rarest: that of the groups with the rarest class, if the metric is a mean over classes.
    """

    estimate: float
    draws: np.ndarray
    of_groups: np.ndarray
    groups: int
    effective_groups: float | None = None
    rarest: float | None = None

    @property
    def error_of_test(self) -> float:
        """Standard error by test groups alone."""
        return float(self.of_groups.std())

    @property
    def effective(self) -> float:
        of_all = self.groups if self.effective_groups is None else self.effective_groups
        return of_all if self.rarest is None else min(of_all, self.rarest)

    @property
    def freedom(self) -> float | None:
        """Degrees of freedom of the t distribution of few groups; None where percentiles are
        used."""
        return max(self.effective - 1, 1.0) if self.effective < MANY_GROUPS else None

    @property
    def error(self) -> float:
        """Standard error by replicates and test groups."""
        return float(self.draws.std()) * math.sqrt(self.effective / max(self.effective - 1, 1.0))

    def interval(self, level: float = 0.95) -> Estimate:
        """The interval of the difference, and the two-sided p-value of "no difference"."""
        if self.freedom is None:
            low, high = np.quantile(self.draws, [(1 - level) / 2, (1 + level) / 2])
        else:
            reach = self.error * stats.t.ppf((1 + level) / 2, self.freedom)
            low, high = self.estimate - reach, self.estimate + reach
        p = min(1.0, 2 * min(self.below(0.0), self.above(0.0)))
        return Estimate(estimate=self.estimate, low=float(low), high=float(high), p=p, level=level)

    def below(self, limit: float) -> float:
        """One-sided p-value of "the difference is at most `limit`"."""
        if self.freedom is None:
            return self._share(self.draws <= limit)
        if self.error <= 0:
            return self._share(self.draws <= limit)
        return float(stats.t.sf((self.estimate - limit) / self.error, self.freedom))

    def above(self, limit: float) -> float:
        """One-sided p-value of "the difference is at least `limit`"."""
        if self.freedom is None:
            return self._share(self.draws >= limit)
        if self.error <= 0:
            return self._share(self.draws >= limit)
        return float(stats.t.cdf((self.estimate - limit) / self.error, self.freedom))

    def beyond(self, margin: float) -> float:
        """p-value of "the difference exceeds ± margin", as `tost`."""
        return max(self.above(margin), self.below(-margin))

    def _share(self, where: np.ndarray) -> float:
        """The share of draws, at least that which so many draws can show."""
        # Davison and Hinkley 1997, 4.2.
        return float((where.sum() + 1) / (len(self.draws) + 1))


def confusions_by_group(
    labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray, classes: int,
    every: np.ndarray | None = None,
) -> sparse.csr_array:  # fmt: skip
    """Counts (groups, classes * classes): a confusion matrix for each group, in sorted order.

    Sparse, because a group has few images and a study may have many groups and classes. every: the
    sorted names of all groups; None: those that occur.
    """
    names, inverse = numbered_groups(groups, every)
    cells = np.asarray(labels) * classes + np.asarray(predicted)
    ones = np.ones(len(cells))
    return sparse.coo_array((ones, (inverse, cells)), shape=(len(names), classes * classes)).tocsr()


def label_counts_by_group(
    truth: np.ndarray, decisions: np.ndarray, groups: np.ndarray, every: np.ndarray | None = None
) -> sparse.csr_array:
    """Counts (groups, labels * 4): for each group and label, images by whether the label applies
    and is predicted. truth, decisions: bool (n, labels)."""
    names, inverse = numbered_groups(groups, every)
    labels = truth.shape[1]
    cells = 4 * np.arange(labels) + 2 * truth + decisions
    ones, rows = np.ones(cells.size), np.repeat(inverse, labels)
    return sparse.coo_array((ones, (rows, cells.ravel())), shape=(len(names), 4 * labels)).tocsr()


def numbered_groups(groups: np.ndarray, every: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """The sorted names of groups, and the number of each image's group."""
    if every is None:
        return np.unique(groups, return_inverse=True)
    return every, np.searchsorted(every, groups)


def resampled_confusions(
    by_group: Sequence[sparse.csr_array], draws: int, seed: int,
    shape: tuple[int, ...] | None = None,
) -> Iterator[np.ndarray]:  # fmt: skip
    """Confusions in test sets with resampled groups: blocks of (draws, classifiers, *shape), where
    shape is (classes, classes) unless it is given. The same seed draws the same groups."""
    groups, cells = by_group[0].shape
    shape = shape or (math.isqrt(cells),) * 2
    stacked = sparse.hstack(list(by_group)).T.tocsr()
    random = np.random.default_rng(seed)
    left = draws
    while left:
        # The size of a block does not depend on the classifiers: it changes what is drawn.
        count = min(max(1, _CELLS // (groups + 16 * cells)), left)
        weights = random.multinomial(groups, np.full(groups, 1 / groups), count).astype(float)
        yield (stacked @ weights.T).T.reshape(count, len(by_group), *shape)
        left -= count


class Scores(Protocol):
    """A metric of an arm's replicates, with weighted test groups.

    rarest: effective groups of the rarest class; None if the metric is not a mean over classes.
    cells: numbers in memory for one draw.
    """

    replicates: int
    groups: int
    effective_groups: float
    rarest: float | None
    cells: int

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """(draws, replicates) of weights (draws, groups)."""


class ConfusionScores:
    """Scores by a metric of the confusion matrix.

    by_group: for each classifier, in the order of the fits, the confusions by group of the same
    images. A replicate's score is the mean over its classifiers. of_classes: the metric is a mean
    over classes. shape: of one classifier's counts, (classes, classes) or (labels, 2, 2).
    """

    def __init__(
        self, by_group: Sequence[sparse.csr_array], metric: Metric,
        replicates: int | None = None, of_classes: bool = True,
        shape: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        shapes = {matrix.shape for matrix in by_group}
        if len(shapes) != 1:
            raise ValueError(f"the classifiers differ in groups or classes: {shapes}")
        self.replicates, self.metric = replicates or len(by_group), metric
        ((self.groups, cells),) = shapes
        self.shape = shape or (math.isqrt(cells),) * 2
        self.cells = cells * len(by_group)
        # Images by true class, or by whether each label applies.
        images = by_group[0].reshape((self.groups * (cells // self.shape[-1]), self.shape[-1]))
        images = np.asarray(images.sum(1)).reshape(self.groups, *self.shape[:-1])
        several = len(self.shape) == 3
        self.effective_groups = effective_number((images[:, 0] if several else images).sum(1))
        self.rarest: float | None = None
        if of_classes:
            by_class = images[:, :, 1] if several else images
            self.rarest = min(effective_number(of_class) for of_class in by_class.T
                              if of_class.any())  # fmt: skip
        self._stacked = sparse.hstack(list(by_group)).T.tocsr()

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        counts = (self._stacked @ weights.T).T
        scores = self.metric(counts.reshape(len(weights), -1, *self.shape))
        return np.asarray(scores.reshape(len(weights), self.replicates, -1).mean(-1))


class MeanScores:
    """The weighted mean of the scores of several tasks on the same test groups."""

    def __init__(self, parts: Sequence[tuple[float, Scores]], effective_groups: float) -> None:
        """parts: with their weights, which add up to 1."""
        self.parts, self.effective_groups = list(parts), effective_groups
        first = parts[0][1]
        self.replicates, self.groups = first.replicates, first.groups
        rarest = [scores.rarest for _, scores in parts if scores.rarest is not None]
        self.rarest = min(rarest, default=None)
        self.cells = sum(scores.cells for _, scores in parts)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        return np.asarray(sum(share * scores(weights) for share, scores in self.parts))


class AreaScores:
    """Scores by the area under the ROC curve of one class against the rest, averaged over the
    classes that have both in a draw (ties count half; Hanley and McNeil 1982).

    probabilities: float (classifiers, n, classes), in the order of the fits. labels: class numbers
    (n,), or bool (n, classes). every: the sorted names of all groups; None: those that occur.
    """

    def __init__(
        self, labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray,
        replicates: int | None = None, every: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.replicates = replicates or len(probabilities)
        names, self._group_of = numbered_groups(groups, every)
        self.groups, self.cells = len(names), 4 * len(labels)
        self.effective_groups = effective_number(np.bincount(self._group_of))
        of_class = labels.T if labels.ndim == 2 else labels == np.unique(labels)[:, None]
        self.rarest: float | None = min(
            effective_number(np.unique(groups[images], return_counts=True)[1])
            for images in of_class
            if images.any()
        )
        self._labels, self._probabilities = np.asarray(labels), np.asarray(probabilities)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        of_image = weights[:, self._group_of]
        areas = [roc_auc(self._labels, values, of_image) for values in self._probabilities]
        by_replicate = macro(np.stack(areas, 1)).reshape(len(weights), self.replicates, -1)
        return np.asarray(by_replicate.mean(-1))


def bootstrap(arm: Scores, baseline: Scores, draws: int, seed: int) -> Resampled:
    """Resample replicates and groups for the difference `arm` - `baseline` of a metric's mean over
    replicates. Raises `DataError` if too many draws have no value."""
    if (arm.replicates, arm.groups) != (baseline.replicates, baseline.groups):
        raise ValueError(
            f"the arms differ: {arm.replicates} and {baseline.replicates} replicates,"
            f" {arm.groups} and {baseline.groups} groups"
        )
    replicates, groups = arm.replicates, arm.groups
    random = np.random.default_rng(seed)

    def differences(weights: np.ndarray) -> np.ndarray:
        """(draws, replicates) of weights (draws, groups)."""
        return np.asarray(arm(weights) - baseline(weights))

    block = max(1, _CELLS // (arm.cells + baseline.cells + groups))
    of_both: list[np.ndarray] = []
    of_groups: list[np.ndarray] = []
    wanted, tried = draws, 0
    while wanted:
        count = min(block, wanted)
        weights = random.multinomial(groups, np.full(groups, 1 / groups), count)
        drawn = differences(weights.astype(float))
        chosen = random.integers(0, replicates, (count, replicates))
        # A draw with a single class has no area under a curve, and is replaced.
        defined = np.isfinite(drawn).all(1)
        of_both.append(np.take_along_axis(drawn, chosen, 1).mean(1)[defined])
        of_groups.append(drawn.mean(1)[defined])
        wanted, tried = wanted - int(defined.sum()), tried + count
        if tried >= draws and draws - wanted < (1 - _MOST_VOID) * tried:
            raise DataError(
                f"{tried - draws + wanted} of {tried} resampled test sets have no area under the"
                " curve: test has too few images of a class; choose another objective"
            )
    return Resampled(
        estimate=float(differences(np.ones((1, groups))).mean()),
        draws=np.concatenate(of_both),
        of_groups=np.concatenate(of_groups),
        groups=groups,
        effective_groups=arm.effective_groups,
        rarest=arm.rarest,
    )


def effective_number(sizes: np.ndarray) -> float:
    """The number of equal groups that groups of these sizes are equivalent to (Kish 1965)."""
    return float(sizes.sum() ** 2 / (sizes**2).sum())
