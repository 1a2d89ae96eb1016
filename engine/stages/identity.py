"""Are the user's files still those that were ingested?

Where files lie and when they changed is noted next to the manifest of ingest, not in it: manifests
depend on content alone. If the note differs, the files are read again and compared by their
digests: a copied or touched folder is the same data, another project's folder of the same name is
not.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from engine.core import rows
from engine.core.manifest import Manifest
from engine.core.progress import Bar
from engine.core.step import Step
from engine.core.store import Store
from engine.data.images import Rejected
from engine.readers import Reader, ReaderSpec

_THREADS = 16


def place_of(reader: Reader[ReaderSpec]) -> dict[str, str]:
    """The folder of a reader's files, and a digest of their names, sizes and times; empty if there
    are no files."""
    located = reader.located()
    if located is None:
        return {}
    source, names = located
    return {"root": source.root, "files": source.digest_of_states(names)}


def write_place(store: Store, step: Step, place: dict[str, str]) -> None:
    store.put(_key(store, step), json.dumps(place).encode())


def read_place(store: Store, step: Step) -> dict[str, str]:
    """The noted place of the files of an ingest step; empty if there is none."""
    try:
        return dict(json.loads(store.read(_key(store, step))))
    except (FileNotFoundError, ValueError):
        return {}


def changed_files(store: Store, manifest: Manifest, reader: Reader[ReaderSpec]) -> list[str]:
    """Uris of the ingested images whose files have other bytes now, or are not there."""
    records = pa.concat_tables(store.tables(manifest.keys(table="records")))
    uris, digests = (records[name].to_pylist() for name in (rows.URI, rows.FILE_SHA256))
    known = [(uri, digest) for uri, digest in zip(uris, digests, strict=True) if digest]
    source = reader.bytes()

    def digest_now(uri: str) -> str:
        try:
            return hashlib.sha256(source.read(uri)).hexdigest()
        except Rejected:
            return ""

    changed = []
    # Containers keep a file open, which threads must not share.
    threads = _THREADS if reader.file_per_image else 1
    with Bar("compare", len(known), "files") as bar, ThreadPoolExecutor(threads) as pool:
        digests_now = pool.map(digest_now, (uri for uri, _ in known))
        for (uri, digest), now in zip(known, digests_now, strict=True):
            if now != digest:
                changed.append(uri)
            bar.advance(1)
    return changed


def _key(store: Store, step: Step) -> str:
    return store.join(store.step(step.kind, step.key), "place.json")
