"""Is a difference more than chance: intervals, corrections and the verdict of a comparison.

Differences are paired: replicate i of one arm against replicate i of the other (the same seed, the
same test images). Two sources of chance are looked at, by two methods that must agree:

    paired t     over replicates: would other seeds say the same?
    bootstrap    over replicates and test groups at once: would other patients say the same?
                 (percentile interval; Efron and Tibshirani 1993, ch. 13; resampling two factors
                 as Owen 2007, "The pigeonhole bootstrap")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from engine.metrics.classification import Metric

Word = Literal["helps", "harms", "equivalent", "undecided"]
POWER = 0.8
_BLOCK = 64


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval at `level`, and the two-sided p-value of "there is none"."""

    estimate: float
    low: float
    high: float
    p: float
    level: float = 0.95


@dataclass(frozen=True)
class Verdict:
    """What a comparison comes to.

    effect: mean difference of the metric, by paired t. bootstrap: the same by resampling.
    p_adjusted: the larger of the two p-values after Holm. equivalence_p: TOST within `margin`.
    detectable: the difference that this many replicates would find in 80 of 100 studies.
    """

    word: Word
    effect: Interval
    bootstrap: Interval
    p_adjusted: float
    equivalence_p: float
    margin: float
    detectable: float
    replicates: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def paired_t(differences: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean of paired differences.

    Raises `ValueError` with fewer than two. Where all are equal there is no spread to judge by: the
    interval is a point, and p is 1 for a difference of nil and 0 for any other.
    """
    values = np.asarray(differences, dtype=float)
    if len(values) < 2:
        raise ValueError(f"{len(values)} replicates; an interval needs two")
    mean, error = float(values.mean()), float(stats.sem(values))
    if error <= 1e-12:
        return Interval(mean, mean, mean, 1.0 if abs(mean) <= 1e-12 else 0.0, level)
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, len(values) - 1))
    return Interval(mean, mean - half, mean + half, p, level)


def confusions_by_group(
    labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray, classes: int
) -> np.ndarray:
    """Counts (groups, classes, classes): one confusion matrix for each group, in sorted order."""
    names, inverse = np.unique(groups, return_inverse=True)
    cells = (inverse * classes + labels) * classes + predicted
    found = np.bincount(cells, minlength=len(names) * classes * classes)
    return found.reshape(len(names), classes, classes)


def bootstrap(
    one: np.ndarray, other: np.ndarray, metric: Metric, draws: int, seed: int, level: float = 0.95
) -> Interval:
    """Difference `one` - `other` of a metric's mean over replicates, by resampling replicates and
    groups.

    one, other: confusion matrices (replicates, groups, classes, classes) of the same images.
    """
    if one.shape != other.shape:
        raise ValueError(f"the arms differ in shape: {one.shape} and {other.shape}")
    replicates, groups = one.shape[:2]
    random = np.random.default_rng(seed)
    flat = np.concatenate([one, other]).reshape(2 * replicates, groups, -1).astype(np.float32)
    found = []
    for start in range(0, draws, _BLOCK):
        count = min(_BLOCK, draws - start)
        weights = random.multinomial(groups, np.full(groups, 1 / groups), count).astype(np.float32)
        scores = metric(
            np.tensordot(weights, flat, (1, 1)).reshape(count, 2 * replicates, *one.shape[2:])
        )
        differences = scores[:, :replicates] - scores[:, replicates:]
        chosen = random.integers(0, replicates, (count, replicates))
        found.append(np.take_along_axis(differences, chosen, 1).mean(1))
    values = np.concatenate(found)
    estimate = float((metric(one.sum(1)) - metric(other.sum(1))).mean())
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    # Never nil: the smallest p-value that so many draws can show (Davison and Hinkley 1997, 4.2).
    tail = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return Interval(
        estimate, float(low), float(high), min(1.0, 2 * (tail + 1) / (draws + 1)), level
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979, step-down)."""
    order = np.argsort(p_values)
    adjusted = np.empty(len(p_values))
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, (len(p_values) - rank) * p_values[index])
        adjusted[index] = min(1.0, running)
    return adjusted.tolist()


def tost(differences: Sequence[float], margin: float) -> float:
    """p-value of "the difference lies beyond ± margin" (two one-sided t tests, Schuirmann 1987)."""
    values = np.asarray(differences, dtype=float)
    error = float(stats.sem(values))
    if error <= 1e-12:
        return 0.0 if abs(float(values.mean())) < margin else 1.0
    freedom = len(values) - 1
    above = stats.t.sf((values.mean() + margin) / error, freedom)
    below = stats.t.cdf((values.mean() - margin) / error, freedom)
    return float(max(above, below))


def detectable_difference(differences: Sequence[float], level: float = 0.95) -> float:
    """The true difference that so many replicates of this spread find in 80 of 100 studies."""
    freedom = len(differences) - 1
    reach = stats.t.ppf((1 + level) / 2, freedom) + stats.t.ppf(POWER, freedom)
    return float(reach * stats.sem(np.asarray(differences, dtype=float)))


def replicates_needed(
    differences: Sequence[float], effect: float, level: float = 0.95
) -> int | None:
    """How many replicates of this spread would find `effect` in 80 of 100 studies; None beyond
    1,000."""
    spread = float(np.std(np.asarray(differences, dtype=float), ddof=1))
    for count in range(3, 1001):
        reach = stats.t.ppf((1 + level) / 2, count - 1) + stats.t.ppf(POWER, count - 1)
        if reach * spread / np.sqrt(count) <= abs(effect):
            return count
    return None


def mcnemar(labels: np.ndarray, one: np.ndarray, other: np.ndarray) -> float:
    """Exact McNemar test of two classifiers on the same images: p-value of "equally often right".

    Descriptive, for one replicate: pooled over seeds it calls 60% of null differences significant.
    """
    only_one = int(((one == labels) & (other != labels)).sum())
    only_other = int(((one != labels) & (other == labels)).sum())
    if only_one + only_other == 0:
        return 1.0
    return float(stats.binomtest(only_one, only_one + only_other).pvalue)


def verdicts(
    contrasts: Sequence[tuple[Sequence[float], Interval]], margin: float, level: float = 0.95
) -> list[Verdict]:
    """Judge all contrasts of a study together: (paired differences, bootstrap interval) of each.

    `helps` or `harms` needs both p-values below 1 - level after Holm over the contrasts; else
    `equivalent` where TOST shows the difference within ± margin; else `undecided`.
    """
    effects = [paired_t(differences, level) for differences, _ in contrasts]
    by_t = holm([effect.p for effect in effects])
    by_bootstrap = holm([interval.p for _, interval in contrasts])
    found = []
    for index, (differences, interval) in enumerate(contrasts):
        p = max(by_t[index], by_bootstrap[index])
        equivalence = tost(differences, margin)
        word: Word = "undecided"
        if p < 1 - level and effects[index].estimate * interval.estimate > 0:
            word = "helps" if effects[index].estimate > 0 else "harms"
        elif equivalence < 1 - level:
            word = "equivalent"
        found.append(
            Verdict(
                word, effects[index], interval, p, equivalence, margin,
                detectable_difference(differences, level), len(differences),
            )
        )  # fmt: skip
    return found
