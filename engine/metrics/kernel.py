"""Kernel distance of two sets of embeddings (KID; Bińkowski et al. 2018).

The squared maximum mean discrepancy under k(x, y) = (x·y / width + 1)³. Its estimate is unbiased
whatever the number of images, so that, unlike the Fréchet distance, few suffice; it may be negative
for sets that are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BLOCK = 1024


@dataclass(frozen=True)
class KernelDistance:
    """An estimate from all vectors, and its interval at 95% from subsamples."""

    estimate: float
    low: float
    high: float


def kernel_distance(
    one: np.ndarray, other: np.ndarray, seed: int, subsets: int = 100
) -> KernelDistance:
    """KID of vectors (n, width) and (m, width), at least 4 of each.

    The interval comes from the spread over random halves, which overlap: the spread of halves drawn
    without replacement is, to first order, that of the whole (Politis, Romano and Wolf 1999, ch. 2,
    with the finite-sample factor (n - b) / n at b = n / 2).
    """
    if min(len(one), len(other)) < 4:
        raise ValueError(f"{len(one)} and {len(other)} vectors; four of each are the least")
    one, other = one.astype(np.float64), other.astype(np.float64)
    random = np.random.default_rng(seed)
    # Column 0 takes all vectors, each further one a half: one pass over the pairs serves all.
    of_one, of_other = np.ones((len(one), 1 + subsets)), np.ones((len(other), 1 + subsets))
    for column in range(1, 1 + subsets):
        for chosen in (of_one, of_other):
            chosen[random.permutation(len(chosen))[len(chosen) // 2 :], column] = 0
    estimate, *halves = (
        _within(one, of_one) + _within(other, of_other)
        - 2 * _kernel_sums(one, other, of_one, of_other) / (of_one.sum(0) * of_other.sum(0))
    ).tolist()  # fmt: skip
    spread = 1.96 * float(np.std(halves, ddof=1))
    return KernelDistance(estimate, estimate - spread, estimate + spread)


def _within(vectors: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Mean kernel of the pairs of a set: a vector is not compared with itself."""
    alone = _cubed((vectors**2).sum(1), vectors.shape[1]) @ chosen
    n = chosen.sum(0)
    return (_kernel_sums(vectors, vectors, chosen, chosen) - alone) / (n * (n - 1))


def _kernel_sums(
    one: np.ndarray, other: np.ndarray, of_one: np.ndarray, of_other: np.ndarray
) -> np.ndarray:
    """Sum of the kernel over all pairs of the vectors that a column chooses, for each column of 0
    and 1 (n, columns) and (m, columns)."""
    found = np.zeros(of_one.shape[1])
    for start in range(0, len(one), _BLOCK):
        here = slice(start, start + _BLOCK)
        kernel = _cubed(one[here] @ other.T, one.shape[1])
        found += (of_one[here] * (kernel @ of_other)).sum(0)
    return found


def _cubed(products: np.ndarray, width: int) -> np.ndarray:
    shifted = products / width + 1
    # A power by `**` takes ten times as long.
    return shifted * shifted * shifted
