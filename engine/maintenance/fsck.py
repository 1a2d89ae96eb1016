"""Verify a storage: every manifest, commit, part, fingerprint and checkpoint, byte by byte.

A study may run meanwhile: a record may be replaced while its parts are read, so it is read again
before damage is reported.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.core.errors import DamageError, StorageError
from engine.core.manifest import Part, parse_manifest
from engine.core.progress import Bar
from engine.core.sealed import is_sealed, unseal
from engine.core.shards import ShardSet
from engine.core.store import Store
from engine.maintenance.inventory import Inventory, take_inventory
from engine.work.fit import checkpoint_problem, checkpoint_records

_THREADS = 4
FOREIGN = "is not a record of this version"


@dataclass(frozen=True)
class Fault:
    """A damaged or missing file. writers: labels of the steps that wrote it. dependents: labels of
    the steps computed from it."""

    key: str
    problem: str
    writers: tuple[str, ...] = ()
    dependents: tuple[str, ...] = ()

    def line(self) -> str:
        """The fault in one line."""
        text = f"{self.key}: {self.problem}"
        if self.writers:
            text += f"; written by {', '.join(self.writers)}"
        return f"{text}; used by {', '.join(self.dependents)}" if self.dependents else text


@dataclass(frozen=True)
class Report:
    """The result of a verification. records, parts, bytes: amounts verified."""

    records: int
    parts: int
    bytes: int
    faults: tuple[Fault, ...]


def verify(store: Store, *, interval: float = 10.0) -> Report:
    """Read everything that the records of a storage name and compare it with its digests."""
    inventory = take_inventory(store)
    faults = [Fault(key, _record_problem(store, key)) for key in inventory.damaged]
    parts = list(inventory.parts.values())
    size = sum(part.bytes for part in parts)
    with (
        Bar("fsck", size, "bytes", interval=interval) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        for part, problem in zip(parts, pool.map(lambda p: _problem(store, p), parts), strict=True):
            bar.advance(part.bytes)
            if problem and _still_named(store, inventory, part.key):
                faults.append(_part_fault(inventory, part.key, problem))
    faults += _bad_fingerprints(store, inventory)
    for key in checkpoint_records(store, "work"):
        if problem := checkpoint_problem(store, key):
            faults.append(Fault(key, problem))
    records = len(inventory.manifests) + sum(map(len, inventory.committed_by.values()))
    return Report(records + len(inventory.damaged), len(parts), size, tuple(faults))


def repair(store: Store, faults: tuple[Fault, ...]) -> int:
    """Discard exactly the damaged data, so that the next run of the study computes it again;
    returns the number of faults that were still there. Raises `StorageError` on records of another
    version.

    A part is discarded with the commits and manifests that name it. Steps computed from it stay,
    and remain valid if the part is computed again with the same bytes.
    """
    if foreign := [fault.key for fault in faults if fault.problem == FOREIGN]:
        raise StorageError(
            f"{store.location(foreign[0])} and {len(foreign) - 1} more records are from another"
            " version of the engine; use that version, or another storage"
        )
    inventory = take_inventory(store)
    sets = [ShardSet(store, prefix) for prefix in inventory.shard_sets]
    fingerprints = {shards.fingerprint_key: shards for shards in sets}
    commits = {
        shards.commit_key(name, generation): (shards, name, generation)
        for shards in sets for name, generation in shards.committed().items()
    }  # fmt: skip
    repaired = 0
    for fault in faults:
        key = fault.key
        if key in inventory.parts:
            # A running study may have repaired it meanwhile.
            if not _problem(store, inventory.parts[key]):
                continue
            store.delete(key)
            for writer in inventory.named_by[key]:
                _discard_manifest(store, inventory, writer)
            for commit in inventory.committed_by[key]:
                ShardSet(store, commit.prefix).void(commit.shard, commit.generation)
        elif key in fingerprints:
            if not fingerprints[key].restore_fingerprint():
                fingerprints[key].discard()
        elif key in commits and key in inventory.damaged:
            shards, name, generation = commits[key]
            shards.void(name, generation)
        elif key in inventory.damaged:
            _discard_manifest(store, inventory, key)
        elif store.area(key) == "work" and checkpoint_problem(store, key):
            store.delete(key)
        else:
            continue
        repaired += 1
    return repaired


def _discard_manifest(store: Store, inventory: Inventory, key: str) -> None:
    """Discard the manifest of a step and the manifests of steps that chose by its result."""
    store.delete(key)
    for chooser in inventory.chosen_by(store.step_key(key)):
        store.delete(chooser)


def _problem(store: Store, part: Part) -> str:
    """The problem of a part's bytes; empty if they are intact."""
    try:
        sha256 = store.sha256(part.key)
    except (FileNotFoundError, DamageError):
        return "is missing"
    return "" if sha256 == part.sha256 else "does not match its digest"


def _still_named(store: Store, inventory: Inventory, key: str) -> bool:
    """Whether a record that named a part in the inventory still does."""
    for manifest_key in inventory.named_by[key]:
        try:
            manifest = parse_manifest(store, manifest_key, store.read(manifest_key))
        except (FileNotFoundError, DamageError):
            continue
        if any(part.key == key for part in manifest.parts):
            return True
    return any(
        ShardSet(store, record.prefix).committed().get(record.shard) == record.generation
        for record in inventory.committed_by[key]
    )


def _part_fault(inventory: Inventory, key: str, problem: str) -> Fault:
    writers = inventory.named_by[key]
    labels = [inventory.manifests[writer].label for writer in writers]
    # A step that has not finished has no manifest yet.
    labels = labels or [f"shard {record.shard}" for record in inventory.committed_by[key]]
    return Fault(key, problem, tuple(labels), tuple(inventory.dependents(writers)))


def _bad_fingerprints(store: Store, inventory: Inventory) -> Iterator[Fault]:
    for prefix in inventory.shard_sets:
        key = ShardSet(store, prefix).fingerprint_key
        try:
            unseal(store.read(key))
        except FileNotFoundError:
            continue
        except ValueError:
            yield Fault(key, _record_problem(store, key))


def _record_problem(store: Store, key: str) -> str:
    try:
        return "is damaged" if is_sealed(store.read(key)) else FOREIGN
    except FileNotFoundError:
        return "is missing"
