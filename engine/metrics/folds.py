"""Folds of a cross-validation that keep groups whole."""

from __future__ import annotations

import numpy as np


def grouped_folds(
    labels: np.ndarray, groups: np.ndarray, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The rows (train, rest) of each fold, stratified by label; each group lies in one fold.

    labels: (n,). groups: (n,).
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    rows, state = np.zeros(len(labels)), seed % 2**32
    # The search among groups takes a second for a thousand, and without groups decides nothing.
    if len(np.unique(groups)) == len(groups):
        return list(StratifiedKFold(folds, shuffle=True, random_state=state).split(rows, labels))
    grouped = StratifiedGroupKFold(folds, shuffle=True, random_state=state)
    return list(grouped.split(rows, labels, groups))
