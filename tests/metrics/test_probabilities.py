"""Metrics of probabilities, each compared with scikit-learn; calibration with the plain formula."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from engine.metrics.probabilities import (
    PROBABILITY_METRICS,
    average_precision,
    brier,
    expected_calibration_error,
    macro,
    probability_metrics,
    reliability,
    roc_auc,
)


def some(images: int = 400, seed: int = 0, digits: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Labels of four classes and probabilities, rounded so that many images tie."""
    random = np.random.default_rng(seed)
    labels = random.choice(4, images, p=[0.6, 0.25, 0.1, 0.05])
    scores = random.standard_normal((images, 4))
    scores[np.arange(images), labels] += 1
    likely = np.exp(scores).round(digits) + 0.01
    return labels, likely / likely.sum(1, keepdims=True)


def test_areas_equal_scikit_learn_with_ties() -> None:
    labels, probabilities = some(digits=0)
    assert len(np.unique(probabilities[:, 0])) < 300
    for number in range(4):
        case = labels == number, probabilities[:, number]
        assert roc_auc(labels, probabilities)[number] == pytest.approx(
            reference.roc_auc_score(*case), abs=1e-12
        )
        assert average_precision(labels, probabilities)[number] == pytest.approx(
            reference.average_precision_score(*case), abs=1e-12
        )


def test_resamples_are_scored_at_once_by_their_weights() -> None:
    labels, probabilities = some(200)
    weights = np.random.default_rng(1).multinomial(200, np.full(200, 1 / 200), (2, 3))
    found = roc_auc(labels, probabilities, weights)
    assert found.shape == (2, 3, 4)
    drawn = np.repeat(np.arange(200), weights[1, 2])
    for number in range(4):
        expected = reference.roc_auc_score(labels[drawn] == number, probabilities[drawn, number])
        assert found[1, 2, number] == pytest.approx(expected, abs=1e-12)


def test_undefined_area_is_nan_and_not_part_of_the_mean() -> None:
    labels, probabilities = some()
    wider = np.concatenate([probabilities, np.zeros((len(labels), 1))], axis=1)
    found = roc_auc(labels, wider)
    assert np.isnan(found).tolist() == [False] * 4 + [True]
    assert np.isnan(average_precision(labels, wider)).tolist() == [False] * 4 + [True]
    assert probability_metrics(labels, wider)["roc_auc"] == pytest.approx(found[:4].mean())
    alone = roc_auc(np.zeros(5, int), probabilities[:5])
    assert np.isnan(alone).all()
    assert np.isnan(macro(alone))


def test_brier_score_is_that_of_1950() -> None:
    labels, probabilities = some()
    assert brier(labels, probabilities) == pytest.approx(
        reference.brier_score_loss(labels, probabilities, labels=range(4), scale_by_half=False)
    )
    certain = np.eye(4)[labels]
    assert brier(labels, certain) == 0
    assert brier((labels + 1) % 4, certain) == 2


def plain_calibration_error(labels: np.ndarray, probabilities: np.ndarray, bins: int) -> float:
    confidence, predicted = probabilities.max(1), probabilities.argmax(1)
    found = 0.0
    for number in range(bins):
        here = (confidence > number / bins) & (confidence <= (number + 1) / bins)
        if here.any():
            gap = abs((predicted == labels)[here].mean() - confidence[here].mean())
            found += here.mean() * gap
    return found


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_equals_the_formula(bins: int) -> None:
    labels, probabilities = some()
    assert expected_calibration_error(labels, probabilities, bins) == pytest.approx(
        plain_calibration_error(labels, probabilities, bins), abs=1e-12
    )


def test_reliability_diagram_has_every_image_in_its_bin() -> None:
    confidence = np.array([0.55, 0.6, 0.61, 1.0])
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    found = reliability(np.array([0, 1, 0, 0]), probabilities, bins=5)
    assert found.count.tolist() == [0, 0, 2, 1, 1]  # an edge belongs to the bin below it
    assert found.confidence[2:].tolist() == pytest.approx([0.575, 0.61, 1.0])
    assert found.accuracy[2:].tolist() == [0.5, 1.0, 1.0]
    assert np.isnan(found.accuracy[:2]).all()


def test_stored_probabilities_give_the_same_figures() -> None:
    labels, probabilities = some()
    stored = probability_metrics(labels, probabilities.astype(np.float32))
    assert stored.keys() == PROBABILITY_METRICS.keys()
    assert stored == pytest.approx(probability_metrics(labels, probabilities), abs=1e-6)
