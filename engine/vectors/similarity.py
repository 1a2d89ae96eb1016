"""The most similar of many vectors, exactly, in memory that does not grow with them."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from engine.data.arrays import release

_BLOCK = 2048


class Vectors(Protocol):
    """Vectors float32 (n, width), of which blocks are taken: an array, or `Rows` of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, block: slice, /) -> np.ndarray: ...


class Rows:
    """Some rows of an array, which are copied when a block of them is taken."""

    def __init__(self, array: np.ndarray, rows: np.ndarray) -> None:
        self.array, self.rows = array, rows

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.rows), *self.array.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, block: slice, /) -> np.ndarray:
        found: np.ndarray = self.array[self.rows[block]]
        release(self.array)
        return found


def most_similar(queries: Vectors, among: Vectors, n: int) -> tuple[np.ndarray, np.ndarray]:
    """The `n` of `among` with the largest cosine to each query, or as many as there are: cosines
    float32 (m, n), falling, and their rows int64 (m, n). By FAISS (Johnson et al. 2019), a block of
    both at a time."""
    import faiss

    n = min(n, len(among))
    similarity = np.empty((len(queries), n), np.float32)
    found = np.empty((len(queries), n), np.int64)
    for start in range(0, len(queries), _BLOCK):
        asked = unit_length(queries[start : start + _BLOCK])
        best = faiss.ResultHeap(len(asked), n, keep_max=True)
        for first in range(0, len(among), _BLOCK):
            held = unit_length(among[first : first + _BLOCK])
            near, row = faiss.knn(asked, held, min(n, len(held)), faiss.METRIC_INNER_PRODUCT)
            best.add_result(near, row + first)
            if isinstance(among, np.ndarray):
                release(among)
        best.finalize()
        similarity[start : start + _BLOCK], found[start : start + _BLOCK] = best.D, best.I
    return similarity, found


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Float32 rows of length 1; a row of zeros stays one."""
    held = np.ascontiguousarray(vectors, dtype=np.float32)
    made: np.ndarray = held / np.maximum(np.linalg.norm(held, axis=1, keepdims=True), 1e-12)
    return made


def lengths(vectors: Vectors) -> np.ndarray:
    """Euclidean lengths float32 (n,)."""
    found = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), _BLOCK):
        found[start : start + _BLOCK] = np.linalg.norm(vectors[start : start + _BLOCK], axis=1)
    return found
