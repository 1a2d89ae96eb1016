"""Mean and covariance of vectors that are spread over processes.

Count, mean and centred second moment determine both, and those of two sets give those of their
union (Chan, Golub and LeVeque 1983). So each worker of `engine.steps.fidelity` sends the moments of
a piece instead of its vectors, and the driver adds them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np

from engine.vectors.similarity import Vectors

_BLOCK = 4096


@dataclass(frozen=True)
class Moments:
    """The moments of n vectors: mean float64 (width,), and scatter, the sum of
    (x - mean)(x - mean)^T, float64 (width, width)."""

    n: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, vectors: Vectors) -> Moments:
        """The moments of vectors (n, width), n at least 1."""
        return merged(
            _of_block(vectors[start : start + _BLOCK].astype(np.float64))
            for start in range(0, len(vectors), _BLOCK)
        )

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased, (width, width). Raises `ValueError` for a single vector."""
        if self.n < 2:
            raise ValueError(f"too few vectors: {self.n} (a covariance needs two)")
        return self.scatter / (self.n - 1)

    def __add__(self, other: Moments) -> Moments:
        n = self.n + other.n
        shift = other.mean - self.mean
        return Moments(
            n,
            self.mean + shift * (other.n / n),
            self.scatter + other.scatter + np.outer(shift, shift) * (self.n * other.n / n),
        )


def merged(pieces: Iterable[Moments]) -> Moments:
    """The moments of all pieces together. Raises `ValueError` without pieces."""
    # One at a time: moments of wide vectors are larger than a block of the vectors.
    rest = iter(pieces)
    first = next(rest, None)
    if first is None:
        raise ValueError("no vectors: moments need at least one")
    return reduce(Moments.__add__, rest, first)


def _of_block(block: np.ndarray) -> Moments:
    mean = block.mean(0)
    centred = block - mean
    return Moments(len(block), mean, centred.T @ centred)
