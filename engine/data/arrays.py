"""Stored columns as arrays: pixels and vectors; large arrays are mapped from temporary files."""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.core import rows
from engine.core.store import Store
from engine.data.images import decode_own

_IN_MEMORY_BYTES = 2 * 2**30
_VECTORS_IN_MEMORY = 16 * 2**20


def read_pixels(
    store: Store, keys: Sequence[str], shape: tuple[int, int, int], threads: int = 4
) -> tuple[np.ndarray, list[str]]:
    """Pixels uint8 (n, height, width, channels) and ids of all images of these parts, in order.

    Beyond 2 GiB the array is in an unnamed temporary file, so that the page cache bounds memory.
    """
    count = 0
    for key in keys:
        with store.parquet(key) as file:
            count += file.metadata.num_rows
    full_shape = (count, *shape)
    if int(np.prod(full_shape)) <= _IN_MEMORY_BYTES:
        pixels = np.empty(full_shape, dtype=np.uint8)
    else:
        pixels = np.memmap(tempfile.TemporaryFile(), dtype=np.uint8, mode="w+", shape=full_shape)
    ids: list[str] = []
    with ThreadPoolExecutor(threads) as pool:
        for table in store.tables(list(keys), [rows.IMAGE_ID, rows.IMAGE]):
            encoded = pc.struct_field(table[rows.IMAGE], "bytes").to_pylist()
            for image in pool.map(decode_own, encoded):
                pixels[len(ids)] = image
                ids.append("")
            ids[len(ids) - len(encoded) :] = table[rows.IMAGE_ID].to_pylist()
    return pixels, ids


def pictures(store: Store, keys: Sequence[str], ids: Iterable[str]) -> Mapping[str, np.ndarray]:
    """Pixels of a few images by id; reads only row groups that contain one of them."""
    wanted = pa.array(sorted(set(ids)), pa.string())
    pixels: dict[str, Any] = {}
    for key in keys:
        with store.parquet(key) as file:
            for number in range(file.num_row_groups):
                group = file.read_row_group(number, columns=[rows.IMAGE_ID])
                if not pc.any(pc.is_in(group[rows.IMAGE_ID], wanted)).as_py():
                    continue
                table = file.read_row_group(number, columns=[rows.IMAGE_ID, rows.IMAGE])
                table = table.filter(pc.is_in(table[rows.IMAGE_ID], wanted))
                for image_id, image in zip(
                    table[rows.IMAGE_ID].to_pylist(), table[rows.IMAGE].to_pylist(), strict=True
                ):
                    pixels[image_id] = decode_own(image["bytes"])
    return pixels


class Stack:
    """Concatenated arrays that are indexed without a copy of all of them.

    arrays: (n, …), with equal shapes but for n.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = [array for array in arrays if len(array)]
        self.starts = np.cumsum([0, *map(len, self.arrays)])

    def __getitem__(self, wanted: np.ndarray) -> np.ndarray:
        """The rows `wanted` (m,), in that order."""
        taken = np.empty((len(wanted), *self.arrays[0].shape[1:]), self.arrays[0].dtype)
        source = np.searchsorted(self.starts, wanted, "right") - 1
        for number, array in enumerate(self.arrays):
            here = source == number
            taken[here] = array[wanted[here] - self.starts[number]]
        return taken


def large_zeros(count: int, width: int, dtype: Any = np.float32) -> np.ndarray:
    """A writable array (count, width) of zeros; beyond 16 MiB in an unnamed temporary file, so that
    memory does not grow with the number of images."""
    shape = (count, width)
    if count * width * np.dtype(dtype).itemsize <= _VECTORS_IN_MEMORY:
        return np.zeros(shape, dtype)
    return np.memmap(tempfile.TemporaryFile(), dtype=dtype, mode="w+", shape=shape)


def release(array: np.ndarray) -> None:
    """Free the memory of an array that is mapped from a file; its contents stay readable. Does
    nothing for other arrays."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        base.madvise(mmap.MADV_DONTNEED)


def matrix_of(table: pa.Table, name: str) -> np.ndarray:
    """A column of fixed-size lists as an array (n, width)."""
    values = table[name].combine_chunks()
    width = values.type.list_size
    return np.asarray(values.flatten()).reshape(len(values), width)


def vectors_of(table: pa.Table) -> np.ndarray:
    """The column of embeddings as float32 (n, width)."""
    return matrix_of(table, rows.EMBEDDING)


