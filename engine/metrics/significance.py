"""Whether a difference is more than chance: intervals, corrections and the verdict of a comparison.

Differences are paired: replicate i of one arm against replicate i of the other (the same seed, the
same test images). A replicate is a generator fit with its images and classifiers or, with a single
fit, a classifier's seed. Two methods cover two sources of chance and must agree for any verdict:

    paired t     over replicates: would other fits and seeds agree?
    bootstrap    over replicates and test groups at once: would other patients agree?
                 (percentile interval; Efron and Tibshirani 1993, ch. 13; resampling two factors
                 as Owen 2007, "The pigeonhole bootstrap")

Fewer than `LEAST_REPLICATES` or `LEAST_GROUPS` leave every comparison undecided.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import sparse, stats

from engine.core.errors import DataError
from engine.core.notice import Notice
from engine.metrics.classification import Metric
from engine.results.comparison import Estimate, Verdict, Word

POWER = 0.8
LEAST_REPLICATES = 5
# With few groups a percentile interval is too narrow: if all replicates make the same errors, 9% of
# null studies with 10 equal groups are significant, 5% to 7% with 20 to 50 (300 simulated each).
LEAST_GROUPS = 20
# The largest share of bootstrap draws that a class without images may void.
_MOST_VOID = 0.5
# With five replicates the p-value is at least 1/16, with eight 1/128.
LEAST_FOR_WILCOXON = 8
# Numbers in memory at once.
_CELLS = 2**22


@dataclass(frozen=True)
class Resampled:
    """A difference between two arms, and its values in resampled studies.

    draws: (n,) with replicates and test groups resampled. error_of_test: standard deviation with
    only the `groups` resampled, the uncertainty that more replicates cannot reduce.
    effective_groups: the number of equal groups that the test set is equivalent to (Kish 1965).
    rarest: groups that contain the rarest class, if the metric is a mean over classes.
    """

    estimate: float
    draws: np.ndarray
    error_of_test: float
    groups: int
    effective_groups: float | None = None
    rarest: int | None = None

    def interval(self, level: float = 0.95) -> Estimate:
        """Percentile interval. The p-value is at least the smallest that the draws can show."""
        low, high = np.quantile(self.draws, [(1 - level) / 2, (1 + level) / 2])
        p = min(1.0, 2 * min(self._share(self.draws <= 0), self._share(self.draws >= 0)))
        return Estimate(
            estimate=self.estimate, low=float(low), high=float(high), p=p, level=level
        )

    def beyond(self, margin: float) -> float:
        """p-value of "the difference exceeds ± margin", as `tost` but by the draws."""
        return max(self._share(self.draws >= margin), self._share(self.draws <= -margin))

    def _share(self, where: np.ndarray) -> float:
        # Davison and Hinkley 1997, 4.2.
        return float((where.sum() + 1) / (len(self.draws) + 1))


def paired_t(differences: Sequence[float], level: float = 0.95) -> Estimate:
    """Student's t interval of the mean of paired differences. Raises `ValueError` for fewer than
    two.

    If all are equal there is no spread to test against: the interval is a point and p is 1, because
    equal differences are common by chance on few images.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        raise ValueError(f"too few replicates: {len(values)} (an interval needs two)")
    mean, error = float(values.mean()), float(stats.sem(values))
    if error <= 1e-12:
        return Estimate(estimate=mean, low=mean, high=mean, p=1.0, level=level)
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))
    return Estimate(estimate=mean, low=mean - half, high=mean + half, p=p, level=level)


def confusions_by_group(
    labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray, classes: int
) -> sparse.csr_array:
    """Counts (groups, classes * classes): a confusion matrix for each group, in sorted order.

    Sparse, because a group has few images and a study may have many groups and classes.
    """
    names, inverse = np.unique(groups, return_inverse=True)
    cells = np.asarray(labels) * classes + np.asarray(predicted)
    ones = np.ones(len(cells))
    return sparse.coo_array((ones, (inverse, cells)), shape=(len(names), classes * classes)).tocsr()


