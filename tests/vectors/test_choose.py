from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from engine.vectors.choose import (
    cover,
    farthest_first,
    k_center,
    local_density,
    shares,
    stratified,
)


def points(count: int = 60) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, 3)).astype(np.float32)


def radius(vectors: np.ndarray, chosen: np.ndarray) -> float:
    """The largest distance of a row to the nearest chosen one."""
    apart = np.linalg.norm(vectors[:, None] - vectors[list(chosen)][None], axis=2)
    return float(apart.min(1).max())


def test_each_choice_is_the_farthest_from_those_before_it() -> None:
    vectors = points()
    chosen = farthest_first(vectors, 6, first=4)
    assert chosen[0] == 4
    for number in range(1, 6):
        apart = np.linalg.norm(vectors[:, None] - vectors[chosen[:number]][None], axis=2).min(1)
        assert apart[chosen[number]] == pytest.approx(apart.max())


def test_farthest_first_is_within_twice_the_optimum() -> None:
    vectors = points(14)
    best = min(radius(vectors, np.asarray(some)) for some in combinations(range(14), 3))
    assert radius(vectors, farthest_first(vectors, 3, first=0)) <= 2 * best


def test_duplicates_come_last_and_none_comes_twice() -> None:
    vectors = np.repeat(points(5), 2, axis=0)
    chosen = farthest_first(vectors, 20, first=0)
    assert sorted(chosen) == list(range(10))
    assert len({row // 2 for row in chosen[:5]}) == 5


def test_densest_points_are_in_the_crowd() -> None:
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
def test_integer_shares_follow_weights_within_limits(
    total: int, weights: list[float], limits: list[int], expected: list[int]
) -> None:
    found = shares(total, np.asarray(weights, float), np.asarray(limits))
    assert found.tolist() == expected


def mean_distance(points_: np.ndarray, chosen: np.ndarray) -> float:
    """The distance of each row to the nearest chosen one."""
    apart = np.linalg.norm(points_[:, None] - points_[chosen][None], axis=2)
    return float(apart.min(1).mean())


@pytest.mark.parametrize("count", [1, 7, 40, 120])
def test_chosen_points_cover_a_plane_better_than_chance(count: int) -> None:
    random = np.random.default_rng(3)
    # A crowd and some outliers, most of which a random choice would miss.
    plane = np.concatenate([random.normal(size=(180, 2)), random.uniform(-9, 9, (20, 2))])
    plane = plane.astype(np.float32)
    chosen = cover(plane, count, 0)
    assert len(set(chosen)) == count
    assert (np.diff(chosen) > 0).all()
    by_chance = [mean_distance(plane, random.choice(200, count, replace=False)) for _ in range(20)]
    assert mean_distance(plane, chosen) < np.quantile(by_chance, 0.2)
    assert np.array_equal(chosen, cover(plane, count, 0))


def test_cells_give_their_share_if_more_are_chosen_than_cells() -> None:
    plane = np.random.default_rng(0).uniform(size=(4000, 2)).astype(np.float32)
    chosen = cover(plane, 1500, 0)
    assert len(set(chosen)) == 1500
    left = np.bincount((plane[chosen] * 4).astype(int) @ [4, 1], minlength=16)
    whole = np.bincount((plane * 4).astype(int) @ [4, 1], minlength=16)
    assert np.abs(left / whole - 1500 / 4000).max() < 0.1


def test_duplicates_in_a_plane_still_give_the_requested_number() -> None:
    assert len(set(cover(np.zeros((6, 2), np.float32), 4, 0))) == 4


def test_k_center_leaves_no_row_far_away() -> None:
    vectors = points(200)
    chosen = k_center(vectors, 12)
    middle = np.linalg.norm(vectors - vectors.mean(0), axis=1).argmin()
    assert chosen[0] == middle
    random = np.random.default_rng(0)
    assert radius(vectors, chosen) < min(
        radius(vectors, random.choice(200, 12, replace=False)) for _ in range(20)
    )


def test_each_stratum_keeps_its_share() -> None:
    strata = np.asarray(["a"] * 60 + ["b"] * 30 + ["c"] * 9 + ["d"])
    chosen = stratified(strata, 20, np.random.default_rng(1))
    assert len(set(chosen)) == 20
    counts = {name: int((strata[chosen] == name).sum()) for name in "abcd"}
    assert counts["d"] == 1
    assert abs(counts["a"] - 12) <= 1
    assert abs(counts["b"] - 6) <= 1
    other = stratified(strata, 20, np.random.default_rng(2))
    assert not np.array_equal(chosen, other)
