"""How many real images a synthetic one is worth.

At a fraction f of the real training images everything learns from that fraction alone, the
generator too. The score of an arm with synthetic images is read on the learning curve of real
images as a fraction g: the arm is as good as g of the real images. The exchange rate is the number
of real images gained, (g - f) * n, divided by the number of synthetic ones added.

The curve is the non-decreasing one nearest to the scores by least squares (isotonic regression,
Barlow et al. 1972), linear between its points over the logarithm of the fraction. A score above
the curve, or below it, has no g: it is censored. So is a curve that does not rise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.isotonic import isotonic_regression

_DRAWS = 2000


@dataclass(frozen=True)
class Scores:
    """The scores of an arm's replicates on test (replicates,), and on resampled test sets (draws,
    replicates), the same sets for all arms and fractions."""

    replicates: np.ndarray
    resampled: np.ndarray

    def drawn(self, random: np.random.Generator, sets: np.ndarray) -> np.ndarray:
        """Means over resampled replicates on resampled test sets: (draws,). Their deviations are
        widened for few replicates, as in the expanded percentile interval (Hesterberg 2015)."""
        count = len(self.replicates)
        chosen = random.integers(0, count, (len(sets), count))
        means = self.resampled[sets].mean(1)
        wider = 1.0
        if count > 1:
            wider = stats.t.ppf(0.975, count - 1) / stats.norm.ppf(0.975)
            wider *= math.sqrt(count / (count - 1))
        drawn = self.resampled[sets[:, None], chosen].mean(1)
        return np.asarray(means + wider * (drawn - means))


@dataclass(frozen=True)
class Arm:
    """An arm with synthetic images at a fraction of the real ones. added: synthetic images."""

    name: str
    fraction: float
    added: int
    scores: Scores


@dataclass(frozen=True)
class Rate:
    """Real images that a synthetic one is worth. as_good_as: the fraction of real images with the
    same score. low, high: the 95% interval of the rate over replicates and test groups; an end is
    infinite where the curve does not reach. censored: why the rate itself is unknown."""

    arm: str
    fraction: float
    added: int
    as_good_as: float | None
    rate: float | None
    low: float
    high: float
    censored: str | None


def exchange_rates(
    real: Mapping[float, Scores], arms: Sequence[Arm], images: int, seed: int
) -> list[Rate]:
    """The rate of each arm. real: of real images alone, by fraction, at least two. images: real
    training images at the fraction 1."""
    random = np.random.default_rng(seed)
    fractions = np.asarray(sorted(real))
    curve = _rising(np.asarray([[real[f].replicates.mean() for f in fractions]]))
    tries = len(next(iter(real.values())).resampled)
    sets = random.integers(0, tries, _DRAWS)
    curves = _rising(np.stack([real[f].drawn(random, sets) for f in fractions], 1))
    rates = []
    for arm in arms:
        score = np.asarray([arm.scores.replicates.mean()])
        (equal,) = _equal_fractions(fractions, curve, score)
        drawn = _equal_fractions(fractions, curves, arm.scores.drawn(random, sets))

        def rate(equal: np.ndarray, arm: Arm = arm) -> np.ndarray:
            return np.asarray((equal - arm.fraction) * images / arm.added)

        # Ends are draws themselves: an interval may begin or end where the curve does not reach.
        low, high = np.quantile(rate(drawn), [0.025, 0.975], method="inverted_cdf")
        known = math.isfinite(equal)
        rates.append(
            Rate(
                arm.name, arm.fraction, arm.added, float(equal) if known else None,
                float(rate(np.asarray(equal))) if known else None, float(low), float(high),
                None if known else _why(curve[0], float(score[0])),
            )
        )  # fmt: skip
    return rates


def _rising(scores: np.ndarray) -> np.ndarray:
    """The isotonic regression of each row (draws, fractions)."""
    return np.stack([isotonic_regression(row) for row in scores])


def _equal_fractions(fractions: np.ndarray, curves: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The fraction at which each curve (draws, fractions) has each score (draws,): infinite above
    the curve, and minus infinity below it. A flat piece counts at its middle, and a
    curve without a rise has no fraction."""
    logs = np.log(fractions)
    equal = np.empty(len(curves))
    for row, (curve, score) in enumerate(zip(curves, scores, strict=True)):
        if score > curve[-1] or curve[-1] <= curve[0]:
            equal[row] = math.inf
        elif score < curve[0]:
            equal[row] = -math.inf
        else:
            values, piece = np.unique(curve, return_inverse=True)
            middles = np.bincount(piece, logs) / np.bincount(piece)
            equal[row] = math.exp(np.interp(score, values, middles))
    return equal


def _why(curve: np.ndarray, score: float) -> str:
    if curve[-1] <= curve[0]:
        return "the curve of real images does not rise"
    return "beyond the curve" if score > curve[-1] else "below the curve"
