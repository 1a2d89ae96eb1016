"""Shared by ingest and audit: decode the user's files in a sandbox, embed them, find near
duplicates."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from threadpoolctl import threadpool_limits

from engine.context import Context
from engine.core import rows
from engine.core.errors import brief
from engine.core.manifest import Part
from engine.core.notice import Notice
from engine.core.rows import TaskKind
from engine.core.shards import OK, Shard, ids_digest, image_column, parquet_rows
from engine.core.spec import Spec
from engine.data.alignment import ENCODED
from engine.data.dataset import by_id
from engine.data.images import Preprocess, Rejected, extension
from engine.data.near_duplicates import (
    SIDE,
    NearLimit,
    calibrate,
    match,
    match_in_place,
    near_pairs,
    same_pictures,
    thumbnail,
)
from engine.data.sandbox import Sandbox
from engine.readers import Bytes, Reader
from engine.readers import image_ids as image_names
from engine.stages.identity import place_of
from engine.stages.images import EmbedImages
from engine.stages.records import IntakeSpec
from engine.vectors.neighbours import Neighbours
from engine.vectors.similarity import Rows, lengths
from engine.work.stage import Batch, Place, Stage

# Folders of a step's shards: decoded pictures, and their vectors.
DECODED, EMBEDDED = "decoded", "audit"
SHARD_ROWS = 256
# At or below this side, near duplicates are indistinguishable from different pictures.
_SMALL_SIDE = 32
# Minimum number of pictures for calibrating near duplicates.
_LEAST = 20
_NEIGHBOURS, _WIDEST = 10, 512
_BLOCK = 16_384
# Share of the pictures that may be crops of others before they count as merely alike.
_MANY = 0.05
# Figures of the appearance: two for each of three channels.
_APPEARANCE = 6


class Decode(Stage):
    """The user's bytes to preprocessed, encoded images, through a sandbox."""

    writes = (
        rows.IMAGE, rows.WIDTH, rows.HEIGHT, rows.SOURCE, rows.PIXEL_SHA256, rows.PHASH,
        rows.FILE_SHA256, rows.BITS, rows.FRAMES, rows.ACQUISITION,
        rows.STATUS,
    )  # fmt: skip

    def __init__(
        self, source: Bytes, preprocess: Preprocess, timeout: float, check_extension: bool
    ) -> None:
        self.source, self.preprocess = source, preprocess
        self.timeout, self.check_extension = timeout, check_extension

    def load(self, place: Place) -> None:
        self.sandbox = Sandbox(
            self.preprocess, timeout=self.timeout, check_extension=self.check_extension
        )

    def __call__(self, batch: Batch) -> Batch:
        ids, uris = batch[rows.IMAGE_ID].to_pylist(), batch[rows.URI].to_pylist()
        # An id may come from a user's table; file names never do.
        names = image_names(ids)
        decoded: list[Any] = []
        status: list[str] = []
        digests: list[str | None] = []
        for uri in uris:
            try:
                data = self.source.read(uri)
                decoded.append(self.sandbox.decode(data, uri))
                digests.append(hashlib.sha256(data).hexdigest())
                status.append(OK)
            except Rejected as rejected:
                decoded.append(None)
                digests.append(None)
                status.append(brief(rejected, 200))

        def values(name: str) -> list[Any]:
            return [None if item is None else getattr(item, name) for item in decoded]

        return {
            **batch,
            rows.IMAGE: image_column(values("encoded"), names, extension(self.preprocess)),
            rows.WIDTH: values("width"),
            rows.HEIGHT: values("height"),
            rows.SOURCE: ["real"] * len(ids),
            rows.PIXEL_SHA256: values("pixel_sha256"),
            rows.PHASH: values("phash"),
            rows.FILE_SHA256: digests,
            rows.BITS: values("bits"),
            rows.FRAMES: values("frames"),
            rows.ACQUISITION: [
                None if how is None else sorted(how.items()) for how in values("acquisition")
            ],
            rows.STATUS: status,
        }


