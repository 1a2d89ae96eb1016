"""Train: one classifier on the images of one arm, with one seed.

Keeps the weights that score best on val, with their probabilities on val. Test is not read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.comparison.tasks import targets_of
from engine.context import Context, Output
from engine.core import rows
from engine.core.labels import LabelSpace
from engine.core.manifest import Manifest
from engine.core.registry import kind_of
from engine.core.rng import derive_seed
from engine.core.spec import Spec
from engine.core.step import Step
from engine.core.store import Store
from engine.data.arrays import Stack
from engine.data.dataset import generated_images, split_index
from engine.data.images import Preprocess
from engine.metrics.classification import METRICS, confusion, summary
from engine.metrics.multitask import task_figures, task_scores
from engine.metrics.probabilities import finite_probability_metrics, log_loss
from engine.nets.classification import LabelledImages, Training, class_numbers, train
from engine.results.comparison import TrainResult
from engine.results.data import IngestResult
from engine.settings import ClassifierField
from engine.stages.classify import changed_weights, classifier_inputs, external_digests
from engine.steps import StepKind
from engine.work.fit import FitContext

PREDICTIONS = "predictions.parquet"


class TrainSpec(Spec):
    later_fields: ClassVar[tuple[str, ...]] = ("tasks",)

    classifier: ClassifierField
    training: Training
    preprocess: Preprocess
    task: str
    # Weights of the tasks of a study with several labels per image; `task` is then that of cells.
    tasks: dict[str, float] = {}
    # Seeds the weights and the order of images; equal seeds are paired across arms.
    seed: int


@dataclass(frozen=True)
class TrainClassifier:
    """The work of each worker of the fit: decode the arm's images and train."""

    store: Store
    spec: TrainSpec
    classes: tuple[str, ...]
    # Keys of image parts: real train, each generator, val.
    images: tuple[str, ...]
    synthetic: tuple[tuple[str, ...], ...]
    val_images: tuple[str, ...]
    members: tuple[str, ...]
    val: pa.Table
    space: LabelSpace | None = None

    def __call__(self, fit: FitContext) -> None:
        spec = self.spec
        classifier = kind_of("classifiers", spec.classifier)(
            spec.classifier, spec.preprocess, self.space.outputs if self.space else self.classes
        )
        train_sets = [
            classifier_inputs(self.store, keys, classifier, fit.device, fit.share)
            for keys in (self.images, *self.synthetic)
        ]
        classifier.learn(train_sets[0][0])
        val_pixels, val_ids = classifier_inputs(
            self.store, self.val_images, classifier, fit.device, fit.share
        )  # fmt: skip
        labels = self._labels(self.val)
        result = train(
            fit, classifier.build, classifier.prepare, self._members(train_sets),
            LabelledImages(val_pixels, labels, np.ones(len(labels))), self._score,
            spec.training, derive_seed(spec.seed, "train"), self.space,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "weights").mkdir()
            classifier.save(result.network.cpu(), folder / "weights")
            (folder / "history.json").write_text(json.dumps(result.history))
            predictions = pa.table(
                {
                    rows.IMAGE_ID: pa.array(val_ids, pa.string()),
                    rows.GROUP_ID: self.val[rows.GROUP_ID],
                    **{
                        name: self.val[name]
                        for name in map(rows.label_column, (spec.task, *spec.tasks))
                    },
                    rows.PROBABILITIES: rows.fixed_lists(result.probabilities),
                }
            )
            pq.write_table(predictions, folder / PREDICTIONS, compression="zstd")
            metrics: dict[str, Any] = {"best_step": result.best_step}
            if self.space is not None:
                limits = self.space.thresholds(labels, result.probabilities)
                metrics["thresholds"] = limits.tolist()
                metrics["val"] = task_scores(self.space, labels, result.probabilities, limits)
            else:
                matrix = confusion(labels, result.probabilities.argmax(1), len(self.classes))
                metrics["val"] = {
                    **summary(matrix, self.classes),
                    **finite_probability_metrics(labels, result.probabilities),
                }
            fit.publish(folder, metrics)

    def _labels(self, images: pa.Table) -> np.ndarray:
        """Class numbers (n,), or targets (n, outputs) of several tasks."""
        if self.space is not None:
            return targets_of(images, self.space)
        names = images[rows.label_column(self.spec.task)].to_pylist()
        return class_numbers(names, self.classes)

    def _score(self, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float]:
        if self.space is not None:
            return task_figures(self.space, labels, probabilities)
        matrix = confusion(labels, probabilities.argmax(1), len(self.classes))
        return {
            **{name: float(metric(matrix)) for name, metric in METRICS.items()},
            **finite_probability_metrics(labels, probabilities),
            "loss": log_loss(labels, probabilities),
        }

    def _members(self, sets: Sequence[tuple[np.ndarray, list[str]]]) -> LabelledImages:
        """The arm's images: the members among those of all parts."""
        members = pa.concat_tables(self.store.tables(list(self.members)))
        pixels, ids = zip(*sets, strict=True)
        place = {image_id: row for row, image_id in enumerate(chain.from_iterable(ids))}
        row_numbers = np.asarray(
            [place[image_id] for image_id in members[rows.IMAGE_ID].to_pylist()]
        )
        return LabelledImages(
            Stack(pixels), self._labels(members),
            members[rows.WEIGHT].to_numpy(), row_numbers,
            members[rows.FIRST_WEIGHT].to_numpy() if rows.FIRST_WEIGHT in members.schema.names
            else None,
        )  # fmt: skip


class Train(StepKind[TrainSpec]):
    version = 5
    summary = "train a classifier"

    def run(self, context: Context) -> Output:
        spec = context.step.spec_as(TrainSpec)
        ingest, mix = context.inputs["ingest"], context.inputs["mix"]
        data = context.result("ingest", IngestResult)
        fit = TrainClassifier(
            store=context.store,
            spec=spec,
            classes=data.classes,
            images=tuple(ingest.keys(split="train")),
            synthetic=tuple(
                tuple(generated_images(manifest))
                for manifest in context.inputs.values()
                if manifest.kind == "generate"
            ),
            val_images=tuple(ingest.keys(split="val")),
            members=tuple(mix.keys(table="members")),
            val=split_index(context.store, ingest, spec.task, "val", spec.tasks),
            space=data.space(spec.tasks),
        )
        outside = external_digests(spec)
        parts, metrics = context.fit(fit, "steps", outside)
        score = metrics["val"][spec.training.objective]
        headline = (
            f"{mix.rows:,} images; val {spec.training.objective} {score:.3f}"
            f" at step {metrics['best_step']:,} of {spec.training.steps:,}"
        )
        return Output(parts, mix.rows, TrainResult(headline=headline, outside=outside, **metrics))

    def outdated(self, step: Step, manifest: Manifest, store: Store) -> str | None:
        return changed_weights(step.spec_as(TrainSpec), TrainResult.of(manifest).outside)
