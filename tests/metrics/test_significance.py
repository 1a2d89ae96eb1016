"""Intervals compared with scipy and by simulation: chance must be called chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import sparse, stats
from sklearn.metrics import roc_auc_score

from engine.core.errors import DataError
from engine.core.notice import Notice
from engine.metrics.classification import Metric, accuracy, macro_f1
from engine.metrics.resampling import (
    AreaScores,
    ConfusionScores,
    Resampled,
    bootstrap,
    confusions_by_group,
)
from engine.metrics.significance import (
    Claim,
    Paired,
    holm,
    mcnemar,
    paired_t,
    saturation,
    standardised,
    tost,
    verdicts,
    wilcoxon,
)
from engine.results.comparison import Verdict


def judged(
    pairs: Sequence[tuple[Sequence[float], Resampled]], margin: float, sized: bool = False
) -> list[Verdict]:
    """The verdicts of arms that are each compared with one baseline."""
    return verdicts([Claim({"b": Paired(*pair)}, "b", "b") for pair in pairs], margin, sized=sized)


def resample(
    one: Sequence[sparse.csr_array], other: Sequence[sparse.csr_array], metric: Metric, draws: int,
    seed: int,
) -> Resampled:  # fmt: skip
    return bootstrap(ConfusionScores(one, metric), ConfusionScores(other, metric), draws, seed)


def test_t_interval_equals_scipy() -> None:
    values = [0.01, 0.03, 0.02, 0.05, -0.01]
    found, want = paired_t(values), stats.ttest_1samp(values, 0)
    assert found.p == pytest.approx(want.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(want.confidence_interval(0.95)))


def test_differences_without_spread_give_a_point() -> None:
    assert paired_t([0.0, 0.0, 0.0]).p == 1.0
    found = paired_t([0.02, 0.02])
    assert (found.low, found.high, found.p) == (0.02, 0.02, 1.0)
    assert tost([0.0, 0.0, 0.0], 0.01) == 1.0
    with pytest.raises(ValueError, match="an interval needs two"):
        paired_t([0.1])


def test_holm_equals_the_textbook_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_equivalence_needs_a_small_spread() -> None:
    assert tost([0.001, -0.001, 0.0005, 0.0, 0.001], 0.01) < 0.05
    assert tost([0.02, -0.02, 0.01, -0.01, 0.0], 0.01) > 0.05
    assert tost([0.02, 0.021, 0.019], 0.01) > 0.95


def test_mcnemar_is_the_exact_test_of_the_discordant_pairs() -> None:
    labels = np.zeros(20, dtype=int)
    one, other = labels.copy(), labels.copy()
    one[:2], other[5:13] = 1, 1
    assert mcnemar(one == labels, other == labels) == pytest.approx(stats.binomtest(8, 10).pvalue)
    assert mcnemar(one == labels, one == labels) == 1.0


def matrices(accuracy_of: list[float], groups: int, seed: int, size: int = 3) -> list[Any]:
    """Confusions (groups, 2 * 2) on the same images, for classifiers with these accuracies."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, groups * size)
    names = np.repeat(np.arange(groups), size)
    found = []
    for share in accuracy_of:
        wrong = random.random(len(labels)) > share
        found.append(confusions_by_group(labels, np.where(wrong, 1 - labels, labels), names, 2))
    return found


def scores_of(counts: list[Any]) -> np.ndarray:
    return accuracy(np.stack([found.toarray().sum(0).reshape(2, 2) for found in counts]))


def test_confusions_by_group_add_up_to_the_whole() -> None:
    found = confusions_by_group(
        np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0]), np.array(["b", "a", "b", "a"]), 2
    ).toarray()
    assert found.shape == (2, 4)
    assert found.sum(0).tolist() == [2, 0, 1, 1]
    assert found[0].tolist() == [1, 0, 0, 1]  # a


def test_bootstrap_finds_a_planted_difference_and_its_size() -> None:
    one, other = matrices([0.9] * 5, 200, 1), matrices([0.8] * 5, 200, 2)
    found = resample(one, other, accuracy, 1000, seed=0)
    interval = found.interval()
    truth = float((scores_of(one) - scores_of(other)).mean())
    assert found.estimate == pytest.approx(truth)
    assert interval.low < truth < interval.high
    assert interval.p < 0.01
    assert resample(one, other, accuracy, 1000, seed=0).interval() == interval


