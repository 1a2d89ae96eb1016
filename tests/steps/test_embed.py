"""Embed: a vector for each image of train and val, and none of test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.store import Store
from engine.data.arrays import vectors_of
from engine.data.images import decode_own
from engine.embedders.pixels import Pixels, PixelsSpec
from engine.study import Study

Run = Callable[[Study, str], Manifest]


@pytest.fixture
def study(image_folder: Callable[..., Path], toy_study: Callable[..., Study]) -> Study:
    return toy_study(image_folder({"a": 20, "b": 30}))


def of_split(store: Store, manifest: Manifest, split: str) -> pa.Table:
    return pa.concat_tables(store.tables(manifest.keys(split=split)))


def test_train_and_val_get_the_vectors_of_their_pixels_and_test_is_not_read(
    study: Study, run_until: Run, store: Store
) -> None:
    ingest = run_until(study, "ingest")
    for key in ingest.keys(split="test"):
        store.put(key, b"whoever reads test cannot go on")
    embed = run_until(study, "embed")
    assert embed.rows == sum(
        sum(ingest.metrics["counts"][split].values()) for split in ("train", "val")
    )
    assert embed.keys(split="test") == []
    embedder = Pixels(PixelsSpec())
    embedder.load("cpu")
    assert embed.metrics["width"] == embedder.width
    for split in ("train", "val"):
        images, vectors = (of_split(store, manifest, split) for manifest in (ingest, embed))
        assert vectors[rows.IMAGE_ID].to_pylist() == images[rows.IMAGE_ID].to_pylist()
        pixels = np.stack([decode_own(image["bytes"]) for image in images[rows.IMAGE].to_pylist()])
        np.testing.assert_allclose(vectors_of(vectors), embedder.encode(pixels), atol=1e-5)


def test_another_embedder_has_its_own_vectors(study: Study, run_until: Run, store: Store) -> None:
    first = run_until(study, "embed")
    coarse = study.model_copy(update={"embedder": PixelsSpec(side=4)})
    assert run_until(coarse, "embed").metrics["width"] == 16
    assert run_until(study, "embed").digest == first.digest


def test_unembeddable_image_is_set_aside(
    study: Study, run_until: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest = run_until(study, "ingest")
    whole, calls = Pixels.encode, []

    def encode(self: Pixels, pixels: np.ndarray) -> np.ndarray:
        vectors = np.array(whole(self, pixels))
        if not calls:
            vectors[0] = np.nan
        calls.append(len(pixels))
        return vectors

    monkeypatch.setattr(Pixels, "encode", encode)
    embed = run_until(study, "embed")
    assert embed.metrics["quarantined"] == 1
    assert embed.metrics["headline"].endswith("; 1 quarantined")
    counts = ingest.metrics["counts"]
    assert embed.rows == sum(sum(counts[split].values()) for split in ("train", "val")) - 1
