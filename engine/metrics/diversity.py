"""Diversity of images: the Vendi score (Friedman and Dieng 2023).

    exp(-Σ λ log λ), λ the eigenvalues of K / n, K the cosines of all pairs

It is the effective number of dissimilar images: 1 if all are equal, n if all are orthogonal. It
depends on the number of images and on the embedder: compare only values with the same of both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.vectors.similarity import Vectors

_BLOCK = 4096


@dataclass(frozen=True)
class Directions:
    """The sum of x x^T over n vectors of length 1, float64 (width, width).

    It has the nonzero eigenvalues of K, and the sums of two sets add up: each worker of
    `engine.steps.fidelity` sends the sum of a piece instead of its vectors.
    """

    n: int
    products: np.ndarray

    @classmethod
    def of(cls, vectors: Vectors) -> Directions:
        """The sum over vectors (n, width), n at least 1."""
        width = vectors.shape[1]
        total = cls(0, np.zeros((width, width)))
        for start in range(0, len(vectors), _BLOCK):
            unit = _unit(vectors[start : start + _BLOCK])
            total += cls(len(unit), unit.T @ unit)
        return total

    def __add__(self, other: Directions) -> Directions:
        return Directions(self.n + other.n, self.products + other.products)

    @property
    def vendi(self) -> float:
        """The Vendi score. Raises `ValueError` without vectors."""
        if not self.n:
            raise ValueError("no vectors: the Vendi score needs at least one")
        return _effective_number(np.linalg.eigvalsh(self.products / self.n))


def vendi_score(vectors: Vectors) -> float:
    """The Vendi score of nonzero vectors (n, width) under the cosine, from the smaller of K and
    `Directions`."""
    if len(vectors) >= vectors.shape[1]:
        return Directions.of(vectors).vendi
    unit = _unit(vectors[: len(vectors)])
    return Directions(len(unit), unit @ unit.T).vendi


def _unit(vectors: np.ndarray) -> np.ndarray:
    exact = vectors.astype(np.float64)
    unit: np.ndarray = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    return unit


def _effective_number(shares: np.ndarray) -> float:
    # Negative values are rounding errors; zero adds nothing to the entropy.
    present = shares[shares > 0]
    return float(np.exp(-(present * np.log(present)).sum()))
