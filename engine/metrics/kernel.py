"""Kernel distance of two sets of embeddings (KID; Bińkowski et al. 2018).

The squared maximum mean discrepancy under k(x, y) = (x·y / width + 1)³. Its estimate is unbiased
whatever the number of images, so that, unlike the Fréchet distance, few suffice; it may be negative
for sets that are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BLOCK = 2048


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
    estimate = _mmd(one, other)
    random = np.random.default_rng(seed)
    halves = [
        _mmd(
            one[random.permutation(len(one))[: len(one) // 2]],
            other[random.permutation(len(other))[: len(other) // 2]],
        )
        for _ in range(subsets)
    ]
    spread = 1.96 * float(np.std(halves, ddof=1))
    return KernelDistance(estimate, estimate - spread, estimate + spread)


def _mmd(one: np.ndarray, other: np.ndarray) -> float:
    """The unbiased estimate: a vector is not compared with itself."""
    n, m = len(one), len(other)
    within_one = _kernel_sum(one, one) - float(_cubed((one**2).sum(1), one.shape[1]).sum())
    within_other = _kernel_sum(other, other) - float(_cubed((other**2).sum(1), one.shape[1]).sum())
    across = _kernel_sum(one, other)
    return within_one / (n * (n - 1)) + within_other / (m * (m - 1)) - 2 * across / (n * m)


def _kernel_sum(one: np.ndarray, other: np.ndarray) -> float:
    return sum(
        float(_cubed(one[start : start + _BLOCK] @ other.T, one.shape[1]).sum())
        for start in range(0, len(one), _BLOCK)
    )


def _cubed(products: np.ndarray, width: int) -> np.ndarray:
    return (products / width + 1) ** 3
