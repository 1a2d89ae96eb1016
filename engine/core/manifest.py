"""Manifests: the records of finished steps, each written once, after all data of the step.

A step is done while its manifest exists and its inputs still have the manifests that it read. A
retrained model keeps its key, because the request is the same, but its manifest has a new digest.
Everything computed from the old one is therefore out of date.
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
    """One file of a step, Parquet or other, with the digest of its bytes.

    The key contains the digest too, so that every read by key verifies it (`engine.core.store`).
    """

    key: str
    rows: int = 0
    bytes: int
    sha256: str
    # Whether it contains times or hosts of the run; such parts are not in the manifest's digest.
    timed: bool = False
    # Contents of the part, for readers of a subset: split, class, role of a file.
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
    """Copy parts to a local folder, under the relative paths in their tag `file`; returns the
    folder."""
    for part in parts:
        target = folder / part.tags["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(store.read(part.key))
    return folder


class Manifest(Spec):
    """`metrics` are part of the result's identity; `provenance` (times, versions, hosts) is not."""

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
        """Identity of the result: key and content, without times, versions and file names."""
        return digest(
            {
                "key": self.key,
                "inputs": self.inputs,
                "parts": sorted(part.sha256 for part in self.parts if not part.timed),
                "metrics": self.metrics,
            }
        )

    def keys(self, **tags: str) -> list[str]:
        """Keys of the parts that have all these tags, in order."""
        return [
            part.key
            for part in self.parts
            if all(part.tags.get(name) == value for name, value in tags.items())
        ]


def read_manifest(store: Store, step: Step) -> Manifest | None:
    """The manifest of a step, or None if there is none. Raises `DamageError` on a damaged record,
    `StorageError` on the record of another step."""
    key = store.manifest(step.kind, step.key)
    try:
        data = store.read(key)
    except FileNotFoundError:
        return None
    manifest = parse_manifest(store, key, data)
    if (manifest.kind, manifest.key) != (step.kind, step.key):
        raise StorageError(
            f"{store.location(key)} is the manifest of another step, {manifest.kind}"
            f" {manifest.key}; remove it and run again"
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
    """Store the manifest unless another driver was first; returns the stored one.

    The result is parsed from the stored bytes, so that this run sees the same types in the same
    order as any later run.
    """
    key = store.manifest(manifest.kind, manifest.key)
    data = seal(manifest.model_dump(), indent=1)
    if not store.put_if_absent(key, data):
        data = store.read(key)
    return parse_manifest(store, key, data)
