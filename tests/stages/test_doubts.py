"""Signs that a generator learnt nothing, and what cannot be judged."""

from __future__ import annotations

import numpy as np
import pytest

from engine.filters import Scores
from engine.stages.doubts import doubts_of, signs_of
from engine.wording import notice_in_words
from tests.results import labeler_report


def scores(labels: list[str], seed: int) -> Scores:
    vectors = np.random.default_rng(seed).normal(size=(len(labels), 4)).astype(np.float32)
    ids = np.asarray([f"{seed}.{row}" for row in range(len(labels))], dtype=object)
    return Scores(ids, np.asarray(labels, dtype=object), vectors, np.zeros(len(labels), np.uint64))


def test_a_rare_class_is_judged_by_train_if_val_has_too_few() -> None:
    made, train = scores(["rare"] * 40, 1), scores(["rare"] * 30, 2)
    assert signs_of(made, scores(["rare"] * 25, 3), scores([], 4), None).coverage is not None
    signs = signs_of(made, scores(["rare"] * 8, 3), train, None)
    assert signs.coverage is not None
    assert signs.pairs is None
    few = signs_of(made, scores(["rare"] * 8, 3), scores(["rare"] * 12, 2), None)
    assert (few.coverage, few.pairs) == (None, 12)
    (doubt,) = doubts_of(["rare"], few, None)
    assert "12 real and generated ones of the same classes, 20 are needed" in notice_in_words(doubt)


def test_a_class_that_the_labeler_does_not_recognise_is_named() -> None:
    def doubts(right: int, images: int, requested: int = 9) -> list[str]:
        report = labeler_report(
            confusion=[[0, 0], [requested, 0]],
            confusion_val=[[50, 0], [images - right, right]],
        )
        return [notice_in_words(one) for one in doubts_of(["common", "rare"], None, report)]

    (text,) = doubts(0, 8)
    assert text.startswith("the labeler recognises 0 of 8 real val images of 'rare'")
    # Three of four wrong may be chance; so may 40 of 100 not be.
    assert doubts(1, 4) == doubts(45, 100) == doubts(0, 8, requested=0) == []
    assert doubts(35, 100)


def test_accuracy_on_val_is_that_of_the_requested_classes() -> None:
    report = labeler_report(
        agreement_val=0.9, confusion=[[0, 0], [3, 7]], confusion_val=[[90, 0], [8, 2]]
    )
    assert report.accuracy_as_requested == pytest.approx(0.2)
    assert report.accuracy_on_val([1, 3]) == pytest.approx((1 + 3 * 0.2) / 4)
    absent = report.model_copy(update={"confusion_val": [[80, 10], [0, 0]]})
    assert absent.accuracy_as_requested == 0.9
    assert absent.accuracy_on_val([1, 3]) == pytest.approx(8 / 9)
