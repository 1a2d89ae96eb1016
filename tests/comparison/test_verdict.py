"""The verdict of declared contrasts, with and without the replicates that failed on val."""

from __future__ import annotations

import numpy as np

from engine.comparison.classified import Predictions
from engine.comparison.figures import Figures
from engine.comparison.verdict import DeclaredContrast, add_without_failed, compare
from engine.core.notice import Notice
from engine.results.comparison import FailedReplicate
from engine.settings import Evaluate
from engine.wording import failed_in_words, verdict_in_words

DECLARED = [DeclaredContrast("g", ("real",), "real", "real", claimed=True)]
SETTINGS = Evaluate(bootstrap_draws=400)


def figures(broken: int | None, fits: int = 6, images: int = 400) -> Figures:
    """An arm that is right for 15 points more images than `real`, but for one fit at chance."""
    random = np.random.default_rng(1)
    labels = np.arange(images) % 2
    shares = {"real": np.full(fits, 0.7), "g": np.full(fits, 0.85)}
    if broken is not None:
        shares["g"][broken] = 0.5
    probabilities = {
        arm: np.stack([
            np.eye(2, dtype=np.float32)[
                np.where(random.random(images) < share, labels, 1 - labels)
            ]
            for share in of_fits
        ])
        for arm, of_fits in shares.items()
    }  # fmt: skip
    groups = np.arange(images).astype(str)
    return Figures(Predictions(("a", "b"), labels, groups, probabilities, fits), 0)


def failed(replicate: int, arm: str = "g") -> FailedReplicate:
    reason = Notice.of("near_chance", mean=0.5, chance=0.5)
    return FailedReplicate(replicate=replicate, arm=arm, reason=reason)


def test_a_failure_of_an_arm_elsewhere_changes_nothing() -> None:
    whole = figures(broken=None)
    contrasts = compare(whole, DECLARED, "accuracy", SETTINGS, sized=False)
    other = [failed(place, "g only") for place in range(6)]
    (alone,) = add_without_failed(contrasts, whole, DECLARED, "accuracy", SETTINGS, other)
    assert alone.without_failed is None


def test_the_verdict_includes_failed_replicates_and_the_other_stands_beside_it() -> None:
    with_failure = figures(broken=3)
    contrasts = compare(with_failure, DECLARED, "accuracy", SETTINGS, sized=False)
    assert contrasts[0].word == "undecided"
    (both,) = add_without_failed(
        contrasts, with_failure, DECLARED, "accuracy", SETTINGS, [failed(3)]
    )
    assert both.word == "undecided"
    assert both.replicates == 6
    assert both.without_failed is not None
    assert both.without_failed.verdict is not None
    assert (both.without_failed.replicates, both.without_failed.verdict.word) == (5, "helps")
    assert "(5 left): helps, +1" in failed_in_words(both)


def test_without_failures_there_is_one_verdict() -> None:
    whole = figures(broken=None)
    contrasts = compare(whole, DECLARED, "accuracy", SETTINGS, sized=False)
    (alone,) = add_without_failed(contrasts, whole, DECLARED, "accuracy", SETTINGS, [])
    assert alone.word == "helps"
    assert alone.without_failed is None
    assert failed_in_words(alone) == ""


def test_too_few_replicates_left_give_no_second_verdict() -> None:
    two = figures(broken=1, fits=2)
    contrasts = compare(two, DECLARED, "accuracy", SETTINGS, sized=False)
    (alone,) = add_without_failed(contrasts, two, DECLARED, "accuracy", SETTINGS, [failed(1)])
    assert alone.without_failed is not None
    assert alone.without_failed.verdict is None
    assert "too few are left" in failed_in_words(alone)


def test_fits_of_a_file_are_its_own_claim() -> None:
    (claimed,) = compare(figures(None), DECLARED, "accuracy", SETTINGS)
    assert "6 generator fits, as the file states" in verdict_in_words([claimed], "accuracy", "real")
    assert claimed.detectable is not None
    assert claimed.detectable_low is not None
    assert claimed.detectable_low < claimed.detectable
