"""Sets of embedded images with vectors in the store: samples are read, and for large sets workers
send sums instead of vectors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from engine.context import Context
from engine.core import rows
from engine.core.rng import generator
from engine.core.shards import Shard, ShardSet, parquet_rows
from engine.core.store import Store
from engine.data.arrays import large_zeros, matrix_of, release, vectors_of
from engine.metrics.diversity import Directions
from engine.metrics.moments import Moments
from engine.work.stage import Batch, Stage

# Up to so many vectors, this process is faster than workers start.
_FEW = 8192
# Vectors of a piece; for fewer than their width, the sums are larger than the vectors.
_PIECE = 16384
_MEMBERS = ("part", "row")
# Folder of the matrices of workers.
SUMS = "sums"


@dataclass(frozen=True)
class Embedded:
    """Images with a vector. labels: text (n,). part, row: the position of each vector, as index in
    `keys` and row of that part, ascending, int64 (n,). width: the width of a vector."""

    keys: tuple[str, ...]
    labels: np.ndarray
    part: np.ndarray
    row: np.ndarray
    width: int

    @classmethod
    def of(cls, store: Store, keys: Sequence[str], label_of: Mapping[str, str]) -> Embedded:
        """The images of `label_of` that have a vector in the parts `keys`."""
        labels: list[str] = []
        places: list[tuple[int, int]] = []
        width = 1
        for number, key in enumerate(keys):
            with store.parquet(key) as file:
                ids = file.read([rows.IMAGE_ID])[rows.IMAGE_ID].to_pylist()
                width = file.schema_arrow.field(rows.EMBEDDING).type.list_size
            for row, image_id in enumerate(ids):
                if image_id in label_of:
                    labels.append(label_of[image_id])
                    places.append((number, row))
        part, row_of = np.asarray(places, np.int64).reshape(-1, 2).T
        return cls(tuple(keys), np.asarray(labels, dtype=object), part, row_of, width)

    @cached_property
    def counts(self) -> Counter[str]:
        return Counter(self.labels.tolist())

    def __len__(self) -> int:
        return len(self.labels)


def room(counts: Mapping[str, int], shares: Mapping[str, float]) -> int:
    """The largest number of images in a mix of classes, given `counts` of each."""
    return int(min(counts.get(label, 0) / share for label, share in shares.items()) + 1e-9)


def draw(labels: np.ndarray, shares: Mapping[str, float], n: int, seed: int) -> np.ndarray:
    """Ascending rows of `n` random images in a mix of classes."""
    chosen = []
    for label, count in quotas(shares, n).items():
        own = np.flatnonzero(labels == label)
        order = generator(seed, "fidelity", label).permutation(len(own))
        chosen.append(own[order[:count]])
    return np.sort(np.concatenate(chosen))


def quotas(shares: Mapping[str, float], n: int) -> dict[str, int]:
    """Number of the `n` images for each class (largest remainder method): its share rounded down,
    or up for the largest remainders, so that the sum is n."""
    exact = {label: n * share for label, share in shares.items()}
    counts = {label: int(count + 1e-9) for label, count in exact.items()}
    lacking = sorted(exact, key=lambda label: counts[label] - exact[label])
    for label in lacking[: n - sum(counts.values())]:
        counts[label] += 1
    return counts


class SampledVectors:
    """Vectors of some rows of a set; above 16 MiB they are in an unnamed temporary file.

    Each part is read once, so draws for many classes do not read it again.
    """

    def __init__(self, store: Store, side: Embedded, chosen: Iterable[np.ndarray]) -> None:
        self.rows = np.unique(np.concatenate([np.empty(0, np.int64), *chosen]))
        self.vectors = large_zeros(len(self.rows), side.width)
        part, row = side.part[self.rows], side.row[self.rows]
        for number in np.unique(part).tolist():
            here = part == number
            self.vectors[here] = read(store, side.keys[number], row[here])
            release(self.vectors)

    def at(self, chosen: np.ndarray) -> np.ndarray:
        """Positions in `vectors` of these rows of the set, which must be among `rows`."""
        return np.searchsorted(self.rows, chosen)

    def of(self, chosen: np.ndarray) -> np.ndarray:
        """Vectors float32 (n, width) of these rows of the set."""
        found: np.ndarray = self.vectors[self.at(chosen)]
        release(self.vectors)
        return found


def read(store: Store, key: str, row: np.ndarray) -> np.ndarray:
    """Vectors float32 (n, width) of some rows of a part."""
    vectors: np.ndarray = vectors_of(pa.concat_tables(store.tables([key], [rows.EMBEDDING])))[row]
    return vectors


@dataclass(frozen=True)
class Sums:
    """The sums that the Fréchet distance and the Vendi score need of a whole set."""

    moments: Moments
    directions: Directions

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.moments + other.moments, self.directions + other.directions)


def added_up(pieces: Iterable[Sums]) -> Sums:
    """The sum of all pieces; two are in memory at a time."""
    return reduce(Sums.__add__, pieces)


def summed_up(store: Store, keys: Sequence[str], part: np.ndarray, row: np.ndarray) -> Sums:
    """The sums of the vectors at these positions; one part is in memory at a time."""
    of_parts = (
        read(store, keys[number], row[part == number]) for number in np.unique(part).tolist()
    )
    return added_up(Sums(Moments.of(vectors), Directions.of(vectors)) for vectors in of_parts)


class SumUp(Stage):
    """Sums of the vectors of each piece, a row of `members`."""

    writes = ("n", "mean", "scatter", "products")

    def __init__(self, store: Store) -> None:
        self.store = store

    def __call__(self, batch: Batch) -> Batch:
        pieces = [
            summed_up(self.store, keys, np.asarray(part), np.asarray(row))
            for keys, part, row in zip(
                *(batch[name].to_pylist() for name in ("keys", *_MEMBERS)), strict=True
            )
        ]
        return {
            **batch, "n": [sums.moments.n for sums in pieces],
            "mean": np.stack([sums.moments.mean for sums in pieces]),
            "scatter": np.stack([sums.moments.scatter.ravel() for sums in pieces]),
            "products": np.stack([sums.directions.products.ravel() for sums in pieces]),
        }  # fmt: skip


class SetSums:
    """Sums of whole sets by name: workers sum pieces of large sets, this process sums small sets
    in the same way.

    The matrices of workers stay in the store until the step ends, so that a restart computes only
    the missing ones, and no process keeps those of all classes.
    """

    def __init__(
        self, context: Context, chosen: Mapping[str, tuple[Embedded, np.ndarray]],
        few: int = _FEW, piece: int = _PIECE,
    ) -> None:  # fmt: skip
        self.store = context.store
        self.shards = ShardSet(self.store, self.store.join(context.prefix, SUMS))
        self.pieces = {
            name: [
                (side, taken[start : start + piece]) for start in range(0, len(taken), piece)
            ]
            for name, (side, taken) in chosen.items()
        }  # fmt: skip
        self.keys: dict[str, list[str]] = {}
        if sum(len(taken) for _, taken in chosen.values()) > few:
            self._compute(context)

    def _compute(self, context: Context) -> None:
        planned = [
            (f"{name}-{number:04d}", side, taken)
            for name, pieces in self.pieces.items()
            for number, (side, taken) in enumerate(pieces)
        ]
        (width,) = {side.width for _, side, _ in planned}
        sink = pa.BufferOutputStream()
        pq.write_table(members_of(planned), sink, row_group_size=1)
        folder = self.store.join(self.shards.prefix, "members")
        members, digest = self.store.put_part(folder, "members", "parquet", sink.getvalue())
        shards = [
            Shard(name, 1, {"part": members, "row_group": number}, {})
            for number, (name, *_) in enumerate(planned)
        ]
        stages: list[Stage] = [SumUp(self.store)]
        # Uses the workers of `decode`, which have no accelerator.
        commits = context.compute(
            "decode", shards, rows_of=parquet_rows, stages=stages, schema=sums_schema(width),
            # It names the parts with the vectors, and these names contain their digests.
            fingerprint={"members": digest},
            prefix=self.shards.prefix, unit="pieces", replace=True,
        )  # fmt: skip
        for commit in commits:
            assert commit.data is not None, "a piece has no status, so that none is left out"
            self.keys.setdefault(commit.shard.rpartition("-")[0], []).append(commit.data.key)

    def of(self, name: str) -> Sums:
        if name in self.keys:
            return added_up(stored(self.store, key) for key in self.keys[name])
        return added_up(
            summed_up(self.store, side.keys, side.part[taken], side.row[taken])
            for side, taken in self.pieces[name]
        )


def members_of(planned: Sequence[tuple[str, Embedded, np.ndarray]]) -> pa.Table:
    """A row for each piece: its rows in its parts. keys: the parts that `part` indexes."""
    columns: dict[str, list[Any]] = {rows.IMAGE_ID: [], "keys": [], "part": [], "row": []}
    for name, side, taken in planned:
        used, part = np.unique(side.part[taken], return_inverse=True)
        columns[rows.IMAGE_ID].append(name)
        columns["keys"].append([side.keys[number] for number in used.tolist()])
        columns["part"].append(part)
        columns["row"].append(side.row[taken])
    return pa.table(columns)


def sums_schema(width: int) -> pa.Schema:
    return pa.schema(
        [
            pa.field(rows.IMAGE_ID, pa.string()),
            pa.field("n", pa.int64()),
            pa.field("mean", pa.list_(pa.float64(), width)),
            pa.field("scatter", pa.list_(pa.float64(), width * width)),
            pa.field("products", pa.list_(pa.float64(), width * width)),
        ]
    )


def stored(store: Store, key: str) -> Sums:
    """The sums that a worker wrote to a part."""
    table = pa.concat_tables(store.tables([key]))
    n, mean = table["n"][0].as_py(), matrix_of(table, "mean")[0]
    scatter, products = (
        matrix_of(table, name)[0].reshape(len(mean), len(mean)) for name in ("scatter", "products")
    )
    return Sums(Moments(n, mean, scatter), Directions(n, products))
