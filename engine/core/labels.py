"""Several labels per image: combinations of labels, and the outputs of one wide head.

A *cell* is the combination of an image's labels over all tasks of a study, such as "7, odd" or
"edema + effusion". It is a column of its own with one value per image, so split, requests,
generation, curation and mixes treat cells as classes. Only classifiers see the tasks: their last
layer has the outputs of all tasks side by side, which is a separate head per task on one backbone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
from pydantic import Field

from engine.core.names import natural
from engine.core.rows import TaskKind
from engine.core.spec import ClassName, Spec

# The column of cells among the tasks, and the cell of all rare combinations.
CELL, RARE = "cell", "rare combinations"
# In the name of a cell: a task without a label, and a multi-label task of which no label applies.
UNKNOWN, NOTHING = "?", "none"
# A class name, several for a multi-label task, or None for an unlabelled image.
Labels = str | tuple[str, ...] | None
# The least probability of a label in a product: a product of zeros would have no best cell.
_LEAST = 1e-12


class Task(Spec):
    """One task of a study with several. weight: of its loss and of its score, relative to the
    others. none: the label of the data that means that no label applies; multi-label tasks only."""

    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    none: ClassName | None = None


class CellTask(Spec):
    """A task whose labels are part of cells. none: as in `Task`."""

    name: str
    none: str | None = None


class Cells(Spec):
    """How labels become cells. tasks: in the order of a cell's name. least: images below which a
    combination is pooled with the other rare ones."""

    tasks: tuple[CellTask, ...]
    least: int = 10


class TaskLabels(Spec):
    """The labels of a task. classes: in the order of their numbers."""

    kind: TaskKind
    classes: tuple[str, ...]
    weight: float = 1.0


def plain_labels(value: str | Sequence[str] | None, none: str | None = None) -> Labels:
    """The labels of one image in one task: several without repetition, in natural order."""
    if value is None or isinstance(value, str):
        return value
    return tuple(sorted({name for name in value if name is not None and name != none}, key=natural))


def cell_name(labels: Sequence[Labels]) -> str:
    """The name of a combination: the labels of each task."""
    return ", ".join(
        UNKNOWN if one is None else one if isinstance(one, str) else " + ".join(one) or NOTHING
        for one in labels
    )


def cells_of(
    columns: Mapping[str, Sequence[Labels]], least: int
) -> tuple[list[str], dict[str, dict[str, str | tuple[str, ...]]]]:
    """The cell of each image, and the labels of every complete cell that is not rare.

    columns: the labels of each image by task. Combinations of fewer than `least` images are pooled.
    Raises `ValueError` if two combinations have one name.
    """
    every = list(zip(*columns.values(), strict=True))
    counts = Counter(every)
    common = [labels for labels, count in counts.items() if count >= least]
    names = {labels: cell_name(labels) for labels in common}
    if len(set(names.values())) < len(names) or RARE in names.values():
        name, _ = Counter(names.values()).most_common(1)[0]
        raise ValueError(name)
    complete = {
        names[labels]: dict(zip(columns, labels, strict=True))
        for labels in common
        if None not in labels
    }
    ordered = {name: complete[name] for name in sorted(complete, key=natural)}
    return [names.get(labels, RARE) for labels in every], ordered


@dataclass(frozen=True)
class LabelSpace:
    """The tasks of a study with several labels per image.

    tasks: in the order of the outputs. cells: the labels of each cell that can be requested.
    """

    tasks: Mapping[str, TaskLabels]
    cells: Mapping[str, Mapping[str, Labels]]

    @cached_property
    def slices(self) -> dict[str, slice]:
        """The outputs of each task."""
        slices, start = {}, 0
        for name, task in self.tasks.items():
            slices[name] = slice(start, start + len(task.classes))
            start += len(task.classes)
        return slices

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """The name of each output: the class, after its task if there are several."""
        return tuple(
            f"{name}: {label}" if len(self.tasks) > 1 else label
            for name, task in self.tasks.items()
            for label in task.classes
        )

    @property
    def shares(self) -> dict[str, float]:
        """The weight of each task; they add up to 1."""
        total = sum(task.weight for task in self.tasks.values())
        return {name: task.weight / total for name, task in self.tasks.items()}

    @property
    def chance(self) -> float:
        """The balanced accuracy of a guess."""
        return sum(
            share * (0.5 if self.tasks[name].kind == "multi" else 1 / len(self.tasks[name].classes))
            for name, share in self.shares.items()
        )

    def encode(self, columns: Mapping[str, Sequence[str | Sequence[str] | None]]) -> np.ndarray:
        """Labels by task to targets float32 (n, outputs): 1 where a label applies, 0 where it does
        not, NaN in all outputs of a task without a label."""
        count = len(next(iter(columns.values())))
        targets = np.zeros((count, len(self.outputs)), np.float32)
        for name, task in self.tasks.items():
            number = {label: place for place, label in enumerate(task.classes)}
            of_task = targets[:, self.slices[name]]
            for row, labels in enumerate(columns[name]):
                if labels is None:
                    of_task[row] = np.nan
                    continue
                for label in (labels,) if isinstance(labels, str) else labels:
                    # A label such as "no finding" is not an output.
                    if label in number:
                        of_task[row, number[label]] = 1
        return targets

    def decide(self, probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        """Decisions bool (…, outputs) of probabilities (…, outputs): the likeliest class of a
        single-label task, every label above its threshold (outputs,) of a multi-label one."""
        decisions = probabilities >= thresholds
        for name, task in self.tasks.items():
            if task.kind == "single":
                of_task = probabilities[..., self.slices[name]]
                best = of_task.argmax(-1)[..., None] == np.arange(len(task.classes))
                decisions[..., self.slices[name]] = best
        return decisions

    def thresholds(self, targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        """The threshold of each output, float64 (outputs,), with the best F1 on these images (ties:
        the nearest to a half); a half for single-label tasks, which do not read it, and for labels
        that no image has."""
        best = np.full(len(self.outputs), 0.5)
        for name, task in self.tasks.items():
            if task.kind == "multi":
                for place in range(*self.slices[name].indices(len(self.outputs))):
                    labelled = np.isfinite(targets[:, place])
                    best[place] = best_threshold(
                        targets[labelled, place] > 0, probabilities[labelled, place]
                    )
        return best

    def cell_probabilities(self, probabilities: np.ndarray) -> np.ndarray:
        """Probabilities float32 (n, cells) of the cells in `cells`, given that it is one of them:
        the product over tasks and labels, which are independent given the image."""
        likely = np.log(np.maximum(probabilities.astype(np.float64), _LEAST))
        unlikely = np.log(np.maximum(1 - probabilities.astype(np.float64), _LEAST))
        own = self.encode({
            name: [labels[name] for labels in self.cells.values()] for name in self.tasks
        })  # fmt: skip
        scores = likely @ own.T
        for name, task in self.tasks.items():
            if task.kind == "multi":
                part = self.slices[name]
                scores += unlikely[:, part] @ (1 - own[:, part]).T
        scores -= scores.max(1, keepdims=True)
        weights = np.exp(scores)
        return np.asarray(weights / weights.sum(1, keepdims=True), np.float32)


def best_threshold(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """The threshold with the best F1. truth: bool (n,). probabilities: (n,)."""
    if not truth.any():
        return 0.5
    order = np.argsort(-probabilities, kind="stable")
    score, right = probabilities[order].astype(np.float64), np.cumsum(truth[order])
    # Images with equal scores pass a threshold together.
    last = np.r_[np.flatnonzero(score[1:] != score[:-1]), len(score) - 1]
    f1 = 2 * right[last] / (last + 1 + truth.sum())
    # Between the last image that passes and the first that does not.
    below = np.r_[score[last[:-1] + 1], 0.0] if len(last) > 1 else np.zeros(1)
    middles = (score[last] + below) / 2
    best = np.flatnonzero(f1 == f1.max())
    return float(middles[best[np.abs(middles[best] - 0.5).argmin()]])


def members(labels: Mapping[str, Labels], tasks: Iterable[str]) -> tuple[str, ...]:
    """The labels of an image as names that tell tasks apart, without missing ones."""
    named: list[str] = []
    for task in tasks:
        value = labels[task]
        if value is not None:
            named += [f"{task}: {label}" for label in
                      ((value,) if isinstance(value, str) else value)]  # fmt: skip
    return tuple(named)
