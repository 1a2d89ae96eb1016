"""Curate: which generated images are used, under which label, and why the others are not.

    label    a classifier that was trained on the train split sees another class than was asked for
    copies   the image is a copy of a training image (`engine.metrics.memorization`)

A generator says which of them apply to it. The manifest's metrics hold the funnel, class by class:
requested, generated, kept, and the reasons; the part `table: curated` has every image with its
scores.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from engine.context import Context, Result
from engine.core import rows
from engine.core.arrays import hashes_of, matrix_of, vectors_of
from engine.core.dataset import class_names
from engine.core.images import Preprocess
from engine.core.manifest import Part
from engine.core.registry import resolve
from engine.core.shards import Commit, Shard, ids_digest, parquet_rows
from engine.core.spec import Spec, digest
from engine.core.stage import Batch, Device, Place
from engine.core.step import Step
from engine.core.store import Store
from engine.metrics.memorization import copies, copy_limits, nearest
from engine.nets.classification import class_numbers
from engine.sections import ClassifierField, EmbedderField
from engine.sections import Curate as CurateSettings
from engine.steps import StepKind
from engine.steps.embed import DecodeOwn, EmbedImages, Hash, PrepareImages
from engine.steps.train import PREDICTIONS, synthetic_images

# Of real images, whose labels are taken for right: what `confidence: auto` would drop of them.
_MOST_CONTRADICTED = 0.02


class CurateSpec(Spec):
    settings: CurateSettings = CurateSettings()
    # Which filters apply: what the generator says, less what the settings switch off.
    filters: tuple[str, ...]
    task: str
    preprocess: Preprocess
    generator_key: str
    # Of the labeler and of the study; None where no filter needs them.
    classifier: ClassifierField | None = None
    embedder: EmbedderField | None = None


class Classify:
    """Stage: pixels to class probabilities, by a classifier that a `train` step left."""

    reads: ClassVar[tuple[str, ...]] = ("pixels",)
    writes: ClassVar[tuple[str, ...]] = (rows.PROBABILITIES,)
    device: ClassVar[Device] = "accelerator"

    def __init__(
        self, store: Store, spec: Any, preprocess: Preprocess, classes: Sequence[str],
        weights: Sequence[Part],
    ) -> None:  # fmt: skip
        self.store, self.spec, self.preprocess = store, spec, preprocess
        self.classes, self.weights = tuple(classes), tuple(weights)

    def load(self, place: Place) -> None:
        self.place = place.device
        self.classifier = resolve("classifiers", self.spec.name)(
            self.spec, self.preprocess, self.classes
        )
        with tempfile.TemporaryDirectory() as name:
            folder = write_parts(self.store, self.weights, Path(name))
            self.network = self.classifier.load(folder / "weights").to(place.device)

    def __call__(self, batch: Batch) -> Batch:
        from engine.nets.classification import predict

        return {
            **batch,
            rows.PROBABILITIES: predict(
                self.network, self.classifier.prepare, batch["pixels"], self.place
            ),
        }


def write_parts(store: Store, parts: Sequence[Part], folder: Path) -> Path:
    """The files that a fit published, in a local folder."""
    for part in parts:
        target = folder / part.tags["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(store.read(part.key))
    return folder


class Curate(StepKind):
    version: ClassVar[int] = 3
    Spec: ClassVar[type[Spec]] = CurateSpec
    summary: ClassVar[str] = "choose the images that are used"

    def run(self, context: Context) -> Result:
        spec = context.step.spec_as(CurateSpec)
        generated = context.inputs["generate"]
        table = read_generated(context, spec.task)
        notes: dict[str, Any] = {}
        scores: list[Part] = []
        if spec.filters:
            commits = measure(context, spec, class_names(context.inputs["ingest"]))
            # Tagged for readers of this step; their bytes are the commits'.
            scores = [
                commit.data.model_copy(update={"tags": {"table": "scores"}})
                for commit in commits
                if commit.data
            ]
            table, notes = self._judge(context, spec, table, scores)
        funnel = make_funnel(table, generated.metrics["requested"])
        kept = sum(entry["kept"] for entry in funnel.values())
        out: Counter[str] = Counter()
        for entry in funnel.values():
            out.update(entry["reasons"])
        headline = f"{kept:,} of {table.num_rows:,} kept"
        if out:
            headline += "; " + ", ".join(f"{count} {why}" for why, count in out.most_common())
        return Result(
            [context.table("curated", table, table="curated"), *scores], kept,
            {
                "headline": headline, "funnel": funnel,
                "warnings": generated.metrics.get("warnings", []), **notes,
            },
        )  # fmt: skip

    def _judge(
        self, context: Context, spec: CurateSpec, table: pa.Table, parts: Sequence[Part]
    ) -> tuple[pa.Table, dict[str, Any]]:
        """Fill in the scores and the reasons."""
        classes = class_names(context.inputs["ingest"])
        scores = pa.concat_tables(context.store.tables([part.key for part in parts]))
        place = {image_id: row for row, image_id in enumerate(scores[rows.IMAGE_ID].to_pylist())}
        ids = table[rows.IMAGE_ID].to_pylist()
        # An image without a usable embedding has no scores.
        scored = np.asarray([image_id in place for image_id in ids])
        held = np.asarray([place[i] for i in ids if i in place], dtype=np.int64)
        reason = np.where(scored, "", "embedding").astype(object)
        columns: dict[str, np.ndarray] = {}
        notes: dict[str, Any] = {}

        def column(name: str, values: np.ndarray) -> None:
            columns[name] = np.full(len(ids), None, dtype=object)
            columns[name][scored] = values

        intended = np.asarray(table[rows.LABEL_INTENDED].to_pylist(), dtype=object)
        probabilities = matrix_of(scores, rows.PROBABILITIES)[held]
        seen = np.asarray(classes, dtype=object)[probabilities.argmax(1)]
        column(rows.LABEL_SEEN, seen)
        column(rows.CONFIDENCE, probabilities.max(1))
        notes["agreement"] = float((seen == intended[scored]).mean()) if len(seen) else 0.0
        used = intended.copy()
        if "label" in spec.filters:
            how = spec.settings.label_from
            differs = seen != intended[scored]
            if how == "labeler":
                used[scored] = seen
            elif how == "agree":
                reason[scored] = np.where(differs, "label", reason[scored])
            else:
                limit = spec.settings.confidence
                if limit == "auto":
                    limit = confidence_of(*labeled_val(context, spec, classes))
                notes["confidence"] = limit
                sure = differs & (probabilities.max(1) >= limit)
                reason[scored] = np.where(sure, "label", reason[scored])
        train, val = reference(context, "train"), reference(context, "val")
        found = nearest(vectors_of(scores)[held], hashes_of(scores)[held], *train.arrays)
        column(rows.NEAREST_ID, train.ids[found.row])
        column(rows.NEAREST_DISTANCE, found.distance)
        column(rows.NEAREST_BITS, found.bits)
        if "copies" in spec.filters:
            limits = copy_limits(nearest(*val.arrays, *train.arrays), spec.settings.copies)
            copied = copies(found, limits)
            reason[scored] = np.where(copied, "copy", reason[scored])
            notes["copies"] = {
                "copied": int(copied.sum()), "distance": limits.distance, "bits": limits.bits,
            }  # fmt: skip
        good = reason[scored] == ""
        if good.any():
            notes["agreement_kept"] = float((seen == intended[scored])[good].mean())
        # The yardstick of both: how often it sees the label of a real image that it never saw.
        truth, of_val = labeled_val(context, spec, classes)
        notes["agreement_val"] = float((of_val.argmax(1) == truth).mean())
        columns |= {rows.LABEL: used, rows.REASON: reason, rows.KEPT: reason == ""}
        for name, values in columns.items():
            kind = rows.curated_schema().field(name).type
            number = table.schema.get_field_index(name)
            table = table.set_column(number, name, pa.array(values.tolist(), kind))
        return table, notes

    def shard_prefixes(self, store: Store, step: Step) -> list[str]:
        spec = step.spec_as(CurateSpec)
        return [store.join(store.generated(spec.generator_key), "scores")]


def make_funnel(table: pa.Table, requested: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """What became of the images of each class: requested, generated, kept, and why the others are
    not used. Kept are those that are used as the class, whatever was asked for."""
    intended = table[rows.LABEL_INTENDED].to_pylist()
    used = table[rows.LABEL].to_pylist()
    reasons = table[rows.REASON].to_pylist()
    kept = Counter(label for label, why in zip(used, reasons, strict=True) if not why)
    fates: dict[str, Counter[str]] = {name: Counter() for name in requested}
    for wanted, label, why in zip(intended, used, reasons, strict=True):
        if why or label != wanted:
            fates[wanted][why or f"used as {label}"] += 1
    generated = Counter(intended)
    return {
        name: {
            "requested": count, "generated": generated[name], "kept": kept[name],
            "reasons": dict(sorted(fates[name].items())),
        }
        for name, count in sorted(requested.items())
    }  # fmt: skip


def labeled_val(
    context: Context, spec: CurateSpec, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Class numbers (n,) of val and the labeler's probabilities (n, classes), which its training
    left."""
    (key,) = context.inputs["labeler"].keys(file=PREDICTIONS)
    (table,) = context.store.tables([key])
    labels = class_numbers(table[rows.label_column(spec.task)].to_pylist(), classes)
    return labels, matrix_of(table, rows.PROBABILITIES)


