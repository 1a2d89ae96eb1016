"""Schemas of the engine's tables. Every column is named here once.

Each task has one label column, `label.<task>`: a string, or a list of strings for a multi-label
task; null means unlabelled. Images are the struct {bytes, path} of Hugging Face's `Image` feature.
The schema's metadata declares it, so that `datasets.load_dataset("parquet", …)` decodes the images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pyarrow as pa

TaskKind = Literal["single", "multi"]
SPLITS = ("train", "val", "test")

IMAGE_ID = "image_id"
IMAGE = "image"
SPLIT = "split"
GROUP_ID = "group_id"
URI = "uri"
SOURCE = "source"
WIDTH = "width"
HEIGHT = "height"
PIXEL_SHA256 = "pixel_sha256"
PHASH = "phash"
FILE_SHA256 = "file_sha256"
BITS = "bits"
ACQUISITION = "acquisition"
FRAMES = "frames"
STATUS = "status"
EMBEDDING = "embedding"
THUMBNAIL = "thumbnail"
APPEARANCE = "appearance"
CLUSTER = "cluster"
DISTANCE = "distance"
RANK = "rank"
METHOD = "method"
PROMPT = "prompt"
NEGATIVE_PROMPT = "negative_prompt"
SEED = "seed"
PARENT_ID = "parent_id"
STRENGTH = "strength"
INDEX = "index"
GENERATOR_KEY = "generator_key"
WEIGHT = "weight"
FIRST_WEIGHT = "first_weight"
PROBABILITIES = "probabilities"
LABEL = "label"
LABEL_WAS = "label_was"
LABEL_INTENDED = "label_intended"
LABEL_SEEN = "label_seen"
CONFIDENCE = "confidence"
KEPT = "kept"
REASON = "reason"
ARM = "arm"
GENERATOR = "generator"
GENERATOR_FIT = "generator_fit"
POOL = "pool"
RATIO = "ratio"
X = "x"
Y = "y"

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
HUGGING_FACE = {
    b"huggingface": json.dumps({"info": {"features": {IMAGE: {"_type": "Image"}}}}).encode()
}


def label_column(task: str) -> str:
    return f"label.{task}"


def probabilities_column(task: str) -> str:
    """The probabilities of one of several tasks, in the order of its classes."""
    return f"{PROBABILITIES}.{task}"


def decided_column(task: str) -> str:
    """The predicted class, or the predicted labels, of one of several tasks."""
    return f"decided.{task}"


def label_fields(tasks: Mapping[str, TaskKind]) -> list[pa.Field]:
    return [
        pa.field(label_column(task), pa.string() if kind == "single" else pa.list_(pa.string()))
        for task, kind in tasks.items()
    ]


def records_schema(tasks: Mapping[str, TaskKind]) -> pa.Schema:
    """Output of a reader: one row per image, not decoded. `split` and `group_id` may be null."""
    return pa.schema(
        [
            pa.field(IMAGE_ID, pa.string()),
            pa.field(URI, pa.string()),
            *label_fields(tasks),
            pa.field(SPLIT, pa.string()),
            pa.field(GROUP_ID, pa.string()),
        ]
    )


def images_schema(tasks: Mapping[str, TaskKind]) -> pa.Schema:
    """Real images after ingest. `width` and `height`: of the original, in pixels."""
    return pa.schema(
        [
            pa.field(IMAGE_ID, pa.string()),
            pa.field(IMAGE, IMAGE_TYPE),
            *label_fields(tasks),
            pa.field(SPLIT, pa.string()),
            pa.field(GROUP_ID, pa.string()),
            pa.field(WIDTH, pa.int32()),
            pa.field(HEIGHT, pa.int32()),
            pa.field(SOURCE, pa.string()),
            pa.field(URI, pa.string()),
            pa.field(PIXEL_SHA256, pa.string()),
            pa.field(PHASH, pa.string()),
        ],
        metadata=HUGGING_FACE,
    )


def fixed_lists(values: np.ndarray) -> pa.FixedSizeListArray:
    """An array (n, width) as a column of float32 lists, such as embeddings or probabilities."""
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def embeddings_schema(width: int) -> pa.Schema:
    """Vectors of the study's images. `phash`: of the preprocessed image."""
    return pa.schema(
        [
            pa.field(IMAGE_ID, pa.string()),
            pa.field(EMBEDDING, pa.list_(pa.float32(), width)),
            pa.field(PHASH, pa.string()),
        ]
    )


def score_column(of: str, name: str) -> str:
    """The column of a score `name` of the filter `of`."""
    return f"{of}.{name}"


def curated_schema() -> pa.Schema:
    """Every generated image, kept or rejected. `label`: the label in use. The filters' columns
    (`score_column`) are appended."""
    return pa.schema(
        [
            pa.field(IMAGE_ID, pa.string()),
            pa.field(LABEL, pa.string()),
            pa.field(LABEL_INTENDED, pa.string()),
            pa.field(LABEL_SEEN, pa.string()),
            pa.field(CONFIDENCE, pa.float32()),
            pa.field(KEPT, pa.bool_()),
            pa.field(REASON, pa.string()),
        ]
    )


def request_fields(tasks: Mapping[str, TaskKind]) -> list[pa.Field]:
    return [
        pa.field(IMAGE_ID, pa.string()),
        *label_fields(tasks),
        pa.field(INDEX, pa.int64()),
        pa.field(CLUSTER, pa.int32()),
        pa.field(PROMPT, pa.string()),
        pa.field(NEGATIVE_PROMPT, pa.string()),
        pa.field(SEED, pa.int64()),
        pa.field(PARENT_ID, pa.string()),
        pa.field(STRENGTH, pa.float32()),
        pa.field(URI, pa.string()),
    ]


def requests_schema(tasks: Mapping[str, TaskKind]) -> pa.Schema:
    """Requests to a generator. `uri`: of an existing image, for the generator `folder`."""
    return pa.schema(request_fields(tasks))


def synthetic_schema(tasks: Mapping[str, TaskKind]) -> pa.Schema:
    """Generated images, with all columns of their requests."""
    fields = request_fields(tasks)
    return pa.schema(
        [
            fields[0],
            pa.field(IMAGE, IMAGE_TYPE),
            *fields[1:],
            pa.field(SOURCE, pa.string()),
            pa.field(GENERATOR_KEY, pa.string()),
        ],
        metadata=HUGGING_FACE,
    )
