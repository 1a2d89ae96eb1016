"""k-means by FAISS (Johnson et al. 2019), initialised by greedy k-means++ (Arthur and Vassilvitskii
2007) on a sample: random initialisation ends several percent worse. Lloyd's iterations run on
samples too, each four times as large as the one before, so that a few on all rows suffice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.core.rng import generator
from engine.vectors.similarity import unit_length

# Rows per cluster in the sample of k-means++, and bounds of its size; rows per cluster in the first
# sample for Lloyd's iterations, and its minimum.
_SEEDED, _SEEDED_LEAST, _SEEDED_MOST = 16, 4_096, 16_384
_FIRST, _FIRST_LEAST = 64, 16_384
# Iterations between two checks of the gain.
_ROUND = 3
# Rows assigned at once.
_BLOCK = 65_536
# Rows that silhouettes are computed on.
_SILHOUETTE = 2_000


@dataclass(frozen=True)
class Clusters:
    """centroids: float32 (k, width). assigned: int64 (n,), the cluster of each row. distance:
    float32 (n,), Euclidean, to its centroid. dissolved: the number of clusters that had too few
    rows."""

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
        """Rows of each cluster, int64 (k,)."""
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

    iterations: the most on each sample and on all rows; they stop when the relative gain is below
    `tolerance`. spherical: rows and centroids have length 1. sample: the number of rows that
    centroids are learnt from; all rows are assigned. min_size: clusters with fewer rows are
    dissolved, smallest first, and their rows go to the nearest other cluster. Deterministic for a
    seed, a machine and its number of threads.
    """
    random = generator(seed, "k-means")
    learnt = vectors if sample is None else _drawn(vectors, max(sample, k), random)
    learnt = _as_rows(learnt, spherical)
    centroids = _learn(learnt, k, random, iterations, spherical, gpu, tolerance)
    wanted = len(centroids)
    while True:
        assigned, squared = assign(vectors, centroids, spherical=spherical, gpu=gpu)
        sizes = np.bincount(assigned, minlength=len(centroids))
        small = np.flatnonzero(sizes < max(1, min_size))
        if not len(small) or len(centroids) == 1:
            break
        # All empty clusters at once; the others one by one, because their rows go elsewhere.
        empty = small[sizes[small] == 0]
        gone = empty if len(empty) else small[sizes[small].argmin()]
        centroids = np.delete(centroids, gone, axis=0)
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

    block: rows in memory at once.
    """
    import faiss

    index: faiss.Index = faiss.IndexFlatL2(centroids.shape[1])
    if gpu:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(np.ascontiguousarray(centroids, dtype=np.float32))
    assigned = np.empty(len(vectors), np.int64)
    squared = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), block):
        rows = slice(start, start + block)
        distances, nearest = index.search(_as_rows(vectors[rows], spherical), 1)
        assigned[rows] = nearest[:, 0]
        # Rounding can leave slightly negative values for large vectors.
        squared[rows] = np.maximum(distances[:, 0], 0)
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
    smaller one of ties, and the silhouette of each candidate. Candidates that do not fit the sample
    are left out; 1 if none fits."""
    from sklearn.metrics import silhouette_score

    random = generator(seed, "choose k")
    rows = _as_rows(_drawn(vectors, sample, random), spherical)
    scored = np.sort(random.permutation(len(rows))[:_SILHOUETTE])
    silhouettes: dict[int, float] = {}
    for k in sorted(set(candidates)):
        if not 2 <= k < len(scored):
            continue
        assigned = k_means(rows, k, seed, spherical=spherical).assigned[scored]
        if 2 <= len(np.unique(assigned)) < len(assigned):
            silhouettes[k] = float(silhouette_score(rows[scored], assigned))
    if not silhouettes:
        return 1, silhouettes
    return max(silhouettes, key=lambda k: (silhouettes[k], -k)), silhouettes


def _learn(
    vectors: np.ndarray, k: int, random: np.random.Generator, iterations: int, spherical: bool,
    gpu: bool, tolerance: float,
) -> np.ndarray:  # fmt: skip
    from sklearn.cluster import kmeans_plusplus

    if k >= len(vectors):
        return np.array(vectors[:k])
    seeded = _drawn(vectors, max(4 * k, min(max(_SEEDED * k, _SEEDED_LEAST), _SEEDED_MOST)), random)
    # scikit-learn would convert float32 rows to float64 again for every centroid.
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
        assert clustering.centroids is not None
        assert clustering.obj is not None
        centroids, done = clustering.centroids, done + rounds
        # Before each update, the sum of squared distances, or of 1 - cosine.
        losses = [count - value if spherical else value for value in clustering.obj]
        if losses[0] - losses[-1] <= tolerance * abs(losses[-1]):
            break
    return np.asarray(centroids)


def _drawn(vectors: np.ndarray, wanted: int, random: np.random.Generator) -> np.ndarray:
    """`wanted` random rows in their order, or all if there are no more."""
    if wanted >= len(vectors):
        return vectors
    return vectors[np.sort(random.choice(len(vectors), wanted, replace=False))]


def _as_rows(vectors: np.ndarray, spherical: bool) -> np.ndarray:
    """Contiguous float32 rows, with length 1 if `spherical`."""
    return unit_length(vectors) if spherical else np.ascontiguousarray(vectors, dtype=np.float32)
