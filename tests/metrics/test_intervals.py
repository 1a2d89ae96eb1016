"""Intervals cover the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from engine.metrics.intervals import jackknifed, of_mean


def test_without_error_of_the_test_set_it_is_students_interval() -> None:
    values = np.asarray([0.01, 0.03, 0.02, 0.05, -0.01])
    found = of_mean(values, np.full(400, 0.02), 1000)
    want = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(want))


def test_a_single_replicate_leaves_the_error_of_the_test_set() -> None:
    drawn = np.random.default_rng(0).normal(0.5, 0.03, 100_000)
    found = of_mean(np.asarray([0.5]), drawn, 31)
    reach = stats.t.ppf(0.975, 30) * 0.03 * np.sqrt(31 / 30)
    assert found.high - 0.5 == pytest.approx(reach, rel=0.02)


def test_shares_stay_between_0_and_1() -> None:
    random = np.random.default_rng(0)
    found = of_mean(np.asarray([0.99, 0.98, 1.0]), random.normal(0.99, 0.03, 400), 30, share=True)
    assert 0 < found.low < 0.99 < found.high < 1
    # All right on 30 images: Clopper and Pearson's limit.
    every = of_mean(np.ones(5), np.ones(400), 30, share=True)
    assert (every.low, every.high) == pytest.approx((0.025 ** (1 / 30), 1.0))
    none = of_mean(np.zeros(5), np.zeros(400), 30, share=True)
    assert (none.low, none.high) == pytest.approx((0.0, 1 - 0.025 ** (1 / 30)))


@pytest.mark.parametrize("images", [100, 300, 1000])
def test_accuracy_of_new_fits_on_new_images_is_covered(images: int) -> None:
    """Images differ in difficulty, fits in skill; the truth is the expected accuracy."""
    random = np.random.default_rng(images)
    covered, studies = 0, 300
    many = random.normal(1.5, 2.0, 200_000) + random.normal(0, 0.3, 200_000)
    truth = float((1 / (1 + np.exp(-many))).mean())
    for _ in range(studies):
        hard = random.normal(1.5, 2.0, images)
        chance = 1 / (1 + np.exp(-(hard + random.normal(0, 0.3, (5, 1)))))
        right = random.random((5, images)) < chance
        weights = random.multinomial(images, np.full(images, 1 / images), 200) / images
        found = of_mean(right.mean(1), weights @ right.mean(0), images, share=True)
        covered += found.low <= truth <= found.high
    assert covered / studies > 0.925


def test_jackknife_error_of_a_mean_is_the_textbook_one() -> None:
    values = np.random.default_rng(1).normal(0, 1, 200)
    left_out = np.asarray([np.delete(values, place).mean() for place in range(200)])
    assert jackknifed(left_out).std() == pytest.approx(values.std(ddof=1) / np.sqrt(200), rel=0.01)
