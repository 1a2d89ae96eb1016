"""The frozen dataset: duplicates removed, splits assigned, leaks resolved.

Functions on the index, a table with one row per decoded image and all columns but the picture. They
add to `fate`, the reason for each removed image by its id.
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
from engine.data.leaks import Leak, NearPair, connected, find_leaks, repeated
from engine.data.splits import stratified_group_split


def split_index(
    store: Store, ingest: Manifest, task: str, split: str, further: Iterable[str] = ()
) -> pa.Table:
    """Ids, labels and groups of one split, in the order of its images. further: tasks whose labels
    are needed as well."""
    labels = [rows.label_column(name) for name in (task, *further)]
    columns = [rows.IMAGE_ID, *labels, rows.GROUP_ID]
    return pa.concat_tables(store.tables(ingest.keys(split=split), columns)).combine_chunks()


def by_id(table: pa.Table, column: str) -> dict[str, Any]:
    """The values of a column by the id of their image."""
    ids = table[rows.IMAGE_ID].to_pylist()
    return dict(zip(ids, table[column].to_pylist(), strict=True))


def replace_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """The table with a text column replaced."""
    return table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))


def without(table: pa.Table, removed: Mapping[str, str]) -> pa.Table:
    """The table without the images `removed`."""
    if not removed:
        return table
    return table.filter(
        pc.invert(pc.is_in(table[rows.IMAGE_ID], pa.array(list(removed), pa.string())))
    )


def remove_duplicates(
    index: pa.Table, tasks: Iterable[str], fate: dict[str, str], drop_contradictions: bool = False
) -> pa.Table:
    """Keep the first of equal pictures within a split. Of equal pictures with different labels none
    is kept if `drop_contradictions`; otherwise they raise `DataError`."""
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
    if contradictory and drop_contradictions:
        pixels = alike[rows.PIXEL_SHA256].to_pylist()
        doubtful = {pixels[row] for pair in contradictory for row in pair}
        removed |= {image_id: "contradiction" for image_id, picture
                    in zip(ids, pixels, strict=True) if picture in doubtful}  # fmt: skip
    elif contradictory:
        differing = (
            (uris[a], uris[b], next(pair for pair in zip(labels[a], labels[b], strict=True)
                                    if pair[0] != pair[1]))
            for a, b in contradictory[:5]
        )  # fmt: skip
        examples = "; ".join(
            f"{uri_a} is {label_a!r} and {uri_b} is {label_b!r}"
            for uri_a, uri_b, (label_a, label_b) in differing
        )
        raise DataError(
            f"{len(contradictory)} pictures have two labels: {examples}; keep one of each, or set"
            " audit.on_contradiction to drop"
        )
    fate.update(removed)
    return without(index, removed)


def assign_splits(
    index: pa.Table, names: Sequence[Sequence[str]], fractions: Mapping[str, float], grouped: bool,
    seed: int,
) -> tuple[pa.Table, list[str]]:  # fmt: skip
    """Carve missing splits out of train, by group; returns the index and the names of these splits.

    names: the classes or labels of each image. fractions: of `val` and `test`. grouped: groups are
    those of the reader; otherwise each image is a group of its own.
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
            raise DataError("split: no images are in train; mark some as train")
        total = len(splits) if len(carved) == 2 else int(free.sum())
        shares = {name: fractions[name] * total / free.sum() for name in carved}
        shares = {"train": 1 - sum(shares.values()), **shares}
        splits[free] = stratified_group_split(
            [names[row] for row in np.flatnonzero(free).tolist()],
            np.asarray(groups, dtype=object)[free], shares, seed,
        )  # fmt: skip
    return replace_column(index, rows.SPLIT, splits.tolist()), carved


def resolve_leaks(
    index: pa.Table, leaks: list[Leak], near: Sequence[NearPair], how: str, fate: dict[str, str]
) -> tuple[pa.Table, list[Leak]]:
    """Resolve leaks until none is left, since removed or moved images may uncover others.

    near: the near duplicates that `leaks` were computed from. how: drop removes the image from the
    earlier split, or all images of a group that crosses; move brings groups connected by leaks to
    the latest split among them. Returns the index and all leaks.
    """
    resolved = list(leaks)
    while leaks:
        index = _resolve_once(index, leaks, how, fate)
        leaks = find_leaks(index, near)
        resolved += leaks
    return index, resolved


def _resolve_once(
    index: pa.Table, leaks: Sequence[Leak], how: str, fate: dict[str, str]
) -> pa.Table:
    order = {split: number for number, split in enumerate(rows.SPLITS)}
    ids = index[rows.IMAGE_ID].to_pylist()
    groups, splits = by_id(index, rows.GROUP_ID), by_id(index, rows.SPLIT)
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
        components = connected((groups[leak.first], groups[leak.second]) for leak in leaks)
        component_of = {group: number for number, members in enumerate(components)
                        for group in members}  # fmt: skip
        latest = ["train"] * len(components)
        for image_id in ids:
            if (number := component_of.get(groups[image_id])) is not None:
                latest[number] = max(latest[number], splits[image_id], key=order.__getitem__)
        new = [latest[component_of[groups[i]]] if groups[i] in component_of else splits[i]
               for i in ids]  # fmt: skip
        index = replace_column(index, rows.SPLIT, new)
        # Of equal pictures that now share a split, the first is kept.
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
    index: pa.Table, task: str, limits: Mapping[str, int], seed: int, fate: dict[str, str],
    fraction: float = 1.0,
) -> pa.Table:  # fmt: skip
    """Keep at most `limits[name]` training images of the class `name`, chosen by the seed, and of
    these a fraction, at least two. Smaller sets are part of larger ones."""
    removed: dict[str, str] = {}
    labels = np.asarray(index[rows.label_column(task)].to_pylist(), dtype=object)
    train = np.asarray(index[rows.SPLIT].to_pylist(), dtype=object) == "train"
    ids = np.asarray(index[rows.IMAGE_ID].to_pylist(), dtype=object)
    for name in limits if fraction == 1 else np.unique(labels[train]):
        members = ids[train & (labels == name)]
        limit = min(limits.get(name, len(members)), len(members))
        if fraction < 1:
            limit = max(2, round(fraction * limit))
        order = generator(seed, "train_limit", name).permutation(len(members))
        removed |= dict.fromkeys(members[order[limit:]].tolist(), "train_limit")
    fate.update(removed)
    return without(index, removed)


def generated_images(generate: Manifest) -> list[str]:
    """Keys of the parts of a `generate` step that have images."""
    return [part.key for part in generate.parts if "label" in part.tags]
