"""Openings of test, recorded under the digest of the test ids and counted over all studies of a
storage."""

from __future__ import annotations

import pyarrow as pa

from engine.core import rows
from engine.core.spec import digest
from engine.core.store import Store


def record_opening(store: Store, test: pa.Table, opener: str) -> int:
    """Record an opening of test; returns the number of openings in this storage.

    A run that resumes does not count again; other classifiers of the same study do.
    """
    prefix = store.openings(digest(sorted(test[rows.IMAGE_ID].to_pylist())))
    store.put_if_absent(store.join(prefix, f"{opener}.json"), b"{}")
    return len([key for key in store.listing(prefix) if key.endswith(".json")])
