"""Manifests: what a finished step leaves behind, written last and once.

A step is done while its manifest exists and the manifests of its inputs are the ones that it read.
A retrained model changes no key (nobody asked for something else) but its manifest has another
digest, and so everything that was computed from the old one is seen to be out of date.
"""

from __future__ import annotations

import json
from typing import Any

from engine.core.errors import StorageError
from engine.core.spec import Spec, digest
from engine.core.step import Step
from engine.core.store import Store


class Part(Spec):
    """One piece of data of a step: a Parquet file or another file, with the digest of its bytes."""

    key: str
    rows: int = 0
    bytes: int
    sha256: str
    # What the part holds, for readers that want some of it: split, class, role of a file.
    tags: dict[str, str] = {}


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
                "parts": sorted(part.sha256 for part in self.parts),
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
    """The manifest of a step, or None where it is not done. Raises `StorageError` on a foreign
    record."""
    key = store.manifest(step.kind, step.key)
    try:
        text = store.read(key)
    except FileNotFoundError:
        return None
    try:
        manifest = Manifest.model_validate(json.loads(text))
    except ValueError as error:
        raise StorageError(
            f"{store.location(key)} is no manifest of this engine; move it away and run again"
        ) from error
    if (manifest.kind, manifest.key) != (step.kind, step.key):
        raise StorageError(
            f"{store.location(key)} belongs to {manifest.kind} {manifest.key}; move it away and"
            " run again"
        )
    return manifest


def write_manifest(store: Store, manifest: Manifest) -> Manifest:
    """Put the manifest, unless another driver was first; returns the one that counts."""
    key = store.manifest(manifest.kind, manifest.key)
    data = json.dumps(manifest.model_dump(), indent=1, sort_keys=True).encode()
    if store.put_if_absent(key, data):
        return manifest
    return Manifest.model_validate(json.loads(store.read(key)))