def test_test_set_error_halves_with_four_times_the_images() -> None:
    few = resample(
        matrices([0.9], 100, 1, 1),
        matrices([0.8], 100, 2, 1),
        accuracy,
        2000,
        0,
    )
    many = resample(
        matrices([0.9], 400, 1, 1),
        matrices([0.8], 400, 2, 1),
        accuracy,
        2000,
        0,
    )
    # Two independent classifiers on n images: the variances of their accuracies add up.
    assert few.error_of_test == pytest.approx(np.sqrt((0.09 + 0.16) / 100), rel=0.2)
    assert few.error_of_test / many.error_of_test == pytest.approx(2, rel=0.15)


def test_bootstrap_p_value_is_never_zero() -> None:
    found = resample(
        matrices([1.0] * 3, 50, 1),
        matrices([0.0] * 3, 50, 1),
        macro_f1,
        400,
        0,
    )
    assert found.interval().p == pytest.approx(2 / 401)
    assert found.beyond(2.0) == pytest.approx(1 / 401)


def test_arms_of_different_shapes_are_rejected() -> None:
    with pytest.raises(ValueError, match="5 and 6 groups"):
        resample(
            matrices([1.0], 5, 1),
            matrices([1.0], 6, 1),
            accuracy,
            200,
            0,
        )


def drawn(estimate: float, spread: float, groups: int = 100) -> Resampled:
    """The result of a bootstrap around an estimate."""
    draws = estimate + spread * stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
    return Resampled(estimate, draws, draws, groups)


CLEAR = [0.04, 0.05, 0.045, 0.05, 0.048]
NOTHING = [0.001, -0.001, 0.0005, 0.0, 0.001]


@pytest.mark.parametrize(
    ("differences", "resampled", "word"),
    [
        (CLEAR, drawn(0.047, 0.005), "helps"),
        ([-value for value in CLEAR], drawn(-0.047, 0.005), "harms"),
        # One of the two methods is not enough.
        (CLEAR, drawn(0.047, 0.04), "undecided"),
        ([0.2, -0.1, 0.15, -0.12, 0.1], drawn(0.047, 0.005), "undecided"),
        (NOTHING, drawn(0.0, 0.003), "equivalent"),
        # All seeds agree, but on a test set that says nothing about so small a difference.
        (NOTHING, drawn(0.0, 0.02), "undecided"),
        # Too few to decide, however clear.
        (CLEAR[:4], drawn(0.047, 0.005), "undecided"),
        (CLEAR, drawn(0.047, 0.005, groups=9), "undecided"),
        ([0.02] * 5, drawn(0.02, 0.001), "undecided"),
        ([0.0] * 5, drawn(0.0, 0.001), "undecided"),
    ],
)
def test_verdict_follows_from_both_methods(
    differences: list[float], resampled: Resampled, word: str
) -> None:
    (found,) = judged([(differences, resampled)], margin=0.01)
    assert found.word == word
    assert found.replicates == len(differences)
    assert found.low <= min(found.effect.low, found.bootstrap.low)
    assert found.high >= max(found.effect.high, found.bootstrap.high)


def test_reason_for_undecided_is_given() -> None:
    def obstacle(differences: list[float], groups: int = 100) -> Notice | None:
        return judged([(differences, drawn(0.047, 0.005, groups))], 0.01)[0].obstacle

    assert obstacle(CLEAR[:4]) == Notice.of("few_replicates", replicates=4, minimum=5)
    assert obstacle(CLEAR, groups=1) == Notice.of("few_groups", groups=1, minimum=20)
    assert obstacle([0.047] * 5) == Notice.of("no_spread")
    assert obstacle(CLEAR) is None


