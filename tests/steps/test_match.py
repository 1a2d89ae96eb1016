from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.data.arrays import vectors_of
from engine.study import Study

Run = Callable[[Study, str], Manifest]


def table(store: Store, manifest: Manifest, name: str) -> pa.Table:
    return pa.concat_tables(store.tables(manifest.keys(table=name)))


def embedded(store: Store, manifest: Manifest, split: str) -> tuple[list[str], np.ndarray]:
    held = pa.concat_tables(store.tables(manifest.keys(split=split)))
    return held[rows.IMAGE_ID].to_pylist(), vectors_of(held)


def test_matches_equal_scikit_learn(
    image_folder: Callable[..., Path], toy_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    study = toy_study(image_folder({"a": 20, "b": 30}), match={"held": {"queries": "val", "n": 4}})
    manifest = run_until(study, "match.held")
    embed = run_until(study, "embed")
    (ids, vectors), (val_ids, val) = (embedded(store, embed, name) for name in ("train", "val"))
    search = NearestNeighbors(n_neighbors=4, metric="cosine").fit(vectors)
    distance, expected = search.kneighbors(val)
    found = table(store, manifest, "matches").to_pylist()
    assert len(found) == 4 * len(val_ids)
    for row, query in enumerate(val_ids):
        pairs = sorted(
            (pair for pair in found if pair["query_id"] == query), key=lambda pair: pair["rank"]
        )
        assert [pair[rows.IMAGE_ID] for pair in pairs] == [ids[i] for i in expected[row]]
        assert np.allclose([pair["distance"] for pair in pairs], distance[row], atol=1e-5)


def test_no_image_of_a_set_matches_itself(
    image_folder: Callable[..., Path], toy_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    study = toy_study(image_folder({"a": 20, "b": 30}), match={"own": {"n": 3}})
    found = table(store, run_until(study, "match.own"), "matches").to_pylist()
    assert len(found) == 3 * 33
    assert all(pair["query_id"] != pair[rows.IMAGE_ID] for pair in found)
    ranks = [pair["rank"] for pair in found]
    assert ranks == [0, 1, 2] * 33


def test_generated_images_are_matched_with_train(
    bars_study: Callable[..., Study], run_until: Run, store: Store
) -> None:
    (label,) = bars_study().generators
    study = bars_study(
        search={"ratios": [0.5], "seeds": 2}, curate={"filters": ["copies"], "max_rounds": 1},
        match={"nearest": {"queries": label, "among": "train", "n": 2, "shown": 5}},
    )  # fmt: skip
    manifest = run_until(study, "match.nearest")
    found = table(store, manifest, "matches")
    curated = table(store, run_until(study, "curate"), "curated")
    kept = set(curated.filter(curated[rows.KEPT])[rows.IMAGE_ID].to_pylist())
    assert set(found["query_id"].to_pylist()) == kept
    train = set(table_of_split(store, run_until(study, "ingest"), "train"))
    assert set(found[rows.IMAGE_ID].to_pylist()) <= train
    assert 0 <= manifest.metrics["same_class"] <= 1
    (key,) = manifest.keys(file="sheet.png")
    sheet = Image.open(io.BytesIO(store.read(key)))
    assert sheet.height > 5 * 48


def table_of_split(store: Store, manifest: Manifest, split: str) -> list[str]:
    held = pa.concat_tables(store.tables(manifest.keys(split=split)))
    return list(held[rows.IMAGE_ID].to_pylist())
