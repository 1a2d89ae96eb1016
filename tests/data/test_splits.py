from __future__ import annotations

from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.splits import LEAST_IMAGES, images_of, stratified_group_split

FRACTIONS = {"train": 0.65, "val": 0.15, "test": 0.2}


def per_split(labels: list[str], splits: np.ndarray) -> Counter[tuple[str, str]]:
    return Counter(zip(labels, splits.tolist(), strict=True))


def split_of(labels: list[str], groups: list[str], fractions: dict[str, float],
             seed: int) -> np.ndarray:  # fmt: skip
    return stratified_group_split([(label,) for label in labels], groups, fractions, seed)


def test_without_groups_every_class_is_split_exactly() -> None:
    labels = ["a"] * 100 + ["b"] * 40 + ["c"] * 20
    found = per_split(labels, split_of(labels, list(map(str, range(160))),
                                                     FRACTIONS, 0))  # fmt: skip
    for name, count in Counter(labels).items():
        for split, share in FRACTIONS.items():
            assert found[name, split] == pytest.approx(count * share, abs=0.5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 12)), min_size=1, max_size=80),
    st.integers(0, 5),
)
def test_group_stays_in_one_split(images: list[tuple[str, int]], seed: int) -> None:
    labels, groups = [label for label, _ in images], [str(group) for _, group in images]
    splits = split_of(labels, groups, FRACTIONS, seed)
    assert len(set(zip(groups, splits.tolist(), strict=True))) == len(set(groups))
    assert set(splits) <= set(FRACTIONS)


def test_large_groups_come_close_to_the_fractions() -> None:
    random = np.random.default_rng(0)
    groups = [str(group) for group in random.integers(0, 120, 1000)]
    labels = [("a", "b")[int(group) % 4 == 0] for group in groups]
    found = per_split(labels, split_of(labels, groups, FRACTIONS, 1))
    for name, count in Counter(labels).items():
        for split, share in FRACTIONS.items():
            assert abs(found[name, split] / count - share) < 0.05


def test_split_depends_on_the_seed_and_not_on_row_order() -> None:
    labels, groups = ["a", "b"] * 50, [str(number) for number in range(100)]
    first = split_of(labels, groups, FRACTIONS, 4)
    again = split_of(labels[::-1], groups[::-1], FRACTIONS, 4)[::-1]
    assert (first == again).all()
    assert (first != split_of(labels, groups, FRACTIONS, 5)).any()


def test_small_class_reaches_every_split_and_train_keeps_two() -> None:
    labels = ["big"] * 100 + ["small"] * 4
    splits = split_of(labels, list(map(str, range(104))), FRACTIONS, 0)
    assert sorted(splits[100:]) == ["test", "train", "train", "val"]


def test_class_of_one_group_is_in_one_split() -> None:
    labels, groups = ["a"] * 20 + ["b"] * 20, ["one"] * 20 + [str(n) for n in range(20)]
    splits = split_of(labels, groups, FRACTIONS, 0)
    assert set(splits[:20]) == {"train"}


def table(counts: np.ndarray) -> tuple[list[str], list[str]]:
    """Labels and groups of images. counts: images by group and class."""
    cells = [(str(group), str(label)) for (group, label), n in np.ndenumerate(counts)
             for _ in range(n)]  # fmt: skip
    return [label for _, label in cells], [group for group, _ in cells]


def suffices(counts: np.ndarray, assigned: np.ndarray) -> bool:
    least = np.asarray([LEAST_IMAGES[split] for split in FRACTIONS])
    return bool((images_of(counts, assigned, 3) >= least[:, None]).all())


def test_split_with_every_class_is_found_if_one_exists() -> None:
    random = np.random.default_rng(0)
    outcomes: Counter[bool] = Counter()
    for seed in range(150):
        shape = (int(random.integers(3, 7)), int(random.integers(1, 5)))
        counts = random.poisson(random.uniform(0.3, 2), shape)
        counts = counts[counts.sum(axis=1) > 0][:, counts.sum(axis=0) > 0]
        if not counts.size:
            continue
        labels, groups = table(counts)
        splits = split_of(labels, groups, FRACTIONS, seed)
        number = dict(zip(groups, (list(FRACTIONS).index(split) for split in splits), strict=True))
        assigned = np.asarray([number[str(group)] for group in range(len(counts))])
        exists = any(
            suffices(counts, np.asarray(choice)) for choice in product(range(3), repeat=len(counts))
        )
        assert suffices(counts, assigned) == exists, counts
        outcomes[exists] += 1
    assert min(outcomes.values()) > 30


def test_small_grouped_classes_are_split_for_every_seed() -> None:
    random = np.random.default_rng(0)
    common = np.eye(10, dtype=np.int64)[random.integers(4, 10, 200)] * 3
    rare = np.zeros((17, 10), dtype=np.int64)
    # 6, 7, 10 and 11 images of four classes in 3 to 6 patients each.
    for row, (label, images) in enumerate(
        [(0, 3), (0, 2), (0, 1), (1, 4), (1, 2), (1, 1), (2, 5), (2, 2), (2, 1), (2, 2), (3, 5),
         (3, 1), (3, 1), (3, 1), (3, 1), (3, 1), (3, 1)]
    ):  # fmt: skip
        rare[row, label] = images
    counts = np.concatenate([rare, common])
    labels, groups = table(counts)
    for seed in range(10):
        splits = split_of(labels, groups, FRACTIONS, seed)
        images = per_split(labels, splits)
        assert all(
            images[label, split] >= LEAST_IMAGES[split]
            for label in map(str, range(10)) for split in FRACTIONS
        )  # fmt: skip


def test_images_with_several_labels_are_split_label_by_label() -> None:
    random = np.random.default_rng(0)
    labels = [tuple(name for name, share in (("a", 0.5), ("b", 0.2), ("rare", 0.01))
                    if random.random() < share) for _ in range(1000)]  # fmt: skip
    groups = [str(number // 2) for number in range(1000)]
    splits = stratified_group_split(labels, groups, FRACTIONS, 0)
    assert len(set(zip(groups, splits.tolist(), strict=True))) == 500
    for names in (("a",), ("b",), ("rare",), ()):
        has = np.asarray([set(names) <= set(one) if names else not one for one in labels])
        for split, share in FRACTIONS.items():
            within = (splits[has] == split).mean()
            assert abs(within - share) < (0.1 if names == ("rare",) else 0.03), (names, split)
