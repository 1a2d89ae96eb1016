"""The figures of classifiers from their probabilities, for a class per image or for the labels of
several tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from engine.comparison.arms import Arm
from engine.comparison.classified import LabelPredictions, Predictions, TaskPredictions
from engine.comparison.figures import AnyFigures, Figures, TaskFigures
from engine.core import rows
from engine.core.labels import LabelSpace
from engine.nets.classification import class_numbers
from engine.results.comparison import Contrast, Effect, TaskResult


def figures_of(
    images: pa.Table, task: str, classes: Sequence[str], space: LabelSpace | None,
    probabilities: Mapping[str, np.ndarray], thresholds: Mapping[str, np.ndarray],
    generator_fits: int, seed: int,
) -> AnyFigures:  # fmt: skip
    """The figures of each arm's classifiers.

    images: with their labels and groups, n rows. probabilities: by arm, float32 (classifiers, n,
    outputs). thresholds: by arm, of several tasks alone, (classifiers, outputs).
    """
    groups = np.asarray(images[rows.GROUP_ID].to_pylist(), dtype=str)
    if space is None:
        labels = class_numbers(images[rows.label_column(task)].to_pylist(), classes)
        return Figures(Predictions(classes, labels, groups, probabilities, generator_fits), seed)
    predictions = task_predictions(
        space, targets_of(images, space), groups, probabilities, thresholds, generator_fits
    )
    return TaskFigures.of_predictions(predictions, seed)


def targets_of(images: pa.Table, space: LabelSpace) -> np.ndarray:
    """The targets (n, outputs) of images with their labels."""
    return space.encode({name: images[rows.label_column(name)].to_pylist() for name in space.tasks})


def task_predictions(
    space: LabelSpace, targets: np.ndarray, groups: np.ndarray,
    probabilities: Mapping[str, np.ndarray], thresholds: Mapping[str, np.ndarray],
    generator_fits: int,
) -> TaskPredictions:  # fmt: skip
    """The predictions of each task for the images that have a label in it."""
    decisions = {
        arm: np.stack([space.decide(one, limits) for one, limits in
                       zip(values, thresholds[arm], strict=True)])
        for arm, values in probabilities.items()
    }  # fmt: skip
    every, parts, row_numbers = np.unique(groups), {}, {}
    for name, task in space.tasks.items():
        part = space.slices[name]
        own = np.flatnonzero(np.isfinite(targets[:, part.start]))
        row_numbers[name] = own
        of_task = {arm: values[:, own, part] for arm, values in probabilities.items()}
        truth = targets[own, part] > 0
        if task.kind == "single":
            parts[name] = Predictions(
                task.classes, truth.argmax(1), groups[own], of_task, generator_fits, every
            )
        else:
            parts[name] = LabelPredictions(
                task.classes, truth, groups[own], of_task, generator_fits, every,
                {arm: values[:, own, part] for arm, values in decisions.items()},
            )  # fmt: skip
    return TaskPredictions(parts, space.shares, row_numbers, groups, space.outputs)


def task_results(
    figures: AnyFigures, space: LabelSpace | None, arms: Mapping[str, Arm], objective: str,
    baseline: str, contrasts: Sequence[Contrast],
) -> dict[str, TaskResult]:  # fmt: skip
    """The figures of each task, with each arm's differences from the baseline and from real images;
    empty for a class per image."""
    if space is None or not isinstance(figures, TaskFigures):
        return {}
    results = {}
    for name, of_task in figures.tasks.items():

        def differences(rival: str, of_task: Figures = of_task) -> dict[str, Effect]:
            return {arm: of_task.difference(arm, rival, objective)
                    for arm in arms if rival in arms and arm != rival}  # fmt: skip

        results[name] = TaskResult(
            kind=space.tasks[name].kind, weight=space.shares[name],
            classes=list(space.tasks[name].classes), images=len(of_task.predictions.labels),
            arms={
                arm.name: of_task.of(arm.name, arm.family, arm.ratio, arm.role)
                for arm in arms.values()
            },
            to_baseline=differences(baseline), to_real=differences("real"),
            to_against={
                contrast.arm: of_task.difference(contrast.arm, contrast.against, objective)
                for contrast in contrasts
                if not contrast.twin
            },
        )  # fmt: skip
    return results
