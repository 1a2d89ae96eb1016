"""What tells classes apart besides the subject, on planted and on clean features."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from engine.metrics.confounding import even_frame, predicted_classes, standard_error


def data(strength: float, count: int = 300) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Three classes; files of `c` have another size with a probability of `strength`, others with
    the rest."""
    random = np.random.default_rng(0)
    labels = [("a", "b", "c")[number % 3] for number in range(count)]
    limit = np.where(np.asarray(labels) == "c", strength, 1 - strength)
    size = np.where(random.random(count) < limit, 96.0, 128.0)
    features = {"size": size, "aspect ratio": random.normal(size=count), "format": np.zeros(count)}
    return features, labels, [str(number) for number in range(count)]


def test_a_planted_confounder_is_named_and_the_other_classes_are_not_accused() -> None:
    found = {one.label: one for one in predicted_classes(*data(0.95), seed=0)}
    assert found["c"].suspicious
    assert found["c"].auc > 0.9
    assert next(iter(found["c"].by)) == "size"
    assert not found["a"].suspicious
    # A feature without variation is not named.
    assert "format" not in found["c"].by


def test_chance_is_not_suspicious() -> None:
    found = predicted_classes(*data(0.5), seed=0)
    assert len(found) == 3
    assert not any(one.suspicious for one in found)


def test_groups_are_not_split_between_training_and_prediction() -> None:
    # Each patient has a size of its own, which says nothing about other patients.
    random = np.random.default_rng(1)
    patients = np.repeat(np.arange(40), 10)
    size = random.normal(size=40)[patients]
    labels = [("a", "b")[patient % 2] for patient in patients]
    apart = predicted_classes({"size": size}, labels, patients.astype(str).tolist(), 0)
    mixed = predicted_classes({"size": size}, labels, [str(n) for n in range(400)], 0)
    assert mixed[0].auc > 0.9
    assert apart[0].auc < 0.75


def test_nothing_is_said_without_variation_or_with_one_class() -> None:
    features, labels, groups = data(0.9)
    assert predicted_classes({"format": np.zeros(300)}, labels, groups, 0) == []
    assert predicted_classes(features, ["a"] * 300, groups, 0) == []
    assert predicted_classes({"size": np.zeros(0)}, [], [], 0) == []


@pytest.mark.parametrize("distance", [0.3, 1.0])
def test_standard_error_is_that_of_repeated_draws(distance: float) -> None:
    random = np.random.default_rng(0)
    truth = np.repeat([1, 0], [30, 60])
    areas = [roc_auc_score(truth, random.normal(size=90) + distance * truth) for _ in range(400)]
    expected = standard_error(float(np.mean(areas)), 30, 60)
    assert float(np.std(areas)) == pytest.approx(expected, rel=0.2)


def test_even_frame_is_found_and_a_subject_at_the_edge_is_none() -> None:
    random = np.random.default_rng(0)
    framed = random.integers(0, 256, (64, 64), dtype=np.uint8)
    framed[[0, -1], :] = framed[:, [0, -1]] = 40
    plain = random.integers(0, 256, (64, 64), dtype=np.uint8)
    assert even_frame(np.stack([framed, plain])).tolist() == [40, -1]
