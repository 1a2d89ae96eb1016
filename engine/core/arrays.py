"""Stored columns as arrays: pixels (mapped from a file where they are many) and vectors."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from engine.core import rows
from engine.core.images import decode_own
from engine.core.store import Store

_IN_MEMORY_BYTES = 2 * 2**30


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


def matrix_of(table: pa.Table, name: str) -> np.ndarray:
    """A column of fixed-size lists as float32 (n, width)."""
    values = table[name].combine_chunks()
    width = values.type.list_size
    return np.asarray(values.flatten()).reshape(len(values), width)


def vectors_of(table: pa.Table) -> np.ndarray:
    """The column of embeddings as float32 (n, width)."""
    return matrix_of(table, rows.EMBEDDING)


def hashes_of(table: pa.Table) -> np.ndarray:
    """Perceptual hashes as uint64 (n,)."""
    return np.asarray([int(value, 16) for value in table[rows.PHASH].to_pylist()], dtype=np.uint64)