def confidence_of(
    labels: np.ndarray, probabilities: np.ndarray, most: float = _MOST_CONTRADICTED
) -> float:
    """The least confidence with which the labeler contradicts at most a share `most` of images
    whose labels are right; above 1 where it is too often certain and wrong.

    labels: (n,). probabilities: (n, classes).
    """
    wrong = probabilities.argmax(1) != labels
    confident = np.sort(probabilities.max(1)[wrong])[::-1]
    allowed = int(most * len(labels))
    if len(confident) <= allowed:
        return 0.0
    # Just above the first that would be one too many.
    return float(np.nextafter(np.float32(confident[allowed]), np.float32(2)))


def read_generated(context: Context, task: str) -> pa.Table:
    """Every generated image as a row of `curated_schema`, all kept under their intended labels."""
    column = rows.label_column(task)
    keys = synthetic_images(context.inputs)
    found = pa.concat_tables(context.store.tables(keys, [rows.IMAGE_ID, column]))
    count = found.num_rows
    columns = {
        rows.IMAGE_ID: found[rows.IMAGE_ID], rows.LABEL: found[column],
        rows.LABEL_INTENDED: found[column], rows.KEPT: [True] * count, rows.REASON: [""] * count,
    }  # fmt: skip
    schema = rows.curated_schema()
    return pa.table(
        [
            pa.chunked_array(columns[field.name].chunks, field.type)
            if isinstance(columns.get(field.name), pa.ChunkedArray)
            else pa.array(columns.get(field.name, [None] * count), field.type)
            for field in schema
        ],
        schema=schema,
    )


