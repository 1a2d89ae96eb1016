from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.errors import DataError
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.data.arrays import vectors_of
from engine.plan import plan
from engine.steps.cluster import candidates, number_of_clusters
from engine.study import Study


@pytest.mark.parametrize(("images", "k"), [(2, 1), (8, 2), (200, 10), (5000, 50)])
def test_auto_is_the_square_root_of_half_the_images(images: int, k: int) -> None:
    assert number_of_clusters("auto", {"a": images}, "a") == k


def test_too_many_clusters_error_names_the_largest_k() -> None:
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


def test_only_training_images_have_a_cluster_of_their_class(
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


def test_clusters_over_all_classes_share_numbers(
    image_folder: Callable[..., Path], toy_study: Callable[..., Study], run_until: Any, store: Store
) -> None:
    study = toy_study(
        image_folder({"a": 20, "b": 30}), cluster={"k": 4, "scope": "whole"},
        select={"per_cluster": 2},
    )  # fmt: skip
    manifest = run_until(study, "select")
    clustered = run_until(study, "cluster")
    (sizes,) = clustered.metrics["sizes"].values()
    assert len(sizes) == 4
    assert sum(sizes) == 33
    centroids = pa.concat_tables(store.tables(clustered.keys(table="centroids")))
    assert centroids["label.class"].to_pylist() == [None] * 4
    chosen = pa.concat_tables(store.tables(manifest.keys(table="representatives")))
    cells = list(zip(chosen["label.class"].to_pylist(), chosen["cluster"].to_pylist(), strict=True))
    assert max(cells.count(cell) for cell in cells) == 2
    assert {label for label, _ in cells} == {"a", "b"}


def test_number_of_clusters_can_be_chosen_by_silhouette(
    image_folder: Callable[..., Path], toy_study: Callable[..., Study], run_until: Any
) -> None:
    study = toy_study(image_folder({"a": 60, "b": 30}), cluster={"k": "silhouette", "k_max": 5})
    metrics = run_until(study, "cluster").metrics
    for name, scores in metrics["silhouette"].items():
        assert set(scores) <= {"2", "3", "4", "5"}
        assert len(metrics["sizes"][name]) == int(max(scores, key=scores.__getitem__))


def test_small_clusters_are_dissolved_and_reported(
    image_folder: Callable[..., Path], toy_study: Callable[..., Study], run_until: Any
) -> None:
    root = image_folder({"a": 20, "b": 30})
    study = toy_study(root, cluster={"k": 8, "min_size": 4})
    metrics = run_until(study, "cluster").metrics
    assert min(min(sizes) for sizes in metrics["sizes"].values()) >= 4
    assert "clusters_dissolved" in {notice["code"] for notice in metrics["warnings"]}
    plainly = run_until(toy_study(root, cluster={"k": 8}), "cluster")
    assert "clusters_tiny" in {notice["code"] for notice in plainly.metrics["warnings"]}


def test_few_images_allow_few_clusters() -> None:
    assert candidates(16, 10) == [2, 3]
    assert candidates(16, 1000) == [2, 3, 4, 5, 6, 7, 8, 10, 12, 15]
    assert candidates(3, 1000) == [2, 3]
