"""Stored columns as arrays: pixels (mapped from a file where they are many) and vectors."""

from __future__ import annotations

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

    Beyond 2 GiB the array lies in an unnamed temporary file, so that memory stays bounded by the
    page cache.
    """
    count = 0
    for key in keys:
        with store.parquet(key) as file:
            count += file.metadata.num_rows
    whole = (count, *shape)
    if int(np.prod(whole)) <= _IN_MEMORY_BYTES:
        pixels = np.empty(whole, dtype=np.uint8)
    else:
        pixels = np.memmap(tempfile.TemporaryFile(), dtype=np.uint8, mode="w+", shape=whole)
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
    """Pixels of a few images by id; of the parts, only row groups are read that hold one."""
    wanted = pa.array(sorted(set(ids)), pa.string())
    found: dict[str, Any] = {}
    for key in keys:
        with store.parquet(key) as file:
            for number in range(file.num_row_groups):
                held = file.read_row_group(number, columns=[rows.IMAGE_ID])
                if not pc.any(pc.is_in(held[rows.IMAGE_ID], wanted)).as_py():
                    continue
                table = file.read_row_group(number, columns=[rows.IMAGE_ID, rows.IMAGE])
                table = table.filter(pc.is_in(table[rows.IMAGE_ID], wanted))
                for image_id, image in zip(
                    table[rows.IMAGE_ID].to_pylist(), table[rows.IMAGE].to_pylist(), strict=True
                ):
                    found[image_id] = decode_own(image["bytes"])
    return found


class Stack:
    """Arrays one after the other, of which rows are taken without a copy of the whole.

    arrays: (n, …), alike but for n.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = [array for array in arrays if len(array)]
        self.starts = np.cumsum([0, *map(len, self.arrays)])

    def __getitem__(self, wanted: np.ndarray) -> np.ndarray:
        """The rows `wanted` (m,), in their order."""
        found = np.empty((len(wanted), *self.arrays[0].shape[1:]), self.arrays[0].dtype)
        of = np.searchsorted(self.starts, wanted, "right") - 1
        for number, array in enumerate(self.arrays):
            here = of == number
            found[here] = array[wanted[here] - self.starts[number]]
        return found


def large_zeros(count: int, width: int, dtype: Any = np.float32) -> np.ndarray:
    """An array (count, width) of zeros, to be filled: beyond 16 MiB in an unnamed temporary file,
    so that memory does not grow with the images."""
    shape = (count, width)
    if count * width * np.dtype(dtype).itemsize <= _VECTORS_IN_MEMORY:
        return np.zeros(shape, dtype)
    return np.memmap(tempfile.TemporaryFile(), dtype=dtype, mode="w+", shape=shape)


def release(array: np.ndarray) -> None:
    """Let the system take the pages of an array that lies in a file, which stay where it is read
    again; of any other, do nothing."""
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
    """Ids and embeddings float32 (n, width) of the images of each group, in the order of the parts;
    images without a group are left out.

    One part is in memory at a time; beyond 16 MiB the vectors lie in an unnamed temporary file.
    """
    of_part = [table[rows.IMAGE_ID].to_pylist() for table in store.tables(keys, [rows.IMAGE_ID])]
    ids: dict[str, list[str]] = {name: [] for name in sorted(set(group_of.values()))}
    for part in of_part:
        for image_id in part:
            if image_id in group_of:
                ids[group_of[image_id]].append(image_id)
    if not any(ids.values()):
        return {}
    with store.parquet(keys[0]) as file:
        width = file.schema_arrow.field(rows.EMBEDDING).type.list_size
    vectors = large_zeros(sum(map(len, ids.values())), width)
    ends = np.cumsum([len(held) for held in ids.values()]).tolist()
    slices = {
        name: slice(end - len(held), end)
        for (name, held), end in zip(ids.items(), ends, strict=True)
    }
    place = {name: held.start for name, held in slices.items()}
    for part, table in zip(of_part, store.tables(keys, [rows.EMBEDDING]), strict=True):
        found = vectors_of(table)
        names = np.asarray([group_of.get(image_id) for image_id in part], dtype=object)
        for name in set(names) & set(place):
            here = found[names == name]
            vectors[place[name] : place[name] + len(here)] = here
            place[name] += len(here)
        release(vectors)
    return {name: (ids[name], vectors[held]) for name, held in slices.items() if ids[name]}


def aligned(store: Store, keys: Sequence[str], name: str, ids: Sequence[str]) -> np.ndarray:
    """A column of fixed-size lists as (n, width), its rows in the order of `ids`; zeros for images
    that these parts do not hold.

    One part is in memory at a time; beyond 16 MiB the array lies in an unnamed temporary file.
    """
    place = {image_id: row for row, image_id in enumerate(ids)}
    found: np.ndarray | None = None
    for table in store.tables(list(keys), [rows.IMAGE_ID, name]):
        here = matrix_of(table, name)
        if found is None:
            found = large_zeros(len(ids), here.shape[1], here.dtype)
        held = [place.get(image_id, -1) for image_id in table[rows.IMAGE_ID].to_pylist()]
        known = np.asarray(held) >= 0
        found[np.asarray(held)[known]] = here[known]
        release(found)
    return np.zeros((len(ids), 1), np.float32) if found is None else found


def hashes_of(table: pa.Table) -> np.ndarray:
    """Perceptual hashes as uint64 (n,)."""
    return np.asarray([int(value, 16) for value in table[rows.PHASH].to_pylist()], dtype=np.uint64)
