from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans

from engine.vectors.kmeans import assign, choose_k, k_means


def mixture(count: int, width: int, centres: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    middle = random.normal(size=(centres, width)) * 3
    of = random.integers(centres, size=count)
    return (middle[of] + spread * random.normal(size=(count, width))).astype(np.float32)


@pytest.mark.parametrize("k", [5, 40])
def test_inertia_is_within_1_percent_of_scikit_learn(k: int) -> None:
    vectors = mixture(3000, 24, 30)
    ours = [k_means(vectors, k, seed).inertia for seed in range(3)]
    theirs = [KMeans(k, n_init=1, random_state=seed).fit(vectors).inertia_ for seed in range(3)]
    assert np.mean(ours) <= 1.01 * np.mean(theirs)


def test_assignments_and_distances_are_to_the_nearest_centroid() -> None:
    vectors = mixture(500, 8, 5)
    found = k_means(vectors, 7, 1)
    all_of_them = np.linalg.norm(vectors[:, None] - found.centroids[None], axis=2)
    assert (found.assigned == all_of_them.argmin(1)).all()
    assert np.allclose(found.distance, all_of_them.min(1), atol=1e-3)
    assert np.isclose(found.inertia, np.square(all_of_them.min(1)).sum(), rtol=1e-4)
    assert found.sizes.sum() == 500


def test_clusters_follow_the_seed() -> None:
    vectors = mixture(2000, 8, 12)
    first, again, other = (k_means(vectors, 9, seed) for seed in (3, 3, 4))
    assert np.array_equal(first.centroids, again.centroids)
    assert np.array_equal(first.assigned, again.assigned)
    assert not np.array_equal(first.centroids, other.centroids)


def test_centroids_can_be_learned_from_a_sample() -> None:
    vectors = mixture(4000, 8, 6)
    whole, some = k_means(vectors, 6, 0), k_means(vectors, 6, 0, sample=800)
    assert len(some.assigned) == 4000
    assert not np.array_equal(whole.centroids, some.centroids)
    assert some.inertia < 1.05 * whole.inertia


def test_spherical_clusters_ignore_length() -> None:
    vectors = mixture(600, 8, 4)
    stretched = vectors * np.random.default_rng(5).uniform(0.1, 10, (600, 1)).astype(np.float32)
    first, other = (k_means(held, 4, 2, spherical=True) for held in (vectors, stretched))
    assert np.allclose(np.linalg.norm(first.centroids, axis=1), 1, atol=1e-5)
    assert (first.assigned == other.assigned).all()
    assert first.distance.max() <= 2


def test_empty_clusters_are_dropped_and_reported() -> None:
    few = np.repeat(mixture(3, 6, 3), 20, axis=0)
    found = k_means(few, 8, 0)
    assert len(found.centroids) == 3
    assert found.dissolved == 5
    assert sorted(found.sizes) == [20, 20, 20]
    assert found.distance.max() < 1e-2


def test_small_clusters_join_the_nearest() -> None:
    crowd = mixture(200, 4, 1, spread=0.1)
    strays = crowd[:2] + 50
    vectors = np.concatenate([crowd, strays])
    kept = k_means(vectors, 2, 0)
    assert kept.dissolved == 0
    assert sorted(kept.sizes) == [2, 200]
    merged = k_means(vectors, 2, 0, min_size=5)
    assert merged.dissolved == 1
    assert list(merged.sizes) == [202]


def test_as_many_clusters_as_rows_are_the_rows() -> None:
    vectors = mixture(6, 4, 6)
    found = k_means(vectors, 6, 0)
    assert sorted(found.assigned) == list(range(6))
    assert found.inertia < 1e-3


def test_blocks_change_no_assignment() -> None:
    vectors = mixture(1000, 8, 5)
    centroids = vectors[:7]
    whole, in_blocks = assign(vectors, centroids), assign(vectors, centroids, block=130)
    assert np.array_equal(whole[0], in_blocks[0])
    assert np.allclose(whole[1], in_blocks[1], atol=1e-3)


@pytest.mark.parametrize("count", [3, 6])
def test_number_of_clusters_is_chosen_by_silhouette(count: int) -> None:
    vectors = mixture(1500, 8, count, seed=count, spread=0.3)
    best, scores = choose_k(vectors, range(2, 10), 0)
    assert best == count
    assert scores[count] == max(scores.values()) > 0.5


def test_one_cluster_if_no_number_fits() -> None:
    assert choose_k(mixture(2, 4, 2), [2, 3], 0) == (1, {})
    same = np.ones((50, 4), np.float32)
    assert choose_k(same, [2, 3], 0)[0] == 1
