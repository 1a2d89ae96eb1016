"""The most similar embeddings of another set, by FAISS (Johnson et al. 2019): exactly, or through
an index that searches a part of them."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from engine.vectors.similarity import Vectors, most_similar, unit_length

IndexKind = Literal["auto", "flat", "ivf", "hnsw"]
# Up to this many vectors, exact search is fast enough.
_FLAT = 200_000
# HNSW's links of each vector, and candidates in construction and search (Malkov and Yashunin 2016).
_LINKS, _BUILD, _SEARCH = 32, 80, 128
_TRAIN_PER_LIST = 64
_BLOCK = 16_384


class Neighbours:
    """An index of vectors (n, width) for the nearest by cosine.

    kind: flat searches all vectors; ivf the about √n / 4 lists, of √n, around the query; hnsw
    follows a graph. auto: flat for up to 200,000, otherwise ivf. flat copies no vectors, which may
    lie in a file. For clustered vectors, such as embeddings, ivf and hnsw find at least 95% of the
    ten nearest; for noise ivf may find only half.
    """

    def __init__(self, vectors: Vectors, kind: IndexKind = "auto") -> None:
        import faiss

        count, width = vectors.shape
        if kind == "auto":
            kind = "flat" if count <= _FLAT else "ivf"
        self.kind = kind
        lists = max(1, round(math.sqrt(count)))
        self.count, self.vectors = count, vectors
        # faiss's types lack the fields that are set below.
        self.index: Any = None
        if kind == "flat":
            return
        index: Any
        if kind == "ivf":
            quantizer = faiss.IndexFlatIP(width)
            index = faiss.IndexIVFFlat(quantizer, width, lists, faiss.METRIC_INNER_PRODUCT)
            index.cp.min_points_per_centroid, index.cp.seed = 1, 1
            index.nprobe = max(1, math.ceil(math.sqrt(count) / 4))
        else:
            index = faiss.IndexHNSWFlat(width, _LINKS, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction, index.hnsw.efSearch = _BUILD, _SEARCH
        if not index.is_trained:
            step = max(1, count // (_TRAIN_PER_LIST * lists))
            index.train(unit_length(vectors[::step]))
        for start in range(0, count, _BLOCK):
            index.add(unit_length(vectors[start : start + _BLOCK]))
        self.index = index

    def nearest(self, queries: Vectors, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 (m, n) of the vectors nearest to each query (m, width), nearest first, and
        their cosine distances float32 (m, n). Missing rows are -1; ties are in row order."""
        n = min(n, self.count)
        if self.index is None:
            similarity, rows = most_similar(queries, self.vectors, n)
        else:
            rows = np.empty((len(queries), n), np.int64)
            similarity = np.empty((len(queries), n), np.float32)
            for start in range(0, len(queries), _BLOCK):
                here = slice(start, start + _BLOCK)
                similarity[here], rows[here] = self.index.search(unit_length(queries[here]), n)
        distance = np.maximum(1 - similarity, 0)
        order = np.lexsort((rows, distance), axis=1)
        return np.take_along_axis(rows, order, 1), np.take_along_axis(distance, order, 1)
