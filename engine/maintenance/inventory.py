"""All records of a storage, of all studies: manifests, commits, and the parts that they name.

`engine.maintenance.fsck` verifies these parts, and `engine.maintenance.gc` keeps them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.core.errors import DamageError
from engine.core.manifest import Manifest, Part, parse_manifest
from engine.core.shards import ShardSet
from engine.core.store import Store
from engine.results.comparison import ConfirmResult, SearchResult

_COMMITS, _CLAIM = "/commits/", "/fingerprint.json"


@dataclass(frozen=True)
class CommitRecord:
    """A valid commit: the prefix of its set, the shard, and the generation."""

    prefix: str
    shard: str
    generation: int


@dataclass
class Inventory:
    """The records of a storage at one time.

    manifests: by their key in the store. parts: all parts that records name, by key.
    named_by: keys of the manifests that name a part. committed_by: commits that name a part.
    damaged: keys of unreadable records. shard_sets: prefixes of all sets of shards.
    """

    manifests: dict[str, Manifest] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    named_by: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    committed_by: dict[str, list[CommitRecord]] = field(default_factory=lambda: defaultdict(list))
    damaged: list[str] = field(default_factory=list)
    shard_sets: list[str] = field(default_factory=list)

    def chosen_by(self, step_key: str) -> list[str]:
        """Keys of the manifests of steps that ran this one as a trial."""
        return [
            key for key, manifest in self.manifests.items()
            if step_key in trials_of(manifest)
        ]  # fmt: skip

    def dependents(self, manifest_keys: Iterable[str]) -> list[str]:
        """Labels of all steps that were computed from these, directly or indirectly."""
        readers: dict[str, list[str]] = defaultdict(list)
        for key, manifest in self.manifests.items():
            # The step that chose among trials records their digests outside its inputs.
            for digest in [*manifest.inputs.values(), *trials_of(manifest).values()]:
                readers[digest].append(key)
        reached: dict[str, None] = {}
        waiting = list(manifest_keys)
        while waiting:
            digest = self.manifests[waiting.pop()].digest
            for key in readers[digest]:
                if key not in reached:
                    reached[key] = None
                    waiting.append(key)
        return [self.manifests[key].label for key in reached]


def take_inventory(store: Store) -> Inventory:
    """Read every manifest and every valid commit."""
    keys = [*store.listing("steps"), *store.listing("generated"), *store.listing("work")]
    inventory = Inventory()
    for key in keys:
        if key.endswith("/manifest.json"):
            _read_manifest(store, key, inventory)
    committed = {key.partition(_COMMITS)[0] for key in keys if _COMMITS in key}
    claimed = {key.removesuffix(_CLAIM) for key in keys if key.endswith(_CLAIM)}
    inventory.shard_sets = sorted(committed | claimed)
    for prefix in inventory.shard_sets:
        shards = ShardSet(store, prefix)
        for name, generation in shards.committed().items():
            try:
                commit = shards.read(name, generation)
            except FileNotFoundError:
                continue  # removed since it was listed
            except DamageError as error:
                inventory.damaged.append(error.key)
                continue
            if commit.data is not None:
                record = CommitRecord(prefix, name, generation)
                inventory.parts[commit.data.key] = commit.data
                inventory.committed_by[commit.data.key].append(record)
    return inventory


def _read_manifest(store: Store, key: str, inventory: Inventory) -> None:
    try:
        manifest = parse_manifest(store, key, store.read(key))
    except FileNotFoundError:
        return
    except DamageError:
        inventory.damaged.append(key)
        return
    inventory.manifests[key] = manifest
    for part in manifest.parts:
        inventory.parts[part.key] = part
        inventory.named_by[part.key].append(key)


def trials_of(manifest: Manifest) -> dict[str, str]:
    """Digests of the trials that a step ran, by key of the trial."""
    for result in (SearchResult, ConfirmResult):
        if manifest.kind == result.kind:
            return result.of(manifest).trials
    return {}
