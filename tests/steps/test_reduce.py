"""Reduced dominant classes: which images are kept, and the arm that trains on them."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from engine.core import rows
from engine.core.errors import DataError, StudyError
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.data.arrays import vectors_of
from engine.execute import execute
from engine.export import export
from engine.plan import named, plan
from engine.profile import Profile
from engine.runtime.inline import InlineRuntime
from engine.settings import Reduce
from engine.steps.reduce import kept_counts
from engine.study import Study

# Only what differs from the finished study of bars is computed.
pytestmark = pytest.mark.usefixtures("resumed")

Run = Callable[[Study, str], Manifest]
COUNTS = {"a": 100, "b": 40, "c": 10}


def table(store: Store, manifest: Manifest, name: str) -> list[dict[str, Any]]:
    held = pa.concat_tables(store.tables(manifest.keys(table=name)))
    return list(held.to_pylist())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"a": 40}),
        ({"balance_to": "smallest"}, {"a": 10, "b": 10}),
        ({"balance_to": 60}, {"a": 60}),
        ({"balance_to": 5, "classes": ["b"]}, {"b": 5}),
        ({"share": 0.25}, {"a": 25}),
        ({"share": 0.1, "classes": ["b", "c"]}, {"b": 4, "c": 2}),
    ],
)
def test_dominant_classes_have_more_images_than_are_kept(
    fields: dict[str, Any], expected: dict[str, int]
) -> None:
    assert kept_counts(Reduce(**fields), COUNTS) == expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"balance_to": 100}, "no class has more images than are kept .'a' has 100"),
        ({"balance_to": 50, "classes": ["c"]}, "'c' has 10"),
        ({"classes": ["d"]}, "reduce.classes: unknown class 'd'; choose from a, b, c"),
    ],
)
def test_reduction_without_effect_is_rejected(fields: dict[str, Any], says: str) -> None:
    with pytest.raises((DataError, StudyError), match=says):
        kept_counts(Reduce(**fields), COUNTS)


@pytest.mark.parametrize(
    "method",
    ["tsne", pytest.param("umap", marks=pytest.mark.slow), "k_center", "stratified", "random"],
)
def test_each_method_keeps_the_requested_number(
    image_folder: Callable[..., Path], toy_study: Callable[..., Study], run_until: Run,
    store: Store, method: str,
) -> None:  # fmt: skip
    if method == "umap":
        pytest.importorskip("umap", reason="umap-learn is not installed")
    study = toy_study(
        image_folder({"many": 40, "few": 14}), cluster={"k": 3},
        reduce={"method": method, "balance_to": 11, "classes": ["many"]},
    )  # fmt: skip
    manifest = run_until(study, "reduce")
    found = table(store, manifest, "reduction")
    counts = Counter((entry["label.class"], entry[rows.KEPT]) for entry in found)
    many = manifest.metrics["classes"]["many"]["images"]
    assert counts["many", True] == 11
    assert counts["many", False] == many - 11
    assert counts["few", False] == 0
    placed = {(entry["label.class"], entry[rows.X] is not None) for entry in found}
    assert placed == {("many", method in ("tsne", "umap")), ("few", False)}
    # Distances from dropped to kept images equal those of a plain search.
    embed = run_until(study, "embed")
    held = pa.concat_tables(store.tables(embed.keys(split="train")))
    vector = dict(zip(held[rows.IMAGE_ID].to_pylist(), vectors_of(held), strict=True))
    kept, dropped = (
        np.stack([vector[entry[rows.IMAGE_ID]] for entry in found
                  if entry["label.class"] == "many" and entry[rows.KEPT] == side])
        for side in (True, False)
    )  # fmt: skip
    apart = np.linalg.norm(dropped[:, None] - kept[None], axis=2).min(1)
    assert manifest.metrics["classes"]["many"]["mean_distance"] == pytest.approx(
        float(apart.mean()), rel=1e-3
    )
    (key,) = manifest.keys(file="sheet.png")
    assert Image.open(io.BytesIO(store.read(key))).width > 3 * 8 * 48


def test_strata_are_the_clusters(
    image_folder: Callable[..., Path], toy_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    study = toy_study(
        image_folder({"many": 60, "few": 10}), cluster={"k": 4},
        reduce={"method": "stratified", "share": 0.5},
    )  # fmt: skip
    found = table(store, run_until(study, "reduce"), "reduction")
    clusters = table(store, run_until(study, "cluster"), "clusters")
    cluster = {entry[rows.IMAGE_ID]: entry[rows.CLUSTER] for entry in clusters}
    sides = {
        side: Counter(cluster[entry[rows.IMAGE_ID]] for entry in found
                      if entry["label.class"] == "many" and entry[rows.KEPT] == side)
        for side in (True, False)
    }  # fmt: skip
    for number in range(4):
        assert abs(sides[True][number] - sides[False][number]) <= 2


def reduced_study(bars_study: Callable[..., Study], **fields: Any) -> Study:
    return bars_study(reduce={"method": "k_center", "balance_to": "smallest"}, **fields)


def test_reduced_arm_trains_on_the_kept_images_and_is_a_baseline(
    bars_study: Callable[..., Study], store: Store, profile: Profile
) -> None:
    study = reduced_study(
        bars_study, search={"ratios": [1], "seeds": 2}, curate={"max_rounds": 1, "filters": []},
        training={"steps": 4, "batch_size": 16, "evaluate_every": 4},
    )  # fmt: skip
    steps = plan(study)
    manifests = execute(steps, store, InlineRuntime(), profile)

    def of(label: str) -> Manifest:
        return manifests[named(steps, label)[0].key]

    kept = {entry[rows.IMAGE_ID] for entry in table(store, of("reduce"), "reduction")
            if entry[rows.KEPT]}  # fmt: skip
    members = table(store, of("mix.reduced"), "members")
    assert {entry[rows.IMAGE_ID] for entry in members} == kept
    counts = Counter(entry["label.class"] for entry in members)
    assert counts["across"] == counts["down"]
    trials = table(store, of("search"), "trials")
    assert {entry["images"] for entry in trials if entry["arm"] == "reduced"} == {len(members)}
    assert not any(entry["role"] != "baseline" for entry in trials if entry["arm"] == "reduced")
    assert "reduced" in of("evaluate").metrics["arms"]
    (page,) = of("report").keys(file="report.html")
    text = store.read(page).decode()
    assert f"across: {counts['across']} of" in text
    # The arm can also be exported, without the dropped images.
    target = Store(f"{profile.storage}-export")
    told = export(study, store, target, "reduced", "imagefolder", ["train", "val"])
    assert told["images"]["train"] == {name: {"real": count} for name, count in counts.items()}
    assert sum(key.startswith("train/") for key in target.listing("")) == len(members)


def test_images_without_embedding_are_removed_first_and_too_few_others_stop_the_run(
    image_folder: Callable[..., Path], toy_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    root = image_folder({"many": 10, "few": 6})
    for grey in range(30):
        Image.new("RGB", (24, 24), (grey, grey, grey)).save(root / "many" / f"grey{grey}.png")
    fields: dict[str, Any] = {"method": "random", "classes": ["many"]}
    study = toy_study(root, reduce={**fields, "balance_to": 4})
    kept = [entry for entry in table(store, run_until(study, "reduce"), "reduction")
            if entry["label.class"] == "many" and entry[rows.KEPT]]  # fmt: skip
    embed = run_until(study, "embed")
    held = pa.concat_tables(store.tables(embed.keys(split="train")))[rows.IMAGE_ID].to_pylist()
    assert len(kept) == 4
    assert {entry[rows.IMAGE_ID] for entry in kept} <= set(held)
    with pytest.raises(DataError, match="20 images of 'many' are to be kept"):
        run_until(toy_study(root, reduce={**fields, "balance_to": 20}), "reduce")
