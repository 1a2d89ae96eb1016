"""Scores of one classifier in several tasks, and their weighted means, which are the study's
objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.core.labels import LabelSpace
from engine.metrics import multilabel
from engine.metrics.classification import confusion, summary
from engine.metrics.probabilities import finite_probability_metrics, log_loss


def task_scores(
    space: LabelSpace, targets: np.ndarray, probabilities: np.ndarray, thresholds: np.ndarray
) -> dict[str, Any]:
    """The fields of `ValScores`: the weighted mean of every metric that all tasks have, all labels,
    and each task's own scores, of the images that have a label in it."""
    decisions = space.decide(probabilities, thresholds)
    tasks: dict[str, dict[str, Any]] = {}
    for name, task in space.tasks.items():
        part = space.slices[name]
        own = np.isfinite(targets[:, part.start])
        truth, values = targets[own, part] > 0, probabilities[own, part]
        if task.kind == "single":
            labels = truth.argmax(1)
            matrix = confusion(labels, values.argmax(1), len(task.classes))
            tasks[name] = {
                **summary(matrix, task.classes), **finite_probability_metrics(labels, values),
            }  # fmt: skip
        else:
            counts = multilabel.label_counts(truth, decisions[own, part])
            of_values = {metric: value for metric, figure in multilabel.PROBABILITY_METRICS.items()
                         if np.isfinite(value := figure(truth, values))}  # fmt: skip
            tasks[name] = {**multilabel.summary(counts, task.classes), **of_values}
    labels_of_all = [scores for of_task in tasks.values()
                     for scores in of_task["per_class"].values()]  # fmt: skip
    return {
        **mean_figures(space, tasks),
        "per_class": dict(zip(space.outputs, labels_of_all, strict=True)),
        "confusion": [], "tasks": tasks,
    }  # fmt: skip


def mean_figures(space: LabelSpace, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The weighted mean of each figure that all tasks have."""
    shares, first = space.shares, next(iter(tasks.values()))
    return {
        name: sum(shares[task] * scores[name] for task, scores in tasks.items())
        for name, value in first.items()
        if isinstance(value, float) and all(name in scores for scores in tasks.values())
    }


def task_figures(
    space: LabelSpace, targets: np.ndarray, probabilities: np.ndarray
) -> dict[str, float]:
    """The weighted means during a training, with the loss; thresholds are those with the best F1 on
    these images."""
    scores = task_scores(space, targets, probabilities, space.thresholds(targets, probabilities))
    figures = {name: value for name, value in scores.items() if isinstance(value, float)}
    loss = 0.0
    for name, task in space.tasks.items():
        part = space.slices[name]
        own = np.isfinite(targets[:, part.start])
        truth, values = targets[own, part] > 0, probabilities[own, part]
        of_task = (
            log_loss(truth.argmax(1), values) if task.kind == "single"
            else multilabel.log_loss(truth, values)
        )  # fmt: skip
        loss += space.shares[name] * of_task
    return {**figures, "loss": loss}
