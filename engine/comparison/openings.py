"""Openings of test: each is recorded under the digest of the test ids, whatever study did it, and
counted over all studies of a storage."""

from __future__ import annotations

import pyarrow as pa

from engine.core import rows
from engine.core.spec import digest
from engine.core.store import Store


def record_opening(store: Store, test: pa.Table, opener: str) -> int:
    """Note that test was opened, and say how often it has been in this storage.

    A run that goes on after a kill opens it no second time; one for other classifiers does, though
    the study be the same.
    """
    prefix = store.openings(digest(sorted(test[rows.IMAGE_ID].to_pylist())))
    store.put_if_absent(store.join(prefix, f"{opener}.json"), b"{}")
    return len([key for key in store.listing(prefix) if key.endswith(".json")])
