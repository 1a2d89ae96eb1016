"""Leaks between splits: exact duplicates, groups that cross, and near duplicates.

Near duplicates are the pairs that `engine.data.near_duplicates` finds. Copies of copies count: what
near duplicates connect is one picture, wherever it lies.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.core import rows

# The ids of two pictures, and how well they agree.
NearPair = tuple[str, str, float]


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


def find_leaks(index: pa.Table, near: Iterable[NearPair] = ()) -> list[Leak]:
    """All leaks among the images of `index`; pairs of `near` with another image are left out."""
    ids = index[rows.IMAGE_ID].to_pylist()
    splits = index[rows.SPLIT].to_pylist()
    order = {split: number for number, split in enumerate(rows.SPLITS)}

    def leak(kind: str, a: int, b: int, detail: str = "") -> Leak:
        one, other = ((ids[row], index[rows.URI][row].as_py(), splits[row]) for row in (a, b))
        return Leak(kind, *one, *other, detail)

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
    known = {frozenset((found.first, found.second)) for found in leaks}
    place = {image_id: row for row, image_id in enumerate(ids)}
    pairs = [(place[a], place[b], agreement) for a, b, agreement in near
             if a in place and b in place]  # fmt: skip
    told: set[int] = set()
    for a, b, agreement in pairs:
        earlier, later = sorted((a, b), key=lambda row: order[splits[row]])
        if splits[a] == splits[b]:
            continue
        told.add(earlier)
        if frozenset((ids[a], ids[b])) not in known:
            leaks.append(leak("near", earlier, later, f"agree to {agreement:.3f}"))
    for held in connected((a, b) for a, b, _ in pairs):
        last = max(held, key=lambda row: order[splits[row]])
        leaks += [leak("near", row, last, "by way of others") for row in held
                  if order[splits[row]] < order[splits[last]] and row not in told
                  and frozenset((ids[row], ids[last])) not in known]  # fmt: skip
    return leaks


def repeated(table: pa.Table, column: str) -> np.ndarray:
    """The rows whose value in a column stands in another row too, int64, in order."""
    counts = table.select([column]).group_by(column).aggregate([([], "count_all")])
    values = counts.filter(pc.greater(counts["count_all"], 1))[column]
    return np.flatnonzero(pc.is_in(table[column], values.combine_chunks()))


def connected(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """What pairs join, directly or by way of others: sorted, by its smallest member."""
    parent: dict[int, int] = {}

    def root(row: int) -> int:
        while parent.setdefault(row, row) != row:
            row = parent[row]
        return row

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    found: dict[int, list[int]] = {}
    for row in sorted(parent):
        found.setdefault(root(row), []).append(row)
    return list(found.values())
