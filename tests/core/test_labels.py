from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from engine.core.labels import (
    RARE,
    LabelSpace,
    TaskLabels,
    best_threshold,
    cell_name,
    cells_of,
    members,
    plain_labels,
)

DIGITS = TaskLabels(kind="single", classes=("0", "1", "2"), weight=3)
SIGNS = TaskLabels(kind="multi", classes=("edema", "mass"))
SPACE = LabelSpace(
    {"digit": DIGITS, "sign": SIGNS},
    {
        "0, none": {"digit": "0", "sign": ()},
        "1, edema": {"digit": "1", "sign": ("edema",)},
        "2, edema + mass": {"digit": "2", "sign": ("edema", "mass")},
    },
)


def test_cell_names_the_labels_of_every_task() -> None:
    assert cell_name(["7", ("b", "c")]) == "7, b + c"
    assert cell_name([None, ()]) == "?, none"


def test_several_labels_are_sorted_without_repetition_and_without_the_label_for_none() -> None:
    assert plain_labels(["10", "2", "10"]) == ("2", "10")
    assert plain_labels(["No Finding"], "No Finding") == ()
    assert plain_labels(None) is None
    assert plain_labels("7") == "7"


def test_rare_combinations_are_pooled_and_only_complete_common_ones_have_labels() -> None:
    columns = {
        "digit": ["1", "1", "1", "2", None, None, "1"],
        "sign": [("a",), ("a",), ("a",), (), ("a",), ("a",), None],
    }
    names, cells = cells_of(columns, 2)
    assert names == ["1, a"] * 3 + [RARE, "?, a", "?, a", RARE]
    assert cells == {"1, a": {"digit": "1", "sign": ("a",)}}


def test_two_combinations_with_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a \+ b"):
        cells_of({"sign": [("a", "b"), ("a + b",)]}, 1)


def test_outputs_are_named_after_their_task_if_there_are_several() -> None:
    assert SPACE.outputs == ("digit: 0", "digit: 1", "digit: 2", "sign: edema", "sign: mass")
    assert LabelSpace({"sign": SIGNS}, {}).outputs == ("edema", "mass")
    assert SPACE.slices == {"digit": slice(0, 3), "sign": slice(3, 5)}
    assert SPACE.shares == {"digit": 0.75, "sign": 0.25}
    assert SPACE.chance == pytest.approx(0.75 / 3 + 0.25 / 2)


def test_targets_have_no_value_in_a_task_without_a_label() -> None:
    targets = SPACE.encode({"digit": ["1", None], "sign": [None, ["edema", "no finding"]]})
    np.testing.assert_array_equal(
        targets, [[0, 1, 0, np.nan, np.nan], [np.nan, np.nan, np.nan, 1, 0]]
    )


def test_one_class_is_the_likeliest_and_several_labels_pass_their_thresholds() -> None:
    probabilities = np.asarray([[0.2, 0.5, 0.3, 0.35, 0.6]])
    decisions = SPACE.decide(probabilities, np.asarray([0, 0, 0, 0.3, 0.7]))
    assert decisions.tolist() == [[False, True, False, True, False]]


def test_cell_probabilities_are_products_over_tasks_and_labels() -> None:
    probabilities = np.asarray([[0.5, 0.3, 0.2, 0.6, 0.1]], np.float32)
    products = np.asarray([0.5 * 0.4 * 0.9, 0.3 * 0.6 * 0.9, 0.2 * 0.6 * 0.1])
    np.testing.assert_allclose(
        SPACE.cell_probabilities(probabilities)[0], products / products.sum(), rtol=1e-5
    )


def test_threshold_of_a_label_without_images_is_a_half() -> None:
    targets = SPACE.encode({"digit": ["0", "1"], "sign": [("edema",), ()]})
    probabilities = np.asarray([[1, 0, 0, 0.2, 0.9], [0, 1, 0, 0.1, 0.8]])
    np.testing.assert_allclose(SPACE.thresholds(targets, probabilities), [0.5] * 3 + [0.15, 0.5])


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 10)), min_size=1, max_size=30))
def test_threshold_has_the_best_f1_of_all(images: list[tuple[bool, int]]) -> None:
    truth = np.asarray([true for true, _ in images])
    probabilities = np.asarray([score / 10 for _, score in images])

    def f1(threshold: float) -> float:
        return float(f1_score(truth, probabilities >= threshold, zero_division=0))

    best = max(f1(threshold) for threshold in np.arange(-0.05, 1.1, 0.1))
    if truth.any():
        assert f1(best_threshold(truth, probabilities)) == pytest.approx(best)


def test_members_tell_tasks_apart_and_leave_out_missing_labels() -> None:
    labels = {"digit": "1", "sign": ("1", "mass"), "other": None}
    assert members(labels, labels) == ("digit: 1", "sign: 1", "sign: mass")
