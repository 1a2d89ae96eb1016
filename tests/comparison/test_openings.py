"""Openings of test: pictures are counted, whatever their files are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.comparison.openings import record_opening
from engine.core import rows
from engine.core.manifest import Manifest, write_part
from engine.core.spec import digest
from engine.core.store import Store

Ingest = Callable[[Mapping[str, Sequence[str]]], Manifest]


@pytest.fixture
def ingested(store: Store) -> Ingest:
    """A function that stores splits, given as the pictures of each, and returns their manifest.
    Ids never repeat, as if the files were renamed each time."""
    count = 0

    def make(splits: Mapping[str, Sequence[str]]) -> Manifest:
        nonlocal count
        parts = []
        for split, pictures in splits.items():
            ids = [f"{count + number}" for number in range(len(pictures))]
            count += len(pictures)
            table = pa.table(
                {rows.IMAGE_ID: ids, rows.GROUP_ID: ids, rows.PIXEL_SHA256: list(pictures)}
            )
            sink = pa.BufferOutputStream()
            pq.write_table(table, sink)
            data = sink.getvalue()
            parts.append(write_part(store, "data", split, "parquet", data, tags={"split": split}))
        return Manifest(
            kind="ingest", key="0" * 16, label="ingest", spec={}, inputs={}, parts=tuple(parts),
            rows=count, metrics={}, provenance={},
        )  # fmt: skip

    return make


def test_a_first_opening_sees_new_pictures(store: Store, ingested: Ingest) -> None:
    test = record_opening(store, ingested({"train": "abc", "val": "d", "test": "efg"}), "first")
    assert (test.images, test.groups, test.opened) == (3, 3, 1)
    assert (test.opened_before, test.learnt_now) == (0, 0)


def test_renamed_files_and_one_image_fewer_are_no_new_test_set(
    store: Store, ingested: Ingest
) -> None:
    record_opening(store, ingested({"train": "abc", "test": "efgh"}), "first")
    test = record_opening(store, ingested({"train": "abc", "test": "efg"}), "second")
    assert (test.opened, test.opened_before) == (2, 3)
    # Other pictures were opened by nobody.
    other = record_opening(store, ingested({"train": "abc", "test": "xyz"}), "third")
    assert (other.opened, other.opened_before) == (1, 0)
    some = record_opening(store, ingested({"train": "abc", "test": "gxw"}), "fourth")
    assert (some.opened, some.opened_before) == (4, 2)


def test_a_rerun_of_the_same_study_is_not_counted(store: Store, ingested: Ingest) -> None:
    for _ in range(2):
        test = record_opening(store, ingested({"train": "abc", "test": "efg"}), "first")
        assert (test.opened, test.opened_before) == (1, 0)


def test_pictures_that_were_test_and_are_train_now_are_counted(
    store: Store, ingested: Ingest
) -> None:
    record_opening(store, ingested({"train": "abcd", "test": "efg"}), "first")
    # Another seed of the split.
    test = record_opening(store, ingested({"train": "aefg", "val": "b", "test": "cd"}), "second")
    assert (test.opened, test.opened_before, test.learnt_now) == (1, 0, 3)


def test_openings_recorded_by_earlier_versions_count(store: Store, ingested: Ingest) -> None:
    ingest = ingested({"train": "abc", "test": "efg"})
    ids = sorted(pq.read_table(pa.BufferReader(store.read(ingest.keys(split="test")[0])))
                 [rows.IMAGE_ID].to_pylist())  # fmt: skip
    for opener in ("older", "first"):
        store.put(f"openings/{digest(ids)}/{opener}.json", b"{}")
    test = record_opening(store, ingest, "first")
    assert (test.opened, test.opened_before) == (2, 3)
