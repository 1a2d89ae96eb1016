from __future__ import annotations

import imagehash
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from engine.metrics.memorization import (
    candidates,
    copies,
    copy_limits,
    near_expected,
    near_limit,
    nearest,
    nearest_other,
    share_nearer,
)


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
    found = candidates(
        np.concatenate([new, copied]), np.concatenate([new_hashes, train_hashes[:5]]),
        train, train_hashes,
    )  # fmt: skip
    original = copies(found, limits)
    assert original[50:].tolist() == [0, 1, 2, 3, 4]
    assert (original[:50] >= 0).sum() <= 1


def test_copy_needs_both_signals() -> None:
    train, train_hashes = cloud(500, 1)
    limits = copy_limits(nearest(*cloud(200, 2), train, train_hashes), 0.01)
    same_vectors = candidates(train[:5], cloud(5, 9)[1], train, train_hashes)
    same_hashes = candidates(cloud(5, 9)[0], train_hashes[:5], train, train_hashes)
    for one_signal in (same_vectors, same_hashes):
        assert (copies(one_signal, limits) < 0).all()
    # Both signals, but of different training images.
    mixed = candidates(train[:5], train_hashes[100:105], train, train_hashes)
    assert (copies(mixed, limits) < 0).all()


def test_a_copy_is_found_behind_a_nearer_image_with_another_hash() -> None:
    train, train_hashes = cloud(500, 1)
    # The first is a near double in the embedding, with another hash.
    train[1] = train[0] * np.float32(1.0001)
    limits = copy_limits(nearest(*cloud(200, 2), train, train_hashes), 0.01)
    for original in (0, 1):
        found = candidates(train[:1], train_hashes[[original]], train, train_hashes)
        assert copies(found, limits).tolist() == [original]


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


def test_the_limit_of_near_is_an_order_statistic() -> None:
    held_out = np.arange(1, 1000) / 1000
    assert near_limit(held_out, 0.01) == (0.01, 10)
    # At least one image sets the limit.
    assert near_limit(held_out[:50], 0.01) == (0.001, 1)


def test_share_near_to_train_is_in_its_range_if_nothing_is_copied() -> None:
    """The limit of 100 images is itself uncertain: "1% is expected" would be far off."""
    random, inside, shares = np.random.default_rng(0), 0, []
    for _ in range(1000):
        limit, count = near_limit(random.random(100), 0.01)
        share = share_nearer(random.random(300), limit)[0]
        expected, low, high = near_expected(count, 100, 300)
        inside += low <= share <= high
        shares.append(share)
    assert inside >= 0.94 * 1000
    assert np.mean(shares) == pytest.approx(expected, abs=0.001)
    assert high > 0.03