class Scores(Protocol):
    """A metric of an arm's replicates, with weighted test groups."""

    @property
    def replicates(self) -> int: ...

    @property
    def groups(self) -> int: ...

    @property
    def effective_groups(self) -> float: ...

    @property
    def rarest(self) -> int | None:
        """Groups that contain the rarest class; None if the metric is not a mean over classes."""
        ...

    @property
    def cells(self) -> int:
        """Numbers in memory for one draw."""
        ...

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        """(draws, replicates) of weights (draws, groups)."""
        ...


class ConfusionScores:
    """Scores by a metric of the confusion matrix.

    by_group: for each classifier, in the order of the fits, the confusions by group of the same
    images. A replicate's score is the mean over its classifiers. of_classes: the metric is a mean
    over classes.
    """

    def __init__(
        self, by_group: Sequence[sparse.csr_array], metric: Metric,
        replicates: int | None = None, of_classes: bool = True,
    ) -> None:  # fmt: skip
        shapes = {matrix.shape for matrix in by_group}
        if len(shapes) != 1:
            raise ValueError(f"the classifiers differ in groups or classes: {shapes}")
        self.replicates, self.metric = replicates or len(by_group), metric
        ((self.groups, cells),) = shapes
        self.classes, self.cells = math.isqrt(cells), cells * len(by_group)
        images = by_group[0].reshape((self.groups * self.classes, self.classes)).sum(1)
        images = np.asarray(images).reshape(self.groups, self.classes)
        self.effective_groups = effective_number(images.sum(1))
        groups_of = (images > 0).sum(0)
        self.rarest = int(groups_of[groups_of > 0].min()) if of_classes else None
        self._stacked = sparse.hstack(list(by_group)).T.tocsr()

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        counts = (self._stacked @ weights.T).T
        scores = self.metric(counts.reshape(len(weights), -1, self.classes, self.classes))
        return np.asarray(scores.reshape(len(weights), self.replicates, -1).mean(-1))


class AreaScores:
    """Scores by the area under the ROC curve of one class against the rest, averaged over the
    classes that have both in a draw (ties count half; Hanley and McNeil 1982).

    probabilities: float (classifiers, n, classes), in the order of the fits. labels: class numbers
    (n,).
    """

    def __init__(
        self, labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray,
        replicates: int | None = None,
    ) -> None:  # fmt: skip
        self.replicates = replicates or len(probabilities)
        names, self._group_of = np.unique(groups, return_inverse=True)
        self.groups, self.cells = len(names), 4 * len(labels)
        self.effective_groups = effective_number(np.bincount(self._group_of))
        self.rarest = min(len(np.unique(groups[labels == label])) for label in np.unique(labels))
        self._labels, self._probabilities = np.asarray(labels), np.asarray(probabilities)

    def __call__(self, weights: np.ndarray) -> np.ndarray:
        of_image = weights[:, self._group_of]
        scores = [self._areas(of_image, probabilities) for probabilities in self._probabilities]
        by_replicate = np.stack(scores, 1).reshape(len(weights), self.replicates, -1)
        return np.asarray(by_replicate.mean(-1))

    def _areas(self, weights: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        """Mean areas (draws,) of one classifier."""
        by_class = []
        for number, values in enumerate(probabilities.T):
            order = np.argsort(values, kind="stable")
            ordered = weights[:, order]
            positive = ordered * (self._labels[order] == number)
            # Equal values are one step of the curve.
            starts = np.flatnonzero(np.r_[True, np.diff(values[order]) > 0])
            ups, every = (np.add.reduceat(counts, starts, 1) for counts in (positive, ordered))
            downs = every - ups
            below = downs.cumsum(1) - downs / 2
            by_class.append(_ratio((ups * below).sum(1), ups.sum(1) * downs.sum(1)))
        areas = np.stack(by_class)
        known = np.isfinite(areas)
        return _ratio(np.where(known, areas, 0).sum(0), known.sum(0))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.asarray(np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0))


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
        error_of_test=float(np.concatenate(of_groups).std()),
        groups=groups,
        effective_groups=arm.effective_groups,
        rarest=arm.rarest,
    )


