"""Shards: the unit of work and of commit.

The plan divides the rows into shards of fixed membership. A worker computes a shard, writes its
data under a name that contains the data's digest, and commits with one put-if-absent of a small
record. The first record counts. Readers trust only commit records, and a restart runs the plan
minus the commits. A kill at any moment therefore loses at most the shards in flight, and nothing is
stored twice.

    <prefix>/fingerprint.json               settings, code and weights that all shards share (put if
                                            absent)
    <prefix>/fingerprint.copy.json          a copy of it
    <prefix>/commits/<name>.<n>.json        the commit of generation n: data, and one entry for each
                                            planned id
    <prefix>/commits/<name>.<n>.tombstone   generation n is void; the next one is n + 1
    <prefix>/parts/<name>.<digest>.parquet  data
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from engine.core import rows
from engine.core.errors import DamageError, ResumeError, StorageError
from engine.core.manifest import Part, write_part
from engine.core.sealed import seal, unseal
from engine.core.store import Store

OK = "ok"


def reason_of(status: str) -> str:
    """The reason of a row without a result, for counting: its status without the details after the
    colon."""
    return status.partition(":")[0]


_FORMAT = 1
_ROW_DIGEST = 32


@dataclass(frozen=True)
class Shard:
    """A planned shard. name: unique in its set and safe in a file name. task: where its rows come
    from (JSON)."""

    name: str
    rows: int
    task: dict[str, Any]
    tags: dict[str, str]

    def to_json(self) -> str:
        return json.dumps(
            {"name": self.name, "rows": self.rows, "task": self.task, "tags": self.tags}
        )

    @classmethod
    def from_json(cls, text: str) -> Shard:
        return cls(**json.loads(text))


def ids_digest(ids: Iterable[str]) -> str:
    """Digest of an ordered list of ids, which fixes the membership of a shard."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Commit:
    """A valid commit record. `image_id`, `status` and `sha256` have an entry for each planned row.

    status: `ok` or the reason for quarantine. data: None if no row is `ok`.
    """

    shard: str
    data: Part | None
    image_id: tuple[str, ...]
    status: tuple[str, ...]
    sha256: tuple[str, ...]
    provenance: dict[str, Any]

    @property
    def kept(self) -> int:
        return sum(status == OK for status in self.status)