def test_unequal_groups_count_by_their_effective_number() -> None:
    def word(sizes: list[int]) -> str:
        groups = np.repeat(np.arange(len(sizes)), sizes)
        labels = np.arange(len(groups)) % 2

        def scores(share: float, seed: int) -> ConfusionScores:
            random = np.random.default_rng(seed)
            made = [np.where(random.random(len(labels)) < share, labels, 1 - labels)
                    for _ in range(6)]  # fmt: skip
            held = [confusions_by_group(labels, one, groups, 2) for one in made]
            return ConfusionScores(held, accuracy, of_classes=False)

        one, other = scores(0.9, 1), scores(0.6, 2)
        ones = np.ones((1, len(sizes)))
        differences = (one(ones) - other(ones))[0].tolist()
        return judged([(differences, bootstrap(one, other, 400, 0))], 0.01)[0].word

    assert word([20] * 30) == "helps"
    # Half of all images belong to one patient.
    assert word([580] + [20] * 29) == "undecided"


def test_every_verdict_needs_images_of_every_class() -> None:
    few = drawn(0.0, 0.003)
    assert judged([(NOTHING, replace(few, rarest=30))], 0.01)[0].word == "equivalent"
    assert judged([(NOTHING, replace(few, rarest=1))], 0.01)[0].word == "undecided"
    (found,) = judged([(CLEAR, replace(drawn(0.047, 0.005), rarest=19))], 0.01)
    assert found.word == "undecided"
    assert found.obstacle == Notice.of("few_of_class", groups=19, minimum=20)
    assert judged([(CLEAR, replace(drawn(0.047, 0.005), rarest=20))], 0.01)[0].word == "helps"


def test_interval_of_an_equivalent_contrast_is_within_the_margin() -> None:
    (found,) = judged([(NOTHING, drawn(0.0, 0.0058))], 0.01)
    assert found.word == "equivalent"
    assert found.low < -0.01  # of 95%
    assert -0.01 < found.near_low < found.near_high < 0.01


def test_too_few_draws_are_reported() -> None:
    many = [(CLEAR, drawn(0.047, 0.005))] * 60
    assert judged(many, 0.01)[0].obstacle == Notice.of("few_draws", minimum=2400)


def test_draws_without_a_class_are_repeated() -> None:
    labels = np.r_[np.ones(4, int), np.zeros(56, int)]
    random = np.random.default_rng(0)
    held = [random.random((5, 60, 2)) for _ in range(2)]
    one, other = (AreaScores(labels, part, np.arange(60)) for part in held)
    found = bootstrap(one, other, 2000, 0)
    assert len(found.draws) == 2000
    assert np.isfinite(found.draws).all()
    assert np.isfinite(found.error_of_test)
    # With two groups of one class each, half of all draws have a single class.
    groups = np.r_[np.zeros(56, int), np.ones(4, int)]
    sides = [AreaScores(labels[::-1], part, groups) for part in held]
    with pytest.raises(DataError, match="too few images of a class"):
        bootstrap(sides[0], sides[1], 2001, 3)


def test_nan_p_value_is_rejected() -> None:
    with pytest.raises(ValueError, match="not a number"):
        holm([float("nan"), 0.01])


@pytest.mark.parametrize("contrasts", [1, 6])
def test_detectable_difference_is_found_among_other_contrasts(contrasts: int) -> None:
    random = np.random.default_rng(1)
    found, studies = 0, 150
    # Five values with exactly the spread of the distribution.
    exact = np.array([-2.0, -1.0, 0.0, 1.0, 2.0])
    exact *= 0.02 / exact.std(ddof=1)
    nothing = [(random.normal(0, 0.02, 5).tolist(), drawn(0.0, 0.02)) for _ in range(contrasts - 1)]
    (first, *_) = judged([(exact.tolist(), drawn(0.0, 0.005)), *nothing], 0.05, sized=True)
    shift = first.detectable
    assert shift is not None
    for _ in range(studies):
        values = random.normal(shift, 0.02, 5)
        (again, *_) = judged([(values.tolist(), drawn(shift, 0.005)), *nothing], 0.05)
        found += again.word == "helps"
    assert found / studies > 0.7


