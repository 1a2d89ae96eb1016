from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from engine.vectors.neighbours import IndexKind, Neighbours


def vectors(count: int, seed: int = 0, width: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def test_flat_index_equals_scikit_learn() -> None:
    among, queries = vectors(800), vectors(90, seed=1)
    found, distance = Neighbours(among).nearest(queries, 7)
    expected = NearestNeighbors(n_neighbors=7, metric="cosine").fit(among).kneighbors(queries)
    assert (found == expected[1]).all()
    assert np.allclose(distance, expected[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_index_finds_nearly_all(kind: IndexKind) -> None:
    # Clustered rows, like embeddings.
    middle = vectors(40, seed=2, width=32)
    among, queries = (
        np.repeat(middle, count // 40, axis=0) + 0.7 * vectors(count, seed, width=32)
        for count, seed in ((4000, 0), (200, 1))
    )
    expected = NearestNeighbors(n_neighbors=10, metric="cosine").fit(among).kneighbors(queries)
    index = Neighbours(among, kind)
    found, distance = index.nearest(queries, 10)
    assert index.kind == kind
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(expected[1], found, strict=True)])
    assert recall >= 0.95
    assert (np.diff(distance, axis=1) >= 0).all()


def test_vector_length_is_ignored() -> None:
    among = vectors(50)
    stretched = among * np.random.default_rng(2).uniform(0.1, 9, (50, 1)).astype(np.float32)
    first, _ = Neighbours(among).nearest(among[:9], 4)
    second, distance = Neighbours(stretched).nearest(among[:9] * 3, 4)
    assert (first == second).all()
    assert np.allclose(distance[:, 0], 0, atol=1e-5)


def test_equal_distances_keep_the_order_of_rows() -> None:
    among = np.repeat(vectors(2), 3, axis=0)
    found, _ = Neighbours(among).nearest(among[:1], 3)
    assert found.tolist() == [[0, 1, 2]]


def test_more_neighbours_than_rows_returns_all_rows() -> None:
    found, _ = Neighbours(vectors(3)).nearest(vectors(2, seed=1), 10)
    assert found.shape == (2, 3)
