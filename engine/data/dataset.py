"""The frozen dataset: duplicates removed, splits assigned, leaks mended.

Functions on the index, a table with a row for each decoded image and all columns but the picture.
`fate` is a record that they add to: the id of each image taken out, and why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.core import rows
from engine.core.errors import DataError
from engine.core.manifest import Manifest
from engine.core.rng import generator
from engine.core.store import Store
from engine.data.leaks import Leak, NearPair, find_leaks, repeated
from engine.data.splits import stratified_group_split


def split_index(store: Store, ingest: Manifest, task: str, split: str) -> pa.Table:
    """Ids, labels and groups of one split, in the order of its images."""
    columns = [rows.IMAGE_ID, rows.label_column(task), rows.GROUP_ID]
    return pa.concat_tables(store.tables(ingest.keys(split=split), columns)).combine_chunks()


def replace_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """The table with a text column replaced."""
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))


def without(table: pa.Table, removed: Mapping[str, str]) -> pa.Table:
    """The table less the images named."""
    if not removed:
        return table
    return table.filter(
        pc.invert(pc.is_in(table[rows.IMAGE_ID], pa.array(list(removed), pa.string())))
    )


def remove_duplicates(index: pa.Table, tasks: Iterable[str], fate: dict[str, str]) -> pa.Table:
    """Keep the first of equal pictures within a split. Raises `DataError` where their labels
    contradict."""
    alike = index.take(repeated(index, rows.PIXEL_SHA256))
    ids, uris = alike[rows.IMAGE_ID].to_pylist(), alike[rows.URI].to_pylist()
    splits = alike[rows.SPLIT].to_pylist()
    labels = list(zip(*(alike[rows.label_column(task)].to_pylist() for task in tasks), strict=True))
    first: dict[str, int] = {}
    kept: dict[tuple[str, str], int] = {}
    contradictory: list[tuple[int, int]] = []
    removed: dict[str, str] = {}
    for row, pixels in enumerate(alike[rows.PIXEL_SHA256].to_pylist()):
        known = first.setdefault(pixels, row)
        if labels[known] != labels[row]:
            contradictory.append((known, row))
        elif kept.setdefault((pixels, splits[row] or "train"), row) != row:
            removed[ids[row]] = "duplicate"
    if contradictory:
        differing = (
            (uris[a], uris[b], next(pair for pair in zip(labels[a], labels[b], strict=True)
                                    if pair[0] != pair[1]))
            for a, b in contradictory[:5]
        )  # fmt: skip
        some = "; ".join(
            f"{first} is {one!r} and {second} is {other!r}"
            for first, second, (one, other) in differing
        )
        raise DataError(
            f"{len(contradictory)} pictures stand under two labels: {some}; keep one of each"
        )
    fate.update(removed)
    return without(index, removed)


def assign_splits(
    index: pa.Table, task: str, fractions: Mapping[str, float], grouped: bool, seed: int
) -> tuple[pa.Table, list[str]]:
    """Carve the splits that are not given out of train, by group; returns which were carved.

    fractions: of `val` and `test`. grouped: images bear the group that the reader gave; otherwise
    each is a group of its own.
    """
    ids = index[rows.IMAGE_ID].to_pylist()
    groups = index[rows.GROUP_ID].to_pylist() if grouped else ids
    index = replace_column(index, rows.GROUP_ID, groups)
    splits = np.asarray([split or "train" for split in index[rows.SPLIT].to_pylist()], dtype=object)
    given = set(splits)
    carved = [name for name in ("val", "test") if name not in given]
    if carved:
        free = splits == "train"
        if not free.any():
            raise DataError("split: there are no training images; mark some as train")
        total = len(splits) if len(carved) == 2 else int(free.sum())
        shares = {name: fractions[name] * total / free.sum() for name in carved}
        shares = {"train": 1 - sum(shares.values()), **shares}
        labels = np.asarray(index[rows.label_column(task)].to_pylist(), dtype=object)
        splits[free] = stratified_group_split(
            labels[free], np.asarray(groups, dtype=object)[free], shares, seed
        )
    return replace_column(index, rows.SPLIT, splits.tolist()), carved


def mend_all(
    index: pa.Table, leaks: list[Leak], near: Sequence[NearPair], how: str, fate: dict[str, str]
) -> tuple[pa.Table, list[Leak]]:
    """`mend_leaks` until none is left: what goes or moves may uncover others. Returns all leaks.

    near: what the leaks were found by.
    """
    found = list(leaks)
    while leaks:
        index = mend_leaks(index, leaks, how, fate)
        leaks = find_leaks(index, near)
        found += leaks
    return index, found


def mend_leaks(index: pa.Table, leaks: Sequence[Leak], how: str, fate: dict[str, str]) -> pa.Table:
    """drop: the image (of a crossing group, all its images) leaves the earlier split.

    move: groups that leaks connect go to the latest split among them, as a whole.
    """
    order = {split: number for number, split in enumerate(rows.SPLITS)}
    ids = index[rows.IMAGE_ID].to_pylist()
    groups = dict(zip(ids, index[rows.GROUP_ID].to_pylist(), strict=True))
    splits = dict(zip(ids, index[rows.SPLIT].to_pylist(), strict=True))
    removed: dict[str, str] = {}
    if how == "drop":
        members: dict[tuple[str, str], list[str]] = {}
        for image_id in ids:
            members.setdefault((groups[image_id], splits[image_id]), []).append(image_id)
        for leak in leaks:
            earlier, _ = sorted(
                (leak.first, leak.second), key=lambda image_id: order[splits[image_id]]
            )
            if leak.kind == "group":
                removed |= dict.fromkeys(members[groups[earlier], splits[earlier]], "leak")
            removed[earlier] = "leak"
    else:
        parent: dict[str, str] = {}

        def root(group: str) -> str:
            while parent.setdefault(group, group) != group:
                group = parent[group]
            return group

        for leak in leaks:
            parent[root(groups[leak.first])] = root(groups[leak.second])
        latest: dict[str, str] = {}
        for image_id in ids:
            if groups[image_id] in parent:
                top = root(groups[image_id])
                latest[top] = max(
                    latest.get(top, "train"), splits[image_id], key=lambda split: order[split]
                )
        new = [latest[root(groups[i])] if groups[i] in parent else splits[i] for i in ids]
        index = replace_column(index, rows.SPLIT, new)
        # Equal pictures that now share a split: one is enough.
        seen: set[tuple[str, str]] = set()
        for image_id, pixels, split in zip(
            ids, index[rows.PIXEL_SHA256].to_pylist(), new, strict=True
        ):
            if (pixels, split) in seen:
                removed[image_id] = "duplicate"
            seen.add((pixels, split))
    fate.update(removed)
    return without(index, removed)


def limit_train(
    index: pa.Table, task: str, limits: Mapping[str, int], seed: int, fate: dict[str, str]
) -> pa.Table:
    """Keep at most `limits` training images of a class, chosen by the seed."""
    removed: dict[str, str] = {}
    labels = np.asarray(index[rows.label_column(task)].to_pylist(), dtype=object)
    train = np.asarray(index[rows.SPLIT].to_pylist(), dtype=object) == "train"
    ids = np.asarray(index[rows.IMAGE_ID].to_pylist(), dtype=object)
    for name, limit in limits.items():
        held = ids[train & (labels == name)]
        order = generator(seed, "train_limit", name).permutation(len(held))
        removed |= dict.fromkeys(held[order[limit:]].tolist(), "train_limit")
    fate.update(removed)
    return without(index, removed)
