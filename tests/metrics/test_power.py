"""What a study can find, against formulas and against simulated verdicts."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from engine.metrics.power import Design, detectable, size_needed
from engine.metrics.resampling import Resampled


def design(replicates: float, groups: float, count: int = 5, effective: float = 1000) -> Design:
    """One baseline, from the standard deviations of a replicate and of the test set's error."""
    return Design(np.array([[replicates**2]]), np.array([[groups**2]]), count, effective, 0.025)


def test_with_replicates_alone_it_is_the_power_of_the_t_test() -> None:
    found = design(0.02, 1e-9, count=8).detectable()
    # The noncentral t distribution.
    shift = found * np.sqrt(8) / 0.02
    assert stats.nct.sf(stats.t.isf(0.025, 7), 7, shift) == pytest.approx(0.8, abs=0.03)


def test_with_test_groups_alone_it_is_the_power_of_the_z_test() -> None:
    assert design(1e-6, 0.02).detectable() == pytest.approx(2.8 * 0.02, rel=0.05)


def test_few_groups_need_a_larger_difference() -> None:
    assert design(1e-6, 0.02, effective=25).detectable() > design(1e-6, 0.02).detectable()


def test_two_equal_baselines_are_harder_to_beat_than_one() -> None:
    both = Design(np.eye(2) * 0.02**2, np.eye(2) * 0.01**2, 5, 1000, 0.025)
    assert both.detectable() > design(0.02, 0.01).detectable()


def test_the_size_that_is_needed_is_a_joint_one() -> None:
    """Each alone, as if there were no end of the other, would be too little."""
    small = design(0.03, 0.01)
    needed = size_needed(small, 0.02)
    assert needed is not None
    replicates, times = needed
    assert small.sized(replicates, times).power(0.02) >= 0.8
    unlimited = next(n for n in range(5, 200)
                     if small.sized(n, 1e9).power(0.02) >= 0.8)  # fmt: skip
    assert replicates >= unlimited
    assert times > 1
    assert size_needed(design(0.001, 0.001), 0.05) == (5, 1)
    assert size_needed(design(10.0, 10.0), 0.001) is None


def test_the_detectable_difference_has_an_interval_and_a_limit() -> None:
    found = detectable(design(0.02, 0.01))
    assert found.low < found.estimate < found.high
    # The spread of five replicates is known within a factor of 0.6 to 2.9.
    only = detectable(design(0.02, 1e-9))
    assert only.high / only.estimate == pytest.approx(2.87, rel=0.05)
    assert detectable(design(0.02, 0.01), possible=0.03).high == 0.03


def test_design_keeps_what_baselines_share() -> None:
    random = np.random.default_rng(0)
    noise, own = random.normal(size=4000), random.normal(size=(2, 4000))
    draws = [Resampled(0.0, noise + 0.1 * part, noise + 0.1 * part, 200) for part in own]
    differences = [[0.0, 1.0, 2.0, 3.0, 4.0], [0.1, 1.0, 2.1, 3.0, 4.0]]
    found = Design.of(list(zip(differences, draws, strict=True)), 0.025)
    assert found.of_groups[0, 1] > 0.9
    assert found.of_replicates[0, 1] > 2.4
    assert (found.replicates, found.effective) == (5, 200)