def measure(context: Context, spec: CurateSpec, classes: Sequence[str]) -> list[Commit]:
    """Score every generated image; shards by content, so that a later round scores what is new."""
    labeler = context.inputs["labeler"]
    embedding = EmbedImages(spec.embedder)
    stages = [
        DecodeOwn(),
        Classify(context.store, spec.classifier, spec.preprocess, classes, labeler.parts),
        Hash(),
        PrepareImages(spec.embedder),
        embedding,
    ]
    shards = []
    for key in synthetic_images(context.inputs):
        with context.store.parquet(key) as file:
            for number in range(file.num_row_groups):
                held = file.read_row_group(number, columns=[rows.IMAGE_ID])
                ids = held[rows.IMAGE_ID].to_pylist()
                task = {"part": key, "row_group": number, "ids_digest": ids_digest(ids)}
                shards.append(Shard(f"scores-{task['ids_digest']}", len(ids), task, {}))
    generated = context.inputs["generate"]
    measured_by = {
        "embedder": spec.embedder.model_dump(),
        "code": dict(context.step.code),
        "labeler": digest(sorted(part.sha256 for part in labeler.parts)),
        "generator": generated.inputs.get("finetune"),
    }
    prefix = context.store.join(
        context.store.generated(spec.generator_key), "scores", digest(measured_by)
    )
    return context.compute(
        "embed", shards, rows_of=parquet_rows, stages=stages,
        schema=lambda: rows.scores_schema(embedding.embedder.width, len(classes)),
        fingerprint=measured_by, prefix=prefix,
    )  # fmt: skip


class Reference:
    """The embedded images of one split."""

    def __init__(self, table: pa.Table) -> None:
        self.ids = np.asarray(table[rows.IMAGE_ID].to_pylist(), dtype=object)
        self.arrays = (vectors_of(table), hashes_of(table))


def reference(context: Context, split: str) -> Reference:
    keys = context.inputs["embed"].keys(split=split)
    return Reference(pa.concat_tables(context.store.tables(keys)))
