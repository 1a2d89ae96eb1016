"""Cluster: k-means of the train split, within each class or over all (`engine.vectors.kmeans`).

The part `table: clusters` has the cluster of each training image, and its distance to the centroid;
`table: centroids` the centroids. Clusters over all classes share one
numbering, and their centroids have no label.
"""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa

from engine.context import Context, Output
from engine.core import rows
from engine.core.errors import DataError
from engine.core.notice import Notice
from engine.core.rng import derive_seed
from engine.core.rows import TaskKind
from engine.core.spec import Spec
from engine.data.arrays import grouped_vectors, release
from engine.data.dataset import by_id, split_index
from engine.results.data import ClusterResult
from engine.settings import Cluster as ClusterSettings
from engine.steps import StepKind
from engine.vectors.kmeans import Clusters, choose_k, k_means

_WHOLE = "all classes"
# Warns of clusters with fewer images: their statistics mean little.
_TINY = 3


class ClusterSpec(Spec):
    settings: ClusterSettings
    task: str
    tasks: dict[str, TaskKind]
    seed: int


class Cluster(StepKind[ClusterSpec]):
    version = 3
    summary = "k-means within each class of train"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(ClusterSpec)
        settings = spec.settings
        column = rows.label_column(spec.task)
        index = split_index(context.store, context.inputs["ingest"], spec.task, "train")
        label_of = by_id(index, column)
        whole = settings.scope == "whole"
        vectors_of = grouped_vectors(
            context.store, context.inputs["embed"].keys(split="train"),
            dict.fromkeys(label_of, _WHOLE) if whole else label_of,
        )  # fmt: skip
        counts = {name: len(ids) for name, (ids, _) in vectors_of.items()}
        gpu = context.device == "cuda" and gpus() > 0

        tables, centroids = [], []
        clusters_of: dict[str, Clusters] = {}
        silhouettes: dict[str, dict[int, float]] = {}
        with context.progress(len(vectors_of), "classes") as bar:
            for name, (ids, vectors) in vectors_of.items():
                # The draws of a class do not depend on the other classes.
                seed = derive_seed(spec.seed, "cluster", name)
                if settings.k == "silhouette":
                    k, silhouettes[name] = choose_k(
                        vectors, candidates(settings.k_max, len(ids)), seed,
                        spherical=settings.spherical,
                    )  # fmt: skip
                else:
                    k = number_of_clusters(settings.k, counts, name)
                clusters = k_means(
                    vectors, k, seed, iterations=settings.iterations,
                    spherical=settings.spherical, sample=settings.sample,
                    min_size=settings.min_size, gpu=gpu,
                )  # fmt: skip
                release(vectors)
                clusters_of[name] = clusters
                tables.append(
                    pa.table(
                        [
                            ids,
                            [label_of[image_id] for image_id in ids],
                            clusters.assigned.astype(np.int32),
                            clusters.distance,
                        ],
                        names=[rows.IMAGE_ID, column, rows.CLUSTER, rows.DISTANCE],
                    )
                )
                numbers = range(len(clusters.centroids))
                centroids.append(
                    pa.table(
                        {
                            column: pa.array([None if whole else name] * len(numbers), pa.string()),
                            rows.CLUSTER: pa.array(numbers, pa.int32()),
                            rows.EMBEDDING: rows.fixed_lists(clusters.centroids),
                        }
                    )
                )
                bar.advance(1)
        parts = [
            context.table("clusters", pa.concat_tables(tables), table="clusters"),
            context.table("centroids", pa.concat_tables(centroids), table="centroids"),
        ]
        warnings = what_to_know(clusters_of)
        context.warn(warnings)
        number = sum(len(clusters.centroids) for clusters in clusters_of.values())
        scores = {
            name: {str(k): value for k, value in by_k.items()} for name, by_k in silhouettes.items()
        }
        result = ClusterResult(
            headline=f"{number} clusters"
            + (" over all classes" if whole else f" in {len(clusters_of)} classes"),
            sizes={name: sorted(clusters.sizes.tolist(), reverse=True)
                   for name, clusters in clusters_of.items()},
            inertia={name: clusters.inertia for name, clusters in clusters_of.items()},
            warnings=warnings, silhouette=scores,
        )  # fmt: skip
        return Output(parts, sum(counts.values()), result)


def what_to_know(clusters_of: dict[str, Clusters]) -> list[Notice]:
    """A warning for each class with dissolved or tiny clusters."""
    warnings = []
    for name, clusters in clusters_of.items():
        if clusters.dissolved:
            before = clusters.dissolved + len(clusters.centroids)
            warnings.append(
                Notice.of("clusters_dissolved", name=name, dissolved=clusters.dissolved,
                          clusters=before)
            )  # fmt: skip
        tiny = int((clusters.sizes < _TINY).sum())
        if tiny and tiny < len(clusters.centroids):
            warnings.append(
                Notice.of("clusters_tiny", name=name, tiny=tiny, clusters=len(clusters.centroids),
                          images=_TINY)
            )  # fmt: skip
    return warnings


def number_of_clusters(k: int | str, sizes: dict[str, int], name: str) -> int:
    """k for one class. Raises `DataError`, which names the largest k that fits all classes."""
    if k == "auto":
        return max(1, round(math.sqrt(sizes[name] / 2)))
    smallest = min(sizes, key=lambda other: sizes[other])
    if int(k) > sizes[smallest]:
        raise DataError(
            f"cluster.k: {k} clusters are more than the {sizes[smallest]} images of the class"
            f" {smallest!r};"
            f" the largest k for this data is {sizes[smallest]}; lower cluster.k or set it to auto"
        )
    return int(k)


def candidates(most: int, images: int) -> list[int]:
    """The candidate numbers of clusters: 2 to 8, then each a quarter larger, up to `most` and to
    the square root of the number of images."""
    numbers = list(range(2, 9))
    while numbers[-1] < most:
        numbers.append(round(numbers[-1] * 1.25))
    return [k for k in numbers if k <= min(most, math.isqrt(images))]


def gpus() -> int:
    """The number of GPUs that FAISS sees in this process; 0 for its CPU build."""
    import faiss

    return int(faiss.get_num_gpus()) if hasattr(faiss, "index_cpu_to_all_gpus") else 0
