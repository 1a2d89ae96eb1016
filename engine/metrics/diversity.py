"""How many different images are there? The Vendi score (Friedman and Dieng 2023).

    exp(-Σ λ log λ), λ the eigenvalues of K / n, K the cosines of all pairs

It is the effective number of images that have nothing in common: 1 where all are alike, n where no
two are. It grows with the number of images and depends on the embedder: compare values of the same
both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from engine.vectors.similarity import Vectors

_BLOCK = 4096


@dataclass(frozen=True)
class Directions:
    """Of n vectors at length 1, the sum of x x^T, float64 (width, width). It has the eigenvalues of
    K that are not nil, and those of two sets add up: each worker of `engine.steps.fidelity` sends
    that of a piece in place of its vectors."""

    n: int
    products: np.ndarray

    @classmethod
    def of(cls, vectors: Vectors) -> Directions:
        """Of vectors (n, width), n at least 1."""
        width = vectors.shape[1]
        found = cls(0, np.zeros((width, width)))
        for start in range(0, len(vectors), _BLOCK):
            unit = _unit(vectors[start : start + _BLOCK])
            found += cls(len(unit), unit.T @ unit)
        return found

    def __add__(self, other: Directions) -> Directions:
        return Directions(self.n + other.n, self.products + other.products)

    @property
    def vendi(self) -> float:
        """Raises `ValueError` where there is no vector."""
        if not self.n:
            raise ValueError("no vectors to tell apart")
        return _effective_number(np.linalg.eigvalsh(self.products / self.n))


def vendi_score(vectors: Vectors) -> float:
    """The Vendi score of vectors (n, width) under the cosine, none of them nil: from the smaller of
    K and `Directions`."""
    if len(vectors) >= vectors.shape[1]:
        return Directions.of(vectors).vendi
    unit = _unit(vectors[: len(vectors)])
    return Directions(len(unit), unit @ unit.T).vendi


def _unit(vectors: np.ndarray) -> np.ndarray:
    exact = vectors.astype(np.float64)
    unit: np.ndarray = exact / np.linalg.norm(exact, axis=1, keepdims=True)
    return unit


def _effective_number(shares: np.ndarray) -> float:
    # What is below nil is so by rounding; nil itself adds nothing to the entropy.
    present = shares[shares > 0]
    return float(np.exp(-(present * np.log(present)).sum()))
