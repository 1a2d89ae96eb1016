from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.arrays import vectors_of
from engine.core.errors import DataError
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.plan import plan
from engine.steps.cluster import k_means, number_of_clusters
from engine.study import Study


def blobs(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around three far corners, and the corner of each."""
    random = np.random.default_rng(seed)
    corners = np.array([[9, 0, 0, 0], [0, 9, 0, 0], [0, 0, 9, 0]], dtype=np.float32)
    which = np.arange(count) % 3
    return corners[which] + random.normal(0, 0.3, (count, 4)).astype(np.float32), which


@pytest.mark.parametrize("spherical", [False, True])
def test_k_means_finds_the_groups_that_are_there(spherical: bool) -> None:
    vectors, which = blobs(90)
    centers, assigned, distance = k_means(vectors, 3, 25, 1, spherical)
    assert len({(a, b) for a, b in zip(assigned, which, strict=True)}) == 3
    points = vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if spherical else vectors
    expected = np.linalg.norm(points - centers[assigned], axis=1)
    np.testing.assert_allclose(distance, expected, atol=2e-3)
    lengths = np.linalg.norm(centers, axis=1)
    assert np.allclose(lengths, 1, atol=1e-4) == spherical


def test_k_means_is_a_function_of_its_seed() -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    first, again, other = (k_means(vectors, 5, 10, seed, False) for seed in (1, 1, 2))
    assert (first[0] == again[0]).all()
    assert (first[1] == again[1]).all()
    assert (first[0] != other[0]).any()


def test_as_many_clusters_as_images_puts_each_alone() -> None:
    vectors, _ = blobs(6)
    _, assigned, distance = k_means(vectors, 6, 10, 0, False)
    assert len(set(assigned.tolist())) == 6
    assert distance.max() < 1e-2


@pytest.mark.parametrize(("images", "k"), [(2, 1), (8, 2), (200, 10), (5000, 50)])
def test_auto_is_the_root_of_half_the_images(images: int, k: int) -> None:
    assert number_of_clusters("auto", {"a": images}, "a") == k


def test_more_clusters_than_images_names_the_largest_k_that_fits_all() -> None:
    sizes = {"a": 100, "rare": 4}
    assert number_of_clusters(4, sizes, "a") == 4
    for name in sizes:
        with pytest.raises(DataError, match=r"cluster\.k: 5 .* 4 images of the class 'rare'; .*4"):
            number_of_clusters(5, sizes, name)


@pytest.fixture
def clustered(
    image_folder: Callable[..., Path], toy_study: Callable[..., Study], run_until: Any
) -> tuple[Study, Manifest]:
    study = toy_study(image_folder({"a": 20, "b": 30}), cluster={"k": 3}, select={"per_cluster": 2})
    return study, run_until(study, "cluster")


def test_every_training_image_has_a_cluster_of_its_class_and_no_other_image_has(
    clustered: tuple[Study, Manifest], store: Store, run_until: Any
) -> None:
    study, manifest = clustered
    ingest = run_until(study, "ingest")
    train = pa.concat_tables(store.tables(ingest.keys(split="train")))
    label_of = dict(
        zip(train[rows.IMAGE_ID].to_pylist(), train["label.class"].to_pylist(), strict=True)
    )
    found = pa.concat_tables(store.tables(manifest.keys(table="clusters"))).to_pylist()
    assert {row[rows.IMAGE_ID]: row["label.class"] for row in found} == label_of
    assert {row[rows.CLUSTER] for row in found} == {0, 1, 2}
    assert set(manifest.metrics["sizes"]) == {"a", "b"}
    assert [sum(sizes) for sizes in manifest.metrics["sizes"].values()] == [13, 20]
    centroids = pa.concat_tables(store.tables(manifest.keys(table="centroids")))
    assert centroids["label.class"].to_pylist() == ["a"] * 3 + ["b"] * 3
    assert vectors_of(centroids).shape == (6, 256)


def test_k_beyond_the_smallest_class_stops_the_step(
    image_folder: Callable[..., Path], toy_study: Callable[..., Study], run_until: Any, store: Store
) -> None:
    study = toy_study(image_folder({"a": 40, "b": 8}), cluster={"k": 20})
    with pytest.raises(DataError, match="the largest k for this data is 5"):
        run_until(study, "cluster")
    step = next(step for step in plan(study) if step.kind == "cluster")
    assert not store.exists(store.manifest("cluster", step.key))