def effective_number(sizes: np.ndarray) -> float:
    """The number of equal groups that groups of these sizes are equivalent to (Kish 1965)."""
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979, step-down). Raises `ValueError` for NaN."""
    if not np.isfinite(p_values).all():
        raise ValueError(f"a p-value is not a number: {list(p_values)}")
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, running)
    return list(adjusted.tolist())


def tost(differences: Sequence[float], margin: float) -> float:
    """p-value of "the difference exceeds ± margin" (two one-sided t tests, Schuirmann 1987); 1
    without spread."""
    values = np.asarray(differences, dtype=float)
    error = float(stats.sem(values))
    if error <= 1e-12:
        return 1.0
    freedom = len(values) - 1
    above = stats.t.sf((values.mean() + margin) / error, freedom)
    below = stats.t.cdf((values.mean() - margin) / error, freedom)
    return float(max(above, below))


def detectable_difference(
    differences: Sequence[float], resampled: Resampled, level: float = 0.95
) -> float:
    """The true difference that such a study finds in 80 of 100 repetitions: the larger of the two
    methods' differences, because both must find it."""
    freedom = len(differences) - 1
    reach = stats.t.ppf((1 + level) / 2, freedom) + stats.t.ppf(POWER, freedom)
    by_t = reach * stats.sem(np.asarray(differences, dtype=float))
    return float(max(by_t, _normal_reach(level) * resampled.draws.std()))


def groups_needed(resampled: Resampled, effect: float, level: float = 0.95) -> int:
    """The number of test groups that finds `effect` in 80 of 100 studies, with unlimited
    replicates."""
    short = _normal_reach(level) * resampled.error_of_test / abs(effect)
    return math.ceil(resampled.groups * short**2)


def _normal_reach(level: float) -> float:
    return float(stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(POWER))


def replicates_needed(
    differences: Sequence[float], effect: float, level: float = 0.95
) -> int | None:
    """The number of replicates with this spread that finds `effect` in 80 of 100 studies; None
    above 1,000."""
    spread = float(np.std(np.asarray(differences, dtype=float), ddof=1))
    counts = np.arange(3, 1001)
    reach = stats.t.ppf((1 + level) / 2, counts - 1) + stats.t.ppf(POWER, counts - 1)
    enough = counts[reach * spread / np.sqrt(counts) <= abs(effect)]
    return int(enough[0]) if len(enough) else None


def standardised(differences: Sequence[float]) -> float | None:
    """Effect size of paired differences: mean over standard deviation (Cohen's d_z), corrected for
    bias (Hedges 1981). None without spread, and for two pairs, where the correction yields 0."""
    values = np.asarray(differences, dtype=float)
    spread = float(values.std(ddof=1))
    if spread <= 1e-12 or len(values) < 3:
        return None
    return float(values.mean() / spread * (1 - 3 / (4 * (len(values) - 1) - 1)))


def wilcoxon(differences: Sequence[float]) -> float | None:
    """p-value of the signed-rank test (Wilcoxon 1945, exact without ties); None below
    `LEAST_FOR_WILCOXON` replicates, and if all differences are 0."""
    values = np.asarray(differences, dtype=float)
    if len(values) < LEAST_FOR_WILCOXON or not values.any():
        return None
    return float(stats.wilcoxon(values).pvalue)


