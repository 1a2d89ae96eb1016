"""Embeddings in two dimensions: t-SNE and UMAP."""

from __future__ import annotations

from typing import Literal

import numpy as np

from engine.core.rng import derive_seed, generator
from engine.vectors.kmeans import assign

PlaneMethod = Literal["tsne", "umap"]
_COMPONENTS = 50
_BLOCK = 16_384


def place(
    vectors: np.ndarray,
    method: PlaneMethod,
    seed: int,
    *,
    perplexity: float = 30.0,
    neighbours: int = 15,
    sample: int = 5_000,
) -> np.ndarray:
    """Points float32 (n, 2) for the rows of (n, width), which may be a memory map.

    tsne: van der Maaten and Hinton 2008, by scikit-learn, initialised with the first two principal
    components (Kobak and Berens 2019). umap: McInnes et al. 2018, by umap-learn. Both get the first
    50 principal components. Their time grows faster than the number of rows: beyond `sample` rows,
    a random sample is placed, and every other row gets the place of its nearest sampled row.

    perplexity, neighbours: roughly the number of neighbours that t-SNE and UMAP consider, reduced
    for few rows. Runs on one thread, because the number of threads changes the last bits of sums,
    which t-SNE amplifies. Deterministic for a seed and a kind of processor.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        return _place(vectors, method, seed, perplexity, neighbours, sample)


def _place(
    vectors: np.ndarray, method: PlaneMethod, seed: int, perplexity: float, neighbours: int,
    sample: int,
) -> np.ndarray:  # fmt: skip
    count = len(vectors)
    drawn = np.arange(count)
    if count > sample:
        drawn = np.sort(generator(seed, "place").choice(count, sample, replace=False))
    components = principal_components(vectors, drawn, seed)
    learnt, state = components[drawn], derive_seed(seed, method) % 2**32
    if not np.ptp(learnt, axis=0).any():
        return np.zeros((count, 2), np.float32)
    if method == "tsne":
        from sklearn.manifold import TSNE

        few = min(perplexity, (len(learnt) - 1) / 3)
        points = TSNE(init="pca", perplexity=few, random_state=state).fit_transform(learnt)
    else:
        from umap import UMAP

        few = min(neighbours, len(learnt) - 1)
        # Spectral initialisation needs more rows than axes.
        init = "spectral" if len(learnt) > 10 else "random"
        points = UMAP(
            n_neighbors=few, init=init, random_state=state, n_jobs=1
        ).fit_transform(learnt)  # fmt: skip
    points = np.asarray(points, np.float32)
    return points if len(learnt) == count else points[assign(components, learnt)[0]]


def principal_components(vectors: np.ndarray, learnt: np.ndarray, seed: int) -> np.ndarray:
    """The first 50 principal components of the rows of (n, width), float32, learnt from the rows
    `learnt`; the rows themselves if they are not wider."""
    from sklearn.decomposition import PCA

    components = min(_COMPONENTS, len(learnt), vectors.shape[1])
    if components == vectors.shape[1]:
        return np.array(vectors, np.float32)
    state = derive_seed(seed, "principal components") % 2**32
    model = PCA(components, random_state=state).fit(vectors[learnt])
    transformed = np.empty((len(vectors), components), np.float32)
    for start in range(0, len(vectors), _BLOCK):
        here = slice(start, start + _BLOCK)
        transformed[here] = model.transform(vectors[here])
    return transformed