class Thumbnails(Stage):
    """The small grey pictures for comparing near duplicates, and the appearance: mean and standard
    deviation of red, green and blue."""

    writes = (rows.THUMBNAIL, rows.APPEARANCE)

    def __init__(self, padded: bool) -> None:
        self.padded = padded

    def __call__(self, batch: Batch) -> Batch:
        sizes = (batch[name].to_pylist() for name in (rows.WIDTH, rows.HEIGHT))
        small = [
            thumbnail(image, width, height, self.padded).ravel()
            for image, width, height in zip(batch["pixels"], *sizes, strict=True)
        ]
        appearance = [
            np.concatenate([image.mean((0, 1)), image.std((0, 1))]) for image in batch["pixels"]
        ]
        # A grey picture has three equal channels.
        wide = [np.repeat(values, _APPEARANCE // len(values)) for values in appearance]
        return {
            **batch, rows.THUMBNAIL: np.stack(small),
            rows.APPEARANCE: np.stack(wide).astype(np.float32),
        }  # fmt: skip


@dataclass(frozen=True)
class Intake:
    """The user's decoded files. index: a row for each decoded file, with all columns but the
    picture. fate: a status for each record. keys: the parts with the pictures."""

    index: pa.Table
    fate: dict[str, str]
    keys: list[str]


def decode_records(
    context: Context, reader: Reader, records: pa.Table, spec: IntakeSpec, *, replace: bool = False
) -> Intake:
    """Decode every record in the sandbox, as shards of fixed membership.

    replace: of `Context.compute`.
    """
    prefix = context.store.join(context.prefix, DECODED)
    sink = pa.BufferOutputStream()
    pq.write_table(records, sink, row_group_size=SHARD_ROWS)
    key, _ = context.store.put_part(
        context.store.join(prefix, "records"), "records", "parquet", sink.getvalue()
    )
    ids = records[rows.IMAGE_ID].to_pylist()
    shards = []
    for number, start in enumerate(range(0, len(ids), SHARD_ROWS)):
        shard_ids = ids[start : start + SHARD_ROWS]
        digest = ids_digest(shard_ids)
        task = {"part": key, "row_group": number, "ids_digest": digest}
        shards.append(Shard(f"{number:06d}-{digest[:8]}", len(shard_ids), task, {}))
    schema = decoded_schema(spec.tasks)
    commits = context.compute(
        "decode", shards, rows_of=parquet_rows, schema=schema, replace=replace,
        stages=[
            Decode(
                reader.bytes(), spec.preprocess, spec.audit.decode_timeout,
                spec.audit.wrong_extension == "quarantine",
            )
        ],
        fingerprint={
            "data": dict(reader.fingerprint()), "files": place_of(reader),
            "code": dict(context.step.code),
        },
        prefix=prefix,
    )  # fmt: skip
    fate = {
        image_id: status
        for commit in commits
        for image_id, status in zip(commit.image_id, commit.status, strict=True)
    }
    keys = [commit.data.key for commit in commits if commit.data]
    columns = [name for name in schema.names if name != rows.IMAGE]
    index = pa.schema([schema.field(name) for name in columns]).empty_table()
    index = pa.concat_tables([index, *context.store.tables(keys, columns)]).combine_chunks()
    return Intake(index, fate, keys)


def decoded_schema(tasks: Mapping[str, TaskKind]) -> pa.Schema:
    """Decoded images, with the digest of each file, the bits that its values use, its frames, and
    how it was made."""
    schema = rows.images_schema(tasks)
    schema = schema.append(pa.field(rows.FILE_SHA256, pa.string()))
    schema = schema.append(pa.field(rows.BITS, pa.int32()))
    schema = schema.append(pa.field(rows.FRAMES, pa.int32()))
    return schema.append(pa.field(rows.ACQUISITION, pa.map_(pa.string(), pa.string())))


def embed_decoded(context: Context, embedder: Spec, intake: Intake, padded: bool) -> list[Part]:
    """Vectors and thumbnails of all decoded pictures.

    A shard is named by its pictures, so that shards of unchanged pictures are reused.
    """
    stages, schema = EmbedImages.stages(embedder, hashes=False)
    stages.insert(1, Thumbnails(padded))
    digests = by_id(intake.index, rows.PIXEL_SHA256)
    shards = []
    for key in intake.keys:
        with context.store.parquet(key) as file:
            ids = file.read(columns=[rows.IMAGE_ID])[rows.IMAGE_ID].to_pylist()
        # The parts of a decode shard are one row group each.
        task = {"part": key, "row_group": 0, "ids_digest": ids_digest(ids)}
        name = ids_digest(text for image_id in ids for text in (image_id, digests[image_id]))
        shards.append(Shard(f"audit-{name}", len(ids), task, {}))
    commits = context.compute(
        "embed", shards, rows_of=parquet_rows, stages=stages,
        schema=partial(_with_thumbnails, schema),
        fingerprint={
            "embedder": embedder.model_dump(), "thumbnail": SIDE, "appearance": _APPEARANCE,
        },
        prefix=context.store.join(context.prefix, EMBEDDED), replace=True,
    )  # fmt: skip
    return [commit.data for commit in commits if commit.data]


def _with_thumbnails(schema: Callable[[], pa.Schema]) -> pa.Schema:
    whole = schema().append(pa.field(rows.THUMBNAIL, pa.list_(pa.uint8(), SIDE * SIDE)))
    return whole.append(pa.field(rows.APPEARANCE, pa.list_(pa.float32(), _APPEARANCE)))


@dataclass(frozen=True)
class Near:
    """Near duplicates: pairs of rows of the index, int64 (m, 2), how well they agree, float32 (m,),
    and the limit; None if the data has too few pictures, or too small ones."""

    pairs: np.ndarray
    agreement: np.ndarray
    limit: NearLimit | None
    # Whether so many pictures are alike that only new encodings count.
    alike: bool = False

    def warnings(self, small_side: int | None) -> list[Notice]:
        """What was not searched for. small_side: of `too_small`."""
        if small_side is not None:
            return [Notice.of("small_pictures", side=small_side)]
        if self.alike:
            return [Notice.of("alike_pictures")]
        if self.limit is None or self.limit.fine is None:
            return [Notice.of("similar_pictures")]
        return []


def find_near(
    index: pa.Table, task: str, vectors: np.ndarray, pictures: np.ndarray, quantile: float,
    seed: int, *, small_side: int | None,
) -> Near:  # fmt: skip
    """Near duplicates within and across splits: the nearest by embedding, compared by overlay.

    vectors, pictures: float32 (n, width) and uint8 (n, SIDE²) in the order of the index, zeros
    where there are none. Only the first of equal pictures is compared; its matches apply to the
    first of them in each split and with each label of `task`. small_side: of `too_small`; only new
    encodings are then searched for, because crops of such pictures cannot be distinguished from
    similar pictures.
    """
    digests = index[rows.PIXEL_SHA256].to_pylist()
    splits, labels = (index[name].to_pylist() for name in (rows.SPLIT, rows.label_column(task)))
    equal: dict[str, dict[tuple[str, str], int]] = defaultdict(dict)
    for row, digest in enumerate(digests):
        equal[digest].setdefault((splits[row], labels[row]), row)
    usable = np.asarray([min(places.values()) for places in equal.values()], np.int64)
    usable = usable[lengths(Rows(vectors, usable)) > 0]
    if len(usable) < 2:
        return Near(np.empty((0, 2), np.int64), np.empty(0, np.float32), None)
    _, groups = np.unique(np.asarray(index[rows.GROUP_ID].to_pylist()), return_inverse=True)
    pictures = pictures.reshape(-1, SIDE, SIDE)
    pairs, limit = usable[candidates(Rows(vectors, usable), groups[usable])], None
    # These products are small: more threads would wait for each other, on a busy machine for long.
    with threadpool_limits(1, "blas"):
        matched = (match if small_side is None else match_in_place)(pictures, pairs)
        same, correlation = same_pictures(pictures, matched, small_side)
        # Smooth drawings, such as cells on a plain ground, differ as little as crops do.
        crops = np.sqrt(np.maximum(0, 1 - correlation**2)) > ENCODED
        alike = len(np.unique(same[crops])) > max(10, _MANY * len(usable))
        if alike:
            same, correlation = same[~crops], correlation[~crops]
        sources = [(same, correlation)]
        if small_side is None and len(usable) >= _LEAST:
            limit = calibrate(pictures, matched, groups, quantile, seed)
            sources.append(near_pairs(pictures, matched, limit))
    agreement: dict[tuple[int, int], float] = {}
    for some_pairs, values in sources:
        for (a, b), value in zip(some_pairs.tolist(), values.tolist(), strict=True):
            agreement.setdefault((a, b), value)
    duplicates = {
        tuple(sorted(pair)): value
        for (a, b), value in agreement.items()
        for pair in product(equal[digests[a]].values(), equal[digests[b]].values())
    }
    return Near(
        np.asarray(list(duplicates), np.int64).reshape(-1, 2),
        np.asarray(list(duplicates.values()), np.float32), limit, alike,
    )  # fmt: skip


def candidates(vectors: Rows, groups: np.ndarray) -> np.ndarray:
    """Pairs of rows that may be near duplicates, each once: int64 (m, 2).

    Each with its 10 nearest, and with the 10 nearest of other groups among its 512 nearest: those
    of its own group, such as frames of one film, must not hide a copy in another.
    """
    among, pairs = Neighbours(vectors), []
    for start in range(0, len(vectors), _BLOCK):
        lacking, wide = np.arange(start, min(start + _BLOCK, len(vectors))), _NEIGHBOURS + 1
        while len(lacking):
            neighbours, _ = among.nearest(Rows(vectors.array, vectors.rows[lacking]), wide)
            not_self = (neighbours >= 0) & (neighbours != lacking[:, None])
            foreign = not_self & (groups[neighbours] != groups[lacking][:, None])
            wanted = [mask & (mask.cumsum(1) <= _NEIGHBOURS) for mask in (not_self, foreign)]
            row, column = np.nonzero(wanted[0] | wanted[1])
            pairs.append(np.stack([lacking[row], neighbours[row, column]], 1))
            if wide >= min(_WIDEST, len(vectors)):
                break
            lacking, wide = lacking[foreign.sum(1) < _NEIGHBOURS], min(4 * wide, _WIDEST)
    return np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)


def too_small(index: pa.Table, preprocess: Preprocess) -> int | None:
    """The side of pictures that are too small for crops to be searched for: the smaller of the
    study's size and the median original size. None if they are large enough."""
    sides = pc.min_element_wise(index[rows.WIDTH], index[rows.HEIGHT])
    side = min(preprocess.size, int(pc.approximate_median(sides).as_py() or preprocess.size))
    return side if side <= _SMALL_SIDE else None
