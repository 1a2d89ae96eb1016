"""Every metric of a study, compared with the field's reference library on the same arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from prdc import compute_prdc
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import DescrStatsW, ttost_paired
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassAveragePrecision,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
)
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from engine.metrics.classification import METRICS, confusion, f1
from engine.metrics.frechet import Reference, frechet_distance
from engine.metrics.kernel import kernel_distance
from engine.metrics.moments import Moments, merged
from engine.metrics.prdc import prdc
from engine.metrics.probabilities import (
    average_precision,
    expected_calibration_error,
    probability_metrics,
    roc_auc,
)
from engine.metrics.significance import holm, mcnemar, paired_t, tost

CLASSES = 4


class Features(torch.nn.Module):
    """An embedder for torchmetrics whose images are vectors already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        return vectors


def vectors(count: int, width: int, seed: int, shift: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    mixed = random.standard_normal((count, width)) @ random.standard_normal((width, width))
    return np.asarray(mixed / np.sqrt(width) + shift)


def predictions(images: int = 500) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    labels = random.choice(CLASSES, images, p=[0.6, 0.25, 0.1, 0.05])
    logits = random.standard_normal((images, CLASSES)) + 1.5 * np.eye(CLASSES)[labels]
    # Single precision, like stored probabilities.
    return labels, torch.from_numpy(logits).softmax(1).float().numpy()


def told(metric: Any, labels: np.ndarray, probabilities: np.ndarray) -> Any:
    """The result of torchmetrics, in double precision."""
    return metric(torch.from_numpy(probabilities).double(), torch.from_numpy(labels)).numpy()


@pytest.mark.parametrize(
    ("own", "kind", "average"),
    [
        ("accuracy", MulticlassAccuracy, "micro"),
        ("balanced_accuracy", MulticlassAccuracy, "macro"),
        ("macro_precision", MulticlassPrecision, "macro"),
        ("macro_recall", MulticlassRecall, "macro"),
        ("weighted_precision", MulticlassPrecision, "weighted"),
        ("macro_f1", MulticlassF1Score, "macro"),
        ("weighted_f1", MulticlassF1Score, "weighted"),
    ],
)
def test_decision_metrics_equal_torchmetrics(own: str, kind: Any, average: str) -> None:
    labels, probabilities = predictions()
    matrix = confusion(labels, probabilities.argmax(1), CLASSES)
    # torchmetrics divides numbers of images in single precision.
    assert float(METRICS[own](matrix)) == pytest.approx(
        float(told(kind(CLASSES, average=average), labels, probabilities)), abs=1e-6
    )


def test_class_metrics_and_confusion_equal_torchmetrics() -> None:
    labels, probabilities = predictions()
    matrix = confusion(labels, probabilities.argmax(1), CLASSES)
    assert (
        matrix.tolist() == told(MulticlassConfusionMatrix(CLASSES), labels, probabilities).tolist()
    )
    np.testing.assert_allclose(
        f1(matrix), told(MulticlassF1Score(CLASSES, average=None), labels, probabilities), atol=1e-6
    )


def test_areas_and_calibration_equal_torchmetrics() -> None:
    labels, probabilities = predictions()
    for own, kind in ((roc_auc, MulticlassAUROC), (average_precision, MulticlassAveragePrecision)):
        np.testing.assert_allclose(
            own(labels, probabilities),
            told(kind(CLASSES, average=None, thresholds=None), labels, probabilities), atol=1e-6,
        )  # fmt: skip
    assert expected_calibration_error(labels, probabilities) == pytest.approx(
        float(told(MulticlassCalibrationError(CLASSES, n_bins=15), labels, probabilities)), abs=1e-6
    )
    assert probability_metrics(labels, probabilities)["roc_auc"] == pytest.approx(
        float(told(MulticlassAUROC(CLASSES), labels, probabilities)), abs=1e-6
    )


@pytest.mark.parametrize("count", [400, 90])
def test_frechet_distance_equals_torchmetrics(count: int) -> None:
    one, other = vectors(count, 64, 0), vectors(count + 20, 64, 1, shift=0.3)
    metric = FrechetInceptionDistance(feature=Features(64), input_img_size=(1, 8, 8))
    metric.set_dtype(torch.float64)
    for held, real in ((one, True), (other, False)):
        # In two pieces, as a loader would.
        for piece in np.array_split(held, 2):
            metric.update(torch.from_numpy(piece), real=real)
    found = float(metric.compute())
    assert frechet_distance(one, other) == pytest.approx(found, rel=1e-6)
    pieces = merged(Moments.of(piece) for piece in np.array_split(other, 7))
    assert Reference(Moments.of(one)).distance(pieces) == pytest.approx(found, rel=1e-6)


def test_kernel_distance_equals_torchmetrics() -> None:
    one, other = vectors(200, 32, 0), vectors(200, 32, 1, shift=0.2)
    # One subset of all vectors, so nothing is random.
    metric = KernelInceptionDistance(feature=Features(32), subsets=1, subset_size=200)
    metric.set_dtype(torch.float64)
    metric.update(torch.from_numpy(one), real=True)
    metric.update(torch.from_numpy(other), real=False)
    assert kernel_distance(one, other, 0).estimate == pytest.approx(
        float(metric.compute()[0]), rel=1e-6
    )


@pytest.mark.parametrize("k", [3, 5])
def test_prdc_equals_the_prdc_package(k: int) -> None:
    real, synthetic = vectors(300, 16, 0), vectors(250, 16, 0, shift=0.2) * 1.1
    found, want = prdc(real, synthetic, k), compute_prdc(real, synthetic, nearest_k=k)
    for name, value in want.items():
        assert 0 < value < 2
        assert getattr(found, name) == pytest.approx(value, abs=1e-9), name


@pytest.mark.parametrize("seed", range(4))
def test_holm_and_mcnemar_equal_statsmodels(seed: int) -> None:
    random = np.random.default_rng(seed)
    values = random.random(7) ** 3
    assert holm(values.tolist()) == pytest.approx(
        multipletests(values, method="holm")[1], abs=1e-12
    )
    labels = random.integers(0, 3, 80)
    one, other = (np.where(random.random(80) < 0.3, 3, labels) for _ in range(2))
    right = [(one == labels), (other == labels)]
    table = [[int((a & b).sum()) for b in (right[1], ~right[1])] for a in (right[0], ~right[0])]
    assert mcnemar(one == labels, other == labels) == pytest.approx(
        statsmodels_mcnemar(table, exact=True).pvalue, abs=1e-9
    )


@pytest.mark.parametrize("seed", range(4))
def test_paired_tests_equal_statsmodels(seed: int) -> None:
    differences = np.random.default_rng(seed).normal(0.004, 0.006, 5).tolist()
    found, plain = paired_t(differences), DescrStatsW(differences)
    assert (found.low, found.high) == pytest.approx(plain.tconfint_mean(0.05), abs=1e-9)
    assert found.p == pytest.approx(plain.ttest_mean(0)[1], abs=1e-9)
    want = ttost_paired(differences, np.zeros(5), -0.01, 0.01)[0]
    assert tost(differences, 0.01) == pytest.approx(want, abs=1e-9)
