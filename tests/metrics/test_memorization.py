from __future__ import annotations

import imagehash
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from engine.metrics.memorization import copies, copy_limits, nearest, nearest_other, share_nearer


def cloud(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(count, 16)).astype(np.float32)
    return vectors, random.integers(0, 2**63, count, dtype=np.uint64)


def test_nearest_equals_scikit_learn_and_imagehash() -> None:
    (vectors, hashes), (train, train_hashes) = cloud(40, 1), cloud(300, 2)
    found = nearest(vectors, hashes, train, train_hashes)
    search = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(train)
    distance, row = search.kneighbors(vectors)
    assert found.row.tolist() == row[:, 0].tolist()
    np.testing.assert_allclose(found.distance, distance[:, 0], atol=1e-5)
    queries, others = (
        [imagehash.hex_to_hash(f"{value:016x}") for value in side.tolist()]
        for side in (hashes, train_hashes)
    )
    assert found.bits.tolist() == [min(one - other for other in others) for one in queries]


def test_copies_are_found_and_new_images_are_not() -> None:
    train, train_hashes = cloud(500, 1)
    limits = copy_limits(nearest(*cloud(200, 2), train, train_hashes), 0.01)
    new, new_hashes = cloud(50, 3)
    copied = train[:5] + np.float32(0.001)
    found = nearest(
        np.concatenate([new, copied]), np.concatenate([new_hashes, train_hashes[:5]]),
        train, train_hashes,
    )  # fmt: skip
    assert copies(found, limits)[50:].all()
    assert copies(found, limits)[:50].sum() <= 1


def test_copy_needs_both_signals() -> None:
    train, train_hashes = cloud(500, 1)
    limits = copy_limits(nearest(*cloud(200, 2), train, train_hashes), 0.01)
    same_vectors = nearest(train[:5], cloud(5, 9)[1], train, train_hashes)
    same_hashes = nearest(cloud(5, 9)[0], train_hashes[:5], train, train_hashes)
    assert not copies(same_vectors, limits).all()
    assert not copies(same_hashes, limits).any()


def test_nearest_other_image_is_never_the_image_itself() -> None:
    vectors, hashes = cloud(300, 4)
    vectors, hashes = np.concatenate([vectors, vectors[:3]]), np.concatenate([hashes, hashes[:3]])
    found = nearest_other(vectors, hashes)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    distance = 1 - unit @ unit.T
    np.fill_diagonal(distance, np.inf)
    np.testing.assert_allclose(found.distance, distance.min(1), atol=1e-5)
    assert found.row[300:].tolist() == [0, 1, 2]
    assert found.bits[:3].tolist() == found.bits[300:].tolist() == [0, 0, 0]
    assert found.bits[5] == min(
        bin(int(hashes[5]) ^ int(other)).count("1") for row, other in enumerate(hashes) if row != 5
    )


def test_share_below_a_limit_has_wilson_s_interval() -> None:
    share, low, high = share_nearer(np.repeat([0.1, 0.3], [4, 96]), 0.2)
    z = 1.959963984540054
    middle, spread = (
        (share + z**2 / 200) / (1 + z**2 / 100),
        (z * np.sqrt(share * (1 - share) / 100 + z**2 / 40000) / (1 + z**2 / 100)),
    )
    assert share == 0.04
    assert (low, high) == pytest.approx((middle - spread, middle + spread))
    assert share_nearer(np.ones(50), 0.2)[0] == 0
