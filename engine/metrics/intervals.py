"""Intervals that carry both sources of chance: replicates (would other fits and seeds agree?) and
test groups (would other patients?)."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from engine.results.comparison import Effect


def of_mean(
    replicates: np.ndarray, of_groups: np.ndarray, groups: float, level: float = 0.95,
    share: bool = False,
) -> Effect:  # fmt: skip
    """The interval of the mean of replicates.

    replicates: values on the real test set (n,). of_groups: the mean in test sets with resampled
    groups (draws,). groups: their effective number. share: the metric lies between 0 and 1, and so
    does the interval.

    Both variances are added, with degrees of freedom by Satterthwaite 1946. The spread of
    replicates contains their disagreement on these images, which the resampled groups contain too,
    so that the interval is rather too wide than too narrow. A single replicate leaves the test
    groups alone.
    """
    count, mean = len(replicates), float(np.mean(replicates))
    variances = [float(np.var(replicates, ddof=1)) / count] if count > 1 else []
    freedoms = [count - 1.0] if count > 1 else []
    few = max(min(groups, len(of_groups)) - 1, 1.0)
    # Draws with replacement underestimate the variance of few groups.
    variances.append(float(np.var(of_groups)) * (few + 1) / few)
    freedoms.append(few)
    total = sum(variances)
    if share and (mean <= 0 or mean >= 1 or total <= 1e-18):
        return _exact(mean, groups, level)
    if total <= 1e-18:
        return Effect(estimate=mean, low=mean, high=mean)
    freedom = total**2 / sum(v**2 / f for v, f in zip(variances, freedoms, strict=True))
    reach = float(stats.t.ppf((1 + level) / 2, freedom)) * math.sqrt(total)
    if not share:
        return Effect(estimate=mean, low=mean - reach, high=mean + reach)
    # On the scale of log odds, where an interval near 0 or 1 is not symmetric.
    centre, reach = math.log(mean / (1 - mean)), reach / (mean * (1 - mean))
    low, high = (1 / (1 + math.exp(-min(max(end, -700), 700)))
                 for end in (centre - reach, centre + reach))  # fmt: skip
    return Effect(estimate=mean, low=low, high=high)


def _exact(mean: float, groups: float, level: float) -> Effect:
    """The interval of a share without spread, as if each group were one image (Clopper and Pearson
    1934). Without images everything is possible."""
    if groups <= 0:
        return Effect(estimate=mean, low=0.0, high=1.0)
    tail, successes = (1 - level) / 2, mean * groups
    low = stats.beta.ppf(tail, successes, groups - successes + 1) if mean > 0 else 0.0
    high = stats.beta.ppf(1 - tail, successes + 1, groups - successes) if mean < 1 else 1.0
    return Effect(estimate=mean, low=float(low), high=float(high))


def jackknifed(values: np.ndarray) -> np.ndarray:
    """Values with a block of groups left out, (blocks, …), spread as those of resampled test sets
    are: their standard deviation is the jackknife's standard error (Shao and Wu 1989)."""
    mean = values.mean(0)
    return np.asarray(mean + (values - mean) * math.sqrt(len(values) - 1))
