"""How classifiers of several tasks do on whole combinations of labels, and where their errors go
together. Descriptions alone: nothing is chosen or decided by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations as pairs_of

import numpy as np
import pyarrow as pa

from engine.comparison.tasks import targets_of
from engine.core import rows
from engine.core.labels import LabelSpace
from engine.results.data import IngestResult
from engine.results.joint import CombinationResult, CommonErrors, Exchange, JointResult

# Exchanges of two labels that are listed, for each arm.
_MOST = 10


def joint_result(
    test: pa.Table, task: str, data: IngestResult, space: LabelSpace,
    probabilities: Mapping[str, np.ndarray], thresholds: Mapping[str, np.ndarray],
) -> JointResult:  # fmt: skip
    """Over all classifiers of each arm. test: with its labels. probabilities, thresholds: as in
    `figures_of`."""
    targets = targets_of(test, space)
    cells = np.asarray(test[rows.label_column(task)].to_pylist(), dtype=object)
    decisions = {
        arm: np.stack([space.decide(one, limits) for one, limits in
                       zip(values, thresholds[arm], strict=True)])
        for arm, values in probabilities.items()
    }  # fmt: skip
    complete = np.isfinite(targets).all(1)
    exact = {
        arm: float((of_arm[:, complete] == (targets[complete] > 0)).all(2).mean())
        for arm, of_arm in decisions.items()
        if complete.any()
    }
    return JointResult(
        images=int(complete.sum()), exact=exact,
        combinations=_combinations(cells, complete, decisions, data, space),
        common_errors=[pair for arm, of_arm in decisions.items()
                       for pair in _common_errors(arm, of_arm, targets, space)],
        exchanges=[pair for arm, of_arm in decisions.items()
                   for pair in _exchanges(arm, of_arm, targets, space)],
    )  # fmt: skip


def _combinations(
    cells: np.ndarray, complete: np.ndarray, decisions: Mapping[str, np.ndarray],
    data: IngestResult, space: LabelSpace,
) -> list[CombinationResult]:  # fmt: skip
    """The combinations of test with their images in train, the most frequent ones first."""
    results = []
    for name, labels in space.cells.items():
        own = complete & (cells == name)
        if not own.any():
            continue
        wanted = space.encode({task: [labels[task]] for task in space.tasks})[0] > 0
        right, f1 = {}, {}
        for arm, of_arm in decisions.items():
            predicted = (of_arm[:, complete] == wanted).all(2)
            true = own[complete]
            hits = predicted[:, true].sum()
            right[arm] = float(predicted[:, true].mean())
            f1[arm] = float(2 * hits / (predicted.sum() + len(of_arm) * true.sum()))
        results.append(
            CombinationResult(
                name=name, train=data.train.get(name, 0), images=int(own.sum()), right=right, f1=f1
            )
        )
    return sorted(results, key=lambda result: -result.train)


def _common_errors(
    arm: str, decisions: np.ndarray, targets: np.ndarray, space: LabelSpace
) -> list[CommonErrors]:
    """For each pair of tasks, how often an image is wrong in both."""
    results = []
    for first, second in pairs_of(space.tasks, 2):
        parts = space.slices[first], space.slices[second]
        own = np.isfinite(targets[:, [part.start for part in parts]]).all(1)
        if not own.any():
            continue
        wrong = [(decisions[:, own, part] != (targets[own, part] > 0)).any(2) for part in parts]
        results.append(
            CommonErrors(
                arm=arm,
                first=first,
                second=second,
                both=float((wrong[0] & wrong[1]).mean()),
                by_chance=float(wrong[0].mean() * wrong[1].mean()),
            )
        )
    return results


def _exchanges(
    arm: str, decisions: np.ndarray, targets: np.ndarray, space: LabelSpace
) -> list[Exchange]:
    """For tasks with several labels per image: which label is predicted where another is missed."""
    results: list[Exchange] = []
    for name, task in space.tasks.items():
        if task.kind == "single":
            continue
        part = space.slices[name]
        own = np.isfinite(targets[:, part.start])
        truth, predicted = targets[own, part] > 0, decisions[:, own, part]
        missed, added = truth & ~predicted, predicted & ~truth
        together = np.einsum("mna,mnb->ab", missed.astype(float), added.astype(float))
        images = len(predicted) * np.maximum(truth.sum(0), 1)
        share = together / images[:, None]
        order = np.argsort(-share, axis=None)[:_MOST]
        results += [
            Exchange(arm=arm, task=name, missed=task.classes[row], predicted=task.classes[column],
                     share=float(share[row, column]))
            for row, column in zip(*np.unravel_index(order, share.shape), strict=True)
            if share[row, column] > 0
        ]  # fmt: skip
    return results


def label_columns(
    test: pa.Table, task: str, probabilities: np.ndarray, space: LabelSpace | None,
    thresholds: Sequence[float],
) -> dict[str, pa.Array | pa.ChunkedArray]:  # fmt: skip
    """The columns of a classifier's predictions: the true labels and the probabilities; of several
    tasks, for each of them, with the decisions."""
    columns = {rows.label_column(task): test[rows.label_column(task)]}
    if space is None:
        return {**columns, rows.PROBABILITIES: rows.fixed_lists(probabilities)}
    decisions = space.decide(probabilities, np.asarray(thresholds))
    for name, of_task in space.tasks.items():
        part, classes = space.slices[name], np.asarray(of_task.classes, dtype=object)
        columns[rows.label_column(name)] = test[rows.label_column(name)]
        columns[rows.probabilities_column(name)] = rows.fixed_lists(probabilities[:, part])
        named = [classes[row].tolist() for row in decisions[:, part]]
        single = of_task.kind == "single"
        columns[rows.decided_column(name)] = (
            pa.array([names[0] for names in named], pa.string()) if single
            else pa.array(named, pa.list_(pa.string()))
        )  # fmt: skip
    return columns
