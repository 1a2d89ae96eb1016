"""How many real images a synthetic one is worth, where the truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from engine.comparison.exchange import Arm, Scores, exchange_rates

FRACTIONS = (0.25, 0.5, 1.0)


def scores(mean: float, seed: int = 0, spread: float = 0.005) -> Scores:
    """Five replicates around a mean, on a test set that shifts all of them alike."""
    random = np.random.default_rng(seed)
    replicates = mean + spread * np.asarray([-1.0, -0.5, 0.0, 0.5, 1.0])
    shift = np.random.default_rng(99).normal(0, 0.01, (400, 1))
    return Scores(replicates, replicates + shift + random.normal(0, 1e-4, (400, 5)))


def real(*means: float) -> dict[float, Scores]:
    return {share: scores(mean) for share, mean in zip(FRACTIONS, means, strict=True)}


def test_a_score_on_the_curve_is_read_as_a_fraction() -> None:
    # As good as half of 1,000 real images, from a quarter of them and 500 synthetic ones.
    arm = Arm("g x2", 0.25, 500, scores(0.8))
    (rate,) = exchange_rates(real(0.7, 0.8, 0.9), [arm], 1000, 0)
    assert rate.as_good_as == pytest.approx(0.5)
    assert rate.rate == pytest.approx(0.5)
    assert rate.low < 0.5 < rate.high
    # The error of the test set is common to all scores and widens nothing.
    assert rate.high - rate.low < 0.2
    assert rate.censored is None


def test_a_score_between_two_points_is_read_over_the_logarithm() -> None:
    (rate,) = exchange_rates(real(0.7, 0.8, 0.9), [Arm("g", 0.25, 100, scores(0.75))], 1000, 0)
    assert rate.as_good_as == pytest.approx(math.sqrt(0.25 * 0.5))


def test_a_score_beyond_the_curve_is_censored() -> None:
    (rate,) = exchange_rates(real(0.7, 0.8, 0.9), [Arm("g", 1.0, 100, scores(0.95))], 1000, 0)
    assert (rate.rate, rate.censored) == (None, "beyond the curve")
    assert rate.high == math.inf
    near = Arm("g", 1.0, 100, scores(0.9001))
    (open_above,) = exchange_rates(real(0.7, 0.8, 0.9), [near], 1000, 0)
    assert math.isfinite(open_above.low)
    assert open_above.high == math.inf
    (below,) = exchange_rates(real(0.7, 0.8, 0.9), [Arm("g", 0.25, 100, scores(0.5))], 1000, 0)
    assert below.censored == "below the curve"


def test_a_flat_curve_gives_no_rate() -> None:
    arm = Arm("g", 0.25, 100, scores(0.8))
    (rate,) = exchange_rates(real(0.8, 0.8, 0.8), [arm], 1000, 0)
    assert (rate.rate, rate.censored) == (None, "the curve of real images does not rise")


def test_a_dip_of_the_curve_is_evened_out() -> None:
    arm = Arm("g", 0.25, 100, scores(0.75))
    (rate,) = exchange_rates(real(0.7, 0.8, 0.76), [arm], 1000, 0)
    # The last two count as one point, 0.78, in their middle.
    middle = math.sqrt(0.5)
    assert rate.as_good_as == pytest.approx(0.25 * (middle / 0.25) ** (0.05 / 0.08))


@pytest.mark.parametrize("count", [3, 5])
def test_means_of_few_replicates_vary_as_a_t_distribution_demands(count: int) -> None:
    replicates = np.random.default_rng(1).normal(0.8, 0.01, count)
    few = Scores(replicates, np.tile(replicates, (400, 1)))
    drawn = few.drawn(np.random.default_rng(2), np.zeros(20_000, int))
    error = replicates.std(ddof=1) / math.sqrt(count)
    assert drawn.mean() == pytest.approx(0.8, abs=0.02)
    assert drawn.std() == pytest.approx(error * stats.t.ppf(0.975, count - 1) / 1.96, rel=0.02)
