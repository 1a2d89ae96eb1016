"""Stages from stored images to pixels, hashes and vectors, and the shards that they work on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from engine.context import Context
from engine.core import rows
from engine.core.registry import kind_of
from engine.core.shards import OK, Shard, ids_digest
from engine.core.spec import digest
from engine.core.store import Store
from engine.data.dataset import generated_images
from engine.data.images import decode_own, perceptual_hash
from engine.work.stage import Batch, Place, Stage

# Up to so many images, a light embedder is faster in this process than workers start.
FEW = 2048


class DecodeOwn(Stage):
    """The study's own encoded images to pixels, uint8 (n, height, width, channels)."""

    writes = ("pixels",)

    def load(self, place: Place) -> None:
        self.threads = ThreadPoolExecutor(place.threads)

    def __call__(self, batch: Batch) -> Batch:
        images = batch[rows.IMAGE].combine_chunks().field("bytes")
        decoded = self.threads.map(decode_own, [value.as_buffer() for value in images])
        return {**batch, "pixels": np.stack(list(decoded))}


class Hash(Stage):
    """The perceptual hash of each preprocessed image (64 bits, as hexadecimal text)."""

    writes = (rows.PHASH,)

    def __call__(self, batch: Batch) -> Batch:
        from PIL import Image

        pictures = (image[..., 0] if image.shape[-1] == 1 else image for image in batch["pixels"])
        return {
            **batch,
            rows.PHASH: [perceptual_hash(Image.fromarray(picture)) for picture in pictures],
        }


class PrepareImages(Stage):
    """Pixels to what the embedder's network takes, on CPU threads."""

    writes = ("prepared",)

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    def load(self, place: Place) -> None:
        self.embedder = kind_of("embedders", self.spec)(self.spec)
        self.embedder.open()
        self.threads = ThreadPoolExecutor(place.threads)

    def __call__(self, batch: Batch) -> Batch:
        prepared = self.threads.map(self.embedder.prepare, batch["pixels"])
        return {**batch, "prepared": np.stack(list(prepared))}


class EmbedImages(Stage):
    """Prepared images to vectors. Rows with a zero vector or with NaN are
    quarantined."""

    writes = (rows.EMBEDDING, rows.STATUS)
    device = "accelerator"

    def __init__(self, spec: Any) -> None:
        self.spec = spec

    @classmethod
    def stages(
        cls, spec: Any, *, hashes: bool = True
    ) -> tuple[list[Stage], Callable[[], pa.Schema]]:
        """The stages from stored images to vectors, and the schema, known once they are loaded.

        hashes: with perceptual hashes of the pictures.
        """
        stage = cls(spec)
        hashing: list[Stage] = [Hash()] if hashes else []
        return [DecodeOwn(), *hashing, PrepareImages(spec), stage], partial(_schema, stage, hashes)

    def load(self, place: Place) -> None:
        self.embedder = kind_of("embedders", self.spec)(self.spec)
        self.embedder.load(place.device)

    def __call__(self, batch: Batch) -> Batch:
        vectors = self.embedder.encode(batch["prepared"])
        finite, moved = np.isfinite(vectors).all(axis=1), np.abs(vectors).max(axis=1) > 0
        status = [
            OK if good and some else "embedding_zero" if good else "embedding_not_finite"
            for good, some in zip(finite, moved, strict=True)
        ]
        return {**batch, rows.EMBEDDING: vectors, rows.STATUS: status}


def _schema(stage: EmbedImages, hashes: bool) -> pa.Schema:
    schema = rows.embeddings_schema(stage.embedder.width)
    return schema if hashes else schema.remove(schema.get_field_index(rows.PHASH))


def row_groups(store: Store, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number of rows and task of each row group of a part."""
    with store.parquet(key) as file:
        for number in range(file.num_row_groups):
            ids = file.read_row_group(number, columns=[rows.IMAGE_ID])[rows.IMAGE_ID].to_pylist()
            yield len(ids), {"part": key, "row_group": number, "ids_digest": ids_digest(ids)}


def image_shards(context: Context, splits: tuple[str, ...], source: str = "ingest") -> list[Shard]:
    """A shard for each row group of the ingested images of these splits. source: the input."""
    return [
        Shard(f"{split}-{task['ids_digest']}", count, task, {"split": split})
        for split in splits
        for key in context.inputs[source].keys(split=split)
        for count, task in row_groups(context.store, key)
    ]


def generated_shards(context: Context) -> list[Shard]:
    """A shard for each row group of the generated images, named by content, because
    regenerated images have the same ids."""
    sha256_of = {part.key: part.sha256 for part in context.inputs["generate"].parts}
    return [
        Shard(digest([sha256_of[key], task["row_group"]]), count, task, {})
        for key in generated_images(context.inputs["generate"])
        for count, task in row_groups(context.store, key)
    ]
