"""The Fréchet distance of two sets of embeddings (Heusel et al. 2017, there of Inception features).

    |m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)

It depends on the number of images and on the embedder: compare values of the same both, and print
both beside it. `floor` is what two sets of real images come to.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from engine.metrics.moments import Moments


class Reference:
    """The real side, whose root is taken once for many comparisons.

    distance(m) needs the eigenvalues of C1 C2; with C1 = R R they are those of the symmetric R C2
    R, which costs two products and `eigvalsh` in place of the root of a matrix without symmetry.
    """

    def __init__(self, moments: Moments) -> None:
        self.moments = moments

    @cached_property
    def root(self) -> np.ndarray:
        values, axes = np.linalg.eigh(self.moments.covariance)
        return (axes * np.sqrt(np.maximum(values, 0))) @ axes.T

    def distance(self, other: Moments) -> float:
        """Fréchet distance to another set of vectors of the same width, at least 2 of them."""
        covariance = other.covariance
        values = np.linalg.eigvalsh(self.root @ covariance @ self.root)
        return _sum(
            self.moments.mean - other.mean,
            np.trace(self.moments.covariance) + np.trace(covariance),
            float(np.sqrt(np.maximum(values, 0)).sum()),
        )


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """Fréchet distance of vectors (n, width) and (m, width).

    With fewer vectors than their width the covariances have no more than n and m directions: the
    trace is then the nuclear norm of A B^T, where C1 = A^T A and C2 = B^T B, an n × m matrix.
    """
    width = one.shape[1]
    if len(one) + len(other) >= width:
        return Reference(Moments.of(one)).distance(Moments.of(other))
    centred = []
    for vectors in (one, other):
        exact = vectors.astype(np.float64)
        centred.append((exact - exact.mean(0)) / np.sqrt(len(exact) - 1))
    first, second = centred
    shift = one.astype(np.float64).mean(0) - other.astype(np.float64).mean(0)
    traces = float((first**2).sum() + (second**2).sum())
    return _sum(shift, traces, float(np.linalg.svd(first @ second.T, compute_uv=False).sum()))


def floor(real: np.ndarray, seed: int) -> float:
    """The distance of two random halves of real vectors: what no generator can be asked to beat."""
    order = np.random.default_rng(seed).permutation(len(real))
    half = len(real) // 2
    return frechet_distance(real[order[:half]], real[order[half : 2 * half]])


def _sum(shift: np.ndarray, traces: float, root: float) -> float:
    # Never below nil: the three terms cancel to the last digits for equal sets.
    return max(0.0, float(shift @ shift + traces - 2 * root))
