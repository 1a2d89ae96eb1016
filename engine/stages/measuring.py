"""The measurements of a labeler and of filters on pixels."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from engine.core import rows
from engine.core.manifest import Manifest, copy_files
from engine.core.registry import kind_of, name_of
from engine.core.spec import Spec, without
from engine.core.store import Store
from engine.data.images import Preprocess
from engine.results.comparison import TrainResult
from engine.results.data import IngestResult
from engine.settings import FilterField, LabelerField
from engine.stages.classify import refuse_other_weights
from engine.work.stage import Batch, Place, Stage


class MeasureSpec(Spec):
    task: str
    preprocess: Preprocess
    # The plugins that read pixels, without the fields that only judging reads.
    labeler: LabelerField | None = None
    filters: tuple[FilterField, ...] = ()


class MeasurePixels(Stage):
    """Pixels to the labeler's probabilities and the filters' figures."""

    device = "accelerator"

    def __init__(
        self, store: Store, spec: MeasureSpec, data: IngestResult, trained: Manifest | None
    ) -> None:
        self.store, self.spec = store, spec
        self.classes, self.trained, self.space = data.classes, trained, data.space()
        self.writes = tuple(field.name for field in figures(spec, self.classes))

    def load(self, place: Place) -> None:
        spec, self.labeler = self.spec, None
        if spec.labeler is not None:
            self.labeler = make_labeler(spec, self.classes)
            self.labeler.space = self.space
            if self.trained is None:
                self.labeler.load(None, place.device)
            else:
                with tempfile.TemporaryDirectory() as name:
                    folder = copy_files(self.store, self.trained.parts, Path(name))
                    self.labeler.load(folder, place.device)
                refuse_other_weights(self.labeler.classifier, TrainResult.of(self.trained).outside)
        self.filters = [kind_of("filters", one)(one, self.classes) for one in spec.filters]
        for pixel_filter in self.filters:
            pixel_filter.load(place.device)

    def __call__(self, batch: Batch) -> Batch:
        columns = dict(batch)
        pixels = batch["pixels"]
        labels = batch[rows.label_column(self.spec.task)].to_pylist()
        if self.labeler is not None:
            columns[rows.PROBABILITIES] = self.labeler.label(pixels)
        for pixel_filter in self.filters:
            for name, values in pixel_filter.measure(pixels, labels).items():
                columns[rows.score_column(pixel_filter.spec.name, name)] = values
        return columns


def figures(spec: MeasureSpec, classes: Sequence[str]) -> list[pa.Field]:
    """The columns that `MeasurePixels` writes."""
    fields = []
    if spec.labeler is not None:
        fields.append(pa.field(rows.PROBABILITIES, pa.list_(pa.float32(), len(classes))))
    for filter_spec in spec.filters:
        for name in kind_of("filters", filter_spec).measures:
            fields.append(pa.field(rows.score_column(name_of(filter_spec), name), pa.float32()))
    return fields


def make_labeler(spec: Any, classes: Sequence[str]) -> Any:
    return kind_of("labelers", spec.labeler)(spec.labeler, spec.preprocess, classes)


def measuring(
    task: str, preprocess: Preprocess, labeler: Any, filters: Sequence[Any]
) -> MeasureSpec:
    """The spec of the labeler and the filters that read pixels."""
    reads_pixels = labeler is not None and kind_of("labelers", labeler).reads == "pixels"
    kinds = [(filter_spec, kind_of("filters", filter_spec)) for filter_spec in filters]
    return MeasureSpec(
        task=task, preprocess=preprocess, labeler=labeler if reads_pixels else None,
        filters=tuple(without(filter_spec, kind.judging_fields)
                      for filter_spec, kind in kinds if kind.measures),
    )  # fmt: skip


def trained_labeler(inputs: Mapping[str, Manifest]) -> Manifest | None:
    """The manifest of the labeler's training, or None."""
    return inputs.get("labeler")
