"""Leaks between splits: exact duplicates, groups in several splits, and near duplicates.

`engine.data.near_duplicates` finds pairs of near duplicates. Copies of copies count: all images
that these pairs connect are treated as one picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.core import rows

# The ids of two pictures, and their agreement.
NearPair = tuple[str, str, float]
N = TypeVar("N", int, str)


@dataclass(frozen=True)
class Leak:
    """A pair of images in two splits; `kind` is `exact`, `group` or `near`."""

    kind: str
    first: str
    first_uri: str
    first_split: str
    second: str
    second_uri: str
    second_split: str
    detail: str = ""


def find_leaks(index: pa.Table, near: Iterable[NearPair] = ()) -> list[Leak]:
    """All leaks among the images of `index`; ignores pairs of `near` with other images."""
    ids = index[rows.IMAGE_ID].to_pylist()
    splits = index[rows.SPLIT].to_pylist()
    order = {split: number for number, split in enumerate(rows.SPLITS)}

    def leak(kind: str, a: int, b: int, detail: str = "") -> Leak:
        first, second = ((ids[row], index[rows.URI][row].as_py(), splits[row]) for row in (a, b))
        return Leak(kind, *first, *second, detail)

    leaks = []
    for kind, column in (("exact", rows.PIXEL_SHA256), ("group", rows.GROUP_ID)):
        first: dict[tuple[str, str], int] = {}
        by_value: dict[str, list[int]] = {}
        shared = repeated(index, column)
        for row, value in zip(shared.tolist(), index[column].take(shared).to_pylist(), strict=True):
            if first.setdefault((value, splits[row]), row) == row:
                by_value.setdefault(value, []).append(row)
        for value, firsts in by_value.items():
            detail = value if kind == "group" else ""
            leaks += [leak(kind, a, b, detail) for a, b in combinations(firsts, 2)]
    known = {frozenset((known_leak.first, known_leak.second)) for known_leak in leaks}
    place = {image_id: row for row, image_id in enumerate(ids)}
    pairs = [(place[a], place[b], agreement) for a, b, agreement in near
             if a in place and b in place]  # fmt: skip
    reported: set[int] = set()
    for a, b, agreement in pairs:
        earlier, later = sorted((a, b), key=lambda row: order[splits[row]])
        if splits[a] == splits[b]:
            continue
        reported.add(earlier)
        if frozenset((ids[a], ids[b])) not in known:
            leaks.append(leak("near", earlier, later, f"agree to {agreement:.3f}"))
    for copies in connected((a, b) for a, b, _ in pairs):
        last = max(copies, key=lambda row: order[splits[row]])
        leaks += [leak("near", row, last, "by way of others") for row in copies
                  if order[splits[row]] < order[splits[last]] and row not in reported
                  and frozenset((ids[row], ids[last])) not in known]  # fmt: skip
    return leaks


@dataclass(frozen=True)
class SeenInTrain:
    """Different pictures of a split, and how many of them train has too: equal, or else near."""

    pictures: int
    equal: int
    near: int


def seen_in_train(
    digests: Sequence[str], splits: Sequence[str], near: Iterable[Sequence[int]]
) -> dict[str, SeenInTrain]:
    """Pictures of val and test that are in train too. digests, splits: of each image. near: pairs
    of near duplicates, as rows."""
    of_split: dict[str, set[str]] = {split: set() for split in rows.SPLITS}
    for digest, split in zip(digests, splits, strict=True):
        of_split[split].add(digest)
    like_train: dict[str, set[str]] = {split: set() for split in rows.SPLITS}
    for a, b in near:
        for one, other in ((a, b), (b, a)):
            if splits[other] == "train":
                like_train[splits[one]].add(digests[one])
    seen = {}
    for split in ("val", "test"):
        equal = of_split[split] & of_split["train"]
        seen[split] = SeenInTrain(len(of_split[split]), len(equal), len(like_train[split] - equal))
    return seen


def repeated(table: pa.Table, column: str) -> np.ndarray:
    """The rows whose value in a column also occurs in another row: int64, in order."""
    counts = table.select([column]).group_by(column).aggregate([([], "count_all")])
    values = counts.filter(pc.greater(counts["count_all"], 1))[column]
    return np.flatnonzero(pc.is_in(table[column], values.combine_chunks()))


def connected(pairs: Iterable[tuple[N, N]]) -> list[list[N]]:
    """The connected components of a graph with the edges `pairs`, each sorted, ordered by their
    smallest members."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = list(pairs)
    nodes = sorted({node for edge in edges for node in edge})
    place = {node: number for number, node in enumerate(nodes)}
    ends = np.asarray([(place[a], place[b]) for a, b in edges], np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(edges)), tuple(ends)), shape=(len(nodes), len(nodes)))
    components: dict[int, list[N]] = {}
    for node, number in zip(nodes, connected_components(graph, directed=False)[1], strict=True):
        components.setdefault(int(number), []).append(node)
    return list(components.values())
