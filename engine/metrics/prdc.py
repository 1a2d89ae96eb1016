"""Quality and variety of synthetic images by nearest neighbours: precision, recall, density and
coverage.

    precision   share of synthetic images inside the real manifold
    recall      share of real images inside the synthetic manifold (Kynkäänniemi et al. 2019)
    density     real neighbourhoods that a synthetic image lies in, relative to k
    coverage    share of real images with a synthetic image in their neighbourhood (Naeem et al.
                2020)

A manifold is the union of balls around its vectors, with the distance to the k-th nearest other
vector as radius. Distances are Euclidean, computed in blocks: memory is O(n × block).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Distances in memory at once.
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
        raise ValueError(
            f"too few vectors: {len(real)} and {len(synthetic)} (more than k = {k} needed)"
        )
    real, synthetic = (np.ascontiguousarray(side, np.float64) for side in (real, synthetic))
    real_radius, synthetic_radius = squared_radii(real, k), squared_radii(synthetic, k)
    inside = balls = 0
    covered = np.zeros(len(real), dtype=bool)
    reached = np.zeros(len(real), dtype=bool)
    block = max(1, _PAIRS // len(real))
    for start in range(0, len(synthetic), block):
        here = slice(start, start + block)
        distances = squared_distances(synthetic[here], real)
        in_real = distances < real_radius
        inside += int(in_real.any(1).sum())
        balls += int(in_real.sum())
        covered |= in_real.any(0)
        reached |= (distances < synthetic_radius[here, None]).any(0)
    return Prdc(
        precision=inside / len(synthetic), recall=float(reached.mean()),
        density=balls / (k * len(synthetic)), coverage=float(covered.mean()),
    )  # fmt: skip


def squared_radii(vectors: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each vector to its k-th nearest other vector."""
    radii = []
    block = max(1, _PAIRS // len(vectors))
    for start in range(0, len(vectors), block):
        distances = squared_distances(vectors[start : start + block], vectors)
        # The vector itself is among them, at distance 0.
        radii.append(np.partition(distances, k, axis=1)[:, k])
    return np.concatenate(radii)


def squared_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared distances (n, m) of vectors (n, width) and (m, width)."""
    squared: np.ndarray = (first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * (first @ second.T)
    return np.asarray(np.maximum(squared, 0, out=squared))


def realism(real: np.ndarray, images: np.ndarray, k: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Realism score of each image (Kynkäänniemi et al. 2019) and its density (Naeem et al. 2020),
    float32 (n,) each.

    real, images: vectors (m, width) and (n, width), more than `k` real ones. Realism uses the half
    of the real images with the smallest neighbourhoods, because isolated ones would make every
    image realistic. Raises `ValueError` for fewer.
    """
    if len(real) <= k:
        raise ValueError(f"too few vectors: {len(real)} (more than k = {k} needed)")
    real = np.ascontiguousarray(real, np.float64)
    radius = squared_radii(real, k)
    dense = np.where(radius <= np.median(radius), radius, 0.0)
    score, density = np.empty(len(images), np.float32), np.empty(len(images), np.float32)
    block = max(1, _PAIRS // len(real))
    for start in range(0, len(images), block):
        here = slice(start, start + block)
        distances = squared_distances(images[here].astype(np.float64), real)
        density[here] = (distances < radius).sum(1) / k
        score[here] = np.sqrt((dense / np.maximum(distances, 1e-12)).max(1))
    return score, density
