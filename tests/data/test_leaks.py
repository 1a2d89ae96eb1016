"""Planted leaks are found, and merely similar images are not reported."""

from __future__ import annotations

import pyarrow as pa
import pytest

from engine.core import rows
from engine.data.dataset import resolve_leaks
from engine.data.leaks import NearPair, connected, find_leaks, seen_in_train


def index(entries: list[tuple[str, str, str]]) -> pa.Table:
    """Rows of (split, group, digest of the pixels); ids are a0, a1, …"""
    count = len(entries)
    return pa.table(
        {
            rows.IMAGE_ID: [f"a{number}" for number in range(count)],
            rows.URI: [f"{number}.png" for number in range(count)],
            rows.SPLIT: [split for split, _, _ in entries],
            rows.GROUP_ID: [group for _, group, _ in entries],
            rows.PIXEL_SHA256: [digest for _, _, digest in entries],
        }
    )


def test_equal_pixels_in_two_splits_are_an_exact_leak() -> None:
    leaks = find_leaks(index([("train", "g", "x"), ("train", "h", "y"), ("test", "i", "x")]))
    assert [(leak.kind, leak.first, leak.second) for leak in leaks] == [("exact", "a0", "a2")]
    assert (leaks[0].first_uri, leaks[0].first_split, leaks[0].second_split) == (
        "0.png", "train", "test"
    )  # fmt: skip


def test_pixels_in_all_three_splits_are_three_leaks() -> None:
    found = find_leaks(index([(split, split, "x") for split in ("train", "val", "test")]))
    assert [(leak.first_split, leak.second_split) for leak in found] == [
        ("train", "val"), ("train", "test"), ("val", "test")
    ]  # fmt: skip


def test_group_in_two_splits_is_reported_once_by_name() -> None:
    entries = [("train", "patient 7", f"t{n}") for n in range(5)]
    entries += [("val", "patient 7", f"v{n}") for n in range(5)] + [("val", "patient 8", "z")]
    leaks = find_leaks(index(entries))
    assert [(leak.kind, leak.detail) for leak in leaks] == [("group", "patient 7")]


def test_clean_dataset_has_no_leaks() -> None:
    entries = [(("train", "val", "test")[n % 3], f"g{n}", f"x{n}") for n in range(60)]
    assert find_leaks(index(entries)) == []


SPLITS = ["train"] * 4 + ["val"] * 2 + ["test"] * 2
CLEAN = index([(split, f"g{n}", f"x{n}") for n, split in enumerate(SPLITS)])


def told(near: list[NearPair], table: pa.Table = CLEAN) -> set[tuple[str, str, str]]:
    return {(leak.kind, leak.first, leak.second) for leak in find_leaks(table, near)}


def test_near_duplicates_in_two_splits_are_leaks() -> None:
    near = [("a6", "a0", 0.97), ("a1", "a2", 0.99), ("a4", "a7", 0.95)]
    assert told(near) == {("near", "a0", "a6"), ("near", "a4", "a7")}
    assert find_leaks(CLEAN, near)[0].detail == "agree to 0.970"


def test_copy_of_a_copy_is_a_leak() -> None:
    near = [("a0", "a1", 0.99), ("a1", "a6", 0.99), ("a2", "a3", 0.99)]
    assert told(near) == {("near", "a1", "a6"), ("near", "a0", "a6")}


def test_exact_pair_is_not_reported_again_as_near() -> None:
    table = index([("train", "g", "x"), ("test", "h", "x")])
    assert told([("a0", "a1", 1.0)], table) == {("exact", "a0", "a1")}


def test_pairs_with_a_removed_image_are_skipped() -> None:
    assert told([("a0", "gone", 0.99)]) == set()


@pytest.mark.parametrize("how", ["drop", "move"])
def test_leaks_are_resolved_until_none_is_left(how: str) -> None:
    # A burst in train; only one of its images is a direct neighbour of the test image.
    near = [("a0", "a6", 0.99), ("a0", "a1", 0.99), ("a1", "a2", 0.99)]
    fate: dict[str, str] = {}
    resolved, leaks = resolve_leaks(CLEAN, find_leaks(CLEAN, near), near, how, fate)
    assert {leak.first for leak in leaks} == {"a0", "a1", "a2"}
    assert find_leaks(resolved, near) == []
    if how == "drop":
        assert fate == dict.fromkeys(["a0", "a1", "a2"], "leak")
    else:
        splits = dict(
            zip(*(resolved[name].to_pylist() for name in (rows.IMAGE_ID, rows.SPLIT)), strict=True)
        )
        assert {splits[image_id] for image_id in ("a0", "a1", "a2", "a6")} == {"test"}
        assert splits["a3"] == "train"


def test_connected_pairs_are_reported_once() -> None:
    assert connected([(5, 2), (7, 8), (2, 9)]) == [[2, 5, 9], [7, 8]]
    assert connected([]) == []


def test_pictures_that_train_has_too_are_counted_once() -> None:
    # Three different test pictures; train has x twice, y nearly, and z not at all.
    digests = ["x", "x", "w", "x", "y", "z", "x"]
    splits = ["train", "train", "train", "test", "test", "test", "val"]
    seen = seen_in_train(digests, splits, [(2, 4), (0, 3), (4, 5)])
    assert (seen["test"].pictures, seen["test"].equal, seen["test"].near) == (3, 1, 1)
    assert (seen["val"].pictures, seen["val"].equal, seen["val"].near) == (1, 1, 0)
