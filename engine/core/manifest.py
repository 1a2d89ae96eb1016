"""Manifests: what a finished step leaves behind, written last and once.

A step is done while its manifest exists and the manifests of its inputs are the ones that it read.
A retrained model changes no key (nobody asked for something else) but its manifest has another
digest, and so everything that was computed from the old one is seen to be out of date.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.core.errors import DamageError, StorageError
from engine.core.sealed import seal, unseal
from engine.core.spec import Spec, digest
from engine.core.step import Step
from engine.core.store import Data, Store


class Part(Spec):
    """One piece of data of a step: a Parquet file or another file, with the digest of its bytes.

    Its key contains the digest too, so that whatever reads it by its key compares it
    (`engine.core.store`).
    """

    key: str
    rows: int = 0
    bytes: int
    sha256: str
    # Whether it contains times or hosts of the run; excluded from the digest of the result.
    timed: bool = False
    # What the part holds, for readers that want some of it: split, class, role of a file.
    tags: dict[str, str] = {}


def write_part(
    store: Store,
    folder: str,
    name: str,
    suffix: str,
    data: Data,
    *,
    rows: int = 0,
    timed: bool = False,
    tags: Mapping[str, str] | None = None,
) -> Part:
    """Store data as a part below `folder`."""
    key, sha256 = store.put_part(folder, name, suffix, data)
    return Part(
        key=key, rows=rows, bytes=memoryview(data).nbytes, sha256=sha256, timed=timed,
        tags=dict(tags or {}),
    )  # fmt: skip


def copy_files(store: Store, parts: Iterable[Part], folder: Path) -> Path:
    """Copy parts to a local folder, under the relative paths of their tag `file`; returns the
    folder."""
    for part in parts:
        target = folder / part.tags["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(store.read(part.key))
    return folder


class Manifest(Spec):
    """`metrics` are figures of the result and part of its identity; `provenance` (times, versions,
    hosts) is not."""

    kind: str
    key: str
    label: str
    spec: dict[str, Any]
    inputs: dict[str, str]
    parts: tuple[Part, ...]
    rows: int
    metrics: dict[str, Any]
    provenance: dict[str, Any]

    @property
    def digest(self) -> str:
        """Identity of the result: key and content, without times, versions and names of files."""
        return digest(
            {
                "key": self.key,
                "inputs": self.inputs,
                "parts": sorted(part.sha256 for part in self.parts if not part.timed),
                "metrics": self.metrics,
            }
        )

    def keys(self, **tags: str) -> list[str]:
        """Keys of the parts that bear all these tags, in order."""
        return [
            part.key
            for part in self.parts
            if all(part.tags.get(name) == value for name, value in tags.items())
        ]


def read_manifest(store: Store, step: Step) -> Manifest | None:
    """The manifest of a step, or None where it is not done. Raises `DamageError` on a record that
    has changed, `StorageError` on another step's."""
    key = store.manifest(step.kind, step.key)
    try:
        data = store.read(key)
    except FileNotFoundError:
        return None
    manifest = parse_manifest(store, key, data)
    if (manifest.kind, manifest.key) != (step.kind, step.key):
        raise StorageError(
            f"{store.location(key)} belongs to {manifest.kind} {manifest.key}; move it away and"
            " run again"
        )
    return manifest


def parse_manifest(store: Store, key: str, data: bytes) -> Manifest:
    """The manifest in the bytes stored at `key`. Raises `DamageError`."""
    try:
        return Manifest.model_validate(unseal(data))
    except ValueError as error:
        raise DamageError(
            f"{store.location(key)} is damaged or not a manifest of this version", key
        ) from error


def write_manifest(store: Store, manifest: Manifest) -> Manifest:
    """Put the manifest, unless another driver was first; returns the one that counts.

    It is returned as it was stored, so that a run that goes on with it sees what any later run
    reads: the same types, in the same order.
    """
    key = store.manifest(manifest.kind, manifest.key)
    data = seal(manifest.model_dump(), indent=1)
    if not store.put_if_absent(key, data):
        data = store.read(key)
    return parse_manifest(store, key, data)
