"""Cross-validation keeps groups whole and classes in every fold."""

from __future__ import annotations

import numpy as np
import pytest

from engine.metrics.folds import grouped_folds


@pytest.mark.parametrize("of_group", [1, 4])
def test_each_row_is_left_out_once_with_its_whole_group(of_group: int) -> None:
    labels = np.repeat([0, 1, 1], 40)
    groups = np.arange(120) // of_group
    folds = grouped_folds(labels, groups, 5, seed=3)
    assert len(folds) == 5
    assert sorted(np.concatenate([rest for _, rest in folds])) == list(range(120))
    for train, rest in folds:
        assert len(train) + len(rest) == 120
        assert not set(groups[train]) & set(groups[rest])
        assert np.bincount(labels[rest]).tolist() == [8, 16]


def test_seed_decides_the_folds() -> None:
    labels, groups = np.repeat([0, 1], 30), np.arange(60)
    first, again, other = (grouped_folds(labels, groups, 3, seed)[0][1] for seed in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
