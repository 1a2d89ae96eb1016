"""Swapped labels come first, and difficult but correctly labelled classes are not suspected as a
whole."""

from __future__ import annotations

import numpy as np
import pytest

from engine.metrics.label_errors import label_errors, out_of_fold, wrong_labels
from engine.metrics.outliers import LIMIT, modified_z, neighbour_outliers, odd_sizes


def clouds(classes: int = 3, each: int = 60, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    centres = random.normal(0, 2.0, (classes, width))
    vectors = centres[labels] + random.normal(0, 1, (len(labels), width))
    return vectors.astype(np.float32), labels


def test_swapped_labels_are_the_first_suspects_with_the_right_suggestion() -> None:
    vectors, labels = clouds()
    swapped = np.arange(0, 180, 15)
    wrong = labels.copy()
    wrong[swapped] = (wrong[swapped] + 1) % 3
    found = label_errors(vectors, wrong, np.arange(180), 0)
    assert found is not None
    assert set(found.order[: len(swapped)]) == set(swapped)
    assert (found.suggested[swapped] == labels[swapped]).all()
    assert (found.suggested[found.order] != wrong[found.order]).all()
    assert (np.diff(found.confidence[found.order]) >= 0).all()


def test_clean_labels_are_rarely_suspected() -> None:
    vectors, labels = clouds()
    found = label_errors(vectors, labels, np.arange(180), 0)
    assert found is not None
    assert found.flagged.mean() <= 0.01


def test_images_are_not_judged_by_others_of_their_group() -> None:
    # Every group is one point with a random label: only a leak could predict it.
    random = np.random.default_rng(1)
    groups = np.repeat(np.arange(60), 4)
    vectors = random.normal(0, 1, (60, 30))[groups].astype(np.float32)
    labels = (np.arange(60) % 2)[groups]
    apart = out_of_fold(vectors, labels, groups, 0)
    together = out_of_fold(vectors, labels, np.arange(240), 0)
    assert apart is not None
    assert together is not None
    assert (together.argmax(1) == labels).mean() > 0.65
    assert (apart.argmax(1) == labels).mean() < 0.6


def test_same_seed_gives_the_same_probabilities() -> None:
    vectors, labels = clouds()
    first, second = (out_of_fold(vectors, labels, np.arange(180), 5) for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first == second).all()
    assert np.allclose(first.sum(1), 1)


def test_class_of_one_group_is_not_judged() -> None:
    vectors, labels = clouds()
    assert label_errors(vectors, labels, np.where(labels == 2, 999, np.arange(180)), 0) is None
    assert label_errors(vectors[:0], labels[:0], labels[:0], 0) is None


def test_point_far_from_its_neighbours_is_an_outlier() -> None:
    distance = np.r_[np.random.default_rng(0).lognormal(-2, 0.2, 200), 1.0]
    score = neighbour_outliers(distance)
    assert score.argmax() == 200
    assert score[200] > LIMIT
    assert (score[:200] > LIMIT).sum() <= 1
    assert not len(modified_z(np.zeros(0)))


def test_only_clearly_unusual_sizes_are_reported() -> None:
    widths, heights = np.full(50, 100.0), np.full(50, 100.0)
    widths[0], heights[0] = 1000, 1000  # ten times as large
    widths[1] = 400  # a strip
    widths[2] = 110
    widths[3], heights[4] = 140, 140  # landscape and portrait
    assert np.flatnonzero(odd_sizes(widths, heights) > LIMIT).tolist() == [0, 1]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.15])
def test_number_of_wrong_labels_is_estimated(share: float) -> None:
    # Four classes that overlap a little, as real ones do.
    random = np.random.default_rng(7)
    count = 2000
    truth = np.arange(count) % 4
    vectors = random.normal(size=(count, 8)).astype(np.float32)
    vectors[np.arange(count), truth] += 4
    labels = truth.copy()
    wrong = random.permutation(count)[: round(share * count)]
    labels[wrong] = (labels[wrong] + random.integers(1, 4, len(wrong))) % 4
    groups = np.arange(count).astype(str)
    probabilities = out_of_fold(vectors, labels, groups, 0)
    assert probabilities is not None
    estimate, bound = wrong_labels(probabilities, labels)
    assert estimate <= bound
    assert bound >= len(wrong)
    assert estimate == pytest.approx(len(wrong), abs=0.02 * count)


def test_a_classifier_that_knows_nothing_bounds_nothing() -> None:
    random = np.random.default_rng(3)
    labels = np.arange(600) % 3
    probabilities = random.dirichlet(np.ones(3), 600)
    estimate, bound = wrong_labels(probabilities, labels)
    assert bound > 400
    assert estimate > 300
