from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from engine.data.arrays import large_zeros, release
from engine.vectors.similarity import Rows, most_similar


def vectors(count: int, seed: int, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@pytest.mark.parametrize("count", [3, 2048, 5001])  # less than asked for, a block, some blocks
def test_similarities_equal_scikit_learn(count: int) -> None:
    among, queries = vectors(count, 0), vectors(5, 1)
    similarity, found = most_similar(queries, among, 6)
    exact = NearestNeighbors(n_neighbors=min(6, count), metric="cosine").fit(among)
    distance, expected = exact.kneighbors(queries)
    assert (found == expected).all()
    assert np.allclose(1 - similarity, distance, atol=1e-5)


def test_queries_are_processed_in_blocks() -> None:
    among = vectors(40, 0)
    _, found = most_similar(np.repeat(among, 130, axis=0), among, 1)
    assert (found[:, 0] == np.repeat(np.arange(40), 130)).all()


def test_selected_rows_are_compared_like_a_whole_array() -> None:
    held = vectors(60, 0)
    asked, among = np.array([5, 59, 0]), np.arange(1, 60, 2)
    assert all(
        np.array_equal(first, second)
        for first, second in zip(
            most_similar(Rows(held, asked), Rows(held, among), 4),
            most_similar(held[asked], held[among], 4), strict=True,
        )
    )  # fmt: skip


def mapped() -> bool:
    """Whether the system reports file-backed memory."""
    return Path("/proc/self/smaps").exists()


@pytest.mark.skipif(not mapped(), reason="Linux tells what is resident")
def test_released_memory_is_not_resident_and_reads_as_before() -> None:
    held = large_zeros(6000, 1000)
    held[:] = np.arange(6000)[:, None]
    before = resident()
    release(held[10:20])
    assert before - resident() > 20
    assert (held[:, 7] == np.arange(6000)).all()
    small = large_zeros(3, 2)
    small[:] = 1
    release(small)
    assert small.sum() == 6


def resident() -> float:
    """File-backed memory of this process, in MB."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[2]) * 4096 / 1e6
