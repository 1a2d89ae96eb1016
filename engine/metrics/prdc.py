"""Are the images good, and are they all kinds of images? Four shares, from nearest neighbours.

    precision   of the synthetic, the share inside the real manifold
    recall      of the real, the share inside the synthetic manifold (Kynkäänniemi et al. 2019)
    density     how many real neighbourhoods a synthetic image lies in, relative to k
    coverage    of the real, the share with a synthetic image in its neighbourhood (Naeem et al.
                2020)

A manifold is the union of balls around its vectors, each as wide as the distance to the k-th
nearest other one. Distances are Euclidean, computed in blocks: memory is O(n × block).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Distances that are in memory at once.
_PAIRS = 2**22


@dataclass(frozen=True)
class Prdc:
    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: np.ndarray, synthetic: np.ndarray, k: int = 5) -> Prdc:
    """Vectors (n, width) and (m, width), more than `k` of each. Raises `ValueError` for fewer."""
    if min(len(real), len(synthetic)) <= k:
        raise ValueError(f"{len(real)} and {len(synthetic)} vectors; more than k = {k} are needed")
    real, synthetic = (np.ascontiguousarray(held, np.float64) for held in (real, synthetic))
    real_radius, synthetic_radius = squared_radii(real, k), squared_radii(synthetic, k)
    inside = balls = 0
    covered = np.zeros(len(real), dtype=bool)
    reached = np.zeros(len(real), dtype=bool)
    block = max(1, _PAIRS // len(real))
    for start in range(0, len(synthetic), block):
        held = slice(start, start + block)
        distances = squared_distances(synthetic[held], real)
        in_real = distances < real_radius
        inside += int(in_real.any(1).sum())
        balls += int(in_real.sum())
        covered |= in_real.any(0)
        reached |= (distances < synthetic_radius[held, None]).any(0)
    return Prdc(
        precision=inside / len(synthetic), recall=float(reached.mean()),
        density=balls / (k * len(synthetic)), coverage=float(covered.mean()),
    )  # fmt: skip


def squared_radii(vectors: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each vector to its k-th nearest other one."""
    found = []
    block = max(1, _PAIRS // len(vectors))
    for start in range(0, len(vectors), block):
        distances = squared_distances(vectors[start : start + block], vectors)
        # The vector itself is among them, at distance nil.
        found.append(np.partition(distances, k, axis=1)[:, k])
    return np.concatenate(found)


def squared_distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(n, m) of vectors (n, width) and (m, width)."""
    found = (one**2).sum(1)[:, None] + (other**2).sum(1)[None, :] - 2 * (one @ other.T)
    return np.maximum(found, 0, out=found)


def realism(real: np.ndarray, images: np.ndarray, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Realism score of each image (Kynkäänniemi et al. 2019) and the share of k real neighbourhoods
    that it lies in (density, Naeem et al. 2020), float32 (n,) each.

    real, images: vectors (m, width) and (n, width), more than `k` real ones. Realism looks at the
    half of the real images whose neighbourhoods are smallest: lone ones would count all as real.
    Raises `ValueError` for fewer.
    """
    if len(real) <= k:
        raise ValueError(f"{len(real)} vectors; more than k = {k} are needed")
    real = np.ascontiguousarray(real, np.float64)
    radius = squared_radii(real, k)
    dense = np.where(radius <= np.median(radius), radius, 0.0)
    score, density = np.empty(len(images), np.float32), np.empty(len(images), np.float32)
    block = max(1, _PAIRS // len(real))
    for start in range(0, len(images), block):
        held = slice(start, start + block)
        distances = squared_distances(images[held].astype(np.float64), real)
        density[held] = (distances < radius).sum(1) / k
        score[held] = np.sqrt((dense / np.maximum(distances, 1e-12)).max(1))
    return score, density
