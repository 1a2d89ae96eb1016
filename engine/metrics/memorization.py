"""Whether a generator copied its training images.

Synthetic images are always similar to train; copies are more similar than images that the generator
never saw. So the distance of each image to its nearest training image is compared with the same
distance of held-out real images, to the same training images (a reference of another size would
shift it). Two signals must agree on the same training image: the embedding and the perceptual hash.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.vectors.similarity import most_similar

# Pairs of hashes compared at once.
_PAIRS = 2**22
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each query: its row and cosine distance, and the smallest
    difference in bits to the perceptual hash of any training image."""

    row: np.ndarray
    distance: np.ndarray
    bits: np.ndarray


@dataclass(frozen=True)
class Candidates:
    """The nearest training images of each query, (n, k) from near to far: rows, cosine distances
    and differences in bits."""

    row: np.ndarray
    distance: np.ndarray
    bits: np.ndarray


@dataclass(frozen=True)
class CopyLimits:
    """An image within both limits is a copy."""

    distance: float
    bits: int


def nearest(
    vectors: np.ndarray, hashes: np.ndarray, train: np.ndarray, train_hashes: np.ndarray
) -> Nearest:
    """The nearest training image of each vector. vectors, train: float32 (n, width) and (m, width).
    hashes: uint64 (n,) and (m,)."""
    similarity, row = most_similar(vectors, train, 1)
    bits = np.empty(len(vectors), dtype=np.int64)
    block = max(1, _PAIRS // len(train))
    for start in range(0, len(vectors), block):
        differing = hashes[start : start + block, None] ^ train_hashes[None, :]
        bits[start : start + block] = np.bitwise_count(differing).min(1)
    return Nearest(row[:, 0], np.maximum(1 - similarity[:, 0], 0), bits)


def candidates(
    vectors: np.ndarray, hashes: np.ndarray, train: np.ndarray, train_hashes: np.ndarray,
    count: int = 8,
) -> Candidates:  # fmt: skip
    """The `count` nearest training images of each vector, in the shapes of `nearest`."""
    similarity, row = most_similar(vectors, train, min(count, len(train)))
    bits = np.bitwise_count(hashes[:, None] ^ train_hashes[row])
    return Candidates(row, np.maximum(1 - similarity, 0), bits)


def nearest_other(vectors: np.ndarray, hashes: np.ndarray) -> Nearest:
    """The nearest other image of each image of a set: float32 (n, width) and uint64 (n,)."""
    similarity, row = most_similar(vectors, vectors, 2)
    # An image or its equal may come first.
    column = np.where(row[:, 0] == np.arange(len(vectors)), 1, 0)[:, None]
    bits = np.empty(len(vectors), dtype=np.int64)
    block = max(1, _PAIRS // len(vectors))
    for start in range(0, len(vectors), block):
        differing = np.bitwise_count(hashes[start : start + block, None] ^ hashes[None, :])
        here = np.arange(len(differing))
        differing[here, start + here] = 64
        bits[start : start + block] = differing.min(1)
    return Nearest(
        np.take_along_axis(row, column, 1)[:, 0],
        np.maximum(1 - np.take_along_axis(similarity, column, 1)[:, 0], 0), bits,
    )  # fmt: skip


def copy_limits(held_out: Nearest, quantile: float) -> CopyLimits:
    """The distances to train of the `quantile` of held-out real images."""
    return CopyLimits(
        float(np.quantile(held_out.distance, quantile)),
        int(np.quantile(held_out.bits, quantile, method="lower")),
    )


def copies(to_train: Candidates, limits: CopyLimits) -> np.ndarray:
    """The training image that each query copies, or -1: int64 (n,). Both signals must concern the
    same training image."""
    # Equal vectors differ by rounding, and the limit may be 0.
    near = to_train.distance <= max(limits.distance, _ROUNDING)
    copied = near & (to_train.bits <= limits.bits)
    first = copied.argmax(1)
    return np.where(copied.any(1), to_train.row[np.arange(len(first)), first], -1)


def near_limit(held_out: np.ndarray, share: float) -> tuple[float, int]:
    """The distance to train within which a share of other real images lie, and how many these are,
    at least one. held_out: the distances of all of them (n,)."""
    count = max(1, int(share * (len(held_out) + 1)))
    return float(np.partition(held_out, count - 1)[count - 1]), count


def near_expected(count: int, held_out: int, images: int) -> tuple[float, float, float]:
    """The share of `images` that are nearer to train than the `count`-th of `held_out` images, if
    no image is copied: expected, and the range of 95 of 100 sets.

    The limit is an order statistic of few images, so the number is beta-binomial (David and
    Nagaraja 2003, section 2.2, exact for any distribution).
    """
    from scipy.stats import betabinom

    number = betabinom(images, count, held_out + 1 - count)
    low, high = number.ppf([0.025, 0.975]) / images
    return count / (held_out + 1), float(low), float(high)


def share_nearer(distance: np.ndarray, limit: float) -> tuple[float, float, float]:
    """The share of images (n,) below a given distance to train, and its 95% interval over images
    (Wilson 1927)."""
    from scipy.stats import binomtest

    nearer = int((distance < limit).sum())
    interval = binomtest(nearer, len(distance)).proportion_ci(method="wilson")
    return nearer / len(distance), float(interval.low), float(interval.high)
