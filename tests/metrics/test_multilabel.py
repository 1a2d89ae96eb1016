"""Checked against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from engine.metrics import multilabel
from engine.metrics.probabilities import average_precision, roc_auc

RANDOM = np.random.default_rng(0)
TRUTH = RANDOM.random((200, 4)) < [0.5, 0.2, 0.05, 0.0]
PROBABILITIES = np.clip(0.4 * TRUTH + RANDOM.random((200, 4)) * 0.7, 0, 1).round(2)
DECISIONS = PROBABILITIES > 0.5
COUNTS = multilabel.label_counts(TRUTH, DECISIONS)


def test_counts_are_those_of_scikit_learn() -> None:
    np.testing.assert_array_equal(COUNTS, sk.multilabel_confusion_matrix(TRUTH, DECISIONS))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", 1 - sk.hamming_loss(TRUTH, DECISIONS)),
        ("macro_precision", sk.precision_score(TRUTH, DECISIONS, average="macro", zero_division=0)),
        ("macro_recall", sk.recall_score(TRUTH, DECISIONS, average="macro", zero_division=0)),
        ("macro_f1", sk.f1_score(TRUTH, DECISIONS, average="macro", zero_division=0)),
        ("weighted_f1", sk.f1_score(TRUTH, DECISIONS, average="weighted", zero_division=0)),
        (
            "weighted_precision",
            sk.precision_score(TRUTH, DECISIONS, average="weighted", zero_division=0),
        ),
        (
            "balanced_accuracy",
            np.mean(
                [sk.balanced_accuracy_score(TRUTH[:, n], DECISIONS[:, n]) for n in range(3)]
                + [np.mean(~DECISIONS[:, 3])]
            ),
        ),
        (
            "worst_class_recall",
            sk.recall_score(TRUTH[:, :3], DECISIONS[:, :3], average=None).min(),
        ),
    ],
)
def test_metric_equals_scikit_learn(name: str, expected: float) -> None:
    assert multilabel.METRICS[name](COUNTS) == pytest.approx(expected)
    # Leading axes are resamples.
    np.testing.assert_allclose(multilabel.METRICS[name](np.stack([COUNTS] * 3)), [expected] * 3)


def test_areas_equal_scikit_learn_and_are_undefined_without_an_image() -> None:
    for ours, theirs in (
        (roc_auc, sk.roc_auc_score), (average_precision, sk.average_precision_score)
    ):  # fmt: skip
        areas = ours(TRUTH, PROBABILITIES)
        expected = [theirs(TRUTH[:, n], PROBABILITIES[:, n]) for n in range(3)]
        np.testing.assert_allclose(areas[:3], expected)
        assert np.isnan(areas[3])
    mean = multilabel.PROBABILITY_METRICS["roc_auc"](TRUTH, PROBABILITIES)
    assert mean == pytest.approx(np.mean(roc_auc(TRUTH, PROBABILITIES)[:3]))


def test_calibration_of_exact_frequencies_is_perfect() -> None:
    probabilities = np.full((100, 1), 0.3)
    truth = np.arange(100)[:, None] < 30
    assert multilabel.expected_calibration_error(truth, probabilities) == pytest.approx(0, abs=1e-9)
    assert multilabel.expected_calibration_error(~truth, probabilities) == pytest.approx(0.4)
    assert multilabel.brier(truth, probabilities) == pytest.approx(0.3 * 0.7)
    assert multilabel.log_loss(truth, probabilities) == pytest.approx(
        sk.log_loss(truth[:, 0], probabilities[:, 0])
    )


def test_summary_has_every_label_and_no_confusion_matrix() -> None:
    summary = multilabel.summary(COUNTS, list("abcd"))
    assert summary["per_class"]["b"]["images"] == TRUTH[:, 1].sum()
    assert summary["per_class"]["d"]["f1"] == 0
    assert summary["confusion"] == []
