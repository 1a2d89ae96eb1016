"""Leaks between splits: exact duplicates, groups that cross, and near duplicates.

A near duplicate needs two independent signals, the perceptual hash and the embedding. Fixed
thresholds fail (what is rare among photographs is common among X-rays), so both are set from the
data: a small quantile of nearest-neighbour distances between images of *different groups* within
train, which are known to be different pictures. (Unless both signals name the same neighbour: that
may be a twin that nobody grouped, and one of a thousand would set the threshold to nothing.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.core import rows
from engine.core.arrays import release
from engine.core.nearest import Rows, most_similar

_NEIGHBOURS = 10
_SAMPLE = 5_000
# Pairs of hashes that are compared, and vectors that are measured, at once.
_PAIRS, _NORMS = 2**20, 2**12


@dataclass(frozen=True)
class Leak:
    """`kind` is `exact`, `group` or `near`."""

    kind: str
    first: str
    first_uri: str
    first_split: str
    second: str
    second_uri: str
    second_split: str
    detail: str = ""


def find_leaks(
    index: pa.Table,
    vectors: np.ndarray | None,
    quantile: float,
    thresholds: dict[str, Any] | None = None,
) -> tuple[list[Leak], dict[str, Any]]:
    """All leaks among the images of `index`, and the thresholds used for near duplicates.

    vectors: float32 (n, width), rows of NaN for images without; None looks for no near duplicates.
    thresholds: of an earlier look at the same data, rather than new ones.
    """
    splits = np.asarray(index[rows.SPLIT].to_pylist(), dtype=object)

    def leak(kind: str, a: int, b: int, detail: str = "") -> Leak:
        sides = ((index[rows.IMAGE_ID][row].as_py(), index[rows.URI][row].as_py(), splits[row])
                 for row in (a, b))  # fmt: skip
        first, second = sides
        return Leak(kind, *first, *second, detail)

    leaks = []
    for kind, column in (("exact", rows.PIXEL_SHA256), ("group", rows.GROUP_ID)):
        first: dict[tuple[str, str], int] = {}
        by_value: dict[str, list[int]] = {}
        some = repeated(index, column)
        for row, value in zip(some.tolist(), index[column].take(some).to_pylist(), strict=True):
            if first.setdefault((value, splits[row]), row) == row:
                by_value.setdefault(value, []).append(row)
        for value, found in by_value.items():
            detail = value if kind == "group" else ""
            leaks += [leak(kind, a, b, detail) for a, b in combinations(found, 2)]
    if vectors is None:
        return leaks, {}
    known = {(found.first, found.second) for found in leaks} | {
        (found.second, found.first) for found in leaks
    }
    near, thresholds = _near_pairs(index, vectors, splits, quantile, thresholds)
    for a, b, bits, distance in near:
        pair = leak("near", a, b, f"hash {bits} bits apart, embedding {distance:.4f}")
        if (pair.first, pair.second) not in known:
            leaks.append(pair)
    return leaks, thresholds


def repeated(table: pa.Table, column: str) -> np.ndarray:
    """The rows whose value in a column stands in another row too, int64, in order."""
    counts = table.select([column]).group_by(column).aggregate([([], "count_all")])
    values = counts.filter(pc.greater(counts["count_all"], 1))[column]
    return np.flatnonzero(pc.is_in(table[column], values.combine_chunks()))


def _near_pairs(
    index: pa.Table,
    vectors: np.ndarray,
    splits: np.ndarray,
    quantile: float,
    thresholds: dict[str, Any] | None,
) -> tuple[list[tuple[int, int, int, float]], dict[str, Any]]:
    norms = np.empty(len(vectors), np.float32)
    for start in range(0, len(vectors), _NORMS):
        norms[start : start + _NORMS] = np.linalg.norm(vectors[start : start + _NORMS], axis=1)
        release(vectors)
    usable = np.isfinite(norms) & (norms > 0)
    hashes = np.asarray(
        [int(value, 16) for value in index[rows.PHASH].to_pylist()], dtype=np.uint64
    )
    groups = np.asarray(pc.rank(index[rows.GROUP_ID], tiebreaker="min"))

    def neighbours(queries: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        similarity, found = most_similar(Rows(vectors, queries), Rows(vectors, among), _NEIGHBOURS)
        return 1 - similarity, among[found]

    if not thresholds:
        train = np.flatnonzero((splits == "train") & usable)
        if len(train) < 20:
            return [], {}
        thresholds = _calibrate(neighbours, hashes, groups, train, quantile)
    distance_limit, bits_limit = thresholds["embedding_distance"], thresholds["hash_bits"]

    pairs: dict[tuple[int, int], tuple[int, float]] = {}
    for earlier, later in (("train", "val"), ("train", "test"), ("val", "test")):
        among, queries = (np.flatnonzero((splits == name) & usable) for name in (earlier, later))
        if not len(among) or not len(queries):
            continue
        distance, found = neighbours(queries, among)
        bits = np.bitwise_count(hashes[found] ^ hashes[queries][:, None])
        for row, column in zip(
            *np.nonzero((distance <= distance_limit) & (bits <= bits_limit)), strict=True
        ):
            pair = (int(found[row, column]), int(queries[row]))
            pairs[pair] = (int(bits[row, column]), float(distance[row, column]))
    near = [(a, b, bits, distance) for (a, b), (bits, distance) in sorted(pairs.items())]
    return near, thresholds


def _calibrate(
    neighbours: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    hashes: np.ndarray,
    groups: np.ndarray,
    train: np.ndarray,
    quantile: float,
) -> dict[str, Any]:
    """How near different pictures come, by each signal; `twins` counts the training images that
    have a near duplicate in another group of train."""
    sample = train[:: max(1, len(train) // _SAMPLE)]
    distance, found = neighbours(sample, train)
    distance = np.where(groups[found] != groups[sample][:, None], distance, np.inf)
    best = distance.argmin(axis=1)
    nearest, row = np.take_along_axis(distance, best[:, None], 1)[:, 0], np.arange(len(sample))
    nearest_bits = np.full(len(sample), 64)
    block = max(1, _PAIRS // len(train))
    for start in range(0, len(sample), block):
        queries = sample[start : start + block]
        bits = np.bitwise_count(hashes[queries][:, None] ^ hashes[train][None, :])
        bits[groups[queries][:, None] == groups[train][None, :]] = 64
        nearest_bits[start : start + block] = bits.min(axis=1)
    bits_there = np.bitwise_count(hashes[found[row, best]] ^ hashes[sample]).astype(np.int64)
    agree = bits_there <= nearest_bits
    known = np.isfinite(nearest) & ~agree
    if not known.any():
        return {"hash_bits": 0, "embedding_distance": 0.0, "twins": 0}
    distance_limit = round(float(np.quantile(nearest[known], quantile)), 6)
    bits_limit = int(np.quantile(nearest_bits[known], quantile))
    twins = agree & (nearest <= distance_limit) & (bits_there <= bits_limit)
    return {
        "hash_bits": bits_limit,
        "embedding_distance": distance_limit,
        "twins": int(twins.sum()),
    }
