"""Kernel distance of two sets of embeddings (KID; Bińkowski et al. 2018).

The squared maximum mean discrepancy under k(x, y) = (x·y / width + 1)³. Its estimate is unbiased
for any number of images, so that, unlike for the Fréchet distance, few suffice. It can be negative
for similar sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BLOCK = 1024


@dataclass(frozen=True)
class KernelDistance:
    """An estimate from all vectors, and its 95% interval from subsamples."""

    estimate: float
    low: float
    high: float


def kernel_distance(
    first: np.ndarray, second: np.ndarray, seed: int, subsets: int = 100
) -> KernelDistance:
    """KID of vectors (n, width) and (m, width), at least 4 of each. Raises `ValueError` for fewer.

    The interval comes from the spread over random overlapping halves: to first order, the spread of
    halves drawn without replacement equals that of the whole set (Politis, Romano and Wolf 1999,
    ch. 2, with the finite-sample factor (n - b) / n at b = n / 2).
    """
    if min(len(first), len(second)) < 4:
        raise ValueError(f"too few vectors: {len(first)} and {len(second)} (minimum 4 of each)")
    first, second = first.astype(np.float64), second.astype(np.float64)
    random = np.random.default_rng(seed)
    # Column 0 selects all vectors, each further column a half: one pass over the pairs serves all.
    in_first, in_second = (np.ones((len(side), 1 + subsets)) for side in (first, second))
    for column in range(1, 1 + subsets):
        for chosen in (in_first, in_second):
            chosen[random.permutation(len(chosen))[len(chosen) // 2 :], column] = 0
    estimate, *halves = (
        _within(first, in_first) + _within(second, in_second)
        - 2 * _kernel_sums(first, second, in_first, in_second)
        / (in_first.sum(0) * in_second.sum(0))
    ).tolist()  # fmt: skip
    spread = 1.96 * float(np.std(halves, ddof=1))
    return KernelDistance(estimate, estimate - spread, estimate + spread)


def _within(vectors: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Mean kernel of the pairs of a set, without pairs of a vector with itself."""
    diagonal = _cubed((vectors**2).sum(1), vectors.shape[1]) @ chosen
    n = chosen.sum(0)
    return np.asarray((_kernel_sums(vectors, vectors, chosen, chosen) - diagonal) / (n * (n - 1)))


def _kernel_sums(
    first: np.ndarray, second: np.ndarray, in_first: np.ndarray, in_second: np.ndarray
) -> np.ndarray:
    """For each column of 0 and 1 (n, columns) and (m, columns), the sum of the kernel over all
    pairs of the selected vectors."""
    sums = np.zeros(in_first.shape[1])
    for start in range(0, len(first), _BLOCK):
        here = slice(start, start + _BLOCK)
        kernel = _cubed(first[here] @ second.T, first.shape[1])
        sums += (in_first[here] * (kernel @ in_second)).sum(0)
    return sums


def _cubed(products: np.ndarray, width: int) -> np.ndarray:
    shifted = products / width + 1
    # The power operator takes ten times as long.
    return shifted * shifted * shifted
