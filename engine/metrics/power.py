"""What a study of a given size can find, and which size finds a given difference: by simulation of
the whole rule of `engine.metrics.significance`, with all baselines and both of its methods.

A simulated study draws replicates and the error of its test set from normal distributions with the
covariances of the real one. All baselines are equally good in it, the hardest case for an arm that
must beat every one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from engine.metrics.resampling import MANY_GROUPS, Resampled

POWER = 0.8
_STUDIES = 1000
_REPLICATES = (5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200)
_TIMES_GROUPS = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 20, 30, 50, 100)


@dataclass(frozen=True)
class Design:
    """The size of a study and the spread of an arm's differences from its baselines.

    of_replicates: covariance (baselines, baselines) of a replicate's differences. of_groups: that
    of the error by the test groups. effective: number of equal groups. alpha: one-sided level of
    both methods, after any correction.
    """

    of_replicates: np.ndarray
    of_groups: np.ndarray
    replicates: int
    effective: float
    alpha: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[Sequence[float], Resampled]], alpha: float) -> Design:
        """The design of a study: an arm's differences from each baseline."""
        differences = np.asarray([values for values, _ in pairs], dtype=float)
        resampled = [draws for _, draws in pairs]
        sizes = {len(draws.of_groups) for draws in resampled}
        if len(sizes) == 1:
            of_groups = np.atleast_2d(np.cov([draws.of_groups for draws in resampled]))
        else:  # some draws had no value and were replaced, so that they are not paired
            of_groups = np.diag([draws.error_of_test**2 for draws in resampled])
        return cls(
            np.atleast_2d(np.cov(differences)), of_groups, differences.shape[1],
            min(draws.effective for draws in resampled), alpha,
        )  # fmt: skip

    def sized(self, replicates: int, times: float) -> Design:
        """The same study with another number of replicates and `times` as many groups."""
        return replace(
            self, replicates=replicates, of_groups=self.of_groups / times,
            effective=self.effective * times,
        )  # fmt: skip

    def spread_by(self, replicates: float, groups: float) -> Design:
        """The same study with other variances, as multiples."""
        return replace(
            self, of_replicates=self.of_replicates * replicates, of_groups=self.of_groups * groups
        )

    def differences_found(self) -> np.ndarray:
        """For each simulated study, the smallest true difference from all baselines that it finds:
        (studies,)."""
        random = np.random.default_rng(0)
        count, shape = self.replicates, (_STUDIES, len(self.of_groups))
        of_replicates, of_groups = _root(self.of_replicates), _root(self.of_groups)
        mean = random.normal(size=shape) @ of_groups.T
        mean += random.normal(size=shape) @ of_replicates.T / math.sqrt(count)
        variance = _variances(of_replicates, count - 1, random)
        by_t = stats.t.isf(self.alpha, count - 1) * np.sqrt(variance / count)
        # A bootstrap of few replicates underestimates their variance.
        resampled = variance * (count - 1) / count**2 + np.diag(self.of_groups)
        by_bootstrap = self._reach() * np.sqrt(resampled)
        return np.asarray((np.maximum(by_t, by_bootstrap) - mean).max(1))

    def _reach(self) -> float:
        """Standard errors that the bootstrap needs for a p-value of alpha."""
        if self.effective < MANY_GROUPS:
            return float(stats.t.isf(self.alpha, max(self.effective - 1, 1.0)))
        return float(stats.norm.isf(self.alpha))

    def detectable(self) -> float:
        """The true difference that 80 of 100 such studies find."""
        return float(np.quantile(self.differences_found(), POWER))

    def power(self, difference: float) -> float:
        """The share of such studies that find a true difference."""
        return float((self.differences_found() <= difference).mean())


def _root(covariance: np.ndarray) -> np.ndarray:
    """A matrix whose product with its transpose is the covariance, which may be singular."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors * np.sqrt(values.clip(min=0)))


def _variances(root: np.ndarray, freedom: int, random: np.random.Generator) -> np.ndarray:
    """Sample variances of normal values with this root of their covariance (studies, size)."""
    size = len(root)
    if freedom < size:
        values = random.normal(size=(_STUDIES, freedom, size)) @ root.T
        return np.asarray((values**2).mean(1))
    # The diagonal of a Wishart matrix by its triangular factor (Bartlett 1933), so that many
    # replicates cost no more than few.
    factor = np.tril(random.normal(size=(_STUDIES, size, size)), -1)
    diagonal = np.arange(size)
    factor[:, diagonal, diagonal] = np.sqrt(random.chisquare(freedom - diagonal, (_STUDIES, size)))
    return np.asarray(((root @ factor) ** 2).sum(-1) / freedom)


@dataclass(frozen=True)
class Detectable:
    """The difference that 80 of 100 such studies find. low, high: its 95% interval, because the
    spread is estimated from few replicates and groups."""

    estimate: float
    low: float
    high: float


def detectable(design: Design, possible: float = math.inf) -> Detectable:
    """What a study of this size can find. possible: the largest difference there can be."""

    def times(freedom: float) -> tuple[float, float]:
        """The range of a variance as multiples of its estimate."""
        return tuple(freedom / stats.chi2.ppf([0.975, 0.025], freedom))

    of_replicates, of_groups = times(design.replicates - 1), times(max(design.effective - 1, 1.0))
    low, high = (
        design.spread_by(*multiples).detectable()
        for multiples in zip(of_replicates, of_groups, strict=True)
    )
    return Detectable(*(min(value, possible) for value in (design.detectable(), low, high)))


def size_needed(design: Design, difference: float) -> tuple[int, float] | None:
    """The number of replicates and the multiple of test groups with which 80 of 100 studies find a
    true difference: of all such pairs the one that adds least, counting a doubling of either alike.
    None beyond 200 replicates or 100 times the groups.
    """
    counts = sorted({design.replicates, *(n for n in _REPLICATES if n > design.replicates)})
    best: tuple[float, int, float] | None = None
    for times in _TIMES_GROUPS:
        # More replicates never find less.
        first, last = 0, len(counts)
        while first < last:
            middle = (first + last) // 2
            if design.sized(counts[middle], times).power(difference) >= POWER:
                last = middle
            else:
                first = middle + 1
        if first == len(counts):
            continue
        added = math.log(times) + math.log(counts[first] / design.replicates)
        if best is None or added < best[0]:
            best = added, counts[first], times
    return best and best[1:]
