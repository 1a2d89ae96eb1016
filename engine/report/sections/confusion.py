"""Which class is taken for which, on val and on test, summed over the classifiers of an arm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from engine.report.download import Row
from engine.report.page import Section, render
from engine.report.results import StudyResults

# Largest number of classes with a confusion matrix on the page.
MOST_CLASSES = 30
_MOST_PAIRS = 20


@dataclass(frozen=True)
class Confused:
    """A cell of a confusion matrix. share: of the images of the true class."""

    true: str
    predicted: str
    count: int
    share: float


@dataclass(frozen=True)
class TaskMatrices:
    """The confusion of a task, by arm. name: empty if the study has one. few: whether the page has
    whole matrices, by split; otherwise it has the most frequently confused pairs on test."""

    name: str
    classes: Sequence[str]
    few: bool
    matrices: dict[str, dict[str, list[list[Confused]]]]
    pairs: dict[str, list[Confused]]


def confusion(results: StudyResults) -> Section:
    """Few classes have whole matrices, many the most frequently confused pairs. Tasks with several
    labels per image have none."""
    tasks = []
    for name, classes in tasks_of(results).items():
        counts = {arm: matrices_of(results, arm, name) for arm, _ in results.legend}
        few = len(classes) <= MOST_CLASSES
        tasks.append(
            TaskMatrices(
                name, classes, few,
                {
                    arm: {split: cells(matrix, classes) for split, matrix in of_arm.items()}
                    for arm, of_arm in counts.items()
                } if few else {},
                {} if few else {
                    arm: most_confused(of_arm["test"], classes) for arm, of_arm in counts.items()
                },
            )
        )  # fmt: skip
    html = render("confusion.html", results=results, tasks=tasks) if tasks else ""
    return Section(html, {"confusion": list(confusion_rows(results))})


def tasks_of(results: StudyResults) -> dict[str, Sequence[str]]:
    """The classes of each task with one label per image, by name; "" is the only task."""
    if not results.evaluate.tasks:
        return {"": results.classes}
    return {name: task.classes for name, task in results.evaluate.tasks.items()
            if task.kind == "single"}  # fmt: skip


def matrices_of(results: StudyResults, arm: str, task: str = "") -> dict[str, np.ndarray]:
    """Counts (classes, classes) of an arm in a task on val and, if it was tested, on test."""
    classifiers = results.tested(arm) or results.of_arm(arm)
    of_val = [item.result.val.tasks[task].confusion if task else item.result.val.confusion
              for item in classifiers]  # fmt: skip
    matrices = {"val": np.asarray(np.sum(of_val, axis=0))}
    tested = results.evaluate.tasks[task].arms if task else results.evaluate.arms
    if arm in tested:
        matrices["test"] = np.asarray(tested[arm].confusion)
    return matrices


def cells(
    matrix: np.ndarray | Sequence[Sequence[int]], classes: Sequence[str]
) -> list[list[Confused]]:
    """The cells of a matrix of counts, row by row."""
    counts = np.asarray(matrix)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return [
        [
            Confused(true, predicted, int(count), float(part))
            for predicted, count, part in zip(classes, row, parts, strict=True)
        ]
        for true, row, parts in zip(classes, counts, share, strict=True)
    ]


def most_confused(
    matrix: np.ndarray | Sequence[Sequence[int]], classes: Sequence[str]
) -> list[Confused]:
    """The wrong cells with the largest shares."""
    wrong = [cell for row in cells(matrix, classes) for cell in row
             if cell.true != cell.predicted and cell.count]  # fmt: skip
    return sorted(wrong, key=lambda cell: -cell.share)[:_MOST_PAIRS]


def confusion_rows(results: StudyResults) -> Iterator[Row]:
    """A row for each nonzero cell: val of every arm, test of the tested arms."""
    arms = dict.fromkeys(item.trial.arm.name for item in results.trials)
    for task, classes in tasks_of(results).items():
        for arm in arms:
            for split, matrix in matrices_of(results, arm, task).items():
                for cell in (cell for row in cells(matrix, classes) for cell in row if cell.count):
                    yield {
                        **({"task": task} if task else {}), "arm": arm, "split": split,
                        "true": cell.true, "predicted": cell.predicted, "images": cell.count,
                        "share_of_true": cell.share,
                    }  # fmt: skip