def saturation(
    ratios: Sequence[float], scores: np.ndarray, margin: float, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """The lowest ratio within `margin` of the best, with its 95% percentile interval over resampled
    replicates.

    ratios: rising, the first of them 0. scores: (replicates, ratios).
    """
    chosen = np.random.default_rng(seed).integers(0, len(scores), (draws, len(scores)))
    means = np.concatenate([scores.mean(0, keepdims=True), scores[chosen].mean(1)])
    near = means >= means.max(1, keepdims=True) - margin
    points = np.asarray(ratios)[near.argmax(1)]
    low, high = np.quantile(points[1:], [0.025, 0.975], method="inverted_cdf")
    return float(points[0]), float(low), float(high)


def mcnemar(labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> float:
    """Exact McNemar test of two classifiers on the same images: p-value of "equally accurate".

    Descriptive, for a single replicate: pooled over seeds, 60% of null differences would be
    significant.
    """
    only_first = int(((first == labels) & (second != labels)).sum())
    only_second = int(((first != labels) & (second == labels)).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def verdicts(
    contrasts: Sequence[tuple[Sequence[float], Resampled]], margin: float, level: float = 0.95
) -> list[Verdict]:
    """Judge all contrasts of a study together: (paired differences, bootstrap) of each.

    `helps` or `harms` needs both p-values below 1 - level after Holm over the contrasts.
    `equivalent` needs both methods to put the difference within ± margin in the same way and, if
    the metric is a mean over classes, `LEAST_GROUPS` groups of each class, because missing images
    cannot show a difference. Otherwise the word is `undecided`, as with too few replicates or test
    groups.
    """
    # The smallest p-value must be below 1 - strictest.
    strictest = 1 - (1 - level) / max(len(contrasts), 1)
    effects = [paired_t(differences, level) for differences, _ in contrasts]
    intervals = [resampled.interval(level) for _, resampled in contrasts]
    p_values = np.maximum(
        holm([effect.p for effect in effects]), holm([interval.p for interval in intervals])
    )
    equivalences = np.maximum(
        holm([tost(differences, margin) for differences, _ in contrasts]),
        holm([resampled.beyond(margin) for _, resampled in contrasts]),
    )
    judged = []
    for index, (differences, resampled) in enumerate(contrasts):
        effect, interval = effects[index], intervals[index]
        p, equivalence = float(p_values[index]), float(equivalences[index])
        near = paired_t(differences, 2 * level - 1), resampled.interval(2 * level - 1)
        obstacle = _obstacle(differences, resampled, 1 - strictest)
        word: Word = "undecided"
        if obstacle:
            pass
        elif p < 1 - level and effect.estimate * interval.estimate > 0:
            word = "helps" if effect.estimate > 0 else "harms"
        elif equivalence < 1 - level and (resampled.rarest or LEAST_GROUPS) >= LEAST_GROUPS:
            word = "equivalent"
        judged.append(
            Verdict(
                word=word, effect=effect, bootstrap=interval,
                low=min(effect.low, interval.low), high=max(effect.high, interval.high),
                p_adjusted=p, equivalence_p=equivalence, margin=margin,
                detectable=(
                    None if obstacle else detectable_difference(differences, resampled, strictest)
                ),
                replicates=len(differences),
                replicates_needed=replicates_needed(differences, margin, strictest),
                groups=resampled.groups,
                groups_needed=groups_needed(resampled, margin, strictest),
                obstacle=obstacle, effect_size=standardised(differences),
                wilcoxon_p=wilcoxon(differences),
                near_low=min(estimate.low for estimate in near),
                near_high=max(estimate.high for estimate in near),
            )
        )  # fmt: skip
    return judged


def _obstacle(
    differences: Sequence[float], resampled: Resampled, strictest: float
) -> Notice | None:
    """Why this comparison cannot be decided."""
    replicates, groups = len(differences), resampled.groups
    if replicates < LEAST_REPLICATES:
        return Notice.of("few_replicates", replicates=replicates, minimum=LEAST_REPLICATES)
    if groups < LEAST_GROUPS:
        return Notice.of("few_groups", groups=groups, minimum=LEAST_GROUPS)
    effective = float(resampled.effective_groups or groups)
    if effective < LEAST_GROUPS - 1e-9:
        return Notice.of(
            "unequal_groups", groups=groups, effective=effective, minimum=LEAST_GROUPS
        )
    minimum = math.ceil(2 / strictest)
    if len(resampled.draws) < minimum:
        return Notice.of("few_draws", minimum=minimum)
    return Notice.of("no_spread") if np.ptp(differences) <= 1e-12 else None