def test_more_contrasts_need_larger_differences() -> None:
    clear = ([0.01, 0.03, 0.02, 0.025, 0.004], drawn(0.018, 0.007))
    nothing = ([0.01, -0.01, 0.02, -0.02, 0.0], drawn(0.0, 0.02))
    assert judged([clear], 0.001)[0].word == "helps"
    assert judged([clear, nothing, nothing], 0.001)[0].word == "undecided"


def test_draws_of_one_distribution_are_rarely_called_different() -> None:
    words = []
    for study in range(60):
        random = np.random.default_rng(study)
        shares = 0.8 + random.normal(0, 0.02, 10)
        one, other = (matrices(part.tolist(), 60, 2 * study + n) for n, part in
                      enumerate((shares[:5], shares[5:])))  # fmt: skip
        differences = (scores_of(one) - scores_of(other)).tolist()
        resampled = resample(one, other, accuracy, 300, study)
        words.append(judged([(differences, resampled)], 0.001)[0].word)
    assert sum(word in ("helps", "harms") for word in words) <= 6


def test_true_difference_is_rarely_called_equivalent() -> None:
    """Agreement between seeds says nothing about the size of the test set."""
    words = []
    labels, names = np.zeros(300, dtype=int), np.arange(300)
    for study in range(60):
        random = np.random.default_rng(study)
        # The difficulty of each image for an arm; nearly the same for all of its seeds.
        hard_for_one, hard_for_other = random.random((2, 300))
        one: list[Any] = []
        other: list[Any] = []
        for noise in random.normal(0, 0.002, (5, 300)):
            for found, hard, share in ((one, hard_for_one, 0.83), (other, hard_for_other, 0.80)):
                wrong = (hard + noise > share).astype(int)
                found.append(confusions_by_group(labels, wrong, names, 2))
        differences = (scores_of(one) - scores_of(other)).tolist()
        resampled = resample(one, other, accuracy, 300, study)
        words.append(judged([(differences, resampled)], 0.01)[0].word)
    assert sum(word == "equivalent" for word in words) <= 3


def test_seeds_of_a_fit_are_averaged_before_fits_are_compared() -> None:
    held = matrices([0.9, 0.5, 0.8, 0.6], 50, 1)
    weights = np.random.default_rng(0).multinomial(50, np.full(50, 1 / 50), 7).astype(float)
    each = ConfusionScores(held, accuracy)(weights)
    of_fits = ConfusionScores(held, accuracy, replicates=2)(weights)
    assert of_fits == pytest.approx(np.stack([each[:, :2].mean(1), each[:, 2:].mean(1)], 1))


def test_areas_of_drawn_groups_equal_scikit_learn_with_weights() -> None:
    random = np.random.default_rng(3)
    labels, groups = random.integers(0, 3, 90), random.integers(0, 30, 90).astype(str)
    # Rounded, so that ties count.
    probabilities = random.dirichlet(np.ones(3), (2, 90)).round(1)
    scores = AreaScores(labels, probabilities, groups)
    weights = random.multinomial(scores.groups, np.full(scores.groups, 1 / scores.groups), 4)
    of_image = weights[:, np.unique(groups, return_inverse=True)[1]]
    want = [
        [
            np.mean(
                [
                    roc_auc_score(labels == number, held[:, number], sample_weight=drawn)
                    for number in range(3)
                ]
            )
            for held in probabilities
        ]
        for drawn in of_image
    ]
    assert scores(weights.astype(float)) == pytest.approx(np.asarray(want), abs=1e-9)


def test_effect_size_is_bias_corrected_cohen_s_d() -> None:
    values = [0.01, 0.03, 0.02, 0.05, -0.01]
    cohen = np.mean(values) / np.std(values, ddof=1)
    assert standardised(values) == pytest.approx(cohen * (1 - 3 / 15))
    assert standardised([0.02, 0.02]) is None
    assert standardised([0.02, 0.03]) is None  # the correction would make every effect zero


def test_signed_rank_test_equals_scipy_and_needs_eight() -> None:
    values = [0.01, 0.03, 0.02, 0.05, -0.011, 0.04, 0.06, 0.07]
    assert wilcoxon(values) == pytest.approx(stats.wilcoxon(values).pvalue)
    assert wilcoxon(values[:7]) is None
    assert wilcoxon([0.0] * 9) is None


