"""Cluster: k-means within each class of the train split, by FAISS (Johnson et al., 2019)."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
import pyarrow as pa

from engine.context import Context, Result
from engine.core import rows
from engine.core.arrays import vectors_of
from engine.core.dataset import split_index
from engine.core.errors import DataError
from engine.core.rng import derive_seed
from engine.core.rows import TaskKind
from engine.core.spec import Spec
from engine.steps import StepKind
from engine.study import Cluster as ClusterSettings


class ClusterSpec(Spec):
    settings: ClusterSettings
    task: str
    tasks: dict[str, TaskKind]
    seed: int


class Cluster(StepKind):
    version: ClassVar[int] = 1
    Spec: ClassVar[type[Spec]] = ClusterSpec
    summary: ClassVar[str] = "k-means within each class of train"

    def run(self, context: Context) -> Result:
        spec = context.step.spec_as(ClusterSpec)
        column = rows.label_column(spec.task)
        index = split_index(context.store, context.inputs["ingest"], spec.task, "train")
        label_of = dict(
            zip(index[rows.IMAGE_ID].to_pylist(), index[column].to_pylist(), strict=True)
        )
        embedded = pa.concat_tables(
            context.store.tables(context.inputs["embed"].keys(split="train"))
        )
        ids = np.asarray(embedded[rows.IMAGE_ID].to_pylist(), dtype=object)
        labels = np.asarray([label_of[image_id] for image_id in ids], dtype=object)
        vectors = vectors_of(embedded)

        classes = sorted(set(labels))
        sizes = {name: int((labels == name).sum()) for name in classes}
        k_of = {name: number_of_clusters(spec.settings.k, sizes, name) for name in classes}
        tables, centroids, found = [], [], {}
        with context.progress(len(classes), "classes") as bar:
            for name in classes:
                held = np.flatnonzero(labels == name)
                seed = derive_seed(spec.seed, "cluster", name) % 2**31
                centers, assigned, distance = k_means(
                    vectors[held],
                    k_of[name],
                    spec.settings.iterations,
                    seed,
                    spec.settings.spherical,
                )
                count = len(held)
                tables.append(
                    pa.table(
                        [
                            ids[held].tolist(),
                            [name] * count,
                            assigned.astype(np.int32),
                            distance.astype(np.float32),
                        ],
                        names=[rows.IMAGE_ID, column, rows.CLUSTER, rows.DISTANCE],
                    )
                )
                centroids.append(
                    pa.table(
                        {
                            column: [name] * len(centers),
                            rows.CLUSTER: pa.array(range(len(centers)), pa.int32()),
                            rows.EMBEDDING: pa.FixedSizeListArray.from_arrays(
                                pa.array(centers.ravel(), pa.float32()), centers.shape[1]
                            ),
                        }
                    )
                )
                found[name] = sorted(
                    np.bincount(assigned, minlength=len(centers)).tolist(), reverse=True
                )
                bar.advance(1)
        parts = [
            context.table("clusters", pa.concat_tables(tables), table="clusters"),
            context.table("centroids", pa.concat_tables(centroids), table="centroids"),
        ]
        number = sum(k_of.values())
        headline = f"{number} clusters in {len(classes)} classes"
        return Result(parts, len(ids), {"headline": headline, "sizes": found})


def number_of_clusters(k: int | str, sizes: dict[str, int], name: str) -> int:
    """k for one class. Raises `DataError` that names the largest k that fits all classes."""
    if k == "auto":
        return max(1, round(math.sqrt(sizes[name] / 2)))
    smallest = min(sizes, key=lambda other: sizes[other])
    if int(k) > sizes[smallest]:
        raise DataError(
            f"cluster.k: {k} clusters are more than the {sizes[smallest]} images of the class"
            f" {smallest!r};"
            f" the largest k for this data is {sizes[smallest]}, or say auto"
        )
    return int(k)


def k_means(
    vectors: np.ndarray, k: int, iterations: int, seed: int, spherical: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centroids (k, width), the cluster of each row, and its Euclidean distance to the centroid.

    Deterministic for a seed and a number of threads of one. spherical: rows and centroids have
    length 1.
    """
    import faiss

    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    if spherical:
        vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    kmeans = faiss.Kmeans(
        vectors.shape[1], k, niter=iterations, seed=seed, spherical=spherical,
        min_points_per_centroid=1, max_points_per_centroid=max(256, -(-len(vectors) // k)),
    )  # fmt: skip
    kmeans.train(vectors)
    squared, assigned = kmeans.index.search(vectors, 1)
    if spherical:  # the index holds inner products
        squared = 2 - 2 * squared
    return kmeans.centroids, assigned[:, 0], np.sqrt(np.maximum(squared[:, 0], 0))
