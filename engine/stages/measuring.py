"""What a labeler and filters measure on pixels."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from engine.core import rows
from engine.core.manifest import Manifest, copy_files
from engine.core.registry import kind_of, name_of
from engine.core.spec import Spec, without
from engine.core.store import Store
from engine.data.images import Preprocess
from engine.results.comparison import TrainResult
from engine.sections import FilterField, LabelerField
from engine.stages.classify import refuse_other_weights
from engine.work.stage import Batch, Device, Place


class MeasureSpec(Spec):
    task: str
    preprocess: Preprocess
    # Those that look at pixels, without the fields that only judging reads.
    labeler: LabelerField | None = None
    filters: tuple[FilterField, ...] = ()


class MeasurePixels:
    """Stage: pixels to the labeler's probabilities and the filters' figures."""

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    device: ClassVar[Device] = "accelerator"

    def __init__(
        self, store: Store, spec: MeasureSpec, classes: Sequence[str], trained: Manifest | None
    ) -> None:
        self.store, self.spec = store, spec
        self.classes, self.trained = tuple(classes), trained
        self.reads = ("pixels", rows.label_column(spec.task))
        self.writes = tuple(field.name for field in figures(spec, classes))

    def load(self, place: Place) -> None:
        spec, self.labeler = self.spec, None
        if spec.labeler is not None:
            self.labeler = make_labeler(spec, self.classes)
            if self.trained is None:
                self.labeler.load(None, place.device)
            else:
                with tempfile.TemporaryDirectory() as name:
                    folder = copy_files(self.store, self.trained.parts, Path(name))
                    self.labeler.load(folder, place.device)
                refuse_other_weights(self.labeler.classifier, TrainResult.of(self.trained).outside)
        self.filters = [kind_of("filters", one)(one, self.classes) for one in spec.filters]
        for one in self.filters:
            one.load(place.device)

    def __call__(self, batch: Batch) -> Batch:
        found = dict(batch)
        pixels = batch["pixels"]
        labels = batch[rows.label_column(self.spec.task)].to_pylist()
        if self.labeler is not None:
            found[rows.PROBABILITIES] = self.labeler.label(pixels)
        for one in self.filters:
            for name, values in one.measure(pixels, labels).items():
                found[rows.score_column(one.spec.name, name)] = values
        return found


def figures(spec: MeasureSpec, classes: Sequence[str]) -> list[pa.Field]:
    """The columns that `MeasurePixels` writes."""
    found = []
    if spec.labeler is not None:
        found.append(pa.field(rows.PROBABILITIES, pa.list_(pa.float32(), len(classes))))
    for one in spec.filters:
        for name in kind_of("filters", one).measures:
            found.append(pa.field(rows.score_column(name_of(one), name), pa.float32()))
    return found


def make_labeler(spec: Any, classes: Sequence[str]) -> Any:
    return kind_of("labelers", spec.labeler)(spec.labeler, spec.preprocess, classes)


def measuring(
    task: str, preprocess: Preprocess, labeler: Any, filters: Sequence[Any]
) -> MeasureSpec:
    """What of a labeler and of filters looks at pixels."""
    looks = labeler is not None and kind_of("labelers", labeler).reads == "pixels"
    kinds = [(one, kind_of("filters", one)) for one in filters]
    return MeasureSpec(
        task=task, preprocess=preprocess, labeler=labeler if looks else None,
        filters=tuple(without(one, kind.judging_fields) for one, kind in kinds if kind.measures),
    )  # fmt: skip


def trained_labeler(inputs: Mapping[str, Manifest]) -> Manifest | None:
    """What the labeler's training left, where it was trained."""
    return inputs.get("labeler")