def grouped_vectors(
    store: Store, keys: list[str], group_of: Mapping[str, str]
) -> dict[str, tuple[list[str], np.ndarray]]:
    """Ids and embeddings float32 (n, width) of each group, in the order of the parts.

    Images without a group are omitted. One part is in memory at a time; beyond 16 MiB the vectors
    are in an unnamed temporary file.
    """
    part_ids = [table[rows.IMAGE_ID].to_pylist() for table in store.tables(keys, [rows.IMAGE_ID])]
    ids: dict[str, list[str]] = {name: [] for name in sorted(set(group_of.values()))}
    for part in part_ids:
        for image_id in part:
            if image_id in group_of:
                ids[group_of[image_id]].append(image_id)
    if not any(ids.values()):
        return {}
    with store.parquet(keys[0]) as file:
        width = file.schema_arrow.field(rows.EMBEDDING).type.list_size
    vectors = large_zeros(sum(map(len, ids.values())), width)
    ends = np.cumsum([len(members) for members in ids.values()]).tolist()
    slices = {
        name: slice(end - len(members), end)
        for (name, members), end in zip(ids.items(), ends, strict=True)
    }
    place = {name: own.start for name, own in slices.items()}
    for part, table in zip(part_ids, store.tables(keys, [rows.EMBEDDING]), strict=True):
        embeddings = vectors_of(table)
        names = np.asarray([group_of.get(image_id) for image_id in part], dtype=object)
        for name in set(names) & set(place):
            here = embeddings[names == name]
            vectors[place[name] : place[name] + len(here)] = here
            place[name] += len(here)
        release(vectors)
    return {name: (ids[name], vectors[own]) for name, own in slices.items() if ids[name]}


def aligned(store: Store, keys: Sequence[str], name: str, ids: Sequence[str]) -> np.ndarray:
    """A column of fixed-size lists as (n, width) in the order of `ids`; zeros for images that these
    parts lack.

    One part is in memory at a time; beyond 16 MiB the array is in an unnamed temporary file.
    """
    place = {image_id: row for row, image_id in enumerate(ids)}
    ordered: np.ndarray | None = None
    for table in store.tables(list(keys), [rows.IMAGE_ID, name]):
        here = matrix_of(table, name)
        if ordered is None:
            ordered = large_zeros(len(ids), here.shape[1], here.dtype)
        part_ids = table[rows.IMAGE_ID].to_pylist()
        target = np.asarray([place.get(image_id, -1) for image_id in part_ids])
        known = target >= 0
        ordered[target[known]] = here[known]
        release(ordered)
    return np.zeros((len(ids), 1), np.float32) if ordered is None else ordered


def hashes_of(table: pa.Table) -> np.ndarray:
    """Perceptual hashes as uint64 (n,)."""
    return np.asarray([int(value, 16) for value in table[rows.PHASH].to_pylist()], dtype=np.uint64)


def first_images(
    store: Store, keys: Sequence[str], task: str, count: int
) -> dict[str, list[np.ndarray]]:
    """The first `count` images of each class in these parts."""
    by_class: dict[str, list[np.ndarray]] = {}
    for table in store.tables(list(keys), [rows.IMAGE, rows.label_column(task)]):
        labels = table[rows.label_column(task)].to_pylist()
        encoded = pc.struct_field(table[rows.IMAGE], "bytes")
        for row, label in enumerate(labels):
            images = by_class.setdefault(label, [])
            if len(images) < count:
                images.append(decode_own(encoded[row].as_py()))
    return by_class


def sampled_images(
    store: Store, keys: Sequence[str], task: str, count: int
) -> dict[str, list[np.ndarray]]:
    """A random sample of `count` images of each class in these parts, always the same: the first
    ones of a folder often come from one source."""
    by_class: dict[str, list[str]] = {}
    for table in store.tables(list(keys), [rows.IMAGE_ID, rows.label_column(task)]):
        columns = (table[name].to_pylist() for name in (rows.IMAGE_ID, rows.label_column(task)))
        for image_id, label in zip(*columns, strict=True):
            by_class.setdefault(label, []).append(image_id)
    sample = {
        label: sorted(ids, key=lambda image_id: hashlib.sha256(image_id.encode()).digest())[:count]
        for label, ids in by_class.items()
    }
    images = pictures(store, keys, (image_id for ids in sample.values() for image_id in ids))
    return {label: [images[image_id] for image_id in ids] for label, ids in sample.items()}
