"""Curate: which generated images are used, under which label, and why the rest are dropped.

The labeler predicts the class of each image. The study's filters (`engine/filters`) run in order,
and the first filter that drops an image is the recorded reason. The manifest's metrics have the
funnel of each class (requested, generated, kept, and the reasons), the limits of each filter, and
the labeler's agreement with the requested labels. The part `table: curated` has every image with
its scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from engine.context import Context, Output
from engine.core import rows
from engine.core.errors import DataError
from engine.core.manifest import Part
from engine.core.notice import Notice
from engine.core.registry import kind_of, name_of
from engine.core.shards import Commit, Shard, parquet_rows
from engine.core.spec import Spec, digest
from engine.core.step import Step
from engine.core.store import Store
from engine.data.arrays import grouped_vectors, hashes_of, matrix_of
from engine.data.dataset import by_id, generated_images, split_index
from engine.data.images import Preprocess
from engine.filters import Judgement, Scores
from engine.nets.classification import class_numbers
from engine.results.data import IngestResult
from engine.results.images import (
    ClassFunnel,
    CurateResult,
    FilterReport,
    GenerateResult,
)
from engine.settings import EmbedderField, FilterField, LabelerField
from engine.stages.doubts import agreement, doubts_of, signs_of
from engine.stages.images import DecodeOwn, EmbedImages, Hash, PrepareImages, generated_shards
from engine.stages.measuring import MeasurePixels, figures, make_labeler, measuring, trained_labeler
from engine.steps import StepKind
from engine.wording import notice_in_words
from engine.work.stage import Stage


class CurateSpec(Spec):
    later_fields: ClassVar[tuple[str, ...]] = ("stop_if_useless",)

    # Empty keeps all images; labeler and embedder are then unused.
    filters: tuple[FilterField, ...]
    labeler: LabelerField | None = None
    task: str
    preprocess: Preprocess
    generator_key: str
    embedder: EmbedderField | None = None
    stop_if_useless: bool = False


class Curate(StepKind[CurateSpec]):
    version = 5
    summary = "filter the generated images"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(CurateSpec)
        generated = context.result("generate", GenerateResult)
        table = read_generated(context, spec.task)
        notes: dict[str, Any] = {}
        scores: list[Part] = []
        if spec.filters:
            commits = score(context, spec)
            # The commits' own files, tagged for steps that read this one.
            scores = [
                commit.data.model_copy(update={"tags": {"table": "scores"}})
                for commit in commits
                if commit.data
            ]
            table, notes = judge(context, spec, table, [part.key for part in scores])
        signs: list[Notice] = notes["usefulness"].notices() if "usefulness" in notes else []
        doubts = doubts_of(
            context.result("ingest", IngestResult).classes, notes.get("usefulness"),
            notes.get("labeler"),
        )  # fmt: skip
        # Later rounds are of the same generator.
        if context.step.subject.round == 1:
            context.warn([*signs, *doubts])
        if signs and spec.stop_if_useless:
            reasons = "; ".join(notice_in_words(notice) for notice in signs)
            raise DataError(
                f"{context.step.label}: {reasons} (to go on nevertheless, set"
                " curate.stop_if_useless to false)"
            )
        funnel = make_funnel(table, generated.requested)
        kept = sum(table[rows.KEPT].to_pylist())
        out: Counter[str] = Counter()
        for entry in funnel.values():
            out.update(entry.reasons)
        headline = f"{kept:,} of {table.num_rows:,} kept"
        if out:
            headline += "; " + ", ".join(f"{count} {why}" for why, count in out.most_common())
        return Output(
            [context.table("curated", table, table="curated"), *scores], kept,
            CurateResult(
                headline=headline, funnel=funnel, warnings=[*generated.warnings, *signs, *doubts],
                **notes,
            ),
        )  # fmt: skip

    def shard_prefixes(self, store: Store, step: Step) -> list[str]:
        spec = step.spec_as(CurateSpec)
        return [store.join(store.generated(spec.generator_key), "scores")]


def judge(
    context: Context, spec: CurateSpec, table: pa.Table, keys: list[str]
) -> tuple[pa.Table, dict[str, Any]]:
    """Run the filters. Returns the table with scores, labels and reasons, and the result's
    fields on filters and labeler."""
    data = context.result("ingest", IngestResult)
    classes, cells = data.classes, data.cells
    sets = Sets(context, spec, table, keys)
    generated, val = sets.generated, sets.val
    # An image without a usable embedding has no scores.
    place = {image_id: row for row, image_id in enumerate(table[rows.IMAGE_ID].to_pylist())}
    at = np.asarray([place[image_id] for image_id in generated.ids], dtype=np.int64)
    reason = np.full(table.num_rows, "embedding", dtype=object)
    reason[at] = ""
    used = np.asarray(table[rows.LABEL_INTENDED].to_pylist(), dtype=object)
    notes: dict[str, Any] = {}
    columns: dict[str, pa.Array] = {}

    def column(name: str, values: np.ndarray) -> None:
        whole: list[Any] = [None] * table.num_rows
        for row, value in zip(at.tolist(), np.asarray(values).tolist(), strict=True):
            whole[row] = value
        columns[name] = pa.array(whole)

    reports = []
    for filter_spec in spec.filters if len(generated) else ():
        kept = reason[at] == ""
        chosen = kind_of("filters", filter_spec)(filter_spec, classes)
        chosen.cells = cells
        judgement: Judgement = chosen.judge(
            sets.of(generated, name_of(filter_spec)), sets.train,
            sets.of(val, name_of(filter_spec)), kept,
        )  # fmt: skip
        reason[at] = np.where(kept & judgement.drop, name_of(filter_spec), reason[at])
        if judgement.labels is not None:
            used[at] = judgement.labels
        for name, values in judgement.columns.items():
            column(rows.score_column(name_of(filter_spec), name), values)
        reports.append(
            FilterReport(
                name=name_of(filter_spec), dropped=int((kept & judgement.drop).sum()),
                limits={key: finite(limit) for key, limit in judgement.limits.items()},
                stops=judgement.stops,
            )
        )  # fmt: skip
    notes["filters"] = reports
    if generated.probabilities is not None and val.probabilities is not None:
        seen = np.asarray(classes, dtype=object)[generated.probabilities.argmax(1)]
        column(rows.LABEL_SEEN, seen)
        column(rows.CONFIDENCE, generated.probabilities.max(1))
        notes["labeler"] = agreement(classes, generated, val, used[at], reason[at] == "")
    notes["usefulness"] = signs_of(generated, val, sets.train, notes.get("labeler"))
    columns |= {
        rows.LABEL: pa.array(used, pa.string()), rows.REASON: pa.array(reason, pa.string()),
        rows.KEPT: pa.array(reason == ""),
    }  # fmt: skip
    for name, values in columns.items():
        number = table.schema.get_field_index(name)
        if number < 0:
            table = table.append_column(name, values)
        else:
            kind = table.schema.field(name).type
            table = table.set_column(number, name, values.cast(kind))
    return table, notes


def finite(limit: float | Mapping[str, float]) -> Any:
    """A limit for the manifest; None if it is infinite."""
    if isinstance(limit, Mapping):
        return {label: finite(value) for label, value in limit.items()}
    return float(limit) if np.isfinite(limit) else None


class Sets:
    """The generated images that have scores, and the embedded ones of train and of val."""

    def __init__(
        self, context: Context, spec: CurateSpec, table: pa.Table, keys: list[str]
    ) -> None:
        data = context.result("ingest", IngestResult)
        classes = data.classes
        pixel_spec = measuring(spec.task, spec.preprocess, spec.labeler, spec.filters)
        names = [field.name for field in figures(pixel_spec, classes)]
        store = context.store
        self.generated = read_scored(
            store, keys, by_id(table, rows.LABEL_INTENDED), keys if names else [], names
        )
        of_split = {}
        for split, measured in (("train", False), ("val", bool(names))):
            index = split_index(store, context.inputs["ingest"], spec.task, split)
            label_of = by_id(index, rows.label_column(spec.task))
            if split == "val" and data.labels:
                # The labeler sees complete, common combinations alone.
                label_of = {name: label for name, label in label_of.items() if label in data.cells}
            of_split[split] = read_scored(
                store, context.inputs["embed"].keys(split=split), label_of,
                context.inputs["measure"].keys() if measured else [], names,
            )  # fmt: skip
        self.train, self.val = of_split["train"], of_split["val"]
        if spec.labeler is None:
            return
        labeler = make_labeler(spec, classes)
        if labeler.reads == "embedding":
            labeler.load(None, context.device)
            labeler.learn(self.train.vectors, class_numbers(self.train.labels, classes))
            self.generated, self.val = (
                replace(held, probabilities=labeler.label(held.vectors)) if len(held) else held
                for held in (self.generated, self.val)
            )

    @staticmethod
    def of(scores: Scores, name: str) -> Scores:
        """The set as one filter sees it: with only its own figures, under their own names."""
        prefix = rows.score_column(name, "")
        own = {key.removeprefix(prefix): values for key, values in scores.measured.items()
               if key.startswith(prefix)}  # fmt: skip
        return replace(scores, measured=own)


def read_scored(
    store: Store, keys: list[str], label_of: Mapping[str, str], measured: list[str],
    names: Sequence[str],
) -> Scores:  # fmt: skip
    """The images of `label_of` that have a vector in the parts `keys` and, if `measured` is not
    empty, the figures `names` in those parts."""
    figure_of = {}
    if measured:
        measured_table = pa.concat_tables(store.tables(measured, [rows.IMAGE_ID, *names]))
        row_of = {name: row for row, name in enumerate(measured_table[rows.IMAGE_ID].to_pylist())}
        label_of = {name: label for name, label in label_of.items() if name in row_of}
        figure_of = {
            name: matrix_of(measured_table, name)
            if name == rows.PROBABILITIES
            else measured_table[name].to_numpy()
            for name in names
        }
    ids, vectors = grouped_vectors(store, keys, dict.fromkeys(label_of, "")).get(
        "", ([], np.empty((0, 0), np.float32))
    )
    hash_of: dict[str, int] = {}
    for table in store.tables(keys, [rows.IMAGE_ID, rows.PHASH]):
        hash_of |= dict(zip(table[rows.IMAGE_ID].to_pylist(), hashes_of(table), strict=True))
    order = [row_of[name] for name in ids] if measured else []
    measurements = {name: values[order] for name, values in figure_of.items()}
    return Scores(
        np.asarray(ids, dtype=object), np.asarray([label_of[name] for name in ids], dtype=object),
        vectors, np.asarray([hash_of[name] for name in ids], np.uint64),
        measurements.pop(rows.PROBABILITIES, None), measurements,
    )  # fmt: skip


def make_funnel(table: pa.Table, requested: Mapping[str, int]) -> dict[str, ClassFunnel]:
    """The funnel of each class: requested, generated, kept, and the reasons of the rest. Kept
    counts the images used as the class, whatever their requested label."""
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
        name: ClassFunnel(
            requested=count, generated=generated[name], kept=kept[name],
            reasons=dict(sorted(fates[name].items())),
        )
        for name, count in sorted(requested.items())
    }  # fmt: skip


def read_generated(context: Context, task: str) -> pa.Table:
    """Every generated image as a row of `curated_schema`, all kept under their intended labels."""
    column = rows.label_column(task)
    keys = generated_images(context.inputs["generate"])
    images = pa.concat_tables(context.store.tables(keys, [rows.IMAGE_ID, column]))
    count = images.num_rows
    columns = {
        rows.IMAGE_ID: images[rows.IMAGE_ID], rows.LABEL: images[column],
        rows.LABEL_INTENDED: images[column], rows.KEPT: [True] * count, rows.REASON: [""] * count,
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


def score(context: Context, spec: CurateSpec, prefix: str | None = None) -> list[Commit]:
    """Measure and embed every generated image. Shards are named by content, so that a later round
    scores only new images. prefix: of the shards; None: next to the generator's images."""
    pixel_spec = measuring(spec.task, spec.preprocess, spec.labeler, spec.filters)
    trained = trained_labeler(context.inputs)
    data = context.result("ingest", IngestResult)
    classes = data.classes
    embedding = EmbedImages(spec.embedder)
    stages: list[Stage] = [
        DecodeOwn(),
        MeasurePixels(context.store, pixel_spec, data, trained),
        Hash(),
        PrepareImages(spec.embedder),
        embedding,
    ]
    shards = [
        Shard(f"scores-{shard.name}", shard.rows, shard.task, {})
        for shard in generated_shards(context)
    ]
    # Filters without measurements do not change the scores.
    plugins = {
        "embedders": [spec.embedder], "filters": pixel_spec.filters,
        "labelers": [pixel_spec.labeler],
    }  # fmt: skip
    measured_by = {
        "embedder": spec.embedder.model_dump() if spec.embedder else None,
        "measuring": pixel_spec.model_dump(),
        "code": {
            f"{family}.{name_of(plugin)}": kind_of(family, plugin).version
            for family, specs in plugins.items()
            for plugin in specs
            if plugin is not None
        },
        "classes": list(classes),
        "labeler": digest(sorted(part.sha256 for part in trained.parts) if trained else []),
        "generator": context.inputs["generate"].inputs.get("finetune"),
    }
    prefix = prefix or context.store.join(
        context.store.generated(spec.generator_key), "scores", digest(measured_by)
    )
    return context.compute(
        "embed", shards, rows_of=parquet_rows, stages=stages,
        schema=lambda: pa.schema(
            [*rows.embeddings_schema(embedding.embedder.width), *figures(pixel_spec, classes)]
        ),
        fingerprint=measured_by, prefix=prefix,
    )  # fmt: skip
