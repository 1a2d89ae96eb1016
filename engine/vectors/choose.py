"""Which rows stand for a set of embeddings."""

from __future__ import annotations

import numpy as np

from engine.vectors.kmeans import k_means

_NEIGHBOURS = 10
_BLOCK = 4096
_CELLS = 1024


def farthest_first(vectors: np.ndarray, count: int, first: int) -> np.ndarray:
    """`count` rows of (n, width), each the farthest from those before it (Gonzalez 1985), beginning
    with the row `first`: at most twice as far from any row as the best choice is. int64, in the
    order of choice; equal distances fall to the earlier row."""
    chosen = np.empty(min(count, len(vectors)), np.int64)
    nearest = np.full(len(vectors), np.inf, np.float32)
    squares = np.einsum("ij,ij->i", vectors, vectors)
    current = first
    for number in range(len(chosen)):
        chosen[number] = current
        # By a product, fifteen times as quick as by differences, and without a copy of the rows.
        apart = squares + squares[current] - 2 * (vectors @ vectors[current])
        nearest = np.minimum(nearest, np.maximum(apart, 0))
        # A chosen one lies at no distance from itself; its twins do not come before it.
        nearest[chosen[: number + 1]] = -1
        current = int(nearest.argmax())
    return chosen


def k_center(vectors: np.ndarray, count: int) -> np.ndarray:
    """`count` rows of (n, width) that no other lies far from (core-set selection, Sener and
    Savarese 2018): farthest first, from the row nearest to the mean. int64, in the order of
    choice."""
    mean = vectors.mean(0)
    middle = np.einsum("ij,ij->i", vectors, vectors) - 2 * (vectors @ mean)
    return farthest_first(vectors, count, int(middle.argmin()))


def cover(points: np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` rows that cover points (n, 2) evenly; int64, rising.

    k-means parts the points into as many cells as rows are chosen, at most 1,024, and a cell gives
    the row nearest to its centroid (undersampling by clusters, Lin et al. 2017). Where cells have
    several to give, in proportion to their rows, the others of a cell are farthest first.
    """
    clusters = k_means(points, min(count, _CELLS), seed)
    given = shares(count, clusters.sizes.astype(float), clusters.sizes)
    order = np.argsort(clusters.assigned, kind="stable")
    chosen = [np.empty(0, np.int64)]
    for held, wanted in zip(np.split(order, clusters.sizes.cumsum()[:-1]), given, strict=True):
        first = int(clusters.distance[held].argmin())
        chosen.append(held[farthest_first(points[held], int(wanted), first)])
    return np.sort(np.concatenate(chosen))


def stratified(strata: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` rows, of each stratum by chance as many as its share of the rows says (proportional
    allocation, Neyman 1934), one at least where there are enough. strata: (n,), any values. int64,
    rising."""
    names, of, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    given = shares(count, sizes.astype(float), sizes)
    chosen = [
        random.choice(np.flatnonzero(of == number), wanted, replace=False)
        for number, wanted in zip(range(len(names)), given, strict=True)
    ]
    return np.sort(np.concatenate(chosen))


def local_density(vectors: np.ndarray, neighbours: int = _NEIGHBOURS) -> np.ndarray:
    """How near the nearest rows are to each row of (n, width): minus their mean Euclidean
    distance, float32 (n,)."""
    import faiss

    count = min(neighbours, len(vectors) - 1)
    if count < 1:
        return np.zeros(len(vectors), np.float32)
    held = np.ascontiguousarray(vectors, np.float32)
    index = faiss.IndexFlatL2(held.shape[1])
    index.add(held)
    found = np.empty(len(held), np.float32)
    for start in range(0, len(held), _BLOCK):
        squared, _ = index.search(held[start : start + _BLOCK], count + 1)
        # The first is the row itself, or a twin of it.
        found[start : start + _BLOCK] = -np.sqrt(np.maximum(squared[:, 1:], 0)).mean(1)
    return found


def shares(total: int, weights: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """`total` whole things in proportion to `weights` (n,), by largest remainder; none gets more
    than its limit, what it cannot take goes to the others, and each gets one before any gets two
    where there is enough."""
    total = min(total, int(limits.sum()))
    given = np.zeros(len(weights), np.int64)
    order = np.argsort(-weights, kind="stable")
    for number in order[:total]:
        given[number] = min(1, limits[number])
    while (left := total - int(given.sum())) > 0:
        open_ones = given < limits
        wanted = np.where(open_ones, weights, 0.0)
        wanted = wanted / wanted.sum() * left if wanted.sum() > 0 else open_ones / open_ones.sum()
        whole = np.minimum(np.floor(wanted).astype(np.int64), limits - given)
        if not whole.any():
            rest = np.argsort(-np.where(open_ones, wanted, -1), kind="stable")[:left]
            whole[[row for row in rest if open_ones[row]]] = 1
        given += whole
    return given
