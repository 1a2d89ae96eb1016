"""Has a generator copied its training images?

A synthetic image is near to train by itself; what counts is whether it is nearer than pictures that
the generator never saw. So the distance of each to its nearest training image is held against the
same distance of held-out real images, to the same training images (a reference of another size
would shift it). Two signals must agree: the embedding and the perceptual hash.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.vectors.similarity import most_similar

# Pairs of hashes that are compared at once.
_PAIRS = 2**22
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Nearest:
    """The nearest training image of each query: its row, the cosine distance, and, of any training
    image, the smallest number of bits by which the perceptual hashes differ."""

    row: np.ndarray
    distance: np.ndarray
    bits: np.ndarray


@dataclass(frozen=True)
class CopyLimits:
    """Below both, an image counts as a copy."""

    distance: float
    bits: int


def nearest(
    vectors: np.ndarray, hashes: np.ndarray, train: np.ndarray, train_hashes: np.ndarray
) -> Nearest:
    """vectors, train: float32 (n, width) and (m, width). hashes: uint64 (n,) and (m,)."""
    similarity, row = most_similar(vectors, train, 1)
    bits = np.empty(len(vectors), dtype=np.int64)
    block = max(1, _PAIRS // len(train))
    for start in range(0, len(vectors), block):
        differing = hashes[start : start + block, None] ^ train_hashes[None, :]
        bits[start : start + block] = np.bitwise_count(differing).min(1)
    return Nearest(row[:, 0], np.maximum(1 - similarity[:, 0], 0), bits)


def nearest_other(vectors: np.ndarray, hashes: np.ndarray) -> Nearest:
    """The nearest other one of each image of a set: float32 (n, width) and uint64 (n,)."""
    similarity, found = most_similar(vectors, vectors, 2)
    # Of twins either may stand first.
    other = np.where(found[:, 0] == np.arange(len(vectors)), 1, 0)[:, None]
    bits = np.empty(len(vectors), dtype=np.int64)
    block = max(1, _PAIRS // len(vectors))
    for start in range(0, len(vectors), block):
        differing = np.bitwise_count(hashes[start : start + block, None] ^ hashes[None, :])
        here = np.arange(len(differing))
        differing[here, start + here] = 64
        bits[start : start + block] = differing.min(1)
    return Nearest(
        np.take_along_axis(found, other, 1)[:, 0],
        np.maximum(1 - np.take_along_axis(similarity, other, 1)[:, 0], 0), bits,
    )  # fmt: skip


def copy_limits(held_out: Nearest, quantile: float) -> CopyLimits:
    """The `quantile` of held-out real images lies this near to train."""
    return CopyLimits(
        float(np.quantile(held_out.distance, quantile)),
        int(np.quantile(held_out.bits, quantile, method="lower")),
    )


def copies(found: Nearest, limits: CopyLimits) -> np.ndarray:
    """Which images are copies: bool (n,)."""
    # Equal vectors are up to rounding apart: where val touches train, so may the limit be.
    return (found.distance <= max(limits.distance, _ROUNDING)) & (found.bits <= limits.bits)


def share_nearer(distance: np.ndarray, limit: float) -> tuple[float, float, float]:
    """The share of images (n,) below a distance to train, and the ends of its interval at 95%
    (Wilson 1927): of the images, for a limit that is given."""
    from scipy.stats import binomtest

    nearer = int((distance < limit).sum())
    interval = binomtest(nearer, len(distance)).proportion_ci(method="wilson")
    return nearer / len(distance), float(interval.low), float(interval.high)
