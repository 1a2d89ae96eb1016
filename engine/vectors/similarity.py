"""Exact search for the most similar vectors, in constant memory."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from engine.data.arrays import release

_BLOCK = 2048


class Vectors(Protocol):
    """Vectors float32 (n, width) that are read in blocks: an array, or `Rows` of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, block: slice, /) -> np.ndarray: ...


class Rows:
    """Rows of an array, copied block by block when they are read."""

    def __init__(self, array: np.ndarray, rows: np.ndarray) -> None:
        self.array, self.rows = array, rows

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.array.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, block: slice, /) -> np.ndarray:
        rows: np.ndarray = self.array[self.rows[block]]
        release(self.array)
        return rows


def most_similar(queries: Vectors, among: Vectors, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The `n` vectors of `among` with the largest cosine to each query, or all if there are fewer:
    cosines float32 (m, n), falling, and rows int64 (m, n). By FAISS (Johnson et al. 2019), a block
    of both at a time."""
    import faiss

    n = min(n, len(among))
    similarity = np.empty((len(queries), n), np.float32)
    rows = np.empty((len(queries), n), np.int64)
    for start in range(0, len(queries), _BLOCK):
        block = unit_length(queries[start : start + _BLOCK])
        best = faiss.ResultHeap(len(block), n, keep_max=True)
        for first in range(0, len(among), _BLOCK):
            others = unit_length(among[first : first + _BLOCK])
            count = min(n, len(others))
            cosines, row = faiss.knn(block, others, count, faiss.METRIC_INNER_PRODUCT)
            best.add_result(cosines, row + first)
            if isinstance(among, np.ndarray):
                release(among)
        best.finalize()
        similarity[start : start + _BLOCK], rows[start : start + _BLOCK] = best.D, best.I
    return similarity, rows


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Float32 rows scaled to length 1; a row of zeros stays 0."""
    rows = np.ascontiguousarray(vectors, dtype=np.float32)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def lengths(vectors: Vectors) -> np.ndarray:
    """Euclidean lengths float32 (n,)."""
    norms = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), _BLOCK):
        norms[start : start + _BLOCK] = np.linalg.norm(vectors[start : start + _BLOCK], axis=1)
    return norms
