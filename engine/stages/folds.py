"""The folds of train that voters on labels are trained without."""

from __future__ import annotations

import warnings

import numpy as np
import pyarrow as pa

from engine.core import rows
from engine.core.errors import DataError
from engine.core.rng import derive_seed
from engine.metrics.folds import grouped_folds


def folds_of(train: pa.Table, task: str, folds: int, seed: int) -> np.ndarray:
    """The fold of each training image, int64 (n,): whole groups, balanced by class.

    train: ids, labels and groups. Raises `DataError` with fewer groups than folds.
    """
    labels = np.asarray(train[rows.label_column(task)].to_pylist(), dtype=str)
    groups = np.asarray(train[rows.GROUP_ID].to_pylist(), dtype=str)
    count = len(np.unique(groups))
    if count < folds:
        raise DataError(
            f"relabel.folds: train has {count} groups, fewer than {folds} folds; lower folds"
        )
    fold = np.zeros(len(labels), np.int64)
    with warnings.catch_warnings():
        # scikit-learn warns of classes with fewer images than folds; their votes are not used.
        warnings.simplefilter("ignore", UserWarning)
        for number, (_, rest) in enumerate(
            grouped_folds(labels, groups, folds, derive_seed(seed, "folds"))
        ):
            fold[rest] = number
    return fold


def judged(labels: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Whether voters without an image's fold have learnt its class, bool (n,): they would
    contradict a class that they never saw. labels, folds: (n,), -1 outside train."""
    known = np.ones(len(labels), bool)
    for label in np.unique(labels):
        own = labels == label
        of_class = np.unique(folds[own])
        if len(of_class) == 1 and of_class[0] >= 0:
            known[own] = False
    return known
