"""The Fréchet distance of two sets of embeddings (Heusel et al. 2017, for Inception features).

    |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)

It depends on the number of images and on the embedder: compare only values with the same of both,
and report both. `floor` is the distance of two sets of real images.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from engine.metrics.moments import Moments


class Reference:
    """The real images, whose matrix root is computed once for many comparisons.

    `distance` needs the eigenvalues of C1 C2. With C1 = R R these are the eigenvalues of the
    symmetric R C2 R, which costs two products and `eigvalsh` instead of the root of an asymmetric
    matrix.
    """

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    @cached_property
    def root(self) -> np.ndarray:
        """The symmetric root R of the covariance."""
        values, axes = np.linalg.eigh(self.moments.covariance)
        return np.asarray((axes * np.sqrt(np.maximum(values, 0))) @ axes.T)

    def distance(self, other: Moments) -> float:
        """Fréchet distance to another set of vectors of the same width, at least 2 of them."""
        covariance = other.covariance
        values = np.linalg.eigvalsh(self.root @ covariance @ self.root)
        return _sum(
            self.moments.mean - other.mean,
            np.trace(self.moments.covariance) + np.trace(covariance),
            float(np.sqrt(np.maximum(values, 0)).sum()),
        )


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet distance of vectors (n, width) and (m, width).

    With fewer vectors than their width, the covariances have at most n and m directions. The trace
    is then the nuclear norm of the n × m matrix A B^T, where C1 = A^T A and C2 = B^T B.
    """
    if len(first) + len(second) >= first.shape[1]:
        return Reference(Moments.of(first)).distance(Moments.of(second))
    sides = [vectors.astype(np.float64) for vectors in (first, second)]
    a, b = ((side - side.mean(0)) / np.sqrt(len(side) - 1) for side in sides)
    traces = float((a**2).sum() + (b**2).sum())
    root = float(np.linalg.svd(a @ b.T, compute_uv=False).sum())
    return _sum(sides[0].mean(0) - sides[1].mean(0), traces, root)


def floor(real: np.ndarray, seed: int) -> float:
    """The distance of two random halves of real vectors, a lower bound for any generator."""
    order = np.random.default_rng(seed).permutation(len(real))
    half = len(real) // 2
    return frechet_distance(real[order[:half]], real[order[half : 2 * half]])


def _sum(shift: np.ndarray, traces: float, root: float) -> float:
    # At least 0: for equal sets the three terms cancel up to rounding.
    return max(0.0, float(shift @ shift + traces - 2 * root))
