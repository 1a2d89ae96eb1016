from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from engine.vectors.choose import farthest_first, local_density, shares


def points(count: int = 60) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 3)).astype(np.float32)


def radius(vectors: np.ndarray, chosen: np.ndarray) -> float:
    """How far any row is from the nearest chosen one."""
    apart = np.linalg.norm(vectors[:, None] - vectors[list(chosen)][None], axis=2)
    return float(apart.min(1).max())


def test_each_is_the_farthest_from_those_before_it() -> None:
    vectors = points()
    chosen = farthest_first(vectors, 6, first=4)
    assert chosen[0] == 4
    for number in range(1, 6):
        apart = np.linalg.norm(vectors[:, None] - vectors[chosen[:number]][None], axis=2).min(1)
        assert apart[chosen[number]] == pytest.approx(apart.max())


def test_none_is_more_than_twice_as_far_as_it_could_be() -> None:
    vectors = points(14)
    best = min(radius(vectors, np.asarray(some)) for some in combinations(range(14), 3))
    assert radius(vectors, farthest_first(vectors, 3, first=0)) <= 2 * best


def test_twins_come_last_and_none_comes_twice() -> None:
    vectors = np.repeat(points(5), 2, axis=0)
    chosen = farthest_first(vectors, 20, first=0)
    assert sorted(chosen) == list(range(10))
    assert len({row // 2 for row in chosen[:5]}) == 5


def test_the_densest_lie_in_the_crowd() -> None:
    vectors = points()
    vectors[:20] *= 0.05
    densest = np.argsort(-local_density(vectors))[:15]
    assert set(densest) <= set(range(20))
    by_hand = np.sort(np.linalg.norm(vectors[3] - vectors, axis=1))[1:11].mean()
    assert local_density(vectors)[3] == pytest.approx(-by_hand, rel=1e-3)
    assert local_density(vectors[:1]).tolist() == [0.0]


@pytest.mark.parametrize(
    ("total", "weights", "limits", "expected"),
    [
        (10, [5, 3, 2], [50, 50, 50], [5, 3, 2]),
        (4, [90, 5, 5], [90, 5, 5], [2, 1, 1]),
        (2, [5, 3, 2], [5, 3, 2], [1, 1, 0]),
        (9, [8, 1, 1], [3, 10, 10], [3, 3, 3]),
        (100, [5, 3, 2], [5, 3, 2], [5, 3, 2]),
        (0, [5, 3], [5, 3], [0, 0]),
    ],
)
def test_whole_shares_go_by_weight_and_none_beyond_its_limit(
    total: int, weights: list[float], limits: list[int], expected: list[int]
) -> None:
    found = shares(total, np.asarray(weights, float), np.asarray(limits))
    assert found.tolist() == expected
