"""k-means by FAISS (Johnson et al. 2019), begun by greedy k-means++ (Arthur and Vassilvitskii 2007)
on a sample: random beginnings end several percent above it. Lloyd's iterations run on samples too,
each four times as large as the one before, until they gain little; a few on all rows then do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.core.rng import generator

# Rows for each cluster on which k-means++ chooses, between two numbers of rows in all; and in the
# first sample that is iterated on.
_SEEDED, _SEEDED_LEAST, _SEEDED_MOST = 16, 4_096, 16_384
_FIRST, _FIRST_LEAST = 64, 16_384
# Iterations between two looks at how much is still gained.
_ROUND = 3
# Rows that are assigned at once.
_BLOCK = 65_536
_SILHOUETTE = 2_000


@dataclass(frozen=True)
class Clusters:
    """centroids: float32 (k, width). assigned: int64 (n,), the cluster of each row. distance:
    float32 (n,), Euclidean, to its centroid. dissolved: clusters that were asked for and are not
    there, having had too few rows."""

    centroids: np.ndarray
    assigned: np.ndarray
    distance: np.ndarray
    dissolved: int = 0

    @property
    def inertia(self) -> float:
        """Sum of squared distances."""
        return float(np.square(self.distance, dtype=np.float64).sum())

    @property
    def sizes(self) -> np.ndarray:
        return np.bincount(self.assigned, minlength=len(self.centroids))


def k_means(
    vectors: np.ndarray,
    k: int,
    seed: int,
    *,
    iterations: int = 100,
    spherical: bool = False,
    sample: int | None = None,
    min_size: int = 1,
    gpu: bool = False,
    tolerance: float = 1e-3,
) -> Clusters:
    """Cluster the rows of float32 (n, width), which may be a memory map.

    iterations: at most, on each sample and on all rows; they end where less than a share
    `tolerance` is gained.
    spherical: rows and centroids have length 1. sample: rows that centroids are learnt from, all
    being assigned. min_size: clusters with fewer rows are dissolved, smallest first, and their rows
    go where they are nearest. Deterministic for a seed, a machine and its number of threads.
    """
    random = generator(seed, "k-means")
    learnt = vectors if sample is None else _drawn(vectors, max(sample, k), random)
    learnt = _lengthened(learnt, spherical)
    centroids = _learn(learnt, k, random, iterations, spherical, gpu, tolerance)
    wanted = len(centroids)
    while True:
        assigned, squared = assign(vectors, centroids, spherical=spherical, gpu=gpu)
        sizes = np.bincount(assigned, minlength=len(centroids))
        poor = np.flatnonzero(sizes < max(1, min_size))
        if not len(poor) or len(centroids) == 1:
            break
        # All empty ones at once; of those that have rows one by one, for these go elsewhere.
        gone = poor[sizes[poor] == 0]
        centroids = np.delete(centroids, gone if len(gone) else poor[sizes[poor].argmin()], axis=0)
    return Clusters(centroids, assigned, np.sqrt(squared), wanted - len(centroids))


def assign(
    vectors: np.ndarray,
    centroids: np.ndarray,
    *,
    spherical: bool = False,
    gpu: bool = False,
    block: int = _BLOCK,
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each row, int64 (n,), and the squared distance to it, float32 (n,).

    block: rows that are held in memory at once.
    """
    import faiss

    index = faiss.IndexFlatL2(centroids.shape[1])
    if gpu:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(np.ascontiguousarray(centroids, dtype=np.float32))
    assigned = np.empty(len(vectors), np.int64)
    squared = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), block):
        rows = slice(start, start + block)
        near, found = index.search(_lengthened(vectors[rows], spherical), 1)
        assigned[rows] = found[:, 0]
        # What cancels out in a product of large vectors leaves little below nothing.
        squared[rows] = np.maximum(near[:, 0], 0)
    return assigned, squared


def choose_k(
    vectors: np.ndarray,
    candidates: Sequence[int],
    seed: int,
    *,
    sample: int = 5_000,
    spherical: bool = False,
) -> tuple[int, dict[int, float]]:
    """The number of clusters with the highest mean silhouette (Rousseeuw 1987) on a sample, the
    smaller of equals; and the silhouette of each. Candidates that do not fit the sample are left
    out; 1 where none does."""
    from sklearn.metrics import silhouette_score

    random = generator(seed, "choose k")
    held = _lengthened(_drawn(vectors, sample, random), spherical)
    looked_at = np.sort(random.permutation(len(held))[:_SILHOUETTE])
    found: dict[int, float] = {}
    for k in sorted(set(candidates)):
        if not 2 <= k < len(looked_at):
            continue
        clusters = k_means(held, k, seed, spherical=spherical)
        of = clusters.assigned[looked_at]
        if 2 <= len(np.unique(of)) < len(of):
            found[k] = float(silhouette_score(held[looked_at], of))
    if not found:
        return 1, found
    return max(found, key=lambda k: (found[k], -k)), found


def _learn(
    vectors: np.ndarray, k: int, random: np.random.Generator, iterations: int, spherical: bool,
    gpu: bool, tolerance: float,
) -> np.ndarray:  # fmt: skip
    from sklearn.cluster import kmeans_plusplus

    if k >= len(vectors):
        return np.array(vectors[:k])
    seeded = _drawn(vectors, max(4 * k, min(max(_SEEDED * k, _SEEDED_LEAST), _SEEDED_MOST)), random)
    # Of float32 rows scikit-learn makes float64 ones anew for every centroid.
    centroids, _ = kmeans_plusplus(
        seeded.astype(np.float64), k, random_state=int(random.integers(2**31))
    )
    rows = max(_FIRST * k, _FIRST_LEAST)
    while 2 * rows < len(vectors):
        centroids = _lloyd(
            _drawn(vectors, rows, random), centroids, iterations, spherical, gpu, tolerance
        )
        rows *= 4
    return _lloyd(vectors, centroids, iterations, spherical, gpu, tolerance)


def _lloyd(
    vectors: np.ndarray, centroids: np.ndarray, iterations: int, spherical: bool, gpu: bool,
    tolerance: float,
) -> np.ndarray:  # fmt: skip
    import faiss

    count, k = len(vectors), len(centroids)
    done = 0
    while done < iterations:
        rounds = min(_ROUND, iterations - done)
        clustering = faiss.Kmeans(
            vectors.shape[1], k, niter=rounds, seed=1, spherical=spherical, gpu=gpu,
            min_points_per_centroid=1, max_points_per_centroid=-(-count // k) + 1,
        )  # fmt: skip
        clustering.train(vectors, init_centroids=np.ascontiguousarray(centroids, np.float32))
        centroids, done = clustering.centroids, done + rounds
        # Before each update, the sum of squared distances or of what is lacking to full similarity.
        lost = [count - value if spherical else value for value in clustering.obj]
        if lost[0] - lost[-1] <= tolerance * abs(lost[-1]):
            break
    return np.asarray(centroids)


def _drawn(vectors: np.ndarray, wanted: int, random: np.random.Generator) -> np.ndarray:
    """So many rows, in their order; all where there are no more."""
    if wanted >= len(vectors):
        return vectors
    return vectors[np.sort(random.choice(len(vectors), wanted, replace=False))]


def _lengthened(vectors: np.ndarray, spherical: bool) -> np.ndarray:
    made = np.ascontiguousarray(vectors, dtype=np.float32)
    if spherical:
        made = made / np.maximum(np.linalg.norm(made, axis=1, keepdims=True), 1e-12)
    return made