def test_saturation_is_where_more_images_add_at_most_the_margin() -> None:
    rising = np.asarray([0.5, 0.6, 0.698, 0.7]) + np.random.default_rng(1).normal(0, 0.001, (6, 1))
    assert saturation([0, 0.5, 1, 2], rising, rising[None], 0.01) == (1.0, 1.0, 1.0)
    flat = np.asarray([0.7, 0.7, 0.69]) + np.zeros((5, 1))
    assert saturation([0, 1, 2], flat, flat[None], 0.01)[0] == 0.0
    noise = np.random.default_rng(2).normal(0, 0.02, (40, 5, 3))
    noisy = np.asarray([0.5, 0.6, 0.61]) + noise[0]
    point, low, high = saturation([0, 1, 2], noisy, noisy[None], 0.01)
    assert low <= point <= high
    assert low < high
    # Other images may show a saturation elsewhere, though all replicates agree on these.
    agreed = np.asarray([0.5, 0.6, 0.605]) + np.zeros((5, 1))
    elsewhere = agreed + noise.mean(1, keepdims=True)
    assert saturation([0, 1, 2], agreed, elsewhere, 0.01)[2] == 2.0


def paired(centre: float, spread: float = 0.005) -> Paired:
    """Five replicates and many draws around a difference."""
    return Paired([centre + 0.004 * step for step in (-1, -0.5, 0, 0.5, 1)], drawn(centre, spread))


def test_an_arm_helps_only_if_it_beats_every_baseline() -> None:
    beats_both = Claim({"real": paired(0.05), "oversampled": paired(0.04)}, "real", "real")
    (found,) = verdicts([beats_both], 0.01)
    assert (found.word, found.against) == ("helps", "oversampled")
    assert found.effect.estimate == pytest.approx(0.04)
    assert [pair.against for pair in found.baselines] == ["real", "oversampled"]

    # The best baseline on val is beaten, another one is not.
    equals_one = Claim({"real": paired(0.05), "oversampled": paired(0.0, 0.02)}, "real", "real")
    (found,) = verdicts([equals_one], 0.01)
    assert (found.word, found.against) == ("undecided", "oversampled")
    assert found.p_helps > 0.025


def test_harm_is_judged_against_real_images_alone() -> None:
    worse_than_one = Claim({"real": paired(0.0, 0.02), "cutmix": paired(-0.05)}, "cutmix", "real")
    assert verdicts([worse_than_one], 0.01)[0].word == "undecided"
    worse_than_real = Claim({"real": paired(-0.05), "cutmix": paired(-0.06)}, "cutmix", "real")
    (found,) = verdicts([worse_than_real], 0.01)
    assert (found.word, found.against) == ("harms", "real")


def test_equivalence_is_to_the_best_baseline_on_val() -> None:
    claim = Claim({"real": paired(0.001, 0.003), "oversampled": paired(-0.03)}, "real", "real")
    (found,) = verdicts([claim], 0.01)
    assert (found.word, found.against) == ("equivalent", "real")
    (found,) = verdicts([replace(claim, best="oversampled")], 0.01)
    assert found.word == "undecided"


def test_one_of_several_equal_baselines_is_rarely_beaten_by_chance() -> None:
    """An arm that equals the best of four baselines would `help` in a third of studies, if it were
    compared only with the best on val (simulated in `benchmarks/known_answers.py`)."""
    random, words = np.random.default_rng(5), []
    for _ in range(300):
        arm = 0.8 + 0.01 * random.normal(size=5)
        baselines = {f"b{n}": 0.8 - 0.005 * n + 0.01 * random.normal(size=5) for n in range(4)}
        noise = 0.004 * random.normal(size=500)
        claim = Claim(
            {
                name: Paired(
                    (arm - values).tolist(),
                    Resampled(
                        float((arm - values).mean()), (arm - values).mean() + noise, noise, 100
                    ),
                )
                for name, values in baselines.items()
            },
            "b0", "b0",
        )  # fmt: skip
        words.append(verdicts([claim], 0.001, sized=False)[0].word)
    assert words.count("helps") <= 0.05 * len(words)
