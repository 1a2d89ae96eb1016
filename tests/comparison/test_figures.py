"""Figures of arms from their predictions, with intervals over replicates and test images."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as reference

from engine.comparison.classified import Predictions
from engine.comparison.figures import Figures

CLASSES = ("a", "b", "c")


def predictions(fits: int = 2, seeds: int = 2, images: int = 60) -> Predictions:
    random = np.random.default_rng(1)
    labels = np.arange(images) % 3
    scores = random.standard_normal((fits * seeds, images, 3)) + 1.5 * np.eye(3)[labels]
    likely = np.exp(scores)
    return Predictions(
        CLASSES, labels, np.arange(images).astype(str),
        {"real": (likely / likely.sum(-1, keepdims=True)).astype(np.float32)}, fits,
    )  # fmt: skip


def test_figures_of_an_arm_are_means_of_its_classifiers_with_intervals() -> None:
    made = predictions()
    tested = Figures(made, 0).of("real", "real", 0.0, "baseline")
    of_arm = made.probabilities["real"]
    areas = [reference.roc_auc_score(made.labels, p, multi_class="ovr") for p in of_arm]
    assert tested.figures["roc_auc"].mean == pytest.approx(np.mean(areas))
    assert tested.classifiers["roc_auc"] == pytest.approx(areas)
    # Two classifiers of a fit are one replicate.
    assert tested.figures["roc_auc"].replicates == pytest.approx(np.reshape(areas, (2, 2)).mean(1))
    assert tested.figures["roc_auc"].low < np.mean(areas) < tested.figures["roc_auc"].high
    f1 = [reference.f1_score(made.labels, p.argmax(1), average="weighted") for p in of_arm]
    assert tested.figures["weighted_f1"].mean == pytest.approx(np.mean(f1))
    worst = [reference.recall_score(made.labels, p.argmax(1), average=None).min() for p in of_arm]
    assert tested.figures["worst_class_recall"].mean == pytest.approx(np.mean(worst))
    of_b = [reference.roc_auc_score(made.labels == 1, p[:, 1]) for p in of_arm]
    assert tested.per_class["b"].roc_auc == pytest.approx(np.mean(of_b))


def test_the_reliability_table_is_of_all_classifiers_together() -> None:
    made = predictions()
    tested = Figures(made, 0).of("real", "real", 0.0, "baseline")
    bins, classifiers = tested.reliability, made.probabilities["real"]
    assert sum(entry.images for entry in bins) == classifiers.shape[0] * classifiers.shape[1]
    right = sum(one.images * one.accuracy for one in bins)
    assert right / (4 * 60) == pytest.approx(tested.figures["accuracy"].mean)


def test_who_names_a_class_alone_gets_no_figure_of_probabilities() -> None:
    made = predictions()
    hard = np.eye(3, dtype=np.float32)[made.probabilities["real"].argmax(-1)]
    named = Predictions(CLASSES, made.labels, made.groups, {"real": hard}, 2)
    tested = Figures(named, 0).of("real", "real", 0.0, "baseline")
    assert "brier" not in tested.figures
    assert tested.per_class["a"].roc_auc is None
    assert tested.reliability == []
    assert "macro_f1" in tested.figures


def test_differences_and_gains_are_paired() -> None:
    """Two arms with the same predictions differ by nothing, on any test set."""
    made = predictions()
    same = dict.fromkeys(("real", "g"), made.probabilities["real"])
    twice = Predictions(CLASSES, made.labels, made.groups, same, 2)
    figures = Figures(twice, 0)
    for metric in ("macro_f1", "roc_auc", "brier"):
        none = figures.difference("g", "real", metric)
        assert (none.estimate, none.low, none.high) == (0.0, 0.0, 0.0)
    assert [gain.high for gain in figures.class_gains("g", "real")] == [0.0] * 3


def test_a_few_images_widen_every_interval() -> None:
    """All replicates agree on these images, but the images are few."""
    labels = np.arange(40) % 2
    right = np.arange(40) % 5 != 0
    said = np.where(right, labels, 1 - labels)
    sure = np.eye(2, dtype=np.float32)[said] * 0.8 + 0.1
    names = np.arange(40).astype(str)
    figures = Figures(Predictions(("a", "b"), labels, names, {"real": np.stack([sure] * 5)}, 5), 0)
    tested = figures.of("real", "real", 0.0, "baseline")
    found = tested.figures["accuracy"]
    # The standard error of 0.8 with 40 images is 0.063.
    assert 0.60 < found.low < 0.68
    assert 0.88 < found.high < 0.93
    for name in ("macro_f1", "brier", "ece"):
        figure = tested.figures[name]
        assert figure.high - figure.low > 0.1
    f1 = tested.per_class["a"].f1_interval
    assert f1.high - f1.low > 0.15


def test_a_class_without_images_has_no_area_and_stops_nothing() -> None:
    made = predictions()
    two = made.labels < 2
    figures = Figures(
        Predictions(CLASSES, made.labels[two], made.groups[two],
                    {"real": made.probabilities["real"][:, two]}, 2), 0,
    )  # fmt: skip
    tested = figures.of("real", "real", 0.0, "baseline")
    assert tested.per_class["c"].roc_auc is None
    assert tested.figures["macro_f1"].low < tested.figures["macro_f1"].high


def test_some_replicates_are_whole_fits() -> None:
    made = predictions(fits=3, seeds=2)
    rest = made.of_replicates([0, 2])
    assert (rest.generator_fits, rest.seeds) == (2, 2)
    assert (rest.probabilities["real"] == made.probabilities["real"][[0, 1, 4, 5]]).all()
    seeds = predictions(fits=1, seeds=4).of_replicates([1, 3])
    assert (seeds.generator_fits, seeds.seeds) == (1, 2)


def test_a_single_test_group_has_figures_but_no_error_of_the_test_set() -> None:
    made = predictions()
    one = Predictions(CLASSES, made.labels, np.repeat("a", 60), dict(made.probabilities), 2)
    tested = Figures(one, 0).of("real", "real", 0.0, "baseline")
    assert tested.figures["roc_auc"].mean > 0.5
