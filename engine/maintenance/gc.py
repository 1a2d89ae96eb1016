"""Garbage collection: removes files that no record of a storage names, such as data of attempts
that were killed or lost a race, data of discarded shards, temporary files and previews.

Only files older than any attempt are removed, so that data whose record is still to come stays. The
age is checked again right before a file is removed. Do not use a short age while a study runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.core.errors import StorageError
from engine.core.registry import resolve
from engine.core.store import Store
from engine.maintenance.inventory import Inventory, take_inventory

_RECORDS = ("/manifest.json", "/fingerprint.json", "/fingerprint.copy.json")
# Files directly below a step's prefix, such as a list of leaks, are for users.
_DEPTH_OF_PARTS = 4


@dataclass(frozen=True)
class Garbage:
    """Unused files: their keys and total bytes."""

    keys: tuple[str, ...]
    bytes: int


def find_garbage(store: Store, limit: float) -> Garbage:
    """Files that no record names and that were last written before `limit` (seconds since 1970).
    Raises `StorageError` if a record is damaged, because its files are unknown."""
    # Files before records: a file written in between is then either named or too young.
    times = {
        key: modified
        for prefix in ("steps", "generated", "work", "probe", "previews", "pages")
        for key, modified in store.modified_times(prefix).items()
    }
    inventory = take_inventory(store)
    if inventory.damaged:
        raise StorageError(
            f"{store.location(inventory.damaged[0])} is damaged, so its files cannot be told from"
            " garbage; run jobs/fsck.py --repair first"
        )
    scratch = _scratch(store, inventory)
    keys = sorted(
        key for key, modified in times.items()
        if modified < limit and _is_garbage(key, store.area(key), inventory, scratch)
    )  # fmt: skip
    total = 0
    for key in keys:
        try:
            total += store.size(key)
        except FileNotFoundError:
            continue  # removed since it was listed
    return Garbage(tuple(keys), total)


def remove(store: Store, limit: float) -> Garbage:
    """Remove the files of `find_garbage`, except those written again meanwhile."""
    garbage = find_garbage(store, limit)
    removed = tuple(key for key in garbage.keys if store.delete_if_older(key, limit))
    return Garbage(removed, garbage.bytes)


def _scratch(store: Store, inventory: Inventory) -> tuple[str, ...]:
    """Prefixes of the scratch data of finished steps."""
    prefixes = []
    for manifest in inventory.manifests.values():
        prefixes.append(f"{store.work(manifest.key)}/")
        for folder in resolve("steps", manifest.kind).scratch:
            prefixes.append(store.join(store.step(manifest.kind, manifest.key), folder) + "/")
    return tuple(prefixes)


def _is_garbage(key: str, area: str, inventory: Inventory, scratch: tuple[str, ...]) -> bool:
    if key.endswith(".tmp") or area in ("probe", "previews") or key.startswith(scratch):
        return True
    # Checkpoints of unfinished fits, logs of tunings, and pages: no record says what is needed.
    if area in ("work", "pages"):
        return False
    if key.endswith(_RECORDS) or "/commits/" in key:
        return False
    if area == "steps" and key.count("/") < _DEPTH_OF_PARTS:
        return False
    return key not in inventory.parts
