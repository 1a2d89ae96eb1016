"""Selection of rows that represent a set of embeddings."""

from __future__ import annotations

import numpy as np

from engine.vectors.kmeans import k_means

_NEIGHBOURS = 10
_BLOCK = 4096
_CELLS = 1024


def farthest_first(vectors: np.ndarray, count: int, first: int) -> np.ndarray:
    """`count` rows of (n, width), each the farthest from those before it (Gonzalez 1985), starting
    with the row `first`. Their largest distance to any row is at most twice the optimum. int64, in
    order of choice; ties go to the earlier row."""
    chosen = np.empty(min(count, len(vectors)), np.int64)
    nearest = np.full(len(vectors), np.inf, np.float32)
    squares = np.einsum("ij,ij->i", vectors, vectors)
    current = first
    for number in range(len(chosen)):
        chosen[number] = current
        # A product is fifteen times as fast as differences, and needs no copy of the rows.
        squared = squares + squares[current] - 2 * (vectors @ vectors[current])
        nearest = np.minimum(nearest, np.maximum(squared, 0))
        # Chosen rows must not be chosen again, even if all rows are equal.
        nearest[chosen[: number + 1]] = -1
        current = int(nearest.argmax())
    return chosen


def k_center(vectors: np.ndarray, count: int) -> np.ndarray:
    """`count` rows of (n, width) that are close to every other row (core-set selection, Sener and
    Savarese 2018): farthest first, from the row nearest to the mean. int64, in order of choice."""
    mean = vectors.mean(0)
    middle = np.einsum("ij,ij->i", vectors, vectors) - 2 * (vectors @ mean)
    return farthest_first(vectors, count, int(middle.argmin()))


def cover(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` rows that cover points (n, 2) evenly; int64, rising.

    k-means divides the points into `count` cells, at most 1,024, and each cell contributes the row
    nearest to its centroid (undersampling by clusters, Lin et al. 2017). With more rows than cells,
    cells contribute in proportion to their size, and further rows of a cell are farthest first.
    """
    clusters = k_means(points, min(count, _CELLS), seed)
    given = shares(count, clusters.sizes.astype(float), clusters.sizes)
    order = np.argsort(clusters.assigned, kind="stable")
    chosen = [np.empty(0, np.int64)]
    for cell, wanted in zip(np.split(order, clusters.sizes.cumsum()[:-1]), given, strict=True):
        first = int(clusters.distance[cell].argmin())
        chosen.append(cell[farthest_first(points[cell], int(wanted), first)])
    return np.sort(np.concatenate(chosen))


def stratified(strata: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` random rows, from each stratum in proportion to its size (proportional allocation,
    Neyman 1934), at least one of each if `count` allows. strata: (n,), any values. int64,
    rising."""
    names, stratum_of, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    given = shares(count, sizes.astype(float), sizes)
    chosen = [
        random.choice(np.flatnonzero(stratum_of == number), wanted, replace=False)
        for number, wanted in zip(range(len(names)), given, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def local_density(vectors: np.ndarray, neighbours: int = _NEIGHBOURS) -> np.ndarray:
    """The density around each row of (n, width): minus the mean Euclidean distance of its nearest
    rows, float32 (n,)."""
    import faiss

    count = min(neighbours, len(vectors) - 1)
    if count < 1:
        return np.zeros(len(vectors), np.float32)
    rows = np.ascontiguousarray(vectors, np.float32)
    index = faiss.IndexFlatL2(rows.shape[1])
    index.add(rows)
    density = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _BLOCK):
        squared, _ = index.search(rows[start : start + _BLOCK], count + 1)
        # The first is the row itself, or an equal one.
        density[start : start + _BLOCK] = -np.sqrt(np.maximum(squared[:, 1:], 0)).mean(1)
    return density


def shares(total: int, weights: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Divide `total` into whole numbers in proportion to `weights` (n,), by largest remainder, each
    up to its limit; the excess goes to the others. Each gets one before any gets two."""
    total = min(total, int(limits.sum()))
    given = np.zeros(len(weights), np.int64)
    order = np.argsort(-weights, kind="stable")
    for number in order[:total]:
        given[number] = min(1, limits[number])
    while (left := total - int(given.sum())) > 0:
        has_room = given < limits
        wanted = np.where(has_room, weights, 0.0)
        wanted = wanted / wanted.sum() * left if wanted.sum() > 0 else has_room / has_room.sum()
        whole = np.minimum(np.floor(wanted).astype(np.int64), limits - given)
        if not whole.any():
            rest = np.argsort(-np.where(has_room, wanted, -1), kind="stable")[:left]
            whole[[row for row in rest if has_room[row]]] = 1
        given += whole
    return given
