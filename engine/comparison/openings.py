"""Openings of test: which pictures a study has evaluated, compared over all studies of a storage.

A picture is known by the digest of its pixels: a new seed, another file name or one image fewer
does not make a test set unseen.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.spec import digest
from engine.core.store import Store
from engine.results.comparison import OpenedTest

_SCHEMA = pa.schema([pa.field(rows.PIXEL_SHA256, pa.string())])


def record_opening(store: Store, ingest: Manifest, opener: str) -> OpenedTest:
    """Record that `opener` evaluates the test images, and compare them with all other openings of
    the storage. A run that resumes is the same opener; other classifiers of a study are another.
    """
    test = _pictures(store, ingest, "test")
    _write(store, opener, test)
    studies, before, earlier = 1, set[str](), set[str]()
    for key in store.listing(store.openings()):
        if key == store.opening(opener) or not key.endswith(".parquet"):
            continue
        opened = set(pa.concat_tables(store.tables([key]))[rows.PIXEL_SHA256].to_pylist())
        earlier |= opened
        if shared := opened & set(test):
            studies, before = studies + 1, before | shared
    if older := _recorded_by_id(store, ingest, opener):
        studies, before = studies + older, set(test)
    learning = [*_pictures(store, ingest, "train"), *_pictures(store, ingest, "val")]
    groups = _column(store, ingest, "test", rows.GROUP_ID)
    return OpenedTest(
        images=len(groups), groups=len(pc.unique(groups)), opened=studies,
        opened_before=sum(picture in before for picture in test),
        learnt_now=sum(picture in earlier for picture in learning),
    )  # fmt: skip


def _write(store: Store, opener: str, pictures: list[str]) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table([pa.array(sorted(pictures), pa.string())], schema=_SCHEMA), sink)
    store.put_if_absent(store.opening(opener), sink.getvalue())


def _column(store: Store, ingest: Manifest, split: str, name: str) -> pa.ChunkedArray:
    keys = ingest.keys(split=split)
    return pa.concat_tables(store.tables(keys, [name]))[name] if keys else pa.chunked_array([[]])


def _pictures(store: Store, ingest: Manifest, split: str) -> list[str]:
    """The pixel digests of a split's images."""
    return list(_column(store, ingest, split, rows.PIXEL_SHA256).to_pylist())


def _recorded_by_id(store: Store, ingest: Manifest, opener: str) -> int:
    """Openings of exactly these ids by other studies, as earlier versions recorded them."""
    ids = _column(store, ingest, "test", rows.IMAGE_ID).to_pylist()
    prefix = store.join(store.openings(), digest(sorted(ids)))
    keys = [key for key in store.listing(prefix) if key.endswith(".json")]
    return len([key for key in keys if key != store.join(prefix, f"{opener}.json")])
