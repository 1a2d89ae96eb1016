"""Zero-shot classification of real images by a model of images and texts: no training, and so no
replicates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from engine.comparison.tasks import targets_of
from engine.context import Context
from engine.core import rows
from engine.core.labels import LabelSpace
from engine.core.shards import parquet_rows
from engine.data.arrays import matrix_of
from engine.data.dataset import split_index
from engine.metrics.classification import confusion, summary
from engine.metrics.multitask import task_scores
from engine.metrics.probabilities import finite_probability_metrics
from engine.nets.classification import class_numbers
from engine.nets.text_image import Described, TextImage
from engine.results.data import IngestResult
from engine.results.joint import ZeroShotResult
from engine.stages.images import DecodeOwn, image_shards
from engine.work.stage import Batch, Place, Stage

_SECTION = "evaluate.zero_shot"


class ZeroShot(Stage):
    """Pixels to probabilities of classes, or of the labels of several tasks: per task the softmax
    of scaled cosines, or, with several labels per image, cosines moved to 0 to 1, which only
    thresholds are set on."""

    writes = (rows.PROBABILITIES,)
    device = "accelerator"

    def __init__(self, spec: Described, classes: tuple[str, ...], space: LabelSpace | None) -> None:
        self.spec, self.space = spec, space
        self.tasks = (
            {name: (task.kind, task.classes) for name, task in space.tasks.items()}
            if space else {"": ("single", classes)}
        )  # fmt: skip

    def load(self, place: Place) -> None:
        self.model = TextImage.of(_SECTION, self.spec, place.device)
        every = [label for _, classes in self.tasks.values() for label in classes]
        # Words may name labels of any task.
        self.texts = {}
        for name, (_, classes) in self.tasks.items():
            words = {label: value for label, value in self.spec.words.items() if label in classes}
            unknown = {label: value for label, value in self.spec.words.items()
                       if label not in every}  # fmt: skip
            own = self.spec.model_copy(update={"words": {**words, **unknown}})
            self.texts[name] = self.model.classes(own, classes, _SECTION)

    def __call__(self, batch: Batch) -> Batch:
        images = self.model.images(batch["pixels"])
        parts = []
        for name, (kind, _) in self.tasks.items():
            cosines = images @ self.texts[name].T
            if kind == "multi":
                parts.append((1 + cosines) / 2)
                continue
            logits = self.model.logit_scale * cosines
            weights = np.exp(logits - logits.max(1, keepdims=True))
            parts.append(weights / weights.sum(1, keepdims=True))
        return {**batch, rows.PROBABILITIES: np.concatenate(parts, 1).astype(np.float32)}


def zero_shot(
    context: Context, spec: Described, classes: tuple[str, ...], space: LabelSpace | None,
    split: str,
) -> np.ndarray:  # fmt: skip
    """Probabilities (n, outputs) of the images of a split, in their order."""
    outputs = len(space.outputs if space else classes)
    schema = pa.schema(
        [
            pa.field(rows.IMAGE_ID, pa.string()),
            pa.field(rows.PROBABILITIES, pa.list_(pa.float32(), outputs)),
        ]
    )
    fingerprint: dict[str, Any] = {
        "images": context.inputs["ingest"].digest, "model": spec.model_dump(mode="json")
    }  # fmt: skip
    commits = context.compute(
        "classify", image_shards(context, (split,)), rows_of=parquet_rows,
        stages=[DecodeOwn(), ZeroShot(spec, classes, space)], schema=schema, replace=True,
        fingerprint=fingerprint, prefix=context.store.join(context.prefix, "zero_shot", split),
    )  # fmt: skip
    keys = [commit.data.key for commit in commits if commit.data]
    return matrix_of(pa.concat_tables(context.store.tables(keys)), rows.PROBABILITIES)


def zero_shot_result(
    context: Context, described: Described | None, task: str, tasks: Mapping[str, float],
    data: IngestResult, test: pa.Table,
) -> ZeroShotResult | None:  # fmt: skip
    """The figures of the model on test, if there is one; thresholds of labels are set on val. test:
    its images with their labels. tasks: weights."""
    if described is None:
        return None
    space = data.space(tasks)
    probabilities = zero_shot(context, described, data.classes, space, "test")
    # Cosines moved to 0 to 1 are not probabilities.
    several = space is not None and any(task.kind == "multi" for task in space.tasks.values())
    if space is None:
        labels = class_numbers(test[rows.label_column(task)].to_pylist(), data.classes)
        matrix = confusion(labels, probabilities.argmax(1), len(data.classes))
        metrics = summary(matrix, data.classes) | finite_probability_metrics(labels, probabilities)
        return ZeroShotResult(model=described.model, figures=plain_figures(metrics))
    val = split_index(context.store, context.inputs["ingest"], task, "val", tasks)
    limits = space.thresholds(
        targets_of(val, space), zero_shot(context, described, data.classes, space, "val")
    )
    metrics = task_scores(space, targets_of(test, space), probabilities, limits)
    by_task = {
        name: plain_figures(of_task, space.tasks[name].kind == "multi")
        for name, of_task in metrics["tasks"].items()
    }
    figures = plain_figures(metrics, several)
    return ZeroShotResult(model=described.model, figures=figures, tasks=by_task)


def plain_figures(metrics: Mapping[str, Any], cosines: bool = False) -> dict[str, float]:
    """The single numbers among metrics. cosines: without those of calibration."""
    left_out = ("brier", "ece") if cosines else ()
    return {name: float(value) for name, value in metrics.items()
            if isinstance(value, float) and name not in left_out}  # fmt: skip
