from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from engine.core import rows
from engine.core.errors import DataError
from engine.stages.folds import folds_of, judged


def train(labels: list[str], groups: list[str]) -> pa.Table:
    return pa.table({rows.label_column("class"): labels, rows.GROUP_ID: groups})


def test_folds_keep_groups_whole_and_balance_classes() -> None:
    labels = ["common"] * 80 + ["rare"] * 20
    groups = [str(number // 2) for number in range(100)]
    folds = folds_of(train(labels, groups), "class", 5, 0)
    assert len(set(zip(groups, folds.tolist(), strict=True))) == 50
    rare = np.asarray(labels) == "rare"
    assert np.bincount(folds[rare], minlength=5).tolist() == [4] * 5
    assert (folds != folds_of(train(labels, groups), "class", 5, 1)).any()


def test_fewer_groups_than_folds_are_refused() -> None:
    with pytest.raises(DataError, match="train has 2 groups, fewer than 3 folds; lower folds"):
        folds_of(train(["a", "b"] * 4, ["one", "two"] * 4), "class", 3, 0)


def test_class_of_a_single_fold_is_not_judged() -> None:
    labels = np.asarray([0, 0, 0, 1, 1])
    assert judged(labels, np.asarray([0, 1, 0, 1, 1])).tolist() == [True] * 3 + [False] * 2
    # Images of other splits are seen by models that know all classes.
    assert judged(labels, np.full(5, -1)).all()