class ShardSet:
    """The shards under one prefix of a store. Picklable."""

    def __init__(self, store: Store, prefix: str) -> None:
        self.store, self.prefix = store, prefix

    @property
    def fingerprint_key(self) -> str:
        return self.store.join(self.prefix, "fingerprint.json")

    @property
    def fingerprint_copy_key(self) -> str:
        """The copy exists because all shards of the set are lost without a fingerprint."""
        return self.store.join(self.prefix, "fingerprint.copy.json")

    def fingerprint(self) -> dict[str, Any]:
        """The fingerprint that the set is bound to, from the record or its copy; empty if the set
        is not bound yet. Raises `DamageError`."""
        for key in (self.fingerprint_key, self.fingerprint_copy_key):
            try:
                return unseal(self.store.read(key))
            except FileNotFoundError:
                if key == self.fingerprint_key:
                    return {}
            except ValueError:
                continue
        key = self.fingerprint_key
        raise DamageError(
            f"{self.store.location(key)} is damaged or not a fingerprint of this version", key
        )

    def restore_fingerprint(self) -> bool:
        """Replace a damaged record with its copy; returns whether the copy is intact."""
        try:
            data = self.store.read(self.fingerprint_copy_key)
            unseal(data)
        except (FileNotFoundError, ValueError):
            return False
        self.store.put(self.fingerprint_key, data)
        return True

    def claim(self, fingerprint: Mapping[str, Any], discard: str, *, replace: bool = False) -> None:
        """Bind the set to a fingerprint. Raises `ResumeError`, which names every difference from
        the stored one.

        discard: the option that discards the stored shards, for the error. replace: discard them
        instead of raising.
        """
        data = seal(dict(sorted(fingerprint.items())), indent=1)
        if self.store.put_if_absent(self.fingerprint_key, data):
            self.store.put(self.fingerprint_copy_key, data)
            return
        # Compare as read back: in JSON a tuple is a list.
        fingerprint, stored = unseal(data), self.fingerprint()
        changed = [
            f"{name} was {stored.get(name)!r}, is {fingerprint.get(name)!r}"
            for name in sorted({*stored, *fingerprint})
            if stored.get(name) != fingerprint.get(name)
        ]
        if changed and replace:
            self.discard()
            self.claim(fingerprint, discard)
        elif changed:
            raise ResumeError(
                f"{self.store.location(self.prefix)} holds shards of other settings:"
                f" {'; '.join(changed)}; restore these values, or discard the shards with {discard}"
            )

    def committed(self) -> dict[str, int]:
        """Names of the shards with a valid commit, and its generation. Costs one listing."""
        commits: dict[str, int] = {}
        void: set[tuple[str, int]] = set()
        start = len(self.prefix) + len("/commits/")
        for key in self.store.listing(self.store.join(self.prefix, "commits")):
            name, _, rest = key[start:].rpartition(".")
            name, _, generation = name.rpartition(".")
            if not generation.isdigit():
                continue  # a temporary file left by a kill
            if rest == "tombstone":
                void.add((name, int(generation)))
            elif rest == "json":
                commits[name] = max(commits.get(name, 0), int(generation))
        return {name: number for name, number in commits.items() if (name, number) not in void}

    def find_commit(self, name: str) -> Commit | None:
        """The valid commit of one shard, or None. Needs no listing."""
        try:
            return self.read(name, self._next_generation(name))
        except FileNotFoundError:
            return None

    def read(self, name: str, generation: int) -> Commit:
        """Read and check one commit record. Raises `DamageError` on a foreign or damaged record."""
        key = self.commit_key(name, generation)
        try:
            record = unseal(self.store.read(key))
            if record["format"] != _FORMAT or record["shard"] != name:
                raise ValueError("it belongs to another shard or version")
            columns = record["rows"]
            return Commit(
                shard=name,
                data=Part.model_validate(record["data"]) if record["data"] else None,
                image_id=tuple(columns[rows.IMAGE_ID]),
                # Interned, because a few distinct words repeat for every row.
                status=tuple(map(sys.intern, columns[rows.STATUS])),
                sha256=tuple(columns["sha256"]),
                provenance=record["provenance"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DamageError(
                f"{self.store.location(key)} is damaged or not a commit of this version ({error})",
                key,
            ) from error

    def commit(
        self, shard: Shard, table: pa.Table, status: Sequence[str], provenance: dict[str, Any]
    ) -> bool:
        """Write the rows of a shard and commit them; returns False if another attempt was first.

        table: every planned row in order. Only rows whose status is `ok` are stored.
        """
        generation = self._next_generation(shard.name)
        mask = [entry == OK for entry in status]
        kept = table if all(mask) else table.filter(pa.array(mask))
        hashes = _row_digests(table)
        part = None
        if kept.num_rows:
            sink = pa.BufferOutputStream()
            pq.write_table(
                kept, sink, compression="none" if rows.IMAGE in table.column_names else "zstd"
            )
            part = write_part(
                self.store, self.store.parts(self.prefix), shard.name, "parquet", sink.getvalue(),
                rows=kept.num_rows, tags=shard.tags,
            )  # fmt: skip
        body = {
            "format": _FORMAT,
            "shard": shard.name,
            "data": part.model_dump() if part else None,
            "rows": {
                rows.IMAGE_ID: table[rows.IMAGE_ID].to_pylist(),
                rows.STATUS: list(status),
                "sha256": hashes,
            },
            "provenance": provenance,
        }
        # The loser's data stays: if the bytes are equal it is the winner's data too, and otherwise
        # `jobs/gc.py` removes it.
        return self.store.put_if_absent(self.commit_key(shard.name, generation), seal(body))

    def discard(self, names: Iterable[str] | None = None) -> int:
        """Void the commits of these shards, or of all shards and the fingerprint too; returns the
        number of commits."""
        committed = self.committed()
        chosen = set(committed) if names is None else set(names) & set(committed)
        for name in chosen:
            self.void(name, committed[name])
        if names is None:
            self.store.delete(self.fingerprint_key)
            self.store.delete(self.fingerprint_copy_key)
        return len(chosen)

    def void(self, name: str, generation: int) -> None:
        """Void one commit. The shard is computed again as the next generation."""
        tombstone = self.commit_key(name, generation).removesuffix("json") + "tombstone"
        self.store.put_if_absent(tombstone, b"")

    def parts(self) -> set[str]:
        """Keys of all parts, also of those that no commit names."""
        return set(self.store.listing(self.store.parts(self.prefix)))

    def remove(self, keys: Collection[str]) -> None:
        """Delete these parts, and void the commits that name them."""
        self.discard(
            name
            for name, generation in (self.committed().items() if keys else ())
            if (data := self.read(name, generation).data) and data.key in keys
        )
        for key in keys:
            self.store.delete(key)

    def collect(self, shards: Sequence[Shard]) -> list[Commit]:
        """The commits of a whole plan, in its order. Raises `StorageError` unless every planned row
        is present once."""
        committed = self.committed()
        missing = [shard.name for shard in shards if shard.name not in committed]
        if missing:
            raise StorageError(
                f"{self.store.location(self.prefix)}: {len(missing)} of {len(shards)} shards have"
                f" no commit (first: {missing[0]}); run again to compute them"
            )
        commits = [self.read(shard.name, committed[shard.name]) for shard in shards]
        for shard, commit in zip(shards, commits, strict=True):
            planned = shard.task.get("ids_digest")
            if len(commit.image_id) != shard.rows or (
                planned and ids_digest(commit.image_id) != planned
            ):
                raise StorageError(
                    f"{self.store.location(self.prefix)}: shard {shard.name} holds other rows than"
                    " planned; discard the step with --discard"
                )
        return commits

    def _next_generation(self, name: str) -> int:
        prefix = self.store.join(self.prefix, "commits")
        generation = 0
        while self.store.exists(f"{prefix}/{name}.{generation}.tombstone"):
            generation += 1
        return generation

    def commit_key(self, name: str, generation: int) -> str:
        return self.store.join(self.prefix, "commits", f"{name}.{generation}.json")


def _row_digests(table: pa.Table) -> list[str]:
    """SHA-256 of the encoded bytes of each image; empty if there is no image."""
    if rows.IMAGE not in table.column_names:
        return [""] * table.num_rows
    encoded = pc.struct_field(table[rows.IMAGE], "bytes").to_pylist()
    return [
        "" if data is None else hashlib.sha256(data).hexdigest()[:_ROW_DIGEST] for data in encoded
    ]


def column(values: Any, kind: pa.DataType) -> pa.Array:
    """One column of a batch as an Arrow array of type `kind`. An array (n, width) becomes
    fixed-size lists."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values if values.type == kind else values.cast(kind)
    if isinstance(values, np.ndarray) and values.ndim == 2:
        flat = pa.array(np.ascontiguousarray(values).ravel(), type=kind.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.array(values, type=kind)


def image_column(encoded: Sequence[bytes | None], names: Sequence[str], suffix: str) -> pa.Array:
    """Encoded images as Hugging Face's `Image` struct. names: ids, never text from users."""
    return pa.StructArray.from_arrays(
        [
            pa.array(encoded, pa.binary()),
            pa.array([f"{name}{suffix}" for name in names], pa.string()),
        ],
        names=["bytes", "path"],
    )


@cache  # reading the metadata of a package takes milliseconds, and every shard asks
def installed_versions(*packages: str) -> dict[str, str]:
    """Versions of the packages that are installed."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def parquet_rows(store: Store, task: Mapping[str, Any]) -> pa.Table:
    """The rows of a task that names one row group of a Parquet file: {"part": key, "row_group":
    n}."""
    with store.parquet(task["part"]) as file:
        return file.read_row_group(task["row_group"])
