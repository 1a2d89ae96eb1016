"""Intervals against scipy and by simulation: what is called chance must be chance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from engine.metrics.classification import accuracy, macro_f1
from engine.metrics.significance import (
    Interval,
    bootstrap,
    confusions_by_group,
    detectable_difference,
    holm,
    mcnemar,
    paired_t,
    replicates_needed,
    tost,
    verdicts,
)


def test_the_t_interval_is_scipy_s() -> None:
    values = [0.01, 0.03, 0.02, 0.05, -0.01]
    found, want = paired_t(values), stats.ttest_1samp(values, 0)
    assert found.p == pytest.approx(want.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(want.confidence_interval(0.95)))


def test_differences_without_spread_give_a_point() -> None:
    assert paired_t([0.0, 0.0, 0.0]).p == 1.0
    found = paired_t([0.02, 0.02])
    assert (found.low, found.high, found.p) == (0.02, 0.02, 0.0)
    with pytest.raises(ValueError, match="an interval needs two"):
        paired_t([0.1])


def test_holm_is_the_textbook_s_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_equivalence_is_shown_by_a_small_spread_alone() -> None:
    assert tost([0.001, -0.001, 0.0005, 0.0, 0.001], 0.01) < 0.05
    assert tost([0.02, -0.02, 0.01, -0.01, 0.0], 0.01) > 0.05
    assert tost([0.02, 0.021, 0.019], 0.01) > 0.95


def test_mcnemar_is_the_exact_test_of_the_discordant_pairs() -> None:
    labels = np.zeros(20, dtype=int)
    one, other = labels.copy(), labels.copy()
    one[:2], other[5:13] = 1, 1
    assert mcnemar(labels, one, other) == pytest.approx(stats.binomtest(8, 10).pvalue)
    assert mcnemar(labels, one, one) == 1.0


def matrices(accuracy_of: list[float], groups: int, seed: int, size: int = 3) -> np.ndarray:
    """Confusion matrices (replicates, groups, 2, 2) of classifiers of these accuracies."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, groups * size)
    names = np.repeat(np.arange(groups), size)
    found = []
    for share in accuracy_of:
        wrong = random.random(len(labels)) > share
        found.append(confusions_by_group(labels, np.where(wrong, 1 - labels, labels), names, 2))
    return np.stack(found)


def test_confusions_by_group_add_up_to_the_whole() -> None:
    found = confusions_by_group(
        np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0]), np.array(["b", "a", "b", "a"]), 2
    )
    assert found.shape == (2, 2, 2)
    assert found.sum(0).tolist() == [[2, 0], [1, 1]]
    assert found[0].tolist() == [[1, 0], [0, 1]]  # a


def test_the_bootstrap_finds_a_planted_difference_and_its_size() -> None:
    one, other = matrices([0.9] * 5, 200, 1), matrices([0.8] * 5, 200, 2)
    found = bootstrap(one, other, accuracy, 1000, seed=0)
    truth = float(accuracy(one.sum(1)).mean() - accuracy(other.sum(1)).mean())
    assert found.estimate == pytest.approx(truth)
    assert found.low < truth < found.high
    assert found.p < 0.01
    assert bootstrap(one, other, accuracy, 1000, seed=0) == found


def test_the_bootstrap_s_p_value_is_never_nil() -> None:
    found = bootstrap(matrices([1.0] * 3, 50, 1), matrices([0.0] * 3, 50, 1), macro_f1, 400, 0)
    assert found.p == pytest.approx(2 / 401)


def test_arms_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        bootstrap(matrices([1.0], 5, 1), matrices([1.0], 6, 1), accuracy, 200, 0)


def certain(estimate: float, p: float) -> Interval:
    return Interval(estimate, estimate - 0.01, estimate + 0.01, p)


@pytest.mark.parametrize(
    ("differences", "interval", "word"),
    [
        ([0.04, 0.05, 0.045, 0.05, 0.048], certain(0.047, 0.001), "helps"),
        ([-0.04, -0.05, -0.045, -0.05, -0.048], certain(-0.047, 0.001), "harms"),
        # One of the two methods is not enough.
        ([0.04, 0.05, 0.045, 0.05, 0.048], certain(0.047, 0.2), "undecided"),
        ([0.2, -0.1, 0.15, -0.12, 0.1], certain(0.047, 0.001), "undecided"),
        ([0.001, -0.001, 0.0005, 0.0, 0.001], certain(0.0, 0.9), "equivalent"),
    ],
)
def test_the_word_follows_from_both_intervals(
    differences: list[float], interval: Interval, word: str
) -> None:
    (found,) = verdicts([(differences, interval)], margin=0.01)
    assert found.word == word
    assert found.replicates == 5


def test_more_contrasts_ask_for_more() -> None:
    clear = ([0.01, 0.03, 0.02, 0.025, 0.004], certain(0.018, 0.02))
    nothing = ([0.01, -0.01, 0.02, -0.02, 0.0], certain(0.0, 0.9))
    assert verdicts([clear], 0.001)[0].word == "helps"
    assert verdicts([clear, nothing, nothing], 0.001)[0].word == "undecided"


def test_a_detectable_difference_is_found_in_about_80_of_100_studies() -> None:
    random = np.random.default_rng(0)
    spread, count = 0.02, 5
    truth = detectable_difference(spread * stats.norm.ppf(np.linspace(0.1, 0.9, count)))
    scale = np.std(spread * stats.norm.ppf(np.linspace(0.1, 0.9, count)), ddof=1)
    studies = random.normal(truth, scale, (4000, count))
    found = np.mean([paired_t(values).p < 0.05 for values in studies])
    assert 0.75 < found < 0.88


def test_of_two_draws_of_one_distribution_few_are_called_different() -> None:
    words = []
    for study in range(60):
        random = np.random.default_rng(study)
        shares = 0.8 + random.normal(0, 0.02, 10)
        one, other = (matrices(part.tolist(), 60, 2 * study + n) for n, part in
                      enumerate((shares[:5], shares[5:])))  # fmt: skip
        differences = (accuracy(one.sum(1)) - accuracy(other.sum(1))).tolist()
        interval = bootstrap(one, other, accuracy, 300, study)
        words.append(verdicts([(differences, interval)], 0.001)[0].word)
    assert sum(word in ("helps", "harms") for word in words) <= 6


def test_the_number_of_replicates_needed_falls_with_the_effect() -> None:
    differences = [0.02, -0.01, 0.03, 0.0, 0.01]
    large, small = replicates_needed(differences, 0.05), replicates_needed(differences, 0.01)
    assert large is not None
    assert small is not None
    assert large < small
    assert replicates_needed([0.5, -0.5, 0.4], 0.001) is None
