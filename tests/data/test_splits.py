from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.splits import stratified_group_split

FRACTIONS = {"train": 0.65, "val": 0.15, "test": 0.2}


def per_split(labels: list[str], splits: np.ndarray) -> Counter[tuple[str, str]]:
    return Counter(zip(labels, splits.tolist(), strict=True))


def test_without_groups_every_class_is_split_exactly() -> None:
    labels = ["a"] * 100 + ["b"] * 40 + ["c"] * 20
    found = per_split(labels, stratified_group_split(labels, list(map(str, range(160))),
                                                     FRACTIONS, 0))  # fmt: skip
    for name, count in Counter(labels).items():
        for split, share in FRACTIONS.items():
            assert found[name, split] == pytest.approx(count * share, abs=0.5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12)), min_size=1, max_size=80),
    st.integers(0, 5),
)
def test_a_group_never_crosses(images: list[tuple[str, int]], seed: int) -> None:
    labels, groups = [label for label, _ in images], [str(group) for _, group in images]
    splits = stratified_group_split(labels, groups, FRACTIONS, seed)
    assert len(set(zip(groups, splits.tolist(), strict=True))) == len(set(groups))
    assert set(splits) <= set(FRACTIONS)


def test_groups_of_several_images_come_close_to_the_fractions() -> None:
    random = np.random.default_rng(0)
    groups = [str(group) for group in random.integers(0, 120, 1000)]
    labels = [("a", "b")[int(group) % 4 == 0] for group in groups]
    found = per_split(labels, stratified_group_split(labels, groups, FRACTIONS, 1))
    for name, count in Counter(labels).items():
        for split, share in FRACTIONS.items():
            assert abs(found[name, split] / count - share) < 0.05


def test_the_split_is_a_function_of_the_seed_and_not_of_the_order_of_rows() -> None:
    labels, groups = ["a", "b"] * 50, [str(number) for number in range(100)]
    first = stratified_group_split(labels, groups, FRACTIONS, 4)
    again = stratified_group_split(labels[::-1], groups[::-1], FRACTIONS, 4)[::-1]
    assert (first == again).all()
    assert (first != stratified_group_split(labels, groups, FRACTIONS, 5)).any()


def test_a_small_class_reaches_every_split_and_train_keeps_two() -> None:
    labels = ["big"] * 100 + ["small"] * 4
    splits = stratified_group_split(labels, list(map(str, range(104))), FRACTIONS, 0)
    assert sorted(splits[100:]) == ["test", "train", "train", "val"]


def test_a_class_in_one_group_lies_in_one_split() -> None:
    labels, groups = ["a"] * 20 + ["b"] * 20, ["one"] * 20 + [str(n) for n in range(20)]
    splits = stratified_group_split(labels, groups, FRACTIONS, 0)
    assert set(splits[:20]) == {"train"}
