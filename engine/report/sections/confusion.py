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


def confusion(results: StudyResults) -> Section:
    """Few classes have whole matrices, many the most frequently confused pairs."""
    classes = results.classes
    few = len(classes) <= MOST_CLASSES
    matrices = {arm: matrices_of(results, arm) for arm, _ in results.legend}
    html = render(
        "confusion.html", results=results,
        matrices={
            arm: {split: cells(matrix, classes) for split, matrix in of_arm.items()}
            for arm, of_arm in matrices.items()
        } if few else {},
        pairs={} if few else {
            arm: most_confused(of_arm["test"], classes) for arm, of_arm in matrices.items()
        },
    )  # fmt: skip
    return Section(html, {"confusion": list(confusion_rows(results))})


def matrices_of(results: StudyResults, arm: str) -> dict[str, np.ndarray]:
    """Counts (classes, classes) of an arm on val and, if it was tested, on test."""
    classifiers = results.tested(arm) or results.of_arm(arm)
    of_val = [item.result.val.confusion for item in classifiers]
    matrices = {"val": np.asarray(np.sum(of_val, axis=0))}
    if arm in results.evaluate.arms:
        matrices["test"] = np.asarray(results.evaluate.arms[arm].confusion)
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
    for arm in dict.fromkeys(item.trial.arm.name for item in results.trials):
        for split, matrix in matrices_of(results, arm).items():
            for row in cells(matrix, results.classes):
                for cell in row:
                    if cell.count:
                        yield {"arm": arm, "split": split, "true": cell.true,
                               "predicted": cell.predicted, "images": cell.count,
                               "share_of_true": cell.share}  # fmt: skip
