"""Compares two storages of the same study, which must be equal whatever happened to either."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.core.manifest import Manifest, parse_manifest
from engine.core.store import Store


def manifests(store: Store) -> dict[str, Manifest]:
    """All manifests of a storage by their key in the store."""
    return {
        key: parse_manifest(store, key, store.read(key))
        for key in store.listing("steps")
        if key.endswith("/manifest.json")
    }


def differences(one: Store, other: Store) -> Iterator[str]:
    """A line for each manifest that differs: in its digest, the order of its metrics, or its
    parts."""
    first, second = manifests(one), manifests(other)
    for key in sorted(first.keys() ^ second.keys()):
        yield f"{key}: only in {one.url if key in first else other.url}"
    for key in sorted(first.keys() & second.keys()):
        a, b = first[key], second[key]
        if a.digest != b.digest:
            yield f"{a.label}: digest {a.digest}, {b.digest}"
            yield from (f"  metrics.{text}" for text in _changed(a.metrics, b.metrics))
        elif _in_order(a.metrics) != _in_order(b.metrics):
            yield f"{a.label}: order of metrics"
        keys = [{part.key for part in manifest.parts if not part.timed} for manifest in (a, b)]
        yield from (f"{a.label}: part {key}" for key in sorted(keys[0] ^ keys[1]))


def _in_order(value: Any) -> str:
    return json.dumps(value)


def _changed(one: dict[str, Any], other: dict[str, Any]) -> Iterator[str]:
    for name in sorted(one.keys() | other.keys()):
        if one.get(name) != other.get(name):
            yield f"{name}: {str(one.get(name))[:120]} | {str(other.get(name))[:120]}"


def flip_bit(store: Store, key: str, dice: random.Random) -> None:
    """Change one bit of a file of a local storage, in place."""
    path = Path(store.location(key))
    data = bytearray(path.read_bytes())
    place = dice.randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
