from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from engine.core.rng import derive_seed
from engine.vectors.plane import PlaneMethod, place, principal_components


def mixture(count: int, width: int = 60, centres: int = 4) -> np.ndarray:
    random = np.random.default_rng(0)
    of = np.arange(count) % centres
    middle = random.normal(size=(centres, width))[of] * 4
    return (middle + random.normal(size=(count, width))).astype(np.float32)


def test_positions_equal_plain_scikit_learn() -> None:
    vectors = mixture(150)
    held = principal_components(vectors, np.arange(150), 5)
    plain = PCA(50, random_state=0).fit_transform(vectors)
    # Signs of components are a solver's own.
    assert np.allclose(np.abs(held), np.abs(plain), atol=1e-2)
    with threadpool_limits(1):
        expected = TSNE(
            init="pca", perplexity=20, random_state=derive_seed(5, "tsne") % 2**32
        ).fit_transform(held)  # fmt: skip
        assert np.array_equal(place(vectors, "tsne", 5, perplexity=20), expected)


def test_narrow_vectors_skip_the_reduction() -> None:
    vectors = mixture(40, width=16)
    assert np.array_equal(principal_components(vectors, np.arange(40), 0), vectors)


@pytest.mark.parametrize("method", ["tsne", pytest.param("umap", marks=pytest.mark.slow)])
def test_similar_rows_are_close_and_the_plane_follows_the_seed(method: PlaneMethod) -> None:
    if method == "umap":
        pytest.importorskip("umap", reason="umap-learn is not installed")
    vectors = mixture(120)
    points = place(vectors, method, 1)
    assert points.shape == (120, 2)
    assert points.dtype == np.float32
    nearest = NearestNeighbors(n_neighbors=2).fit(points).kneighbors(points)[1][:, 1]
    assert np.mean(nearest % 4 == np.arange(120) % 4) > 0.95
    assert np.array_equal(points, place(vectors, method, 1))


def test_rows_beyond_the_sample_take_the_position_of_their_nearest() -> None:
    vectors = mixture(300)
    points = place(vectors, "tsne", 2, sample=100)
    assert len(np.unique(points, axis=0)) == 100
    nearest = NearestNeighbors(n_neighbors=1).fit(points).kneighbors(points + 1e-3)[1][:, 0]
    assert np.mean(nearest % 4 == np.arange(300) % 4) > 0.95


@pytest.mark.parametrize("count", [3, 5])
def test_few_and_equal_rows_have_a_position(count: int) -> None:
    assert np.isfinite(place(mixture(count), "tsne", 0)).all()
    assert np.isfinite(place(np.ones((count, 60), np.float32), "tsne", 0)).all()


def test_number_of_threads_changes_no_position() -> None:
    vectors = mixture(200, width=200)
    planes = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            planes.append(place(vectors, "tsne", 3))
    assert np.array_equal(planes[0], planes[1])
