"""Remove what no record of a storage names: data of attempts that were killed or lost a race, of
shards that were thrown away, temporary files, previews.

Only what has not been written for longer than any attempt takes is removed, so that data whose
record is still to come stays. The age is checked again right before a file is removed; do not run
it with a short time while a study runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.core.errors import StorageError
from engine.core.registry import resolve
from engine.core.store import Store
from engine.maintenance.inventory import Inventory, take_inventory

_RECORDS = ("/manifest.json", "/fingerprint.json", "/fingerprint.copy.json")
# Files right below a step's prefix, such as a list of leaks, are for people.
_DEPTH_OF_PARTS = 4


@dataclass(frozen=True)
class Garbage:
    """What may go: keys, and their bytes in all."""

    keys: tuple[str, ...]
    bytes: int


def find_garbage(store: Store, limit: float) -> Garbage:
    """What no record names and nothing has written since `limit`, in seconds since 1970. Raises
    `StorageError` where a record is damaged: nobody knows what it names."""
    # Files first: what is written between the two is then either named or too young.
    ages = {
        key: modified
        for prefix in ("steps", "generated", "work", "probe", "previews", "pages")
        for key, modified in store.modified_times(prefix).items()
    }
    inventory = take_inventory(store)
    if inventory.damaged:
        raise StorageError(
            f"{store.location(inventory.damaged[0])} is damaged, so that what it names would be"
            " removed: run jobs/fsck.py --repair first"
        )
    scratch = _scratch(store, inventory)
    found = [
        key for key, changed in ages.items()
        if changed < limit and _is_garbage(key, store.area(key), inventory, scratch)
    ]  # fmt: skip
    sizes = 0
    for key in found:
        try:
            sizes += store.size(key)
        except FileNotFoundError:
            continue  # removed since it was listed
    return Garbage(tuple(sorted(found)), sizes)


def remove(store: Store, limit: float) -> Garbage:
    """Remove what `find_garbage` finds, and nothing has written since it was found."""
    found = find_garbage(store, limit)
    removed = tuple(key for key in found.keys if store.delete_if_older(key, limit))
    return Garbage(removed, found.bytes)


def _scratch(store: Store, inventory: Inventory) -> tuple[str, ...]:
    """Prefixes of what only running steps need, of steps that are done."""
    prefixes = []
    for manifest in inventory.manifests.values():
        prefixes.append(f"{store.work(manifest.key)}/")
        for folder in resolve("steps", manifest.kind).scratch:
            prefixes.append(store.join(store.step(manifest.kind, manifest.key), folder) + "/")
    return tuple(prefixes)


def _is_garbage(key: str, area: str, inventory: Inventory, scratch: tuple[str, ...]) -> bool:
    if key.endswith(".tmp") or area in ("probe", "previews") or key.startswith(scratch):
        return True
    # Checkpoints of fits that have not ended, notes of tunings, pages: what is needed is not known.
    if area in ("work", "pages"):
        return False
    if key.endswith(_RECORDS) or "/commits/" in key:
        return False
    if area == "steps" and key.count("/") < _DEPTH_OF_PARTS:
        return False
    return key not in inventory.parts
